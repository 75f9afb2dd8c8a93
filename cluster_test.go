package main

// Several servers on one database. Trackers come to any of them, viewers to all,
// and servers and their connections to the database break.

import (
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// cluster is three servers behind a proxy that gives each connection to the next.
type cluster struct {
	*load   // of the first server, with the proxy's address
	servers []*testServer
	toDB    []*testProxy
}

func newCluster(t *testing.T, env ...string) *cluster {
	t.Helper()
	c := &cluster{}
	database := testDatabase(t)
	for range 3 {
		proxy, through := proxyToDatabase(t, database, nil)
		s := newServer(t, append([]string{"DATABASE_URL=" + through, "BATCH_INTERVAL=5000"}, env...)...)
		s.database = database
		s.start()
		c.servers, c.toDB = append(c.servers, s), append(c.toDB, proxy)
	}
	var turn atomic.Int64
	proxy := newProxy(t, func() (conn net.Conn, err error) {
		for range c.servers { // some may be away
			s := c.servers[turn.Add(1)%int64(len(c.servers))]
			if conn, err = net.Dial("tcp", "127.0.0.1:"+s.port); err == nil {
				break
			}
		}
		return conn, err
	}, nil)
	for _, s := range c.servers {
		s.waitHealthy()
	}
	c.load = &load{t: t, server: c.servers[0], toServer: proxy, address: "ws://" + proxy.address + "/ws?type=tracker",
		goHome: func() {}}
	return c
}

// recordAll starts trackers that each have a viewer on each server.
func (c *cluster) recordAll(trackers int, change func(*testTracker)) {
	c.t.Helper()
	for i := range trackers {
		tr := c.tracker(i)
		change(tr)
		c.trackers = append(c.trackers, tr.start(c.address))
	}
	for _, tr := range c.trackers {
		waitUntil(c.t, "it records", func() bool { return tr.read(&tr.made) > 0 })
		for _, s := range c.servers {
			c.viewers = append(c.viewers, watchSession(c.t, s.ws("viewer"), tr.session))
		}
	}
}

// agree waits until each server lists these sessions as live, and gives how long
// that took.
func (c *cluster) agree(want ...string) time.Duration {
	c.t.Helper()
	slices.Sort(want)
	began := time.Now()
	for i, s := range c.servers {
		v := dialServer(c.t, s.ws("viewer"))
		waitUntil(c.t, fmt.Sprintf("server %d lists the live sessions", i), func() bool {
			v.send("get_active_sessions", "{}")
			return slices.Equal(idsOf(v.expect("active_sessions")), want)
		})
		v.Close()
	}
	return time.Since(began)
}

func (c *cluster) sessions() (ids []string) {
	for _, tr := range c.trackers {
		ids = append(ids, tr.session)
	}
	return ids
}

// cutDatabase keeps one server from the database for a while.
func (c *cluster) cutDatabase(i int, during func()) {
	c.toDB[i].refuses.Store(true)
	c.toDB[i].cut()
	during()
	c.toDB[i].refuses.Store(false)
}

// Every event is seen once and in order on every server, and stored once; the
// lists of all servers are the same.
func TestFaultServers(t *testing.T) {
	besideOthers(t)
	c := newCluster(t)
	c.recordAll(scale(6, 30), func(tr *testTracker) { tr.pause = 30 * time.Millisecond })
	t.Logf("lists agree after %v", c.agree(c.sessions()...))
	for round := range scale(1, 6) {
		i := round % len(c.servers)
		c.servers[i].kill9()
		c.progress("kill -9 of a server")
		c.servers[i].start()
		c.servers[i].waitHealthy()
		c.cutDatabase((i+1)%len(c.servers), func() {
			time.Sleep(scale(time.Second, 30*time.Second))
			c.toServer.cut() // the trackers go to any server
		})
		c.progress("a server without the database")
		t.Logf("lists agree after %v", c.agree(c.sessions()...))
	}
	for _, tr := range c.trackers {
		tr.ends = true
	}
	c.finish()
	t.Logf("lists agree after %v", c.agree())
}

// latencies are how long events took from a tracker to viewers on other servers.
type latencies struct {
	mu   sync.Mutex
	sent map[string]map[int]time.Time
	all  []time.Duration
}

func (l *latencies) sending(tr *testTracker) {
	sent := map[int]time.Time{}
	l.sent[tr.session] = sent
	tr.sending = func(seq int64) {
		l.mu.Lock()
		sent[int(seq-1)*tr.perBatch] = time.Now()
		l.mu.Unlock()
	}
}

func (l *latencies) seeing(v *testViewer) {
	sent := l.sent[v.session]
	v.mu.Lock()
	defer v.mu.Unlock()
	v.saw = func(from, count int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for n := range count {
			if at, ok := sent[from+n]; ok {
				l.all = append(l.all, time.Since(at))
			}
		}
	}
}

// An event that is watched elsewhere does not wait for its batch: it is there
// within a second of its sending, as the full test measures.
func TestFaultServersLatency(t *testing.T) {
	besideOthers(t)
	c := newCluster(t, "BATCH_INTERVAL=1h")
	l := &latencies{sent: map[string]map[int]time.Time{}}
	c.recordAll(scale(4, 20), func(tr *testTracker) {
		tr.perBatch, tr.pause = 5, 500*time.Millisecond
		l.sending(tr)
	})
	time.Sleep(scale(0, 2*time.Second)) // until the server that records knows of its viewers
	for _, v := range c.viewers {
		l.seeing(v)
	}
	var all []time.Duration
	waitUntil(t, "viewers elsewhere see events live", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		all = slices.Sorted(slices.Values(l.all))
		return len(all) >= scale(3, 100)*len(c.viewers)
	})
	all = all[len(all)/3:] // without the third that the servers record which are watched
	p50, p99 := all[len(all)/2], all[len(all)*99/100]
	t.Logf("%d sessions, %d viewers, %d batches seen: p50 %v, p99 %v", len(c.trackers), len(c.viewers), len(all), p50,
		p99)
	if fullFaults && p99 > time.Second {
		t.Errorf("p99 is %v, the limit is a second", p99)
	}
	c.finish()
}
