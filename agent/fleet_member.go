package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
)

// A namespace that could not be followed is tried again after firstRetry, then after twice as
// long each time, up to lastRetry.
const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

// errMoved says that a name led to another namespace when it was opened.
var errMoved = errors.New("the name leads to another namespace now")

// follow runs a member's agent until the context ends.
func (f *Fleet) follow(ctx context.Context, m *member) {
	defer f.left(m)
	defer m.end(f)
	heir := "" // why what is in place is left to the next agent
	// kept is the namespace while that is so, nil for none: its last name can go meanwhile, and then no name leads there to have it given back.
	var kept *netns.Namespace
	letGo := func() {
		if kept != nil {
			_ = kept.Close()
			kept = nil
		}
	}
	defer letGo()
	for wait := firstRetry; ctx.Err() == nil || heir != ""; wait = min(2*wait, lastRetry) {
		a, cfg, generation, err := f.open(m, kept)
		if errors.Is(err, errMoved) {
			return // whoever looks again finds out what is there now
		}
		if err == nil {
			letGo()
			f.mu.Lock()
			m.agent, m.why = a, ""
			m.handOn(a)
			a.heir, heir = heir, ""
			a.sources.setHooked(f.hooked)
			run := f.begin(ctx, m, cfg, generation)
			f.mu.Unlock()
			f.announce()
			err = a.Run(run)
			f.ended(run, m)
			if renewed(run) {
				var kerr error
				if kept, kerr = netns.Open(a.ns.Path()); kerr != nil {
					a.log.Warn("the namespace can't be kept open: if its last name goes now, `tsoctl restore` gives back what is in place there", "err", kerr)
				}
				if err = errors.Join(err, a.Close()); err != nil {
					a.log.Warn("not everything was given back for another agent", "err", err)
				}
				heir, wait = renewalOf(context.Cause(run)), firstRetry
				continue
			}
			err = f.closeMember(ctx, m, a, err)
		}
		if ctx.Err() != nil {
			if heir != "" {
				f.mu.Lock()
				f.errs = append(f.errs, fmt.Errorf("namespace %s: what is in place there was not given back; run `tsoctl restore`: %w", m.names[0], err))
				f.mu.Unlock()
			}
			return
		}
		f.mu.Lock()
		m.why = err.Error()
		m.turns()
		name := m.names[0]
		f.mu.Unlock()
		f.log.Warn("a namespace can't be followed", "netns", name, "err", err, "again_in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// ended notes that the Run of a member's agent has returned.
func (f *Fleet) ended(run context.Context, m *member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m.unfollowed = renewed(run) && !errors.Is(context.Cause(run), errRenewBack)
	m.counts = m.agent.counts()
	m.agent, m.again = nil, nil
}

// handOn gives an agent what outlives the one before it: the events, what was counted, and a pause that is not over. The caller
// holds the Fleet's lock.
func (m *member) handOn(a *Agent) {
	defer m.turns()
	a.goOn(m.counts)
	m.counts.mtus = nil
	if m.ring == nil {
		m.ring = a.ring
	}
	a.ring, a.ringGoes = m.ring, true
	if m.paused = lasting(m.paused); m.paused != nil {
		// Ahead of all else that the loop hears.
		a.give(m.paused)
	}
}

// lasting is the pause unless its time is over.
func lasting(p *api.Paused) *api.Paused {
	if p != nil && !p.Until.IsZero() && !time.Now().Before(p.Until) {
		return nil
	}
	return p
}

// end lets those go who follow the member's events, or wait for what one of its agents says.
func (m *member) end(f *Fleet) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m.over = true
	m.turns()
	if m.ring != nil {
		m.ring.end()
	}
}

// open opens a member's agent by the first of its names that leads there, or else by what was kept of it, nil for nothing.
func (f *Fleet) open(m *member, kept *netns.Namespace) (a *Agent, cfg Config, generation uint64, err error) {
	f.mu.Lock()
	names := m.names
	cfg, generation = f.takesUp(m)
	f.mu.Unlock()
	log := slog.New(&memberHandler{f.log.Handler(), func() string {
		f.mu.Lock()
		defer f.mu.Unlock()
		return m.names[0]
	}})
	err = errMoved
	specs := slices.Clone(names)
	if kept != nil {
		specs = append(specs, kept.Path())
	}
	for i, name := range specs {
		// The host is the namespace of the thread that made the Fleet.
		err = f.host.Do(func() (err error) {
			a, err = newAgentIn(name, cfg, log, f.version, func(a *Agent) error {
				if a.ns.ID() != m.id {
					return errMoved
				}
				if i == len(names) {
					a.name = names[0] // as it was called
				}
				a.others, a.heap, a.guard = f, &f.heap, f.guard
				return a.open()
			})
			return err
		})
		if !errors.Is(err, errMoved) && !errors.Is(err, os.ErrNotExist) {
			return a, cfg, generation, err
		}
	}
	if errors.Is(err, os.ErrNotExist) {
		err = errMoved
	}
	return nil, cfg, generation, err
}

// closeMember closes a member's agent after its Run, which has returned err. A namespace that is
// let go takes its journal along, unless not everything could be given back: while a process
// lives in it, the next start and `tsoctl restore` find it.
func (f *Fleet) closeMember(ctx context.Context, m *member, a *Agent, err error) error {
	if errors.Is(context.Cause(ctx), errLetGo) && a.cfg.Mode == Enforce {
		left, moved := a.claims(), len(a.st.moved)
		if moved > 0 { // which others may take over yet, and `tsoctl restore` is to tell of
			cookie, _ := strconv.ParseUint(filepath.Base(a.dir), 10, 64) // as cookieDir has made it
			f.mu.Lock()
			name := m.names[0]
			f.mu.Unlock()
			f.setStray(cookie, name, &Restored{Moved: moved, Findings: a.movedFindings()})
		}
		if left == 0 && moved == 0 && (err == nil || len(a.journal.Entries()) == 0) {
			err = errors.Join(err, a.forgetDir())
		}
		err = errors.Join(err, a.Close())
		if err != nil || left+moved > 0 {
			a.log.Warn("a namespace was let go before everything was given back", "left", left, "moved", moved, "err", err)
		} else {
			a.log.Info("a namespace was let go")
		}
		return nil
	}
	if ctx.Err() != nil {
		a.tidy()
	}
	err = errors.Join(err, a.Close())
	if err != nil && ctx.Err() != nil {
		f.mu.Lock()
		f.errs = append(f.errs, fmt.Errorf("namespace %s: %w", m.names[0], err))
		f.mu.Unlock()
	}
	return err
}

// left forgets a member that ended. Its namespace may be there again, under any name.
func (f *Fleet) left(m *member) {
	f.mu.Lock()
	delete(f.members, m.id)
	f.mu.Unlock()
	f.poke()
}

// tidy removes the journal's directory of another namespace than the host's once nothing is in
// it. The agent has it locked.
func (a *Agent) tidy() {
	if len(a.journal.Entries()) == 0 {
		if err := a.forgetDir(); err != nil {
			a.log.Warn("an empty journal can't be removed", "err", err)
		}
	}
}

// forgetDir removes the journal of another namespace than the host's.
func (a *Agent) forgetDir() error {
	if a.dir == a.cfg.RunDir {
		return nil
	}
	return removeJournal(a.cfg.RunDir, a.dir)
}

func removeJournal(runDir, dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("agent: remove the journal of a namespace: %w", err)
	}
	_ = os.Remove(NamespaceDir(runDir)) // the last one
	return nil
}

// A memberHandler tells in each line of the log which namespace it is about, by its name then.
type memberHandler struct {
	slog.Handler
	name func() string
}

// Handle adds the namespace.
func (h *memberHandler) Handle(ctx context.Context, r slog.Record) error {
	return h.Handler.WithAttrs([]slog.Attr{slog.String("netns", h.name())}).Handle(ctx, r)
}

// WithAttrs keeps the namespace.
func (h *memberHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &memberHandler{h.Handler.WithAttrs(attrs), h.name}
}

// WithGroup keeps the namespace, in the group.
func (h *memberHandler) WithGroup(name string) slog.Handler {
	return &memberHandler{h.Handler.WithGroup(name), h.name}
}

var _ slog.Handler = (*memberHandler)(nil)
