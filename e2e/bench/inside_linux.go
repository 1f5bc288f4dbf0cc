package bench

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// inside tells this program that it runs in the namespaces that were made for it.
const inside = "TSOAGENT_BENCH_INSIDE"

// Inside reports whether this process is in namespaces of its own.
func Inside() bool { return os.Getenv(inside) != "" }

// Again runs this program again with a network, mount and PID namespace of its own, and returns its exit code. Whatever ends that process
// ends all that it has started, and with that the namespaces: nothing is left behind.
func Again() (int, error) {
	// The signal that ends the other one with this one comes when the thread ends that started it.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	go func() {
		<-signals
		_ = cmd.Process.Kill() // it may have ended
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil // it has said itself what was wrong
	}
	return max(cmd.ProcessState.ExitCode(), 0), err
}

// Settle gives this process's mount namespace a /proc and a /sys of its own namespaces.
func Settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount /", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return os.NewSyscallError("mount /proc", err)
	}
	return os.NewSyscallError("mount /run", unix.Mount("tmpfs", "/run", "tmpfs", 0, ""))
}
