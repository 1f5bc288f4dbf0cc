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

// ReportVersion is the version of the Report's JSON form. Fields may be added under it; a field
// that changes its meaning or goes away raises it.
const ReportVersion = 1

// Report is what the agent knows, wants and has done. It is immutable.
type Report struct {
	Version int    `json:"version"`
	Program string `json:"program"`
	PID     int    `json:"pid"`
	Mode    Mode   `json:"mode"`
	// Live is false for a report that was made without an agent, from the kernel alone.
	Live  bool      `json:"live"`
	Since time.Time `json:"since"`
	Now   time.Time `json:"now"`
	// Stale names the sources that lost events and are being read again.
	Stale     []string         `json:"stale"`
	Links     int              `json:"links"`
	Routes    int              `json:"routes"`
	Policies  int              `json:"policies"`
	SAs       int              `json:"sas"`
	Coverages []CoverageReport `json:"coverages"`
	Holds     []HoldReport     `json:"holds"`
	Locks     []LockReport     `json:"locks"`
	Rules     []RuleReport     `json:"rules"`
	Clones    []CloneReport    `json:"clones"`
	Findings  []string         `json:"findings"`
	Counters  Counters         `json:"counters"`
	Sources   []SourceReport   `json:"sources"`
	// Lanes are the NICs whose covered flows take a lane (shared_nics: lane).
	Lanes []LaneReport `json:"lanes,omitempty"`
	// Clamps are the destinations of forwarded connections with a smaller MSS (partial: clamp).
	Clamps []ClampReport `json:"clamps,omitempty"`
	// DeviceMTUs are the carriers whose own MTU is set (carrier_mtu: device).
	DeviceMTUs []DeviceMTUReport `json:"device_mtus,omitempty"`
	// Diagnosis is what the connections themselves said when they were looked at last.
	Diagnosis *Diagnosis `json:"diagnosis,omitempty"`
	// Netns is how the namespace is called, empty for the one that the agent was started in.
	Netns string `json:"netns,omitempty"`
	// NotFollowed says that the configuration leaves the latter out.
	NotFollowed bool `json:"not_followed,omitempty"`
	// Namespaces are all that the agent follows, or is to follow, in the report of that one.
	Namespaces []NamespaceReport `json:"namespaces,omitempty"`
}

// SourceReport counts what a source of events brought since it was dialled.
type SourceReport struct {
	Source      string `json:"source"` // xfrm, routes, ethtool, l2tp or sockopt
	Events      uint64 `json:"events"`
	Dumps       uint64 `json:"dumps"`
	Overruns    uint64 `json:"overruns"`    // receive buffer overflows
	Undecodable uint64 `json:"undecodable"` // messages that made no sense; each led to a new dump
	// Seconds is the CPU time of all looks, and Sockets what the last saw, of a source that polls.
	Seconds float64 `json:"seconds,omitempty"`
	Sockets int     `json:"sockets,omitempty"`
	// Traced are the kernel's functions whose calls it looks at at once, and the tracepoint inet_sock_set_state where it does when a socket
	// that holds keys begins to listen or to connect; Untraced is why there are no functions.
	Traced   []string `json:"traced,omitempty"`
	Untraced string   `json:"untraced,omitempty"`
}

// CoverageReport is the verdict for one coverage.
type CoverageReport struct {
	Policy   uint32   `json:"policy"`
	Peer     string   `json:"peer,omitempty"`
	Key      string   `json:"key,omitempty"` // "tcp-md5" or "tcp-ao" in place of a policy
	Src      string   `json:"src"`
	Dst      string   `json:"dst"`
	Proto    uint8    `json:"proto,omitempty"`
	Sport    uint16   `json:"sport,omitempty"`
	Dport    uint16   `json:"dport,omitempty"`
	Mark     string   `json:"mark,omitempty"`
	IfID     uint32   `json:"if_id,omitempty"`
	Priority uint32   `json:"priority"`
	Maybe    bool     `json:"maybe,omitempty"`
	Gone     bool     `json:"gone,omitempty"`
	MTU      int      `json:"mtu"` // bytes, 0 while it is not known
	Cut      string   `json:"cut"` // socket, device, lane, nic or none
	Carriers []string `json:"carriers"`
	Held     []string `json:"held"`
	Locked   []string `json:"locked"`
	Notes    []string `json:"notes"`
	// PeerPort is the peer's port where the key is a client's; Dev the VRF or other device that the
	// key's socket is bound to.
	PeerPort uint16 `json:"peer_port,omitempty"`
	Dev      string `json:"dev,omitempty"`
	// Listener says that the key is a listener's.
	Listener bool `json:"listener,omitempty"`
	// UID is the user of the key's socket, nil if the kernel doesn't tell.
	UID *uint32 `json:"uid,omitempty"`
}

// The states of holds, locks, rules and clones.
const (
	StateInPlace   = "in place"
	StateWanted    = "wanted"
	StateContested = "contested"
	StateRefused   = "refused"
	StateReleasing = "releasing"
	StateNotOurs   = "off already"
)

// HoldReport is one feature on one device.
type HoldReport struct {
	Device  string   `json:"device"`
	Index   int32    `json:"ifindex"`
	Feature string   `json:"feature"`
	State   string   `json:"state"`
	Why     string   `json:"why,omitempty"`
	Because []string `json:"because"`
}

// LockReport is one route that is locked in place.
type LockReport struct {
	Route   string   `json:"route"`
	Family  string   `json:"family"`
	MTU     uint32   `json:"mtu"`
	Locked  bool     `json:"locked"`
	Was     uint32   `json:"was"` // the owner's MTU metric in bytes, 0 for none
	Devices []string `json:"devices"`
	State   string   `json:"state"`
	Because []string `json:"because"`
}

// RuleReport is one rule of ours.
type RuleReport struct {
	Family   string `json:"family"`
	Priority uint32 `json:"priority"`
	Table    uint32 `json:"table"`
	Text     string `json:"text"`
	State    string `json:"state"` // in place or wanted
}

// CloneReport is one route in a table of ours.
type CloneReport struct {
	Table   uint32   `json:"table"`
	Dst     string   `json:"dst"`
	Throw   bool     `json:"throw,omitempty"`
	MTU     uint32   `json:"mtu,omitempty"`
	Locked  bool     `json:"locked,omitempty"`
	Devices []string `json:"devices,omitempty"`
	State   string   `json:"state"` // in place or wanted
}

// publish makes the report of a round.
func (a *Agent) publish(pl *plan.Plan, s *plan.Steps, now time.Time) {
	r := &Report{
		Version: ReportVersion, Program: a.version, PID: os.Getpid(), Mode: a.cfg.Mode, Live: true,
		Since: a.started, Now: now, Stale: a.staleSources(),
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
	a.report.Store(r)
}

// tableReports lists our rules and clones. In observe mode what would have to be written is
// wanted only.
func (a *Agent) tableReports(r *Report, pl *plan.Plan, s *plan.Steps) {
	state := func(pending bool) string {
		if pending && a.cfg.Mode == Observe {
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
				rule.Family.String(), rule.Priority, uint32(rule.Table), ruleText(rule),
				state(slices.Contains(s.AddRules, rule)),
			})
		}
		for _, c := range sh.Clones {
			cr := CloneReport{
				Table: uint32(sh.Table), Dst: c.Dst.String(), Throw: c.Throw, MTU: c.MTU.MTU, Locked: c.MTU.Locked,
				State: state(put[place{sh.Table, c.Dst}]),
			}
			if !c.Throw {
				cr.Devices = a.devices(c.Of.Body)
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
			if slices.Contains(h.Because, c.name()) {
				c.Notes = append(slices.Clone(c.Notes), fmt.Sprintf("%s %s is %s: %s", h.Device, h.Feature, h.State, h.Why))
				c.Held = slices.DeleteFunc(slices.Clone(c.Held), func(s string) bool { return s == h.Device+" "+h.Feature })
				if len(c.Held) == 0 {
					c.Cut = string(plan.CutSocket)
				}
			}
		}
	}
}

// name is how a coverage is called where it is a cause.
func (c *CoverageReport) name() string {
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
	for k, c := range a.st.holds {
		if !wanted[k] {
			out = append(out, HoldReport{
				Device: c.Device.Name, Index: int32(k.Index), Feature: string(k.Feature),
				State: StateReleasing, Why: "its cause is gone; given back when it has been quiet", Because: []string{},
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
