package main

import "time"

// The hub and who records what: reserved, claimed in the database, attached; then
// detached, ended or abandoned.

// reserve keeps two trackers of this server apart before either has touched the row. The row
// decides between servers, and whether a token is right. A session's own tracker may reserve it
// again.
func (h *hubState) reserve(cmd reserve) reservation {
	s := h.sessions[cmd.id]
	switch {
	case cmd.share && s != nil && s.shared && s.tracker != nil && s.tracker != cmd.out:
		h.recorded[cmd.out] = s
		return joins
	case cmd.share && s != nil && !s.shared && s.tracker != nil && s.tracker != cmd.out:
		return alone
	case !cmd.byToken && (h.claiming[cmd.id] > 0 || s != nil && s.tracker != nil && s.tracker != cmd.out):
		return taken
	case h.aboutBytes+h.claimingBytes+cmd.cost-s.aboutCost() > int64(h.cfg.maxBufferBytes)/8:
		return noRoom
	}
	h.claiming[cmd.id]++
	h.claimingBytes += cmd.cost
	return granted
}

// aboutCost is what replacing the session's description would give back; s may be nil.
func (s *session) aboutCost() int64 {
	if s == nil {
		return 0
	}
	return s.about.cost()
}

// unreserve takes back one reservation. Others of the session, by its token, may stand.
func (h *hubState) unreserve(cmd unreserve) {
	if h.claiming[cmd.id]--; h.claiming[cmd.id] == 0 {
		delete(h.claiming, cmd.id)
	}
	h.claimingBytes -= cmd.cost
}

// attach gives a session to the tracker that has claimed it. Events in memory
// stay if the claim follows on ours. Otherwise another server had the session in
// between, and may have given the numbers of what is not committed here to other
// batches: trackers that number theirs send again what the row lacks.
func (h *hubState) attach(cmd attach) attached {
	h.unreserve(cmd.unreserve)
	s := h.sessions[cmd.id]
	switch {
	case s == nil:
		// As one that has ended: it starts below, as one that comes back does.
		s = &session{id: cmd.id, ended: true, now: cmd.claim.counters, durable: cmd.claim.counters}
		h.sessions[s.id] = s
		if s.now.events == 0 {
			h.resetWatchers(s.id) // they may know one that was deleted elsewhere
		}
	case cmd.claim.epoch < s.epoch:
		return attached{outdated: true}
	case cmd.claim.epoch != s.epoch+1:
		h.discard(s)
		s.now, s.durable = cmd.claim.counters, cmd.claim.counters
	}
	s.epoch, s.firstSeq, s.shared = cmd.claim.epoch, cmd.firstSeq, cmd.share
	h.describe(s, cmd.about)
	h.setTracker(s, cmd.out)
	if s.ended {
		s.ended = false
		h.metrics.sessionsStarted.Add(1)
		if h.foreign[s.id] == nil {
			h.toViewers(cmd.started)
		} else { // they know that it is live
			h.tellState(s)
		}
	}
	h.dropForeign(s.id)
	return attached{accepted: s.now.seq, stored: max(s.durable.seq, cmd.claim.seq)}
}

// describe replaces the description. Its room is forced: reserve has asked whether there is some.
func (h *hubState) describe(s *session, about *description) {
	more := about.cost() - s.about.cost()
	h.budget.force(more)
	h.aboutBytes += more
	s.about = about
}

// setTracker makes out the one tracker of the session, and the session the one
// that out records.
func (h *hubState) setTracker(s *session, out *outbox) {
	if old := s.tracker; old != nil && old != out {
		delete(h.recorded, old)
		old.closeAfterSending(closeTaken, "the session continues on another connection")
	}
	if h.recorded[out] != s {
		h.detach(out)
	}
	if s.tracker != out {
		s.hidden = false
	}
	h.recorded[out] = s
	s.tracker, s.ackTo = out, out
	delete(h.grace, s)
	h.tellState(s)
}

// detach takes its session from a tracker that has gone, or records another. The grace
// period begins, unless others record the session as well.
func (h *hubState) detach(out *outbox) {
	s := h.recorded[out]
	delete(h.recorded, out)
	if s == nil || s.tracker != out {
		return
	}
	s.tracker, s.detachedAt = nil, time.Now()
	// Another of those who share it is its tracker from now on.
	if others := h.trackersOf(s); len(others) > 0 {
		s.tracker = others[0]
		return
	}
	h.grace[s] = struct{}{}
	h.tellState(s)
}

// trackersOf gives all who record a session: it may be shared.
func (h *hubState) trackersOf(s *session) (all []*outbox) {
	if s.tracker != nil {
		all = append(all, s.tracker)
	}
	if !s.shared {
		return all
	}
	for out, theirs := range h.recorded {
		if theirs == s && out != s.tracker {
			all = append(all, out)
		}
	}
	return all
}

// end ends a session, unless it has ended: what is left of it is stored at once, then it leaves
// memory. Others who share it are told with their next batch.
func (h *hubState) end(s *session) {
	if s.ended {
		return
	}
	for _, out := range h.trackersOf(s) {
		delete(h.recorded, out)
	}
	delete(h.grace, s)
	s.ended, s.tracker = true, nil
	h.tellEnded(s.id)
	h.enqueue(s)
}

// abandon forgets a session of which nothing more can be stored. Its trackers are
// told why before their posts, which wait for a commit, are answered.
func (h *hubState) abandon(s *session, why outcome) {
	for _, out := range h.trackersOf(s) {
		delete(h.recorded, out)
		tellAbandoned(out, why)
	}
	h.discard(s)
	h.forget(s)
	if why == deleted {
		h.resetWatchers(s.id)
	}
	// When it had ended viewers know that; on another server it goes on for them.
	switch {
	case s.ended:
	case why == epochLost && (h.foreign[s.id] != nil || h.addForeign(s.summary(), time.Now())):
	default:
		h.tellEnded(s.id)
	}
	s.ended = true
}

// tellAbandoned tells one tracker. Only where its data was refused may the connection go on, with
// another session.
func tellAbandoned(out *outbox, why outcome) {
	switch why {
	case epochLost:
		out.closeAfterSending(closeTaken, "the session continues on another connection")
	case deleted:
		out.trySend(errorMessage("session_deleted", "the session was deleted"), trackerOutbox)
		out.closeAfterSending(closeDeleted, "the session was deleted")
	case refused:
		out.trySend(errorMessage("not_stored", "the database refused the session's data"), trackerOutbox)
	}
}

// discard drops the session's events from memory. When a writer hands back a flush
// of them, settle sees that it was dropped, and gives back its room.
func (h *hubState) discard(s *session) {
	for _, b := range s.pending {
		h.pendingBytes -= b.cost
		h.budget.give(b.cost)
	}
	if s.flush != nil && !s.writing {
		h.budget.give(s.flush.cost())
	}
	delete(h.retry, s)
	h.trim(s, len(s.tail))
	s.pending, s.flush, s.writing = nil, nil, false
	s.answer(true)
}

// forget takes a session out of memory. The queues may still hold it: nextFlushes passes over it.
func (h *hubState) forget(s *session) {
	s.answer(true)
	h.trim(s, len(s.tail))
	h.budget.give(s.about.cost())
	h.aboutBytes -= s.about.cost()
	delete(h.grace, s)
	delete(h.sessions, s.id)
}
