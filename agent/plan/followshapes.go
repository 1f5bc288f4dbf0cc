package plan

import (
	"cmp"
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// followShapes brings the tables of our own up to date in a region. It is false if the shapes have to be
// worked out from scratch: one has no room any more, or may have room again, or they changed their order.
func (p *planner) followShapes(r *region) bool {
	if !p.regroup(r) {
		return false
	}
	pending := map[*shaped]map[*member]bool{}
	mark := func(c *coverage) {
		for m := range c.members.each {
			if pending[m.shape] == nil {
				pending[m.shape] = map[*member]bool{}
			}
			pending[m.shape][m] = true
		}
	}
	for _, c := range p.coversIn(r) {
		mark(c)
	}
	grow := func(dst netip.Prefix) {
		if !r.add(dst) {
			return
		}
		for _, c := range p.coversIn(&region{list: []netip.Prefix{dst}}) {
			mark(c)
		}
	}
	before := p.filled()
	for _, s := range p.shapes {
		if s.why == "" {
			p.refill(s, r, func() map[*member]bool { return pending[s] }, grow)
		}
	}
	after := p.filled()
	if p.limits(pending, slices.Equal(before, after)) || p.overLimits() {
		return false
	}
	tables := map[*shaped]routes.TableID{}
	for _, s := range p.shapes {
		tables[s] = s.table
		s.toAll, s.toServed, s.left = nil, nil, false
	}
	p.plan.Shapes = nil
	if !p.place(after.shapes()) {
		return false
	}
	for s, table := range tables {
		if s.table != table {
			p.pending.all = true // what is in place is in another table
		}
	}
	return true
}

// limits reports whether shapes that have no room may have some now, or nothing to find room for. Those that
// are barred from having a table have none as long as the others stay as they are.
func (p *planner) limits(pending map[*shaped]map[*member]bool, same bool) bool {
	return slices.ContainsFunc(p.shapes, func(s *shaped) bool {
		switch {
		case s.why == "" || p.bars(s, p.follower.firstRule, 0) != "":
			return false
		case s.why == tooManyRules:
			return !same
		}
		return !same || s.left || len(pending[s]) > 0
	})
}

// filling is how much a shape's table holds.
type filling struct {
	s *shaped
	n int
}

type fillings []filling

func (f fillings) shapes() []*shaped {
	out := make([]*shaped, len(f))
	for i := range f {
		out[i] = f[i].s
	}
	return out
}

// filled are the shapes whose tables hold something, in order.
func (p *planner) filled() fillings {
	var out fillings
	for _, s := range p.shapes {
		if s.clones > 0 {
			out = append(out, filling{s, s.clones})
		}
	}
	return out
}

// overLimits reports whether the tables hold more than they may, or a shape comes behind as many as have rules: it has
// no room, whether it holds something or not.
func (p *planner) overLimits() bool {
	total, used := 0, map[routes.Family]int{}
	for _, s := range p.shapes {
		if s.why != "" {
			continue
		}
		if used[s.id.Flows.Family] == MaxRules {
			return true
		}
		if s.clones > 0 {
			total += s.clones
			used[s.id.Flows.Family]++
		}
	}
	return total > p.Config.MaxClones
}

// regroup works out anew in which shapes the coverages in a region are, and what they hear of VRFs. It is
// false if shapes that stay have changed their order.
func (p *planner) regroup(r *region) bool {
	var moved []netip.Prefix
	old := slices.Clone(p.shapes)
	for _, c := range p.coversIn(r) {
		placings := p.shapesOf(c, nil)
		if c.isPlaced(placings) {
			continue
		}
		moved = append(moved, c.sel().Dst)
		for m := range c.members.each {
			p.leave(m)
		}
		for i, in := range placings {
			s := p.byShape[in.id]
			if s == nil {
				s = &shaped{id: in.id, base: in.base}
				p.empty(s)
				s.why = p.bars(s, p.follower.firstRule, 0)
				p.byShape[in.id] = s
				p.shapes = append(p.shapes, s)
			}
			p.join(s, c, in, i)
		}
	}
	p.followVRFs(r)
	for _, dst := range moved {
		r.add(dst)
	}
	if !p.follower.regrouped { // nor has a policy that is no more left one
		return true
	}
	p.follower.regrouped = false
	return p.reorder(old)
}

// isPlaced reports whether a coverage's members are where they belong.
func (c *coverage) isPlaced(placings []placing) bool {
	i := 0
	for m := range c.members.each {
		if i == len(placings) || m.shape.id != placings[i].id || m.dst() != placings[i].dst {
			return false
		}
		i++
	}
	return i == len(placings)
}

// reorder sorts the shapes, forgets those without members and reports whether the others stand to each
// other, where they have flows in common, and to the rules that are not ours, as before.
func (p *planner) reorder(old []*shaped) bool {
	empty := func(s *shaped) bool { return len(s.members) == 0 }
	for _, s := range p.shapes {
		if empty(s) {
			if s.why != "" {
				return false
			}
			for x := range s.points.All() {
				p.pending.dst(x)
			}
			p.empty(s)
			delete(p.byShape, s.id)
		}
	}
	p.shapes = slices.DeleteFunc(p.shapes, empty)
	p.findFirsts()
	slices.SortFunc(p.shapes, func(a, b *shaped) int {
		switch {
		case a == b:
			return 0
		case a.first.ahead(b.first):
			return -1
		}
		return 1
	})
	stay := slices.DeleteFunc(old, empty)
	for i, b := range stay {
		if slices.ContainsFunc(stay[:i], func(a *shaped) bool { return b.first.ahead(a.first) && meet(a.id.Flows, b.id.Flows) }) {
			return false // which is served first matters to both
		}
	}
	limited := false
	for i, s := range p.shapes {
		if s.base != s.first.base {
			return false
		}
		s.order = i
		limited = limited || s.why != ""
	}
	return !limited || len(p.shapes) == len(old) && len(stay) == len(old)
}

// meet reports whether some flows are among both, whatever their destination.
func meet(a, b routes.Flows) bool {
	ports := func(a, b routes.PortRange) bool { return a.Any() || b.Any() || a.Lo <= b.Hi && b.Lo <= a.Hi }
	return a.Family == b.Family && a.Src.Overlaps(b.Src) && (a.Proto == 0 || b.Proto == 0 || a.Proto == b.Proto) &&
		ports(a.Sport, b.Sport) && ports(a.Dport, b.Dport) && (a.Mark^b.Mark)&a.Mask&b.Mask == 0
}

// followVRFs is noteVRFs for the coverages in a region.
func (p *planner) followVRFs(r *region) {
	if !slices.ContainsFunc(p.FIB.Links(), func(l *routes.Link) bool { return l.VRFTable != 0 }) {
		return
	}
	for _, c := range p.coversIn(r) {
		p.beginOwn(c, phaseVRFs)
	}
	p.noteVRFsOf(p.coversIn(r))
}

// refill works out a shape's table anew in a region. grow makes the region larger, and tells of more
// members that are to be looked at.
func (p *planner) refill(s *shaped, r *region, pending func() map[*member]bool, grow func(netip.Prefix)) {
	want := map[netip.Prefix]bool{}
	seen := map[*member]bool{}
	for again := true; again; {
		again = false
		for m := range pending() {
			if seen[m] {
				continue
			}
			seen[m], again = true, true
			was := m.full != nil
			own, ok := p.pointsOf(s, m, nil)
			if was == ok {
				grow(m.dst())
			}
			if ok {
				for _, x := range own {
					want[x] = true
				}
			}
		}
	}
	redo := map[netip.Prefix]bool{}
	for _, dst := range r.list {
		overlapping(&s.points, dst, func(x netip.Prefix, _ *point) { redo[x] = true })
	}
	for x := range want {
		if _, have := s.points.Get(x); !have && r.overlaps(x) {
			s.points.Insert(x, s.newPoint(x))
			redo[x] = true
		}
	}
	p.redo(s, r, redo, want, grow)
}

// redo decides at destinations anew, wider ones first. Where the outcome is another one, what is inside is
// decided again, too.
func (p *planner) redo(s *shaped, r *region, redo, want map[netip.Prefix]bool, grow func(netip.Prefix)) {
	var list []netip.Prefix
	compare := func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), routes.ComparePrefix(a, b))
	}
	for x := range redo {
		// What is no point any more goes first: others look at which points there are (takesAll).
		if at, ok := s.points.Get(x); ok && !want[x] && p.inside(r, x) {
			p.pending.dst(x)
			p.unsettle(s, x, at)
			p.takeBack(&at.unit)
			s.points.Delete(x)
			continue
		}
		list = append(list, x)
	}
	slices.SortFunc(list, compare)
	for i := 0; i < len(list); i++ {
		x := list[i]
		at, ok := s.points.Get(x)
		if !ok {
			continue
		}
		was, had := at.because, at.has
		p.pending.dst(x)
		p.unsettle(s, x, at)
		p.settlePoint(s, x, at)
		if was == at.because && had == at.has {
			continue
		}
		for y := range s.points.Subnets(x) {
			if !redo[y] {
				redo[y] = true
				at, _ := slices.BinarySearchFunc(list[i+1:], y, compare)
				list = slices.Insert(list, i+1+at, y)
			}
		}
		grow(x)
	}
}

// inside reports whether a destination is in a region as a whole, so that all of its points are known.
func (p *planner) inside(r *region, x netip.Prefix) bool { return r.set.LookupPrefix(x) }

// unsettle takes back what the table holds at a destination.
func (p *planner) unsettle(s *shaped, x netip.Prefix, at *point) {
	if !at.has {
		return
	}
	s.clones -= at.count()
	if at.of != nil {
		at.of.clones--
	}
	if at.because != nil {
		mtu := int(at.mtu)
		if s.mtus[mtu]--; s.mtus[mtu] == 0 {
			delete(s.mtus, mtu)
		}
	}
	at.clear()
}
