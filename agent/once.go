package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"tsoagent/agent/journal"
)

// onceWithin bounds how long a look at the kernel may take: a full BGP table is read in seconds.
const onceWithin = 2 * time.Minute

// Look reads the kernel once, without an agent and without changing anything, and reports what
// an agent with this configuration would want. With fn, it also calls it with what answers
// questions on that state.
func Look(ctx context.Context, cfg Config, log *slog.Logger, version string, fn func(explain func(Question) (*Explanation, error)) error) (*Report, error) {
	cfg.Mode = Observe
	a := newAgent(cfg, log, version)
	if err := checkCapabilities(); err != nil {
		return nil, err
	}
	if scope, err := journal.ReadScope(); err == nil {
		// Without its journal, a lock of ours would look like its owner's.
		if found, err := journal.Read(a.cfg.RunDir, scope); err == nil {
			a.adopt(found)
		} else if !errors.Is(err, os.ErrNotExist) {
			a.findings = append(a.findings, err.Error())
		}
	}
	a.journal = readOnly{}
	if err := a.dial(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	defer a.Close()
	a.once = true
	ctx, cancel := context.WithTimeout(ctx, onceWithin)
	defer cancel()
	if err := a.Run(ctx); err != nil {
		return nil, err
	}
	r := *a.Report()
	r.Live, r.PID = false, 0
	if fn != nil {
		return &r, fn(a.explain)
	}
	return &r, nil
}

// readOnly is the journal of a look: nothing is ever written.
type readOnly struct{}

var errReadOnly = errors.New("agent: nothing is written in observe mode")

// Put refuses.
func (readOnly) Put(...journal.Entry) error { return errReadOnly }

// Remove does nothing.
func (readOnly) Remove(...string) error { return nil }

// Entries is empty.
func (readOnly) Entries() []journal.Entry { return nil }

// LeftOver counts the holds and locks that the journal in a run directory remembers, and tells
// whether there may be rules and clones. With no agent running they are what one that was
// killed has left.
func LeftOver(runDir string) (holds, locks int, tables bool) {
	scope, err := journal.ReadScope()
	if err != nil {
		return 0, 0, false
	}
	found, err := journal.Read(runDir, scope)
	if err != nil {
		return 0, 0, false
	}
	for _, e := range found.Entries {
		switch e.Kind {
		case kindHold:
			holds++
		case kindLock:
			locks++
		case kindTables:
			tables = true
		}
	}
	return holds, locks, tables
}

// Restored says what Restore did.
type Restored struct {
	Holds    int      `json:"holds"`
	Locks    int      `json:"locks"`
	Rules    int      `json:"rules"`
	Clones   int      `json:"clones"`
	Actions  uint64   `json:"actions"`
	Failed   uint64   `json:"failed"`
	Findings []string `json:"findings"`
}

// Restore undoes what an agent that is gone has left, from the journal and by the numbers of
// its tables, rules and routes. With stale, only what can go stale goes: rules and clones. It
// fails with ErrRunning while an agent runs.
func Restore(ctx context.Context, cfg Config, log *slog.Logger, version string, stale bool) (*Restored, error) {
	cfg.Mode = Enforce
	a, err := New(cfg, log, version)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	a.once, a.goal = true, restoreAll
	if stale {
		a.goal = restoreStale
	}
	out := &Restored{Holds: len(a.st.holds), Locks: len(a.st.locks)}
	if stale {
		out.Holds, out.Locks = 0, 0
	}
	ctx, cancel := context.WithTimeout(ctx, onceWithin)
	defer cancel()
	if err := a.Run(ctx); err != nil {
		return nil, fmt.Errorf("agent: restore: %w", err)
	}
	out.Rules, out.Clones = a.dropped.rules, a.dropped.clones
	out.Actions, out.Failed, out.Findings = a.stats.Actions, a.stats.Failed, list(a.findings)
	return out, nil
}
