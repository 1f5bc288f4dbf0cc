// Package harness runs a package's tests in a process with namespaces of its own: what they change is nobody else's, and whatever ends that
// process ends everything that it has started. It is for tests that run this project's binaries on the host's kernel.
package harness

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Harness is how one package runs its tests. Its fields are set before Main, and not changed any more then.
type Harness struct {
	// Name is the package's. Directories, messages and the variable that tells the process of the tests from the first one are named by it.
	Name string
	// More are the namespaces beside those of mounts and PIDs (CLONE_NEW…), which Wants names all for people.
	More  uintptr
	Wants string
	// Settle makes the namespaces fit to be used. /proc is there already.
	Settle func() error

	missing, workDir string
	ran              bool // Main was called
}

// Network returns a harness whose tests have a network namespace of their own, too, in which their addresses, routes and devices are nobody else's.
func Network(name string, settle func() error) *Harness {
	return &Harness{Name: name, More: unix.CLONE_NEWNET, Wants: "mount, PID and network namespaces", Settle: settle}
}

// Loopback sets the loopback device up. It is a Settle.
func Loopback() error {
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}

// EmptyRun hides what the machine has in /run. It is a Settle.
func EmptyRun() error { return unix.Mount("tmpfs", "/run", "tmpfs", 0, "") }

// Build builds commands of this project as the Makefile does, into a directory of WorkDir, which it returns. The words are those behind `go build -o`:
// flags and packages.
func (h *Harness) Build(words ...string) (string, error) {
	bin := filepath.Join(h.WorkDir(), "bin")
	cmd := exec.Command("go", append([]string{"build", "-buildvcs=false", "-o", bin + "/"}, words...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return bin, nil
}

// Within waits until ok, and fails the test if that doesn't come within d.
func Within(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

// A Log is what a program says. It is safe for concurrent use.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String is all that was said so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Missing is why this machine can't run the tests that need the namespaces, or empty.
func (h *Harness) Missing() string { return h.missing }

// WorkDir holds what is built for all tests. It is empty where the namespaces are missing.
func (h *Harness) WorkDir() string {
	h.mustRun()
	return h.workDir
}

// Main is for TestMain: it runs the tests, and ends the process. Without it they would change the machine's own namespaces.
func (h *Harness) Main(m *testing.M) {
	h.ran = true
	os.Exit(h.run(m))
}

// mustRun ends a program whose TestMain doesn't call Main, ahead of the first command that a test runs.
func (h *Harness) mustRun() {
	if !h.ran {
		panic("TestMain of " + h.Name + " doesn't call Main: its tests would run in this machine's own namespaces")
	}
}

func (h *Harness) run(m *testing.M) int {
	inside := "TSOAGENT_HARNESS_" + h.Name
	if os.Getenv(inside) == "" {
		if os.Geteuid() != 0 {
			h.missing = "needs root, for namespaces"
			return m.Run()
		}
		code, err := again(inside, h.More)
		if errors.Is(err, unix.EPERM) {
			h.missing = fmt.Sprintf("needs %s: %v", h.Wants, err)
			return m.Run()
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", h.Name, err)
		}
		return code
	}
	dir, err := os.MkdirTemp("", "tsoagent-"+h.Name+"-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	h.workDir = dir
	err = unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if err != nil {
		err = fmt.Errorf("mount /proc: %w", err)
	} else {
		err = h.Settle()
	}
	if err != nil {
		h.missing = fmt.Sprintf("needs %s: %v", h.Wants, err)
	}
	return m.Run()
}

// again runs this program again, in the namespaces, and returns its exit code. The error is EPERM if we may not make them.
func again(inside string, more uintptr) (int, error) {
	// The signal that ends the other one with this one comes when the thread ends that started it.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Cloneflags: unix.CLONE_NEWPID | more, Pdeathsig: syscall.SIGKILL}
	// Who asks this one for a stack or to end means the other.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGQUIT, syscall.SIGTERM, os.Interrupt)
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended already
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		err = nil // it has said itself what was wrong
	}
	return cmd.ProcessState.ExitCode(), err
}

// Need skips the test where the machine lacks the namespaces, or one of the Debian packages, each named with a program of its own.
func (h *Harness) Need(t testing.TB, programs map[string]string) {
	t.Helper()
	h.mustRun()
	if h.missing != "" {
		t.Skip(h.missing)
	}
	NeedPrograms(t, programs)
}

// NeedPrograms skips the test where the machine lacks one of the Debian packages, each named with a program of its own.
func NeedPrograms(t testing.TB, programs map[string]string) {
	t.Helper()
	for program, pkg := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s, which Debian's package %s has (tools/install)", program, pkg)
		}
	}
}
