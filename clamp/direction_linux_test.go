package clamp

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/netns/netnstest"
)

// gateway makes two hosts and, in the test's own namespace, a gateway between them: side a has
// 10.1.0.2 and fd01::2, side d 10.3.0.2 and fd03::2. It returns the hosts' names.
func gateway(t *testing.T) (a, d string) {
	t.Helper()
	run := func(line string) {
		t.Helper()
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	names := make([]string, 2)
	for i, net := range []string{"1", "3"} {
		names[i] = "side" + net
		run("ip netns add " + names[i])
		host := "ip -n " + names[i] + " "
		run("ip link add v" + net + " type veth peer name v0 netns " + names[i])
		run("ip addr add 10." + net + ".0.1/24 dev v" + net + " && ip addr add fd0" + net + "::1/64 dev v" + net + " nodad && ip link set v" + net + " up")
		run(host + "addr add 10." + net + ".0.2/24 dev v0 && " + host + "addr add fd0" + net + "::2/64 dev v0 nodad && " + host + "link set v0 up")
		run(host + "route add default via 10." + net + ".0.1 && " + host + "-6 route add default via fd0" + net + "::1")
	}
	run("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	return names[0], names[1]
}

// in runs fn on a thread in a named namespace.
func in(t *testing.T, ns string, fn func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			err = unix.Setns(fd, unix.CLONE_NEWNET)
		}
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("in %s: %v", ns, err)
	}
}

// mss is what a connected socket sends at most in one segment, without options.
func mss(t *testing.T, c net.Conn) int {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return int(info.Snd_mss)
}

// open opens a connection from one host to an address of another, and returns what each of both
// sends at most.
func open(t *testing.T, from, to, addr string) (client, server int) {
	t.Helper()
	var l net.Listener
	in(t, to, func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(addr, "0"))
		return err
	})
	defer l.Close()
	var c net.Conn
	in(t, from, func() (err error) {
		// A device that has just come up may not have found its neighbours yet.
		for end := time.Now().Add(20 * time.Second); ; {
			if c, err = net.Dial("tcp", l.Addr().String()); !errors.Is(err, unix.EHOSTUNREACH) || time.Now().After(end) {
				return err
			}
		}
	})
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// The client has heard the SYN/ACK, and the server the SYN.
	return mss(t, c), mss(t, s)
}

// TestWhichRuleLimitsWhichDirection takes our rules away one by one: the one for the destination
// limits what comes back from there, the one for the source what is sent to it, whoever opens the
// connection.
func TestWhichRuleLimitsWhichDirection(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	tb := newNS(t)
	a, d := gateway(t)
	const timestamps = 12 // with which the kernel's own MSS goes without
	for _, f := range []struct {
		name, ip, aAddr, dAddr, covered string
		full, small                     int
	}{
		{"IPv4", "ip", "10.1.0.2", "10.3.0.2", "10.3.0.0/16", 1460 - timestamps, 1300 - timestamps},
		{"IPv6", "ip6", "fd01::2", "fd03::2", "fd03::/32", 1440 - timestamps, 1300 - timestamps},
	} {
		for _, c := range []struct {
			name, without string
			aSends        int // from side a to the covered destination
			dSends        int
		}{
			{"both rules", "", f.small, f.small},
			{"without that for the destination", "daddr", f.small, f.full},
			{"without that for the source", "saddr", f.full, f.small},
		} {
			what := f.name + ", " + c.name
			mustWrite(t, tb, Flatten([]Point{{netip.MustParsePrefix(f.covered), 1300}}))
			if c.without != "" {
				dropRule(t, f.ip+" "+c.without)
			}
			if client, server := open(t, a, d, f.dAddr); client != c.aSends || server != c.dSends {
				t.Errorf("%s: a opens: it sends %d and gets %d, not %d and %d", what, client, server, c.aSends, c.dSends)
			}
			if client, server := open(t, d, a, f.aAddr); server != c.aSends || client != c.dSends {
				t.Errorf("%s: d opens: it sends %d and gets %d, not %d and %d", what, client, server, c.dSends, c.aSends)
			}
		}
	}
	for _, c := range []struct {
		name, points string
		want         int
	}{
		{"an MSS is only ever lowered", "10.3.0.0/16=8960", 1460},
		{"the smaller of two holds", "10.3.0.0/16=1300 10.1.0.0/16=1200", 1200},
		{"nobody else", "10.4.0.0/16=1300 fd03::/32=1300", 1460},
	} {
		mustWrite(t, tb, Flatten(points(t, c.points)))
		if client, server := open(t, a, d, "10.3.0.2"); client != c.want-timestamps || server != c.want-timestamps {
			t.Errorf("%s: %d and %d, not %d", c.name, client, server, c.want-timestamps)
		}
	}
}

// dropRule deletes a rule of ours by the beginning of its text.
func dropRule(t *testing.T, begin string) {
	t.Helper()
	for line := range strings.Lines(nft(t, "-a", "list", "chain", "inet", "tsoagent", "mss")) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, begin) {
			_, handle, _ := strings.Cut(line, "# handle ")
			nft(t, "delete", "rule", "inet", "tsoagent", "mss", "handle", handle)
			return
		}
	}
	t.Fatalf("no rule %q", begin)
}
