package main

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"nhooyr.io/websocket"
)

// message is something to be sent, to one client or to many. Each goroutine that sends it calls
// encode, which changes nothing.
type message interface {
	encode() []byte
	size() int // about, in bytes
}

// A batch is sent to each viewer as the same bytes.
func (b *batch) encode() []byte { return b.frame }
func (b *batch) size() int      { return int(b.cost) }

// text is a message that is encoded already.
type text []byte

func (t text) encode() []byte { return t }
func (t text) size() int      { return len(t) }

const (
	outboxMessages = 1024
	trackerOutbox  = 4 << 10 // bytes of what is no answer; viewers share an amount that grows with the settings
)

// outbox is what one client is to be sent: messages up to a bound, the newest
// ack, and at last the reason why the connection closes. The hub knows clients
// by their outboxes. Every method is safe for concurrent use, and none waits but
// wait.
// add and start are called with mu locked; all others lock it.
type outbox struct {
	wake  func() // starts the goroutine that sends; called with mu locked
	abort func() // ends a connection whose peer does not take the last messages

	mu      sync.Mutex
	queue   []message
	bytes   int // of the queue and of what is being sent; answers are left out
	writing int // of these, what is being sent
	// seq 0: there is none.
	acked    ack // the newest that is not sent
	closing  *closeFrame
	closed   bool          // nothing is sent any more
	sending  bool          // a goroutine sends
	taken    int           // messages taken from the queue so far
	sent     int           // of these, those that are sent
	answer   int           // what sent must be for the newest answer to a request
	progress chan struct{} // has room for one; told when something was sent
}

// ack tells a tracker that everything up to seq is committed.
type ack struct {
	session string
	seq     int64
}

func (a ack) size() int { return 64 }
func (a ack) encode() []byte {
	return fmt.Appendf(nil, `{"type":"events_ack","data":{"sessionId":"%s","seq":%d}}`, a.session, a.seq)
}

// closeFrame says why the server closes a connection.
type closeFrame struct {
	code   closeCode
	reason string
}

type closeCode = websocket.StatusCode

// Why the server closes a connection. The codes from 4000 on are the protocol's.
const (
	closeGoingAway closeCode = websocket.StatusGoingAway
	closePolicy    closeCode = websocket.StatusPolicyViolation
	closeInvalid   closeCode = websocket.StatusInvalidFramePayloadData
	closeTooBig    closeCode = websocket.StatusMessageTooBig
	closeTryAgain  closeCode = websocket.StatusTryAgainLater
	closeTaken     closeCode = 4001
	closeDeleted   closeCode = 4004
)

// closeTime is how long a peer may take for its last messages and the close
// handshake.
const closeTime = 2 * time.Second

// newOutbox makes an outbox that gathers. With conn.open somebody sends what is in it; a post's
// answer takes it out.
func newOutbox() *outbox {
	return &outbox{progress: make(chan struct{}, 1), wake: func() {}, abort: func() {}}
}

// trySend gives the client a message, and reports whether there was room: with
// the message, no more than most bytes may be unsent. A client that has been sent
// everything has room for one message of any size.
func (o *outbox) trySend(m message, most int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.queue) >= outboxMessages || o.bytes > 0 && o.bytes+m.size() > most {
		return false
	}
	return o.add(m)
}

// send gives the client an answer, for which there is always room: pages and lists hold
// theirs in core.outgoing. A WebSocket's next request is read after it is sent: see wait.
func (o *outbox) send(m message) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.add(uncounted{m}) {
		o.answer = o.taken + len(o.queue)
	}
}

// uncounted is a message that takes no room in the outbox.
type uncounted struct{ message }

func (uncounted) size() int { return 0 }

// add reports false where a reason to close stands, or nothing is sent any more.
func (o *outbox) add(m message) bool {
	if o.closed || o.closing != nil {
		return false
	}
	o.queue = append(o.queue, m)
	o.bytes += m.size()
	o.start()
	return true
}

// ack tells the tracker that everything up to seq is committed. It replaces an
// ack of the same session that is not sent yet.
func (o *outbox) ack(session string, seq int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || o.closing != nil {
		return
	}
	if o.acked.seq > 0 && o.acked.session != session { // the connection has begun another session
		o.add(o.acked)
	}
	o.acked = ack{session, seq}
	o.start()
}

// closeAfterSending closes the connection, with a reason, when what the outbox
// holds is sent.
func (o *outbox) closeAfterSending(code closeCode, reason string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closing != nil || o.closed {
		return
	}
	o.closing = &closeFrame{code, reason}
	time.AfterFunc(closeTime, o.abort)
	o.start()
}

// start sees to it that somebody sends.
func (o *outbox) start() {
	if !o.sending && !o.closed {
		o.sending = true
		o.wake()
	}
}

// next takes what is to be sent now: a message, or the reason to close, behind
// which nothing follows. When there is neither, the sender's work is done.
func (o *outbox) next() (m message, last *closeFrame) {
	o.mu.Lock()
	defer o.mu.Unlock()
	// Whoever asks for the next message has sent the one before.
	o.sent, o.bytes, o.writing = o.taken, o.bytes-o.writing, 0
	select {
	case o.progress <- struct{}{}:
	default:
	}
	switch {
	case o.closed:
	case len(o.queue) > 0:
		m = o.queue[0]
		o.queue[0] = nil
		o.queue = o.queue[1:]
		o.taken++
		o.writing = m.size()
		return m, nil
	case o.acked.seq > 0:
		m, o.acked = o.acked, ack{}
		return m, nil
	case o.closing != nil:
		o.closed = true
		return nil, o.closing
	}
	o.queue, o.sending = nil, false // an idle connection holds no memory for it
	return nil, nil
}

// wait returns when the answers to the client's requests are sent, or with ctx.
func (o *outbox) wait(ctx context.Context) error {
	for {
		o.mu.Lock()
		done := o.sent >= o.answer
		o.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-o.progress:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// held is how many bytes wait or are being sent, answers left out.
func (o *outbox) held() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.bytes
}

// length is how many messages wait.
func (o *outbox) length() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.queue)
}

// isSending reports whether a message is being sent, or is about to be.
func (o *outbox) isSending() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sending
}

// end lets nothing more in, and drops what is not sent. Only a reason to close, and what stands
// before it, is sent nevertheless, unless now is set: with parting a sender still has that to do.
func (o *outbox) end(now bool) (parting bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if parting = o.closing != nil && !o.closed && !now; !parting {
		o.closed, o.queue, o.bytes, o.writing = true, nil, 0, 0
	}
	return parting
}

// The messages that the hub and sessions send.

// envelope makes a message of small parts. data must be fit for JSON.
func envelope(typ string, data any) text {
	return encodeJSON(struct {
		Type string `json:"type"`
		Data any    `json:"data"`
	}{typ, data})
}

// errorMessage has a code for programs, of doc/protocol.md, and a reason for people.
func errorMessage(code, reason string) text {
	return envelope("error", map[string]string{"message": reason, "code": code})
}

// sessionID is the data of a message that names a session and says no more of it.
type sessionID struct {
	ID string `json:"sessionId"`
}

// Messages as small as these are encoded where they are made, in the hub as well.
func sessionEnded(id string) text { return envelope("session_ended", sessionID{id}) }
func takeSnapshot(id string) text { return envelope("take_snapshot", sessionID{id}) }

func sessionState(id, state string) text {
	return envelope("session_state", map[string]string{"sessionId": id, "state": state})
}

// lagged names the event with which live goes on.
func lagged(id string, next int64) text {
	return envelope("session_lagged", map[string]any{"sessionId": id, "nextIndex": next})
}

func sessionStarted(id string, about *description) text {
	return envelope("session_started", map[string]any{
		"sessionId": id, "userId": about.userID, "metadata": json.RawMessage(about.brief)})
}

// summary is a session as lists show it, in memory or read from its row. about is never nil.
type summary struct {
	id       string
	epoch    int64
	about    *description
	now      counters
	isActive bool
	state    string // see session.state; empty when it is not in memory
}

// joined answers viewer_join_session.
type joined struct{ summary }

func (j joined) size() int { return 256 + len(j.about.metadata) }
func (j joined) encode() []byte {
	return envelope("session_joined", map[string]any{
		"sessionId": j.id, "events": []any{}, "metadata": json.RawMessage(j.about.metadata),
		"totalEvents": j.now.events, "isActive": j.isActive, "snapshotIndex": nullable(j.now.snapshot, -1),
		"state": j.state,
	})
}

// activeSessions is the list of live sessions.
type activeSessions []summary

func (a activeSessions) size() int {
	n := 64
	for _, s := range a {
		n += s.listSize()
	}
	return n
}

// listSize is about what the session takes in a list's JSON, and in memory beside it.
func (s *summary) listSize() int { return 160 + len(s.id) + len(s.about.userID) + len(s.about.brief) }

func (a activeSessions) encode() []byte {
	type entry struct {
		sessionID
		UserID     string          `json:"userId"`
		Metadata   json.RawMessage `json:"metadata"`
		EventCount int64           `json:"eventCount"`
		ErrorCount int64           `json:"errorCount"`
	}
	all := make([]entry, len(a))
	for i, s := range a {
		all[i] = entry{sessionID{s.id}, s.about.userID, s.about.brief, s.now.events, s.now.errors}
	}
	return envelope("active_sessions", map[string]any{"sessions": all})
}
