package harness

import (
	"os"
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
	for name, h := range map[string]*Harness{"namespaces": {missing: "needs namespaces"}, "a program": {}} {
		s := &skips{TB: t}
		h.Need(s, map[string]string{"no-such-program": "some-package"})
		if want := map[string]string{"namespaces": "needs namespaces", "a program": "some-package"}[name]; !strings.Contains(s.why, want) {
			t.Errorf("%s: %q", name, s.why)
		}
	}
}

// skips notes why a test was skipped.
type skips struct {
	testing.TB
	why string
}

func (s *skips) Skip(args ...any)                 { s.why += args[0].(string) }
func (s *skips) Skipf(format string, args ...any) { s.why += args[1].(string) }
