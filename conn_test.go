package main

// What a connection does as time passes: in a bubble (testing/synctest), where a
// busy machine changes nothing. The network is pipes, and PostgreSQL never answers.

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"nhooyr.io/websocket"
)

// connTest is a server whose connections are pipes.
type connTest struct {
	*testing.T
	*server
	listener pipes
}

// pipes is a listener: what is sent on it connects.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if conn, ok := <-p; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.UnixAddr{} }

// onPipes runs a test with such a server and its settings.
func onPipes(t *testing.T, test func(*connTest), env ...string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cfg := mustLoad(t, append(env, "DATABASE_URL=postgres:///none?host=/nowhere")...)
		cfg.database.ConnConfig.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		s, err := assemble(cfg, openLogs(cfg.log, io.Discard, io.Discard, false))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		s.ctx = ctx
		go s.hub.run(ctx) // ends with ctx, and with it the writers
		for _, w := range s.writers {
			go w.run(ctx)
		}
		p := make(pipes)
		go http.Serve(p, http.HandlerFunc(s.handleWebSocket)) // ends when p is closed
		defer func() {
			close(p)
			cancel()
			s.store.close()
			s.logs.Close()
		}()
		test(&connTest{t, s, p})
	})
}

// dial connects a client that does not read yet.
func (t *connTest) dial(kind string) *testConn {
	t.Helper()
	near, far := net.Pipe()
	t.listener <- far
	c := &testConn{Conn: near, t: t, in: bufio.NewReader(near)}
	if err := c.shakeHands(&url.URL{Host: "pipe", Path: "/ws", RawQuery: "type=" + kind}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// living answers pings until it is cut.
func (t *connTest) living(kind string) {
	go discard(t.dial(kind).read) // ends with the connection
}

func discard[T any](read func() (T, error)) {
	for {
		if _, err := read(); err != nil {
			return
		}
	}
}

// connected is how many trackers and viewers the server has.
func (t *connTest) connected() (trackers, viewers int) {
	synctest.Wait()
	st := t.stats()
	return st.trackers, st.viewers
}

// Connections that do not answer pings end after two intervals; those that answer
// stay.
func TestHeartbeats(t *testing.T) {
	onPipes(t, func(t *connTest) {
		for _, kind := range []string{"tracker", "viewer"} {
			t.living(kind)
			go io.Copy(io.Discard, t.dial(kind)) // it reads, and is silent; ends with the connection
		}
		time.Sleep(2*t.cfg.heartbeat - time.Millisecond)
		if trackers, viewers := t.connected(); trackers != 2 || viewers != 2 {
			t.Errorf("within two intervals: got %d trackers and %d viewers, want 2 of each", trackers, viewers)
		}
		time.Sleep(2 * time.Millisecond)
		if trackers, viewers := t.connected(); trackers != 1 || viewers != 1 {
			t.Errorf("after two intervals: got %d trackers and %d viewers, want the living", trackers, viewers)
		}
		time.Sleep(10 * time.Minute)
		if trackers, viewers := t.connected(); trackers != 1 || viewers != 1 {
			t.Errorf("after more: got %d trackers and %d viewers, want the living", trackers, viewers)
		}
	})
}

// A tracker that waits for the database answers no ping, because nobody reads it,
// and is not cut for that. But it waits less long than its page, which nobody sees
// go meanwhile: otherwise two connections of a page would claim its session, and
// the wrong one might win. Between messages nothing is timed.
func TestStartTime(t *testing.T) {
	onPipes(t, func(t *connTest) {
		t.living("tracker")
		stays, goes := t.dial("tracker"), t.dial("tracker")
		for _, c := range []*testConn{stays, goes} {
			c.send("session_start", `{"sessionId":"s","resume":""}`)
		}
		goes.Close()
		time.Sleep(startTime - time.Millisecond) // in which it misses its pings
		if trackers, _ := t.connected(); trackers != 3 {
			t.Errorf("before the end: got %d trackers, want 3", trackers)
		}
		stays.expectClose(websocket.StatusTryAgainLater)
		time.Sleep(10 * time.Minute)
		if trackers, _ := t.connected(); trackers != 1 {
			t.Errorf("after it: got %d trackers, want the one that has sent nothing", trackers)
		}
	}, "HEARTBEAT_INTERVAL=5s")
	script, err := os.ReadFile("web/tracker-delivery.js")
	patience := regexp.MustCompile(`SILENCE_MS = (\d+);`).FindSubmatch(script)
	if err != nil || patience == nil {
		t.Fatalf("tracker-delivery.js does not say how long it waits: %v", err)
	}
	if ms, _ := strconv.Atoi(string(patience[1])); time.Duration(ms)*time.Millisecond <= startTime {
		t.Errorf("tracker.js waits for %s ms, want longer than %v", patience[1], startTime)
	}
}

// A tracker that waits for room answers no ping either, and is not cut; unless it
// has no session yet, see TestStartTime.
func TestWaitForRoom(t *testing.T) {
	onPipes(t, func(t *connTest) {
		c, fresh, all := t.dial("tracker"), t.dial("tracker"), t.budget.left()
		c.send("no_such_type", nil)
		c.wantError("unknown_type")
		t.budget.force(all)
		for _, c := range []*testConn{c, fresh} {
			go c.send("no_such_type", nil) // ends when it is read, or with the connection
		}
		time.Sleep(startTime + time.Millisecond)
		fresh.expectClose(websocket.StatusTryAgainLater)
		time.Sleep(10 * time.Minute)
		t.budget.give(all)
		c.wantError("unknown_type")
	})
}

// A client that does not go keeps nothing from being stored.
func TestShutdownBeside(t *testing.T) {
	onPipes(t, func(t *connTest) {
		t.access.enter(netip.Addr{}) // and never leaves
		began := time.Now()
		if err := t.stop(&http.Server{}); err != nil || time.Since(began) > shutdownTime/2 {
			t.Errorf("stop: got error %v after %v, want none, soon", err, time.Since(began))
		}
	})
}

// When the database is away at the end the server says that something is lost.
func TestShutdownWithoutDatabase(t *testing.T) {
	onPipes(t, func(t *connTest) {
		hub := &hubTest{T: t.T, hub: t.hub}
		hub.publish(hub.tracker("s"), "s", 1, 1)
		began := time.Now()
		err := t.stop(&http.Server{})
		if took := time.Since(began); err == nil || took != shutdownTime {
			t.Errorf("stop: got error %v after %v, want one that says what was not stored", err, took)
		}
	})
}
