package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// testViewer watches one session at a time and checks every event it sees: each
// run of live events is contiguous, begins where the answer to the join said,
// and every event is the one that belongs at its index. What it missed between
// two runs it reads in pages.
type testViewer struct {
	t       testing.TB
	dialer  *net.Dialer
	address string
	saw     func(from, count int) // called for live events, if set

	reading sync.Mutex // held by a test that keeps it from reading

	mu sync.Mutex
	viewerState
	conn    *testConn
	session string
	loyal   bool // reads the session's past too, and connects again when the connection breaks
	paging  bool // a page is on its way
	run     int  // where the present run of live events began
	live    int  // the index that the next live event must have
	closed  bool
	done    chan struct{}
}

// viewerState is what a test may ask a viewer.
type viewerState struct {
	joined  bool
	next    int // it has seen every event below, since it first joined; -1 before
	events  int // checked, in all
	lagged  int // times that it was told so
	notices []string
	breaks  []error // why connections ended
}

// watchSession joins a session and follows it from its first event until the
// test ends, also over broken connections. It waits for the answer to the join.
func watchSession(t testing.TB, address, session string) *testViewer {
	t.Helper()
	v, err := openViewer(t, &net.Dialer{}, address)
	if err != nil {
		t.Fatalf("viewer: %v", err)
	}
	t.Cleanup(v.close)
	v.follow(session)
	return v
}

// openViewer connects a viewer that watches nothing yet. The caller closes it.
func openViewer(t testing.TB, dialer *net.Dialer, address string) (*testViewer, error) {
	c, err := openWebSocket(dialer, address, 4096)
	if err != nil {
		return nil, err
	}
	v := &testViewer{t: t, dialer: dialer, address: address, conn: c, done: make(chan struct{})}
	v.next = -1
	go v.listen(c) // ends with the connection, or at close when it is loyal
	return v, nil
}

func (v *testViewer) listen(c *testConn) {
	defer close(v.done)
	for c != nil {
		v.mayRead()
		text, err := c.read()
		if err == nil {
			v.hear(text)
			continue
		}
		c.Close()
		v.mu.Lock()
		v.breaks = append(v.breaks, err)
		v.mu.Unlock()
		c = v.reconnect()
	}
}

// mayRead waits while a test keeps it from reading.
func (v *testViewer) mayRead() {
	v.reading.Lock()
	defer v.reading.Unlock()
}

// reconnect connects and joins again; nil when the viewer is closed.
func (v *testViewer) reconnect() *testConn {
	for {
		v.mu.Lock()
		over := v.closed || !v.loyal
		v.mu.Unlock()
		if over {
			return nil
		}
		if c, err := openWebSocket(v.dialer, v.address, 4096); err == nil {
			v.mu.Lock()
			v.conn = c
			v.mu.Unlock()
			v.join(v.session)
			return c
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (v *testViewer) hear(text []byte) {
	m, err := parseMessage(text)
	v.mu.Lock()
	defer v.mu.Unlock()
	d := &m.Data
	if err != nil {
		v.t.Errorf("viewer: %v", err)
	}
	if m.Type == "error" && d.Code == "unavailable" {
		time.AfterFunc(100*time.Millisecond, v.askAgain) // once
	}
	if d.SessionID != v.session {
		return
	}
	switch m.Type {
	case "session_started", "session_ended":
		v.notices = append(v.notices, m.Type)
	case "session_joined":
		if v.next < 0 {
			v.next = d.TotalEvents
			if v.loyal {
				v.next = 0
			}
		}
		v.joined, v.paging, v.run, v.live = true, false, d.TotalEvents, d.TotalEvents
	case "session_lagged":
		v.lagged++
		v.run, v.live = d.NextIndex, d.NextIndex
	case "events_batch":
		v.hearLive(d.FromIndex, d.Events)
	case "session_events":
		v.paging = false
		if d.FromIndex != v.next {
			break // asked for before it joined anew
		}
		if d.HasMore && len(d.Events) == 0 {
			v.t.Errorf("viewer of %s: an empty page at %d of %d, and more to come", v.session, d.FromIndex,
				d.TotalEvents)
		}
		v.check(d.FromIndex, d.Events)
		v.next += len(d.Events)
	}
	v.catchUp()
}

func (v *testViewer) hearLive(from int, events []json.RawMessage) {
	if !v.joined {
		return // sent before it left
	}
	if from != v.live {
		v.t.Errorf("viewer of %s: live events from %d, want %d", v.session, from, v.live)
	}
	v.live = from + len(events)
	v.check(from, events)
	if v.saw != nil {
		v.saw(from, len(events))
	}
}

// askAgain repeats what the server could not answer without its database.
func (v *testViewer) askAgain() {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.closed || !v.loyal:
	case v.joined:
		v.paging = false
		v.catchUp()
	default:
		v.conn.send("viewer_join_session", sessionID{v.session})
	}
}

// catchUp asks for a page when there is a gap before the present run.
func (v *testViewer) catchUp() {
	switch {
	case !v.joined:
	case v.next >= v.run:
		v.next = max(v.next, v.live)
	case !v.paging:
		v.paging = true
		v.conn.send("get_session_events", map[string]any{"sessionId": v.session, "fromIndex": v.next})
	}
}

// check compares events with those that belong at index from and after.
func (v *testViewer) check(from int, events []json.RawMessage) {
	for i, event := range events {
		if want := testEvent(v.session, from+i); !bytes.Equal(event, want) {
			v.t.Errorf("viewer of %s: at index %d got %.300s want %.300s", v.session, from+i, event, want)
			break
		}
	}
	v.events += len(events)
}

// follow joins a session and reads its past too; the viewer comes back when the
// connection breaks.
func (v *testViewer) follow(session string) {
	v.t.Helper()
	v.mu.Lock()
	v.loyal = true
	v.mu.Unlock()
	v.join(session)
	waitUntil(v.t, "the viewer has joined "+session, func() bool { return v.look().joined })
}

func (v *testViewer) join(session string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if session != v.session {
		v.next = -1
	}
	v.session, v.joined = session, false
	v.conn.send("viewer_join_session", sessionID{session})
}

func (v *testViewer) leave() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.joined = false
	v.conn.send("viewer_leave_session", sessionID{v.session})
}

func (v *testViewer) close() {
	if v.t.Failed() {
		v.t.Logf("viewer of %s: %+v", v.session, v.look())
	}
	v.mu.Lock()
	v.closed = true
	v.conn.Close()
	v.mu.Unlock()
	<-v.done
}

func (v *testViewer) look() viewerState {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.viewerState
	s.notices, s.breaks = slices.Clone(s.notices), slices.Clone(s.breaks)
	return s
}

// waitFor waits until it has seen every event below an index.
func (v *testViewer) waitFor(index int) {
	v.t.Helper()
	waitUntil(v.t, fmt.Sprintf("the viewer of %s has seen %d events", v.session, index),
		func() bool { return v.look().next >= index })
}

// A page that is made of what is in memory has room for all of it.
func TestPageOfMemory(t *testing.T) {
	t.Parallel()
	s := startInside(t, "BATCH_INTERVAL=1h")
	large := strings.Repeat("x", 3*pageBytes)
	s.recording("x").sendRaw(`{"type":"events_batch","data":{"seq":1,"events":[{"n":"` + large + `"}]}}`)
	waitUntil(t, "it is accepted", func() bool { return s.memory().events == 1 })
	p, err := s.server.eventPage(t.Context(), "x", 0, 10, "[")
	if err != nil || p.count != 1 || p.cost < int64(len(p.text)) {
		t.Errorf("got error %v, %d events, room for %d of %d bytes", err, p.count, p.cost, len(p.text))
	}
	p.release()
	if left := s.server.outgoing.left(); left != outgoingBytes(s.server.cfg) {
		t.Errorf("%d bytes of room are left of %d", left, outgoingBytes(s.server.cfg))
	}
}

// Pages that are made at the same time do not wait for each other without end,
// though each holds room when it comes upon a larger chunk.
func TestPagesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		room := newBudget(outgoingMin)
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				p := &page{budget: room}
				for _, raw := range []int64{pageBytes, 1, 3 * pageBytes} {
					if err := p.grow(t.Context(), raw); err != nil {
						t.Error(err)
					}
					time.Sleep(time.Second)
				}
				p.text = make([]byte, pageBytes)
				if p.shrink(); p.cost != pageBytes {
					t.Errorf("a page of %d bytes keeps room for %d", pageBytes, p.cost)
				}
				p.release()
			})
		}
		all.Wait()
		if room.left() != outgoingMin || room.growing != 0 {
			t.Errorf("%d bytes are left of %d, and %d grow", room.left(), outgoingMin, room.growing)
		}
	})
}
