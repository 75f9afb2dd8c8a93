package main

import (
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func mustJSON(t testing.TB, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%v in %.200s", err, text)
	}
}

// parseMetrics reads text format 0.0.4 as strictly as it is written: HELP and
// TYPE stand once, before the lines of their name, which stand together; no
// line comes twice; histograms add up.
func parseMetrics(t testing.TB, text string) map[string]float64 {
	t.Helper()
	line := regexp.MustCompile(`^([a-z_]+?)(_sum|_count)?(\{[a-z]+="[^"\\\n]*"\})? (-?[0-9.e+-]+)$`)
	values, kinds, seen := map[string]float64{}, map[string]string{}, map[string]bool{}
	current := ""
	if !strings.HasSuffix(text, "\n") {
		t.Error("the last line does not end")
	}
	for _, l := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if fields := strings.SplitN(l, " ", 4); fields[0] == "#" {
			if len(fields) < 4 || seen[fields[1]+fields[2]] {
				t.Errorf("line %q is short, or comes twice", l)
				continue
			}
			seen[fields[1]+fields[2]] = true
			if current = fields[2]; fields[1] == "TYPE" {
				kinds[current] = fields[3]
			}
			continue
		}
		m := line.FindStringSubmatch(l)
		if m == nil {
			t.Errorf("line %q is not of the format", l)
			continue
		}
		name := m[1]
		if kinds[name] != "summary" {
			name += m[2]
		}
		if name != current || kinds[name] == "" || !seen["HELP"+name] {
			t.Errorf("line %q does not follow its HELP and TYPE (%s)", l, current)
		}
		if _, twice := values[m[1]+m[2]+m[3]]; twice {
			t.Errorf("line %q comes twice", l)
		}
		values[m[1]+m[2]+m[3]], _ = strconv.ParseFloat(m[4], 64)
		if (kinds[name] == "counter") != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %s", name, kinds[name])
		}
	}
	return values
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	tr := newTracker(t, sessionName(t, 0))
	tr.limit = 20
	tr.start(s.ws("tracker"))
	viewer := dialServer(t, s.ws("viewer"))
	viewer.sendRaw("not JSON")
	viewer.sendRaw("not JSON either")
	viewer.expect("error")
	viewer.expect("error")
	waitUntil(t, "all is acked", func() bool { return tr.ackedEvents() == 200 })
	same(t, "a post without a session", s.post("/ws", `{"type":"heartbeat"}`).status, 400)
	got := parseMetrics(t, s.ask("GET", "/metrics").body)
	for name, want := range map[string]float64{
		`connections{type="tracker"}`: 1, `connections{type="viewer"}`: 1, "sessions_live": 1,
		"sessions_in_memory": 1, "sessions_started_total": 1,
		"events_received_total": 200, "events_stored_total": 200, "oldest_pending_seconds": 0,
		"database_errors_total": 0, "log_write_errors_total": 0,
		"viewers_lagged_total": 0, "sessions_refused_total": 0, "sessions_deleted_total": 0,
		"buffer_limit_bytes":                       256 << 20,
		`refusals_total{reason="invalid_message"}`: 2,
		`refusals_total{reason="no_session"}`:      1,
	} {
		value, there := got["session_replay_"+name]
		same(t, name, said(value, there), said(want, true))
	}
	size := 0
	for i := range 200 {
		size += len(testEvent(tr.session, i)) + 1
	}
	for name, between := range map[string][2]float64{
		"received_bytes_total": {float64(size - 21), float64(size)}, "stored_bytes_total": {1000, float64(size)},
		"acks_total":          {1, 20},
		"buffer_bytes":        {float64(size) - 200, float64(size) * 1.5},
		"tail_bytes":          {float64(size) - 200, float64(size) * 1.5},
		"batch_seconds_count": {1, 20}, "batch_seconds_sum": {1e-6, 60}, "batch_bytes_count": {1, 20},
		"batch_bytes_sum": {float64(size) - 200, float64(size) * 1.1},
	} {
		if value := got["session_replay_"+name]; value < between[0] || value > between[1] {
			t.Errorf("%s: got %v, want %v", name, value, between)
		}
	}
	if more := got["session_replay_buffer_bytes"] - got["session_replay_tail_bytes"]; more < 512 || more > 2000 {
		t.Errorf("with all stored the buffer is %v bytes larger than the tail, want what one session takes itself",
			more)
	}
	for name, least := range map[string]float64{"go_goroutines": 5, "go_memstats_alloc_bytes": 1e5,
		"go_memstats_sys_bytes": 1e6, "process_start_time_seconds": 1.7e9} {
		if got[name] < least {
			t.Errorf("%s: got %v, want at least %v", name, got[name], least)
		}
	}
	same(t, "/stats: refusals", s.statsOf().Refusals, "map[invalid_message:2 no_session:1]")
}
