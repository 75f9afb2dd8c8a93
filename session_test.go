package main

// Every message of the protocol through a real WebSocket and a real database:
// its exact fields, what it does, and what is refused. Most of it is written as
// dialogues; what needs more is Go.

import (
	"encoding/json"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// wantError reads on until an error comes, and checks its code and its fields.
func (c *testConn) wantError(code string) {
	c.t.Helper()
	m := c.expect("error")
	if m.wantFields(c.t, "code message"); m.Data.Code != code {
		c.t.Errorf("got error %s, want code %s", m, code)
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

// viewer is one that has had the list it gets on connecting.
func (s *testServer) viewer() *testConn {
	s.t.Helper()
	c := dialServer(s.t, s.ws("viewer"))
	c.expect("active_sessions")
	return c
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

// record sends a batch of n events and waits for its ack.
func (c *testConn) record(seq, n int) {
	c.t.Helper()
	c.sendRaw(numberedBatch(seq, n))
	c.acked(seq)
}

func (c *testConn) acked(seq int) {
	c.t.Helper()
	for c.expect("events_ack").Data.Seq < int64(seq) { // of one before, perhaps once more
	}
}

// session is what GET /sessions/{id} says.
func (s *testServer) session(id string) (st struct{ IsActive bool }) {
	s.t.Helper()
	s.getJSON("/sessions/"+id, &st)
	return st
}

// used is the room that is taken of MAX_BUFFER_BYTES.
func (s *testServer) used() int64 { return s.metric("buffer_bytes") }

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
		for _, c := range conns { // nobody waits for another's answer
			c.send("session_start", sessionID{id})
			c.send("no_such_type", nil) // answered when it has started
		}
		winners := slices.DeleteFunc(conns, func(c *testConn) bool {
			m, _ := c.receive()
			return m.Type != "error"
		})
		if len(winners) != 1 {
			t.Fatalf("%s: %d got it, want one", id, len(winners))
		}
		winners[0].record(1, 1)
		if n := querySQL[int](t, s.database, "select event_count from sessions where session_id = $1", id); n != 1 {
			t.Errorf("%s: %d events are stored, want 1", id, n)
		}
	}
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
		dialServer(t, s.ws("tracker")).write(string(announce(1000)) + "a part of it")
		waitUntil(t, "a part is read", func() bool { return s.used() == int64((i+1)*firstRead) })
	}
	if grown := heap() - before; grown > rounds*size/4 {
		t.Errorf("%d parts of messages take %d KB", rounds, grown>>10)
	}
}

// What a viewer says is read also where events have left no room.
func TestViewersNeedNoRoom(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	all := s.server.budget.left()
	s.server.budget.force(all)
	defer s.server.budget.give(all)
	v := s.viewer()
	for _, size := range []int{maxViewerMessage - 100, maxViewerMessage} {
		v.send("no_such_type", `"`+strings.Repeat("x", size)+`"`)
	}
	v.wantError("unknown_type")
	v.wantError("too_large")
}

// ---- fuzzing ----

// FuzzParseStart reads what a page says when it starts a session.
func FuzzParseStart(f *testing.F) {
	for _, seed := range append(jsonSeeds, `{"sessionId":"s","userId":"u\u0000","url":5,"resume":"r","r\u0065sume":1}`,
		`{"userId":"é`+strings.Repeat("x", 5000)+`"}`, strings.Repeat(`{"a":`, 600)+"1"+strings.Repeat("}", 600)) {
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
		for name, want := range map[string]bool{"viewport": true, "referrer": true, "timeZone": true, "resume": false} {
			if _, ok := metadata[name]; ok != want {
				t.Errorf("%q: the metadata has %s: %v, want %v", data, name, ok, want)
			}
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
