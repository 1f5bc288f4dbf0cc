package agent

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// publish makes the report of a round.
func (a *Agent) publish(pl *plan.Plan, s *plan.Steps, now time.Time) {
	r := &Report{
		Version: ReportVersion, Program: a.version, PID: os.Getpid(), Mode: a.cfg.Mode, Live: true,
		Paused: a.pausedReport(s),
		Since:  a.started, Now: now, Stale: a.staleSources(),
		Links: len(a.st.fib.Links()), Routes: a.st.fib.Len(),
		Policies: a.st.db.PolicyCount(), SAs: a.st.db.SACount(),
		Coverages: a.coverageReports(pl.Verdicts), Holds: a.holdReports(pl), Locks: a.lockReports(pl, s),
		Findings: list(slices.Concat(a.findings, a.movedFindings(), a.probeFindings(), a.conflicts(now), a.clampConflicts(now), a.keyFindings())), Counters: a.stats,
		Rules: []RuleReport{}, Clones: []CloneReport{}, Sources: []SourceReport{},
		Clamps: a.clampReports(pl), Lanes: a.laneReports(pl, now), DeviceMTUs: a.mtuReports(pl), Diagnosis: a.diagnosis,
	}
	if a.sources != nil {
		r.Sources = a.sources.stats()
	}
	noteHolds(r)
	noteLanes(r)
	a.tableReports(r, pl, s)
	a.figures.Store(a.figuresOf(r, now))
	a.report.Store(r)
}

// tableReports lists our rules and clones. In observe mode what would have to be written is
// wanted only.
func (a *Agent) tableReports(r *Report, pl *plan.Plan, s *plan.Steps) {
	state := func(pending bool) string {
		if pending && !a.writes() {
			return StateWanted
		}
		return StateInPlace
	}
	type place struct {
		table routes.TableID
		dst   netip.Prefix
	}
	put := make(map[place]bool, len(s.Clones))
	for _, c := range s.Clones {
		put[place{c.Table, c.Clone.Dst}] = true
	}
	for i := range pl.Shapes {
		sh := &pl.Shapes[i]
		for _, rule := range sh.Rules {
			r.Rules = append(r.Rules, RuleReport{
				Family: rule.Family.String(), Priority: rule.Priority, Table: uint32(rule.Table), Text: ruleText(rule),
				State: state(slices.Contains(s.AddRules, rule)),
			})
		}
		for _, c := range sh.Clones {
			cr := CloneReport{
				Table: uint32(sh.Table), Dst: c.Dst.String(), Throw: c.Throw, MTU: c.MTU.MTU, Locked: c.MTU.Locked,
				State: state(put[place{sh.Table, c.Dst}]),
			}
			if !c.Throw {
				cr.Devices, cr.Of = a.devices(c.Of.Body), c.Of.Key().String()
				cr.Because = []string{ids1(c.Because)}
			}
			r.Clones = append(r.Clones, cr)
		}
	}
}

// noteHolds says in the verdicts of coverages which of their holds are not in place, and why.
func noteHolds(r *Report) {
	for _, h := range r.Holds {
		if h.State != StateContested && h.State != StateRefused {
			continue
		}
		for i := range r.Coverages {
			c := &r.Coverages[i]
			if slices.Contains(h.Because, coverageName(c)) {
				c.Notes = append(slices.Clone(c.Notes), fmt.Sprintf("%s %s is %s: %s", h.Device, h.Feature, h.State, h.Why))
				c.Held = slices.DeleteFunc(slices.Clone(c.Held), func(s string) bool { return s == h.Device+" "+h.Feature })
				if len(c.Held) == 0 {
					c.Cut = string(plan.CutSocket)
				}
			}
		}
	}
}

// coverageName is how a coverage is called where it is a cause.
func coverageName(c *CoverageReport) string {
	if c.Key != "" {
		return keyName(c)
	}
	s := fmt.Sprintf("policy %d", c.Policy)
	if c.Peer != "" {
		s += " to " + c.Peer
	}
	return s
}

func (a *Agent) staleSources() []string {
	out := []string{}
	if a.st.db.Stale() {
		out = append(out, "xfrm")
	}
	if a.st.fib.Stale() {
		out = append(out, "routes")
	}
	if a.st.featuresStale {
		out = append(out, "ethtool")
	}
	if a.st.keysStale {
		out = append(out, "sockopt")
	}
	return out
}

func (a *Agent) coverageReports(verdicts []plan.Verdict) []CoverageReport {
	out := make([]CoverageReport, 0, len(verdicts))
	for _, v := range verdicts {
		c := CoverageReport{
			Policy: uint32(v.ID.Policy), Src: v.Selector.Src.String(), Dst: v.Selector.Dst.String(),
			Proto: uint8(v.Selector.Proto), Sport: v.Selector.Sport.Port, Dport: v.Selector.Dport.Port,
			IfID: v.IfID, Priority: v.Priority, Maybe: v.Maybe, Gone: v.Gone, MTU: v.MTU,
			Cut: string(v.Cut), Carriers: list(v.Carriers), Held: list(v.Held),
			Locked: list(v.Locked), Notes: list(v.Notes),
		}
		if v.ID.Peer.IsValid() {
			c.Peer = v.ID.Peer.String()
		}
		if v.Mark != (xfrmwatch.Mark{}) {
			c.Mark = fmt.Sprintf("%#x/%#x", v.Mark.Value, v.Mark.Mask)
		}
		if v.Key != nil {
			c.Key, c.Dst, c.Sport = v.Key.Kind.String(), v.Key.Peer.String(), v.Key.Port
			c.Src, c.PeerPort, c.Listener = "", v.Key.PeerPort, v.Key.Listener
			if v.Key.Local.IsValid() {
				c.Src = v.Key.Local.String()
			}
			if v.Key.Owner.Known {
				c.UID = &v.Key.Owner.UID
			}
			if v.Key.Ifindex != 0 {
				c.Dev = a.deviceName(routes.Ifindex(v.Key.Ifindex))
			}
		}
		out = append(out, c)
	}
	return out
}

// plural is a number of things in words.
func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// list is never nil, so that JSON has [] and not null.
func list(l []string) []string {
	if l == nil {
		return []string{}
	}
	return l
}

func (a *Agent) holdReports(pl *plan.Plan) []HoldReport {
	out := []HoldReport{}
	wanted := map[plan.HoldKey]bool{}
	for _, h := range pl.Holds {
		k := plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}
		wanted[k] = true
		r := HoldReport{Device: h.Device.Name, Index: int32(k.Index), Feature: string(k.Feature), State: StateWanted, Why: h.Why, Because: []string{}}
		r.Because = causeList(h.Because, h.Keys)
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
		out = append(out, r)
	}
	releasing := "its cause is gone; given back when it has been quiet"
	if a.st.paused != nil {
		releasing = "its cause is gone; given back after the pause"
	}
	for k, c := range a.st.holds {
		if !wanted[k] {
			out = append(out, HoldReport{
				Device: c.Device.Name, Index: int32(k.Index), Feature: string(k.Feature),
				State: StateReleasing, Why: releasing, Because: []string{},
			})
		}
	}
	slices.SortFunc(out, func(a, b HoldReport) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.Feature, b.Feature))
	})
	return out
}

func (a *Agent) lockReports(pl *plan.Plan, s *plan.Steps) []LockReport {
	out := []LockReport{}
	// What was to be written and is not on its way rests, or failed.
	missing := map[routes.Key]bool{}
	for _, l := range s.Locks {
		k := l.Route.Key()
		missing[k] = a.st.writing[k] == nil && routes.MTUMetricOf(l.Route.Body) != l.Want
	}
	for _, l := range pl.Locks {
		k := l.Route.Key()
		r := LockReport{
			Route: k.String(), Family: k.Family.String(), MTU: l.Want.MTU, Locked: l.Want.Locked,
			Was: l.Owner.MTU, Devices: a.devices(l.Route.Body), State: StateInPlace,
		}
		if _, ours := a.st.locks[k]; !ours || missing[k] {
			r.State = StateWanted
		}
		for _, id := range l.Because {
			r.Because = append(r.Because, ids1(id))
		}
		out = append(out, r)
	}
	return out
}

// Withdrawn is in the finding for a lock that the kernel's own lookup refuted.
const Withdrawn = "withdrawn:"

// conflicts are what a person should look at, apart from the journal's findings.
func (a *Agent) conflicts(now time.Time) []string {
	out := []string{}
	for _, k := range slices.SortedFunc(maps.Keys(a.st.fights), routes.Key.Compare) {
		if now.Before(a.st.fights[k].until) {
			out = append(out, fmt.Sprintf("route %s did not keep its lock, which was written again and again (its owner replaces it, or the kernel refuses): the lock rests", k))
		}
	}
	var withdrawn []string
	for id, w := range a.st.withheld {
		withdrawn = append(withdrawn, fmt.Sprintf("lock for %s %s %s", id, Withdrawn, w.why))
	}
	slices.Sort(withdrawn)
	return append(out, withdrawn...)
}

// devices are the names of the devices that a route leaves by.
func (a *Agent) devices(b *routes.Body) []string {
	out := []string{}
	for _, n := range b.Nexthops {
		name := a.deviceName(n.Oif)
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

func (a *Agent) deviceName(i routes.Ifindex) string {
	if l := a.st.fib.Link(i); l != nil {
		return l.Name
	}
	return fmt.Sprintf("if%d", i)
}

// ruleText is the rule in the words of `ip rule`.
func ruleText(r routes.Rule) string {
	s := "from all"
	if r.Src.IsValid() {
		s = "from " + r.Src.String()
	}
	if r.Dst.IsValid() {
		s += " to " + r.Dst.String()
	}
	if r.Mask != 0 {
		s += fmt.Sprintf(" fwmark %#x/%#x", r.Mark, r.Mask)
	}
	if r.Iif != "" {
		s += " iif " + r.Iif
	}
	if r.IPProto != 0 {
		s += fmt.Sprintf(" ipproto %d", r.IPProto)
	}
	if !r.Sport.Any() {
		s += fmt.Sprintf(" sport %d-%d", r.Sport.Lo, r.Sport.Hi)
	}
	if !r.Dport.Any() {
		s += fmt.Sprintf(" dport %d-%d", r.Dport.Lo, r.Dport.Hi)
	}
	return fmt.Sprintf("%s lookup %d", s, r.Table)
}
