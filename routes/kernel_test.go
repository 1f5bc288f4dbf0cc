//go:build linux

package routes

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// newNS moves the test into a network namespace of its own until it ends. The namespace goes
// with the last thing that uses it, also when the test fails.
func newNS(t testing.TB) *testNS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs iproute2")
	}
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		home.Close()
		t.Skipf("needs network namespaces: %v", err)
	}
	t.Cleanup(func() {
		defer home.Close()
		// A thread that can't go home stays locked, and ends with the goroutine.
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Errorf("leave the namespace: %v", err)
			return
		}
		runtime.UnlockOSThread()
	})
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	ip(t, `link set lo up`)
	return &testNS{own}
}

// testNS is a namespace made by newNS.
type testNS struct{ f *os.File }

// run is t.Run in the namespace: a subtest has a goroutine, and so a thread, of its own.
func (ns *testNS) run(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setns(int(ns.f.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
		f(t)
	})
}

// hostNS is the namespace that the tests were started in, which they must leave alone.
var hostNS, _ = os.Readlink("/proc/self/ns/net")

func inHostNS() bool {
	now, err := os.Readlink("/proc/thread-self/ns/net")
	return err != nil || now == hostNS
}

// ip runs lines of iproute2 commands in the test's namespace.
func ip(t testing.TB, lines string) {
	t.Helper()
	if out, err := tryIP(lines); err != nil {
		t.Fatalf("ip: %v\n%s\n%s", err, lines, out)
	}
}

// tryIP runs the lines in order; those that start with -6 by `ip -6`, as a batch has no options
// of its own.
func tryIP(lines string) (string, error) {
	if inHostNS() {
		panic("a test would change the host's namespace")
	}
	var family string
	var run []string
	flush := func() (string, error) {
		if len(run) == 0 {
			return "", nil
		}
		cmd := exec.Command("ip", family, "-batch", "-")
		cmd.Stdin = strings.NewReader(strings.Join(run, "\n"))
		run = nil
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for line := range strings.Lines(lines) {
		f, rest := "-4", strings.TrimSpace(line)
		if r, ok := strings.CutPrefix(rest, "-6 "); ok {
			f, rest = "-6", r
		} else if !strings.HasPrefix(rest, "rule") {
			f = "-d" // of no consequence: `ip` goes by the address
		}
		if f != family {
			if out, err := flush(); err != nil {
				return out, err
			}
			family = f
		}
		run = append(run, rest)
	}
	return flush()
}

func output(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, errs.String())
	}
	return string(out)
}

// vethNS is a namespace with two veth pairs that are up: a0-a1 with 10.0.0.1/24 and
// fd00:a::1/64 on a0, b0-b1 with 10.0.1.1/24 and fd00:b::1/64 on b0.
func vethNS(t testing.TB) *testNS {
	t.Helper()
	ns := newNS(t)
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	ip(t, `link add a0 type veth peer name a1
link add b0 type veth peer name b1
link set a0 addrgenmode none
link set a1 addrgenmode none
link set b0 addrgenmode none
link set b1 addrgenmode none
link set a0 up
link set a1 up
link set b0 up
link set b1 up
addr add 10.0.0.1/24 dev a0
addr add 10.0.1.1/24 dev b0
addr add fd00:a::1/64 dev a0 nodad
addr add fd00:b::1/64 dev b0 nodad`)
	awaitIPv6(t)
	return ns
}

// awaitIPv6 waits until the kernel has put in place what the devices of vethNS bring along: it does so from a
// queue of its own, behind the requests (addrconf_dad_work, linkwatch_event).
func awaitIPv6(t testing.TB) {
	t.Helper()
	tb := openTable(t)
	var n int
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		n = 0
		if err := tb.Routes(Filter{Family: IPv6, Table: TableLocal}, func(r Route) error {
			own := r.Dst.Addr() == netip.MustParseAddr("fd00:a::1") || r.Dst.Addr() == netip.MustParseAddr("fd00:b::1")
			if own || r.Dst == netip.MustParsePrefix("ff00::/8") {
				n++
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if n == 6 { // two addresses of our own, and multicast on four devices
			return
		}
		runtime.Gosched()
	}
	t.Fatalf("%d of 6 IPv6 routes are there", n)
}

var timers = regexp.MustCompile(`expires \d+sec`)

// snapshot is what a person sees of all routes and rules, with the timers masked.
func snapshot(t testing.TB) string {
	t.Helper()
	s := output(t, "ip", "-d", "-4", "route", "show", "table", "all") +
		output(t, "ip", "-d", "-6", "route", "show", "table", "all") +
		output(t, "ip", "-d", "-4", "rule", "show") + output(t, "ip", "-d", "-6", "rule", "show") +
		output(t, "ip", "-d", "nexthop", "show")
	return timers.ReplaceAllString(s, "expires Nsec")
}

func openTable(t testing.TB) *Table {
	t.Helper()
	if inHostNS() {
		t.Fatal("a test would change the host's namespace")
	}
	tb, err := OpenTable()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tb.Close() })
	return tb
}

// find returns the routes to dst, in all tables but local.
func find(t testing.TB, tb *Table, dst string) []Route {
	t.Helper()
	p := netip.MustParsePrefix(dst)
	var out []Route
	err := tb.Routes(Filter{Family: FamilyOf(p.Addr())}, func(r Route) error {
		if r.Dst == p && r.Body.Table != TableLocal {
			out = append(out, r)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func findOne(t testing.TB, tb *Table, dst string) Route {
	t.Helper()
	rs := find(t, tb, dst)
	if len(rs) != 1 {
		t.Fatalf("%d routes to %s, want 1", len(rs), dst)
	}
	return rs[0]
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// force runs lines of which some may fail.
func force(t testing.TB, lines string) {
	t.Helper()
	if inHostNS() {
		panic("a test would change the host's namespace")
	}
	cmd := exec.Command("ip", "-force", "-batch", "-")
	cmd.Stdin = strings.NewReader(lines)
	_ = cmd.Run()
}

func netlinkDump(typ uint16, payload []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | netlink.Dump},
		Data:   payload,
	}
}
