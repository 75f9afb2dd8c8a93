package main

// Every message of the protocol through a real WebSocket and a real database:
// its exact fields, what it does, and what is refused. Most of it is written as
// dialogues; what needs more is Go.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nhooyr.io/websocket"
)

// wantError reads on until an error comes, and checks its code and its fields.
func (c *testConn) wantError(code string) {
	c.t.Helper()
	m := c.expect("error")
	fields := "code message"
	if code == "sequence_gap" {
		fields = "code expected message"
	}
	if m.Data.Code != code {
		c.t.Errorf("got error %s, want code %s", m, code)
	}
	m.wantFields(c.t, fields)
}

// next is expect, for one type.
func (c *testConn) next(kind string) testMessage { return c.expect(kind) }

// objects decodes a JSON array of objects, or fails the test.
func objects(t testing.TB, raw []byte) (list []map[string]json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(raw, &list); err != nil {
		t.Fatalf("%v in %.200s", err, raw)
	}
	return list
}

// viewer is one that has had the list it gets on connecting.
func (s *testServer) viewer() *testConn {
	s.t.Helper()
	c := dialServer(s.t, s.ws("viewer"))
	c.expect("active_sessions")
	return c
}

// watching is a viewer that has joined a session.
func (s *testServer) watching(id string) *testConn {
	s.t.Helper()
	v := s.viewer()
	v.send("viewer_join_session", sessionID{id})
	v.expect("session_joined")
	return v
}

func (s *testServer) dialTracker() *testConn {
	s.t.Helper()
	return dialServer(s.t, s.ws("tracker"))
}

// recording is a tracker that records a session with acks.
func (s *testServer) recording(id string) *testConn {
	s.t.Helper()
	c := s.dialTracker()
	c.send("session_start", map[string]string{"sessionId": id, "resume": ""})
	if got := c.expect("session_ready").Data.SessionID; got != id {
		s.t.Fatalf("got session %s, want %s", got, id)
	}
	return c
}

// numberedBatch is a batch of n small events.
func numberedBatch(seq, n int) string {
	events := make([]json.RawMessage, n)
	for i := range events {
		events[i] = json.RawMessage(fmt.Sprintf(`{"seq":%d,"n":%d}`, seq, i))
	}
	return batchOf(seq, events)
}

// largeBatch is one event with so much text.
func largeBatch(seq, size int) string {
	return batchOf(seq, []json.RawMessage{json.RawMessage(`{"text":"` + strings.Repeat("x", size) + `"}`)})
}

// record sends a batch of n events and waits for its ack.
func (c *testConn) record(seq, n int) {
	c.t.Helper()
	c.sendRaw(numberedBatch(seq, n))
	c.acked(seq)
}

func (c *testConn) acked(seq int) {
	c.t.Helper()
	for c.expect("events_ack").Data.Seq != int64(seq) { // of one before, perhaps once more
	}
}

// sessionRow is what GET /sessions/{id} says.
type sessionRow struct {
	UserID                 string
	Metadata               json.RawMessage
	EventCount, ErrorCount int
	IsActive               bool
	EndedAt                *time.Time
}

func (s *testServer) session(id string) (st sessionRow) {
	s.t.Helper()
	s.getJSON("/sessions/"+id, &st)
	return st
}

// used is the room that is taken of MAX_BUFFER_BYTES.
func (s *testServer) used() int64 { return s.metric("buffer_bytes") }

// full waits until the room has been used up: nothing more is received.
func (s *testServer) full(limit int64) {
	s.t.Helper()
	waitUntil(s.t, "there is no room left", func() bool { return s.used() > limit })
}

// ---- connecting ----

func TestEndpoint(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	for _, query := range []string{"", "?type=", "?type=tracker"} {
		c := dialServer(t, "ws://127.0.0.1:"+s.port+"/ws"+query)
		c.send("session_start", `{}`)
		c.expect("session_assigned")
	}
	dialServer(t, s.ws("viewer")).expect("active_sessions")
	for _, query := range []string{"?type=admin", "?type=Tracker", "?type=tracker%00"} {
		_, err := openWebSocket(&net.Dialer{}, "ws://127.0.0.1:"+s.port+"/ws"+query, 512)
		if err != handshakeStatus(http.StatusBadRequest) {
			t.Errorf("/ws%s: got %v, want 400", query, err)
		}
	}
}

// ---- starting a session ----

// What a page says at the start is the session's metadata, as it stands; lists
// have the documented fields of it.
func TestSessionStart(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	viewer := s.viewer()
	const documented = `"userAgent":"UA","viewport":{"width":1,"height":2,"devicePixelRatio":3},` +
		`"startTime":1234567890123,"referrer":"r","timeZone":"America/New_York"`
	data := `{"sessionId":"a.b:c_d-1","userId":"ann","url":"https://example.com/?q=1",` + documented +
		`,"extra":{"a":[1e400,"\u0000\ud800"],"b":12345678901234567890},"extra":2}`
	tracker := s.dialTracker()
	tracker.send("session_start", json.RawMessage(data))
	started := viewer.expect("session_started")
	viewer.send("get_active_sessions", nil)
	listed := objects(t, viewer.expect("active_sessions").fields()["sessions"])
	if len(listed) != 1 {
		t.Fatalf("got %d active sessions, want 1", len(listed))
	}
	wantKeys(t, "active_sessions", listed[0], "sessionId userId metadata eventCount errorCount")
	for what, got := range map[string]map[string]json.RawMessage{"session_started": started.fields(),
		"active_sessions": listed[0]} {
		if string(got["sessionId"]) != `"a.b:c_d-1"` || string(got["userId"]) != `"ann"` {
			t.Errorf("%s: got %s of %s", what, got["sessionId"], got["userId"])
		}
		if text := string(got["metadata"]); !strings.Contains(text, documented) || strings.Contains(text, "extra") {
			t.Errorf("%s: got metadata %s, want the documented fields", what, text)
		}
	}
	viewer.send("viewer_join_session", sessionID{"a.b:c_d-1"})
	if got := viewer.expect("session_joined").raw("metadata"); got != data {
		t.Errorf("session_joined: got metadata %s, want %s", got, data)
	}
	if stored := querySQL[string](t, s.database,
		"select metadata::text || user_id || url from sessions"); stored != data+"annhttps://example.com/?q=1" {
		t.Errorf("got %s in the database", stored)
	}
	if strings.Contains(s.output.String(), "America/New_York") {
		t.Error("the log has the page's metadata")
	}
}

// An address begins so many sessions in a minute, over whatever connections;
// others do not notice.
func TestSessionsPerMinute(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_SESSIONS_PER_MINUTE=2", "TRUST_PROXY=true")
	for i, want := range []string{"", "", "too_many_sessions", ""} {
		c := rawTCP(t, s)
		c.write(fmt.Sprintf("GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Forwarded-For: 192.0.2.%d\r\n%s", i/3, upgradeHeaders))
		c.status()
		c.send("session_start", "{}")
		if m := c.expect("session_assigned", "error"); m.Data.Code != want {
			t.Errorf("session %d: got %s, want %s", i, m, want)
		}
	}
}

// Of several that start one session at once, one gets it and keeps it.
func TestStartedAtOnce(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	for round := range 12 {
		id := fmt.Sprintf("s%d", round)
		conns := make([]*testConn, 8)
		for i := range conns {
			conns[i] = s.dialTracker()
		}
		var starting sync.WaitGroup
		got := make([]bool, len(conns))
		for i, c := range conns {
			starting.Go(func() {
				c.send("session_start", sessionID{id})
				c.send("no_such_type", nil) // answered when it has started
				m, _ := c.receive()
				got[i] = m.Type == "error"
			})
		}
		starting.Wait()
		winner := slices.Index(got, true)
		if winner < 0 || slices.Contains(got[winner+1:], true) {
			t.Fatalf("%s: who got it: %v, want one", id, got)
		}
		conns[winner].record(1, 1)
		for _, c := range conns {
			c.Close()
		}
		if n := querySQL[int](t, s.database, "select event_count from sessions where session_id = $1", id); n != 1 {
			t.Errorf("%s: %d events are stored, want 1", id, n)
		}
	}
}

// A session that was begun with the resume field is continued only by its token,
// which stands nowhere in what others can see.
func TestSessionResumedByToken(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_GRACE_PERIOD=60000")
	viewer := s.viewer()
	holder := s.dialTracker()
	holder.sendRaw(spoken(`session_start {"sessionId":"s","userId":"ann","r\u0065sume":"hidden","resume":"","b":1}`))
	token := holder.expect("session_ready").Data.Resume
	if len(token) < 20 {
		t.Errorf("got the token %q, want a secret", token)
	}
	holder.record(1, 1)
	states := []struct {
		name     string
		bring    func()
		trackers int64
	}{
		{"live", func() {}, 1},
		{"waits", func() { holder.Close() }, 0},
		{"ended", func() {
			holder.send("session_end", `{"sessionId":"s"}`)
			waitUntil(t, "it has ended", func() bool { return !s.session("s").IsActive })
		}, 1},
	}
	for i, state := range states {
		state.bring()
		for _, resume := range []string{``, `,"resume":""`, `,"resume":"wrong"`, `,"resume":null`, `,"resume":7`,
			`,"resume":"` + token[1:] + `"`} {
			c := s.dialTracker()
			c.sendRaw(`{"type":"session_start","data":{"sessionId":"s"` + resume + `}}`)
			if got := c.expect("session_assigned").Data.SessionID; got == "s" || got == "" {
				t.Errorf("%s, resume %q: was assigned %q, want a new id", state.name, resume, got)
			}
			if strings.Contains(resume, "resume") {
				c.expect("session_ready")
			}
			c.Close()
		}
		waitUntil(t, "the others have gone", func() bool { return s.stat("trackers") == state.trackers })
		if i == 0 {
			holder.record(2, 1) // it has noticed nothing
		}
		next := s.dialTracker()
		next.send("session_start", map[string]string{"sessionId": "s", "resume": token})
		if m := next.expect("session_ready").Data; m.SessionID != "s" || m.Resume != token || m.LastSeq != int64(i+2) {
			t.Errorf("%s: got %+v, want s, the same token, lastSeq %d", state.name, m, i+2)
		}
		if i == 0 {
			holder.expectClose(4001)
		}
		next.record(i+3, 1)
		holder = next
	}
	if got := s.session("s"); got.EventCount != 5 || got.UserID != "ann" {
		t.Errorf("got %d events of %s, want 5 of ann", got.EventCount, got.UserID)
	}
	viewer.send("viewer_join_session", sessionID{"s"})
	joined, passed := viewer.expectAfter("session_joined")
	_, lists := s.get("/sessions")
	_, one := s.get("/sessions/s")
	row := querySQL[string](t, s.database, "select string_agg(sessions::text, ' ') from sessions")
	for _, text := range []string{fmt.Sprint(passed), joined.text, string(lists), string(one), row, s.output.String()} {
		if strings.Contains(text, token) || strings.Contains(text, "hidden") || strings.Contains(text, `"resume":""`) {
			t.Errorf("the token is told: %.1000s", text)
		}
	}
}

// Nothing in the metadata is a reason not to record.
func TestMetadata(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_SESSIONS_PER_MINUTE=1000")
	big, deep := strings.Repeat("x", 70000), strings.Repeat("[", 1000)+strings.Repeat("]", 1000)
	deeper, huge := strings.Repeat("[", 9000)+strings.Repeat("]", 9000), strings.Repeat("x", 1<<20)
	const viewport = `"viewport":{"width":1920,"height":1080,"devicePixelRatio":1}`
	const defaults = viewport + `,"referrer":"","timeZone":"UTC"`
	const any = "*"
	large, fields := big[:maxMetadata], big[:maxField]
	for _, tt := range []struct{ name, data, user, url, metadata string }{
		{"nothing", `{}`, any, "", `{` + defaults + `}`},
		{"no object", `[1]`, any, "", `{` + defaults + `}`},
		{"text", `"s"`, any, "", `{` + defaults + `}`},
		{"null", `null`, any, "", `{` + defaults + `}`},
		{"some", `{"referrer":"r","x":1}`, any, "", `{"referrer":"r","x":1,` + viewport + `,"timeZone":"UTC"}`},
		{"control characters", `{"userId":"a\u0000b\nc\u001b[31m\u0085\u2028d","url":"u\u0000"}`,
			"a\ufffdb\ufffdc\ufffd[31m\ufffd\ufffdd", "u\ufffd",
			`{"userId":"a\u0000b\nc\u001b[31m\u0085\u2028d","url":"u\u0000",` + defaults + `}`},
		{"user a number", `{"userId":42}`, "42", "", `{"userId":42,` + defaults + `}`},
		{"user null", `{"userId":null}`, any, "", `{"userId":null,` + defaults + `}`},
		{"too large", `{"other":"` + large + `","userId":"u","url":"` + big + `","referrer":"é` + big +
			`","timeZone":"T","startTime":5}`, "u", big[:maxText],
			`{"userId":"u","url":"` + fields + `","referrer":"é` + fields[2:] + `","timeZone":"T","startTime":5,` + viewport +
				`}`},
		{"a large member that is no text", `{"viewport":{"w":"` + large + `"}}`, any, "", `{` + defaults + `}`},
		{"too deep", `{"other":` + deep + `,"userId":` + deep[900:1100] + `}`, deep[900:1100], "", `{"userId":` +
			deep[900:1100] + `,` + defaults + `}`},
		{"deep", `{"other":` + deep[502:1498] + `}`, any, "", `{"other":` + deep[502:1498] + `,` + defaults + `}`},
		{"just not too large", `{"x":"` + large[8:] + `"}`, any, "", `{"x":"` + large[8:] + `",` + defaults + `}`},
		{"a huge user", `{"userId":"` + huge + `"}`, huge[:maxText], "", any},
		{"a huge member", `{"big":"` + huge + `"}`, any, "", any},
		{"odd values", `{"userId":"\u0000\ud800","viewport":null,"startTime":1e400,"timeZone":{"deep":[[[[]]]]}}`, any, "",
			any},
		{"odd keys", `{"__proto__":{"a":1},"constructor":1,"":2}`, any, "", any},
		{"deeper than any limit", `{"userId":` + deeper + `,"viewport":` + deeper + `}`, any, "", any},
	} {
		c := s.dialTracker()
		c.sendRaw(`{"type":"session_start","data":` + tt.data + `}`)
		id := c.expect("session_assigned").Data.SessionID
		c.record(1, 1)
		var row []string
		text := querySQL[string](t, s.database,
			"select jsonb_build_array(user_id, url, metadata::text) from sessions where session_id = $1", id)
		json.Unmarshal([]byte(text), &row)
		for i, want := range []string{tt.user, tt.url, tt.metadata} {
			if want != any && row[i] != want || want == any && (row[i] == "" || len(row[i]) > 70<<10) {
				t.Errorf("%s: got %.300q, want %.300q", tt.name, row[i], want)
			}
		}
	}
}

// ---- what a tracker sends ----

// Errors of the page are stored and counted; those that viewers know are
// forwarded as they are, like visibility changes, which are not stored.
func TestReports(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	viewer, other := s.watching("s"), s.viewer()
	large := strings.Repeat("x", 100000)
	deep := strings.Repeat("[", 9990) + strings.Repeat("]", 9990)
	tests := []struct{ kind, data, forwarded, stored string }{
		{"javascript_error", `{"message":"m\u0000" , "stack":"s","timestamp":1e400,"sessionId":"another"}`,
			`{"message":"m\u0000" , "stack":"s","timestamp":1e400,"sessionId":"another","sessionId":"s"}`, ""},
		{"promise_rejection", `{ "reason" : {"a":[ ]} }`, `{"reason" : {"a":[ ]},"sessionId":"s"}`, ""},
		{"javascript_error", `{ }`, `{"sessionId":"s"}`, ""},
		{"error", `{"error":"e","stack":"s","timestamp":1}`, "", ""},
		{"error", `"\ud800 \u0000"`, "", ""},
		{"error", `null`, "", ""},
		{"error", ``, "", "null"},
		{"javascript_error", `{"message":"` + large + `","other":"` + large + `"}`, `{"message":"` + large[:4096] +
			`","sessionId":"s"}`,
			`{"message":"` + large[:4096] + `"}`},
		{"javascript_error", `{"message":"m","other":` + deep + `,"stack":` + deep + `}`, `{"message":"m","sessionId":"s"}`,
			`{"message":"m"}`},
		{"visibility_change", `{"hidden":true , "timestamp":12345678901234567890}`,
			`{"hidden":true , "timestamp":12345678901234567890,"sessionId":"s"}`, "no"},
	}
	for _, tt := range tests {
		tracker.sendRaw(spoken(strings.TrimSpace(tt.kind + " " + tt.data)))
		if want := `{"type":"` + tt.kind + `","data":` + tt.forwarded + `}`; tt.forwarded != "" {
			if got := viewer.expect(tt.kind).text; got != want {
				t.Errorf("viewers got %.300s, want %.300s", got, want)
			}
		}
	}
	if got := viewer.expect("session_state").str("state"); got != "hidden" {
		t.Errorf("viewers hear that the page is %q, want hidden", got)
	}
	for _, refused := range []struct{ code, message string }{
		{"invalid_message", `javascript_error "no object"`}, {"too_large", `visibility_change {"a":"` + large + `"}`},
		{"invalid_message", `visibility_change`}, {"invalid_message", `visibility_change null`}, {"invalid_message",
			`visibility_change []`},
	} {
		tracker.sendRaw(spoken(refused.message))
		tracker.wantError(refused.code)
	}
	for _, c := range []*testConn{viewer, other} {
		c.send("get_active_sessions", nil)
		if _, passed := c.expectAfter("active_sessions"); len(passed) > 0 {
			t.Errorf("a viewer got %v, want nothing more", passed)
		}
	}
	tests = tests[:len(tests)-1]
	waitUntil(t, "all are stored", func() bool { return s.session("s").ErrorCount == len(tests) })
	var got struct {
		SessionID string
		Errors    []map[string]json.RawMessage
	}
	waitUntil(t, "all are listed", func() bool {
		s.getJSON("/sessions/s/errors",
			&got)
		return len(got.Errors) == len(tests)
	})
	for i, tt := range tests {
		wantKeys(t, "an error", got.Errors[i], "id kind data createdAt")
		if tt.stored == "" {
			var compact bytes.Buffer
			json.Compact(&compact, []byte(tt.data))
			tt.stored = compact.String() // REST leaves out the white space
		}
		if e := got.Errors[i]; string(e["id"]) != fmt.Sprint(i) || string(e["kind"]) != `"`+tt.kind+`"` ||
			string(e["data"]) != tt.stored {
			t.Errorf("error %d: got %s %s %.200s, want %s %.200s", i, e["id"], e["kind"], e["data"], tt.kind, tt.stored)
		}
	}
}

// ---- viewers ----

// Viewers watch what is in memory also while there is no room left and PostgreSQL
// does not answer; a tracker that waits for room, or for the database, answers no
// ping, because nobody reads it, and is not cut for that.
func TestWithoutRoom(t *testing.T) {
	t.Parallel()
	database := testDatabase(t)
	proxy, through := proxyToDatabase(t, database, nil)
	s := startInside(t, "DATABASE_URL="+through, "HEARTBEAT_INTERVAL=500", "SESSION_GRACE_PERIOD=0",
		"MAX_BUFFER_BYTES=1048576", "MAX_MESSAGE_BYTES=500000")
	full := s.recording("full")
	full.record(1, 3)
	proxy.freeze()
	defer proxy.thaw()
	late := s.dialTracker()
	late.send("session_start", `{"sessionId":"late","resume":""}`)
	go func() { // ends when all is sent, or with the connection
		for seq := 2; seq <= 40; seq++ {
			full.sendRaw(largeBatch(seq, 100000))
		}
	}()
	s.full(900000)
	viewer := s.viewer()
	viewer.send("viewer_join_session", sessionID{"full"})
	viewer.send("get_session_events", `{"sessionId":"full","limit":3}`)
	pings := s.viewer() // in the time of its pings the trackers miss theirs
	for range 4 {
		pings.pinged()
	}
	viewer.expect("session_joined")
	if page := viewer.expect("session_events"); len(page.Data.Events) != 3 {
		t.Errorf("got a page of %d events, want 3", len(page.Data.Events))
	}
	if n := s.memory().trackers; n != 2 {
		t.Errorf("%d trackers are connected while they wait, want 2", n)
	}
	viewer.Close()
	pings.Close()
	proxy.thaw()
	late.expect("session_ready")
	full.acked(40)
	if n := len(s.restEvents("full", 10000)); n != 42 {
		t.Errorf("got %d events, want 42", n)
	}
	full.Close()
	late.Close()
	s.nothingLeft()
}

// ---- bad input ----

// Many errors in a row close the connection; one good message between starts
// the count anew, and gaps do not count: a tracker with many batches under way
// meets one often.
func TestErrorsInARow(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	for range 3 * maxErrors {
		tracker.sendRaw(numberedBatch(9, 1))
		tracker.wantError("sequence_gap")
	}
	for _, c := range []*testConn{tracker, s.viewer()} {
		for range 3 {
			for range maxErrors - 1 {
				c.sendRaw(`nonsense`)
			}
			c.sendRaw(`{"type":"heartbeat"}`)
		}
		for range maxErrors {
			c.sendRaw(`nonsense`)
		}
		c.expectClose(websocket.StatusPolicyViolation)
	}
}

// A frame over MAX_MESSAGE_BYTES closes its connection, with a reason; one that
// is as large as allowed is recorded.
func TestTooLarge(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_MESSAGE_BYTES=300000", "SESSION_GRACE_PERIOD=60000")
	innocent := s.recording("innocent")
	for size, fits := range map[int]bool{300000: true, 300001: false, 1000000: false, 20000000: false} {
		id := fmt.Sprintf("s%d", size)
		tracker := s.recording(id)
		tracker.record(1, 1)
		go tracker.sendRaw(largeBatch(2, size-len(largeBatch(2, 0)))) // ends with the connection
		if fits {
			tracker.acked(2)
			continue
		}
		tracker.wantError("too_large")
		tracker.expectClose(websocket.StatusMessageTooBig)
		if n := s.session(id).EventCount; n != 1 {
			t.Errorf("a message of %d bytes: the session has %d events, want 1", size, n)
		}
	}
	viewer := s.viewer()
	go viewer.sendRaw(`{"type":"heartbeat","data":"` + strings.Repeat("x", maxViewerMessage) +
		`"}`) // ends with the connection
	viewer.wantError("too_large")
	viewer.expectClose(websocket.StatusMessageTooBig)
	innocent.record(1, 1)
}

// An index of many tiny events takes more memory than their text: there is room
// for it before it is made.
func TestTinyEvents(t *testing.T) {
	t.Parallel()
	const buffer, count, trackers = 1 << 20, 43000, 4 // a little less than 128 KiB of text, 1 MB of index
	s := startInside(t, fmt.Sprintf("MAX_BUFFER_BYTES=%d", buffer), "MAX_MESSAGE_BYTES=200000", "BATCH_INTERVAL=100")
	text := `{"type":"events_batch","data":{"seq":1,"events":[` + strings.Repeat("{},", count-1) + `{}]}}`
	for i := range trackers {
		tr := newTracker(t, fmt.Sprintf("s%d", i))
		tr.limit, tr.frame = 1, func(int64) net.Buffers { return net.Buffers{maskedText([]byte(text))} }
		tr.start(s.ws("tracker"))
	}
	most := int64(0)
	waitUntil(t, "all is stored", func() bool {
		for range 100 {
			most = max(most, int64(s.server.cfg.maxBufferBytes)-s.server.budget.left())
			runtime.Gosched()
		}
		return s.memory().events == trackers*count && s.memory().oldest == 0
	})
	if limit := int64(buffer + buffer/2 + count*eventCost + 200000); most > limit {
		t.Errorf("%d KB of room were in use, want at most %d KB", most>>10, limit>>10)
	}
}

// A small message that never ends keeps no large buffer, which its room would not
// cover. No other test runs beside this one: it looks at the memory of all.
func TestLargeBuffersAreFree(t *testing.T) {
	s := startInside(t)
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC() // twice: what a pool has outlives the first
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	const rounds, size = 12, 1 << 20
	large, text := s.dialTracker(), `{"type":"no_such_type","data":{"text":"`+strings.Repeat("x", size)+`"}}`
	before := heap()
	for i := range rounds {
		large.sendRaw(text)
		large.expect("error") // its buffer is free
		rawWebSocket(t, s, "tracker").write(string(announce(1000)) + "a part of it")
		waitUntil(t, "a part is read", func() bool { return s.used() == int64((i+1)*firstRead) })
	}
	if grown := heap() - before; grown > rounds*size/4 {
		t.Errorf("%d parts of messages take %d KB", rounds, grown>>10)
	}
}

// A message that trickles in, or stops in the middle, has its time; between
// messages nothing is timed. A tracker does not wait for the database without end
// either: its peer may have gone, which nobody sees meanwhile.
func TestMessageTimeout(t *testing.T) {
	t.Parallel()
	database := testDatabase(t)
	proxy, through := proxyToDatabase(t, database, nil)
	s := startInside(t, "DATABASE_URL="+through, "MESSAGE_TIMEOUT=300", "HEARTBEAT_INTERVAL=60000")
	idle := s.recording("idle")
	for _, start := range []string{string(announce(1e9)), string(announce(100)) + "half of it",
		"\x01\x80\x00\x00\x00\x00"} {
		c := rawWebSocket(t, s, "tracker")
		c.write(start)
		c.expectClose(websocket.StatusPolicyViolation)
	}
	waitUntil(t, "they are gone", func() bool { return s.stat("trackers") == 1 })
	idle.record(1, 1)
	proxy.freeze()
	stays, goes := s.dialTracker(), s.dialTracker()
	for _, c := range []*testConn{stays, goes} {
		c.send("session_start", `{"sessionId":"s","resume":""}`)
	}
	goes.Close()
	stays.expectClose(websocket.StatusTryAgainLater)
	waitUntil(t, "the connections have ended", func() bool { return s.memory().trackers == 1 })
	proxy.thaw()
	idle.record(2, 1)
}

// ---- heartbeats ----

// Connections that do not answer pings are gone from memory and /stats; those
// that answer stay.
func TestHeartbeats(t *testing.T) {
	t.Parallel()
	s := startInside(t, "HEARTBEAT_INTERVAL=500", "SESSION_GRACE_PERIOD=0")
	alive, viewer := s.recording("alive"), s.viewer()
	dead := rawWebSocket(t, s, "tracker")
	dead.send("session_start", `{"sessionId":"dead"}`)
	rawWebSocket(t, s, "viewer")
	waitUntil(t, "all are there", func() bool { return s.memory().live == 2 && s.stat("totalClients") == 4 })
	for n := 0; s.stat("totalClients") != 2 || s.memory().live != 1; n++ {
		if alive.pinged(); n > 4 {
			t.Fatal("the dead are still there after five pings")
		}
		viewer.pinged()
	}
	for range 5 {
		alive.pinged()
		viewer.pinged()
	}
	if st := s.memory(); st.trackers != 1 || st.viewers != 1 || st.live != 1 {
		t.Errorf("got %+v, want the living still there", st)
	}
	alive.sendRaw(numberedBatch(1, 1))
	waitUntil(t, "the living records", func() bool {
		return querySQL[int](t, s.database,
			"select max(last_seq) from sessions") == 1
	})
}

// ---- fuzzing ----

// FuzzParseStart reads what a page says when it starts a session.
func FuzzParseStart(f *testing.F) {
	for _, seed := range append(jsonSeeds, `{"sessionId":"s","userId":"u\u0000","url":5,"resume":"r","r\u0065sume":1}`,
		`{"userId":null,"viewport":null}`,
		`{"sessionId":"`+strings.Repeat("x", 70000)+`","userId":"é`+strings.Repeat("x", 5000)+`"}`, strings.Repeat(`{"a":`,
			600)+"1"+strings.Repeat("}", 600)) {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		frame, err := parseFrame(slices.Concat([]byte(`{"type":"session_start","data":`), data, []byte(`}`)))
		if err != nil {
			return
		}
		st := parseStart(frame.data)
		var metadata map[string]json.RawMessage
		if err := json.Unmarshal(st.about.metadata, &metadata); err != nil {
			t.Fatalf("%q: got the metadata %q: %v", data, st.about.metadata, err)
		}
		for _, name := range []string{"viewport", "referrer", "timeZone"} {
			if _, ok := metadata[name]; !ok {
				t.Errorf("%q: the metadata has no %s", data, name)
			}
		}
		if _, ok := metadata["resume"]; ok {
			t.Errorf("%q: the metadata tells the token", data)
		}
		for _, text := range []string{st.about.userID, st.about.url} {
			if text != clean(text) || len(text) > maxText {
				t.Errorf("%q: got %q, which is not clean", data, text)
			}
		}
		if len(st.about.metadata) > maxMetadata+200 {
			t.Errorf("got %d bytes of metadata", len(st.about.metadata))
		}
	})
}
