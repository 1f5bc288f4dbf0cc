// Package service runs this project's binaries as a machine does: under a real systemd, scraped by a real Prometheus, and with a real browser
// on the status page. Like the rest of e2e it knows the binaries only.
package service

import (
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

// inside tells the test program that it runs in the namespaces that were made for it.
const inside = "TSOAGENT_SERVICE_INSIDE"

// missing is why this machine can't run the tests that need namespaces, or empty.
var missing string

// workDir holds the binaries.
var workDir string

// patience is how long anything may take on a machine that is busy.
const patience = 60 * time.Second

// TestMain runs the tests in a process with a mount, a PID and a network namespace of its own: addresses on the loopback device are nobody else's, and
// whatever ends that process ends everything that it has started.
func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Getenv(inside) == "" {
			if os.Geteuid() != 0 {
				missing = "needs root, for namespaces"
				return m.Run()
			}
			code, err := again()
			if errors.Is(err, unix.EPERM) {
				missing = fmt.Sprintf("needs mount, PID and network namespaces: %v", err)
				return m.Run()
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, "service:", err)
			}
			return code
		}
		dir, err := os.MkdirTemp("", "tsoagent-service-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		workDir = dir
		if err := settle(); err != nil {
			missing = fmt.Sprintf("needs mount, PID and network namespaces: %v", err)
		}
		return m.Run()
	}())
}

// again runs this program again, in the namespaces, and returns its exit code. The error is EPERM if we may not make them.
func again() (int, error) {
	// The signal that ends the other one with this one comes when the thread ends that started it.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: unix.CLONE_NEWNS, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
	}
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

// settle gives this process a /proc of its PID namespace and a loopback device that is up.
func settle() error {
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}

// need skips the test where the machine lacks namespaces, or one of the Debian packages, each named with a program of its own.
func need(t *testing.T, programs map[string]string) {
	t.Helper()
	if missing != "" {
		t.Skip(missing)
	}
	needPrograms(t, programs)
}

func needPrograms(t *testing.T, programs map[string]string) {
	t.Helper()
	for program, pkg := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s, which Debian's package %s has (tools/install)", program, pkg)
		}
	}
}

// stage is the tree as `make install` installs it, made once.
var stage = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(workDir, "stage")
	cmd := exec.Command("make", "-C", "../..", "install", "VCS=false", "DESTDIR="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make install: %w: %s", err, out)
	}
	return dir, nil
})

func mustStage(t *testing.T) string {
	t.Helper()
	dir, err := stage()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// within waits until ok, and fails the test if that doesn't come.
func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}
