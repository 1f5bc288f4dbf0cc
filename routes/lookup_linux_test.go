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
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

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

// TestRuleBesideOneThatHasMore: the kernel takes a rule that has a destination for one without, when that one is to be added or deleted.
func TestRuleBesideOneThatHasMore(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	for _, of := range []struct {
		f        Family
		src, dst string
	}{{IPv4, "10.1.0.0/16", "10.2.0.0/24"}, {IPv6, "fd01::/32", "fd02::/48"}} {
		wide := Rule{
			Family: of.f, Priority: 100, Action: RuleToTable, Table: 5450, Protocol: ProtoTSOAgent, Src: netip.MustParsePrefix(of.src),
			SuppressPrefixLen: -1, SuppressIfgroup: -1,
		}
		narrow, second := wide, wide
		narrow.Dst, second.Iif = netip.MustParsePrefix(of.dst), "lo"
		foreign := wide
		foreign.Protocol, foreign.Dst = 4, netip.MustParsePrefix(of.dst)
		for _, there := range [][]Rule{{narrow}, {foreign}, {narrow, second}, {foreign, narrow}, {second, foreign, narrow}} {
			has := func(want ...Rule) {
				t.Helper()
				var have []Rule
				for _, r := range must(tb.Rules(of.f))(t) {
					if r.Priority == wide.Priority {
						have = append(have, r)
					}
				}
				same := cmp.Comparer(func(a, b Rule) bool { return a == b })
				if d := cmp.Diff(want, have, same, cmpopts.SortSlices(func(a, b Rule) bool { return fmt.Sprint(a) < fmt.Sprint(b) })); d != "" {
					t.Errorf("%v beside %v (-want +have):\n%s", wide, there, d)
				}
			}
			for _, r := range there {
				if err := tb.AddRule(r); err != nil {
					t.Fatal(err)
				}
			}
			if err := tb.DeleteRule(wide); !errors.Is(err, unix.ENOENT) {
				t.Errorf("deleted though it is not there: %v", err)
			}
			has(there...)
			if err := tb.AddRule(wide); err != nil {
				t.Error(err)
			}
			if err := tb.AddRule(wide); !errors.Is(err, unix.EEXIST) {
				t.Errorf("added twice: %v", err)
			}
			has(append(slices.Clone(there), wide)...)
			if err := tb.DeleteRule(wide); err != nil {
				t.Error(err)
			}
			has(there...)
			for _, r := range there {
				if err := tb.DeleteRule(r); err != nil {
					t.Error(err)
				}
			}
			has()
		}
	}
}

// TestRulesThatAreThereTwice: without NLM_F_EXCL the kernel adds a rule that it has, and a delete takes the
// first of them. What differs in their realms alone is one rule to the mirror, too.
func TestRulesThatAreThereTwice(t *testing.T) {
	for name, early := range map[string]bool{"before the dump": true, "after the dump": false} {
		t.Run(name, func(t *testing.T) {
			vethNS(t)
			r := Rule{Family: IPv4, Priority: 100, Action: RuleToTable, Table: 77, Mark: 5, Mask: 0xff, SuppressPrefixLen: -1, SuppressIfgroup: -1}
			msg := must(EncodeRule(r))(t)
			tb := openTable(t)
			add := func() {
				for range 2 {
					if _, err := tb.c.request(rtmNewRule, unix.NLM_F_CREATE|unix.NLM_F_ACK, msg, nil); err != nil {
						t.Fatal(err)
					}
				}
			}
			if early {
				add()
			}
			f := follow(t, WatchOptions{})
			if !early {
				add()
			}
			f.exact()
			for _, want := range []int{2, 1, 0} {
				kernel := 0
				for _, have := range must(tb.Rules(IPv4))(t) {
					if have == r {
						kernel++
					}
				}
				if mirror := slices.ContainsFunc(f.fib.Rules(IPv4), func(have *Rule) bool { return *have == r }); kernel != want || mirror != (want > 0) {
					t.Errorf("the kernel has the rule %d times, want %d; the mirror has it: %t", kernel, want, mirror)
				}
				if want > 0 {
					if err := tb.DeleteRule(r); err != nil {
						t.Fatal(err)
					}
					f.until(func(ev Event) bool { _, ok := ev.(RuleGone); return ok })
					f.exact()
				}
			}
		})
	}
}

// TestFirstRuleSplitsLocalFromMain pins what the kernel does with tables local and main of IPv4: until the
// first rule is added they are one, in which the longest prefix wins (KERNEL.md 67).
func TestFirstRuleSplitsLocalFromMain(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	ip(t, "route add local 198.18.0.0/15 dev lo\nroute add 198.18.0.0/24 via 10.0.0.2")
	look := func() Answer { return must(tb.Lookup(Query{Dst: netip.MustParseAddr("198.18.0.1")}))(t) }
	if ans := look(); ans.Type != Unicast || ans.Gateway != netip.MustParseAddr("10.0.0.2") {
		t.Errorf("without a rule: %+v, want the longer route of table main", ans)
	}
	if own := must(tb.Lookup(Query{Dst: netip.MustParseAddr("10.0.0.1")}))(t); own.Type != Local || own.Table != TableMain {
		t.Errorf("without a rule: %+v, want a local one in table main", own)
	}
	ip(t, "rule add fwmark 99 lookup 99 pref 100\nrule del pref 100")
	if ans := look(); ans.Type != Local || ans.Table != TableLocal {
		t.Errorf("after the first rule came and went: %+v, want the local one", ans)
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
		"IPv4 foreign source":           {Query{Dst: addr("198.18.1.1"), Src: addr("10.0.9.1")}, 0, ErrUnreachable},
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

// TestMessagesOfThisKernelDecode dumps a namespace with one of each. With -capture it writes
// what came as the seeds of the decoders' tests.
func TestMessagesOfThisKernelDecode(t *testing.T) {
	vethNS(t)
	force(t, zooSetup+"\nlink add br0 type bridge\nlink set b1 master br0\nlink add vl7 link a0 type vlan id 7\naddr add 10.7.0.1 peer 10.7.0.2 dev a0")
	for _, line := range append(slices.Clone(zoo), ruleZoo...) {
		_, _ = tryIP(line)
	}
	_, _ = tryIP("-6 route add 2001:db8:e::/48 via fd00:a::2 expires 1000")
	_, _ = tryIP("route add blackhole 198.18.20.0/24\nroute add throw 198.18.21.0/24\nnexthop add id 31 blackhole")
	var b strings.Builder
	var d Decoder
	decoded := 0
	keep := func(h Header, data []byte) error {
		fmt.Fprintf(&b, "%d %x\n", h.Type, data)
		ev, err := d.Decode(h, data)
		if err != nil {
			t.Errorf("type %d: %v\n%x", h.Type, err, data)
		}
		if ev != nil {
			decoded++
		}
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
	if least := len(zoo) + len(ruleZoo); decoded < least {
		t.Errorf("%d messages, fewer than the %d routes and rules that were added", decoded, least)
	}
	if !*capture {
		return
	}
	if err := os.WriteFile("testdata/messages.txt", []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}
