package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// entry is one output policy, or one coverage of it, in the kernel's order of precedence.
type entry struct {
	rank  rank
	index xfrmwatch.PolicyIndex
	sel   xfrmwatch.Selector
	mark  xfrmwatch.Mark
	ifID  uint32
	block bool // action block
	cov   *coverage
}

// rank is a place in the kernel's order of precedence; those that linger come last.
type rank struct {
	gone     bool
	priority uint32
	age      int64 // of those that linger the policy's index
	part     int   // of a policy that is split
	peer     netip.Addr
}

func (r rank) compare(o rank) int {
	if r.gone != o.gone {
		if o.gone {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(r.priority, o.priority), cmp.Compare(r.age, o.age), cmp.Compare(r.part, o.part), r.peer.Compare(o.peer))
}

// collect lists all output policies in the order in which the kernel tries them, those that
// linger last, and indexes them by if_id and destination.
func (p *planner) collect() {
	for pol := range p.XFRM.Policies() {
		for _, e := range p.entriesOf(pol) {
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
func (p *planner) entriesOf(pol *xfrmwatch.Policy) []*entry {
	if pol.Dir != xfrmwatch.Out || pol.Sub {
		return nil
	}
	at := rank{priority: pol.Priority, age: p.XFRM.Age(pol.Index)}
	covs := p.withRemembered(pol, p.XFRM.Coverage(pol))
	if len(covs) == 0 {
		return []*entry{{rank: at, index: pol.Index, sel: pol.Selector, mark: pol.Mark, ifID: pol.IfID, block: pol.Action == xfrmwatch.Block}}
	}
	out := make([]*entry, 0, len(covs))
	for i, c := range covs {
		at.part = i
		out = append(out, p.cover(c, at))
	}
	return out
}

// linger is the entry of a coverage whose policy went away.
func (p *planner) linger(c xfrmwatch.Coverage) *entry {
	return p.cover(c, rank{gone: true, priority: c.Policy.Priority, age: int64(c.ID.Policy), peer: c.ID.Peer})
}

// add makes an entry one of those that are looked at. It returns the addresses at which there are other
// peers now.
func (p *planner) add(e *entry) (peers []netip.Prefix) {
	t := p.byIfID[e.ifID]
	if t == nil {
		t = new(bart.Table[[]*entry])
		p.byIfID[e.ifID] = t
	}
	have, _ := t.Get(e.sel.Dst)
	t.Insert(e.sel.Dst, append(have, e))
	c := e.cov
	if c == nil {
		return nil
	}
	p.counts[e.ifID]++
	if e.ifID == 0 && e.all() {
		p.wide++
	}
	p.covers = append(p.covers, c)
	return p.useOuter(c, 1)
}

// useOuter counts a coverage's peers, when it comes or, where by is -1, goes. It returns the addresses at which
// there are others now.
func (p *planner) useOuter(c *coverage, by int) (changed []netip.Prefix) {
	for _, t := range c.Policy.Templates {
		if t.TakesFlow() || !t.Dst.IsValid() || t.Dst.IsUnspecified() {
			continue
		}
		to := netip.PrefixFrom(t.Dst, t.Dst.BitLen())
		have, _ := p.outer.Get(to)
		n := len(have)
		for _, peer := range peersOf(c.Coverage, t) { // thousands of policies can have one peer
			have = have.use(peer, by)
		}
		if len(have) != n {
			changed = append(changed, to)
		}
		if len(have) > 0 {
			p.outer.Insert(to, have)
		} else {
			p.outer.Delete(to)
		}
	}
	return changed
}

// peerUses are the peers at one address, with how many templates use each.
type peerUses []peerUse

type peerUse struct {
	Peer
	n int
}

// use counts templates that come, or go where by is -1.
func (u peerUses) use(peer Peer, by int) peerUses {
	i := slices.IndexFunc(u, func(have peerUse) bool { return have.Peer == peer })
	if i < 0 {
		return append(u, peerUse{peer, by})
	}
	if u[i].n += by; u[i].n == 0 {
		return slices.Delete(u, i, i+1)
	}
	return u
}

// sortCovers brings the coverages into the kernel's order.
func (p *planner) sortCovers() {
	slices.SortFunc(p.covers, func(a, b *coverage) int { return a.entry.rank.compare(b.entry.rank) })
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

func (p *planner) cover(c xfrmwatch.Coverage, at rank) *entry {
	cov := &coverage{Coverage: c, gone: at.gone}
	cov.flows, cov.inexact = flowsOf(c)
	cov.entry = &entry{rank: at, index: c.ID.Policy, sel: c.Selector, mark: c.Policy.Mark, ifID: c.Policy.IfID, cov: cov}
	cov.tunnels = slices.ContainsFunc(c.Policy.Templates, func(t xfrmwatch.Template) bool { return !t.TakesFlow() })
	return cov.entry
}

// flowsOf turns a selector into what FIB rules can select, or says why it can't.
func flowsOf(c xfrmwatch.Coverage) (routes.Flows, string) {
	s, m := c.Selector, c.Policy.Mark
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
	return e.sel.Src.Bits() == 0 && e.sel.Proto == 0 && e.sel.Sport.Mask == 0 &&
		e.sel.Dport.Mask == 0 && e.sel.Ifindex == 0 && e.mark.Mask == 0 && e.mark.Value == 0
}

// takes reports how much of the flows the entry's selector takes, whatever their destination.
func (e *entry) takes(f routes.Flows) (all, some bool) {
	src, ok := routes.Intersect(e.sel.Src, f.Src)
	if !ok || e.mark.Value&^e.mark.Mask != 0 || (e.mark.Value^f.Mark)&e.mark.Mask&f.Mask != 0 {
		return false, false
	}
	if e.sel.Proto != 0 && f.Proto != 0 && uint8(e.sel.Proto) != f.Proto {
		return false, false
	}
	sAll, sSome := takesPorts(e.sel.Sport, f.Sport)
	dAll, dSome := takesPorts(e.sel.Dport, f.Dport)
	if !sSome || !dSome {
		return false, false
	}
	all = sAll && dAll && src == f.Src && e.sel.Ifindex == 0 &&
		(e.sel.Proto == 0 || uint8(e.sel.Proto) == f.Proto) && e.mark.Mask&^f.Mask == 0
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

// overlapping returns the entries of one if_id whose destination overlaps the prefix, in the
// kernel's order. It looks at those that contain the prefix and, if inside, those within it.
func (p *planner) overlapping(ifID uint32, dst netip.Prefix, inside bool) []*entry {
	t := p.byIfID[ifID]
	if t == nil {
		return nil
	}
	var out []*entry
	for _, es := range t.Supernets(dst) {
		out = append(out, es...)
	}
	if inside {
		for pfx, es := range t.Subnets(dst) {
			if pfx != dst {
				out = append(out, es...)
			}
		}
	}
	slices.SortFunc(out, func(a, b *entry) int { return a.rank.compare(b.rank) })
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
	out = slices.DeleteFunc(out, func(e *entry) bool { return e.cov == nil && !e.block })
	if w.vti != nil {
		// A vti's own lookup has its key as mark, whatever mark the packet has; one with that mark finds those
		// policies in the route lookup.
		rest = slices.DeleteFunc(rest, func(e *entry) bool { return e.mark.Mask == 0 || w.vti.Encap.Key&e.mark.Mask != e.mark.Value })
	}
	return append(out, rest...)
}

// bypassed reports whether a bypass ahead of an entry leaves some of the flows to a destination to the
// own lookup of an xfrm interface or vti, past the entry.
func (p *planner) bypassed(w way, e *entry, dst netip.Prefix) bool {
	return w.drops() && e.ifID == 0 && slices.ContainsFunc(p.overlapping(0, dst, true), func(b *entry) bool {
		return b.cov == nil && !b.block && b.rank.compare(e.rank) < 0
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
func peersOf(c xfrmwatch.Coverage, t xfrmwatch.Template) []Peer {
	for _, st := range c.Steps {
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
