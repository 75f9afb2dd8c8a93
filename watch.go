package main

import (
	"maps"
	"slices"
	"time"
)

// The hub's viewers. All that the hub tells them unasked goes through tell: a viewer that has no
// room is lagging, is sent nothing more until it has read what it has, and is then told what it
// missed.

// watch is a viewer's interest in a session.
type watch struct {
	// next is behind end while the viewer had no room. Both are numbers of events.
	next int64 // the first event that the viewer has neither been sent nor told to page for
	end  int64 // one past the newest event that was published
	live bool  // the viewer takes the session for live
	owed bool  // it had no room for session_ended

	state string // of the session, as the viewer was told
}

const (
	snapshotAge   = 30 * time.Second // then the newest full snapshot is old: see wantSnapshot
	snapshotPause = 5 * time.Second  // between two requests for one
)

// share is how many bytes may wait for each viewer: all together may hold
// outgoingBytes, and none so much that it would never catch up.
func (h *hubState) share() int {
	return min(4<<20, int(outgoingBytes(h.cfg))/max(1, len(h.viewers)))
}

// outgoingBytes is what viewers' messages may take in memory. Answers to requests may
// take as much again.
func outgoingBytes(cfg config) int64 { return max(int64(cfg.maxBufferBytes)/4, outgoingMin) }

// outgoingMin lets one page be made: page.grow takes 2 * pageBytes, half of a budget at most.
const outgoingMin = 4 * pageBytes

// tell sends a viewer a message, and reports whether the viewer had room.
func (h *hubState) tell(out *outbox, m message) bool {
	if !h.lagging[out] && !out.trySend(m, h.share()) {
		h.lagging[out] = true
		h.metrics.viewersLagged.Add(1)
	}
	return !h.lagging[out]
}

// toViewers tells all who are connected. Those who have no room get the list later.
func (h *hubState) toViewers(m message) {
	for out := range h.viewers {
		h.tell(out, m)
	}
}

// toWatchers tells those who have joined the session. What they have no room for is not made up for.
func (h *hubState) toWatchers(id string, m message) {
	for out := range h.watchers[id] {
		h.tell(out, m)
	}
}

// tellState tells those who watch the session whether its page is there.
func (h *hubState) tellState(s *session) {
	for out, w := range h.watchers[s.id] {
		h.tellStateTo(out, s.id, w, s.state())
	}
}

// tellStateTo leaves w.state as it was for a viewer without room: catchUp sees the difference. An
// ended session, whose state is empty, is told of by session_ended.
func (h *hubState) tellStateTo(out *outbox, id string, w *watch, state string) {
	if state != "" && h.tell(out, sessionState(id, state)) {
		w.state = state
	}
}

// states gives the states of sessions that are in memory: of those with these ids
// or, with nil, of all.
func (h *hubState) states(ids []string) map[string]string {
	if ids == nil {
		ids = slices.Collect(maps.Keys(h.sessions))
	}
	states := map[string]string{}
	for _, id := range ids {
		if s := h.sessions[id]; s != nil {
			states[id] = s.state()
		}
	}
	return states
}

// tellEnded tells all viewers. Those who watch the session are owed it when they have no room.
func (h *hubState) tellEnded(id string) {
	m := sessionEnded(id)
	for out, watching := range h.viewers {
		told := h.tell(out, m)
		if w := watching[id]; w != nil {
			w.live, w.owed = false, !told
		}
	}
}

// fanOut sends a batch to those who watch the session. A viewer whose next event is
// not the batch's first is told to page.
func (h *hubState) fanOut(s *session, b *batch) {
	for out, w := range h.watchers[s.id] {
		w.end, w.live, w.owed = b.end(), true, false
		switch {
		case w.next >= b.end(): // the viewer has them, from a tracker that sent them twice
		case w.next != b.first:
			h.tellLagged(out, s.id, w)
		case h.tell(out, b):
			w.next = b.end()
		}
	}
}

// tellLagged tells the viewer to page up to w.end. One without room is told by catchUp.
func (h *hubState) tellLagged(out *outbox, id string, w *watch) {
	if h.tell(out, lagged(id, w.end)) {
		w.next = w.end
	}
}

// catchUp tells a viewer that was lagging what it has missed. The list comes last
// and takes the room that is left: otherwise a long one would leave none for the
// rest, time and again.
func (h *hubState) catchUp(out *outbox) {
	for id, w := range h.viewers[out] {
		if w.next < w.end {
			h.tellLagged(out, id, w)
		}
		s := h.sessions[id]
		if w.owed && (s == nil || s.ended) && h.tell(out, sessionEnded(id)) {
			w.owed = false
		}
		if s != nil && s.state() != w.state {
			h.tellStateTo(out, id, w, s.state())
		}
	}
	h.tell(out, activeSessions(h.live(h.share()-out.held())))
}

// join puts the answer into the outbox before any live batch: the viewer's place is the number of
// events that the answer has.
func (h *hubState) join(cmd join) bool {
	watching := h.viewers[cmd.out]
	if watching == nil {
		return true // the viewer has left
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
	cmd.out.send(m)
	w := &watch{next: m.now.events, end: m.now.events, live: m.isActive, state: m.state}
	watching[cmd.id] = w
	if h.watchers[cmd.id] == nil {
		h.watchers[cmd.id] = map[*outbox]*watch{}
	}
	h.watchers[cmd.id][cmd.out] = w
	if s != nil && !s.ended {
		h.wantSnapshot(s)
	}
	return true
}

// unwatch does nothing for a session that the viewer does not watch.
func (h *hubState) unwatch(out *outbox, id string) {
	delete(h.viewers[out], id)
	delete(h.watchers[id], out)
	if len(h.watchers[id]) == 0 {
		delete(h.watchers, id)
	}
}

// resetWatchers has those who watch a deleted session begin anew: one that comes
// under the same id has none of the events that they have seen.
func (h *hubState) resetWatchers(id string) {
	for _, w := range h.watchers[id] {
		w.next, w.end = 0, 0
	}
}

// wantSnapshot asks the tracker for a full snapshot when the newest is old, so
// that a viewer who has just joined need not replay a long way.
func (h *hubState) wantSnapshot(s *session) {
	now := time.Now()
	fresh := s.now.snapshot >= 0 && now.Sub(s.snapshotAt) < snapshotAge
	if s.tracker == nil || s.shared || fresh || now.Sub(s.snapshotAskedAt) < snapshotPause {
		return
	}
	s.snapshotAskedAt = now
	s.tracker.trySend(takeSnapshot(s.id), trackerOutbox)
}
