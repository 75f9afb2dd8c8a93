package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// logTest is logs in a bubble of synctest, where days pass at once. What they
// print is read after wait or Close.
type logTest struct {
	*testing.T
	*logs
	stdout, stderr bytes.Buffer
}

func testLogs(t *testing.T, c logConfig) *logTest {
	t.Helper()
	if c.dir == "" {
		c.dir = t.TempDir()
	}
	l := &logTest{T: t}
	l.logs = openLogs(c, &l.stdout, &l.stderr, false)
	t.Cleanup(func() { l.Close() })
	synctest.Wait()
	return l
}

// nextMinute and nextDay sleep over the next full minute or midnight, and until
// what happens then is done.
func (l *logTest) nextMinute() {
	time.Sleep(time.Minute)
	synctest.Wait()
}

func (l *logTest) nextDay() string {
	toMidnight()
	synctest.Wait()
	return today()
}

func toMidnight() {
	y, m, d := time.Now().Date()
	time.Sleep(time.Until(time.Date(y, m, d+1, 0, 0, 0, 0, time.Local)))
}

func (l *logTest) put(name, content string) {
	l.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, name), []byte(content), 0o640); err != nil {
		l.Fatal(err)
	}
}

// want compares the files: "name", or "name: messages" where there are some. A
// line that is not JSON stands for itself; a zipped file is unpacked.
func (l *logTest) want(want ...string) {
	l.Helper()
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		l.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		text := e.Name()
		if e.Type().IsRegular() {
			text = strings.Join(append([]string{e.Name() + ":"}, l.messages(e.Name())...), " ")
		}
		got = append(got, strings.TrimSuffix(text, ":"))
	}
	slices.Sort(want)
	same(l, "files", strings.Join(got, "\n"), strings.Join(want, "\n")) // ReadDir sorts
}

func (l *logTest) messages(name string) (all []string) {
	l.Helper()
	text, err := os.ReadFile(filepath.Join(l.dir, name))
	if strings.HasSuffix(name, ".gz") && err == nil {
		text, err = unpackChunk(text)
	}
	if err != nil {
		l.Error(err)
	}
	for line := range strings.Lines(string(text)) {
		record := struct{ Msg string }{strings.TrimSpace(line)}
		json.Unmarshal([]byte(line), &record)
		all = append(all, record.Msg)
	}
	return all
}

func TestLogKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testLogs(t, logConfig{dir: filepath.Join(t.TempDir(), "var", "logs")})
		l.app.Debug("quiet")
		l.app.Info("started", "port", 8080)
		day := today()
		l.want("application-"+day+".log: started", "exceptions-"+day+".log")
		l.app.Error("broken")
		l.rejected.Warn("not-cleaned")
		l.exception("tracker", errors.New("boom"), debug.Stack())
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l.app.Info("late")
		l.want("application-"+day+".log: started broken not-cleaned panic", "error-"+day+".log: broken panic",
			"rejections-"+day+".log: not-cleaned", "exceptions-"+day+".log: panic")
		var record struct{ Where, Panic, Stack string }
		text, _ := os.ReadFile(filepath.Join(l.dir, "exceptions-"+day+".log"))
		json.Unmarshal(text, &record)
		same(t, "exception", said(record.Where, record.Panic, strings.Contains(record.Stack, "TestLogKinds")),
			"tracker boom true")
		out := l.stdout.String()
		same(t, "lines on stdout, and the quiet one", said(strings.Count(out, "\n"), strings.Contains(out, "quiet")),
			"5 false")
		same(t, "stderr and write errors", said(l.stderr.Len(), l.failures.Load()), "0 0")
		for _, f := range []string{"", "application-" + day + ".log", "exceptions-" + day + ".log"} {
			info, err := os.Stat(filepath.Join(l.dir, f))
			if err != nil || info.Mode().Perm() != map[bool]os.FileMode{true: 0o750, false: 0o640}[f == ""] {
				t.Errorf("%q: got mode %v, %v, want 750 and 640", f, info.Mode(), err)
			}
		}
	})
}

// The journal has a time for each line of its own.
func TestLogStdoutTime(t *testing.T) {
	for journal, want := range map[bool]string{true: "level=INFO msg=started g.time=noon\n", false: "time="} {
		var stdout bytes.Buffer
		l := openLogs(logConfig{dir: t.TempDir()}, &stdout, io.Discard, journal)
		l.app.WithGroup("g").Info("started", "time", "noon")
		l.Close()
		if !strings.HasPrefix(stdout.String(), want) {
			t.Errorf("journal %v: got %q, want it to begin with %q", journal, &stdout, want)
		}
	}
}

// Each day has its files, and those of LOG_MAX_FILES days stay.
func TestLogDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testLogs(t, logConfig{maxAge: 48 * time.Hour})
		days := []string{today()}
		l.app.Error("one")
		for _, message := range []string{"two", "three", "four"} {
			days = append(days, l.nextDay())
			l.app.Info(message)
		}
		l.want("application-"+days[1]+".log: two", "application-"+days[2]+".log: three",
			"application-"+days[3]+".log: four",
			"exceptions-"+days[3]+".log")
		toMidnight() // and a line before the files are looked after
		l.app.Info("five")
		same(t, "at midnight", l.messages("application-"+today()+".log"), "[five]")
	})
}

// A full file is followed by a numbered one, also after a restart.
func TestLogSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := logConfig{dir: t.TempDir(), maxSize: 200}
		name := "application-" + today()
		line, long := strings.Repeat("x", 20), strings.Repeat("y", 1000) // two lines a file
		l := testLogs(t, c)
		for range 3 {
			l.app.Info(line)
		}
		l.Close()
		l = testLogs(t, c)
		for _, message := range []string{line, line, long, "last"} {
			l.app.Info(message)
		}
		both := line + " " + line
		l.want(name+".log: "+both, name+".1.log: "+both, name+".2.log: "+line, name+".3.log: "+long,
			name+".4.log: last", "exceptions-"+today()+".log")
		l.Close()
		for i, newest := range []string{".9.log", ".10.log.gz"} { // full, and zipped
			l.put(name+newest, strings.Repeat("z", 190/(1+9*i)))
			l = testLogs(t, c)
			l.app.Info("after " + newest)
			l.Close()
			if next := fmt.Sprintf("%s.%d.log", name, 10+i); len(l.messages(next)) != 1 {
				t.Errorf("after %s: got no line in %s", newest, next)
			}
			os.Remove(filepath.Join(l.dir, name+".10.log")) // as if it had been zipped
		}
	})
}

// Old files go; what is not a log file of ours stays.
func TestLogRetention(t *testing.T) {
	others := []string{"application.log", "application-1990-01-01.txt", "myapplication-1990-01-01.log",
		"application-1990-01-01.log.bak",
		"application-1990-01-01.01.log", "application-1990-1-1.log", "access-1990-01-01.log",
		"application-1990-01-01.log.gz.tmp"}
	for _, tt := range []struct {
		config logConfig
		want   string // days back, with .1 for the second file of the day
	}{
		{logConfig{maxAge: 2 * 24 * time.Hour}, "0 0.1 1 1.1 2 2.1"},
		{logConfig{maxCount: 3}, "0 0.1 1.1"},
		{logConfig{}, "0 0.1 1 1.1 2 2.1 3 3.1 4 4.1"},
	} {
		synctest.Test(t, func(t *testing.T) {
			l := &logTest{T: t, logs: &logs{logConfig: tt.config}}
			l.dir, tt.config.dir = t.TempDir(), ""
			name := func(back string) string {
				n := int(back[0] - '0')
				return "application-" + time.Now().AddDate(0, 0, -n).Format(time.DateOnly) + back[1:] + ".log"
			}
			for _, back := range strings.Fields("0 0.1 1 1.1 2 2.1 3 3.1 4 4.1") {
				l.put(name(back), "")
				l.put(name(back), "text\n")
			}
			l.put("exceptions-"+time.Now().AddDate(0, 0, -1).Format(time.DateOnly)+".log", "") // of a day without any
			os.Mkdir(filepath.Join(l.dir, "rejections-1990-01-01.log"), 0o750)
			want := []string{"rejections-1990-01-01.log", "exceptions-" + today() + ".log"}
			for _, other := range others {
				l.put(other, "")
				want = append(want, other)
			}
			for _, back := range strings.Fields(tt.want) {
				want = append(want, name(back)+": text")
			}
			tt.config.dir = l.dir
			testLogs(t, tt.config).want(want...)
		})
	}
}

func TestLogZipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, day := &logTest{T: t, logs: &logs{logConfig: logConfig{dir: t.TempDir(), maxSize: 100, zipped: true}}},
			today()
		// An earlier process was killed while it zipped; its error file is the
		// newest of today, so that it may still be written.
		l.put("application-1999-12-30.log", "whole\n")
		l.put("application-1999-12-30.log.gz", "a part")
		l.put("error-"+day+".log", "before\n")
		l = testLogs(t, l.logConfig)
		line := strings.Repeat(".", 60) // one a file
		for _, n := range []string{"1", "2", "3"} {
			l.app.Info(n + line)
		}
		l.nextMinute()
		l.want("application-1999-12-30.log.gz: whole", "application-"+day+".log.gz: 1"+line,
			"application-"+day+".1.log.gz: 2"+line,
			"application-"+day+".2.log: 3"+line, "error-"+day+".log: before", "exceptions-"+day+".log")
		l.app.Info("4")
		next := l.nextDay()
		l.want("application-1999-12-30.log.gz: whole", "application-"+day+".log.gz: 1"+line,
			"application-"+day+".1.log.gz: 2"+line,
			"application-"+day+".2.log.gz: 3"+line, "application-"+day+".3.log.gz: 4", "error-"+day+".log.gz: before",
			"exceptions-"+next+".log")
		same(t, "write errors", l.failures.Load(), 0)
	})
}

// A directory that cannot be used, or a full disk, costs lines in the files and
// nothing else; once it is mended the next line is there.
func TestLogTrouble(t *testing.T) {
	for name, tt := range map[string]struct {
		before func(dir, file string) error
		errors int64 // of 10 lines: of one kind or of both
	}{
		"a file in the way": {func(dir, file string) error { return os.WriteFile(dir, nil, 0o600) }, 20},
		"a full disk": {func(dir, file string) error {
			return errors.Join(os.Mkdir(dir, 0o750), os.Symlink("/dev/full", file))
		}, 10},
	} {
		synctest.Test(t, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "logs")
			file := filepath.Join(dir, "application-"+today()+".log")
			if err := tt.before(dir, file); err != nil {
				t.Fatal(err)
			}
			l := testLogs(t, logConfig{dir: dir})
			for range 10 {
				l.app.Error("line")
				l.nextMinute()
			}
			if got := l.failures.Load(); got < tt.errors || strings.Count(l.stderr.String(), "\n") != 1 ||
				strings.Count(l.stdout.String(), "\n") != 10 {
				t.Errorf("%s: got %d write errors, stderr %q, stdout %q, want at least %d, one line, 10", name, got,
					&l.stderr, &l.stdout, tt.errors)
			}
			if err := errors.Join(os.Remove(file), os.RemoveAll(dir)); err != nil &&
				!errors.Is(err, os.ErrNotExist) && tt.errors == 10 {
				t.Fatal(err)
			}
			l.app.Info("again")
			same(t, name+", mended", l.messages(filepath.Base(file)), "[again]")
			time.Sleep(time.Hour) // another outage is told too
			synctest.Wait()       // for what is done at each full minute, and would make the directory again
			if err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			l.nextMinute()
			same(t, name+", again: lines on stderr", strings.Count(l.stderr.String(), "\n"), 2)
		})
	}
}

// A file that somebody has moved, removed or emptied is begun anew with the next line.
func TestLogMoved(t *testing.T) {
	for name, move := range map[string]func(dir, file string) error{
		"moved":       func(dir, file string) error { return os.Rename(file, file+".bak") },
		"all removed": func(dir, file string) error { return os.RemoveAll(dir) },
		"replaced": func(dir, file string) error {
			return errors.Join(os.Rename(file, file+".bak"), os.WriteFile(file, nil, 0o640))
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			l := testLogs(t, logConfig{dir: filepath.Join(t.TempDir(), "logs")})
			l.app.Info("one")
			file := "application-" + today() + ".log"
			if err := move(l.dir, filepath.Join(l.dir, file)); err != nil {
				t.Fatal(err)
			}
			l.app.Info("two")
			same(t, name, said(l.messages(file), l.stderr.Len()), "[two] 0")
		})
	}
}

// Of many goroutines, over many files, each line is there once, whole.
func TestLogConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testLogs(t, logConfig{maxSize: 2000})
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for i := range 50 {
					l.app.Info(fmt.Sprintf("%d/%d", g, i))
					l.rejected.Error(fmt.Sprintf("%d:%d", g, i))
				}
			})
		}
		wg.Wait()
		lines, different := 0, map[string]bool{}
		entries, _ := os.ReadDir(l.dir)
		for _, e := range entries {
			for _, message := range l.messages(e.Name()) {
				lines++
				different[strings.SplitN(e.Name(), "-", 2)[0]+message] = true
			}
		}
		if lines != 1600 || len(different) != 1600 || len(entries) < 20 {
			t.Errorf("got %d lines, %d different, in %d files, want 1600", lines, len(different), len(entries))
		}
	})
}

// A fatal panic, two days after the start, stands in its day's file, behind an
// exception of the same day.
func TestLogCrash(t *testing.T) {
	if dir := os.Getenv("LOG_CRASH_TEST_DIR"); dir != "" {
		synctest.Test(t, func(t *testing.T) {
			l := testLogs(t, logConfig{dir: dir, zipped: true})
			l.nextDay()
			l.nextDay()
			l.exception("tracker", "recovered", nil)
			go func() { panic("nobody recovers this") }()
			select {}
		})
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestLogCrash$")
	cmd.Env = append(os.Environ(), "LOG_CRASH_TEST_DIR="+dir, "GOTRACEBACK=single")
	var exit *exec.ExitError
	if out, err := cmd.CombinedOutput(); !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Fatalf("got %v, want exit status 2:\n%s", err, out)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "exceptions-2000-01-03.log"))
	if len(files) != 1 {
		t.Fatalf("got the files %v", files)
	}
	text, _ := os.ReadFile(files[0])
	holds(t, "exceptions file", "\n"+string(text), "{\"time\":", "\npanic: nobody recovers this\n", "logging_test.go",
		"created by session-replay.")
}
