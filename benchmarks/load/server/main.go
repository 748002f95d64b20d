// Command server is a gRPC server of the contract in Go that plays the script of the benchmarks: a limit to compare with.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"time"

	"google.golang.org/grpc"

	flywheelv1 "flywheel-load/flywheel/v1"
)

// service plays the script: a token after each delay, by the clock.
type service struct {
	flywheelv1.UnimplementedGenerationServiceServer
	text  string
	delay time.Duration
}

func main() {
	text := flag.String("text", "", "what every answer says over and over, 4 bytes a token")
	delay := flag.Float64("delay", 0, "seconds before each token")
	flag.Parse()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	flywheelv1.RegisterGenerationServiceServer(server, &service{text: *text, delay: time.Duration(*delay * float64(time.Second))})
	fmt.Println("ready:", listener.Addr())
	log.Fatal(server.Serve(listener))
}

func (s *service) token(number int) string {
	at := 4 * number % len(s.text)
	return s.text[at : at+4]
}

func (s *service) GenerateDeltas(request *flywheelv1.GenerationRequest, stream grpc.ServerStreamingServer[flywheelv1.GenerationDelta]) error {
	start := time.Now()
	for number := range int(request.MaxTokens) {
		time.Sleep(time.Until(start.Add(time.Duration(number+1) * s.delay)))
		delta := &flywheelv1.GenerationDelta{Text: s.token(number), GeneratedTokens: int32(number + 1)}
		if delta.GeneratedTokens == request.MaxTokens {
			delta.FinishReason = "length"
		}
		if err := stream.Send(delta); err != nil {
			return err
		}
	}
	return nil
}

// GenerateAll answers at once: whole answers are measured without a delay.
func (s *service) GenerateAll(_ context.Context, request *flywheelv1.GenerationRequest) (*flywheelv1.GenerationResponse, error) {
	sample := &flywheelv1.GenerationResponseSample{GeneratedTokens: request.MaxTokens, FinishReason: "length"}
	for number := range int(request.MaxTokens) {
		sample.Text += s.token(number)
	}
	return &flywheelv1.GenerationResponse{NumSamples: 1, Responses: []*flywheelv1.GenerationResponseSample{sample}, Prompt: request.Text}, nil
}
