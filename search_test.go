package main

// Sessions found by filters, exported, deleted by user, and what the audit says.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// foundTest is a server with seven sessions that have ended, on the first seven
// days of 2026, and one of ann's that is live.
func foundTest(t *testing.T, env ...string) *testServer {
	t.Helper()
	s := startInside(t, env...)
	execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, created_at, ended_at,
			event_count, error_count, first_event_time, last_event_time)
		select 's' || n, (array['ann', 'bob', 'Ann'])[1 + n % 3],
			'https://shop.example/' || (array['Cart', 'cart/100%_off', 'home'])[1 + n % 3],
			'{"traits":{"plan":"pro"},"pages":3,"clicks":2,"lastUrl":"https://shop.example/end"}', false,
			timestamptz '2026-01-01 12:00Z' + n * interval '1 day', now(),
			1, n / 6, 1000, 1000 + n * 10000 from generate_series(0, 6) n`)
	execSQL(t, s.database, `insert into session_events (session_id, first_index, event_count, raw_bytes, events)
		select session_id, 0, 1, 4, $1 from sessions`, zip([]byte("[{}]")))
	execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, created_at)
		values ('live', 'ann', 'https://x.example/', '{}', true, '2026-02-01')`)
	return s
}

type foundPage struct {
	Sessions []struct {
		ID       string          `json:"sessionId"`
		Metadata json.RawMessage `json:"metadata"`
	} `json:"sessions"`
	Limit, Offset, Total int64
	HasMore, TotalIsMore bool
}

func (p foundPage) ids() (ids []string) {
	for _, s := range p.Sessions {
		ids = append(ids, s.ID)
	}
	return ids
}

func TestFilters(t *testing.T) {
	t.Parallel()
	s := foundTest(t)
	tests := []struct {
		query, ids string
		total      int64
	}{
		{"", "live s6 s5 s4 s3 s2 s1 s0", 8},
		{"?userId=ann", "live s6 s3 s0", 4},
		{"?userId=nobody", "", 0},
		{"?userId=an", "", 0},
		{"?url=CART", "s6 s4 s3 s1 s0", 5},
		{"?url=100%25_", "s4 s1", 2},
		{"?url=100%25x", "", 0},
		{"?from=2026-01-05T12:00:00Z", "live s6 s5 s4", 4},
		{"?from=1767614400001", "live s6 s5", 3},
		{"?to=2026-01-03T13:00:00%2B01:00", "s2 s1 s0", 3},
		{"?from=2026-01-02T00:00:00Z&to=2026-01-04T00:00:00Z", "s2 s1", 2},
		{"?minDuration=50000", "s6 s5", 2},
		{"?errors=true", "s6", 1},
		{"?errors=false", "live s6 s5 s4 s3 s2 s1 s0", 8},
		{"?active=true", "live", 1},
		{"?active=false&limit=2", "s6 s5", 7},
		{"?active=false&limit=2&offset=6", "s0", 7},
		{"?offset=9", "", 8},
		{"?userId=ann&url=shop&active=false&minDuration=30000", "s6 s3", 2},
	}
	for _, tt := range tests {
		var page foundPage
		s.getJSON("/sessions"+tt.query, &page)
		if got := strings.Join(page.ids(), " "); got != tt.ids || page.Total != tt.total {
			t.Errorf("%s: got %q of %d, want %q of %d", tt.query, got, page.Total, tt.ids, tt.total)
		}
		if more := page.Offset+int64(len(page.Sessions)) < page.Total; page.HasMore != more &&
			page.Offset < page.Total {
			t.Errorf("%s: got hasMore %t, want %t", tt.query, page.HasMore, more)
		}
	}
	var page foundPage
	s.getJSON("/sessions?userId=bob&limit=1", &page)
	if got := string(page.Sessions[0].Metadata); !strings.Contains(got, `"clicks":2`) ||
		!strings.Contains(got, "lastUrl") || strings.Contains(got, "plan") {
		t.Errorf("metadata in a list: got %s, want clicks, pages, lastUrl, and no traits", got)
	}
}

// recordTest starts a session and sends events as they are written here.
func recordTest(t *testing.T, s *testServer, id, user string, batches ...string) *testConn {
	t.Helper()
	c := dialServer(t, s.ws("tracker"))
	c.send("session_start", map[string]any{"sessionId": id, "userId": user, "url": "https://shop.example/",
		"traits": map[string]any{"plan": "pro"}, "resume": ""})
	c.expect("session_ready")
	for i, events := range batches {
		c.sendRaw(fmt.Sprintf(`{"type":"events_batch","data":{"seq":%d,"events":[%s]}}`, i+1, events))
	}
	return c
}

func TestExport(t *testing.T) {
	t.Parallel()
	s := startInside(t, "BATCH_INTERVAL=3600000") // nothing is committed: exports have it all the same
	const odd = `{ "type":4,` + "\n\t" + `"timestamp":1,"data":{"x":1e400,"x":"\ud800\u0000"} }`
	c := recordTest(t, s, "a", "ann", odd+`, {"type":2,"timestamp":2}`, `{"type":3,"timestamp":3}`)
	c.send("javascript_error", map[string]any{"message": "broke"})
	recordTest(t, s, "b", "bob", `{"type":4,"timestamp":9}`)
	recordTest(t, s, "c", "ann")
	waitUntil(t, "all is there", func() bool { return s.stat("totalEvents") == 4 })

	a := s.ask("GET", "/sessions/a/export")
	same(t, "export of a", said(a.status, a.header.Get("Content-Disposition"), a.body), said(200,
		`attachment; filename="session-a.json"`, "["+odd+`,{"type":2,"timestamp":2},{"type":3,"timestamp":3}]`))
	if _, body := s.get("/sessions/c/export"); string(body) != "[]" {
		t.Errorf("export of a session without events: got %s", body)
	}
	if status, _ := s.get("/sessions/never/export"); status != http.StatusNotFound {
		t.Errorf("export of no session: got %d, want 404", status)
	}

	_, body := s.get("/sessions/export?userId=ann")
	lines := strings.Split(strings.TrimSpace(string(body)), "\n")
	var kinds []string
	for _, line := range lines {
		var object map[string]json.RawMessage
		if err := json.Unmarshal([]byte(line), &object); err != nil {
			t.Fatalf("%v in the line %s", err, line)
		}
		kinds = append(kinds, string(object["sessionId"])+string(object["timestamp"]))
	}
	slices.Sort(kinds)
	if got := strings.Join(kinds, " "); got != `"a" "c" 1 2 3` {
		t.Errorf("export of ann: got %s, want the lines of two sessions and of three events", got)
	}
	if !strings.Contains(string(body), `"plan":"pro"`) || strings.Contains(string(body), "bob") {
		t.Errorf("export of ann: got %s, want her traits, and nothing of bob", body)
	}
}

// A page of an export ends at 4 MB, and the next one goes on behind it.
func TestExportInPages(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	var batches []string
	for n := range 12 {
		batches = append(batches, fmt.Sprintf(`{"type":3,"timestamp":%d,"data":%q}`, n+1, strings.Repeat("x", 1<<20)))
	}
	recordTest(t, s, "big", "ann", batches...)
	waitUntil(t, "all is there", func() bool { return s.stat("totalEvents") == 12 })
	if _, body := s.get("/sessions/big/export"); string(body) != "["+strings.Join(batches, ",")+"]" {
		t.Errorf("got %d bytes, want the %d events as they came", len(body), len(batches))
	}
	if _, body := s.get("/sessions/export?userId=ann"); bytes.Count(body, []byte("\n")) != 13 {
		t.Errorf("got %d lines, want 13", bytes.Count(body, []byte("\n")))
	}
}

// An export of a session that is deleted meanwhile is cut, not a short whole.
func TestExportCut(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/sessions/s1/export", "/sessions/export?userId=ann"} {
		s := foundTest(t)
		execSQL(t, s.database, "update sessions set user_id = 'ann', event_count = 24 where session_id = 's1'")
		large := []byte(`[{"x":"` + strings.Repeat("x", 4<<20) + `"}]`)
		execSQL(t, s.database, `insert into session_events (session_id, first_index, event_count, raw_bytes, events)
			select 's1', n, 1, $2, $1 from generate_series(1, 23) n`, zip(large), len(large))
		resp, err := http.Get(s.url + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.ReadFull(resp.Body, make([]byte, 4<<20)); err != nil {
			t.Fatal(err)
		}
		s.request("DELETE", "/sessions/s1")
		if n, err := io.Copy(io.Discard, resp.Body); err == nil {
			t.Errorf("%s: got %d bytes and a clean end", path, n)
		}
	}
}

// Sessions that begin while a user's are deleted are deleted too; what is done when
// PostgreSQL refuses one is in the audit.
func TestDeleteUserMeanwhile(t *testing.T) {
	t.Parallel()
	s := foundTest(t)
	execSQL(t, s.database, `create function more() returns trigger language plpgsql as $$ begin
			insert into sessions (session_id, user_id, url, metadata, is_active, created_at)
				select 'meanwhile', 'ann', '', '{}', true, '2026-03-01' where old.session_id = 's0';
			if old.session_id = 's4' then raise exception 'not this one'; end if;
			return old;
		end $$; create trigger more before delete on sessions for each row execute function more()`)
	execSQL(t, s.database, "update sessions set created_at = '2026-03-01' where session_id = 's4'")
	if status, body := s.request("DELETE", "/sessions?userId=ann"); !strings.Contains(string(body),
		`"deletedCount":5`) {
		t.Errorf("got %d %s, want 5 deleted: ann's four, and one that began meanwhile", status, body)
	}
	if status, body := s.request("DELETE", "/sessions?userId=bob"); status != http.StatusServiceUnavailable {
		t.Errorf("got %d %s, want 503 for a session that cannot be deleted", status, body)
	}
	waitUntil(t, "the audit has both", func() bool {
		log := s.log("application")
		return strings.Contains(log, `"user":"ann","sessions":5,"complete":true`) &&
			strings.Contains(log, `"user":"bob","sessions":1,"complete":false`)
	})
}

func TestAudit(t *testing.T) {
	t.Parallel()
	const token, wrong = "a-token-of-the-tests", "a-wrong-token-of-the-tests"
	s := foundTest(t, "ACCESS_TOKEN="+token)
	who, other := header("Authorization", "Bearer "+token), header("Authorization", "Bearer "+wrong)
	cookie := withCookie(s.signIn(token)).and("a link", header("Accept", "text/html"))
	for _, link := range []string{token, wrong, ""} { // the cookie lets them in
		same(t, "link with "+link, s.as(cookie, "GET", "/?token="+link).status, http.StatusSeeOther)
	}
	s.as(withBody(`{"token":"`+wrong+`"}`), "POST", "/signin")
	s.as(other, "GET", "/sessions/s1")
	for range 2 { // a player asks again
		s.as(who, "GET", "/sessions/s1")
	}
	s.as(who, "GET", "/sessions/s2/events")
	s.as(who, "GET", "/sessions/s5/errors")
	s.as(who, "GET", "/sessions/never")
	s.as(who, "GET", "/sessions/s3/export")
	s.as(who, "GET", "/sessions/export?userId=ann")
	s.as(who, "DELETE", "/sessions/s4")
	s.as(who, "DELETE", "/sessions?userId=bob")
	want := []string{"signed in", "signed in", "sign-in refused", "opened s1", "opened s2",
		"opened s5", "exported s3", "exported ann", "deleted s4", "deleted bob"}
	var got []string
	waitUntil(t, "the log has it all", func() bool {
		got = nil
		for line := range strings.Lines(s.log("application")) {
			var l struct {
				Audit                       bool
				Action, From, Session, User string
			}
			if json.Unmarshal([]byte(line), &l); l.Audit {
				got = append(got, strings.TrimSpace(l.Action+" "+l.Session+l.User))
				if l.From != "127.0.0.1" {
					t.Errorf("got %s, want its address", line)
				}
			}
		}
		return len(got) >= len(want)
	})
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if log := s.log("application"); strings.Contains(log, token) || strings.Contains(log, wrong) {
		t.Errorf("a token is in the log: %s", log)
	}
}
