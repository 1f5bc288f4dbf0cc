package agent

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tsoagent/agent/api"
)

// deaf is who doesn't read his answer, until he is let go.
type deaf struct {
	*recorder
	writes chan<- struct{}
	free   <-chan struct{}
}

// Write waits.
func (d *deaf) Write(b []byte) (int, error) {
	d.writes <- struct{}{}
	<-d.free
	return len(b), nil
}

// TestDeafClientsDontFillTheMemory: an answer is in memory until it is read, and can have tens of megabytes.
func TestDeafClientsDontFillTheMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, dedicatedOff())
		w.start(tunnelPolicy, tunnelSA)
		h := handler(w.a, nil)
		writes, free := make(chan struct{}, 100), make(chan struct{})
		codes := make(chan int, 100)
		ask := func(uid uint32, path string) {
			r := newRequest(t, http.MethodGet, path)
			r = r.WithContext(context.WithValue(r.Context(), peerKey{}, &unix.Ucred{Uid: uid}))
			go func() {
				d := &deaf{newRecorder(), writes, free}
				h.ServeHTTP(d, r)
				codes <- d.code
			}()
		}
		for i := range 10 {
			ask(1000+uint32(i), []string{"/v1/report", "/v1/locks", "/v1/events"}[i%3])
		}
		synctest.Wait()
		if len(writes) != maxAnswers {
			t.Errorf("%d answers are written at a time, want %d", len(writes), maxAnswers)
		}
		ask(0, "/v1/report")
		synctest.Wait()
		if len(writes) != maxAnswers+1 {
			t.Error("root waits for others")
		}
		time.Sleep(answerPatience)
		synctest.Wait()
		close(free)
		got := map[int]int{}
		for range 11 {
			got[<-codes]++
		}
		if d := cmp.Diff(map[int]int{http.StatusOK: maxAnswers + 1, http.StatusServiceUnavailable: 10 - maxAnswers}, got); d != "" {
			t.Errorf("statuses (-want +got):\n%s", d)
		}
	})
}

// TestHeadOfEventsEnds: nothing would ever be sent to who asks for the head of what happens.
func TestHeadOfEventsEnds(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for range 3 { // over one connection, as the next one shows that the one before it is done
		res, err := c.Do(newRequest(t, http.MethodHead, "/v1/events?follow=true").WithContext(ctx))
		if err != nil {
			t.Fatal(err)
		}
		if _ = res.Body.Close(); res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != api.NDJSON {
			t.Errorf("%s, %s", res.Status, res.Header.Get("Content-Type"))
		}
	}
}

// TestOthersKeepNoTurnFromRoot: whoever may ask can take all the turns that there are for him and his like, and no more.
func TestOthersKeepNoTurnFromRoot(t *testing.T) {
	turns := newTurns(2)
	by := func(uid uint32) *http.Request {
		r := newRequest(t, http.MethodGet, "/v1/events")
		return r.WithContext(context.WithValue(r.Context(), peerKey{}, &unix.Ucred{Uid: uid}))
	}
	first := turns.take(by(1000))
	if first == nil || turns.take(by(1001)) == nil || turns.take(by(1000)) != nil || turns.take(newRequest(t, http.MethodGet, "/")) != nil {
		t.Error("others have not two turns")
	}
	for i := range 3 {
		if got := turns.take(by(0)) != nil; got != (i < 2) {
			t.Errorf("root's turn %d: %v", i+1, got)
		}
	}
	if first(); turns.take(by(1001)) == nil {
		t.Error("no turn after one was given back")
	}
}
