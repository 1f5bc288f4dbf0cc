package plan

import (
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// point is a destination in a shape's table, with what the table holds there. There are as many as clones.
type point struct {
	unit
	// The clone, with no coverage for a throw.
	because *coverage
	body    *routes.Body // of the route, whose destination contains this one
	mtu     uint32       // in bytes
	advMSS  uint32       // in bytes
	bits    uint8        // of the route's destination
	locked  bool
	has     bool    // the table holds something
	of      *member // nil for a throw
	behind  *[]Copy // nil for none, as nearly always
}

// put has the table hold a clone.
func (at *point) put(c Clone, because *coverage) {
	at.has, at.because = true, because
	if because != nil {
		at.body, at.bits = c.Of.Body, uint8(c.Of.Dst.Bits())
		at.mtu, at.locked, at.advMSS = c.MTU.MTU, c.MTU.Locked, c.AdvMSS
	}
	if len(c.Behind) > 0 {
		behind := c.Behind // so that c stays on the stack
		at.behind = &behind
	}
}

// count is how many routes the table has for it.
func (at *point) count() int { return 1 + len(at.copies()) }

// clear has the table hold nothing.
func (at *point) clear() { *at = point{unit: at.unit} }

// clone is what the table holds.
func (at *point) clone() Clone {
	if at.because == nil {
		return Clone{Dst: at.dst, Throw: true, Behind: at.copies()}
	}
	of, _ := at.dst.Addr().Prefix(int(at.bits)) // the length of a wider one
	return Clone{
		Dst: at.dst, Of: routes.Route{Dst: of, Body: at.body},
		MTU: MTUMetric{MTU: at.mtu, Locked: at.locked}, AdvMSS: at.advMSS, Because: at.because.id(), Behind: at.copies(),
	}
}

// newPoint is a destination of which nothing is known yet.
func (s *shaped) newPoint(x netip.Prefix) *point {
	return &point{unit: unit{phase: phaseClones, shape: s, dst: x}}
}

// holds is the coverage for which the shape's table holds a clone for a destination, or for the next wider one that it
// holds: nil for a throw. It is false if there is none.
func (s *shaped) holds(x netip.Prefix) (*coverage, bool) {
	for _, at := range s.points.Supernets(x) {
		if at.has {
			return at.because, true
		}
	}
	return nil, false
}

// fill works out what the shape's table holds.
func (p *planner) fill(s *shaped) {
	sorted := make([]netip.Prefix, 0, len(s.members))
	for _, m := range s.members {
		sorted, _ = p.pointsOf(s, m, sorted)
	}
	// Wider ones first, so that a throw finds the clone that it cuts a hole into.
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if d := a.Bits() - b.Bits(); d != 0 {
			return d
		}
		return a.Addr().Compare(b.Addr())
	})
	sorted = slices.Compact(sorted)
	points := make([]*point, len(sorted))
	for i, x := range sorted {
		points[i] = s.newPoint(x)
		s.points.Insert(x, points[i])
	}
	for i, x := range sorted {
		p.settlePoint(s, x, points[i])
	}
}

// settlePoint works out what a shape's table holds at one destination, once the wider ones are settled.
func (p *planner) settlePoint(s *shaped, x netip.Prefix, at *point) {
	var above *coverage // a clone of a wider destination would take what is not taken here
	if x.Bits() > 0 {
		above, _ = s.holds(netip.PrefixFrom(x.Addr(), x.Bits()-1).Masked())
	}
	p.begin(&at.unit)
	clone, c := p.decide(s, x, above)
	clone.Behind = p.hiddenBy(s, x, clone)
	if clone.Throw && above == nil && len(clone.Behind) == 0 {
		return
	}
	at.put(clone, c)
	s.clones += at.count()
	if c == nil {
		return
	}
	s.mtus[int(clone.MTU.MTU)]++
	for m := range c.members.each {
		if m.shape == s && routes.Contains(m.dst(), x) {
			at.of = m
			m.clones++
			break // of several, by rules of one priority
		}
	}
}

// minMTU is the least MTU of the shape's clones, in bytes.
func (s *shaped) minMTU() int {
	least := 0
	for mtu := range s.mtus {
		if least == 0 || mtu < least {
			least = mtu
		}
	}
	return least
}

// pointsOf appends the destinations at which the outcome can differ inside a member's destination:
// itself, and each route, policy and outer peer inside it. It is false, and appends none, where there are too many.
func (p *planner) pointsOf(s *shaped, m *member, to []netip.Prefix) ([]netip.Prefix, bool) {
	p.notFull(m)
	points := to
	full := func() bool {
		if len(points)-len(to) <= p.Config.MaxClonesPerCoverage {
			return false
		}
		m.full = &unit{phase: phaseMembers, shape: s, dst: m.dst()}
		p.begin(m.full)
		p.note(m.cov, fmt.Sprintf("no lock: more than %d routes and policies inside %s (max_clones_per_coverage)", p.Config.MaxClonesPerCoverage, m.dst()))
		return true
	}
	p.seedsAt = p.seeds(s, m, p.seedsAt[:0])
	for _, seed := range p.seedsAt {
		points = append(points, seed)
		_, inside := p.FIB.Cover(s.id.Flows.Family, s.id.Table, seed)
		for r := range inside {
			if points = append(points, r.Dst); full() {
				return to, false
			}
		}
		for peer := range p.outer.Subnets(seed) {
			if points = append(points, peer); full() {
				return to, false
			}
		}
		for _, t := range p.byIfID {
			for pfx, e := range t.Subnets(seed) {
				if pfx == seed || !e.anyTakes(s.id.Flows) {
					continue
				}
				if points = append(points, pfx); full() {
					return to, false
				}
			}
		}
	}
	return points, true
}

// notFull takes back that there is too much to look at for a member.
func (p *planner) notFull(m *member) {
	if m.full != nil {
		p.takeBack(m.full)
		m.full = nil
	}
}

// seeds appends the destinations where a member's flows can need a clone: all of its destination,
// or, for a policy with an if_id, those that routes through its xfrm interfaces leave of it.
func (p *planner) seeds(s *shaped, m *member, seeds []netip.Prefix) []netip.Prefix {
	if m.cov.pol.IfID == 0 {
		return append(seeds, m.dst())
	}
	add := func(keys []routes.Key) {
		for _, k := range keys {
			if x, ok := routes.Intersect(k.Dst, m.dst()); ok && k.Table == s.id.Table && !p.locked[k] {
				seeds = append(seeds, x)
			}
		}
	}
	for _, w := range p.waysOf(m.cov.pol.IfID) {
		for _, keys := range w.byDst.Supernets(m.dst()) {
			add(keys)
		}
		for pfx, keys := range w.byDst.Subnets(m.dst()) {
			if pfx != m.dst() {
				add(keys)
			}
		}
	}
	return seeds
}

// decide says what our table holds at one destination: a clone of the route that the kernel
// uses there, if one coverage takes all of the shape's flows to it, else a throw. above is
// that of the clone of a wider destination, nil if there is none.
func (p *planner) decide(s *shaped, x netip.Prefix, above *coverage) (Clone, *coverage) {
	throw := Clone{Dst: x, Throw: true}
	m, _ := p.FIB.Cover(s.id.Flows.Family, s.id.Table, x)
	r, ok := m.First()
	switch {
	case !ok && m.Paths != nil:
		p.noteAt(s, x, m, above, "its route is down or for some sources only")
	case ok && p.locked[r.Key()] && (m.SourceSpecific() || m.TOSSpecific()):
		p.noteAt(s, x, m, above, "its locked route is not that of every source and TOS value")
	case ok && r.Body.Type != routes.Unicast && (m.SourceSpecific() || m.TOSSpecific()):
		p.noteAt(s, x, m, above, "its routes are for some sources or TOS values only")
	}
	if !ok || int32(m.Dst.Bits()) <= s.base.SuppressPrefixLen || r.Body.Type != routes.Unicast ||
		p.locked[r.Key()] || linkLocal(x) || p.loops(r.Body) {
		return throw, nil
	}
	w, ok := p.domain(r.Body)
	if !ok || m.SourceSpecific() || m.TOSSpecific() {
		p.noteAt(s, x, m, above, "its routes are for some sources or TOS values only, or by ways with different policies")
		return throw, nil
	}
	c := p.winnerAt(s, x, w)
	if c == nil {
		return throw, nil
	}
	if _, outer := p.outer.Get(x); outer {
		// A lock that outer packets met would be taken for their path's MTU, and what it costs be
		// subtracted again, plan after plan.
		p.note(c, fmt.Sprintf("%s: the outer packets to this address use the route too: no lock there", x.Addr()))
		return throw, nil
	}
	mtu, why := p.mtuAt(c, p.linkMTU(r), r.Body.Family)
	if mtu == 0 {
		p.note(c, fmt.Sprintf("%s: %s", x, why))
		return throw, nil
	}
	for _, why := range []string{p.follows(m), p.object(r.Body)} {
		if why != "" {
			p.note(c, fmt.Sprintf("%s: %s: no lock there", x, why))
			return throw, nil
		}
	}
	if above != nil && otherWays(m, r) {
		p.note(c, fmt.Sprintf("%s: sockets bound to a device can take another route there: no lock", x))
		return throw, nil
	}
	header := uint32(40)
	if s.id.Flows.Family == routes.IPv6 {
		header = 60
	}
	adv := uint32(mtu) - header
	if own := r.Body.Metrics.AdvMSS; own != 0 {
		adv = min(adv, own)
	}
	return Clone{Dst: x, Of: r, MTU: p.metric(mtu), AdvMSS: adv, Because: c.id()}, c
}

// loops reports whether the route leads to the loopback device, whose packets XFRM leaves alone
// (disable_xfrm, DST_NOXFRM). IPv6 has such routes for addresses of it.
func (p *planner) loops(b *routes.Body) bool {
	return slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool {
		l := p.FIB.Link(n.Oif)
		return l != nil && l.Type == arphrdLoopback
	})
}

// follows says why a clone could not follow the kernel's choice among the routes to a
// destination, or is empty.
func (p *planner) follows(m routes.Match) string {
	neighbours := false
	for _, b := range m.Paths.Bodies() {
		if b.Expires {
			// An expired IPv6 route is passed over at once, but its event comes up to 30 s later
			// (fib6_age, net/ipv6/ip6_fib.c).
			return "its route has a lifetime, at whose end no event tells of the next best"
		}
		for _, nh := range b.Nexthops {
			neighbours = neighbours || b.Family == routes.IPv6 && p.FIB.Link(nh.Oif).Neighbours()
		}
	}
	if neighbours && len(m.Paths.Bodies()) > 1 {
		// A host passes over a router that does not answer (RT6_LOOKUP_F_REACHABLE,
		// net/ipv6/route.c), which no event tells either.
		return "it has several IPv6 routes, between which the kernel chooses by who answers"
	}
	return ""
}

// object says why the ways of a route's nexthop object can't be written out in a clone, or is
// empty. A change of an object reaches the mirror ahead of its routes, some of which are told by
// no event: until they are read again, no clone goes where the object led before.
func (p *planner) object(b *routes.Body) string {
	if b.NHID == 0 {
		return ""
	}
	o := p.FIB.Nexthop(b.NHID)
	ways, ok := p.FIB.ObjectWays(b.NHID)
	switch {
	case o != nil && o.Resilient:
		return "its nexthop group keeps flows by buckets of its own (resilient), which a clone can't share"
	case !ok:
		return "its nexthop object is not known"
	case !slices.EqualFunc(ways, b.Nexthops, func(a, b routes.Nexthop) bool {
		return a.Oif == b.Oif && a.Gateway == b.Gateway && (a.Weight == b.Weight || len(ways) == 1)
	}):
		return "its nexthop object has just changed"
	case b.Family == routes.IPv6:
		return writtenOut(ways)
	}
	return ""
}

// writtenOut says why an IPv6 route can't have the ways of a nexthop group written out, or is empty. The kernel joins them as
// routes of their own, which are to differ (EEXIST, ip6_route_multipath_add), and takes the source of a socket without
// one from the device of the one that it leaves by, but from that of the first way of a group (ip6_route_get_saddr).
func writtenOut(ways []routes.Nexthop) string {
	for i, n := range ways {
		same := func(o routes.Nexthop) bool { return o.Oif == n.Oif && o.Gateway == n.Gateway }
		switch {
		case slices.ContainsFunc(ways[:i], same):
			return "two ways of its nexthop group are the same, which no IPv6 route can have written out"
		case n.Oif != ways[0].Oif:
			return "its nexthop group leads to several devices, and with its ways written out the kernel would choose other sources (IPv6)"
		}
	}
	return ""
}

// otherWays reports whether a socket that is bound to a device could take another of the routes
// than the first: it passes over those that don't leave by its device, and in our table it would
// then find a wider clone.
func otherWays(m routes.Match, first routes.Route) bool {
	return slices.ContainsFunc(m.Paths.Bodies(), func(b *routes.Body) bool {
		return b.Type != routes.Unicast || slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool {
			return !slices.ContainsFunc(first.Body.Nexthops, func(o routes.Nexthop) bool { return o.Oif == n.Oif })
		})
	})
}

// noteAt tells each coverage that can take the shape's flows to a destination why there is no
// lock.
func (p *planner) noteAt(s *shaped, x netip.Prefix, m routes.Match, above *coverage, why string) {
	if above != nil {
		p.note(above, fmt.Sprintf("%s: %s: no lock there", x, why))
	}
	ways := []way{{}}
	for _, b := range m.Paths.Bodies() {
		for _, nh := range b.Nexthops {
			one, ok := p.domain(&routes.Body{Nexthops: []routes.Nexthop{nh}})
			if ok && !slices.Contains(ways, one) {
				ways = append(ways, one)
			}
		}
	}
	for _, w := range ways {
		if c := p.winnerAt(s, x, w); c != nil {
			p.note(c, fmt.Sprintf("%s: %s: no lock there", x, why))
		}
	}
}

// winnerAt is the coverage that takes all of the shape's flows to a destination, nil if there
// is none or if another policy takes a part of them out that no shape ahead of this one serves.
func (p *planner) winnerAt(s *shaped, x netip.Prefix, w way) *coverage {
	var parts []*entry
	for _, e := range p.applying(w, x, false) {
		all, some := e.takes(s.id.Flows)
		if !some {
			continue
		}
		if !all {
			parts = append(parts, e)
			continue
		}
		if e.cov == nil {
			return nil
		}
		if p.bypassed(w, e, x) {
			p.note(e.cov, fmt.Sprintf("%s: a bypass with priority over this policy can leave flows to the device's own: no lock there", x))
			for _, own := range p.applying(w, x, true) {
				if own.cov != nil && own != e {
					p.note(own.cov, fmt.Sprintf("%s: a bypass can leave it flows past policy %d: no lock there", x, e.cov.pol.Index))
				}
			}
			return nil
		}
		for _, q := range parts {
			if ahead := q.servedBy(s.base); ahead == nil || ahead.order >= s.order || !ahead.takesAll(x, s) {
				p.note(e.cov, fmt.Sprintf("%s: a policy with priority over this one takes a part of the flows: no lock there", x))
				return nil
			}
		}
		return e.cov
	}
	return nil
}

// takesAll reports whether the shape's table leaves nothing to a destination over for a shape
// behind it, but where that one looks again.
func (s *shaped) takesAll(x netip.Prefix, behind *shaped) bool {
	if because, ok := s.holds(x); !ok || because == nil {
		return false
	}
	for y, at := range s.points.Subnets(x) {
		if at.has && at.because == nil {
			if at, _, ok := behind.points.LookupPrefixLPM(y); !ok || at.Bits() <= x.Bits() {
				return false
			}
		}
	}
	return true
}
