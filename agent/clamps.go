package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"tsoagent/agent/plan"
	"tsoagent/clamp"
)

// clampTable is what the loop needs to write our nftables table (clamp.Table).
type clampTable interface {
	Read() (clamp.State, error)
	Write([]clamp.Entry) error
	Delete() error
	Close() error
}

var _ clampTable = (*clamp.Table)(nil)

// openClamps opens clamp.Table.
func openClamps() (clampTable, error) { return clamp.Open() }

// clampState is what the loop knows of our nftables table. All but changed belongs to the loop.
type clampState struct {
	kernel  clamp.State
	read    time.Time     // when kernel was read, zero for never or if it is to be read again
	changed atomic.Bool   // set by the watcher
	err     error         // why it can't be read or written
	retry   time.Time     // when that is tried again
	booked  bool          // the journal has its entry
	written []clamp.Entry // what we wrote last
	fight   fight
	deleted int // entries that went with the table
}

// clampRecord is the journal's entry for our nftables table.
type clampRecord struct {
	Table string `json:"table"` // of family inet
}

const clampID = "clamp"

// clampsConcern reports whether our nftables table is looked at: where it is wanted, where an
// earlier run has noted that it may be there, and by a restore, which has no plan of its own. A stop
// doesn't look where nothing was clamped: the kernel would load nf_tables for the question
// (nfnetlink_rcv_msg, net/netfilter/nfnetlink.c).
func (a *Agent) clampsConcern() bool {
	return a.st.clamps.booked || a.cfg.Plan.Partial == plan.PartialClamp || a.goal == restoreAll && (a.nft != nil || a.lastP == nil)
}

// lookAtClamps reads our table if what is known of it may be old. It reports whether it is known.
func (a *Agent) lookAtClamps(now time.Time) bool {
	c := &a.st.clamps
	if now.Before(c.retry) {
		return false
	}
	if a.nft == nil {
		if a.openNFT == nil {
			return false
		}
		c.err = a.in(func() (err error) {
			a.nft, err = a.openNFT()
			return err
		})
		if c.err != nil {
			return a.clampFailed("nftables can't be opened", now)
		}
		a.closers = append(a.closers, a.nft.Close)
	}
	// A resync looks at everything, whether there were events or not.
	old := now.Sub(c.read) > time.Duration(a.cfg.ResyncEvery)*3/4
	if changed := c.changed.Swap(false); !changed && !old {
		return true
	}
	c.kernel, c.err = a.nft.Read()
	if c.err != nil {
		return a.clampFailed("the clamp can't be read", now)
	}
	c.read = now
	return true
}

func (a *Agent) clampFailed(what string, now time.Time) bool {
	c := &a.st.clamps
	c.read, c.retry = time.Time{}, now.Add(stuckRetry)
	if a.goal == protect || c.booked { // else there is nothing that we know of
		a.failed(what, c.err)
	}
	return false
}

// setClamps brings our nftables table up to the plan, or takes it away if nothing is to be
// clamped: the journal first, then one transaction, then it is read back.
func (a *Agent) setClamps(pl *plan.Plan, stale bool, now time.Time) {
	if a.goal == restoreStale || !a.clampsConcern() || !a.lookAtClamps(now) {
		return // a clamp that is stale does no harm: it moves no packet
	}
	c := &a.st.clamps
	want := entriesOf(pl)
	switch {
	case c.kernel.There && !c.kernel.Ours:
		a.unbookClamps() // conflicts says it
	case stale && a.goal == protect && c.kernel.There:
		// What a stale mirror lacks proves nothing.
	case len(want) == 0:
		a.deleteClamps(now)
	case c.kernel.Is(want):
		if !c.booked {
			a.bookClamps()
		}
	default:
		a.writeClamps(want, now)
	}
}

func entriesOf(pl *plan.Plan) []clamp.Entry {
	out := make([]clamp.Entry, 0, len(pl.Clamp))
	for _, e := range pl.Clamp {
		out = append(out, e.Entry)
	}
	return out
}

func (a *Agent) writeClamps(want []clamp.Entry, now time.Time) {
	c := &a.st.clamps
	again := slices.Equal(c.written, want)
	if again {
		may, rests := c.fight.once(now)
		if rests {
			a.notice("the clamp does not stay as it was written (somebody changes or deletes it): resting", "table", "inet "+clamp.Name, "for", fightRest)
		}
		if !may {
			return
		}
	}
	failpoint("clamp-journal-before")
	if !a.bookClamps() {
		return
	}
	failpoint("clamp-journal-after")
	if c.err = a.nft.Write(want); c.err == nil {
		c.written = want
		failpoint("clamp-written")
		c.kernel, c.err = a.nft.Read()
	}
	switch {
	case errors.Is(c.err, clamp.ErrForeign):
		c.err, c.read = nil, time.Time{} // somebody else's, since we looked
		return
	case c.err == nil && !c.kernel.Is(want):
		c.err = errors.New("what was written does not read back")
	}
	if c.err != nil {
		a.clampFailed("the clamp can't be written", now)
		return
	}
	if again {
		a.did("somebody changed the clamp: written again", "table", "inet "+clamp.Name, "entries", len(want))
		return
	}
	a.did("forwarded connections clamped", "table", "inet "+clamp.Name, "entries", len(want))
}

func (a *Agent) deleteClamps(now time.Time) {
	c := &a.st.clamps
	if c.kernel.There {
		if c.err = a.nft.Delete(); c.err != nil {
			if !errors.Is(c.err, clamp.ErrForeign) {
				a.clampFailed("the clamp can't be deleted", now)
			}
			c.err, c.read = nil, time.Time{}
			return
		}
		failpoint("clamp-deleted")
		c.deleted += len(c.kernel.Entries)
		a.did("clamp deleted", "table", "inet "+clamp.Name, "entries", len(c.kernel.Entries))
		c.kernel, c.written = clamp.State{}, nil
	}
	a.unbookClamps()
}

func (a *Agent) bookClamps() bool {
	if err := a.journal.Put(entry(clampID, kindClamp, clampRecord{Table: clamp.Name})); err != nil {
		a.failed("journal can't be written, nothing is clamped", err)
		a.st.clamps.retry = time.Now().Add(stuckRetry)
		return false
	}
	a.st.clamps.booked = true
	return true
}

func (a *Agent) unbookClamps() {
	if a.st.clamps.booked {
		a.unbook(clampID)
		a.st.clamps.booked = false
	}
}

// clampsDone reports whether nothing is left to restore of our nftables table, as far as we know.
func (a *Agent) clampsDone() bool {
	c := &a.st.clamps
	return a.goal != restoreAll || !c.booked && (!c.kernel.There || !c.kernel.Ours)
}

// clampsDue is when the loop has to look at our nftables table again, zero for never.
func (a *Agent) clampsDue(now time.Time) time.Time {
	c := &a.st.clamps
	switch {
	case c.retry.After(now) && a.clampsConcern():
		return c.retry
	case c.fight.until.After(now):
		return c.fight.until
	}
	return time.Time{}
}

// watchClamps wakes the loop when our nftables table changes, whoever did it. It ends with the
// context.
func (a *Agent) watchClamps(ctx context.Context) {
	if a.cfg.Plan.Partial != plan.PartialClamp || a.openNFT == nil {
		return
	}
	changed := func() {
		a.st.clamps.changed.Store(true)
		select {
		case a.inbox.signal <- struct{}{}:
		default:
		}
	}
	var w *clamp.Watcher
	dial := func() error {
		fresh, err := clamp.Watch()
		if err == nil {
			w = fresh // else the old one is what is closed at the end
		}
		return err
	}
	if err := a.in(dial); err != nil {
		// The loop meets the same when it looks, and says so.
		a.log.Debug("nftables can't be watched", "err", err)
		return
	}
	defer func() { _ = w.Close() }()
	changed() // what happened before the subscription
	a.sources.follow(ctx, "nftables", dial,
		func() error {
			err := w.Run(ctx, changed)
			if err != nil {
				_ = w.Close()
			}
			return err
		},
		func(error) { changed() })
}

func (s *snapshot) clampReports() []ClampReport {
	var out []ClampReport
	state := StateWanted
	if s.clamps.Is(entriesOf(s.plan)) {
		state = StateInPlace
	}
	for _, e := range s.plan.Clamp {
		r := ClampReport{Dst: e.Range(), Family: "IPv4", MSS: e.MSS, State: state, Because: []string{}}
		if e.Lo.Is6() {
			r.Family = "IPv6"
		}
		for _, id := range e.Because {
			r.Because = append(r.Because, ids1(id))
		}
		out = append(out, r)
	}
	return out
}

// clampConflicts are what a person should look at.
func (a *Agent) clampConflicts(now time.Time) []string {
	c := &a.st.clamps
	var out []string
	if a.cfg.Plan.Partial != plan.PartialClamp {
		return nil
	}
	if c.kernel.There && !c.kernel.Ours {
		out = append(out, fmt.Sprintf("there is an nftables table inet %s that is not ours: nothing is clamped (rename it, or use partial: table)", clamp.Name))
	}
	if c.err != nil {
		out = append(out, fmt.Sprintf("nothing is clamped: %v", c.err))
	}
	if now.Before(c.fight.until) {
		out = append(out, fmt.Sprintf("the nftables table inet %s did not stay as it was written, again and again: it rests", clamp.Name))
	}
	return out
}

// lookAtMore looks at what is in place without writing, for the report of one who only observes.
func (a *Agent) lookAtMore(now time.Time) {
	if a.cfg.Plan.Partial == plan.PartialClamp {
		a.lookAtClamps(now)
	}
	if a.useLanes() {
		a.lookAtLanes(now)
	}
}
