package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
)

// What a viewer may say, and pages of events.

// viewer is somebody who watches. One goroutine at a time calls handle.
type viewer struct {
	*core
	ctx context.Context // ends with its connection
	out *outbox

	opened func(id string) // is told which sessions the viewer joins or reads pages of
}

// handle does what a message asks.
func (v *viewer) handle(msg []byte) (kept int64, err error) {
	f, err := parseFrame(msg)
	if err != nil {
		return 0, &protocolError{"invalid_message", err.Error()}
	}
	switch f.typ {
	case "get_active_sessions":
		return 0, v.listSessions()
	case "viewer_join_session":
		return 0, v.joinSession(f)
	case "viewer_leave_session":
		return 0, v.leaveSession(f)
	case "get_session_events":
		return 0, v.sendPage(f)
	case "heartbeat":
		return 0, nil
	case "session_start", "events_batch", "session_end", "error", "javascript_error", "promise_rejection",
		"visibility_change":
		return 0, errForbidden
	}
	return 0, errUnknownType
}

// listSessions holds the list's room until it is sent: no further request is read before.
func (v *viewer) listSessions() error {
	reply := make(chan []summary, 1)
	live, _ := ask(v.hub, reply, liveQuery{reply})
	list := activeSessions(live)
	room := int64(list.size())
	if err := v.outgoing.take(v.ctx, room); err != nil {
		return err
	}
	defer v.outgoing.give(room)
	v.out.send(list)
	return v.out.wait(v.ctx)
}

// sessionRequest is the data of a viewer's messages.
type sessionRequest struct {
	ID        string `json:"sessionId"`
	FromIndex int64  `json:"fromIndex"`
	Limit     int64  `json:"limit"`
}

// parseRequest gives 0 for numbers that are missing. An id that no session can have is errNoSession.
func parseRequest(f frame) (sessionRequest, error) {
	var r sessionRequest
	if err := json.Unmarshal(f.data, &r); err != nil || r.FromIndex < 0 || r.Limit < 0 {
		return r, &protocolError{"invalid_message",
			`"data" must have a sessionId, and whole numbers from 0 as fromIndex and limit`}
	}
	if !validID(r.ID) {
		return r, errNoSession
	}
	return r, nil
}

// joinSession makes the viewer watch a session. One that is not in memory is
// looked up in the database, and the hub is asked again with what was found: the
// session may have come back meanwhile.
func (v *viewer) joinSession(f frame) error {
	r, err := parseRequest(f)
	if err != nil {
		return err
	}
	reply := make(chan bool, 1)
	if ok, _ := ask(v.hub, reply, join{v.out, r.ID, nil, reply}); ok {
		v.opened(r.ID)
		return nil
	}
	row, err := v.store.session(v.ctx, r.ID)
	if err != nil {
		return v.queryError(err)
	}
	ask(v.hub, reply, join{v.out, r.ID, &row.summary, reply})
	v.opened(r.ID)
	return nil
}

// queryError makes of the store's error what the viewer is told; the connection goes on.
func (v *viewer) queryError(err error) error {
	if errors.Is(err, errNotFound) {
		return errNoSession
	}
	if v.ctx.Err() == nil {
		v.log.Warn("question not answered", "err", err)
	}
	if errors.Is(err, errDamaged) {
		return &protocolError{"unavailable", errDamaged.Error()}
	}
	return &protocolError{"unavailable", "the database is away: try again"}
}

func (v *viewer) leaveSession(f frame) error {
	r, err := parseRequest(f)
	if err == nil {
		v.hub.send(unjoin{v.out, r.ID})
	}
	return err
}

// sendPage answers get_session_events, and holds the page's room until that is sent.
func (v *viewer) sendPage(f frame) error {
	r, err := parseRequest(f)
	if err != nil {
		return err
	}
	if r.Limit == 0 || r.Limit > maxPage {
		r.Limit = maxPage
	}
	start := `{"type":"session_events","data":{"sessionId":"` + r.ID + `","events":[`
	p, err := v.eventPage(v.ctx, r.ID, r.FromIndex, r.Limit, start)
	defer p.release()
	if err != nil {
		return v.queryError(err)
	}
	v.opened(r.ID)
	total := p.session.now.events
	v.out.send(text(fmt.Appendf(p.text, `],"fromIndex":%d,"totalEvents":%d,"hasMore":%t,"isActive":%t}}`,
		r.FromIndex, total, r.FromIndex+p.count < total, p.session.isActive)))
	return v.out.wait(v.ctx)
}

// page is some events of a session, in order.
type page struct {
	// As it was when the page was begun; now.events is the number of all its events.
	session summary
	text    []byte // what the caller began it with, and the events, with commas between them
	count   int64
	budget  *budget
	cost    int64 // taken from the budget
}

// add puts an event behind the others. more: the page has room for a next one.
func (p *page) add(event []byte) (more bool) {
	if p.count > 0 {
		p.text = append(p.text, ',')
	}
	p.text = append(p.text, event...)
	p.count++
	return len(p.text) < pageBytes
}

const pageEnd = 200 // bytes that a caller may add to a page's text

// grow takes room for a chunk of raw bytes of JSON, and for as many in the page, but for the room
// that the page has taken before: the largest chunk decides.
func (p *page) grow(ctx context.Context, raw int64) error {
	more := 2*raw - p.cost
	if more <= 0 {
		return nil
	}
	err := p.budget.grow(ctx, p, more)
	if err == nil {
		p.cost += more
	}
	return err
}

// shrink gives back the room for what the page was made of.
func (p *page) shrink() {
	if rest := p.cost - int64(cap(p.text)); rest > 0 {
		p.cost -= rest
		p.budget.finish(nil, rest, rest)
	}
}

// release gives all room back; the page's text must be sent by then.
func (p *page) release() { p.budget.finish(p, p.cost, p.cost) }

// eventPage gives the events of a session from one number on, at most limit and
// about pageBytes, also those not yet committed. Memory is asked first:
// everything before what it has was committed by then. The caller releases the
// page, also with an error, when its text is sent.
func (c *core) eventPage(ctx context.Context, id string, from, limit int64, start string) (*page, error) {
	p := &page{text: []byte(start), budget: c.outgoing}
	if err := p.grow(ctx, pageBytes); err != nil { // for a chunk, and for the text
		return p, err
	}
	reply := make(chan inMemory, 1)
	memory, ok := ask(c.hub, reply, memoryQuery{id, from, from + limit, reply})
	if !ok {
		return p, net.ErrClosed
	}
	p.session = memory.session
	if !memory.ok {
		row, err := c.store.session(ctx, id)
		if err != nil {
			return p, err
		}
		p.session = row.summary
	}
	to := min(from+limit, p.session.now.events)
	// What memory does not have, from `from` to here, is in the database.
	committed := to
	if len(memory.batches) > 0 {
		committed = min(to, memory.batches[0].first)
	}
	if from < committed {
		if err := c.store.events(ctx, id, from, committed, p.grow, p.add); err != nil {
			return p, err
		}
	}
	// Where the rows have filled the page, its end lies before the first batch, and none is added.
	for _, b := range memory.batches {
		for i := from + p.count; i >= b.first && i < min(to, b.end()) && len(p.text) < pageBytes; i++ {
			e := b.events[i-b.first]
			if err := p.grow(ctx, int64(len(p.text))+int64(e.end-e.start)); err != nil {
				return p, err
			}
			p.add(b.body[e.start:e.end])
		}
	}
	p.text = slices.Grow(p.text, pageEnd)
	p.shrink()
	return p, nil
}
