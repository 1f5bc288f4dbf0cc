// Package netnstest gives tests a machine of their own as far as namespaces go: names under
// /run/netns that nobody else sees, and a network namespace that stands for the host's.
package netnstest

import (
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Enter moves the test's thread into a new network namespace until the test ends, and returns the namespace, which goes with the last thing that uses
// it, also when the test fails. It skips the test where there can be none, or where a program that the test uses is missing.
func Enter(t testing.TB, programs ...string) *os.File {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s (tools/install gets it)", program)
		}
	}
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		home.Close()
		t.Skipf("needs network namespaces: %v", err)
	}
	t.Cleanup(func() {
		defer home.Close()
		// A thread that can't go home stays locked, and ends with the goroutine.
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Errorf("leave the namespace: %v", err)
			return
		}
		runtime.UnlockOSThread()
	})
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	return own
}

// private tells a test that it runs in the process that was made for it.
const private = "TSOAGENT_NETNSTEST"

// Private runs a test again in a process with a mount and a network namespace of its own, where
// /run is empty and nothing is left behind. It is true there. In the first process it is false,
// and the test has the other's result.
func Private(t *testing.T) bool {
	t.Helper()
	if os.Getenv(private) == t.Name() {
		if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
			t.Fatalf("mount /run: %v", err)
		}
		IP(t, "link set lo up")
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for mount and network namespaces")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs iproute2")
	}
	args := []string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.count=1"}
	if deadline, ok := t.Deadline(); ok {
		args = append(args, "-test.timeout="+time.Until(deadline).String())
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), private+"="+t.Name())
	// With Unshareflags the mounts are made private, too (syscall.forkAndExecInChild1).
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	// The signal comes when the thread ends that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	switch {
	case err != nil && strings.Contains(err.Error(), "operation not permitted"):
		t.Skipf("needs mount and network namespaces: %v", err)
	case err != nil:
		t.Fatalf("%v\n%s", err, out)
	case strings.Contains(string(out), "--- SKIP: "):
		t.Skip(skippedFor(string(out)))
	case !strings.Contains(string(out), "--- PASS: "+t.Name()):
		t.Fatalf("the test did not run in its own process:\n%s", out)
	}
	return false
}

// skippedFor is the reason that a test gives for being skipped: the line with its place, `file_test.go:12: reason`, ahead of what
// says that it is.
func skippedFor(out string) string {
	lines := strings.Split(out, "\n")
	for i, line := range lines {
		if !strings.Contains(line, "--- SKIP: ") {
			continue
		}
		for _, near := range []int{i + 1, i - 1} { // go test prints it behind, or with -v ahead
			if near < 0 || near >= len(lines) {
				continue
			}
			if _, reason, ok := strings.Cut(lines[near], "_test.go:"); ok {
				_, reason, _ = strings.Cut(reason, ": ")
				return reason
			}
		}
	}
	return "skipped in its own process:\n" + out
}

// IP runs lines of iproute2 commands. It is for tests that called Private.
func IP(t *testing.T, lines string) {
	t.Helper()
	mustBePrivate(t)
	for line := range strings.Lines(lines) {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v\n%s", strings.TrimSpace(line), err, out)
		}
	}
}

// Show is the output of an iproute2 command.
func Show(t *testing.T, args string) string {
	t.Helper()
	mustBePrivate(t)
	out, err := exec.Command("ip", strings.Fields(args)...).Output()
	if err != nil {
		t.Fatalf("ip %s: %v", args, err)
	}
	return strings.TrimSpace(string(out))
}

func mustBePrivate(t *testing.T) {
	t.Helper()
	if os.Getenv(private) != t.Name() {
		t.Fatal("a test would change the machine's own namespaces")
	}
}

// Live starts a process in a namespace, "" for the test's own, that ends with the test or by the
// function that is returned, which waits for it.
func Live(t *testing.T, name string) (pid int, end func()) {
	t.Helper()
	mustBePrivate(t)
	args := []string{"sleep", "600"}
	if name != "" {
		args = append([]string{"ip", "netns", "exec", name}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Cleanup(end)
	// `ip netns exec` enters the namespace and becomes the program then.
	for deadline := time.Now().Add(20 * time.Second); ; {
		if b, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/comm"); err == nil && string(b) == "sleep\n" {
			return cmd.Process.Pid, end
		}
		if time.Now().After(deadline) {
			t.Fatal("the process does not start")
		}
		time.Sleep(time.Millisecond)
	}
}

// Within waits until a condition holds, at most 30 seconds.
func Within(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}
