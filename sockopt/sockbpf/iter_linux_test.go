package sockbpf

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// list is what the iterator says, by the inode of the socket's file; sockets that have none are left out.
func list(t *testing.T, it *Iter) map[uint64]sockopt.Conn {
	t.Helper()
	conns := map[uint64]sockopt.Conn{}
	if err := it.Each(func(c sockopt.Conn) bool {
		if c.Inode != 0 {
			if _, twice := conns[c.Inode]; twice {
				t.Errorf("twice: %+v", c)
			}
			conns[c.Inode] = c
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return conns
}

// world is the addresses of a family, and how its sockets are made.
type world struct {
	name           string
	server, client netip.Addr // the socket's own view: IPv4-mapped ones are that here
	signed         netip.Addr // a client that signs
	signedPrefix   netip.Prefix
	serverPrefix   netip.Prefix
	addrs          []string
}

func worlds() []world {
	a := netip.MustParseAddr
	return []world{
		{name: "v4", server: a("127.0.0.1"), client: a("127.0.0.1"), signed: a("127.0.0.2"),
			signedPrefix: netip.MustParsePrefix("127.0.0.2/32"), serverPrefix: netip.MustParsePrefix("127.0.0.1/32")},
		{name: "v6", server: a("fd00::1"), client: a("fd00::1"), signed: a("fd00:2::2"), addrs: []string{"fd00::1/128", "fd00:2::2/128"},
			signedPrefix: netip.MustParsePrefix("fd00:2::/64"), serverPrefix: netip.MustParsePrefix("fd00::1/128")},
		{name: "v4-mapped", server: a("::ffff:127.0.0.1"), client: a("::ffff:127.0.0.1"), signed: a("::ffff:127.0.0.2"),
			signedPrefix: netip.PrefixFrom(a("::ffff:127.0.0.2"), 32), serverPrefix: netip.PrefixFrom(a("::ffff:127.0.0.1"), 32)},
	}
}

// TestSignedAndInheritedToldApart is KERNEL.md 7, as the kernel's own sockets say it: a key takes GSO from the connections that it
// signs, and a listener's key from all that it accepts.
func TestSignedAndInheritedToldApart(t *testing.T) {
	for _, w := range worlds() {
		t.Run(w.name, func(t *testing.T) {
			enterNS(t, w.addrs...)
			it := openIter(t)
			at := func(a netip.Addr) socket { return newSocket(t, netip.AddrPortFrom(a, 0)) }
			open, keyed := at(w.server).listen(t), at(w.server)
			keyed.sign(t, w.signedPrefix, secret)
			keyed.listen(t)

			plain := at(w.client)
			plain.set(t, unix.SO_MARK, 0x5450)
			plainEnd := plain.connect(t, open, open.local(t))
			signed := at(w.signed)
			signed.sign(t, w.serverPrefix, secret)
			signedEnd := signed.connect(t, keyed, keyed.local(t))
			unsigned := at(w.client)
			inherited := unsigned.connect(t, keyed, keyed.local(t))

			conns := list(t, it)
			if len(conns) != 8 {
				t.Errorf("%d sockets, want 8: %v", len(conns), conns)
			}
			for _, tt := range []struct {
				name     string
				socket   socket
				keys     uint16
				disabled bool
				want     sockopt.Segmentation
			}{
				{"plain", plain, 0, false, sockopt.SegOffload},
				{"its other end", plainEnd, 0, false, sockopt.SegOffload},
				{"signed", signed, 1, true, sockopt.SegNone},
				{"its other end", signedEnd, 1, true, sockopt.SegNone},
				{"unsigned to a listener with a key", unsigned, 0, false, sockopt.SegOffload},
				{"inherited", inherited, 0, true, sockopt.SegNone},
				{"listener", open, 0, false, sockopt.SegUnknown},
				{"listener with a key", keyed, 1, true, sockopt.SegUnknown},
			} {
				c, ok := conns[tt.socket.inode(t)]
				if !ok {
					t.Errorf("%s isn't there", tt.name)
					continue
				}
				if c.MD5Keys != tt.keys || c.GSODisabled != tt.disabled || c.Segmentation() != tt.want {
					t.Errorf("%s: %d keys, disabled %t, %s; want %d, %t, %s: %+v",
						tt.name, c.MD5Keys, c.GSODisabled, c.Segmentation(), tt.keys, tt.disabled, tt.want, c)
				}
			}

			got := conns[plain.inode(t)]
			want := sockopt.Conn{
				Local: unmap(plain.local(t)), Remote: unmap(open.local(t)), State: sockopt.Established, UID: uint32(os.Geteuid()),
				V6Only: w.client.Is6() && !w.client.Is4In6(), // as it is bound to an address (__inet6_bind)
				Inode:  plain.inode(t), Mark: 0x5450, GSO: true, MSS: uint32(plain.get(t, unix.IPPROTO_TCP, unix.TCP_MAXSEG)),
				Route: sockopt.ConnRoute{Dev: 1, TSO: true},
			}
			// The device's limits are the loopback's; the cookie is there if the iterator or somebody else has asked.
			limits := cmpopts.IgnoreFields(sockopt.Conn{}, "GSOMaxSegs", "GSOMaxSize", "Route.GSOMaxSegs", "Cookie")
			if diff := cmp.Diff(want, got, limits, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if got.GSOMaxSegs < 2 || got.GSOMaxSize < got.MSS || got.Route.GSOMaxSegs != uint32(got.GSOMaxSegs) {
				t.Errorf("limits of %+v", got)
			}
			if l := conns[open.inode(t)]; l.State != sockopt.Listen || l.Remote.IsValid() || l.Local != unmap(open.local(t)) {
				t.Errorf("listener: %+v", l)
			}
		})
	}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// TestDeviceDecides switches TSO and the segments' limit at the device under live connections (KERNEL.md 1 and 2).
func TestDeviceDecides(t *testing.T) {
	for _, w := range worlds() {
		t.Run(w.name, func(t *testing.T) {
			enterNS(t, w.addrs...)
			it := openIter(t)
			listener := newSocket(t, netip.AddrPortFrom(w.server, 0)).listen(t)
			client := newSocket(t, netip.AddrPortFrom(w.client, 0))
			client.connect(t, listener, listener.local(t))
			check := func(s socket, after string, want sockopt.Segmentation) {
				t.Helper()
				if c := list(t, it)[s.inode(t)]; c.Segmentation() != want {
					t.Errorf("after %s: %s, want %s: %+v", after, c.Segmentation(), want, c)
				}
			}
			check(client, "connect", sockopt.SegOffload)
			feature, other := "tx-tcp-segmentation", "tx-tcp6-segmentation"
			if w.name == "v6" {
				feature, other = other, feature
			}
			run(t, "ethtool -K lo "+other+" off")
			check(client, other+" off", sockopt.SegOffload)
			run(t, "ethtool -K lo "+feature+" off")
			check(client, feature+" off", sockopt.SegSoftware)
			run(t, "ethtool -K lo "+feature+" on")
			check(client, feature+" on", sockopt.SegOffload)
			run(t, "ip link set lo gso_max_segs 1")
			check(client, "gso_max_segs 1", sockopt.SegSoftware)
			later := newSocket(t, netip.AddrPortFrom(w.client, 0))
			later.connect(t, listener, listener.local(t))
			check(later, "gso_max_segs 1 ahead of connect", sockopt.SegNone)
		})
	}
}

// TestOtherStates wants a row, and no wrong one, for what isn't a connection any more or not yet.
func TestOtherStates(t *testing.T) {
	enterNS(t)
	it := openIter(t)
	loopback := netip.MustParseAddr("127.0.0.1")
	listener := newSocket(t, netip.AddrPortFrom(loopback, 0))
	listener.sign(t, netip.MustParsePrefix("127.0.0.2/32"), secret)
	listener.listen(t)

	// Who closes first has the TIME_WAIT, and its key.
	client := newSocket(t, netip.MustParseAddrPort("127.0.0.2:0"))
	client.sign(t, netip.PrefixFrom(loopback, 32), secret)
	end := client.connect(t, listener, listener.local(t))
	local := client.local(t)
	closeBoth(t, client, end)

	// A request without an answer: the SYN that comes back finds nobody.
	run(t, "ip route add blackhole 192.0.2.0/24")
	request := newSocket(t, netip.AddrPortFrom(loopback, 0))
	if err := unix.SetNonblock(int(request), true); err != nil {
		t.Fatal(err)
	}
	run(t, "ip route add 203.0.113.1 dev lo")
	if err := unix.Connect(int(request), sockaddr(netip.MustParseAddrPort("203.0.113.1:9"))); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatalf("connect: %v", err)
	}

	var waiting, asking []sockopt.Conn
	if err := it.Each(func(c sockopt.Conn) bool {
		switch c.State {
		case sockopt.TimeWait:
			waiting = append(waiting, c)
		case 2: // TCP_SYN_SENT
			asking = append(asking, c)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if len(waiting) != 1 || waiting[0].Local != local || waiting[0].Remote != listener.local(t) || waiting[0].MD5Keys != 1 ||
		waiting[0].Segmentation() != sockopt.SegUnknown || waiting[0].Inode != 0 {
		t.Errorf("TIME_WAIT: %+v", waiting)
	}
	if len(asking) != 1 || asking[0].Inode != request.inode(t) || asking[0].Route.Dev != 1 {
		t.Errorf("SYN_SENT: %+v", asking)
	}
}

// TestV6Only has listeners for IPv6 alone and for both, and what each accepted.
func TestV6Only(t *testing.T) {
	enterNS(t)
	it := openIter(t)
	only := map[uint64]bool{}
	for _, v6only := range []bool{true, false} {
		// Ahead of bind(2), where it has to be.
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		listener := socket(fd)
		t.Cleanup(func() { _ = unix.Close(fd) })
		value := 0
		if v6only {
			value = 1
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, value); err != nil {
			t.Fatal(err)
		}
		if err := unix.Bind(fd, &unix.SockaddrInet6{}); err != nil {
			t.Fatal(err)
		}
		port := listener.listen(t).local(t).Port()
		client := newSocket(t, netip.MustParseAddrPort("[::1]:0"))
		end := client.connect(t, listener, netip.AddrPortFrom(netip.IPv6Loopback(), port))
		only[listener.inode(t)], only[end.inode(t)], only[client.inode(t)] = v6only, v6only, true // bound to an address
		if !v6only {
			client := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
			end := client.connect(t, listener, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
			only[end.inode(t)], only[client.inode(t)] = false, false
		}
	}
	got := map[uint64]bool{}
	for inode, c := range list(t, it) {
		got[inode] = c.V6Only
	}
	if diff := cmp.Diff(only, got); diff != "" {
		t.Errorf("by inode (-want +got):\n%s", diff)
	}
}

// closeBoth returns when first is in TIME_WAIT: it has sent its FIN first, and end's FIN has come back.
func closeBoth(t *testing.T, first, end socket) {
	t.Helper()
	if err := unix.Shutdown(int(first), unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if n, err := unix.Read(int(end), b[:]); n != 0 || err != nil {
		t.Fatalf("read at the other end: %d, %v", n, err)
	}
	if err := unix.Shutdown(int(end), unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Read(int(first), b[:]); n != 0 || err != nil {
		t.Fatalf("read: %d, %v", n, err)
	}
}

// TestEachStops wants no more sockets than fn takes.
func TestEachStops(t *testing.T) {
	enterNS(t)
	it := openIter(t)
	for range 3 {
		newSocket(t, netip.MustParseAddrPort("127.0.0.1:0")).listen(t)
	}
	seen := 0
	if err := it.Each(func(sockopt.Conn) bool { seen++; return seen < 2 }); err != nil || seen != 2 {
		t.Errorf("%d sockets, %v", seen, err)
	}
}

// TestOnlyThisNamespace wants the sockets of the thread's namespace, also from an iterator that was opened elsewhere.
func TestOnlyThisNamespace(t *testing.T) {
	it := openIter(t)
	enterNS(t)
	newSocket(t, netip.MustParseAddrPort("127.0.0.1:0")).listen(t)
	if conns := list(t, it); len(conns) != 1 {
		t.Errorf("%d sockets: %v", len(conns), conns)
	}
}

// TestManyReads has more sockets than one read holds, of which some go meanwhile.
func TestManyReads(t *testing.T) {
	enterNS(t)
	it := openIter(t)
	listener := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0")).listen(t)
	want := map[uint64]bool{listener.inode(t): true}
	var brief []socket
	for i := range 1000 {
		s := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
		end := s.connect(t, listener, listener.local(t))
		if i%10 == 0 {
			brief = append(brief, s)
			continue
		}
		want[s.inode(t)], want[end.inode(t)] = true, true
	}
	got := map[uint64]bool{}
	if err := it.Each(func(c sockopt.Conn) bool {
		got[c.Inode] = true
		if len(brief) > 0 {
			if err := unix.Shutdown(int(brief[0]), unix.SHUT_RDWR); err != nil {
				t.Fatal(err)
			}
			brief = brief[1:]
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	for inode := range want {
		if !got[inode] {
			t.Errorf("a socket that was there all the time is missing: inode %d of %d", inode, len(got))
		}
	}
}

// TestNoKeyInRecords searches the iterator's bytes for the key.
func TestNoKeyInRecords(t *testing.T) {
	enterNS(t)
	it := openIter(t)
	listener := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
	listener.sign(t, netip.MustParsePrefix("127.0.0.0/8"), secret)
	listener.listen(t)
	client := newSocket(t, netip.MustParseAddrPort("127.0.0.2:0"))
	client.sign(t, netip.MustParsePrefix("127.0.0.1/32"), secret)
	client.connect(t, listener, listener.local(t))
	r, err := it.link.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) != 3*connSize {
		t.Errorf("%d bytes, want three records of %d", len(b), connSize)
	}
	for i := range len(secret) - 4 {
		if bytes.Contains(b, []byte(secret[i:i+4])) {
			t.Fatalf("a part of the key is in the records: %x", b)
		}
	}
}
