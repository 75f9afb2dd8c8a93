package main

// What the tests stand on, beside PostgreSQL (postgres_test.go): the
// server (in a process of its own or inside the tests'), the one way to wait, and
// the final check that every event is stored once, at its place, as the bytes
// that were sent. Trackers and viewers are in client_test.go.

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// patience bounds every wait for something that normally takes milliseconds:
// far above what a busy machine needs, so that only a real fault reaches it.
// TEST_PATIENCE, in seconds, is for who knows that there is one.
var patience = func() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("TEST_PATIENCE") + "s"); err == nil {
		return d
	}
	return 5 * time.Minute
}()

func TestMain(m *testing.M) {
	time.Local = time.FixedZone("", 5400) // what says that it is UTC has to be
	code := m.Run()
	if testShared.cluster != nil {
		testShared.cluster.end()
	}
	if testShared.binary != "" {
		os.RemoveAll(filepath.Dir(testShared.binary))
	}
	if n := &testTotals; n.acked.Load() > 0 {
		fmt.Printf("events: %d acked, %d stored, %d lost, %d doubled\n", n.acked.Load(), n.stored.Load(), n.lost.Load(),
			n.doubled.Load())
	}
	os.Exit(code)
}

// testShared is what all tests share and TestMain ends.
var testShared struct {
	cluster *testPostgres
	binary  string
}

// testTotals adds up the final checks of all tests.
var testTotals struct{ acked, stored, lost, doubled atomic.Int64 }

// waitUntil waits for an event by asking for it, and fails the test when it does
// not come.
func waitUntil(t testing.TB, what string, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !happened(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", patience, what)
		}
	}
}

// ---- the server ----

// serverBinary builds the server once. It is a plain build also under go test
// -race: the race detector would make it several times slower and larger, and
// the limits on time and memory would say nothing. The tests that run the server
// inside the test process have it under the race detector; TEST_SERVER_RACE=1
// builds it in here too, and a race that it reports fails the test.
var serverBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "session-replay-bin-")
	if err != nil {
		return "", err
	}
	testShared.binary = filepath.Join(dir, "session-replay")
	args := []string{"build", "-buildvcs=false", "-o", testShared.binary, "."}
	if os.Getenv("TEST_SERVER_RACE") != "" {
		args = []string{"build", "-buildvcs=false", "-race", "-o", testShared.binary, "."}
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return testShared.binary, nil
})

// testServer is the server: as its users run it, in a process that can be killed
// and started again at the same address, or inside the test process, where the
// race detector sees it and tests see its parts.
type testServer struct {
	t        testing.TB
	env      []string
	dir      string // its working directory; logs are in dir/logs
	port     string
	url      string // http://127.0.0.1:port
	database string
	output   lockedBuffer // stdout and stderr of all its lives

	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended

	server *server      // nil when it is a process
	stop   func() error // stops the one inside as SIGTERM does; what run has returned
}

// startServer starts the server in a process and waits until it is healthy. env
// are settings like "BATCH_SIZE=10"; without a DATABASE_URL it has a fresh
// database. Nothing else comes from the environment of the tests.
func startServer(t testing.TB, env ...string) *testServer {
	t.Helper()
	s := newServer(t, env...)
	s.start()
	s.waitHealthy()
	return s
}

// startInside is startServer inside the test process.
func startInside(t testing.TB, env ...string) *testServer {
	t.Helper()
	s := launchInside(t, env...)
	s.waitHealthy()
	return s
}

// launchInside is startInside that does not wait for the database.
func launchInside(t testing.TB, env ...string) *testServer {
	t.Helper()
	s := newServer(t, append([]string{"LOG_LEVEL=debug", "DB_MAX_CONNECTIONS=6", "BATCH_INTERVAL=20"}, env...)...)
	s.startInside()
	waitUntil(t, "the server listens", func() bool { status, _ := s.get("/health"); return status != 0 })
	return s
}

// newServer prepares what startServer and startInside start.
func newServer(t testing.TB, env ...string) *testServer {
	t.Helper()
	s := &testServer{t: t, dir: t.TempDir(), port: freePort(t)}
	s.url = "http://127.0.0.1:" + s.port
	for _, setting := range env {
		if value, ok := strings.CutPrefix(setting, "DATABASE_URL="); ok {
			s.database = value
		}
	}
	if s.database == "" {
		s.database = testDatabase(t)
	}
	s.env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "TZ=UTC", "GOTRACEBACK=all",
		"HOST=127.0.0.1", "PORT=" + s.port, "LOG_DIR=" + filepath.Join(s.dir, "logs"),
		"DATABASE_URL=" + s.database, "DB_MAX_CONNECTIONS=8", "BATCH_INTERVAL=50",
		"HEARTBEAT_INTERVAL=1h", "MESSAGE_TIMEOUT=1h", "DB_CONNECTION_TIMEOUT=1m", // a busy machine may be late
	}, env...) // of two settings with one name the later counts
	t.Cleanup(s.cleanUp)
	return s
}

// freePort finds a port that no test was given before, below those that outgoing connections are
// given (32768 and up): a server that restarts must find its port free again.
func freePort(t testing.TB) string {
	t.Helper()
	for range 1000 {
		port := strconv.Itoa(12000 + rand.IntN(20000))
		if listener, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			listener.Close()
			if _, given := givenPorts.LoadOrStore(port, true); !given {
				return port
			}
		}
	}
	t.Fatal("no free port")
	return ""
}

var givenPorts sync.Map

func (s *testServer) start() {
	s.t.Helper()
	binary, err := serverBinary()
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Env, cmd.Dir = s.env, s.dir
	cmd.Stdout, cmd.Stderr = &s.output, &s.output
	if err := cmd.Start(); err != nil {
		s.t.Fatalf("start the server: %v", err)
	}
	exited := make(chan struct{})
	go func() { // ends with the process
		cmd.Wait()
		close(exited)
	}()
	s.cmd, s.exited = cmd, exited
}

func (s *testServer) startInside() {
	s.t.Helper()
	cfg := mustLoad(s.t, s.env...)
	logs := openLogs(cfg.log, &s.output, &s.output, false)
	var err error
	if s.server, err = assemble(cfg, logs); err != nil {
		s.t.Fatalf("assemble: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.server.run(ctx) }() // ends at stop
	s.stop = sync.OnceValue(func() error {
		cancel()
		err := <-ended
		s.server.store.close()
		logs.Close()
		return err
	})
}

// restart kills the server with SIGKILL and starts it again.
func (s *testServer) restart() {
	s.t.Helper()
	s.kill9()
	s.start()
	s.waitHealthy()
}

func (s *testServer) kill9() {
	s.cmd.Process.Kill()
	<-s.exited
}

// term asks the server to stop and returns its exit code and all it printed.
func (s *testServer) term() (code int, output string) {
	s.t.Helper()
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.cmd.Process.Signal(syscall.SIGQUIT) // prints where it hangs
		<-s.exited
		s.t.Errorf("the server did not stop within %v of SIGTERM", patience)
	}
	return s.cmd.ProcessState.ExitCode(), s.output.String()
}

func (s *testServer) running() bool {
	select {
	case <-s.exited: // nil, and never ready, for the one inside
		return false
	default:
		return true
	}
}

func (s *testServer) waitHealthy() {
	s.t.Helper()
	waitUntil(s.t, "the server is healthy", func() bool {
		if !s.running() {
			s.t.Fatalf("the server has ended:\n%s", s.output.tail())
		}
		status, _ := s.get("/health")
		return status == http.StatusOK
	})
}

// waitUnhealthy waits until the server has noticed that PostgreSQL is away.
func (s *testServer) waitUnhealthy() {
	s.t.Helper()
	waitUntil(s.t, "/health says 503", func() bool {
		status, _ := s.get("/health")
		return status == http.StatusServiceUnavailable
	})
}

func (s *testServer) cleanUp() {
	if s.t.Failed() {
		s.t.Logf("the server's last words:\n%s", s.output.tail())
	}
	if s.cmd != nil {
		s.kill9()
	}
	if s.stop != nil {
		s.stop()
	}
	if out := s.output.String(); strings.Contains(out, "DATA RACE") || strings.Contains(out, "\npanic:") {
		s.t.Errorf("race or panic in the server:\n%s", out)
	}
	if panics := s.log("exceptions"); panics != "" {
		s.t.Errorf("the server's exceptions log: %s", panics)
	}
}

// log returns the content of the log files of one kind (application, error,
// exceptions, rejections).
func (s *testServer) log(kind string) string {
	var all strings.Builder
	files, _ := filepath.Glob(filepath.Join(s.dir, "logs", kind+"-*"))
	for _, file := range files {
		content, _ := os.ReadFile(file)
		all.Write(content)
	}
	return all.String()
}

// ws is the address of the WebSocket, for "tracker" or "viewer".
func (s *testServer) ws(kind string) string {
	return "ws://127.0.0.1:" + s.port + "/ws?type=" + kind
}

func (s *testServer) get(path string) (status int, body []byte) {
	return s.request("GET", path)
}

func (s *testServer) request(method, path string) (status int, body []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, method, s.url+path, nil)
	return fetch(req)
}

// fetch gives status 0 when there was none.
func fetch(req *http.Request) (status int, body []byte) {
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		return 0, nil
	}
	return resp.StatusCode, body
}

// getJSON fails the test unless the answer is 200 and JSON.
func (s *testServer) getJSON(path string, into any) {
	s.t.Helper()
	status, body := s.get(path)
	if status != http.StatusOK {
		s.t.Fatalf("GET %s: status %d: %.200s", path, status, body)
	}
	if err := json.Unmarshal(body, into); err != nil {
		s.t.Fatalf("GET %s: %v in %.200s", path, err, body)
	}
}

// stat is one number of /stats.
func (s *testServer) stat(name string) int64 {
	s.t.Helper()
	var all map[string]any
	s.getJSON("/stats", &all)
	value, ok := all[name].(float64)
	if !ok {
		s.t.Fatalf("/stats has no number %q: %v", name, all)
	}
	return int64(value)
}

// metric is one number of /metrics, without the "session_replay_" of its name.
func (s *testServer) metric(name string) int64 {
	s.t.Helper()
	status, body := s.get("/metrics")
	_, rest, ok := strings.Cut(string(body), "\nsession_replay_"+name+" ")
	var value float64
	if _, err := fmt.Sscan(rest, &value); !ok || err != nil {
		s.t.Fatalf("/metrics has no number %s; status %d, %v", name, status, err)
	}
	return int64(value)
}

// memoryOf reads VmRSS, or VmHWM, the peak, of a process, in bytes.
func memoryOf(t testing.TB, pid int, name string) int64 {
	t.Helper()
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(status), name+":")
	var kilobytes int64
	if _, err := fmt.Sscan(rest, &kilobytes); err != nil {
		t.Fatalf("%s of process %d: %v", name, pid, err)
	}
	return kilobytes << 10
}

func (s *testServer) peakMemory() int64 { return memoryOf(s.t, s.cmd.Process.Pid, "VmHWM") }

// lockedBuffer is written by a process and read by the test meanwhile.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *lockedBuffer) tail() string {
	all := b.String()
	return all[max(0, len(all)-6000):]
}

// ---- the final check ----

// checkStored fails the test unless every event that the trackers sent is
// stored once, at its place, as it was sent, and nothing else is there; in the
// database, in its counters, and over REST. All of them have finished.
func checkStored(t testing.TB, s *testServer, trackers ...*testTracker) {
	t.Helper()
	conn := connectSQL(t, s.database)
	defer conn.Close(context.Background())
	var ours []string
	for i, tr := range trackers {
		ours = append(ours, tr.session)
		checkRows(t, conn, tr)
		if i%(1+len(trackers)/20) == 0 { // of many sessions, some
			checkREST(t, s, tr)
		}
	}
	if n := querySQL[int](t, s.database, "select count(*) from session_events where session_id <> all($1)",
		ours); n != 0 {
		t.Errorf("got %d chunks of other sessions, want none", n)
	}
}

// checkRows reads a session as it lies in the tables.
func checkRows(t testing.TB, conn *pgx.Conn, tr *testTracker) {
	t.Helper()
	rows, err := conn.Query(context.Background(),
		"select first_index, event_count, events from session_events where session_id = $1 order by first_index",
		tr.session)
	if err != nil {
		t.Fatalf("read chunks: %v", err)
	}
	var first, count, lost, doubled, end, stored, bytes int
	var packed []byte
	_, err = pgx.ForEachRow(rows, []any{&first, &count, &packed}, func() error {
		array, err := unpackChunk(packed)
		if right := countRight(tr.session, first, array); err != nil || right != count {
			t.Errorf("%s: the chunk at %d has %d right events, its row says %d (%v)", tr.session, first, right, count,
				err)
		}
		lost, doubled = lost+max(0, first-end), doubled+max(0, end-first)
		end, stored, bytes = first+count, stored+count, bytes+len(packed)
		return nil
	})
	acked, made, seq := tr.ackedEvents(), tr.madeEvents(), int(tr.read(&tr.made))
	lost += max(0, acked-end)
	if err != nil || lost+doubled > 0 || stored != made {
		t.Errorf("%s: %d events made, %d acked; %d stored, %d lost, %d doubled (%v)", tr.session, made, acked, stored,
			lost,
			doubled, err)
	}
	testTotals.acked.Add(int64(acked))
	testTotals.stored.Add(int64(stored))
	testTotals.lost.Add(int64(lost))
	testTotals.doubled.Add(int64(doubled))
	var saysEvents, saysBytes, saysSeq int
	err = conn.QueryRow(context.Background(),
		"select event_count, stored_bytes, last_seq from sessions where session_id = $1",
		tr.session).Scan(&saysEvents, &saysBytes, &saysSeq)
	if err != nil || saysEvents != stored || saysBytes != bytes || saysSeq != seq {
		t.Errorf("%s: the row says %d events, %d bytes, seq %d; there are %d, %d, %d (%v)",
			tr.session, saysEvents, saysBytes, saysSeq, stored, bytes, seq, err)
	}
}

func unpackChunk(packed []byte) ([]byte, error) {
	reader, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(reader)
}

func checkREST(t testing.TB, s *testServer, tr *testTracker) {
	t.Helper()
	for from, made := 0, tr.madeEvents(); from < made; {
		var page struct {
			Events json.RawMessage
			Count  int
		}
		path := fmt.Sprintf("/sessions/%s/events?fromIndex=%d&limit=10000", tr.session, from)
		waitUntil(t, "REST answers", func() bool { // a fault may just be over
			status, body := s.get(path)
			if err := json.Unmarshal(body, &page); status != http.StatusServiceUnavailable && (err != nil || status != 200) {
				t.Fatalf("GET %s: status %d, %v", path, status, err)
			}
			return status == 200
		})
		if right := countRight(tr.session, from, page.Events); page.Count == 0 || page.Count != right {
			t.Errorf("%s: REST gives %d right events at %d of %d, count %d", tr.session, right, from, made, page.Count)
			return
		}
		from += page.Count
	}
}
