package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// IPsec in IPsec: packets of an SA whose way leads into an xfrm interface or a vti, which looks them up
// again.

// espPackets are those of an SA, nil for none yet, as a lookup behind it sees them.
type espPackets struct {
	sa   *xfrmwatch.SA
	flow outerFlow
}

func espOf(sa *xfrmwatch.SA) espPackets {
	o := outerFlow{
		src: netip.PrefixFrom(sa.Src, sa.Src.BitLen()), dst: netip.PrefixFrom(sa.Dst, sa.Dst.BitLen()),
		proto: uint8(sa.Proto), sport: known{ok: true}, dport: known{ok: true},
	}
	if sa.Encap.Type != 0 {
		o.proto, o.sport, o.dport = 17, known{sa.Encap.Sport, true}, known{sa.Encap.Dport, true}
	}
	return espPackets{sa, o}
}

// espFrom are the packets of a tunnel's outer packets once a policy has taken them in transport mode.
func (p *planner) espFrom(t *tunnel, c *coverage) []espPackets {
	var out []espPackets
	for _, o := range p.outerFlows(t) {
		o.proto, o.sport, o.dport = uint8(c.pol.Templates[len(c.pol.Templates)-1].Proto), known{ok: true}, known{ok: true}
		if len(c.steps) == 0 {
			out = append(out, espPackets{flow: o})
			continue
		}
		for _, sa := range c.steps[len(c.steps)-1].SAs {
			esp := espOf(sa).flow
			o.proto, o.sport, o.dport = esp.proto, esp.sport, esp.dport
			out = append(out, espPackets{sa, o})
		}
	}
	return out
}

// takenAtRoute reports whether a coverage takes outer packets of a tunnel in the route lookup, ahead of
// the device that they leave by.
func (p *planner) takenAtRoute(t *tunnel, c *coverage) bool {
	return slices.ContainsFunc(p.outerFlows(t), func(o outerFlow) bool {
		_, some := o.takenBy(&c.entry)
		return some && c.pol.IfID == 0
	})
}

// takenAgain is what an xfrm interface or a vti leaves of a path to packets that are IPsec already: the
// least of all policies that can take some of them. What none takes is dropped there, as is what comes
// to its own policy again (a local routing loop to xfrmi_xmit2): both count for nothing. It is 0, with
// the reason, if it isn't known.
func (p *planner) takenAgain(nh routes.Nexthop, path int, packets []espPackets) (int, string) {
	name := p.FIB.Link(nh.Oif).Name
	w, ok := p.domain(&routes.Body{Nexthops: []routes.Nexthop{nh}})
	if !ok {
		return 0, fmt.Sprintf("which policies take them once more in %s is not known", name)
	}
	least := path
	for _, esp := range packets {
		unsure := false // one that drops them may take them ahead
		for _, l := range p.deviceLookup(esp.flow, w) {
			all, some := l.flow.takenBy(l.entry)
			c, dev := l.entry.cov, routes.Ifindex(l.entry.sel().Ifindex)
			unsure = unsure || some && dev != 0 && !slices.Contains(l.flow.oifs[:], dev)
			if some && c != nil && !c.has(esp.sa) {
				left, why := p.leftAgain(c, path)
				switch {
				case unsure && left < path:
					return 0, fmt.Sprintf("whether a policy for one device takes them once more in %s is not known", name)
				case left <= 0:
					return 0, fmt.Sprintf("policy %d takes them once more in %s: %s", c.pol.Index, name, why)
				}
				least = min(least, left)
			}
			if all {
				break
			}
		}
	}
	return least, ""
}

// has reports whether an SA is one of a coverage's own.
func (c *coverage) has(sa *xfrmwatch.SA) bool {
	return slices.ContainsFunc(c.steps, func(st xfrmwatch.Step) bool { return slices.Contains(st.SAs, sa) })
}

// leftAgain is what a coverage leaves of the path of packets that it takes once more, 0 with the reason if
// that isn't known.
func (p *planner) leftAgain(c *coverage, path int) (int, string) {
	const circle = "their way comes to it again"
	s := c.besides()
	if s.circles = s.circles || s.again; s.circles {
		return 0, circle
	}
	s.again = true
	defer func() { s.again = false }()
	mtu, status := c.whole().MTU(p.peerMTU, path)
	switch {
	case s.circles:
		return 0, circle
	case status == xfrmwatch.MTUKnown:
		if c.tunnels() {
			p.sayValid(c)
		}
	case p.Last[c.id()] != 0:
		mtu = min(p.Last[c.id()], path)
		p.noteShared(c, p.stays[status])
	case p.Config.PresumeMTU != 0 && !c.maybe:
		mtu = min(p.Config.PresumeMTU, path)
		p.noteShared(c, p.presumed[status])
	default:
		return 0, cmp.Or(p.lost(c), status.String())
	}
	return mtu, ""
}
