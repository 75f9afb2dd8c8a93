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
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
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
		return fmt.Appendf(nil, `{"type":4,"data":{"href":"https://example.com/%s/%d","width":1920},"timestamp":%d}`,
			session, n, at)
	case 1:
		return fmt.Appendf(nil, `{"type":2,"data":{"of":%q,"n":%d,"text":"%s"},"timestamp":%d}`, session, n,
			snapshotText, at)
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
	over    bool   // one side has ended it, as was expected
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

const upgradeHeaders = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
	"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// openWebSocket connects and shakes hands, perhaps with more headers; buffer is the
// size of what it reads at once. Its error is a handshakeStatus when the server
// refuses.
func openWebSocket(dialer *net.Dialer, address string, buffer int, headers ...string) (*testConn, error) {
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
	return c, c.shakeHands(u, headers...)
}

func (c *testConn) shakeHands(u *url.URL, headers ...string) error {
	c.SetDeadline(time.Now().Add(patience))
	c.write("GET " + u.RequestURI() + " HTTP/1.1\r\nHost: " + u.Host + "\r\n" +
		strings.Join(headers, "") + upgradeHeaders)
	if status := c.status(); status != http.StatusSwitchingProtocols {
		c.Close()
		return handshakeStatus(status)
	}
	return c.SetDeadline(time.Time{})
}

type handshakeStatus int

func (s handshakeStatus) Error() string { return fmt.Sprintf("handshake: status %d", int(s)) }

// dialServer connects for a test: failures of its connection fail the test.
func dialServer(t testing.TB, address string, headers ...string) *testConn {
	t.Helper()
	c, err := openWebSocket(&net.Dialer{}, address, 4096, headers...)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	c.t = t
	t.Cleanup(func() { c.Close() })
	return c
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

// write sends bytes as they are. It ignores errors: the server may have closed in
// the middle.
func (c *testConn) write(text string) { io.WriteString(c.Conn, text) }

// status reads the head of an answer and gives its status, 0 when there is none.
func (c *testConn) status() int {
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return 0
	}
	c.over = resp.StatusCode != http.StatusSwitchingProtocols
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
				closed = websocket.CloseError{Code: websocket.StatusCode(binary.BigEndian.Uint16(payload)),
					Reason: string(payload[2:])}
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

// ended reads on until the connection ends; its code is -1 without a close frame.
func (c *testConn) ended() (closed websocket.CloseError) {
	c.t.Helper()
	for {
		switch _, err := c.receive(); {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			c.t.Fatal("the server does not close")
		case !errors.As(err, &closed):
			c.over = true
			return websocket.CloseError{Code: -1, Reason: err.Error()}
		default:
			c.over = true
			return closed
		}
	}
}

// expectClose reads on until the server closes, with this code and a reason.
func (c *testConn) expectClose(code websocket.StatusCode) {
	c.t.Helper()
	if closed := c.ended(); closed.Code != code || closed.Reason == "" {
		c.t.Fatalf("the connection ended with %v, want close code %d with a reason", closed, code)
	}
}

// frame reads on until a frame of this kind comes, and gives what is in it.
func (c *testConn) frame(kind byte) []byte {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	for {
		head, payload, err := readFrame(c.in, nil)
		if err != nil || head&0x0f == 8 {
			c.t.Fatalf("waiting for a frame of kind %d: %v, %q", kind, err, payload)
		}
		if head&0x0f == kind {
			return payload
		}
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
