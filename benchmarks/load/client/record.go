package main

import (
	"slices"
	"strings"
	"time"
)

// record is what one stream sees, call after call. Times are in milliseconds.
type record struct {
	o        options
	expected string
	from, to time.Time

	began    time.Time
	last     time.Time
	received int // bytes of text of this call
	tokens   int // generated tokens of this call
	spoilt   bool

	statuses   map[string]int
	wrongTexts int
	wrongCount int
	allTokens  int
	inWindow   int
	messages   int
	firsts     []float64
	gaps       []float64
	durations  []float64
	arrivals   []arrival
}

// arrival is when a message came, in seconds since the epoch, and how many tokens it brought.
type arrival struct {
	At     float64 `json:"at"`
	Tokens int     `json:"tokens"`
}

func newRecord(o options, expected string, start time.Time) *record {
	second := float64(time.Second)
	return &record{
		o: o, expected: expected, statuses: map[string]int{},
		from: start.Add(time.Duration(o.stagger * second)), to: start.Add(time.Duration(o.seconds * second)),
	}
}

func (r *record) begin() {
	r.began, r.received, r.tokens, r.spoilt = time.Now(), 0, 0, false
}

func (r *record) receive(m message) {
	now := time.Now()
	if r.received == 0 && r.tokens == 0 {
		r.firsts = append(r.firsts, milliseconds(now.Sub(r.began)))
	} else {
		r.gaps = append(r.gaps, milliseconds(now.Sub(r.last)))
	}
	r.last = now
	r.messages++
	tokens := m.generated - r.tokens
	r.tokens = m.generated
	r.allTokens += tokens
	if now.After(r.from) && now.Before(r.to) {
		r.inWindow += tokens
	}
	if r.o.trace {
		r.arrivals = append(r.arrivals, arrival{float64(now.UnixNano()) / 1e9, tokens})
	}
	if r.o.text != "" && !strings.HasPrefix(r.expected[min(r.received, len(r.expected)):], m.text) {
		r.spoilt = true
	}
	r.received += len(m.text)
}

func (r *record) end(status string) {
	r.durations = append(r.durations, milliseconds(time.Since(r.began)))
	r.statuses[status]++
	if status != "OK" {
		return
	}
	if r.tokens != r.o.maxTokens {
		r.wrongCount++
	}
	if r.o.text != "" && (r.spoilt || r.received != len(r.expected)) {
		r.wrongTexts++
	}
}

// spread is how values are spread, in milliseconds.
type spread struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

func spreadOf(values []float64) *spread {
	if len(values) == 0 {
		return nil
	}
	slices.Sort(values)
	at := func(share float64) float64 { return values[int(share*float64(len(values)-1))] }
	return &spread{at(0.5), at(0.99), at(1)}
}

// report is what all streams saw.
type report struct {
	Began            string         `json:"began"`
	Seconds          float64        `json:"seconds"`
	Calls            int            `json:"calls"`
	Statuses         map[string]int `json:"statuses"`
	WrongTexts       int            `json:"wrong_texts"`
	WrongCounts      int            `json:"wrong_counts"`
	Tokens           int            `json:"tokens"`
	Messages         int            `json:"messages"`
	TokensPerSecond  float64        `json:"tokens_per_second"`
	FirstMessage     *spread        `json:"first_message_ms"`
	Gap              *spread        `json:"gap_ms"`
	Call             *spread        `json:"call_ms"`
	ClientCPUSeconds float64        `json:"client_cpu_seconds"`
	Streams          [][]arrival    `json:"streams,omitempty"`
}

func summarize(o options, seen []*record, start, end time.Time, cpu float64) report {
	all := report{
		Began: start.UTC().Format("2006-01-02T15:04:05.000000Z"), Seconds: end.Sub(start).Seconds(), Statuses: map[string]int{}, ClientCPUSeconds: cpu,
	}
	var firsts, gaps, durations []float64
	inWindow := 0
	for _, r := range seen {
		for status, count := range r.statuses {
			all.Statuses[status] += count
			all.Calls += count
		}
		all.WrongTexts += r.wrongTexts
		all.WrongCounts += r.wrongCount
		all.Tokens += r.allTokens
		all.Messages += r.messages
		inWindow += r.inWindow
		firsts = append(firsts, r.firsts...)
		gaps = append(gaps, r.gaps...)
		durations = append(durations, r.durations...)
		if o.trace {
			all.Streams = append(all.Streams, r.arrivals)
		}
	}
	all.TokensPerSecond = float64(inWindow) / (o.seconds - o.stagger)
	all.FirstMessage, all.Gap, all.Call = spreadOf(firsts), spreadOf(gaps), spreadOf(durations)
	return all
}

func milliseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }
