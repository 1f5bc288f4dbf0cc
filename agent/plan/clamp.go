package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tsoagent/clamp"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// ClampEntry is an interval of destinations to and from which forwarded TCP connections get a
// smaller MSS.
type ClampEntry struct {
	clamp.Entry
	Because []xfrmwatch.CoverageID
}

// MaxClampValues is how many different MSS values there may be: each is a set of its own, in which
// each forwarded SYN is looked up.
const MaxClampValues = 64

// clamping is one run of the planner's clamp: which coverages are served, and by which rules their
// flows find their routes.
type clamping struct {
	*planner
	served map[*routes.Rule]map[*coverage]bool
	bases  []*routes.Rule // in the order in which they were found
	points map[netip.Prefix]bool
}

// clamped is what forwarded flows to one destination get.
type clamped struct {
	dst netip.Prefix
	mss int // 0 for none
	by  []*coverage
}

// clamp works out the MSS for forwarded flows that are covered without their route being locked.
// An MSS is only ever lowered, and moves no packet: where several routes or policies can decide
// about some flows to a destination, the smallest holds for all of them.
func (p *planner) clamp() {
	p.begin(&unit{phase: phasePartial})
	c := &clamping{planner: p, served: map[*routes.Rule]map[*coverage]bool{}, points: map[netip.Prefix]bool{}}
	for _, cov := range p.covers {
		switch {
		case !cov.tunnels():
			// What it costs is the socket's own business; judge says so.
		case cov.sel().Proto != 0 && cov.sel().Proto != protoTCP:
			c.note(cov, fmt.Sprintf("no lock: only TCP has an MSS to clamp, and these flows are protocol %d (partial: clamp)", cov.sel().Proto))
		default:
			c.serve(cov)
		}
	}
	kept := c.decide()
	points := make([]clamp.Point, 0, len(kept))
	lower := fewValues(kept)
	for i := range kept {
		kept[i].mss = lower[kept[i].mss]
		points = append(points, clamp.Point{Prefix: kept[i].dst, MSS: uint16(kept[i].mss)})
	}
	for _, e := range clamp.Flatten(points) {
		p.plan.Clamp = append(p.plan.Clamp, ClampEntry{Entry: e})
	}
	p.blameClamps(kept)
	for _, k := range kept {
		for _, cov := range k.by {
			c.locks(cov, fmt.Sprintf("%s clamp mss %d", k.dst, k.mss))
			c.note(cov, "forwarded TCP to and from these destinations gets the smaller MSS, whatever its source and ports; other packets get no lock (partial: clamp)")
		}
	}
}

const protoTCP = 6

// serve notes where the flows of a coverage find their routes, and the destinations at which what
// they get can differ.
func (c *clamping) serve(cov *coverage) {
	for _, part := range c.parts(cov) {
		base := part.Rule
		if base.Action == routes.RuleGoto && part.Blocked != "" {
			c.note(cov, fmt.Sprintf("rule %d (%s) decides for a part of the flows: no clamp for what it leads elsewhere", base.Priority, part.Blocked))
		}
		if base.Action != routes.RuleToTable || c.Config.OwnTable(base.Table) {
			continue
		}
		own, ok := c.pointsIn(base, cov, part.Flows.Dst)
		if !ok {
			continue
		}
		if fresh := c.fresh(own); len(c.points)+fresh > c.Config.MaxClones {
			c.note(cov, fmt.Sprintf("no clamp: more than %d destinations in all (max_clones)", c.Config.MaxClones))
			continue
		}
		for _, x := range own {
			c.points[x] = true
		}
		if c.served[base] == nil {
			c.served[base] = map[*coverage]bool{}
			c.bases = append(c.bases, base)
		}
		c.served[base][cov] = true
	}
}

func (c *clamping) fresh(points []netip.Prefix) int {
	n := 0
	for _, x := range points {
		if !c.points[x] {
			n++
		}
	}
	return n
}

// pointsIn are the destinations at which the outcome can differ inside that of a coverage: itself,
// and each route and policy inside it.
func (c *clamping) pointsIn(base *routes.Rule, cov *coverage, dst netip.Prefix) ([]netip.Prefix, bool) {
	seen := map[netip.Prefix]bool{}
	var points []netip.Prefix
	add := func(x netip.Prefix) bool {
		if !seen[x] {
			seen[x] = true
			points = append(points, x)
		}
		if len(points) <= c.Config.MaxClonesPerCoverage {
			return true
		}
		c.note(cov, fmt.Sprintf("no clamp: more than %d routes and policies inside %s (max_clones_per_coverage)", c.Config.MaxClonesPerCoverage, dst))
		return false
	}
	for _, seed := range c.clampSeeds(base, cov, dst) {
		if !add(seed) {
			return nil, false
		}
		_, inside := c.FIB.Cover(base.Family, base.Table, seed)
		for m := range inside {
			if !add(m.Dst) {
				return nil, false
			}
		}
		for _, t := range c.byIfID {
			for x := range t.Subnets(seed) {
				if !add(x) {
					return nil, false
				}
			}
		}
	}
	return points, true
}

// clampSeeds are the destinations where a coverage's flows can need a clamp: all of its destination,
// or, for a policy with an if_id, those that routes through its xfrm interfaces leave of it.
func (c *clamping) clampSeeds(base *routes.Rule, cov *coverage, dst netip.Prefix) []netip.Prefix {
	if cov.pol.IfID == 0 {
		return []netip.Prefix{dst}
	}
	var seeds []netip.Prefix
	for _, w := range c.waysOf(cov.pol.IfID) {
		for k := range w.all() {
			if x, ok := routes.Intersect(k.Dst, dst); ok && k.Table == base.Table && !c.locked[k] {
				seeds = append(seeds, x)
			}
		}
	}
	return seeds
}

// decide works out what each destination gets, without those that get what the wider one around
// them gets. Wider ones stand first.
func (c *clamping) decide() []clamped {
	sorted := make([]netip.Prefix, 0, len(c.points))
	for x := range c.points {
		sorted = append(sorted, x)
	}
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), routes.ComparePrefix(a, b))
	})
	var around bart.Table[clamped]
	var kept []clamped
	for _, x := range sorted {
		k, mtu := clamped{dst: x}, 0
		for _, base := range c.bases {
			if routes.FamilyOf(x.Addr()) != base.Family {
				continue
			}
			n, by := c.at(base, x)
			if n != 0 && (mtu == 0 || n < mtu) {
				mtu = n
			}
			for _, cov := range by {
				if !slices.Contains(k.by, cov) {
					k.by = append(k.by, cov)
				}
			}
		}
		if mtu != 0 {
			k.mss = mtu - headers(routes.FamilyOf(x.Addr()))
		}
		if have, _ := around.LookupPrefix(x); have.mss == k.mss && slices.Equal(have.by, k.by) {
			continue
		}
		around.Insert(x, k)
		kept = append(kept, k)
	}
	slices.SortFunc(kept, func(a, b clamped) int { return routes.ComparePrefix(a.dst, b.dst) })
	return kept
}

// headers is what IP and TCP without options take of a segment's MTU, in bytes.
func headers(f routes.Family) int {
	if f == routes.IPv6 {
		return 60
	}
	return 40
}

// at is the smallest inner MTU of covered flows to a destination that a rule leads to their
// routes, and whose they are; 0 for none.
func (c *clamping) at(base *routes.Rule, x netip.Prefix) (mtu int, by []*coverage) {
	if linkLocal(x) {
		return 0, nil
	}
	for _, r := range c.candidatesAt(base, x) {
		if r.Body.Type != routes.Unicast || c.locked[r.Key()] {
			continue
		}
		for _, w := range c.unlike(r.Body) {
			if !w.known {
				c.noteUnclear(base, x)
				continue
			}
			n, more := c.by(base, x, r, w.way)
			if n != 0 && (mtu == 0 || n < mtu) {
				mtu = n
			}
			by = append(by, more...)
		}
	}
	return mtu, by
}

// by is the same for flows that leave by one way of a route.
func (c *clamping) by(base *routes.Rule, x netip.Prefix, r routes.Route, w way) (mtu int, by []*coverage) {
	for _, e := range c.applying(w, x, false) {
		if e.cov != nil && c.served[base][e.cov] {
			n, why := c.mtuAt(e.cov, c.linkMTU(r), r.Body.Family)
			switch {
			case n == 0:
				c.note(e.cov, fmt.Sprintf("%s: %s", x, why))
			case mtu == 0 || n < mtu:
				mtu = n
			}
			if n != 0 {
				by = append(by, e.cov)
			}
		}
		if e.all() && !c.bypassed(w, e, x) {
			break
		}
	}
	return mtu, by
}

// clampWay is what applies to what leaves by a nexthop, if that is known.
type clampWay struct {
	way
	known bool
}

// unlike are the ways of a route that differ in what applies to them.
func (c *clamping) unlike(b *routes.Body) []clampWay {
	var out []clampWay
	for _, nh := range b.Nexthops {
		w, known := c.domain(&routes.Body{Nexthops: []routes.Nexthop{nh}})
		if one := (clampWay{w, known}); !slices.Contains(out, one) {
			out = append(out, one)
		}
	}
	return out
}

// candidatesAt are the routes of a rule's table to a destination that flows can take. Where the
// longest ones are down, or for some sources or TOS values only, flows can take wider ones.
func (c *clamping) candidatesAt(base *routes.Rule, x netip.Prefix) []routes.Route {
	var out []routes.Route
	for {
		m, _ := c.FIB.Cover(base.Family, base.Table, x)
		if m.Paths == nil || int32(m.Dst.Bits()) <= base.SuppressPrefixLen {
			return out
		}
		first, up := m.First()
		if up && !m.SourceSpecific() && !m.TOSSpecific() {
			return append(out, first)
		}
		for _, b := range m.Paths.Bodies() {
			if alive(b) {
				out = append(out, routes.Route{Dst: m.Dst, Body: b})
			}
		}
		if m.Dst.Bits() == 0 {
			return out
		}
		x = netip.PrefixFrom(m.Dst.Addr(), m.Dst.Bits()-1).Masked()
	}
}

func (c *clamping) noteUnclear(base *routes.Rule, x netip.Prefix) {
	for _, cov := range c.covers {
		if c.served[base][cov] && routes.Contains(cov.sel().Dst, x) {
			c.note(cov, fmt.Sprintf("%s: it is not known which policies apply to one way of its route: no clamp for that", x))
		}
	}
}

// fewValues maps each MSS to the one that is written for it. Beyond MaxClampValues neighbours share
// the smallest of them.
func fewValues(list []clamped) map[int]int {
	out := map[int]int{0: 0}
	var values []int
	for _, k := range list {
		if _, seen := out[k.mss]; !seen {
			out[k.mss] = k.mss
			values = append(values, k.mss)
		}
	}
	slices.Sort(values)
	share := (len(values) + MaxClampValues - 1) / MaxClampValues
	for i, v := range values {
		out[v] = values[i-i%share]
	}
	return out
}

func (e *ClampEntry) because(by []*coverage) {
	for _, cov := range by {
		if !slices.Contains(e.Because, cov.id()) {
			e.Because = append(e.Because, cov.id())
		}
	}
}

// blameClamps says for each entry because of which coverages it is there.
func (p *planner) blameClamps(kept []clamped) {
	entries := p.plan.Clamp
	for _, k := range kept {
		if k.mss == 0 {
			continue
		}
		// Entries that overlap the destination and have its MSS. Those with a wider point's MSS, or
		// a narrower one's, are theirs.
		i, _ := slices.BinarySearchFunc(entries, k.dst.Addr(), func(e ClampEntry, a netip.Addr) int { return e.Hi.Compare(a) })
		for ; i < len(entries) && k.dst.Contains(entries[i].Lo) || i < len(entries) && !k.dst.Addr().Less(entries[i].Lo); i++ {
			if e := &entries[i]; int(e.MSS) == k.mss {
				e.because(k.by)
			}
		}
	}
}
