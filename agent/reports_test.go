package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// agree holds what is kept from round to round to what comes out from scratch: the counts to the report, the ways of
// outer packets to the kernel's answers now, and the plan to one that is made of the same input.
func (w *world) agree() {
	w.t.Helper()
	w.loops.Lock()
	if w.lookup == nil && w.a.lastP != nil {
		w.sameWays()
	}
	n := 0
	for i := range w.a.st.heldOn {
		for _, k := range w.a.st.holdsOn(routes.Ifindex(i)) {
			if _, ours := w.a.st.holds[k]; ours {
				n++
			}
		}
	}
	if n != len(w.a.st.holds) {
		w.t.Errorf("by device there are %d holds, in all %d", n, len(w.a.st.holds))
	}
	w.samePlan()
	w.loops.Unlock()
	g, r := w.a.glance.Load(), w.a.Report()
	if (g == nil) != (r == nil) {
		w.t.Errorf("the glance is %+v, the report %+v", g, r)
	}
	if g == nil || r == nil {
		return
	}
	apart := *r
	apart.Paused = nil
	want := glance{
		faulty: apart.Degraded(),
		mode:   r.Mode, paused: r.Paused, degraded: r.Degraded(), policies: r.Policies, coverages: len(r.Coverages),
		holds: len(r.Holds), locks: len(r.Locks), rules: len(r.Rules), clones: len(r.Clones),
	}
	if *g != want {
		w.t.Errorf("the glance is %+v, and the report has %+v", *g, want)
	}
}

func TestReportIsMadeOnlyWhenItIsAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, dedicatedOff())
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA, partPolicy, partSA)
		w.mustProtect()
		if w.a.reports.newest.Load() != nil {
			t.Error("a report was made that nobody has asked for")
		}
		first := w.a.Report()
		if first == nil || len(first.Coverages) != 2 || w.a.Report() != first {
			t.Errorf("the report is %+v, and another one the next time", first)
		}
		// As new as the question: the event is behind the loop.
		w.deleteRoute("10.2.0.0/16")
		synctest.Wait()
		if r := w.a.Report(); r == first || len(r.Locks) != 0 {
			t.Errorf("after the route has gone: %+v", r.Locks)
		}
		w.addRoute("10.2.0.0/16", hop{oif: ipsec1})
		synctest.Wait()
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		// The last one stays, also if nobody has asked in time.
		if r := w.a.Report(); r == nil || len(r.Holds) != 0 || r.Counters.Rounds != w.a.stats.Rounds || w.a.Report() != r {
			t.Errorf("the last report: %+v", r)
		}
	})
}

// Those who ask while a report is under way share it, and nobody waits for a loop that is busy for longer than he likes.
func TestManyWhoAskShareAReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, dedicatedOff())
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA)
		busy := make(chan struct{})
		go func() { _ = w.a.call(t.Context(), func() { <-busy }) }()
		synctest.Wait()
		const many = 50
		got := make([]*Report, many)
		var wg sync.WaitGroup
		for i := range many {
			wg.Go(func() { got[i] = w.a.Report() })
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if o, err := w.a.observe(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("of a loop that is busy: %+v, %v", o, err)
		}
		close(busy)
		wg.Wait()
		for _, r := range got {
			if r == nil || r != got[0] {
				t.Fatalf("reports %p and %p for one state", r, got[0])
			}
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// Some ask all the time, from before the start until after the end.
func TestReportsWhileTheLoopComesAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, dedicatedOff())
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				var last *Report
				for ctx.Err() == nil {
					r := w.a.Report()
					if r == nil && last != nil || r != nil && last != nil && r.Counters.Rounds < last.Counters.Rounds {
						t.Errorf("a report of %+v after one of %+v", r, last.Counters)
						return
					}
					last = r
					time.Sleep(time.Millisecond) // the bubble's
				}
			})
		}
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA)
		for range 20 {
			w.xfrm(gone(tunnelPolicy))
			time.Sleep(3 * time.Millisecond)
			w.xfrm(tunnelPolicy)
			time.Sleep(3 * time.Millisecond)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		time.Sleep(5 * time.Millisecond)
		cancel()
		wg.Wait()
	})
}

// samePlan compares the plan that was followed with the one from scratch. What was changed since without the planner
// being told is a fault.
func (w *world) samePlan() {
	w.t.Helper()
	ch := w.a.st.changes
	if w.a.lastP == nil || w.a.goal != protect || ch.All || ch.Devices || len(ch.Dsts)+len(ch.Policies)+len(ch.SAs)+len(ch.Peers) > 0 {
		return // the next round sees to it
	}
	text := func(pl *plan.Plan) string {
		k := pl.Keep()
		return fmt.Sprintf("holds %v\nlocks %v\nshapes %v\nlanes %v\ntunnels %v\nclamp %v\nmtus %v %v\nverdicts %+v\ncurrent %d",
			k.Holds, k.Locks, k.Shapes, k.Lanes, k.Tunnels, k.Clamp, k.MTU, k.DeviceMTUs, k.Verdicts, len(k.Current))
	}
	in := w.a.lastIn
	if got, want := text(w.a.lastP), text(plan.Make(in)); got != want {
		w.t.Errorf("the plan that was followed is another one (-from scratch +followed):\n%s", cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")))
	}
}
