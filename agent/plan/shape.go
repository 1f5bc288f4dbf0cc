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
	id       ShapeID
	base     *routes.Rule
	members  []*member
	first    *member
	headless bool // the first member has left, and the next one is not looked for yet
	order    int
	left     bool // by a member, since the plan before
	// why says why there is no room for it, empty if there is. The shapes behind it serve its flows then.
	why string
	// toAll and toServed are what its members hear, all of them or those that it has a clone for.
	toAll, toServed []string

	// What fill works out.
	clones int                // how many points have one, throws included
	mtus   map[int]int        // how many clones have each MTU, in bytes
	points bart.Table[*point] // the destinations that were looked at
	table  routes.TableID
}

// member is a coverage in a shape, with the part of its destination that the base rule takes.
type member struct {
	cov    *coverage
	shape  *shaped
	base   *routes.Rule  // that of its own part: rules of one priority that lead to one table share shapes
	next   *member       // of its coverage's
	part   *netip.Prefix // nil for its coverage's whole destination
	full   *unit         // which says that there is too much to look at, nil if there is not
	nth    int32         // of its coverage's members
	at     int32         // where it is among the shape's
	clones int32         // how many are because of it
}

// dst is the part of its coverage's destination.
func (m *member) dst() netip.Prefix {
	if m.part != nil {
		return *m.part
	}
	return m.cov.sel().Dst
}

// each yields a member and those of its coverage that come after it. They can be taken out meanwhile.
func (m *member) each(yield func(*member) bool) {
	for m != nil {
		next := m.next
		if !yield(m) {
			return
		}
		m = next
	}
}

// servedBy is the shape that serves an entry ahead of a rule, nil for none.
func (e *entry) servedBy(base *routes.Rule) *shaped {
	var s *shaped
	if e.cov != nil {
		for m := range e.cov.members.each {
			if m.shape.base == base {
				s = m.shape
			}
		}
	}
	return s
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
	first := p.firstRule()
	for _, s := range shapes {
		p.empty(s)
		if s.why == "" {
			s.why = p.bars(s, first, used[s.id.Flows.Family])
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
func (p *planner) bars(s *shaped, first firstRule, used int) string {
	why, withheld := p.Withheld[s.id]
	switch {
	case withheld:
		return "no lock in a table of our own: " + why
	case first.of(s.id.Flows.Family) != "":
		return "no lock in a table of our own: " + first.of(s.id.Flows.Family)
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
		p.notFull(m)
		m.clones = 0
	}
	s.clones, s.mtus, s.table = 0, map[int]int{}, 0
	s.points = bart.Table[*point]{}
	s.toAll, s.toServed = nil, nil
}

// group sorts the coverages into shapes. A coverage whose flows several rules decide for is in
// several shapes.
func (p *planner) group() []*shaped {
	var shapes []*shaped
	for _, c := range p.covers {
		p.placings = p.shapesOf(c, p.placings[:0])
		for i, in := range p.placings {
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

// shapesOf appends the shapes in which a coverage's flows are.
func (p *planner) shapesOf(c *coverage, out []placing) []placing {
	p.beginOwn(c, phaseGroups)
	if l := p.vtiOf(c); l != nil {
		// Its own lookups have the mark, and no packet: what it carries is locked on its routes.
		return out
	}
	if _, inexact := c.flows(); inexact != "" {
		p.note(c, "no lock where other flows share a route: "+inexact)
		return out
	}
	p.partsAt = p.partsIn(p.partsAt, c)
	for i := range p.partsAt {
		part := &p.partsAt[i]
		switch {
		case part.Blocked != "":
			if !p.allLocked(*part) {
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
	m := &member{cov: c, shape: s, base: in.base, nth: int32(nth), at: int32(len(s.members))}
	if in.dst != c.sel().Dst {
		m.part = &in.dst
	}
	s.members = append(s.members, m)
	last := &c.members
	for *last != nil {
		last = &(*last).next
	}
	*last = m
	if !s.headless && (s.first == nil || m.ahead(s.first)) {
		s.first = m
	}
}

// findFirsts finds the first members of shapes that have lost theirs. They are among the first coverages, as a rule: what goes one by one
// goes in that order.
func (p *planner) findFirsts() {
	missing := 0
	for _, s := range p.shapes {
		if s.headless {
			missing++
		}
	}
	for _, c := range p.covers {
		if missing == 0 {
			return
		}
		for m := range c.members.each {
			if s := m.shape; s.headless {
				s.first, s.headless = m, false
				missing--
			}
		}
	}
}

// ahead says which of two members comes first in the kernel's order: a shape comes where its first does.
func (m *member) ahead(o *member) bool {
	return cmp.Or(m.cov.entry.compare(&o.cov.entry), cmp.Compare(m.nth, o.nth)) < 0
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
			if c.pol.IfID != 0 || !c.tunnels() {
				continue
			}
			p.beginOwn(c, phaseVRFs)
			m, inside := p.FIB.Cover(routes.Family(c.sel().Family), l.VRFTable, c.sel().Dst)
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
