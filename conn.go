package main

import (
	"bufio"
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"io"
	"math/bits"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"nhooyr.io/websocket"
)

const (
	firstRead  = 16 << 10  // room for a message before it is known to be larger
	inflater   = 48 << 10  // room for what inflates a message
	writePiece = 256 << 10 // of a large message, each with its own deadline
	maxErrors  = 100       // in a row, in a post in all; then the connection is closed
)

// conn is one WebSocket; what its messages mean is its handler's. Its own
// goroutine reads. Another writes and lives only while there is something to
// write: an idle connection then takes 4 KB less.
type conn struct {
	// net is beneath ws, for deadlines and for an end without a handshake. A post has neither.
	ws     *websocket.Conn
	net    net.Conn
	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	out    *outbox
	// handle may not keep msg, whose buffer is used again. kept is what the hub has of its room from
	// now on. A protocolError is told to the client; any other error ends the connection.
	handle func(msg []byte) (kept int64, err error)
	*core
	maxMessage int   // bytes
	inflater   int64 // room for what inflates a message; 0: messages come as they are
	// The room of unbudgeted messages counts all the same, and may take the budget below 0.
	unbudgeted bool // messages, which are small, are read also while the budget has no room

	readTimer *time.Timer  // closes the connection when one message takes too long
	pingTimer *time.Timer  // starts the next ping
	busy      atomic.Bool  // inside a message: pings wait
	received  atomic.Int64 // messages so far
	writer    sync.WaitGroup

	// The reading goroutine's own:
	reserved int64     // room taken from the budget for this message
	grown    int64     // of it, what grow has taken: budget.growing has it too
	readBy   time.Time // when the message must be here
	errors   int       // in a row
}

// protocolError is what a client is told of a message that is not taken. code is for its program.
type protocolError struct{ code, reason string }

func (e *protocolError) Error() string { return e.reason }

// errTooLarge ends a WebSocket nevertheless: the rest of the message would have to be read.
var errTooLarge = &protocolError{"too_large", "the message is larger than MAX_MESSAGE_BYTES"}

// open makes ready what works beside the reader: the writer and the pings.
func (c *conn) open() {
	c.out.wake = func() { c.writer.Go(c.write) } // ends when the outbox is empty, or with the connection
	c.out.abort = func() {
		c.cancel()
		c.net.Close()
	}
	c.pingTimer = time.AfterFunc(c.cfg.heartbeat, c.ping)
}

// serve reads until the connection ends.
func (c *conn) serve() {
	defer c.logs.catch("connection")
	for {
		if c.out.wait(c.ctx) != nil {
			return
		}
		msg, err := c.read()
		if err == nil {
			err = c.handleInGoroutine(msg)
		}
		c.release(msg)
		if wrong, ok := errors.AsType[*protocolError](err); ok {
			c.replyError(wrong)
		} else if err != nil {
			return
		} else {
			c.errors = 0
		}
	}
}

// close ends the connection, waits for its writer, and lets nothing into the outbox any more. With a
// reason to close the writer first sends what stands before it: closeTime at most.
func (c *conn) close() {
	c.pingTimer.Stop()
	if c.out.end(false) {
		c.writer.Wait()
	}
	c.cancel()
	c.ws.CloseNow()
	c.writer.Wait()
	c.out.end(true)
}

// handleInGoroutine handles a message in a goroutine of its own, which lets go of
// the stack that parsing and SQL need: an idle connection takes 4 KB less.
func (c *conn) handleInGoroutine(msg []byte) error {
	done := make(chan error, 1)
	go func() { // ends with the message; the reader waits for it
		err := errors.New("panic") // unless handle returns
		defer func() { done <- err }()
		defer c.logs.catch("message")
		var kept int64
		kept, err = c.handle(msg)
		c.reserved -= kept
	}()
	return <-done
}

// replyError tells the client what was wrong, and gives up one that sends nothing
// else.
func (c *conn) replyError(e *protocolError) {
	c.metrics.refuse(e.code)
	c.out.send(errorMessage(e.code, e.reason))
	if c.errors++; c.errors >= maxErrors {
		c.out.closeAfterSending(closePolicy, "too many errors")
	}
}

// The connection beneath.

// hijacker hands a connection over from HTTP to a WebSocket, and keeps hold of
// it for deadlines. The buffers of an HTTP connection take 8 KB for as long as
// it lasts; smaller ones serve a tracker, which is sent little, as well.
type hijacker struct {
	http.ResponseWriter
	wire *atomic.Int64 // counts what a tracker sends; nil for a viewer
	conn net.Conn
}

// Hijack is called by websocket.Accept, once.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err == nil && h.wire != nil {
		conn = counted{conn, conn, h.wire}
		if rw.Reader.Buffered() == 0 {
			rw = bufio.NewReadWriter(bufio.NewReaderSize(conn, 512), bufio.NewWriterSize(conn, 512))
		}
	}
	h.conn = conn
	return conn, rw, err
}

// counted counts the bytes that are read from a connection, or from a body, which has no Conn.
type counted struct {
	net.Conn
	from io.Reader
	wire *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.from.Read(p)
	c.wire.Add(int64(n))
	return n, err
}

// Reading.

// buffers are what messages are read into. Each pool has buffers of twice the
// size of the one before, from firstRead to 4 MB.
var buffers [9]sync.Pool

// newBuffer gives an empty buffer for at least n bytes, and for less than twice
// as many where n is firstRead or more.
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

// keepBuffer takes a buffer of which nobody holds a part any more. One of another size than the
// pools' is left to the garbage collector.
func keepBuffer(b []byte) {
	if i := bits.Len(uint(cap(b)-1) / firstRead); i < len(buffers) && cap(b) == firstRead<<i {
		buffers[i].Put(b[:0])
	}
}

// read gives the next message, which the caller releases, also with an error. A message that is too
// large, or does not inflate, cannot be read to its end: the connection closes.
func (c *conn) read() ([]byte, error) {
	typ, r, err := c.ws.Reader(c.ctx)
	if err != nil {
		return nil, err
	}
	c.busy.Store(true)
	c.received.Add(1)
	msg, err := c.readAll(r)
	var corrupt flate.CorruptInputError
	switch {
	case err == errTooLarge:
		c.out.send(errorMessage(errTooLarge.code, errTooLarge.reason))
		c.out.closeAfterSending(closeTooBig, errTooLarge.reason)
		return msg, net.ErrClosed
	case errors.As(err, &corrupt):
		c.metrics.refuse("not_inflated")
		c.out.closeAfterSending(closeInvalid, "the message cannot be inflated")
	case err == nil && typ != websocket.MessageText:
		err = &protocolError{"invalid_message", "messages are text frames"}
	}
	return msg, err
}

// readAll reads a message to its end. Room for it is taken from the budget before
// its bytes are read, or inflated.
func (c *conn) readAll(r io.Reader) ([]byte, error) {
	first := firstRead + c.inflater
	if c.unbudgeted {
		first = int64(c.maxMessage) + 1 // it never grows
		c.budget.force(first)
	} else if err := c.takeRoom(first); err != nil {
		return nil, err
	}
	c.reserved = first
	c.readBy = time.Now().Add(c.cfg.messageTimeout)
	c.readTimer = time.AfterFunc(c.cfg.messageTimeout, func() {
		c.metrics.refuse("message_time")
		c.out.closeAfterSending(closePolicy, "the message took too long")
	})
	defer c.readTimer.Stop()
	buf := newBuffer(firstRead)
	for {
		// What inflates the message has its part of what is reserved, the buffer the rest.
		room := c.reserved - c.inflater
		if int64(len(buf)) == room {
			if err := c.grow(min(room, int64(c.maxMessage)+1-room)); err != nil {
				return buf, err
			}
			room = c.reserved - c.inflater
		}
		if len(buf) == cap(buf) {
			larger := append(newBuffer(min(2*len(buf), c.maxMessage+1)), buf...)
			keepBuffer(buf)
			buf = larger
		}
		n, err := r.Read(buf[len(buf):min(int64(cap(buf)), room)])
		buf = buf[:len(buf)+n]
		if c.inflater > 0 {
			runtime.Gosched() // others would wait for a processor for 10 ms at a time
		}
		switch {
		case len(buf) > c.maxMessage:
			c.metrics.refuse("message_bytes")
			return buf, errTooLarge
		case err == io.EOF:
			return buf, c.reserveCopy(buf)
		case err != nil:
			return buf, err
		}
	}
}

// takeRoom takes room for a message that begins to arrive. A connection's first,
// which starts a session, does not wait for longer than startTime: see claimRow.
func (c *conn) takeRoom(n int64) error {
	if c.received.Load() > 1 {
		return c.budget.take(c.ctx, n)
	}
	ctx, cancel := context.WithTimeout(c.ctx, startTime)
	defer cancel()
	err := c.budget.take(ctx, n)
	if err != nil {
		c.out.closeAfterSending(closeTryAgain, "there is no room: try again later")
	}
	return err
}

// reserveCopy takes room for what handling makes of a tracker's message, a copy and
// an index: that of tiny events is larger than the message. Each event has a brace;
// braces within events ask for more than is needed.
func (c *conn) reserveCopy(msg []byte) error {
	if c.unbudgeted {
		return nil
	}
	index := eventCost * int64(min(bytes.Count(msg, []byte("{")), maxBatchEvents+1))
	if lack := 2*int64(len(msg)) + index - c.reserved; lack > 0 {
		return c.grow(lack)
	}
	return nil
}

// grow takes room for n bytes more of this message, and may wait for the commits of others. That
// time does not count as the peer's.
func (c *conn) grow(n int64) error {
	c.readTimer.Stop()
	begun := time.Now()
	err := c.budget.grow(c.ctx, c, n)
	if err == nil {
		c.reserved += n
		c.grown += n
	}
	c.readBy = c.readBy.Add(time.Since(begun))
	c.readTimer.Reset(time.Until(c.readBy))
	return err
}

// release gives back a message's buffer, and its room but for what the handler
// has kept.
func (c *conn) release(msg []byte) {
	if msg != nil {
		keepBuffer(msg)
	}
	c.budget.finish(c, c.reserved, c.grown)
	c.reserved, c.grown = 0, 0
	c.busy.Store(false)
}

// ping ends the connection when no pong comes within an interval; otherwise it
// runs again after one. It is the ping timer's function.
func (c *conn) ping() {
	defer c.logs.catch("ping")
	if !c.isAlive() {
		c.out.abort()
	} else if c.ctx.Err() == nil {
		c.pingTimer.Reset(c.cfg.heartbeat)
	}
}

// isAlive reports whether the peer answers a ping. One that sends, or is being
// sent a message, counts as alive: its pong may stand behind what it has sent, and
// other limits hold for messages.
func (c *conn) isAlive() bool {
	if c.busy.Load() || c.out.isSending() {
		return true
	}
	before := c.received.Load()
	c.extendDeadline() // that of the last message may have passed
	ctx, cancel := context.WithTimeout(c.ctx, c.cfg.heartbeat)
	defer cancel()
	return c.ws.Ping(ctx) == nil || c.busy.Load() || c.out.isSending() || c.received.Load() != before
}

// Writing.

// write sends what the outbox holds. It ends when there is nothing left, and is started anew by the
// next message; or it ends for good, and the connection with it.
func (c *conn) write() {
	defer c.logs.catch("writer of a connection")
	alive := false
	defer func() {
		if !alive {
			c.out.end(true)
			c.cancel()
		}
	}()
	for {
		m, last := c.next()
		switch {
		case m != nil:
			if c.writeMessage(m.encode()) != nil {
				return
			}
		case last != nil:
			c.ws.Close(last.code, last.reason) // for closeTime at most, then the outbox aborts
			return
		default:
			alive = true
			return
		}
	}
}

// next takes what is to be sent now out of the outbox, and counts acks.
func (c *conn) next() (m message, last *closeFrame) {
	m, last = c.out.next()
	if _, isAck := m.(ack); isAck {
		c.metrics.acks.Add(1)
	}
	return m, last
}

// writeMessage writes a message; a large one in pieces, so that a slow peer is
// told from one that does not read at all.
func (c *conn) writeMessage(m []byte) error {
	c.extendDeadline()
	if len(m) <= writePiece {
		return c.ws.Write(context.Background(), websocket.MessageText, m)
	}
	w, err := c.ws.Writer(context.Background(), websocket.MessageText)
	if err != nil {
		return err
	}
	for piece := range slices.Chunk(m, writePiece) {
		c.extendDeadline()
		if _, err := w.Write(piece); err != nil {
			return err
		}
	}
	return w.Close()
}

// extendDeadline gives the peer two heartbeats to take what is written next, a ping too.
func (c *conn) extendDeadline() { c.net.SetWriteDeadline(time.Now().Add(2 * c.cfg.heartbeat)) }
