package metrics

import (
	"cmp"
	"iter"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tsoagent/agent"
	"tsoagent/agent/netns"
)

// Source is what metrics are made of. All of it is safe for concurrent use (agent.Fleet).
type Source interface {
	// Observations are the newest reports of all namespaces that have been read: they are made for the question.
	Observations() []agent.Observation
	// Status is what is true of the whole agent.
	Status() agent.FleetStatus
}

var _ Source = (*agent.Fleet)(nil)

// Collector makes metrics of the newest reports. It is safe for concurrent use.
type Collector struct {
	version string
	source  Source
	descs   map[string]*prometheus.Desc
}

var _ prometheus.Collector = (*Collector)(nil)

// metric is what a metric is, but for its name.
type metric struct {
	kind   prometheus.ValueType // 0 for the histogram
	help   string
	labels []string
}

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

var metrics = map[string]metric{
	BuildInfo:       {gauge, "The agent's version, and that of Go. The value is 1.", []string{"version", "goversion"}},
	StartTimestamp:  {gauge, "When the agent was started, in seconds since 1970.", nil},
	ReloadSuccess:   {gauge, "Whether the newest configuration that the agent was given is in use: 1 or 0.", nil},
	ReloadTimestamp: {gauge, "Since when the configuration is in use, in seconds since 1970.", nil},
	Namespaces:      {gauge, "Network namespaces that are followed, or are to be.", []string{"state"}},

	Enforcing:  {gauge, "Whether the agent changes anything (mode enforce): 1 or 0.", []string{"netns"}},
	Paused:     {gauge, "Whether the agent was told to keep its hands off for a while (tsoctl pause): 1 or 0.", []string{"netns"}},
	Degraded:   {gauge, "Whether a person should look at the namespace: 1 or 0.", []string{"netns"}},
	Findings:   {gauge, "What tsoctl status lists for a person to look at.", []string{"netns"}},
	LinksSeen:  {gauge, "Network devices.", []string{"netns"}},
	RoutesSeen: {gauge, "Routes of all tables.", []string{"netns"}},
	Policies:   {gauge, "XFRM policies.", []string{"netns"}},
	SAs:        {gauge, "XFRM states.", []string{"netns"}},

	SourceStale:       {gauge, "Whether the source lost something and is being read again: 1 or 0.", []string{"netns", "source"}},
	SourceEvents:      {counter, "Events that the kernel sent.", []string{"netns", "source"}},
	SourceResyncs:     {counter, "How often all that the source knows was read from the kernel, the first time included.", []string{"netns", "source"}},
	SourceOverruns:    {counter, "How often the kernel dropped events because the receive buffer was full. Each led to a resync.", []string{"netns", "source"}},
	SourceUndecodable: {counter, "Messages of the kernel that made no sense. Each led to a resync.", []string{"netns", "source"}},

	Coverages:    {gauge, "Coverages by what asks for them, and by where their segments are cut.", []string{"netns", "kind", "cut"}},
	CoverageMTUs: {gauge, "Coverages by policy, by their inner MTU.", []string{"netns", "mtu"}},

	Holds:         {gauge, "Features that are, or are to be, held off.", []string{"netns", "device", "state"}},
	FeatureActive: {gauge, "Whether a feature that the agent manages is on in the kernel: 1 or 0.", []string{"netns", "device", "feature"}},
	Locks:         {gauge, "Routes with an MTU lock in place, once for each of their devices.", []string{"netns", "device", "state"}},
	Clones:        {gauge, "Routes with an MTU lock in the agent's own tables, once for each of their devices.", []string{"netns", "device", "state"}},
	Rules:         {gauge, "Routing rules of the agent.", []string{"netns", "state"}},
	LockMTUMin:    {gauge, "The smallest MTU that is set on a route by the device.", []string{"netns", "device"}},
	LockMTUMax:    {gauge, "The largest MTU that is set on a route by the device.", []string{"netns", "device"}},
	Lanes:         {gauge, "NICs whose covered flows take a lane.", []string{"netns", "state"}},
	Clamps:        {gauge, "Destinations of forwarded connections whose MSS is lowered.", []string{"netns", "state"}},
	DeviceMTUs:    {gauge, "Devices whose own MTU is set.", []string{"netns", "state"}},

	Contested:       {gauge, "Objects that somebody else changes again and again, and that the agent leaves alone therefore.", []string{"netns", "kind"}},
	RestoresPending: {gauge, "What has no cause any more and is not given back yet.", []string{"netns", "kind"}},
	JournalEntries:  {gauge, "Entries in the journal of what was changed.", []string{"netns"}},

	Actions:  {counter, "What the agent did to the kernel and to its journal.", []string{"netns", "action", "result"}},
	Repairs:  {counter, "Writes that met a change by the route's owner, and were mended.", []string{"netns"}},
	Reaction: {0, "From when the kernel's event was received until all that it asked for was written.", []string{"netns"}},
	Rounds:   {counter, "Rounds of the agent's loop.", []string{"netns"}},

	ConnectionsReadable: {gauge, "Whether the kernel lets its TCP sockets be read (BPF): 1 or 0.", []string{"netns"}},
	Connections:         {gauge, "Open TCP connections at the last diagnosis.", []string{"netns"}},
	ConnectionsLostOffload: {gauge, "Open TCP connections at the last diagnosis that are neither signed nor covered, " +
		"and have no segmentation offload as their listener holds, or held, a key. By the listener's port.", []string{"netns", "port"}},
	DiagnosisTimestamp: {gauge, "When the connections were looked at last, in seconds since 1970.", []string{"netns"}},
	KeyLooks:           {counter, "Looks at the keys of the namespace's TCP sockets.", []string{"netns"}},
	KeyLookSeconds:     {counter, "CPU time of all looks at the keys of the namespace's TCP sockets, the kernel's included.", []string{"netns"}},
}

// NewCollector makes metrics of what the source has.
func NewCollector(version string, source Source) *Collector {
	c := &Collector{version: version, source: source, descs: map[string]*prometheus.Desc{}}
	for _, name := range Names {
		c.descs[name] = prometheus.NewDesc(name, metrics[name].help, metrics[name].labels, nil)
	}
	return c
}

// Describe tells which metrics there are.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect sends the metrics as the reports are now.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	send := func(name string, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(c.descs[name], metrics[name].kind, value, labels...)
	}
	send(BuildInfo, 1, c.version, runtime.Version())
	s := c.source.Status()
	send(StartTimestamp, seconds(s.Since))
	send(ReloadSuccess, oneIf(s.ReloadError == ""))
	send(ReloadTimestamp, seconds(s.Configured))
	states := tally{}
	for _, state := range []string{agent.NetnsFollowed, agent.NetnsStarting, agent.NetnsLeaving, agent.NetnsFailed, agent.NetnsWaiting} {
		states.add(0, state)
	}
	for _, n := range s.Namespaces {
		states.add(1, n.State)
	}
	states.send(Namespaces, send)
	for _, o := range c.source.Observations() {
		p := page{report: o.Report, figures: o.Figures, netns: text(cmp.Or(o.Netns, netns.Host)), out: send}
		p.kernel()
		p.coverages()
		p.changes()
		p.trouble()
		p.loop()
		p.connections()
		ch <- c.reactions(p.netns, &o.Figures.Tally)
	}
}

func (c *Collector) reactions(netns string, t *agent.Tally) prometheus.Metric {
	buckets := map[float64]uint64{}
	var n uint64
	for i, count := range t.Reactions {
		n += count
		if i < len(agent.ReactionBounds) {
			buckets[agent.ReactionBounds[i]] = n
		}
	}
	return prometheus.MustNewConstHistogram(c.descs[Reaction], n, t.ReactionSum.Seconds(), buckets, netns)
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// A page is what one namespace's report says.
type page struct {
	report  *agent.Report
	figures *agent.Figures
	netns   string
	out     func(name string, value float64, labels ...string)
}

func (p *page) send(name string, value float64, labels ...string) {
	p.out(name, value, append([]string{p.netns}, labels...)...)
}

// A tally adds up values by up to two labels.
type tally map[[2]string]float64

func (t tally) add(n float64, labels ...string) {
	var k [2]string
	copy(k[:], labels)
	t[k] += n
}

// send sends all values, with the labels that the metric has beyond netns.
func (t tally) send(name string, send func(string, float64, ...string)) {
	n := len(metrics[name].labels)
	if n > 0 && metrics[name].labels[0] == "netns" {
		n--
	}
	for k, v := range t {
		send(name, v, k[:n]...)
	}
}

func (p *page) kernel() {
	r := p.report
	p.send(Enforcing, oneIf(r.Mode == agent.Enforce))
	p.send(Paused, oneIf(r.Paused != nil))
	p.send(Degraded, oneIf(r.Degraded()))
	p.send(Findings, float64(len(r.Findings)))
	p.send(LinksSeen, float64(r.Links))
	p.send(RoutesSeen, float64(r.Routes))
	p.send(Policies, float64(r.Policies))
	p.send(SAs, float64(r.SAs))
	for _, s := range r.Sources {
		p.send(SourceStale, oneIf(slices.Contains(r.Stale, s.Source)), s.Source)
		p.send(SourceEvents, float64(s.Events), s.Source)
		p.send(SourceResyncs, float64(s.Dumps), s.Source)
		p.send(SourceOverruns, float64(s.Overruns), s.Source)
		p.send(SourceUndecodable, float64(s.Undecodable), s.Source)
		if s.Source == "sockopt" {
			p.send(KeyLooks, float64(s.Dumps))
			p.send(KeyLookSeconds, s.Seconds)
		}
	}
}

func (p *page) coverages() {
	kinds, mtus := tally{}, map[int]float64{}
	for i := range p.report.Coverages {
		c := &p.report.Coverages[i]
		kind := cmp.Or(c.Key, "policy")
		if c.Maybe {
			kind = "policy-optional"
		}
		kinds.add(1, kind, c.Cut)
		if c.Key == "" {
			mtus[c.MTU]++
		}
	}
	kinds.send(Coverages, p.send)
	// The most frequent ones have their own label.
	byCount := slices.SortedFunc(maps.Keys(mtus), func(a, b int) int { return cmp.Or(cmp.Compare(mtus[b], mtus[a]), cmp.Compare(b, a)) })
	byMTU := tally{}
	for i, mtu := range byCount {
		switch {
		case mtu == 0:
			byMTU.add(mtus[mtu], None)
		case i < MaxMTUs:
			byMTU.add(mtus[mtu], strconv.Itoa(mtu))
		default:
			byMTU.add(mtus[mtu], Other)
		}
	}
	byMTU.send(CoverageMTUs, p.send)
}

func (p *page) changes() {
	r := p.report
	names := p.devices()
	label := func(device string) string {
		if names[device] {
			return text(device)
		}
		return Other
	}
	holds, locks, clones, rules, lanes, clamps, mtus := tally{}, tally{}, tally{}, tally{}, tally{}, tally{}, tally{}
	active := tally{}
	for _, h := range r.Holds {
		holds.add(1, label(h.Device), h.State)
	}
	for _, f := range p.figures.Features {
		if names[f.Device] { // others can't be told apart
			active[[2]string{label(f.Device), f.Feature}] = oneIf(f.Active)
		}
	}
	least, most := map[string]float64{}, map[string]float64{}
	locked := func(t tally, devices []string, mtu uint32, state string) {
		for _, d := range devices {
			d = label(d)
			t.add(1, d, state)
			if have, known := least[d]; !known || float64(mtu) < have {
				least[d] = float64(mtu)
			}
			most[d] = max(most[d], float64(mtu))
		}
	}
	for _, l := range r.Locks {
		locked(locks, l.Devices, l.MTU, l.State)
	}
	for _, c := range r.Clones {
		if !c.Throw && !c.Copy {
			locked(clones, c.Devices, c.MTU, c.State)
		}
	}
	for _, x := range r.Rules {
		rules.add(1, x.State)
	}
	for _, x := range r.Lanes {
		lanes.add(1, x.State)
	}
	for _, x := range r.Clamps {
		clamps.add(1, x.State)
	}
	for _, x := range r.DeviceMTUs {
		mtus.add(1, x.State)
	}
	for name, t := range map[string]tally{
		Holds: holds, FeatureActive: active, Locks: locks, Clones: clones, Rules: rules, Lanes: lanes, Clamps: clamps, DeviceMTUs: mtus,
	} {
		t.send(name, p.send)
	}
	for d := range least {
		p.send(LockMTUMin, least[d], d)
		p.send(LockMTUMax, most[d], d)
	}
}

// devices are those that have a label of their own: the first ones by name that have a hold, then those that
// only have locks.
func (p *page) devices() map[string]bool {
	out := map[string]bool{}
	take := func(names iter.Seq[string]) {
		for _, d := range slices.Compact(slices.Sorted(names)) {
			if len(out) < MaxDevices {
				out[d] = true
			}
		}
	}
	take(func(yield func(string) bool) {
		for _, h := range p.report.Holds {
			if !yield(h.Device) {
				return
			}
		}
	})
	take(func(yield func(string) bool) {
		for _, l := range p.report.Locks {
			for _, d := range l.Devices {
				if !yield(d) {
					return
				}
			}
		}
		for _, c := range p.report.Clones {
			if c.Copy {
				continue
			}
			for _, d := range c.Devices {
				if !yield(d) {
					return
				}
			}
		}
	})
	return out
}

func (p *page) trouble() {
	r, f := p.report, p.figures
	contested := tally{}
	contested.add(0, "feature")
	contested.add(0, "device-mtu")
	contested.add(float64(f.RestingLocks), "route")
	contested.add(float64(f.WithdrawnLocks), "rule")
	contested.add(oneIf(f.ContestedClamp), "clamp")
	pending := tally{}
	pending.add(0, "coverage")
	pending.add(0, "feature")
	pending.add(0, "lane")
	pending.add(float64(f.StuckRestores), "route")
	for _, h := range r.Holds {
		switch h.State {
		case agent.StateContested:
			contested.add(1, "feature")
		case agent.StateReleasing:
			pending.add(1, "feature")
		}
	}
	for _, m := range r.DeviceMTUs {
		if m.State == agent.StateContested {
			contested.add(1, "device-mtu")
		}
	}
	for _, l := range r.Lanes {
		if l.State == agent.StateReleasing {
			pending.add(1, "lane")
		}
	}
	for i := range r.Coverages {
		if r.Coverages[i].Gone {
			pending.add(1, "coverage")
		}
	}
	contested.send(Contested, p.send)
	pending.send(RestoresPending, p.send)
	p.send(JournalEntries, float64(f.JournalEntries))
}

func (p *page) loop() {
	t := &p.figures.Tally
	for a, name := range agent.Actions {
		for res, result := range agent.Results {
			if agent.Action(a) != agent.ActOther {
				p.send(Actions, float64(t.Actions[a][res]), name, result)
			}
		}
	}
	p.send(Repairs, float64(p.report.Counters.Repairs))
	p.send(Rounds, float64(p.report.Counters.Rounds))
}

func (p *page) connections() {
	d := p.report.Diagnosis
	if d == nil {
		return // not looked yet
	}
	p.send(DiagnosisTimestamp, seconds(d.At))
	p.send(ConnectionsReadable, oneIf(d.Unreadable == ""))
	if d.Unreadable != "" {
		return
	}
	p.send(Connections, float64(d.Connections))
	for port, n := range lostByPort(d) {
		p.send(ConnectionsLostOffload, float64(n), port)
	}
}

// lostByPort counts by the listener's port. A port has as many listeners as there are addresses.
func lostByPort(d *agent.Diagnosis) map[string]int {
	out := map[string]int{}
	for _, c := range d.Collateral {
		port := None
		if c.Port != 0 {
			port = strconv.Itoa(int(c.Port))
		}
		out[port] += c.Lost
	}
	if d.MoreCollateral > 0 {
		out[Other] += d.MoreCollateral
	}
	return out
}
