package main

// The real routes, each with its answers: what is asked and how, status, fields,
// headers. Who may ask is in access_test.go.

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// same compares two values as they are printed; what says of what.
func same(t testing.TB, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s: got %.500s, want %.500s", what, g, w)
	}
}

// said puts values on one line, to compare them at once.
func said(values ...any) string { return strings.TrimSpace(fmt.Sprintln(values...)) }

// holds looks for each of some parts in a text.
func holds(t testing.TB, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s: got no %q in %.1000s", what, part, text)
		}
	}
}

// answer is what a request got.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) cookies() []*http.Cookie { return (&http.Response{Header: a.header}).Cookies() }

// caller is somebody who sends a request.
type caller struct {
	name string
	ask  func(*http.Request)
}

func (c caller) and(name string, more caller) caller {
	return caller{c.name + ", " + name, func(r *http.Request) { c.ask(r); more.ask(r) }}
}

func header(name, value string) caller {
	return caller{name + ": " + value, func(r *http.Request) { r.Header.Set(name, value) }}
}

func withBody(text string) caller {
	return caller{"body", func(r *http.Request) {
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(text)), int64(len(text))
	}}
}

var testTransport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableCompression: true}

// as sends one request as a caller does. It follows no redirect and unpacks nothing.
func (s *testServer) as(c caller, method, path string) answer {
	s.t.Helper()
	r, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if method == "GET" && strings.HasPrefix(path, "/ws") {
		for name, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket",
			"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg=="} {
			r.Header.Set(name, value)
		}
	}
	c.ask(r)
	resp, err := testTransport.RoundTrip(r)
	if err != nil {
		s.t.Fatalf("%s %s as %s: %v", method, path, c.name, err)
	}
	defer resp.Body.Close()
	a := answer{status: resp.StatusCode, header: resp.Header}
	if a.status != http.StatusSwitchingProtocols {
		body, err := io.ReadAll(resp.Body)
		if a.body = string(body); err != nil {
			s.t.Fatalf("%s %s as %s: %v", method, path, c.name, err)
		}
	}
	return a
}

// ask sends a request with some headers ("Name: value").
func (s *testServer) ask(method, path string, headers ...string) answer {
	s.t.Helper()
	return s.as(caller{"ask", func(r *http.Request) {
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			r.Header.Set(name, value)
		}
	}}, method, path)
}

// fields gives the members of a JSON object.
func (a answer) fields(t testing.TB) (object map[string]json.RawMessage) {
	t.Helper()
	mustJSON(t, a.body, &object)
	return object
}

func (a answer) wantJSON(t testing.TB, what string) {
	t.Helper()
	same(t, what, said(a.header.Get("Content-Type"), a.header.Get("X-Content-Type-Options")),
		"application/json; charset=utf-8 nosniff")
}

// The fields of a session in lists; one session has its chunks too.
const (
	sessionFields = "sessionId userId metadata eventCount errorCount isActive createdAt updatedAt endedAt " +
		"startTime endTime storedBytes rawBytes snapshotIndex"
	chunkFields = "fromIndex count startTime endTime snapshotIndex bytes"
)

// restTest is a server with a session that has ended ("old", 250 events in
// chunks of 100, 100 and 50), one that is live ("live", 3 events that no
// database has yet, and an error), and one without anything ("empty").
func restTest(t *testing.T) *testServer {
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
	for _, part := range []func(*testing.T, *testServer){restHealth, restRefusals, restSessions, restSession,
		restEvents, restChunk} {
		part(t, s)
	}
}

// What is refused, and how. Only chunks and files may be kept by others.
func restRefusals(t *testing.T, s *testServer) {
	each := func(paths string) (all string) { // with parameters that no route takes
		for path := range strings.FieldsSeq(paths) {
			for _, wrong := range []string{"nonsense=1", "limit=1&limit=2", "%zz"} {
				all += " " + path + map[bool]string{true: "&", false: "?"}[strings.Contains(path, "?")] + wrong
			}
		}
		return all
	}
	for _, group := range []struct {
		status        int
		allow, method string
		paths         string
	}{
		{404, "", "GET", `/nowhere /sessions/ /sessions/nobody /sessions/nobody/events /sessions/nobody/errors
			/sessions/nobody/chunks/0 /sessions/old/chunks/1 /sessions/old/chunks/x /sessions/old/chunks/
			/sessions/old/nothing /sessions/a%00b /sessions/a%2Fb/events /sessions/a%0Ab/errors /assets/nothing.js`},
		{404, "", "DELETE", "/sessions/nobody"},
		{400, "", "GET", `/sessions/old/events?limit=0 /sessions/old/events?limit=10001 /sessions/old/events?limit=x
			/sessions/old/events?fromIndex=-1 /sessions/old/events?fromIndex=1.0
			/sessions/old/events?fromIndex=x&limit=y /sessions/old/events?fromIndex=%zz
			/sessions?limit=0 /sessions?limit=1001 /sessions?limit=x /sessions?offset=-1 /ws?type=nobody
			/sessions?user=ann /sessions?userId= /sessions?userId=a&userId=b /sessions?from=yesterday
			/sessions?from=2026-01-01 /sessions?to=99999999999999999 /sessions?minDuration=-1
			/sessions?minDuration=1.5 /sessions?errors=yes /sessions?active=1 /sessions?userId=%00
			/sessions?url=%0A /sessions?userId=%zz /sessions?a;b /sessions?UserID=ann /sessions/export`},
		{400, "", "GET", each(`/ /health /stats /metrics /sessions/active /sessions/old /sessions/old/events
			/sessions/old/errors /sessions/old/chunks/0 /sessions/old/export /sessions/export?userId=ann`)},
		{400, "", "DELETE", `/sessions /sessions/cleanup?maxAgeHours=-1 /sessions/cleanup?maxAgeHours=1.5
			/sessions/cleanup?maxAgeHours=` + each("/sessions?userId=ann /sessions/cleanup /sessions/old")},
		{200, "", "GET", `/ /health /stats /sessions /sessions/active /sessions/old /sessions/old/events
			/sessions/old/errors`},
		{200, "", "HEAD", "/health /sessions/old/chunks/0"},
		{405, "GET, HEAD", "POST", "/health"},
		{405, "DELETE, GET, HEAD", "POST", "/sessions/old /sessions/cleanup"},
		{405, "GET, HEAD", "PUT", "/sessions/old/events"},
		{405, "GET, HEAD", "PATCH", "/"},
		{405, "POST", "GET", "/signin"},
		{405, "DELETE, GET, HEAD", "HACK", "/sessions"},
		{405, "GET, HEAD", "DELETE", "/sessions/old/events"},
		{405, "DELETE, GET, HEAD", "OPTIONS", "/sessions"},
	} {
		for path := range strings.FieldsSeq(group.paths) {
			request := group.method + " " + path
			a := s.ask(group.method, path)
			same(t, request, said(a.status, a.header.Get("Allow")), said(group.status, group.allow))
			if a.wantJSON(t, request); group.method != "HEAD" {
				same(t, request+", kept", a.header.Get("Cache-Control"), "no-store")
			}
			if group.status >= 400 {
				wantKeys(t, request, a.fields(t), "error")
				if reason := string(a.fields(t)["error"]); len(reason) < 5 || strings.Contains(reason, `\n`) {
					t.Errorf("%s: got the reason %s", request, reason)
				}
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
	mustJSON(t, string(root["endpoints"]), &endpoints)
	wantKeys(t, "endpoints", endpoints, "websocket health stats activeSessions sessionEvents cleanup")
	for name, path := range endpoints { // each leads somewhere
		want := map[string]int{"websocket": 101, "sessionEvents": 404, "cleanup": 404, "health": 200, "stats": 200,
			"activeSessions": 200}[name]
		same(t, "endpoint "+name, s.ask("GET", strings.Replace(path, ":sessionId", "nobody", 1)).status, want)
	}
	for accept, want := range map[string]string{"text/html,*/*": "text/html; charset=utf-8",
		"application/json": "application/json; charset=utf-8"} {
		same(t, "to "+accept, s.ask("GET", "/", "Accept: "+accept).header.Get("Content-Type"), want)
	}
}

// wantFields compares some members of a JSON object.
func wantFields(t testing.TB, what string, object map[string]json.RawMessage, want map[string]string) {
	t.Helper()
	for name, value := range want {
		same(t, what+": "+name, string(object[name]), value)
	}
}

func restHealth(t *testing.T, s *testServer) {
	dialServer(t, s.ws("viewer")).expect("active_sessions")
	a := s.ask("GET", "/health")
	wantKeys(t, "/health", a.fields(t), "status timestamp uptime database sessions websockets")
	wantFields(t, "/health", a.fields(t), map[string]string{
		"status":     `"healthy"`,
		"database":   `{"activeSessions":2,"totalEvents":250,"totalSessions":3}`,
		"sessions":   `{"activeSessions":2,"totalEvents":3,"totalSessions":2}`,
		"websockets": `{"totalClients":3,"trackers":2,"viewers":1}`,
	})
	var h struct {
		Timestamp time.Time
		Uptime    *int64
	}
	mustJSON(t, a.body, &h)
	if time.Since(h.Timestamp) > time.Minute || h.Uptime == nil || *h.Uptime < 0 || *h.Uptime > 600000 {
		t.Errorf("got timestamp %v, uptime %v", h.Timestamp, h.Uptime)
	}
	stats := s.ask("GET", "/stats").fields(t)
	wantKeys(t, "/stats", stats, "totalClients activeSessions viewers trackers totalEvents uptime refusedSessions "+
		"viewersLagged refusals trackerFetches")
	wantFields(t, "/stats", stats, map[string]string{"totalClients": "3", "activeSessions": "2", "viewers": "1",
		"trackers": "2", "totalEvents": "3", "refusedSessions": "0", "viewersLagged": "0", "trackerFetches": "[]"})
}

// An answer that comes late is sent all the same.
func TestRESTLate(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(100 * time.Millisecond)
		(&server{}).write(w, http.StatusOK, "late")
	}))
	srv.Config.WriteTimeout = time.Millisecond
	srv.Start()
	defer srv.Close()
	r, _ := http.NewRequest("GET", srv.URL, nil)
	status, body := fetch(r)
	same(t, "the answer", said(status, string(body)), `200 "late"`)
}

// ---- sessions ----

// listed gives the sessions of a list by their ids, and the ids in order.
func (s *testServer) listed(path string) (ids string, byID map[string]map[string]json.RawMessage) {
	s.t.Helper()
	byID = map[string]map[string]json.RawMessage{}
	for _, session := range objects(s.t, s.ask("GET", path).fields(s.t)["sessions"]) {
		fields := sessionFields
		if string(session["isActive"]) == "true" {
			fields += " state"
		}
		wantKeys(s.t, path, session, fields)
		id := strings.Trim(string(session["sessionId"]), `"`)
		ids, byID[id] = strings.TrimSpace(ids+" "+id), session
	}
	return ids, byID
}

func restSessions(t *testing.T, s *testServer) {
	_, all := s.listed("/sessions")
	const metadata = `"viewport":{"width":1920,"height":1080,"devicePixelRatio":1},"referrer":"","timeZone":"UTC"}`
	for id, fields := range map[string]map[string]string{
		"old": {"userId": `"ann"`, "eventCount": "250", "errorCount": "0", "isActive": "false",
			"startTime": "1700000000000", "endTime": "1700000002049", "snapshotIndex": "200", "rawBytes": "9741",
			"metadata": `{"sessionId":"old","userId":"ann","url":"https://example.com/","startTime":1234567890123,` +
				metadata},
		"live": {"eventCount": "0", "errorCount": "0", "isActive": "true", "endedAt": "null", "startTime": "null",
			"endTime": "null", "snapshotIndex": "null", "storedBytes": "0", "state": `"live"`},
		"empty": {"eventCount": "0", "errorCount": "0", "isActive": "true", "endedAt": "null", "startTime": "null",
			"endTime": "null", "snapshotIndex": "null", "storedBytes": "0", "rawBytes": "0",
			"metadata": `{"sessionId":"empty",` + metadata},
	} {
		wantFields(t, id, all[id], fields)
		for _, name := range []string{"createdAt", "updatedAt", "endedAt"} {
			var at *time.Time
			if err := json.Unmarshal(all[id][name], &at); err != nil || at == nil && name != "endedAt" || at != nil &&
				(time.Since(*at) > 10*time.Minute || !strings.HasSuffix(string(all[id][name]), `Z"`)) {
				t.Errorf("%s: %s is %s, want a time (RFC 3339, UTC)", id, name, all[id][name])
			}
		}
	}
	for path, want := range map[string]string{
		"/sessions": "live empty old", "/sessions/active": "live empty", "/sessions?limit=1": "live",
		"/sessions?limit=1&offset=2": "old", "/sessions?offset=3": "", "/sessions?limit=1000": "live empty old",
		"/sessions?active=false": "old",
	} {
		ids, _ := s.listed(path)
		same(t, "GET "+path+", newest first", ids, want)
	}
	page := s.ask("GET", "/sessions?limit=7&offset=2").fields(t)
	wantKeys(t, "/sessions", page, "sessions limit offset hasMore total totalIsMore")
	wantFields(t, "a page", page, map[string]string{"limit": "7", "offset": "2"})
	wantFields(t, "an empty page", s.ask("GET", "/sessions?offset=99").fields(t),
		map[string]string{"limit": "100", "sessions": "[]"})
	wantKeys(t, "/sessions/active", s.ask("GET", "/sessions/active").fields(t), "sessions")
}

func restSession(t *testing.T, s *testServer) {
	session := s.ask("GET", "/sessions/old").fields(t)
	wantKeys(t, "a session", session, sessionFields+" chunks moreChunks")
	sum, bounds := 0, ""
	for _, c := range objects(t, session["chunks"]) {
		wantKeys(t, "a chunk", c, chunkFields)
		bounds += fmt.Sprintf("%s %s %s %s %s; ", c["fromIndex"], c["count"], c["startTime"], c["endTime"],
			c["snapshotIndex"])
		path := fmt.Sprintf("/sessions/old/chunks/%s", c["fromIndex"])
		same(t, path+": bytes", string(c["bytes"]), len(s.ask("GET", path).body))
		sum += len(s.ask("GET", path, "Accept-Encoding: gzip").body)
	}
	same(t, "more chunks", string(session["moreChunks"]), "false")
	same(t, "chunks", bounds, "0 100 1700000000000 1700000000099 0; 100 100 1700000001000 1700000001099 100; "+
		"200 50 1700000002000 1700000002049 200; ")
	same(t, "storedBytes", string(session["storedBytes"]), sum)
	execSQL(t, s.database, `insert into session_events (session_id, first_index, event_count, raw_bytes, events)
		select 'empty', n, 1, 1, '' from generate_series(1, $1) n`, maxChunks+1)
	for _, tt := range []struct {
		query, more string
		chunks      int
	}{{"", "true", maxChunks}, {"?chunksFrom=2", "false", maxChunks}, {"?chunksFrom=10001", "false", 1}} {
		many := s.ask("GET", "/sessions/empty"+tt.query).fields(t)
		got := said(len(objects(t, many["chunks"])), string(many["moreChunks"]))
		same(t, "chunks"+tt.query, got, said(tt.chunks, tt.more))
	}
	execSQL(t, s.database, "delete from session_events where session_id = 'empty'")
	wantFields(t, "live", s.ask("GET", "/sessions/live").fields(t),
		map[string]string{"chunks": "[]", "eventCount": "0", "isActive": "true"})
}

// ---- events ----

func restEvents(t *testing.T, s *testServer) {
	const old0, old99, old101, old249 = `{"type":2,"timestamp":1700000000000}`, `{"type":3,"timestamp":1700000000099}`,
		`{"type":3,"timestamp":1700000001001}`, `{"type":3,"timestamp":1700000002049}`
	for _, tt := range []struct {
		path, want string // count, number, first and last event
	}{
		{"/sessions/old/events", said(250, 0, old0, old249)},
		{"/sessions/old/events?limit=1", said(1, 0, old0, old0)},
		{"/sessions/old/events?fromIndex=99&limit=3", said(3, 99, old99, old101)},
		{"/sessions/old/events?fromIndex=249&limit=10000", said(1, 249, old249, old249)},
		{"/sessions/old/events?fromIndex=250", said(0, 250)},
		{"/sessions/old/events?fromIndex=9007199254740992&limit=10000", said(0, 9007199254740992)},
		{"/sessions/live/events?fromIndex=1", said(2, 1, `{"type":3,"timestamp":7}`, `{ "odd" : 1e400 }`)},
		{"/sessions/empty/events", said(0, 0)},
	} {
		a := s.ask("GET", tt.path)
		wantKeys(t, tt.path, a.fields(t), "sessionId events fromIndex count")
		var page struct {
			Events           []json.RawMessage
			FromIndex, Count int
		}
		mustJSON(t, a.body, &page)
		got := said(page.Count, page.FromIndex)
		if n := len(page.Events); n > 0 {
			got = said(got, string(page.Events[0]), string(page.Events[n-1]))
		}
		if same(t, tt.path, got, tt.want); len(page.Events) != page.Count || page.Events == nil {
			t.Errorf("%s: %d events (%v)", tt.path, len(page.Events), page.Events)
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
		for n := range 1000 {
			want = append(want, json.RawMessage(fmt.Sprintf(`{"n":%d}`, 1000*seq+n)))
		}
		tracker.sendRaw(batchOf(seq+1, want[1000*seq:]))
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

// unpacked is a gzipped answer's text.
func unpacked(t testing.TB, a answer) string {
	t.Helper()
	text, err := unpackChunk([]byte(a.body))
	same(t, "a packed answer", said(a.header.Get("Content-Encoding"), err), "gzip <nil>")
	return string(text)
}

// A chunk is sent as it is stored, and kept for a day.
func restChunk(t *testing.T, s *testServer) {
	const path = "/sessions/old/chunks/100"
	packed, plain := s.ask("GET", path, "Accept-Encoding: br, gzip, zstd"), s.ask("GET", path)
	const chunk = "select events from session_events where session_id = 'old' and first_index = 100"
	if stored := querySQL[[]byte](t, s.database, chunk); packed.body != string(stored) {
		t.Errorf("got %d bytes, want the %d as they are stored", len(packed.body), len(stored))
	}
	same(t, "a client without gzip", plain.header.Get("Content-Encoding")+plain.body, unpacked(t, packed))
	for _, a := range []answer{packed, plain} {
		a.wantJSON(t, "chunk")
		holds(t, "Cache-Control", a.header.Get("Cache-Control"), "private", "immutable", "max-age=86400")
		holds(t, "Vary", fmt.Sprint(a.header["Vary"]), "Accept-Encoding")
		same(t, "Content-Length", a.header.Get("Content-Length"), len(a.body))
	}
	execSQL(t, s.database, "update session_events set events = 'damaged' where first_index = 100")
	same(t, "a damaged chunk", said(s.ask("GET", path).status,
		s.ask("GET", "/sessions/old/events?fromIndex=100").status),
		"500 500")
}

// ---- deleting ----

func TestRESTDelete(t *testing.T) {
	s := restTest(t)
	viewer := s.viewer()
	room := s.server.outgoing.left()
	s.server.outgoing.give(-room) // which only lists and pages need
	same(t, "DELETE without room for answers", s.ask("DELETE", "/sessions/nobody").status, 404)
	s.server.outgoing.give(room)
	for _, id := range []string{"old", "live"} {
		a := s.ask("DELETE", "/sessions/"+id)
		same(t, "DELETE "+id, said(a.status, a.body), "204")
		for _, path := range []string{"", "/events", "/chunks/0", "/errors"} {
			same(t, "GET "+path+" afterwards", s.ask("GET", "/sessions/"+id+path).status, 404)
		}
		same(t, "DELETE a second time", s.ask("DELETE", "/sessions/"+id).status, 404)
	}
	same(t, "viewers hear which ended", viewer.expect("session_ended").str("sessionId"), "live")
	same(t, "rows that are left", querySQL[int](t, s.database, `select (select count(*) from session_events)
		+ (select count(*) from session_errors) + (select count(*) from sessions)`), 1)
}

// Cleaning up ends nothing that is live.
func TestRESTCleanup(t *testing.T) {
	s := restTest(t)
	execSQL(t, s.database, "update sessions set ended_at = now() - interval '5 hours' where session_id = 'old'")
	execSQL(t, s.database, `update sessions set created_at = now() - interval '1 year',
		updated_at = now() - interval '1 year' where session_id <> 'old'`)
	for _, tt := range []struct {
		query string
		count int
	}{{"", 0}, {"?maxAgeHours=6", 0}, {"?maxAgeHours=4", 1}, {"?maxAgeHours=0", 0}} {
		a := s.ask("DELETE", "/sessions/cleanup"+tt.query)
		wantKeys(t, "cleanup", a.fields(t), "message deletedCount")
		same(t, "cleanup"+tt.query, said(a.status, string(a.fields(t)["deletedCount"])), said(200, tt.count))
	}
	same(t, "deleted, as /metrics counts", s.metric("sessions_deleted_total"), 1)
	if audit := s.log("application"); !strings.Contains(audit, `"sessions":1,"older_than":"4 hours","complete":true`) {
		t.Errorf("no audit line of it: %s", audit)
	}
	if st := s.session("live"); s.memory().events != 3 || !st.IsActive {
		t.Errorf("the live session: got %+v, %d events in memory", st, s.memory().events)
	}
}

// ---- the browser's side ----

func TestRESTPages(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	for path, policy := range map[string]string{"/": viewerPolicy, "/view/some-id": viewerPolicy, "/demo": demoPolicy,
		"/demo/page": demoPolicy} {
		a := s.ask("GET", path, "Accept: text/html")
		same(t, "GET "+path, said(a.status, a.header.Get("Content-Type"), a.header.Get("Content-Security-Policy")),
			said(200, "text/html; charset=utf-8", policy))
	}
	// Recorded content is shown under it: with less, it could run or send.
	holds(t, "the viewer's policy", viewerPolicy+";", "default-src 'none';", "script-src 'self';",
		"style-src 'self' 'unsafe-inline';", "img-src data:;", "font-src data:;", "connect-src 'self';",
		"frame-ancestors 'none';", "base-uri 'none';", "form-action 'none';")

	s = startInside(t, "MEDIA_ORIGINS=https://cdn.example, https://shop.example:8443")
	const origins = "https://cdn.example https://shop.example:8443"
	a := s.ask("GET", "/view/some-id", "Accept: text/html")
	holds(t, "policy", a.header.Get("Content-Security-Policy")+";", "script-src 'self';", "connect-src 'self';",
		"style-src 'self' 'unsafe-inline' "+origins+";", "img-src data: "+origins+";", "font-src data: "+origins+";",
		"media-src "+origins+";")
	holds(t, "the viewer's page", a.body, `content="`+origins+`"`)
	a = s.ask("GET", "/", "Accept: text/html")
	same(t, "the list's policy", a.header.Get("Content-Security-Policy"), viewerPolicy)
}

func TestRESTAssets(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	for path, contentType := range map[string]string{"/assets/view.js": "text/javascript; charset=utf-8",
		"/assets/style.css": "text/css; charset=utf-8", "/tracker.js": "text/javascript; charset=utf-8"} {
		plain := s.ask("GET", path)
		if text := unpacked(t, s.ask("GET", path, "Accept-Encoding: gzip")); text != plain.body || text == "" {
			t.Errorf("GET %s: %d bytes, %d unpacked", path, len(plain.body), len(text))
		}
		same(t, path, said(plain.status, plain.header.Get("Content-Type"), plain.header.Get("X-Content-Type-Options")),
			said(200, contentType, "nosniff"))
		etag := plain.header.Get("ETag")
		for _, known := range []string{etag, "W/" + etag, `"other", ` + etag} { // a proxy that compresses makes it weak
			again := s.ask("GET", path, "If-None-Match: "+known)
			same(t, path+", known as "+known, said(again.status, again.body), 304)
		}
		same(t, path+", another version", s.ask("GET", path, `If-None-Match: "other"`).status, 200)
	}
	tracker := s.ask("GET", "/tracker.js").header
	same(t, "/tracker.js: for every page, for an hour",
		said(tracker.Get("Access-Control-Allow-Origin"), tracker.Get("Cache-Control")), "* public, max-age=3600")
	for _, path := range []string{"/assets/README.txt", "/assets/package.json", "/assets/harness.mjs", "/assets/web",
		"/assets/", "/web/view.js"} {
		same(t, "GET "+path, s.ask("GET", path).status, 404)
	}
}

// A handler's panic is written down and answered for.
func TestRESTPanic(t *testing.T) {
	dir := t.TempDir()
	logs := openLogs(logConfig{dir: dir}, io.Discard, io.Discard, false)
	s := &server{core: core{logs: logs, log: logs.app}, access: newAccess(accessConfig{}, "127.0.0.1", "80", logs.app)}
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/health", nil)
	s.routes().ServeHTTP(w, r) // a server without a hub
	same(t, "a panic", said(w.Code, w.Body), `500 {"error":"internal error"}`)
	logs.Close()
	files, _ := filepath.Glob(filepath.Join(dir, "exceptions-*.log"))
	if len(files) != 1 {
		t.Fatalf("got the exceptions logs %v, want one", files)
	}
	text, _ := os.ReadFile(files[0])
	holds(t, "the panic, and where it was", string(text), "nil pointer", "handleHealth")
}
