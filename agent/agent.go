// Package agent keeps segmentation offload off, and route MTUs locked, exactly where IPsec and
// TCP signatures need it.
//
//	kernel ── events ──> xfrmwatch  routes  ethtool  sockopt
//	                         └────────┴──┬───┴────────┘
//	                                     v
//	                       one loop owns the state (this package)
//	                                     v
//	                       plan.Make, plan.Diff (pure)
//	                                     v
//	                       journal ──> kernel ──> read back
//	                                     v
//	                       Report (immutable, made when it is asked for) ──> control socket
package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync/atomic"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/heap"
	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/lane"
	"tsoagent/routes"
)

// goal is what the loop works towards.
type goal uint8

const (
	protect      goal = iota // what the plan says
	restoreAll               // nothing of ours
	restoreStale             // none of our rules and clones; holds and in-place locks stay
)

// Agent follows one network namespace: that of the thread which called New. Its Run method owns
// all state; Report is safe for concurrent use.
type Agent struct {
	cfg     Config
	trust   *keyTrust
	ns      *netns.Namespace // where all its sockets are, nil for none: the thread's
	dir     string           // of the journal
	name    string           // of the namespace, "" for the host's
	log     *slog.Logger
	version string
	started time.Time

	inbox    *inbox
	early    []batch // what the watchers have brought while the loop wrote
	unseen   int     // notifications of own writes of routes that the watcher has not brought yet
	backlog  backlog
	brought  bool // this step took events of routes in
	news     bool // it took something else in, or had nothing to take in and was called nonetheless
	due      due
	calls    chan func()
	ended    chan struct{} // closed when Run returns
	reports  reports
	glance   atomic.Pointer[glance] // of the newest round, nil before the first plan
	ring     *ring
	ringGoes bool        // it is handed on to another agent, and does not end with this one's Run
	halt     atomic.Bool // an order to pause is on its way: stop writing
	sources  *sources
	forwards *forwarding
	conns    *connections
	rt       routeTable
	// openAsker opens another connection for questions, nil where there is none.
	openAsker func() (closableAsker, error)
	et        featureClient
	links     linkTable                                 // nil where no MTU of a device is ever set
	ids       *netns.IDs                                // nil where the numbers of other namespaces can't be asked for
	others    others                                    // nil where there are none
	guard     Guard                                     // nil where there is none
	nics      atomic.Pointer[map[string]routes.Ifindex] // those in the namespace, by nicKey; 0 for several
	away      atomic.Int32                              // how many devices are in st.moved
	openNFT   func() (clampTable, error)                // nil where nothing is ever clamped
	nft       clampTable                                // nil until it is needed
	lanes     laneClient                                // nil where none can be made, for the reason noLanes
	noLanes   string
	journal   book
	closers   []func() error
	findings  []string // what the journal's recovery had to say
	probed    map[plan.ProbeKey]plan.Probed
	// probeFinding is why a probe's result can't be used, empty if it can or there is none.
	probeFinding string

	goal goal
	once bool // stop when the goal is reached
	// alone says that this one only looks, beside an agent or without one. It does not change while it runs.
	alone bool
	heir  string // why it took over what another one of this process has left, "" if it did not
	// onReady is called when the first plan is in place, nil for nothing.
	onReady  func()
	heap     *heap.Keeper // of the process, nil for none
	toldWork uint64       // the events that it has heard of
	most     int          // routes and policies at once
	stout    atomic.Bool  // another agent would be much smaller: see weigh
	settled  bool         // the goal was reached once
	again    bool         // something has to be looked at once more
	st       *state
	lastP    *plan.Plan
	lastIn   plan.Input // what lastP follows from
	came     outcome    // of the last round
	// diagnosis is the newest one, nil for none.
	diagnosis *Diagnosis
	telling   telling
	stats     Counters
	tally     Tally
	since     time.Time        // of the oldest event that no round has seen
	clock     func() time.Time // of events, and for how long things take; when they are due comes with each step
	// dropped counts the rules and clones that were taken away.
	dropped struct{ rules, clones int }
}

// routeTable is what the loop needs to write routes and rules (routes.Table).
type routeTable interface {
	Port() uint32
	Replace(msg []byte) (uint32, error)
	Batch(writes []routes.Write) ([]routes.Result, error)
	AddRule(routes.Rule) error
	DeleteRule(routes.Rule) error
	Lookup(routes.Query) (routes.Answer, error)
}

// featureClient is what the loop needs to switch features (ethtool.Client).
type featureClient interface {
	Features(ethtool.Device) (*ethtool.Features, error)
	Set(ethtool.Device, map[ethtool.Feature]bool) (*ethtool.Features, error)
}

// book is what the loop needs of the journal (journal.Journal).
type book interface {
	Put(entries ...journal.Entry) error
	Remove(ids ...string) error
	Entries() []journal.Entry
	Len() int
}

var (
	_ routeTable    = (*routes.Table)(nil)
	_ featureClient = (*ethtool.Client)(nil)
	_ book          = (*journal.Journal)(nil)
)

// ErrRunning is matched (errors.Is) by the error of New when another agent has the journal.
var ErrRunning = journal.ErrLocked

// New opens the journal and subscribes to all sources in the namespace of the calling thread.
// It fails with ErrRunning if another agent runs with the same run directory, and with an error
// that wraps EPERM and names the capability if the process lacks one.
func New(cfg Config, log *slog.Logger, version string) (*Agent, error) {
	return newAgentIn(netns.Host, cfg, log, version, (*Agent).open)
}

// newAgentIn is an agent for a namespace, which is named as in a configuration. If start fails,
// it is closed again.
func newAgentIn(spec string, cfg Config, log *slog.Logger, version string, start func(*Agent) error) (*Agent, error) {
	a := newAgent(cfg, log, version)
	err := a.enter(spec)
	if err == nil {
		err = start(a)
	}
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// enter makes a namespace the agent's, and gives it the place for its journal.
func (a *Agent) enter(spec string) error {
	host, err := netns.Current()
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	a.ns = host
	a.closers = append(a.closers, host.Close)
	if spec == netns.Host {
		return nil
	}
	ns, err := netns.Open(netns.Path(spec))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &AbsentError{Of: api.AbsentNetns, Text: fmt.Sprintf("there is no namespace %q", spec), Err: err}
	case errors.Is(err, netns.ErrNotNetns):
		return &AbsentError{Of: api.AbsentNetns, Text: fmt.Sprintf("%q is no network namespace", spec), Err: err}
	case err != nil:
		return fmt.Errorf("agent: %w", err)
	}
	a.closers = append(a.closers, ns.Close)
	if ns.ID() == host.ID() {
		return nil
	}
	a.ns, a.name = ns, spec
	scope, err := a.scope()
	if err != nil {
		return err
	}
	a.dir = cookieDir(a.cfg.RunDir, scope.NetnsCookie)
	return nil
}

// open opens the journal and subscribes to all sources.
func (a *Agent) open() error {
	if err := checkCapabilities(); err != nil {
		return err
	}
	scope, err := a.scope()
	if err != nil {
		return err
	}
	j, found, err := journal.Open(a.dir, scope)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	a.closers = append(a.closers, j.Close)
	return a.openWith(j, found)
}

// openWith is open with a journal that is open.
func (a *Agent) openWith(j *journal.Journal, found *journal.Recovery) error {
	a.journal = j
	a.adopt(found)
	if err := a.checkTables(); err != nil {
		return err
	}
	return a.dial()
}

// in runs fn on a thread that is in the agent's namespace. Whatever opens a socket, or a file
// under /proc/sys/net, is to be called so.
func (a *Agent) in(fn func() error) error {
	if a.ns == nil {
		return fn()
	}
	return a.ns.Do(fn)
}

// scope is where the agent's journal is true.
func (a *Agent) scope() (s journal.Scope, err error) {
	err = a.in(func() (err error) {
		s, err = journal.ReadScope()
		return err
	})
	if err != nil {
		err = fmt.Errorf("agent: %w", err)
	}
	return s, err
}

// checkTables refuses to run with other tables than an earlier run has left in place: nobody
// would follow those. Who only gives back takes the numbers of that run, unless others were asked for: the service's ExecStopPost knows no
// configuration.
func (a *Agent) checkTables() error {
	t, own, none := a.st.tables, &a.cfg.Plan, Config{}.WithDefaults().Plan
	if t == nil || t.Table == own.Table && t.Protocol == own.Protocol {
		return nil
	}
	if a.goal != protect && own.Table == none.Table && own.Protocol == none.Protocol {
		own.Table, own.Protocol = t.Table, t.Protocol
		return nil
	}
	return fmt.Errorf("agent: an earlier run has used table %d and protocol %d, and they may still be in place: run `tsoctl restore --table %d --protocol %d` first",
		t.Table, t.Protocol, t.Table, t.Protocol)
}

func newAgent(cfg Config, log *slog.Logger, version string) *Agent {
	cfg = cfg.WithDefaults()
	started := time.Now()
	a := &Agent{
		cfg: cfg, dir: cfg.RunDir, log: log, version: version, started: started, ring: newRing(started), clock: time.Now,
		inbox: newInbox(), calls: make(chan func()), ended: make(chan struct{}), reports: newReports(), conns: newConnections(),
		trust: newKeyTrust(cfg.TCPKeysTrust),
	}
	a.st = newState(&a.cfg.Plan)
	return a
}

func (a *Agent) dial() error {
	a.readProbed()
	err := a.in(func() error {
		rt, err := routes.OpenTable()
		if err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		a.closers = append(a.closers, rt.Close)
		a.rt, a.links, a.openNFT = rt, rt, openClamps
		a.openAsker = func() (rt closableAsker, err error) {
			err = a.in(func() (err error) {
				rt, err = routes.OpenTable()
				return err
			})
			return rt, err
		}
		et, err := ethtool.Dial()
		if err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		a.closers = append(a.closers, et.Close)
		a.et = et
		if lanes, err := lane.Dial(); err != nil {
			a.noLanes = err.Error()
		} else {
			a.closers = append(a.closers, lanes.Close)
			a.lanes = lanes
		}
		if ids, err := netns.DialIDs(); err != nil {
			a.log.Warn("devices that are moved can't be followed", "err", err)
		} else {
			a.closers = append(a.closers, ids.Close)
			a.ids = ids
		}
		a.forwards = openForwarding()
		a.closers = append(a.closers, a.forwards.Close)
		return nil
	})
	if err != nil {
		return err
	}
	a.sources, err = dialSources(a.log, a.in, a.cfg, a.trust)
	return err
}

// Close releases what New opened. Run must have returned.
func (a *Agent) Close() error {
	var errs []error
	if a.sources != nil {
		errs = append(errs, a.sources.close())
	}
	for i := len(a.closers) - 1; i >= 0; i-- {
		errs = append(errs, a.closers[i]())
	}
	return errors.Join(errs...)
}
