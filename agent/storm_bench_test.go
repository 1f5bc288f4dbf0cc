package agent

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// edge is a provider's edge: a table of routes, and customers behind it. Of ten customers seven have a net that only the default route leads
// to, and three one of the table's; each has a router of its own somewhere in the table.
type edge struct {
	*world
	nets     []netip.Prefix
	bodies   [2]*routes.Body // by one gateway, and by another one
	moved    int             // which of them the routes have
	policies int
}

func newEdge(b testing.TB, routesN, policies int) *edge {
	b.Helper()
	var cfg Config
	cfg.Plan.MaxClones, cfg.Plan.PresumeMTU = 1<<20, 1400
	e := &edge{world: newWorld(b, cfg), policies: policies}
	e.a.log = slog.New(slog.DiscardHandler)
	r := rand.New(rand.NewPCG(5450, 84))
	seen := map[netip.Prefix]bool{}
	for len(e.nets) < routesN {
		bits := 24
		if r.IntN(10) > 5 {
			bits = 16 + r.IntN(8)
		}
		a := numbered(0x20_00_00_00, r.IntN(1<<30))
		if p, _ := a.Prefix(bits); !seen[p] {
			seen[p] = true
			e.nets = append(e.nets, p)
		}
	}
	for i, gw := range []string{"192.0.2.101", "192.0.2.102"} {
		e.bodies[i] = newRoute(b, "198.51.100.0/24", hop{oif: 2, gw: gw}).Body
	}
	for _, p := range e.nets {
		e.kernel.Apply(routes.RouteSet{Route: routes.Route{Dst: p, Body: e.bodies[0]}})
	}
	var items []xfrmwatch.Event
	for i := range policies {
		dst := netip.PrefixFrom(numbered(0x0a_80_00_00, i<<6), 26)
		if i%10 > 6 {
			dst = e.nets[i%len(e.nets)]
		}
		p := policy(8*i+9, "10.1.0.0/16", dst.String(), 0)
		p.Policy.Templates[0].Dst = e.nets[i%len(e.nets)].Addr().Next()
		p.Policy.Templates[0].Reqid = xfrmwatch.Reqid(i + 1)
		items = append(items, p)
	}
	e.start(items...)
	return e
}

// blow is each route replaced once, as a watcher would tell it. The kernel's own copy is not changed.
func (e *edge) blow(fn func()) {
	e.moved = 1 - e.moved
	for i := 0; i < len(e.nets); {
		var ev []routes.Event
		for ; i < len(e.nets) && len(ev) < 500; i++ {
			ev = append(ev, routes.RouteSet{Route: routes.Route{Dst: e.nets[i], Body: e.bodies[e.moved]}, Replace: true, Origin: routes.Origin{Port: ownerPort, Seq: uint32(i)}})
		}
		e.a.inbox.post(batch{routes: ev, at: e.now})
		fn()
	}
}

// BenchmarkStorm has each route replaced once: what a route's event costs the loop.
func BenchmarkStorm(b *testing.B) {
	for _, size := range []struct{ routes, policies int }{{100_000, 0}, {100_000, 1000}, {100_000, 10_000}} {
		b.Run(fmt.Sprintf("routes=%d/policies=%d", size.routes, size.policies), func(b *testing.B) {
			e := newEdge(b, size.routes, size.policies)
			b.ReportAllocs()
			b.ResetTimer()
			var worst time.Duration
			for range b.N {
				e.blow(func() {
					began := time.Now()
					e.settle()
					worst = max(worst, time.Since(began))
				})
				e.ops = e.ops[:0]
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*size.routes), "ns/event")
			b.ReportMetric(worst.Seconds()*1000, "worst-ms")
		})
	}
}

// BenchmarkDefaultRoute has the default route replaced, which most policies are under.
func BenchmarkDefaultRoute(b *testing.B) {
	for _, policies := range []int{1000, 10_000} {
		b.Run(fmt.Sprintf("policies=%d", policies), func(b *testing.B) {
			e := newEdge(b, 10_000, policies)
			b.ReportAllocs()
			b.ResetTimer()
			before, worst := e.a.stats.Rounds, time.Duration(0)
			for i := range b.N {
				e.replaceRoute("0.0.0.0/0", hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 101+i%2)})
				for {
					began := time.Now()
					e.step()
					worst = max(worst, time.Since(began))
					if len(e.queue) == 0 && e.next != time.Nanosecond {
						break
					}
				}
				e.ops = e.ops[:0]
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*policies), "ns/policy")
			b.ReportMetric(float64(e.a.stats.Rounds-before)/float64(b.N), "rounds/op")
			b.ReportMetric(worst.Seconds()*1000, "worst-ms")
		})
	}
}
