package plan

import (
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// readPaths makes the kernel's answers those that it would give without us. A way through a clone
// of ours is that of the route below, and a lock of ours is no path's MTU: else each plan would
// follow from the one before, and a clone that is to go would still decide what replaces it.
func (p *planner) readPaths() {
	for peer, path := range p.Peers.All() {
		p.reach(peer, path)
	}
	outers := make(map[routes.Ifindex]Path, len(p.Outers))
	for _, o := range OutersOf(p.FIB, p.L2TP) {
		if path, ok := p.Outers[o.Index]; ok {
			at := lookup{dst: o.Dst, src: o.Src, mark: o.Mark, proto: o.Proto, oif: o.Oif}
			at.sport, at.dport = routes.PortRange{Lo: o.Sport, Hi: o.Sport}, routes.PortRange{Lo: o.Dport, Hi: o.Dport}
			outers[o.Index], _ = p.withoutUs(path, at)
		}
	}
	p.Outers = outers
}

// wayTo is a path without us, and all ways of its route. Peers share them.
type wayTo struct {
	path Path
	ways []routes.Nexthop
}

// reach works out the path to a peer without us, from what the kernel answered.
func (p *planner) reach(peer Peer, path Path) {
	path, ways := p.withoutUs(path, lookup{dst: peer.Addr, src: peer.Src, mark: peer.Mark.Value & peer.Mark.Mask, proto: protoESP})
	same := p.sharedWays[path]
	i := slices.IndexFunc(same, func(w *wayTo) bool { return slices.Equal(w.ways, ways) })
	if i < 0 {
		i, same = len(same), append(same, &wayTo{path, ways})
		p.sharedWays[path] = same
	}
	p.setWay(peer, same[i])
}

// setWay notes the way to a peer, nil for none.
func (p *planner) setWay(peer Peer, w *wayTo) {
	if u := p.use(peer); u != nil {
		u.way = w
		return
	}
	if p.reached[peer] = w; w == nil {
		delete(p.reached, peer)
	}
}

// use is a peer that templates use, nil for another one.
func (p *planner) use(peer Peer) *peerUse {
	if !peer.Addr.IsValid() {
		return nil
	}
	at, _ := p.outer.Get(netip.PrefixFrom(peer.Addr, peer.Addr.BitLen()))
	for u := range at.each {
		if u.Peer == peer {
			return u
		}
	}
	return nil
}

// noWay is that to a peer to whom there is none.
var noWay = &wayTo{}

// wayTo is the way to a peer.
func (p *planner) wayTo(peer Peer) *wayTo {
	w := p.reached[peer]
	if u := p.use(peer); u != nil {
		w = u.way
	}
	if w == nil {
		return noWay
	}
	return w
}

// protoESP is the protocol of an SA's packets (IPPROTO_ESP, linux/in.h).
const protoESP = 50

// lookup is what the kernel was asked for the way of outer packets.
type lookup struct {
	dst, src     netip.Addr // src is invalid or unspecified where the route chooses
	mark         uint32
	proto        uint8
	sport, dport routes.PortRange
	oif          routes.Ifindex
}

// withoutUs is what the kernel would have answered without our tables and locks, and all ways of the
// route. It is the zero value where there would be no route, or where that isn't known: then a rule
// of ours was the last way there. The MTU alone is 0 where a lightweight tunnel adds what we don't
// know. The kernel answers for one flow, by one of the route's ways, and others go by the others: the
// MTU is the smallest of all.
func (p *planner) withoutUs(path Path, at lookup) (Path, []routes.Nexthop) {
	f := routes.FamilyOf(at.dst)
	r, ok := p.routeTo(f, path.Table, at.dst, at.src)
	if !ok || !hasWay(r, path.Oif) {
		return path, []routes.Nexthop{{Oif: path.Oif}} // the mirror is behind, or ahead
	}
	now, oif := p.mtuBy(path.Oif, r, false), path.Oif
	if base := p.baseOf(f, path.Table); base != nil {
		if r, ok = p.behind(base, at); !ok || at.oif != 0 && !hasWay(r, at.oif) {
			return Path{}, nil
		}
		path.Table = r.Body.Table
		if !hasWay(r, oif) { // never where the lookup is bound to a device
			oif, path.Src = r.Body.Nexthops[0].Oif, r.Body.PrefSrc
		}
	}
	var ways []routes.Nexthop
	own := anyRoute
	for _, r := range p.tied(r) {
		for _, nh := range r.Body.Nexthops {
			if at.oif == 0 || nh.Oif == at.oif {
				ways = append(ways, nh)
				own = min(own, p.mtuBy(nh.Oif, r, true))
			}
		}
	}
	if path.MTU >= now || oif != path.Oif {
		path.MTU = own
	} else { // what is smaller was learnt
		path.MTU = min(path.MTU, own)
	}
	if path.Oif = oif; p.adds(ways) {
		path.MTU = 0
	}
	return path, ways
}

// mtuBy is the MTU of a route by one of its devices, in bytes: as the mirror has it, or without
// what we have set. It is 0 if the device is not known.
func (p *planner) mtuBy(oif routes.Ifindex, r routes.Route, own bool) int {
	l := p.FIB.Link(oif)
	if l == nil {
		return 0
	}
	mtu, metric := l.MTUFor(r.Body.Family), routes.MTUMetricOf(r.Body)
	if own {
		mtu, metric = p.ownMTU(l, r.Body.Family), p.owner(r)
	}
	if m := int(metric.MTU); m != 0 {
		mtu = min(mtu, m)
	}
	return mtu
}

// adds reports whether a lightweight tunnel that isn't understood wraps what leaves by one of some ways.
func (p *planner) adds(ways []routes.Nexthop) bool {
	return slices.ContainsFunc(ways, func(nh routes.Nexthop) bool {
		if !nh.Encap {
			return false
		}
		_, ok := p.domain(&routes.Body{Nexthops: []routes.Nexthop{nh}})
		return !ok
	})
}

func hasWay(r routes.Route, oif routes.Ifindex) bool {
	return slices.ContainsFunc(r.Body.Nexthops, func(nh routes.Nexthop) bool { return nh.Oif == oif })
}

// routeTo is the route that one table has for packets from a source to an address. Those that are for
// one TOS, or down, are passed over, as are those for some sources where the packets' own is not known:
// it is chosen by the route then, as the kernel looks it up without one. Of routes to one destination
// those for the fewest sources go first (fib6_node_lookup, net/ipv6/ip6_fib.c).
func (p *planner) routeTo(f routes.Family, table routes.TableID, a, src netip.Addr) (routes.Route, bool) {
	return p.routeAmong(f, table, a, src, func(routes.Route) bool { return true })
}

// ownersRouteTo is the same without our clones.
func (p *planner) ownersRouteTo(f routes.Family, table routes.TableID, a, src netip.Addr) (routes.Route, bool) {
	return p.routeAmong(f, table, a, src, func(r routes.Route) bool { return !p.Config.OwnRoute(r) })
}

func (p *planner) routeAmong(f routes.Family, table routes.TableID, a, src netip.Addr, counts func(routes.Route) bool) (routes.Route, bool) {
	for at := netip.PrefixFrom(a, a.BitLen()); ; {
		m, _ := p.FIB.Cover(f, table, at)
		if m.Paths == nil {
			return routes.Route{}, false
		}
		var best *routes.Body
		for _, b := range m.Paths.Bodies() {
			if servesFrom(b, src) && counts(routes.Route{Dst: m.Dst, Body: b}) && (best == nil || b.Src.IsValid() && b.Src.Bits() > max(best.Src.Bits(), 0)) {
				best = b
			}
		}
		if best != nil {
			return routes.Route{Dst: m.Dst, Body: best}, true
		}
		if m.Dst.Bits() == 0 {
			return routes.Route{}, false
		}
		at = netip.PrefixFrom(a, m.Dst.Bits()-1).Masked()
	}
}

// servesFrom reports whether a route serves packets from a source that have no TOS.
func servesFrom(b *routes.Body, src netip.Addr) bool {
	return alive(b) && (!b.Src.IsValid() || src.IsValid() && b.Src.Contains(src)) && b.TOS == 0
}

// alive reports whether some way of a route is up, or it has none.
func alive(b *routes.Body) bool {
	return len(b.Nexthops) == 0 || slices.ContainsFunc(b.Nexthops, func(nh routes.Nexthop) bool { return nh.Flags&routes.NexthopDead == 0 })
}

// tied are a route and those between which the kernel may choose: of IPv4 routes with one metric the first
// is taken, of IPv6 ones any (KERNEL.md 68).
func (p *planner) tied(r routes.Route) []routes.Route {
	out := []routes.Route{r}
	if r.Body.Family == routes.IPv4 {
		return out
	}
	m, _ := p.FIB.Cover(r.Body.Family, r.Body.Table, r.Dst)
	for _, b := range m.Paths.Bodies() {
		if b != r.Body && b.Priority == r.Body.Priority && b.Src == r.Body.Src && b.TOS == r.Body.TOS && b.Type == routes.Unicast && alive(b) {
			out = append(out, routes.Route{Dst: m.Dst, Body: b})
		}
	}
	return out
}

// baseOf is the rule that a table of ours stands ahead of, nil if no rule of ours leads there: then
// it is somebody else's.
func (p *planner) baseOf(f routes.Family, table routes.TableID) *routes.Rule {
	if !p.Config.OwnTable(table) {
		return nil
	}
	for _, r := range p.FIB.Rules(f) {
		if r.Table == table && p.Config.OwnRule(r) {
			return p.basedOn(r)
		}
	}
	return nil
}

// behind is the route that a rule or those behind it lead to, without ours; false if there is none,
// or if it isn't known which.
func (p *planner) behind(base *routes.Rule, at lookup) (routes.Route, bool) {
	rules := p.FIB.Rules(base.Family)
	ahead := slices.Index(rules, base)
	src := at.src
	if !src.IsValid() {
		src = base.Family.Any().Addr()
	}
	flows := routes.Flows{
		Family: base.Family, Src: netip.PrefixFrom(src, src.BitLen()), Dst: netip.PrefixFrom(at.dst, at.dst.BitLen()),
		Proto: at.proto, Sport: at.sport, Dport: at.dport, Mark: at.mark, Mask: ^uint32(0),
	}
	parts := p.FIB.Resolve(flows, func(r *routes.Rule) bool { return p.Config.OwnRule(r) || slices.Contains(rules[:ahead], r) })
	for _, part := range parts {
		if part.Rule != base && (part.Blocked != "" || !part.Whole) || part.Rule.Action != routes.RuleToTable {
			return routes.Route{}, false
		}
		r, ok := p.routeTo(base.Family, part.Rule.Table, at.dst, at.src)
		if ok && part.Rule.SuppressPrefixLen >= 0 && int32(r.Dst.Bits()) <= part.Rule.SuppressPrefixLen {
			continue
		}
		if ok && r.Body.Type != routes.Throw {
			return r, r.Body.Type == routes.Unicast && len(r.Body.Nexthops) > 0
		}
	}
	return routes.Route{}, false
}
