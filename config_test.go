package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// envOf makes an environment of "NAME=value" pairs.
func envOf(pairs ...string) func(string) string {
	return func(name string) (value string) {
		for _, pair := range pairs {
			if v, ok := strings.CutPrefix(pair, name+"="); ok {
				value = v
			}
		}
		return value
	}
}

func mustLoad(t testing.TB, pairs ...string) config {
	t.Helper()
	c, err := loadConfig(envOf(pairs...))
	if err != nil {
		t.Fatalf("%q: %v", pairs, err)
	}
	return c
}

// Every setting has the default that is documented, and is read under its name,
// with a unit and without.
func TestSettings(t *testing.T) {
	const day = 24 * time.Hour
	for _, tt := range []struct {
		name   string
		value  func(config) any
		preset any
		given  map[string]any
	}{
		{"HOST", func(c config) any { return c.host }, "127.0.0.1", map[string]any{"127.0.0.2": "127.0.0.2"}},
		{"PORT", func(c config) any { return c.port }, "8080", map[string]any{"0": "0", "65535": "65535"}},
		{"DATABASE_URL", func(c config) any { return c.database.ConnConfig.Host }, "localhost",
			map[string]any{"postgres://u:p@elsewhere:1/n": "elsewhere"}},
		{"DB_HOST", func(c config) any { return c.database.ConnConfig.Host }, "localhost",
			map[string]any{"db.example": "db.example", "/run/postgresql": "/run/postgresql"}},
		{"DB_PORT", func(c config) any { return int(c.database.ConnConfig.Port) }, 5432, map[string]any{"101": 101}},
		{"DB_NAME", func(c config) any { return c.database.ConnConfig.Database }, "session_replay",
			map[string]any{"some name": "some name"}},
		{"DB_USER", func(c config) any { return c.database.ConnConfig.User }, "postgres",
			map[string]any{"us er": "us er"}},
		{"DB_PASSWORD", func(c config) any { return c.database.ConnConfig.Password }, "postgres",
			map[string]any{"p@/?#:% \"'\\": "p@/?#:% \"'\\"}},
		{"DB_MAX_CONNECTIONS", func(c config) any { return int(c.database.MaxConns) }, 20, map[string]any{"98": 98}},
		{"DB_IDLE_TIMEOUT", func(c config) any { return c.database.MaxConnIdleTime }, 30 * time.Second,
			map[string]any{"99": 99 * time.Millisecond}},
		{"DB_CONNECTION_TIMEOUT", func(c config) any { return c.database.ConnConfig.ConnectTimeout }, 2 * time.Second,
			map[string]any{"3s": 3 * time.Second}},
		{"BATCH_SIZE", func(c config) any { return c.batchSize }, 50, map[string]any{"82": 82}},
		{"BATCH_INTERVAL", func(c config) any { return c.batchInterval }, 5 * time.Second, map[string]any{
			"83": 83 * time.Millisecond, "500ms": 500 * time.Millisecond, "7s": 7 * time.Second,
			"2 min": 2 * time.Minute, "3m": 3 * time.Minute, "1H": time.Hour}},
		{"MAX_EVENTS_PER_SESSION", func(c config) any { return c.maxEvents }, 20000, map[string]any{"84": 84}},
		{"SESSION_CLEANUP_INTERVAL", func(c config) any { return c.cleanupInterval }, 5 * time.Minute,
			map[string]any{"300000": 5 * time.Minute}},
		{"SESSION_GRACE_PERIOD", func(c config) any { return c.grace }, 15 * time.Second,
			map[string]any{"0": time.Duration(0), "1 minutes": time.Minute}},
		{"HEARTBEAT_INTERVAL", func(c config) any { return c.heartbeat }, 30 * time.Second,
			map[string]any{"87": 87 * time.Millisecond}},
		{"MESSAGE_TIMEOUT", func(c config) any { return c.messageTimeout }, time.Minute,
			map[string]any{"88": 88 * time.Millisecond}},
		{"READ_HEADER_TIMEOUT", func(c config) any { return c.readHeaderTimeout }, 10 * time.Second,
			map[string]any{"89": 89 * time.Millisecond}},
		{"RETENTION_HOURS", func(c config) any { return c.retention }, 30 * day,
			map[string]any{"90": 90 * time.Hour, "30d": 30 * day, "12h": 12 * time.Hour, "2 days": 2 * day}},
		{"MAX_MESSAGE_BYTES", func(c config) any { return c.maxMessageBytes }, 33554432,
			map[string]any{"9100": 9100, "5KB": 5120, "1GB": 1 << 30}},
		{"MAX_BUFFER_BYTES", func(c config) any { return c.maxBufferBytes }, 268435456,
			map[string]any{"92000000": 92000000, "64 mb": 64 << 20, "1t": 1 << 40}},
		{"MAX_HEADER_BYTES", func(c config) any { return c.maxHeaderBytes }, 16384, map[string]any{"9400": 9400}},
		{"MAX_SESSION_BYTES", func(c config) any { return c.maxSessionBytes }, 1073741824,
			map[string]any{"95": 95, "95 bytes": 95}},
		{"MAX_STORAGE_BYTES", func(c config) any { return c.maxStorageBytes }, 0, map[string]any{"50G": 50 << 30}},
		{"MAX_CONNECTIONS", func(c config) any { return c.maxConnections }, 10000, map[string]any{"93": 93}},
		{"MAX_CONNECTIONS_PER_ADDRESS", func(c config) any { return c.maxPerAddress }, 200, map[string]any{"94": 94}},
		{"MAX_SESSIONS_PER_MINUTE", func(c config) any { return c.maxSessionsPerMinute }, 30, map[string]any{"97": 97}},
		{"LOG_LEVEL", func(c config) any { return c.log.level.String() }, "INFO", map[string]any{"warn": "WARN"}},
		{"LOG_DIR", func(c config) any { return c.log.dir }, "logs", map[string]any{"/somewhere": "/somewhere"}},
		{"LOG_MAX_SIZE", func(c config) any { return c.log.maxSize }, int64(20 << 20),
			map[string]any{"102k": int64(102 << 10), "1g": int64(1 << 30), "1048577": int64(1048577)}},
		{"LOG_MAX_FILES", func(c config) any { return fmt.Sprint(c.log.maxAge, c.log.maxCount) }, "336h0m0s 0",
			map[string]any{"103": "0s 103", "1D": "24h0m0s 0"}},
		{"LOG_ZIPPED", func(c config) any { return c.log.zipped }, false, map[string]any{"true": true}},
		{"TRUST_PROXY", func(c config) any { return c.trustProxy }, false, map[string]any{"1": true}},
		{"METRICS_OPEN", func(c config) any { return c.metricsOpen }, false, map[string]any{"true": true}},
		{"ACCESS_TOKEN", func(c config) any { return c.token }, "",
			map[string]any{"sixteen letters.": "sixteen letters."}},
		{"INGEST_KEY", func(c config) any { return c.key }, "", map[string]any{"k": "k"}},
		{"TRACKER_ORIGINS", func(c config) any { return fmt.Sprint(c.trackerOrigins) }, "[*]", map[string]any{
			" HTTPS://Shop.example ,http://[::1]:99,": "[https://shop.example http://[::1]:99]", ",": "[]"}},
		{"VIEWER_ORIGINS", func(c config) any { return fmt.Sprint(c.viewerOrigins) }, "[]",
			map[string]any{"https://v.example": "[https://v.example]"}},
		{"PUBLIC_HOSTS", func(c config) any { return fmt.Sprint(c.publicHosts) }, "[]",
			map[string]any{"A.example:8443 , b.example": "[a.example:8443 b.example]"}},
	} {
		if got := tt.value(mustLoad(t)); got != tt.preset {
			t.Errorf("%s: got %v by default, want %v", tt.name, got, tt.preset)
		}
		for text, want := range tt.given {
			if got := tt.value(mustLoad(t, tt.name+"="+text)); got != want {
				t.Errorf("%s=%s: got %v, want %v", tt.name, text, got, want)
			}
		}
	}
}

// A setting that makes no sense stops the start with one line that names it.
func TestSettingsRefused(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	testCertificate(t, cert, key, 1)
	var bad []string
	for _, name := range strings.Fields("PORT BATCH_SIZE BATCH_INTERVAL MAX_EVENTS_PER_SESSION SESSION_CLEANUP_INTERVAL " +
		"SESSION_GRACE_PERIOD HEARTBEAT_INTERVAL MESSAGE_TIMEOUT READ_HEADER_TIMEOUT RETENTION_HOURS " +
		"MAX_MESSAGE_BYTES MAX_BUFFER_BYTES MAX_CONNECTIONS MAX_CONNECTIONS_PER_ADDRESS MAX_HEADER_BYTES " +
		"MAX_SESSION_BYTES MAX_STORAGE_BYTES MAX_SESSIONS_PER_MINUTE DB_MAX_CONNECTIONS DB_IDLE_TIMEOUT " +
		"DB_CONNECTION_TIMEOUT DB_PORT LOG_MAX_SIZE LOG_MAX_FILES WATCHDOG_USEC") {
		for _, value := range []string{"-1", "x", "1.5", "1e3", "5 parrots", "99999999999999999999",
			"9223372036854775807d", "9999999999999t", "NaN", "0x10", "10\nand more"} {
			bad = append(bad, name+"="+value)
		}
		if !strings.Contains("PORT SESSION_GRACE_PERIOD MAX_STORAGE_BYTES WATCHDOG_USEC", name) {
			bad = append(bad, name+"=0")
		}
	}
	bad = append(bad, "PORT=65536", "DB_PORT=65536", "BATCH_SIZE=5s", "BATCH_SIZE=5b", "BATCH_INTERVAL=5MB",
		"MAX_BUFFER_BYTES=5d", "MAX_BUFFER_BYTES=1023KB",
		"RETENTION_HOURS=59m", "BATCH_INTERVAL=101 years", "LOG_LEVEL=loud", "LOG_MAX_FILES=1w", "LOG_ZIPPED=perhaps",
		"TRUST_PROXY=perhaps", "METRICS_OPEN=2",
		"DATABASE_URL=postgres://user:secret@host:port/x", "DATABASE_URL=not a url secret",
		"ACCESS_TOKEN=fifteen secret.", "INGEST_KEY=the same secret as ACCESS_TOKEN=the same secret as",
		"TRACKER_ORIGINS=shop.example", "TRACKER_ORIGINS=https://shop.example/",
		"TRACKER_ORIGINS=https://a.example,*", "TRACKER_ORIGINS=ftp://a.example",
		"TRACKER_ORIGINS=https://u:p@a.example", "VIEWER_ORIGINS=*", "VIEWER_ORIGINS=null",
		"VIEWER_ORIGINS=https://a.example https://b.example", "VIEWER_ORIGINS=https://",
		"PUBLIC_HOSTS=https://a.example", "PUBLIC_HOSTS=a.example/x", "PUBLIC_HOSTS=a b", "PUBLIC_HOSTS=:80",
		"PUBLIC_HOSTS=u@a.example",
		"TLS_CERT="+cert, "TLS_KEY="+key, "TLS_CERT=/none TLS_KEY="+key, "TLS_CERT="+key+" TLS_KEY="+cert)
	t.Chdir(t.TempDir()) // no .env of a developer's
	for _, setting := range bad {
		pairs := strings.Split(regexp.MustCompile(` ([A-Z_]+=)`).ReplaceAllString(setting, "\x00$1"), "\x00")
		name, _, _ := strings.Cut(setting, "=")
		var out bytes.Buffer
		err := run(t.Context(), []string{"-check"}, envOf(pairs...), &out, &out)
		if err == nil || !strings.Contains(err.Error(), name) || strings.ContainsAny(err.Error(), "\n") ||
			out.Len() > 0 {
			t.Errorf("%s: got error %v and %q, want one line that names it", setting, err, &out)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error tells a secret: %v", setting, err)
		}
	}
	for setting, want := range map[string]string{
		"PUBLIC_HOSTS=https://x": `PUBLIC_HOSTS: "https://x" is not of the form host[:port]`,
		"BATCH_INTERVAL=never":   `BATCH_INTERVAL: "never" is not a whole number from 1 ms to 36500 days`,
		"MAX_HEADER_BYTES=2":     `MAX_HEADER_BYTES: "2" is not a whole number from 4 KB to 1024 KB`,
		"BATCH_SIZE=0":           `BATCH_SIZE: "0" is not a whole number from 1 to 10000`,
	} {
		if _, err := loadConfig(envOf(setting)); err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", setting, err, want)
		}
	}
}

// A systemd credential stands for a secret that is not set.
func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"db_password": "p:w \n", "access_token": "from a credential\n",
		"ingest_key": " \n"} {
		os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)
	}
	for _, tt := range []struct {
		env  []string
		want string
	}{
		{nil, "from a credential||p:w"},
		{[]string{"DATABASE_URL=postgres://u@h/d"}, "from a credential||p:w"},
		{[]string{"DATABASE_URL=postgres://u:own@h/d", "ACCESS_TOKEN=from the environment"},
			"from the environment||own"},
	} {
		c := mustLoad(t, append(tt.env, "CREDENTIALS_DIRECTORY="+dir)...)
		if got := c.token + "|" + c.key + "|" + c.database.ConnConfig.Password; got != tt.want {
			t.Errorf("%q: got %s, want %s", tt.env, got, tt.want)
		}
	}
}

// .env.example has each setting with its default, and no others.
func TestSettingsDocumented(t *testing.T) {
	asked := map[string]bool{}
	if _, err := loadConfig(func(name string) string { asked[name] = true; return "" }); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY"} {
		delete(asked, name) // set by systemd
	}
	example, err := os.ReadFile(".env.example")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range regexp.MustCompile(`(?m)^#?([A-Z_]+)=`).FindAllStringSubmatch(string(example), -1) {
		if !asked[line[1]] {
			t.Errorf(".env.example has %s a second time, or nothing reads it", line[1])
		}
		delete(asked, line[1])
	}
	if len(asked) > 0 {
		t.Errorf(".env.example does not have %v", asked)
	}
	file := filepath.Join(t.TempDir(), ".env")
	os.WriteFile(file, regexp.MustCompile(`(?m)^#([A-Z_]+=)`).ReplaceAll(example, []byte("$1")), 0o600)
	shown, err := readConfig(envOf(), file)
	if err != nil || !reflect.DeepEqual(settingsOf(shown), settingsOf(mustLoad(t))) {
		t.Errorf("the values in .env.example are not the defaults: %v\ngot  %v\nwant %v", err, settingsOf(shown),
			settingsOf(mustLoad(t)))
	}
}

// settingsOf is what can be compared of a configuration.
func settingsOf(c config) any {
	pool, conn := c.database, c.database.ConnConfig
	c.database = nil
	return []any{c, conn.Host, conn.Port, conn.Database, conn.User, conn.Password, conn.ConnectTimeout, pool.MaxConns,
		pool.MaxConnIdleTime}
}

func TestDotEnv(t *testing.T) {
	file := filepath.Join(t.TempDir(), ".env")
	for text, want := range map[string]string{
		"":                                  "127.0.0.9 2 session_replay postgres",
		"# a comment\n\nPORT=1\nHOST=h":     "127.0.0.9 2 session_replay postgres", // the environment wins
		"export DB_NAME = a ":               "127.0.0.9 2 a postgres",
		"DB_NAME=\"a # b\"\nDB_USER='q'":    "127.0.0.9 2 a # b q",
		"DB_USER=with=equals # comment\r\n": "127.0.0.9 2 session_replay with=equals",
		"DB_NAME=\r\nDB_USER=u":             "127.0.0.9 2 session_replay u",
		"PORT=1\nnonsense\n":                file + ":2: not a line of the form NAME=value",
		"PORT=1\nexport\n":                  file + ":2: not a line of the form NAME=value",
		"BATCH_INTERVALL=1":                 file + `: "BATCH_INTERVALL" is not a setting; did you mean BATCH_INTERVAL?`,
		"KEEP_RETENTION_HOURS=1": file +
			`: "KEEP_RETENTION_HOURS" is not a setting; did you mean RETENTION_HOURS?`,
		"DB_PASS=x":      file + `: "DB_PASS" is not a setting; did you mean DB_PASSWORD?`,
		"DATABASE_URI=x": file + `: "DATABASE_URI" is not a setting; did you mean DATABASE_URL?`,
		"host=x":         file + `: "host" is not a setting; did you mean HOST?`,
	} {
		os.WriteFile(file, []byte(text), 0o600)
		c, err := readConfig(envOf("PORT=2", "HOST=127.0.0.9", "PGUSER=postgres", "UNKNOWN=x", "GOGC=50"), file)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = fmt.Sprint(c.host, " ", c.port, " ", c.database.ConnConfig.Database, " ", c.database.ConnConfig.User)
		}
		if got != want {
			t.Errorf("%q: got %s, want %s", text, got, want)
		}
	}
	if _, err := readConfig(envOf(), t.TempDir()); err == nil {
		t.Error("a .env that cannot be read: got no error")
	}
}

func TestInWords(t *testing.T) {
	for d, want := range map[time.Duration]string{30 * 24 * time.Hour: "30 days", 36 * time.Hour: "36 hours",
		24 * time.Hour:   "24 hours",
		90 * time.Second: "90 seconds", time.Millisecond: "1 ms", 0: "0 ms", 15 * time.Minute: "15 minutes"} {
		if got := inWords(int64(d), times); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

// As its users start it: one line on stderr and exit 1, or a server that has
// read its .env file.
func TestProcessSettings(t *testing.T) {
	t.Parallel()
	s := newServer(t, "MAX_CONNECTIONS=")
	dotEnv := func(text string) {
		if err := os.WriteFile(filepath.Join(s.dir, ".env"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dotEnv("BATCH_INTERVAL=never\nMAX_CONNECTIONS=many\n") // the environment has another BATCH_INTERVAL, which wins
	s.start()
	<-s.exited
	if code, out := s.cmd.ProcessState.ExitCode(), s.output.String(); code != 1 || strings.Count(out, "\n") != 1 ||
		!strings.Contains(out, "MAX_CONNECTIONS") {
		t.Errorf("got exit code %d and %q, want 1 and one line that names MAX_CONNECTIONS", code, out)
	}
	dotEnv("BATCH_INTERVAL=never\nMAX_CONNECTIONS=1\n")
	s.start()
	s.waitHealthy()
	dialServer(t, s.ws("viewer"))
	if got := s.as(nobody, "GET", "/ws?type=viewer").StatusCode; got != http.StatusServiceUnavailable {
		t.Errorf("a second connection: got %d, want 503, as MAX_CONNECTIONS=1 in .env says", got)
	}
	other := newServer(t, "PORT="+s.port)
	other.start()
	<-other.exited
	if code, out := other.cmd.ProcessState.ExitCode(), other.output.String(); code != 1 || !strings.Contains(out, s.port) {
		t.Errorf("a port in use: got exit code %d and %q, want 1 and an error that names the port", code, out)
	}
}

// testCertificate writes a certificate for 127.0.0.1 and its key.
func testCertificate(t testing.TB, certFile, keyFile string, serial int64) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert},
		keyFile: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	testCertificate(t, cert, key, 1)
	s := newServer(t, "TLS_CERT="+cert, "TLS_KEY="+key, "ACCESS_TOKEN="+testToken)
	s.url = "https://127.0.0.1:" + s.port
	serial := func() int64 {
		conn, err := tls.Dial("tcp", "127.0.0.1:"+s.port, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return 0
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	s.start()
	waitUntil(t, "the server speaks TLS", func() bool { return serial() == 1 })
	if !strings.Contains(s.output.String(), "url=https://127.0.0.1:") {
		t.Errorf("it does not say so: %s", s.output.String())
	}
	if c := s.as(header("Accept", "text/html"), "GET",
		"/?token=the%2Baccess/token%3Dof+a+test").Cookies()[0]; !c.Secure {
		t.Errorf("cookie %v, want Secure", c)
	}
	plainPage := header("Origin", "http://127.0.0.1:"+s.port)
	if resp := s.as(bearer.and("", plainPage), "GET", "/sessions"); resp.StatusCode != 403 {
		t.Errorf("its page without TLS: got %d, want 403", resp.StatusCode)
	}
	os.WriteFile(cert, []byte("broken"), 0o600)
	s.cmd.Process.Signal(syscall.SIGHUP)
	waitUntil(t, "the broken one is refused", func() bool {
		return strings.Contains(s.log(rejectionsLog),
			"certificate not read again")
	})
	if got := serial(); got != 1 {
		t.Errorf("then the certificate is number %d, want the old one", got)
	}
	testCertificate(t, cert, key, 2)
	s.cmd.Process.Signal(syscall.SIGHUP)
	waitUntil(t, "the new certificate is served", func() bool { return serial() == 2 })
	if code, _ := s.term(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	s.tellsNothing(testToken, "the%2Baccess")
}

// ---- -check ----

func TestCheck(t *testing.T) {
	database := testDatabase(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	readOnly := database + map[bool]string{true: "&", false: "?"}[strings.Contains(database,
		"?")] + "default_transaction_read_only=on"
	t.Chdir(t.TempDir()) // no .env of a developer's
	file := filepath.Join(t.TempDir(), "file")
	os.WriteFile(file, nil, 0o600)
	secrets := []string{"ACCESS_TOKEN=" + testToken, "INGEST_KEY=" + testKey, "DB_PASSWORD=the-password"}
	for _, tt := range []struct {
		env      []string
		works    []string // what has a ✓
		not      []string // what has a ✗
		mentions string
	}{
		{[]string{"PORT=0"}, []string{"listens", "LOG_DIR", "database", "PostgreSQL", "clocks", "writes", "pooler"},
			nil, "30 days"},
		{[]string{"PORT=" + port, "LOG_DIR=" + file}, []string{"database", "writes"}, []string{"listens", "LOG_DIR"},
			"address already in use"},
		{[]string{"HOST=0.0.0.0", "ACCESS_TOKEN="}, []string{"listens"}, nil, "several servers need the same one"},
		{[]string{"HOST=no.such.host.invalid", "LOG_DIR=" + file + "/below"}, []string{"database"},
			[]string{"listens", "LOG_DIR"}, "no such host"},
		{[]string{"DATABASE_URL=postgres://u:the-password@127.0.0.1:1/none"}, []string{"LOG_DIR"},
			[]string{"database"}, "connection refused"},
		{[]string{"DATABASE_URL=" + readOnly}, []string{"database", "clocks"}, []string{"writes"}, "read-only"},
	} {
		dir := t.TempDir()
		env := append(append([]string{"HOST=127.0.0.1", "PORT=" + freePort(t), "DATABASE_URL=" + database,
			"LOG_DIR=" + filepath.Join(dir, "logs")}, secrets...), tt.env...)
		var out, errs bytes.Buffer
		err := run(t.Context(), []string{"-check"}, envOf(env...), &out, &errs)
		if (err != nil) != (len(tt.not) > 0) {
			t.Errorf("%q: got error %v", tt.env, err)
		}
		for mark, names := range map[string][]string{"✓": tt.works, "✗": tt.not} {
			for _, name := range names {
				if !regexp.MustCompile(`(?m)^` + mark + ` ` + name + ` `).Match(out.Bytes()) {
					t.Errorf("%q: got no %s %s", tt.env, mark, name)
				}
			}
		}
		if marks, lines := len(tt.works)+len(tt.not), regexp.MustCompile(`(?m)^[✓✗].*$`).FindAllString(out.String(),
			-1); len(lines) < marks || strings.Count(out.String(), "\n") != len(lines)+3 {
			t.Errorf("%q: got %d lines, want one for each thing", tt.env, len(lines))
		}
		if text := out.String() + errs.String() + fmt.Sprint(err); !strings.Contains(text, tt.mentions) || t.Failed() {
			t.Errorf("%q: got, without %q:\n%s", tt.env, tt.mentions, text)
		} else if regexp.MustCompile("the-password|" + regexp.QuoteMeta(testToken) + "|" + testKey).MatchString(text) {
			t.Errorf("%q tells a secret:\n%s", tt.env, text)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%q left %v", tt.env, left)
		}
	}
	if n := querySQL[int](t, database, "select count(*) from pg_tables where schemaname = 'public'"); n != 0 {
		t.Errorf("it made %d tables", n)
	}
}

func TestArguments(t *testing.T) {
	for _, tt := range []struct{ argument, want, err string }{
		{"-version", "session-replay ", ""},
		{"-h", "Usage of session-replay", ""},
		{"-nonsense", "flag provided but not defined", "not defined"},
		{"serve", "", `unexpected argument "serve"`},
	} {
		var out bytes.Buffer
		err := run(t.Context(), []string{tt.argument}, envOf(), &out, &out)
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) ||
			!strings.Contains(out.String(), tt.want) {
			t.Errorf("%s: got %q, error %v, want %q, %q", tt.argument, &out, err, tt.want, tt.err)
		}
	}
}

// A link is of use to another machine: without a network there is none.
func TestConfigURL(t *testing.T) {
	for host, want := range map[string]string{
		"127.0.0.1": "http://127.0.0.1:1", "replay.example": "http://replay.example:1", "::1": "http://[::1]:1",
		"0.0.0.0": "http://" + net.JoinHostPort(ownAddress(), "1"), "::": "http://" + net.JoinHostPort(ownAddress(), "1"),
	} {
		if got := (config{}).url(host, "1"); got != want {
			t.Errorf("HOST=%s: got %s, want %s", host, got, want)
		}
	}
	addresses, _ := net.InterfaceAddrs()
	for _, a := range addresses {
		if network, ok := a.(*net.IPNet); ok && network.IP.IsGlobalUnicast() && ownAddress() == "localhost" {
			t.Errorf("got localhost, want an address like %s", network.IP)
		}
	}
}
