package main

import (
	"context"
	"sort"
	"time"
)

// The hub numbers events, keeps them until they are committed and fans them out.
// Who records and who watches it knows by their outboxes.
//
// It lets go of a session in three ways:
//
//	detach   the tracker has gone; the session waits for it for the grace period
//	end      no more events will come; what there is is stored, then the session
//	         is forgotten
//	abandon  nothing more can be stored: deleted, refused, or another server's;
//	         the session is forgotten now, and its tracker is told why

// session is one recording that is live, in its grace period, or not yet wholly
// stored. The hub's goroutine owns it.
type session struct {
	id    string
	epoch int64
	about *description

	tracker    *outbox   // who records it; nil in the grace period and after its end
	detachedAt time.Time // when the tracker had gone
	ackTo      *outbox   // the last tracker
	firstSeq   int64     // of the tracker's own page: lower numbers are of pages before it
	shared     bool      // others may record it beside its tracker
	ended      bool
	hidden     bool // its page is in the background

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

	waiting []waiting // for commits

	snapshotAt      time.Time // when the newest full snapshot came
	snapshotAskedAt time.Time
}

// dirty reports whether something is to be stored.
func (s *session) dirty() bool { return s.flush != nil || len(s.pending) > 0 || s.ended }

// hurries reports whether the session does not wait for its interval.
func (s *session) hurries() bool { return s.ended || s.flush != nil || s.hurry }

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

// Commands to the hub. A reply goes on a channel with room for it, which the
// asker makes and nobody closes.
type (
	enter struct { // a connection is there
		out    *outbox
		viewer bool
	}
	leave struct{ out *outbox } // and ends

	// reserve precedes a claim in the database. Without a token, a session that a
	// live connection records, or has reserved, is not to be had. Each reserve that
	// is granted is followed by attach or unreserve.
	// With share, a session that was begun so is recorded by out as well, without a claim.
	reserve struct {
		out            *outbox
		id             string
		byToken, share bool
		cost           int64 // of its description
		reply          chan reservation
	}
	unreserve struct { // its claim has failed
		id   string
		cost int64 // as it was reserved
	}
	// attach makes out the tracker of a session that is claimed in the database.
	attach struct {
		unreserve
		out     *outbox
		claim   claim
		about   *description
		started message // what viewers are told

		firstSeq int64
		share    bool
		reply    chan attached
	}
	publish struct {
		out *outbox
		id  string // of its session
		b   *batch
		m   message // for the session's viewers, if b has no events; nil when they need not know
	}
	// awaitCommit asks for the commit of all that a session has, now. The reply is
	// the seq that is committed then, 0 when the session is gone.
	awaitCommit struct {
		id    string
		reply chan int64
	}
	hurry      struct{ id string } // what the session has is committed now, nobody waits for it
	visibility struct {            // the tracker's page goes into the background, or comes back
		out    *outbox
		m      message // for the session's viewers
		hidden bool
	}
	finish struct{ out *outbox } // the tracker ends its session

	// join makes out watch a session that is in memory, or one that was read from
	// the database as stored. The reply says whether it could.
	join struct {
		out    *outbox
		id     string
		stored *summary
		reply  chan bool
	}
	unjoin struct {
		out *outbox
		id  string
	}

	nextWork  struct{ reply chan []*flush } // a writer is free
	flushDone struct{ flushes []*flush }

	memoryQuery struct { // what memory has of a session, from an event on
		id       string
		from, to int64
		reply    chan inMemory
	}
	liveQuery  struct{ reply chan []summary }
	stateQuery struct { // of those sessions that are in memory, of these or, with nil, of all
		ids   []string
		reply chan map[string]string
	}
	statsQuery struct{ reply chan hubStats }
	evict      struct { // the session was deleted
		id    string
		reply chan struct{}
	}
	drain struct{} // no more events will come: end and store everything

	// The follower's, see follow.go.
	followQuery struct{ reply chan following }
	rowsRead    struct { // what the rows of these sessions say; some may have none
		watched []watched
		rows    map[string]foreignRow
	}
	listRead struct { // all live sessions of other servers, asked for at some time
		asked time.Time
		rows  []foreignRow
		reply chan []string // those whose rows are to be read
	}
	appeared struct { // the rows of those
		asked    time.Time
		sessions []storedSession
	}
	marked struct{ ids []string } // sessions of this server that somebody watches on another
)

type command any

// reservation answers reserve.
type reservation int

const (
	granted reservation = iota
	taken               // a live connection has the session
	noRoom              // sessions fill their share of the budget
	joins               // out records the session beside its tracker
	alone               // its tracker does not share it
)

// attached answers attach. With outdated, a newer claim came first.
type attached struct {
	outdated bool
	accepted int64 // seq of the last batch that was taken
	stored   int64 // seq of the last batch that is committed
}

// waiting is an awaitCommit that is not answered yet.
type waiting struct {
	upTo  counters // to be committed
	reply chan int64
}

// inMemory answers memoryQuery: the batches with the events asked for, in order;
// events before the first of them are in the database, if anywhere.
type inMemory struct {
	ok      bool
	session summary
	batches []*batch
}

type hubStats struct {
	sessions, live    int
	events            int64
	trackers, viewers int
	tailBytes         int64
	oldest            time.Duration // how long the database has kept an event waiting
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

func newHub(cfg config, b *budget, m *metrics) *hub {
	return &hub{cfg: cfg, cmds: make(chan command, 256), done: make(chan struct{}), budget: b, metrics: m}
}

// send gives the hub a command. It reports false when the hub has stopped.
func (h *hub) send(cmd command) bool {
	select {
	case h.cmds <- cmd:
		return true
	case <-h.done:
		return false
	}
}

// ask sends a command and waits for its reply. ok is false when the hub has
// stopped.
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
	claiming map[string]int       // claims in the database that are not attached yet, by session
	grace    map[*session]struct{}
	trackers int

	viewers  map[*outbox]map[string]*watch
	watchers map[string]map[*outbox]*watch // also of sessions that are not in memory
	lagging  map[*outbox]bool              // viewers that had no room: sent nothing until they have read all

	foreign      map[string]*foreignSession // live sessions of other servers, while viewers are there
	foreignBytes int
	listed       bool            // foreign was read
	marks        map[string]bool // sessions that viewers of other servers watch

	queue        []*session // with something to store, oldest first; some have been stored since
	urgent       []*session // those that do not wait for their interval
	retry        map[*session]bool
	writers      []chan []*flush // free ones
	inFlight     int
	draining     bool
	pendingBytes int64
	tailBytes    int64
	aboutBytes   int64

	claimingBytes int64 // of descriptions, beside aboutBytes
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

func (h *hubState) enter(cmd enter) {
	if !cmd.viewer {
		h.trackers++
		return
	}
	h.viewers[cmd.out] = map[string]*watch{}
	h.tell(cmd.out, activeSessions(h.live(h.share())))
}

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

// publish takes a tracker's batch, or tells the tracker why not. A batch that was
// taken before is only acked again, to who has sent it: an earlier page, perhaps.
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

// take numbers a batch and keeps it for the next flush.
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

func (h *hubState) inMemory(cmd memoryQuery) inMemory {
	s := h.sessions[cmd.id]
	if s == nil || s.tracker == nil && !s.dirty() {
		return inMemory{} // the database has all of it, and more when another server has it now
	}
	return inMemory{true, s.summary(), s.memory(cmd.from, cmd.to)}
}

// live gives the live sessions of all servers, as many as have room in a list of
// most bytes.
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
