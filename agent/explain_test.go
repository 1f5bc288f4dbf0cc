package agent

import (
	"net/netip"
	"slices"
	"testing"
)

// TestExplainCountsIPsecInIPsec: the way to the peer leads into an xfrm interface, which takes the ESP
// packets once more.
func TestExplainCountsIPsecInIPsec(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	peer := netip.MustParseAddr("10.2.0.9")
	inner, outer := policy(17, "10.1.0.0/16", "10.3.0.0/16", 0), *sa(0x200, 0).SA
	inner.Policy.Templates = slices.Clone(inner.Policy.Templates)
	inner.Policy.Templates[0].Dst, outer.Dst, outer.Key.Dst = peer, peer, peer
	w.start(tunnelPolicy, tunnelSA, inner, xfrmSA(outer))

	e, err := w.a.explain(Question{Dst: netip.MustParseAddr("10.3.0.1"), From: netip.MustParseAddr("10.1.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	// 1500 less ESP is 1446, and that less ESP 1390.
	if e.MTU != 1390 || e.Coverage == nil || e.Coverage.MTU != e.MTU || len(e.Costs) != 1 || e.Costs[0].MTU != 1446 || e.Costs[0].Inner != e.MTU {
		t.Errorf("explanation %+v, coverage %+v", e, e.Coverage)
	}
}
