package main

// PostgreSQL for the tests: a cluster that they share, with a database for each, and
// clusters of their own for those that break one.

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
)

// sharedDatabase is the URL of a database in the cluster that all tests share:
// TEST_DATABASE_URL, or a cluster that lives as long as the tests do. It starts
// with the first test that needs it, because fuzz workers and single unit tests
// do not.
var sharedDatabase = sync.OnceValues(func() (string, error) {
	if given := os.Getenv("TEST_DATABASE_URL"); given != "" {
		return given, nil
	}
	// Processes are killed here, machines are not: tests need not wait for the disk.
	cluster, err := launchPostgres([]string{"fsync = off"})
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
	t.Cleanup(func() { dropDatabase(t, cluster, name) })
	u, err := url.Parse(cluster)
	if err != nil {
		t.Fatalf("database URL: %v", err)
	}
	u.Path = "/" + name
	return u.String()
}

// dropDatabase also ends who is connected; "with (force)" came with PostgreSQL 13.
func dropDatabase(t testing.TB, cluster, name string) {
	t.Helper()
	conn := connectSQL(t, cluster)
	defer conn.Close(context.Background())
	waitUntil(t, "the test's database is dropped", func() bool {
		_, err := conn.Exec(context.Background(),
			"select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
		if err == nil {
			_, err = conn.Exec(context.Background(), "drop database if exists "+name)
		}
		return err == nil
	})
}

func databaseName(t testing.TB, database string) string {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(u.Path, "/")
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

// holdSQL executes a statement in a transaction that stays open until it is let
// go of: what the statement has locked is locked so long.
func holdSQL(t testing.TB, database, sql string) (letGo func()) {
	t.Helper()
	conn := connectSQL(t, database)
	t.Cleanup(func() { conn.Close(context.Background()) })
	if _, err := conn.Exec(context.Background(), "begin; "+sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return func() {
		t.Helper()
		if _, err := conn.Exec(context.Background(), "rollback"); err != nil {
			t.Fatal(err)
		}
	}
}

// testPostgres is a cluster in a directory of its own. Tests that break
// PostgreSQL have one to themselves.
type testPostgres struct {
	dir, url string
	settings []string       // lines of its configuration
	pidFile  string         // the postmaster's, in the data directory
	leash    io.WriteCloser // the guard's standard input
	guard    *exec.Cmd
}

// launchPostgres starts a cluster, in a directory that prepare may fill, and a
// guard that stops and removes it when its standard input ends: at end(), or when
// this process dies, however it dies.
func launchPostgres(settings []string, prepare ...func(dir string) error) (*testPostgres, error) {
	dir, err := os.MkdirTemp("", "session-replay-pg-")
	if err != nil {
		return nil, err
	}
	p := &testPostgres{dir: dir, settings: settings}
	p.guard = exec.Command("sh", "-c", `read -r _; scripts/postgres stop "$0" >/dev/null 2>&1; rm -rf "$0"`, dir)
	p.guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // ^C is for the tests, not for it
	if p.leash, err = p.guard.StdinPipe(); err != nil {
		return nil, err
	}
	if err := p.guard.Start(); err != nil {
		return nil, err
	}
	for _, do := range append(prepare, func(string) error { return p.start() }) {
		if err := do(dir); err != nil {
			p.end()
			return nil, err
		}
	}
	return p, nil
}

// ownPostgres is a cluster for this test alone, which may break it.
func ownPostgres(t testing.TB, prepare ...func(dir string) error) *testPostgres {
	t.Helper()
	p, err := launchPostgres(nil, prepare...)
	if err != nil {
		t.Fatalf("the tests need PostgreSQL: %v", err)
	}
	t.Cleanup(p.end)
	return p
}

func (p *testPostgres) start() error {
	cmd := exec.Command("scripts/postgres", append([]string{"start", p.dir}, p.settings...)...)
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

// processes is the postmaster and all that it has started.
func (p *testPostgres) processes(t testing.TB) []int {
	t.Helper()
	content, err := os.ReadFile(p.pidFile)
	first, _, _ := strings.Cut(string(content), "\n")
	postmaster, _ := strconv.Atoi(first)
	if err != nil || postmaster == 0 {
		t.Fatalf("postmaster: %q, %v", content, err)
	}
	pids := []int{postmaster}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		content, _ := os.ReadFile(file) // pid (name) state parent …
		_, rest, _ := strings.Cut(string(content), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == first {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// freeze stops every process of the cluster in its tracks, until thaw. The
// postmaster comes first, so that it starts no more.
func (p *testPostgres) freeze(t testing.TB) {
	syscall.Kill(p.processes(t)[0], syscall.SIGSTOP)
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
		waitUntil(t, "PostgreSQL's processes end", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err != nil || strings.Contains(string(stat), ") Z ") // gone, or a zombie
		})
	}
}
