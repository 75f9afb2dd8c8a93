package main

// A network that breaks.

import (
	"bytes"
	"math"
	"math/rand/v2"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

// testProxy stands between two ends that speak TCP (or the target's unix
// socket), and can cut, freeze or mutilate what passes.
type testProxy struct {
	address string // host:port to connect to
	dial    func() (net.Conn, error)
	thief   *thief      // takes answers away, if there is one
	refuses atomic.Bool // new connections

	mu     sync.Mutex
	links  map[*link]bool
	frozen bool
}

// link is one connection through the proxy.
type link struct {
	near, far net.Conn
	gate      sync.RWMutex // locked while the link is frozen
	frozen    bool
	room      atomic.Int64 // bytes that may still pass towards the target
	chunk     atomic.Bool  // a chunk went to PostgreSQL, and the answer is due
	held      []byte       // of that answer, by the thief
}

func newProxy(t testing.TB, dial func() (net.Conn, error), th *thief) *testProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{address: listener.Addr().String(), dial: dial, thief: th, links: map[*link]bool{}}
	go p.accept(listener) // ends when the listener is closed
	t.Cleanup(func() { listener.Close(); p.thaw(); p.cut() })
	return p
}

// proxyTo stands before a server; ws is the address for its trackers.
func proxyTo(t testing.TB, s *testServer) (p *testProxy, ws string) {
	p = newProxy(t, func() (net.Conn, error) { return net.Dial("tcp", "127.0.0.1:"+s.port) }, nil)
	return p, "ws://" + p.address + "/ws?type=tracker"
}

// proxyToDatabase stands before PostgreSQL; through is the URL for its users.
func proxyToDatabase(t testing.TB, database string, th *thief) (p *testProxy, through string) {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	network, target := "tcp", u.Host
	if dir := query.Get("host"); dir != "" {
		network, target = "unix", filepath.Join(dir, ".s.PGSQL."+query.Get("port"))
	}
	p = newProxy(t, func() (net.Conn, error) { return net.Dial(network, target) }, th)
	query.Del("host")
	query.Del("port")
	query.Set("sslmode", "disable")
	u.Host, u.RawQuery = p.address, query.Encode()
	return p, u.String()
}

func (p *testProxy) accept(listener net.Listener) {
	for {
		near, err := listener.Accept()
		if err != nil {
			return
		}
		if p.refuses.Load() {
			near.Close()
			continue
		}
		far, err := p.dial()
		if err != nil {
			near.Close()
			continue
		}
		l := &link{near: near, far: far}
		l.room.Store(math.MaxInt64)
		p.mu.Lock()
		p.links[l] = true
		if p.frozen {
			l.freeze()
		}
		p.mu.Unlock()
		go p.pump(l, near, far, true) // both end when either side closes
		go p.pump(l, far, near, false)
	}
}

func (p *testProxy) pump(l *link, from, to net.Conn, up bool) {
	defer p.forget(l)
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		l.wait()
		if err != nil {
			return
		}
		data, whole := buf[:n], true
		if up {
			data, whole = l.pass(data)
		}
		if p.thief != nil && up {
			p.thief.request(l, data)
		} else if p.thief != nil {
			data, whole = p.thief.answer(l, data)
		}
		if _, err := to.Write(data); err != nil || !whole {
			return
		}
	}
}

// wait waits while the link is frozen: it passes nothing then, and does not tell
// that its other end is gone.
func (l *link) wait() {
	l.gate.RLock()
	defer l.gate.RUnlock()
}

// pass says how much of data may pass, and whether that is all of it.
func (l *link) pass(data []byte) ([]byte, bool) {
	left := l.room.Add(-int64(len(data)))
	if left >= 0 {
		return data, true
	}
	return data[:max(0, len(data)+int(left))], false
}

func (p *testProxy) forget(l *link) {
	l.near.Close()
	l.far.Close()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

// each does something with all links.
func (p *testProxy) each(do func(*link)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		do(l)
	}
}

// cut ends all links.
func (p *testProxy) cut() { p.each(func(l *link) { l.near.Close(); l.far.Close() }) }

// cutInside ends every link within the next so many bytes sent to the target:
// as a rule in the middle of a message.
func (p *testProxy) cutInside(bytes int64) {
	p.each(func(l *link) { l.room.Store(rand.Int64N(bytes)) })
}

// spare takes back what cutInside has set.
func (p *testProxy) spare() { p.each(func(l *link) { l.room.Store(math.MaxInt64) }) }

// isWhole reports whether no link is about to be cut.
func (p *testProxy) isWhole() bool {
	whole := true
	p.each(func(l *link) { whole = whole && l.room.Load() > math.MaxInt64/2 })
	return whole
}

// freezeLinks makes the present links pass nothing, not even their end.
func (p *testProxy) freezeLinks() { p.each((*link).freeze) }

// freeze is freezeLinks for links to come, too.
func (p *testProxy) freeze() {
	p.mu.Lock()
	p.frozen = true
	p.mu.Unlock()
	p.freezeLinks()
}

func (p *testProxy) thaw() {
	p.mu.Lock()
	p.frozen = false
	p.mu.Unlock()
	p.each(func(l *link) {
		if l.frozen {
			l.frozen = false
			l.gate.Unlock()
		}
	})
}

// freeze is called with the proxy's lock held.
func (l *link) freeze() {
	if !l.frozen {
		l.frozen = true
		l.gate.Lock()
	}
}

// thief takes answers to commits away: as many as it is armed for.
type thief struct{ armed, stolen atomic.Int64 }

func (th *thief) request(l *link, data []byte) {
	if bytes.Contains(data, []byte{0x1f, 0x8b, 0x08}) { // gzip
		l.chunk.Store(true)
	}
}

func (th *thief) answer(l *link, data []byte) ([]byte, bool) {
	if !l.chunk.Load() || th.armed.Load() <= 0 && l.held == nil {
		l.chunk.Store(false)
		return data, true
	}
	l.held = append(l.held, data...)
	if !bytes.HasSuffix(l.held, []byte("Z\x00\x00\x00\x05I")) { // ready for the next query: this one is committed
		return nil, true
	}
	th.armed.Add(-1)
	th.stolen.Add(1)
	return nil, false
}
