package sockbpf

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// newMPTCP is newSocket for MPTCP.
func newMPTCP(t *testing.T, local netip.AddrPort) socket {
	t.Helper()
	domain := unix.AF_INET
	if local.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EINVAL) {
		t.Skipf("needs a kernel with MPTCP (CONFIG_MPTCP, net.mptcp.enabled): %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if domain == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Bind(fd, sockaddr(local)); err != nil {
		t.Fatal(err)
	}
	return socket(fd)
}

// TestSubflows has an MPTCP connection with two subflows: each is a TCP connection of its own, from and to the listener's port, and has the inode
// of the MPTCP socket, which is the file that a process has open. Such sockets take no key.
func TestSubflows(t *testing.T) {
	for _, tt := range []struct{ name, server, second string }{
		{"v4", "127.0.0.1", "127.0.0.2"},
		{"v6", "fd00::1", "fd00::2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			enterNS(t, "fd00::1/128", "fd00::2/128")
			it := openIter(t)
			unspecified := netip.IPv4Unspecified()
			server, second := netip.MustParseAddr(tt.server), netip.MustParseAddr(tt.second)
			if server.Is6() {
				unspecified = netip.IPv6Unspecified()
			}
			listener := newMPTCP(t, netip.AddrPortFrom(unspecified, 0)).listen(t)
			run(t, "ip mptcp limits set subflow 2 add_addr_accepted 0")
			run(t, "ip mptcp endpoint add "+tt.second+" dev lo subflow")
			if err := listener.trySign(netip.PrefixFrom(second, second.BitLen()), secret); !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOPROTOOPT) {
				t.Errorf("a key on an MPTCP socket: %v", err)
			}
			to := netip.AddrPortFrom(server, listener.local(t).Port())
			client := newMPTCP(t, netip.AddrPortFrom(server, 0))
			end := client.connect(t, listener, to)
			// The second subflow comes once the first has carried something both ways.
			for _, s := range []socket{end, client} {
				if _, err := unix.Write(int(s), []byte("x")); err != nil {
					t.Fatal(err)
				}
			}
			for _, s := range []socket{end, client} {
				if _, err := unix.Read(int(s), make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
			}
			var conns []sockopt.Conn
			for deadline := time.Now().Add(patience); len(conns) < 4; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("no second subflow: %+v", conns)
				}
				conns = conns[:0]
				if err := it.Each(func(c sockopt.Conn) bool {
					switch c.State {
					case sockopt.Listen:
						if c.Inode != listener.inode(t) || c.Local.Port() != to.Port() || c.V6Only != server.Is6() {
							t.Errorf("the listener: %+v", c)
						}
					case sockopt.Established:
						conns = append(conns, c)
					}
					return true
				}); err != nil {
					t.Fatal(err)
				}
			}
			slices.SortFunc(conns, func(a, b sockopt.Conn) int { return a.Remote.Addr().Compare(b.Remote.Addr()) })
			for _, c := range conns {
				accepted := c.Local == to
				if want := map[bool]uint64{true: end.inode(t), false: client.inode(t)}[accepted]; c.Inode != want || !accepted && c.Remote != to {
					t.Errorf("inode %d, want %d: %+v", c.Inode, want, c)
				}
				if c.MD5Keys+c.AOKeys != 0 || c.GSODisabled || c.Segmentation() != sockopt.SegOffload {
					t.Errorf("%s: %+v", c.Segmentation(), c)
				}
			}
			if last := conns[3]; last.Remote.Addr() != second {
				t.Errorf("no subflow comes from %s: %+v", second, last)
			}
		})
	}
}
