package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// The simulated kernel: slow and obvious, one packet at a time.

// packet is one lookup. An invalid src is a lookup without a source address (an MSS clamp, an
// unbound socket). iif is "lo" for what the host itself sends.
type packet struct {
	family       routes.Family
	src, dst     netip.Addr
	proto        uint8
	sport, dport uint16
	mark         uint32
	uid          uint32
	tos          uint8
	iif, oif     string
	inside       *uint32 // of a tunnel's outer packet: the mark of what is inside
}

func (p packet) String() string {
	return fmt.Sprintf("%s > %s proto %d %d>%d mark %d uid %d tos %d iif %s oif %q",
		p.src, p.dst, p.proto, p.sport, p.dport, p.mark, p.uid, p.tos, p.iif, p.oif)
}

// outcome is what the FIB answers: the rule that decided, and its route. No route with a rule
// is a rule like `blackhole`; no rule at all is "network unreachable".
type outcome struct {
	rule  *routes.Rule
	route routes.Route
}

// sameWay reports whether a packet goes where it went.
func (o outcome) sameWay(n outcome) bool {
	if (o.route.Body == nil) != (n.route.Body == nil) {
		return false
	}
	if o.route.Body == nil {
		return (o.rule == nil) == (n.rule == nil) && (o.rule == nil || *o.rule == *n.rule)
	}
	a, b := o.route.Body, n.route.Body
	return a.Type == b.Type && a.PrefSrc == b.PrefSrc && routes.SameWays(a, b)
}

func (o outcome) String() string {
	switch {
	case o.rule == nil:
		return "no rule decides"
	case o.route.Body == nil:
		return fmt.Sprintf("rule %d: action %d", o.rule.Priority, o.rule.Action)
	}
	return fmt.Sprintf("rule %d: %s type %d %s by %v", o.rule.Priority, o.route.Key(), o.route.Body.Type, routes.MTUMetricOf(o.route.Body), o.route.Body.Nexthops)
}

// lookup walks the rules (fib_rules_lookup, net/core/fib_rules.c).
func (w *world) lookup(p packet) outcome {
	vrf := w.vrfOf(p)
	if l := w.links[p.oif]; l != nil && l.VRFTable != 0 {
		p.oif = "" // l3mdev_update_flow: a VRF directs the lookup, it is no way out
	}
	rules := w.fib.Rules(p.family)
	for i := 0; i < len(rules); i++ {
		r := rules[i]
		if r.L3mdev && vrf == 0 || w.selects(r, p) == r.Invert {
			continue
		}
		switch r.Action {
		case routes.RuleNop:
			continue
		case routes.RuleGoto: // to the first rule with just that priority, nowhere without one
			if to := slices.IndexFunc(rules, func(o *routes.Rule) bool { return o.Priority == r.Goto }); to > i {
				i = to - 1
			}
			continue
		case routes.RuleToTable:
		default:
			return outcome{rule: r}
		}
		table := r.Table
		if r.L3mdev {
			table = vrf
		}
		if got, ok := w.search(p, table); ok && int32(got.Dst.Bits()) > r.SuppressPrefixLen {
			return outcome{r, got}
		}
	}
	return outcome{}
}

// vrfOf is the table of the VRF that the packet is in, 0 for none.
func (w *world) vrfOf(p packet) routes.TableID {
	for _, name := range []string{p.oif, p.iif} {
		l := w.links[name]
		if l == nil {
			continue
		}
		if l.VRFTable != 0 {
			return l.VRFTable
		}
		if m := w.fib.Link(l.Master); m != nil && m.VRFTable != 0 {
			return m.VRFTable
		}
		if name == p.oif {
			return 0
		}
	}
	return 0
}

// selects is fib_rule_match with fib4_rule_match or fib6_rule_match.
func (w *world) selects(r *routes.Rule, p packet) bool {
	in := func(x routes.PortRange, port uint16) bool { return x.Any() || x.Lo <= port && port <= x.Hi }
	src := p.src
	if !src.IsValid() && p.family == routes.IPv4 {
		src = netip.IPv4Unspecified() // IPv6 matches no `from` without a source
	}
	from := !r.Src.IsValid() || r.Src.Bits() == 0 || src.IsValid() && r.Src.Contains(src)
	switch {
	case !from,
		r.Dst.IsValid() && !r.Dst.Contains(p.dst),
		(r.Mark^p.mark)&r.Mask != 0,
		r.IPProto != 0 && r.IPProto != p.proto,
		!in(r.Sport, p.sport), !in(r.Dport, p.dport),
		r.Iif != "" && r.Iif != p.iif,
		r.Oif != "" && r.Oif != p.oif,
		r.TOS != 0 && r.TOS != p.tos,
		r.HasUID && (p.uid < r.UIDLo || p.uid > r.UIDHi):
		return false
	}
	return true
}

// search looks a table up: the longest prefix that has a route that serves, and of its routes
// the first in the kernel's order. A throw is no answer (fib_table_lookup, fib6_node_lookup).
func (w *world) search(p packet, table routes.TableID) (routes.Route, bool) {
	var all []routes.Route
	for r := range w.fib.Table(p.family, table) {
		if r.Dst.Contains(p.dst) {
			all = append(all, r)
		}
	}
	slices.SortStableFunc(all, func(a, b routes.Route) int {
		return cmp.Or(b.Dst.Bits()-a.Dst.Bits(), srcBits(b)-srcBits(a))
	})
	for _, r := range all {
		b := r.Body
		from := !b.Src.IsValid() || p.src.IsValid() && b.Src.Contains(p.src)
		if !from || b.TOS != 0 && b.TOS != p.tos {
			continue
		}
		if b.Type != routes.Unicast {
			if p.family == routes.IPv6 && p.oif != "" && !w.byLoopback(b, p.oif) {
				continue
			}
			return r, b.Type != routes.Throw
		}
		for _, n := range b.Nexthops {
			if n.Flags&routes.NexthopDead == 0 && (p.oif == "" || w.links[p.oif] != nil && w.links[p.oif].Index == n.Oif) {
				return r, true
			}
		}
	}
	return routes.Route{}, false
}

// byLoopback reports whether a route that rejects, or delivers here, is one by the device to which a socket is bound. IPv6 has
// those by lo, so that such a socket passes over them as over any other route by another device (find_match, net/ipv6/route.c;
// seen on 6.18 with throw, unreachable, prohibit and blackhole).
func (w *world) byLoopback(b *routes.Body, oif string) bool {
	if len(b.Nexthops) == 0 {
		return oif == "lo"
	}
	return slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool { return w.links[oif] != nil && w.links[oif].Index == n.Oif })
}

func srcBits(r routes.Route) int {
	if r.Body.Src.IsValid() {
		return r.Body.Src.Bits()
	}
	return 0
}

// fate is what XFRM does with a packet that leaves by one nexthop.
type fate struct {
	kind fateKind
	cov  xfrmwatch.Coverage // of a covered one
	// wrapped says that a tunnel's outer packets are what is covered, not the packet itself; left
	// is the MTU that the tunnel leaves it then, 0 if that isn't known.
	wrapped bool
	left    int
	some    bool // of an uncovered one: by other ways its outer packets are covered
	under   bool // the packet's own policy takes it, and no outer packet of the tunnel leaves uncovered
}

type fateKind int

const (
	uncovered fateKind = iota // no policy with ESP or AH
	covered                   // ESP or AH, or waiting for an SA
	dropped                   // never leaves
	unknown                   // a device that is not understood: it must be left alone
)

// fates are those of all nexthops that a packet can take.
func (w *world) fates(p packet, r routes.Route) []fate {
	if r.Body == nil || r.Body.Type != routes.Unicast {
		return []fate{{kind: dropped}}
	}
	var out []fate
	for _, n := range r.Body.Nexthops {
		out = append(out, w.fateBy(p, n))
	}
	return out
}

// fateBy is that of one nexthop.
func (w *world) fateBy(p packet, n routes.Nexthop) fate {
	if w.strange(n) {
		return fate{kind: unknown}
	}
	return w.fate(p, w.fib.Link(n.Oif), n.IfID)
}

// strange says that a way is not understood.
func (w *world) strange(n routes.Nexthop) bool {
	l := w.fib.Link(n.Oif)
	return l == nil || n.Encap && n.IfID == 0 || l.External && !n.Encap
}

// fate follows xfrm_lookup at the route, and for what that leaves alone the one of the xfrm
// interface (xfrmi_xmit2) or the vti (vti_xmit), which drop what no policy with templates takes.
// Other tunnels look up their outer packets.
func (w *world) fate(p packet, l *routes.Link, ifID uint32) fate {
	f := flowOf(p, l.Index)
	if bound := w.links[p.oif]; bound != nil {
		f.Oif = int32(bound.Index)
	}
	if !f.Src.IsValid() {
		f.Src = p.family.Any().Addr()
	}
	got := w.policyFor(f)
	switch l.Kind {
	case "xfrm":
		if f.IfID = l.IfID | ifID; p.inside != nil {
			f.Mark = *p.inside // that of the packet itself, not the one of the lookup
		}
	case "vti", "vti6":
		f.Mark = l.Encap.Key
	default:
		below := w.wrapped(p, l)
		if whole := w.leaves(l); below.kind == covered && whole.all {
			below.left = whole.left // a tunnel leaves one MTU, whichever of its policies takes a packet
		}
		if got.kind == uncovered || got.kind == covered && !leavesToPeer(got.cov) && below.kind == dropped {
			return below
		}
		got.left, got.under = below.left, below.kind != uncovered
		if leavesToPeer(got.cov) {
			// The packet itself never enters the tunnel, but others do, by the same route.
			got.left = 0
			if whole := w.leaves(l); whole.all {
				got.left = whole.left
			}
		}
		return got
	}
	if got.kind != uncovered {
		return got
	}
	got = w.policyFor(f)
	// Without an SA an interface drops what only optional templates take; they leave what they left last when there is one again.
	if got.kind == uncovered || got.kind == covered && got.cov.Maybe && len(got.cov.Steps) == 0 && w.last[got.cov.ID] == 0 {
		return fate{kind: dropped}
	}
	return got
}

func (w *world) policyFor(f xfrmwatch.Flow) fate {
	if winner, _ := w.db.Lookup(f, xfrmwatch.Out); winner != nil {
		if winner.Action == xfrmwatch.Block {
			return fate{kind: dropped}
		}
		for _, c := range w.coverages(winner) {
			if c.Selector.Match(f) {
				return fate{kind: covered, cov: c}
			}
		}
		return fate{kind: uncovered}
	}
	for _, c := range w.gone { // what lingers is to be treated as if it were still there
		if c.Policy.IfID == f.IfID && c.Policy.Match(f) && c.Selector.Match(f) {
			return fate{kind: covered, cov: c}
		}
	}
	if f.IfID == 0 && w.db.Default().Out == xfrmwatch.Block {
		return fate{kind: dropped}
	}
	return fate{kind: uncovered}
}

// coverages are those of a policy, with the peers of a split whose MTU is remembered.
func (w *world) coverages(p *xfrmwatch.Policy) []xfrmwatch.Coverage {
	covs := w.db.Coverage(p)
	if len(covs) == 0 {
		return nil
	}
	rest := covs[len(covs)-1]
	split := p.Templates[0].TakesFlow() && !p.Selector.Dst.IsSingleIP()
	for id := range w.last {
		if split && id.Policy == p.Index && id.Peer.IsValid() && p.Selector.Dst.Contains(id.Peer) &&
			!slices.ContainsFunc(covs, func(c xfrmwatch.Coverage) bool { return c.ID == id }) {
			c := rest
			c.ID, c.Larval, c.Steps = id, true, nil
			c.Selector.Dst = netip.PrefixFrom(id.Peer, id.Peer.BitLen())
			covs = append([]xfrmwatch.Coverage{c}, covs...)
		}
	}
	return covs
}

// pathMTU is the smallest of the devices' MTU and the metric of a route that we never touched.
func (w *world) pathMTU(r routes.Route) int {
	mtu := 0
	for _, n := range r.Body.Nexthops {
		if l := w.fib.Link(n.Oif); mtu == 0 || l.MTU < mtu {
			mtu = l.MTU
		}
	}
	if own := int(r.Body.Metrics.MTU); own != 0 && own < mtu {
		mtu = own
	}
	return mtu
}

// peerMTU answers for the route to an outer peer as the agent asks the kernel: a lookup of the
// host's own, with the SA's source.
func (w *world) peerMTU(sa *xfrmwatch.SA) (int, bool) {
	p := PeerOf(sa)
	path, o := w.path(p), w.lookup(peerPacket(p))
	if o.route.Body == nil || path.Oif == 0 {
		return path.MTU, path.MTU != 0
	}
	// The kernel answers for one flow; others leave by the other ways.
	least := path.MTU
	for _, hop := range w.outerHops(peerPacket(p)) {
		least = min(least, w.pathMTU(hop.route))
	}
	for _, hop := range w.outerHops(peerPacket(p)) {
		l := w.fib.Link(hop.nexthop.Oif)
		left, ok := w.throughTunnels(l, least)
		switch {
		case hop.nexthop.Encap && w.strange(hop.nexthop):
			return 0, false // what a lightweight tunnel adds isn't known
		case ok:
			left, ok = w.again(espFlowOf(sa), sa, l, hop.nexthop.IfID, left)
		}
		if !ok {
			return 0, false
		}
		least = min(least, left)
	}
	return least, true
}

func peerPacket(p Peer) packet {
	return packet{family: routes.FamilyOf(p.Addr), dst: p.Addr, src: p.Src, mark: p.Mark.Value & p.Mark.Mask, iif: "lo"}
}

// path is the kernel's answer for the route to a peer.
func (w *world) path(p Peer) Path {
	return w.answer(peerPacket(p), w.peers[Peer{Addr: p.Addr, Mark: p.Mark}])
}

// outerPath is the kernel's answer for the route of a tunnel's outer packets.
func (w *world) outerPath(o Outer) Path {
	p := packet{family: o.Family, dst: o.Dst, src: o.Src, mark: o.Mark, iif: "lo"}
	if o.Proto == 17 {
		p.proto, p.sport, p.dport = o.Proto, o.Sport, o.Dport
	}
	return w.answer(p, w.peers[Peer{Addr: o.Dst, Mark: xfrmwatch.Mark{Value: o.Mark, Mask: ^uint32(0)}}])
}

// answer is the kernel's answer for one packet, with the MTU that the world's lines say, or the route's.
func (w *world) answer(p packet, mtu int) Path {
	o := w.lookup(p)
	path := Path{MTU: mtu}
	if o.route.Body == nil || len(o.route.Body.Nexthops) == 0 || w.fib.Link(o.route.Body.Nexthops[0].Oif) == nil {
		return path
	}
	path.Oif, path.Table = o.route.Body.Nexthops[0].Oif, o.route.Body.Table
	if path.MTU == 0 {
		path.MTU = w.fib.Link(path.Oif).MTU // not that of the other ways of several
		if own := int(o.route.Body.Metrics.MTU); own != 0 {
			path.MTU = min(path.MTU, own)
		}
	}
	return path
}

// expected is the MTU that a covered packet's route is to be locked at, 0 for none. A lock for these
// flows alone is not for what a tunnel wraps besides.
func (w *world) expected(f fate, r routes.Route, alone bool) int {
	path := w.pathMTU(r)
	mtu := f.left
	if !f.wrapped {
		shared := path
		if f.left != 0 && !alone {
			shared = min(path, f.left)
		}
		if mtu = w.expectedOf(f.cov, shared); mtu == 0 && f.under && !alone {
			mtu = f.left // what the tunnel leaves is the path of its own ESP packets, too
		}
	}
	least := 68
	if r.Body.Family == routes.IPv6 {
		least = 1280
	}
	if mtu >= path || mtu < least {
		return 0
	}
	return mtu
}

// expectedOf is what a coverage's own flows have left of a path, 0 if that isn't known.
func (w *world) expectedOf(c xfrmwatch.Coverage, path int) int {
	if !slices.ContainsFunc(c.Policy.Templates, func(t xfrmwatch.Template) bool { return !t.TakesFlow() }) {
		return 0 // transport: the ESP packets would meet the lock themselves
	}
	return w.leftOf(c, path)
}

// leftOf is what a coverage leaves of a path, 0 if that isn't known.
func (w *world) leftOf(c xfrmwatch.Coverage, path int) int {
	mtu, status := c.MTU(w.peerMTU, path)
	if status == xfrmwatch.MTUKnown {
		return mtu
	}
	last := w.last[c.ID]
	switch {
	case last != 0:
		return min(last, path)
	case w.cfg.PresumeMTU != 0 && !c.Maybe:
		return min(w.cfg.PresumeMTU, path)
	}
	return 0
}

// input is what Make and Diff get in this world.
func (w *world) input() Input {
	in := Input{
		Config: w.cfg, XFRM: w.db, FIB: w.fib, Features: w.features, Lingering: w.gone,
		Last: w.last, Locks: w.held.Locks, Holds: w.held.Holds, Withheld: w.withheld,
		Forwarding: w.forwarding, Probed: w.probed, Outers: map[routes.Ifindex]Path{},
		Keys: w.keys, Trusted: w.trusted, KeysStale: w.keysStale,
	}
	peers := PathsTo{}
	for _, p := range PeersOf(append(slices.Collect(w.db.Coverages()), w.gone...)...) {
		if path := w.path(p); path.MTU != 0 {
			peers[p] = path
		}
	}
	in.Peers = peers
	for _, o := range OutersOf(w.fib, nil) {
		if path := w.outerPath(o); path.MTU != 0 {
			in.Outers[o.Index] = path
		}
	}
	return in
}
