package agent

import (
	"errors"
	"fmt"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// A lock in place overwrites what the route's owner has written since we read it, as rtnetlink has no compare-and-swap. The events tell, and
// the owner's version is written again (repair). It is in the journal by then: who is killed ahead of that write leaves it to the next run.

// bookRepair notes a lock that repairs a route. echo is what our write has made of it, and same that nothing was overwritten.
func (a *Agent) bookRepair(l plan.Lock, echo routes.Route, same bool) error {
	rec := a.lockRecord(l)
	if !same {
		rec.Stale, _ = routes.EncodeLock(echo, routes.MTUMetricOf(echo.Body))
	}
	return a.journal.Put(entry(lockID(l.Route.Key()), kindLock, rec))
}

// mendStale writes the owners' versions of routes again that an earlier run has overwritten and not repaired. That is so only where the kernel
// still has just what that run has written.
func (a *Agent) mendStale() {
	for _, l := range a.st.unrepaired {
		if err := a.mend(l); err != nil {
			a.failed("the owner's version can't be written again", err, "route", l.key().String())
		}
	}
	a.st.unrepaired = nil
}

func (a *Agent) mend(l lockedRoute) error {
	var in routes.Interner
	stale, serr := in.ParseRoute(l.Stale)
	owner, oerr := in.ParseRoute(l.Owner)
	if err := errors.Join(serr, oerr); err != nil {
		return fmt.Errorf("agent: the journal's routes: %w", err)
	}
	k := l.key()
	have, n := a.st.fib.Get(k)
	if n != 1 || stale.Key() != k || owner.Key() != k || !routes.EqualButMTU(have.Body, stale.Body) || routes.MTUMetricOf(have.Body) != routes.MTUMetricOf(stale.Body) {
		return nil // repaired, or changed since
	}
	a.stats.Repairs++
	a.noted("an earlier run was killed when it had overwritten what the route's owner wrote: the owner's version is written again", "route", k.String())
	if err := a.giveBack(plan.Unlock{Route: owner, Was: l.Claim.Was})[0]; err != nil {
		return err
	}
	a.st.fib.Own(routes.RouteSet{Route: owner, Replace: true})
	a.st.claim(k, nil)
	a.unbook(lockID(k))
	return nil
}
