package main

// What hostile and broken peers send. The cases are files in testdata/hostile,
// whose README.md says how they are written.

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"nhooyr.io/websocket"
)

// closeCode reads on until the server closes; -1 when it ends the connection
// without a close frame.
func (c *testConn) closeCode() int {
	c.t.Helper()
	for {
		_, err := c.receive()
		var closed websocket.CloseError
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			c.t.Fatal("the server does not close")
		case errors.As(err, &closed):
			return int(closed.Code)
		default:
			return -1
		}
	}
}

// hostileCase is a file: what to send, and what has to come.
type hostileCase struct {
	name  string
	steps []hostileStep
}

type hostileStep struct {
	line int
	verb string
	args []string
	data []byte
}

// readHostile reads the cases.
func readHostile(t testing.TB) (cases []hostileCase) {
	t.Helper()
	files, _ := filepath.Glob("testdata/hostile/*.txt")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		c := hostileCase{name: strings.TrimSuffix(filepath.Base(file), ".txt")}
		for i, line := range strings.Split(string(text), "\n") {
			if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
				continue
			}
			step, err := parseHostile(line)
			if err != nil {
				t.Fatalf("%s:%d: %v", file, i+1, err)
			}
			step.line = i + 1
			c.steps = append(c.steps, step)
		}
		cases = append(cases, c)
	}
	return cases
}

// parseHostile reads a line: a verb, words, and strings in Go's syntax, each of
// which may be repeated ("…" * 3); the strings together are the step's data.
func parseHostile(line string) (step hostileStep, err error) {
	step.verb, line, _ = strings.Cut(line, " ")
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		quoted, err := strconv.QuotedPrefix(line)
		if err != nil {
			word, rest, _ := strings.Cut(line, " ")
			step.args, line = append(step.args, word), rest
			continue
		}
		line = strings.TrimSpace(line[len(quoted):])
		text, err := strconv.Unquote(quoted)
		if err != nil {
			return step, err
		}
		times := 1
		if rest, ok := strings.CutPrefix(line, "*"); ok {
			number, rest, _ := strings.Cut(strings.TrimSpace(rest), " ")
			if times, err = strconv.Atoi(number); err != nil {
				return step, err
			}
			line = rest
		}
		step.data = append(step.data, strings.Repeat(text, times)...)
	}
	return step, nil
}

// play sends a case to the server and checks what comes.
func (hc hostileCase) play(t testing.TB, s *testServer) {
	var c *testConn
	var all []*testConn
	for _, step := range hc.steps {
		arg := ""
		if len(step.args) > 0 {
			arg = step.args[0]
		}
		switch step.verb {
		case "connect":
			if arg == "tcp" {
				c = rawTCP(t, s)
			} else {
				c = rawWebSocket(t, s, arg)
			}
			all = append(all, c)
		case "text":
			c.write(string(maskedText(step.data)))
		case "frame":
			head, err := strconv.ParseUint(arg, 0, 8)
			if err != nil {
				t.Fatalf("line %d: %v", step.line, err)
			}
			c.write(string(maskedFrame(byte(head), step.data)))
		case "raw":
			c.write(string(step.data))
		case "expect":
			if got := c.answers(step.args); got != "" {
				t.Errorf("line %d: want %s, got %s", step.line, strings.Join(step.args, " "), got)
			}
		default:
			t.Fatalf("line %d: unknown verb %q", step.line, step.verb)
		}
	}
	for _, c := range all {
		c.Close()
	}
}

// answers checks what the server does, and says what else it did.
func (c *testConn) answers(want []string) string {
	switch want[0] {
	case "status":
		if got := strconv.Itoa(c.status()); got != want[1] {
			return "status " + got
		}
	case "close":
		if code := c.closeCode(); strconv.Itoa(code) != want[1] {
			return fmt.Sprintf("close code %d", code)
		}
	case "end":
		c.closeCode()
	case "alive":
		c.write(string(maskedFrame(0x89, []byte("are you there"))))
		return c.await(func(op byte, payload []byte) bool { return op == 10 && string(payload) == "are you there" })
	case "error", "message":
		return c.await(func(op byte, payload []byte) bool {
			m, err := parseMessage(payload)
			return op == 1 && err == nil && (m.Type == want[1] || m.Type == want[0] && m.Data.Code == want[1])
		})
	default:
		return "an expectation that nobody understands"
	}
	return ""
}

// await reads on until a frame fits; otherwise it says what came instead.
func (c *testConn) await(fits func(op byte, payload []byte) bool) string {
	var passed []string
	c.SetReadDeadline(time.Now().Add(patience))
	for {
		head, payload, err := readFrame(c.in, nil)
		op := head & 0x0f
		if err != nil {
			return fmt.Sprintf("%v after %.500v", err, passed)
		}
		if fits(op, payload) {
			return ""
		}
		if op == 8 {
			return fmt.Sprintf("a close frame %q after %.500v", payload, passed)
		}
		passed = append(passed, fmt.Sprintf("%d %.100q", op, payload))
	}
}

// After each case the server is healthy, an innocent tracker that records beside
// it has lost nothing, and no connection, goroutine or room in memory is left
// over; and the same when all of them come at once. It does not run beside other
// tests, whose goroutines it would count.
func TestHostile(t *testing.T) {
	cases := readHostile(t)
	if len(cases) < 60 {
		t.Errorf("the corpus has %d cases, want 60 at least", len(cases))
	}
	var slow, others []hostileCase // slow ones wait until the server's patience ends
	for _, hc := range cases {
		if strings.HasPrefix(hc.name, "slow-") {
			slow = append(slow, hc)
		} else {
			others = append(others, hc)
		}
	}
	t.Run("slow", func(t *testing.T) { playHostile(t, slow, "MESSAGE_TIMEOUT=400", "READ_HEADER_TIMEOUT=400") })
	t.Run("others", func(t *testing.T) { playHostile(t, others) })
}

func playHostile(t *testing.T, cases []hostileCase, env ...string) {
	s := startInside(t, append(env, "MAX_MESSAGE_BYTES=2000000", "SESSION_GRACE_PERIOD=0",
		"MAX_SESSIONS_PER_MINUTE=100000", "BATCH_INTERVAL=5")...)
	innocent := s.recording("innocent")
	recorded := 0
	check := func(t *testing.T) {
		t.Helper()
		innocent.t = t
		recorded++
		innocent.record(recorded, 2)
		s.calm(t)
	}
	check(t)
	for _, hc := range cases {
		t.Run(hc.name, func(t *testing.T) {
			hc.play(t, s)
			check(t)
		})
	}
	t.Run("all at once", func(t *testing.T) {
		t.Run("together", func(t *testing.T) {
			for _, hc := range cases {
				t.Run(hc.name, func(t *testing.T) {
					t.Parallel()
					hc.play(t, s)
				})
			}
		})
		check(t)
	})
	sameEvents(t, "the innocent session", s.restEvents("innocent", 10), innocentEvents(recorded))
	innocent.t = t
	innocent.send("session_end", `{}`)
	waitUntil(t, "it has ended", func() bool { return s.memory().sessions == 0 })
	innocent.Close()
	s.nothingLeft()
	if n := querySQL[int](t, s.database, `select count(*) from sessions
		where session_id !~ '^[A-Za-z0-9_.:-]{1,128}$' or user_id ~ '[[:cntrl:]]'`); n != 0 {
		t.Errorf("%d sessions have an id or a user that is not sane", n)
	}
}

func innocentEvents(batches int) (events []json.RawMessage) {
	for seq := range batches {
		for n := range 2 {
			events = append(events, json.RawMessage(fmt.Sprintf(`{"seq":%d,"n":%d}`, seq+1, n)))
		}
	}
	return events
}

// calm waits until the server is healthy and has the innocent connection only,
// with one goroutine that reads it.
func (s *testServer) calm(t *testing.T) {
	t.Helper()
	if status, body := s.get("/health"); status != http.StatusOK {
		t.Fatalf("/health: status %d %s", status, body)
	}
	waitUntil(t, "no connection is left over", func() bool { return s.stat("totalClients") == 1 })
	waitUntil(t, "no session is left over", func() bool { return s.memory().sessions == 1 })
	waitUntil(t, "the only goroutine of a connection is the innocent's", func() bool {
		http.DefaultClient.CloseIdleConnections()
		return connectionGoroutines() == 1
	})
}

// connectionGoroutines counts the server's goroutines that serve connections.
func connectionGoroutines() (n int) {
	buf := make([]byte, 1<<20)
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, "session-replay.(*conn).") || strings.Contains(stack, "net/http.(*conn).serve(") {
			n++
		}
	}
	return n
}
