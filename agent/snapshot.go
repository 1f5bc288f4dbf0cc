package agent

import (
	"maps"
	"os"
	"slices"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/plan"
	"tsoagent/clamp"
	"tsoagent/lane"
	"tsoagent/routes"
	"tsoagent/sockopt"
)

// onlyLooks reports whether nothing is written, nor would be but for a pause.
func (a *Agent) onlyLooks() bool { return a.cfg.Mode == Observe && a.goal == protect && !a.once }

// outcome is what a round came to, as far as the state does not say it. Of one that only looks it is worked out for a
// report (snapshot).
type outcome struct {
	now    time.Time
	writes bool
	// unlocked are the routes whose lock is wanted and not in place.
	unlocked map[routes.Key]bool
	// rules and clones were to be written.
	rules  []routes.Rule
	clones []plan.CloneStep
}

// unlocked are the routes whose lock is wanted and not in place after a round has worked towards act. What was to be
// written and is not on its way rests, or failed.
func (a *Agent) unlocked(pl, act *plan.Plan, s *plan.Steps) map[routes.Key]bool {
	locks := s.Locks
	if act != pl && pl.LockCount() > 0 {
		locks = pl.Complete().Locks // the steps know nothing of them
	}
	var out map[routes.Key]bool
	for _, l := range locks {
		k := l.Route.Key()
		_, ours := a.st.locks[k]
		missing := act == pl && a.st.writing[k] == nil && routes.MTUMetricOf(l.Route.Body) != l.Want
		if ours && !missing {
			continue
		}
		if out == nil {
			out = map[routes.Key]bool{}
		}
		out[k] = true
	}
	return out
}

// A snapshot is what a report is made of. The loop takes it, which only copies: what takes words is put into words
// outside. What it points to does not change afterwards.
type snapshot struct {
	version  uint64
	report   Report  // but for the lists of what follows
	figures  Figures // but for the features
	plan     *plan.Plan
	names    map[routes.Ifindex]string
	holds    []heldNow         // those of the plan first, and in its order
	mtus     []DeviceMTUReport // likewise
	unlocked map[routes.Key]bool
	rules    []routes.Rule // that are to be written, and are not
	clones   []plan.CloneStep
	clamps   clamp.State
	lanes    map[int32]lane.State
	noLanes  map[int32]laneRefusal
	keys     sockopt.KeysSet
}

// heldNow is a hold without those who ask for it.
type heldNow struct {
	report HoldReport
	active bool // the kernel has it on
}

// snapshot copies what the next report is made of. It is the loop's.
func (a *Agent) snapshot() *snapshot {
	pl, came := a.lastP.Keep(), a.came
	if a.onlyLooks() {
		steps := a.st.planner.Steps(a.lastIn, plan.Held{Holds: a.st.holds, Locks: a.st.locks})
		a.st.planner.Relook() // nobody does them
		came.unlocked, came.rules, came.clones = a.unlocked(a.lastP, a.lastP, &steps), steps.AddRules, steps.Clones
	}
	now := came.now
	s := &snapshot{
		version: a.reports.version.Load(), plan: pl, names: a.linkNames(), figures: a.figuresNow(now), unlocked: came.unlocked, rules: came.rules, clones: came.clones,
		holds: a.holdsNow(pl), mtus: a.mtusNow(pl),
		clamps: a.st.clamps.kernel, lanes: maps.Clone(a.st.lanes.seen), noLanes: maps.Clone(a.st.lanes.refused), keys: a.st.keys,
		report: Report{
			Version: ReportVersion, Program: a.version, PID: os.Getpid(), Mode: a.cfg.Mode, Live: true,
			Paused: a.st.paused,
			Since:  a.started, Now: now, Stale: a.staleSources(),
			Links: a.st.fib.LinkCount(), Routes: a.st.fib.Len(),
			Policies: a.st.db.PolicyCount(), SAs: a.st.db.SACount(),
			Findings: slices.Concat(a.findings, a.movedFindings(), a.probeFindings(), a.conflicts(now), a.clampConflicts(now)),
			Counters: a.stats, Sources: []SourceReport{}, Diagnosis: a.diagnosis,
		},
	}
	if a.sources != nil {
		s.report.Sources = a.sources.stats()
	}
	return s
}

// linkNames are the names of all devices.
func (a *Agent) linkNames() map[routes.Ifindex]string {
	if a.st.names == nil {
		links := a.st.fib.Links()
		a.st.names = make(map[routes.Ifindex]string, len(links))
		for _, l := range links {
			a.st.names[l.Index] = l.Name
		}
	}
	return a.st.names
}

func (s *snapshot) deviceName(i routes.Ifindex) string {
	if name, known := s.names[i]; known {
		return name
	}
	return nameless(i)
}

// holdsNow are the holds of the plan, and those that are given back.
func (a *Agent) holdsNow(pl *plan.Plan) []heldNow {
	out := make([]heldNow, 0, len(pl.Holds))
	wanted := make(map[plan.HoldKey]bool, len(pl.Holds))
	for _, h := range pl.Holds {
		k := plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}
		wanted[k] = true
		r := HoldReport{Device: h.Device.Name, Index: int32(k.Index), Feature: string(k.Feature), State: StateWanted, Why: h.Why}
		st, _ := a.st.features[routes.Ifindex(k.Index)].Get(k.Feature)
		_, ours := a.st.holds[k]
		switch {
		case a.st.contested[k] != "":
			r.State, r.Why = StateContested, a.st.contested[k]
		case a.st.refused[k] != "":
			r.State, r.Why = StateRefused, a.st.refused[k]
		case ours && !st.Wanted:
			r.State = StateInPlace
		case !ours && !st.Wanted:
			r.State, r.Why = StateNotOurs, "it was off before: it is not ours to give back"
		}
		out = append(out, heldNow{r, st.Active})
	}
	releasing := "its cause is gone; given back when it has been quiet"
	if a.st.paused != nil {
		releasing = "its cause is gone; given back after the pause"
	}
	for k, c := range a.st.holds {
		if !wanted[k] {
			st, _ := a.st.features[routes.Ifindex(k.Index)].Get(k.Feature)
			out = append(out, heldNow{HoldReport{
				Device: c.Device.Name, Index: int32(k.Index), Feature: string(k.Feature),
				State: StateReleasing, Why: releasing, Because: []string{},
			}, st.Active})
		}
	}
	return out
}

// A glance is what is told of each round without a report. It is immutable.
type glance struct {
	mode                                             Mode
	paused                                           *api.Paused // nil for not
	degraded                                         bool        // as Report.Degraded
	faulty                                           bool        // the same without regard to a pause
	policies, coverages, holds, locks, rules, clones int
}

// glimpse counts what a round came to, which costs the same however much there is, and lets reports know that there is
// something new.
func (a *Agent) glimpse(now time.Time) *glance {
	pl := a.lastP
	g := glance{
		mode: a.cfg.Mode, paused: a.st.paused, faulty: a.faulty(now), policies: a.st.db.PolicyCount(),
		coverages: pl.CoverageCount(), holds: a.holdCount(pl), locks: pl.LockCount(),
	}
	for i := range pl.Shapes {
		g.rules, g.clones = g.rules+len(pl.Shapes[i].Rules), g.clones+pl.Shapes[i].Len()
	}
	g.degraded = g.faulty || g.paused != nil
	a.reports.changed(a)
	if old := a.glance.Load(); old != nil && *old == g {
		return old
	}
	fresh := g // only now, so that the others cost nothing
	a.glance.Store(&fresh)
	return &fresh
}

// heldCount is a number of holds, for those of a plan.
type heldCount struct {
	of    []plan.Hold
	n     int
	known bool
}

// holdCount is the number of the holds in a report. It is counted anew when there are others.
func (a *Agent) holdCount(pl *plan.Plan) int {
	c := &a.st.heldCount
	if c.known && len(c.of) == len(pl.Holds) && (len(c.of) == 0 || &c.of[0] == &pl.Holds[0]) {
		return c.n
	}
	n := len(a.st.holds)
	for _, h := range pl.Holds {
		if _, ours := a.st.holds[plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}]; !ours {
			n++
		}
	}
	*c = heldCount{pl.Holds, n, true}
	return n
}

// faulty is Report.Degraded of the report that would be made now, without regard to a pause.
func (a *Agent) faulty(now time.Time) bool {
	st := a.st
	if st.db.Stale() || st.fib.Stale() || st.featuresStale || st.keysStale ||
		len(a.findings)+len(st.withheld) > 0 || a.probeFinding != "" || a.keysMissing() ||
		len(st.moved) > 0 && len(a.movedFindings()) > 0 || len(a.clampConflicts(now)) > 0 {
		return true
	}
	for k := range st.resting {
		if st.rests(k, now) {
			return true
		}
	}
	if len(st.contested)+len(st.refused) > 0 && slices.ContainsFunc(a.lastP.Holds, func(h plan.Hold) bool {
		k := plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}
		return st.contested[k] != "" || st.refused[k] != ""
	}) {
		return true
	}
	if len(st.lanes.refused) > 0 && slices.ContainsFunc(a.lastP.Lanes, func(l plan.Lane) bool {
		_, refused := st.lanes.refused[l.Index]
		return refused
	}) {
		return true
	}
	for i, c := range st.mtus {
		if c.Theirs != 0 && st.fib.Link(i) != nil {
			return true
		}
	}
	return false
}
