package main

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

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

// What was read from the database may be out of date: memory counts.
func TestHubJoinStored(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		v, c := t.viewer(), t.tracker("s")
		t.publish(c, "s", 3, 1)
		t.joinStored(v, "s", &summary{id: "s", about: aboutNobody, now: counters{events: 1, snapshot: -1}})
		t.heard(v, "started s", "joined s 3")
	})
}

// A viewer that does not read has a bounded outbox, is told where live goes on
// when it has read it, and misses nothing from there.
func TestHubLag(t *testing.T) {
	t.Parallel()
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
					if len(slow.queue) > outboxMessages || slow.bytes > 4<<20 {
						t.Fatalf("the outbox has %d messages, %d bytes", len(slow.queue), slow.bytes)
					}
				}
				read := t.messages(slow)
				if lagged := t.metrics.viewersLagged.Load(); lagged != 1 || read[0] != "joined s 0" || len(read) >= n {
					t.Fatalf("got %d lagging viewers and %d messages from %q on, want 1 and some of %d", lagged,
						len(read), read[0], n)
				}
				for i, m := range read[1:] {
					if want := fmt.Sprintf("live s %d+1", i); m != want {
						t.Fatalf("got %q, want %q", m, want)
					}
				}
				t.publish(c, "s", 1, 0) // before the hub has noticed that it reads
				time.Sleep(time.Second)
				t.publish(c, "s", 2, 0)
				t.heard(slow, fmt.Sprintf("lagged s %d", n+1), "list", fmt.Sprintf("live s %d+2", n+1))
				t.heard(fast, fmt.Sprintf("live s %d+1", n), fmt.Sprintf("live s %d+2", n+1))
				t.do(leave{slow})
				time.Sleep(time.Second)
				t.heard(slow)
			})
		})
	}
}

// However many viewers do not read, and however large snapshots are, what waits for
// them all stays in its bound. They hear of it all when they read.
func TestHubStalled(t *testing.T) {
	t.Parallel()
	inHub(t, nil, func(t *hubTest) {
		c, sending := t.tracker("s"), map[*outbox]message{}
		for range 20 {
			v := t.viewer()
			t.join(v, "s")
			t.heard(v, "joined s 0")
			sending[v] = nil
		}
		held := 0
		for i, size := range []int{100 << 10, 10 << 20, 100 << 10, 10 << 20, 700 << 10} {
			t.do(publish{c, "", t.batch("s", 1, int64(i+1), size), nil})
			for v, m := range sending {
				if m == nil {
					sending[v], _ = v.next() // and this is never sent
				}
			}
		}
		t.do(visibility{c, text("{}"), true})
		for v, m := range sending {
			for _, m := range append(v.queue, m) {
				held += m.size()
			}
		}
		if held > outgoingMin || held < 20*100<<10 {
			t.Errorf("%d bytes wait for 20 viewers, want %d at most", held, outgoingMin)
		}
		for v := range sending {
			t.messages(v)
		}
		time.Sleep(time.Second)
		for v := range sending {
			t.heard(v, "lagged s 5", "state s hidden", "list")
		}
	})
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
		t.do(visibility{c, text("{}"), false})
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
