package lane

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// inNS moves the test into a network namespace of its own until it ends, with a veth pair nic
// and peer; peer is in a second namespace, whose file it returns.
func inNS(t *testing.T) *os.File {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	enter := func() *os.File {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Skipf("needs network namespaces: %v", err)
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	far := enter()
	enter()
	batch(t, "link set lo up", "link add nic mtu 1400 type veth peer name peer mtu 1400 netns /proc/self/fd/"+fd(far, t),
		"addr add 192.0.2.1/24 dev nic", "addr add fd00::1/64 dev nic nodad", "link set nic up")
	within(t, far, func() {
		batch(t, "link set lo up", "addr add 192.0.2.2/24 dev peer", "addr add fd00::2/64 dev peer nodad", "link set peer up")
	})
	return far
}

// fd is the number of a file that the programs we start have, too.
func fd(f *os.File, t *testing.T) string {
	t.Helper()
	inherited = f
	t.Cleanup(func() { inherited = nil })
	return "3"
}

// inherited is given to the programs that run starts, as file 3.
var inherited *os.File

// inTestKernel skips unless the kernel is the project's own.
func inTestKernel(t *testing.T) *os.File {
	t.Helper()
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for tc flower")
	}
	return inNS(t)
}

// within calls f in another namespace, on the same thread.
func within(t *testing.T, ns *os.File, f func()) {
	t.Helper()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

// run runs one command line and returns what it prints. A ~ is a space within a word.
func run(t testing.TB, line string) string {
	t.Helper()
	words := strings.Fields(line)
	for i, w := range words {
		words[i] = strings.ReplaceAll(w, "~", " ")
	}
	cmd := exec.Command(words[0], words[1:]...)
	if inherited != nil {
		cmd.ExtraFiles = []*os.File{inherited}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// batch runs several commands of ip in one process.
func batch(t testing.TB, lines ...string) {
	t.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n"))
	if inherited != nil {
		cmd.ExtraFiles = []*os.File{inherited}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// changing are the parts of ip's and tc's output that change by themselves. The kernel learns of a
// veth's carrier a while after its peer is up (net/core/link_watch.c).
var changing = regexp.MustCompile(`(state|qlen|installed|used|expires|firstused|Sent|refcnt) [^\\]*?(?:\\|$)|promiscuity \d+|NO-CARRIER,|,LOWER_UP`)

// place is what the namespace has of devices, qdiscs and filters.
func place(t testing.TB) string {
	t.Helper()
	s := run(t, "ip -d -o link show") + run(t, "tc qdisc show") + run(t, "tc filter show dev nic egress") + run(t, "tc filter show dev nic ingress")
	return changing.ReplaceAllString(s, "")
}

func dial(t testing.TB) *Client {
	t.Helper()
	c, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func indexOf(t testing.TB, name string) int32 {
	t.Helper()
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return int32(ifi.Index)
}

// testLane is a lane for nic in both families, with all that a match can say.
func testLane(t testing.TB) Lane {
	t.Helper()
	l := Lane{Index: indexOf(t, "nic"), Name: "nic", Matches: []Match{
		match("0.0.0.0/0", "198.51.100.0/24", 0),
		match("192.0.2.1/32", "192.0.2.2/32", 50),
		match("192.0.2.1/32", "192.0.2.2/32", 6, 0, 179),
		match("192.0.2.1/32", "192.0.2.2/32", 17, 4500, 4501),
		match("::/0", "fd00::/64", 51),
		match("fd00::1/128", "fd00::2/128", 132, 7, 0),
		match("fd00::1/128", "fd00::2/128", 50),
		match("fd00::1/128", "fd00::2/128", 17, 4500, 4500),
	}}
	slices.SortFunc(l.Matches, Match.Compare)
	return l
}

func ensure(t testing.TB, c *Client, l Lane) {
	t.Helper()
	if err := c.Ensure(l); err != nil {
		t.Fatal(err)
	}
	checkIs(t, c, l)
}

func checkIs(t testing.TB, c *Client, l Lane) {
	t.Helper()
	states, err := c.List()
	if err != nil {
		t.Fatal(err)
	}
	if len(states) != 1 || !states[0].Is(l) {
		t.Fatalf("in place is %+v\nwant %+v\n%s", states, l, place(t))
	}
}

func remove(t testing.TB, c *Client, l Lane) {
	t.Helper()
	if err := c.Remove(l.Index, l.Name); err != nil {
		t.Fatal(err)
	}
	if states, err := c.List(); err != nil || len(states) != 0 {
		t.Fatalf("still there: %+v, %v", states, err)
	}
}

func checkPlace(t testing.TB, before string) {
	t.Helper()
	if diff := cmp.Diff(before, place(t)); diff != "" {
		t.Errorf("not as before (-before +after):\n%s", diff)
	}
}

func TestKernelLaneComesAndGoes(t *testing.T) {
	inTestKernel(t)
	c := dial(t)
	before := place(t)
	l := testLane(t)
	ensure(t, c, l)

	// Other matches: those that stay keep their filters.
	l.Matches = append(l.Matches[2:], match("fd00::9/128", "fd00::2/128", 50))
	slices.SortFunc(l.Matches, Match.Compare)
	ensure(t, c, l)
	l.Matches = l.Matches[:1]
	ensure(t, c, l)
	remove(t, c, l)
	checkPlace(t, before)
	remove(t, c, l) // again: no error
}

func TestKernelEnsureWritesNothingWhereAllIsRight(t *testing.T) {
	inTestKernel(t)
	c := dial(t)
	l := testLane(t)
	ensure(t, c, l)

	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: 1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_TC-1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before := place(t)
	if err := dial(t).Ensure(l); err != nil {
		t.Fatal(err)
	}
	checkPlace(t, before)
	// What the kernel told of before the rename is what Ensure did.
	run(t, "ip link set lo name other")
	msgs, err := conn.Receive()
	if err != nil {
		t.Fatal(err)
	}
	if first, err := decodeLink(msgs[0].Data); msgs[0].Header.Type != rtmNewLink || err != nil || first.name != "other" {
		t.Errorf("the first event is %d of %q, %v", msgs[0].Header.Type, first.name, err)
	}
}

func TestKernelEnsureMendsWhatOthersBroke(t *testing.T) {
	inTestKernel(t)
	c := dial(t)
	l := testLane(t)
	before := place(t)
	ensure(t, c, l)
	ifb := IFBName(l.Index)
	for _, line := range []string{
		"ip link set " + ifb + " down",
		"ip link set " + ifb + " mtu 1280",
		"ip link set " + ifb + " txqueuelen 10",
		"ip link set " + ifb + " addrgenmode eui64",
		"ip link set " + ifb + " alias tsoagent:~cuts~covered~flows~of~another",
		"ip link del " + ifb,
		"ethtool -K " + ifb + " tso on tx-udp-segmentation on",
		"tc qdisc del dev nic clsact",
		"tc filter del dev nic egress pref 65534",
		"ip link set nic mtu 1300",
	} {
		t.Log(line)
		if strings.HasPrefix(line, "ethtool") {
			if _, err := exec.LookPath("ethtool"); err != nil {
				t.Skip("needs ethtool")
			}
		}
		run(t, line)
		if states, err := c.List(); err != nil || len(states) == 1 && states[0].Is(l) {
			t.Fatalf("%s goes unnoticed: %v", line, err)
		}
		ensure(t, c, l)
	}
	run(t, "ip link set nic mtu 1400")
	remove(t, c, l)
	checkPlace(t, before)
}

// What others have on the NIC stays as it is, with a lane and after it.
func TestKernelOthersStayAsTheyAre(t *testing.T) {
	inTestKernel(t)
	c := dial(t)
	l := testLane(t)
	run(t, "tc qdisc add dev nic root handle 1: htb default 1")
	run(t, "tc class add dev nic parent 1: classid 1:1 htb rate 1gbit")
	run(t, "tc qdisc add dev nic clsact")
	run(t, "tc filter add dev nic egress pref 10 protocol ip flower dst_ip 203.0.113.1 action drop")
	run(t, "tc filter add dev nic egress protocol all matchall action skbedit mark 7 continue")
	run(t, "tc filter add dev nic egress pref 65534 protocol ip flower dst_ip 203.0.113.2 action drop")
	run(t, "tc filter add dev nic ingress protocol all matchall action continue")
	before := place(t)
	ensure(t, c, l)
	now := place(t)
	for line := range strings.SplitSeq(before, "\n") {
		if !strings.Contains(now, line) {
			t.Errorf("gone: %s", line)
		}
	}
	// A filter without a preference comes ahead of ours.
	run(t, "tc filter add dev nic egress protocol ip flower dst_ip 203.0.113.3 action ok")
	if out := run(t, "tc filter show dev nic egress protocol ip"); strings.LastIndex(out, "203.0.113.3") > strings.Index(out, "192.0.2.2") {
		t.Errorf("a new filter stands behind ours:\n%s", out)
	}
	ensure(t, c, l)
	remove(t, c, l)
	run(t, "tc filter del dev nic egress pref 49151")
	checkPlace(t, before)
}

// A clsact that we made stays as long as others have filters in it.
func TestKernelClsactStaysUnderOthers(t *testing.T) {
	for _, where := range []string{"egress", "ingress"} {
		t.Run(where, func(t *testing.T) {
			inTestKernel(t)
			c := dial(t)
			l := testLane(t)
			ensure(t, c, l)
			run(t, "tc filter add dev nic "+where+" protocol all matchall action continue")
			remove(t, c, l)
			if out := run(t, "tc filter show dev nic "+where); !strings.Contains(out, "matchall") {
				t.Errorf("the filter of somebody else is gone:\n%s", out)
			}
			// From now on it is theirs: a lane that comes and goes leaves it, also when it is empty.
			run(t, "tc filter del dev nic "+where)
			ensure(t, c, l)
			remove(t, c, l)
			if out := run(t, "tc qdisc show dev nic"); !strings.Contains(out, "clsact") {
				t.Errorf("clsact is gone:\n%s", out)
			}
		})
	}
}

func TestKernelObstaclesAreNamedAndLeftAlone(t *testing.T) {
	for _, c := range []struct {
		name, set, want string
	}{
		{"ingress qdisc", "tc qdisc add dev nic ingress", `qdisc "ingress"`},
		{"shared block", "tc qdisc add dev nic egress_block 7 clsact", "shares with other devices"},
		{"our preference", "tc qdisc add dev nic clsact\ntc filter add dev nic egress pref 65535 protocol all matchall action continue", "preference"},
		{"our filter", "tc qdisc add dev nic clsact\ntc filter add dev nic egress pref 65535 protocol ipv6 flower ip_proto 33 dst_ip fd00::/64 skip_hw action ok", "somebody else has a filter"},
		{"our name", "ip link add NAME type dummy", "somebody else has a device"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inTestKernel(t)
			client := dial(t)
			l := testLane(t)
			for line := range strings.SplitSeq(c.set, "\n") {
				run(t, strings.ReplaceAll(line, "NAME", IFBName(l.Index)))
			}
			before := place(t)
			err := client.Ensure(l)
			if err == nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, os.ErrNotExist) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			checkPlace(t, before)
		})
	}
}

// Whoever is killed while it makes a lane leaves one of these behind. The next one finds it by
// names and marks alone, can finish it, and can take it away.
func TestKernelHalfMadeLanes(t *testing.T) {
	inTestKernel(t)
	c := dial(t)
	l := testLane(t)
	before := place(t)
	const steps = 6
	half := func(last int) {
		v, err := c.view()
		if err != nil {
			t.Fatal(err)
		}
		nic := v.links[l.Index]
		var ifb link
		for i, step := range []func() error{
			func() error { return c.addIFB(nic) },
			func() error {
				ifb.index, ifb.name = indexOf(t, IFBName(l.Index)), IFBName(l.Index)
				return c.setAlias(&ifb, nic.name, false)
			},
			func() error { return c.setIFB(ifb, nic) },
			func() error { return c.setAlias(&ifb, nic.name, true) },
			func() error { return c.addClsact(nic.index) },
			func() error { return c.put(nic.index, filter{handle: 1, match: l.Matches[0], to: ifb.index}, 0) },
		}[:last] {
			if err := step(); err != nil {
				t.Fatalf("step %d: %v", i, err)
			}
		}
	}
	for last := 1; last <= steps; last++ {
		half(last)
		states, err := c.List()
		if err != nil || len(states) != 1 || states[0].Index != l.Index || states[0].Is(l) {
			t.Errorf("after step %d: found %+v, %v", last, states, err)
		}
		remove(t, c, l)
		checkPlace(t, before)
		half(last)
		ensure(t, c, l)
		remove(t, c, l)
		checkPlace(t, before)
	}
}

func TestKernelNICThatIsGone(t *testing.T) {
	inTestKernel(t)
	c := dial(t)
	l := testLane(t)
	other := l
	other.Name = "another"
	before := place(t)
	if err := c.Ensure(other); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("another name: %v", err)
	}
	checkPlace(t, before)

	ensure(t, c, l)
	run(t, "ip link set nic down")
	run(t, "ip link set nic name renamed")
	l.Name = "renamed"
	if states, err := c.List(); err != nil || len(states) != 1 || states[0].Is(l) {
		t.Errorf("the new name goes unnoticed: %+v, %v", states, err)
	}
	ensure(t, c, l)

	run(t, "ip link del renamed")
	states, err := c.List()
	if err != nil || len(states) != 1 || states[0].Index != l.Index || states[0].Name != "" || states[0].IFB != IFBName(l.Index) {
		t.Fatalf("the orphan: %+v, %v", states, err)
	}
	if err := c.Ensure(l); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the NIC: %v", err)
	}
	remove(t, c, l)
	if out := run(t, "ip -o link show"); strings.Contains(out, ifbPrefix) {
		t.Errorf("an ifb is left:\n%s", out)
	}
}

const macvlan = `ip link add upper mtu 1400 link nic type macvlan
ip link set upper up
ip addr flush dev nic
ip addr add 192.0.2.1/24 dev upper
ip addr add fd00::1/64 dev upper nodad`

// A packet passes the ifb once, also where a filter of somebody else consumes the kernel's note
// that the packet comes from an ifb. Where the same packets match the lanes of two devices that
// stand one upon the other, they pass each of the two ifbs once; the lower one alone cuts them as well,
// which is what the planner chooses.
func TestKernelOnePass(t *testing.T) {
	const v4, v6 = "192.0.2.2", "fd00::2"
	for _, c := range []struct {
		name, set string
		by        string // the device of the covered flows
		to        []string
		upper     bool // has a lane of its own
	}{
		{"alone", "", "nic", []string{v4, v6}, false},
		{"marked and continued", "tc qdisc add dev nic clsact\ntc filter add dev nic egress pref 1 protocol all matchall action skbedit mark 7 continue", "nic", []string{v4, v6}, false},
		{"bpf program", "tc qdisc add dev nic clsact\ntc filter add dev nic egress pref 1 protocol all bpf da bytecode 1,6~0~0~4294967295", "nic", []string{v6}, false},
		{"htb", "tc qdisc add dev nic root handle 1: htb default 1\ntc class add dev nic parent 1: classid 1:1 htb rate 1gbit", "nic", []string{v4}, false},
		{"macvlan", macvlan, "upper", []string{v4}, true},
		{"macvlan without its own", macvlan, "upper", []string{v4, v6}, false},
	} {
		for _, far := range c.to {
			t.Run(c.name+" "+far, func(t *testing.T) {
				ns := inTestKernel(t)
				client := dial(t)
				for line := range strings.SplitSeq(c.set, "\n") {
					if line != "" {
						run(t, line)
					}
				}
				lanes := []Lane{{Index: indexOf(t, "nic"), Name: "nic"}}
				if c.upper {
					lanes = append(lanes, Lane{Index: indexOf(t, c.by), Name: c.by})
				}
				bits := netip.MustParseAddr(far).BitLen()
				near := netip.MustParsePrefix(map[int]string{32: "192.0.2.1/32", 128: "fd00::1/128"}[bits])
				for i := range lanes {
					lanes[i].Matches = []Match{{Src: near, Dst: netip.PrefixFrom(netip.MustParseAddr(far), bits), Proto: 6}}
					if err := client.Ensure(lanes[i]); err != nil {
						t.Fatal(err)
					}
				}
				tcpBurst(t, ns, far)
				states, err := client.List()
				if err != nil {
					t.Fatal(err)
				}
				sent := transmitted(t, "nic")
				// ARP, neighbour discovery and router solicitations go by themselves.
				const others = 20
				if whole := transmitted(t, c.by) < sent/2; whole != (c.by != "nic" && !c.upper) {
					t.Errorf("%s sent %d packets, nic %d", c.by, transmitted(t, c.by), sent)
				}
				for _, s := range states {
					t.Logf("%s: %d packets, %d dropped; nic sent %d", s.IFB, s.Packets, s.Dropped, sent)
					if s.Dropped > 0 || s.Packets > sent || s.Packets+others < sent {
						t.Errorf("%s: not once each", s.IFB)
					}
					if s.Packets < burst/1400 {
						t.Errorf("%s: super-packets", s.IFB)
					}
				}
			})
		}
	}
}

// burst is how many bytes tcpBurst sends.
const burst = 4 << 20

// tcpBurst sends bytes to the other namespace and waits until they are there.
func tcpBurst(t *testing.T, far *os.File, addr string) {
	t.Helper()
	var l net.Listener
	within(t, far, func() {
		var err error
		if l, err = net.Listen("tcp", net.JoinHostPort(addr, "5001")); err != nil {
			t.Fatal(err)
		}
	})
	defer l.Close()
	got := make(chan int64, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			got <- -1
			return
		}
		defer conn.Close()
		n, _ := io.Copy(io.Discard, conn)
		got <- n
	}()
	// The standard library may dial on another thread; a plain socket stays here.
	ap := netip.MustParseAddrPort(l.Addr().String())
	domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(ap.Port()), Addr: [4]byte(ap.Addr().AsSlice()[:4])})
	if ap.Addr().Is6() {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
	}
	s, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := unix.Connect(s, sa); err != nil {
		t.Fatal(err)
	}
	for b := bytes.Repeat([]byte{'x'}, burst); len(b) > 0; {
		n, err := unix.Write(s, b)
		if err != nil {
			t.Fatal(err)
		}
		b = b[n:]
	}
	if err := unix.Shutdown(s, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if n := <-got; n != burst {
		t.Fatalf("%d of %d bytes arrived", n, burst)
	}
}

// transmitted is a device's count of sent packets.
func transmitted(t testing.TB, name string) uint64 {
	t.Helper()
	all, err := dial(t).links()
	if err != nil {
		t.Fatal(err)
	}
	l, _ := (&view{links: all}).named(name)
	return l.packets
}

// Where the kernel lacks the classifier the error says so, and nothing stays.
func TestKernelWithoutFlower(t *testing.T) {
	inNS(t)
	before := place(t)
	l := testLane(t)
	c := dial(t)
	err := c.Ensure(l)
	if err == nil {
		remove(t, c, l)
		t.Skip("needs a kernel without CONFIG_NET_CLS_FLOWER")
	}
	if !strings.Contains(err.Error(), "flower") && !strings.Contains(err.Error(), "CONFIG_IFB") {
		t.Errorf("the error names no capability: %v", err)
	}
	if errors.Is(err, os.ErrNotExist) {
		t.Errorf("the error says that the NIC is gone: %v", err)
	}
	t.Log(err)
	checkPlace(t, before)
}
