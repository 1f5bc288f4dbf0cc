package agent

import (
	"sync/atomic"
	"testing"
	"testing/synctest"

	"tsoagent/xfrmwatch"
)

func TestInboxKeepsTheOrderAndHoldsBackWhenFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		in.put(batch{})
		if len(in.signal) > 0 || len(in.take()) > 0 {
			t.Error("an empty batch was kept")
		}
		in.put(batch{xfrm: make([]xfrmwatch.Event, maxPending)})
		var second atomic.Bool
		go func() {
			in.put(batch{xfrm: make([]xfrmwatch.Event, 2)})
			second.Store(true)
		}()
		synctest.Wait()
		if second.Load() {
			t.Error("a full inbox took more")
		}
		if got := in.take(); len(got) != 1 || got[0].len() != maxPending {
			t.Errorf("%d batches", len(got))
		}
		synctest.Wait()
		if got := in.take(); !second.Load() || len(got) != 1 || got[0].len() != 2 {
			t.Errorf("the watcher that waited went on: %v, %d batches", second.Load(), len(got))
		}
		if len(in.signal) != 1 {
			t.Error("no signal")
		}
	})
}

func TestInboxThatIsClosedHoldsNobodyBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		full := batch{xfrm: make([]xfrmwatch.Event, maxPending)}
		in.put(full)
		done := make(chan struct{})
		go func() { in.put(full); in.put(full); close(done) }()
		synctest.Wait()
		in.close()
		<-done
	})
}
