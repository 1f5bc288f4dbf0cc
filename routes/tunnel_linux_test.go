package routes

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tunnelNS is a namespace like vethNS in the test kernel, with neighbours for the outer packets.
func tunnelNS(t *testing.T) *testNS {
	t.Helper()
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for tunnels of all kinds")
	}
	ns := vethNS(t)
	ip(t, `neigh add 10.0.0.2 lladdr 02:00:00:00:00:02 dev a0
neigh add fd00:a::2 lladdr 02:00:00:00:00:02 dev a0`)
	return ns
}

// tunnels are devices as `ip link add t0` makes them, and how they wrap what they send. A kind
// whose MTU doesn't come from a route has base as the MTU that its header is taken from.
var tunnels = []struct {
	add  string
	want Encap
	eth  bool
	v6   bool // the inner packet to measure is IPv6
	mute bool // nothing to measure: no packet of its own leaves
	mtu  int  // of the device; 0 for 1500 less the header
}{
	{add: "type gre local 10.0.0.1 remote 10.0.0.2", want: Encap{Proto: 47, Header: 24}},
	{add: "type gre remote 10.0.0.2 key 7 csum seq", want: Encap{Proto: 47, Key: 7, HasKey: true, Header: 36}},
	{add: "type gre local 10.0.0.1 remote 10.0.0.2 ikey 5 okey 0x10002 dev a0", want: Encap{Proto: 47, Key: 0x10002, HasKey: true, Header: 28}},
	{add: "type gre local 10.0.0.1 remote 10.0.0.2 fwmark 9", want: Encap{Proto: 47, Mark: 9, Header: 24}},
	{add: "type gre local 10.0.0.1", want: Encap{Proto: 47, Header: 24}, mute: true},
	{add: "type gre local 10.0.0.1 remote 224.1.1.1 dev a0", want: Encap{Proto: 47, Key: 0xe0010101, HasKey: true, Header: 28}, mute: true},
	{add: "type gre external", want: Encap{Proto: 47, External: true, Header: 24}, mute: true},
	{add: "type gre local 10.0.0.1 remote 10.0.0.2 encap gue encap-sport auto encap-dport 5555", want: Encap{Proto: 47, Header: 36}},
	{add: "type gretap local 10.0.0.1 remote 10.0.0.2", want: Encap{Proto: 47, Header: 38}, eth: true},
	{add: "type gretap remote 10.0.0.2 key 3", want: Encap{Proto: 47, Key: 3, HasKey: true, Header: 42}, eth: true},
	{add: "type gretap external", want: Encap{Proto: 47, External: true, Header: 38}, eth: true, mute: true},
	{add: "type ip6gre local fd00:a::1 remote fd00:a::2", want: Encap{Family: IPv6, Proto: 47, Header: 52}},
	{add: "type ip6gre local fd00:a::1 remote fd00:a::2 key 7 encaplimit none", want: Encap{Family: IPv6, Proto: 47, Key: 7, HasKey: true, Header: 48}},
	{add: "type ip6gre local fd00:a::1 remote fd00:a::2 encaplimit none fwmark 3", want: Encap{Family: IPv6, Proto: 47, Mark: 3, Header: 44}},
	{add: "type ip6gretap local fd00:a::1 remote fd00:a::2", want: Encap{Family: IPv6, Proto: 47, Header: 66}, eth: true},
	{add: "type ip6gretap local fd00:a::1 remote fd00:a::2 encaplimit none", want: Encap{Family: IPv6, Proto: 47, Header: 58}, eth: true},
	{add: "type erspan local 10.0.0.1 remote 10.0.0.2 seq key 1 erspan_ver 1 erspan 2", want: Encap{}, mute: true, mtu: 1450},
	{add: "type ipip local 10.0.0.1 remote 10.0.0.2", want: Encap{Proto: 4, Header: 20}},
	{add: "type ipip local 10.0.0.1 remote 10.0.0.2 mode any fwmark 0x20", want: Encap{Proto: 4, Mark: 0x20, Header: 20}},
	{add: "type ipip external", want: Encap{Proto: 4, External: true, Header: 20}, mute: true},
	{add: "type ipip local 10.0.0.1 remote 10.0.0.2 encap fou encap-sport 6666 encap-dport 5555", want: Encap{Proto: 4, Header: 28}},
	{add: "type ipip local 10.0.0.1 remote 10.0.0.2 encap gue encap-sport auto encap-dport 5555", want: Encap{Proto: 4, Header: 32}},
	{add: "type sit local 10.0.0.1 remote 10.0.0.2 mode ip6ip", want: Encap{Proto: 41, Header: 20}, v6: true},
	{add: "type sit local 10.0.0.1 remote 10.0.0.2", want: Encap{Proto: 0, Header: 20}},
	{add: "type sit local 10.0.0.1 mode ip6ip", want: Encap{Proto: 41, Header: 20}, mute: true, mtu: 1480},
	{add: "type sit local 10.0.0.1 remote 10.0.0.2 encap fou encap-sport auto encap-dport 5555 mode ip6ip", want: Encap{Proto: 41, Header: 28}, v6: true},
	{add: "type ip6tnl local fd00:a::1 remote fd00:a::2 mode ipip6", want: Encap{Family: IPv6, Proto: 4, Header: 48}},
	{add: "type ip6tnl local fd00:a::1 remote fd00:a::2 mode ip6ip6 encaplimit none", want: Encap{Family: IPv6, Proto: 41, Header: 40}, v6: true},
	{add: "type ip6tnl local fd00:a::1 remote fd00:a::2 mode any encaplimit none fwmark inherit", want: Encap{Family: IPv6, Proto: 0, AnyMark: true, Header: 40}},
	{add: "type ip6tnl local fd00:a::1 remote fd00:a::2 mode any", want: Encap{Family: IPv6, Proto: 0, Header: 48}},
	{add: "type ip6tnl external", want: Encap{Family: IPv6, External: true, Header: 48}, mute: true},
	{add: "type vti local 10.0.0.1 remote 10.0.0.2 ikey 1 okey 42", want: Encap{Key: 42, HasKey: true, Mark: 42}, mute: true, mtu: 1480},
	{add: "type vti6 local fd00:a::1 remote fd00:a::2 key 42", want: Encap{Family: IPv6, Key: 42, HasKey: true, Mark: 42}, mute: true, mtu: 1460},
	{add: "type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789 dev a0", want: Encap{Proto: 17, AnyMark: true, Dport: PortRange{4789, 4789}, Header: 50}, eth: true},
	{add: "type vxlan id 1 remote 10.0.0.2 dstport 4790 srcport 100 200 dev a0", want: Encap{Proto: 17, AnyMark: true, Dport: PortRange{4790, 4790}, Sport: PortRange{100, 199}, Header: 50}, eth: true},
	{add: "type vxlan id 1 local fd00:a::1 remote fd00:a::2 dstport 4789 dev a0", want: Encap{Family: IPv6, Proto: 17, AnyMark: true, Dport: PortRange{4789, 4789}, Header: 70}, eth: true},
	{add: "type vxlan id 1 group 239.1.1.1 dstport 4789 dev a0", want: Encap{Proto: 17, AnyMark: true, Dport: PortRange{4789, 4789}, Header: 50}, mute: true},
	{add: "type vxlan id 1 local 10.0.0.1 dstport 4789", want: Encap{Proto: 17, AnyMark: true, Dport: PortRange{4789, 4789}, Header: 50}, mute: true, mtu: 1500},
	{add: "type vxlan external dstport 4789", want: Encap{Proto: 17, AnyMark: true, External: true, Dport: PortRange{4789, 4789}, Header: 50}, mute: true, mtu: 1500},
	{add: "type geneve id 1 remote 10.0.0.2", want: Encap{Proto: 17, AnyMark: true, Dport: PortRange{6081, 6081}, Header: 50}, eth: true},
	{add: "type geneve id 1 remote fd00:a::2 dstport 7000", want: Encap{Family: IPv6, Proto: 17, AnyMark: true, Dport: PortRange{7000, 7000}, Header: 70}, eth: true},
	{add: "type geneve external", want: Encap{Proto: 17, AnyMark: true, External: true, Dport: PortRange{6081, 6081}, Header: 50}, mute: true, mtu: 65465},
}

// TestKernelTunnels makes each kind of tunnel, and compares its Encap with what the kernel
// takes off the device's MTU and with what it adds on the wire.
func TestKernelTunnels(t *testing.T) {
	ns := tunnelNS(t)
	for _, tc := range tunnels {
		ns.run(t, strings.TrimPrefix(tc.add, "type "), func(t *testing.T) {
			ip(t, "link add t0 "+tc.add)
			defer ip(t, "link del t0")
			link := linkNamed(t, "t0")
			if *capture { // in the test kernel nothing can be written: these lines go to testdata/tunnels.txt
				fmt.Printf("capture %s\n", rawLink(t, link.Index))
			}
			want := tc.want
			if want.Header != 0 || want.HasKey {
				want = complete(want, tc.add, linkNamed(t, "a0").Index)
			}
			if link.Encap != want {
				t.Errorf("%+v, want\n%+v", link.Encap, want)
			}
			if !link.Tunnel() {
				t.Error("it is no tunnel")
			}
			if mtu := tc.mtu; mtu != 0 && link.MTU != mtu || mtu == 0 && link.MTU != 1500-want.Header {
				t.Errorf("the kernel made its MTU %d; the header has %d", link.MTU, want.Header)
			}
			if tc.mute {
				return
			}
			inner := "4"
			if tc.v6 {
				inner = "6"
			}
			if n := onTheWire(t, inner, tc.eth, want.Family); n != want.Header {
				t.Errorf("%d bytes more on the wire, want %d", n, want.Header)
			}
		})
	}
}

// complete adds what the command names.
func complete(e Encap, add string, a0 Ifindex) Encap {
	if e.Family == 0 {
		e.Family = IPv4
	}
	f := strings.Fields(add)
	for i, w := range f {
		switch w {
		case "local":
			e.Local = netip.MustParseAddr(f[i+1])
		case "remote", "group":
			e.Remote = netip.MustParseAddr(f[i+1])
			if f[1] == "gre" && e.Remote.IsMulticast() {
				e.Remote = netip.Addr{}
			}
		case "dev":
			e.Link = a0
		}
	}
	return e
}

func linkNamed(t testing.TB, name string) *Link {
	t.Helper()
	links, err := openTable(t).Links()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Name == name {
			return l
		}
	}
	t.Fatalf("no link %s", name)
	return nil
}

// rawLink is the RTM_NEWLINK message of a device as a line of testdata.
func rawLink(t testing.TB, index Ifindex) string {
	t.Helper()
	tb := openTable(t)
	var line string
	err := dump(tb.c, rtmGetLink, linkRequest(), func(h Header, data []byte) error {
		if Ifindex(binary.NativeEndian.Uint32(data[4:])) == index {
			line = fmt.Sprintf("%d %x", h.Type, data)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return line
}

// onTheWire sends a packet through t0 and returns how much longer it is when it leaves by a0,
// by the lengths in the IP headers.
func onTheWire(t *testing.T, inner string, eth bool, outer Family) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(binary.BigEndian.Uint16([]byte{0, unix.ETH_P_ALL}))<<8)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	a0 := linkNamed(t, "a0")
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL << 8, Ifindex: int(a0.Index)}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	ip(t, "link set t0 addrgenmode none\nlink set t0 up")
	peer, headers := "192.168.77.2", 28
	if inner == "6" {
		peer, headers = "fd77::2", 48
		ip(t, "addr add fd77::1/64 dev t0 nodad")
	} else {
		ip(t, "addr add 192.168.77.1/24 dev t0")
	}
	if eth {
		ip(t, "neigh add "+peer+" lladdr 02:00:00:00:00:77 dev t0")
	}
	c, err := net.Dial("udp"+inner, net.JoinHostPort(peer, "9"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	payload := bytes.Repeat([]byte("tso!"), 25)
	if _, err := c.Write(payload); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2048)
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			t.Fatalf("nothing left by a0: %v", err)
		}
		if n < 40 || !bytes.Contains(b[:n], payload) {
			continue
		}
		length := int(binary.BigEndian.Uint16(b[2:]))
		if outer == IPv6 {
			length = 40 + int(binary.BigEndian.Uint16(b[4:]))
		}
		return length - len(payload) - headers
	}
	t.Fatal("it did not leave by a0")
	return 0
}
