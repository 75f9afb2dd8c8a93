package main

import (
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"
)

// rrwebClient is a page that records itself with rrweb's own client,
// @rrweb/browser-client 2.1: it sends events alone, to the id of a recording,
// which it keeps for its tab, and which is the session's id. Events that tell of
// the recording become metadata. Nothing is numbered: what it sends again, where
// an answer was lost, is stored again.
type rrwebClient struct {
	*tracker
	recording string
	metadata  []byte // what is known of the recording; nil before the session starts
	located   bool   // so is the page's URL
}

// handle takes the events of a frame or a body.
func (c *rrwebClient) handle(msg []byte) (kept int64, err error) {
	f, err := parseEvents(msg)
	if err != nil {
		return 0, &protocolError{"invalid_events", err.Error()}
	}
	news, located, closed := c.told(f)
	if c.id == "" || len(news) > len("{}") {
		if err := c.start(news); err != nil {
			return 0, err
		}
		c.located = located
	}
	if kept, err = c.takeBatch(f); err == nil && closed {
		err = c.endSession(frame{})
	}
	return kept, err
}

// start begins the session, or continues it, with what is new of its metadata.
func (c *rrwebClient) start(news []byte) error {
	if c.metadata == nil {
		row, err := c.store.session(c.ctx, c.recording)
		if err != nil && !errors.Is(err, errNotFound) {
			return &protocolError{"unavailable", "the database is away: try again later"}
		}
		c.metadata = []byte("{}")
		if err == nil {
			c.metadata = row.about.metadata
			c.mayStart = func() bool { return true } // it has begun already
		}
	}
	known := rewrite(news, nil, 0, membersOf(c.metadata))
	id := fmt.Appendf(nil, `{"sessionId":%q}`, c.recording)
	err := c.startSession(frame{data: rewrite(id, nil, 0, membersOf(known))})
	if err == nil {
		c.metadata = known
	}
	return err
}

func membersOf(object []byte) (all []member) {
	members(object, func(name string, _, value []byte) {
		if name != "resume" {
			all = append(all, member{name, string(value)})
		}
	})
	return all
}

// told gives the metadata that events tell, whether the page's URL is known with
// it, which the first Meta event has, and whether an event ends the session.
func (c *rrwebClient) told(f frame) (metadata []byte, located, closed bool) {
	metadata, located = []byte("{}"), c.located
	for _, e := range f.events {
		if e.kind != metaEvent && e.kind != customEvent {
			continue
		}
		data := fields(f.msg[e.start:e.end], "data")["data"]
		d := fields(data, "href", "width", "height", "tag", "payload")
		switch tag := unquote(d["tag"]); {
		case e.kind == metaEvent && !located && d["href"] != nil && d["width"] != nil && d["height"] != nil:
			located = true
			page := fmt.Appendf(nil, `{"url":%s,"viewport":{"width":%s,"height":%s}}`,
				d["href"], d["width"], d["height"])
			metadata = rewrite(page, nil, 0, membersOf(metadata))
		case e.kind == customEvent && (tag == "recording-meta" || tag == "pageview-meta"):
			metadata = rewrite(d["payload"], nil, 0, membersOf(metadata))
		case e.kind == customEvent && tag == "close-permanent":
			closed = true
		}
	}
	return metadata, located, closed
}

// rrweb's event types that tell of a recording.
const metaEvent, customEvent = 4, 5

// fields gives some members of an object; none of anything else.
func fields(object []byte, names ...string) map[string][]byte {
	found := map[string][]byte{}
	members(object, func(name string, _, value []byte) {
		if slices.Contains(names, name) {
			found[name] = value
		}
	})
	return found
}

// parseEvents reads events that stand one behind the other, with white space
// between them, of which it makes commas.
func parseEvents(msg []byte) (frame, error) {
	if !utf8.Valid(msg) {
		return frame{}, errUTF8
	}
	f := frame{msg: msg, objects: true}
	w := newWalker(msg)
	for before := -1; w.dec.PeekKind() == '{' && len(f.events) <= maxBatchEvents; {
		e, err := w.event()
		if err != nil || before == int(e.start) {
			return frame{}, errSyntax
		}
		if before >= 0 {
			msg[before] = ','
		}
		before = int(e.end)
		f.events = append(f.events, e)
	}
	if len(f.events) == 0 || len(f.events) <= maxBatchEvents && !w.atEnd() {
		return frame{}, errSyntax
	}
	return f, nil
}
