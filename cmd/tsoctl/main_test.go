package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
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
		Cmds:  map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// TestWithAgent runs both commands in throw-away network namespaces of this kernel. It has
// XFRM policies in any case; ESP states it may lack, so the scripts presume an MTU.
func TestWithAgent(t *testing.T) {
	needNamespaces(t)
	bin := buildCommands(t)
	testscript.Run(t, testscript.Params{
		Dir:  "testdata/agent",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
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

// exits runs a command and wants an exit code: `exits 2 tsoctl foo`.
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

// TestUnprivileged runs the commands without any capability, as a user who is not root.
func TestUnprivileged(t *testing.T) {
	const nobody = 65534
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	// Everybody may enter the directory, unlike that of t.TempDir.
	dir, err := os.MkdirTemp("", "tsoctl-unprivileged-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin := filepath.Join(dir, "tsoctl")
	closed := filepath.Join(dir, "closed")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(bin, self, 0o755), os.Mkdir(closed, 0o700)); err != nil {
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
			cmd := exec.Command(bin, tt.args...)
			cmd.Env = []string{}
			if root {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			}
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
				t.Errorf("got %v, want exit code %d", err, exitFailed)
			}
			if text := string(out); !strings.Contains(text, tt.want) || strings.Count(text, "\n") != 1 {
				t.Errorf("got %q, want one line with %q", text, tt.want)
			}
		})
	}
}
