package agent

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

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

// A loop that writes very much is never far ahead of the watcher, whose queue in the kernel is bounded.
func TestWriterWaitsForTheWatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		for i := range maxUnseen + 100 {
			w.a.st.inflight[uint32(i+1)] = struct{}{}
		}
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
		w := newWorld(t, Config{})
		for i := range 2 * maxUnseen {
			w.a.st.inflight[uint32(i+1)] = struct{}{}
		}
		began := time.Now()
		for range 10 {
			w.a.keepUp()
		}
		if waited := time.Since(began); waited != echoPatience {
			t.Errorf("it waited for %v, want %v", waited, echoPatience)
		}
	})
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
