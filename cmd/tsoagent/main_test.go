package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"tsoagent/cmd/internal/commandtest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"tsoagent": main})
}

// TestScripts runs what touches neither the kernel nor the machine's own run directory.
func TestScripts(t *testing.T) {
	tree, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:  "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": commandtest.Exits},
		Setup: func(env *testscript.Env) error {
			for _, name := range []string{"TSOAGENT_CONFIG", "TSOAGENT_MODE", "TSOAGENT_LOG_FORMAT", "TSOAGENT_DEBUG"} {
				env.Setenv(name, "")
			}
			env.Setenv("TSOAGENT_RUN_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("TREE", tree)
			return nil
		},
	})
}

// TestRunNeedsNetAdmin starts the agent without the capability: it says which one is missing,
// and what to do, and leaves nothing behind.
func TestRunNeedsNetAdmin(t *testing.T) {
	self := commandtest.NewSelf(t, "tsoagent")
	run := filepath.Join(self.Dir, "run")
	if err := os.Chmod(self.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"enforce", "observe"} {
		t.Run(mode, func(t *testing.T) {
			out, text, code := self.Run(t, true, "run", "--mode", mode, "--run-dir", run)
			if code != exitFailed || len(out) > 0 {
				t.Errorf("exit code %d and %q, want %d and nothing", code, out, exitFailed)
			}
			const want = "tsoagent: CAP_NET_ADMIN is missing and you are not root: run it as root"
			if !strings.HasPrefix(text, want) || strings.Count(text, "\n") != 1 {
				t.Errorf("got %q, want one line that begins with %q", text, want)
			}
			if _, err := os.Stat(run); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the run directory: %v, want none", err)
			}
		})
	}
}
