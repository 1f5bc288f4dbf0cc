package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// tunnel is a device that wraps what it sends (gre, vxlan and their kin). It is dedicated where
// the policies take all of its outer packets, whatever is inside.
type tunnel struct {
	link  *routes.Link
	encap routes.Encap
	path  Path // of the outer packets
	// covs together take all outer packets; none if the tunnel is not dedicated.
	covs []*coverage
	own  []*coverage // those whose policies take the outer packets themselves
	// lower takes what they leave alone, as the outer packets leave by it; nil if nothing is left.
	lower   *tunnel
	maybe   bool // one of covs has optional templates: locked, and never a reason for a hold
	looking bool // while it is worked out: a tunnel through itself has no end
	// over are the dedicated tunnels that a device in a stack sends by: it wraps nothing itself, but
	// for the bytes of its tag.
	over []*tunnel
	tag  int
}

// Outer is a question for the route of a tunnel's outer packets.
type Outer struct {
	Index        routes.Ifindex // of the tunnel
	Family       routes.Family
	Dst, Src     netip.Addr // Src is invalid where the route chooses
	Mark         uint32
	Oif          routes.Ifindex
	Proto        uint8
	Sport, Dport uint16
}

// OutersOf lists the questions for the routes of tunnels' outer packets that a plan needs, in the
// order of the tunnels. A tunnel without a remote address has none.
func OutersOf(fib *routes.FIB, l2tp map[routes.Ifindex]routes.Encap) []Outer {
	var out []Outer
	for _, l := range fib.Links() {
		e, ok := encapOf(l, l2tp)
		if !ok || e.LinkElsewhere || !e.Remote.IsValid() || e.Remote.IsUnspecified() {
			continue
		}
		o := Outer{Index: l.Index, Family: e.Family, Dst: e.Remote, Mark: e.Mark, Oif: e.Link, Proto: e.Proto}
		if e.Local.IsValid() && !e.Local.IsUnspecified() {
			o.Src = e.Local
		}
		if e.Sport.Lo == e.Sport.Hi {
			o.Sport = e.Sport.Lo
		}
		if e.Dport.Lo == e.Dport.Hi {
			o.Dport = e.Dport.Lo
		}
		out = append(out, o)
	}
	return out
}

// encapOf is how a device wraps what it sends. vti and xfrm interfaces are not asked here: they
// are IPsec themselves.
func encapOf(l *routes.Link, l2tp map[routes.Ifindex]routes.Encap) (routes.Encap, bool) {
	switch l.Kind {
	case "vti", "vti6", "xfrm":
		return routes.Encap{}, false
	}
	if e, ok := l2tp[l.Index]; ok {
		return e, true
	}
	return l.Encap, l.Encap != routes.Encap{}
}

// findTunnels works out which tunnels are dedicated.
func (p *planner) findTunnels() {
	p.tunnels, p.ports = map[routes.Ifindex]*tunnel{}, p.portsOf()
	var list []*tunnel
	for _, l := range p.FIB.Links() {
		if (l.Kind == "vti" || l.Kind == "vti6") && !l.Encap.LinkElsewhere {
			p.vtis = append(p.vtis, l)
		}
		if e, ok := encapOf(l, p.L2TP); ok && !e.LinkElsewhere && !e.Others {
			t := &tunnel{link: l, encap: e, path: p.Outers[l.Index]}
			p.tunnels[l.Index] = t
			list = append(list, t)
		}
	}
	done := map[*tunnel]bool{}
	for _, t := range list {
		p.settle(t, done)
	}
	p.stackTunnels()
}

// stackTunnels adds the devices that send by dedicated tunnels alone.
func (p *planner) stackTunnels() {
	for again := true; again; {
		again = false
		for _, l := range p.FIB.Links() {
			if p.tunnels[l.Index] != nil {
				continue
			}
			over := below(l, p.ports[l.Index], func(l *routes.Link) *tunnel {
				if t := p.tunnels[l.Index]; t != nil && len(t.covs) > 0 {
					return t
				}
				return nil
			}, p.FIB)
			if len(over) == 0 {
				continue
			}
			t := &tunnel{link: l, over: over}
			if l.Kind == "vlan" {
				t.tag = 4 // IEEE 802.1Q
			}
			for _, o := range over {
				t.covs = union(t.covs, o.covs)
				t.maybe = t.maybe || o.maybe
			}
			p.tunnels[l.Index] = t
			again = true
		}
	}
}

// settle works out what takes a tunnel's outer packets. A policy without an if_id takes them in
// the route lookup (ip_route_output_flow, ip6_tnl_xmit, udp_tunnel_dst_lookup); what those leave
// alone can be taken by the device that the outer packets leave by, which is an xfrm interface or
// a dedicated tunnel itself.
func (p *planner) settle(t *tunnel, done map[*tunnel]bool) {
	if t.looking || done[t] {
		return
	}
	t.looking = true
	defer func() { t.looking, done[t] = false, true }()
	if p.leadsTo(t.path.Oif, t.link.Index, map[routes.Ifindex]bool{}) {
		return // its outer packets would go into itself: a lock would lower their path, and with it the next lock
	}
	var own []*coverage
	var lower *tunnel
	for _, o := range p.outerFlows(t) {
		took, below, ok := p.takersOf(t, o, done)
		if !ok {
			return
		}
		own = union(own, took)
		if below != nil {
			lower = below
		}
	}
	t.own, t.lower, t.covs = own, lower, own
	if lower != nil {
		t.maybe = t.maybe || lower.maybe
		t.covs = union(own, lower.covs)
	}
}

// leadsTo reports whether what leaves by a device comes to another one: through the outer packets of
// tunnels, the device below a VLAN and its kin, and the ports of a bond or team.
func (p *planner) leadsTo(from, to routes.Ifindex, seen map[routes.Ifindex]bool) bool {
	l := p.FIB.Link(from)
	if from == to || l == nil || seen[from] {
		return l != nil && from == to
	}
	seen[from] = true
	if t := p.tunnels[from]; t != nil && p.leadsTo(t.path.Oif, to, seen) {
		return true
	}
	switch l.Kind {
	case "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap":
		return !l.ParentElsewhere && p.leadsTo(l.Parent, to, seen)
	case "bond", "team":
		return slices.ContainsFunc(p.ports[from], func(port *routes.Link) bool { return p.leadsTo(port.Index, to, seen) })
	}
	return false
}

// union appends the coverages that are not there yet.
func union(a, b []*coverage) []*coverage {
	a = slices.Clip(a)
	for _, c := range b {
		if !slices.Contains(a, c) {
			a = append(a, c)
		}
	}
	return a
}

// takersOf are the coverages that take the outer packets of one flow of a tunnel, and the
// dedicated tunnel that takes the rest, if there is one. It is false if some are left.
func (p *planner) takersOf(t *tunnel, o outerFlow, done map[*tunnel]bool) ([]*coverage, *tunnel, bool) {
	if l := p.FIB.Link(t.path.Oif); l != nil && l.Type == arphrdLoopback { // net.ipv4.conf.lo.disable_xfrm is on
		return nil, nil, false
	}
	answered, one := p.wayBelow(t, done)
	below := answered
	if !one {
		below = way{}
	}
	var took []*coverage
	partly := ""
	for _, e := range p.applying(below, o.dst, true) {
		all, some := o.takenBy(e)
		switch {
		case !some:
			continue
		case e.cov == nil && e.block || e.cov == nil && below.ifID != 0:
			// dropped; on an xfrm interface a bypass is dropped as well
		case e.cov == nil:
			partly = "a bypass policy takes a part of its outer packets"
		default:
			took = append(took, e.cov)
			t.maybe = t.maybe || e.cov.Maybe
		}
		if partly != "" {
			break
		}
		if all {
			return took, nil, len(took) > 0
		}
	}
	switch {
	case partly == "" && len(took) > 0 && (below.ifID != 0 || p.XFRM.Default().Out == xfrmwatch.Block):
		return took, nil, true // the rest is dropped
	case partly == "" && below.tunnel != nil && len(below.tunnel.covs) > 0:
		return took, below.tunnel, true
	case partly == "":
		partly = "other packets of it are not covered"
	}
	for _, c := range took {
		if !t.link.Up { // gre0, tunl0 and their kin are there with their module
			break
		}
		c.verdict.note(fmt.Sprintf("%s keeps its features: only a part of its outer packets is covered by this policy, and %s", t.link.Name, partly))
	}
	if !one {
		p.noteWays(t, o, answered)
	}
	return nil, nil, false
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
	for _, e := range p.applying(one, o.dst, true) {
		if _, some := o.takenBy(e); some && e.cov != nil && e.ifID != 0 {
			covs = append(slices.Clip(covs), e.cov)
		}
	}
	for _, c := range covs {
		c.verdict.note(fmt.Sprintf("%s keeps its features, and its routes have no lock for its sake: its outer packets can also leave by another way than %s", t.link.Name, p.FIB.Link(t.path.Oif).Name))
	}
}

// wayBelow is what applies to a tunnel's outer packets besides the policies without an if_id, as
// the kernel answered. It is false where they can leave by ways that differ in that.
func (p *planner) wayBelow(t *tunnel, done map[*tunnel]bool) (way, bool) {
	by := func(i routes.Ifindex) way {
		if l := p.FIB.Link(i); l != nil && l.Kind == "xfrm" && !l.External {
			return way{ifID: l.IfID}
		}
		lower := p.tunnels[i]
		if lower != nil {
			p.settle(lower, done)
		}
		return way{tunnel: lower}
	}
	below := by(t.path.Oif)
	if below == (way{}) {
		return below, true
	}
	devices := p.outerDevices(t)
	if len(devices) == 0 || slices.ContainsFunc(devices, func(i routes.Ifindex) bool { return by(i) != below }) {
		return below, false
	}
	return below, true
}

// outerDevices are the devices by which a tunnel's outer packets can leave; none if that isn't
// known: the kernel's one answer is for one flow, without a packet's mark.
func (p *planner) outerDevices(t *tunnel) []routes.Ifindex {
	e := t.encap
	switch {
	case t.path.Oif == 0 || !e.Remote.IsValid():
		return nil
	case e.Link == t.path.Oif:
		return []routes.Ifindex{e.Link} // the lookup is bound to it
	case e.AnyMark && p.marksDecide(e.Family, t.path.Table):
		return nil
	}
	m, _ := p.FIB.Cover(e.Family, t.path.Table, netip.PrefixFrom(e.Remote, e.Remote.BitLen()))
	first, ok := m.First()
	if !ok {
		return nil
	}
	var out []routes.Ifindex
	for _, b := range m.Paths.Bodies() {
		for _, nh := range b.Nexthops {
			if b.Priority == first.Body.Priority && !slices.Contains(out, nh.Oif) {
				out = append(out, nh.Oif)
			}
		}
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

// dedicatedTunnels are the tunnels all of whose outer packets are covered, and the devices above
// them, in order.
func (p *planner) dedicatedTunnels() []*tunnel {
	var out []*tunnel
	for _, t := range p.tunnels {
		if len(t.covs) > 0 {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b *tunnel) int { return cmp.Compare(a.link.Index, b.link.Index) })
	return out
}
