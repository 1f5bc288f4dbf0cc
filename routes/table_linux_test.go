package routes

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const zooSetup = `nexthop add id 1 via 10.0.0.2 dev a0
nexthop add id 2 via 10.0.1.2 dev b0
nexthop add id 3 group 1,3/2
nexthop add id 11 via fd00:a::2 dev a0
nexthop add id 12 via fd00:b::2 dev b0
nexthop add id 13 group 11/12
nexthop add id 21 via 10.9.9.9 dev a0 onlink`

// zoo has one route of each kind that a lock in place could meet.
var zoo = []string{
	"route add 198.18.0.0/24 via 10.0.0.2",
	"route add 198.18.1.0/24 dev a0 scope link src 10.0.0.1",
	"route add 198.18.2.0/24 nexthop via 10.0.0.2 dev a0 weight 3 nexthop via 10.0.1.2 dev b0 weight 1",
	"route add 198.18.3.0/24 nhid 1",
	"route add 198.18.4.0/24 nhid 3",
	"route add 198.18.5.0/24 via inet6 fd00:a::2 dev a0",
	"route add 198.18.6.0/24 via 10.0.0.2 mtu lock 1300 advmss lock 1200",
	"route add 198.18.7.0/24 via 10.0.0.2 window 20000 rtt 100ms initcwnd 20 initrwnd 30 hoplimit 60 quickack 1 features ecn",
	"route add 198.18.8.0/24 via 10.0.0.2 congctl cubic rto_min 50ms",
	"route add 198.18.8.128/25 via 10.0.0.2 congctl lock cubic",
	"route add 198.18.9.0/24 via 10.9.9.9 dev a0 onlink",
	"route add 198.18.10.0/24 via 10.0.0.2 tos 0x10 metric 77 proto 186 table 1234",
	"route add 198.18.11.0/24 encap ip id 7 dst 10.0.0.9 dev a0",
	"route add 198.18.12.0/24 nexthop encap ip id 7 dst 10.0.0.9 dev a0 nexthop via 10.0.1.2 dev b0",
	"route add 198.18.13.0/24 via 10.0.0.2 realms 5/7",
	"route add 198.18.14.0/24 nhid 21",
	"route add 198.18.15.0/24 nexthop via inet6 fd00:a::2 dev a0 nexthop via 10.0.1.2 dev b0 onlink",
	"route add 198.18.16.0/24 via 10.0.0.2 mtu 1350",
	"route add default via 10.0.0.2 metric 500",
	"-6 route add 2001:db8:0::/48 via fd00:a::2",
	"-6 route add 2001:db8:1::/48 dev a0 src fd00:a::1",
	"-6 route add 2001:db8:2::/48 nexthop via fd00:a::2 dev a0 weight 3 nexthop via fd00:b::2 dev b0",
	"-6 route add 2001:db8:3::/48 nhid 11",
	"-6 route add 2001:db8:4::/48 nhid 13",
	"-6 route add 2001:db8:5::/48 via fd00:a::2 mtu lock 1400 advmss lock 1300",
	"-6 route add 2001:db8:6::/48 via fd00:a::2 pref high metric 5 proto 188",
	"-6 route add 2001:db8:7::/48 from 2001:db8:ffff::/48 via fd00:a::2",
	"-6 route add 2001:db8:8::/48 via fd00:9::9 dev a0 onlink",
	"-6 route add 2001:db8:9::/48 encap seg6 mode encap segs fc00::1 dev a0",
	"-6 route add 2001:db8:a::/48 via fd00:a::2 congctl lock cubic hoplimit 33 table 4321",
	"-6 route add default via fd00:b::2 pref low",
}

func dstOf(line string) string {
	f := strings.Fields(strings.TrimPrefix(line, "-6 "))
	switch {
	case f[2] != "default":
		return f[2]
	case strings.HasPrefix(line, "-6"):
		return "::/0"
	}
	return "0.0.0.0/0"
}

// dropNote reads the notifications that are there.
func notes(t *testing.T, c *conn) []Event {
	t.Helper()
	var d Decoder
	var out []Event
	for {
		b, got, err := c.receive(false)
		if err != nil {
			t.Fatal(err)
		}
		if !got {
			return out
		}
		for len(b) > 0 {
			h, data, rest, err := nextMessage(b)
			if err != nil {
				t.Fatal(err)
			}
			b = rest
			ev, err := d.Decode(h, data)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, ev)
		}
	}
}

func TestLockAndUnlockLeavesTheRouteAsItWas(t *testing.T) {
	ns := vethNS(t)
	ip(t, zooSetup)
	tb := openTable(t)
	watch, err := dialRoute(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	for _, g := range groups {
		if err := watch.JoinGroup(g); err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range zoo {
		ns.run(t, line, func(t *testing.T) {
			if out, err := tryIP(line); err != nil {
				t.Skipf("the kernel or iproute2 has no such route: %s", strings.TrimSpace(out))
			}
			r := findOne(t, tb, dstOf(line))
			before := snapshot(t)
			notes(t, watch)

			lock := must(EncodeLock(r, MTUMetric{MTU: 1280, Locked: true}))(t)
			seq, err := tb.Replace(lock)
			if err != nil {
				t.Fatal(err)
			}
			locked := findOne(t, tb, dstOf(line))
			if m := MTUMetricOf(locked.Body); m != (MTUMetric{1280, true}) {
				t.Errorf("read back %s", m)
			}
			if !EqualButMTU(r.Body, locked.Body) || Equal(r.Body, locked.Body) || !SameNexthops(r.Body, locked.Body) {
				t.Errorf("the locked route differs in more than the lock:\n%+v\n%+v", r.Body, locked.Body)
			}
			if r.Body.Metrics.Lock&^(1<<rtaxMTU) != locked.Body.Metrics.Lock&^(1<<rtaxMTU) {
				t.Errorf("locks %#x became %#x", r.Body.Metrics.Lock, locked.Body.Metrics.Lock)
			}
			evs := notes(t, watch)
			if len(evs) == 0 {
				t.Error("no event for the lock")
			}
			for _, ev := range evs {
				set, ok := ev.(RouteSet)
				if !ok || set.Origin != (Origin{tb.Port(), seq}) || !Equal(set.Route.Body, locked.Body) {
					t.Errorf("event %+v, want the locked route from %d, %d", ev, tb.Port(), seq)
				}
			}
			back := must(EncodeLock(locked, MTUMetricOf(r.Body)))(t)
			if _, err := tb.Replace(back); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(before, snapshot(t)); d != "" {
				t.Errorf("after lock and unlock (-before +after):\n%s", d)
			}
			if got := findOne(t, tb, dstOf(line)); got.Body.Raw != r.Body.Raw {
				t.Errorf("raw attributes differ:\n%x\n%x", r.Body.Raw, got.Body.Raw)
			}
		})
	}
}

func TestExpiringRouteIsNotLocked(t *testing.T) {
	vethNS(t)
	ip(t, "-6 route add 2001:db8::/48 via fd00:a::2 expires 1000")
	r := findOne(t, openTable(t), "2001:db8::/48")
	if !r.Body.Expires {
		t.Error("the expiry was not seen")
	}
	if _, err := EncodeLock(r, MTUMetric{1400, true}); err == nil {
		t.Error("a route that expires was encoded")
	}
}

func TestReplaceDoesNotBringBackAVanishedRoute(t *testing.T) {
	for _, c := range [][2]string{
		{"198.18.0.0/24", "route %s 198.18.0.0/24 via 10.0.0.2"},
		{"2001:db8::/48", "-6 route %s 2001:db8::/48 via fd00:a::2"},
		{"2001:db8:2::/48", "-6 route %s 2001:db8:2::/48 nexthop via fd00:a::2 dev a0 nexthop via fd00:b::2 dev b0"},
	} {
		t.Run(c[0], func(t *testing.T) {
			vethNS(t)
			tb := openTable(t)
			ip(t, fmt.Sprintf(c[1], "add"))
			msg := must(EncodeLock(findOne(t, tb, c[0]), MTUMetric{1400, true}))(t)
			ip(t, fmt.Sprintf(c[1], "del"))
			gone := snapshot(t)
			if _, err := tb.Replace(msg); !errors.Is(err, unix.ENOENT) {
				t.Errorf("replace of a vanished route: %v, want ENOENT", err)
			}
			if d := cmp.Diff(gone, snapshot(t)); d != "" {
				t.Errorf("the refused replace changed something (-want +got):\n%s", d)
			}
		})
	}
}

func TestDeleteHitsOnlyTheRouteThatItNames(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	ip(t, `route add 198.18.0.0/24 via 10.0.0.2
route append 198.18.0.0/24 via 10.0.1.2
route append 198.18.0.0/24 via 10.0.0.3
-6 route add 2001:db8::/48 via fd00:a::2
-6 route append 2001:db8::/48 via fd00:b::2
-6 route append 2001:db8::/48 via fd00:a::3`)
	for _, dst := range []string{"198.18.0.0/24"} {
		all := find(t, tb, dst)
		if len(all) != 3 {
			t.Fatalf("%d routes with one key, want 3", len(all))
		}
		if _, err := tb.Delete(must(EncodeDelete(all[1]))(t)); err != nil {
			t.Fatal(err)
		}
		left := find(t, tb, dst)
		if len(left) != 2 || !Equal(left[0].Body, all[0].Body) || !Equal(left[1].Body, all[2].Body) {
			t.Errorf("left %+v", left)
		}
		if _, err := tb.Delete(must(EncodeDelete(all[1]))(t)); !errors.Is(err, unix.ESRCH) {
			t.Errorf("second delete: %v, want ESRCH", err)
		}
	}
	// IPv6 has joined them to one; deleting one nexthop leaves the others.
	one := findOne(t, tb, "2001:db8::/48")
	if len(one.Body.Nexthops) != 3 {
		t.Fatalf("nexthops %+v", one.Body.Nexthops)
	}
	ip(t, "-6 route add 2001:db8:1::/48 via fd00:b::2")
	sibling := findOne(t, tb, "2001:db8:1::/48")
	sibling.Dst = one.Dst
	if _, err := tb.Delete(must(EncodeDelete(sibling))(t)); err != nil {
		t.Fatal(err)
	}
	if n := findOne(t, tb, "2001:db8::/48").Body.Nexthops; len(n) != 2 {
		t.Errorf("nexthops left: %+v", n)
	}
}

func TestCloneGoesTheSameWay(t *testing.T) {
	ns := vethNS(t)
	ip(t, zooSetup)
	tb := openTable(t)
	const table, proto = 5450, ProtoTSOAgent
	for _, line := range zoo {
		ns.run(t, line, func(t *testing.T) {
			if out, err := tryIP(line); err != nil {
				t.Skipf("the kernel or iproute2 has no such route: %s", strings.TrimSpace(out))
			}
			r := findOne(t, tb, dstOf(line))
			f := r.Body.Family
			before := snapshot(t)
			dst := netip.MustParsePrefix("203.0.113.0/24")
			if f == IPv6 {
				dst = netip.MustParsePrefix("2001:db8:cccc::/48")
			}
			msg := must(EncodeClone(r, dst, table, proto, MTUMetric{1400, true}, 1340, 9))(t)
			if _, err := tb.Put(msg); err != nil {
				t.Fatal(err)
			}
			var clones []Route
			err := tb.Routes(Filter{Family: f, Table: table, Protocol: proto}, func(r Route) error {
				clones = append(clones, r)
				return nil
			})
			if err != nil || len(clones) != 1 {
				t.Fatalf("%d clones, %v", len(clones), err)
			}
			c := clones[0]
			if !SameNexthops(c.Body, r.Body) || c.Body.PrefSrc != r.Body.PrefSrc || c.Body.Scope != r.Body.Scope || c.Dst != dst {
				t.Errorf("clone %+v of %+v", c.Body, r.Body)
			}
			if c.Body.Priority != 9 || c.Body.Metrics.MTU != 1400 || !c.Body.Metrics.MTULocked() || c.Body.Metrics.AdvMSS != 1340 {
				t.Errorf("clone's metrics %+v, metric %d", c.Body.Metrics, c.Body.Priority)
			}
			if !r.Body.Src.IsValid() && r.Body.TOS == 0 {
				rule := Rule{Family: f, Priority: 100, Action: RuleToTable, Table: table, Dst: dst, Protocol: proto, SuppressPrefixLen: -1, SuppressIfgroup: -1}
				if err := tb.AddRule(rule); err != nil {
					t.Fatal(err)
				}
				ans, err := tb.Lookup(Query{Dst: dst.Addr().Next()})
				if err != nil {
					t.Error(err)
				}
				if !slices.ContainsFunc(r.Body.Nexthops, func(n Nexthop) bool { return n.Oif == ans.Oif && (n.Gateway == ans.Gateway || n.Encap) }) {
					t.Errorf("clone answers %+v, route %+v", ans, r.Body.Nexthops)
				}
				if ans.MTU != 1400 || !ans.MTULocked || ans.Table != table {
					t.Errorf("clone answers %+v", ans)
				}
				if err := tb.DeleteRule(rule); err != nil {
					t.Error(err)
				}
			}
			if _, err := tb.Delete(msg); err != nil {
				t.Error(err)
			}
			if d := cmp.Diff(before, snapshot(t)); d != "" {
				t.Errorf("after the clone (-before +after):\n%s", d)
			}
			ip(t, strings.Replace(line, "route add", "route del", 1))
		})
	}
}

func TestBatchAnswersEachWriteInOrder(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	var writes []Write
	for i := range 1000 {
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(i / 2 >> 8), byte(i / 2)}), 32)
		msg := must(EncodeThrow(IPv4, dst, 5450, ProtoTSOAgent, 1))(t)
		writes = append(writes, Write{OpAdd, msg}) // each destination twice
	}
	res, err := tb.Batch(writes)
	if err != nil || len(res) != len(writes) {
		t.Fatalf("%d results, %v", len(res), err)
	}
	for i, r := range res {
		if i%2 == 0 && r.Err != nil || i%2 == 1 && !errors.Is(r.Err, unix.EEXIST) {
			t.Fatalf("write %d: %v", i, r.Err)
		}
	}
	if _, err := tb.Lookup(Query{Dst: netip.MustParseAddr("10.0.0.1")}); err != nil {
		t.Errorf("the connection is out of step: %v", err)
	}
}

func TestErrorsCarryTheKernelsWords(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	ip(t, "route add 198.18.0.0/24 via 10.0.0.2")
	r := findOne(t, tb, "198.18.0.0/24")
	ip(t, "route del 198.18.0.0/24\naddr del 10.0.0.1/24 dev a0")
	_, err := tb.Add(must(EncodeRoute(r))(t))
	if !errors.Is(err, unix.ENETUNREACH) || !strings.Contains(err.Error(), "Nexthop has invalid gateway") {
		t.Errorf("error %v", err)
	}
}

// The kernel's own flaw that EncodeLock's comment tells of; a kernel that behaves otherwise is
// good news.
func TestLockOnANexthopObjectSpreadsAndIsTakenBack(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	ip(t, "nexthop add id 1 via 10.0.0.2 dev a0\nroute add 198.18.0.0/24 nhid 1")
	first := findOne(t, tb, "198.18.0.0/24")
	if _, err := tb.Replace(must(EncodeLock(first, MTUMetric{1280, true}))(t)); err != nil {
		t.Fatal(err)
	}
	ip(t, "route add 198.18.1.0/24 nhid 1")
	second := findOne(t, tb, "198.18.1.0/24")
	if m := MTUMetricOf(second.Body); m != (MTUMetric{1280, true}) {
		t.Logf("this kernel does not spread the lock: %s", m)
	}
	for _, r := range []Route{second, first} {
		if _, err := tb.Replace(must(EncodeLock(r, MTUMetric{}))(t)); err != nil {
			t.Fatal(err)
		}
		if m := MTUMetricOf(findOne(t, tb, r.Dst.String()).Body); m.MTU != 0 {
			t.Errorf("%s still has %s", r.Dst, m)
		}
	}
}

// ruleZoo are rules whose every selector must survive a dump, a delete and an add of ours.
var ruleZoo = []string{
	"rule add from 10.1.0.0/16 to 10.2.0.0/16 ipproto tcp sport 1000-2000 dport 443 lookup 5450 pref 1000 protocol 84",
	"rule add fwmark 0x10/0xf0 lookup 77 pref 1001",
	"rule add fwmark 7 lookup 78 pref 1002",
	"rule add iif lo to 10.3.0.0/16 lookup main pref 1003",
	"rule add oif a0 uidrange 1000-2000 lookup 79 pref 1004",
	"rule add goto 1006 pref 1005",
	"rule add not from 10.4.0.0/16 lookup main suppress_prefixlength 0 pref 1006",
	"rule add from 10.5.0.0/16 unreachable pref 1007",
	"rule add from all tos 0x10 lookup 80 pref 1008",
	"rule add tun_id 99 lookup 81 pref 1009",
	"rule add lookup main suppress_ifgroup 3 pref 1010",
	"rule add from 0.0.0.0/32 to 10.6.0.0/16 lookup 5450 pref 1011",
	"rule add from all realms 3/4 lookup 82 pref 1012",
	"-6 rule add from 2001:db8::/32 to fd00::/8 ipproto udp lookup 5450 pref 1013 protocol 84",
	"-6 rule add iif lo to fd00::/8 prohibit pref 1014",
	"rule add l3mdev pref 1015",
}

func TestRulesSurviveDeleteAndAdd(t *testing.T) {
	ns := vethNS(t)
	tb := openTable(t)
	for _, line := range ruleZoo {
		ns.run(t, line, func(t *testing.T) {
			if out, err := tryIP(line); err != nil {
				t.Skipf("the kernel or iproute2 has no such rule: %s", strings.TrimSpace(out))
			}
			before := snapshot(t)
			f := IPv4
			if strings.HasPrefix(line, "-6") {
				f = IPv6
			}
			for _, r := range must(tb.Rules(f))(t) {
				if r.Priority < 1000 || r.Priority > 1100 || !strings.Contains(line, fmt.Sprintf("pref %d", r.Priority)) {
					continue
				}
				if r.Unknown {
					t.Errorf("unknown: %+v", r)
				}
				if strings.Contains(line, "realms") {
					return // not in a Rule, so not written
				}
				if err := tb.DeleteRule(r); err != nil {
					t.Fatal(err)
				}
				if snapshot(t) == before {
					t.Error("the rule is still there")
				}
				if err := tb.DeleteRule(r); !errors.Is(err, unix.ENOENT) {
					t.Errorf("second delete: %v", err)
				}
				if err := tb.AddRule(r); err != nil {
					t.Fatal(err)
				}
				if err := tb.AddRule(r); !errors.Is(err, unix.EEXIST) {
					t.Errorf("second add: %v", err)
				}
				if d := cmp.Diff(before, snapshot(t)); d != "" {
					t.Errorf("(-before +after):\n%s", d)
				}
				return
			}
			t.Error("the rule was not found")
		})
	}
}

func TestLookup(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	ip(t, `route add 198.18.0.0/24 via 10.0.0.2 mtu lock 1400
route add 198.18.1.0/24 via 10.0.1.2 table 77
rule add from 10.0.9.0/24 lookup 77 pref 100
rule add fwmark 5 lookup 77 pref 101
rule add iif b0 lookup 77 pref 102
route add unreachable 198.18.2.0/24
-6 route add 2001:db8::/48 via fd00:a::2
-6 route add 2001:db8:1::/48 via fd00:b::2 table 77
-6 rule add from 2001:db8:9::/48 lookup 77 pref 100`)
	links := must(tb.Links())(t)
	index := func(name string) Ifindex {
		return links[slices.IndexFunc(links, func(l *Link) bool { return l.Name == name })].Index
	}
	a0, b0 := index("a0"), index("b0")
	addr := netip.MustParseAddr
	for name, c := range map[string]struct {
		q   Query
		oif Ifindex
		err error
	}{
		"plain":                         {Query{Dst: addr("198.18.0.1")}, a0, nil},
		"match":                         {Query{Dst: addr("198.18.0.1"), FibMatch: true}, a0, nil},
		"unreachable route":             {Query{Dst: addr("198.18.2.1")}, 0, unix.EHOSTUNREACH},
		"no route":                      {Query{Dst: addr("198.18.1.1")}, 0, unix.ENETUNREACH},
		"mark":                          {Query{Dst: addr("198.18.1.1"), Mark: 5}, b0, nil},
		"own source":                    {Query{Dst: addr("198.18.0.1"), Src: addr("10.0.1.1")}, a0, nil},
		"IPv4 foreign source":           {Query{Dst: addr("198.18.1.1"), Src: addr("10.0.9.1")}, 0, unix.EINVAL},
		"IPv4 forwarded, no forwarding": {Query{Dst: addr("198.18.1.1"), Src: addr("10.0.1.9"), Iif: b0}, 0, unix.EHOSTUNREACH},
		"IPv6":                          {Query{Dst: addr("2001:db8::1")}, a0, nil},
		"IPv6 match":                    {Query{Dst: addr("2001:db8::1"), FibMatch: true}, a0, nil},
		"IPv6 foreign source":           {Query{Dst: addr("2001:db8:1::1"), Src: addr("2001:db8:9::1")}, b0, nil},
		"IPv6 forwarded":                {Query{Dst: addr("2001:db8:1::1"), Src: addr("2001:db8:9::1"), Iif: b0}, b0, nil},
		"IPv6 no route":                 {Query{Dst: addr("2001:db8:1::1")}, 0, unix.ENETUNREACH},
	} {
		ans, err := tb.Lookup(c.q)
		if !errors.Is(err, c.err) || (c.err != nil) != errors.Is(err, ErrUnreachable) || ans.Oif != c.oif {
			t.Errorf("%s: %+v, %v; want device %d, %v", name, ans, err, c.oif, c.err)
		}
		if c.q.FibMatch && ans.Route.Dst.Bits() == 0 {
			t.Errorf("%s: no prefix: %+v", name, ans)
		}
	}
	ans := must(tb.Lookup(Query{Dst: addr("198.18.0.1")}))(t)
	if ans.MTU != 1400 || !ans.MTULocked || ans.PMTU != 0 || ans.Table != TableMain || ans.Gateway != addr("10.0.0.2") {
		t.Errorf("answer %+v", ans)
	}
	// With forwarding on, IPv4 takes a source that it could have got from the device.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	ans, err := tb.Lookup(Query{Dst: addr("198.18.0.1"), Src: addr("10.0.1.9"), Iif: b0})
	if err != nil || ans.Oif != a0 {
		// rule 102 sends what comes in by b0 to table 77, which has no such route, and on
		t.Errorf("forwarded: %+v, %v", ans, err)
	}
	if ans, err = tb.Lookup(Query{Dst: addr("198.18.1.1"), Src: addr("10.0.0.9"), Iif: a0, Mark: 5}); err != nil || ans.Oif != b0 || ans.Table != 77 {
		t.Errorf("forwarded with a mark: %+v, %v", ans, err)
	}
}

// TestCapture writes the seeds of the decoders' tests from a namespace with one of each.
func TestCapture(t *testing.T) {
	if !*capture {
		t.Skip("only with -capture")
	}
	vethNS(t)
	force(t, zooSetup+"\nlink add br0 type bridge\nlink set b1 master br0\nlink add vl7 link a0 type vlan id 7\naddr add 10.7.0.1 peer 10.7.0.2 dev a0")
	for _, line := range append(slices.Clone(zoo), ruleZoo...) {
		_, _ = tryIP(line)
	}
	_, _ = tryIP("-6 route add 2001:db8:e::/48 via fd00:a::2 expires 1000")
	_, _ = tryIP("route add blackhole 198.18.20.0/24\nroute add throw 198.18.21.0/24\nnexthop add id 31 blackhole")
	var b strings.Builder
	keep := func(h Header, data []byte) error {
		fmt.Fprintf(&b, "%d %x\n", h.Type, data)
		return nil
	}
	c := openTable(t).c
	for _, r := range []struct {
		typ     uint16
		payload []byte
	}{
		{rtmGetLink, linkRequest()}, {rtmGetAddr, addrRequest(IPv4)}, {rtmGetAddr, addrRequest(IPv6)},
		{rtmGetRule, genHeader(IPv4, fibRuleHdrLen)}, {rtmGetRule, genHeader(IPv6, fibRuleHdrLen)},
		{rtmGetNexthop, make([]byte, nhmsgLen)},
		{rtmGetRoute, genHeader(IPv4, rtmsgLen)}, {rtmGetRoute, genHeader(IPv6, rtmsgLen)},
	} {
		if err := dump(c, r.typ, r.payload, keep); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("testdata/messages.txt", []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}
