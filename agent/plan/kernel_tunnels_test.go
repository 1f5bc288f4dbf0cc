package plan

import (
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// What the simulated kernel does with packets that tunnels wrap.

// wrapped is what becomes of a packet once a tunnel, or what it sends by, has wrapped it: the worst of
// all outer packets that it can be in, those that are dropped aside.
func (w *world) wrapped(p packet, l *routes.Link) fate {
	if w.depth++; w.depth > 8 {
		w.depth--
		return fate{kind: dropped} // a tunnel through itself (dev_xmit_recursion)
	}
	defer func() { w.depth-- }()
	switch {
	case l.Kind == "vlan" || l.Kind == "macvlan":
		ft := w.wrapped(p, w.fib.Link(l.Parent))
		if l.Kind == "vlan" && ft.left != 0 {
			ft.left -= 4
		}
		return ft
	case l.Kind == "bond":
		worst := fate{kind: uncovered}
		bare, some := false, false
		for _, port := range w.fib.Links() {
			if port.Master != l.Index {
				continue
			}
			ft := w.wrapped(p, port)
			bare, some = bare || ft.kind == uncovered, some || ft.some || ft.kind == covered
			if worst.kind == uncovered || ft.left < worst.left {
				worst = ft
			}
		}
		if bare {
			return fate{kind: uncovered, some: some}
		}
		return worst
	case l.Encap == routes.Encap{}, w.into(l, l, 0):
		return fate{kind: uncovered} // the planner leaves tunnels into themselves alone
	}
	worst := fate{kind: dropped}
	bare, some := false, false
	for _, o := range w.outerPackets(p, l) {
		for _, hop := range w.outerHops(o) {
			nh := hop.nexthop
			ft := w.fateBy(o, nh)
			if ft.kind == dropped {
				continue
			}
			by := w.fib.Link(nh.Oif)
			strange := ft.kind == unknown
			if strange { // the policy lookup precedes whatever a lightweight tunnel does
				ft = w.policyFor(flowOf(o, nh.Oif))
			}
			past := ft.kind == covered && leavesToPeer(ft.cov)
			switch {
			case ft.kind == dropped:
				continue
			case strange && !nh.Encap && !past:
				continue // an xfrm interface in external mode takes nothing without an if_id (xfrmi_xmit2)
			case ft.kind == uncovered:
				bare, some = true, some || ft.some
				continue
			}
			some = true
			path := by.MTU
			if own := int(hop.route.Body.Metrics.MTU); own != 0 {
				path = min(path, own)
			}
			left := min(ft.left, path)
			if !ft.wrapped {
				path, _ = w.throughTunnels(by, path)
				if first := w.policyFor(flowOf(o, nh.Oif)); path != 0 && first.kind == covered && !past {
					path, _ = w.againInTransport(o, ft.cov, by, nh.IfID, path)
				}
				left = w.leftOf(ft.cov, path)
			}
			if strange && nh.Encap || path == 0 {
				left = 0 // what is added isn't known
			}
			if left > 0 {
				left -= l.Encap.Header
			}
			if worst.kind == dropped || left < worst.left {
				worst = fate{kind: covered, cov: ft.cov, wrapped: true, left: left}
			}
		}
	}
	if bare {
		return fate{kind: uncovered, some: some}
	}
	return worst
}

// outerHop is one way that an outer packet can take.
type outerHop struct {
	route   routes.Route
	nexthop routes.Nexthop
}

// outerHops are those of the packet's route, and of IPv6 routes that are tied with it: which of them the
// kernel takes is not modelled.
func (w *world) outerHops(p packet) []outerHop {
	at := w.lookup(p).route
	if at.Body == nil {
		return nil
	}
	var out []outerHop
	for r := range w.fib.Table(p.family, at.Body.Table) {
		if r.Dst != at.Dst || r.Body != at.Body && (p.family == routes.IPv4 || r.Body.Priority != at.Body.Priority || r.Body.Src != at.Body.Src || r.Body.TOS != at.Body.TOS) {
			continue
		}
		if r.Body.Type != routes.Unicast {
			continue
		}
		for _, nh := range r.Body.Nexthops {
			out = append(out, outerHop{r, nh})
		}
	}
	return out
}

// left is what tunnels do to whatever leaves by a device: all of it is covered once it is wrapped, or
// some; and the least MTU that they leave, 0 if it isn't known.
type left struct {
	all, some      bool
	left           int
	looking, loops bool // while it is worked out, and whether it was asked for then
}

// leaves tries every mark.
func (w *world) leaves(l *routes.Link) left {
	if got, ok := w.left[l.Index]; ok {
		got.loops = got.looking
		w.left[l.Index] = got
		return got
	}
	w.left[l.Index] = left{some: true, looking: true}
	got := left{all: true}
	switch l.Kind {
	case "xfrm", "vti", "vti6":
		got.all = false
	default:
		for mark := range uint32(4) {
			switch ft := w.wrapped(packet{mark: mark}, l); ft.kind {
			case uncovered:
				got.all, got.some = false, got.some || ft.some
			case covered:
				if !got.some || ft.left < got.left {
					got.left = ft.left
				}
				got.some = true
			}
		}
	}
	got.all = got.all && got.some
	if w.left[l.Index].loops { // a tunnel through itself
		got.left = 0
	}
	w.left[l.Index] = got
	return got
}

// throughTunnels is what is left of a path whose packets leave by a device, 0 and false if that isn't known.
func (w *world) throughTunnels(l *routes.Link, path int) (int, bool) {
	switch got := w.leaves(l); {
	case !got.some:
		return path, path != 0
	case !got.all || got.left == 0:
		return 0, false
	default:
		return min(path, got.left), path != 0
	}
}

// leavesToPeer says that what a coverage takes leaves by the way to its peer (tunnel mode), not by the
// device of its own route.
func leavesToPeer(c xfrmwatch.Coverage) bool {
	return c.Policy != nil && slices.ContainsFunc(c.Policy.Templates, func(t xfrmwatch.Template) bool { return !t.TakesFlow() })
}

// into reports whether what leaves by a device is routed into a tunnel again.
func (w *world) into(l, tunnel *routes.Link, depth int) bool {
	switch {
	case l == nil || depth > 8:
		return false
	case depth > 0 && l == tunnel:
		return true
	case l.Kind == "vlan" || l.Kind == "macvlan":
		return w.into(w.fib.Link(l.Parent), tunnel, depth+1)
	case l.Kind == "bond":
		return slices.ContainsFunc(w.fib.Links(), func(port *routes.Link) bool {
			return port.Master == l.Index && w.into(port, tunnel, depth+1)
		})
	case !l.Encap.Remote.IsValid():
		return false
	}
	return slices.ContainsFunc(w.outerHops(w.outerPacket(packet{}, l, 1)), func(hop outerHop) bool {
		return w.into(w.fib.Link(hop.nexthop.Oif), tunnel, depth+1)
	})
}

// outerPackets are those that a tunnel may send for one packet: which source its route chooses, and which
// port a hash gives, is not modelled.
func (w *world) outerPackets(p packet, l *routes.Link) []packet {
	var out []packet
	for _, sport := range []uint16{1, 5, 40000} { // 5 is that of some policies
		o := w.outerPacket(p, l, sport)
		if out = append(out, o); l.Encap.Local.IsValid() {
			continue
		}
		if o.src = netip.AddrFrom4([4]byte{192, 168, 1, 1}); l.Encap.Family == routes.IPv6 {
			o.src = netip.MustParseAddr("fd00:9::1")
		}
		out = append(out, o)
	}
	return out
}

// outerPacket is one of them.
func (w *world) outerPacket(p packet, l *routes.Link, sport uint16) packet {
	e := l.Encap
	o := packet{family: e.Family, src: e.Local, dst: e.Remote, proto: e.Proto, mark: e.Mark, iif: "lo"}
	if !o.src.IsValid() {
		o.src = e.Family.Any().Addr()
	}
	switch e.Proto {
	case 17:
		o.sport, o.dport = sport, e.Dport.Lo
	case 47:
		o.sport, o.dport = uint16(e.Key>>16), uint16(e.Key)
	}
	if o.inside = &p.mark; p.inside != nil {
		o.inside = p.inside
	}
	if e.AnyMark {
		o.mark = *o.inside
	}
	return o
}

// flowOf is the flow of a packet that a policy lookup sees at its route. IPv4 has the route's device in it
// by then (ip_route_output_flow), IPv6 that of a socket which is bound to one.
func flowOf(p packet, oif routes.Ifindex) xfrmwatch.Flow {
	if p.family == routes.IPv6 {
		oif = 0
	}
	return xfrmwatch.Flow{
		Src: p.src, Dst: p.dst, Proto: xfrmwatch.Proto(p.proto), Sport: p.sport, Dport: p.dport, Mark: p.mark, Oif: int32(oif),
	}
}

// again is what an xfrm interface or a vti leaves of a path to packets that are IPsec already, whatever
// their mark; the path itself by other devices, and where none passes. It is 0 and false if that isn't
// known.
func (w *world) again(esp xfrmwatch.Flow, sa *xfrmwatch.SA, l *routes.Link, ifID uint32, path int) (int, bool) {
	switch l.Kind {
	case "xfrm":
		if esp.IfID = l.IfID | ifID; esp.IfID == 0 {
			return 0, false
		}
	case "vti", "vti6":
	default:
		return path, path != 0
	}
	least := path
	for mark := range uint32(4) {
		if esp.Mark = mark; esp.IfID == 0 {
			esp.Mark = l.Encap.Key
		}
		got := w.policyFor(esp)
		own := slices.ContainsFunc(got.cov.Steps, func(st xfrmwatch.Step) bool { return slices.Contains(st.SAs, sa) })
		if got.kind != covered || own {
			continue
		}
		left := w.leftAgain(got.cov, path)
		if left <= 0 {
			return 0, false
		}
		least = min(least, left)
	}
	return least, least != 0
}

// leftAgain is what a coverage leaves of the path of packets that are IPsec already, 0 if they come to
// it again.
func (w *world) leftAgain(c xfrmwatch.Coverage, path int) int {
	if w.circles[c.ID] = w.circles[c.ID] || w.nested[c.ID]; w.circles[c.ID] {
		return 0
	}
	w.nested[c.ID] = true
	defer delete(w.nested, c.ID)
	if left := w.leftOf(c, path); !w.circles[c.ID] {
		return left
	}
	return 0
}

// againInTransport is the same for a tunnel's outer packet that a coverage has taken in transport mode.
func (w *world) againInTransport(o packet, c xfrmwatch.Coverage, l *routes.Link, ifID uint32, path int) (int, bool) {
	esp := xfrmwatch.Flow{Src: o.src, Dst: o.dst, Proto: c.Policy.Templates[len(c.Policy.Templates)-1].Proto}
	if len(c.Steps) == 0 {
		return w.again(esp, nil, l, ifID, path)
	}
	least := path
	for _, sa := range c.Steps[len(c.Steps)-1].SAs {
		if at := espFlowOf(sa); at.Proto == 17 {
			esp.Proto, esp.Sport, esp.Dport = at.Proto, at.Sport, at.Dport
		} else {
			esp.Proto, esp.Sport, esp.Dport = at.Proto, 0, 0
		}
		left, ok := w.again(esp, sa, l, ifID, path)
		if !ok {
			return 0, false
		}
		least = min(least, left)
	}
	return least, true
}

// espFlowOf is the flow of an SA's packets.
func espFlowOf(sa *xfrmwatch.SA) xfrmwatch.Flow {
	f := xfrmwatch.Flow{Src: sa.Src, Dst: sa.Dst, Proto: sa.Proto}
	if sa.Encap.Type != 0 {
		f.Proto, f.Sport, f.Dport = 17, sa.Encap.Sport, sa.Encap.Dport
	}
	return f
}
