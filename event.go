package main

import (
	"bytes"
	"encoding/json"
	"encoding/json/jsontext"
	"errors"
	"io"
	"math"
	"strconv"
	"time"
	"unicode/utf8"
)

// The nouns, on the way from a page to the database:
//
//	event    one rrweb event: JSON, kept as it came
//	batch    the events of one message, or one error report; the hub numbers the events
//	seq      a tracker's own number of a batch: 1, 2, 3… in its session
//	session  one recording; the hub holds it until all of it is stored
//	claim    a tracker's right to write to a session's row
//	epoch    the number of a claim; the database takes writes of the newest alone
//	flush    what one session adds to one transaction
//	chunk    a row of session_events: about 1 MB of events as a gzipped JSON array
//	ack      "committed up to this seq", sent to the tracker

// event says where one rrweb event stands in a text, and the little that the
// server needs to know of it.
type event struct {
	// Counted from the start of a frame's msg or a chunk; newBatch moves them to the batch's body.
	start, end uint32 // bounds of its JSON object
	kind       int64  // rrweb's "type", -1 when there is none
	time       int64  // rrweb's "timestamp" in milliseconds, 0 when there is none
}

// fullSnapshot is rrweb's event type of a whole page (rrweb's packages/types).
const fullSnapshot = 2

// batch is one message's events. Its frame is the live message that viewers get;
// the hub ends it with the number of the first event, and from then on nobody
// changes the batch: the writer, the viewers' outboxes and pages share it.
type batch struct {
	frame  []byte
	body   []byte  // the events within frame, with commas between them
	events []event // their bounds in body
	report *report // an error that the page told of; such a batch has no events
	// first is the hub's, 0 before; a report has the number of the event that comes next.
	first int64 // number of the first event
	seq   int64 // 0: the tracker does not number its batches
	cost  int64 // bytes of the budget
	// When all of it had arrived. Its wait for the commit counts from here.
	received time.Time
}

// report is an error of the page, a row of session_errors.
type report struct {
	// id counts the reports of a session from 0. kind is the message's type, data its JSON, cut to
	// about maxData.
	id   int64
	kind string
	data []byte
}

// end is one past the batch's last event; a report ends where it begins.
func (b *batch) end() int64 { return b.first + int64(len(b.events)) }

// number gives the batch its place in the session. The frame has room for it.
func (b *batch) number(first int64) {
	b.first = first
	b.frame = append(strconv.AppendInt(b.frame, first, 10), "}}"...)
}

// raw is how much JSON the batch adds to its session.
func (b *batch) raw() int64 {
	if b.report != nil {
		return int64(len(b.report.data))
	}
	return int64(len(b.body))
}

// newBatch copies a message's events into the live message of a session. It takes f's index over
// and moves its bounds: f is of no use afterwards.
func newBatch(id string, f frame, seq int64) *batch {
	const head, mid, tail, number = `{"type":"events_batch","data":{"sessionId":"`, `","events":[`, `],"fromIndex":`, 22
	b := &batch{seq: seq, events: f.events, received: time.Now()}
	var body []byte
	if n := len(f.events); n > 0 {
		start := f.events[0].start
		body = f.msg[start:f.events[n-1].end]
		for i := range b.events {
			b.events[i].start -= start
			b.events[i].end -= start
		}
	}
	start := len(head) + len(id) + len(mid)
	frame := make([]byte, 0, start+len(body)+len(tail)+number)
	frame = append(append(append(frame, head...), id...), mid...)
	b.frame = append(append(frame, body...), tail...)
	b.body = b.frame[start : start+len(body)]
	b.cost = int64(cap(b.frame)) + int64(cap(b.events))*eventCost + 256
	return b
}

// newReport copies data, whose buffer is used again after the message.
func newReport(kind string, data []byte, seq int64) *batch {
	return &batch{report: &report{kind: kind, data: bytes.Clone(data)}, seq: seq, cost: int64(len(data)) + 256,
		received: time.Now()}
}

// eventCost is what the bounds of one event take in memory.
const eventCost = 24

// counters are what a session's row adds up, up to some batch.
type counters struct {
	// Counts, and so the numbers that the next event and the next report get.
	events, errors int64
	raw, stored    int64 // bytes of JSON, bytes of chunks
	// The highest that was added; 0 when no batch has one.
	seq                int64
	firstTime, endTime int64 // least and greatest timestamp, 0 when there is none
	snapshot           int64 // number of the newest full snapshot, -1 when there is none
}

// add takes in a batch that has its number. Bytes of chunks are added where they are made, in
// flush.encode; reports are stored as they are.
func (c *counters) add(b *batch) {
	c.raw += b.raw()
	c.seq = max(c.seq, b.seq)
	if b.report != nil {
		c.errors++
		c.stored += b.raw()
		return
	}
	for i, e := range b.events {
		c.note(e, b.first+int64(i))
	}
	c.events = b.end()
}

// note takes in the time and the kind of one event.
func (c *counters) note(e event, number int64) {
	if e.kind == fullSnapshot {
		c.snapshot = number
	}
	if e.time <= 0 {
		return
	}
	if c.firstTime == 0 || e.time < c.firstTime {
		c.firstTime = e.time
	}
	c.endTime = max(c.endTime, e.time)
}

// description is what a session_start says of its session. It is never changed,
// only replaced.
type description struct {
	userID, url string
	metadata    []byte // JSON object, at most about maxMetadata
	brief       []byte // what lists show of it: the documented fields, each cut
}

// cost is what a session with this description takes of the budget.
func (d *description) cost() int64 {
	if d == nil {
		return 0
	}
	return int64(len(d.userID)+len(d.url)+len(d.metadata)+len(d.brief)) + 512
}

// claim is what a tracker gets of its session's row when it starts or continues the session: from
// then on writes of an older epoch are refused, and so nobody else changes what the counters say.
type claim struct {
	epoch  int64
	userID string
	counters
}

// flush is what one session adds to one transaction. The hub makes it, a writer
// encodes and stores it and hands it back. Its batches and chunks never change, so
// that storing them twice is the same as once; epoch and ended are set at each
// attempt.
type flush struct {
	session string
	epoch   int64
	batches []*batch
	totals  counters // of the row, once this is stored
	ended   bool     // nothing follows: the session is over

	chunks   []chunk // made by the writer
	kept     int64   // bytes of the budget that they take while the flush waits to be tried again
	attempts int
	outcome  outcome
}

// outcome is what became of a flush.
type outcome int

const (
	stored    outcome = iota
	failed            // to be tried again
	refused           // PostgreSQL does not take the data
	epochLost         // the row has a newer epoch
	deleted           // the row is not there any more
)

// cost is what the flush holds of the budget; whoever drops the flush gives it back.
func (f *flush) cost() int64 {
	n := f.kept
	for _, b := range f.batches {
		n += b.cost
	}
	return n
}

// chunk is a row of session_events.
type chunk struct {
	first, count       int64
	startTime, endTime int64 // least and greatest timestamp, 0 when there is none
	snapshot           int64 // number of the newest full snapshot, -1 when there is none
	raw                int   // bytes of JSON
	events             []byte
}

// Reading JSON. jsontext validates as encoding/json does (RFC 8259), and keeps
// every value as it came. Where a key stands twice the last one counts.

// frame is one message of a client, cut into its parts but not decoded. Its
// slices share the memory of the message.
type frame struct {
	msg     []byte
	typ     string
	data    []byte  // the raw "data", nil when absent
	seq     []byte  // the raw "data.seq", nil when absent
	events  []event // bounds in msg of the objects in "data.events"
	objects bool    // "data.events" is there, and an array of objects
}

var (
	errUTF8   = errors.New("a message must be valid UTF-8")
	errSyntax = errors.New("not a JSON object")
	errType   = errors.New(`"type" must be a string`)
	errChunk  = errors.New("not a JSON array of as many objects as its row says")
)

// maxBatchEvents bounds what the index of one message takes in memory.
const maxBatchEvents = 100_000

// parseFrame finds the parts of a message, and leaves it to handlers what "data" must have. Its
// errors are fit for the client.
func parseFrame(msg []byte) (frame, error) {
	if !utf8.Valid(msg) {
		return frame{}, errUTF8
	}
	f := frame{msg: msg}
	var typ []byte
	w := newWalker(msg)
	_, err := w.object(func(key []byte) (err error) {
		switch string(nameOf(key)) {
		case "data":
			return w.envelope(&f)
		case "type":
			typ, err = w.dec.ReadValue()
		default:
			_, err = w.dec.ReadValue()
		}
		return err
	})
	if err != nil || !w.atEnd() {
		return frame{}, errSyntax
	}
	if len(typ) == 0 || typ[0] != '"' {
		return frame{}, errType
	}
	f.typ = unquote(typ)
	return f, nil
}

// walker reads a JSON text in place, value by value.
type walker struct {
	text []byte
	dec  jsontext.Decoder
}

// newWalker reads text, which must be valid UTF-8: the decoder has to let lone
// surrogates pass, which pages contain, and then does not look at UTF-8 either.
func newWalker(text []byte) *walker {
	w := &walker{text: text}
	w.dec.Reset(bytes.NewBuffer(text), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	return w
}

// object reads an object, calls member with each key, and gives the offset in text where the object
// starts. member reads the value; its error ends the reading. errSyntax: no object stands here.
func (w *walker) object(member func(key []byte) error) (start int, err error) {
	if w.dec.PeekKind() != '{' {
		return 0, errSyntax
	}
	if _, err := w.dec.ReadToken(); err != nil {
		return 0, err
	}
	start = int(w.dec.InputOffset()) - 1
	for w.dec.PeekKind() == '"' {
		key, err := w.dec.ReadValue()
		if err != nil {
			return 0, err
		}
		if err := member(key); err != nil {
			return 0, err
		}
	}
	_, err = w.dec.ReadToken() // the brace, or what is wrong
	return start, err
}

// atEnd reports whether nothing but white space is left. Otherwise the walker is of no use any more.
func (w *walker) atEnd() bool {
	_, err := w.dec.ReadToken()
	return err == io.EOF
}

// envelope reads the value of "data" into f. One that is no object is kept raw, and has no events.
func (w *walker) envelope(f *frame) (err error) {
	f.data, f.seq, f.events, f.objects = nil, nil, nil, false
	if w.dec.PeekKind() != '{' {
		f.data, err = w.dec.ReadValue()
		return err
	}
	start, err := w.object(func(key []byte) (err error) {
		switch string(nameOf(key)) {
		case "events":
			f.events, f.objects = nil, false
			if w.dec.PeekKind() == '[' {
				f.events, f.objects, err = w.events(maxBatchEvents + 1) // one more shows that it is too many
				return err
			}
			_, err = w.dec.ReadValue()
		case "seq":
			f.seq, err = w.dec.ReadValue()
		default:
			_, err = w.dec.ReadValue()
		}
		return err
	})
	f.data = w.text[start:w.dec.InputOffset()]
	return err
}

// events reads an array and gives the bounds of its first objects, as many as most
// says. objects reports whether the array holds nothing else.
func (w *walker) events(most int) (events []event, objects bool, err error) {
	if _, err := w.dec.ReadToken(); err != nil {
		return nil, false, err
	}
	events, objects = make([]event, 0, 16), true
	for {
		switch kind := w.dec.PeekKind(); {
		case kind == ']' || kind == 0:
			_, err := w.dec.ReadToken() // the bracket, or what is wrong
			return events, objects, err
		case kind != '{':
			objects = false
			if _, err := w.dec.ReadValue(); err != nil {
				return nil, false, err
			}
			continue
		}
		e, err := w.event()
		if err != nil {
			return nil, false, err
		}
		if len(events) < most {
			events = append(events, e)
		}
	}
}

// event reads a whole object. "type" and "timestamp" count at its top level alone.
func (w *walker) event() (event, error) {
	e := event{kind: -1}
	start, err := w.object(func(key []byte) error {
		value, err := w.dec.ReadValue()
		switch string(nameOf(key)) {
		case "type":
			e.kind = wholeNumber(value, -1)
		case "timestamp":
			e.time = wholeNumber(value, 0)
		}
		return err
	})
	e.start, e.end = uint32(start), uint32(w.dec.InputOffset())
	return e, err
}

// splitEvents finds the events of a JSON array, a chunk, and gives their bounds.
func splitEvents(text []byte) ([]event, error) {
	w := newWalker(text)
	if w.dec.PeekKind() != '[' {
		return nil, errChunk
	}
	events, objects, err := w.events(math.MaxInt)
	if err != nil || !objects || !w.atEnd() {
		return nil, errChunk
	}
	return events, nil
}

// nameOf gives a key's name. Only one with an escape in it has to be decoded.
func nameOf(key []byte) []byte {
	if bytes.IndexByte(key, '\\') >= 0 {
		return []byte(unquote(key))
	}
	return key[1 : len(key)-1]
}

// members calls fn for each member of a JSON object, in order, with its name and with key and value
// as they stand. It just ends where the JSON is wrong; nil, and what is no object, have no members.
func members(object []byte, fn func(name string, key, value []byte)) {
	w := newWalker(object)
	w.object(func(key []byte) error {
		value, err := w.dec.ReadValue()
		if err == nil {
			fn(string(nameOf(key)), key, value)
		}
		return err
	})
}

// nests reports whether valid JSON nests deeper than levels.
func nests(value []byte, levels int) bool {
	w := newWalker(value)
	for {
		if _, err := w.dec.ReadToken(); err != nil {
			return false
		}
		if w.dec.StackDepth() > levels {
			return true
		}
	}
}

// unquote decodes a JSON string; anything else gives "".
func unquote(raw []byte) (s string) {
	if json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// wholeNumber reads a JSON number, cut towards zero. What is no number, or beyond
// 2^53, where a float64 is not exact, gives none.
func wholeNumber(raw []byte, none int64) int64 {
	f, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || math.Abs(f) > 1<<53 {
		return none
	}
	return int64(f)
}
