package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// What a tracker may say.

const (
	maxViewerMessage = 64 << 10
	maxData          = 64 << 10 // of a report, or of what is passed on to viewers
	maxMetadata      = maxFields * maxField
	maxField         = 512     // of the documented fields, where only those are kept
	maxErrorField    = 4 << 10 // the same of errors
	maxFields        = 16      // of such fields so many have room
	maxText          = 2 << 10 // of a user's id and a URL
	maxNesting       = 500     // of metadata and errors: PostgreSQL and encoding/json have their limits
	minToken         = 16      // shorter ones are none, and so are those beyond maxToken
	maxToken         = 128
	startTime        = 25 * time.Second // for the start of a session; tracker.js gives a connection up after 30 s
	maxSeq           = 1 << 53          // numbers in JavaScript are exact up to here
	pageBytes        = 4 << 20          // of JSON in a page of events, unless one event is larger
	maxPage          = 1000             // events in a session_events answer
)

// core is what connections and requests work with. log is logs.app; logs has the other loggers too.
type core struct {
	cfg      config
	hub      *hub
	store    *store
	budget   *budget
	outgoing *budget // of answers to requests
	metrics  *metrics
	logs     *logs
	log      *slog.Logger
}

// tracker is a page that records itself. One goroutine at a time calls handle.
type tracker struct {
	*core
	ctx context.Context // ends with its connection
	out *outbox

	id string // of the session that it records; empty for none
	// A start that names asked again means the session that the tracker got for it.
	asked string // the id that the tracker had asked for
	// last stays when the session has ended: a post waits for its commit.
	last  string // the last that it has recorded
	token string // it continues the session; empty for none
	share bool   // several may record one session: they cannot number their batches

	continues bool // the session was there before: it is not counted as begun

	mayStart func() bool // counts a session that its address begins, and says whether it may
	started  func()      // called when the connection has started a session, if set
}

// handle does what a message asks. kept is how much of the message's room in the
// budget the hub has from now on.
func (t *tracker) handle(msg []byte) (kept int64, err error) {
	f, err := parseFrame(msg)
	if err != nil {
		return 0, &protocolError{"invalid_message", err.Error()}
	}
	switch f.typ {
	case "events_batch":
		return t.takeBatch(f)
	case "session_start":
		return 0, t.startSession(f)
	case "session_end":
		return 0, t.endSession(f)
	case "error", "javascript_error", "promise_rejection":
		return t.takeReport(f)
	case "visibility_change":
		return 0, t.passOn(f)
	case "heartbeat":
		return 0, nil
	case "get_active_sessions", "viewer_join_session", "viewer_leave_session", "get_session_events":
		return 0, errForbidden
	}
	return 0, errUnknownType
}

// What a tracker or a viewer is told of a single message; the connection goes on.
var (
	errForbidden   = &protocolError{"forbidden", "this type of connection may not send that"}
	errUnknownType = &protocolError{"unknown_type", "unknown message type"}
	errNotStarted  = &protocolError{"no_session", "this connection records no session: send session_start"}
	errNoSession   = &protocolError{"not_found", "no such session"}
)

// takeBatch passes a message's events on to the hub, which tells the client where it does not take
// them.
func (t *tracker) takeBatch(f frame) (kept int64, err error) {
	switch {
	case t.id == "":
		return 0, errNotStarted
	case !f.objects:
		return 0, &protocolError{"invalid_events", `"events" must be an array of objects`}
	case len(f.events) > maxBatchEvents:
		return 0, &protocolError{"invalid_events", fmt.Sprintf("a batch has at most %d events", maxBatchEvents)}
	}
	seq, err := parseSeq(f)
	if err != nil {
		return 0, err
	}
	b := newBatch(t.id, f, seq)
	t.hub.send(publish{t.out, t.id, b, nil})
	return b.cost, nil
}

// parseSeq gives a batch's number, 0 for one without.
func parseSeq(f frame) (int64, error) {
	if f.seq == nil {
		return 0, nil
	}
	seq, err := strconv.ParseInt(string(f.seq), 10, 64)
	if err != nil || seq < 1 || seq > maxSeq {
		return 0, &protocolError{"invalid_message", `"seq" must be a whole number from 1 to 2^53`}
	}
	return seq, nil
}

// sequenceGap tells a tracker from which number it is to send again.
func sequenceGap(expected int64) text {
	return envelope("error", map[string]any{
		"code": "sequence_gap", "message": fmt.Sprintf("expected seq %d", expected), "expected": expected})
}

// endSession does nothing where another session than this connection's is named.
func (t *tracker) endSession(f frame) error {
	if t.id == "" {
		return errNotStarted
	}
	var data sessionID
	json.Unmarshal(f.data, &data)
	if data.ID == "" || data.ID == t.id || data.ID == t.asked {
		t.hub.send(finish{t.out})
		t.id = ""
	}
	return nil
}

// ofErrors are the members that are kept of an error which says too much.
var ofErrors = []string{"message", "reason", "error", "stack", "timestamp", "filename", "lineno", "colno", "url"}

// takeReport stores an error of the page, and passes it on if viewers know its
// type.
func (t *tracker) takeReport(f frame) (kept int64, err error) {
	if t.id == "" {
		return 0, errNotStarted
	}
	seq, err := parseSeq(f)
	if err != nil {
		return 0, err
	}
	data := f.data
	if data == nil {
		data = []byte("null")
	}
	if len(data) > maxData || nests(data, maxNesting) {
		data = excerpt(data, ofErrors, maxErrorField)
	}
	var m message
	if f.typ != "error" {
		if m, err = withSession(f.typ, data, t.id); err != nil {
			return 0, err
		}
	}
	b := newReport(f.typ, data, seq)
	t.hub.send(publish{t.out, t.id, b, m})
	return b.cost, nil
}

// passOn sends visibility_change as it is to the session's viewers.
func (t *tracker) passOn(f frame) error {
	if t.id == "" {
		return errNotStarted
	}
	if len(f.data) > maxData {
		return &protocolError{"too_large", "data is larger than 64 KiB"}
	}
	m, err := withSession(f.typ, f.data, t.id)
	if err != nil {
		return err
	}
	var page struct{ Hidden bool }
	json.Unmarshal(f.data, &page) // what is no bool leaves it false
	t.hub.send(visibility{t.out, m, page.Hidden})
	return nil
}

// withSession makes a message of data as the page sent it and the session's id.
// The id stands last: of two keys the last counts.
func withSession(typ string, data []byte, id string) (message, error) {
	if len(data) == 0 || data[0] != '{' {
		return nil, &protocolError{"invalid_message", `"data" must be an object`}
	}
	inner := strings.TrimSpace(string(data[1 : len(data)-1]))
	if inner != "" {
		inner += ","
	}
	return text(`{"type":"` + typ + `","data":{` + inner + `"sessionId":"` + id + `"}}`), nil
}

// What a session_start says.

// validID lets nothing through that JSON, a header or a file's name would have to escape: they are
// made without looking at the id again.
var (
	isID    = regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,128}$`).MatchString
	noIDs   = []string{".", "..", "active", "cleanup", "export"} // paths have another meaning with them
	validID = func(id string) bool { return isID(id) && !slices.Contains(noIDs, id) }
)

// start is a session_start, read; begin writes into id and token what the tracker got.
type start struct {
	id     string
	about  description
	resume bool // the tracker numbers its batches and knows tokens
	token  string
	create bool  // a session that is not there gets this token
	page   int64 // the page's number in its tab; 0: it has none
	first  int64 // number of the page's first batch
}

// documented are the members of a session_start that lists show.
var documented = []string{"sessionId", "userId", "url", "userAgent", "viewport", "startTime", "referrer", "timeZone",
	"lastUrl", "pages", "clicks"}

// parseStart reads a session_start's data. What it does not understand stays in
// the metadata and is no reason not to record.
func parseStart(data []byte) start {
	var st start
	members(data, func(name string, _, value []byte) {
		switch name {
		case "sessionId":
			st.id = cut(unquote(value), maxText)
		case "userId":
			st.about.userID = clean(plainText(value))
		case "url":
			st.about.url = clean(plainText(value))
		case "resume":
			if st.resume, st.token = true, unquote(value); len(st.token) > maxToken {
				st.token = ""
			}
		case "create":
			st.create = string(value) == "true"
		case "page":
			st.page = max(0, wholeNumber(value, 0))
		case "firstSeq":
			st.first = wholeNumber(value, 0)
		}
	})
	if !st.resume {
		st.create, st.page, st.first = false, 0, 0 // without resume they are metadata
	}
	if len(data) > maxMetadata || nests(data, maxNesting) {
		data = excerpt(data, documented, maxField)
	}
	st.about.metadata = withDefaults(data)
	st.about.brief = excerpt(st.about.metadata, documented, maxField)
	return st
}

// defaults are what lists have of a session that does not say.
var defaults = []struct{ name, value string }{
	{"viewport", `{"width":1920,"height":1080,"devicePixelRatio":1}`}, {"referrer", `""`}, {"timeZone", `"UTC"`}}

// withDefaults copies a session_start's data as it was sent, without "resume", which
// is a secret, and adds the defaults that are missing.
func withDefaults(data []byte) []byte {
	out, has := []byte("{"), map[string]bool{}
	members(data, func(name string, key, value []byte) {
		if has[name] = true; name != "resume" {
			out = fmt.Appendf(out, "%s:%s,", key, value)
		}
	})
	for _, d := range defaults {
		if !has[d.name] {
			out = fmt.Appendf(out, "%q:%s,", d.name, d.value)
		}
	}
	return endObject(out)
}

// excerpt copies the members of a JSON object that have these names. Strings are cut to
// most bytes. A value that has over twice as many, or nests too deep, is left out, and so
// is what would go beyond maxFields * most bytes. Of a name that stands twice the last counts.
func excerpt(object []byte, names []string, most int) []byte {
	out, last, order := []byte("{"), map[string][]byte{}, []string{}
	members(object, func(name string, _, value []byte) {
		if !slices.Contains(names, name) {
			return
		}
		if last[name] == nil {
			order = append(order, name)
		}
		last[name] = value
	})
	for _, name := range order {
		value := last[name]
		if len(value) > most && value[0] == '"' {
			value = encodeJSON(cut(unquote(value), most))
		}
		if len(value) <= 2*most && len(out)+len(value) < maxFields*most && !nests(value, maxNesting) {
			out = fmt.Appendf(out, "%q:%s,", name, value) // twice: a string grows by its escapes
		}
	}
	return endObject(out)
}

// endObject ends an object in the making, of which each member has its comma.
func endObject(out []byte) []byte { return append(bytes.TrimSuffix(out, []byte(",")), '}') }

// encodeJSON encodes what is known to be fit for JSON. Of raw JSON in it only
// the white space is left out.
func encodeJSON(v any) []byte {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n"))
}

// plainText gives a string's text, nothing for null, and any other value as it stands.
func plainText(value []byte) string {
	if value[0] == '"' {
		return unquote(value)
	}
	if string(value) == "null" {
		return ""
	}
	return string(value)
}

// clean makes text fit for a column and a log line.
func clean(s string) string {
	return cut(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return utf8.RuneError
		}
		return r
	}, s), maxText)
}

// cut gives the first bytes of a text, and of a character all or nothing.
func cut(s string, most int) string {
	if len(s) > most {
		s = strings.Clone(strings.ToValidUTF8(s[:most], "")) // otherwise all of s would stay in memory
	}
	return s
}

// Starting a session.

// startSession begins or continues a session. A session that the tracker records
// already is claimed once more, for what is new in its metadata.
func (t *tracker) startSession(f frame) error {
	st := parseStart(f.data)
	asked, known := st.id, ""
	switch {
	case t.id == "":
	case st.id == "" || st.id == t.id || st.id == t.asked:
		st.id, st.token, asked, known = t.id, t.token, t.asked, t.id
	default:
		t.hub.send(finish{t.out})
		t.id = ""
	}
	// known is the session that this connection records, where the start means that.
	got, err := t.begin(&st, known != "")
	if err == errLaterPage {
		t.id, t.asked, t.last = st.id, asked, st.id // its batches are taken where their numbers fit
	}
	if err != nil {
		return err
	}
	t.id, t.asked, t.last, t.token = st.id, asked, st.id, st.token
	if t.started != nil && t.id != known {
		t.started()
	}
	if t.id != asked && t.id != known && !t.share { // rrweb's client would show it on the console
		t.out.send(envelope("session_assigned", sessionID{t.id}))
	}
	if st.resume {
		t.out.send(envelope("session_ready", map[string]any{
			"sessionId": t.id, "resume": t.token, "lastSeq": got.stored, "accepted": got.accepted}))
	}
	return nil
}

// begin gets the session that was asked for, or a new one where the tracker may not
// have that. It writes the session's id and token into st. A session that this
// connection has begun before is counted already.
func (t *tracker) begin(st *start, counted bool) (attached, error) {
	resuming, isNew := len(st.token) >= minToken, !validID(st.id)
	for attempt := 0; ; attempt++ {
		if isNew {
			st.id, st.token, resuming, t.continues = rand.Text(), "", false, false
		}
		if begins := !resuming && !t.continues; begins && !counted {
			if !t.mayStart() {
				return attached{}, errTooMany
			}
			counted = true
		}
		got, err := t.claim(st, resuming)
		switch {
		// No row has this id and token: the session is begun with them.
		case err == errToken && resuming && st.create:
			resuming = false
		case err == errTaken && (t.share || st.create && attempt < 6) && pause(t.ctx, attempt):
			// Another is about to begin it: 6 attempts outlast its claim, unless the database is slow.
			resuming = st.create
		case err == errTaken, err == errToken:
			isNew = true
		case err != nil:
			return attached{}, err
		case got.outdated:
			t.out.closeAfterSending(closeTaken, "the session continues on another connection")
			return attached{}, net.ErrClosed
		default:
			return got, nil
		}
	}
}

// No client is told errTaken, nor the store's errToken: begin finds another session.
var (
	errTaken     = errors.New("another connection records the session")
	errLaterPage = &protocolError{"later_page", "a later page of the tab records the session"}
	errTooMany   = &protocolError{"too_many_sessions", "too many sessions in a minute from this address"}
)

// claim reserves a session in the hub, claims it in the database, and attaches
// it: three steps, so that two trackers of one session meet before either has
// changed its row.
// With resuming, the token in st must open the row. A tracker that joins gets zeros.
func (t *tracker) claim(st *start, resuming bool) (attached, error) {
	reserved, answer := unreserve{st.id, st.about.cost()}, make(chan reservation, 1)
	r, ok := ask(t.hub, answer, reserve{t.out, st.id, resuming, t.share, reserved.cost, answer})
	switch {
	case !ok:
		return attached{}, net.ErrClosed
	case r == taken:
		return attached{}, errTaken
	case r == alone:
		return attached{}, errToken
	case r == noRoom:
		return attached{}, &protocolError{"too_many_sessions", "too many sessions are live: try again later"}
	case r == joins:
		return attached{}, nil
	}
	if st.resume && len(st.token) < minToken {
		st.token = rand.Text()
	}
	about := st.about
	won, err := t.claimRow(st, &about, resuming)
	if err != nil {
		t.hub.send(reserved)
		return attached{}, err
	}
	about.userID = won.userID
	reply := make(chan attached, 1)
	started := sessionStarted(st.id, &about)
	got, ok := ask(t.hub, reply, attach{reserved, t.out, won, &about, started, st.first, t.share, reply})
	if !ok {
		return got, net.ErrClosed
	}
	return got, nil
}

// claimRow waits for the database when it is away, but not for as long as pages
// wait: a page that has given this connection up claims its session by another,
// and the later claim would win, be it a dead connection's.
func (t *tracker) claimRow(st *start, about *description, resuming bool) (claim, error) {
	keepUser := about.userID == "" // the one that the session has, if any
	if keepUser {
		about.userID = "user_" + strings.ToLower(rand.Text()[:12])
	}
	ctx, cancel := context.WithTimeout(t.ctx, startTime)
	defer cancel()
	for attempt := 0; ; attempt++ {
		won, err := t.store.claim(ctx, st.id, about, keepUser, st.token, resuming, st.page)
		switch {
		case err == nil, err == errToken, err == errLaterPage:
			t.store.last.Store(nil)
			return won, err
		case isDataError(err):
			t.log.Warn("session refused by the database", "session", st.id, "err", err)
			return won, &protocolError{"not_stored", "the database refused the session's data"}
		case ctx.Err() == nil:
			t.metrics.databaseErrors.Add(1)
			t.store.failed(err)
			if attempt == 0 {
				t.log.Warn("session waits for the database", "session", st.id, "err", err)
			}
		}
		if !pause(ctx, attempt) {
			t.out.closeAfterSending(closeTryAgain, "the database is away: try again later")
			return won, ctx.Err()
		}
	}
}
