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

// entry is one output policy, or one coverage of it, in the kernel's order of precedence.
type entry struct {
	pol  *xfrmwatch.Policy
	cov  *coverage // nil if it covers nothing
	next *entry    // with the same destination and if_id
	age  int64     // of those that linger the policy's index
	part int32     // of a policy that is split
	gone bool      // it lingers
	// Of a coverage: as in xfrmwatch.Coverage, and that it is no more.
	maybe, larval, dropped bool
}

// sel is what the entry takes.
func (e *entry) sel() *xfrmwatch.Selector {
	if e.cov != nil {
		return e.cov.sel()
	}
	return &e.pol.Selector
}

// blocks reports whether the entry is of a policy that has action block, and covers nothing.
func (e *entry) blocks() bool { return e.cov == nil && e.pol.Action == xfrmwatch.Block }

// compare says which comes first in the kernel's order of precedence; those that linger come last.
func (e *entry) compare(o *entry) int {
	if e.gone != o.gone {
		if o.gone {
			return -1
		}
		return 1
	}
	if d := cmp.Or(cmp.Compare(e.pol.Priority, o.pol.Priority), cmp.Compare(e.age, o.age), cmp.Compare(e.part, o.part)); d != 0 || !e.gone {
		return d
	}
	return e.cov.id().Peer.Compare(o.cov.id().Peer)
}

// collect lists all output policies in the order in which the kernel tries them, those that
// linger last, and indexes them by if_id and destination.
func (p *planner) collect() {
	p.covers = make([]*coverage, 0, p.XFRM.PolicyCount()+len(p.Lingering))
	for pol := range p.XFRM.Policies() {
		for e := range p.eachEntry(pol) {
			p.add(e)
		}
	}
	for _, c := range p.Lingering {
		if _, back := p.XFRM.Policy(c.ID.Policy); !back {
			p.add(p.linger(c))
		}
	}
	p.sortCovers()
}

// entriesOf are the entries of a policy: one for each of its coverages, one without if it covers nothing.
func (p *planner) entriesOf(pol *xfrmwatch.Policy) []*entry { return slices.Collect(p.eachEntry(pol)) }

// eachEntry yields them. Only one policy's at a time are to be walked.
func (p *planner) eachEntry(pol *xfrmwatch.Policy) iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		if pol.Dir != xfrmwatch.Out || pol.Sub || neighbourDiscovery(pol) {
			return
		}
		at := entry{pol: pol, age: p.XFRM.Age(pol.Index)}
		p.covs = p.XFRM.AppendCoverage(p.covs[:0], pol)
		covs := p.withRemembered(pol, p.covs)
		if len(covs) == 0 {
			alone := at // at itself stays on the stack
			yield(&alone)
			return
		}
		for i := range covs {
			at.part = int32(i)
			if !yield(p.cover(&covs[i], at)) {
				break
			}
		}
		clear(p.covs)
	}
}

// neighbourDiscovery reports whether a policy does nothing but let neighbour discovery pass (RFC 4861), as libreswan's do ahead of all others, for
// all addresses. That takes nothing out of a tunnel: no router forwards it, and it has the room that it needs in any MTU of IPv6.
func neighbourDiscovery(pol *xfrmwatch.Policy) bool {
	const icmpv6, first, last = 58, 133, 137 // router solicitation to redirect; a selector has the type for its source port
	s := &pol.Selector
	return s.Family == xfrmwatch.IPv6 && s.Proto == icmpv6 && s.Sport.Mask == 0xffff && first <= s.Sport.Port && s.Sport.Port <= last &&
		pol.Action == xfrmwatch.Allow && len(pol.Templates) == 0
}

// linger is the entry of a coverage whose policy went away.
func (p *planner) linger(c xfrmwatch.Coverage) *entry {
	return p.cover(&c, entry{pol: c.Policy, gone: true, age: int64(c.ID.Policy)})
}

// add makes an entry one of those that are looked at. It returns the addresses at which there are other
// peers now.
func (p *planner) add(e *entry) (peers []netip.Prefix) {
	t := p.byIfID[e.pol.IfID]
	if t == nil {
		t = new(bart.Table[*entry])
		p.byIfID[e.pol.IfID] = t
	}
	e.next, _ = t.Get(e.sel().Dst)
	t.Insert(e.sel().Dst, e)
	c := e.cov
	if c == nil {
		return nil
	}
	p.counts[e.pol.IfID]++
	if e.pol.IfID == 0 && e.all() {
		p.wide++
	}
	p.covers = append(p.covers, c)
	return p.useOuter(c, 1)
}

// useOuter counts a coverage's peers, when it comes or, where by is -1, goes. It returns the addresses at which
// there are others now.
func (p *planner) useOuter(c *coverage, by int) (changed []netip.Prefix) {
	for _, t := range c.pol.Templates {
		if t.TakesFlow() || !t.Dst.IsValid() || t.Dst.IsUnspecified() {
			continue
		}
		to := netip.PrefixFrom(t.Dst, t.Dst.BitLen())
		have, _ := p.outer.Get(to)
		others := false
		var moved []*peerUse                 // with the way that is known, where it belongs now
		for _, peer := range peersOf(c, t) { // thousands of policies can have one peer
			way, other := p.wayTo(peer), false
			if have, other = have.use(peer, by); other {
				others = true
				delete(p.reached, peer)
			}
			if other && way != noWay {
				moved = append(moved, &peerUse{Peer: peer, way: way})
			}
		}
		if others {
			changed = append(changed, to)
		}
		if have != nil {
			p.outer.Insert(to, have)
		} else {
			p.outer.Delete(to)
		}
		for _, u := range moved {
			p.setWay(u.Peer, u.way)
		}
	}
	return changed
}

// peerUse is a peer, with how many templates use it, and the others at its address.
type peerUse struct {
	Peer
	n    int
	next *peerUse
	way  *wayTo // without us, nil for none
}

// each yields a peer and the others at its address.
func (u *peerUse) each(yield func(*peerUse) bool) {
	for ; u != nil; u = u.next {
		if !yield(u) {
			return
		}
	}
}

// use counts templates that come, or go where by is -1. It returns the first that is left, and whether there are
// others now.
func (u *peerUse) use(peer Peer, by int) (first *peerUse, others bool) {
	first = u
	for at := &first; *at != nil; at = &(*at).next {
		if have := *at; have.Peer == peer {
			if have.n += by; have.n == 0 {
				*at = have.next
			}
			return first, have.n == 0
		}
	}
	return &peerUse{Peer: peer, n: by, next: first}, true
}

// sortCovers brings the coverages into the kernel's order.
func (p *planner) sortCovers() {
	slices.SortFunc(p.covers, func(a, b *coverage) int { return a.entry.compare(&b.entry) })
}

// withRemembered adds the peers of a split transport policy whose SAs are gone: while the
// policy stays, its last valid MTU stays.
func (p *planner) withRemembered(pol *xfrmwatch.Policy, covs []xfrmwatch.Coverage) []xfrmwatch.Coverage {
	if len(covs) == 0 || len(p.Last) == 0 || !pol.Templates[0].TakesFlow() || pol.Selector.Dst.IsSingleIP() {
		return covs
	}
	if p.peers == nil {
		p.peers = map[xfrmwatch.PolicyIndex][]netip.Addr{}
		for id := range p.Last {
			if id.Peer.IsValid() {
				p.peers[id.Policy] = append(p.peers[id.Policy], id.Peer)
			}
		}
	}
	rest := covs[len(covs)-1]
	there := make(map[netip.Addr]bool, len(covs))
	for _, c := range covs {
		there[c.ID.Peer] = true
	}
	var missing []xfrmwatch.Coverage
	for _, peer := range p.peers[pol.Index] {
		if there[peer] || !pol.Selector.Dst.Contains(peer) {
			continue
		}
		id := xfrmwatch.CoverageID{Policy: pol.Index, Peer: peer}
		c := rest
		c.ID, c.Larval, c.Steps = id, true, nil
		c.Selector.Dst = netip.PrefixFrom(id.Peer, id.Peer.BitLen())
		missing = append(missing, c)
	}
	slices.SortFunc(missing, func(a, b xfrmwatch.Coverage) int { return a.ID.Peer.Compare(b.ID.Peer) })
	return append(missing, covs...)
}

// cover is the entry of a coverage, at a place in the kernel's order.
func (p *planner) cover(c *xfrmwatch.Coverage, at entry) *entry {
	at.maybe, at.larval = c.Maybe, c.Larval
	cov := &coverage{entry: at, steps: c.Steps}
	cov.cov = cov
	if c.ID.Peer.IsValid() {
		cov.split = &split{peer: c.ID.Peer, sel: c.Selector}
	}
	return &cov.entry
}

// flows turns a coverage's selector into what FIB rules can select, or says why it can't.
func (c *coverage) flows() (routes.Flows, string) {
	s, m := c.sel(), c.pol.Mark
	f := routes.Flows{
		Family: routes.Family(s.Family), Src: s.Src, Dst: s.Dst, Proto: uint8(s.Proto),
		Mark: m.Value & m.Mask, Mask: m.Mask,
	}
	why := ""
	port := func(name string, m xfrmwatch.PortMatch) routes.PortRange {
		switch {
		case m.Mask == 0:
			return routes.PortRange{}
		case m.Mask != 0xffff:
			why = fmt.Sprintf("the selector's %s has a bit mask, which a FIB rule can't have", name)
		case m.Port == 0 || m.Port == 0xffff:
			// FRA_SPORT_RANGE: 0 is no port, and a range may not end at 65535.
			why = fmt.Sprintf("a FIB rule can't select %s %d", name, m.Port)
		case s.Proto != 6 && s.Proto != 17 && s.Proto != 132 && s.Proto != 136:
			why = fmt.Sprintf("the selector's %s is no port for protocol %d", name, s.Proto)
		}
		return routes.PortRange{Lo: m.Port, Hi: m.Port}
	}
	f.Sport, f.Dport = port("sport", s.Sport), port("dport", s.Dport)
	switch {
	case s.Ifindex != 0:
		why = "the selector has a device, which only the device's own flows match"
	case m.Value&^m.Mask != 0:
		why = "the policy's mark has bits outside its mask: it matches nothing"
	}
	return f, why
}

// all reports whether the entry takes every flow to its destination.
func (e *entry) all() bool {
	return e.sel().Src.Bits() == 0 && e.sel().Proto == 0 && e.sel().Sport.Mask == 0 &&
		e.sel().Dport.Mask == 0 && e.sel().Ifindex == 0 && e.pol.Mark.Mask == 0 && e.pol.Mark.Value == 0
}

// takes reports how much of the flows the entry's selector takes, whatever their destination.
func (e *entry) takes(f routes.Flows) (all, some bool) {
	src, ok := routes.Intersect(e.sel().Src, f.Src)
	if !ok || e.pol.Mark.Value&^e.pol.Mark.Mask != 0 || (e.pol.Mark.Value^f.Mark)&e.pol.Mark.Mask&f.Mask != 0 {
		return false, false
	}
	if e.sel().Proto != 0 && f.Proto != 0 && uint8(e.sel().Proto) != f.Proto {
		return false, false
	}
	sAll, sSome := takesPorts(e.sel().Sport, f.Sport)
	dAll, dSome := takesPorts(e.sel().Dport, f.Dport)
	if !sSome || !dSome {
		return false, false
	}
	all = sAll && dAll && src == f.Src && e.sel().Ifindex == 0 &&
		(e.sel().Proto == 0 || uint8(e.sel().Proto) == f.Proto) && e.pol.Mark.Mask&^f.Mask == 0
	return all, true
}

func takesPorts(m xfrmwatch.PortMatch, r routes.PortRange) (all, some bool) {
	switch {
	case m.Mask == 0:
		return true, true
	case r.Any():
		return false, true
	case m.Mask != 0xffff:
		return false, true
	}
	some = r.Lo <= m.Port && m.Port <= r.Hi
	return some && r.Lo == r.Hi, some
}

// each yields an entry and those behind it with its destination and if_id.
func (e *entry) each(yield func(*entry) bool) {
	for ; e != nil; e = e.next {
		if !yield(e) {
			return
		}
	}
}

// anyTakes reports whether an entry or one behind it takes some of the flows, whatever their destination.
func (e *entry) anyTakes(f routes.Flows) bool {
	for e := range e.each {
		if _, some := e.takes(f); some {
			return true
		}
	}
	return false
}

func (e *entry) appendAll(out []*entry) []*entry {
	return slices.AppendSeq(out, e.each)
}

// without is the first of an entry and those behind it when one of them is taken out, nil if none is left.
func (e *entry) without(o *entry) *entry {
	if e == o {
		return o.next
	}
	for at := e; at != nil; at = at.next {
		if at.next == o {
			at.next = o.next
			break
		}
	}
	return e
}

// overlapping returns the entries of one if_id whose destination overlaps the prefix, in the
// kernel's order. It looks at those that contain the prefix and, if inside, those within it.
func (p *planner) overlapping(ifID uint32, dst netip.Prefix, inside bool) []*entry {
	t := p.byIfID[ifID]
	if t == nil {
		return nil
	}
	var out []*entry
	for _, e := range t.Supernets(dst) {
		out = e.appendAll(out)
	}
	if inside {
		for pfx, e := range t.Subnets(dst) {
			if pfx != dst {
				out = e.appendAll(out)
			}
		}
	}
	slices.SortFunc(out, (*entry).compare)
	return out
}

// applying returns the entries that apply to what leaves by a route of a domain, in the
// kernel's order. The route lookup itself applies the policies without an if_id, whatever the
// device (ip_route_output_flow calls xfrm_lookup_route, net/ipv4/route.c); an xfrm interface or
// a vti gets what they leave alone.
func (p *planner) applying(w way, dst netip.Prefix, inside bool) []*entry {
	out := p.overlapping(0, dst, inside)
	if w.ifID == 0 && w.vti == nil {
		return out
	}
	rest := p.overlapping(w.ifID, dst, inside)
	out = slices.DeleteFunc(out, func(e *entry) bool { return e.cov == nil && !e.blocks() })
	if w.vti != nil {
		// A vti's own lookup has its key as mark, whatever mark the packet has; one with that mark finds those
		// policies in the route lookup.
		rest = slices.DeleteFunc(rest, func(e *entry) bool {
			return e.pol.Mark.Mask == 0 || w.vti.Encap.Key&e.pol.Mark.Mask != e.pol.Mark.Value
		})
	}
	return append(out, rest...)
}

// bypassed reports whether a bypass ahead of an entry leaves some of the flows to a destination to the
// own lookup of an xfrm interface or vti, past the entry.
func (p *planner) bypassed(w way, e *entry, dst netip.Prefix) bool {
	return w.drops() && e.pol.IfID == 0 && slices.ContainsFunc(p.overlapping(0, dst, true), func(b *entry) bool {
		return b.cov == nil && !b.blocks() && b.compare(e) < 0
	})
}

// PeersOf lists the outer peers whose route MTU a plan needs for coverages, in order and without repetition.
func PeersOf(covs ...xfrmwatch.Coverage) []Peer {
	var peers []Peer
	for i := range covs {
		c := &covs[i]
		for _, st := range c.Steps {
			if st.Template.Mode == xfrmwatch.Transport {
				continue
			}
			for _, sa := range st.SAs {
				peers = append(peers, PeerOf(sa))
			}
		}
		if peer, ok := policyPeer(c.Policy); ok && len(c.Steps) == 0 {
			peers = append(peers, peer)
		}
	}
	if len(peers) > 1 {
		slices.SortFunc(peers, func(a, b Peer) int {
			return cmp.Or(a.Addr.Compare(b.Addr), a.Src.Compare(b.Src), cmp.Compare(a.Mark.Value, b.Mark.Value), cmp.Compare(a.Mark.Mask, b.Mark.Mask))
		})
	}
	return slices.Compact(peers)
}

// peersOf are the peers of a template of a coverage: those of its SAs, or its own address.
func peersOf(c *coverage, t xfrmwatch.Template) []Peer {
	for _, st := range c.steps {
		if st.Template != t {
			continue
		}
		var out []Peer
		for _, sa := range st.SAs {
			if peer := PeerOf(sa); !slices.Contains(out, peer) {
				out = append(out, peer)
			}
		}
		return out
	}
	return []Peer{{Addr: t.Dst, Src: t.Src}}
}

// policyPeer is the peer of a policy's outermost template, while there is no SA. It is false for
// one that takes the flow's own addresses.
func policyPeer(pol *xfrmwatch.Policy) (Peer, bool) {
	t := pol.Templates[len(pol.Templates)-1]
	if t.TakesFlow() || !t.Dst.IsValid() || t.Dst.IsUnspecified() {
		return Peer{}, false
	}
	return Peer{Addr: t.Dst, Src: t.Src}, true
}
