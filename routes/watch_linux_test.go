package routes

import (
	stdcmp "cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// follower runs a Watcher and mirrors its events in a FIB, in the test's own goroutine.
type follower struct {
	t     testing.TB
	w     *Watcher
	tb    *Table
	fib   *FIB
	ch    chan []Event
	seen  []Event
	fence Ifindex
}

func follow(t testing.TB, opts WatchOptions) *follower {
	t.Helper()
	w, err := Dial(opts)
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, w: w, tb: openTable(t), fib: NewFIB(), ch: make(chan []Event), fence: 1 << 30}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(evs []Event) {
			select {
			case f.ch <- evs:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run does not end")
		}
	})
	f.until(func(ev Event) bool { return ev == ResyncEnd{} })
	return f
}

// until applies events up to and with one that ok accepts.
func (f *follower) until(ok func(Event) bool) {
	f.t.Helper()
	timeout := time.After(20 * time.Second)
	for found := false; !found; {
		select {
		case evs := <-f.ch:
			for _, ev := range evs {
				f.seen = append(f.seen, ev)
				if e := f.fib.Apply(ev); e.Resync != nil {
					f.w.Resync(*e.Resync)
				}
				found = found || ok(ev)
			}
		case <-timeout:
			f.t.Fatalf("no such event among %d; stats %+v", len(f.seen), f.w.Stats())
		}
	}
}

// settle goes on until a resync that is asked for now, of a device that does not exist, has
// been done after all others.
func (f *follower) settle() {
	f.t.Helper()
	f.fence++
	s := Scope{RoutesOnly: true, Oif: f.fence}
	f.w.Resync(s)
	f.until(func(ev Event) bool {
		end, ok := ev.(ResyncEnd)
		return ok && (end.Scope == s || end.Scope.Oif == 0)
	})
}

// exact settles until the mirror is what a fresh dump shows.
func (f *follower) exact() {
	f.t.Helper()
	var d string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		f.settle()
		if d = cmp.Diff(f.fresh(), f.mirror()); d == "" && !f.fib.Stale() {
			return
		}
	}
	if os.Getenv("ROUTES_DEBUG") != "" {
		for _, ev := range f.seen {
			switch ev := ev.(type) {
			case RouteSet:
				f.t.Logf("set %s from %v replace %t append %t", show(ev.Route), ev.Origin, ev.Replace, ev.Append)
			case RouteGone:
				f.t.Logf("gone %s from %v", show(ev.Route), ev.Origin)
			case LinkSet:
				f.t.Logf("link %+v", *ev.Link)
			default:
				f.t.Logf("%T %+v", ev, ev)
			}
		}
	}
	f.t.Errorf("the mirror differs (-kernel +mirror), stale %t, stats %+v:\n%s", f.fib.Stale(), f.w.Stats(), d)
}

func (f *follower) fresh() []string {
	f.t.Helper()
	var out []string
	for _, fam := range []Family{IPv4, IPv6} {
		if err := f.tb.Routes(Filter{Family: fam}, func(r Route) error {
			out = append(out, show(r))
			return nil
		}); err != nil {
			f.t.Fatal(err)
		}
	}
	slices.Sort(out)
	return out
}

func (f *follower) mirror() []string {
	var out []string
	for _, fam := range []Family{IPv4, IPv6} {
		for _, id := range f.fib.Tables(fam) {
			for r := range f.fib.Table(fam, id) {
				out = append(out, show(r))
			}
		}
	}
	slices.Sort(out)
	return out
}

// show leaves out the order of IPv6 siblings, which events and dumps tell differently.
func show(r Route) string {
	b := r.Body
	hops := slices.Clone(b.Nexthops)
	if b.Family == IPv6 {
		slices.SortFunc(hops, func(a, b Nexthop) int {
			return stdcmp.Or(stdcmp.Compare(a.Oif, b.Oif), a.Gateway.Compare(b.Gateway))
		})
	}
	return fmt.Sprintf("%s type %d proto %d scope %d src %s nh %v id %d %+v expires %t",
		r.Key(), b.Type, b.Protocol, b.Scope, b.PrefSrc, hops, b.NHID, b.Metrics, b.Expires)
}

func TestWatcherRedumpsWhatGoesWithoutAWord(t *testing.T) {
	const routes = `nexthop add id 1 via 10.0.0.2 dev a0
nexthop add id 2 via 10.0.1.2 dev b0
nexthop add id 3 group 1/2
nexthop add id 4 group 1
nexthop add id 11 via fd00:a::2 dev a0
addr add 10.5.5.5/32 dev b0
addr add fd00:5::5/128 dev b0 nodad
route add 198.18.0.0/24 via 10.0.0.2
route add 198.18.1.0/24 nexthop via 10.0.0.2 dev a0 nexthop via 10.0.1.2 dev b0
route add 198.18.2.0/24 nhid 1
route add 198.18.3.0/24 nhid 3
route add 198.18.6.0/24 nhid 4
route add 198.18.4.0/24 via 10.0.0.2 src 10.5.5.5
route add 198.18.5.0/24 via 10.0.0.2 table 77
-6 route add 2001:db8::/48 via fd00:a::2
-6 route add 2001:db8:1::/48 nexthop via fd00:a::2 dev a0 nexthop via fd00:b::2 dev b0
-6 route add 2001:db8:2::/48 nhid 11
-6 route add 2001:db8:3::/48 via fd00:a::2 src fd00:5::5 mtu 1500`
	for name, change := range map[string]string{
		"link down":         "link set a0 down",
		"link down and up":  "link set a0 down\nlink set a0 up",
		"carrier lost":      "link set a1 down",
		"carrier back":      "link set a1 down\nlink set a1 up",
		"link deleted":      "link del a0",
		"address":           "addr del 10.0.0.1/24 dev a0",
		"preferred source":  "addr del 10.5.5.5/32 dev b0",
		"address again":     "addr del 10.0.0.1/24 dev a0\n\naddr add 10.0.0.1/24 dev a0",
		"preferred source6": "addr del fd00:5::5/128 dev b0",
		"nexthop":           "nexthop del id 1",
		"nexthop6":          "nexthop del id 11",
		"nexthop group":     "nexthop del id 3",
		"nexthop replaced":  "nexthop replace id 1 via 10.0.0.3 dev a0",
		"device mtu":        "link set a0 mtu 1400",
		"other metrics":     "-6 route append 2001:db8::/48 via fd00:a::3 mtu 1400\n\n-6 route del 2001:db8::/48 via fd00:a::2",
	} {
		t.Run(name, func(t *testing.T) {
			vethNS(t)
			_ = os.WriteFile("/proc/sys/net/ipv6/route/skip_notify_on_dev_down", []byte("1"), 0)
			ip(t, routes)
			f := follow(t, WatchOptions{})
			f.exact()
			for part := range strings.SplitSeq(change, "\n\n") {
				ip(t, part)
				f.exact()
			}
		})
	}
}

// churn makes n random changes, each a line for `ip`; many of them fail, which is all right.
func churn(rng *rand.Rand, n int) string {
	var b strings.Builder
	for range n {
		k := rng.IntN(12)
		via := []string{"10.0.0.2", "10.0.0.3", "10.0.1.2"}[rng.IntN(3)]
		via6 := []string{"fd00:a::2", "fd00:a::3", "fd00:b::2"}[rng.IntN(3)]
		dev := []string{"a", "b"}[rng.IntN(2)]
		switch rng.IntN(24) {
		case 0, 1, 2:
			fmt.Fprintf(&b, "route add 198.18.%d.0/24 via %s metric %d\n", k, via, rng.IntN(2))
		case 3, 4:
			fmt.Fprintf(&b, "route replace 198.18.%d.0/24 via %s\n", k, via)
		case 5:
			fmt.Fprintf(&b, "route append 198.18.%d.0/24 via %s\n", k, via)
		case 6:
			fmt.Fprintf(&b, "route prepend 198.18.%d.0/24 via %s\n", k, via)
		case 7, 8:
			fmt.Fprintf(&b, "route del 198.18.%d.0/24\n", k)
		case 9, 10:
			fmt.Fprintf(&b, "route add 2001:db8:%d::/48 via %s metric %d\n", k, via6, 5+rng.IntN(2))
		case 11:
			fmt.Fprintf(&b, "route replace 2001:db8:%d::/48 via %s metric 5\n", k, via6)
		case 12, 13:
			fmt.Fprintf(&b, "route append 2001:db8:%d::/48 via %s metric 5\n", k, via6)
		case 14:
			fmt.Fprintf(&b, "route del 2001:db8:%d::/48\n", k)
		case 15:
			fmt.Fprintf(&b, "route del 2001:db8:%d::/48 via %s\n", k, via6)
		case 16:
			fmt.Fprintf(&b, "link set %s0 down\nlink set %s0 up\naddr replace fd00:%s::1/64 dev %s0 nodad\n", dev, dev, dev, dev)
		case 17:
			fmt.Fprintf(&b, "link set %s1 down\nlink set %s1 up\n", dev, dev)
		case 18:
			fmt.Fprintf(&b, "addr add 10.5.5.%d/32 dev %s0\nroute replace 198.18.%d.0/24 via %s src 10.5.5.%d\n", k, dev, k, via, k)
		case 19:
			fmt.Fprintf(&b, "addr del 10.5.5.%d/32 dev a0\naddr del 10.5.5.%d/32 dev b0\n", k, k)
		case 20:
			fmt.Fprintf(&b, "nexthop replace id %d via %s\n", 1+k%3, via+" dev "+map[bool]string{true: "b0", false: "a0"}[via == "10.0.1.2"])
		case 21:
			fmt.Fprintf(&b, "nexthop del id %d\n", 1+k%3)
		case 22:
			fmt.Fprintf(&b, "route replace 198.18.%d.0/24 nhid %d\n", k, 1+rng.IntN(3))
		case 23:
			fmt.Fprintf(&b, "route replace 198.18.%d.0/24 nexthop via 10.0.0.2 dev a0 nexthop via 10.0.1.2 dev b0\n", k)
		}
	}
	return b.String()
}

func TestMirrorFollowsRandomChurn(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			vethNS(t)
			f := follow(t, WatchOptions{})
			rng := rand.New(rand.NewPCG(uint64(seed), 0))
			for range 4 {
				force(t, churn(rng, 80))
				f.exact()
			}
			if n := f.w.Stats().Undecodable; n > 0 {
				t.Errorf("%d messages were undecodable", n)
			}
		})
	}
}

// storm writes n routes one by one, each as fast as the kernel takes it.
func storm(t testing.TB, tb *Table, n int, op Op, gw byte) {
	t.Helper()
	writes := make([]Write, 0, n)
	for i := range n {
		writes = append(writes, Write{op, plain(i, gw)})
	}
	res, err := tb.Batch(writes)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range res {
		if r.Err != nil {
			t.Fatalf("write %d: %v", i, r.Err)
		}
	}
}

// plain is a route to the i-th /28 from 11.0.0.0 on, by 10.0.0.gw on a0.
func plain(i int, gw byte) []byte {
	b := make([]byte, rtmsgLen, 64)
	b[0], b[4], b[5], b[7] = byte(IPv4), byte(TableMain), 186, byte(Unicast)
	a := uint32(11<<24 + i<<4)
	b = appendDst(b, netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)}), 28))
	return appendAttr(b, rtaGateway, []byte{10, 0, 0, gw})
}

func TestThreeThousandRapidChangesAreAllTold(t *testing.T) {
	vethNS(t)
	f := follow(t, WatchOptions{})
	n := len(f.seen)
	storm(t, f.tb, 1000, OpAdd, 2)
	storm(t, f.tb, 1000, OpReplace, 3)
	storm(t, f.tb, 1000, OpDelete, 3)
	f.exact()
	told := 0
	for _, ev := range f.seen[n:] {
		switch ev := ev.(type) {
		case RouteSet:
			if ev.Origin.Port == f.tb.Port() {
				told++
			}
		case RouteGone:
			if ev.Origin.Port == f.tb.Port() {
				told++
			}
		case Lost:
			t.Error(ev.Err)
		}
	}
	if told != 3000 {
		t.Errorf("%d events, want 3000", told)
	}
}

func TestOverrunEndsExact(t *testing.T) {
	vethNS(t)
	f := follow(t, WatchOptions{ReceiveBuffer: 4096})
	storm(t, f.tb, 5000, OpAdd, 2)
	storm(t, f.tb, 5000, OpReplace, 3)
	f.exact()
	if f.w.Stats().Overruns == 0 {
		t.Error("nothing was dropped: the test tests nothing")
	}
	if !slices.ContainsFunc(f.seen, func(ev Event) bool {
		l, ok := ev.(Lost)
		return ok && errors.Is(l.Err, unix.ENOBUFS)
	}) {
		t.Error("the loss was not told")
	}
}

func TestResyncWhileIdleAndAfterTheEnd(t *testing.T) {
	newNS(t)
	f := follow(t, WatchOptions{})
	for _, s := range []Scope{{}, {RoutesOnly: true}, {RoutesOnly: true, Family: IPv6}, {RoutesOnly: true, Oif: 1}} {
		f.w.Resync(s)
		f.until(func(ev Event) bool { return ev == ResyncEnd{Scope: s} })
	}
	f.exact()
}

func TestRunEndsWithItsContext(t *testing.T) {
	newNS(t)
	w, err := Dial(WatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Run(ctx, func([]Event) { cancel() }) }()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
	w.Resync(Scope{}) // does nothing, and does not hang
}

// The event of a link that goes down comes before its routes are gone, and a dump takes no lock:
// without the barrier the dump still shows them.
func TestLinkDownWithManyRoutes(t *testing.T) {
	vethNS(t)
	f := follow(t, WatchOptions{})
	for range 3 {
		storm(t, f.tb, 20000, OpAdd, 2)
		f.exact()
		ip(t, "link set a0 down")
		f.exact()
		ip(t, "link set a0 up")
	}
}
