package main

import (
	"fmt"
	"maps"
	"net/http"
	"runtime"
	rt "runtime/metrics"
	"slices"
	"sync/atomic"
	"time"
)

// What the server says of itself: health, statistics, metrics.

func (s *server) stats() hubStats {
	reply := make(chan hubStats, 1)
	stats, _ := ask(s.hub, reply, statsQuery{reply})
	return stats
}

func (s *server) uptime() int64 { return time.Since(s.started).Milliseconds() }

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
	t, err := s.store.totals(r.Context())
	if err != nil && reason == "" {
		status, code, reason = "unhealthy", http.StatusServiceUnavailable, "the database does not answer: "+err.Error()
	}
	answer := map[string]any{
		"status": status, "timestamp": time.Now().UTC(), "uptime": s.uptime(),
		"database":   map[string]int64{"totalSessions": t.sessions, "activeSessions": t.active, "totalEvents": t.events},
		"sessions":   map[string]int64{"totalSessions": int64(st.sessions), "activeSessions": int64(st.live), "totalEvents": st.events},
		"websockets": map[string]int{"totalClients": st.trackers + st.viewers, "viewers": st.viewers, "trackers": st.trackers},
	}
	if skew := time.Duration(s.store.skew.Load()); skew.Abs() > maxClockSkew && reason == "" {
		reason = fmt.Sprintf("this machine's clock is %v ahead of the database's: nothing is deleted for its age", skew.Round(time.Second))
	}
	if reason != "" {
		answer["reason"] = reason
	}
	s.write(w, code, answer)
	return nil
}

func (s *server) handleStats(w http.ResponseWriter, r *http.Request) error {
	st := s.stats()
	s.write(w, http.StatusOK, map[string]any{
		"totalClients": st.trackers + st.viewers, "activeSessions": st.live, "viewers": st.viewers, "trackers": st.trackers,
		"totalEvents": st.events, "uptime": s.uptime(),
		"trackerFetches":  s.origins.recent(),
		"refusedSessions": s.metrics.refusedSessions.Load(), "viewersLagged": s.metrics.viewersLagged.Load(), "refusals": s.metrics.refused(),
	})
	return nil
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
		{"session_replay_wire_bytes_total", "What trackers have sent, compressed where it came so.", counter, n(&m.wireBytes)},
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
		{"session_replay_batch_seconds_sum", "Time to compress and commit a batch, or to fail.", "summary", n(&m.batchNanos) / 1e9},
		{"session_replay_batch_seconds_count", "", "", n(&m.batches)},
		{"session_replay_batch_bytes_sum", "JSON in a batch.", "summary", n(&m.batchBytes)},
		{"session_replay_batch_bytes_count", "", "", n(&m.batches)},
		{"go_goroutines", "Goroutines.", gauge, float64(runtime.NumGoroutine())},
		{"go_memstats_alloc_bytes", "Memory of Go objects.", gauge, float64(memory[0].Value.Uint64())},
		{"go_memstats_sys_bytes", "Memory taken from the system.", gauge, float64(memory[1].Value.Uint64())},
		{"process_start_time_seconds", "Start, in seconds since 1970.", gauge, float64(s.started.Unix())},
	}
	refused, help := m.refused(), "Requests, messages and connections refused."
	for _, reason := range slices.Sorted(maps.Keys(refused)) {
		name := `session_replay_refusals_total{reason="` + reason + `"}`
		all = append(all, metric{name, help, counter, float64(refused[reason])})
		help = ""
	}
	return all
}

func (s *server) handleMetrics(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	writeMetrics(w, s.metricsNow())
	return nil
}
