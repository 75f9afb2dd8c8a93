package main

import (
	"fmt"
	"io"
	"maps"
	"strings"
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
	batches, batchNanos, batchBytes       atomic.Int64 // that were tried, their time and JSON

	mu       sync.Mutex
	refusals map[string]int64 // by reason
}

func newMetrics() *metrics { return &metrics{refusals: map[string]int64{}} }

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
	m.batches.Add(1)
	m.batchNanos.Add(int64(took))
	for _, f := range work {
		if f.outcome != stored {
			continue
		}
		for _, c := range f.chunks {
			m.eventsStored.Add(c.count)
			m.bytesStored.Add(int64(len(c.events)))
			m.batchBytes.Add(int64(c.raw))
		}
	}
}

// metric is a line of /metrics. Those of one family stand together; the first
// has its help and kind.
type metric struct {
	name, help, kind string
	value            float64
}

// writeMetrics writes Prometheus' text format 0.0.4,
// https://prometheus.io/docs/instrumenting/exposition_formats/.
func writeMetrics(w io.Writer, all []metric) {
	for _, m := range all {
		if m.help != "" {
			family, _, _ := strings.Cut(m.name, "{")
			if m.kind == "summary" {
				family = strings.TrimSuffix(family, "_sum")
			}
			fmt.Fprintf(w, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", family, m.help, m.kind)
		}
		fmt.Fprintf(w, "%s %v\n", m.name, m.value)
	}
}
