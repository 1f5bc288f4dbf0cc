package heap

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestKeeperWaitsForQuiet counts how often memory is given back.
func TestKeeperWaitsForQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		freed := 0
		k := Keeper{free: func() { freed++ }}
		want := func(n int, when string) {
			t.Helper()
			synctest.Wait()
			if freed != n {
				t.Errorf("%s: given back %d times, want %d", when, freed, n)
			}
		}
		for range large - 1 {
			k.Did(1)
		}
		time.Sleep(time.Hour)
		want(0, "after little work")
		k.Did(1)
		time.Sleep(quiet)
		want(1, "after much work")
		time.Sleep(time.Hour)
		want(1, "after an hour without work")
		for range 100 {
			k.Did(large)
			time.Sleep(quiet / 2)
		}
		want(1, "while it goes on")
		for range 1000 {
			k.Did(large / 100)
			time.Sleep(quiet / 100)
		}
		want(1, "while it goes on in small parts")
		for range 10 {
			k.Did(1)
			time.Sleep(quiet / 4)
		}
		want(2, "when but little goes on")
		k.Settled()
		want(2, "when nothing was to be over")
		k.Did(large)
		k.Settled()
		want(3, "when that is over")
		time.Sleep(time.Hour)
		want(3, "in the hour after")
	})
}
