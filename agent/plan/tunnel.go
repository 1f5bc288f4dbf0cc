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
	lower *tunnel
	maybe bool // one of covs has optional templates: locked, and never a reason for a hold
	// partly says of one that is not dedicated that policies take some of its outer packets.
	partly            bool
	looking, wrapping bool // while it is worked out, or its MTU
	loops             bool // its outer packets go into itself by the way to an SA's peer
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
	p.begin(&p.base)
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
	for _, l := range p.FIB.Links() {
		p.tunnelAt(l.Index, done)
	}
}

// tunnelAt is a device that wraps what it sends, or one that sends by such devices alone that are
// dedicated; nil if it is neither.
func (p *planner) tunnelAt(i routes.Ifindex, done map[*tunnel]bool) *tunnel {
	if t := p.tunnels[i]; t != nil {
		p.settle(t, done)
		return t
	}
	l := p.FIB.Link(i)
	if l == nil {
		return nil
	}
	over := below(l, p.ports[i], func(l *routes.Link) *tunnel {
		if t := p.tunnelAt(l.Index, done); t != nil && len(t.covs) > 0 {
			return t
		}
		return nil
	}, p.FIB)
	if len(over) == 0 {
		return nil
	}
	t := &tunnel{link: l, over: over}
	if l.Kind == "vlan" {
		t.tag = 4 // IEEE 802.1Q
	}
	for _, o := range over {
		t.covs = union(t.covs, o.covs)
		t.maybe = t.maybe || o.maybe
	}
	p.tunnels[i], done[t] = t, true
	return t
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
	if len(t.over) > 0 {
		return
	}
	if p.outerLeadsTo(t, t.link.Index, map[routes.Ifindex]bool{}) {
		p.noteLoop(t)
		return // a lock would lower the path of its outer packets, and with it the next lock
	}
	var own []*coverage
	var lower *tunnel
	whole := true
	for _, o := range p.outerFlows(t) {
		took, below, ok := p.takersOf(t, o, done)
		whole = whole && ok
		own = union(own, took)
		if below != nil {
			lower = below
		}
	}
	if !whole {
		t.partly = t.partly || len(own) > 0
		return
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
	if t := p.tunnels[from]; t != nil && p.outerLeadsTo(t, to, seen) {
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

// outerLeadsTo reports the same for what leaves by one of the ways of a tunnel's outer packets.
func (p *planner) outerLeadsTo(t *tunnel, to routes.Ifindex, seen map[routes.Ifindex]bool) bool {
	return p.leadsTo(t.path.Oif, to, seen) ||
		slices.ContainsFunc(p.tableWays(t), func(nh routes.Nexthop) bool { return p.leadsTo(nh.Oif, to, seen) })
}

// union appends the coverages that are not there yet.
func union(a, b []*coverage) []*coverage {
	const few = 16
	a = slices.Clip(a)
	has := func(c *coverage) bool { return slices.Contains(a, c) }
	if len(a)+len(b) > few {
		all := make(map[*coverage]bool, len(a)+len(b))
		for _, c := range a {
			all[c] = true
		}
		has = func(c *coverage) bool {
			there := all[c]
			all[c] = true
			return there
		}
	}
	for _, c := range b {
		if !has(c) {
			a = append(a, c)
		}
	}
	return a
}

// takersOf are the coverages that take the outer packets of one flow of a tunnel, and the
// dedicated tunnel that takes the rest, if there is one. It is false if some are left, and says of
// the tunnel whether some are taken.
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
	// An xfrm interface or vti looks at what a bypass has let pass in the route lookup, also where another policy there decides about all others.
	passed, decided := false, false
	for _, l := range p.lookupsOf(o, below) {
		e := l.entry
		if decided && !l.device {
			continue
		}
		all, some := l.flow.takenBy(e)
		switch {
		case !some:
			continue
		case e.cov == nil && e.blocks():
			// dropped
		case e.cov == nil && below.drops():
			passed = passed || !l.device // and dropped where the device's own lookup lets it pass
		case e.cov == nil:
			partly = "a bypass policy takes a part of its outer packets"
		default:
			took = append(took, e.cov)
			t.maybe = t.maybe || e.cov.maybe
		}
		if partly != "" {
			break
		}
		if all && (l.device || !passed) {
			return took, nil, len(took) > 0
		}
		decided = decided || all
	}
	switch {
	case partly == "" && len(took) > 0 && (below.drops() || p.XFRM.Default().Out == xfrmwatch.Block):
		return took, nil, true // the rest is dropped
	case partly == "" && below.tunnel != nil && len(below.tunnel.covs) > 0:
		return took, below.tunnel, true
	case partly == "":
		partly = "other packets of it are not covered"
	}
	t.partly = t.partly || p.takesSome(o, answered) || p.partly(t.path.Oif) || p.takenByWays(t, o, one)
	for _, c := range took {
		if !t.link.Up { // gre0, tunl0 and their kin are there with their module
			break
		}
		p.note(c, fmt.Sprintf("%s keeps its features: only a part of its outer packets is covered by this policy, and %s", t.link.Name, partly))
	}
	if !one {
		p.noteWays(t, o, answered)
	}
	return nil, nil, false
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
