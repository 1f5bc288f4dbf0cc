package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// TestExplainInFull: the rule and the route, the SAs that lose, where segments are cut, and what would change the answer, in both families.
func TestExplainInFull(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.addRoute("fd02::/32", hop{oif: ipsec1})
	w.addRoute("::/0", hop{oif: 2})
	w.addRoute("198.51.100.0/24", hop{oif: 2})
	p6 := policy(25, "fd09::/64", "fd02::/32", 1)
	v6 := func(s xfrmwatch.SASet) xfrmwatch.SASet {
		c := *s.SA
		c.Src, c.Dst, c.Family, c.Reqid = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), xfrmwatch.IPv6, 9
		c.Key.Dst = c.Dst
		return xfrmwatch.SASet{SA: &c}
	}
	for i := range p6.Policy.Templates {
		tmpl := &p6.Policy.Templates[i]
		tmpl.Src, tmpl.Dst, tmpl.Family, tmpl.Reqid = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), xfrmwatch.IPv6, 9
	}
	// Two SAs while a rekey is under way: the one with CBC is older, and leaves less.
	narrow := policy(33, "10.1.0.0/16", "198.51.100.0/24", 0)
	narrow.Policy.Selector.Proto, narrow.Policy.Selector.Dport = 6, xfrmwatch.PortMatch{Port: 443, Mask: 0xffff}
	marked := policy(41, "10.8.0.0/16", "198.51.100.0/24", 3)
	marked.Policy.Mark = xfrmwatch.Mark{Value: 5, Mask: 0xff}
	w.start(tunnelPolicy, p6, narrow, marked, cbc(0x100, 1), sa(0x101, 1), v6(cbc(0x200, 1)), v6(sa(0x201, 1)))
	answers := map[string]*Explanation{}
	for name, q := range map[string]Question{
		"ipv4":           {Dst: netip.MustParseAddr("10.2.0.1"), From: netip.MustParseAddr("10.1.0.1")},
		"ipv6":           {Dst: netip.MustParseAddr("fd02::1"), From: netip.MustParseAddr("fd09::1")},
		"ipv4, missed":   {Dst: netip.MustParseAddr("198.51.100.1"), From: netip.MustParseAddr("10.1.0.1"), Proto: 6, Port: 80},
		"ipv6, in clear": {Dst: netip.MustParseAddr("fd03::1"), From: netip.MustParseAddr("fd09::1")},
	} {
		e, err := w.a.explain(q)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		answers[name] = e
	}
	golden(t, "explain-full.json", answers)
}

// TestExplainWithoutAnAgent: what is locked and held is only what one would do, and that is said.
func TestExplainWithoutAnAgent(t *testing.T) {
	w := coveredWorld(t)
	w.a.once = true
	e, err := w.a.explain(Question{Dst: netip.MustParseAddr("10.2.0.1"), From: netip.MustParseAddr("10.1.0.1")})
	if err != nil || e.Live || !slices.ContainsFunc(e.WouldChange, func(s string) bool { return strings.HasPrefix(s, "an agent (tsoagent run)") }) {
		t.Errorf("%+v, %v", e, err)
	}
}

// TestExplainTakesTheRouteForWhatItIs: a route with an MTU of its own caps what IPsec leaves, and a path that was learnt does.
func TestExplainTakesTheRouteForWhatItIs(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start(tunnelPolicy, tunnelSA)
	for _, tt := range []struct {
		ans  routes.Answer
		want int
	}{
		{routes.Answer{Oif: ipsec1, Table: routes.TableMain, MTU: 1300}, 1300},
		{routes.Answer{Oif: ipsec1, Table: routes.TableMain, PMTU: 1280, Expires: 9}, 1280},
		{routes.Answer{Oif: ipsec1, Table: routes.TableMain, MTU: 1480}, 1446},
	} {
		w.lookup = func(routes.Query) *routes.Answer { return &tt.ans }
		e, err := w.a.explain(Question{Dst: netip.MustParseAddr("10.2.0.1"), From: netip.MustParseAddr("10.1.0.1")})
		if err != nil || e.MTU != tt.want || e.MSS != tt.want-40 {
			t.Errorf("%+v: mtu %d, mss %d, %v", tt.ans, e.MTU, e.MSS, err)
		}
	}
}

// TestExplainAsksTheKernelOnlyForWhatItCanAnswer: of all protocols it takes few in a lookup (KERNEL.md), and refuses the others.
func TestExplainAsksTheKernelOnlyForWhatItCanAnswer(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start(tunnelPolicy, tunnelSA)
	w.lookup = func(q routes.Query) *routes.Answer {
		if q.IPProto != 0 && q.IPProto != unix.IPPROTO_TCP && q.IPProto != unix.IPPROTO_UDP {
			t.Errorf("the kernel was asked for protocol %d", q.IPProto)
		}
		return nil
	}
	for _, proto := range []uint8{0, 6, 17, 47} {
		if _, err := w.a.explain(Question{Dst: netip.MustParseAddr("10.2.0.1"), Proto: proto}); err != nil {
			t.Error(err)
		}
	}
}

// TestExplainWhatTheHostSendsToItself: IPv4 leaves the loopback device without IPsec, whatever policies say (disable_xfrm of lo), and IPv6
// doesn't. Seen on 6.18 by pings under a policy for everything that has no SA.
func TestExplainWhatTheHostSendsToItself(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	const lo = 1
	other := policy(33, "10.8.0.0/16", "0.0.0.0/0", 0)
	w.start(policy(17, "0.0.0.0/0", "0.0.0.0/0", 0), other, policy(25, "::/0", "::/0", 0))
	for _, tt := range []struct{ addr, action string }{{"192.0.2.1", "none"}, {"2001:db8::1", "ipsec"}} {
		a := netip.MustParseAddr(tt.addr)
		w.lookup = func(q routes.Query) *routes.Answer {
			ans := &routes.Answer{Type: routes.Local, Oif: lo, Table: routes.TableLocal, PrefSrc: a}
			if q.FibMatch {
				ans.Route = routes.Route{Dst: netip.PrefixFrom(a, a.BitLen()), Body: routes.NewBody(routes.Body{
					Family: q.Family, Table: routes.TableLocal, Type: routes.Local, Protocol: routes.ProtoKernel, Nexthops: []routes.Nexthop{{Oif: 2}},
				})}
			}
			return ans
		}
		e, err := w.a.explain(Question{Dst: a})
		if err != nil || e.Action != tt.action || e.Type != "local" || !strings.HasPrefix(e.Route, "local "+tt.addr) {
			t.Errorf("%s: %+v, %v", tt.addr, e, err)
			continue
		}
		if tt.action == "none" && (e.MTU != 65536 || len(e.WouldChange) > 0 || !slices.ContainsFunc(e.Notes, func(s string) bool { return strings.Contains(s, "disable_xfrm") })) {
			t.Errorf("%s: %+v", tt.addr, e)
		}
	}
}

// TestExplainWhatNeverLeaves: the kernel's error says which kind of route took the packets; only one of them is that there is none.
func TestExplainWhatNeverLeaves(t *testing.T) {
	for errno, want := range map[unix.Errno]string{
		unix.EINVAL: "a blackhole route or rule drops what goes to 10.2.0.1: ", unix.EACCES: "a prohibit route or rule refuses what goes to 10.2.0.1: ",
		unix.EHOSTUNREACH: "an unreachable route refuses what goes to 10.2.0.1: ", unix.ENETUNREACH: "the kernel finds no route to 10.2.0.1: ",
	} {
		q := routes.Query{Dst: netip.MustParseAddr("10.2.0.1")}
		err := noWay(q, fmt.Errorf("routes: look up: %w: %w", routes.ErrUnreachable, errno))
		if !strings.HasPrefix(err.Error(), want) || !errors.Is(err, routes.ErrUnreachable) {
			t.Errorf("%v: %v, want %s", errno, err, want)
		}
		q.Iif = 2 // a martian source is EINVAL, too
		if err = noWay(q, err); !strings.HasPrefix(err.Error(), "the kernel finds no route to 10.2.0.1: ") {
			t.Errorf("%v, forwarded: %v", errno, err)
		}
	}
}

// TestExplainAPolicyOfIPCompAlone: it is no coverage, and that is said.
func TestExplainAPolicyOfIPCompAlone(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	p := policy(17, "10.1.0.0/16", "10.3.0.0/16", 0)
	p.Policy.Templates = slices.Clone(p.Policy.Templates)
	p.Policy.Templates[0].Proto = xfrmwatch.Comp
	w.start(p)
	e, err := w.a.explain(Question{Dst: netip.MustParseAddr("10.3.0.1"), From: netip.MustParseAddr("10.1.0.1")})
	if err != nil || e.Policy != 17 || !slices.Contains(e.Notes, "policy 17 asks for neither ESP nor AH: what it does to the MTU is not known, and nothing is held off or locked for it") {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestMSSIsNeverNegative(t *testing.T) {
	for dst, mtu := range map[string]int{"10.2.0.1": 30, "fd02::1": 0} {
		var e Explanation
		if e.SetMTU(mtu, dst); e.MSS != 0 || e.MTU != mtu {
			t.Errorf("%s: MTU %d, MSS %d", dst, e.MTU, e.MSS)
		}
	}
}

func TestRuleOfALookup(t *testing.T) {
	w := tunnelWorld(t, Config{})
	w.start()
	for _, r := range []routes.Rule{
		{Priority: 10, Src: netip.MustParsePrefix("10.9.0.0/24"), Dst: netip.MustParsePrefix("10.3.0.0/16"), Table: 5450},
		{Priority: 20, Src: netip.MustParsePrefix("0.0.0.0/32"), Table: 5450},
		{Priority: 30, Iif: "nic1", Table: 77},
		{Priority: 40, Mark: 1, Mask: 1, IPProto: 6, Dport: routes.PortRange{Lo: 80, Hi: 90}, Table: 78},
		{Priority: 50, Src: netip.MustParsePrefix("10.8.0.0/16"), Invert: true, Table: 79},
		{Priority: 60, HasUID: true, UIDLo: 1000, UIDHi: 1000, Table: 79},
		{Priority: 70, Table: routes.TableMain, SuppressPrefixLen: 8}, // as wg-quick has it, with 0
	} {
		r.Family, r.Action, r.SuppressIfgroup = routes.IPv4, routes.RuleToTable, -1
		if r.SuppressPrefixLen == 0 {
			r.SuppressPrefixLen = -1
		}
		w.a.st.fib.Apply(routes.RuleSet{Rule: &r})
	}
	dst := netip.MustParseAddr("10.3.0.1")
	for _, tt := range []struct {
		q     routes.Query
		table routes.TableID
		bits  int
		want  uint32
	}{
		{routes.Query{Src: netip.MustParseAddr("10.9.0.1")}, 5450, 16, 10},
		{routes.Query{}, 5450, 16, 20},
		{routes.Query{Src: netip.MustParseAddr("10.7.0.1"), Iif: 2}, 77, 16, 30},
		{routes.Query{Mark: 3, IPProto: 6, Dport: 85}, 78, 16, 40},
		{routes.Query{Src: netip.MustParseAddr("10.7.0.1")}, 79, 16, 50},
		{routes.Query{Src: netip.MustParseAddr("10.8.0.1")}, routes.TableMain, 16, 70},
		{routes.Query{Src: netip.MustParseAddr("10.8.0.1")}, routes.TableMain, 8, 32766},
		{routes.Query{Src: netip.MustParseAddr("10.8.0.1")}, routes.TableMain, 0, 32766},
		{routes.Query{Src: netip.MustParseAddr("10.8.0.1")}, routes.TableMain, -1, 0}, // which route it is isn't known
		{routes.Query{Src: netip.MustParseAddr("10.8.0.1")}, 79, 16, 0},
	} {
		tt.q.Family, tt.q.Dst = routes.IPv4, dst
		got := uint32(0)
		if r := w.a.ruleFor(tt.q, tt.table, tt.bits); r != nil {
			got = r.Priority
		}
		if got != tt.want {
			t.Errorf("%+v to table %d: rule %d, want %d", tt.q, tt.table, got, tt.want)
		}
	}
}
