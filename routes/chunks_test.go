package routes

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// naivePrefixes is the oracle of chunks: a map, looked at as a whole each time.
type naivePrefixes map[netip.Prefix]naiveEntry

type naiveEntry struct {
	n      setNumber
	marked bool
}

func (m naivePrefixes) sorted() []netip.Prefix { return slices.SortedFunc(maps.Keys(m), ComparePrefix) }

func (m naivePrefixes) longest(dst netip.Prefix) (best netip.Prefix, ok bool) {
	for p := range m {
		if Contains(p, dst) && (!ok || p.Bits() > best.Bits()) {
			best, ok = p, true
		}
	}
	return best, ok
}

func (m naivePrefixes) inside(dst netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(m.sorted(), func(p netip.Prefix) bool { return p == dst || !Contains(dst, p) })
}

// crowdedPrefix draws a prefix of those that lie close together, so that they are inside one another, and in the same pieces.
func crowdedPrefix(t *rapid.T, f Family) netip.Prefix {
	n := rapid.Uint32Range(0, 1<<13).Draw(t, "net") << 4
	var a netip.Addr
	if f == IPv4 {
		a = netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 10<<24|n)))
	} else {
		var b [16]byte
		b[0] = 0xfd
		at := rapid.SampledFrom([]int{4, 6, 12}).Draw(t, "at") // 6: across the two halves
		binary.BigEndian.PutUint32(b[at:], n)
		a = netip.AddrFrom16(b)
	}
	p, err := a.Prefix(rapid.IntRange(0, f.Bits()).Draw(t, "bits"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// inARow is many prefixes of one length, one behind the other, as a dump brings them, or from the last one to the first.
func inARow(t *rapid.T, f Family) []netip.Prefix {
	n, bits := rapid.IntRange(1, 3*chunkLen).Draw(t, "many"), rapid.IntRange(24, 28).Draw(t, "bits")
	first := rapid.Uint32Range(0, 1<<13).Draw(t, "first")
	var out []netip.Prefix
	for i := range uint32(n) {
		b := binary.BigEndian.AppendUint32(nil, 10<<24+(first+i)<<4)
		a := netip.AddrFrom4([4]byte(b))
		if f == IPv6 {
			a = netip.AddrFrom16([16]byte(append(b, make([]byte, 12)...)))
		}
		p, _ := a.Prefix(bits)
		out = append(out, p)
	}
	if rapid.Bool().Draw(t, "backwards") {
		slices.Reverse(out)
	}
	return out
}

func TestChunksAreASortedMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := rapid.SampledFrom([]Family{IPv4, IPv6}).Draw(t, "family")
		have, want := newPrefixes(f), naivePrefixes{}
		put := func(p netip.Prefix, n setNumber) {
			old, had := have.put(p, n)
			if was, there := want[p]; had != there || old != was.n {
				t.Fatalf("put(%s) found %d %t, want %d %t", p, old, had, was.n, there)
			}
			want[p] = naiveEntry{n: n}
		}
		remove := func(p netip.Prefix) {
			old, had := have.remove(p)
			if was, there := want[p]; had != there || old != was.n {
				t.Fatalf("remove(%s) found %d %t, want %d %t", p, old, had, was.n, there)
			}
			delete(want, p)
		}
		number := rapid.Map(rapid.Uint32Range(0, setMask4), func(n uint32) setNumber { return setNumber(n) })
		t.Repeat(map[string]func(*rapid.T){
			"put":    func(t *rapid.T) { put(crowdedPrefix(t, f), number.Draw(t, "set")) },
			"remove": func(t *rapid.T) { remove(crowdedPrefix(t, f)) },
			"put many": func(t *rapid.T) {
				for i, p := range inARow(t, f) {
					put(p, setNumber(i))
				}
			},
			"remove many": func(t *rapid.T) {
				each := rapid.IntRange(1, 4).Draw(t, "each")
				for i, p := range want.sorted() {
					if i%each == 0 {
						remove(p)
					}
				}
			},
			"mark": func(t *rapid.T) {
				p, on := crowdedPrefix(t, f), rapid.Bool().Draw(t, "on")
				have.mark(p, on)
				if e, ok := want[p]; ok {
					want[p] = naiveEntry{e.n, on}
				}
			},
			"confirm": func(t *rapid.T) {
				each := rapid.IntRange(1, 3).Draw(t, "each")
				for i, p := range want.sorted() {
					if i%each != 0 {
						continue
					}
					e := want[p]
					if have.confirm(p, e.n+1) || have.confirm(p, e.n) == e.marked {
						t.Fatalf("confirm(%s) is wrong where the mark is %t", p, e.marked)
					}
					want[p] = naiveEntry{e.n, true}
				}
			},
			"rewrite": func(t *rapid.T) {
				part := rapid.SampledFrom([]setNumber{1, 2, 50}).Draw(t, "part")
				seen := 0
				have.rewrite(func(p netip.Prefix, n setNumber, marked bool) (setNumber, bool) {
					if e, ok := want[p]; !ok || e != (naiveEntry{n, marked}) {
						t.Fatalf("rewrite shows %s with %d %t, there is %t %v", p, n, marked, ok, e)
					}
					seen++
					return n / 2, marked || n%part == 0
				})
				if seen != len(want) {
					t.Fatalf("rewrite showed %d of %d", seen, len(want))
				}
				for _, p := range want.sorted() {
					e := want[p]
					delete(want, p)
					if e.marked || e.n%part == 0 {
						want[p] = naiveEntry{n: e.n / 2}
					}
				}
			},
			"": func(t *rapid.T) { checkChunks(t, f, have, want) },
		})
	})
}

func checkChunks(t *rapid.T, f Family, have prefixes, want naivePrefixes) {
	t.Helper()
	list := want.sorted()
	if have.size() != len(list) {
		t.Fatalf("size %d, want %d", have.size(), len(list))
	}
	var got []netip.Prefix
	have.all(func(p netip.Prefix, n setNumber) bool {
		if e := want[p]; e.n != n {
			t.Fatalf("%s has %d, want %d", p, n, e.n)
		}
		got = append(got, p)
		return true
	})
	if !slices.Equal(got, list) {
		t.Fatalf("in all there are\n%v, want\n%v", got, list)
	}
	for range 4 {
		p := crowdedPrefix(t, f)
		n, marked, ok := have.get(p)
		if e, there := want[p]; ok != there || n != e.n || marked != e.marked {
			t.Fatalf("get(%s) is %d %t %t, want %v %t", p, n, marked, ok, e, there)
		}
		at, n, ok := have.longest(p)
		if best, there := want.longest(p); ok != there || at != best || n != want[best].n {
			t.Fatalf("longest(%s) is %s %d %t, want %s %t", p, at, n, ok, best, there)
		}
		got = nil
		have.inside(p, func(p netip.Prefix, _ setNumber) bool {
			got = append(got, p)
			return true
		})
		if in := want.inside(p); !slices.Equal(got, in) {
			t.Fatalf("inside %s there are\n%v, want\n%v", p, got, in)
		}
	}
	switch c := have.(type) {
	case *chunks[entry4]:
		checkPieces(t, c)
	case *chunks[entry6]:
		checkPieces(t, c)
	}
}

// checkPieces checks what chunks promise themselves, and that they hold no more memory than a few times what they need.
func checkPieces[E entry[E]](t *rapid.T, c *chunks[E]) {
	t.Helper()
	if len(c.first) != len(c.lists) {
		t.Fatalf("%d pieces begin, there are %d", len(c.first), len(c.lists))
	}
	room := 0
	var lengths [129]uint32
	for l, list := range c.lists {
		room += cap(list)
		if len(list) == 0 || len(list) > chunkLen || cap(list) > chunkLen {
			t.Fatalf("piece %d has %d entries, room for %d", l, len(list), cap(list))
		}
		if c.first[l].search(list) != 0 || l > 0 && c.first[l].search(c.lists[l-1]) != len(c.lists[l-1]) {
			t.Fatalf("piece %d does not begin with %v", l, c.first[l].prefix())
		}
		for _, e := range list {
			lengths[e.length()]++
		}
	}
	if lengths != c.lengths {
		t.Fatalf("lengths are %v, should be %v", c.lengths, lengths)
	}
	if room > 8*c.n+8 {
		t.Fatalf("%d entries have room for %d", c.n, room)
	}
}

// TestEntriesOfTheOtherFamily: they are not there, and neither is an invalid prefix.
func TestEntriesOfTheOtherFamily(t *testing.T) {
	four, six := netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::ffff:10.0.0.0/104")
	for f, other := range map[Family]netip.Prefix{IPv4: six, IPv6: four} {
		have := newPrefixes(f)
		for _, p := range []netip.Prefix{other, {}} {
			have.put(p, 1)
			_, _, ok := have.get(p)
			if _, _, above := have.longest(p); have.size() != 0 || ok || above {
				t.Errorf("%s has %s", f, p)
			}
		}
	}
	have := newPrefixes(IPv6)
	have.put(six, 1)
	if at, n, ok := have.longest(six); at != six || n != 1 || !ok {
		t.Errorf("an IPv4 address in IPv6 became %s", at)
	}
}
