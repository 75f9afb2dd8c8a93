package main

// The store against a real PostgreSQL: who may claim a session, what a commit
// leaves behind whatever happens to its answer, chunks, pages over chunks, and
// cleaning up beside writers.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// storeTest is a store on a database of its own, with a writer.
type storeTest struct {
	*testing.T
	*store
	database string
	w        *writer
}

func newStoreTest(t *testing.T) *storeTest {
	t.Helper()
	t.Parallel()
	database := testDatabase(t)
	st := &storeTest{T: t, store: openTestStore(t, database), database: database}
	if err := st.applySchema(t.Context()); err != nil {
		t.Fatal(err)
	}
	st.w = &writer{store: st.store, metrics: &metrics{}, log: slog.New(slog.DiscardHandler)}
	return st
}

func openTestStore(t testing.TB, database string) *store {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	cfg.MaxConns = 4
	st, err := openStore(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.close)
	return st
}

// begin claims a new session.
func (t *storeTest) begin(id string) claim {
	t.Helper()
	return t.claimed(id, "", false)
}

func (t *storeTest) claimed(id, token string, resuming bool) claim {
	t.Helper()
	c, err := t.claim(t.Context(), id, aboutNobody, false, token, resuming, 0)
	if err != nil {
		t.Fatalf("claim %s: %v", id, err)
	}
	return c
}

// flush makes one of events that follow what is there already, as the hub does.
func (t *storeTest) flush(id string, c claim, events ...json.RawMessage) *flush {
	t.Helper()
	f := &flush{session: id, epoch: c.epoch, totals: c.counters}
	t.add(f, events...)
	return f
}

// add adds a batch of events to a flush.
func (t *storeTest) add(f *flush, events ...json.RawMessage) {
	t.Helper()
	parsed, err := parseFrame([]byte(batchOf(0, events)))
	if err != nil || !parsed.objects {
		t.Fatalf("events: %v", err)
	}
	b := newBatch(f.session, parsed, f.totals.seq+1)
	b.number(f.totals.events)
	f.totals.add(b)
	f.batches = append(f.batches, b)
}

// report adds an error of the page to a flush.
func (t *storeTest) report(f *flush, data string) {
	b := newReport("error", []byte(data), 0)
	b.first, b.report.id = f.totals.events, f.totals.errors
	f.totals.add(b)
	f.batches = append(f.batches, b)
}

// commitOne encodes and commits a flush.
func (t *storeTest) commitOne(f *flush) outcome {
	t.Helper()
	if f.chunks == nil {
		f.encode()
	}
	if err := t.w.commit(t.Context(), []*flush{f}); err != nil {
		t.Fatalf("commit: %v", err)
	}
	return f.outcome
}

func (t *storeTest) stored(f *flush) {
	t.Helper()
	if got := t.commitOne(f); got != stored {
		t.Fatalf("got outcome %d, want stored", got)
	}
}

func (t *storeTest) all(id string, from, to int64) (events []json.RawMessage) {
	t.Helper()
	const count = "select coalesce(sum(event_count), 0) from session_events where session_id = $1"
	to = min(to, querySQL[int64](t, t.database, count, id))
	err := t.events(t.Context(), id, from, to, anyRoom, func(e []byte) bool {
		events = append(events, bytes.Clone(e))
		return true
	})
	if err != nil {
		t.Fatalf("events: %v", err)
	}
	return events
}

// numbered makes events n to m.
func numbered(from, to int) (events []json.RawMessage) {
	for n := from; n < to; n++ {
		events = append(events, fmt.Appendf(nil, `{"n":%d}`, n))
	}
	return events
}

// holds checks a value of the test's database.
func (t *storeTest) holds(what string, want any, sql string, args ...any) {
	t.Helper()
	if got := querySQL[string](t, t.database, "select ("+sql+")::text", args...); got != fmt.Sprint(want) {
		t.Errorf("%s: got %s, want %v", what, got, want)
	}
}

// ---- schema ----

// The schema can be applied again, also to a database in use.
func TestStoreSchema(t *testing.T) {
	st := newStoreTest(t)
	st.begin("s")
	if err := st.applySchema(t.Context()); err != nil {
		t.Error(err)
	}
	st.holds("sessions", 1, "select count(*) from sessions")
	st.holds("the events' storage (PostgreSQL would compress them again)", "e", `select attstorage from pg_attribute
		where attrelid = 'session_events'::regclass and attname = 'events'`)
	st.holds("keys that begin with session_id", 3, `select count(*) from pg_index where indisunique
		and indrelid in ('sessions'::regclass, 'session_events'::regclass, 'session_errors'::regclass)
		and pg_get_indexdef(indexrelid) like '%(session_id%'`)
}

// A backup that reads the tables for long, and a transaction that writes, do not
// keep a server from starting, nor does its start keep others from writing.
func TestStoreSchemaBesideOthers(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	holdSQL(t, st.database, "select from sessions, session_events, session_errors")
	if err := openTestStore(t, st.database).applySchema(t.Context()); err != nil {
		t.Errorf("while a backup is made: %v", err)
	}
	st.stored(st.flush("s", c, numbered(0, 1)...))
}

// Tables that are of another make are not silently used.
func TestStoreSchemaForeign(t *testing.T) {
	t.Parallel()
	database := testDatabase(t)
	execSQL(t, database, "create table sessions (id text)")
	if err := openTestStore(t, database).applySchema(t.Context()); err == nil {
		t.Error("got no error")
	}
}

// ---- claims ----

func TestStoreClaim(t *testing.T) {
	st := newStoreTest(t)
	first := map[string]int64{} // epochs
	tests := []struct {
		name, id, token string
		resuming        bool
		epoch           int64
		err             error
	}{
		{"a new one", "open", "", false, 1, nil},
		{"by its id", "open", "", false, 2, nil},
		{"a new one with a token", "mine", "secret", false, 1, nil},
		{"without the token", "mine", "", false, 0, errToken},
		{"with another token", "mine", "guess", true, 0, errToken},
		{"with the token of one that is not there", "nowhere", "secret", true, 0, errToken},
		{"with its token", "mine", "secret", true, 2, nil},
		{"a newcomer's new token for one that has its own", "mine", "fresh", false, 0, errToken},
		{"an open one gets a token", "open", "later", false, 3, nil},
		{"and from then on needs it", "open", "", false, 0, errToken},
		{"its token", "open", "later", true, 4, nil},
	}
	for _, tt := range tests {
		c, err := st.claim(t.Context(), tt.id, aboutNobody, false, tt.token, tt.resuming, 0)
		if first[tt.id] == 0 {
			first[tt.id] = c.epoch
		}
		if !errors.Is(err, tt.err) || err == nil && c.epoch-first[tt.id] != tt.epoch-1 {
			t.Errorf("%s: got epoch %d, the first was %d, error %v, want the %dth, %v",
				tt.name, c.epoch, first[tt.id], err,
				tt.epoch, tt.err)
		}
	}
	st.holds("sessions", 2, "select count(*) from sessions")
	st.holds("rows with the token itself", 0, `select count(*) from sessions
		where encode(resume_hash, 'escape') like '%secret%' or sessions::text like '%secret%'`)
}

// Of many who claim at once each gets an epoch of its own.
func TestStoreClaimAtOnce(t *testing.T) {
	st := newStoreTest(t)
	epochs := make([]int64, 20)
	var claims sync.WaitGroup
	for i := range epochs {
		claims.Go(func() { epochs[i] = st.begin("s").epoch })
	}
	claims.Wait()
	slices.Sort(epochs)
	for i, epoch := range epochs {
		if epoch != epochs[0]+int64(i) {
			t.Fatalf("got the epochs %v, want each to follow another", epochs)
		}
	}
}

// A claim takes what is known of the session anew, makes it active and gives
// back where it stands.
func TestStoreClaimRow(t *testing.T) {
	st := newStoreTest(t)
	first := &description{userID: "ann", url: "u1", metadata: []byte(`{"a":"\u0000\ud800" , "n":1e400}`)}
	c, err := st.claim(t.Context(), "s", first, false, "secret", false, 0)
	if err != nil || c.userID != "ann" || c.counters != (counters{snapshot: -1}) {
		t.Errorf("got %+v, error %v", c, err)
	}
	f := st.flush("s", c, []byte(`{"type":2,"timestamp":70}`), []byte(`{"type":3,"timestamp":50}`))
	f.totals.errors, f.ended = 3, true
	st.stored(f)
	row, err := st.session(t.Context(), "s")
	if err != nil || row.isActive || row.endedAt == nil || row.about.url != "u1" ||
		string(row.about.metadata) != string(first.metadata) {
		t.Errorf("got %+v of %+v, error %v", row, row.about, err)
	}
	second := &description{userID: "made_up", url: "u2", metadata: []byte(`{}`)}
	again, err := st.claim(t.Context(), "s", second, true, "secret", true, 0)
	if err != nil || again.epoch != c.epoch+1 || again.userID != "ann" || again.counters != f.totals {
		t.Errorf("got %+v, error %v, want the next epoch of ann, by its token, at %+v", again, err, f.totals)
	}
	row, err = st.session(t.Context(), "s")
	if err != nil || !row.isActive || row.endedAt != nil || row.about.url != "u2" ||
		string(row.about.metadata) != "{}" ||
		row.about.userID != "ann" {
		t.Errorf("got %+v of %+v, error %v", row, row.about, err)
	}
	if _, err := st.claim(t.Context(), "s", second, false, "secret", true, 0); err != nil {
		t.Fatal(err)
	}
	if row, _ := st.session(t.Context(), "s"); row.about.userID != "made_up" {
		t.Errorf("got the user %s, want the one that the page names", row.about.userID)
	}
}

// ---- errors of the page ----

func TestStoreReports(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	f := st.flush("s", c)
	for id := range int64(1100) {
		st.report(f, fmt.Sprintf(`{"n":%d , "nul":"\u0000\ud800","big":1e400}`, id))
	}
	st.stored(f)
	got, err := st.reports(t.Context(), "s")
	if err != nil || len(got) != 1000 || got[0].ID != 100 || got[999].ID != 1099 {
		t.Fatalf("got %d errors, %v, want the newest 1000, oldest first", len(got), err)
	}
	if want := `{"n":100 , "nul":"\u0000\ud800","big":1e400}`; string(got[0].Data) != want || got[0].Kind != "error" ||
		time.Since(got[0].CreatedAt) > time.Hour {
		t.Errorf("got %s %s at %v, want %s", got[0].Kind, got[0].Data, got[0].CreatedAt, want)
	}
}

// ---- cleaning up ----

// old makes ended sessions with an event and an error each, the first the oldest.
func (t *storeTest) old(n int, bytes int) {
	t.Helper()
	execSQL(t, t.database, `with s as (
			insert into sessions (session_id, user_id, url, metadata, is_active, ended_at, event_count, stored_bytes)
			select 'old'||i, 'u', '', '{}', false, now() - interval '100 hours' + i * interval '20 minutes', 1, $2
			from generate_series(1, $1) i returning session_id),
		e as (insert into session_events (session_id, first_index, event_count, raw_bytes, events)
			select session_id, 0, 1, 2, 'x' from s)
		insert into session_errors (session_id, id, kind, error_data)
			select session_id, 0, 'error', '{}' from s`, n, bytes)
}

// rows checks how many of them each table has.
func (t *storeTest) rows(want string) {
	t.Helper()
	t.holds("rows", want, `select format('%s %s %s', (select count(*) from sessions),
		(select count(*) from session_events), (select count(*) from session_errors))`)
}

func (t *storeTest) removes(want int64, age time.Duration, limit int64) {
	t.Helper()
	if n, err := t.removeOld(t.Context(), age, limit); err != nil || n != want {
		t.Errorf("older than %v, over %d bytes: removed %d, %v, want %d", age, limit, n, err, want)
	}
}

// Sessions that ended before a time go, with all that belongs to them; live ones
// and later ones stay.
func TestStoreRemoveEnded(t *testing.T) {
	st := newStoreTest(t)
	st.begin("empty") // one without an event goes after a day, and is not listed meanwhile
	execSQL(st, st.database, "update sessions set is_active = false, ended_at = now() - interval '25 hours'")
	if rows, _, err := st.find(t.Context(), filter{}, 10, 0); err != nil || len(rows) != 0 {
		t.Errorf("got a list of %d, %v, want none", len(rows), err)
	}
	st.removes(1, 1000*time.Hour, 0)
	st.old(2*deleteStep+7, 1)
	live := st.begin("live")
	st.stored(st.flush("live", live, numbered(0, 3)...))
	execSQL(st, st.database, `update sessions set created_at = '2020-01-01', updated_at = '2020-01-01'
		where session_id = 'live'`)
	st.removes(103, 100*time.Hour-103*20*time.Minute-10*time.Minute, 0)
	st.rows("5 5 4")
	st.removes(4, 0, 0)
	st.removes(0, -1000*time.Hour, 0) // the last is live
}

// Servers that clean up at the same time count each session once.
func TestStoreRemoveTogether(t *testing.T) {
	st := newStoreTest(t)
	st.old(3*deleteStep, 1)
	var removed atomic.Int64
	var servers sync.WaitGroup
	for range 3 {
		servers.Go(func() {
			n, err := st.removeOld(t.Context(), 0, 0)
			if removed.Add(n); err != nil {
				t.Error(err)
			}
		})
	}
	servers.Wait()
	if n := removed.Load(); n != 3*deleteStep {
		t.Errorf("%d count as removed, want %d", n, 3*deleteStep)
	}
	st.rows("0 0 0")
}

// A session that comes back while it is being cleaned up is either gone as a
// whole, or there as a whole and goes on.
func TestStoreRemoveOrContinue(t *testing.T) {
	st := newStoreTest(t)
	st.old(20, 1)
	var work sync.WaitGroup
	var gone atomic.Int64
	for i := range 20 {
		work.Go(func() {
			id := fmt.Sprintf("old%d", i+1)
			c, err := st.claim(t.Context(), id, aboutNobody, false, "", false, 0)
			if errors.Is(err, errToken) { // it went between two looks: its tracker gets a new one
				gone.Add(1)
				return
			}
			if err != nil {
				t.Errorf("%s: %v", id, err)
				return
			}
			if got := st.commitOne(st.flush(id, c, []byte(`{"again":1}`))); got != stored {
				t.Errorf("%s: got outcome %d", id, got)
			}
		})
	}
	if _, err := st.removeOld(t.Context(), 0, 0); err != nil {
		t.Error(err)
	}
	work.Wait()
	st.holds("torn sessions", 0, `select count(*) from sessions s where event_count <>
		(select coalesce(sum(event_count), 0) from session_events e where e.session_id = s.session_id)`)
	st.holds("sessions that go on", 20-gone.Load(), "select count(*) from sessions where is_active")
}

// The oldest ended sessions go until what is stored fits.
func TestStoreRemoveToFit(t *testing.T) {
	st := newStoreTest(t)
	st.old(10, 100)
	c := st.begin("live")
	st.stored(st.flush("live", c, numbered(0, 10)...))
	execSQL(st, st.database, "update sessions set stored_bytes = 100 where session_id = 'live'")
	for _, tt := range []struct{ limit, removed int64 }{{1133, 0}, {5000, 0}, {1132, 1}, {721, 3}, {1, 6}, {1, 0}} {
		if st.removes(tt.removed, 10000*time.Hour, tt.limit); tt.removed == 1 {
			st.holds("the oldest", 0, "select count(*) from sessions where session_id = 'old1'")
		}
	}
	st.rows("1 1 0")
}

// Active sessions end when their server has not said for long that it is there,
// and are active again when it stores something after all.
func TestStoreEndLost(t *testing.T) {
	st := newStoreTest(t)
	st.begin("here")
	other := openTestStore(t, st.database)
	other.server = "other"
	c, err := other.claim(t.Context(), "there", aboutNobody, false, "", false, 0)
	if err != nil {
		t.Fatal(err)
	}
	sweep := func(who *store, active string, held ...string) {
		t.Helper()
		err := errors.Join(who.beat(t.Context()), who.endLost(t.Context(), append([]string{}, held...)))
		if err != nil {
			t.Fatal(err)
		}
		st.holds("active", active,
			"select string_agg(session_id, ' ' order by session_id) from sessions where is_active")
	}
	sweep(other, "here there", "there")
	sweep(st.store, "here there") // nobody holds what was claimed just now
	execSQL(st, st.database, "update sessions set updated_at = now() - interval '1 hour'")
	sweep(st.store, "here there", "here") // both are there
	execSQL(st, st.database, "update servers set seen_at = now() - interval '1 hour' where server = 'other'")
	sweep(st.store, "here", "here")
	st.holds("it ended when it was last heard of", true,
		"select ended_at = updated_at and ended_at < now() - interval '59 min' from sessions where not is_active")
	st.stored(st.flush("there", c, numbered(0, 1)...))
	sweep(st.store, "here there", "here")
	sweep(st.store, "there")
	execSQL(st, st.database, "update sessions set is_active = true, updated_at = now() - interval '1 hour'")
	execSQL(st, st.database, "delete from servers")
	sweep(other, "there", "there") // one that beats for the first time counts as there
}

// A server ends what its hub does not hold.
func TestSweep(t *testing.T) {
	t.Parallel()
	s := startInside(t, "BATCH_INTERVAL=3600000")
	s.recording("held")
	execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, server)
		values ('lost', '', '', '{}', true, $1)`, s.server.store.server)
	execSQL(t, s.database, "update sessions set updated_at = now() - interval '1 hour'")
	s.server.sweep(t.Context())
	const active = "select string_agg(session_id, ' ') from sessions where is_active"
	if got := querySQL[string](t, s.database, active); got != "held" {
		t.Errorf("active: got %q, want the session that is held", got)
	}
}

// anyRoom is room in memory for what is read.
func anyRoom(context.Context, int64) error { return nil }
