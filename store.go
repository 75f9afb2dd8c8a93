package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

//go:embed schema.sql
var schema string

// schemaLock is the advisory lock under which servers that start together apply
// the schema one after the other.
const schemaLock = 0x5e55104e

const (
	chunkBytes    = 1 << 20          // JSON in a chunk, unless one event is larger
	commitTimeout = 30 * time.Second // of one transaction of the writer
	lockTimeout   = "1s"             // in it, for a row that somebody else holds
	queryTimeout  = 15 * time.Second // of a question
	orphanAge     = 3 * time.Minute  // an active session not touched for so long has no server any more
	touchEvery    = time.Minute
	deleteStep    = 50 // sessions in one transaction
)

var (
	errNotFound = errors.New("no such session")
	errToken    = errors.New("the session is continued only by its token")
)

// store speaks SQL. Its methods are safe for concurrent use.
type store struct {
	pool *pgxpool.Pool
}

// openStore makes the pool; it connects when it is first used.
func openStore(ctx context.Context, cfg *pgxpool.Config) (*store, error) {
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("make the pool: %w", err)
	}
	return &store{pool}, nil
}

// close ends the pool. It does not wait long for connections that do not answer.
func (st *store) close() {
	closed := make(chan struct{})
	go func() { // ends when PostgreSQL answers or pgx gives it up, half a minute at most
		st.pool.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(500 * time.Millisecond):
	}
}

// applySchema brings the database's tables into being, or finds them there.
func (st *store) applySchema(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	err := pgx.BeginFunc(ctx, st.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "select pg_advisory_xact_lock($1)", schemaLock); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, schema)
		return err
	})
	if err != nil {
		return fmt.Errorf("apply schema: %w", err)
	}
	if _, err := st.list(ctx, "limit 0"); err != nil {
		return fmt.Errorf("check the sessions table: %w", err)
	}
	return nil
}

// ping asks the database whether it is there, with its tables.
func (st *store) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := st.pool.Exec(ctx, "select from sessions limit 1")
	return err
}

// Claims.

// claim is what a tracker gets of its session's row when it starts or continues
// the session; from then on the row is written under this epoch only.
type claim struct {
	epoch   int64
	userID  string
	byToken bool // it was begun with a token, which was presented
	counters
}

// claim makes the session's row, or raises its epoch. With resuming, the row must
// be there and have this token; otherwise a row that is there must have none, or
// this one because a claim's answer was lost, and has it from now on. If not:
// errToken. With keepUser, a row that is there keeps its user.
func (st *store) claim(ctx context.Context, id string, about *description, keepUser bool, token string, resuming bool) (claim, error) {
	const set = ` set epoch = sessions.epoch + 1, is_active = true, ended_at = null, updated_at = now(),
		user_id = case when $6 then sessions.user_id else $2 end, url = $3, metadata = $4,
		resume_hash = coalesce(sessions.resume_hash, $5) where `
	const returning = ` returning epoch, user_id, event_count, error_count, raw_bytes,
			stored_bytes, coalesce(first_event_time, 0), coalesce(last_event_time, 0), coalesce(snapshot_index, -1), last_seq`
	sql := `insert into sessions (session_id, user_id, url, metadata, resume_hash, is_active)
		values ($1, $2, $3, $4, $5, true) on conflict (session_id) do update` + set + `(sessions.resume_hash is null or sessions.resume_hash = $5)` + returning
	if resuming {
		sql = `update sessions` + set + `session_id = $1 and resume_hash = $5` + returning
	}
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	c := claim{byToken: resuming}
	err := st.pool.QueryRow(ctx, sql, id, about.userID, about.url, string(about.metadata), hashToken(token), keepUser).Scan(
		&c.epoch, &c.userID, &c.events, &c.errors, &c.raw, &c.stored, &c.firstTime, &c.endTime, &c.snapshot, &c.seq)
	if errors.Is(err, pgx.ErrNoRows) {
		return claim{}, errToken
	}
	return c, err
}

func hashToken(token string) []byte {
	if token == "" {
		return nil
	}
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// The writer.

// chunk is a row of session_events.
type chunk struct {
	first, count       int64
	startTime, endTime int64 // 0 when no event has a timestamp
	snapshot           int64 // -1 when there is none
	raw                int
	events             []byte
}

// writer takes sessions from the hub and stores them. Several run at once: one
// compresses while another waits for its commit.
type writer struct {
	hub     *hub
	store   *store
	metrics *metrics
	log     *slog.Logger // failures that nobody waits for
	since   atomic.Int64 // when it began what it does, in Unix seconds; 0 when it waits for work
}

// run ends with the hub.
func (w *writer) run(ctx context.Context) {
	for {
		reply := make(chan []*flush, 1)
		work, ok := ask(w.hub, reply, take{reply})
		if !ok {
			return
		}
		start := time.Now()
		w.since.Store(start.Unix())
		for _, f := range work {
			if f.chunks == nil {
				f.encode()
			}
		}
		w.write(ctx, work)
		w.metrics.batch(work, time.Since(start))
		w.since.Store(0)
		w.hub.send(settled{work})
	}
}

// write stores a batch in one transaction. When the database refuses it, the
// sessions are tried one by one, so that none suffers for another.
func (w *writer) write(ctx context.Context, work []*flush) {
	err := w.commit(ctx, work)
	if err == nil {
		return
	}
	var refusal *pgconn.PgError
	if !errors.As(err, &refusal) || len(work) == 1 {
		w.fail(work, err)
		return
	}
	var kept []*flush
	for i, f := range work {
		alone := w.commit(ctx, []*flush{f})
		switch {
		case alone == nil:
		case blamesData(alone):
			w.fail([]*flush{f}, alone)
		case errors.As(alone, &refusal):
			kept, err = append(kept, f), alone
		default: // PostgreSQL is gone, for the others too
			w.fail(append(kept, work[i:]...), alone)
			return
		}
	}
	if len(kept) > 0 {
		w.fail(kept, err)
	}
}

// fail says what becomes of flushes that could not be committed: they are kept
// and tried again, for as long as it takes, unless it is their data that
// PostgreSQL refuses.
func (w *writer) fail(work []*flush, err error) {
	w.metrics.databaseErrors.Add(1)
	w.store.distrust(err)
	result := failed
	if len(work) == 1 && blamesData(err) {
		result = refused
		w.metrics.refusedSessions.Add(1)
		w.log.Error("session refused by the database", "session", work[0].session, "first", work[0].after.events, "err", err)
	} else {
		w.log.Warn("batch not stored, will try again", "sessions", len(work), "attempt", work[0].attempts+1, "err", err)
	}
	for _, f := range work {
		f.outcome = result
	}
}

// distrust gives up the connections that there are when an error says that they
// lead to a server which does not take writes: new ones may lead to another.
func (st *store) distrust(err error) {
	var e *pgconn.PgError
	if errors.As(err, &e) && e.Code == "25006" {
		st.pool.Reset()
	}
}

// blamesData tells an error that lies in what was to be stored (data exception,
// constraint violated, limit exceeded) from one that passes.
func blamesData(err error) bool {
	var e *pgconn.PgError
	if !errors.As(err, &e) || len(e.Code) != 5 {
		return false
	}
	switch e.Code[:2] {
	case "22", "23", "54":
		return true
	}
	return false
}

const (
	updateRow = `update sessions set event_count = $3, error_count = $4, raw_bytes = $5, stored_bytes = $6,
		first_event_time = nullif($7::bigint, 0), last_event_time = nullif($8::bigint, 0), snapshot_index = nullif($9::bigint, -1),
		last_seq = $10, is_active = $11, ended_at = $12, updated_at = now()
		where session_id = $1 and epoch = $2 and event_count <= $3 and error_count <= $4 and last_seq <= $10`
	insertChunk = `insert into session_events (session_id, first_index, event_count, start_time, end_time, snapshot_index, raw_bytes, events)
		select session_id, $3::bigint, $4::integer, nullif($5::bigint, 0), nullif($6::bigint, 0), nullif($7::bigint, -1), $8::integer, $9::bytea
		from sessions where session_id = $1 and epoch = $2 on conflict do nothing`
	insertReport = `insert into session_errors (session_id, id, kind, error_data)
		select session_id, $3::bigint, $4::text, $5::json
		from sessions where session_id = $1 and epoch = $2 on conflict do nothing`
)

// commit stores flushes in one transaction. Every statement holds for the
// flush's epoch only: the first locks the row, so the others see the same. All
// values are absolute and never go back, and all rows have their keys: storing
// twice changes nothing, be it because a commit's answer was lost, or because
// PostgreSQL had been given up and carries out an old batch after a newer one.
func (w *writer) commit(ctx context.Context, work []*flush) error {
	w.since.Store(time.Now().Unix())
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	batch := &pgx.Batch{}
	batch.Queue("select set_config('lock_timeout', $1, true)", lockTimeout)
	for _, f := range work {
		f.outcome = stored
		queue(batch, f)
	}
	if err := w.store.pool.SendBatch(ctx, batch).Close(); err != nil {
		return err
	}
	return w.explain(ctx, work)
}

func queue(batch *pgx.Batch, f *flush) {
	a := f.after
	var endedAt *time.Time
	if f.ended {
		endedAt = &f.endedAt
	}
	batch.Queue(updateRow, f.session, f.epoch, a.events, a.errors, a.raw, a.stored, a.firstTime, a.endTime, a.snapshot,
		a.seq, !f.ended, endedAt).Exec(func(tag pgconn.CommandTag) error {
		if tag.RowsAffected() == 0 {
			f.outcome = overtaken
		}
		return nil
	})
	for _, c := range f.chunks {
		batch.Queue(insertChunk, f.session, f.epoch, c.first, c.count, c.startTime, c.endTime, c.snapshot, c.raw, c.events)
	}
	for _, r := range f.reports {
		batch.Queue(insertReport, f.session, f.epoch, r.id, r.kind, string(r.data))
	}
}

// explain finds out which of the flushes that met no row of their epoch had
// their session deleted.
func (w *writer) explain(ctx context.Context, work []*flush) error {
	for _, f := range work {
		if f.outcome != overtaken {
			continue
		}
		var there bool
		err := w.store.pool.QueryRow(ctx, "select exists (select from sessions where session_id = $1)", f.session).Scan(&there)
		if err != nil {
			return err
		}
		if !there {
			f.outcome = deleted
		}
	}
	return nil
}

// Chunks.

// calmLevel makes chunks a fifth smaller than gzip.BestSpeed does, at twice the
// work: right while there is little to do.
const calmLevel = 5

// packPiece is compressed without a break. Live events would otherwise wait for a
// processor, 10 ms at a time: with half of the greatest ingest beside them their
// p99 was 49 to 173 ms, and 16 to 27 ms with the breaks.
const packPiece = 32 << 10

// gzipWriters holds writers by level.
var gzipWriters [calmLevel + 1]sync.Pool

func gzipWriter(level int, out io.Writer) *gzip.Writer {
	z, ok := gzipWriters[level].Get().(*gzip.Writer)
	if !ok {
		z, _ = gzip.NewWriterLevel(nil, level)
	}
	z.Reset(out)
	return z
}

// encode makes the flush's chunks. An event's bytes go in as they came.
func (f *flush) encode() {
	f.chunks = []chunk{}
	e := encoder{level: gzip.BestSpeed}
	if f.calm {
		e.level = calmLevel
	}
	for _, b := range f.batches {
		for i := 0; i < len(b.events); {
			n := e.add(b, i)
			i += n
			if n == 0 || i < len(b.events) {
				f.chunks = append(f.chunks, e.finish())
			}
		}
	}
	if e.z != nil {
		f.chunks = append(f.chunks, e.finish())
	}
	for _, c := range f.chunks {
		f.after.stored += int64(len(c.events))
	}
}

// encoder makes one chunk after the other.
type encoder struct {
	level int
	c     chunk
	sum   counters
	z     *gzip.Writer
	out   *bytes.Buffer
}

// add puts events of b, from number i on, into the chunk, as many as it has
// room for, and says how many. An empty chunk takes one event of any size.
func (e *encoder) add(b *batch, i int) (n int) {
	if e.z == nil {
		e.c = chunk{first: b.first + int64(i)}
		e.sum = counters{snapshot: -1}
		e.out = new(bytes.Buffer)
		e.z = gzipWriter(e.level, e.out)
		e.z.Write([]byte{'['})
		e.c.raw = 2
	}
	start := int(b.events[i].start)
	for i+n < len(b.events) {
		next := b.events[i+n]
		if e.c.raw+int(next.end)-start > chunkBytes && (e.c.count > 0 || n > 0) {
			break
		}
		if next.kind == fullSnapshot {
			e.sum.snapshot = b.first + int64(i+n)
		}
		e.sum.see(next.time)
		n++
	}
	if n == 0 {
		return 0
	}
	if e.c.count > 0 {
		e.z.Write([]byte{','})
		e.c.raw++
	}
	text := b.body[start:b.events[i+n-1].end]
	e.c.raw += len(text)
	for len(text) > 0 {
		piece := min(len(text), packPiece)
		e.z.Write(text[:piece])
		text = text[piece:]
		runtime.Gosched()
	}
	e.c.count += int64(n)
	return n
}

// finish closes the chunk.
func (e *encoder) finish() chunk {
	e.z.Write([]byte{']'})
	e.z.Close()
	gzipWriters[e.level].Put(e.z)
	e.z = nil
	e.c.events = e.out.Bytes()
	e.c.startTime, e.c.endTime, e.c.snapshot = e.sum.firstTime, e.sum.endTime, e.sum.snapshot
	return e.c
}

// gunzip unpacks a chunk of which the JSON's size is known.
func gunzip(data []byte, size int) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("open chunk: %w", err)
	}
	var out bytes.Buffer
	out.Grow(size + bytes.MinRead)
	if _, err := io.Copy(&out, z); err != nil {
		return nil, fmt.Errorf("unpack chunk: %w", err)
	}
	return out.Bytes(), nil
}

// Questions.

// storedSession is a session's row as lists show it.
type storedSession struct {
	summary
	createdAt, updatedAt time.Time
	endedAt              *time.Time
}

const sessionColumns = `session_id, user_id, url, metadata::text, is_active, created_at, updated_at, ended_at, event_count, error_count,
	raw_bytes, stored_bytes, coalesce(first_event_time, 0), coalesce(last_event_time, 0), coalesce(snapshot_index, -1), last_seq`

// list gives the sessions that a where, order and limit clause choose.
func (st *store) list(ctx context.Context, clause string, args ...any) ([]storedSession, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, "select "+sessionColumns+" from sessions "+clause, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (storedSession, error) {
		var s storedSession
		a, n := &description{}, &s.now
		err := row.Scan(&s.id, &a.userID, &a.url, &a.metadata, &s.isActive, &s.createdAt, &s.updatedAt, &s.endedAt, &n.events, &n.errors,
			&n.raw, &n.stored, &n.firstTime, &n.endTime, &n.snapshot, &n.seq)
		s.about = a
		return s, err
	})
}

func (st *store) active(ctx context.Context) ([]storedSession, error) {
	return st.list(ctx, "where is_active order by created_at desc")
}

// newest gives a page of sessions: of all, or of those that are not live.
func (st *store) newest(ctx context.Context, limit, offset int64, all bool) ([]storedSession, error) {
	which := "where not is_active"
	if all {
		which = ""
	}
	return st.list(ctx, `where session_id in (select session_id from sessions `+which+` order by created_at desc, session_id limit $1 offset $2)
		order by created_at desc, session_id`, limit, offset) // the inner one reads the index alone, however far the offset
}

// session gives one session; errNotFound when there is none.
func (st *store) session(ctx context.Context, id string) (storedSession, error) {
	found, err := st.list(ctx, "where session_id = $1", id)
	if err == nil && len(found) == 0 {
		err = errNotFound
	}
	if err != nil {
		return storedSession{}, err
	}
	return found[0], nil
}

// chunks gives the map of a session's chunks, without their events.
func (st *store) chunks(ctx context.Context, id string) ([]chunk, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, `select first_index, event_count, coalesce(start_time, 0), coalesce(end_time, 0),
		coalesce(snapshot_index, -1), raw_bytes from session_events where session_id = $1 order by first_index`, id)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (c chunk, err error) {
		err = row.Scan(&c.first, &c.count, &c.startTime, &c.endTime, &c.snapshot, &c.raw)
		return c, err
	})
}

// chunk gives the stored bytes of the chunk that begins with an event;
// errNotFound when none does.
func (st *store) chunk(ctx context.Context, id string, first int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	var data []byte
	err := st.pool.QueryRow(ctx, "select events from session_events where session_id = $1 and first_index = $2", id, first).Scan(&data)
	if errors.Is(err, pgx.ErrNoRows) {
		err = errNotFound
	}
	return data, err
}

// events calls emit with each stored event from one number up to, not including,
// another, until emit says false. It reads a few chunks at a time.
func (st *store) events(ctx context.Context, id string, from, to int64, emit func([]byte) bool) error {
	for from < to {
		chunks, err := st.chunksFrom(ctx, id, from, to)
		if err != nil || len(chunks) == 0 {
			return err
		}
		for _, c := range chunks {
			text, events, err := c.split()
			if err == nil && c.first > from {
				err = errors.New("the one before is missing")
			}
			if err != nil {
				return fmt.Errorf("chunk %d of %s: %w", c.first, id, err)
			}
			for ; from < min(to, c.first+c.count); from++ {
				e := events[from-c.first]
				if !emit(text[e.start:e.end]) {
					return nil
				}
			}
		}
	}
	return nil
}

// split unpacks a chunk and finds its events.
func (c *chunk) split() (text []byte, events []event, err error) {
	if text, err = gunzip(c.events, c.raw); err != nil {
		return nil, nil, err
	}
	events, err = splitEvents(text)
	if err == nil && int64(len(events)) != c.count {
		err = errChunk
	}
	return text, events, err
}

// selectPage reads no more rows than it gives, at any depth of a session.
const selectPage = `select first_index, event_count, raw_bytes, events from (
	select *, sum(raw_bytes) over (order by first_index) - raw_bytes as before from (
	select * from session_events where session_id = $1 and first_index < $3 and first_index >= (
		select max(first_index) from session_events where session_id = $1 and first_index <= $2)
	order by first_index limit 50) next) summed
	where before < 4194304 and first_index + event_count > $2 order by first_index`

// chunksFrom gives the chunk that holds an event and some that follow, in order,
// of about 4 MB of JSON together; none when the event is not stored.
func (st *store) chunksFrom(ctx context.Context, id string, from, to int64) ([]chunk, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, selectPage, id, from, to)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (c chunk, err error) {
		err = row.Scan(&c.first, &c.count, &c.raw, &c.events)
		return c, err
	})
}

// storedReport is a row of session_errors.
type storedReport struct {
	ID        int64           `json:"id"`
	Kind      string          `json:"kind"`
	Data      json.RawMessage `json:"data"`
	CreatedAt time.Time       `json:"createdAt"`
}

// reports gives the newest errors of a session, at most 1000, oldest first.
func (st *store) reports(ctx context.Context, id string) ([]storedReport, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, `select * from (select id, kind, error_data::text, created_at from session_errors
		where session_id = $1 order by id desc limit 1000) newest order by id`, id)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (r storedReport, err error) {
		err = row.Scan(&r.ID, &r.Kind, &r.Data, &r.CreatedAt)
		return r, err
	})
}

// totals are what the database holds in all.
type totals struct {
	sessions, active, events, bytes int64
}

func (st *store) totals(ctx context.Context) (t totals, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err = st.pool.QueryRow(ctx, `select count(*), count(*) filter (where is_active), coalesce(sum(event_count), 0)::bigint,
		coalesce(sum(stored_bytes), 0)::bigint from sessions`).Scan(&t.sessions, &t.active, &t.events, &t.bytes)
	return t, err
}

// Keeping house.

// remove deletes a session and all that belongs to it; errNotFound when there
// is none.
func (st *store) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	tag, err := st.pool.Exec(ctx, "delete from sessions where session_id = $1", id)
	if err == nil && tag.RowsAffected() == 0 {
		err = errNotFound
	}
	return err
}

// removeEnded deletes sessions that have ended before a time, a few in each
// transaction, oldest first, and says how many. Rows that somebody holds are
// left for the next time.
func (st *store) removeEnded(ctx context.Context, before time.Time) (int64, error) {
	for total := int64(0); ; {
		n, err := st.removeStep(ctx, "ended_at < $1", before)
		total += n
		if err != nil || n < deleteStep {
			return total, err
		}
	}
}

// removeToFit deletes the oldest ended sessions until at most limit bytes of
// chunks are stored, and says how many.
func (st *store) removeToFit(ctx context.Context, limit int64) (total int64, err error) {
	for {
		t, err := st.totals(ctx)
		if err != nil || t.bytes <= limit {
			return total, err
		}
		n, err := st.removeStep(ctx, `session_id in (select session_id from (select session_id, sum(stored_bytes) over
			(order by ended_at, session_id) - stored_bytes as before from sessions where not is_active) oldest where before < $1)`, t.bytes-limit)
		total += n
		if err != nil || n == 0 {
			return total, err
		}
	}
}

func (st *store) removeStep(ctx context.Context, which string, arg any) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	tag, err := st.pool.Exec(ctx, `delete from sessions where session_id in (select session_id from sessions where not is_active and `+
		which+` order by ended_at limit $2 for update skip locked)`, arg, deleteStep)
	return tag.RowsAffected(), err
}

// touch marks the sessions that are live on this server, given with their epochs,
// and ends those that no server has touched for long: theirs was killed, or could
// not reach the database. Then it takes them up here again.
func (st *store) touch(ctx context.Context, live map[string]int64) error {
	ids, epochs := make([]string, 0, len(live)), make([]int64, 0, len(live))
	for id, epoch := range live {
		ids, epochs = append(ids, id), append(epochs, epoch)
	}
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	if _, err := st.pool.Exec(ctx, `update sessions set updated_at = now(), is_active = true, ended_at = null
		where (session_id, epoch) in (select * from unnest($1::text[], $2::bigint[]))
			and (is_active or updated_at < now() - $3::interval)`, ids, epochs, orphanAge); err != nil { // not one that has ended just now
		return err
	}
	_, err := st.pool.Exec(ctx, `update sessions set is_active = false, ended_at = updated_at
		where is_active and updated_at < now() - $1::interval and session_id <> all($2)`, orphanAge, ids)
	return err
}

// pause waits before something is tried again, longer with each attempt up to
// maxPause, and never quite as long as others do. It says false when ctx ends.
func pause(ctx context.Context, attempt int) bool {
	d := min(maxPause, 50*time.Millisecond<<min(attempt, 10))
	select {
	case <-time.After(d/2 + rand.N(d/2)):
		return true
	case <-ctx.Done():
		return false
	}
}
