package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"tsoagent/agent/flows"
	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
)

// onceWithin bounds how long a look at the kernel may take: a full BGP table is read in seconds.
const onceWithin = 2 * time.Minute

// Look reads the kernel once, without an agent and without changing anything, and reports what
// an agent with this configuration would want. With fn, it also calls it with what answers
// questions on that state.
func Look(ctx context.Context, cfg Config, log *slog.Logger, version string, fn func(explain func(Question) (*Explanation, error)) error) (*Report, error) {
	return LookIn(ctx, netns.Host, cfg, log, version, fn)
}

// LookIn is Look in a namespace, which is named as in a configuration.
func LookIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, fn func(explain func(Question) (*Explanation, error)) error) (*Report, error) {
	return lookIn(ctx, spec, cfg, log, version, func(_ context.Context, a *Agent) error {
		if fn == nil {
			return nil
		}
		return fn(a.explain)
	})
}

// FlowsIn reads the kernel once, without an agent, and calls fn for each flow in a namespace that is
// asked for. It fails as LookIn does, and with ErrUnreadable where the kernel does not let its sockets
// be read. A Flow is good until fn returns.
func FlowsIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, f flows.Filter, fn func(*flows.Flow) error) (*flows.Result, error) {
	var out *flows.Result
	_, err := lookIn(ctx, spec, cfg, log, version, func(ctx context.Context, a *Agent) (err error) {
		out, err = a.eachFlow(ctx, atOnce, f, fn)
		return err
	})
	return out, err
}

// DiagnoseIn reads the kernel once, without an agent, and diagnoses the connections in a namespace.
func DiagnoseIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string) (*Diagnosis, error) {
	var out *Diagnosis
	_, err := lookIn(ctx, spec, cfg, log, version, func(ctx context.Context, a *Agent) (err error) {
		out, err = a.diagnose(ctx, atOnce)
		return err
	})
	return out, err
}

// lookIn reads the kernel once, and lets fn have the state of an agent that has ended.
func lookIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, fn func(context.Context, *Agent) error) (*Report, error) {
	cfg.Mode = Observe
	a, err := newAgentIn(spec, cfg, log, version, (*Agent).openToLook)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	a.once, a.alone = true, true
	ctx, cancel := context.WithTimeout(ctx, onceWithin)
	defer cancel()
	if err := a.Run(ctx); err != nil {
		return nil, err
	}
	r := *a.Report()
	r.Live, r.PID, r.Netns = false, 0, a.name
	return &r, fn(ctx, a)
}

// openToLook is open for one who writes nothing.
func (a *Agent) openToLook() error {
	if err := checkCapabilities(); err != nil {
		return err
	}
	if scope, err := a.scope(); err == nil {
		// Without its journal, a lock of ours would look like its owner's.
		for _, dir := range slices.Compact([]string{a.dir, cookieDir(a.cfg.RunDir, scope.NetnsCookie)}) {
			if found, err := journal.Read(dir, scope); err == nil {
				a.adopt(found)
			} else if !errors.Is(err, os.ErrNotExist) {
				a.findings = append(a.findings, err.Error())
			}
		}
	}
	a.journal = readOnly{}
	return a.dial()
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

// Len is 0.
func (readOnly) Len() int { return 0 }

// Left is what the journals in a run directory remember, in all namespaces together.
type Left struct {
	Holds, Locks, DeviceMTUs, Lanes int
	// Moved are devices that went to other namespaces with what was changed on them.
	Moved  int
	Clamp  bool // an nftables table of ours
	Tables bool // there may be rules and clones
}

// LeftOver reads the journals in a run directory. With no agent running they tell what one that
// was killed, or told to keep, has left.
func LeftOver(runDir string) Left {
	var left Left
	scope, err := journal.ReadScope()
	if err != nil {
		return left
	}
	entries := []journal.Entry{}
	if found, err := journal.Read(runDir, scope); err == nil {
		entries = found.Entries
	}
	cookies, _ := knownNamespaces(runDir)
	for _, c := range cookies {
		if found, err := journal.Read(cookieDir(runDir, c), journal.Scope{BootID: scope.BootID, NetnsCookie: c}); err == nil {
			entries = append(entries, found.Entries...)
		}
	}
	left.add(entries)
	return left
}

// add counts journal entries.
func (left *Left) add(entries []journal.Entry) {
	for _, e := range entries {
		switch e.Kind {
		case kindHold:
			left.Holds++
		case kindLock:
			left.Locks++
		case kindDeviceMTU:
			left.DeviceMTUs++
		case kindLane:
			left.Lanes++
		case kindMoved:
			left.Moved++
		case kindClamp:
			left.Clamp = true
		case kindTables:
			left.Tables = true
		}
	}
}

// String is what is left in words, empty for nothing.
func (left Left) String() string {
	var out []string
	for _, c := range []struct {
		n         int
		one, many string
	}{
		{left.Holds, "held feature", "held features"}, {left.Locks, "locked route", "locked routes"},
		{left.DeviceMTUs, "device mtu", "device mtus"}, {left.Lanes, "lane", "lanes"},
		{left.Moved, "device that was moved to another network namespace", "devices that were moved to other network namespaces"},
	} {
		switch c.n {
		case 0:
		case 1:
			out = append(out, "1 "+c.one)
		default:
			out = append(out, fmt.Sprintf("%d %s", c.n, c.many))
		}
	}
	if left.Tables {
		out = append(out, "rules and clones")
	}
	if left.Clamp {
		out = append(out, "a clamp")
	}
	return strings.Join(out, ", ")
}

// left is what the agent's journal remembers. Its loop must have ended, or be the caller.
func (a *Agent) left() string {
	var left Left
	left.add(a.journal.Entries())
	return left.String()
}

// Restored says what Restore did.
type Restored struct {
	Netns    string   `json:"netns,omitempty"` // the namespace, none for the host's
	Holds    int      `json:"holds"`
	Locks    int      `json:"locks"`
	Rules    int      `json:"rules"`
	Clones   int      `json:"clones"`
	Actions  uint64   `json:"actions"`
	Failed   uint64   `json:"failed"`
	Findings []string `json:"findings"`
	// DeviceMTUs are devices that got their own MTU back, Clamps the intervals of destinations
	// that are no longer clamped.
	DeviceMTUs int `json:"device_mtus,omitempty"`
	Clamps     int `json:"clamps,omitempty"`
	// Lanes were taken away.
	Lanes int `json:"lanes,omitempty"`
	// Moved are devices that went to other namespaces with what was changed on them, and that nobody took over there.
	Moved int `json:"moved,omitempty"`
	// Namespaces are the others, by RestoreAll.
	Namespaces []Restored `json:"namespaces,omitempty"`
}

// Restore undoes what an agent that is gone has left, from the journal and by the numbers of
// its tables, rules and routes. With stale, only what can go stale goes: rules and clones. It
// fails with ErrRunning while an agent runs.
func Restore(ctx context.Context, cfg Config, log *slog.Logger, version string, stale bool) (*Restored, error) {
	return RestoreIn(ctx, netns.Host, cfg, log, version, stale)
}

// RestoreIn is Restore in a namespace, which is named as in a configuration.
func RestoreIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, stale bool) (*Restored, error) {
	return restoreIn(ctx, spec, cfg, log, version, stale, nil)
}

// restoreIn is RestoreIn, where others take over the devices that left the namespace.
func restoreIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, stale bool, to others) (*Restored, error) {
	return restoreWith(ctx, spec, cfg, log, version, stale, to, (*Agent).open)
}

// restoreWith is restoreIn with a function that opens the agent.
func restoreWith(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, stale bool, to others, open func(*Agent) error) (*Restored, error) {
	cfg.Mode = Enforce
	var cookie uint64
	out, err := restoreFrom(ctx, spec, cfg, log, version, stale, func(a *Agent) error {
		if scope, err := a.scope(); err == nil && a.name == "" {
			cookie = scope.NetnsCookie
		}
		a.others = to
		return open(a)
	})
	if err != nil || cookie == 0 {
		return out, err
	}
	// An agent that was started elsewhere, as in the host's namespace while we are inside of
	// `ip netns exec NAME`, has the journal of this one in a directory of its own.
	dir := cookieDir(cfg.WithDefaults().RunDir, cookie)
	if _, err := os.Stat(dir); err != nil {
		return out, nil // none
	}
	more, err := restoreFrom(ctx, spec, cfg, log, version, stale, func(a *Agent) error {
		a.dir, a.others = dir, to
		return a.open()
	})
	if more != nil {
		out.add(more)
	}
	return out, err
}

// restoreFrom is RestoreIn with what one journal knows, which open chooses.
func restoreFrom(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, stale bool, open func(*Agent) error) (*Restored, error) {
	a, err := newAgentIn(spec, cfg, log, version, func(a *Agent) error {
		a.aim(stale)
		return open(a)
	})
	if err != nil {
		return nil, err
	}
	out, err := a.restore(ctx, stale)
	if err == nil {
		a.tidy()
	}
	return out, errors.Join(err, a.Close())
}

// add counts what was restored from another journal of the same namespace.
func (r *Restored) add(more *Restored) {
	r.Holds, r.Locks, r.Rules, r.Clones = r.Holds+more.Holds, r.Locks+more.Locks, r.Rules+more.Rules, r.Clones+more.Clones
	r.DeviceMTUs, r.Clamps, r.Lanes = r.DeviceMTUs+more.DeviceMTUs, r.Clamps+more.Clamps, r.Lanes+more.Lanes
	r.Moved += more.Moved
	r.Actions, r.Failed, r.Findings = r.Actions+more.Actions, r.Failed+more.Failed, append(r.Findings, more.Findings...)
}

// aim has the agent give back, all or only what can go stale, and stop then.
func (a *Agent) aim(stale bool) {
	a.once, a.goal = true, restoreAll
	if stale {
		a.goal = restoreStale
	}
}

func (a *Agent) restore(ctx context.Context, stale bool) (*Restored, error) {
	a.aim(stale)
	out := &Restored{Netns: a.name, Holds: len(a.st.holds), Locks: len(a.st.locks)}
	if stale {
		out.Holds, out.Locks = 0, 0
	}
	ctx, cancel := context.WithTimeout(ctx, onceWithin)
	defer cancel()
	if err := a.Run(ctx); err != nil {
		if left := a.left(); left != "" {
			return nil, fmt.Errorf("agent: restore: %w; still in place: %s; run `tsoctl restore`", err, left)
		}
		return nil, fmt.Errorf("agent: restore: %w", err)
	}
	if !stale {
		out.Holds += a.st.taken - a.st.missedHolds
		a.findings = append(a.findings, a.st.missed...)
	}
	out.Rules, out.Clones = a.dropped.rules, a.dropped.clones
	out.DeviceMTUs, out.Clamps = a.st.mtusGiven, a.st.clamps.deleted
	out.Lanes, out.Moved = a.st.lanes.removed, len(a.st.moved)
	out.Actions, out.Failed, out.Findings = a.stats.Actions, a.stats.Failed, list(slices.Concat(a.findings, a.movedFindings()))
	return out, nil
}
