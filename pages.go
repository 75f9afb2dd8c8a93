package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io/fs"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
)

//go:embed web/*.html web/*.js web/*.css web/dist
var web embed.FS

// asset is an embedded file, ready to be served.
type asset struct {
	body, zipped []byte
	contentType  string
	etag         string
}

func newAsset(name string, body []byte) asset {
	sum := sha256.Sum256(body)
	types := map[string]string{".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
	var zipped bytes.Buffer
	z, _ := gzip.NewWriterLevel(&zipped, gzip.BestCompression)
	z.Write(body)
	z.Close()
	return asset{body, zipped.Bytes(), types[path.Ext(name)] + "; charset=utf-8", `"` + hex.EncodeToString(sum[:8]) + `"`}
}

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
		script = []byte("(function(){var module={exports:{}},exports=module.exports,define;" + string(recorder.body) +
			"\n;var rrwebRecord=module.exports;(()=>{\"use strict\";" + string(files["tracker-privacy.js"].body) +
			string(files["tracker-picture.js"].body) + string(files["tracker.js"].body) + "})()})();")
	}
	files["tracker.js"] = newAsset("tracker.js", script)
	return files, bundled
})

func (s *server) serve(w http.ResponseWriter, r *http.Request, name, cache string) {
	a, ok := s.files[name]
	if !ok {
		s.fail(w, r, http.StatusNotFound, "no such file", nil)
		return
	}
	h := w.Header()
	h.Set("Content-Type", a.contentType)
	h.Set("Cache-Control", cache)
	h.Set("ETag", a.etag)
	h.Add("Vary", "Accept-Encoding")
	if r.Header.Get("If-None-Match") == a.etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	body := a.body
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
		body = a.zipped
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

const (
	// viewerPolicy keeps what was recorded, which may be hostile, from running
	// scripts, sending requests and reaching the viewer's session.
	viewerPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; " +
		"font-src data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
	demoPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; " +
		"connect-src 'self' ws: wss:; form-action 'self'; base-uri 'none'"
)

func (s *server) page(w http.ResponseWriter, r *http.Request, name, policy string) {
	w.Header().Set("Content-Security-Policy", policy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	s.serve(w, r, name, "no-cache")
}

func (s *server) handleRoot(w http.ResponseWriter, r *http.Request) {
	if isBrowser(r) {
		s.page(w, r, "index.html", viewerPolicy)
		return
	}
	s.write(w, http.StatusOK, map[string]any{
		"name": "session-replay", "version": version(),
		"endpoints": map[string]string{"websocket": "/ws", "health": "/health", "stats": "/stats", "activeSessions": "/sessions/active",
			"sessionEvents": "/sessions/:sessionId/events", "cleanup": "/sessions/cleanup"},
		"documentation": "README.md", "signedIn": s.access.signedIn(r),
	})
}

func (s *server) handleView(w http.ResponseWriter, r *http.Request) {
	s.page(w, r, "view.html", viewerPolicy)
}
func (s *server) handleDemo(w http.ResponseWriter, r *http.Request) {
	s.page(w, r, "demo.html", demoPolicy)
}

func (s *server) handleAsset(w http.ResponseWriter, r *http.Request) {
	s.serve(w, r, r.PathValue("file"), "no-cache")
}

func (s *server) handleTracker(w http.ResponseWriter, r *http.Request) {
	s.origins.fetched(originOf(r))
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("Cross-Origin-Resource-Policy", "cross-origin")
	s.serve(w, r, "tracker.js", "public, max-age=3600")
}
