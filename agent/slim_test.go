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
