package agent

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// BenchmarkGrowth shows how the cost of an event, from when it comes until there is nothing more to do, grows with the number of coverages
// and with that of routes that nobody covers. `make growth` draws it (docs/planning.md). The fake kernel's own work counts, too.
func BenchmarkGrowth(b *testing.B) {
	const few = 10
	for n := few; n <= 100_000; n *= 10 {
		for _, event := range growthEvents {
			b.Run(fmt.Sprintf("event=%s/coverages=%d", event.name, n), func(b *testing.B) { growth(b, n, 0, event.do) })
		}
	}
	for n := few; n <= 1_000_000; n *= 10 {
		for _, event := range growthEvents {
			b.Run(fmt.Sprintf("event=%s/routes=%d", event.name, n), func(b *testing.B) { growth(b, few, n, event.do) })
		}
	}
}

var growthEvents = []struct {
	name string
	do   func(w *world, coverages, i int)
}{
	{"route", func(w *world, _, i int) {
		w.replaceRoute("198.51.100.0/24", hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 100+i%2)})
	}},
	{"covered-route", func(w *world, coverages, i int) {
		w.now = w.now.Add(5 * time.Second) // nobody fights
		w.replaceRoute(coveredBy(coverages/2).String(), hop{oif: ipsec1, gw: fmt.Sprintf("192.0.2.%d", 100+i%2)})
	}},
	{"policy", func(w *world, coverages, i int) {
		p, s := crowdMember(coverages)
		if i%2 == 0 {
			w.xfrm(s, p)
		} else {
			w.xfrm(gone(p), saGone(s))
			w.now = w.now.Add(5 * time.Second) // past restore_after
		}
	}},
}

func growth(b *testing.B, coverages, others int, do func(w *world, coverages, i int)) {
	b.Helper()
	w := crowd(b, coverages)
	w.addRoute(coveredBy(coverages).String(), hop{oif: ipsec1})
	w.addRoute("198.51.100.0/24", hop{oif: 2})
	for i := range others {
		w.addRoute(netip.PrefixFrom(numbered(0x40_00_00_00, i<<8), 24).String(), hop{oif: 2, gw: "192.0.2.9"})
		if i%50_000 == 0 { // a round takes a part of a storm
			w.settle()
		}
	}
	w.settle()
	w.took()
	if w.a.st.fib.Len() < coverages+others {
		b.Fatalf("%d routes", w.a.st.fib.Len())
	}
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		do(w, coverages, i)
		w.settle()
		w.ops = w.ops[:0]
	}
}
