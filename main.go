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
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
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
	printVersion := flags.Bool("version", false, "print what was built, and exit")
	checkOnly := flags.Bool("check", false, "read the settings, connect to the database, print what the server would do, and exit")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *printVersion {
		info, _ := debug.ReadBuildInfo()
		fmt.Fprintf(stdout, "session-replay %s\n%v", version(), info)
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
	if *checkOnly {
		return check(ctx, cfg, stdout)
	}
	if getenv("GOGC") == "" {
		debug.SetGCPercent(50) // idle connections take a tenth less memory; ingest does not feel it
	}
	if getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(cfg.maxBufferBytes)*9/8 + 64<<20)
	}
	logs := openLogs(cfg.log, stdout, stderr, env("JOURNAL_STREAM") != "")
	defer logs.Close()
	s, err := assemble(cfg, logs)
	if err != nil {
		return err
	}
	defer s.store.close()
	if s.access.made {
		fmt.Fprintf(stdout, "ACCESS_TOKEN is not set and HOST is open to a network; until the next start, viewers come by this link:\n%s/?token=%s\n",
			cfg.url(cfg.host, cfg.port), s.access.token)
	}
	return s.run(ctx)
}

func assemble(cfg config, logs *logs) (*server, error) {
	st, err := openStore(context.Background(), cfg.database)
	if err != nil {
		return nil, err
	}
	m := newMetrics()
	b := newBudget(int64(cfg.maxBufferBytes))
	s := &server{cfg: cfg, store: st, budget: b, metrics: m, logs: logs, log: logs.app, started: time.Now(),
		access: newAccess(cfg.accessConfig, cfg.host, cfg.port)}
	s.hub = newHub(hubConfig{batchSize: cfg.batchSize, batchInterval: cfg.batchInterval, grace: cfg.grace, maxEvents: int64(cfg.maxEvents),
		maxTailBytes: int64(cfg.maxBufferBytes) / 4, maxSessionBytes: int64(cfg.maxSessionBytes)}, b, m)
	for range writers {
		s.writers = append(s.writers, &writer{hub: s.hub, store: st, metrics: m, log: logs.rejected})
	}
	var bundled bool
	if s.files, bundled = assets(); !bundled {
		s.log.Warn("the recorder was not bundled: run 'make web' and build again")
	}
	s.files = withMedia(s.files, cfg.mediaOrigins)
	return s, nil
}

// run starts what is needed first and stops in reverse: HTTP, the connections,
// the hub and its writers, each of which ends what feeds the next.
func (s *server) run(ctx context.Context) error {
	listener, err := s.listen()
	if err != nil {
		return err
	}
	work, giveUp := context.WithCancel(context.Background())
	defer giveUp()
	s.ctx = work
	house, stopHouse := context.WithCancel(work)
	defer stopHouse()
	go s.hub.run(work) // ends when it is drained
	for _, w := range s.writers {
		go w.run(work) // ends with the hub
	}
	go s.keepHouse(house) // ends with house
	go s.attend(house)    // ends with house
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
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	s.log.Info("listening", "url", s.cfg.url(s.cfg.host, port), "version", version())
	s.notify("READY=1")
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
	s.notify("STOPPING=1")
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

// listen opens HOST and PORT. TLS speaks HTTP/1.1 alone, as WebSockets do.
func (s *server) listen() (net.Listener, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort(s.cfg.host, s.cfg.port))
	if err != nil {
		return nil, fmt.Errorf("HOST and PORT: %w", err)
	}
	if c := s.cfg.certificate; c != nil {
		listener = tls.NewListener(listener, &tls.Config{
			NextProtos:     []string{"http/1.1"},
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.pair.Load(), nil },
		})
	}
	return listener, nil
}

// certificate is TLS_CERT and TLS_KEY as they were when they were last read.
type certificate struct {
	cert, key string // files
	pair      atomic.Pointer[tls.Certificate]
}

func (c *certificate) load() error {
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err == nil {
		c.pair.Store(&pair)
	}
	return err
}

// attend reads the certificate again on SIGHUP, and tells systemd's watchdog
// that the server works, for as long as it does.
func (s *server) attend(ctx context.Context) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	var watchdog <-chan time.Time
	if s.cfg.watchdog > 0 {
		watchdog = time.Tick(s.cfg.watchdog / 2)
	}
	for {
		select {
		case <-hangup:
			if s.cfg.certificate == nil {
				continue
			}
			if err := s.cfg.certificate.load(); err != nil {
				s.logs.rejected.Error("certificate not read again, the old one stays", "err", err)
			} else {
				s.log.Info("certificate read again")
			}
		case <-watchdog:
			if err := s.works(s.cfg.watchdog / 4); err != nil {
				s.logs.rejected.Error("the watchdog is not told", "err", err)
			} else {
				s.notify("WATCHDOG=1")
			}
		case <-ctx.Done():
			return
		}
	}
}

// works asks the hub, and looks whether a writer has hung for longer than any
// transaction may take.
func (s *server) works(patience time.Duration) error {
	answered := make(chan struct{})
	go func() { // ends with the hub's answer
		s.stats()
		close(answered)
	}()
	select {
	case <-answered:
	case <-time.After(patience):
		return errors.New("the hub does not answer")
	}
	for _, w := range s.writers {
		if since := w.since.Load(); since > 0 && time.Since(time.Unix(since, 0)) > 2*commitTimeout {
			return errors.New("a writer hangs")
		}
	}
	return nil
}

// notify tells systemd, if it listens, as sd_notify(3) does.
func (s *server) notify(state string) {
	if s.cfg.notifySocket == "" {
		return
	}
	conn, err := net.Dial("unixgram", s.cfg.notifySocket)
	if err == nil {
		_, err = conn.Write([]byte(state))
		conn.Close()
	}
	if err != nil {
		s.logs.rejected.Warn("systemd was not told", "state", state, "err", err)
	}
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
	go s.every(ctx, touchEvery, s.touch) // ends with ctx; a long cleanup does not keep it waiting
	s.every(ctx, s.cfg.cleanupInterval, s.cleanUp)
}

// every does something at once and then at intervals, until ctx ends.
func (s *server) every(ctx context.Context, interval time.Duration, do func(context.Context)) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		do(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *server) touch(ctx context.Context) {
	live := map[string]int64{}
	for id, l := range s.live() {
		live[id] = l.epoch
	}
	if err := s.store.touch(ctx, live); err != nil && ctx.Err() == nil {
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
	if s.metrics.sessionsDeleted.Add(n); n > 0 {
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

// check prints what the server would do, without secrets, and whether the
// database is there.
func check(ctx context.Context, cfg config, stdout io.Writer) error {
	a, db, viewing, recording := newAccess(cfg.accessConfig, cfg.host, cfg.port), cfg.database.ConnConfig, "who has ACCESS_TOKEN", "anyone"
	switch {
	case a.open:
		viewing = "whoever is on this machine (no ACCESS_TOKEN)"
	case a.made:
		viewing = "who has the token that it makes and prints (no ACCESS_TOKEN)"
	}
	if a.key != "" {
		recording = "who has INGEST_KEY"
	}
	fmt.Fprintf(stdout, "listens at     %s, port %s; TLS: %t, trusts a proxy: %t\n", cfg.host, cfg.port, cfg.certificate != nil, a.trustProxy)
	fmt.Fprintf(stdout, "may view       %s; pages of its own and %v; public hosts %v\n", viewing, a.viewerOrigins, a.publicHosts)
	fmt.Fprintf(stdout, "may record     %s; pages of %v\n", recording, a.trackerOrigins)
	fmt.Fprintf(stdout, "keeps          sessions %v after their end, logs in %s\n", cfg.retention, cfg.log.dir)
	fmt.Fprintf(stdout, "database       %s at %s, port %d, as %s\n", db.Database, db.Host, db.Port, db.User)
	conn, err := pgx.ConnectConfig(ctx, db)
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	defer conn.Close(ctx)
	fmt.Fprintf(stdout, "               PostgreSQL %s\n", conn.PgConn().ParameterStatus("server_version"))
	return nil
}

// stamped is set by the linker (-X main.stamped=…).
var stamped string

// Settings.

// config is all settings, read once at the start.
type config struct {
	host, port string
	database   *pgxpool.Config
	log        logConfig
	accessConfig

	certificate  *certificate  // nil without TLS
	notifySocket string        // of systemd, empty when it does not wait for us
	watchdog     time.Duration // systemd ends a server that is silent for so long; 0: never

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
	maxSessionsPerMinute                            int
}

// url is where something is found at an address of this machine.
func (c config) url(host, port string) string {
	scheme := "http://"
	if c.certificate != nil {
		scheme = "https://"
	}
	if addr, err := netip.ParseAddr(host); err == nil && addr.IsUnspecified() {
		host = "localhost"
	}
	return scheme + net.JoinHostPort(host, port)
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
		notifySocket:         r.getenv("NOTIFY_SOCKET"),
		watchdog:             time.Duration(r.number("WATCHDOG_USEC", 0, 0, 1<<50)) * time.Microsecond,
		cleanupInterval:      r.millis("SESSION_CLEANUP_INTERVAL", 300000, 1),
		heartbeat:            r.millis("HEARTBEAT_INTERVAL", 30000, 10),
		grace:                r.millis("SESSION_GRACE_PERIOD", 15000, 0),
		messageTimeout:       r.millis("MESSAGE_TIMEOUT", 60000, 1),
		readHeaderTimeout:    r.millis("READ_HEADER_TIMEOUT", 10000, 1),
		retention:            time.Duration(r.number("RETENTION_HOURS", 720, 1, 1<<20)) * time.Hour,
		maxMessageBytes:      r.number("MAX_MESSAGE_BYTES", 32<<20, 1024, 1<<30),
		maxBufferBytes:       r.number("MAX_BUFFER_BYTES", 256<<20, 1<<20, 1<<40),
		maxHeaderBytes:       r.number("MAX_HEADER_BYTES", 16<<10, 4<<10, 1<<20),
		maxSessionBytes:      r.number("MAX_SESSION_BYTES", 1<<30, 1, 1<<50),
		maxStorageBytes:      r.number("MAX_STORAGE_BYTES", 0, 0, 1<<60),
		maxSessionsPerMinute: r.number("MAX_SESSIONS_PER_MINUTE", 30, 1, 1<<20),
	}
	c.log = r.logs()
	c.accessConfig = r.access()
	c.certificate = r.certificate()
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

// secret reads a setting, or the systemd credential that has its name in lower
// case.
func (r *settings) secret(name string) string {
	v, dir := r.getenv(name), r.getenv("CREDENTIALS_DIRECTORY")
	if v != "" || dir == "" {
		return v
	}
	content, err := os.ReadFile(filepath.Join(dir, strings.ToLower(name)))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.fail(name, "%v", err)
	}
	return strings.TrimSpace(string(content))
}

// origins reads origins between commas, or with a scheme what only lacks that.
func (r *settings) origins(name, scheme string) (all []string) {
	for v := range strings.SplitSeq(r.getenv(name), ",") {
		if v = strings.TrimSpace(v); v == "" {
			continue
		}
		origin, err := parseOrigin(scheme + v)
		if err != nil {
			r.fail(name, "%v", err)
		}
		all = append(all, strings.TrimPrefix(origin, scheme))
	}
	return all
}

func (r *settings) access() accessConfig {
	c := accessConfig{
		token: r.secret("ACCESS_TOKEN"), key: r.secret("INGEST_KEY"),
		trackerOrigins: []string{"*"}, viewerOrigins: r.origins("VIEWER_ORIGINS", ""), publicHosts: r.origins("PUBLIC_HOSTS", "http://"),
		mediaOrigins: r.origins("MEDIA_ORIGINS", ""),
		trustProxy:   r.flag("TRUST_PROXY"), metricsOpen: r.flag("METRICS_OPEN"),
		maxConnections: r.number("MAX_CONNECTIONS", 10000, 1, 1<<20), maxPerAddress: r.number("MAX_CONNECTIONS_PER_ADDRESS", 200, 1, 1<<20),
	}
	if r.text("TRACKER_ORIGINS", "*") != "*" {
		c.trackerOrigins = r.origins("TRACKER_ORIGINS", "")
	}
	if c.key != "" && c.key == c.token {
		r.fail("INGEST_KEY", "must not be the same as ACCESS_TOKEN: pages show it to everyone")
	}
	return c
}

func (r *settings) certificate() *certificate {
	c := &certificate{cert: r.getenv("TLS_CERT"), key: r.getenv("TLS_KEY")}
	if c.cert == "" && c.key == "" {
		return nil
	}
	if c.cert == "" || c.key == "" {
		r.fail("TLS_CERT and TLS_KEY", "only one of them is set")
	} else if err := c.load(); err != nil {
		r.fail("TLS_CERT and TLS_KEY", "%v", err)
	}
	return c
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
		u := url.URL{Scheme: "postgres", User: url.UserPassword(r.text("DB_USER", "postgres"), cmp.Or(r.secret("DB_PASSWORD"), "postgres")),
			Path: "/" + r.text("DB_NAME", "session_replay")}
		u.RawQuery = url.Values{"host": {r.text("DB_HOST", "localhost")}, "port": {strconv.Itoa(r.number("DB_PORT", 5432, 1, 65535))}}.Encode()
		name, dsn = "DB_HOST, DB_NAME, DB_USER or DB_PASSWORD", u.String()
	}
	c, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		r.fail(name, "cannot be parsed as a PostgreSQL connection") // pgx's error may quote the password
		return nil
	}
	if c.ConnConfig.Password == "" {
		c.ConnConfig.Password = r.secret("DB_PASSWORD")
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
