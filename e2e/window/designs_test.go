package window

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the kernel itself could do about clones that go stale, tried with clones and rules as the agent writes them, and without an agent. The
// documents name the figures, and why the agent does otherwise (docs/stale-window.md).

const (
	ownRules = "rule add from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450 pref 32765 protocol 84\n-6 rule add from fd00:1::/64 to fd10::/32 lookup 5450 pref 32765 protocol 84"
	objects  = "nexthop add id 50 via 192.0.2.8 dev nic0\nnexthop add id 51 via 198.51.100.8 dev nic1\nnexthop add id 60 via fd00:2::8 dev nic0\nnexthop add id 61 via fd00:3::8 dev nic1"
	byObject = "route replace default nhid 50\nroute add 10.3.0.0/16 nhid 50 table 5450 mtu lock 1400 protocol 84\n" +
		"-6 route del default\n-6 route add default nhid 60\n-6 route add fd10::/32 nhid 60 table 5450 mtu lock 1400 protocol 84"
)

func (l *lab) lines(lines string) {
	l.Helper()
	for line := range strings.Lines(lines) {
		l.ip("%s", strings.TrimSpace(line))
	}
}

// follows has something happen while packets go by the clones. Of each family it says what became of the packets, which were to go by nic1 from then
// on, and whether they do in the end.
func (l *lab) follows(what func()) (out [2]sight, on [2]bool) {
	l.Helper()
	tr := start(l.far)
	shown := func(way int, after time.Duration) bool { return tr.last(0, after) == way && tr.last(2, after) == way }
	within(l, "packets go by the clones", func() bool { return shown(0, 0) })
	began := tr.now()
	what()
	after := tr.now()
	within(l, "packets arrive behind it", func() bool { return tr.last(0, after) >= 0 && tr.last(2, after) >= 0 })
	on = [2]bool{tr.last(0, after) == 1, tr.last(2, after) == 1}
	tr.end(l)
	return [2]sight{tr.since(0, began, 1), tr.since(2, began, 1)}, on
}

// designs is a lab with the rules of an agent, and without its policies.
func designs(t *testing.T) *lab {
	t.Helper()
	l := newLab(t)
	if err := run("ip", "xfrm", "policy", "flush"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("sh", "-c", `
			for f in -4 -6; do
				while ip $f rule del lookup 5450 2>/dev/null; do :; done
				ip $f route flush table 5450; ip $f route del default
			done; ip nexthop flush`).Run() // some are not there
	})
	l.lines(ownRules)
	return l
}

// TestCloneByTheOwnersNexthop: a clone that shares the owner's nexthop object follows the object at once, and not an owner that gives its route
// another object.
func TestCloneByTheOwnersNexthop(t *testing.T) {
	t.Run("the object is replaced", func(t *testing.T) {
		l := designs(t)
		l.lines(objects + "\n" + byObject)
		got, on := l.follows(func() {
			l.lines("nexthop replace id 50 via 198.51.100.8 dev nic1\nnexthop replace id 60 via fd00:3::8 dev nic1")
		})
		t.Logf("IPv4 late for %v, IPv6 for %v", got[0].window, got[1].window)
		if on != [2]bool{true, true} {
			t.Errorf("the clones do not follow their object: %v", on)
		}
	})
	t.Run("the route has another object", func(t *testing.T) {
		l := designs(t)
		l.lines(objects + "\n" + byObject)
		_, on := l.follows(func() { l.lines("route replace default nhid 51\n-6 route replace default nhid 61") })
		if on != [2]bool{} {
			t.Errorf("the clones follow the owner's route by themselves: %v; docs/stale-window.md says otherwise", on)
		}
	})
}

// TestCloneTiedToAProcess: a clone with a second way, without a carrier, into a tun device goes with that device, and so with the process that has
// it open. IPv6 takes away the one way only (fib6_ifdown, net/ipv6/route.c).
func TestCloneTiedToAProcess(t *testing.T) {
	l := designs(t)
	tun, err := openTun("tied0")
	if err != nil {
		t.Skipf("needs /dev/net/tun: %v", err)
	}
	defer tun.Close()
	for _, family := range []string{"ipv4", "ipv6"} {
		l.must(os.WriteFile("/proc/sys/net/"+family+"/conf/tied0/ignore_routes_with_linkdown", []byte("1"), 0))
	}
	l.lines(`link set tied0 up
addr add 203.0.113.1/32 dev tied0
route add 10.3.0.0/16 table 5450 mtu lock 1400 protocol 84 nexthop via 192.0.2.8 dev nic0 nexthop dev tied0
-6 route add fd10::/32 table 5450 mtu lock 1400 protocol 84 nexthop via fd00:2::8 dev nic0 nexthop via fe80::1 dev tied0
route replace default via 198.51.100.8
-6 route del default
-6 route add default via fd00:3::8`)
	got, on := l.follows(func() { l.must(tun.Close()) })
	t.Logf("IPv4 late for %v", got[0].window)
	if on != [2]bool{true, false} {
		t.Errorf("the clones go with the device: %v; docs/stale-window.md says that only IPv4's do", on)
	}
}

// openTun makes a tun device without a carrier, which goes when the file is closed.
func openTun(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open", err)
	}
	f := os.NewFile(uintptr(fd), "tun")
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TUNSETCARRIER, 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
