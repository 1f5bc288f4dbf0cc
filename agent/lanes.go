package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/lane"
	"tsoagent/routes"
)

// laneClient is what the loop needs to make and remove lanes (lane.Client).
type laneClient interface {
	Ensure(lane.Lane) error
	Remove(index int32, name string) error
	List() ([]lane.State, error)
}

var _ laneClient = (*lane.Client)(nil)

const kindLane journal.Kind = "lane"

// laneRecord is the journal's entry for a lane. What is in place is read from the kernel, where
// the ifb's name and alias and the filters' mark tell whose they are.
type laneRecord struct {
	Index int32  `json:"ifindex"` // of the NIC
	Name  string `json:"device"`
}

func laneID(index int32) string { return fmt.Sprintf("lane/%d", index) }

// laneState is what the loop knows of lanes, by ifindex of the NIC. All but changed and watched
// belongs to the loop.
type laneState struct {
	seen    map[int32]lane.State // what the kernel has
	check   bool                 // seen may be old
	retry   time.Time            // when it is read again after that failed
	booked  map[int32]bool       // in the journal
	refused map[int32]laneRefusal
	written map[int32]lane.Lane // what we wrote last
	fights  map[int32]fight
	release map[int32]time.Time // when a lane that is wanted no more is taken away
	removed int
	changed atomic.Bool                    // set by the watcher
	watched atomic.Pointer[map[int32]bool] // the NICs that it is to look at
}

type laneRefusal struct {
	lane lane.Lane
	why  string
}

func newLaneState() laneState {
	return laneState{
		seen: map[int32]lane.State{}, check: true, booked: map[int32]bool{}, refused: map[int32]laneRefusal{},
		written: map[int32]lane.Lane{}, fights: map[int32]fight{}, release: map[int32]time.Time{},
	}
}

func sameLane(a, b lane.Lane) bool {
	return a.Index == b.Index && a.Name == b.Name && slices.Equal(a.Matches, b.Matches)
}

// lookAtLanes reads what is in place if what is known may be old. It reports whether it is
// known.
func (a *Agent) lookAtLanes(now time.Time) bool {
	s := &a.st.lanes
	if a.lanes == nil {
		return false
	}
	if s.changed.Swap(false) {
		s.check = true
	}
	if !s.check {
		return true
	}
	if now.Before(s.retry) {
		return false
	}
	list, err := a.lanes.List()
	if err != nil {
		s.retry = now.Add(stuckRetry)
		a.failed("lanes can't be read", err)
		return false
	}
	s.check, s.retry = false, time.Time{}
	clear(s.seen)
	for _, l := range list {
		s.seen[l.Index] = l
	}
	return true
}

// laneLink notes that a device changed. A lane on it, or its ifb, is looked at again, and one
// that was refused is tried again.
func (a *Agent) laneLink(i routes.Ifindex, name string) {
	s := &a.st.lanes
	delete(s.refused, int32(i))
	for _, l := range s.seen {
		if l.Index == int32(i) || l.IFBIndex == int32(i) || l.IFB == name {
			s.check = true
		}
	}
}

// setLanes makes the lanes that the plan wants: the journal first, then the kernel, then it is
// read back.
func (a *Agent) setLanes(pl *plan.Plan, stale bool, now time.Time) {
	s := &a.st.lanes
	if a.goal != protect || len(pl.Lanes) == 0 {
		return
	}
	if a.lanes == nil {
		for _, l := range pl.Lanes {
			s.refused[l.Index] = laneRefusal{l.Lane, a.noLanes}
		}
		return
	}
	if !a.lookAtLanes(now) {
		return
	}
	a.watchLanesOf(pl) // ahead of the first write, so that nothing is missed
	for _, l := range pl.Lanes {
		want := l.Lane
		have, there := s.seen[want.Index]
		if there && stale {
			// What a stale mirror lacks proves nothing.
			want.Matches = slices.Concat(want.Matches, have.Matches)
			slices.SortFunc(want.Matches, lane.Match.Compare)
			want.Matches = slices.Compact(want.Matches)
		}
		switch r, refused := s.refused[want.Index]; {
		case there && have.Is(want):
			delete(s.refused, want.Index)
			if !s.booked[want.Index] {
				a.bookLane(want)
			}
		case refused && sameLane(r.lane, want):
		default:
			a.setLane(want, causes(l.Because, l.Keys), now)
		}
	}
}

func (a *Agent) setLane(want lane.Lane, because string, now time.Time) {
	s := &a.st.lanes
	again := sameLane(s.written[want.Index], want)
	if again {
		f := s.fights[want.Index]
		may, _ := f.once(now)
		s.fights[want.Index] = f
		if !may {
			// Half a lane is worse than none: without its ifb the kernel drops what matches. So it
			// goes in the rest, too, where an event of the NIC had it made once more.
			a.takeLane(want.Index, want.Name, now)
			a.refuseLane(want, "it does not stay as it was made: somebody changes or deletes its ifb, its filters or clsact")
			return
		}
	}
	failpoint("lane-journal-before")
	if !a.bookLane(want) {
		return
	}
	failpoint("lane-journal-after")
	err := a.lanes.Ensure(want)
	failpoint("lane-written")
	s.check = true
	switch read := a.lookAtLanes(now); {
	case errors.Is(err, os.ErrNotExist):
		// Renamed or gone: its events are on the way, and so is another plan.
		a.log.Debug("device for a lane is gone", "device", want.Name, "err", err)
		return
	case err == nil && read && !s.seen[want.Index].Is(want):
		err = fmt.Errorf("what was made does not read back: %v", s.seen[want.Index].Problems)
	}
	if err != nil {
		a.count(laneRefused, Failed)
		a.refuseLane(want, err.Error())
		if _, there := s.seen[want.Index]; !there {
			a.unbookLane(want.Index)
		}
		return
	}
	s.written[want.Index] = want
	delete(s.refused, want.Index)
	delete(s.release, want.Index)
	what := "covered flows take a lane"
	if again {
		what = "a lane was changed by somebody else: made again"
	}
	a.did(what, "device", want.Name, "ifb", lane.IFBName(want.Index), "matches", len(want.Matches), "because", because)
}

// laneRefused is what failed where a NIC can't have a lane.
const laneRefused = "no lane: the NIC keeps its offloads for all"

func (a *Agent) refuseLane(want lane.Lane, why string) {
	a.st.lanes.refused[want.Index] = laneRefusal{want, why}
	a.notice(laneRefused, "device", want.Name, "why", why)
}

func (a *Agent) bookLane(l lane.Lane) bool {
	if err := a.journal.Put(entry(laneID(l.Index), kindLane, laneRecord{l.Index, l.Name})); err != nil {
		a.failed("journal can't be written, no lane is made", err, "device", l.Name)
		return false
	}
	a.st.lanes.booked[l.Index] = true
	return true
}

func (a *Agent) unbookLane(index int32) {
	if a.st.lanes.booked[index] {
		delete(a.st.lanes.booked, index)
		a.unbook(laneID(index))
	}
}

// takeLanes takes lanes away that are wanted no more, once it has been quiet: like holds, those
// whose policies are all gone and only linger wait from then on. Orphans, whose NIC is gone, go
// at once.
func (a *Agent) takeLanes(pl *plan.Plan, stale bool, now time.Time) {
	s := &a.st.lanes
	if a.goal == restoreStale || len(s.seen)+len(s.booked) == 0 && !s.check || !a.lookAtLanes(now) {
		return // a lane of an agent that is gone carries its packets as before
	}
	waning := map[int32]bool{}
	due := func(i int32) bool {
		waning[i] = true
		if _, runs := s.release[i]; !runs {
			s.release[i] = now.Add(time.Duration(a.cfg.RestoreAfter))
		}
		return !now.Before(s.release[i])
	}
	wanted := map[int32]bool{}
	for _, l := range pl.Lanes {
		wanted[l.Index] = true
		if _, there := s.seen[l.Index]; there && !stale && len(l.Keys) == 0 && !slices.ContainsFunc(l.Because, a.st.lives) {
			due(l.Index)
		}
	}
	for _, i := range slices.Sorted(maps.Keys(s.seen)) {
		have := s.seen[i]
		switch {
		case wanted[i], stale && a.goal == protect:
		case have.Name == "", a.once, a.goal == restoreAll, due(i):
			a.takeLane(i, have.Name, now)
		}
	}
	for _, i := range slices.Sorted(maps.Keys(s.booked)) {
		if _, there := s.seen[i]; !there && !wanted[i] {
			a.unbookLane(i) // somebody took it away, or it was never made
		}
	}
	for i := range s.refused {
		if !wanted[i] {
			delete(s.refused, i)
		}
	}
	maps.DeleteFunc(s.release, func(i int32, _ time.Time) bool { return !waning[i] })
}

func (a *Agent) takeLane(index int32, name string, now time.Time) {
	s := &a.st.lanes
	err := a.lanes.Remove(index, name)
	failpoint("lane-removed")
	s.check = true
	if err != nil {
		s.release[index] = now.Add(maxFlap)
		a.failed("lane can't be taken away", err, "device", name)
		return
	}
	delete(s.seen, index)
	delete(s.release, index)
	delete(s.written, index)
	a.unbookLane(index)
	s.removed++
	a.did("lane taken away", "device", name, "ifb", lane.IFBName(index))
}

// lanesDone reports whether nothing is left to restore of lanes.
func (a *Agent) lanesDone() bool {
	s := &a.st.lanes
	return a.goal != restoreAll || a.lanes == nil || !s.check && len(s.seen) == 0
}

// lanesDue is when the loop has to look at lanes again, zero for never.
func (a *Agent) lanesDue(now time.Time) time.Time {
	s := &a.st.lanes
	due := s.retry
	if due.After(now) {
		return due // nothing is done ahead of the next look
	}
	add := func(t time.Time) {
		if due.IsZero() || t.Before(due) {
			due = t
		}
	}
	for _, t := range s.release {
		add(t)
	}
	for _, f := range s.fights {
		if f.until.After(now) {
			add(f.until)
		}
	}
	return due
}

// useLanes reports whether the configuration asks for lanes anywhere.
func (a *Agent) useLanes() bool {
	c := &a.cfg.Plan
	return c.SharedNICs == plan.SharedLane || slices.ContainsFunc(c.Devices, func(d plan.DeviceConfig) bool { return d.SharedNICs == plan.SharedLane })
}

// watchLanesOf tells the watcher which NICs count.
func (a *Agent) watchLanesOf(pl *plan.Plan) {
	nics := map[int32]bool{}
	for _, l := range pl.Lanes {
		nics[l.Index] = true
	}
	if old := a.st.lanes.watched.Load(); old == nil || !maps.Equal(*old, nics) {
		a.st.lanes.watched.Store(&nics)
	}
}

// watchLanes wakes the loop when somebody changes qdiscs or filters of a NIC with a lane. It
// ends with the context.
func (a *Agent) watchLanes(ctx context.Context) {
	if !a.useLanes() || a.cfg.Mode == Observe || a.sources == nil {
		return
	}
	changed := func(nic int32) {
		if nics := a.st.lanes.watched.Load(); nic != 0 && (nics == nil || !(*nics)[nic]) {
			return
		}
		a.st.lanes.changed.Store(true)
		select {
		case a.inbox.signal <- struct{}{}:
		default:
		}
	}
	var w *lane.Watcher
	dial := func() error {
		fresh, err := lane.Watch()
		if err == nil {
			w = fresh // else the old one is what is closed at the end
		}
		return err
	}
	if err := a.in(dial); err != nil {
		a.log.Warn("traffic control can't be watched: changes of lanes by others are seen at the next resync", "err", err)
		return
	}
	defer func() { _ = w.Close() }()
	changed(0) // what happened before the subscription
	a.sources.follow(ctx, "tc", dial,
		func() error {
			err := w.Run(ctx, changed)
			if err != nil {
				_ = w.Close()
			}
			return err
		},
		func(error) { changed(0) })
}

func (s *snapshot) laneReports() []LaneReport {
	var out []LaneReport
	wanted := map[int32]bool{}
	for _, l := range s.plan.Lanes {
		wanted[l.Index] = true
		r := LaneReport{Device: l.Name, Index: l.Index, IFB: lane.IFBName(l.Index), Matches: []string{}, State: StateWanted, Because: []string{}}
		for _, m := range l.Matches {
			r.Matches = append(r.Matches, m.String())
		}
		r.Because = causeList(l.Because, l.Keys)
		if refusal, no := s.noLanes[l.Index]; no {
			r.State, r.Why = StateRefused, refusal.why
		} else if have, there := s.lanes[l.Index]; there && have.Is(l.Lane) {
			r.State = StateInPlace
		}
		out = append(out, r)
	}
	for i, have := range s.lanes {
		if wanted[i] {
			continue
		}
		r := LaneReport{Device: have.Name, Index: i, IFB: have.IFB, Matches: []string{}, State: StateReleasing, Because: []string{}}
		r.Why = "its cause is gone; taken away when it has been quiet"
		for _, m := range have.Matches {
			r.Matches = append(r.Matches, m.String())
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b LaneReport) int { return cmp.Compare(a.Index, b.Index) })
	return out
}

// noteLanes says in the verdicts of coverages which of their lanes are refused, and why.
func noteLanes(r *Report) {
	for _, l := range r.Lanes {
		if l.State != StateRefused {
			continue
		}
		for i := range r.Coverages {
			c := &r.Coverages[i]
			if !slices.Contains(l.Because, coverageName(c)) {
				continue
			}
			c.Notes = append(slices.Clone(c.Notes), fmt.Sprintf("no lane on %s, which keeps its offloads: %s", l.Device, l.Why))
			c.Held = slices.DeleteFunc(slices.Clone(c.Held), func(s string) bool { return s == l.Device+" lane" })
			if c.Cut == string(plan.CutLane) && !slices.ContainsFunc(c.Held, func(s string) bool { return len(s) > 5 && s[len(s)-5:] == " lane" }) {
				c.Cut = string(plan.CutSocket)
			}
		}
	}
}
