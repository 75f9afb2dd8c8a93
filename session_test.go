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
	"strconv"
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

// sessionState is what GET /sessions/{id} says.
type sessionState struct {
	UserID                 string
	Metadata               json.RawMessage
	EventCount, ErrorCount int
	IsActive               bool
	EndedAt                *time.Time
}

func (s *testServer) session(id string) (st sessionState) {
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

// ---- dialogues ----

// A dialogue is what some connections say and hear, line by line. One whose name
// begins with t is a tracker, with v a viewer; it is there from its first line on,
// a viewer when it has had its list.
//
//	t > session_start {"a":1}   sends a message of this type with this data
//	t > {"type":"nonsense"}     or a text as it stands
//	t > batch 2 3               or batch 2 with 3 events
//	t < ack s 2                 hears next, and nothing before but lower acks and take_snapshot
//	t closed 4001               the server closes, with a reason
//	t leaves                    closes
//	db 3 select count(*) …      waits until the database gives this
//	trackers 0, memory 1        waits until so many are connected, or sessions are in memory
//	DELETE /sessions/s 204      asks over REST
//
// A $word stands for what came where it was first used.
type dialogue struct {
	t     testing.TB
	s     *testServer
	conns map[string]*testConn
	words map[string]string
}

// messageFields are the fields of each message's data.
var messageFields = map[string]string{
	"active_sessions": "sessions", "session_started": "sessionId userId metadata", "session_ended": "sessionId",
	"session_joined": "sessionId events metadata totalEvents isActive snapshotIndex", "events_batch": "sessionId events fromIndex",
	"session_events": "sessionId events fromIndex totalEvents hasMore isActive", "session_lagged": "sessionId nextIndex",
	"session_assigned": "sessionId", "session_ready": "sessionId resume lastSeq accepted", "events_ack": "sessionId seq",
	"take_snapshot": "sessionId",
}

func (s *testServer) dialogue(t testing.TB, text string) {
	t.Helper()
	d := &dialogue{t, s, map[string]*testConn{}, map[string]string{}}
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		for word, value := range d.words {
			line = strings.ReplaceAll(line, word, value)
		}
		subject, rest, _ := strings.Cut(line, " ")
		verb, object, _ := strings.Cut(rest, " ")
		switch {
		case subject == "db":
			waitUntil(t, line, func() bool { return querySQL[string](t, s.database, "select ("+object+")::text") == verb })
		case subject == "memory":
			waitUntil(t, line, func() bool { return strconv.Itoa(s.memory().sessions) == verb })
		case subject == "trackers":
			waitUntil(t, line, func() bool { return fmt.Sprint(s.stat("trackers")) == verb })
		case subject == "DELETE":
			if status, _ := s.request(subject, verb); strconv.Itoa(status) != object {
				t.Errorf("%s: got status %d", line, status)
			}
		case verb == ">":
			d.conn(subject).sendRaw(spoken(object))
		case verb == "<":
			d.hear(d.conn(subject), line, object)
		case verb == "leaves":
			d.conn(subject).Close()
		case verb == "closed":
			code, _ := strconv.Atoi(object)
			d.conn(subject).expectClose(websocket.StatusCode(code))
		default:
			t.Fatalf("nobody understands %q", line)
		}
	}
	for name, c := range d.conns { // nothing was said that the dialogue does not have
		c.sendRaw(`{"type":"the_end"}`)
		if m, err := c.receive(); err == nil && m.Data.Code != "unknown_type" && m.Type != "take_snapshot" && m.Type != "events_ack" {
			t.Errorf("at the end %s hears %s, want nothing", name, m)
		}
		c.Close()
	}
}

func (d *dialogue) conn(name string) *testConn {
	if c := d.conns[name]; c != nil {
		return c
	}
	c := (*testConn)(nil)
	if name[0] == 'v' {
		c = d.s.viewer()
	} else {
		c = d.s.dialTracker()
	}
	d.conns[name] = c
	return c
}

// spoken is the message that a line has.
func spoken(object string) string {
	kind, data, _ := strings.Cut(object, " ")
	var seq, n int
	switch {
	case object == "" || object[0] == '{':
		return object
	case kind == "batch":
		fmt.Sscan(data, &seq, &n)
		return numberedBatch(seq, n)
	case data == "":
		return `{"type":"` + kind + `"}`
	}
	return `{"type":"` + kind + `","data":` + data + `}`
}

func (d *dialogue) hear(c *testConn, line, want string) {
	d.t.Helper()
	for {
		m, err := c.receive()
		if err != nil {
			d.t.Fatalf("%s: %v", line, err)
		}
		if fields := messageFields[m.Type]; fields != "" {
			m.wantFields(d.t, fields)
		}
		got := heard(m)
		if d.same(strings.Fields(got), strings.Fields(want)) {
			return
		}
		if m.Type != "take_snapshot" && m.Type != "events_ack" {
			d.t.Fatalf("%s: got %s", line, got)
		}
	}
}

func (d *dialogue) same(got, want []string) bool {
	if len(got) != len(want) {
		return false
	}
	for i, word := range want {
		if word[0] != '$' && word != got[i] {
			return false
		}
	}
	for i, word := range want {
		if word[0] == '$' {
			d.words[word] = got[i]
		}
	}
	return true
}

// heard says briefly what a message says.
func heard(m testMessage) string {
	d := m.Data
	switch m.Type {
	case "active_sessions":
		var ids []string
		var list []struct {
			SessionID              string
			EventCount, ErrorCount int
		}
		json.Unmarshal(m.fields()["sessions"], &list)
		for _, entry := range list {
			ids = append(ids, fmt.Sprintf("%s:%d:%d", entry.SessionID, entry.EventCount, entry.ErrorCount))
		}
		slices.Sort(ids)
		return "list " + strings.Join(ids, " ")
	case "session_started":
		return "started " + d.SessionID
	case "session_ended":
		return "ended " + d.SessionID
	case "session_assigned":
		return "assigned " + d.SessionID
	case "session_ready":
		return fmt.Sprintf("ready %s %d %s", d.SessionID, d.LastSeq, d.Resume)
	case "events_ack":
		return fmt.Sprintf("ack %s %d", d.SessionID, d.Seq)
	case "session_joined":
		return fmt.Sprintf("joined %s %d %v %s %s", d.SessionID, d.TotalEvents, d.IsActive, m.raw("snapshotIndex"), m.raw("events"))
	case "events_batch":
		return fmt.Sprintf("live %s %d+%d", d.SessionID, d.FromIndex, len(d.Events))
	case "session_events":
		return fmt.Sprintf("page %s %d+%d of %d more %v active %v", d.SessionID, d.FromIndex, len(d.Events), d.TotalEvents, d.HasMore, d.IsActive)
	case "session_lagged":
		return fmt.Sprintf("lagged %s %d", d.SessionID, d.NextIndex)
	case "error":
		return strings.TrimSpace("error " + d.Code + " " + m.raw("expected"))
	}
	return strings.TrimSpace(m.Type + " " + d.SessionID)
}

func TestDialogues(t *testing.T) {
	for _, tt := range []struct{ name, env, text string }{
		{"without an id the server makes one; the tracker then starts again with it", "", `
			v > heartbeat
			t > session_start {"url":"https://example.com/"}
			t < assigned $id
			v < started $id
			db 1 select count(*) from sessions where session_id = '$id' and user_id ~ '^user_[A-Za-z0-9]+$'
			t > session_start {"sessionId":"$id","referrer":"again"}
			t > batch 1 1
			t < ack $id 1
			db 1 select count(*) from sessions where metadata::text like '%again%' and event_count = 1 and user_id ~ '^user_'`},
		{"the same id again changes what is known of the session", "", `
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			t > batch 1 3
			t < ack s 1
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 3 true null []
			t > session_start {"sessionId":"s","userId":"bob","color":"blue"}
			t > batch 2 2
			t < ack s 2
			v < live s 3+2
			db bob5 select user_id || event_count from sessions where metadata::text like '%"color":"blue"%'
			t > session_start {"sessionId":"s","resume":"anything"}
			t < ready s 2 $token`},
		{"another id on the same connection ends the session and begins another", "", `
			t > session_start {"sessionId":"one","resume":""}
			t < ready one 0 $token
			t > batch 1 2
			t < ack one 1
			v > heartbeat
			t > session_start {"sessionId":"two","resume":""}
			t < ready two 0 $other
			v < ended one
			v < started two
			t > batch 1 1
			t < ack two 1
			db one:2:false,two:1:true select string_agg(session_id || ':' || event_count || ':' || is_active, ',' order by session_id) from sessions`},
		{"a session that has ended, or waits in its grace period, is continued by its id", "SESSION_GRACE_PERIOD=60000", `
			v > heartbeat
			t1 > session_start {"sessionId":"s"}
			v < started s
			t1 > batch 0 1
			t1 > session_end {"sessionId":"s"}
			v < ended s
			memory 0
			t1 > session_start {"sessionId":"s"}
			v < started s
			t1 > batch 0 1
			db 2 select event_count from sessions
			t1 leaves
			trackers 0
			t2 > session_start {"sessionId":"s"}
			t2 > batch 0 1
			t2 > session_end null
			v < ended s
			t2 > session_start {"sessionId":"s"}
			v < started s
			t2 > batch 0 1
			db 4 select event_count from sessions
			db 4 select sum(event_count) from session_events`},
		{"lastSeq is what is stored: what is not is sent again, and is there once", "BATCH_INTERVAL=3600000", `
			t1 > session_start {"sessionId":"s","resume":""}
			t1 < ready s 0 $token
			t1 > batch 1 1
			t1 > batch 2 1
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 2 true null []
			t2 > session_start {"sessionId":"s","resume":"$token"}
			t1 closed 4001
			t2 < ready s 0 $token
			t2 > batch 1 1
			t2 > batch 2 1
			t2 > batch 3 1
			t2 > session_end {}
			t2 < ack s 3
			v < live s 2+1
			v < ended s
			db 3 select sum(event_count) from session_events`},
		{"sessions in a minute", "MAX_SESSIONS_PER_MINUTE=2", `
			t > session_start {"sessionId":"s1","resume":""}
			t < ready s1 0 $1
			t > session_start {"sessionId":"s2","resume":""}
			t < ready s2 0 $2
			t > session_start {"sessionId":"s3","resume":""}
			t < error too_many_sessions
			t2 > session_start {"sessionId":"s3","resume":""}
			t2 < ready s3 0 $3`},
		{"extra fields are ignored: a tracker writes to its own session only", "", `
			t1 > session_start {"sessionId":"s","resume":""}
			t1 < ready s 0 $token
			t2 > session_start {"sessionId":"other","resume":""}
			t2 < ready other 0 $other
			v1 > viewer_join_session {"sessionId":"s"}
			v1 < joined s 0 true null []
			v2 > viewer_join_session {"sessionId":"other"}
			v2 < joined other 0 true null []
			t1 > {"data":{"sessionId":"other","userId":"x","fromIndex":99,"events":[ {"n":1} , {"n":2}],"seq":1},"more":true,"type":"events_batch"}
			t1 < ack s 1
			v1 < live s 0+2
			t1 > batch 2 0
			t1 < ack s 2
			t1 > batch 3 1
			t1 < ack s 3
			v1 < live s 2+1
			t2 > batch 1 1
			t2 < ack other 1
			v2 < live other 0+1`},
		{"a gap is refused and named; the tracker goes on from there", "", `
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			t > batch 2 1
			t < error sequence_gap 1
			t > batch 1 1
			t < ack s 1
			t > batch 1 1
			t < ack s 1
			t > batch 3 1
			t < error sequence_gap 2
			t > batch 9007199254740992 1
			t < error sequence_gap 2
			t > batch 2 1
			t > batch 2 1
			t > batch 1 1
			t > batch 3 1
			t < ack s 3
			db 3 select event_count from sessions`},
		{"the original's tracker ends the session under the id that it had asked for", "", `
			t1 > session_start {"sessionId":"held","resume":""}
			t1 < ready held 0 $token
			t2 > session_start {"sessionId":"held"}
			t2 < assigned $id
			t2 > session_end {"sessionId":"held"}
			db false select is_active from sessions where session_id = '$id'
			t1 > batch 1 1
			t1 < ack held 1`},
		{"a grace period without a word", "SESSION_GRACE_PERIOD=300", `
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 0 true null []
			t leaves
			v < ended s
			db true select not is_active and ended_at is not null from sessions
			memory 0`},
		{"heartbeats are ignored, before a session too", "", `
			t > heartbeat
			t > heartbeat null
			v > heartbeat [1,{}]
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			v < started s
			t > heartbeat {}`},
		{"the list of live sessions", "SESSION_GRACE_PERIOD=60000", `
			v > get_active_sessions
			v < list
			t1 > session_start {"sessionId":"live","resume":""}
			t1 < ready live 0 $1
			t1 > batch 1 3
			t1 > error {}
			t1 < ack live 1
			v < started live
			t2 > session_start {"sessionId":"graceful","resume":""}
			t2 < ready graceful 0 $2
			v < started graceful
			t2 leaves
			t3 > session_start {"sessionId":"over","resume":""}
			t3 < ready over 0 $3
			t3 > session_end {}
			v < started over
			v < ended over
			db 1 select error_count from sessions where session_id = 'live'
			v > get_active_sessions
			v < list graceful:0:0 live:3:1`},
		{"join and leave", "", `
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 0 true null []
			t > {"type":"events_batch","data":{"events":[{"type":4},{"type":2},{"type":3},{"type":2}],"seq":1}}
			v < live s 0+4
			t < ack s 1
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 4 true 3 []
			t > batch 2 1
			v < live s 4+1
			v > viewer_leave_session {"sessionId":"s"}
			v > get_session_events {"sessionId":"s","limit":1}
			v < page s 0+1 of 5 more true active true
			t > batch 3 1
			t > javascript_error {}
			t < ack s 3
			v > viewer_join_session {"sessionId":"nobody"}
			v < error not_found
			v > viewer_join_session {"sessionId":"../x"}
			v < error not_found
			v > viewer_join_session {}
			v < error not_found
			t > session_end {}
			v < ended s
			memory 0
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 6 false 3 []
			t > session_start {"sessionId":"s"}
			t < assigned $other
			v < started $other`},
		{"who has joined a session that had ended sees it when it comes back", "", `
			t > session_start {"sessionId":"s"}
			t > batch 1 2
			t < ack s 1
			t > session_end {}
			memory 0
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 2 false null []
			t > session_start {"sessionId":"s"}
			v < started s
			t > batch 2 1
			v < live s 2+1`},
		{"a full snapshot is asked for when a viewer joins and there is none", "", `
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 0 true null []
			t < take_snapshot s`},
		{"a session stops at MAX_SESSION_BYTES; its connection may begin another", "MAX_SESSION_BYTES=200", `
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			v > heartbeat
			t > batch 1 5
			t < ack s 1
			t > batch 2 50
			t < error session_full
			v < ended s
			t > batch 3 0
			t < error no_session
			t > session_start {"sessionId":"t","resume":""}
			t < ready t 0 $other
			t > batch 1 1
			t < ack t 1
			v < started t
			db 5 select event_count from sessions where session_id = 's' and not is_active`},
		{"a session that is deleted while it records", "", `
			t > session_start {"sessionId":"s","resume":""}
			t < ready s 0 $token
			t > batch 1 1
			t < ack s 1
			t2 > session_start {"sessionId":"other","resume":""}
			t2 < ready other 0 $other
			v > viewer_join_session {"sessionId":"s"}
			v < joined s 1 true null []
			DELETE /sessions/s 204
			t < error session_deleted
			t closed 4004
			v < ended s
			v > viewer_join_session {"sessionId":"s"}
			v < error not_found
			t2 > batch 1 1
			t2 < ack other 1`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			startInside(t, strings.Fields(tt.env)...).dialogue(t, tt.text)
		})
	}
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

func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_CONNECTIONS=2")
	s.dialTracker()
	second := s.viewer()
	if _, err := openWebSocket(&net.Dialer{}, s.ws("tracker"), 512); err != handshakeStatus(http.StatusServiceUnavailable) {
		t.Errorf("a third connection: got %v, want 503", err)
	}
	second.Close()
	waitUntil(t, "there is room again", func() bool {
		c, err := openWebSocket(&net.Dialer{}, s.ws("tracker"), 512)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
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
	for what, got := range map[string]map[string]json.RawMessage{"session_started": started.fields(), "active_sessions": listed[0]} {
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
	if stored := querySQL[string](t, s.database, "select metadata::text || user_id || url from sessions"); stored != data+"annhttps://example.com/?q=1" {
		t.Errorf("got %s in the database", stored)
	}
	if strings.Contains(s.output.String(), "America/New_York") {
		t.Error("the log has the page's metadata")
	}
}

// Ids of another form, and one that another live connection holds, are replaced.
func TestSessionIDsReplaced(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	holder := s.recording("held")
	holder.record(1, 1)
	longest := strings.Repeat("x", 128)
	for _, id := range []string{`"held"`, `""`, `null`, `7`, `{}`, `["a"]`, `true`, `"` + longest + `x"`, `"a b"`, `"a/b"`, `"a\nb"`, `"a\u0000b"`,
		`"é"`, `"a\u001b[31mb"`, `"../../etc/passwd"`, `"'; drop table sessions; --"`, `"a%00"`, `"\ud800"`} {
		c := s.dialTracker()
		c.sendRaw(`{"type":"session_start","data":{"sessionId":` + id + `}}`)
		if got := c.expect("session_assigned").Data.SessionID; !validID(got) || got == "held" {
			t.Errorf("sessionId %s: was assigned %q", id, got)
		}
		c.Close()
	}
	for _, id := range []string{"a", longest, "A-Z_0.9:x", ".", "..", "-"} {
		c := s.dialTracker()
		c.send("session_start", map[string]string{"sessionId": id, "resume": ""})
		if m, passed := c.expectAfter("session_ready"); m.Data.SessionID != id || len(passed) > 0 {
			t.Errorf("sessionId %q: got %v and %s, want it accepted", id, passed, m)
		}
	}
	holder.record(2, 1)
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
	holder.sendRaw(`{"type":"session_start","data":{"sessionId":"s","userId":"ann","r\u0065sume":"hidden","resume":"","b":{"resume":"mine"}}}`)
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
		for _, resume := range []string{``, `,"resume":""`, `,"resume":"wrong"`, `,"resume":null`, `,"resume":7`, `,"resume":"` + token[1:] + `"`} {
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
		{"control characters", `{"userId":"a\u0000b\nc\u001b[31m\u0085\u2028d","url":"u\u0000"}`, "a\ufffdb\ufffdc\ufffd[31m\ufffd\ufffdd", "u\ufffd",
			`{"userId":"a\u0000b\nc\u001b[31m\u0085\u2028d","url":"u\u0000",` + defaults + `}`},
		{"user a number", `{"userId":42}`, "42", "", `{"userId":42,` + defaults + `}`},
		{"user null", `{"userId":null}`, any, "", `{"userId":null,` + defaults + `}`},
		{"too large", `{"other":"` + large + `","userId":"u","url":"` + big + `","referrer":"é` + big + `","timeZone":"T","startTime":5}`, "u", big[:maxText],
			`{"userId":"u","url":"` + fields + `","referrer":"é` + fields[2:] + `","timeZone":"T","startTime":5,` + viewport + `}`},
		{"a large member that is no text", `{"viewport":{"w":"` + large + `"}}`, any, "", `{` + defaults + `}`},
		{"too deep", `{"other":` + deep + `,"userId":` + deep[900:1100] + `}`, deep[900:1100], "", `{"userId":` + deep[900:1100] + `,` + defaults + `}`},
		{"deep", `{"other":` + deep[502:1498] + `}`, any, "", `{"other":` + deep[502:1498] + `,` + defaults + `}`},
		{"just not too large", `{"x":"` + large[8:] + `"}`, any, "", `{"x":"` + large[8:] + `",` + defaults + `}`},
		{"a huge user", `{"userId":"` + huge + `"}`, huge[:maxText], "", any},
		{"a huge member", `{"big":"` + huge + `"}`, any, "", any},
		{"odd values", `{"userId":"\u0000\ud800","viewport":null,"startTime":1e400,"timeZone":{"deep":[[[[]]]]}}`, any, "", any},
		{"odd keys", `{"__proto__":{"a":1},"constructor":1,"":2}`, any, "", any},
		{"deeper than any limit", `{"userId":` + deeper + `,"viewport":` + deeper + `}`, any, "", any},
	} {
		c := s.dialTracker()
		c.sendRaw(`{"type":"session_start","data":` + tt.data + `}`)
		id := c.expect("session_assigned").Data.SessionID
		c.record(1, 1)
		var row []string
		text := querySQL[string](t, s.database, "select jsonb_build_array(user_id, url, metadata::text) from sessions where session_id = $1", id)
		json.Unmarshal([]byte(text), &row)
		for i, want := range []string{tt.user, tt.url, tt.metadata} {
			if want != any && row[i] != want || want == any && (row[i] == "" || len(row[i]) > 70<<10) {
				t.Errorf("%s: got %.300q, want %.300q", tt.name, row[i], want)
			}
		}
	}
}

// Metadata takes room for as long as its session is in memory; a new description
// takes the old one's place.
func TestMetadataTakesRoom(t *testing.T) {
	t.Parallel()
	s := startInside(t, "SESSION_GRACE_PERIOD=0")
	a, b := s.dialTracker(), s.dialTracker()
	for _, step := range []struct {
		c    *testConn
		size int
		all  int64 // then
	}{{a, 4000, 4000}, {a, 8000, 8000}, {b, 6000, 14000}, {a, 1000, 7000}} {
		id := map[*testConn]string{a: "a", b: "b"}[step.c]
		step.c.send("session_start", map[string]string{"sessionId": id, "resume": "", "text": strings.Repeat("x", step.size)})
		step.c.expect("session_ready")
		waitUntil(t, fmt.Sprintf("metadata takes %d bytes", step.all), func() bool {
			used := s.used() // the message gives its own back a little later
			return step.all <= used && used < step.all+3000
		})
	}
	b.Close()
	a.Close()
	s.nothingLeft()
}

// ---- what a tracker sends ----

// An ack comes when its batch is committed, not before; one may stand for many.
func TestAckAfterCommit(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	tracker.record(1, 1)
	letGo := holdSQL(t, s.database, "lock table session_events in exclusive mode")
	for seq := 2; seq <= 6; seq++ {
		tracker.sendRaw(numberedBatch(seq, 1))
	}
	tracker.sendRaw(numberedBatch(4, 1)) // accepted before, not committed
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
	_, passed := tracker.expectAfter("error")
	for _, m := range passed {
		if m.Type == "events_ack" && m.Data.Seq != 1 {
			t.Errorf("got %s before the commit", m)
		}
	}
	letGo()
	tracker.acked(6)
	if n := querySQL[int](t, s.database, "select event_count from sessions"); n != 6 {
		t.Errorf("%d events are stored, want 6", n)
	}
}

func TestSessionEnd(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	viewer := s.viewer()
	for i, data := range []string{`{"sessionId":"s0"}`, `{}`, `null`, `{"sessionId":""}`, `{"sessionId":5}`} {
		id := fmt.Sprintf("s%d", i)
		tracker := s.recording(id)
		tracker.record(1, 1)
		tracker.send("session_end", `{"sessionId":"another"}`)
		tracker.record(2, 1)
		tracker.send("session_end", data)
		if got := viewer.expect("session_ended").Data.SessionID; got != id {
			t.Errorf("session_end %s: session %s ended, want %s", data, got, id)
		}
		tracker.sendRaw(batchOf(3, nil))
		tracker.wantError("no_session")
		waitUntil(t, "it is stored as ended", func() bool {
			return querySQL[bool](t, s.database, "select not is_active and ended_at is not null from sessions where session_id = $1", id)
		})
	}
}

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
		{"javascript_error", `{"message":"` + large + `","other":"` + large + `"}`, `{"message":"` + large[:4096] + `","sessionId":"s"}`,
			`{"message":"` + large[:4096] + `"}`},
		{"javascript_error", `{"message":"m","other":` + deep + `,"stack":` + deep + `}`, `{"message":"m","sessionId":"s"}`, `{"message":"m"}`},
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
	for _, refused := range []struct{ code, message string }{
		{"invalid_message", `javascript_error "no object"`}, {"too_large", `visibility_change {"a":"` + large + `"}`},
		{"invalid_message", `visibility_change`}, {"invalid_message", `visibility_change null`}, {"invalid_message", `visibility_change []`},
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
	waitUntil(t, "all are listed", func() bool { s.getJSON("/sessions/s/errors", &got); return len(got.Errors) == len(tests) })
	for i, tt := range tests {
		wantKeys(t, "an error", got.Errors[i], "id kind data createdAt")
		if tt.stored == "" {
			var compact bytes.Buffer
			json.Compact(&compact, []byte(tt.data))
			tt.stored = compact.String() // REST leaves out the white space
		}
		if e := got.Errors[i]; string(e["id"]) != fmt.Sprint(i) || string(e["kind"]) != `"`+tt.kind+`"` || string(e["data"]) != tt.stored {
			t.Errorf("error %d: got %s %s %.200s, want %s %.200s", i, e["id"], e["kind"], e["data"], tt.kind, tt.stored)
		}
	}
}

// ---- viewers ----

// At whatever moment a viewer joins, its first live batch begins where the
// answer to the join said.
func TestJoinAtAnyMoment(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tr := newTracker(t, "s")
	tr.perBatch, tr.pause, tr.window = 3, 0, 100
	tr.start(s.ws("tracker"))
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for range 15 {
				v := joinLive(t, s, "s")
				for i, event := range v.until(v.from + 20) {
					if want := testEvent("s", v.from+i); !bytes.Equal(event, want) {
						t.Errorf("joined at %d: event %d is %.100s", v.from, v.from+i, event)
					}
				}
				v.Close()
			}
		})
	}
	readers.Wait()
	tr.finish()
}

func TestSessionEvents(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	for i := range 25 {
		tracker.record(i+1, 100)
	}
	viewer := s.viewer()
	for _, tt := range []struct{ ask, want, first string }{
		{`{"sessionId":"s"}`, "page s 0+1000 of 2500 more true active true", `{"seq":1,"n":0}`},
		{`{"sessionId":"s","fromIndex":0,"limit":0}`, "page s 0+1000 of 2500 more true active true", `{"seq":1,"n":0}`},
		{`{"sessionId":"s","fromIndex":1999,"limit":100000}`, "page s 1999+501 of 2500 more false active true", `{"seq":20,"n":99}`},
		{`{"sessionId":"s","fromIndex":3,"limit":5}`, "page s 3+5 of 2500 more true active true", `{"seq":1,"n":3}`},
		{`{"sessionId":"s","fromIndex":2499,"limit":1}`, "page s 2499+1 of 2500 more false active true", `{"seq":25,"n":99}`},
		{`{"sessionId":"s","fromIndex":2500}`, "page s 2500+0 of 2500 more false active true", ""},
		{`{"sessionId":"s","fromIndex":9223372036854775807}`, "page s 9223372036854775807+0 of 2500 more false active true", ""},
		{`{"sessionId":"s","fromIndex":null,"limit":null}`, "page s 0+1000 of 2500 more true active true", `{"seq":1,"n":0}`},
		{`{"sessionId":"s","fromIndex":-1}`, "error invalid_message", ""},
		{`{"sessionId":"s","fromIndex":1.5}`, "error invalid_message", ""},
		{`{"sessionId":"s","fromIndex":"1"}`, "error invalid_message", ""},
		{`{"sessionId":"s","limit":-1}`, "error invalid_message", ""},
		{`{"sessionId":"s","fromIndex":9223372036854775808}`, "error invalid_message", ""},
		{`[]`, "error invalid_message", ""},
		{`{"sessionId":["s"]}`, "error invalid_message", ""},
		{`{"sessionId":"nobody"}`, "error not_found", ""},
	} {
		viewer.send("get_session_events", tt.ask)
		m := viewer.expect("session_events", "error")
		if got := heard(m); got != tt.want || tt.first != "" && string(m.Data.Events[0]) != tt.first {
			t.Errorf("%s: got %s, want %s from %s on", tt.ask, got, tt.want, tt.first)
		}
	}
	tracker.send("session_end", `{}`)
	waitUntil(t, "it has left memory", func() bool { return s.memory().sessions == 0 })
	viewer.send("get_session_events", `{"sessionId":"s","limit":1}`)
	if got := heard(viewer.expect("session_events")); got != "page s 0+1 of 2500 more true active false" {
		t.Errorf("an ended session: got %s", got)
	}
}

// A page of large events is cut short; hasMore and count tell.
func TestLargePage(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	var events []json.RawMessage
	for i := range 5 {
		events = append(events, json.RawMessage(fmt.Sprintf(`{"n":%d,"text":"%s"}`, i, strings.Repeat("x", 1200<<10))))
	}
	tracker.sendRaw(batchOf(1, events))
	tracker.acked(1)
	viewer := s.viewer()
	viewer.send("get_session_events", `{"sessionId":"s"}`)
	if m := viewer.expect("session_events"); len(m.Data.Events) != 4 || !m.Data.HasMore {
		t.Errorf("got %d events of 1.2 MB, hasMore %v, want 4", len(m.Data.Events), m.Data.HasMore)
	}
	sameEvents(t, "pages", pagesOf(t, s, "s", 1000), events)
	sameEvents(t, "chunks", s.chunkEvents("s"), events)
}

// A viewer that stops reading is told so when it reads again; nobody else
// notices.
func TestViewerLags(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	tracker := s.recording("s")
	slow, fast := joinLive(t, s, "s"), joinLive(t, s, "s")
	n := 0
	for ; s.metric("viewers_lagged_total") == 0; n++ {
		tracker.sendRaw(largeBatch(n+1, 50000))
		fast.until(fast.from + 1)
		fast.from++
	}
	at := 0
	for m := slow.expect("events_batch", "session_lagged"); m.Type != "session_lagged"; m = slow.expect("events_batch", "session_lagged") {
		if m.Data.FromIndex != at {
			t.Fatalf("live batch at %d, want %d", m.Data.FromIndex, at)
		}
		at++
	}
	tracker.sendRaw(largeBatch(n+1, 10))
	if m := slow.expect("events_batch"); at == 0 || at >= n || m.Data.FromIndex != n {
		t.Errorf("it lagged after %d events, and went on at %d, want %d", at, m.Data.FromIndex, n)
	}
}

// Viewers watch what is in memory also while there is no room left and PostgreSQL
// does not answer; a tracker that waits for room, or for the database, answers no
// ping, because nobody reads it, and is not cut for that.
func TestWithoutRoom(t *testing.T) {
	t.Parallel()
	database := testDatabase(t)
	proxy, through := proxyToDatabase(t, database, nil)
	s := startInside(t, "DATABASE_URL="+through, "HEARTBEAT_INTERVAL=100", "SESSION_GRACE_PERIOD=0", "MAX_BUFFER_BYTES=1048576", "MAX_MESSAGE_BYTES=500000")
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
	for range 10 {
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

// pinged reads on until a ping has come, and answers it.
func (c *testConn) pinged() {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	for {
		head, payload, err := readFrame(c.in, nil)
		if err != nil {
			c.t.Fatalf("waiting for a ping: %v", err)
		}
		if head&0x0f == 9 {
			c.Write(maskedFrame(0x8a, payload))
			return
		}
	}
}

// ---- bad input ----

// What is refused gets an error with a code; the connection stays, and so does
// all that was sent before and after.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	const message, events, forbidden = "invalid_message", "invalid_events", "forbidden"
	tests := []struct {
		viewer, tracker string
		messages        []string
	}{
		{message, message, []string{``, `{`, `[]`, `"session_start"`, `null`, `{}`, `{"type":5}`, `{"type":null}`, `{"type":"heartbeat"}{}`,
			"\ufeff{\"type\":\"heartbeat\"}", "{\"type\":\"heartbeat\",\"data\":\"\xff\"}", "{\"type\":\"heartbeat\",\"data\":\"\xed\xa0\x80\"}",
			"{\"type\":\"heartbeat\",\"data\":\"\xc0\xaf\"}"}},
		{"unknown_type", "unknown_type", []string{`{"type":""}`, `{"type":"Heartbeat"}`, `{"type":"session_started"}`, `{"type":"__proto__"}`,
			`{"type":"heartbeat\u0000"}`}},
		{forbidden, events, []string{`events_batch`, `events_batch null`, `events_batch []`, `events_batch {}`, `events_batch {"events":null}`,
			`events_batch {"events":{"length":1}}`, `events_batch {"events":"[]"}`, `events_batch {"events":[{},1]}`,
			`events_batch {"events":[null]}`, `events_batch {"events":[[]]}`}},
		{forbidden, message, []string{`javascript_error 5`, `promise_rejection`, `visibility_change`}},
		{forbidden, "", []string{`error`, `session_end {"sessionId":"other"}`, `session_start {"sessionId":"s"}`}},
		{"", forbidden, []string{`get_active_sessions`, `viewer_join_session {"sessionId":"s"}`, `viewer_leave_session {"sessionId":"s"}`,
			`get_session_events {"sessionId":"s"}`}},
		{message, forbidden, []string{`viewer_join_session`, `viewer_join_session "s"`, `viewer_leave_session 5`}},
		{"not_found", forbidden, []string{`viewer_join_session {"sessionId":"s\u0000"}`, `get_session_events {"sessionId":"' or 1=1 --"}`}},
	}
	for _, seq := range []string{"0", "-1", "1.5", "9007199254740993", "9223372036854775808", "18446744073709551617", "1e400", `"1"`, "true", "[4]", "{}", "null"} {
		tests[3].messages = append(tests[3].messages, `events_batch {"events":[{}],"seq":`+seq+`}`)
	}
	tracker, viewer := s.recording("s"), s.watching("s")
	seq := 0
	for _, tt := range tests {
		for _, text := range tt.messages {
			if seq++; !strings.HasPrefix(text, `"`) && !strings.HasPrefix(text, `[`) && text != "null" && !strings.HasPrefix(text, "\ufeff") {
				text = spoken(text)
			}
			tracker.record(seq, 1)
			tracker.sendRaw(text)
			viewer.sendRaw(text)
			if tt.tracker != "" {
				tracker.wantError(tt.tracker)
			}
			if tt.viewer != "" {
				viewer.wantError(tt.viewer)
			}
		}
	}
	for _, c := range []*testConn{tracker, viewer} {
		c.write(string(maskedFrame(0x82, []byte(`{"type":"heartbeat"}`)))) // not a text
		c.wantError(message)
	}
	tracker.record(seq+1, 1)
	fresh := s.dialTracker() // before a session has begun
	for _, text := range []string{batchOf(1, nil), spoken("error"), spoken("javascript_error {}"), spoken("visibility_change {}"), spoken("session_end")} {
		fresh.sendRaw(text)
		fresh.wantError("no_session")
	}
	if got := querySQL[string](t, s.database, "select count(*) || ' ' || sum(event_count) from sessions"); got != fmt.Sprint("1 ", seq+1) {
		t.Errorf("got %s sessions and events, want 1 %d", got, seq+1)
	}
}

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
	go viewer.sendRaw(`{"type":"heartbeat","data":"` + strings.Repeat("x", maxViewerMessage) + `"}`) // ends with the connection
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
	if limit := int64(buffer + buffer/2 + trackers*count*eventCost + 200000); most > limit {
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
	for _, start := range []string{string(announce(1e9)), string(announce(100)) + "half of it", "\x01\x80\x00\x00\x00\x00"} {
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
	waitUntil(t, "the living records", func() bool { return querySQL[int](t, s.database, "select max(last_seq) from sessions") == 1 })
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
