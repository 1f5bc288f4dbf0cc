package sockbpf

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// readSize is what one read asks for. The kernel gives no more than eight pages at once (bpf_iter_prepare_seq_file).
const readSize = 64 << 10

// Iter lists TCP sockets. It is safe for concurrent use, except for Close.
type Iter struct {
	program *ebpf.Program
	link    *link.Iter
}

// Open loads the program of the iterator. It needs CAP_BPF and CAP_PERFMON, and no more; without them the error is os.ErrPermission.
// Where the kernel has no BTF or no iterator over TCP sockets it is ErrUnsupported.
func Open() (*Iter, error) {
	k, err := readKernel()
	if err != nil {
		return nil, err
	}
	if !k.hasFunc("bpf_iter_tcp") {
		return nil, fmt.Errorf("sockbpf: no BPF iterator over TCP sockets (bpf_iter_tcp; Linux 5.9 with CONFIG_BPF_SYSCALL, CONFIG_PROC_FS): %w",
			ErrUnsupported)
	}
	var objects connsObjects
	if err := loadConnsObjects(&objects, k.options()); err != nil {
		return nil, explain("load the iterator over TCP sockets", err)
	}
	l, err := link.AttachIter(link.IterOptions{Program: objects.Conns})
	if err != nil {
		return nil, errors.Join(explain("attach the iterator over TCP sockets", err), objects.Close())
	}
	return &Iter{program: objects.Conns, link: l}, nil
}

// Close unloads the program.
func (it *Iter) Close() error { return errors.Join(it.link.Close(), it.program.Close()) }

// Each calls fn with each TCP socket, IPv4's and IPv6's, of the calling thread's network namespace until fn returns false: the kernel takes
// the namespace of whoever creates the iterator, which happens here and not in Open (bpf_iter_init_seq_net, fs/proc/proc_net.c). A goroutine
// that entered another namespace is locked to its thread anyway.
//
// Listeners, requests and TIME_WAIT are among them; sockets that are bound and neither listen nor connect aren't. It is no snapshot:
// sockets come and go meanwhile. A connection that lives all the time is there, except that kernels before 6.16 can leave one out, or
// show it twice, when its hash bucket changes between two reads.
func (it *Iter) Each(fn func(sockopt.Conn) bool) error {
	r, err := it.link.Open()
	if err != nil {
		return explain("start the iterator over TCP sockets", err)
	}
	defer r.Close()
	buf := make([]byte, readSize)
	rest := 0
	for {
		n, err := r.Read(buf[rest:])
		switch {
		case errors.Is(err, io.EOF):
			if rest > 0 {
				return fmt.Errorf("sockbpf: the last socket's record has %d bytes, not %d", rest, connSize)
			}
			return nil
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue // a million sockets of other namespaces: it goes on after them
		case err != nil:
			return fmt.Errorf("sockbpf: read the TCP sockets: %w", err)
		}
		left, more, err := decodeConns(buf[:rest+n], fn)
		if err != nil || !more {
			return err
		}
		rest = copy(buf, left)
	}
}
