package main

import (
	"context"
	"encoding/json"
	"expvar"
	"fmt"
	"net/http"
	"runtime"
	rt "runtime/metrics"
	"sync/atomic"
	"time"
)

// What the server says of itself: health, statistics, metrics.

// stats waits for the hub: whoever asks hangs while that does. systemd's watchdog relies on it.
func (s *server) stats() hubStats {
	reply := make(chan hubStats, 1)
	stats, _ := ask(s.hub, reply, statsQuery{reply})
	return stats
}

// uptime is in milliseconds.
func (s *server) uptime() int64 { return time.Since(s.started).Milliseconds() }

const countTimeout = 5 * time.Second // of sessions and events, for /health

// handleHealth tells everyone how the server is, and viewers what it does.
func (s *server) handleHealth(w http.ResponseWriter, r *http.Request) error {
	status, code, reason := "healthy", http.StatusOK, *s.reason.Load()
	if reason != "" {
		status, code = "unhealthy", http.StatusServiceUnavailable
	}
	if s.access.admit(viewers, r) != nil {
		s.write(w, code, map[string]string{"status": status})
		return nil
	}
	st := s.stats()
	var stored any // null when it cannot be counted in time
	ctx, cancel := context.WithTimeout(r.Context(), countTimeout)
	defer cancel()
	// An error is no illness: counting may take too long where storing goes on.
	t, err := s.store.totals(ctx)
	skew := time.Duration(s.store.skew.Load())
	if reason == "" && skew.Abs() > maxClockSkew {
		reason = fmt.Sprintf("this machine's clock is %v ahead of the database's: nothing is deleted for its age",
			skew.Round(time.Second))
	}
	counts := func(sessions, active, events int64) map[string]int64 {
		return map[string]int64{"totalSessions": sessions, "activeSessions": active, "totalEvents": events}
	}
	if err == nil {
		stored = counts(t.sessions, t.active, t.events)
	}
	answer := map[string]any{
		"status": status, "timestamp": time.Now().UTC(), "uptime": s.uptime(),
		"database": stored,
		"sessions": counts(int64(st.sessions), int64(st.live), st.events),
		"websockets": map[string]int{
			"totalClients": st.trackers + st.viewers, "viewers": st.viewers, "trackers": st.trackers},
	}
	if reason != "" {
		answer["reason"] = reason
	}
	s.write(w, code, answer)
	return nil
}

// handleStats tells of this server alone.
func (s *server) handleStats(w http.ResponseWriter, r *http.Request) error {
	st, m := s.stats(), s.metrics
	s.write(w, http.StatusOK, map[string]any{
		"totalClients": st.trackers + st.viewers, "viewers": st.viewers, "trackers": st.trackers,
		"activeSessions": st.live, "totalEvents": st.events, "uptime": s.uptime(), "trackerFetches": s.fetches.recent(),
		"refusedSessions": m.refusedSessions.Load(), "viewersLagged": m.viewersLagged.Load(),
		"refusals": json.RawMessage(m.refusals.String()),
	})
	return nil
}

// handleMetrics reads each counter by itself: two of one answer may be a moment apart.
func (s *server) handleMetrics(w http.ResponseWriter, r *http.Request) error {
	st, m := s.stats(), s.metrics
	memory := []rt.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/total:bytes"}}
	rt.Read(memory)
	used := int64(s.cfg.maxBufferBytes) - s.budget.left()
	n := func(c *atomic.Int64) float64 { return float64(c.Load()) }
	all := []metric{
		{`connections{type="tracker"}`, "WebSockets, and POSTs until 3 s after their answer.", float64(st.trackers)},
		{`connections{type="viewer"}`, "", float64(st.viewers)},
		{"sessions_live", "Sessions that are being recorded.", float64(st.live)},
		{"sessions_in_memory", "Those, and ended ones that are not wholly stored.", float64(st.sessions)},
		{"sessions_started_total", "Sessions begun or continued.", n(&m.sessionsStarted)},
		{"sessions_deleted_total", "Sessions deleted for their age or MAX_STORAGE_BYTES.", n(&m.sessionsDeleted)},
		{"sessions_refused_total", "Sessions given up because PostgreSQL refused their data.", n(&m.refusedSessions)},
		{"events_received_total", "Events accepted.", n(&m.eventsIn)},
		{"received_bytes_total", "JSON of these.", n(&m.bytesIn)},
		{"wire_bytes_total", "What trackers have sent, compressed where it came so.", n(&m.wireBytes)},
		{"events_stored_total", "Events committed.", n(&m.eventsStored)},
		{"stored_bytes_total", "Chunks of these, compressed.", n(&m.bytesStored)},
		{"acks_total", "Acks sent; one may stand for many batches.", n(&m.acks)},
		{"oldest_pending_seconds", "Age of the oldest event not committed.", st.oldest.Seconds()},
		{"buffer_bytes", "Memory in use of MAX_BUFFER_BYTES.", float64(used)},
		{"buffer_limit_bytes", "MAX_BUFFER_BYTES.", float64(s.cfg.maxBufferBytes)},
		{"tail_bytes", "Memory in use for events that are committed.", float64(st.tailBytes)},
		{"viewers_lagged_total", "Times that a viewer was too slow.", n(&m.viewersLagged)},
		{"database_errors_total", "Transactions and questions that failed.", n(&m.databaseErrors)},
		{"log_write_errors_total", "Lines that did not reach a log file.", n(&s.logs.failures)},
		{"batch_seconds_sum", "Time to compress and commit a batch, or to fail.", n(&m.batchNanos) / 1e9},
		{"batch_seconds_count", "", n(&m.batches)},
		{"batch_bytes_sum", "JSON in a batch.", n(&m.batchBytes)},
		{"batch_bytes_count", "", n(&m.batches)},
		{"go_goroutines", "Goroutines.", float64(runtime.NumGoroutine())},
		{"go_memstats_alloc_bytes", "Memory of Go objects.", float64(memory[0].Value.Uint64())},
		{"go_memstats_sys_bytes", "Memory taken from the system.", float64(memory[1].Value.Uint64())},
		{"process_start_time_seconds", "Start, in seconds since 1970.", float64(s.started.Unix())},
	}
	help := "Requests, messages and connections refused."
	m.refusals.Do(func(reason expvar.KeyValue) { // in the order of their names
		count := float64(reason.Value.(*expvar.Int).Value())
		all = append(all, metric{`refusals_total{reason="` + reason.Key + `"}`, help, count})
		help = ""
	})
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	writeMetrics(w, all)
	return nil
}
