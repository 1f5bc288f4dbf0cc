package bench

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// sock is a netlink socket in the simplest way: blocking system calls, one buffer. It is for one goroutine.
type sock struct {
	fd  int
	seq uint32
	buf []byte

	// sent, if not nil, is called ahead of each system call of a batch, with the number of the first message behind it.
	sent func(next int)
}

// rcvbuf holds what a storm may leave unread for a moment.
const rcvbuf = 64 << 20

// dial opens a socket and joins groups by number.
func dial(protocol int, groups ...int) (*sock, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	s := &sock{fd: fd, buf: make([]byte, 256<<10)}
	if err := s.prepare(groups); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return s, nil
}

func (s *sock) prepare(groups []int) error {
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, rcvbuf); err != nil {
		return os.NewSyscallError("setsockopt SO_RCVBUFFORCE", err)
	}
	if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1); err != nil {
		return os.NewSyscallError("setsockopt NETLINK_CAP_ACK", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return os.NewSyscallError("setsockopt NETLINK_ADD_MEMBERSHIP", err)
		}
	}
	return nil
}

func (s *sock) close() { unix.Close(s.fd) }

// onlyProtocol has the kernel keep all notifications of routes from this socket but those of routes with that protocol. A notification is
// alone in its datagram.
func (s *sock) onlyProtocol(protocol byte) error {
	const protocolAt = unix.NLMSG_HDRLEN + 5 // of rtm_protocol
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: protocolAt},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(protocol), Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1},
		{Code: unix.BPF_RET | unix.BPF_K},
	}
	err := unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", err)
}

// patience bounds how long a receive waits, 0 for ever.
func (s *sock) patience(d time.Duration) error {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	return os.NewSyscallError("setsockopt SO_RCVTIMEO", unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
}

// header is of a message that came.
type header struct {
	typ, flags uint16
	seq, port  uint32
}

// receive reads one datagram and calls f for each message in it, until f returns false.
func (s *sock) receive(f func(header, []byte) bool) error {
	n, err := s.datagram()
	if err != nil {
		return err
	}
	for b := s.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
		l := int(ne.Uint32(b))
		if l < unix.NLMSG_HDRLEN || l > len(b) {
			return errors.New("a message with a wrong length")
		}
		if !f(header{ne.Uint16(b[4:]), ne.Uint16(b[6:]), ne.Uint32(b[8:]), ne.Uint32(b[12:])}, b[unix.NLMSG_HDRLEN:l]) {
			return nil
		}
		b = b[min((l+3)&^3, len(b)):]
	}
	return nil
}

func (s *sock) datagram() (int, error) {
	for {
		n, _, err := unix.Recvfrom(s.fd, s.buf, 0)
		if err != unix.EINTR {
			return n, os.NewSyscallError("recvfrom", err)
		}
	}
}

// acked waits for the acknowledgement of seq, or the first error.
func (s *sock) acked(seq uint32) error {
	for done := false; !done; {
		var failed error
		err := s.receive(func(h header, b []byte) bool {
			if h.typ != unix.NLMSG_ERROR || len(b) < 4 {
				return true
			}
			if errno := int32(ne.Uint32(b)); errno != 0 {
				failed = fmt.Errorf("message %d of the batch: %w", h.seq, unix.Errno(-errno))
			}
			done = failed != nil || h.seq == seq
			return !done
		})
		if err := errors.Join(failed, err); err != nil {
			return err
		}
	}
	return nil
}

// batchBytes is how much one send carries: the kernel handles it in one go. It is some seventy routes, a fraction of a millisecond.
const batchBytes = 4 << 10

// batch sends n messages, many in one system call. Only the last of each call is acknowledged; what fails always is.
func (s *sock) batch(n int, typ, flags uint16, fill func(i int, b []byte) []byte) error {
	b := make([]byte, 0, batchBytes+1024)
	for i := 0; i < n; {
		b = b[:0]
		last := 0
		for ; i < n && len(b) < batchBytes; i++ {
			s.seq++
			last = len(b)
			b = message(b, typ, flags, s.seq, func(b []byte) []byte { return fill(i, b) })
		}
		ne.PutUint16(b[last+6:], ne.Uint16(b[last+6:])|unix.NLM_F_ACK)
		if s.sent != nil {
			s.sent(i)
		}
		if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return os.NewSyscallError("sendto", err)
		}
		if err := s.acked(s.seq); err != nil {
			return fmt.Errorf("after %d of %d: %w", i, n, err)
		}
	}
	return nil
}
