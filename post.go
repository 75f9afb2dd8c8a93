package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"
)

// What pages send by HTTP, where a network refuses WebSockets and when they are
// left: a connection of one request, with the handlers of a WebSocket. It is
// answered when all that it brought is committed.

// post is such a connection. Its outbox gathers what the answer says.
type post struct {
	conn
	tracker  *tracker
	sessions []string // that it has recorded
}

const (
	maxPostTime = 45 * time.Second // the answer may not take longer than http.Server's WriteTimeout
	postPause   = 3 * time.Second  // so long after a post its page, which has a token, is not said to have left
)

// handlePost takes a tracker's messages, one a line, the first a session_start.
func (s *server) handlePost(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	if kind := query.Get("type"); kind != "" && kind != "tracker" {
		s.fail(w, r, http.StatusBadRequest, "only trackers post", nil)
	} else if s.admitPage(w, r, query.Get("key")) {
		s.post(w, r, (*post).handleLines, func(p *post, err error) { p.answer(w, errors.Join(err, p.awaitCommits())) })
	}
}

// admitPage lets in a page that may record, and lets it read the answer.
func (s *server) admitPage(w http.ResponseWriter, r *http.Request, key string) bool {
	if origin := r.Header.Get("Origin"); origin != "" && s.access.mayRecord(r) {
		w.Header().Set("Access-Control-Allow-Origin", origin)
	}
	d := s.access.admitTracker(r, key)
	if d != nil {
		s.deny(w, r, false, d)
	}
	return d == nil
}

// handlePreflight answers a browser that asks what a page may post.
func (s *server) handlePreflight(w http.ResponseWriter, r *http.Request) {
	if s.admitPage(w, r, s.access.key) {
		h := w.Header()
		h.Set("Access-Control-Allow-Methods", "POST")
		h.Set("Access-Control-Allow-Headers", "Authorization, Content-Encoding, Content-Type")
		h.Set("Access-Control-Max-Age", "600")
		w.WriteHeader(http.StatusNoContent)
	}
}

// post reads the request's body, calls handle with it, and answer when the body's
// room is given back.
func (s *server) post(w http.ResponseWriter, r *http.Request, handle func(*post, []byte) error,
	answer func(*post, error)) {
	addr := s.access.address(r)
	if d := s.access.enter(addr); d != nil {
		s.deny(w, r, false, d)
		return
	}
	defer s.access.leave(addr)
	p := &post{conn: conn{core: &s.core, maxMessage: s.cfg.maxMessageBytes, inflater: inflater, out: newOutbox()}}
	p.ctx, p.cancel = context.WithTimeout(r.Context(), maxPostTime)
	defer p.cancel()
	p.out.abort = p.cancel
	stopReading := func() { http.NewResponseController(w).SetReadDeadline(time.Now()) }
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
	answer(p, p.receive(r.Body, handle))
}

func (p *post) receive(r io.Reader, handle func(*post, []byte) error) error {
	body, err := p.readAll(&unpacker{wire: bufio.NewReader(countedReader{r, &p.metrics.wireBytes})})
	defer func() { p.release(body) }()
	if err != nil {
		return err
	}
	return handle(p, body)
}

// handleLines handles a body's messages, as conn.serve does those of a WebSocket.
// What is wrong before a session has started refuses all of them.
func (p *post) handleLines(body []byte) error {
	for len(body) > 0 {
		var line []byte
		line, body, _ = bytes.Cut(body, []byte("\n"))
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		err := p.take(p.tracker.handle, line)
		var wrong *protocolError
		switch {
		case len(p.sessions) == 0 && err != nil:
			return err
		case len(p.sessions) == 0:
			return errNotStarted
		case errors.As(err, &wrong):
			p.replyError(wrong)
		case err != nil:
			return err
		}
		if p.errors >= maxErrors {
			return nil // the outbox has the reason
		}
		if err := p.keepRoom(int64(len(body))); err != nil {
			return err
		}
	}
	if len(p.sessions) == 0 {
		return errNotStarted
	}
	return nil
}

// take gives a message to the handler, and remembers which session it was of.
func (p *post) take(handle func([]byte) (int64, error), msg []byte) error {
	kept, err := handle(msg)
	p.reserved -= kept
	taken := min(kept, p.grown) // is the hub's, and keeps no other message from growing
	p.grown -= taken
	p.budget.finish(0, taken)
	if last := p.tracker.last; last != "" && !slices.Contains(p.sessions, last) {
		p.sessions = append(p.sessions, last)
	}
	return err
}

// keepRoom takes room for what is left of the body where batches took more than
// their JSON. Their commit, which gives room back, is not to wait for its interval.
func (p *post) keepRoom(left int64) error {
	short := left + p.inflater - p.reserved
	if short <= 0 {
		return nil
	}
	p.hub.send(awaitCommit{p.tracker.last, make(chan int64, 1)})
	took, err := p.budget.grow(p.ctx, short, short)
	p.reserved += took
	p.grown += took
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

// answer says what the outbox holds, one message a line, and at last what went
// wrong with the whole.
func (p *post) answer(w http.ResponseWriter, err error) {
	var out []byte
	m, last := p.out.next()
	for ; m != nil; m, last = p.out.next() {
		out = append(append(out, m.encode()...), '\n')
	}
	status := http.StatusOK
	if wrong := refusal(err, last); wrong != nil {
		status = statusOf(wrong)
		out = append(append(out, errorMessage(wrong.code, wrong.reason)...), '\n')
	}
	w.Header().Set("Content-Type", "application/x-ndjson; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(out)
}

// refusal is why a post was not taken, or not as a whole; nil when it was.
func refusal(err error, last *closeFrame) *protocolError {
	var wrong *protocolError
	switch {
	case last != nil && last.code == closeTaken:
		return &protocolError{"taken", last.reason}
	case last != nil && last.code == closeDeleted:
		return &protocolError{"session_deleted", last.reason}
	case last != nil && last.code == closePolicy:
		return &protocolError{"refused", last.reason}
	case errors.As(err, &wrong):
		return wrong
	case err != nil || last != nil:
		return &protocolError{"unavailable", "the server cannot take it now: try again later"}
	}
	return nil
}

func statusOf(wrong *protocolError) int {
	switch wrong.code {
	case "too_large":
		return http.StatusRequestEntityTooLarge
	case "too_many_sessions":
		return http.StatusTooManyRequests
	case "unavailable":
		return http.StatusServiceUnavailable
	case "taken":
		return http.StatusConflict
	case "session_deleted":
		return http.StatusGone
	}
	return http.StatusBadRequest
}

// unpacker reads a body and inflates one that begins as gzip does. A page needs no
// header to say so, for which its browser would ask first.
type unpacker struct {
	wire *bufio.Reader
	z    *gzip.Reader // nil when the body comes as it is
	read bool         // something of it
}

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

// countedReader counts the bytes that are read from it.
type countedReader struct {
	io.Reader
	wire *atomic.Int64
}

func (c countedReader) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.wire.Add(int64(n))
	return n, err
}
