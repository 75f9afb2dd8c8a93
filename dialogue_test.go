package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"nhooyr.io/websocket"
)

// dialogue is what some connections say and hear, line by line; the cases and
// their notation are in testdata/dialogues.
type dialogue struct {
	t     testing.TB
	s     *testServer
	conns map[string]*testConn
	words map[string]string
	letGo func()
}

// messageFields are the fields of each message's data.
var messageFields = map[string]string{
	"active_sessions": "sessions", "session_started": "sessionId userId metadata", "session_ended": "sessionId",
	"session_joined": "sessionId events metadata totalEvents isActive snapshotIndex state",
	"events_batch":   "sessionId events fromIndex",
	"session_events": "sessionId events fromIndex totalEvents hasMore isActive", "session_lagged": "sessionId nextIndex",
	"session_assigned": "sessionId", "session_ready": "sessionId resume lastSeq accepted", "events_ack": "sessionId seq",
	"take_snapshot": "sessionId", "session_state": "sessionId state",
}

var dialogueWord = regexp.MustCompile(`\$\w+`)

func (s *testServer) dialogue(t testing.TB, text string) {
	t.Helper()
	d := &dialogue{t, s, map[string]*testConn{}, map[string]string{}, nil}
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' || strings.HasPrefix(line, "set ") {
			continue
		}
		line = dialogueWord.ReplaceAllStringFunc(line, func(word string) string { return cmp.Or(d.words[word], word) })
		subject, rest, _ := strings.Cut(line, " ")
		verb, object, _ := strings.Cut(rest, " ")
		switch {
		case subject == "db":
			waitUntil(t, line, func() bool { return querySQL[string](t, s.database, "select ("+object+")::text") == verb })
		case subject == "sql":
			execSQL(t, s.database, rest)
		case subject == "hold":
			d.letGo = holdSQL(t, s.database, rest)
		case subject == "release":
			d.letGo()
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
		defer c.Close() // not before all are heard: viewers are told when a tracker has left
		c.sendRaw(`{"type":"the_end"}`)
		if m, err := c.receive(); err == nil && m.Data.Code != "unknown_type" && m.Type != "take_snapshot" &&
			m.Type != "events_ack" {
			t.Errorf("at the end %s hears %s, want nothing", name, m)
		}
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
	case object == "" || strings.ContainsAny(object[:1], `{["`) || object == "null":
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
	want, only := strings.CutPrefix(want, "only ")
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
		if m.Type != "take_snapshot" && m.Type != "events_ack" || only && m.Data.Seq > 1 {
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
	case "session_state":
		return "state " + d.SessionID + " " + m.str("state")
	case "error":
		return strings.TrimSpace("error " + d.Code + " " + m.raw("expected"))
	}
	return strings.TrimSpace(m.Type + " " + d.SessionID)
}

func TestDialogues(t *testing.T) {
	files, _ := filepath.Glob("testdata/dialogues/*.txt")
	if len(files) < 15 {
		t.Fatalf("there are %d dialogues", len(files))
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			_, rest, _ := strings.Cut(string(text), "\nset ")
			settings, _, _ := strings.Cut(rest, "\n")
			startInside(t, strings.Fields(settings)...).dialogue(t, string(text))
		})
	}
}
