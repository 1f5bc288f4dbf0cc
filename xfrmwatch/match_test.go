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

// ends are the first and the last address of prefixes. If two prefixes overlap, or one is not
// inside the other, one of these addresses shows it.
func ends(prefixes ...netip.Prefix) (addrs []netip.Addr) {
	for _, p := range prefixes {
		last := p.Addr().AsSlice()
		for i := p.Bits(); i < 8*len(last); i++ {
			last[i/8] |= 0x80 >> (i % 8)
		}
		a, _ := netip.AddrFromSlice(last)
		addrs = append(addrs, p.Addr(), a)
	}
	return addrs
}

func TestSelectorsAgreeWithFlows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := genFamily().Draw(t, "family")
		a, b := genSelector(f).Draw(t, "a"), genSelector(f).Draw(t, "b")
		both, onlyB := false, false
		for _, src := range ends(a.Src, b.Src) {
			for _, dst := range ends(a.Dst, b.Dst) {
				for _, proto := range []Proto{1, 6, 17, 50, 135} {
					for port := range uint16(16) {
						for oif := range int32(2) {
							fl := Flow{Src: src, Dst: dst, Proto: proto, Sport: port & 3, Dport: port >> 2, Oif: oif}
							ma, mb := a.Match(fl), b.Match(fl)
							both = both || ma && mb
							onlyB = onlyB || mb && !ma
						}
					}
				}
			}
		}
		if a.Overlaps(b) != both || b.Overlaps(a) != both {
			t.Errorf("Overlaps %v and %v, want %v\n%+v\n%+v", a.Overlaps(b), b.Overlaps(a), both, a, b)
		}
		if got := a.Contains(b); got == onlyB {
			t.Errorf("Contains %v, want %v\n%+v\n%+v", got, !onlyB, a, b)
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
