package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// A viewer on another server sees a session as on the one that records it: in
// lists, live, over a move to its own server and back, to its end and deletion.
func TestFollow(t *testing.T) {
	t.Parallel()
	a := startInside(t, "BATCH_INTERVAL=1000")
	b := startInside(t, "BATCH_INTERVAL=1000", "DATABASE_URL="+a.database)
	lists := dialServer(t, b.ws("viewer"))
	lists.expect("active_sessions")
	tr := newTracker(t, sessionName(t, 0)).start(a.ws("tracker"))
	if m := lists.expect("session_started"); m.Data.SessionID != tr.session || m.str("userId") != "ann" {
		t.Errorf("got %s, want the start of %s", m, tr.session)
	}
	late := dialServer(t, b.ws("viewer"))
	if m := late.expect("active_sessions"); !slices.Equal(idsOf(m), []string{tr.session}) {
		t.Errorf("who connects gets %s, want %s", m, tr.session)
	}
	v := watchSession(t, b.ws("viewer"), tr.session)
	watches := dialServer(t, b.ws("viewer"))
	watches.send("viewer_join_session", sessionID{tr.session})
	if m := watches.expect("session_joined"); !m.Data.IsActive || m.str("state") != "" {
		t.Errorf("got %s, want a live session", m)
	}
	state := func(want string) {
		t.Helper()
		if m := watches.expect("session_state", "session_ended", "session_started"); m.str("state") != want {
			t.Errorf("got %s, want %s", m, want)
		}
	}
	state("live")
	v.waitFor(tr.madeEvents() + 1)
	for _, s := range []*testServer{b, a} {
		tr.moveTo(s.ws("tracker"))
		goal := tr.madeEvents()
		waitUntil(t, "it records there", func() bool { return tr.ackedEvents() > goal })
		v.waitFor(tr.madeEvents() + 1)
	}
	tr.ends = true
	tr.finish()
	v.waitFor(tr.madeEvents())
	for _, c := range []*testConn{lists, late} {
		if m := c.expect("session_started", "session_ended"); m.Type != "session_ended" {
			t.Errorf("the moves and the end are told as %s", m)
		}
	}
	waitUntil(t, "its viewer hears of the end", func() bool {
		return slices.Contains(v.look().notices, "session_ended")
	})
	checkStored(t, a, tr)
	deletedElsewhere(t, a, b)
}

// deletedElsewhere deletes a session of server a where neither server sees it.
func deletedElsewhere(t *testing.T, a, b *testServer) {
	t.Helper()
	tr := newTracker(t, sessionName(t, 1)).start(a.ws("tracker"))
	waitUntil(t, "it records", func() bool { return tr.read(&tr.made) > 0 })
	v := watchSession(t, b.ws("viewer"), tr.session)
	v.waitFor(1)
	execSQL(t, a.database, "delete from sessions where session_id = $1", tr.session)
	waitUntil(t, "its viewer hears of it", func() bool { return slices.Contains(v.look().notices, "session_ended") })
	waitUntil(t, "its tracker hears of it", func() bool { return tr.why() == "session_deleted" })
}

// What is known of a server that has been gone for long is looked at until it is over.
func TestFollowGone(t *testing.T) {
	t.Parallel()
	s := startInside(t)
	execSQL(t, s.database, "insert into servers (server) values ('gone')")
	execSQL(t, s.database, `insert into sessions (session_id, user_id, url, metadata, is_active, server)
		values ('s', '', '', '{}', true, 'gone')`)
	v := dialServer(t, s.ws("viewer"))
	for m := v.expect("active_sessions", "session_started"); m.Type != "session_started"; {
		m = v.expect("active_sessions", "session_started")
	}
	execSQL(t, s.database, "update servers set seen_at = now() - interval '1 hour' where server = 'gone'")
	waitUntil(t, "nothing is known of it", func() bool {
		others, err := s.server.store.others(t.Context())
		return err == nil && len(others) == 0
	})
	time.Sleep(2 * listEvery * followEvery) // it has been looked for since
	execSQL(t, s.database, "update sessions set is_active = false")
	v.expect("session_ended")
}

// An error leaves what was known of the other servers: their sessions have not left.
func TestFollowError(t *testing.T) {
	st := newStoreTest(t)
	f := &follower{store: st.store, others: map[string]bool{"b": true}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.tryLook(ctx); err == nil || !f.others["b"] {
		t.Errorf("got %v and %v, want an error, and the server that was there", err, f.others)
	}
}

func idsOf(m testMessage) (ids []string) {
	var all []sessionID
	json.Unmarshal([]byte(m.raw("sessions")), &all)
	for _, one := range all {
		ids = append(ids, one.ID)
	}
	slices.Sort(ids)
	return ids
}

// lists gives the hub the live sessions of other servers, as the follower does.
func (t *hubTest) lists(rows ...foreignRow) {
	t.Helper()
	asked := time.Now()
	time.Sleep(time.Millisecond)
	news := askHub(t, func(reply chan []string) command { return listRead{asked, rows, reply} })
	t.appear(asked, news)
}

func (t *hubTest) appear(asked time.Time, news []string) {
	t.Helper()
	var found []storedSession
	about := &description{userID: "u", brief: []byte(`{"url":"` + strings.Repeat("x", 9990) + `"}`)}
	for _, id := range news {
		found = append(found, storedSession{summary: summary{id: id, about: about, isActive: true}})
	}
	t.do(appeared{asked, found})
}

// row is one of a session that another server records.
func row(id string, epoch, events int64) foreignRow {
	return foreignRow{id: id, epoch: epoch, events: events, isActive: true, server: "other", state: "live"}
}

func (t *hubTest) reads(rows ...foreignRow) {
	t.Helper()
	wanted := askHub(t, func(reply chan following) command { return followQuery{reply} })
	found := map[string]foreignRow{}
	for _, r := range rows {
		found[r.id] = r
	}
	t.do(rowsRead{wanted.watched, found})
}

// Viewers hear once that a session of another server begins and ends, and nothing
// of its moves from server to server.
func TestHubForeignLists(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		v := t.viewer()
		t.lists(row("s", 5, 0))
		t.heard(v, "started s")
		t.lists(row("s", 6, 0)) // to a third server
		mine := t.idle()
		t.reserve(mine, "s", true, 1)
		t.lists() // the claim is in the database, and not attached yet
		t.attachAs(mine, "s", claim{epoch: 7}, aboutNobody)
		t.lists(row("s", 6, 0)) // was read before
		if live := askHub(t, func(reply chan []summary) command { return liveQuery{reply} }); len(live) != 1 {
			t.Errorf("it is listed %d times", len(live))
		}
		t.do(leave{mine})
		asked := time.Now()
		time.Sleep(time.Millisecond)
		t.lists(row("s", 8, 0)) // it goes on there in its grace period
		time.Sleep(time.Minute)
		t.heard(v)
		t.appear(asked, askHub(t, func(reply chan []string) command {
			return listRead{asked, nil, reply}
		})) // overtaken
		again := t.idle()
		t.attach(again, "s", claim{epoch: 9})
		t.publish(again, "s", 2, 1)
		t.settle(epochLost, t.later()...) // the tracker is elsewhere: a flush finds that out
		t.lists(row("s", 10, 2))
		t.heard(v)
		t.lists()
		t.heard(v, "ended s")
		if n := len(t.messages(t.viewer())); n != 0 {
			t.Errorf("got %d messages more", n)
		}
	})
}

// What is known of other servers' sessions is bounded, and forgotten when the last
// viewer has left.
func TestHubForeignBounds(t *testing.T) {
	t.Parallel()
	inHub(t, nil, func(t *hubTest) {
		v := t.viewer()
		var rows []foreignRow
		for i := range 1000 {
			rows = append(rows, row(fmt.Sprint("s", i), 1, 0))
		}
		t.lists(rows...)
		t.lists(rows...)
		t.heard(v, "list")
		t.lists()
		if n, most := len(t.messages(v)), pageBytes/10160; n < most*9/10 || n > most+1 {
			t.Errorf("%d sessions were known, want %d in %d bytes", n, most, pageBytes)
		}
		t.lists(rows...)
		t.do(leave{v})
		if live := askHub(t, func(reply chan []summary) command { return liveQuery{reply} }); len(live) != 0 {
			t.Errorf("got %d sessions without a viewer", len(live))
		}
	})
}

// One look holds no more than a page of events; viewers page through the rest.
func TestFollowBytes(t *testing.T) {
	st := newStoreTest(t)
	other := openTestStore(t, st.database)
	other.server = "other"
	var all []watched
	for _, id := range []string{"a", "b", "c"} {
		c, err := other.claim(t.Context(), id, aboutNobody, false, "", false, 0)
		if err != nil {
			t.Fatal(err)
		}
		large := []byte(`{"x":"` + strings.Repeat("x", 900<<10) + `"}`)
		st.stored(st.flush(id, c, large, large))
		all = append(all, watched{id, 0})
	}
	f := follower{hub: newHub(config{}, nil, nil), store: st.store, others: map[string]bool{"other": true}}
	if err := f.readRows(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	size, news := 0, 0
	for _, r := range (<-f.hub.cmds).(rowsRead).rows {
		if r.news != nil {
			size, news = size+r.news.size(), news+1
		}
	}
	if size > pageBytes+1000 || news < 2 {
		t.Errorf("got %d bytes of %d sessions in one look, want %d at most", size, news, pageBytes)
	}
}

// Who watches a session of another server gets its events, pages where there are
// none to send, and hears where it is, of its end, and of its deletion.
func TestHubForeignWatch(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		v, late := t.viewer(), t.viewer()
		stored := &summary{id: "s", about: aboutNobody, isActive: true, now: counters{events: 5, snapshot: -1}}
		t.joinStored(v, "s", stored)
		t.reads(row("s", 5, 5))
		t.heard(v, "joined s 5", "state s live")
		stored.now.events = 7
		t.joinStored(late, "s", stored)
		batch := row("s", 5, 9)
		batch.first = 5
		batch.news = text(`{"type":"events_batch","data":{"sessionId":"s","events":[{},{},{},{}],"fromIndex":5}}`)
		t.reads(batch)
		t.reads(batch)
		t.heard(v, "live s 5+4")
		t.heard(late, "joined s 7", "lagged s 9", "state s live")
		left := row("s", 5, 12)
		left.state = "left"
		t.reads(left)
		t.heard(v, "lagged s 12", "state s left")
		t.lists(row("s", 5, 12))
		t.heard(v, "started s") // nobody had heard of it
		t.lists()
		t.heard(v) // if it has ended, its row has its last events
		c := t.idle()
		t.attach(c, "s", claim{epoch: 6, counters: counters{events: 12}}) // it moves here
		t.publish(c, "s", 1, 1)
		t.heard(v, "state s live", "live s 12+1")
		t.do(leave{c})
		t.reads(row("s", 6, 12)) // our own
		t.reads(row("s", 7, 12)) // another server's, which lacks what was not stored
		t.reads(row("s", 7, 14))
		t.heard(v, "state s left", "state s live", "lagged s 14")
		over := row("s", 7, 16)
		over.isActive = false
		t.reads(over)
		t.reads(over) // nobody takes it for live
		t.lists()
		t.heard(v, "lagged s 16", "ended s")
		t.lists(row("s", 8, 16))
		t.reads() // deleted
		t.lists()
		t.heard(v, "started s", "ended s")
	})
}

// Somebody who lags hears of the end when there is room, and of no end that is none.
func TestHubForeignLag(t *testing.T) {
	inHub(t, nil, func(t *hubTest) {
		v := newOutbox()
		t.do(enter{v, true})
		t.lists(row("s", 5, 0), row("goes on", 5, 0))
		for _, id := range []string{"s", "goes on"} {
			t.joinStored(v, id, &summary{id: id, about: aboutNobody, isActive: true, now: counters{snapshot: -1}})
		}
		for range outboxMessages {
			v.trySend(sessionEnded("x"), 1<<20)
		}
		over := row("s", 5, 3)
		over.isActive = false
		t.reads(over, row("goes on", 5, 0))
		t.messages(v)
		time.Sleep(time.Second)
		t.heard(v, "lagged s 3", "ended s", "list")
		t.reads(row("goes on", 5, 1))
		t.heard(v, "lagged goes on 1", "state goes on live")
	})
}
