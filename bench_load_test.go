//go:build bench

package main

// What the benchmark's load is made of: recordings, batches of them ready to be
// sent, and trackers that send them.

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// ---- what trackers send ----

// recorded is an event of a recording.
type recorded struct {
	text string
	kind int32
	at   time.Duration // since the recording began
}

// loadRecordings reads the recordings beside the checkout, or makes some of the
// demo's: as long as those, by repetition.
func loadRecordings(t testing.TB) (all [][]recorded) {
	files, _ := filepath.Glob("../shared/recordings/*.json.gz")
	for _, file := range files {
		packed, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text, err := gunzip(packed, 0)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, parseRecording(t, text))
	}
	if all == nil {
		text, err := os.ReadFile("testdata/demo.json")
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, repeat(parseRecording(t, text), 40*time.Second))
	}
	return all
}

func parseRecording(t testing.TB, text []byte) (r []recorded) {
	text = []byte(strings.TrimSpace(string(text)))
	events, err := splitEvents(text)
	if err != nil {
		t.Fatalf("recording: %v", err)
	}
	for _, e := range events {
		r = append(r, recorded{string(text[e.start:e.end]), e.kind, time.Duration(e.time-events[0].time) * time.Millisecond})
	}
	return r
}

func repeat(r []recorded, length time.Duration) (all []recorded) {
	last := r[len(r)-1].at + time.Second
	for start := time.Duration(0); start < length; start += last {
		for _, e := range r {
			e.at += start
			all = append(all, e)
		}
	}
	return all
}

// shot is a batch, ready to be sent by any tracker: the end of the message from
// its first event on, masked, because the number before it differs.
type shot struct {
	masked       []byte
	json, events int // bytes between the brackets; events
	at           time.Duration
}

func newShot(events []recorded) *shot {
	text := make([]string, len(events))
	for i, e := range events {
		text[i] = e.text
	}
	body := strings.Join(text, ",")
	return &shot{wireMask([]byte(body + "]}}")), len(body), len(events), events[len(events)-1].at}
}

// batches cuts a recording as the tracker in web/ does: a full snapshot goes out
// at once, else 50 events, or those of half a second.
func batches(r []recorded) (shots []*shot) {
	const meta = 4
	start := 0
	for i, e := range r {
		full := i-start == 50 || e.at-r[start].at > 500*time.Millisecond || e.kind == meta || i > 0 && r[i-1].kind == fullSnapshot
		if i > start && full {
			shots = append(shots, newShot(r[start:i]))
			start = i
		}
	}
	return append(shots, newShot(r[start:]))
}

// smallShots makes batches of so many events, each 400 bytes on average, give or
// take a half.
func smallShots(recordings [][]recorded, n int) (shots []*shot) {
	var events []recorded
	for _, r := range recordings {
		for _, e := range r {
			if len(e.text) < 1500 {
				events = append(events, e)
			}
		}
	}
	slices.SortFunc(events, func(a, b recorded) int { return cmp.Compare(len(a.text), len(b.text)) })
	mixed := make([]recorded, 0, len(events)) // small and large in turn
	for i := range len(events) / 2 {
		mixed = append(mixed, events[i], events[len(events)-1-i])
	}
	for some := range slices.Chunk(mixed, n) {
		if s := newShot(some); len(some) == n && 200*n < s.json && s.json < 600*n {
			shots = append(shots, s)
		}
	}
	return shots
}

// ---- a WebSocket client by hand ----

// wire is one connection. It is not the server's library, which would mask and
// copy every byte here while the server is measured.
type wire struct {
	net.Conn
	r       *bufio.Reader
	message []byte // the last one, reused
}

var maskKey = [4]byte{0x37, 0xfa, 0x21, 0x3d}

func wireMask(b []byte) []byte {
	for i := range b {
		b[i] ^= maskKey[i&3]
	}
	return b
}

func (b *bench) dial(address, kind string, readBuffer int) (*wire, error) {
	c, err := net.Dial("tcp", strings.TrimPrefix(address, "http://"))
	if err != nil {
		return nil, err
	}
	c.SetDeadline(b.until)
	l := &wire{Conn: c, r: bufio.NewReaderSize(c, readBuffer)}
	fmt.Fprintf(c, "GET /ws?type=%s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", kind)
	resp, err := http.ReadResponse(l.r, nil)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = errors.New(resp.Status)
	}
	return l, err
}

// wireHeader appends the header of a text frame with a payload of n bytes.
func wireHeader(b []byte, masked byte, n int) []byte {
	switch {
	case n < 126:
		b = append(b, 0x81, masked|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x81, masked|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x81, masked|127), uint64(n))
	}
	if masked != 0 {
		b = append(b, maskKey[:]...)
	}
	return b
}

// readWireHeader reads a frame's header and gives its first byte and its payload's
// size.
func readWireHeader(r *bufio.Reader) (first byte, n int, err error) {
	var h [10]byte
	if _, err = io.ReadFull(r, h[:2]); err != nil {
		return 0, 0, err
	}
	n = int(h[1] & 0x7f)
	switch n {
	case 126:
		_, err = io.ReadFull(r, h[2:4])
		n = int(binary.BigEndian.Uint16(h[2:4]))
	case 127:
		_, err = io.ReadFull(r, h[2:10])
		n = int(binary.BigEndian.Uint64(h[2:10]))
	}
	if err == nil && h[1]&0x80 != 0 {
		_, err = r.Discard(len(maskKey))
	}
	return h[0], n, err
}

func (l *wire) send(format string, args ...any) error {
	text := fmt.Appendf(nil, format, args...)
	_, err := l.Write(append(wireHeader(nil, 0x80, len(text)), wireMask(text)...))
	return err
}

// next gives the next message, whole; it answers pings.
func (l *wire) next() ([]byte, error) {
	l.message = l.message[:0]
	for {
		first, n, err := readWireHeader(l.r)
		if err != nil {
			return nil, err
		}
		start := len(l.message)
		l.message = slices.Grow(l.message, n)[:start+n]
		if _, err := io.ReadFull(l.r, l.message[start:]); err != nil {
			return nil, err
		}
		switch op := first & 0x0f; {
		case op == 8:
			return nil, io.EOF
		case op == 9:
			pong := append([]byte{0x8a, 0x80 | byte(n)}, maskKey[:]...)
			l.Write(append(pong, wireMask(l.message[start:])...))
			l.message = l.message[:start]
		case first&0x80 != 0:
			return l.message, nil
		}
	}
}

// expect reads until a message of a type.
func (l *wire) expect(typ string) ([]byte, error) {
	for {
		m, err := l.next()
		if err != nil || strings.HasPrefix(string(m), `{"type":"`+typ+`"`) {
			return m, err
		}
		if strings.HasPrefix(string(m), `{"type":"error"`) {
			return m, fmt.Errorf("the server says %s", m)
		}
	}
}

// digits reads the number that follows a name, -1 when it is not there.
func digits(m []byte, name string) int64 {
	_, rest, ok := strings.Cut(string(m[:min(len(m), 400)]), name)
	n := int64(0)
	for _, c := range strings.TrimLeft(rest, " ") {
		if c < '0' || c > '9' {
			break
		}
		n = n*10 + int64(c-'0')
	}
	if !ok {
		return -1
	}
	return n
}

// ---- trackers ----

// workload says what a fleet of trackers sends.
type workload struct {
	trackers int
	window   int
	shots    func(i int) []*shot // of tracker i
	loop     bool                // over and over, until stop
	// pace says when, since the start, tracker i sends its batch n, with so many
	// bytes sent before; nil: as fast as acks allow.
	pace func(i int, n, bytes int64, s *shot) time.Duration
	mark bool // each batch begins with an event that says when it was sent
}

// rotated lets trackers send the same batches, each from another one on.
func rotated(shots []*shot) func(int) []*shot {
	return func(i int) []*shot {
		k := i * 17 % len(shots)
		return append(shots[k:len(shots):len(shots)], shots[:k]...)
	}
}

// fleet is trackers that run, and the sum of what was acked.
type fleet struct {
	workload
	links                  []*loadTracker
	stopped                chan struct{}
	ends                   sync.WaitGroup
	bytes, events, batches atomic.Int64 // acked
	sent                   atomic.Int64 // events
	trouble                atomic.Pointer[error]
}

type loadTracker struct {
	*wire
	id    string
	fleet *fleet

	mu       sync.Mutex
	wake     *sync.Cond
	unacked  []*shot
	inFlight int
	acked    int64
	done     bool // sends no more
}

// launch connects trackers, starts their sessions, and lets them go.
func (b *bench) launch(t *testing.T, address string, w workload) *fleet {
	t.Helper()
	b.fleets++
	f := &fleet{workload: w, stopped: make(chan struct{}), links: make([]*loadTracker, w.trackers)}
	parallel(t, w.trackers, func(i int) error {
		c, err := b.dial(address, "tracker", 4096)
		if err != nil {
			return err
		}
		tr := &loadTracker{wire: c, id: fmt.Sprintf("bench-%d-%d", b.fleets, i), fleet: f}
		tr.wake = sync.NewCond(&tr.mu)
		f.links[i] = tr
		return tr.start()
	})
	begin := time.Now()
	for i, tr := range f.links {
		f.ends.Add(2)
		go tr.shoot(i, begin) // ends with stop
		go tr.listen()        // ends with the connection
	}
	return f
}

func (tr *loadTracker) start() error {
	err := tr.send(`{"type":"session_start","data":{"sessionId":"%s","resume":"","userId":"ann","url":"https://example.com/shop",`+
		`"userAgent":"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",`+
		`"viewport":{"width":1280,"height":800,"devicePixelRatio":1},"startTime":1700000000000,"referrer":"","timeZone":"UTC"}}`, tr.id)
	if err != nil {
		return err
	}
	_, err = tr.expect("session_ready")
	return err
}

// parallel does something n times, 50 at a time.
func parallel(t *testing.T, n int, do func(int) error) {
	t.Helper()
	var failed atomic.Pointer[error]
	var next atomic.Int64
	var all sync.WaitGroup
	for range min(n, 50) {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && failed.Load() == nil; i = int(next.Add(1)) - 1 {
				if err := do(i); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		t.Fatal(*err)
	}
}

func (tr *loadTracker) shoot(i int, begin time.Time) {
	defer tr.fleet.ends.Done()
	f := tr.fleet
	shots, bytes := f.shots(i), int64(0)
	for n := int64(0); f.loop || n < int64(len(shots)); n++ {
		s := shots[n%int64(len(shots))]
		if f.pace != nil {
			select {
			case <-f.stopped:
			case <-time.After(time.Until(begin.Add(f.pace(i, n, bytes, s)))):
			}
		}
		if !tr.room(s) {
			break
		}
		if err := tr.fire(n+1, s); err != nil {
			f.fail(err)
			break
		}
		bytes += int64(s.json)
	}
	tr.mu.Lock()
	tr.done = true
	if len(tr.unacked) == 0 {
		tr.quit()
	}
	tr.mu.Unlock()
}

// room waits until a batch may be sent, and says false when nothing more is.
func (tr *loadTracker) room(s *shot) bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for tr.inFlight > 0 && tr.inFlight+s.json > tr.fleet.window && !tr.fleet.ended() {
		tr.wake.Wait()
	}
	if tr.fleet.ended() {
		return false
	}
	tr.unacked = append(tr.unacked, s)
	tr.inFlight += s.json
	tr.fleet.sent.Add(int64(s.events))
	return true
}

func (f *fleet) ended() bool {
	select {
	case <-f.stopped:
		return true
	default:
		return false
	}
}

func (f *fleet) fail(err error) { f.trouble.CompareAndSwap(nil, &err) }

// fire sends a batch: its number and, if asked, a first event, before the events
// that are masked already.
func (tr *loadTracker) fire(seq int64, s *shot) error {
	prefix := make([]byte, 0, 256)
	prefix = fmt.Appendf(prefix, `{"type":"events_batch","data":{"seq":%d,"events":[`, seq)
	if tr.fleet.mark {
		now := time.Now()
		prefix = fmt.Appendf(prefix, `{"type":5,"timestamp":%d,"data":{"tag":"bench","payload":%d}},`, now.UnixMilli(), now.UnixNano())
	}
	for len(prefix)%len(maskKey) != 0 {
		prefix = append(prefix, ' ')
	}
	head := wireHeader(make([]byte, 0, 300), 0x80, len(prefix)+len(s.masked))
	head = append(head, wireMask(prefix)...)
	_, err := (&net.Buffers{head, s.masked}).WriteTo(tr.Conn)
	return err
}

func (tr *loadTracker) listen() {
	defer tr.fleet.ends.Done()
	for {
		m, err := tr.expect("events_ack")
		if err != nil {
			tr.mu.Lock()
			if !tr.done || len(tr.unacked) > 0 {
				tr.fleet.fail(fmt.Errorf("%s: %w", tr.id, err))
			}
			tr.mu.Unlock()
			return
		}
		tr.heard(digits(m, `"seq":`))
	}
}

func (tr *loadTracker) heard(seq int64) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for ; tr.acked < seq; tr.acked++ {
		s := tr.unacked[0]
		tr.unacked = tr.unacked[1:]
		tr.inFlight -= s.json
		tr.fleet.bytes.Add(int64(s.json))
		tr.fleet.events.Add(int64(s.events))
		tr.fleet.batches.Add(1)
	}
	tr.wake.Signal()
	if tr.done && len(tr.unacked) == 0 {
		tr.quit()
	}
}

// quit ends the session and the connection.
func (tr *loadTracker) quit() {
	tr.send(`{"type":"session_end","data":{"sessionId":"%s"}}`, tr.id)
	tr.Conn.(*net.TCPConn).CloseWrite()
}

// stop sends no more. With patience it waits until everything is acked.
func (f *fleet) stop(t *testing.T, patient bool) {
	t.Helper()
	close(f.stopped)
	for _, tr := range f.links {
		tr.wake.Signal()
		if !patient {
			tr.Close()
		}
	}
	if patient {
		f.wait(t)
	}
}

// wait waits until all is sent and acked.
func (f *fleet) wait(t *testing.T) {
	t.Helper()
	f.ends.Wait()
	if err := f.trouble.Load(); err != nil {
		t.Fatal(*err)
	}
}
