package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
)

// twoHosts makes a wire between the test's namespace and one named right, with a VLAN on it, and returns what runs
// something over there.
func twoHosts(t *testing.T) (right *netns.Namespace) {
	t.Helper()
	if _, err := exec.LookPath("ethtool"); err != nil {
		t.Skip("needs ethtool")
	}
	for _, line := range []string{
		"netns add right",
		"link add nic1 type veth peer name nic1 netns right",
		"addr add 10.1.1.1/24 dev nic1", "addr add fd01::1/64 dev nic1 nodad", "link set nic1 up",
		"-n right addr add 10.1.1.2/24 dev nic1", "-n right addr add fd01::2/64 dev nic1 nodad", "-n right link set nic1 up", "-n right link set lo up",
	} {
		netnstest.IP(t, line)
	}
	right, err := netns.Open(netns.Path("right"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = right.Close() })
	return right
}

// sent is how much a bulk transfer sends, in bytes: no socket's buffer holds it.
const sent = 4 << 20

// send sends a bulk of data by TCP to an address over there, and waits until it has been read.
func send(t *testing.T, right *netns.Namespace, to string) {
	t.Helper()
	var l net.Listener
	err := right.Do(func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(to, "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	read := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			var n int64
			if n, err = io.Copy(io.Discard, c); err == nil && n != sent {
				err = fmt.Errorf("%d bytes came of %d", n, sent)
			}
			c.Close()
		}
		read <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, sent)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-read; err != nil {
		t.Fatal(err)
	}
}

// seen counts what a tap saw of TCP to an address.
type seen struct {
	packets, super, payload, largest, segment int
	wrong                                     error
}

// watch looks at a device while fn runs.
func watch(t *testing.T, device, dst string, fn func()) (seen, Stats) {
	t.Helper()
	link, err := net.InterfaceByName(device)
	if err != nil {
		t.Fatal(err)
	}
	tap, err := Open(link.Index, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var s seen
	done := make(chan error)
	go func() {
		done <- Look(ctx, []*Tap{tap}, time.Minute, func(_ int, f *Frame) {
			p, err := f.Packet()
			if err != nil && !errors.Is(err, ErrNotIP) {
				s.wrong = errors.Join(s.wrong, err)
			}
			if err != nil || p.Dst != netip.MustParseAddr(dst) || p.Proto != protoTCP {
				return
			}
			s.packets++
			s.payload += p.Payload
			s.largest = max(s.largest, p.Length)
			if f.GSO != NoGSO {
				s.super++
				s.segment = max(s.segment, f.Segment)
				if want := map[bool]GSO{true: TCPv4, false: TCPv6}[p.Dst.Is4()]; f.GSO != want {
					s.wrong = fmt.Errorf("a super-packet of kind %d, want %d", f.GSO, want)
				}
			}
		}, nil)
	}()
	fn()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if s.wrong != nil {
		t.Error(s.wrong)
	}
	return s, tap.Stats()
}

func ethtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ethtool", args...).CombinedOutput(); err != nil {
		t.Fatalf("ethtool %v: %v\n%s", args, err, out)
	}
}

// What the device gets whole, and what the kernel has cut for it, is told apart in both families.
func TestTapTellsSuperPackets(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	right := twoHosts(t)
	for _, to := range []string{"10.1.1.2", "fd01::2"} {
		tellSuper(t, right, to)
	}
}

// In a VLAN, too, whose tag is in the frame or beside it. The host's kernel can lack VLANs.
func TestKernelTapTellsSuperPacketsInAVLAN(t *testing.T) {
	if os.Getenv("TSOAGENT_TEST_KERNEL") == "" {
		t.Skip("wants the test kernel: TSOAGENT_TEST_KERNEL=1")
	}
	if !netnstest.Private(t) {
		return
	}
	right := twoHosts(t)
	for _, line := range []string{
		"link add link nic1 name tag1 type vlan id 5", "addr add 10.1.5.1/24 dev tag1", "addr add fd05::1/64 dev tag1 nodad", "link set tag1 up",
		"-n right link add link nic1 name tag1 type vlan id 5",
		"-n right addr add 10.1.5.2/24 dev tag1", "-n right addr add fd05::2/64 dev tag1 nodad", "-n right link set tag1 up",
	} {
		netnstest.IP(t, line)
	}
	for _, tag := range []string{"on", "off"} { // off: the kernel puts the tag into the frame
		ethtool(t, "-K", "nic1", "tx-vlan-hw-insert", tag)
		for _, to := range []string{"10.1.5.2", "fd05::2"} {
			tellSuper(t, right, to)
		}
	}
}

// tellSuper sends to an address with TSO and without.
func tellSuper(t *testing.T, right *netns.Namespace, to string) {
	t.Helper()
	const mtu = 1500
	header := map[bool]int{true: 20, false: 40}[netip.MustParseAddr(to).Is4()] + 20
	for _, tso := range []string{"on", "off"} {
		ethtool(t, "-K", "nic1", "tx-tcp-segmentation", tso, "tx-tcp6-segmentation", tso)
		s, stats := watch(t, "nic1", to, func() { send(t, right, to) })
		t.Logf("%s, tso %s: %+v %+v", to, tso, s, stats)
		if stats.Dropped == 0 && s.payload < sent {
			t.Errorf("%s: nothing was dropped, and %d of %d bytes were seen", to, s.payload, sent)
		}
		switch {
		case tso == "on" && (s.super == 0 || s.largest <= mtu || s.segment == 0 || s.segment > mtu-header):
			t.Errorf("%s with TSO: %+v", to, s)
		case tso == "off" && (s.packets == 0 || s.super > 0 || s.largest != mtu):
			t.Errorf("%s without TSO: %+v", to, s)
		}
	}
}

// UDP_SEGMENT is told since Linux 6.2; before, it is at least counted.
func TestTapTellsUDPSegment(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	old := major < 6 || major == 6 && minor < 2
	right := twoHosts(t)
	for _, to := range []string{"10.1.1.2", "fd01::2"} {
		var over net.PacketConn
		err := right.Do(func() (err error) {
			over, err = net.ListenPacket("udp", net.JoinHostPort(to, "0"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = over.Close() })
		link, err := net.InterfaceByName("nic1")
		if err != nil {
			t.Fatal(err)
		}
		tap, err := Open(link.Index, 1)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tap.Close() })
		c, err := net.Dial("udp", over.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		const times, size, segment = 5, 8000, 1000
		var set error
		if err := raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment) }); err != nil || set != nil {
			t.Fatal(err, set)
		}
		if err := over.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		for range times {
			if _, err := c.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			for range size / segment {
				if _, _, err := over.ReadFrom(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
			}
		}
		told := 0
		err = Look(t.Context(), []*Tap{tap}, time.Millisecond, func(_ int, f *Frame) {
			if p, err := f.Packet(); err == nil && p.Proto == protoUDP && p.Dst == netip.MustParseAddr(to) {
				if f.GSO != UDPGSO || f.Segment != segment || p.Payload != size {
					t.Errorf("%s: %+v of %+v", to, f, p)
				}
				told++
			}
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		want := [2]int{times, 0}
		if old {
			want = [2]int{0, times}
		}
		if got := [2]int{told, int(tap.Stats().Untold)}; got != want {
			t.Errorf("%s: %v were told and were not, want %v", to, got, want)
		}
		if d := tap.Stats().Dropped; d != 0 {
			t.Errorf("%s: %d dropped", to, d)
		}
	}
}

// A tap that nobody reads holds nobody up: it drops, and says how much.
func TestTapDropsAndSaysSo(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	right := twoHosts(t)
	ethtool(t, "-K", "nic1", "tx-tcp-segmentation", "off")
	link, err := net.InterfaceByName("nic1")
	if err != nil {
		t.Fatal(err)
	}
	tap, err := Open(link.Index, MostTaps)
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	if want := fewest * blockSize; len(tap.ring) != want {
		t.Errorf("a ring of %d bytes, want %d", len(tap.ring), want)
	}
	send(t, right, "10.1.1.2")
	got := 0
	if err := Look(t.Context(), []*Tap{tap}, time.Millisecond, func(int, *Frame) { got++ }, nil); err != nil {
		t.Fatal(err)
	}
	stats := tap.Stats()
	t.Logf("%d seen, %+v", got, stats)
	if got == 0 || stats.Dropped == 0 || stats.Untold != 0 || got*snaplen > 2*len(tap.ring) {
		t.Errorf("%d seen, %+v", got, stats)
	}
	// After the end nothing is seen any more.
	send(t, right, "10.1.1.2")
	if err := Look(t.Context(), []*Tap{tap}, time.Millisecond, func(int, *Frame) { t.Error("a packet after the end") }, nil); err != nil {
		t.Fatal(err)
	}
}

func TestTapOfADeviceThatGoes(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	twoHosts(t)
	link, err := net.InterfaceByName("nic1")
	if err != nil {
		t.Fatal(err)
	}
	tap, err := Open(link.Index, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	netnstest.IP(t, "link del nic1")
	if err := Look(t.Context(), []*Tap{tap}, time.Millisecond, func(int, *Frame) {}, nil); err != nil {
		t.Fatal(err)
	}
	if !tap.Stats().Down {
		t.Error("the device is gone, and the tap doesn't say so")
	}
	if _, err := Open(link.Index, 1); !errors.Is(err, unix.ENODEV) {
		t.Errorf("open a tap on nothing: %v", err)
	}
}

// Without CAP_NET_RAW there is no tap.
func TestTapNeedsCapability(t *testing.T) {
	if os.Getenv("TSOAGENT_WIRE_NOBODY") != "" {
		_, err := Open(1, 1)
		if !errors.Is(err, os.ErrPermission) {
			t.Errorf("got %v, want %v", err, os.ErrPermission)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("not root: can't become somebody else")
	}
	dir, err := os.MkdirTemp("", "wire-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	bin := dir + "/wire.test"
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(bin, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	cmd := exec.CommandContext(t.Context(), bin, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Dir, cmd.Env = dir, []string{"TSOAGENT_WIRE_NOBODY=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
