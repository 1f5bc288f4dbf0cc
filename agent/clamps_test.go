package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tsoagent/agent/plan"
	"tsoagent/clamp"
	"tsoagent/routes"
)

// fakeClamps is the nftables table of a fake kernel.
type fakeClamps struct {
	*world
	state clamp.State
	err   error // of the next write
}

func (f *fakeClamps) Read() (clamp.State, error) { return f.state, nil }

func (f *fakeClamps) Write(entries []clamp.Entry) error {
	if err := f.err; err != nil {
		f.err = nil
		return err
	}
	var text []string
	for _, e := range entries {
		text = append(text, e.String())
	}
	f.wrote("clamp %s", strings.Join(text, ", "))
	f.state = clamp.State{There: true, Ours: true, Whole: true, Entries: slices.Clone(entries)}
	return nil
}

func (f *fakeClamps) Delete() error {
	f.wrote("clamp deleted")
	f.state = clamp.State{}
	return nil
}

func (*fakeClamps) Close() error { return nil }

func clampConfig() Config {
	cfg := dedicatedOff()
	cfg.Plan.Partial = plan.PartialClamp
	return cfg
}

func clampWorld(t *testing.T) (*world, *fakeClamps) {
	t.Helper()
	w := tunnelWorld(t, clampConfig())
	f := &fakeClamps{world: w}
	w.a.nft = f
	return w, f
}

// changed is what the watcher does.
func (f *fakeClamps) changed() {
	f.a.st.clamps.changed.Store(true)
	f.settle()
}

func (w *world) clampOps() []string {
	return slices.DeleteFunc(w.took(), func(op string) bool { return !strings.Contains(op, "clamp") })
}

func wantOps(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" && len(got)+len(want) > 0 {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

const clamped = "clamp 10.3.0.0/16 mss 1406"

func TestClampIsJournalledWrittenAndRepaired(t *testing.T) {
	w, f := clampWorld(t)
	w.start(partPolicy, partSA)
	wantOps(t, "at first", w.clampOps(), "journal put clamp", clamped)
	if c := w.a.Report().Clamps; len(c) != 1 || c[0].State != StateInPlace || c[0].Dst != "10.3.0.0/16" || c[0].MSS != 1406 || len(c[0].Because) != 1 {
		t.Errorf("the report says %+v", c)
	}
	if len(w.a.lastP.Shapes) > 0 {
		t.Error("shapes besides")
	}
	f.changed()
	wantOps(t, "an event and no change", w.clampOps())

	f.state = clamp.State{}
	f.changed()
	wantOps(t, "deleted", w.clampOps(), "journal put clamp", clamped)
	f.state.Whole = false
	f.changed()
	wantOps(t, "changed", w.clampOps(), "journal put clamp", clamped)
	f.state = clamp.State{}
	w.now = w.now.Add(time.Hour)
	w.settle()
	wantOps(t, "deleted, and nobody told", w.clampOps(), "journal put clamp", clamped)

	for range 2 * fightWrites {
		f.state = clamp.State{}
		f.changed()
	}
	if n := len(w.clampOps()); n > 2*fightWrites {
		t.Errorf("%d writes without rest", n)
	}
	if fs := strings.Join(w.a.Report().Findings, "\n"); !strings.Contains(fs, "it rests") {
		t.Errorf("nothing says that it rests: %s", fs)
	}
	w.advance(fightRest + time.Second)
	if !f.state.There {
		t.Error("not written again after the rest")
	}
}

func TestClampOfSomebodyElseIsLeftAlone(t *testing.T) {
	w, f := clampWorld(t)
	f.state = clamp.State{There: true}
	w.start(partPolicy, partSA)
	wantOps(t, "not ours", w.clampOps())
	if fs := strings.Join(w.a.Report().Findings, "\n"); !strings.Contains(fs, "not ours: nothing is clamped") {
		t.Errorf("nothing says so: %s", fs)
	}
	if c := w.a.Report().Clamps; len(c) != 1 || c[0].State != StateWanted {
		t.Errorf("the report says %+v", c)
	}
	f.state = clamp.State{}
	f.changed()
	wantOps(t, "theirs is gone", w.clampOps(), "journal put clamp", clamped)
	w.a.goal, w.a.once = restoreAll, true
	f.state = clamp.State{There: true}
	f.changed()
	wantOps(t, "restored, and ours was replaced by theirs", w.clampOps(), "journal remove clamp")
}

func TestClampGoesWithItsCauseAndStaysWhereStale(t *testing.T) {
	w, f := clampWorld(t)
	w.start(partPolicy, partSA)
	w.clampOps()
	w.routing(routes.Lost{})
	w.xfrm(gone(partPolicy))
	w.settle()
	w.advance(time.Minute)
	wantOps(t, "while routes are stale", w.clampOps())
	w.resync()
	w.settle()
	w.advance(time.Minute)
	wantOps(t, "its cause is gone", w.clampOps(), "clamp deleted", "journal remove clamp")
	w.xfrm(partPolicy)
	w.settle()
	wantOps(t, "and back", w.clampOps(), "journal put clamp", clamped)

	w.crash(clampConfig())
	w.a.nft = f
	w.start(partPolicy, partSA)
	wantOps(t, "adopted", w.clampOps())
	w.a.goal, w.a.once = restoreStale, true
	w.settle()
	wantOps(t, "restore --stale", w.clampOps())
	w.a.goal = restoreAll
	w.settle()
	wantOps(t, "restore", w.clampOps(), "clamp deleted", "journal remove clamp")

	// With another configuration it goes, after the rules are there.
	w.crash(clampConfig())
	w.a.nft = f
	w.start(partPolicy, partSA)
	w.took()
	w.crash(dedicatedOff())
	w.a.nft = f
	w.start(partPolicy, partSA)
	ops := w.took()
	rule, del := slices.IndexFunc(ops, func(s string) bool { return strings.Contains(s, "rule") }), slices.Index(ops, "clamp deleted")
	if rule < 0 || del < rule {
		t.Errorf("partial: table instead: %q", ops)
	}
}

// To look is to load nf_tables where it is a module: a stop does not where nothing was clamped, and
// `tsoctl restore`, which knows of nothing, does.
func TestOnlyARestoreLooksForAClampThatNobodyKnows(t *testing.T) {
	for _, restore := range []bool{false, true} {
		w, f := clampWorld(t)
		w.restart(dedicatedOff())
		opened := 0
		w.a.openNFT = func() (clampTable, error) { opened++; return f, nil }
		f.state = clamp.State{There: true, Ours: true, Whole: true}
		if restore {
			w.a.goal, w.a.once = restoreAll, true
		}
		w.start(partPolicy, partSA)
		w.a.goal, w.a.once = restoreAll, true
		for range 10 {
			w.settle()
		}
		if want := map[bool]int{true: 1}[restore]; opened != want || f.state.There == restore {
			t.Errorf("restore %v: opened %d times, left %+v", restore, opened, f.state)
		}
	}
}

func TestClampThatCannotBeWrittenIsTriedAgain(t *testing.T) {
	w, f := clampWorld(t)
	f.err = unix.EOPNOTSUPP
	w.start(partPolicy, partSA)
	wantOps(t, "refused", w.clampOps(), "journal put clamp")
	if fs := strings.Join(w.a.Report().Findings, "\n"); !strings.Contains(fs, "nothing is clamped") {
		t.Errorf("nothing says so: %s", fs)
	}
	w.advance(stuckRetry + time.Second)
	if !f.state.There || len(w.a.Report().Findings) > 0 {
		t.Errorf("not tried again: %+v %q", f.state, w.a.Report().Findings)
	}
	w.putErr = errors.New("no space")
	f.state = clamp.State{}
	w.clampOps()
	f.changed()
	wantOps(t, "without a journal", w.clampOps())
}
