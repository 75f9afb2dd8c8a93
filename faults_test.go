package main

// What is acknowledged is stored, once, whatever breaks: the server, PostgreSQL,
// the network between, a client. Trackers record while viewers come and go,
// something breaks, recording goes on, and the final check of harness_test.go
// ends it.

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nhooyr.io/websocket"
)

// fullFaults: go test runs the fault tests with small numbers, make test-faults the
// same tests with large ones.
var fullFaults = os.Getenv("TEST_FAULTS") == "full"

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

// load is a server with trackers that record, viewers that watch some of them
// from the first event to the last, and viewers that come and go.
type load struct {
	t        *testing.T
	server   *testServer
	pg       *testPostgres // the server's own, if there is one
	toDB     *testProxy    // between server and PostgreSQL
	toServer *testProxy    // between trackers and server
	address  string        // of the latter
	trackers []*testTracker
	viewers  []*testViewer
	seen     atomic.Int64 // events that the viewers who come and go have checked
	goHome   context.CancelFunc
	visits   sync.WaitGroup
}

// newLoad starts a server between two proxies.
func newLoad(t *testing.T, own bool, env ...string) *load {
	t.Helper()
	l := &load{t: t, goHome: func() {}}
	database := ""
	if own {
		l.pg = ownPostgres(t)
		database = databaseIn(t, l.pg.url)
	} else {
		database = testDatabase(t)
	}
	var through string
	l.toDB, through = proxyToDatabase(t, database, &thief{})
	l.server = newServer(t, append([]string{"DATABASE_URL=" + through}, env...)...)
	l.server.database = database
	l.toServer, l.address = proxyTo(t, l.server)
	return l
}

// tracker is one that is not started yet.
func (l *load) tracker(i int) *testTracker { return newTracker(l.t, sessionName(l.t, i)) }

// record starts the server and some trackers. change may set up each before it
// starts.
func (l *load) record(trackers int, change func(i int, tr *testTracker)) {
	l.t.Helper()
	l.server.start()
	l.server.waitHealthy()
	for i := range trackers {
		tr := l.tracker(i)
		tr.perBatch, tr.window, tr.pause = 1+rand.IntN(25), 1+rand.IntN(16),
			time.Duration(10+rand.IntN(30))*time.Millisecond
		if change != nil {
			change(i, tr)
		}
		l.trackers = append(l.trackers, tr.start(l.address))
	}
	l.progress("the first acks")
	for i := 0; i < trackers; i += 1 + trackers/4 {
		l.watch(l.trackers[i])
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.goHome = cancel
	trackersNow := slices.Clone(l.trackers)
	for range 3 {
		l.visits.Go(func() { l.comeAndGo(ctx, trackersNow) }) // ends at finish, or with the test:
	}
	l.t.Cleanup(func() { cancel(); l.visits.Wait() })
}

func (l *load) watch(tr *testTracker) *testViewer {
	v := watchSession(l.t, l.server.ws("viewer"), tr.session)
	l.viewers = append(l.viewers, v)
	return v
}

// comeAndGo watches trackers for moments at a time, until ctx ends.
func (l *load) comeAndGo(ctx context.Context, trackers []*testTracker) {
	for ctx.Err() == nil {
		linger(ctx, 50)
		v, err := openViewer(l.t, &net.Dialer{}, l.server.ws("viewer"))
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

// linger lets at most so many milliseconds pass: a fault comes at any moment.
func linger(ctx context.Context, milliseconds int) {
	select {
	case <-time.After(time.Duration(rand.IntN(milliseconds)) * time.Millisecond):
	case <-ctx.Done():
	}
}

// progress waits until every tracker has been acked something that it had not
// sent before.
func (l *load) progress(after string) {
	l.t.Helper()
	began := time.Now()
	goals := make([]int64, len(l.trackers))
	for i, tr := range l.trackers {
		goals[i] = tr.read(&tr.made)
	}
	for i, tr := range l.trackers {
		waitUntil(l.t, fmt.Sprintf("%s goes on after: %s", tr.session, after), func() bool {
			return tr.read(&tr.acked) > goals[i] || tr.why() != ""
		})
	}
	took := time.Since(began)
	l.t.Logf("%s: recording goes on after %v", after, took.Round(time.Millisecond))
	if fullFaults && took > 5*time.Second && len(l.trackers) < 100 {
		l.t.Errorf("%s: recording went on after %v, the limit is 5 s", after, took)
	}
}

// failing waits until PostgreSQL has failed the server once more.
func (l *load) failing(how func() (mend func())) (mend func()) {
	l.t.Helper()
	before := l.server.metric("database_errors_total")
	mend = how()
	waitUntil(l.t, "the server notices", func() bool { return l.server.metric("database_errors_total") > before })
	return mend
}

// pending waits until nothing was stored for a while.
func (l *load) pending(seconds int64) {
	l.t.Helper()
	waitUntil(l.t, "events wait", func() bool { return l.server.metric("oldest_pending_seconds") >= seconds })
}

// finish ends the load: all that was made is acked and stored, and the viewers
// have seen it.
func (l *load) finish() {
	l.t.Helper()
	for _, tr := range l.trackers {
		tr.stop()
	}
	made := map[string]int{}
	var reconnects int
	var resent int64
	for _, tr := range l.trackers {
		tr.finish()
		made[tr.session] = tr.madeEvents()
		resent += tr.resent
		reconnects += tr.reconnects - 1
		for code, times := range tr.errors {
			if code != "unavailable" && !(code == "sequence_gap" && tr.mischief) {
				l.t.Errorf("%s got %d times the error %s", tr.session, times, code)
			}
		}
	}
	for _, v := range l.viewers {
		v.waitFor(made[v.session])
		l.seen.Add(int64(v.look().events))
	}
	l.goHome()
	l.visits.Wait()
	if l.seen.Load() == 0 {
		l.t.Error("the viewers have seen nothing")
	}
	checkStored(l.t, l.server, l.trackers...)
	l.t.Logf("%d trackers, %d reconnects, %d batches sent again, %d events seen by viewers",
		len(l.trackers), reconnects, resent, l.seen.Load())
}

// ---- faults while trackers record ----

// fault breaks something, in several ways or several times, and mends it; after
// each of them recording goes on.
type fault struct {
	name             string
	own              bool // PostgreSQL is this test's own
	env              []string
	quick, full      int // trackers
	times, fullTimes int
	change           func(i int, tr *testTracker)
	ways             []way
	after            func(*load) // checks beside the final one
}

type way struct {
	name string
	do   func(*load)
}

var faults = []fault{
	{name: "server killed", quick: 8, full: 40, times: 3, fullTimes: 20, ways: []way{{"kill -9", func(l *load) {
		linger(l.t.Context(), 400)
		l.server.restart()
	}}}},
	{name: "server terminated", quick: 6, full: 30, times: 2, fullTimes: 8, ways: []way{{"SIGTERM", terminated}},
		after: goneAway},
	{name: "PostgreSQL ends", own: true, quick: 6, full: 30, times: 1, fullTimes: 1, ways: []way{
		{"fast restart", func(l *load) { l.pg.kill(l.t, syscall.SIGINT); l.restartPostgres() }},
		{"immediate restart", func(l *load) { l.pg.kill(l.t, syscall.SIGQUIT); l.restartPostgres() }},
		{"kill -9 of a backend", backendKilled},
		{"kill -9 of the postmaster", func(l *load) { l.pg.kill(l.t, syscall.SIGKILL); l.restartPostgres() }},
		{"frozen", func(l *load) {
			l.pg.freeze(l.t)
			defer l.pg.thaw(l.t)
			l.pending(scale[int64](1, 10))
		}},
		{"down", func(l *load) {
			l.pg.kill(l.t, syscall.SIGINT)
			l.server.waitUnhealthy()
			l.pending(scale[int64](1, 20))
			l.restartPostgres()
		}},
	}},
	// PostgreSQL works, but refuses: everything is kept and goes out when it does no more.
	{name: "PostgreSQL refuses", quick: 5, full: 20, times: 1, fullTimes: 2, ways: []way{
		{"admin shutdown", refusing("57P01")},
		{"serialization failure", refusing("40001")},
		{"disk full", refusing("53100")},
		{"cancelled, as by a timeout", refusing("57014")},
		{"a standby", refusing("25006")},
		{"an internal error", refusing("XX000")},
		{"read-only, the old connections ended", func(l *load) {
			l.failing(func() (mend func()) { return readOnly(l) })()
		}},
		{"a locked table", func(l *load) {
			l.failing(func() func() {
				return holdSQL(l.t, l.server.database, "lock table sessions in access exclusive mode")
			})()
		}},
	}, after: func(l *load) {
		if n := l.server.stat("refusedSessions"); n != 0 {
			l.t.Errorf("%d sessions count as refused, want 0: nothing was wrong with their data", n)
		}
	}},
	// A commit succeeds and its answer is lost: the batch is written again, and stored once.
	{name: "a commit's answer is lost", quick: 5, full: 20, times: 5, fullTimes: 40, ways: []way{{"a lost answer",
		func(l *load) {
			th := l.toDB.thief
			stolen := th.stolen.Load()
			th.armed.Store(1)
			waitUntil(l.t, "an answer is lost", func() bool { return th.stolen.Load() > stolen })
		}}}},
	{name: "the network to PostgreSQL", quick: 5, full: 20, times: 3, fullTimes: 20, ways: []way{
		{"a cut", func(l *load) { l.toDB.cutInside(20000) }},
		{"frozen", func(l *load) {
			l.toDB.freeze()
			l.pending(1)
			l.toDB.thaw()
		}},
	}, after: func(l *load) {
		stopWithoutDatabase(l)
		l.toDB.spare() // idle connections would be cut while what is stored is asked for
	}},
	{name: "the network to the trackers", env: []string{"HEARTBEAT_INTERVAL=1000"}, quick: 8, full: 40, times: 2,
		fullTimes: 10,
		change:    func(i int, tr *testTracker) { tr.mischief = i%2 == 0 },
		ways: []way{
			{"a cut in the middle of a frame", func(l *load) {
				l.toServer.cutInside(5000)
				waitUntil(l.t, "all links are new", l.toServer.isWhole)
			}},
			{"half-open connections", func(l *load) { // the server does not learn that the trackers leave them
				l.toServer.freezeLinks()
				for _, tr := range l.trackers {
					tr.drop()
				}
				l.progress("new connections beside them")
				l.toServer.thaw() // what was on its way arrives late
			}},
		}, after: func(l *load) {
			waitUntil(l.t, "the dead connections are gone",
				func() bool { return l.server.stat("trackers") == int64(len(l.trackers)) })
		}},
	{name: "all reconnect at once", quick: 60, full: 500, times: 2, fullTimes: 6, ways: []way{{"a cut",
		func(l *load) { l.toServer.cut() }}},
		change: func(_ int, tr *testTracker) { tr.perBatch, tr.pause = 3, 300*time.Millisecond }},
	{name: "a tracker freezes in a frame", env: []string{"HEARTBEAT_INTERVAL=2000", "MESSAGE_TIMEOUT=2000",
		"SESSION_GRACE_PERIOD=300"},
		quick: 4, full: 20, times: 1, fullTimes: 5, ways: []way{{"its thaw", trackerFrozen}}},
	// Somebody holds a lock on one session's row: the others do not wait for it.
	{name: "a session is locked", quick: 6, full: 30, times: 1, fullTimes: 1, ways: []way{{"the end of the lock",
		func(l *load) {
			held := l.tracker(1000).start(l.address)
			waitUntil(l.t, "it records", func() bool { return held.ackedEvents() > 0 })
			letGo := holdSQL(l.t, l.server.database,
				"select from sessions where session_id = '"+held.session+"' for update")
			for range scale(2, 10) {
				l.progress("a locked row of another session")
			}
			letGo()
			l.trackers = append(l.trackers, held)
		}}}},
	// PostgreSQL does not answer, and the trackers send as fast as they can.
	{name: "there is no room left", quick: 4, full: 200, times: 1, fullTimes: 3, ways: []way{{"no room", noRoomLeft}},
		env:    []string{"MAX_BUFFER_BYTES=2097152", "MAX_MESSAGE_BYTES=1000000"},
		change: func(_ int, tr *testTracker) { tr.perBatch, tr.window, tr.pause = 100, 50, 20*time.Millisecond },
		after:  func(l *load) { l.server.checkMemory() }},
	// Nothing closes their connections: a server that waited for them would wait for ever.
	{name: "viewers do not read", env: []string{"HEARTBEAT_INTERVAL=3600000"}, quick: 1, full: 2, times: 1,
		fullTimes: 1,
		change:    func(_ int, tr *testTracker) { tr.perBatch, tr.pause, tr.window = 50, 5*time.Millisecond, 1000 },
		ways:      []way{{"viewers that did not read", viewersSilent}}},
	{name: "sessions move between two servers", quick: 6, full: 30, times: 1, fullTimes: 1, ways: []way{{"moves",
		movedAbout}}},
}

func TestFaults(t *testing.T) {
	besideOthers(t)
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			besideOthers(t)
			l := newLoad(t, f.own, f.env...)
			l.record(scale(f.quick, f.full), f.change)
			for range scale(f.times, f.fullTimes) {
				for _, way := range f.ways {
					way.do(l)
					l.progress(way.name)
				}
			}
			if f.after != nil {
				f.after(l)
			}
			l.finish()
		})
	}
}

func (l *load) restartPostgres() {
	l.t.Helper()
	if err := l.pg.start(); err != nil {
		l.t.Fatal(err)
	}
}

// terminated: what viewers saw is stored before the server has ended.
func terminated(l *load) {
	linger(l.t.Context(), 300)
	breaks := len(l.viewers[0].look().breaks)
	if code, out := l.server.term(); code != 0 {
		l.t.Fatalf("exit code %d after SIGTERM:\n%s", code, out)
	}
	waitUntil(l.t, "the viewers' connections end", func() bool { return len(l.viewers[0].look().breaks) > breaks })
	for _, v := range l.viewers {
		stored := querySQL[int](l.t, l.server.database, "select event_count from sessions where session_id = $1",
			v.session)
		if seen := v.look().next; seen > stored {
			l.t.Errorf("%s: viewers saw %d events, %d are stored after SIGTERM", v.session, seen, stored)
		}
	}
	l.server.start()
	l.server.waitHealthy()
}

func goneAway(l *load) {
	for _, v := range l.viewers {
		for _, err := range v.look().breaks {
			if websocket.CloseStatus(err) != websocket.StatusGoingAway {
				l.t.Errorf("a viewer's connection ended with %v, want close code 1001", err)
			}
		}
	}
}

// backendKilled kills one of the server's connections; PostgreSQL then ends them
// all and recovers.
func backendKilled(l *load) {
	pid := querySQL[int](l.t, l.pg.url, `select pid from pg_stat_activity
		where datname = $1 and backend_type = 'client backend' order by random() limit 1`,
		databaseName(l.t, l.server.database))
	syscall.Kill(pid, syscall.SIGKILL)
	waitUntil(l.t, "PostgreSQL has recovered", func() bool { return l.pg.start() == nil })
}

// refusing makes every chunk fail with an SQLSTATE for a while.
func refusing(code string) func(*load) {
	return func(l *load) {
		l.failing(func() func() {
			execSQL(l.t, l.server.database, fmt.Sprintf(`
				create or replace function refuse() returns trigger language plpgsql as
				$$ begin raise exception 'refused by the test' using errcode = '%s'; end $$;
				create trigger refuse before insert on session_events for each row execute function refuse()`, code))
			return func() { execSQL(l.t, l.server.database, "drop trigger refuse on session_events") }
		})()
	}
}

// readOnly is as when a standby has taken over the address, until it is undone.
func readOnly(l *load) (undo func()) {
	cluster, _ := sharedDatabase()
	name := databaseName(l.t, l.server.database)
	execSQL(l.t, cluster, "alter database "+name+" set default_transaction_read_only = on")
	execSQL(l.t, cluster, "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
	return func() { execSQL(l.t, cluster, "alter database "+name+" set default_transaction_read_only = off") }
}

// stopWithoutDatabase: what is not committed cannot be; the server says so and
// stops in time, and the trackers still have it. It takes 18 seconds.
func stopWithoutDatabase(l *load) {
	if !fullFaults {
		return
	}
	l.toDB.freeze()
	l.pending(1)
	if code, out := l.server.term(); code == 0 {
		l.t.Errorf("exit code 0 without PostgreSQL:\n%s", out)
	}
	l.toDB.thaw()
	l.server.start()
	l.server.waitHealthy()
	l.progress("a stop without PostgreSQL")
}

// trackerFrozen: a tracker freezes in the middle of a frame, longer than
// heartbeats and the grace period last. The others do not notice, and it goes on
// where it was.
func trackerFrozen(l *load) {
	proxy, address := proxyTo(l.t, l.server)
	others := &load{t: l.t, server: l.server, trackers: l.trackers}
	frozen := l.tracker(1000 + len(l.trackers))
	frozen.perBatch = 500
	l.trackers = append(slices.Clone(l.trackers), frozen.start(address))
	waitUntil(l.t, "it records", func() bool { return frozen.ackedEvents() > 0 })
	l.watch(frozen)
	proxy.freezeLinks()
	waitUntil(l.t, "its session has ended", func() bool { return !l.server.session(frozen.session).IsActive })
	others.progress("a frozen tracker")
	proxy.thaw()
}

// movedAbout: two servers on one database, and sessions that move between them,
// their old connections half-open as often as not.
func movedAbout(l *load) {
	second := startServer(l.t, "DATABASE_URL="+l.server.database)
	proxy, address := proxyTo(l.t, second)
	proxies, addresses := []*testProxy{l.toServer, proxy}, []string{l.address, address}
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
}

// noRoomLeft: what is taken while nothing can be stored is bounded. Viewers watch
// what is in memory all the same.
func noRoomLeft(l *load) {
	s, buffer := l.server, int64(2097152)
	l.toDB.freeze()
	defer l.toDB.thaw()
	before := s.metric("received_bytes_total")
	waitUntil(l.t, "the buffer is full", func() bool { return s.metric("buffer_bytes") > buffer*3/4 })
	l.watch(l.trackers[0])
	l.pending(scale[int64](1, 15))
	if taken := s.metric("received_bytes_total") - before; taken > buffer+1<<20 { // one message may go beyond
		l.t.Errorf("%d KB were taken while nothing could be stored, the buffer is %d KB", taken>>10, buffer>>10)
	}
}

// viewersSilent: viewers that never read cost a bounded queue, and delay nobody;
// when they come back, they see everything.
func viewersSilent(l *load) {
	l.goHome() // visitors read all that is sent
	memory := l.server.peakMemory()
	silent := make([]*testViewer, scale(3, 20))
	wake := make([]func(), len(silent))
	for i := range silent {
		v, err := openViewer(l.t, narrow, l.server.ws("viewer"))
		if err != nil {
			l.t.Fatal(err)
		}
		l.t.Cleanup(v.close)
		v.follow(l.trackers[i%len(l.trackers)].session)
		v.reading.Lock()
		silent[i], wake[i] = v, sync.OnceFunc(v.reading.Unlock)
		l.t.Cleanup(wake[i])
	}
	const more = 25_000 // events, about 9 MB: what an outbox and the kernel hold is less
	for i, tr := range l.trackers {
		l.viewers[i].waitFor(tr.madeEvents() + more)
	}
	if n := l.server.metric("viewers_lagged_total"); n < int64(len(silent)) {
		l.t.Errorf("%d viewers do not read, %d had no room", len(silent), n)
	}
	l.progress("viewers that do not read")
	if grown := l.server.peakMemory() - memory; grown > int64(len(silent))*5<<20+50<<20 {
		l.t.Errorf("%d viewers that do not read cost %d MB", len(silent), grown>>20)
	}
	for i, v := range silent {
		wake[i]()
		waitUntil(l.t, "it is told session_lagged", func() bool { return v.look().lagged > 0 })
	}
	l.viewers = append(l.viewers, silent...)
}
