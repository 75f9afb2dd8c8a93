package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const theRow = "select (to_jsonb(sessions) - 'updated_at')::text from sessions"

// Storing twice, because a commit's answer was lost, changes nothing.
func TestStoreCommitTwice(t *testing.T) {
	st := newStoreTest(t)
	c := st.begin("s")
	f := st.flush("s", c, numbered(0, 5)...)
	st.report(f, `"x"`)
	st.stored(f)
	const chunks = "select string_agg((session_events.*)::text, ' ') from session_events"
	row, events := querySQL[string](st, st.database, theRow), querySQL[string](st, st.database, chunks)
	st.stored(f)
	st.holds("the row", row, theRow)
	st.holds("the chunks", events, chunks)
	st.holds("errors", 1, "select count(*) from session_errors")
	sameEvents(t, "events", st.all("s", 0, 100), numbered(0, 5))
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
	row := querySQL[string](st, st.database, theRow)
	if got := st.commitOne(f); got != epochLost {
		t.Errorf("got outcome %d, want epochLost", got)
	}
	st.holds("the row", row, theRow)
	sameEvents(t, "events", st.all("s", 0, 100), []json.RawMessage{json.RawMessage(`{"fresh":1}`)})
	st.rows("1 1 0")
	if err := st.remove(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if got := st.commitOne(f); got != deleted {
		t.Errorf("got outcome %d, want deleted", got)
	}
	st.rows("0 0 0")
	if c := st.begin("s"); c.epoch <= fresh.epoch { // the same id again is not written to by who had it before
		t.Errorf("got epoch %d after %d, want a higher one", c.epoch, fresh.epoch)
	}
	if got := st.commitOne(f); got != epochLost {
		t.Errorf("got outcome %d, want epochLost", got)
	}
}

// A batch that fails as a group is tried session by session: what PostgreSQL
// refuses is refused alone, and what only fails is to be tried again.
func TestStoreWritePoison(t *testing.T) {
	st := newStoreTest(t)
	execSQL(st, st.database, `create function refuse() returns trigger language plpgsql as $$
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
	st.holds("events", 9, "select sum(event_count) from session_events")
	execSQL(st, st.database, "drop trigger refuse on session_events")
	st.w.write(t.Context(), work[3:4])
	if work[3].outcome != stored {
		t.Errorf("got outcome %d, want stored", work[3].outcome)
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
	st.holds("events in the row", 4, "select event_count from sessions")
}

func TestStoreDataErrors(t *testing.T) {
	const data = "22000 22P05 22021 23505 23514 54000"
	const others = " 57P01 40001 40P01 53100 53300 25006 57014 08006 58030 XX000 42P01 55P03"
	for code := range strings.FieldsSeq(data + others) {
		err := fmt.Errorf("commit: %w", &pgconn.PgError{Code: code})
		if got, want := isDataError(err), strings.Contains(data, code); got != want {
			t.Errorf("%s: got %v, want %v", code, got, want)
		}
	}
	if isDataError(&pgconn.PgError{}) || isDataError(context.DeadlineExceeded) || isDataError(nil) {
		t.Error("an error without a reason, or not PostgreSQL's, blames the data")
	}
}

func TestStoreChunks(t *testing.T) {
	st := newStoreTest(t)
	text := func(n, size int) []byte { return fmt.Appendf(nil, `{"n":%d,"t":"%s"}`, n, strings.Repeat("x", size)) }
	const most = chunkBytes
	big := len(text(0, 0))
	tests := []struct {
		name    string
		batches [][]json.RawMessage
		want    []int64 // events in each chunk
	}{
		{"nothing", nil, nil},
		{"an empty batch", [][]json.RawMessage{{}}, nil},
		{"one event", [][]json.RawMessage{{text(0, 1)}}, []int64{1}},
		{"batches are joined", [][]json.RawMessage{numbered(0, 3), {}, numbered(3, 4), numbered(4, 9)}, []int64{9}},
		{"just full", [][]json.RawMessage{{text(0, most-2-big)}}, []int64{1}},
		{"a large event is alone", [][]json.RawMessage{numbered(0, 2), {text(2, 3*most)}, numbered(3, 5)},
			[]int64{2, 1, 2}},
		{"large events inside a batch", [][]json.RawMessage{{text(0, 1), text(1, 2*most), text(2, 2*most), text(3, 1)}},
			[]int64{1, 1, 1, 1}},
		{"split at 1 MB, inside a batch and between", [][]json.RawMessage{
			{text(0, most*2/5), text(1, most*2/5), text(2, most*2/5)}, {text(3, most*2/5), text(4, most*2/5)}},
			[]int64{2, 2, 1}},
		{"split at so many events", [][]json.RawMessage{numbered(0, chunkEvents+1)}, []int64{chunkEvents, 1}},
	}
	for i, tt := range tests {
		id := fmt.Sprintf("s%d", i)
		c := st.begin(id)
		f := &flush{session: id, epoch: c.epoch, totals: c.counters}
		var events []json.RawMessage
		for _, batch := range tt.batches {
			st.add(f, batch...)
			events = append(events, batch...)
		}
		st.stored(f)
		chunks, err := st.chunks(t.Context(), id, 0, 100)
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
			found, err := st.chunkWith(t.Context(), id, c.first, anyRoom)
			if err != nil {
				t.Fatal(err)
			}
			if text, err := unzip(found.events, c.raw); err != nil || len(text) != c.raw || !json.Valid(text) {
				t.Errorf("%s: chunk %d: %d bytes, %v, want %d", tt.name, c.first, len(text), err, c.raw)
			}
		}
		if !slices.Equal(counts, tt.want) {
			t.Errorf("%s: got chunks of %v events, want %v", tt.name, counts, tt.want)
		}
		sameEvents(t, tt.name, st.all(id, 0, 2*chunkEvents), events)
		st.holds(tt.name+": stored_bytes", f.totals.stored,
			"select coalesce(sum(octet_length(events)), 0) from session_events where session_id = $1", id)
	}
	if _, err := st.chunkWith(t.Context(), "nobody", 1, anyRoom); !errors.Is(err, errNotFound) {
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
	st.holds("the map", "0+4 400-600 2, 4+1 700-700 4, 5+1 - , 6+1 800-800 ",
		`select string_agg(format('%s+%s %s-%s %s', first_index, event_count, start_time, end_time, snapshot_index),
			', ' order by first_index) from session_events`)
}

// The cost of a page does not grow with the session: it finds its chunk by the
// key.
func TestStorePagePlan(t *testing.T) {
	st := newStoreTest(t)
	execSQL(st, st.database, `insert into sessions (session_id, user_id, url, metadata, is_active)
		select 's'||i, 'u', '', '{}', true from generate_series(1, 20) i;
		insert into session_events (session_id, first_index, event_count, raw_bytes, events)
		select 's'||i, j*10, 10, 2, 'x' from generate_series(1, 20) i, generate_series(0, 999) j;
		analyze`)
	source, err := os.ReadFile("store.go")
	_, query, _ := strings.Cut(string(source), "`select first_index, event_count, raw_bytes from")
	query, _, ok := strings.Cut(query, "`")
	if query = "select first_index, event_count, raw_bytes from" + query; err != nil || !ok {
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
	for _, damage := range []string{"'rubbish'", "substring(events from 1 for 30)", "''", "'\\x1f8b0800000000000000'",
		gzippedSQL("{}"), gzippedSQL("[1]"), gzippedSQL("[{}]"), gzippedSQL("[{}")} {
		execSQL(st, st.database, "begin; update session_events set events = "+damage+"::bytea; commit")
		if err := st.events(t.Context(), "s", 0, 50, anyRoom, func([]byte) bool { return true }); err == nil {
			t.Errorf("%s: got no error", damage)
		}
		execSQL(st, st.database, "delete from session_events; update sessions set event_count = 0")
		st.stored(st.flush("s", c, numbered(0, 50)...))
	}
}

func gzippedSQL(text string) string { return fmt.Sprintf(`'\x%x'`, zip([]byte(text))) }
