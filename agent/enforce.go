package agent

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// enforce does the steps in their order. It reports whether anything was written, so that the
// next round looks whether it is in place.
func (a *Agent) enforce(pl *plan.Plan, s *plan.Steps, now time.Time) bool {
	before := a.stats.Actions
	a.settleFights(now)
	a.moveClones(pl, s, now)
	a.setLocks(s.Locks, now)
	a.setHolds(s.Holds, false, now)
	a.setHolds(s.Retaken, true, now)
	a.dropTables(s)
	a.unlock(s.Unlocks)
	a.unhold(pl, s.Unholds, now)
	a.forget(s)
	a.forgiveHolds(pl)
	if len(a.st.inflight) > 0 {
		a.st.patience = now.Add(echoPatience)
	}
	return a.stats.Actions != before
}

// echoPatience is how long the loop waits for the notification of its own write. It comes
// within microseconds; only a lost event makes it wait so long.
const echoPatience = 500 * time.Millisecond

// did counts a write, and logs it with its cause.
func (a *Agent) did(what string, args ...any) {
	a.stats.Actions++
	a.log.Info(what, args...)
}

func (a *Agent) failed(what string, err error, args ...any) {
	a.stats.Failed++
	a.log.Warn(what, append(args, "err", err)...)
}

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
	for _, l := range due {
		if routes.MTUMetricOf(l.Route.Body) == l.Want {
			// A crash came ahead of another value. IPv4 would tell nothing of the write.
			a.st.locks[l.Route.Key()] = plan.LockClaim{Was: l.Owner, Ours: l.Want}
			continue
		}
		a.setLock(l)
	}
}

func (a *Agent) setLock(l plan.Lock) {
	k := l.Route.Key()
	msg, err := routes.EncodeLock(l.Route, l.Want)
	if err == nil {
		var seq uint32
		a.st.writing[k] = &write{want: l.Want}
		if seq, err = a.rt.Replace(msg); err == nil {
			a.st.writing[k].seq = seq
			a.st.inflight[seq] = struct{}{}
			a.st.locks[k] = plan.LockClaim{Was: l.Owner, Ours: l.Want}
			failpoint("lock-written")
			a.did("mtu locked", "route", k.String(), "mtu", l.Want.MTU, "because", ids(l.Because))
			return
		}
		delete(a.st.writing, k)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		// The route went away in between; its event is on the way.
		a.log.Debug("route to lock is gone", "route", k.String())
	} else {
		a.failed("mtu can't be locked", err, "route", k.String())
	}
	if _, had := a.st.locks[k]; !had {
		a.unbook(lockID(k))
	}
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
	if !same {
		a.stats.Repairs++
		failpoint("lock-stale")
		a.log.Info("the route's owner changed it while we wrote: the owner's version is written again", "route", k.String())
	}
	if w.back || n > 1 {
		if !same {
			if err := a.giveBack(l.Route, l.Want); err != nil {
				a.failed("the owner's version can't be written again", err, "route", k.String())
			}
		}
		delete(a.st.locks, k)
		a.unbook(lockID(k))
		return
	}
	err := a.journal.Put(a.lockEntries([]plan.Lock{l})...)
	switch {
	case err != nil && same:
		a.failed("journal can't be written", err)
	case same:
		a.st.locks[k] = plan.LockClaim{Was: l.Owner, Ours: l.Want}
	case err != nil:
		a.failed("journal can't be written", err)
		l.Want = l.Owner // without a journal entry, no lock
		fallthrough
	default:
		a.setLock(l)
	}
}

// giveBack writes a route with its owner's MTU metric.
func (a *Agent) giveBack(r routes.Route, was plan.MTUMetric) error {
	k := r.Key()
	msg, err := routes.EncodeLock(r, was)
	if err != nil {
		return err
	}
	w := &write{want: was, back: true}
	a.st.writing[k] = w
	if w.seq, err = a.rt.Replace(msg); err != nil {
		delete(a.st.writing, k)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			return nil // gone: there is nothing to give back
		}
		return err
	}
	a.st.inflight[w.seq] = struct{}{}
	return nil
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
		a.log.Warn("somebody keeps replacing a route that is to be locked: resting", "route", k.String(), "for", fightRest)
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

// settle forgets the writes that are too long ago to count.
func (a *Agent) settleFights(now time.Time) {
	over := func(f fight) bool { return now.Sub(f.since) > fightWindow && !now.Before(f.until) }
	maps.DeleteFunc(a.st.fights, func(_ routes.Key, f fight) bool { return over(f) })
	maps.DeleteFunc(a.st.placed, func(_ plan.ShapeID, f fight) bool { return over(f) })
}

// unlock gives routes their owner's MTU metric back.
func (a *Agent) unlock(list []plan.Unlock) {
	for _, u := range list {
		k := u.Route.Key()
		if err := a.giveBack(u.Route, u.Was); err != nil {
			a.failed("mtu can't be given back", err, "route", k.String())
			continue
		}
		failpoint("unlock-written")
		delete(a.st.locks, k)
		delete(a.st.fights, k)
		a.unbook(lockID(k))
		a.did("mtu given back", "route", k.String(), "mtu", u.Was.MTU)
	}
}

// setHolds switches features off, device by device: journal first, then the kernel. A retaken
// hold overrules somebody who turned the feature on; that happens once.
func (a *Agent) setHolds(holds []plan.Hold, retaken bool, now time.Time) {
	for len(holds) > 0 {
		dev := holds[0].Device
		n := 0
		for n < len(holds) && holds[n].Device == dev {
			n++
		}
		var due []plan.Hold
		for _, h := range holds[:n] {
			if a.mayHold(h, retaken) {
				due = append(due, h)
			}
		}
		if len(due) > 0 {
			a.holdDevice(dev, due, now)
		}
		holds = holds[n:]
	}
}

func (a *Agent) mayHold(h plan.Hold, retaken bool) bool {
	k := plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}
	if _, contested := a.st.contested[k]; contested {
		return false
	}
	if _, refused := a.st.refused[k]; refused {
		return false
	}
	if !retaken {
		return true
	}
	if a.st.retakes[k]++; a.st.retakes[k] == 1 {
		a.log.Info("a held feature was turned on: overruled once", "device", h.Device.Name, "feature", h.Feature)
		return true
	}
	a.st.contested[k] = "somebody turned it on again after it was overruled once"
	delete(a.st.holds, k)
	a.unbook(holdID(k))
	a.log.Warn("hold is contested: staying out until its cause is gone", "device", h.Device.Name, "feature", h.Feature)
	return false
}

func (a *Agent) holdDevice(dev ethtool.Device, due []plan.Hold, at time.Time) {
	want := map[ethtool.Feature]bool{}
	for _, h := range due {
		want[h.Feature] = false
	}
	failpoint("hold-journal-before")
	if err := a.journal.Put(a.holdEntries(due)...); err != nil {
		a.failed("journal can't be written, nothing is held", err, "device", dev.Name)
		return
	}
	failpoint("hold-journal-after")
	now, err := a.et.Set(dev, want)
	failpoint("hold-written")
	if now != nil {
		a.st.know(now)
	}
	var refused *ethtool.RefusedError
	if err != nil && !errors.As(err, &refused) && a.didHold(dev, due) {
		err = nil // done, but not read back
	}
	if err != nil && !errors.As(err, &refused) {
		for _, h := range due {
			a.dropHold(plan.HoldKey{Index: dev.Index, Feature: h.Feature})
		}
		if errors.Is(err, os.ErrNotExist) {
			// Renamed, re-created or gone: its events are on the way, and so is another plan.
			a.log.Debug("device to hold is gone", "device", dev.Name)
			delete(a.st.features, routes.Ifindex(dev.Index))
			a.look(routes.Ifindex(dev.Index))
			return
		}
		a.failed("features can't be set", err, "device", dev.Name)
		a.refuse(dev, due, err.Error())
		return
	}
	again := false
	for _, h := range due {
		k := plan.HoldKey{Index: dev.Index, Feature: h.Feature}
		if refused != nil {
			if state, no := refused.Refused[h.Feature]; no {
				a.dropHold(k)
				a.refuse(dev, []plan.Hold{h}, fmt.Sprintf("the device refuses to switch it off (it is %s)", state))
				continue
			}
		}
		_, had := a.st.holds[k]
		again = again || !had
		a.st.holds[k] = a.claimOf(h)
		delete(a.st.release, k)
		a.did("feature held off", "device", dev.Name, "feature", h.Feature, "because", ids(h.Because))
	}
	if again {
		a.reflap(dev.Index, at)
	}
}

// didHold reads whether all features are off after a Set whose outcome is not known.
func (a *Agent) didHold(dev ethtool.Device, due []plan.Hold) bool {
	now, err := a.et.Features(dev)
	if err != nil {
		return false
	}
	a.st.know(now)
	return !slices.ContainsFunc(due, func(h plan.Hold) bool {
		s, ok := now.Get(h.Feature)
		return !ok || s.Wanted
	})
}

func (a *Agent) refuse(dev ethtool.Device, holds []plan.Hold, why string) {
	for _, h := range holds {
		a.st.refused[plan.HoldKey{Index: dev.Index, Feature: h.Feature}] = why
		a.log.Warn("feature can't be held", "device", dev.Name, "feature", h.Feature, "why", why)
	}
}

func (a *Agent) dropHold(k plan.HoldKey) {
	delete(a.st.holds, k)
	delete(a.st.retakes, k)
	a.unbook(holdID(k))
}

// maxFlap is the longest time that a hold of a flapping carrier outlives its cause.
const maxFlap = 60 * time.Second

// unhold gives features back once it has been quiet. The time of a hold whose policies are all
// gone and only linger runs already, so that features are given back with the locks and not
// after waiting twice.
func (a *Agent) unhold(pl *plan.Plan, keys []plan.HoldKey, now time.Time) {
	if len(keys)+len(a.st.release)+len(a.st.lingering) == 0 {
		return
	}
	waning := map[plan.HoldKey]bool{}
	wane := func(k plan.HoldKey) time.Time {
		waning[k] = true
		if _, runs := a.st.release[k]; !runs {
			a.st.release[k] = now.Add(a.quiet(k.Index, now))
		}
		return a.st.release[k]
	}
	for _, h := range pl.Holds {
		k := plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}
		_, ours := a.st.holds[k]
		if ours && !a.st.db.Stale() && !slices.ContainsFunc(h.Because, a.st.lives) {
			wane(k)
		}
	}
	for _, k := range keys {
		if due := wane(k); a.once || !now.Before(due) {
			a.release(k, now)
		}
	}
	for k := range a.st.release {
		if !waning[k] {
			delete(a.st.release, k) // the cause is back, or a mirror is stale
		}
	}
}

// quiet is how long a carrier must be quiet: the longer the more it flaps.
func (a *Agent) quiet(i ethtool.Ifindex, now time.Time) time.Duration {
	base := time.Duration(a.cfg.RestoreAfter)
	f := a.st.flaps[i]
	if f.delay == 0 || now.Sub(f.last) > maxFlap {
		return base
	}
	return f.delay
}

// reflap notes that a carrier is held again: it flaps if it was released a short while ago.
func (a *Agent) reflap(i ethtool.Ifindex, now time.Time) {
	f, ok := a.st.flaps[i]
	if !ok {
		return
	}
	if now.Sub(f.last) > maxFlap {
		delete(a.st.flaps, i)
		return
	}
	f.delay = min(2*max(f.delay, time.Duration(a.cfg.RestoreAfter)), maxFlap)
	a.st.flaps[i] = f
}

func (a *Agent) release(k plan.HoldKey, now time.Time) {
	claim := a.st.holds[k]
	dev := claim.Device
	if l := a.st.fib.Link(routes.Ifindex(k.Index)); l != nil {
		dev.Name = l.Name // it may have been renamed
	}
	fresh, err := a.et.Features(dev)
	if err == nil {
		a.st.know(fresh)
		if s, ok := fresh.Get(k.Feature); ok && s.Wanted {
			return // somebody turned it on since; the next plan drops the claim
		}
		fresh, err = a.et.Set(dev, map[ethtool.Feature]bool{k.Feature: claim.Was})
	}
	if fresh != nil {
		a.st.know(fresh)
	}
	failpoint("unhold-written")
	switch {
	case errors.Is(err, os.ErrNotExist):
		// Gone or renamed, which its event tells: a device that is gone takes the claim along.
		a.st.release[k] = now.Add(time.Duration(a.cfg.RestoreAfter))
		return
	case err != nil:
		a.failed("feature can't be given back", err, "device", dev.Name, "feature", k.Feature)
		a.st.release[k] = now.Add(maxFlap)
		return
	}
	delete(a.st.release, k)
	f := a.st.flaps[k.Index]
	f.last = now
	a.st.flaps[k.Index] = f
	a.dropHold(k)
	a.did("feature given back", "device", dev.Name, "feature", k.Feature)
}

// forget drops claims on what is gone or was changed by somebody else since.
func (a *Agent) forget(s *plan.Steps) {
	for _, l := range s.LostLocks {
		delete(a.st.locks, l.Key)
		a.unbook(lockID(l.Key))
		if l.Changed {
			a.log.Info("a locked route was changed by somebody else: it stays as it is", "route", l.Key.String())
		}
	}
	for _, l := range s.LostHolds {
		name := a.st.holds[l.Key].Device.Name
		a.dropHold(l.Key)
		if l.Changed {
			a.log.Info("a held feature was changed by somebody else: it stays as it is", "device", name, "feature", l.Key.Feature)
		}
	}
}

// forgiveHolds ends contests and refusals whose cause is gone.
func (a *Agent) forgiveHolds(pl *plan.Plan) {
	if len(a.st.contested)+len(a.st.refused) == 0 {
		return
	}
	still := map[plan.HoldKey]bool{}
	for _, h := range pl.Holds {
		still[plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}] = true
	}
	for k := range a.st.contested {
		if !still[k] {
			delete(a.st.contested, k)
			delete(a.st.retakes, k)
		}
	}
	for k := range a.st.refused {
		if !still[k] {
			delete(a.st.refused, k)
		}
	}
}

// forgetDevice drops the claims on a device that is gone. One that comes under its name or
// index is another one.
func (a *Agent) forgetDevice(i routes.Ifindex) {
	for k := range a.st.holds {
		if routes.Ifindex(k.Index) == i {
			a.dropHold(k)
		}
	}
	for _, m := range []map[plan.HoldKey]string{a.st.contested, a.st.refused} {
		for k := range m {
			if routes.Ifindex(k.Index) == i {
				delete(m, k)
				delete(a.st.retakes, k)
			}
		}
	}
	for k := range a.st.release {
		if routes.Ifindex(k.Index) == i {
			delete(a.st.release, k)
		}
	}
	delete(a.st.flaps, ethtool.Ifindex(i))
}
