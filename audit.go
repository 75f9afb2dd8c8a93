package main

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// audit writes down who saw, took and deleted what, as lines of the log. Never a
// token. It is safe for concurrent use.
type audit struct {
	log *slog.Logger

	mu     sync.Mutex
	opened map[string]time.Time // by address and session
}

const (
	openedOnce = 10 * time.Minute // a player asks again and again for what it plays
	maxOpened  = 10_000
)

func (a *audit) note(from netip.Addr, action string, facts ...any) {
	a.log.Info("audit", append([]any{"audit", true, "action", action, "from", from.String()}, facts...)...)
}

// open notes that somebody looks at a session.
func (a *audit) open(from netip.Addr, id string) {
	key := from.String() + " " + id
	a.mu.Lock()
	known := time.Since(a.opened[key]) < openedOnce
	if len(a.opened) >= maxOpened {
		clear(a.opened)
	}
	if !known {
		a.opened[key] = time.Now()
	}
	a.mu.Unlock()
	if !known {
		a.note(from, "opened", "session", id)
	}
}
