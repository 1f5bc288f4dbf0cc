package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
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
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
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

// exits runs a command and wants an exit code: `exits 2 tsoagent foo`.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exits CODE CMD…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	have := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		have = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if have != want {
		ts.Fatalf("exit code %d, want %d", have, want)
	}
}

// TestRunNeedsNetAdmin starts the agent without the capability: it says which one is missing,
// and what to do, and leaves nothing behind.
func TestRunNeedsNetAdmin(t *testing.T) {
	const nobody = 65534
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	// Everybody may enter the directory, unlike that of t.TempDir.
	dir, err := os.MkdirTemp("", "tsoagent-unprivileged-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin, run := filepath.Join(dir, "tsoagent"), filepath.Join(dir, "run")
	if err := errors.Join(os.Chmod(dir, 0o777), os.WriteFile(bin, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"enforce", "observe"} {
		t.Run(mode, func(t *testing.T) {
			cmd := exec.Command(bin, "run", "--mode", mode, "--run-dir", run)
			cmd.Env = []string{}
			if os.Geteuid() == 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			}
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
				t.Errorf("got %v, want exit code %d", err, exitFailed)
			}
			const want = "tsoagent: CAP_NET_ADMIN is missing and you are not root: run it as root"
			if text := string(out); !strings.HasPrefix(text, want) || strings.Count(text, "\n") != 1 {
				t.Errorf("got %q, want one line that begins with %q", text, want)
			}
			if _, err := os.Stat(run); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the run directory: %v, want none", err)
			}
		})
	}
}
