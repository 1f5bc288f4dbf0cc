package agent

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"tsoagent/xfrmwatch"
)

// A policy that takes other destinations has no peers any more that it had before. What is remembered of them ends with
// the policy all the same, and another one that gets its index has nothing of it.
func TestPeersOfEarlierSelectorsAreForgottenWithThePolicy(t *testing.T) {
	split := func(dst string) xfrmwatch.PolicySet {
		p := *policy(17, "10.1.0.0/16", dst, 0).Policy
		p.Templates = append([]xfrmwatch.Template{{
			Src: netip.IPv4Unspecified(), Dst: netip.IPv4Unspecified(), Family: xfrmwatch.IPv4,
			Proto: xfrmwatch.ESP, Mode: xfrmwatch.Transport, Reqid: 5,
		}}, p.Templates...)
		return xfrmwatch.PolicySet{Policy: &p}
	}
	inner := *sa(0x201, 0).SA
	inner.Src, inner.Dst, inner.Mode, inner.Reqid = netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.3.0.7"), xfrmwatch.Transport, 5
	inner.Key.Dst = inner.Dst
	peer := xfrmwatch.CoverageID{Policy: 17, Peer: inner.Dst}

	w := newWorld(t, Config{})
	w.start(split("10.3.0.0/16"), sa(0x200, 0), xfrmwatch.SASet{SA: &inner})
	if w.a.st.last[peer] == 0 || !slices.Contains(w.ids(), mtuID(peer)) {
		t.Fatalf("of the peer nothing is remembered: %v, %v", w.a.st.last, w.ids())
	}
	w.xfrm(split("10.4.0.0/16"))
	w.settle()
	w.xfrm(gone(split("10.4.0.0/16")))
	w.settle()
	w.advance(time.Minute)
	if len(w.a.st.last) > 0 || len(w.a.st.booked) > 0 || len(w.a.st.lastPeers) > 0 || slices.Contains(w.ids(), mtuID(peer)) {
		t.Errorf("of a policy that went away it is remembered %v, %v, %v", w.a.st.last, w.a.st.lastPeers, w.ids())
	}
}
