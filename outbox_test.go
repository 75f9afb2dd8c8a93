package main

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// Viewers share what may wait for them: the more there are, the less for each,
// and the shorter the lists.
func TestHubShare(t *testing.T) {
	t.Parallel()
	inHub(t, nil, func(t *hubTest) {
		large := &description{userID: "u", metadata: []byte("{}"),
			brief: []byte(`{"x":"` + strings.Repeat("x", 8000) + `"}`)}
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
		for want, ids := range map[int][]string{3 * outgoingMin / 4 / 8000: nil, 1: {"large7", "unknown"}} {
			states := askHub(t, func(reply chan map[string]string) command { return stateQuery{ids, reply} })
			if len(states) != want || states["large7"] != "live" {
				t.Errorf("got the states of %d sessions, want %d", len(states), want)
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
		same(t, "what is sent", all, want)
	})
}
