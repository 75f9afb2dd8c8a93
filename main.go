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
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	beatEvery    = 2 * time.Second  // that this server is there
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
	h := newHub(cfg, b, m)
	s := &server{core: core{cfg: cfg, hub: h, store: st, budget: b, outgoing: newBudget(int64(cfg.maxBufferBytes) / 4),
		metrics: m, logs: logs, log: logs.app}, started: time.Now(), origins: &origins{}, access: newAccess(cfg.accessConfig, cfg.host, cfg.port)}
	for range writers {
		s.writers = append(s.writers, &writer{hub: s.hub, store: st, metrics: m, log: logs.rejected})
	}
	var bundled bool
	if s.files, bundled = assets(); !bundled {
		s.log.Warn("the recorder was not bundled: run 'make web' and build again")
	}
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
	s.closeAll(ctx)
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

// works asks the hub.
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
	go s.every(ctx, beatEvery, s.beat) // ends with ctx; a long cleanup does not keep it waiting
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

func (s *server) beat(ctx context.Context) {
	if err := s.store.beat(ctx); err != nil && ctx.Err() == nil {
		s.logs.rejected.Warn("the database was not told that this server is there", "err", err)
	}
}

func (s *server) cleanUp(ctx context.Context) {
	n, err := s.store.removeOld(ctx, s.cfg.retention, int64(s.cfg.maxStorageBytes))
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
