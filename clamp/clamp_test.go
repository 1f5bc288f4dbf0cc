package clamp

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func points(t *testing.T, text string) []Point {
	t.Helper()
	var out []Point
	for _, f := range strings.Fields(text) {
		var p Point
		pfx, mss, _ := strings.Cut(f, "=")
		p.Prefix = netip.MustParsePrefix(pfx)
		if _, err := fmt.Sscan(mss, &p.MSS); err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func TestFlatten(t *testing.T) {
	for _, c := range []struct{ name, points, want string }{
		{"nothing", "", ""},
		{"one prefix", "10.3.0.0/16=1406", "10.3.0.0/16 mss 1406"},
		{"a hole inside", "10.3.0.0/16=1406 10.3.7.0/24=0", "10.3.0.0-10.3.6.255 mss 1406; 10.3.8.0-10.3.255.255 mss 1406"},
		{"a hole at the beginning", "10.3.0.0/16=1406 10.3.0.0/17=0", "10.3.128.0/17 mss 1406"},
		{"a hole at the end", "10.3.0.0/16=1406 10.3.128.0/17=0", "10.3.0.0/17 mss 1406"},
		{"a hole all over", "10.3.0.0/16=1406 10.3.0.0/17=0 10.3.128.0/17=0", ""},
		{"in a hole", "10.3.0.0/16=1406 10.3.7.0/24=0 10.3.7.7/32=1200", "10.3.0.0-10.3.6.255 mss 1406; 10.3.7.7/32 mss 1200; 10.3.8.0-10.3.255.255 mss 1406"},
		{"the same prefix twice", "10.3.0.0/16=1406 10.3.0.0/16=1398 10.3.0.0/16=0", "10.3.0.0/16 mss 1398"},
		{"neighbours are one", "10.3.0.0/17=1406 10.3.128.0/17=1406", "10.3.0.0/16 mss 1406"},
		{"neighbours that differ", "10.3.0.0/17=1406 10.3.128.0/17=1400", "10.3.0.0/17 mss 1406; 10.3.128.0/17 mss 1400"},
		{"everything", "0.0.0.0/0=1406 ::/0=1386", "0.0.0.0/0 mss 1406; ::/0 mss 1386"},
		{"everything but the ends", "0.0.0.0/0=1406 0.0.0.0/32=0 255.255.255.255/32=0", "0.0.0.1-255.255.255.254 mss 1406"},
		{"the last address of all", "255.255.255.255/32=1406 ::/128=1386", "255.255.255.255/32 mss 1406; ::/128 mss 1386"},
		{"both families", "fd00::/16=1366 10.0.0.0/8=1406", "10.0.0.0/8 mss 1406; fd00::/16 mss 1366"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, e := range Flatten(points(t, c.points)) {
				got = append(got, e.String())
			}
			if diff := cmp.Diff(c.want, strings.Join(got, "; ")); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// slow is the MSS of one address, looked up in the points one by one; 0 for none.
func slow(points []Point, a netip.Addr) uint16 {
	bits, mss := -1, uint16(0)
	for _, p := range points {
		switch {
		case !p.Prefix.Contains(a) || p.Prefix.Bits() < bits:
		case p.Prefix.Bits() > bits:
			bits, mss = p.Prefix.Bits(), p.MSS
		case p.MSS != 0 && (mss == 0 || p.MSS < mss):
			mss = p.MSS
		}
	}
	return mss
}

func TestFlattenGivesEachAddressItsLongestPrefix(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// All that matters happens in the last byte; the bases are the ends of both families too.
		bases := []netip.Addr{
			netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("10.3.7.0"), netip.MustParseAddr("255.255.255.0"),
			netip.MustParseAddr("::"), netip.MustParseAddr("fd00::"), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00"),
		}
		at := func(base netip.Addr, i int) netip.Addr {
			b := base.AsSlice()
			b[len(b)-1] = byte(i)
			a, _ := netip.AddrFromSlice(b)
			return a
		}
		var list []Point
		for range rapid.IntRange(0, 12).Draw(t, "points") {
			base := rapid.SampledFrom(bases).Draw(t, "base")
			short := rapid.IntRange(0, 8).Draw(t, "short")
			bits := base.BitLen() - short
			if rapid.IntRange(0, 9).Draw(t, "wide") == 0 {
				bits = rapid.IntRange(0, base.BitLen()).Draw(t, "bits")
			}
			pfx, _ := at(base, rapid.IntRange(0, 255).Draw(t, "low")).Prefix(bits)
			list = append(list, Point{pfx, rapid.SampledFrom([]uint16{0, 1206, 1398, 1406}).Draw(t, "mss")})
		}
		before := slices.Clone(list)
		got := Flatten(list)
		if !slices.Equal(before, list) {
			t.Fatal("the points were changed")
		}
		for i, e := range got {
			if e.Hi.Less(e.Lo) || e.MSS == 0 || i > 0 && !got[i-1].Hi.Less(e.Lo) {
				t.Fatalf("not in order, or empty: %v", got)
			}
			if i > 0 && got[i-1].MSS == e.MSS && got[i-1].Hi.Next() == e.Lo {
				t.Fatalf("two entries for one interval: %v", got)
			}
		}
		for _, base := range bases {
			for i := range 256 {
				a := at(base, i)
				have := uint16(0)
				for _, e := range got {
					if !a.Less(e.Lo) && !e.Hi.Less(a) {
						have = e.MSS
					}
				}
				if want := slow(list, a); have != want {
					t.Fatalf("%s has mss %d, not %d\n%v\n%v", a, have, want, list, got)
				}
			}
		}
	})
}
