package xfrmwatch

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
)

// CoverageID identifies a coverage while its policy stays. Peer is set only for a transport
// policy that is split by SA destination; the part of such a policy that has no SA has none.
type CoverageID struct {
	Policy PolicyIndex `json:"policy"`
	Peer   netip.Addr  `json:"peer"`
}

// Step is one transformation of a coverage. SAs are the valid SAs that the kernel could pick for
// the template, the one in use first; while there are several (a rekey), each may carry flows.
type Step struct {
	Template Template `json:"template"`
	SAs      []*SA    `json:"sas"`
}

// Coverage is the flows that one output policy with its SAs applies to.
type Coverage struct {
	ID     CoverageID `json:"id"`
	Policy *Policy    `json:"-"`
	// Selector is the policy's. In a split, Dst is narrowed to the peer, and Src to the SAs'
	// source where they all have the same.
	Selector Selector `json:"selector"`
	// Maybe says that all templates are optional.
	Maybe bool `json:"maybe,omitempty"`
	// Steps are in the kernel's order, innermost first. Optional templates without a usable
	// SA are left out.
	Steps []Step `json:"steps,omitempty"`
	// Larval says that a required template has no valid SA.
	Larval bool `json:"larval,omitempty"`
}

// MTUStatus says whether Coverage.MTU has a value, or why not.
type MTUStatus uint8

// What Coverage.MTU can find.
const (
	MTUKnown       MTUStatus = iota // the MTU is the kernel's
	MTULarval                       // a required template has no valid SA yet
	MTUClear                        // no optional template has an SA: the flows go in the clear
	MTUAlgorithm                    // an SA has an algorithm or mode of unknown size
	MTUUnknownPath                  // the route to an outer peer is not known
)

func (s MTUStatus) String() string {
	switch s {
	case MTUKnown:
		return "known"
	case MTULarval:
		return "no valid SA yet"
	case MTUClear:
		return "no SA for an optional template: in the clear"
	case MTUAlgorithm:
		return "an SA's algorithm or mode is unknown"
	case MTUUnknownPath:
		return "no route to an outer peer"
	}
	return "unknown"
}

// Covers says whether a policy can cover flows: output, main, allow, and at least one ESP or AH
// template. Per-socket policies have other directions and never cover. maybe is true if all its
// ESP and AH templates are optional.
func (p *Policy) Covers() (covers, maybe bool) {
	if p.Dir != Out || p.Sub || p.Action != Allow {
		return false, false
	}
	maybe = true
	for _, t := range p.Templates {
		if t.Proto == ESP || t.Proto == AH {
			covers = true
			maybe = maybe && t.Optional
		}
	}
	return covers, covers && maybe
}

// Coverages yields the coverages of all policies, in the kernel's precedence. The DB must not
// change meanwhile.
func (db *DB) Coverages() iter.Seq[Coverage] {
	return func(yield func(Coverage) bool) {
		for p := range db.Policies() {
			for _, c := range db.Coverage(p) {
				if !yield(c) {
					return
				}
			}
		}
	}
}

// Coverage returns the coverages of a policy, nil if it does not cover. There is one, but for a
// policy whose first template is of transport mode and whose selector is wider than one
// destination: the kernel takes the flow's own addresses for such a template
// (xfrm_tmpl_resolve_one, net/xfrm/xfrm_policy.c), so it has one coverage for each SA
// destination, sorted, and a last one without a peer, larval unless the template is optional,
// for the rest of the selector.
func (db *DB) Coverage(p *Policy) []Coverage { return db.AppendCoverage(nil, p) }

// AppendCoverage appends the coverages of a policy to a list.
func (db *DB) AppendCoverage(to []Coverage, p *Policy) []Coverage {
	covers, maybe := p.Covers()
	if !covers {
		return to
	}
	first := p.Templates[0]
	if !first.TakesFlow() || p.Selector.Dst.IsSingleIP() {
		return append(to, db.coverage(p, maybe, netip.Addr{}))
	}
	for _, peer := range db.peers(p) {
		to = append(to, db.coverage(p, maybe, peer))
	}
	return append(to, db.coverage(p, maybe, netip.Addr{}))
}

// TakesFlow says that the template has no addresses of its own: the kernel takes the flow's.
func (t Template) TakesFlow() bool { return t.Mode.takesFlow() }

func (m Mode) takesFlow() bool { return m != Tunnel && m != BEET }

// peers are the destinations inside the policy's selector that some SA of its leading
// transport templates has, sorted.
func (db *DB) peers(p *Policy) []netip.Addr {
	var peers []netip.Addr
	for _, t := range p.Templates {
		if !t.TakesFlow() {
			break
		}
		for peer := range db.cur.sas.peers[t.Reqid] {
			if p.Selector.Dst.Contains(peer) && len(db.candidates(p, t, p.Selector, peer, netip.Addr{})) > 0 {
				peers = append(peers, peer)
			}
		}
	}
	slices.SortFunc(peers, netip.Addr.Compare)
	return slices.Compact(peers)
}

// coverage resolves the templates one after the other as xfrm_tmpl_resolve_one does: the
// addresses that a tunnel template sets hold for the transport templates after it.
func (db *DB) coverage(p *Policy, maybe bool, peer netip.Addr) Coverage {
	c := Coverage{ID: CoverageID{Policy: p.Index, Peer: peer}, Policy: p, Selector: p.Selector, Maybe: maybe}
	remote := peer
	if peer.IsValid() {
		c.Selector.Dst = netip.PrefixFrom(peer, peer.BitLen())
	} else if p.Selector.Dst.IsSingleIP() {
		remote = p.Selector.Dst.Addr()
	}
	local := netip.Addr{} // not known: any source in the selector
	tunnelled := false
	for _, t := range p.Templates {
		if !t.TakesFlow() {
			remote, local, tunnelled = t.Dst, t.Src, true
		}
		var sas []*SA
		if remote.IsValid() {
			sas = db.candidates(p, t, c.Selector, remote, local)
		}
		switch {
		case len(sas) > 0:
			c.Steps = append(c.Steps, Step{Template: t, SAs: sas})
			if peer.IsValid() && !tunnelled {
				c.Selector.Src = narrow(c.Selector.Src, sas)
			}
		case !t.Optional:
			c.Larval = true
		}
	}
	return c
}

// narrow returns the source of the SAs as a prefix if they share one inside src, else src.
func narrow(src netip.Prefix, sas []*SA) netip.Prefix {
	one := sas[0].Src
	for _, sa := range sas {
		if sa.Src != one || one.IsUnspecified() || !src.Contains(one) {
			return src
		}
	}
	return netip.PrefixFrom(one, one.BitLen())
}

// candidates are the valid SAs that the kernel could pick for a template whose outer addresses
// are remote and local, the preferred one first (xfrm_state_find and xfrm_state_look_at,
// net/xfrm/xfrm_state.c). Where local is not valid, each source in the selector's will do; where
// it is unspecified, the kernel takes the route's source, which is not known here, so each does.
// SAs without a source of their own (a wildcard) serve only where no other does.
//
// Two things are left out. Newer kernels can remember with a policy which SAs it used
// (state_cache_list) and would go on with a valid one whatever is younger; 6.12.117 has the code
// but never fills the list, and takes the younger at once (TestKernelRekey). Either way all are
// here. An SA for input that matches is not skipped by the kernel: if it is the preferred one,
// the flow fails (XfrmOutStateDirError).
func (db *DB) candidates(p *Policy, t Template, sel Selector, remote, local netip.Addr) []*SA {
	const (
		flagWildRecv  = 8 // XFRM_STATE_WILDRECV
		offloadPacket = 4 // XFRM_OFFLOAD_PACKET
		dirIn         = 1 // XFRM_SA_DIR_IN
	)
	mark := p.Mark.Value & p.Mark.Mask
	packet := p.OffloadFlag&offloadPacket != 0
	var exact, wild []*SA
	for sa := range db.cur.sas.byDst.Of(dstReqid{remote, t.Reqid}) {
		if sa.Dst != remote || sa.Reqid != t.Reqid || sa.Larval || sa.Proto != t.Proto || sa.Mode != t.Mode || sa.Family != t.Family ||
			sa.IfID != p.IfID || mark&sa.Mark.Mask != sa.Mark.Value ||
			t.SPI != 0 && t.SPI != sa.SPI ||
			sa.Flags&flagWildRecv != 0 || sa.SADir == dirIn ||
			sa.HasSelector && !sa.Selector.Overlaps(sel) {
			continue
		}
		if onDevice := sa.OffloadFlags&offloadPacket != 0; packet != onDevice ||
			packet && sa.OffloadDev != p.OffloadDev {
			continue
		}
		switch {
		case sa.Src.IsUnspecified():
			wild = append(wild, sa)
		case local.IsValid() && (local.IsUnspecified() || local == sa.Src),
			!local.IsValid() && sel.Src.Contains(sa.Src):
			exact = append(exact, sa)
		}
	}
	if len(exact) == 0 || !local.IsValid() && sel.Src != narrow(sel.Src, exact) {
		// A selector with more sources than the SAs have: the others take a wildcard SA.
		exact = append(exact, wild...)
	}
	born := func(sa *SA) int64 { return db.cur.sas.byKey.Map[sa.Key].born }
	slices.SortFunc(exact, func(a, b *SA) int {
		if a.Dying != b.Dying {
			if b.Dying {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(b.AddTime, a.AddTime), cmp.Compare(born(b), born(a)),
			a.Key.compare(b.Key))
	})
	return exact
}

// MTU is the inner MTU that the coverage leaves, in bytes. path gives the MTU of the route that an
// SA's outer packets take, false if that is not known: its destination, source and output mark
// take part in that lookup. route is the MTU of the covered flow's own route: the cap, and the path of templates
// in transport mode.
//
// It goes from the outermost template inward and takes the minimum with each route on the way
// (xfrm_bundle_create and xfrm_init_pmtu, net/xfrm/xfrm_policy.c). Where a step has several SAs,
// the smallest holds. The value is 0 unless the status is MTUKnown.
func (c Coverage) MTU(path func(*SA) (int, bool), route int) (mtu int, why MTUStatus) {
	if c.Larval {
		return 0, MTULarval
	}
	if len(c.Steps) == 0 {
		return 0, MTUClear
	}
	// routes[i] is the route that leads into step i, routes[i+1] the one behind it.
	routes := make([]int, 1, len(c.Steps)+1)
	routes[0] = route
	for i, step := range c.Steps {
		behind := routes[i]
		if !step.Template.TakesFlow() {
			for j, sa := range step.SAs {
				mtu, ok := path(sa)
				if !ok {
					return 0, MTUUnknownPath
				}
				if j == 0 || mtu < behind {
					behind = mtu
				}
			}
		}
		routes = append(routes, behind)
	}
	mtu = routes[len(c.Steps)]
	for i := len(c.Steps) - 1; i >= 0; i-- {
		below := mtu
		mtu = routes[i]
		for _, sa := range c.Steps[i].SAs {
			inner, ok := sa.InnerMTU(below)
			if !ok {
				return 0, MTUAlgorithm
			}
			mtu = min(mtu, inner)
		}
	}
	return mtu, MTUKnown
}
