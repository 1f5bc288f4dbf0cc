package agent

import (
	"context"
	"log/slog"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/plan"
)

// enforce does the steps in their order. It reports whether anything was written, so that the
// next round looks whether it is in place.
func (a *Agent) enforce(pl *plan.Plan, s *plan.Steps, now time.Time) bool {
	before := a.stats.Actions
	stale := a.st.db.Stale() || a.st.fib.Stale()
	staleLanes := stale || a.st.keysStale
	for _, do := range [...]func(){
		func() { a.moveClones(pl, s, now) },
		func() { a.setLocks(s.Locks, now) },
		func() { a.setHolds(s.Holds, false, now) },
		func() { a.setHolds(s.Retaken, true, now) },
		func() { a.setLanes(pl, staleLanes, now) },
		func() { a.dropTables(s) },
		func() { a.unlock(s.Unlocks) },
		func() { a.unhold(pl, s.Unholds, now) },
		func() { a.takeLanes(pl, staleLanes, now) },
	} {
		if a.halt.Load() { // what is left is the next round's
			break
		}
		do()
	}
	a.forget(s)
	a.forgiveHolds(pl)
	a.st.wrote = time.Time{}
	return a.stats.Actions != before
}

// echoPatience is how long the loop waits for the notification of its own write, maxEchoPatience how long at most while there is much
// else. It comes within microseconds, behind what the kernel told of before; only a lost event makes it wait so long, or an IPv4 route that
// was written as it is, of which the kernel tells nothing.
const (
	echoPatience    = 500 * time.Millisecond
	maxEchoPatience = 10 * echoPatience
)

// awaitEchoes is how long the loop still waits for the notifications of its own writes, 0 for no longer. It begins with the step after
// the writes, which can take long themselves, and again with each one that brings events: those that are waited for are behind them.
func (a *Agent) awaitEchoes(now time.Time) time.Duration {
	st := a.st
	if len(st.inflight) == 0 {
		return 0
	}
	if st.wrote.IsZero() {
		st.wrote, st.patience = now, now.Add(echoPatience)
	}
	if a.brought && now.Sub(st.wrote) < maxEchoPatience {
		st.patience = now.Add(echoPatience)
	}
	if wait := st.patience.Sub(now); wait > 0 {
		return wait
	}
	clear(st.inflight)
	clear(st.writing)
	a.unseen = 0
	return 0
}

func (a *Agent) failed(what string, err error, args ...any) {
	a.tellDone()
	a.count(what, Failed)
	args = append(args, "err", err)
	a.log.Log(context.Background(), a.levelOf(api.EventFailed, what, slog.LevelWarn), what, args...)
	a.event(api.EventFailed, what, args...)
}

// levelOf is the level at which an action is logged, which is the one that is given unless there were very many of its sort.
func (a *Agent) levelOf(kind, what string, level slog.Level) slog.Level {
	if a.st.causes.made[alike{kind, what}] >= maxOfRound {
		return slog.LevelDebug
	}
	return level
}

// onlyCounted counts a write of which there were so many already that it is not told by itself, and reports whether that is so: it need
// not be put into words then.
func (a *Agent) onlyCounted(what string) bool {
	c := &a.st.causes
	sort := alike{api.EventDone, what}
	if c.made[sort] < maxOfRound || a.log.Enabled(context.Background(), slog.LevelDebug) {
		return false
	}
	c.made[sort]++
	a.count(what, Done)
	return true
}

// forget drops claims on what is gone or was changed by somebody else since.
func (a *Agent) forget(s *plan.Steps) {
	for _, l := range s.LostLocks {
		a.st.claim(l.Key, nil)
		delete(a.st.stuck, l.Key) // a later lock of such a route begins anew
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
