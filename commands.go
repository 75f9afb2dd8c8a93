package main

import "time"

// Commands to the hub. A reply goes on a channel with room for it, which the
// asker makes and nobody closes.
type (
	// Each connection, a post too, enters once before anything else, and leaves once at last.
	enter struct { // a connection is there
		out    *outbox
		viewer bool
	}
	leave struct{ out *outbox } // and ends

	// reserve precedes a claim in the database. Without a token, a session that a
	// live connection records, or has reserved, is not to be had. Each reserve that
	// is granted is followed by attach or unreserve.
	// With share, out joins the trackers of a session that was begun with share, without a claim.
	reserve struct {
		out            *outbox
		id             string
		byToken, share bool
		cost           int64 // of its description
		reply          chan reservation
	}
	unreserve struct { // its claim has failed
		id   string
		cost int64 // as it was reserved
	}
	// attach makes out the tracker of a session that is claimed in the database.
	attach struct {
		unreserve
		out     *outbox
		claim   claim
		about   *description
		started message // what viewers are told

		// As in session.
		firstSeq int64
		share    bool
		reply    chan attached
	}
	publish struct {
		out *outbox
		id  string // of its session
		b   *batch
		m   message // for the session's viewers, if b has no events; nil when they need not know
	}
	// awaitCommit asks for the commit of all that a session has, now. The reply is
	// the seq that is committed then, 0 when the session is gone.
	awaitCommit struct {
		id    string
		reply chan int64
	}
	hurry      struct{ id string } // what the session has is committed now, nobody waits for it
	visibility struct {            // the tracker's page goes into the background, or comes back
		out    *outbox
		m      message // for the session's viewers
		hidden bool
	}
	finish struct{ out *outbox } // the tracker ends its session

	// join makes out watch a session that is in memory, or one that was read from
	// the database, which stored then has. The reply says whether it could.
	join struct {
		out    *outbox
		id     string
		stored *summary
		reply  chan bool
	}
	unjoin struct {
		out *outbox
		id  string
	}

	nextWork  struct{ reply chan []*flush } // a writer is free
	flushDone struct{ flushes []*flush }

	memoryQuery struct { // what memory has of a session's events, from one up to another
		id       string
		from, to int64
		reply    chan inMemory
	}
	liveQuery  struct{ reply chan []summary }
	stateQuery struct { // the states of sessions in memory: of these or, with nil, of all
		ids   []string
		reply chan map[string]string
	}
	statsQuery struct{ reply chan hubStats }
	evict      struct { // the session was deleted
		id    string
		reply chan struct{}
	}
	drain struct{} // no more events will come: end and store everything

	// The follower's, see follow.go.
	followQuery struct{ reply chan following }
	rowsRead    struct { // what the rows of these sessions say; some may have none
		watched []watched
		rows    map[string]foreignRow
	}
	listRead struct { // live sessions of other servers, maxActive at most, as of asked
		asked time.Time
		rows  []foreignRow
		reply chan []string // those whose rows are to be read
	}
	appeared struct { // the rows of those
		asked    time.Time
		sessions []storedSession
	}
	marked struct{ ids []string } // sessions of this server that somebody watches on another
)

// command is one of these types; handle and handleMore are all that take them.
type command any

// reservation answers reserve. Only after granted does the asker owe attach or unreserve.
type reservation int

const (
	granted reservation = iota
	taken               // a live connection has the session, or has reserved it
	noRoom              // sessions fill their share of the budget
	joins               // out records the session beside its tracker
	alone               // its tracker does not share it
)

// attached answers attach. With outdated, a newer claim came first.
type attached struct {
	outdated bool
	accepted int64 // seq of the last batch that was taken
	stored   int64 // seq of the last batch that is committed
}

// waiting is an awaitCommit that is not answered yet.
type waiting struct {
	// Events, errors and seq; the other counters are not looked at.
	upTo  counters // to be committed
	reply chan int64
}

// inMemory answers memoryQuery: the batches with the events asked for, in order; events before the
// first of them are in the database, if anywhere. Without ok memory has nothing to add to it.
type inMemory struct {
	ok      bool
	session summary
	batches []*batch
}

// hubStats counts what is in memory. trackers are connections that may record: a post with a token
// is one until postPause after its end. events are all of these sessions, committed or not.
type hubStats struct {
	sessions, live    int
	events            int64
	trackers, viewers int
	tailBytes         int64
	oldest            time.Duration // how long the oldest batch that is not committed has been here
}
