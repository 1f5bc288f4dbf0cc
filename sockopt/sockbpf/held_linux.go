package sockbpf

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// HeldIter lists the keys that sockets hold. It is safe for concurrent use: Close waits for lists that are being made.
type HeldIter struct {
	mu      sync.RWMutex
	program *ebpf.Program // nil when it is closed
	link    *link.Iter
}

// OpenHeld loads the program of the iterator, for TCP-AO's keys, which sock_diag doesn't show, and, if asked to, TCP-MD5's. It needs what Open
// needs. Where the kernel knows no TCP-AO and that is all that is asked for, the error is ErrUnsupported.
func OpenHeld(md5 bool) (*HeldIter, error) {
	return openHeldOf(md5, func(string) bool { return false })
}

// openHeldOf takes it for granted that the kernel has some functions.
func openHeldOf(md5 bool, granted func(function string) bool) (*HeldIter, error) {
	k, err := readKernel()
	if err != nil {
		return nil, err
	}
	has := func(name string) bool { return granted(name) || k.hasFunc(name) }
	switch { // what is not there costs nothing to look for
	case !md5 && !has("tcp_parse_ao"):
		return nil, fmt.Errorf("sockbpf: no TCP-AO (Linux 6.7 with CONFIG_TCP_AO): %w", ErrUnsupported)
	case !has("bpf_iter_tcp"):
		return nil, fmt.Errorf("sockbpf: no BPF iterator over TCP sockets (bpf_iter_tcp; Linux 5.9 with CONFIG_BPF_SYSCALL, CONFIG_PROC_FS): %w",
			ErrUnsupported)
	}
	spec, err := loadHeld()
	if err != nil {
		return nil, fmt.Errorf("sockbpf: %w", err)
	}
	if err := spec.Variables[heldVarWithMd5].Set(md5); err != nil {
		return nil, fmt.Errorf("sockbpf: %w", err)
	}
	var objects heldObjects
	if err := spec.LoadAndAssign(&objects, k.options()); err != nil {
		return nil, explain("load the iterator over TCP keys", err)
	}
	l, err := link.AttachIter(link.IterOptions{Program: objects.Held})
	if err != nil {
		return nil, errors.Join(explain("attach the iterator over TCP keys", err), objects.Close())
	}
	// The program keeps its map.
	return &HeldIter{program: objects.Held, link: l}, objects.heldMaps.Close()
}

// Close unloads the program.
func (it *HeldIter) Close() error {
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.program == nil {
		return nil
	}
	err := errors.Join(it.link.Close(), it.program.Close())
	it.program = nil
	return err
}

// Keys are the keys of the sockets in the calling thread's network namespace, in the order of Key.Compare. hidden counts the sockets that have
// more keys than are told, 300. After Close the error is os.ErrClosed.
func (it *HeldIter) Keys() (keys []sockopt.Key, hidden int, err error) {
	it.mu.RLock()
	defer it.mu.RUnlock()
	if it.program == nil {
		return nil, 0, os.ErrClosed
	}
	r, err := it.link.Open()
	if err != nil {
		return nil, 0, explain("start the iterator over TCP keys", err)
	}
	defer r.Close()
	var held []sockopt.Held
	buf := make([]byte, readSize)
	rest := 0
	for {
		n, err := r.Read(buf[rest:])
		switch {
		case errors.Is(err, io.EOF):
			if rest > 0 {
				return nil, 0, fmt.Errorf("sockbpf: the last key's record has %d bytes, not %d", rest, heldSize)
			}
			return sockopt.KeysOf(slices.Values(held)), hidden, nil
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue // a million sockets of other namespaces: it goes on after them
		case err != nil:
			return nil, 0, fmt.Errorf("sockbpf: read the TCP keys: %w", err)
		}
		left, err := decodeHeld(buf[:rest+n], func(h sockopt.Held, more bool) {
			held = append(held, h)
			if more {
				hidden++
			}
		})
		if err != nil {
			return nil, 0, err
		}
		rest = copy(buf, left)
	}
}
