package main

import (
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

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
			{0, 30, 0, 3}, {0, 1, 0, 1}, {9, 10, 0, 1}, {10, 11, 10, 1}, {9, 11, 0, 2}, {29, 30, 20, 1}, {29, 1000, 20, 1}, {30,
				1000, 0, 0},
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
