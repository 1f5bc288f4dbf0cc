package agent

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
)

// ownEvents are notifications of n own writes.
func ownEvents(t *testing.T, n int) []routes.Event {
	out := make([]routes.Event, n)
	for i := range out {
		out[i] = routes.RouteSet{Route: newRoute(t, "10.9.0.0/16", hop{oif: 2}), Origin: routes.Origin{Port: ourPort, Seq: uint32(i + 1)}}
	}
	return out
}

// foreignEvents are n changes of a route that somebody else makes.
func foreignEvents(t *testing.T, n int) []routes.Event {
	return slices.Repeat([]routes.Event{routes.RouteSet{Route: newRoute(t, "10.8.0.0/16", hop{oif: 2})}}, n)
}

// wrote is a world whose loop has written n routes of its own, of which the kernel has told at once.
func wrote(t *testing.T, n int) *world {
	w := newWorld(t, Config{})
	results := make([]routes.Result, n)
	for i, ev := range ownEvents(t, n) {
		results[i] = routes.Result{Seq: uint32(i + 1), Events: []routes.Event{ev}}
	}
	w.a.own(results)
	return w
}

// A loop that writes very much is never far ahead of the watcher, whose queue in the kernel is bounded.
func TestWriterWaitsForTheWatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wrote(t, maxUnseen+100)
		went := make(chan struct{})
		go func() {
			w.a.keepUp()
			close(went)
		}()
		synctest.Wait()
		select {
		case <-went:
			t.Fatal("it did not wait")
		default:
		}
		began := time.Now()
		w.a.inbox.put(batch{routes: ownEvents(t, 100)})
		<-went
		if waited := time.Since(began); waited > 0 {
			t.Errorf("it waited for %v", waited)
		}
		taken := w.a.take()
		if len(taken) != 1 || len(taken[0].routes) != 100 || len(w.a.take()) != 0 {
			t.Errorf("what it took is not applied once: %d batches", len(taken))
		}
	})
}

// Writes that change nothing have no notification: that is found out once.
func TestWriterDoesNotWaitForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wrote(t, 2*maxUnseen)
		if waited := writes(w, 10); waited != echoPatience {
			t.Errorf("it waited for %v, want %v", waited, echoPatience)
		}
	})
}

// What has come is not waited for, though it may be long until it is applied.
func TestWriterDoesNotWaitForTheBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 2 * maxUnseen
		w := wrote(t, n)
		w.start()
		w.a.inbox.put(batch{routes: slices.Concat([]routes.Event{routes.ResyncBegin{}}, foreignEvents(t, 2*roundEvents), ownEvents(t, n))})
		w.a.takeEvents()
		if w.a.backlog.empty() {
			t.Fatal("all of it is applied")
		}
		if waited := writes(w, 10); waited > 0 {
			t.Errorf("it waited for %v", waited)
		}
	})
}

// Nor is what can have been among what was lost, of which the loop hears long before it comes to it.
func TestWriterDoesNotWaitForWhatWasLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wrote(t, 2*maxUnseen)
		w.a.inbox.put(batch{routes: []routes.Event{routes.Lost{Err: unix.ENOBUFS}}})
		if waited := writes(w, 10); waited > 0 {
			t.Errorf("it waited for %v", waited)
		}
	})
}

// writes is how long the loop waits in n parts of what it writes.
func writes(w *world, n int) time.Duration {
	began := time.Now()
	for range n {
		w.a.keepUp()
	}
	return time.Since(began)
}

// Of very many writes with one cause the log has the first ones, and how many more there were.
func TestVeryManyWritesAreLoggedAsSuch(t *testing.T) {
	var log bytes.Buffer
	w := tunnelWorld(t, dedicatedOff())
	w.a.log = slog.New(slog.NewTextHandler(&log, nil))
	const more = 50
	for i := range maxOfRound + more - 1 { // and the one that is there
		w.addRoute(fmt.Sprintf("10.2.%d.0/24", i), hop{oif: ipsec1})
	}
	w.queue = nil
	w.start(tunnelPolicy, tunnelSA)
	text := log.String()
	if n := strings.Count(text, `msg="mtu locked" route=`); n != maxOfRound {
		t.Errorf("%d lines, want %d", n, maxOfRound)
	}
	if want := fmt.Sprintf(`msg="mtu locked" more=%d`, more); strings.Count(text, want) != 1 {
		t.Errorf("not once %q in\n%s", want, text)
	}
	if n := w.a.tally.Actions[ActLock][Done]; n != maxOfRound+more {
		t.Errorf("%d are counted", n)
	}
}
