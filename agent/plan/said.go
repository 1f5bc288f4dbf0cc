package plan

import (
	"cmp"
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// What there is to say of a coverage comes from many places: the routes and destinations that were looked
// at, its tunnels, its own selector. Each is a unit of work that remembers what it has said of whom, so that
// it can be done again by itself: what it said before is taken back then. A verdict is put together from
// what all units have said (judged).

// phase orders the units in a verdict.
type phase uint8

const (
	phaseTunnels    phase = iota
	phaseDevices          // carrier_mtu: device
	phaseCandidates       // which routes a coverage can fill
	phaseTrials           // whether a route can be locked in place
	phaseGroups           // in which shapes a coverage is
	phaseMembers          // where a member of a shape can need clones
	phaseClones           // what our table holds at a destination
	phaseVRFs
	phasePartial // partial: clamp | off
	phaseHolds
)

// unit is a piece of the planner's work.
type unit struct {
	shape *shaped      // of a destination in a table of ours
	dst   netip.Prefix // that destination
	first said         // of no coverage for nothing
	rest  *rest        // nil for nothing
	phase phase
}

// rest is what few units have.
type rest struct {
	route *routes.Key // the route of a trial
	moreSaid
}

// said is what a unit says of one coverage.
type said struct {
	cov   *coverage
	notes *[]string // nil for none. They can be shared, and are never changed
	at    int32     // where the unit is among those of the coverage
	// left is the least inner MTU found for the verdict, valid the one by a valid SA now; both in bytes, 0
	// for none.
	left, valid int32
	locked      uint32 // so many of the notes, the last, say what is locked
}

// moreSaid is what a unit says of other coverages than the first. Most speak of one.
type moreSaid struct {
	list  []said
	index map[*coverage]int // where in the list a coverage is, once there are many
}

const manySaid = 8

// words are the notes, and what is locked.
func (s *said) words() (notes, locked []string) {
	if s.notes == nil {
		return nil, nil
	}
	all := *s.notes
	n := len(all) - int(s.locked)
	return all[:n], all[n:]
}

// all yields what a unit says.
func (u *unit) all(yield func(*said) bool) {
	if u.first.cov != nil && !yield(&u.first) || u.rest == nil {
		return
	}
	for i := range u.rest.list {
		if !yield(&u.rest.list[i]) {
			return
		}
	}
}

// begin makes a unit the one at work, and takes back what it has said before.
func (p *planner) begin(u *unit) {
	p.takeBack(u)
	p.at = u
}

// beginOwn begins the unit of a phase that speaks of a coverage alone. Most have nothing to say, so that it becomes the coverage's
// only when it says something.
func (p *planner) beginOwn(c *coverage, at phase) {
	if c.aside != nil {
		if i := slices.IndexFunc(c.aside.mine, func(u *unit) bool { return u.phase == at }); i >= 0 {
			p.begin(c.aside.mine[i])
			return
		}
	}
	if p.spare == nil {
		p.spare = &unit{}
	}
	p.spare.phase = at
	p.at = p.spare
}

func (p *planner) takeBack(u *unit) {
	for s := range u.all {
		p.touch(s.cov)
		s.cov.forget(s.at)
	}
	u.first = said{}
	if u.rest != nil {
		u.rest.moreSaid = moreSaid{}
	}
}

// touch notes that what is said of a coverage is not what it was in the plan before.
func (p *planner) touch(c *coverage) {
	if p.follower != nil {
		p.touched[c] = struct{}{}
	}
}

// forget takes a unit from a coverage's; the last one takes its place.
func (c *coverage) forget(at int32) {
	last := len(c.units) - 1
	moved := c.units[last]
	c.units[at] = moved
	moved.of(c).at = at
	c.units[last] = nil
	c.units = c.units[:last]
}

// of is what the unit says of a coverage, nil if there is nothing yet.
func (u *unit) of(c *coverage) *said {
	if u.first.cov == c {
		return &u.first
	}
	if u.rest == nil {
		return nil
	}
	more := &u.rest.moreSaid
	if more.index != nil {
		if i, ok := more.index[c]; ok {
			return &more.list[i]
		}
		return nil
	}
	for i := range more.list {
		if more.list[i].cov == c {
			return &more.list[i]
		}
	}
	return nil
}

// on is what the unit at work says of a coverage.
func (p *planner) on(c *coverage) *said {
	u := p.at
	if u == nil {
		return &said{} // verdicts are being put together
	}
	if s := u.of(c); s != nil {
		return s
	}
	if u == p.spare {
		a := c.besides()
		a.mine, p.spare = append(a.mine, u), nil
	}
	p.touch(c)
	s := said{cov: c, at: int32(len(c.units))}
	c.units = append(c.units, u)
	if u.first.cov == nil {
		u.first = s
		return &u.first
	}
	if u.rest == nil {
		u.rest = &rest{}
	}
	return u.rest.add(s)
}

func (m *moreSaid) add(s said) *said {
	m.list = append(m.list, s)
	switch {
	case m.index != nil:
		m.index[s.cov] = len(m.list) - 1
	case len(m.list) > manySaid:
		m.index = make(map[*coverage]int, 2*manySaid)
		for i := range m.list {
			m.index[m.list[i].cov] = i
		}
	}
	return &m.list[len(m.list)-1]
}

// note adds a sentence to a coverage's verdict, once.
func (p *planner) note(c *coverage, text string) {
	s := p.on(c)
	notes, locked := s.words()
	if !slices.Contains(notes, text) {
		all := slices.Concat(notes, []string{text}, locked)
		s.notes = &all
	}
}

// noteShared is the same for a list of one sentence that very many coverages hear.
func (p *planner) noteShared(c *coverage, text *[]string) {
	if s := p.on(c); s.notes == nil {
		s.notes = text
		return
	}
	p.note(c, (*text)[0])
}

// left says what inner MTU, in bytes, a coverage has somewhere: the verdict tells the least.
func (p *planner) left(c *coverage, mtu int) {
	if s := p.on(c); s.left == 0 || mtu < int(s.left) {
		s.left = int32(mtu)
	}
}

// valid says what inner MTU, in bytes, a coverage has by its valid SAs; of several the least.
func (p *planner) valid(c *coverage, mtu int) {
	if s := p.on(c); s.valid == 0 || mtu < int(s.valid) {
		s.valid = int32(mtu)
	}
}

// locks says what is locked for a coverage.
func (p *planner) locks(c *coverage, what string) {
	s := p.on(c)
	notes, locked := s.words()
	all := slices.Concat(notes, locked, []string{what})
	s.notes, s.locked = &all, s.locked+1
}

// anyLocked reports whether something was locked for a coverage so far.
func (c *coverage) anyLocked() bool {
	return slices.ContainsFunc(c.units, func(u *unit) bool { return u.of(c).locked > 0 })
}

// sorted are the units that say something of a coverage, in order.
func (c *coverage) sorted() []*unit {
	units := slices.Clone(c.units)
	slices.SortFunc(units, func(a, b *unit) int {
		if d := cmp.Compare(a.phase, b.phase); d != 0 || a == b {
			return d
		}
		if a.shape != b.shape && a.shape != nil && b.shape != nil {
			return cmp.Compare(a.shape.order, b.shape.order)
		}
		if a.phase == phaseTrials {
			return a.rest.route.Compare(*b.rest.route)
		}
		return routes.ComparePrefix(a.dst, b.dst)
	})
	return units
}
