package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// check tries what the start would do, and prints a line for each thing: ✓ or ✗
// with the reason. Nothing stays behind, and no secret is printed.
func check(ctx context.Context, cfg config, stdout io.Writer) error {
	fmt.Fprintf(stdout, "  may view    %s\n  may record  %s\n", cfg.whoMayView(), cfg.whoMayRecord())
	fmt.Fprintf(stdout, "  keeps       sessions for %s after their end\n", inWords(int64(cfg.retention), times))
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

func (c config) whoMayView() string {
	a := newAccess(c.accessConfig, c.host, c.port, nil)
	who := "who has ACCESS_TOKEN"
	switch {
	case a.open:
		who = "anyone on this machine (no ACCESS_TOKEN)"
	case a.generated:
		who = "who has the token that the start makes and prints (no ACCESS_TOKEN)"
	}
	return fmt.Sprintf("%s; own pages and those of %v; PUBLIC_HOSTS %v, TRUST_PROXY %t",
		who, c.viewerOrigins, c.publicHosts, c.trustProxy)
}

func (c config) whoMayRecord() string {
	who := "anyone"
	if c.key != "" {
		who = "who has INGEST_KEY"
	}
	return fmt.Sprintf("%s; pages of %v", who, c.trackerOrigins)
}

func tryListen(cfg config) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(cfg.host, cfg.port))
	if err != nil {
		return fmt.Errorf("HOST and PORT: %w", err)
	}
	return listener.Close()
}

func tryDirectory(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		defer os.Remove(dir)
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	file, err := os.CreateTemp(dir, "check-")
	if err != nil {
		return err
	}
	return errors.Join(file.Close(), os.Remove(file.Name()))
}

// checkDatabase connects twice: where both connections have one process of
// PostgreSQL, a pooler lends it for a transaction at a time.
func checkDatabase(ctx context.Context, cfg config, report func(what, found string, err error)) {
	c := cfg.database.ConnConfig
	conn, err := pgx.ConnectConfig(ctx, c)
	report("database", fmt.Sprintf("%s at %s, port %d, as %s", c.Database, c.Host, c.Port, c.User), err)
	if err != nil {
		return
	}
	defer conn.Close(ctx)
	var version, process, other int
	var now time.Time
	const ask = "select current_setting('server_version_num')::int / 10000, pg_backend_pid(), clock_timestamp()"
	err = conn.QueryRow(ctx, ask, pgx.QueryExecModeExec).Scan(&version, &process, &now)
	ahead := time.Until(now).Round(time.Millisecond)
	report("PostgreSQL", fmt.Sprintf("%d (12 to 18 are known)", version), err)
	if math.Abs(ahead.Hours()) >= 1 {
		err = errors.New("the clocks of the database and of this machine differ by more than an hour")
	}
	report("clocks", fmt.Sprintf("here %s; the database's is %v ahead", time.Now().Format(time.RFC3339), ahead), err)
	report("writes", "tables can be made and filled", trySchema(ctx, conn))
	second, err := pgx.ConnectConfig(ctx, c)
	if err == nil {
		defer second.Close(ctx)
		err = second.QueryRow(ctx, "select pg_backend_pid()", pgx.QueryExecModeExec).Scan(&other)
	}
	if prepares := c.DefaultQueryExecMode < pgx.QueryExecModeExec; err == nil && other == process && prepares {
		err = errors.New("in transaction mode: add default_query_exec_mode=exec to DATABASE_URL")
	}
	report("pooler", "none that needs a setting", err)
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
