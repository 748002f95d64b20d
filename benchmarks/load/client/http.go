package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// httpCaller posts JSON, and reads JSON or server-sent events.
type httpCaller struct {
	o       options
	client  *http.Client
	read    func(body []byte, generated int) (message, error)
	whole   string
	streams string
}

func newHTTPCaller(o options, read func([]byte, int) (message, error), whole, streams string) *httpCaller {
	transport := &http.Transport{MaxIdleConnsPerHost: o.streams, MaxIdleConns: o.streams, DisableCompression: true}
	return &httpCaller{o, &http.Client{Transport: transport}, read, whole, streams}
}

func (c *httpCaller) connect(ctx context.Context, stream int) error {
	status := c.call(ctx, stream, firstPrompt, 1, func(message) {})
	if status != "OK" {
		return errors.New(status)
	}
	return nil
}

func (c *httpCaller) call(ctx context.Context, _ int, prompt string, maxTokens int, receive func(message)) string {
	err := c.post(ctx, prompt, maxTokens, receive)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "DeadlineExceeded"
	case err != nil:
		return err.Error()
	}
	return "OK"
}

func (c *httpCaller) post(ctx context.Context, prompt string, maxTokens int, receive func(message)) error {
	path := c.streams
	if c.o.unary {
		path = c.whole
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+c.o.address+path, bytes.NewReader(c.body(prompt, maxTokens)))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	if c.o.key != "" {
		request.Header.Set("Authorization", "Bearer "+c.o.key)
	}
	response, err := c.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("HTTP %d", response.StatusCode)
	}
	if c.o.unary {
		return c.readWhole(response.Body, receive)
	}
	return c.readEvents(response.Body, receive)
}

func (c *httpCaller) body(prompt string, maxTokens int) []byte {
	body := map[string]any{"text": prompt, "max_tokens": maxTokens}
	if c.o.protocol == "llama" {
		body = map[string]any{"prompt": prompt, "n_predict": maxTokens, "stream": !c.o.unary, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
	}
	if c.o.temperature >= 0 {
		body["temperature"] = c.o.temperature
	}
	encoded, err := json.Marshal(body)
	if err != nil {
		panic(err)
	}
	return encoded
}

func (c *httpCaller) readWhole(body io.Reader, receive func(message)) error {
	whole, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	piece, err := c.read(whole, 0)
	if err == nil {
		receive(piece)
	}
	return err
}

// readEvents reads server-sent events, each of which is one line of JSON.
func (c *httpCaller) readEvents(body io.Reader, receive func(message)) error {
	lines := bufio.NewReader(body)
	generated := 0
	for {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		data, found := bytes.CutPrefix(line, []byte("data: "))
		if !found {
			continue
		}
		piece, err := c.read(data, generated)
		if err != nil {
			return err
		}
		generated = piece.generated
		receive(piece)
	}
}

// eventOfExample reads a delta, or the first sample of a whole answer, of the published example's design.
func eventOfExample(body []byte, _ int) (message, error) {
	var answer struct {
		Text            string `json:"text"`
		GeneratedTokens int    `json:"generated_tokens"`
		Responses       []struct {
			Text            string `json:"text"`
			GeneratedTokens int    `json:"generated_tokens"`
		} `json:"responses"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return message{}, err
	}
	if len(answer.Responses) > 0 {
		return message{answer.Responses[0].Text, answer.Responses[0].GeneratedTokens}, nil
	}
	return message{answer.Text, answer.GeneratedTokens}, nil
}

// eventOfLlama reads an event of llama.cpp's own server, which has one token, and at the end how many there were.
func eventOfLlama(body []byte, generated int) (message, error) {
	var answer struct {
		Content         string `json:"content"`
		Stop            bool   `json:"stop"`
		TokensPredicted int    `json:"tokens_predicted"`
		Tokens          []int  `json:"tokens"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return message{}, err
	}
	if answer.Stop {
		return message{answer.Content, answer.TokensPredicted}, nil
	}
	return message{answer.Content, generated + len(answer.Tokens)}, nil
}
