// Command client loads a server with calls, checks every one of them, and prints what it saw as one line of JSON.
//
// It prints "ready" once it is connected and has made a call on every connection, and begins when it reads a line, so that
// whoever measures the server can read the server's figures in between.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	firstPrompt  = "Ready?"
	retryDelay   = 20 * time.Millisecond
	startTimeout = 30 * time.Second
)

// options are what the command line sets.
type options struct {
	address     string
	protocol    string
	key         string
	unary       bool
	streams     int
	connections int
	calls       int
	seconds     float64
	stagger     float64
	deadline    float64
	maxTokens   int
	prompt      string
	text        string
	temperature float64
	trace       bool
}

// message is a piece of an answer: its text, and how many tokens have been generated so far.
type message struct {
	text      string
	generated int
}

// caller makes calls in one protocol. It returns the status of a call, "OK" if it ended well.
type caller interface {
	// connect opens the connection that the stream uses, and makes a first call on it.
	connect(ctx context.Context, stream int) error
	call(ctx context.Context, stream int, prompt string, maxTokens int, receive func(message)) string
}

func main() {
	log.SetFlags(0)
	o := parse()
	caller := newCaller(o)
	ctx := context.Background()
	for stream := range min(o.streams, o.connections) {
		if err := connect(ctx, caller, stream); err != nil {
			log.Fatalf("no answer from %s: %v", o.address, err)
		}
	}
	fmt.Println("ready")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		log.Fatal("nobody told this client to begin")
	}
	if err := json.NewEncoder(os.Stdout).Encode(run(ctx, o, caller)); err != nil {
		log.Fatal(err)
	}
}

// connect tries until the server answers, which it may only do once its engine has started.
func connect(ctx context.Context, caller caller, stream int) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for begun := time.Now(); ; time.Sleep(retryDelay) {
		err := caller.connect(ctx, stream)
		if err == nil || time.Since(begun) > startTimeout {
			return err
		}
	}
}

func parse() options {
	var o options
	flag.StringVar(&o.address, "address", "", "HOST:PORT of the server")
	flag.StringVar(&o.protocol, "protocol", "grpc", "grpc, http (JSON, and server-sent events) or llama (llama.cpp's own HTTP server)")
	flag.StringVar(&o.key, "key", "", "API key to send")
	flag.BoolVar(&o.unary, "unary", false, "whether to ask for the whole answer at once")
	flag.IntVar(&o.streams, "streams", 1, "calls at a time")
	flag.IntVar(&o.connections, "connections", 8, "connections that the calls share; HTTP/1.1 has one for each call at a time")
	flag.IntVar(&o.calls, "calls", 0, "calls that follow each other on a stream; 0 is as many as begin in -seconds")
	flag.Float64Var(&o.seconds, "seconds", 5, "how long calls begin; with -stagger, where the window of the speed ends")
	flag.Float64Var(&o.stagger, "stagger", 1, "seconds over which the streams begin, evenly; the speed is measured from then on")
	flag.Float64Var(&o.deadline, "deadline", 30, "seconds that a call may take")
	flag.IntVar(&o.maxTokens, "max-tokens", 100, "tokens of a call, all of which must arrive")
	flag.StringVar(&o.prompt, "prompt", "Tell me of the llama.", "the prompt; a %d in it is the number of the call")
	flag.StringVar(&o.text, "text", "", "what every answer says over and over, 4 bytes a token; if empty, the text is not compared")
	flag.Float64Var(&o.temperature, "temperature", -1, "temperature to sample with; if negative, none is sent")
	flag.BoolVar(&o.trace, "trace", false, "whether to print when each message of each stream arrived")
	flag.Parse()
	if o.address == "" || o.streams < 1 || o.maxTokens < 1 || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	return o
}

func newCaller(o options) caller {
	switch o.protocol {
	case "grpc":
		return newGRPCCaller(o)
	case "http":
		return newHTTPCaller(o, eventOfExample, "/generate", "/generate_deltas")
	case "llama":
		return newHTTPCaller(o, eventOfLlama, "/completion", "/completion")
	}
	log.Fatalf("unknown protocol %q", o.protocol)
	return nil
}

// run makes the calls of all streams, and returns what they saw together.
func run(ctx context.Context, o options, caller caller) report {
	expected := strings.Repeat(o.text, 1+4*o.maxTokens/max(len(o.text), 1))
	if o.text != "" {
		expected = expected[:4*o.maxTokens]
	}
	before := cpuSeconds()
	start := time.Now()
	seen := make([]*record, o.streams)
	var running sync.WaitGroup
	for stream := range o.streams {
		seen[stream] = newRecord(o, expected, start)
		running.Add(1)
		go func() {
			defer running.Done()
			begin := start.Add(time.Duration(float64(stream) / float64(o.streams) * o.stagger * float64(time.Second)))
			time.Sleep(time.Until(begin))
			for number := 0; number < o.calls || (o.calls == 0 && time.Since(start).Seconds() < o.seconds); number++ {
				prompt := strings.ReplaceAll(o.prompt, "%d", fmt.Sprint(number*o.streams+stream))
				seen[stream].callOnce(ctx, caller, stream, prompt)
			}
		}()
	}
	running.Wait()
	return summarize(o, seen, start, time.Now(), cpuSeconds()-before)
}

func (r *record) callOnce(ctx context.Context, caller caller, stream int, prompt string) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.o.deadline*float64(time.Second)))
	defer cancel()
	r.begin()
	r.end(caller.call(ctx, stream, prompt, r.o.maxTokens, r.receive))
}

func cpuSeconds() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}
