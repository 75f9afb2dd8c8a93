//go:build bench

package main

// The benchmark: the figures of the table in doc/measured.md, measured on the real
// server in a process of its own, with PostgreSQL of its own that does fsync.
//
//	make bench                                            all of it, as Markdown
//	go test -tags bench -run '^TestBench$/ingest' -v .    one part
//	RECORDINGS=DIR …                                      with recordings of your own as load
//	BENCH_PROFILE=DIR …                                   with the server's CPU profiles
//
// The load is made here, by trackers that cost as little as possible: what they
// send is masked and deflated before the clock starts, and goes out by one writev a
// batch. It shares the machine with server and PostgreSQL, therefore what it costs
// is in the limit too: see bare.

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	// How many bytes a tracker sends without an ack: as much as the tracker in
	// web/ keeps; less where they are many, so that all of it fits into memory.
	window      = 8 << 20
	smallWindow = 256 << 10

	rounds    = 3               // of bare program and server in turn, because machines waver
	roundTime = 5 * time.Second // measured of each, after warmUp
	warmUp    = 2 * time.Second

	idleTrackers = 5_000
	longSession  = 1_000_000 // events
	oldSessions  = 100_000

	ticks = 100 // of a CPU a second; the kernel's USER_HZ
)

func TestBench(t *testing.T) {
	b := newBench(t)
	parts := []struct {
		name string
		run  func(*testing.T)
	}{
		{"parse", b.parse},
		{"ingest", b.ingest},
		{"latency", b.latency},
		{"idle", b.idle},
		{"disk", b.disk},
		{"long", b.long},
		{"lists", b.lists},
		{"growth", b.growth},
	}
	for _, part := range parts {
		if !t.Run(part.name, part.run) {
			b.report(part.name, "to be measured", false, "failed")
		}
		if time.Since(b.since) > time.Second { // the part was asked for
			t.Logf("%s: other programs kept %.2f cores busy", part.name, b.others(t))
		}
	}
	b.print(t)
}

// ---- what is measured, and how it is shown ----

type bench struct {
	cluster    *testPostgres
	recordings [][]recorded // one each
	mixed      []*shot      // all recordings, batched as our tracker does
	small      []*shot      // 10 events, about 4 KB
	medium     []*shot      // 50 events, about 20 KB
	fleets     int
	best       float64 // bytes a second of the ingest run
	rows       strings.Builder

	since       time.Time // when others was asked
	busy, spent float64   // CPU seconds by then: of all programs, and of ours
}

func newBench(t *testing.T) *bench {
	b := &bench{cluster: ownPostgres(t), recordings: loadRecordings(t)}
	for _, r := range b.recordings {
		b.mixed = append(b.mixed, batches(r)...)
	}
	b.small, b.medium = smallShots(b.recordings, 10), smallShots(b.recordings, 50)
	b.others(t)
	if os.Getenv("BENCH_PROFILE") != "" {
		os.Setenv("GOFLAGS", "-tags=bench")
	}
	return b
}

// report adds a line to the table: what was asked, what was measured.
func (b *bench) report(figure, target string, met bool, format string, args ...any) {
	measured := fmt.Sprintf(format, args...)
	if target != "" && !met {
		measured += ". **Missed**"
	}
	fmt.Fprintf(&b.rows, "| %s | %s | %s |\n", figure, target, measured)
}

func (b *bench) print(t *testing.T) {
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(info), "model name\t: ")
	model, _, _ = strings.Cut(model, "\n")
	fmt.Printf("\n%s: %d × %s, %s, PostgreSQL %s\n\n| figure | target | measured |\n|---|---|---|\n%s\n",
		time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), model, runtime.Version(),
		querySQL[string](t, b.cluster.url, "show server_version"), b.rows.String())
}

// others says how many cores were busy, since it was last asked, with programs
// that have nothing to do with this: what is measured beside them is too little.
func (b *bench) others(t *testing.T) float64 {
	content, _ := os.ReadFile("/proc/stat")
	var user, nice, system, idle, wait, irq, soft float64
	fmt.Sscanf(string(content), "cpu %f %f %f %f %f %f %f", &user, &nice, &system, &idle, &wait, &irq, &soft)
	busy, spent := (user+nice+system+irq+soft)/ticks, b.cluster.cpuSeconds(t)+cpuSeconds(os.Getpid(), true)
	cores := (busy - b.busy - spent + b.spent) / time.Since(b.since).Seconds()
	b.since, b.busy, b.spent = time.Now(), busy, spent
	return max(0, cores)
}

// server starts the server with its default settings and an empty database.
func (b *bench) server(t *testing.T, env ...string) *testServer {
	all := []string{"DATABASE_URL=" + databaseIn(t, b.cluster.url), "BATCH_INTERVAL=5000", "DB_MAX_CONNECTIONS=20",
		"LOG_LEVEL=warn"}
	if os.Getenv("BENCH_PROFILE") != "" {
		all = append(all, "SR_PPROF=127.0.0.1:16060")
	}
	return startServer(t, append(all, env...)...)
}

// ---- how much, and at what cost ----

// sample is what was committed in a stretch of time, and the CPU seconds of those
// that took part.
type sample struct{ seconds, bytes, events, server, postgres, generator float64 }

func (s *sample) add(o sample, sign float64) {
	*s = sample{s.seconds + sign*o.seconds, s.bytes + sign*o.bytes, s.events + sign*o.events, s.server + sign*o.server,
		s.postgres + sign*o.postgres, s.generator + sign*o.generator}
}

// sampleNow reads all counters; two of them, subtracted, are what was between.
func (b *bench) sampleNow(t *testing.T, f *fleet, pid int) sample {
	return sample{float64(time.Now().UnixNano()) / 1e9, float64(f.bytes.Load()), float64(f.events.Load()),
		cpuSeconds(pid, false), b.cluster.cpuSeconds(t), cpuSeconds(os.Getpid(), false)}
}

func (p *testPostgres) cpuSeconds(t *testing.T) (seconds float64) {
	for i, pid := range p.processes(t) {
		seconds += cpuSeconds(pid, i == 0) // the first has the sum of those that have ended
	}
	return seconds
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
	content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(content[strings.LastIndex(string(content), ")")+1:]))
	last := map[bool]int{false: 13, true: 15}[children]
	for _, field := range fields[min(11, len(fields)):min(last, len(fields))] {
		n, _ := strconv.ParseFloat(field, 64)
		seconds += n / ticks
	}
	return seconds
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
					if f, err := parseFrame(m); err != nil || !f.objects {
						tb.Fatal(err)
					}
				}
			}
		})
		runs := float64(result.N) / result.T.Seconds()
		return runs * float64(size), runs * float64(len(messages)), float64(result.AllocsPerOp()) / float64(events)
	}
	_, _, allocs := speed([]*shot{newShot(slices.Concat(b.recordings...))}) // so many that what is per batch vanishes
	bytes, _, _ := speed(b.mixed)
	b.report("parse a batch, one core", "≥ 300 MB/s, no allocation per event", bytes >= 300e6 && allocs < 0.05,
		"%.0f MB/s, %.3f allocations per event", bytes/1e6, allocs)
	bytes, batches, _ := speed(b.small)
	b.report("parse small batches (10 events, 4 KB), one core", "≥ 40,000 batches/s", batches >= 40000,
		"%.0f batches/s, %.0f MB/s", batches, bytes/1e6)
}

func (b *bench) ingest(t *testing.T) {
	s := b.server(t)
	plain := workload{trackers: 50, window: window, shots: rotated(b.mixed), loop: true}
	deflated := plain
	deflated.deflated = true
	ready, gzip, both := b.bare(t, "ready", plain), b.bare(t, "gzip", plain), b.bare(t, "gzip", deflated)
	ours := &contender{workload: plain, address: s.ws("tracker"), pid: s.cmd.Process.Pid}
	small := &contender{workload: deflated, address: ours.address, pid: ours.pid}
	for range rounds {
		for _, c := range []*contender{ready, gzip, ours, both, small} {
			b.round(t, c)
		}
	}
	sent := ours.sent + small.sent
	if stored := querySQL[int64](t, s.database, "select sum(event_count) from session_events"); stored != sent {
		t.Errorf("%d events sent and acked, %d stored", sent, stored)
	}
	b.best = ours.speed()
	b.report("durable ingest, 50 trackers, JSON until committed", "≥ 100 MB/s", b.best >= 100e6,
		"%.0f MB/s, %.0f events/s", b.best/1e6, ours.events/ours.seconds)
	b.report("the same, deflated on the wire", "≥ 100 MB/s", small.speed() >= 100e6, "%.0f MB/s", small.speed()/1e6)
	compare := func(figure string, least float64, c, with *contender) {
		share := 100 * c.speed() / with.speed()
		b.report(figure, fmt.Sprintf("≥ %.0f %%", least), share >= least, "%.0f %% of %.0f MB/s",
			share, with.speed()/1e6)
	}
	compare("deflated as a share of plain", 60, small, ours)
	compare("plain as a share of gzip and pgx without a server", 70, ours, gzip)
	compare("deflated as a share of inflate, gzip and pgx without a server", 70, small, both)
	compare("plain as a share of pgx alone, with ready chunks", 60, ours, ready)
	b.reportCPU("CPU seconds per 100 MB, plain", ours.sample)
	b.reportCPU("those of gzip and pgx", gzip.sample)
	b.reportCPU("CPU seconds per 100 MB, deflated", small.sample)
	b.reportCPU("those of inflate, gzip and pgx", both.sample)
	raw, wire := 0.0, 0.0
	for _, s := range b.mixed {
		raw, wire = raw+float64(s.json), wire+float64(len(s.deflated))
	}
	b.report("bytes on the wire per byte of JSON, deflated", "≤ 0.16", wire/raw <= 0.16, "%.3f", wire/raw)
	peak := float64(s.peakMemory())
	b.report("peak resident memory in ingest", "≤ 400 MB", peak <= 400e6, "%.0f MB", peak/1e6)
}

func (b *bench) reportCPU(figure string, s sample) {
	per := 100e6 / s.bytes
	b.report(figure, "", false, "server %.2f, PostgreSQL %.2f, load generator %.2f; %.2f cores busy", s.server*per,
		s.postgres*per, s.generator*per, (s.server+s.postgres+s.generator)/s.seconds)
}

// profile keeps the server's CPU profile of the next seconds, and its heap.
func (b *bench) profile(t *testing.T, name string) {
	dir := os.Getenv("BENCH_PROFILE")
	for _, kind := range []string{"profile?seconds=5", "heap", "goroutine", "allocs"} {
		if dir == "" {
			return
		}
		resp, err := http.Get("http://127.0.0.1:16060/debug/pprof/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		content, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		os.WriteFile(filepath.Join(dir, name+"."+strings.TrimSuffix(kind, "?seconds=5")), content, 0o644)
	}
}

// latency is measured here alone: a batch carries the time of its sending, and
// the viewers are in this process too.
func (b *bench) latency(t *testing.T) {
	const ms, beside = time.Millisecond, ", ingest at half its maximum"
	s := b.server(t)
	b.live(t, s, 20, 2, "", ms, 5*ms)
	b.live(t, s, 1, 500, "", 15*ms, 15*ms)
	rate := cmp.Or(b.best, 100e6) / 2 / 50 // bytes a second of each
	others := b.launch(t, s.ws("tracker"), workload{trackers: 50, window: window, shots: rotated(b.mixed), loop: true,
		pace: func(_ int, _, bytes int64, _ *shot) time.Duration {
			return time.Duration(float64(bytes) / rate * float64(time.Second))
		}})
	time.Sleep(warmUp)
	b.live(t, s, 20, 2, beside, 50*ms, 50*ms)
	b.live(t, s, 1, 500, beside, 50*ms, 50*ms)
	others.stop(t)
}

// live measures from before a tracker's write until a viewer has the whole
// message; each tracker sends 20 batches a second.
func (b *bench) live(t *testing.T, s *testServer, trackers, viewers int, beside string, p50, p99 time.Duration) {
	figure := fmt.Sprintf("live latency, trackers × viewers of each: %d × %d%s", trackers, viewers, beside)
	f := b.launch(t, s.ws("tracker"), workload{trackers: trackers, window: window, shots: rotated(b.small), loop: true,
		mark: true,
		pace: func(i int, n, _ int64, _ *shot) time.Duration {
			return time.Duration(n)*50*time.Millisecond + time.Duration(i)*50*time.Millisecond/time.Duration(trackers)
		}})
	var counts atomic.Bool
	all := make([][]time.Duration, trackers*viewers)
	var watching sync.WaitGroup
	wires := make([]*testConn, len(all))
	parallel(t, len(all), func(i int) (err error) {
		wires[i], err = b.join(s, f.trackers[i%trackers].session)
		return err
	})
	for i, w := range wires {
		watching.Go(func() { // ends with the connection
			for m, err := w.read(); err == nil; m, err = w.read() {
				now := time.Now().UnixNano()
				if sent := digits(m, `"payload":`); sent > 0 && counts.Load() {
					all[i] = append(all[i], time.Duration(now-sent))
				}
			}
		})
	}
	time.Sleep(time.Second)
	counts.Store(true)
	time.Sleep(2 * roundTime)
	counts.Store(false)
	for _, w := range wires {
		w.Close()
	}
	watching.Wait()
	f.stop(t)
	got := slices.Concat(all...)
	want := trackers * viewers * 20 * int(2*roundTime/time.Second)
	if len(got) < want*9/10 {
		t.Errorf("%s: %d batches arrived, want %d", figure, len(got), want)
	}
	target := fmt.Sprintf("p50 ≤ %v, p99 ≤ %v", p50, p99)
	half, most := percentile(got, 50), percentile(got, 99)
	b.report(figure, target, half <= p50 && most <= p99, "p50 %.2f ms, p99 %.2f ms", inMillis(half), inMillis(most))
}

// digits reads the number that follows a name, 0 when it is not there.
func digits(m []byte, name string) (n int64) {
	_, rest, _ := bytes.Cut(m[:min(len(m), 400)], []byte(name))
	for ; len(rest) > 0 && '0' <= rest[0] && rest[0] <= '9'; rest = rest[1:] {
		n = n*10 + int64(rest[0]-'0')
	}
	return n
}

// join connects a viewer and makes it watch a session.
func (b *bench) join(s *testServer, id string) (*testConn, error) {
	w, err := openWebSocket(&net.Dialer{}, s.ws("viewer"), 16<<10)
	if err == nil {
		w.send("viewer_join_session", sessionID{id})
		err = w.awaitMessage("session_joined")
	}
	return w, err
}

// awaitMessage reads until a message of a type.
func (c *testConn) awaitMessage(kind string) error {
	for {
		m, err := c.receive()
		if err != nil || m.Type == kind {
			return err
		}
	}
}

func inMillis(d time.Duration) float64 { return d.Seconds() * 1000 }

func percentile(all []time.Duration, p int) time.Duration {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[(len(all)-1)*p/100]
}

// idle trackers have started their sessions, as browsers do with a deflated message
// or as other clients do, and send nothing.
func (b *bench) idle(t *testing.T) {
	t.Run("plain", func(t *testing.T) {
		s := b.idleTrackers(t, "plain", maskedText)
		b.ask(t, s, fmt.Sprintf("lists with %d live sessions", idleTrackers), 50*time.Millisecond, "/sessions",
			"/sessions?active=true", "/sessions?active=true&url=nowhere", "/sessions/active", "/stats")
	})
	t.Run("deflated", func(t *testing.T) {
		b.idleTrackers(t, "deflated", func(text []byte) []byte {
			return maskedFrame(0xc1, []byte(deflated(string(text))))
		})
	})
}

// idleTrackers measures them while pings go out three times as often as by default,
// so that a round of them is in the figure.
func (b *bench) idleTrackers(t *testing.T, kind string, pack func([]byte) []byte) *testServer {
	const interval = 10 * time.Second
	s := b.server(t, "HEARTBEAT_INTERVAL="+interval.String())
	pid := s.cmd.Process.Pid
	before := memoryOf(t, pid, "VmRSS")
	b.startIdle(t, s, idleTrackers, pack)
	most := before
	for end := time.Now().Add(interval * 3 / 2); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		most = max(most, memoryOf(t, pid, "VmRSS"))
	}
	b.profile(t, "idle-"+kind)
	if got := s.stat("trackers"); got != idleTrackers {
		t.Errorf("%d trackers are left of %d", got, idleTrackers)
	}
	each := float64(most-before) / idleTrackers / 1024
	b.report("resident memory per idle tracker, "+kind, "≤ 24 KB", each <= 24, "%.1f KB", each)
	return s
}

// startIdle connects trackers that answer pings and do nothing else.
func (b *bench) startIdle(t *testing.T, s *testServer, n int, pack func([]byte) []byte) {
	b.fleets++
	parallel(t, n, func(i int) error {
		w, err := openWebSocket(&net.Dialer{}, s.ws("tracker"), 256, offerDeflate)
		if err != nil {
			return err
		}
		t.Cleanup(func() { w.Close() })
		w.Write(pack(sessionStart(fmt.Sprintf("bench-%d-%d", b.fleets, i), "")))
		err = w.awaitMessage("session_ready")
		w.SetReadDeadline(time.Time{})
		go discard(w.read) // ends with the connection
		return err
	})
}

// disk plays each recording several times, at its own pace.
func (b *bench) disk(t *testing.T) {
	s := b.server(t)
	var recordings [][]*shot
	for _, r := range b.recordings {
		recordings = append(recordings, batches(r))
	}
	f := b.launch(t, s.ws("tracker"), workload{trackers: 48, window: window,
		shots: func(i int) []*shot { return recordings[i%len(recordings)] },
		pace: func(i int, _, _ int64, s *shot) time.Duration {
			return s.at + time.Duration(i)*100*time.Millisecond
		}})
	f.wait(t)
	share := func(of string) float64 {
		return querySQL[float64](t, s.database, "select ("+of+") / (select sum(raw_bytes) from sessions)::float8")
	}
	all := share("pg_total_relation_size('session_events') + pg_total_relation_size('sessions')")
	b.report("bytes on disk per byte of JSON, recordings at their own pace", "≤ 0.20", all <= 0.20,
		"%.3f (chunks %.3f)",
		all, share("select sum(stored_bytes) from sessions"))
}

// long asks a session of a million events, which is live, for pages.
func (b *bench) long(t *testing.T) {
	s := b.server(t)
	per := 0
	for _, shot := range b.small {
		per += shot.events
	}
	shots := slices.Repeat(b.small, longSession/per+1)
	f := b.launch(t, s.ws("tracker"), workload{trackers: 1, window: window, shots: func(int) []*shot { return shots },
		pace: func(_ int, n, _ int64, _ *shot) time.Duration {
			if int(n) == len(shots)-1 {
				return time.Hour // it stays live
			}
			return 0
		}})
	id, last := f.trackers[0].session, (len(shots)-1)*10
	waitUntil(t, "the long session is stored", func() bool { return int(f.events.Load()) >= last })
	page := func(from int) func(int) error {
		return func(i int) error {
			status, body := s.get(fmt.Sprintf("/sessions/%s/events?fromIndex=%d&limit=1000", id, from+i*500))
			if status != http.StatusOK || !strings.HasSuffix(string(body), `"count":1000}`) {
				return fmt.Errorf("page at %d: %d %.100s", from+i*500, status, body)
			}
			return nil
		}
	}
	first, worst := time.Duration(0), time.Duration(0)
	var shown []string
	for _, from := range []int{0, last / 4, last / 2, last * 3 / 4, last - 50_000, last - 9_000} {
		half, most := b.times(t, 16, page(from))
		if first == 0 {
			first = half
		}
		if from == last-50_000 {
			b.report("the same, last page that is stored against first", "≤ 1.5", float64(half) <= 1.5*float64(first),
				"%.2f", float64(half)/float64(first))
		}
		worst = max(worst, most)
		shown = append(shown, fmt.Sprintf("%.1f", inMillis(half)))
	}
	b.report("1,000 events of a session of 1,000,000, six depths", "≤ 20 ms", worst <= 20*time.Millisecond,
		"p50 %s ms, p95 %.1f ms", strings.Join(shown, ", "), inMillis(worst))
	half, most := b.times(t, 50, func(int) error {
		w, err := b.join(s, id)
		if err == nil {
			w.Close()
		}
		return err
	})
	b.report("joining it live", "≤ 20 ms", most <= 20*time.Millisecond, "p50 %.1f ms, p95 %.1f ms",
		inMillis(half), inMillis(most))
	f.abandon()
	b.chunks(t, s)
}

// times does something several times, one after the other, and gives the median
// and the 95th percentile.
func (b *bench) times(t *testing.T, n int, do func(int) error) (half, most time.Duration) {
	t.Helper()
	all := make([]time.Duration, n)
	for i := range all {
		begin := time.Now()
		if err := do(i); err != nil {
			t.Fatal(err)
		}
		all[i] = time.Since(begin)
	}
	return percentile(all, 50), percentile(all, 95)
}

// chunks reads a session's chunks as a player does, over four connections.
func (b *bench) chunks(t *testing.T, s *testServer) {
	f := b.launch(t, s.ws("tracker"), workload{trackers: 1, window: window, shots: rotated(b.mixed)})
	f.wait(t)
	var session struct {
		Chunks []struct{ FromIndex, Bytes int }
	}
	s.getJSON("/sessions/"+f.trackers[0].session, &session)
	var raw, packed atomic.Int64
	begin := time.Now()
	parallel(t, 4, func(i int) error {
		for n := i; time.Since(begin) < roundTime; n++ {
			c := session.Chunks[n%len(session.Chunks)]
			address := fmt.Sprintf("%s/sessions/%s/chunks/%d", s.url, f.trackers[0].session, c.FromIndex)
			req, _ := http.NewRequest("GET", address, nil)
			req.Header.Set("Accept-Encoding", "gzip") // as set by hand the client does not unpack
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			size, err := io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Encoding") != "gzip" {
				return fmt.Errorf("chunk %d: %s, %v", c.FromIndex, resp.Status, err)
			}
			raw.Add(int64(c.Bytes))
			packed.Add(size)
		}
		return nil
	})
	speed := float64(raw.Load()) / time.Since(begin).Seconds()
	b.report("stored chunks served, JSON", "≥ 1 GB/s", speed >= 1e9, "%.2f GB/s (%.0f MB/s on the wire)",
		speed/1e9, float64(packed.Load())/time.Since(begin).Seconds()/1e6)
}

// lists asks for lists, and searches, beside many sessions, old and live.
func (b *bench) lists(t *testing.T) {
	s := b.server(t)
	about := `{"url":"https://example.com/shop","userAgent":"` + strings.Repeat("Mozilla ", 15) + `","referrer":"",` +
		`"viewport":{"width":1280,"height":800,"devicePixelRatio":1},"startTime":1700000000000,"timeZone":"UTC"}`
	execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, created_at, updated_at,
			ended_at, event_count, error_count, raw_bytes, stored_bytes, first_event_time, last_event_time)
		select 'old-' || n, 'user_' || n % 5000, 'https://example.com/Shop/' || n % 1000, $1, false, made, made, made,
			3000,
			 greatest(0, n % 50 - 48), 3000000, 500000, 1, n::bigint * 7919 % 1800000
		from (select n, now() - n * interval '1 minute' as made from generate_series(1, $2::integer) n) n`,
		about, oldSessions)
	execSQL(t, s.database, "vacuum analyze sessions")
	b.startIdle(t, s, 1000, maskedText)
	b.ask(t, s, "lists with 100,000 sessions, 1,000 live", 20*time.Millisecond, "/sessions",
		"/sessions?limit=100&offset=99000", "/sessions/active", "/stats")
	ago := func(hours int) string {
		return time.Now().Add(-time.Duration(hours) * time.Hour).UTC().Format(time.RFC3339)
	}
	day := "from=" + ago(1000) + "&to=" + ago(976)
	b.ask(t, s, "searches with 100,000 sessions, 1,000 live, first page and total", 50*time.Millisecond,
		"/sessions?userId=user_N", "/sessions?url=shop", "/sessions?url=shop/N", "/sessions?url=nowhere",
		"/sessions?"+day, "/sessions?from="+ago(1000), "/sessions?to="+ago(1000),
		"/sessions?minDuration=60000", "/sessions?minDuration=1799000", "/sessions?minDuration=9000000",
		"/sessions?errors=true", "/sessions?active=true", "/sessions?active=false",
		"/sessions?userId=user_N&errors=true", "/sessions?url=shop/N&minDuration=60000&active=false",
		"/sessions?url=nowhere&errors=true", "/sessions?url=nowhere&active=true", "/sessions?url=shop/N&"+day,
		"/sessions?userId=user_N&url=shop&minDuration=1000&"+day)
}

// ask measures requests; N in a path stands for another number each time.
func (b *bench) ask(t *testing.T, s *testServer, figure string, limit time.Duration, paths ...string) {
	worst, shown := time.Duration(0), []string{}
	for _, path := range paths {
		half, most := b.times(t, 50, func(i int) error {
			if status, body := s.get(strings.Replace(path, "N", strconv.Itoa(i*19), 1)); status != http.StatusOK {
				return fmt.Errorf("%s: %d %s", path, status, body)
			}
			return nil
		})
		worst = max(worst, most)
		shown = append(shown, fmt.Sprintf("%s %.1f (%.1f)", path, inMillis(half), inMillis(most)))
	}
	b.report(figure, fmt.Sprintf("p95 ≤ %v", limit), worst <= limit, "p50 (p95) ms: %s", strings.Join(shown, ", "))
}

// growth compares what the same bytes cost when they come from more sessions, in
// batches of 50 events; the sessions have the same number of bytes on the way.
func (b *bench) growth(t *testing.T) {
	const inFlight = 128 << 20
	var costs []float64
	for _, n := range []int{10, 100, 1000} {
		s := b.server(t)
		c := &contender{address: s.ws("tracker"), pid: s.cmd.Process.Pid,
			workload: workload{trackers: n, window: min(window, inFlight/n), shots: rotated(b.medium), loop: true}}
		b.round(t, c)
		b.round(t, c)
		costs = append(costs, c.server/c.bytes*100e6)
	}
	spread := slices.Max(costs)/slices.Min(costs) - 1
	b.report("server's CPU seconds per 100 MB from 10, 100, 1,000 sessions", "within 20 %", spread <= 0.2,
		"%.2f: within %.0f %%", costs, spread*100)
}
