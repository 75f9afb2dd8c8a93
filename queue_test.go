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
		if got := t.reserve(t.idle(), "d", false, 1000); got != noRoom {
			t.Errorf("while a claim is under way: got %d, want no room", got)
		}
		t.do(unreserve{"a", 4000})
		if got := t.reserve(t.idle(), "d", false, 1000); got != granted {
			t.Errorf("after it: got %d, want granted", got)
		}
		t.do(unreserve{"d", 1000})
	})
}

// The chunks of a flush that waits to be tried again have room of their own.
func TestHubFailedChunks(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		t.do(publish{t.tracker("a"), "", t.batch("a", 1, 0, 1500), nil})
		before, work := t.used(), t.later()
		for range 2 {
			work[0].chunks = []chunk{{events: make([]byte, 3000)}}
			if t.settle(failed, work...); t.used() != before+3000 {
				t.Fatalf("got %d bytes of room in use, want %d", t.used(), before+3000)
			}
			time.Sleep(maxPause)
			work = t.later()
		}
		if t.settle(stored, work...); t.used() != before {
			t.Errorf("when it is stored: got %d bytes of room in use, want %d", t.used(), before)
		}
	})
}
