package plan

import (
	"fmt"
	"slices"

	"tsoagent/xfrmwatch"
)

// complete puts together what takes as long as there are coverages: a plan that was followed has it when
// somebody asks. The policies' verdicts come in the kernel's order, then the TCP keys'.
func (p *planner) complete(pl *Plan) {
	p.at = nil
	pl.Locks, pl.Verdicts, pl.Current, pl.MTU = nil, nil, nil, make(map[xfrmwatch.CoverageID]int, len(p.covers))
	pl.Holds = slices.Clone(pl.Holds) // the planner's own stay without
	for i := range pl.Holds {
		pl.Holds[i].Because = slices.Collect(p.causes(&pl.Holds[i]))
	}
	for _, t := range p.trials {
		if t.lock != nil {
			pl.Locks = append(pl.Locks, *t.lock)
		}
	}
	slices.SortFunc(pl.Locks, func(a, b Lock) int { return a.Route.Key().Compare(b.Route.Key()) })
	for _, c := range p.covers {
		if !c.gone {
			pl.Current = append(pl.Current, c.whole())
		}
		v, valid := p.judged(c)
		if valid != 0 {
			pl.MTU[c.id()] = valid
		}
		pl.Verdicts = append(pl.Verdicts, v)
	}
	for _, s := range p.signed {
		pl.Verdicts = append(pl.Verdicts, *s.verdict)
	}
}

// judged puts a coverage's verdict together from what all units have said of it. valid is the inner MTU by
// its valid SAs, in bytes, 0 for none.
func (p *planner) judged(c *coverage) (v Verdict, valid int) {
	v = Verdict{
		ID: c.id(), Selector: *c.sel(), Priority: c.pol.Priority, IfID: c.pol.IfID, Mark: c.pol.Mark,
		Maybe: c.maybe, Gone: c.gone, Cut: CutSocket,
	}
	held := p.holdVerdict(c)
	if held != nil {
		v.Cut, v.Carriers, v.Held = held.Cut, held.Carriers, held.Held
	}
	shapes := false // whether those have had their say
	for _, u := range c.sorted() {
		if u.phase > phaseClones && !shapes {
			shapes = true
			c.hearShapes(&v)
		}
		s := u.of(c)
		if left := int(s.left); left != 0 && (v.MTU == 0 || left < v.MTU) {
			v.MTU = left
		}
		if s.valid != 0 && (valid == 0 || int(s.valid) < valid) {
			valid = int(s.valid)
		}
		notes, locked := s.words()
		for _, n := range notes {
			v.note(n)
		}
		v.Locked = append(v.Locked, locked...)
		if u.phase == phaseClones {
			if at, _ := u.shape.points.Get(u.dst); at.of != nil && at.of.cov == c {
				v.Locked = append(v.Locked, fmt.Sprintf("%s table %d mtu %d", u.dst, u.shape.table, at.mtu))
			}
		}
	}
	if !shapes {
		c.hearShapes(&v)
	}
	if held != nil {
		for _, n := range held.Notes {
			v.note(n)
		}
	}
	if v.MTU == 0 {
		v.MTU = p.bareMTU(c)
	}
	p.noteStanding(c, &v)
	return v, valid
}

// validMTU is the inner MTU by valid SAs, in bytes, 0 for none.
func (c *coverage) validMTU() int {
	valid := 0
	for _, u := range c.units {
		if s := u.of(c); s.valid != 0 && (valid == 0 || int(s.valid) < valid) {
			valid = int(s.valid)
		}
	}
	return valid
}

// hearShapes adds what a coverage's shapes say.
func (c *coverage) hearShapes(v *Verdict) {
	for m := range c.members.each {
		if m.shape.why != "" {
			v.note(m.shape.why)
		}
		for _, n := range m.shape.toAll {
			v.note(n)
		}
		if m.clones > 0 {
			for _, n := range m.shape.toServed {
				v.note(n)
			}
		}
	}
}

// noteStanding adds what a coverage's own standing says, and why there is nothing else to say.
func (p *planner) noteStanding(c *coverage, v *Verdict) {
	switch {
	case v.MTU == 0 && c.larval && p.Last[c.id()] == 0:
		v.note("no valid SA yet: no lock before the first one (presume_mtu sets one)")
	case len(v.Locked) == 0 && len(v.Notes) == 0 && p.Config.MTU == MTUOff:
		v.note("no lock (mtu: off)")
	case len(v.Locked) == 0 && len(v.Notes) == 0:
		v.note("no route leads to these flows, or another policy takes them first: nothing to lock")
	}
	if v.Gone {
		v.note("the policy went away: kept until it has been quiet for restore_after")
	}
	if v.Maybe {
		v.note("all templates are optional: locked, but never a reason for a hold")
	}
	for _, st := range c.steps {
		for _, sa := range st.SAs {
			if why := p.unbound(sa); why != "" {
				v.note(fmt.Sprintf("SA %#x to %s %s: rekey, so that the next one is not bound to it", uint32(sa.SPI), sa.Dst, why))
			}
		}
	}
}

// holding is what the holds and lanes on shared NICs say of a coverage.
func (p *planner) holding(c *coverage) *Verdict {
	a := c.besides()
	if a.held == nil {
		a.held = &Verdict{Cut: CutSocket}
	}
	return a.held
}

// sayValid notes the inner MTU that a coverage has by its valid SAs. A smaller MTU of a route is not the
// coverage's: other routes can have a larger one.
func (p *planner) sayValid(c *coverage) {
	mtu, _ := c.whole().MTU(p.peerMTU, anyRoute)
	p.valid(c, mtu)
}
