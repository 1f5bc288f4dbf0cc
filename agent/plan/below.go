package plan

import (
	"fmt"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// asked is a policy, or one coverage of it, that a lookup for outer packets can find, with their flow
// as that lookup sees it.
type asked struct {
	entry  *entry
	flow   outerFlow
	device bool // in the lookup of an xfrm interface or vti
}

// lookupsOf are the entries that can take the outer packets of a flow, in the kernel's order: those
// of the route lookup, whatever the device, then those of the device.
func (p *planner) lookupsOf(o outerFlow, w way) []asked {
	var out []asked
	passes := p.XFRM.Default().Out != xfrmwatch.Block
	for _, e := range p.overlapping(0, o.dst, true) {
		_, some := o.takenBy(e)
		passes = passes || some && e.cov == nil && !e.blocks() && w.drops()
		out = append(out, asked{e, o, false})
	}
	if !passes {
		return out // the default action drops it in the route lookup already
	}
	return append(out, p.deviceLookup(o, w)...)
}

// deviceLookup are the entries of an xfrm interface or vti, which looks again at what the route lookup
// has left, and drops what no policy with templates takes.
func (p *planner) deviceLookup(o outerFlow, w way) []asked {
	var out []asked
	switch {
	case w.ifID != 0:
		// What is on the packet is the mark of what is inside: the tunnel's own is for the lookup of its
		// route alone (ip_tunnel_xmit, xfrmi_xmit; KERNEL.md 65).
		o.mark, o.anyMark = 0, true
	case w.vti != nil:
		o.mark, o.anyMark, o.oifs = w.vti.Encap.Key, false, [2]routes.Ifindex{w.vti.Index} // vti_xmit
	default:
		return nil
	}
	for _, e := range p.overlapping(w.ifID, o.dst, true) {
		out = append(out, asked{e, o, true})
	}
	return out
}

// takesSome reports whether some of the outer packets of a flow are taken.
func (p *planner) takesSome(o outerFlow, w way) bool {
	return slices.ContainsFunc(p.lookupsOf(o, w), func(l asked) bool {
		_, some := l.flow.takenBy(l.entry)
		return some && l.entry.cov != nil
	})
}

// takenByWays reports whether some of a tunnel's outer packets are taken by one of their ways, or can be as
// those differ and are not known.
func (p *planner) takenByWays(t *tunnel, o outerFlow, one bool) bool {
	ways := p.outerWays(t)
	return len(ways) == 0 && !one || slices.ContainsFunc(ways, func(nh routes.Nexthop) bool {
		w, _ := p.domain(&routes.Body{Nexthops: []routes.Nexthop{nh}})
		return w.tunnel != nil || p.takesSome(o, w) || p.partly(nh.Oif)
	})
}

// noteLoop tells those that can take outer packets of a tunnel that a way of theirs leads into it again.
func (p *planner) noteLoop(t *tunnel) {
	if !t.link.Up {
		return
	}
	for _, o := range p.outerFlows(t) {
		for _, l := range p.lookupsOf(o, way{}) {
			if _, some := l.flow.takenBy(l.entry); some && l.entry.cov != nil {
				p.note(l.entry.cov, fmt.Sprintf("%s keeps its features, and its routes have no lock for its sake: its outer packets can go into it again", t.link.Name))
			}
		}
	}
}

// noteWays tells those that take outer packets of a tunnel by one way that there are others.
func (p *planner) noteWays(t *tunnel, o outerFlow, one way) {
	if !t.link.Up {
		return
	}
	var covs []*coverage
	if one.tunnel != nil {
		covs = one.tunnel.covs
	}
	for _, l := range p.deviceLookup(o, one) {
		if _, some := l.flow.takenBy(l.entry); some && l.entry.cov != nil {
			covs = append(slices.Clip(covs), l.entry.cov)
		}
	}
	for _, c := range covs {
		p.note(c, fmt.Sprintf("%s keeps its features, and its routes have no lock for its sake: its outer packets can also leave by another way than %s", t.link.Name, p.FIB.Link(t.path.Oif).Name))
	}
}

// wayBelow is what applies to a tunnel's outer packets besides the policies without an if_id, as
// the kernel answered. It is false where they can leave by ways that differ in that.
func (p *planner) wayBelow(t *tunnel, done map[*tunnel]bool) (way, bool) {
	by := func(nh routes.Nexthop) way {
		p.tunnelAt(nh.Oif, done)
		w, _ := p.domain(&routes.Body{Nexthops: []routes.Nexthop{nh}})
		return w
	}
	answered := routes.Nexthop{Oif: t.path.Oif}
	ways := p.outerWays(t)
	if i := slices.IndexFunc(ways, func(nh routes.Nexthop) bool { return nh.Oif == t.path.Oif }); i >= 0 {
		answered = ways[i]
	}
	below := by(answered)
	if len(ways) == 0 && below != (way{}) || slices.ContainsFunc(ways, func(nh routes.Nexthop) bool { return by(nh) != below }) {
		return below, false
	}
	return below, true
}

// outerWays are the ways by which a tunnel's outer packets can leave; none if that isn't known: the
// kernel's one answer is for one flow, without a packet's mark.
func (p *planner) outerWays(t *tunnel) []routes.Nexthop {
	if e := t.encap; e.AnyMark && e.Link == 0 && p.marksDecide(e.Family, t.path.Table) {
		return nil
	}
	return p.tableWays(t)
}

// tableWays are the ways that the table has to which the kernel's answer leads; packets with another
// mark can go by other tables.
func (p *planner) tableWays(t *tunnel) []routes.Nexthop {
	e := t.encap
	if t.path.Oif == 0 || !e.Remote.IsValid() {
		return nil
	}
	var out []routes.Nexthop
	if first, ok := p.routeTo(e.Family, t.path.Table, e.Remote, e.Local); ok {
		for _, r := range p.tied(first) {
			for _, nh := range r.Body.Nexthops {
				if (e.Link == 0 || nh.Oif == e.Link) && !slices.Contains(out, nh) {
					out = append(out, nh)
				}
			}
		}
	}
	if len(out) == 0 && e.Link == t.path.Oif {
		return []routes.Nexthop{{Oif: e.Link}} // the lookup is bound to it, and passes over routes by others
	}
	return out
}

// marksDecide reports whether a rule ahead of the one that leads to a table looks at a packet's
// mark, or that one itself.
func (p *planner) marksDecide(f routes.Family, table routes.TableID) bool {
	for _, r := range p.FIB.Rules(f) {
		switch {
		case p.Config.OwnRule(r): // its clones lead where the routes do
		case r.Mask != 0:
			return true
		case r.Action == routes.RuleToTable && r.Table == table:
			return false
		}
	}
	return false
}
