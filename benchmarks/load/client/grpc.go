package main

import (
	"context"
	"errors"
	"io"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	flywheelv1 "flywheel-load/flywheel/v1"
)

// grpcCaller calls flywheel.v1.GenerationService.
type grpcCaller struct {
	o     options
	stubs []flywheelv1.GenerationServiceClient
}

func newGRPCCaller(o options) *grpcCaller {
	caller := &grpcCaller{o: o}
	for range min(o.streams, o.connections) {
		connection, err := grpc.NewClient("passthrough:///"+o.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			log.Fatal(err)
		}
		caller.stubs = append(caller.stubs, flywheelv1.NewGenerationServiceClient(connection))
	}
	return caller
}

func (c *grpcCaller) connect(ctx context.Context, stream int) error {
	ctx = c.withKey(ctx)
	_, err := c.stub(stream).GenerateAll(ctx, c.request(firstPrompt, 1))
	return err
}

func (c *grpcCaller) call(ctx context.Context, stream int, prompt string, maxTokens int, receive func(message)) string {
	ctx = c.withKey(ctx)
	if c.o.unary {
		response, err := c.stub(stream).GenerateAll(ctx, c.request(prompt, maxTokens))
		for _, sample := range response.GetResponses() {
			receive(message{sample.GetText(), int(sample.GetGeneratedTokens())})
		}
		return codeOf(err)
	}
	deltas, err := c.stub(stream).GenerateDeltas(ctx, c.request(prompt, maxTokens))
	for err == nil {
		var delta *flywheelv1.GenerationDelta
		if delta, err = deltas.Recv(); err == nil {
			receive(message{delta.GetText(), int(delta.GetGeneratedTokens())})
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return codeOf(err)
}

func (c *grpcCaller) stub(stream int) flywheelv1.GenerationServiceClient {
	return c.stubs[stream%len(c.stubs)]
}

func (c *grpcCaller) withKey(ctx context.Context) context.Context {
	if c.o.key == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.o.key)
}

func (c *grpcCaller) request(prompt string, maxTokens int) *flywheelv1.GenerationRequest {
	request := &flywheelv1.GenerationRequest{Text: prompt, MaxTokens: int32(maxTokens)}
	if c.o.temperature >= 0 {
		temperature := float32(c.o.temperature)
		request.Temperature = &temperature
	}
	return request
}

// codeOf returns "OK", or what Go calls the status of a call that failed.
func codeOf(err error) string {
	code := status.Code(err)
	if code == codes.OK {
		return "OK"
	}
	return code.String()
}
