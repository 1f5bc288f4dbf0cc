package plan

import (
	"net/netip"
	"slices"
)

// A route that very many policies are under, such as a default route, is followed in parts: each plan works out a part of what is inside its
// destination anew, so that none takes long, and what else changes meanwhile is followed at once. What waits is as it was before the change.
//
//	route ──> more inside than one part? ──no──> region
//	                     │ yes
//	                     v
//	                   later ──> halves, until they are small enough ──> region of this plan, or of a later one

// DefaultPart is how many policies and peers a part of a region has.
const DefaultPart = 256

// Unfinished reports whether changes are not followed in all their regions yet. Then the plan is to be made again, with no more changes.
func (pl *Planner) Unfinished() bool {
	return pl.p != nil && pl.p.follower != nil && len(pl.p.later) > 0
}

// part is how many policies and peers one follows at a time.
func (pl *Planner) part() int {
	if pl.Part > 0 {
		return pl.Part
	}
	return DefaultPart
}

// postpone reports whether the region of a route that changed is followed in parts. One that is inside a policy's destination, or has it, is
// not: there the table of ours can have something for the route's destination itself.
func (p *planner) postpone(dst netip.Prefix) bool {
	for _, t := range p.byIfID {
		if _, inside := t.LookupPrefix(dst); inside {
			return false
		}
	}
	if p.crowd(dst, p.part) <= p.part {
		return false
	}
	p.later = slices.DeleteFunc(p.later, func(x netip.Prefix) bool { return x.Bits() >= dst.Bits() && dst.Contains(x.Addr()) })
	p.later = append(p.later, dst)
	return true
}

// crowd counts the policies, peers and tried routes inside a destination, up to more than enough.
func (p *planner) crowd(dst netip.Prefix, enough int) (n int) {
	more := func() bool { n++; return n > enough }
	for _, t := range p.byIfID {
		for _, first := range t.Subnets(dst) {
			for range first.each {
				if more() {
					return n
				}
			}
		}
	}
	for _, first := range p.outer.Subnets(dst) {
		for range first.each {
			if more() {
				return n
			}
		}
	}
	for range p.trialsAt.Subnets(dst) {
		if more() {
			return n
		}
	}
	return n
}

// followLater takes a part of what waits into the region, and returns its destinations.
func (p *planner) followLater(r *region) (dsts []netip.Prefix) {
	for room := p.part; len(p.later) > 0 && room > 0; {
		last := len(p.later) - 1
		x := p.later[last]
		p.later = p.later[:last]
		if !p.near(x) {
			continue
		}
		n := p.crowd(x, p.part)
		switch {
		case n > p.part && !x.IsSingleIP() && !p.policyAt(x):
			a, b := halves(x)
			p.later = append(p.later, b, a)
			continue
		case n > room && len(dsts) > 0:
			p.later = append(p.later, x) // the next plan's
			return dsts
		}
		room -= max(n, 1)
		r.add(x)
		dsts = append(dsts, x)
	}
	return dsts
}

// policyAt reports whether a destination is that of a policy: its points are looked at together, as those that are none any more are found
// only where the region has them as a whole (redo).
func (p *planner) policyAt(dst netip.Prefix) bool {
	for _, t := range p.byIfID {
		if _, there := t.Get(dst); there {
			return true
		}
	}
	return false
}

// near reports whether a policy, a peer or a tried route is at, inside or around a destination.
func (p *planner) near(dst netip.Prefix) bool {
	return p.covered(dst) || p.outer.OverlapsPrefix(dst) || p.trialsAt.OverlapsPrefix(dst)
}

// halves are those of a destination that is no single address.
func halves(p netip.Prefix) (lower, upper netip.Prefix) {
	b := p.Addr().AsSlice()
	bit := p.Bits()
	lower = netip.PrefixFrom(p.Addr(), bit+1)
	b[bit/8] |= 0x80 >> (bit % 8)
	a, _ := netip.AddrFromSlice(b)
	return lower, netip.PrefixFrom(a, bit+1)
}
