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
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"sync"
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

// Run follows the kernel until the context ends, then restores or keeps what is held as the
// configuration says: with keep, only the rules and clones go, which nobody would follow. The error is nil after a graceful stop.
func (a *Agent) Run(ctx context.Context) error {
	a.watchOver()
	watch, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		a.reports.end(a)
		close(a.ended)
		if !a.ringGoes {
			a.ring.end()
		}
	}()
	defer a.end()
	defer cancel()
	failed := make(chan error, 1)
	if !a.once { // which is the loop's from here on
		wg.Go(func() { a.watchClamps(watch) })
		wg.Go(func() { a.watchLanes(watch) })
		wg.Go(func() { a.watchConnections(watch) })
	}
	wg.Go(func() {
		if err := a.sources.run(watch, a.inbox); err != nil && watch.Err() == nil {
			failed <- err
		}
	})
	return a.loop(ctx, failed)
}

// stopWithin bounds how long a graceful stop may take to restore.
const stopWithin = 30 * time.Second

func (a *Agent) loop(ctx context.Context, failed <-chan error) error {
	a.reports.looping.Store(true)
	timer := time.NewTimer(0)
	defer timer.Stop()
	resync := time.NewTimer(a.resyncIn())
	defer resync.Stop()
	done := ctx.Done()
	var deadline <-chan time.Time
	for {
		select {
		case <-done:
			done = nil
			cause := context.Cause(ctx)
			renewed := errors.Is(cause, errRenew)
			if renewed {
				a.event(api.EventState, renewalOf(cause))
			}
			if a.once || a.cfg.Mode == Observe {
				return a.stopped(ctx)
			}
			back := errors.Is(cause, errLetGo) || errors.Is(cause, errRenewBack)
			if renewed && !back {
				return nil // another agent takes over
			}
			if a.lastP == nil && !back && a.heir == "" {
				// Not even read yet: this run has written nothing.
				if n := a.claims(); n > 0 {
					return fmt.Errorf("agent: stopped before the kernel's state was read: %s still in place; run `tsoctl restore`", plural(n, "change of an earlier run is", "changes of an earlier run are"))
				}
				return nil
			}
			a.goal, a.once, a.st.paused, a.st.obeyed = restoreAll, true, nil, nil
			if a.cfg.OnStop == KeepOnStop && !back {
				// Nobody follows the rules and clones from now on; holds and in-place locks don't go stale.
				a.goal = restoreStale
			}
			says, order := "stopping", "the agent stops"
			if renewed {
				says, order = "giving everything back for another configuration", takenOver
			}
			a.says(says, "on_stop", a.cfg.OnStop, "holds", len(a.st.holds), "locks", len(a.st.locks))
			a.st.causes.order, a.st.touched = order, true
			deadline = time.After(stopWithin)
			timer.Reset(0)
		case <-deadline:
			return fmt.Errorf("agent: not everything could be restored within %s; still in place: %s; run `tsoctl restore`", stopWithin, a.left())
		case err := <-failed:
			return fmt.Errorf("agent: %w", err)
		case fn := <-a.calls:
			fn()
			continue
		case <-resync.C:
			a.sources.resync()
			a.st.changes.All = true // the plan is looked at as a whole, too
			a.readProbed()
			a.inbox.post(batch{offer: true, resync: true})
			a.diagnoseSoon()
			resync.Reset(a.resyncIn())
			continue
		case <-a.inbox.signal:
		case <-timer.C:
		}
		next, reached := a.step(time.Now())
		if reached && a.once {
			return a.stuckError()
		}
		timer.Stop()
		if next > 0 {
			timer.Reset(next)
		}
	}
}

func (a *Agent) stopped(ctx context.Context) error {
	if a.once {
		return ctx.Err()
	}
	return nil
}

// resyncIn spreads full resyncs by a tenth, so that the machines of a fleet don't do it at once.
func (a *Agent) resyncIn() time.Duration {
	d := time.Duration(a.cfg.ResyncEvery)
	return d + time.Duration(rand.Int64N(int64(d)/5+1)) - d/10
}

// step takes in what is pending, as much of it as one round takes, then plans and acts once. next is when it wants to be called
// again without an event, 0 for not; reached says that the goal is reached.
func (a *Agent) step(now time.Time) (next time.Duration, reached bool) {
	left := a.takeEvents()
	if a.still(now) {
		next, reached = a.pass(now)
	} else {
		a.due.failed = a.stats.Failed
		next, reached = a.act(now)
		a.due.after(now, next, reached)
	}
	if left {
		return time.Nanosecond, false // the rest is for the next rounds
	}
	return next, reached
}

// act plans and acts once.
func (a *Agent) act(now time.Time) (next time.Duration, reached bool) {
	a.obey(now)
	if a.lastP == nil {
		if !a.st.ready() {
			a.answerOrders() // nothing is written before
			return 0, false
		}
		a.checkAdopted()
	}
	a.tellNICs()
	if a.st.ready() {
		a.takeIn(now)
	}
	if wait := a.awaitEchoes(now); wait > 0 {
		return wait, false
	}
	a.stats.Rounds++
	next, reached = a.round(now)
	if len(a.early) > 0 { // the signal for it was taken, too
		next = time.Nanosecond
	}
	a.tellWork(reached)
	return next, reached
}

// tellWork tells how much was done since the last round, and once that the start is over.
func (a *Agent) tellWork(reached bool) {
	n := int(a.stats.Events - a.toldWork)
	if !a.st.planner.Followed() {
		n += a.lastP.CoverageCount()
	}
	a.toldWork = a.stats.Events
	a.weigh(reached)
	a.heap.Did(n)
	if reached && !a.settled {
		a.settled = true
		a.heap.Settled()
	}
}

var errEndedAgent = errors.New("the agent of this namespace has ended, or another one takes its place: try again in a moment")

// Call runs fn in the loop and waits for it, so that fn may read the state.
func (a *Agent) call(ctx context.Context, fn func()) error {
	done := make(chan struct{})
	select {
	case a.calls <- func() { fn(); close(done) }:
	case <-ctx.Done():
		return ctx.Err()
	case <-a.ended:
		return errEndedAgent
	}
	<-done
	return nil
}

// errLetGo is the cause with which a context ends when the agent is to give everything back,
// whatever on_stop says: nobody follows the namespace from then on.
var errLetGo = errors.New("the namespace is let go")

// forwarding reads whether the namespace forwards. The kernel tells of changes in a group of its
// own (RTNLGRP_IPV4_NETCONF); reading two small files in the rounds that plan something is
// cheaper than to follow it. The files stay open: which namespace they are of is decided when
// they are opened (net_ctl_header_lookup, net/sysctl_net.c). Open, they don't keep it alive.
type forwarding struct {
	files map[routes.Family]*os.File
	b     [1]byte // what is read, so that no round allocates it
}

// openForwarding opens the files of the calling thread's namespace. A family that is not there
// doesn't forward.
func openForwarding() *forwarding {
	f := forwarding{files: map[routes.Family]*os.File{}}
	for family, path := range map[routes.Family]string{
		routes.IPv4: "/proc/sys/net/ipv4/ip_forward",
		routes.IPv6: "/proc/sys/net/ipv6/conf/all/forwarding",
	} {
		if file, err := os.Open(path); err == nil {
			f.files[family] = file
		}
	}
	return &f
}

// read reads them. Where they are as before, what was read then is returned again: it is never changed.
func (f *forwarding) read(before map[routes.Family]bool) map[routes.Family]bool {
	if f == nil {
		return before
	}
	out := before
	for family, file := range f.files {
		n, _ := file.ReadAt(f.b[:], 0)
		forwards := n == 1 && f.b[0] == '1'
		if have, known := out[family]; known && have == forwards {
			continue
		}
		fresh := maps.Clone(out)
		fresh[family] = forwards
		out = fresh
	}
	return out
}

// Close closes the files.
func (f *forwarding) Close() error {
	var errs []error
	for _, file := range f.files {
		errs = append(errs, file.Close())
	}
	return errors.Join(errs...)
}
