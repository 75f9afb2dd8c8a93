package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"net/netip"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"nhooyr.io/websocket"
)

type closeCode = websocket.StatusCode

// Why the server closes a connection. The codes from 4000 on are the protocol's.
const (
	closeGoingAway closeCode = websocket.StatusGoingAway
	closePolicy    closeCode = websocket.StatusPolicyViolation
	closeTooBig    closeCode = websocket.StatusMessageTooBig
	closeTryAgain  closeCode = websocket.StatusTryAgainLater
	closeTaken     closeCode = 4001
	closeDeleted   closeCode = 4004
)

const (
	firstRead        = 16 << 10 // room for a message before it is known to be larger
	maxViewerMessage = 64 << 10
	maxBatchEvents   = 100_000 // in a message: bounds what its index takes in memory
	maxMetadata      = 64 << 10
	maxField         = 4 << 10
	maxNesting       = 500     // of metadata and errors: PostgreSQL and encoding/json have their limits
	maxSeq           = 1 << 53 // numbers in JavaScript are exact up to here
	maxErrors        = 100     // in a row, then the connection is closed
	eventRoom        = 24      // bytes that an event's bounds take

	outboxMessages = 1024
	outboxBytes    = 4 << 20
	writePiece     = 256 << 10       // of a large message, each with its own deadline
	farewellTime   = 2 * time.Second // for a close handshake
	pageBytes      = 4 << 20         // JSON in a session_events answer, unless one event is larger
	maxPage        = 1000
)

// Messages.

// message is something to be sent to a client. encode is called by the
// goroutine that sends it.
type message interface {
	encode() []byte
	size() int // about, in bytes
}

func (b *batch) encode() []byte { return b.frame }
func (b *batch) size() int      { return len(b.frame) }

// text is a message that is encoded already.
type text []byte

func (t text) encode() []byte { return t }
func (t text) size() int      { return len(t) }

// envelope makes a message of small parts. data must be fit for JSON.
func envelope(typ string, data any) text {
	return encodeJSON(struct {
		Type string `json:"type"`
		Data any    `json:"data"`
	}{typ, data})
}

// encodeJSON encodes what is known to be fit for JSON. Of raw JSON in it only
// the white space is left out.
func encodeJSON(v any) []byte {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n"))
}

func errorMessage(code, reason string) text {
	return envelope("error", map[string]string{"message": reason, "code": code})
}

type sessionID struct {
	ID string `json:"sessionId"`
}

func sessionEnded(id string) text { return envelope("session_ended", sessionID{id}) }
func takeSnapshot(id string) text { return envelope("take_snapshot", sessionID{id}) }

func lagged(id string, next int64) text {
	return envelope("session_lagged", map[string]any{"sessionId": id, "nextIndex": next})
}

func sessionStarted(id string, about *description) text {
	return envelope("session_started", map[string]any{"sessionId": id, "userId": about.userID, "metadata": json.RawMessage(about.metadata)})
}

// joined answers viewer_join_session.
type joined struct{ summary }

func (j joined) size() int { return 256 + len(j.about.metadata) }
func (j joined) encode() []byte {
	return envelope("session_joined", map[string]any{
		"sessionId": j.id, "events": []any{}, "metadata": json.RawMessage(j.about.metadata),
		"totalEvents": j.now.events, "isActive": j.isActive, "snapshotIndex": index(j.now.snapshot),
	})
}

// index gives the number of an event as JSON has it: null when there is none.
func index(n int64) *int64 {
	if n < 0 {
		return nil
	}
	return &n
}

// activeSessions is the list of live sessions.
type activeSessions []summary

// size leaves the metadata out, which is the sessions' own: many live sessions
// must not fill an outbox by their list alone.
func (a activeSessions) size() int { return 64 + 128*len(a) }

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
		all[i] = entry{sessionID{s.id}, s.about.userID, s.about.metadata, s.now.events, s.now.errors}
	}
	return envelope("active_sessions", map[string]any{"sessions": all})
}

// newBatch copies a message's events into the frame that viewers get. It ends
// with the events, so that their bounds hold in the frame too.
func newBatch(id string, f frame, seq int64) *batch {
	const slot = 20 // digits of an int64; JSON lets spaces stand before and after a number
	b := &batch{seq: seq, events: f.events, received: time.Now()}
	var body []byte
	if n := len(f.events); n > 0 {
		start := f.events[0].start
		body = f.body[start:f.events[n-1].end]
		for i := range b.events {
			b.events[i].start -= start
			b.events[i].end -= start
		}
	}
	const head, mid, tail = `{"type":"events_batch","data":{"sessionId":"`, `","fromIndex":`, `,"events":[`
	frame := make([]byte, 0, len(head)+len(id)+len(mid)+slot+len(tail)+len(body)+3)
	frame = append(append(append(frame, head...), id...), mid...)
	place := len(frame)
	frame = append(append(frame, strings.Repeat(" ", slot)...), tail...)
	start := len(frame)
	b.frame = append(append(frame, body...), "]}}"...)
	b.index = b.frame[place : place+slot : place+slot]
	b.body = b.frame[start : start+len(body)]
	b.room = int64(len(b.frame)) + int64(cap(b.events))*eventRoom + 256
	return b
}

// Connections.

// conn is one WebSocket. Its own goroutine reads; what it is sent is written by
// another, which lives only while there is something to write, so that an idle
// connection has one goroutine less.
type conn struct {
	srv    *server
	ws     *websocket.Conn
	net    net.Conn
	addr   netip.Addr
	viewer bool
	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	limit  *time.Timer // closes the connection when one message takes too long
	pulse  *time.Timer // starts the next heartbeat
	busy   atomic.Bool // inside a message: heartbeats have to wait

	out outbox

	// Of the reader alone:
	rec      *recording
	held     int64     // room taken from the budget for this message
	grown    int64     // of it, what was taken while it was read
	due      time.Time // when it must have arrived
	errors   int       // in a row
	starts   int       // sessions started since startsAt
	startsAt time.Time

	lost atomic.Bool // the hub has taken rec away
}

// recording is what a tracker's reader knows of its session.
type recording struct {
	id    string
	asked string // the id that the tracker had asked for
	token string
	seq   int64 // of the last batch that was taken
}

// serve reads until the connection ends. It is the connection's goroutine.
func (c *conn) serve() {
	defer c.srv.forget(c)
	defer c.close()
	defer c.srv.catch("connection")
	c.pulse.Reset(c.srv.cfg.heartbeat)
	if !c.srv.hub.send(enter{c}) {
		c.shut(closeGoingAway, "the server stops")
	}
	for {
		msg, err := c.read()
		if err == nil {
			err = c.handleApart(msg)
		}
		c.release(msg)
		var refusal *refusal
		switch {
		case errors.As(err, &refusal):
			c.complain(refusal)
		case err != nil:
			return
		default:
			c.errors = 0
		}
	}
}

// close ends the connection and waits for who writes to it. A farewell that is
// due is said first.
func (c *conn) close() {
	c.srv.hub.send(leave{c})
	c.pulse.Stop()
	c.limit.Stop()
	c.out.mu.Lock()
	parting := c.out.bye != nil
	c.out.closed = c.out.closed || !parting
	c.out.mu.Unlock()
	if parting {
		c.out.writers.Wait()
	}
	c.cancel()
	c.ws.CloseNow()
	c.out.writers.Wait()
}

// Reading.

// buffers are what messages are read into, while they are read and handled; each
// pool has those of twice the size of the one before, from firstRead to 4 MB.
var buffers [9]sync.Pool

// newBuffer gives an empty buffer for n bytes at least, and for less than twice
// as many.
func newBuffer(n int) []byte {
	i := bits.Len(uint(n-1) / firstRead)
	if i >= len(buffers) {
		return make([]byte, 0, n)
	}
	if b, ok := buffers[i].Get().([]byte); ok {
		return b
	}
	return make([]byte, 0, firstRead<<i)
}

func keepBuffer(b []byte) {
	if i := bits.Len(uint(cap(b)-1) / firstRead); i < len(buffers) && cap(b) == firstRead<<i {
		buffers[i].Put(b[:0])
	}
}

// read gives the next message, which the caller releases. Room for it is taken
// from the budget before its bytes are read; while there is none the connection
// is not read, and TCP makes the peer wait.
func (c *conn) read() ([]byte, error) {
	typ, r, err := c.ws.Reader(c.ctx)
	if err != nil {
		return nil, err
	}
	c.busy.Store(true)
	if c.viewer {
		c.srv.budget.give(-firstRead) // what it asks for may be in memory: it does not wait for the database
	} else if err := c.srv.budget.take(c.ctx, firstRead); err != nil {
		return nil, err
	}
	c.held = firstRead
	c.due = time.Now().Add(c.srv.cfg.messageTimeout)
	c.limit.Reset(c.srv.cfg.messageTimeout)
	defer c.limit.Stop()
	buf := newBuffer(firstRead)
	for {
		if int64(len(buf)) == c.held {
			if err := c.grow(c.held, int64(c.maxMessage())+1-c.held); err != nil {
				return buf, err
			}
		}
		if len(buf) == cap(buf) {
			larger := append(newBuffer(min(2*len(buf), c.maxMessage()+1)), buf...)
			keepBuffer(buf)
			buf = larger
		}
		n, err := r.Read(buf[len(buf):min(int64(cap(buf)), c.held)])
		buf = buf[:len(buf)+n]
		switch {
		case len(buf) > c.maxMessage():
			c.srv.metrics.refuse("message_bytes")
			c.offer(errorMessage("too_large", "the message is larger than MAX_MESSAGE_BYTES"))
			c.shut(closeTooBig, "the message is larger than MAX_MESSAGE_BYTES")
			return buf, errors.New("message too large")
		case err == io.EOF && typ != websocket.MessageText:
			return buf, &refusal{code: "invalid_message", reason: "messages are text frames"}
		case err == io.EOF:
			return buf, c.makeRoom(buf)
		case err != nil:
			return buf, err
		}
	}
}

func (c *conn) maxMessage() int {
	if c.viewer {
		return maxViewerMessage
	}
	return c.srv.cfg.maxMessageBytes
}

// makeRoom takes room for the index of a tracker's message that is read. There is
// a brace for each event; those inside of events ask for more than is needed,
// for as long as the message is handled.
func (c *conn) makeRoom(msg []byte) error {
	if c.viewer {
		return nil
	}
	index := eventRoom * int64(min(bytes.Count(msg, []byte("{")), maxBatchEvents+1))
	if lack := int64(len(msg)) + index - c.held; lack > 0 {
		return c.grow(lack, lack)
	}
	return nil
}

// grow takes room for n bytes more, or, when it must wait, for most, as
// budget.grow does. The time that it waits is not the peer's.
func (c *conn) grow(n, most int64) error {
	c.limit.Stop()
	begun := time.Now()
	got, err := c.srv.budget.grow(c.ctx, n, most)
	c.held += got
	c.grown += got
	c.due = c.due.Add(time.Since(begun))
	c.limit.Reset(time.Until(c.due))
	return err
}

// release gives back a message's buffer and the room that is left of it.
func (c *conn) release(msg []byte) {
	if msg != nil {
		keepBuffer(msg)
	}
	c.srv.budget.finish(c.held, c.grown)
	c.held, c.grown = 0, 0
	c.busy.Store(false)
}

// refusal is what a client is told of a message that the server does not take.
type refusal struct {
	code, reason string
	expected     int64 // the seq that a sequence_gap should have had
}

func (r *refusal) Error() string { return r.reason }

// complain tells the client of a refusal, and gives it up when it sends nothing
// else. A tracker that has many batches under way meets a gap many times.
func (c *conn) complain(r *refusal) {
	c.srv.metrics.refuse(r.code)
	data := map[string]any{"message": r.reason, "code": r.code}
	if r.code == "sequence_gap" {
		data["expected"] = r.expected
	} else {
		c.errors++
	}
	c.offer(envelope("error", data))
	if c.errors >= maxErrors {
		c.shut(closePolicy, "too many errors in a row")
	}
}

// handleApart handles a message in a goroutine of its own, which lets go of the
// stack that parsing and SQL need: an idle connection then takes 4 KB less.
func (c *conn) handleApart(msg []byte) error {
	done := make(chan error, 1)
	go func() { // ends with the message; the reader waits for it
		err := errors.New("panic") // unless handle returns
		defer func() { done <- err }()
		defer c.srv.catch("message")
		err = c.handle(msg)
	}()
	return <-done
}

func (c *conn) handle(msg []byte) error {
	f, err := parseFrame(msg)
	if err != nil {
		return &refusal{code: "invalid_message", reason: err.Error()}
	}
	trackers, viewers := trackerMessages[f.typ], viewerMessages[f.typ]
	switch {
	case trackers == nil && viewers == nil:
		return &refusal{code: "unknown_type", reason: "unknown message type"}
	case c.viewer && viewers != nil:
		return viewers(c, f)
	case !c.viewer && trackers != nil:
		return trackers(c, f)
	}
	return &refusal{code: "forbidden", reason: "this type of connection may not send that"}
}

// heartbeat pings the peer, and once more if no pong comes; two missed pongs end
// the connection. It runs in a goroutine of its own, every HEARTBEAT_INTERVAL.
func (c *conn) heartbeat() {
	defer c.srv.catch("heartbeat")
	interval := c.srv.cfg.heartbeat
	for missed := 1; !c.ping(interval / 2); missed++ {
		if missed == 2 {
			c.cancel()
			c.net.Close()
			return
		}
	}
	if c.ctx.Err() == nil {
		c.pulse.Reset(interval)
	}
}

// ping says whether the peer is there. One in the middle of a message, or who
// waits for the server, is; other limits hold for those.
func (c *conn) ping(timeout time.Duration) bool {
	c.out.mu.Lock()
	writing := c.out.writing
	if !writing {
		c.armWrite() // the deadline of what was written last may have passed
	}
	c.out.mu.Unlock()
	if writing || c.busy.Load() {
		return true
	}
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	return c.ws.Ping(ctx) == nil || c.busy.Load() || c.out.isWriting()
}

// Writing.

// outbox is what a connection is to be sent: messages up to a bound, the newest
// ack, and at last the farewell.
type outbox struct {
	mu      sync.Mutex
	queue   []message
	bytes   int
	acks    map[string]int64 // by session: a connection may have ended one and begun another
	bye     *farewell
	lagging bool // the outbox was full: it takes nothing until it is empty
	writing bool // a goroutine empties it
	closed  bool
	writers sync.WaitGroup
}

type farewell struct {
	code   closeCode
	reason string
}

func (o *outbox) isWriting() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.writing
}

// add puts a message into the outbox and says whether it had room.
func (o *outbox) add(m message) bool {
	if o.closed || o.bye != nil || o.lagging {
		return false
	}
	if len(o.queue) >= outboxMessages || o.bytes >= outboxBytes {
		o.lagging = true
		return false
	}
	o.queue = append(o.queue, m)
	o.bytes += m.size()
	return true
}

// offer gives the connection a message to send, without waiting, and says
// whether there was room. A viewer that had none is sent nothing until it has
// read what is there; then the hub hears of it (drained).
func (c *conn) offer(m message) bool {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	was := c.out.lagging
	ok := c.out.add(m)
	if c.out.lagging && !was && c.viewer {
		c.srv.metrics.viewersLagged.Add(1)
	}
	c.start()
	return ok
}

// ack tells the tracker that everything up to seq is stored.
func (c *conn) ack(id string, seq int64) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.out.acks == nil {
		c.out.acks = map[string]int64{}
	}
	c.out.acks[id] = seq
	c.start()
}

// shut closes the connection, after what is in its outbox, with a reason. It
// does not wait.
func (c *conn) shut(code closeCode, reason string) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.out.bye != nil {
		return
	}
	c.out.bye = &farewell{code, reason}
	c.net.SetWriteDeadline(time.Now().Add(farewellTime))
	c.start()
}

// start sees to it that somebody writes. It is called with the outbox locked.
func (c *conn) start() {
	if c.out.writing || c.out.closed {
		return
	}
	c.out.writing = true
	c.out.writers.Add(1)
	go c.write()
}

// armWrite sets the deadline for the next piece, unless a farewell has set one
// for all that is left. It is called with the outbox locked.
func (c *conn) armWrite() {
	if c.out.bye == nil {
		c.net.SetWriteDeadline(time.Now().Add(2 * c.srv.cfg.heartbeat))
	}
}

// write empties the outbox. It ends when there is nothing left, or with the
// connection.
func (c *conn) write() {
	defer c.out.writers.Done()
	defer c.srv.catch("writer of a connection")
	for {
		m, again := c.next()
		if m == nil && !again {
			return
		}
		if m == nil {
			c.srv.hub.send(drained{c})
			continue
		}
		if err := c.writeMessage(m.encode()); err != nil {
			c.out.mu.Lock()
			c.out.closed = true
			c.out.mu.Unlock()
			c.cancel()
			return
		}
	}
}

// next takes what is to be written now. Without a message, again says that the
// outbox was full and is empty now; otherwise the writer's work is done.
func (c *conn) next() (m message, again bool) {
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.closed:
	case len(o.queue) > 0:
		m = o.queue[0]
		o.queue[0] = nil
		o.queue = o.queue[1:]
		o.bytes -= m.size()
		c.armWrite()
		return m, true
	case len(o.acks) > 0:
		c.srv.metrics.acks.Add(1)
		for id, seq := range o.acks {
			m = envelope("events_ack", map[string]any{"sessionId": id, "seq": seq})
			delete(o.acks, id)
			break
		}
		c.armWrite()
		return m, true
	case o.lagging:
		o.lagging = false
		return nil, true
	case o.bye != nil:
		o.closed = true
		bye := *o.bye
		o.writers.Add(1)
		go c.farewell(bye)
	}
	o.queue, o.acks, o.writing = nil, nil, false
	return nil, false
}

// writeMessage writes a message; a large one in pieces, so that a slow peer is
// told from one that does not read at all.
func (c *conn) writeMessage(m []byte) error {
	if len(m) <= writePiece {
		return c.ws.Write(context.Background(), websocket.MessageText, m)
	}
	w, err := c.ws.Writer(context.Background(), websocket.MessageText)
	if err != nil {
		return err
	}
	for len(m) > 0 {
		c.out.mu.Lock()
		c.armWrite()
		c.out.mu.Unlock()
		n := min(len(m), writePiece)
		if _, err := w.Write(m[:n]); err != nil {
			return err
		}
		m = m[n:]
	}
	return w.Close()
}

// farewell does the close handshake, for as long as it may take, and ends the
// connection.
func (c *conn) farewell(bye farewell) {
	defer c.out.writers.Done()
	defer c.srv.catch("close of a connection")
	c.net.SetDeadline(time.Now().Add(farewellTime))
	c.ws.Close(bye.code, bye.reason)
	c.cancel()
}

// Trackers.

var trackerMessages map[string]func(*conn, frame) error

func init() {
	trackerMessages = map[string]func(*conn, frame) error{
		"session_start":     (*conn).startSession,
		"events_batch":      (*conn).takeBatch,
		"session_end":       (*conn).endSession,
		"error":             (*conn).takeReport,
		"javascript_error":  (*conn).takeReport,
		"promise_rejection": (*conn).takeReport,
		"visibility_change": (*conn).passOn,
		"heartbeat":         (*conn).ignore,
	}
	viewerMessages = map[string]func(*conn, frame) error{
		"get_active_sessions":  (*conn).listSessions,
		"viewer_join_session":  (*conn).joinSession,
		"viewer_leave_session": (*conn).leaveSession,
		"get_session_events":   (*conn).sendPage,
		"heartbeat":            (*conn).ignore,
	}
}

func (c *conn) ignore(frame) error { return nil }

// recording gives the session that the connection records.
func (c *conn) recording() (*recording, error) {
	if c.lost.Swap(false) {
		c.rec = nil
	}
	if c.rec == nil {
		return nil, &refusal{code: "no_session", reason: "this connection records no session: send session_start"}
	}
	return c.rec, nil
}

func (c *conn) takeBatch(f frame) error {
	rec, err := c.recording()
	if err != nil {
		return err
	}
	if !f.array {
		return &refusal{code: "invalid_events", reason: `"events" must be an array of objects`}
	}
	if len(f.events) > maxBatchEvents {
		return &refusal{code: "invalid_events", reason: fmt.Sprintf("a batch has at most %d events", maxBatchEvents)}
	}
	seq := int64(0)
	if f.seq != nil {
		seq, err = strconv.ParseInt(string(f.seq), 10, 64)
		switch {
		case err != nil || seq < 1 || seq > maxSeq:
			return &refusal{code: "invalid_message", reason: `"seq" must be a whole number from 1 to 2^53`}
		case seq <= rec.seq:
			c.srv.hub.send(acks{c})
			return nil
		case seq > rec.seq+1:
			return &refusal{code: "sequence_gap", reason: fmt.Sprintf("expected seq %d", rec.seq+1), expected: rec.seq + 1}
		}
		rec.seq = seq
	}
	b := newBatch(rec.id, f, seq)
	c.held -= b.room
	c.srv.hub.send(publish{c, b})
	return nil
}

func (c *conn) endSession(f frame) error {
	rec, err := c.recording()
	if err != nil {
		return err
	}
	var data sessionID
	json.Unmarshal(f.data, &data)
	if data.ID == "" || data.ID == rec.id || data.ID == rec.asked {
		c.srv.hub.send(finish{c})
		c.rec = nil
	}
	return nil
}

// takeReport stores an error of the page, and passes it on if viewers know its
// type.
func (c *conn) takeReport(f frame) error {
	rec, err := c.recording()
	if err != nil {
		return err
	}
	data := f.data
	if data == nil {
		data = []byte("null")
	}
	if len(data) > maxMetadata || nests(data, maxNesting) {
		data = rewrite(data, []string{"message", "reason", "error", "stack", "timestamp", "filename", "lineno", "colno", "url"}, nil)
	}
	r := report{kind: f.typ, data: slices.Clone(data), room: int64(len(data)) + 256}
	var m message
	if f.typ != "error" {
		if m, err = withSession(f.typ, data, rec.id); err != nil {
			return err
		}
	}
	c.held -= r.room
	c.srv.hub.send(reported{c, r, m})
	return nil
}

// passOn sends a message as it is to the session's viewers.
func (c *conn) passOn(f frame) error {
	rec, err := c.recording()
	if err != nil {
		return err
	}
	if len(f.data) > maxMetadata {
		return &refusal{code: "too_large", reason: "data is larger than 64 KiB"}
	}
	m, err := withSession(f.typ, f.data, rec.id)
	if err == nil {
		c.srv.hub.send(forward{c, m})
	}
	return err
}

// withSession makes a message of data as the page sent it and the session's id,
// which stands last: of two keys the last counts.
func withSession(typ string, data []byte, id string) (message, error) {
	if len(data) == 0 || data[0] != '{' {
		return nil, &refusal{code: "invalid_message", reason: `"data" must be an object`}
	}
	inner := strings.TrimSpace(string(data[1 : len(data)-1]))
	if inner != "" {
		inner += ","
	}
	return text(`{"type":"` + typ + `","data":{` + inner + `"sessionId":"` + id + `"}}`), nil
}

// Starting a session.

var validID = regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,128}$`).MatchString

// start is what a session_start asks for.
type start struct {
	id     string
	about  description
	resume bool // the tracker numbers its batches and knows tokens
	token  string
}

// parseStart reads a session_start's data. What it does not understand is left
// in the metadata and is no reason not to record.
func parseStart(data []byte) start {
	var st start
	members(data, func(name string, _, value []byte) {
		switch name {
		case "sessionId":
			st.id = unquote(value)
		case "userId":
			st.about.userID = clean(plainText(value))
		case "url":
			st.about.url = clean(plainText(value))
		case "resume":
			st.resume, st.token = true, unquote(value)
		}
	})
	if len(data) > maxMetadata || nests(data, maxNesting) {
		data = rewrite(data, []string{"sessionId", "userId", "url", "userAgent", "viewport", "startTime", "referrer", "timeZone"}, nil)
	}
	st.about.metadata = rewrite(data, nil, []member{
		{"viewport", `{"width":1920,"height":1080,"devicePixelRatio":1}`}, {"referrer", `""`}, {"timeZone", `"UTC"`}})
	return st
}

type member struct{ key, value string }

// rewrite copies a JSON object without its "resume", which is a secret. With
// only, it keeps no other members than these, each cut to maxField bytes. The
// defaults that are missing are added.
func rewrite(object []byte, only []string, defaults []member) []byte {
	var kept []string
	seen := map[string]bool{}
	members(object, func(name string, key, value []byte) {
		if name == "resume" || only != nil && !slices.Contains(only, name) {
			return
		}
		if only != nil && (len(value) > maxField || nests(value, maxNesting)) {
			if value[0] != '"' {
				return
			}
			value, _ = json.Marshal(cut(unquote(value)))
		}
		seen[name] = true
		kept = append(kept, string(key)+":"+string(value))
	})
	for _, d := range defaults {
		if !seen[d.key] {
			kept = append(kept, `"`+d.key+`":`+d.value)
		}
	}
	return []byte("{" + strings.Join(kept, ",") + "}")
}

// plainText gives a string's text, and any other value as it stands.
func plainText(value []byte) string {
	if value[0] == '"' {
		return unquote(value)
	}
	if string(value) == "null" {
		return ""
	}
	return string(value)
}

// clean makes text fit for a column and a log line.
func clean(s string) string {
	return cut(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return utf8.RuneError
		}
		return r
	}, s))
}

func cut(s string) string {
	if len(s) > maxField {
		s = strings.ToValidUTF8(s[:maxField], "")
	}
	return s
}

// startSession begins or continues a session. The one that the connection
// records already is claimed once more, for what is new in its metadata.
func (c *conn) startSession(f frame) error {
	if !c.mayStart() {
		return &refusal{code: "too_many_sessions", reason: "too many sessions in a minute on this connection"}
	}
	st := parseStart(f.data)
	asked, known := st.id, ""
	if rec, _ := c.recording(); rec != nil {
		if st.id == "" || st.id == rec.id || st.id == rec.asked {
			st.id, st.token, asked, known = rec.id, rec.token, rec.asked, rec.id
		} else {
			c.srv.hub.send(finish{c})
			c.rec = nil
		}
	}
	fresh := !validID(st.id)
	if !fresh && st.token == "" {
		reply := make(chan bool, 1)
		fresh, _ = ask(c.srv.hub, reply, held{st.id, c, reply})
	}
	rec, at, err := c.begin(st, fresh)
	if err != nil {
		return err
	}
	rec.asked = asked
	c.rec = rec
	if rec.id != asked && rec.id != known {
		c.offer(envelope("session_assigned", sessionID{rec.id}))
	}
	if st.resume {
		c.offer(envelope("session_ready", map[string]any{"sessionId": rec.id, "resume": rec.token, "lastSeq": at.stored, "accepted": at.accepted}))
	}
	return nil
}

// mayStart counts the sessions of this connection and minute.
func (c *conn) mayStart() bool {
	if now := time.Now(); now.Sub(c.startsAt) > time.Minute {
		c.starts, c.startsAt = 0, now
	}
	c.starts++
	return c.starts <= c.srv.cfg.maxSessionsPerMinute
}

// begin claims a session in the database and takes it in the hub: the one that
// was asked for, or, with fresh and whenever that may not be had, a new one.
func (c *conn) begin(st start, fresh bool) (*recording, attached, error) {
	for {
		rec := &recording{id: st.id, token: st.token}
		if fresh {
			rec.id, rec.token = rand.Text(), ""
		}
		resuming := rec.token != ""
		if st.resume && !resuming {
			rec.token = rand.Text()
		}
		about := st.about
		cl, err := c.claim(rec, &about, resuming)
		if errors.Is(err, errToken) && !fresh {
			fresh = true
			continue
		}
		if err != nil {
			return nil, attached{}, err
		}
		about.userID = cl.userID
		reply := make(chan attached, 1)
		at, ok := ask(c.srv.hub, reply, attach{c, rec.id, cl, &about, sessionStarted(rec.id, &about), reply})
		switch {
		case !ok:
			return nil, at, net.ErrClosed
		case at.outcome == heldByOther:
			fresh = true
		case at.outcome == outdated:
			c.shut(closeTaken, "the session continues on another connection")
			return nil, at, net.ErrClosed
		default:
			c.lost.Store(false)
			rec.seq = at.accepted
			return rec, at, nil
		}
	}
}

// claim waits for the database when it is away, for at most MESSAGE_TIMEOUT: the
// connection is not read meanwhile, and its peer may have gone.
func (c *conn) claim(rec *recording, about *description, resuming bool) (claim, error) {
	keepUser := about.userID == "" // the one that the session has, if any
	if keepUser {
		about.userID = "user_" + strings.ToLower(rand.Text()[:12])
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.srv.cfg.messageTimeout)
	defer cancel()
	for attempt := 0; ; attempt++ {
		cl, err := c.srv.store.claim(ctx, rec.id, about, keepUser, rec.token, resuming)
		switch {
		case err == nil || errors.Is(err, errToken):
			return cl, err
		case blamesData(err):
			c.srv.log.Warn("session refused by the database", "session", rec.id, "err", err)
			return cl, &refusal{code: "not_stored", reason: "the database refused the session's data"}
		case ctx.Err() == nil:
			c.srv.metrics.databaseErrors.Add(1)
			c.srv.store.distrust(err)
			c.srv.log.Debug("session waits for the database", "session", rec.id, "err", err)
		}
		if !pause(ctx, attempt) {
			c.shut(closeTryAgain, "the database is away: try again later")
			return cl, ctx.Err()
		}
	}
}

// Viewers.

var viewerMessages map[string]func(*conn, frame) error

func (c *conn) listSessions(frame) error {
	reply := make(chan []summary, 1)
	live, _ := ask(c.srv.hub, reply, active{reply})
	c.offer(activeSessions(live))
	return nil
}

// sessionRequest is the data of a viewer's messages.
type sessionRequest struct {
	ID        string `json:"sessionId"`
	FromIndex int64  `json:"fromIndex"`
	Limit     int64  `json:"limit"`
}

func parseRequest(f frame) (sessionRequest, error) {
	var r sessionRequest
	if err := json.Unmarshal(f.data, &r); err != nil || r.FromIndex < 0 || r.Limit < 0 {
		return r, &refusal{code: "invalid_message", reason: `"data" must have a sessionId, and whole numbers from 0 as fromIndex and limit`}
	}
	if !validID(r.ID) {
		return r, errNoSession
	}
	return r, nil
}

var errNoSession = &refusal{code: "not_found", reason: "no such session"}

// joinSession makes the viewer watch a session. One that is not in memory is
// looked up in the database, and offered to the hub again with what was found:
// it may have come back meanwhile.
func (c *conn) joinSession(f frame) error {
	r, err := parseRequest(f)
	if err != nil {
		return err
	}
	reply := make(chan bool, 1)
	if ok, _ := ask(c.srv.hub, reply, join{c, r.ID, nil, reply}); ok {
		return nil
	}
	found, err := c.srv.store.session(c.ctx, r.ID)
	if err != nil {
		return c.refuseQuery(err)
	}
	ask(c.srv.hub, reply, join{c, r.ID, &found.summary, reply})
	return nil
}

func (c *conn) refuseQuery(err error) error {
	if errors.Is(err, errNotFound) {
		return errNoSession
	}
	c.srv.log.Warn("question not answered", "err", err)
	return &refusal{code: "unavailable", reason: "the database is away: try again"}
}

func (c *conn) leaveSession(f frame) error {
	r, err := parseRequest(f)
	if err == nil {
		c.srv.hub.send(unjoin{c, r.ID})
	}
	return err
}

// sendPage answers get_session_events. It waits until the page is written: a
// viewer that does not read gets no second one.
func (c *conn) sendPage(f frame) error {
	r, err := parseRequest(f)
	if err != nil {
		return err
	}
	if r.Limit == 0 || r.Limit > maxPage {
		r.Limit = maxPage
	}
	page := []byte(`{"type":"session_events","data":{"sessionId":"` + r.ID + `","events":[`)
	n := int64(0)
	s, err := c.srv.events(c.ctx, r.ID, r.FromIndex, r.Limit, func(event []byte) bool {
		if n > 0 {
			page = append(page, ',')
		}
		page = append(page, event...)
		n++
		return len(page) < pageBytes
	})
	if err != nil {
		return c.refuseQuery(err)
	}
	page = fmt.Appendf(page, `],"fromIndex":%d,"totalEvents":%d,"hasMore":%t,"isActive":%t}}`,
		r.FromIndex, s.now.events, r.FromIndex+n < s.now.events, s.isActive)
	c.out.mu.Lock()
	c.armWrite()
	c.out.mu.Unlock()
	return c.writeMessage(page)
}

// catch is deferred by what answers one client: a panic is written down, and
// ends only that. One of the hub or a writer ends the server.
func (s *server) catch(where string) {
	if v := recover(); v != nil {
		s.logs.exception(where, v, debug.Stack())
	}
}

// Back pressure.

// budget is MAX_BUFFER_BYTES: the room that everything received and not yet
// committed, the tails, and sessions with their metadata may take. Readers take room before they read and
// wait when there is none; the hub gives it back.
type budget struct {
	mu         sync.Mutex
	free       int64 // below 0 while one message goes beyond the budget
	unfinished int64 // taken by messages of which only a part is read
	half       int64 // of the budget: more than this unfinished ones do not take, but for one
	waiting    []*waiter
	opened     bool
}

func newBudget(size int64) *budget { return &budget{free: size, half: size / 2} }

type waiter struct {
	n       int64
	grows   bool // it has room for a part of its message
	granted chan struct{}
}

// may says whether a waiter's turn has come. One message that grows may go
// beyond the half, and beyond the budget, to its end: those who wait for room
// hold some, and would otherwise wait for each other.
func (b *budget) may(w *waiter) bool {
	if w.grows {
		return b.opened || b.free >= 0 && b.unfinished <= b.half
	}
	return b.opened || b.free >= w.n
}

// take waits for room for n bytes.
func (b *budget) take(ctx context.Context, n int64) error {
	b.mu.Lock()
	if len(b.waiting) == 0 && b.free >= n {
		b.free -= n
		b.mu.Unlock()
		return nil
	}
	w := &waiter{n: n, granted: make(chan struct{})}
	b.waiting = append(b.waiting, w)
	b.grant()
	b.mu.Unlock()
	return b.wait(ctx, w)
}

// grow takes room for n bytes more of a message of which some is read, or, when
// there is not so much, waits for its turn to take most, which is all that the
// message may need. It gives what it has taken.
func (b *budget) grow(ctx context.Context, n, most int64) (int64, error) {
	n = min(n, most)
	b.mu.Lock()
	if b.opened || b.free >= n && b.unfinished+n <= b.half {
		b.free -= n
		b.unfinished += n
		b.mu.Unlock()
		return n, nil
	}
	w := &waiter{n: most, grows: true, granted: make(chan struct{})}
	b.waiting = slices.Insert(b.waiting, 0, w)
	b.grant()
	b.mu.Unlock()
	if err := b.wait(ctx, w); err != nil {
		return 0, err
	}
	return most, nil
}

// wait waits until w is granted; if ctx ends before that, w takes nothing.
func (b *budget) wait(ctx context.Context, w *waiter) error {
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.waiting, w)
	if i < 0 {
		return nil // it was granted just now
	}
	b.waiting = slices.Delete(b.waiting, i, i+1)
	b.grant()
	return ctx.Err()
}

// finish gives back what is left of a message's room. grown of it was taken while
// the message was read, which it is now, or it is given up.
func (b *budget) finish(n, grown int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	b.unfinished -= grown
	b.grant()
}

// left is the room that is free.
func (b *budget) left() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.free
}

// give gives room back. A negative n takes it without waiting.
func (b *budget) give(n int64) { b.finish(n, 0) }

// grant serves those who wait, first those who grow, then in order.
func (b *budget) grant() {
	for i := 0; i < len(b.waiting); {
		w := b.waiting[i]
		if !b.may(w) {
			if !w.grows {
				return
			}
			i++ // the others need not wait for it
			continue
		}
		b.waiting = slices.Delete(b.waiting, i, i+1)
		b.free -= w.n
		if w.grows {
			b.unfinished += w.n
		}
		close(w.granted)
	}
}

// open lets everyone through: the server stops, and what has been read is to be
// stored.
func (b *budget) open() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.opened = true
	b.grant()
}
