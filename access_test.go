package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"nhooyr.io/websocket"
)

// Secrets of these tests; none may ever stand in a log. They have a character
// that URLs escape.
const (
	testToken = "the+access/token=of a test"
	testKey   = "the-ingest-key-of-a-test"
)

func query1(name, value string) caller {
	return caller{"?" + name, func(r *http.Request) {
		q := r.URL.Query()
		q.Set(name, value)
		r.URL.RawQuery = q.Encode()
	}}
}

func withCookie(value string) caller {
	return caller{"cookie", func(r *http.Request) {
		r.AddCookie(&http.Cookie{Name: "session-replay-" + r.URL.Port(), Value: value})
	}}
}

// signIn gives the cookie's value.
func (s *testServer) signIn(token string) string {
	s.t.Helper()
	a := s.as(withBody(fmt.Sprintf(`{"token":%q}`, token)), "POST", "/signin")
	if a.status != http.StatusNoContent || len(a.cookies()) != 1 {
		s.t.Fatalf("sign-in: status %d, cookies %v", a.status, a.cookies())
	}
	return a.cookies()[0].Value
}

// tellsNothing checks that what the server has printed and logged holds none of
// the secrets, and no query string.
func (s *testServer) tellsNothing(secrets ...string) {
	s.t.Helper()
	said := s.output.String() + s.log("*") // of all kinds
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
	"GET /recordings/{id}/events/ws":    {"", 0, "post"},        // the key has another name: see post_test.go
	"POST /recordings/{id}/events":      {"", 0, "post"},
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
	t.Parallel()
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
	t.Parallel()
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
	linked := s.as(header("Accept", "text/html"), "GET", "/view/a?token=any&t=9")
	same(t, "a token that is not needed", said(linked.status, linked.header.Get("Location")), "303 /view/a?t=9")
	a := s.as(nobody, "POST", "/signin")
	same(t, "sign-in where there is no token", said(a.status, a.cookies()), "400 []")
}

// A token alone: anyone may record.
func TestAccessTokenWithoutKey(t *testing.T) {
	t.Parallel()
	s := startServer(t, "ACCESS_TOKEN="+testToken, "METRICS_OPEN=true")
	for path, want := range map[string]int{"/stats": 401, "/ws?type=viewer": 401, "/ws?type=tracker": 101,
		"/metrics": 200} {
		for _, who := range []caller{nobody, withCookie("wrong"), header("Authorization", "Bearer wrong")} {
			same(t, path+" as "+who.name, s.as(who, "GET", path).status, want)
		}
	}
}

func (s *testServer) table(verdicts []verdict) {
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

func (s *testServer) expect(v verdict, name, path string, ok int, kind string) {
	s.t.Helper()
	method, _, _ := strings.Cut(name, " ")
	if method != "POST" && method != "DELETE" {
		method = "GET"
	}
	a, want := s.as(v.caller, method, path), v.of(kind, ok)
	if a.status != want {
		s.t.Errorf("%s as %s: got %d, want %d", name, v.caller.name, a.status, want)
		return
	}
	if want != ok && !regexp.MustCompile(`^\{"error":"[^"]+"\}$`).MatchString(a.body) {
		s.t.Errorf("%s as %s: refused with %.200q", name, v.caller.name, a.body)
	}
	viewed := name == "GET /{$}" && want == ok && slices.Contains(s.env, "INGEST_KEY="+testKey)
	if viewed != strings.Contains(a.body, testKey) {
		s.t.Errorf("%s as %s: who may view is told the ingest key, and nobody else: got %s", name, v.caller.name,
			a.body)
	}
	if name == "GET /health" {
		if in := v.of("view", 200) == 200; in != strings.Contains(a.body, "totalEvents") ||
			!strings.Contains(a.body, `"status":"healthy"`) {
			s.t.Errorf("health as %s: got %s", v.caller.name, a.body)
		}
	}
}

// ---- browsers ----

func TestAccessBrowser(t *testing.T) {
	t.Parallel()
	s := startServer(t, "ACCESS_TOKEN="+testToken, "TRUST_PROXY=true", "LOG_LEVEL=debug")
	html := header("Accept", "text/html,*/*")
	for _, path := range []string{"/", "/view/s"} {
		a := s.as(html, "GET", path)
		same(t, path+" before signing in",
			said(a.status, a.header.Get("Cache-Control"), a.header.Get("Content-Security-Policy")),
			said(401, "no-store", viewerPolicy))
		holds(t, path, a.body, "/assets/signin.js")
	}
	// A browser keeps a SameSite=Strict cookie back from what another site's
	// link leads to; the page then asks once more by itself.
	same(t, "after a link from elsewhere",
		s.as(html.and("by a link", foreign).and("", linked), "GET", "/").header.Get("Refresh"), "0")
	same(t, "after a link from here", s.as(html.and("", ownFetch), "GET", "/").header.Get("Refresh"), "")
	for path, want := range map[string]string{"/?": "/", "/view/a:b?t=90&": "/view/a:b?t=90",
		"/view/a%2Fb?": "/view/a%2Fb", "/view/%2F%2Fevil.example?": "/view/%2F%2Fevil.example"} {
		a := s.as(html, "GET", path+"token=the%2Baccess/token%3Dof+a+test")
		same(t, "link to "+path, said(a.status, a.header.Get("Location"), len(a.cookies())), said(303, want, 1))
		if strings.Contains(a.body, "token") {
			t.Errorf("link to %s: the redirect repeats the token: %s", path, a.body)
		}
	}
	wrong := s.as(html, "GET", "/?token=wrong")
	same(t, "link with a wrong token", said(wrong.status, wrong.cookies()), "401 []")
	cookie := withCookie(s.signIn(testToken))
	same(t, "signed in", s.as(cookie.and("", html), "GET", "/").status, 200)
	holds(t, "by cookie", s.as(cookie, "GET", "/").body, `"signedIn":true`)
	holds(t, "by token", s.as(bearer, "GET", "/").body, `"signedIn":false`)
	s.restart()
	same(t, "the cookie after a restart", s.as(cookie, "GET", "/stats").status, 200)
	s.env = append(s.env, "ACCESS_TOKEN=another token, a longer one")
	s.restart()
	a := s.as(cookie, "GET", "/stats")
	if a.status != 401 || len(a.cookies()) != 1 || a.cookies()[0].MaxAge >= 0 {
		t.Errorf("the cookie of another token: got %d, %v, want it taken away", a.status, a.cookies())
	}
	s.tellsNothing(testToken, "the%2Baccess", "the+access")
}

func TestAccessCookie(t *testing.T) {
	t.Parallel()
	s := startServer(t, "ACCESS_TOKEN="+testToken, "INGEST_KEY="+testKey, "TRUST_PROXY=true")
	html := header("Accept", "text/html")
	for who, secure := range map[*caller]bool{&html: false,
		new(html.and("TLS before the proxy", header("X-Forwarded-Proto", "http, https"))): true} {
		c := s.as(*who, "GET", "/?token=the%2Baccess/token%3Dof+a+test").cookies()[0]
		same(t, who.name, said(c.HttpOnly, c.SameSite, c.Path, c.Domain, c.Secure),
			said(true, http.SameSiteStrictMode, "/", "", secure))
		if c.MaxAge <= 0 || len(c.Value) < 32 || strings.Contains(c.Value, testToken) {
			t.Errorf("%s: cookie %v", who.name, c)
		}
	}
	cookie := withCookie(s.signIn(testToken))
	a := s.as(cookie, "GET", "/ws?type=tracker")
	same(t, "a page that records without the key: whoever is signed in stays so", said(a.status, a.cookies()), "401 []")
	a = s.as(cookie, "POST", "/signout")
	if c := a.cookies(); a.status != 204 || len(c) != 1 || c[0].MaxAge >= 0 ||
		a.header.Get("Clear-Site-Data") != `"cache"` {
		t.Errorf("sign-out: got %d, %v", a.status, a.header)
	}
	for body, want := range map[string]int{`{"token":"wrong"}`: 401, `{"token":""}`: 401, `{}`: 401,
		`{"token":7}`: 400, `x`: 400, ``: 400, `{"token":"` + strings.Repeat("x", 5000) + `"}`: 400} {
		a := s.as(withBody(body), "POST", "/signin")
		same(t, "sign-in with "+body[:min(len(body), 30)], said(a.status, a.cookies()), said(want, "[]"))
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

// Pages of other sites may read answers, and ask beforehand whether they may.
func TestAccessShared(t *testing.T) {
	t.Parallel()
	s := startServer(t, "ACCESS_TOKEN="+testToken, "INGEST_KEY="+testKey, "VIEWER_ORIGINS=https://viewer.example",
		"TRACKER_ORIGINS=https://shop.example")
	const record = "https://shop.example POST Authorization, Content-Encoding, Content-Type"
	for _, tt := range []struct {
		who                caller
		method, path, want string // status, and what the page is allowed
	}{
		{listed, "OPTIONS", "/sessions/a", "204 https://viewer.example GET, DELETE Authorization"},
		{evil, "OPTIONS", "/sessions/a", "405"},
		{shop, "OPTIONS", "/sessions/a", "405"},
		{shop, "OPTIONS", "/ws", "204 " + record},
		{shop, "OPTIONS", "/recordings/r/events", "204 " + record},
		{listed, "OPTIONS", "/ws", "403"},
		{evil, "OPTIONS", "/recordings/r/events", "403"},
		{bearer.and("", listed), "GET", "/sessions", "200 https://viewer.example"},
		{listed, "GET", "/sessions", "401 https://viewer.example"}, // also to read that it is refused
		{bearer.and("", evil), "GET", "/sessions", "403"},
		{evil, "GET", "/tracker.js", "200 *"},
	} {
		a := s.as(tt.who, tt.method, tt.path)
		got := fmt.Sprint(a.status)
		for _, name := range []string{"Origin", "Methods", "Headers", "Credentials"} {
			got = strings.TrimSpace(got + " " + a.header.Get("Access-Control-Allow-"+name))
		}
		same(t, said(tt.method, tt.path, tt.who.name), got, tt.want)
		holds(t, "Vary", fmt.Sprint(a.header["Vary"]), "Origin")
	}
	if n := s.statsOf().Refusals["origin"]; n < 3 {
		t.Errorf("%d refusals are counted", n)
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
	same(t, "without the token", s.as(nobody, "GET", "/sessions").status, 401)
	a := s.as(header("Accept", "text/html"), "GET", link[0][1])
	same(t, "by the link", said(a.status, len(a.cookies())), "303 1")
	if strings.Contains(s.log("*"), link[0][2]) {
		t.Error("the made token stands in a log")
	}
	for host, open := range map[string]bool{"127.0.0.1": true, "127.8.8.8": true, "::1": true, "localhost": true,
		"0.0.0.0": false, "::": false, "10.0.0.1": false, "replay.example": false, "": false} {
		a := newAccess(accessConfig{}, host, "80", nil)
		same(t, "HOST="+host+": open, token made", said(a.open, a.generated, a.token == ""), said(open, !open, open))
		a = newAccess(accessConfig{token: "x"}, host, "80", nil)
		same(t, "HOST="+host+" with a token", said(a.open, a.generated, a.token), "false false x")
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
		var warned bytes.Buffer
		a := newAccess(accessConfig{trustProxy: true}, "127.0.0.1", "80", slog.New(slog.NewTextHandler(&warned, nil)))
		same(t, tt.peer+" for "+tt.forwarded, said(a.address(r), a.address(r)), said(tt.want, tt.want))
		same(t, "warnings after two of them", strings.Count(warned.String(), "X-Forwarded-For"),
			map[bool]int{true: 1}[tt.warns])
	}
	r := &http.Request{RemoteAddr: "1.2.3.4:5", Header: http.Header{"X-Forwarded-For": {"9.9.9.9"}}}
	same(t, "without TRUST_PROXY", newAccess(accessConfig{}, "127.0.0.1", "80", nil).address(r), "1.2.3.4")
}

// testStats are the parts of /stats that are maps.
type testStats struct {
	Refusals       map[string]int
	TrackerFetches []json.RawMessage
}

func (s *testServer) statsOf() (stats testStats) {
	s.t.Helper()
	a := s.as(bearer, "GET", "/stats")
	mustJSON(s.t, a.body, &stats)
	return stats
}

// refusedWith waits until /stats counts a reason.
func (s *testServer) refusedWith(reason string) {
	s.t.Helper()
	waitUntil(s.t, "a refusal is counted: "+reason, func() bool { return s.statsOf().Refusals[reason] > 0 })
}

func TestLimitConnections(t *testing.T) {
	t.Parallel()
	s := startServer(t, "MAX_CONNECTIONS=5", "MAX_CONNECTIONS_PER_ADDRESS=2", "TRUST_PROXY=true")
	dial := func(addr string) (conn *websocket.Conn, status int) {
		conn, resp, err := websocket.Dial(t.Context(), s.ws("tracker"),
			&websocket.DialOptions{HTTPHeader: http.Header{"X-Forwarded-For": {addr}}})
		if resp == nil {
			t.Fatal(err)
		}
		if err == nil {
			t.Cleanup(func() { conn.CloseNow() })
		} else if resp.Header.Get("Retry-After") == "" {
			t.Errorf("status %d without Retry-After", resp.StatusCode)
		}
		return conn, resp.StatusCode
	}
	first, _ := dial("10.0.0.1")
	for i, want := range []int{101, 429, 101, 101, 101, 503} { // the limit of an address, then that of all
		addr := []string{"10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3", "10.0.0.4"}[i]
		_, got := dial(addr)
		same(t, fmt.Sprint(i, " from ", addr), got, want)
	}
	s.refusedWith("connections")
	s.refusedWith("connections_per_address")
	first.CloseNow()
	waitUntil(t, "the place is free again", func() bool { _, status := dial("10.0.0.1"); return status == 101 })

	s = startServer(t, "MAX_CONNECTIONS_PER_ADDRESS=2") // who connects from loopback may be a proxy
	for range 4 {
		dialServer(t, s.ws("tracker"))
	}
}

// What is refused to a client is counted by its reason.
func TestLimitsAreCounted(t *testing.T) {
	t.Parallel()
	s := startServer(t, "MAX_MESSAGE_BYTES=20000", "MAX_SESSIONS_PER_MINUTE=2", "MAX_SESSION_BYTES=5000",
		"MAX_HEADER_BYTES=8192", "TRUST_PROXY=true")
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
	same(t, "a header of 20 KB", s.as(header("X-Long", strings.Repeat("x", 20000)), "GET", "/health").status, 431)
}
