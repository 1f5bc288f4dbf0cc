package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/heap"
	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
)

// Fleet runs one Agent for each network namespace that the configuration names. They share
// nothing: each has its own sockets, state and journal.
//
//	/run/netns, paths, processes ──> Watcher ──> reconcile ──> a member for each namespace
//	                                                              │
//	                                     New, Run, again if it fails, until the last name goes
//
// A socket in a namespace keeps it alive, so a namespace whose last name is gone is let go:
// everything is given back in it, as processes may still live there, and all is closed.
// It is safe for concurrent use.
type Fleet struct {
	cfg     Config // of the start
	log     *slog.Logger
	version string
	started time.Time
	host    *netns.Namespace
	lock    *journal.Journal // of the run directory where the host is not followed, else nil
	look    chan struct{}    // has a token when namespaces may have come or gone
	grace   time.Duration    // stopWithin
	reloads chan reload
	pings   chan chan<- struct{}
	ready   chan struct{}
	readied chan struct{} // closed and made anew with each token of ready
	over    chan struct{} // closed when Run ends

	wg      sync.WaitGroup
	mu      sync.Mutex
	members map[netns.ID]*member
	waiting map[string]string // names that lead to no namespace, and why
	dead    map[string]bool   // those of processes that ended
	notes   []string          // findings about journals
	strays  map[uint64]stray  // namespaces that are not followed any more, by their cookies
	ghosts  []*ghost          // namespaces that are gone
	// recallDue says that strays and ghosts are to be looked at, recallTick that it is for a resync, recalling that it
	// is under way.
	recallDue, recallTick, recalling bool
	sweepDue                         bool   // what an earlier run has left in namespaces that are not followed is to be looked for again
	hostCookie                       uint64 // set where the host is not followed
	blind                            error  // why nothing tells of namespaces that come and go
	watcher                          *netns.Watcher
	errs                             []error     // of members that ended
	hooked                           hooked      // how keys are known
	paused                           *api.Paused // all are, and those that come; nil for not
	live                             Config      // the configuration in use
	generation                       uint64      // counts the configurations: agents with an older one end
	// configured is when the configuration was taken over, reloadErr why a newer one was not.
	configured time.Time
	reloadErr  string
	// readyFor is the generation for which ready had a token last. reloader reads the configuration again, nil where there is none to read.
	readyFor uint64
	reloader func(context.Context) error

	heap heap.Keeper // of the process
	// guard watches over all agents, nil for none.
	guard Guard

	openHook func() (keyHook, error)
	openAO   func() (keyLister, error)
}

// A member is a namespace that is followed. Its fields belong to the Fleet's lock, but for id.
type member struct {
	id      netns.ID
	names   []string // all that lead to it, the first is how it is called
	agent   *Agent   // nil while it starts and when it ended
	why     string   // why there is no agent, empty while it starts
	leaving bool
	over    bool          // there will be no agent any more
	paused  *api.Paused   // for an agent that starts, nil for none
	ring    *ring         // of all its agents, one after the other
	counts  counts        // by all its agents before this one
	turn    chan struct{} // closed and made anew when agent, why or over has changed
	// again ends the agent for one with another configuration, nil while none runs. The agent has, or had, the
	// configuration cfg, that of the generation.
	again      context.CancelCauseFunc
	cfg        Config
	generation uint64
	// unfollowed says that an agent with this configuration has left what is in place to the next one, which does not run yet.
	unfollowed bool
	cancel     context.CancelCauseFunc
}

// NewFleet opens the host's namespace, which is that of the calling thread, as New does. What
// goes wrong with others is told in reports. Where the host is not followed any more, what an earlier
// run left in it is given back first; that ends stopWithin after ctx does, at the latest.
func NewFleet(ctx context.Context, cfg Config, log *slog.Logger, version string) (*Fleet, error) {
	return newFleet(ctx, cfg, log, version, stopWithin)
}

func newFleet(ctx context.Context, cfg Config, log *slog.Logger, version string, grace time.Duration) (*Fleet, error) {
	cfg = cfg.WithDefaults()
	host, err := netns.Current()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	f := &Fleet{
		cfg: cfg, log: log, version: version, started: time.Now(), configured: time.Now(), host: host, look: make(chan struct{}, 1), grace: grace,
		members: map[netns.ID]*member{}, waiting: map[string]string{}, dead: map[string]bool{}, strays: map[uint64]stray{},
		reloads: make(chan reload), pings: make(chan chan<- struct{}), ready: make(chan struct{}, 1), readied: make(chan struct{}), over: make(chan struct{}),
		openHook: openKeyHook, openAO: openAO,
	}
	f.heap.Less(f.slim)
	if !cfg.Namespaces.host() && slices.ContainsFunc(cfg.Namespaces, f.isHost) {
		f.cfg.Namespaces = append(slices.Clone(cfg.Namespaces), netns.Host)
	}
	f.live = f.cfg
	if f.cfg.Namespaces.host() {
		a, err := New(cfg, log, version)
		if err != nil {
			return nil, errors.Join(err, host.Close())
		}
		a.others, a.heap = f, &f.heap
		m := &member{id: host.ID(), names: []string{netns.Host}, agent: a, cancel: func(error) {}, turn: make(chan struct{})}
		m.handOn(a)
		f.members[host.ID()] = m
		return f, nil
	}
	if err := f.lockRunDir(ctx); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// isHost reports whether a name leads to the host's namespace.
func (f *Fleet) isHost(spec string) bool {
	id, err := netns.Stat(netns.Path(spec))
	return err == nil && id == f.host.ID()
}

// lockRunDir keeps a second agent out where the host's own is not there to do it. What an
// earlier run has left in the host's namespace is given back first.
func (f *Fleet) lockRunDir(ctx context.Context) error {
	if err := checkCapabilities(); err != nil {
		return err
	}
	scope, err := journal.ReadScope()
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	j, found, err := journal.Open(f.cfg.RunDir, scope)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	f.lock, f.hostCookie = j, scope.NetnsCookie
	if len(found.Entries) > 0 && f.cfg.Mode == Enforce {
		return f.giveBackHost(ctx, found.Entries)
	}
	return nil
}

// Close releases what NewFleet opened. Run must have returned.
func (f *Fleet) Close() error {
	var errs []error
	for _, m := range f.members { // of a Fleet that was never run
		if m.agent != nil {
			errs = append(errs, m.agent.Close())
		}
	}
	if f.lock != nil {
		errs = append(errs, f.lock.Close())
	}
	return errors.Join(append(errs, f.host.Close())...)
}

// Run follows all namespaces until the context ends, then restores or keeps what is held in
// each, at the same time, as Agent.Run does. It ends early only if the host's agent does.
func (f *Fleet) Run(ctx context.Context) error {
	members, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	ended := make(chan struct{})
	f.mu.Lock()
	if m := f.members[f.host.ID()]; m != nil {
		f.wg.Go(func() {
			defer close(ended)
			err := f.runHost(members, m)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.errs = append(f.errs, err)
		})
	} else {
		f.tellReady(0)
	}
	f.mu.Unlock()
	var watching sync.WaitGroup
	watch, blind := context.WithCancel(members)
	watching.Go(func() { f.watchKeys(watch) })
	f.sweep(members)
	watched := false
	watchOthers := func(cfg Config) {
		if !watched && slices.ContainsFunc(cfg.Namespaces, func(s string) bool { return s != netns.Host }) {
			watched = true
			watching.Go(func() { f.watch(watch) })
			f.poke()
		}
	}
	watchOthers(f.cfg)
	every := f.cfg.ResyncEvery
	again := time.NewTicker(time.Duration(every)) // a process can change its namespace in silence
	defer again.Stop()
	keepTime := func(cfg Config) {
		if cfg.ResyncEvery != every {
			every = cfg.ResyncEvery
			again.Reset(time.Duration(every))
		}
	}
	defer close(f.over)
	for run := true; run; {
		select {
		case <-ctx.Done():
			run = false
		case <-ended:
			run = false
		case <-f.look:
			keepTime(f.Config()) // it can be the one before again
			f.reconcile(members)
			f.recall(members)
		case <-again.C:
			f.mu.Lock()
			f.recallDue, f.recallTick = true, true
			f.mu.Unlock()
			f.poke()
		case answer := <-f.pings:
			close(answer)
		case r := <-f.reloads:
			err := f.takeOver(members, r.cfg)
			if err == nil {
				cfg := f.Config()
				watchOthers(cfg)
				keepTime(cfg)
			}
			r.done <- err
		}
	}
	blind()
	watching.Wait()
	stop(nil)
	f.wg.Wait()
	f.endGhosts()
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(f.errs...)
}

func (f *Fleet) poke() {
	select {
	case f.look <- struct{}{}:
	default:
	}
}

// blindRetry is how soon it is tried again to watch, and looked without.
const blindRetry = 30 * time.Second

// watch pokes the loop when namespaces may have come or gone, until the context ends.
func (f *Fleet) watch(ctx context.Context) {
	for ctx.Err() == nil {
		w, err := netns.NewWatcher(f.poke)
		if err == nil {
			f.mu.Lock()
			f.watcher, f.blind = w, nil
			f.mu.Unlock()
			f.poke()
			err = w.Run(ctx)
		}
		if err == nil {
			return
		}
		f.mu.Lock()
		f.watcher, f.blind = nil, err
		f.mu.Unlock()
		f.log.Warn("nothing tells of namespaces that come and go: looking now and then", "err", err, "every", blindRetry)
		select {
		case <-ctx.Done():
		case <-time.After(blindRetry):
			f.poke()
		}
	}
}

// reconcile starts members for namespaces that came, and lets those go that nothing leads to
// any more.
func (f *Fleet) reconcile(ctx context.Context) {
	for _, say := range f.reconciled(ctx) {
		say()
	}
}

// sayings are lines for the log, for when the lock is free: where a log is slow, nobody waits for it.
type sayings []func()

func (s *sayings) add(log func(string, ...any), what string, args ...any) {
	*s = append(*s, func() { log(what, args...) })
}

// reconciled is reconcile, and returns what is to be said of it.
func (f *Fleet) reconciled(ctx context.Context) (said sayings) {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := f.resolve(&said)
	for id, m := range f.members {
		names, wanted := want[id]
		switch {
		case m.leaving:
		case wanted:
			if was := m.names[0]; m.rename(names) {
				said.add(f.log.Info, "a namespace is called differently now", "netns", m.names[0], "was", was)
			}
		default:
			m.leaving = true
			said.add(f.log.Info, "a namespace's last name is gone: giving everything back and letting it go", "netns", m.names[0])
			m.cancel(errLetGo)
		}
	}
	for id, names := range want {
		if f.members[id] != nil {
			continue // one that leaves comes back when it has left
		}
		m := &member{id: id, names: names, paused: lasting(f.paused), turn: make(chan struct{})}
		var mine context.Context
		mine, m.cancel = context.WithCancelCause(ctx)
		f.members[id] = m
		f.wg.Go(func() { f.follow(mine, m) })
	}
	return said
}

// rename takes over the names of a member, whose first one is kept while it leads there. It reports whether another one is first
// now.
func (m *member) rename(names []string) bool {
	if slices.Contains(names, m.names[0]) {
		m.names = slices.Concat(m.names[:1], slices.DeleteFunc(names, func(s string) bool { return s == m.names[0] }))
		return false
	}
	m.names = names
	return true
}

// resolve finds out where all names lead, and has those places watched. The caller holds the
// lock.
func (f *Fleet) resolve(said *sayings) map[netns.ID][]string {
	specs := slices.Clone(f.live.Namespaces)
	dirs := map[string]bool{}
	waiting := map[string]string{}
	if f.live.Namespaces.all() {
		specs = slices.DeleteFunc(specs, func(s string) bool { return s == netns.All })
		names, err := netns.Names()
		if err != nil {
			waiting[netns.All] = f.missing(said, netns.All, err)
		}
		specs = append(append(specs, netns.Host), names...)
		dirs[netns.Dir] = true
	}
	slices.SortFunc(specs, func(a, b string) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), strings.Compare(a, b)) })
	specs = slices.Compact(specs)
	out := map[netns.ID][]string{}
	var pids []int
	for _, spec := range specs {
		if spec == netns.Host {
			out[f.host.ID()] = append(out[f.host.ID()], spec)
			continue
		}
		path := netns.Path(spec)
		pid := netns.PidOf(path)
		if pid != 0 {
			pids = append(pids, pid)
		}
		if dir := parent(path); dir != "" {
			dirs[dir] = true
		}
		id, err := f.lookUp(spec, path)
		if err == nil && id == f.host.ID() && !f.live.Namespaces.host() {
			err = errOwn
		}
		if err != nil {
			waiting[spec] = f.missing(said, spec, err)
			continue
		}
		out[id] = append(out[id], spec)
	}
	f.waiting = waiting
	if f.watcher != nil {
		slices.Sort(pids)
		var list []string
		for dir := range dirs {
			list = append(list, dir)
		}
		f.watcher.Watch(list, slices.Compact(pids))
	}
	return out
}

// errEnded says that a process is gone; another one can get its number.
var errEnded = errors.New("the process has ended; its number is not followed again before the next start")

// errOwn says that a name came to lead to the host's namespace, which is not followed.
var errOwn = errors.New("it leads to the namespace that the agent was started in, which is called host")

// lookUp is the ID that a name leads to. A process's number is its own: once it ended, the name
// leads nowhere.
func (f *Fleet) lookUp(spec, path string) (netns.ID, error) {
	if f.dead[spec] {
		return netns.ID{}, errEnded
	}
	id, err := netns.Stat(path)
	if errors.Is(err, fs.ErrNotExist) && rank(spec) == rankProcess {
		f.dead[spec] = true
		return netns.ID{}, errEnded
	}
	return id, err
}

// missing says why a name leads nowhere, in the log when that is new.
func (f *Fleet) missing(said *sayings, spec string, err error) string {
	why := err.Error()
	if errors.Is(err, fs.ErrNotExist) {
		why = "there is no such namespace; waiting for it"
	}
	// A file that is about to be mounted on is no namespace for a moment, which is nothing to
	// tell in a log.
	if f.waiting[spec] != why && !errors.Is(err, netns.ErrNotNetns) {
		said.add(f.log.Warn, "a namespace is not followed", "netns", spec, "why", why)
	}
	return why
}

// The ranks of names: the most telling one is how a namespace is called.
const (
	rankHost = iota
	rankName
	rankPath
	rankProcess
)

func rank(spec string) int {
	path := netns.Path(spec)
	switch {
	case path == "":
		return rankHost
	case parent(path) == "":
		return rankProcess
	case parent(path) == netns.Dir:
		return rankName
	}
	return rankPath
}

// parent is the directory to watch for a path, none for that of a process.
func parent(path string) string {
	if strings.HasPrefix(path, "/proc/") {
		return ""
	}
	return path[:max(strings.LastIndexByte(path, '/'), 1)]
}
