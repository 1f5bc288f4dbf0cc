package plan

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// pending is where what is in place may differ from what is wanted: what changed since the last look, and what
// differed then.
type pending struct {
	all   bool // nothing was looked at yet
	dsts  map[netip.Prefix]struct{}
	locks map[routes.Key]struct{}
}

func (p *pending) dst(dst netip.Prefix) {
	if p.dsts == nil {
		p.dsts = map[netip.Prefix]struct{}{}
	}
	p.dsts[dst] = struct{}{}
}

func (p *pending) lock(k routes.Key) {
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
		for x := range s.kept.All() {
			todo.dst(x)
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

func (p *planner) stepClones(s *Steps, dsts map[netip.Prefix]struct{}, stale bool) {
	if len(dsts) == 0 {
		return
	}
	byTable := map[routes.Family]map[routes.TableID]*Shape{routes.IPv4: {}, routes.IPv6: {}}
	order := map[ShapeID]int{}
	for i := range p.plan.Shapes {
		sh := &p.plan.Shapes[i]
		byTable[sh.ID.Flows.Family][sh.Table], order[sh.ID] = sh, i
	}
	have := map[routes.TableID][]routes.Route{}
	for dst := range dsts {
		clear(have)
		for r := range p.FIB.At(dst) {
			if p.Config.OwnTable(r.Body.Table) && p.Config.OwnRoute(r) {
				have[r.Body.Table] = append(have[r.Body.Table], r)
			}
		}
		for table, sh := range byTable[routes.FamilyOf(dst.Addr())] {
			c, ok := sh.Clone(dst)
			if !ok {
				continue
			}
			if step, differs := cloneStep(c, have[table]); differs {
				step.Table, step.Shape = table, sh.ID
				s.Clones = append(s.Clones, step)
				p.pending.dst(dst)
			}
			delete(have, table)
		}
		for _, rs := range have {
			p.pending.dst(dst)
			if !stale {
				s.DropClones = append(s.DropClones, rs...)
			}
		}
	}
	slices.SortFunc(s.Clones, func(a, b CloneStep) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(order[a.Shape], order[b.Shape]), routes.ComparePrefix(a.Clone.Dst, b.Clone.Dst))
	})
	sortDropped(s.DropClones)
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
