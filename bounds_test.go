package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// What bounds promise: memory with everything full, metadata and lists, ages by
// the database's clock, a health that tells what cannot be stored.

// checkMemory holds the server to its memoryLimit.
func (s *testServer) checkMemory() {
	s.t.Helper()
	peak, limit := s.peakMemory(), mustLoad(s.t, s.env...).memoryLimit()
	s.t.Logf("peak resident memory %d MB, memoryLimit %d MB", peak>>20, limit>>20)
	if peak > limit && os.Getenv("TEST_SERVER_RACE") == "" {
		s.t.Errorf("peak resident memory %d MB, the limit is %d MB", peak>>20, limit>>20)
	}
}

// hugeStarts are session_starts of about 60 KB: what they say cannot be cut away
// as a whole.
func hugeStarts() (all []string) {
	member := func(name string, size int) string { return fmt.Sprintf(`,%q:[%q]`, name, strings.Repeat("x", size)) }
	var fields, twice strings.Builder
	for _, name := range documented[1:] {
		fields.WriteString(member(name, 900))
	}
	for range 120 {
		twice.WriteString(`,"url":"` + strings.Repeat("u", 490) + `"`)
	}
	for _, more := range []string{member("other", 60_000), fields.String() + member("other", 50_000), twice.String(),
		member("other", maxMetadata-100)} {
		all = append(all, `{"type":"session_start","data":{"resume":""`+more+`}}`)
	}
	return all
}

// attack begins a session from an address and leaves at once; it gives what the
// server said.
func attack(s *testServer, address, start string) string {
	c := rawTCP(s.t, s)
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	c.write("GET /ws HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: " + address + "\r\n" + upgradeHeaders)
	if status := c.status(); status != http.StatusSwitchingProtocols {
		return fmt.Sprint(status)
	}
	c.sendRaw(start)
	for {
		switch m, err := c.receive(); {
		case err != nil:
			return err.Error()
		case m.Type == "error":
			return m.Data.Code
		case m.Type == "session_ready":
			return m.Type
		}
	}
}

// Sessions that are begun by the thousand, each with all the metadata that it may
// have, keep nobody else from recording or watching.
func TestBoundsManySessions(t *testing.T) {
	besideOthers(t)
	for _, tt := range []struct {
		name          string
		addresses     int
		times, atMost int
		starts        []string
	}{{"one address", 1, 120, 60, hugeStarts()}, {"many addresses", 1 << 16, scale(800, 5000), 0, hugeStarts()},
		{"long URLs", 1 << 16, 800, 0, []string{
			`{"type":"session_start","data":{"resume":"","url":"` + strings.Repeat("u", 900_000) + `"}}`}}} {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, "TRUST_PROXY=true", "MAX_BUFFER_BYTES=16MB", "MAX_MESSAGE_BYTES=1MB",
				"MAX_CONNECTIONS=300",
				"SESSION_GRACE_PERIOD=1h")
			honest := newTracker(t, sessionName(t, 0)).start(s.ws("tracker"))
			waitUntil(t, "it records", func() bool { return honest.read(&honest.acked) > 0 })
			answers := attackTogether(s, tt.times, tt.addresses, tt.starts)
			before := honest.read(&honest.acked)
			waitUntil(t, "it still records", func() bool { return honest.read(&honest.acked) > before+8 })
			if n := answers["session_ready"]; n+answers["too_many_sessions"] != tt.times || n == tt.times ||
				tt.atMost > 0 && n > tt.atMost {
				t.Errorf("got the answers %v, want %d sessions at most, the others too many", answers, tt.atMost)
			}
			if taken := s.metric("buffer_bytes") - s.metric("tail_bytes"); taken > 16<<20/8+2<<20 {
				t.Errorf("sessions and what is pending take %d KB, an eighth of the budget is 2048", taken>>10)
			}
			checkLists(t, s)
			s.checkMemory()
			honest.finish()
		})
	}
}

// attackTogether attacks from 40 connections at a time, and counts the answers.
func attackTogether(s *testServer, times, addresses int, starts []string) map[string]int {
	var mu sync.Mutex
	var all sync.WaitGroup
	answers := map[string]int{}
	for i := range 40 {
		all.Go(func() {
			for n := i; n < times; n += 40 {
				a := rand.IntN(addresses)
				got := attack(s, fmt.Sprintf("10.1.%d.%d", a>>8, a&255), starts[n/40%len(starts)])
				mu.Lock()
				answers[got]++
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return answers
}

// checkLists checks that lists show the documented fields only, each cut, and are
// bounded, and that no row has more metadata than may be.
func checkLists(t *testing.T, s *testServer) {
	t.Helper()
	const longest = "select coalesce(max(octet_length(metadata::text)), 0) from sessions"
	if n := querySQL[int](t, s.database, longest); n > maxMetadata+200 {
		t.Errorf("a row has %d bytes of metadata", n)
	}
	c := dialServer(t, s.ws("viewer"))
	first, err := c.receive()
	if err != nil || len(first.text) > pageBytes {
		t.Errorf("a viewer's first message has %d bytes, %v", len(first.text), err)
	}
	_, active := s.get("/sessions/active")
	_, found := s.get("/sessions?limit=1000&active=true")
	for i, list := range []string{first.raw("sessions"), string(active), string(found)} {
		var got struct {
			Sessions []struct{ Metadata map[string]json.RawMessage }
		}
		if list = strings.TrimSpace(list); strings.HasPrefix(list, "[") {
			list = `{"sessions":` + list + `}`
		}
		err := json.Unmarshal([]byte(list), &got)
		if err != nil || len(got.Sessions) == 0 || len(list) > pageBytes+pageBytes/4 {
			t.Errorf("list %d: %d bytes, %d sessions, %v", i, len(list), len(got.Sessions), err)
		}
		for _, one := range got.Sessions {
			size := 0
			for name, value := range one.Metadata {
				if size += len(value); !slices.Contains(documented, name) || len(value) > 2*maxField {
					t.Errorf("list %d shows %q with %d bytes", i, name, len(value))
				}
			}
			if size > maxMetadata {
				t.Errorf("list %d shows %d bytes of a session", i, size)
			}
		}
	}
}

// slow sends a request on a connection with little room and reads no answer.
func slow(t *testing.T, s *testServer, request string) net.Conn {
	t.Helper()
	conn, err := narrow.Dial("tcp", "127.0.0.1:"+s.port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go io.WriteString(conn, request) // ends with the connection
	return conn
}

// takesNoMore waits until the server takes no more memory.
func (s *testServer) takesNoMore() {
	for last, calm := int64(0), 0; calm < 10; time.Sleep(100 * time.Millisecond) {
		if calm++; s.peakMemory() > last {
			last, calm = s.peakMemory(), 0
		}
	}
}

// Everything that takes memory is full at once.
func TestBoundsEverythingFull(t *testing.T) {
	besideOthers(t)
	s := startServer(t, "MAX_BUFFER_BYTES=8MB", "MAX_MESSAGE_BYTES=1MB", "MAX_CONNECTIONS=200", "HEARTBEAT_INTERVAL=1h",
		"MESSAGE_TIMEOUT=1h")
	old := newTracker(t, "old")
	old.perBatch, old.limit, old.pause, old.ends = 500, 200, 0, true
	old.start(s.ws("tracker"))
	waitUntil(t, "it is stored", func() bool { return old.read(&old.acked) == 200 })
	execSQL(t, s.database, `insert into session_errors (session_id, id, kind, error_data)
		select 'old', i, 'error', to_json(repeat(md5(i::text), 2000)) from generate_series(1000, 2000) i`)
	execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, updated_at)
		select 'row' || i, 'u', '', json_build_object('other', repeat(md5(i::text), 250)), true,
			now() + interval '1 hour'
		from generate_series(1, 10000) i`)
	execSQL(t, s.database, "insert into servers values ('', now() + interval '1 hour')") // whose sessions these are
	execSQL(t, s.database, `insert into session_events (session_id, first_index, event_count, raw_bytes, events)
		select 'old', 1000000, 1, 1000000, decode(repeat(md5(random()::text), 62500), 'hex')`)
	holdSQL(t, s.database, "lock table session_events in exclusive mode") // it is read, and nothing is stored
	batch := maskedText(wireMessage("events_batch", `{"events":[{"x":"`+strings.Repeat("x", 200_000)+`"}]}`))
	full := make([]*testConn, 60)
	for i := range full {
		full[i] = dialServer(t, s.ws("tracker"))
		full[i].sendRaw(string(sessionStart(fmt.Sprint("full", i), "")))
		full[i].expect("session_ready")
	}
	for _, c := range full {
		go func() { // ends with its connection, at the end of the test
			for {
				if _, err := c.Write(batch); err != nil {
					return
				}
			}
		}()
	}
	for i := range 20 {
		c := dialServer(t, s.ws("tracker"))
		go c.Write(append(announce(1_000_000), bytes.Repeat([]byte{0}, 500_000+i)...)) // ends as the others
		head := "POST /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
		slow(t, s, head+strings.Repeat(" ", 900_000))
	}
	waitUntil(t, "the buffer is full", func() bool { return s.metric("buffer_bytes") > 6<<20 })
	for _, path := range []string{"/sessions/active", "/sessions?limit=1000", "/sessions/old/errors",
		"/sessions/old/export", "/sessions/old/events?limit=10000", "/sessions/old/chunks/1000000",
		"/sessions/export?userId=ann"} {
		var readers []net.Conn // a few of them have room at a time: those of one kind do not keep out the next
		for range 10 {
			head := " HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept-Encoding: gzip\r\n\r\n"
			readers = append(readers, slow(t, s, "GET "+path+head))
		}
		s.takesNoMore()
		t.Logf("%s: %d MB", path, s.peakMemory()>>20)
		for _, conn := range readers {
			conn.Close()
		}
	}
	for range 20 {
		v, err := openWebSocket(narrow, s.ws("viewer"), 16)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { v.Close() })
		for range 200 {
			v.send("get_active_sessions", "{}")
			v.send("get_session_events", map[string]any{"sessionId": "old"})
		}
	}
	s.takesNoMore()
	s.checkMemory()
}

// Ages count by the database's clock, and not at all while the clocks differ.
func TestBoundsClocks(t *testing.T) {
	t.Parallel()
	database := testDatabase(t)
	clock := func(ahead string) {
		for _, name := range []string{"now", "clock_timestamp"} {
			execSQL(t, database, fmt.Sprintf(`create or replace function skewed.%s() returns timestamptz
				stable language sql as $$ select pg_catalog.%[1]s() + interval '%s' $$`, name, ahead))
		}
	}
	execSQL(t, database, "create schema skewed")
	clock("40 days")
	through := database + map[bool]string{true: "&", false: "?"}[strings.Contains(database, "?")] +
		"search_path=skewed,pg_catalog,public"
	s := startInside(t, "DATABASE_URL="+through, "SESSION_CLEANUP_INTERVAL=50")
	ended := func(id, ago string) {
		execSQL(t, through, `insert into sessions (session_id, user_id, url, metadata, is_active, ended_at, event_count)
			values ($1, '', '', '{}', false, pg_catalog.now() - $2::interval, 1)`, id, ago)
	}
	has := func(id string) bool {
		return querySQL[bool](t, through, "select exists (select from sessions where session_id = $1)", id)
	}
	ended("yesterday", "1 day")
	waitUntil(t, "the log says why nothing is deleted", func() bool {
		return strings.Contains(s.output.String(), errClocks.Error())
	})
	waitUntil(t, "/health says it", func() bool {
		status, body := s.get("/health")
		return status == http.StatusOK && strings.Contains(string(body), "clock")
	})
	tr := newTracker(t, "now")
	tr.limit, tr.ends = 1, true
	tr.start(s.ws("tracker")).finish()
	const after = `select exists (select from sessions where session_id = 'now' and not is_active
		and ended_at > pg_catalog.now() + interval '39 days')`
	waitUntil(t, "it ended by the database's clock", func() bool { return querySQL[bool](t, through, after) })
	if !has("yesterday") {
		t.Fatal("a wrong clock has deleted a recording")
	}
	clock("0")
	ended("last month", "31 days")
	waitUntil(t, "what is old is deleted", func() bool { return !has("last month") })
	if !has("yesterday") {
		t.Error("yesterday's recording is deleted")
	}
}

// What has waited for over a minute beyond BATCH_INTERVAL is an illness, and so are
// claims that have failed for as long.
func TestBoundsIllness(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		s := &server{core: core{cfg: t.cfg, hub: t.hub, store: &store{}}}
		want := func(when, part string) {
			t.Helper()
			if got := s.illness(nil); (got == "") != (part == "") || !strings.Contains(got, part) {
				t.Errorf("%s: got %q, want %q", when, got, part)
			}
		}
		t.publish(t.tracker("s"), "s", 2, 1)
		time.Sleep(t.cfg.batchInterval + maxWaiting)
		want("a minute", "")
		time.Sleep(time.Second)
		want("more", "has waited 1m6s")
		s.store.failed(errors.New("lock timeout"))
		want("more, and why", "lock timeout")
		s.store.last.Store(nil)
		t.settle(stored, t.later()...)
		want("stored", "")
		for range 7 { // claims, which nobody waits for longer than startTime
			s.store.failed(errors.New("no such luck"))
			time.Sleep(10 * time.Second)
		}
		want("failures for a minute", "")
		s.store.failed(errors.New("no such luck"))
		want("for more", "has failed for 1m10s: no such luck")
		time.Sleep(time.Minute)
		want("none since", "")
	})
}

// The log says it once a minute, however often it is found.
func TestBoundsIllnessLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg, _ := pgxpool.ParseConfig("postgres:///none?host=/nowhere")
		away := errors.New("away")
		cfg.ConnConfig.DialFunc = func(context.Context, string, string) (net.Conn, error) { return nil, away }
		st, err := openStore(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer st.pool.Close()
		defer st.pulses.Close()
		var out bytes.Buffer
		log := slog.New(slog.NewTextHandler(&out, nil))
		h := newHub(config{batchInterval: time.Second}, newBudget(1), &metrics{})
		go h.run(t.Context()) // ends with the test
		s := &server{core: core{hub: h, store: st, logs: &logs{rejected: log}}}
		for range 150 { // five minutes
			s.beat(t.Context())
			time.Sleep(beatEvery)
		}
		if n := strings.Count(out.String(), "unhealthy"); n != 5 {
			t.Errorf("got %d lines in five minutes:\n%s", n, out.String())
		}
	})
}

// /health is 503 while the database takes no writes, with a reason for those who
// have the token alone, and 200 again when it does.
func TestBoundsHealth(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, reason string
		fall         func(l *load) (rise func())
	}{
		{"read-only", "read-only", readOnly},
		{"hung", "takes no writes", func(l *load) func() { l.toDB.freeze(); return l.toDB.thaw }},
		{"locked", "lock timeout", func(l *load) func() {
			return holdSQL(l.t, l.server.database, "lock table servers")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLoad(t, false, "ACCESS_TOKEN="+testToken)
			s := l.server
			s.start()
			s.waitHealthy()
			before := strings.Count(s.output.String(), "unhealthy")
			rise := tt.fall(l)
			s.waitUnhealthy()
			if _, body := s.get("/health"); strings.TrimSpace(string(body)) != `{"status":"unhealthy"}` {
				t.Errorf("everybody is told %s", body)
			}
			waitUntil(t, "who has the token is told why", func() bool {
				return strings.Contains(s.as(bearer, "GET", "/health").body, tt.reason)
			})
			lines := func() int { return strings.Count(s.output.String(), "unhealthy") - before }
			waitUntil(t, "the log says it", func() bool { return lines() > 0 })
			if n := lines(); n != 1 {
				t.Errorf("got %d lines in the log, want one", n)
			}
			rise()
			s.waitHealthy()
		})
	}
}

// Who waits for a lock gives up after lockTimeout, on a connection's first
// statement too, whose parse waits.
func TestBoundsLock(t *testing.T) {
	st := newStoreTest(t)
	holdSQL(t, st.database, "lock table sessions")
	fresh := openTestStore(t, st.database)
	if _, err := fresh.claim(t.Context(), "s", aboutNobody, false, "", false, 0); sqlState(err) != "55P03" {
		t.Errorf("got %v, want a lock timeout", err)
	}
}
