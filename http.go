package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"nhooyr.io/websocket"
)

// server answers HTTP and WebSocket requests. It owns the connections' readers
// and writers; its parts are safe for concurrent use.
type server struct {
	core
	// The writers are started by run; files are by their base names, and never change.
	writers []*writer
	access  *access
	audit   *audit
	fetches *fetches
	started time.Time
	files   map[string]asset
	reason  atomic.Pointer[string] // why the server is unhealthy, "" when it is not

	reasonLogged time.Time // beat's own

	ctx  context.Context // ends the connections when all else has failed
	open sync.Map        // of *conn: those to be told when the server stops
}

// route is a pattern of net/http, for whom it is, and what answers.
type route struct {
	pattern string
	who     audience
	handle  http.HandlerFunc
}

// table is all that the server answers.
func (s *server) table() []route {
	return []route{
		{"GET /{$}", browsers, s.handleRoot},
		{"GET /ws", sockets, s.handleWebSocket},
		{"POST /ws", sockets, s.handlePost},
		{"GET /recordings/{id}/events/ws", sockets, s.handleWebSocket}, // of rrweb's own client, as the next
		{"POST /recordings/{id}/events", sockets, s.handlePost},
		{"GET /health", anyone, s.query(s.handleHealth)},
		{"GET /stats", viewers, s.query(s.handleStats)},
		{"GET /metrics", scrapers, s.query(s.handleMetrics)},
		{"GET /sessions", viewers, s.query(s.withRoom(s.handleSessions), append(filterNames, "limit", "offset")...)},
		{"DELETE /sessions", viewers, s.query(s.handleDeleteUser, "userId")},
		{"GET /sessions/export", viewers, s.query(s.withRoom(s.handleExportUser), "userId")},
		{"GET /sessions/active", viewers, s.query(s.withRoom(s.handleActive))},
		{"GET /sessions/{id}", viewers, s.query(s.withRoom(s.handleSession), "chunksFrom")},
		{"GET /sessions/{id}/events", viewers, s.query(s.handleEvents, "fromIndex", "limit")},
		{"GET /sessions/{id}/errors", viewers, s.query(s.withRoom(s.handleErrors))},
		{"GET /sessions/{id}/chunks/{index}", viewers, s.query(s.handleChunk, "of")},
		{"GET /sessions/{id}/export", viewers, s.query(s.handleExport)},
		{"DELETE /sessions/cleanup", viewers, s.query(s.handleCleanup, "maxAgeHours")},
		{"DELETE /sessions/{id}", viewers, s.query(s.handleDelete)},
		{"GET /view/{id}", browsers, s.page("view.html", mediaPolicy(s.cfg.mediaOrigins))},
		{"POST /signin", visitors, s.handleSignIn},
		{"POST /signout", visitors, s.handleSignOut},
		{"GET /demo", anyone, s.page("demo.html", demoPolicy)},
		{"GET /demo/{page}", anyone, s.page("demo.html", demoPolicy)},
		{"GET /assets/{file}", anyone, s.handleAsset},
		{"GET /tracker.js", anyone, s.handleTracker},
	}
}

// routes gives the handler of all requests. What no route takes is answered as
// the mux would, but in JSON.
// It owns the headers that each answer has; a handler may replace Cache-Control, and adds to Vary.
func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	for _, route := range s.table() {
		mux.HandleFunc(route.pattern, s.guard(route))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer s.recoverHandler(w, r)
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Vary", "Origin")
		h.Set("Cache-Control", "no-store") // unless a handler knows better
		if s.allowOrigin(w, r) {
			return
		}
		if builtIn, pattern := mux.Handler(r); pattern == "" {
			answer := &statusOnly{ResponseWriter: w}
			builtIn.ServeHTTP(answer, r)
			s.fail(w, r, answer.status, strings.ToLower(http.StatusText(answer.status)), nil)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// statusOnly keeps back an answer's status and body, but not its header.
type statusOnly struct {
	http.ResponseWriter
	status int
}

func (a *statusOnly) WriteHeader(status int)         { a.status = status }
func (a *statusOnly) Write(body []byte) (int, error) { return len(body), nil }

// recoverHandler logs a handler's panic and answers for it.
func (s *server) recoverHandler(w http.ResponseWriter, r *http.Request) {
	switch v := recover(); v {
	case nil:
	case http.ErrAbortHandler:
		panic(v)
	default:
		s.logs.exception("handler", v, debug.Stack())
		s.fail(w, r, http.StatusInternalServerError, "internal error", nil)
	}
}

// allowOrigin lets pages of other sites read the answer: pages that may record,
// what a tracker is told, and those of VIEWER_ORIGINS the rest. It answers a
// browser that asks beforehand, and says so.
func (s *server) allowOrigin(w http.ResponseWriter, r *http.Request) (answered bool) {
	h, origin, asks := w.Header(), r.Header.Get("Origin"), r.Method == http.MethodOptions
	methods, headers, allowed := "GET, DELETE", "Authorization", slices.Contains(s.access.viewerOrigins, origin)
	if isTracker(r) {
		methods, headers = "POST", "Authorization, Content-Encoding, Content-Type"
		allowed = s.access.mayRecord(r)
		if asks && !allowed {
			s.deny(w, r, false, deniedOrigin)
			return true
		}
	}
	if !allowed || origin == "" {
		return false
	}
	h.Set("Access-Control-Allow-Origin", origin)
	if asks {
		h.Set("Access-Control-Allow-Methods", methods)
		h.Set("Access-Control-Allow-Headers", headers)
		h.Set("Access-Control-Max-Age", "600")
		w.WriteHeader(http.StatusNoContent)
	}
	return asks
}

// guard lets in the audience of the route. A link with the token gives the browser
// the cookie, and sends it on to the same URL without the token.
func (s *server) guard(route route) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		page := route.who == browsers && isBrowser(r)
		if d := s.access.admit(route.who, r); d != nil {
			s.deny(w, r, page, d)
			return
		}
		if query := r.URL.Query(); page && query.Has("token") {
			if s.access.isToken(query.Get("token")) { // a cookie may have let in what the token does not
				s.signIn(w, r)
			}
			query.Del("token")
			w.Header().Set("Referrer-Policy", "no-referrer")
			clean := url.URL{Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: query.Encode()}
			http.Redirect(w, r, clean.String(), http.StatusSeeOther)
			return
		}
		route.handle(w, r)
	}
}

// isBrowser reports whether to answer with a page rather than with JSON.
func isBrowser(r *http.Request) bool { return strings.Contains(r.Header.Get("Accept"), "text/html") }

// deny answers a request that is not let in; with page, by the sign-in page.
func (s *server) deny(w http.ResponseWriter, r *http.Request, page bool, d *denial) {
	s.metrics.refuse(d.reason)
	if d.reason == "wrong_token" {
		s.audit.once(s.access.address(r), "sign-in refused")
	}
	if isTracker(r) {
		s.fetches.count(originOf(r), func(c *originCounts) { c.Refusals[d.reason]++ })
	}
	h := w.Header()
	if d.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(d.retryAfter))
	}
	if d.status != http.StatusUnauthorized {
		s.fail(w, r, d.status, d.message, nil)
		return
	}
	h.Set("WWW-Authenticate", "Bearer")
	if _, err := r.Cookie(s.access.cookieName); err == nil && !s.access.signedIn(r) {
		s.access.signIn(w, r, -1) // the cookie stands for another token: the browser forgets it
	}
	file, ok := s.files["signin.html"]
	if !page || !ok {
		s.fail(w, r, d.status, d.message, nil)
		return
	}
	if r.Header.Get("Sec-Fetch-Site") == "cross-site" {
		// The browser followed a link of another site and kept its SameSite=Strict
		// cookie back. It loads the page again: that request is of this site.
		h.Set("Refresh", "0")
	}
	h.Set("Content-Security-Policy", viewerPolicy)
	h.Set("Content-Type", file.contentType)
	w.WriteHeader(d.status)
	w.Write(file.body)
}

const signInAge = 30 * 24 * 60 * 60 // seconds

// handleSignIn lets everybody pass, without a cookie, where there is no token.
func (s *server) handleSignIn(w http.ResponseWriter, r *http.Request) {
	var body struct{ Token string }
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10)).Decode(&body); err != nil {
		s.fail(w, r, http.StatusBadRequest, `the body must be {"token": …}`, nil)
		return
	}
	if s.access.isToken(body.Token) {
		s.signIn(w, r)
	} else if !s.access.open {
		s.deny(w, r, false, deniedToken)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// signIn gives the cookie to a browser that has the token.
func (s *server) signIn(w http.ResponseWriter, r *http.Request) {
	s.access.signIn(w, r, signInAge)
	s.audit.note(s.access.address(r), "signed in")
}

// handleSignOut takes the cookie away, and the recordings that the browser has
// kept.
func (s *server) handleSignOut(w http.ResponseWriter, r *http.Request) {
	s.access.signIn(w, r, -1)
	w.Header().Set("Clear-Site-Data", `"cache"`)
	w.WriteHeader(http.StatusNoContent)
}

// fail answers with an error, and logs its cause.
func (s *server) fail(w http.ResponseWriter, r *http.Request, status int, reason string, cause error) {
	if cause != nil {
		s.log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "status", status, "err", cause)
	}
	s.write(w, status, map[string]string{"error": reason})
}

// write answers with JSON. The request may have waited longer than WriteTimeout
// for room or for the database: the answer has a minute of its own.
func (s *server) write(w http.ResponseWriter, status int, v any) {
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Minute))
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	w.Write(encodeJSON(v))
}

// query makes a handler of one that takes these parameters and may fail. A handler
// that fails has written nothing: its error is answered here.
func (s *server) query(handle queryHandler, names ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		err := checkParams(r, names)
		if err == nil && strings.Contains(r.Pattern, "{id}") && !validID(r.PathValue("id")) {
			err = errNotFound
		}
		if err == nil {
			err = handle(w, r)
		}
		bad, isBad := errors.AsType[badRequest](err)
		switch {
		case err == nil:
		case isBad:
			s.fail(w, r, http.StatusBadRequest, bad.Error(), nil)
		case errors.Is(err, errNotFound):
			s.fail(w, r, http.StatusNotFound, "no such session", nil)
		case errors.Is(err, errDamaged):
			s.fail(w, r, http.StatusInternalServerError, errDamaged.Error(), err)
		case errors.Is(err, errClocks):
			s.fail(w, r, http.StatusServiceUnavailable, err.Error(), nil)
		case r.Context().Err() != nil: // the client has left
		default:
			s.metrics.databaseErrors.Add(1)
			s.fail(w, r, http.StatusServiceUnavailable, "the database does not answer", err)
		}
	}
}

// queryHandler answers, or gives an error; never both.
type queryHandler func(http.ResponseWriter, *http.Request) error

// withRoom makes a handler wait until memory has room for a list: its rows, and their JSON.
func (s *server) withRoom(handle queryHandler) queryHandler {
	return func(w http.ResponseWriter, r *http.Request) error {
		const room = 2 * pageBytes
		if s.outgoing.take(r.Context(), room) != nil {
			return nil // the client has left
		}
		defer s.outgoing.give(room)
		return handle(w, r)
	}
}

// badRequest is an error that the client can mend.
type badRequest string

func (b badRequest) Error() string { return string(b) }

// queryNumber reads a whole number from the query string, between bounds.
func queryNumber(r *http.Request, name string, preset, least, most int64) (int64, error) {
	raw := r.URL.Query().Get(name)
	if raw == "" {
		return preset, nil
	}
	n, err := strconv.ParseInt(raw, 10, 64)
	if err != nil || n < least || n > most {
		return 0, badRequest(fmt.Sprintf("%s must be a whole number from %d to %d", name, least, most))
	}
	return n, nil
}

// WebSocket.

// enter counts a tracker's or a viewer's connection: the caller lets it leave. Otherwise
// it answers why not. A path with an id is that of rrweb's own client.
func (s *server) enter(w http.ResponseWriter, r *http.Request) (addr netip.Addr, ok bool) {
	if strings.Contains(r.Pattern, "{id}") && !validID(r.PathValue("id")) {
		s.fail(w, r, http.StatusBadRequest, "this is no id of a recording", nil)
		return addr, false
	}
	addr = s.access.address(r)
	d := s.access.enter(addr)
	if d != nil {
		s.deny(w, r, false, d)
	}
	return addr, d == nil
}

// handleWebSocket makes a WebSocket of a request. Browsers compress what a tracker
// sends; the server compresses nothing, which would take 1.2 MB for each that it
// writes to.
// InsecureSkipVerify leaves the Origin to guard, which has looked at it.
func (s *server) handleWebSocket(w http.ResponseWriter, r *http.Request) {
	kind := r.URL.Query().Get("type")
	if kind != "" && kind != "tracker" && kind != "viewer" {
		s.fail(w, r, http.StatusBadRequest, `type must be "tracker" or "viewer"`, nil)
		return
	}
	addr, ok := s.enter(w, r)
	if !ok {
		return
	}
	isViewer := !isTracker(r)
	h := &hijacker{ResponseWriter: w}
	options := websocket.AcceptOptions{InsecureSkipVerify: true}
	if !isViewer {
		h.wire = &s.metrics.wireBytes
		options.CompressionMode, options.CompressionThreshold = websocket.CompressionNoContextTakeover, math.MaxInt
	}
	ws, err := websocket.Accept(h, r, &options)
	if err != nil {
		s.access.leave(addr) // Accept has answered
		return
	}
	ws.SetReadLimit(-1) // conn.read has its own
	c := &conn{core: &s.core, ws: ws, net: h.conn, out: newOutbox(), unbudgeted: isViewer}
	if w.Header().Get("Sec-WebSocket-Extensions") != "" {
		c.inflater = inflater
	}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	if isViewer {
		c.maxMessage = maxViewerMessage
		c.handle = (&viewer{&s.core, c.ctx, c.out, func(id string) { s.audit.open(addr, id) }}).handle
	} else {
		s.newTracker(c, r, addr)
	}
	go s.serveWebSocket(c, addr, isViewer) // ends with the connection
}

// newTracker makes the tracker that handles what a connection brings.
func (s *server) newTracker(c *conn, r *http.Request, addr netip.Addr) *tracker {
	origin, recording := originOf(r), strings.Clone(r.PathValue("id")) // of the request no more is kept
	t := &tracker{core: &s.core, ctx: c.ctx, out: c.out, share: recording != ""}
	t.mayStart = func() bool { return s.access.mayStart(addr, s.cfg.maxSessionsPerMinute) }
	t.started = func() { s.fetches.count(origin, func(c *originCounts) { c.Sessions++ }) }
	c.maxMessage, c.handle = s.cfg.maxMessageBytes, t.handle
	if recording != "" {
		c.handle = (&rrwebClient{tracker: t, recording: recording}).handle
	}
	return t
}

// serveWebSocket is a connection from its handshake to its end.
func (s *server) serveWebSocket(c *conn, addr netip.Addr, isViewer bool) {
	defer s.access.leave(addr)
	c.open()
	s.open.Store(c, nil)
	defer s.open.Delete(c)
	defer c.close()
	if !s.hub.send(enter{c.out, isViewer}) {
		c.out.closeAfterSending(closeGoingAway, "the server stops")
	}
	defer s.hub.send(leave{c.out})
	c.serve()
}

// closeAll tells every connection that the server stops, also those that are
// about to open, and waits until all have ended or ctx has.
func (s *server) closeAll(ctx context.Context) {
	s.budget.open()
	for s.access.close() > 0 && ctx.Err() == nil {
		s.open.Range(func(c, _ any) bool {
			c.(*conn).out.closeAfterSending(closeGoingAway, "the server stops")
			return true
		})
		time.Sleep(5 * time.Millisecond)
	}
}

// Recordings.

// maxIndex is beyond any event's number; JavaScript counts up to it.
const maxIndex = 1 << 53

// handleEvents holds the page's room for as long as the client takes to read it.
func (s *server) handleEvents(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	from, err := queryNumber(r, "fromIndex", 0, 0, maxIndex)
	limit, err2 := queryNumber(r, "limit", 1000, 1, 10000)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	p, err := s.eventPage(r.Context(), id, from, limit, `{"sessionId":"`+id+`","events":[`)
	defer p.release()
	if err != nil {
		return err
	}
	s.audit.open(s.access.address(r), id)
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	s.writeSlowly(w, fmt.Appendf(p.text, `],"fromIndex":%d,"count":%d}`, from, p.count))
	return nil
}

// writeSlowly lets a large answer take any time, as long as the client reads. One that has left is
// no error here: the request's context has ended.
func (s *server) writeSlowly(w http.ResponseWriter, body []byte) {
	for piece := range slices.Chunk(body, writePiece) {
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Minute))
		if _, err := w.Write(piece); err != nil {
			return
		}
	}
}

// handleChunk sends a row's bytes as they are, where the client takes gzip.
func (s *server) handleChunk(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	first, err := strconv.ParseInt(r.PathValue("index"), 10, 64)
	if err != nil {
		return errNotFound
	}
	// A page without events, for its room alone.
	room := &page{budget: s.outgoing}
	defer room.release()
	c, err := s.store.chunkWith(r.Context(), id, first, room.grow)
	if err == nil && c.first != first {
		err = errNotFound
	}
	if err != nil {
		return err
	}
	data := c.events
	s.audit.open(s.access.address(r), id)
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Cache-Control", "private, max-age=86400, immutable")
	h.Add("Vary", "Accept-Encoding")
	if takesGzip(r) {
		h.Set("Content-Encoding", "gzip")
	} else if data, err = unzip(data, c.raw); err != nil {
		s.fail(w, r, http.StatusInternalServerError, "the chunk is damaged", err)
		return nil
	}
	room.text = data
	room.shrink()
	h.Set("Content-Length", strconv.Itoa(len(data)))
	s.writeSlowly(w, data)
	return nil
}

// Sessions.

const maxChunks = 10_000 // in one answer

// sessionJSON is a session as lists show it.
type sessionJSON struct {
	sessionID
	UserID        string          `json:"userId"`
	Metadata      json.RawMessage `json:"metadata"`
	EventCount    int64           `json:"eventCount"`
	ErrorCount    int64           `json:"errorCount"`
	IsActive      bool            `json:"isActive"`
	CreatedAt     time.Time       `json:"createdAt"`
	UpdatedAt     time.Time       `json:"updatedAt"`
	EndedAt       *time.Time      `json:"endedAt"`
	StartTime     *int64          `json:"startTime"`
	EndTime       *int64          `json:"endTime"`
	StoredBytes   int64           `json:"storedBytes"`
	RawBytes      int64           `json:"rawBytes"`
	SnapshotIndex *int64          `json:"snapshotIndex"`
	State         string          `json:"state,omitempty"` // of a live session: see session.state
}

// nullable gives a number as JSON has it: null for the one that stands for none.
func nullable(n, none int64) *int64 {
	if n == none {
		return nil
	}
	return &n
}

// utc gives a time in UTC, since pgx reads them in the local zone; nil stays nil.
func utc(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	return new(t.UTC())
}

// toJSON gives a row as lists show it.
func toJSON(row storedSession) sessionJSON {
	now := row.now
	return sessionJSON{
		sessionID: sessionID{row.id}, UserID: row.about.userID, Metadata: row.about.brief,
		EventCount: now.events, ErrorCount: now.errors, StoredBytes: now.stored, RawBytes: now.raw,
		IsActive:  row.isActive,
		CreatedAt: row.createdAt.UTC(), UpdatedAt: row.updatedAt.UTC(), EndedAt: utc(row.endedAt),
		StartTime: nullable(now.firstTime, 0), EndTime: nullable(now.endTime, 0),
		SnapshotIndex: nullable(now.snapshot, -1),
	}
}

// listJSON gives the rows of a list, as many as a page has room for. Only live sessions
// in this server's memory have a state.
func (s *server) listJSON(rows []storedSession) []sessionJSON {
	ids := make([]string, len(rows))
	for i, row := range rows {
		ids[i] = row.id
	}
	reply := make(chan map[string]string, 1)
	states, _ := ask(s.hub, reply, stateQuery{ids, reply})
	all, size := make([]sessionJSON, 0, len(rows)), 0
	for _, row := range rows {
		if size += row.listSize(); size > pageBytes && len(all) > 0 {
			break
		}
		one := toJSON(row)
		one.State = states[row.id]
		all = append(all, one)
	}
	return all
}

// handleActive lists what rows call live, of all servers; viewers' lists come from memory.
func (s *server) handleActive(w http.ResponseWriter, r *http.Request) error {
	rows, err := s.store.active(r.Context())
	if err != nil {
		return err
	}
	s.write(w, http.StatusOK, map[string]any{"sessions": s.listJSON(rows)})
	return nil
}

// handleSession answers from the database alone: what is not committed is not in it.
func (s *server) handleSession(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	from, err := queryNumber(r, "chunksFrom", 0, 0, maxIndex)
	if err != nil {
		return err
	}
	row, err := s.store.session(r.Context(), id)
	if err != nil {
		return err
	}
	chunks, err := s.store.chunks(r.Context(), id, from, maxChunks+1)
	if err != nil {
		return err
	}
	more := len(chunks) > maxChunks
	chunks = chunks[:min(len(chunks), maxChunks)]
	type chunkJSON struct {
		FromIndex     int64  `json:"fromIndex"`
		Count         int64  `json:"count"`
		StartTime     *int64 `json:"startTime"`
		EndTime       *int64 `json:"endTime"`
		SnapshotIndex *int64 `json:"snapshotIndex"`
		Bytes         int    `json:"bytes"`
	}
	seek := make([]chunkJSON, len(chunks))
	for i, c := range chunks {
		seek[i] = chunkJSON{c.first, c.count, nullable(c.startTime, 0), nullable(c.endTime, 0),
			nullable(c.snapshot, -1), c.raw}
	}
	s.audit.open(s.access.address(r), id)
	one := toJSON(row)
	one.Metadata = row.about.metadata
	s.write(w, http.StatusOK, struct {
		sessionJSON
		Chunks     []chunkJSON `json:"chunks"`
		MoreChunks bool        `json:"moreChunks"`
	}{one, seek, more})
	return nil
}

// handleErrors looks for the session first: one without errors is no 404.
func (s *server) handleErrors(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if _, err := s.store.session(r.Context(), id); err != nil {
		return err
	}
	reports, err := s.store.reports(r.Context(), id)
	if err != nil {
		return err
	}
	s.audit.open(s.access.address(r), id)
	s.write(w, http.StatusOK, map[string]any{"sessionId": id, "errors": reports})
	return nil
}
