package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tsoagent/routes"
)

// shaped is a shape under construction: the coverages that share its selectors.
type shaped struct {
	id      ShapeID
	base    *routes.Rule
	members []*member
	first   *member
	order   int
	left    bool // by a member, since the plan before
	// why says why there is no room for it, empty if there is. The shapes behind it serve its flows then.
	why string
	// toAll and toServed are what its members hear, all of them or those that it has a clone for.
	toAll, toServed []string

	// What fill works out.
	clones int                   // how many points have one, throws included
	mtus   map[int]int           // how many clones have each MTU, in bytes
	points bart.Table[*point]    // the destinations that were looked at
	kept   bart.Table[*coverage] // that of a clone, nil for a throw
	table  routes.TableID
}

// serves names the shape that serves an entry ahead of a rule.
type serves struct {
	e    *entry
	base *routes.Rule
}

// member is a coverage in a shape, with the part of its destination that the base rule takes.
type member struct {
	cov    *coverage
	shape  *shaped
	base   *routes.Rule // that of its own part: rules of one priority that lead to one table share shapes
	dst    netip.Prefix
	nth    int  // of its coverage's members
	at     int  // where it is among the shape's
	full   bool // there is too much to look at
	unit   unit // which says so
	clones int  // how many are because of it
}

// shape works out the tables of our own: for each shape of selectors, and each rule that
// decides for it, the clones of the routes that its coverages use.
func (p *planner) shape() {
	shapes := p.group()
	for i, s := range shapes {
		s.order = i
	}
	p.shapes = shapes
	// A shape without room leaves its flows to the shapes behind it, which then have to look
	// again.
	for !p.place(p.fillAll(shapes)) {
	}
	p.noteVRFs()
}

// fillAll fills the shapes in their order and returns those that have clones.
func (p *planner) fillAll(shapes []*shaped) []*shaped {
	var filled []*shaped
	total, used := 0, map[routes.Family]int{}
	splits := p.splits()
	for _, s := range shapes {
		p.empty(s)
		if s.why == "" {
			s.why = p.bars(s, splits, used[s.id.Flows.Family])
		}
		if s.why != "" {
			continue
		}
		p.fill(s)
		if total+s.clones > p.Config.MaxClones {
			p.empty(s)
			s.why = fmt.Sprintf("no lock: more than %d clones in all (max_clones)", p.Config.MaxClones)
		}
		if s.clones > 0 {
			total += s.clones
			used[s.id.Flows.Family]++
			filled = append(filled, s)
		}
	}
	return filled
}

// bars says why a shape can't have a table at all, or is empty. used is how many of its family have one.
func (p *planner) bars(s *shaped, splits string, used int) string {
	why, withheld := p.Withheld[s.id]
	switch {
	case withheld:
		return "no lock in a table of our own: " + why
	case splits != "" && s.id.Flows.Family == routes.IPv4:
		return "no lock in a table of our own: " + splits
	case used == MaxRules:
		return tooManyRules
	}
	return ""
}

var tooManyRules = fmt.Sprintf("no lock: more than %d rules", MaxRules)

// empty takes back what was worked out for a shape.
func (p *planner) empty(s *shaped) {
	for _, at := range s.points.All() {
		p.takeBack(&at.unit)
	}
	for _, m := range s.members {
		p.takeBack(&m.unit)
		m.clones = 0
	}
	s.clones, s.mtus, s.table = 0, map[int]int{}, 0
	s.points, s.kept = bart.Table[*point]{}, bart.Table[*coverage]{}
	s.toAll, s.toServed = nil, nil
}

// group sorts the coverages into shapes. A coverage whose flows several rules decide for is in
// several shapes.
func (p *planner) group() []*shaped {
	var shapes []*shaped
	for _, c := range p.covers {
		for i, in := range p.shapesOf(c) {
			s := p.byShape[in.id]
			if s == nil {
				s = &shaped{id: in.id, base: in.base}
				p.byShape[in.id] = s
				shapes = append(shapes, s)
			}
			p.join(s, c, in, i)
		}
	}
	return shapes
}

// placing says in which shape a part of a coverage's flows is: those to a destination.
type placing struct {
	id   ShapeID
	base *routes.Rule
	dst  netip.Prefix
}

// shapesOf are the shapes in which a coverage's flows are.
func (p *planner) shapesOf(c *coverage) []placing {
	p.beginOwn(c, phaseGroups)
	if l := p.vtiOf(c); l != nil {
		// Its own lookups have the mark, and no packet: what it carries is locked on its routes.
		return nil
	}
	if c.inexact != "" {
		p.note(c, "no lock where other flows share a route: "+c.inexact)
		return nil
	}
	var out []placing
	for _, part := range p.parts(c) {
		switch {
		case part.Blocked != "":
			if !p.allLocked(part) {
				p.note(c, fmt.Sprintf("rule %d (%s) decides for a part of the flows: no lock there", part.Rule.Priority, part.Blocked))
			}
		case part.Rule.Action != routes.RuleToTable:
		case p.Config.OwnTable(part.Rule.Table):
			p.note(c, fmt.Sprintf("rule %d is not ours and leads to table %d, which is: no lock there", part.Rule.Priority, part.Rule.Table))
		default:
			id := ShapeID{Flows: part.Flows, Base: part.Rule.Priority, Table: part.Rule.Table}
			id.Flows.Dst = part.Flows.Family.Any()
			out = append(out, placing{id, part.Rule, part.Flows.Dst})
		}
	}
	return out
}

// join makes a coverage a member of a shape. nth tells its shapes apart.
func (p *planner) join(s *shaped, c *coverage, in placing, nth int) {
	if p.follower != nil {
		p.follower.regrouped = true
	}
	m := &member{cov: c, shape: s, base: in.base, dst: in.dst, nth: nth, at: len(s.members), unit: unit{phase: phaseMembers, shape: s, key: routes.Key{Dst: in.dst}}}
	s.members, c.members = append(s.members, m), append(c.members, m)
	p.serving[serves{c.entry, s.base}] = s
	if s.first == nil || m.ahead(s.first) {
		s.first = m
	}
}

// ahead says which of two members comes first in the kernel's order: a shape comes where its first does.
func (m *member) ahead(o *member) bool {
	return cmp.Or(m.cov.entry.rank.compare(o.cov.entry.rank), cmp.Compare(m.nth, o.nth)) < 0
}

// allLocked reports whether all unicast routes that a part of the flows uses are locked in place,
// so that no rule is needed.
func (p *planner) allLocked(part routes.Part) bool {
	some := false
	locked := func(m routes.Match) bool {
		for _, b := range m.Paths.Bodies() {
			if b.Type == routes.Unicast && !p.locked[routes.Route{Dst: m.Dst, Body: b}.Key()] {
				return false
			}
			some = some || b.Type == routes.Unicast
		}
		return true
	}
	all := func(b *routes.Body) bool { return servesFrom(b, netip.Addr{}) }
	if c := part.Containing; !locked(c) || c.Paths != nil && !slices.ContainsFunc(c.Paths.Bodies(), all) {
		return false // what the longest routes are not for goes by wider ones
	}
	n := 0
	for m := range part.Inside {
		if n++; n > p.Config.MaxClonesPerCoverage || !locked(m) {
			return false
		}
	}
	return some
}

// noteVRFs says for each coverage that flows inside of VRFs have no lock in a table of ours: the
// rule for VRFs (l3mdev) stands ahead of all of ours. VRFs without a way to its destination don't
// count, nor do those whose routes there are locked in place.
func (p *planner) noteVRFs() { p.noteVRFsOf(p.covers) }

func (p *planner) noteVRFsOf(covers []*coverage) {
	for _, l := range p.FIB.Links() {
		if l.VRFTable == 0 {
			continue
		}
		for _, c := range covers {
			// An xfrm interface's policies are those of its own routes.
			if c.Policy.IfID != 0 || !c.tunnels {
				continue
			}
			p.beginOwn(c, phaseVRFs)
			m, inside := p.FIB.Cover(c.flows.Family, l.VRFTable, c.Selector.Dst)
			part := routes.Part{Containing: m, Inside: inside}
			if p.leads(part) && !p.allLocked(part) {
				p.note(c, fmt.Sprintf("VRF %s: flows inside of it have no lock in a table of our own", l.Name))
			}
		}
	}
}

// leads reports whether some unicast route is among those of a part.
func (p *planner) leads(part routes.Part) bool {
	unicast := func(m routes.Match) bool {
		return slices.ContainsFunc(m.Paths.Bodies(), func(b *routes.Body) bool { return b.Type == routes.Unicast })
	}
	if unicast(part.Containing) {
		return true
	}
	for m := range part.Inside {
		if unicast(m) {
			return true
		}
	}
	return false
}
