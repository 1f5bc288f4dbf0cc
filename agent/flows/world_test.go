package flows

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"tsoagent/xfrmwatch"
)

// TestPoliciesAgreeWithTheMirror compares the index with the linear lookup.
func TestPoliciesAgreeWithTheMirror(t *testing.T) {
	prefixes := []string{"0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "10.2.0.0/16", "::/0", "fd01::/16", "fd01::1/128"}
	addrs := []string{"10.1.1.1", "10.1.1.2", "10.2.0.1", "192.0.2.1", "fd01::1", "fd01::2", "fd02::1"}
	rapid.Check(t, func(t *rapid.T) {
		db := xfrmwatch.NewDB()
		for i := range rapid.IntRange(0, 60).Draw(t, "policies") {
			p := policy(xfrmwatch.PolicyIndex(8*i+1), rapid.Uint32Range(1, 3).Draw(t, "priority"),
				rapid.SampledFrom(prefixes).Draw(t, "src"), rapid.SampledFrom(prefixes).Draw(t, "dst"))
			if p.Selector.Src.Addr().Is4() != p.Selector.Dst.Addr().Is4() {
				continue
			}
			p.Dir = rapid.SampledFrom([]xfrmwatch.Dir{xfrmwatch.Out, xfrmwatch.Out, xfrmwatch.Out, xfrmwatch.In}).Draw(t, "dir")
			p.IfID = rapid.Uint32Range(0, 1).Draw(t, "if_id")
			p.Mark = rapid.SampledFrom([]xfrmwatch.Mark{{}, {}, {Value: 1, Mask: 1}}).Draw(t, "mark")
			p.Selector.Dport = rapid.SampledFrom([]xfrmwatch.PortMatch{{}, {}, {Port: 179, Mask: 0xffff}}).Draw(t, "dport")
			p.Selector.Ifindex = rapid.SampledFrom([]int32{0, 0, 0, 2}).Draw(t, "dev")
			db.Apply(xfrmwatch.PolicySet{Policy: p})
		}
		x := NewPolicies(slices.Collect(db.Policies()))
		for range 20 {
			f := xfrmwatch.Flow{
				Src: netip.MustParseAddr(rapid.SampledFrom(addrs).Draw(t, "from")), Dst: netip.MustParseAddr(rapid.SampledFrom(addrs).Draw(t, "to")),
				Proto: protoTCP, Dport: rapid.SampledFrom([]uint16{179, 443}).Draw(t, "port"),
				Mark: rapid.Uint32Range(0, 1).Draw(t, "flow mark"), IfID: rapid.Uint32Range(0, 1).Draw(t, "flow if_id"), Oif: rapid.Int32Range(0, 2).Draw(t, "oif"),
			}
			want, _ := db.Lookup(f, xfrmwatch.Out)
			if got := x.Lookup(f); got != want {
				t.Fatalf("%+v: got %+v, want %+v", f, got, want)
			}
		}
	})
}
