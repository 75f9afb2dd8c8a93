package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5/pgxpool"
)

// config is all settings, read once at the start. What each is for stands in
// .env.example.
type config struct {
	host, port string
	database   *pgxpool.Config
	log        logConfig
	accessConfig

	certificate  *certificate  // nil without TLS
	notifySocket string        // of systemd, empty when it does not wait for us
	watchdog     time.Duration // systemd ends a server that is silent for so long; 0: never

	// Sessions in one transaction; events of one session that stay in memory.
	batchSize, maxEvents int
	batchInterval        time.Duration
	cleanupInterval      time.Duration
	heartbeat            time.Duration
	// How long a session waits for its tracker; 0 ends it with its connection.
	grace             time.Duration
	messageTimeout    time.Duration
	readHeaderTimeout time.Duration
	retention         time.Duration

	// Bytes, but for the last, a count. 0 means no limit for maxStorageBytes alone.
	maxMessageBytes, maxBufferBytes, maxHeaderBytes int
	maxSessionBytes, maxStorageBytes                int
	maxSessionsPerMinute                            int
}

// memoryLimit is the most that the process takes with everything full: the budget
// and the one message that may go beyond it, viewers' outboxes, answers that are
// being written and the one event that may go beyond those, what the writers
// compress and send, the connections, and what the program takes by itself.
func (c config) memoryLimit() int64 {
	const connection, program = 32 << 10, 96 << 20
	return int64(c.maxBufferBytes) + 2*outgoingBytes(c) + 3*int64(c.maxMessageBytes) +
		writers*2*maxFlushBytes + int64(c.maxConnections)*connection + program
}

// loadConfig reads the settings, each with its name, its default and the least
// and most that make sense. The error names the first setting that is wrong.
func loadConfig(getenv func(string) string) (config, error) {
	const ms = time.Millisecond
	r := settings{getenv: getenv}
	c := config{
		host:                 r.text("HOST", "127.0.0.1"),
		port:                 strconv.Itoa(r.number("PORT", "8080", 0, 65535)),
		database:             r.database(),
		log:                  r.logs(),
		accessConfig:         r.access(),
		certificate:          r.certificate(),
		notifySocket:         getenv("NOTIFY_SOCKET"),
		watchdog:             time.Duration(r.number("WATCHDOG_USEC", "0", 0, 1<<50)) * time.Microsecond,
		batchSize:            r.number("BATCH_SIZE", "50", 1, 10000),
		batchInterval:        r.duration("BATCH_INTERVAL", "5s", ms, ms),
		maxEvents:            r.number("MAX_EVENTS_PER_SESSION", "20000", 1, 1<<30),
		cleanupInterval:      r.duration("SESSION_CLEANUP_INTERVAL", "5m", ms, ms),
		heartbeat:            r.duration("HEARTBEAT_INTERVAL", "30s", ms, 10*ms),
		grace:                r.duration("SESSION_GRACE_PERIOD", "15s", ms, 0),
		messageTimeout:       r.duration("MESSAGE_TIMEOUT", "60s", ms, ms),
		readHeaderTimeout:    r.duration("READ_HEADER_TIMEOUT", "10s", ms, ms),
		retention:            r.duration("RETENTION_HOURS", "30d", time.Hour, time.Hour),
		maxMessageBytes:      r.size("MAX_MESSAGE_BYTES", "32MB", 1024, 1<<30),
		maxBufferBytes:       r.size("MAX_BUFFER_BYTES", "256MB", 1<<20, 1<<40),
		maxHeaderBytes:       r.size("MAX_HEADER_BYTES", "16KB", 4<<10, 1<<20),
		maxSessionBytes:      r.size("MAX_SESSION_BYTES", "1GB", 1, 1<<50),
		maxStorageBytes:      r.size("MAX_STORAGE_BYTES", "0", 0, 1<<60),
		maxSessionsPerMinute: r.number("MAX_SESSIONS_PER_MINUTE", "30", 1, 1<<20),
	}
	return c, r.err
}

// access reads who may do what, and refuses what would look protected and is not.
func (r *settings) access() accessConfig {
	c := accessConfig{
		token: r.secret("ACCESS_TOKEN"), key: r.secret("INGEST_KEY"),
		trackerOrigins: []string{"*"},
		viewerOrigins:  r.list("VIEWER_ORIGINS", parseOrigin),
		mediaOrigins:   r.list("MEDIA_ORIGINS", parseOrigin),
		publicHosts:    r.list("PUBLIC_HOSTS", parseHost),
		trustProxy:     r.flag("TRUST_PROXY"), metricsOpen: r.flag("METRICS_OPEN"),
		maxConnections: r.number("MAX_CONNECTIONS", "10000", 1, 1<<20),
		maxPerAddress:  r.number("MAX_CONNECTIONS_PER_ADDRESS", "200", 1, 1<<20),
	}
	if r.text("TRACKER_ORIGINS", "*") != "*" {
		c.trackerOrigins = r.list("TRACKER_ORIGINS", parseOrigin)
	}
	if c.token != "" && len(c.token) < minTokenLength {
		r.refuse("ACCESS_TOKEN", "has fewer than %d characters: make one with openssl rand -hex 24", minTokenLength)
	}
	if c.key != "" && c.key == c.token {
		r.refuse("INGEST_KEY", "must not be the same as ACCESS_TOKEN: pages show it to everyone")
	}
	return c
}

// certificate loads TLS_CERT and TLS_KEY, so that a wrong one stops the start; nil
// without TLS.
func (r *settings) certificate() *certificate {
	c := &certificate{cert: r.getenv("TLS_CERT"), key: r.getenv("TLS_KEY")}
	if c.cert == "" && c.key == "" {
		return nil
	}
	if c.cert == "" || c.key == "" {
		r.refuse("TLS_CERT and TLS_KEY", "only one of them is set")
	} else if err := c.load(); err != nil {
		r.refuse("TLS_CERT and TLS_KEY", "%v", err)
	}
	return c
}

// logs reads LOG_MAX_FILES as an age where it has a unit, otherwise as a number
// of files.
func (r *settings) logs() logConfig {
	c := logConfig{dir: r.text("LOG_DIR", "logs"), zipped: r.flag("LOG_ZIPPED")}
	c.maxSize = int64(r.size("LOG_MAX_SIZE", "20MB", 1, 1<<50))
	if err := c.level.UnmarshalText([]byte(r.text("LOG_LEVEL", "info"))); err != nil {
		r.refuse("LOG_LEVEL", "%q is none of debug, info, warn, error", r.getenv("LOG_LEVEL"))
	}
	if _, err := strconv.Atoi(r.getenv("LOG_MAX_FILES")); err == nil {
		c.maxCount = r.number("LOG_MAX_FILES", "", 1, 1<<20)
	} else {
		c.maxAge = r.duration("LOG_MAX_FILES", "14d", 0, time.Hour)
	}
	return c
}

// database makes the pool's configuration from DATABASE_URL, which DB_PASSWORD completes, or from
// the DB_ settings. It is nil where they cannot be parsed: r.err then has that, and the start ends.
func (r *settings) database() *pgxpool.Config {
	const ms = time.Millisecond
	password := r.secret("DB_PASSWORD")
	u := url.URL{Scheme: "postgres", Path: "/" + r.text("DB_NAME", "session_replay")}
	u.User = url.UserPassword(r.text("DB_USER", "postgres"), cmp.Or(password, "postgres"))
	port := strconv.Itoa(r.number("DB_PORT", "5432", 1, 65535))
	u.RawQuery = url.Values{"host": {r.text("DB_HOST", "localhost")}, "port": {port}}.Encode()
	c, err := pgxpool.ParseConfig(r.text("DATABASE_URL", u.String()))
	if err != nil { // it may quote the password
		r.refuse("DATABASE_URL or the DB_ settings", "cannot be parsed as a PostgreSQL connection")
		return nil
	}
	c.ConnConfig.Password = cmp.Or(c.ConnConfig.Password, password)
	c.MaxConns = int32(r.number("DB_MAX_CONNECTIONS", "20", writers+1, 10000))
	c.MaxConnIdleTime = r.duration("DB_IDLE_TIMEOUT", "30s", ms, ms)
	c.ConnConfig.ConnectTimeout = r.duration("DB_CONNECTION_TIMEOUT", "2s", ms, ms)
	return c
}

// settings reads values, and err says what is wrong with the first that is. Whoever reads them
// looks at err when all have been read, and uses none of them after an error.
type settings struct {
	getenv func(string) string
	err    error
}

// refuse notes what is wrong with a value. The message may quote a value that is not secret.
func (r *settings) refuse(name, format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(name+": "+format, args...)
	}
}

// text takes an empty value for a missing one.
func (r *settings) text(name, preset string) string { return cmp.Or(r.getenv(name), preset) }

// unit may follow a number, under any of its names, in upper or lower case. Messages use the first.
type unit struct {
	size  int64
	names []string
}

// sizes and times stand from the smallest to the largest unit, as inWords needs them.
var (
	sizes = []unit{{1, []string{"bytes", "b"}}, {1 << 10, []string{"KB", "k"}}, {1 << 20, []string{"MB", "m"}},
		{1 << 30, []string{"GB", "g"}}, {1 << 40, []string{"TB", "t"}}}
	times = []unit{{int64(time.Millisecond), []string{"ms"}},
		{int64(time.Second), []string{"seconds", "s", "sec", "second"}},
		{int64(time.Minute), []string{"minutes", "m", "min", "minute"}},
		{int64(time.Hour), []string{"hours", "h", "hour"}},
		{int64(24 * time.Hour), []string{"days", "d", "day"}}}
)

// inWords gives a number in the largest unit that goes into it more than once: "24 hours".
func inWords(n int64, units []unit) string {
	for i, u := range slices.Backward(units) {
		if n%u.size == 0 && (n > u.size || i == 0) {
			return fmt.Sprint(n/u.size, " ", u.names[0])
		}
	}
	return strconv.FormatInt(n, 10)
}

// quantity reads a number with a unit. A number without one counts in plain, as it
// did before settings had units; where plain is 0 it is refused.
func (r *settings) quantity(name, preset string, units []unit, plain, least, most int64) int64 {
	v := r.text(name, preset)
	digits := strings.TrimRightFunc(v, unicode.IsLetter)
	size, letters := plain, v[len(digits):]
	if letters != "" {
		size = 0
	}
	for _, u := range units {
		if slices.ContainsFunc(u.names, func(name string) bool { return strings.EqualFold(name, letters) }) {
			size = u.size
		}
	}
	n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
	if err != nil || size == 0 || n < 0 || n > most/size || n*size < least {
		r.refuse(name, "%q is not a whole number from %s to %s", v, inWords(least, units), inWords(most, units))
		return 0
	}
	return n * size
}

// number reads a count, which has no unit. Both bounds are allowed values.
func (r *settings) number(name, preset string, least, most int64) int {
	return int(r.quantity(name, preset, nil, 1, least, most))
}

// size reads bytes.
func (r *settings) size(name, preset string, least, most int64) int {
	return int(r.quantity(name, preset, sizes, 1, least, most))
}

// duration counts a number without a unit in plain; with plain 0 it must have a unit.
func (r *settings) duration(name, preset string, plain, least time.Duration) time.Duration {
	const most = 100 * 365 * 24 * time.Hour
	return time.Duration(r.quantity(name, preset, times, int64(plain), int64(least), int64(most)))
}

func (r *settings) flag(name string) bool {
	v := r.text(name, "false")
	on, err := strconv.ParseBool(v)
	if err != nil {
		r.refuse(name, "%q is neither true nor false", v)
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
		r.refuse(name, "%v", err)
	}
	return strings.TrimSpace(string(content))
}

// list reads values with commas between them, each as parse gives it; empty ones are left out.
func (r *settings) list(name string, parse func(string) (string, error)) (all []string) {
	for v := range strings.SplitSeq(r.getenv(name), ",") {
		if v = strings.TrimSpace(v); v == "" {
			continue
		}
		parsed, err := parse(v)
		if err != nil {
			r.refuse(name, "%v", err)
		}
		all = append(all, parsed)
	}
	return all
}

// url is the link to a listener on this machine. For 0.0.0.0 and :: it names an address that other
// machines reach.
func (c config) url(host, port string) string {
	scheme := "http://"
	if c.certificate != nil {
		scheme = "https://"
	}
	if addr, err := netip.ParseAddr(host); err == nil && addr.IsUnspecified() {
		host = ownAddress()
	}
	return scheme + net.JoinHostPort(host, port)
}

// ownAddress is where other machines reach this one: its first address in a
// network, or localhost where it is in none.
func ownAddress() string {
	addresses, _ := net.InterfaceAddrs()
	for _, a := range addresses {
		if network, ok := a.(*net.IPNet); ok && network.IP.IsGlobalUnicast() {
			return network.IP.String()
		}
	}
	return "localhost"
}

// readConfig reads the settings of the environment and of a .env file, if there
// is one. The environment wins. A name in the file that is no setting is a
// mistake; the environment has names of other programs too.
func readConfig(getenv func(string) string, file string) (config, error) {
	text, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return config{}, fmt.Errorf("read settings: %w", err)
	}
	values := map[string]string{}
	for i, line := range strings.Split(string(text), "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimPrefix(line, "export "), "=")
		if !ok {
			return config{}, fmt.Errorf("%s:%d: not a line of the form NAME=value", file, i+1)
		}
		values[strings.TrimSpace(name)] = unquoteValue(strings.TrimSpace(value))
	}
	known := map[string]bool{}
	c, err := loadConfig(func(name string) string {
		known[name] = true
		return cmp.Or(getenv(name), values[name])
	})
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if !known[name] {
			return config{}, fmt.Errorf("%s: %q is not a setting; did you mean %s?", file, name, nearest(name, known))
		}
	}
	return c, err
}

// unquoteValue takes off the quotes around a value, or else the comment behind it.
func unquoteValue(v string) string {
	if n := len(v); n >= 2 && (v[0] == '"' || v[0] == '\'') && v[n-1] == v[0] {
		return v[1 : n-1]
	}
	v, _, _ = strings.Cut(v, " #")
	return strings.TrimSpace(v)
}

// nearest gives the known name that shares the most pairs of letters with a mistaken
// one: typing errors and forgotten words leave most pairs as they are.
func nearest(name string, known map[string]bool) string {
	// A long name shares pairs by chance: its length counts against it.
	shared := func(other string) int {
		n := -len(other)
		for i := range len(name) - 1 {
			n += 2 * min(1, strings.Count(other, strings.ToUpper(name[i:i+2])))
		}
		return n
	}
	return slices.MaxFunc(slices.Sorted(maps.Keys(known)), func(a, b string) int { return shared(a) - shared(b) })
}
