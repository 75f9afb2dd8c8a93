package main

import (
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts what happens, for /stats and /metrics. Anyone may add to it.
type metrics struct {
	sessionsStarted, eventsIn, bytesIn    atomic.Int64
	eventsStored, bytesStored, batches    atomic.Int64
	refusedSessions, databaseErrors, acks atomic.Int64
	viewersLagged                         atomic.Int64

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

// batch counts a batch that the writer has tried to store.
func (m *metrics) batch(work []*flush, took time.Duration) {
	m.batches.Add(1)
	for _, f := range work {
		if f.outcome != stored {
			continue
		}
		for _, c := range f.chunks {
			m.eventsStored.Add(c.count)
			m.bytesStored.Add(int64(len(c.events)))
		}
	}
}
