package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// explainRoute says which rule and which route decide.
func (a *Agent) explainRoute(e *Explanation, rq routes.Query, ans routes.Answer) {
	bits := -1
	match := rq
	match.FibMatch = true
	if m, err := a.rt.Lookup(match); err == nil && m.Route.Body != nil {
		e.Route, bits = a.routeText(m.Route), m.Route.Dst.Bits()
	}
	if ans.Type != routes.Unicast {
		e.Type = typeText(ans.Type)
	}
	if r := a.ruleFor(rq, ans.Table, bits); r != nil {
		e.Rule = fmt.Sprintf("%d: %s", r.Priority, ruleText(*r))
	}
}

// ruleFor is the rule by which a lookup comes to a route of a table with a prefix of so many bits, -1 for one that isn't known. It is nil if it
// can't be told: a goto leads past what is looked at here, and what a rule of a later kernel selects by is not known.
func (a *Agent) ruleFor(q routes.Query, table routes.TableID, bits int) *routes.Rule {
	iif := "lo" // the kernel's word for what is sent from here (fib_rule_match, net/core/fib_rules.c)
	if l := a.st.fib.Link(q.Iif); l != nil {
		iif = l.Name
	}
	src := q.Src
	if !src.IsValid() {
		src = netip.IPv4Unspecified()
		if q.Family == routes.IPv6 {
			src = netip.IPv6Unspecified()
		}
	}
	in := func(p routes.PortRange, port uint16) bool { return p.Any() || p.Lo <= port && port <= p.Hi }
	for _, r := range a.st.fib.Rules(q.Family) {
		takes := (!r.Src.IsValid() || r.Src.Contains(src)) && (!r.Dst.IsValid() || r.Dst.Contains(q.Dst)) &&
			(r.IPProto == 0 || r.IPProto == q.IPProto) && in(r.Sport, q.Sport) && in(r.Dport, q.Dport) &&
			(q.Mark^r.Mark)&r.Mask == 0 && (r.Iif == "" || r.Iif == iif) && r.Oif == "" && r.TOS == 0 && r.DSCP == 0 &&
			(!r.HasUID || r.UIDLo == 0) && !r.L3mdev && r.TunID == 0
		if takes == r.Invert || r.Unknown || r.Action == routes.RuleGoto && takes {
			if takes && (r.Unknown || r.Action == routes.RuleGoto) {
				return nil
			}
			continue
		}
		if r.Action != routes.RuleToTable || r.Table != table {
			continue
		}
		switch {
		case r.SuppressPrefixLen >= 0 && bits < 0, r.SuppressIfgroup >= 0:
			return nil
		case r.SuppressPrefixLen < 0, bits > int(r.SuppressPrefixLen): // others the rule passes over (fib4_rule_suppress, net/ipv4/fib_rules.c)
			return r
		}
	}
	return nil
}

// routeText is a route in the words of `ip route`, without its table, which is told beside it.
func (a *Agent) routeText(r routes.Route) string {
	s := r.Dst.String()
	if r.Dst.Bits() == 0 {
		s = "default"
	}
	if r.Body.Type != routes.Unicast {
		s = typeText(r.Body.Type) + " " + s
	}
	if r.Body.Src.IsValid() {
		s += " from " + r.Body.Src.String()
	}
	for _, n := range r.Body.Nexthops {
		if len(r.Body.Nexthops) > 1 {
			s += " nexthop"
		}
		if n.Gateway.IsValid() {
			s += " via " + n.Gateway.String()
		}
		s += " dev " + a.deviceName(n.Oif)
	}
	if r.Body.Protocol != 0 {
		s += " proto " + protocolText(r.Body.Protocol)
	}
	if r.Body.Priority != 0 {
		s += fmt.Sprintf(" metric %d", r.Body.Priority)
	}
	return s
}

// typeText is a route's type as iproute2 names it.
func typeText(t routes.Type) string {
	names := map[routes.Type]string{
		routes.Unicast: "unicast", routes.Local: "local", routes.Broadcast: "broadcast", routes.Anycast: "anycast", routes.Multicast: "multicast",
	}
	if n := names[t]; n != "" {
		return n
	}
	return fmt.Sprintf("type %d", t)
}

// protocolText is a route's protocol as iproute2 names it (rt_protos).
func protocolText(p routes.Protocol) string {
	names := map[routes.Protocol]string{
		routes.ProtoRedirect: "redirect", routes.ProtoKernel: "kernel", routes.ProtoBoot: "boot", routes.ProtoStatic: "static",
		routes.ProtoRA: "ra", 11: "zebra", 12: "bird", 16: "dhcp", 186: "bgp", 188: "ospf", 192: "eigrp",
	}
	if n := names[p]; n != "" {
		return n
	}
	return fmt.Sprint(uint8(p))
}

func change(e *Explanation, format string, args ...any) { e.AddChange(fmt.Sprintf(format, args...)) }

// explainRest adds what follows from the rest: the MTU of what IPsec leaves alone, where segments are cut, and what would change that.
func (a *Agent) explainRest(e *Explanation, q Question, oif routes.Ifindex) {
	clear := e.Action == "none" || e.Action == "bypass"
	l := a.st.fib.Link(oif)
	if clear && l != nil && l.Kind == "xfrm" && e.Action == "none" && !l.External {
		clear = false // it drops them
	}
	switch {
	case e.Action == "block", !clear && e.Action != "ipsec":
	case clear:
		e.SetMTU(e.PathMTU(), e.Dst)
		e.Segmentation = a.clearCut(oif, routes.FamilyOf(q.Dst))
	default:
		e.Segmentation = a.coveredCut(e)
	}
	if clear && a.cfg.Plan.OwnTable(routes.TableID(e.Table)) {
		e.AddNote("a lock of ours is in the way of a flow that is not covered: its rule also takes lookups without a source, or by its device")
	}
	if e.Action == "none" && (q.Dst.Is6() || !a.loops(oif)) {
		a.nearMisses(e, q)
	}
	if (e.Action == "bypass" || e.Action == "block") && len(e.Losers) > 0 {
		change(e, "without policy %d, %s would take them", e.Policy, e.Losers[0])
	}
	if c := e.Coverage; c != nil && len(c.Held)+len(c.Locked) > 0 {
		switch {
		case !e.Live:
			e.AddChange("an agent (tsoagent run): what is held and locked here is what one would do")
		case a.cfg.Mode == Observe:
			e.AddChange("mode: enforce: this agent only observes, and nothing here is written")
		}
	}
}

// clearCut says where what IPsec leaves alone is cut.
func (a *Agent) clearCut(oif routes.Ifindex, family routes.Family) string {
	feature := ethtool.TCPSegmentation
	if family == routes.IPv6 {
		feature = ethtool.TCP6Segmentation
	}
	st, known := a.st.features[oif].Get(feature)
	name := a.deviceName(oif)
	switch {
	case !known:
		return ""
	case st.Active:
		return fmt.Sprintf("by %s, which gets super-packets (%s %s)", name, feature, st)
	}
	return fmt.Sprintf("by the kernel ahead of %s (%s %s)", name, feature, st)
}

// coveredCut says where covered flows are cut, and why.
func (a *Agent) coveredCut(e *Explanation) string {
	if e.Coverage == nil {
		return ""
	}
	where := "at the socket, or inside the kernel's ESP: the kernel takes GSO from a covered socket, or cuts there if esp4_offload or esp6_offload was there before the SA"
	switch plan.Cut(e.Coverage.Cut) {
	case plan.CutDevice:
		where = fmt.Sprintf("at the device %s, which nothing but covered flows leave by, and whose TSO is held off", strings.Join(e.Coverage.Carriers, ", "))
	case plan.CutLane:
		where = "at a lane, an ifb of our own that takes covered flows alone"
	case plan.CutNIC:
		where = "at the NIC, whose TSO is held off for everybody (shared_nics: off)"
	case plan.CutSocket, plan.CutNone:
	}
	return where
}

// maxMisses bounds how many policies are named that would take a flow but for something.
const maxMisses = 5

// nearMisses names policies for the destination that would take the flow if it were a little different.
func (a *Agent) nearMisses(e *Explanation, q Question) {
	src, err := netip.ParseAddr(e.From)
	if err != nil {
		return
	}
	n := 0
	for p := range a.st.db.Policies() {
		if covers, _ := p.Covers(); !covers || !p.Selector.Dst.Contains(q.Dst) {
			continue
		}
		var but []string
		s := p.Selector
		if !s.Src.Contains(src) {
			but = append(but, "from "+s.Src.String())
		}
		if s.Proto != 0 && uint8(s.Proto) != q.Proto {
			but = append(but, fmt.Sprintf("of protocol %d", s.Proto))
		}
		if s.Sport.Mask != 0 {
			but = append(but, fmt.Sprintf("from port %d", s.Sport.Port))
		}
		if (s.Dport.Port^q.Port)&s.Dport.Mask != 0 {
			but = append(but, fmt.Sprintf("to port %d", s.Dport.Port))
		}
		if q.Mark&p.Mark.Mask != p.Mark.Value {
			but = append(but, fmt.Sprintf("with mark %#x/%#x", p.Mark.Value, p.Mark.Mask))
		}
		if p.IfID != 0 {
			but = append(but, fmt.Sprintf("by an xfrm interface with if_id %#x", p.IfID))
		}
		if len(but) == 0 {
			continue // its device, or what only the kernel knows
		}
		if n++; n > maxMisses {
			change(e, "more policies to %s select otherwise: see tsoctl plan", q.Dst)
			return
		}
		change(e, "policy %d takes packets %s", p.Index, strings.Join(but, " "))
	}
}

// changeSAs says what the MTU hangs on: the SAs, of which the smallest holds, and the ways to their peers.
func (a *Agent) changeSAs(e *Explanation, c xfrmwatch.Coverage, status xfrmwatch.MTUStatus) {
	switch status {
	case xfrmwatch.MTULarval:
		e.AddChange("a valid SA: until there is one, packets are dropped or wait, and no MTU is known")
	case xfrmwatch.MTUUnknownPath:
		e.AddChange("a route to the peer of the outer packets")
	case xfrmwatch.MTUKnown:
	default:
		return
	}
	paths := plan.PathsOf(a.lastIn)
	route := e.PathMTU()
	if v := a.verdictOf(c.ID); v != nil && v.MTU == int(e.RouteMTU) {
		route = e.DeviceMTU // our lock follows
	}
	for i, step := range c.Steps {
		if len(step.SAs) > 1 && status == xfrmwatch.MTUKnown {
			for _, sa := range step.SAs {
				one := c
				one.Steps = slices.Clone(c.Steps)
				one.Steps[i].SAs = []*xfrmwatch.SA{sa}
				if mtu, known := one.MTU(paths, route); known == xfrmwatch.MTUKnown && mtu != e.MTU {
					change(e, "while %d SAs are valid the smallest MTU holds: with SA %#x alone it would be %d", len(step.SAs), uint32(sa.SPI), mtu)
				}
			}
		}
		if !step.Template.TakesFlow() {
			for _, sa := range step.SAs[:1] {
				if mtu, known := paths(sa); known {
					change(e, "the MTU of the way to the peer %s, which is %d", sa.Dst, mtu)
				}
			}
		}
	}
}

// otherSAs are those that lose to the first.
func otherSAs(list []*xfrmwatch.SA, outer int) []string {
	var out []string
	for _, sa := range list[1:] {
		s := fmt.Sprintf("spi %#x, older", uint32(sa.SPI))
		switch {
		case sa.Dying:
			s = fmt.Sprintf("spi %#x, about to expire", uint32(sa.SPI))
		case sa.AddTime == list[0].AddTime:
			s = fmt.Sprintf("spi %#x, of the same second", uint32(sa.SPI))
		}
		if inner, known := sa.InnerMTU(outer); known {
			s += fmt.Sprintf(", leaves %d", inner)
		}
		out = append(out, s)
	}
	return out
}
