package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	datagram = 1000 // bytes of payload; fits tunnelMTU
	inSuper  = 16   // datagrams in one super-packet
	supers   = 12
	// udpQuiet is how long nothing may arrive before what is missing counts as lost.
	udpQuiet = 60 * time.Millisecond
)

// udpBurst sends super-packets of datagrams (UDP_SEGMENT, linux/udp.h), each when the one before
// it has arrived or is lost, and counts the datagrams that arrive whole.
func (l *lab) udpBurst(ctx context.Context, inner Family) (b Burst, err error) {
	before, err := l.counters()
	if err != nil {
		return b, err
	}
	in, out, err := l.udpSockets(inner)
	if err != nil {
		return b, err
	}
	defer in.Close()
	defer out.Close()
	var t *tap
	if err := l.ends[sender].do(func() (err error) {
		t, err = openTap(l.tunnel[sender], false, false)
		return err
	}); err != nil {
		return b, err
	}
	defer t.close()
	arrived := make([]bool, supers*inSuper)
	for n := range supers {
		if err := ctx.Err(); err != nil {
			return b, err
		}
		if _, err := out.Write(superDatagram(n)); err != nil {
			return b, fmt.Errorf("send with UDP_SEGMENT: %w", err)
		}
		b.Sent += inSuper
		if err := collect(in, arrived, b.Sent); err != nil {
			return b, err
		}
		b.Arrived = count(arrived)
		if n >= 3 && b.Arrived == 0 {
			break // nothing will
		}
	}
	if b.Wire, err = t.rest(); err != nil {
		return b, err
	}
	after, err := l.counters()
	b.Counters = after.since(before)
	return b, err
}

// udpSockets opens the receiver's socket, and the sender's, connected to it.
func (l *lab) udpSockets(inner Family) (in, out *net.UDPConn, err error) {
	a := innerAddrs[inner]
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(a[receiver].Addr(), port))
	if err := l.ends[receiver].do(func() (err error) {
		in, err = net.ListenUDP("udp", to)
		return err
	}); err != nil {
		return nil, nil, err
	}
	err = l.ends[sender].do(func() (err error) {
		out, err = net.DialUDP("udp", nil, to)
		return err
	})
	if err != nil {
		_ = in.Close()
		return nil, nil, err
	}
	if err := setSegment(out); err != nil {
		_ = in.Close()
		_ = out.Close()
		return nil, nil, fmt.Errorf("UDP_SEGMENT: %w", err)
	}
	return in, out, nil
}

// setSegment has the kernel cut what the socket sends.
func setSegment(conn *net.UDPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	ctlErr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, datagram)
	})
	return errors.Join(ctlErr, err)
}

// superDatagram is the nth one. Each of its datagrams is full of its own number.
func superDatagram(n int) []byte {
	b := make([]byte, datagram*inSuper)
	for i := range b {
		b[i] = byte(n*inSuper + i/datagram)
	}
	return b
}

// collect marks the datagrams that arrive until want are there, or none came for a while.
func collect(in *net.UDPConn, arrived []bool, want int) error {
	buf := make([]byte, 64<<10)
	for count(arrived) < want {
		if err := in.SetReadDeadline(time.Now().Add(udpQuiet)); err != nil {
			return err
		}
		n, err := in.Read(buf)
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
			return nil
		}
		if err != nil {
			return err
		}
		if i, ok := whole(buf[:n]); ok && i < len(arrived) {
			arrived[i] = true
		}
	}
	return nil
}

// whole returns the number of a datagram, and false if it isn't as it was sent.
func whole(b []byte) (int, bool) {
	if len(b) != datagram {
		return 0, false
	}
	for _, c := range b {
		if c != b[0] {
			return 0, false
		}
	}
	return int(b[0]), true
}

func count(marks []bool) int {
	n := 0
	for _, m := range marks {
		if m {
			n++
		}
	}
	return n
}
