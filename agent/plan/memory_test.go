package plan

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// BenchmarkMemory measures what a policy costs in memory, in bytes, that is still in use when its plan is made and
// there is nothing to do: in the mirror of policies, and in the plan. The world is that of the benchmark (e2e/bench):
// most policies' nets are behind the default route, and each has a peer of its own.
func BenchmarkMemory(b *testing.B) {
	for _, sas := range []bool{false, true} {
		n := 20000
		b.Run(fmt.Sprintf("sas=%v", sas), func(b *testing.B) {
			if testing.Short() {
				b.Skip("large")
			}
			for b.Loop() {
				before := inUse()
				f, err := newFollowed(customers(n, sas))
				if err != nil {
					b.Fatal(err)
				}
				f.history, f.text = nil, ""
				mirror := inUse()
				in := f.input()
				peers := inUse()
				f.Plan(in, f.changes)
				f.Steps(in, f.held)
				made := inUse()
				b.ReportMetric(float64(mirror-before)/float64(n), "mirror-B/policy")
				b.ReportMetric(float64(peers-mirror)/float64(n), "paths-B/policy")
				b.ReportMetric(float64(made-peers)/float64(n), "plan-B/policy")
				runtime.KeepAlive(f)
			}
		})
	}
}

// customers is that world with n policies, with an SA for each or without.
func customers(n int, sas bool) string {
	var text strings.Builder
	text.WriteString("config max_clones 200000\nconfig presume_mtu 1400\nlink 1 lo\nlink 2 eth0\n" +
		"route 192.0.2.0/24 dev eth0 proto kernel\nroute 0.0.0.0/0 via 192.0.2.9 dev eth0\nroute ::/0 via 2001:db8::9 dev eth0\n")
	for i := range n {
		src := fmt.Sprintf("172.%d.0.0/16", 16+i/10%2)
		dst := fmt.Sprintf("10.%d.%d.%d/25", i>>9, i>>1&255, i&1<<7)
		switch i % 10 {
		case 3, 7:
			dst = fmt.Sprintf("%d.%d.%d.0/24", 11+i>>16, i>>8&255, i&255)
			fmt.Fprintf(&text, "route %s via 192.0.2.9 dev eth0\n", dst)
		case 9:
			src, dst = fmt.Sprintf("fd%d::/32", 16+i/10%2), fmt.Sprintf("fd10:%x:%x::/48", i>>16, i&0xffff)
		}
		peer := fmt.Sprintf("%d.%d.%d.1", 20+i>>16, i>>8&255, i&255)
		fmt.Fprintf(&text, "policy %d src %s dst %s tmpl esp tunnel 192.0.2.1 %s reqid %[1]d\n", i+1, src, dst, peer)
		if sas {
			fmt.Fprintf(&text, "sa esp 192.0.2.1 %s spi %d reqid %[2]d gcm\n", peer, i+1)
		}
	}
	return text.String()
}

// inUse is how much memory is in use, in bytes.
func inUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what had finalizers
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestKeptPlanTakesItsVerdictsAlong keeps a plan, as a report does: what it says in words must not stay with the plan that
// is followed.
func TestKeptPlanTakesItsVerdictsAlong(t *testing.T) {
	f, err := newFollowed(customers(10, true))
	if err != nil {
		t.Fatal(err)
	}
	pl := f.Plan(f.input(), f.changes)
	if kept := pl.Keep(); len(kept.Verdicts) != 10 {
		t.Errorf("%d verdicts are kept, want 10", len(kept.Verdicts))
	}
	if pl.Verdicts != nil || len(pl.Complete().Verdicts) != 10 {
		t.Errorf("%d verdicts stayed with the plan", len(pl.Verdicts))
	}
}
