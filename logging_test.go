package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// testLogs opens logs and gives them back with what they say on stdout and
// stderr, to be read after Close or synctest.Wait.
func testLogs(t *testing.T, c logConfig) (l *logs, stdout, stderr *bytes.Buffer) {
	t.Helper()
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	l = openLogs(c, stdout, stderr, false)
	t.Cleanup(func() {
		if err := l.Close(); err != nil && !t.Failed() {
			t.Errorf("close: %v", err)
		}
	})
	return l, stdout, stderr
}

// nextLogMinute sleeps over the next full minute, and until what happens then is
// done. Only in a synctest bubble.
func nextLogMinute() {
	time.Sleep(time.Minute)
	synctest.Wait()
}

// nextLogDay sleeps over the next midnight. Only in a synctest bubble.
func nextLogDay() string {
	y, m, d := time.Now().Date()
	time.Sleep(time.Until(time.Date(y, m, d+1, 0, 0, 0, 0, time.Local)))
	synctest.Wait()
	return time.Now().Format(time.DateOnly)
}

func logDay() string { return time.Now().Format(time.DateOnly) }

func logNames(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func wantLogs(t *testing.T, dir string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := logNames(t, dir); !slices.Equal(got, want) {
		t.Errorf("files: got %v, want %v", got, want)
	}
}

func readLog(t *testing.T, elem ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func putLog(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o640); err != nil {
		t.Fatal(err)
	}
}

// logMessages returns the msg of each line of a log file; a line that is not JSON
// stands for itself.
func logMessages(t *testing.T, elem ...string) []string {
	t.Helper()
	var got []string
	for line := range strings.Lines(readLog(t, elem...)) {
		var record struct{ Msg string }
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			record.Msg = line
		}
		got = append(got, record.Msg)
	}
	return got
}

func wantLogMessages(t *testing.T, file string, want ...string) {
	t.Helper()
	if got := logMessages(t, file); !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", filepath.Base(file), got, want)
	}
}

func TestLogKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "var", "logs")
		l, stdout, stderr := testLogs(t, logConfig{level: slog.LevelInfo, dir: dir})
		day := logDay()
		l.app.Debug("quiet")
		l.app.Info("started", "port", 8080)
		wantLogs(t, dir, "application-"+day+".log", "exceptions-"+day+".log")

		l.app.Error("broken")
		l.rejected.Warn("not cleaned")
		l.exception("tracker", errors.New("boom"), debug.Stack())
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l.app.Info("late")
		path := func(kind string) string { return filepath.Join(dir, kind+"-"+day+".log") }
		wantLogMessages(t, path("application"), "started", "broken", "not cleaned", "panic")
		wantLogMessages(t, path("error"), "broken", "panic")
		wantLogMessages(t, path("rejections"), "not cleaned")
		wantLogMessages(t, path("exceptions"), "panic")
		var record struct{ Where, Panic, Stack string }
		if err := json.Unmarshal([]byte(readLog(t, path("exceptions"))), &record); err != nil {
			t.Fatal(err)
		}
		if record.Where != "tracker" || record.Panic != "boom" || !strings.Contains(record.Stack, "TestLogKinds") {
			t.Errorf("exception: got %+v", record)
		}
		if got := strings.Count(stdout.String(), "\n"); got != 5 || strings.Contains(stdout.String(), "quiet") {
			t.Errorf("stdout: got %d lines, want 5:\n%s", got, stdout)
		}
		if stderr.Len() > 0 || l.writeErrors() != 0 {
			t.Errorf("stderr: got %q and %d write errors, want none", stderr, l.writeErrors())
		}
		for _, f := range []string{dir, path("application"), path("exceptions")} {
			info, err := os.Stat(f)
			if err != nil {
				t.Fatal(err)
			}
			if want := map[bool]os.FileMode{true: 0o750, false: 0o640}[info.IsDir()]; info.Mode().Perm() != want {
				t.Errorf("%s: got mode %o, want %o", f, info.Mode().Perm(), want)
			}
		}
	})
}

func TestLogStdoutTime(t *testing.T) {
	for _, journal := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			want := "level=INFO msg=started g.time=noon\n"
			if !journal {
				want = "time=" + time.Now().Format(time.RFC3339)[:19] + ".000"
			}
			var stdout bytes.Buffer
			l := openLogs(logConfig{dir: t.TempDir()}, &stdout, io.Discard, journal)
			l.app.WithGroup("g").Info("started", "time", "noon")
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(stdout.String(), want) {
				t.Errorf("journal %v: got %q, want it to begin with %q", journal, &stdout, want)
			}
		})
	}
}

func TestLogMidnight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		l, _, _ := testLogs(t, logConfig{dir: dir})
		first := logDay()
		l.app.Error("one")
		// Silent at midnight: only the file for fatal panics moves on.
		second := nextLogDay()
		wantLogs(t, dir, "application-"+first+".log", "error-"+first+".log", "exceptions-"+second+".log")
		for _, f := range l.files {
			if f.file != nil && f.kind != exceptionsLog {
				t.Errorf("%s: still open after its day", f.kind)
			}
		}
		l.app.Info("two")
		l.exception("hub", "boom", nil)
		nextLogDay()
		third := nextLogDay()
		l.app.Info("three")
		wantLogMessages(t, filepath.Join(dir, "application-"+first+".log"), "one")
		wantLogMessages(t, filepath.Join(dir, "application-"+second+".log"), "two", "panic")
		wantLogMessages(t, filepath.Join(dir, "application-"+third+".log"), "three")
		wantLogMessages(t, filepath.Join(dir, "exceptions-"+second+".log"), "panic")
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		wantLogs(t, dir, "application-"+first+".log", "error-"+first+".log",
			"application-"+second+".log", "error-"+second+".log", "exceptions-"+second+".log",
			"application-"+third+".log", "exceptions-"+third+".log")
	})
}

func TestLogSizeAndRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		c := logConfig{dir: dir, maxSize: 200}
		name := func(n string) string { return filepath.Join(dir, "application-"+logDay()+n+".log") }
		l, _, _ := testLogs(t, c)
		line := strings.Repeat("x", 20) // about 80 bytes a line, two a file
		for i := range 3 {
			l.app.Info(fmt.Sprint(line, i))
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		wantLogMessages(t, name(""), line+"0", line+"1")
		wantLogMessages(t, name(".1"), line+"2")

		l, _, _ = testLogs(t, c)
		long := strings.Repeat("y", 1000)
		for _, msg := range []string{line + "3", line + "4", long, "last"} {
			l.app.Info(msg)
		}
		wantLogMessages(t, name(".1"), line+"2", line+"3")
		wantLogMessages(t, name(".2"), line+"4")
		wantLogMessages(t, name(".3"), long)
		wantLogMessages(t, name(".4"), "last")
		l.exception(long, "boom", nil) // its file is open, and empty
		wantLogMessages(t, filepath.Join(dir, "exceptions-"+logDay()+".log"), "panic")
		nextLogDay()
		l.app.Info("tomorrow")
		wantLogMessages(t, name(""), "tomorrow")
	})
}

func TestLogNumbersGoOnAfterZipped(t *testing.T) {
	dir := t.TempDir()
	l := &logs{logConfig: logConfig{dir: dir, maxSize: 100}}
	for _, name := range []string{"application-2026-01-02.9.log", "application-2026-01-02.10.log.gz", "application-2026-01-03.77.log", "error-2026-01-02.78.log"} {
		putLog(t, dir, name, "text\n")
	}
	for day, want := range map[string]string{
		"2026-01-01": "application-2026-01-01.log",
		"2026-01-02": "application-2026-01-02.11.log",
		"2026-01-03": "application-2026-01-03.77.log",
	} {
		if got, _, err := l.newest(applicationLog, day, 10); got != want || err != nil {
			t.Errorf("newest: got %q, %v, want %q", got, err, want)
		}
	}
}

// oldLogs makes five days of files, the last of them today's, and others that
// are not ours to delete.
func oldLogs(t *testing.T, dir string) (days, others []string) {
	t.Helper()
	for i := range 5 {
		days = append(days, time.Now().AddDate(0, 0, i-4).Format(time.DateOnly))
		putLog(t, dir, "application-"+days[i]+".log", "text\n")
		putLog(t, dir, "application-"+days[i]+".1.log", "text\n")
	}
	putLog(t, dir, "error-"+days[0]+".log", "text\n")
	putLog(t, dir, "rejections-"+days[4]+".log", "") // nobody's, and today's
	putLog(t, dir, "exceptions-"+days[2]+".log", "") // of a process that was killed
	others = []string{
		"application.log", "application-1990-01-01.txt", "myapplication-1990-01-01.log", "application-1990-01-01.log.bak",
		"application-1990-01-01.01.log", "application-1990-1-1.log", "access-1990-01-01.log", "application-1990-01-01.log.gz.tmp",
	}
	for _, name := range others {
		putLog(t, dir, name, "not ours")
	}
	others = append(others, "rejections-1990-01-01.log")
	if err := os.Mkdir(filepath.Join(dir, "rejections-1990-01-01.log"), 0o750); err != nil {
		t.Fatal(err)
	}
	return days, others
}

func TestLogRetention(t *testing.T) {
	for _, test := range []struct {
		name   string
		config logConfig
		want   func(days []string) []string
	}{
		{"days", logConfig{maxAge: 2 * 24 * time.Hour}, func(days []string) (want []string) {
			for _, day := range days[2:] {
				want = append(want, "application-"+day+".log", "application-"+day+".1.log")
			}
			return want
		}},
		{"count", logConfig{maxCount: 3}, func(days []string) []string {
			return []string{"application-" + days[4] + ".log", "application-" + days[4] + ".1.log",
				"application-" + days[3] + ".1.log", "error-" + days[0] + ".log"}
		}},
		{"no limit", logConfig{}, func(days []string) []string {
			want := []string{"error-" + days[0] + ".log"}
			for _, day := range days {
				want = append(want, "application-"+day+".log", "application-"+day+".1.log")
			}
			return want
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				time.Sleep(time.Hour)
				days, others := oldLogs(t, dir)
				test.config.dir = dir
				l, _, _ := testLogs(t, test.config)
				synctest.Wait()
				if got := l.writeErrors(); got != 0 {
					t.Errorf("write errors: got %d, want 0", got)
				}
				wantLogs(t, dir, append(append(test.want(days), others...),
					"exceptions-"+days[4]+".log", "rejections-"+days[4]+".log")...)
			})
		})
	}
}

func unzipLog(t *testing.T, elem ...string) string {
	t.Helper()
	r, err := gzip.NewReader(strings.NewReader(readLog(t, elem...)))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLogZipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, day := t.TempDir(), logDay()
		// An earlier process was killed while it zipped; its error file is the
		// newest of today, so that it may still be written.
		putLog(t, dir, "application-1999-12-30.log", "whole\n")
		putLog(t, dir, "application-1999-12-30.log.gz", "a part")
		putLog(t, dir, "error-"+day+".log", "before\n")
		l, _, _ := testLogs(t, logConfig{dir: dir, maxSize: 100, zipped: true})
		for _, msg := range []string{"one", "two", "three"} {
			l.app.Info(msg + strings.Repeat(".", 40)) // one a file
		}
		nextLogMinute()
		wantLogs(t, dir, "application-1999-12-30.log.gz", "application-"+day+".log.gz", "application-"+day+".1.log.gz",
			"application-"+day+".2.log", "error-"+day+".log", "exceptions-"+day+".log")
		if got := unzipLog(t, dir, "application-1999-12-30.log.gz"); got != "whole\n" {
			t.Errorf("unzipped: got %q, want %q", got, "whole\n")
		}
		if got := unzipLog(t, dir, "application-"+day+".1.log.gz"); !strings.Contains(got, "two..") {
			t.Errorf("unzipped: got %q, want the second line", got)
		}
		l.app.Info("four")
		second := nextLogDay()
		wantLogs(t, dir, "application-1999-12-30.log.gz", "application-"+day+".log.gz", "application-"+day+".1.log.gz",
			"application-"+day+".2.log.gz", "application-"+day+".3.log.gz", "error-"+day+".log.gz", "exceptions-"+second+".log")
		if got := unzipLog(t, dir, "application-"+day+".3.log.gz"); !strings.Contains(got, "four") {
			t.Errorf("unzipped: got %q, want the fourth line", got)
		}
		info, err := os.Stat(filepath.Join(dir, "error-"+day+".log.gz"))
		if err != nil || info.Mode().Perm() != 0o640 {
			t.Errorf("zipped file: got %v, %v, want mode 640", info, err)
		}
		if got := l.writeErrors(); got != 0 {
			t.Errorf("write errors: got %d, want 0", got)
		}
	})
}

func wantLogWarnings(t *testing.T, stderr *bytes.Buffer, want int) {
	t.Helper()
	if got := strings.Count(stderr.String(), "\n"); got != want {
		t.Errorf("stderr: got %d lines, want %d:\n%s", got, want, stderr)
	}
}

func TestLogUnusableDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent := filepath.Join(t.TempDir(), "file")
		dir := filepath.Join(parent, "logs")
		putLog(t, filepath.Dir(parent), "file", "in the way")
		l, stdout, stderr := testLogs(t, logConfig{dir: dir})
		for i := range 100 {
			l.app.Error("line", "i", i)
			time.Sleep(time.Minute)
		}
		synctest.Wait()
		wantLogWarnings(t, stderr, 1)
		if !strings.Contains(stderr.String(), parent) {
			t.Errorf("stderr: got %q, want it to name %s", stderr, parent)
		}
		if got := l.writeErrors(); got < 200 { // two files
			t.Errorf("write errors: got %d, want at least 200", got)
		}
		if got := strings.Count(stdout.String(), "\n"); got != 100 {
			t.Errorf("stdout: got %d lines, want 100", got)
		}

		if err := os.Remove(parent); err != nil {
			t.Fatal(err)
		}
		nextLogMinute()
		before := l.writeErrors()
		l.app.Error("again")
		wantLogMessages(t, filepath.Join(dir, "application-"+logDay()+".log"), "again")
		wantLogMessages(t, filepath.Join(dir, "error-"+logDay()+".log"), "again")
		wantLogs(t, dir, "application-"+logDay()+".log", "error-"+logDay()+".log", "exceptions-"+logDay()+".log")
		nextLogMinute()
		if got := l.writeErrors(); got != before {
			t.Errorf("write errors after the repair: got %d, want %d", got, before)
		}

		// A second outage is told again.
		time.Sleep(time.Hour)
		if err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o640)); err != nil {
			t.Fatal(err)
		}
		nextLogMinute()
		l.app.Info("lost")
		wantLogWarnings(t, stderr, 2)
	})
}

// TestLogFullDisk has a full device in place of one file.
func TestLogFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		link := filepath.Join(dir, "application-"+logDay()+".log")
		if err := os.Symlink("/dev/full", link); err != nil {
			t.Fatal(err)
		}
		l, stdout, stderr := testLogs(t, logConfig{dir: dir, maxCount: 1, zipped: true})
		for range 10 {
			l.app.Error("line")
			time.Sleep(10 * time.Second)
		}
		wantLogWarnings(t, stderr, 1)
		if got := l.writeErrors(); got != 10 {
			t.Errorf("write errors: got %d, want 10", got)
		}
		if got := len(logMessages(t, dir, "error-"+logDay()+".log")); got != 10 {
			t.Errorf("error file: got %d lines, want 10", got)
		}
		if got := strings.Count(stdout.String(), "\n"); got != 10 {
			t.Errorf("stdout: got %d lines, want 10", got)
		}
		if err := os.Remove(link); err != nil {
			t.Fatal(err)
		}
		nextLogMinute()
		l.app.Info("again")
		wantLogMessages(t, link, "again")
		wantLogWarnings(t, stderr, 1)
	})
}

func TestLogRemovedWhileWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "logs")
		l, _, stderr := testLogs(t, logConfig{dir: dir})
		l.app.Info("one")
		synctest.Wait()
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		nextLogMinute()
		l.app.Info("two")
		name := filepath.Join(dir, "application-"+logDay()+".log")
		wantLogMessages(t, name, "two")
		wantLogs(t, dir, "application-"+logDay()+".log", "exceptions-"+logDay()+".log")
		if err := errors.Join(os.Rename(name, name+".bak"), os.WriteFile(name, nil, 0o640)); err != nil {
			t.Fatal(err)
		}
		nextLogMinute()
		l.app.Info("three")
		wantLogMessages(t, name, "three")
		if stderr.Len() > 0 {
			t.Errorf("stderr: got %q, want nothing", stderr)
		}
	})
}

// TestLogConcurrent writes from many goroutines over many files: each line is
// there once, whole.
func TestLogConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		l, _, _ := testLogs(t, logConfig{dir: dir, maxSize: 2000})
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for i := range 50 {
					l.app.Info(fmt.Sprintf("%d/%d", g, i))
					l.app.With("session", "s").Error(fmt.Sprintf("%d-%d", g, i))
					l.rejected.Warn(fmt.Sprintf("%d:%d", g, i))
				}
			})
		}
		wg.Wait()
		counts := map[string]map[string]int{"application": {}, "error": {}, "rejections": {}, "exceptions": {}}
		for _, name := range logNames(t, dir) {
			kind, _, _ := strings.Cut(name, "-")
			for _, msg := range logMessages(t, dir, name) {
				counts[kind][msg]++
			}
		}
		for kind, want := range map[string]int{"application": 1200, "error": 400, "rejections": 400, "exceptions": 0} {
			if got := len(counts[kind]); got != want {
				t.Errorf("%s: got %d different lines, want %d", kind, got, want)
			}
			for msg, n := range counts[kind] {
				if n != 1 {
					t.Errorf("%s: got %q %d times, want once", kind, msg, n)
				}
			}
		}
	})
}

// TestLogCrash lets the test binary die of a panic in a goroutine, two days
// after its start, twice; the second time after an exception on the same day.
func TestLogCrash(t *testing.T) {
	if dir := os.Getenv("LOG_CRASH_TEST_DIR"); dir != "" {
		synctest.Test(t, func(t *testing.T) {
			l := openLogs(logConfig{dir: dir, zipped: true}, io.Discard, io.Discard, false)
			nextLogDay()
			nextLogDay()
			if os.Getenv("LOG_CRASH_TEST_EXCEPTION") != "" {
				l.exception("tracker", "recovered", nil)
			}
			go func() { panic("nobody recovers this") }()
			select {}
		})
	}
	dir := t.TempDir()
	for _, exception := range []string{"", "yes"} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestLogCrash$")
		cmd.Env = append(os.Environ(), "LOG_CRASH_TEST_DIR="+dir, "LOG_CRASH_TEST_EXCEPTION="+exception)
		var exit *exec.ExitError
		if out, err := cmd.CombinedOutput(); !errors.As(err, &exit) || exit.ExitCode() != 2 {
			t.Fatalf("got %v, want exit status 2:\n%s", err, out)
		}
	}
	var day string
	synctest.Test(t, func(t *testing.T) { nextLogDay(); day = nextLogDay() })
	wantLogs(t, dir, "application-"+day+".log", "error-"+day+".log", "exceptions-"+day+".log")
	got := readLog(t, dir, "exceptions-"+day+".log")
	for text, want := range map[string]int{
		"panic: nobody recovers this\n": 2,
		"logging_test.go":               2,
		"created by session-replay.":    2,
		"\n{\"time\":":                  1, // the exception begins a line of its own
	} {
		if n := strings.Count(got, text); n < want {
			t.Errorf("exceptions file: got %q %d times, want %d:\n%s", text, n, want, got)
		}
	}
}
