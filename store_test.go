package main

// The store against a real PostgreSQL: who may claim a session, what a commit
// leaves behind whatever happens to its answer, chunks, pages over chunks, and
// cleaning up beside writers.

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
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
	st.w = &writer{store: st.store, metrics: newMetrics(), log: slog.New(slog.DiscardHandler)}
	return st
}

func openTestStore(t testing.TB, database string) *store {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	cfg.MaxConns = 4
	st, err := openStore(t.Context(), cfg)
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
func (t *storeTest) flush(id string, c claim, events ...[]byte) *flush {
	t.Helper()
	f := &flush{session: id, epoch: c.epoch, totals: c.counters}
	t.add(f, events...)
	return f
}

// add adds a batch of events to a flush.
func (t *storeTest) add(f *flush, events ...[]byte) {
	t.Helper()
	msg := slices.Concat([]byte(`{"type":"events_batch","data":{"events":[`), bytes.Join(events, []byte(" ,\n")), []byte(`]}}`))
	parsed, err := parseFrame(msg)
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
	to = min(to, one[int64](t, "select coalesce(sum(event_count), 0) from session_events where session_id = $1", id))
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
func numbered(from, to int) (events [][]byte) {
	for n := from; n < to; n++ {
		events = append(events, fmt.Appendf(nil, `{"n":%d}`, n))
	}
	return events
}

func raw(events [][]byte) (all []json.RawMessage) {
	for _, e := range events {
		all = append(all, e)
	}
	return all
}

// one reads a value of the test's database.
func one[T any](t *storeTest, sql string, args ...any) (value T) {
	t.Helper()
	if err := t.pool.QueryRow(t.Context(), sql, args...).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

func (t *storeTest) exec(sql string, args ...any) {
	t.Helper()
	if _, err := t.pool.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// ---- schema ----

// The schema can be applied again and again, by several servers at once, also to
// a database in use.
func TestStoreSchema(t *testing.T) {
	t.Parallel()
	database := testDatabase(t)
	stores := make([]*store, 5)
	for i := range stores {
		stores[i] = openTestStore(t, database)
	}
	for round := range 3 {
		var servers sync.WaitGroup
		for _, st := range stores {
			servers.Go(func() {
				if err := st.applySchema(t.Context()); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		servers.Wait()
		if round == 1 {
			execSQL(t, database, "insert into sessions (session_id, user_id, url, metadata, is_active) values ('s', 'u', '', '{}', true)")
		}
	}
	if n := querySQL[int](t, database, "select count(*) from sessions"); n != 1 {
		t.Errorf("got %d sessions, want 1", n)
	}
	if kind := querySQL[string](t, database, `select attstorage::text from pg_attribute where attrelid = 'session_events'::regclass and attname = 'events'`); kind != "e" {
		t.Errorf("the events are stored %q, want e: PostgreSQL would compress them again", kind)
	}
	keys := querySQL[string](t, database, `select string_agg(pg_get_indexdef(indexrelid), ' ') from pg_index
		where indrelid in ('sessions'::regclass, 'session_events'::regclass, 'session_errors'::regclass) and indisunique`)
	if n := strings.Count(keys, "(session_id"); n != 3 {
		t.Errorf("got the keys %s, want all to begin with session_id", keys)
	}
}

// A backup that reads the tables for long, and a transaction that writes, do not
// keep a server from starting, nor does its start keep others from writing.
func TestStoreSchemaBesideOthers(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	other := connectSQL(t, st.database)
	defer other.Close(context.Background())
	if _, err := other.Exec(t.Context(), "begin; lock table sessions, session_events, session_errors in access share mode"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := openTestStore(t, st.database).applySchema(ctx); err != nil {
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
	before := map[string]int64{} // each session's first epoch, less one
	try := func(id, token string, resuming bool) (int64, error) {
		c, err := st.claim(t.Context(), id, aboutNobody, false, token, resuming, 0)
		if err != nil {
			return 0, err
		}
		if before[id] == 0 {
			before[id] = c.epoch - 1
		}
		return c.epoch - before[id], nil
	}
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
		if epoch, err := try(tt.id, tt.token, tt.resuming); epoch != tt.epoch || !errors.Is(err, tt.err) {
			t.Errorf("%s: got epoch %d, error %v, want %d, %v", tt.name, epoch, err, tt.epoch, tt.err)
		}
	}
	if n := one[int](st, "select count(*) from sessions"); n != 2 {
		t.Errorf("got %d sessions, want 2", n)
	}
	if n := one[int](st, "select count(*) from sessions where encode(resume_hash, 'escape') like '%secret%' or sessions::text like '%secret%'"); n != 0 {
		t.Error("the token itself is stored")
	}
}

// Of many who claim at once each gets an epoch of its own.
func TestStoreClaimAtOnce(t *testing.T) {
	st := newStoreTest(t)
	epochs := make([]int64, 20)
	var claims sync.WaitGroup
	for i := range epochs {
		claims.Go(func() {
			c, err := st.claim(t.Context(), "s", aboutNobody, false, "", false, 0)
			if err != nil {
				t.Error(err)
			}
			epochs[i] = c.epoch
		})
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
	if err != nil || row.isActive || row.endedAt == nil || row.about.url != "u1" || string(row.about.metadata) != string(first.metadata) {
		t.Errorf("got %+v of %+v, error %v", row, row.about, err)
	}
	second := &description{userID: "made_up", url: "u2", metadata: []byte(`{}`)}
	again, err := st.claim(t.Context(), "s", second, true, "secret", true, 0)
	if err != nil || again.epoch != c.epoch+1 || again.userID != "ann" || again.counters != f.totals {
		t.Errorf("got %+v, error %v, want the next epoch of ann, by its token, at %+v", again, err, f.totals)
	}
	row, err = st.session(t.Context(), "s")
	if err != nil || !row.isActive || row.endedAt != nil || row.about.url != "u2" || string(row.about.metadata) != "{}" || row.about.userID != "ann" {
		t.Errorf("got %+v of %+v, error %v", row, row.about, err)
	}
	if _, err := st.claim(t.Context(), "s", second, false, "secret", true, 0); err != nil {
		t.Fatal(err)
	}
	if row, _ := st.session(t.Context(), "s"); row.about.userID != "made_up" {
		t.Errorf("got the user %s, want the one that the page names", row.about.userID)
	}
}

// ---- commits ----

// Storing twice, because a commit's answer was lost, changes nothing.
func TestStoreCommitTwice(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	f := st.flush("s", c, numbered(0, 5)...)
	st.report(f, `"x"`)
	st.stored(f)
	before := one[string](st, "select (to_jsonb(sessions) - 'updated_at')::text from sessions")
	events := one[string](st, "select string_agg((session_events.*)::text, ' ') from session_events")
	st.stored(f)
	after := one[string](st, "select (to_jsonb(sessions) - 'updated_at')::text from sessions")
	if after != before {
		t.Errorf("got the row %s, want %s", after, before)
	}
	if again := one[string](st, "select string_agg((session_events.*)::text, ' ') from session_events"); again != events {
		t.Error("the chunks have changed")
	}
	if n := one[int](st, "select count(*) from session_errors"); n != 1 {
		t.Errorf("got %d errors, want 1", n)
	}
	sameEvents(t, "events", st.all("s", 0, 100), raw(numbered(0, 5)))
}

// A batch of an older epoch leaves nothing behind; one of a session that is
// deleted neither.
func TestStoreCommitFenced(t *testing.T) {
	st := newStoreTest(t)
	old := st.begin("s")
	f := st.flush("s", old, numbered(0, 2)...)
	st.report(f, `1`)
	fresh := st.begin("s")
	st.stored(st.flush("s", fresh, []byte(`{"fresh":1}`)))
	row := one[string](st, "select (to_jsonb(sessions) - 'updated_at')::text from sessions")
	if got := st.commitOne(f); got != epochLost {
		t.Errorf("got outcome %d, want epochLost", got)
	}
	if now := one[string](st, "select (to_jsonb(sessions) - 'updated_at')::text from sessions"); now != row {
		t.Errorf("the row is %s, want %s", now, row)
	}
	sameEvents(t, "events", st.all("s", 0, 100), []json.RawMessage{json.RawMessage(`{"fresh":1}`)})
	if n := one[int](st, "select count(*) from session_errors"); n != 0 {
		t.Errorf("got %d errors, want none", n)
	}
	if err := st.remove(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if got := st.commitOne(f); got != deleted {
		t.Errorf("got outcome %d, want deleted", got)
	}
	if n := one[int](st, "select (select count(*) from sessions) + (select count(*) from session_events)"); n != 0 {
		t.Errorf("%d rows are there, want none", n)
	}
}

// A batch that fails as a group is tried session by session: what PostgreSQL
// refuses is refused alone, and what only fails is to be tried again.
func TestStoreWritePoison(t *testing.T) {
	st := newStoreTest(t)
	st.exec(`create function refuse() returns trigger language plpgsql as $$
		begin
			if new.session_id like 'poison%' then raise exception 'refused' using errcode = '22000'; end if;
			if new.session_id like 'fails%' then raise exception 'later' using errcode = '53100'; end if;
			return new;
		end $$;
		create trigger refuse before insert on session_events for each row execute function refuse()`)
	var work []*flush
	for _, id := range []string{"good1", "poison1", "good2", "fails", "poison2", "gone", "good3"} {
		f := st.flush(id, st.begin(id), numbered(0, 3)...)
		f.encode()
		work = append(work, f)
	}
	if err := st.remove(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	st.w.write(t.Context(), work)
	var got []outcome
	for _, f := range work {
		got = append(got, f.outcome)
	}
	if want := []outcome{stored, refused, stored, failed, refused, deleted, stored}; !slices.Equal(got, want) {
		t.Errorf("got the outcomes %v, want %v", got, want)
	}
	if n := st.w.metrics.refusedSessions.Load(); n != 2 {
		t.Errorf("%d sessions count as refused, want 2", n)
	}
	if n := one[int](st, "select sum(event_count) from session_events"); n != 9 {
		t.Errorf("got %d events, want 9", n)
	}
	st.exec("drop trigger refuse on session_events")
	st.w.write(t.Context(), work[3:4])
	if work[3].outcome != stored {
		t.Errorf("got outcome %d, want stored", work[3].outcome)
	}
}

// A session that is deleted and made again is not written to by who had it
// before: its epochs go on.
func TestStoreEpochAfterDeletion(t *testing.T) {
	st := newStoreTest(t)
	old := st.begin("s")
	f := st.flush("s", old, numbered(0, 2)...)
	if err := st.remove(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if c := st.begin("s"); c.epoch <= old.epoch {
		t.Errorf("got epoch %d after %d, want a higher one", c.epoch, old.epoch)
	}
	if got := st.commitOne(f); got != epochLost {
		t.Errorf("got outcome %d, want epochLost", got)
	}
}

// PostgreSQL may carry out a batch long after it was given up and stored on
// another connection, with others behind it: the row does not go back.
func TestStoreLateCopy(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	late := st.flush("s", c, numbered(0, 2)...)
	st.stored(late)
	next := claim{epoch: c.epoch, counters: late.totals}
	st.stored(st.flush("s", next, numbered(2, 4)...))
	st.commitOne(late)
	if n := one[int](st, "select event_count from sessions"); n != 4 {
		t.Errorf("got %d events in the row, want 4", n)
	}
}

// A chunk that is shorter than its row says ends a page with an error.
func TestStoreShortChunk(t *testing.T) {
	st := newStoreTest(t)
	st.stored(st.flush("s", st.begin("s"), numbered(0, 2)...))
	st.exec("update session_events set event_count = 9")
	if err := st.events(t.Context(), "s", 0, 9, anyRoom, func([]byte) bool { return true }); err == nil {
		t.Error("got no error")
	}
}

func TestStoreDataErrors(t *testing.T) {
	for code, want := range map[string]bool{
		"22000": true, "22P05": true, "22021": true, "23505": true, "23514": true, "54000": true,
		"57P01": false, "40001": false, "40P01": false, "53100": false, "53300": false, "25006": false, "57014": false, "08006": false,
		"58030": false, "XX000": false, "42P01": false, "55P03": false, "": false,
	} {
		err := fmt.Errorf("commit: %w", &pgconn.PgError{Code: code})
		if got := isDataError(err); got != want {
			t.Errorf("%s: got %v, want %v", code, got, want)
		}
	}
	if isDataError(context.DeadlineExceeded) || isDataError(nil) {
		t.Error("an error that is not PostgreSQL's blames the data")
	}
}

// ---- chunks ----

func TestStoreChunks(t *testing.T) {
	st := newStoreTest(t)
	text := func(n, size int) []byte { return fmt.Appendf(nil, `{"n":%d,"t":"%s"}`, n, strings.Repeat("x", size)) }
	const most = chunkBytes
	big := len(text(0, 0))
	tests := []struct {
		name    string
		batches [][][]byte
		want    []int64 // events in each chunk
	}{
		{"nothing", nil, nil},
		{"an empty batch", [][][]byte{{}}, nil},
		{"one event", [][][]byte{{text(0, 1)}}, []int64{1}},
		{"batches are joined", [][][]byte{numbered(0, 3), {}, numbered(3, 4), numbered(4, 9)}, []int64{9}},
		{"just full", [][][]byte{{text(0, most-2-big)}}, []int64{1}},
		{"a large event is alone", [][][]byte{numbered(0, 2), {text(2, 3*most)}, numbered(3, 5)}, []int64{2, 1, 2}},
		{"large events inside a batch", [][][]byte{{text(0, 1), text(1, 2*most), text(2, 2*most), text(3, 1)}}, []int64{1, 1, 1, 1}},
		{"split at 1 MB, inside a batch and between", [][][]byte{
			{text(0, most*2/5), text(1, most*2/5), text(2, most*2/5)}, {text(3, most*2/5), text(4, most*2/5)}}, []int64{2, 2, 1}},
	}
	for i, tt := range tests {
		id := fmt.Sprintf("s%d", i)
		c := st.begin(id)
		f := &flush{session: id, epoch: c.epoch, totals: c.counters}
		var events [][]byte
		for _, batch := range tt.batches {
			st.add(f, batch...)
			events = append(events, batch...)
		}
		st.stored(f)
		chunks, err := st.chunks(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		var counts []int64
		next := int64(0)
		for _, c := range chunks {
			if c.first != next || c.raw > most && c.count > 1 {
				t.Errorf("%s: a chunk at %d, want %d, with %d events, %d bytes", tt.name, c.first, next, c.count, c.raw)
			}
			next += c.count
			counts = append(counts, c.count)
			data, err := st.chunk(t.Context(), id, c.first)
			if err != nil {
				t.Fatal(err)
			}
			if text, err := unzip(data, c.raw); err != nil || len(text) != c.raw || !json.Valid(text) {
				t.Errorf("%s: chunk %d: %d bytes, %v, want %d", tt.name, c.first, len(text), err, c.raw)
			}
		}
		if !slices.Equal(counts, tt.want) {
			t.Errorf("%s: got chunks of %v events, want %v", tt.name, counts, tt.want)
		}
		sameEvents(t, tt.name, st.all(id, 0, 1000), raw(events))
		if bytes := one[int64](st, "select coalesce(sum(octet_length(events)), 0) from session_events where session_id = $1", id); bytes != f.totals.stored {
			t.Errorf("%s: got stored_bytes %d, want %d", tt.name, f.totals.stored, bytes)
		}
	}
	if _, err := st.chunk(t.Context(), "s2", 1); !errors.Is(err, errNotFound) {
		t.Errorf("a chunk that is not there: got %v", err)
	}
}

// Each chunk says what a player seeks by.
func TestStoreChunkMap(t *testing.T) {
	st := newStoreTest(t)
	large := strings.Repeat("x", chunkBytes)
	event := func(kind, at int, text string) []byte {
		return fmt.Appendf(nil, `{"type":%d,"timestamp":%d,"t":"%s"}`, kind, at, text)
	}
	c := st.begin("s")
	st.stored(st.flush("s", c,
		event(4, 500, ""), event(2, 400, ""), event(2, 600, ""), event(3, 450, ""), // one chunk
		event(2, 700, large), []byte(`{"type":3,"data":"`+large+`"}`), event(3, 800, "")))
	got, err := st.chunks(t.Context(), "s")
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		got[i].raw = 0
	}
	want := []chunk{
		{first: 0, count: 4, startTime: 400, endTime: 600, snapshot: 2},
		{first: 4, count: 1, startTime: 700, endTime: 700, snapshot: 4},
		{first: 5, count: 1, snapshot: -1},
		{first: 6, count: 1, startTime: 800, endTime: 800, snapshot: -1},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// Counters are in the session's row, set to what they are after the flush.
func TestStoreCounters(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	var want counters
	next := c
	for _, events := range [][][]byte{{[]byte(`{"type":2,"timestamp":50}`)}, numbered(0, 100), {[]byte(`{"type":3,"timestamp":20}`)}, {}} {
		f := st.flush("s", next, events...)
		st.report(f, "{}")
		st.stored(f)
		next.counters, want = f.totals, f.totals
	}
	row, err := st.session(t.Context(), "s")
	if err != nil || row.now != want {
		t.Errorf("got %+v, want %+v", row.now, want)
	}
	if want.events != 102 || want.errors != 4 || want.seq != 4 || want.firstTime != 20 || want.endTime != 50 || want.snapshot != 0 {
		t.Errorf("got %+v", want)
	}
	total, err := st.totals(t.Context())
	if err != nil || total.sessions != 1 || total.active != 1 || total.events != 102 || total.bytes <= want.stored || total.bytes > want.stored+100 {
		t.Errorf("totals: got %+v", total)
	}
}

// A page begins and ends anywhere, over chunks of any size.
func TestStorePages(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	var events [][]byte
	sizes := rand.New(rand.NewPCG(1, 2))
	for len(events) < 300 {
		from := len(events)
		n := 1 + sizes.IntN(40)
		events = append(events, numbered(from, from+n)...)
		f := st.flush("s", c, events[from:]...)
		st.stored(f)
		c.counters = f.totals
	}
	total := int64(len(events))
	for range 300 {
		from := sizes.Int64N(total + 5)
		to := from + sizes.Int64N(60)
		want := events[min(from, total):min(to, total)]
		if got := st.all("s", from, to); len(got) != len(want) || len(want) > 0 && !bytes.Equal(got[0], want[0]) {
			t.Fatalf("from %d to %d: got %d events, want %d", from, to, len(got), len(want))
		} else {
			sameEvents(t, "page", got, raw(want))
		}
	}
	n := 0
	err := st.events(t.Context(), "s", 0, total, anyRoom, func([]byte) bool { n++; return n < 7 })
	if err != nil || n != 7 {
		t.Errorf("a reader that stops: got %d events, %v, want 7", n, err)
	}
	if got := st.all("nobody", 0, 10); len(got) != 0 {
		t.Errorf("got %d events of nobody", len(got))
	}
}

// The cost of a page does not grow with the session: it finds its chunk by the
// key.
func TestStorePagePlan(t *testing.T) {
	st := newStoreTest(t)
	st.exec(`insert into sessions (session_id, user_id, url, metadata, is_active) select 's'||i, 'u', '', '{}', false from generate_series(1, 20) i;
		insert into session_events (session_id, first_index, event_count, raw_bytes, events) select 's'||i, j*10, 10, 2, 'x' from generate_series(1, 20) i, generate_series(0, 999) j;
		analyze`)
	source, err := os.ReadFile("store.go")
	_, query, _ := strings.Cut(string(source), "`select first_index, event_count, raw_bytes, events")
	query, _, ok := strings.Cut(query, "`")
	if query = "select first_index, event_count, raw_bytes, events" + query; err != nil || !ok {
		t.Fatalf("the query is not there: %v", err)
	}
	for _, from := range []int{0, 5000, 9985} {
		rows, _ := st.pool.Query(t.Context(), "explain (analyze, timing off) "+query, "s7", from)
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		text := strings.Join(plan, "\n")
		if err != nil || strings.Contains(text, "Seq Scan") || strings.Contains(text, "Rows Removed") {
			t.Errorf("from %d: got %v and the plan\n%s", from, err, text)
		}
		for _, rows := range regexp.MustCompile(`actual rows=(\d+)`).FindAllStringSubmatch(text, -1) {
			if n, _ := strconv.Atoi(rows[1]); n > 10 {
				t.Errorf("from %d: a step of the plan reads %d rows, want a few\n%s", from, n, text)
			}
		}
	}
}

// A chunk that is damaged is an error, not a wrong page.
func TestStoreDamagedChunk(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	st.stored(st.flush("s", c, numbered(0, 50)...))
	for _, damage := range []string{"'rubbish'", "substring(events from 1 for 30)", "''", "'\\x1f8b0800000000000000'", gzippedSQL("{}"), gzippedSQL("[1]"), gzippedSQL("[{}")} {
		st.exec("begin; update session_events set events = " + damage + "::bytea; commit")
		if err := st.events(t.Context(), "s", 0, 50, anyRoom, func([]byte) bool { return true }); err == nil {
			t.Errorf("%s: got no error", damage)
		}
		st.exec("delete from session_events; update sessions set event_count = 0")
		st.stored(st.flush("s", c, numbered(0, 50)...))
	}
}

// One that is missing is an error too.
func TestStoreMissingChunk(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	for n := range 3 {
		f := st.flush("s", c, numbered(10*n, 10*n+10)...)
		st.stored(f)
		c.counters = f.totals
	}
	st.exec("delete from session_events where first_index = 10")
	if err := st.events(t.Context(), "s", 0, 30, anyRoom, func([]byte) bool { return true }); err == nil {
		t.Error("got no error")
	}
}

func gzipped(text string) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write([]byte(text))
	z.Close()
	return out.Bytes()
}

func gzippedSQL(text string) string { return fmt.Sprintf(`'\x%x'`, gzipped(text)) }

// FuzzReadChunk reads a stored chunk as a page does.
func FuzzReadChunk(f *testing.F) {
	for _, seed := range append(jsonSeeds, `[]`, `[{}]`, `[ { } , {"a":[1]} ]`, `[{"type":2}]x`) {
		f.Add(gzipped(seed), 10)
	}
	f.Add([]byte("\x1f\x8b\x08\x00"), 1<<40)
	f.Add(append(gzipped(`[{}]`), gzipped(`[{}]`)...), -5)
	f.Fuzz(func(t *testing.T, data []byte, size int) {
		text, err := unzip(data, size&0xffff)
		if err != nil {
			return
		}
		events, err := splitEvents(text)
		var want []map[string]json.RawMessage
		if wantErr := json.Unmarshal(text, &want); err == nil && wantErr == nil && len(events) != len(want) {
			t.Fatalf("%q: got %d events, want %d", text, len(events), len(want))
		}
		for _, e := range events {
			if err == nil && (text[e.start] != '{' || text[e.end-1] != '}') {
				t.Fatalf("%q: got the event %q", text, text[e.start:e.end])
			}
		}
	})
}

// FuzzParseStart reads what a page says when it starts a session.
func FuzzParseStart(f *testing.F) {
	for _, seed := range append(jsonSeeds, `{"sessionId":"s","userId":"u\u0000","url":5,"resume":"r","r\u0065sume":1}`, `{"userId":null,"viewport":null}`,
		`{"sessionId":"`+strings.Repeat("x", 70000)+`","userId":"é`+strings.Repeat("x", 5000)+`"}`, strings.Repeat(`{"a":`, 600)+"1"+strings.Repeat("}", 600)) {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		frame, err := parseFrame(slices.Concat([]byte(`{"type":"session_start","data":`), data, []byte(`}`)))
		if err != nil {
			return
		}
		st := parseStart(frame.data)
		var metadata map[string]json.RawMessage
		if err := json.Unmarshal(st.about.metadata, &metadata); err != nil {
			t.Fatalf("%q: got the metadata %q: %v", data, st.about.metadata, err)
		}
		for _, name := range []string{"viewport", "referrer", "timeZone"} {
			if _, ok := metadata[name]; !ok {
				t.Errorf("%q: the metadata has no %s", data, name)
			}
		}
		if _, ok := metadata["resume"]; ok {
			t.Errorf("%q: the metadata tells the token", data)
		}
		for _, text := range []string{st.about.userID, st.about.url} {
			if text != clean(text) || len(text) > maxText {
				t.Errorf("%q: got %q, which is not clean", data, text)
			}
		}
		if len(st.about.metadata) > maxMetadata+200 {
			t.Errorf("got %d bytes of metadata", len(st.about.metadata))
		}
	})
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
	if want := `{"n":100 , "nul":"\u0000\ud800","big":1e400}`; string(got[0].Data) != want || got[0].Kind != "error" || time.Since(got[0].CreatedAt) > time.Hour {
		t.Errorf("got %s %s at %v, want %s", got[0].Kind, got[0].Data, got[0].CreatedAt, want)
	}
}

// ---- lists ----

func TestStoreLists(t *testing.T) {
	st := newStoreTest(t)
	for i := range 5 {
		st.begin(fmt.Sprintf("s%d", i))
		st.exec("update sessions set created_at = timestamptz '2026-01-01' + $1 * interval '1 hour', is_active = $2, ended_at = now(), event_count = $4 where session_id = $3", i%4, i%2 == 0, fmt.Sprintf("s%d", i), i%2)
	}
	st.begin("empty") // an ended one without an event is not listed
	st.exec("update sessions set is_active = false, ended_at = now() - interval '25 hours' where session_id = 'empty'")
	ids := func(rows []storedSession, err error) (all []string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range rows {
			all = append(all, row.id)
		}
		return all
	}
	newest := ids(st.newest(t.Context(), 10, 0, true))
	if want := []string{"s3", "s2", "s1", "s0", "s4"}; !slices.Equal(newest, want) {
		t.Errorf("got %v, want %v", newest, want)
	}
	if page := ids(st.newest(t.Context(), 2, 3, true)); !slices.Equal(page, []string{"s0", "s4"}) {
		t.Errorf("got the page %v, want s0, s4", page)
	}
	if over := ids(st.newest(t.Context(), 10, 0, false)); !slices.Equal(over, []string{"s3", "s1"}) {
		t.Errorf("got %v as not live, want s3, s1", over)
	}
	if total, err := st.totals(t.Context()); err != nil || total.sessions != 5 {
		t.Errorf("got %d sessions, %v, want 5", total.sessions, err)
	}
	if n, err := st.removeOld(t.Context(), 1000*time.Hour, 0); err != nil || n != 1 {
		t.Errorf("deleted %d, %v, want the empty one", n, err)
	}
	active := ids(st.active(t.Context()))
	slices.Sort(active[1:])
	if !slices.Equal(active, []string{"s2", "s0", "s4"}) {
		t.Errorf("got the active %v, want s2 first, then s0, s4", active)
	}
	if _, err := st.session(t.Context(), "nobody"); !errors.Is(err, errNotFound) {
		t.Errorf("got %v, want not found", err)
	}
}

// ---- cleaning up ----

// old makes ended sessions with an event and an error each, the first the oldest.
func (t *storeTest) old(n int, bytes int) {
	t.Helper()
	t.exec(`with s as (insert into sessions (session_id, user_id, url, metadata, is_active, ended_at, event_count, stored_bytes)
			select 'old'||i, 'u', '', '{}', false, now() - interval '100 hours' + i * interval '1 minute', 1, $2 from generate_series(1, $1) i returning session_id),
		e as (insert into session_events (session_id, first_index, event_count, raw_bytes, events) select session_id, 0, 1, 2, 'x' from s)
		insert into session_errors (session_id, id, kind, error_data) select session_id, 0, 'error', '{}' from s`, n, bytes)
}

func (t *storeTest) rows() string {
	return one[string](t, `select format('%s %s %s', (select count(*) from sessions), (select count(*) from session_events), (select count(*) from session_errors))`)
}

func TestStoreRemove(t *testing.T) {
	st := newStoreTest(t)
	st.old(3, 1)
	if err := st.remove(t.Context(), "old2"); err != nil {
		t.Error(err)
	}
	if err := st.remove(t.Context(), "old2"); !errors.Is(err, errNotFound) {
		t.Errorf("a second time: got %v, want not found", err)
	}
	if got := st.rows(); got != "2 2 2" {
		t.Errorf("got %s rows, want 2 2 2", got)
	}
}

// Sessions that ended before a time go, with all that belongs to them; live ones
// and later ones stay.
func TestStoreRemoveEnded(t *testing.T) {
	st := newStoreTest(t)
	st.old(2*deleteStep+7, 1)
	live := st.begin("live")
	st.stored(st.flush("live", live, numbered(0, 3)...))
	st.exec("update sessions set created_at = now() - interval '1 year', updated_at = now() - interval '1 year' where session_id = 'live'")
	if n, err := st.removeOld(t.Context(), 100*time.Hour-103*time.Minute-30*time.Second, 0); err != nil || n != 103 {
		t.Errorf("got %d, %v, want 103", n, err)
	}
	if got := st.rows(); got != "5 5 4" {
		t.Errorf("got %s rows, want 5 5 4", got)
	}
	if n, err := st.removeOld(t.Context(), 0, 0); err != nil || n != 4 {
		t.Errorf("got %d, %v, want the other 4", n, err)
	}
	if n, err := st.removeOld(t.Context(), -1000*time.Hour, 0); err != nil || n != 0 {
		t.Errorf("got %d, %v, want none: the last is live", n, err)
	}
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
	if n := removed.Load(); n != 3*deleteStep || st.rows() != "0 0 0" {
		t.Errorf("%d count as removed, %s rows are left, want %d and none", n, st.rows(), 3*deleteStep)
	}
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
			f := st.flush(id, c, []byte(`{"again":1}`))
			f.encode()
			if err := st.w.commit(t.Context(), []*flush{f}); err != nil || f.outcome != stored {
				t.Errorf("%s: got %v, outcome %d", id, err, f.outcome)
			}
		})
	}
	if _, err := st.removeOld(t.Context(), 0, 0); err != nil {
		t.Error(err)
	}
	work.Wait()
	torn := one[int](st, `select count(*) from sessions s where event_count <> (select coalesce(sum(event_count), 0) from session_events e where e.session_id = s.session_id)`)
	if n := one[int](st, "select count(*) from sessions where is_active"); n+int(gone.Load()) != 20 || torn != 0 {
		t.Errorf("got %d sessions, %d gone, %d torn, want 20, none", n, gone.Load(), torn)
	}
}

// The oldest ended sessions go until what is stored fits.
func TestStoreRemoveToFit(t *testing.T) {
	st := newStoreTest(t)
	st.old(10, 100)
	c := st.begin("live")
	st.stored(st.flush("live", c, numbered(0, 10)...))
	st.exec("update sessions set stored_bytes = 100 where session_id = 'live'")
	for _, tt := range []struct{ limit, removed int64 }{{1133, 0}, {5000, 0}, {1132, 1}, {721, 3}, {1, 6}, {1, 0}} {
		if n, err := st.removeOld(t.Context(), 10000*time.Hour, tt.limit); err != nil || n != tt.removed {
			t.Errorf("limit %d: removed %d, %v, want %d", tt.limit, n, err, tt.removed)
		}
		if tt.removed == 1 && one[bool](st, "select exists (select from sessions where session_id = 'old1')") {
			t.Error("the oldest is still there")
		}
	}
	if got := st.rows(); got != "1 1 0" {
		t.Errorf("got %s rows, want the live session's only", got)
	}
}

// Active sessions end when their server has not said for long that it is there,
// and are active again when it stores something after all.
func TestStoreBeat(t *testing.T) {
	st := newStoreTest(t)
	st.begin("here")
	other := &store{pool: st.pool, server: "other"}
	c, err := other.claim(t.Context(), "there", aboutNobody, false, "", false, 0)
	if err != nil {
		t.Fatal(err)
	}
	beat := func(who *store, active string) {
		t.Helper()
		if err := who.beat(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := one[string](st, "select coalesce(string_agg(session_id, ' ' order by session_id), '') from sessions where is_active"); got != active {
			t.Errorf("active are %q, want %q", got, active)
		}
	}
	beat(other, "here there")
	st.exec("update sessions set updated_at = now() - interval '1 hour'")
	beat(st.store, "here there") // both are there
	st.exec("update servers set seen_at = now() - interval '1 hour' where server = 'other'")
	beat(st.store, "here")
	if !one[bool](st, "select ended_at = updated_at and ended_at < now() - interval '59 minutes' from sessions where session_id = 'there'") {
		t.Error("it did not end when it was last heard of")
	}
	st.stored(st.flush("there", c, numbered(0, 1)...))
	beat(st.store, "here there")
	st.exec("delete from servers")
	st.exec("update sessions set updated_at = now() - interval '1 hour'")
	beat(other, "there") // one that beats for the first time counts as there
}

// While sessions are cleaned up, writers go on: none waits long.
func TestStoreWriterBesideCleanup(t *testing.T) {
	st := newStoreTest(t)
	st.old(1500, 10)
	done := make(chan error, 1)
	go func() { // ends with the cleanup
		_, err := st.removeOld(t.Context(), 0, 0)
		done <- err
	}()
	c := st.begin("live")
	commits := 0
	for running := true; running; commits++ {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		f := st.flush("live", c, numbered(0, 2)...)
		f.encode()
		if err := st.w.commit(ctx, []*flush{f}); err != nil || f.outcome != stored {
			t.Fatalf("commit %d beside the cleanup: %v, outcome %d", commits, err, f.outcome)
		}
		cancel()
		c.counters = f.totals
		select {
		case err := <-done:
			if running = false; err != nil {
				t.Error(err)
			}
		default:
		}
	}
	if commits < 3 {
		t.Errorf("only %d commits beside a cleanup of 1500 sessions", commits)
	}
	if got := one[int](st, "select count(*) from sessions"); got != 1 {
		t.Errorf("%d sessions are left, want 1", got)
	}
}

// anyRoom is room in memory for what is read.
func anyRoom(context.Context, int64) error { return nil }
