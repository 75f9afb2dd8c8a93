//go:build bench

package main

// The limit that the benchmark compares the server with.

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ---- the limit ----

// bare is what the server is compared with: a program that does nothing but
// commit chunks that are ready, in a process of its own. To be fair it also
// receives, from the same trackers and as fast, the bytes that the chunks are
// made of, without looking at them: it pays for the sockets and shares the two
// cores with the trackers as the server does. It has the server's table, number
// of connections and size of transactions, and acks what is committed.
func init() {
	if database := os.Getenv("BENCH_BARE"); database != "" {
		if err := bare(database); err != nil {
			fmt.Fprintln(os.Stderr, "bare:", err)
		}
		os.Exit(1)
	}
}

type bareChunk struct {
	chunk
	session string
	conn    net.Conn
	seq     int64 // acked with it
}

func bare(database string) error {
	go func() { // ends with the process, and ends it with who started it
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	cfg, err := pgxpool.ParseConfig(database)
	if err != nil {
		return err
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		return err
	}
	chunks := readyChunks()
	work := make(chan bareChunk, 1024)
	for range writers {
		go bareWriter(pool, work) // ends with the process, as all here
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	for n := 0; ; n++ {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go bareReader(conn, fmt.Sprintf("bare-%d", n), pool, chunks, work)
	}
}

// readyChunks are the recordings in chunks as the server makes them.
func readyChunks() (chunks []chunk) {
	for _, r := range loadRecordings(nil) {
		var f flush
		for _, e := range r {
			f.batches = append(f.batches, &batch{body: []byte(e.text), events: []event{{0, uint32(len(e.text)), e.kind, 0}}})
		}
		f.encode()
		chunks = append(chunks, f.chunks...)
	}
	return chunks
}

func bareReader(conn net.Conn, id string, pool *pgxpool.Pool, chunks []chunk, work chan<- bareChunk) {
	r := bufio.NewReaderSize(conn, 64<<10)
	if _, err := http.ReadRequest(r); err != nil {
		return
	}
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n\r\n")
	received, first := 0, int64(0)
	for seq := int64(0); ; seq++ {
		_, n, err := readWireHeader(r)
		if err != nil {
			return
		}
		if seq == 0 {
			pool.Exec(context.Background(), "insert into sessions (session_id, user_id, url, metadata, is_active) values ($1, '', '', '{}', true)", id)
			conn.Write(append(wireHeader(nil, 0, 24), `{"type":"session_ready"}`...))
		}
		r.Discard(n)
		received += n
		for c := chunks[first%int64(len(chunks))]; seq > 0 && received >= c.raw; c = chunks[first%int64(len(chunks))] {
			received -= c.raw
			c.first = first
			work <- bareChunk{c, id, conn, seq}
			first++
		}
	}
}

func bareWriter(pool *pgxpool.Pool, work <-chan bareChunk) {
	for {
		group, bytes := []bareChunk{<-work}, 0
		for more := true; more && bytes < maxFlushBytes; {
			select {
			case c := <-work:
				group = append(group, c)
				bytes += c.raw
			default:
				more = false
			}
		}
		batch := &pgx.Batch{}
		for _, c := range group {
			batch.Queue(`insert into session_events (session_id, first_index, event_count, start_time, end_time, snapshot_index, raw_bytes, events)
				values ($1, $2, $3, $4, $5, $6, $7, $8)`, c.session, c.first, c.count, c.startTime, c.endTime, c.snapshot, c.raw, c.events)
		}
		if err := pool.SendBatch(context.Background(), batch).Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bare:", err)
			os.Exit(1)
		}
		for _, c := range group {
			ack := fmt.Sprintf(`{"type":"events_ack","data":{"seq":%d}}`, c.seq)
			c.conn.Write(append(wireHeader(nil, 0, len(ack)), ack...))
		}
	}
}

// startBare starts the bare program; it ends with the part.
func (b *bench) startBare(t *testing.T) (address string, pid int) {
	database := databaseIn(t, b.cluster.url)
	execSQL(t, database, schema)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BENCH_BARE="+database)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("bare program: %v", err)
	}
	return strings.TrimSpace(line), cmd.Process.Pid
}
