package bench

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWorldHasItsSizeAndNothingTwice(t *testing.T) {
	size := FullSize.Scaled(0.02)
	w := NewWorld(size)
	var got Size
	routes := map[netip.Prefix]bool{}
	for _, r := range w.Routes {
		if r.Dst.Addr().Is4() {
			got.Routes4++
		} else {
			got.Routes6++
		}
		if routes[r.Dst] || r.Dst != r.Dst.Masked() {
			t.Fatalf("%s is there twice, or has bits behind its length", r.Dst)
		}
		routes[r.Dst] = true
	}
	type selector struct{ src, dst netip.Prefix }
	policies, peers, public := map[selector]bool{}, map[netip.Addr]bool{}, 0
	for _, p := range w.Policies {
		policies[selector{p.Src, p.Dst}] = true
		peers[p.Peer] = true
		if routes[p.Dst] {
			public++
		}
	}
	got.Policies = len(policies)
	if d := cmp.Diff(size, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if len(peers) != size.Policies || public != size.Policies/5 {
		t.Errorf("%d peers, %d policies for nets of the table, of %d", len(peers), public, size.Policies)
	}
}

func TestWorldIsAlwaysTheSame(t *testing.T) {
	size := FullSize.Scaled(0.001)
	same := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	addr := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if d := cmp.Diff(NewWorld(size), NewWorld(size), same, addr); d != "" {
		t.Error(d)
	}
}

// A storm changes each route, also against the storm before it, or the kernel would tell nothing of it.
func TestStormChangesEachRoute(t *testing.T) {
	w := NewWorld(FullSize.Scaled(0.0001))
	before := w.Routes
	for i := range 3 * gateways {
		after := replaced(w.Routes, gatewayOf(i))
		for k := range after {
			if after[k].Gateway == before[k].Gateway || after[k].Dst != before[k].Dst {
				t.Fatalf("storm %d leaves %v at %v", i, before[k], after[k])
			}
		}
		before = after
	}
}
