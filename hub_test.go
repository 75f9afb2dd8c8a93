package main

// The hub by its commands alone: no socket, no database, and a clock of the
// test's own (testing/synctest). Connections are their outboxes, which nobody
// empties but the test; the writer is the test.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const testBudget = 64 << 20

// hubTest is a hub in a bubble of its own.
type hubTest struct {
	*testing.T
	*hub
	srv    *server
	stop   context.CancelFunc
	asking chan []*flush // take has asked and had no answer
}

// inHub runs a test with a hub, whose settings it may change first, and checks
// at its end that all room is given back once every session has ended.
func inHub(t *testing.T, change func(*hubConfig), test func(*hubTest)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cfg := hubConfig{batchSize: 50, batchInterval: 5 * time.Second, grace: 15 * time.Second, maxEvents: 20000,
			maxTailBytes: testBudget / 4, maxSessionBytes: 1 << 30}
		if change != nil {
			change(&cfg)
		}
		log := slog.New(slog.DiscardHandler)
		b, m := newBudget(testBudget), newMetrics()
		ht := &hubTest{T: t, hub: newHub(cfg, b, m)}
		ht.srv = &server{cfg: config{heartbeat: time.Minute}, hub: ht.hub, budget: b, metrics: m, log: log}
		ctx, stop := context.WithCancel(context.Background())
		ht.stop = stop
		go ht.run(ctx) // ends with ctx, or when it is drained
		defer func() {
			stop()
			<-ht.done
		}()
		test(ht)
		ht.drainAll()
		if b.free != testBudget {
			t.Errorf("%d bytes of room are not given back", testBudget-b.free)
		}
	})
}

// drainAll ends every session and stores what is left.
func (t *hubTest) drainAll() {
	t.Helper()
	t.do(drain{})
	for range 1000 {
		select {
		case <-t.done:
			return
		default:
		}
		if work, ok := t.take(); ok {
			t.settle(stored, work...)
		}
		time.Sleep(maxPause)
		synctest.Wait()
	}
	t.Fatal("the hub is never drained")
}

// do gives the hub a command and waits until it has done all that follows.
func (t *hubTest) do(cmd command) {
	t.send(cmd)
	synctest.Wait()
}

// conn is a connection whose messages stay in its outbox: it says that somebody
// writes already.
func (t *hubTest) conn(viewer bool) *conn {
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	c := &conn{srv: t.srv, net: here, viewer: viewer, ctx: context.Background(), cancel: func() {}}
	c.out.writing = true
	t.do(enter{c})
	return c
}

// viewer is one that has had its first list.
func (t *hubTest) viewer() *conn {
	c := t.conn(true)
	t.heard(c, "active_sessions")
	return c
}

var aboutNobody = &description{userID: "u", metadata: []byte("{}")}

// attach makes c the tracker of a session under an epoch.
func (t *hubTest) attach(c *conn, id string, cl claim) attached {
	t.Helper()
	if cl.epoch == 0 {
		cl.epoch = 1
	}
	if cl.snapshot == 0 {
		cl.snapshot = -1
	}
	reply := make(chan attached, 1)
	at, ok := ask(t.hub, reply, attach{c, id, cl, aboutNobody, sessionStarted(id, aboutNobody), reply})
	if !ok {
		t.Fatal("the hub has stopped")
	}
	synctest.Wait()
	return at
}

// tracker records a new session.
func (t *hubTest) tracker(id string) *conn {
	t.Helper()
	c := t.conn(false)
	if at := t.attach(c, id, claim{}); at.outcome != attachedNow {
		t.Fatalf("attach: got outcome %d", at.outcome)
	}
	return c
}

// batch is one of so many events, with room taken from the budget as a reader
// does.
func (t *hubTest) batch(id string, n int, seq int64, size int) *batch {
	t.Helper()
	var events []string
	for i := range n {
		events = append(events, fmt.Sprintf(`{"type":3,"timestamp":%d,"x":"%s"}`, 1000+i, strings.Repeat("x", size)))
	}
	return t.batchOf(id, seq, events...)
}

func (t *hubTest) batchOf(id string, seq int64, events ...string) *batch {
	t.Helper()
	f, err := parseFrame([]byte(`{"type":"events_batch","data":{"events":[` + strings.Join(events, " , ") + `]}}`))
	if err != nil || !f.array {
		t.Fatalf("batch: %v", err)
	}
	b := newBatch(id, f, seq)
	if err := t.budget.take(t.Context(), b.room); err != nil {
		t.Fatalf("no room: %v", err)
	}
	return b
}

func (t *hubTest) publish(c *conn, id string, n int, seq int64) *batch {
	t.Helper()
	b := t.batch(id, n, seq, 0)
	t.do(publish{c, b})
	return b
}

// messages empties a connection's outbox and says briefly what was in it.
func (t *hubTest) messages(c *conn) (all []string) {
	t.Helper()
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	for _, m := range c.out.queue {
		all = append(all, brief(t, m.encode()))
	}
	for _, id := range slices.Sorted(maps.Keys(c.out.acks)) {
		all = append(all, fmt.Sprintf("ack %s %d", id, c.out.acks[id]))
	}
	if c.out.bye != nil {
		all = append(all, fmt.Sprintf("close %d", c.out.bye.code))
	}
	c.out.queue, c.out.bytes, c.out.acks = nil, 0, nil
	return all
}

func brief(t testing.TB, text []byte) string {
	t.Helper()
	var m testMessage
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatalf("%v in %.200s", err, text)
	}
	switch m.Type {
	case "events_batch":
		return fmt.Sprintf("live %s %d+%d", m.Data.SessionID, m.Data.FromIndex, len(m.Data.Events))
	case "session_lagged":
		return fmt.Sprintf("lagged %s %d", m.Data.SessionID, m.Data.NextIndex)
	case "session_joined":
		return fmt.Sprintf("joined %s %d", m.Data.SessionID, m.Data.TotalEvents)
	case "error":
		return "error " + m.Data.Code
	case "active_sessions":
		return m.Type
	}
	return strings.TrimSpace(m.Type + " " + m.Data.SessionID)
}

// heard checks what a connection was sent since it was last looked at.
func (t *hubTest) heard(c *conn, want ...string) {
	t.Helper()
	if got := t.messages(c); !slices.Equal(got, want) {
		t.Errorf("was sent %q, want %q", got, want)
	}
}

// reads gives what a viewer is sent while it reads on: when its outbox was full
// and is empty, the hub hears of it, as of next.
func (t *hubTest) reads(c *conn) (all []string) {
	t.Helper()
	for range 20 {
		all = append(all, t.messages(c)...)
		if !c.out.lagging {
			return all
		}
		c.out.lagging = false
		t.do(drained{c})
	}
	t.Error("its outbox is full each time that it has read it")
	return all
}

func (t *hubTest) join(c *conn, id string) bool {
	t.Helper()
	reply := make(chan bool, 1)
	ok, _ := ask(t.hub, reply, join{c, id, nil, reply})
	synctest.Wait()
	return ok
}

// take asks for work as a free writer does; false when there is none now: then
// the next call gets the answer.
func (t *hubTest) take() ([]*flush, bool) {
	t.Helper()
	if t.asking == nil {
		t.asking = t.writer()
	}
	select {
	case work := <-t.asking:
		t.asking = nil
		return work, true
	default:
		return nil, false
	}
}

// writer is a free one; it returns what it gets.
func (t *hubTest) writer() chan []*flush {
	reply := make(chan []*flush, 1)
	t.do(take{reply})
	return reply
}

// settle hands flushes back with an outcome.
func (t *hubTest) settle(result outcome, work ...*flush) {
	for _, f := range work {
		f.outcome = result
		if result != stored {
			f.attempts++
		}
	}
	t.do(settled{work})
}

// due takes the work that must be there now.
func (t *hubTest) due() []*flush {
	t.Helper()
	work, ok := t.take()
	if !ok {
		t.Fatal("there is no work, want some")
	}
	return work
}

// sessionsOf names the sessions of some work, in order.
func sessionsOf(work []*flush) (ids []string) {
	for _, f := range work {
		ids = append(ids, f.session)
	}
	return ids
}

func (t *hubTest) find(id string, from, to int64) found {
	reply := make(chan found, 1)
	f, _ := ask(t.hub, reply, find{id, from, to, reply})
	return f
}

func (t *hubTest) stats() hubStats {
	reply := make(chan hubStats, 1)
	st, _ := ask(t.hub, reply, look{reply})
	return st
}

// ---- events ----

// Events are numbered in the order in which they come, and their number stands
// in the live message.
func TestHubNumbers(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		a, b := t.tracker("a"), t.conn(false)
		t.attach(b, "b", claim{epoch: 4, counters: counters{events: 1000000, seq: 9, snapshot: 7}})
		viewer := t.viewer()
		t.join(viewer, "a")
		t.join(viewer, "b")
		for i, n := range []int{1, 3, 0, 2} {
			t.publish(a, "a", n, int64(i+1))
			t.publish(b, "b", n, 0)
		}
		t.heard(viewer, "joined a 0", "joined b 1000000", "live a 0+1", "live b 1000000+1", "live a 1+3", "live b 1000001+3", "live a 4+2", "live b 1000004+2")
		got := t.find("a", 0, 100)
		if !got.ok || got.session.now.events != 6 || got.session.now.seq != 4 || len(got.batches) != 4 {
			t.Errorf("got %+v with %d batches, want 6 events, seq 4, 4 batches", got.session.now, len(got.batches))
		}
		for id, snapshot := range map[string]int64{"a": -1, "b": 7} {
			if s := t.find(id, 0, 0).session; s.now.snapshot != snapshot {
				t.Errorf("%s: got snapshot %d, want %d", id, s.now.snapshot, snapshot)
			}
		}
	})
}

// A batch's frame is the live message, byte for byte the events that came.
func TestHubFrame(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		events := oddEvents()
		var raw []string
		for _, e := range events {
			raw = append(raw, string(e))
		}
		t.do(publish{c, t.batchOf("s", 1, `{"type":2,"timestamp":5}`)})
		b := t.batchOf("s", 2, raw...)
		t.do(publish{c, b})
		var m testMessage
		if err := json.Unmarshal(b.frame, &m); err != nil || m.Data.FromIndex != 1 || m.Data.SessionID != "s" {
			t.Errorf("got %v, fromIndex %d", err, m.Data.FromIndex)
		}
		sameEvents(t, "the frame", m.Data.Events, events)
		for i, e := range b.events {
			if got := b.body[e.start:e.end]; !bytes.Equal(got, events[i]) {
				t.Errorf("event %d: got %s, want %s", i, got, events[i])
			}
		}
	})
}

func TestHubCounters(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		t.do(publish{c, t.batchOf("s", 1, `{"type":4,"timestamp":50}`, `{"type":2,"timestamp":20}`, `{"type":3}`)})
		t.do(publish{c, t.batchOf("s", 2, `{"type":3,"timestamp":30}`, `{"type":"2","timestamp":"70"}`, `{"type":3,"timestamp":-9}`)})
		want := counters{events: 6, seq: 2, firstTime: -9, endTime: 50, snapshot: 1}
		got := t.find("s", 0, 0).session.now
		want.raw = got.raw
		if got != want || got.raw < 100 {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}

// Wherever the session's events are (pending, with the writer, kept, trimmed)
// when a viewer joins, live goes on where the answer says.
func TestHubJoinAtAnyMoment(t *testing.T) {
	inHub(t, func(c *hubConfig) { c.maxEvents = 8 }, func(t *hubTest) {
		c := t.tracker("s")
		var viewers []*conn
		var joinedAt []int
		for i := range 40 {
			v := t.viewer()
			if !t.join(v, "s") {
				t.Fatal("it cannot be joined")
			}
			viewers, joinedAt = append(viewers, v), append(joinedAt, 2*i)
			t.publish(c, "s", 2, int64(i+1))
			if i%5 == 3 { // commits come late and at odd moments
				time.Sleep(6 * time.Second)
				if work, ok := t.take(); ok {
					t.publish(c, "s", 0, 0)
					t.settle(stored, work...)
				}
			}
		}
		for i, v := range viewers {
			want := []string{fmt.Sprintf("joined s %d", joinedAt[i])}
			for at := joinedAt[i]; at < 80; at += 2 {
				want = append(want, fmt.Sprintf("live s %d+2", at))
			}
			t.heard(v, want...)
		}
	})
}

func TestHubJoinUnknown(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		v := t.viewer()
		if t.join(v, "s") {
			t.Error("a session that is not there was joined")
		}
		// What was read from the database may be out of date: memory counts.
		c := t.tracker("s")
		t.publish(c, "s", 3, 1)
		reply := make(chan bool, 1)
		old := &summary{id: "s", about: aboutNobody, now: counters{events: 1, snapshot: -1}}
		ask(t.hub, reply, join{v, "s", old, reply})
		other := &summary{id: "other", about: aboutNobody, now: counters{events: 5, snapshot: -1}}
		ask(t.hub, reply, join{v, "other", other, reply})
		synctest.Wait()
		t.heard(v, "session_started s", "joined s 3", "joined other 5")
		back := t.conn(false)
		t.attach(back, "other", claim{epoch: 3, counters: counters{events: 5}})
		t.publish(back, "other", 1, 0)
		t.heard(v, "session_started other", "live other 5+1")
	})
}

func TestHubLeave(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v, w := t.tracker("s"), t.viewer(), t.viewer()
		t.join(v, "s")
		t.join(w, "s")
		t.do(unjoin{v, "s"})
		t.do(unjoin{v, "never"})
		t.do(leave{w})
		t.publish(c, "s", 1, 1)
		t.do(forward{c, text(`{"type":"visibility_change","data":{"sessionId":"s"}}`)})
		t.heard(v, "joined s 0")
		t.heard(w, "joined s 0")
		t.join(w, "s") // it has left, and is not counted again
		t.do(leave{v})
		t.do(leave{c})
		if st := t.stats(); st.viewers != 0 || st.trackers != 0 {
			t.Errorf("got %+v, want nobody", st)
		}
	})
}

// A viewer that does not read has a bounded outbox, is told where live goes on
// when it has read it, and misses nothing from there.
func TestHubLag(t *testing.T) {
	for name, size := range map[string]int{"many messages": 0, "much": 100 << 10} {
		t.Run(name, func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				c, slow, fast := t.tracker("s"), t.viewer(), t.viewer()
				t.join(slow, "s")
				t.join(fast, "s")
				t.heard(fast, "joined s 0")
				n := 0
				for ; n < 3*outboxMessages && (n < 60 || size == 0); n++ {
					t.do(publish{c, t.batch("s", 1, int64(n+1), size)})
					t.heard(fast, fmt.Sprintf("live s %d+1", n))
					if len(slow.out.queue) > outboxMessages || slow.out.bytes > outboxBytes+size+200 {
						t.Fatalf("the outbox has %d messages, %d bytes", len(slow.out.queue), slow.out.bytes)
					}
				}
				if t.metrics.viewersLagged.Load() != 1 || !slow.out.lagging {
					t.Errorf("%d viewers lagged, want 1", t.metrics.viewersLagged.Load())
				}
				read := t.messages(slow)
				if read[0] != "joined s 0" || len(read) >= n {
					t.Fatalf("got %d messages from %q on, want some of %d", len(read), read[0], n)
				}
				for i, m := range read[1:] {
					if want := fmt.Sprintf("live s %d+1", i); m != want {
						t.Fatalf("got %q, want %q", m, want)
					}
				}
				slow.out.lagging = false // as next does when it is empty
				t.do(drained{slow})
				t.publish(c, "s", 2, 0)
				t.heard(slow, "active_sessions", fmt.Sprintf("lagged s %d", n), fmt.Sprintf("live s %d+2", n))
				t.heard(fast, fmt.Sprintf("live s %d+2", n))
				t.do(drained{slow}) // nothing was missed
				t.heard(slow, "active_sessions")
				t.do(leave{slow})
				t.do(drained{slow}) // too late
				t.heard(slow)
			})
		})
	}
}

// A viewer that joins while its outbox is full is answered when it reads again.
func TestHubJoinWhileLagging(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.publish(c, "s", 3, 1)
		v.out.lagging = true
		if !t.join(v, "s") {
			t.Error("it cannot join")
		}
		t.publish(c, "s", 1, 2)
		t.heard(v)
		v.out.lagging = false
		t.do(drained{v})
		t.publish(c, "s", 1, 3)
		t.heard(v, "active_sessions", "joined s 4", "live s 4+1")
	})
}

// A viewer whose list alone fills its outbox is told all else as well.
func TestHubLongList(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		large := &description{userID: "u", metadata: []byte(`{"x":"` + strings.Repeat("x", maxMetadata-100) + `"}`)}
		for i := range outboxBytes/maxMetadata + 6 {
			id := fmt.Sprintf("large%d", i)
			reply := make(chan attached, 1)
			ask(t.hub, reply, attach{t.conn(false), id, claim{epoch: 1, counters: counters{snapshot: -1}}, large, sessionStarted(id, large), reply})
		}
		v := t.conn(true)
		t.join(v, "s")
		t.publish(c, "s", 2, 1)
		got := t.reads(v)
		t.publish(c, "s", 3, 2)
		got = slices.DeleteFunc(append(got, t.reads(v)...), func(m string) bool { return m == "active_sessions" })
		if n := len(got); n < 2 || !strings.HasPrefix(got[0], "joined s ") || got[n-1] != "live s 2+3" {
			t.Errorf("was sent %q, want the answer to its join and the events that follow", got)
		}
	})
}

// Answers to joins all come, also when they fill the outbox once more.
func TestHubJoinsOwed(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		large := &description{metadata: []byte(`{"x":"` + strings.Repeat("x", maxMetadata-100) + `"}`)}
		v := t.viewer()
		v.out.lagging = true
		var want []string
		for i := range outboxBytes/maxMetadata + 20 {
			id := fmt.Sprintf("s%03d", i)
			reply := make(chan bool, 1)
			ask(t.hub, reply, join{v, id, &summary{id: id, about: large, now: counters{events: 7}}, reply})
			want = append(want, "joined "+id+" 7")
		}
		got := slices.DeleteFunc(t.reads(v), func(m string) bool { return m == "active_sessions" })
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("got %d answers to %d joins", len(got), len(want))
		}
	})
}

// Errors go to the session's viewers, numbered and counted; what viewers need
// not know does not.
func TestHubReports(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v, other := t.conn(false), t.viewer(), t.viewer()
		t.attach(c, "s", claim{epoch: 2, counters: counters{errors: 5}})
		t.join(v, "s")
		t.messages(v)
		t.messages(other)
		t.budget.give(-30)
		t.do(reported{c, report{kind: "error", room: 10}, nil})
		t.do(reported{c, report{kind: "javascript_error", room: 10}, text(`{"type":"javascript_error","data":{"sessionId":"s"}}`)})
		t.do(forward{c, text(`{"type":"visibility_change","data":{"sessionId":"s"}}`)})
		t.heard(v, "javascript_error s", "visibility_change s")
		t.heard(other)
		if n := t.find("s", 0, 0).session.now.errors; n != 7 {
			t.Errorf("got %d errors, want 7", n)
		}
		t.do(finish{c})
		f := t.due()[0]
		if len(f.reports) != 2 || f.reports[0].id != 5 || f.reports[1].id != 6 || f.after.errors != 7 {
			t.Errorf("got the reports %+v, %d errors after, want numbers 5 and 6, and 7", f.reports, f.after.errors)
		}
		t.settle(stored, f)
		t.do(reported{c, report{kind: "error", room: 10}, nil}) // it records nothing any more
		t.heard(c, "take_snapshot s", "error no_session")
		t.heard(v, "session_ended s")
	})
}

func TestHubSessionFull(t *testing.T) {
	inHub(t, func(c *hubConfig) { c.maxSessionBytes = 200 }, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.publish(c, "s", 3, 1)
		t.publish(c, "s", 4, 2)
		t.heard(c, "error session_full")
		t.heard(v, "session_ended s")
		if !c.lost.Load() || t.stats().live != 0 || t.metrics.refusals["session_bytes"] != 1 {
			t.Errorf("got lost %v, %d live, refusals %v", c.lost.Load(), t.stats().live, t.metrics.refusals)
		}
		t.publish(c, "s", 1, 3)
		t.heard(c, "error no_session")
		if f := t.due()[0]; f.after.events != 3 || !f.ended {
			t.Errorf("got %d events, ended %v", f.after.events, f.ended)
		} else {
			t.settle(stored, f)
		}
	})
}

// ---- memory ----

// Past MAX_EVENTS_PER_SESSION the older half goes, of what is committed only.
func TestHubTrim(t *testing.T) {
	inHub(t, func(c *hubConfig) { c.maxEvents = 10 }, func(t *hubTest) {
		c := t.tracker("s")
		inMemory := func() (from, to int64) {
			f := t.find("s", 0, 1<<40)
			for i, b := range f.batches {
				if i > 0 && b.first != f.batches[i-1].end() {
					t.Errorf("a gap in memory at %d", b.first)
				}
			}
			if len(f.batches) == 0 {
				return -1, -1
			}
			return f.batches[0].first, f.batches[len(f.batches)-1].end()
		}
		want := func(from, to int64) {
			t.Helper()
			if gotFrom, gotTo := inMemory(); gotFrom != from || gotTo != to {
				t.Errorf("in memory are the events %d to %d, want %d to %d", gotFrom, gotTo, from, to)
			}
		}
		flush := func() {
			time.Sleep(5 * time.Second)
			t.settle(stored, t.due()...)
		}
		for range 7 {
			t.publish(c, "s", 2, 0)
		}
		want(0, 14) // nothing of it is committed
		flush()
		want(10, 14) // 4 of 5 would be too many
		for range 3 {
			t.publish(c, "s", 2, 0)
		}
		flush()
		want(10, 20) // as many as may be
		t.publish(c, "s", 1, 0)
		want(10, 21)
		flush()
		want(16, 21)
		t.publish(c, "s", 30, 0)
		flush()
		want(-1, -1) // a batch is kept whole or not at all
		if st := t.stats(); st.events != 51 || st.tailBytes != 0 {
			t.Errorf("got %+v, want 51 events, no tail", st)
		}
	})
}

// What is committed takes a share of the budget at most; the oldest goes first,
// of whatever session.
func TestHubTailBytes(t *testing.T) {
	inHub(t, func(c *hubConfig) { c.maxTailBytes = 10000 }, func(t *hubTest) {
		a, b := t.tracker("a"), t.tracker("b")
		for range 4 {
			for c, id := range map[*conn]string{a: "a", b: "b"} {
				t.do(publish{c, t.batch(id, 1, 0, 1500)})
			}
			time.Sleep(5 * time.Second)
			t.settle(stored, t.due()...)
			if st := t.stats(); st.tailBytes > 10000 {
				t.Fatalf("tails have %d bytes", st.tailBytes)
			}
		}
		for _, id := range []string{"a", "b"} {
			if f := t.find(id, 0, 4); len(f.batches) != 2 || f.batches[0].first != 2 {
				t.Errorf("%s: got %d batches in memory, want the newest 2", id, len(f.batches))
			}
		}
		if used := int64(testBudget) - t.budget.free; used != t.stats().tailBytes+2*aboutNobody.room() {
			t.Errorf("%d bytes of room are taken, %d by tails and twice %d by descriptions", used, t.stats().tailBytes, aboutNobody.room())
		}
	})
}

func TestHubFind(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		if t.find("s", 0, 9).ok {
			t.Error("found a session that is not there")
		}
		c := t.tracker("s")
		var writing []*flush
		for range 3 { // kept, with the writer, pending
			t.publish(c, "s", 10, 0)
			time.Sleep(5 * time.Second)
			if t.stats().tailBytes == 0 {
				t.settle(stored, t.due()...)
			} else if writing == nil {
				writing = t.due()
			}
		}
		for _, tt := range []struct{ from, to, first, count int64 }{
			{0, 30, 0, 3}, {0, 1, 0, 1}, {9, 10, 0, 1}, {10, 11, 10, 1}, {9, 11, 0, 2}, {29, 30, 20, 1}, {29, 1000, 20, 1}, {30, 1000, 0, 0},
			{1 << 60, -1 << 60, 0, 0},
		} {
			f := t.find("s", tt.from, tt.to)
			if int64(len(f.batches)) != tt.count || tt.count > 0 && f.batches[0].first != tt.first {
				t.Errorf("from %d to %d: got %d batches, want %d from %d on", tt.from, tt.to, len(f.batches), tt.count, tt.first)
			}
		}
		t.settle(stored, writing...)
	})
}

// All room is given back, whatever becomes of what took it.
func TestHubBudget(t *testing.T) {
	used := func(t *hubTest) int64 { return testBudget - t.budget.free }
	for _, result := range []outcome{stored, refused, overtaken, deleted} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("outcome %d, more while writing %v", result, late), func(t *testing.T) {
				inHub(t, nil, func(t *hubTest) {
					c := t.tracker("s")
					t.publish(c, "s", 5, 1)
					t.budget.give(-100)
					t.do(reported{c, report{room: 100}, nil})
					t.do(finish{c})
					t.attach(c, "s", claim{epoch: 2})
					time.Sleep(5 * time.Second)
					work := t.due()
					if late {
						t.publish(c, "s", 5, 2)
						t.budget.give(-100)
						t.do(reported{c, report{room: 100}, nil})
					}
					work[0].epoch = 2
					t.settle(result, work...)
					if result == overtaken { // only the second time is believed
						time.Sleep(time.Second)
						t.settle(result, t.due()...)
					}
					if result != stored && used(t) != 0 {
						t.Errorf("%d bytes are in use, want none", used(t))
					}
				})
			})
		}
	}
	t.Run("deleted while it is written", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			c := t.tracker("s")
			t.publish(c, "s", 5, 1)
			time.Sleep(5 * time.Second)
			work := t.due()
			t.publish(c, "s", 5, 2)
			reply := make(chan struct{}, 1)
			t.do(evict{"s", reply})
			if held := used(t); held == 0 || held > work[0].room() {
				t.Errorf("%d bytes are in use, want those of the flush that is being written, %d", held, work[0].room())
			}
			t.settle(deleted, work...)
			if used(t) != 0 {
				t.Errorf("%d bytes are in use, want none", used(t))
			}
		})
	})
	t.Run("dropped while it waits to be tried again", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			c := t.tracker("s")
			t.publish(c, "s", 5, 1)
			time.Sleep(5 * time.Second)
			t.settle(failed, t.due()...)
			t.attach(c, "s", claim{epoch: 9, counters: counters{events: 77}})
			if want := aboutNobody.room(); used(t) != want {
				t.Errorf("%d bytes are in use, want %d for the session itself", used(t), want)
			}
			t.publish(c, "s", 1, 1)
			time.Sleep(5 * time.Second)
			if f := t.due()[0]; len(f.batches) != 1 || f.batches[0].first != 77 || f.epoch != 9 {
				t.Errorf("got %d batches from %d on, epoch %d", len(f.batches), f.batches[0].first, f.epoch)
			} else {
				t.settle(stored, f)
			}
		})
	})
}

// ---- who records ----

func TestHubAttach(t *testing.T) {
	type state struct {
		held    bool // by a live connection
		ended   bool
		epoch   int64
		byToken bool
		returns bool // the same connection
	}
	tests := []struct {
		name        string
		state       state
		outcome     attachment
		oldHears    []string
		viewerHears []string
		next        int64 // where its events go on; 3 are in memory
	}{
		{name: "a free session", state: state{epoch: 2}, next: 3},
		{name: "an ended one", state: state{ended: true, epoch: 2}, viewerHears: []string{"session_started s"}, next: 3},
		{name: "held by another", state: state{held: true, epoch: 2}, outcome: heldByOther, next: 3},
		{name: "held by another, with its token", state: state{held: true, epoch: 2, byToken: true}, oldHears: []string{"close 4001"}, next: 3},
		{name: "held by itself", state: state{held: true, epoch: 2, returns: true}, next: 3},
		{name: "an older claim", state: state{epoch: 0}, outcome: outdated, next: 3},
		{name: "another server had it", state: state{epoch: 5}, next: 70},
		{name: "another server had it, and an old connection is still there", state: state{held: true, epoch: 5, byToken: true}, oldHears: []string{"close 4001"}, next: 70},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				old, v := t.conn(false), t.viewer()
				t.attach(old, "s", claim{epoch: 1})
				t.publish(old, "s", 3, 1)
				t.messages(v)
				switch {
				case tt.state.ended:
					t.do(finish{old})
					t.heard(v, "session_ended s")
				case !tt.state.held:
					t.do(leave{old})
				}
				c := t.conn(false)
				if tt.state.returns {
					c = old
				}
				cl := claim{epoch: tt.state.epoch, byToken: tt.state.byToken, counters: counters{events: 70, seq: 30, snapshot: -1}}
				reply := make(chan attached, 1)
				at, _ := ask(t.hub, reply, attach{c, "s", cl, aboutNobody, sessionStarted("s", aboutNobody), reply})
				synctest.Wait()
				if at.outcome != tt.outcome {
					t.Errorf("got outcome %d, want %d", at.outcome, tt.outcome)
				}
				if tt.outcome == attachedNow {
					if want := map[int64]int64{3: 1, 70: 30}[tt.next]; at.accepted != want || at.stored != 30 {
						t.Errorf("got accepted %d, stored %d, want %d, 30", at.accepted, at.stored, want)
					}
					t.publish(c, "s", 1, 0)
				} else {
					t.publish(c, "s", 1, 0)
					t.heard(c, "error no_session")
				}
				if c != old {
					t.heard(old, tt.oldHears...)
					if got := old.lost.Load(); got != (tt.oldHears != nil) {
						t.Errorf("the old connection has lost it: %v", got)
					}
				}
				t.heard(v, tt.viewerHears...)
				last := tt.next
				if tt.outcome == attachedNow {
					last++
				}
				if n := t.find("s", 0, 0).session.now.events; n != last {
					t.Errorf("the session has %d events, want %d", n, last)
				}
			})
		})
	}
}

func TestHubHeld(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		held := func(c *conn) bool {
			reply := make(chan bool, 1)
			ok, _ := ask(t.hub, reply, held{"s", c, reply})
			return ok
		}
		other := t.conn(false)
		if held(other) {
			t.Error("a session that is not there is held")
		}
		c := t.tracker("s")
		if !held(other) || held(c) {
			t.Errorf("a live session is held: %v for another, %v for its own", held(other), held(c))
		}
		t.do(leave{c})
		if held(other) {
			t.Error("a session in its grace period is held")
		}
		c = t.conn(false)
		t.attach(c, "s", claim{epoch: 2})
		t.do(finish{c})
		if held(other) {
			t.Error("an ended session is held")
		}
	})
}

// A claim that came to nothing has raised the row's epoch: the holder's batches
// go out under the new one.
func TestHubClaimForNothing(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, other := t.tracker("s"), t.conn(false)
		t.publish(c, "s", 1, 1)
		time.Sleep(5 * time.Second)
		work := t.due()
		if at := t.attach(other, "s", claim{epoch: 2}); at.outcome != heldByOther {
			t.Fatalf("got outcome %d, want held", at.outcome)
		}
		t.settle(overtaken, work...) // under epoch 1
		t.heard(c)
		again := t.writer()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		work = <-again
		if work[0].epoch != 2 || len(work[0].batches) != 1 {
			t.Errorf("got epoch %d with %d batches, want 2 with 1", work[0].epoch, len(work[0].batches))
		}
		t.settle(stored, work...)
		t.heard(c, "ack s 1")
	})
}

// Several start a session at once: their claims raise the row's epoch, and come
// to the hub in any order. The holder goes on, under the newest.
func TestHubClaimsForNothing(t *testing.T) {
	for _, epochs := range [][]int64{{2, 3}, {3, 2}, {4}, {3, 4, 2}} {
		t.Run(fmt.Sprint(epochs), func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				c := t.tracker("s")
				t.publish(c, "s", 1, 1)
				for _, epoch := range epochs {
					if at := t.attach(t.conn(false), "s", claim{epoch: epoch}); at.outcome != heldByOther {
						t.Errorf("epoch %d: got outcome %d, want held", epoch, at.outcome)
					}
				}
				time.Sleep(5 * time.Second)
				work := t.due()
				if want := slices.Max(epochs); work[0].epoch != want {
					t.Errorf("got epoch %d, want the row's, %d", work[0].epoch, want)
				}
				t.settle(stored, work...)
				t.heard(c, "ack s 1")
			})
		})
	}
	t.Run("beside a commit", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			c := t.tracker("s")
			t.publish(c, "s", 1, 1)
			time.Sleep(5 * time.Second)
			work := t.due() // stored, which those who claim see before the hub hears of it
			if at := t.attach(t.conn(false), "s", claim{epoch: 3, counters: work[0].after}); at.outcome != heldByOther {
				t.Errorf("got outcome %d, want held", at.outcome)
			}
			t.settle(stored, work...)
			t.publish(c, "s", 1, 2)
			time.Sleep(5 * time.Second)
			if work = t.due(); work[0].epoch != 3 {
				t.Errorf("got epoch %d, want the row's, 3", work[0].epoch)
			}
			t.settle(stored, work...)
			t.heard(c, "ack s 2")
		})
	})
}

// Another server has the session: the tracker is told, viewers are not.
func TestHubOvertaken(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.publish(c, "s", 1, 1)
		t.do(publish{c, t.batch("s", 1, 2, 0)})
		time.Sleep(5 * time.Second)
		t.settle(overtaken, t.due()...) // it may be by a claim of this server that is on its way
		t.heard(c)
		time.Sleep(time.Second)
		t.settle(overtaken, t.due()...)
		t.heard(c, "close 4001")
		t.heard(v)
		if t.find("s", 0, 9).ok || !c.lost.Load() {
			t.Error("it is still in memory")
		}
	})
}

// A flush that is stored in the end was no other server's: the next refusal is
// the first one again, and what is in memory is told.
func TestHubOvertakenForNothing(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		for seq := range int64(2) {
			t.publish(c, "s", 1, seq+1)
			time.Sleep(5 * time.Second)
			t.settle(overtaken, t.due()...)
			t.heard(c)
			time.Sleep(time.Second)
			t.settle(stored, t.due()...)
			t.heard(c, fmt.Sprintf("ack s %d", seq+1))
			if !t.find("s", 0, 9).ok {
				t.Error("it is not in memory")
			}
		}
	})
}

// Viewers that have seen events which were lost with another server's claim see
// none of them twice when the tracker sends them again.
func TestHubNoEventTwice(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.join(v, "s")
		for i := range 4 {
			t.publish(c, "s", 2, int64(i+1))
		}
		t.messages(v)
		t.attach(c, "s", claim{epoch: 3, counters: counters{events: 4, seq: 2}}) // half of it was stored
		for i := range 4 {
			t.publish(c, "s", 2, int64(i+3))
		}
		t.heard(v, "live s 8+2", "live s 10+2")
		t.attach(c, "s", claim{epoch: 9, counters: counters{events: 40, seq: 20}}) // and the other server had more
		t.publish(c, "s", 2, 21)
		t.publish(c, "s", 2, 22)
		t.heard(v, "lagged s 42", "live s 42+2")
	})
}

// ---- grace and end ----

func TestHubGrace(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.do(leave{c})
		time.Sleep(14 * time.Second)
		t.heard(v)
		back := t.conn(false)
		t.attach(back, "s", claim{epoch: 2})
		time.Sleep(time.Hour)
		t.heard(v) // it was not away
		t.do(leave{back})
		time.Sleep(16 * time.Second)
		t.heard(v, "session_ended s")
		work := t.due()
		if f := work[0]; !f.ended || f.endedAt.IsZero() {
			t.Errorf("got ended %v at %v", f.ended, f.endedAt)
		}
		t.settle(stored, work...)
		if st := t.stats(); st.sessions != 0 {
			t.Errorf("got %+v, want it out of memory", st)
		}
		t.attach(t.conn(false), "s", claim{epoch: 3})
		t.heard(v, "session_started s")
	})
}

// A tracker that turns to another session leaves the first to its grace period.
func TestHubChangesSession(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("a"), t.viewer()
		t.attach(c, "b", claim{})
		t.publish(c, "b", 1, 0)
		t.heard(v, "session_started b")
		time.Sleep(16 * time.Second)
		t.heard(v, "session_ended a")
		if n := t.find("b", 0, 1).session.now.events; n != 1 {
			t.Errorf("got %d events, want 1", n)
		}
	})
}

func TestHubEnd(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.join(v, "s")
		t.publish(c, "s", 2, 1)
		t.do(finish{c})
		t.do(finish{c}) // once is enough
		t.publish(c, "s", 1, 2)
		t.heard(c, "take_snapshot s", "error no_session")
		t.heard(v, "joined s 0", "live s 0+2", "session_ended s")
		if s := t.find("s", 0, 9).session; s.isActive || s.now.events != 2 {
			t.Errorf("got active %v, %d events", s.isActive, s.now.events)
		}
		work := t.due() // at once
		if f := work[0]; !f.ended || f.after.events != 2 {
			t.Errorf("got ended %v, %d events", f.ended, f.after.events)
		}
		t.settle(stored, work...)
		t.heard(c, "ack s 1")
		if t.find("s", 0, 9).ok {
			t.Error("it is still in memory")
		}
	})
}

// A session that comes back while its end is being written goes on.
func TestHubReturnsWhileEnding(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		t.publish(c, "s", 2, 1)
		t.do(finish{c})
		work := t.due()
		if at := t.attach(c, "s", claim{epoch: 2}); at.outcome != attachedNow || at.accepted != 1 {
			t.Errorf("got %+v", at)
		}
		t.settle(stored, work...)
		t.publish(c, "s", 1, 2)
		time.Sleep(5 * time.Second)
		work = t.due()
		if f := work[0]; f.ended || f.epoch != 2 || f.batches[0].first != 2 {
			t.Errorf("got ended %v, epoch %d, from %d on", f.ended, f.epoch, f.batches[0].first)
		}
		t.settle(stored, work...)
	})
}

// ---- batches ----

// A batch starts when BATCH_INTERVAL has passed since the oldest pending event,
// when BATCH_SIZE sessions are dirty, when much is pending, or when a session
// ended.
func TestHubDue(t *testing.T) {
	t.Run("interval", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			c := t.tracker("s")
			w := t.writer()
			t.publish(c, "s", 1, 0)
			time.Sleep(4 * time.Second)
			t.publish(c, "s", 1, 0)
			if len(w) != 0 {
				t.Error("work before its time")
			}
			time.Sleep(1100 * time.Millisecond)
			if len(w) != 1 {
				t.Fatal("no work after BATCH_INTERVAL")
			}
			work := <-w
			if work[0].after.events != 2 {
				t.Errorf("got %d events, want all that is pending", work[0].after.events)
			}
			t.settle(stored, work...)
		})
	})
	t.Run("sessions", func(t *testing.T) {
		inHub(t, func(c *hubConfig) { c.batchSize = 3 }, func(t *hubTest) {
			w := t.writer()
			var trackers []*conn
			for _, id := range []string{"a", "b", "c", "d"} {
				trackers = append(trackers, t.tracker(id))
			}
			for i, id := range []string{"a", "b", "b", "a"} {
				t.publish(trackers[i%2], id, 1, 0)
			}
			trackers[0], trackers[1] = trackers[1], trackers[0]
			if len(w) != 0 {
				t.Error("work of two sessions, want three")
			}
			t.publish(trackers[3], "d", 1, 0)
			if len(w) != 1 {
				t.Fatal("no work of three sessions")
			}
			work := <-w
			if got := sessionsOf(work); !slices.Equal(got, []string{"a", "b", "d"}) {
				t.Errorf("got %v", got)
			}
			t.settle(stored, work...)
		})
	})
	t.Run("bytes", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			c := t.tracker("s")
			w := t.writer()
			t.do(publish{c, t.batch("s", 1, 0, flushBytes-5000)})
			if len(w) != 0 {
				t.Error("work before much is pending")
			}
			t.do(publish{c, t.batch("s", 1, 0, 6000)})
			if len(w) != 1 {
				t.Fatal("no work though much is pending")
			}
			t.settle(stored, <-w...)
		})
	})
	t.Run("ended", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			a, b := t.tracker("a"), t.tracker("b")
			t.publish(a, "a", 1, 0)
			t.publish(b, "b", 1, 0)
			w := t.writer()
			t.do(finish{b})
			if len(w) != 1 {
				t.Fatal("no work though a session has ended")
			}
			work := <-w
			if got := sessionsOf(work); got[0] != "b" || len(got) != 2 {
				t.Errorf("got %v, want the ended one first, and the other with it", got)
			}
			t.settle(stored, work...)
		})
	})
}

// A batch has BATCH_SIZE sessions at most, oldest first, ended ones before all.
func TestHubGroup(t *testing.T) {
	inHub(t, func(c *hubConfig) { c.batchSize = 2 }, func(t *hubTest) {
		trackers := map[string]*conn{}
		ids := []string{"a", "b", "c", "d", "e"}
		for _, id := range ids {
			trackers[id] = t.tracker(id)
			t.publish(trackers[id], id, 1, 0)
		}
		t.do(finish{trackers["d"]})
		var order [][]string
		var taken []*flush
		for range 2 {
			work := t.due()
			order = append(order, sessionsOf(work))
			taken = append(taken, work...)
		}
		if want := [][]string{{"d", "a"}, {"b", "c"}}; !reflect.DeepEqual(order, want) {
			t.Errorf("got %v, want %v", order, want)
		}
		w := t.writer()
		t.publish(trackers["a"], "a", 1, 0) // it is with a writer
		if len(w) != 0 {
			t.Error("a session went to two writers at once, or too early")
		}
		t.settle(stored, taken...)
		if len(w) != 1 {
			t.Fatal("no work though two sessions are dirty")
		}
		work := <-w
		if got := sessionsOf(work); !slices.Equal(got, []string{"e", "a"}) {
			t.Errorf("got %v, want e, a", got)
		}
		if f := work[1]; len(f.batches) != 1 || f.batches[0].first != 1 {
			t.Errorf("a: got %d batches from %d on, want what came meanwhile", len(f.batches), f.batches[0].first)
		}
		t.settle(stored, work...)
	})
}

// One session's share of a batch is bounded, and so is the batch.
func TestHubGroupBytes(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, d := t.tracker("s"), t.tracker("t")
		for range 10 {
			t.do(publish{c, t.batch("s", 1, 0, 2<<20)})
		}
		t.publish(d, "t", 1, 0)
		for _, want := range []struct {
			sessions []string
			events   int64
		}{{[]string{"s"}, 4}, {[]string{"t", "s"}, 1}, {[]string{"s"}, 10}} {
			work := t.due()
			if got := sessionsOf(work); !slices.Equal(got, want.sessions) || work[0].after.events != want.events {
				t.Errorf("got %v up to event %d, want %v up to %d", got, work[0].after.events, want.sessions, want.events)
			}
			t.settle(stored, work...)
		}
	})
}

// What fails is kept as it is and tried again, after pauses that grow up to a
// bound; what comes meanwhile does not mix with it.
func TestHubRetry(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		t.publish(c, "s", 2, 1)
		time.Sleep(5 * time.Second)
		first := t.due()[0]
		last := time.Duration(0)
		for i := range 12 {
			t.settle(failed, first)
			t.publish(c, "s", 1, int64(i+2))
			t.heard(c)
			w, began := t.writer(), time.Now()
			for len(w) == 0 {
				time.Sleep(10 * time.Millisecond)
			}
			if work := <-w; len(work) != 1 || work[0] != first || len(first.batches) != 1 {
				t.Fatalf("got %d flushes, want the same again", len(work))
			}
			pause := time.Since(began)
			if pause > maxPause+200*time.Millisecond || pause < last-100*time.Millisecond {
				t.Errorf("attempt %d after %v, the one before after %v, want them to grow up to %v", i+2, pause, last, maxPause)
			}
			last = pause
		}
		if last < maxPause-100*time.Millisecond {
			t.Errorf("the last pause is %v, want %v", last, maxPause)
		}
		t.settle(stored, first)
		t.heard(c, "ack s 1")
		time.Sleep(5 * time.Second)
		work := t.due()
		if f := work[0]; f == first || len(f.batches) != 12 || f.batches[0].first != 2 {
			t.Errorf("got %d batches from %d on, want the 12 that came meanwhile", len(f.batches), f.batches[0].first)
		}
		t.settle(stored, work...)
		t.heard(c, "ack s 13")
	})
}

// Nobody waits for another session's trouble.
func TestHubRetryAlone(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, other := t.tracker("s"), t.tracker("t")
		t.publish(c, "s", 1, 1)
		time.Sleep(5 * time.Second)
		work := t.due()
		work[0].attempts = 10
		t.settle(failed, work...)
		t.publish(other, "t", 1, 1)
		t.do(finish{other})
		t.settle(stored, t.due()...)
		t.heard(other, "ack t 1")
		t.heard(c)
	})
}

// Acks are for what is committed, and for trackers that number their batches.
func TestHubAcks(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, old := t.tracker("s"), t.tracker("old")
		for seq := range 3 {
			t.publish(c, "s", 1, int64(seq+1))
		}
		t.publish(old, "old", 1, 0)
		t.do(acks{c})
		t.heard(c)
		time.Sleep(5 * time.Second)
		work := t.due()
		t.publish(c, "s", 1, 4)
		t.heard(c)
		t.settle(stored, work...)
		t.heard(c, "ack s 3")
		t.heard(old)
		t.do(acks{c}) // it sent one again
		t.heard(c, "ack s 3")
		t.do(leave{c})
		time.Sleep(5 * time.Second)
		t.settle(stored, t.due()...) // nobody is there to hear
		back := t.conn(false)
		if at := t.attach(back, "s", claim{epoch: 2}); at.accepted != 4 || at.stored != 4 {
			t.Errorf("got %+v, want 4 and 4", at)
		}
	})
}

// What the database refuses is dropped with its session; its tracker is told and
// may go on with another.
func TestHubRefused(t *testing.T) {
	for _, tt := range []struct {
		result  outcome
		tracker []string
		code    string
	}{
		{refused, []string{"error not_stored"}, ""},
		{deleted, []string{"error session_deleted", "close 4004"}, ""},
	} {
		inHub(t, nil, func(t *hubTest) {
			c, other, v := t.tracker("s"), t.tracker("t"), t.viewer()
			t.publish(c, "s", 1, 1)
			t.publish(other, "t", 1, 1)
			time.Sleep(5 * time.Second)
			for _, f := range t.due() {
				if f.session == "s" {
					t.settle(tt.result, f)
				} else {
					t.settle(stored, f)
				}
			}
			t.heard(c, tt.tracker...)
			t.heard(other, "ack t 1")
			t.heard(v, "session_ended s")
			if !c.lost.Load() || t.find("s", 0, 1).ok {
				t.Error("it is still recorded")
			}
			if tt.result == refused {
				t.attach(c, "u", claim{})
				t.publish(c, "u", 1, 1)
				t.heard(v, "session_started u")
			}
		})
	}
}

// What becomes of an ended session's last batch is nothing to the session that
// its connection has begun since.
func TestHubTroubleOfEnded(t *testing.T) {
	for _, result := range []outcome{refused, overtaken, deleted} {
		t.Run(fmt.Sprintf("outcome %d", result), func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				c := t.tracker("a")
				t.publish(c, "a", 2, 1)
				t.do(finish{c})
				work := t.due()
				t.attach(c, "b", claim{})
				t.settle(result, work...)
				if result == overtaken { // only the second time is believed
					time.Sleep(time.Second)
					t.settle(result, t.due()...)
				}
				if t.heard(c); c.lost.Load() {
					t.Error("the connection has lost what it records now")
				}
				t.publish(c, "b", 1, 1)
				time.Sleep(5 * time.Second)
				t.settle(stored, t.due()...)
				t.heard(c, "ack b 1")
				t.do(leave{c})
				time.Sleep(16 * time.Second)
				if n := t.stats().live; n != 0 {
					t.Errorf("%d sessions are live after the connection's end and a grace period, want none", n)
				}
			})
		})
	}
}

func TestHubEvict(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.publish(c, "s", 1, 1)
		reply := make(chan struct{}, 1)
		t.do(evict{"nobody", reply})
		t.do(evict{"s", make(chan struct{}, 1)})
		t.heard(c, "error session_deleted", "close 4004")
		t.heard(v, "session_ended s")
		if t.stats().sessions != 0 {
			t.Error("it is still in memory")
		}
	})
}

// Who watches a session that is deleted hears all of another under its id.
func TestHubRecordedAgain(t *testing.T) {
	evicted := func(t *hubTest) { t.do(evict{"s", make(chan struct{}, 1)}) }
	for name, remove := range map[string]func(*hubTest, *conn){
		"live": func(t *hubTest, _ *conn) { evicted(t) },
		"deleted in PostgreSQL": func(t *hubTest, _ *conn) {
			time.Sleep(5 * time.Second)
			t.settle(deleted, t.due()...)
		},
		"not in memory": func(t *hubTest, c *conn) {
			t.do(finish{c})
			t.settle(stored, t.due()...)
			evicted(t)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				c, v := t.tracker("s"), t.viewer()
				t.join(v, "s")
				t.publish(c, "s", 5, 1)
				remove(t, c)
				t.messages(v)
				again := t.conn(false)
				t.attach(again, "s", claim{epoch: 1000})
				t.publish(again, "s", 3, 1)
				t.publish(again, "s", 4, 2)
				got := t.messages(v)
				if want := []string{"live s 0+3", "live s 3+4"}; !slices.Equal(got[max(0, len(got)-2):], want) {
					t.Errorf("was sent %q, want %q at last", got, want)
				}
			})
		})
	}
}

// ---- snapshots, lists, the end ----

// A tracker is asked for a full snapshot when the newest is old or missing, and
// not again and again.
func TestHubTakeSnapshot(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		rejoin := func() {
			t.join(v, "s")
			t.messages(v)
		}
		rejoin()
		t.heard(c, "take_snapshot s")
		rejoin()
		t.heard(c)
		time.Sleep(6 * time.Second)
		rejoin()
		t.heard(c, "take_snapshot s")
		t.do(publish{c, t.batchOf("s", 0, `{"type":2}`)})
		time.Sleep(29 * time.Second)
		rejoin()
		t.heard(c) // the newest is not old
		time.Sleep(2 * time.Second)
		rejoin()
		t.heard(c, "take_snapshot s")
		t.do(leave{c})
		time.Sleep(6 * time.Second)
		rejoin() // there is nobody to ask
		t.heard(c)
	})
}

func TestHubLists(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		t.tracker("live")
		gone, over := t.tracker("gone"), t.tracker("over")
		t.publish(over, "over", 2, 0)
		t.do(leave{gone})
		t.do(finish{over})
		reply := make(chan []summary, 1)
		live, _ := ask(t.hub, reply, active{reply})
		var ids []string
		for _, s := range live {
			ids = append(ids, s.id)
			if !s.isActive {
				t.Errorf("%s is listed and not active", s.id)
			}
		}
		slices.Sort(ids)
		if !slices.Equal(ids, []string{"gone", "live"}) {
			t.Errorf("got %v", ids)
		}
		time.Sleep(time.Second)
		st := t.stats()
		if st.sessions != 3 || st.live != 2 || st.events != 2 || st.trackers != 2 || st.viewers != 0 || st.oldest != time.Second {
			t.Errorf("got %+v", st)
		}
		t.settle(stored, t.due()...)
		if st := t.stats(); st.sessions != 2 || st.oldest != 0 {
			t.Errorf("when it is stored: got %+v", st)
		}
	})
}

// When the server stops, all sessions end and the hub runs until everything is
// stored, however often that fails.
func TestHubDrain(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		v := t.viewer()
		for _, id := range []string{"a", "b"} {
			c := t.tracker(id)
			t.publish(c, id, 3, 1)
			t.do(leave{c})
		}
		t.messages(v)
		t.do(drain{})
		ended := t.messages(v)
		slices.Sort(ended)
		if !slices.Equal(ended, []string{"session_ended a", "session_ended b"}) {
			t.Errorf("viewers heard %q", ended)
		}
		work := t.due()
		t.settle(failed, work[0])
		t.settle(stored, work[1])
		w := t.writer()
		time.Sleep(time.Second)
		select {
		case <-t.done:
			t.Fatal("it has stopped before everything was stored")
		default:
		}
		t.settle(stored, <-w...)
		select {
		case <-t.done:
		default:
			t.Error("it runs on though everything is stored")
		}
		reply := make(chan hubStats, 1)
		if _, ok := ask(t.hub, reply, look{reply}); ok {
			t.Error("a hub that has stopped answers")
		}
	})
}

func TestHubStopsWithContext(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		t.publish(c, "s", 1, 1)
		t.stop()
		synctest.Wait()
		select {
		case <-t.done:
		default:
			t.Error("it runs on")
		}
		t.budget.free = testBudget // it gives nothing back any more
	})
}

// ---- the budget ----

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &budget{free: 100}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		if err := b.take(ctx, 60); err != nil || b.free != 40 {
			t.Fatalf("got error %v, %d free", err, b.free)
		}
		through := make(chan string, 4)
		wait := func(ctx context.Context, name string, n int64) {
			go func() { // ends when it has room, or with ctx
				if b.take(ctx, n) != nil {
					name += " gave up"
				}
				through <- name
			}()
			synctest.Wait()
		}
		after := func(n int64, want string) {
			t.Helper()
			b.give(n)
			synctest.Wait()
			got := ""
			if len(through) > 0 {
				got = <-through
			}
			if got != want || len(through) > 0 {
				t.Errorf("after %d more: got %q through, want %q", n, got, want)
			}
		}
		wait(ctx, "first", 50)
		wait(ctx, "second", 10) // there is room, but another came first
		gone, leave := context.WithCancel(ctx)
		wait(gone, "third", 10)
		wait(ctx, "fourth", 10)
		leave()
		after(0, "third gave up")
		after(9, "")
		after(1, "first")
		after(10, "second")
		after(12, "fourth")
		if b.free != 2 {
			t.Errorf("got %d free, want 2", b.free)
		}
	})
}

// Messages of which a part is read take at most half of the budget, so that
// those who stall do not keep out the others; but one of them may always go on,
// beyond the half and the budget: they would wait for each other.
func TestBudgetGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(100)
		ctx := context.Background()
		if n, err := b.grow(ctx, 40, 1000); n != 40 || err != nil {
			t.Fatalf("got %d, %v", n, err)
		}
		if n, err := b.grow(ctx, 40, 30); n != 30 || err != nil || b.free != 30 {
			t.Fatalf("beyond the half, but no more than it may need: got %d, %v, %d free", n, err, b.free)
		}
		var grown, taken atomic.Int64
		gone, leave := context.WithCancel(ctx)
		go b.grow(gone, 10, 500)                                     // ends with leave
		go func() { n, _ := b.grow(ctx, 10, 500); grown.Store(n) }() // ends when it is let through
		check := func(when string, wantGrown, wantTaken, wantFree int64) {
			t.Helper()
			synctest.Wait()
			if grown.Load() != wantGrown || taken.Load() != wantTaken || b.free != wantFree {
				t.Errorf("%s: %d grown, %d taken, %d free, want %d, %d, %d", when, grown.Load(), taken.Load(), b.free, wantGrown, wantTaken, wantFree)
			}
		}
		check("another is beyond the half", 0, 0, 30)
		leave()
		b.take(ctx, 30) // who begins a message need not wait for those who grow
		check("nothing is left", 0, 0, 0)
		b.finish(0, 30)
		check("one message is whole", 500, 0, -500)
		go func() { b.take(ctx, 1); taken.Store(1) }() // ends when it is let through
		check("beyond the budget", 500, 0, -500)
		b.give(500)
		check("no room yet", 500, 0, 0)
		b.give(101)
		check("room", 500, 1, 100)
	})
}

// When the server stops, nobody waits for room any more.
func TestBudgetOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &budget{free: 10}
		var passed atomic.Int64
		for range 3 {
			go func() { // ends with open
				if b.take(context.Background(), 100) == nil {
					passed.Add(1)
				}
			}()
			synctest.Wait()
		}
		b.open()
		synctest.Wait()
		if b.take(context.Background(), 100); passed.Load() != 3 || b.free != -390 {
			t.Errorf("%d of 3 are through, %d free", passed.Load(), b.free)
		}
		if n, err := b.grow(context.Background(), 5, 100); n != 5 || err != nil {
			t.Errorf("grow: got %d, %v", n, err)
		}
	})
}

// BenchmarkHubPublish is what a batch costs the hub: numbered, kept, fanned out,
// handed to a writer that stores at once, acked and dropped.
func BenchmarkHubPublish(b *testing.B) {
	for _, n := range []struct{ sessions, viewers int }{{100, 0}, {20, 40}, {1, 500}} {
		b.Run(fmt.Sprintf("sessions=%d/viewers=%d", n.sessions, n.viewers), func(b *testing.B) { benchmarkPublish(b, n.sessions, n.viewers) })
	}
}

func benchmarkPublish(b *testing.B, sessions, viewers int) {
	h := newHub(hubConfig{batchSize: 50, batchInterval: time.Second, grace: time.Minute, maxEvents: 20000, maxTailBytes: 1 << 20, maxSessionBytes: 1 << 50},
		newBudget(1<<50), newMetrics())
	srv := &server{cfg: config{heartbeat: time.Minute}, hub: h, budget: h.budget, metrics: h.metrics, log: slog.New(slog.DiscardHandler)}
	ctx, stop := context.WithCancel(b.Context())
	defer stop()
	go h.run(ctx)
	go func() { // ends with the hub
		for reply := make(chan []*flush, 1); ; {
			work, ok := ask(h, reply, take{reply})
			if !ok {
				return
			}
			h.send(settled{work}) // an outcome is stored unless it is set
		}
	}()
	connect := func(viewer bool) *conn {
		c := &conn{srv: srv, viewer: viewer, ctx: ctx, cancel: func() {}}
		c.out.writing = true // nobody does; the benchmark empties the outboxes
		h.send(enter{c})
		return c
	}
	trackers, batches := make([]*conn, sessions), make([]*batch, sessions)
	for i := range trackers {
		trackers[i] = connect(false)
		id := fmt.Sprintf("s%d", i)
		reply := make(chan attached, 1)
		ask(h, reply, attach{trackers[i], id, claim{epoch: 1}, aboutNobody, sessionStarted(id, aboutNobody), reply})
		f, _ := parseFrame([]byte(`{"type":"events_batch","data":{"events":[` + strings.Repeat(`{"type":3,"timestamp":1,"data":{}},`, 9) + `{}]}}`))
		batches[i] = newBatch(id, f, 0)
	}
	watching := make([]*conn, viewers)
	for i := range watching {
		watching[i] = connect(true)
		reply := make(chan bool, 1)
		ask(h, reply, join{watching[i], fmt.Sprintf("s%d", i%sessions), nil, reply})
	}
	b.ReportAllocs()
	for n := int64(1); b.Loop(); n++ {
		i := int(n) % sessions
		again := *batches[i]
		again.seq = n
		h.send(publish{trackers[i], &again})
		if n%int64(sessions) == 0 {
			for _, c := range watching {
				c.out.mu.Lock()
				c.out.queue, c.out.bytes = c.out.queue[:0], 0
				c.out.mu.Unlock()
			}
		}
	}
}
