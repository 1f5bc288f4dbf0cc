package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// A Namespace is an open network namespace. It keeps the namespace alive until it is closed. It
// is safe for concurrent use, except for Close.
type Namespace struct {
	file *os.File
	id   ID
}

// ofThread is the namespace of the thread that opens it. /proc/self would be that of the first
// thread, and /proc/thread-self is the calling one (proc(5)).
const ofThread = "/proc/thread-self/ns/net"

// Current opens the namespace of the calling thread.
func Current() (*Namespace, error) { return Open(ofThread) }

// Open opens a namespace by its file. The errors are those of open(2), and ErrNotNetns.
func Open(path string) (*Namespace, error) {
	// Without O_NONBLOCK a FIFO would wait for a writer.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("netns: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	n := &Namespace{file: os.NewFile(uintptr(fd), path)}
	if n.id, err = identify(fd); err != nil {
		return nil, errors.Join(fmt.Errorf("netns: %s: %w", path, err), n.Close())
	}
	return n, nil
}

// identify is the ID of an open network namespace.
func identify(fd int) (ID, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return ID{}, os.NewSyscallError("fstatfs", err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return ID{}, ErrNotNetns
	}
	switch kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); {
	case err != nil:
		return ID{}, os.NewSyscallError("ioctl NS_GET_NSTYPE", err)
	case kind != unix.CLONE_NEWNET:
		return ID{}, ErrNotNetns
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return ID{}, os.NewSyscallError("fstat", err)
	}
	return ID{st.Dev, st.Ino}, nil
}

// Stat is the ID that a path leads to, without opening the namespace, which would keep it alive.
// The error is that of stat(2), or ErrNotNetns. That the namespace is one of networks, and not of
// another kind, only Open sees.
func Stat(path string) (ID, error) {
	var fs unix.Statfs_t
	var st unix.Stat_t
	err := unix.Statfs(path, &fs)
	if err == nil && fs.Type != unix.NSFS_MAGIC {
		return ID{}, fmt.Errorf("netns: %s: %w", path, ErrNotNetns)
	}
	if err == nil {
		err = unix.Stat(path, &st)
	}
	if err != nil {
		return ID{}, fmt.Errorf("netns: %w", &os.PathError{Op: "stat", Path: path, Err: err})
	}
	return ID{st.Dev, st.Ino}, nil
}

// ID is the namespace's identity.
func (n *Namespace) ID() ID { return n.id }

// Path leads to the namespace until it is closed, whatever its names lead to.
func (n *Namespace) Path() string { return "/proc/self/fd/" + strconv.Itoa(int(n.file.Fd())) }

// Close lets go of the namespace.
func (n *Namespace) Close() error { return n.file.Close() }

// here reports whether the calling thread is in the namespace.
func (n *Namespace) here() bool {
	id, err := Stat(ofThread)
	return err == nil && id == n.id
}

// Do runs fn on a thread that is in the namespace, and waits for it. Sockets belong to the
// namespace of the thread that opens them, for ever, and paths under /proc/sys/net are looked up
// in that of the thread that opens them (net_ctl_header_lookup, net/sysctl_net.c); both can be
// used on any thread afterwards. Goroutines that fn starts are elsewhere.
//
// Entering another namespace needs CAP_SYS_ADMIN (setns(2)): the error is os.ErrPermission. In
// its own namespace fn needs nothing.
func (n *Namespace) Do(fn func() error) error {
	runtime.LockOSThread()
	if n.here() {
		defer runtime.UnlockOSThread()
		return fn()
	}
	runtime.UnlockOSThread()
	done := make(chan error, 1)
	go func() { done <- n.visit(fn) }()
	return <-done
}

// visit runs fn in the namespace on the calling goroutine, which is to end after it: a thread
// that can't go home stays locked to it, and ends with it.
func (n *Namespace) visit(fn func() error) error {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// /proc/PID/ns/net is the namespace of the process's first thread, and by that others move devices to a process or enter where it is. Nor
		// does the runtime ever end that thread. Another one takes over while it is occupied.
		done := make(chan error, 1)
		go func() { done <- n.visit(fn) }()
		err := <-done
		runtime.UnlockOSThread()
		return err
	}
	home, err := Current()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		err = fmt.Errorf("netns: enter %s: %w", n.file.Name(), os.NewSyscallError("setns", err))
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w (CAP_SYS_ADMIN is missing)", err)
		}
		return err
	}
	err = fn()
	if back := unix.Setns(int(home.file.Fd()), unix.CLONE_NEWNET); back != nil {
		return err // the goroutine ends, and the thread with it
	}
	runtime.UnlockOSThread()
	return err
}

// Processes calls fn with each network namespace that a process is in, once, and with one such
// process, until fn returns false. Whoever may not look at a process does not see its namespace.
// fn must not keep the namespace.
func Processes(fn func(pid int, ns *Namespace) bool) error {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("netns: list the processes: %w", err)
	}
	seen := map[ID]bool{}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		ns, err := Open("/proc/" + d.Name() + "/ns/net")
		if err != nil {
			continue // it ended, or is not ours to look at
		}
		more := seen[ns.id] || fn(pid, ns)
		seen[ns.id] = true
		_ = ns.Close()
		if !more {
			break
		}
	}
	return nil
}
