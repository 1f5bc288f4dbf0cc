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

// port is the receiver's, of TCP and UDP.
const port = 5001

// bounds limit the runs, whatever the kernel makes of the flow.
type bounds struct {
	// time of one run. One that has hardly begun by then goes on: with TSO on for three times as
	// long, to see more than one retransmission timeout (200 ms at least, TCP_RTO_MIN), with TSO
	// off for ten times, as the machine may have other things to do.
	time time.Duration
	// look is how long a run looks at the wire before, see watch.
	look time.Duration
	// bytes acknowledged that end a run early.
	bytes uint64
	// pairs of runs with TSO on and off: the least, and the most if that leaves doubt.
	pairs, morePairs int
}

var (
	quick    = bounds{time: 150 * time.Millisecond, look: 40 * time.Millisecond, bytes: 512 << 20, pairs: 2, morePairs: 5}
	thorough = bounds{time: time.Second, look: 100 * time.Millisecond, bytes: 4 << 30, pairs: 4, morePairs: 8}
)

// tcp runs one connection for a bounded time. First it looks at what leaves by the tunnel
// device; then, with the tap closed, it measures.
func (l *lab) tcp(ctx context.Context, inner Family, tso bool, b bounds) (f Flow, err error) {
	before, err := l.counters()
	if err != nil {
		return f, err
	}
	conn, done, err := l.connect(ctx, inner)
	if err != nil {
		return f, err
	}
	defer done()
	if err := l.look(ctx, &f, conn, b.look); err != nil {
		return f, err
	}
	defer send(conn)()
	if err := f.measure(ctx, conn, tso, b); err != nil {
		return f, err
	}
	after, err := l.counters()
	f.Counters = after.since(before)
	return f, err
}

// look adds what leaves by the tunnel device, and by the NIC below ESP, while the connection
// sends.
func (l *lab) look(ctx context.Context, f *Flow, conn *net.TCPConn, d time.Duration) error {
	var tun, nic *tap
	err := l.ends[sender].do(func() (err error) {
		if tun, err = openTap(l.tunnel[sender], true, false); err == nil {
			nic, err = openTap(l.nic[sender], true, true)
		}
		return err
	})
	if tun != nil {
		defer tun.close()
	}
	if err != nil {
		return err
	}
	defer nic.close()
	defer send(conn)()
	if f.Wire, err = tun.watch(ctx, d); err != nil {
		return err
	}
	f.NIC, err = nic.rest()
	return err
}

// measure adds the throughput: what the receiver acknowledges over the time.
func (f *Flow) measure(ctx context.Context, conn *net.TCPConn, tso bool, b bounds) error {
	begin, err := tcpInfo(conn)
	if err != nil {
		return err
	}
	for start := time.Now(); ; {
		more := pause(ctx, 5*time.Millisecond)
		now, err := tcpInfo(conn)
		if err != nil {
			return err
		}
		took := time.Since(start)
		f.Acked = now.Bytes_acked - begin.Bytes_acked
		f.Seconds = took.Seconds()
		f.Retransmits = uint64(now.Total_retrans)
		limit := b.time
		switch {
		case f.Acked >= leastAcked:
		case tso:
			limit = 3 * b.time
		default:
			limit = 10 * b.time
		}
		if !more || took >= limit || f.Acked >= b.bytes {
			break
		}
	}
	f.Mbps = mbps(f.Acked, f.Seconds)
	f.Runs = []float64{f.Mbps}
	return nil
}

// connect opens a connection through the tunnel to a receiver that discards all. done ends it.
func (l *lab) connect(ctx context.Context, inner Family) (*net.TCPConn, func(), error) {
	a := innerAddrs[inner]
	to := netip.AddrPortFrom(a[receiver].Addr(), port)
	var listener *net.TCPListener
	err := l.ends[receiver].do(func() (err error) {
		listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(to))
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	closeListener := discard(listener)
	var conn net.Conn
	err = l.ends[sender].do(func() (err error) {
		d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(a[sender].Addr(), 0))}
		conn, err = d.DialContext(ctx, "tcp", to.String())
		return err
	})
	if err != nil {
		closeListener()
		return nil, nil, fmt.Errorf("connect through the tunnel: %w", err)
	}
	tcp := conn.(*net.TCPConn)
	return tcp, func() {
		_ = tcp.SetLinger(0) // a FIN may never arrive
		_ = tcp.Close()
		closeListener()
	}, nil
}

// discard accepts one connection and reads it until stop.
func discard(listener *net.TCPListener) (stop func()) {
	accepted, ended := make(chan *net.TCPConn, 1), make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := listener.AcceptTCP()
		accepted <- conn
		buf := make([]byte, 256<<10)
		for err == nil {
			_, err = conn.Read(buf)
		}
	}()
	return func() {
		_ = listener.Close()
		if conn := <-accepted; conn != nil { // the sender's reset may be lost
			_ = conn.Close()
		}
		<-ended
	}
}

// send writes until stop.
func send(conn *net.TCPConn) (stop func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 256<<10)
		for {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	}()
	return func() {
		_ = conn.SetWriteDeadline(time.Now())
		<-done
		_ = conn.SetWriteDeadline(time.Time{})
	}
}

// tcpInfo asks the kernel about the connection (TCP_INFO).
func tcpInfo(conn *net.TCPConn) (info *unix.TCPInfo, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	ctlErr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	return info, errors.Join(ctlErr, err)
}
