package agent

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// moveClones brings our tables and rules up to the plan: clones whose route moved first, then
// new ones, then the rules that lead to them. What the kernel answers before and after decides
// whether a shape stays: a lock never changes where a packet goes.
func (a *Agent) moveClones(pl *plan.Plan, s *plan.Steps, now time.Time) {
	if len(s.Clones)+len(s.AddRules) == 0 {
		return
	}
	if err := a.bookTables(); err != nil {
		a.failed("journal can't be written, no lock in a table of our own", err)
		return
	}
	failpoint("clone-journal-after")
	broken, stopped := a.putClones(s.Clones, now)
	if stopped {
		return
	}
	failpoint("clone-written")
	for i := range pl.Shapes {
		sh := &pl.Shapes[i]
		if why, no := broken[sh.ID]; no {
			a.withhold(sh, why, now)
			continue
		}
		var add []routes.Rule
		for _, r := range s.AddRules {
			if slices.Contains(sh.Rules, r) {
				add = append(add, r)
			}
		}
		if len(add) > 0 {
			a.lead(sh, add, now)
			continue
		}
		if written := writtenFor(sh, s.Clones); len(written) > 0 {
			probes := a.probes(sh, written)
			if why, _ := a.compare(probes, nil, a.ask(probes), sh); why != "" {
				a.withhold(sh, why, now)
			}
		}
	}
}

// writtenFor are the destinations of the steps for a shape, nil for none.
func writtenFor(sh *plan.Shape, steps []plan.CloneStep) (at map[netip.Prefix]bool) {
	for i := range steps {
		if c := &steps[i]; c.Table == sh.Table && c.Shape == sh.ID {
			if at == nil {
				at = map[netip.Prefix]bool{}
			}
			at[c.Clone.Dst] = true
		}
	}
	return at
}

// putClones writes clones, and takes the ones away that they replace: a clone with another MTU
// has another metric, so the old one stays until the new one is there. Where a clone can't be
// written, a throw goes there, as the next rule knows better than a wider clone; a shape for
// which that fails too is broken. Very many are written a part at a time; stopped says that the loop is to write no more.
func (a *Agent) putClones(steps []plan.CloneStep, now time.Time) (broken map[plan.ShapeID]string, stopped bool) {
	broken = map[plan.ShapeID]string{}
	for part := range slices.Chunk(steps, writesAtOnce) {
		if a.halt.Load() {
			return broken, true
		}
		a.putSome(part, broken, now)
		a.keepUp()
	}
	return broken, false
}

func (a *Agent) putSome(steps []plan.CloneStep, broken map[plan.ShapeID]string, now time.Time) {
	writes := make([]routes.Write, 0, len(steps))
	of := make([]*plan.CloneStep, 0, len(steps))
	for i := range steps {
		c := &steps[i]
		if !a.mayClone(c, now) {
			broken[c.Shape] = fmt.Sprintf("%s does not stay in its table (somebody deletes it, or the kernel refuses it)", c.Clone.Dst)
			continue
		}
		msg, err := a.encodeClone(c.Clone, c.Table)
		if err != nil {
			a.failed("route can't be cloned", err, "route", c.Clone.Dst.String(), "table", c.Table)
			msg, err = a.encodeThrow(c)
		}
		if err != nil {
			broken[c.Shape] = err.Error()
			continue
		}
		writes, of = append(writes, routes.Write{Op: routes.OpPut, Msg: msg}), append(of, c)
	}
	var old []routes.Write
	var oldOf []routes.Route
	for i, err := range a.onLink(writes, a.batch(writes)) {
		c := of[i]
		if err == nil {
			a.didClone(c)
		} else {
			a.failed("clone can't be written", err, "route", c.Clone.Dst.String(), "table", c.Table)
			if err := a.throwInstead(c); err != nil {
				broken[c.Shape] = fmt.Sprintf("neither a clone nor a throw can be written for %s: %v", c.Clone.Dst, err)
				continue
			}
		}
		for _, r := range c.Old {
			if err != nil && r.Body.Type == routes.Throw {
				continue // it stands in for the clone
			}
			if msg, err := routes.EncodeDelete(r); err == nil {
				old, oldOf = append(old, routes.Write{Op: routes.OpDelete, Msg: msg}), append(oldOf, r)
			}
		}
	}
	a.putCopies(steps, broken)
	for i, err := range a.batch(old) {
		if isGone(err) { // which is as good
			a.ownGone(oldOf[i])
		}
	}
}

// putCopies writes the copies behind clones and throws that are not there as they are to be. Without one a packet could go another way, so a
// shape for which that fails is broken.
func (a *Agent) putCopies(steps []plan.CloneStep, broken map[plan.ShapeID]string) {
	var writes []routes.Write
	var of []*plan.CloneStep
	for i := range steps {
		c := &steps[i]
		if _, no := broken[c.Shape]; no {
			continue
		}
		for n, b := range c.Clone.Behind {
			msg, err := routes.EncodeClone(b.Of, c.Clone.Dst, c.Table, a.cfg.Plan.Protocol, b.MTU, 0, plan.CopyMetric(n))
			if err != nil {
				broken[c.Shape] = err.Error()
				continue
			}
			writes, of = append(writes, routes.Write{Op: routes.OpPut, Msg: msg}), append(of, c)
		}
	}
	for i, err := range a.onLink(writes, a.batch(writes)) {
		if err != nil {
			broken[of[i].Shape] = fmt.Sprintf("the kernel refuses the route of %s that sockets bound to a device are to find: %v", of[i].Clone.Dst, err)
			a.failed("copy can't be written", err, "route", of[i].Clone.Dst.String(), "table", of[i].Table)
		}
	}
}

// onLink tries the IPv6 clones again whose gateway the kernel does not find from our table.
func (a *Agent) onLink(writes []routes.Write, errs []error) []error {
	var again []routes.Write
	var at []int
	for i, err := range errs {
		if errors.Is(err, unix.EHOSTUNREACH) {
			again, at = append(again, routes.Write{Op: writes[i].Op, Msg: routes.OnLink(writes[i].Msg)}), append(at, i)
		}
	}
	for n, err := range a.batch(again) {
		if err == nil {
			errs[at[n]] = nil
		}
	}
	return errs
}

// throwInstead puts a throw where a clone can't be written, unless there is one: IPv4 tells
// nothing of a replace that changes nothing.
func (a *Agent) throwInstead(c *plan.CloneStep) error {
	if slices.ContainsFunc(c.Old, func(r routes.Route) bool { return r.Body.Type == routes.Throw }) {
		return nil
	}
	msg, err := a.encodeThrow(c)
	if err != nil {
		return err
	}
	return a.batch([]routes.Write{{Op: routes.OpPut, Msg: msg}})[0]
}

// mayClone bounds how often the same clone is written again. One that moves is another one.
func (a *Agent) mayClone(c *plan.CloneStep, now time.Time) bool {
	at := clonePlace{c.Table, c.Clone.Dst}
	last, again := a.st.cloned[at]
	if !again || last.throw != c.Clone.Throw || last.body != c.Clone.Of.Body || last.mtu != c.Clone.MTU || !slices.Equal(last.behind, c.Clone.Behind) {
		last = clonedAt{body: c.Clone.Of.Body, mtu: c.Clone.MTU, throw: c.Clone.Throw, behind: c.Clone.Behind}
	}
	may, _ := last.once(now)
	a.st.cloned[at] = last
	return may
}

// batch does the writes and returns the error of each.
func (a *Agent) batch(writes []routes.Write) []error {
	out := make([]error, len(writes))
	for i, res := range a.results(writes) {
		out[i] = res.Err
	}
	return out
}

// results does the writes and returns what became of each. Those in our own tables are in the mirror then; the loop waits for the echoes of others.
func (a *Agent) results(writes []routes.Write) []routes.Result {
	if len(writes) == 0 {
		return nil
	}
	results, err := a.rt.Batch(writes)
	a.own(results)
	for len(results) < len(writes) {
		results = append(results, routes.Result{Err: err})
	}
	return results
}

func (a *Agent) didClone(c *plan.CloneStep) {
	what := "route cloned with a locked mtu"
	switch {
	case c.Clone.Throw:
		what = "route thrown to the next rule"
	case c.Moved:
		what = "clone moved"
	}
	switch {
	case a.onlyCounted(what):
	case c.Clone.Throw:
		a.did(what, "route", c.Clone.Dst.String(), "table", c.Table)
	case c.Moved:
		a.did(what, "route", c.Clone.Dst.String(), "table", c.Table, "mtu", c.Clone.MTU.MTU)
	default:
		a.did(what, "route", c.Clone.Dst.String(), "table", c.Table, "mtu", c.Clone.MTU.MTU, "because", ids1(c.Clone.Because))
	}
}

func (a *Agent) encodeThrow(c *plan.CloneStep) ([]byte, error) {
	return a.encodeClone(plan.Clone{Dst: c.Clone.Dst, Throw: true}, c.Table)
}

func (a *Agent) encodeClone(c plan.Clone, table routes.TableID) ([]byte, error) {
	if c.Throw {
		return routes.EncodeThrow(routes.FamilyOf(c.Dst.Addr()), c.Dst, table, a.cfg.Plan.Protocol, c.Metric())
	}
	return routes.EncodeClone(c.Of, c.Dst, table, a.cfg.Plan.Protocol, c.MTU, c.AdvMSS, c.Metric())
}

// lead adds the rules of a shape and compares where packets go before and after.
func (a *Agent) lead(sh *plan.Shape, add []routes.Rule, now time.Time) {
	f := a.st.placed[sh.ID]
	may, rests := !now.Before(f.until), false
	if a.st.wereDeleted(add) {
		may, rests = f.once(now)
		a.st.placed[sh.ID] = f
	}
	if !may {
		const why = "somebody keeps deleting its rules"
		if rests {
			a.withhold(sh, why, now)
		}
		a.st.withheld[sh.ID] = withheldShape{why: why, until: f.until} // whatever else changes
		return
	}
	probes := a.probes(sh, nil)
	before := a.ask(probes)
	for _, r := range add {
		err := a.rt.AddRule(r)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			a.failed("rule can't be added", err, "priority", r.Priority, "table", r.Table)
			a.withhold(sh, "its rule can't be added: "+err.Error(), now)
			return
		}
		failpoint("rule-added")
		rule := r
		a.st.fib.Own(routes.RuleSet{Rule: &rule})
		a.did("rule added", "family", r.Family.String(), "priority", r.Priority, "selectors", sh.ID.String(), "table", r.Table)
	}
	if why, at := a.compare(probes, before, a.ask(probes), sh); why != "" {
		a.withhold(sh, why, now)
		if at != nil && !at.Throw {
			w := a.st.withheld[sh.ID]
			w.of = at.Of
			a.st.withheld[sh.ID] = w
		}
	}
}

// moved lets a shape be tried again whose clone took a packet another way because its route had
// just been changed, and the event was not read yet.
func (a *Agent) moved(ev routes.Event) {
	if len(a.st.withheld) == 0 {
		return
	}
	var r routes.Route
	switch ev := ev.(type) {
	case routes.RouteSet:
		r = ev.Route
	case routes.RouteGone:
		r = ev.Route
	case routes.RoutesFound:
		for _, r := range ev.Routes {
			a.moved(routes.RouteSet{Route: r})
		}
		return
	default:
		return
	}
	_, gone := ev.(routes.RouteGone)
	maps.DeleteFunc(a.st.withheld, func(_ plan.ShapeID, w withheldShape) bool {
		return w.of.Body != nil && w.of.Key() == r.Key() && (gone || w.of.Body != r.Body)
	})
}

// withhold takes the rules of a shape away and keeps it from being tried again for a while.
func (a *Agent) withhold(sh *plan.Shape, why string, now time.Time) {
	a.notice(lockWithdrawn, "shape", sh.ID.String(), "why", why)
	a.st.withheld[sh.ID] = withheldShape{why: why, until: now.Add(withholdFor)}
	for _, r := range sh.Rules {
		if err := a.rt.DeleteRule(r); err != nil && !errors.Is(err, unix.ENOENT) {
			a.failed("rule can't be deleted", err, "priority", r.Priority)
			continue
		}
		rule := r
		a.st.fib.Own(routes.RuleGone{Rule: &rule})
	}
	a.count(lockWithdrawn, Done)
}

// lockWithdrawn is the action of taking rules away that the kernel's lookup refuted.
const lockWithdrawn = "lock withdrawn"

const withholdFor = time.Minute

// dropTables takes away rules and clones that are wanted no more, the rules first.
func (a *Agent) dropTables(s *plan.Steps) {
	for _, r := range s.DropRules {
		if err := a.rt.DeleteRule(r); err != nil && !errors.Is(err, unix.ENOENT) {
			a.failed("rule can't be deleted", err, "priority", r.Priority)
			continue
		}
		failpoint("rule-dropped")
		rule := r
		a.st.fib.Own(routes.RuleGone{Rule: &rule})
		a.dropped.rules++
		a.did("rule deleted", "family", r.Family.String(), "priority", r.Priority, "table", r.Table)
	}
	for part := range slices.Chunk(s.DropClones, writesAtOnce) {
		if a.halt.Load() {
			return
		}
		a.dropClones(part)
		a.keepUp()
	}
	if len(s.DropClones) > 0 {
		failpoint("clone-dropped")
	}
}

func (a *Agent) dropClones(list []routes.Route) {
	writes := make([]routes.Write, 0, len(list))
	of := make([]routes.Route, 0, len(list))
	for _, r := range list {
		msg, err := routes.EncodeDelete(r)
		if err != nil {
			a.failed("clone can't be deleted", err, "route", r.Key().String())
			continue
		}
		writes, of = append(writes, routes.Write{Op: routes.OpDelete, Msg: msg}), append(of, r)
	}
	results, err := a.rt.Batch(writes)
	if err != nil {
		a.failed("clones can't be deleted", err)
	}
	a.own(results)
	for i, res := range results {
		if isGone(res.Err) {
			a.ownGone(of[i])
			continue
		}
		if res.Err != nil {
			a.failed("clone can't be deleted", res.Err, "route", of[i].Key().String())
			continue
		}
		delete(a.st.cloned, clonePlace{of[i].Body.Table, of[i].Dst}) // that it is not there is our own doing
		a.dropped.clones++
		if what := "clone deleted"; !a.onlyCounted(what) {
			a.did(what, "route", of[i].Key().String())
		}
	}
}
