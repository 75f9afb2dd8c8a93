package main

import (
	"encoding/json"
	"slices"
	"testing"
)

// A viewer on another server sees a session as on the one that records it: in
// lists, live, over a move to its own server and back, to its end and deletion.
func TestFollow(t *testing.T) {
	t.Parallel()
	a := startInside(t, "BATCH_INTERVAL=5000")
	b := startInside(t, "BATCH_INTERVAL=5000", "DATABASE_URL="+a.database)
	lists := rawWebSocket(t, b, "viewer")
	lists.expect("active_sessions")
	tr := newTracker(t, sessionName(t, 0)).start(a.ws("tracker"))
	if m := lists.expect("session_started"); m.Data.SessionID != tr.session || m.str("userId") != "ann" {
		t.Errorf("got %s, want the start of %s", m, tr.session)
	}
	late := rawWebSocket(t, b, "viewer")
	if m := late.expect("active_sessions"); !slices.Equal(idsOf(m), []string{tr.session}) {
		t.Errorf("who connects gets %s, want %s", m, tr.session)
	}
	v := watchSession(t, b.ws("viewer"), tr.session)
	watches := rawWebSocket(t, b, "viewer")
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
	waitUntil(t, "its viewer hears of the end", func() bool { return slices.Contains(v.look().notices, "session_ended") })
	checkStored(t, a, tr)
	deletedElsewhere(t, a, b)
}

// deletedElsewhere deletes a session of server a on a third, which has no part in it.
func deletedElsewhere(t *testing.T, a, b *testServer) {
	t.Helper()
	tr := newTracker(t, sessionName(t, 1)).start(a.ws("tracker"))
	v := watchSession(t, b.ws("viewer"), tr.session)
	v.waitFor(1)
	execSQL(t, a.database, "delete from sessions where session_id = $1", tr.session)
	waitUntil(t, "its viewer hears of it", func() bool { return slices.Contains(v.look().notices, "session_ended") })
	waitUntil(t, "its tracker hears of it", func() bool { return tr.why() == "session_deleted" })
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

