package agent

import (
	"context"
	"errors"
	"sync/atomic"
	"weak"
)

// A report has as many verdicts in words as there are coverages, and most rounds are of no interest to anybody. So it
// is made when somebody asks:
//
//	round ── glance ──> namespaces, systemd, pauses      (counts)
//	  └── version        observe ── the loop copies ──> a snapshot ──> words      (in the asker's time)
//
// It is made at most once for a version. Those who ask meanwhile get the one that is under way if it is as new as their
// question, so that many cost as little as one.

// reports makes reports. All but what is said otherwise is safe for concurrent use.
type reports struct {
	// version counts what can have changed a report, 0 before the first plan. The loop raises it.
	version atomic.Uint64
	newest  atomic.Pointer[made]
	// turn holds the token of who makes one. It can be waited for until a context ends.
	turn chan struct{}
	// looping says that the loop was started: it, and nobody else, reads its state until it ends.
	looping atomic.Bool
	// last is of a loop that has ended.
	last atomic.Pointer[snapshot]
}

// observed is what somebody who asked has got. It is immutable.
type observed struct {
	version uint64
	report  *Report
	figures *Figures
}

func newReports() reports { return reports{turn: make(chan struct{}, 1)} }

// Report is the newest report, nil before the first plan. It is as new as the question. It is not to be changed.
// The loop itself must not ask, nor may anybody who holds what the loop waits for.
func (a *Agent) Report() *Report {
	o, err := a.observe(context.Background())
	if err != nil {
		return nil
	}
	return o.report
}

// observe is Report with the figures, until a context ends. The error is errNotReady before the first plan.
func (a *Agent) observe(ctx context.Context) (*observed, error) {
	r := &a.reports
	asked := r.version.Load()
	if asked == 0 {
		return nil, errNotReady
	}
	if o := r.newest.Load().report(); o != nil && o.version >= asked {
		return o, nil
	}
	select {
	case r.turn <- struct{}{}:
		defer func() { <-r.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if o := r.newest.Load().report(); o != nil && o.version >= asked {
		return o, nil
	}
	s, err := r.take(ctx, a)
	if err != nil {
		return nil, err
	}
	o := a.tell(s)
	a.keep(o)
	return o, nil
}

// made is a report that somebody has got. In words a large plan takes several times the memory that it takes otherwise, so
// that such a report stays only until the next collection of garbage.
type made struct {
	small *observed
	large weak.Pointer[observed]
}

// largeReport is how many coverages and clones a large report has: it takes some megabytes.
const largeReport = 10_000

// report is nil for none, or none any more.
func (m *made) report() *observed {
	switch {
	case m == nil:
		return nil
	case m.small != nil:
		return m.small
	}
	return m.large.Value()
}

// keep keeps a report for others who ask.
func (a *Agent) keep(o *observed) {
	n := len(o.report.Coverages) + len(o.report.Clones)
	if n < largeReport {
		a.reports.newest.Store(&made{small: o})
		return
	}
	a.reports.newest.Store(&made{large: weak.Make(o)})
	a.heap.Did(n)
}

// take is a snapshot of the state: the loop makes it, or has left it behind. Before there is a loop, whoever makes the
// rounds owns the state.
func (r *reports) take(ctx context.Context, a *Agent) (s *snapshot, err error) {
	if !r.looping.Load() {
		return a.snapshot(), nil
	}
	err = a.call(ctx, func() { s = a.snapshot() })
	if errors.Is(err, errEndedAgent) {
		return r.last.Load(), nil
	}
	return s, err
}

// changed is called by the loop, or who has it after its end, when a report would say something else.
func (r *reports) changed(a *Agent) {
	if a.lastP == nil {
		return
	}
	r.version.Add(1)
	if r.last.Load() != nil {
		r.last.Store(a.snapshot())
	}
}

// end leaves behind what the last report is made of. Nothing of it changes once the loop has ended.
func (r *reports) end(a *Agent) {
	if a.lastP != nil {
		r.last.Store(a.snapshot())
	}
}
