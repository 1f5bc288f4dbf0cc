package plan

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// lockInPlace finds the routes all of whose flows are covered alike and which can be replaced
// safely.
func (p *planner) lockInPlace() {
	try := func(list []routes.Route) {
		for _, r := range list {
			if k := r.Key(); p.trials[k] == nil {
				p.tryInPlace(p.trial(k), r)
			}
		}
	}
	for _, c := range p.covers {
		p.beginOwn(c, phaseCandidates)
		list := p.candidates(c)
		try(list)
		p.fills(c, list)
	}
	try(p.throughTunnels())
}

// trial is that of a route, a new one if there is none.
func (p *planner) trial(k routes.Key) *trial {
	t := p.trials[k]
	if t == nil {
		t = &trial{unit: unit{phase: phaseTrials}, key: k}
		t.rest = &rest{route: &t.key}
		p.trials[k] = t
	}
	return t
}

// fills notes which routes a coverage without an if_id can fill.
func (p *planner) fills(c *coverage, list []routes.Route) {
	for _, k := range c.fills() {
		p.trial(k).fills--
	}
	if c.aside != nil {
		c.aside.fills = nil
	}
	if c.pol.IfID != 0 {
		return
	}
	for _, r := range list {
		k := r.Key()
		a := c.besides()
		a.fills = append(a.fills, k)
		p.trial(k).fills++
	}
}

// trial is a route that was looked at for a lock in place.
type trial struct {
	unit
	key  routes.Key
	lock *Lock // nil for none
	// fills is how many coverages without an if_id have it among the routes that they can fill.
	fills   int
	indexed bool // in trialsAt
}

// candidates are the routes that a coverage can fill as a whole: for a policy with an if_id
// those through its xfrm interfaces, unless they were tried already, for others those inside its
// destination, if it takes every source and protocol.
func (p *planner) candidates(c *coverage) []routes.Route {
	if c.pol.IfID != 0 {
		var out []routes.Route
		for _, w := range p.waysOf(c.pol.IfID) {
			if w.tried {
				continue // whatever the coverage, its routes are judged as a whole
			}
			w.tried = true
			for k := range w.all() {
				if r, n := p.FIB.Get(k); n > 0 {
					out = append(out, r)
				}
			}
		}
		return out
	}
	if !c.all() {
		return nil
	}
	var out []routes.Route
	for _, part := range p.parts(c) {
		add := func(m routes.Match) {
			for _, b := range m.Paths.Bodies() {
				r := routes.Route{Dst: m.Dst, Body: b}
				if first, _ := p.FIB.Get(r.Key()); first.Body != b {
					continue // what a replace would hit
				}
				if w, ok := p.domain(b); ok && !w.drops() {
					out = append(out, r)
				}
			}
		}
		if part.Containing.Dst == c.sel().Dst {
			add(part.Containing)
		}
		for m := range part.Inside {
			add(m)
			if len(out) > p.Config.MaxClonesPerCoverage {
				p.note(c, fmt.Sprintf("more than %d routes inside %s: no lock (max_clones_per_coverage)", p.Config.MaxClonesPerCoverage, c.sel().Dst))
				return nil
			}
		}
	}
	return out
}

// parts follows the rules for a coverage, without our own rules and the local table.
func (p *planner) parts(c *coverage) []routes.Part { return p.partsIn(nil, c) }

// partsIn is parts, in the memory of a list that is not needed any more.
func (p *planner) partsIn(room []routes.Part, c *coverage) []routes.Part {
	f, inexact := c.flows()
	if inexact != "" { // what is not exact can still be followed by its destination
		f = routes.Flows{Family: f.Family, Src: f.Src, Dst: f.Dst}
	}
	if p.ownRule == nil {
		p.ownRule = p.Config.OwnRule
	}
	parts := p.FIB.AppendResolved(room[:0], f, p.ownRule)
	return slices.DeleteFunc(parts, func(part routes.Part) bool {
		return part.Rule.Action == routes.RuleToTable && part.Rule.Table == routes.TableLocal
	})
}

// carriers are the xfrm interfaces with the coverage's if_id by which a route leads into its
// destination, in order.
func (p *planner) carriers(c *coverage) []*routes.Link {
	var out []*routes.Link
	for _, w := range p.waysOf(c.pol.IfID) {
		if w.byDst.OverlapsPrefix(c.sel().Dst) {
			out = append(out, w.link)
		}
	}
	return out
}

// ways are the routes that leave by one xfrm interface and are not ours, without those of no
// tunnel's flows.
type ways struct {
	link  *routes.Link
	ifID  uint32
	byDst bart.Table[[]routes.Key]
	tried bool // they were tried for a lock in place
}

// all are the keys of the routes.
func (w *ways) all() iter.Seq[routes.Key] {
	return func(yield func(routes.Key) bool) {
		for _, keys := range w.byDst.AllSorted() {
			for _, k := range keys {
				if !yield(k) {
					return
				}
			}
		}
	}
}

// waysOf are the ways of the xfrm interfaces with an if_id, in the order of the interfaces. One
// in external mode has those of its routes that name the if_id (`encap xfrm if_id N`).
func (p *planner) waysOf(ifID uint32) []*ways {
	if p.ways == nil {
		p.ways = map[uint32][]*ways{}
		for _, l := range p.FIB.Links() {
			switch {
			case l.Kind != "xfrm", l.ParentElsewhere:
			default:
				for _, r := range p.routesBy(l) {
					for r := range p.FIB.At(r.Dst) { // several can have one key
						p.addWays(r, l)
					}
				}
			}
		}
	}
	return p.ways[ifID]
}

// addWays makes a route one of the ways through an xfrm interface, if it leads there.
func (p *planner) addWays(r routes.Route, l *routes.Link) {
	k := r.Key()
	if first, _ := p.FIB.Get(k); r.Body.Type != routes.Unicast || p.Config.OwnRoute(first) || linkLocal(r.Dst) {
		return
	}
	for _, ifID := range ifIDsBy(r.Body, l) {
		w := p.wayOf(l, ifID)
		if have, _ := w.byDst.Get(r.Dst); !slices.Contains(have, k) {
			w.byDst.Insert(r.Dst, append(have, k))
		}
		if p.follower != nil {
			p.indexWay(r.Dst, w)
		}
	}
}

// ifIDsBy are the if_ids of the policies for what leaves by a route through an xfrm interface: its own, or
// those that the route names.
func ifIDsBy(b *routes.Body, l *routes.Link) []uint32 {
	var out []uint32
	for _, n := range b.Nexthops {
		id := l.IfID
		if l.External {
			id = n.IfID
		}
		if n.Oif == l.Index && id != 0 && !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out
}

// wayOf are the ways of one xfrm interface and if_id, which are none so far if they are not known.
func (p *planner) wayOf(l *routes.Link, ifID uint32) *ways {
	list := p.ways[ifID]
	i, ok := slices.BinarySearchFunc(list, l.Index, func(w *ways, i routes.Ifindex) int { return cmp.Compare(w.link.Index, i) })
	if !ok {
		list = slices.Insert(list, i, &ways{link: l, ifID: ifID})
		p.ways[ifID] = list
	}
	return list[i]
}

// routesBy are the routes that leave by a device and are not ours, without those of link-local
// and multicast destinations.
func (p *planner) routesBy(l *routes.Link) []routes.Route {
	var out []routes.Route
	keys, _ := p.FIB.DeviceRoutes(l.Index)
	for _, k := range keys {
		if r, n := p.FIB.Get(k); n > 0 && !p.Config.OwnRoute(r) && !linkLocal(k.Dst) {
			out = append(out, r)
		}
	}
	return out
}

// throughTunnels are the routes that leave by a dedicated tunnel or a vti.
func (p *planner) throughTunnels() []routes.Route {
	var out []routes.Route
	for _, l := range p.FIB.Links() {
		if t := p.tunnels[l.Index]; t != nil && len(t.covs) > 0 || l.Kind == "vti" || l.Kind == "vti6" {
			out = append(out, p.routesBy(l)...)
		}
	}
	return out
}

// linkLocal says that a destination is never one of a tunnel's flows: link-local or multicast.
func linkLocal(dst netip.Prefix) bool {
	a := dst.Addr()
	return a.IsLinkLocalUnicast() && dst.Bits() >= 10 || a.IsMulticast()
}

func (p *planner) tryInPlace(t *trial, r routes.Route) {
	p.begin(&t.unit)
	p.giveUp(t)
	if p.locked[r.Key()] {
		return // its devices have the MTU themselves
	}
	mtu, by, ok := p.alike(r)
	if !ok || mtu == 0 {
		return
	}
	if why := p.unsafe(r); why != "" {
		// Others have a clone, or hear why not.
		if w, _ := p.domain(r.Body); w.tunnel != nil {
			for _, c := range w.tunnel.covs {
				p.note(c, fmt.Sprintf("%s: %s: not locked in place", r.Key(), why))
			}
		}
		return
	}
	if why := p.meetsOuter(r); why != "" {
		for _, c := range by {
			p.note(c, fmt.Sprintf("%s: %s: not locked in place", r.Key(), why))
		}
		return
	}
	l := &Lock{Route: r, Owner: p.owner(r), Want: p.metric(mtu)}
	for _, c := range by {
		l.Because = append(l.Because, c.id())
		p.locks(c, fmt.Sprintf("%s mtu %d", r.Key(), mtu))
	}
	p.locked[r.Key()] = true
	t.lock = l
	p.lockCount++
}

// giveUp takes the lock back that a trial found.
func (p *planner) giveUp(t *trial) {
	if t.lock != nil {
		t.lock = nil
		p.lockCount--
	}
}

// alike reports whether all flows that use the route are covered and have the same MTU left,
// and which coverages they belong to. What leaves by an xfrm interface without a policy for
// its if_id is dropped (xfrmi_xmit2, net/xfrm/xfrm_interface_core.c), so it counts for nothing.
func (p *planner) alike(r routes.Route) (mtu int, by []*coverage, ok bool) {
	w, ok := p.domain(r.Body)
	if !ok {
		p.noteUnlike(r)
		return 0, nil, false
	}
	entries := p.applying(w, r.Dst, true)
	path, wraps := p.linkMTU(r), w.tunnel != nil && p.somethingEnters(entries)
	if wraps {
		path = p.pathMTU(r)
	}
	entered := false // by what a policy takes in transport mode
	for _, e := range entries {
		if e.cov == nil {
			if w.drops() || w.tunnel != nil || e.blocks() { // what a tunnel wraps is covered all the same
				continue
			}
			return 0, nil, false
		}
		n, why := p.mtuAt(e.cov, path, r.Body.Family)
		switch {
		case n == 0 && e.cov.larval && w.drops() && p.Last[e.cov.id()] == 0:
			continue // no flow passes before there is an SA
		case n == 0 && w.tunnel != nil && p.leavesToTunnel(e, r):
			entered = entered || !e.cov.tunnels()
			continue
		case n == 0:
			p.note(e.cov, fmt.Sprintf("%s: %s", r.Key(), why))
			p.noteOthers(w.tunnel, r, e.cov, why)
			return 0, nil, false
		case mtu != 0 && n != mtu:
			p.noteOthers(w.tunnel, r, e.cov, fmt.Sprintf("it leaves %d, and others %d", n, mtu))
			return 0, nil, false
		}
		if mtu = n; w.vti == nil || !slices.Contains(by, e.cov) { // a vti's are tried twice (applying)
			by = append(by, e.cov)
		}
		if e.all() && routes.Contains(e.sel().Dst, r.Dst) && !p.bypassed(w, e, r.Dst) {
			if entered {
				break // some of what the tunnel wraps, ahead of it
			}
			return mtu, by, true
		}
	}
	switch {
	case wraps:
		n, covs, why := p.wrapsAt(r)
		if n == 0 {
			for _, c := range covs {
				p.note(c, fmt.Sprintf("%s: %s", r.Key(), why))
			}
		}
		if n != 0 && mtu != 0 && n != mtu {
			p.noteOthers(w.tunnel, r, by[0], fmt.Sprintf("it leaves %d, and the tunnel %d", mtu, n))
			return 0, nil, false
		}
		return n, union(by, covs), n != 0
	case w.drops(), p.XFRM.Default().Out == xfrmwatch.Block:
		return mtu, by, mtu != 0
	}
	return 0, nil, false
}

// somethingEnters reports whether anything can go into a tunnel that some policies, all that apply, decide about:
// what one takes in tunnel mode leaves by the way to its peer, and the default action can drop the rest.
func (p *planner) somethingEnters(applying []*entry) bool {
	return p.XFRM.Default().Out != xfrmwatch.Block ||
		slices.ContainsFunc(applying, func(e *entry) bool { return e.cov == nil && !e.blocks() || e.cov != nil && !e.cov.tunnels() })
}

// noteUnlike tells the coverages of the dedicated tunnels among a route's ways that the others are not
// like them.
func (p *planner) noteUnlike(r routes.Route) {
	for _, nh := range r.Body.Nexthops {
		t := p.tunnels[nh.Oif]
		if t == nil {
			continue
		}
		for _, c := range t.covs {
			p.note(c, fmt.Sprintf("%s: it leads by ways with different policies: not locked in place", r.Key()))
		}
	}
}

// noteOthers tells the coverages of a dedicated tunnel, if there is one, that a policy for some of a
// route's own flows keeps it from being locked in place.
func (p *planner) noteOthers(t *tunnel, r routes.Route, by *coverage, why string) {
	if t == nil {
		return
	}
	for _, c := range t.covs {
		if c != by {
			p.note(c, fmt.Sprintf("%s: policy %d takes some of its flows: %s: not locked in place", r.Key(), by.pol.Index, why))
		}
	}
}

// leavesToTunnel reports whether an entry that asks for no lock on a route through a dedicated
// tunnel leaves the one for the tunnel's own sake as it is: what it takes in transport mode meets
// that lock by right, and what it has room for is not all.
func (p *planner) leavesToTunnel(e *entry, r routes.Route) bool {
	if !e.cov.tunnels() {
		return true
	}
	return (!e.all() || !routes.Contains(e.sel().Dst, r.Dst)) && (e.cov.larval && p.Last[e.cov.id()] == 0 || p.hasRoom(e.cov, r))
}

// unsafe says why a route can't be replaced in place, or is empty. The kernel's replace hits
// the first route with the key and deletes an IPv6 sibling.
func (p *planner) unsafe(r routes.Route) string {
	b := r.Body
	switch {
	case b.Type != routes.Unicast:
		return "it is no unicast route"
	case b.Table == routes.TableLocal:
		return "it is in table local"
	case b.Protocol == routes.ProtoKernel, b.Protocol == routes.ProtoRA, b.Protocol == routes.ProtoRedirect:
		return "the kernel owns it"
	case b.Expires:
		return "it has a lifetime"
	case p.Config.OwnRoute(r):
		return "it is ours"
	case b.NHID != 0:
		// The kernel lets IPv4 routes with one nexthop object share their metrics (fib_find_info_nh,
		// net/ipv4/fib_semantics.c), and routes of both families what it has looked up by them
		// (nhc_pcpu_rth_output, rt6i_pcpu): the lock would spread to others.
		return "it has a nexthop object"
	}
	if _, n := p.FIB.Get(r.Key()); n != 1 {
		return "another route has the same key"
	}
	return ""
}

// meetsOuter says that outer packets use the route too, or is empty. A lock would be taken for
// their path's MTU. Where the kernel says that they leave by another device, they go past it: by
// a mark, as a rule.
func (p *planner) meetsOuter(r routes.Route) string {
	for peer, peers := range p.outer.Subnets(r.Dst) {
		used, ok := p.ownersRouteTo(r.Body.Family, r.Body.Table, peer.Addr(), netip.Addr{})
		if (!ok || routes.Contains(used.Dst, r.Dst)) && p.outerBy(peers, r) {
			return "the outer packets to " + peer.Addr().String() + " use it too"
		}
	}
	return ""
}

// sourceDecides reports whether a rule that is not ours selects packets by this source.
func (p *planner) sourceDecides(f routes.Family, src netip.Addr) bool {
	return slices.ContainsFunc(p.FIB.Rules(f), func(r *routes.Rule) bool {
		return !p.Config.OwnRule(r) && r.Src.IsValid() && r.Src.Bits() > 0 && src.IsValid() && r.Src.Contains(src) != r.Invert
	})
}

// outerBy reports whether outer packets can leave by a route: one of its devices is that of one
// of the peers, or it isn't known where a peer's packets leave. The kernel answers for those without a
// TOS; ESP has that of what is inside (xfrm_get_tos, net/xfrm/xfrm_policy.c).
func (p *planner) outerBy(peers *peerUse, r routes.Route) bool {
	b := r.Body
	uses := func(peer Peer) bool {
		path := p.wayTo(peer).path
		if by, ok := p.ownersRouteTo(b.Family, b.Table, peer.Addr, peer.Src); ok && by.Body.Src.IsValid() || path.Table != b.Table && p.sourceDecides(b.Family, peer.Src) {
			return true // what is asked without the SA's source, as where that is not here yet, goes by others
		}
		return path.Oif == 0 || b.TOS != 0 || slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool { return n.Oif == path.Oif })
	}
	for peer := range peers.each {
		if uses(peer.Peer) {
			return true
		}
	}
	return false
}
