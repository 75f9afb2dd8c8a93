package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

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
		trustProxy: r.flag("TRUST_PROXY"), metricsOpen: r.flag("METRICS_OPEN"),
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
