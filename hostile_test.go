package main

// What hostile and broken peers send. The cases are files in testdata/hostile,
// whose README.md says how they are written.

import (
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"testing"
)

// After each case the server is healthy, an innocent tracker that records beside
// it has lost nothing, and no connection, goroutine or room in memory is left
// over; and the same when all of them come at once. It does not run beside other
// tests, whose goroutines it would count.
func TestHostile(t *testing.T) {
	var slow, others []testCase // slow ones wait until the server's patience ends
	for _, hc := range readCases(t, "hostile", 60) {
		if strings.HasPrefix(hc.name, "slow-") {
			slow = append(slow, hc)
		} else {
			others = append(others, hc)
		}
	}
	t.Run("slow", func(t *testing.T) { playHostile(t, nil, slow, "MESSAGE_TIMEOUT=3000", "READ_HEADER_TIMEOUT=3000") })
	t.Run("others", func(t *testing.T) { playHostile(t, others, others) })
}

// playHostile plays cases one after the other, then cases together.
func playHostile(t *testing.T, alone, together []testCase, env ...string) {
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
	playOne := func(t *testing.T, text string) {
		for _, c := range s.play(t, text).conns {
			c.Close()
		}
	}
	check(t)
	for _, hc := range alone {
		t.Run(hc.name, func(t *testing.T) {
			playOne(t, hc.text)
			check(t)
		})
	}
	t.Run("all at once", func(t *testing.T) {
		t.Run("together", func(t *testing.T) {
			for _, hc := range together {
				t.Run(hc.name, func(t *testing.T) {
					t.Parallel()
					playOne(t, hc.text)
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
	waitUntil(t, "no connection is left", func() bool { return s.stat("totalClients") == 0 })
	waitUntil(t, "all room is given back", func() bool { return s.used() == 0 })
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
	s.waitHealthy()
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
