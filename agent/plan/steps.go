package plan

import (
	"maps"
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// pending is where what is in place may differ from what is wanted: what changed since the last look, and what
// differed then.
type pending struct {
	all   bool // nothing was looked at yet: whatever else there is
	dsts  map[netip.Prefix]struct{}
	locks map[routes.Key]struct{}
}

func (p *pending) dst(dst netip.Prefix) {
	if p.all {
		return
	}
	if p.dsts == nil {
		p.dsts = map[netip.Prefix]struct{}{}
	}
	p.dsts[dst] = struct{}{}
}

func (p *pending) lock(k routes.Key) {
	if p.all {
		return
	}
	if p.locks == nil {
		p.locks = map[routes.Key]struct{}{}
	}
	p.locks[k] = struct{}{}
}

// Steps are those that Diff finds for the newest plan, looked for only where something changed since the last
// call, or where what that one found is not done.
func (pl *Planner) Steps(in Input, held Held) Steps {
	p := pl.p
	if p.follower == nil {
		return Diff(in, p.plan.Complete(), held)
	}
	in.Config = p.Config
	stale := in.XFRM.Stale() || in.FIB.Stale()
	todo := p.pending
	p.pending = pending{}
	var s Steps
	if todo.all {
		todo = pending{}
		p.pendAll(in, held, &todo)
	}
	p.stepRules(&s, stale)
	p.stepClones(&s, todo.dsts, stale)
	p.stepLocks(&s, todo.locks, held, stale)
	diffHolds(&s, in, p.plan, held, stale)
	return s
}

// pendAll makes everything that is wanted or in place something to look at.
func (p *planner) pendAll(in Input, held Held, todo *pending) {
	for _, s := range p.shapes {
		for x, at := range s.points.All() {
			if at.has {
				todo.dst(x)
			}
		}
	}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, id := range in.FIB.Tables(f) {
			if in.Config.OwnTable(id) {
				for r := range in.FIB.Table(f, id) {
					todo.dst(r.Dst)
				}
			}
		}
	}
	for k, t := range p.trials {
		if t.lock != nil {
			todo.lock(k)
		}
	}
	for k := range held.Locks {
		todo.lock(k)
	}
}

func (p *planner) stepRules(s *Steps, stale bool) {
	rules := ownRules(p.FIB, p.Config)
	for i := range p.plan.Shapes {
		rules = addRules(s, rules, p.plan.Shapes[i].Rules)
	}
	if !stale {
		for _, r := range rules {
			s.DropRules = append(s.DropRules, *r)
		}
	}
}

// found is a step for a clone, as far as the clone itself does not say it. There can be very many of them.
type found struct {
	dst   netip.Prefix
	shape int // its place in the plan
	rank  int
	moved bool
	old   []routes.Route
}

// stepClones compares what our tables hold at some destinations with what they are to hold. There can be very many of
// both: they are put into order by destination first, and the steps not again.
func (p *planner) stepClones(s *Steps, dsts map[netip.Prefix]struct{}, stale bool) {
	if len(dsts) == 0 {
		return
	}
	list := slices.AppendSeq(make([]netip.Prefix, 0, len(dsts)), maps.Keys(dsts))
	slices.SortFunc(list, routes.ComparePrefix)
	var steps []found
	var have, at []routes.Route // at one destination, and in one table
	same := sameWays{}
	for _, dst := range list {
		have = have[:0]
		for r := range p.FIB.At(dst) {
			if p.Config.OwnTable(r.Body.Table) && p.Config.OwnRoute(r) {
				have = append(have, r)
			}
		}
		f := routes.FamilyOf(dst.Addr())
		for i := range p.plan.Shapes {
			sh := &p.plan.Shapes[i]
			if sh.ID.Flows.Family != f {
				continue
			}
			c, ok := sh.Clone(dst)
			if !ok {
				continue
			}
			at = at[:0]
			have = slices.DeleteFunc(have, func(r routes.Route) bool {
				if r.Body.Table != sh.Table {
					return false
				}
				at = append(at, r)
				return true
			})
			if step, differs := cloneStep(c, at, same); differs {
				steps = append(steps, found{dst, i, step.rank(), step.Moved, step.Old})
				p.pending.dst(dst)
			}
		}
		if len(have) > 0 {
			p.pending.dst(dst)
			if !stale {
				s.DropClones = append(s.DropClones, have...)
			}
		}
	}
	s.Clones = p.inOrder(steps)
	sortDropped(s.DropClones)
}

// inOrder makes steps of what was found in the order of destinations: by their ranks, then by shapes.
func (p *planner) inOrder(list []found) []CloneStep {
	if len(list) == 0 {
		return nil
	}
	shapes := len(p.plan.Shapes)
	next := make([]int, ranks*shapes+1) // where the next step goes, by rank and shape
	for i := range list {
		next[list[i].rank*shapes+list[i].shape+1]++
	}
	for i := range next[1:] {
		next[i+1] += next[i]
	}
	out := make([]CloneStep, len(list))
	for i := range list {
		f := &list[i]
		sh, at := &p.plan.Shapes[f.shape], &next[f.rank*shapes+f.shape]
		c, _ := sh.Clone(f.dst)
		out[*at] = CloneStep{Table: sh.Table, Shape: sh.ID, Clone: c, Moved: f.moved, Old: f.old}
		*at++
	}
	return out
}

func (p *planner) stepLocks(s *Steps, keys map[routes.Key]struct{}, held Held, stale bool) {
	for _, k := range slices.SortedFunc(maps.Keys(keys), routes.Key.Compare) {
		var lock *Lock
		if t := p.trials[k]; t != nil {
			lock = t.lock
		}
		claim, ours := held.Locks[k]
		switch {
		case lock != nil:
			if !ours || claim.Ours != lock.Want || routes.MTUMetricOf(lock.Route.Body) != lock.Want {
				s.Locks = append(s.Locks, *lock)
				p.pending.lock(k)
			}
		case ours:
			p.pending.lock(k) // until the claim is gone
			if !stale {
				s.release(p.FIB, k, claim)
			}
		}
	}
}
