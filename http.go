package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"nhooyr.io/websocket"
)

// server answers HTTP and WebSocket requests. It owns the connections' readers
// and writers; its parts are safe for concurrent use.
type server struct {
	cfg     config
	hub     *hub
	store   *store
	budget  *budget
	metrics *metrics
	writers []*writer
	access  *access
	logs    *logs
	log     *slog.Logger
	started time.Time
	files   map[string]asset

	ctx  context.Context // ends the connections when all else has failed
	open sync.Map        // of *conn: those to be told when the server stops
}

// route is a pattern of net/http, for whom it is, and what answers.
type route struct {
	pattern string
	who     who
	handle  http.HandlerFunc
}

// table is all that the server answers.
func (s *server) table() []route {
	return []route{
		{"GET /{$}", browsers, s.handleRoot},
		{"GET /ws", sockets, s.handleWebSocket},
		{"GET /health", anyone, s.handleHealth},
		{"GET /stats", viewers, s.handleStats},
		{"GET /metrics", scrapers, s.handleMetrics},
		{"GET /sessions", viewers, s.query(s.handleSessions)},
		{"GET /sessions/active", viewers, s.query(s.handleActive)},
		{"GET /sessions/{id}", viewers, s.query(s.handleSession)},
		{"GET /sessions/{id}/events", viewers, s.query(s.handleEvents)},
		{"GET /sessions/{id}/errors", viewers, s.query(s.handleErrors)},
		{"GET /sessions/{id}/chunks/{index}", viewers, s.query(s.handleChunk)},
		{"DELETE /sessions/cleanup", viewers, s.query(s.handleCleanup)},
		{"DELETE /sessions/{id}", viewers, s.query(s.handleDelete)},
		{"GET /view/{id}", browsers, s.handleView},
		{"POST /signin", visitors, s.handleSignIn},
		{"POST /signout", visitors, s.handleSignOut},
		{"GET /demo", anyone, s.handleDemo},
		{"GET /demo/{page}", anyone, s.handleDemo},
		{"GET /assets/{file}", anyone, s.handleAsset},
		{"GET /tracker.js", anyone, s.handleTracker},
	}
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	for _, route := range s.table() {
		mux.HandleFunc(route.pattern, s.guard(route))
	}
	mux.HandleFunc("/", s.guard(route{"/", anyone, s.handleElse(mux)}))
	return s.recovered(mux)
}

// guard lets in whom the route is for. Whoever comes to a page by a link with
// the token gets the cookie, and the page's URL without it.
func (s *server) guard(route route) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Vary", "Origin")
		if origin := r.Header.Get("Origin"); slices.Contains(s.access.viewerOrigins, origin) {
			h.Set("Access-Control-Allow-Origin", origin)
		}
		if d := s.access.admit(route.who, r); d != nil {
			s.deny(w, r, route.who == browsers && isBrowser(r), d)
			return
		}
		if query := r.URL.Query(); route.who == browsers && isBrowser(r) && query.Has("token") {
			query.Del("token")
			s.access.signIn(w, r, signInAge)
			h.Set("Referrer-Policy", "no-referrer")
			http.Redirect(w, r, (&url.URL{Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: query.Encode()}).String(), http.StatusSeeOther)
			return
		}
		route.handle(w, r)
	}
}

func isBrowser(r *http.Request) bool { return strings.Contains(r.Header.Get("Accept"), "text/html") }

// deny answers who is not let in; with page, by the sign-in page.
func (s *server) deny(w http.ResponseWriter, r *http.Request, page bool, d *denial) {
	s.metrics.refuse(d.reason)
	h := w.Header()
	if d.wait > 0 {
		h.Set("Retry-After", strconv.Itoa(int((d.wait+time.Second-1)/time.Second)))
	}
	if d.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
		if _, err := r.Cookie(s.access.cookieName); err == nil && !s.access.signedIn(r) {
			s.access.signIn(w, r, -1) // it is of another token: the browser need not try it again
		}
	}
	file, ok := s.files["signin.html"]
	if !page || !ok || d.status != http.StatusUnauthorized {
		s.fail(w, r, d.status, d.message, nil)
		return
	}
	if r.Header.Get("Sec-Fetch-Site") == "cross-site" {
		h.Set("Refresh", "0") // the cookie comes with requests of this site's own pages only: this is one now
	}
	h.Set("Content-Security-Policy", viewerPolicy)
	h.Set("Content-Type", file.contentType)
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(d.status)
	w.Write(file.body)
}

const signInAge = 30 * 24 * 60 * 60 // seconds

func (s *server) handleSignIn(w http.ResponseWriter, r *http.Request) {
	var body struct{ Token string }
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10)).Decode(&body); err != nil {
		s.fail(w, r, http.StatusBadRequest, `the body must be {"token": …}`, nil)
		return
	}
	if d := s.access.judge(r, s.access.open || same(body.Token, s.access.token)); d != nil {
		s.deny(w, r, false, d)
		return
	}
	s.access.signIn(w, r, signInAge)
	w.WriteHeader(http.StatusNoContent)
}

// handleSignOut takes the cookie away, and the recordings that the browser has
// kept.
func (s *server) handleSignOut(w http.ResponseWriter, r *http.Request) {
	s.access.signIn(w, r, -1)
	w.Header().Set("Clear-Site-Data", `"cache"`)
	w.WriteHeader(http.StatusNoContent)
}

// recovered writes down a handler's panic and answers for it.
func (s *server) recovered(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if v := recover(); v != nil {
				if v == http.ErrAbortHandler {
					panic(v)
				}
				s.fail(w, r, http.StatusInternalServerError, "internal error", nil)
				func() { defer s.catch("handler"); panic(v) }()
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// handleElse answers what no route takes: 405 where another method would do.
func (s *server) handleElse(mux *http.ServeMux) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		if r.Method == http.MethodOptions && h.Get("Access-Control-Allow-Origin") != "" { // a page of VIEWER_ORIGINS asks before it asks
			h.Set("Access-Control-Allow-Methods", "GET, DELETE")
			h.Set("Access-Control-Allow-Headers", "Authorization")
			h.Set("Access-Control-Max-Age", "600")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		var allowed []string
		for _, method := range []string{"GET", "POST", "DELETE"} {
			other := r.Clone(r.Context())
			other.Method = method
			if _, pattern := mux.Handler(other); pattern != "/" {
				allowed = append(allowed, method)
			}
		}
		if allowed == nil {
			s.fail(w, r, http.StatusNotFound, "no such page", nil)
			return
		}
		h.Set("Allow", strings.Join(allowed, ", "))
		s.fail(w, r, http.StatusMethodNotAllowed, "method not allowed", nil)
	}
}

// fail answers with an error, and logs its cause.
func (s *server) fail(w http.ResponseWriter, r *http.Request, status int, reason string, cause error) {
	if cause != nil {
		s.log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "status", status, "err", cause)
	}
	s.write(w, status, map[string]string{"error": reason})
}

func (s *server) write(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(encodeJSON(v))
}

// query makes a handler of one that asks the database. What that returns as an
// error is answered here: it has written nothing then.
func (s *server) query(handle func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		err := errNotFound
		if !strings.Contains(r.Pattern, "{id}") || validID(r.PathValue("id")) {
			err = handle(w, r)
		}
		var bad badRequest
		switch {
		case err == nil:
		case errors.As(err, &bad):
			s.fail(w, r, http.StatusBadRequest, strings.ReplaceAll(err.Error(), "\n", "; "), nil)
		case errors.Is(err, errNotFound):
			s.fail(w, r, http.StatusNotFound, "no such session", nil)
		default:
			if r.Context().Err() == nil { // otherwise it is the client that left
				s.metrics.databaseErrors.Add(1)
			}
			s.fail(w, r, http.StatusServiceUnavailable, "the database does not answer", err)
		}
	}
}

// badRequest is an error that the client can mend.
type badRequest string

func (b badRequest) Error() string { return string(b) }

// queryNumber reads a whole number from the query string, between bounds.
func queryNumber(r *http.Request, name string, preset, least, most int64) (int64, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return 0, badRequest("the query string cannot be read")
	}
	raw := values.Get(name)
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

// hijacker hands a connection over from HTTP to a WebSocket, and keeps hold of
// it for deadlines. The buffers of an HTTP connection take 8 KB for as long as
// it lasts; smaller ones serve a tracker, which is sent little, as well.
type hijacker struct {
	http.ResponseWriter
	small  bool
	conn   net.Conn
	status int    // what Accept answers
	reason string // if it is a refusal
}

// WriteHeader and Write keep back what Accept says of a handshake that it does
// not like: it is answered like all else that is refused.
func (h *hijacker) WriteHeader(status int) {
	if h.status = status; status == http.StatusSwitchingProtocols {
		h.ResponseWriter.WriteHeader(status)
	}
}

func (h *hijacker) Write(text []byte) (int, error) {
	h.reason += string(text)
	return len(text), nil
}

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	h.conn = conn
	if err == nil && h.small && rw.Reader.Buffered() == 0 {
		rw = bufio.NewReadWriter(bufio.NewReaderSize(conn, 1<<10), bufio.NewWriterSize(conn, 512))
	}
	return conn, rw, err
}

func (s *server) handleWebSocket(w http.ResponseWriter, r *http.Request) {
	kind := r.URL.Query().Get("type")
	if kind != "" && kind != "tracker" && kind != "viewer" {
		s.fail(w, r, http.StatusBadRequest, `type must be "tracker" or "viewer"`, nil)
		return
	}
	addr := s.access.address(r)
	if d := s.access.enter(addr); d != nil {
		s.deny(w, r, false, d)
		return
	}
	h := &hijacker{ResponseWriter: w, small: kind != "viewer"}
	ws, err := websocket.Accept(h, r, &websocket.AcceptOptions{InsecureSkipVerify: true, CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		s.access.leave(addr)
		if h.status >= http.StatusBadRequest {
			s.fail(w, r, h.status, strings.TrimSpace(h.reason), nil)
		}
		return
	}
	ws.SetReadLimit(-1) // conn.read has its own
	c := &conn{srv: s, ws: ws, net: h.conn, addr: addr, viewer: kind == "viewer"}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	c.limit = time.AfterFunc(time.Hour, func() {
		s.metrics.refuse("message_time")
		c.shut(closePolicy, "the message took too long")
	})
	c.limit.Stop()
	c.pulse = time.AfterFunc(time.Hour, c.heartbeat)
	s.open.Store(c, nil)
	go c.serve()
}

// forget is called when a connection has ended.
func (s *server) forget(c *conn) {
	s.open.Delete(c)
	s.access.leave(c.addr)
}

// goodbye tells every connection that the server stops, also those that are
// about to open, and waits until all have ended or ctx has.
func (s *server) goodbye(ctx context.Context) {
	s.budget.open()
	for s.access.close() > 0 && ctx.Err() == nil {
		s.open.Range(func(c, _ any) bool {
			c.(*conn).shut(closeGoingAway, "the server stops")
			return true
		})
		time.Sleep(5 * time.Millisecond)
	}
}

// Pages of events.

// events calls emit with the events of a session from one number on, at most
// limit, until emit says false; those not yet committed too. What is in memory
// is asked for first: everything before it was committed by then.
func (s *server) events(ctx context.Context, id string, from, limit int64, emit func([]byte) bool) (summary, error) {
	reply := make(chan found, 1)
	f, ok := ask(s.hub, reply, find{id, from, from + limit, reply})
	if !ok {
		return summary{}, net.ErrClosed
	}
	if !f.ok {
		row, err := s.store.session(ctx, id)
		if err != nil {
			return summary{}, err
		}
		f.session = row.summary
	}
	to := min(from+limit, f.session.now.events)
	inMemory := to
	if len(f.batches) > 0 {
		inMemory = min(to, f.batches[0].first)
	}
	more := true
	if from < inMemory {
		err := s.store.events(ctx, id, from, inMemory, func(event []byte) bool {
			from++
			more = emit(event)
			return more
		})
		if err != nil || from < inMemory {
			return f.session, err
		}
	}
	for _, b := range f.batches {
		for ; more && from < min(to, b.end()); from++ {
			e := b.events[from-b.first]
			more = emit(b.body[e.start:e.end])
		}
	}
	return f.session, nil
}

const maxIndex = 1 << 53

func (s *server) handleEvents(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	from, err := queryNumber(r, "fromIndex", 0, 0, maxIndex)
	limit, err2 := queryNumber(r, "limit", 1000, 1, 10000)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	out := &eventsWriter{w: w, id: id}
	_, err = s.events(r.Context(), id, from, limit, out.add)
	switch {
	case err != nil && out.count == 0:
		return err
	case err != nil || out.err != nil:
		panic(http.ErrAbortHandler) // the client sees that the answer is cut
	}
	out.finish(from)
	return nil
}

// eventsWriter writes a page of events as they come.
type eventsWriter struct {
	w     http.ResponseWriter
	id    string
	count int64
	err   error
}

func (o *eventsWriter) begin() {
	o.w.Header().Set("Content-Type", "application/json; charset=utf-8")
	o.w.Header().Set("Cache-Control", "no-store")
	fmt.Fprintf(o.w, `{"sessionId":"%s","events":[`, o.id)
}

func (o *eventsWriter) add(event []byte) bool {
	if o.count == 0 {
		o.begin()
	} else {
		o.w.Write([]byte{','})
	}
	o.count++
	if len(event) > writePiece || o.count%100 == 0 {
		http.NewResponseController(o.w).SetWriteDeadline(time.Now().Add(time.Minute))
	}
	_, o.err = o.w.Write(event)
	return o.err == nil
}

func (o *eventsWriter) finish(from int64) {
	if o.count == 0 {
		o.begin()
	}
	fmt.Fprintf(o.w, `],"fromIndex":%d,"count":%d}`, from, o.count)
}

func (s *server) handleChunk(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	first, err := strconv.ParseInt(r.PathValue("index"), 10, 64)
	if err != nil {
		return errNotFound
	}
	data, err := s.store.chunk(r.Context(), id, first)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Cache-Control", "private, max-age=31536000, immutable")
	h.Add("Vary", "Accept-Encoding")
	if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		if data, err = gunzip(data, 4*len(data)); err != nil {
			s.fail(w, r, http.StatusInternalServerError, "the chunk is damaged", err)
			return nil
		}
	} else {
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("Content-Length", strconv.Itoa(len(data)))
	w.Write(data)
	return nil
}

// Sessions.

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
}

// millis gives a timestamp as JSON has it: null when there is none.
func millis(t int64) *int64 {
	if t == 0 {
		return nil
	}
	return &t
}

// toJSON takes a row, and what memory knows better of it.
func toJSON(row storedSession, live map[string]summary) sessionJSON {
	s := row.summary
	if l, ok := live[s.id]; ok && l.now.events >= s.now.events { // it may be on another server by now
		stored := s.now.stored
		s = l
		s.now.stored = stored
	}
	return sessionJSON{
		sessionID: sessionID{s.id}, UserID: s.about.userID, Metadata: s.about.metadata, EventCount: s.now.events, ErrorCount: s.now.errors,
		IsActive: s.isActive, CreatedAt: row.createdAt.UTC(), UpdatedAt: row.updatedAt.UTC(), EndedAt: row.endedAt,
		StartTime: millis(s.now.firstTime), EndTime: millis(s.now.endTime), StoredBytes: s.now.stored, RawBytes: s.now.raw,
		SnapshotIndex: index(s.now.snapshot),
	}
}

// live gives the sessions in memory by their ids.
func (s *server) live() map[string]summary {
	reply := make(chan []summary, 1)
	all, _ := ask(s.hub, reply, active{reply})
	byID := make(map[string]summary, len(all))
	for _, l := range all {
		byID[l.id] = l
	}
	return byID
}

func (s *server) toJSON(rows []storedSession) []sessionJSON {
	live := s.live()
	all := make([]sessionJSON, len(rows))
	for i, row := range rows {
		all[i] = toJSON(row, live)
	}
	return all
}

func (s *server) handleSessions(w http.ResponseWriter, r *http.Request) error {
	limit, err := queryNumber(r, "limit", 100, 1, 1000)
	offset, err2 := queryNumber(r, "offset", 0, 0, maxIndex)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	rows, err := s.store.newest(r.Context(), limit, offset, r.URL.Query().Get("active") != "false")
	if err != nil {
		return err
	}
	s.write(w, http.StatusOK, map[string]any{"sessions": s.toJSON(rows), "limit": limit, "offset": offset})
	return nil
}

func (s *server) handleActive(w http.ResponseWriter, r *http.Request) error {
	rows, err := s.store.active(r.Context())
	if err != nil {
		return err
	}
	s.write(w, http.StatusOK, map[string]any{"sessions": s.toJSON(rows)})
	return nil
}

func (s *server) handleSession(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	row, err := s.store.session(r.Context(), id)
	if err != nil {
		return err
	}
	chunks, err := s.store.chunks(r.Context(), id)
	if err != nil {
		return err
	}
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
		seek[i] = chunkJSON{c.first, c.count, millis(c.startTime), millis(c.endTime), index(c.snapshot), c.raw}
	}
	s.write(w, http.StatusOK, struct {
		sessionJSON
		Chunks []chunkJSON `json:"chunks"`
	}{toJSON(row, s.live()), seek})
	return nil
}

func (s *server) handleErrors(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if _, err := s.store.session(r.Context(), id); err != nil {
		return err
	}
	reports, err := s.store.reports(r.Context(), id)
	if err != nil {
		return err
	}
	s.write(w, http.StatusOK, map[string]any{"sessionId": id, "errors": reports})
	return nil
}

func (s *server) handleDelete(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	err := s.store.remove(r.Context(), id)
	if err == nil || errors.Is(err, errNotFound) {
		reply := make(chan struct{}, 1)
		ask(s.hub, reply, evict{id, reply})
	}
	if err != nil {
		return err
	}
	s.log.Info("session deleted", "session", id)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *server) handleCleanup(w http.ResponseWriter, r *http.Request) error {
	hours, err := queryNumber(r, "maxAgeHours", int64(s.cfg.retention/time.Hour), 0, 1<<20)
	if err != nil {
		return err
	}
	n, err := s.store.removeEnded(r.Context(), time.Now().Add(-time.Duration(hours)*time.Hour))
	if err != nil {
		return err
	}
	s.write(w, http.StatusOK, map[string]any{"message": fmt.Sprintf("deleted %d sessions that ended more than %d hours ago", n, hours), "deletedCount": n})
	return nil
}

// The server itself.

func (s *server) stats() hubStats {
	reply := make(chan hubStats, 1)
	st, _ := ask(s.hub, reply, look{reply})
	return st
}

func (s *server) uptime() int64 { return time.Since(s.started).Milliseconds() }

// handleHealth tells everyone how the server is, and viewers what it does.
func (s *server) handleHealth(w http.ResponseWriter, r *http.Request) {
	status, code := "healthy", http.StatusOK
	if s.access.admit(viewers, r) != nil {
		if s.store.ping(r.Context()) != nil {
			status, code = "unhealthy", http.StatusServiceUnavailable
		}
		s.write(w, code, map[string]string{"status": status})
		return
	}
	st := s.stats()
	t, err := s.store.totals(r.Context())
	if err != nil {
		status, code = "unhealthy", http.StatusServiceUnavailable
	}
	s.write(w, code, map[string]any{
		"status": status, "timestamp": time.Now().UTC(), "uptime": s.uptime(),
		"database":   map[string]int64{"totalSessions": t.sessions, "activeSessions": t.active, "totalEvents": t.events},
		"sessions":   map[string]int64{"totalSessions": int64(st.sessions), "activeSessions": int64(st.live), "totalEvents": st.events},
		"websockets": map[string]int{"totalClients": st.trackers + st.viewers, "viewers": st.viewers, "trackers": st.trackers},
	})
}

func (s *server) handleStats(w http.ResponseWriter, r *http.Request) {
	st := s.stats()
	s.write(w, http.StatusOK, map[string]any{
		"totalClients": st.trackers + st.viewers, "activeSessions": st.live, "viewers": st.viewers, "trackers": st.trackers,
		"totalEvents": st.events, "uptime": s.uptime(),
		"refusedSessions": s.metrics.refusedSessions.Load(), "viewersLagged": s.metrics.viewersLagged.Load(), "refusals": s.metrics.refused(),
	})
}

// The browser's side.

//go:embed web/*.html web/*.js web/*.css web/dist
var web embed.FS

// asset is an embedded file, ready to be served.
type asset struct {
	body, zipped []byte
	contentType  string
	etag         string
}

func newAsset(name string, body []byte) asset {
	sum := sha256.Sum256(body)
	types := map[string]string{".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
	var zipped bytes.Buffer
	z, _ := gzip.NewWriterLevel(&zipped, gzip.BestCompression)
	z.Write(body)
	z.Close()
	return asset{body, zipped.Bytes(), types[path.Ext(name)] + "; charset=utf-8", `"` + hex.EncodeToString(sum[:8]) + `"`}
}

// assets are the embedded files by their base names, and whether the recorder is
// among them. The tracker is put together here: rrweb's recorder and ours, in a
// function of their own, so that the recorder's bundle finds neither the page's
// globals nor its module loader.
var assets = sync.OnceValues(func() (map[string]asset, bool) {
	files := map[string]asset{}
	fs.WalkDir(web, "web", func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && path.Ext(name) != ".txt" {
			body, _ := web.ReadFile(name)
			files[path.Base(name)] = newAsset(name, body)
		}
		return err
	})
	recorder, bundled := files["rrweb-record.js"]
	script := []byte(`console.warn("session-replay: the recorder was not bundled: run 'make web' and build again");`)
	if bundled {
		script = []byte("(function(){var module={exports:{}},exports=module.exports,define;" + string(recorder.body) +
			"\n;var rrwebRecord=module.exports;(()=>{\"use strict\";" + string(files["tracker-privacy.js"].body) +
			string(files["tracker-picture.js"].body) + string(files["tracker.js"].body) + "})()})();")
	}
	files["tracker.js"] = newAsset("tracker.js", script)
	return files, bundled
})

func (s *server) serve(w http.ResponseWriter, r *http.Request, name, cache string) {
	a, ok := s.files[name]
	if !ok {
		s.fail(w, r, http.StatusNotFound, "no such file", nil)
		return
	}
	h := w.Header()
	h.Set("Content-Type", a.contentType)
	h.Set("Cache-Control", cache)
	h.Set("ETag", a.etag)
	h.Add("Vary", "Accept-Encoding")
	if r.Header.Get("If-None-Match") == a.etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	body := a.body
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
		body = a.zipped
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

const (
	// viewerPolicy keeps what was recorded, which may be hostile, from running
	// scripts, sending requests and reaching the viewer's session.
	viewerPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; " +
		"font-src data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
	demoPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; " +
		"connect-src 'self' ws: wss:; form-action 'self'; base-uri 'none'"
)

// mediaPolicy is viewerPolicy, open for pictures, fonts and style sheets of some
// origins.
func mediaPolicy(origins []string) string {
	if len(origins) == 0 {
		return viewerPolicy
	}
	list := " " + strings.Join(origins, " ")
	return strings.NewReplacer("'unsafe-inline'", "'unsafe-inline'"+list, "data:", "data:"+list).Replace(viewerPolicy) + "; media-src" + list
}

const mediaSlot = `name="media-origins" content="`

// withMedia tells the viewer's page the same: its frames have a policy of their own.
func withMedia(files map[string]asset, origins []string) map[string]asset {
	if len(origins) > 0 {
		files = maps.Clone(files)
		body := strings.Replace(string(files["view.html"].body), mediaSlot, mediaSlot+strings.Join(origins, " "), 1)
		files["view.html"] = newAsset("view.html", []byte(body))
	}
	return files
}

func (s *server) page(w http.ResponseWriter, r *http.Request, name, policy string) {
	w.Header().Set("Content-Security-Policy", policy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	s.serve(w, r, name, "no-cache")
}

func (s *server) handleRoot(w http.ResponseWriter, r *http.Request) {
	if isBrowser(r) {
		s.page(w, r, "index.html", viewerPolicy)
		return
	}
	s.write(w, http.StatusOK, map[string]any{
		"name": "session-replay", "version": version(),
		"endpoints": map[string]string{"websocket": "/ws", "health": "/health", "stats": "/stats", "activeSessions": "/sessions/active",
			"sessionEvents": "/sessions/:sessionId/events", "cleanup": "/sessions/cleanup"},
		"documentation": "README.md", "signedIn": s.access.signedIn(r),
	})
}

func (s *server) handleView(w http.ResponseWriter, r *http.Request) {
	s.page(w, r, "view.html", mediaPolicy(s.access.mediaOrigins))
}
func (s *server) handleDemo(w http.ResponseWriter, r *http.Request) {
	s.page(w, r, "demo.html", demoPolicy)
}

func (s *server) handleAsset(w http.ResponseWriter, r *http.Request) {
	s.serve(w, r, r.PathValue("file"), "no-cache")
}

func (s *server) handleTracker(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("Cross-Origin-Resource-Policy", "cross-origin")
	s.serve(w, r, "tracker.js", "public, max-age=3600")
}
