package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"tsoagent/agent/netns"
)

// The states of namespaces.
const (
	NetnsFollowed = "followed"
	NetnsStarting = "starting" // the kernel's state is being read
	NetnsLeaving  = "leaving"  // everything is being given back
	NetnsFailed   = "failed"   // it is tried again
	NetnsWaiting  = "waiting"  // nothing is there under the name
)

// NamespaceReport is one namespace that is followed, or that is to be.
type NamespaceReport struct {
	Name string `json:"name"`
	// Names are all that lead to it.
	Names []string `json:"names"`
	State string   `json:"state"`
	Why   string   `json:"why,omitempty"`
	// Degraded says that a person should look: at the namespace's own report, or at Why.
	Degraded  bool `json:"degraded"`
	Policies  int  `json:"policies"`
	Coverages int  `json:"coverages"`
	Holds     int  `json:"holds"`
	Locks     int  `json:"locks"`
	Rules     int  `json:"rules"`
	Clones    int  `json:"clones"`
}

// Degraded reports whether a person should look.
func (r *Report) Degraded() bool {
	return len(r.Stale) > 0 || len(r.Findings) > 0 ||
		slices.ContainsFunc(r.Holds, func(h HoldReport) bool { return h.State == StateContested || h.State == StateRefused }) ||
		slices.ContainsFunc(r.DeviceMTUs, func(m DeviceMTUReport) bool { return m.State == StateContested }) ||
		slices.ContainsFunc(r.Lanes, func(l LaneReport) bool { return l.State == StateRefused }) ||
		slices.ContainsFunc(r.Namespaces, func(n NamespaceReport) bool { return n.Degraded })
}

func (n *NamespaceReport) fill(r *Report) {
	n.State, n.Degraded, n.Policies, n.Coverages = NetnsFollowed, r.Degraded(), r.Policies, len(r.Coverages)
	n.Holds, n.Locks, n.Rules, n.Clones = len(r.Holds), len(r.Locks), len(r.Rules), len(r.Clones)
}

// errNotFollowed says which namespaces there are.
var errNotFollowed = errors.New("this agent does not follow namespace")

// served is what the control API answers for.
type served interface {
	// agentOf is the agent of a namespace, by any of its names. The error is errNotFollowed or
	// errNotReady.
	agentOf(name string) (*Agent, error)
	// reportOf is the newest report of a namespace.
	reportOf(name string) (*Report, error)
	namespaces() []NamespaceReport
}

var (
	_ served = (*Agent)(nil)
	_ served = (*Fleet)(nil)
)

func (a *Agent) agentOf(name string) (*Agent, error) {
	if name != "" && name != netns.Host {
		return nil, fmt.Errorf("%w %q; it follows only %s", errNotFollowed, name, netns.Host)
	}
	return a, nil
}

func (a *Agent) reportOf(name string) (*Report, error) {
	if _, err := a.agentOf(name); err != nil {
		return nil, err
	}
	r := a.Report()
	if r == nil {
		return nil, errNotReady
	}
	return r, nil
}

func (a *Agent) namespaces() []NamespaceReport {
	n := NamespaceReport{Name: netns.Host, Names: []string{netns.Host}, State: NetnsStarting}
	if r := a.Report(); r != nil {
		n.fill(r)
	}
	return []NamespaceReport{n}
}

// find is the member with a name, nil for none. The caller holds the lock.
func (f *Fleet) find(name string) *member {
	if name == "" {
		name = netns.Host
	}
	for _, m := range f.members {
		if slices.Contains(m.names, name) {
			return m
		}
	}
	return nil
}

func (f *Fleet) agentOf(name string) (*Agent, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.find(name)
	switch {
	case m == nil:
		return nil, f.notFollowed(name)
	case m.agent == nil && m.why != "":
		return nil, fmt.Errorf("namespace %s can't be followed: %s", m.names[0], m.why)
	case m.agent == nil:
		return nil, errNotReady
	}
	return m.agent, nil
}

// notFollowed says which names there are. The caller holds the lock.
func (f *Fleet) notFollowed(name string) error {
	if why := f.waiting[name]; why != "" {
		return fmt.Errorf("namespace %s: %s", name, why)
	}
	names := make([]string, 0, len(f.members))
	for _, m := range f.members {
		names = append(names, m.names[0])
	}
	if len(names) == 0 {
		names = append(names, "none")
	}
	slices.Sort(names)
	return fmt.Errorf("%w %q; it follows %s", errNotFollowed, cmp.Or(name, netns.Host), strings.Join(names, ", "))
}

// Report is the newest report of the host's namespace, with a list of all of them where there
// are others. It is nil before the first plan.
func (f *Fleet) Report() *Report {
	r, _ := f.reportOf("")
	return r
}

// Observation is what metrics say of a namespace.
type Observation struct {
	*Report
	Figures *Figures
}

// Observations are the newest reports of all namespaces that are followed and have been read, in the order of
// their names. The counters of their sources are those of now: a look that finds nothing new makes no report.
func (f *Fleet) Observations() []Observation {
	var out []Observation
	for _, n := range f.namespaces() {
		if a, err := f.agentOf(n.Name); err == nil && a.Report() != nil {
			r := *a.Report()
			if r.Netns = n.Name; n.Name == netns.Host {
				r.Netns = ""
			}
			if a.sources != nil {
				r.Sources = a.sources.stats()
			}
			out = append(out, Observation{&r, a.figures.Load()})
		}
	}
	return out
}

// FleetStatus is what is true of all namespaces together.
type FleetStatus struct {
	Since      time.Time // the start
	Configured time.Time // when the configuration in use was taken over
	// ReloadError is why the newest configuration is not in use, empty if it is.
	ReloadError string
	Namespaces  []NamespaceReport
}

// Status is what is true of all namespaces together.
func (f *Fleet) Status() FleetStatus {
	s := FleetStatus{Namespaces: f.namespaces()}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Since, s.Configured, s.ReloadError = f.started, f.configured, f.reloadErr
	return s
}

func (f *Fleet) reportOf(name string) (*Report, error) {
	host := name == "" || name == netns.Host
	if cfg := f.Config(); host && !cfg.Namespaces.host() {
		r := &Report{
			Version: ReportVersion, Program: f.version, PID: os.Getpid(), Mode: cfg.Mode, Live: true, NotFollowed: true,
			Since: f.started, Now: time.Now(), Stale: []string{}, Coverages: []CoverageReport{}, Holds: []HoldReport{}, Locks: []LockReport{},
			Rules: []RuleReport{}, Clones: []CloneReport{}, Findings: []string{}, Sources: []SourceReport{},
		}
		f.addNamespaces(r)
		return r, nil
	}
	a, err := f.agentOf(name)
	if err != nil {
		return nil, err
	}
	have := a.Report()
	if have == nil {
		return nil, errNotReady
	}
	r := *have
	if host {
		f.addNamespaces(&r)
		return &r, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.find(name); m != nil {
		r.Netns = m.names[0]
	}
	return &r, nil
}

// addNamespaces adds the list, and what a person should look at, where there is more than the
// host.
func (f *Fleet) addNamespaces(r *Report) {
	all := f.namespaces()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(all) > 1 || r.NotFollowed || f.blind != nil {
		r.Namespaces = all
	}
	findings := slices.Concat(r.Findings, f.notes)
	for _, n := range r.Namespaces {
		if n.Why != "" {
			findings = append(findings, fmt.Sprintf("namespace %s: %s", n.Name, n.Why))
		}
	}
	if f.blind != nil {
		findings = append(findings, fmt.Sprintf("nothing tells of namespaces that come and go: %v", f.blind))
	}
	r.Findings = list(findings)
}

// namespaces are the members, the host first, and what is waited for.
func (f *Fleet) namespaces() []NamespaceReport {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := []NamespaceReport{}
	for _, m := range f.members {
		n := NamespaceReport{Name: m.names[0], Names: slices.Clone(m.names), State: NetnsStarting}
		if m.agent != nil {
			if r := m.agent.Report(); r != nil {
				n.fill(r)
			}
		}
		switch {
		case m.leaving:
			n.State = NetnsLeaving
		case m.why != "":
			n.State, n.Why, n.Degraded = NetnsFailed, m.why, true
		}
		out = append(out, n)
	}
	for _, name := range slices.Sorted(maps.Keys(f.waiting)) {
		out = append(out, NamespaceReport{Name: name, Names: []string{name}, State: NetnsWaiting, Why: f.waiting[name], Degraded: true})
	}
	slices.SortStableFunc(out, func(a, b NamespaceReport) int {
		return cmp.Or(cmp.Compare(rank(a.Name), rank(b.Name)), strings.Compare(a.Name, b.Name))
	})
	return out
}
