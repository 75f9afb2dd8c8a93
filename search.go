package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// Sessions by what they are: found, exported, deleted.

// filter is what a list of sessions is asked for; its zero value asks for all.
type filter struct {
	userID, url string // exact; a part of it, in upper or lower case
	from, to    time.Time
	minDuration int64 // milliseconds
	errors      bool
	active      *bool
}

// Counting more would read an index to its end.
const maxTotal = 1000 // sessions are counted up to here

// where makes the filter's clause and its arguments. The value of is_active stands in
// the text, so that PostgreSQL finds the index of such sessions.
func (f filter) where() (clause string, args []any) {
	clause = "where (is_active or length is not null)" // not the ended ones without an event
	and := func(condition string, value any) {
		args = append(args, value)
		clause += fmt.Sprintf(" and "+condition, len(args))
	}
	if f.active != nil && *f.active {
		clause += " and is_active"
	} else if f.active != nil {
		clause += " and not is_active"
	}
	if f.errors {
		clause += " and error_count > 0"
	}
	if f.userID != "" {
		and("user_id = $%d", f.userID)
	}
	if f.url != "" {
		and(`strpos(url_lower, lower($%d collate "C")) > 0`, f.url)
	}
	if !f.from.IsZero() {
		and("created_at >= $%d", f.from)
	}
	if !f.to.IsZero() {
		and("created_at <= $%d", f.to)
	}
	if f.minDuration > 0 { // length is null for a live session
		and(`(length >= $%d or session_id in
			(select session_id from sessions
				where is_active and last_event_time - first_event_time >= $%[1]d))`, f.minDuration)
	}
	return clause, args
}

// find gives a page of the sessions that a filter lets through, newest first, one more than limit
// if there are more, and how many there are, beyond maxTotal perhaps not all of them. found may
// also end early, where its rows are more than pageBytes: then there are more.
func (st *store) find(ctx context.Context, f filter, limit, offset int64) (
	found []storedSession, total int64, err error) {
	where, args := f.where()
	n := len(args)
	found, err = st.list(ctx, fmt.Sprintf(`where session_id in (select session_id from sessions %s
		order by created_at desc, session_id limit $%d offset $%d) order by created_at desc, session_id`,
		where, n+1, n+2),
		append(slices.Clip(args), limit+1, offset)...) // the inner one reads mostly an index
	if err != nil {
		return nil, 0, err
	}
	size := 0
	for _, s := range found {
		size += s.listSize()
	}
	if n := int64(len(found)); size <= pageBytes && n <= limit && (n > 0 || offset == 0) {
		return found, offset + n, nil // this is the last page
	}
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	count := fmt.Sprintf("select count(*) from (select from sessions %s limit $%d) counted", where, n+1)
	err = st.pool.QueryRow(ctx, count, append(slices.Clip(args), maxTotal+1)...).Scan(&total)
	return found, total, err
}

// ofUser gives the ids of a user's sessions, up to limit, the live ones first.
func (st *store) ofUser(ctx context.Context, userID string, limit int64) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	rows, err := st.pool.Query(ctx, `select session_id from sessions where user_id = $1
		order by is_active desc, created_at limit $2`, userID, limit)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// checkParams reads the query string of a route that takes these names. One that
// nobody knows, or that stands twice or without a value, is an error: otherwise a
// filter that was misspelt would let everything through. A token or a key, which
// links and probes may carry anywhere, is no parameter.
func checkParams(r *http.Request, names []string) error {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return badRequest("the query string cannot be read")
	}
	for name, all := range values {
		switch {
		case name == "token", name == "key":
		case !slices.Contains(names, name):
			return badRequest(fmt.Sprintf("unknown parameter %q: there are %q", name, names))
		case len(all) > 1 || all[0] == "":
			return badRequest(name + " must stand once, with a value")
		}
	}
	return nil
}

var filterNames = []string{"userId", "url", "from", "to", "minDuration", "errors", "active"}

// parseFilter gives a badRequest for each value that is wrong.
func parseFilter(r *http.Request) (f filter, err error) {
	values := r.URL.Query()
	f.userID, f.url = values.Get("userId"), values.Get("url")
	var errs [5]error
	f.from, errs[0] = queryTime(values, "from")
	f.to, errs[1] = queryTime(values, "to")
	f.minDuration, errs[2] = queryNumber(r, "minDuration", 0, 0, maxIndex)
	wanted, err := queryBool(values, "errors")
	f.errors, errs[3] = wanted != nil && *wanted, err
	f.active, errs[4] = queryBool(values, "active")
	for _, text := range []string{f.userID, f.url} {
		if len(text) > maxText || clean(text) != text {
			return f, badRequest("userId and url must be text of at most 2 KiB, without control characters")
		}
	}
	return f, errors.Join(errs[:]...)
}

// queryTime reads a moment: RFC 3339, or milliseconds since 1970.
func queryTime(values url.Values, name string) (t time.Time, err error) {
	raw := values.Get(name)
	if raw == "" {
		return t, nil
	}
	if ms, err := strconv.ParseInt(raw, 10, 64); err == nil && ms > -maxMillis && ms < maxMillis {
		return time.UnixMilli(ms), nil
	}
	if t, err = time.Parse(time.RFC3339, raw); err != nil {
		err = badRequest(name + " must be a time of RFC 3339, or milliseconds since 1970")
	}
	return t, err
}

const maxMillis = 1 << 47 // the year 6429; PostgreSQL and JSON have theirs further on

// queryBool gives nil where the parameter is missing.
func queryBool(values url.Values, name string) (*bool, error) {
	switch raw := values.Get(name); raw {
	case "":
		return nil, nil
	case "true", "false":
		is := raw == "true"
		return &is, nil
	}
	return nil, badRequest(name + " must be true or false")
}

// handleSessions shows fewer than find has found where the page is full: hasMore says so.
func (s *server) handleSessions(w http.ResponseWriter, r *http.Request) error {
	limit, err := queryNumber(r, "limit", 100, 1, 1000)
	offset, err2 := queryNumber(r, "offset", 0, 0, maxIndex)
	f, err3 := parseFilter(r)
	if err := errors.Join(err, err2, err3); err != nil {
		return err
	}
	found, total, err := s.store.find(r.Context(), f, limit, offset)
	if err != nil {
		return err
	}
	shown := s.listJSON(found[:min(len(found), int(limit))])
	s.write(w, http.StatusOK, map[string]any{
		"sessions": shown, "limit": limit, "offset": offset, "hasMore": len(shown) < len(found),
		"total": min(total, maxTotal), "totalIsMore": total > maxTotal,
	})
	return nil
}

// Export. An answer that fails halfway is cut, and the client sees that.

const exportPage = 10_000 // events, unless they are 4 MB before

// exportPages calls emit with all events of a session, some at a time: a "[", and
// the events with a comma between two of them.
func (s *server) exportPages(ctx context.Context, id string, emit func(events []byte) error) error {
	for from := int64(0); ; {
		p, err := s.eventPage(ctx, id, from, exportPage, "[")
		if err == nil && p.count > 0 {
			err = emit(p.text)
		}
		p.release()
		if err != nil || p.count == 0 {
			return err
		}
		from += p.count
	}
}

// attachment makes the answer a download that nobody keeps in a cache.
func attachment(w http.ResponseWriter, contentType, name string) {
	w.Header().Set("Content-Type", contentType+"; charset=utf-8")
	w.Header().Set("Content-Disposition", `attachment; filename="`+name+`"`)
	w.Header().Set("Cache-Control", "no-store")
}

// handleExport sends a whole recording as the JSON array that rrweb-player takes,
// each event as its bytes came.
func (s *server) handleExport(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if _, err := s.store.session(r.Context(), id); err != nil {
		return err
	}
	s.audit.note(s.access.address(r), "exported", "session", id)
	attachment(w, "application/json", "session-"+id+".json")
	// Each page begins with a byte of its own: the array's bracket, or a comma.
	between, end := byte('['), "[]"
	err := s.exportPages(r.Context(), id, func(events []byte) error {
		events[0], between, end = between, ',', "]"
		s.writeSlowly(w, events)
		return nil
	})
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Write([]byte(end))
	return nil
}

// handleExportUser sends all that there is of a user, for those who ask what is known
// of them: of each session its line, then its events, one a line.
func (s *server) handleExportUser(w http.ResponseWriter, r *http.Request) error {
	userID, err := userOf(r)
	if err != nil {
		return err
	}
	ids, err := s.store.ofUser(r.Context(), userID, maxIndex)
	if err != nil {
		return err
	}
	s.audit.note(s.access.address(r), "exported", "user", userID, "sessions", len(ids))
	attachment(w, "application/x-ndjson", "sessions.ndjson")
	for _, id := range ids {
		if err := s.exportSession(r.Context(), w, id); err != nil {
			panic(http.ErrAbortHandler)
		}
	}
	return nil
}

// exportSession passes over a session that was deleted before its line; one that
// is deleted after it is an error, otherwise its first half would look like all.
func (s *server) exportSession(ctx context.Context, w http.ResponseWriter, id string) error {
	row, err := s.store.session(ctx, id)
	if errors.Is(err, errNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	reports, err := s.store.reports(ctx, id)
	if err != nil {
		return err
	}
	one := toJSON(row)
	one.Metadata = row.about.metadata
	s.writeSlowly(w, append(encodeJSON(struct {
		sessionJSON
		Errors []storedReport `json:"errors"`
	}{one, reports}), '\n'))
	return s.exportPages(ctx, id, func(events []byte) error {
		lines, err := eventLines(events)
		s.writeSlowly(w, lines)
		return err
	})
}

// eventLines puts each event of a page on a line of its own, in place. A line break
// within one is white space: JSON has none in strings.
func eventLines(events []byte) ([]byte, error) {
	for i, c := range events {
		if c == '\n' || c == '\r' {
			events[i] = ' '
		}
	}
	events = append(events, ']')
	bounds, err := splitEvents(events)
	if err != nil {
		return nil, err
	}
	for _, e := range bounds {
		events[e.end] = '\n'
	}
	return events[1:], nil
}

// Deletion.

// userOf gives the user that a request names.
func userOf(r *http.Request) (string, error) {
	f, err := parseFilter(r)
	if err == nil && f.userID == "" {
		err = badRequest("userId must say whose sessions")
	}
	return f.userID, err
}

// handleDeleteUser notes in the audit also what was deleted before an error.
func (s *server) handleDeleteUser(w http.ResponseWriter, r *http.Request) error {
	userID, err := userOf(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), cleanupTimeout)
	defer cancel()
	deleted, err := s.deleteUser(ctx, userID)
	s.audit.note(s.access.address(r), "deleted", "user", userID, "sessions", deleted, "complete", err == nil)
	if err != nil {
		return err
	}
	s.write(w, http.StatusOK, map[string]any{"userId": userID, "deletedCount": deleted})
	return nil
}

// deleteUser deletes a user's sessions until there are none, those too that begin
// meanwhile, and says how many, also with an error.
func (s *server) deleteUser(ctx context.Context, userID string) (deleted int, err error) {
	for {
		ids, err := s.store.ofUser(ctx, userID, deleteStep)
		if err != nil || len(ids) == 0 {
			return deleted, err
		}
		for _, id := range ids {
			err := s.deleteSession(ctx, id)
			if err == nil {
				deleted++
			} else if !errors.Is(err, errNotFound) {
				return deleted, err
			}
		}
	}
}

// handleCleanup goes by age alone, and does so for all servers.
func (s *server) handleCleanup(w http.ResponseWriter, r *http.Request) error {
	hours, err := queryNumber(r, "maxAgeHours", -1, 0, 1<<20)
	if err != nil {
		return err
	}
	age := time.Duration(hours) * time.Hour
	if hours < 0 {
		age = s.cfg.retention
	}
	n, err := s.store.removeOld(r.Context(), age, 0)
	s.metrics.sessionsDeleted.Add(n)
	words := inWords(int64(age), times)
	s.audit.note(s.access.address(r), "deleted", "sessions", n, "older_than", words, "complete", err == nil)
	if err != nil {
		return err
	}
	message := fmt.Sprintf("deleted %d sessions that ended more than %s ago", n, words)
	s.write(w, http.StatusOK, map[string]any{"message": message, "deletedCount": n})
	return nil
}

func (s *server) handleDelete(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if err := s.deleteSession(r.Context(), id); err != nil {
		return err
	}
	s.audit.note(s.access.address(r), "deleted", "session", id)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// deleteSession deletes a session's row, and tells the hub, which ends it for its
// tracker and its viewers.
func (s *server) deleteSession(ctx context.Context, id string) error {
	err := s.store.remove(ctx, id)
	if err == nil || errors.Is(err, errNotFound) {
		reply := make(chan struct{}, 1)
		ask(s.hub, reply, evict{id, reply})
	}
	return err
}
