package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The writers: flushes become chunks, chunks become rows, in one transaction for
// many sessions.

const (
	writers       = 3                // one compresses while others wait for their commits
	commitTimeout = 30 * time.Second // of one transaction
	lockTimeout   = "1s"             // in it, for a row that somebody else holds
	chunkBytes    = 1 << 20          // JSON in a chunk, unless one event is larger
	chunkEvents   = 20_000           // in a chunk: whoever reads it needs the bounds of all

	// packPiece is compressed without a break. Live events would otherwise wait for
	// a processor for 10 ms at a time.
	packPiece = 32 << 10
)

// writer takes flushes from the hub and stores them. Several run at once.
type writer struct {
	hub     *hub
	store   *store
	metrics *metrics
	log     *slog.Logger // failures that nobody waits for
}

// run ends with the hub. A flush that comes again has its chunks already.
func (w *writer) run(ctx context.Context) {
	for {
		reply := make(chan []*flush, 1)
		work, ok := ask(w.hub, reply, nextWork{reply})
		if !ok {
			return
		}
		start := time.Now()
		for _, f := range work {
			if f.chunks == nil {
				f.encode()
			}
		}
		w.write(ctx, work)
		w.metrics.batch(work, time.Since(start))
		w.hub.send(flushDone{work})
	}
}

// write stores flushes in one transaction. When the database refuses it, the
// sessions are tried one by one, so that none suffers for another.
func (w *writer) write(ctx context.Context, work []*flush) {
	err := w.commit(ctx, work)
	if err == nil {
		return
	}
	var refusal *pgconn.PgError
	if !errors.As(err, &refusal) || len(work) == 1 {
		w.keep(work, err)
		return
	}
	var kept []*flush
	for i, f := range work {
		alone := w.commit(ctx, []*flush{f})
		switch {
		case alone == nil:
		case isDataError(alone):
			w.keep([]*flush{f}, alone)
		case errors.As(alone, &refusal):
			kept, err = append(kept, f), alone
		default: // PostgreSQL is gone, for the others too
			w.keep(append(kept, work[i:]...), alone)
			return
		}
	}
	if len(kept) > 0 {
		w.keep(kept, err)
	}
}

// keep says what becomes of flushes that could not be committed: they are tried
// again, for as long as it takes, unless it is their data that PostgreSQL refuses.
func (w *writer) keep(work []*flush, err error) {
	w.metrics.databaseErrors.Add(1)
	w.store.failed(err)
	result := failed
	if len(work) == 1 && isDataError(err) {
		result = refused
		w.metrics.refusedSessions.Add(1)
		w.log.Error("session refused by the database", "session", work[0].session,
			"events_up_to", work[0].totals.events, "err", err)
	} else {
		w.log.Warn("transaction not stored, will try again", "sessions", len(work),
			"attempt", work[0].attempts+1, "err", err)
	}
	for _, f := range work {
		f.outcome = result
	}
}

// updateRow meets no row where the session was deleted, or has a newer epoch, or has more than the
// flush.
const (
	// ended_at is now() or null. Citus takes no now() in a case.
	updateRow = `update sessions set event_count = $3, error_count = $4, raw_bytes = $5, stored_bytes = $6,
		first_event_time = nullif($7::bigint, 0), last_event_time = nullif($8::bigint, 0),
		snapshot_index = nullif($9::bigint, -1),
		last_seq = $10, is_active = $11, ended_at = now() + case when $11 then null else interval '0' end,
		updated_at = now()
		where session_id = $1 and epoch = $2 and event_count <= $3 and error_count <= $4 and last_seq <= $10`
	insertChunk = `insert into session_events
			(session_id, first_index, event_count, start_time, end_time, snapshot_index, raw_bytes, events)
		select session_id, $3::bigint, $4::integer, nullif($5::bigint, 0), nullif($6::bigint, 0),
			nullif($7::bigint, -1), $8::integer, $9::bytea
		from sessions where session_id = $1 and epoch = $2 on conflict do nothing`
	insertReport = `insert into session_errors (session_id, id, kind, error_data)
		select session_id, $3::bigint, $4::text, $5::json
		from sessions where session_id = $1 and epoch = $2 on conflict do nothing`
)

// commit stores flushes in one transaction. The outcomes that it sets hold if there is no error.
// Every statement is for the flush's epoch only: a flush's first one locks the row, so the others
// see the same. All values are absolute and never go back, and all rows have their keys: storing
// twice changes nothing, be it because a commit's answer was lost, or because PostgreSQL had been
// given up and carries out an old transaction after a newer one.
func (w *writer) commit(ctx context.Context, work []*flush) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	statements := &pgx.Batch{}
	statements.Queue("select set_config('lock_timeout', $1, true)", lockTimeout)
	for _, f := range work {
		f.outcome = stored // unless what queue queues finds otherwise
		queue(statements, f)
	}
	if err := w.store.pool.SendBatch(ctx, statements).Close(); err != nil {
		return err
	}
	w.store.last.Store(nil)
	w.markDeleted(ctx, work)
	return nil
}

// queue adds the statements of a flush. Its outcome is set while the batch's results are read.
func queue(statements *pgx.Batch, f *flush) {
	t := f.totals
	statements.Queue(updateRow, f.session, f.epoch, t.events, t.errors, t.raw, t.stored, t.firstTime, t.endTime,
		t.snapshot, t.seq, !f.ended).Exec(func(tag pgconn.CommandTag) error {
		if tag.RowsAffected() == 0 {
			f.outcome = epochLost
		}
		return nil
	})
	for _, c := range f.chunks {
		statements.Queue(insertChunk, f.session, f.epoch, c.first, c.count, c.startTime, c.endTime, c.snapshot, c.raw,
			c.events)
	}
	for _, b := range f.batches {
		if r := b.report; r != nil {
			statements.Queue(insertReport, f.session, f.epoch, r.id, r.kind, string(r.data))
		}
	}
}

// markDeleted finds out which of the flushes that met no row of their epoch had
// their session deleted. One that it cannot tell is tried again.
func (w *writer) markDeleted(ctx context.Context, work []*flush) {
	for _, f := range work {
		if f.outcome != epochLost {
			continue
		}
		there := true
		const exists = "select exists (select from sessions where session_id = $1)"
		err := w.store.pool.QueryRow(ctx, exists, f.session).Scan(&there)
		switch {
		case err != nil:
			f.outcome = failed
		case !there:
			f.outcome = deleted
		}
	}
}

// encode makes the flush's chunks, once, and adds their bytes to its totals. An event's bytes go in
// as they came.
func (f *flush) encode() {
	f.chunks = []chunk{}
	e := chunkEncoder{text: make([]byte, 0, min(f.cost(), chunkBytes))} // growing would cost half of the speed
	for _, b := range f.batches {
		for i, ev := range b.events {
			text := b.body[ev.start:ev.end]
			if e.sum.events == chunkEvents || e.sum.events > 0 && len(e.text)+len(text)+2 > chunkBytes {
				f.chunks = append(f.chunks, e.finish())
			}
			e.add(ev, b.first+int64(i), text)
		}
	}
	if e.sum.events > 0 {
		f.chunks = append(f.chunks, e.finish())
	}
	for _, c := range f.chunks {
		f.totals.stored += int64(len(c.events))
	}
}

// chunkEncoder makes one chunk after the other.
type chunkEncoder struct {
	text  []byte   // the JSON array so far
	first int64    // number of its first event
	sum   counters // of its events
}

// add begins the array with a bracket where it is empty; finish ends it.
func (e *chunkEncoder) add(ev event, number int64, text []byte) {
	separator := byte(',')
	if e.sum.events == 0 {
		separator = '['
		e.first, e.sum.snapshot = number, -1
	}
	e.text = append(append(e.text, separator), text...)
	e.sum.events++
	e.sum.note(ev, number)
}

// finish closes the chunk and begins another.
func (e *chunkEncoder) finish() chunk {
	e.text = append(e.text, ']')
	c := chunk{first: e.first, count: e.sum.events, startTime: e.sum.firstTime, endTime: e.sum.endTime,
		snapshot: e.sum.snapshot, raw: len(e.text), events: zip(e.text)}
	e.text, e.sum = e.text[:0], counters{}
	return c
}

// gzipWriters are of gzip.BestSpeed: on recorded pages level 2 is a sixth slower
// and saves 2 %, level 5 half as fast and saves 13 %.
var gzipWriters = sync.Pool{New: func() any {
	z, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	return z
}}

// zip lets others run after each piece. In memory it cannot fail.
func zip(text []byte) []byte {
	var out bytes.Buffer
	z := gzipWriters.Get().(*gzip.Writer)
	z.Reset(&out)
	for piece := range slices.Chunk(text, packPiece) {
		z.Write(piece)
		runtime.Gosched()
	}
	z.Close()
	gzipWriters.Put(z)
	return out.Bytes()
}

// unzip unpacks a chunk of which the JSON's size is known.
func unzip(data []byte, size int) ([]byte, error) {
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
