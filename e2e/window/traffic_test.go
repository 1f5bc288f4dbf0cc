package window

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// flows are what is sent: by the clone of the default route, and inside of the prefix to which a more specific route comes.
var flows = []struct {
	src, dst string
	specific bool
}{
	{"10.1.0.1", "10.3.0.1", false},
	{"10.1.0.1", "10.3.7.1", true},
	{"fd00:1::1", "fd10::1", false},
	{"fd00:1::1", "fd10:0:0:7::1", true},
}

// pace is between two packets of a flow, and so how exact a measured time is.
const pace = 200 * time.Microsecond

// A packet is one that has arrived: when it was sent, and by which of the two ways it came.
type packet struct {
	sent time.Duration // since the traffic began
	way  int
}

// traffic sends numbered packets of all flows until it is stopped.
type traffic struct {
	began time.Time
	stop  chan struct{}
	wg    sync.WaitGroup

	mu      sync.Mutex
	sent    [4]int
	arrived [4][]packet
	err     error
}

// magic is what our packets begin with: the flow's number and the time stand behind it.
var magic = []byte("tsoagent window ")

// start has packets flow, from the namespace of this process to far.
func start(far *os.File) *traffic {
	tr := &traffic{began: time.Now(), stop: make(chan struct{})}
	for way := range 2 {
		fd, err := receiver(far, fmt.Sprintf("far%d", way))
		if err != nil {
			tr.fail(err)
			continue
		}
		tr.wg.Go(func() { tr.receive(fd, way) })
	}
	for i, f := range flows {
		fd, err := sender(f.src, f.dst)
		if err != nil {
			tr.fail(err)
			continue
		}
		tr.wg.Go(func() { tr.send(fd, i) })
	}
	return tr
}

func (tr *traffic) fail(err error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.err = errors.Join(tr.err, err)
}

// end stops it, and waits until what was sent has arrived.
func (tr *traffic) end(t testing.TB) {
	t.Helper()
	close(tr.stop)
	tr.wg.Wait()
	if tr.err != nil {
		t.Fatal(tr.err)
	}
}

// now is the time on the packets' clock.
func (tr *traffic) now() time.Duration { return time.Since(tr.began) }

// last is the way of a flow's newest packet that was sent after some time, -1 if none has come yet.
func (tr *traffic) last(flow int, after time.Duration) int {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if n := len(tr.arrived[flow]); n > 0 && tr.arrived[flow][n-1].sent > after {
		return tr.arrived[flow][n-1].way
	}
	return -1
}

// A sight is what became of a flow's packets since some time.
type sight struct {
	window time.Duration // until the last packet left that went the old way
	stale  int           // packets that went the old way
	seen   int
}

// since says what became of them, where the new way is given.
func (tr *traffic) since(flow int, at time.Duration, way int) sight {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	var s sight
	for _, p := range tr.arrived[flow] {
		if p.sent <= at {
			continue
		}
		if s.seen++; p.way != way {
			s.stale++
			s.window = max(s.window, p.sent-at)
		}
	}
	return s
}

func (tr *traffic) send(fd, flow int) {
	defer unix.Close(fd)
	b := append(slices.Clone(magic), byte(flow), 0, 0, 0, 0, 0, 0, 0, 0)
	for next := time.Now(); ; {
		select {
		case <-tr.stop:
			return
		default:
		}
		binary.BigEndian.PutUint64(b[len(magic)+1:], uint64(tr.now()))
		if err := unix.Send(fd, b, 0); err == nil {
			tr.mu.Lock()
			tr.sent[flow]++
			tr.mu.Unlock()
		} // where there is no route for a moment, nothing is sent
		next = next.Add(pace)
		if wait := time.Until(next); wait > 0 {
			time.Sleep(wait) // the pace of the traffic
		} else {
			next = time.Now()
		}
	}
}

func (tr *traffic) receive(fd, way int) {
	defer unix.Close(fd)
	b := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) { // nothing has come for some time
			select {
			case <-tr.stop:
				return
			default:
				continue
			}
		}
		if err != nil {
			tr.fail(os.NewSyscallError("recvfrom", err))
			return
		}
		i := slices.Index([]bool{at(b[:n], 42), at(b[:n], 62)}, true) // behind the headers of Ethernet, IPv4 or IPv6, and UDP
		if i < 0 {
			continue
		}
		p := b[42+20*i+len(magic):]
		tr.mu.Lock()
		tr.arrived[p[0]] = append(tr.arrived[p[0]], packet{time.Duration(binary.BigEndian.Uint64(p[1:])), way})
		tr.mu.Unlock()
	}
}

func at(b []byte, i int) bool {
	return len(b) >= i+len(magic)+9 && slices.Equal(b[i:i+len(magic)], magic)
}

// receiver is a socket that sees what comes by a device of another namespace.
func receiver(ns *os.File, dev string) (fd int, err error) {
	ierr := in(ns, func() error {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		var ifr *unix.Ifreq
		if ifr, err = unix.NewIfreq(dev); err == nil {
			err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr)
		}
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // in network order
		wait := unix.Timeval{Usec: 20_000}
		return errors.Join(err,
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: int(ifr.Uint32())}))
	})
	return fd, ierr
}

// sender is a connected socket whose packets go past IPsec, by a policy of its own: a kernel without ESP would drop them. Their route is that of
// all others.
func sender(src, dst string) (int, error) {
	from, to := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	family, level, option := unix.AF_INET, unix.SOL_IP, unix.IP_XFRM_POLICY
	sock := func(a netip.Addr, port int) unix.Sockaddr { return &unix.SockaddrInet4{Addr: a.As4(), Port: port} }
	if to.Is6() {
		family, level, option = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_XFRM_POLICY
		sock = func(a netip.Addr, port int) unix.Sockaddr { return &unix.SockaddrInet6{Addr: a.As16(), Port: port} }
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	err = errors.Join(
		unix.SetsockoptString(fd, level, option, bypass(family)),
		unix.Bind(fd, sock(from, 0)), unix.Connect(fd, sock(to, 9)))
	if err != nil {
		return 0, errors.Join(fmt.Errorf("from %s to %s: %w", src, dst, err), unix.Close(fd))
	}
	return fd, nil
}

// bypass is a struct xfrm_userpolicy_info (linux/xfrm.h) that allows all that a socket sends, without a template.
func bypass(family int) string {
	const selector, limits = 56, 32
	b := make([]byte, 168)
	binary.NativeEndian.PutUint16(b[40:], uint16(family))
	for i := range limits { // bytes and packets: XFRM_INF
		b[selector+i] = 0xff
	}
	b[selector+64+32+8] = 1 // direction out
	return string(b)
}

// in runs a function on a thread that is in a namespace.
func in(ns *os.File, fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}
