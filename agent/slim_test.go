package agent

import (
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/heap"
	"tsoagent/agent/netns"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// TestMemoryIsGivenBackWhenAStormIsOver, and not while it goes on in rounds each of which is short: it takes time from them, and the agent of a
// table that is going would make way for another one with each quarter that is left.
func TestMemoryIsGivenBackWhenAStormIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t, 10_000, 10)
		var k heap.Keeper
		var given atomic.Int32
		k.Less(func() bool { given.Add(1); return false })
		e.a.heap = &k
		for range 8 {
			e.blow(func() {
				for again := true; again; again = e.next == time.Nanosecond {
					e.step()
					time.Sleep(20 * time.Millisecond)
					synctest.Wait()
				}
			})
			if given.Load() > 0 {
				t.Fatal("given back while it goes on")
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := given.Load(); n != 1 {
			t.Errorf("given back %d times", n)
		}
	})
}

// TestAgentThatHasBecomeStoutIsNotForgotten takes tables away so slowly that memory is given back meanwhile: what goes after that is too little to
// have it given back once more, but it is what makes another agent much smaller.
func TestAgentThatHasBecomeStoutIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t, slimFrom/slimTo+1, 10)
		e.settle()
		var k heap.Keeper
		asked := 0
		k.Less(func() bool { asked++; return false })
		e.a.heap = &k
		e.a.most = slimTo * e.a.st.fib.Len() // a few policies more than a quarter of it are left
		gone := 0
		take := func(n int) {
			for _, p := range e.nets[gone : gone+n] {
				e.a.inbox.post(batch{routes: []routes.Event{routes.RouteGone{Route: routes.Route{Dst: p, Body: e.bodies[0]}, Origin: routes.Origin{Port: ownerPort}}}, at: e.now})
				e.settle()
			}
			gone += n
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		take(1)
		if asked != 0 || e.a.stout.Load() {
			t.Fatalf("asked %d times for a table of which more than a quarter is left", asked)
		}
		take(20)
		if asked != 1 || !e.a.stout.Load() {
			t.Errorf("asked %d times when little was left", asked)
		}
		take(20)
		if asked != 1 {
			t.Errorf("asked %d times for one and the same", asked)
		}
	})
}

// shrunk has a world's agent believe that its tables were large once, and reports whether it would make way for another one.
func (w *world) shrunk() bool {
	w.t.Helper()
	w.a.most = slimFrom
	w.addRoute("198.51.100.0/24", hop{oif: 2, gw: "192.0.2.10"})
	w.settle()
	w.deleteRoute("198.51.100.0/24")
	w.settle()
	return w.a.stout.Load()
}

// TestWhatAnotherAgentWouldNotKnowKeepsThisOne: what is in no journal goes with the agent. That somebody was overruled once is such a thing:
// another one would overrule him again, and again after the next time.
func TestWhatAnotherAgentWouldNotKnowKeepsThisOne(t *testing.T) {
	w := coveredWorld(t)
	if !w.shrunk() {
		t.Fatal("there is nothing of that, and it stays")
	}
	w.turn(ipsec1, tso, true)
	w.settle()
	if w.shrunk() {
		t.Error("somebody was overruled once")
	}
	w.turn(ipsec1, tso, true)
	w.settle()
	if w.shrunk() {
		t.Error("a hold is contested")
	}
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	if w.shrunk() {
		t.Error("a policy lingers")
	}
	w.advance(time.Minute)
	if !w.shrunk() {
		t.Error("all of that is over, and it stays")
	}
}

// TestWhoOnlyLooksRemembersMTUsForTheNextAgent: no journal has what was valid last, and the plan that it shows would lose the lock of a policy whose
// SA is missing just then. Policies that are others by then have nothing of it.
func TestWhoOnlyLooksRemembersMTUsForTheNextAgent(t *testing.T) {
	cfg := dedicatedOff()
	cfg.Mode = Observe
	w := tunnelWorld(t, cfg)
	for _, dst := range []string{"10.4.0.0/16", "10.5.0.0/16", "fd02::/16"} {
		w.addRoute(dst, hop{oif: ipsec1})
	}
	four, six, other := policy(9, "0.0.0.0/0", "10.2.0.0/16", 1), policy(17, "::/0", "fd02::/16", 1), policy(25, "0.0.0.0/0", "10.4.0.0/16", 1)
	w.start(four, six, other, tunnelSA)
	w.xfrm(saGone(tunnelSA))
	w.settle()
	if len(w.a.st.last) != 3 {
		t.Fatalf("it remembers %v", w.a.st.last)
	}
	left := w.a.counts()
	for range 2 { // the first one makes way before it has planned
		w.restart(cfg)
		w.a.goOn(left)
		left = w.a.counts()
	}
	w.start(four, six, policy(25, "0.0.0.0/0", "10.5.0.0/16", 1))
	want := map[xfrmwatch.CoverageID]int{{Policy: 9}: 1446, {Policy: 17}: 1446}
	if d := cmp.Diff(want, w.a.st.last, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("it remembers (-want +got):\n%s", d)
	}
	if len(w.book) > 0 {
		t.Errorf("who only looks has written into the journal: %v", w.ids())
	}
}

// TestSlowLogHoldsNobodyUpWhoAsksMeanwhile: that a state is made anew is said without the lock that all who ask need.
func TestSlowLogHoldsNobodyUpWhoAsksMeanwhile(t *testing.T) {
	f := &Fleet{}
	free := false
	f.log = slog.New(slowLog{slog.NewTextHandler(io.Discard, nil), func(string) {
		if free = f.mu.TryLock(); free {
			f.mu.Unlock()
		}
	}})
	a := newAgent(Config{}, discard(), "test")
	a.stout.Store(true)
	var cause error
	f.members = map[netns.ID]*member{{}: {names: []string{"a"}, agent: a, again: func(err error) { cause = err }}}
	if !f.slim() || !errors.Is(cause, errSlim) {
		t.Errorf("it does not make way: %v", cause)
	}
	if !free {
		t.Error("the lock is held while the log is written")
	}
}
