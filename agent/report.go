package agent

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// tell puts a snapshot into words. It reads nothing that belongs to the loop.
func (a *Agent) tell(s *snapshot) *observed {
	r, f := s.report, s.figures
	r.Coverages, r.Locks = coverageReports(s.plan.Verdicts, s.deviceName), s.lockReports()
	r.Holds, f.Features = s.holdReports()
	r.Findings = list(append(r.Findings, a.keyFindings(s.keys)...))
	r.Clamps, r.Lanes, r.DeviceMTUs = s.clampReports(), s.laneReports(), s.mtuReports()
	r.Rules, r.Clones = s.tableReports()
	noteHolds(&r)
	noteLanes(&r)
	return &observed{s.version, &r, &f}
}

// tableReports lists our rules and clones. In observe mode what would have to be written is
// wanted only.
func (s *snapshot) tableReports() (rules []RuleReport, clones []CloneReport) {
	rules, clones = []RuleReport{}, []CloneReport{}
	state := func(wanted bool) string {
		if wanted {
			return StateWanted
		}
		return StateInPlace
	}
	type place struct {
		table routes.TableID
		dst   netip.Prefix
	}
	put := make(map[place]bool, len(s.clones))
	for _, c := range s.clones {
		put[place{c.Table, c.Clone.Dst}] = true
	}
	for i := range s.plan.Shapes {
		sh := &s.plan.Shapes[i]
		for _, rule := range sh.Rules {
			rules = append(rules, RuleReport{
				Family: rule.Family.String(), Priority: rule.Priority, Table: uint32(rule.Table), Text: ruleText(rule),
				State: state(slices.Contains(s.rules, rule)),
			})
		}
		for c := range sh.Clones() {
			cr := CloneReport{
				Table: uint32(sh.Table), Dst: c.Dst.String(), Throw: c.Throw, MTU: c.MTU.MTU, Locked: c.MTU.Locked,
				State: state(put[place{sh.Table, c.Dst}]),
			}
			if !c.Throw {
				cr.Devices, cr.Of = devicesOf(c.Of.Body, s.deviceName), c.Of.Key().String()
				cr.Because = []string{ids1(c.Because)}
			}
			clones = append(clones, cr)
			for _, b := range c.Behind {
				clones = append(clones, CloneReport{
					Table: cr.Table, Dst: cr.Dst, Copy: true, MTU: b.MTU.MTU, Locked: b.MTU.Locked, State: cr.State,
					Devices: devicesOf(b.Of.Body, s.deviceName), Of: b.Of.Key().String(),
				})
			}
		}
	}
	return rules, clones
}

// noteHolds says in the verdicts of coverages which of their holds are not in place, and why.
func noteHolds(r *Report) {
	for _, h := range r.Holds {
		if h.State != StateContested && h.State != StateRefused {
			continue
		}
		asks := make(map[string]bool, len(h.Because))
		for _, name := range h.Because {
			asks[name] = true
		}
		for i := range r.Coverages {
			c := &r.Coverages[i]
			if asks[coverageName(c)] {
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

func coverageReports(verdicts []plan.Verdict, deviceName func(routes.Ifindex) string) []CoverageReport {
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
				c.Dev = deviceName(routes.Ifindex(v.Key.Ifindex))
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

// holdReports are the holds in the order of their devices, and whether the kernel has their features on.
func (s *snapshot) holdReports() ([]HoldReport, []ManagedFeature) {
	for i, h := range s.plan.Holds {
		s.holds[i].report.Because = causeList(h.Because, h.Keys)
	}
	slices.SortFunc(s.holds, func(a, b heldNow) int {
		return cmp.Or(cmp.Compare(a.report.Device, b.report.Device), cmp.Compare(a.report.Feature, b.report.Feature))
	})
	out, features := make([]HoldReport, 0, len(s.holds)), make([]ManagedFeature, 0, len(s.holds))
	for i := range s.holds {
		h := &s.holds[i]
		out = append(out, h.report)
		features = append(features, ManagedFeature{h.report.Device, h.report.Feature, h.active})
	}
	return out, features
}

func (s *snapshot) lockReports() []LockReport {
	out := make([]LockReport, 0, len(s.plan.Locks))
	for _, l := range s.plan.Locks {
		k := l.Route.Key()
		r := LockReport{
			Route: k.String(), Family: k.Family.String(), MTU: l.Want.MTU, Locked: l.Want.Locked,
			Was: l.Owner.MTU, Devices: devicesOf(l.Route.Body, s.deviceName), State: StateInPlace,
		}
		if s.unlocked[k] {
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
	for _, k := range slices.SortedFunc(maps.Keys(a.st.resting), routes.Key.Compare) {
		if a.st.rests(k, now) {
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
func (a *Agent) devices(b *routes.Body) []string { return devicesOf(b, a.deviceName) }

func devicesOf(b *routes.Body, name func(routes.Ifindex) string) []string {
	out := []string{}
	for _, n := range b.Nexthops {
		name := name(n.Oif)
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
	return nameless(i)
}

// nameless is how a device is called that is not known.
func nameless(i routes.Ifindex) string { return fmt.Sprintf("if%d", i) }

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
