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
		if devices := p.outerDevices(t); len(devices) == 1 {
			o.oifs[1] = devices[0]
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
	m, _ := p.FIB.Cover(t.encap.Family, t.path.Table, netip.PrefixFrom(t.encap.Remote, t.encap.Remote.BitLen()))
	if r, ok := m.First(); ok && len(r.Body.Nexthops) == 1 && len(m.Paths.Bodies()) == 1 {
		return t.path.Src
	}
	return netip.Addr{}
}

func portOf(r routes.PortRange) known { return known{r.Lo, r.Lo == r.Hi && r.Lo != 0} }

// takenBy reports how much of the flow a policy's selector takes (__xfrm4_selector_match,
// net/xfrm/xfrm_policy.c).
func (o outerFlow) takenBy(e *entry) (all, some bool) {
	all = true
	for _, pair := range [][2]netip.Prefix{{e.sel.Src, o.src}, {e.sel.Dst, o.dst}} {
		if _, ok := routes.Intersect(pair[0], pair[1]); !ok {
			return false, false
		}
		all = all && routes.Contains(pair[0], pair[1])
	}
	if e.sel.Proto != 0 && uint8(e.sel.Proto) != o.proto {
		return false, false
	}
	for _, m := range []struct {
		xfrmwatch.PortMatch
		known
	}{{e.sel.Sport, o.sport}, {e.sel.Dport, o.dport}} {
		switch {
		case m.Mask == 0:
		case !m.ok:
			all = false
		case (m.value^m.Port)&m.Mask != 0:
			return false, false
		}
	}
	switch {
	case e.mark.Mask == 0 && e.mark.Value == 0:
	case o.anyMark:
		all = false
	case o.mark&e.mark.Mask != e.mark.Value:
		return false, false
	}
	if i := routes.Ifindex(e.sel.Ifindex); i != 0 && !slices.Contains(o.oifs[:], i) {
		all = false // it may be a VRF's: which the flow is in is not worked out
	}
	return all, true
}

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
	mtu := t.path.MTU
	if t.lower != nil {
		left, why := p.wraps(t.lower)
		if left == 0 {
			return 0, why
		}
		mtu = min(mtu, left)
	}
	for _, c := range t.own {
		left, status := c.MTU(p.peerMTU, t.path.MTU)
		switch {
		case status == xfrmwatch.MTUKnown && c.tunnels:
			p.plan.MTU[c.ID], _ = c.MTU(p.peerMTU, anyRoute)
		case status == xfrmwatch.MTUKnown:
			if have, ok := p.plan.MTU[c.ID]; !ok || left < have {
				p.plan.MTU[c.ID] = left
			}
		case c.last != 0:
			left = min(c.last, t.path.MTU)
			c.verdict.note(fmt.Sprintf("%s; the last valid MTU stays", status))
		case p.Config.PresumeMTU != 0:
			left = min(p.Config.PresumeMTU, t.path.MTU)
			c.verdict.note(fmt.Sprintf("%s; presume_mtu %d", status, p.Config.PresumeMTU))
		default:
			return 0, status.String()
		}
		if c.verdict.MTU == 0 || left < c.verdict.MTU {
			c.verdict.MTU = left
		}
		mtu = min(mtu, left)
	}
	return mtu - t.encap.Header, ""
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
