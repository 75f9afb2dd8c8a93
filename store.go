package main

import (
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
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
	queryTimeout = 15 * time.Second // of a question
	beatTimeout  = 5 * time.Second
	deadAfter    = time.Minute // a server that gives no sign for this long is gone
	deleteStep   = 50          // sessions that are looked up at once to be deleted
	maxActive    = 10_000      // sessions in one list
	// Beyond it no age is believed.
	maxClockSkew = time.Hour

	cleanupTimeout = 10 * time.Minute
)

// What callers tell apart, with claim's errLaterPage. Most other errors are the database's.
var (
	errNotFound = errors.New("no such session")
	errClocks   = errors.New("the clocks of this machine and the database differ by more than an hour: " +
		"nothing is deleted for its age")
	errDamaged = errors.New("the recording is damaged")
	errToken   = errors.New("the session is continued only by its token")
)

// store speaks SQL. Its methods are safe for concurrent use.
type store struct {
	pool   *pgxpool.Pool
	pulses *pgxpool.Pool // used with several hosts alone; of one connection: a pulse waits for nobody else's statement
	log    *slog.Logger
	uplink atomic.Pointer[uplink]
	pooled atomic.Bool // a pooler was met that needs a setting
	// It is new at each start: what this machine recorded before is another server's.
	server string // this process among those that share the database
	// nil as soon as something was committed or claimed.
	last atomic.Pointer[failure]
	skew atomic.Int64 // how far this machine's clock is ahead of the database's, in nanoseconds
}

// failure is the last error of the database. It is forgotten when something is committed or claimed.
type failure struct {
	err       error
	at, since time.Time // of err; of the first in a row of errors less than a minute apart
}

// openStore makes the pools, of cfg.MaxConns connections together; they connect
// when they are first used.
func openStore(ctx context.Context, cfg *pgxpool.Config, log *slog.Logger) (st *store, err error) {
	st = &store{server: crand.Text(), log: log}
	st.uplink.Store(newUplink(""))
	cfg = cfg.Copy()
	cfg.BeforeConnect, cfg.AfterConnect = st.beforeConnect, st.afterConnect
	one := cfg.Copy()
	if one.MaxConns = 1; otherHosts(cfg.ConnConfig) {
		cfg.MaxConns--
	}
	// A connection may have broken since it was last used, and a question would fail on it.
	cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return true }
	one.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false } // a pulse does
	if st.pool, err = pgxpool.NewWithConfig(ctx, cfg); err == nil {
		st.pulses, err = pgxpool.NewWithConfig(ctx, one)
	}
	if err != nil {
		return nil, fmt.Errorf("make the pool: %w", err)
	}
	return st, nil
}

// close ends the pools. It does not wait for connections that do not answer.
func (st *store) close() {
	go st.pool.Close() // ends when PostgreSQL answers or pgx gives it up, half a minute at most
	go st.pulses.Close()
}

// applySchema brings the database's tables into being, or finds them there.
func (st *store) applySchema(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	err := pgx.BeginFunc(ctx, st.pool, func(tx pgx.Tx) error {
		const wait = "select set_config('lock_timeout', '0', true), pg_advisory_xact_lock($1)"
		if _, err := tx.Exec(ctx, wait, schemaLock); err != nil {
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

// Claims.

// claimed are the columns that scanClaim reads.
const claimed = ` returning epoch, user_id, event_count, error_count, raw_bytes, stored_bytes,
	coalesce(first_event_time, 0), coalesce(last_event_time, 0), coalesce(snapshot_index, -1), last_seq`

// $1 to $7 are the same in both: id, user, URL, metadata, token, server, page. With $8 the row keeps
// its user.
const (
	insertSession = `insert into sessions (session_id, user_id, url, metadata, resume_hash, server, page, is_active)
		values ($1, $2, $3, $4, $5, $6, $7, true) on conflict do nothing` + claimed
	claimSession = `update sessions set epoch = epoch + 1, is_active = true, ended_at = null, updated_at = now(),
		user_id = case when $8 then user_id else $2 end, url = $3, metadata = $4, server = $6,
		page = greatest(page, $7),
		resume_hash = coalesce(resume_hash, $5) where session_id = $1 and ($7 = 0 or page <= $7) and `
	ofLaterPage   = "select exists (select from sessions where session_id = $1 and resume_hash = $2 and page > $3)"
	withToken     = "resume_hash = $5"
	withoutOthers = "(resume_hash is null or resume_hash = $5)"
)

// claim makes the session's row, or raises its epoch. With resuming, the row must
// be there and have this token. Otherwise a row that is there must have none, or
// this one because a claim's answer was lost, and has it from now on. If not:
// errToken. With keepUser, a row that is there keeps its user. A page that has a
// number does not get what a later page of its tab has: errLaterPage.
func (st *store) claim(ctx context.Context, id string, about *description, keepUser bool, token string, resuming bool,
	page int64) (claim, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	args := []any{id, about.userID, about.url, string(about.metadata), hashToken(token), st.server, page}
	which := withToken
	if !resuming {
		won, err := scanClaim(st.pool.QueryRow(ctx, insertSession, args...))
		if !errors.Is(err, errToken) {
			return won, err
		}
		which = withoutOthers
	}
	won, err := scanClaim(st.pool.QueryRow(ctx, claimSession+which+claimed, append(args, keepUser)...))
	if later := false; err == errToken && page > 0 {
		if err := st.pool.QueryRow(ctx, ofLaterPage, id, hashToken(token), page).Scan(&later); err != nil {
			return won, err
		}
		if later {
			return won, errLaterPage
		}
	}
	return won, err
}

// scanClaim reads what a claim returns. No row means that an insert has found the
// session there, or an update none of this id that the token opens: errToken.
func scanClaim(row pgx.Row) (c claim, err error) {
	err = row.Scan(&c.epoch, &c.userID, &c.events, &c.errors, &c.raw, &c.stored, &c.firstTime, &c.endTime,
		&c.snapshot, &c.seq)
	if errors.Is(err, pgx.ErrNoRows) {
		err = errToken
	}
	return c, err
}

// hashToken gives nil for no token: null, which equals nothing.
func hashToken(token string) []byte {
	if token == "" {
		return nil
	}
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// failed takes notice of an error, for /health. Whoever calls it writes the log, where it matters.
func (st *store) failed(err error) {
	f := &failure{err, time.Now(), time.Now()}
	if last := st.last.Load(); last != nil && f.at.Sub(last.at) < time.Minute {
		f.since = last.since
	}
	st.last.Store(f)
}

// sqlState gives the code of an error that PostgreSQL has answered with, "" for
// any other error.
func sqlState(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) && len(e.Code) == 5 {
		return e.Code
	}
	return ""
}

// isOperatorError tells an error that stays until somebody mends the database:
// a feature not supported, a statement refused, a table or right that is missing.
func isOperatorError(err error) bool {
	state := sqlState(err)
	return state != "" && (state[:2] == "0A" || state[:2] == "42")
}

// isDataError tells an error that lies in what was to be stored (data exception,
// constraint violated, limit exceeded) from one that passes.
func isDataError(err error) bool {
	state := sqlState(err)
	return state != "" && slices.Contains([]string{"22", "23", "54"}, state[:2])
}

// Questions.

// storedSession is a session's row as lists show it.
type storedSession struct {
	summary
	createdAt, updatedAt time.Time
	endedAt              *time.Time
}

// sessionColumns are what list scans, in this order.
const sessionColumns = `session_id, user_id, url, metadata::text, is_active, created_at, updated_at, ended_at,
	event_count, error_count, raw_bytes, stored_bytes, coalesce(first_event_time, 0), coalesce(last_event_time, 0),
	coalesce(snapshot_index, -1), last_seq`

// list gives the sessions that a where, order and limit clause choose. It stops
// behind the row with which they are larger than pageBytes.
func (st *store) list(ctx context.Context, clause string, args ...any) (found []storedSession, err error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, "select "+sessionColumns+" from sessions "+clause, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for size := 0; size <= pageBytes && rows.Next(); {
		var s storedSession
		a, n := &description{}, &s.now
		if err := rows.Scan(&s.id, &a.userID, &a.url, &a.metadata, &s.isActive, &s.createdAt, &s.updatedAt, &s.endedAt,
			&n.events, &n.errors, &n.raw, &n.stored, &n.firstTime, &n.endTime, &n.snapshot, &n.seq); err != nil {
			return nil, err
		}
		a.brief = excerpt(a.metadata, documented, maxField)
		// All of it is read where one session was asked for, which is the first row.
		if len(found) > 0 {
			a.metadata = nil // in lists nobody reads it
		}
		s.about = a
		found, size = append(found, s), size+s.listSize()
	}
	rows.Close()
	return found, rows.Err()
}

// active gives the live sessions, newest first.
func (st *store) active(ctx context.Context) ([]storedSession, error) {
	return st.list(ctx, "where is_active order by created_at desc limit $1", maxActive)
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

// chunks gives the map of a session's chunks from an event on, without their events,
// up to limit.
func (st *store) chunks(ctx context.Context, id string, from, limit int64) ([]chunk, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, `select first_index, event_count, coalesce(start_time, 0), coalesce(end_time, 0),
		coalesce(snapshot_index, -1), raw_bytes from session_events
		where session_id = $1 and first_index >= $2 order by first_index limit $3`, id, from, limit)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (c chunk, err error) {
		err = row.Scan(&c.first, &c.count, &c.startTime, &c.endTime, &c.snapshot, &c.raw)
		return c, err
	})
}

// events calls emit with each stored event from one number up to, not including,
// another, until emit says false. It reads a chunk at a time; room is chunkWith's.
func (st *store) events(ctx context.Context, id string, from, to int64,
	room func(context.Context, int64) error, emit func([]byte) bool) error {
	for from < to {
		c, err := st.chunkWith(ctx, id, from, room)
		if err != nil {
			return err
		}
		text, events, err := c.split()
		if err == nil && from >= c.first+c.count {
			err = errors.New("the one behind it is missing")
		}
		if err != nil {
			return fmt.Errorf("%w: chunk %d of %s: %v", errDamaged, c.first, id, err)
		}
		for ; from < min(to, c.first+c.count); from++ {
			e := events[from-c.first]
			if !emit(text[e.start:e.end]) {
				return nil
			}
		}
	}
	return nil
}

// chunkWith gives the last chunk that begins at or before an event; errNotFound
// when none does. It calls room with the size of the chunk's JSON before it reads
// the chunk.
func (st *store) chunkWith(ctx context.Context, id string, number int64,
	room func(context.Context, int64) error) (c chunk, err error) {
	// Each question has its time; between them room may wait for long.
	query, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	err = st.pool.QueryRow(query, `select first_index, event_count, raw_bytes from session_events
		where session_id = $1 and first_index <= $2 order by first_index desc limit 1`, id, number).
		Scan(&c.first, &c.count, &c.raw)
	if err == nil {
		if err = room(ctx, int64(c.raw)); err != nil {
			return c, err
		}
		query, cancel = context.WithTimeout(ctx, queryTimeout)
		defer cancel()
		const events = "select events from session_events where session_id = $1 and first_index = $2"
		err = st.pool.QueryRow(query, events, id, c.first).Scan(&c.events)
	}
	if errors.Is(err, pgx.ErrNoRows) {
		err = errNotFound
	}
	return c, err
}

// split unpacks a chunk and finds its events.
func (c *chunk) split() (text []byte, events []event, err error) {
	if text, err = unzip(c.events, c.raw); err != nil {
		return nil, nil, err
	}
	events, err = splitEvents(text)
	if err == nil && int64(len(events)) != c.count {
		err = errChunk
	}
	return text, events, err
}

// storedReport is a row of session_errors.
type storedReport struct {
	ID        int64           `json:"id"`
	Kind      string          `json:"kind"`
	Data      json.RawMessage `json:"data"`
	CreatedAt time.Time       `json:"createdAt"`
}

// reports gives the newest errors of a session, at most 1000 and about pageBytes,
// oldest first.
func (st *store) reports(ctx context.Context, id string) ([]storedReport, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, `select id, kind, error_data::text, created_at from (select *,
			sum(octet_length(error_data::text)) over (order by id desc) as size
			from session_errors where session_id = $1 order by id desc limit 1000) newest
		where size <= $2 order by id`, id, pageBytes)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (r storedReport, err error) {
		err = row.Scan(&r.ID, &r.Kind, &r.Data, &r.CreatedAt)
		r.CreatedAt = r.CreatedAt.UTC()
		return r, err
	})
}

// rowBytes is what a session takes: its chunks and errors, and its metadata.
const rowBytes = "(stored_bytes + pg_column_size(metadata))"

// totals are what the database holds in all.
type totals struct {
	sessions, active, events, bytes int64
}

// totals reads every row: it takes seconds where there are millions. Ended sessions without an
// event are not counted, as searches do not find them.
func (st *store) totals(ctx context.Context) (t totals, err error) {
	err = st.pool.QueryRow(ctx, `select count(*), count(*) filter (where is_active),
		coalesce(sum(event_count), 0)::bigint,
		coalesce(sum(`+rowBytes+`), 0)::bigint from sessions where event_count > 0 or is_active`).
		Scan(&t.sessions, &t.active, &t.events, &t.bytes)
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

// removeOld deletes ended sessions, the oldest first, and says how many: those
// that ended longer ago than age by the database's clock, or a day ago without an
// event, and, with a limit, as many more as leave limit bytes at most. While this
// machine's clock and the database's differ, one of them is wrong, and nothing that
// has events is deleted for its age: errClocks.
func (st *store) removeOld(ctx context.Context, age time.Duration, limit int64) (deleted int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	deleted, err = st.each(ctx, "delete from sessions",
		"not is_active and event_count = 0 and ended_at < now() - interval '1 day'")
	if err != nil {
		return deleted, err
	}
	excess := int64(0)
	if limit > 0 {
		t, err := st.totals(ctx)
		if err != nil {
			return deleted, err
		}
		excess = t.bytes - limit
	}
	type candidate struct {
		ID    string
		Bytes int64
		Old   bool
		Now   time.Time
	}
	for {
		rows, err := st.pool.Query(ctx, "select session_id, "+rowBytes+`,
			ended_at < now() - $1::interval, clock_timestamp()
			from sessions where not is_active order by ended_at limit $2`, age, deleteStep)
		if err != nil {
			return deleted, err
		}
		oldest, err := pgx.CollectRows(rows, pgx.RowToStructByPos[candidate])
		if err != nil {
			return deleted, err
		}
		for _, s := range oldest {
			skewed := time.Since(s.Now).Abs() > maxClockSkew
			switch {
			case excess > 0 || s.Old && !skewed:
			case s.Old:
				return deleted, errClocks
			default:
				return deleted, nil
			}
			tag, err := st.pool.Exec(ctx, "delete from sessions where session_id = $1 and not is_active", s.ID)
			if err != nil {
				return deleted, err
			}
			if tag.RowsAffected() > 0 { // it was not recorded again meanwhile
				deleted++
				excess -= s.Bytes
			}
		}
		if len(oldest) < deleteStep {
			return deleted, nil
		}
	}
}

// beat says that this server is there, which shows that the database takes writes.
func (st *store) beat(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	var now time.Time
	const update = "update servers set seen_at = now() where server = $1 returning clock_timestamp()"
	err := st.pool.QueryRow(ctx, update, st.server).Scan(&now)
	if errors.Is(err, pgx.ErrNoRows) {
		st.pool.Exec(ctx, "delete from servers where seen_at < now() - interval '1 day'") // long gone
		const insert = "insert into servers (server) values ($1) returning clock_timestamp()"
		err = st.pool.QueryRow(ctx, insert, st.server).Scan(&now)
	}
	if err == nil {
		st.skew.Store(int64(time.Since(now)))
	}
	return err
}

// endLost ends active sessions that nobody records, and of which nothing was stored
// for deadAfter: those of servers that have not said for so long that they are
// there, and those of this server that its hub does not hold, because a claim's
// answer was lost or a flush refused. What is stored later makes them active again.
func (st *store) endLost(ctx context.Context, held []string) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, "select server from servers where seen_at > now() - $1::interval", deadAfter)
	if err != nil {
		return err
	}
	there, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	_, err = st.each(ctx, "update sessions set is_active = false, ended_at = updated_at",
		`is_active and updated_at < now() - $1::interval
			and case when server = $2 then session_id <> all($3) else server <> all($4) end`,
		deadAfter, st.server, held, there)
	return err
}

// each changes the sessions that a condition holds for, and says how many. Each
// has a transaction of its own and is named in it: servers that do the same at
// the same time do not wait for each other, and where the database is distributed
// no session depends on where another is.
func (st *store) each(ctx context.Context, change, condition string, args ...any) (changed int64, err error) {
	rows, err := st.pool.Query(ctx, "select session_id from sessions where "+condition, args...)
	if err != nil {
		return 0, err
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	change = fmt.Sprintf("%s where %s and session_id = $%d", change, condition, len(args)+1)
	for _, id := range ids {
		tag, err := st.pool.Exec(ctx, change, append(slices.Clip(args), id)...)
		if err != nil {
			return changed, err
		}
		changed += tag.RowsAffected()
	}
	return changed, err
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
