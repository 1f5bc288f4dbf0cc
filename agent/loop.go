package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"tsoagent/agent/api"
)

// Run follows the kernel until the context ends, then restores or keeps what is held as the
// configuration says: with keep, only the rules and clones go, which nobody would follow. The error is nil after a graceful stop.
func (a *Agent) Run(ctx context.Context) error {
	a.watchOver()
	watch, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		a.reports.end(a)
		close(a.ended)
		if !a.ringGoes {
			a.ring.end()
		}
	}()
	defer a.end()
	defer cancel()
	failed := make(chan error, 1)
	if !a.once { // which is the loop's from here on
		wg.Go(func() { a.watchClamps(watch) })
		wg.Go(func() { a.watchLanes(watch) })
		wg.Go(func() { a.watchConnections(watch) })
	}
	wg.Go(func() {
		if err := a.sources.run(watch, a.inbox); err != nil && watch.Err() == nil {
			failed <- err
		}
	})
	return a.loop(ctx, failed)
}

// stopWithin bounds how long a graceful stop may take to restore.
const stopWithin = 30 * time.Second

func (a *Agent) loop(ctx context.Context, failed <-chan error) error {
	a.reports.looping.Store(true)
	timer := time.NewTimer(0)
	defer timer.Stop()
	resync := time.NewTimer(a.resyncIn())
	defer resync.Stop()
	done := ctx.Done()
	var deadline <-chan time.Time
	for {
		select {
		case <-done:
			done = nil
			cause := context.Cause(ctx)
			renewed := errors.Is(cause, errRenew)
			if renewed {
				a.event(api.EventState, renewalOf(cause))
			}
			if a.once || a.cfg.Mode == Observe {
				return a.stopped(ctx)
			}
			back := errors.Is(cause, errLetGo) || errors.Is(cause, errRenewBack)
			if renewed && !back {
				return nil // another agent takes over
			}
			if a.lastP == nil && !back && a.heir == "" {
				// Not even read yet: this run has written nothing.
				if n := a.claims(); n > 0 {
					return fmt.Errorf("agent: stopped before the kernel's state was read: %s still in place; run `tsoctl restore`", plural(n, "change of an earlier run is", "changes of an earlier run are"))
				}
				return nil
			}
			a.goal, a.once, a.st.paused, a.st.obeyed = restoreAll, true, nil, nil
			if a.cfg.OnStop == KeepOnStop && !back {
				// Nobody follows the rules and clones from now on; holds and in-place locks don't go stale.
				a.goal = restoreStale
			}
			says, order := "stopping", "the agent stops"
			if renewed {
				says, order = "giving everything back for another configuration", takenOver
			}
			a.says(says, "on_stop", a.cfg.OnStop, "holds", len(a.st.holds), "locks", len(a.st.locks))
			a.st.causes.order, a.st.touched = order, true
			deadline = time.After(stopWithin)
			timer.Reset(0)
		case <-deadline:
			return fmt.Errorf("agent: not everything could be restored within %s; still in place: %s; run `tsoctl restore`", stopWithin, a.left())
		case err := <-failed:
			return fmt.Errorf("agent: %w", err)
		case fn := <-a.calls:
			fn()
			continue
		case <-resync.C:
			a.sources.resync()
			a.st.changes.All = true // the plan is looked at as a whole, too
			a.readProbed()
			a.inbox.post(batch{offer: true, resync: true})
			a.diagnoseSoon()
			resync.Reset(a.resyncIn())
			continue
		case <-a.inbox.signal:
		case <-timer.C:
		}
		next, reached := a.step(time.Now())
		if reached && a.once {
			return a.stuckError()
		}
		timer.Stop()
		if next > 0 {
			timer.Reset(next)
		}
	}
}

func (a *Agent) stopped(ctx context.Context) error {
	if a.once {
		return ctx.Err()
	}
	return nil
}

// resyncIn spreads full resyncs by a tenth, so that the machines of a fleet don't do it at once.
func (a *Agent) resyncIn() time.Duration {
	d := time.Duration(a.cfg.ResyncEvery)
	return d + time.Duration(rand.Int64N(int64(d)/5+1)) - d/10
}

// step takes in what is pending, as much of it as one round takes, then plans and acts once. next is when it wants to be called
// again without an event, 0 for not; reached says that the goal is reached.
func (a *Agent) step(now time.Time) (next time.Duration, reached bool) {
	left := a.takeEvents()
	if a.still(now) {
		next, reached = a.pass(now)
	} else {
		a.due.failed = a.stats.Failed
		next, reached = a.act(now)
		a.due.after(now, next, reached)
	}
	if left {
		return time.Nanosecond, false // the rest is for the next rounds
	}
	return next, reached
}

// act plans and acts once.
func (a *Agent) act(now time.Time) (next time.Duration, reached bool) {
	a.obey(now)
	if a.lastP == nil {
		if !a.st.ready() {
			a.answerOrders() // nothing is written before
			return 0, false
		}
		a.checkAdopted()
	}
	a.tellNICs()
	if a.st.ready() {
		a.takeIn(now)
	}
	if wait := a.awaitEchoes(now); wait > 0 {
		return wait, false
	}
	a.stats.Rounds++
	next, reached = a.round(now)
	if len(a.early) > 0 { // the signal for it was taken, too
		next = time.Nanosecond
	}
	a.tellWork(reached)
	return next, reached
}

// tellWork tells how much was done since the last round, and once that the start is over.
func (a *Agent) tellWork(reached bool) {
	n := int(a.stats.Events - a.toldWork)
	if !a.st.planner.Followed() {
		n += a.lastP.CoverageCount()
	}
	a.toldWork = a.stats.Events
	a.weigh(reached)
	a.heap.Did(n)
	if reached && !a.settled {
		a.settled = true
		a.heap.Settled()
	}
}

var errEndedAgent = errors.New("the agent of this namespace has ended, or another one takes its place: try again in a moment")

// Call runs fn in the loop and waits for it, so that fn may read the state.
func (a *Agent) call(ctx context.Context, fn func()) error {
	done := make(chan struct{})
	select {
	case a.calls <- func() { fn(); close(done) }:
	case <-ctx.Done():
		return ctx.Err()
	case <-a.ended:
		return errEndedAgent
	}
	<-done
	return nil
}

// errLetGo is the cause with which a context ends when the agent is to give everything back,
// whatever on_stop says: nobody follows the namespace from then on.
var errLetGo = errors.New("the namespace is let go")
