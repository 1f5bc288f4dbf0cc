package routes

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// A route and its clone must not share a nexthop object: what the kernel has looked up by one is
// what it answers for the other. The test notices a kernel that keeps them apart, too.
func TestNexthopObjectsShareWhatWasLookedUp(t *testing.T) {
	for name, c := range map[string]struct{ setup, covered, other, dst string }{
		"IPv4": {`nexthop add id 1 via 10.0.0.2 dev a0
addr add 10.9.0.1/32 dev lo
addr add 10.8.0.1/32 dev lo
route add 198.18.0.0/16 nhid 1
rule add from 10.9.0.1 lookup 5450 pref 100`, "10.9.0.1", "10.8.0.1", "198.18.0.1"},
		"IPv6": {`nexthop add id 1 via fd00:a::2 dev a0
-6 route add 2001:db8::/32 nhid 1
-6 rule add from fd00:9::1 lookup 5450 pref 100`, "fd00:9::1", "fd00:8::1", "2001:db8::1"},
	} {
		t.Run(name, func(t *testing.T) {
			vethNS(t)
			tb := openTable(t)
			ip(t, c.setup)
			dst := netip.MustParseAddr(c.dst)
			r := findOne(t, tb, map[string]string{"IPv4": "198.18.0.0/16", "IPv6": "2001:db8::/32"}[name])
			locked := func(from string) bool {
				return must(tb.Lookup(Query{Dst: dst, Src: netip.MustParseAddr(from)}))(t).MTULocked
			}
			// apart looks both up in turns after what was looked up before is forgotten.
			apart := func() bool {
				other := locked(c.other)
				return locked(c.covered) && !other && !locked(c.other)
			}
			clone := must(EncodeClone(r, r.Dst, 5450, ProtoTSOAgent, MTUMetric{1400, true}, 0, 1400))(t)
			if _, err := tb.Put(clone); err != nil {
				t.Fatal(err)
			}
			if !apart() {
				t.Error("the clone's lock is not where it belongs, although the ways are written out")
			}
			ip(t, map[string]string{
				"IPv4": "route flush table 5450\nroute add 198.18.0.0/16 nhid 1 table 5450 mtu lock 1400",
				"IPv6": "-6 route flush table 5450\n-6 route add 2001:db8::/32 nhid 1 table 5450 mtu lock 1400",
			}[name])
			if apart() {
				t.Error("this kernel keeps routes with one nexthop object apart: clones could share it")
			}
		})
	}
}

// IPv6 checks a gateway by the rules and takes a throw for an answer there.
func TestGatewayBehindAThrow(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	ip(t, `-6 route add default via fd00:a::2 dev a0 table 220
-6 route add throw fd00:a::/64 table 220
-6 route add throw fd00:a::/64 table 5450
-6 rule add lookup 220 pref 220`)
	var r Route
	err := tb.Routes(Filter{Family: IPv6, Table: 220}, func(found Route) error {
		if found.Body.Type == Unicast {
			r = found
		}
		return nil
	})
	if err != nil || r.Body == nil {
		t.Fatal(r, err)
	}
	clone := must(EncodeClone(r, r.Dst, 5450, ProtoTSOAgent, MTUMetric{1400, true}, 0, 1400))(t)
	if _, err := tb.Put(clone); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("without onlink: %v", err)
	}
	if _, err := tb.Put(OnLink(clone)); err != nil {
		t.Fatal(err)
	}
	var clones []Route
	err = tb.Routes(Filter{Family: IPv6, Table: 5450, Protocol: ProtoTSOAgent}, func(r Route) error {
		clones = append(clones, r)
		return nil
	})
	if err != nil || len(clones) != 1 || !SameWays(clones[0].Body, r.Body) {
		t.Errorf("%+v, %v", clones, err)
	}
}

// IPv6 passes over a throw, and over what rejects, in a lookup that is bound to a device, and finds what stands behind it.
func TestKernelBoundLookupsPassOverThrows(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	index, err := net.InterfaceByName("a0")
	if err != nil {
		t.Fatal(err)
	}
	ip(t, `-6 rule add lookup 5450 pref 220
-6 route add fd03::/16 via fd00:a::2 dev a0 table 5450
-6 route add fd03:1::/32 via fd00:a::4 dev a0`)
	ask := func(oif Ifindex) Answer {
		t.Helper()
		got, err := tb.Lookup(Query{Dst: netip.MustParseAddr("fd03:1::1"), Oif: oif})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	wide, far := netip.MustParseAddr("fd00:a::2"), netip.MustParseAddr("fd00:a::4")
	for _, typ := range []string{"unreachable", "prohibit", "blackhole", "throw"} {
		ip(t, "-6 route add "+typ+" fd03:1::/32 table 5450 metric 1")
		if got := ask(Ifindex(index.Index)); got.Gateway != wide || got.Table != 5450 {
			t.Errorf("past %s a bound lookup finds %+v", typ, got)
		}
		if typ != "throw" {
			ip(t, "-6 route del "+typ+" fd03:1::/32 table 5450 metric 1")
		}
	}
	ip(t, "-6 route add fd03:1::/32 via fd00:a::4 dev a0 table 5450 metric 131072")
	if got := ask(Ifindex(index.Index)); got.Gateway != far || got.Table != 5450 {
		t.Errorf("behind the throw a bound lookup finds %+v", got)
	}
	if got := ask(0); got.Gateway != far || got.Table != TableMain {
		t.Errorf("a lookup that is not bound finds %+v", got)
	}
}
