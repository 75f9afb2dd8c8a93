package main

import (
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// audience says for whom a route is. The zero value is the strictest.
type audience int

const (
	viewers  audience = iota // may list, watch, read and delete recordings
	browsers                 // viewers, also by a link that has the token
	scrapers                 // viewers, or anyone with METRICS_OPEN
	sockets                  // trackers or viewers: see isTracker
	visitors                 // pages of this server before the sign-in
	anyone                   // there is nothing here to protect
)

// minTokenLength keeps ACCESS_TOKEN from being guessed: there is no limit on
// attempts, which an attacker could use to lock viewers out.
const minTokenLength = 16

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
	log        *slog.Logger
	open       bool   // there is no token: whoever reaches the loopback HOST may view
	generated  bool   // the token was made for this start
	cookieName string // has the port: browsers send a host's cookies to all of its ports
	cookie     string // the value that stands for the token

	unnamed sync.Once // says once that a proxy named no address

	mu     sync.Mutex
	conns  map[netip.Addr]int // WebSockets and trackers' POSTs that are open, by address
	total  int                // of these
	starts map[netip.Addr]int // sessions begun since startsSince, by address
	closed bool               // the server stops: no more connections

	startsSince time.Time
}

// newAccess makes a token where a missing one would open the server to a network.
func newAccess(c accessConfig, host, port string, log *slog.Logger) *access {
	a := &access{accessConfig: c, log: log, cookieName: "session-replay-" + port,
		conns: map[netip.Addr]int{}, starts: map[netip.Addr]int{}}
	addr, _ := netip.ParseAddr(host)
	a.open = c.token == "" && (host == "localhost" || addr.IsLoopback())
	if a.generated = c.token == "" && !a.open; a.generated {
		a.token = rand.Text()
	}
	mac := hmac.New(sha256.New, []byte(a.token))
	mac.Write([]byte("session-replay: signed in"))
	// The same for all browsers: only another ACCESS_TOKEN makes it worthless.
	a.cookie = hex.EncodeToString(mac.Sum(nil))
	return a
}

// denial is why a request is not let in.
type denial struct {
	status          int
	reason, message string // for counters, and for people
	retryAfter      int    // seconds before another attempt can succeed; 0: none will
}

// What is denied in more than one place.
var (
	deniedToken  = &denial{http.StatusUnauthorized, "wrong_token", "this is not the access token", 0}
	deniedOrigin = &denial{http.StatusForbidden, "origin",
		"pages of this origin may not record: see TRACKER_ORIGINS", 0}
)

// admit decides about a request; nil lets it in. The first case that fits decides: what needs no
// token comes before what does.
func (a *access) admit(who audience, r *http.Request) *denial {
	switch {
	case who == anyone, who == scrapers && a.metricsOpen:
		return nil
	case who == sockets && isTracker(r):
		return a.admitTracker(r)
	case a.open && !a.isKnownHost(strings.ToLower(r.Host)):
		return &denial{http.StatusMisdirectedRequest, "host",
			"unknown host: name it in PUBLIC_HOSTS or set ACCESS_TOKEN", 0}
	case !a.isKnownPage(r):
		return &denial{http.StatusForbidden, "origin", "pages of other sites may not do this: see VIEWER_ORIGINS", 0}
	case a.open, who == visitors, a.signedIn(r):
		return nil
	}
	return a.checkToken(r, who == browsers || who == sockets)
}

// isTracker says whether a request is of a page that records.
func isTracker(r *http.Request) bool {
	return r.URL.Path == "/ws" && r.URL.Query().Get("type") != "viewer" || isRecording(r)
}

// isRecording says whether a request is of rrweb's own client.
func isRecording(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/recordings/") }

// admitTracker asks for the key, and for an origin that may record. The token
// does not stand for the key.
func (a *access) admitTracker(r *http.Request) *denial {
	key := r.URL.Query().Get("key")
	if isRecording(r) {
		key = cmp.Or(r.URL.Query().Get("token"), strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
	}
	switch {
	case a.key != "" && !equalSecret(key, a.key):
		return &denial{http.StatusUnauthorized, "ingest_key", "this needs the ingest key", 0}
	case !a.mayRecord(r):
		return deniedOrigin
	}
	return nil
}

// mayRecord says whether a request comes from a page of TRACKER_ORIGINS or of this
// server, or from a program, which has no origin.
func (a *access) mayRecord(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	return origin == "" || slices.Contains(a.trackerOrigins, "*") || slices.Contains(a.trackerOrigins, origin) ||
		a.isOwnOrigin(r, origin)
}

// Tokens.

// checkToken looks for the token in the Authorization header or, with byLink, in
// the query string. A cookie that is left here stands for another token.
func (a *access) checkToken(r *http.Request, byLink bool) *denial {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		token = ""
	}
	if token == "" && byLink {
		token = r.URL.Query().Get("token")
	}
	if _, err := r.Cookie(a.cookieName); token == "" && err != nil {
		return &denial{http.StatusUnauthorized, "no_token", "this needs the access token", 0}
	}
	if !equalSecret(token, a.token) {
		return deniedToken
	}
	return nil
}

// isToken says whether this is the access token, where there is one.
func (a *access) isToken(token string) bool { return !a.open && equalSecret(token, a.token) }

// signedIn says whether a request has the cookie that stands for the token.
func (a *access) signedIn(r *http.Request) bool {
	cookie, err := r.Cookie(a.cookieName)
	// Without a token everybody could make its cookie.
	return !a.open && err == nil && equalSecret(cookie.Value, a.cookie)
}

// signIn gives a browser the cookie, if there is a token at all; with a negative
// age, in seconds, it takes it away.
func (a *access) signIn(w http.ResponseWriter, r *http.Request, age int) {
	if !a.open {
		http.SetCookie(w, &http.Cookie{Name: a.cookieName, Value: a.cookie, Path: "/", MaxAge: age,
			HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: a.secure(r)})
	}
}

// equalSecret takes a time that does not depend on the secrets.
func equalSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// Where a request comes from.

// isKnownHost protects a server on a loopback HOST, where viewing is open:
// otherwise a page could point its own name at this machine and read recordings
// (DNS rebinding).
func (a *access) isKnownHost(host string) bool {
	name := (&url.URL{Host: host}).Hostname()
	addr, _ := netip.ParseAddr(name)
	return name == "localhost" || addr.IsLoopback() ||
		slices.Contains(a.publicHosts, name) || slices.Contains(a.publicHosts, host)
}

// isKnownPage says whether a request comes from a program, from a page of this
// server or of VIEWER_ORIGINS, or from somebody who follows a link. Browsers
// send Origin with each request by which a page could change something or read the answer.
func (a *access) isKnownPage(r *http.Request) bool {
	origin, site := r.Header.Get("Origin"), r.Header.Get("Sec-Fetch-Site")
	switch {
	case site == "same-origin", slices.Contains(a.viewerOrigins, origin), a.isOwnOrigin(r, origin):
		return true
	case origin != "":
		return false
	}
	return site == "" || site == "none" || r.Header.Get("Sec-Fetch-Mode") == "navigate"
}

// isOwnOrigin says whether an origin is this server's. Where the server sees no
// TLS, a proxy may have taken it off.
func (a *access) isOwnOrigin(r *http.Request, origin string) bool {
	u, err := url.Parse(origin)
	return err == nil && u.Host != "" && (u.Scheme == "https" || u.Scheme == "http" && !a.secure(r)) &&
		(strings.EqualFold(u.Host, r.Host) || slices.Contains(a.publicHosts, u.Host))
}

// secure reports whether the client speaks TLS, to this server or to a proxy that is trusted.
func (a *access) secure(r *http.Request) bool {
	return r.TLS != nil || a.trustProxy && lastElement(r, "X-Forwarded-Proto") == "https"
}

// address is what limits count by: the peer's or, with TRUST_PROXY, the one that
// the nearest proxy names. Of IPv6 it is the network: one client has all of it.
func (a *access) address(r *http.Request) netip.Addr {
	addr, _ := parseAddress(r.RemoteAddr)
	if named := lastElement(r, "X-Forwarded-For"); a.trustProxy && named != "" {
		if client, err := parseAddress(named); err == nil {
			addr = client
		} else {
			a.unnamed.Do(func() {
				a.log.Warn("X-Forwarded-For names no address, limits count the proxy's", "proxy", addr.String(),
					"err", err)
			})
		}
	}
	addr = addr.Unmap().WithZone("")
	if network, err := addr.Prefix(64); addr.Is6() && !addr.IsLoopback() && err == nil {
		addr = network.Addr()
	}
	return addr
}

// parseAddress reads an address with or without a port or brackets, as proxies
// write it.
func parseAddress(s string) (netip.Addr, error) {
	if withPort, err := netip.ParseAddrPort(s); err == nil {
		return withPort.Addr(), nil
	}
	return netip.ParseAddr(strings.Trim(s, "[]"))
}

// lastElement is what the nearest proxy has added to a header that is a list;
// the elements before it can be made up by a client.
func lastElement(r *http.Request, header string) string {
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
	return strings.TrimSuffix(s, map[string]string{"http": ":80", "https": ":443"}[u.Scheme]), nil
}

// parseHost gives a host in lower case, without a port or with one.
func parseHost(s string) (string, error) {
	origin, err := parseOrigin("http://" + s)
	if err != nil {
		return "", fmt.Errorf("%q is not of the form host[:port]", s)
	}
	return strings.TrimPrefix(origin, "http://"), nil
}

// Connections, and sessions that begin.

// enter counts a connection, or says why there may not be another. Without
// TRUST_PROXY all clients of a proxy on this machine have a loopback address:
// that one has no limit of its own.
func (a *access) enter(addr netip.Addr) *denial {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed:
		return &denial{http.StatusServiceUnavailable, "stopping", "the server stops", 1}
	case a.total >= a.maxConnections:
		return &denial{http.StatusServiceUnavailable, "connections", "too many connections: MAX_CONNECTIONS", 5}
	case a.conns[addr] >= a.maxPerAddress && (a.trustProxy || !addr.IsLoopback()):
		return &denial{http.StatusTooManyRequests, "connections_per_address",
			"too many connections: MAX_CONNECTIONS_PER_ADDRESS", 5}
	}
	a.total++
	a.conns[addr]++
	return nil
}

// mayStart counts a session that an address begins, and reports whether the minute has at most so
// many. Refused ones count too; loopback has no limit, as in enter. All have the same minute.
func (a *access) mayStart(addr netip.Addr, most int) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now := time.Now(); now.Sub(a.startsSince) > time.Minute {
		clear(a.starts)
		a.startsSince = now
	}
	a.starts[addr]++
	return a.starts[addr] <= most || addr.IsLoopback() && !a.trustProxy
}

// close lets no more connections in, and gives how many are left.
func (a *access) close() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	return a.total
}

// leave is called once for each enter that let somebody in.
func (a *access) leave(addr netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.total--
	if a.conns[addr]--; a.conns[addr] == 0 {
		delete(a.conns, addr)
	}
}
