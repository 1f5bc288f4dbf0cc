package plan

import (
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// outerFlow is what is known of the flow of a tunnel's outer packets, as a policy's selector sees it.
type outerFlow struct {
	src, dst     netip.Prefix
	proto        uint8
	sport, dport known
	mark         uint32
	anyMark      bool
	oifs         [2]routes.Ifindex
}

// known is a value of 16 bits that is known, or not.
type known struct {
	value uint16
	ok    bool
}

// outerFlows are the flows of a tunnel's outer packets. One in external mode sends to both
// families; one that takes any protocol (`mode any`) sends 4 for the IPv4 packets that its routes
// bring, and 41 for the IPv6 ones.
func (p *planner) outerFlows(t *tunnel) []outerFlow {
	families := []routes.Family{t.encap.Family}
	if t.encap.Family == 0 {
		families = []routes.Family{routes.IPv4, routes.IPv6}
	}
	protos := []uint8{t.encap.Proto}
	if t.encap.Proto == 0 {
		protos = nil
		for _, r := range p.routesBy(t.link) {
			proto := uint8(4)
			if r.Body.Family == routes.IPv6 {
				proto = 41
			}
			if !slices.Contains(protos, proto) {
				protos = append(protos, proto)
			}
		}
		if len(protos) == 0 {
			protos = []uint8{4, 41}
		}
	}
	var out []outerFlow
	for _, f := range families {
		for _, proto := range protos {
			out = append(out, p.outerOf(t, f, proto))
		}
	}
	return out
}

func (p *planner) outerOf(t *tunnel, f routes.Family, proto uint8) outerFlow {
	e := t.encap
	if !e.Local.IsValid() || e.Local.IsUnspecified() {
		e.Local = p.chosenSource(t)
	}
	host := func(a netip.Addr) netip.Prefix {
		if !a.IsValid() || a.IsUnspecified() || routes.FamilyOf(a) != f {
			return f.Any()
		}
		return netip.PrefixFrom(a, a.BitLen())
	}
	o := outerFlow{
		src: host(e.Local), dst: host(e.Remote), proto: proto, mark: e.Mark, anyMark: e.AnyMark,
		oifs: [2]routes.Ifindex{e.Link, 0},
	}
	if f == routes.IPv4 {
		// ip_route_output_flow sets flowi_oif to the route's device ahead of the policy lookup, IPv6
		// does not.
		ways := p.outerWays(t)
		if len(ways) > 0 && !slices.ContainsFunc(ways, func(nh routes.Nexthop) bool { return nh.Oif != ways[0].Oif }) {
			o.oifs[1] = ways[0].Oif
		}
	}
	switch proto {
	case 17:
		o.sport, o.dport = portOf(e.Sport), portOf(e.Dport)
	case 47:
		// A selector's ports are the halves of the GRE key (xfrm_flowi_sport, net/xfrm.h).
		o.sport, o.dport = known{uint16(e.Key >> 16), !e.External}, known{uint16(e.Key), !e.External}
	default: // what has no ports has 0 (xfrm_flowi_sport)
		o.sport, o.dport = known{ok: true}, known{ok: true}
	}
	return o
}

// chosenSource is the source that the route of the outer packets gives them where the tunnel has
// no local address: the kernel fills it in ahead of the policy lookup (ip_route_output_key_hash,
// net/ipv4/route.c). It is invalid where several ways may give several sources.
func (p *planner) chosenSource(t *tunnel) netip.Addr {
	if !t.encap.Remote.IsValid() {
		return netip.Addr{}
	}
	if r, ok := p.routeTo(t.encap.Family, t.path.Table, t.encap.Remote, netip.Addr{}); ok && len(r.Body.Nexthops) == 1 {
		if m, _ := p.FIB.Cover(t.encap.Family, t.path.Table, r.Dst); len(m.Paths.Bodies()) == 1 {
			return t.path.Src
		}
	}
	return netip.Addr{}
}

func portOf(r routes.PortRange) known { return known{r.Lo, r.Lo == r.Hi && r.Lo != 0} }

// takenBy reports how much of the flow a policy's selector takes (__xfrm4_selector_match,
// net/xfrm/xfrm_policy.c).
func (o outerFlow) takenBy(e *entry) (all, some bool) {
	all = true
	for _, pair := range [][2]netip.Prefix{{e.sel().Src, o.src}, {e.sel().Dst, o.dst}} {
		if _, ok := routes.Intersect(pair[0], pair[1]); !ok {
			return false, false
		}
		all = all && routes.Contains(pair[0], pair[1])
	}
	if e.sel().Proto != 0 && uint8(e.sel().Proto) != o.proto {
		return false, false
	}
	for _, m := range []struct {
		xfrmwatch.PortMatch
		known
	}{{e.sel().Sport, o.sport}, {e.sel().Dport, o.dport}} {
		switch {
		case m.Mask == 0:
		case !m.ok:
			all = false
		case (m.value^m.Port)&m.Mask != 0:
			return false, false
		}
	}
	switch {
	case e.pol.Mark.Value&^e.pol.Mark.Mask != 0: // matches nothing
		return false, false
	case e.pol.Mark.Mask == 0:
	case o.anyMark:
		all = false
	case o.mark&e.pol.Mark.Mask != e.pol.Mark.Value:
		return false, false
	}
	if i := routes.Ifindex(e.sel().Ifindex); i != 0 && !slices.Contains(o.oifs[:], i) {
		all = false // it may be a VRF's: which the flow is in is not worked out
	}
	return all, true
}
