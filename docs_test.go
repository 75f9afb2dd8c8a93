package main

import (
	"cmp"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// texts gives all files that the patterns find, one after the other.
func texts(patterns ...string) (all string) {
	for _, pattern := range patterns {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			content, _ := os.ReadFile(name) // one that cannot be read has nothing of what a test looks for
			all += string(content)
		}
	}
	return all
}

// matches gives what the first group of an expression matches in a text.
func matches(expression, text string) map[string]bool {
	found := map[string]bool{}
	for _, m := range regexp.MustCompile(expression).FindAllStringSubmatch(text, -1) {
		found[m[1]] = true
	}
	return found
}

func allIn(t *testing.T, some, all map[string]bool, complaint string) {
	for name := range some {
		if !all[name] {
			t.Errorf("%s: %s", name, complaint)
		}
	}
}

func TestDocsLinks(t *testing.T) {
	if n := strings.Count(texts("README.md"), "\n"); n == 0 || n > 200 {
		t.Errorf("the README has %d lines, want at most 200", n)
	}
	docs, _ := filepath.Glob("doc/*.md")
	anchors := map[string]bool{} // file#anchor, as GitHub makes them
	for _, name := range append(docs, "README.md") {
		for heading := range matches(`(?m)^#+ (.*)$`, texts(name)) {
			slug := regexp.MustCompile(`[^\w -]`).ReplaceAllString(strings.ToLower(heading), "")
			anchors[name+"#"+strings.ReplaceAll(slug, " ", "-")] = true
		}
	}
	for _, name := range append(docs, "README.md") {
		for link := range matches(`\]\(([^)\s]+)\)`, texts(name)) {
			file, anchor, _ := strings.Cut(link, "#")
			target := filepath.Join(filepath.Dir(name), cmp.Or(file, filepath.Base(name)))
			_, err := os.Stat(target)
			if !strings.Contains(link, "://") && (err != nil || anchor != "" && !anchors[target+"#"+anchor]) {
				t.Errorf("%s: the link to %s is dead", name, link)
			}
		}
	}
}

func TestDocsNames(t *testing.T) {
	t.Parallel()
	docs, tests := texts("README.md", "doc/*.md"), texts("*_test.go", "web/test/*.mjs")
	settings := matches(`(?m)^#?([A-Z_]+)=`, texts(".env.example"))
	settings["CAP_NET_BIND_SERVICE"] = true // the documents' only other name of this form
	allIn(t, matches(`\b([A-Z]+(?:_[A-Z]+)+)\b`, docs), settings, "the documents name a setting that does not exist")
	const noTest = "the documents name a test that does not exist"
	allIn(t, matches("`(Test[A-Z]\\w+)`", docs), matches(`func (Test\w+)\(`, tests), noTest)
	allIn(t, matches("`\"(\\w+ [^\"]+)\"`", docs), matches(`\btest\("([^"]+)"`, tests), noTest)
}
