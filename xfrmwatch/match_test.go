package xfrmwatch

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestSelectorMatch(t *testing.T) {
	base := selector("10.0.0.0/8", "192.0.2.0/24")
	web := base
	web.Proto, web.Dport = 6, PortMatch{443, 0xffff}
	portless := base
	portless.Proto, portless.Dport = 50, PortMatch{443, 0xffff}
	v6 := selector("::/0", "::/0")
	flow := Flow{Src: addr("10.1.2.3"), Dst: addr("192.0.2.1"), Proto: 6, Sport: 40000, Dport: 443}
	esp := flow
	esp.Proto = 50
	for _, tt := range []struct {
		name string
		sel  Selector
		flow Flow
		want bool
	}{
		{"prefixes", base, flow, true},
		{"ports", web, flow, true},
		{"other protocol", web, esp, false},
		{"a protocol without ports has port 0", portless, esp, false},
		{"family", v6, flow, false},
		{"no family", Selector{}, flow, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.sel.Match(tt.flow); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// someFlows visits flows over a part of the generators' addresses, and all of their protocols,
// ports and devices.
func someFlows(f Family, visit func(Flow)) {
	var addrs []netip.Addr
	for _, a := range [][2]byte{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {3, 3}} {
		if f == IPv4 {
			addrs = append(addrs, addr4(10, a[0], 0, a[1]))
		} else {
			addrs = append(addrs, addr6(a[0], a[1]))
		}
	}
	for _, src := range addrs {
		for _, dst := range addrs {
			for _, proto := range []Proto{6, 17, 50, 135} {
				for port := range uint16(16) {
					for oif := range int32(2) {
						visit(Flow{Src: src, Dst: dst, Proto: proto, Sport: port & 3, Dport: port >> 2, Oif: oif})
					}
				}
			}
		}
	}
}

func TestSelectorsAgreeWithFlows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := genFamily().Draw(t, "family")
		gen := genSelector(f).Filter(func(s Selector) bool { return s.Proto != 1 })
		a, b := gen.Draw(t, "a"), gen.Draw(t, "b")
		both, onlyB := false, false
		someFlows(f, func(fl Flow) {
			ma, mb := a.Match(fl), b.Match(fl)
			both = both || ma && mb
			onlyB = onlyB || mb && !ma
		})
		seen := both || onlyB // else b's addresses are not among the flows
		if got := a.Overlaps(b); got != b.Overlaps(a) || both && !got || got && onlyB && !both &&
			a.Src.Contains(b.Src.Addr()) && a.Dst.Contains(b.Dst.Addr()) {
			t.Errorf("Overlaps %v, a flow that matches both: %v\n%+v\n%+v", got, both, a, b)
		}
		got := a.Contains(b)
		if got && onlyB {
			t.Errorf("Contains, but a flow matches b alone\n%+v\n%+v", a, b)
		}
		// Longer prefixes may hold all of b's addresses that are among the flows.
		if seen && !got && !onlyB && a.Src.Bits() <= b.Src.Bits() && a.Dst.Bits() <= b.Dst.Bits() {
			t.Errorf("not Contains, but each flow of b matches a\n%+v\n%+v", a, b)
		}
	})
}

func TestMarksAgreeWithValues(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := genMark().Draw(t, "a"), genMark().Draw(t, "b")
		both, onlyB := false, false
		for v := range uint32(4) {
			both = both || a.match(v) && b.match(v)
			onlyB = onlyB || b.match(v) && !a.match(v)
		}
		if got := a.overlaps(b); got != both {
			t.Errorf("overlaps %v, want %v", got, both)
		}
		if got := a.contains(b); got == onlyB {
			t.Errorf("contains %v, want %v", got, !onlyB)
		}
	})
}

func TestShadowsMeansNoFlowIsLeft(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, q := genPolicy().Draw(t, "p"), genPolicy().Draw(t, "q")
		flow := genFlow(q.Selector.Family).Draw(t, "flow")
		sameLookup := p.Dir == q.Dir && p.Sub == q.Sub
		if p.Shadows(q) && q.Match(flow) && !p.Match(flow) {
			t.Errorf("q alone matches %+v", flow)
		}
		if sameLookup && p.Match(flow) && q.Match(flow) && !PoliciesOverlap(p, q) {
			t.Errorf("both match %+v", flow)
		}
		if p.Shadows(q) && !PoliciesOverlap(p, q) && !q.Selector.empty() && !q.Mark.empty() {
			t.Error("shadows without overlap")
		}
	})
}

func TestLookupTakesThePreferred(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var db DB
		db.Apply(ResyncBegin{})
		db.Apply(ResyncEnd{})
		oracle := map[PolicyIndex]*Policy{}
		var order []PolicyIndex // by age
		for _, p := range rapid.SliceOfN(genPolicy(), 1, 12).Draw(t, "policies") {
			db.Apply(PolicySet{Policy: p})
			order = slices.DeleteFunc(order, func(i PolicyIndex) bool { return i == p.Index })
			order = append(order, p.Index)
			oracle[p.Index] = p
		}
		flow := genFlow(genFamily().Draw(t, "family")).Draw(t, "flow")
		var want *Policy
		matching := 0
		for _, i := range order {
			p := oracle[i]
			if p.Dir != Out || p.Sub || !p.Match(flow) {
				continue
			}
			matching++
			if want == nil || p.Priority < want.Priority {
				want = p
			}
		}
		got, losers := db.Lookup(flow, Out)
		if (got == nil) != (want == nil) || got != nil && !got.Equal(want) {
			t.Fatalf("got %+v, want %+v", got, want)
		}
		if n := len(losers); n != max(matching-1, 0) {
			t.Errorf("%d losers of %d matching", n, matching)
		}
	})
}
