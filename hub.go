package main

import (
	"context"
	"sort"
	"time"
)

// The hub numbers events, keeps them until they are committed, the newest for longer,
// and fans them out. It knows trackers and viewers by their outboxes.
//
// It lets go of a session in three ways:
//
//	detach   the tracker has gone; the session waits for it for the grace period
//	end      no more events will come; the rest is stored, then the session is
//	         forgotten
//	abandon  nothing more can be stored: deleted, refused, or another server's;
//	         the session is forgotten now, and its tracker is told why

// session is one recording that is live, in its grace period, or not yet wholly
// stored. The hub's goroutine owns it.
type session struct {
	// epoch is that of this server's last claim. about is shared with summaries, and only replaced.
	id    string
	epoch int64
	about *description

	tracker    *outbox   // who records it; nil in the grace period and after its end
	detachedAt time.Time // when the tracker left
	// ackTo is told of commits also after tracker has become nil: a post, or a page that ends its
	// session, waits for them.
	ackTo    *outbox // the last tracker
	firstSeq int64   // the first of the tracker's own page: lower ones are of pages before it
	shared   bool    // others may record it beside its tracker
	// No tracker and no grace period: it leaves memory with the flush that ends its row, unless a
	// tracker comes back before.
	ended  bool
	hidden bool // its page is in the background

	now     counters // with all that was accepted
	durable counters // with what is committed

	tail    []*batch // committed and still in memory, oldest first
	flush   *flush   // with a writer, or waiting to be tried again
	pending []*batch // accepted since
	hurry   bool     // somebody waits for their commit

	queued  time.Time // since when it stands in the hub's queue; zero: it does not
	urgent  bool      // it stands among the hub's urgent
	writing bool      // a writer has the flush
	retryAt time.Time // when a flush that failed is tried again

	// The awaitCommit commands as they came: each waits for no less than the one before.
	waiting []waiting // for commits

	snapshotAt      time.Time // when the newest full snapshot came
	snapshotAskedAt time.Time
}

// dirty reports whether something is to be stored.
func (s *session) dirty() bool { return s.flush != nil || len(s.pending) > 0 || s.ended }

// hurries reports whether the session does not wait for its interval.
func (s *session) hurries() bool { return s.ended || s.flush != nil || s.hurry }

// summary is a copy that any goroutine may keep: what it points to never changes.
func (s *session) summary() summary {
	return summary{id: s.id, epoch: s.epoch, about: s.about, now: s.now, isActive: !s.ended, state: s.state()}
}

// state says whether the page that is recorded is there.
func (s *session) state() string {
	switch {
	case s.ended:
		return ""
	case s.tracker == nil:
		return "left"
	case s.hidden:
		return "hidden"
	}
	return "live"
}

// memory gives the batches that hold events from one number up to, not
// including, another. In memory are the newest events, without a gap.
func (s *session) memory(from, to int64) (found []*batch) {
	var flushed []*batch
	if s.flush != nil {
		flushed = s.flush.batches
	}
	for _, batches := range [][]*batch{s.tail, flushed, s.pending} {
		i := sort.Search(len(batches), func(i int) bool { return batches[i].end() > from })
		j := sort.Search(len(batches), func(j int) bool { return batches[j].first >= to })
		if i < j {
			found = append(found, batches[i:j]...)
		}
	}
	return found
}

// oldest gives the number of the oldest event in memory.
func (s *session) oldest() int64 {
	if len(s.tail) > 0 {
		return s.tail[0].first
	}
	return s.durable.events
}

// hub is how others reach the hub's goroutine, run, which owns all state of
// sessions. The goroutine never waits: no I/O, no SQL, no JSON of events, no
// blocking send.
type hub struct {
	cfg     config
	cmds    chan command  // never closed
	done    chan struct{} // closed when run has ended
	budget  *budget
	metrics *metrics
}

// newHub makes a hub that answers nothing before run.
func newHub(cfg config, b *budget, m *metrics) *hub {
	return &hub{cfg: cfg, cmds: make(chan command, 256), done: make(chan struct{}), budget: b, metrics: m}
}

// send gives the hub a command, and waits while many are queued: the hub itself must not call it.
// It reports false when the hub has stopped.
func (h *hub) send(cmd command) bool {
	select {
	case h.cmds <- cmd:
		return true
	case <-h.done:
		return false
	}
}

// ask sends a command that has reply in it, and waits for the answer. reply must have room for it.
// ok is false when the hub has stopped.
func ask[R any](h *hub, reply chan R, cmd command) (r R, ok bool) {
	if !h.send(cmd) {
		return r, false
	}
	select {
	case r = <-reply:
		return r, true
	case <-h.done:
		return r, false
	}
}

// hubState is what run owns.
type hubState struct {
	*hub
	sessions map[string]*session
	recorded map[*outbox]*session // what each tracker records
	claiming map[string]int       // how many are reserved and not yet attached, by session
	// grace has the sessions in their grace period; trackers counts all connections but viewers'.
	grace    map[*session]struct{}
	trackers int

	// viewers has the watches of each viewer, by session; watchers the same, by session first.
	viewers  map[*outbox]map[string]*watch
	watchers map[string]map[*outbox]*watch // also of sessions that are not in memory
	lagging  map[*outbox]bool              // viewers that had no room: sent nothing until they have read all

	foreign      map[string]*foreignSession // live sessions of other servers, while viewers are there
	foreignBytes int
	listed       bool            // foreign was filled, since viewers are there
	marks        map[string]bool // sessions that viewers of other servers watch

	// A session may stand in both, and in either after it was stored or forgotten: see nextFlushes.
	queue  []*session // with something to store, oldest first; some have been stored since
	urgent []*session // those that do not wait for their interval
	// retry has the sessions whose flush waits for its retryAt; inFlight is how many flushes writers
	// have.
	retry    map[*session]bool
	writers  []chan []*flush // free ones
	inFlight int
	draining bool
	// What all pending, all tails and all descriptions take of the budget.
	pendingBytes int64
	tailBytes    int64
	aboutBytes   int64

	claimingBytes int64 // reserved for descriptions that are not in aboutBytes yet
}

// run is the hub's goroutine. It ends with ctx, or when it was drained and
// everything is stored.
func (h *hub) run(ctx context.Context) {
	defer close(h.done)
	state := &hubState{
		hub:      h,
		sessions: map[string]*session{},
		recorded: map[*outbox]*session{},
		claiming: map[string]int{},
		grace:    map[*session]struct{}{},
		viewers:  map[*outbox]map[string]*watch{},
		watchers: map[string]map[*outbox]*watch{},
		lagging:  map[*outbox]bool{},
		foreign:  map[string]*foreignSession{},
		retry:    map[*session]bool{},
	}
	// Often enough that an event waits little longer than BATCH_INTERVAL.
	tick := time.NewTicker(min(max(h.cfg.batchInterval/4, 5*time.Millisecond), 100*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case cmd := <-h.cmds:
			state.handle(cmd)
		case <-tick.C:
			state.tick(time.Now())
		case <-ctx.Done():
			return
		}
		if state.dispatch() {
			return
		}
	}
}

// handle does one command. To all but awaitCommit and nextWork it replies before the next one.
func (h *hubState) handle(cmd command) {
	switch cmd := cmd.(type) {
	case publish:
		h.publish(cmd)
	case flushDone:
		for _, f := range cmd.flushes {
			h.inFlight--
			h.settle(f)
		}
	case nextWork:
		h.writers = append(h.writers, cmd.reply)
	case enter:
		h.enter(cmd)
	case leave:
		h.leave(cmd.out)
	case reserve:
		cmd.reply <- h.reserve(cmd)
	case unreserve:
		h.unreserve(cmd)
	case attach:
		cmd.reply <- h.attach(cmd)
	case awaitCommit:
		h.awaitCommit(cmd)
	case hurry:
		if s := h.sessions[cmd.id]; s != nil {
			h.hurry(s)
		}
	case visibility:
		if s := h.recorded[cmd.out]; s != nil {
			h.toWatchers(s.id, cmd.m)
			s.hidden = cmd.hidden
			h.tellState(s)
		}
	case finish:
		if s := h.recorded[cmd.out]; s != nil {
			h.end(s)
		}
	case join:
		cmd.reply <- h.join(cmd)
	case unjoin:
		h.unwatch(cmd.out, cmd.id)
	case evict:
		if s := h.sessions[cmd.id]; s != nil {
			h.abandon(s, deleted)
		} else {
			h.resetWatchers(cmd.id)
			h.endForeign(cmd.id)
		}
		cmd.reply <- struct{}{}
	case drain:
		h.draining = true
		for _, s := range h.sessions {
			h.end(s)
		}
	default:
		h.handleMore(cmd)
	}
}

// handleMore handles queries, and what the follower has read.
func (h *hubState) handleMore(cmd command) {
	switch cmd := cmd.(type) {
	case memoryQuery:
		cmd.reply <- h.inMemory(cmd)
	case liveQuery:
		cmd.reply <- h.live(h.share())
	case stateQuery:
		cmd.reply <- h.states(cmd.ids)
	case statsQuery:
		cmd.reply <- h.stats()
	case followQuery:
		cmd.reply <- h.following()
	case rowsRead:
		h.takeRows(cmd)
	case listRead:
		cmd.reply <- h.takeList(cmd)
	case appeared:
		h.takeForeign(cmd)
	case marked:
		h.mark(cmd.ids)
	}
}

// tick does what is due: sessions whose grace period has passed end, flushes
// whose pause has passed are tried again, viewers that have read all go on, and
// what somebody watches on another server is stored.
func (h *hubState) tick(now time.Time) {
	for s := range h.grace {
		if now.Sub(s.detachedAt) >= h.cfg.grace {
			h.end(s)
		}
	}
	for s := range h.retry {
		if now.After(s.retryAt) {
			delete(h.retry, s)
			h.enqueue(s)
		}
	}
	for out := range h.lagging {
		if out.held() == 0 {
			delete(h.lagging, out)
			h.catchUp(out)
		}
	}
	for id := range h.marks {
		s := h.sessions[id]
		if s != nil && len(s.pending) > 0 && now.Sub(s.pending[0].received) >= followEvery {
			s.hurry = true
			h.enqueue(s)
		}
	}
}

// enter takes notice of a connection. A viewer is told what is live.
func (h *hubState) enter(cmd enter) {
	if !cmd.viewer {
		h.trackers++
		return
	}
	h.viewers[cmd.out] = map[string]*watch{}
	h.tell(cmd.out, activeSessions(h.live(h.share())))
}

// leave undoes enter, detaches what the connection recorded, and ends what it watched. Without
// viewers nobody follows other servers: what is known of them is forgotten.
func (h *hubState) leave(out *outbox) {
	watching, viewer := h.viewers[out]
	if !viewer {
		h.trackers--
		h.detach(out)
		return
	}
	for id := range watching {
		h.unwatch(out, id)
	}
	delete(h.viewers, out)
	delete(h.lagging, out)
	if len(h.viewers) == 0 {
		clear(h.foreign)
		h.foreignBytes, h.listed = 0, false
	}
}

// Events.

// publish takes a tracker's batch, or tells the tracker why not and gives back the batch's room. A
// batch that was taken before is only acked again, to whoever sent it: an earlier page, perhaps.
func (h *hubState) publish(cmd publish) {
	s, b := h.sessionOf(cmd), cmd.b
	switch {
	case s == nil || s.ended:
		h.metrics.refuse("no_session")
		cmd.out.trySend(errorMessage("no_session", "this connection records no session"), trackerOutbox)
	case b.seq > 0 && b.seq <= s.now.seq:
		s.ack(cmd.out)
	case b.seq > s.now.seq+1:
		h.metrics.refuse("sequence_gap")
		cmd.out.trySend(sequenceGap(s.now.seq+1), trackerOutbox)
	case s.now.raw+b.raw() > int64(h.cfg.maxSessionBytes):
		h.metrics.refuse("session_bytes")
		cmd.out.trySend(errorMessage("session_full", "the session has reached MAX_SESSION_BYTES"), trackerOutbox)
		h.end(s)
	default:
		h.take(s, b)
		if len(b.events) > 0 {
			h.fanOut(s, b)
		} else if cmd.m != nil {
			h.toWatchers(s.id, cmd.m)
		}
		return
	}
	h.budget.give(b.cost)
}

// sessionOf gives the session of a batch: the one that its tracker records, or
// one that a later page of the tab has taken over. A batch of an earlier page has
// a number of its own, and is taken where that fits.
func (h *hubState) sessionOf(cmd publish) *session {
	if s := h.recorded[cmd.out]; s != nil {
		return s
	}
	if s := h.sessions[cmd.id]; s != nil && cmd.b.seq > 0 && cmd.b.seq < s.firstSeq {
		return s
	}
	return nil
}

// take numbers a batch and keeps it for the next flush. Its frame is complete from here on.
func (h *hubState) take(s *session, b *batch) {
	if b.report != nil {
		b.first, b.report.id = s.now.events, s.now.errors
	} else {
		b.number(s.now.events)
	}
	before := s.now.snapshot
	s.now.add(b)
	if s.now.snapshot != before {
		s.snapshotAt = b.received
	}
	s.pending = append(s.pending, b)
	h.pendingBytes += b.cost
	h.metrics.eventsIn.Add(int64(len(b.events)))
	h.metrics.bytesIn.Add(int64(len(b.body)))
	h.enqueue(s)
}

// awaitCommit replies at once where all is committed; otherwise what is pending hurries.
func (h *hubState) awaitCommit(cmd awaitCommit) {
	s := h.sessions[cmd.id]
	if s == nil {
		cmd.reply <- 0
		return
	}
	s.waiting = append(s.waiting, waiting{s.now, cmd.reply})
	s.answer(false)
	h.hurry(s)
}

// hurry has the session stored without waiting for its interval.
func (h *hubState) hurry(s *session) {
	s.hurry = len(s.pending) > 0
	h.enqueue(s)
}

// answer answers those who wait for what is committed, the first of them first;
// everybody, when the session is gone.
func (s *session) answer(gone bool) {
	for ; len(s.waiting) > 0; s.waiting = s.waiting[1:] {
		w := s.waiting[0]
		done := w.upTo.events <= s.durable.events && w.upTo.errors <= s.durable.errors && w.upTo.seq <= s.durable.seq
		switch {
		case done:
			w.reply <- s.durable.seq
		case gone:
			w.reply <- 0
		default:
			return
		}
	}
}

// What is in memory.

// inMemory passes over a session that waits in its grace period and is stored.
func (h *hubState) inMemory(cmd memoryQuery) inMemory {
	s := h.sessions[cmd.id]
	if s == nil || s.tracker == nil && !s.dirty() {
		return inMemory{} // the database has all of it, and more when another server has it now
	}
	return inMemory{true, s.summary(), s.memory(cmd.from, cmd.to)}
}

// live gives the live sessions of all servers, this one's first, until their list would be larger
// than most. Apart from that, which ones it leaves out is chance.
func (h *hubState) live(most int) (all []summary) {
	size := activeSessions{}.size()
	add := func(s summary) bool {
		if size += s.listSize(); size > most {
			return false
		}
		all = append(all, s)
		return true
	}
	for _, s := range h.sessions {
		if !s.ended && !add(s.summary()) {
			return all
		}
	}
	for _, f := range h.foreign {
		if !add(f.summary) {
			return all
		}
	}
	return all
}

// stats looks at every session: it is for questions that come seldom.
func (h *hubState) stats() hubStats {
	stats := hubStats{sessions: len(h.sessions), trackers: h.trackers, viewers: len(h.viewers), tailBytes: h.tailBytes}
	now := time.Now()
	for _, s := range h.sessions {
		stats.events += s.now.events
		if !s.ended {
			stats.live++
		}
		if b := s.oldestPending(); b != nil {
			stats.oldest = max(stats.oldest, now.Sub(b.received))
		}
	}
	return stats
}

// oldestPending gives the oldest batch that is not committed, nil for none.
func (s *session) oldestPending() *batch {
	switch {
	case s.flush != nil && len(s.flush.batches) > 0:
		return s.flush.batches[0]
	case len(s.pending) > 0:
		return s.pending[0]
	}
	return nil
}
