package routes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
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
	{add: "type gre external", want: Encap{Proto: 47, AnyMark: true, External: true, Header: 24}, mute: true},
	{add: "type gre local 10.0.0.1 remote 10.0.0.2 encap gue encap-sport auto encap-dport 5555", want: Encap{Proto: 47, Header: 36}},
	{add: "type gretap local 10.0.0.1 remote 10.0.0.2", want: Encap{Proto: 47, Header: 38}, eth: true},
	{add: "type gretap remote 10.0.0.2 key 3", want: Encap{Proto: 47, Key: 3, HasKey: true, Header: 42}, eth: true},
	{add: "type gretap external", want: Encap{Proto: 47, AnyMark: true, External: true, Header: 38}, eth: true, mute: true},
	{add: "type ip6gre local fd00:a::1 remote fd00:a::2", want: Encap{Family: IPv6, Proto: 47, Header: 52}},
	{add: "type ip6gre local fd00:a::1 remote fd00:a::2 key 7 encaplimit none", want: Encap{Family: IPv6, Proto: 47, Key: 7, HasKey: true, Header: 48}},
	{add: "type ip6gre local fd00:a::1 remote fd00:a::2 encaplimit none fwmark 3", want: Encap{Family: IPv6, Proto: 47, Mark: 3, Header: 44}},
	{add: "type ip6gretap local fd00:a::1 remote fd00:a::2", want: Encap{Family: IPv6, Proto: 47, Header: 66}, eth: true},
	{add: "type ip6gretap local fd00:a::1 remote fd00:a::2 encaplimit none", want: Encap{Family: IPv6, Proto: 47, Header: 58}, eth: true},
	{add: "type erspan local 10.0.0.1 remote 10.0.0.2 seq key 1 erspan_ver 1 erspan 2", want: Encap{}, mute: true, mtu: 1450},
	{add: "type ipip local 10.0.0.1 remote 10.0.0.2", want: Encap{Proto: 4, Header: 20}},
	{add: "type ipip local 10.0.0.1 remote 10.0.0.2 mode any fwmark 0x20", want: Encap{Proto: 4, Mark: 0x20, Header: 20}},
	{add: "type ipip external", want: Encap{Proto: 4, AnyMark: true, External: true, Header: 20}, mute: true},
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
	{add: "type ip6tnl external", want: Encap{Family: IPv6, AnyMark: true, External: true, Header: 48}, mute: true},
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
	if e.Family == 0 && (!e.External || e.Proto != protoUDP) {
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
	w := openWire(t, outer)
	w.open(inner, eth)
	w.send(0)
	headers := 28
	if inner == "6" {
		headers = 48
	}
	return w.length - len(payload) - headers
}

// outerLookups are policies and whether they take the outer packets of a tunnel; with mark the
// inner packet has it.
var outerLookups = []struct {
	add, sel string
	mark     int
	covered  bool
}{
	// The GRE key is the selector's ports, and without a key it is 0.
	{"type gre local 10.0.0.1 remote 10.0.0.2", "src 10.0.0.1 dst 10.0.0.2 proto gre", 0, true},
	{"type gre local 10.0.0.1 remote 10.0.0.2", "proto gre key 0", 0, true},
	{"type gre local 10.0.0.1 remote 10.0.0.2", "proto gre key 7", 0, false},
	{"type gre local 10.0.0.1 remote 10.0.0.2 key 0x10002", "proto gre key 65538", 0, true},
	{"type gre local 10.0.0.1 remote 10.0.0.2 ikey 7 okey 8", "proto gre key 7", 0, false},
	{"type gre local 10.0.0.1 remote 10.0.0.2 key 7", "proto 4", 0, false},
	{"type ip6gre local fd00:a::1 remote fd00:a::2 key 7", "proto gre key 7", 0, true},
	{"type ip6gre local fd00:a::1 remote fd00:a::2 key 7", "proto gre key 8", 0, false},
	{"type gretap local 10.0.0.1 remote 10.0.0.2 key 7", "proto gre key 7", 0, true},
	{"type ip6gretap local fd00:a::1 remote fd00:a::2", "proto gre", 0, true},
	// The mark is the device's own, or the inner packet's, by kind.
	{"type gre local 10.0.0.1 remote 10.0.0.2 fwmark 9", "proto gre mark 9 mask 255", 0, true},
	{"type gre local 10.0.0.1 remote 10.0.0.2", "proto gre mark 9 mask 255", 9, false},
	{"type gretap local 10.0.0.1 remote 10.0.0.2", "proto gre mark 9 mask 255", 9, false},
	{"type ipip local 10.0.0.1 remote 10.0.0.2", "proto 4 mark 9 mask 255", 9, false},
	{"type sit local 10.0.0.1 remote 10.0.0.2 mode ip6ip fwmark 9", "proto 41 mark 9 mask 255", 0, true},
	{"type sit local 10.0.0.1 remote 10.0.0.2 mode ip6ip", "proto 41 mark 9 mask 255", 9, false},
	{"type ip6gre local fd00:a::1 remote fd00:a::2", "proto gre mark 9 mask 255", 9, false},
	{"type ip6gre local fd00:a::1 remote fd00:a::2 fwmark 9", "proto gre mark 9 mask 255", 0, true},
	{"type ip6tnl local fd00:a::1 remote fd00:a::2 mode ipip6 fwmark inherit", "proto 4 mark 9 mask 255", 9, true},
	{"type ip6tnl local fd00:a::1 remote fd00:a::2 mode ipip6", "proto 4 mark 9 mask 255", 9, false},
	{"type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789", "proto udp mark 9 mask 255", 9, true},
	{"type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789", "proto udp mark 9 mask 255", 0, false},
	{"type vxlan id 1 local fd00:a::1 remote fd00:a::2 dstport 4789", "proto udp mark 9 mask 255", 9, true},
	{"type geneve id 1 remote 10.0.0.2", "proto udp mark 9 mask 255", 9, true},
	{"type geneve id 1 remote fd00:a::2", "proto udp mark 9 mask 255", 9, true},
	// The protocol; FOU and GUE wrap after the lookup.
	{"type ipip local 10.0.0.1 remote 10.0.0.2", "proto 4", 0, true},
	{"type sit local 10.0.0.1 remote 10.0.0.2 mode ip6ip", "proto 41", 0, true},
	{"type sit local 10.0.0.1 remote 10.0.0.2", "proto 41", 0, false}, // IPv4 inside
	{"type sit local 10.0.0.1 remote 10.0.0.2", "proto 4", 0, true},
	{"type ip6tnl local fd00:a::1 remote fd00:a::2 mode any", "proto 4", 0, true},
	{"type ip6tnl local fd00:a::1 remote fd00:a::2 mode ip6ip6", "proto 41", 0, true},
	{"type ipip local 10.0.0.1 remote 10.0.0.2 encap fou encap-sport 6666 encap-dport 5555", "proto 4", 0, true},
	{"type ipip local 10.0.0.1 remote 10.0.0.2 encap fou encap-sport 6666 encap-dport 5555", "proto udp dport 5555", 0, false},
	{"type ipip local 10.0.0.1 remote 10.0.0.2 encap gue encap-sport auto encap-dport 5555", "proto udp", 0, false},
	{"type sit local 10.0.0.1 remote 10.0.0.2 mode ip6ip encap gue encap-sport auto encap-dport 5555", "proto 41", 0, true},
	{"type sit local 10.0.0.1 remote 10.0.0.2 mode ip6ip encap gue encap-sport auto encap-dport 5555", "proto udp", 0, false},
	{"type gre local 10.0.0.1 remote 10.0.0.2 key 7 encap fou encap-sport auto encap-dport 5555", "proto gre key 7", 0, true},
	{"type gre local 10.0.0.1 remote 10.0.0.2 key 7 encap fou encap-sport auto encap-dport 5555", "proto udp dport 5555", 0, false},
	{"type ip6tnl local fd00:a::1 remote fd00:a::2 mode ipip6 encap fou encap-sport auto encap-dport 5555", "proto 4", 0, true},
	{"type ip6tnl local fd00:a::1 remote fd00:a::2 mode ipip6 encap fou encap-sport auto encap-dport 5555", "proto udp", 0, false},
	// The ports of VXLAN and Geneve.
	{"type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789", "proto udp dport 4789", 0, true},
	{"type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789", "proto udp dport 4790", 0, false},
	{"type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789 srcport 100 101", "proto udp sport 100", 0, true},
	{"type vxlan id 1 local fd00:a::1 remote fd00:a::2 dstport 4789", "proto udp dport 4789", 0, true},
	{"type geneve id 1 remote 10.0.0.2", "proto udp dport 6081", 0, true},
	{"type geneve id 1 remote fd00:a::2", "proto udp dport 6081", 0, true},
	// A tunnel without a local address has the route's source, and the route's device.
	{"type gre remote 10.0.0.2", "src 10.0.0.1 dst 10.0.0.2 proto gre", 0, true},
	{"type ipip remote 10.0.0.2", "src 10.0.0.9/32 dst 10.0.0.2", 0, false},
	{"type geneve id 1 remote 10.0.0.2", "src 10.0.0.1 dst 10.0.0.2", 0, true},
	{"type geneve id 1 remote fd00:a::2", "src fd00:a::1 dst fd00:a::2", 0, true},
	{"type gre local 10.0.0.1 remote 10.0.0.2", "dst 10.0.0.2 dev a0", 0, true},
	{"type gre local 10.0.0.1 remote 10.0.0.2", "dst 10.0.0.2 dev b0", 0, false},
	{"type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789", "dst 10.0.0.2 dev a0", 0, true},
	{"type sit local 10.0.0.1 remote 10.0.0.2 mode ip6ip", "dst 10.0.0.2 dev a0", 0, true},
	{"type ip6gre local fd00:a::1 remote fd00:a::2", "dst fd00:a::2 dev a0", 0, false},
	{"type ip6gre local fd00:a::1 remote fd00:a::2 dev a0", "dst fd00:a::2 dev a0", 0, true},
	{"type vxlan id 1 local fd00:a::1 remote fd00:a::2 dstport 4789", "dst fd00:a::2 dev a0", 0, false},
}

// TestKernelOuterLookups looks at what of a tunnel the policy lookup of its outer packets sees
// (KERNEL.md 45 to 49). In each case a packet leaves before the policy is there, with it, and
// after it: what the driver has cached follows the policies.
func TestKernelOuterLookups(t *testing.T) {
	ns := tunnelNS(t)
	for _, ends := range [][2]string{{"10.0.0.1", "10.0.0.2"}, {"fd00:a::1", "fd00:a::2"}} {
		output(t, "ip", "xfrm", "state", "add", "src", ends[0], "dst", ends[1], "proto", "esp", "spi", "1", "reqid", "1",
			"mode", "transport", "aead", "rfc4106(gcm(aes))", "0x0102030405060708090a0b0c0d0e0f1011121314", "128")
	}
	for _, tc := range outerLookups {
		name := fmt.Sprintf("%s, %s, mark %d", strings.TrimPrefix(tc.add, "type "), tc.sel, tc.mark)
		ns.run(t, name, func(t *testing.T) {
			outer, r := IPv4, "10.0.0.2"
			if strings.Contains(tc.add, "fd00:") {
				outer, r = IPv6, "fd00:a::2"
			}
			ip(t, "link add t0 "+tc.add)
			defer ip(t, "link del t0")
			inner := "4"
			if strings.Contains(tc.add, "ip6ip") {
				inner = "6"
			}
			w := openWire(t, outer)
			w.open(inner, linkNamed(t, "t0").Type == arphrdEther)
			if p := w.send(tc.mark); p == protoESP {
				t.Fatal("covered without a policy")
			}
			sel := tc.sel
			if !strings.Contains(sel, "dst ") { // not the inner packets too
				sel = "dst " + r + " " + sel
			}
			if !strings.Contains(sel, "src ") {
				sel = "src " + outer.Any().String() + " " + sel
			}
			args := append([]string{"ip", "xfrm", "policy", "add"}, strings.Fields(sel)...)
			output(t, append(args, "dir", "out", "tmpl", "proto", "esp", "reqid", "1", "mode", "transport")...)
			p := w.send(tc.mark)
			output(t, "ip", "xfrm", "policy", "flush")
			if (p == protoESP) != tc.covered {
				t.Errorf("protocol %d left, covered should be %t", p, tc.covered)
			}
			if p := w.send(tc.mark); p == protoESP {
				t.Error("covered after the policy went")
			}
		})
	}
}

const protoESP = 50

// wire looks at what leaves by a0 when something is sent through t0.
type wire struct {
	t     *testing.T
	fd    int
	outer Family
	inner string
	// length is that of the last packet, as its IP header has it.
	length int
}

// payload is what is sent.
var payload = bytes.Repeat([]byte("tso!"), 25)

func openWire(t *testing.T, outer Family) *wire {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(binary.BigEndian.Uint16([]byte{0, unix.ETH_P_ALL}))<<8)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL << 8, Ifindex: int(linkNamed(t, "a0").Index)}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	return &wire{t: t, fd: fd, outer: outer}
}

// open sets t0 up with addresses of the inner family.
func (w *wire) open(inner string, eth bool) {
	w.t.Helper()
	w.inner = inner
	lines := "link set t0 addrgenmode none\nlink set t0 up\naddr add 192.168.77.1/24 dev t0"
	if inner == "6" {
		lines = "link set t0 addrgenmode none\nlink set t0 up\naddr add fd77::1/64 dev t0 nodad"
	}
	if eth {
		lines += "\nneigh add " + w.peer() + " lladdr 02:00:00:00:00:77 dev t0"
	}
	ip(w.t, lines)
}

func (w *wire) peer() string {
	if w.inner == "6" {
		return "fd77::2"
	}
	return "192.168.77.2"
}

// send sends a packet with a mark to the peer, and returns the protocol of the outer packet that
// leaves. What was there before is not looked at.
func (w *wire) send(mark int) (proto byte) {
	w.t.Helper()
	b := make([]byte, 2048)
	for {
		if _, _, err := unix.Recvfrom(w.fd, b, unix.MSG_DONTWAIT); err != nil {
			break
		}
	}
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var serr error
		err := c.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
		return errors.Join(err, serr)
	}}
	c, err := d.Dial("udp"+w.inner, net.JoinHostPort(w.peer(), "9"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(payload); err != nil {
		w.t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		n, from, err := unix.Recvfrom(w.fd, b, 0)
		if err != nil {
			w.t.Fatalf("nothing left by a0: %v", err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype != unix.PACKET_OUTGOING || n < 100 {
			continue
		}
		if w.outer == IPv4 && b[0]>>4 == 4 {
			w.length = int(binary.BigEndian.Uint16(b[2:]))
			return b[9]
		}
		if w.outer == IPv6 && b[0]>>4 == 6 {
			w.length = 40 + int(binary.BigEndian.Uint16(b[4:]))
			if b[6] == unix.IPPROTO_DSTOPTS { // the encapsulation limit
				return b[40]
			}
			return b[6]
		}
	}
	w.t.Fatal("nothing of the outer family left by a0")
	return 0
}

// TestKernelLocksOnEncapXfrm locks routes that say their if_id, and gives them back. The kernel
// shows RTA_ENCAP in another way than it takes it.
func TestKernelLocksOnEncapXfrm(t *testing.T) {
	ns := tunnelNS(t)
	for _, route := range []string{
		"route add 198.18.1.0/24 dev x0 encap xfrm if_id 5",
		"-6 route add 2001:db8:1::/48 dev x0 encap xfrm if_id 5",
	} {
		ns.run(t, route, func(t *testing.T) {
			ip(t, "link add x0 type xfrm external\nlink set x0 up")
			defer ip(t, "link del x0")
			ip(t, route)
			tb := openTable(t)
			dst := "198.18.1.0/24"
			if strings.HasPrefix(route, "-6") {
				dst = "2001:db8:1::/48"
			}
			before := findOne(t, tb, dst)
			if nh := before.Body.Nexthops[0]; !nh.Encap || nh.IfID != 5 {
				t.Errorf("nexthop %+v", nh)
			}
			for _, m := range []MTUMetric{{MTU: 1400, Locked: true}, {}} {
				b, err := EncodeLock(findOne(t, tb, dst), m)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := tb.Replace(b); err != nil {
					t.Fatalf("%s: %v", m, err)
				}
				after := findOne(t, tb, dst)
				if MTUMetricOf(after.Body) != m || !slices.Equal(after.Body.Nexthops, before.Body.Nexthops) {
					t.Errorf("%s: %+v %+v, want nexthops %+v", m, after.Body.Metrics, after.Body.Nexthops, before.Body.Nexthops)
				}
			}
		})
	}
}
