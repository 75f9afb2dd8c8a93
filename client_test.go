package main

// The clients of the tests and of the benchmark: a WebSocket by hand, which can
// also send what no library would; a tracker that keeps what is not acknowledged;
// a viewer that checks every event it sees.
//
// Events are a function of session and number (testEvent), and a tracker's
// event number n belongs at index n. So nobody has to remember what was sent:
// whoever sees an event at an index knows which bytes must be there.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nhooyr.io/websocket"
)

// ---- events ----

// oddities are JSON values that a store which decodes them would change or
// refuse, or that mislead one who looks for an event's end.
var oddities = []string{
	`"nul \u0000 inside"`, `"lone \ud800 surrogates \udfff"`, `1e400`, `-1E-400`,
	`12345678901234567890`, `0.10000000000000000001`, `{"twice":1,"twice":2}`,
	`[ [ ] , { } , "]},{" , "\"}]" ]`, "\"raw ünïcödé 💾 \u2028\"", `"\u00e9\/\\"`,
	`{"type":2,"timestamp":1}`, `"ends with a backslash \\"`, `null`, `{"__proto__":{"a":1}}`,
}

// testEvent is event number n of a session: always the same bytes. Every 100
// events a full snapshot of 20 KB begins the page anew.
func testEvent(session string, n int) []byte {
	at := 1700000000000 + 10*n
	switch n % 100 {
	case 0:
		return fmt.Appendf(nil, `{"type":4,"data":{"href":"https://example.com/%s/%d","width":1920},"timestamp":%d}`, session, n, at)
	case 1:
		return fmt.Appendf(nil, `{"type":2,"data":{"of":%q,"n":%d,"text":"%s"},"timestamp":%d}`, session, n, snapshotText, at)
	}
	odd := oddities[n%len(oddities)]
	if n%5 == 0 {
		const spaced = "{ \"timestamp\" : %d,\n\t\"data\": {\"odd\": %s, \"of\": %q , \"n\":%d} ,\"type\":3 }"
		return fmt.Appendf(nil, spaced, at, odd, session, n)
	}
	return fmt.Appendf(nil, `{"type":3,"data":{"source":%d,"of":%q,"n":%d,"odd":%s,"noise":"%x"},"timestamp":%d}`,
		n%13, session, n, odd, uint64(n)*0x9E3779B97F4A7C15, at)
}

// snapshotText is 20 KB that compress about as a page does.
var snapshotText = func() string {
	var text strings.Builder
	for i := 0; text.Len() < 20<<10; i++ {
		fmt.Fprintf(&text, "<div class='row-%d'>%x</div>", i%7, uint64(i)*0x9E3779B97F4A7C15)
	}
	return text.String()
}()

// countRight tells how many events a JSON array holds when it is exactly the
// session's events from index from on, one after the other; -1 when it is not.
func countRight(session string, from int, array []byte) (n int) {
	rest, ok := bytes.CutPrefix(array, []byte("["))
	for ; ok && (len(rest) != 1 || rest[0] != ']'); n++ {
		if n > 0 {
			rest, ok = bytes.CutPrefix(rest, []byte(","))
		}
		if ok {
			rest, ok = bytes.CutPrefix(rest, testEvent(session, from+n))
		}
	}
	if !ok {
		return -1
	}
	return n
}

// sessionName is a session id for a test, unlike those of the other tests.
func sessionName(t testing.TB, n int) string {
	return fmt.Sprintf("%.100s-%d", regexp.MustCompile(`[^A-Za-z0-9_]`).ReplaceAllString(t.Name(), "."), n)
}

// ---- WebSocket ----

// testConn is a connection to the server. It costs next to nothing, so that the
// benchmark measures the server.
type testConn struct {
	net.Conn
	t       testing.TB
	in      *bufio.Reader
	message []byte // the last one, reused
}

const maskKey = "KEY!"

func mask(b []byte) []byte {
	for i := range b {
		b[i] ^= maskKey[i&3]
	}
	return b
}

// frameHeader has the mask's key at its end.
func frameHeader(head byte, size uint64) []byte {
	frame := append(make([]byte, 0, 14), head)
	switch {
	case size < 126:
		frame = append(frame, 0x80|byte(size))
	case size < 1<<16:
		frame = binary.BigEndian.AppendUint16(append(frame, 0x80|126), uint16(size))
	default:
		frame = binary.BigEndian.AppendUint64(append(frame, 0x80|127), size)
	}
	return append(frame, maskKey...)
}

// maskedFrame is a frame as a client sends it; head is its first byte.
func maskedFrame(head byte, payload []byte) []byte {
	return append(frameHeader(head, uint64(len(payload))), mask(bytes.Clone(payload))...)
}

func maskedText(payload []byte) []byte { return maskedFrame(0x81, payload) }

// announce is the header of a text frame of a size, without what it announces.
func announce(size uint64) []byte { return frameHeader(0x81, size) }

// readFrame reads one frame, and appends its payload to buf.
func readFrame(in *bufio.Reader, buf []byte) (head byte, all []byte, err error) {
	var h [10]byte
	if _, err = io.ReadFull(in, h[:2]); err != nil {
		return 0, buf, err
	}
	n := int(h[1] & 0x7f)
	switch n {
	case 126:
		_, err = io.ReadFull(in, h[2:4])
		n = int(binary.BigEndian.Uint16(h[2:]))
	case 127:
		_, err = io.ReadFull(in, h[2:10])
		n = int(binary.BigEndian.Uint64(h[2:]))
	}
	if h[1]&0x80 != 0 { // from a client
		in.Discard(len(maskKey))
	}
	start := len(buf)
	if err == nil {
		buf = slices.Grow(buf, n)[:start+n]
		_, err = io.ReadFull(in, buf[start:])
	}
	return h[0], buf, err
}

// narrow connections have little room in the kernel: what their peer sends and
// they do not read stays with it.
var narrow = &net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
	return raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
}}

// openWebSocket connects and shakes hands; buffer is the size of what it reads at
// once. Its error is a handshakeStatus when the server refuses.
func openWebSocket(dialer *net.Dialer, address string, buffer int) (*testConn, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	conn, err := dialer.Dial("tcp", u.Host)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "wss" {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	}
	c := &testConn{Conn: conn, in: bufio.NewReaderSize(conn, buffer)}
	conn.SetDeadline(time.Now().Add(patience))
	c.write("GET " + u.RequestURI() + " HTTP/1.1\r\nHost: " + u.Host + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
	if status := c.status(); status != http.StatusSwitchingProtocols {
		conn.Close()
		return nil, handshakeStatus(status)
	}
	conn.SetDeadline(time.Time{})
	return c, nil
}

type handshakeStatus int

func (s handshakeStatus) Error() string { return fmt.Sprintf("handshake: status %d", int(s)) }

// dialServer connects for a test: failures of its connection fail the test.
func dialServer(t testing.TB, address string) *testConn {
	t.Helper()
	c, err := openWebSocket(&net.Dialer{}, address, 4096)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	c.t = t
	t.Cleanup(func() { c.Close() })
	return c
}

// rawWebSocket is one on which anything will be sent.
func rawWebSocket(t testing.TB, s *testServer, kind string) *testConn {
	t.Helper()
	return dialServer(t, s.ws(kind))
}

// rawTCP has not shaken hands.
func rawTCP(t testing.TB, s *testServer) *testConn {
	t.Helper()
	conn, err := net.Dial("tcp", "127.0.0.1:"+s.port)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { conn.Close() })
	return &testConn{Conn: conn, t: t, in: bufio.NewReader(conn)}
}

func (c *testConn) CloseNow() error { return c.Close() }

// write sends bytes as they are. It ignores errors: the server may have closed in
// the middle.
func (c *testConn) write(text string) { io.WriteString(c.Conn, text) }

// status reads the head of an answer and gives its status, 0 when there is none.
func (c *testConn) status() int {
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return 0
	}
	return resp.StatusCode
}

// read gives the next message, whole, until the next call. It answers pings, and
// a close frame, which it returns as a websocket.CloseError.
func (c *testConn) read() ([]byte, error) {
	for c.message = c.message[:0]; ; {
		start := len(c.message)
		head, all, err := readFrame(c.in, c.message)
		if err != nil {
			return nil, err
		}
		c.message = all
		switch payload := all[start:]; head & 0x0f {
		case 8:
			c.Write(maskedFrame(0x88, payload))
			closed := websocket.CloseError{Code: websocket.StatusNoStatusRcvd}
			if len(payload) >= 2 {
				closed = websocket.CloseError{Code: websocket.StatusCode(binary.BigEndian.Uint16(payload)), Reason: string(payload[2:])}
			}
			return nil, closed
		case 9:
			c.Write(maskedFrame(0x8a, payload))
			c.message = all[:start]
		case 10:
			c.message = all[:start]
		default:
			if head&0x80 != 0 {
				return c.message, nil
			}
		}
	}
}

// testMessage has the fields of every message that the server sends, and its
// text.
type testMessage struct {
	Type string
	Data struct {
		SessionID                         string `json:"sessionId"`
		Seq, LastSeq, Expected            int64
		Resume, Code, Message             string
		FromIndex, TotalEvents, NextIndex int
		SnapshotIndex                     *int
		HasMore, IsActive                 bool
		Events                            []json.RawMessage
	}
	text string
}

func (m testMessage) String() string { return fmt.Sprintf("%.1000s", m.text) }

// fields gives the members of the message's data as they came.
func (m testMessage) fields() (data map[string]json.RawMessage) {
	var outer struct{ Data json.RawMessage }
	json.Unmarshal([]byte(m.text), &outer)
	json.Unmarshal(outer.Data, &data)
	return data
}

// raw gives a member as it came.
func (m testMessage) raw(field string) string { return string(m.fields()[field]) }

func (m testMessage) str(field string) (s string) {
	json.Unmarshal(m.fields()[field], &s)
	return s
}

// wantFields checks that a message's data has these fields and no others.
func (m testMessage) wantFields(t testing.TB, fields string) {
	t.Helper()
	wantKeys(t, m.Type, m.fields(), fields)
}

func wantKeys[V any](t testing.TB, what string, object map[string]V, fields string) {
	t.Helper()
	want := strings.Fields(fields)
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(object)); !slices.Equal(got, want) {
		t.Errorf("%s: got the fields %v, want %v", what, got, want)
	}
}

// parseMessage takes fields of another kind, which a page's error may have, for
// missing.
func parseMessage(text []byte) (m testMessage, err error) {
	m.text = string(text)
	var wrongKind *json.UnmarshalTypeError
	if err = json.Unmarshal(text, &m); err != nil && !errors.As(err, &wrongKind) {
		return m, fmt.Errorf("%w in message %.200s", err, text)
	}
	return m, nil
}

func (c *testConn) receive() (m testMessage, err error) {
	c.SetReadDeadline(time.Now().Add(patience))
	text, err := c.read()
	if err != nil {
		return m, err
	}
	return parseMessage(text)
}

// expect reads on until a message of one of these types comes.
func (c *testConn) expect(kinds ...string) testMessage {
	c.t.Helper()
	m, _ := c.expectAfter(kinds...)
	return m
}

// expectAfter is expect, and gives the messages that came before, too.
func (c *testConn) expectAfter(kinds ...string) (m testMessage, passed []testMessage) {
	c.t.Helper()
	for {
		m, err := c.receive()
		if err != nil {
			c.t.Fatalf("waiting for %v, passed %.1000s: %v", kinds, fmt.Sprint(passed), err)
		}
		if slices.Contains(kinds, m.Type) {
			return m, passed
		}
		passed = append(passed, m)
	}
}

// expectClose reads on until the server closes, with this code and a reason.
func (c *testConn) expectClose(code websocket.StatusCode) {
	c.t.Helper()
	for {
		_, err := c.receive()
		if err == nil {
			continue
		}
		var closed websocket.CloseError
		if !errors.As(err, &closed) || closed.Code != code || closed.Reason == "" {
			c.t.Fatalf("the connection ended with %v, want close code %d with a reason", err, code)
		}
		return
	}
}

// wireMessage makes a message. data is JSON already, or something to encode.
func wireMessage(kind string, data any) []byte {
	if raw, ok := data.(string); ok {
		data = json.RawMessage(raw)
	}
	b, err := json.Marshal(map[string]any{"type": kind, "data": data})
	if err != nil {
		panic(err)
	}
	return b
}

func (c *testConn) send(kind string, data any) { c.sendRaw(string(wireMessage(kind, data))) }

// sendRaw does not fail the test: when the server has closed, whoever waits for
// its answer learns of it.
func (c *testConn) sendRaw(text string) { c.Write(maskedText([]byte(text))) }

// ---- a tracker ----

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
	unnumbered       bool                // batches do not carry their number
	ends             bool                // ends its session when all is acked
	sending          func(seq int64)     // called before each batch is sent, if set
	confirmed        func(seq int64)     // called for each batch that is acked, if set
	weigh            func(seq int64) int // the part of the window that a batch takes
	pace             func(seq int64) time.Duration
	frame            func(seq int64) net.Buffers // a batch as it goes out

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
	return fmt.Appendf(nil, `{"type":"session_start","data":{"sessionId":%q,"resume":%q,"userId":"ann","url":"https://example.com/shop",`+
		`"userAgent":"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",`+
		`"viewport":{"width":1280,"height":800,"devicePixelRatio":1},"startTime":1700000000000,"referrer":"","timeZone":"UTC"}}`, session, resume)
}

// connection is one life on the wire. It returns true when there is nothing left
// to do.
func (tr *testTracker) connection(ctx context.Context) (over bool) {
	tr.mu.Lock()
	address, resume := tr.address, tr.resume
	tr.mu.Unlock()
	c, err := openWebSocket(&net.Dialer{}, address, 4096)
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
		return tr.sent + 2, false // one is left out
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
	if tr.unnumbered {
		b = []byte(`{"type":"events_batch","data":{"events":[`)
	}
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
			tr.t.Errorf("%s: lastSeq %d after an ack of %d: something acked is lost", tr.session, m.Data.LastSeq, tr.acked)
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

// allow raises its limit.
func (tr *testTracker) allow(batches int64) { tr.change(func() { tr.limit = batches }) }

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

// isBack tells whether it records on a connection that is not its first.
func (tr *testTracker) isBack() bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.reconnects > 0 && tr.ready
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

// ---- a viewer ----

// testViewer watches one session at a time and checks every event it sees: each
// run of live events is contiguous, begins where the answer to the join said,
// and every event is the one that belongs at its index. What it missed between
// two runs it reads in pages.
type testViewer struct {
	t       testing.TB
	dialer  *net.Dialer
	address string
	saw     func(from, count int) // called for live events, if set

	reading sync.Mutex // held by a test that keeps it from reading

	mu sync.Mutex
	viewerState
	conn    *testConn
	session string
	loyal   bool // reads the session's past too, and connects again when the connection breaks
	paging  bool // a page is on its way
	run     int  // where the present run of live events began
	live    int  // the index that the next live event must have
	closed  bool
	done    chan struct{}
}

// viewerState is what a test may ask a viewer.
type viewerState struct {
	joined  bool
	next    int // it has seen every event below, since it first joined; -1 before
	events  int // checked, in all
	lagged  int // times that it was told so
	notices []string
	breaks  []error // why connections ended
}

// watchSession joins a session and follows it from its first event until the
// test ends, also over broken connections. It waits for the answer to the join.
func watchSession(t testing.TB, address, session string) *testViewer {
	t.Helper()
	v, err := openViewer(t, &net.Dialer{}, address)
	if err != nil {
		t.Fatalf("viewer: %v", err)
	}
	t.Cleanup(v.close)
	v.follow(session)
	return v
}

// openViewer connects a viewer that watches nothing yet. The caller closes it.
func openViewer(t testing.TB, dialer *net.Dialer, address string) (*testViewer, error) {
	c, err := openWebSocket(dialer, address, 4096)
	if err != nil {
		return nil, err
	}
	v := &testViewer{t: t, dialer: dialer, address: address, conn: c, done: make(chan struct{})}
	v.next = -1
	go v.listen(c) // ends with the connection, or at close when it is loyal
	return v, nil
}

func (v *testViewer) listen(c *testConn) {
	defer close(v.done)
	for c != nil {
		v.reading.Lock()
		v.reading.Unlock() // it only waits while a test holds it
		text, err := c.read()
		if err == nil {
			v.hear(text)
			continue
		}
		c.Close()
		v.mu.Lock()
		v.breaks = append(v.breaks, err)
		v.mu.Unlock()
		c = v.reconnect()
	}
}

// reconnect connects and joins again; nil when the viewer is closed.
func (v *testViewer) reconnect() *testConn {
	for {
		v.mu.Lock()
		over := v.closed || !v.loyal
		v.mu.Unlock()
		if over {
			return nil
		}
		if c, err := openWebSocket(v.dialer, v.address, 4096); err == nil {
			v.mu.Lock()
			v.conn = c
			v.mu.Unlock()
			v.join(v.session)
			return c
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (v *testViewer) hear(text []byte) {
	m, err := parseMessage(text)
	v.mu.Lock()
	defer v.mu.Unlock()
	d := &m.Data
	if err != nil {
		v.t.Errorf("viewer: %v", err)
	}
	if d.SessionID != v.session {
		return
	}
	switch m.Type {
	case "session_started", "session_ended":
		v.notices = append(v.notices, m.Type)
	case "session_joined":
		if v.next < 0 {
			v.next = d.TotalEvents
			if v.loyal {
				v.next = 0
			}
		}
		v.joined, v.paging, v.run, v.live = true, false, d.TotalEvents, d.TotalEvents
	case "session_lagged":
		v.lagged++
		v.run, v.live = d.NextIndex, d.NextIndex
	case "events_batch":
		v.hearLive(d.FromIndex, d.Events)
	case "session_events":
		v.paging = false
		if d.FromIndex != v.next {
			break // asked for before it joined anew
		}
		if d.HasMore && len(d.Events) == 0 {
			v.t.Errorf("viewer of %s: an empty page at %d of %d, and more to come", v.session, d.FromIndex, d.TotalEvents)
		}
		v.check(d.FromIndex, d.Events)
		v.next += len(d.Events)
	}
	v.catchUp()
}

func (v *testViewer) hearLive(from int, events []json.RawMessage) {
	if !v.joined {
		return // sent before it left
	}
	if from != v.live {
		v.t.Errorf("viewer of %s: live events from %d, want %d", v.session, from, v.live)
	}
	v.live = from + len(events)
	v.check(from, events)
	if v.saw != nil {
		v.saw(from, len(events))
	}
}

// catchUp asks for a page when there is a gap before the present run.
func (v *testViewer) catchUp() {
	switch {
	case !v.joined:
	case v.next >= v.run:
		v.next = max(v.next, v.live)
	case !v.paging:
		v.paging = true
		v.conn.send("get_session_events", map[string]any{"sessionId": v.session, "fromIndex": v.next})
	}
}

// check compares events with those that belong at index from and after.
func (v *testViewer) check(from int, events []json.RawMessage) {
	for i, event := range events {
		if want := testEvent(v.session, from+i); !bytes.Equal(event, want) {
			v.t.Errorf("viewer of %s: at index %d got %.300s want %.300s", v.session, from+i, event, want)
			break
		}
	}
	v.events += len(events)
}

// follow joins a session and reads its past too; the viewer comes back when the
// connection breaks.
func (v *testViewer) follow(session string) {
	v.t.Helper()
	v.mu.Lock()
	v.loyal = true
	v.mu.Unlock()
	v.join(session)
	waitUntil(v.t, "the viewer has joined "+session, func() bool { return v.look().joined })
}

func (v *testViewer) join(session string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if session != v.session {
		v.next = -1
	}
	v.session, v.joined = session, false
	v.conn.send("viewer_join_session", sessionID{session})
}

func (v *testViewer) leave() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.joined = false
	v.conn.send("viewer_leave_session", sessionID{v.session})
}

func (v *testViewer) close() {
	if v.t.Failed() {
		v.t.Logf("viewer of %s: %+v", v.session, v.look())
	}
	v.mu.Lock()
	v.closed = true
	v.conn.Close()
	v.mu.Unlock()
	<-v.done
}

func (v *testViewer) look() viewerState {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.viewerState
	s.notices, s.breaks = slices.Clone(s.notices), slices.Clone(s.breaks)
	return s
}

// waitFor waits until it has seen every event below an index.
func (v *testViewer) waitFor(index int) {
	v.t.Helper()
	waitUntil(v.t, fmt.Sprintf("the viewer of %s has seen %d events", v.session, index), func() bool { return v.look().next >= index })
}
