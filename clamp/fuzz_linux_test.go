package clamp

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
)

// FuzzIntervals reads the elements of a set that anybody may have written. What is whole is in order and apart, and is what we would write.
func FuzzIntervals(f *testing.F) {
	f.Add([]byte{10, 0, 0, 0, 0, 10, 1, 0, 0, 1}, false)
	f.Add([]byte{10, 0, 0, 0, 0, 10, 1, 0, 0, 1, 10, 1, 0, 0, 0}, false)
	f.Add([]byte{255, 255, 255, 255, 0, 0, 0, 0, 0, 1}, false)
	f.Add(append(append(netip.MustParseAddr("fd00::").AsSlice(), 0), append(netip.MustParseAddr("fd01::").AsSlice(), 1)...), true)
	f.Fuzz(func(t *testing.T, b []byte, v6 bool) {
		h := halves[0]
		if v6 {
			h = halves[1]
		}
		var elems []nftables.SetElement
		for part := range slices.Chunk(b, int(h.key.Bytes)+1) {
			elems = append(elems, nftables.SetElement{Key: part[:len(part)-1], IntervalEnd: part[len(part)-1]&1 > 0})
		}
		got, whole := intervals(elems, h.key.Bytes, 1360)
		if !whole {
			return
		}
		if len(got) > len(elems) {
			t.Errorf("%d intervals of %d elements", len(got), len(elems))
		}
		for i, e := range got {
			if !e.Lo.IsValid() || e.Hi.Less(e.Lo) || i > 0 && !got[i-1].Hi.Less(e.Lo) {
				t.Errorf("%v in %v", e, got)
			}
		}
		again, whole := intervals(sized{half: h, mss: 1360, entries: got}.elements(), h.key.Bytes, 1360)
		if !whole || !slices.Equal(again, got) {
			t.Errorf("%v are written, and read as %v, %t", got, again, whole)
		}
	})
}

// FuzzSetName: a set of the kernel is one of ours only by the very name that we give it.
func FuzzSetName(f *testing.F) {
	for _, name := range []string{"v4_1360", "v6_1340", "v4_01360", "v4_0", "v4_65536", "v4_"} {
		f.Add(name, name[:2] == "v6")
	}
	f.Fuzz(func(t *testing.T, name string, v6 bool) {
		h, lo := halves[0], "10.0.0.0"
		if v6 {
			h, lo = halves[1], "fd00::"
		}
		mss, ok := mssOf(&nftables.Set{Name: name, Interval: true, KeyType: h.key})
		if !ok {
			return
		}
		a := netip.MustParseAddr(lo)
		if sets := layoutOf([]Entry{{a, a, mss}}).sets; len(sets) != 1 || sets[0].set.Name != name {
			t.Errorf("%q is ours with %d, and that is %+v", name, mss, sets)
		}
	})
}
