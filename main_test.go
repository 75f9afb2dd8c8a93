package main

// The server as a whole: its settings, its start and its end, and the way of an
// event from a page to whoever asks for it.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nhooyr.io/websocket"
)

// ---- the way of an event ----

// oddEvents are events that a store which decodes them would change or refuse.
func oddEvents() (events []json.RawMessage) {
	for i, odd := range oddities {
		events = append(events,
			json.RawMessage(fmt.Sprintf(`{"type":3,"data":%s,"timestamp":%d}`, odd, 1700000000000+i)),
			json.RawMessage(fmt.Sprintf("{ \"data\" :\n\t[ %s ,%s ] ,\r\n \"timestamp\": %d , \"type\" : 3 }", odd, odd,
				1700000000000+i)))
	}
	return append(events,
		json.RawMessage(`{}`), json.RawMessage(`{ }`), json.RawMessage(`{"":""}`),
		json.RawMessage(`{"type":3,"type":2,"timestamp":1,"timestamp":2}`),
		json.RawMessage(`{"type":1e400,"timestamp":-1e-400}`),
		json.RawMessage(`{"type":null,"timestamp":"soon"}`),
		json.RawMessage("{\"raw\":\"\u007f\u0080\ufffd\ufffe\uffff\U0010ffff\"}"))
}

// batchOf is an events_batch of these events, with a number unless it is 0.
func batchOf(seq int, events []json.RawMessage) string {
	var b strings.Builder
	b.WriteString(`{"type":"events_batch","data":{"events":[`)
	for i, event := range events {
		if i > 0 {
			b.WriteString(" ,\n")
		}
		b.Write(event)
	}
	b.WriteString("]")
	if seq > 0 {
		fmt.Fprintf(&b, `,"seq":%d`, seq)
	}
	b.WriteString("}}")
	return b.String()
}

func sameEvents(t testing.TB, way string, got, want []json.RawMessage) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: got %d events, want %d", way, len(got), len(want))
		return
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Errorf("%s: event %d: got %.200q, want %.200q", way, i, got[i], want[i])
			return
		}
	}
}

// A recording of a real page and every oddity of JSON go in through a WebSocket;
// they come out byte for byte over every way out: live to who joined first, live
// to who joined in the middle, as pages over the WebSocket and REST, before and
// after their commit, and as stored chunks.
func TestRecordWatchReplay(t *testing.T) {
	t.Parallel()
	s := startInside(t, "BATCH_INTERVAL=200")
	var events []json.RawMessage
	mustJSON(t, texts("testdata/demo.json"), &events) // a real recording of the demo page
	events = append(events, oddEvents()...)
	events = append(events, json.RawMessage(`{"type":3,"data":{"text":"words of a visitor"}}`))
	tracker := s.recording("demo")
	first, middle := joinLive(t, s, "demo"), (*liveViewer)(nil)
	for from := 0; from < len(events); from += 10 {
		if from > len(events)/2 && middle == nil {
			waitUntil(t, "half of it is accepted", func() bool { return s.memory().events == int64(from) })
			middle = joinLive(t, s, "demo")
		}
		tracker.sendRaw(batchOf(0, events[from:min(from+10, len(events))]))
	}
	sameEvents(t, "live from the start", first.until(len(events)), events)
	if got := middle.until(len(events)); middle.from == 0 || middle.from >= len(events) {
		t.Errorf("joined at event %d, want the middle of %d", middle.from, len(events))
	} else {
		sameEvents(t, "live from the middle", got, events[middle.from:])
	}
	sameEvents(t, "REST, not all of it committed", s.restEvents("demo", 37), events)
	sameEvents(t, "pages, not all of it committed", pagesOf(t, s, "demo", 41), events)
	waitUntil(t, "all is committed", func() bool {
		return querySQL[int](t, s.database, "select event_count from sessions") == len(events)
	})
	everyWayOut(t, s, "demo", events)
	tracker.send("session_end", `{"sessionId":"demo"}`)
	waitUntil(t, "the session has left memory", func() bool { return s.memory().sessions == 0 })
	everyWayOut(t, s, "demo", events)
	s.tellsNothing("words of a visitor")
}

func everyWayOut(t testing.TB, s *testServer, id string, want []json.RawMessage) {
	t.Helper()
	sameEvents(t, "REST", s.restEvents(id, 10000), want)
	sameEvents(t, "REST in small pages", s.restEvents(id, 23), want)
	sameEvents(t, "pages", pagesOf(t, s, id, 1000), want)
	sameEvents(t, "chunks", s.chunkEvents(id), want)
}

// memory is what the hub says of itself.
func (s *testServer) memory() hubStats {
	return s.server.stats()
}

// restEvents reads a session over REST in pages of a size.
func (s *testServer) restEvents(id string, limit int) (all []json.RawMessage) {
	s.t.Helper()
	for {
		var page struct {
			SessionID        string
			Events           []json.RawMessage
			FromIndex, Count *int
		}
		s.getJSON(fmt.Sprintf("/sessions/%s/events?fromIndex=%d&limit=%d", id, len(all), limit), &page)
		if page.SessionID != id || page.FromIndex == nil || *page.FromIndex != len(all) || page.Count == nil ||
			*page.Count != len(page.Events) {
			s.t.Fatalf("page at %d: got sessionId %q, fromIndex %v, count %v and %d events", len(all), page.SessionID,
				page.FromIndex, page.Count, len(page.Events))
		}
		all = append(all, page.Events...)
		if len(page.Events) < limit {
			return all
		}
	}
}

// chunkEvents reads a session by its chunks, and checks the map of them.
func (s *testServer) chunkEvents(id string) (all []json.RawMessage) {
	s.t.Helper()
	var session struct {
		Chunks []struct{ FromIndex, Count, Bytes int }
	}
	s.getJSON("/sessions/"+id, &session)
	for _, c := range session.Chunks {
		status, text := s.get(fmt.Sprintf("/sessions/%s/chunks/%d", id, c.FromIndex))
		var events []json.RawMessage
		if err := json.Unmarshal(text, &events); err != nil || status != http.StatusOK {
			s.t.Fatalf("chunk %d: status %d, %v", c.FromIndex, status, err)
		}
		if c.FromIndex != len(all) || c.Count != len(events) || c.Bytes != len(text) {
			s.t.Errorf("chunk of %d events, %d bytes at %d: the map says %+v", len(events), len(text), len(all), c)
		}
		all = append(all, events...)
	}
	return all
}

// pagesOf reads a session by get_session_events.
func pagesOf(t testing.TB, s *testServer, id string, limit int) (all []json.RawMessage) {
	t.Helper()
	c := dialServer(t, s.ws("viewer"))
	defer c.Close()
	for more := true; more; {
		c.send("get_session_events", map[string]any{"sessionId": id, "fromIndex": len(all), "limit": limit})
		page := c.expect("session_events").Data
		if page.SessionID != id || page.FromIndex != len(all) || len(page.Events) > limit ||
			page.HasMore != (len(all)+len(page.Events) < page.TotalEvents) {
			t.Fatalf("page at %d: got sessionId %q, fromIndex %d, %d events of %d, hasMore %v",
				len(all), page.SessionID, page.FromIndex, len(page.Events), page.TotalEvents, page.HasMore)
		}
		all = append(all, page.Events...)
		more = page.HasMore
	}
	return all
}

// liveViewer collects the live events of a session from where it joined.
type liveViewer struct {
	*testConn
	from int
}

func joinLive(t testing.TB, s *testServer, id string) *liveViewer {
	t.Helper()
	c := s.viewer()
	c.send("viewer_join_session", sessionID{id})
	return &liveViewer{c, c.expect("session_joined").Data.TotalEvents}
}

// until reads live events up to an index; they must follow each other.
func (v *liveViewer) until(index int) (all []json.RawMessage) {
	v.t.Helper()
	for v.from+len(all) < index {
		m := v.expect("events_batch")
		if m.Data.FromIndex != v.from+len(all) {
			v.t.Fatalf("live batch at %d, want %d", m.Data.FromIndex, v.from+len(all))
		}
		all = append(all, m.Data.Events...)
	}
	return all
}

// A full snapshot of 9 MB is recorded and replayed whole, over every way out.
// The server is a process of its own: the race detector is slow with so much.
func TestHugeSnapshot(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	page := strings.Repeat(snapshotText, 9<<20/len(snapshotText)) // more than a page, and than a flush
	events := []json.RawMessage{json.RawMessage(`{"type":4,"timestamp":1700000000000}`),
		json.RawMessage(`{"type":2,"data":{"node":"` + page + `"},"timestamp":1700000000001}`),
		json.RawMessage(`{"type":3,"timestamp":1700000000002}`)}
	tracker := s.recording("huge")
	viewer := joinLive(t, s, "huge")
	tracker.sendRaw(batchOf(1, events))
	sameEvents(t, "live", viewer.until(3), events)
	tracker.acked(1)
	sameEvents(t, "pages", pagesOf(t, s, "huge", 1000), events)
	sameEvents(t, "REST", s.restEvents("huge", 1), events)
	sameEvents(t, "chunks", s.chunkEvents("huge"), events)
	viewer.send("get_session_events", sessionID{"huge"}) // a page ends where it has 4 MB
	same(t, "events in a page", len(viewer.expect("session_events").Data.Events), 2)
	var first struct{ Count int }
	s.getJSON("/sessions/huge/events", &first)
	same(t, "events in a page of REST", first.Count, 2)
}

// ---- start ----

// With PostgreSQL away the server starts, says so, and works when it comes.
func TestStartWithoutDatabase(t *testing.T) {
	t.Parallel()
	proxy, through := proxyToDatabase(t, testDatabase(t), nil)
	proxy.refuses.Store(true)
	s := launchInside(t, "DATABASE_URL="+through)
	health := s.ask("GET", "/health")
	same(t, "/health without a database", health.status, 503)
	wantKeys(t, "/health", health.fields(t), "status reason timestamp uptime database sessions websockets")
	wantFields(t, "/health", health.fields(t), map[string]string{"status": `"unhealthy"`, "database": "null"})
	waitUntil(t, "the log says what it waits for", func() bool {
		return strings.Contains(s.output.String(), "waiting for the database")
	})
	for _, path := range []string{"/sessions", "/sessions/active", "/sessions/x", "/sessions/x/events",
		"/sessions/x/chunks/0"} {
		a := s.ask("GET", path)
		same(t, "GET "+path, a.status, 503)
		wantKeys(t, path, a.fields(t), "error")
	}
	viewer := dialServer(t, s.ws("viewer"))
	viewer.expect("active_sessions")
	viewer.send("viewer_join_session", `{"sessionId":"x"}`)
	viewer.wantError("unavailable")
	viewer.send("get_session_events", `{"sessionId":"x"}`)
	viewer.wantError("unavailable")
	tracker := dialServer(t, s.ws("tracker"))
	tracker.send("session_start", `{"sessionId":"early","resume":""}`)
	tracker.sendRaw(`{"type":"events_batch","data":{"seq":1,"events":[{"n":1}]}}`)
	proxy.refuses.Store(false)
	tracker.expect("session_ready")
	tracker.expect("events_ack")
	s.waitHealthy()
	holds(t, "the log", s.output.String(), "database ready")
	sameEvents(t, "REST", s.restEvents("early", 10), []json.RawMessage{json.RawMessage(`{"n":1}`)})
	proxy.cut()
	same(t, "a question over connections that have just broken", s.ask("GET", "/sessions").status, 200)
}

// Servers that start at once on an empty database all work; so do later ones on
// what they find there.
func TestServersStartTogether(t *testing.T) {
	t.Parallel()
	database := testDatabase(t)
	for round := range 2 {
		servers := make([]*testServer, 4)
		for i := range servers {
			servers[i] = launchInside(t, "DATABASE_URL="+database)
		}
		for i, s := range servers {
			s.waitHealthy()
			tracker := s.recording(fmt.Sprint("s", 10*round+i))
			tracker.sendRaw(batchOf(1, oddEvents()))
			tracker.expect("events_ack")
			tracker.Close()
			if out := s.output.String(); strings.Contains(out, "level=ERROR") || strings.Contains(out, "level=WARN") &&
				!strings.Contains(out, "bundled") {
				t.Errorf("round %d: server %d complains:\n%s", round, i, out)
			}
		}
		for _, s := range servers {
			same(t, "stop", s.stop(), nil)
		}
	}
	same(t, "events", querySQL[int](t, database, "select sum(event_count) from sessions"), 8*len(oddEvents()))
}

// ---- shutdown ----

// All that was accepted is committed, and everyone is told, though some peers
// are silent, stuck in a message, do not read, or come in the last moment.
func TestShutdown(t *testing.T) {
	t.Parallel()
	s := startInside(t, "BATCH_INTERVAL=3600000", "MAX_BUFFER_BYTES=4000000", "MAX_MESSAGE_BYTES=2000000")
	var polite []*testConn
	for i := range 3 {
		tracker := s.recording(fmt.Sprint("s", i))
		tracker.sendRaw(batchOf(1, oddEvents()))
		polite = append(polite, tracker, dialServer(t, s.ws("viewer")))
	}
	waitUntil(t, "all is accepted", func() bool { return s.memory().events == int64(3*len(oddEvents())) })
	stuckPeers(t, s)
	stopStorm, late := make(chan struct{}), make(chan *testConn, 400)
	var storm sync.WaitGroup
	for range 4 {
		storm.Go(func() { // ends with stopStorm
			for range 100 {
				select {
				case <-stopStorm:
					return
				default:
				}
				if conn, err := openWebSocket(&net.Dialer{}, s.ws("tracker"), 512); err == nil {
					late <- conn // silent from now on
				} else {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	closed := make(chan error, len(polite))
	for _, c := range polite {
		go func() { // ends with the connection
			for {
				if _, err := c.receive(); err != nil {
					closed <- err
					return
				}
			}
		}()
	}
	err := s.stop()
	close(stopStorm)
	storm.Wait()
	if err != nil { // also when its time was over
		t.Errorf("stop: got error %v, want none", err)
	}
	for range polite {
		same(t, "a connection's close code", websocket.CloseStatus(<-closed), websocket.StatusGoingAway)
	}
	close(late)
	for conn := range late {
		_, err := conn.receive()
		same(t, "a late connection's close code", websocket.CloseStatus(err), websocket.StatusGoingAway)
		conn.Close()
	}
	const ended = "select sum(event_count) from sessions where not is_active"
	same(t, "events that are stored", querySQL[int](t, s.database, ended), 3*len(oddEvents()))
	if _, err := net.Dial("tcp", "127.0.0.1:"+s.port); err == nil {
		t.Error("it still listens")
	}
}

// stuckPeers opens connections that each hold the server up in a way of their
// own.
func stuckPeers(t testing.TB, s *testServer) {
	t.Helper()
	rawTCP(t, s).write("GET /health HTTP/1.1\r\nHost: x")       // half a request
	dialServer(t, s.ws("tracker"))                              // says nothing at all
	dialServer(t, s.ws("tracker")).write("\x81\xff")            // half a frame header
	dialServer(t, s.ws("tracker")).write(string(announce(1e9))) // a header, and nothing of what it announces
	dialServer(t, s.ws("tracker")).write(string(announce(1500000)) + strings.Repeat(" ", 1400000))
	dialServer(t, s.ws("tracker")).write(string(announce(1500000)) + strings.Repeat(" ", 1400000))
	deaf := dialServer(t, s.ws("viewer")) // asks for much and reads nothing
	for range 50 {
		deaf.write(string(maskedText(wireMessage("get_session_events", map[string]any{"sessionId": "s0"}))))
	}
}

// ---- operation ----

// systemd is what the server tells at NOTIFY_SOCKET.
func systemd(t testing.TB) (socket string, told func() string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return socket, func() string {
		t.Helper()
		text := make([]byte, 1000)
		conn.SetReadDeadline(time.Now().Add(patience))
		n, err := conn.Read(text)
		if err != nil {
			t.Fatalf("systemd hears nothing: %v", err)
		}
		return string(text[:n])
	}
}

func TestSystemd(t *testing.T) {
	t.Parallel()
	socket, told := systemd(t)
	s := newServer(t, "NOTIFY_SOCKET="+socket, "WATCHDOG_USEC=200000", "DATABASE_URL=postgres://127.0.0.1:1/none")
	s.start() // also without its database
	for i, want := range []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"} {
		same(t, fmt.Sprint("message ", i), told(), want)
	}
	s.cmd.Process.Signal(syscall.SIGHUP) // nothing to reload, nothing to end
	same(t, "after SIGHUP", said(told(), s.running()), "WATCHDOG=1 true")
	code, _ := s.term()
	same(t, "exit code", code, 0)
	last := ""
	for last != "STOPPING=1" {
		if last = told(); last != "WATCHDOG=1" && last != "STOPPING=1" {
			t.Fatalf("got %q", last)
		}
	}
}

// While the hub does not answer the watchdog is not told, and systemd ends the
// server.
func TestWatchdog(t *testing.T) {
	socket, told := systemd(t)
	logs := openLogs(logConfig{dir: t.TempDir()}, io.Discard, io.Discard, false)
	defer logs.Close()
	s := &server{core: core{logs: logs, hub: newHub(config{batchInterval: time.Second}, newBudget(1<<20), &metrics{})}}
	s.cfg.notifySocket, s.cfg.watchdog = socket, 2*time.Millisecond
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go s.handleSignals(ctx) // ends with the test
	time.Sleep(100 * time.Millisecond)
	s.notify("nothing so far")
	same(t, "a hub that does not run: systemd is told", told(), "nothing so far")
	go s.hub.run(ctx) // ends with the test
	same(t, "a hub that runs: systemd is told", told(), "WATCHDOG=1")
}
