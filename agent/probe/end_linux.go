package probe

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// An end is a network namespace without a name and the thread that is in it. The namespace
// lives as long as the thread, its descriptors and its sockets: it is gone when the process is,
// however that ends.
type end struct {
	name  string // "sender" or "receiver"
	ns    *os.File
	calls chan func()
}

// newEnd makes a namespace.
func newEnd(name string) (*end, error) {
	e := &end{name: name, calls: make(chan func())}
	made := make(chan error)
	go e.live(made)
	if err := <-made; err != nil {
		return nil, fmt.Errorf("namespace for the %s: %w", name, err)
	}
	return e, nil
}

// live makes the namespace and runs what do sends, until close.
func (e *end) live(made chan<- error) {
	// Never unlocked: the thread is in the wrong namespace, and ends with its goroutine.
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The runtime never ends the process's first thread, and /proc/PID/ns/net is its
		// namespace. Another thread takes over while this one is occupied.
		moved := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(moved)
			e.serve(made)
		}()
		<-moved
		runtime.UnlockOSThread()
		return
	}
	e.serve(made)
}

func (e *end) serve(made chan<- error) {
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		e.ns, err = os.Open("/proc/thread-self/ns/net")
	}
	made <- err
	if err != nil {
		return
	}
	for f := range e.calls {
		f()
	}
}

// do runs f in the namespace. A socket that f opens stays there, whoever uses it later. f must
// not start goroutines that open more.
func (e *end) do(f func() error) error {
	done := make(chan error, 1)
	e.calls <- func() { done <- f() }
	return <-done
}

// close lets go of the namespace.
func (e *end) close() {
	close(e.calls)
	e.ns.Close()
}
