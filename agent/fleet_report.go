package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
)

// fill counts what a namespace's own report has, nil for none yet.
func fill(n *NamespaceReport, g *glance) {
	if g == nil {
		return
	}
	n.Paused = g.paused != nil
	n.State, n.Degraded, n.Policies, n.Coverages = NetnsFollowed, g.degraded, g.policies, g.coverages
	n.Holds, n.Locks, n.Rules, n.Clones = g.holds, g.locks, g.rules, g.clones
}

// notFollowed says which namespaces there are.
func notFollowed(name, follows string) error {
	return &AbsentError{Of: api.AbsentNetns, Text: fmt.Sprintf("this agent does not follow namespace %q; it follows %s", name, follows)}
}

// served is what the control API answers for.
type served interface {
	// reloaded has the configuration read again and taken over. The error is a refusedError if that is not possible, and errNoFile.
	reloaded(ctx context.Context, by api.Peer) (*api.ReloadAnswer, error)
	// agentOf is the agent of a namespace, by any of its names. The error is an AbsentError, errNotReady, or why it can't be followed.
	agentOf(name string) (*Agent, error)
	// reportOf is the newest report of a namespace. Its loop is asked, until the context ends.
	reportOf(ctx context.Context, name string) (*Report, error)
	namespaces() []NamespaceReport
	// ordered has a namespace pause, or all with an empty name; nil is to go on.
	ordered(ctx context.Context, name string, p *api.Paused) ([]api.PausedNamespace, error)
}

var (
	_ served = (*Agent)(nil)
	_ served = (*Fleet)(nil)
)

func (a *Agent) agentOf(name string) (*Agent, error) {
	if name != "" && name != netns.Host {
		return nil, notFollowed(name, "only "+netns.Host)
	}
	return a, nil
}

func (a *Agent) reportOf(ctx context.Context, name string) (*Report, error) {
	if _, err := a.agentOf(name); err != nil {
		return nil, err
	}
	o, err := a.observe(ctx)
	if err != nil {
		return nil, err
	}
	return o.report, nil
}

func (a *Agent) namespaces() []NamespaceReport {
	n := NamespaceReport{Name: netns.Host, Names: []string{netns.Host}, State: NetnsStarting}
	fill(&n, a.glance.Load())
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
		return &AbsentError{Of: api.AbsentNetns, Text: fmt.Sprintf("namespace %s: %s", name, why)}
	}
	names := make([]string, 0, len(f.members))
	for _, m := range f.members {
		names = append(names, m.names[0])
	}
	if len(names) == 0 {
		names = append(names, "none")
	}
	slices.Sort(names)
	return notFollowed(cmp.Or(name, netns.Host), strings.Join(names, ", "))
}

// Report is the newest report of the host's namespace, with a list of all of them where there
// are others. It is nil before the first plan.
func (f *Fleet) Report() *Report {
	r, _ := f.reportOf(context.Background(), "")
	return r
}

// Observation is what metrics say of a namespace.
type Observation struct {
	*Report
	Figures *Figures
}

// observeWithin bounds how long metrics wait for the loops. A scrape waits for 10 s, as a rule.
const observeWithin = 5 * time.Second

// Observations are the newest reports of all namespaces that are followed and have been read, in the order of
// their names. The counters of their sources are those of now: a look that finds nothing new makes no report. Of a loop
// that does not answer in time it is the report that was made last, if that is not a large one.
func (f *Fleet) Observations() []Observation {
	ctx, cancel := context.WithTimeout(context.Background(), observeWithin)
	defer cancel()
	var out []Observation
	for _, n := range f.namespaces() {
		a, err := f.agentOf(n.Name)
		if err != nil {
			continue
		}
		o, err := a.observe(ctx)
		if err != nil {
			o = a.reports.newest.Load().report()
		}
		if o == nil {
			continue
		}
		r := *o.report
		if r.Netns = n.Name; n.Name == netns.Host {
			r.Netns = ""
		}
		if a.sources != nil {
			r.Sources = a.sources.stats()
		}
		out = append(out, Observation{&r, o.figures})
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

func (f *Fleet) reportOf(ctx context.Context, name string) (*Report, error) {
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
	o, err := a.observe(ctx)
	if err != nil {
		return nil, err
	}
	r := *o.report
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

// Glance is what a line says of a Fleet.
type Glance struct {
	// Mode, and the numbers, are those of the host's namespace.
	Mode                            Mode
	Coverages, Holds, Locks, Clones int
	// Namespaces are all, where there are others than the host's.
	Namespaces int
	// Paused is how many namespaces are paused, the host's included.
	Paused int
	// Degraded says that a person should look, apart from pauses, which somebody wanted.
	Degraded bool
}

// Glance is the newest report in numbers, nil before the first plan. It waits for no loop.
func (f *Fleet) Glance() *Glance {
	all := f.namespaces()
	cfg := f.Config()
	g := &Glance{Mode: cfg.Mode}
	if cfg.Namespaces.host() {
		a, err := f.agentOf("")
		if err != nil {
			return nil
		}
		host := a.glance.Load()
		if host == nil {
			return nil
		}
		g = &Glance{Mode: host.mode, Coverages: host.coverages, Holds: host.holds, Locks: host.locks, Clones: host.clones, Degraded: host.faulty}
		if host.paused != nil {
			g.Paused = 1
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	g.Degraded = g.Degraded || f.blind != nil || len(f.notes)+len(f.strayFindings()) > 0
	if len(all) > 1 || !cfg.Namespaces.host() || f.blind != nil {
		g.Namespaces, g.Paused = len(all), 0
		for _, n := range all {
			if n.Paused {
				g.Paused++
			}
			g.Degraded = g.Degraded || !n.Paused && (n.Degraded || n.Why != "")
		}
	}
	return g
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
	findings := slices.Concat(r.Findings, f.notes, f.strayFindings())
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
			fill(&n, m.agent.glance.Load())
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
