package main

// The hub by its commands alone: no socket, no database, and a clock of the
// test's own (testing/synctest). Connections are their outboxes, which nobody
// empties but the test; the writer is the test.

import (
	"context"
	"fmt"
	"slices"
	"strconv"
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
		return attach{unreserve{id, aboutNobody.cost()}, out, cl, about, sessionStarted(id, about), 0, false, reply}
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
	t.budget.force(b.cost)
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
	t.budget.force(b.cost)
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

// ---- scripts ----

// hubScript plays a case of testdata/hub, whose README.md says how it is written.
type hubScript struct {
	*hubTest
	conns map[string]*outbox
	work  []*flush // that writers have
}

func TestHubScripts(t *testing.T) {
	t.Parallel()
	for _, c := range readCases(t, "hub", 10) {
		t.Run(c.name, func(t *testing.T) {
			settings := func(cfg *config) {
				_, set, _ := strings.Cut(c.text, "\nset ")
				fmt.Sscan(set, &cfg.batchSize, &cfg.maxEvents)
			}
			inHub(t, settings, func(t *hubTest) {
				s := &hubScript{t, map[string]*outbox{}, nil}
				for line := range strings.Lines(c.text) {
					if words := strings.Fields(line); len(words) > 0 && line[0] != '#' && words[0] != "set" {
						s.line(strings.TrimSpace(line), append(words, make([]string, 6)...))
					}
				}
			})
		})
	}
}

func (s *hubScript) line(line string, words []string) {
	s.Helper()
	if n, err := strconv.Atoi(words[0]); err == nil {
		for range n {
			s.line(line, words[2:])
		}
		return
	}
	verb, name, session := words[0], words[1], words[2]
	number := func(i int) int64 { n, _ := strconv.ParseInt(words[i], 10, 64); return n }
	if !s.act(verb, name, session, number, line) && !s.looks(verb, name, number, line) {
		s.Fatalf("nobody understands %q", line)
	}
}

// act does a line that tells the hub something; it is false for others.
func (s *hubScript) act(verb, name, session string, number func(int) int64, line string) bool {
	s.Helper()
	out := s.conns[name]
	if out == nil && (verb == "track" || verb == "reserve") {
		out = s.idle()
		s.conns[name] = out
	}
	switch verb {
	case "track":
		s.attach(out, session, claim{epoch: number(3), counters: counters{events: number(4), seq: number(5)}})
	case "reserve":
		s.reserve(out, session, true, 0)
	case "attach":
		s.attachAs(out, session, claim{epoch: number(3)}, aboutNobody)
	case "view":
		s.conns[name] = s.viewer()
	case "join":
		s.join(out, session)
	case "batch":
		s.do(publish{out, "", s.batch(session, int(number(3)), number(4), int(number(5))), nil})
	case "events":
		s.do(publish{out, "", s.batchOf(session, number(3), strings.Fields(line)[4]), nil})
	case "end":
		s.do(finish{out})
	case "leave":
		s.do(leave{out})
	case "drain":
		s.do(drain{})
	case "await":
		s.do(awaitCommit{name, make(chan int64, 1)})
	case "marked":
		s.do(marked{strings.Fields(line)[1:]})
	case "skip":
		s.messages(out)
	case "wait":
		pause, _ := time.ParseDuration(name)
		time.Sleep(pause)
		synctest.Wait()
	case "settle":
		s.handBack(map[string]outcome{"stored": stored, "failed": failed, "epochLost": epochLost}[name], session)
	default:
		return false
	}
	return true
}

// looks does a line that says what must be so; it is false for others.
func (s *hubScript) looks(verb, name string, number func(int) int64, line string) bool {
	s.Helper()
	_, want, _ := strings.Cut(line, " ")
	got := ""
	switch verb {
	case "none":
		if _, ok := s.take(); ok {
			s.Error("there is work before its time")
		}
	case "work":
		var flushes []string
		for _, f := range s.due() {
			first := f.totals.events
			if len(f.batches) > 0 {
				first = f.batches[0].first
			}
			flushes = append(flushes, fmt.Sprintf("%s@%d:%d-%d", f.session, f.epoch, first, f.totals.events))
			s.work = append(s.work, f)
		}
		if got = strings.Join(flushes, " "); strings.Contains(want, " & ") {
			slices.Sort(flushes)
			got = strings.Join(flushes, " & ")
		}
	case "memory":
		_, want, _ = strings.Cut(want, " = ")
		got = spans(s.find(name, number(2), number(3)))
	case "stopped":
		got = fmt.Sprint(s.stopped())
	case "hears":
		_, want, _ = strings.Cut(want, " ")
		heard := s.messages(s.conns[name])
		if got = strings.Join(heard, "; "); strings.Contains(want, " & ") {
			slices.Sort(heard)
			got = strings.Join(heard, " & ")
		}
	default:
		return false
	}
	if got != want {
		s.Errorf("%s: got %s", line, got)
	}
	return true
}

// handBack gives the hub the flushes of a session, or all.
func (s *hubScript) handBack(result outcome, session string) {
	its := func(f *flush) bool { return session == "" || f.session == session }
	these := slices.DeleteFunc(slices.Clone(s.work), func(f *flush) bool { return !its(f) })
	s.work = slices.DeleteFunc(s.work, its)
	s.settle(result, these...)
}

// spans says which events are in memory, one after the other.
func spans(m inMemory) string {
	if !m.ok {
		return "nothing"
	}
	var first, end int64
	for i, b := range m.batches {
		if i == 0 {
			first = b.first
		} else if b.first != end {
			return fmt.Sprintf("a gap at %d", end)
		}
		end = b.end()
	}
	return fmt.Sprintf("%d-%d %d", first, end, len(m.batches))
}
