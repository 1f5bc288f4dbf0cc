// Command testsummary reads the output of `go test -json` on its standard input and prints what a person wants of it: the line of each
// package as go test prints it, as it comes; all output of the tests that failed; the reasons for which tests were skipped; those that took
// longest; and as the last line
//
//	N passed, N failed, N skipped
//
// Checks beside the tests that failed or were skipped are counted with them (-failed, -skipped). Other lines on its input (build errors of older go commands) are passed on. The exit status is 1 if something failed.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

func main() {
	var extra extras
	flag.Func("failed", "a check beside the tests that failed (may be repeated)", extra.failedFlag)
	flag.Func("skipped", "a check beside the tests that was skipped, and why (may be repeated)", extra.skippedFlag)
	flag.Parse()
	failed, err := summarise(os.Stdin, os.Stdout, extra)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsummary:", err)
		os.Exit(1)
	}
	if failed {
		os.Exit(1)
	}
}

// extras are checks beside the tests, to be counted with them.
type extras struct{ failed, skipped []string }

func (e *extras) failedFlag(text string) error  { e.failed = append(e.failed, text); return nil }
func (e *extras) skippedFlag(text string) error { e.skipped = append(e.skipped, text); return nil }

// event is one line of `go test -json` (go doc test2json).
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build events
	Test        string
	Output      string
	FailedBuild string
	Elapsed     float64 // seconds
}

// key names a test, or with an empty test a package.
type key struct{ pkg, test string }

// summary is what was read so far.
type summary struct {
	out     io.Writer
	output  map[key][]string // of what hasn't ended yet
	parents map[key]bool     // tests that have subtests
	broken  map[key]bool     // packages and tests in which something failed that is counted already
	builds  map[string][]string

	passed, failed, skipped int
	reasons                 map[string]int
	slow                    []timed
}

// timed is a test that took long.
type timed struct {
	key
	seconds float64
}

// Tests that took slowFrom seconds are named, slowMost of them.
const (
	slowFrom = 60
	slowMost = 10
)

// summarise copies the digest of the events in r to w and reports whether anything failed.
func summarise(r io.Reader, w io.Writer, extra extras) (failed bool, err error) {
	s := &summary{
		out: w, output: map[key][]string{}, parents: map[key]bool{}, broken: map[key]bool{},
		builds: map[string][]string{}, reasons: map[string]int{},
	}
	lines := bufio.NewReader(r)
	read := false
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			read = true
			var e event
			if json.Unmarshal(line, &e) == nil && e.Action != "" {
				s.add(e)
			} else {
				fmt.Fprint(w, string(line))
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return true, fmt.Errorf("read: %w", err)
		}
	}
	if !read {
		return true, errors.New("no test has run")
	}
	for _, k := range s.unfinished() {
		// go test was ended while they ran.
		fmt.Fprintf(w, "--- UNFINISHED: %s %s\n%s", k.pkg, k.test, strings.Join(s.output[k], ""))
		s.countFailure(k)
	}
	for _, check := range extra.failed {
		fmt.Fprintf(w, "\nfailed: %s (see above)\n", check)
	}
	for _, reason := range extra.skipped {
		s.reasons[reason]++
	}
	s.failed += len(extra.failed)
	s.skipped += len(extra.skipped)
	s.finish()
	return s.failed > 0, nil
}

// unfinished returns the tests that began and didn't end.
func (s *summary) unfinished() []key {
	var keys []key
	for k := range s.output {
		if k.test != "" && !s.parents[k] {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b key) int { return strings.Compare(a.pkg+" "+a.test, b.pkg+" "+b.test) })
	return keys
}

// add takes one event.
func (s *summary) add(e event) {
	k := key{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		s.builds[e.ImportPath] = append(s.builds[e.ImportPath], e.Output)
	case "run":
		s.output[k] = nil
		if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
			s.parents[key{e.Package, e.Test[:i]}] = true
		}
	case "output":
		s.output[k] = append(s.output[k], e.Output)
		if e.Test == "" && packageLine.MatchString(e.Output) {
			fmt.Fprint(s.out, e.Output)
		}
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.endPackage(e)
		} else {
			s.endTest(k, e.Action)
			if e.Elapsed >= slowFrom && !s.parents[k] {
				s.slow = append(s.slow, timed{k, e.Elapsed})
			}
		}
		delete(s.output, k)
	}
}

// packageLine is how go test ends a package.
var packageLine = regexp.MustCompile(`^(ok|FAIL|---|\?) ?\s*\t`)

// endTest counts a test. A test with subtests is counted only for a failure of its own.
func (s *summary) endTest(k key, action string) {
	parent := s.parents[k]
	switch action {
	case "pass":
		if !parent {
			s.passed++
		}
	case "skip":
		s.skipped++
		s.reasons[skipReason(s.output[k])]++
	case "fail":
		// The output of a parent is its own; its children's was printed when they ended.
		s.countFailure(k)
		fmt.Fprintf(s.out, "\n%s %s\n%s", k.pkg, k.test, strings.Join(s.output[k], ""))
	}
}

// countFailure counts the failure of a test or package, unless it only tells of one inside that was counted.
func (s *summary) countFailure(k key) {
	if !s.broken[k] {
		s.failed++
	}
	for test := k.test; test != ""; {
		test = test[:max(strings.LastIndexByte(test, '/'), 0)]
		s.broken[key{k.pkg, test}] = true
	}
}

// endPackage notes a package that failed. Its own output matters then: a panic, a timeout, a race outside of a test.
func (s *summary) endPackage(e event) {
	if e.Action != "fail" {
		return
	}
	// It doesn't build, its process ended, or TestMain failed: a failure all the same.
	s.countFailure(key{e.Package, ""})
	fmt.Fprint(s.out, strings.Join(s.builds[e.FailedBuild], ""))
	for _, line := range s.output[key{e.Package, ""}] {
		if !packageLine.MatchString(line) && line != "FAIL\n" {
			fmt.Fprint(s.out, line)
		}
	}
}

// location is how a test's log names the line that printed it.
var location = regexp.MustCompile(`^\s*\S+\.go:\d+: `)

// skipReason finds what t.Skip was given: the last line that is none of go test's own.
func skipReason(output []string) string {
	for _, line := range slices.Backward(output) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "---") || strings.HasPrefix(line, "===") {
			continue
		}
		// A reason that was passed on from the test kernel has two of them.
		for location.MatchString(line) {
			line = location.ReplaceAllString(line, "")
		}
		return line
	}
	return "no reason given"
}

// finish prints the reasons and the counts.
func (s *summary) finish() {
	if len(s.reasons) > 0 {
		fmt.Fprintln(s.out, "\nskipped:")
		var reasons []string
		for reason := range s.reasons {
			reasons = append(reasons, reason)
		}
		slices.Sort(reasons)
		for _, reason := range reasons {
			fmt.Fprintf(s.out, "%6d  %s\n", s.reasons[reason], reason)
		}
	}
	if len(s.slow) > 0 {
		fmt.Fprintln(s.out, "\ntook longest:")
		slices.SortStableFunc(s.slow, func(a, b timed) int { return cmp.Compare(b.seconds, a.seconds) })
		for _, t := range s.slow[:min(len(s.slow), slowMost)] {
			fmt.Fprintf(s.out, "%5.0fs  %s %s\n", t.seconds, t.pkg, t.test)
		}
	}
	fmt.Fprintf(s.out, "\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
}
