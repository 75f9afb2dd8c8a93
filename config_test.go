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

// testSettings has for each setting its place in config, its default, and values
// with what they are read as: with a unit and without.
var testSettings = []string{
	"HOST | host | 127.0.0.1 | 127.0.0.2=127.0.0.2",
	"PORT | port | 8080 | 0=0 | 65535=65535",
	"DATABASE_URL | database ConnConfig Host | localhost | postgres://u:p@elsewhere:1/n=elsewhere",
	"DB_HOST | database ConnConfig Host | localhost | db.example=db.example | /run/postgresql=/run/postgresql",
	"DB_PORT | database ConnConfig Port | 5432 | 101=101",
	"DB_NAME | database ConnConfig Database | session_replay | some name=some name",
	"DB_USER | database ConnConfig User | postgres | us er=us er",
	"DB_PASSWORD | database ConnConfig Password | postgres | p@/?#:% \"'\\=p@/?#:% \"'\\",
	"DB_MAX_CONNECTIONS | database MaxConns | 20 | 98=98",
	"DB_IDLE_TIMEOUT | database MaxConnIdleTime | 30s | 99=99ms",
	"DB_CONNECTION_TIMEOUT | database ConnConfig ConnectTimeout | 2s | 3s=3s",
	"BATCH_SIZE | batchSize | 50 | 82=82",
	"BATCH_INTERVAL | batchInterval | 5s | 83=83ms | 500ms=500ms | 7s=7s | 2 min=2m0s | 3m=3m0s | 1H=1h0m0s",
	"MAX_EVENTS_PER_SESSION | maxEvents | 20000 | 84=84",
	"SESSION_CLEANUP_INTERVAL | cleanupInterval | 5m0s | 300000=5m0s",
	"SESSION_GRACE_PERIOD | grace | 15s | 0=0s | 1 minutes=1m0s",
	"HEARTBEAT_INTERVAL | heartbeat | 30s | 87=87ms",
	"MESSAGE_TIMEOUT | messageTimeout | 1m0s | 88=88ms",
	"READ_HEADER_TIMEOUT | readHeaderTimeout | 10s | 89=89ms",
	"RETENTION_HOURS | retention | 720h0m0s | 90=90h0m0s | 30d=720h0m0s | 12h=12h0m0s | 2 days=48h0m0s",
	"MAX_MESSAGE_BYTES | maxMessageBytes | 33554432 | 9100=9100 | 5KB=5120 | 1GB=1073741824",
	"MAX_BUFFER_BYTES | maxBufferBytes | 268435456 | 92000000=92000000 | 64 mb=67108864 | 1t=1099511627776",
	"MAX_HEADER_BYTES | maxHeaderBytes | 16384 | 9400=9400",
	"MAX_SESSION_BYTES | maxSessionBytes | 1073741824 | 95=95 | 95 bytes=95",
	"MAX_STORAGE_BYTES | maxStorageBytes | 0 | 50G=53687091200",
	"MAX_CONNECTIONS | maxConnections | 10000 | 93=93",
	"MAX_CONNECTIONS_PER_ADDRESS | maxPerAddress | 200 | 94=94",
	"MAX_SESSIONS_PER_MINUTE | maxSessionsPerMinute | 30 | 97=97",
	"LOG_LEVEL | log level | 0 | warn=4", // as slog counts them
	"LOG_DIR | log dir | logs | /somewhere=/somewhere",
	"LOG_MAX_SIZE | log maxSize | 20971520 | 102k=104448 | 1g=1073741824 | 1048577=1048577",
	"LOG_MAX_FILES | log maxAge | 336h0m0s | 103=0s | 1D=24h0m0s",
	"LOG_MAX_FILES | log maxCount | 0 | 103=103 | 1D=0",
	"LOG_ZIPPED | log zipped | false | true=true",
	"TRUST_PROXY | trustProxy | false | 1=true",
	"METRICS_OPEN | metricsOpen | false | true=true",
	"ACCESS_TOKEN | token |  | sixteen letters.=sixteen letters.",
	"INGEST_KEY | key |  | k=k",
	"TRACKER_ORIGINS | trackerOrigins | [*] | " +
		" HTTPS://Shop.example:443 ,http://[::1]:99,=[https://shop.example http://[::1]:99] | ,=[]",
	"VIEWER_ORIGINS | viewerOrigins | [] | https://v.example=[https://v.example]",
	"MEDIA_ORIGINS | mediaOrigins | [] | https://v.example=[https://v.example]",
	"PUBLIC_HOSTS | publicHosts | [] | A.example:8443 , b.example=[a.example:8443 b.example]",
}

func TestSettings(t *testing.T) {
	for _, row := range testSettings {
		cells := strings.Split(row, " | ")
		value := func(c config) any {
			v := reflect.ValueOf(c)
			for name := range strings.FieldsSeq(cells[1]) {
				v = reflect.Indirect(v).FieldByName(name)
			}
			if v.Type() == reflect.TypeFor[time.Duration]() {
				return time.Duration(v.Int())
			}
			return v
		}
		same(t, cells[0]+" by default", value(mustLoad(t)), cells[2])
		for _, given := range cells[3:] {
			i := strings.LastIndex(given, "=")
			same(t, cells[0]+"="+given[:i], value(mustLoad(t, cells[0]+"="+given[:i])), given[i+1:])
		}
	}
}

// A setting that makes no sense stops the start with one line that names it.
func TestSettingsRefused(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	testCertificate(t, cert, key, 1)
	var bad []string
	for _, name := range strings.Fields("PORT BATCH_SIZE BATCH_INTERVAL MAX_EVENTS_PER_SESSION " +
		"SESSION_CLEANUP_INTERVAL " +
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
		"BATCH_INTERVAL=3 minu", "MAX_SESSION_BYTES=5 byte s",
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
		_, err := loadConfig(envOf(setting))
		same(t, setting, err, want)
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
		same(t, fmt.Sprint(tt.env), c.token+"|"+c.key+"|"+c.database.ConnConfig.Password, tt.want)
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
		"BATCH_INTERVALL=1": file +
			`: "BATCH_INTERVALL" is not a setting; did you mean BATCH_INTERVAL?`,
		"KEEP_RETENTION_HOURS=1": file +
			`: "KEEP_RETENTION_HOURS" is not a setting; did you mean RETENTION_HOURS?`,
		"DB_PASS=x":      file + `: "DB_PASS" is not a setting; did you mean DB_PASSWORD?`,
		"DATABASE_URI=x": file + `: "DATABASE_URI" is not a setting; did you mean DATABASE_URL?`,
		"host=x":         file + `: "host" is not a setting; did you mean HOST?`,
	} {
		os.WriteFile(file, []byte(text), 0o600)
		c, err := readConfig(envOf("PORT=2", "HOST=127.0.0.9", "PGUSER=postgres", "UNKNOWN=x", "GOGC=50"), file)
		got := fmt.Sprint(err)
		if err == nil {
			got = said(c.host, c.port, c.database.ConnConfig.Database, c.database.ConnConfig.User)
		}
		same(t, text, got, want)
	}
	if _, err := readConfig(envOf(), t.TempDir()); err == nil {
		t.Error("a .env that cannot be read: got no error")
	}
}

func TestInWords(t *testing.T) {
	for d, want := range map[time.Duration]string{30 * 24 * time.Hour: "30 days", 36 * time.Hour: "36 hours",
		24 * time.Hour:   "24 hours",
		90 * time.Second: "90 seconds", time.Millisecond: "1 ms", 0: "0 ms", 15 * time.Minute: "15 minutes"} {
		same(t, d.String(), inWords(int64(d), times), want)
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
	same(t, "a second connection, of MAX_CONNECTIONS=1 in .env", s.as(nobody, "GET", "/ws?type=viewer").status, 503)
	other := newServer(t, "PORT="+s.port)
	other.start()
	<-other.exited
	if code, out := other.cmd.ProcessState.ExitCode(), other.output.String(); code != 1 ||
		!strings.Contains(out, s.port) {
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
	t.Parallel()
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
	waitUntil(t, "it says where", func() bool { return strings.Contains(s.output.String(), "url=https://127.0.0.1:") })
	if c := s.as(header("Accept", "text/html"), "GET",
		"/?token=the%2Baccess/token%3Dof+a+test").cookies()[0]; !c.Secure {
		t.Errorf("cookie %v, want Secure", c)
	}
	plainPage := header("Origin", "http://127.0.0.1:"+s.port)
	same(t, "its page without TLS", s.as(bearer.and("", plainPage), "GET", "/sessions").status, 403)
	os.WriteFile(cert, []byte("broken"), 0o600)
	s.cmd.Process.Signal(syscall.SIGHUP)
	waitUntil(t, "the broken one is refused", func() bool {
		return strings.Contains(s.log(rejectionsLog), "certificate not read again")
	})
	same(t, "the old certificate's number", serial(), 1)
	testCertificate(t, cert, key, 2)
	s.cmd.Process.Signal(syscall.SIGHUP)
	waitUntil(t, "the new certificate is served", func() bool { return serial() == 2 })
	s.cmd.Process.Signal(syscall.SIGINT)
	<-s.exited
	same(t, "exit code", s.cmd.ProcessState.ExitCode(), 0)
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
	ancient := strings.Replace(readOnly, "default_transaction_read_only=on", "search_path=ancient,pg_catalog", 1)
	execSQL(t, database, "create schema ancient")
	execSQL(t, database, `create function ancient.current_setting(text) returns text
		language sql as $$ select '110022' $$`)
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
		{[]string{"HOST=192.0.2.1", "LOG_DIR=" + file + "/below"}, []string{"database"},
			[]string{"listens", "LOG_DIR"}, "cannot assign requested address"},
		{[]string{"DATABASE_URL=postgres://u:the-password@127.0.0.1:1/none"}, []string{"LOG_DIR"},
			[]string{"database"}, "connection refused"},
		{[]string{"DATABASE_URL=" + readOnly}, []string{"database", "clocks"}, []string{"writes"}, "read-only"},
		{[]string{"DATABASE_URL=" + ancient}, []string{"database"}, []string{"PostgreSQL"}, "11 is older than 12"},
	} {
		dir := t.TempDir()
		env := append(append([]string{"HOST=127.0.0.1", "PORT=" + freePort(t), "DATABASE_URL=" + database,
			"LOG_DIR=" + filepath.Join(dir, "var", "logs")}, secrets...), tt.env...)
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
	same(t, "tables that it made",
		querySQL[int](t, database, "select count(*) from pg_tables where schemaname = 'public'"), 0)
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
		"0.0.0.0": "http://" + net.JoinHostPort(ownAddress(), "1"),
		"::":      "http://" + net.JoinHostPort(ownAddress(), "1"),
	} {
		same(t, "HOST="+host, (config{}).url(host, "1"), want)
	}
	addresses, _ := net.InterfaceAddrs()
	for _, a := range addresses {
		if network, ok := a.(*net.IPNet); ok && network.IP.IsGlobalUnicast() && ownAddress() == "localhost" {
			t.Errorf("got localhost, want an address like %s", network.IP)
		}
	}
}
