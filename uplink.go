package main

import (
	"context"
	"errors"
	"net"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	// silence is how long PostgreSQL may say nothing to a question that waits for
	// no lock, no disk and no standby.
	silence = 2 * time.Second
	// avoidance is how long a server that was silent is not asked again: each new
	// connection would wait for it before it tried the next.
	avoidance = 3 * time.Second
)

// uplink is what connections are made by until their server is given up. Cutting
// it ends them all, also what they still wait for, and the attempts to make more.
type uplink struct {
	// Each connection, and each attempt at one, waits for its end.
	open   context.Context // until the cut
	cut    context.CancelFunc
	silent string // address of the server for which the last uplink was given up
	since  time.Time
}

// newUplink makes one that avoids an address, or with "" none.
func newUplink(silent string) *uplink {
	open, cut := context.WithCancel(context.Background())
	return &uplink{open, cut, silent, time.Now()}
}

// dialer makes connections that end with the uplink. Otherwise pgx would ask a server
// that hangs to cancel the query, wait for it for up to 15 s, and keep the place in
// the pool for as long.
func (u *uplink) dialer(dial pgconn.DialFunc) pgconn.DialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if address == u.silent && time.Since(u.since) < avoidance {
			return nil, errors.New("it did not answer")
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(u.open, cancel)()
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &upConn{conn, context.AfterFunc(u.open, func() { conn.Close() })}, nil
	}
}

// upConn is a connection that an uplink ends.
type upConn struct {
	net.Conn
	forget func() bool // that it is to be ended
}

// Close also takes the connection off the uplink's list.
func (c *upConn) Close() error {
	c.forget()
	return c.Conn.Close()
}

// otherHosts reports whether c names more than one host and port.
func otherHosts(c *pgx.ConnConfig) bool {
	return slices.ContainsFunc(c.Fallbacks, func(f *pgconn.FallbackConfig) bool {
		return f.Host != c.Host || f.Port != c.Port
	})
}

// pulse gives a database up that hangs, with all that waits for it: what was under
// way is tried again, by the first host that DATABASE_URL lets it use.
func (st *store) pulse(ctx context.Context) {
	c, err := st.pulses.Acquire(ctx)
	if err != nil {
		return // there is nothing to give up
	}
	defer c.Release()
	ctx, cancel := context.WithTimeout(ctx, silence)
	defer cancel()
	if c.Ping(ctx); ctx.Err() == context.DeadlineExceeded {
		st.log.Warn("the database does not answer: its connections are given up", "after", silence)
		st.uplink.Swap(newUplink(c.Conn().PgConn().Conn().RemoteAddr().String())).cut()
		st.reset()
	}
}

// reset has connections made anew, those in use when they are given back.
func (st *store) reset() {
	st.pool.Reset()
	st.pulses.Reset()
}

// beforeConnect has a connection made by the uplink, and looks at its errors.
func (st *store) beforeConnect(_ context.Context, c *pgx.ConnConfig) error {
	c.DialFunc = st.uplink.Load().dialer(c.DialFunc)
	if st.pooled.Load() {
		c.DefaultQueryExecMode = pgx.QueryExecModeExec
	}
	onError, prepares := c.OnPgError, preparesStatements(c)
	c.OnPgError = func(conn *pgconn.PgConn, err *pgconn.PgError) bool {
		switch {
		case err.Code == "25006": // a server that takes no writes: new connections may lead to another
			st.reset()
		case prepares && (err.Code == "42P05" || err.Code == "26000"): // prepared by another client
			if !st.pooled.Swap(true) {
				st.log.Error("a pooler lends connections for a transaction at a time: "+
					"add default_query_exec_mode=exec to DATABASE_URL; until the next start it is as if it were there",
					"err", err)
			}
			st.reset()
		}
		return onError(conn, err)
	}
	return nil
}

// preparesStatements reports whether statements are sent in a way that a pooler in
// transaction mode breaks.
func preparesStatements(c *pgx.ConnConfig) bool {
	return c.DefaultQueryExecMode < pgx.QueryExecModeExec
}

// afterConnect bounds waiting for locks, also for what is parsed before a
// transaction. Behind a pooler the setting would be some other client's.
func (st *store) afterConnect(ctx context.Context, conn *pgx.Conn) (err error) {
	if preparesStatements(conn.Config()) {
		_, err = conn.Exec(ctx, "set lock_timeout = '"+lockTimeout+"'")
	}
	return err
}
