package routes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// talk is a connection for requests alone. The kernel does what it is asked while it is sent
// (netlink_unicast_kernel), so that the answers are there when the send returns, and nothing is ever
// waited for. A socket that the runtime's poller watches wakes a thread for each of them, which
// makes a lookup several times as long. This one is the poller's no more than a file is.
//
// It is for one goroutine, but for close.
type talk struct {
	fd   int
	port uint32
	seq  uint32
	in   []byte
	many *train
	out  []byte
	done atomic.Bool
}

// dialTalk opens one in the calling thread's network namespace, with the options of dialRoute.
func dialTalk(rcvbuf int) (t *talk, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("routes: open rtnetlink: %w", os.NewSyscallError("socket", err))
	}
	// Another one may have had the port, and be told of still: its numbers are others.
	t = &talk{fd: fd, in: make([]byte, bufLen), many: newTrain(trainCars, carLen), seq: rand.Uint32()}
	if err := t.prepare(rcvbuf); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("routes: open rtnetlink: %w", err)
	}
	return t, nil
}

// talkOn is one on a socket of dialTalk's that nobody else uses any more. It takes the file over, also where it fails.
func talkOn(fd int) (*talk, error) {
	t := &talk{fd: fd, in: make([]byte, bufLen), seq: rand.Uint32()}
	if err := t.named(); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("routes: take over rtnetlink: %w", err)
	}
	return t, nil
}

func (t *talk) prepare(rcvbuf int) error {
	for _, opt := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_GET_STRICT_CHK, unix.NETLINK_CAP_ACK} {
		if err := unix.SetsockoptInt(t.fd, unix.SOL_NETLINK, opt, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	patience := unix.NsecToTimeval(answerTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(t.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := forceReadBuffer(t.fd, rcvbuf); err != nil {
		return err
	}
	if err := unix.Bind(t.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return t.named()
}

// named finds out which port it has.
func (t *talk) named() error {
	sa, err := unix.Getsockname(t.fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	own, ok := sa.(*unix.SockaddrNetlink)
	if !ok {
		return errAddress
	}
	t.port = own.Pid
	return nil
}

// Close closes it. More than once is as good as once.
func (t *talk) Close() error {
	if t.done.Swap(true) {
		return nil
	}
	return os.NewSyscallError("close", unix.Close(t.fd))
}

// PID is its netlink port.
func (t *talk) PID() uint32 { return t.port }

// Send sends one message, whose sequence number it fills in.
func (t *talk) Send(m netlink.Message) (netlink.Message, error) {
	t.out = t.append(t.out[:0], &m)
	return m, t.send(t.out)
}

// next is the sequence number of another request, which is never 0: that is one of notifications.
func (t *talk) next() uint32 {
	if t.seq++; t.seq == 0 {
		t.seq++
	}
	return t.seq
}

func (t *talk) append(b []byte, m *netlink.Message) []byte {
	m.Header.Sequence = t.next()
	m.Header.Length = uint32(unix.NLMSG_HDRLEN + len(m.Data))
	b = binary.NativeEndian.AppendUint32(b, m.Header.Length)
	b = binary.NativeEndian.AppendUint16(b, uint16(m.Header.Type))
	b = binary.NativeEndian.AppendUint16(b, uint16(m.Header.Flags))
	b = binary.NativeEndian.AppendUint32(b, m.Header.Sequence)
	b = binary.NativeEndian.AppendUint32(b, t.port)
	b = append(b, m.Data...)
	return append(b, make([]byte, align4(len(m.Data))-len(m.Data))...)
}

// send sends messages to the kernel, which has handled them when it returns.
func (t *talk) send(msgs []byte) error {
	if failpoint.Armed() {
		return t.oneByOne(msgs)
	}
	return t.transmit(msgs)
}

func (t *talk) transmit(msgs []byte) error {
	if t.done.Load() {
		return os.ErrClosed
	}
	for {
		err := unix.Sendto(t.fd, msgs, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return os.NewSyscallError("sendto", err)
		}
	}
}

// receive reads one datagram. It is there, as a rule; os.ErrDeadlineExceeded says that it did not come.
func (t *talk) receive() ([]byte, error) {
	if t.done.Load() {
		return nil, os.ErrClosed
	}
	for {
		n, from, err := unix.Recvfrom(t.fd, t.in, unix.MSG_TRUNC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return nil, os.ErrDeadlineExceeded
		case err != nil:
			return nil, os.NewSyscallError("recvfrom", err)
		}
		if sa, ok := from.(*unix.SockaddrNetlink); ok && sa.Pid != 0 {
			continue // not from the kernel
		}
		if n > len(t.in) {
			t.in = make([]byte, 2*n)
			return nil, fmt.Errorf("%d bytes: %w", n, errTruncated)
		}
		return t.in[:n], nil
	}
}

// answers is as conn.answers.
func (t *talk) answers(seq uint32, f func(Header, []byte) error) error {
	return answersFrom(t.receive, seq, f)
}

// request sends one request and waits for its acknowledgement.
func (t *talk) request(typ, flags uint16, payload []byte, f func(Header, []byte) error) (seq uint32, err error) {
	m, err := t.Send(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | netlink.HeaderFlags(flags)},
		Data:   payload,
	})
	if err != nil {
		return 0, err
	}
	return m.Header.Sequence, t.answers(m.Header.Sequence, f)
}

// acknowledged reads the answers to requests, up to and with the acknowledgement of the last one,
// and fills in the errors and the notifications, which come in the order of the requests. The error is for the connection.
func (t *talk) acknowledged(dec *Decoder, results []Result) error {
	of := 0
	var told []Event // of all of them
	for {
		b, err := t.receiveMany()
		if err != nil {
			return err
		}
		for len(b) > 0 {
			h, data, rest, err := nextMessage(b)
			if err != nil {
				return err
			}
			b = rest
			i := of
			for i < len(results) && results[i].Seq != h.Seq {
				i++
			}
			if i == len(results) {
				continue // left over
			}
			of = i
			r := &results[i]
			if h.Type != unix.NLMSG_ERROR {
				if ev, err := dec.Decode(h, data); err == nil && ev != nil { // else the Watcher will say so
					told = append(told, ev)
					r.Events = told[len(told)-1-len(r.Events) : len(told) : len(told)]
				}
				continue
			}
			err = ackError(h, data)
			if k := (*kernelError)(nil); err != nil && !errors.As(err, &k) {
				return err
			}
			if r.Err = err; i == len(results)-1 {
				return nil
			}
		}
	}
}

// receiveMany is receive for many answers, which are there already.
func (t *talk) receiveMany() ([]byte, error) {
	for {
		if b, got, err := t.many.next(); err != nil || b != nil {
			return b, err
		} else if got {
			continue // not from the kernel
		}
		switch err := t.many.fill(t.fd); {
		case errors.Is(err, unix.EAGAIN):
			return t.receive() // which waits
		case err != nil:
			return nil, os.NewSyscallError("recvmmsg", err)
		}
	}
}

// ask sends one request that has one answer, and passes it to f. Nothing acknowledges it: the kernel answers, or it says why not.
func (t *talk) ask(typ uint16, payload []byte, f func(Header, []byte) error) error {
	m, err := t.Send(netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request}, Data: payload})
	if err != nil {
		return err
	}
	for {
		b, err := t.receive()
		if err != nil {
			return err
		}
		for len(b) > 0 {
			h, data, rest, err := nextMessage(b)
			if err != nil {
				return err
			}
			b = rest
			switch {
			case h.Seq != m.Header.Sequence: // left over
			case h.Type == unix.NLMSG_ERROR:
				return ackError(h, data)
			default:
				return f(h, data)
			}
		}
	}
}

// forceReadBuffer sets the receive buffer past net.core.rmem_max where we may (CAP_NET_ADMIN),
// else as far as it goes.
func forceReadBuffer(fd, n int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n)
	if errors.Is(err, unix.EPERM) {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, n)
	}
	return os.NewSyscallError("setsockopt", err)
}
