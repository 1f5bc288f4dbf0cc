package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"tsoagent/cmd/internal/commandtest"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(holdVariable); role != "" {
		if err := hold(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testscript.Main(m, map[string]func(){"tsoctl": main})
}

// TestScripts runs what needs neither privileges nor a network namespace.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata/script",
		Setup: clean,
		Cmds:  map[string]func(*testscript.TestScript, bool, []string){"exits": commandtest.Exits},
	})
}

// TestWithAgent runs both commands in throw-away network namespaces of this kernel. It has
// XFRM policies in any case; ESP states it may lack, so the scripts presume an MTU.
func TestWithAgent(t *testing.T) {
	needNamespaces(t)
	bin := buildCommands(t)
	testscript.Run(t, testscript.Params{
		Dir:  "testdata/agent",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": commandtest.Exits, "printable": commandtest.Printable},
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", bin+string(filepath.ListSeparator)+env.Getenv("PATH"))
			ns, err := newNamespace()
			if err != nil {
				return err
			}
			env.Defer(func() { ns.Close() })
			env.Setenv("NS", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()))
			return clean(env)
		},
	})
}

func needNamespaces(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: no network namespace can be made")
	}
	for _, tool := range []string{"ip", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is missing (packages iproute2, util-linux)", tool)
		}
	}
}

// buildCommands returns a directory with both commands.
func buildCommands(t testing.TB) string {
	t.Helper()
	bin := t.TempDir()
	build := exec.Command("go", "build", "-buildvcs=false", "-o", bin, "tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as the Makefile does, and without a compiler of C
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the commands: %v\n%s", err, out)
	}
	return bin
}

// newNamespace makes a network namespace that lives as long as its file.
func newNamespace() (*os.File, error) {
	type result struct {
		file *os.File
		err  error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{nil, fmt.Errorf("unshare: %w", err)}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		made <- result{f, err}
	}()
	r := <-made
	return r.file, r.err
}

// clean keeps the caller's environment out. Each script has a run directory of its own, so
// that no agent of this machine is asked.
func clean(env *testscript.Env) error {
	for _, name := range []string{"TSOCTL_OUTPUT", "TSOAGENT_CONFIG"} {
		env.Setenv(name, "")
	}
	env.Setenv("TSOAGENT_RUN_DIR", filepath.Join(env.WorkDir, "run"))
	return nil
}

// TestUnprivileged runs the commands without any capability, as a user who is not root.
func TestUnprivileged(t *testing.T) {
	self := commandtest.NewSelf(t, "tsoctl")
	dir := self.Dir
	closed := filepath.Join(dir, "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	root := os.Geteuid() == 0
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"plan", []string{"--run-dir", filepath.Join(dir, "none"), "plan"}, "tsoctl: CAP_NET_ADMIN is missing and you are not root"},
		{"restore", []string{"--run-dir", filepath.Join(dir, "none"), "restore"}, "tsoctl: CAP_NET_ADMIN is missing and you are not root"},
		{"flows", []string{"--run-dir", filepath.Join(dir, "none"), "flows"}, "tsoctl: CAP_NET_ADMIN is missing and you are not root: run it as root"},
		{"verify", []string{"--run-dir", filepath.Join(dir, "none"), "verify"}, "tsoctl: CAP_NET_ADMIN is missing and you are not root"},
		{"doctor", []string{"--run-dir", filepath.Join(dir, "none"), "doctor"}, "tsoctl: CAP_NET_ADMIN is missing and you are not root"},
		{"flows of somebody else's agent", []string{"--run-dir", closed, "flows"}, "is not yours to open: run it as root"},
		{"closed run directory", []string{"--run-dir", closed, "status"}, "is not yours to open: run it as root"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if slices.Contains(tt.args, closed) && !root {
				t.Skip("not root: no directory of somebody else can be made")
			}
			out, text, code := self.Run(t, true, tt.args...)
			if code != exitFailed || len(out) > 0 {
				t.Errorf("exit code %d and %q, want %d and nothing", code, out, exitFailed)
			}
			if !strings.Contains(text, tt.want) || strings.Count(text, "\n") != 1 {
				t.Errorf("got %q, want one line with %q", text, tt.want)
			}
		})
	}
}
