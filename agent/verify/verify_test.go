package verify

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"tsoagent/wire"
	"tsoagent/xfrmwatch"
)

var update = flag.Bool("update", false, "write testdata/verdicts.txtar")

const golden = "testdata/verdicts.txtar"

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// world has devices of each kind, and policies that try what can go wrong.
func world() *World {
	on, off := Offload{Active: true}, Offload{}
	held := Offload{Planned: true, Held: true}
	sel := func(index uint32, src, dst, action string, more func(*Policy)) Policy {
		p := Policy{Index: index, Src: netip.MustParsePrefix(src), Dst: netip.MustParsePrefix(dst), Action: action}
		if more != nil {
			more(&p)
		}
		return p
	}
	ifID := func(id uint32) func(*Policy) { return func(p *Policy) { p.IfID = id } }
	return &World{
		Version: Version, Live: true, Carriers: []string{"nic1", "ipsec1"},
		Devices: []Device{
			{Index: 2, Name: "nic1", TSO4: on, TSO6: on, UDP: on},
			{Index: 3, Name: "nic2", TSO4: off, TSO6: on},
			{Index: 4, Name: "nic3", TSO4: Offload{Fixed: true}, TSO6: Offload{Held: true}},
			{Index: 5, Name: "nic4", TSO4: on, TSO6: on, CutsESP: true},
			{Index: 7, Name: "nic5", TSO4: held, TSO6: held, SharedOff: true},
			{Index: 8, Name: "nic6", TSO4: Offload{Planned: true}, TSO6: held, SharedOff: true},
			{Index: 6, Name: "port1", TSO4: on, TSO6: on, Passing: true},
			{Index: 10, Name: "ipsec1", Kind: "xfrm", IfID: 1, TSO4: held, TSO6: held},
			{Index: 11, Name: "ipsec2", Kind: "xfrm", IfID: 2, TSO4: Offload{Active: true, Planned: true}, TSO6: on, UDP: Offload{Active: true, Planned: true}},
			{Index: 12, Name: "ipsec3", Kind: "xfrm", External: true, TSO4: on, TSO6: on},
			{Index: 13, Name: "vti1", Kind: "vti", VTI: true, Mark: 7, TSO4: Offload{Fixed: true}},
			{Index: 14, Name: "gre1", Kind: "gre", Covered: true, Policy: 60, TSO4: held, TSO6: held},
			{Index: 15, Name: "moved", Kind: "xfrm", IfID: 1, Elsewhere: true, TSO4: on, TSO6: on},
			{Index: 1, Name: "lo", TSO4: Offload{Active: true, Fixed: true}, TSO6: Offload{Active: true, Fixed: true}},
		},
		Policies: []Policy{
			sel(8, "10.9.0.0/24", "10.3.8.0/24", ActBypass, func(p *Policy) { p.Mark = xfrmwatch.Mark{Value: 1, Mask: 1} }),
			sel(16, "10.9.0.0/24", "10.3.7.0/24", ActBypass, nil),
			sel(20, "10.9.0.0/24", "10.3.6.0/24", ActMaybe, nil),
			sel(21, "10.9.0.0/24", "10.3.5.0/24", ActBlock, nil),
			sel(24, "10.9.0.0/24", "10.2.0.0/16", ActCover, ifID(1)),
			sel(32, "fd09::/64", "fd02::/32", ActCover, ifID(1)),
			sel(40, "10.9.0.0/24", "10.2.0.0/16", ActCover, ifID(2)),
			sel(41, "fd09::/64", "fd02::/32", ActCover, ifID(2)),
			sel(48, "10.9.0.0/24", "10.3.0.0/16", ActCover, nil),
			sel(49, "fd09::/64", "fd03::/32", ActCover, func(p *Policy) { p.Proto = 6; p.Dport = xfrmwatch.PortMatch{Port: 443, Mask: 0xffff} }),
			sel(56, "0.0.0.0/0", "0.0.0.0/0", ActCover, func(p *Policy) { p.Mark = xfrmwatch.Mark{Value: 7, Mask: 0xff} }),
		},
		SAs: []SA{
			{Src: addr("10.1.1.1"), Dst: addr("10.1.1.2"), SPI: 0x901, Proto: 50, Policy: 48, More: 2},
			{Src: addr("10.1.1.1"), Dst: addr("10.1.1.2"), SPI: 0x902, Proto: 50, Policy: 24},
			{Src: addr("10.1.1.1"), Dst: addr("10.1.1.3"), SPI: 0x903, Proto: 50, Policy: 40, Encap: true},
			{Src: addr("fd01::1"), Dst: addr("fd01::2"), SPI: 0x904, Proto: 51, Policy: 49},
		},
	}
}

var local = []netip.Addr{addr("10.1.1.1"), addr("10.9.0.1"), addr("fd01::1"), addr("fd09::1"), addr("::ffff:10.7.0.1")}

// sight is so many packets of one kind.
type sight struct {
	port, n int
	frame   wire.Frame
}

// ports are numbered in the order of names.
func portsOf(names ...string) []Port {
	var out []Port
	for _, name := range names {
		p := Port{Name: name, MTU: 1500, Index: 99}
		for _, d := range world().Devices {
			if d.Name == name {
				p.Index = d.Index
			}
		}
		if name == "lo" {
			p.MTU = 65536
		}
		out = append(out, p)
	}
	return out
}

// packet makes the front of an IP packet: what follows the addresses is its transport header.
func packet(src, dst string, proto byte, length int, transport []byte, more ...func(*wire.Frame)) wire.Frame {
	a, b := addr(src), addr(dst)
	var head []byte
	f := wire.Frame{Hatype: 0xfffe}
	if a.Is4() {
		head = []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, proto, 0, 0}
		f.Protocol = 0x800
	} else {
		head = []byte{0x60, 0, 0, 0, 0, 0, proto, 64}
		f.Protocol = 0x86dd
	}
	head = append(append(head, a.AsSlice()...), b.AsSlice()...)
	head = append(head, transport...)
	f.Data, f.Length = head, length
	for _, fn := range more {
		fn(&f)
	}
	return f
}

func tcpTo(src, dst string, dport uint16, length int, more ...func(*wire.Frame)) wire.Frame {
	return packet(src, dst, 6, length, []byte{0x9c, 0x40, byte(dport >> 8), byte(dport), 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0}, more...)
}

// behind makes a fragment behind the first of an IPv4 packet.
func behind(f *wire.Frame) { f.Data[7] = 185 }

// push sets PSH in a packet of TCP.
func push(f *wire.Frame) {
	at := map[bool]int{true: 20, false: 40}[f.Protocol == 0x800]
	f.Data[at+13] |= 8
}

func signed(src, dst string, length int, more ...func(*wire.Frame)) wire.Frame {
	head := []byte{0x9c, 0x40, 0, 179, 0, 0, 0, 1, 0, 0, 0, 2, 0xa0, 0x10, 1, 0, 0, 0, 0, 0, 19, 18}
	return packet(src, dst, 6, length, append(head, make([]byte, 18)...), more...)
}

func udpTo(src, dst string, port uint16, length int, word uint32, more ...func(*wire.Frame)) wire.Frame {
	return packet(src, dst, 17, length, []byte{byte(port >> 8), byte(port), byte(port >> 8), byte(port), 0, 0, 0, 0, byte(word >> 24), byte(word >> 16), byte(word >> 8), byte(word)}, more...)
}

func espOf(src, dst string, spi uint32, length int, more ...func(*wire.Frame)) wire.Frame {
	return packet(src, dst, 50, length, []byte{byte(spi >> 24), byte(spi >> 16), byte(spi >> 8), byte(spi), 0, 0, 0, 1}, more...)
}

func super(kind wire.GSO) func(*wire.Frame) {
	return func(f *wire.Frame) { f.GSO, f.Segment = kind, 1400 }
}

var scenes = []struct {
	name  string
	ports []string
	world func(*World)
	stats []wire.Stats
	sees  []sight
}{
	{name: "nothing at all", ports: []string{"ipsec1", "nic1"}, world: func(w *World) { w.Keys = 2 }},
	{name: "as it should be, in both families", ports: []string{"ipsec1", "nic1"}, sees: []sight{
		{0, 30, tcpTo("10.9.0.1", "10.2.0.1", 80, 1446)}, {0, 31, tcpTo("fd09::1", "fd02::1", 80, 1426)},
		{1, 30, espOf("10.1.1.1", "10.1.1.2", 0x902, 1500)}, {1, 10, espOf("10.1.1.1", "10.1.1.2", 0x901, 1500)},
		{1, 5, tcpTo("10.1.1.1", "10.1.1.9", 80, 64000, super(wire.TCPv4))}, {1, 100, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)},
		{1, 6, tcpTo("fd01::1", "fd01::9", 80, 64000, super(wire.TCPv6))},
		{1, 7, signed("10.1.1.1", "10.1.1.9", 1500)},
	}},
	{name: "the hold is undone: IPv4 is not cut, IPv6 is not to be", ports: []string{"ipsec2"}, sees: []sight{
		{0, 3, tcpTo("10.9.0.1", "10.2.0.1", 80, 40000, super(wire.TCPv4))}, {0, 3, tcpTo("fd09::1", "fd02::1", 80, 40000, super(wire.TCPv6))},
	}},
	{name: "somebody holds it off, and yet they are not cut", ports: []string{"ipsec1"}, sees: []sight{
		{0, 3, tcpTo("10.9.0.1", "10.2.0.1", 80, 40000, super(wire.TCPv4))},
	}},
	{name: "UDP_SEGMENT that is to be cut", ports: []string{"ipsec2"}, sees: []sight{
		{0, 3, udpTo("10.9.0.1", "10.2.0.1", 53, 8028, 0, super(wire.UDPGSO))},
	}},
	{name: "UDP_SEGMENT where only TSO is to be off", ports: []string{"ipsec1"}, sees: []sight{
		{0, 3, udpTo("10.9.0.1", "10.2.0.1", 53, 8028, 0, super(wire.UDPGSO))},
	}},
	{name: "larger than the MTU without being a super-packet", ports: []string{"nic1"}, sees: []sight{
		{0, 1, espOf("10.1.1.1", "10.1.1.2", 0x902, 1501)},
	}},
	{name: "ESP super-packets: nic4 cuts them, nic1 doesn't", ports: []string{"nic4", "nic1"}, sees: []sight{
		{0, 3, espOf("10.1.1.1", "10.1.1.2", 0x902, 60000, super(wire.TCPv4))}, {1, 3, espOf("10.1.1.1", "10.1.1.2", 0x902, 60000, super(wire.TCPv4))},
	}},
	{name: "ESP: behind a NAT, of an SA that came since, AH, and somebody else's", ports: []string{"nic1"}, sees: []sight{
		{0, 30, udpTo("10.1.1.1", "10.1.1.3", 4500, 1500, 0x903)}, {0, 1, udpTo("10.1.1.1", "10.1.1.3", 4500, 1500, 0x9999)},
		{0, 2, udpTo("10.1.1.1", "10.1.1.3", 4500, 800, 0)}, {0, 2, udpTo("10.1.1.1", "10.1.1.3", 500, 800, 0x1234)},
		{0, 5, espOf("10.1.1.1", "10.1.1.2", 0x9999, 1500)}, {0, 5, espOf("10.5.1.1", "10.6.1.2", 0x901, 1500)},
		{0, 4, packet("fd01::1", "fd01::2", 51, 1500, []byte{6, 4, 0, 0, 0, 0, 9, 4, 0, 0, 0, 1})},
		{0, 3, udpTo("10.5.1.1", "10.6.1.2", 4500, 1500, 0x777)},
	}},
	{name: "fragments of ESP, and of ESP in UDP, have neither SPI nor port", ports: []string{"nic1"}, sees: []sight{
		{0, 30, espOf("10.1.1.1", "10.1.1.2", 0x902, 1500)}, {0, 30, packet("10.1.1.1", "10.1.1.2", 50, 100, make([]byte, 80), behind)},
		{0, 30, udpTo("10.1.1.1", "10.1.1.3", 4500, 1500, 0x903)}, {0, 30, packet("10.1.1.1", "10.1.1.3", 17, 100, make([]byte, 80), behind)},
		{0, 7, packet("10.1.1.1", "10.1.1.2", 17, 100, make([]byte, 80), behind)}, // between those two there is no ESP in UDP
	}},
	{name: "TSO off by hand", ports: []string{"nic2"}, sees: []sight{
		{0, 20, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)}, {0, 20, tcpTo("fd01::1", "fd01::9", 80, 64000, super(wire.TCPv6))},
	}},
	{name: "a NIC without TSO for IPv4, and our hold on that for IPv6", ports: []string{"nic3"}, sees: []sight{
		{0, 20, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)}, {0, 20, tcpTo("fd01::1", "fd01::9", 80, 1500)},
	}},
	{name: "NICs where TSO is off for all as it is configured, held by us and off already", ports: []string{"nic5", "nic6"}, sees: []sight{
		{0, 20, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)}, {0, 20, tcpTo("fd01::1", "fd01::9", 80, 1500)}, {0, 4, signed("10.1.1.1", "10.1.1.9", 1500)},
		{1, 20, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)},
	}},
	{name: "such a NIC beside one with TSO", ports: []string{"nic5", "nic1"}, sees: []sight{
		{0, 20, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)}, {1, 5, tcpTo("10.1.1.1", "10.1.1.9", 80, 64000, super(wire.TCPv4))},
	}},
	{name: "only a NIC without TSO", ports: []string{"nic3"}, sees: []sight{{0, 20, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)}}},
	{name: "sockets that have lost offload", ports: []string{"nic1"}, sees: []sight{{0, 20, tcpTo("10.1.1.1", "10.1.1.9", 80, 1500)}}},
	{name: "too few to tell", ports: []string{"nic1"}, sees: []sight{{0, 19, tcpTo("10.7.0.1", "10.1.1.9", 80, 1500)}, {0, 50, tcpTo("fd01::1", "fd01::9", 80, 72)}}},
	{name: "answers of one segment each: nothing to lose", ports: []string{"nic1"}, sees: []sight{
		{0, 200, tcpTo("10.1.1.1", "10.1.1.9", 80, 1052, push)}, {0, 200, tcpTo("fd01::1", "fd01::9", 80, 1500, push)}, {0, 19, tcpTo("fd01::1", "fd01::9", 80, 1500)},
	}},
	{name: "forwarded, and UDP: nothing to lose", ports: []string{"nic1"}, sees: []sight{
		{0, 100, tcpTo("10.5.0.1", "10.1.1.9", 80, 1500)}, {0, 100, udpTo("fd01::1", "fd01::9", 53, 1500, 0)},
	}},
	{name: "on lo single packets are as large", ports: []string{"lo"}, sees: []sight{{0, 100, tcpTo("10.1.1.1", "10.1.1.1", 80, 60000)}}},
	{name: "signed super-packets", ports: []string{"nic1"}, sees: []sight{{0, 2, signed("fd01::1", "fd01::9", 9000, super(wire.TCPv6))}}},
	{name: "in the clear", ports: []string{"nic1"}, sees: []sight{
		{0, 3, tcpTo("10.9.0.1", "10.3.0.1", 80, 1500)}, {0, 2, tcpTo("fd09::1", "fd03::1", 443, 1500)},
		// Not these: a bypass, another port, optional templates, a block (somebody else's affair), a mark that may be theirs, and the
		// network's own.
		{0, 5, tcpTo("10.9.0.1", "10.3.7.1", 80, 1400)}, {0, 5, tcpTo("fd09::1", "fd03::1", 80, 1400)}, {0, 5, tcpTo("10.9.0.1", "10.3.6.1", 80, 1400)},
		{0, 1, tcpTo("10.9.0.1", "10.3.5.1", 80, 1400)}, {0, 1, tcpTo("10.9.0.1", "10.3.8.1", 80, 1400)},
		{0, 1, udpTo("10.9.0.1", "10.3.0.1", 500, 900, 1)},
		{0, 1, packet("fd09::1", "fd03::1", 58, 72, []byte{135, 0, 0, 0, 0, 0, 0, 0})}, {0, 1, packet("10.9.0.1", "224.0.0.22", 2, 40, nil)},
		{0, 1, packet("fd09::1", "ff02::1", 58, 72, []byte{128, 0, 0, 0, 0, 0, 0, 0})},
	}},
	{name: "passing by, in the clear", ports: []string{"port1"}, sees: []sight{{0, 3, tcpTo("10.9.0.1", "10.3.0.1", 80, 1500)}}},
	{name: "a device that is not known", ports: []string{"new0"}, sees: []sight{{0, 30, tcpTo("10.9.0.1", "10.3.0.1", 80, 1500)}}},
	{name: "xfrm interfaces in external mode, moved here, a vti and GRE", ports: []string{"ipsec3", "moved", "vti1", "gre1"}, sees: []sight{
		{0, 30, tcpTo("10.9.0.1", "10.2.0.1", 80, 1446)}, {0, 1, tcpTo("10.8.0.1", "10.2.0.1", 80, 1446)},
		{1, 30, tcpTo("10.9.0.1", "10.2.0.1", 80, 9000, super(wire.TCPv4))},
		{2, 30, tcpTo("10.8.0.1", "10.2.0.1", 80, 1446)},
		{3, 30, tcpTo("10.8.0.1", "10.2.0.1", 80, 1442)}, {3, 2, wire.Frame{Hatype: 1, Network: 14, Length: 60, Data: make([]byte, 60)}},
	}},
	{name: "what is not seen", ports: []string{"nic1"}, world: func(w *World) { w.Stale, w.Live, w.Netns = true, false, "blue" }, stats: []wire.Stats{{Dropped: 7, Untold: 3, Down: true}}, sees: []sight{
		{0, 4, wire.Frame{Hatype: 0xfffe, Protocol: 0x800, Length: 100, Data: []byte{0x45, 0}}},
	}},
}

func look(scene int) *Result {
	s := scenes[scene]
	w := world()
	if s.world != nil {
		s.world(w)
	}
	sorter := NewSorter(w, portsOf(s.ports...), local)
	for _, see := range s.sees {
		for range see.n {
			f := see.frame
			sorter.Add(see.port, &f)
		}
	}
	return sorter.Result(5, s.stats)
}

func TestVerdicts(t *testing.T) {
	var got txtar.Archive
	got.Comment = []byte("What is said of packets. go test ./agent/verify -run TestVerdicts -update writes it.\n\n")
	for i, s := range scenes {
		r := look(i)
		var b strings.Builder
		for _, d := range r.Devices {
			fmt.Fprintf(&b, "%s:\n", d.Device)
			for _, c := range d.Classes {
				fmt.Fprintf(&b, "  %s", c.Class)
				if c.Policy != 0 {
					fmt.Fprintf(&b, " by policy %d and %d more", c.Policy, c.MorePolicies)
				}
				mark := ""
				if c.Wrong {
					mark = "WRONG "
				}
				fmt.Fprintf(&b, " %s %s: %d packets, %d bytes, %d super, largest %d: %s%s, %s\n", c.As, c.Family, c.Packets, c.Bytes, c.SuperPackets, c.Largest, mark, c.State, c.Says)
			}
		}
		for _, n := range r.Notes {
			fmt.Fprintf(&b, "! %s\n", n)
		}
		fmt.Fprintf(&b, "ok %v, live %v, stale %v, netns %q: %s\n", r.OK, r.Live, r.Stale, r.Netns, r.Says)
		got.Files = append(got.Files, txtar.File{Name: s.name, Data: []byte(b.String())})
	}
	if *update {
		if err := os.WriteFile(golden, txtar.Format(&got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(txtar.Format(&got))); d != "" {
		t.Errorf("-update writes it (-want +got)\n%s", d)
	}
}

// A device with a thousand policies has a bounded number of classes, and nothing is lost of the counts.
func TestClassesAreBounded(t *testing.T) {
	w := &World{Devices: []Device{{Index: 10, Name: "ipsec1", IfID: 1}}}
	const many = 1000
	for i := range uint32(many) {
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)}), 32)
		w.Policies = append(w.Policies, Policy{Index: i + 1, Src: netip.MustParsePrefix("10.9.0.1/32"), Dst: dst, IfID: 1, Action: ActCover})
	}
	s := NewSorter(w, []Port{{Index: 10, Name: "ipsec1", MTU: 1500}}, nil)
	for _, p := range w.Policies {
		for port := range 12 { // more flows than are remembered
			f := tcpTo("10.9.0.1", p.Dst.Addr().String(), uint16(port), 1400)
			s.Add(0, &f)
		}
	}
	r := s.Result(1, nil)
	if n := len(r.Devices[0].Classes); n > mostClasses+1 {
		t.Errorf("%d classes", n)
	}
	var packets uint64
	for _, c := range r.Devices[0].Classes {
		packets += c.Packets
	}
	if packets != 12*many {
		t.Errorf("%d packets, want %d", packets, 12*many)
	}
	if n := len(s.devices[0].flows); n > mostFlows {
		t.Errorf("%d flows are remembered", n)
	}
}

// What travels is the same world.
func TestWorldAsJSON(t *testing.T) {
	w := world()
	for _, p := range []struct{ in, out any }{{w, &World{}}, {w.Policies, &[]Policy{}}, {w.SAs, &[]SA{}}} {
		b, err := json.Marshal(p.in)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, p.out); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(p.out)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(b), string(again)); d != "" {
			t.Errorf("(-sent +received)\n%s", d)
		}
	}
}

func TestPolicyOf(t *testing.T) {
	esp := []xfrmwatch.Template{{Proto: xfrmwatch.ESP}}
	for want, p := range map[string]xfrmwatch.Policy{
		ActCover:  {Dir: xfrmwatch.Out, Templates: esp},
		ActMaybe:  {Dir: xfrmwatch.Out, Templates: []xfrmwatch.Template{{Proto: xfrmwatch.AH, Optional: true}}},
		ActBypass: {Dir: xfrmwatch.Out, Templates: []xfrmwatch.Template{{Proto: xfrmwatch.Comp}}},
		ActBlock:  {Dir: xfrmwatch.Out, Action: xfrmwatch.Block, Templates: esp},
	} {
		p.Selector = xfrmwatch.Selector{Src: netip.MustParsePrefix("fd01::/64"), Dst: netip.MustParsePrefix("fd02::/64"), Ifindex: 3}
		p.Index, p.IfID = 9, 4
		got := PolicyOf(&p)
		if got.Action != want || got.Index != 9 || got.IfID != 4 || got.Device != 3 {
			t.Errorf("want %s, got %+v", want, got)
		}
		back := got.policy()
		if back.Selector.Family != xfrmwatch.IPv6 || back.Selector.Ifindex != 3 || back.IfID != 4 {
			t.Errorf("%s: %+v", want, back)
		}
		covers, maybe := p.Covers()
		if c, m := back.Covers(); c != covers || m != maybe {
			t.Errorf("%s: it covers %v, %v, want %v, %v", want, c, m, covers, maybe)
		}
	}
}

func TestSAsOf(t *testing.T) {
	a := &xfrmwatch.SA{Key: xfrmwatch.SAKey{Dst: addr("10.1.1.2"), SPI: 1, Proto: 50}, Dst: addr("10.1.1.2"), Src: addr("10.1.1.1"), SPI: 1, Proto: 50}
	b := &xfrmwatch.SA{Key: xfrmwatch.SAKey{Dst: addr("10.1.1.3"), SPI: 2, Proto: 50}, Dst: addr("10.1.1.3"), Src: addr("10.1.1.1"), SPI: 2, Proto: 50, Encap: xfrmwatch.Encap{Type: 2}}
	cover := func(i xfrmwatch.PolicyIndex, sas ...*xfrmwatch.SA) xfrmwatch.Coverage {
		return xfrmwatch.Coverage{ID: xfrmwatch.CoverageID{Policy: i}, Steps: []xfrmwatch.Step{{SAs: sas}}}
	}
	got := SAsOf([]xfrmwatch.Coverage{cover(1, a), cover(2, a, b), cover(3, b, a), cover(1, a)})
	if len(got) != 2 || got[0].Policy != 1 || got[0].More != 2 || got[0].Encap || got[1].Policy != 2 || got[1].More != 1 || !got[1].Encap {
		t.Errorf("got %+v", got)
	}
}
