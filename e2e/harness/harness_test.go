package harness

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var harness = Harness{Name: "harness", Wants: "mount and PID namespaces", Settle: func() error { return nil }}

func TestMain(m *testing.M) { harness.Main(m) }

// TestItIsAlone: /proc is that of a PID namespace in which the tests' process is the first one.
func TestItIsAlone(t *testing.T) {
	harness.Need(t, nil)
	self, err := os.Readlink("/proc/self")
	if err != nil || self != "1" || os.Getpid() != 1 {
		t.Errorf("pid %d, /proc/self leads to %q, %v", os.Getpid(), self, err)
	}
	if s, err := os.Stat(harness.WorkDir()); err != nil || !s.IsDir() {
		t.Errorf("a directory %q: %v", harness.WorkDir(), err)
	}
}

// TestWhatIsMissingIsNamed: a test that can't run says of which package what is missing.
func TestWhatIsMissingIsNamed(t *testing.T) {
	for name, h := range map[string]*Harness{"namespaces": {ran: true, missing: "needs namespaces"}, "a program": {ran: true}} {
		s := &skips{TB: t}
		h.Need(s, map[string]string{"no-such-program": "some-package"})
		if want := map[string]string{"namespaces": "needs namespaces", "a program": "some-package"}[name]; !strings.Contains(s.why, want) {
			t.Errorf("%s: %q", name, s.why)
		}
	}
}

// TestWithoutMainNothingRuns: a package that has lost its TestMain must not change the machine's own namespaces.
func TestWithoutMainNothingRuns(t *testing.T) {
	for name, use := range map[string]func(*Harness){
		"Need":    func(h *Harness) { h.Need(t, nil) },
		"WorkDir": func(h *Harness) { _ = h.WorkDir() },
		"Build":   func(h *Harness) { _, _ = h.Build() },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s works without Main", name)
				}
			}()
			use(Network("lost", Loopback))
		}()
	}
}

// TestEachHarnessHasItsMain: the tests of a package may do something ahead of asking the harness for anything.
func TestEachHarnessHasItsMain(t *testing.T) {
	files, err := filepath.Glob("../*/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	makes, runs := map[string]bool{}, map[string]bool{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Dir(file)
		makes[dir] = makes[dir] || regexp.MustCompile(`(?m)^var \w+ = &?harness\.(Harness\{|Network\()`).Match(text)
		runs[dir] = runs[dir] || regexp.MustCompile(`(?m)^func TestMain\(m \*testing\.M\) \{ \w+\.Main\(m\) \}$`).Match(text)
	}
	n := 0
	for dir, is := range makes {
		if !is {
			continue
		}
		if n++; !runs[dir] {
			t.Errorf("%s: no TestMain that calls the harness's Main: its tests would change this machine's own namespaces", dir)
		}
	}
	if n < 7 {
		t.Errorf("only %d packages with a harness are found", n)
	}
}

// skips notes why a test was skipped.
type skips struct {
	testing.TB
	why string
}

func (s *skips) Skip(args ...any)                 { s.why += args[0].(string) }
func (s *skips) Skipf(format string, args ...any) { s.why += args[1].(string) }
