package xfrmwatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// sock is a netlink connection that is read datagram by datagram into one buffer, without
// waiting where that is asked for. mdlayher/netlink opens, binds and closes it; its own Receive
// waits always and allocates for each datagram.
type sock struct {
	conn *netlink.Conn
	raw  syscall.RawConn
	buf  []byte
}

var (
	errEmpty = errors.New("nothing to read")
	// errTruncated says that a datagram was larger than the buffer; the rest of it is lost.
	errTruncated = errors.New("datagram is larger than the buffer")
)

// bufferSize holds the largest datagram: a dump fills at most 32 KiB (netlink_recvmsg, which
// limits max_recvmsg_len), an event is one message.
const bufferSize = 64 << 10

func dialSock(netns int) (*sock, error) {
	conn, err := netlink.Dial(unix.NETLINK_XFRM, &netlink.Config{NetNS: netns})
	if err != nil {
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			return nil, fmt.Errorf("this kernel has no XFRM netlink (CONFIG_XFRM_USER): %w", err)
		}
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &sock{conn: conn, raw: raw, buf: make([]byte, bufferSize)}, nil
}

// receive returns the next datagram, which is valid until the next call. Without wait it returns
// errEmpty where there is none. A deadline in the past interrupts it.
func (s *sock) receive(wait bool) ([]byte, error) {
	var n int
	var from unix.Sockaddr
	var err error
	ioErr := s.raw.Read(func(fd uintptr) bool {
		for {
			n, from, err = unix.Recvfrom(int(fd), s.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			if err != unix.EINTR {
				break
			}
		}
		return err != unix.EAGAIN || !wait
	})
	switch {
	case errors.Is(ioErr, os.ErrDeadlineExceeded):
		return nil, ioErr
	case ioErr != nil: // internal/poll has an error of its own for a closed file
		return nil, fmt.Errorf("receive: %w: %w", os.ErrClosed, ioErr)
	case err == unix.EAGAIN:
		return nil, errEmpty
	case err != nil:
		return nil, fmt.Errorf("receive: %w", err)
	case n > len(s.buf):
		return nil, errTruncated
	}
	if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 {
		return nil, nil // not from the kernel
	}
	return s.buf[:n], nil
}

func (s *sock) setReadDeadline(t time.Time) { _ = s.conn.SetReadDeadline(t) }

func (s *sock) close() error { return s.conn.Close() }

// message is one netlink message of a datagram; data shares its memory.
type message struct {
	typ, flags uint16
	seq        uint32
	data       []byte
}

// messages calls f for each message of a datagram until f returns false.
func messages(b []byte, f func(message) bool) error {
	for len(b) > 0 {
		if len(b) < unix.NLMSG_HDRLEN {
			return errShort
		}
		n := int(u32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			return errShort
		}
		m := message{
			typ:   binary.NativeEndian.Uint16(b[4:]),
			flags: binary.NativeEndian.Uint16(b[6:]),
			seq:   u32(b[8:]),
			data:  b[unix.NLMSG_HDRLEN:n],
		}
		if !f(m) {
			return nil
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

// errno reads the error number at the start of an NLMSG_ERROR or NLMSG_DONE message.
func (m message) errno() error {
	if len(m.data) < 4 {
		return nil
	}
	if n := int32(u32(m.data)); n < 0 {
		return syscall.Errno(-n)
	}
	return nil
}

// request sends one request and calls f for each message of the answer, to the end of a dump or
// to the single reply. It drops what an earlier request left behind. intr is true where the
// kernel says that the dump is not consistent.
func (s *sock) request(typ uint16, flags netlink.HeaderFlags, payload []byte, f func(message)) (intr bool, err error) {
	for err == nil { // the rest of a dump that was given up blocks the next with EBUSY
		_, err = s.receive(false)
	}
	if !errors.Is(err, errEmpty) && !errors.Is(err, unix.ENOBUFS) {
		return false, err
	}
	sent, err := s.conn.Send(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | flags},
		Data:   payload,
	})
	if err != nil {
		return false, err
	}
	dump := flags&netlink.Dump != 0
	for done := false; !done; {
		b, err := s.receive(true)
		if err != nil {
			return intr, err
		}
		var failed error
		err = messages(b, func(m message) bool {
			if m.seq != sent.Header.Sequence {
				return true
			}
			intr = intr || m.flags&uint16(netlink.DumpInterrupted) != 0
			switch m.typ {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				failed, done = m.errno(), true
			case unix.NLMSG_OVERRUN:
				failed, done = unix.ENOBUFS, true
			case unix.NLMSG_NOOP:
			default:
				f(m)
				done = !dump
			}
			return !done
		})
		if err = errors.Join(failed, err); err != nil {
			return intr, err
		}
	}
	return intr, nil
}
