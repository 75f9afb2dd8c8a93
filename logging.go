package main

import (
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The kinds of log files. A file is KIND-DAY.log, with the local date; when it
// is full the day goes on in KIND-DAY.1.log, then .2; zipped it ends in .gz.
const (
	applicationLog = "application" // everything from the log level up
	errorLog       = "error"       // errors only
	exceptionsLog  = "exceptions"  // panics; a fatal one is the runtime's text, not JSON
	rejectionsLog  = "rejections"  // failures of background work that nobody waits for
)

var logFileName = regexp.MustCompile(
	`^(application|error|exceptions|rejections)-(\d{4}-\d\d-\d\d)(?:\.([1-9]\d{0,8}))?\.log(\.gz)?$`)

// Failures that follow each other within logOutage get one warning together.
const logOutage = 10 * time.Minute

// logConfig says what is logged and kept. Zero for a limit means none.
type logConfig struct {
	level    slog.Level
	dir      string        // made when missing; one process writes there
	maxSize  int64         // bytes a file
	maxAge   time.Duration // whole days back from today
	maxCount int           // files of a kind
	zipped   bool          // gzip what is complete
}

// logs writes records to stdout and to daily files, from any goroutine. Trouble
// with the files costs lines in them and never reaches who logs: it is counted,
// and an outage is told once on stderr.
type logs struct {
	logConfig
	app      *slog.Logger // stdout, application and error files
	rejected *slog.Logger // these and rejections
	panicked *slog.Logger // these and exceptions; see exception

	stop context.CancelFunc // ends tend
	done chan struct{}      // closed by tend

	mu       sync.Mutex // guards the rest, and each logFile
	files    []*logFile // one a kind
	stderr   io.Writer
	failures int64
	failedAt time.Time // the last of them
	closed   bool
}

// openLogs starts logging. Where files cannot be written it logs to stdout
// alone until they can. The journal has its own times: stdout then has none.
func openLogs(c logConfig, stdout, stderr io.Writer, journal bool) *logs {
	l := &logs{logConfig: c, stderr: stderr, done: make(chan struct{})}
	text := slog.NewTextHandler(stdout, &slog.HandlerOptions{Level: c.level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if journal && a.Key == slog.TimeKey && len(groups) == 0 {
			return slog.Attr{}
		}
		return a
	}})
	app, errs := l.handler(applicationLog, c.level), l.handler(errorLog, slog.LevelError)
	l.app = slog.New(slog.NewMultiHandler(text, app, errs))
	l.rejected = slog.New(slog.NewMultiHandler(text, app, errs, l.handler(rejectionsLog, slog.LevelDebug)))
	l.panicked = slog.New(slog.NewMultiHandler(text, app, errs, l.handler(exceptionsLog, slog.LevelDebug)))
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	go l.tend(ctx, l.turn()) // ended by Close
	return l
}

func (l *logs) handler(kind string, level slog.Level) slog.Handler {
	f := &logFile{logs: l, kind: kind}
	l.files = append(l.files, f)
	return slog.NewJSONHandler(f, &slog.HandlerOptions{Level: level})
}

// catch is deferred by what serves one client: a panic is written down, and ends
// only that. One of the hub or a writer ends the server.
func (l *logs) catch(where string) {
	if v := recover(); v != nil {
		l.exception(where, v, debug.Stack())
	}
}

// exception logs a recovered panic: recover's value and debug.Stack.
func (l *logs) exception(where string, v any, stack []byte) {
	l.panicked.Error("panic", "where", where, "panic", fmt.Sprint(v), "stack", string(stack))
}

// writeErrors returns how often a line was not written to its file, or a file
// not opened, zipped or deleted.
func (l *logs) writeErrors() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failures
}

// Close closes the files; what is logged later goes to stdout alone.
func (l *logs) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.stop()
	<-l.done

	err := debug.SetCrashOutput(nil, debug.CrashOptions{})
	for _, f := range l.files {
		err = errors.Join(err, f.close())
	}
	names, _ := l.list()
	for _, n := range names {
		if n.size == 0 { // exceptions, when there were none
			err = errors.Join(err, os.Remove(filepath.Join(l.dir, n.name)))
		}
	}
	return err
}

// fail counts err and warns if it begins an outage. The caller holds mu.
func (l *logs) fail(err error) {
	l.failures++
	if time.Since(l.failedAt) > logOutage {
		fmt.Fprintf(l.stderr, "session-replay: log files are incomplete, all else goes on: %v\n", err)
	}
	l.failedAt = time.Now()
}

// A logFile is the newest file of a kind. Its first line opens it; that of
// exceptions is always open, for the runtime to write a fatal panic to.
type logFile struct {
	logs *logs
	kind string
	file *os.File // nil when not open
	day  string
	size int64
	err  error // why it is not tried now; turn forgets it
}

// Write appends a whole line in one write(2).
func (f *logFile) Write(line []byte) (n int, err error) {
	f.logs.mu.Lock()
	defer f.logs.mu.Unlock()
	if f.logs.closed {
		return 0, os.ErrClosed
	}
	if err = f.ready(len(line)); err == nil {
		n, err = f.file.Write(line)
		f.size += int64(n)
	}
	if err != nil {
		f.fail(err)
	}
	return n, err
}

// ready makes sure that the file the next n bytes belong to is open.
func (f *logFile) ready(n int) error {
	if f.err != nil {
		return f.err
	}
	day := time.Now().Format(time.DateOnly)
	if f.file != nil && f.day == day && !f.logs.full(f.size, n) {
		return nil
	}
	f.close()
	return f.open(day, n)
}

func (f *logFile) open(day string, n int) error {
	if err := os.MkdirAll(f.logs.dir, 0o750); err != nil {
		return err
	}
	name, err := f.logs.newest(f.kind, day, n)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join(f.logs.dir, name), os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	f.file, f.day = file, day
	f.size, err = endLine(file)
	if err == nil && f.kind == exceptionsLog {
		err = debug.SetCrashOutput(file, debug.CrashOptions{}) // duplicates the descriptor
	}
	return err
}

// endLine ends a last line that a crash or a full disk has cut, so that the
// next one stands alone. It returns the file's size.
func endLine(file *os.File) (int64, error) {
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return 0, err
	}
	last := make([]byte, 1)
	if _, err = file.ReadAt(last, info.Size()-1); err == nil && last[0] != '\n' {
		_, err = file.WriteString("\n")
	}
	return info.Size(), err
}

// fail gives the file a rest, so that a broken disk costs an attempt a minute,
// not one a line.
func (f *logFile) fail(err error) {
	f.close()
	f.err = err
	f.logs.fail(err)
}

func (f *logFile) close() error {
	if f.file == nil {
		return nil
	}
	err := f.file.Close()
	f.file = nil
	return err
}

// tend keeps the files in order, now and at every full minute, midnight among
// them, until ctx ends.
func (l *logs) tend(ctx context.Context, day string) {
	defer close(l.done)
	for {
		if err := l.tidy(ctx, day); err != nil && ctx.Err() == nil {
			l.mu.Lock()
			l.fail(err)
			l.mu.Unlock()
		}
		select {
		case <-time.After(time.Until(time.Now().Truncate(time.Minute).Add(time.Minute))):
			day = l.turn()
		case <-ctx.Done():
			return
		}
	}
}

// turn gives files that failed another chance; closes those of another day,
// and those that somebody moved, removed or emptied; opens the one for fatal
// panics; and returns the day.
func (l *logs) turn() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	day := time.Now().Format(time.DateOnly)
	for _, f := range l.files {
		f.err = nil
		if f.file != nil {
			if info, err := os.Stat(f.file.Name()); err != nil || info.Size() < f.size || f.day != day {
				f.close()
			}
		}
		if f.kind == exceptionsLog && !l.closed {
			if err := f.ready(0); err != nil {
				f.fail(err)
			}
		}
	}
	return day
}

// tidy deletes what is too old, too much or empty, and zips what is complete.
// It leaves a kind's newest file of today alone: that one is written.
func (l *logs) tidy(ctx context.Context, today string) error {
	names, err := l.list()
	oldest := time.Now().Add(-l.maxAge).Format(time.DateOnly)
	kept := map[string]int{} // by kind
	for i, n := range names {
		newest := i == 0 || names[i-1].kind != n.kind || names[i-1].day != n.day
		path := filepath.Join(l.dir, n.name)
		switch {
		case newest && n.day >= today:
			kept[n.kind]++
		case n.size == 0, l.maxAge > 0 && n.day < oldest, l.maxCount > 0 && kept[n.kind] >= l.maxCount:
			err = errors.Join(err, os.Remove(path))
		default:
			kept[n.kind]++
			if l.zipped && !n.zipped {
				err = errors.Join(err, zipFile(ctx, path))
			}
		}
	}
	return err
}

// zipFile replaces a file by its gzip. Interrupted, it leaves the file, and the
// next attempt begins anew.
func zipFile(ctx context.Context, path string) error {
	src, err := os.Open(path)
	if err != nil {
		return err
	}
	defer src.Close()
	defer context.AfterFunc(ctx, func() { src.Close() })() // ends the copy
	dst, err := os.OpenFile(path+".gz", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	w := gzip.NewWriter(dst)
	_, err = io.Copy(w, src)
	if err := errors.Join(err, w.Close(), dst.Sync(), dst.Close()); err != nil {
		return errors.Join(err, os.Remove(path+".gz"))
	}
	return os.Remove(path)
}

// A logName is a log file's name, taken apart, and its size.
type logName struct {
	name, kind, day string
	number          int
	zipped          bool
	size            int64
}

// list returns the log files by kind, the newest first. Other names, and what
// is no regular file, are none of ours.
func (l *logs) list() ([]logName, error) {
	entries, err := os.ReadDir(l.dir)
	var names []logName
	for _, e := range entries {
		m := logFileName.FindStringSubmatch(e.Name())
		if m == nil || !e.Type().IsRegular() {
			continue
		}
		if info, err := e.Info(); err == nil { // otherwise just removed
			number, _ := strconv.Atoi(m[3])
			names = append(names, logName{m[0], m[1], m[2], number, m[4] != "", info.Size()})
		}
	}
	slices.SortFunc(names, func(a, b logName) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(b.day, a.day), cmp.Compare(b.number, a.number), cmp.Compare(b.name, a.name))
	})
	return names, err
}

// newest returns the name of the day's newest file of a kind, or the name after
// it if n bytes have no place there.
func (l *logs) newest(kind, day string, n int) (string, error) {
	names, err := l.list()
	i := slices.IndexFunc(names, func(o logName) bool { return o.kind == kind && o.day == day })
	if i < 0 {
		return fmt.Sprintf("%s-%s.log", kind, day), err
	}
	if names[i].zipped || l.full(names[i].size, n) {
		return fmt.Sprintf("%s-%s.%d.log", kind, day, names[i].number+1), err
	}
	return names[i].name, err
}

// full reports whether a file has no room for n more bytes. An empty one takes
// a line of any length.
func (l *logs) full(size int64, n int) bool {
	return l.maxSize > 0 && size > 0 && size+int64(n) > l.maxSize
}

// parseLogSize returns LOG_MAX_SIZE in bytes: "20m", "500k", "1g" (of 1024), or
// plain bytes.
func parseLogSize(s string) (int64, error) {
	digits, unit := s, int64(1)
	for i, letter := range []string{"k", "m", "g"} {
		if before, ok := strings.CutSuffix(strings.ToLower(s), letter); ok {
			digits, unit = before, 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n == 0 || n > uint64(math.MaxInt64/unit) {
		return 0, fmt.Errorf("%q is not a size such as 20m, 500k, 1g or 1000000", s)
	}
	return int64(n) * unit, nil
}

// parseLogFiles returns LOG_MAX_FILES: days ("14d"), as an age, or a number of
// files of each kind.
func parseLogFiles(s string) (maxAge time.Duration, maxCount int, err error) {
	digits, days := strings.CutSuffix(strings.ToLower(s), "d")
	n, err := strconv.ParseUint(digits, 10, 16) // so that days fit a Duration
	switch {
	case err != nil || n == 0:
		return 0, 0, fmt.Errorf("%q is neither days such as 14d nor a number of files (up to 65535)", s)
	case days:
		return time.Duration(n) * 24 * time.Hour, 0, nil
	}
	return 0, int(n), nil
}
