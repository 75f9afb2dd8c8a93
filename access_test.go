package main

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
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
	return caller{"cookie", func(r *http.Request) {
		r.AddCookie(&http.Cookie{Name: "session-replay-" + r.URL.Port(),
			Value: value})
	}}
}

// as sends one request as a caller does, and follows no redirect.
func (s *serverProcess) as(c caller, method, path string) *http.Response {
	s.t.Helper()
	r, err := http.NewRequestWithContext(testContext(s.t), method, s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if strings.HasPrefix(path, "/ws") {
		for name, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket",
			"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg=="} {
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
	"POST /ws":                          {"/ws", 400, "record"}, // without a body
	"OPTIONS /ws":                       {"", 0, "post"},
	"GET /recordings/{id}/events/ws":    {"", 0, "post"}, // the key has another name: see post_test.go
	"POST /recordings/{id}/events":      {"", 0, "post"},
	"OPTIONS /recordings/{id}/events":   {"", 0, "post"},
	"GET /health":                       {"/health", 200, "all"},
	"GET /stats":                        {"/stats", 200, "view"},
	"GET /metrics":                      {"/metrics", 200, "view"},
	"GET /sessions":                     {"/sessions", 200, "view"},
	"GET /sessions/active":              {"/sessions/active", 200, "view"},
	"GET /sessions/{id}":                {"/sessions/s", 404, "view"},
	"GET /sessions/{id}/events":         {"/sessions/s/events", 404, "view"},
	"GET /sessions/{id}/errors":         {"/sessions/s/errors", 404, "view"},
	"GET /sessions/{id}/chunks/{index}": {"/sessions/s/chunks/0", 404, "view"},
	"GET /sessions/export":              {"/sessions/export?userId=nobody", 200, "view"},
	"GET /sessions/{id}/export":         {"/sessions/s/export", 404, "view"},
	"DELETE /sessions":                  {"/sessions?userId=nobody", 200, "view"},
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
	s := startServer(t, "ACCESS_TOKEN="+testToken, "INGEST_KEY="+testKey,
		"VIEWER_ORIGINS=https://viewer.example, https://also.example:8443",
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
		{cookie.and("TLS, page without", ownPage).and("", header("X-Forwarded-Proto", "https")), 403, 403, 403, 401,
			403},
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
	if resp := s.as(header("Accept", "text/html"), "GET", "/view/a?token=any&t=9"); resp.StatusCode != 303 ||
		resp.Header.Get("Location") != "/view/a?t=9" {
		t.Errorf("a link with a token that is not needed: got %d, %v", resp.StatusCode, resp.Header)
	}
	if resp.StatusCode != http.StatusBadRequest || len(resp.Cookies()) != 0 {
		t.Errorf("sign-in where there is no token: got %d, %v", resp.StatusCode, resp.Cookies())
	}
}

// A token alone: anyone may record.
func TestAccessTokenWithoutKey(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "METRICS_OPEN=true")
	for path, want := range map[string]int{"/stats": 401, "/ws?type=viewer": 401, "/ws?type=tracker": 101,
		"/metrics": 200} {
		for _, who := range []caller{nobody, withCookie("wrong"), header("Authorization", "Bearer wrong")} {
			if got := s.as(who, "GET", path).StatusCode; got != want {
				t.Errorf("%s as %s: got %d, want %d", path, who.name, got, want)
			}
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
			if route.kind != "post" {
				s.expect(v, name, route.path, route.ok, route.kind)
			}
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
	viewed := name == "GET /{$}" && want == ok && slices.Contains(s.env, "INGEST_KEY="+testKey)
	if viewed != strings.Contains(body, testKey) {
		s.t.Errorf("%s as %s: who may view is told the ingest key, and nobody else: got %s", name, v.caller.name, body)
	}
	if name == "GET /health" {
		if in := v.of("view", 200) == 200; in != strings.Contains(body, "totalEvents") ||
			!strings.Contains(body, `"status":"healthy"`) {
			s.t.Errorf("health as %s: got %s", v.caller.name, body)
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
			resp.Header.Get("Content-Security-Policy") != viewerPolicy ||
			resp.Header.Get("Cache-Control") != "no-store" {
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
	for path, want := range map[string]string{"/?": "/", "/view/a:b?t=90&": "/view/a:b?t=90",
		"/view/a%2Fb?": "/view/a%2Fb", "/view/%2F%2Fevil.example?": "/view/%2F%2Fevil.example"} {
		resp := s.as(html, "GET", path+"token=the%2Baccess/token%3Dof+a+test")
		if resp.StatusCode != 303 || resp.Header.Get("Location") != want || len(resp.Cookies()) != 1 {
			t.Errorf("link to %s: got %d to %q with %v, want %q", path, resp.StatusCode, resp.Header.Get("Location"),
				resp.Cookies(), want)
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
	s.env = append(s.env, "ACCESS_TOKEN=another token, a longer one")
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
		if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Domain != "" ||
			c.Secure != how.secure || c.MaxAge <= 0 ||
			len(c.Value) < 32 || strings.Contains(c.Value, testToken) {
			t.Errorf("%s: cookie %v", how.who.name, c)
		}
	}
	cookie := withCookie(s.signIn(testToken))
	if resp := s.as(cookie, "GET", "/ws?type=tracker"); resp.StatusCode != 401 || len(resp.Cookies()) != 0 {
		t.Errorf("a page that records without the key: got %d, %v, want whoever is signed in to stay so",
			resp.StatusCode, resp.Cookies())
	}
	resp := s.as(cookie, "POST", "/signout")
	if c := resp.Cookies(); resp.StatusCode != 204 || len(c) != 1 || c[0].MaxAge >= 0 {
		t.Errorf("sign-out: got %d, %v", resp.StatusCode, c)
	}
	for body, want := range map[string]int{`{"token":"wrong"}`: 401, `{"token":""}`: 401, `{}`: 401,
		`{"token":7}`: 400, `x`: 400, ``: 400,
		`{"token":"` + strings.Repeat("x", 5000) + `"}`: 400} {
		resp, err := http.Post(s.url+"/signin", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != want || len(resp.Cookies()) != 0 {
			t.Errorf("sign-in with %.30s: got %d and %v, want %d", body, resp.StatusCode, resp.Cookies(), want)
		}
	}
	other := newAccess(accessConfig{token: testToken}, "127.0.0.1", "1", nil)
	if other.cookieName == newAccess(accessConfig{token: testToken}, "127.0.0.1", "2", nil).cookieName {
		t.Error("two servers on one machine share a cookie: ports do not keep them apart")
	}
	another := newAccess(accessConfig{token: testToken}, "192.0.2.1", "1", nil)
	if another.cookieName != other.cookieName || another.cookie != other.cookie {
		t.Error("who has signed in on one of several servers is not signed in on the others")
	}
}

func TestAccessShared(t *testing.T) {
	s := startServer(t, "ACCESS_TOKEN="+testToken, "VIEWER_ORIGINS=https://viewer.example")
	const allow = "Access-Control-Allow-Origin"
	preflight := header("Access-Control-Request-Method", "DELETE")
	resp := s.as(listed.and("", preflight), "OPTIONS", "/sessions/a")
	if resp.StatusCode != 204 || resp.Header.Get(allow) != "https://viewer.example" ||
		resp.Header.Get("Access-Control-Allow-Headers") != "Authorization" ||
		!strings.Contains(resp.Header.Get("Access-Control-Allow-Methods"), "DELETE") ||
		resp.Header.Get("Access-Control-Allow-Credentials") != "" {
		t.Errorf("preflight of a listed page: got %d, %v", resp.StatusCode, resp.Header)
	}
	if resp := s.as(evil.and("", preflight), "OPTIONS", "/sessions/a"); resp.StatusCode != 405 ||
		resp.Header.Get(allow) != "" {
		t.Errorf("preflight of another page: got %d, %v", resp.StatusCode, resp.Header)
	}
	for _, who := range []caller{bearer.and("", listed), listed} { // also to read that it is refused
		if resp := s.as(who, "GET", "/sessions"); resp.Header.Get(allow) != "https://viewer.example" ||
			!slices.Contains(resp.Header["Vary"], "Origin") {
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
	linkLine := regexp.MustCompile(`(?m)^http://LOCALHOST:\d+(/\?token=([A-Z2-7]{20,}))$`)
	link := linkLine.FindAllStringSubmatch(s.output.String(), -1)
	if len(link) != 1 {
		t.Fatalf("got links %q, want one, in %s", link, s.output.String())
	}
	if status, _ := s.get("/sessions"); status != 401 {
		t.Errorf("without the token: got %d", status)
	}
	if resp := s.as(header("Accept", "text/html"), "GET", link[0][1]); resp.StatusCode != 303 ||
		len(resp.Cookies()) != 1 {
		t.Errorf("by the link: got %d, %v", resp.StatusCode, resp.Cookies())
	}
	for _, kind := range []string{applicationLog, errorLog, exceptionsLog, rejectionsLog} {
		if strings.Contains(s.log(kind), link[0][2]) {
			t.Errorf("the made token stands in the %s log", kind)
		}
	}
	for host, open := range map[string]bool{"127.0.0.1": true, "127.8.8.8": true, "::1": true, "localhost": true,
		"0.0.0.0": false, "::": false, "10.0.0.1": false, "replay.example": false, "": false} {
		a := newAccess(accessConfig{}, host, "80", nil)
		if a.open != open || a.generated == open || (a.token == "") != open {
			t.Errorf("HOST=%s: open %v, token made %v, want open %v", host, a.open, a.generated, open)
		}
		if a = newAccess(accessConfig{token: "x"}, host, "80", nil); a.open || a.generated || a.token != "x" {
			t.Errorf("HOST=%s with a token: %+v", host, a)
		}
	}
}

// ---- limits ----

func TestAccessAddress(t *testing.T) {
	for _, tt := range []struct {
		peer, forwarded, want string
		warns                 bool
	}{
		{"1.2.3.4:5", "", "1.2.3.4", false},
		{"1.2.3.4:5", "9.9.9.9", "9.9.9.9", false},
		{"1.2.3.4:5", "6.6.6.6, 9.9.9.9", "9.9.9.9", false},
		{"1.2.3.4:5", "6.6.6.6,9.9.9.9 ", "9.9.9.9", false},
		{"1.2.3.4:5", "6.6.6.6, 9.9.9.9:1234", "9.9.9.9", false},
		{"1.2.3.4:5", "9.9.9.9, unknown", "1.2.3.4", true},
		{"1.2.3.4:5", "9.9.9.9, _hidden", "1.2.3.4", true},
		{"1.2.3.4:5", "9.9.9.9,", "1.2.3.4", false},
		{"1.2.3.4:5", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::", false},
		{"1.2.3.4:5", "[2001:db8:1:2:3:4:5:6]", "2001:db8:1:2::", false},
		{"1.2.3.4:5", "[2001:db8:1:2:3:4:5:6]:77", "2001:db8:1:2::", false},
		{"[::ffff:1.2.3.4]:5", "", "1.2.3.4", false},
		{"[2001:db8:1:2:3:4:5:6]:7", "", "2001:db8:1:2::", false},
		{"[fe80::1%eth0]:7", "", "fe80::", false},
		{"[::1]:7", "", "::1", false},
	} {
		r := &http.Request{RemoteAddr: tt.peer, Header: http.Header{"X-Forwarded-For": {"5.5.5.5", tt.forwarded}}}
		var said bytes.Buffer
		a := newAccess(accessConfig{trustProxy: true}, "127.0.0.1", "80", slog.New(slog.NewTextHandler(&said, nil)))
		if got := a.address(r).String(); got != tt.want || a.address(r).String() != tt.want {
			t.Errorf("%+v: got %s", tt, got)
		}
		if got := strings.Count(said.String(), "X-Forwarded-For"); got != map[bool]int{true: 1}[tt.warns] {
			t.Errorf("%+v: two such requests are logged as %q", tt, &said)
		}
	}
	r := &http.Request{RemoteAddr: "1.2.3.4:5", Header: http.Header{"X-Forwarded-For": {"9.9.9.9"}}}
	if got := newAccess(accessConfig{}, "127.0.0.1", "80", nil).address(r).String(); got != "1.2.3.4" {
		t.Errorf("without TRUST_PROXY: got %s, want the peer", got)
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
		conn, resp, err := websocket.Dial(testContext(t), s.ws("tracker"),
			&websocket.DialOptions{HTTPHeader: http.Header{"X-Forwarded-For": {addr}}})
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

// What is refused to a client is counted by its reason.
func TestLimitsAreCounted(t *testing.T) {
	s := startServer(t, "MAX_MESSAGE_BYTES=20000", "MAX_SESSIONS_PER_MINUTE=2", "MAX_SESSION_BYTES=5000",
		"MAX_HEADER_BYTES=8192", "READ_HEADER_TIMEOUT=300", "TRUST_PROXY=true")
	event := `{"type":3,"data":"` + strings.Repeat("x", 6000) + `"}`
	for _, tt := range []struct {
		reason   string
		messages []string
	}{
		{"message_bytes", []string{"error", `"` + strings.Repeat("x", 20000) + `"`}},
		{"session_bytes", []string{"session_start", "{}", "events_batch", `{"events":[` + event + `]}`}},
		{"too_many_sessions", []string{"session_start", "{}", "session_end", "{}", "session_start", "{}"}},
	} {
		c := dialServer(t, s.ws("tracker"))
		for i := 0; i < len(tt.messages); i += 2 {
			c.send(tt.messages[i], tt.messages[i+1])
		}
		s.refusedWith(tt.reason)
	}
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
	if _, err := slow.Read(make([]byte, 1)); err != io.EOF {
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
			return querySQL[int](t, s.database, "select count(*) from sessions where session_id = $1 and is_active",
				fmt.Sprintf("old-%d", i)) == 0
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
