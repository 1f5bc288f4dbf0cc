package sockopt

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

// diag is a sock_diag connection. mdlayher/netlink opens and closes it and sends; what it would
// receive it keeps in buffers of its own, which it leaves to the garbage collector with the keys in
// them. So answers are read here, into one buffer that is wiped after each.
type diag struct {
	conn *netlink.Conn
	raw  syscall.RawConn
	buf  []byte
}

var (
	errEmpty = errors.New("nothing to read")
	// errTruncated says that a datagram was larger than the buffer; the rest of it is lost.
	errTruncated = errors.New("datagram is larger than the buffer")
	errFrame     = errors.New("netlink message is malformed")
)

// bufferSize holds the largest datagram. A dump fills at most 32 KiB; the answer for one socket is
// as long as its keys are, 64 KiB and more where the length of their attribute overflows
// (tcp_diag_get_aux_size, net/ipv4/tcp_diag.c; net.core.optmem_max bounds the keys).
const bufferSize = 256 << 10

func dialDiag() (*diag, error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &diag{conn: conn, raw: raw, buf: make([]byte, bufferSize)}, nil
}

func (d *diag) close() error { return d.conn.Close() }

func (d *diag) interrupt() { _ = d.conn.SetReadDeadline(time.Unix(1, 0)) }

// receive reads one datagram and gives it to f; when it returns, the datagram is wiped. Without
// wait it returns errEmpty where there is none.
func (d *diag) receive(wait bool, f func([]byte) error) error {
	var n int
	var from unix.Sockaddr
	var err error
	ioErr := d.raw.Read(func(fd uintptr) bool {
		for {
			n, from, err = unix.Recvfrom(int(fd), d.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			if err != unix.EINTR {
				break
			}
		}
		return err != unix.EAGAIN || !wait
	})
	got := d.buf[:min(max(n, 0), len(d.buf))]
	defer clear(got)
	switch {
	case errors.Is(ioErr, os.ErrDeadlineExceeded):
		return ioErr
	case ioErr != nil: // internal/poll has an error of its own for a closed file
		return fmt.Errorf("receive: %w: %w", os.ErrClosed, ioErr)
	case err == unix.EAGAIN:
		return errEmpty
	case err != nil:
		return fmt.Errorf("receive: %w", err)
	case n > len(d.buf):
		return errTruncated
	}
	if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 {
		return nil // not from the kernel
	}
	return f(got)
}

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
			return errFrame
		}
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			return errFrame
		}
		m := message{
			typ:   binary.NativeEndian.Uint16(b[4:]),
			flags: binary.NativeEndian.Uint16(b[6:]),
			seq:   binary.NativeEndian.Uint32(b[8:]),
			data:  b[unix.NLMSG_HDRLEN:n],
		}
		if !f(m) {
			return nil
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

// errno is the error number at the start of an NLMSG_ERROR or NLMSG_DONE message.
func (m message) errno() error {
	if len(m.data) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(m.data)); n < 0 {
		return syscall.Errno(-n)
	}
	return nil
}

// ask sends one request (struct inet_diag_req_v2) and calls f for the payload of each socket, to
// the end of a dump or to the single answer. intr says that the dump is not consistent.
func (d *diag) ask(req []byte, flags netlink.HeaderFlags, f func([]byte)) (intr bool, err error) {
	for err == nil { // the rest of a dump that was given up blocks the next with EBUSY
		err = d.receive(false, func([]byte) error { return nil })
	}
	if !errors.Is(err, errEmpty) && !errors.Is(err, unix.ENOBUFS) {
		return false, err
	}
	sent, err := d.conn.Send(netlink.Message{
		Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | flags},
		Data:   req,
	})
	if err != nil {
		return false, err
	}
	dump := flags&netlink.Dump != 0
	for done := false; !done; {
		err := d.receive(true, func(b []byte) error {
			var failed error
			err := messages(b, func(m message) bool {
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
					f(m.data)
					done = !dump
				}
				return !done
			})
			return errors.Join(failed, err)
		})
		if err != nil {
			return intr, err
		}
	}
	return intr, nil
}
