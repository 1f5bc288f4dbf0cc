package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
)

// Another configuration is taken over as a restart takes over what a killed agent has left, which is the way that
// is tried most: each namespace's agent ends where it stands, and another one reads the kernel, adopts what is in
// place, and plans with the new configuration. Nothing is given back in between, but where nobody would follow
// it: see givesBack.

// takenOver is how events call it.
const takenOver = "another configuration is taken over"

// errRenew is the cause with which the context of an agent's Run ends when another agent is to take over what
// it holds. errRenewBack has it give everything back first.
var (
	errRenew     = errors.New(takenOver)
	errRenewBack = fmt.Errorf("%w, and everything is given back first", errRenew)
)

// ErrNeedsRestart is matched (errors.Is) by the error of Reload for what only a restart can change.
var ErrNeedsRestart = errors.New("takes a restart")

// ErrStopping is matched (errors.Is) by the error of a reload that comes when the agent stops already.
var ErrStopping = errors.New("the agent is stopping")

type reload struct {
	cfg  Config
	done chan<- error
}

// Reload has all namespaces followed by another configuration, or by none of it: the error, which matches
// ErrNeedsRestart if something takes a restart, leaves everything as it was. It returns when the change has
// begun; Ready tells when the agent's own namespace has been planned anew. The caller has validated the configuration.
func (f *Fleet) Reload(ctx context.Context, cfg Config) error {
	done := make(chan error, 1)
	select {
	case f.reloads <- reload{cfg, done}:
	case <-ctx.Done():
		return ctx.Err()
	case <-f.over:
		return errEndedAgent
	}
	select {
	case err := <-done:
		return err
	case <-f.over:
		return errEndedAgent
	}
}

// RefuseReload notes why a configuration was refused before it came here.
func (f *Fleet) RefuseReload(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reloadErr = err.Error()
}

// Config is the configuration in use.
func (f *Fleet) Config() Config {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.live
}

// Ready has a token when the agent's own namespace has been read and what it needs is in place: after the
// start, and after each Reload that changed something.
func (f *Fleet) Ready() <-chan struct{} { return f.ready }

// tellReady says so for a generation. The caller holds the lock.
func (f *Fleet) tellReady(generation uint64) {
	f.readyFor = max(f.readyFor, generation)
	close(f.readied)
	f.readied = make(chan struct{})
	select {
	case f.ready <- struct{}{}:
	default:
	}
}

// OnReload has the control API read the configuration again by fn, which is to call Reload, or RefuseReload.
func (f *Fleet) OnReload(fn func(context.Context) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reloader = fn
}

// refusedError is why a configuration is not taken over.
type refusedError struct{ err error }

// Error says that the one before it stays.
func (e *refusedError) Error() string {
	return "the configuration is refused, and the one before it stays in use:\n" + e.err.Error()
}

// Unwrap is why.
func (e *refusedError) Unwrap() error { return e.err }

// errNoFile is for an agent that was started without anything to read again.
var errNoFile = errors.New("this agent has no configuration to read again")

// settleWithin bounds how long the answer to a reload waits until all is in place.
const settleWithin = 20 * time.Second

// reloaded is for served.
func (f *Fleet) reloaded(ctx context.Context, by api.Peer) (*api.ReloadAnswer, error) {
	f.mu.Lock()
	reload, before := f.reloader, f.generation
	f.mu.Unlock()
	if reload == nil {
		return nil, errNoFile
	}
	f.log.Info("the configuration is read again", "asked_by", by.String())
	if err := reload(ctx); errors.Is(err, errEndedAgent) || errors.Is(err, ErrStopping) || err != nil && ctx.Err() != nil {
		return nil, err
	} else if err != nil {
		return nil, &refusedError{err}
	}
	late := time.NewTimer(settleWithin)
	defer late.Stop()
	for {
		f.mu.Lock()
		settled, refused, again := f.readyFor >= f.generation, f.reloadErr, f.readied
		a := &api.ReloadAnswer{Version: api.Version, Changed: f.generation != before, Configured: f.configured}
		f.mu.Unlock()
		switch {
		case refused != "": // it was found out when it was to be taken over
			return nil, &refusedError{errors.New(refused)}
		case settled:
			return a, nil
		}
		select {
		case <-again:
		case <-late.C:
			return nil, fmt.Errorf("it is taken over, and not yet in place after %s: see `tsoctl status`", settleWithin)
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-f.over:
			return nil, errEndedAgent
		}
	}
}

// reloaded is for served: one agent alone reads no file.
func (*Agent) reloaded(context.Context, api.Peer) (*api.ReloadAnswer, error) { return nil, errNoFile }

// Alive has all loops answer, and fails if one doesn't until the context ends. It costs no round.
func (f *Fleet) Alive(ctx context.Context) error {
	answer := make(chan struct{})
	select {
	case f.pings <- answer:
		<-answer
	case <-ctx.Done():
		return fmt.Errorf("the loop that follows namespaces doesn't answer: %w", ctx.Err())
	case <-f.over:
		return nil
	}
	for _, n := range f.namespaces() {
		a, err := f.agentOf(n.Name)
		if err != nil {
			continue // it starts, or is waited for
		}
		if err := a.call(ctx, func() {}); err != nil && !errors.Is(err, errEndedAgent) {
			return fmt.Errorf("the loop of namespace %s doesn't answer: %w", n.Name, err)
		}
	}
	return nil
}

// takeOver is Reload in the Fleet's loop.
func (f *Fleet) takeOver(ctx context.Context, cfg Config) error {
	cfg = cfg.WithDefaults()
	if !cfg.Namespaces.host() && slices.ContainsFunc(cfg.Namespaces, f.isHost) {
		cfg.Namespaces = append(slices.Clone(cfg.Namespaces), netns.Host)
	}
	f.mu.Lock()
	old := f.live
	err := mayReload(old, cfg)
	if err == nil {
		err = f.keptByPause(cfg)
	}
	if err != nil {
		f.reloadErr = err.Error()
		f.mu.Unlock()
		return err
	}
	f.reloadErr, f.configured = "", time.Now()
	if reflect.DeepEqual(old, cfg) {
		f.tellReady(f.generation)
		f.mu.Unlock()
		f.log.Info("the configuration is as it was")
		return nil
	}
	f.log.Info(takenOver)
	f.live = cfg
	f.generation++
	f.sweepDue = f.sweepDue || old.Mode == Observe && cfg.Mode == Enforce
	f.mu.Unlock()
	f.reconcile(ctx) // those that are not followed any more give everything back
	f.renew()
	f.poke() // for a sweep
	if !cfg.Namespaces.host() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.tellReady(f.generation)
	}
	return nil
}

// renew has the agents of older generations end for others.
func (f *Fleet) renew() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		if m.again != nil && m.generation != f.generation {
			m.again(renewalFor(m.cfg, f.live))
		}
	}
}

// begin is the context for the Run of a member's agent, which was opened with the configuration of a generation. The caller holds the
// lock.
func (f *Fleet) begin(ctx context.Context, m *member, cfg Config, generation uint64) context.Context {
	var run context.Context
	run, m.again = context.WithCancelCause(ctx)
	m.unfollowed, m.cfg = false, cfg
	if m.generation = generation; generation != f.generation {
		m.again(renewalFor(cfg, f.live))
	}
	return run
}

// takesUp is with which configuration, and of which generation, the next agent of a member is opened: that in use. But where the one before has left
// something in place that nobody would follow with that, it is the one before once more, whose agent gives everything back: an agent can have
// been told to make way by a cause that leaves everything, and only then the configuration have become another one. The caller holds the
// Fleet's lock.
func (f *Fleet) takesUp(m *member) (Config, uint64) {
	if m.unfollowed && givesBack(m.cfg, f.live) {
		return m.cfg, m.generation
	}
	return f.live, f.generation
}

// renewed reports whether a Run ended for another agent.
func renewed(run context.Context) bool { return errors.Is(context.Cause(run), errRenew) }

// renewalOf is how events call why a Run ended for another agent.
func renewalOf(cause error) string {
	if errors.Is(cause, errSlim) {
		return slimmed
	}
	return takenOver
}

// mayReload says what can't be changed while the agent runs.
func mayReload(old, next Config) error {
	var keys []string
	if old.RunDir != next.RunDir {
		keys = append(keys, "run_dir (the journal and the control socket are there)")
	}
	if old.Namespaces.host() != next.Namespaces.host() {
		keys = append(keys, "whether namespaces has host")
	}
	if len(keys) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrNeedsRestart, strings.Join(keys, ", "))
}

// keptByPause says that something was to stay as it is. The caller holds the lock.
func (f *Fleet) keptByPause(next Config) error {
	back := givesBack(f.live, next)
	for _, m := range f.members {
		p := lasting(m.paused)
		if p == nil || p.Restore || m.leaving {
			continue
		}
		why := ""
		switch {
		case back:
			why = "with another mode, table or protocol everything is given back first"
		case !f.lists(next.Namespaces, m):
			why = "in a namespace that is not listed any more everything is given back"
		default:
			continue
		}
		return fmt.Errorf("%s, and while namespace %s is paused nothing is: "+
			"`tsoctl resume`, or `tsoctl pause --restore`, comes first", why, m.names[0])
	}
	return nil
}

// lists reports whether names lead to a member.
func (f *Fleet) lists(n Namespaces, m *member) bool {
	if m.id == f.host.ID() {
		return n.host()
	}
	return slices.ContainsFunc(n.specs(), func(spec string) bool {
		id, err := f.lookUp(spec, netns.Path(spec))
		return err == nil && id == m.id
	})
}

// givesBack reports whether what an old configuration has set is given back first: nobody would follow it with
// the next one.
func givesBack(old, next Config) bool {
	return old.Mode == Enforce && next.Mode == Observe || old.Plan.Table != next.Plan.Table || old.Plan.Protocol != next.Plan.Protocol
}

// renewalFor is with which cause agents with an old configuration end for others with the next one.
func renewalFor(old, next Config) error {
	if givesBack(old, next) {
		return errRenewBack
	}
	return errRenew
}

// runHost runs the agent of the namespace that the Fleet was started in until the context ends, and another one
// with each configuration. If one can't be opened, the configuration before it is in use again.
func (f *Fleet) runHost(ctx context.Context, m *member) error {
	defer m.end(f)
	f.mu.Lock()
	a, cfg, generation := m.agent, f.cfg, m.generation
	f.mu.Unlock()
	for heir, first := "", true; ; first = false {
		f.mu.Lock()
		m.agent = a
		a.onReady, a.heir = func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if first || f.readyFor != generation {
				f.tellReady(generation)
			}
		}, heir
		if !first {
			m.handOn(a)
			a.sources.setHooked(f.hooked)
		}
		run := f.begin(ctx, m, cfg, generation)
		f.mu.Unlock()
		if !first {
			f.announce()
		}
		err := a.Run(run)
		f.ended(run, m)
		err = errors.Join(err, a.Close())
		if !renewed(run) {
			return err
		}
		if err != nil {
			f.log.Warn("not everything was given back for another agent", "err", err)
		}
		heir = renewalOf(context.Cause(run))
		if a, cfg, generation, err = f.reopenHost(ctx, m, cfg); err != nil {
			return err
		}
	}
}

// reopenHost is openHost for the agent that takes the place of one with the configuration before. If it can't be opened, that one is
// in use again, for all. Where it is the same one, as where the state is made anew, it is tried once more.
func (f *Fleet) reopenHost(ctx context.Context, m *member, before Config) (a *Agent, cfg Config, generation uint64, err error) {
	for back, tried := false, false; ; {
		a, cfg, generation, err = f.openHost(m)
		if err == nil {
			return a, cfg, generation, nil
		}
		f.mu.Lock()
		newest := f.generation == generation // else there is another one to try
		if !newest {
			m.unfollowed = false // what can't even be opened gives nothing back
		}
		same := reflect.DeepEqual(cfg, before)
		if newest && !same {
			f.reloadErr, f.live = err.Error(), before
			f.generation++
		}
		f.mu.Unlock()
		switch {
		case newest && same && (back || tried):
			return nil, cfg, generation, err
		case newest && same:
			tried = true
			f.log.Warn("the agent that is to take over can't be opened, trying once more", "err", err, "again_in", firstRetry)
			select {
			case <-ctx.Done(): // what is in place is to be given back
			case <-time.After(firstRetry):
			}
		case newest:
			back = true
			f.log.Error("the configuration can't be taken over: the one before it stays in use", "err", err)
			f.renew()
			f.poke() // its namespaces are those to be followed
		}
	}
}

// openHost opens an agent with the configuration that is to be taken up, and returns that and its generation.
func (f *Fleet) openHost(m *member) (a *Agent, cfg Config, generation uint64, err error) {
	f.mu.Lock()
	cfg, generation = f.takesUp(m)
	f.mu.Unlock()
	err = f.host.Do(func() (err error) {
		a, err = newAgentIn(netns.Host, cfg, f.log, f.version, func(a *Agent) error {
			a.others, a.heap, a.guard = f, &f.heap, f.guard
			return a.open()
		})
		return err
	})
	return a, cfg, generation, err
}
