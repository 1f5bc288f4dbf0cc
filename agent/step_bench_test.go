package agent

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"tsoagent/xfrmwatch"
)

// crowd is a tunnelWorld in which n policies, each with a peer and an SA of its own, cover n routes by ipsec1. Nothing
// of what happens is kept but what the kernel has.
func crowd(b *testing.B, n int) *world {
	b.Helper()
	w := tunnelWorld(b, dedicatedOff())
	w.a.log = slog.New(slog.DiscardHandler)
	items := make([]xfrmwatch.Event, 0, 2*n)
	for i := range n {
		w.addRoute(coveredBy(i).String(), hop{oif: ipsec1})
		p, s := crowdMember(i)
		items = append(items, p, s)
	}
	w.queue = nil
	w.start(items...)
	w.took()
	if len(w.a.st.locks) != n {
		b.Fatalf("%d routes are locked, want %d", len(w.a.st.locks), n)
	}
	return w
}

func numbered(base uint32, i int) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, base+uint32(i))))
}

// coveredBy is the destination of a crowd's policy.
func coveredBy(i int) netip.Prefix { return netip.PrefixFrom(numbered(0x14_00_00_00, i<<4), 28) }

// crowdMember is a policy of a crowd, and its SA.
func crowdMember(i int) (xfrmwatch.PolicySet, xfrmwatch.SASet) {
	p, s := policy(8*i+9, "0.0.0.0/0", coveredBy(i).String(), 1), sa(0x1000+i, 1)
	peer := numbered(0xac_10_00_00, i)
	p.Policy.Templates[0].Dst, p.Policy.Templates[0].Reqid = peer, xfrmwatch.Reqid(i+1)
	s.SA.Dst, s.SA.Key.Dst, s.SA.Reqid = peer, peer, xfrmwatch.Reqid(i+1)
	return p, s
}

// BenchmarkStep shows what a step of the loop costs, from an event until there is nothing more to do, the fake kernel's
// own work included: which of it grows with the number of coverages. The first rounds, which read everything, don't count.
func BenchmarkStep(b *testing.B) {
	for _, n := range []int{10, 1_000, 10_000, 100_000} {
		for _, event := range []struct {
			name string
			do   func(w *world, i int)
			undo func(w *world)
		}{
			{"irrelevant route", func(w *world, i int) {
				w.replaceRoute("198.51.100.0/24", hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 100+i%2)})
			}, nil},
			{"policy added", func(w *world, _ int) {
				p, s := crowdMember(n)
				w.xfrm(s, p)
			}, func(w *world) {
				p, s := crowdMember(n)
				w.xfrm(gone(p), saGone(s))
				w.settle()
				w.advance(5 * time.Second)
			}},
			{"covered route replaced", func(w *world, i int) {
				w.now = w.now.Add(5 * time.Second) // nobody fights
				w.replaceRoute(coveredBy(n/2).String(), hop{oif: ipsec1, gw: fmt.Sprintf("192.0.2.%d", 100+i%2)})
			}, nil},
		} {
			b.Run(fmt.Sprintf("%s/coverages=%d", event.name, n), func(b *testing.B) {
				w := crowd(b, n)
				w.addRoute(coveredBy(n).String(), hop{oif: ipsec1})
				w.addRoute("198.51.100.0/24", hop{oif: 2})
				w.settle()
				w.took()
				rounds := uint64(0)
				b.ReportAllocs()
				b.ResetTimer()
				for i := range b.N {
					before := w.a.stats.Rounds
					event.do(w, i)
					w.settle()
					rounds += w.a.stats.Rounds - before
					if event.undo != nil {
						b.StopTimer()
						event.undo(w)
						b.StartTimer()
					}
					w.ops = w.ops[:0]
				}
				b.ReportMetric(float64(rounds)/float64(b.N), "rounds/op")
			})
		}
	}
}
