package routes

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestFullDumpTellsWhatDiffers: a dump that is taken to be sure costs those who follow the mirror no more than what it finds.
func TestFullDumpTellsWhatDiffers(t *testing.T) {
	var in Interner
	route := func(dst string, oif Ifindex) Route { return parsed(t, &in, dst, oif) }
	link := func(i Ifindex, mtu int) LinkSet {
		return LinkSet{Link: &Link{Index: i, Name: "eth0", MTU: mtu, Up: true}}
	}
	rule := func() RuleSet {
		return RuleSet{Rule: &Rule{Family: IPv4, Priority: 32766, Action: RuleToTable, Table: TableMain, SuppressPrefixLen: -1, SuppressIfgroup: -1}}
	}
	addr := AddrSet{Addr: Addr{Ifindex: 2, Prefix: netip.MustParsePrefix("192.0.2.1/24")}}
	world := func(routes ...Route) []Event {
		out := []Event{link(2, 1500), link(3, 1500), rule(), addr}
		for _, r := range routes {
			out = append(out, RouteSet{Route: r})
		}
		return out
	}
	a, b, c, six := route("10.1.0.0/16", 2), route("10.2.0.0/16", 2), route("10.2.0.0/16", 3), route("fd00::/48", 2)
	dst := func(s string) Change {
		p := netip.MustParsePrefix(s)
		return Change{Family: FamilyOf(p.Addr()), Dst: p, Table: TableMain}
	}
	for name, tt := range map[string]struct {
		now  []Event
		want []Change
	}{
		"the same":       {world(a, b, six), nil},
		"one moved":      {world(a, c, six), []Change{dst("10.2.0.0/16")}},
		"one is gone":    {world(b, six), []Change{dst("10.1.0.0/16")}},
		"the last of v6": {world(a, b), []Change{dst("fd00::/48")}},
		"one came":       {world(a, b, six, route("10.3.0.0/16", 2)), []Change{dst("10.3.0.0/16")}},
		"another MTU":    {append(world(a, b, six), link(3, 1400)), []Change{{All: true}}},
		"another rule":   {append(world(a, b, six), RuleSet{Rule: &Rule{Family: IPv6, Priority: 1}}), []Change{{All: true}}},
		"a nexthop":      {append(world(a, b, six), NexthopSet{Nexthop: &NexthopObject{ID: 1}}), []Change{{All: true}}},
		"no address":     {slices.Delete(world(a, b, six), 3, 4), []Change{{All: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			f := NewFIB()
			dump := func(events []Event) {
				f.Apply(ResyncBegin{})
				for _, ev := range events {
					f.Apply(ev)
				}
				f.Apply(ResyncEnd{})
			}
			dump(world(a, b, six))
			links, rules := f.Links(), f.Rules(IPv4)
			var got []Change
			f.OnChange(func(c Change) { got = append(got, c) })
			dump(tt.now)
			if diff := cmp.Diff(tt.want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if all := len(tt.want) > 0 && tt.want[0].All; !all && (!slices.Equal(links, f.Links()) || !slices.Equal(rules, f.Rules(IPv4))) {
				t.Error("what is equal is known by another pointer now")
			}
		})
	}
}

// parsed is a route of table main by a device.
func parsed(t *testing.T, in *Interner, dst string, oif Ifindex) Route {
	t.Helper()
	p := netip.MustParsePrefix(dst)
	h := make([]byte, rtmsgLen)
	h[0], h[1], h[4], h[5], h[7] = byte(FamilyOf(p.Addr())), byte(p.Bits()), 254, 4, 1
	r, err := in.ParseRoute(raw(h, attr32(rtaTable, 254), attr(rtaDst, p.Addr().AsSlice()...), attr32(rtaOif, uint32(oif))))
	if err != nil {
		t.Fatal(err)
	}
	return r
}
