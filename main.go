// Command session-replay records browser sessions (rrweb events over a
// WebSocket), shows them live and replays them. It keeps them in PostgreSQL.
//
// The way of an event:
//
//	page ── WebSocket ──▶ tracker (session.go)      finds the events' bounds (parse.go)
//	                        │ publish
//	                        ▼
//	                      hub (hub.go)              numbers it, keeps it, fans it out
//	                    ┌───┴───────────────┐
//	                    ▼                   ▼ takes dirty sessions, BATCH_SIZE at a time
//	viewers ◀── outbox per viewer       writers (store.go)   gzip, insert, commit
//	                                        │ committed
//	                    tracker ◀── ack ── hub
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	writers      = 3                // one compresses while others wait for their commits
	shutdownTime = 18 * time.Second // for everything; systemd and others wait about 20
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "session-replay:", err)
		os.Exit(1)
	}
}

// run is the server from start to stop; it ends when ctx does.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("session-replay", flag.ContinueOnError)
	flags.SetOutput(stderr)
	printVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *printVersion {
		fmt.Fprintln(stdout, "session-replay", version())
		return nil
	}
	env, err := withDotEnv(getenv, ".env")
	if err != nil {
		return err
	}
	cfg, err := loadConfig(env)
	if err != nil {
		return err
	}
	if env("GOGC") == "" {
		debug.SetGCPercent(50) // idle connections take a tenth less memory; ingest does not feel it
	}
	if env("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(cfg.maxBufferBytes)*5/4 + 64<<20)
	}
	logs := openLogs(cfg.log, stdout, stderr, env("JOURNAL_STREAM") != "")
	defer logs.Close()
	s, err := assemble(cfg, logs)
	if err != nil {
		return err
	}
	defer s.store.close()
	return s.run(ctx)
}

func assemble(cfg config, logs *logs) (*server, error) {
	st, err := openStore(context.Background(), cfg.database)
	if err != nil {
		return nil, err
	}
	m := newMetrics()
	b := &budget{free: int64(cfg.maxBufferBytes)}
	s := &server{cfg: cfg, store: st, budget: b, metrics: m, logs: logs, log: logs.app, started: time.Now(),
		admission: &admission{max: cfg.maxConnections, byAddr: map[string]int{}}}
	s.hub = newHub(hubConfig{batchSize: cfg.batchSize, batchInterval: cfg.batchInterval, grace: cfg.grace, maxEvents: int64(cfg.maxEvents),
		maxTailBytes: int64(cfg.maxBufferBytes) / 4, maxSessionBytes: int64(cfg.maxSessionBytes)}, b, m, logs.app)
	var bundled bool
	if s.files, bundled = loadAssets(); !bundled {
		s.log.Warn("the recorder was not bundled: run 'make web' and build again")
	}
	return s, nil
}

// run starts what is needed first and stops in reverse: HTTP, the connections,
// the hub and its writers, each of which ends what feeds the next.
func (s *server) run(ctx context.Context) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(s.cfg.host, s.cfg.port))
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	work, giveUp := context.WithCancel(context.Background())
	defer giveUp()
	s.ctx = work
	house, stopHouse := context.WithCancel(work)
	defer stopHouse()
	go s.hub.run(work) // ends when it is drained
	for range writers {
		w := &writer{s.hub, s.store, s.metrics, s.logs.rejected}
		go w.run(work) // ends with the hub
	}
	go s.keepHouse(house) // ends with house
	srv := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: s.cfg.readHeaderTimeout,
		ReadTimeout:       time.Minute,
		WriteTimeout:      time.Minute,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    s.cfg.maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.logs.rejected.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }() // ends with srv
	s.log.Info("listening", "url", "http://"+listener.Addr().String(), "version", version())
	select {
	case err = <-failed:
	case <-ctx.Done():
		err = nil
	}
	stopHouse()
	return errors.Join(err, s.stop(srv))
}

// stop ends the server in order: no new work, everyone is told, and all that was
// accepted is committed.
func (s *server) stop(srv *http.Server) error {
	s.log.Info("stopping")
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	httpEnds := make(chan struct{})
	go func() { // ends with ctx at the latest
		srv.Shutdown(ctx)
		close(httpEnds)
	}()
	s.goodbye(ctx)
	s.hub.send(drain{})
	select {
	case <-s.hub.done:
		s.log.Info("stopped, everything is stored")
	case <-ctx.Done():
		return errors.New("stopped before everything was stored: the database did not take it in time")
	}
	select {
	case <-httpEnds:
	case <-time.After(time.Second):
	}
	srv.Close()
	return nil
}

// keepHouse applies the schema as soon as the database is there, and from then
// on marks live sessions and deletes old ones.
func (s *server) keepHouse(ctx context.Context) {
	for attempt := 0; ; attempt++ {
		err := s.store.applySchema(ctx)
		if err == nil {
			break
		}
		if attempt%20 == 0 {
			s.log.Error("waiting for the database", "err", err)
		}
		if !pause(ctx, attempt) {
			return
		}
	}
	s.log.Info("database ready")
	touch, clean := time.NewTicker(touchEvery), time.NewTicker(s.cfg.cleanupInterval)
	defer touch.Stop()
	defer clean.Stop()
	s.touch(ctx)
	for {
		select {
		case <-touch.C:
			s.touch(ctx)
		case <-clean.C:
			s.cleanUp(ctx)
		case <-ctx.Done():
			return
		}
	}
}

func (s *server) touch(ctx context.Context) {
	ids := []string{} // not nil, which would be null
	for id := range s.live() {
		ids = append(ids, id)
	}
	if err := s.store.touch(ctx, ids); err != nil && ctx.Err() == nil {
		s.logs.rejected.Warn("live sessions not marked", "err", err)
	}
}

func (s *server) cleanUp(ctx context.Context) {
	n, err := s.store.removeEnded(ctx, time.Now().Add(-s.cfg.retention))
	if err == nil && s.cfg.maxStorageBytes > 0 {
		var more int64
		more, err = s.store.removeToFit(ctx, int64(s.cfg.maxStorageBytes))
		n += more
	}
	if err != nil && ctx.Err() == nil {
		s.logs.rejected.Error("cleanup failed", "err", err)
	}
	if n > 0 {
		s.log.Info("old sessions deleted", "sessions", n)
	}
}

// version is what the binary knows of how it was built.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if stamped != "" {
		return stamped
	}
	return info.Main.Version
}

// stamped is set by the linker (-X main.stamped=…).
var stamped string

// Settings.

// config is all settings, read once at the start.
type config struct {
	host, port string
	database   *pgxpool.Config
	log        logConfig

	batchSize, maxEvents int
	batchInterval        time.Duration
	cleanupInterval      time.Duration
	heartbeat            time.Duration
	grace                time.Duration
	messageTimeout       time.Duration
	readHeaderTimeout    time.Duration
	retention            time.Duration

	maxMessageBytes, maxBufferBytes, maxHeaderBytes int
	maxSessionBytes, maxStorageBytes                int
	maxConnections, maxSessionsPerMinute            int
}

// loadConfig reads the settings. Its error names the one that is wrong.
func loadConfig(getenv func(string) string) (config, error) {
	r := settings{getenv: getenv}
	c := config{
		host:                 r.text("HOST", "127.0.0.1"),
		port:                 strconv.Itoa(r.number("PORT", 8080, 0, 65535)),
		batchSize:            r.number("BATCH_SIZE", 50, 1, 10000),
		batchInterval:        r.millis("BATCH_INTERVAL", 5000, 1),
		maxEvents:            r.number("MAX_EVENTS_PER_SESSION", 20000, 1, 1<<30),
		cleanupInterval:      r.millis("SESSION_CLEANUP_INTERVAL", 300000, 1),
		heartbeat:            r.millis("HEARTBEAT_INTERVAL", 30000, 10),
		grace:                r.millis("SESSION_GRACE_PERIOD", 15000, 0),
		messageTimeout:       r.millis("MESSAGE_TIMEOUT", 120000, 1),
		readHeaderTimeout:    r.millis("READ_HEADER_TIMEOUT", 10000, 1),
		retention:            time.Duration(r.number("RETENTION_HOURS", 720, 1, 1<<20)) * time.Hour,
		maxMessageBytes:      r.number("MAX_MESSAGE_BYTES", 32<<20, 1024, 1<<30),
		maxBufferBytes:       r.number("MAX_BUFFER_BYTES", 256<<20, 1<<20, 1<<40),
		maxHeaderBytes:       r.number("MAX_HEADER_BYTES", 16<<10, 4<<10, 1<<20),
		maxSessionBytes:      r.number("MAX_SESSION_BYTES", 1<<30, 1, 1<<50),
		maxStorageBytes:      r.number("MAX_STORAGE_BYTES", 0, 0, 1<<60),
		maxConnections:       r.number("MAX_CONNECTIONS", 10000, 1, 1<<20),
		maxSessionsPerMinute: r.number("MAX_SESSIONS_PER_MINUTE", 30, 1, 1<<20),
	}
	c.log = r.logs()
	c.database = r.database()
	return c, r.err
}

// settings reads values and keeps the first that is wrong.
type settings struct {
	getenv func(string) string
	err    error
}

func (r *settings) fail(name, format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%s: "+format, append([]any{name}, args...)...)
	}
}

func (r *settings) text(name, preset string) string {
	if v := r.getenv(name); v != "" {
		return v
	}
	return preset
}

func (r *settings) number(name string, preset, least, most int) int {
	v := r.getenv(name)
	if v == "" {
		return preset
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < least || n > most {
		r.fail(name, "%q is not a whole number from %d to %d", v, least, most)
	}
	return n
}

func (r *settings) millis(name string, preset, least int) time.Duration {
	const day = 24 * 60 * 60 * 1000
	return time.Duration(r.number(name, preset, least, 365*day)) * time.Millisecond
}

func (r *settings) flag(name string) bool {
	v := r.text(name, "false")
	on, err := strconv.ParseBool(v)
	if err != nil {
		r.fail(name, "%q is neither true nor false", v)
	}
	return on
}

func (r *settings) logs() (c logConfig) {
	if err := c.level.UnmarshalText([]byte(r.text("LOG_LEVEL", "info"))); err != nil {
		r.fail("LOG_LEVEL", "%q is none of debug, info, warn, error", r.getenv("LOG_LEVEL"))
	}
	var err error
	c.dir = r.text("LOG_DIR", "logs")
	c.zipped = r.flag("LOG_ZIPPED")
	if c.maxSize, err = parseLogSize(r.text("LOG_MAX_SIZE", "20m")); err != nil {
		r.fail("LOG_MAX_SIZE", "%v", err)
	}
	if c.maxAge, c.maxCount, err = parseLogFiles(r.text("LOG_MAX_FILES", "14d")); err != nil {
		r.fail("LOG_MAX_FILES", "%v", err)
	}
	return c
}

// database makes the pool's configuration: of DATABASE_URL, or of the DB_
// settings.
func (r *settings) database() *pgxpool.Config {
	name, dsn := "DATABASE_URL", r.getenv("DATABASE_URL")
	if dsn == "" {
		u := url.URL{Scheme: "postgres", User: url.UserPassword(r.text("DB_USER", "postgres"), r.text("DB_PASSWORD", "postgres")),
			Path: "/" + r.text("DB_NAME", "session_replay")}
		u.RawQuery = url.Values{"host": {r.text("DB_HOST", "localhost")}, "port": {strconv.Itoa(r.number("DB_PORT", 5432, 1, 65535))}}.Encode()
		name, dsn = "DB_HOST, DB_NAME, DB_USER or DB_PASSWORD", u.String()
	}
	c, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		r.fail(name, "cannot be parsed as a PostgreSQL connection") // pgx's error may quote the password
		return nil
	}
	c.MaxConns = int32(r.number("DB_MAX_CONNECTIONS", 20, writers+1, 10000))
	c.MaxConnIdleTime = r.millis("DB_IDLE_TIMEOUT", 30000, 1)
	c.ConnConfig.ConnectTimeout = r.millis("DB_CONNECTION_TIMEOUT", 2000, 1)
	return c
}

// withDotEnv adds the settings of a .env file, if there is one, to those of the
// environment, which win.
func withDotEnv(getenv func(string) string, name string) (func(string) string, error) {
	file, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return getenv, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	defer file.Close()
	values := map[string]string{}
	lines := bufio.NewScanner(file)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		key, value, ok := strings.Cut(strings.TrimPrefix(line, "export "), "=")
		if !ok {
			return nil, fmt.Errorf("%s:%d: not a line of the form NAME=value", name, n)
		}
		values[strings.TrimSpace(key)] = unquoteValue(strings.TrimSpace(value))
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	return func(key string) string {
		if v := getenv(key); v != "" {
			return v
		}
		return values[key]
	}, nil
}

// unquoteValue takes the quotes off a value, or the comment behind it.
func unquoteValue(v string) string {
	if n := len(v); n >= 2 && (v[0] == '"' || v[0] == '\'') && v[n-1] == v[0] {
		return v[1 : n-1]
	}
	v, _, _ = strings.Cut(v, " #")
	return strings.TrimSpace(v)
}
