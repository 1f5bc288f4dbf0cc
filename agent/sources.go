package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/ethtool"
	"tsoagent/l2tp"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// sources are the watchers of one namespace. A watcher whose socket ends is dialled again:
// what it knew is stale until then.
type sources struct {
	log *slog.Logger
	in  func(func() error) error // runs a function in the namespace
	cfg Config
	// trust knows whose keys count.
	trust *keyTrust

	mu     sync.Mutex
	xfrm   *xfrmwatch.Watcher // nil where the kernel has no XFRM
	routes *routes.Watcher
	eth    *ethtool.Watcher
	l2tp   *l2tp.Watcher
	keys   *sockopt.Watcher // nil where the kernel has no keys, or can't show them for the reason noKeys
	noKeys string
	hooked hooked
	// past are the counters of watchers that were dialled again, by source: none may fall.
	past map[string]SourceReport
}

func dialSources(log *slog.Logger, in func(func() error) error, cfg Config, trust *keyTrust) (*sources, error) {
	s := &sources{log: log, in: in, cfg: cfg, trust: trust}
	for _, dial := range []func() error{s.dialXFRM, s.dialRoutes, s.dialFeatures, s.dialL2TP, s.dialKeys} {
		if err := in(dial); err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
	return s, nil
}

func (s *sources) dialXFRM() error {
	w, err := xfrmwatch.Dial(xfrmwatch.Options{})
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		s.log.Info("the kernel has no XFRM: nothing can be covered")
		return nil
	}
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.xfrm != nil {
		s.keep(s.xfrmStats())
	}
	s.xfrm = w
	return nil
}

func (s *sources) dialRoutes() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Later on nothing is to wait long for a round.
	w, err := routes.Dial(routes.WatchOptions{Singly: s.routes != nil})
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	if s.routes != nil {
		s.keep(s.routesStats())
	}
	s.routes = w
	return nil
}

func (s *sources) dialFeatures() error {
	w, err := ethtool.NewWatcher()
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.eth != nil {
		s.keep(s.ethStats())
	}
	s.eth = w
	return nil
}

func (s *sources) dialL2TP() error {
	w, err := l2tp.NewWatcher()
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.l2tp != nil {
		s.keep(s.l2tpStats())
	}
	s.l2tp = w
	return nil
}

func (s *sources) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.xfrm != nil {
		errs = append(errs, s.xfrm.Close())
	}
	if s.routes != nil {
		errs = append(errs, s.routes.Close())
	}
	if s.eth != nil {
		errs = append(errs, s.eth.Close())
	}
	if s.l2tp != nil {
		errs = append(errs, s.l2tp.Close())
	}
	if s.keys != nil {
		errs = append(errs, s.keys.Close())
	}
	return errors.Join(errs...)
}

// resync asks all watchers for a full dump.
func (s *sources) resync() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.xfrm != nil {
		s.xfrm.Resync()
	}
	s.routes.Resync(routes.Scope{})
	s.eth.Resync()
	s.l2tp.Resync()
	if s.keys != nil {
		s.keys.Resync()
	}
}

func (s *sources) resyncRoutes(scope routes.Scope) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.routes.Resync(scope)
}

// stats are the counters of each source since the start.
func (s *sources) stats() []SourceReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []SourceReport
	if s.xfrm != nil {
		out = append(out, s.xfrmStats())
	}
	out = append(out, s.routesStats(), s.ethStats(), s.l2tpStats())
	if s.keys != nil {
		out = append(out, s.keyStats())
	}
	for i := range out {
		addPast(&out[i], s.past[out[i].Source])
	}
	return out
}

// keep remembers the counters of a watcher whose place another one takes. The lock is held.
func (s *sources) keep(r SourceReport) {
	if s.past == nil {
		s.past = map[string]SourceReport{}
	}
	addPast(&r, s.past[r.Source])
	s.past[r.Source] = r
}

// goOn counts from what the watcher of an earlier agent has counted.
func (s *sources) goOn(r SourceReport) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep(SourceReport{Source: r.Source, Events: r.Events, Dumps: r.Dumps, Overruns: r.Overruns, Undecodable: r.Undecodable, Seconds: r.Seconds})
}

func addPast(r *SourceReport, past SourceReport) {
	r.Events, r.Dumps, r.Overruns = r.Events+past.Events, r.Dumps+past.Dumps, r.Overruns+past.Overruns
	r.Undecodable, r.Seconds = r.Undecodable+past.Undecodable, r.Seconds+past.Seconds
}

// The counters of each watcher, which is there. The lock is held.

func (s *sources) xfrmStats() SourceReport {
	st := s.xfrm.Stats()
	return SourceReport{Source: "xfrm", Events: st.Events, Dumps: st.Dumps, Overruns: st.Overruns, Undecodable: st.Undecodable}
}

func (s *sources) routesStats() SourceReport {
	st := s.routes.Stats()
	return SourceReport{Source: "routes", Events: st.Messages, Dumps: st.Dumps, Overruns: st.Overruns, Undecodable: st.Undecodable}
}

func (s *sources) ethStats() SourceReport {
	st := s.eth.Stats()
	return SourceReport{Source: "ethtool", Events: st.Notifications, Dumps: st.Dumps, Overruns: st.Overruns, Undecodable: st.Undecodable}
}

func (s *sources) l2tpStats() SourceReport {
	st := s.l2tp.Stats()
	return SourceReport{Source: "l2tp", Events: st.Notifications, Dumps: st.Dumps, Overruns: st.Overruns, Undecodable: st.Undecodable}
}

// look has the features of a device read again.
func (s *sources) look(i ethtool.Ifindex) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eth.Look(i)
}

// run follows all sources until the context ends.
func (s *sources) run(ctx context.Context, in *inbox) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	if s.xfrm == nil {
		in.put(batch{xfrm: []xfrmwatch.Event{xfrmwatch.ResyncBegin{}, xfrmwatch.ResyncEnd{}}})
	} else {
		wg.Go(func() {
			s.follow(ctx, "xfrm", s.dialXFRM,
				func() error { return s.xfrm.Run(ctx, func(ev []xfrmwatch.Event) { in.put(batch{xfrm: ev}) }) },
				func(err error) { in.put(batch{xfrm: []xfrmwatch.Event{xfrmwatch.Lost{Err: err}}}) })
		})
	}
	// The routes come after the first look at the L2TP sessions and at the keys: with them the mirror
	// is complete, and a plan without the sessions or keys would give back what is held because of them.
	looked, cancel := context.WithCancel(ctx)
	keyed, cancelKeys := context.WithCancel(ctx)
	wg.Go(func() {
		defer cancelKeys()
		s.followKeys(ctx, in, cancelKeys)
	})
	wg.Go(func() {
		defer cancel()
		s.follow(ctx, "l2tp", s.dialL2TP,
			func() error {
				return s.l2tp.Run(ctx, func(ev []l2tp.Event) {
					in.put(batch{l2tp: ev})
					cancel()
				})
			},
			func(err error) {
				in.put(batch{l2tp: []l2tp.Event{l2tp.Lost{Err: err}}})
				cancel()
			})
	})
	wg.Go(func() {
		<-looked.Done()
		<-keyed.Done()
		s.follow(ctx, "routes", s.dialRoutes,
			func() error { return s.routes.Run(ctx, func(ev []routes.Event) { in.put(batch{routes: ev}) }) },
			func(err error) { in.put(batch{routes: []routes.Event{routes.Lost{Err: err}}}) })
	})
	wg.Go(func() {
		s.follow(ctx, "ethtool", s.dialFeatures,
			func() error { return s.eth.Run(ctx, func(ev []ethtool.Event) { in.put(batch{features: ev}) }) },
			func(err error) { in.put(batch{features: []ethtool.Event{ethtool.Lost{Err: err}}}) })
	})
	<-ctx.Done()
	return nil
}

const maxRedial = 30 * time.Second

// follow runs one watcher and dials it again, in the namespace, when its socket ends.
func (s *sources) follow(ctx context.Context, name string, dial, run func() error, lost func(error)) {
	for {
		err := run()
		if ctx.Err() != nil {
			return
		}
		s.log.Warn("watcher ended, dialling again", "source", name, "err", err)
		lost(err)
		for wait := 100 * time.Millisecond; ; wait = min(2*wait, maxRedial) {
			if err = s.in(dial); err == nil {
				break
			}
			s.log.Warn("watcher can't be dialled", "source", name, "err", err, "again_in", wait)
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
	}
}
