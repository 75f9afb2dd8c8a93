//go:build bench

package main

// What the benchmark's load is made of: recordings, batches of them ready to be
// sent, and fleets of trackers that send them; and the programs that the server
// is compared with.

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/flate"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// recorded is an event of a recording.
type recorded struct {
	text string
	kind int64
	at   time.Duration // since the recording began
}

// loadRecordings reads the recordings in the directory that RECORDINGS names, each
// a gzipped JSON array of rrweb's events, or makes one of the demo's, by repetition.
func loadRecordings(t testing.TB) (all [][]recorded) {
	files, _ := filepath.Glob(filepath.Join(cmp.Or(os.Getenv("RECORDINGS"), "none"), "*.json.gz"))
	for _, file := range files {
		packed, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text, err := unpackChunk(packed)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, parseRecording(t, text))
	}
	if all != nil {
		return all
	}
	text, err := os.ReadFile("testdata/demo.json")
	if err != nil {
		t.Fatal(err)
	}
	var long []recorded
	demo := parseRecording(t, text)
	for start := time.Duration(0); start < 40*time.Second; start += demo[len(demo)-1].at + time.Second {
		for _, e := range demo {
			e.at += start
			long = append(long, e)
		}
	}
	return [][]recorded{long}
}

func parseRecording(t testing.TB, text []byte) (r []recorded) {
	text = []byte(strings.TrimSpace(string(text)))
	events, err := splitEvents(text)
	if err != nil {
		t.Fatalf("recording: %v", err)
	}
	for _, e := range events {
		at := time.Duration(e.time-events[0].time) * time.Millisecond
		r = append(r, recorded{string(text[e.start:e.end]), e.kind, at})
	}
	return r
}

// shot is a batch, ready to be sent by any tracker: the end of the message from
// its first event on, masked, because the number before it differs. deflated is
// the same as browsers send it.
type shot struct {
	masked, deflated []byte
	json, events     int // bytes between the brackets; events
	at               time.Duration
}

func newShot(events []recorded) *shot {
	text := make([]string, len(events))
	for i, e := range events {
		text[i] = e.text
	}
	body := strings.Join(text, ",") + "]}}"
	return &shot{mask([]byte(body)), mask([]byte(deflated(body))), len(body) - 3, len(events), events[len(events)-1].at}
}

const offerDeflate = "Sec-WebSocket-Extensions: permessage-deflate\r\n"

// batches cuts a recording as the tracker in web/ does: a full snapshot goes out
// at once, else 50 events, or those of half a second.
func batches(r []recorded) (shots []*shot) {
	const meta = 4
	start := 0
	for i, e := range r {
		full := i-start == 50 || e.at-r[start].at > 500*time.Millisecond || e.kind == meta || i > 0 &&
			r[i-1].kind == fullSnapshot
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
	events := slices.DeleteFunc(slices.Concat(recordings...), func(e recorded) bool { return len(e.text) >= 1500 })
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

// ---- trackers ----

// workload says what a fleet of trackers sends.
type workload struct {
	trackers int
	window   int                 // bytes without an ack
	shots    func(i int) []*shot // of tracker i
	loop     bool                // over and over, until stop
	// pace says when, since the start, tracker i sends its batch n (from 0 on),
	// with so many bytes sent before; nil: as fast as acks allow.
	pace     func(i int, n, bytes int64, s *shot) time.Duration
	mark     bool // each batch begins with an event that says when it was sent
	deflated bool
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
	trackers      []*testTracker
	begin         time.Time
	bytes, events atomic.Int64 // acked
	sent          atomic.Int64 // events
}

// launch connects trackers, starts their sessions, and lets them go.
func (b *bench) launch(t *testing.T, address string, w workload) *fleet {
	t.Helper()
	b.fleets++
	f := &fleet{workload: w, begin: time.Now()}
	for i := range w.trackers {
		f.trackers = append(f.trackers, f.tracker(t, i, fmt.Sprintf("bench-%d-%d", b.fleets, i)).start(address))
	}
	for _, tr := range f.trackers {
		waitUntil(t, "the trackers are ready", func() bool { return tr.read(&tr.made) > 0 })
	}
	return f
}

func (f *fleet) tracker(t *testing.T, i int, id string) *testTracker {
	tr, shots, bytes := newTracker(t, id), f.shots(i), int64(0)
	shot := func(seq int64) *shot { return shots[(seq-1)%int64(len(shots))] }
	tr.window, tr.ends, tr.pause = f.window, true, 0
	if !f.loop {
		tr.limit = int64(len(shots))
	}
	tr.weigh = func(seq int64) int { return shot(seq).json }
	tr.sending = func(seq int64) { f.sent.Add(int64(shot(seq).events)) }
	tr.confirmed = func(seq int64) {
		f.bytes.Add(int64(shot(seq).json))
		f.events.Add(int64(shot(seq).events))
	}
	tr.frame = func(seq int64) net.Buffers { return shot(seq).frame(seq, f.mark) }
	if f.deflated {
		tr.offer = offerDeflate
		tr.frame = func(seq int64) net.Buffers { return shot(seq).deflatedFrame(seq) }
	}
	if f.workload.pace != nil {
		tr.pace = func(seq int64) time.Duration {
			bytes += int64(shot(seq).json)
			return time.Until(f.begin.Add(f.workload.pace(i, seq, bytes, shot(seq+1))))
		}
	}
	return tr
}

const shotHead = `{"type":"events_batch","data":{"seq":%d,"events":[`

// frame is the batch's message: its number and, if asked, a first event, before
// the events that are masked already.
func (s *shot) frame(seq int64, marked bool) net.Buffers {
	prefix := fmt.Appendf(make([]byte, 0, 256), shotHead, seq)
	if marked {
		now := time.Now()
		prefix = fmt.Appendf(prefix, `{"type":5,"timestamp":%d,"data":{"tag":"bench","payload":%d}},`, now.UnixMilli(),
			now.UnixNano())
	}
	for len(prefix)%len(maskKey) != 0 {
		prefix = append(prefix, ' ')
	}
	return net.Buffers{append(frameHeader(0x81, uint64(len(prefix)+len(s.masked))), mask(prefix)...), s.masked}
}

// deflatedFrame has what differs in a block of its own, which deflate stores as it
// is (RFC 1951, section 3.2.4), before the events that are deflated already.
func (s *shot) deflatedFrame(seq int64) net.Buffers {
	block := fmt.Appendf(make([]byte, 5, 128), shotHead, seq)
	for len(block)%len(maskKey) != 0 {
		block = append(block, ' ')
	}
	size := uint16(len(block) - 5)
	binary.LittleEndian.PutUint16(block[1:], size)
	binary.LittleEndian.PutUint16(block[3:], ^size)
	return net.Buffers{append(frameHeader(0xc1, uint64(len(block)+len(s.deflated))), mask(block)...), s.deflated}
}

// stop sends no more and waits until everything is acked, over the connections
// that there were from the start.
func (f *fleet) stop(t *testing.T) {
	t.Helper()
	for _, tr := range f.trackers {
		tr.stop()
	}
	f.wait(t)
}

// wait waits until all is sent and acked.
func (f *fleet) wait(t *testing.T) {
	t.Helper()
	for _, tr := range f.trackers {
		if !f.loop {
			waitUntil(t, "all is sent", func() bool { return tr.read(&tr.made) == tr.limit })
		}
		if tr.finish(); tr.reconnects > 1 || len(tr.errors) > 0 {
			t.Fatalf("%s: %d connections, errors %v", tr.session, tr.reconnects, tr.errors)
		}
	}
}

func (f *fleet) abandon() {
	for _, tr := range f.trackers {
		tr.abandon()
	}
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

// contender is a program that takes the same load as the others, each in turn,
// and what it has done.
type contender struct {
	workload
	address string
	pid     int
	bare    bool // acks no more than whole chunks: nothing waits for its last
	sample
	sent int64 // events
}

func (c *contender) speed() float64 { return c.bytes / c.seconds }

func (b *bench) round(t *testing.T, c *contender) {
	f := b.launch(t, c.address, c.workload)
	time.Sleep(warmUp)
	if !c.bare && c.sent == 0 {
		b.profile(t, fmt.Sprintf("%d-deflated-%v", c.trackers, c.deflated))
	}
	c.sample.add(b.measure(t, f, c.pid, roundTime), 1)
	if c.bare {
		f.abandon()
		return
	}
	f.stop(t)
	c.sent += f.sent.Load()
}

// ---- the bare programs ----

// A bare program does nothing but commit chunks, in a process of its own: chunks
// that are ready, or, to do the same work as the server, that it compresses as
// the server does. To be fair it also receives, from the same trackers and as
// fast, the bytes that the chunks are made of, and inflates them, without looking
// at them: it pays for the sockets and shares the cores with the trackers.
// It has the server's table, number of connections and size of transactions, and
// acks what is committed.
func init() {
	if database := os.Getenv("BENCH_BARE"); database != "" {
		if err := bare(database, os.Getenv("BENCH_BARE_WORK") == "gzip"); err != nil {
			fmt.Fprintln(os.Stderr, "bare:", err)
		}
		os.Exit(1)
	}
}

// bareChunk is a flush of one chunk, acked with seq.
type bareChunk struct {
	flush
	conn net.Conn
	seq  int64
}

func bare(database string, compress bool) error {
	go func() { // ends with the process, and ends it with who started it
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	pool, err := pgxpool.New(context.Background(), database)
	if err != nil {
		return err
	}
	chunks := readyChunks()
	work := make(chan bareChunk, 1024)
	for range writers {
		go bareWriter(pool, work, compress) // ends with the process, as all here
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	for n := 0; ; n++ {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go bareReader(conn, fmt.Sprintf("bare-%d", n), pool, chunks, work)
	}
}

// readyChunks are the recordings in chunks as the server makes them, each with
// the batches that it is made of.
func readyChunks() (all []flush) {
	for _, r := range loadRecordings(nil) {
		whole := flush{batches: recordedBatches(r)}
		whole.encode()
		for _, c := range whole.chunks {
			n := int(c.count)
			all = append(all, flush{batches: whole.batches[:n:n], chunks: []chunk{c}})
			whole.batches = whole.batches[n:]
		}
	}
	return all
}

// recordedBatches has each event in a batch of its own.
func recordedBatches(r []recorded) (all []*batch) {
	for _, e := range r {
		all = append(all, &batch{body: []byte(e.text), events: []event{{0, uint32(len(e.text)), e.kind, 0}}})
	}
	return all
}

func bareReader(conn net.Conn, id string, pool *pgxpool.Pool, chunks []flush, work chan<- bareChunk) {
	defer conn.Close()
	r := bufio.NewReaderSize(conn, 64<<10)
	if _, err := http.ReadRequest(r); err != nil {
		return
	}
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n\r\n")
	received, first := 0, int64(0)
	var message []byte
	var inflated bytes.Buffer
	z := flate.NewReader(nil)
	for seq := int64(0); ; seq++ {
		head, all, err := readFrame(r, message[:0])
		if err != nil {
			return
		}
		message = all
		size := len(message)
		if head&0x40 != 0 {
			whole := io.MultiReader(bytes.NewReader(mask(message)), strings.NewReader(deflateTail))
			z.(flate.Resetter).Reset(whole, nil)
			inflated.Reset()
			inflated.ReadFrom(z) // its error: the stream has no end
			size = inflated.Len()
		}
		if seq == 0 {
			pool.Exec(context.Background(),
				"insert into sessions (session_id, user_id, url, metadata, is_active) "+
					"values ($1, '', '', '{}', true)", id)
			io.WriteString(conn, "\x81\x18{\"type\":\"session_ready\"}")
			continue
		}
		received += size
		for c := chunks[first%int64(len(chunks))]; received >= c.chunks[0].raw; c = chunks[first%int64(len(chunks))] {
			received -= c.chunks[0].raw
			c.session, c.chunks = id, slices.Clone(c.chunks)
			c.chunks[0].first = first
			work <- bareChunk{c, conn, seq}
			first++
		}
	}
}

func bareWriter(pool *pgxpool.Pool, work <-chan bareChunk, compress bool) {
	for {
		group, bytes := []bareChunk{<-work}, 0
		for more := true; more && bytes < maxFlushBytes; {
			select {
			case c := <-work:
				group = append(group, c)
				bytes += c.chunks[0].raw
			default:
				more = false
			}
		}
		batch := &pgx.Batch{}
		for _, f := range group {
			c := f.chunks[0]
			if compress {
				f.encode()
				c.events = f.chunks[0].events
			}
			batch.Queue(`insert into session_events
				(session_id, first_index, event_count, start_time, end_time, snapshot_index, raw_bytes, events)
				values ($1, $2, $3, $4, $5, $6, $7, $8)`,
				f.session, c.first, c.count, c.startTime, c.endTime, c.snapshot, c.raw, c.events)
		}
		if err := pool.SendBatch(context.Background(), batch).Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bare:", err)
			os.Exit(1)
		}
		for _, c := range group {
			ack := fmt.Sprintf(`{"type":"events_ack","data":{"seq":%d}}`, c.seq)
			fmt.Fprintf(c.conn, "\x81%c%s", len(ack), ack)
		}
	}
}

// bare starts a bare program; it ends with the part.
func (b *bench) bare(t *testing.T, work string, w workload) *contender {
	database := databaseIn(t, b.cluster.url)
	execSQL(t, database, schema)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BENCH_BARE="+database, "BENCH_BARE_WORK="+work)
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
	return &contender{workload: w, address: "ws://" + strings.TrimSpace(line) + "/ws", pid: cmd.Process.Pid, bare: true}
}
