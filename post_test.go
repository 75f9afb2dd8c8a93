package main

import (
	"bytes"
	"compress/flate"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"
)

const postToken = "a token that the page has made"

// postStart is a session_start of a page that posts.
func postStart(id string, page, first int) string {
	return fmt.Sprintf(`{"type":"session_start","data":{"sessionId":%q,"userId":"ann","resume":%q,"create":true,`+
		`"page":%d,"firstSeq":%d}}`, id, postToken, page, first)
}

// postBatch is a numbered batch of one event that says of whom it is.
func postBatch(seq int, of string) string {
	return fmt.Sprintf(`{"type":"events_batch","data":{"seq":%d,"events":[{"type":3,"timestamp":%d,"data":%q}]}}`,
		seq, seq, of)
}

func lines(messages ...string) string { return strings.Join(messages, "\n") }

func zipped(text string) string { return string(zip([]byte(text))) }

func plain(text string) string { return text }

// postReport is an error of the page, with a number.
func postReport(seq int) string {
	return fmt.Sprintf(`{"type":"javascript_error","data":{"seq":%d,"message":"x"}}`, seq)
}

// saysOf gives each message of an answer: its type, and its code or number.
func (a answer) saysOf() (says string) {
	for in := json.NewDecoder(strings.NewReader(a.body)); ; {
		var m struct {
			Type string
			Data struct {
				Code string
				Seq  int
			}
		}
		if in.Decode(&m) != nil {
			return strings.TrimSpace(says)
		}
		one := fmt.Sprintf("%s:%s%.0d ", m.Type, m.Data.Code, m.Data.Seq)
		if m.Type != "events_ack" || !strings.HasSuffix(says, one) { // which may come twice
			says += one
		}
	}
}

func (s *testServer) post(path, body string, headers ...string) answer {
	s.t.Helper()
	return s.as(withBody(body).and("", caller{"", func(r *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
	}}), "POST", path)
}

// checkData compares the data of a session's events.
func (s *testServer) checkData(t testing.TB, id, want string) {
	t.Helper()
	var page struct{ Events []struct{ Data string } }
	s.getJSON("/sessions/"+id+"/events", &page)
	got := ""
	for _, e := range page.Events {
		got = strings.TrimSpace(got + " " + e.Data)
	}
	same(t, "events of "+id, got, want)
}

func TestPost(t *testing.T) {
	t.Parallel()
	s := startServer(t, "INGEST_KEY=key", "TRACKER_ORIGINS=https://shop.example.com", "BATCH_INTERVAL=600000",
		"MAX_MESSAGE_BYTES=4096")
	const shop, ready, invalid = "https://shop.example.com", "session_ready:", "error:invalid_message"
	start, one := postStart("ID", 1, 1), postBatch(1, "one")
	body := lines(start, one, postBatch(2, "two"))
	for _, c := range []struct {
		name, query, origin, body string
		pack                      func(string) string
		status                    int
		says, stored              string
	}{
		{"text", "key=key", "", body, plain, 200, ready + " events_ack:2", "one two"},
		{"gzip", "key=key&type=tracker", shop, body, zipped, 200, ready + " events_ack:2", "one two"},
		{"a session only", "key=key", "", start + "\r\n\n", plain, 200, ready, ""},
		{"ended", "key=key", "", lines(body, `{"type":"session_end","data":{}}`), plain,
			200, ready + " events_ack:2", "one two"},
		{"a gap", "key=key", "", lines(start, one, postBatch(3, "three")), plain,
			200, ready + " error:sequence_gap events_ack:1", "one"},
		{"an error of the page", "key=key", "", lines(start, one, postReport(2)), plain,
			200, ready + " events_ack:2", "one"},
		{"a batch of nothing", "key=key", "", lines(start, `{"type":"events_batch","data":{"seq":1,"events":[]}}`),
			plain,
			200, ready + " events_ack:1", ""},
		{"a wrong line", "key=key", "", lines(start, `{"type":`, one), plain,
			200, ready + " error:invalid_message events_ack:1", "one"},
		{"only wrong lines", "key=key", "", lines(start, strings.Repeat("{}\n", 200), one), plain,
			400, ready + strings.Repeat(" error:invalid_message", 100) + " error:refused", ""},
		{"what viewers say", "key=key", "", lines(start, `{"type":"get_active_sessions"}`), plain,
			200, ready + " error:forbidden", ""},
		{"no start", "key=key", "", one, plain, 400, "error:no_session", ""},
		{"start after something else", "key=key", "", lines(`{"type":"heartbeat"}`, body), plain,
			400, "error:no_session", ""},
		{"nothing", "key=key", "", "", plain, 400, "error:no_session", ""},
		{"no JSON", "key=key", "", "hello", plain, 400, invalid, ""},
		{"too large", "key=key", "", lines(body, strings.Repeat(" ", 4096)), plain, 413, "error:too_large", ""},
		{"too large unpacked", "key=key", "", lines(body, strings.Repeat(" ", 4096)), zipped, 413, "error:too_large",
			""},
		{"cut gzip", "key=key", "", body, func(s string) string { return zipped(s)[:60] }, 400, invalid, ""},
		{"wrong checksum", "key=key", "", body, func(s string) string {
			return zipped(s)[:len(zipped(s))-8] + "12345678"
		},
			400, invalid, ""},
		{"bytes behind gzip", "key=key", "", body, func(s string) string { return zipped(s) + "x" }, 400, invalid, ""},
		{"two gzip members", "key=key", "", body, func(s string) string { return zipped(s) + zipped(s) },
			400, invalid, ""},
		{"no key", "", shop, body, plain, 401, ":", ""},
		{"another origin", "key=key", "https://evil.example.com", body, plain, 403, ":", ""},
		{"viewers do not post", "key=key&type=viewer", "", body, plain, 400, ":", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := sessionName(t, 0)
			sent := c.pack(strings.ReplaceAll(c.body, "ID", id))
			for attempt := range 2 { // the same once more changes nothing
				got := s.post("/ws?"+c.query, sent, "Origin", c.origin)
				same(t, fmt.Sprint("attempt ", attempt), said(got.status, got.saysOf()), said(c.status, c.says))
				same(t, "the page may read it, with credentials",
					said(got.header.Get("Access-Control-Allow-Origin") == shop,
						got.header.Get("Access-Control-Allow-Credentials")), c.origin == shop)
			}
			there := querySQL[int](t, s.database, "select count(*) from sessions where session_id = $1", id)
			if same(t, "sessions", there, strings.Count(c.says, "ready")); there > 0 {
				s.checkData(t, id, c.stored)
			}
		})
	}
	same(t, "errors of pages", querySQL[int](t, s.database, "select count(*) from session_errors"), 1)
}

// postPage is a page's WebSocket.
func postPage(t testing.TB, s *testServer, id string, page, first int) *testConn {
	t.Helper()
	c := dialServer(t, s.ws("tracker"))
	c.sendRaw(postStart(id, page, first))
	c.expect("session_ready")
	return c
}

// TestPostBeginsOnce posts a session's very first messages twice at the same time.
func TestPostBeginsOnce(t *testing.T) {
	t.Parallel()
	s := startServer(t, "BATCH_INTERVAL=20")
	for i := range 20 {
		id := sessionName(t, i)
		body := lines(postStart(id, 1, 1), postBatch(1, "one"))
		var posting sync.WaitGroup
		for range 3 {
			posting.Go(func() {
				if got := s.post("/ws", body); strings.Contains(got.saysOf(), "session_assigned") {
					t.Errorf("%s: a POST was told %q", id, got.saysOf())
				}
			})
		}
		posting.Wait()
		s.checkData(t, id, "one")
	}
}

// TestPostStaysLive asks for the state of a session just after a POST. The first
// answer may come too late.
func TestPostStaysLive(t *testing.T) {
	t.Parallel()
	s := startServer(t, "BATCH_INTERVAL=20")
	for range 5 {
		s.post("/ws", lines(postStart("live", 1, 1), postBatch(1, "one")))
		var active struct{ Sessions []struct{ State string } }
		if s.getJSON("/sessions/active", &active); len(active.Sessions) == 1 && active.Sessions[0].State == "live" {
			return
		}
	}
	t.Error("the page is said to have left")
}

// TestPostPages is about a page's last POST, and the page that follows in the same
// tab: in any order all that was sent is stored once and in order, and the page that
// follows keeps the session. Steps: "post" sends the batches 2 and 3 of the first
// page, "elsewhere" does so at another server; "open" connects the next page,
// whose own batches begin with 4, or, with "open0", which does not know that;
// numbers are batches that it sends, and sees stored.
func TestPostPages(t *testing.T) {
	t.Parallel()
	s := startServer(t, "BATCH_INTERVAL=20")
	other := startServer(t, "BATCH_INTERVAL=20", "DATABASE_URL="+s.database)
	const taken, late = "session_ready: events_ack:3", "error:later_page events_ack:3"
	for i, c := range []struct{ steps, says, stored string }{
		{"post open 4", taken, "a1 a2 a3 b4"},
		{"post open 2 3 4", taken, "a1 a2 a3 b4"},
		{"post post open 4", taken, "a1 a2 a3 b4"},
		{"open post 4", late, "a1 a2 a3 b4"},
		{"open 2 post 3 4", late, "a1 a2 a3 b4"},
		{"open 2 3 4 post 5", "error:later_page events_ack:4", "a1 a2 a3 b4 b5"},
		{"open drop post open 4", late, "a1 a2 a3 b4"},
		{"open restart post open 2 3 4", "", "a1 a2 a3 b4"},
		{"open0 post 2", "error:later_page error:no_session error:no_session events_ack:1", "a1 a2"},
		{"open elsewhere 2 3 4", "error:later_page error:no_session error:no_session", "a1 a2 a3 b4"},
		{"both 2 3 4", "", "a1 a2 a3 b4"},
		{"both 2 3 4", "", "a1 a2 a3 b4"},
		{"both 2 3 4", "", "a1 a2 a3 b4"},
	} {
		t.Run(c.steps, func(t *testing.T) {
			id := sessionName(t, i)
			s.post("/ws", lines(postStart(id, 1, 1), postBatch(1, "a1")))
			last := lines(postStart(id, 1, 1), postBatch(2, "a2"), postBatch(3, "a3"))
			var page *testConn
			var got answer
			open := func(first int) {
				page = postPage(t, s, id, 2, first)
			}
			for step := range strings.FieldsSeq(c.steps) {
				switch step {
				case "post":
					got = s.post("/ws", last)
				case "elsewhere":
					got = other.post("/ws", last)
				case "open":
					open(4)
				case "open0":
					open(0)
				case "drop":
					page.Close()
				case "restart":
					s.restart()
				case "both":
					var posted sync.WaitGroup
					posted.Go(func() { got = s.post("/ws", last) })
					open(4)
					posted.Wait()
				default:
					whose := map[bool]string{true: "a", false: "b"}[step < "4"]
					var n int
					fmt.Sscan(step, &n)
					page.sendRaw(postBatch(n, whose+step))
					page.acked(n)
				}
			}
			if c.says != "" {
				same(t, "the POST was told", got.saysOf(), c.says)
			}
			s.checkData(t, id, c.stored)
		})
	}
}

// TestRecordings speaks as rrweb's own client does, and as one that is wrong.
func TestRecordings(t *testing.T) {
	s := startServer(t, "INGEST_KEY=key", "TRACKER_ORIGINS=https://shop.example.com", "BATCH_INTERVAL=600000")
	meta := `{"type":5,"timestamp":1,"data":{"tag":"recording-meta",` +
		`"payload":{"` + "\x7f" + `":1,"userId":"ann","plan":"pro","resume":"x","sessionId":"y"}}}`
	page := `{"type":4,"timestamp":2,"data":{"href":"https://shop.example.com/","width":800,"height":600}}`
	for _, c := range []struct {
		name, id, key, origin, body string
		status, events              int
	}{
		{"events", "r1", "key", "https://shop.example.com", meta + "\n" + page + "\r\n\n", 200, 2},
		{"more of them", "r1", "key", "", `{"type":3,"timestamp":3}`, 200, 3},
		{"as gzip", "r2", "key", "", zipped(meta), 200, 1},
		{"a half", "r3", "key", "", meta + "\n" + page[:20], 400, -1},
		{"without white space", "r3", "key", "", meta + page, 400, -1},
		{"no objects", "r3", "key", "", "1\n2", 400, -1},
		{"nothing", "r3", "key", "", "", 400, -1},
		{"no UTF-8", "r3", "key", "", `{"type":"` + "\xff" + `"}`, 400, -1},
		{"a wrong key", "r3", "wrong", "https://shop.example.com", meta, 401, -1},
		{"a wrong origin", "r3", "key", "https://evil.example.com", meta, 403, -1},
		{"a wrong id", "r%2f3", "key", "", meta, 400, -1},
	} {
		got := s.post("/recordings/"+c.id+"/events", c.body, "Authorization", "Bearer "+c.key, "Origin", c.origin)
		same(t, c.name+": status, and whether the page may read it",
			said(got.status, got.header.Get("Access-Control-Allow-Origin") != ""),
			said(c.status, c.origin == "https://shop.example.com"))
		var session struct {
			EventCount int
			UserID     string
			Metadata   struct{ Plan, URL, SessionID string }
		}
		status, body := s.get("/sessions/" + c.id)
		json.Unmarshal(body, &session)
		m := session.Metadata
		if c.events < 0 {
			same(t, c.name+": the session", status == 200, false)
			continue
		}
		same(t, c.name, said(session.EventCount, session.UserID, m.Plan, m.SessionID), said(c.events, "ann pro", c.id))
		if c.id == "r1" {
			same(t, "its URL", m.URL, "https://shop.example.com/")
		}
	}
}

// TestPostAnswers asks for more answers than the server gathers, and gives a token
// that each of them would have.
func TestPostAnswers(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	token := strings.Repeat("x", 1<<20)
	body := fmt.Sprintf(`{"type":"session_start","data":{"sessionId":"s","resume":%q,"create":true}}`, token) +
		strings.Repeat("\n{}", maxErrors-1) + // faster than a session is begun
		strings.Repeat("\n"+`{"type":"session_start","data":{"resume":""}}`, maxAnswers-maxErrors)
	got := s.post("/ws", body)
	said, _, _ := strings.Cut(got.body[strings.LastIndex(got.body[:len(got.body)-1], "\n")+1:], "\n")
	if got.status != 400 || len(got.body) > len(token)/2 || !strings.Contains(said, `"refused"`) {
		t.Errorf("got %d and %d bytes, at last %s, want 400, small answers, refused", got.status, len(got.body), said)
	}
}

// TestRecordingsMetadata sends more of it than is kept, in very many events.
func TestRecordingsMetadata(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	var body strings.Builder
	for i := range 20_000 {
		fmt.Fprintf(&body, `{"type":5,"data":{"tag":"recording-meta","payload":{"k%d":%d}}}`+"\n", i, i)
	}
	same(t, "status", s.post("/recordings/r/events", body.String()).status, 200)
	const metadata = "select octet_length(metadata::text) from sessions"
	if n := querySQL[int](t, s.database, metadata); n < maxMetadata/2 || n > 3*maxMetadata {
		t.Errorf("got %d bytes of metadata, want about %d", n, maxMetadata)
	}
}

// TestRecordingsCounted posts to the id of a session that it may not go on with: each
// time that begins a session, and the minute has a bound for them.
func TestRecordingsCounted(t *testing.T) {
	t.Parallel()
	s := startInside(t, "TRUST_PROXY=true", "MAX_SESSIONS_PER_MINUTE=3")
	const from = "10.0.0.1"
	same(t, "a session with a token", s.post("/ws", postStart("s", 1, 1), "X-Forwarded-For", from).status, 200)
	var statuses []int
	for range 4 {
		got := s.post("/recordings/s/events", `{"type":3,"timestamp":3}`, "X-Forwarded-For", from)
		statuses = append(statuses, got.status)
	}
	same(t, "the same without it", fmt.Sprint(statuses), "[200 200 429 429]")
}

// TestRecordingsRefused sends events that are not stored, or not in the session that
// was asked for, and none of them is answered as if it were.
func TestRecordingsRefused(t *testing.T) {
	t.Parallel()
	s := startInside(t, "MAX_SESSION_BYTES=200")
	execSQL(t, s.database, "alter table session_events add check (session_id <> 'joined' or first_index = 0)")
	const event = `{"type":3,"timestamp":3}`
	post := func(id, body string) string {
		got := s.post("/recordings/"+id+"/events", body)
		return said(got.status, strings.TrimSpace(got.body))
	}
	open := func(id string) *testConn {
		return dialServer(t, "ws://127.0.0.1:"+s.port+"/recordings/"+id+"/events/ws")
	}
	holds(t, "a full session", post("full", strings.Repeat(event+"\n", 20)), "400", "MAX_SESSION_BYTES")
	first := open("joined")
	first.sendRaw(event)
	waitUntil(t, "it is stored", func() bool {
		return querySQL[int](t, s.database, "select count(*) from session_events") == 1
	})
	holds(t, "what PostgreSQL refuses", post("joined", event), "400", "the database refused")
	first.wantError("not_stored")
	page := s.recording("numbered")
	same(t, "a session that tracker.js records", post("numbered", event), `200 {"ok":true}`)
	second := open("numbered")
	second.sendRaw(event)
	second.sendRaw("[]")
	if m, err := second.receive(); m.Type != "error" {
		t.Errorf("rrweb's client is told %s %v, want errors alone", m, err)
	}
	page.record(1, 1)
	const count = "select event_count from sessions where session_id = 'numbered'"
	same(t, "its events", querySQL[int](t, s.database, count), 1)
}

// TestRecordingsURL begins a session at the second attempt, on another page.
func TestRecordingsURL(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	allowed := false
	tr := &tracker{core: &s.server.core, ctx: t.Context(), out: newOutbox(), share: true}
	tr.mayStart = func() bool { return allowed }
	c := &rrwebClient{tracker: tr, recording: "r"}
	for _, url := range []string{"https://shop.example.com/a", "https://shop.example.com/b",
		"https://shop.example.com/c"} {
		_, err := c.handle(fmt.Appendf(nil, `{"type":4,"data":{"href":%q,"width":8,"height":6}}`, url))
		same(t, url+": it is taken", err == nil, allowed)
		allowed = true
	}
	same(t, "the URL", querySQL[string](t, s.database, "select url from sessions"), "https://shop.example.com/b")
}

// TestPostLate is about a body that is not here in time: it is not said to be wrong.
func TestPostLate(t *testing.T) {
	p := &post{conn: conn{core: &core{budget: newBudget(1 << 20), metrics: &metrics{}}, out: newOutbox(),
		maxMessage: 1 << 20}}
	p.cfg.messageTimeout = time.Minute
	p.ctx, p.cancel = context.WithCancel(t.Context())
	p.cancel()
	body := io.MultiReader(strings.NewReader(zipped("{}")[:12]), iotest.ErrReader(os.ErrDeadlineExceeded))
	same(t, "the refusal", refusal(p.receive(body), nil).code, "unavailable")
}

// TestTrackerFetches asks why nothing is recorded.
func TestTrackerFetches(t *testing.T) {
	t.Parallel()
	s := startServer(t, "INGEST_KEY=key", "TRACKER_ORIGINS=https://shop.example.com")
	ask := func(path, name, origin string) { s.as(header(name, origin), "GET", path) }
	ask("/tracker.js", "Referer", "https://shop.example.com/a/page?x")
	ask("/tracker.js", "Origin", "https://shop.example.com")
	ask("/tracker.js", "Referer", "https://evil.example.com/")
	ask("/tracker.js", "Referer", "no URL at all")
	ask("/ws", "Origin", "https://shop.example.com")
	ask("/ws?key=key", "Origin", "https://evil.example.com")
	ask("/ws?key=key", "Origin", "https://never.example.com")
	s.post("/ws?key=key", lines(postStart("one", 1, 1), postStart("one", 1, 1)), "Origin", "https://shop.example.com")
	same(t, "fetches", fmt.Sprintf("%s", s.statsOf().TrackerFetches),
		`[{"origin":"https://shop.example.com","fetches":2,"sessions":1,"refusals":{"ingest_key":1}} `+
			`{"origin":"https://evil.example.com","fetches":1,"sessions":0,"refusals":{"origin":1}}]`)
	for i := range 300 {
		ask("/tracker.js", "Referer", fmt.Sprintf("https://%d.example.com/", i))
	}
	if n := len(s.statsOf().TrackerFetches); n > maxOrigins {
		t.Errorf("%d origins are kept", n)
	}
}

// TestPostKeepsRoom posts bodies of which the hub keeps more than the budget has.
func TestPostKeepsRoom(t *testing.T) {
	t.Parallel()
	s := startServer(t, "BATCH_INTERVAL=600000", "MAX_BUFFER_BYTES=2000000")
	var posting sync.WaitGroup
	for i := range 4 {
		posting.Go(func() {
			body := []string{postStart(sessionName(t, i), 1, 1)}
			for seq := range 2000 {
				body = append(body, postBatch(seq+1, "x"))
			}
			got := s.post("/ws", lines(body...))
			if says := got.saysOf(); got.status != 200 || !strings.HasSuffix(says, "events_ack:2000") {
				t.Errorf("body %d: got %d %.200q", i, got.status, says)
			}
		})
	}
	posting.Wait()
	if n := s.metric("buffer_bytes"); n > 2_000_000 {
		t.Errorf("%d bytes of the budget are in use", n)
	}
}

// TestDeflate sends messages as browsers do, compressed, and as an attacker would.
func TestDeflate(t *testing.T) {
	t.Parallel()
	s := startServer(t, "BATCH_INTERVAL=20", "MAX_MESSAGE_BYTES=1000000")
	id := sessionName(t, 0)
	long := strings.Repeat("a", 100_000)
	ws := deflating(t, s, id)
	before := s.metric("wire_bytes_total")
	ws.sendDeflated(deflated(postBatch(1, long)))
	ws.acked(1)
	if n := s.metric("wire_bytes_total") - before; n > 2000 {
		t.Errorf("%d bytes on the wire for 100 KB of one letter", n)
	}
	for _, c := range []struct {
		name, payload string
		says          string // among what the server says
	}{
		{"no stream", "\xff\xff\xff\xff", "StatusInvalidFramePayloadData"},
		{"cut", deflated(postBatch(2, "cut"))[:30], "invalid_message"},
		// The message is invalid, or the frame, as the cut falls.
		{"cut in a block", deflated(strings.Repeat(postBatch(2, "cut"), 9000))[:2000], "nvalid"},
		{"a bomb", bomb("", 32), "StatusMessageTooBig"},
		{"a bomb of events",
			deflated(`{"type":"events_batch","data":{"seq":2,"events":[` + strings.Repeat("{},", 400_000)),
			"StatusMessageTooBig"},
		{"whole", deflated(postBatch(2, "whole")), `"seq":2}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			ws := deflating(t, s, id)
			ws.sendDeflated(c.payload)
			for said := ""; !strings.Contains(said, c.says); {
				m, err := ws.receive()
				if said += m.text + fmt.Sprint(err); err != nil && !strings.Contains(said, c.says) {
					t.Fatalf("want %s, got %.500q", c.says, said)
				}
			}
		})
	}
	s.checkData(t, id, long+" whole")
}

const deflateTail = "\x00\x00\xff\xff" // of each message, does not go over the wire (RFC 7692, section 7.2.1)

// deflated is a message as permessage-deflate has it.
func deflated(text string) string {
	var out bytes.Buffer
	z, _ := flate.NewWriter(&out, flate.DefaultCompression) // as browsers do
	io.WriteString(z, text)
	z.Flush()
	return strings.TrimSuffix(out.String(), deflateTail)
}

// bomb deflates a text and as many MB of zeros behind it.
func bomb(text string, megabytes int) string {
	zeros := deflated(strings.Repeat("0", 1<<20)) + deflateTail
	return strings.TrimSuffix(deflated(text)+deflateTail+strings.Repeat(zeros, megabytes), deflateTail)
}

// sendDeflated sends a text frame whose first bit says that it is compressed.
func (c *testConn) sendDeflated(payload string) error {
	_, err := c.Write(maskedFrame(0xc1, []byte(payload)))
	return err
}

// deflating is a tracker that may compress, and records a session.
func deflating(t testing.TB, s *testServer, id string) *testConn {
	t.Helper()
	c := dialServer(t, s.ws("tracker"), "Sec-WebSocket-Extensions: permessage-deflate\r\n")
	c.sendDeflated(deflated(postStart(id, 1, 1)))
	c.expect("session_ready")
	return c
}

// TestDeflateBombs sends 32 MB in a small part of that as fast as it goes, over 20
// connections, while an honest page records.
func TestDeflateBombs(t *testing.T) {
	t.Parallel()
	s := startServer(t, "BATCH_INTERVAL=20", "MAX_BUFFER_BYTES=64MB", "MAX_CONNECTIONS=200")
	honest := postPage(t, s, sessionName(t, 0), 1, 1)
	var bombers sync.WaitGroup
	var bombing []*testConn
	for kind, payload := range []string{bomb("", 32), bomb(`{"data":"`, 31)} {
		frame := maskedFrame(0xc1, []byte(payload))
		for i := range 10 {
			raw := deflating(t, s, sessionName(t, 1+10*kind+i))
			bombing = append(bombing, raw)
			raw.SetDeadline(time.Time{})
			go io.Copy(io.Discard, raw) // ends with the connection
			bombers.Go(func() {
				for err := error(nil); err == nil; _, err = raw.Write(frame) {
				}
			})
		}
	}
	var worst time.Duration
	for seq := range 2 {
		begun := time.Now()
		honest.record(seq+1, 1)
		worst = max(worst, time.Since(begun))
	}
	for _, raw := range bombing {
		raw.Close()
	}
	bombers.Wait()
	t.Logf("the slowest ack took %v", worst)
	s.checkMemory()
}
