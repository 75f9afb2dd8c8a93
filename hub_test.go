package main

// The hub by its commands alone: no socket, no database, and a clock of the
// test's own (testing/synctest). Connections are their outboxes, which nobody
// empties but the test; the writer is the test.

import (
	"bytes"
	"context"
	"fmt"
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
	stop   context.CancelFunc
	asking chan []*flush // take has asked and had no answer
}

// inHub runs a test with a hub, whose settings it may change first, and checks
// at its end that all room is given back once every session has ended.
func inHub(t *testing.T, change func(*config), test func(*hubTest)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cfg := config{batchSize: 50, batchInterval: 5 * time.Second, grace: 15 * time.Second, maxEvents: 20000,
			maxBufferBytes: testBudget, maxSessionBytes: 1 << 30}
		if change != nil {
			change(&cfg)
		}
		ctx, stop := context.WithCancel(context.Background())
		ht := &hubTest{T: t, hub: newHub(cfg, newBudget(testBudget), newMetrics()), stop: stop}
		go ht.run(ctx) // ends with ctx, or when it is drained
		defer func() {
			stop()
			<-ht.done
		}()
		test(ht)
		ht.drainAll()
		if ht.budget.free != testBudget {
			t.Errorf("%d bytes of room are not given back", testBudget-ht.budget.free)
		}
	})
}

// drainAll ends every session and stores what is left.
func (t *hubTest) drainAll() {
	t.Helper()
	t.do(drain{})
	for range 1000 {
		if t.stopped() {
			return
		}
		if work, ok := t.take(); ok {
			t.settle(stored, work...)
		}
		time.Sleep(maxPause)
		synctest.Wait()
	}
	t.Fatal("the hub is never drained")
}

func (t *hubTest) stopped() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// do gives the hub a command and waits until it has done all that follows.
func (t *hubTest) do(cmd command) {
	t.send(cmd)
	synctest.Wait()
}

// askHub does a command that has a reply.
func askHub[R any](t *hubTest, cmd func(reply chan R) command) R {
	t.Helper()
	reply := make(chan R, 1)
	r, ok := ask(t.hub, reply, cmd(reply))
	if !ok {
		t.Fatal("the hub has stopped")
	}
	synctest.Wait()
	return r
}

// viewer is one that has had its first list.
func (t *hubTest) viewer() *outbox {
	t.Helper()
	out := newOutbox()
	t.do(enter{out, true})
	t.heard(out, "list")
	return out
}

// idle is a tracker's connection that records nothing yet.
func (t *hubTest) idle() *outbox {
	out := newOutbox()
	t.do(enter{out, false})
	return out
}

// tracker records a new session.
func (t *hubTest) tracker(id string) *outbox {
	t.Helper()
	out := t.idle()
	t.attach(out, id, claim{})
	return out
}

var aboutNobody = &description{userID: "u", metadata: []byte("{}"), brief: []byte("{}")}

// attach makes out the tracker of a session under an epoch, as one with its token.
func (t *hubTest) attach(out *outbox, id string, cl claim) attached {
	t.Helper()
	if got := t.reserve(out, id, true, aboutNobody.cost()); got != granted {
		t.Fatalf("reserve: got %d", got)
	}
	return t.attachAs(out, id, cl, aboutNobody)
}

func (t *hubTest) attachAs(out *outbox, id string, cl claim, about *description) attached {
	t.Helper()
	cl.epoch = max(cl.epoch, 1)
	if cl.snapshot == 0 {
		cl.snapshot = -1
	}
	return askHub(t, func(reply chan attached) command {
		return attach{out, id, cl, about, sessionStarted(id, about), 0, false, reply}
	})
}

func (t *hubTest) reserve(out *outbox, id string, byToken bool, cost int64) reservation {
	t.Helper()
	return askHub(t, func(reply chan reservation) command { return reserve{out, id, byToken, false, cost, reply} })
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
	if err != nil || !f.objects {
		t.Fatalf("batch: %v", err)
	}
	b := newBatch(id, f, seq)
	t.budget.give(-b.cost)
	return b
}

func (t *hubTest) publish(out *outbox, id string, n int, seq int64) *batch {
	t.Helper()
	b := t.batch(id, n, seq, 0)
	t.do(publish{out, "", b, nil})
	return b
}

func (t *hubTest) report(out *outbox, kind string) {
	b := newReport(kind, []byte(`{}`), 0)
	t.budget.give(-b.cost)
	m := message(nil)
	if kind != "error" {
		m = text(`{"type":"` + kind + `","data":{"sessionId":"s"}}`)
	}
	t.do(publish{out, "", b, m})
}

// messages empties a connection's outbox and says briefly what was in it.
func (t *hubTest) messages(out *outbox) (all []string) {
	t.Helper()
	for {
		m, last := out.next()
		if m == nil {
			if last != nil {
				all = append(all, fmt.Sprintf("close %d", last.code))
			}
			return all
		}
		parsed, err := parseMessage(m.encode())
		if err != nil {
			t.Fatal(err)
		}
		words := strings.Fields(heard(parsed))
		switch words[0] {
		case "joined":
			words = words[:3]
		case "list":
			words = words[:1]
		}
		all = append(all, strings.Join(words, " "))
	}
}

// heard checks what a connection was sent since it was last looked at.
func (t *hubTest) heard(out *outbox, want ...string) {
	t.Helper()
	if got := t.messages(out); !slices.Equal(got, want) {
		t.Errorf("was sent %q, want %q", got, want)
	}
}

func (t *hubTest) join(out *outbox, id string) bool { return t.joinStored(out, id, nil) }

func (t *hubTest) joinStored(out *outbox, id string, stored *summary) bool {
	t.Helper()
	return askHub(t, func(reply chan bool) command { return join{out, id, stored, reply} })
}

// writer is a free one; it returns what it gets.
func (t *hubTest) writer() chan []*flush {
	reply := make(chan []*flush, 1)
	t.do(nextWork{reply})
	return reply
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

// due takes the work that must be there now; later, after BATCH_INTERVAL.
func (t *hubTest) due() []*flush {
	t.Helper()
	work, ok := t.take()
	if !ok {
		t.Fatal("there is no work, want some")
	}
	return work
}

func (t *hubTest) later() []*flush {
	t.Helper()
	time.Sleep(5 * time.Second)
	return t.due()
}

// settle hands flushes back with an outcome.
func (t *hubTest) settle(result outcome, work ...*flush) {
	for _, f := range work {
		f.outcome = result
	}
	t.do(flushDone{work})
}

// sessionsOf names the sessions of some work, in order.
func sessionsOf(work []*flush) (ids []string) {
	for _, f := range work {
		ids = append(ids, f.session)
	}
	return ids
}

func (t *hubTest) find(id string, from, to int64) inMemory {
	t.Helper()
	return askHub(t, func(reply chan inMemory) command { return memoryQuery{id, from, to, reply} })
}

func (t *hubTest) evict(id string) {
	t.Helper()
	askHub(t, func(reply chan struct{}) command { return evict{id, reply} })
}

func (t *hubTest) stats() hubStats {
	t.Helper()
	return askHub(t, func(reply chan hubStats) command { return statsQuery{reply} })
}

func (t *hubTest) used() int64 { return testBudget - t.budget.left() }

// ---- events ----

// Events are numbered in the order in which they come, and their number stands
// in the live message.
func TestHubNumbers(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		a, b := t.tracker("a"), t.idle()
		t.attach(b, "b", claim{epoch: 4, counters: counters{events: 1000000, seq: 9, snapshot: 7}})
		viewer := t.viewer()
		t.join(viewer, "a")
		t.join(viewer, "b")
		for i, n := range []int{1, 3, 0, 2} {
			t.publish(a, "a", n, int64(i+1))
			t.publish(b, "b", n, 0)
		}
		t.heard(viewer, "joined a 0", "joined b 1000000", "live a 0+1", "live b 1000000+1",
			"live a 1+3", "live b 1000001+3", "live a 4+2", "live b 1000004+2")
		got := t.find("a", 0, 100)
		if now := got.session.now; !got.ok || now.events != 6 || now.seq != 4 || now.snapshot != -1 || len(got.batches) != 4 {
			t.Errorf("got %+v with %d batches, want 6 events, seq 4, 4 batches", now, len(got.batches))
		}
	})
}

// A seq that was taken is acked if it is stored, and dropped; a gap is refused.
func TestHubSequence(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c := t.tracker("s")
		for _, step := range []struct {
			seq  int64
			says []string
		}{{2, []string{"error sequence_gap 1"}}, {1, nil}, {1, nil}, {3, []string{"error sequence_gap 2"}}, {2, nil}, {1, nil}} {
			t.publish(c, "s", 2, step.seq)
			t.heard(c, step.says...)
		}
		t.settle(stored, t.later()...)
		t.heard(c, "ack s 2")
		t.publish(c, "s", 2, 2)
		t.heard(c, "ack s 2")
		if now := t.find("s", 0, 0).session.now; now.events != 4 || t.metrics.refusals["sequence_gap"] != 2 {
			t.Errorf("got %d events, refusals %v, want 4 and 2 gaps", now.events, t.metrics.refusals)
		}
	})
}

// A batch's frame is the live message, byte for byte the events that came.
func TestHubFrame(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, events := t.tracker("s"), oddEvents()
		var raw []string
		for _, e := range events {
			raw = append(raw, string(e))
		}
		t.do(publish{c, "", t.batchOf("s", 1, `{"type":2,"timestamp":5}`), nil})
		b := t.batchOf("s", 2, raw...)
		t.do(publish{c, "", b, nil})
		m, err := parseMessage(b.frame)
		if err != nil || m.Data.FromIndex != 1 || m.Data.SessionID != "s" {
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
		t.do(publish{c, "", t.batchOf("s", 1, `{"type":4,"timestamp":50}`, `{"type":2,"timestamp":20}`, `{"type":3}`), nil})
		t.do(publish{c, "", t.batchOf("s", 2, `{"type":3,"timestamp":30}`, `{"type":"2","timestamp":"70"}`, `{"type":3,"timestamp":-9}`), nil})
		want := counters{events: 6, seq: 2, firstTime: -9, endTime: 50, snapshot: 1}
		got := t.find("s", 0, 0).session.now
		want.raw = got.raw
		if got != want || got.raw < 100 {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}

// Errors go to the session's viewers, numbered and counted; what viewers need
// not know does not.
func TestHubReports(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v, other := t.idle(), t.viewer(), t.viewer()
		t.attach(c, "s", claim{epoch: 2, counters: counters{errors: 5}})
		t.join(v, "s")
		t.messages(v)
		t.messages(other)
		t.report(c, "error")
		t.report(c, "javascript_error")
		t.do(forward{c, text(`{"type":"visibility_change","data":{"sessionId":"s"}}`)})
		t.heard(v, "javascript_error s", "visibility_change s")
		t.heard(other)
		t.do(finish{c})
		f := t.due()[0]
		if len(f.batches) != 2 || f.batches[0].report.id != 5 || f.batches[1].report.id != 6 || f.totals.errors != 7 || f.totals.events != 0 {
			t.Errorf("got %d reports, %+v, want numbers 5 and 6, then 7 errors", len(f.batches), f.totals)
		}
		t.settle(stored, f)
		t.report(c, "error") // it records nothing any more
		t.heard(c, "take_snapshot s", "error no_session")
		t.heard(v, "ended s")
	})
}

func TestHubSessionFull(t *testing.T) {
	inHub(t, func(c *config) { c.maxSessionBytes = 200 }, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.publish(c, "s", 3, 1)
		t.publish(c, "s", 4, 2)
		t.publish(c, "s", 1, 3)
		t.heard(c, "error session_full", "error no_session")
		t.heard(v, "ended s")
		if t.stats().live != 0 || t.metrics.refusals["session_bytes"] != 1 {
			t.Errorf("got %d live, refusals %v", t.stats().live, t.metrics.refusals)
		}
		f := t.due()[0]
		if f.totals.events != 3 || !f.ended {
			t.Errorf("got %d events, ended %v", f.totals.events, f.ended)
		}
		t.settle(stored, f)
	})
}

// ---- viewers ----

// Wherever the session's events are (pending, with the writer, kept, trimmed)
// when a viewer joins, live goes on where the answer says.
func TestHubJoinAtAnyMoment(t *testing.T) {
	inHub(t, func(c *config) { c.maxEvents = 8 }, func(t *hubTest) {
		c := t.tracker("s")
		var viewers []*outbox
		for i := range 40 {
			v := t.viewer()
			if !t.join(v, "s") {
				t.Fatal("it cannot be joined")
			}
			viewers = append(viewers, v)
			t.publish(c, "s", 2, int64(i+1))
			if i%5 == 3 { // commits come late and at odd moments
				work := t.later()
				t.publish(c, "s", 0, 0)
				t.settle(stored, work...)
			}
		}
		for i, v := range viewers {
			want := []string{fmt.Sprintf("joined s %d", 2*i)}
			for at := 2 * i; at < 80; at += 2 {
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
		t.joinStored(v, "s", &summary{id: "s", about: aboutNobody, now: counters{events: 1, snapshot: -1}})
		t.joinStored(v, "other", &summary{id: "other", about: aboutNobody, now: counters{events: 5, snapshot: -1}})
		t.heard(v, "started s", "joined s 3", "joined other 5")
		back := t.idle()
		t.attach(back, "other", claim{epoch: 3, counters: counters{events: 5}})
		t.publish(back, "other", 1, 0)
		t.heard(v, "started other", "live other 5+1")
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
					t.do(publish{c, "", t.batch("s", 1, int64(n+1), size), nil})
					t.heard(fast, fmt.Sprintf("live s %d+1", n))
					if len(slow.queue) > outboxMessages || slow.bytes > 4<<20+size+200 {
						t.Fatalf("the outbox has %d messages, %d bytes", len(slow.queue), slow.bytes)
					}
				}
				read := t.messages(slow)
				if lagged := t.metrics.viewersLagged.Load(); lagged != 1 || read[0] != "joined s 0" || len(read) >= n {
					t.Fatalf("got %d lagging viewers and %d messages from %q on, want 1 and some of %d", lagged, len(read), read[0], n)
				}
				for i, m := range read[1:] {
					if want := fmt.Sprintf("live s %d+1", i); m != want {
						t.Fatalf("got %q, want %q", m, want)
					}
				}
				t.publish(c, "s", 1, 0) // before the hub has noticed that it reads
				time.Sleep(time.Second)
				t.publish(c, "s", 2, 0)
				t.heard(slow, "list", fmt.Sprintf("lagged s %d", n+1), fmt.Sprintf("live s %d+2", n+1))
				t.heard(fast, fmt.Sprintf("live s %d+1", n), fmt.Sprintf("live s %d+2", n+1))
				t.do(leave{slow})
				time.Sleep(time.Second)
				t.heard(slow)
			})
		})
	}
}

// A viewer that joins while it lags is answered all the same; what comes before it
// has read is told as missed, also that the session has ended.
func TestHubJoinWhileLagging(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), newOutbox()
		t.do(enter{v, true})
		for range outboxMessages {
			v.trySend(sessionEnded("x"), 1<<20)
		}
		t.publish(c, "s", 3, 1)
		t.do(forward{c, text("{}")})
		t.join(v, "s")
		t.publish(c, "s", 1, 2)
		all := slices.DeleteFunc(t.messages(v), func(m string) bool { return m == "list" || m == "ended x" })
		t.do(finish{c})
		for range 5 {
			time.Sleep(time.Second)
			all = append(all, t.messages(v)...)
		}
		all = slices.DeleteFunc(all, func(m string) bool { return m == "list" })
		if want := []string{"joined s 3", "lagged s 4", "ended s"}; !slices.Equal(all, want) {
			t.Errorf("was sent %q, want %q", all, want)
		}
	})
}

// Viewers share what may wait for them: the more there are, the less for each,
// and the shorter the lists.
func TestHubShare(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		large := &description{userID: "u", metadata: []byte("{}"), brief: []byte(`{"x":"` + strings.Repeat("x", 8000) + `"}`)}
		for i := range 3 * outgoingMin / 4 / 8000 {
			t.reserve(t.idle(), fmt.Sprint("large", i), true, 0)
			t.attachAs(t.idle(), fmt.Sprint("large", i), claim{}, large)
		}
		for n := 1; n <= 8; n++ {
			v := newOutbox()
			t.do(enter{v, true})
			if most := min(4<<20, outgoingMin/n); v.bytes > most || v.bytes < most/2 {
				t.Errorf("of %d viewers one got a list of %d bytes, want about %d", n, v.bytes, most)
			}
		}
	})
}

// Whoever asks waits until the answer is sent; what is not asked for has no part
// in that.
func TestOutboxWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutbox()
		for range 3 {
			o.send(sessionEnded("s"))
		}
		o.trySend(sessionEnded("live"), 1000)
		var waited atomic.Bool
		go func() { waited.Store(o.wait(t.Context()) == nil) }() // ends when three are sent
		for i := range 4 {
			if synctest.Wait(); waited.Load() {
				t.Errorf("it waits no more when the message %d of 3 is not sent", i)
			}
			o.next() // the one before is sent
		}
		if synctest.Wait(); !waited.Load() {
			t.Error("it still waits when all three are sent")
		}
		o.ack("s", 1)
		o.ack("s", 2)
		o.ack("t", 1)
		o.closeAfterSending(4001, "why")
		o.send(sessionEnded("too late"))
		var all []string
		for m, last := o.next(); ; m, last = o.next() {
			if m == nil {
				all = append(all, last.reason)
				break
			}
			all = append(all, string(m.encode()))
		}
		want := []string{string(ack{"s", 2}.encode()), string(ack{"t", 1}.encode()), "why"}
		if !slices.Equal(all, want) {
			t.Errorf("got %q, want %q", all, want)
		}
	})
}

// A tracker is asked for a full snapshot when the newest is old or missing, and
// not again and again.
func TestHubTakeSnapshot(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		rejoin := func(pause time.Duration, want ...string) {
			t.Helper()
			time.Sleep(pause)
			t.join(v, "s")
			t.messages(v)
			t.heard(c, want...)
		}
		rejoin(0, "take_snapshot s")
		rejoin(0)
		rejoin(6*time.Second, "take_snapshot s")
		t.do(publish{c, "", t.batchOf("s", 0, `{"type":2}`), nil})
		rejoin(29 * time.Second) // the newest is not old
		rejoin(2*time.Second, "take_snapshot s")
		t.do(leave{c})
		rejoin(6 * time.Second) // there is nobody to ask
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

// Who watches a session that is deleted hears all of another under its id.
func TestHubRecordedAgain(t *testing.T) {
	for name, remove := range map[string]func(*hubTest, *outbox){
		"live":                  func(t *hubTest, _ *outbox) { t.evict("s") },
		"deleted in PostgreSQL": func(t *hubTest, _ *outbox) { t.settle(deleted, t.later()...) },
		"not in memory": func(t *hubTest, c *outbox) {
			t.do(finish{c})
			t.settle(stored, t.due()...)
			t.evict("s")
		},
	} {
		t.Run(name, func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				c, v := t.tracker("s"), t.viewer()
				t.join(v, "s")
				t.publish(c, "s", 5, 1)
				remove(t, c)
				t.messages(v)
				again := t.idle()
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

// ---- memory ----

// Past MAX_EVENTS_PER_SESSION the older half goes, of what is committed only.
func TestHubTrim(t *testing.T) {
	inHub(t, func(c *config) { c.maxEvents = 10 }, func(t *hubTest) {
		c := t.tracker("s")
		want := func(from, to int64) {
			t.Helper()
			gotFrom, gotTo := int64(-1), int64(-1)
			for _, b := range t.find("s", 0, 1<<40).batches {
				if gotFrom < 0 {
					gotFrom = b.first
				} else if b.first != gotTo {
					t.Errorf("a gap in memory at %d", b.first)
				}
				gotTo = b.end()
			}
			if gotFrom != from || gotTo != to {
				t.Errorf("in memory are the events %d to %d, want %d to %d", gotFrom, gotTo, from, to)
			}
		}
		publish := func(times, n int) {
			for range times {
				t.publish(c, "s", n, 0)
			}
		}
		publish(7, 2)
		want(0, 14) // nothing of it is committed
		t.settle(stored, t.later()...)
		want(10, 14) // 4 of 5 would be too many
		publish(3, 2)
		t.settle(stored, t.later()...)
		want(10, 20) // as many as may be
		publish(1, 1)
		want(10, 21)
		t.settle(stored, t.later()...)
		want(16, 21)
		publish(1, 30)
		t.settle(stored, t.later()...)
		want(-1, -1) // a batch is kept whole or not at all
		if st := t.stats(); st.events != 51 || st.tailBytes != 0 {
			t.Errorf("got %+v, want 51 events, no tail", st)
		}
	})
}

// What is committed takes a share of the budget at most; descriptions too.
func TestHubShares(t *testing.T) {
	inHub(t, func(c *config) { c.maxBufferBytes = 40000 }, func(t *hubTest) {
		a, b := t.tracker("a"), t.tracker("b")
		for range 4 {
			t.do(publish{a, "", t.batch("a", 1, 0, 1500), nil})
			t.do(publish{b, "", t.batch("b", 1, 0, 1500), nil})
			t.settle(stored, t.later()...)
			if st := t.stats(); st.tailBytes > 10000 || t.used() != st.tailBytes+2*aboutNobody.cost() {
				t.Fatalf("tails have %d bytes, %d of room are taken", st.tailBytes, t.used())
			}
		}
		if t.stats().tailBytes == 0 {
			t.Error("nothing is kept")
		}
		if got := t.reserve(t.idle(), "c", false, 4000); got != noRoom {
			t.Errorf("a third session: got %d, want no room", got)
		}
		if got := t.reserve(a, "a", true, 4000); got != granted { // one that is there may come back
			t.Errorf("a session that is there: got %d, want granted", got)
		}
		t.do(unreserve{"a"})
	})
}

func TestHubInMemory(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		if t.find("s", 0, 9).ok {
			t.Error("found a session that is not there")
		}
		c := t.tracker("s")
		t.publish(c, "s", 10, 0) // kept
		t.settle(stored, t.later()...)
		t.publish(c, "s", 10, 0) // with the writer
		writing := t.later()
		t.publish(c, "s", 10, 0) // pending
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
	for _, result := range []outcome{stored, refused, epochLost, deleted} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("outcome %d, more while writing %v", result, late), func(t *testing.T) {
				inHub(t, nil, func(t *hubTest) {
					c := t.tracker("s")
					t.publish(c, "s", 5, 1)
					t.report(c, "error")
					work := t.later()
					if late {
						t.publish(c, "s", 5, 2)
						t.report(c, "error")
					}
					if t.settle(result, work...); result != stored && t.used() != 0 {
						t.Errorf("%d bytes are in use, want none", t.used())
					}
				})
			})
		}
	}
	t.Run("deleted while it is written", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			c := t.tracker("s")
			t.publish(c, "s", 5, 1)
			work := t.later()
			t.publish(c, "s", 5, 2)
			if t.evict("s"); t.used() != work[0].cost() {
				t.Errorf("%d bytes are in use, want those of the flush that is being written, %d", t.used(), work[0].cost())
			}
			if t.settle(deleted, work...); t.used() != 0 {
				t.Errorf("%d bytes are in use, want none", t.used())
			}
		})
	})
	t.Run("dropped while it waits to be tried again", func(t *testing.T) {
		inHub(t, nil, func(t *hubTest) {
			c := t.tracker("s")
			t.publish(c, "s", 5, 1)
			t.settle(failed, t.later()...)
			t.attach(c, "s", claim{epoch: 9, counters: counters{events: 77}})
			if want := aboutNobody.cost(); t.used() != want {
				t.Errorf("%d bytes are in use, want %d for the session itself", t.used(), want)
			}
			t.publish(c, "s", 1, 1)
			f := t.later()[0]
			if len(f.batches) != 1 || f.batches[0].first != 77 || f.epoch != 9 {
				t.Errorf("got %d batches from %d on, epoch %d", len(f.batches), f.batches[0].first, f.epoch)
			}
			t.settle(stored, f)
		})
	})
}

// ---- who records ----

func TestHubAttach(t *testing.T) {
	for _, tt := range []struct {
		name                    string
		held, ended, returns    bool // by a live connection; it has ended; the same connection
		epoch                   int64
		outdated                bool
		oldHears, viewerHears   []string
		next, accepted          int64 // where its events go on; 3 are in memory, seq 1
		storedEvents, storedSeq int64 // of the row
	}{
		{name: "a free session", epoch: 2, next: 3, accepted: 1},
		{name: "an ended one", ended: true, epoch: 2, viewerHears: []string{"started s"}, next: 3, accepted: 1},
		{name: "held by another", held: true, epoch: 2, oldHears: []string{"close 4001"}, next: 3, accepted: 1},
		{name: "held by itself", held: true, epoch: 2, returns: true, next: 3, accepted: 1},
		{name: "an older claim", epoch: 1, outdated: true, next: 3},
		{name: "claims for nothing between, nothing stored", epoch: 7, next: 3, accepted: 1},
		{name: "another server had it", epoch: 7, storedEvents: 70, storedSeq: 30, next: 70, accepted: 30},
		{name: "another server had it, and an old connection is still there", held: true, epoch: 7, storedEvents: 70, storedSeq: 30,
			oldHears: []string{"close 4001"}, next: 70, accepted: 30},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				old, v := t.idle(), t.viewer()
				t.attach(old, "s", claim{epoch: 2})
				t.publish(old, "s", 3, 1)
				t.messages(v)
				switch {
				case tt.ended:
					t.do(finish{old})
					t.heard(v, "ended s")
				case !tt.held:
					t.do(leave{old})
				}
				c := old
				if !tt.returns {
					c = t.idle()
				}
				if tt.epoch == 2 {
					tt.epoch = 3
				}
				at := t.attach(c, "s", claim{epoch: tt.epoch, counters: counters{events: tt.storedEvents, seq: tt.storedSeq}})
				if want := (attached{tt.outdated, tt.accepted, tt.storedSeq}); at != want {
					t.Errorf("got %+v, want %+v", at, want)
				}
				t.publish(c, "s", 1, 0)
				if tt.outdated {
					t.heard(c, "error no_session")
					tt.next--
				}
				if c != old {
					t.heard(old, tt.oldHears...)
				}
				t.heard(v, tt.viewerHears...)
				if n := t.find("s", 0, 0).session.now.events; n != tt.next+1 {
					t.Errorf("the session has %d events, want %d", n, tt.next+1)
				}
			})
		})
	}
}

// A session that a live connection records, or is about to, is not to be had
// without its token.
func TestHubReserve(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		other := t.idle()
		check := func(when string, byToken bool, want reservation) {
			t.Helper()
			got := t.reserve(other, "s", byToken, 0)
			if got != want {
				t.Errorf("%s: got %d, want %d", when, got, want)
			}
			if got == granted {
				t.do(unreserve{"s"})
			}
		}
		check("not there", false, granted)
		c := t.idle()
		t.reserve(c, "s", false, 0)
		check("about to be recorded", false, taken)
		check("about to be recorded, with the token", true, granted)
		check("about to be recorded", false, taken)
		t.attachAs(c, "s", claim{}, aboutNobody)
		check("live", false, taken)
		check("live, with the token", true, granted)
		if got := t.reserve(c, "s", false, 0); got != granted {
			t.Errorf("its own: got %d, want granted", got)
		}
		t.do(unreserve{"s"})
		t.do(leave{c})
		check("in its grace period", false, granted)
		c = t.idle()
		t.attach(c, "s", claim{epoch: 2})
		t.do(finish{c})
		check("ended", false, granted)
	})
}

// A row with a newer epoch means another server, unless a claim of our own is on
// its way: the flush is tried again then, under the new epoch.
func TestHubEpochLost(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v, next := t.tracker("s"), t.viewer(), t.idle()
		t.publish(c, "s", 1, 1)
		work := t.later()
		t.reserve(next, "s", true, 0)
		t.settle(epochLost, work...)
		t.heard(c)
		time.Sleep(time.Second)
		t.settle(epochLost, t.due()...) // it takes its time
		t.attachAs(next, "s", claim{epoch: 2}, aboutNobody)
		t.heard(c, "close 4001")
		time.Sleep(time.Second)
		again := t.due()
		if again[0] != work[0] || again[0].epoch != 2 {
			t.Errorf("got epoch %d, want the same flush under 2", again[0].epoch)
		}
		t.attach(next, "s", claim{epoch: 3}) // while it is written: under 2
		t.settle(epochLost, again...)
		t.settle(stored, t.due()...)
		t.heard(next, "ack s 1")
		t.publish(next, "s", 1, 2)
		t.settle(epochLost, t.later()...) // nobody of ours: another server
		t.heard(next, "close 4001")
		t.heard(v)
		if t.find("s", 0, 9).ok {
			t.Error("it is still in memory")
		}
	})
}

// ---- grace and end ----

func TestHubGrace(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("s"), t.viewer()
		t.do(leave{c})
		time.Sleep(14 * time.Second)
		t.heard(v)
		back := t.idle()
		t.attach(back, "s", claim{epoch: 2})
		time.Sleep(time.Hour)
		t.heard(v) // it was not away
		t.do(leave{back})
		time.Sleep(16 * time.Second)
		t.heard(v, "ended s")
		work := t.due()
		if !work[0].ended {
			t.Error("the last flush does not end it")
		}
		t.settle(stored, work...)
		if st := t.stats(); st.sessions != 0 {
			t.Errorf("got %+v, want it out of memory", st)
		}
		t.attach(t.idle(), "s", claim{epoch: 3})
		t.heard(v, "started s")
	})
}

// A tracker that turns to another session leaves the first to its grace period.
func TestHubChangesSession(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, v := t.tracker("a"), t.viewer()
		t.attach(c, "b", claim{})
		t.publish(c, "b", 1, 0)
		t.heard(v, "started b")
		time.Sleep(16 * time.Second)
		t.heard(v, "ended a")
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
		t.heard(v, "joined s 0", "live s 0+2", "ended s")
		if s := t.find("s", 0, 9).session; s.isActive || s.now.events != 2 {
			t.Errorf("got active %v, %d events", s.isActive, s.now.events)
		}
		work := t.due() // at once
		if f := work[0]; !f.ended || f.totals.events != 2 {
			t.Errorf("got ended %v, %d events", f.ended, f.totals.events)
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
		if at := t.attach(c, "s", claim{epoch: 2}); at.accepted != 1 {
			t.Errorf("got %+v", at)
		}
		t.settle(stored, work...)
		t.publish(c, "s", 1, 2)
		work = t.later()
		if f := work[0]; f.ended || f.epoch != 2 || f.batches[0].first != 2 {
			t.Errorf("got ended %v, epoch %d, from %d on", f.ended, f.epoch, f.batches[0].first)
		}
		t.settle(stored, work...)
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
		if !slices.Equal(ended, []string{"ended a", "ended b"}) {
			t.Errorf("viewers heard %q", ended)
		}
		work := t.due()
		t.settle(failed, work[0])
		t.settle(stored, work[1])
		w := t.writer()
		if time.Sleep(time.Second); t.stopped() {
			t.Fatal("it has stopped before everything was stored")
		}
		if t.settle(stored, <-w...); !t.stopped() {
			t.Error("it runs on though everything is stored")
		}
		if _, ok := ask(t.hub, make(chan hubStats, 1), statsQuery{}); ok {
			t.Error("a hub that has stopped answers")
		}
	})
}

func TestHubStopsWithContext(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		t.publish(t.tracker("s"), "s", 1, 1)
		t.stop()
		if synctest.Wait(); !t.stopped() {
			t.Error("it runs on")
		}
		t.budget.free = testBudget // it gives nothing back any more
	})
}

func TestHubLists(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		t.tracker("live")
		gone, over := t.tracker("gone"), t.tracker("over")
		t.publish(over, "over", 2, 0)
		t.do(leave{gone})
		t.do(finish{over})
		var ids []string
		for _, s := range askHub(t, func(reply chan []summary) command { return liveQuery{reply} }) {
			if ids = append(ids, s.id); !s.isActive {
				t.Errorf("%s is listed and not active", s.id)
			}
		}
		slices.Sort(ids)
		time.Sleep(time.Second)
		want := hubStats{sessions: 3, live: 2, events: 2, trackers: 2, oldest: time.Second}
		if st := t.stats(); st != want || !slices.Equal(ids, []string{"gone", "live"}) {
			t.Errorf("got %v and %+v, want gone, live and %+v", ids, st, want)
		}
		t.settle(stored, t.due()...)
		if st := t.stats(); st.sessions != 2 || st.oldest != 0 {
			t.Errorf("when it is stored: got %+v", st)
		}
	})
}

// ---- the way to the writers ----

// A flush starts when BATCH_INTERVAL has passed since the oldest pending event,
// when BATCH_SIZE sessions are dirty, when much is pending, when a session ended,
// or when somebody waits for its commit.
func TestHubDue(t *testing.T) {
	for _, tt := range []struct {
		name     string
		before   func(t *hubTest, c []*outbox) // is not enough
		enough   func(t *hubTest, c []*outbox)
		sessions []string
	}{
		{"interval", func(t *hubTest, c []*outbox) {
			t.publish(c[0], "a", 1, 0)
			time.Sleep(4 * time.Second)
			t.publish(c[0], "a", 1, 0)
		}, func(*hubTest, []*outbox) { time.Sleep(1100 * time.Millisecond) }, []string{"a"}},
		{"sessions", func(t *hubTest, c []*outbox) {
			for _, i := range []int{0, 1, 1, 0} {
				t.publish(c[i], []string{"a", "b"}[i], 1, 0)
			}
		}, func(t *hubTest, c []*outbox) { t.publish(c[3], "d", 1, 0) }, []string{"a", "b", "d"}},
		{"bytes", func(t *hubTest, c []*outbox) { t.do(publish{c[0], "", t.batch("a", 1, 0, flushBytes-5000), nil}) },
			func(t *hubTest, c []*outbox) { t.do(publish{c[0], "", t.batch("a", 1, 0, 6000), nil}) }, []string{"a"}},
		{"ended", func(t *hubTest, c []*outbox) { t.publish(c[0], "a", 1, 0); t.publish(c[1], "b", 1, 0) },
			func(t *hubTest, c []*outbox) { t.do(finish{c[1]}) }, []string{"b", "a"}},
		{"somebody waits for the commit", func(t *hubTest, c []*outbox) { t.publish(c[0], "a", 1, 0) },
			func(t *hubTest, c []*outbox) { t.do(awaitCommit{"a", make(chan int64, 1)}) }, []string{"a"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inHub(t, func(c *config) { c.batchSize = 3 }, func(t *hubTest) {
				w := t.writer()
				var c []*outbox
				for _, id := range []string{"a", "b", "c", "d"} {
					c = append(c, t.tracker(id))
				}
				if tt.before(t, c); len(w) != 0 {
					t.Error("work before its time")
				}
				tt.enough(t, c)
				if synctest.Wait(); len(w) != 1 {
					t.Fatal("no work though it is time")
				}
				work := <-w
				if got := sessionsOf(work); !slices.Equal(got, tt.sessions) {
					t.Errorf("got %v, want %v", got, tt.sessions)
				}
				t.settle(stored, work...)
			})
		})
	}
}

// A transaction has BATCH_SIZE sessions at most, oldest first, ended ones before
// all.
func TestHubGroup(t *testing.T) {
	inHub(t, func(c *config) { c.batchSize = 2 }, func(t *hubTest) {
		trackers := map[string]*outbox{}
		for _, id := range []string{"a", "b", "c", "d", "e"} {
			trackers[id] = t.tracker(id)
			t.publish(trackers[id], id, 1, 0)
		}
		t.do(finish{trackers["d"]})
		first, second := t.due(), t.due()
		order := [][]string{sessionsOf(first), sessionsOf(second)}
		if want := [][]string{{"d", "a"}, {"b", "c"}}; !reflect.DeepEqual(order, want) {
			t.Errorf("got %v, want %v", order, want)
		}
		w := t.writer()
		t.publish(trackers["a"], "a", 1, 0) // it is with a writer
		time.Sleep(4 * time.Second)
		t.settle(stored, append(first, second...)...)
		time.Sleep(4 * time.Second)
		work := <-w
		again := t.later()
		if work[0].session != "e" || again[0].session != "a" || again[0].batches[0].first != 1 {
			t.Errorf("got %v and %v, want e, then of a what came meanwhile", sessionsOf(work), sessionsOf(again))
		}
		t.settle(stored, append(work, again...)...)
	})
}

// One session's share of a transaction is bounded, and so is the transaction.
func TestHubGroupBytes(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, d := t.tracker("s"), t.tracker("t")
		for range 10 {
			t.do(publish{c, "", t.batch("s", 1, 0, 2<<20), nil})
		}
		t.publish(d, "t", 1, 0)
		for _, want := range []struct {
			sessions []string
			events   int64
		}{{[]string{"s"}, 4}, {[]string{"t", "s"}, 1}, {[]string{"s"}, 10}} {
			work := t.due()
			if got := sessionsOf(work); !slices.Equal(got, want.sessions) || work[0].totals.events != want.events {
				t.Errorf("got %v up to event %d, want %v up to %d", got, work[0].totals.events, want.sessions, want.events)
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
		first := t.later()[0]
		last := time.Duration(0)
		for i := range 12 {
			t.settle(failed, first)
			t.publish(c, "s", 1, int64(i+2))
			t.heard(c)
			w, began := t.writer(), time.Now()
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
		work := t.later()
		if f := work[0]; f == first || len(f.batches) != 12 || f.batches[0].first != 2 {
			t.Errorf("got %d batches from %d on, want the 12 that came meanwhile", len(f.batches), f.batches[0].first)
		}
		t.settle(stored, work...)
		t.heard(c, "ack s 13")
	})
}

// Nobody waits for another session's trouble, nor shares a transaction with it.
func TestHubRetryAlone(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		c, other := t.tracker("s"), t.tracker("t")
		t.publish(c, "s", 1, 1)
		work := t.later()
		work[0].attempts = 10
		t.settle(failed, work...)
		t.publish(other, "t", 1, 1)
		t.do(finish{other})
		t.settle(stored, t.due()...)
		t.heard(other, "ack t 1")
		t.heard(c)
		third := t.tracker("u")
		t.publish(third, "u", 1, 1)
		time.Sleep(6 * time.Second)
		for range 2 {
			if work := t.due(); len(work) != 1 {
				t.Errorf("got %v together, want one alone", sessionsOf(work))
			} else {
				t.settle(stored, work...)
			}
		}
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
		t.heard(c)
		work := t.later()
		t.publish(c, "s", 1, 4)
		t.heard(c)
		t.settle(stored, work...)
		t.heard(c, "ack s 3")
		t.heard(old)
		t.do(leave{c})
		t.settle(stored, t.later()...) // nobody is there to hear
		if at := t.attach(t.idle(), "s", claim{epoch: 2}); at.accepted != 4 || at.stored != 4 {
			t.Errorf("got %+v, want 4 and 4", at)
		}
	})
}

// What the database refuses is dropped with its session; its tracker is told and
// may go on with another. A session that was deleted takes its connection along.
func TestHubRefused(t *testing.T) {
	for result, told := range map[outcome][]string{
		refused: {"error not_stored"}, deleted: {"error session_deleted", "close 4004"}, epochLost: {"close 4001"},
	} {
		inHub(t, nil, func(t *hubTest) {
			c, other, v := t.tracker("s"), t.tracker("t"), t.viewer()
			t.publish(c, "s", 1, 1)
			t.publish(other, "t", 1, 1)
			for _, f := range t.later() {
				if f.session == "s" {
					t.settle(result, f)
				} else {
					t.settle(stored, f)
				}
			}
			t.heard(c, told...)
			t.heard(other, "ack t 1")
			if result != epochLost { // there it goes on elsewhere
				t.heard(v, "ended s")
			}
			if t.find("s", 0, 1).ok {
				t.Error("it is still recorded")
			}
			if result == refused {
				t.attach(c, "u", claim{})
				t.publish(c, "u", 1, 1)
				t.heard(v, "started u")
			}
		})
	}
}

// What becomes of an ended session's last flush is nothing to the session that
// its connection has begun since.
func TestHubTroubleOfEnded(t *testing.T) {
	for _, result := range []outcome{refused, epochLost, deleted} {
		t.Run(fmt.Sprintf("outcome %d", result), func(t *testing.T) {
			inHub(t, nil, func(t *hubTest) {
				c := t.tracker("a")
				t.publish(c, "a", 2, 1)
				t.do(finish{c})
				work := t.due()
				t.attach(c, "b", claim{})
				t.settle(result, work...)
				t.heard(c)
				t.publish(c, "b", 1, 1)
				t.settle(stored, t.later()...)
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

// ---- the budget ----

// budgetTest has waiters for room; each says when it is through.
type budgetTest struct {
	*testing.T
	*budget
	through chan string
}

func inBudget(t *testing.T, size int64, test func(*budgetTest)) {
	synctest.Test(t, func(t *testing.T) { test(&budgetTest{t, newBudget(size), make(chan string, 9)}) })
}

func (b *budgetTest) wait(ctx context.Context, name string, take func(context.Context) error) {
	go func() { // ends when it has room, or with ctx
		if take(ctx) != nil {
			name += " gave up"
		}
		b.through <- name
	}()
	synctest.Wait()
}

func (b *budgetTest) check(when string, free int64, want ...string) {
	b.Helper()
	synctest.Wait()
	var got []string
	for len(b.through) > 0 {
		got = append(got, <-b.through)
	}
	if slices.Sort(got); !slices.Equal(got, want) || b.left() != free {
		b.Errorf("%s: got %q through, %d free, want %q, %d", when, got, b.left(), want, free)
	}
}

func TestBudget(t *testing.T) {
	inBudget(t, 100, func(b *budgetTest) {
		take := func(n int64) func(context.Context) error {
			return func(ctx context.Context) error { return b.take(ctx, n) }
		}
		ctx := context.Background()
		b.wait(ctx, "a", take(60))
		b.check("room", 40, "a")
		b.wait(ctx, "b", take(50))
		gone, leave := context.WithCancel(ctx)
		b.wait(gone, "c", take(70))
		b.check("no room", 40)
		leave()
		b.check("one gives up", 40, "c gave up")
		b.give(9)
		b.check("not enough", 49)
		b.give(1)
		b.check("enough", 0, "b")
		b.wait(ctx, "d", take(200))
		b.open() // the server stops: nobody waits for room any more
		b.check("open", -200, "d")
	})
}

// Messages of which a part is read take at most half of the budget, so that
// those who stall do not keep out the others; but one of them may always go on,
// beyond the half and the budget: they would wait for each other.
func TestBudgetGrow(t *testing.T) {
	inBudget(t, 100, func(b *budgetTest) {
		grow := func(n, most int64) func(context.Context) error {
			return func(ctx context.Context) error {
				took, err := b.grow(ctx, n, most)
				if err == nil && took != n && took != most {
					b.Errorf("grow %d of %d: took %d", n, most, took)
				}
				return err
			}
		}
		ctx := context.Background()
		b.wait(ctx, "a", grow(40, 1000))
		b.check("within the half", 60, "a")
		b.wait(ctx, "b", grow(40, 30))
		b.check("beyond the half, but no more than it may need", 30, "b")
		gone, leave := context.WithCancel(ctx)
		b.wait(gone, "c", grow(10, 500))
		b.wait(ctx, "d", grow(10, 500))
		b.check("others are beyond the half", 30)
		leave()
		b.wait(ctx, "e", func(ctx context.Context) error { return b.take(ctx, 30) })
		b.check("who begins a message need not wait for those who grow", 0, "c gave up", "e")
		b.finish(0, 30)
		b.check("one message is whole", -500, "d")
		b.wait(ctx, "f", func(ctx context.Context) error { return b.take(ctx, 1) })
		b.give(500)
		b.check("no room yet", 0)
		b.give(101)
		b.check("room", 100, "f")
	})
}
