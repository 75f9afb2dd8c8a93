package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// What other servers record, for the viewers of this one. Rows are the only
// channel between servers. A server reads what its viewers watch elsewhere, and
// marks it: the server that records such a session stores its events at once,
// instead of at the end of BATCH_INTERVAL.

const (
	followEvery = 300 * time.Millisecond // rows that are watched are read, events that are watched are stored
	marksEvery  = 3                      // in looks: what others watch here is asked for
	listEvery   = 6                      // in looks: the servers, and the live sessions of others
	markEvery   = 10 * time.Second       // what is watched is marked again
	markFresh   = 2 * markEvery
	quietAfter  = 6 * time.Second // a server that gives no sign for this long records nothing

	maxFollowed = 1000 // sessions in one look; it reads pageBytes of events, viewers page the rest
	maxMarked   = 50   // of these, those that are marked
	manyNews    = 100  // more new sessions than this are told as one list
)

// follower is the goroutine that looks. It ends with its context.
type follower struct {
	hub   *hub
	store *store
	// looks counts them: not each look asks for everything.
	looks  int
	others map[string]bool // true: there; false: gone, but there in the last minutes
}

// foreignRow is what a row says of a session that another server records. The row has the fields up
// to unmarked; state, first and news are readRows'.
type foreignRow struct {
	id             string
	epoch          int64
	events, errors int64
	isActive       bool
	server         string
	unmarked       bool   // it has no mark, or an old one
	state          string // as session.state

	first int64 // news has the events from here up to events; when it is nil viewers have to page
	news  message
}

// foreignSession is a live session of another server. The hub's goroutine owns it.
type foreignSession struct {
	summary
	seen time.Time // the session was live then
}

// following answers followQuery: what viewers want to know of other servers.
type following struct {
	watched []watched // no tracker of this server records these
	viewers bool
	// Until listed, their list has this server's sessions alone; the next look brings the others.
	listed  bool // viewers have had a list with those of other servers
	foreign bool // something is known of other servers, which may not be so any more
}

// watched is a session that viewers watch, and the first event that none of them
// has.
type watched struct {
	id   string
	next int64
}

// look is done every followEvery. Where there is no other server, it costs one
// small query in listEvery looks. An error is no matter here: what failed is
// asked again when a later look is due for it.
func (f *follower) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	err := f.tryLook(ctx)
	if err != nil && ctx.Err() == nil {
		f.store.failed(err)
	}
	f.looks++
}

// tryLook asks for what is due in this look, and at the first error leaves the rest to later looks.
func (f *follower) tryLook(ctx context.Context) error {
	if f.looks%listEvery == 0 {
		others, err := f.store.others(ctx)
		if err != nil {
			return err // what was known before still counts
		}
		f.others = others
	}
	reply := make(chan following, 1)
	wanted, _ := ask(f.hub, reply, followQuery{reply})
	if len(f.others) == 0 && !wanted.foreign {
		return nil
	}
	if f.looks%marksEvery == 0 {
		ids, err := f.store.watchedHere(ctx)
		if err != nil {
			return err
		}
		f.hub.send(marked{ids})
	}
	if len(wanted.watched) > 0 {
		if err := f.readRows(ctx, wanted.watched); err != nil {
			return err
		}
	}
	if wanted.viewers && (!wanted.listed || f.looks%listEvery == 0) {
		return f.readList(ctx)
	}
	return nil
}

// readRows tells the hub of what viewers watch, and marks it.
func (f *follower) readRows(ctx context.Context, all []watched) error {
	rows, err := f.store.foreignRows(ctx, all)
	if err != nil {
		return err
	}
	var unmarked []string
	// For all sessions of this look together.
	left := pageBytes
	for _, w := range all {
		r, there := rows[w.id]
		if !there || r.server == f.store.server {
			continue
		}
		// Also when f.others does not have the server: it has not been there for minutes.
		r.state = "left"
		if f.others[r.server] {
			r.state = "live"
		}
		if r.events > w.next {
			left -= f.store.readLive(ctx, &r, w.next, left)
		}
		rows[w.id] = r
		if r.isActive && r.unmarked && len(unmarked) < maxMarked {
			unmarked = append(unmarked, w.id)
		}
	}
	f.hub.send(rowsRead{all, rows})
	for _, id := range unmarked {
		err = errors.Join(err, f.store.mark(ctx, id))
	}
	return err
}

// readList tells the hub which sessions are live on other servers. Only the rows
// of new ones are read whole.
func (f *follower) readList(ctx context.Context) error {
	asked, reply := time.Now(), make(chan []string, 1)
	rows, err := f.store.liveElsewhere(ctx)
	if err != nil {
		return err
	}
	ids, _ := ask(f.hub, reply, listRead{asked, rows, reply})
	var found []storedSession
	if len(ids) > 0 {
		if found, err = f.store.list(ctx, "where session_id = any($1)", ids); err != nil {
			return err
		}
	}
	f.hub.send(appeared{asked, found})
	return nil
}

// others gives the other servers that were there in the last minutes; false for
// those that are not there any more. Their sessions are live for deadAfter.
func (st *store) others(ctx context.Context) (map[string]bool, error) {
	rows, err := st.pool.Query(ctx, `select server, seen_at > now() - $2::interval from servers
		where server <> $1 and seen_at > now() - $3::interval`, st.server, quietAfter, 2*deadAfter)
	if err != nil {
		return nil, err
	}
	others, server, there := map[string]bool{}, "", false
	_, err = pgx.ForEachRow(rows, []any{&server, &there}, func() error {
		others[server] = there
		return nil
	})
	return others, err
}

// foreignRows gives rows by session, whoever records it. A session that was deleted has none.
func (st *store) foreignRows(ctx context.Context, all []watched) (map[string]foreignRow, error) {
	ids, found := make([]string, len(all)), map[string]foreignRow{}
	for i, w := range all {
		ids[i] = w.id
	}
	rows, err := st.queryRows(ctx, `select session_id, epoch, event_count, error_count, is_active, server,
		coalesce(watched_at < now() - $2::interval, true) from sessions where session_id = any($1)`, ids, markEvery)
	for _, r := range rows {
		found[r.id] = r
	}
	return found, err
}

// readLive makes news for viewers of a row's events from one number on, up to most
// bytes, and gives its size; the next look reads the rest. There is no news when a chunk
// is larger than that or cannot be read, or when there is a rest and the session is over.
func (st *store) readLive(ctx context.Context, r *foreignRow, from int64, most int) (size int) {
	p := page{text: []byte(`{"type":"events_batch","data":{"sessionId":"` + r.id + `","events":[`)}
	err := st.events(ctx, r.id, from, r.events, func(_ context.Context, raw int64) error {
		if raw > int64(most) {
			return errTooMuch
		}
		return nil
	}, func(event []byte) bool { return len(p.text)+len(event) < most && p.add(event) })
	if end := from + p.count; err == nil && p.count > 0 && (r.isActive || end == r.events) {
		r.first, r.events = from, end
		r.news = text(fmt.Appendf(p.text, `],"fromIndex":%d}}`, from))
		return len(p.text)
	}
	return 0
}

// errTooMuch never leaves readLive: viewers page then.
var errTooMuch = errors.New("too much for one look")

// liveElsewhere gives the newest live sessions of other servers. Nothing is known
// of those beyond maxActive.
func (st *store) liveElsewhere(ctx context.Context) ([]foreignRow, error) {
	return st.queryRows(ctx, `select session_id, epoch, event_count, error_count, true, '', false from sessions
		where is_active and server <> $1 order by created_at desc limit $2`, st.server, maxActive)
}

// queryRows reads what a query selects: these seven columns, in this order.
func (st *store) queryRows(ctx context.Context, query string, args ...any) (found []foreignRow, err error) {
	rows, err := st.pool.Query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	var r foreignRow
	fields := []any{&r.id, &r.epoch, &r.events, &r.errors, &r.isActive, &r.server, &r.unmarked}
	_, err = pgx.ForEachRow(rows, fields, func() error {
		found = append(found, r)
		return nil
	})
	return found, err
}

// mark says that somebody watches a session here. Each mark has a transaction of
// its own: two servers that marked many in one could wait for each other.
func (st *store) mark(ctx context.Context, id string) error {
	_, err := st.pool.Exec(ctx, "update sessions set watched_at = now() where session_id = $1", id)
	return err
}

// watchedHere gives the sessions of this server that another has marked within markFresh.
func (st *store) watchedHere(ctx context.Context) ([]string, error) {
	rows, err := st.pool.Query(ctx, `select session_id from sessions
		where server = $1 and watched_at > now() - $2::interval`, st.server, markFresh)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// The hub's side.

// following has events read from where the foremost viewer of a session stands. The others are told
// to page up to there.
func (h *hubState) following() following {
	f := following{viewers: len(h.viewers) > 0, listed: h.listed, foreign: len(h.foreign)+len(h.marks) > 0}
	for id, watching := range h.watchers {
		s := h.sessions[id]
		if s != nil && s.tracker != nil || len(f.watched) >= maxFollowed || !watchedLive(watching) {
			continue
		}
		next := int64(0)
		for _, w := range watching {
			next = max(next, w.next)
		}
		f.watched = append(f.watched, watched{id, next})
	}
	return f
}

// watchedLive reports whether one of a session's viewers takes it for live. Viewers
// who do not are told when it goes on.
func watchedLive(watching map[*outbox]*watch) bool {
	for _, w := range watching {
		if w.live {
			return true
		}
	}
	return false
}

// takeRows compares rows with what is in memory. A newer epoch than ours is
// another server's, and the session in its grace period here goes on there.
func (h *hubState) takeRows(cmd rowsRead) {
	for _, w := range cmd.watched {
		id := w.id
		s, r := h.sessions[id], cmd.rows[id]
		switch {
		case h.claiming[id] > 0, s != nil && (s.tracker != nil || r.id != "" && r.epoch <= s.epoch):
			// This server has it, or is about to.
		case r.id == "" && s != nil && s.dirty():
			// The row was made since, or the next flush finds that it is gone.
		case r.id == "" && s != nil:
			h.abandon(s, deleted)
		case r.id == "":
			h.resetWatchers(id)
			h.endForeign(id)
		default:
			if s != nil {
				h.abandon(s, epochLost)
			}
			h.tellRow(r)
		}
	}
}

// tellRow gives the viewers of a session on another server what is new, and tells
// them what became of it.
func (h *hubState) tellRow(r foreignRow) {
	for out, w := range h.watchers[r.id] {
		if !w.live {
			continue // takeForeign tells it first that the session goes on
		}
		switch w.end = r.events; {
		case w.next >= w.end:
		case r.news == nil || w.next != r.first:
			h.tellLagged(out, r.id, w)
		case h.tell(out, r.news):
			w.next = w.end
		}
		if r.isActive && w.state != r.state {
			h.tellStateTo(out, r.id, w, r.state)
		}
	}
	if !r.isActive {
		h.endForeign(r.id)
	}
}

// takeList compares the live sessions of other servers with those that are known.
// It ends what is live no more, and gives what is new, while there is room.
func (h *hubState) takeList(cmd listRead) (news []string) {
	for _, r := range cmd.rows {
		s := h.sessions[r.id]
		if h.claiming[r.id] == 0 && s != nil && r.epoch > s.epoch {
			h.abandon(s, epochLost)
			s = nil
		}
		if f := h.foreign[r.id]; f != nil {
			f.seen, f.now.events, f.now.errors = cmd.asked, r.events, r.errors
		} else if s == nil && h.claiming[r.id] == 0 && h.foreignBytes < pageBytes {
			news = append(news, r.id)
		}
	}
	for id, f := range h.foreign {
		switch {
		case !f.seen.Before(cmd.asked) || h.claiming[id] > 0:
		case watchedLive(h.watchers[id]): // its row tells the last events before the end
		case len(cmd.rows) < maxActive:
			h.endForeign(id)
		default: // it may be one of those that the list has no room for
			h.dropForeign(id)
		}
	}
	return news
}

// takeForeign takes in what is new on other servers. Viewers are told of each
// session, or of many as one list.
func (h *hubState) takeForeign(cmd appeared) {
	h.listed = len(h.viewers) > 0
	many := len(cmd.sessions) > manyNews
	for _, s := range cmd.sessions {
		isNew := s.isActive && h.sessions[s.id] == nil && h.claiming[s.id] == 0 && h.addForeign(s.summary, cmd.asked)
		if isNew && !many {
			h.toViewers(sessionStarted(s.id, s.about))
		}
	}
	if many {
		h.toViewers(activeSessions(h.live(h.share())))
	}
}

// addForeign notes a live session of another server. All of them take pageBytes at
// most; viewers are told nothing of those that have no room.
func (h *hubState) addForeign(s summary, seen time.Time) (added bool) {
	if !h.listed || h.foreign[s.id] != nil || h.foreignBytes >= pageBytes {
		return false
	}
	s.about = &description{userID: s.about.userID, brief: s.about.brief}
	h.foreign[s.id] = &foreignSession{s, seen}
	h.foreignBytes += s.listSize()
	for _, w := range h.watchers[s.id] {
		w.live, w.owed = true, false
	}
	return true
}

// dropForeign forgets a session of another server, and tells nobody.
func (h *hubState) dropForeign(id string) {
	if f := h.foreign[id]; f != nil {
		h.foreignBytes -= f.listSize()
		delete(h.foreign, id)
	}
}

// endForeign tells viewers, if they take a session of another server for live,
// that it is over.
func (h *hubState) endForeign(id string) {
	known := h.foreign[id] != nil
	if h.dropForeign(id); known || watchedLive(h.watchers[id]) {
		h.tellEnded(id)
	}
}

// mark notes which sessions of this server are watched on others. A viewer who has just
// begun to watch there needs a full snapshot, as one who joins here does.
func (h *hubState) mark(ids []string) {
	before := h.marks
	h.marks = make(map[string]bool, len(ids))
	for _, id := range ids {
		h.marks[id] = true
		if s := h.sessions[id]; s != nil && !s.ended && !before[id] {
			h.wantSnapshot(s)
		}
	}
}
