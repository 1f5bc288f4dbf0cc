// Package bench measures the agent at a large host's size: a full BGP table and 100,000 tunnels. Each figure is a ratio, taken in one run
// against a floor with a name: iproute2, a program that makes the same system calls in a straight line, a bare netlink reader. Like the rest
// of e2e it knows the binaries only.
//
//	world   what the tables hold: pure values, the same in each run
//	wire    the same as netlink messages
//	lab     the namespace, and the tables in the kernel
//	agent   tsoagent as a process: start, ready, memory, counters, end
//	cold, memory, event, storm, idle    one figure each
//	table   the Markdown and the JSON
//	check   the figures to reach
package bench

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
)

// Size is how much the tables hold.
type Size struct {
	Routes4  int `json:"routes_ipv4"`
	Routes6  int `json:"routes_ipv6"`
	Policies int `json:"policies"`
}

// FullSize is a provider edge's.
var FullSize = Size{Routes4: 1_048_577, Routes6: 200_000, Policies: 100_000}

// Scaled is a part of the size, a few of each at least.
func (s Size) Scaled(by float64) Size {
	part := func(n int) int { return max(int(float64(n)*by), 20) }
	return Size{part(s.Routes4), part(s.Routes6), part(s.Policies)}
}

// Uplinks is how many links lead outside, and gatewaysOnLink how many routers are behind each.
const (
	Uplinks        = 4
	gatewaysOnLink = 8
)

// Route is one route of table main. Its gateway is on an uplink.
type Route struct {
	Dst     netip.Prefix
	Gateway int // of gateways
}

func (r Route) isDefault() bool { return r.Dst.Bits() == 0 }

// gateways is how many there are in all.
const gateways = Uplinks * gatewaysOnLink

// Policy is one output policy with one ESP tunnel template.
type Policy struct {
	Src, Dst netip.Prefix
	Peer     netip.Addr // the tunnel's other end
	Reqid    uint32
}

// World is what the tables hold.
type World struct {
	Routes   []Route // IPv4 first; the first of each family is the default route
	Policies []Policy
	Size     Size
}

// The host's own nets. Addresses of uplink i are uplink4+i.0.1/24 and uplink6+i::1/64, its gateways' those from 2 on.
var (
	localEnd  = netip.MustParseAddr("192.0.2.1")       // the host's end of each tunnel, on lo
	customers = netip.MustParseAddr("10.0.0.0")        // the first customer's IPv4 net, a /25; the next ones follow
	unused    = netip.MustParsePrefix("198.18.0.0/15") // which nothing covered leads to
)

// sources are the nets whose traffic to customers is covered: a provider's own data centres.
var (
	sources4 = []netip.Prefix{netip.MustParsePrefix("172.16.0.0/16"), netip.MustParsePrefix("172.17.0.0/16")}
	sources6 = []netip.Prefix{netip.MustParsePrefix("fd16::/32"), netip.MustParsePrefix("fd17::/32")}
)

// share is how many of 1000 prefixes of a table have a length.
type share struct{ bits, of1000 int }

// The mix of lengths in the Internet's tables, roughly as in 2025 (CIDR report, bgp.potaroo.net): most are the longest that pass filters.
var (
	lengths4 = []share{{24, 620}, {23, 97}, {22, 107}, {21, 52}, {20, 45}, {19, 25}, {18, 14}, {17, 8}, {16, 14}, {15, 3}, {14, 3}, {13, 2}, {12, 10}}
	lengths6 = []share{{48, 480}, {47, 20}, {46, 40}, {45, 15}, {44, 120}, {42, 30}, {40, 105}, {36, 50}, {33, 20}, {32, 105}, {30, 5}, {29, 10}}
)

// NewWorld returns the world of that size, always the same.
func NewWorld(s Size) *World {
	r := rand.New(rand.NewPCG(5450, 84))
	w := &World{Size: s}
	w.Routes = append(w.Routes, internet(r, s.Routes4, netip.IPv4Unspecified(), lengths4, address4)...)
	w.Routes = append(w.Routes, internet(r, s.Routes6, netip.IPv6Unspecified(), lengths6, address6)...)
	free := places{table: w.Routes[1:s.Routes4], peers: map[netip.Addr]bool{}}
	for i := range s.Policies {
		w.Policies = append(w.Policies, free.customer(i))
	}
	return w
}

// routes are those that are wanted.
func (w *World) routes(want func(Route) bool) (out []Route) {
	for _, r := range w.Routes {
		if want(r) {
			out = append(out, r)
		}
	}
	return out
}

// internet draws n different prefixes, the default route first.
func internet(r *rand.Rand, n int, zero netip.Addr, mix []share, address func(*rand.Rand) netip.Addr) []Route {
	out := make([]Route, 0, n)
	seen := make(map[netip.Prefix]bool, n)
	add := func(p netip.Prefix) {
		if !seen[p] {
			seen[p] = true
			out = append(out, Route{Dst: p, Gateway: r.IntN(gateways)})
		}
	}
	add(netip.PrefixFrom(zero, 0))
	for len(out) < n {
		k, bits := r.IntN(1000), mix[0].bits
		for _, s := range mix {
			if k -= s.of1000; k < 0 {
				bits = s.bits
				break
			}
		}
		p, _ := address(r).Prefix(bits) // the lengths are the family's
		add(p)
	}
	return out
}

// address4 draws a public address, neither a customer's nor of what is reserved around 127, 172.16 and 192.
func address4(r *rand.Rand) netip.Addr {
	for {
		a := netip.AddrFrom4([4]byte{byte(1 + r.IntN(223)), byte(r.IntN(256)), byte(r.IntN(256)), byte(r.IntN(256))})
		if b := a.As4(); b[0] != 10 && b[0] != 127 && b[0] != 172 && b[0] != 192 && b[0] != 198 {
			return a
		}
	}
}

// address6 draws an address of those that registries give out, 2001::/16 to 2c00::/8.
func address6(r *rand.Rand) netip.Addr {
	var a [16]byte
	binary.BigEndian.PutUint64(a[:], r.Uint64())
	a[0] = []byte{0x20, 0x24, 0x26, 0x28, 0x2a, 0x2c}[r.IntN(6)]
	return netip.AddrFrom16(a)
}

// places is where customers are: all over the table.
type places struct {
	table []Route // IPv4, without the default route
	nets  int     // how many routes were looked at for nets
	peers map[netip.Addr]bool
}

// customer is the policy of customer i. Of ten customers seven have a private IPv4 net, which only the default route leads to; two an
// IPv4 net of the table's own, so that routes move under their locks; and one a private IPv6 net. Each has a router of its own somewhere in the Internet.
func (s *places) customer(i int) Policy {
	p := Policy{Src: sources4[i/10%2], Reqid: uint32(i + 1), Peer: s.peer(i)}
	switch i % 10 {
	case 3, 7:
		p.Dst = s.net()
	case 9:
		p.Src, p.Dst = sources6[i/10%2], customerNet6(i)
	default:
		p.Dst = customerNet4(i)
	}
	return p
}

// route is a route of the table: those with numbers in a row are far from each other, and each number below its size has one of its own.
func (s *places) route(i int) Route {
	const prime = 2_654_435_761 // larger than any table, so that it has no common divisor with its size
	n := len(s.table)
	return s.table[i%n*prime%n]
}

// peer is an address in a route, another one for each customer.
func (s *places) peer(i int) netip.Addr {
	b := s.route(i).Dst.Addr().As4()
	for b[3] |= 1; s.peers[netip.AddrFrom4(b)]; b[3]++ {
	}
	s.peers[netip.AddrFrom4(b)] = true
	return netip.AddrFrom4(b)
}

// net is the next one that is long, as a customer's is.
func (s *places) net() netip.Prefix {
	for {
		p := s.route(s.nets).Dst
		s.nets++
		if p.Bits() >= 20 {
			return p
		}
	}
}

func customerNet4(i int) netip.Prefix {
	n := binary.BigEndian.Uint32(customers.AsSlice()) + uint32(i)<<7
	return netip.PrefixFrom(netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n))), 25)
}

func customerNet6(i int) netip.Prefix {
	a := [16]byte{0xfd, 0x10}
	binary.BigEndian.PutUint32(a[2:], uint32(i))
	return netip.PrefixFrom(netip.AddrFrom16(a), 48)
}

// gateway is the address of a gateway, and its uplink.
func gateway(n int, v6 bool) (netip.Addr, int) {
	link, host := n%Uplinks, 2+n/Uplinks
	if v6 {
		return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 3: byte(link), 15: byte(host)}), link
	}
	return netip.AddrFrom4([4]byte{192, 168, byte(link), byte(host)}), link
}
