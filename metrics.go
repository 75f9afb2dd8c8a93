package main

import (
	"cmp"
	"expvar"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts what happens, for /stats and /metrics. Any goroutine may add to it.
type metrics struct {
	sessionsStarted, sessionsDeleted      atomic.Int64
	eventsIn, bytesIn, wireBytes          atomic.Int64
	eventsStored, bytesStored             atomic.Int64
	refusedSessions, databaseErrors, acks atomic.Int64
	viewersLagged                         atomic.Int64
	batches, batchNanos, batchBytes       atomic.Int64 // database batches tried; time; JSON stored

	refusals expvar.Map // by reason
}

// refuse counts something that was refused to a client.
func (m *metrics) refuse(reason string) { m.refusals.Add(reason, 1) }

// batch counts a database batch that a writer has tried to store.
func (m *metrics) batch(work []*flush, took time.Duration) {
	m.batches.Add(1)
	m.batchNanos.Add(int64(took))
	for _, f := range work {
		if f.outcome != stored {
			continue
		}
		for _, c := range f.chunks {
			m.eventsStored.Add(c.count)
			m.bytesStored.Add(int64(len(c.events)))
			m.batchBytes.Add(int64(c.raw))
		}
	}
}

// metric is a line of /metrics. Those of one family stand together; the first has
// its help.
type metric struct {
	name, help string // what is not Go's or the process's gets a prefix
	value      float64
}

// writeMetrics writes Prometheus' text format 0.0.4,
// https://prometheus.io/docs/instrumenting/exposition_formats/. A name's end says
// of which kind it is.
func writeMetrics(w io.Writer, all []metric) {
	for _, m := range all {
		if !strings.HasPrefix(m.name, "go_") && !strings.HasPrefix(m.name, "process_") {
			m.name = "session_replay_" + m.name
		}
		if m.help != "" {
			family, _, _ := strings.Cut(m.name, "{")
			kind := "gauge"
			if base, found := strings.CutSuffix(family, "_sum"); found {
				family, kind = base, "summary"
			} else if strings.HasSuffix(family, "_total") {
				kind = "counter"
			}
			fmt.Fprintf(w, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", family, m.help, kind)
		}
		fmt.Fprintf(w, "%s %v\n", m.name, m.value)
	}
}

// fetches counts how often pages fetched tracker.js and what came of it, by their
// origin, for the last half hour to an hour: why nothing is recorded is often
// known here alone. It is safe for concurrent use.
type fetches struct {
	mu          sync.Mutex
	now, before map[string]*originCounts
	since       time.Time // of now
}

// originCounts is of one origin in one period, and in /stats of both.
type originCounts struct {
	Origin   string           `json:"origin"`
	Fetches  int64            `json:"fetches"`
	Sessions int64            `json:"sessions"`
	Refusals map[string]int64 `json:"refusals"` // by reason
}

// Of a period the first origins are counted, others not.
const (
	maxOrigins   = 100
	maxOrigin    = 256 // bytes of one
	originPeriod = 30 * time.Minute
)

// count calls add with the origin's counts, under the lock; for no origin it does nothing.
func (f *fetches) count(origin string, add func(*originCounts)) {
	if origin == "" || len(origin) > maxOrigin {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forget()
	if f.now[origin] != nil || len(f.now) < maxOrigins {
		add(countsOf(f.now, origin))
	}
}

// countsOf gives the counts of an origin, which are zero at first.
func countsOf(all map[string]*originCounts, origin string) *originCounts {
	if all[origin] == nil {
		all[origin] = &originCounts{Origin: origin, Refusals: map[string]int64{}}
	}
	return all[origin]
}

// forget drops what is too old, and begins a period where that is due. The caller holds mu.
func (f *fetches) forget() {
	age := time.Since(f.since)
	if age < originPeriod {
		return
	}
	if f.before = f.now; age >= 2*originPeriod {
		f.before = nil
	}
	f.now, f.since = map[string]*originCounts{}, time.Now()
}

// recent gives the origins whose pages have fetched tracker.js, most fetches first.
func (f *fetches) recent() []*originCounts {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forget()
	sums := map[string]*originCounts{}
	for _, period := range []map[string]*originCounts{f.before, f.now} {
		for origin, c := range period {
			sum := countsOf(sums, origin)
			sum.Fetches += c.Fetches
			sum.Sessions += c.Sessions
			for reason, n := range c.Refusals {
				sum.Refusals[reason] += n
			}
		}
	}
	all := slices.AppendSeq([]*originCounts{}, maps.Values(sums))
	all = slices.DeleteFunc(all, func(c *originCounts) bool { return c.Fetches == 0 })
	slices.SortFunc(all, func(a, b *originCounts) int {
		return cmp.Or(cmp.Compare(b.Fetches, a.Fetches), cmp.Compare(a.Origin, b.Origin))
	})
	return all
}

// originOf is the origin of the page that sends a request, empty where the browser
// does not tell. A script's request has it in its Referer alone.
func originOf(r *http.Request) string {
	u, err := url.Parse(cmp.Or(r.Header.Get("Origin"), r.Header.Get("Referer")))
	if err != nil || u.Host == "" {
		return ""
	}
	return u.Scheme + "://" + u.Host
}
