package agent

import (
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
	} {
		r.Family, r.Action, r.SuppressPrefixLen, r.SuppressIfgroup = routes.IPv4, routes.RuleToTable, -1, -1
		w.a.st.fib.Apply(routes.RuleSet{Rule: &r})
	}
	dst := netip.MustParseAddr("10.3.0.1")
	for _, tt := range []struct {
		q     routes.Query
		table routes.TableID
		want  uint32
	}{
		{routes.Query{Src: netip.MustParseAddr("10.9.0.1")}, 5450, 10},
		{routes.Query{}, 5450, 20},
		{routes.Query{Src: netip.MustParseAddr("10.7.0.1"), Iif: 2}, 77, 30},
		{routes.Query{Mark: 3, IPProto: 6, Dport: 85}, 78, 40},
		{routes.Query{Src: netip.MustParseAddr("10.7.0.1")}, 79, 50},
		{routes.Query{Src: netip.MustParseAddr("10.8.0.1")}, routes.TableMain, 32766},
		{routes.Query{Src: netip.MustParseAddr("10.8.0.1")}, 79, 0},
	} {
		tt.q.Family, tt.q.Dst = routes.IPv4, dst
		got := uint32(0)
		if r := w.a.ruleFor(tt.q, tt.table); r != nil {
			got = r.Priority
		}
		if got != tt.want {
			t.Errorf("%+v to table %d: rule %d, want %d", tt.q, tt.table, got, tt.want)
		}
	}
}
