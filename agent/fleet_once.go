package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
)

// knownNamespaces are the cookies of the namespaces that have journals in a run directory, not
// counting the host's.
func knownNamespaces(runDir string) ([]uint64, error) {
	entries, err := os.ReadDir(NamespaceDir(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("agent: list the journals of namespaces: %w", err)
	}
	var out []uint64
	for _, e := range entries {
		if cookie, err := strconv.ParseUint(e.Name(), 10, 64); err == nil && e.IsDir() {
			out = append(out, cookie)
		}
	}
	return out, nil
}

// A search finds namespaces by their cookies.
type search struct {
	missing []uint64
	found   map[uint64]string // how each one that was found can be named
	blind   error             // why something could not be looked at: what is missing need not be gone
}

// look takes a namespace, named as in a configuration, for what it is.
func (s *search) look(spec string) {
	ns, err := netns.Open(netns.Path(spec))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, netns.ErrNotNetns) {
			s.blind = err
		}
		return
	}
	defer ns.Close()
	s.take(spec, ns)
}

func (s *search) take(spec string, ns *netns.Namespace) {
	var scope journal.Scope
	err := ns.Do(func() (err error) {
		scope, err = journal.ReadScope()
		return err
	})
	if err != nil {
		s.blind = err
	}
	if i := slices.Index(s.missing, scope.NetnsCookie); err == nil && i >= 0 {
		s.missing = slices.Delete(s.missing, i, i+1)
		s.found[scope.NetnsCookie] = spec
	}
}

// specs are the names of the configuration, in which all stands for those in /run/netns.
func (n Namespaces) specs() []string {
	var out []string
	for _, spec := range n {
		if spec != netns.All && spec != netns.Host {
			out = append(out, spec)
		}
	}
	if n.all() {
		names, _ := netns.Names() // without them a process may still lead there
		out = append(out, names...)
	}
	return out
}

// find looks for namespaces by the names of the configuration, and then by all other names and
// by processes. followed has the former only. The error says that those that are gone may be
// where it could not look.
func find(cookies []uint64, n Namespaces) (followed, others map[uint64]string, gone []uint64, err error) {
	s := search{missing: slices.Clone(cookies), found: map[uint64]string{}}
	for _, spec := range n.specs() {
		if len(s.missing) > 0 {
			s.look(spec)
		}
	}
	followed, s.found = s.found, map[uint64]string{}
	for _, spec := range (Namespaces{netns.All}).specs() {
		if len(s.missing) > 0 {
			s.look(spec)
		}
	}
	if len(s.missing) > 0 {
		err := netns.Processes(func(pid int, ns *netns.Namespace) bool {
			s.take(fmt.Sprintf("pid:%d", pid), ns)
			return len(s.missing) > 0
		})
		if err != nil {
			s.blind = err
		}
	}
	if len(s.missing) == 0 {
		s.blind = nil
	}
	return followed, s.found, s.missing, s.blind
}

// leftBehind is find for the journals in a run directory, but for one of the caller's own
// namespace. What is renamed while names are read can be missed, so what is gone was looked
// for twice. Where it could not be looked everywhere, nothing is gone.
func leftBehind(runDir string, n Namespaces) (followed, others map[uint64]string, gone []uint64, err error) {
	cookies, err := knownNamespaces(runDir)
	if len(cookies) == 0 || err != nil {
		return nil, nil, nil, err
	}
	own, err := journal.ReadScope()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("agent: %w", err)
	}
	cookies = slices.DeleteFunc(cookies, func(c uint64) bool { return c == own.NetnsCookie })
	if followed, others, gone, err = find(cookies, n); len(gone) > 0 {
		followed, others, gone, err = find(cookies, n)
	}
	if err != nil {
		err = fmt.Errorf("agent: namespaces with a journal that were not found: %d, and not every one can be looked at; run `tsoctl restore` as root: %w", len(gone), err)
		gone = nil
	}
	return followed, others, gone, err
}

// sweep takes care of what an earlier run has left in namespaces: those that are still followed
// adopt it. In others it is given back. The journals of namespaces that are gone are removed, when nothing of theirs is missed
// any more. What it returns waits until all is given back.
func (f *Fleet) sweep(ctx context.Context) (wait func()) {
	var wg sync.WaitGroup
	cfg := f.Config()
	if cfg.Mode != Enforce {
		return wg.Wait
	}
	var others map[uint64]string
	var gone []uint64
	err := f.host.Do(func() (err error) {
		_, others, gone, err = leftBehind(cfg.RunDir, cfg.Namespaces)
		return err
	})
	removed := 0
	for _, cookie := range gone {
		if f.haunts(cookie) {
			continue
		}
		switch more, ghostErr := f.raise(cookie); {
		case ghostErr != nil:
			err = errors.Join(err, ghostErr)
		case !more:
			removed++
		}
	}
	if err != nil {
		f.log.Warn("journals of namespaces", "err", err)
		f.note(err.Error())
	}
	if removed > 0 {
		f.log.Info("journals of namespaces that are gone were removed", "namespaces", removed)
	}
	for cookie, spec := range others {
		wg.Add(1)
		f.wg.Go(func() {
			defer wg.Done()
			err := f.giveBackStray(ctx, cookie, spec)
			if err == nil {
				return
			}
			err = fmt.Errorf("namespace %s is not followed any more, and not everything could be given back in it: %w", spec, err)
			f.note(err.Error())
			if ctx.Err() != nil { // nobody reads the reports any more
				f.mu.Lock()
				f.errs = append(f.errs, err)
				f.mu.Unlock()
			}
		})
	}
	return wg.Wait
}

// sweepAgain is what a start in enforce mode does, for a configuration that is the first one to write.
func (f *Fleet) sweepAgain(ctx context.Context) {
	f.mu.Lock()
	f.notes = nil // what is still so is found again
	f.mu.Unlock()
	if f.lock != nil && len(f.lock.Entries()) > 0 {
		if err := f.host.Do(func() error { return f.giveBackHost(ctx, f.lock.Entries()) }); err != nil {
			f.note(fmt.Sprintf("namespace %s is not followed any more, and not everything could be given back in it: %v", netns.Host, err))
		}
	}
	f.sweep(ctx)()
}

// haunts reports whether there is a ghost of a namespace, which has the journal open.
func (f *Fleet) haunts(cookie uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(f.ghosts, func(g *ghost) bool { return g.cookie == cookie })
}

func (f *Fleet) note(text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.notes = append(f.notes, text)
}

// graceful is a context that ends a while after another one does.
func graceful(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-t.C:
			cancel()
		case <-out.Done():
		}
	})
	return out, func() { stop(); cancel() }
}

// RestoreAll is Restore in the namespace of the calling thread and in all others that have a
// journal in the run directory, under whatever name or process they can be found. One that fails
// does not stop the others: the result says what was done although there is an error. Without
// stale, devices that were moved to a namespace of the configuration are given back there, and the journals of
// namespaces that are gone are removed.
func RestoreAll(ctx context.Context, cfg Config, log *slog.Logger, version string, stale bool) (*Restored, error) {
	cfg = cfg.WithDefaults()
	host, err := netns.Current()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	defer host.Close()
	by := &restorer{ctx: ctx, cfg: cfg, log: log, version: version, host: host}
	var to others
	if !stale {
		to = by
	}
	out, err := restoreIn(ctx, netns.Host, cfg, log, version, stale, to)
	if errors.Is(err, ErrRunning) || errors.Is(err, ErrPermission) {
		return nil, err
	}
	errs := []error{err}
	if out == nil {
		out = &Restored{Findings: []string{}}
	}
	followed, unfollowed, gone, err := leftBehind(cfg.RunDir, cfg.Namespaces)
	errs = append(errs, err)
	for _, spec := range slices.Sorted(values(followed, unfollowed)) {
		r, err := restoreIn(ctx, spec, cfg, log.With("netns", spec), version, stale, to)
		if r != nil {
			out.merge(r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("namespace %s: %w", spec, err))
		}
	}
	for _, cookie := range gone {
		if !stale {
			findings, err := by.buried(cookie)
			out.Findings, errs = append(out.Findings, findings...), append(errs, err)
		}
	}
	for _, r := range by.done {
		out.merge(r)
	}
	if len(gone) > 0 && !stale {
		out.Findings = append(out.Findings, goneText(len(gone)))
	}
	return out, errors.Join(errs...)
}

// goneText says that the journals of so many namespaces are no more.
func goneText(n int) string {
	if n == 1 {
		return "the journal of a namespace that is gone was removed"
	}
	return fmt.Sprintf("the journals of %d namespaces that are gone were removed", n)
}

// merge adds what was restored in one namespace, which can be among those of before.
func (r *Restored) merge(more *Restored) {
	if more.Netns == r.Netns {
		r.add(more)
		return
	}
	for i := range r.Namespaces {
		if r.Namespaces[i].Netns == more.Netns {
			r.Namespaces[i].add(more)
			return
		}
	}
	r.Namespaces = append(r.Namespaces, *more)
}

func values(maps ...map[uint64]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for _, m := range maps {
			for _, v := range m {
				if !yield(v) {
					return
				}
			}
		}
	}
}
