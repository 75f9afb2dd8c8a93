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
// their notation are in testdata/dialogues and testdata/hostile.
type dialogue struct {
	t      testing.TB
	s      *testServer
	conns  map[string]*testConn
	peer   *testConn // the newest that "connect" has made
	words  map[string]string
	tokens []string // of the sessions
	told   []string // to viewers
	letGo  func()
}

// messages are the fields of each message's data, and how it is written here: a
// %field's value, or the length of the list that it is.
var messages = map[string]struct{ fields, brief string }{
	"active_sessions":  {"sessions", ""},
	"session_started":  {"sessionId userId metadata", "started %sessionId"},
	"session_ended":    {"sessionId", "ended %sessionId"},
	"session_assigned": {"sessionId", "assigned %sessionId"},
	"session_ready":    {"sessionId resume lastSeq accepted", "ready %sessionId %lastSeq %resume"},
	"events_ack":       {"sessionId seq", "ack %sessionId %seq"},
	"session_joined": {"sessionId events metadata totalEvents isActive snapshotIndex state",
		"joined %sessionId %totalEvents %isActive %snapshotIndex"},
	"events_batch": {"sessionId events fromIndex", "live %sessionId %fromIndex+%events"},
	"session_events": {"sessionId events fromIndex totalEvents hasMore isActive",
		"page %sessionId %fromIndex+%events of %totalEvents more %hasMore active %isActive"},
	"session_lagged": {"sessionId nextIndex", "lagged %sessionId %nextIndex"},
	"session_state":  {"sessionId state", "state %sessionId %state"},
	"take_snapshot":  {"sessionId", "take_snapshot %sessionId"},
	"error":          {"code message", "error %code %expected"},
}

var (
	dialogueField = regexp.MustCompile(`%\w+`)
	dialogueWord  = regexp.MustCompile(`\$\w+`)
	dialogueTimes = regexp.MustCompile(`\$\{(.+?)\*(\d+)\}`)
)

// testCase is a file of testdata.
type testCase struct{ name, text string }

func readCases(t testing.TB, dir string, atLeast int) (cases []testCase) {
	t.Helper()
	files, _ := filepath.Glob("testdata/" + dir + "/*.txt")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		cases = append(cases, testCase{strings.TrimSuffix(filepath.Base(file), ".txt"), string(text)})
	}
	if len(cases) < atLeast {
		t.Fatalf("testdata/%s has %d cases, want %d at least", dir, len(cases), atLeast)
	}
	return cases
}

func (s *testServer) play(t testing.TB, text string) *dialogue {
	t.Helper()
	d := &dialogue{t: t, s: s, conns: map[string]*testConn{}, words: map[string]string{}}
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' && !strings.HasPrefix(line, "set ") {
			d.line(line)
		}
	}
	return d
}

func (d *dialogue) line(line string) {
	d.t.Helper()
	brief := fmt.Sprintf("%.300s", line)
	line = dialogueWord.ReplaceAllStringFunc(line, func(word string) string { return cmp.Or(d.words[word], word) })
	line = dialogueTimes.ReplaceAllStringFunc(line, func(word string) string {
		part := dialogueTimes.FindStringSubmatch(word)
		times, _ := strconv.Atoi(part[2])
		return strings.Repeat(part[1], times)
	})
	subject, rest, _ := strings.Cut(line, " ")
	verb, object, _ := strings.Cut(rest, " ")
	times, _ := strconv.Atoi(subject)
	switch {
	case times > 0:
		for range times {
			d.line(object)
		}
	case d.asked(subject, verb, object, rest, brief), d.hostile(subject, verb, object, rest):
	case verb == ">":
		d.conn(subject).sendRaw(spoken(object))
	case verb == "<":
		d.hear(subject, brief, object)
	case verb == "leaves":
		c := d.conn(subject)
		c.Close()
		c.over = true
	case verb == "closed":
		code, _ := strconv.Atoi(object)
		d.conn(subject).expectClose(websocket.StatusCode(code))
	default:
		d.t.Fatalf("nobody understands %q", brief)
	}
}

// asked does a line that asks the database or the server; it is false for others.
func (d *dialogue) asked(subject, verb, object, rest, brief string) bool {
	d.t.Helper()
	got := func() string { return "" }
	switch subject {
	case "db":
		got = func() string { return querySQL[string](d.t, d.s.database, "select ("+object+")::text") }
	case "memory":
		got = func() string { return strconv.Itoa(d.s.memory().sessions) }
	case "trackers":
		got = func() string { return fmt.Sprint(d.s.stat("trackers")) }
	case "logged":
		got = func() string { return strconv.Itoa(strings.Count(d.s.output.String(), object)) }
	case "GET", "DELETE":
		path, status, part := verb, object[:3], strings.TrimSpace(object[3:])
		verb, got = "true", func() string {
			code, body := d.s.request(subject, path)
			return fmt.Sprint(strconv.Itoa(code) == status && strings.Contains(string(body), part))
		}
	case "sql":
		execSQL(d.t, d.s.database, rest)
		return true
	case "hold":
		d.letGo = holdSQL(d.t, d.s.database, rest)
		return true
	case "release":
		d.letGo()
		return true
	default:
		return false
	}
	waitUntil(d.t, brief, func() bool { return got() == verb })
	return true
}

// hostile does a line of testdata/hostile; it is false for others.
func (d *dialogue) hostile(subject, verb, object, rest string) bool {
	d.t.Helper()
	switch subject {
	case "connect":
		if d.peer = nil; verb == "tcp" {
			d.peer = rawTCP(d.t, d.s)
		} else {
			d.peer = dialServer(d.t, d.s.ws(verb))
		}
		d.conns[fmt.Sprint(len(d.conns))] = d.peer
	case "text":
		d.peer.Write(maskedText(unquoted(d.t, rest)))
	case "frame":
		head, _ := strconv.ParseUint(verb, 0, 8)
		d.peer.Write(maskedFrame(byte(head), unquoted(d.t, object)))
	case "raw":
		d.peer.Write(unquoted(d.t, rest))
	case "expect":
		if got := d.peer.answers(verb, object); got != object {
			d.t.Errorf("want %s, got %s", rest, got)
		}
	default:
		return false
	}
	return true
}

// unquoted joins strings in Go's syntax, each of which may be repeated ("…" * 3).
func unquoted(t testing.TB, text string) (all []byte) {
	t.Helper()
	for text = strings.TrimSpace(text); text != ""; text = strings.TrimSpace(text) {
		quoted, err := strconv.QuotedPrefix(text)
		if err != nil {
			t.Fatalf("%.100s: %v", text, err)
		}
		one, _ := strconv.Unquote(quoted)
		text = strings.TrimSpace(text[len(quoted):])
		times := 1
		if rest, ok := strings.CutPrefix(text, "*"); ok {
			number, rest, _ := strings.Cut(strings.TrimSpace(rest), " ")
			if times, err = strconv.Atoi(number); err != nil {
				t.Fatal(err)
			}
			text = rest
		}
		all = append(all, strings.Repeat(one, times)...)
	}
	return all
}

// answers reads on until what is wanted has come, and says what it was.
func (c *testConn) answers(what, want string) string {
	c.t.Helper()
	switch what {
	case "status":
		return strconv.Itoa(c.status())
	case "close":
		return strconv.Itoa(int(c.ended().Code))
	case "end":
		c.ended()
	case "alive":
		c.Write(maskedFrame(0x89, []byte("are you there")))
		for string(c.frame(10)) != "are you there" {
		}
	case "message":
		c.expect(want)
	case "error":
		for c.expect("error").Data.Code != want {
		}
	default:
		return "an expectation that nobody understands"
	}
	return want
}

// conclude checks that nothing was said that the dialogue does not have, and that
// nobody was told a token.
func (d *dialogue) conclude() {
	d.t.Helper()
	for name, c := range d.conns {
		defer c.Close() // not before all are heard: viewers are told when a tracker has left
		c.sendRaw(`{"type":"the_end"}`)
		m, err := c.receive()
		switch {
		case err != nil && !c.over:
			d.t.Errorf("at the end %s has no connection: %v", name, err)
		case err == nil && m.Data.Code != "unknown_type" && m.Type != "take_snapshot" && m.Type != "events_ack":
			d.t.Errorf("at the end %s hears %s, want nothing", name, m)
		}
	}
	_, lists := d.s.get("/sessions?limit=1000")
	rows := querySQL[string](d.t, d.s.database, "select coalesce(string_agg(sessions::text, ' '), '') from sessions")
	for _, text := range append(d.told, string(lists), rows, d.s.output.String()) {
		if slices.ContainsFunc(d.tokens, func(token string) bool { return strings.Contains(text, token) }) {
			d.t.Errorf("the token is told: %.1000s", text)
		}
	}
}

func (d *dialogue) conn(name string) *testConn {
	if c := d.conns[name]; c != nil {
		return c
	}
	connect := d.s.dialTracker
	if name[0] == 'v' {
		connect = d.s.viewer
	}
	d.conns[name] = connect()
	return d.conns[name]
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

func (d *dialogue) hear(name, line, want string) {
	d.t.Helper()
	c := d.conn(name)
	want, only := strings.CutPrefix(want, "only ")
	for {
		m, err := c.receive()
		if err != nil {
			d.t.Fatalf("%s: %v", line, err)
		}
		d.note(name, m)
		got := heard(m)
		if m.text == want || d.same(strings.Fields(got), strings.Fields(want)) {
			return
		}
		if m.Type != "take_snapshot" && m.Type != "events_ack" || only && m.Data.Seq > 1 {
			if want[0] == '{' {
				got = m.String()
			}
			d.t.Fatalf("%s: got %s", line, got)
		}
	}
}

// note checks a message's fields, and remembers what nobody or only somebody may
// be told.
func (d *dialogue) note(name string, m testMessage) {
	d.t.Helper()
	fields := messages[m.Type].fields
	if m.Data.Code == "sequence_gap" {
		fields += " expected"
	}
	if fields != "" {
		m.wantFields(d.t, fields)
	}
	if m.Data.Resume != "" {
		d.tokens = append(d.tokens, m.Data.Resume)
	}
	if name[0] == 'v' {
		d.told = append(d.told, m.text)
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
	if m.Type == "active_sessions" {
		return heardList(m)
	}
	brief := cmp.Or(messages[m.Type].brief, m.Type+" %sessionId")
	fields := m.fields()
	return strings.TrimSpace(dialogueField.ReplaceAllStringFunc(brief, func(name string) string {
		if name == "%events" {
			return strconv.Itoa(len(m.Data.Events))
		}
		return strings.Trim(string(fields[name[1:]]), `"`)
	}))
}

func heardList(m testMessage) string {
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
}

func TestDialogues(t *testing.T) {
	t.Parallel()
	for _, c := range readCases(t, "dialogues", 15) {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, rest, _ := strings.Cut(c.text, "\nset ")
			settings, _, _ := strings.Cut(rest, "\n")
			startInside(t, strings.Fields(settings)...).play(t, c.text).conclude()
		})
	}
}
