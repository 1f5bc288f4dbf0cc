package routes

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// fakeKernel has routes of one family as the kernel keeps them, does what a request asks for
// and tells of it (fib_table_insert, net/ipv4/fib_trie.c; fib6_add_rt2node, net/ipv6/ip6_fib.c).
// It is written for the eye.
type fakeKernel struct {
	family Family
	lists  map[netip.Prefix][]*fakeRoute
	in     Interner
}

// fakeRoute is one route; a hop without a gateway is one that IPv6 can't join with others.
type fakeRoute struct {
	tos    uint8
	metric uint32
	hops   []fakeHop
	mtu    uint32
}

type fakeHop struct {
	oif Ifindex
	gw  byte // the last byte of the gateway, 0 for none
}

func (r *fakeRoute) joins() bool { return r.hops[0].gw != 0 }

func (k *fakeKernel) route(dst netip.Prefix, r *fakeRoute) Route {
	head := make([]byte, rtmsgLen)
	head[0], head[1], head[3], head[4], head[5], head[7] = byte(k.family), byte(dst.Bits()), r.tos, byte(TableMain), byte(ProtoStatic), byte(Unicast)
	var hops [][]byte
	for _, h := range r.hops {
		var b []byte
		if h.gw != 0 {
			gw := netip.AddrFrom4([4]byte{192, 0, 2, h.gw})
			if k.family == IPv6 {
				gw = netip.AddrFrom16([16]byte{0xfd, 15: h.gw})
			}
			b = appendAttr(nil, rtaGateway, gw.AsSlice())
		}
		hops = append(hops, b)
	}
	parts := [][]byte{attr32(rtaTable, uint32(TableMain)), appendDst(make([]byte, rtmsgLen), dst)[rtmsgLen:], attr32(rtaPriority, r.metric)}
	if r.mtu != 0 {
		parts = append(parts, attr(rtaMetrics, attr32(rtaxMTU, r.mtu)...))
	}
	if len(hops) == 1 {
		parts = append(parts, hops[0], attr32(rtaOif, uint32(r.hops[0].oif)))
	} else {
		var all []byte
		for i, b := range hops {
			h := make([]byte, rtnexthopLen)
			h[0], h[4] = byte(rtnexthopLen+len(b)), byte(r.hops[i].oif)
			all = append(append(all, h...), b...)
		}
		parts = append(parts, attr(rtaMultipath, all...))
	}
	got, err := k.in.ParseRoute(raw(head, parts...))
	if err != nil {
		panic(err)
	}
	return got
}

func (r *fakeRoute) compare(o *fakeRoute) int {
	return cmp.Or(-cmp.Compare(r.tos, o.tos), cmp.Compare(r.metric, o.metric))
}

func (r *fakeRoute) equal(o *fakeRoute) bool {
	return r.compare(o) == 0 && r.mtu == o.mtu && slices.Equal(r.hops, o.hops)
}

// put does RTM_NEWROUTE and returns what the kernel tells, nil where it refuses.
func (k *fakeKernel) put(dst netip.Prefix, r *fakeRoute, replace, add bool) Event {
	list := k.lists[dst]
	var equals []int
	for i, have := range list {
		if have.compare(r) == 0 {
			equals = append(equals, i)
		}
	}
	told := func(r *fakeRoute) Event {
		return RouteSet{Route: k.route(dst, r), Replace: replace, Append: add}
	}
	insert := func(first bool) Event {
		at := 0
		for at < len(list) && (list[at].compare(r) < 0 || !first && list[at].compare(r) == 0) {
			at++
		}
		k.lists[dst] = slices.Insert(slices.Clone(list), at, r)
		return told(r)
	}
	same := slices.IndexFunc(list, r.equal)
	if k.family == IPv4 {
		switch {
		case replace && len(equals) > 0:
			if same >= 0 && same != equals[0] {
				return nil // EEXIST
			}
			k.lists[dst] = slices.Clone(list)
			k.lists[dst][equals[0]] = r
			return told(r)
		case same >= 0:
			return nil
		}
		return insert(!add)
	}
	switch {
	case replace && len(equals) > 0:
		at := equals[0]
		for _, i := range equals {
			if list[i].joins() == r.joins() {
				at = i
				break
			}
		}
		if same >= 0 && same != at {
			return nil // the kernel would have the same route twice, which the mirror shows as one
		}
		k.lists[dst] = slices.Clone(list)
		k.lists[dst][at] = r
		return told(r)
	case len(equals) > 0 && r.joins():
		for _, i := range equals {
			if !list[i].joins() {
				continue
			}
			if slices.Contains(list[i].hops, r.hops[0]) {
				return nil
			}
			joined := *list[i]
			joined.hops = append(slices.Clone(joined.hops), r.hops...)
			k.lists[dst] = slices.Clone(list)
			k.lists[dst][i] = &joined
			return told(&joined)
		}
	case slices.ContainsFunc(equals, func(i int) bool { return slices.Equal(list[i].hops, r.hops) }):
		return nil
	}
	return insert(false)
}

// remove does RTM_DELROUTE: of the n-th route, or of one hop of an IPv6 multipath route.
func (k *fakeKernel) remove(dst netip.Prefix, n, hop int) Event {
	list := slices.Clone(k.lists[dst])
	if len(list) == 0 {
		return nil
	}
	n %= len(list)
	r := list[n]
	if k.family == IPv6 && len(r.hops) > 1 && hop >= 0 {
		hop %= len(r.hops)
		left, gone := *r, *r
		left.hops, gone.hops = slices.Delete(slices.Clone(r.hops), hop, hop+1), r.hops[hop:hop+1]
		list[n] = &left
		k.lists[dst] = list
		return RouteGone{Route: k.route(dst, &gone)}
	}
	k.lists[dst] = slices.Delete(list, n, n+1)
	return RouteGone{Route: k.route(dst, r)}
}

// dump answers a resync.
func (k *fakeKernel) dump(f *FIB, scope Scope) {
	if scope.Family != 0 && scope.Family != k.family {
		return
	}
	f.Apply(ResyncBegin{Scope: scope})
	for dst, list := range k.lists {
		for _, r := range list {
			if scope.Oif == 0 || slices.ContainsFunc(r.hops, func(h fakeHop) bool { return h.oif == scope.Oif }) {
				f.Apply(RouteSet{Route: k.route(dst, r)})
			}
		}
	}
	if e := f.Apply(ResyncEnd{Scope: scope}); e.Resync != nil {
		k.dump(f, *e.Resync)
	}
}

func (k *fakeKernel) text() []string {
	var out []string
	for dst, list := range k.lists {
		for i, r := range list {
			out = append(out, fmt.Sprintf("%s #%d %x", dst, i, k.route(dst, r).Body.Raw))
		}
	}
	slices.Sort(out)
	return out
}

func mirrorText(f *FIB, fam Family) []string {
	n := map[netip.Prefix]int{}
	var out []string
	for r := range f.Table(fam, TableMain) {
		out = append(out, fmt.Sprintf("%s #%d %x", r.Dst, n[r.Dst], r.Body.Raw))
		n[r.Dst]++
	}
	slices.Sort(out)
	return out
}

func smallPrefix(t *rapid.T, fam Family) netip.Prefix {
	if fam == IPv6 {
		return netip.MustParsePrefix(rapid.SampledFrom([]string{"::/0", "fd00::/32", "fd00::/48", "fd00:0:1::/48", "fd00::1/128", "fd00::2/128"}).Draw(t, "dst"))
	}
	return netip.MustParsePrefix(rapid.SampledFrom([]string{"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.1.0.0/16", "10.0.0.1/32", "10.0.0.2/32"}).Draw(t, "dst"))
}

// request does one random request and returns what the kernel tells, nil for nothing.
func (k *fakeKernel) request(t *rapid.T, request int) Event {
	dst := smallPrefix(t, k.family)
	r := &fakeRoute{
		metric: rapid.Uint32Range(1, 2).Draw(t, "metric"),
		hops:   []fakeHop{{Ifindex(rapid.IntRange(2, 4).Draw(t, "oif")), rapid.ByteRange(0, 2).Draw(t, "gw")}},
		mtu:    rapid.SampledFrom([]uint32{0, 0, 1400}).Draw(t, "mtu"),
	}
	if k.family == IPv4 {
		r.tos = rapid.SampledFrom([]uint8{0, 0, 16}).Draw(t, "tos")
		if rapid.IntRange(0, 3).Draw(t, "multipath") == 0 {
			r.hops = append(r.hops, fakeHop{5, 9})
		}
	}
	switch request {
	case 0, 1:
		return k.put(dst, r, false, false)
	case 2:
		return k.put(dst, r, false, true)
	case 3, 4:
		return k.put(dst, r, true, false)
	case 5:
		return k.remove(dst, rapid.IntRange(0, 3).Draw(t, "n"), -1)
	}
	return k.remove(dst, rapid.IntRange(0, 3).Draw(t, "n"), rapid.IntRange(0, 3).Draw(t, "hop"))
}

// TestEventsThatAreOlderThanTheDump: the watcher holds the events that come while a dump runs and
// tells them after it, although the dump may show what they did, and what was done after that.
func TestEventsThatAreOlderThanTheDump(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := &fakeKernel{family: rapid.SampledFrom([]Family{IPv4, IPv6}).Draw(t, "family"), lists: map[netip.Prefix][]*fakeRoute{}}
		f := NewFIB()
		k.dump(f, Scope{})
		var due *Scope
		tell := func(ev Event) {
			if e := f.Apply(ev); e.Resync != nil {
				due = &Scope{RoutesOnly: true, Family: k.family} // joined with others as a scopeSet does
			}
		}
		for range rapid.IntRange(1, 4).Draw(t, "dumps") {
			for range rapid.IntRange(0, 4).Draw(t, "before") {
				if ev := k.request(t, rapid.IntRange(0, 6).Draw(t, "request")); ev != nil {
					tell(ev)
				}
			}
			var held []Event
			n := rapid.IntRange(0, 8).Draw(t, "held")
			at := rapid.IntRange(0, n).Draw(t, "at")
			scope := Scope{RoutesOnly: rapid.Bool().Draw(t, "partial"), Family: k.family}
			if !scope.RoutesOnly {
				scope = Scope{}
			}
			for i := range n + 1 {
				if i == at {
					k.dump(f, scope)
				}
				if ev := k.request(t, rapid.IntRange(0, 6).Draw(t, "request")); ev != nil {
					held = append(held, ev)
				}
			}
			for _, ev := range held {
				tell(ev)
			}
			if inDoubt([][]Event{held})[k.family] {
				due = &Scope{RoutesOnly: true, Family: k.family}
			}
			for due != nil {
				scope := *due
				due = nil
				k.dump(f, scope)
			}
			if diff := gocmp.Diff(k.text(), mirrorText(f, k.family)); diff != "" {
				t.Fatalf("after %+v (-kernel +mirror):\n%s\nkernel: %s", held, diff, strings.Join(k.text(), "\n"))
			}
			checkIndexes(t, f)
		}
	})
}

// TestMirrorKeepsUpWithTheKernel lets a fake kernel do random requests. The mirror has to be
// exact after each event, or after the dump that it asked for.
func TestMirrorKeepsUpWithTheKernel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := &fakeKernel{family: rapid.SampledFrom([]Family{IPv4, IPv6}).Draw(t, "family"), lists: map[netip.Prefix][]*fakeRoute{}}
		f := NewFIB()
		full := func() { k.dump(f, Scope{}) }
		full()
		for range rapid.IntRange(1, 25).Draw(t, "requests") {
			var ev Event
			switch request := rapid.IntRange(0, 7).Draw(t, "request"); request {
			default:
				ev = k.request(t, request)
			case 7: // what the kernel does not tell: a link goes down
				oif := Ifindex(rapid.IntRange(2, 4).Draw(t, "down"))
				for dst, list := range k.lists {
					k.lists[dst] = slices.DeleteFunc(slices.Clone(list), func(r *fakeRoute) bool { return len(r.hops) == 1 && r.hops[0].oif == oif })
				}
				k.dump(f, Scope{RoutesOnly: true, Family: k.family, Oif: oif})
			}
			if ev != nil {
				before := f.Version()
				e := f.Apply(ev)
				if e.Changed != (f.Version() != before) {
					t.Fatalf("%+v: changed %t, but the version went from %d to %d", ev, e.Changed, before, f.Version())
				}
				if e.Resync != nil {
					k.dump(f, *e.Resync)
				}
			}
			if diff := gocmp.Diff(k.text(), mirrorText(f, k.family)); diff != "" {
				t.Fatalf("after %+v (-kernel +mirror):\n%s\nkernel: %s", ev, diff, strings.Join(k.text(), "\n"))
			}
			checkIndexes(t, f)
		}
		kept := mirrorText(f, k.family)
		full()
		if diff := gocmp.Diff(kept, mirrorText(f, k.family)); diff != "" {
			t.Fatalf("a full dump changes the mirror (-before +after):\n%s", diff)
		}
		checkIndexes(t, f)
	})
}

// checkIndexes computes DeviceRoutes, Len and Get anew from all routes.
func checkIndexes(t interface {
	Fatalf(string, ...any)
	Helper()
}, f *FIB) {
	t.Helper()
	n := 0
	want := map[Ifindex][]Key{}
	count := map[Ifindex]int{}
	keys := map[Key]int{}
	for _, fam := range []Family{IPv4, IPv6} {
		for _, id := range f.Tables(fam) {
			for r := range f.Table(fam, id) {
				n++
				keys[r.Key()]++
				if r.Body.Type != Unicast {
					continue
				}
				seen := map[Ifindex]bool{}
				for _, nh := range r.Body.Nexthops {
					if !seen[nh.Oif] {
						seen[nh.Oif] = true
						count[nh.Oif]++
						want[nh.Oif] = append(want[nh.Oif], r.Key())
					}
				}
			}
		}
	}
	if f.Len() != n {
		t.Fatalf("Len is %d, there are %d routes", f.Len(), n)
	}
	for k, n := range keys {
		if first, got := f.Get(k); got != n || first.Key() != k {
			t.Fatalf("Get(%s) found %d, there are %d", k, got, n)
		}
	}
	for i := range Ifindex(8) {
		got, n := f.DeviceRoutes(i)
		slices.SortFunc(want[i], Key.Compare)
		if diff := gocmp.Diff(slices.Compact(want[i]), got, gocmp.Comparer(func(a, b Key) bool { return a == b })); diff != "" || n != count[i] {
			t.Fatalf("device %d: %d routes, should be %d (-want +got):\n%s", i, n, count[i], diff)
		}
	}
}

// TestLostMakesTheMirrorStaleUntilAFullDump: what was there stays, a partial dump is not enough.
func TestLostMakesTheMirrorStaleUntilAFullDump(t *testing.T) {
	k := &fakeKernel{family: IPv4, lists: map[netip.Prefix][]*fakeRoute{}}
	f := NewFIB()
	if !f.Stale() {
		t.Error("a new mirror is not stale")
	}
	k.put(netip.MustParsePrefix("10.0.0.0/8"), &fakeRoute{metric: 1, hops: []fakeHop{{2, 1}}}, false, false)
	k.dump(f, Scope{})
	if f.Stale() {
		t.Error("stale after a full dump")
	}
	f.Apply(Lost{})
	k.dump(f, Scope{RoutesOnly: true})
	if !f.Stale() || f.Len() != 1 {
		t.Errorf("stale %t with %d routes after events were lost, want true with 1", f.Stale(), f.Len())
	}
	k.dump(f, Scope{})
	if f.Stale() {
		t.Error("stale after the full dump")
	}
}

// IPv6's own MTU becomes the device's when that changes, but the event is sent before.
func TestDeviceMTUChangeResetsIPv6MTU(t *testing.T) {
	f := NewFIB()
	f.Apply(ResyncBegin{})
	f.Apply(LinkSet{Link: &Link{Index: 2, Name: "nic1", MTU: 1400}})
	f.Apply(ResyncEnd{})
	f.Apply(LinkSet{Link: &Link{Index: 2, Name: "nic1", MTU: 1500, MTU6: 1400}})
	if got := f.Link(2).MTUFor(IPv6); got != 1500 {
		t.Errorf("IPv6 MTU %d after the device's became 1500", got)
	}
	f.Apply(LinkSet{Link: &Link{Index: 2, Name: "nic1", MTU: 1500, MTU6: 1400}})
	if got := f.Link(2).MTUFor(IPv6); got != 1400 {
		t.Errorf("IPv6 MTU %d after a later event said 1400", got)
	}
}

// A dump by device can meet routes of both families that it may have replaced: both have to be
// dumped then, not the family that came last.
func TestPartialResyncInDoubtAboutBothFamiliesAsksForBoth(t *testing.T) {
	f := NewFIB()
	f.Apply(ResyncBegin{})
	f.Apply(ResyncEnd{})
	var found []Event
	for _, dst := range []string{"198.51.100.0/24", "2001:db8::/48"} {
		p := netip.MustParsePrefix(dst)
		k := &fakeKernel{family: FamilyOf(p.Addr())}
		f.Apply(RouteSet{Route: k.route(p, &fakeRoute{metric: 1, hops: []fakeHop{{5, 0}}})})
		found = append(found, RouteSet{Route: k.route(p, &fakeRoute{metric: 1, hops: []fakeHop{{3, 0}}})})
	}
	scope := Scope{RoutesOnly: true, Oif: 3}
	f.Apply(ResyncBegin{Scope: scope})
	for _, ev := range found {
		f.Apply(ev)
	}
	e := f.Apply(ResyncEnd{Scope: scope})
	if e.Resync == nil || *e.Resync != (Scope{RoutesOnly: true}) {
		t.Errorf("asks for %+v, want all routes", e.Resync)
	}
}
