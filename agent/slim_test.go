package agent

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tsoagent/agent/heap"
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
