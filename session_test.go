package main

// Every message of the protocol through a real WebSocket and a real database:
// its exact fields, what it does, and what is refused.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nhooyr.io/websocket"
)

// wireText is a message as it came, cut into its parts but not decoded.
type wireText struct {
	Type string
	Data map[string]json.RawMessage
	text string
}

// next reads on until a message of this type comes.
func (c *testConn) next(kind string) wireText {
	c.t.Helper()
	m, _ := c.nextOf(kind)
	return m
}

// nextOf is next, and gives the messages that came before, too.
func (c *testConn) nextOf(kind string) (m wireText, passed []wireText) {
	c.t.Helper()
	for {
		ctx, cancel := context.WithTimeout(testContext(c.t), patience)
		_, text, err := c.Read(ctx)
		cancel()
		if err != nil {
			c.t.Fatalf("waiting for %s, passed %.1000s: %v", kind, fmt.Sprint(passed), err)
		}
		m = wireText{text: string(text)}
		if err := json.Unmarshal(text, &m); err != nil {
			c.t.Fatalf("%v in message %.200s", err, text)
		}
		if m.Type == kind {
			return m, passed
		}
		passed = append(passed, m)
	}
}

func (m wireText) String() string { return m.text }

// wantError reads on until an error comes, and checks its code and its fields.
func (c *testConn) wantError(code string) {
	c.t.Helper()
	m := c.next("error")
	fields := "code message"
	if code == "sequence_gap" {
		fields = "code expected message"
	}
	if got := m.str("code"); got != code {
		c.t.Errorf("got error %s, want code %s", m.text, code)
	}
	m.wantFields(c.t, fields)
}

// quiet checks that the server has sent nothing that was not read, but messages
// of these types.
func (v *viewerConn) quiet(allowed ...string) {
	v.t.Helper()
	v.send("get_active_sessions", nil)
	_, passed := v.nextOf("active_sessions")
	for _, m := range passed {
		if !slices.Contains(allowed, m.Type) {
			v.t.Errorf("got %.300s, want none of it", m)
		}
	}
}

func (m wireText) str(field string) (s string) {
	json.Unmarshal(m.Data[field], &s)
	return s
}

// wantFields checks that a message's data has these fields and no others.
func (m wireText) wantFields(t testing.TB, fields string) {
	t.Helper()
	wantKeys(t, m.Type, m.Data, fields)
}

func wantKeys[V any](t testing.TB, what string, object map[string]V, fields string) {
	t.Helper()
	want := strings.Fields(fields)
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(object)); !slices.Equal(got, want) {
		t.Errorf("%s: got the fields %v, want %v", what, got, want)
	}
}

// objects decodes a JSON array of objects, or fails the test.
func objects(t testing.TB, raw []byte) (list []map[string]json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(raw, &list); err != nil {
		t.Fatalf("%v in %.200s", err, raw)
	}
	return list
}

// viewerConn is a viewer that has had the list it gets on connecting.
type viewerConn struct{ *testConn }

func (s *insideServer) viewer() *viewerConn {
	s.t.Helper()
	c := dialServer(s.t, s.ws("viewer"))
	c.expect("active_sessions")
	return &viewerConn{c}
}

// watching is a viewer that has joined a session.
func (s *insideServer) watching(id string) *viewerConn {
	s.t.Helper()
	v := s.viewer()
	v.send("viewer_join_session", sessionID{id})
	v.expect("session_joined")
	return v
}

func (s *insideServer) dialTracker() *testConn {
	s.t.Helper()
	return dialServer(s.t, s.ws("tracker"))
}

// recording is a tracker that records a session with acks.
func (s *insideServer) recording(id string) *testConn {
	s.t.Helper()
	c := s.dialTracker()
	c.send("session_start", map[string]string{"sessionId": id, "resume": ""})
	if got := c.next("session_ready").str("sessionId"); got != id {
		s.t.Fatalf("got session %s, want %s", got, id)
	}
	return c
}

// record sends a batch of n events and waits for its ack.
func (c *testConn) record(seq, n int) {
	c.t.Helper()
	events := make([]json.RawMessage, n)
	for i := range events {
		events[i] = json.RawMessage(fmt.Sprintf(`{"seq":%d,"n":%d}`, seq, i))
	}
	c.sendRaw(batchOf(seq, events))
	for string(c.next("events_ack").Data["seq"]) != fmt.Sprint(seq) { // of one before, once more
	}
}

// session is what GET /sessions/{id} says.
type sessionState struct {
	UserID                 string
	Metadata               json.RawMessage
	EventCount, ErrorCount int
	IsActive               bool
	EndedAt                *time.Time
}

func (s *insideServer) session(id string) (st sessionState) {
	s.t.Helper()
	s.getJSON("/sessions/"+id, &st)
	return st
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
		_, resp, err := websocket.Dial(t.Context(), "ws://127.0.0.1:"+s.port+"/ws"+query, nil)
		if err == nil || resp == nil || resp.StatusCode != http.StatusBadRequest {
			t.Errorf("/ws%s: got %v, want 400", query, err)
		}
	}
}

func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_CONNECTIONS=2")
	s.dialTracker()
	second := s.viewer()
	_, resp, err := websocket.Dial(t.Context(), s.ws("tracker"), nil)
	if err == nil || resp == nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a third connection: got %v, want 503", err)
	}
	second.CloseNow()
	waitUntil(t, "there is room again", func() bool {
		c, err := dialWebSocket(t.Context(), s.ws("tracker"))
		if err == nil {
			c.CloseNow()
		}
		return err == nil
	})
}

// ---- starting a session ----

// All that a page says at the start is the session's metadata, as it stands.
func TestSessionStart(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	viewer := s.viewer()
	data := `{"sessionId":"a.b:c_d-1","userId":"ann","url":"https://example.com/?q=1","userAgent":"UA","viewport":{"width":1,"height":2,"devicePixelRatio":3},` +
		`"startTime":1234567890123,"referrer":"r","timeZone":"America/New_York","extra":{"a":[1e400,"\u0000\ud800"],"b":12345678901234567890},"extra":2}`
	tracker := s.dialTracker()
	tracker.send("session_start", json.RawMessage(data))
	started := viewer.next("session_started")
	started.wantFields(t, "sessionId userId metadata")
	viewer.send("get_active_sessions", nil)
	listed := objects(t, viewer.next("active_sessions").Data["sessions"])
	if len(listed) != 1 {
		t.Fatalf("got %d active sessions, want 1", len(listed))
	}
	wantKeys(t, "active_sessions", listed[0], "sessionId userId metadata eventCount errorCount")
	for what, got := range map[string]map[string]json.RawMessage{"session_started": started.Data, "active_sessions": listed[0]} {
		if string(got["sessionId"]) != `"a.b:c_d-1"` || string(got["userId"]) != `"ann"` {
			t.Errorf("%s: got %s of %s", what, got["sessionId"], got["userId"])
		}
		if string(got["metadata"]) != data {
			t.Errorf("%s: got metadata %s, want %s", what, got["metadata"], data)
		}
	}
	for _, path := range []string{"/sessions/active", "/sessions"} {
		if _, body := s.get(path); !strings.Contains(string(body), data) {
			t.Errorf("GET %s: got %s, want the metadata as it came", path, body)
		}
	}
	if stored := querySQL[string](t, s.database, "select metadata::text || user_id || url from sessions"); stored != data+"annhttps://example.com/?q=1" {
		t.Errorf("got %s in the database", stored)
	}
	if strings.Contains(s.output.String(), "America/New_York") {
		t.Error("the log has the page's metadata")
	}
	tracker.quietTracker()
}

// quietTracker checks that the server has sent nothing that was not read.
func (c *testConn) quietTracker() {
	c.t.Helper()
	c.sendRaw(`{"type":"nonsense"}`)
	if _, passed := c.nextOf("error"); len(passed) > 0 {
		c.t.Errorf("the tracker got %v, want nothing", passed)
	}
}

var madeUpUser = regexp.MustCompile(`^user_[A-Za-z0-9]+$`)

// Without an id the server makes one; the tracker then starts again with it.
func TestSessionAssigned(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	viewer := s.viewer()
	tracker := s.dialTracker()
	tracker.send("session_start", `{"url":"https://example.com/"}`)
	assigned := tracker.next("session_assigned")
	assigned.wantFields(t, "sessionId")
	id := assigned.str("sessionId")
	if !validID(id) {
		t.Errorf("got the id %q", id)
	}
	if got := viewer.next("session_started").str("sessionId"); got != id {
		t.Errorf("viewers were told of %q, want %q", got, id)
	}
	user := s.session(id).UserID
	if !madeUpUser.MatchString(user) {
		t.Errorf("got the user %q, want one made up", user)
	}
	tracker.send("session_start", map[string]string{"sessionId": id, "referrer": "again"})
	tracker.sendRaw(`{"type":"events_batch","data":{"events":[{"n":1}]}}`)
	waitUntil(t, "what the second start says is stored", func() bool {
		return querySQL[int](t, s.database, "select count(*) from sessions where metadata::text like '%again%' and event_count = 1") == 1
	})
	if got := s.session(id).UserID; got != user {
		t.Errorf("after the second start the user is %q, want %q still", got, user)
	}
	if got := querySQL[string](t, s.database, "select user_id from sessions"); got != user {
		t.Errorf("after the second start the stored user is %q, want %q still", got, user)
	}
	tracker.quietTracker()
	viewer.quiet()
}

// Ids of another form, and one that another live connection holds, are replaced.
func TestSessionIDsReplaced(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_SESSIONS_PER_MINUTE=1000")
	holder := s.dialTracker()
	holder.send("session_start", `{"sessionId":"held"}`)
	holder.sendRaw(`{"type":"events_batch","data":{"events":[{"n":1}]}}`)
	waitUntil(t, "it records", func() bool { return s.memory().events == 1 })
	longest := strings.Repeat("x", 128)
	tests := []string{`"held"`, `""`, `null`, `7`, `{}`, `["a"]`, `true`, `"` + longest + `x"`, `"a b"`, `"a/b"`, `"a\nb"`, `"a\u0000b"`,
		`"é"`, `"a\u001b[31mb"`, `"../../etc/passwd"`, `"'; drop table sessions; --"`, `"a%00"`, `"\ud800"`}
	for _, id := range tests {
		c := s.dialTracker()
		c.sendRaw(`{"type":"session_start","data":{"sessionId":` + id + `}}`)
		if got := c.next("session_assigned").str("sessionId"); !validID(got) || got == "held" {
			t.Errorf("sessionId %s: was assigned %q", id, got)
		}
		c.CloseNow()
	}
	for _, id := range []string{"a", longest, "A-Z_0.9:x", ".", "..", "-"} {
		c := s.dialTracker()
		c.send("session_start", map[string]string{"sessionId": id, "resume": ""})
		if m, passed := c.nextOf("session_ready"); m.str("sessionId") != id || len(passed) > 0 {
			t.Errorf("sessionId %q: got %v and %s, want it accepted", id, passed, m.text)
		}
	}
	holder.sendRaw(`{"type":"events_batch","data":{"events":[{"n":2}]}}`)
	waitUntil(t, "the holder goes on", func() bool { return s.session("held").EventCount == 2 })
	holder.quietTracker()
}

// The same id again on the same connection changes what is known of the session,
// and nothing else.
func TestSessionDescribedAgain(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	tracker.record(1, 3)
	viewer := s.watching("s")
	tracker.send("session_start", `{"sessionId":"s","userId":"bob","color":"blue"}`)
	tracker.record(2, 2)
	if m := viewer.next("events_batch"); string(m.Data["fromIndex"]) != "3" {
		t.Errorf("got %s, want its events from 3 on", m.text)
	}
	viewer.quiet()
	tracker.quietTracker()
	st := s.session("s")
	if st.EventCount != 5 || st.UserID != "bob" || !strings.Contains(string(st.Metadata), `"color":"blue"`) {
		t.Errorf("got %+v, want 5 events of bob, blue", st)
	}
	tracker.send("session_start", `{"sessionId":"s","resume":"anything"}`)
	if m := tracker.next("session_ready"); string(m.Data["lastSeq"]) != "2" || m.str("resume") == "anything" {
		t.Errorf("got %s, want lastSeq 2 and the session's own token", m.text)
	}
}

// Another id on the same connection ends the session and begins another.
func TestSessionAfterSession(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("one")
	tracker.record(1, 2)
	viewer := s.viewer()
	tracker.send("session_start", `{"sessionId":"two","resume":""}`)
	if m := tracker.next("session_ready"); m.str("sessionId") != "two" || string(m.Data["lastSeq"]) != "0" {
		t.Errorf("got %s, want the session two from the start", m.text)
	}
	if got := viewer.next("session_ended").str("sessionId"); got != "one" {
		t.Errorf("session %s ended, want one", got)
	}
	tracker.record(1, 1)
	if one, two := s.session("one").EventCount, s.session("two").EventCount; one != 2 || two != 1 {
		t.Errorf("got %d and %d events, want 2 and 1", one, two)
	}
}

// A session that has ended, or that waits in its grace period, is continued by
// its id, at the next index.
func TestSessionContinued(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_GRACE_PERIOD=60000")
	viewer := s.viewer()
	lives := []struct {
		name    string
		end     func(*testConn)
		notices string // what viewers are told when it comes back
	}{
		{"it ends", func(c *testConn) {
			c.send("session_end", `{"sessionId":"s"}`)
			viewer.next("session_ended").wantFields(t, "sessionId")
			waitUntil(t, "it has left memory", func() bool { return s.memory().sessions == 0 })
			c.CloseNow()
		}, "session_started"},
		{"its connection ends", func(c *testConn) {
			c.CloseNow()
			waitUntil(t, "the server has noticed", func() bool { return s.stat("trackers") == 0 })
		}, ""},
		{"it ends, and the next life comes at once", func(c *testConn) { c.send("session_end", `{"sessionId":"s"}`); viewer.next("session_ended") }, "session_started"},
		{"the last life", func(*testConn) {}, ""},
	}
	told := "session_started"
	for i, life := range lives {
		c := s.dialTracker()
		c.send("session_start", `{"sessionId":"s"}`)
		c.sendRaw(fmt.Sprintf(`{"type":"events_batch","data":{"events":[{"life":%d}]}}`, i))
		if told != "" {
			viewer.next(told)
		}
		waitUntil(t, "its event is there", func() bool { return s.session("s").EventCount == i+1 })
		viewer.quiet()
		c.quietTracker()
		told = life.notices
		life.end(c)
	}
	var want []json.RawMessage
	for i := range lives {
		want = append(want, json.RawMessage(fmt.Sprintf(`{"life":%d}`, i)))
	}
	sameEvents(t, "REST", s.restEvents("s", 2), want)
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
				sendMessage(c.Conn, "session_start", sessionID{id})
				sendMessage(c.Conn, "no_such_type", nil) // answered when it has started
				m, _ := receiveMessage(t.Context(), c.Conn)
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
			c.CloseNow()
		}
		if n := querySQL[int](t, s.database, "select event_count from sessions where session_id = $1", id); n != 1 {
			t.Errorf("%s: %d events are stored, want 1", id, n)
		}
	}
}

// A session that was begun with the resume field is continued only by its token.
func TestSessionResumedByToken(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_GRACE_PERIOD=60000")
	first := s.dialTracker()
	first.send("session_start", `{"sessionId":"s","userId":"ann","resume":""}`)
	ready := first.next("session_ready")
	ready.wantFields(t, "sessionId resume lastSeq accepted")
	token := ready.str("resume")
	if ready.str("sessionId") != "s" || len(token) < 20 || string(ready.Data["lastSeq"]) != "0" {
		t.Errorf("got %s, want session s, a secret, 0", ready.text)
	}
	first.record(1, 1)
	viewer := s.viewer()
	// While it is live, while it waits, and when it has ended.
	states := []func(c *testConn){
		func(*testConn) {},
		func(c *testConn) {
			c.CloseNow()
			waitUntil(t, "the server has noticed", func() bool { return s.stat("trackers") == 0 })
		},
		func(c *testConn) {
			c.send("session_end", `{"sessionId":"s"}`)
			waitUntil(t, "it has ended", func() bool { return !s.session("s").IsActive })
		},
	}
	holder := first
	for i, state := range states {
		state(holder)
		for _, resume := range []string{``, `,"resume":""`, `,"resume":"wrong"`, `,"resume":null`, `,"resume":7`, `,"resume":"` + token[1:] + `"`} {
			c := s.dialTracker()
			c.sendRaw(`{"type":"session_start","data":{"sessionId":"s"` + resume + `}}`)
			if got := c.next("session_assigned").str("sessionId"); got == "s" || got == "" {
				t.Errorf("state %d, resume %q: was assigned %q, want a new id", i, resume, got)
			}
			if strings.Contains(resume, "resume") {
				c.expect("session_ready")
			}
			c.CloseNow()
		}
		waitUntil(t, "the others have gone", func() bool { return s.stat("trackers") == []int64{1, 0, 1}[i] })
		next := s.dialTracker()
		next.send("session_start", map[string]string{"sessionId": "s", "resume": token})
		m := next.next("session_ready")
		if m.str("sessionId") != "s" || m.str("resume") != token || string(m.Data["lastSeq"]) != fmt.Sprint(i+1) {
			t.Errorf("state %d: got %s, want s, the same token, lastSeq %d", i, m.text, i+1)
		}
		if i == 0 {
			holder.expectCloseReason(4001)
		}
		next.record(i+2, 1)
		holder = next
	}
	if got := s.session("s"); got.EventCount != 4 || got.UserID != "ann" {
		t.Errorf("got %d events of %s, want 4 of ann", got.EventCount, got.UserID)
	}
	viewer.quiet("session_started", "session_ended")
	for _, place := range []string{s.output.String(), querySQL[string](t, s.database, "select string_agg(sessions::text, ' ') from sessions")} {
		if strings.Contains(place, token) {
			t.Error("the token stands in the log or in the database")
		}
	}
}

// lastSeq is what is stored: a tracker that comes back before anything is sends
// all of it again, and it is there once.
func TestResumedBeforeCommit(t *testing.T) {
	t.Parallel()
	s := startInside(t, "BATCH_INTERVAL=3600000")
	event := func(n int) json.RawMessage { return json.RawMessage(fmt.Sprintf(`{"n":%d}`, n)) }
	first, second := s.dialTracker(), s.dialTracker()
	first.send("session_start", `{"sessionId":"s","resume":""}`)
	token := first.next("session_ready").str("resume")
	for seq := 1; seq <= 3; seq++ {
		first.sendRaw(batchOf(seq, []json.RawMessage{event(seq)}))
	}
	waitUntil(t, "all is accepted", func() bool { return s.memory().events == 3 })
	second.send("session_start", map[string]string{"sessionId": "s", "resume": token})
	if m := second.next("session_ready"); string(m.Data["lastSeq"]) != "0" {
		t.Errorf("got %s, want lastSeq 0: nothing is stored", m)
	}
	for seq := 1; seq <= 4; seq++ {
		second.sendRaw(batchOf(seq, []json.RawMessage{event(seq)}))
	}
	second.send("session_end", `{}`)
	for last := int64(0); last < 4; {
		last = second.expect("events_ack").Data.Seq
	}
	sameEvents(t, "REST", s.restEvents("s", 10), []json.RawMessage{event(1), event(2), event(3), event(4)})
}

// expectCloseReason checks the close code, and that there is a reason.
func (c *testConn) expectCloseReason(code websocket.StatusCode) {
	c.t.Helper()
	for {
		_, err := c.receive()
		if err == nil {
			continue
		}
		var closed websocket.CloseError
		if !errors.As(err, &closed) || closed.Code != code || closed.Reason == "" {
			c.t.Errorf("the connection ended with %v, want close code %d with a reason", err, code)
		}
		return
	}
}

// The token stands nowhere in what others can see.
func TestResumeIsSecret(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	viewer := s.viewer()
	tracker := s.dialTracker()
	tracker.sendRaw(`{"type":"session_start","data":{"sessionId":"s","a":1,"r\u0065sume":"hidden","resume":"","b":{"resume":"mine"}}}`)
	token := tracker.next("session_ready").str("resume")
	tracker.send("session_start", map[string]any{"sessionId": "s", "resume": token, "again": true})
	tracker.expect("session_ready")
	want := `"again":true`
	started := viewer.next("session_started").text
	waitUntil(t, "the second start is stored", func() bool {
		return strings.Contains(querySQL[string](t, s.database, "select metadata::text from sessions"), want)
	})
	viewer.send("viewer_join_session", `{"sessionId":"s"}`)
	joined := viewer.next("session_joined").text
	viewer.send("get_active_sessions", nil)
	listed := viewer.next("active_sessions").text
	_, rest := s.get("/sessions")
	_, one := s.get("/sessions/s")
	row := querySQL[string](t, s.database, "select sessions::text from sessions")
	for i, text := range []string{started, joined, listed, string(rest), string(one), row} {
		if strings.Contains(text, token) || strings.Contains(text, "hidden") || strings.Contains(text, `"resume":""`) {
			t.Errorf("place %d tells the token: %s", i, text)
		}
	}
	if !strings.Contains(started, `"b":{"resume":"mine"}`) {
		t.Errorf("got %s, want a member of another object left alone", started)
	}
}

func TestMetadata(t *testing.T) {
	big, deep := strings.Repeat("x", 70000), strings.Repeat("[", 1000)+strings.Repeat("]", 1000)
	const defaults = `"viewport":{"width":1920,"height":1080,"devicePixelRatio":1},"referrer":"","timeZone":"UTC"`
	tests := []struct{ name, data, user, url, metadata string }{
		{"nothing", `{}`, "", "", `{` + defaults + `}`},
		{"no object", `[1]`, "", "", `{` + defaults + `}`},
		{"null", `null`, "", "", `{` + defaults + `}`},
		{"some", `{"referrer":"r","x":1}`, "", "", `{"referrer":"r","x":1,"viewport":{"width":1920,"height":1080,"devicePixelRatio":1},"timeZone":"UTC"}`},
		{"control characters", `{"userId":"a\u0000b\nc\u001b[31m\u0085\u2028d","url":"u\u0000"}`, "a\ufffdb\ufffdc\ufffd[31m\ufffd\ufffdd", "u\ufffd",
			`{"userId":"a\u0000b\nc\u001b[31m\u0085\u2028d","url":"u\u0000",` + defaults + `}`},
		{"user a number", `{"userId":42}`, "42", "", `{"userId":42,` + defaults + `}`},
		{"user null", `{"userId":null}`, "", "", `{"userId":null,` + defaults + `}`},
		{"too large", `{"sessionId":"s","other":"` + big + `","userId":"u","url":"` + big + `","referrer":"é` + big + `","viewport":{"w":"` + big + `"},"timeZone":"T","startTime":5,"userAgent":"UA"}`,
			"u", big[:4096], `{"sessionId":"s","userId":"u","url":"` + big[:4096] + `","referrer":"é` + big[:4094] + `","timeZone":"T","startTime":5,"userAgent":"UA","viewport":{"width":1920,"height":1080,"devicePixelRatio":1}}`},
		{"too deep", `{"sessionId":"s","other":` + deep + `,"userId":` + deep[800:1200] + `}`, deep[800:1200], "", `{"sessionId":"s","userId":` + deep[800:1200] + `,` + defaults + `}`},
		{"deep", `{"other":` + deep[502:1498] + `}`, "", "", `{"other":` + deep[502:1498] + `,` + defaults + `}`},
		{"64 KiB", `{"x":"` + big[:65536-len(`{"x":""}`)] + `"}`, "", "", `{"x":"` + big[:65536-len(`{"x":""}`)] + `",` + defaults + `}`},
	}
	for _, tt := range tests {
		st := parseStart([]byte(tt.data))
		if st.about.userID != tt.user || st.about.url != tt.url {
			t.Errorf("%s: got user %.200q, url %.200q, want %.200q, %.200q", tt.name, st.about.userID, st.about.url, tt.user, tt.url)
		}
		if string(st.about.metadata) != tt.metadata {
			t.Errorf("%s: got metadata %.300s, want %.300s", tt.name, st.about.metadata, tt.metadata)
		}
	}
}

// None of it is a reason not to record.
func TestMetadataIsRecorded(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_SESSIONS_PER_MINUTE=1000")
	big := strings.Repeat("x", 1<<20)
	deep := strings.Repeat("[", 9000) + strings.Repeat("]", 9000)
	tests := []string{``, `,"data":null`, `,"data":[]`, `,"data":"s"`, `,"data":{}`, `,"data":{"userId":"` + big + `"}`, `,"data":{"big":"` + big + `"}`,
		`,"data":{"userId":"\u0000\ud800","url":"\u0000","referrer":"\u0000","timeZone":{"deep":[[[[]]]]},"viewport":null,"startTime":1e400}`,
		`,"data":{"__proto__":{"a":1},"constructor":1,"":2}`, `,"data":{"a":` + deep + `}`,
		`,"data":{"userId":` + deep + `,"viewport":` + deep + `}`}
	for i, data := range tests {
		c := s.dialTracker()
		c.sendRaw(`{"type":"session_start"` + data + `}`)
		id := c.next("session_assigned").str("sessionId")
		c.sendRaw(`{"type":"events_batch","data":{"events":[{"n":1}],"seq":1}}`)
		c.expect("events_ack")
		c.quietTracker()
		if n := len(querySQL[string](t, s.database, "select metadata::text || user_id || url from sessions where session_id = $1", id)); n > 80<<10 {
			t.Errorf("test %d: %d bytes are stored of the session", i, n)
		}
	}
}

// Metadata takes room for as long as its session is in memory; a new description
// takes the old one's place.
func TestMetadataTakesRoom(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_GRACE_PERIOD=0")
	ready := func(c *testConn, id string, size int) {
		c.send("session_start", map[string]string{"sessionId": id, "resume": "", "text": strings.Repeat("x", size)})
		c.expect("session_ready")
	}
	uses := func(when string, size int64) {
		t.Helper()
		waitWithin(t, 10*time.Second, when+" takes its room", func() bool { // the message gives its own back a little later
			used := s.used()
			return size <= used && used < size+size/4+4096
		})
	}
	a, b := s.dialTracker(), s.dialTracker()
	ready(a, "a", 20000)
	uses("one session", 20000)
	ready(a, "a", 60000)
	uses("more metadata", 60000)
	ready(b, "b", 30000)
	uses("another session", 90000)
	ready(a, "a", 10000)
	uses("less metadata", 40000)
	a.send("session_end", sessionID{})
	uses("what is left", 30000)
	b.CloseNow()
	a.CloseNow()
	s.nothingLeft()
}

func TestSessionsPerMinute(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_SESSIONS_PER_MINUTE=3")
	tracker := s.dialTracker()
	for i := range 3 {
		tracker.send("session_start", fmt.Sprintf(`{"sessionId":"s%d","resume":""}`, i))
		tracker.expect("session_ready")
	}
	tracker.send("session_start", `{"sessionId":"s3","resume":""}`)
	tracker.wantError("too_many_sessions")
	s.recording("s4") // another connection may
}

// ---- what a tracker sends ----

func TestEventsBatch(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker, other := s.recording("s"), s.recording("other")
	viewer, elsewhere := s.watching("s"), s.watching("other")
	// Extra fields are ignored: a tracker writes to its own session only.
	tracker.sendRaw(`{"data":{"sessionId":"other","userId":"x","timestamp":5,"fromIndex":99,"events":[ {"n":1} , {"n":2}],"seq":1},"more":true,"type":"events_batch"}`)
	ack := tracker.next("events_ack")
	ack.wantFields(t, "sessionId seq")
	if ack.str("sessionId") != "s" || string(ack.Data["seq"]) != "1" {
		t.Errorf("got %s, want an ack of 1 for s", ack.text)
	}
	live := viewer.next("events_batch")
	live.wantFields(t, "sessionId events fromIndex")
	if live.str("sessionId") != "s" || string(live.Data["fromIndex"]) != "0" || string(live.Data["events"]) != `[{"n":1} , {"n":2}]` {
		t.Errorf("got %s", live.text)
	}
	tracker.sendRaw(`{"type":"events_batch","data":{"events":[],"seq":2}}`) // nothing in it, and a number all the same
	if m := tracker.next("events_ack"); string(m.Data["seq"]) != "2" {
		t.Errorf("got %s, want an ack of 2", m.text)
	}
	tracker.record(3, 1)
	if m := viewer.next("events_batch"); string(m.Data["fromIndex"]) != "2" {
		t.Errorf("got %s, want it from 2", m.text)
	}
	other.record(1, 1)
	if m := elsewhere.next("events_batch"); string(m.Data["fromIndex"]) != "0" {
		t.Errorf("got %s, want it from 0", m.text)
	}
	if n := s.session("other").EventCount; n != 1 {
		t.Errorf("the other session has %d events, want 1", n)
	}
}

// An ack comes when its batch is committed, not before; one may stand for many.
func TestAckAfterCommit(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	tracker.record(1, 1)
	lock := connectSQL(t, s.database)
	defer lock.Close(context.Background())
	if _, err := lock.Exec(t.Context(), "begin; lock table session_events in exclusive mode"); err != nil {
		t.Fatal(err)
	}
	for seq := 2; seq <= 6; seq++ {
		tracker.sendRaw(batchOf(seq, []json.RawMessage{json.RawMessage(`{"n":1}`)}))
	}
	tracker.sendRaw(batchOf(4, []json.RawMessage{json.RawMessage(`{"again":1}`)})) // accepted before, not committed
	waitUntil(t, "all is accepted", func() bool { return s.memory().events == 6 })
	viewer := s.viewer()
	viewer.send("get_session_events", `{"sessionId":"s"}`)
	if n := len(viewer.expect("session_events").Data.Events); n != 6 {
		t.Errorf("a page has %d events, want 6: those not yet committed too", n)
	}
	if n := len(s.restEvents("s", 100)); n != 6 {
		t.Errorf("REST has %d events, want 6", n)
	}
	tracker.sendRaw(`{"type":"nonsense"}`)
	_, passed := tracker.nextOf("error")
	for _, m := range passed {
		if string(m.Data["seq"]) != "1" {
			t.Errorf("got %s before the commit", m)
		}
	}
	if _, err := lock.Exec(t.Context(), "rollback"); err != nil {
		t.Fatal(err)
	}
	for last := 0; last < 6; {
		last = int(tracker.expect("events_ack").Data.Seq)
	}
	if n := querySQL[int](t, s.database, "select event_count from sessions"); n != 6 {
		t.Errorf("%d events are stored, want 6", n)
	}
}

// A gap is refused and named; the tracker goes on from there.
func TestSequence(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	gap := func(seq, expected int) {
		t.Helper()
		tracker.sendRaw(batchOf(seq, []json.RawMessage{json.RawMessage(`{"n":1}`)}))
		m := tracker.next("error")
		m.wantFields(t, "code message expected")
		if m.str("code") != "sequence_gap" || string(m.Data["expected"]) != fmt.Sprint(expected) {
			t.Errorf("seq %d: got %s, want sequence_gap, expected %d", seq, m.text, expected)
		}
	}
	gap(2, 1)
	tracker.record(1, 1)
	gap(3, 2)
	gap(1<<53, 2)
	tracker.record(2, 1)
	tracker.sendRaw(batchOf(1, []json.RawMessage{json.RawMessage(`{"again":1}`)}))
	if m := tracker.next("events_ack"); string(m.Data["seq"]) != "2" {
		t.Errorf("a batch that is stored already: got %s, want an ack of all that is", m)
	}
	if n := s.session("s").EventCount; n != 2 {
		t.Errorf("got %d events, want 2", n)
	}
	for range 3 * maxErrors { // a tracker with many batches under way meets a gap often
		gap(9, 3)
	}
	tracker.record(3, 1)
}

func TestSessionEnd(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	viewer := s.viewer()
	for i, data := range []string{`{"sessionId":"s0"}`, `{}`, `null`, `{"sessionId":""}`, `{"sessionId":5}`} {
		id := fmt.Sprintf("s%d", i)
		tracker := s.recording(id)
		viewer.next("session_started")
		tracker.record(1, 1)
		tracker.send("session_end", `{"sessionId":"another"}`)
		tracker.record(2, 1)
		tracker.send("session_end", data)
		ended := viewer.next("session_ended")
		ended.wantFields(t, "sessionId")
		if ended.str("sessionId") != id {
			t.Errorf("session_end %s: session %s ended, want %s", data, ended.str("sessionId"), id)
		}
		tracker.sendRaw(batchOf(3, nil))
		tracker.wantError("no_session")
		waitUntil(t, "it is stored as ended", func() bool {
			return querySQL[bool](t, s.database, "select not is_active and ended_at is not null from sessions where session_id = $1", id)
		})
	}
	// The original's tracker ends the session under the id that it had asked for.
	holder, second := s.recording("held"), s.dialTracker()
	second.send("session_start", `{"sessionId":"held"}`)
	assigned := second.next("session_assigned").str("sessionId")
	second.send("session_end", `{"sessionId":"held"}`)
	waitUntil(t, "the second one's session ends", func() bool { return !s.session(assigned).IsActive })
	holder.record(1, 1)
}

// A session whose tracker goes without a word stays for its grace period.
func TestGracePeriod(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_GRACE_PERIOD=1500")
	tracker := s.recording("s")
	viewer := s.watching("s")
	tracker.CloseNow()
	left := time.Now()
	waitUntil(t, "the server has noticed", func() bool { return s.stat("trackers") == 0 })
	if !s.session("s").IsActive && time.Since(left) < time.Second {
		t.Error("the session is not active in its grace period")
	}
	viewer.next("session_ended")
	if waited := time.Since(left); waited < 1400*time.Millisecond {
		t.Errorf("the session ended after %v, want 1.5 s", waited)
	}
	waitUntil(t, "it is stored as ended", func() bool { return !s.session("s").IsActive && s.memory().sessions == 0 })
}

// Errors of the page are stored and counted; those that viewers know are
// forwarded as they are.
func TestReports(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	viewer, other := s.watching("s"), s.viewer()
	large := strings.Repeat("x", 100000)
	tests := []struct{ kind, data, forwarded string }{
		{"javascript_error", `{"message":"m\u0000" , "stack":"s","timestamp":1e400,"sessionId":"another"}`,
			`{"message":"m\u0000" , "stack":"s","timestamp":1e400,"sessionId":"another","sessionId":"s"}`},
		{"promise_rejection", `{ "reason" : {"a":[ ]} }`, `{"reason" : {"a":[ ]},"sessionId":"s"}`},
		{"javascript_error", `{ }`, `{"sessionId":"s"}`},
		{"error", `{"error":"e","stack":"s","timestamp":1}`, ""},
		{"error", `"\ud800 \u0000"`, ""},
		{"error", `null`, ""},
		{"error", ``, ""},
		{"javascript_error", `{"message":"` + large + `","other":"` + large + `"}`, `{"message":"` + large[:4096] + `","sessionId":"s"}`},
	}
	for _, tt := range tests {
		message := `{"type":"` + tt.kind + `"}`
		if tt.data != "" {
			message = `{"type":"` + tt.kind + `","data":` + tt.data + `}`
		}
		tracker.sendRaw(message)
		if tt.forwarded == "" {
			continue
		}
		want := `{"type":"` + tt.kind + `","data":` + tt.forwarded + `}`
		if got := viewer.next(tt.kind).text; got != want {
			t.Errorf("viewers got %.300s, want %.300s", got, want)
		}
	}
	tracker.sendRaw(`{"type":"javascript_error","data":"no object"}`)
	tracker.wantError("invalid_message")
	deep := strings.Repeat("[", 9990) + strings.Repeat("]", 9990)
	tracker.sendRaw(`{"type":"javascript_error","data":{"message":"m","other":` + deep + `,"stack":` + deep + `}}`)
	tests = append(tests, struct{ kind, data, forwarded string }{"javascript_error", `{"message":"m"}`, ""}) // of it the documented fields
	viewer.next("javascript_error")
	viewer.quiet()
	other.quiet()
	waitUntil(t, "all are stored", func() bool {
		return querySQL[int](t, s.database, "select error_count from sessions") == len(tests)
	})
	if n := s.session("s").ErrorCount; n != len(tests) {
		t.Errorf("got errorCount %d, want %d", n, len(tests))
	}
	var got struct {
		SessionID string
		Errors    []map[string]json.RawMessage
	}
	s.getJSON("/sessions/s/errors", &got)
	if got.SessionID != "s" || len(got.Errors) != len(tests) {
		t.Fatalf("got %d errors of %q, want %d of s", len(got.Errors), got.SessionID, len(tests))
	}
	for i, tt := range tests {
		wantKeys(t, "an error", got.Errors[i], "id kind data createdAt")
		want := tt.data
		if want == "" {
			want = "null"
		}
		if len(want) > 64<<10 {
			want = `{"message":"` + large[:4096] + `"}`
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, []byte(want)); err != nil {
			t.Fatal(err)
		}
		want = compact.String() // REST leaves out the white space
		if e := got.Errors[i]; string(e["id"]) != fmt.Sprint(i) || string(e["kind"]) != `"`+tt.kind+`"` || string(e["data"]) != want {
			t.Errorf("error %d: got %s %s %.200s, want %s %.200s", i, e["id"], e["kind"], e["data"], tt.kind, want)
		}
	}
}

func TestVisibilityChange(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	viewer, other := s.watching("s"), s.viewer()
	tracker.sendRaw(`{"type":"visibility_change","data":{"hidden":true , "timestamp":12345678901234567890}}`)
	const want = `{"type":"visibility_change","data":{"hidden":true , "timestamp":12345678901234567890,"sessionId":"s"}}`
	if got := viewer.next("visibility_change").text; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	tracker.sendRaw(`{"type":"visibility_change","data":{"a":"` + strings.Repeat("x", 70000) + `"}}`)
	tracker.wantError("too_large")
	for _, data := range []string{``, `,"data":null`, `,"data":[]`, `,"data":"x"`} {
		tracker.sendRaw(`{"type":"visibility_change"` + data + `}`)
		tracker.wantError("invalid_message")
	}
	viewer.quiet()
	other.quiet()
	tracker.record(1, 1)
	if n := querySQL[int](t, s.database, "select count(*) from session_errors"); n != 0 {
		t.Errorf("%d rows of it are stored, want none", n)
	}
}

func TestHeartbeatMessage(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker, viewer := s.recording("s"), s.viewer()
	for _, message := range []string{`{"type":"heartbeat"}`, `{"type":"heartbeat","data":null}`, `{"type":"heartbeat","data":[1,{}]}`} {
		tracker.sendRaw(message)
		viewer.sendRaw(message)
	}
	s.dialTracker().sendRaw(`{"type":"heartbeat"}`) // before a session, too
	tracker.quietTracker()
	viewer.quiet()
}

// ---- viewers ----

// On connecting, and when it asks, a viewer gets the sessions that are live.
func TestActiveSessions(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_GRACE_PERIOD=60000")
	if m := s.viewerList(); len(m) != 0 {
		t.Errorf("got %d sessions at first, want an empty list", len(m))
	}
	trackers := map[string]*testConn{}
	for _, id := range []string{"live", "graceful", "over"} {
		trackers[id] = s.recording(id)
		trackers[id].record(1, 3)
		trackers[id].send("error", `{}`)
	}
	trackers["graceful"].CloseNow()
	trackers["over"].send("session_end", `{}`)
	waitUntil(t, "one has ended, and two have a row with their error", func() bool {
		return !s.session("over").IsActive && s.stat("trackers") == 2 && s.session("live").ErrorCount == 1 && s.session("graceful").ErrorCount == 1
	})
	var ids []string
	for _, entry := range s.viewerList() {
		wantKeys(t, "active_sessions", entry, "sessionId userId metadata eventCount errorCount")
		if string(entry["eventCount"]) != "3" || string(entry["errorCount"]) != "1" {
			t.Errorf("got %s events and %s errors, want 3 and 1", entry["eventCount"], entry["errorCount"])
		}
		ids = append(ids, string(entry["sessionId"]))
	}
	slices.Sort(ids)
	if want := []string{`"graceful"`, `"live"`}; !slices.Equal(ids, want) {
		t.Errorf("got the sessions %v, want %v", ids, want)
	}
}

// viewerList is the list that a viewer gets on connecting.
func (s *insideServer) viewerList() []map[string]json.RawMessage {
	s.t.Helper()
	c := dialServer(s.t, s.ws("viewer"))
	defer c.CloseNow()
	m := c.next("active_sessions")
	m.wantFields(s.t, "sessions")
	if string(m.Data["sessions"]) == "null" {
		s.t.Error("got null, want an array")
	}
	return objects(s.t, m.Data["sessions"])
}

func TestJoinAndLeave(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	viewer := s.viewer()
	join := func() wireText {
		t.Helper()
		viewer.send("viewer_join_session", `{"sessionId":"s"}`)
		m := viewer.next("session_joined")
		m.wantFields(t, "sessionId events metadata totalEvents isActive snapshotIndex")
		return m
	}
	if m := join(); m.str("sessionId") != "s" || string(m.Data["events"]) != "[]" || string(m.Data["totalEvents"]) != "0" ||
		string(m.Data["isActive"]) != "true" || string(m.Data["snapshotIndex"]) != "null" || !strings.Contains(string(m.Data["metadata"]), `"timeZone":"UTC"`) {
		t.Errorf("got %s", m.text)
	}
	tracker.sendRaw(`{"type":"events_batch","data":{"events":[{"type":4},{"type":2},{"type":3},{"type":2}],"seq":1}}`)
	viewer.next("events_batch")
	if m := join(); string(m.Data["totalEvents"]) != "4" || string(m.Data["snapshotIndex"]) != "3" {
		t.Errorf("joined again: got %s, want 4 events, snapshot 3", m.text)
	}
	tracker.expect("events_ack")
	tracker.record(2, 1)
	if m := viewer.next("events_batch"); string(m.Data["fromIndex"]) != "4" {
		t.Errorf("got %s, want it from 4", m.text)
	}
	viewer.send("viewer_leave_session", `{"sessionId":"s"}`)
	viewer.quiet()
	tracker.record(3, 1)
	tracker.send("javascript_error", `{}`)
	viewer.quiet()
	for _, unknown := range []string{`{"sessionId":"nobody"}`, `{"sessionId":"../x"}`, `{"sessionId":""}`, `{}`, `null`} {
		viewer.send("viewer_join_session", unknown)
		viewer.wantError("not_found")
	}
	tracker.send("session_end", `{}`)
	viewer.next("session_ended") // also to who has not joined
	waitUntil(t, "it has left memory", func() bool { return s.memory().sessions == 0 })
	if m := join(); string(m.Data["totalEvents"]) != "6" || string(m.Data["isActive"]) != "false" || string(m.Data["snapshotIndex"]) != "3" {
		t.Errorf("joined when it had ended: got %s", m.text)
	}
	again := s.dialTracker() // it comes back, and who joined sees it
	again.send("session_start", `{"sessionId":"s"}`)
	if id := again.next("session_assigned").str("sessionId"); id == "s" {
		t.Error("it was continued without its token")
	}
}

// Who has joined a session that had ended sees it when it comes back.
func TestJoinBeforeReturn(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.dialTracker()
	tracker.send("session_start", `{"sessionId":"s"}`)
	tracker.sendRaw(batchOf(1, []json.RawMessage{json.RawMessage(`{"n":0}`), json.RawMessage(`{"n":1}`)}))
	tracker.expect("events_ack")
	tracker.send("session_end", `{}`)
	waitUntil(t, "it has left memory", func() bool { return s.memory().sessions == 0 })
	viewer := s.watching("s")
	tracker.send("session_start", `{"sessionId":"s"}`)
	viewer.next("session_started")
	tracker.sendRaw(batchOf(2, []json.RawMessage{json.RawMessage(`{"n":2}`)}))
	if m := viewer.next("events_batch"); string(m.Data["fromIndex"]) != "2" {
		t.Errorf("got %s, want it from 2", m.text)
	}
}

// At whatever moment a viewer joins, its first live batch begins where the
// answer to the join said.
func TestJoinAtAnyMoment(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	stop := make(chan struct{})
	var sending sync.WaitGroup
	sent := 0
	sending.Go(func() { // ends with stop
		for seq := 1; ; seq++ {
			select {
			case <-stop:
				return
			default:
			}
			n := seq%3 + 1
			var events []json.RawMessage
			for i := range n {
				events = append(events, json.RawMessage(fmt.Sprintf(`{"n":%d}`, sent+i)))
			}
			sent += n
			sendText(tracker.Conn, batchOf(seq, events))
		}
	})
	var readers sync.WaitGroup
	go func() { // the acks; ends with the connection
		for {
			if _, err := tracker.receive(); err != nil {
				return
			}
		}
	}()
	for range 4 {
		readers.Go(func() {
			for range 15 {
				v := joinLive(t, s, "s")
				for i, event := range v.until(v.from + 20) {
					if want := fmt.Sprintf(`{"n":%d}`, v.from+i); string(event) != want {
						t.Errorf("joined at %d: event %d is %s", v.from, v.from+i, event)
					}
				}
				v.CloseNow()
			}
		})
	}
	readers.Wait()
	close(stop)
	sending.Wait()
}

func sendText(conn *websocket.Conn, text string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return conn.Write(ctx, websocket.MessageText, []byte(text))
}

func TestSessionEvents(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	for i := range 25 {
		tracker.record(i+1, 100)
	}
	viewer := s.viewer()
	page := func(data string) wireText {
		t.Helper()
		viewer.send("get_session_events", data)
		m := viewer.next("session_events")
		m.wantFields(t, "sessionId events fromIndex totalEvents hasMore isActive")
		return m
	}
	tests := []struct {
		data        string
		from, count int
		more        bool
	}{
		{`{"sessionId":"s"}`, 0, 1000, true},
		{`{"sessionId":"s","fromIndex":0,"limit":0}`, 0, 1000, true},
		{`{"sessionId":"s","fromIndex":1999,"limit":100000}`, 1999, 501, false},
		{`{"sessionId":"s","fromIndex":3,"limit":5}`, 3, 5, true},
		{`{"sessionId":"s","fromIndex":2499,"limit":1}`, 2499, 1, false},
		{`{"sessionId":"s","fromIndex":2500}`, 2500, 0, false},
		{`{"sessionId":"s","fromIndex":9007199254740991}`, 9007199254740991, 0, false},
		{`{"sessionId":"s","fromIndex":9223372036854775807}`, 9223372036854775807, 0, false},
		{`{"sessionId":"s","fromIndex":null,"limit":null}`, 0, 1000, true},
	}
	for _, tt := range tests {
		m := page(tt.data)
		events := objects(t, m.Data["events"])
		if len(events) != tt.count || string(m.Data["fromIndex"]) != fmt.Sprint(tt.from) || string(m.Data["hasMore"]) != fmt.Sprint(tt.more) ||
			string(m.Data["totalEvents"]) != "2500" || string(m.Data["isActive"]) != "true" || m.str("sessionId") != "s" {
			t.Errorf("%s: got %d events, fromIndex %s, hasMore %s, totalEvents %s, isActive %s", tt.data, len(events), m.Data["fromIndex"],
				m.Data["hasMore"], m.Data["totalEvents"], m.Data["isActive"])
		}
		if len(events) > 0 && (string(events[0]["seq"]) != fmt.Sprint(tt.from/100+1) || string(events[0]["n"]) != fmt.Sprint(tt.from%100)) {
			t.Errorf("%s: the first event is %s", tt.data, events[0])
		}
	}
	for _, wrong := range []string{`{"sessionId":"s","fromIndex":-1}`, `{"sessionId":"s","fromIndex":1.5}`, `{"sessionId":"s","fromIndex":"1"}`,
		`{"sessionId":"s","limit":-1}`, `{"sessionId":"s","fromIndex":9223372036854775808}`, `[]`, `"s"`, `{"sessionId":["s"]}`} {
		viewer.send("get_session_events", wrong)
		viewer.wantError("invalid_message")
	}
	viewer.send("get_session_events", `{"sessionId":"nobody"}`)
	viewer.wantError("not_found")
	tracker.send("session_end", `{}`)
	waitUntil(t, "it has left memory", func() bool { return s.memory().sessions == 0 })
	if m := page(`{"sessionId":"s","limit":1}`); string(m.Data["isActive"]) != "false" || string(m.Data["hasMore"]) != "true" {
		t.Errorf("an ended session: got %s", m.text)
	}
}

// A page of large events is cut short; hasMore tells.
func TestLargePage(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	var events []json.RawMessage
	for i := range 5 {
		events = append(events, json.RawMessage(fmt.Sprintf(`{"n":%d,"text":"%s"}`, i, strings.Repeat("x", 1200<<10))))
	}
	tracker.sendRaw(batchOf(1, events))
	tracker.expect("events_ack")
	viewer := s.viewer()
	viewer.send("get_session_events", `{"sessionId":"s"}`)
	if m := viewer.expect("session_events"); len(m.Data.Events) != 4 || !m.Data.HasMore {
		t.Errorf("got %d events of 1.2 MB, hasMore %v, want 4", len(m.Data.Events), m.Data.HasMore)
	}
	sameEvents(t, "pages", pagesOf(t, s, "s", 1000), events)
	sameEvents(t, "chunks", s.chunkEvents("s"), events)
}

// A tracker is asked for a full snapshot when a viewer joins and there is none.
func TestTakeSnapshot(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	s.watching("s")
	m := tracker.next("take_snapshot")
	m.wantFields(t, "sessionId")
	if m.str("sessionId") != "s" {
		t.Errorf("got %s", m.text)
	}
	fresh := s.recording("fresh")
	fresh.sendRaw(`{"type":"events_batch","data":{"events":[{"type":2,"timestamp":1}],"seq":1}}`)
	fresh.expect("events_ack")
	s.watching("fresh")
	fresh.quietTracker()
}

// A viewer that stops reading is told so when it reads again; nobody else
// notices.
func TestViewerLags(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	slow, fast := joinLive(t, s, "s"), joinLive(t, s, "s")
	text := strings.Repeat("x", 50000)
	n := 0
	for ; s.server.metrics.viewersLagged.Load() == 0; n++ {
		event := json.RawMessage(fmt.Sprintf(`{"n":%d,"text":"%s"}`, n, text))
		tracker.sendRaw(batchOf(n+1, []json.RawMessage{event}))
		if got := fast.until(fast.from + 1); string(got[0]) != string(event) {
			t.Fatalf("the fast viewer got %.50s", got[0])
		}
		fast.from++
	}
	at := 0
	for {
		m := slow.expectOneOf("events_batch", "session_lagged")
		if m.Type == "session_lagged" {
			m.wantFields(t, "sessionId nextIndex")
			if got := string(m.Data["nextIndex"]); got != fmt.Sprint(n) || m.str("sessionId") != "s" {
				t.Errorf("got %s, want nextIndex %d", m.text, n)
			}
			break
		}
		if got := string(m.Data["fromIndex"]); got != fmt.Sprint(at) {
			t.Fatalf("live batch at %s, want %d", got, at)
		}
		at++
	}
	if at == 0 || at >= n {
		t.Errorf("it lagged after %d of %d events", at, n)
	}
	tracker.sendRaw(batchOf(n+1, []json.RawMessage{json.RawMessage(`{"last":1}`)}))
	if m := slow.next("events_batch"); string(m.Data["fromIndex"]) != fmt.Sprint(n) {
		t.Errorf("after the lag live goes on at %s, want %d", m.Data["fromIndex"], n)
	}
}

// expectOneOf reads on until a message of one of these types comes.
func (c *testConn) expectOneOf(kinds ...string) wireText {
	c.t.Helper()
	for {
		ctx, cancel := context.WithTimeout(testContext(c.t), patience)
		_, text, err := c.Read(ctx)
		cancel()
		var m wireText
		if err == nil {
			err = json.Unmarshal(text, &m)
		}
		if err != nil {
			c.t.Fatalf("waiting for %v: %v", kinds, err)
		}
		if m.text = string(text); slices.Contains(kinds, m.Type) {
			return m
		}
	}
}

// Viewers watch what is in memory also while there is no room left and PostgreSQL
// does not answer.
func TestViewerWithoutRoom(t *testing.T) {
	t.Parallel()
	proxy, through := proxyToDatabase(t, testDatabase(t), nil)
	s := startInside(t, "DATABASE_URL="+through, "MAX_BUFFER_BYTES=1048576", "MAX_MESSAGE_BYTES=500000")
	full := s.recording("full")
	proxy.freeze()
	defer proxy.thaw()
	event := json.RawMessage(`{"text":"` + strings.Repeat("x", 100000) + `"}`)
	go func() { // ends when all is sent, or with the connection
		for seq := 1; seq <= 40; seq++ {
			if sendText(full.Conn, batchOf(seq, []json.RawMessage{event})) != nil {
				return
			}
		}
	}()
	waitUntil(t, "there is no room left", func() bool {
		s.server.budget.mu.Lock()
		defer s.server.budget.mu.Unlock()
		return len(s.server.budget.waiting) > 0
	})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	viewer := s.viewer()
	viewer.send("viewer_join_session", sessionID{"full"})
	viewer.send("get_session_events", map[string]any{"sessionId": "full", "fromIndex": 0, "limit": 3})
	for joined, page := false, -1; !joined || page < 0; { // in any order, perhaps with live events
		m, err := receiveMessage(ctx, viewer.Conn)
		if err != nil {
			t.Fatalf("has joined: %v, has a page: %v; then %v", joined, page >= 0, err)
		}
		switch m.Type {
		case "session_joined":
			joined = true
		case "session_events":
			if page = len(m.Data.Events); page != 3 {
				t.Errorf("got a page of %d events, want 3", page)
			}
		}
	}
}

// ---- bad input ----

// What is refused gets an error with a code; the connection stays, and so does
// all that was sent before and after.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tests := []struct{ viewer, tracker, message string }{
		{"invalid_message", "invalid_message", ``},
		{"invalid_message", "invalid_message", `{`},
		{"invalid_message", "invalid_message", `[]`},
		{"invalid_message", "invalid_message", `"session_start"`},
		{"invalid_message", "invalid_message", `null`},
		{"invalid_message", "invalid_message", `{}`},
		{"invalid_message", "invalid_message", `{"type":5}`},
		{"invalid_message", "invalid_message", `{"type":null}`},
		{"invalid_message", "invalid_message", `{"type":"heartbeat"}{}`},
		{"invalid_message", "invalid_message", "\ufeff{\"type\":\"heartbeat\"}"},
		{"invalid_message", "invalid_message", "{\"type\":\"heartbeat\",\"data\":\"\xff\"}"},
		{"invalid_message", "invalid_message", "{\"type\":\"heartbeat\",\"data\":\"\xed\xa0\x80\"}"},
		{"invalid_message", "invalid_message", "{\"type\":\"heartbeat\",\"data\":\"\xc0\xaf\"}"},
		{"unknown_type", "unknown_type", `{"type":""}`},
		{"unknown_type", "unknown_type", `{"type":"Heartbeat"}`},
		{"unknown_type", "unknown_type", `{"type":"session_started"}`},
		{"unknown_type", "unknown_type", `{"type":"__proto__"}`},
		{"unknown_type", "unknown_type", `{"type":"heartbeat\u0000"}`},
		{"forbidden", "invalid_events", `{"type":"events_batch"}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":null}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":[]}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":{}}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":{"events":null}}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":{"events":{"length":1}}}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":{"events":"[]"}}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":{"events":[{},1]}}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":{"events":[null]}}`},
		{"forbidden", "invalid_events", `{"type":"events_batch","data":{"events":[[]]}}`},
		{"forbidden", "invalid_message", `{"type":"events_batch","data":{"events":[{}],"seq":0}}`},
		{"forbidden", "invalid_message", `{"type":"events_batch","data":{"events":[{}],"seq":-1}}`},
		{"forbidden", "invalid_message", `{"type":"events_batch","data":{"events":[{}],"seq":1.5}}`},
		{"forbidden", "invalid_message", `{"type":"events_batch","data":{"events":[{}],"seq":"1"}}`},
		{"forbidden", "invalid_message", `{"type":"events_batch","data":{"events":[{}],"seq":null}}`},
		{"forbidden", "invalid_message", `{"type":"events_batch","data":{"events":[{}],"seq":9007199254740993}}`},
		{"forbidden", "invalid_message", `{"type":"javascript_error","data":5}`},
		{"forbidden", "invalid_message", `{"type":"promise_rejection"}`},
		{"forbidden", "invalid_message", `{"type":"visibility_change"}`},
		{"forbidden", "", `{"type":"error"}`},
		{"forbidden", "", `{"type":"session_end","data":{"sessionId":"other"}}`},
		{"forbidden", "", `{"type":"session_start","data":{"sessionId":"s"}}`},
		{"", "forbidden", `{"type":"get_active_sessions"}`},
		{"", "forbidden", `{"type":"viewer_join_session","data":{"sessionId":"s"}}`},
		{"", "forbidden", `{"type":"viewer_leave_session","data":{"sessionId":"s"}}`},
		{"", "forbidden", `{"type":"get_session_events","data":{"sessionId":"s"}}`},
		{"invalid_message", "forbidden", `{"type":"viewer_join_session"}`},
		{"invalid_message", "forbidden", `{"type":"viewer_join_session","data":"s"}`},
		{"invalid_message", "forbidden", `{"type":"viewer_leave_session","data":5}`},
		{"not_found", "forbidden", `{"type":"viewer_join_session","data":{"sessionId":"s\u0000"}}`},
		{"not_found", "forbidden", `{"type":"get_session_events","data":{"sessionId":"' or 1=1 --"}}`},
	}
	tracker, viewer := s.recording("s"), s.watching("s")
	seq := 0
	for _, tt := range tests {
		seq++
		tracker.record(seq, 1)
		if tt.tracker != "" {
			tracker.sendRaw(tt.message)
			tracker.wantError(tt.tracker)
		} else {
			tracker.sendRaw(tt.message)
		}
		if tt.viewer != "" {
			viewer.sendRaw(tt.message)
			viewer.wantError(tt.viewer)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, c := range []*testConn{tracker, viewer.testConn} {
		c.Write(ctx, websocket.MessageBinary, []byte(`{"type":"heartbeat"}`))
		c.wantError("invalid_message")
	}
	tracker.record(seq+1, 1)
	fresh := s.dialTracker() // before a session has begun
	for _, message := range []string{batchOf(1, nil), `{"type":"error"}`, `{"type":"javascript_error","data":{}}`, `{"type":"visibility_change","data":{}}`, `{"type":"session_end"}`} {
		fresh.sendRaw(message)
		fresh.wantError("no_session")
	}
	if n := s.session("s").EventCount; n != seq+1 {
		t.Errorf("got %d events, want %d", n, seq+1)
	}
	if n := querySQL[int](t, s.database, "select count(*) from sessions"); n != 1 {
		t.Errorf("got %d sessions, want 1", n)
	}
}

// Many errors in a row close the connection; one good message between starts
// the count anew.
func TestErrorsInARow(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	for _, c := range []*testConn{s.recording("s"), s.viewer().testConn} {
		for range 3 {
			for range maxErrors - 1 {
				c.sendRaw(`nonsense`)
			}
			c.sendRaw(`{"type":"heartbeat"}`)
		}
		for range maxErrors {
			c.sendRaw(`nonsense`)
		}
		c.expectCloseReason(websocket.StatusPolicyViolation)
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
		message := batchOf(2, []json.RawMessage{json.RawMessage(`{"text":"x"}`)})
		message = strings.Replace(message, `"x"`, `"`+strings.Repeat("x", 1+size-len(message))+`"`, 1)
		if len(message) != size {
			t.Fatalf("the message has %d bytes, want %d", len(message), size)
		}
		go sendText(tracker.Conn, message) // ends with the connection
		if fits {
			tracker.expect("events_ack")
			continue
		}
		tracker.wantError("too_large")
		tracker.expectCloseReason(websocket.StatusMessageTooBig)
		if n := s.session(id).EventCount; n != 1 {
			t.Errorf("a message of %d bytes: the session has %d events, want 1", size, n)
		}
	}
	viewer := s.viewer()
	go sendText(viewer.Conn, `{"type":"heartbeat","data":"`+strings.Repeat("x", maxViewerMessage)+`"}`) // ends with the connection
	viewer.wantError("too_large")
	viewer.expectCloseReason(websocket.StatusMessageTooBig)
	innocent.record(1, 1)
}

// A session stops at MAX_SESSION_BYTES; its connection may begin another.
func TestSessionFull(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_SESSION_BYTES=5000")
	tracker := s.recording("s")
	viewer := s.viewer()
	text := strings.Repeat("x", 1000)
	for seq := 1; seq <= 4; seq++ {
		tracker.sendRaw(batchOf(seq, []json.RawMessage{json.RawMessage(`{"text":"` + text + `"}`)}))
		tracker.expect("events_ack")
	}
	tracker.sendRaw(batchOf(5, []json.RawMessage{json.RawMessage(`{"text":"` + text + `"}`)}))
	tracker.wantError("session_full")
	viewer.next("session_ended")
	tracker.sendRaw(batchOf(6, nil))
	tracker.wantError("no_session")
	tracker.send("session_start", `{"sessionId":"t","resume":""}`)
	tracker.expect("session_ready")
	tracker.record(1, 1)
	if st := s.session("s"); st.EventCount != 4 || st.IsActive {
		t.Errorf("got %d events, active %v, want 4, ended", st.EventCount, st.IsActive)
	}
}

// An index of many tiny events takes more memory than their text: there is room
// for it before it is made.
func TestTinyEvents(t *testing.T) {
	t.Parallel()
	const buffer, count = 1 << 20, 43000 // a little less than 128 KiB of text, 1 MB of index
	s := startInside(t, fmt.Sprintf("MAX_BUFFER_BYTES=%d", buffer), "BATCH_INTERVAL=100")
	msg := []byte(`{"type":"events_batch","data":{"seq":1,"events":[` + strings.Repeat("{},", count-1) + `{}]}}`)
	frame := string(maskedText(msg))
	parsed, err := parseFrame(msg)
	if err != nil {
		t.Fatal(err)
	}
	room := newBatch("s0", parsed, 1).room
	var conns []*rawConn
	for i := range 4 {
		c := rawWebSocket(t, s, "tracker")
		c.write(string(maskedText(fmt.Appendf(nil, `{"type":"session_start","data":{"sessionId":"s%d"}}`, i))))
		conns = append(conns, c)
	}
	waitUntil(t, "all record", func() bool { return s.memory().live == len(conns) })
	for _, c := range conns {
		c.write(frame[:len(frame)-1])
	}
	waitUntil(t, "all is read but the last bytes", func() bool { return s.used() >= int64(len(conns)*(len(msg)-1)) })
	for _, c := range conns {
		c.write(frame[len(frame)-1:])
	}
	most := int64(0)
	waitUntil(t, "all is stored", func() bool {
		for range 100 { // of the 10 ms between two looks at the rest
			most = max(most, s.used())
			time.Sleep(50 * time.Microsecond)
		}
		return s.memory().events == int64(len(conns)*count) && s.memory().oldest == 0
	})
	if limit := buffer + room + 2*int64(len(frame)); most > limit {
		t.Errorf("%d KB of room were in use, want at most MAX_BUFFER_BYTES and a message, %d KB", most>>10, limit>>10)
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

// used is the room that is taken of MAX_BUFFER_BYTES.
func (s *insideServer) used() int64 {
	return int64(s.server.cfg.maxBufferBytes) - s.server.budget.left()
}

// A message that trickles in, or stops in the middle, has its time.
func TestMessageTimeout(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MESSAGE_TIMEOUT=400", "HEARTBEAT_INTERVAL=60000")
	idle := s.recording("idle") // between messages nothing is timed
	for _, start := range []string{string(announce(1e9)), string(announce(100)) + "half of it", "\x01\x80\x00\x00\x00\x00"} {
		c := rawWebSocket(t, s, "tracker")
		c.write(start)
		if code, reason := c.closeFrame(); code != int(websocket.StatusPolicyViolation) || reason == "" {
			t.Errorf("%.20q: got close code %d, reason %q, want 1008 with a reason", start, code, reason)
		}
	}
	waitUntil(t, "they are gone", func() bool { return s.stat("trackers") == 1 })
	idle.record(1, 1)
}

// ---- heartbeats ----

// Connections that do not answer pings are gone from memory and /stats within
// two intervals; those that answer, or are in the middle of something, stay.
func TestHeartbeats(t *testing.T) {
	t.Parallel()
	const interval = time.Second
	s := startInside(t, "HEARTBEAT_INTERVAL=1000", "SESSION_GRACE_PERIOD=0")
	alive, viewer := s.recording("alive"), s.viewer()
	go keepReading(alive.Conn, viewer.Conn) // answers pings; ends with the connections
	dead := rawWebSocket(t, s, "tracker")
	dead.write(string(maskedText(wireMessage("session_start", `{"sessionId":"dead"}`))))
	rawWebSocket(t, s, "viewer")
	waitUntil(t, "all are there", func() bool { return s.memory().live == 2 && s.stat("totalClients") == 4 })
	began := time.Now()
	waitUntil(t, "the dead are gone", func() bool { return s.stat("totalClients") == 2 && s.memory().live == 1 })
	if took := time.Since(began); took > 2*interval+3*time.Second {
		t.Errorf("the dead were gone after %v, want %v", took, 2*interval)
	}
	time.Sleep(5 * interval / 2)
	if st := s.memory(); st.trackers != 1 || st.viewers != 1 || st.live != 1 {
		t.Errorf("got %+v, want the living still there", st)
	}
	alive.sendRaw(batchOf(1, nil))
	waitUntil(t, "the living records", func() bool { return querySQL[int](t, s.database, "select max(last_seq) from sessions") == 1 })
}

func keepReading(conns ...*websocket.Conn) {
	var reading sync.WaitGroup
	for _, conn := range conns {
		reading.Go(func() {
			for {
				if _, _, err := conn.Read(context.Background()); err != nil {
					return
				}
			}
		})
	}
	reading.Wait()
}

// A tracker that waits for room, or for the database, answers no ping, because
// nobody reads it; it is not cut for that.
func TestHeartbeatsWhileWaiting(t *testing.T) {
	t.Parallel()
	proxy, through := proxyToDatabase(t, testDatabase(t), nil)
	s := startInside(t, "DATABASE_URL="+through, "HEARTBEAT_INTERVAL=300", "SESSION_GRACE_PERIOD=0", "MAX_BUFFER_BYTES=1048576", "MAX_MESSAGE_BYTES=500000")
	full := s.recording("full")
	full.record(1, 1)
	proxy.freeze()
	late := s.dialTracker()
	late.send("session_start", `{"sessionId":"late","resume":""}`)
	event := json.RawMessage(`{"text":"` + strings.Repeat("x", 100000) + `"}`)
	sent := make(chan error, 1)
	go func() { // ends when all is sent, or with the connection
		for seq := 2; seq <= 40; seq++ {
			if err := sendText(full.Conn, batchOf(seq, []json.RawMessage{event})); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	waitUntil(t, "there is no room left", func() bool {
		s.server.budget.mu.Lock()
		defer s.server.budget.mu.Unlock()
		return len(s.server.budget.waiting) > 0
	})
	time.Sleep(1200 * time.Millisecond) // four intervals
	if n := s.memory().trackers; n != 2 {
		t.Errorf("%d trackers are connected while they wait, want 2", n)
	}
	proxy.thaw()
	late.expect("session_ready")
	for last := int64(0); last < 40; {
		last = full.expect("events_ack").Data.Seq
	}
	if err := <-sent; err != nil {
		t.Errorf("send: %v", err)
	}
	if n := len(s.restEvents("full", 10000)); n != 40 {
		t.Errorf("got %d events, want 40", n)
	}
	full.CloseNow()
	late.CloseNow()
	s.nothingLeft()
}

// A tracker does not wait for the database without end: its peer may have gone,
// which nobody sees meanwhile.
func TestClaimTimeout(t *testing.T) {
	t.Parallel()
	proxy, through := proxyToDatabase(t, testDatabase(t), nil)
	s := startInside(t, "DATABASE_URL="+through, "MESSAGE_TIMEOUT=500")
	proxy.freeze()
	defer proxy.thaw()
	stays, goes := s.dialTracker(), s.dialTracker()
	for _, c := range []*testConn{stays, goes} {
		c.send("session_start", `{"sessionId":"s","resume":""}`)
	}
	waitUntil(t, "both are there", func() bool { return s.memory().trackers == 2 })
	goes.CloseNow()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if m, err := receiveMessage(ctx, stays.Conn); websocket.CloseStatus(err) != websocket.StatusTryAgainLater {
		t.Errorf("got %s, %v, want close code 1013", m.Type, err)
	}
	waitWithin(t, 5*time.Second, "the connections have ended", func() bool { return s.memory().trackers == 0 })
}

// A session that is deleted while it records: its tracker hears why.
func TestDeletedWhileRecording(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker, other := s.recording("s"), s.recording("other")
	tracker.record(1, 1)
	viewer := s.watching("s")
	if status, _ := s.request("DELETE", "/sessions/s"); status != http.StatusNoContent {
		t.Errorf("DELETE: status %d, want 204", status)
	}
	tracker.wantError("session_deleted")
	tracker.expectCloseReason(4004)
	viewer.next("session_ended")
	viewer.send("viewer_join_session", `{"sessionId":"s"}`)
	viewer.wantError("not_found")
	other.record(1, 1)
}

// A session whose data PostgreSQL refuses is dropped; its connection stays.
func TestNotStored(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	execSQL(t, s.database, "alter table session_events add constraint poison check (session_id <> 's')")
	tracker, other := s.recording("s"), s.recording("other")
	tracker.sendRaw(batchOf(1, []json.RawMessage{json.RawMessage(`{"text":"words of a visitor"}`)}))
	tracker.wantError("not_stored")
	tracker.sendRaw(batchOf(2, nil))
	tracker.wantError("no_session")
	other.record(1, 1)
	if n := s.stat("refusedSessions"); n != 1 {
		t.Errorf("/stats: got %d refused sessions, want 1", n)
	}
	if !strings.Contains(s.log("rejections"), `"session":"s"`) {
		t.Error("the rejections log does not name the session")
	}
	s.tellsNothing("words of a visitor")
	tracker.send("session_start", `{"sessionId":"t","resume":""}`)
	tracker.expect("session_ready")
	tracker.record(1, 1)
}
