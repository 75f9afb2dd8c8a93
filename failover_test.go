package main

// PostgreSQL with a standby that takes over, and poolers between.

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/tracelog"
)

// ---- a standby takes over ----

// standbyOf makes a synchronous standby of a cluster, from a copy of its files.
func standbyOf(t *testing.T, primary *testPostgres) *testPostgres {
	t.Helper()
	data := filepath.Dir(primary.pidFile)
	at, err := url.Parse(primary.url)
	if err != nil {
		t.Fatal(err)
	}
	primary.kill(t, syscall.SIGINT)
	standby := ownPostgres(t, func(dir string) error {
		follow := fmt.Sprintf("primary_conninfo = 'host=%s port=%s user=postgres application_name=standby'",
			at.Query().Get("host"), at.Query().Get("port"))
		copied := exec.Command("sh", "-ec", `cp -a "$0" "$1/data"; chown --reference="$0" "$1"
			echo "$2" >>"$1/data/postgresql.auto.conf"; touch "$1/data/standby.signal"`, data, dir, follow)
		if out, err := copied.CombinedOutput(); err != nil {
			return fmt.Errorf("copy the cluster: %w %s", err, out)
		}
		return primary.start()
	})
	execSQL(t, primary.url, "alter system set synchronous_standby_names = 'standby'")
	execSQL(t, primary.url, "select pg_reload_conf()")
	waitUntil(t, "the standby is synchronous", func() bool {
		return querySQL[int](t, primary.url, "select count(*) from pg_stat_replication where sync_state = 'sync'") == 1
	})
	return standby
}

// hostsOf is one URL that leads to several proxies, each before a server.
func hostsOf(database string, proxies ...*testProxy) string {
	var addresses []string
	for _, p := range proxies {
		addresses = append(addresses, p.address)
	}
	return "postgres://postgres@" + strings.Join(addresses, ",") + "/" + database +
		"?sslmode=disable&target_session_attrs=read-write"
}

// pair is a load on a primary that has a standby.
type pair struct {
	*load
	standby *testPostgres
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{load: &load{t: t, pg: ownPostgres(t), goHome: func() {}}}
	p.standby = standbyOf(t, p.pg)
	p.toDB, _ = proxyToDatabase(t, p.pg.url, nil)
	toStandby, _ := proxyToDatabase(t, p.standby.url, nil)
	p.server = newServer(t, "DATABASE_URL="+hostsOf(databaseName(t, p.pg.url), p.toDB, toStandby),
		"DB_CONNECTION_TIMEOUT=2s")
	p.server.database = p.pg.url
	p.toServer, p.address = proxyTo(t, p.server)
	return p
}

// promote makes the standby the primary.
func (p *pair) promote() {
	p.t.Helper()
	if !querySQL[bool](p.t, p.standby.url, "select pg_promote(true, 600)") {
		p.t.Fatal("the standby was not promoted")
	}
	p.server.database = p.standby.url
}

// What is acknowledged survives the primary, however it goes, and recording goes
// on with the standby.
func TestFaultFailover(t *testing.T) {
	besideOthers(t)
	for _, way := range []struct {
		name string
		full bool // of the full set alone
		fall func(p *pair)
		says string // in the log
	}{
		{"the primary hangs", false, func(p *pair) {
			p.t.Cleanup(func() { p.pg.thaw(p.t) })
			p.pg.freeze(p.t)
		}, "its connections are given up"},
		{"the primary is killed", true, func(p *pair) { p.pg.kill(p.t, syscall.SIGKILL) }, ""},
		{"the network to it is a black hole", true, func(p *pair) { p.toDB.freeze() }, "its connections are given up"},
		{"the primary hangs for long before the standby is promoted", true, func(p *pair) {
			p.t.Cleanup(func() { p.pg.thaw(p.t) })
			p.pg.freeze(p.t)
			p.pending(20)
		}, "its connections are given up"},
	} {
		if way.full && !fullFaults {
			continue
		}
		t.Run(way.name, func(t *testing.T) {
			besideOthers(t)
			for range scale(1, 3) {
				p := newPair(t)
				p.record(scale(5, 20), nil)
				way.fall(p)
				p.promote()
				p.progress("the standby's promotion")
				if !strings.Contains(p.server.output.String(), way.says) {
					t.Errorf("the log does not say that %s", way.says)
				}
				p.finish()
			}
		})
	}
}

// busy fills the pool with statements that end with the connection or at letGo,
// and counts those that have ended.
func busy(st *storeTest) (ended *atomic.Int64, letGo func()) {
	st.Helper()
	letGo = holdSQL(st, st.database, "select pg_advisory_xact_lock(1)")
	ended = new(atomic.Int64)
	for range st.pool.Config().MaxConns {
		go func() { // ends with the statement
			st.pool.Exec(context.Background(),
				"select set_config('lock_timeout', '0', true), pg_advisory_xact_lock_shared(1)")
			ended.Add(1)
		}()
	}
	waitUntil(st, "the pool is full", func() bool {
		return querySQL[int](st, st.database, `select count(*) from pg_locks
			where locktype = 'advisory' and not granted and
			database = (select oid from pg_database where datname = current_database())`) ==
			int(st.pool.Config().MaxConns)
	})
	return ended, letGo
}

// A database that hangs is given up, with what waits for it, and all places in
// the pool are free at once.
func TestStoreHung(t *testing.T) {
	st := newStoreTest(t)
	proxy, through := proxyToDatabase(t, st.database, nil)
	st.store = openTestStore(t, through)
	st.pulse(t.Context())
	ended, _ := busy(st)
	proxy.freeze()
	st.pulse(t.Context())
	all := int64(st.pool.Config().MaxConns)
	waitUntil(t, "what waited has ended", func() bool { return ended.Load() == all })
	proxy.thaw()
	for range all {
		waitUntil(t, "the pool has this place too", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			c, err := st.pool.Acquire(ctx)
			if err == nil {
				t.Cleanup(c.Release)
			}
			return err == nil
		})
	}
}

// A database that lives is left alone, though all wait for locks and nobody can
// write.
func TestStoreSlow(t *testing.T) {
	st := newStoreTest(t)
	st.pulse(t.Context())
	first := st.uplink.Load()
	ended, letGo := busy(st)
	st.pulse(t.Context())
	letGoOfTables := holdSQL(t, st.database, "lock table servers, sessions")
	st.pulse(t.Context())
	if n := ended.Load(); n > 0 || st.uplink.Load() != first {
		t.Errorf("the database was given up, and %d statements ended", n)
	}
	letGo()
	waitUntil(t, "they end by themselves", func() bool { return ended.Load() == int64(st.pool.Config().MaxConns) })
	if err := st.beat(t.Context()); sqlState(err) != "55P03" || st.uplink.Load() != first {
		t.Errorf("got %v, want a lock timeout", err)
	}
	letGoOfTables()
	if err := st.beat(t.Context()); err != nil {
		t.Error(err)
	}
}

// ---- a pooler between ----

// pgBouncer starts one in transaction mode before a database, and returns the URL
// that leads through it.
func pgBouncer(t *testing.T, database string) (through string) {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		if program = "/usr/sbin/pgbouncer"; exec.Command(program, "--version").Run() != nil {
			t.Skip("PgBouncer is not installed: not tested")
		}
	}
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	host, port := cmp.Or(u.Query().Get("host"), u.Hostname()), cmp.Or(u.Query().Get("port"), u.Port(), "5432")
	file, own := filepath.Join(t.TempDir(), "ini"), freePort(t)
	settings := fmt.Sprintf("[databases]\n* = host=%s port=%s user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"+
		"listen_port = %s\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 4\n",
		host, port, own)
	if err := os.WriteFile(file, []byte(settings), 0o644); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(file); dir != filepath.Clean(os.TempDir()); dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755) // for the user postgres
	}
	cmd := exec.Command(program, file)
	if os.Getuid() == 0 {
		cmd.Args = append(cmd.Args, "-u", "postgres")
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	u.Host, u.RawQuery = "127.0.0.1:"+own, "sslmode=disable"
	waitUntil(t, "PgBouncer answers", func() bool {
		conn, err := pgx.Connect(t.Context(), u.String())
		if err == nil {
			conn.Close(t.Context())
		}
		return err == nil
	})
	return u.String()
}

// reads asks for what is stored, by all that ask the database, and says how many
// answers were not 200.
func (l *load) reads(times int) (failed int64) {
	var bad atomic.Int64
	var readers sync.WaitGroup
	for i := range 8 {
		readers.Go(func() {
			for range times {
				id := l.trackers[i%len(l.trackers)].session
				for _, path := range []string{"/sessions", "/sessions/" + id, "/sessions/" + id + "/events",
					"/health"} {
					if status, _ := l.server.get(path); status != http.StatusOK {
						bad.Add(1)
					}
				}
			}
		})
	}
	readers.Wait()
	return bad.Load()
}

// Behind PgBouncer in transaction mode statements that are prepared on one
// connection come to another. The first such error is told, and is the last.
func TestFaultPooler(t *testing.T) {
	besideOthers(t)
	const named, setting = "add default_query_exec_mode=exec to DATABASE_URL", "&default_query_exec_mode=exec"
	for more, lines := range map[string]int{"": 1, setting: 0} {
		t.Run(fmt.Sprintf("%d lines", lines), func(t *testing.T) {
			besideOthers(t)
			database := testDatabase(t)
			through := pgBouncer(t, database) + more
			l := &load{t: t, goHome: func() {}, server: newServer(t, "DATABASE_URL="+through)}
			l.server.database = database
			l.toServer, l.address = proxyTo(t, l.server)
			l.record(scale(8, 40), nil)
			l.reads(2)
			if more == "" {
				waitUntil(t, "the log names the setting", func() bool {
					return strings.Contains(l.server.output.String(), named)
				})
				l.progress("the setting") // what was under way without it has ended,
				l.server.waitHealthy()    // and a beat that was
			}
			if failed := l.reads(scale(5, 20)); failed > 0 {
				t.Errorf("%d of %d reads failed", failed, 8*4*scale(5, 20))
			}
			var out bytes.Buffer
			err := run(t.Context(), []string{"-check"}, envOf("PORT="+freePort(t), "LOG_DIR="+t.TempDir(),
				"DATABASE_URL="+through, "DB_CONNECTION_TIMEOUT=1m"), &out, &out)
			if says := strings.Contains(out.String(), named); says != (lines == 1) || (err != nil) != says {
				t.Errorf("-check: %v\n%s", err, out.String())
			}
			l.finish()
			if n := strings.Count(l.server.output.String(), named); n != lines {
				t.Errorf("the log has %d lines that name the setting, want %d", n, lines)
			}
		})
	}
}

// ---- Citus ----

func oneSpace(sql string) string { return strings.Join(strings.Fields(sql), " ") }

// statementsInSource gives the literals of the server's source that begin a
// statement, cut where something is put in.
func statementsInSource(t *testing.T) (pieces [][]string) {
	t.Helper()
	files, _ := filepath.Glob("*.go")
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") || name == "check.go" { // which stores nothing
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				text, _ := strconv.Unquote(lit.Value)
				if regexp.MustCompile(`^(select|insert into|update|delete from) `).MatchString(text) {
					pieces = append(pieces, regexp.MustCompile(`%(\[\d\])?[sd]`).Split(oneSpace(text), -1))
				}
			}
			return true
		})
	}
	return pieces
}

// refusedByCitus says which of the rules for statements on distributed tables one
// breaks, "" if none. mutable matches a call of a function that is not immutable.
func refusedByCitus(sql string, mutable *regexp.Regexp) string {
	find := func(expression string) string { return regexp.MustCompile(expression).FindString(sql) }
	switch {
	case find(`\bfor (no key )?(update|(key )?share)\b`) != "":
		return "it locks rows of several shards"
	case find(`^(insert into|update|delete from) (session_events|session_errors|sessions)\b`) == "":
		return ""
	case mutable.MatchString(find(`\bdo update\b.*`)):
		return "a function in DO UPDATE is not immutable"
	case mutable.MatchString(find(`\bcase\b.*?\bend\b`)), mutable.MatchString(find(`\bcoalesce\(.*?\)( |,|$)`)):
		return "a function in CASE or COALESCE is not immutable"
	case mutable.MatchString(find(`\breturning\b.*`)):
		return "a function in RETURNING is not immutable"
	case find(`^insert`) != "" && find(`^insert into \w+ \(session_id\b`) == "",
		find(`^insert`) == "" && find(`\bwhere\b.*\bsession_id = \$\d`) == "":
		return "it does not name the session"
	}
	return ""
}

func mutableFunctions(t *storeTest) *regexp.Regexp {
	const names = `select string_agg(distinct proname, '|') from pg_proc
		where provolatile <> 'i' and proname ~ '^[a-z_0-9]+$'`
	return regexp.MustCompile(`\b(` + querySQL[string](t, t.database, names) + `)\(`)
}

// keysWithoutSession names the unique indexes and foreign keys of distributed
// tables that lack session_id.
func keysWithoutSession(t *storeTest) (wrong []string) {
	rows, _ := t.pool.Query(t.Context(), `
		with keys as (
			select indrelid as of, indexrelid::regclass::text as name, indkey::int2[] as columns from pg_index
			where indisunique
			union all select conrelid, conname, conkey from pg_constraint where contype = 'f')
		select k.name, exists (select from pg_attribute a where a.attrelid = k.of and a.attname = 'session_id'
			and a.attnum = any(k.columns)) from keys k join pg_class c on c.oid = k.of
		where c.relnamespace = 'public'::regnamespace and c.relname <> 'servers'`)
	var name string
	var has bool
	n := 0
	_, err := pgx.ForEachRow(rows, []any{&name, &has}, func() error {
		if n++; !has {
			wrong = append(wrong, name)
		}
		return nil
	})
	if err != nil || n < 5 {
		t.Fatalf("got %d keys, %v, want those of three tables", n, err)
	}
	return wrong
}

// Every statement that the source has is sent, also as a pooler needs it, and none is one that Citus
// refuses when the tables are distributed by session_id (doc/citus.sql). There is
// no Citus here: these are its rules, not it.
func TestCitusStatements(t *testing.T) {
	st := newStoreTest(t)
	if wrong := keysWithoutSession(st); len(wrong) > 0 {
		t.Errorf("these keys lack session_id: %q", wrong)
	}
	var mu sync.Mutex
	seen := map[string]bool{}
	keep := func(_ context.Context, _ tracelog.LogLevel, _ string, data map[string]any) {
		if sql, ok := data["sql"].(string); ok {
			mu.Lock()
			defer mu.Unlock()
			seen[oneSpace(sql)] = true
		}
	}
	tracer := &tracelog.TraceLog{Logger: tracelog.LoggerFunc(keep), LogLevel: tracelog.LogLevelInfo}
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeExec} {
		cfg, _ := pgxpool.ParseConfig(st.database)
		cfg.ConnConfig.Tracer, cfg.ConnConfig.DefaultQueryExecMode = tracer, mode
		traced, err := openStore(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(traced.close)
		st.store, st.w.store = traced, traced
		sendAll(st)
	}
	mutable := mutableFunctions(st)
	for _, pieces := range statementsInSource(t) {
		quoted := regexp.QuoteMeta(strings.Join(pieces, "\x00"))
		like := regexp.MustCompile(strings.ReplaceAll(quoted, "\x00", ".*"))
		sent := slices.ContainsFunc(slices.Collect(maps.Keys(seen)), like.MatchString)
		if !sent {
			t.Errorf("sendAll does not send: %s…", strings.Join(pieces, "…"))
		}
	}
	for sql := range seen {
		if why := refusedByCitus(sql, mutable); why != "" {
			t.Errorf("%s: %s", why, sql)
		}
	}
	t.Logf("%d statements", len(seen))
}

// sendAll has the store send each of its statements.
func sendAll(st *storeTest) {
	st.Helper()
	ctx := st.Context()
	must := func(err error) {
		st.Helper()
		if err != nil {
			st.Error(err)
		}
	}
	must(st.applySchema(ctx))
	_, err := st.claim(ctx, "paged", aboutNobody, false, "token", false, 2)
	must(err)
	if _, err := st.claim(ctx, "paged", aboutNobody, false, "token", true, 1); err != errLaterPage {
		st.Errorf("got %v, want errLaterPage", err)
	}
	c := st.begin("s")
	f := st.flush("s", c, numbered(0, 3)...)
	st.report(f, `{"a":1}`)
	st.stored(f)
	st.claimed("s", "", false)
	st.commitOne(f) // of an old epoch
	st.all("s", 0, 3)
	_, err = st.chunks(ctx, "s", 0, 1)
	must(err)
	_, err = st.reports(ctx, "s")
	must(err)
	_, err = st.active(ctx)
	must(err)
	_, err = st.session(ctx, "s")
	must(err)
	_, err = st.others(ctx)
	must(err)
	_, err = st.foreignRows(ctx, []watched{{"s", 0}})
	must(err)
	_, err = st.liveElsewhere(ctx)
	must(err)
	must(st.mark(ctx, "s"))
	_, err = st.watchedHere(ctx)
	must(err)
	yes := true
	_, _, err = st.find(ctx, filter{active: &yes, errors: true, userID: "u", url: "x", from: time.Now(), to: time.Now(),
		minDuration: 1}, 1, 1)
	must(err)
	_, err = st.ofUser(ctx, "u", 1)
	must(err)
	must(st.remove(ctx, "paged"))
	execSQL(st, st.database,
		"insert into sessions (session_id, user_id, url, metadata, is_active, updated_at, ended_at) "+
			"values ('abandoned', '', '', '{}', true, now() - interval '1 day', null), "+
			"('empty', '', '', '{}', false, now(), now() - interval '2 day'), "+
			"('old', '', '', '{}', false, now(), now() - interval '2 day')")
	execSQL(st, st.database, "update sessions set event_count = 1 where session_id = 'old'")
	must(st.beat(ctx))
	must(st.beat(ctx))
	must(st.endLost(ctx, []string{"s"}))
	if n, err := st.removeOld(ctx, time.Hour, 1<<40); err != nil || n != 3 {
		st.Errorf("removeOld: got %d, %v, want the three that are over", n, err)
	}
	must(st.remove(ctx, "s"))
}
