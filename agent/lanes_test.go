package agent

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tsoagent/agent/plan"
	"tsoagent/lane"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// fakeLanes is the world's kernel for lanes.
type fakeLanes struct {
	w         *world
	have      map[int32]lane.State
	ensureErr error
	listErr   error
	removeErr error
}

func (f *fakeLanes) Ensure(l lane.Lane) error {
	f.w.wrote("ensure lane %s %v", l.Name, l.Matches)
	if f.ensureErr != nil {
		delete(f.have, l.Index)
		return f.ensureErr
	}
	link := f.w.kernel.Link(routes.Ifindex(l.Index))
	if link == nil || link.Name != l.Name {
		return fmt.Errorf("fake: %w", errNoDevice)
	}
	f.have[l.Index] = lane.State{
		Index: l.Index, Name: l.Name, IFB: lane.IFBName(l.Index), IFBIndex: 1000 + l.Index, Matches: slices.Clone(l.Matches),
	}
	return nil
}

func (f *fakeLanes) Remove(index int32, _ string) error {
	f.w.wrote("remove lane %d", index)
	if f.removeErr == nil {
		delete(f.have, index)
	}
	return f.removeErr
}

func (f *fakeLanes) List() ([]lane.State, error) {
	var out []lane.State
	for _, i := range slices.Sorted(maps.Keys(f.have)) {
		s := f.have[i]
		if link := f.w.kernel.Link(routes.Ifindex(i)); link == nil {
			s.Name, s.Problems = "", []string{"the NIC is gone"}
		}
		out = append(out, s)
	}
	return out, f.listErr
}

func laneConfig() Config {
	var c Config
	c.Plan.SharedNICs = plan.SharedLane
	return c
}

// laneWorld has partPolicy by nic1, and nothing read yet.
func laneWorld(t *testing.T, cfg Config) (*world, *fakeLanes) {
	t.Helper()
	w := newWorld(t, cfg)
	f := &fakeLanes{w: w, have: map[int32]lane.State{}}
	w.a.lanes = f
	return w, f
}

const espMatch = "[src 192.0.2.1/32 dst 192.0.2.2/32 proto 50]"

func mustLane(t *testing.T, w *world, state string) LaneReport {
	t.Helper()
	r := w.a.Report()
	if len(r.Lanes) != 1 || r.Lanes[0].State != state {
		t.Fatalf("lanes: %+v, want one that is %s", r.Lanes, state)
	}
	return r.Lanes[0]
}

func ofLanes(ops []string) []string {
	return slices.DeleteFunc(ops, func(s string) bool { return !strings.Contains(s, "lane") })
}

func mustLaneOps(t *testing.T, w *world, want ...string) {
	t.Helper()
	if got := ofLanes(w.took()); !slices.Equal(got, want) {
		t.Fatalf("written:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestLaneIsJournaledMadeAndTakenAway(t *testing.T) {
	w, _ := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	mustLaneOps(t, w, "journal put lane/2", "ensure lane nic1 "+espMatch)
	mustLane(t, w, StateInPlace)
	if c := w.a.Report().Coverages[0]; c.Cut != "lane" || !slices.Contains(c.Held, "nic1 lane") {
		t.Errorf("verdict: %+v", c)
	}
	w.resync()
	w.dumpXFRM(partPolicy, partSA)
	w.settle()
	mustLaneOps(t, w) // a resync writes nothing

	w.xfrm(gone(partPolicy), saGone(partSA))
	w.settle()
	mustLaneOps(t, w)
	mustLane(t, w, StateInPlace) // its cause lingers
	w.advance(time.Second)
	mustLaneOps(t, w, "remove lane 2", "journal remove lane/2")
	if len(w.a.Report().Lanes) > 0 {
		t.Errorf("lanes: %+v", w.a.Report().Lanes)
	}
}

func TestLaneStaysThroughARekey(t *testing.T) {
	w, _ := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	w.took()
	w.xfrm(saGone(partSA)) // the old one goes before the new one comes
	w.settle()
	w.advance(time.Second / 2)
	w.xfrm(sa(0x300, 0))
	w.settle()
	w.advance(time.Hour)
	mustLaneOps(t, w)
	mustLane(t, w, StateInPlace)
}

func TestLaneFollowsNATTraversal(t *testing.T) {
	w, _ := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	w.took()
	natt := *sa(0x300, 0).SA
	natt.Encap.Type, natt.Encap.Sport, natt.Encap.Dport = 2, 4500, 61000
	w.xfrm(xfrmSA(natt))
	w.settle()
	w.xfrm(saGone(partSA))
	w.settle()
	const both = "[src 192.0.2.1/32 dst 192.0.2.2/32 proto 17 sport 4500 dport 61000 src 192.0.2.1/32 dst 192.0.2.2/32 proto 50]"
	got := ofLanes(w.took())
	if last := got[len(got)-1]; !slices.Contains(got, "ensure lane nic1 "+both) || !strings.Contains(last, "dport 61000]") {
		t.Errorf("written: %q", got)
	}
}

func TestRefusedLaneIsToldAndTriedAgainOnlyOnChanges(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	f.ensureErr = errors.New("it has an ingress qdisc")
	w.start(partPolicy, partSA)
	mustLaneOps(t, w, "journal put lane/2", "ensure lane nic1 "+espMatch, "journal remove lane/2")
	if l := mustLane(t, w, StateRefused); !strings.Contains(l.Why, "ingress qdisc") {
		t.Errorf("%+v", l)
	}
	r := w.a.Report()
	if c := r.Coverages[0]; c.Cut == "lane" || len(c.Held) > 0 || !strings.Contains(strings.Join(c.Notes, "\n"), "ingress qdisc") {
		t.Errorf("verdict: %+v", c)
	}
	if !r.Degraded() {
		t.Error("nobody is told")
	}
	w.addRoute("10.77.0.0/16", hop{oif: 2})
	w.settle()
	w.advance(time.Hour)
	mustLaneOps(t, w)

	f.ensureErr = nil
	w.routing(routes.LinkSet{Link: w.kernel.Link(2)})
	w.settle()
	mustLane(t, w, StateInPlace)
}

func TestLaneOfAKilledAgentIsAdoptedUntouched(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	for _, journal := range []bool{true, false} {
		if !journal {
			clear(w.book) // as after somebody deleted it
		}
		w.crash(laneConfig())
		w.a.lanes = f
		w.start(partPolicy, partSA)
		if got := slices.DeleteFunc(ofLanes(w.took()), func(s string) bool { return s == "journal put lane/2" }); len(got) > 0 {
			t.Errorf("with journal %v, written: %q", journal, got)
		}
		mustLane(t, w, StateInPlace)
	}

	// Without the cause, or with another configuration, it goes.
	w.crash(Config{})
	w.a.lanes = f
	w.start(partPolicy, partSA)
	w.advance(time.Second)
	mustLaneOps(t, w, "remove lane 2", "journal remove lane/2")
}

func TestOrphanedLanesGoAtOnce(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	f.have[77] = lane.State{Index: 77, IFB: lane.IFBName(77)}
	w.start(partPolicy, partSA)
	if got := ofLanes(w.took()); !slices.Contains(got, "remove lane 77") || len(f.have) != 1 {
		t.Errorf("written: %q", got)
	}
	w.routing(routes.LinkGone{Index: 2})
	w.settle()
	mustLaneOps(t, w, "remove lane 2", "journal remove lane/2")
}

func TestRestoreTakesLanesAway(t *testing.T) {
	for _, stale := range []bool{false, true} {
		t.Run(fmt.Sprint("stale ", stale), func(t *testing.T) {
			w, f := laneWorld(t, laneConfig())
			w.start(partPolicy, partSA)
			w.crash(Config{})
			w.a.lanes = f
			w.a.once, w.a.goal = true, restoreAll
			if stale {
				w.a.goal = restoreStale
			}
			w.start(partPolicy, partSA)
			for range 10 {
				w.settle()
			}
			if got := len(f.have); got != map[bool]int{false: 0, true: 1}[stale] {
				t.Errorf("%d lanes left; written:\n%s", got, strings.Join(w.took(), "\n"))
			}
			if !stale && len(w.book) > 0 {
				t.Errorf("entries stay in the journal: %v", w.ids())
			}
		})
	}
}

func TestLaneThatDoesNotStayIsGivenUp(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	for range 3 * fightWrites {
		s := f.have[2]
		s.Problems = []string{"the ifb is down"}
		if f.have[2].IFB != "" {
			f.have[2] = s
		}
		w.a.st.lanes.changed.Store(true)
		w.settle()
	}
	made := 0
	for _, op := range w.took() {
		if strings.HasPrefix(op, "ensure lane") {
			made++
		}
	}
	// The first one and those of the fight.
	if made != 1+fightWrites || len(f.have) > 0 {
		t.Errorf("made %d times, left %v", made, f.have)
	}
	mustLane(t, w, StateRefused)
}

// After it was given up, an event of the NIC has it tried again. In the rest nobody mends it.
func TestLaneThatIsGivenUpLeavesNoHalf(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	spoil := func() {
		if s, there := f.have[2]; there {
			s.IFB, s.Problems = "", []string{"there is no ifb"}
			f.have[2] = s
		}
		w.a.st.lanes.changed.Store(true)
		w.settle()
	}
	for range 3 * fightWrites {
		spoil()
	}
	mustLane(t, w, StateRefused)
	w.routing(routes.LinkSet{Link: w.kernel.Link(2)})
	w.settle()
	mustLane(t, w, StateInPlace)
	spoil()
	mustLane(t, w, StateRefused)
	if len(f.have) > 0 {
		t.Errorf("half a lane stays: %+v", f.have)
	}
}

func TestLanesThatCantBeReadAreNotAskedForAllTheTime(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	w.xfrm(gone(partPolicy), saGone(partSA))
	w.settle()
	f.listErr = errors.New("out of memory")
	w.a.st.lanes.changed.Store(true)
	before := w.a.stats.Rounds
	w.advance(2 * stuckRetry)
	if n := w.a.stats.Rounds - before; n > 10 {
		t.Errorf("%d rounds", n)
	}
	f.listErr = nil
	w.took()
	w.advance(stuckRetry)
	mustLaneOps(t, w, "remove lane 2", "journal remove lane/2")
}

func TestStaleMirrorTakesNoLane(t *testing.T) {
	w, _ := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	w.took()
	w.a.st.lanes.check = true
	w.xfrm(xfrmwatch.Lost{Err: errors.New("overrun")}, gone(partPolicy), saGone(partSA))
	w.settle()
	w.advance(time.Minute)
	mustLaneOps(t, w)
}

func TestLanesAreOnlyLookedAtInObserveMode(t *testing.T) {
	cfg := laneConfig()
	cfg.Mode = Observe
	w, f := laneWorld(t, cfg)
	w.start(partPolicy, partSA)
	mustLaneOps(t, w)
	mustLane(t, w, StateWanted)
	m := lane.Match{Src: netip.MustParsePrefix("192.0.2.1/32"), Dst: netip.MustParsePrefix("192.0.2.2/32"), Proto: 50}
	f.have[2] = lane.State{Index: 2, Name: "nic1", IFB: "tsolane2", Matches: []lane.Match{m}}
	w.restart(cfg)
	w.a.lanes = f
	w.start(partPolicy, partSA)
	mustLane(t, w, StateInPlace)
}

func TestWithoutLanesTheReasonIsTold(t *testing.T) {
	w, _ := laneWorld(t, laneConfig())
	w.a.lanes, w.a.noLanes = nil, "no generic netlink"
	w.start(partPolicy, partSA)
	if l := mustLane(t, w, StateRefused); l.Why != "no generic netlink" {
		t.Errorf("%+v", l)
	}
}
