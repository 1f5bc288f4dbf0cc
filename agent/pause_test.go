package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/api"
	"tsoagent/ethtool"
	"tsoagent/xfrmwatch"
)

// tell has the loop pause, or go on with nil, and returns what it answers.
func (w *world) tell(p *api.Paused) *api.Paused {
	w.t.Helper()
	answer := make(chan *api.Paused, 1)
	w.a.halt.Store(p != nil)
	w.a.inbox.post(batch{orders: []order{{paused: p, answer: answer}}})
	w.settle()
	select {
	case now := <-answer:
		return now
	default:
		w.t.Fatal("the loop does not answer")
		return nil
	}
}

var byRoot = api.Peer{PID: 4711, Process: "tsoctl"}

func TestPausedWritesNothing(t *testing.T) {
	lanes := func(t *testing.T) *world {
		w, _ := laneWorld(t, laneConfig())
		w.start(partPolicy, partSA)
		return w
	}
	clamps := func(t *testing.T) *world {
		w, _ := clampWorld(t)
		w.start(partPolicy, partSA)
		return w
	}
	mtus := func(t *testing.T) *world {
		w, _ := mtuWorld(t)
		w.start(tunnelPolicy, tunnelSA)
		return w
	}
	for name, c := range map[string]struct {
		world func(*testing.T) *world
		was   xfrmwatch.PolicySet
	}{
		"holds and locks":  {coveredWorld, tunnelPolicy},
		"rules and clones": {func(t *testing.T) *world { return partWorld(t, Config{}) }, partPolicy},
		"lanes":            {lanes, partPolicy},
		"clamps":           {clamps, partPolicy},
		"device mtus":      {mtus, tunnelPolicy},
	} {
		t.Run(name, func(t *testing.T) {
			w := c.world(t)
			w.settle()
			w.advance(time.Minute)
			if len(w.took()) == 0 && name != "holds and locks" {
				t.Fatal("nothing is written in this world")
			}
			if now := w.tell(&api.Paused{By: byRoot}); now == nil || !now.Since.Equal(w.now) || now.By != byRoot {
				t.Errorf("the answer is %+v", now)
			}
			w.quiet("pausing")
			w.xfrm(gone(c.was))
			w.settle()
			w.advance(time.Hour)
			w.xfrm(policy(97, "0.0.0.0/0", "10.2.0.0/16", 1), policy(105, "10.1.0.0/16", "10.3.0.0/16", 0))
			if w.kernel.Link(ipsec1) != nil {
				w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1})
			}
			w.settle()
			w.advance(time.Hour)
			w.xfrm(gone(policy(97, "0.0.0.0/0", "10.2.0.0/16", 1)), gone(policy(105, "10.1.0.0/16", "10.3.0.0/16", 0)))
			w.settle()
			w.advance(time.Hour)
			w.quiet("paused")
			r := w.a.Report()
			if r.Paused == nil || !r.Degraded() || r.Mode != Enforce {
				t.Errorf("the report says paused %+v, degraded %v, mode %s", r.Paused, r.Degraded(), r.Mode)
			}
			if now := w.tell(nil); now != nil {
				t.Errorf("after the end it is paused: %+v", now)
			}
			w.advance(time.Minute)
			if w.a.Report().Paused != nil || len(w.tookButMTUs()) == 0 {
				t.Error("what is needed no more is not given back after the pause")
			}
			if left := slices.DeleteFunc(w.ids(), func(id string) bool { return id == "tables" }); len(left) > 0 || w.ownRules() != "" {
				t.Errorf("still ours: %v, %s", left, w.ownRules())
			}
		})
	}
}

func TestPausedSaysWhatItWouldDo(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start()
	w.tell(&api.Paused{By: byRoot})
	w.took()
	w.xfrm(tunnelPolicy, tunnelSA, partPolicy, partSA)
	w.settle()
	w.quiet("paused")
	r := w.a.Report()
	states := map[string]int{}
	for _, h := range r.Holds {
		states["hold "+h.State]++
	}
	for _, l := range r.Locks {
		states["lock "+l.State]++
	}
	for _, x := range r.Rules {
		states["rule "+x.State]++
	}
	for _, x := range r.Clones {
		states["clone "+x.State]++
	}
	if r.Paused.Waiting < 6 || r.Paused.Left != 0 {
		t.Errorf("paused %+v", r.Paused)
	}
	if len(states) != 4 || states["hold wanted"] != 3 || states["lock wanted"] != 1 || states["rule wanted"] == 0 || states["clone wanted"] != 1 {
		t.Errorf("states %v", states)
	}
	w.tell(nil)
	w.mustProtect()
	w.mustLead()
}

func TestPauseThatRestoresGivesEverythingBackFirst(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
	w.mustProtect()
	w.mustLead()
	now := w.tell(&api.Paused{By: byRoot, Restore: true})
	if now == nil || !now.Restore || now.Left != 0 {
		t.Errorf("the answer is %+v", now)
	}
	if got := w.route("10.2.0.0/16") + w.held(ipsec1) + w.ownRules() + w.table(5450); got != "dev 7" {
		t.Errorf("still there: %q", got)
	}
	w.took()
	w.xfrm(gone(tunnelPolicy), tunnelPolicy, cbc(0x300, 1))
	w.advance(time.Hour)
	w.quiet("paused")
	if r := w.a.Report(); len(r.Coverages) != 2 || r.Paused == nil || r.Holds[0].State != StateWanted {
		t.Errorf("report: %+v, %+v, %+v", r.Coverages, r.Paused, r.Holds)
	}
	w.tell(nil)
	if got := w.route("10.2.0.0/16"); got != "dev 7 mtu lock 1438" {
		t.Errorf("after the pause the route is %q", got)
	}
	w.mustLead()
	if !slices.Contains(w.ids(), "tables") {
		t.Errorf("the journal has %v", w.ids())
	}
}

// A policy that goes right before the end is not protected anew for the time that it lingers.
func TestResumeProtectsNothingThatIsGone(t *testing.T) {
	w := coveredWorld(t)
	w.tell(&api.Paused{By: byRoot, Restore: true})
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.took()
	w.tell(nil)
	w.quiet("resumed")
	if len(w.a.st.last) > 0 || slices.ContainsFunc(w.ids(), func(id string) bool { return strings.HasPrefix(id, "mtu/") }) {
		t.Errorf("of the policy it is remembered %v, %v", w.a.st.last, w.ids())
	}
}

// A pause without restore stops one that is giving back.
func TestPauseStopsOneThatRestores(t *testing.T) {
	w := coveredWorld(t)
	w.replaceErr = unix.ENETDOWN // the lock can't be given back
	w.a.inbox.post(batch{orders: []order{{paused: &api.Paused{Restore: true}, answer: make(chan *api.Paused, 1)}}})
	w.step()
	w.step()
	if r := w.a.Report(); r.Paused == nil || r.Paused.Left == 0 {
		t.Fatalf("nothing is left to give back: %+v", r.Paused)
	}
	w.tell(&api.Paused{By: byRoot})
	w.took()
	rounds := w.a.stats.Rounds
	w.advance(time.Hour)
	w.quiet("paused")
	if n := w.a.stats.Rounds - rounds; n > 1 { // the clock of the test is one
		t.Errorf("%d rounds in an hour in which nothing happens", n)
	}
	if w.a.Report().Paused.Left != 0 {
		t.Errorf("paused %+v", w.a.Report().Paused)
	}
}

func TestPauseEndsByItself(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start()
	w.tell(&api.Paused{By: byRoot, Until: w.now.Add(10 * time.Minute)})
	w.xfrm(tunnelPolicy, tunnelSA)
	w.advance(9 * time.Minute)
	if w.a.Report().Paused == nil || w.held(ipsec1) != "" {
		t.Errorf("after 9 of 10 minutes: %+v, %q", w.a.Report().Paused, w.held(ipsec1))
	}
	w.advance(time.Minute)
	if w.a.Report().Paused != nil {
		t.Error("still paused after 10 minutes")
	}
	w.mustProtect()
}

// Another pause counts from the first, and replaces what it said.
func TestPausesDoNotAddUp(t *testing.T) {
	w := coveredWorld(t)
	first := w.tell(&api.Paused{By: byRoot})
	w.advance(time.Minute)
	until := w.now.Add(time.Minute)
	now := w.tell(&api.Paused{By: api.Peer{PID: 1}, Until: until})
	if !now.Since.Equal(first.Since) || now.By.PID != 1 || !now.Until.Equal(until) {
		t.Errorf("paused %+v", now)
	}
	for range 2 {
		if w.tell(nil) != nil {
			t.Error("still paused")
		}
	}
}

// What somebody does to a held feature in a pause is not held against him.
func TestFeatureThatWasTurnedOnInAPauseIsHeldAgain(t *testing.T) {
	w := coveredWorld(t)
	for range 3 {
		w.tell(&api.Paused{By: byRoot})
		w.turn(ipsec1, ethtool.TCPSegmentation, true)
		w.settle()
		w.advance(time.Minute)
		if got := w.held(ipsec1); strings.Contains(got, "tx-tcp-segmentation") {
			t.Fatalf("off in the pause: %q", got)
		}
		w.tell(nil)
		w.mustProtect()
	}
	if h := w.hold(ethtool.TCPSegmentation); h.State != StateInPlace {
		t.Errorf("the hold is %+v", h)
	}
}

// The loop stops between two parts of very many writes, and what it has not written is not in the journal either.
func TestPauseStopsARound(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.addRoute("10.4.0.0/16", hop{oif: ipsec1})
	for i := range writesAtOnce {
		w.addRoute(fmt.Sprintf("10.%d.%d.0/24", 16+i/256, i%256), hop{oif: ipsec1})
	}
	w.queue = nil
	w.start()
	w.beforeEcho = func() { w.a.halt.Store(true) }
	w.xfrm(policy(9, "0.0.0.0/0", "10.0.0.0/8", 1), tunnelSA)
	w.step()
	locked := 0
	for _, op := range w.took() {
		if strings.HasPrefix(op, "replace ") {
			locked++
		}
		if strings.HasPrefix(op, "set ") {
			t.Errorf("held after the halt: %s", op)
		}
	}
	if locked != writesAtOnce {
		t.Errorf("%d routes are locked, want %d", locked, writesAtOnce)
	}
	if ids := slices.DeleteFunc(w.ids(), func(id string) bool { return !strings.HasPrefix(id, "route/") }); len(ids) != writesAtOnce {
		t.Errorf("the journal has %d locks", len(ids))
	}
	w.tell(&api.Paused{By: byRoot})
	w.took()
	w.advance(time.Minute)
	w.quiet("paused")
	w.tell(nil)
	if a, b := w.route("10.2.0.0/16"), w.route("10.4.0.0/16"); a != "dev 7 mtu lock 1446" || b != a || w.held(ipsec1) != allTSO {
		t.Errorf("after the pause: %q, %q, %q", a, b, w.held(ipsec1))
	}
}

// Nor does it go on with the features of another device.
func TestPauseStopsARoundBetweenDevices(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.addRoute("10.4.0.0/16", hop{oif: ipsec2})
	w.queue = nil
	w.start()
	w.beforeSet = func() { w.a.halt.Store(true) }
	w.xfrm(policy(9, "0.0.0.0/0", "10.4.0.0/16", 2), policy(17, "0.0.0.0/0", "10.2.0.0/16", 1))
	w.step()
	if a, b := w.held(ipsec1), w.held(ipsec2); (a == "") == (b == "") {
		t.Errorf("off on ipsec1: %q, on ipsec2: %q", a, b)
	}
	w.tell(&api.Paused{By: byRoot})
	w.took()
	w.advance(time.Minute)
	w.quiet("paused")
	w.tell(nil)
	if a, b := w.held(ipsec1), w.held(ipsec2); a != allTSO || b != allTSO {
		t.Errorf("after the pause off on ipsec1: %q, on ipsec2: %q", a, b)
	}
}

// What a write under way has overwritten is mended before the answer, and nothing is written after it.
func TestPauseMendsWhatAWriteHasOverwritten(t *testing.T) {
	w := raceWorld(t)
	answer := make(chan *api.Paused, 1)
	w.beforeEcho = func() {
		w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1, gw: "192.0.2.11"})
		w.a.inbox.post(batch{orders: []order{{paused: &api.Paused{By: byRoot}, answer: answer}}})
	}
	w.xfrm(tunnelPolicy, tunnelSA)
	w.step()
	if len(answer) > 0 {
		t.Error("answered while a write is under way")
	}
	w.settle()
	if len(answer) != 1 || w.a.stats.Repairs != 1 || !strings.HasPrefix(w.route("10.2.0.0/16"), "via 192.0.2.11 ") {
		t.Errorf("answers %d, repairs %d, route %q", len(answer), w.a.stats.Repairs, w.route("10.2.0.0/16"))
	}
	w.took()
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1, gw: "192.0.2.12"})
	w.advance(time.Minute)
	w.quiet("paused")
}

func TestPauseBeforeAnythingIsKnown(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	if w.tell(&api.Paused{By: byRoot}) == nil {
		t.Error("not paused")
	}
	w.start(tunnelPolicy, tunnelSA)
	w.advance(time.Minute)
	w.quiet("paused")
	w.tell(nil)
	w.mustProtect()
}

// A stop does what on_stop says, paused or not.
func TestStopEndsAPause(t *testing.T) {
	for _, restore := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := tunnelWorld(t, dedicatedOff())
			stop := w.runLoop()
			w.read(tunnelPolicy, tunnelSA)
			w.mustProtect()
			if _, err := w.a.order(t.Context(), &api.Paused{By: byRoot, Restore: restore}); err != nil {
				t.Fatal(err)
			}
			if got := w.held(ipsec1); (got == "") != restore {
				t.Errorf("paused, restore %v: %q", restore, got)
			}
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			w.mustBeBare()
		})
	}
}

// One that is told something while it stops goes on to give back, and says nothing: what it would say is over when it is heard.
func TestWhoStopsTakesNoOrders(t *testing.T) {
	for _, p := range []*api.Paused{{By: byRoot}, {By: byRoot, Restore: true}, nil} {
		w := coveredWorld(t)
		w.a.goal, w.a.once = restoreAll, true
		answer := w.a.give(p)
		w.settle()
		if len(answer) > 0 {
			t.Errorf("told %+v it answers %+v", p, <-answer)
		}
		w.mustBeBare()
	}
}

// A stop overtakes a pause that waits until everything is given back. Who waits does not hear that all is well.
func TestStopIsNoAnswerToAPauseThatRestores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, dedicatedOff())
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA)
		w.replaceErr = unix.ENETDOWN // the lock can't be given back
		said := make(chan error, 1)
		go func() {
			now, err := w.a.order(t.Context(), &api.Paused{By: byRoot, Restore: true})
			if err == nil {
				t.Errorf("it says %+v", now)
			}
			said <- err
		}()
		synctest.Wait()
		if err := stop(); err == nil || !strings.Contains(err.Error(), "10.2.0.0/16") {
			t.Errorf("the stop: %v", err)
		}
		if err := <-said; !errors.Is(err, errEndedAgent) {
			t.Errorf("who waits hears %v", err)
		}
	})
}

// In observe mode there is nothing to stop, and nothing to give back.
func TestPauseOfOneWhoObserves(t *testing.T) {
	cfg := dedicatedOff()
	cfg.Mode = Observe
	w := tunnelWorld(t, cfg)
	w.start(tunnelPolicy, tunnelSA)
	if now := w.tell(&api.Paused{By: byRoot, Restore: true}); now == nil || now.Left != 0 {
		t.Errorf("paused %+v", now)
	}
	w.quiet("observing")
	if w.tell(nil) != nil {
		t.Error("still paused")
	}
}
