package routes

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// train reads many datagrams by one system call (recvmmsg(2)), since in a storm each route's event is a datagram of its own. What is in it is
// handed on one by one. It is not safe for concurrent use.
type train struct {
	hdrs  []mmsghdr
	iovs  []unix.Iovec
	from  []unix.RawSockaddrNetlink
	bufs  [][]byte
	at, n int // those that are to be handed on
}

// mmsghdr is a struct mmsghdr (recvmmsg(2)).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32 // bytes of the datagram
}

const (
	trainCars = 32
	// carLen is more than a notification has, as a rule: a route of 1,000 ways has 24 KiB. The pages that are not used cost nothing.
	carLen = 64 << 10
)

func newTrain(cars, carLen int) *train {
	t := &train{
		hdrs: make([]mmsghdr, cars), iovs: make([]unix.Iovec, cars),
		from: make([]unix.RawSockaddrNetlink, cars), bufs: make([][]byte, cars),
	}
	all := make([]byte, cars*carLen)
	for i := range t.hdrs {
		h := &t.hdrs[i].hdr
		h.Iov, h.Name = &t.iovs[i], (*byte)(unsafe.Pointer(&t.from[i]))
		h.SetIovlen(1)
		t.fit(i, all[i*carLen:(i+1)*carLen:(i+1)*carLen])
	}
	return t
}

func (t *train) fit(i int, b []byte) {
	t.bufs[i], t.iovs[i].Base = b, &b[0]
	t.iovs[i].SetLen(len(b))
}

// fill reads what is there. All that was read before must have been taken.
func (t *train) fill(fd int) error {
	t.at, t.n = 0, 0
	for i := range t.hdrs {
		t.hdrs[i].hdr.Namelen = unix.SizeofSockaddrNetlink // the kernel writes it, too
	}
	for {
		// With MSG_TRUNC the length is the datagram's, also where the buffer is shorter. An error that comes behind a datagram is the next
		// call's (do_recvmmsg, net/socket.c).
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&t.hdrs[0])), uintptr(len(t.hdrs)), unix.MSG_DONTWAIT|unix.MSG_TRUNC, 0, 0)
		switch errno {
		case 0:
			t.n = int(n)
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// next takes the next datagram that was read; got is false if there is none. It stands in the train until fill is called.
func (t *train) next() (b []byte, got bool, err error) {
	if t.at == t.n {
		return nil, false, nil
	}
	i := t.at
	t.at++
	switch n := int(t.hdrs[i].n); {
	case t.from[i].Pid != 0:
		return nil, true, nil // not from the kernel
	case n > len(t.bufs[i]):
		for i := range t.bufs { // the next one can be in any
			if len(t.bufs[i]) < n && i < t.at {
				t.fit(i, make([]byte, 2*n))
			}
		}
		return nil, true, fmt.Errorf("%d bytes: %w", n, errTruncated)
	default:
		return t.bufs[i][:n], true, nil
	}
}

// receiveMany is receive by a train.
func (c *conn) receiveMany(wait bool) (b []byte, got bool, err error) {
	if b, got, err = c.many.next(); got {
		return b, got, err
	}
	var rerr error
	err = c.raw.Read(func(fd uintptr) bool {
		rerr = c.many.fill(int(fd))
		return !errors.Is(rerr, unix.EAGAIN) || !wait
	})
	switch {
	case err != nil:
		return nil, false, err
	case errors.Is(rerr, unix.EAGAIN):
		return nil, false, nil
	case rerr != nil:
		return nil, false, os.NewSyscallError("recvmmsg", rerr)
	}
	return c.many.next()
}
