package main

// PostgreSQL with a standby that takes over, and poolers between.

import (
	"fmt"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// ---- a standby takes over ----

// standbyOf makes a synchronous standby of a cluster, from a copy of its files.
func standbyOf(t *testing.T, primary *testPostgres) *testPostgres {
	t.Helper()
	data := filepath.Dir(primary.pidFile)
	at, err := url.Parse(primary.url)
	if err != nil {
		t.Fatal(err)
	}
	primary.kill(t, syscall.SIGINT)
	standby := ownPostgres(t, func(dir string) error {
		follow := fmt.Sprintf("primary_conninfo = 'host=%s port=%s user=postgres application_name=standby'",
			at.Query().Get("host"), at.Query().Get("port"))
		copied := exec.Command("sh", "-ec", `cp -a "$0" "$1/data"; chown --reference="$0" "$1"
			echo "$2" >>"$1/data/postgresql.auto.conf"; touch "$1/data/standby.signal"`, data, dir, follow)
		if out, err := copied.CombinedOutput(); err != nil {
			return fmt.Errorf("copy the cluster: %w %s", err, out)
		}
		return primary.start()
	})
	execSQL(t, primary.url, "alter system set synchronous_standby_names = 'standby'")
	execSQL(t, primary.url, "select pg_reload_conf()")
	waitUntil(t, "the standby is synchronous", func() bool {
		return querySQL[int](t, primary.url, "select count(*) from pg_stat_replication where sync_state = 'sync'") == 1
	})
	return standby
}

// hostsOf is one URL that leads to several proxies, each before a server.
func hostsOf(database string, proxies ...*testProxy) string {
	var addresses []string
	for _, p := range proxies {
		addresses = append(addresses, p.address)
	}
	return "postgres://postgres@" + strings.Join(addresses, ",") + "/" + database +
		"?sslmode=disable&target_session_attrs=read-write"
}

// pair is a load on a primary that has a standby.
type pair struct {
	*load
	standby *testPostgres
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{load: &load{t: t, pg: ownPostgres(t), goHome: func() {}}}
	p.standby = standbyOf(t, p.pg)
	p.toDB, _ = proxyToDatabase(t, p.pg.url, nil)
	toStandby, _ := proxyToDatabase(t, p.standby.url, nil)
	p.server = newServer(t, "DATABASE_URL="+hostsOf(databaseName(t, p.pg.url), p.toDB, toStandby))
	p.server.database = p.pg.url
	p.toServer, p.address = proxyTo(t, p.server)
	return p
}

// promote makes the standby the primary.
func (p *pair) promote() {
	p.t.Helper()
	if !querySQL[bool](p.t, p.standby.url, "select pg_promote()") {
		p.t.Fatal("the standby was not promoted")
	}
	p.server.database = p.standby.url
}

func (p *pair) batchesAcked() (n int64) {
	for _, tr := range p.trackers {
		n += tr.read(&tr.acked)
	}
	return n
}

// What is acknowledged survives the primary, however it goes, and recording goes
// on with the standby, within five seconds when nothing else is to be done.
func TestFaultFailover(t *testing.T) {
	for _, way := range []struct {
		name string
		full bool // of the full set alone
		fall func(p *pair)
		says string // in the log
	}{
		{"the primary hangs", false, func(p *pair) {
			p.t.Cleanup(func() { p.pg.thaw(p.t) })
			p.pg.freeze(p.t)
		}, "its connections are given up"},
		{"the primary is killed", true, func(p *pair) { p.pg.kill(p.t, syscall.SIGKILL) }, ""},
		{"the network to the primary is a black hole", true, func(p *pair) { p.toDB.freeze() }, "its connections are given up"},
		{"the primary hangs for long before the standby is promoted", true, func(p *pair) {
			p.t.Cleanup(func() { p.pg.thaw(p.t) })
			p.pg.freeze(p.t)
			p.pending(20)
		}, "its connections are given up"},
		{"the primary lives on without the standby", true, func(*pair) {}, "new connections try another host"},
	} {
		if way.full && !fullFaults {
			continue
		}
		t.Run(way.name, func(t *testing.T) {
			besideOthers(t)
			for range scale(1, 3) {
				p := newPair(t)
				p.record(scale(5, 20), nil)
				way.fall(p)
				p.promote()
				p.progress("the standby's promotion")
				if !strings.Contains(p.server.output.String(), way.says) {
					t.Errorf("the log does not say that %s", way.says)
				}
				p.finish()
				t.Logf("%s: %d batches acked", way.name, p.batchesAcked())
			}
		})
	}
}
