package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// audit writes down who saw, took and deleted what, as lines of the log. Never a
// token. It is safe for concurrent use.
type audit struct {
	log *slog.Logger

	mu    sync.Mutex
	noted map[string]time.Time // by address, action and facts
}

// When maxNoted are noted all are forgotten, and noted anew.
const (
	notedOnce = 10 * time.Minute
	maxNoted  = 10_000
)

// note writes a line. facts are names and values in turn, as slog has them.
func (a *audit) note(from netip.Addr, action string, facts ...any) {
	a.log.Info("audit", append([]any{"audit", true, "action", action, "from", from.String()}, facts...)...)
}

// once notes what comes again and again: a player asks for what it plays, and
// nobody shall fill the disk with wrong tokens.
func (a *audit) once(from netip.Addr, action string, facts ...any) {
	key := fmt.Sprint(from, action, facts)
	a.mu.Lock()
	known := time.Since(a.noted[key]) < notedOnce
	if len(a.noted) >= maxNoted {
		clear(a.noted)
	}
	if !known {
		a.noted[key] = time.Now()
	}
	a.mu.Unlock()
	if !known {
		a.note(from, action, facts...)
	}
}

// open notes that somebody looks at a session.
func (a *audit) open(from netip.Addr, id string) { a.once(from, "opened", "session", id) }
