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
// Its handle takes the place of the tracker's, and starts and ends the session for the page.
type rrwebClient struct {
	*tracker
	recording string
	metadata  []byte // what is known of the recording; nil before the session starts
	located   bool   // the page's URL is known
}

// handle takes the events of a frame or a body.
func (c *rrwebClient) handle(msg []byte) (kept int64, err error) {
	f, err := parseEvents(msg)
	if err != nil {
		return 0, &protocolError{"invalid_events", err.Error()}
	}
	news, located, closed := c.told(f)
	if c.id == "" || len(news.names) > 0 {
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

// start begins the session, or continues it, with its metadata and what is new of it.
func (c *rrwebClient) start(news *fields) error {
	if c.metadata == nil {
		row, err := c.store.session(c.ctx, c.recording)
		if err != nil && !errors.Is(err, errNotFound) {
			return &protocolError{"unavailable", "the database is away: try again later"}
		}
		c.metadata = []byte("{}")
		if c.continues = err == nil; c.continues {
			c.metadata = row.about.metadata
		}
	}
	known := newFields()
	known.set("sessionId", fmt.Appendf(nil, "%q", c.recording))
	known.setAll(c.metadata)
	for _, name := range news.names {
		known.set(name, news.values[name])
	}
	data := known.encode()
	err := c.startSession(frame{data: data})
	if err == nil {
		c.metadata = data
	}
	return err
}

// told gives the metadata in the events, whether the page's URL is known by then (the
// first Meta event has it), and whether an event ends the session.
func (c *rrwebClient) told(f frame) (news *fields, located, closed bool) {
	news, located = newFields(), c.located
	for _, e := range f.events {
		if e.kind != metaEvent && e.kind != customEvent {
			continue
		}
		data := valuesOf(valuesOf(f.msg[e.start:e.end], "data")["data"], "href", "width", "height", "tag", "payload")
		href, width, height := data["href"], data["width"], data["height"]
		switch tag := unquote(data["tag"]); {
		case e.kind == metaEvent && !located && href != nil && width != nil && height != nil:
			located = true
			news.set("url", href)
			news.set("viewport", fmt.Appendf(nil, `{"width":%s,"height":%s}`, width, height))
		case e.kind == customEvent && (tag == "recording-meta" || tag == "pageview-meta"):
			news.setAll(data["payload"])
		case e.kind == customEvent && tag == "close-permanent":
			closed = true
		}
	}
	return news, located, closed
}

// fields are members of an object in the making, of about maxMetadata bytes in all.
// Of a name that is set twice the last value counts.
type fields struct {
	names  []string
	values map[string][]byte // raw JSON
	size   int
}

func newFields() *fields { return &fields{values: map[string][]byte{}} }

// set leaves out what has no room any more.
func (f *fields) set(name string, value []byte) {
	before, known := f.values[name]
	size := f.size + len(value) - len(before)
	if !known {
		size += len(name) + len(`"":,`)
	}
	if size > maxMetadata-len("{}") {
		return
	}
	if !known {
		f.names = append(f.names, name)
	}
	f.values[name], f.size = value, size
}

// setAll sets each member of an object, but what names a session or opens it.
func (f *fields) setAll(object []byte) {
	members(object, func(name string, _, value []byte) {
		if name != "sessionId" && name != "resume" {
			f.set(name, value)
		}
	})
}

func (f *fields) encode() []byte {
	out := []byte("{")
	for _, name := range f.names {
		out = fmt.Appendf(out, "%s:%s,", encodeJSON(name), f.values[name])
	}
	return endObject(out)
}

// rrweb's event types that tell of a recording.
const metaEvent, customEvent = 4, 5

// valuesOf gives some members of an object; none of anything else.
func valuesOf(object []byte, names ...string) map[string][]byte {
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
