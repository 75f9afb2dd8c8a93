package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"math/bits"
	"strconv"
	"unicode/utf8"
)

// maxDepth is how deep a message may nest, the limit of encoding/json too.
const maxDepth = 10000

// rrweb's event types that the server looks at (rrweb's packages/types).
const fullSnapshot = 2

// event says where in its message an rrweb event stands, and the little that
// the server needs to know of it.
type event struct {
	start, end uint32 // bounds of the event's JSON object
	kind       int32  // rrweb's "type", -1 when there is none
	time       int64  // "timestamp" in milliseconds, 0 when there is none
}

// frame is one message of a client, cut into its parts but not decoded. Its
// slices share the memory of the message.
type frame struct {
	typ    string
	data   []byte // the raw "data", nil when absent
	events []event
	seq    []byte // the raw "data.seq", nil when absent
	body   []byte // "data.events" behind its bracket; the events' bounds count from its start
	array  bool   // "data.events" is there, and an array of objects
}

var (
	errUTF8   = errors.New("a text frame must be valid UTF-8")
	errSyntax = errors.New("not a JSON object")
	errType   = errors.New(`"type" must be a string`)
	errChunk  = errors.New("not a JSON array of as many objects as its row says")
)

// parseFrame validates a message as encoding/json would, and finds in the same
// pass the parts of the envelope and the bounds of each event. Where a key
// stands twice the last one counts, as in JavaScript.
func parseFrame(msg []byte) (frame, error) {
	if !utf8.Valid(msg) {
		return frame{}, errUTF8
	}
	var f frame
	var rawType []byte
	s := scanner{b: msg}
	s.space()
	if s.peek() != '{' {
		return frame{}, errSyntax
	}
	for more := s.enter('}'); more; more = s.next('}') {
		key, start := s.key(), s.i
		switch {
		case keyIs(key, "data"):
			f = s.envelope()
			f.data = s.since(start)
		case keyIs(key, "type"):
			s.value()
			rawType = s.since(start)
		default:
			s.value()
		}
	}
	if s.space(); s.bad || s.i != len(msg) {
		return frame{}, errSyntax
	}
	if len(rawType) == 0 || rawType[0] != '"' {
		return frame{}, errType
	}
	f.typ = unquote(rawType)
	return f, nil
}

// envelope reads the value of "data" and what the server needs of its members.
func (s *scanner) envelope() (f frame) {
	if s.peek() != '{' {
		s.value()
		return f
	}
	for more := s.enter('}'); more; more = s.next('}') {
		key, start := s.key(), s.i
		switch {
		case keyIs(key, "events"):
			f.events, f.array, f.body = nil, false, nil
			if s.peek() != '[' {
				s.value()
				break
			}
			f.events, f.array = s.events(start+1, maxBatchEvents+1) // one more shows that it is too many
			f.body = s.since(start + 1)
		case keyIs(key, "seq"):
			s.value()
			f.seq = s.since(start)
		default:
			s.value()
		}
	}
	return f
}

// events reads an array of events, whose bounds count from base, gives at most
// so many of them, and says whether all are objects.
func (s *scanner) events(base, most int) (events []event, objects bool) {
	events, objects = make([]event, 0, 16), true
	for more := s.enter(']'); more; more = s.next(']') {
		if s.peek() != '{' {
			objects = false
			s.value()
			continue
		}
		e := event{start: uint32(s.i - base), kind: -1}
		for more := s.enter('}'); more; more = s.next('}') {
			key, start := s.key(), s.i
			s.value()
			if keyIs(key, "type") {
				e.kind = int32(number(s.since(start), -1))
			} else if keyIs(key, "timestamp") {
				e.time = number(s.since(start), 0)
			}
		}
		e.end = uint32(s.i - base)
		if len(events) < most {
			events = append(events, e)
		}
	}
	return events, objects
}

// splitEvents finds the events of a JSON array, a stored chunk, and gives their
// bounds in it.
func splitEvents(chunk []byte) ([]event, error) {
	s := scanner{b: chunk}
	if s.peek() != '[' {
		return nil, errChunk
	}
	events, objects := s.events(0, math.MaxInt)
	if s.bad || !objects || s.i != len(chunk) {
		return nil, errChunk
	}
	return events, nil
}

// members calls fn for each member of a valid JSON object, with its key
// unquoted, and with key and value as they stand.
func members(object []byte, fn func(name string, key, value []byte)) {
	s := scanner{b: object}
	if s.peek() != '{' {
		return
	}
	for more := s.enter('}'); more; more = s.next('}') {
		key, start := s.key(), s.i
		s.value()
		fn(unquote(quoted(key)), quoted(key), s.since(start))
	}
}

// nests says whether valid JSON nests deeper than so many levels.
func nests(value []byte, levels int) bool {
	return skipValue(value, 0, maxDepth-levels) < 0
}

// keyIs compares a key between its quotes with a name. Only a key with an
// escape in it has to be decoded.
func keyIs(key []byte, name string) bool {
	return string(key) == name || bytes.IndexByte(key, '\\') >= 0 && unquote(quoted(key)) == name
}

func quoted(key []byte) []byte {
	return append(append(append(make([]byte, 0, len(key)+2), '"'), key...), '"')
}

// unquote decodes a valid JSON string; anything else gives "".
func unquote(raw []byte) string {
	if len(raw) >= 2 && raw[0] == '"' && bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1])
	}
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// number reads a JSON number as a whole one, cut towards zero, and gives none
// for what is no number or not exact in a float64.
func number(raw []byte, none int64) int64 {
	n := int64(0)
	for i, c := range raw {
		if c < '0' || c > '9' || i > 15 {
			return float(raw, none)
		}
		n = n*10 + int64(c-'0')
	}
	if n > 1<<53 {
		return none
	}
	return n
}

func float(raw []byte, none int64) int64 {
	f, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || math.Abs(f) > 1<<53 || math.IsNaN(f) {
		return none
	}
	return int64(f)
}

// scanner walks JSON (RFC 8259) and accepts exactly what json.Valid accepts; a
// fuzz test compares the two. A method starts on the first byte of what it
// reads and leaves i behind the last. Text that is not valid makes it bad and
// ends every loop over it.
type scanner struct {
	b     []byte
	i     int
	depth int
	bad   bool
}

func (s *scanner) fail() {
	s.bad = true
	s.i = len(s.b)
}

// since gives the text from start to here.
func (s *scanner) since(start int) []byte {
	if s.bad {
		return nil
	}
	return s.b[start:s.i:s.i]
}

// peek gives the next byte, 0 at the end.
func (s *scanner) peek() byte {
	if s.i < len(s.b) {
		return s.b[s.i]
	}
	return 0
}

func (s *scanner) space() { s.i = skipSpace(s.b, s.i) }

// enter goes into an object or array and says whether there is something in it.
func (s *scanner) enter(closer byte) bool {
	s.i++
	s.depth++
	if s.depth > maxDepth {
		s.fail()
		return false
	}
	s.space()
	if s.peek() == closer {
		s.i++
		s.depth--
		return false
	}
	return true
}

// next goes behind the comma that follows a member, or behind the closer.
func (s *scanner) next(closer byte) bool {
	s.space()
	switch s.peek() {
	case ',':
		s.i++
		s.space()
		return true
	case closer:
		s.i++
		s.depth--
		return false
	}
	s.fail()
	return false
}

// key reads a member's key and colon and gives the key between its quotes.
func (s *scanner) key() []byte {
	start := s.i + 1
	end := skipString(s.b, s.i)
	colon := skipSpace(s.b, end)
	if end < 0 || colon >= len(s.b) || s.b[colon] != ':' {
		s.fail()
		return nil
	}
	s.i = skipSpace(s.b, colon+1)
	return s.b[start : end-1]
}

func (s *scanner) value() {
	if s.i = skipValue(s.b, s.i, s.depth); s.i < 0 {
		s.fail()
	}
}

// The functions that skip take the place where something begins and give the
// one behind it, or -1 when it is not valid. They keep all they need in
// registers, and read what lies within events: twice as fast as through a
// scanner.

// skipSpace accepts -1, so that only the last of several results is looked at.
func skipSpace(b []byte, i int) int {
	for uint(i) < uint(len(b)) && b[i] <= ' ' && (b[i] == ' ' || b[i] == '\n' || b[i] == '\r' || b[i] == '\t') {
		i++
	}
	return i
}

func skipValue(b []byte, i, depth int) int {
	if uint(i) >= uint(len(b)) {
		return -1
	}
	switch b[i] {
	case '"':
		return skipString(b, i)
	case '{':
		return skipObject(b, i, depth+1)
	case '[':
		return skipArray(b, i, depth+1)
	case 't':
		return skipWord(b, i, "true")
	case 'f':
		return skipWord(b, i, "false")
	case 'n':
		return skipWord(b, i, "null")
	}
	return skipNumber(b, i)
}

func skipObject(b []byte, i, depth int) int {
	if depth > maxDepth {
		return -1
	}
	if i = skipSpace(b, i+1); i < len(b) && b[i] == '}' {
		return i + 1
	}
	for {
		i = skipSpace(b, skipString(b, i))
		if uint(i) >= uint(len(b)) || b[i] != ':' {
			return -1
		}
		i = skipSpace(b, skipValue(b, skipSpace(b, i+1), depth))
		if uint(i) >= uint(len(b)) || b[i] != ',' {
			break
		}
		i = skipSpace(b, i+1)
	}
	if uint(i) >= uint(len(b)) || b[i] != '}' {
		return -1
	}
	return i + 1
}

func skipArray(b []byte, i, depth int) int {
	if depth > maxDepth {
		return -1
	}
	if i = skipSpace(b, i+1); i < len(b) && b[i] == ']' {
		return i + 1
	}
	for {
		i = skipSpace(b, skipValue(b, i, depth))
		if uint(i) >= uint(len(b)) || b[i] != ',' {
			break
		}
		i = skipSpace(b, i+1)
	}
	if uint(i) >= uint(len(b)) || b[i] != ']' {
		return -1
	}
	return i + 1
}

func skipWord(b []byte, i int, w string) int {
	if len(b)-i < len(w) || string(b[i:i+len(w)]) != w {
		return -1
	}
	return i + len(w)
}

// skipString looks at eight bytes at once: most keys, and whole stretches of
// text, are done with one step. See "Determine if a word has a byte less than
// n" and "… equal to n" in Bit Twiddling Hacks.
func skipString(b []byte, i int) int {
	if uint(i) >= uint(len(b)) || b[i] != '"' {
		return -1
	}
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	for i++; i < len(b); {
		if i+8 <= len(b) {
			w := binary.LittleEndian.Uint64(b[i:])
			quote, escape := w^'"'*ones, w^'\\'*ones
			special := ((w - ' '*ones) &^ w) | ((quote - ones) &^ quote) | ((escape - ones) &^ escape)
			if special &= highs; special == 0 {
				i += 8
				continue
			}
			i += bits.TrailingZeros64(special) / 8 // the first such byte is a true one
		}
		switch c := b[i]; {
		case c == '"':
			return i + 1
		case c < ' ':
			return -1
		case c == '\\':
			if i = skipEscape(b, i); i < 0 {
				return -1
			}
		default:
			i++
		}
	}
	return -1
}

func skipEscape(b []byte, i int) int {
	if i+1 >= len(b) {
		return -1
	}
	switch b[i+1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return i + 2
	case 'u':
		if i+6 > len(b) {
			return -1
		}
		for _, c := range b[i+2 : i+6] {
			if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'f') {
				return -1
			}
		}
		return i + 6
	}
	return -1
}

// skipNumber reads a sign, a whole part without leading zeros, a fraction and an
// exponent.
func skipNumber(b []byte, i int) int {
	if i < len(b) && b[i] == '-' {
		i++
	}
	if i < len(b) && b[i] == '0' {
		i++
	} else {
		i = skipDigits(b, i)
	}
	if uint(i) < uint(len(b)) && b[i] == '.' {
		i = skipDigits(b, i+1)
	}
	if uint(i) < uint(len(b)) && b[i]|0x20 == 'e' {
		if i++; i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		i = skipDigits(b, i)
	}
	return i
}

// skipDigits reads one digit or more.
func skipDigits(b []byte, i int) int {
	start := i
	for i < len(b) && b[i]-'0' <= 9 {
		i++
	}
	if i == start {
		return -1
	}
	return i
}
