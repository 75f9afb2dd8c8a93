package main

import (
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// logFileName has groups for kind, day, number and .gz. What does not match is never touched.
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
// with the files never reaches whoever logs: each line tries anew, failures are
// counted, and an outage is told once on stderr.
type logs struct {
	logConfig
	app      *slog.Logger // stdout, application and error files
	rejected *slog.Logger // these and rejections
	panicked *slog.Logger // these and exceptions; see exception

	stop     context.CancelFunc // ends maintain
	failures atomic.Int64       // times that a line was not written, or a file not opened, zipped or deleted

	mu         sync.Mutex // guards the rest, and each logFile
	exceptions *logFile
	stderr     io.Writer
	failedAt   time.Time // the last failure
	closed     bool
}

// openLogs starts logging. Where files cannot be written it logs to stdout
// alone until they can. The journal has its own times: stdout then has none.
func openLogs(c logConfig, stdout, stderr io.Writer, journal bool) *logs {
	l := &logs{logConfig: c, stderr: stderr}
	withoutTime := func(groups []string, a slog.Attr) slog.Attr {
		if journal && a.Key == slog.TimeKey && len(groups) == 0 {
			return slog.Attr{}
		}
		return a
	}
	text := slog.NewTextHandler(stdout, &slog.HandlerOptions{Level: c.level, ReplaceAttr: withoutTime})
	lines := func(f *logFile, level slog.Level) slog.Handler {
		return slog.NewJSONHandler(f, &slog.HandlerOptions{Level: level})
	}
	app := lines(&logFile{logs: l, kind: applicationLog}, c.level)
	errs := lines(&logFile{logs: l, kind: errorLog}, slog.LevelError)
	rejections := lines(&logFile{logs: l, kind: rejectionsLog}, slog.LevelDebug)
	l.exceptions = &logFile{logs: l, kind: exceptionsLog}
	l.app = slog.New(slog.NewMultiHandler(text, app, errs))
	l.rejected = slog.New(slog.NewMultiHandler(text, app, errs, rejections))
	l.panicked = slog.New(slog.NewMultiHandler(text, app, errs, lines(l.exceptions, slog.LevelDebug)))
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	l.awaitCrash()
	go l.maintain(ctx) // ends after Close
	return l
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

// Close ends the files; what is logged later goes to stdout alone.
func (l *logs) Close() error {
	l.stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	return debug.SetCrashOutput(nil, debug.CrashOptions{})
}

// countFailure warns if err begins an outage. The caller holds mu.
func (l *logs) countFailure(err error) {
	if err == nil {
		return
	}
	l.failures.Add(1)
	if time.Since(l.failedAt) > logOutage {
		fmt.Fprintf(l.stderr, "session-replay: log files are incomplete, all else goes on: %v\n", err)
	}
	l.failedAt = time.Now()
}

// logFile is where the lines of a kind go. Each line opens it anew, so that one
// that somebody has moved, removed or emptied is begun again.
type logFile struct {
	logs *logs
	kind string
	// Of the file that was written last; day is empty before the first line.
	day    string
	number int // of the newest file of that day
}

// Write appends a whole line in one write(2).
func (f *logFile) Write(line []byte) (n int, err error) {
	f.logs.mu.Lock()
	defer f.logs.mu.Unlock()
	if f.logs.closed {
		return 0, os.ErrClosed
	}
	file, err := f.open(len(line))
	if err == nil {
		n, err = file.Write(line)
		err = errors.Join(err, file.Close())
	}
	f.logs.countFailure(err)
	return n, err
}

// open opens the file to which the next n bytes belong. An empty one takes a line
// of any length. The caller holds mu.
func (f *logFile) open(n int) (file *os.File, err error) {
	if err := os.MkdirAll(f.logs.dir, 0o750); err != nil {
		return nil, err
	}
	if day := today(); f.day != day {
		if f.number, err = f.logs.newest(f.kind, day); err != nil {
			return nil, err
		}
		f.day = day
	}
	for ; ; f.number++ {
		name := fmt.Sprintf("%s-%s.%d.log", f.kind, f.day, f.number)
		name = strings.Replace(name, ".0.", ".", 1)
		file, err = os.OpenFile(filepath.Join(f.logs.dir, name), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
		if err != nil {
			return nil, err
		}
		// A file whose size cannot be told is written all the same.
		size, err := file.Seek(0, io.SeekEnd)
		if err != nil || f.logs.maxSize == 0 || size == 0 || size+int64(n) <= f.logs.maxSize {
			return file, nil
		}
		file.Close()
	}
}

// today is the local date, by which files are named.
func today() string { return time.Now().Format(time.DateOnly) }

// maintain keeps the files in order, now and at every full minute, midnight
// among them, until ctx ends.
func (l *logs) maintain(ctx context.Context) {
	for ctx.Err() == nil {
		err := l.prune()
		l.mu.Lock()
		l.countFailure(err)
		l.mu.Unlock()
		select {
		case <-time.After(time.Until(time.Now().Truncate(time.Minute).Add(time.Minute))):
			l.awaitCrash()
		case <-ctx.Done():
		}
	}
}

// awaitCrash gives the runtime the file to which it is to write a fatal panic.
func (l *logs) awaitCrash() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	file, err := l.exceptions.open(0)
	if err == nil { // the runtime duplicates the descriptor
		err = errors.Join(debug.SetCrashOutput(file, debug.CrashOptions{}), file.Close())
	}
	l.countFailure(err)
}

// prune deletes what is too old, too much or empty, and zips what is complete.
// It leaves a kind's newest file of today alone: that one is written.
func (l *logs) prune() error {
	names, err := l.list()
	oldest := time.Now().Add(-l.maxAge).Format(time.DateOnly)
	kept := map[string]int{} // by kind
	for i, n := range names {
		newest := i == 0 || names[i-1].kind != n.kind || names[i-1].day != n.day
		path := filepath.Join(l.dir, n.name)
		switch {
		case newest && n.day >= today():
			kept[n.kind]++
		case n.size == 0, l.maxAge > 0 && n.day < oldest, l.maxCount > 0 && kept[n.kind] >= l.maxCount:
			err = errors.Join(err, os.Remove(path))
		default:
			kept[n.kind]++
			if l.zipped && !n.zipped {
				err = errors.Join(err, zipFile(path))
			}
		}
	}
	return err
}

// zipFile replaces a file by its gzip. Interrupted, it leaves the file, and the
// next attempt begins anew.
func zipFile(path string) error {
	src, err := os.Open(path)
	if err != nil {
		return err
	}
	defer src.Close()
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
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(b.day, a.day),
			cmp.Compare(b.number, a.number), cmp.Compare(b.name, a.name))
	})
	return names, err
}

// newest returns the number of a kind's newest file of the day, or the next if that is zipped.
func (l *logs) newest(kind, day string) (number int, err error) {
	names, err := l.list()
	i := slices.IndexFunc(names, func(o logName) bool { return o.kind == kind && o.day == day })
	if i < 0 {
		return 0, err
	}
	if number = names[i].number; names[i].zipped {
		number++
	}
	return number, err
}
