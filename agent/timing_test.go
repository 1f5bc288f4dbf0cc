package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

func TestProtectsAtOnceAndRestoresAfterOneQuietSecond(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start()
	w.quiet("nothing is covered")
	w.xfrm(tunnelPolicy, tunnelSA)
	w.settle()
	w.mustProtect()

	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(999 * time.Millisecond)
	w.mustProtect()
	w.advance(time.Millisecond)
	w.mustBeBare()
	w.took()
	w.advance(time.Hour)
	w.quiet("all is given back")
	if w.next != 0 {
		t.Errorf("the idle loop has a timer of %s", w.next)
	}
}

func TestRestoreAfterIsConfigured(t *testing.T) {
	cfg := dedicatedOff()
	cfg.RestoreAfter = Duration(7 * time.Second)
	w := tunnelWorld(t, cfg)
	w.start(tunnelPolicy, tunnelSA)
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(7*time.Second - 1)
	w.mustProtect()
	w.advance(1)
	w.mustBeBare()
}

// A hold whose route went to another carrier has no policy that lingers.
func TestHoldIsGivenBackAQuietSecondAfterItsRouteMoved(t *testing.T) {
	w := coveredWorld(t)
	other := policy(25, "0.0.0.0/0", "10.2.0.0/16", 2)
	w.xfrm(other, sa(0x101, 2))
	w.settle()
	w.took()
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec2})
	w.settle()
	if got := w.route("10.2.0.0/16"); got != "dev 8 mtu lock 1446" {
		t.Errorf("the route that moved is %q", got)
	}
	if w.held(ipsec2) != allTSO || w.held(ipsec1) != allTSO {
		t.Errorf("off on ipsec1 %q, on ipsec2 %q", w.held(ipsec1), w.held(ipsec2))
	}
	w.advance(999 * time.Millisecond)
	if w.held(ipsec1) != allTSO {
		t.Error("given back before the second was over")
	}
	w.advance(time.Millisecond)
	if got := w.held(ipsec1); got != "" {
		t.Errorf("still off on ipsec1: %q", got)
	}
}

func TestCauseThatComesBackInTimeCostsNothing(t *testing.T) {
	w := coveredWorld(t)
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(900 * time.Millisecond)
	w.xfrm(tunnelPolicy)
	w.settle()
	w.advance(time.Minute)
	w.quiet("the policy was back in time")
	w.mustProtect()
}

// releaseTime is how long after its cause went the hold on ipsec1 is given back.
func (w *world) releaseTime() time.Duration {
	w.t.Helper()
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	began := w.now
	for w.held(ipsec1) != "" {
		if w.next <= 0 {
			w.t.Fatal("held, and no timer")
		}
		w.now = w.now.Add(w.next)
		w.settle()
	}
	return w.now.Sub(began)
}

func (w *world) coverAgain() {
	w.t.Helper()
	w.xfrm(tunnelPolicy)
	w.settle()
	w.mustProtect()
}

func TestFlappingCarrierWaitsLonger(t *testing.T) {
	w := coveredWorld(t)
	var got []time.Duration
	for range 9 {
		got = append(got, w.releaseTime())
		w.advance(100 * time.Millisecond)
		w.coverAgain()
	}
	s := time.Second
	if d := cmp.Diff([]time.Duration{s, 2 * s, 4 * s, 8 * s, 16 * s, 32 * s, 60 * s, 60 * s, 60 * s}, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	w.advance(time.Hour)
	w.releaseTime()
	w.advance(time.Hour)
	w.coverAgain()
	if got := w.releaseTime(); got != s {
		t.Errorf("after an hour of quiet it still takes %s", got)
	}
}

// A carrier that comes and goes once an hour does not flap.
func TestSlowChangesDontAddUp(t *testing.T) {
	w := coveredWorld(t)
	for range 5 {
		w.advance(time.Hour)
		if got := w.releaseTime(); got != time.Second {
			t.Errorf("given back after %s", got)
		}
		w.advance(time.Hour)
		w.coverAgain()
	}
	w.releaseTime()
	w.advance(time.Second)
	w.coverAgain()
	if got := w.releaseTime(); got != 2*time.Second {
		t.Errorf("the first flap makes it wait %s, want 2s", got)
	}
}

func TestPolicyUnderAnotherIndexKeepsTheLock(t *testing.T) {
	again := policy(33, "0.0.0.0/0", "10.2.0.0/16", 1)
	for name, play := range map[string]func(*world){
		"deleted and added in one batch": func(w *world) { w.xfrm(gone(tunnelPolicy), again) },
		"added 900 ms later": func(w *world) {
			w.xfrm(gone(tunnelPolicy))
			w.settle()
			w.advance(900 * time.Millisecond)
			w.xfrm(again)
		},
		"larval for good": func(w *world) { w.xfrm(gone(tunnelPolicy), saGone(tunnelSA), again) },
		"larval, one after the other": func(w *world) {
			w.xfrm(saGone(tunnelSA))
			w.settle()
			w.xfrm(gone(tunnelPolicy))
			w.settle()
			w.advance(500 * time.Millisecond)
			w.xfrm(again)
		},
		"flushed, dumped, larval, then an SA": func(w *world) {
			w.dumpXFRM()
			w.settle()
			w.xfrm(again)
			w.settle()
			w.advance(30 * time.Second)
			w.xfrm(sa(0x300, 1))
		},
		"lost, and replaced while events were lost": func(w *world) {
			w.xfrm(gone(tunnelPolicy), saGone(tunnelSA), xfrmwatch.Lost{Err: errors.New("overrun")})
			w.settle()
			w.advance(5 * time.Second)
			w.dumpXFRM(again)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := coveredWorld(t)
			w.t = t
			play(w)
			w.settle()
			w.advance(time.Hour)
			w.quiet("the policy only got another index")
			w.mustProtect()
		})
	}
}

func TestClonesStayWhileAPolicyIsReplaced(t *testing.T) {
	w := partWorld(t, Config{})
	w.mustLead()
	w.took()
	w.xfrm(gone(partPolicy), saGone(partSA), policy(41, "10.1.0.0/16", "10.3.0.0/16", 0))
	w.settle()
	w.advance(time.Hour)
	w.quiet("the policy only got another index")
	w.mustLead()
}

func TestLastValidMTUStaysWithoutSAs(t *testing.T) {
	w := coveredWorld(t)
	w.xfrm(saGone(tunnelSA))
	w.settle()
	w.advance(24 * time.Hour)
	w.quiet("the SA is gone, the policy stays")
	w.mustProtect()
	c := w.a.Report().Coverages[0]
	if c.MTU != 1446 || len(c.Notes) != 1 || c.Notes[0] != "no valid SA yet; the last valid MTU stays" {
		t.Errorf("verdict %+v", c)
	}
	// The smaller MTU holds while two SAs live, and the right one after.
	w.xfrm(sa(0x101, 1), cbc(0x102, 1))
	w.settle()
	if got := w.route("10.2.0.0/16"); got != "dev 7 mtu lock 1438" {
		t.Errorf("while both live: %q", got)
	}
	w.xfrm(saGone(cbc(0x102, 1)))
	w.settle()
	w.mustProtect()
}

func TestStaleSourceNeverLeadsToARestore(t *testing.T) {
	lost := errors.New("overrun")
	for name, c := range map[string]struct{ play, fresh func(*world) }{
		"policies": {
			func(w *world) { w.xfrm(xfrmwatch.Lost{Err: lost}, gone(tunnelPolicy), saGone(tunnelSA)) },
			func(w *world) { w.dumpXFRM() },
		},
		"the policy went, then events were lost": {
			func(w *world) {
				w.xfrm(gone(tunnelPolicy))
				w.settle()
				w.advance(500 * time.Millisecond)
				w.xfrm(xfrmwatch.Lost{Err: lost})
			},
			func(w *world) { w.dumpXFRM() },
		},
		"routes": {
			func(w *world) {
				w.queue = append(w.queue, batch{routes: []routes.Event{routes.Lost{Err: lost}}})
				w.xfrm(gone(tunnelPolicy))
			},
			func(w *world) { w.queue = append(w.queue, batch{routes: w.dumpRoutes()}) },
		},
		"policies while the features are stale, too": {
			func(w *world) {
				w.features(ethtool.Lost{Err: lost})
				w.xfrm(xfrmwatch.Lost{Err: lost}, gone(tunnelPolicy))
			},
			func(w *world) { w.features(w.dumpFeatures()...); w.dumpXFRM() },
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := coveredWorld(t)
			w.t = t
			c.play(w)
			w.settle()
			w.advance(time.Hour)
			w.quiet("stale for an hour")
			w.mustProtect()
			if len(w.a.Report().Stale) == 0 {
				t.Error("the report doesn't say that a source is stale")
			}
			c.fresh(w)
			w.settle()
			w.advance(10 * time.Second)
			w.mustBeBare()
		})
	}
}

// A loop that wakes up every millisecond while a dump takes its time would take the processor
// from it.
func TestStaleSourceDoesNotMakeTheLoopSpin(t *testing.T) {
	w := coveredWorld(t)
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.xfrm(xfrmwatch.Lost{Err: errors.New("overrun")})
	w.settle()
	before := w.a.stats.Rounds
	w.advance(time.Minute)
	if n := w.a.stats.Rounds - before; n > 100 {
		t.Errorf("%d rounds in a minute without an event", n)
	}
}
