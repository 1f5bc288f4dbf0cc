package scenario

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespaceDir is where `ip netns` keeps the named network namespaces.
const namespaceDir = "/run/netns"

// inNamespace runs f in a thread of its own inside a named network namespace, or in the present one for "-". A socket that f
// opens stays in that namespace whoever uses it later. f must not start goroutines that open more.
func inNamespace(name string, f func() error) error {
	if name == "-" {
		return f()
	}
	ns, err := os.Open(filepath.Join(namespaceDir, name))
	if err != nil {
		return fmt.Errorf("namespace %s: %w", name, err)
	}
	defer ns.Close()

	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread is in the wrong namespace, and ends with its goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter namespace %s: %w", name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// namespaces returns the names of all named network namespaces, in order.
func namespaces() ([]string, error) {
	entries, err := os.ReadDir(namespaceDir)
	if err != nil {
		return nil, fmt.Errorf("namespaces: %w", err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names, nil
}
