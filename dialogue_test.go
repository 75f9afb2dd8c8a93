package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"nhooyr.io/websocket"
)

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
	"session_joined": "sessionId events metadata totalEvents isActive snapshotIndex",
	"events_batch":   "sessionId events fromIndex",
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
		if m, err := c.receive(); err == nil && m.Data.Code != "unknown_type" && m.Type != "take_snapshot" &&
			m.Type != "events_ack" {
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
		return fmt.Sprintf("joined %s %d %v %s %s", d.SessionID, d.TotalEvents, d.IsActive, m.raw("snapshotIndex"),
			m.raw("events"))
	case "events_batch":
		return fmt.Sprintf("live %s %d+%d", d.SessionID, d.FromIndex, len(d.Events))
	case "session_events":
		return fmt.Sprintf("page %s %d+%d of %d more %v active %v", d.SessionID, d.FromIndex, len(d.Events), d.TotalEvents,
			d.HasMore, d.IsActive)
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
			db one:2:f,two:1:t select string_agg(format('%s:%s:%s', session_id, event_count, is_active), ',') from sessions`},
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
		{"extra fields are ignored: a tracker writes to its own session only", "", `
			t1 > session_start {"sessionId":"s","resume":""}
			t1 < ready s 0 $token
			t2 > session_start {"sessionId":"other","resume":""}
			t2 < ready other 0 $other
			v1 > viewer_join_session {"sessionId":"s"}
			v1 < joined s 0 true null []
			v2 > viewer_join_session {"sessionId":"other"}
			v2 < joined other 0 true null []
			t1 > {"data":{"sessionId":"other","fromIndex":9,"events":[ {} , {"n":2}],"seq":1},"more":1,"type":"events_batch"}
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
