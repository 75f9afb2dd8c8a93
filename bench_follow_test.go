//go:build bench

package main

import (
	"testing"
	"time"
)

// What it costs to know of 10,000 live sessions of another server, with a viewer
// that reads lists, and with nobody.
func TestBenchFollow(t *testing.T) {
	pg := ownPostgres(t)
	s := startServer(t, "BATCH_INTERVAL=5000", "DATABASE_URL="+databaseIn(t, pg.url))
	execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, server, updated_at)
		select 'session-' || md5(i::text), 'user_' || i, 'https://example.com/shop', json_build_object(
			'url', 'https://example.com/shop', 'userAgent', repeat('Mozilla/5.0 ', 12), 'referrer', '',
			'timeZone', 'UTC'), true, 'other', now() + interval '1 hour'
		from generate_series(1, 10000) i`)
	execSQL(t, s.database, "vacuum analyze sessions")
	pid := s.cmd.Process.Pid
	measure := func(what string) {
		const span = 30 * time.Second
		server, postgres := cpuSeconds(pid, false), pg.cpuSeconds(t)
		time.Sleep(span)
		t.Logf("%s: server %.2f %%, PostgreSQL %.2f %% of a core", what,
			100*(cpuSeconds(pid, false)-server)/span.Seconds(), 100*(pg.cpuSeconds(t)-postgres)/span.Seconds())
	}
	measure("one server alone")
	execSQL(t, s.database, "insert into servers values ('other', now() + interval '1 hour')")
	time.Sleep(3 * time.Second)
	measure("another one, no viewer")
	go discard(dialServer(t, s.ws("viewer")).read) // ends with the connection
	time.Sleep(3 * time.Second)
	if n := s.metric("connections{type=\"viewer\"}"); n != 1 {
		t.Errorf("got %d viewers, want 1", n)
	}
	measure("another one, a viewer")
}
