package main

// What is acknowledged is stored, once, whatever breaks: the server, PostgreSQL,
// the network between, a client. Each test lets trackers record while viewers
// come and go, breaks something, waits until recording goes on, and ends with
// the final check of harness_test.go.

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nhooyr.io/websocket"
)

// scale picks a number for the quick set or the full one.
func scale[T any](quick, full T) T {
	if fullFaults {
		return full
	}
	return quick
}

// besideOthers lets the quick tests run side by side; those of the full set have
// the machine to themselves.
func besideOthers(t *testing.T) {
	if !fullFaults {
		t.Parallel()
	}
}

// ---- load ----

// load is trackers that record, viewers that watch some of them from the first
// event to the last, and viewers that come and go.
type load struct {
	t        testing.TB
	server   *serverProcess
	trackers []*testTracker
	viewers  []*testViewer
	seen     atomic.Int64 // events that the viewers who come and go have checked
	goHome   context.CancelFunc
	visits   sync.WaitGroup
}

// startLoad sends to an address (the server's own, or a proxy's). change may set
// up each tracker before it starts.
func startLoad(t testing.TB, s *serverProcess, address string, trackers int, change func(i int, tr *testTracker)) *load {
	t.Helper()
	l := &load{t: t, server: s}
	for i := range trackers {
		tr := newTracker(t, sessionName(t, i))
		tr.perBatch, tr.window, tr.pause = 1+rand.IntN(25), 1+rand.IntN(16), time.Duration(10+rand.IntN(30))*time.Millisecond
		if change != nil {
			change(i, tr)
		}
		l.trackers = append(l.trackers, tr.start(address))
	}
	l.progress("the first acks")
	for i := 0; i < trackers; i += 1 + trackers/4 {
		l.viewers = append(l.viewers, watchSession(t, s.ws("viewer"), l.trackers[i].session))
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.goHome = cancel
	for range 3 {
		l.visits.Add(1)
		go l.comeAndGo(ctx, l.trackers) // ends at finish, or with the test:
	}
	t.Cleanup(func() { cancel(); l.visits.Wait() })
	return l
}

// comeAndGo watches trackers for moments at a time, until ctx ends.
func (l *load) comeAndGo(ctx context.Context, trackers []*testTracker) {
	defer l.visits.Done()
	for ctx.Err() == nil {
		linger(ctx, 50)
		v, err := openViewer(l.t, http.DefaultClient, l.server.ws("viewer"))
		if err != nil {
			continue // the server is away
		}
		for range 1 + rand.IntN(5) {
			v.join(trackers[rand.IntN(len(trackers))].session)
			linger(ctx, 300)
			v.leave()
		}
		l.seen.Add(int64(v.look().events))
		v.close()
	}
}

// linger waits for at most so many milliseconds.
func linger(ctx context.Context, milliseconds int) {
	select {
	case <-time.After(time.Duration(rand.IntN(milliseconds)) * time.Millisecond):
	case <-ctx.Done():
	}
}

// progress waits until every tracker has been acked something that it had not
// sent before, and returns how long that took.
func (l *load) progress(what string) time.Duration {
	l.t.Helper()
	began := time.Now()
	goals := make([]int64, len(l.trackers))
	for i, tr := range l.trackers {
		goals[i] = tr.read(&tr.made)
	}
	for i, tr := range l.trackers {
		waitUntil(l.t, fmt.Sprintf("%s goes on after: %s", tr.session, what), func() bool {
			return tr.read(&tr.acked) > goals[i] || tr.why() != ""
		})
	}
	return time.Since(began)
}

// finish ends the load: all that was made is acked and stored, and the viewers
// have seen it.
func (l *load) finish() {
	l.t.Helper()
	for _, tr := range l.trackers {
		tr.stop()
	}
	var reconnects int
	var resent int64
	for _, tr := range l.trackers {
		tr.finish()
		resent += tr.resent
		reconnects += tr.reconnects - 1
		l.noErrors(tr)
	}
	for i, v := range l.viewers {
		v.waitFor(l.trackerOf(v).madeEvents())
		l.seen.Add(int64(l.viewers[i].look().events))
	}
	l.goHome()
	l.visits.Wait()
	if l.seen.Load() == 0 {
		l.t.Error("the viewers have seen nothing")
	}
	checkStored(l.t, l.server, l.trackers...)
	l.t.Logf("%d trackers, %d reconnects, %d batches sent again, %d events seen by viewers", len(l.trackers), reconnects, resent, l.seen.Load())
}

func (l *load) trackerOf(v *testViewer) *testTracker {
	i := slices.IndexFunc(l.trackers, func(tr *testTracker) bool { return tr.session == v.session })
	return l.trackers[i]
}

// noErrors allows only the errors that a tracker asked for.
func (l *load) noErrors(tr *testTracker) {
	l.t.Helper()
	for code, times := range tr.errors {
		if code != "unavailable" && !(code == "sequence_gap" && tr.mischief) {
			l.t.Errorf("%s got %d times the error %s", tr.session, times, code)
		}
	}
}

// ---- a network that breaks ----

// testProxy stands between two ends that speak TCP (or the target's unix
// socket), and can cut, freeze or mutilate what passes.
type testProxy struct {
	address string // host:port to connect to
	dial    func() (net.Conn, error)
	thief   *thief // takes answers away, if there is one

	mu     sync.Mutex
	links  map[*link]bool
	frozen bool
}

// link is one connection through the proxy.
type link struct {
	near, far net.Conn
	gate      sync.RWMutex // locked while the link is frozen
	frozen    bool
	room      atomic.Int64 // bytes that may still pass towards the target
	theft     theft        // what the proxy's thief is about here
}

func newProxy(t testing.TB, network, target string, th *thief) *testProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{address: listener.Addr().String(), thief: th, links: map[*link]bool{}}
	p.dial = func() (net.Conn, error) { return net.Dial(network, target) }
	go p.accept(listener) // ends when the listener is closed
	t.Cleanup(func() { listener.Close(); p.thaw(); p.cut() })
	return p
}

// proxyTo stands before a server; ws is the address for its trackers.
func proxyTo(t testing.TB, s *serverProcess) (p *testProxy, ws string) {
	p = newProxy(t, "tcp", "127.0.0.1:"+s.port, nil)
	return p, "ws://" + p.address + "/ws?type=tracker"
}

// proxyToDatabase stands before PostgreSQL; through is the URL for its users.
func proxyToDatabase(t testing.TB, database string, th *thief) (p *testProxy, through string) {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	network, target := "tcp", u.Host
	if dir := query.Get("host"); dir != "" {
		network, target = "unix", filepath.Join(dir, ".s.PGSQL."+query.Get("port"))
	}
	p = newProxy(t, network, target, th)
	query.Del("host")
	query.Del("port")
	query.Set("sslmode", "disable")
	u.Host, u.RawQuery = p.address, query.Encode()
	return p, u.String()
}

func (p *testProxy) accept(listener net.Listener) {
	for {
		near, err := listener.Accept()
		if err != nil {
			return
		}
		far, err := p.dial()
		if err != nil {
			near.Close()
			continue
		}
		l := &link{near: near, far: far}
		l.room.Store(math.MaxInt64)
		p.mu.Lock()
		p.links[l] = true
		if p.frozen {
			l.freeze()
		}
		p.mu.Unlock()
		go p.pump(l, near, far, true) // both end when either side closes
		go p.pump(l, far, near, false)
	}
}

func (p *testProxy) pump(l *link, from, to net.Conn, up bool) {
	defer p.forget(l)
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			l.gate.RLock() // a frozen link does not tell that its other end is gone
			l.gate.RUnlock()
			return
		}
		data, whole := buf[:n], true
		if up {
			data, whole = l.pass(data)
			p.thief.request(l, data)
		} else {
			data, whole = p.thief.answer(l, data)
		}
		l.gate.RLock()
		l.gate.RUnlock()
		if _, err := to.Write(data); err != nil || !whole {
			return
		}
	}
}

// pass says how much of data may pass, and whether that is all of it.
func (l *link) pass(data []byte) ([]byte, bool) {
	left := l.room.Add(-int64(len(data)))
	if left >= 0 {
		return data, true
	}
	return data[:max(0, len(data)+int(left))], false
}

func (p *testProxy) forget(l *link) {
	l.near.Close()
	l.far.Close()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

func (p *testProxy) all() (links []*link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		links = append(links, l)
	}
	return links
}

// cut ends all links.
func (p *testProxy) cut() {
	for _, l := range p.all() {
		l.near.Close()
		l.far.Close()
	}
}

// cutInside ends every link within the next so many bytes sent to the target:
// as a rule in the middle of a message.
func (p *testProxy) cutInside(bytes int64) {
	for _, l := range p.all() {
		l.room.Store(rand.Int64N(bytes))
	}
}

// freezeLinks makes the present links pass nothing, not even their end.
func (p *testProxy) freezeLinks() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.freeze()
	}
}

// freeze is freezeLinks for links to come, too.
func (p *testProxy) freeze() {
	p.mu.Lock()
	p.frozen = true
	p.mu.Unlock()
	p.freezeLinks()
}

func (p *testProxy) thaw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = false
	for l := range p.links {
		if l.frozen {
			l.frozen = false
			l.gate.Unlock()
		}
	}
}

// freeze is called with the proxy's lock held.
func (l *link) freeze() {
	if !l.frozen {
		l.frozen = true
		l.gate.Lock()
	}
}

// ---- the server ends ----

func TestFaultServerKilled(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	l := startLoad(t, s, s.ws("tracker"), scale(8, 40), nil)
	for i := range scale(3, 20) {
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		s.restart()
		l.progress(fmt.Sprintf("kill -9 number %d", i+1))
	}
	l.finish()
}

func TestFaultServerTerminated(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	l := startLoad(t, s, s.ws("tracker"), scale(6, 30), nil)
	for range scale(2, 8) {
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		breaks := len(l.viewers[0].look().breaks)
		if code, out := s.term(); code != 0 {
			t.Fatalf("exit code %d after SIGTERM:\n%s", code, out)
		}
		waitUntil(t, "the viewers' connections end", func() bool { return len(l.viewers[0].look().breaks) > breaks })
		for _, v := range l.viewers {
			stored := querySQL[int](t, s.database, "select event_count from sessions where session_id = $1", v.session)
			if seen := v.look().next; seen > stored {
				t.Errorf("%s: viewers saw %d events, %d are stored after SIGTERM", v.session, seen, stored)
			}
		}
		s.start()
		s.waitHealthy()
		l.progress("SIGTERM")
	}
	for _, v := range l.viewers {
		for _, err := range v.look().breaks {
			if websocket.CloseStatus(err) != websocket.StatusGoingAway {
				t.Errorf("a viewer's connection ended with %v, want close code 1001", err)
			}
		}
	}
	l.finish()
}

// All that was received is committed when the server stops, though nothing was
// when it was told to; and peers that do nothing do not hold it.
func TestFaultTerminatedWithEverythingPending(t *testing.T) {
	besideOthers(t)
	s := startServer(t, "BATCH_INTERVAL=3600000")
	proxy, throughProxy := proxyTo(t, s)
	var trackers []*testTracker
	for i := range 5 {
		tr := newTracker(t, sessionName(t, i))
		tr.limit, tr.window, tr.pause = 20, 20, 0
		trackers = append(trackers, tr.start(throughProxy))
	}
	for _, tr := range trackers {
		waitUntil(t, "the tracker has sent all", func() bool { return tr.madeEvents() == 200 })
		watchSession(t, s.ws("viewer"), tr.session).waitFor(200)
		tr.drop()
		waitUntil(t, "it is back", tr.isBack)
		watchSession(t, s.ws("viewer"), tr.session).waitFor(200)
		if acked := tr.ackedEvents(); acked != 0 {
			t.Errorf("%s: %d events are acked before they are committed", tr.session, acked)
		}
	}
	proxy.freezeLinks() // the trackers hear no close frame and answer none
	silent := dialServer(t, s.ws("viewer"))
	silent.send("viewer_join_session", map[string]string{"sessionId": trackers[0].session})
	began := time.Now()
	if code, out := s.term(); code != 0 {
		t.Fatalf("exit code %d after SIGTERM:\n%s", code, out)
	}
	if took := time.Since(began); took > 25*time.Second {
		t.Errorf("it took %v to stop, the limit is 20 s", took)
	}
	stored := querySQL[int](t, s.database, "select sum(event_count) from sessions")
	if stored != 1000 {
		t.Errorf("%d events are stored after SIGTERM, want 1000", stored)
	}
	s.start()
	s.waitHealthy()
	proxy.thaw()
	proxy.cut()
	for _, tr := range trackers {
		tr.finish()
	}
	checkStored(t, s, trackers...)
}

// ---- PostgreSQL ends ----

func TestFaultPostgres(t *testing.T) {
	besideOthers(t)
	pg := ownPostgres(t)
	s := startServer(t, "DATABASE_URL="+databaseIn(t, pg.url))
	l := startLoad(t, s, s.ws("tracker"), scale(6, 30), nil)
	start := func() {
		if err := pg.start(); err != nil {
			t.Fatal(err)
		}
	}
	faults := []struct {
		name string
		do   func()
	}{
		{"fast restart", func() { pg.kill(t, syscall.SIGINT); start() }},
		{"immediate restart", func() { pg.kill(t, syscall.SIGQUIT); start() }},
		{"kill -9 of a backend", func() { killBackend(t, pg, s) }},
		{"kill -9 of the postmaster", func() { pg.kill(t, syscall.SIGKILL); start() }},
		{"frozen", func() {
			pg.freeze(t)
			time.Sleep(scale(time.Second, 10*time.Second))
			pg.thaw(t)
		}},
		{"down", func() {
			pg.kill(t, syscall.SIGINT)
			waitUntil(t, "/health says 503", func() bool { status, _ := s.get("/health"); return status == http.StatusServiceUnavailable })
			time.Sleep(scale(time.Second, 20*time.Second))
			start()
		}},
	}
	for _, fault := range faults {
		fault.do()
		took := l.progress(fault.name)
		t.Logf("%s: recording goes on %v after PostgreSQL", fault.name, took.Round(time.Millisecond))
		if limit := scale(15*time.Second, 5*time.Second); took > limit {
			t.Errorf("%s: recording went on after %v, the limit is %v", fault.name, took, limit)
		}
		s.waitHealthy()
	}
	l.finish()
}

// killBackend kills one of the server's connections; PostgreSQL then ends them
// all and recovers.
func killBackend(t testing.TB, pg *testPostgres, s *serverProcess) {
	t.Helper()
	pid := querySQL[int](t, pg.url, `select pid from pg_stat_activity
		where datname = $1 and backend_type = 'client backend' order by random() limit 1`, databaseName(t, s.database))
	syscall.Kill(pid, syscall.SIGKILL)
	waitUntil(t, "PostgreSQL has recovered", func() bool { return pg.start() == nil })
}

func databaseName(t testing.TB, database string) string {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(u.Path, "/")
}

// PostgreSQL works, but refuses: everything is kept and goes out when it does
// no more.
func TestFaultDatabaseRefuses(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	execSQL(t, s.database, `
		create table refusal (code text);
		create function refuse() returns trigger language plpgsql as $$
		declare wanted text;
		begin
			select code into wanted from refusal;
			if found then raise exception 'refused by the test' using errcode = wanted; end if;
			return new;
		end $$;
		create trigger refuse before insert on session_events for each row execute function refuse()`)
	l := startLoad(t, s, s.ws("tracker"), scale(5, 20), nil)
	codes := []string{
		"57P01", // admin shutdown
		"40001", // serialization failure
		"53100", // disk full
		"57014", // cancelled, as by a timeout
	}
	if fullFaults {
		codes = append(codes, "25006", "40P01", "53200", "53300", "58030", "XX000")
	}
	for _, code := range codes {
		execSQL(t, s.database, "insert into refusal values ($1)", code)
		time.Sleep(scale(500*time.Millisecond, 3*time.Second))
		execSQL(t, s.database, "delete from refusal")
		l.progress("SQLSTATE " + code)
	}
	readOnly(t, l)
	locked(t, l)
	if refused := s.stat("refusedSessions"); refused != 0 {
		t.Errorf("%d sessions count as refused, want 0: nothing was wrong with their data", refused)
	}
	l.finish()
}

// readOnly makes the database read-only for new connections, and ends the old
// ones; as when a standby has taken over the address for a while.
func readOnly(t testing.TB, l *load) {
	t.Helper()
	cluster, err := sharedDatabase()
	if err != nil {
		t.Fatal(err)
	}
	name := databaseName(t, l.server.database)
	execSQL(t, cluster, "alter database "+name+" set default_transaction_read_only = on")
	execSQL(t, cluster, "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
	time.Sleep(scale(500*time.Millisecond, 3*time.Second))
	execSQL(t, cluster, "alter database "+name+" set default_transaction_read_only = off")
	l.progress("a read-only database")
}

// locked holds a lock that every batch waits for.
func locked(t testing.TB, l *load) {
	t.Helper()
	conn := connectSQL(t, l.server.database)
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), "begin; lock table sessions in access exclusive mode"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(scale(500*time.Millisecond, 8*time.Second))
	if _, err := conn.Exec(context.Background(), "rollback"); err != nil {
		t.Fatal(err)
	}
	l.progress("a locked table")
}

// A commit succeeds and its answer is lost: the batch is written again, and
// stored once.
func TestFaultCommitAnswerLost(t *testing.T) {
	besideOthers(t)
	database := testDatabase(t)
	thief := &thief{}
	_, through := proxyToDatabase(t, database, thief)
	s := startServer(t, "DATABASE_URL="+through)
	s.database = database
	l := startLoad(t, s, s.ws("tracker"), scale(5, 20), nil)
	for i := range scale(5, 40) {
		thief.armed.Store(1)
		waitUntil(t, "an answer is lost", func() bool { return thief.stolen.Load() > int64(i) })
		l.progress("a lost answer")
	}
	l.finish()
}

// thief takes answers to commits away: as many as it is armed for.
type thief struct{ armed, stolen atomic.Int64 }

// theft is what it knows of a link.
type theft struct {
	chunk atomic.Bool // a chunk went to PostgreSQL, and the answer is due
	held  []byte      // of that answer
}

func (th *thief) request(l *link, data []byte) {
	if th != nil && bytes.Contains(data, []byte{0x1f, 0x8b, 0x08}) { // gzip
		l.theft.chunk.Store(true)
	}
}

func (th *thief) answer(l *link, data []byte) ([]byte, bool) {
	if th == nil {
		return data, true
	}
	state := &l.theft
	if !state.chunk.Load() || th.armed.Load() == 0 && state.held == nil {
		state.chunk.Store(false)
		return data, true
	}
	state.held = append(state.held, data...)
	if !bytes.HasSuffix(state.held, []byte("Z\x00\x00\x00\x05I")) { // ready for the next query: this one is committed
		return nil, true
	}
	th.armed.Add(-1)
	th.stolen.Add(1)
	return nil, false
}

// The network between server and PostgreSQL fails: links are cut anywhere.
func TestFaultDatabaseNetwork(t *testing.T) {
	besideOthers(t)
	database := testDatabase(t)
	proxy, through := proxyToDatabase(t, database, nil)
	s := startServer(t, "DATABASE_URL="+through)
	s.database = database
	l := startLoad(t, s, s.ws("tracker"), scale(5, 20), nil)
	for range scale(5, 40) {
		proxy.cutInside(20000)
		l.progress("a cut to PostgreSQL")
	}
	proxy.freeze()
	time.Sleep(scale(time.Second, 10*time.Second))
	proxy.thaw()
	l.progress("a frozen network to PostgreSQL")
	if fullFaults { // it takes its time
		stopWithoutDatabase(t, s, proxy)
		l.progress("a stop without PostgreSQL")
	}
	l.finish()
}

// stopWithoutDatabase: what is not committed cannot be; the server says so and
// stops in time, and the trackers still have it.
func stopWithoutDatabase(t testing.TB, s *serverProcess, proxy *testProxy) {
	t.Helper()
	proxy.freeze()
	time.Sleep(time.Second)
	began := time.Now()
	code, out := s.term()
	if took := time.Since(began); code == 0 || took > 25*time.Second {
		t.Errorf("exit code %d after %v without PostgreSQL, want another than 0 within 20 s:\n%s", code, took, out)
	}
	proxy.thaw()
	s.start()
	s.waitHealthy()
}

// PostgreSQL is away when the server starts: it says so, waits, and so do the
// trackers.
func TestFaultStartWithoutDatabase(t *testing.T) {
	besideOthers(t)
	database := testDatabase(t)
	proxy, through := proxyToDatabase(t, database, nil)
	s := newServer(t, "DATABASE_URL="+through)
	s.database = database
	proxy.freeze()
	s.start()
	waitUntil(t, "/health says 503", func() bool { status, _ := s.get("/health"); return status == http.StatusServiceUnavailable })
	tr := newTracker(t, sessionName(t, 0)).start(s.ws("tracker"))
	time.Sleep(scale(500*time.Millisecond, 5*time.Second))
	proxy.cut()
	proxy.thaw()
	s.waitHealthy()
	waitUntil(t, "it records", func() bool { return tr.ackedEvents() > 0 })
	tr.finish()
	checkStored(t, s, tr)
}

// ---- the network to the trackers ----

func TestFaultNetwork(t *testing.T) {
	besideOthers(t)
	s := startServer(t, "HEARTBEAT_INTERVAL=1000")
	proxy, throughProxy := proxyTo(t, s)
	l := startLoad(t, s, throughProxy, scale(8, 40), func(i int, tr *testTracker) { tr.mischief = i%2 == 0 })
	for range scale(4, 30) {
		proxy.cutInside(5000)
		l.progress("a cut in the middle of a frame")
	}
	for range scale(2, 10) {
		proxy.freezeLinks() // the server does not learn that the trackers leave them
		for _, tr := range l.trackers {
			tr.drop()
		}
		l.progress("half-open connections")
		proxy.thaw() // what was on its way arrives late
		l.progress("the end of the half-open connections")
	}
	waitUntil(t, "the dead connections are gone", func() bool { return s.stat("trackers") == int64(len(l.trackers)) })
	l.finish()
}

// A tracker freezes in the middle of a frame, longer than heartbeats and the
// grace period last. The others do not notice, and it goes on where it was.
func TestFaultTrackerFrozen(t *testing.T) {
	besideOthers(t)
	s := startServer(t, "HEARTBEAT_INTERVAL=300", "MESSAGE_TIMEOUT=1000", "SESSION_GRACE_PERIOD=300")
	proxy, throughProxy := proxyTo(t, s)
	frozen := newTracker(t, sessionName(t, 1000))
	frozen.perBatch = 500
	frozen.start(throughProxy)
	l := startLoad(t, s, s.ws("tracker"), scale(4, 20), nil)
	l.trackers = append(l.trackers, frozen)
	viewer := watchSession(t, s.ws("viewer"), frozen.session)
	for range scale(2, 5) {
		others := &load{t: t, server: s, trackers: l.trackers[:len(l.trackers)-1]}
		proxy.freezeLinks()
		ends := len(viewer.look().notices)
		waitUntil(t, "its session has ended", func() bool {
			notices := viewer.look().notices[ends:]
			return slices.Contains(notices, "session_ended")
		})
		others.progress("a frozen tracker")
		proxy.thaw()
		l.progress("its thaw")
	}
	l.viewers = append(l.viewers, viewer)
	l.finish()
}

func TestFaultReconnectStorm(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	proxy, throughProxy := proxyTo(t, s)
	l := startLoad(t, s, throughProxy, scale(60, 500), func(i int, tr *testTracker) {
		tr.perBatch, tr.pause = 3, scale(300*time.Millisecond, 500*time.Millisecond)
	})
	for range scale(2, 6) {
		proxy.cut()
		took := l.progress("all reconnect at once")
		t.Logf("%d trackers are back after %v", len(l.trackers), took.Round(time.Millisecond))
	}
	l.finish()
}

// ---- sequence numbers ----

func TestFaultSequenceNumbers(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	tr := newTracker(t, sessionName(t, 0)) // says which batches there are
	tr.perBatch = 3
	c := dialServer(t, s.ws("tracker"))
	c.send("session_start", map[string]any{"sessionId": tr.session, "resume": ""})
	if ready := c.expect("session_ready"); ready.Data.LastSeq != 0 || ready.Data.Resume == "" {
		t.Errorf("a new session is ready with %+v", ready.Data)
	}
	sendBatch := func(seq int64) { c.sendRaw(string(tr.batch(seq))) }
	ack := func(want int64) {
		t.Helper()
		for got := int64(0); got < want; {
			if got = c.expect("events_ack").Data.Seq; got > want {
				t.Fatalf("ack of %d, want %d", got, want)
			}
		}
	}
	gap := func(want int64) {
		t.Helper()
		if m := c.expect("error"); m.Data.Code != "sequence_gap" || m.Data.Expected != want {
			t.Errorf("got error %s, expected %d; want sequence_gap, %d", m.Data.Code, m.Data.Expected, want)
		}
	}
	sendBatch(1)
	ack(1)
	sendBatch(1) // again, after its commit
	ack(1)
	sendBatch(3)
	gap(2)
	sendBatch(2)
	sendBatch(2) // again, before its commit
	sendBatch(1)
	sendBatch(3)
	sendBatch(1 << 53) // the largest number that there is
	gap(4)
	ack(3)
	for _, absurd := range []string{"0", "-1", "1.5", "9007199254740993", "9223372036854775808", "18446744073709551617", "1e400", `"1"`, "true", "[4]", "{}"} {
		c.sendRaw(`{"type":"events_batch","data":{"events":[{"type":3,"timestamp":1}],"seq":` + absurd + `}}`)
		m := c.expect("error")
		t.Logf("seq %s: %s", absurd, m.Data.Code)
		sendBatch(3) // what is right goes on
		ack(3)
	}
	sendBatch(4)
	ack(4)
	tr.made, tr.acked = 4, 4
	c.send("session_end", map[string]string{"sessionId": tr.session})
	checkStored(t, s, tr)
}

// Trackers that repeat and leave out batches all the time.
func TestFaultMischief(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	l := startLoad(t, s, s.ws("tracker"), scale(6, 20), func(_ int, tr *testTracker) { tr.mischief = true })
	for range scale(10, 100) {
		l.progress("mischief")
	}
	l.finish()
}

// ---- one session's trouble is its own ----

func TestFaultPoisonSession(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	poisoned := newTracker(t, sessionName(t, 1000))
	execSQL(t, s.database, fmt.Sprintf(`
		create function poison() returns trigger language plpgsql as $$
		begin
			if new.session_id = '%s' then raise exception 'refused by the test' using errcode = '22000'; end if;
			return new;
		end $$;
		create trigger poison before insert on session_events for each row execute function poison()`, poisoned.session))
	l := startLoad(t, s, s.ws("tracker"), scale(6, 30), nil)
	poisoned.start(s.ws("tracker"))
	waitUntil(t, "the poisoned session's tracker hears of it", func() bool { return poisoned.why() != "" })
	if why := poisoned.why(); why != "not_stored" {
		t.Errorf("the tracker got the error %s, want not_stored", why)
	}
	if acked := poisoned.ackedEvents(); acked != 0 {
		t.Errorf("%d events of it are acked", acked)
	}
	l.progress("a poisoned session")
	waitUntil(t, "the rejections log tells of it", func() bool { return strings.Contains(s.log("rejections"), poisoned.session) })
	if refused := s.stat("refusedSessions"); refused != 1 {
		t.Errorf("/stats has %d refused sessions, want 1", refused)
	}
	l.finish()
}

// Somebody holds a lock on one session's row: the others do not wait for it.
func TestFaultSessionLocked(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	held := newTracker(t, sessionName(t, 1000)).start(s.ws("tracker"))
	l := startLoad(t, s, s.ws("tracker"), scale(6, 30), nil)
	waitUntil(t, "it records", func() bool { return held.ackedEvents() > 0 })
	conn := connectSQL(t, s.database)
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), "begin; select from sessions where session_id = '"+held.session+"' for update"); err != nil {
		t.Fatal(err)
	}
	for range scale(2, 10) {
		took := l.progress("a locked row of another session")
		t.Logf("the others go on after %v", took.Round(time.Millisecond))
	}
	if _, err := conn.Exec(context.Background(), "rollback"); err != nil {
		t.Fatal(err)
	}
	l.trackers = append(l.trackers, held)
	l.progress("the end of the lock")
	l.finish()
}

// The connection of a refused session stays, and can begin another.
func TestFaultPoisonThenAnotherSession(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	execSQL(t, s.database, "alter table session_events add constraint poison check (session_id <> 'poison')")
	c := dialServer(t, s.ws("tracker"))
	c.send("session_start", map[string]any{"sessionId": "poison", "resume": ""})
	c.expect("session_ready")
	c.send("events_batch", `{"seq":1,"events":[{"type":3,"timestamp":1}]}`)
	if m := c.expect("error"); m.Data.Code != "not_stored" {
		t.Errorf("got error %s, want not_stored", m.Data.Code)
	}
	tr := newTracker(t, sessionName(t, 1))
	c.send("session_start", map[string]any{"sessionId": tr.session, "resume": ""})
	c.expect("session_ready")
	c.sendRaw(string(tr.batch(1)))
	if m := c.expect("events_ack"); m.Data.Seq != 1 || m.Data.SessionID != tr.session {
		t.Errorf("got ack %+v", m.Data)
	}
	tr.made, tr.acked = 1, 1
	checkStored(t, s, tr)
}

func TestFaultDeletedWhileRecording(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	l := startLoad(t, s, s.ws("tracker"), scale(5, 20), nil)
	deletions := map[string]func(id string){
		"REST": func(id string) {
			if status, body := s.request("DELETE", "/sessions/"+id); status != http.StatusNoContent {
				t.Errorf("DELETE: status %d %s", status, body)
			}
		},
		"SQL": func(id string) {
			execSQL(t, s.database, "delete from sessions where session_id = $1", id)
		},
	}
	for name, remove := range deletions {
		tr := newTracker(t, sessionName(t, 1000)+name)
		tr.start(s.ws("tracker"))
		waitUntil(t, "it records", func() bool { return tr.ackedEvents() > 0 })
		remove(tr.session)
		waitUntil(t, "its tracker hears of it", func() bool { return tr.why() != "" })
		<-tr.done
		if why := tr.why(); why != "session_deleted" {
			t.Errorf("%s: the tracker got the error %s, want session_deleted", name, why)
		}
		l.progress("a deleted session")
		left := querySQL[int](t, s.database, `select (select count(*) from sessions where session_id = $1)
			+ (select count(*) from session_events where session_id = $1)`, tr.session)
		if left != 0 {
			t.Errorf("%s: %d rows are left of the deleted session", name, left)
		}
	}
	l.finish()
}

// The error is followed by a close that says why.
func TestFaultDeletedCloseCode(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	c := dialServer(t, s.ws("tracker"))
	c.send("session_start", map[string]any{"sessionId": "deleted", "resume": ""})
	c.expect("session_ready")
	c.send("events_batch", `{"seq":1,"events":[{"type":3,"timestamp":1}]}`)
	c.expect("events_ack")
	if status, _ := s.request("DELETE", "/sessions/deleted"); status != http.StatusNoContent {
		t.Errorf("DELETE: status %d", status)
	}
	if m := c.expect("error"); m.Data.Code != "session_deleted" {
		t.Errorf("got error %s, want session_deleted", m.Data.Code)
	}
	c.expectClose(4004)
	if status, _ := s.get("/sessions/deleted"); status != http.StatusNotFound {
		t.Errorf("GET of a deleted session: status %d", status)
	}
}

// ---- takeover ----

func TestFaultTakeover(t *testing.T) {
	besideOthers(t)
	s := startServer(t)
	tr := newTracker(t, "mine")
	first := dialServer(t, s.ws("tracker"))
	token := startSession(t, first, "mine", "", "mine").Data.Resume
	first.sendRaw(string(tr.batch(1)))
	first.expect("events_ack")
	for _, wrong := range []any{nil, "", "wrong", token + "x"} {
		startSession(t, dialServer(t, s.ws("tracker")), "mine", wrong, "")
	}
	first.sendRaw(string(tr.batch(2))) // it has noticed nothing
	first.expect("events_ack")

	second := dialServer(t, s.ws("tracker"))
	ready := startSession(t, second, "mine", token, "mine")
	if ready.Data.LastSeq != 2 {
		t.Errorf("lastSeq %d after a takeover, want 2", ready.Data.LastSeq)
	}
	first.expectClose(4001)
	second.sendRaw(string(tr.batch(3)))
	second.expect("events_ack")
	second.send("session_end", map[string]string{"sessionId": "mine"})
	waitUntil(t, "the session has ended", func() bool {
		return !querySQL[bool](t, s.database, "select is_active from sessions where session_id = 'mine'")
	})
	startSession(t, dialServer(t, s.ws("tracker")), "mine", "", "") // ended, and still not anybody's
	third := dialServer(t, s.ws("tracker"))
	if ready := startSession(t, third, "mine", ready.Data.Resume, "mine"); ready.Data.LastSeq != 3 {
		t.Errorf("lastSeq %d after its end, want 3", ready.Data.LastSeq)
	}
	third.sendRaw(string(tr.batch(4)))
	third.expect("events_ack")
	tr.made, tr.acked = 4, 4
	checkStored(t, s, tr)
}

// startSession starts one with a token (nil: without the field) and checks under
// which id it goes on: want, or a new one if want is empty.
func startSession(t testing.TB, c *testConn, id string, token any, want string) (ready testMessage) {
	t.Helper()
	data := map[string]any{"sessionId": id}
	if token != nil {
		data["resume"] = token
	}
	c.send("session_start", data)
	if want == "" {
		if m := c.expect("session_assigned"); m.Data.SessionID == id || m.Data.SessionID == "" {
			t.Errorf("resume %v: was assigned the id %q", token, m.Data.SessionID)
		}
		return ready
	}
	ready = c.expect("session_ready")
	if ready.Data.SessionID != want {
		t.Errorf("resume %v: got session %s, want %s", token, ready.Data.SessionID, want)
	}
	return ready
}

// A tracker of the original protocol comes back within the grace period and
// after it: by its id alone.
func TestFaultReturnWithoutToken(t *testing.T) {
	besideOthers(t)
	s := startServer(t, "SESSION_GRACE_PERIOD=500")
	tr := newTracker(t, "old")
	tr.perBatch, tr.unnumbered = 4, true
	stored := func(events int) {
		t.Helper()
		waitUntil(t, "the events are stored", func() bool {
			return querySQL[int](t, s.database, "select coalesce((select event_count from sessions where session_id = 'old'), 0)") == events
		})
	}
	ended := func() bool {
		return !querySQL[bool](t, s.database, "select is_active from sessions where session_id = 'old'")
	}
	for life := range 3 {
		c := dialServer(t, s.ws("tracker"))
		c.send("session_start", map[string]any{"sessionId": "old", "userId": "u"})
		c.sendRaw(string(tr.batch(int64(life + 1))))
		stored(4 * (life + 1))
		c.CloseNow()
		if life == 1 {
			waitUntil(t, "the grace period is over", ended)
		}
	}
	waitUntil(t, "the session has ended", ended)
	tr.made, tr.acked = 3, 3
	checkStored(t, s, tr)
}

// A viewer does not notice that its tracker reconnects, and does notice when the
// session really ends and comes back.
func TestFaultGracePeriod(t *testing.T) {
	besideOthers(t)
	for _, grace := range []struct {
		setting string
		notices bool
	}{{"60000", false}, {"200", true}} {
		s := startServer(t, "SESSION_GRACE_PERIOD="+grace.setting)
		proxy, throughProxy := proxyTo(t, s)
		tr := newTracker(t, sessionName(t, 0)).start(throughProxy)
		waitUntil(t, "it records", func() bool { return tr.ackedEvents() > 0 })
		viewer := watchSession(t, s.ws("viewer"), tr.session)
		begun := len(viewer.look().notices)
		if grace.notices {
			proxy.freeze() // and new connections too
			tr.drop()
			proxy.cut()
			waitUntil(t, "the session ends", func() bool { return slices.Contains(viewer.look().notices[begun:], "session_ended") })
			proxy.thaw()
			waitUntil(t, "the session comes back", func() bool { return slices.Contains(viewer.look().notices[begun:], "session_started") })
		} else {
			tr.drop()
			waitUntil(t, "it is back", tr.isBack)
		}
		l := &load{t: t, server: s, trackers: []*testTracker{tr}}
		l.progress("its return")
		tr.finish()
		viewer.waitFor(tr.madeEvents())
		if notices := viewer.look().notices[begun:]; !grace.notices && len(notices) > 0 {
			t.Errorf("the viewer was told %v of a session that only reconnected", notices)
		}
		checkStored(t, s, tr)
	}
}

// Two servers on one database, and sessions that move between them, their old
// connections half-open as often as not.
func TestFaultTwoServers(t *testing.T) {
	besideOthers(t)
	first := startServer(t)
	second := startServer(t, "DATABASE_URL="+first.database)
	proxies := make([]*testProxy, 2)
	addresses := make([]string, 2)
	for i, s := range []*serverProcess{first, second} {
		proxies[i], addresses[i] = proxyTo(t, s)
	}
	l := startLoad(t, first, addresses[0], scale(6, 30), nil)
	l.viewers = append(l.viewers, watchSession(t, second.ws("viewer"), l.trackers[0].session))
	for i := range scale(6, 40) {
		if rand.IntN(2) == 0 {
			proxies[i%2].freezeLinks()
		}
		for _, tr := range l.trackers {
			tr.moveTo(addresses[(i+1)%2])
		}
		l.progress("a move to the other server")
		proxies[i%2].thaw() // what was on its way arrives late
	}
	l.viewers = nil // who watches on a server that has lost the session sees no more of it
	l.finish()
	checkStored(t, second, l.trackers...)
}

// ---- memory, and viewers that do not read ----

// PostgreSQL does not answer, and 200 trackers send as fast as they can.
func TestFaultMemoryBound(t *testing.T) {
	buffer := scale(int64(8<<20), int64(256<<20))
	database := testDatabase(t)
	proxy, through := proxyToDatabase(t, database, nil)
	s := startServer(t, "DATABASE_URL="+through, fmt.Sprintf("MAX_BUFFER_BYTES=%d", buffer), "MAX_MESSAGE_BYTES=1048576")
	s.database = database
	var trackers []*testTracker
	for i := range 200 {
		tr := newTracker(t, sessionName(t, i))
		tr.perBatch, tr.window, tr.pause = 100, math.MaxInt, 0
		tr.limit = 1
		trackers = append(trackers, tr.start(s.ws("tracker")))
	}
	for _, tr := range trackers {
		waitUntil(t, "it has begun", func() bool { return tr.read(&tr.acked) == 1 })
	}
	proxy.freeze()
	before := s.metric("received_bytes_total")
	for _, tr := range trackers {
		tr.allow(2 + 2*buffer/200/int64(len(tr.batch(1)))) // more than twice the buffer in all
	}
	waitUntil(t, "the buffer is full", func() bool { return s.metric("buffer_bytes") > buffer*3/4 })
	time.Sleep(scale(0, 15*time.Second))
	waitUntil(t, "/health says 503", func() bool { status, _ := s.get("/health"); return status == http.StatusServiceUnavailable })
	during, taken := s.peakMemory(), s.metric("received_bytes_total")-before
	if taken > buffer+1<<20 { // one message may go beyond
		t.Errorf("%d KB were taken while nothing could be stored, the buffer is %d KB", taken>>10, buffer>>10)
	}
	proxy.thaw()
	for _, tr := range trackers {
		tr.finish()
	}
	peak := s.peakMemory()
	t.Logf("peak resident memory: %d MB while frozen, %d MB in all, MAX_BUFFER_BYTES %d MB", during>>20, peak>>20, buffer>>20)
	if limit := buffer*3/2 + 100<<20; peak > limit && os.Getenv("TEST_SERVER_RACE") == "" {
		t.Errorf("peak resident memory %d MB, the limit is %d MB", peak>>20, limit>>20)
	}
	checkStored(t, s, trackers...)
}

// Viewers that never read cost a bounded queue, and delay nobody.
func TestFaultViewerNeverReads(t *testing.T) {
	s := startServer(t, "BATCH_INTERVAL=300")
	trackers := make([]*testTracker, scale(1, 2))
	sent := make([]sync.Map, len(trackers)) // batch → when it was sent
	var latencies latencyList
	for i := range trackers {
		tr := newTracker(t, sessionName(t, i))
		tr.perBatch, tr.pause, tr.window = 2, 500*time.Microsecond, 1000
		tr.sending = func(seq int64) { sent[i].Store(seq, time.Now()) }
		trackers[i] = tr.start(s.ws("tracker"))
		waitUntil(t, "it records", func() bool { return tr.ackedEvents() > 0 })
		v, err := openViewer(t, http.DefaultClient, s.ws("viewer"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(v.close)
		v.saw = func(from, _ int) {
			if at, ok := sent[i].Load(int64(from/tr.perBatch + 1)); ok {
				latencies.add(time.Since(at.(time.Time)))
			}
		}
		v.follow(tr.session)
	}
	measure := func(what string) (perSecond float64, worst time.Duration) {
		latencies.take()
		before, began := ackedBy(trackers), time.Now()
		time.Sleep(scale(time.Second, 5*time.Second))
		perSecond = float64(ackedBy(trackers)-before) / time.Since(began).Seconds()
		median, worst := percentiles(latencies.take())
		t.Logf("%s: %.0f events/s acked, live latency median %v, 99th percentile %v, peak memory %d MB",
			what, perSecond, median.Round(time.Microsecond), worst.Round(time.Microsecond), s.peakMemory()>>20)
		return perSecond, worst
	}
	rate, worst := measure("without")
	memory := s.peakMemory()
	silent := make([]*testViewer, scale(3, 20))
	waken := make([]func(), len(silent))
	for i := range silent {
		silent[i], waken[i] = silentViewer(t, s.ws("viewer"), trackers[i%len(trackers)].session)
	}
	rateWith, worstWith := measure(fmt.Sprintf("with %d viewers that do not read", len(silent)))
	if rateWith < rate/4 { // the machine does other things too
		t.Errorf("viewers that do not read slow the trackers from %.0f to %.0f events/s", rate, rateWith)
	}
	if worstWith > 10*worst+time.Second {
		t.Errorf("viewers that do not read delay the others from %v to %v", worst, worstWith)
	}
	waitUntil(t, "their queues are full", func() bool { return s.metric("viewers_lagged_total") >= int64(len(silent)) })
	if grown := s.peakMemory() - memory; grown > int64(len(silent))*5<<20+50<<20 {
		t.Errorf("%d viewers that do not read cost %d MB", len(silent), grown>>20)
	}
	for _, wake := range waken { // they come back, and see everything
		wake()
	}
	for _, tr := range trackers {
		tr.finish()
	}
	lagged := 0
	for i, v := range silent {
		v.waitFor(trackers[i%len(trackers)].madeEvents())
		lagged += min(1, v.look().lagged)
	}
	t.Logf("%d of %d were told session_lagged", lagged, len(silent))
	if lagged == 0 {
		t.Error("nobody was told session_lagged")
	}
	checkStored(t, s, trackers...)
}

// narrow makes connections that the kernel buffers little for: what their peer
// sends and they do not read stays with it.
var narrow = &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{
	Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
	},
}).DialContext}}

// silentViewer has joined a session and reads nothing more, until the test wakes
// it.
func silentViewer(t testing.TB, address, session string) (v *testViewer, wake func()) {
	t.Helper()
	v = watchWith(t, narrow, address, session)
	v.reading.Lock()
	wake = sync.OnceFunc(v.reading.Unlock)
	t.Cleanup(wake)
	return v, wake
}

func ackedBy(trackers []*testTracker) (events int) {
	for _, tr := range trackers {
		events += tr.ackedEvents()
	}
	return events
}

type latencyList struct {
	mu  sync.Mutex
	all []time.Duration
}

func (l *latencyList) add(d time.Duration) {
	l.mu.Lock()
	l.all = append(l.all, d)
	l.mu.Unlock()
}

func (l *latencyList) take() []time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.all
	l.all = nil
	return all
}

func percentiles(all []time.Duration) (median, worst time.Duration) {
	if len(all) == 0 {
		return 0, 0
	}
	slices.Sort(all)
	return all[len(all)/2], all[len(all)*99/100]
}
