package agent

import (
	"maps"
	"time"
)

// Most of what happens on a host with a full table of routes concerns nothing that is covered: such a change goes into the mirror, and that
// is all. No round is made for it.
//
//	events ──> mirror ──> something near? a timer? anything else? ──no──> wait for more
//	                                    │ yes
//	                                    v
//	                                  round

// due is what the last round left.
type due struct {
	at      time.Time // when it wanted another one without an event, zero for never
	reached bool      // its goal
	failed  uint64    // Counters.Failed ahead of it

	forwards time.Time // when it was looked last whether the host forwards, while no round did
}

func (d *due) after(now time.Time, next time.Duration, reached bool) {
	d.at, d.reached = time.Time{}, reached
	if next > 0 {
		d.at = now.Add(next)
	}
}

// still reports whether a round would find nothing to do: what came since the last one were routes that nothing is near. After one in which
// something failed, each event is a reason to try again.
func (a *Agent) still(now time.Time) bool {
	st := a.st
	return a.lastP != nil && !a.news && !st.touched && st.changes.None() && st.ready() && a.goal == protect && !a.once && a.due.failed == a.stats.Failed &&
		len(st.orders)+len(st.arrivals)+len(st.inflight)+len(a.early) == 0 && (a.due.at.IsZero() || now.Before(a.due.at)) && !a.forwardsOther(now)
}

// forwardsAgain is how long it is not looked again whether the host forwards, of which the kernel tells nothing, while no round does.
const forwardsAgain = time.Second

// forwardsOther reports whether the host forwards what it did not, or the other way round.
func (a *Agent) forwardsOther(now time.Time) bool {
	if now.Sub(a.due.forwards) < forwardsAgain {
		return false
	}
	a.due.forwards = now
	return !maps.Equal(a.forwards.read(a.st.forwarding), a.st.forwarding)
}

// pass goes on without a round.
func (a *Agent) pass(now time.Time) (next time.Duration, reached bool) {
	a.since = time.Time{}
	a.reports.changed(a)
	a.weigh(a.due.reached)
	a.heap.Did(int(a.stats.Events - a.toldWork))
	a.toldWork = a.stats.Events
	return untilDue(a.due.at, now), a.due.reached
}
