package xfrmwatch

import (
	"context"
	"os/exec"
	"slices"
	"testing"
	"time"
)

// BenchmarkColdDump compares a Watcher's first dump of 100,000 policies into a DB, put in order,
// with `ip xfrm policy show`. The ratio is ours by theirs.
func BenchmarkColdDump(b *testing.B) {
	newNetns(b)
	r := newRequester(b)
	for i := range 100_000 {
		r.addPolicy(tunnelPolicy(i, IPv4))
	}
	var ours, theirs time.Duration
	b.ReportAllocs()
	for b.Loop() {
		began := time.Now()
		w, err := Dial(Options{})
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		db := NewDB()
		_ = w.Run(ctx, func(events []Event) {
			for _, ev := range events {
				db.Apply(ev)
			}
			if slices.Contains(events, Event(ResyncEnd{})) {
				cancel()
			}
		})
		n := 0
		for range db.Policies() {
			n++
		}
		ours += time.Since(began)
		if n != 100_000 {
			b.Fatalf("%d policies", n)
		}
		b.StopTimer()
		began = time.Now()
		if err := exec.Command("ip", "xfrm", "policy", "show").Run(); err != nil {
			b.Fatal(err)
		}
		theirs += time.Since(began)
		b.StartTimer()
	}
	b.ReportMetric(ours.Seconds()/float64(b.N), "s/ours")
	b.ReportMetric(theirs.Seconds()/float64(b.N), "s/ip")
	b.ReportMetric(ours.Seconds()/theirs.Seconds(), "ratio")
}
