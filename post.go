package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"time"
)

// A page posts its messages where a network refuses WebSockets, and its last ones
// when it is left. The messages have the same handlers as those of a WebSocket. A
// post is answered when all of it is committed.

// post is a connection of one request: it reads as one, and has no WebSocket and no writer. Its
// outbox gathers what the answer says.
type post struct {
	conn
	tracker  *tracker
	sessions []string // that it has recorded
}

// maxPostTime begins with the header, and is for the body, its handling and its commit.
const (
	maxPostTime = 45 * time.Second // the answer may not take longer than http.Server's WriteTimeout
	maxAnswers  = 200              // messages in the answer to one post, errors too
	postPause   = 3 * time.Second  // so long after a post its page, which has a token, is not said to have left
)

// handlePost takes a tracker's messages, one a line, the first a session_start; of
// rrweb's client it takes events, all of them or none.
func (s *server) handlePost(w http.ResponseWriter, r *http.Request) {
	if kind := r.URL.Query().Get("type"); kind != "" && kind != "tracker" {
		s.fail(w, r, http.StatusBadRequest, "only trackers post", nil)
		return
	}
	addr, ok := s.enter(w, r)
	if !ok {
		return
	}
	defer s.access.leave(addr)
	p := &post{conn: conn{core: &s.core, inflater: inflater, out: newOutbox()}}
	// Not the request's context: a page that goes, or a browser that quits, awaits no answer.
	p.ctx, p.cancel = context.WithTimeout(context.WithoutCancel(r.Context()), maxPostTime)
	defer p.cancel()
	p.out.abort = p.cancel
	stopReading := func() { http.NewResponseController(w).SetReadDeadline(time.Now()) }
	// Reading a body does not end with a context: the deadline ends it.
	defer context.AfterFunc(p.ctx, stopReading)()
	p.tracker = s.newTracker(&p.conn, r, addr)
	s.open.Store(&p.conn, nil)
	defer s.open.Delete(&p.conn)
	s.hub.send(enter{p.out, false})
	defer func() {
		left := func() { s.hub.send(leave{p.out}) }
		if p.tracker.token == "" {
			left()
		} else {
			time.AfterFunc(postPause, left)
		}
	}()
	err := p.receive(r.Body)
	if p.tracker.share {
		s.answerRecording(w, r, p, err)
	} else {
		p.answer(w, errors.Join(err, p.awaitCommits()))
	}
}

// receive handles the body, and gives back its room.
func (p *post) receive(r io.Reader) error {
	body, err := p.readAll(&unpacker{wire: bufio.NewReader(counted{from: r, wire: &p.metrics.wireBytes})})
	defer func() { p.release(body) }()
	switch {
	case p.ctx.Err() != nil:
		return p.ctx.Err() // the time is over, or the server stops: no other error counts
	case err != nil:
		return err
	case p.tracker.share:
		err = p.take(body)
	default:
		err = p.handleLines(body)
	}
	if wrong, ok := errors.AsType[*protocolError](err); ok && wrong != errTooLarge { // which readAll has counted
		p.metrics.refuse(wrong.code)
	}
	return err
}

// handleLines handles a body's messages, as conn.serve does those of a WebSocket.
// An error before a session has started refuses all of them; after maxErrors errors
// in all, not in a row, the rest is refused.
func (p *post) handleLines(body []byte) error {
	left := int64(len(body))
	for line := range bytes.Lines(body) {
		left -= int64(len(line))
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		err := p.take(line)
		if len(p.sessions) == 0 {
			return cmp.Or[error](err, errNotStarted)
		}
		if wrong, ok := errors.AsType[*protocolError](err); ok {
			p.replyError(wrong)
		} else if err != nil {
			return err
		}
		if p.out.length() >= maxAnswers {
			p.out.closeAfterSending(closePolicy, "too many messages that need an answer")
			return nil
		}
		if p.errors >= maxErrors {
			return nil // the outbox has the reason
		}
		if err := p.keepRoom(left); err != nil {
			return err
		}
	}
	if len(p.sessions) == 0 {
		return errNotStarted
	}
	return nil
}

// take gives a message to the handler, and remembers which session it was of. What the hub has taken
// over no longer counts as growing.
func (p *post) take(msg []byte) error {
	kept, err := p.handle(msg)
	p.reserved -= kept
	taken := min(kept, p.grown) // the hub has it now: it keeps no other message from growing
	p.grown -= taken
	p.budget.finish(nil, 0, taken)
	if last := p.tracker.last; last != "" && !slices.Contains(p.sessions, last) {
		p.sessions = append(p.sessions, last)
	}
	return err
}

// keepRoom takes room for what is left of the body: batches may have taken some of
// that, since they need more than their JSON. Their commit gives room back, and does
// not wait for its interval.
func (p *post) keepRoom(left int64) error {
	short := left + p.inflater - p.reserved
	if short <= 0 {
		return nil
	}
	p.hub.send(hurry{p.tracker.last})
	err := p.budget.grow(p.ctx, &p.conn, short)
	if err == nil {
		p.reserved += short
		p.grown += short
	}
	return err
}

// awaitCommits waits until everything is committed, or its session is gone.
func (p *post) awaitCommits() error {
	for _, id := range p.sessions {
		reply := make(chan int64, 1)
		p.hub.send(awaitCommit{id, reply})
		select {
		case seq := <-reply:
			if seq > 0 {
				p.out.ack(id, seq) // also to an earlier page of the tab, which the hub does not tell
			}
		case <-p.ctx.Done():
			return p.ctx.Err()
		case <-p.hub.done:
			return net.ErrClosed
		}
	}
	return nil
}

// answer says what the outbox holds, one message a line, and at last what went wrong with the whole.
// An ack that came before an error is in it: so much is stored.
func (p *post) answer(w http.ResponseWriter, err error) {
	var out []byte
	m, last := p.next()
	for ; m != nil; m, last = p.next() {
		out = append(append(out, m.encode()...), '\n')
	}
	status := http.StatusOK
	if wrong := refusal(err, last); wrong != nil {
		status = cmp.Or(statuses[wrong.code], http.StatusBadRequest)
		out = append(append(out, errorMessage(wrong.code, wrong.reason)...), '\n')
	}
	w.Header().Set("Content-Type", "application/x-ndjson; charset=utf-8")
	w.WriteHeader(status)
	w.Write(out)
}

// answerRecording answers rrweb's client. A commit that takes too long is no error to
// it: it would send its events again. An error in the outbox is of all its events.
func (s *server) answerRecording(w http.ResponseWriter, r *http.Request, p *post, err error) {
	if err == nil {
		p.awaitCommits()
	}
	m, last := p.out.next()
	for ; m != nil; m, last = p.out.next() {
		var told struct {
			Type string
			Data struct{ Code, Message string }
		}
		json.Unmarshal(m.encode(), &told)
		if told.Type == "error" {
			err = cmp.Or[error](err, &protocolError{told.Data.Code, told.Data.Message})
		}
	}
	if wrong := refusal(err, last); wrong != nil {
		s.fail(w, r, cmp.Or(statuses[wrong.code], http.StatusBadRequest), wrong.reason, nil)
		return
	}
	s.write(w, http.StatusOK, map[string]bool{"ok": true})
}

// refusal is why a post was not taken, or not as a whole; nil when it was.
func refusal(err error, last *closeFrame) *protocolError {
	var wrong *protocolError
	switch {
	case last != nil && refusals[last.code] != "":
		return &protocolError{refusals[last.code], last.reason}
	case errors.As(err, &wrong):
		return wrong
	case err != nil || last != nil:
		return &protocolError{"unavailable", "the server cannot take it now: try again later"}
	}
	return nil
}

// refusals name the close codes that an answer tells of; statuses go by error codes and these names.
var (
	refusals = map[closeCode]string{closeTaken: "taken", closeDeleted: "session_deleted", closePolicy: "refused"}
	statuses = map[string]int{ // of what is not 400
		"too_large": http.StatusRequestEntityTooLarge, "too_many_sessions": http.StatusTooManyRequests,
		"unavailable": http.StatusServiceUnavailable, "taken": http.StatusConflict, "session_deleted": http.StatusGone,
	}
)

// unpacker reads a body and inflates one that begins as gzip does. A page needs no
// header to say so, for which its browser would ask first.
type unpacker struct {
	wire *bufio.Reader
	z    *gzip.Reader // nil when the body comes as it is
	read bool         // something of the body was read
}

// Read gives io.EOF where body and stream end together. Whatever else is wrong with a stream, or
// stands behind it, is errNotInflated.
func (u *unpacker) Read(p []byte) (n int, err error) {
	if head, _ := u.wire.Peek(2); !u.read && string(head) == "\x1f\x8b" {
		if u.z, err = gzip.NewReader(u.wire); err != nil {
			return 0, errNotInflated
		}
		u.z.Multistream(false)
	}
	u.read = true
	if u.z == nil {
		return u.wire.Read(p)
	}
	n, err = u.z.Read(p)
	if _, behind := u.wire.Peek(1); err == io.EOF && behind == io.EOF || err == nil {
		return n, err
	}
	return n, errNotInflated
}

var errNotInflated = &protocolError{"invalid_message", "the body is not one gzip stream"}
