package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"nhooyr.io/websocket"
)

// Secrets of these tests; none may ever stand in a log. They have a character
// that URLs escape.
const (
	testToken = "the+access/token=of a test"
	testKey   = "the-ingest-key-of-a-test"
)

// ---- callers ----

// caller is somebody who sends a request.
type caller struct {
	name string
	ask  func(*http.Request)
}

func (c caller) and(name string, more caller) caller {
	return caller{c.name + ", " + name, func(r *http.Request) { c.ask(r); more.ask(r) }}
}

func header(name, value string) caller {
	return caller{name + ": " + value, func(r *http.Request) { r.Header.Set(name, value) }}
}

func query1(name, value string) caller {
	return caller{"?" + name, func(r *http.Request) {
		q := r.URL.Query()
		q.Set(name, value)
		r.URL.RawQuery = q.Encode()
	}}
}

func withCookie(value string) caller {
	return caller{"cookie", func(r *http.Request) { r.AddCookie(&http.Cookie{Name: "session-replay-" + r.URL.Port(), Value: value}) }}
}

// callerNumber gives every request an address of its own (where the server
// trusts a proxy), so that wrong tokens do not slow down the rest of the test.
var callerNumber atomic.Int32

// as sends one request as a caller does, and follows no redirect.
func (s *serverProcess) as(c caller, method, path string) *http.Response {
	s.t.Helper()
	r, err := http.NewRequestWithContext(testContext(s.t), method, s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	n := callerNumber.Add(1)
	r.Header.Set("X-Forwarded-For", fmt.Sprintf("6.6.6.6, 10.0.%d.%d", n/250, n%250+1))
	if strings.HasPrefix(path, "/ws") {
		for name, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg=="} {
			r.Header.Set(name, value)
		}
	}
	c.ask(r)
	resp, err := testTransport.RoundTrip(r)
	if err != nil {
		s.t.Fatalf("%s %s as %s: %v", method, path, c.name, err)
	}
	s.t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body.Close()
	}
	return resp
}

var testTransport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}

func bodyOf(t testing.TB, resp *http.Response) string {
	t.Helper()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// signIn gives the cookie's value.
func (s *serverProcess) signIn(token string) string {
	s.t.Helper()
	resp, err := http.Post(s.url+"/signin", "application/json", strings.NewReader(fmt.Sprintf(`{"token":%q}`, token)))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent || len(resp.Cookies()) != 1 {
		s.t.Fatalf("sign-in: status %d, cookies %v", resp.StatusCode, resp.Cookies())
	}
	return resp.Cookies()[0].Value
}

// tellsNothing checks that what the server has printed and logged holds none of
// the secrets, and no query string.
func (s *serverProcess) tellsNothing(secrets ...string) {
	s.t.Helper()
	said := s.output.String()
	for _, kind := range []string{applicationLog, errorLog, exceptionsLog, rejectionsLog} {
		said += s.log(kind)
	}
	if len(said) < 100 {
		s.t.Fatalf("the logs say nothing at all: %q", said)
	}
	for _, secret := range append(secrets, "?type=", "token=", "key=") {
		if i := strings.Index(said, secret); i >= 0 {
			s.t.Errorf("the logs hold %q: %.200s", secret, said[max(0, i-100):])
		}
	}
}

// ---- each route, each kind of caller ----

// testRoutes has for every route how it is asked, what it answers to those whom
// it lets in, and whom that is.
var testRoutes = map[string]struct {
	path string
	ok   int
	kind string
}{
	"GET /{$}":                          {"/", 200, "page"},
	"GET /ws":                           {"/ws?type=viewer", 101, "watch"},
	"GET /health":                       {"/health", 200, "all"},
	"GET /stats":                        {"/stats", 200, "view"},
	"GET /metrics":                      {"/metrics", 200, "view"},
	"GET /sessions":                     {"/sessions", 200, "view"},
	"GET /sessions/active":              {"/sessions/active", 200, "view"},
	"GET /sessions/{id}":                {"/sessions/s", 404, "view"},
	"GET /sessions/{id}/events":         {"/sessions/s/events", 404, "view"},
	"GET /sessions/{id}/errors":         {"/sessions/s/errors", 404, "view"},
	"GET /sessions/{id}/chunks/{index}": {"/sessions/s/chunks/0", 404, "view"},
	"DELETE /sessions/cleanup":          {"/sessions/cleanup", 200, "view"},
	"DELETE /sessions/{id}":             {"/sessions/s", 404, "view"},
	"GET /view/{id}":                    {"/view/s", 200, "page"},
	"POST /signin":                      {"/signin", 400, "sign"}, // there is no token in it
	"POST /signout":                     {"/signout", 204, "sign"},
	"GET /demo":                         {"/demo", 200, "all"},
	"GET /demo/{page}":                  {"/demo/basket", 200, "all"},
	"GET /assets/{file}":                {"/assets/style.css", 200, "all"},
	"GET /tracker.js":                   {"/tracker.js", 200, "all"},
	"tracker":                           {"/ws?type=tracker", 101, "record"},
	"tracker by default":                {"/ws", 101, "record"},
	"unknown type":                      {"/ws?type=admin", 400, "record"},
	"404":                               {"/nothing", 404, "all"},
	"405":                               {"/stats/", 404, "all"},
}

// verdict is what a caller gets: 0 stands for what the route answers to those
// whom it lets in. Routes of kind "all" answer everyone.
type verdict struct {
	caller                          caller
	view, page, watch, record, sign int
}

func (v verdict) of(kind string, ok int) int {
	got := map[string]int{"view": v.view, "page": v.page, "watch": v.watch, "record": v.record, "sign": v.sign}[kind]
	if got == 0 {
		return ok
	}
	return got
}

var (
	nobody   = caller{"nobody", func(*http.Request) {}}
	bearer   = caller{"token", header("Authorization", "Bearer "+testToken).ask}
	evil     = header("Origin", "https://evil.example")
	listed   = header("Origin", "https://viewer.example")
	shop     = header("Origin", "https://shop.example")
	nullPage = header("Origin", "null")
	foreign  = header("Sec-Fetch-Site", "cross-site")
	sameSite = header("Sec-Fetch-Site", "same-site")
	ownFetch = header("Sec-Fetch-Site", "same-origin")
	linked   = header("Sec-Fetch-Mode", "navigate")
	key      = caller{"key", query1("key", testKey).ask}
	ownPage  = caller{"own page", func(r *http.Request) { r.Header.Set("Origin", "http://"+r.URL.Host) }}
	ownTLS   = caller{"own page behind TLS", func(r *http.Request) { r.Header.Set("Origin", "https://"+r.URL.Host) }}
	public   = caller{"own page, public name", header("Origin", "https://replay.example").ask}
	ownPort  = caller{"another port", header("Origin", "http://127.0.0.1:1").ask}
	rebound  = caller{"rebound name", func(r *http.Request) { r.Host = "evil.example:" + r.URL.Port() }}
)

func TestAccessClosed(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "INGEST_KEY="+testKey, "VIEWER_ORIGINS=https://viewer.example, https://also.example:8443",
		"TRACKER_ORIGINS=https://shop.example", "PUBLIC_HOSTS=replay.example", "TRUST_PROXY=true", "LOG_LEVEL=debug")
	cookie := withCookie(s.signIn(testToken))
	// 0: let in
	s.table([]verdict{
		{nobody, 401, 401, 401, 401, 0},
		{header("Authorization", "Bearer wrong"), 401, 401, 401, 401, 0},
		{header("Authorization", "Bearer"), 401, 401, 401, 401, 0},
		{header("Authorization", "Basic "+testToken), 401, 401, 401, 401, 0},
		{header("Authorization", "Bearer "+testKey), 401, 401, 401, 401, 0},
		{withCookie("wrong"), 401, 401, 401, 401, 0},
		{withCookie(testToken), 401, 401, 401, 401, 0},
		{query1("token", "wrong"), 401, 401, 401, 401, 0},
		{query1("token", testKey), 401, 401, 401, 401, 0},
		{query1("key", "wrong"), 401, 401, 401, 401, 0},
		{query1("key", testToken), 401, 401, 401, 401, 0},
		{key, 401, 401, 401, 0, 0},
		{key.and("from shop", shop), 403, 403, 403, 0, 403},
		{key.and("own page", ownPage), 401, 401, 401, 0, 0},
		{key.and("from evil", evil), 403, 403, 403, 403, 403},
		{key.and("without an origin of its own", nullPage), 403, 403, 403, 403, 403},
		{shop, 403, 403, 403, 401, 403},
		{bearer, 0, 0, 0, 401, 0},
		{header("authorization", "bearer "+testToken), 0, 0, 0, 401, 0},
		{query1("token", testToken), 401, 0, 0, 401, 0},
		{cookie, 0, 0, 0, 401, 0},
		{cookie.and("own fetch", ownFetch), 0, 0, 0, 401, 0},
		{cookie.and("own page", ownPage), 0, 0, 0, 401, 0},
		{cookie.and("own page behind TLS", ownTLS), 0, 0, 0, 401, 0},
		{cookie.and("own public name", public), 0, 0, 0, 401, 0},
		{cookie.and("TLS, page without", ownPage).and("", header("X-Forwarded-Proto", "https")), 403, 403, 403, 401, 403},
		{cookie.and("from evil", evil), 403, 403, 403, 401, 403},
		{cookie.and("from another port", ownPort), 403, 403, 403, 401, 403},
		{cookie.and("without an origin of its own", nullPage), 403, 403, 403, 401, 403},
		{cookie.and("cross-site", foreign), 403, 403, 403, 401, 403},
		{cookie.and("same-site", sameSite), 403, 403, 403, 401, 403},
		{cookie.and("a link", foreign).and("", linked), 0, 0, 0, 401, 0},
		{cookie.and("a form", evil).and("", foreign).and("", linked), 403, 403, 403, 401, 403},
		{cookie.and("listed", listed), 0, 0, 0, 401, 0},
		{bearer.and("listed", listed), 0, 0, 0, 401, 0},
		{bearer.and("listed, with port", header("Origin", "https://also.example:8443")), 0, 0, 0, 401, 0},
		{bearer.and("listed but for the port", header("Origin", "https://also.example")), 403, 403, 403, 401, 403},
		{bearer.and("listed but for the scheme", header("Origin", "http://viewer.example")), 403, 403, 403, 401, 403},
		{listed, 401, 401, 401, 401, 0},
		{bearer.and("from evil", evil), 403, 403, 403, 401, 403},
		{rebound, 401, 401, 401, 401, 0},
		{bearer.and("other host", rebound), 0, 0, 0, 401, 0},
	})
	s.tellsNothing(testToken, "the%2Baccess", "the+access", testKey, strings.TrimPrefix(cookie.name, "cookie "))
}

func TestAccessOpen(t *testing.T) {
	s := startServer(t, "PUBLIC_HOSTS=replay.example,other.example:8443", "VIEWER_ORIGINS=https://viewer.example")
	host := func(name string) caller {
		return caller{"Host: " + name, func(r *http.Request) { r.Host = name }}
	}
	s.table([]verdict{
		{nobody, 0, 0, 0, 0, 0},
		{header("Authorization", "Bearer whatever"), 0, 0, 0, 0, 0},
		{ownPage, 0, 0, 0, 0, 0},
		{evil, 403, 403, 403, 0, 403},
		{nullPage, 403, 403, 403, 0, 403},
		{ownPort, 403, 403, 403, 0, 403},
		{foreign, 403, 403, 403, 0, 403},
		{foreign.and("a link", linked), 0, 0, 0, 0, 0},
		{listed, 0, 0, 0, 0, 0},
		{rebound, 421, 421, 421, 0, 421},
		{rebound.and("own page", header("Origin", "http://evil.example")), 421, 421, 421, 0, 421},
		{rebound.and("own fetch", ownFetch), 421, 421, 421, 0, 421},
		{host("localhost:1"), 0, 0, 0, 0, 0},
		{host("LocalHost"), 0, 0, 0, 0, 0},
		{host("127.9.9.9"), 0, 0, 0, 0, 0},
		{host("[::1]:8080"), 0, 0, 0, 0, 0},
		{host("replay.example"), 0, 0, 0, 0, 0},
		{host("replay.example:99"), 0, 0, 0, 0, 0},
		{host("other.example:8443"), 0, 0, 0, 0, 0},
		{host("other.example"), 421, 421, 421, 0, 421},
		{host("localhost.evil.example"), 421, 421, 421, 0, 421},
		{host("127.0.0.1.evil.example"), 421, 421, 421, 0, 421},
		{host("127.0.0.1@evil.example"), 421, 421, 421, 0, 421},
		{host("10.0.0.1"), 421, 421, 421, 0, 421},
		{host("0.0.0.0"), 421, 421, 421, 0, 421},
	})
	resp := s.as(nobody, "POST", "/signin")
	if resp := s.as(header("Accept", "text/html"), "GET", "/view/a?token=any&t=9"); resp.StatusCode != 303 || resp.Header.Get("Location") != "/view/a?t=9" {
		t.Errorf("a link with a token that is not needed: got %d, %v", resp.StatusCode, resp.Header)
	}
	if resp.StatusCode != http.StatusBadRequest || len(resp.Cookies()) != 0 {
		t.Errorf("sign-in where there is no token: got %d, %v", resp.StatusCode, resp.Cookies())
	}
}

// A token alone: whoever comes may record.
func TestAccessTokenWithoutKey(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "METRICS_OPEN=true", "TRUST_PROXY=true")
	verdicts := []verdict{
		{nobody, 401, 401, 401, 0, 0},
		{bearer, 0, 0, 0, 0, 0},
		{evil, 403, 403, 403, 0, 403},
		{nullPage, 403, 403, 403, 0, 403},
	}
	for _, v := range verdicts {
		for name, route := range testRoutes {
			if method, _, _ := strings.Cut(name, " "); name != "GET /metrics" && method == "GET" {
				s.expect(v, name, route.path, route.ok, route.kind)
			}
		}
		if resp := s.as(v.caller, "GET", "/metrics"); resp.StatusCode != 200 {
			t.Errorf("METRICS_OPEN: %s gets %d", v.caller.name, resp.StatusCode)
		}
	}
}

func (s *serverProcess) table(verdicts []verdict) {
	s.t.Helper()
	for _, route := range (&server{}).table() {
		if _, ok := testRoutes[route.pattern]; !ok {
			s.t.Errorf("route %q is not in the table of this test", route.pattern)
		}
	}
	for _, v := range verdicts {
		for name, route := range testRoutes {
			s.expect(v, name, route.path, route.ok, route.kind)
		}
	}
}

func (s *serverProcess) expect(v verdict, name, path string, ok int, kind string) {
	s.t.Helper()
	method, _, _ := strings.Cut(name, " ")
	if method != "POST" && method != "DELETE" {
		method = "GET"
	}
	resp := s.as(v.caller, method, path)
	want := v.of(kind, ok)
	if resp.StatusCode != want {
		s.t.Errorf("%s as %s: got %d, want %d", name, v.caller.name, resp.StatusCode, want)
		return
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return
	}
	body := bodyOf(s.t, resp)
	if want != ok && !regexp.MustCompile(`^\{"error":"[^"]+"\}$`).MatchString(body) {
		s.t.Errorf("%s as %s: refused with %.200q", name, v.caller.name, body)
	}
	if name == "GET /health" {
		if in := v.of("view", 200) == 200; in != strings.Contains(body, "totalEvents") || !strings.Contains(body, `"status":"healthy"`) {
			s.t.Errorf("health as %s: got %s", v.caller.name, body)
		}
	}
}

// What one type of connection may send, the other may not.
func TestAccessMessages(t *testing.T) {
	s := startServer(t)
	for kind, messages := range map[string][]string{
		"tracker": {"get_active_sessions", "viewer_join_session", "viewer_leave_session", "get_session_events"},
		"viewer":  {"session_start", "events_batch", "session_end", "error", "javascript_error", "promise_rejection", "visibility_change"},
	} {
		c := dialServer(t, s.ws(kind))
		for _, message := range messages {
			c.send(message, `{"sessionId":"a","events":[]}`)
			if m := c.expect("error"); m.Data.Code != "forbidden" {
				t.Errorf("%s from a %s: got %q, want forbidden", message, kind, m.Data.Code)
			}
		}
	}
}

// ---- browsers ----

func TestAccessBrowser(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "TRUST_PROXY=true", "LOG_LEVEL=debug")
	html := header("Accept", "text/html,*/*")
	for _, path := range []string{"/", "/view/s"} {
		resp := s.as(html, "GET", path)
		if body := bodyOf(t, resp); resp.StatusCode != 401 || !strings.Contains(body, "/assets/signin.js") ||
			resp.Header.Get("Content-Security-Policy") != viewerPolicy || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s before signing in: got %d, %v, %.100s", path, resp.StatusCode, resp.Header, body)
		}
	}
	// A browser keeps a SameSite=Strict cookie back from what another site's
	// link leads to; the page then asks once more by itself.
	if got := s.as(html.and("by a link", foreign).and("", linked), "GET", "/").Header.Get("Refresh"); got != "0" {
		t.Errorf("Refresh after a link from elsewhere: got %q, want 0", got)
	}
	if got := s.as(html.and("", ownFetch), "GET", "/").Header.Get("Refresh"); got != "" {
		t.Errorf("Refresh after a link from here: got %q, want none", got)
	}
	for path, want := range map[string]string{"/?": "/", "/view/a:b?t=90&": "/view/a:b?t=90", "/view/a%2Fb?": "/view/a%2Fb", "/view/%2F%2Fevil.example?": "/view/%2F%2Fevil.example"} {
		resp := s.as(html, "GET", path+"token=the%2Baccess/token%3Dof+a+test")
		if resp.StatusCode != 303 || resp.Header.Get("Location") != want || len(resp.Cookies()) != 1 {
			t.Errorf("link to %s: got %d to %q with %v, want %q", path, resp.StatusCode, resp.Header.Get("Location"), resp.Cookies(), want)
		}
		if body := bodyOf(t, resp); strings.Contains(body, "token") {
			t.Errorf("link to %s: the redirect repeats the token: %s", path, body)
		}
	}
	if resp := s.as(html, "GET", "/?token=wrong"); resp.StatusCode != 401 || len(resp.Cookies()) != 0 {
		t.Errorf("link with a wrong token: got %d, %v", resp.StatusCode, resp.Cookies())
	}
	cookie := withCookie(s.signIn(testToken))
	if resp := s.as(cookie.and("", html), "GET", "/"); resp.StatusCode != 200 {
		t.Errorf("signed in: got %d", resp.StatusCode)
	}
	for who, want := range map[*caller]string{&cookie: `"signedIn":true`, &bearer: `"signedIn":false`} {
		if body := bodyOf(t, s.as(*who, "GET", "/")); !strings.Contains(body, want) {
			t.Errorf("%s: got %s, want %s", who.name, body, want)
		}
	}
	s.restart()
	if resp := s.as(cookie, "GET", "/stats"); resp.StatusCode != 200 {
		t.Errorf("the cookie after a restart: got %d", resp.StatusCode)
	}
	s.env = append(s.env, "ACCESS_TOKEN=another")
	s.restart()
	resp := s.as(cookie, "GET", "/stats")
	if resp.StatusCode != 401 || len(resp.Cookies()) != 1 || resp.Cookies()[0].MaxAge >= 0 {
		t.Errorf("the cookie of another token: got %d, %v, want it taken away", resp.StatusCode, resp.Cookies())
	}
	s.tellsNothing(testToken, "the%2Baccess", "the+access")
}

func TestAccessCookie(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "INGEST_KEY="+testKey, "TRUST_PROXY=true")
	tls := header("X-Forwarded-Proto", "http, https")
	html := header("Accept", "text/html")
	for _, how := range []struct {
		who    caller
		secure bool
	}{{html, false}, {html.and("TLS before the proxy", tls), true}} {
		c := s.as(how.who, "GET", "/?token=the%2Baccess/token%3Dof+a+test").Cookies()[0]
		if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Domain != "" || c.Secure != how.secure || c.MaxAge <= 0 ||
			len(c.Value) < 32 || strings.Contains(c.Value, testToken) {
			t.Errorf("%s: cookie %v", how.who.name, c)
		}
	}
	cookie := withCookie(s.signIn(testToken))
	if resp := s.as(cookie, "GET", "/ws?type=tracker"); resp.StatusCode != 401 || len(resp.Cookies()) != 0 {
		t.Errorf("a page that records without the key: got %d, %v, want whoever is signed in to stay so", resp.StatusCode, resp.Cookies())
	}
	resp := s.as(cookie, "POST", "/signout")
	if c := resp.Cookies(); resp.StatusCode != 204 || len(c) != 1 || c[0].MaxAge >= 0 {
		t.Errorf("sign-out: got %d, %v", resp.StatusCode, c)
	}
	for body, want := range map[string]int{`{"token":"wrong"}`: 401, `{"token":""}`: 401, `{}`: 401, `{"token":7}`: 400, `x`: 400, ``: 400,
		`{"token":"` + strings.Repeat("x", 5000) + `"}`: 400} {
		resp, err := http.Post(s.url+"/signin", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != want || len(resp.Cookies()) != 0 {
			t.Errorf("sign-in with %.30s: got %d and %v, want %d", body, resp.StatusCode, resp.Cookies(), want)
		}
	}
	other := newAccess(accessConfig{token: testToken}, "127.0.0.1", "1")
	if other.cookieName == newAccess(accessConfig{token: testToken}, "127.0.0.1", "2").cookieName {
		t.Error("two servers on one machine share a cookie: ports do not keep them apart")
	}
}

func TestAccessShared(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "VIEWER_ORIGINS=https://viewer.example")
	const allow = "Access-Control-Allow-Origin"
	preflight := header("Access-Control-Request-Method", "DELETE")
	resp := s.as(listed.and("", preflight), "OPTIONS", "/sessions/a")
	if resp.StatusCode != 204 || resp.Header.Get(allow) != "https://viewer.example" || resp.Header.Get("Access-Control-Allow-Headers") != "Authorization" ||
		!strings.Contains(resp.Header.Get("Access-Control-Allow-Methods"), "DELETE") || resp.Header.Get("Access-Control-Allow-Credentials") != "" {
		t.Errorf("preflight of a listed page: got %d, %v", resp.StatusCode, resp.Header)
	}
	if resp := s.as(evil.and("", preflight), "OPTIONS", "/sessions/a"); resp.StatusCode != 405 || resp.Header.Get(allow) != "" {
		t.Errorf("preflight of another page: got %d, %v", resp.StatusCode, resp.Header)
	}
	for _, who := range []caller{bearer.and("", listed), listed} { // also to read that it is refused
		if resp := s.as(who, "GET", "/sessions"); resp.Header.Get(allow) != "https://viewer.example" || !slices.Contains(resp.Header["Vary"], "Origin") {
			t.Errorf("%s: got headers %v", who.name, resp.Header)
		}
	}
	if resp := s.as(bearer.and("", evil), "GET", "/sessions"); resp.Header.Get(allow) != "" {
		t.Errorf("a page of no listed origin: got headers %v", resp.Header)
	}
	if resp := s.as(evil, "GET", "/tracker.js"); resp.Header.Get(allow) != "*" {
		t.Errorf("the tracker: got headers %v", resp.Header)
	}
}

// Without a token on a HOST that is not surely loopback, one is made. (The
// spelling hides from the server that this HOST is one, and keeps the test from
// listening to a network.)
func TestAccessMadeToken(t *testing.T) {
	s := startServer(t, "HOST=LOCALHOST")
	link := regexp.MustCompile(`(?m)^http://LOCALHOST:\d+(/\?token=([A-Z2-7]{20,}))$`).FindAllStringSubmatch(s.output.String(), -1)
	if len(link) != 1 {
		t.Fatalf("got links %q, want one, in %s", link, s.output.String())
	}
	if status, _ := s.get("/sessions"); status != 401 {
		t.Errorf("without the token: got %d", status)
	}
	if resp := s.as(header("Accept", "text/html"), "GET", link[0][1]); resp.StatusCode != 303 || len(resp.Cookies()) != 1 {
		t.Errorf("by the link: got %d, %v", resp.StatusCode, resp.Cookies())
	}
	for _, kind := range []string{applicationLog, errorLog, exceptionsLog, rejectionsLog} {
		if strings.Contains(s.log(kind), link[0][2]) {
			t.Errorf("the made token stands in the %s log", kind)
		}
	}
	for host, open := range map[string]bool{"127.0.0.1": true, "127.8.8.8": true, "::1": true, "localhost": true,
		"0.0.0.0": false, "::": false, "10.0.0.1": false, "replay.example": false, "": false} {
		a := newAccess(accessConfig{}, host, "80")
		if a.open != open || a.made == open || (a.token == "") != open {
			t.Errorf("HOST=%s: open %v, token made %v, want open %v", host, a.open, a.made, open)
		}
		if a = newAccess(accessConfig{token: "x"}, host, "80"); a.open || a.made || a.token != "x" {
			t.Errorf("HOST=%s with a token: %+v", host, a)
		}
	}
}

// ---- limits ----

func TestAccessSlowDown(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "TRUST_PROXY=true")
	from := func(addr string) caller { return header("X-Forwarded-For", addr) }
	wrong := header("Authorization", "Bearer wrong")
	for i := range freeAttempts {
		if resp := s.as(wrong.and("", from("9.9.9.9, 10.1.1.1")), "GET", "/stats"); resp.StatusCode != 401 {
			t.Fatalf("attempt %d: got %d", i, resp.StatusCode)
		}
	}
	for _, who := range []caller{wrong, bearer, withCookie("wrong")} {
		if resp := s.as(who.and("", from("8.8.8.8, 10.1.1.1")), "GET", "/stats"); resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("%s after %d wrong ones: got %d, %v", who.name, freeAttempts, resp.StatusCode, resp.Header)
		}
	}
	right := withCookie(newAccess(accessConfig{token: testToken}, "", "").cookie)
	if resp := s.as(right.and("", from("10.1.1.1")), "GET", "/stats"); resp.StatusCode != 200 {
		t.Errorf("who is signed in, meanwhile: got %d", resp.StatusCode)
	}
	for path, want := range map[string]int{"/": 401, "/health": 200, "/tracker.js": 200, "/ws?type=tracker": 101} {
		if resp := s.as(from("10.1.1.1"), "GET", path); resp.StatusCode != want {
			t.Errorf("%s without a token meanwhile: got %d, want %d", path, resp.StatusCode, want)
		}
	}
	if resp := s.as(bearer.and("", from("10.1.1.2")), "GET", "/stats"); resp.StatusCode != 200 {
		t.Errorf("from elsewhere: got %d", resp.StatusCode)
	}
	waitUntil(t, "the right token is taken again", func() bool {
		return s.as(bearer.and("", from("10.1.1.1")), "GET", "/stats").StatusCode == 200
	})
	var stats struct{ Refusals map[string]int }
	resp := s.as(bearer, "GET", "/stats")
	mustJSON(t, bodyOf(t, resp), &stats)
	if stats.Refusals["wrong_token"] != freeAttempts || stats.Refusals["no_token"] != 1 || stats.Refusals["attempts"] < 3 {
		t.Errorf("counted: %v", stats.Refusals)
	}
}

func TestAccessThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newAccess(accessConfig{}, "127.0.0.1", "80")
		try := func(addr string, right bool) time.Duration {
			d := tr.judge(&http.Request{RemoteAddr: addr + ":1"}, right)
			if d == nil || d.status != http.StatusTooManyRequests {
				return 0
			}
			return d.wait
		}
		const a, b = "10.0.0.1", "10.0.0.2"
		for range freeAttempts {
			if wait := try(a, false); wait != 0 {
				t.Fatalf("a first attempt waits %v", wait)
			}
		}
		var waits []time.Duration
		for range 8 {
			wait := try(a, true)
			waits = append(waits, wait)
			time.Sleep(wait)
			if try(b, true) != 0 {
				t.Error("another address has to wait")
			}
			if wait := try(a, false); wait != 0 {
				t.Errorf("after its pause it still has to wait %v", wait)
			}
		}
		want := []time.Duration{1, 2, 4, 8, 16, 32, 60, 60}
		for i := range want {
			want[i] *= time.Second
		}
		if !slices.Equal(waits, want) {
			t.Errorf("got pauses %v, want %v", waits, want)
		}
		time.Sleep(longestWait)
		if try(a, true) != 0 || try(a, false) != 0 || try(a, false) != 0 {
			t.Error("the right token does not clear what was before")
		}
		for range freeAttempts {
			try(b, false)
		}
		time.Sleep(forgetAfter + time.Second)
		if try(b, false); tr.failed[netip.MustParseAddr(b)].n != 1 {
			t.Errorf("failures are not forgotten: %+v", tr.failed[netip.MustParseAddr(b)])
		}
		for i := range 3 * maxFailed {
			try(fmt.Sprintf("11.%d.%d.%d", i>>16, i>>8&255, i&255), false)
		}
		if len(tr.failed) > maxFailed {
			t.Errorf("%d addresses are remembered, want at most %d", len(tr.failed), maxFailed)
		}
	})
}

func TestAccessAddress(t *testing.T) {
	for _, tt := range []struct {
		peer, forwarded string
		trust           bool
		want            string
	}{
		{"1.2.3.4:5", "", false, "1.2.3.4"},
		{"1.2.3.4:5", "9.9.9.9", false, "1.2.3.4"},
		{"1.2.3.4:5", "9.9.9.9", true, "9.9.9.9"},
		{"1.2.3.4:5", "6.6.6.6, 9.9.9.9", true, "9.9.9.9"},
		{"1.2.3.4:5", "6.6.6.6,9.9.9.9 ", true, "9.9.9.9"},
		{"1.2.3.4:5", "9.9.9.9, unknown", true, "1.2.3.4"},
		{"1.2.3.4:5", "", true, "1.2.3.4"},
		{"[::ffff:1.2.3.4]:5", "", false, "1.2.3.4"},
		{"[2001:db8:1:2:3:4:5:6]:7", "", false, "2001:db8:1:2::"},
		{"[fe80::1%eth0]:7", "", false, "fe80::"},
		{"[::1]:7", "", false, "::1"},
		{"1.2.3.4:5", "2001:db8:1:2:3:4:5:6", true, "2001:db8:1:2::"},
	} {
		a := newAccess(accessConfig{trustProxy: tt.trust}, "127.0.0.1", "80")
		r := &http.Request{RemoteAddr: tt.peer, Header: http.Header{}}
		if tt.forwarded != "" {
			r.Header.Set("X-Forwarded-For", tt.forwarded)
		}
		if got := a.address(r).String(); got != tt.want {
			t.Errorf("%+v: got %s", tt, got)
		}
	}
	r := &http.Request{RemoteAddr: "1.2.3.4:5", Header: http.Header{"X-Forwarded-For": {"6.6.6.6", "7.7.7.7, 8.8.8.8"}}}
	if got := newAccess(accessConfig{trustProxy: true}, "127.0.0.1", "80").address(r).String(); got != "8.8.8.8" {
		t.Errorf("of two headers: got %s, want the last one's last", got)
	}
}

// refusedWith waits until /stats counts a reason.
func (s *serverProcess) refusedWith(reason string) {
	s.t.Helper()
	waitUntil(s.t, "a refusal is counted: "+reason, func() bool {
		var stats struct{ Refusals map[string]int }
		s.getJSON("/stats", &stats)
		return stats.Refusals[reason] > 0
	})
}

func TestLimitConnections(t *testing.T) {
	s := startServer(t, "MAX_CONNECTIONS=5", "MAX_CONNECTIONS_PER_ADDRESS=2", "TRUST_PROXY=true")
	dial := func(addr string) (*websocket.Conn, int) {
		conn, resp, err := websocket.Dial(testContext(t), s.ws("tracker"), &websocket.DialOptions{HTTPHeader: http.Header{"X-Forwarded-For": {addr}}})
		if err == nil {
			t.Cleanup(func() { conn.CloseNow() })
			return conn, 0
		}
		if resp == nil {
			t.Fatal(err)
		}
		if resp.Header.Get("Retry-After") == "" {
			t.Errorf("status %d without Retry-After", resp.StatusCode)
		}
		return nil, resp.StatusCode
	}
	first, _ := dial("10.0.0.1")
	dial("10.0.0.1")
	if _, got := dial("10.0.0.1"); got != 429 {
		t.Errorf("a third from one address: got %d, want 429", got)
	}
	for _, addr := range []string{"10.0.0.2", "10.0.0.2", "10.0.0.3"} {
		if _, got := dial(addr); got != 0 {
			t.Errorf("from %s: got %d", addr, got)
		}
	}
	if _, got := dial("10.0.0.4"); got != 503 {
		t.Errorf("a sixth: got %d, want 503", got)
	}
	s.refusedWith("connections")
	s.refusedWith("connections_per_address")
	first.CloseNow()
	waitUntil(t, "the place is free again", func() bool { conn, _ := dial("10.0.0.1"); return conn != nil })

	s = startServer(t, "MAX_CONNECTIONS_PER_ADDRESS=2") // who connects from loopback may be a proxy
	for range 4 {
		dialServer(t, s.ws("tracker"))
	}
}

func TestLimitMessages(t *testing.T) {
	s := startServer(t, "MAX_MESSAGE_BYTES=20000", "MESSAGE_TIMEOUT=300", "MAX_SESSIONS_PER_MINUTE=2", "MAX_SESSION_BYTES=5000",
		"MAX_HEADER_BYTES=8192", "READ_HEADER_TIMEOUT=300")
	c := dialServer(t, s.ws("tracker"))
	c.send("error", `"`+strings.Repeat("x", 20000)+`"`)
	if m := c.expect("error"); m.Data.Code != "too_large" {
		t.Errorf("got code %q", m.Data.Code)
	}
	c.expectClose(websocket.StatusMessageTooBig)
	s.refusedWith("message_bytes")

	c = dialServer(t, s.ws("tracker"))
	c.write(string(announce(10000)))
	go func(c *testConn) { // ends when the server closes the connection
		for err := error(nil); err == nil; time.Sleep(20 * time.Millisecond) {
			_, err = c.Write([]byte("x"))
		}
	}(c)
	c.expectClose(websocket.StatusPolicyViolation)
	s.refusedWith("message_time")

	c = dialServer(t, s.ws("tracker"))
	for range 3 {
		c.send("session_start", "{}")
		c.send("session_end", "{}")
	}
	if m := c.expect("error"); m.Data.Code != "too_many_sessions" {
		t.Errorf("got code %q", m.Data.Code)
	}
	s.refusedWith("too_many_sessions")

	c = dialServer(t, s.ws("tracker"))
	c.send("session_start", `{"sessionId":"full"}`)
	for range 3 {
		c.send("events_batch", `{"events":[{"type":3,"data":"`+strings.Repeat("x", 2000)+`"}]}`)
	}
	if m := c.expect("error"); m.Data.Code != "session_full" {
		t.Errorf("got code %q", m.Data.Code)
	}
	s.refusedWith("session_bytes")
	waitUntil(t, "what came before is stored and the session ended", func() bool {
		var one struct {
			EventCount int
			IsActive   bool
		}
		s.getJSON("/sessions/full", &one)
		return one.EventCount == 2 && !one.IsActive
	})

	if resp := s.as(header("X-Long", strings.Repeat("x", 20000)), "GET", "/health"); resp.StatusCode != 431 {
		t.Errorf("a header of 20 KB: got %d, want 431", resp.StatusCode)
	}
	slow, err := net.Dial("tcp", "127.0.0.1:"+s.port)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	fmt.Fprint(slow, "GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
	slow.SetReadDeadline(time.Now().Add(patience / 3)) // before a request's own minute
	if _, err := bufio.NewReader(slow).ReadString('\n'); err != io.EOF {
		t.Errorf("a header that does not come: got %v, want the connection closed", err)
	}
}

// The oldest ended sessions go first; what is live stays.
func TestLimitStorage(t *testing.T) {
	s := startServer(t, "MAX_STORAGE_BYTES=30000", "SESSION_CLEANUP_INTERVAL=200")
	live := dialServer(t, s.ws("tracker"))
	live.send("session_start", `{"sessionId":"live"}`)
	noise := make([]byte, 6000)
	rand.Read(noise)
	for i := range 8 {
		c := dialServer(t, s.ws("tracker"))
		c.send("session_start", fmt.Sprintf(`{"sessionId":"old-%d","resume":""}`, i))
		c.send("events_batch", fmt.Sprintf(`{"seq":1,"events":[{"type":3,"data":"%x"}]}`, noise))
		c.expect("events_ack")
		c.send("session_end", "{}")
		waitUntil(t, "the session has ended", func() bool {
			return querySQL[int](t, s.database, "select count(*) from sessions where session_id = $1 and is_active", fmt.Sprintf("old-%d", i)) == 0
		})
	}
	waitUntil(t, "the oldest are deleted", func() bool {
		return querySQL[int64](t, s.database, "select sum(stored_bytes)::bigint from sessions") <= 30000
	})
	left := querySQL[string](t, s.database, "select string_agg(session_id, ' ' order by session_id) from sessions")
	if !regexp.MustCompile(`^live( old-\d)* old-7$`).MatchString(left) || strings.Contains(left, "old-0") {
		t.Errorf("left are %q", left)
	}
}

// ---- operation ----

// testCertificate writes a certificate for 127.0.0.1 and its key.
func testCertificate(t testing.TB, certFile, keyFile string, serial int64) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	testCertificate(t, cert, key, 1)
	s := newServer(t, "TLS_CERT="+cert, "TLS_KEY="+key, "ACCESS_TOKEN="+testToken)
	s.url = "https://127.0.0.1:" + s.port
	serial := func() int64 {
		conn, err := tls.Dial("tcp", "127.0.0.1:"+s.port, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return 0
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	s.start()
	waitUntil(t, "the server speaks TLS", func() bool { return serial() == 1 })
	if !strings.Contains(s.output.String(), "url=https://127.0.0.1:") {
		t.Errorf("it does not say so: %s", s.output.String())
	}
	if c := s.as(header("Accept", "text/html"), "GET", "/?token=the%2Baccess/token%3Dof+a+test").Cookies()[0]; !c.Secure {
		t.Errorf("cookie %v, want Secure", c)
	}
	plainPage := header("Origin", "http://127.0.0.1:"+s.port)
	if resp := s.as(bearer.and("", plainPage), "GET", "/sessions"); resp.StatusCode != 403 {
		t.Errorf("its page without TLS: got %d, want 403", resp.StatusCode)
	}
	c := dialServer(t, "wss://127.0.0.1:"+s.port+"/ws")
	c.send("session_start", `{"sessionId":"tls","resume":""}`)
	c.expect("session_ready")

	os.WriteFile(cert, []byte("broken"), 0o600)
	s.cmd.Process.Signal(syscall.SIGHUP)
	waitUntil(t, "the broken one is refused", func() bool { return strings.Contains(s.log(rejectionsLog), "certificate not read again") })
	if got := serial(); got != 1 {
		t.Errorf("then the certificate is number %d, want the old one", got)
	}
	testCertificate(t, cert, key, 2)
	s.cmd.Process.Signal(syscall.SIGHUP)
	waitUntil(t, "the new certificate is served", func() bool { return serial() == 2 })
	c.send("events_batch", `{"seq":1,"events":[{"type":3}]}`) // goes on
	c.expect("events_ack")
	if code, _ := s.term(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	s.tellsNothing(testToken, "the%2Baccess")
}

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
	socket, told := systemd(t)
	s := startServer(t, "NOTIFY_SOCKET="+socket, "WATCHDOG_USEC=200000")
	for i, want := range []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1"} {
		if got := told(); got != want {
			t.Errorf("message %d: got %q, want %q", i, got, want)
		}
	}
	s.cmd.Process.Signal(syscall.SIGHUP) // nothing to reload, nothing to end
	if got := told(); got != "WATCHDOG=1" || !s.running() {
		t.Errorf("after SIGHUP: got %q, running %v", got, s.running())
	}
	if code, _ := s.term(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	last := ""
	for last != "STOPPING=1" {
		if last = told(); last != "WATCHDOG=1" && last != "STOPPING=1" {
			t.Fatalf("got %q", last)
		}
	}

	// The database away is no reason to end the server.
	s = newServer(t, "NOTIFY_SOCKET="+socket, "WATCHDOG_USEC=100000", "DATABASE_URL=postgres://127.0.0.1:1/none")
	s.start()
	for i, want := range []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"} {
		if got := told(); got != want {
			t.Errorf("without a database, message %d: got %q, want %q", i, got, want)
		}
	}
}

func TestWatchdog(t *testing.T) {
	s := &server{core: core{hub: newHub(config{}, newBudget(0), newMetrics())}}
	check := func(what, want string) {
		t.Helper()
		got := ""
		if err := s.works(50 * time.Millisecond); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", what, got, want)
		}
	}
	check("a hub that does not run", "the hub does not answer")
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	s.hub.cfg.batchInterval = time.Second
	go s.hub.run(ctx) // ends with the test
	check("all well", "")
}

// runBinary runs the server to its end.
func runBinary(t testing.TB, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	binary, err := serverBinary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(testContext(t), patience)
	defer cancel()
	var out, errs strings.Builder
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = append([]string{"HOME=" + t.TempDir()}, env...), t.TempDir(), &out, &errs
	cmd.Run()
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func TestCheck(t *testing.T) {
	database := testDatabase(t)
	env := []string{"DATABASE_URL=" + database, "ACCESS_TOKEN=" + testToken, "INGEST_KEY=" + testKey, "DB_PASSWORD=the-password", "PORT=8123"}
	code, out, errs := runBinary(t, env, "-check")
	if code != 0 || errs != "" || !strings.Contains(out, "127.0.0.1, port 8123") || !strings.Contains(out, "PostgreSQL") {
		t.Errorf("got code %d, %s%s", code, out, errs)
	}
	for _, secret := range []string{testToken, testKey, "the-password"} {
		if strings.Contains(out+errs, secret) {
			t.Errorf("it tells %q:\n%s", secret, out)
		}
	}
	if n := querySQL[int](t, database, "select count(*) from pg_tables where schemaname = 'public'"); n != 0 {
		t.Errorf("it made %d tables", n)
	}
	code, out, errs = runBinary(t, []string{"DATABASE_URL=postgres://u:the-password@127.0.0.1:1/none"}, "-check")
	if code != 1 || !strings.Contains(errs, "database") || strings.Contains(out+errs, "the-password") {
		t.Errorf("without a database: got code %d, %s%s", code, out, errs)
	}
	code, _, errs = runBinary(t, []string{"BATCH_SIZE=-1"}, "-check")
	if code != 1 || !strings.Contains(errs, "BATCH_SIZE") || strings.Count(errs, "\n") != 1 {
		t.Errorf("with a bad setting: got code %d, %s", code, errs)
	}
	code, out, _ = runBinary(t, nil, "-version")
	if code != 0 || !strings.HasPrefix(out, "session-replay ") || !strings.Contains(out, "go1.") {
		t.Errorf("-version: got code %d, %s", code, out)
	}
}

func TestAccessSettings(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	testCertificate(t, cert, key, 1)
	for _, bad := range []string{
		"TRUST_PROXY=perhaps", "METRICS_OPEN=2", "MAX_CONNECTIONS_PER_ADDRESS=-1", "MAX_CONNECTIONS_PER_ADDRESS=0", "MAX_CONNECTIONS=x",
		"TRACKER_ORIGINS=shop.example", "TRACKER_ORIGINS=https://shop.example/", "TRACKER_ORIGINS=https://a.example,*", "TRACKER_ORIGINS=ftp://a.example",
		"TRACKER_ORIGINS=https://u:p@a.example", "VIEWER_ORIGINS=*", "VIEWER_ORIGINS=null", "VIEWER_ORIGINS=https://a.example https://b.example", "VIEWER_ORIGINS=https://",
		"PUBLIC_HOSTS=https://a.example", "PUBLIC_HOSTS=a.example/x", "PUBLIC_HOSTS=a b", "PUBLIC_HOSTS=:80", "PUBLIC_HOSTS=u@a.example",
		"TLS_CERT=" + cert, "TLS_KEY=" + key, "TLS_CERT=/none TLS_KEY=" + key, "TLS_CERT=" + key + " TLS_KEY=" + cert,
		"INGEST_KEY=same ACCESS_TOKEN=same", "WATCHDOG_USEC=soon",
	} {
		values := map[string]string{}
		pairs := regexp.MustCompile(` ([A-Z_]+=)`).ReplaceAllString(bad, "\n$1")
		for _, pair := range strings.Split(pairs, "\n") {
			name, value, _ := strings.Cut(pair, "=")
			values[name] = value
		}
		name, _, _ := strings.Cut(bad, "=")
		_, err := loadConfig(func(name string) string { return values[name] })
		if err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want one line that names it", bad, err)
		}
	}
	values := map[string]string{"TRACKER_ORIGINS": " HTTPS://Shop.example ,http://[::1]:99,", "VIEWER_ORIGINS": "", "PUBLIC_HOSTS": "A.example:8443 , b.example",
		"TLS_CERT": cert, "TLS_KEY": key, "CREDENTIALS_DIRECTORY": dir}
	os.WriteFile(filepath.Join(dir, "db_password"), []byte("p:w \n"), 0o600)
	os.WriteFile(filepath.Join(dir, "access_token"), []byte("from a file\n"), 0o600)
	os.WriteFile(filepath.Join(dir, "ingest_key"), []byte(" \n"), 0o600)
	load := func() config {
		t.Helper()
		c, err := loadConfig(func(name string) string { return values[name] })
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := load()
	got := fmt.Sprintf("%q %q %q %q", c.trackerOrigins, c.viewerOrigins, c.publicHosts, []string{c.token, c.key, c.database.ConnConfig.Password})
	if want := `["https://shop.example" "http://[::1]:99"] [] ["a.example:8443" "b.example"] ["from a file" "" "p:w"]`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	values["DATABASE_URL"] = "postgres://u@h/d"
	if got := load().database.ConnConfig.Password; got != "p:w" {
		t.Errorf("DATABASE_URL without a password: got %q, want the credential", got)
	}
	values["DATABASE_URL"], values["ACCESS_TOKEN"] = "postgres://u:own@h/d", "from the environment"
	if c := load(); c.database.ConnConfig.Password != "own" || c.token != "from the environment" {
		t.Errorf("the environment does not win: %q, %q", c.database.ConnConfig.Password, c.token)
	}
	values = map[string]string{"TRACKER_ORIGINS": ","}
	if got := load().trackerOrigins; len(got) != 0 {
		t.Errorf("TRACKER_ORIGINS=, is %q, want none", got)
	}
}
