//go:build bench

package main

// The benchmark: every figure of the README's table, measured against the real
// server in a process of its own, with PostgreSQL of its own that does fsync.
//
//	make bench                                     all of it, and bench.json
//	go test -tags bench -run TestBench/ingest .    one part
//	BENCH_PROFILE=DIR go test -tags bench …        with the server's CPU profiles
//
// The load is made here, by trackers that cost as little as possible: what they
// send is framed and masked before the clock starts, and goes out by one writev
// a batch. It shares the machine with server and PostgreSQL, therefore what it
// costs is in the limit too: see bare.

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// How many bytes a tracker sends without an ack: as much as the tracker in
	// web/ keeps; less where they are many, so that all of it fits into memory.
	window      = 8 << 20
	smallWindow = 256 << 10

	rounds    = 3               // of bare program and server in turn, because machines waver
	roundTime = 5 * time.Second // measured of each, after warmUp
	warmUp    = 2 * time.Second

	idleTrackers = 10_000
	longSession  = 1_000_000 // events
	oldSessions  = 100_000
)

func TestBench(t *testing.T) {
	b := newBench(t)
	parts := []struct {
		name  string
		limit time.Duration // for the whole part
		run   func(*testing.T)
	}{
		{"parse", 30 * time.Second, b.parse},
		{"ingest", 120 * time.Second, b.ingest},
		{"small", 40 * time.Second, b.smallBatches},
		{"latency", 90 * time.Second, b.latency},
		{"idle", 90 * time.Second, b.idle},
		{"disk", 90 * time.Second, b.disk},
		{"long", 60 * time.Second, b.long},
		{"lists", 60 * time.Second, b.lists},
		{"growth", 90 * time.Second, b.growth},
	}
	for _, part := range parts {
		t.Run(part.name, func(t *testing.T) {
			b.until = time.Now().Add(part.limit)
			part.run(t)
		})
	}
	b.print(t)
}

// ---- what is measured, and how it is shown ----

type bench struct {
	cluster    *testPostgres
	recordings [][]recorded // one each
	mixed      []*shot      // all recordings, batched as our tracker does
	small      []*shot      // 10 events, about 4 KB
	until      time.Time    // the end of the present part
	fleets     int
	best       float64 // bytes a second of the ingest run
	rows       []row
}

// row is a line of the table.
type row struct {
	Figure   string             `json:"figure"`
	Target   string             `json:"target"`
	Measured string             `json:"measured"`
	Met      string             `json:"met"` // yes, no, or nothing when nothing was asked
	Values   map[string]float64 `json:"values"`
}

type values map[string]float64

func newBench(t *testing.T) *bench {
	b := &bench{cluster: ownPostgres(t), recordings: loadRecordings(t)}
	for _, r := range b.recordings {
		b.mixed = append(b.mixed, batches(r)...)
	}
	b.small = smallShots(b.recordings)
	if os.Getenv("BENCH_PROFILE") != "" {
		os.Setenv("GOFLAGS", "-tags=bench")
	}
	return b
}

func (b *bench) report(figure, target string, met bool, v values, format string, args ...any) {
	r := row{Figure: figure, Target: target, Measured: fmt.Sprintf(format, args...), Values: v}
	if target != "" {
		r.Met = map[bool]string{true: "yes", false: "no"}[met]
	}
	b.rows = append(b.rows, r)
}

func (b *bench) print(t *testing.T) {
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "\nfigure\ttarget\tmeasured\tmet")
	for _, r := range b.rows {
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\n", r.Figure, r.Target, r.Measured, r.Met)
	}
	out.Flush()
	machine := b.machine(t)
	fmt.Println("\n" + machine)
	text, err := json.MarshalIndent(map[string]any{"date": time.Now().UTC(), "machine": machine, "rows": b.rows}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("bench.json", append(text, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) machine(t *testing.T) string {
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(info), "model name\t: ")
	model, _, _ = strings.Cut(model, "\n")
	version := querySQL[string](t, b.cluster.url, "show server_version")
	return fmt.Sprintf("%d × %s, %s, PostgreSQL %s", runtime.NumCPU(), model, runtime.Version(), version)
}

// server starts the server with its default settings and an empty database.
func (b *bench) server(t *testing.T, env ...string) *serverProcess {
	all := []string{"DATABASE_URL=" + databaseIn(t, b.cluster.url), "BATCH_INTERVAL=5000", "DB_MAX_CONNECTIONS=20", "LOG_LEVEL=warn"}
	return startServer(t, append(all, env...)...)
}

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
	return &shot{mask([]byte(body + "]}}")), len(body), len(events), events[len(events)-1].at}
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

// smallShots makes batches of ten events that are 4 KB, give or take a half.
func smallShots(recordings [][]recorded) (shots []*shot) {
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
	for ten := range slices.Chunk(mixed, 10) {
		if s := newShot(ten); 2048 < s.json && s.json < 6144 {
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

func mask(b []byte) []byte {
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

// header appends the header of a text frame with a payload of n bytes.
func header(b []byte, masked byte, n int) []byte {
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

// readHeader reads a frame's header and gives its first byte and its payload's
// size.
func readHeader(r *bufio.Reader) (first byte, n int, err error) {
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
	_, err := l.Write(append(header(nil, 0x80, len(text)), mask(text)...))
	return err
}

// next gives the next message, whole; it answers pings.
func (l *wire) next() ([]byte, error) {
	l.message = l.message[:0]
	for {
		first, n, err := readHeader(l.r)
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
			l.Write(append(pong, mask(l.message[start:])...))
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
	shots    func(i int) []*shot                         // of tracker i
	loop     bool                                        // over and over, until stop
	pace     func(i int, n int64, s *shot) time.Duration // when, since the start, batch n is due; nil: as fast as acks allow
	mark     bool                                        // each batch begins with an event that says when it was sent
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
	shots := f.shots(i)
	for n := int64(0); f.loop || n < int64(len(shots)); n++ {
		s := shots[n%int64(len(shots))]
		if f.pace != nil {
			select {
			case <-f.stopped:
			case <-time.After(time.Until(begin.Add(f.pace(i, n, s)))):
			}
		}
		if !tr.room(s) {
			break
		}
		if err := tr.fire(n+1, s); err != nil {
			f.fail(err)
			break
		}
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
	head := header(make([]byte, 0, 300), 0x80, len(prefix)+len(s.masked))
	head = append(head, mask(prefix)...)
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
	f.ends.Wait()
	if err := f.trouble.Load(); err != nil && patient {
		t.Fatal(*err)
	}
}

// ---- how much, and at what cost ----

// sample is what was committed in a stretch of time, and the CPU seconds of
// those that took part.
type sample struct {
	seconds, bytes, events, batches float64
	server, postgres, generator     float64
}

func (s *sample) add(o sample, sign float64) {
	s.seconds += sign * o.seconds
	s.bytes += sign * o.bytes
	s.events += sign * o.events
	s.batches += sign * o.batches
	s.server += sign * o.server
	s.postgres += sign * o.postgres
	s.generator += sign * o.generator
}

// sampleNow reads all counters; two of them, subtracted, are what was between.
func (b *bench) sampleNow(t *testing.T, f *fleet, pid int) sample {
	s := sample{seconds: float64(time.Now().UnixNano()) / 1e9, bytes: float64(f.bytes.Load()), events: float64(f.events.Load()),
		batches: float64(f.batches.Load()), server: cpuSeconds(pid, false), generator: cpuSeconds(os.Getpid(), false)}
	for i, pid := range b.cluster.processes(t) {
		s.postgres += cpuSeconds(pid, i == 0) // with those that have ended
	}
	return s
}

func (b *bench) measure(t *testing.T, f *fleet, pid int, d time.Duration) sample {
	before := b.sampleNow(t, f, pid)
	time.Sleep(d)
	s := b.sampleNow(t, f, pid)
	s.add(before, -1)
	return s
}

// cpuSeconds is what a process has used, perhaps with its children that ended.
func cpuSeconds(pid int, children bool) (seconds float64) {
	const ticks = 100 // a second; the kernel's USER_HZ
	content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(content[strings.LastIndex(string(content), ")")+1:]))
	last := 13
	if children {
		last = 15
	}
	for _, field := range fields[min(11, len(fields)):min(last, len(fields))] {
		n, _ := strconv.ParseFloat(field, 64)
		seconds += n / ticks
	}
	return seconds
}

// memory reads VmRSS or VmHWM of a process, in bytes.
func memory(t *testing.T, pid int, name string) float64 {
	content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(content), name+":")
	var kilobytes float64
	if _, err := fmt.Sscanf(rest, "%f kB", &kilobytes); err != nil {
		t.Fatalf("%s of process %d: %v", name, pid, err)
	}
	return kilobytes * 1024
}

// ---- the limit ----

// bare is what the server is compared with: a program that does nothing but
// commit chunks that are ready, in a process of its own. To be fair it also
// receives, from the same trackers and as fast, the bytes that the chunks are
// made of, without looking at them: it pays for the sockets and shares the two
// cores with the trackers as the server does. It has the server's table, number
// of connections and size of transactions, and acks what is committed.
func init() {
	if database := os.Getenv("BENCH_BARE"); database != "" {
		if err := bare(database); err != nil {
			fmt.Fprintln(os.Stderr, "bare:", err)
		}
		os.Exit(1)
	}
}

type bareChunk struct {
	chunk
	session string
	conn    net.Conn
	seq     int64 // acked with it
}

func bare(database string) error {
	go func() { // ends with the process, and ends it with who started it
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	cfg, err := pgxpool.ParseConfig(database)
	if err != nil {
		return err
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		return err
	}
	chunks := readyChunks()
	work := make(chan bareChunk, 1024)
	for range writers {
		go bareWriter(pool, work) // ends with the process, as all here
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go bareReader(conn, pool, chunks, work)
	}
}

// readyChunks are the recordings in chunks as the server makes them.
func readyChunks() (chunks []chunk) {
	for _, r := range loadRecordings(nil) {
		var f flush
		for _, e := range r {
			f.batches = append(f.batches, &batch{body: []byte(e.text), events: []event{{0, uint32(len(e.text)), e.kind, 0}}})
		}
		f.encode()
		chunks = append(chunks, f.chunks...)
	}
	return chunks
}

func bareReader(conn net.Conn, pool *pgxpool.Pool, chunks []chunk, work chan<- bareChunk) {
	r := bufio.NewReaderSize(conn, 64<<10)
	if _, err := http.ReadRequest(r); err != nil {
		return
	}
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n\r\n")
	var id string
	received, first := 0, int64(0)
	for seq := int64(0); ; seq++ {
		_, n, err := readHeader(r)
		if err != nil {
			return
		}
		if seq == 0 {
			id = conn.RemoteAddr().String()
			pool.Exec(context.Background(), "insert into sessions (session_id, user_id, url, metadata, is_active) values ($1, '', '', '{}', true)", id)
			conn.Write(append(header(nil, 0, 24), `{"type":"session_ready"}`...))
		}
		r.Discard(n)
		received += n
		for c := chunks[first%int64(len(chunks))]; seq > 0 && received >= c.raw; c = chunks[first%int64(len(chunks))] {
			received -= c.raw
			c.first = first
			work <- bareChunk{c, id, conn, seq}
			first++
		}
	}
}

func bareWriter(pool *pgxpool.Pool, work <-chan bareChunk) {
	for {
		group, bytes := []bareChunk{<-work}, 0
		for more := true; more && bytes < maxFlushBytes; {
			select {
			case c := <-work:
				group = append(group, c)
				bytes += c.raw
			default:
				more = false
			}
		}
		batch := &pgx.Batch{}
		for _, c := range group {
			batch.Queue(`insert into session_events (session_id, first_index, event_count, start_time, end_time, snapshot_index, raw_bytes, events)
				values ($1, $2, $3, $4, $5, $6, $7, $8)`, c.session, c.first, c.count, c.startTime, c.endTime, c.snapshot, c.raw, c.events)
		}
		if err := pool.SendBatch(context.Background(), batch).Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bare:", err)
			os.Exit(1)
		}
		for _, c := range group {
			ack := fmt.Sprintf(`{"type":"events_ack","data":{"seq":%d}}`, c.seq)
			c.conn.Write(append(header(nil, 0, len(ack)), ack...))
		}
	}
}

// startBare starts the bare program; it ends with the part.
func (b *bench) startBare(t *testing.T) (address string, pid int) {
	database := databaseIn(t, b.cluster.url)
	execSQL(t, database, schema)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BENCH_BARE="+database)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("bare program: %v", err)
	}
	return strings.TrimSpace(line), cmd.Process.Pid
}

// ---- the parts ----

func (b *bench) parse(t *testing.T) {
	speed := func(shots []*shot) (bytes, perSecond, allocs float64) {
		var messages [][]byte
		size, events := 0, 0
		for _, s := range shots {
			body := mask(slices.Clone(s.masked)) // masked twice is plain
			messages = append(messages, append([]byte(`{"type":"events_batch","data":{"seq":1,"events":[`), body...))
			size += s.json
			events += s.events
		}
		result := testing.Benchmark(func(tb *testing.B) {
			tb.ReportAllocs()
			for tb.Loop() {
				for _, m := range messages {
					if f, err := parseFrame(m); err != nil || !f.array {
						tb.Fatal(err)
					}
				}
			}
		})
		runs := float64(result.N) / result.T.Seconds()
		return runs * float64(size), runs * float64(len(messages)), float64(result.AllocsPerOp()) / float64(events)
	}
	bytes, _, allocs := speed(b.mixed)
	b.report("parse a batch, one core", "≥ 300 MB/s, no allocation per event", bytes >= 300e6 && allocs < 0.1,
		values{"bytesPerSecond": bytes, "allocsPerEvent": allocs}, "%.0f MB/s, %.3f allocations per event", bytes/1e6, allocs)
	bytes, batches, _ := speed(b.small)
	b.report("parse small batches (10 events, 4 KB), one core", "≥ 40,000 batches/s", batches >= 40000,
		values{"batchesPerSecond": batches, "bytesPerSecond": bytes}, "%.0f batches/s, %.0f MB/s", batches, bytes/1e6)
}

func (b *bench) ingest(t *testing.T) {
	s := b.server(t, b.profiled()...)
	bareAddress, barePID := b.startBare(t)
	l := workload{trackers: 50, window: window, shots: rotated(b.mixed), loop: true}
	var limit, ours sample
	sent := int64(0)
	for round := range rounds {
		f := b.launch(t, bareAddress, l)
		time.Sleep(warmUp)
		limit.add(b.measure(t, f, barePID, roundTime), 1)
		f.stop(t, false)

		f = b.launch(t, s.url, l)
		time.Sleep(warmUp)
		if round == 0 {
			b.profile(t, "ingest")
		}
		ours.add(b.measure(t, f, s.cmd.Process.Pid, roundTime), 1)
		f.stop(t, true)
		sent += f.sent.Load()
	}
	if stored := querySQL[int64](t, s.database, "select sum(event_count) from session_events"); stored != sent {
		t.Errorf("%d events sent and acked, %d stored", sent, stored)
	}
	b.best = ours.bytes / ours.seconds
	most, ratio := limit.bytes/limit.seconds, b.best/(limit.bytes/limit.seconds)
	b.report("durable ingest, 50 trackers", "≥ 60 % of bare pgx, ≥ 100 MB/s", ratio >= 0.6 && b.best >= 100e6,
		values{"bytesPerSecond": b.best, "eventsPerSecond": ours.events / ours.seconds, "bareBytesPerSecond": most, "ratio": ratio},
		"%.0f MB/s, %.0f events/s; bare %.0f MB/s: %.0f %%", b.best/1e6, ours.events/ours.seconds, most/1e6, ratio*100)
	b.reportCPU("its CPU seconds per 100 MB", ours)
	b.reportCPU("those of the bare program", limit)
	peak := memory(t, s.cmd.Process.Pid, "VmHWM")
	b.report("peak resident memory of that", "≤ 400 MB", peak <= 400e6, values{"bytes": peak}, "%.0f MB", peak/1e6)
}

func (b *bench) reportCPU(figure string, s sample) {
	per := 100e6 / s.bytes
	b.report(figure, "", false, values{"server": s.server * per, "postgres": s.postgres * per, "generator": s.generator * per},
		"server %.2f, PostgreSQL %.2f, load generator %.2f; %.2f cores busy", s.server*per, s.postgres*per, s.generator*per,
		(s.server+s.postgres+s.generator)/s.seconds)
}

// profiled are settings that make the server show its profiles, if asked.
func (b *bench) profiled() []string {
	if os.Getenv("BENCH_PROFILE") == "" {
		return nil
	}
	return []string{"SR_PPROF=127.0.0.1:16060"}
}

// profile keeps the server's CPU profile of the next seconds, and its heap.
func (b *bench) profile(t *testing.T, name string) {
	dir := os.Getenv("BENCH_PROFILE")
	if dir == "" {
		return
	}
	for _, kind := range []string{"profile?seconds=5", "heap", "goroutine", "allocs"} {
		resp, err := http.Get("http://127.0.0.1:16060/debug/pprof/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		content, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		file, _, _ := strings.Cut(kind, "?")
		os.WriteFile(filepath.Join(dir, name+"."+file), content, 0o644)
	}
}

func (b *bench) smallBatches(t *testing.T) {
	s := b.server(t, b.profiled()...)
	f := b.launch(t, s.url, workload{trackers: 500, window: smallWindow, shots: rotated(b.small), loop: true})
	time.Sleep(warmUp)
	b.profile(t, "small")
	got := b.measure(t, f, s.cmd.Process.Pid, 2*roundTime)
	f.stop(t, true)
	b.report("small batches (10 events, 4 KB), 500 trackers", "", false,
		values{"batchesPerSecond": got.batches / got.seconds, "eventsPerSecond": got.events / got.seconds, "bytesPerSecond": got.bytes / got.seconds},
		"%.0f batches/s, %.0f events/s, %.0f MB/s", got.batches/got.seconds, got.events/got.seconds, got.bytes/got.seconds/1e6)
	b.reportCPU("its CPU seconds per 100 MB", got)
}

func (b *bench) latency(t *testing.T) {}
func (b *bench) idle(t *testing.T)    {}
func (b *bench) disk(t *testing.T)    {}
func (b *bench) long(t *testing.T)    {}
func (b *bench) lists(t *testing.T)   {}
func (b *bench) growth(t *testing.T)  {}

var _ = runtime.NumCPU
var _ = syscall.SIGTERM
