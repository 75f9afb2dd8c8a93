package main

// The real routes, each with its answers: what is asked and how, status, fields,
// headers. Who may ask is in access_test.go.

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// answer is what a request got.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// ask sends a request with some headers ("Name: value") and follows no redirect
// and unpacks nothing.
func (s *serverProcess) ask(method, path string, headers ...string) answer {
	s.t.Helper()
	r, err := http.NewRequestWithContext(testContext(s.t), method, s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	r.Header.Set("Accept-Encoding", "identity")
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer{resp.StatusCode, resp.Header, body}
}

// fields gives the members of a JSON object.
func (a answer) fields(t testing.TB) (object map[string]json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(a.body, &object); err != nil {
		t.Fatalf("status %d: %v in %.200s", a.status, err, a.body)
	}
	return object
}

func (a answer) wantJSON(t testing.TB, what string) {
	t.Helper()
	if got := a.header.Get("Content-Type"); got != "application/json; charset=utf-8" {
		t.Errorf("%s: got content type %q", what, got)
	}
	if got := a.header.Get("X-Content-Type-Options"); got != "nosniff" {
		t.Errorf("%s: got X-Content-Type-Options %q", what, got)
	}
}

// The fields of a session in lists; one session has its chunks too.
const (
	sessionFields = "sessionId userId metadata eventCount errorCount isActive createdAt updatedAt endedAt " +
		"startTime endTime " +
		"storedBytes rawBytes snapshotIndex"
	chunkFields = "fromIndex count startTime endTime snapshotIndex bytes"
)

// restTest is a server with a session that has ended ("old", 250 events in
// chunks of 100, 100 and 50), one that is live ("live", 3 events that no
// database has yet, and an error), and one without anything ("empty").
func restTest(t *testing.T) *insideServer {
	t.Helper()
	t.Parallel()
	database := testDatabase(t)
	first := startInside(t, "DATABASE_URL="+database)
	old := first.dialTracker()
	old.send("session_start", `{"sessionId":"old","userId":"ann","url":"https://example.com/",
		"startTime":1234567890123,"resume":""}`)
	old.expect("session_ready")
	for seq := range 3 {
		var events []json.RawMessage
		for n := range []int{100, 100, 50}[seq] {
			events = append(events, json.RawMessage(fmt.Sprintf(`{"type":%d,"timestamp":%d}`, 2+min(n, 1),
				1700000000000+1000*seq+n)))
		}
		old.sendRaw(batchOf(seq+1, events))
		old.expect("events_ack")
	}
	old.send("session_end", `{}`)
	waitUntil(t, "the old session is stored", func() bool { return first.memory().sessions == 0 })
	old.Close()
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	s := startInside(t, "DATABASE_URL="+database, "BATCH_INTERVAL=3600000")
	s.recording("empty")
	live := s.recording("live")
	live.sendRaw(batchOf(1, []json.RawMessage{json.RawMessage(`{"type":2,"timestamp":5}`),
		json.RawMessage(`{"type":3,"timestamp":7}`), json.RawMessage(`{ "odd" : 1e400 }`)}))
	live.send("error", `{}`)
	waitUntil(t, "the live session has its events", func() bool { return s.memory().events == 3 })
	return s
}

// What only asks has one server; the damaged chunk comes last.
func TestREST(t *testing.T) {
	s := restTest(t)
	for _, part := range []func(*testing.T, *insideServer){restHealth, restRefusals, restSessions, restSession,
		restEvents, restCaching, restChunk} {
		part(t, s)
	}
}

// ---- what is refused, and how ----

func restRefusals(t *testing.T, s *insideServer) {
	tests := []struct {
		request string
		status  int
		allow   string
	}{
		{"GET /nowhere", 404, ""},
		{"GET /sessions/", 404, ""},
		{"GET /sessions/nobody", 404, ""},
		{"GET /sessions/nobody/events", 404, ""},
		{"GET /sessions/nobody/errors", 404, ""},
		{"GET /sessions/nobody/chunks/0", 404, ""},
		{"GET /sessions/old/chunks/1", 404, ""},
		{"GET /sessions/old/chunks/x", 404, ""},
		{"GET /sessions/old/chunks/", 404, ""},
		{"GET /sessions/old/nothing", 404, ""},
		{"GET /sessions/a%00b", 404, ""},
		{"GET /sessions/a%2Fb/events", 404, ""},
		{"GET /sessions/a%0Ab/errors", 404, ""},
		{"GET /assets/nothing.js", 404, ""},
		{"DELETE /sessions/nobody", 404, ""},
		{"GET /sessions/old/events?limit=0", 400, ""},
		{"GET /sessions/old/events?limit=10001", 400, ""},
		{"GET /sessions/old/events?limit=x", 400, ""},
		{"GET /sessions/old/events?fromIndex=-1", 400, ""},
		{"GET /sessions/old/events?fromIndex=1.0", 400, ""},
		{"GET /sessions/old/events?fromIndex=x&limit=y", 400, ""},
		{"GET /sessions/old/events?fromIndex=%zz", 400, ""},
		{"GET /sessions?limit=0", 400, ""},
		{"GET /sessions?limit=1001", 400, ""},
		{"GET /sessions?offset=-1", 400, ""},
		{"DELETE /sessions/cleanup?maxAgeHours=-1", 400, ""},
		{"DELETE /sessions/cleanup?maxAgeHours=1.5", 400, ""},
		{"DELETE /sessions/cleanup?maxAgeHours=", 400, ""},
		{"GET /ws?type=nobody", 400, ""},
		{"HEAD /health", 200, ""},
		{"HEAD /sessions/old/chunks/0", 200, ""},
		{"POST /health", 405, "GET, HEAD"},
		{"POST /sessions/old", 405, "DELETE, GET, HEAD"},
		{"PUT /sessions/old/events", 405, "GET, HEAD"},
		{"POST /sessions/cleanup", 405, "DELETE, GET, HEAD"},
		{"PATCH /", 405, "GET, HEAD"},
		{"GET /signin", 405, "POST"},
		{"HACK /sessions", 405, "DELETE, GET, HEAD"},
		{"DELETE /sessions/old/events", 405, "GET, HEAD"},
		{"OPTIONS /sessions", 405, "DELETE, GET, HEAD"},
	}
	for _, tt := range tests {
		method, path, _ := strings.Cut(tt.request, " ")
		a := s.ask(method, path)
		if a.status != tt.status || a.header.Get("Allow") != tt.allow {
			t.Errorf("%s: got status %d, Allow %q, want %d, %q", tt.request, a.status, a.header.Get("Allow"),
				tt.status, tt.allow)
		}
		a.wantJSON(t, tt.request)
		if tt.status >= 400 {
			wantKeys(t, tt.request, a.fields(t), "error")
			if reason := string(a.fields(t)["error"]); len(reason) < 5 || strings.Contains(reason, `\n`) {
				t.Errorf("%s: got the reason %s", tt.request, reason)
			}
		}
	}
}

// ---- the server itself ----

func TestRESTRoot(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	a := s.ask("GET", "/")
	a.wantJSON(t, "GET /")
	root := a.fields(t)
	wantKeys(t, "GET /", root, "name version endpoints documentation signedIn ingestKey")
	var endpoints map[string]string
	if err := json.Unmarshal(root["endpoints"], &endpoints); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, "endpoints", endpoints, "websocket health stats activeSessions sessionEvents cleanup")
	for name, path := range endpoints { // each leads somewhere
		path = strings.Replace(path, ":sessionId", "nobody", 1)
		want := map[string]int{"websocket": 426, "sessionEvents": 404, "cleanup": 404}[name]
		if got := s.ask("GET", path).status; got != want && !(want == 0 && got == 200) {
			t.Errorf("endpoint %s: GET %s gives %d", name, path, got)
		}
	}
	if got := s.ask("GET", "/", "Accept: text/html,*/*").header.Get("Content-Type"); got != "text/html; charset=utf-8" {
		t.Errorf("to a browser: got %q, want HTML", got)
	}
	if got := s.ask("GET", "/", "Accept: application/json").header.Get("Content-Type"); !strings.HasPrefix(got,
		"application/json") {
		t.Errorf("to a program: got %q, want JSON", got)
	}
}

func restHealth(t *testing.T, s *insideServer) {
	dialServer(t, s.ws("viewer")).expect("active_sessions")
	a := s.ask("GET", "/health")
	a.wantJSON(t, "GET /health")
	health := a.fields(t)
	wantKeys(t, "/health", health, "status timestamp uptime database sessions websockets")
	for name, want := range map[string]string{
		"status":     `"healthy"`,
		"database":   `{"activeSessions":2,"totalEvents":250,"totalSessions":3}`,
		"sessions":   `{"activeSessions":2,"totalEvents":3,"totalSessions":2}`,
		"websockets": `{"totalClients":3,"trackers":2,"viewers":1}`,
	} {
		if got := string(health[name]); got != want {
			t.Errorf("/health: got %s %s, want %s", name, got, want)
		}
	}
	var h healthJSON
	mustJSON(t, string(a.body), &h)
	if time.Since(h.Timestamp) > time.Minute || h.Uptime == nil || *h.Uptime < 0 || *h.Uptime > 600000 {
		t.Errorf("got timestamp %v, uptime %v", h.Timestamp, h.Uptime)
	}
	stats := s.ask("GET", "/stats").fields(t)
	for name, want := range map[string]string{"totalClients": "3", "activeSessions": "2", "viewers": "1",
		"trackers": "2", "totalEvents": "3", "refusedSessions": "0", "viewersLagged": "0"} {
		if got := string(stats[name]); got != want || len(stats["uptime"]) == 0 {
			t.Errorf("/stats: got %s %s, want %s", name, got, want)
		}
	}
}

// /health says 503 while PostgreSQL is away, and is healthy again by itself.
func TestRESTHealthWithoutDatabase(t *testing.T) {
	t.Parallel()
	proxy, through := proxyToDatabase(t, testDatabase(t), nil)
	s := startInside(t, "DATABASE_URL="+through)
	proxy.freeze()
	a := s.ask("GET", "/health")
	if h := a.fields(t); a.status != 503 || string(h["status"]) != `"unhealthy"` {
		t.Errorf("got %d %s, want 503, unhealthy", a.status, a.body)
	}
	wantKeys(t, "/health", a.fields(t), "status reason timestamp uptime database sessions websockets")
	proxy.thaw()
	waitUntil(t, "it is healthy again", func() bool { return s.ask("GET", "/health").status == 200 })
}

// ---- sessions ----

// listed gives the sessions of a list by their ids, and the ids in order.
func (s *insideServer) listed(path string) (ids []string, byID map[string]map[string]json.RawMessage) {
	s.t.Helper()
	a := s.ask("GET", path)
	a.wantJSON(s.t, path)
	byID = map[string]map[string]json.RawMessage{}
	for _, session := range objects(s.t, a.fields(s.t)["sessions"]) {
		fields := sessionFields
		if string(session["isActive"]) == "true" {
			fields += " state"
		}
		wantKeys(s.t, path, session, fields)
		var id string
		json.Unmarshal(session["sessionId"], &id)
		ids, byID[id] = append(ids, id), session
	}
	return ids, byID
}

func restSessions(t *testing.T, s *insideServer) {
	ids, all := s.listed("/sessions")
	if !slices.Equal(ids, []string{"live", "empty", "old"}) {
		t.Errorf("got %v, want live, empty, old: newest first", ids)
	}
	const metadata = `"viewport":{"width":1920,"height":1080,"devicePixelRatio":1},"referrer":"","timeZone":"UTC"}`
	want := map[string]map[string]string{
		"old": {"userId": `"ann"`, "eventCount": "250", "errorCount": "0", "isActive": "false",
			"startTime": "1700000000000", "endTime": "1700000002049", "snapshotIndex": "200",
			"metadata": `{"sessionId":"old","userId":"ann","url":"https://example.com/","startTime":1234567890123,` + metadata},
		"live": {"eventCount": "0", "errorCount": "0", "isActive": "true", "endedAt": "null", "startTime": "null",
			"endTime": "null", "snapshotIndex": "null", "storedBytes": "0", "state": `"live"`},
		"empty": {"eventCount": "0", "errorCount": "0", "isActive": "true", "endedAt": "null", "startTime": "null",
			"endTime": "null", "snapshotIndex": "null", "storedBytes": "0", "rawBytes": "0",
			"metadata": `{"sessionId":"empty",` + metadata},
	}
	for id, fields := range want {
		for name, value := range fields {
			if got := string(all[id][name]); got != value {
				t.Errorf("%s: got %s %s, want %s", id, name, got, value)
			}
		}
		for _, name := range []string{"createdAt", "updatedAt", "endedAt"} {
			var at *time.Time
			if err := json.Unmarshal(all[id][name], &at); err != nil || at == nil && name != "endedAt" || at != nil &&
				time.Since(*at) > 10*time.Minute {
				t.Errorf("%s: %s is %s, want a time (RFC 3339)", id, name, all[id][name])
			}
		}
	}
	for path, want := range map[string][]string{
		"/sessions/active": {"live", "empty"}, "/sessions?limit=1": {"live"}, "/sessions?limit=1&offset=2": {"old"},
		"/sessions?offset=3": nil, "/sessions?limit=1000": {"live", "empty", "old"},
		"/sessions?active=false": {"old"},
	} {
		if got, _ := s.listed(path); !slices.Equal(got, want) {
			t.Errorf("GET %s: got %v, want %v", path, got, want)
		}
	}
	page := s.ask("GET", "/sessions?limit=7&offset=2").fields(t)
	wantKeys(t, "/sessions", page, "sessions limit offset hasMore total totalIsMore")
	if string(page["limit"]) != "7" || string(page["offset"]) != "2" {
		t.Errorf("got limit %s, offset %s, want 7, 2", page["limit"], page["offset"])
	}
	page = s.ask("GET", "/sessions?offset=99").fields(t)
	if string(page["limit"]) != "100" || string(page["sessions"]) != "[]" {
		t.Errorf("got limit %s and %s, want 100 and an empty array", page["limit"], page["sessions"])
	}
	wantKeys(t, "/sessions/active", s.ask("GET", "/sessions/active").fields(t), "sessions")
}

func restSession(t *testing.T, s *insideServer) {
	session := s.ask("GET", "/sessions/old").fields(t)
	wantKeys(t, "a session", session, sessionFields+" chunks")
	chunks := objects(t, session["chunks"])
	if len(chunks) != 3 {
		t.Fatalf("got %d chunks, want 3", len(chunks))
	}
	sum := int64(0)
	for i, c := range chunks {
		wantKeys(t, "a chunk", c, chunkFields)
		got := fmt.Sprint(string(c["fromIndex"]), " ", string(c["count"]), " ", string(c["startTime"]), " ",
			string(c["endTime"]), " ", string(c["snapshotIndex"]))
		want := []string{"0 100 1700000000000 1700000000099 0", "100 100 1700000001000 1700000001099 100",
			"200 50 1700000002000 1700000002049 200"}[i]
		if got != want {
			t.Errorf("chunk %d: got %s, want %s", i, got, want)
		}
		text := s.ask("GET", fmt.Sprintf("/sessions/old/chunks/%s", c["fromIndex"])).body
		if string(c["bytes"]) != fmt.Sprint(len(text)) {
			t.Errorf("chunk %d: got %s bytes, want %d", i, c["bytes"], len(text))
		}
		sum += int64(len(s.ask("GET", fmt.Sprintf("/sessions/old/chunks/%s", c["fromIndex"]),
			"Accept-Encoding: gzip").body))
	}
	if string(session["storedBytes"]) != fmt.Sprint(sum) {
		t.Errorf("got storedBytes %s, want %d", session["storedBytes"], sum)
	}
	live := s.ask("GET", "/sessions/live").fields(t)
	if string(live["chunks"]) != "[]" || string(live["eventCount"]) != "0" || string(live["isActive"]) != "true" {
		t.Errorf("live: got chunks %s, eventCount %s, isActive %s, want none, 0 stored, true", live["chunks"],
			live["eventCount"], live["isActive"])
	}
}

// ---- events ----

func restEvents(t *testing.T, s *insideServer) {
	tests := []struct {
		path         string
		from, count  int
		first, final string
	}{
		{"/sessions/old/events", 0, 250, `{"type":2,"timestamp":1700000000000}`,
			`{"type":3,"timestamp":1700000002049}`},
		{"/sessions/old/events?limit=1", 0, 1, `{"type":2,"timestamp":1700000000000}`, ""},
		{"/sessions/old/events?fromIndex=99&limit=3", 99, 3, `{"type":3,"timestamp":1700000000099}`,
			`{"type":3,"timestamp":1700000001001}`},
		{"/sessions/old/events?fromIndex=249&limit=10000", 249, 1, `{"type":3,"timestamp":1700000002049}`, ""},
		{"/sessions/old/events?fromIndex=250", 250, 0, "", ""},
		{"/sessions/old/events?fromIndex=9007199254740992&limit=10000", 9007199254740992, 0, "", ""},
		{"/sessions/live/events?fromIndex=1", 1, 2, `{"type":3,"timestamp":7}`, `{ "odd" : 1e400 }`},
		{"/sessions/empty/events", 0, 0, "", ""},
	}
	for _, tt := range tests {
		a := s.ask("GET", tt.path)
		a.wantJSON(t, tt.path)
		page := a.fields(t)
		wantKeys(t, tt.path, page, "sessionId events fromIndex count")
		var events []json.RawMessage
		if err := json.Unmarshal(page["events"], &events); err != nil || events == nil {
			t.Fatalf("%s: %v in %s", tt.path, err, page["events"])
		}
		if len(events) != tt.count || string(page["count"]) != fmt.Sprint(tt.count) ||
			string(page["fromIndex"]) != fmt.Sprint(tt.from) {
			t.Errorf("%s: got %d events, count %s, fromIndex %s, want %d from %d on", tt.path, len(events),
				page["count"], page["fromIndex"], tt.count, tt.from)
			continue
		}
		if tt.count > 0 && string(events[0]) != tt.first || tt.final != "" &&
			string(events[len(events)-1]) != tt.final {
			t.Errorf("%s: got from %s to %s, want %s to %s", tt.path, events[0], events[len(events)-1], tt.first,
				tt.final)
		}
	}
}

// The default limit is 1000, the largest 10000; what is committed, what is kept
// in memory and what waits make one run.
func TestRESTEventsOverAll(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_EVENTS_PER_SESSION=3000")
	tracker := s.recording("s")
	var want []json.RawMessage
	for seq := range 12 {
		var batch []json.RawMessage
		for n := range 1000 {
			batch = append(batch, json.RawMessage(fmt.Sprintf(`{"n":%d}`, 1000*seq+n)))
		}
		want = append(want, batch...)
		tracker.sendRaw(batchOf(seq+1, batch))
		if seq%2 == 0 {
			tracker.expect("events_ack")
		}
	}
	for limit, count := range map[string]int{"": 1000, "?limit=10000": 10000} {
		var page struct{ Events []json.RawMessage }
		s.getJSON("/sessions/s/events"+limit, &page)
		sameEvents(t, limit, page.Events, want[:count])
	}
	sameEvents(t, "pages", s.restEvents("s", 977), want)
}

// A chunk is sent as it is stored, for ever.
func restChunk(t *testing.T, s *insideServer) {
	stored := querySQL[[]byte](t, s.database,
		"select events from session_events where session_id = 'old' and first_index = 100")
	packed := s.ask("GET", "/sessions/old/chunks/100", "Accept-Encoding: br, gzip, zstd")
	if !bytes.Equal(packed.body, stored) || packed.header.Get("Content-Encoding") != "gzip" {
		t.Errorf("got %d bytes, encoding %q, want the %d as they are stored", len(packed.body),
			packed.header.Get("Content-Encoding"), len(stored))
	}
	plain := s.ask("GET", "/sessions/old/chunks/100")
	z, err := gzip.NewReader(bytes.NewReader(stored))
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := io.ReadAll(z); !bytes.Equal(plain.body, text) || plain.header.Get("Content-Encoding") != "" {
		t.Errorf("a client without gzip: got %.50q, encoding %q", plain.body, plain.header.Get("Content-Encoding"))
	}
	for _, a := range []answer{packed, plain} {
		a.wantJSON(t, "chunk")
		if got := a.header.Get("Cache-Control"); !strings.Contains(got, "private") ||
			!strings.Contains(got, "immutable") || !strings.Contains(got, "max-age=31536000") {
			t.Errorf("got Cache-Control %q, want it kept for ever, privately", got)
		}
		if !slices.Contains(a.header.Values("Vary"), "Accept-Encoding") &&
			!strings.Contains(strings.Join(a.header.Values("Vary"), ","), "Accept-Encoding") {
			t.Errorf("got Vary %q", a.header.Values("Vary"))
		}
		if got := a.header.Get("Content-Length"); got != fmt.Sprint(len(a.body)) {
			t.Errorf("got Content-Length %s, want %d", got, len(a.body))
		}
	}
	execSQL(t, s.database, "update session_events set events = 'damaged' where first_index = 100")
	if a := s.ask("GET", "/sessions/old/chunks/100"); a.status != 500 {
		t.Errorf("a damaged chunk: got status %d, want 500", a.status)
	}
	if a := s.ask("GET", "/sessions/old/events?fromIndex=100"); a.status != 500 && a.status != 503 {
		t.Errorf("a page of a damaged chunk: got status %d, want an error", a.status)
	}
}

// What others may keep is said: chunks and files only.
func restCaching(t *testing.T, s *insideServer) {
	for _, path := range []string{"/", "/health", "/stats", "/sessions", "/sessions/active", "/sessions/old",
		"/sessions/old/events", "/sessions/old/errors", "/nowhere", "/sessions/nobody/chunks/0"} {
		if got := s.ask("GET", path).header.Get("Cache-Control"); got != "no-store" {
			t.Errorf("GET %s: got Cache-Control %q, want no-store", path, got)
		}
	}
}

// ---- deleting ----

func TestRESTDelete(t *testing.T) {
	s := restTest(t)
	viewer := s.viewer()
	for _, id := range []string{"old", "live"} {
		if a := s.ask("DELETE", "/sessions/"+id); a.status != 204 || len(a.body) != 0 {
			t.Errorf("DELETE %s: got %d %s, want 204", id, a.status, a.body)
		}
		for _, path := range []string{"", "/events", "/chunks/0", "/errors"} {
			if a := s.ask("GET", "/sessions/"+id+path); a.status != 404 {
				t.Errorf("GET /sessions/%s%s afterwards: got %d, want 404", id, path, a.status)
			}
		}
		if a := s.ask("DELETE", "/sessions/"+id); a.status != 404 {
			t.Errorf("DELETE %s a second time: got %d, want 404", id, a.status)
		}
	}
	if got := viewer.next("session_ended").str("sessionId"); got != "live" {
		t.Errorf("viewers heard that %s ended, want live", got)
	}
	if n := querySQL[int](t, s.database, `select (select count(*) from session_events)
		+ (select count(*) from session_errors) + (select count(*) from sessions)`); n != 1 {
		t.Errorf("%d rows are left, want that of the empty session", n)
	}
}

// Cleaning up ends nothing that is live.
func TestRESTCleanup(t *testing.T) {
	s := restTest(t)
	execSQL(t, s.database, "update sessions set ended_at = now() - interval '5 hours' where session_id = 'old'")
	execSQL(t, s.database, `update sessions set created_at = now() - interval '1 year',
		updated_at = now() - interval '1 year'
		where session_id <> 'old'`)
	for _, tt := range []struct {
		query string
		count int
	}{{"", 0}, {"?maxAgeHours=6", 0}, {"?maxAgeHours=4", 1}, {"?maxAgeHours=0", 0}} {
		a := s.ask("DELETE", "/sessions/cleanup"+tt.query)
		a.wantJSON(t, "cleanup")
		got := a.fields(t)
		wantKeys(t, "cleanup", got, "message deletedCount")
		if string(got["deletedCount"]) != fmt.Sprint(tt.count) || a.status != 200 || len(got["message"]) < 10 {
			t.Errorf("cleanup%s: got %d %s, want %d deleted", tt.query, a.status, a.body, tt.count)
		}
	}
	if st := s.session("live"); s.memory().events != 3 || !st.IsActive {
		t.Errorf("the live session: got %+v, %d events in memory", st, s.memory().events)
	}
}

// Old sessions go by themselves, every SESSION_CLEANUP_INTERVAL.
func TestCleanupByItself(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_CLEANUP_INTERVAL=50", "RETENTION_HOURS=2")
	live := s.recording("live")
	for _, hours := range []int{1, 3} {
		execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, ended_at)
			values ('h'||$1::int, 'u', '', '{}', false, now() - $1 * interval '1 hour')`, hours)
	}
	waitUntil(t, "the older one is gone", func() bool { return s.ask("GET", "/sessions/h3").status == 404 })
	if got := s.ask("GET", "/sessions/h1").status; got != 200 {
		t.Errorf("the younger one: got status %d, want 200", got)
	}
	live.record(1, 1)
}

// ---- the browser's side ----

func TestRESTPages(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	for path, policy := range map[string]string{"/": viewerPolicy, "/view/some-id": viewerPolicy, "/demo": demoPolicy,
		"/demo/page": demoPolicy} {
		a := s.ask("GET", path, "Accept: text/html")
		if a.status != 200 || a.header.Get("Content-Type") != "text/html; charset=utf-8" ||
			a.header.Get("Content-Security-Policy") != policy {
			t.Errorf("GET %s: got %d, %q, policy %q", path, a.status, a.header.Get("Content-Type"),
				a.header.Get("Content-Security-Policy"))
		}
	}
	// Recorded content is shown under it: with less, it could run or send.
	for _, part := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self' 'unsafe-inline'",
		"img-src data:", "font-src data:",
		"connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
		if !strings.Contains(viewerPolicy+";", part+";") {
			t.Errorf("the viewer's policy has no %s", part)
		}
	}
}

func TestRESTMediaOrigins(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MEDIA_ORIGINS=https://cdn.example, https://shop.example:8443")
	a := s.ask("GET", "/view/some-id", "Accept: text/html")
	for _, part := range []string{"script-src 'self'", "connect-src 'self'", "style-src 'self' 'unsafe-inline' https://cdn.example https://shop.example:8443",
		"img-src data: https://cdn.example https://shop.example:8443", "font-src data: https://cdn.example https://shop.example:8443", "media-src https://cdn.example https://shop.example:8443"} {
		if !strings.Contains(a.header.Get("Content-Security-Policy")+";", part+";") {
			t.Errorf("policy: got %q, want %q in it", a.header.Get("Content-Security-Policy"), part)
		}
	}
	if !bytes.Contains(a.body, []byte(`content="https://cdn.example https://shop.example:8443"`)) {
		t.Error("the viewer's page does not name the origins")
	}
	if got := s.ask("GET", "/", "Accept: text/html").header.Get("Content-Security-Policy"); got != viewerPolicy {
		t.Errorf("the list's policy: got %q", got)
	}
}

func TestRESTAssets(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	for path, contentType := range map[string]string{"/assets/view.js": "text/javascript; charset=utf-8",
		"/assets/style.css": "text/css; charset=utf-8", "/tracker.js": "text/javascript; charset=utf-8"} {
		plain := s.ask("GET", path)
		packed := s.ask("GET", path, "Accept-Encoding: gzip")
		z, err := gzip.NewReader(bytes.NewReader(packed.body))
		if err != nil {
			t.Fatalf("GET %s: %v", path, err)
		}
		if text, _ := io.ReadAll(z); !bytes.Equal(text, plain.body) ||
			packed.header.Get("Content-Encoding") != "gzip" || len(plain.body) == 0 {
			t.Errorf("GET %s: %d bytes, %d unpacked", path, len(plain.body), len(text))
		}
		etag := plain.header.Get("ETag")
		if plain.status != 200 || plain.header.Get("Content-Type") != contentType ||
			plain.header.Get("X-Content-Type-Options") != "nosniff" || etag == "" {
			t.Errorf("GET %s: got %d, %v", path, plain.status, plain.header)
		}
		for _, known := range []string{etag, "W/" + etag, `"other", ` + etag} { // a proxy that compresses makes it weak
			if again := s.ask("GET", path, "If-None-Match: "+known); again.status != 304 || len(again.body) != 0 {
				t.Errorf("GET %s, known as %s: got %d, %d bytes, want 304", path, known, again.status, len(again.body))
			}
		}
		if changed := s.ask("GET", path, `If-None-Match: "other"`); changed.status != 200 {
			t.Errorf("GET %s with another version: got %d, want 200", path, changed.status)
		}
	}
	tracker := s.ask("GET", "/tracker.js").header
	if tracker.Get("Access-Control-Allow-Origin") != "*" || tracker.Get("Cache-Control") != "public, max-age=3600" {
		t.Errorf("/tracker.js: got %v, want it for every page, for an hour", tracker)
	}
	for _, path := range []string{"/assets/README.txt", "/assets/package.json", "/assets/harness.mjs", "/assets/web",
		"/assets/", "/web/view.js"} {
		if got := s.ask("GET", path).status; got != 404 {
			t.Errorf("GET %s: got %d, want 404", path, got)
		}
	}
}

// A handler's panic is written down and answered for.
func TestRESTPanic(t *testing.T) {
	dir := t.TempDir()
	logs := openLogs(logConfig{dir: dir}, io.Discard, io.Discard, false)
	s := &server{core: core{logs: logs, log: logs.app}, access: newAccess(accessConfig{}, "127.0.0.1", "80", logs.app)}
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/health", nil)
	s.routes().ServeHTTP(w, r) // a server without a hub
	if w.Code != 500 || w.Body.String() != `{"error":"internal error"}` {
		t.Errorf("got %d %s, want 500 and an error", w.Code, w.Body)
	}
	logs.Close()
	files, _ := filepath.Glob(filepath.Join(dir, "exceptions-*.log"))
	if len(files) != 1 {
		t.Fatalf("got the exceptions logs %v, want one", files)
	}
	if text, err := os.ReadFile(files[0]); err != nil || !strings.Contains(string(text), "nil pointer") ||
		!strings.Contains(string(text), "handleHealth") {
		t.Errorf("got %q, %v, want the panic and where it was", text, err)
	}
}
