package routes

import (
	"cmp"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
)

// share is how many of 1000 prefixes of a table have a length.
type share struct{ bits, of1000 int }

// The mix of lengths in the Internet's tables, as in e2e/bench.
var internetLengths = map[Family][]share{
	IPv4: {{24, 620}, {23, 97}, {22, 107}, {21, 52}, {20, 45}, {19, 25}, {18, 14}, {17, 8}, {16, 14}, {15, 3}, {14, 3}, {13, 2}, {12, 10}},
	IPv6: {{48, 480}, {47, 20}, {46, 40}, {45, 15}, {44, 120}, {42, 30}, {40, 105}, {36, 50}, {33, 20}, {32, 105}, {30, 5}, {29, 10}},
}

// internet are n different prefixes in the order of the kernel's dump: by address, the longer first.
func internet(n int, f Family) []netip.Prefix {
	r := rand.New(rand.NewPCG(5450, 84))
	seen := make(map[netip.Prefix]bool, n)
	for len(seen) < n {
		k, bits := r.IntN(1000), 0
		for _, s := range internetLengths[f] {
			if k -= s.of1000; k < 0 {
				bits = s.bits
				break
			}
		}
		b := binary.BigEndian.AppendUint64(nil, r.Uint64())
		a := netip.AddrFrom4([4]byte{byte(1 + r.IntN(223)), b[1], b[2], b[3]})
		if f == IPv6 {
			b[0] = []byte{0x20, 0x24, 0x26, 0x28, 0x2a, 0x2c}[r.IntN(6)]
			a = netip.AddrFrom16([16]byte(append(b, make([]byte, 8)...)))
		}
		p, _ := a.Prefix(bits) // the lengths are the family's
		seen[p] = true
	}
	out := make([]netip.Prefix, 0, n)
	for p := range seen {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return cmp.Or(a.Addr().Compare(b.Addr()), b.Bits()-a.Bits()) })
	return out
}

// bigTable is a table of the Internet, by 32 gateways on four links.
type bigTable struct {
	tb   testing.TB
	dsts []netip.Prefix
	in   Interner
	f    *FIB
	base uint64 // bytes
}

func newBigTable(tb testing.TB, n4, n6 int) *bigTable {
	t := &bigTable{tb: tb, dsts: append(internet(n4, IPv4), internet(n6, IPv6)...), f: NewFIB()}
	t.base = liveHeap()
	return t
}

// liveHeap is what the program holds, in bytes.
func liveHeap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func (t *bigTable) bytes() int { return int(liveHeap()) - int(t.base) }

// route is the i-th route as the kernel shows it, by a gateway that turn moves.
func (t *bigTable) route(i, turn int) Route {
	dst, gw := t.dsts[i], i*7919%32+turn
	head := make([]byte, rtmsgLen)
	head[0], head[1], head[4], head[5], head[7] = byte(FamilyOf(dst.Addr())), byte(dst.Bits()), byte(TableMain), 186, byte(Unicast)
	via := netip.AddrFrom4([4]byte{192, 168, byte(gw % 4), byte(2 + gw/4)})
	if dst.Addr().Is6() {
		via = netip.AddrFrom16([16]byte{0: 0xfd, 3: byte(gw % 4), 15: byte(2 + gw/4)})
	}
	r, err := t.in.ParseRoute(raw(head, attr32(rtaTable, uint32(TableMain)), attr(rtaDst, dst.Addr().AsSlice()...),
		attr(rtaGateway, via.AsSlice()...), attr32(rtaOif, uint32(2+gw%4))))
	if err != nil {
		t.tb.Fatal(err)
	}
	return r
}

// dump takes a dump of every each-th route and returns the most that was held in its course, in bytes.
func (t *bigTable) dump(scope Scope, each, turn int) (peak int) {
	t.f.Apply(ResyncBegin{Scope: scope})
	for i := 0; i < len(t.dsts); i += each {
		t.f.Apply(RouteSet{Route: t.route(i, turn)})
		if i/each%(len(t.dsts)/each/3) == 0 {
			peak = max(peak, t.bytes())
		}
	}
	peak = max(peak, t.bytes())
	t.f.Apply(ResyncEnd{Scope: scope})
	return max(peak, t.bytes())
}

// TestAFullTableIsSmall: routes cost a few bytes each, a dump that finds what is known costs nothing more, and a table that
// shrinks gives its memory back.
func TestAFullTableIsSmall(t *testing.T) {
	const n4, n6 = 80_000, 20_000
	b := newBigTable(t, n4, n6)
	most := n4*20 + n6*60 + 200<<10 // the rest is the package's, and the runtime's
	first := b.dump(Scope{}, 1, 0)
	if held := b.bytes(); held > most || first > most {
		t.Errorf("%d routes hold %d bytes, at most %d in the course of the first dump; want %d", b.f.Len(), held, first, most)
	}
	for name, scope := range map[string]Scope{"full": {}, "of routes": {RoutesOnly: true}} {
		if peak := b.dump(scope, 1, 0); peak > most {
			t.Errorf("a dump %s holds %d bytes, want %d", name, peak, most)
		}
	}
	if peak := b.dump(Scope{RoutesOnly: true}, 1, 1); peak > 2*most {
		t.Errorf("a dump in which all has changed holds %d bytes, want %d", peak, 2*most)
	}
	if n := b.f.Len(); n != n4+n6 {
		t.Errorf("%d routes after dumps of %d", n, n4+n6)
	}
	left := func(how string) {
		t.Helper()
		if held := b.bytes(); b.f.Len() != (n4+n6)/100 || held > most/100*3+200<<10 {
			t.Errorf("%d routes are left %s, with %d bytes", b.f.Len(), how, held)
		}
	}
	for i := range b.dsts {
		if i%100 != 0 {
			b.f.Apply(RouteGone{Route: b.route(i, 1)})
		}
	}
	left("one by one")
	b.dump(Scope{}, 1, 0)
	b.dump(Scope{}, 100, 0)
	left("by a dump")
	runtime.KeepAlive(b)
}

// TestADeviceForEachRouteIsSmall: with a device for each customer no two routes share anything, and each device has its index.
func TestADeviceForEachRouteIsSmall(t *testing.T) {
	const n = 20_000
	b := &bigTable{tb: t, f: NewFIB(), base: liveHeap()}
	route := func(i int) RouteSet {
		return RouteSet{Route: parsed(t, &b.in, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32).String(), Ifindex(2+i))}
	}
	dump := func(each int) {
		b.f.Apply(ResyncBegin{})
		for i := 0; i < n; i += each {
			b.f.Apply(route(i))
		}
		b.f.Apply(ResyncEnd{})
	}
	dump(1)
	if held := b.bytes(); held > n*800 {
		t.Errorf("%d routes of as many devices hold %d bytes each", n, held/n)
	}
	for i := range n {
		if i%100 != 0 {
			b.f.Apply(RouteGone{Route: route(i).Route})
		}
	}
	for range 4 { // bodies that nobody has are forgotten bit by bit
		dump(100)
		runtime.GC()
		for range n {
			route(0)
		}
	}
	if held := b.bytes(); b.f.Len() != n/100 || held > n/100*800+200<<10 {
		t.Errorf("%d routes are left, with %d bytes", b.f.Len(), held)
	}
	runtime.KeepAlive(b)
}

// BenchmarkFullTable is the memory of a full table and of dumps of it.
func BenchmarkFullTable(b *testing.B) {
	t := newBigTable(b, 1_048_577, 200_000)
	report := func(what string, bytes int) { b.ReportMetric(float64(bytes)/(1<<20), what+"-MiB") }
	for b.Loop() {
		report("first-dump", t.dump(Scope{}, 1, 0))
		report("held", t.bytes())
		b.ReportMetric(float64(t.bytes())/float64(t.f.Len()), "B/route")
		report("full-dump", t.dump(Scope{}, 1, 0))
		report("partial-dump", t.dump(Scope{RoutesOnly: true}, 1, 0))
		report("all-changed-dump", t.dump(Scope{RoutesOnly: true}, 1, 1))
		t.dump(Scope{}, 100, 0)
		report("a-hundredth", t.bytes())
	}
	runtime.KeepAlive(t)
}
