package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// check tries what the start would do, and prints a line for each thing: ✓ or ✗ with the reason.
// Nothing stays behind, and no secret is printed. The error says how many have failed.
func check(ctx context.Context, cfg config, stdout io.Writer) error {
	describe(stdout, cfg)
	failed := 0
	report := func(what, found string, err error) {
		mark := "✓"
		if err != nil {
			mark, found = "✗", strings.Join(strings.Fields(err.Error()), " ") // on one line
			failed++
		}
		fmt.Fprintf(stdout, "%s %-10s  %s\n", mark, what, found)
	}
	report("listens", cfg.url(cfg.host, cfg.port), tryListen(cfg))
	report("LOG_DIR", cfg.log.dir, tryDirectory(cfg.log.dir))
	checkDatabase(ctx, cfg, report)
	if failed > 0 {
		return fmt.Errorf("check: %d of these would not work", failed)
	}
	return nil
}

// describe says who may do what, without the secrets.
func describe(w io.Writer, cfg config) {
	a, viewing, recording := newAccess(cfg.accessConfig, cfg.host, cfg.port, nil), "who has ACCESS_TOKEN", "anyone"
	switch {
	case a.open:
		viewing = "anyone on this machine (no ACCESS_TOKEN)"
	case a.generated:
		viewing = "who has the token that the start makes and prints " +
			"(no ACCESS_TOKEN; several servers need the same one)"
	}
	if a.key != "" {
		recording = "who has INGEST_KEY"
	}
	fmt.Fprintf(w, "  may view    %s; own pages and those of %v; PUBLIC_HOSTS %v\n",
		viewing, a.viewerOrigins, a.publicHosts)
	fmt.Fprintf(w, "  may record  %s; pages of %v\n", recording, a.trackerOrigins)
	fmt.Fprintf(w, "  keeps       sessions for %s after their end\n", inWords(int64(cfg.retention), times))
}

// tryListen fails unless HOST is an address of this machine and PORT is free.
func tryListen(cfg config) error {
	listener, err := listen(cfg)
	if err != nil {
		return err
	}
	return listener.Close()
}

// tryDirectory leaves no directory that was not there: it would belong to whoever
// runs the check, and the server could not write to it.
func tryDirectory(dir string) error {
	var missing []string
	for d := dir; !exists(d); d = filepath.Dir(d) {
		missing = append(missing, d)
	}
	defer func() {
		for _, d := range missing {
			os.Remove(d)
		}
	}()
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	file, err := os.CreateTemp(dir, "check-")
	if err != nil {
		return err
	}
	return errors.Join(file.Close(), os.Remove(file.Name()))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, os.ErrNotExist)
}

// checkDatabase tries what the server needs of PostgreSQL.
func checkDatabase(ctx context.Context, cfg config, report func(what, found string, err error)) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	// Not through the store: it works around a missing setting for a pooler, and so would hide it.
	c := cfg.database.ConnConfig
	conn, err := pgx.ConnectConfig(ctx, c)
	at := fmt.Sprintf("%s, port %d", c.Host, c.Port)
	if err == nil && len(c.Fallbacks) > 0 {
		at = conn.PgConn().Conn().RemoteAddr().String() // of whichever has answered
	}
	report("database", fmt.Sprintf("%s at %s, as %s", c.Database, at, c.User), err)
	if err != nil {
		return
	}
	defer conn.Close(ctx)
	var version int
	var now time.Time
	// Exec mode prepares no statement: a pooler in between could break that.
	const ask = "select current_setting('server_version_num')::int / 10000, clock_timestamp()"
	err = conn.QueryRow(ctx, ask, pgx.QueryExecModeExec).Scan(&version, &now)
	if err == nil && version < 12 {
		err = fmt.Errorf("%d is older than 12, the oldest that is known", version)
	}
	report("PostgreSQL", fmt.Sprintf("%d (12 to 18 are known)", version), err)
	if err != nil {
		return
	}
	ahead := time.Until(now).Round(time.Millisecond)
	if ahead.Abs() > maxClockSkew {
		err = errors.New("the clocks of the database and of this machine differ: nothing is deleted for its age")
	}
	report("clocks", fmt.Sprintf("here %s; the database's is %v ahead", time.Now().Format(time.RFC3339), ahead), err)
	report("writes", "tables can be made and filled", trySchema(ctx, conn))
	report("pooler", "none that needs a setting", tryPooler(ctx, conn))
}

// tryPooler asks over two connections in turn. Where one process of PostgreSQL
// answers both, a pooler lends it for a transaction at a time.
func tryPooler(ctx context.Context, first *pgx.Conn) error {
	second, err := pgx.ConnectConfig(ctx, first.Config())
	if err != nil {
		return err
	}
	defer second.Close(ctx)
	answered := map[int]*pgx.Conn{}
	for i := range 20 { // other clients of the pooler may have a process meanwhile
		conn, process := []*pgx.Conn{first, second}[i%2], 0
		if err := conn.QueryRow(ctx, "select pg_backend_pid()", pgx.QueryExecModeExec).Scan(&process); err != nil {
			return err
		}
		if other := answered[process]; other != nil && other != conn && preparesStatements(first.Config()) {
			return errors.New("in transaction mode: add default_query_exec_mode=exec to DATABASE_URL")
		}
		answered[process] = conn
	}
	return nil
}

// trySchema does what the first start and the first session do, and takes it
// back.
func trySchema(ctx context.Context, conn *pgx.Conn) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx)
	if _, err = tx.Exec(ctx, schema); err == nil {
		_, err = tx.Exec(ctx, "insert into sessions (session_id, user_id, url, metadata, is_active) "+
			"values ('check ' || pg_backend_pid(), '', '', '{}', false)")
	}
	return err
}
