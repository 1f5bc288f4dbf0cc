package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// Devices can have left a namespace that nobody follows any more with what was changed on them. No loop offers those claims:
//
//   - a *stray* is such a namespace that is still there. What went from it is offered again, by an agent that gives back in
//     it once more, when another namespace comes to be followed or a NIC comes to one, and in each resync.
//   - a *ghost* is one that is gone. Its virtual devices are gone with it. Its NICs, which outlive it, are looked for by their
//     addresses.

// giveBackStray gives back what an earlier run has left in a namespace that is not followed now, and remembers what is not
// there to be given back.
func (f *Fleet) giveBackStray(ctx context.Context, cookie uint64, spec string) error {
	var r *Restored
	err := f.host.Do(func() (err error) {
		r, err = f.giveBackIn(ctx, spec, (*Agent).open)
		return err
	})
	if err == nil {
		f.setStray(cookie, spec, r)
	}
	return err
}

// giveBackHost is giveBackStray for the host's namespace, whose journal the Fleet has open.
func (f *Fleet) giveBackHost(ctx context.Context, entries []journal.Entry) error {
	r, err := f.giveBackIn(ctx, netns.Host, func(a *Agent) error { return a.openWith(f.lock, &journal.Recovery{Entries: entries}) })
	if err == nil {
		f.setStray(f.hostCookie, netns.Host, r)
	}
	return err
}

func (f *Fleet) setStray(cookie uint64, spec string, r *Restored) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if delete(f.strays, cookie); r.Moved > 0 || len(r.Findings) > 0 {
		f.strays[cookie] = stray{spec, r.Moved, r.Findings}
	}
}

// A stray is a namespace that nobody follows, by its cookie in Fleet.strays.
type stray struct {
	name     string
	moved    int      // devices that went from it and are missed
	findings []string // in which they are
}

// strayFindings are those about strays and ghosts. The caller holds the lock.
func (f *Fleet) strayFindings() []string {
	var out []string
	for _, s := range f.strays {
		for _, finding := range s.findings {
			out = append(out, fmt.Sprintf("namespace %s, which is not followed any more: %s", s.name, finding))
		}
	}
	for _, g := range f.ghosts {
		out = append(out, g.findings...)
	}
	slices.Sort(out)
	return out
}

// giveBackIn gives back what an earlier run has left in a namespace that is not followed now. A
// stop does not cut it short, but bounds it.
func (f *Fleet) giveBackIn(ctx context.Context, spec string, open func(*Agent) error) (*Restored, error) {
	ctx, cancel := graceful(ctx, f.grace)
	defer cancel()
	r, err := restoreWith(ctx, spec, f.Config(), f.log.With("netns", spec), f.version, false, f, open)
	if err != nil {
		f.log.Warn("what an earlier run left in a namespace can't be given back", "netns", spec, "err", err)
		return nil, err
	}
	if r.Actions > 0 || r.Moved == 0 {
		f.log.Info("given back in a namespace that is not followed any more", "netns", spec, "holds", r.Holds, "locks", r.Locks, "rules", r.Rules, "clones", r.Clones)
	}
	return r, nil
}

// recall looks for what strays and ghosts miss, and sweeps again, once it is due and not under way.
func (f *Fleet) recall(ctx context.Context) {
	f.mu.Lock()
	defer f.mu.Unlock()
	missed := slices.ContainsFunc(slices.Collect(maps.Values(f.strays)), func(s stray) bool { return s.moved > 0 })
	if f.live.Mode != Enforce || lasting(f.paused) != nil {
		return // nothing is written now; it stays due
	}
	// Those that are let go have their journals open; the last one that has left brings the next look.
	sweep := f.sweepDue && !slices.ContainsFunc(slices.Collect(maps.Values(f.members)), func(m *member) bool { return m.leaving })
	recall := f.recallDue && (missed || len(f.ghosts) > 0)
	if f.recalling || !sweep && !recall {
		return
	}
	resync := f.recallTick
	f.recallDue, f.recallTick, f.recalling = false, false, true
	f.sweepDue = f.sweepDue && !sweep
	f.wg.Go(func() {
		if sweep {
			f.sweepAgain(ctx)
		}
		f.recallStrays(ctx)
		f.recallGhosts(resync)
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.recalling = false; f.recallDue || f.sweepDue {
			f.poke()
		}
	})
}

func (f *Fleet) recallStrays(ctx context.Context) {
	f.mu.Lock()
	strays := maps.Clone(f.strays)
	f.mu.Unlock()
	maps.DeleteFunc(strays, func(_ uint64, s stray) bool { return s.moved == 0 })
	if len(strays) == 0 {
		return
	}
	var followed, others map[uint64]string
	var gone []uint64
	err := f.host.Do(func() (err error) {
		followed, others, gone, err = leftBehind(f.cfg.RunDir, f.Config().Namespaces)
		return err
	})
	if _, is := strays[f.hostCookie]; is {
		err = errors.Join(err, f.host.Do(func() error { return f.giveBackHost(ctx, f.lock.Entries()) }))
	}
	for cookie := range strays {
		_, adopted := followed[cookie]
		spec, there := others[cookie]
		switch {
		case adopted: // by the loop that follows it now
			f.forgetStray(cookie)
		case there:
			err = errors.Join(err, f.giveBackStray(ctx, cookie, spec))
		case slices.Contains(gone, cookie):
			_, raised := f.raise(cookie)
			err = errors.Join(err, raised)
			f.forgetStray(cookie)
		}
	}
	if err != nil {
		f.log.Warn("what went from namespaces that are not followed any more can't be looked for", "err", err)
	}
}

func (f *Fleet) forgetStray(cookie uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.strays, cookie)
}

// A ghost is an agent for a namespace that is gone: it has a journal, and nothing else.
type ghost struct {
	*Agent
	cookie   uint64
	findings []string
}

// errNoPlace is what a ghost hears of all places, which are those of its namespace.
var errNoPlace = fmt.Errorf("the namespace is gone: %w", unix.ENODEV)

// noPlace is the linkTable of a ghost.
type noPlace struct{}

var _ linkTable = noPlace{}

// SetLinkMTU fails.
func (noPlace) SetLinkMTU(routes.Ifindex, int) error { return errNoPlace }

// ReadLink fails.
func (noPlace) ReadLink(routes.Ifindex) (*routes.Link, error) { return nil, errNoPlace }

// ReadLinkAt fails.
func (noPlace) ReadLinkAt(routes.Place) (*routes.Link, error) { return nil, errNoPlace }

// raiseGhost opens the journal of a namespace that is gone, and makes what it says of NICs the claims on devices that were
// moved. It is nil if there are none. The journal is removed then.
func raiseGhost(cfg Config, log *slog.Logger, version string, cookie uint64, to others) (*ghost, error) {
	scope, err := journal.ReadScope()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	scope.NetnsCookie = cookie
	cfg.Mode = Enforce
	a := newAgent(cfg, log, version)
	a.dir = cookieDir(cfg.RunDir, cookie)
	j, found, err := journal.Open(a.dir, scope)
	if err != nil {
		err = fmt.Errorf("agent: %w", err)
		if !errors.Is(err, journal.ErrLocked) { // it is of use to nobody
			err = errors.Join(err, a.forgetDir())
		}
		return nil, err
	}
	a.closers = append(a.closers, j.Close)
	a.journal, a.others, a.links = j, to, noPlace{}
	if err := a.adoptNICs(found.Entries); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	if len(a.st.moved) == 0 {
		return nil, errors.Join(a.forgetDir(), a.Close())
	}
	return &ghost{Agent: a, cookie: cookie}, nil
}

// adoptNICs makes claims on NICs those on devices that were moved. Other devices went with the namespace, and where its number
// for another one has led nobody can tell any more. Some of them have permanent addresses, too: an ipvlan that of its NIC.
func (a *Agent) adoptNICs(entries []journal.Entry) error {
	nics := map[string]*movedDevice{}
	at := func(name, perm string, i routes.Ifindex) *movedDevice {
		if nics[perm] == nil {
			nics[perm] = &movedDevice{Index: i, Name: name, Addr: perm, PermAddr: perm}
		}
		return nics[perm]
	}
	var done []string
	for _, e := range entries {
		var err error
		switch e.Kind {
		case kindMoved:
			err = a.adoptMoved(e)
			if d := a.st.moved[e.ID]; d != nil && d.nicKey() == "" {
				delete(a.st.moved, e.ID)
				done = append(done, e.ID)
			}
		case kindHold:
			var h heldFeature
			if err = json.Unmarshal(e.Data, &h); err == nil && h.NIC {
				d := at(h.Device.Name, h.PermAddr, routes.Ifindex(h.Device.Index))
				d.Features = append(d.Features, h.Feature)
				done = append(done, e.ID)
			}
		case kindDeviceMTU:
			var m deviceMTU
			if err = json.Unmarshal(e.Data, &m); err == nil && m.PermAddr != "" && m.Kind == "" && m.Claim.Theirs == 0 {
				at(m.Name, m.PermAddr, m.Index).MTU = &plan.MTUClaim{Was: m.Claim.Was, Ours: m.Claim.Ours}
				done = append(done, e.ID)
			}
		}
		if err != nil {
			a.log.Warn("a journal entry of a namespace that is gone can't be used", "entry", e.ID, "err", err)
		}
	}
	for _, perm := range slices.Sorted(maps.Keys(nics)) {
		d := nics[perm]
		id := a.movedID(d.To)
		if err := a.journal.Put(entry(id, kindMoved, d)); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		a.st.moved[id] = d
	}
	if err := a.journal.Remove(done...); err != nil { // after the other entries are there
		return fmt.Errorf("agent: %w", err)
	}
	return nil
}

// look offers what the ghost misses, and hears what became of earlier offers. It says what is missed.
func (g *ghost) look(resync bool) []string {
	g.hear()
	g.offerAgain(resync)
	return g.movedFindings()
}

// hear takes the answers of those who were offered something.
func (g *ghost) hear() {
	for _, b := range g.inbox.take() {
		g.apply(b)
	}
}

// bury removes the journal, which the ghost has locked.
func (g *ghost) bury() error { return errors.Join(g.forgetDir(), g.Close()) }

// raise takes care of a namespace that is gone. It reports whether something is missed that is looked for from now on.
func (f *Fleet) raise(cookie uint64) (more bool, err error) {
	g, err := raiseGhost(f.Config(), f.log, f.version, cookie, f)
	if g == nil || err != nil {
		return false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ghosts = append(f.ghosts, g)
	f.recallDue = true
	f.poke()
	return true, nil
}

// recallGhosts runs in one goroutine at a time.
func (f *Fleet) recallGhosts(resync bool) {
	f.mu.Lock()
	ghosts := slices.Clone(f.ghosts)
	f.mu.Unlock()
	findings := map[*ghost][]string{}
	for _, g := range ghosts {
		findings[g] = g.look(resync)
	}
	f.mu.Lock()
	for _, g := range ghosts {
		g.findings = findings[g]
	}
	f.mu.Unlock()
	f.buryGhosts()
}

// buryGhosts takes those away that miss nothing any more, with their journals.
func (f *Fleet) buryGhosts() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ghosts = slices.DeleteFunc(f.ghosts, func(g *ghost) bool {
		if len(g.st.moved) > 0 {
			return false
		}
		if err := g.bury(); err != nil {
			f.notes = append(f.notes, err.Error())
		}
		return true
	})
}

// endGhosts is for the end of Run: the journals of those that miss something stay.
func (f *Fleet) endGhosts() {
	f.mu.Lock()
	ghosts := slices.Clone(f.ghosts)
	f.mu.Unlock()
	for _, g := range ghosts {
		g.hear()
	}
	f.buryGhosts()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, g := range f.ghosts {
		f.errs = append(f.errs, g.Close())
	}
	f.ghosts = nil
}
