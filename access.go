package main

import (
	"net"
	"net/http"
	"sync"
)

// admission counts connections, in all and by address.
type admission struct {
	mu     sync.Mutex
	max    int
	total  int
	byAddr map[string]int
}

func (a *admission) enter(addr string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.total >= a.max {
		return false
	}
	a.total++
	a.byAddr[addr]++
	return true
}

func (a *admission) leave(addr string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.total--
	if a.byAddr[addr]--; a.byAddr[addr] == 0 {
		delete(a.byAddr, addr)
	}
}

func clientAddr(r *http.Request) string {
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	return host
}
