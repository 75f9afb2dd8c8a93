package main

import (
	"slices"
	"sort"
	"time"
)

// The hub's way to the writers and back: sessions with something to store stand
// in a queue, writers that are free are given flushes of some of them, and a
// flush that comes back is acked, tried again, or the end of its session.

const (
	flushBytes = 4 << 20 // when this much is pending, a transaction starts at once
	// In bytes of the budget. A transaction that has this many takes no further session.
	maxFlushBytes   = 8 << 20 // a session's part of a transaction ends when it has this many
	maxFlushReports = 500
	maxPause        = 2 * time.Second // between two attempts
)

// enqueue puts the session in the queue, unless it is there, or a writer has it,
// or it waits to be tried again.
func (h *hubState) enqueue(s *session) {
	switch {
	case s.writing || h.retry[s] || !s.dirty():
	case s.hurries() && !s.urgent:
		s.urgent = true
		h.urgent = append(h.urgent, s)
	case !s.hurries() && s.queued.IsZero():
		s.queued = time.Now()
		h.queue = append(h.queue, s)
	}
}

// dispatch gives the free writers their work when it is time. It reports true
// when the hub is drained and nothing is left to do.
func (h *hubState) dispatch() (finished bool) {
	for len(h.writers) > 0 && h.due() {
		work := h.nextFlushes()
		if len(work) == 0 {
			continue // those sessions were stored or forgotten meanwhile
		}
		h.inFlight += len(work)
		h.writers[0] <- work
		h.writers = h.writers[1:]
	}
	return h.draining && len(h.queue)+len(h.urgent)+len(h.retry)+h.inFlight == 0
}

// due reports whether there is something to do for a free writer.
func (h *hubState) due() bool { return len(h.urgent) > 0 || h.queueDue() }

// queueDue reports whether the oldest has waited for BATCH_INTERVAL, or need not wait.
func (h *hubState) queueDue() bool {
	return len(h.queue) > 0 && (h.overThreshold() || time.Since(h.queue[0].queued) >= h.cfg.batchInterval)
}

// overThreshold reports whether there is so much to store that it does not wait, or the hub drains.
func (h *hubState) overThreshold() bool {
	return h.draining || len(h.queue) >= h.cfg.batchSize || h.pendingBytes >= flushBytes
}

// nextFlushes makes the flushes of up to batchSize sessions, for one transaction.
// Those that are watched elsewhere take no others along: they come so often that
// the chunks of all would be small.
func (h *hubState) nextFlushes() (work []*flush) {
	// along: sessions that have time left are stored with those that have not.
	bytes, along := int64(0), h.queueDue()
	for len(work) < h.cfg.batchSize && bytes < maxFlushBytes && (len(h.urgent) > 0 || along && len(h.queue) > 0) {
		queue := &h.urgent
		if len(h.urgent) == 0 {
			queue = &h.queue
		}
		s := (*queue)[0]
		if len(work) > 0 && s.failedBefore() != (work[0].attempts > 0) {
			break // a transaction that may fail again is not shared with others
		}
		(*queue)[0] = nil
		*queue = (*queue)[1:]
		if queue == &h.urgent {
			s.urgent = false
		} else {
			s.queued = time.Time{}
		}
		if s.writing || !s.dirty() || h.sessions[s.id] != s || h.retry[s] {
			continue
		}
		f := h.startFlush(s)
		along = along || !h.marks[s.id]
		bytes += f.cost()
		work = append(work, f)
	}
	return work
}

// failedBefore reports whether a flush of the session is to be tried again.
func (s *session) failedBefore() bool { return s.flush != nil && s.flush.attempts > 0 }

// startFlush gives a writer what is to be stored of a session: the flush that
// failed, or a new one.
func (h *hubState) startFlush(s *session) *flush {
	if s.flush == nil {
		s.flush = h.newFlush(s)
	}
	f := s.flush
	f.epoch, f.ended = s.epoch, s.ended && len(s.pending) == 0
	s.writing = true
	return f
}

// newFlush makes a flush of what a session has pending, up to a bound. Its totals lack the bytes of
// the chunks, which are not made yet.
func (h *hubState) newFlush(s *session) *flush {
	f := &flush{session: s.id, totals: s.durable}
	n, bytes, reports := 0, int64(0), 0
	for ; n < len(s.pending) && bytes < maxFlushBytes && reports < maxFlushReports; n++ {
		b := s.pending[n]
		f.totals.add(b)
		bytes += b.cost
		if b.report != nil {
			reports++
		}
	}
	// What is left gets an array of its own: the old one would keep the flush's batches in memory.
	f.batches = s.pending[:n:n]
	s.pending, s.hurry = slices.Clone(s.pending[n:]), s.hurry && n < len(s.pending)
	h.pendingBytes -= bytes
	return f
}

// settle takes back a flush that a writer has tried to store. A row with a newer
// epoch means that another server has the session, unless one of our own
// trackers is about to attach its claim, or has: then the flush is tried again,
// under the new epoch.
func (h *hubState) settle(f *flush) {
	s := h.sessions[f.session]
	if s == nil || s.flush != f {
		h.budget.give(f.cost()) // the session was discarded meanwhile
		return
	}
	s.writing = false
	switch {
	case f.outcome == stored:
		h.committed(s, f)
	case f.outcome == failed, f.outcome == epochLost && h.claiming[s.id] > 0:
		h.keepChunks(f)
		f.attempts++
		s.retryAt = time.Now().Add(min(maxPause, 50*time.Millisecond<<min(f.attempts, 10)))
		h.retry[s] = true
	case f.outcome == epochLost && f.epoch < s.epoch:
		h.enqueue(s)
	default:
		h.abandon(s, f.outcome)
	}
}

// keepChunks counts the chunks of a flush that is to be tried again: until then its
// events are in memory twice, as batches and as chunks.
func (h *hubState) keepChunks(f *flush) {
	var size int64
	for _, c := range f.chunks {
		size += int64(cap(c.events))
	}
	h.budget.force(size - f.kept)
	f.kept = size
}

// committed acks what is stored and keeps it as the session's tail; with a flush that has ended its
// row the session leaves memory.
func (h *hubState) committed(s *session, f *flush) {
	s.durable, s.flush = f.totals, nil
	s.ack(s.ackTo)
	s.answer(false)
	if s.ended && f.ended && f.epoch == s.epoch {
		h.budget.give(f.cost())
		h.forget(s)
		return
	}
	h.budget.give(f.kept)
	for _, b := range f.batches {
		if b.report != nil {
			h.budget.give(b.cost)
			continue
		}
		s.tail = append(s.tail, b)
		h.tailBytes += b.cost
	}
	h.trimTails(s)
	h.enqueue(s)
}

// ack tells a connection what is committed, which may be less than it has sent. out may be nil.
func (s *session) ack(out *outbox) {
	if out != nil && s.durable.seq > 0 {
		out.ack(s.id, s.durable.seq)
	}
}

// trimTails keeps memory within its bounds after s has grown: past maxEvents the
// older half of its events goes, past a quarter of the budget the older half of any tail.
func (h *hubState) trimTails(s *session) {
	if most := int64(h.cfg.maxEvents); s.now.events-s.oldest() > most {
		h.trim(s, sort.Search(len(s.tail), func(i int) bool { return s.now.events-s.tail[i].first <= most/2 }))
	}
	for maxTailBytes := int64(h.cfg.maxBufferBytes) / 4; h.tailBytes > maxTailBytes; {
		for _, other := range h.sessions {
			if h.trim(other, (len(other.tail)+1)/2); h.tailBytes <= maxTailBytes {
				break
			}
		}
	}
}

// trim drops the n oldest batches of a session's tail, and gives their room back.
func (h *hubState) trim(s *session, n int) {
	var bytes int64
	for _, b := range s.tail[:n] {
		bytes += b.cost
	}
	s.tail = slices.Delete(s.tail, 0, n)
	h.tailBytes -= bytes
	h.budget.give(bytes)
}
