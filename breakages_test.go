//go:build breakages

package main

// Each promise is broken on purpose, in a copy of the tree, and the tests that
// hold it must fail: the ten invariants of doc/ and what the protocol promises.
// make breakages runs it.

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"
)

// breakage replaces a text that a file has once, and names the tests that see it.
type breakage struct{ promise, file, old, new, tests string }

func readBreakages(t *testing.T) (all []breakage) {
	text, err := os.ReadFile("testdata/breakages.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(text), "\n\n# ")[1:] {
		lines := strings.Split(strings.TrimSuffix(block, "\n"), "\n")
		b := breakage{promise: lines[0]}
		b.file, b.tests, _ = strings.Cut(lines[1], " ")
		for _, line := range lines[2:] {
			if old, ok := strings.CutPrefix(line, "-"); ok {
				b.old += "\n" + old
			} else {
				b.new += "\n" + line[1:]
			}
		}
		b.old, b.new = b.old[1:], b.new[1:]
		all = append(all, b)
	}
	return all
}

func TestBreakages(t *testing.T) {
	const copyTree = `mkdir "$0" && git ls-files -z | tar --null -T - -cf - | tar -C "$0" -xf -
		cp -r web/dist "$0/web/" && ln -s "$PWD/web/node_modules" "$0/web/"`
	dir := filepath.Join(t.TempDir(), "tree")
	if out, err := exec.Command("sh", "-c", copyTree, dir).CombinedOutput(); err != nil {
		t.Fatalf("copy the tree: %v\n%s", err, out)
	}
	breakages := readBreakages(t)
	for tests := range allTests(breakages) {
		whole := breakage{file: "go.mod", old: "module ", new: "module ", tests: tests}
		if verdict := whole.try(dir); verdict != "NOT CAUGHT" {
			t.Fatalf("with nothing broken, %s: %s", tests, verdict)
		}
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, b := range breakages {
		t.Run(b.promise, func(t *testing.T) {
			verdict := b.try(dir)
			if fmt.Fprintf(table, "%s\t%s\t%s\n", b.promise, b.tests, verdict); verdict != "caught" {
				t.Error(verdict)
			}
		})
	}
	table.Flush()
}

// allTests are those that some breakage names: those of Go together.
func allTests(breakages []breakage) map[string]bool {
	var ofGo []string
	all := map[string]bool{}
	for _, b := range breakages {
		if strings.Contains(b.tests, ": ") {
			all[b.tests] = true
		} else {
			ofGo = append(ofGo, b.tests)
		}
	}
	all[strings.Join(ofGo, "|")] = true
	return all
}

// try breaks the promise, runs its tests and mends it.
func (b *breakage) try(dir string) (verdict string) {
	file := filepath.Join(dir, b.file)
	whole, err := os.ReadFile(file)
	if n := strings.Count(string(whole), b.old); err != nil || n != 1 {
		return fmt.Sprintf("the text is there %d times, want once (%v)", n, err)
	}
	defer os.WriteFile(file, whole, 0o644)
	if err := os.WriteFile(file, []byte(strings.Replace(string(whole), b.old, b.new, 1)), 0o644); err != nil {
		return err.Error()
	}
	failure := "--- FAIL"
	cmd := exec.Command("go", "test", "-vet=off", "-failfast", "-run", "^("+b.tests+")$", ".")
	if file, name, ok := strings.Cut(b.tests, ": "); ok {
		failure = "\nnot ok"
		cmd = exec.Command("node", "--test", "--test-reporter=tap", "--test-name-pattern="+name, file)
	}
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TEST_PATIENCE=10")
	out, err := cmd.CombinedOutput()
	switch text := string(out); {
	case err == nil:
		return "NOT CAUGHT"
	case !strings.Contains(text, failure) && !strings.Contains(text, "panic:"):
		return "does not run: " + text[:min(len(text), 500)]
	}
	return "caught"
}
