package main

// What the tests stand on: PostgreSQL and a fresh database for each test, the
// server as a real process, a tracker that keeps what is not acknowledged, a
// viewer that checks every event it sees, and the final check that every event
// is stored once, at its place, as the bytes that were sent.
//
// Events are a function of session and number (testEvent), and a tracker's
// event number n belongs at index n. So nobody has to remember what was sent:
// whoever sees an event at an index knows which bytes must be there.

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"nhooyr.io/websocket"
)

// patience bounds every wait for something that normally takes milliseconds:
// far above what a busy machine needs, so that only a real fault reaches it.
const patience = 60 * time.Second

func TestMain(m *testing.M) {
	code := m.Run()
	if testShared.cluster != nil {
		testShared.cluster.end()
	}
	if testShared.binary != "" {
		os.RemoveAll(filepath.Dir(testShared.binary))
	}
	if testTotals.acked.Load() > 0 {
		fmt.Printf("events: %d acked, %d stored, %d lost, %d doubled\n",
			testTotals.acked.Load(), testTotals.stored.Load(), testTotals.lost.Load(), testTotals.doubled.Load())
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

// ---- PostgreSQL ----

// sharedDatabase is the URL of a database in the cluster that all tests share:
// TEST_DATABASE_URL, or a cluster that lives as long as the tests do. It starts
// with the first test that needs it, because fuzz workers and single unit tests
// do not.
var sharedDatabase = sync.OnceValues(func() (string, error) {
	if given := os.Getenv("TEST_DATABASE_URL"); given != "" {
		return given, nil
	}
	cluster, err := launchPostgres()
	if err != nil {
		return "", err
	}
	testShared.cluster = cluster
	return cluster.url, nil
})

// testDatabase makes an empty database that is dropped after the test, and
// returns its URL.
func testDatabase(t testing.TB) string {
	t.Helper()
	shared, err := sharedDatabase()
	if err != nil {
		t.Fatalf("the tests need PostgreSQL (scripts/postgres, or TEST_DATABASE_URL): %v", err)
	}
	return databaseIn(t, shared)
}

var databaseNumber atomic.Int64

// databaseIn is testDatabase in the cluster that the URL leads to.
func databaseIn(t testing.TB, cluster string) string {
	t.Helper()
	name := fmt.Sprintf("test_%d_%d", os.Getpid(), databaseNumber.Add(1))
	execSQL(t, cluster, "create database "+name)
	t.Cleanup(func() { execSQL(t, cluster, "drop database if exists "+name+" with (force)") })
	u, err := url.Parse(cluster)
	if err != nil {
		t.Fatalf("database URL: %v", err)
	}
	u.Path = "/" + name
	return u.String()
}

func connectSQL(t testing.TB, database string) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, database)
	if err != nil {
		t.Fatalf("connect to PostgreSQL: %v", err)
	}
	return conn
}

func execSQL(t testing.TB, database, sql string, args ...any) {
	t.Helper()
	conn := connectSQL(t, database)
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// querySQL returns the one value that a query gives.
func querySQL[T any](t testing.TB, database, sql string, args ...any) (value T) {
	t.Helper()
	conn := connectSQL(t, database)
	defer conn.Close(context.Background())
	if err := conn.QueryRow(context.Background(), sql, args...).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

// testPostgres is a cluster in a directory of its own. Tests that break
// PostgreSQL have one to themselves.
type testPostgres struct {
	dir, url string
	pidFile  string         // the postmaster's, in the data directory
	leash    io.WriteCloser // the guard's standard input
	guard    *exec.Cmd
}

// launchPostgres starts a cluster, and a guard that stops and removes it when
// its standard input ends: at end(), or when this process dies, however it dies.
func launchPostgres() (*testPostgres, error) {
	dir, err := os.MkdirTemp("", "session-replay-pg-")
	if err != nil {
		return nil, err
	}
	p := &testPostgres{dir: dir}
	p.guard = exec.Command("sh", "-c", `read -r _; scripts/postgres stop "$0" >/dev/null 2>&1; rm -rf "$0"`, dir)
	p.guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // ^C is for the tests, not for it
	if p.leash, err = p.guard.StdinPipe(); err != nil {
		return nil, err
	}
	if err := p.guard.Start(); err != nil {
		return nil, err
	}
	if err := p.start(); err != nil {
		p.end()
		return nil, err
	}
	return p, nil
}

// ownPostgres is a cluster for this test alone, which may break it.
func ownPostgres(t testing.TB) *testPostgres {
	t.Helper()
	p, err := launchPostgres()
	if err != nil {
		t.Fatalf("the tests need PostgreSQL: %v", err)
	}
	t.Cleanup(p.end)
	return p
}

func (p *testPostgres) start() error {
	cmd := exec.Command("scripts/postgres", "start", p.dir)
	var trouble strings.Builder
	cmd.Stderr = &trouble
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("scripts/postgres start: %w %s", err, strings.TrimSpace(trouble.String()))
	}
	p.url = strings.TrimSpace(string(out))
	conn, err := pgx.Connect(context.Background(), p.url)
	if err != nil {
		return err
	}
	defer conn.Close(context.Background())
	var data string
	err = conn.QueryRow(context.Background(), "show data_directory").Scan(&data)
	p.pidFile = filepath.Join(data, "postmaster.pid")
	return err
}

func (p *testPostgres) end() {
	p.leash.Close()
	p.guard.Wait()
}

func (p *testPostgres) postmaster(t testing.TB) int {
	t.Helper()
	content, err := os.ReadFile(p.pidFile)
	if err != nil {
		t.Fatalf("postmaster: %v", err)
	}
	first, _, _ := strings.Cut(string(content), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatalf("postmaster: %v", err)
	}
	return pid
}

// processes is the postmaster and all that it has testShared.
func (p *testPostgres) processes(t testing.TB) []int {
	pids := []int{p.postmaster(t)}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		content, _ := os.ReadFile(file) // pid (name) state parent …
		_, rest, _ := strings.Cut(string(content), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(pids[0]) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// freeze stops every process of the cluster in its tracks, until thaw. The
// postmaster comes first, so that it starts no more.
func (p *testPostgres) freeze(t testing.TB) {
	syscall.Kill(p.postmaster(t), syscall.SIGSTOP)
	for _, pid := range p.processes(t) {
		syscall.Kill(pid, syscall.SIGSTOP)
	}
}

func (p *testPostgres) thaw(t testing.TB) {
	for _, pid := range p.processes(t) {
		syscall.Kill(pid, syscall.SIGCONT)
	}
}

// kill sends the postmaster a signal that ends it and waits until it and all
// its processes are gone.
func (p *testPostgres) kill(t testing.TB, sig syscall.Signal) {
	t.Helper()
	pids := p.processes(t)
	syscall.Kill(pids[0], sig)
	for _, pid := range pids {
		waitUntil(t, "PostgreSQL's processes end", func() bool { return syscall.Kill(pid, 0) != nil })
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
	args := []string{"build", "-o", testShared.binary, "."}
	if os.Getenv("TEST_SERVER_RACE") != "" {
		args = []string{"build", "-race", "-o", testShared.binary, "."}
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return testShared.binary, nil
})

// serverProcess is the server as its users run it. It can be killed and started
// again at the same address.
type serverProcess struct {
	t        testing.TB
	env      []string
	dir      string // its working directory; logs are in dir/logs
	port     string
	url      string // http://127.0.0.1:port
	database string

	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended
	output lockedBuffer  // stdout and stderr of all its lives
}

// startServer starts the server and waits until it is healthy. env are settings
// like "BATCH_SIZE=10"; without a DATABASE_URL it has a fresh database. Nothing
// else comes from the environment of the tests.
func startServer(t testing.TB, env ...string) *serverProcess {
	t.Helper()
	s := newServer(t, env...)
	s.start()
	s.waitHealthy()
	return s
}

// newServer prepares what startServer starts.
func newServer(t testing.TB, env ...string) *serverProcess {
	t.Helper()
	s := &serverProcess{t: t, dir: t.TempDir(), port: freePort(t)}
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
	}, env...) // of two settings with one name the later counts
	t.Cleanup(s.cleanUp)
	return s
}

// freePort finds a port below those that outgoing connections are given
// (32768 and up): a server that restarts must find its port free again.
func freePort(t testing.TB) string {
	t.Helper()
	for range 1000 {
		port := strconv.Itoa(12000 + rand.IntN(20000))
		if listener, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			listener.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

func (s *serverProcess) start() {
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

// restart kills the server with SIGKILL and starts it again.
func (s *serverProcess) restart() {
	s.t.Helper()
	s.kill9()
	s.start()
	s.waitHealthy()
}

func (s *serverProcess) kill9() {
	s.cmd.Process.Kill()
	<-s.exited
}

// term asks the server to stop and returns its exit code and all it printed.
func (s *serverProcess) term() (code int, output string) {
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

func (s *serverProcess) running() bool {
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

func (s *serverProcess) waitHealthy() {
	s.t.Helper()
	waitUntil(s.t, "the server is healthy", func() bool {
		if !s.running() {
			s.t.Fatalf("the server has ended:\n%s", s.output.tail())
		}
		status, _ := s.get("/health")
		return status == http.StatusOK
	})
}

func (s *serverProcess) cleanUp() {
	if s.cmd == nil {
		return
	}
	if s.t.Failed() {
		s.t.Logf("the server's last words:\n%s", s.output.tail())
	}
	s.kill9()
	if out := s.output.String(); strings.Contains(out, "DATA RACE") || strings.Contains(out, "\npanic:") {
		s.t.Errorf("race or panic in the server:\n%s", out)
	}
	if panics := s.log("exceptions"); panics != "" {
		s.t.Errorf("the server's exceptions log: %s", panics)
	}
}

// log returns the content of the log files of one kind (application, error,
// exceptions, rejections).
func (s *serverProcess) log(kind string) string {
	var all strings.Builder
	files, _ := filepath.Glob(filepath.Join(s.dir, "logs", kind+"-*"))
	for _, file := range files {
		content, _ := os.ReadFile(file)
		all.Write(content)
	}
	return all.String()
}

// ws is the address of the WebSocket, for "tracker" or "viewer".
func (s *serverProcess) ws(kind string) string {
	return "ws://127.0.0.1:" + s.port + "/ws?type=" + kind
}

// get returns status 0 when there was no answer.
func (s *serverProcess) get(path string) (status int, body []byte) {
	return s.request("GET", path)
}

func (s *serverProcess) request(method, path string) (status int, body []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, method, s.url+path, nil)
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
func (s *serverProcess) getJSON(path string, into any) {
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
func (s *serverProcess) stat(name string) int64 {
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
func (s *serverProcess) metric(name string) int64 {
	s.t.Helper()
	status, body := s.get("/metrics")
	for line := range strings.Lines(string(body)) {
		if text, ok := strings.CutPrefix(line, "session_replay_"+name+" "); ok {
			value, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				s.t.Fatalf("/metrics: %s", line)
			}
			return int64(value)
		}
	}
	s.t.Fatalf("/metrics has no %s; status %d", name, status)
	return 0
}

// peakMemory is the largest resident size that this life of the server had, in
// bytes.
func (s *serverProcess) peakMemory() int64 {
	s.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		s.t.Fatalf("VmHWM: %v", err)
	}
	return kb << 10
}

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

// ---- waiting ----

// waitUntil polls a condition and fails the test when it does not come true.
func waitUntil(t testing.TB, what string, condition func() bool) {
	t.Helper()
	waitWithin(t, patience, what, condition)
}

func waitWithin(t testing.TB, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", limit, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// testContext ends with the test, before its clean-up.
func testContext(t testing.TB) context.Context { return t.Context() }

// sessionName is a session id for a test, unlike those of the other tests.
func sessionName(t testing.TB, n int) string {
	name := strings.Map(func(r rune) rune {
		if strings.ContainsRune("/# ", r) {
			return '.'
		}
		return r
	}, t.Name())
	return fmt.Sprintf("%.100s-%d", name, n)
}

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
		return fmt.Appendf(nil, `{"type":4,"data":{"href":"https://example.com/%s/%d","width":1920,"height":1080},"timestamp":%d}`, session, n, at)
	case 1:
		return fmt.Appendf(nil, `{"type":2,"data":{"of":%q,"n":%d,"text":"%s"},"timestamp":%d}`, session, n, snapshotText, at)
	}
	odd := oddities[n%len(oddities)]
	if n%5 == 0 {
		return fmt.Appendf(nil, "{ \"timestamp\" : %d,\n\t\"data\": {\"odd\": %s, \"of\": %q , \"n\":%d} ,\"type\":3 }", at, odd, session, n)
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

// checkEvents compares events with those that belong at index from and after.
func checkEvents(session string, from int, events []json.RawMessage) error {
	for i, event := range events {
		if want := testEvent(session, from+i); !bytes.Equal(event, want) {
			return fmt.Errorf("session %s, index %d: got %.300s want %.300s", session, from+i, event, want)
		}
	}
	return nil
}

// ---- WebSocket ----

// testMessage has the fields of every message that the server sends.
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
}

// testConn is a WebSocket connection whose failures fail the test.
type testConn struct {
	t testing.TB
	*websocket.Conn
}

func dialWebSocket(ctx context.Context, address string) (*websocket.Conn, error) {
	return dialWith(ctx, http.DefaultClient, address)
}

func dialWith(ctx context.Context, client *http.Client, address string) (*websocket.Conn, error) {
	conn, _, err := websocket.Dial(ctx, address, &websocket.DialOptions{HTTPClient: client})
	if err == nil {
		conn.SetReadLimit(-1) // 32 KiB otherwise
	}
	return conn, err
}

func dialServer(t testing.TB, address string) *testConn {
	t.Helper()
	conn, err := dialWebSocket(testContext(t), address)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { conn.CloseNow() })
	return &testConn{t, conn}
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

func (c *testConn) send(kind string, data any) {
	c.t.Helper()
	c.sendRaw(string(wireMessage(kind, data)))
}

func (c *testConn) sendRaw(text string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(testContext(c.t), patience)
	defer cancel()
	if err := c.Write(ctx, websocket.MessageText, []byte(text)); err != nil {
		c.t.Fatalf("send %.100s: %v", text, err)
	}
}

func (c *testConn) receive() (m testMessage, err error) {
	ctx, cancel := context.WithTimeout(testContext(c.t), patience)
	defer cancel()
	return receiveMessage(ctx, c.Conn)
}

func receiveMessage(ctx context.Context, conn *websocket.Conn) (m testMessage, err error) {
	_, text, err := conn.Read(ctx)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%w in message %.200s", err, text)
	}
	return m, nil
}

// expect reads on until a message of this type comes.
func (c *testConn) expect(kind string) testMessage {
	c.t.Helper()
	var passed []string
	for {
		m, err := c.receive()
		if err != nil {
			c.t.Fatalf("waiting for %s, passed %v: %v", kind, passed, err)
		}
		if m.Type == kind {
			return m
		}
		passed = append(passed, m.Type+" "+m.Data.Code)
	}
}

// expectClose reads on until the server closes, with this code.
func (c *testConn) expectClose(code websocket.StatusCode) {
	c.t.Helper()
	for {
		_, err := c.receive()
		if err == nil {
			continue
		}
		if websocket.CloseStatus(err) != code {
			c.t.Fatalf("got %v, want close code %d", err, code)
		}
		return
	}
}

func sendMessage(conn *websocket.Conn, kind string, data any) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return conn.Write(ctx, websocket.MessageText, wireMessage(kind, data))
}

// ---- a tracker ----

// testTracker records one session as the numbered protocol asks: it keeps every
// batch until it is acked, and after a reconnect sends again what the server
// does not have. Batch seq holds the events (seq-1)*perBatch and on, so that all
// it must keep are three numbers.
type testTracker struct {
	t       testing.TB
	session string
	// perBatch is events in a batch; window, how many batches may wait for
	// their ack; pause, the time between two batches.
	perBatch, window int
	pause            time.Duration
	mischief         bool  // repeats a batch now and then, or leaves one out
	limit            int64 // batches to make in all; 0: until finish
	unnumbered       bool  // batches do not carry their number

	sending func(seq int64) // called before each batch is sent, if set

	mu         sync.Mutex
	address    string
	resume     string
	ready      bool  // session_ready came on this connection
	made       int64 // the newest batch that was ever sent
	sent       int64 // the newest batch sent on this connection
	acked      int64 // the newest batch that the server promised to have
	stopping   bool
	fate       string         // why recording stopped: the server's first code
	errors     map[string]int // by code
	closes     map[websocket.StatusCode]int
	reconnects int
	resent     int64
	cut        context.CancelFunc // ends the present connection

	wake chan struct{} // there may be something to do
	done chan struct{} // closed when run has ended
}

// newTracker sets what a test may then change before start.
func newTracker(t testing.TB, session string) *testTracker {
	return &testTracker{
		t: t, session: session, perBatch: 10, window: 8, pause: 10 * time.Millisecond,
		errors: map[string]int{}, closes: map[websocket.StatusCode]int{},
		wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
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
		err := tr.connection(ctx)
		tr.mu.Lock()
		over := err == nil || tr.fate != ""
		tr.ready = false
		tr.reconnects++
		tr.closes[websocket.CloseStatus(err)]++
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

// connection is one life on the wire. It returns nil when there is nothing left
// to do.
func (tr *testTracker) connection(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	tr.mu.Lock()
	address, resume := tr.address, tr.resume
	tr.cut = func() { cancel(errors.New("dropped by the test")) }
	tr.mu.Unlock()
	conn, err := dialWebSocket(ctx, address)
	if err != nil {
		return err
	}
	listened := make(chan struct{})
	go func() { // ends when the connection does
		defer close(listened)
		cancel(tr.listen(ctx, conn))
	}()
	defer func() { conn.CloseNow(); <-listened }()
	start := wireMessage("session_start", map[string]any{"sessionId": tr.session, "userId": "tester", "resume": resume,
		"url": "https://example.com/", "viewport": map[string]int{"width": 1280, "height": 720}})
	if err := conn.Write(ctx, websocket.MessageText, start); err != nil {
		return tr.cause(ctx, listened, err)
	}
	for {
		seq, over := tr.next()
		if over {
			return nil
		}
		if seq == 0 {
			select {
			case <-tr.wake:
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err := conn.Write(ctx, websocket.MessageText, tr.batch(seq)); err != nil {
			return tr.cause(ctx, listened, err)
		}
		select {
		case <-time.After(tr.pause):
		case <-ctx.Done():
		}
	}
}

// cause prefers what the reader heard (a close code, say) to the failure of a
// write that follows from it.
func (tr *testTracker) cause(ctx context.Context, listened <-chan struct{}, err error) error {
	select {
	case <-listened:
		return context.Cause(ctx)
	case <-time.After(100 * time.Millisecond):
		return err
	}
}

// next decides what to send: the number of a batch, or 0 when there is none, or
// that all is done.
func (tr *testTracker) next() (seq int64, over bool) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.stopping && tr.acked == tr.made || tr.fate != "" {
		return 0, true
	}
	if !tr.ready {
		return 0, false
	}
	if tr.mischief && tr.sent > 0 && rand.IntN(20) == 0 {
		return 1 + rand.Int64N(tr.sent), false // once more
	}
	if tr.mischief && rand.IntN(50) == 0 {
		return tr.sent + 2, false // one is left out
	}
	if tr.sent < tr.made {
		tr.sent++
		tr.resent++
		return tr.sent, false
	}
	full := tr.made-tr.acked >= int64(tr.window) || tr.limit > 0 && tr.made >= tr.limit
	if full || tr.stopping {
		return 0, false
	}
	tr.made++
	tr.sent++
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

func (tr *testTracker) listen(ctx context.Context, conn *websocket.Conn) error {
	for {
		m, err := receiveMessage(ctx, conn)
		if err != nil {
			return err
		}
		if err := tr.hear(m); err != nil {
			return err
		}
		tr.look()
	}
}

func (tr *testTracker) hear(m testMessage) error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	switch m.Type {
	case "session_ready":
		tr.resume, tr.ready = m.Data.Resume, true
		tr.promised(m.Type, m.Data.LastSeq)
		if m.Data.LastSeq < tr.acked {
			tr.t.Errorf("%s: lastSeq %d after an ack of %d: something acked is lost", tr.session, m.Data.LastSeq, tr.acked)
		}
		tr.sent = m.Data.LastSeq
	case "events_ack":
		tr.promised(m.Type, m.Data.Seq)
	case "session_assigned":
		tr.fate = cmp.Or(tr.fate, m.Type)
		tr.t.Errorf("%s: was assigned the id %s", tr.session, m.Data.SessionID)
	case "error":
		return tr.refused(m)
	}
	return nil
}

// promised notes that the server has everything up to seq.
func (tr *testTracker) promised(by string, seq int64) {
	if seq > tr.made {
		tr.t.Errorf("%s: %s of %d, but only %d were ever sent", tr.session, by, seq, tr.made)
	}
	tr.acked = max(tr.acked, seq)
}

func (tr *testTracker) refused(m testMessage) error {
	tr.errors[m.Data.Code]++
	switch m.Data.Code {
	case "sequence_gap":
		if m.Data.Expected <= tr.acked {
			tr.t.Errorf("%s: expected %d after an ack of %d", tr.session, m.Data.Expected, tr.acked)
		}
		tr.sent = min(tr.sent, m.Data.Expected-1)
	case "unavailable":
		return errors.New("the server says unavailable")
	default:
		tr.fate = cmp.Or(tr.fate, m.Data.Code)
	}
	return nil
}

// drop ends the present connection at once; the tracker makes a new one.
func (tr *testTracker) drop() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.cut != nil {
		tr.cut()
	}
}

// isBack tells whether it records on a connection that is not its first.
func (tr *testTracker) isBack() bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.reconnects > 0 && tr.ready
}

// moveTo makes it go on at another address.
func (tr *testTracker) moveTo(address string) {
	tr.mu.Lock()
	tr.address = address
	tr.mu.Unlock()
	tr.drop()
}

// stop makes no more batches; what was sent still has to be acked.
func (tr *testTracker) stop() {
	tr.mu.Lock()
	tr.stopping = true
	tr.mu.Unlock()
	tr.look()
}

// allow raises its limit.
func (tr *testTracker) allow(batches int64) {
	tr.mu.Lock()
	tr.limit = batches
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

// finish stops and waits until everything is acked.
func (tr *testTracker) finish() {
	tr.t.Helper()
	tr.stop()
	select {
	case <-tr.done:
	case <-time.After(2 * patience):
		tr.mu.Lock()
		defer tr.mu.Unlock()
		tr.t.Fatalf("%s: %d of %d batches acked, sent %d on this connection, ready %v, errors %v", tr.session, tr.acked, tr.made, tr.sent, tr.ready, tr.errors)
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
	address string
	loyal   bool                  // connects again when the connection breaks
	saw     func(from, count int) // called for live events, if set

	reading sync.Mutex // held by a test that keeps it from reading

	mu       sync.Mutex
	conn     *websocket.Conn
	session  string
	fromZero bool // reads the session's past too
	joined   bool
	next     int  // it has seen every event below, since it first joined; -1 before
	run      int  // where the present run of live events began
	live     int  // the index that the next live event must have
	paging   bool // a page is on its way
	events   int  // checked, in all
	lagged   int  // times that it was told so
	notices  []string
	breaks   []error // why connections ended

	cancel context.CancelFunc
	done   chan struct{}
}

// watchSession joins a session and follows it from its first event until the
// test ends, also over broken connections. It waits for the answer to the join.
func watchSession(t testing.TB, address, session string) *testViewer {
	t.Helper()
	return watchWith(t, http.DefaultClient, address, session)
}

func watchWith(t testing.TB, client *http.Client, address, session string) *testViewer {
	t.Helper()
	v, err := openViewer(t, client, address)
	if err != nil {
		t.Fatalf("viewer: %v", err)
	}
	t.Cleanup(v.close)
	v.follow(session)
	waitUntil(t, "the viewer has joined "+session, func() bool { return v.look().joined })
	return v
}

// openViewer connects a viewer that watches nothing yet. The caller closes it.
func openViewer(t testing.TB, client *http.Client, address string) (*testViewer, error) {
	ctx, cancel := context.WithCancel(context.Background())
	v := &testViewer{t: t, address: address, next: -1, cancel: cancel, done: make(chan struct{})}
	var err error
	if v.conn, err = dialWith(ctx, client, address); err != nil {
		cancel()
		return nil, err
	}
	go v.listenAll(ctx) // ends with the connection, or at close when it is loyal
	return v, nil
}

func (v *testViewer) listenAll(ctx context.Context) {
	defer close(v.done)
	for conn := v.conn; ; {
		err := v.listen(ctx, conn)
		conn.CloseNow()
		v.mu.Lock()
		v.breaks = append(v.breaks, err)
		loyal := v.loyal
		v.mu.Unlock()
		if !loyal {
			return
		}
		if conn = v.reconnect(ctx); conn == nil {
			return
		}
	}
}

func (v *testViewer) listen(ctx context.Context, conn *websocket.Conn) error {
	for {
		v.reading.Lock()
		v.reading.Unlock() // it only waits while a test holds it
		m, err := receiveMessage(ctx, conn)
		if err != nil {
			return err
		}
		v.mu.Lock()
		err = v.hear(m)
		v.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// reconnect connects and joins again; nil when the viewer is closed.
func (v *testViewer) reconnect(ctx context.Context) *websocket.Conn {
	for ctx.Err() == nil {
		conn, err := dialWebSocket(ctx, v.address)
		if err == nil {
			v.mu.Lock()
			v.conn = conn
			v.mu.Unlock()
			v.join(v.session)
			return conn
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

func (v *testViewer) hear(m testMessage) error {
	d := &m.Data
	if d.SessionID != v.session {
		return nil
	}
	switch m.Type {
	case "session_started", "session_ended":
		v.notices = append(v.notices, m.Type)
	case "session_joined":
		v.welcome(d.TotalEvents)
	case "session_lagged":
		v.lagged++
		v.run, v.live = d.NextIndex, d.NextIndex
	case "events_batch":
		v.hearLive(d.FromIndex, d.Events)
	case "session_events":
		v.hearPage(m)
	}
	return v.catchUp()
}

func (v *testViewer) welcome(total int) {
	if v.next < 0 && v.fromZero {
		v.next = 0
	}
	if v.next < 0 {
		v.next = total
	}
	v.joined, v.paging = true, false
	v.run, v.live = total, total
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

func (v *testViewer) hearPage(m testMessage) {
	d := &m.Data
	v.paging = false
	if d.FromIndex != v.next {
		return // asked for before it joined anew
	}
	if d.HasMore && len(d.Events) == 0 {
		v.t.Errorf("viewer of %s: an empty page at %d of %d, and more to come", v.session, d.FromIndex, d.TotalEvents)
	}
	v.check(d.FromIndex, d.Events)
	v.next += len(d.Events)
}

// catchUp asks for a page when there is a gap before the present run.
func (v *testViewer) catchUp() error {
	if !v.joined {
		return nil
	}
	if v.next >= v.run {
		v.next = max(v.next, v.live)
		return nil
	}
	if v.paging {
		return nil
	}
	v.paging = true
	return sendMessage(v.conn, "get_session_events", map[string]any{"sessionId": v.session, "fromIndex": v.next})
}

func (v *testViewer) check(from int, events []json.RawMessage) {
	if err := checkEvents(v.session, from, events); err != nil {
		v.t.Errorf("viewer: %v", err)
	}
	v.events += len(events)
}

// follow joins a session and reads its past too; the viewer comes back when the
// connection breaks.
func (v *testViewer) follow(session string) {
	v.mu.Lock()
	v.fromZero, v.loyal = true, true
	v.mu.Unlock()
	v.join(session)
}

func (v *testViewer) join(session string) {
	v.mu.Lock()
	if session != v.session {
		v.next = -1
	}
	v.session, v.joined = session, false
	conn := v.conn
	v.mu.Unlock()
	sendMessage(conn, "viewer_join_session", map[string]string{"sessionId": session})
}

func (v *testViewer) leave() {
	v.mu.Lock()
	v.joined = false
	session, conn := v.session, v.conn
	v.mu.Unlock()
	sendMessage(conn, "viewer_leave_session", map[string]string{"sessionId": session})
}

func (v *testViewer) close() {
	v.cancel()
	<-v.done
}

// viewerState is what a test may ask a viewer.
type viewerState struct {
	joined       bool
	next, events int
	lagged       int
	notices      []string
	breaks       []error
}

func (v *testViewer) look() viewerState {
	v.mu.Lock()
	defer v.mu.Unlock()
	return viewerState{v.joined, v.next, v.events, v.lagged, slices.Clone(v.notices), slices.Clone(v.breaks)}
}

// waitFor waits until it has seen every event below an index.
func (v *testViewer) waitFor(index int) {
	v.t.Helper()
	deadline := time.Now().Add(patience)
	for s := v.look(); s.next < index; s = v.look() {
		if time.Now().After(deadline) {
			v.t.Fatalf("viewer of %s has seen %d of %d events (joined %v, lagged %d times); connections ended: %v",
				v.session, s.next, index, s.joined, s.lagged, s.breaks)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ---- the final check ----

// checkStored fails the test unless every event that the trackers sent is
// stored once, at its place, as it was sent, and nothing else is there; in the
// database, in its counters, and over REST. All of them have finished.
func checkStored(t testing.TB, s *serverProcess, trackers ...*testTracker) {
	t.Helper()
	conn := connectSQL(t, s.database)
	defer conn.Close(context.Background())
	for i, tr := range trackers {
		checkRows(t, conn, tr)
		checkCounters(t, conn, tr)
		if i%(1+len(trackers)/20) == 0 { // of many sessions, some
			checkREST(t, s, tr)
		}
	}
	var ours []string
	for _, tr := range trackers {
		ours = append(ours, tr.session)
	}
	var strays int
	err := conn.QueryRow(context.Background(), "select count(*) from session_events where session_id <> all($1)", ours).Scan(&strays)
	if err != nil || strays != 0 {
		t.Errorf("got %d chunks of other sessions, want none (%v)", strays, err)
	}
}

// checkRows reads a session's chunks as they lie in the table.
func checkRows(t testing.TB, conn *pgx.Conn, tr *testTracker) {
	t.Helper()
	rows, err := conn.Query(context.Background(),
		"select first_index, event_count, events from session_events where session_id = $1 order by first_index", tr.session)
	if err != nil {
		t.Fatalf("read chunks: %v", err)
	}
	defer rows.Close()
	numbers := map[int]int{} // how often each event is there
	total := 0
	for rows.Next() {
		var first, count int
		var packed []byte
		if err := rows.Scan(&first, &count, &packed); err != nil {
			t.Fatalf("read chunks: %v", err)
		}
		array, err := unpackChunk(packed)
		right := countRight(tr.session, first, array)
		if err != nil || first != total || count != right {
			t.Errorf("%s: a chunk at %d, event_count %d, has %d events; want it at %d (%v)", tr.session, first, count, right, total, err)
		}
		countNumbers(numbers, first, right, array)
		total += count
	}
	if rows.Err() != nil {
		t.Fatalf("read chunks: %v", rows.Err())
	}
	countEvents(t, tr, numbers)
}

// countNumbers counts the events of a chunk: the right ones, or what it holds
// instead of them.
func countNumbers(numbers map[int]int, first, right int, array []byte) {
	for i := range right {
		numbers[first+i]++
	}
	if right >= 0 {
		return
	}
	var events []json.RawMessage
	json.Unmarshal(array, &events)
	for _, event := range events {
		numbers[eventNumber(event)]++
	}
}

// countEvents says how many events are lost and doubled.
func countEvents(t testing.TB, tr *testTracker, numbers map[int]int) {
	t.Helper()
	acked, made := tr.ackedEvents(), tr.madeEvents()
	lost, doubled, stored, foreign := 0, 0, 0, 0
	for n := range acked {
		if numbers[n] == 0 {
			lost++
		}
	}
	for n, times := range numbers {
		stored += times
		doubled += times - 1
		if n < 0 || n >= made {
			foreign++
		}
	}
	testTotals.acked.Add(int64(acked))
	testTotals.stored.Add(int64(stored))
	testTotals.lost.Add(int64(lost))
	testTotals.doubled.Add(int64(doubled))
	if lost+doubled+foreign > 0 || stored != made {
		t.Errorf("%s: %d events made, %d acked; %d stored, %d lost, %d doubled, %d never sent",
			tr.session, made, acked, stored, lost, doubled, foreign)
	}
}

// eventNumber finds out which event this is by its timestamp (the last or the
// first of its members), or gives -1.
func eventNumber(event []byte) int {
	var e struct{ Timestamp int }
	if json.Unmarshal(event, &e) != nil || e.Timestamp%10 != 0 {
		return -1
	}
	return (e.Timestamp - 1700000000000) / 10
}

func unpackChunk(packed []byte) ([]byte, error) {
	reader, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(reader)
}

func checkCounters(t testing.TB, conn *pgx.Conn, tr *testTracker) {
	t.Helper()
	var events, bytes, sumEvents, sumBytes, lastSeq int64
	err := conn.QueryRow(context.Background(), `select event_count, stored_bytes, last_seq,
		(select coalesce(sum(event_count), 0) from session_events where session_id = $1),
		(select coalesce(sum(octet_length(events)), 0) from session_events where session_id = $1)
		from sessions where session_id = $1`, tr.session).Scan(&events, &bytes, &lastSeq, &sumEvents, &sumBytes)
	if err != nil {
		t.Errorf("%s: read its counters: %v", tr.session, err)
		return
	}
	wantSeq := tr.read(&tr.made)
	if tr.unnumbered {
		wantSeq = 0
	}
	if events != sumEvents || bytes != sumBytes || lastSeq != wantSeq {
		t.Errorf("%s: counters say %d events, %d bytes, seq %d; there are %d, %d, %d",
			tr.session, events, bytes, lastSeq, sumEvents, sumBytes, wantSeq)
	}
}

func checkREST(t testing.TB, s *serverProcess, tr *testTracker) {
	t.Helper()
	for from, made := 0, tr.madeEvents(); from < made; {
		var page struct {
			Events json.RawMessage
			Count  int
		}
		s.getJSON(fmt.Sprintf("/sessions/%s/events?fromIndex=%d&limit=10000", tr.session, from), &page)
		if right := countRight(tr.session, from, page.Events); page.Count == 0 || page.Count != right {
			t.Errorf("%s: REST gives %d right events at %d of %d, count %d", tr.session, right, from, made, page.Count)
			return
		}
		from += page.Count
	}
}
