package main

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// who says for whom a route is. The zero value is the strictest.
type who int

const (
	viewers  who = iota // who may list, watch, read and delete recordings
	browsers            // viewers, who may also come by a link with the token
	scrapers            // viewers, or anyone with METRICS_OPEN
	sockets             // trackers or viewers, as they say of themselves
	visitors            // pages of this server that are not signed in yet
	anyone              // there is nothing here to protect
)

// accessConfig is what the settings say of access.
type accessConfig struct {
	token, key                    string   // ACCESS_TOKEN, INGEST_KEY; empty when there is none
	trackerOrigins, viewerOrigins []string // scheme://host[:port], or * for trackers
	publicHosts                   []string // host[:port]
	mediaOrigins                  []string // whose pictures, fonts and style sheets a replay may load
	trustProxy, metricsOpen       bool
	maxConnections, maxPerAddress int
}

// access decides who may do what. It is safe for concurrent use.
type access struct {
	accessConfig
	open       bool   // there is no token: who reaches the loopback HOST may view
	made       bool   // the token was made for this start
	cookieName string // has the port: browsers send a host's cookies to all of its ports
	cookie     string // the value that stands for the token

	mu      sync.Mutex
	failed  map[netip.Addr]failures // addresses that tried wrong tokens
	sockets map[netip.Addr]int      // open WebSockets by address
	total   int                     // of these
	closed  bool                    // the server stops: no more of them
}

// newAccess makes a token where a missing one would open the server to a network.
func newAccess(c accessConfig, host, port string) *access {
	a := &access{accessConfig: c, cookieName: "session-replay-" + port, failed: map[netip.Addr]failures{}, sockets: map[netip.Addr]int{}}
	addr, _ := netip.ParseAddr(host)
	a.open = c.token == "" && (host == "localhost" || addr.IsLoopback())
	if a.made = c.token == "" && !a.open; a.made {
		a.token = rand.Text()
	}
	mac := hmac.New(sha256.New, []byte(a.token))
	mac.Write([]byte("session-replay: signed in"))
	a.cookie = hex.EncodeToString(mac.Sum(nil))
	return a
}

// denial is why somebody is not let in.
type denial struct {
	status          int
	reason, message string        // for counters, and for people
	wait            time.Duration // before it is of use to try again
}

// admit decides about a request; nil lets it in.
func (a *access) admit(who who, r *http.Request) *denial {
	switch {
	case who == anyone, who == scrapers && a.metricsOpen:
		return nil
	case who == sockets && r.URL.Query().Get("type") != "viewer":
		return a.admitTracker(r)
	case a.open && !a.knownHost(strings.ToLower(r.Host)):
		return &denial{http.StatusMisdirectedRequest, "host", "unknown host: set ACCESS_TOKEN, or name it in PUBLIC_HOSTS", 0}
	case !a.knownPage(r):
		return &denial{http.StatusForbidden, "origin", "pages of other sites may not do this: see VIEWER_ORIGINS", 0}
	case a.open, who == visitors, a.signedIn(r):
		return nil
	}
	presented, right := a.presented(r, who == browsers || who == sockets)
	if !presented {
		return &denial{http.StatusUnauthorized, "no_token", "this needs the access token", 0}
	}
	return a.judge(r, right)
}

// admitTracker asks for the key, and for an origin that may record; programs
// have none. The token does not stand for the key.
func (a *access) admitTracker(r *http.Request) *denial {
	origin := r.Header.Get("Origin")
	switch {
	case a.key != "" && !same(r.URL.Query().Get("key"), a.key):
		return &denial{http.StatusUnauthorized, "ingest_key", "this needs the ingest key", 0}
	case origin == "", slices.Contains(a.trackerOrigins, "*"), slices.Contains(a.trackerOrigins, origin), a.own(r, origin):
		return nil
	}
	return &denial{http.StatusForbidden, "origin", "pages of this origin may not record: see TRACKER_ORIGINS", 0}
}

// Tokens.

// presented says whether a request brings a token and whether that is right. A
// cookie that stands for another token counts as a wrong one.
func (a *access) presented(r *http.Request, byLink bool) (presented, right bool) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	link := r.URL.Query().Get("token")
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		return true, same(token, a.token)
	case byLink && link != "":
		return true, same(link, a.token)
	}
	_, err := r.Cookie(a.cookieName)
	return err == nil, false
}

// signedIn says whether a request comes with the cookie, which nobody guesses:
// those who try tokens do not keep out who has it.
func (a *access) signedIn(r *http.Request) bool {
	cookie, err := r.Cookie(a.cookieName)
	return !a.open && err == nil && same(cookie.Value, a.cookie)
}

// signIn gives a browser the cookie, if there is a token at all; with a negative
// age, in seconds, it takes it away.
func (a *access) signIn(w http.ResponseWriter, r *http.Request, age int) {
	if !a.open {
		http.SetCookie(w, &http.Cookie{Name: a.cookieName, Value: a.cookie, Path: "/", MaxAge: age,
			HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: a.secure(r)})
	}
}

// same compares secrets in a time that does not depend on them.
func same(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

const (
	freeAttempts = 10 // wrong tokens before an address has to wait
	longestWait  = time.Minute
	forgetAfter  = 10 * time.Minute
	maxFailed    = 10_000 // addresses remembered
)

type failures struct {
	n    int
	last time.Time
}

// judge answers an attempt with a token. After too many wrong ones the address
// has to wait, each time twice as long, and meanwhile nobody learns whether an
// attempt from there was right.
func (a *access) judge(r *http.Request, right bool) *denial {
	addr := a.address(r)
	a.mu.Lock()
	defer a.mu.Unlock()
	f := a.failed[addr]
	age := time.Since(f.last)
	if age > forgetAfter {
		f.n = 0
	}
	if f.n >= freeAttempts {
		if wait := min(longestWait, time.Second<<min(f.n-freeAttempts, 10)) - age; wait > 0 {
			return &denial{http.StatusTooManyRequests, "attempts", "too many wrong tokens from this address: wait", wait}
		}
	}
	if right {
		delete(a.failed, addr)
		return nil
	}
	if len(a.failed) >= maxFailed {
		clear(a.failed)
	}
	a.failed[addr] = failures{f.n + 1, time.Now()}
	return &denial{http.StatusUnauthorized, "wrong_token", "this is not the access token", 0}
}

// Where a request comes from.

// knownHost turns away names that somebody has pointed at this machine to read
// what is open to it (DNS rebinding). Viewing is open on a loopback HOST only.
func (a *access) knownHost(host string) bool {
	name := (&url.URL{Host: host}).Hostname()
	addr, _ := netip.ParseAddr(name)
	return name == "localhost" || addr.IsLoopback() || slices.Contains(a.publicHosts, name) || slices.Contains(a.publicHosts, host)
}

// knownPage says whether a request comes from a program, from a page of this
// server or of VIEWER_ORIGINS, or from somebody who follows a link. Browsers
// send Origin with all by which a page could change something or read the answer.
func (a *access) knownPage(r *http.Request) bool {
	origin, site := r.Header.Get("Origin"), r.Header.Get("Sec-Fetch-Site")
	switch {
	case site == "same-origin", slices.Contains(a.viewerOrigins, origin), a.own(r, origin):
		return true
	case origin != "":
		return false
	}
	return site == "" || site == "none" || r.Header.Get("Sec-Fetch-Mode") == "navigate"
}

// own says whether an origin is this server's. Where it sees no TLS, a proxy may
// have taken it off.
func (a *access) own(r *http.Request, origin string) bool {
	u, err := url.Parse(origin)
	return err == nil && u.Host != "" && (u.Scheme == "https" || u.Scheme == "http" && !a.secure(r)) &&
		(strings.EqualFold(u.Host, r.Host) || slices.Contains(a.publicHosts, u.Host))
}

func (a *access) secure(r *http.Request) bool {
	return r.TLS != nil || a.trustProxy && last(r, "X-Forwarded-Proto") == "https"
}

// address is whom a limit counts: the peer, or, with TRUST_PROXY, the one that
// the nearest proxy names. In IPv6 it is the network, which one client has to
// itself.
func (a *access) address(r *http.Request) netip.Addr {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr := peer.Addr()
	if named, err := netip.ParseAddr(last(r, "X-Forwarded-For")); a.trustProxy && err == nil {
		addr = named
	}
	addr = addr.Unmap().WithZone("")
	if network, err := addr.Prefix(64); addr.Is6() && !addr.IsLoopback() && err == nil {
		addr = network.Addr()
	}
	return addr
}

// last is the last element of a header that is a list: what the nearest proxy
// has added, and not what a client made up.
func last(r *http.Request, header string) string {
	all := strings.Join(r.Header.Values(header), ",")
	return strings.TrimSpace(all[strings.LastIndex(all, ",")+1:])
}

// parseOrigin gives an origin as browsers write it.
func parseOrigin(s string) (string, error) {
	s = strings.ToLower(s)
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Scheme+"://"+u.Host != s {
		return "", fmt.Errorf("%q is not of the form https://host[:port]", s)
	}
	return s, nil
}

// Connections.

// enter counts a WebSocket, or says why it may not be. A loopback address that
// no trusted proxy has named may be a proxy's, and has no limit of its own.
func (a *access) enter(addr netip.Addr) *denial {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed:
		return &denial{http.StatusServiceUnavailable, "stopping", "the server stops", time.Second}
	case a.total >= a.maxConnections:
		return &denial{http.StatusServiceUnavailable, "connections", "too many connections: MAX_CONNECTIONS", 5 * time.Second}
	case a.sockets[addr] >= a.maxPerAddress && (a.trustProxy || !addr.IsLoopback()):
		return &denial{http.StatusTooManyRequests, "connections_per_address", "too many connections: MAX_CONNECTIONS_PER_ADDRESS", 5 * time.Second}
	}
	a.total++
	a.sockets[addr]++
	return nil
}

// close lets no more WebSockets in, and gives how many are left.
func (a *access) close() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	return a.total
}

func (a *access) leave(addr netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.total--
	if a.sockets[addr]--; a.sockets[addr] == 0 {
		delete(a.sockets, addr)
	}
}
