// Package peers runs this project's binaries beside real BGP daemons with TCP-MD5: FRR, BIRD and GoBGP, in network namespaces on the
// host's kernel. Like the rest of e2e it knows the binaries only.
package peers

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

	"golang.org/x/sys/unix"
)

// inside tells the test program that it runs in the namespaces that were made for it.
const inside = "TSOAGENT_PEERS_INSIDE"

// missing is why this machine can't run the tests at all, or empty.
var missing string

// workDir holds the binaries.
var workDir string

// TestMain runs the tests in a process with a mount and a PID namespace of its own: network namespaces have their names where nobody else
// sees them, and whatever ends that process ends every daemon and namespace with it.
func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Getenv(inside) == "" {
			if os.Geteuid() != 0 {
				missing = "needs root, for namespaces"
				return m.Run()
			}
			code, err := again()
			if errors.Is(err, unix.EPERM) {
				missing = fmt.Sprintf("needs mount and PID namespaces: %v", err)
				return m.Run()
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, "peers:", err)
			}
			return code
		}
		dir, err := os.MkdirTemp("", "tsoagent-peers-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		workDir = dir
		if err := hideMounts(); err != nil {
			missing = fmt.Sprintf("needs mount and PID namespaces: %v", err)
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
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Cloneflags: unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	// Who asks this one for a stack or to end means the other.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGQUIT, syscall.SIGTERM, os.Interrupt)
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	go func() {
		for s := range signals {
			// It may have ended already.
			_ = cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		err = nil // it has said itself what was wrong
	}
	return cmd.ProcessState.ExitCode(), err
}

// hideMounts gives this process's mount namespace a /proc of its PID namespace, and nothing in the directories that ip netns and FRR keep
// their files in.
func hideMounts() error {
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, dir := range []string{"/run/netns", "/var/tmp"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// need skips the test where the machine lacks what all of them need, or one of the Debian packages, each named with a program of its own.
func need(t *testing.T, programs map[string]string) {
	t.Helper()
	if missing != "" {
		t.Skip(missing)
	}
	if err := signs(); err != nil {
		t.Skipf("needs TCP-MD5 in the kernel, CONFIG_TCP_MD5SIG: %v", err)
	}
	for program, pkg := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s, which Debian's package %s has (tools/install)", program, pkg)
		}
	}
}

// signs sets a key on a socket that goes nowhere. The error says that the kernel can't.
func signs() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	key := unix.TCPMD5Sig{Keylen: 1}
	key.Addr.Family = unix.AF_INET
	return unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &key)
}

// needTruth skips the test where the kernel doesn't let its sockets be read.
func needTruth(t *testing.T) {
	t.Helper()
	const btf = "/sys/kernel/btf/vmlinux"
	if _, err := os.Stat(btf); err != nil {
		t.Skipf("needs the kernel's BTF, CONFIG_DEBUG_INFO_BTF: %v", err)
	}
}

// commands builds tsoagent and tsoctl once and returns their directory.
var commands = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(workDir, "bin")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return dir, nil
})
