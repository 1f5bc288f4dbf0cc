package plan

import (
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// largeChange is how many coverages are touched by what does not come each day. A map that had more is not used again: Go's maps never
// shrink, and to go through one takes as long as if it were full.
const largeChange = 64

// follow brings the plan up to a new input by what changed. It is false if it has to be worked out from
// scratch.
func (p *planner) follow(in Input, ch Changes) bool {
	if p.follower == nil {
		return false
	}
	if !p.follower.common.is(in) || in.XFRM != p.XFRM || in.FIB != p.FIB {
		return false
	}
	in.Outers = p.Outers
	p.Input = in
	p.at = nil
	if len(p.touched) > largeChange {
		p.touched = map[*coverage]struct{}{}
	} else {
		clear(p.touched)
	}
	p.rerouted, p.routed = nil, len(ch.Dsts) > 0
	var r region
	dsts, ok := p.followRoutes(&r, ch.Dsts)
	if !ok {
		return false
	}
	ours, ok := p.followOurs(&r, ch.Ours)
	if !ok {
		return false
	}
	if (ch.OurRules || p.foreign == nil) && slices.ContainsFunc(p.shapes, func(s *shaped) bool { return s.why != "" }) {
		return false // what went can leave a table to one without room
	}
	for i, was := range p.indexed {
		if _, is := p.FIB.LeavingBy(i); is != was {
			return false
		}
	}
	if first := p.firstRule(); first != p.follower.firstRule {
		return false
	}
	p.followPolicies(&r, ch)
	if !p.followPeers(&r, ch.Peers, append(dsts, ours...)) {
		return false
	}
	for _, dst := range r.list {
		if p.tunnelDsts.OverlapsPrefix(dst) {
			return false // what becomes of a tunnel's outer packets concerns all that goes through it
		}
	}
	p.followTrials(&r)
	if !p.followShapes(&r) {
		return false
	}
	p.conclude(&r, ch)
	return true
}

// followRoutes marks the routes that changed, and brings the ways through xfrm interfaces up to date. It returns the destinations whose
// peers' ways may be others now, and false if the plan has to be worked out from scratch.
func (p *planner) followRoutes(r *region, dsts []netip.Prefix) (now []netip.Prefix, ok bool) {
	for _, dst := range dsts {
		if p.tunnelDsts.OverlapsPrefix(dst) {
			return nil, false
		}
		if !p.covered(dst) && !p.trialsAt.OverlapsPrefix(dst) && p.plain(dst) {
			// No policy is at, inside or around it, nor a route that is tried: in a full table nearly all are so.
			if p.outer.OverlapsPrefix(dst) {
				now = append(now, dst)
			}
			continue
		}
		p.followWays(dst)
		p.followForeign(dst)
		p.pending.dst(dst)
		if p.postpone(dst) {
			r.routes = append(r.routes, dst)
			continue
		}
		r.addRoutes(dst)
		now = append(now, dst)
	}
	return append(now, p.followLater(r)...), true
}

// plain reports whether the routes to a destination are none that are looked at for their own sake: they neither leave by a device that has
// them be tried for a lock nor stand, or stood, in a table of ours.
func (p *planner) plain(dst netip.Prefix) bool {
	if f := routes.FamilyOf(dst.Addr()); len(p.foreign[f]) > 0 || len(p.waysAt[dst]) > 0 {
		return false
	}
	for r := range p.FIB.At(dst) {
		if p.Config.OwnTable(r.Body.Table) {
			return false
		}
		if p.tunnelled(r.Body) {
			return false
		}
	}
	return true
}

// tunnelled reports whether a route leaves by a device that has it be tried for a lock, or is one itself.
func (p *planner) tunnelled(b *routes.Body) bool {
	for i := range b.Nexthops {
		nh := &b.Nexthops[i]
		if nh.Encap || p.tunnels[nh.Oif] != nil || p.FIB.Link(nh.Oif).Tunnel() {
			return true
		}
	}
	return false
}

// covered reports whether the destination of a policy is at, inside or around a destination.
func (p *planner) covered(dst netip.Prefix) bool {
	for _, t := range p.byIfID {
		if t.OverlapsPrefix(dst) {
			return true
		}
	}
	return false
}

// followOurs takes what changed of ours in our own tables. Plans follow from that only by the ways to peers (followPeers), so
// nothing else is looked at again but whether it is in place; where somebody else leads there, too, it is as in any table. It returns the
// destinations whose peers' ways may be others now, and false if the plan has to be worked out from scratch.
func (p *planner) followOurs(r *region, dsts []netip.Prefix) (now []netip.Prefix, ok bool) {
	for _, dst := range dsts {
		p.pending.dst(dst)
	}
	if len(dsts) == 0 || !p.ledTo() {
		return dsts, true
	}
	now, ok = p.followRoutes(r, dsts)
	return append(now, dsts...), ok
}

// ledTo reports whether a rule or a VRF that is not ours leads to one of our tables.
func (p *planner) ledTo() bool {
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		if slices.ContainsFunc(p.FIB.Rules(f), func(r *routes.Rule) bool { return p.Config.OwnTable(r.Table) && !p.Config.OwnRule(r) }) {
			return true
		}
	}
	return slices.ContainsFunc(p.FIB.Links(), func(l *routes.Link) bool { return p.Config.OwnTable(l.VRFTable) })
}

// followForeign has the tables of ours looked through again if somebody else's route may have come or gone there.
func (p *planner) followForeign(dst netip.Prefix) {
	f := routes.FamilyOf(dst.Addr())
	foreign := len(p.foreign[f]) > 0
	for r := range p.FIB.At(dst) {
		foreign = foreign || p.Config.OwnTable(r.Body.Table) && !p.Config.OwnRoute(r)
	}
	if foreign {
		p.foreign = nil
	}
}

// followWays brings the ways by the routes to one destination up to date.
func (p *planner) followWays(dst netip.Prefix) {
	for _, w := range p.waysAt[dst] {
		w.byDst.Delete(dst)
		p.rerouted = append(p.rerouted, rerouted{w.ifID, dst})
	}
	delete(p.waysAt, dst)
	for route := range p.FIB.At(dst) {
		for _, nh := range route.Body.Nexthops {
			if l := p.FIB.Link(nh.Oif); l != nil && l.Kind == "xfrm" && !l.ParentElsewhere {
				p.addWays(route, l)
			}
		}
	}
	for _, w := range p.waysAt[dst] {
		p.rerouted = append(p.rerouted, rerouted{w.ifID, dst})
	}
}

func (p *planner) indexWay(dst netip.Prefix, w *ways) {
	if p.waysAt == nil {
		p.waysAt = map[netip.Prefix][]*ways{}
	}
	if list := p.waysAt[dst]; !slices.Contains(list, w) {
		p.waysAt[dst] = append(list, w)
	}
}

// followPolicies makes the entries of changed policies anew, and of those that can use an SA that changed.
func (p *planner) followPolicies(r *region, ch Changes) {
	seen := map[xfrmwatch.PolicyIndex]bool{}
	again := func(index xfrmwatch.PolicyIndex) {
		if !seen[index] {
			seen[index] = true
			p.replacePolicy(r, index)
		}
	}
	for _, index := range ch.Policies {
		again(index)
	}
	for _, at := range ch.SAs {
		for _, place := range []xfrmwatch.SAPlace{at, {Reqid: at.Reqid}} {
			for _, index := range slices.Collect(p.bySA.Of(place)) {
				again(index)
			}
		}
	}
	linger := map[xfrmwatch.CoverageID]bool{}
	for _, c := range p.Lingering {
		if _, back := p.XFRM.Policy(c.ID.Policy); back {
			continue
		}
		linger[c.ID] = true
		if p.follower.gone[c.ID] == nil {
			p.insert(r, p.linger(c))
		}
	}
	for id, e := range p.follower.gone {
		if !linger[id] {
			p.drop(r, e)
		}
	}
}

func (p *planner) replacePolicy(r *region, index xfrmwatch.PolicyIndex) {
	for _, e := range p.entriesAt(index) {
		p.drop(r, e)
	}
	pol, ok := p.XFRM.Policy(index)
	if !ok {
		return
	}
	if len(pol.Templates) > 0 && pol.Templates[0].TakesFlow() {
		p.peers = nil // those that are remembered
	}
	for _, e := range p.entriesOf(pol) {
		p.insert(r, e)
	}
}

// insert adds an entry to a plan that there is already.
func (p *planner) insert(r *region, e *entry) {
	if p.firstOf(e) {
		p.markWays(r, e.pol.IfID)
	}
	for _, peer := range p.add(e) {
		r.add(peer)
	}
	p.follower.learn(e)
	r.add(e.sel().Dst)
	if e.cov != nil {
		p.touched[e.cov] = struct{}{}
		i, _ := slices.BinarySearchFunc(p.covers[:len(p.covers)-1], e.cov, compareCovers)
		copy(p.covers[i+1:], p.covers[i:len(p.covers)-1])
		p.covers[i] = e.cov
	}
}

func compareCovers(a, b *coverage) int { return a.entry.compare(&b.entry) }

// firstOf reports whether an entry is of the only coverage with its if_id, when it comes or has gone: then
// the routes by its xfrm interfaces are looked at, or are no more.
func (p *planner) firstOf(e *entry) bool {
	return e.cov != nil && e.pol.IfID != 0 && p.counts[e.pol.IfID] == 0
}

func (p *planner) markWays(r *region, ifID uint32) {
	for _, w := range p.ways[ifID] {
		for dst := range w.byDst.All() {
			r.addRoutes(dst)
		}
	}
}

// drop takes an entry out of the plan.
func (p *planner) drop(r *region, e *entry) {
	t := p.byIfID[e.pol.IfID]
	have, _ := t.Get(e.sel().Dst)
	if have = have.without(e); have != nil {
		t.Insert(e.sel().Dst, have)
	} else if t.Delete(e.sel().Dst); t.Size() == 0 {
		delete(p.byIfID, e.pol.IfID)
	}
	r.add(e.sel().Dst)
	p.follower.unlearn(e)
	c := e.cov
	if c == nil {
		return
	}
	c.dropped = true
	p.touched[c] = struct{}{}
	if p.counts[e.pol.IfID]--; p.counts[e.pol.IfID] == 0 {
		delete(p.counts, e.pol.IfID)
	}
	if e.pol.IfID == 0 && e.all() {
		p.wide--
	}
	if p.firstOf(e) {
		p.markWays(r, e.pol.IfID)
	}
	if i, ok := slices.BinarySearchFunc(p.covers, c, compareCovers); ok {
		p.covers = slices.Delete(p.covers, i, i+1)
	}
	for _, peer := range p.useOuter(c, -1) {
		r.add(peer)
	}
	r.tries = append(r.tries, c.fills()...)
	p.fills(c, nil)
	for m := range c.members.each {
		p.leave(m)
	}
	if c.aside != nil {
		for _, u := range c.aside.mine {
			p.takeBack(u)
		}
	}
}

// leave ends a coverage's being in a shape.
func (p *planner) leave(m *member) {
	s, c := m.shape, m.cov
	p.follower.regrouped, s.left = true, true
	p.notFull(m)
	last := len(s.members) - 1
	s.members[last].at = m.at
	s.members[m.at] = s.members[last]
	s.members[last] = nil
	s.members = s.members[:last]
	at := &c.members
	for *at != m {
		at = &(*at).next
	}
	*at = m.next
	if s.first == m {
		s.first, s.headless = nil, true
	}
}

// followPeers works out the paths to peers anew for which the kernel answers something else, or whose routes
// changed. It is false where one leads into what is covered again.
func (p *planner) followPeers(r *region, peers []Peer, dsts []netip.Prefix) bool {
	seen := map[Peer]bool{}
	for _, peer := range peers {
		seen[peer] = true
	}
	for _, dst := range dsts {
		for _, uses := range p.outer.Subnets(dst) {
			for u := range uses.each {
				seen[u.Peer] = true
			}
		}
	}
	for peer := range seen {
		old := p.wayTo(peer)
		if path, ok := p.Peers.Path(peer); ok {
			p.reach(peer, path)
		} else {
			p.setWay(peer, nil)
		}
		if p.nested(peer) {
			return false
		}
		now := p.wayTo(peer)
		if now == old {
			continue
		}
		r.add(netip.PrefixFrom(peer.Addr, peer.Addr.BitLen()))
		if now.path.MTU == old.path.MTU {
			continue // as no device there does anything to the packets again, it does not matter which it is
		}
		for c := range p.users.Of(peer) {
			r.add(c.sel().Dst)
		}
	}
	return true
}

// coversIn are the coverages whose destinations overlap a region. It is for when the entries themselves are up to
// date: what the region gains afterwards is looked at, and the rest not again.
func (p *planner) coversIn(r *region) []*coverage {
	if r.seen == nil {
		r.seen = map[*coverage]bool{}
	}
	for _, dst := range r.list[r.looked:] {
		for _, t := range p.byIfID {
			overlapping(t, dst, func(_ netip.Prefix, e *entry) {
				for e := range e.each {
					if e.cov != nil && !r.seen[e.cov] {
						r.seen[e.cov] = true
						r.covers = append(r.covers, e.cov)
					}
				}
			})
		}
	}
	r.looked = len(r.list)
	return r.covers
}

// followTrials tries the routes in a region anew for a lock in place. Where one is locked or no more, that
// becomes a part of the region.
func (p *planner) followTrials(r *region) {
	for _, c := range p.coversIn(r) {
		if c.pol.IfID == 0 {
			p.beginOwn(c, phaseCandidates)
			list := p.candidates(c)
			r.tries = append(r.tries, c.fills()...)
			p.fills(c, list)
			r.tries = append(r.tries, c.fills()...)
		}
	}
	for _, dst := range r.routes {
		for route := range p.FIB.At(dst) {
			if k := route.Key(); p.trials[k] == nil && p.byItsDevices(k) {
				p.indexTrial(k, p.trial(k))
			}
		}
	}
	again := map[routes.Key]bool{}
	for _, k := range r.tries {
		if t := p.trials[k]; t != nil && (t.fills == 0 || !t.indexed) {
			p.indexTrial(k, t)
			again[k] = true
		}
	}
	for _, dst := range r.list {
		overlapping(&p.trialsAt, dst, func(_ netip.Prefix, keys []routes.Key) {
			for _, k := range keys {
				again[k] = true
			}
		})
	}
	for k := range again {
		t := p.trials[k]
		was := t.lock != nil
		p.pending.lock(k)
		delete(p.locked, k)
		if route, n := p.FIB.Get(k); n > 0 && (t.fills > 0 || p.byItsDevices(k)) {
			p.tryInPlace(t, route)
		} else {
			p.takeBack(&t.unit)
			p.giveUp(t)
			delete(p.trials, k)
			have, _ := p.trialsAt.Get(k.Dst)
			if have = remove(have, k); len(have) > 0 {
				p.trialsAt.Insert(k.Dst, have)
			} else {
				p.trialsAt.Delete(k.Dst)
			}
		}
		if was != (t.lock != nil) {
			r.add(k.Dst)
		}
	}
}

// byItsDevices reports whether a route is tried because of the devices that it leaves by.
func (p *planner) byItsDevices(k routes.Key) bool {
	route, n := p.FIB.Get(k)
	if n == 0 || p.Config.OwnRoute(route) || linkLocal(k.Dst) {
		return false
	}
	for at := range p.FIB.At(k.Dst) { // several can have one key
		if at.Key() != k || at.Body.Type != routes.Unicast {
			continue
		}
		for _, nh := range at.Body.Nexthops {
			l, t := p.FIB.Link(nh.Oif), p.tunnels[nh.Oif]
			switch {
			case t != nil && len(t.covs) > 0:
				if _, indexed := p.FIB.LeavingBy(nh.Oif); indexed {
					return true
				}
			case l == nil:
			case l.Kind == "vti", l.Kind == "vti6":
				return true
			case l.Kind == "xfrm" && !l.ParentElsewhere:
				if slices.ContainsFunc(ifIDsBy(at.Body, l), func(id uint32) bool { return p.counts[id] > 0 }) {
					return true
				}
			}
		}
	}
	return false
}

func (p *planner) indexTrial(k routes.Key, t *trial) {
	if t.indexed {
		return
	}
	t.indexed = true
	have, _ := p.trialsAt.Get(k.Dst)
	p.trialsAt.Insert(k.Dst, append(have, k))
}

// conclude puts the plan together.
func (p *planner) conclude(r *region, ch Changes) {
	old := p.plan
	p.plan = &Plan{Shapes: old.Shapes, complete: p.complete, counts: p}
	if !p.followCarriers(r, ch) {
		p.plan.Holds, p.plan.Tunnels = p.holds, old.Tunnels
		return
	}
	p.concludeHolds()
}
