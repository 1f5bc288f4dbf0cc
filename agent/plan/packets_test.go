package plan

import (
	"math/rand/v2"
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// packets are n packets over the world's interesting values.
func (w *world) packets(rng *rand.Rand, n int) []packet {
	var out []packet
	every := map[routes.Family][]netip.Addr{}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		every[f] = w.addresses(f)
	}
	pick := func(s ...string) string { return s[rng.IntN(len(s))] }
	devs := []string{""}
	for _, l := range w.fib.Links() {
		devs = append(devs, l.Name)
	}
	for len(out) < n {
		f := routes.IPv4
		if len(every[routes.IPv4]) == 0 || len(every[routes.IPv6]) > 0 && rng.IntN(2) == 0 {
			f = routes.IPv6
		}
		if len(every[f]) == 0 {
			return out
		}
		p := packet{
			family: f, src: every[f][rng.IntN(len(every[f]))], dst: every[f][rng.IntN(len(every[f]))],
			proto: []uint8{6, 17, 50, 1}[rng.IntN(4)], sport: uint16(rng.IntN(3) * 5), dport: []uint16{80, 443, 65535}[rng.IntN(3)],
			mark: []uint32{0, 0, 0, 1, 2, 3}[rng.IntN(6)], iif: pick("lo", "lo", devs[rng.IntN(len(devs))]),
		}
		if p.iif == "" {
			p.iif = "lo"
		}
		if p.proto == 50 || p.proto == 1 {
			p.sport, p.dport = 0, 0
		}
		switch rng.IntN(12) {
		case 0, 1:
			p.src = netip.Addr{}
		case 2:
			p.oif = pick(devs...)
		case 3:
			p.uid = 1000
		case 4:
			p.tos = 0x10
		case 5, 6:
			if f == routes.IPv6 { // which passes over throws then
				p.oif = pick(devs...)
			}
		}
		out = append(out, p)
	}
	return out
}

// everyPacket is a grid over the world's addresses, for what must hold without exception.
func (w *world) everyPacket(f routes.Family) []packet {
	var out []packet
	addrs := w.addresses(f)
	for _, dst := range addrs {
		for _, src := range addrs {
			for i, proto := range []uint8{6, 17, 50} {
				p := packet{family: f, src: src, dst: dst, proto: proto, mark: uint32(i), iif: "lo"}
				if proto != 50 {
					p.sport, p.dport = 5, 80
				}
				out = append(out, p)
			}
		}
	}
	return out
}

// addresses are the first and last ones of all prefixes in the world.
func (w *world) addresses(f routes.Family) []netip.Addr {
	seen := map[netip.Addr]bool{}
	add := func(p netip.Prefix) {
		if p.IsValid() && routes.FamilyOf(p.Addr()) == f {
			seen[p.Addr()], seen[lastOf(p)] = true, true
		}
	}
	for p := range w.db.Policies() {
		add(p.Selector.Src)
		add(p.Selector.Dst)
	}
	for _, c := range w.gone {
		add(c.Selector.Dst)
	}
	for sa := range w.db.SAs() {
		add(netip.PrefixFrom(sa.Dst, sa.Dst.BitLen()))
		add(netip.PrefixFrom(sa.Src, sa.Src.BitLen()))
	}
	for _, r := range w.fib.Rules(f) {
		add(r.Src)
		add(r.Dst)
	}
	for _, id := range w.fib.Tables(f) {
		for r := range w.fib.Table(f, id) {
			add(r.Dst)
			add(r.Body.Src)
		}
	}
	out := make([]netip.Addr, 0, len(seen))
	for a := range seen {
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
