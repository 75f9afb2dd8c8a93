package main

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// A list is bounded; so are all viewers' outboxes together.
func TestHubOutgoing(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		large := &description{userID: "u", metadata: []byte("{}"), brief: []byte(`{"x":"` + strings.Repeat("x", 8000) + `"}`)}
		for i := range 2 * maxListBytes / 8000 {
			t.reserve(t.idle(), fmt.Sprint("large", i), true, 0)
			t.attachAs(t.idle(), fmt.Sprint("large", i), claim{}, large)
		}
		shared := newBudget(5000)
		v := newOutbox(viewerOutbox, shared)
		t.do(enter{v, true})
		if v.bytes > maxListBytes || v.bytes < maxListBytes/2 || shared.left() != 5000-int64(v.bytes) {
			t.Errorf("the list has %d bytes, and %d of 5000 are left for others", v.bytes, shared.left())
		}
		other := newOutbox(viewerOutbox, shared)
		if other.trySend(sessionEnded("s")) {
			t.Error("an outbox took a message though all are full together")
		}
		v.end(true)
		if left := shared.left(); left != 5000 || !other.trySend(sessionEnded("s")) {
			t.Errorf("%d bytes are left when the other has gone, want 5000", left)
		}
	})
}

// An answer always has room; whoever asks waits until there is some.
func TestOutboxWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutbox(outboxLimits{2, 100}, nil)
		for range 5 {
			o.send(sessionEnded("s"))
		}
		var waited atomic.Bool
		go func() { waited.Store(o.wait(t.Context()) == nil) }() // ends when three are sent
		for i := range 4 {
			if synctest.Wait(); waited.Load() != (i > 3) {
				t.Errorf("after %d of 5: it waits no more: %v", i, waited.Load())
			}
			o.next()
		}
		if synctest.Wait(); !waited.Load() {
			t.Error("it still waits when one is left")
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
		want := []string{string(sessionEnded("s")), string(ack{"s", 2}.encode()), string(ack{"t", 1}.encode()), "why"}
		if !slices.Equal(all, want) {
			t.Errorf("got %q, want %q", all, want)
		}
	})
}
