package plan

import (
	"cmp"
	"fmt"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// wraps is the inner MTU that a dedicated tunnel leaves to what it wraps, in bytes: what its
// coverages leave of the outer path, less its own header. It is 0, with the reason, if it isn't
// known.
func (p *planner) wraps(t *tunnel) (int, string) {
	if len(t.over) > 0 {
		least := 0
		for _, o := range t.over {
			mtu, why := p.wraps(o)
			if mtu == 0 {
				return 0, why
			}
			if least == 0 || mtu < least {
				least = mtu
			}
		}
		return least - t.tag, ""
	}
	if t.path.MTU == 0 || t.encap.Header == 0 {
		return 0, fmt.Sprintf("the path of %s's outer packets is not known", t.link.Name)
	}
	if t.loops = t.loops || t.wrapping; t.loops {
		return 0, fmt.Sprintf("the outer packets of %s go into itself", t.link.Name)
	}
	t.wrapping = true
	defer func() { t.wrapping = false }()
	// The route that they use has the lock for the tunnel that it leads into, whatever takes them.
	ways := p.outerWays(t)
	if !slices.ContainsFunc(ways, func(nh routes.Nexthop) bool { return nh.Oif == t.path.Oif }) {
		ways = append(slices.Clip(ways), routes.Nexthop{Oif: t.path.Oif})
	}
	path, why := p.through(ways, t.path.MTU, nil)
	if why != "" {
		return 0, why
	}
	mtu := path
	for _, c := range t.own {
		behind, why := path, ""
		if !c.tunnels() && p.takenAtRoute(t, c) {
			behind, why = p.through(ways, path, func() []espPackets { return p.espFrom(t, c) })
		}
		left, status := c.whole().MTU(p.peerMTU, behind)
		switch {
		case why != "":
			return 0, why
		case t.loops:
			return 0, fmt.Sprintf("the outer packets of %s go into itself", t.link.Name)
		case status == xfrmwatch.MTUKnown && c.tunnels():
			p.sayValid(c)
		case status == xfrmwatch.MTUKnown:
			p.valid(c, left)
		case p.Last[c.id()] != 0:
			left = min(p.Last[c.id()], behind)
			p.note(c, fmt.Sprintf("%s; the last valid MTU stays", status))
		case p.Config.PresumeMTU != 0 && !c.maybe:
			left = min(p.Config.PresumeMTU, behind)
			p.note(c, fmt.Sprintf("%s; presume_mtu %d", status, p.Config.PresumeMTU))
		default:
			return 0, status.String()
		}
		p.left(c, left)
		mtu = min(mtu, left)
	}
	return mtu - t.encap.Header, ""
}

// through is what is left of the path of outer packets by each of its ways, in bytes, or why that isn't
// known: the least that a dedicated tunnel leaves, or, of packets that are IPsec already, an xfrm
// interface or a vti that looks them up again. It is 0 without a reason where the path isn't known.
func (p *planner) through(ways []routes.Nexthop, path int, esp func() []espPackets) (int, string) {
	least := path
	for _, nh := range ways {
		left, why := path, ""
		l, t := p.FIB.Link(nh.Oif), p.tunnels[nh.Oif]
		switch {
		case path == 0:
			return 0, ""
		case l == nil: // not told yet
		case t != nil && len(t.covs) > 0:
			left, why = p.wraps(t)
		case p.partly(nh.Oif):
			why = fmt.Sprintf("policies take a part of what leaves by %s", l.Name)
		case esp != nil && slices.Contains([]string{"xfrm", "vti", "vti6"}, l.Kind):
			left, why = p.takenAgain(nh, path, esp())
		}
		if why != "" {
			return 0, why
		}
		least = min(least, left)
	}
	return least, ""
}

// partly reports whether policies take some of what a device sends, once a tunnel has wrapped it,
// and others not.
func (p *planner) partly(i routes.Ifindex) bool {
	l := p.FIB.Link(i)
	if t := p.tunnels[i]; t != nil || l == nil {
		return t != nil && t.partly
	}
	switch l.Kind {
	case "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap":
		return !l.ParentElsewhere && p.partly(l.Parent)
	case "bond", "team":
		return slices.ContainsFunc(p.ports[i], func(port *routes.Link) bool {
			t := p.tunnels[port.Index]
			return t != nil && len(t.covs) > 0 || p.partly(port.Index)
		})
	}
	return false
}

// wrapsAt is the MTU to lock on a route through dedicated tunnels, with their coverages; 0 for
// none, with the reason. Of several that share its flows all have to leave the same.
func (p *planner) wrapsAt(r routes.Route) (int, []*coverage, string) {
	var covs []*coverage
	mtu, why, name := 0, "", ""
	for i, nh := range r.Body.Nexthops {
		t := p.tunnels[nh.Oif]
		covs = union(covs, t.covs)
		left, no := p.wraps(t)
		switch {
		case left == 0:
			why = cmp.Or(why, no)
		case i == 0:
			mtu, name = left, t.link.Name
		case left != mtu:
			why = cmp.Or(why, fmt.Sprintf("its flows have different MTUs left, %d and %d", mtu, left))
		}
	}
	if why != "" {
		return 0, covs, why
	}
	path := p.linkMTU(r)
	switch {
	case path == 0:
		return 0, covs, "a device of the route is not known yet"
	case mtu >= path:
		return 0, covs, fmt.Sprintf("%s's own MTU %d leaves room already", name, path)
	case mtu < lowestMTU(r.Body.Family):
		return 0, covs, fmt.Sprintf("the inner MTU %d is below what %s allows", mtu, r.Body.Family)
	}
	return mtu, covs, ""
}

// lowestMTU is the least MTU of a route (RFC 8200 section 5; RFC 791).
func lowestMTU(f routes.Family) int {
	if f == routes.IPv6 {
		return 1280
	}
	return 68
}
