package main

// The hub against a model of all that is around it: the database, trackers that
// number their batches, writers whose commits fail in every way, another server.
// Random steps, drawn from a seed, bring about the orders of events that nobody
// thinks of. Whatever happens, what is acked is stored, every event is stored
// once and unchanged, nobody loses a session without a reason, and at the end
// nothing stays in memory.

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	modelSeeds = 500 // 1 and up, in each run
	newSeeds   = 20  // others, drawn anew in each run
	onlySeed   = 0   // one to repeat alone, 0 for all

	modelLength = 150 // steps
	perBatch    = 2   // events
)

// modelSteps are the kinds of steps, and how often each is drawn. A step says
// what it did, or nothing when it found nothing to do.
var modelSteps = []struct {
	weight int
	do     func(*model) string
}{
	{30, (*model).send},
	{30, (*model).wait},
	{12, (*model).claim},
	{2, (*model).abandon},
	{18, (*model).attach},
	{4, (*model).leave},
	{6, (*model).end},
	{3, (*model).elsewhere},
	{1, (*model).remove},
	{10, (*model).take},
	{8, (*model).commit},
	{2, (*model).answerLost},
	{2, (*model).giveUp},
	{1, (*model).refuse},
	{14, (*model).answer},
	{1, (*model).zombie},
}

func TestModel(t *testing.T) {
	t.Parallel()
	var seeds []uint64
	for i := range modelSeeds {
		seeds = append(seeds, uint64(i+1))
	}
	for range newSeeds {
		seeds = append(seeds, rand.Uint64())
	}
	if onlySeed != 0 { // often: the hub walks over maps, in any order
		seeds = slices.Repeat([]uint64{onlySeed}, 200)
	}
	for _, seed := range seeds {
		playModel(t, seed)
	}
}

func playModel(t *testing.T, seed uint64) {
	m := &model{r: rand.New(rand.NewPCG(seed, 0)), trackers: []*modelTracker{{}, {}, {}},
		rows: map[string]*modelRow{}, users: map[*outbox]*modelTracker{}}
	defer func() {
		if t.Failed() {
			t.Logf("seed %d (onlySeed repeats it), the last steps:\n\t%s", seed,
				strings.Join(m.did[max(0, len(m.did)-25):], "\n\t"))
		}
	}()
	inHub(t, func(c *config) {
		c.batchSize, c.batchInterval, c.grace, c.maxEvents = 3, time.Second, 3*time.Second, 10
	}, func(t *hubTest) {
		m.t = t
		m.play()
	})
}

// model is what is around a hub.
type model struct {
	t        *hubTest
	r        *rand.Rand
	rows     map[string]*modelRow // the database: sessions
	trackers []*modelTracker
	users    map[*outbox]*modelTracker // the open connections, and whose each is now
	claims   []modelClaim
	writers  [][]*flush // what each has
	answers  [][]*flush // tried, and on their way back to the hub
	zombies  []flush    // given up, and perhaps carried out later
	made     int        // sessions
	did      []string   // the steps
}

// modelRow is a session in the database. An event there is its number, counted
// from 1, as its tracker gave it.
type modelRow struct {
	epoch int64
	counters
	active bool
	chunks map[int64]modelChunk // by first index
}

type modelChunk struct {
	events []int64
	raw    int64
}

// modelTracker records one session after another, over one connection after
// another.
type modelTracker struct {
	id        string
	out       *outbox // that is attached, nil when none is
	epoch     int64   // since the attach
	recording bool    // not while it claims anew, nor after the end
	seq       int64   // of the last batch it sent
}

// modelClaim is reserved in the hub, then made in the database, then on its way to
// the hub.
type modelClaim struct {
	tr   *modelTracker
	out  *outbox
	id   string
	made bool
	claim
}

// play draws steps until one shows a fault, and ends in quiet.
func (m *model) play() {
	var kinds []func(*model) string
	for _, step := range modelSteps {
		kinds = append(kinds, slices.Repeat([]func(*model) string{step.do}, step.weight)...)
	}
	for n := 0; n < modelLength && !m.t.Failed(); n++ {
		m.note(pick(m, kinds)(m))
		m.listen()
	}
	if !m.t.Failed() {
		m.quiet()
	}
	if m.t.Failed() {
		m.t.stop()
		<-m.t.done
		m.t.budget.free = testBudget // it gives nothing back any more
	}
}

func (m *model) note(did string) {
	if did != "" {
		m.did = append(m.did, did)
	}
}

func pick[T any](m *model, from []T) T { return from[m.r.IntN(len(from))] }

// draw takes one out at random.
func draw[T any](m *model, from *[]T) (one T, ok bool) {
	if len(*from) == 0 {
		return one, false
	}
	i := m.r.IntN(len(*from))
	one = (*from)[i]
	*from = slices.Delete(*from, i, i+1)
	return one, true
}

// ---- trackers ----

func (m *model) send() string {
	tr := pick(m, m.trackers)
	if !tr.recording {
		return ""
	}
	tr.seq++
	var events []string
	for i := range int64(perBatch) {
		events = append(events, fmt.Sprintf(`{"type":3,"timestamp":%d}`, (tr.seq-1)*perBatch+i+1))
	}
	m.t.do(publish{tr.out, "", m.t.batchOf(tr.id, tr.seq, events...), nil})
	if m.r.IntN(5) == 0 {
		m.t.report(tr.out, "error")
	}
	return fmt.Sprintf("%s: sends batch %d", tr.id, tr.seq)
}

func (m *model) wait() string {
	d := time.Duration(m.r.IntN(1500)) * time.Millisecond
	time.Sleep(d)
	return fmt.Sprintf("%v pass", d)
}

// claim makes a tracker reserve its session, or a new one, over its own
// connection, a new one, or that of another tracker, whose session it ends.
func (m *model) claim() string {
	tr, out := pick(m, m.trackers), (*outbox)(nil)
	other := pick(m, m.trackers)
	switch m.r.IntN(9) {
	case 0:
		out = m.t.idle()
	case 1, 2:
		if out = other.out; other != tr && out != nil && !m.claiming(out) {
			m.t.do(finish{out})
			other.out, other.recording = nil, false
		}
	default:
		out = tr.out
	}
	if out == nil {
		out = m.t.idle()
	}
	if m.claiming(out) {
		return "" // its reader waits
	}
	if tr.id == "" {
		m.made++
		tr.id = fmt.Sprint("s", m.made)
	}
	if got := m.t.reserve(out, tr.id, true, 0); got != granted {
		m.t.Errorf("%s: reserve: got %d", tr.id, got)
	}
	m.users[out] = tr
	m.claims = append(m.claims, modelClaim{tr: tr, out: out, id: tr.id})
	if out == tr.out {
		tr.recording = false
	}
	return fmt.Sprintf("%s: is reserved on %p", tr.id, out)
}

func (m *model) claiming(out *outbox) bool {
	return slices.ContainsFunc(m.claims, func(k modelClaim) bool { return k.out == out })
}

// raise is a claim in the database, by the session's token if it has a row.
func (m *model) raise(id string) (k claim, ok bool) {
	row, known := m.rows[id]
	if row == nil && known {
		return k, false // it was deleted
	}
	if row == nil {
		row = &modelRow{epoch: 1000, counters: counters{snapshot: -1}, chunks: map[int64]modelChunk{}}
		m.rows[id] = row
	}
	row.epoch++
	row.active = true
	return claim{epoch: row.epoch, counters: row.counters}, true
}

// abandon closes a connection before its claim comes to the hub.
func (m *model) abandon() string {
	if len(m.claims) == 0 {
		return ""
	}
	k := pick(m, m.claims)
	m.close(k.out)
	return fmt.Sprintf("%s: claim of epoch %d dies", k.id, k.epoch)
}

// attach makes some claim in the database, or brings one that is made to the hub;
// of two the newer one may come first.
func (m *model) attach() string {
	k, ok := draw(m, &m.claims)
	if !ok {
		return ""
	}
	if !k.made {
		if k.claim, k.made = m.raise(k.id); k.made {
			m.claims = append(m.claims, k)
			return fmt.Sprintf("%s: is claimed, epoch %d, seq %d", k.id, k.epoch, k.seq)
		}
		m.t.do(unreserve{k.id, aboutNobody.cost()})
		if k.tr.id == k.id {
			k.tr.id, k.tr.out, k.tr.recording = "", nil, false
		}
		return k.id + ": is not there any more"
	}
	at, tr := m.t.attachAs(k.out, k.id, k.claim, aboutNobody), k.tr
	if !at.outdated && k.id == tr.id {
		tr.out, tr.epoch, tr.recording, tr.seq = k.out, k.epoch, true, at.accepted
		m.acked(k.id, at.stored)
	} else {
		m.close(k.out) // it came too late, or the tracker has another session by now
	}
	return fmt.Sprintf("%s: epoch %d is attached on %p: %+v", k.id, k.epoch, k.out, at)
}

func (m *model) leave() string {
	tr := pick(m, m.trackers)
	if tr.out == nil || m.claiming(tr.out) {
		return ""
	}
	m.close(tr.out)
	return tr.id + ": its tracker leaves"
}

// close ends a connection, and what hangs on it. The answer to a claim may have
// been lost: it was made, and comes to nothing.
func (m *model) close(out *outbox) {
	for _, k := range m.claims {
		if k.out == out {
			m.t.do(unreserve{k.id, aboutNobody.cost()})
		}
	}
	m.claims = slices.DeleteFunc(m.claims, func(k modelClaim) bool { return k.out == out })
	m.t.do(leave{out})
	delete(m.users, out)
	for _, tr := range m.trackers {
		if tr.out == out {
			tr.out, tr.recording = nil, false
		}
	}
}

func (m *model) end() string {
	tr := pick(m, m.trackers)
	if !tr.recording {
		return ""
	}
	m.t.do(finish{tr.out})
	tr.recording = false
	return tr.id + ": ends"
}

// listen reads what the hub has sent to each connection.
func (m *model) listen() {
	for out, tr := range maps.Clone(m.users) {
		for _, text := range m.t.messages(out) {
			var id string
			var n int64
			switch {
			case scan(text, "ack %s %d", &id, &n):
				m.acked(id, n)
			case scan(text, "close %d", &n):
				if row := m.rows[tr.id]; out == tr.out && tr.recording && row != nil && row.epoch == tr.epoch {
					m.t.Errorf("%s: its tracker is sent away with code %d, and nobody else has it", tr.id, n)
				}
				m.close(out)
			case text != "error session_deleted" && text != "error not_stored":
				m.t.Errorf("%s: its tracker is told %q", tr.id, text)
			case out == tr.out:
				tr.recording = false
			}
		}
	}
}

func scan(text, format string, into ...any) bool {
	n, _ := fmt.Sscanf(text, format, into...)
	return n == len(into)
}

// acked checks a promise to a tracker.
func (m *model) acked(id string, seq int64) {
	if row := m.rows[id]; row != nil && row.seq < seq {
		m.t.Errorf("%s: batch %d is acked, and %d is the last that is stored", id, seq, row.seq)
	}
}

// ---- the database ----

// elsewhere is another server that a tracker has gone to, which may have stored a
// batch.
func (m *model) elsewhere() string {
	tr := pick(m, m.trackers)
	row := m.rows[tr.id]
	if row == nil {
		return ""
	}
	k, _ := m.raise(tr.id)
	if m.r.IntN(2) == 0 {
		for range perBatch {
			row.chunks[row.events] = modelChunk{[]int64{row.events + 1}, 30}
			row.events++
			row.raw += 30
		}
		row.seq++
	}
	return fmt.Sprintf("%s: another server has it, epoch %d, seq %d", tr.id, k.epoch, row.seq)
}

// remove deletes a session, on this server or another.
func (m *model) remove() string {
	tr := pick(m, m.trackers)
	if m.rows[tr.id] == nil {
		return ""
	}
	if m.rows[tr.id] = nil; m.r.IntN(2) == 0 {
		return tr.id + ": is deleted on another server"
	}
	m.t.evict(tr.id)
	return tr.id + ": is deleted"
}

// store does with a flush what the statements in store.go do.
func (m *model) store(f *flush) outcome {
	row := m.rows[f.session]
	switch {
	case row == nil:
		return deleted
	case row.epoch != f.epoch:
		return epochLost
	}
	for i, b := range f.batches {
		first := f.batches[0].first
		chunk, there := row.chunks[first]
		if i == 0 && there {
			break
		}
		if b.report != nil {
			continue
		}
		for _, e := range b.events {
			chunk.events = append(chunk.events, e.time)
		}
		chunk.raw += int64(len(b.body))
		row.chunks[first] = chunk
	}
	defer m.complete(f.session)
	if row.events > f.totals.events || row.seq > f.totals.seq {
		return epochLost
	}
	row.counters, row.active = f.totals, !f.ended
	return stored
}

// complete checks that a session's chunks are its events, each once, and that its
// row adds up what it has.
func (m *model) complete(id string) {
	row := m.rows[id]
	var all []int64
	raw := 2 * row.errors // each is {}
	for _, first := range slices.Sorted(maps.Keys(row.chunks)) {
		if first != int64(len(all)) {
			m.t.Errorf("%s: a chunk starts at %d, the one before ends at %d", id, first, len(all))
		}
		all = append(all, row.chunks[first].events...)
		raw += row.chunks[first].raw
	}
	for i, e := range all {
		if e != int64(i+1) {
			m.t.Errorf("%s: event %d is the tracker's %dth", id, i, e)
		}
	}
	if n := int64(len(all)); row.events != n || row.seq*perBatch != n || row.raw != raw {
		m.t.Errorf("%s: the row says %+v, its chunks have %d events of %d bytes", id, row.counters, n, raw)
	}
}

// ---- writers ----

func (m *model) take() string {
	work, ok := m.t.take()
	if !ok {
		return ""
	}
	m.writers = append(m.writers, work)
	return fmt.Sprintf("%v: taken by a writer", sessionsOf(work))
}

func (m *model) commit() string { return m.try("committed", m.store) }

func (m *model) answerLost() string {
	return m.try("committed, the answer is lost", func(f *flush) outcome { m.store(f); return failed })
}

func (m *model) giveUp() string {
	return m.try("given up", func(f *flush) outcome { m.zombies = append(m.zombies, *f); return failed })
}

func (m *model) refuse() string {
	return m.try("refused", func(*flush) outcome { return refused })
}

// try makes some writer do with its work what it can.
func (m *model) try(how string, store func(*flush) outcome) string {
	work, ok := draw(m, &m.writers)
	if !ok {
		return ""
	}
	for _, f := range work {
		f.outcome = store(f)
		how += fmt.Sprintf(", %s epoch %d seq %d: outcome %d", f.session, f.epoch, f.totals.seq, f.outcome)
	}
	m.answers = append(m.answers, work)
	return how
}

// answer hands work back to the hub.
func (m *model) answer() string {
	work, ok := draw(m, &m.answers)
	if !ok {
		return ""
	}
	m.t.do(flushDone{work})
	return fmt.Sprintf("%v: handed back", sessionsOf(work))
}

// zombie is a transaction that PostgreSQL carries out when its writer has long
// given it up.
func (m *model) zombie() string {
	f, ok := draw(m, &m.zombies)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%s: epoch %d, seq %d is committed late: outcome %d", f.session, f.epoch, f.totals.seq,
		m.store(&f))
}

// quiet lets all leave and all be stored. Then what was sent last is stored too,
// unless its tracker knows better or another server has it, and memory is empty.
func (m *model) quiet() {
	for len(m.writers)+len(m.answers) > 0 {
		m.note(m.commit())
		m.note(m.answer())
	}
	m.listen()
	sent := map[*modelRow]modelTracker{}
	for _, tr := range m.trackers {
		if row := m.rows[tr.id]; row != nil && tr.recording && row.epoch == tr.epoch {
			sent[row] = *tr
		}
	}
	for out := range maps.Clone(m.users) {
		m.close(out)
	}
	for n := 0; n < 200 && m.t.stats().sessions > 0; n++ {
		time.Sleep(200 * time.Millisecond)
		if did := m.take(); did != "" {
			m.note(did)
			m.note(m.commit())
			m.note(m.answer())
		}
	}
	if st := m.t.stats(); st.sessions > 0 {
		m.t.Errorf("at the end %d sessions are in memory, %d of them live", st.sessions, st.live)
	}
	for row, tr := range sent {
		if row.seq != tr.seq || row.active {
			m.t.Errorf("%s: at the end batch %d of %d is the last that is stored, active is %v", tr.id, row.seq, tr.seq,
				row.active)
		}
	}
}
