//go:build breakages

package main

// Each promise is broken on purpose, in a copy of the tree, and the tests that
// hold it must fail: the ten invariants of doc/ and what the protocol promises.
//
//	go test -tags breakages -run TestBreakages -timeout 30m -v .

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"
)

// breakage replaces a text that a file has once, and names the tests that see it.
type breakage struct{ promise, file, old, new, tests string }

var breakages = []breakage{
	{"1 an ack comes after the commit", "queue.go", "s.ackTo.ack(s.id, s.durable.seq)", "s.ackTo.ack(s.id, s.now.seq)",
		"TestModel|TestDialogues"},
	{"1 the server stops when all is stored", "queue.go",
		"return h.draining && len(h.queue)+len(h.urgent)+len(h.retry)+h.inFlight == 0",
		"return h.draining", "TestHubDrain"},
	{"2 a batch that comes again is dropped", "hub.go", "case b.seq > 0 && b.seq <= s.now.seq:", "case false:",
		"TestHubSequence"},
	{"2 a gap is refused", "hub.go", "case b.seq > s.now.seq+1:", "case false:", "TestHubSequence"},
	{"2 a chunk is stored once", "writer.go", "and epoch = $2 on conflict do nothing`\n\tinsertReport",
		"and epoch = $2`\n\tinsertReport",
		"TestStoreCommitTwice"},
	{"2 a row does not go back", "writer.go", " and event_count <= $3 and error_count <= $4 and last_seq <= $10", "",
		"TestStoreLateCopy"},
	{"3 a claim raises the epoch", "store.go", "set epoch = epoch + 1,", "set epoch = epoch,", "TestStoreClaim"},
	{"3 the row is written under the newest epoch", "writer.go", "where session_id = $1 and epoch = $2 and event_count",
		"where session_id = $1 and $2 = $2::bigint and event_count",
		"TestStoreCommitFenced"},
	{"3 another server's events are not overwritten", "claims.go",
		"case cmd.claim.epoch != s.epoch+1 && !cmd.claim.sameStored(s.durable):", "case false:",
		"TestModel"},
	{"3 a flush under an old epoch of ours is tried again", "queue.go", "f.outcome == epochLost && h.claiming[s.id].n > 0",
		"false", "TestHubEpochLost"},
	{"4 an event's bytes are kept", "writer.go", "text := b.body[ev.start:ev.end]",
		`text := bytes.ReplaceAll(b.body[ev.start:ev.end], []byte(" "), nil)`,
		"TestStoreChunks|TestRecordWatchReplay"},
	{"4 events are in the order of their numbers", "hub.go", "[][]*batch{s.tail, flushed, s.pending}",
		"[][]*batch{s.pending, flushed, s.tail}", "TestHubInMemory"},
	{"5 no gap after a join", "watch.go", "w := &watch{next: m.now.events,", "w := &watch{next: m.now.events + 1,",
		"TestHubJoinAtAnyMoment"},
	{"5 no event twice", "watch.go", "case w.next >= b.end():", "case false:", "TestHubNoEventTwice"},
	{"5 pages have what is not committed", "viewer.go", "for _, b := range memory.batches {",
		"for _, b := range memory.batches[:0] {", "TestDialogues"},
	{"6 an outbox is bounded", "outbox.go", "if len(o.queue) >= outboxMessages || o.bytes >= most {", "if false {",
		"TestHubLag"},
	{"6 readers wait for room", "budget.go", "if !b.unbounded && b.free < n {", "if false {", "TestBudget"},
	{"6 parts of messages take half of the room", "budget.go", "b.growing+n <= b.half:", "true:", "TestBudgetGrow"},
	{"6 what is committed takes a share of memory", "queue.go", "h.tailBytes > maxTailBytes; {", "false; {",
		"TestHubShares"},
	{"6 a message has a greatest size", "conn.go", "case len(buf) > c.maxMessage:", "case false:", "TestTooLarge"},
	{"6 all room is given back", "queue.go", "h.budget.give(f.cost()) // the session", "// the session", "TestHubBudget"},
	{"7 a viewer that lags is told where live goes on", "watch.go", "if h.tell(out, lagged(id, w.end)) {", "if true {",
		"TestHubLag"},
	{"7 a refused session is refused alone", "writer.go", "case isDataError(alone):", "case false:",
		"TestStoreWritePoison"},
	{"7 what failed is not tried with others", "queue.go", "if len(work) > 0 && s.failedBefore()",
		"if false && s.failedBefore()", "TestHubRetryAlone"},
	{"8 without the token nobody lists", "http.go", `{"GET /sessions", viewers,`, `{"GET /sessions", anyone,`,
		"TestAccessClosed"},
	{"9 what is recorded runs no script", "pages.go", `viewerPolicy = "default-src 'none'; script-src 'self';`,
		`viewerPolicy = "default-src 'none'; script-src *;`,
		"TestRESTPages"},
	{"10 what was typed stays on the page", "web/tracker-privacy.js", `return "*".repeat(value.length);`, "return value;",
		"web: what is private never leaves the page"},
	{"a session is continued by its token only", "store.go", `"(resume_hash is null or resume_hash = $5)"`, `"true"`,
		"TestStoreClaim"},
	{"a session that is recorded is not to be had without it", "claims.go", "case !cmd.byToken && (h.claiming",
		"case false && (h.claiming", "TestHubReserve"},
	{"the token is told to nobody", "session.go", `case name == "resume":`, "case false:", "TestSessionResumedByToken"},
	{"who presents it takes over", "claims.go",
		"\t\told.closeAfterSending(closeTaken, \"the session continues on another connection\")\n", "", "TestDialogues"},
	{"lists have the documented fields only", "outbox.go", "s.about.brief, s.now.events",
		"s.about.metadata, s.now.events", "TestSessionStart"},
	{"a session waits in its grace period", "hub.go", "if now.Sub(s.detachedAt) >= h.cfg.grace {", "if true {",
		"TestDialogues"},
	{"a deleted session's tracker is told so", "writer.go", "case !there:", "case false:", "TestStoreCommitFenced"},
	{"text must be valid UTF-8", "event.go", "if !utf8.Valid(msg) {", "if false && !utf8.Valid(msg) {", "TestParseFrame"},
	{"of two keys the last counts", "event.go", "f.data, f.seq, f.events, f.objects = nil, nil, nil, false\n", "",
		"TestParseFrame"},
	{"many errors in a row close", "conn.go", "c.errors >= maxErrors", "false", "TestErrorsInARow"},
	{"5 no gap in what another server records", "follow.go", "case r.live == nil || w.next != r.first:",
		"case r.live == nil:", "TestHubForeignWatch"},
	{"a session that moves to another server does not end", "claims.go", "case why == epochLost:", "case false:",
		"TestHubForeignLists"},
	{"what is watched elsewhere is stored at once", "hub.go", ">= followEvery {", ">= time.Hour {", "TestHubMarked"},
	{"6 what is known of other servers is bounded", "follow.go", " || h.foreignBytes >= pageBytes {", " {",
		"TestHubForeignBounds"},
	{"servers that are gone end their sessions", "store.go", "where is_active and server <> all($1)",
		"where is_active and false and server <> all($1)", "TestStoreBeat"},
}

func TestBreakages(t *testing.T) {
	const copyTree = `mkdir "$0" && git ls-files -z | tar --null -T - -cf - | tar -C "$0" -xf -
		cp -r web/dist "$0/web/" && ln -s "$PWD/web/node_modules" "$0/web/"`
	dir := filepath.Join(t.TempDir(), "tree")
	if out, err := exec.Command("sh", "-c", copyTree, dir).CombinedOutput(); err != nil {
		t.Fatalf("copy the tree: %v\n%s", err, out)
	}
	for _, tests := range []string{allTests(), "web: what is private never leaves the page"} {
		whole := breakage{file: "go.mod", old: "module ", new: "module ", tests: tests}
		if verdict := whole.try(dir); verdict != "NOT CAUGHT" {
			t.Fatalf("with nothing broken: %s", verdict)
		}
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, b := range breakages {
		t.Run(b.promise, func(t *testing.T) {
			verdict := b.try(dir)
			if fmt.Fprintf(table, "%s\t%s\t%s\n", b.promise, b.tests, verdict); verdict != "caught" {
				t.Error(verdict)
			}
		})
	}
	table.Flush()
}

// allTests are those of Go that some breakage names.
func allTests() string {
	var names []string
	for _, b := range breakages {
		if !strings.HasPrefix(b.tests, "web: ") {
			names = append(names, b.tests)
		}
	}
	return strings.Join(names, "|")
}

// try breaks the promise, runs its tests and mends it.
func (b *breakage) try(dir string) (verdict string) {
	file := filepath.Join(dir, b.file)
	whole, err := os.ReadFile(file)
	if n := strings.Count(string(whole), b.old); err != nil || n != 1 {
		return fmt.Sprintf("the text is there %d times, want once (%v)", n, err)
	}
	defer os.WriteFile(file, whole, 0o644)
	if err := os.WriteFile(file, []byte(strings.Replace(string(whole), b.old, b.new, 1)), 0o644); err != nil {
		return err.Error()
	}
	failure := "--- FAIL"
	cmd := exec.Command("go", "test", "-vet=off", "-failfast", "-run", "^("+b.tests+")$", ".")
	if name, ok := strings.CutPrefix(b.tests, "web: "); ok {
		failure = "\nnot ok"
		cmd = exec.Command("node", "--test", "--test-reporter=tap", "--test-name-pattern="+name, "web/test/tracker.test.mjs")
	}
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TEST_PATIENCE=10s")
	out, err := cmd.CombinedOutput()
	switch text := string(out); {
	case err == nil:
		return "NOT CAUGHT"
	case !strings.Contains(text, failure) && !strings.Contains(text, "panic:"):
		return "does not run: " + text[:min(len(text), 500)]
	}
	return "caught"
}
