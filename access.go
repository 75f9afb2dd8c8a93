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
	browsers            // viewers, who may also arrive by a link with the token
	scrapers            // viewers, or anyone with METRICS_OPEN
	sockets             // trackers or viewers, as they say of themselves
	visitors            // pages of this server, before they are signed in
	anyone              // there is nothing here to protect
)

// admit decides about a request; nil lets it in.
func (a *access) admit(who who, r *http.Request) *denial {
	switch {
	case who == anyone, who == scrapers && a.metricsOpen:
		return nil
	case who == visitors:
		return a.page(r)
	case who == sockets && r.URL.Query().Get("type") != "viewer":
		return a.tracker(r)
	}
	return a.viewer(r, who == browsers || who == sockets)
}

// denial is why a request is not let in.
type denial struct {
	status          int
	reason, message string        // for counters, and for people
	wait            time.Duration // before it is of use to try again
}

// accessConfig is what the settings say of access.
type accessConfig struct {
	token, key                    string   // ACCESS_TOKEN, INGEST_KEY; empty when there is none
	trackerOrigins, viewerOrigins []string // scheme://host[:port], or * for trackers
	publicHosts                   []string // host[:port]
	trustProxy, metricsOpen       bool
}

// access decides who may do what. It is safe for concurrent use.
type access struct {
	accessConfig
	open       bool   // there is no token: who reaches the loopback HOST may view
	made       bool   // the token was made for this start
	cookieName string // cookies are shared by all ports of a host
	cookie     string // the value that stands for the token
	throttle   throttle
}

// newAccess makes a token where a missing one would open the server to a network.
func newAccess(c accessConfig, host, port string) *access {
	a := &access{accessConfig: c, cookieName: "session-replay-" + port, throttle: throttle{failed: map[netip.Addr]failures{}}}
	addr, _ := netip.ParseAddr(host)
	a.open = c.token == "" && (host == "localhost" || addr.IsLoopback())
	if c.token == "" && !a.open {
		a.token, a.made = rand.Text(), true
	}
	mac := hmac.New(sha256.New, []byte(a.token))
	mac.Write([]byte("session-replay: signed in"))
	a.cookie = hex.EncodeToString(mac.Sum(nil))
	return a
}

// viewer asks for the token; with byLink it may be in the URL.
func (a *access) viewer(r *http.Request, byLink bool) *denial {
	if d := a.page(r); d != nil || a.open {
		return d
	}
	presented, right := a.presented(r, byLink)
	if !presented {
		return &denial{status: http.StatusUnauthorized, reason: "access_token", message: "this needs the access token"}
	}
	return a.judge(r, right)
}

// page turns away other sites' pages, and names that somebody else has pointed
// at this machine to read what is open to it (DNS rebinding).
func (a *access) page(r *http.Request) *denial {
	switch {
	case a.open && !a.knownHost(r.Host):
		return &denial{status: http.StatusMisdirectedRequest, reason: "host", message: "unknown host: set ACCESS_TOKEN, or name it in PUBLIC_HOSTS"}
	case !a.knownPage(r):
		return &denial{status: http.StatusForbidden, reason: "origin", message: "pages of other sites may not do this: see VIEWER_ORIGINS"}
	}
	return nil
}

// tracker asks for the key, and for an origin that may record. Who has the
// token but not the key may not record; programs have no origin.
func (a *access) tracker(r *http.Request) *denial {
	origin := r.Header.Get("Origin")
	switch {
	case a.key != "" && !same(r.URL.Query().Get("key"), a.key):
		return &denial{status: http.StatusUnauthorized, reason: "ingest_key", message: "this needs the ingest key"}
	case origin == "", slices.Contains(a.trackerOrigins, "*"), slices.Contains(a.trackerOrigins, origin), a.own(r, origin):
		return nil
	}
	return &denial{status: http.StatusForbidden, reason: "origin", message: "pages of this origin may not record: see TRACKER_ORIGINS"}
}

// presented says whether a request brings a token, or the cookie that stands
// for it, and whether that is right. Only the first one found is looked at.
func (a *access) presented(r *http.Request, byLink bool) (presented, right bool) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return true, same(token, a.token)
	}
	if token := r.URL.Query().Get("token"); byLink && token != "" {
		return true, same(token, a.token)
	}
	_, err := r.Cookie(a.cookieName)
	return err == nil, a.signedIn(r)
}

// signedIn says whether a request comes with the cookie.
func (a *access) signedIn(r *http.Request) bool {
	cookie, err := r.Cookie(a.cookieName)
	return !a.open && err == nil && same(cookie.Value, a.cookie)
}

// judge is the answer to an attempt with a token.
func (a *access) judge(r *http.Request, right bool) *denial {
	if wait := a.throttle.wait(a.address(r), right); wait > 0 {
		return &denial{http.StatusTooManyRequests, "attempts", "too many wrong tokens from this address: wait", wait}
	}
	if !right {
		return &denial{status: http.StatusUnauthorized, reason: "access_token", message: "this is not the access token"}
	}
	return nil
}

// same compares secrets in a time that does not depend on them.
func same(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// signIn gives a browser the cookie, if there is a token at all; with a negative
// age, in seconds, it takes it away.
func (a *access) signIn(w http.ResponseWriter, r *http.Request, age int) {
	if a.open {
		return
	}
	http.SetCookie(w, &http.Cookie{Name: a.cookieName, Value: a.cookie, Path: "/", MaxAge: age,
		HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: a.secure(r)})
}

// Where a request comes from.

// knownHost holds when viewing is open, where HOST is a loopback address too.
func (a *access) knownHost(hostport string) bool {
	name := strings.ToLower((&url.URL{Host: hostport}).Hostname())
	addr, _ := netip.ParseAddr(name)
	return name == "localhost" || addr.IsLoopback() || slices.Contains(a.publicHosts, name) || slices.Contains(a.publicHosts, strings.ToLower(hostport))
}

// knownPage says whether a request comes from a program, a page of this server
// or of VIEWER_ORIGINS, or is somebody following a link. Browsers send Origin
// with whatever a page could read the answer of or change something by.
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

// own says whether an origin is this server's. A proxy may have taken TLS off
// without TRUST_PROXY: then https is its own as well.
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
	u, err := url.Parse(strings.ToLower(s))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Scheme+"://"+u.Host != strings.ToLower(s) {
		return "", fmt.Errorf("%q is not an origin such as https://shop.example.com", s)
	}
	return u.Scheme + "://" + u.Host, nil
}

// parseHost gives a host, with or without port, as browsers write it.
func parseHost(s string) (string, error) {
	u, err := url.Parse("http://" + strings.ToLower(s))
	if err != nil || u.Hostname() == "" || u.Host != strings.ToLower(s) {
		return "", fmt.Errorf("%q is not a host such as replay.example.com", s)
	}
	return u.Host, nil
}

// Limits.

const (
	freeAttempts = 10 // wrong tokens before an address has to wait
	longestWait  = time.Minute
	forgetAfter  = 10 * time.Minute
	maxThrottled = 10_000 // addresses remembered
)

// throttle slows down who tries tokens. It is safe for concurrent use.
type throttle struct {
	mu     sync.Mutex
	failed map[netip.Addr]failures
}

type failures struct {
	n    int
	last time.Time
}

// wait counts an attempt, unless addr still has to wait: then it says how long,
// and nobody learns whether the attempt was right.
func (t *throttle) wait(addr netip.Addr, right bool) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	f, now := t.failed[addr], time.Now()
	if now.Sub(f.last) > forgetAfter {
		f.n = 0
	}
	if over := f.n - freeAttempts; over >= 0 {
		if wait := min(longestWait, time.Second<<min(over, 10)) - now.Sub(f.last); wait > 0 {
			return wait
		}
	}
	if right {
		delete(t.failed, addr)
		return 0
	}
	if len(t.failed) >= maxThrottled {
		clear(t.failed)
	}
	t.failed[addr] = failures{f.n + 1, now}
	return 0
}

// admission counts WebSockets, in all and by address. It is safe for concurrent
// use.
type admission struct {
	max, maxPerAddr int
	trustProxy      bool

	mu     sync.Mutex
	total  int
	byAddr map[netip.Addr]int
}

// enter lets a connection in, or says why not. A loopback address that no
// trusted proxy has named may be that of a proxy, and has no limit of its own.
func (a *admission) enter(addr netip.Addr) *denial {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.total >= a.max:
		return &denial{http.StatusServiceUnavailable, "connections", "too many connections: MAX_CONNECTIONS", 5 * time.Second}
	case a.byAddr[addr] >= a.maxPerAddr && (a.trustProxy || !addr.IsLoopback()):
		return &denial{http.StatusTooManyRequests, "connections_per_address", "too many connections from this address: MAX_CONNECTIONS_PER_ADDRESS", 5 * time.Second}
	}
	a.total++
	a.byAddr[addr]++
	return nil
}

func (a *admission) leave(addr netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.total--
	if a.byAddr[addr]--; a.byAddr[addr] == 0 {
		delete(a.byAddr, addr)
	}
}
