package routes

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// mirrorOf is a mirror with these routes and rules.
func mirrorOf(rs []Route, rules []*Rule) *FIB {
	f := NewFIB()
	f.Apply(ResyncBegin{})
	for _, r := range rules {
		f.Apply(RuleSet{Rule: r})
	}
	for _, r := range rs {
		f.Apply(RouteSet{Route: r})
	}
	f.Apply(ResyncEnd{})
	return f
}

// routeTo is a route with one nexthop; the raw bytes tell it from all others.
func routeTo(dst string, table TableID, typ Type, oif Ifindex, metric uint32) Route {
	p := netip.MustParsePrefix(dst)
	b := Body{
		Family: FamilyOf(p.Addr()), Table: table, Type: typ, Protocol: ProtoStatic, Priority: metric,
		Raw: fmt.Sprintf("table %d type %d dev %d metric %d", table, typ, oif, metric),
	}
	if typ == Unicast {
		b.Nexthops = []Nexthop{{Oif: oif}}
	}
	return Route{p, NewBody(b)}
}

var smallPrefixes = []string{
	"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/15", "10.0.0.0/16", "10.1.0.0/16", "10.0.0.0/30", "10.0.0.0/31", "10.0.0.1/32", "10.0.0.2/32",
}

// lastIn is the last address of a prefix.
func lastIn(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func smallAddrs() []netip.Addr {
	var out []netip.Addr
	for _, s := range append(slices.Clone(smallPrefixes), "192.168.0.0/16", "192.168.1.0/24") {
		p := netip.MustParsePrefix(s)
		out = append(out, p.Addr(), lastIn(p))
	}
	return out
}

func genRoutes(t *rapid.T) []Route {
	var rs []Route
	for range rapid.IntRange(0, 8).Draw(t, "routes") {
		rs = append(rs, routeTo(
			rapid.SampledFrom(smallPrefixes).Draw(t, "dst"),
			rapid.SampledFrom([]TableID{TableMain, TableMain, 100, 200}).Draw(t, "table"),
			rapid.SampledFrom([]Type{Unicast, Unicast, Unicast, Throw, Blackhole}).Draw(t, "type"),
			Ifindex(rapid.IntRange(2, 3).Draw(t, "oif")), rapid.Uint32Range(0, 1).Draw(t, "metric")))
	}
	return rs
}

// longest finds the routes to one address by looking at all of them.
func longest(f *FIB, table TableID, dst netip.Addr) (netip.Prefix, []*Body) {
	var best netip.Prefix
	var bodies []*Body
	for r := range f.Table(IPv4, table) {
		if !r.Dst.Contains(dst) || best.IsValid() && r.Dst.Bits() < best.Bits() {
			continue
		}
		if r.Dst != best {
			best, bodies = r.Dst, nil
		}
		bodies = append(bodies, r.Body)
	}
	return best, bodies
}

// within finds what Containing and Inside together say about one address.
func within(containing Match, inside []Match, dst netip.Addr) Match {
	best := containing
	for _, m := range inside {
		if m.Dst.Contains(dst) && (best.Paths == nil || m.Dst.Bits() > best.Dst.Bits()) {
			best = m
		}
	}
	return best
}

// TestCoverSaysWhatEachAddressFinds compares the lookup of a whole prefix with those of its
// addresses.
func TestCoverSaysWhatEachAddressFinds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := mirrorOf(genRoutes(t), nil)
		prefix := netip.MustParsePrefix(rapid.SampledFrom(smallPrefixes).Draw(t, "prefix"))
		containing, seq := f.Cover(IPv4, TableMain, prefix)
		inside := slices.Collect(seq)
		for _, m := range inside {
			if m.Dst == prefix || !Contains(prefix, m.Dst) {
				t.Fatalf("%s is not strictly inside %s", m.Dst, prefix)
			}
		}
		for _, a := range smallAddrs() {
			if !prefix.Contains(a) {
				continue
			}
			dst, bodies := longest(f, TableMain, a)
			if got := within(containing, inside, a); got.Paths != nil && got.Dst != dst || !slices.Equal(got.Paths.Bodies(), bodies) {
				t.Fatalf("%s in %s: %s %v, but the longest is %s %v", a, prefix, got.Dst, got.Paths.Bodies(), dst, bodies)
			}
		}
	})
}

func genRule(t *rapid.T, priority uint32) *Rule {
	r := &Rule{
		Family: IPv4, Priority: priority, Action: RuleToTable, SuppressPrefixLen: -1, SuppressIfgroup: -1,
		Table: rapid.SampledFrom([]TableID{TableMain, 100, 200}).Draw(t, "table"),
	}
	some := func(n int) bool { return rapid.IntRange(0, n).Draw(t, "some") == 0 }
	if some(2) {
		r.Src = netip.MustParsePrefix(rapid.SampledFrom([]string{"192.168.0.0/16", "192.168.1.0/24", "10.0.0.0/8"}).Draw(t, "src"))
	}
	if some(2) {
		r.Dst = netip.MustParsePrefix(rapid.SampledFrom(smallPrefixes).Draw(t, "to"))
	}
	if some(3) {
		r.Mark, r.Mask = rapid.Uint32Range(0, 3).Draw(t, "mark"), rapid.Uint32Range(1, 3).Draw(t, "mask")
	}
	if some(4) {
		r.IPProto = 6
	}
	if some(4) {
		r.Dport = PortRange{80, rapid.SampledFrom([]uint16{80, 443}).Draw(t, "hi")}
	}
	if some(8) {
		r.Invert = true
	}
	if some(8) {
		r.HasUID, r.UIDLo, r.UIDHi = true, 1000, 1000
	}
	if some(8) {
		r.SuppressPrefixLen = 15
	}
	switch rapid.IntRange(0, 9).Draw(t, "action") {
	case 0:
		r.Action, r.Table = RuleBlackhole, 0
	case 1:
		r.Action, r.Table, r.Goto = RuleGoto, 0, rapid.SampledFrom([]uint32{3, 5, 7}).Draw(t, "goto")
	case 2:
		r.Action, r.Table = RuleNop, 0
	}
	return r
}

// TestResolveFindsTheRuleThatDecides walks the rules for single packets, as the kernel does, and
// looks whether Resolve foresaw the rule and the route that decide. A packet that a rule with
// selectors that can't be repeated may take has to be in a blocked part.
func TestResolveFindsTheRuleThatDecides(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var rules []*Rule
		for i := range rapid.IntRange(0, 5).Draw(t, "rules") {
			rules = append(rules, genRule(t, uint32(2*i+1)))
		}
		rules = append(rules, &Rule{Family: IPv4, Priority: 32766, Action: RuleToTable, Table: TableMain, SuppressPrefixLen: -1, SuppressIfgroup: -1})
		f := mirrorOf(genRoutes(t), rules)
		flows := Flows{
			Family: IPv4, Src: netip.MustParsePrefix(rapid.SampledFrom([]string{"0.0.0.0/0", "192.168.0.0/16", "192.168.1.0/24"}).Draw(t, "src")),
			Dst: netip.MustParsePrefix(rapid.SampledFrom(smallPrefixes).Draw(t, "dst")), Proto: rapid.SampledFrom([]uint8{0, 6}).Draw(t, "proto"),
			Mask: rapid.SampledFrom([]uint32{0, 1, 3}).Draw(t, "mask"),
		}
		flows.Mark = rapid.Uint32Range(0, 3).Draw(t, "mark") & flows.Mask
		parts := f.Resolve(flows, func(*Rule) bool { return false })
		for _, dst := range smallAddrs() {
			for _, src := range smallAddrs() {
				p := probe{src: src, dst: dst, proto: 6, dport: rapid.SampledFrom([]uint16{80, 443, 9}).Draw(t, "dport"), mark: rapid.Uint32Range(0, 3).Draw(t, "m")}
				if p.in(flows) {
					p.compare(t, f, parts)
				}
			}
		}
	})
}

type probe struct {
	src, dst netip.Addr
	proto    uint8
	dport    uint16
	mark     uint32
	uid      uint32
}

func (p probe) in(f Flows) bool {
	return f.Src.Contains(p.src) && f.Dst.Contains(p.dst) && (f.Proto == 0 || f.Proto == p.proto) &&
		(f.Dport.Any() || f.Dport.Lo <= p.dport && p.dport <= f.Dport.Hi) && (p.mark^f.Mark)&f.Mask == 0
}

func (p probe) matches(r *Rule) bool {
	all := (!r.Src.IsValid() || r.Src.Contains(p.src)) && (!r.Dst.IsValid() || r.Dst.Contains(p.dst)) &&
		(p.mark^r.Mark)&r.Mask == 0 && (r.IPProto == 0 || r.IPProto == p.proto) &&
		(r.Dport.Any() || r.Dport.Lo <= p.dport && p.dport <= r.Dport.Hi) && (!r.HasUID || r.UIDLo <= p.uid && p.uid <= r.UIDHi)
	return all != r.Invert
}

func (p probe) compare(t *rapid.T, f *FIB, parts []Part) {
	rules := f.Rules(IPv4)
	for i := 0; i < len(rules); i++ {
		r := rules[i]
		if !p.matches(r) || r.Action == RuleNop {
			continue
		}
		if r.Action == RuleGoto {
			if slices.ContainsFunc(parts, func(part Part) bool { return part.Rule == r && part.Blocked != "" }) {
				return // where a part of the flows jumps to is not followed, and said so
			}
			if to := slices.IndexFunc(rules, func(o *Rule) bool { return o.Priority == r.Goto }); to > i {
				i = to - 1
			}
			continue
		}
		var want []*Body
		if r.Action == RuleToTable {
			var dst netip.Prefix
			dst, want = longest(f, r.Table, p.dst)
			if len(want) == 0 || want[0].Type == Throw || int32(dst.Bits()) <= r.SuppressPrefixLen && !want[0].Type.fails() {
				continue
			}
		}
		at := slices.IndexFunc(parts, func(part Part) bool { return part.Rule == r })
		if at < 0 {
			t.Fatalf("%+v is decided by rule %+v, which is in no part of\n%s", p, *r, describeParts(parts))
		}
		part := parts[at]
		if part.Blocked == "" && !p.in(part.Flows) {
			t.Fatalf("%+v is decided by rule %+v, but not in its flows %+v", p, *r, part.Flows)
		}
		if got := within(part.Containing, slices.Collect(part.Inside), p.dst); !slices.Equal(got.Paths.Bodies(), want) {
			t.Fatalf("%+v finds %v by rule %+v, not %v", p, want, *r, got.Paths.Bodies())
		}
		return
	}
}

func describeParts(parts []Part) (s string) {
	for _, p := range parts {
		s += fmt.Sprintf("rule %+v: flows %+v whole %t blocked %q containing %s\n", *p.Rule, p.Flows, p.Whole, p.Blocked, p.Containing.Dst)
	}
	return s
}

// TestGotoWithoutATargetIsPassedOver: the kernel takes a goto to the first rule with just that
// priority and passes over one that has no target.
func TestGotoWithoutATargetIsPassedOver(t *testing.T) {
	main := func(priority uint32, table TableID) *Rule {
		return &Rule{Family: IPv4, Priority: priority, Action: RuleToTable, Table: table, SuppressPrefixLen: -1, SuppressIfgroup: -1}
	}
	jump := main(1, 0)
	jump.Action, jump.Goto = RuleGoto, 30
	f := mirrorOf([]Route{routeTo("10.0.0.0/8", 100, Unicast, 2, 0), routeTo("10.0.0.0/8", TableMain, Unicast, 3, 0)},
		[]*Rule{jump, main(20, 100), main(40, TableMain)})
	all := Flows{Family: IPv4, Src: IPv4.Any(), Dst: netip.MustParsePrefix("10.0.0.0/8")}
	parts := f.Resolve(all, func(*Rule) bool { return false })
	if len(parts) != 1 || parts[0].Rule.Priority != 20 {
		t.Errorf("parts %+v, want one of rule 20", parts)
	}
}

// TestInvertedRulesForDevices: a rule for sockets bound to a device, or for VRFs, takes all others where
// it is inverted, and the one for VRFs leads them to table main.
func TestInvertedRulesForDevices(t *testing.T) {
	last := &Rule{Family: IPv4, Priority: 20, Action: RuleToTable, Table: 100, SuppressPrefixLen: -1, SuppressIfgroup: -1}
	for name, r := range map[string]Rule{
		"oif":    {Oif: "eth9", Table: TableMain},
		"l3mdev": {L3mdev: true},
	} {
		r.Family, r.Priority, r.Action, r.SuppressPrefixLen, r.SuppressIfgroup = IPv4, 10, RuleToTable, -1, -1
		for _, r.Invert = range []bool{false, true} {
			f := mirrorOf([]Route{routeTo("0.0.0.0/0", TableMain, Unicast, 2, 0), routeTo("0.0.0.0/0", 100, Unicast, 3, 0)}, []*Rule{&r, last})
			parts := f.Resolve(Flows{Family: IPv4, Src: IPv4.Any(), Dst: netip.MustParsePrefix("10.0.0.1/32")}, func(*Rule) bool { return false })
			if took := len(parts) > 0 && parts[0].Rule == &r && parts[0].Blocked == "not" && parts[0].Containing.Paths != nil; took != r.Invert {
				t.Errorf("%s, inverted %t: %s", name, r.Invert, describeParts(parts))
			}
		}
	}
}

// TestSuppressedAreWaysOnly: suppress_prefixlength passes over a default route, but not over one that is
// an error, whichever of them the packet finds.
func TestSuppressedAreWaysOnly(t *testing.T) {
	rule := func(priority uint32, table TableID, suppress int32) *Rule {
		return &Rule{Family: IPv4, Priority: priority, Action: RuleToTable, Table: table, SuppressPrefixLen: suppress, SuppressIfgroup: -1}
	}
	withTOS := routeTo("0.0.0.0/0", TableMain, Throw, 0, 0)
	withTOS.Body.TOS = 0x10
	for name, c := range map[string]struct {
		routes []Route
		want   uint32 // the priority of the rule that decides
	}{
		"a way":               {[]Route{routeTo("0.0.0.0/0", TableMain, Unicast, 2, 0)}, 20},
		"an error":            {[]Route{routeTo("0.0.0.0/0", TableMain, Unreachable, 0, 0)}, 10},
		"a way for one TOS":   {[]Route{{netip.MustParsePrefix("10.0.0.0/8"), withTOS.Body}, routeTo("0.0.0.0/0", TableMain, Unreachable, 0, 0)}, 10},
		"an error for no TOS": {[]Route{withTOS, routeTo("0.0.0.0/0", TableMain, Unreachable, 0, 0)}, 10},
	} {
		f := mirrorOf(append(c.routes, routeTo("0.0.0.0/0", 100, Unicast, 3, 0)), []*Rule{rule(10, TableMain, 8), rule(20, 100, -1)})
		parts := f.Resolve(Flows{Family: IPv4, Src: IPv4.Any(), Dst: netip.MustParsePrefix("10.0.0.1/32")}, func(*Rule) bool { return false })
		if len(parts) == 0 || parts[0].Rule.Priority != c.want {
			t.Errorf("%s: %s want rule %d", name, describeParts(parts), c.want)
		}
	}
}

// BenchmarkResolve looks up whole prefixes in a table of a million routes.
func BenchmarkResolve(b *testing.B) {
	if testing.Short() {
		b.Skip("builds a table of a million routes")
	}
	body := routeTo("0.0.0.0/0", TableMain, Unicast, 2, 0).Body
	f := mirrorOf(nil, []*Rule{{Family: IPv4, Priority: 32766, Action: RuleToTable, Table: TableMain, SuppressPrefixLen: -1, SuppressIfgroup: -1}})
	for i := range 1_000_000 {
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(16 + i>>16), byte(i >> 8), byte(i), 0}), 24)
		f.Apply(RouteSet{Route: Route{dst, body}})
	}
	for _, dst := range []string{"20.1.2.0/24", "20.1.0.0/16", "9.0.0.0/8"} {
		b.Run(dst[:len(dst)-3]+"-"+dst[len(dst)-2:], func(b *testing.B) {
			flows := Flows{Family: IPv4, Src: IPv4.Any(), Dst: netip.MustParsePrefix(dst)}
			b.ReportAllocs()
			for b.Loop() {
				n := 0
				for _, part := range f.Resolve(flows, func(*Rule) bool { return false }) {
					for range part.Inside {
						n++
					}
				}
			}
		})
	}
}
