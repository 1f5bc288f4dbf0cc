package clamp

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestOverrunIsAChange has the kernel drop notifications of others' tables while the watcher waits, which nothing else tells: what was dropped may
// have been about ours.
func TestOverrunIsAChange(t *testing.T) {
	tb := newNS(t)
	w, err := Watch()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.c.SetReadBuffer(1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	calls, goOn := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func() {
			calls <- struct{}{}
			<-goOn
		})
	}()
	next := func(what string) {
		t.Helper()
		select {
		case <-calls:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s is not told", what)
		}
	}
	mustWrite(t, tb, both(t))
	next("our own change")
	var storm strings.Builder
	for i := range 500 {
		fmt.Fprintf(&storm, "add table inet other%d; ", i)
	}
	nft(t, storm.String())
	close(goOn)
	next("the overrun")
	cancel()
	go func() {
		for range calls { // whatever else it tells
		}
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
	close(calls)
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}
