package agent

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"os"
	"time"

	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

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
		if holds = holds[n:]; a.halt.Load() {
			return
		}
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
	if !retaken || a.st.unsure[k] {
		return true
	}
	if a.st.retakes[k]++; a.st.retakes[k] == 1 {
		a.noted("a held feature was turned on: overruled once", "device", h.Device.Name, "feature", h.Feature)
		return true
	}
	a.st.contested[k] = "somebody turned it on again after it was overruled once"
	a.st.unhold(k)
	a.unbook(holdID(k))
	a.notice("hold is contested: staying out until its cause is gone", "device", h.Device.Name, "feature", h.Feature)
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
		a.listenFor(dev, due, now)
		a.st.know(now)
	}
	var refused *ethtool.RefusedError
	if err != nil && !errors.As(err, &refused) {
		if due = a.afterFailedSet(dev, due, err); len(due) == 0 {
			return
		}
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
		a.st.hold(k, a.claimOf(h))
		delete(a.st.unsure, k)
		delete(a.st.release, k)
		a.did("feature held off", "device", dev.Name, "feature", h.Feature, "because", cmp.Or(causes(h.Because, h.Keys), h.Why))
	}
	if again {
		a.reflap(dev.Index, at)
	}
}

// settleUnsure ends the doubt about holds whose feature is known to be off.
func (a *Agent) settleUnsure() {
	for k := range a.st.unsure {
		if s, ok := a.st.features[routes.Ifindex(k.Index)].Get(k.Feature); ok && !s.Wanted {
			delete(a.st.unsure, k)
		}
	}
}

// afterFailedSet reads what came of a Set whose outcome is not known, and returns the holds that
// are in place. A claim is dropped only if its feature is known to be on. While that can't be read
// the claim stays, and does not count as one that somebody overruled.
func (a *Agent) afterFailedSet(dev ethtool.Device, due []plan.Hold, failed error) []plan.Hold {
	now, err := a.et.Features(dev)
	if err != nil {
		for _, h := range due {
			k := plan.HoldKey{Index: dev.Index, Feature: h.Feature}
			a.st.hold(k, a.claimOf(h))
			a.st.unsure[k] = true
		}
		if !errors.Is(err, os.ErrNotExist) {
			a.failed("features were to be held off, and can't be read back", errors.Join(failed, err), "device", dev.Name)
		} else {
			// Renamed, re-created, moved or gone: its events are on the way, and so is another plan.
			a.log.Debug("device to hold is gone", "device", dev.Name)
		}
		delete(a.st.features, routes.Ifindex(dev.Index))
		a.st.changes.Devices = true
		a.look(routes.Ifindex(dev.Index))
		return nil
	}
	a.st.know(now)
	var held, on []plan.Hold
	for _, h := range due {
		if s, ok := now.Get(h.Feature); ok && !s.Wanted {
			held = append(held, h)
			continue
		}
		on = append(on, h)
		a.dropHold(plan.HoldKey{Index: dev.Index, Feature: h.Feature})
	}
	if len(on) > 0 {
		a.failed("features can't be set", failed, "device", dev.Name)
		a.refuse(dev, on, failed.Error())
	}
	return held
}

func (a *Agent) refuse(dev ethtool.Device, holds []plan.Hold, why string) {
	for _, h := range holds {
		a.st.refused[plan.HoldKey{Index: dev.Index, Feature: h.Feature}] = why
		a.notice("feature can't be held", "device", dev.Name, "feature", h.Feature, "why", why)
	}
}

func (a *Agent) dropHold(k plan.HoldKey) {
	a.st.unhold(k)
	delete(a.st.retakes, k)
	delete(a.st.unsure, k)
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
		if ours && len(h.Keys) == 0 && !a.st.db.Stale() && a.wanes(pl.Causes(&h)) {
			wane(k)
		}
	}
	for _, k := range keys {
		if due := wane(k); (a.once || a.goal == restoreAll || !now.Before(due)) && !a.halt.Load() {
			a.release(k, now)
		}
	}
	for k := range a.st.release {
		if !waning[k] {
			delete(a.st.release, k) // the cause is back, or a mirror is stale
		}
	}
}

// wanes reports whether there are causes, and all are gone.
func (a *Agent) wanes(causes iter.Seq[xfrmwatch.CoverageID]) bool {
	any := false
	for id := range causes {
		if any = true; a.st.lives(id) {
			return false
		}
	}
	return any
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

// unheardFor bounds for how long the event of a write of features is waited for. It comes within milliseconds, but for a storm.
const unheardFor = 10 * time.Second

// listenFor notes that an event will tell of features that were just switched off.
func (a *Agent) listenFor(dev ethtool.Device, due []plan.Hold, now *ethtool.Features) {
	before := a.st.features[routes.Ifindex(dev.Index)]
	for _, h := range due {
		was, known := before.Get(h.Feature)
		if is, ok := now.Get(h.Feature); ok && !is.Wanted && (!known || was.Wanted) {
			a.st.unheard[dev.Index] = a.clock()
			return
		}
	}
}

// strayed is the device that was hit by what was written last to one that is gone, as it was made with that one's index and name; nil for none. A
// write tells of the device in the same stream of events as its end does: where the end comes first, the write came behind it. The kernel itself compares
// index and name (ethtool.Client.Set), and has nothing else to tell two devices apart.
func (a *Agent) strayed(i routes.Ifindex) *routes.Link {
	at, unheard := a.st.unheard[ethtool.Ifindex(i)]
	delete(a.st.unheard, ethtool.Ifindex(i))
	l := a.st.fib.Link(i)
	if !unheard || l == nil || a.links == nil || a.clock().Sub(at) > unheardFor {
		return nil
	}
	next, lerr := a.links.ReadLink(i)
	now, err := a.et.Features(ethtool.Device{Index: ethtool.Ifindex(i), Name: l.Name})
	if errors.Join(lerr, err) != nil {
		return nil // there is none
	}
	a.noted("a device was made anew just when features were held off on it: they are given back", "device", l.Name)
	a.st.know(now)
	return next
}

// forgetDevice drops the claims on a device that is gone. One that comes under its name or
// index is another one.
func (a *Agent) forgetDevice(i routes.Ifindex) {
	for _, k := range a.st.holdsOn(i) {
		a.dropHold(k)
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
