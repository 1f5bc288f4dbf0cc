package plan

import (
	"cmp"
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
	phase phase
	shape *shaped    // of a destination in a table of ours
	key   routes.Key // the route, or that destination
	said  []said
	index map[*coverage]int // where in said a coverage is, once there are many
}

// said is what a unit says of one coverage.
type said struct {
	cov *coverage
	at  int // where the unit is among those of the coverage
	// left is the least inner MTU found for the verdict, valid the one by a valid SA now; both in bytes, 0
	// for none.
	left, valid int
	notes       []string
	locked      []string
}

const manySaid = 8

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
	for i := range u.said {
		p.touch(u.said[i].cov)
		u.said[i].cov.forget(u.said[i].at)
	}
	u.said, u.index = nil, nil
}

// touch notes that what is said of a coverage is not what it was in the plan before.
func (p *planner) touch(c *coverage) {
	if p.follower != nil {
		p.touched[c] = struct{}{}
	}
}

// forget takes a unit from a coverage's; the last one takes its place.
func (c *coverage) forget(at int) {
	last := len(c.units) - 1
	moved := c.units[last]
	c.units[at] = moved
	moved.of(c).at = at
	c.units[last] = nil
	c.units = c.units[:last]
}

// of is what the unit says of a coverage, nil if there is nothing yet.
func (u *unit) of(c *coverage) *said {
	if u.index != nil {
		if i, ok := u.index[c]; ok {
			return &u.said[i]
		}
		return nil
	}
	for i := range u.said {
		if u.said[i].cov == c {
			return &u.said[i]
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
	u.said = append(u.said, said{cov: c, at: len(c.units)})
	c.units = append(c.units, u)
	switch {
	case u.index != nil:
		u.index[c] = len(u.said) - 1
	case len(u.said) > manySaid:
		u.index = make(map[*coverage]int, 2*manySaid)
		for i := range u.said {
			u.index[u.said[i].cov] = i
		}
	}
	return &u.said[len(u.said)-1]
}

// note adds a sentence to a coverage's verdict, once.
func (p *planner) note(c *coverage, text string) {
	if s := p.on(c); !slices.Contains(s.notes, text) {
		s.notes = append(s.notes, text)
	}
}

// left says what inner MTU, in bytes, a coverage has somewhere: the verdict tells the least.
func (p *planner) left(c *coverage, mtu int) {
	if s := p.on(c); s.left == 0 || mtu < s.left {
		s.left = mtu
	}
}

// valid says what inner MTU, in bytes, a coverage has by its valid SAs; of several the least.
func (p *planner) valid(c *coverage, mtu int) {
	if s := p.on(c); s.valid == 0 || mtu < s.valid {
		s.valid = mtu
	}
}

// locks says what is locked for a coverage.
func (p *planner) locks(c *coverage, what string) {
	s := p.on(c)
	s.locked = append(s.locked, what)
}

// anyLocked reports whether something was locked for a coverage so far.
func (c *coverage) anyLocked() bool {
	return slices.ContainsFunc(c.units, func(u *unit) bool { return len(u.of(c).locked) > 0 })
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
		return a.key.Compare(b.key)
	})
	return units
}
