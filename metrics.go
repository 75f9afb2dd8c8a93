package main

import (
	"fmt"
	"io"
	"maps"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts what happens, for /stats and /metrics. Anyone may add to it.
type metrics struct {
	sessionsStarted, sessionsDeleted      atomic.Int64
	eventsIn, bytesIn                     atomic.Int64
	eventsStored, bytesStored             atomic.Int64
	refusedSessions, databaseErrors, acks atomic.Int64
	viewersLagged                         atomic.Int64

	mu            sync.Mutex
	refusals      map[string]int64 // by reason
	seconds, size histogram        // of batches: time, and JSON bytes
}

func newMetrics() *metrics {
	return &metrics{refusals: map[string]int64{},
		seconds: histogram{bounds: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}},
		size:    histogram{bounds: []float64{1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20}}}
}

// refuse counts something that was refused to a client.
func (m *metrics) refuse(reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refusals[reason]++
}

func (m *metrics) refused() map[string]int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.refusals)
}

// batch counts a batch that the writer has tried to store.
func (m *metrics) batch(work []*flush, took time.Duration) {
	raw := 0
	for _, f := range work {
		if f.outcome != stored {
			continue
		}
		for _, c := range f.chunks {
			m.eventsStored.Add(c.count)
			m.bytesStored.Add(int64(len(c.events)))
			raw += c.raw
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seconds.observe(took.Seconds())
	m.size.observe(float64(raw))
}

// histogram counts observations by size. Its owner guards it.
type histogram struct {
	bounds []float64
	counts [16]int64 // up to each bound; then all
	sum    float64
}

func (h *histogram) observe(v float64) {
	for i := len(h.bounds); i >= 0 && (i == len(h.bounds) || v <= h.bounds[i]); i-- {
		h.counts[i]++
	}
	h.sum += v
}

func (h *histogram) write(w io.Writer, name, help string) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %[1]s histogram\n", name, help)
	for i, bound := range h.bounds {
		fmt.Fprintf(w, "%s_bucket{le=\"%v\"} %d\n", name, bound, h.counts[i])
	}
	all := h.counts[len(h.bounds)]
	fmt.Fprintf(w, "%s_bucket{le=\"+Inf\"} %d\n%[1]s_sum %[3]v\n%[1]s_count %[2]d\n", name, all, h.sum)
}
