package routes

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

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

// notes reads the notifications that are there.
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
			if !SameWays(c.Body, r.Body) || c.Body.NHID != 0 || c.Body.PrefSrc != r.Body.PrefSrc || c.Body.Scope != r.Body.Scope || c.Dst != dst {
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

// The kernel's routing lock is taken for each write of a batch anew: others write in between, and don't wait for its end.
func TestOthersWriteDuringABatch(t *testing.T) {
	vethNS(t)
	mine, other := openTable(t), openTable(t)
	const n = 150 * batchLen
	writes := make([]Write, n)
	for i := range writes {
		writes[i] = Write{OpPut, plain(i, 2)}
	}
	single := Write{OpPut, must(EncodeThrow(IPv4, netip.MustParsePrefix("198.18.0.0/32"), 5450, ProtoTSOAgent, 1))(t)}
	// Which thread runs when is the machine's: of a few tries one has to do.
	const tries, enough = 5, n / batchLen / 4
	for range tries {
		failed := make(chan error, 1)
		began := time.Now()
		go func() {
			res, err := mine.Batch(writes)
			failed <- errors.Join(err, res[0].Err)
		}()
		var waits []time.Duration
		for len(failed) == 0 {
			start := time.Now()
			if _, err := other.send(single); err != nil {
				t.Fatal(err)
			}
			waits = append(waits, time.Since(start))
		}
		took := time.Since(began)
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
		slices.Sort(waits)
		t.Logf("%d writes took %v, during which others did %d: %v at the median, %v at the most", n, took, len(waits), waits[len(waits)/2], waits[len(waits)-1])
		if len(waits) >= enough {
			return
		}
	}
	t.Errorf("others did less than %d writes each time", enough)
}
