package agent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// setLocks writes route MTUs in place: journal first, then the kernel.
func (a *Agent) setLocks(locks []plan.Lock, now time.Time) {
	var due []plan.Lock
	for _, l := range locks {
		if a.mayWrite(l.Route.Key(), now) {
			due = append(due, l)
		}
	}
	if len(due) == 0 {
		return
	}
	entries := a.lockEntries(due)
	failpoint("lock-journal-before")
	if err := a.journal.Put(entries...); err != nil {
		a.failed("journal can't be written, nothing is locked", err)
		for _, l := range due { // the owner is not to blame
			f := a.st.fights[l.Route.Key()]
			f.n--
			a.st.fights[l.Route.Key()] = f
		}
		return
	}
	failpoint("lock-journal-after")
	for i := 0; i < len(due); i += writesAtOnce {
		if a.halt.Load() {
			a.unbookLocks(due[i:])
			return
		}
		a.writeLocks(due[i:min(i+writesAtOnce, len(due))], false)
		a.keepUp()
	}
}

// unbookLocks takes locks out of the journal again that are not to be written.
func (a *Agent) unbookLocks(locks []plan.Lock) {
	var ids []string
	for _, l := range locks {
		if _, ours := a.st.locks[l.Route.Key()]; !ours {
			ids = append(ids, lockID(l.Route.Key()))
		}
	}
	if len(ids) > 0 {
		a.unbook(ids...)
	}
}

// writeLocks writes locks that are in the journal. Those that can't be written are taken out of it. A repair is always written: the kernel does not
// have the route that the lock is of.
func (a *Agent) writeLocks(locks []plan.Lock, repair bool) {
	var writes []routes.Write
	var of, not []plan.Lock
	for _, l := range locks {
		k := l.Route.Key()
		if !repair && routes.MTUMetricOf(l.Route.Body) == l.Want {
			// A crash came ahead of another value. IPv4 would tell nothing of the write.
			a.st.claim(k, &plan.LockClaim{Was: l.Owner, Ours: l.Want})
			continue
		}
		msg, err := routes.EncodeLock(l.Route, l.Want)
		if err != nil {
			a.failed("mtu can't be locked", err, "route", k.String())
			not = append(not, l)
			continue
		}
		a.st.writing[k] = &write{want: l.Want}
		writes, of = append(writes, routes.Write{Op: routes.OpReplace, Msg: msg}), append(of, l)
	}
	for i, res := range a.results(writes) {
		if !a.wroteLock(of[i], res) {
			not = append(not, of[i])
		}
	}
	a.unbookLocks(not)
}

// wroteLock takes what became of a write. It is false if the route is not locked.
func (a *Agent) wroteLock(l plan.Lock, res routes.Result) bool {
	k := l.Route.Key()
	switch err := res.Err; {
	case err == nil:
		a.st.writing[k].seq = res.Seq
		a.st.claim(k, &plan.LockClaim{Was: l.Owner, Ours: l.Want})
		failpoint("lock-written")
		if what := "mtu locked"; !a.onlyCounted(what) {
			a.did(what, "route", k.String(), "mtu", l.Want.MTU, "dev", strings.Join(a.devices(l.Route.Body), ","), "because", ids(l.Because))
		}
		return true
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH):
		// The route went away in between; its event is on the way.
		a.log.Debug("route to lock is gone", "route", k.String())
	default:
		a.failed("mtu can't be locked", err, "route", k.String())
	}
	delete(a.st.writing, k)
	return false
}

// repair writes the owner's version of a route again, with the lock, after our write has
// overwritten it. echo is what our write has made of the route.
func (a *Agent) repair(w *write, echo routes.Route) {
	k := echo.Key()
	l := plan.Lock{Route: *w.owner, Owner: routes.MTUMetricOf(w.owner.Body), Want: w.want}
	if claim, ok := a.st.locks[k]; ok && claim.Wrote(l.Owner) {
		l.Owner = claim.Was // a lock of ours is not the owner's
	}
	_, n := a.st.fib.Get(k)
	if w.back || n > 1 { // with a second route of the key a lock is not safe
		l.Want = l.Owner
	}
	same := routes.EqualButMTU(w.owner.Body, echo.Body) && routes.MTUMetricOf(echo.Body) == l.Want
	give := w.back || n > 1
	var err error
	if !same || !give {
		err = a.bookRepair(l, echo, same)
	}
	if !same {
		a.stats.Repairs++
		failpoint("lock-stale")
		a.noted("the route's owner changed it while we wrote: the owner's version is written again", "route", k.String())
	}
	if give {
		if !same {
			if err := a.giveBack(plan.Unlock{Route: l.Route, Was: l.Want})[0]; err != nil {
				a.failed("the owner's version can't be written again", err, "route", k.String())
			}
		}
		a.st.claim(k, nil)
		a.unbook(lockID(k))
		return
	}
	switch {
	case err != nil && same:
		a.failed("journal can't be written", err)
	case same:
		a.st.claim(k, &plan.LockClaim{Was: l.Owner, Ours: l.Want})
	case err != nil:
		a.failed("journal can't be written", err)
		l.Want = l.Owner // without a journal entry, no lock
		fallthrough
	default:
		a.writeLocks([]plan.Lock{l}, true)
	}
}

// giveBack writes routes with their owners' MTU metrics, and returns the error of each.
func (a *Agent) giveBack(list ...plan.Unlock) []error {
	out := make([]error, len(list))
	var writes []routes.Write
	var at []int
	for i, u := range list {
		msg, err := routes.EncodeLock(u.Route, u.Was)
		if err != nil {
			out[i] = err
			continue
		}
		a.st.writing[u.Route.Key()] = &write{want: u.Was, back: true}
		writes, at = append(writes, routes.Write{Op: routes.OpReplace, Msg: msg}), append(at, i)
	}
	for n, res := range a.results(writes) {
		i := at[n]
		k := list[i].Route.Key()
		if res.Err == nil {
			a.st.writing[k].seq = res.Seq
			continue
		}
		delete(a.st.writing, k)
		if !errors.Is(res.Err, unix.ENOENT) && !errors.Is(res.Err, unix.ESRCH) { // gone: there is nothing to give back
			out[i] = res.Err
		}
	}
	return out
}

const (
	fightWindow = 10 * time.Second
	fightWrites = 10
	fightRest   = time.Minute
)

// mayWrite bounds how often one route is locked again: an owner that replaces its route wipes
// the lock, and we put it back without a fight.
func (a *Agent) mayWrite(k routes.Key, now time.Time) bool {
	f := a.st.fights[k]
	may, rests := f.once(now)
	a.st.fights[k] = f
	if rests {
		a.st.resting[k] = true
		a.notice("a route does not keep its lock (its owner replaces it, or the kernel refuses): resting", "route", k.String(), "for", fightRest)
	}
	return may
}

// once counts a write and says whether it may be done; rests says that the rest begins now.
func (f *fight) once(now time.Time) (may, rests bool) {
	if now.Before(f.until) {
		return false, false
	}
	if now.Sub(f.since) > fightWindow {
		*f = fight{since: now}
	}
	if f.n++; f.n <= fightWrites {
		return true, false
	}
	f.until = now.Add(fightRest)
	return false, true
}

// rests reports whether a lock is not written for now. One that isn't any more is taken out of resting.
func (s *state) rests(k routes.Key, now time.Time) bool {
	if now.Before(s.fights[k].until) {
		return true
	}
	delete(s.resting, k)
	return false
}

// settle forgets the writes that are too long ago to count.
func (a *Agent) settleFights(now time.Time) {
	if now.Before(a.st.settleAt) {
		return // those that stay for so long count as little
	}
	a.st.settleAt = now.Add(fightWindow / 10)
	over := func(f fight) bool { return now.Sub(f.since) > fightWindow && !now.Before(f.until) }
	a.st.fights = without(a.st.fights, func(_ routes.Key, f fight) bool { return over(f) })
	a.st.placed = without(a.st.placed, func(_ plan.ShapeID, f fight) bool { return over(f) })
	a.st.cloned = without(a.st.cloned, func(_ clonePlace, c clonedAt) bool { return over(c.fight) })
	a.st.deleted = without(a.st.deleted, func(_ routes.Rule, at time.Time) bool { return now.Sub(at) > fightWindow })
}

// without deletes from a map. One that becomes empty is given up: it takes as long to go through as when it was full.
func without[K comparable, V any](m map[K]V, del func(K, V) bool) map[K]V {
	if len(m) == 0 {
		return m
	}
	if maps.DeleteFunc(m, del); len(m) == 0 {
		return map[K]V{}
	}
	return m
}

// stuckAfter is how often a restore tries to give a route's MTU back. The kernel refuses to
// write a multipath route one of whose devices is down.
const stuckAfter = 3

// stuckRetry is how soon a running agent tries again.
const stuckRetry = 30 * time.Second

// stuckError says which routes a restore could not give their MTU back; nil if there is none.
func (a *Agent) stuckError() error {
	var stuck []string
	for k := range a.st.locks {
		if a.st.stuck[k] >= stuckAfter {
			stuck = append(stuck, k.String())
		}
	}
	if len(stuck) == 0 {
		return nil
	}
	slices.Sort(stuck)
	return fmt.Errorf("agent: the kernel refuses to give the MTU of these routes back: %s; the journal keeps them, run `tsoctl restore` once their devices are up", strings.Join(stuck, ", "))
}

// unlock gives routes their owner's MTU metric back.
func (a *Agent) unlock(list []plan.Unlock) {
	for part := range slices.Chunk(list, writesAtOnce) {
		if a.halt.Load() {
			return
		}
		var done []string
		for i, err := range a.giveBack(part...) {
			u := part[i]
			k := u.Route.Key()
			if err != nil {
				a.stuckAt(k, err)
				continue
			}
			failpoint("unlock-written")
			delete(a.st.stuck, k)
			a.st.claim(k, nil)
			delete(a.st.fights, k)
			done = append(done, lockID(k))
			if what := "mtu given back"; !a.onlyCounted(what) {
				a.did(what, "route", k.String(), "mtu", u.Was.MTU)
			}
		}
		if len(done) > 0 {
			a.unbook(done...)
		}
		a.keepUp()
	}
}

// stuckAt counts that a route could not be given back.
func (a *Agent) stuckAt(k routes.Key, err error) {
	if errors.Is(err, unix.ENODEV) && a.st.stuck[k] == 0 {
		// The device is gone, and its event on the way, as a rule: the claim goes with the route.
		a.log.Debug("mtu can't be given back", "err", err, "route", k.String())
	} else {
		a.failed("mtu can't be given back", err, "route", k.String())
	}
	a.st.stuck[k]++
}
