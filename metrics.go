package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"runtime"
	rt "runtime/metrics"
	"slices"
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

// metric is a line of /metrics. Those of one name, with different labels, stand
// together.
type metric struct {
	name, help, kind string
	value            float64
}

func (s *server) metricsNow() []metric {
	st, m := s.stats(), s.metrics
	memory := []rt.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/total:bytes"}}
	rt.Read(memory)
	n := func(c *atomic.Int64) float64 { return float64(c.Load()) }
	const counter, gauge = "counter", "gauge"
	all := []metric{
		{`session_replay_connections{type="tracker"}`, "WebSockets that are open.", gauge, float64(st.trackers)},
		{`session_replay_connections{type="viewer"}`, "", gauge, float64(st.viewers)},
		{"session_replay_sessions_live", "Sessions that are being recorded.", gauge, float64(st.live)},
		{"session_replay_sessions_in_memory", "Those, and ended ones that are not wholly stored.", gauge, float64(st.sessions)},
		{"session_replay_sessions_started_total", "Sessions begun or continued.", counter, n(&m.sessionsStarted)},
		{"session_replay_sessions_deleted_total", "Sessions deleted for their age or MAX_STORAGE_BYTES.", counter, n(&m.sessionsDeleted)},
		{"session_replay_sessions_refused_total", "Sessions given up because PostgreSQL refused their data.", counter, n(&m.refusedSessions)},
		{"session_replay_events_received_total", "Events accepted.", counter, n(&m.eventsIn)},
		{"session_replay_received_bytes_total", "JSON of these.", counter, n(&m.bytesIn)},
		{"session_replay_events_stored_total", "Events committed.", counter, n(&m.eventsStored)},
		{"session_replay_stored_bytes_total", "Chunks of these, compressed.", counter, n(&m.bytesStored)},
		{"session_replay_acks_total", "Acks sent; one may stand for many batches.", counter, n(&m.acks)},
		{"session_replay_oldest_pending_seconds", "Age of the oldest event not committed.", gauge, st.oldest.Seconds()},
		{"session_replay_buffer_bytes", "Memory in use of MAX_BUFFER_BYTES.", gauge, float64(int64(s.cfg.maxBufferBytes) - s.budget.left())},
		{"session_replay_buffer_limit_bytes", "MAX_BUFFER_BYTES.", gauge, float64(s.cfg.maxBufferBytes)},
		{"session_replay_tail_bytes", "Memory in use for events that are committed.", gauge, float64(st.tailBytes)},
		{"session_replay_viewers_lagged_total", "Times that a viewer was too slow.", counter, n(&m.viewersLagged)},
		{"session_replay_database_errors_total", "Transactions and questions that failed.", counter, n(&m.databaseErrors)},
		{"session_replay_log_write_errors_total", "Lines that did not reach a log file.", counter, float64(s.logs.writeErrors())},
		{"go_goroutines", "Goroutines.", gauge, float64(runtime.NumGoroutine())},
		{"go_memstats_alloc_bytes", "Memory of Go objects.", gauge, float64(memory[0].Value.Uint64())},
		{"go_memstats_sys_bytes", "Memory taken from the system.", gauge, float64(memory[1].Value.Uint64())},
		{"process_start_time_seconds", "Start, in seconds since 1970.", gauge, float64(s.started.Unix())},
	}
	refused := m.refused()
	for _, reason := range slices.Sorted(maps.Keys(refused)) {
		all = append(all, metric{`session_replay_refusals_total{reason="` + reason + `"}`, "Requests, messages and connections refused.", counter,
			float64(refused[reason])})
	}
	return all
}

// handleMetrics answers in Prometheus' text format 0.0.4,
// https://prometheus.io/docs/instrumenting/exposition_formats/.
func (s *server) handleMetrics(w http.ResponseWriter, r *http.Request) {
	var out bytes.Buffer
	before := ""
	for _, m := range s.metricsNow() {
		if name, _, _ := strings.Cut(m.name, "{"); name != before {
			fmt.Fprintf(&out, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, m.help, m.kind)
			before = name
		}
		fmt.Fprintf(&out, "%s %v\n", m.name, m.value)
	}
	s.metrics.mu.Lock()
	s.metrics.seconds.write(&out, "session_replay_batch_seconds", "Time to compress and commit a batch, or to fail.")
	s.metrics.size.write(&out, "session_replay_batch_bytes", "JSON in a batch.")
	s.metrics.mu.Unlock()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(out.Bytes())
}
