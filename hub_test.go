package main

// The hub by its commands alone: no socket, no database, and a clock of the
// test's own (testing/synctest). Connections are their outboxes, which nobody
// empties but the test; the writer is the test.

import (
	"context"
	"fmt"
	"slices"
	"strings"
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
		ht := &hubTest{T: t, hub: newHub(cfg, newBudget(testBudget), &metrics{}), stop: stop}
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
		}{{2, []string{"error sequence_gap 1"}}, {1, nil}, {1, nil}, {3, []string{"error sequence_gap 2"}}, {2, nil}, {1,
			nil}} {
			t.publish(c, "s", 2, step.seq)
			t.heard(c, step.says...)
		}
		t.settle(stored, t.later()...)
		t.heard(c, "ack s 2")
		t.publish(c, "s", 2, 2)
		t.heard(c, "ack s 2")
		if now := t.find("s", 0, 0).session.now; now.events != 4 || t.metrics.refusals.String() != `{"sequence_gap": 2}` {
			t.Errorf("got %d events, refusals %v, want 4 and 2 gaps", now.events, &t.metrics.refusals)
		}
	})
}

// ---- who records ----

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
