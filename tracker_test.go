package main

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// testTracker records one session as the numbered protocol asks: it keeps every
// batch until it is acked, and after a reconnect sends again what the server
// does not have. Batch seq holds the events (seq-1)*perBatch and on, so that all
// it must keep are three numbers.
type testTracker struct {
	t       testing.TB
	session string
	// perBatch is events in a batch; window, what may wait for its ack, in
	// batches unless weigh is set; pause, the time between two batches.
	perBatch, window int
	pause            time.Duration
	mischief         bool                // repeats a batch now and then, or leaves one out
	limit            int64               // batches to make in all; 0: until finish
	ends             bool                // ends its session when all is acked
	sending          func(seq int64)     // called before each batch is sent, if set
	confirmed        func(seq int64)     // called for each batch that is acked, if set
	weigh            func(seq int64) int // the part of the window that a batch takes
	pace             func(seq int64) time.Duration
	frame            func(seq int64) net.Buffers // a batch as it goes out
	offer            string                      // a header of the handshake

	mu         sync.Mutex
	address    string
	resume     string
	ready      bool  // session_ready came on this connection
	made       int64 // the newest batch that was ever sent
	sent       int64 // the newest batch sent on this connection
	acked      int64 // the newest batch that the server promised to have
	inFlight   int   // of the window
	stopping   bool
	fate       string         // why recording stopped: the server's first code
	errors     map[string]int // by code
	reconnects int
	resent     int64
	conn       *testConn

	wake    chan struct{} // there may be something to do
	stopped chan struct{} // closed by stop
	done    chan struct{} // closed when run has ended
}

// newTracker sets what a test may then change before start.
func newTracker(t testing.TB, session string) *testTracker {
	tr := &testTracker{
		t: t, session: session, perBatch: 10, window: 8, pause: 10 * time.Millisecond, errors: map[string]int{},
		wake: make(chan struct{}, 1), stopped: make(chan struct{}), done: make(chan struct{}),
	}
	tr.weigh = func(int64) int { return 1 }
	tr.pace = func(int64) time.Duration { return tr.pause }
	tr.frame = func(seq int64) net.Buffers { return net.Buffers{maskedText(tr.batch(seq))} }
	return tr
}

// start begins to record to the server at address; it ends at finish, or with
// the test.
func (tr *testTracker) start(address string) *testTracker {
	tr.address = address
	ctx, cancel := context.WithCancel(context.Background())
	go tr.run(ctx) // ends at finish, at a fate, or here:
	tr.t.Cleanup(func() { cancel(); <-tr.done })
	return tr
}

func (tr *testTracker) run(ctx context.Context) {
	defer close(tr.done)
	for ctx.Err() == nil {
		over := tr.connection(ctx)
		tr.mu.Lock()
		over = over || tr.fate != ""
		tr.ready = false
		tr.reconnects++
		tr.mu.Unlock()
		if over {
			return
		}
		select {
		case <-time.After(time.Duration(20+rand.IntN(180)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// sessionStart is what a page says when it begins.
func sessionStart(session, resume string) []byte {
	return fmt.Appendf(nil, `{"type":"session_start","data":{"sessionId":%q,"resume":%q,"userId":"ann",`+
		`"url":"https://example.com/shop","userAgent":"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, `+
		`like Gecko) Chrome/140.0.0.0 Safari/537.36","viewport":{"width":1280,"height":800,"devicePixelRatio":1},`+
		`"startTime":1700000000000,"referrer":"","timeZone":"UTC"}}`, session, resume)
}

// connection is one life on the wire. It returns true when there is nothing left
// to do.
func (tr *testTracker) connection(ctx context.Context) (over bool) {
	tr.mu.Lock()
	address, resume := tr.address, tr.resume
	tr.mu.Unlock()
	c, err := openWebSocket(&net.Dialer{}, address, 4096, tr.offer)
	if err != nil {
		return false
	}
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { c.Close() })()
	heard := make(chan struct{})
	go func() { // ends with the connection
		defer close(heard)
		defer cancel()
		tr.listen(c)
	}()
	defer func() { c.Close(); <-heard }()
	tr.mu.Lock()
	tr.conn = c
	moved := tr.address != address
	tr.mu.Unlock()
	if moved {
		return false
	}
	c.Write(maskedText(sessionStart(tr.session, resume)))
	for ctx.Err() == nil {
		seq, over := tr.next()
		switch {
		case over && tr.ends:
			c.send("session_end", sessionID{tr.session})
			c.Conn.(*net.TCPConn).CloseWrite()
			<-heard
			return true
		case over:
			return true
		case seq == 0:
			select {
			case <-tr.wake:
			case <-ctx.Done():
			}
			continue
		}
		message := tr.frame(seq)
		if _, err := message.WriteTo(c.Conn); err != nil {
			return false
		}
		if pause := tr.pace(seq); pause > 0 {
			select {
			case <-time.After(pause):
			case <-tr.stopped:
			case <-ctx.Done():
			}
		}
	}
	return false
}

// next decides what to send: the number of a batch, or 0 when there is none, or
// that all is done.
func (tr *testTracker) next() (seq int64, over bool) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	switch {
	case tr.stopping && tr.acked == tr.made || tr.fate != "":
		return 0, true
	case !tr.ready:
		return 0, false
	case tr.mischief && tr.sent > 0 && rand.IntN(20) == 0:
		return 1 + rand.Int64N(tr.sent), false // once more
	case tr.mischief && rand.IntN(50) == 0:
		return tr.made + 2, false // one is left out, whatever the server has by now
	case tr.sent < tr.made:
		tr.sent++
		tr.resent++
		return tr.sent, false
	}
	weight := tr.weigh(tr.made + 1)
	full := tr.inFlight > 0 && tr.inFlight+weight > tr.window || tr.limit > 0 && tr.made >= tr.limit
	if full || tr.stopping {
		return 0, false
	}
	tr.made++
	tr.sent++
	tr.inFlight += weight
	if tr.sending != nil {
		tr.sending(tr.sent)
	}
	return tr.sent, false
}

func (tr *testTracker) batch(seq int64) []byte {
	b := fmt.Appendf(nil, `{"type":"events_batch","data":{"sessionId":%q,"seq":%d,"events":[`, tr.session, seq)
	for i := range tr.perBatch {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, testEvent(tr.session, int(seq-1)*tr.perBatch+i)...)
	}
	return append(b, "]}}"...)
}

func (tr *testTracker) listen(c *testConn) {
	for {
		text, err := c.read()
		if err != nil {
			return
		}
		m, err := parseMessage(text)
		if err != nil {
			tr.t.Errorf("%s: %v", tr.session, err)
		}
		if !tr.hear(m) {
			return
		}
		tr.look()
	}
}

// hear returns false when the connection is of no use.
func (tr *testTracker) hear(m testMessage) bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	switch m.Type {
	case "session_ready":
		tr.resume, tr.ready = m.Data.Resume, true
		if m.Data.LastSeq < tr.acked {
			tr.t.Errorf("%s: lastSeq %d after an ack of %d: something acked is lost", tr.session, m.Data.LastSeq,
				tr.acked)
		}
		tr.promised(m.Type, m.Data.LastSeq)
		tr.sent = m.Data.LastSeq
	case "events_ack":
		tr.promised(m.Type, m.Data.Seq)
	case "session_assigned":
		tr.fate = cmp.Or(tr.fate, m.Type)
		tr.t.Errorf("%s: was assigned the id %s", tr.session, m.Data.SessionID)
	case "error":
		tr.refused(m)
		return m.Data.Code != "unavailable"
	}
	return true
}

// promised notes that the server has everything up to seq.
func (tr *testTracker) promised(by string, seq int64) {
	if seq > tr.made {
		tr.t.Errorf("%s: %s of %d, but only %d were ever sent", tr.session, by, seq, tr.made)
	}
	for tr.acked < min(seq, tr.made) {
		tr.acked++
		tr.inFlight -= tr.weigh(tr.acked)
		if tr.confirmed != nil {
			tr.confirmed(tr.acked)
		}
	}
}

func (tr *testTracker) refused(m testMessage) {
	tr.errors[m.Data.Code]++
	switch m.Data.Code {
	case "sequence_gap":
		if m.Data.Expected <= tr.acked {
			tr.t.Errorf("%s: expected %d after an ack of %d", tr.session, m.Data.Expected, tr.acked)
		}
		tr.sent = min(tr.sent, m.Data.Expected-1)
	case "unavailable":
	default:
		tr.fate = cmp.Or(tr.fate, m.Data.Code)
	}
}

// drop ends the present connection at once; the tracker makes a new one.
func (tr *testTracker) drop() { tr.change(func() { tr.conn.Close() }) }

// moveTo makes it go on at another address.
func (tr *testTracker) moveTo(address string) {
	tr.change(func() { tr.address = address; tr.conn.Close() })
}

// abandon ends the tracker, whatever is not acked.
func (tr *testTracker) abandon() {
	tr.moveTo("")
	tr.change(func() { tr.fate = cmp.Or(tr.fate, "abandoned") })
	<-tr.done
}

// stop makes no more batches; what was sent still has to be acked.
func (tr *testTracker) stop() {
	tr.change(func() {
		if !tr.stopping {
			close(tr.stopped)
		}
		tr.stopping = true
	})
}

func (tr *testTracker) change(what func()) {
	tr.mu.Lock()
	what()
	tr.mu.Unlock()
	tr.look()
}

// look makes it see whether there is something to do.
func (tr *testTracker) look() {
	select {
	case tr.wake <- struct{}{}:
	default:
	}
}

// finish stops and waits until everything is acked.
func (tr *testTracker) finish() {
	tr.t.Helper()
	tr.stop()
	select {
	case <-tr.done:
	case <-time.After(2 * patience):
		tr.mu.Lock()
		defer tr.mu.Unlock()
		tr.t.Fatalf("%s: %d of %d batches acked, sent %d on this connection, ready %v, errors %v",
			tr.session, tr.acked, tr.made, tr.sent, tr.ready, tr.errors)
	}
	if fate := tr.why(); fate != "" {
		tr.t.Fatalf("%s: recording ended: %s", tr.session, fate)
	}
}

// ackedEvents and madeEvents count events, not batches.
func (tr *testTracker) ackedEvents() int { return int(tr.read(&tr.acked)) * tr.perBatch }
func (tr *testTracker) madeEvents() int  { return int(tr.read(&tr.made)) * tr.perBatch }

func (tr *testTracker) read(n *int64) int64 {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return *n
}

func (tr *testTracker) why() string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.fate
}
