// Command session-replay records browser sessions (rrweb events over a
// WebSocket), shows them live and replays them. It keeps them in PostgreSQL.
// README.md shows the way of an event, and in which order to read the files.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	beatEvery    = 2 * time.Second  // the database is told that this server is there
	sweepEvery   = 10 * time.Second // sessions that nobody records are ended
	pulseEvery   = time.Second      // the database is asked whether it answers
	maxWaiting   = time.Minute      // for a commit beyond BATCH_INTERVAL, or failing: see illness
	shutdownTime = 18 * time.Second // for everything; session-replay.service allows 30
)

// main ends with status 1 when the start or -check fails, or not everything was stored. A second
// signal is not heard while the server stops, which takes shutdownTime at most.
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
	checkOnly := flags.Bool("check", false, "try what the start would do, print what it finds, and exit")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: settings come from the environment and .env", flags.Arg(0))
	}
	if *printVersion {
		info, _ := debug.ReadBuildInfo()
		fmt.Fprintf(stdout, "session-replay %s\n%v", version(), info)
		return nil
	}
	cfg, err := readConfig(getenv, ".env")
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
		debug.SetMemoryLimit(cfg.memoryLimit())
	}
	logs := openLogs(cfg.log, stdout, stderr, getenv("JOURNAL_STREAM") != "")
	defer logs.Close()
	s, err := assemble(cfg, logs)
	if err != nil {
		return err
	}
	defer s.store.close()
	if s.access.generated {
		fmt.Fprintf(stdout, "ACCESS_TOKEN is not set and HOST is open to a network; "+
			"until the next start, viewers come by this link:\n%s/?token=%s\n"+
			"Servers that share a database all need the same ACCESS_TOKEN.\n", cfg.url(cfg.host, cfg.port),
			s.access.token)
	}
	return s.run(ctx)
}

// assemble makes the parts and starts none of them: housekeep is the first to ask the database, and
// run starts the hub and the writers. The caller closes the store.
func assemble(cfg config, logs *logs) (*server, error) {
	st, err := openStore(context.Background(), cfg.database, logs.rejected)
	if err != nil {
		return nil, err
	}
	m := &metrics{}
	b := newBudget(int64(cfg.maxBufferBytes))
	h := newHub(cfg, b, m)
	s := &server{core: core{cfg: cfg, hub: h, store: st, budget: b, outgoing: newBudget(outgoingBytes(cfg)),
		metrics: m, logs: logs, log: logs.app}, started: time.Now(), fetches: &fetches{},
		access: newAccess(cfg.accessConfig, cfg.host, cfg.port, logs.app),
		audit:  &audit{log: logs.app, noted: map[string]time.Time{}}}
	starting := "the database has not answered yet"
	s.reason.Store(&starting)
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

// run starts each part after those that it needs. It stops housekeeping, then in the order in which
// they feed each other: HTTP, the connections, the hub with its writers.
func (s *server) run(ctx context.Context) error {
	listener, err := listen(s.cfg)
	if err != nil {
		return err
	}
	// work ends when run returns. When not everything was stored by then, that cuts
	// a commit short: PostgreSQL has all of it or nothing, and trackers send again.
	work, giveUp := context.WithCancel(context.Background())
	defer giveUp()
	s.ctx = work
	house, stopHouse := context.WithCancel(work)
	defer stopHouse()
	go s.hub.run(work) // ends when it is drained
	for _, w := range s.writers {
		go w.run(work) // ends with the hub
	}
	go s.housekeep(house)     // ends with house
	go s.handleSignals(house) // ends with house
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
	s.log.Info("listening", "url", s.cfg.url(s.cfg.host, port), "version", version(),
		"retention", inWords(int64(s.cfg.retention), times))
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
	// The first Shutdown closes the listener now. The second waits for answers that are being
	// written, which may take a second after the last commit.
	go srv.Shutdown(ctx)                                     // ends with ctx at the latest
	closing, cancel := context.WithTimeout(ctx, 3*closeTime) // the drain waits no longer than that
	defer cancel()
	s.closeAll(closing)
	s.hub.send(drain{})
	select {
	case <-s.hub.done:
		s.log.Info("stopped, everything is stored")
	case <-ctx.Done():
		return errors.New("stopped before everything was stored: the database did not take it in time")
	}
	answering, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	srv.Shutdown(answering)
	srv.Close()
	return nil
}

// listen opens HOST and PORT. With TLS it offers HTTP/1.1 alone, which WebSockets need.
func listen(cfg config) (net.Listener, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort(cfg.host, cfg.port))
	if err != nil {
		return nil, fmt.Errorf("HOST and PORT: %w", err)
	}
	if c := cfg.certificate; c != nil {
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

// load reads both files. With an error the pair that was read before stays.
func (c *certificate) load() error {
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err == nil {
		c.pair.Store(&pair)
	}
	return err
}

// handleSignals reads the certificate again on SIGHUP, and tells systemd's watchdog,
// at intervals, that the hub answers. While the hub hangs handleSignals waits for
// it, and systemd starts the server anew.
func (s *server) handleSignals(ctx context.Context) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP) // to the end: without it SIGHUP ends the process
	var watchdog <-chan time.Time
	if s.cfg.watchdog > 0 {
		watchdog = time.Tick(s.cfg.watchdog / 2)
	}
	for {
		select {
		case <-hangup:
			s.reloadCertificate()
		case <-watchdog:
			s.stats()
			s.notify("WATCHDOG=1")
		case <-ctx.Done():
			return
		}
	}
}

// reloadCertificate is SIGHUP's work; without TLS there is none. Connections that are open keep
// the certificate that they began with.
func (s *server) reloadCertificate() {
	if s.cfg.certificate == nil {
		return
	}
	if err := s.cfg.certificate.load(); err != nil {
		s.logs.rejected.Error("certificate not read again, the old one stays", "err", err)
		return
	}
	s.log.Info("certificate read again")
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

// housekeep applies the schema as soon as the database is there. From then on it says that this
// server is there, ends sessions that nobody records, follows other servers, and deletes what is
// old.
func (s *server) housekeep(ctx context.Context) {
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
	// These end with ctx; none keeps another waiting.
	go s.every(ctx, beatEvery, s.beat)
	go s.every(ctx, sweepEvery, s.sweep)
	go s.every(ctx, followEvery, (&follower{hub: s.hub, store: s.store}).look)
	if otherHosts(s.cfg.database.ConnConfig) {
		go s.every(ctx, pulseEvery, s.store.pulse)
	}
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

// beat tells the database that this server is there, and finds out whether the
// server can store what it is sent. /health answers with the result, and the log
// has a reason once a minute.
func (s *server) beat(ctx context.Context) {
	reason := s.illness(s.store.beat(ctx))
	if ctx.Err() != nil {
		return
	}
	s.reason.Store(&reason)
	if reason == "" {
		s.reasonLogged = time.Time{}
	} else if time.Since(s.reasonLogged) > time.Minute {
		s.reasonLogged = time.Now()
		s.logs.rejected.Error("unhealthy", "reason", reason)
	}
}

// illness says why the server cannot store what it is sent; "" when it can. beat is the error of
// this beat and comes first, then what somebody has to mend, then what may pass by itself.
func (s *server) illness(beat error) string {
	waiting, last := s.stats().oldest, s.store.last.Load()
	late, fresh := waiting > s.cfg.batchInterval+maxWaiting, last != nil && time.Since(last.at) < time.Minute
	switch {
	case beat != nil:
		return fmt.Sprintf("the database takes no writes: %v", beat)
	case fresh && isOperatorError(last.err):
		return fmt.Sprintf("the database refuses a statement: %v", last.err)
	case late && last != nil:
		return fmt.Sprintf("the oldest event has waited %v for its commit: %v", waiting.Round(time.Second), last.err)
	case fresh && last.at.Sub(last.since) > maxWaiting:
		return fmt.Sprintf("the database has failed for %v: %v", last.at.Sub(last.since).Round(time.Second), last.err)
	case late:
		return fmt.Sprintf("the oldest event has waited %v for its commit", waiting.Round(time.Second))
	}
	return ""
}

// sweep ends sessions in the database that nobody records, of any server. What this hub holds is
// recorded, or waits for its tracker, or for its last commit.
func (s *server) sweep(ctx context.Context) {
	reply := make(chan map[string]string, 1)
	held, ok := ask(s.hub, reply, stateQuery{nil, reply})
	if !ok {
		return
	}
	if err := s.store.endLost(ctx, slices.AppendSeq([]string{}, maps.Keys(held))); err != nil && ctx.Err() == nil {
		s.store.failed(err)
	}
}

// cleanUp deletes what RETENTION_HOURS and MAX_STORAGE_BYTES no longer keep. It counts what was
// deleted before an error, too.
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
	if info, ok := debug.ReadBuildInfo(); ok {
		return cmp.Or(stamped, info.Main.Version)
	}
	return cmp.Or(stamped, "unknown")
}

// stamped is set by the linker (-X main.stamped=…).
var stamped string
