package main

import (
	"testing"
	"time"
)

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
