package routes

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

// errInterrupted is the error of a dump during which the kernel's tables changed so that it may
// lack something (NLM_F_DUMP_INTR).
var errInterrupted = errors.New("dump was interrupted")

// errStop ends a dump because the context is over.
var errStop = errors.New("stopped")

// errTruncated is the error for a datagram that was longer than the buffer. The next one fits.
var errTruncated = errors.New("datagram was truncated")

// conn is a netlink connection that reads whole datagrams into one buffer that it keeps. The
// reads of mdlayher/netlink v1.11.2 peek at the length first and allocate for each datagram: a
// bare dump of 1,000,000 routes takes 0.76 s with them and 0.49 s so. Requests and options go
// through it.
type conn struct {
	*netlink.Conn
	raw  syscall.RawConn
	buf  []byte
	many *train // reads instead if there is one
}

// bufLen is more than the kernel ever puts into a datagram of a dump (32 KiB, netlink_dump).
// The pages of a buffer that are not used cost nothing.
const bufLen = 256 << 10

// dialRoute opens a connection in the calling thread's network namespace. The kernel checks its
// requests strictly and explains its errors.
func dialRoute(rcvbuf int) (*conn, error) {
	nc, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Strict: true})
	if err != nil {
		return nil, fmt.Errorf("routes: open rtnetlink: %w", err)
	}
	c := &conn{Conn: nc, buf: make([]byte, bufLen)}
	if err := nc.SetOption(netlink.CapAcknowledge, true); err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("routes: open rtnetlink: %w", err)
	}
	if c.raw, err = nc.SyscallConn(); err == nil && rcvbuf > 0 {
		err = c.forceReadBuffer(rcvbuf)
	}
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("routes: open rtnetlink: %w", err)
	}
	return c, nil
}

func (c *conn) forceReadBuffer(n int) error {
	var serr error
	err := c.raw.Control(func(fd uintptr) { serr = forceReadBuffer(int(fd), n) })
	return errors.Join(err, serr)
}

// filterNeighbours has the kernel keep from this connection what tells of neighbours but for the
// forwarding databases of devices themselves. A busy host's neighbours change all the time, and
// none of that is looked at here. A notification is alone in its datagram.
func (c *conn) filterNeighbours() error {
	const (
		typeAt   = 4                                // of nlmsg_type
		familyAt = unix.NLMSG_HDRLEN                // of ndm_family
		flagsAt  = unix.NLMSG_HDRLEN + ndmFlagsByte // of ndm_flags
		half     = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
		one      = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
		equal    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		has      = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		end      = unix.BPF_RET | unix.BPF_K
	)
	// Filters load in network byte order, while the type is in the machine's.
	typ := func(t uint16) uint32 {
		return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, t)))
	}
	program := []unix.SockFilter{
		{Code: half, K: typeAt},
		{Code: equal, K: typ(rtmNewNeigh), Jt: 1},
		{Code: equal, K: typ(rtmDelNeigh), Jf: 4}, // anything else: all of it
		{Code: one, K: familyAt},
		{Code: equal, K: afBridge, Jf: 3},
		{Code: one, K: flagsAt},
		{Code: has, K: ntfSelf, Jf: 1},
		{Code: end, K: 1<<32 - 1},
		{Code: end},
	}
	var serr error
	err := c.raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	})
	if err := errors.Join(err, os.NewSyscallError("setsockopt", serr)); err != nil {
		return fmt.Errorf("routes: filter neighbours: %w", err)
	}
	return nil
}

// receive reads one datagram and waits for it if wait is set; got is false if there is none. The
// datagram stands in the connection's buffer until the next call.
func (c *conn) receive(wait bool) (b []byte, got bool, err error) {
	if c.many != nil {
		return c.receiveMany(wait)
	}
	var n int
	var from unix.Sockaddr
	var rerr error
	err = c.raw.Read(func(fd uintptr) bool {
		for {
			// With MSG_TRUNC the length is the datagram's, also where the buffer is shorter.
			n, from, rerr = unix.Recvfrom(int(fd), c.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			if rerr != unix.EINTR {
				break
			}
		}
		return rerr != unix.EAGAIN || !wait
	})
	switch {
	case err != nil:
		return nil, false, err
	case rerr == unix.EAGAIN:
		return nil, false, nil
	case rerr != nil:
		return nil, false, os.NewSyscallError("recvfrom", rerr)
	}
	if sa, ok := from.(*unix.SockaddrNetlink); ok && sa.Pid != 0 {
		return nil, true, nil // not from the kernel
	}
	if n > len(c.buf) {
		c.buf = make([]byte, 2*n)
		return nil, true, fmt.Errorf("%d bytes: %w", n, errTruncated)
	}
	return c.buf[:n], true, nil
}

// nextMessage cuts the first message off a datagram.
func nextMessage(b []byte) (h Header, data, rest []byte, err error) {
	if len(b) < unix.NLMSG_HDRLEN {
		return Header{}, nil, nil, errShort
	}
	n := int(binary.NativeEndian.Uint32(b))
	if n < unix.NLMSG_HDRLEN || n > len(b) {
		return Header{}, nil, nil, errShort
	}
	h = Header{
		Type:  binary.NativeEndian.Uint16(b[4:]),
		Flags: binary.NativeEndian.Uint16(b[6:]),
		Seq:   binary.NativeEndian.Uint32(b[8:]),
		Port:  binary.NativeEndian.Uint32(b[12:]),
	}
	return h, b[unix.NLMSG_HDRLEN:n:n], b[min(align4(n), len(b)):], nil
}

// answerTimeout bounds the wait for an answer, which the kernel gives while it handles the
// request: only a lost one comes late.
const answerTimeout = 10 * time.Second

// answers calls f for each message that answers the request seq, up to and with an
// acknowledgement or the end of the dump, whose error it returns.
func (c *conn) answers(seq uint32, f func(Header, []byte) error) error {
	return answersFrom(func() ([]byte, error) {
		if err := c.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
			return nil, err
		}
		b, _, err := c.receive(true)
		return b, err
	}, seq, f)
}

// answersFrom is answers, with the datagrams that next returns.
func answersFrom(next func() ([]byte, error), seq uint32, f func(Header, []byte) error) error {
	// An error of f does not end the reading, so that the next request finds no leftovers.
	var ferr error
	interrupted := false
	for {
		b, err := next()
		if err != nil {
			return errors.Join(ferr, err)
		}
		for len(b) > 0 {
			h, data, rest, err := nextMessage(b)
			if err != nil {
				return errors.Join(ferr, err)
			}
			b = rest
			if h.Seq != seq {
				continue
			}
			interrupted = interrupted || h.Flags&unix.NLM_F_DUMP_INTR != 0
			switch h.Type {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				err := errors.Join(ferr, ackError(h, data))
				if err == nil && interrupted {
					err = errInterrupted
				}
				return err
			default:
				if f != nil && ferr == nil {
					ferr = f(h, data)
					if errors.Is(ferr, errStop) {
						return ferr // the connection is about to be closed
					}
				}
			}
		}
	}
}

// request sends one request and waits for its acknowledgement.
func (c *conn) request(typ, flags uint16, payload []byte, f func(Header, []byte) error) (seq uint32, err error) {
	m, err := c.Send(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(typ),
			Flags: netlink.Request | netlink.HeaderFlags(flags),
		},
		Data: payload,
	})
	if err != nil {
		return 0, err
	}
	return m.Header.Sequence, c.answers(m.Header.Sequence, f)
}

// barrier returns after whatever holds the kernel's routing lock now has let go of it. The
// kernel tells of a link that goes down, and of an address that goes, before it takes the
// routes away (__dev_notify_flags, __inet_del_ifa), and since 6.12 it dumps without the lock: a
// dump that follows the event at once would still show them. RTM_GETLINK takes the lock; that
// there is no such device does not matter.
func (c *conn) barrier() error {
	payload := make([]byte, ifinfomsgLen)
	binary.NativeEndian.PutUint32(payload[4:], 1<<31-1)
	_, err := c.request(rtmGetLink, unix.NLM_F_ACK, payload, nil)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// kernelError is an error that the kernel answered with, and its explanation where it gave one.
type kernelError struct {
	errno syscall.Errno
	text  string
}

func (e *kernelError) Error() string {
	if e.text == "" {
		return e.errno.Error()
	}
	return e.errno.Error() + " (" + e.text + ")"
}

func (e *kernelError) Unwrap() error { return e.errno }

// ackError is the error in an NLMSG_ERROR or NLMSG_DONE message, nil for none.
func ackError(h Header, data []byte) error {
	if len(data) < 4 {
		if h.Type == unix.NLMSG_DONE {
			return nil
		}
		return errShort
	}
	errno := int32(binary.NativeEndian.Uint32(data))
	if errno >= 0 {
		return nil
	}
	e := &kernelError{errno: syscall.Errno(-errno)}
	if h.Flags&unix.NLM_F_ACK_TLVS == 0 {
		return e
	}
	rest := data[4:]
	if h.Type == unix.NLMSG_ERROR {
		// The header of the request stands first, and all of it where it was not capped.
		n := unix.NLMSG_HDRLEN
		if h.Flags&unix.NLM_F_CAPPED == 0 && len(rest) >= n {
			n = align4(int(binary.NativeEndian.Uint32(rest)))
		}
		if n < 0 || n > len(rest) {
			return e
		}
		rest = rest[n:]
	}
	for a := (attrs{b: rest}); a.next(); {
		if a.typ == unix.NLMSGERR_ATTR_MSG {
			e.text = a.str()
		}
	}
	return e
}
