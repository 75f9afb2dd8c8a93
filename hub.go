package main

import (
	"container/list"
	"context"
	"slices"
	"sort"
	"strconv"
	"time"
)

// batch is the events of one message, ready to be sent to viewers: its frame is
// the live message itself, into which the hub writes the number of the first
// event. From then on nobody changes it; it is shared by the writer, the
// viewers' outboxes and whoever reads a page.
type batch struct {
	frame    []byte
	body     []byte        // the events in frame, separated by commas
	events   []event       // their bounds in body
	index    []byte        // the place in frame for the first event's number
	first    int64         // number of the first event
	seq      int64         // the tracker's number of the batch, 0 when it has none
	room     int64         // bytes taken from the budget
	kept     *list.Element // the hub's own: its place among the batches kept though committed
	received time.Time
}

func (b *batch) end() int64 { return b.first + int64(len(b.events)) }

// number gives the batch its place in the session.
func (b *batch) number(first int64) {
	b.first = first
	strconv.AppendInt(b.index[:0:len(b.index)], first, 10)
}

// report is an error that a page told of.
type report struct {
	id   int64
	kind string
	data []byte
	room int64
}

// description is what a session_start says of its session. It is never changed,
// only replaced.
type description struct {
	userID, url string
	metadata    []byte // JSON object
}

// room is what a session with this description takes of the budget.
func (d *description) room() int64 {
	if d == nil {
		return 0
	}
	return int64(len(d.userID)+len(d.url)+len(d.metadata)) + 512
}

// counters are what a session's row in the database adds up, up to some batch.
type counters struct {
	events, errors     int64
	raw, stored        int64 // bytes of JSON, bytes of chunks
	seq                int64
	firstTime, endTime int64 // least and greatest timestamp, 0 when there is none
	snapshot           int64 // index of the newest full snapshot, -1 when there is none
}

func (c *counters) add(b *batch) {
	for i, e := range b.events {
		if e.kind == fullSnapshot {
			c.snapshot = b.first + int64(i)
		}
		c.see(e.time)
	}
	c.events = b.end()
	c.raw += int64(len(b.body))
	c.seq = max(c.seq, b.seq)
}

// after says whether nothing was stored between two states of a row.
func (c *counters) after(before counters) bool {
	return c.events == before.events && c.errors == before.errors && c.seq == before.seq
}

func (c *counters) see(t int64) {
	if t == 0 {
		return
	}
	if c.firstTime == 0 || t < c.firstTime {
		c.firstTime = t
	}
	c.endTime = max(c.endTime, t)
}

// session is one recording that is live, in its grace period, or not yet wholly
// stored. The hub's goroutine owns it.
type session struct {
	id    string
	epoch int64
	about *description

	tracker *conn     // who records it, nil in the grace period and when it has ended
	left    time.Time // when the tracker left
	hears   *conn     // who is sent its acks: the last tracker
	ended   bool
	endedAt time.Time

	now     counters // with all that was accepted
	durable counters // with what is committed

	tail    []*batch // committed and still in memory, oldest first
	flush   *flush   // with the writer, or waiting to be tried again
	pending []*batch // accepted since
	reports []report

	queued     bool // stands in the hub's queue, since then
	since      time.Time
	writing    bool // the writer has the flush
	doubted    bool // another server seems to have the session
	retryAt    time.Time
	asked      time.Time // when a full snapshot was last asked for
	snapshotAt time.Time // when the newest one came
}

func (s *session) dirty() bool {
	return s.flush != nil || len(s.pending) > 0 || len(s.reports) > 0 || s.ended
}

// hurries says whether a session in the queue does not wait for its interval: it
// has ended, or has a flush that is to be tried again.
func (s *session) hurries() bool { return s.ended || s.flush != nil }

// memory gives the batches in memory that hold events from one number up to,
// not including, another. In memory are the newest events, without a gap.
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

// wrote says whether a row in this state is as this server left it: with what is
// known to be committed, or with the flush that may be by now.
func (s *session) wrote(row counters) bool {
	return row.after(s.durable) || s.flush != nil && row.after(s.flush.after)
}

// oldest gives the number of the oldest event in memory.
func (s *session) oldest() int64 {
	if len(s.tail) > 0 {
		return s.tail[0].first
	}
	return s.durable.events
}

func (s *session) summary() summary {
	return summary{id: s.id, epoch: s.epoch, about: s.about, now: s.now, isActive: !s.ended}
}

// flush is the work of one session for one transaction. The hub makes it, the
// writer encodes and stores it and hands it back. It stays the same until it is
// stored, so that storing it twice is the same as once.
type flush struct {
	session string
	epoch   int64
	batches []*batch
	reports []report
	after   counters // the row's values once this is stored
	ended   bool
	endedAt time.Time
	calm    bool // there is time to compress it well

	chunks   []chunk // made by the writer
	attempts int
	outcome  outcome
}

type outcome int

const (
	stored    outcome = iota
	failed            // to be tried again
	refused           // PostgreSQL does not take the data
	overtaken         // another server has the session
	deleted           // the session is not there any more
)

func (f *flush) room() (n int64) {
	for _, b := range f.batches {
		n += b.room
	}
	for _, r := range f.reports {
		n += r.room
	}
	return n
}

// Commands to the hub. A reply goes on a channel with room for it.
type (
	enter struct{ c *conn } // a connection is there
	leave struct{ c *conn } // and ends

	// held asks whether a live connection other than c records the session.
	held struct {
		id    string
		c     *conn
		reply chan bool
	}
	// attach makes c the tracker of a session that is claimed in the database.
	attach struct {
		c       *conn
		id      string
		claim   claim
		about   *description
		started message // what viewers are told
		reply   chan attached
	}
	publish struct {
		c *conn
		b *batch
	}
	reported struct {
		c *conn
		r report
		m message // for the session's viewers, nil when they need not know
	}
	forward struct { // to the viewers of c's session
		c *conn
		m message
	}
	finish struct{ c *conn } // the tracker ends its session
	acks   struct{ c *conn } // the tracker wants to hear the last ack again

	// join makes c watch a session that is in memory, or one that was read from
	// the database as stored; it says whether it could.
	join struct {
		c      *conn
		id     string
		stored *summary
		reply  chan bool
	}
	unjoin struct {
		c  *conn
		id string
	}
	drained struct{ c *conn } // c's outbox, once full, is empty again

	take    struct{ reply chan []*flush } // a writer is free; nil when there will be no more
	settled struct{ flushes []*flush }

	find struct { // what memory has of a session, from an event on
		id       string
		from, to int64
		reply    chan found
	}
	active struct{ reply chan []summary }
	evict  struct { // a session is being deleted
		id    string
		reply chan struct{}
	}
	look  struct{ reply chan hubStats }
	drain struct{} // no more events will come: end and store everything
)

type command any

type attached struct {
	outcome  attachment
	accepted int64 // seq of the last batch that was taken
	stored   int64 // seq of the last batch that is committed
}

type attachment int

const (
	attachedNow attachment = iota
	heldByOther            // a live connection records it, and the newcomer has no token
	outdated               // a newer claim came first
)

// found says what memory has of a session: batches with the events asked for,
// in order; events before the first of them are in the database, if anywhere.
type found struct {
	ok      bool
	session summary
	batches []*batch
}

// summary is a session in memory as lists show it.
type summary struct {
	id       string
	epoch    int64
	about    *description
	now      counters
	isActive bool
}

type hubStats struct {
	sessions, live    int
	events            int64
	trackers, viewers int
	tailBytes         int64
	oldest            time.Duration // age of the oldest event that is not committed
}

const (
	flushBytes    = 4 << 20 // this much pending JSON starts a batch at once
	maxFlushBytes = 8 << 20 // one session's share of a batch

	maxFlushReports = 500
	maxPause        = 2 * time.Second

	snapshotAge   = 30 * time.Second // a newest full snapshot older than this is old
	snapshotPause = 5 * time.Second  // between two requests for one
)

// hubConfig is what the hub needs to know of the settings.
type hubConfig struct {
	batchSize       int
	batchInterval   time.Duration
	grace           time.Duration
	maxEvents       int64 // in memory, a session
	maxTailBytes    int64 // in memory, all sessions, of what is committed
	maxSessionBytes int64
}

// hub numbers events, keeps them until they are committed and fans them out. Its
// goroutine, run, owns all state of sessions; everyone else sends it commands.
// It never waits: no I/O, no SQL, no JSON, no blocking send.
type hub struct {
	cfg     hubConfig
	cmds    chan command
	done    chan struct{} // closed when run has ended
	budget  *budget
	metrics *metrics
}

func newHub(cfg hubConfig, b *budget, m *metrics) *hub {
	return &hub{cfg: cfg, cmds: make(chan command, 256), done: make(chan struct{}), budget: b, metrics: m}
}

// send gives the hub a command, and says false when the hub has stopped.
func (h *hub) send(cmd command) bool {
	select {
	case h.cmds <- cmd:
		return true
	case <-h.done:
		return false
	}
}

// ask sends a command and waits for its reply; ok is false when the hub has
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
	recorded map[*conn]*session // what each tracker records
	viewers  map[*conn]map[string]*watch
	watchers map[string]map[*conn]*watch // also of sessions that are not live
	trackers int

	queue        []*session // with something to store, oldest first
	retry        map[*session]struct{}
	grace        map[*session]struct{}
	writers      []chan []*flush // free ones
	draining     bool
	inFlight     int
	pendingBytes int64
	tail         *list.List // of *session: one for every batch kept though committed, oldest first
	tailBytes    int64
}

// watch is a viewer's interest in a session; next is the first event that it
// has neither been sent nor told to page for.
type watch struct {
	next int64
	end  int64    // one past the newest event that was published
	live bool     // the viewer takes the session for live
	owed *summary // what its join is to be answered, when there was no room for it
}

// run is the hub's goroutine. It ends with ctx, or when it was drained and
// everything is stored.
func (h *hub) run(ctx context.Context) {
	defer close(h.done)
	st := &hubState{
		hub:      h,
		sessions: map[string]*session{},
		recorded: map[*conn]*session{},
		viewers:  map[*conn]map[string]*watch{},
		watchers: map[string]map[*conn]*watch{},
		retry:    map[*session]struct{}{},
		grace:    map[*session]struct{}{},
		tail:     list.New(),
	}
	tick := time.NewTicker(min(max(h.cfg.batchInterval/4, 5*time.Millisecond), 100*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case cmd := <-h.cmds:
			st.handle(cmd)
		case <-tick.C:
			st.expire()
		case <-ctx.Done():
			return
		}
		if st.dispatch() {
			return
		}
	}
}

func (h *hubState) handle(cmd command) {
	switch cmd := cmd.(type) {
	case publish:
		h.publish(cmd.c, cmd.b)
	case settled:
		for _, f := range cmd.flushes {
			h.inFlight--
			h.settle(f)
		}
	case take:
		h.writers = append(h.writers, cmd.reply)
	case enter:
		h.enter(cmd.c)
	case leave:
		h.leave(cmd.c)
	case held:
		s := h.sessions[cmd.id]
		cmd.reply <- s != nil && s.tracker != nil && s.tracker != cmd.c
	case attach:
		cmd.reply <- h.attach(cmd)
	case reported:
		h.report(cmd.c, cmd.r, cmd.m)
	case forward:
		h.recordedBy(cmd.c, func(s *session) { h.toWatchers(s.id, cmd.m) })
	case finish:
		h.recordedBy(cmd.c, h.end)
	case acks:
		h.recordedBy(cmd.c, h.ack)
	case join:
		cmd.reply <- h.join(cmd)
	case unjoin:
		h.unwatch(cmd.c, cmd.id)
	case drained:
		h.catchUp(cmd.c)
	case find:
		cmd.reply <- h.find(cmd)
	case active:
		cmd.reply <- h.summaries()
	case evict:
		if s := h.sessions[cmd.id]; s != nil {
			h.lose(s, deleted)
		} else {
			h.watchAnew(cmd.id)
		}
		cmd.reply <- struct{}{}
	case look:
		cmd.reply <- h.stats()
	case drain:
		h.draining = true
		for _, s := range h.sessions {
			h.end(s)
		}
	}
}

// recordedBy calls fn with the session that a tracker records, if it does.
func (h *hubState) recordedBy(c *conn, fn func(*session)) {
	if s := h.recorded[c]; s != nil {
		fn(s)
	}
}

// Connections.

func (h *hubState) enter(c *conn) {
	if !c.viewer {
		h.trackers++
		return
	}
	h.viewers[c] = map[string]*watch{}
	c.offer(activeSessions(h.summaries()))
}

func (h *hubState) leave(c *conn) {
	if !c.viewer {
		h.trackers--
		h.detach(c)
		return
	}
	for id := range h.viewers[c] {
		h.unwatch(c, id)
	}
	delete(h.viewers, c)
}

// detach takes the session from its tracker; it has its grace period to be
// resumed.
func (h *hubState) detach(c *conn) {
	if s := h.recorded[c]; s != nil {
		s.tracker, s.left = nil, time.Now()
		delete(h.recorded, c)
		h.grace[s] = struct{}{}
	}
}

// expire does what is due: sessions whose grace has passed end, flushes whose
// pause has passed are tried again.
func (h *hubState) expire() {
	now := time.Now()
	for s := range h.grace {
		if now.Sub(s.left) >= h.cfg.grace {
			h.end(s)
		}
	}
	for s := range h.retry {
		if now.After(s.retryAt) {
			delete(h.retry, s)
			h.enqueue(s)
		}
	}
}

// Sessions.

func (h *hubState) attach(cmd attach) attached {
	s := h.sessions[cmd.id]
	switch {
	case s == nil:
		s = &session{id: cmd.id, ended: true, now: cmd.claim.counters, durable: cmd.claim.counters}
		h.sessions[s.id] = s
	case s.tracker != nil && s.tracker != cmd.c && !cmd.claim.byToken:
		if e := cmd.claim.epoch; e == s.epoch+1 || e > s.epoch && s.wrote(cmd.claim.counters) {
			s.epoch = e // the claim was for nothing, but the row has it now
		}
		return attached{outcome: heldByOther}
	case cmd.claim.epoch < s.epoch:
		return attached{outcome: outdated}
	case cmd.claim.epoch != s.epoch+1 && !cmd.claim.after(s.durable):
		h.drop(s) // another server had it in between: trackers that number their batches send them again
		s.now, s.durable = cmd.claim.counters, cmd.claim.counters
	}
	s.epoch, s.doubted = cmd.claim.epoch, false
	h.budget.give(s.about.room() - cmd.about.room())
	s.about = cmd.about
	h.seat(cmd.c, s)
	if s.ended {
		s.ended = false
		h.metrics.sessionsStarted.Add(1)
		h.toViewers(cmd.started)
	}
	return attached{accepted: s.now.seq, stored: max(s.durable.seq, cmd.claim.counters.seq)}
}

// seat makes c the one tracker of the session.
func (h *hubState) seat(c *conn, s *session) {
	if old := s.tracker; old != nil && old != c {
		h.release(old)
		old.shut(closeTaken, "the session continues on another connection")
	}
	if h.recorded[c] != s {
		h.detach(c)
	}
	h.recorded[c] = s
	s.tracker, s.hears = c, c
	delete(h.grace, s)
}

// drop forgets the session's events in memory. A flush that the writer has is
// known to be dropped when it comes back.
func (h *hubState) drop(s *session) {
	for _, b := range s.pending {
		h.pendingBytes -= b.room
		h.budget.give(b.room)
	}
	for _, r := range s.reports {
		h.pendingBytes -= r.room
		h.budget.give(r.room)
	}
	if s.flush != nil && !s.writing {
		h.budget.give(s.flush.room())
	}
	delete(h.retry, s)
	h.trim(s, len(s.tail))
	s.pending, s.reports, s.flush, s.writing = nil, nil, nil, false
}

// end ends a session: what is left of it is stored at once, then it leaves
// memory.
func (h *hubState) end(s *session) {
	delete(h.grace, s)
	if s.ended {
		return
	}
	s.ended, s.endedAt = true, time.Now()
	delete(h.recorded, s.tracker)
	s.tracker = nil
	h.tellEnded(s.id)
	h.enqueue(s)
}

// lose forgets a session of which nothing more can be stored, and tells its
// tracker why.
func (h *hubState) lose(s *session, why outcome) {
	h.drop(s)
	h.remove(s)
	if why == deleted {
		h.watchAnew(s.id)
	}
	if !s.ended && why != overtaken {
		h.tellEnded(s.id)
	}
	s.ended = true
	c := s.tracker
	if c == nil {
		return
	}
	defer h.release(c) // after the message that says why
	switch why {
	case overtaken:
		c.shut(closeTaken, "the session continues on another connection")
	case deleted:
		c.offer(errorMessage("session_deleted", "the session was deleted"))
		c.shut(closeDeleted, "the session was deleted")
	case refused:
		c.offer(errorMessage("not_stored", "the database refused the session's data"))
	}
}

// watchAnew prepares those who watch a session that is deleted for another under
// its id: what they have seen is not of that.
func (h *hubState) watchAnew(id string) {
	for _, w := range h.watchers[id] {
		w.next, w.end = 0, 0
	}
}

// release tells a tracker's reader that it records nothing any more.
func (h *hubState) release(c *conn) {
	delete(h.recorded, c)
	c.lost.Store(true)
}

func (h *hubState) remove(s *session) {
	h.trim(s, len(s.tail))
	h.budget.give(s.about.room())
	delete(h.grace, s)
	delete(h.sessions, s.id)
}

// Events.

func (h *hubState) publish(c *conn, b *batch) {
	s := h.recorded[c]
	if s == nil {
		h.budget.give(b.room)
		c.offer(errorMessage("no_session", "this connection records no session"))
		return
	}
	if h.full(s, len(b.body)) {
		h.budget.give(b.room)
		return
	}
	b.number(s.now.events)
	before := s.now.snapshot
	s.now.add(b)
	if s.now.snapshot != before {
		s.snapshotAt = b.received
	}
	s.pending = append(s.pending, b)
	h.pendingBytes += b.room
	h.metrics.eventsIn.Add(int64(len(b.events)))
	h.metrics.bytesIn.Add(int64(len(b.body)))
	h.enqueue(s)
	if len(b.events) > 0 {
		h.fanOut(s, b)
	}
}

// full says whether the session has no room for so much more, and ends it then.
func (h *hubState) full(s *session, size int) bool {
	if s.now.raw+int64(size) <= h.cfg.maxSessionBytes {
		return false
	}
	h.metrics.refuse("session_bytes")
	s.tracker.offer(errorMessage("session_full", "the session has reached MAX_SESSION_BYTES"))
	h.release(s.tracker)
	h.end(s)
	return true
}

// fanOut sends a batch to those who watch the session. Whoever stands somewhere
// else than at its first event is told to page.
func (h *hubState) fanOut(s *session, b *batch) {
	for c, w := range h.watchers[s.id] {
		w.end, w.live = b.end(), true
		switch {
		case w.next >= b.end(): // it has them, from a tracker that sent them twice
		case w.next != b.first:
			if c.offer(lagged(s.id, b.end())) {
				w.next = b.end()
			}
		case c.offer(b):
			w.next = b.end()
		}
	}
}

func (h *hubState) report(c *conn, r report, m message) {
	s := h.recorded[c]
	if s == nil {
		h.budget.give(r.room)
		c.offer(errorMessage("no_session", "this connection records no session"))
		return
	}
	if h.full(s, len(r.data)) {
		h.budget.give(r.room)
		return
	}
	r.id = s.now.errors
	s.now.errors++
	s.now.raw += int64(len(r.data))
	s.reports = append(s.reports, r)
	h.pendingBytes += r.room
	h.enqueue(s)
	if m != nil {
		h.toWatchers(s.id, m)
	}
}

// Viewers.

func (h *hubState) toViewers(m message) {
	for c := range h.viewers {
		c.offer(m)
	}
}

func (h *hubState) tellEnded(id string) {
	m := sessionEnded(id)
	for c, watching := range h.viewers {
		if w := watching[id]; c.offer(m) && w != nil {
			w.live = false
		}
	}
}

func (h *hubState) toWatchers(id string, m message) {
	for c := range h.watchers[id] {
		c.offer(m)
	}
}

func (h *hubState) join(cmd join) bool {
	watching := h.viewers[cmd.c]
	if watching == nil {
		return true // it left
	}
	s := h.sessions[cmd.id]
	var m joined
	switch {
	case s != nil:
		m.summary = s.summary()
	case cmd.stored != nil:
		m.summary = *cmd.stored
	default:
		return false
	}
	w := &watch{next: m.now.events, end: m.now.events, live: m.isActive}
	if !cmd.c.offer(m) {
		w.owed = &m.summary
	}
	watching[cmd.id] = w
	if h.watchers[cmd.id] == nil {
		h.watchers[cmd.id] = map[*conn]*watch{}
	}
	h.watchers[cmd.id][cmd.c] = w
	if s != nil && !s.ended {
		h.wantSnapshot(s)
	}
	return true
}

func (h *hubState) unwatch(c *conn, id string) {
	delete(h.viewers[c], id)
	delete(h.watchers[id], c)
	if len(h.watchers[id]) == 0 {
		delete(h.watchers, id)
	}
}

// wantSnapshot asks the tracker for a full snapshot when the newest is old, so
// that whoever has just joined need not replay a long way.
func (h *hubState) wantSnapshot(s *session) {
	now := time.Now()
	if s.tracker == nil || now.Sub(s.asked) < snapshotPause || s.now.snapshot >= 0 && now.Sub(s.snapshotAt) < snapshotAge {
		return
	}
	s.asked = now
	s.tracker.offer(takeSnapshot(s.id))
}

// catchUp tells a viewer that has read its full outbox what it has missed.
func (h *hubState) catchUp(c *conn) {
	watching, ok := h.viewers[c]
	if !ok {
		return
	}
	c.offer(activeSessions(h.summaries()))
	for id, w := range watching {
		s := h.sessions[id]
		if w.owed != nil {
			if s != nil {
				*w.owed = s.summary()
			}
			if !c.offer(joined{*w.owed}) {
				continue
			}
			w.next, w.owed = w.owed.now.events, nil
		}
		if w.next < w.end && c.offer(lagged(id, w.end)) {
			w.next = w.end
		}
		if w.live && (s == nil || s.ended) && c.offer(sessionEnded(id)) {
			w.live = false
		}
	}
}

// Storing.

// enqueue puts the session in the queue for the writer, unless it is there, or
// with the writer, or waits to be tried again. One that does not wait for its
// interval goes first.
func (h *hubState) enqueue(s *session) {
	_, waits := h.retry[s]
	if s.writing || waits || !s.dirty() {
		return
	}
	if s.queued && s.hurries() {
		h.queue = slices.DeleteFunc(h.queue, func(q *session) bool { return q == s })
		s.queued = false
	}
	switch {
	case s.queued:
		return
	case s.hurries():
		h.queue = slices.Insert(h.queue, 0, s)
	default:
		h.queue = append(h.queue, s)
	}
	s.queued, s.since = true, time.Now()
}

// dispatch gives the free writers their batches when it is time, and says true
// when the hub is drained and nothing is left to do.
func (h *hubState) dispatch() bool {
	for len(h.writers) > 0 && h.due() {
		work := h.group()
		if len(work) == 0 {
			continue // the sessions were lost meanwhile
		}
		h.inFlight += len(work)
		h.writers[0] <- work
		h.writers = h.writers[1:]
	}
	return h.draining && len(h.queue) == 0 && h.inFlight == 0 && len(h.retry) == 0
}

func (h *hubState) due() bool {
	return len(h.queue) > 0 && (h.pressed() || h.queue[0].hurries() || time.Since(h.queue[0].since) >= h.cfg.batchInterval)
}

// pressed says whether there is so much to store that it does not wait for its
// interval.
func (h *hubState) pressed() bool {
	return h.draining || len(h.queue) >= h.cfg.batchSize || h.pendingBytes >= flushBytes
}

// group takes up to batchSize sessions from the queue and makes their flushes.
func (h *hubState) group() (work []*flush) {
	n, bytes, calm := 0, int64(0), h.inFlight == 0 // until compressing well takes longer than the batches are apart
	for n < len(h.queue) && len(work) < h.cfg.batchSize && bytes < maxFlushBytes {
		s := h.queue[n]
		again := s.flush != nil && s.flush.attempts > 0
		if len(work) > 0 && again != (work[0].attempts > 0) {
			break // who failed before does not hold up the others again
		}
		n++
		s.queued = false
		if h.sessions[s.id] != s {
			continue
		}
		if s.flush == nil {
			s.flush = h.newFlush(s)
			s.flush.calm = calm
		}
		f := s.flush
		f.epoch, f.ended, f.endedAt = s.epoch, s.ended && len(s.pending) == 0 && len(s.reports) == 0, s.endedAt
		s.writing = true
		bytes += f.room()
		work = append(work, f)
	}
	h.queue = slices.Delete(h.queue, 0, n)
	return work
}

// newFlush makes what is pending of a session, up to a bound, a flush.
func (h *hubState) newFlush(s *session) *flush {
	f := &flush{session: s.id, after: s.durable}
	m := min(len(s.reports), maxFlushReports)
	f.reports = s.reports[:m:m]
	for _, r := range f.reports {
		f.after.errors++
		f.after.raw += int64(len(r.data))
		f.after.stored += int64(len(r.data))
	}
	n, bytes := 0, int64(0)
	for ; n < len(s.pending) && bytes < maxFlushBytes; n++ {
		f.after.add(s.pending[n])
		bytes += s.pending[n].room
	}
	f.batches = s.pending[:n:n]
	s.pending, s.reports = slices.Clone(s.pending[n:]), slices.Clone(s.reports[m:])
	h.pendingBytes -= f.room()
	return f
}

// settle takes back a flush that the writer has tried to store.
func (h *hubState) settle(f *flush) {
	s := h.sessions[f.session]
	if s == nil || s.flush != f {
		h.budget.give(f.room())
		return
	}
	s.writing = false
	switch {
	case f.outcome == stored:
		h.committed(s, f)
	case f.outcome == failed, f.outcome == overtaken && f.epoch == s.epoch && !s.doubted:
		s.doubted = f.outcome == overtaken // or a claim of our own is on its way to the hub: once more
		f.attempts++
		s.retryAt = time.Now().Add(min(maxPause, 50*time.Millisecond<<min(f.attempts, 10)))
		h.retry[s] = struct{}{}
	case f.outcome != refused && f.epoch < s.epoch:
		h.enqueue(s) // its own tracker came back and raised the epoch: once more
	default:
		h.lose(s, f.outcome)
	}
}

// committed keeps what is stored as the session's tail and acks it.
func (h *hubState) committed(s *session, f *flush) {
	s.durable, s.flush, s.doubted = f.after, nil, false
	for _, r := range f.reports {
		h.budget.give(r.room)
	}
	h.ack(s)
	if s.ended && f.ended && f.epoch == s.epoch {
		for _, b := range f.batches {
			h.budget.give(b.room)
		}
		h.remove(s)
		return
	}
	for _, b := range f.batches {
		b.kept = h.tail.PushBack(s)
		s.tail = append(s.tail, b)
		h.tailBytes += b.room
	}
	h.trimAll(s)
	h.enqueue(s)
}

func (h *hubState) ack(s *session) {
	if s.hears != nil && s.durable.seq > 0 {
		s.hears.ack(s.id, s.durable.seq)
	}
}

// trimAll keeps memory within its bounds after s has grown: past maxEvents the
// older half of the session goes, past maxTailBytes what is oldest anywhere.
func (h *hubState) trimAll(s *session) {
	if s.now.events-s.oldest() > h.cfg.maxEvents {
		n := sort.Search(len(s.tail), func(i int) bool { return s.now.events-s.tail[i].first <= h.cfg.maxEvents/2 })
		h.trim(s, n)
	}
	for h.tailBytes > h.cfg.maxTailBytes {
		h.trim(h.tail.Front().Value.(*session), 1)
	}
}

// trim drops the n oldest batches of a session's tail.
func (h *hubState) trim(s *session, n int) {
	for _, b := range s.tail[:n] {
		h.tail.Remove(b.kept)
		h.tailBytes -= b.room
		h.budget.give(b.room)
	}
	s.tail = slices.Delete(s.tail, 0, n)
}

// What others may see.

func (h *hubState) find(cmd find) found {
	s := h.sessions[cmd.id]
	if s == nil || s.doubted || s.tracker == nil && !s.dirty() {
		return found{} // the database has all of it, and more when another server has taken it over
	}
	return found{true, s.summary(), s.memory(cmd.from, cmd.to)}
}

// summaries gives the live sessions.
func (h *hubState) summaries() []summary {
	var all []summary
	for _, s := range h.sessions {
		if !s.ended {
			all = append(all, s.summary())
		}
	}
	return all
}

func (h *hubState) stats() hubStats {
	st := hubStats{sessions: len(h.sessions), trackers: h.trackers, viewers: len(h.viewers), tailBytes: h.tailBytes}
	now := time.Now()
	for _, s := range h.sessions {
		st.events += s.now.events
		if !s.ended {
			st.live++
		}
		if waiting := s.memory(s.durable.events, s.now.events); len(waiting) > 0 {
			st.oldest = max(st.oldest, now.Sub(waiting[0].received))
		}
	}
	return st
}
