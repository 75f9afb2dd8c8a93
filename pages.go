package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io/fs"
	"maps"
	"net/http"
	"path"
	"regexp"
	"strings"
	"sync"
	"time"
)

//go:embed web/*.html web/*.js web/*.css web/dist
var web embed.FS

// asset is an embedded file, ready to be served.
type asset struct {
	body, zipped []byte
	contentType  string
	etag         string
}

// newAsset compresses a file once, at the start, as well as gzip can.
func newAsset(name string, body []byte) asset {
	sum := sha256.Sum256(body)
	types := map[string]string{".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
	var zipped bytes.Buffer
	z, _ := gzip.NewWriterLevel(&zipped, gzip.BestCompression)
	z.Write(body)
	z.Close()
	return asset{body, zipped.Bytes(), types[path.Ext(name)] + "; charset=utf-8",
		`"` + hex.EncodeToString(sum[:8]) + `"`}
}

// comments, and the blanks at the start of lines, are a tenth of the tracker:
// visitors need not download them.
var comments = regexp.MustCompile(`(?m)^\s*(//.*\n)?|[ \t]+// .*$`)

// assets are the embedded files by their base names, and whether the recorder is
// among them. The tracker is put together here: rrweb's recorder and ours, in a
// function of their own, so that the recorder's bundle finds neither the page's
// globals nor its module loader.
var assets = sync.OnceValues(func() (map[string]asset, bool) {
	files := map[string]asset{}
	fs.WalkDir(web, "web", func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && path.Ext(name) != ".txt" {
			body, _ := web.ReadFile(name)
			files[path.Base(name)] = newAsset(name, body)
		}
		return err
	})
	recorder, bundled := files["rrweb-record.js"]
	script := []byte(`console.warn("session-replay: the recorder was not bundled: run 'make web' and build again");`)
	if bundled {
		var ours []byte
		for _, name := range []string{"tracker-privacy.js", "tracker-picture.js", "tracker-record.js",
			"tracker-session.js", "tracker-delivery.js", "tracker.js"} {
			ours = append(ours, files[name].body...)
		}
		// Date is the tracker's and rrweb's own: a page may replace its Date, and clocks are set.
		script = []byte("(function(){var module={exports:{}},exports=module.exports,define," +
			"Date={now:()=>Math.round(performance.timeOrigin+performance.now())};" + string(recorder.body) +
			"\n;var rrwebRecord=module.exports;(()=>{\"use strict\";" + comments.ReplaceAllString(string(ours), "") +
			"})()})();")
	}
	files["tracker.js"] = newAsset("tracker.js", script)
	return files, bundled
})

const (
	// viewerPolicy keeps what was recorded, which may be hostile, from running
	// scripts, sending requests and reaching the viewer's session.
	viewerPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; " +
		"font-src data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
	demoPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; " +
		"connect-src 'self' ws: wss:; form-action 'self'; base-uri 'none'"
)

// mediaPolicy is viewerPolicy, open for pictures, fonts and style sheets of some
// origins.
func mediaPolicy(origins []string) string {
	if len(origins) == 0 {
		return viewerPolicy
	}
	list := " " + strings.Join(origins, " ")
	open := strings.NewReplacer("'unsafe-inline'", "'unsafe-inline'"+list, "data:", "data:"+list)
	return open.Replace(viewerPolicy) + "; media-src" + list
}

// mediaSlot is the place in view.html, which withMedia fills.
const mediaSlot = `name="media-origins" content="`

// withMedia tells the viewer's page these origins too: its frames have a policy of their own.
func withMedia(files map[string]asset, origins []string) map[string]asset {
	if len(origins) > 0 {
		files = maps.Clone(files)
		body := strings.Replace(string(files["view.html"].body), mediaSlot, mediaSlot+strings.Join(origins, " "), 1)
		files["view.html"] = newAsset("view.html", []byte(body))
	}
	return files
}

// Embedded files.

// serve answers with a file, or says that it need not be sent again.
func (s *server) serve(w http.ResponseWriter, r *http.Request, name, cache string) {
	file, ok := s.files[name]
	if !ok {
		s.fail(w, r, http.StatusNotFound, "no such file", nil)
		return
	}
	h, body := w.Header(), file.body
	h.Set("Content-Type", file.contentType)
	h.Set("Cache-Control", cache)
	h.Set("ETag", file.etag)
	h.Add("Vary", "Accept-Encoding")
	if takesGzip(r) {
		h.Set("Content-Encoding", "gzip")
		body = file.zipped
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}

// takesGzip takes the word for a yes: a client that says gzip;q=0 is not known.
func takesGzip(r *http.Request) bool {
	return strings.Contains(r.Header.Get("Accept-Encoding"), "gzip")
}

// page makes a handler that answers with an HTML file, under a Content-Security-Policy.
func (s *server) page(name, policy string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("Referrer-Policy", "no-referrer")
		s.serve(w, r, name, "no-cache")
	}
}

// handleRoot shows a browser the list, and tells a program what is here.
func (s *server) handleRoot(w http.ResponseWriter, r *http.Request) {
	if isBrowser(r) {
		s.page("index.html", viewerPolicy)(w, r)
		return
	}
	s.query(s.handleAbout)(w, r)
}

// handleAbout tells viewers the INGEST_KEY, which stands in each recorded page: the list shows the
// tag to copy.
func (s *server) handleAbout(w http.ResponseWriter, r *http.Request) error {
	s.write(w, http.StatusOK, map[string]any{
		"name": "session-replay", "version": version(),
		"endpoints": map[string]string{"websocket": "/ws", "health": "/health", "stats": "/stats",
			"activeSessions": "/sessions/active",
			"sessionEvents":  "/sessions/:sessionId/events", "cleanup": "/sessions/cleanup"},
		"documentation": "README.md", "signedIn": s.access.signedIn(r), "ingestKey": s.access.key,
	})
	return nil
}

// handleAsset has browsers ask each time; the ETag spares them the file.
func (s *server) handleAsset(w http.ResponseWriter, r *http.Request) {
	s.serve(w, r, r.PathValue("file"), "no-cache")
}

// handleTracker lets pages of all sites load the script, and counts those that did.
func (s *server) handleTracker(w http.ResponseWriter, r *http.Request) {
	s.fetches.count(originOf(r), func(c *originCounts) { c.Fetches++ })
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("Cross-Origin-Resource-Policy", "cross-origin")
	s.serve(w, r, "tracker.js", "public, max-age=3600")
}
