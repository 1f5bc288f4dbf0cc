package clamp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

var addrs = cmpopts.EquateComparable(netip.Addr{})

func both(t *testing.T) []Entry {
	t.Helper()
	return Flatten(points(t, "10.3.0.0/16=1406 10.3.7.0/24=0 10.4.0.0/16=1398 10.5.0.0/16=1406 255.255.255.0/24=1200 fd03::/32=1366 fd03:7::/64=0 ffff::/16=1220"))
}

func mustWrite(t *testing.T, tb *Table, entries []Entry) {
	t.Helper()
	if err := tb.Write(entries); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t *testing.T, tb *Table) State {
	t.Helper()
	s, err := tb.Read()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWhatIsWrittenIsReadBack(t *testing.T) {
	tb := newNS(t)
	if diff := cmp.Diff(State{}, mustRead(t, tb), addrs); diff != "" {
		t.Fatalf("before: (-want +got)\n%s", diff)
	}
	for _, entries := range [][]Entry{both(t), nil, Flatten(points(t, "0.0.0.0/0=1406 ::/0=1386")), both(t)} {
		mustWrite(t, tb, entries)
		if diff := cmp.Diff(State{There: true, Ours: true, Whole: true, Entries: entries}, mustRead(t, tb), addrs, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-want +got)\n%s", diff)
		}
	}
	if !mustRead(t, tb).Is(both(t)) || mustRead(t, tb).Is(both(t)[1:]) {
		t.Error("Is doesn't tell entries apart")
	}
	for range 2 { // the second time there is none
		if err := tb.Delete(); err != nil {
			t.Fatal(err)
		}
		if got := nft(t, "list", "ruleset"); got != "" {
			t.Fatalf("still there:\n%s", got)
		}
	}
}

func TestWhatIsWrittenReadsWellInNft(t *testing.T) {
	tb := newNS(t)
	want := Flatten(points(t, "10.3.0.0/16=1406 10.3.7.0/24=0 10.5.0.0/16=1398 10.9.0.0/16=1406 255.255.255.0/24=1406 fd03::/32=1366"))
	mustWrite(t, tb, want)
	const text = `table inet tsoagent {
	set v4_1398 {
		type ipv4_addr
		flags interval
		comment "tsoagent"
		elements = { 10.5.0.0/16 }
	}

	set v4_1406 {
		type ipv4_addr
		flags interval
		comment "tsoagent"
		elements = { 10.3.0.0-10.3.6.255, 10.3.8.0-10.3.255.255,
			     10.9.0.0/16, 255.255.255.0/24 }
	}

	set v6_1366 {
		type ipv6_addr
		flags interval
		comment "tsoagent"
		elements = { fd03::/32 }
	}

	chain mss {
		ip daddr @v4_1398 tcp option maxseg size set 1398 comment "tsoagent"
		ip saddr @v4_1398 tcp option maxseg size set 1398 comment "tsoagent"
		ip daddr @v4_1406 tcp option maxseg size set 1406 comment "tsoagent"
		ip saddr @v4_1406 tcp option maxseg size set 1406 comment "tsoagent"
		ip6 daddr @v6_1366 tcp option maxseg size set 1366 comment "tsoagent"
		ip6 saddr @v6_1366 tcp option maxseg size set 1366 comment "tsoagent"
	}

	chain forward {
		type filter hook forward priority mangle + 10; policy accept;
		tcp flags syn jump mss comment "tsoagent"
	}
}
`
	saved := nft(t, "list", "ruleset")
	if diff := cmp.Diff(text, saved); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	// Somebody who saves his ruleset saves ours too, and loads it at the next boot.
	file := filepath.Join(t.TempDir(), "ruleset")
	if err := os.WriteFile(file, []byte(saved), 0o600); err != nil {
		t.Fatal(err)
	}
	nft(t, "flush", "ruleset")
	nft(t, "-f", file)
	if diff := cmp.Diff(State{There: true, Ours: true, Whole: true, Entries: want}, mustRead(t, tb), addrs); diff != "" {
		t.Errorf("saved and loaded: (-want +got)\n%s", diff)
	}
}

func TestDrift(t *testing.T) {
	for _, c := range []struct {
		name, do    string
		there, ours bool
	}{
		{"table deleted", "delete table inet tsoagent", false, false},
		{"ruleset flushed", "flush ruleset", false, false},
		{"rules flushed", "flush table inet tsoagent", true, true},
		{"one chain flushed", "flush chain inet tsoagent mss", true, true},
		{"a rule more", "add rule inet tsoagent forward counter", true, true},
		{"a rule more, ahead", "insert rule inet tsoagent mss ip daddr 10.3.0.1 return", true, true},
		{"a rule twice", "add rule inet tsoagent mss ip daddr @v4_1406 tcp option maxseg size set 1406 comment tsoagent", true, true},
		{"a chain more", "add chain inet tsoagent x", true, true},
		{"a set more", "add set inet tsoagent x { type ipv4_addr; }", true, true},
		{"a set of another value", "add set inet tsoagent v4_1300 { type ipv4_addr; flags interval; }", true, true},
		{"an element less", "delete element inet tsoagent v4_1398 { 10.4.0.0/16 }", true, true},
		{"an element more", "add element inet tsoagent v4_1406 { 10.99.0.0/16 }", true, true},
		{"a set flushed", "flush set inet tsoagent v6_1366", true, true},
		{"policy drop", "chain inet tsoagent forward { policy drop; }", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			tb := newNS(t)
			mustWrite(t, tb, both(t))
			w, err := Watch()
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			nft(t, c.do)
			s := mustRead(t, tb)
			if s.There != c.there || s.Ours != c.ours || s.Is(both(t)) {
				t.Fatalf("%+v", s)
			}
			msgs, err := w.c.Receive()
			if err != nil {
				t.Fatal(err)
			}
			heard := false
			for _, m := range msgs {
				heard = heard || concerns(m)
			}
			if !heard {
				t.Error("the change was not heard of")
			}
			mustWrite(t, tb, both(t))
			if !mustRead(t, tb).Is(both(t)) {
				t.Error("not mended")
			}
		})
	}
}

func TestOthersAreLeftAlone(t *testing.T) {
	for _, theirs := range []string{
		"add table inet tsoagent",
		"table inet tsoagent { chain forward { type filter hook forward priority 0; accept; }; }",
		"table inet tsoagent { chain forward { type filter hook forward priority 0; }; }",
		`table inet tsoagent { set v4_1406 { type ipv4_addr; flags interval; }; chain mss { }; chain forward { accept comment "mine"; }; }`,
	} {
		t.Run(theirs, func(t *testing.T) {
			tb := newNS(t)
			nft(t, theirs)
			before := nft(t, "list", "ruleset")
			if s := mustRead(t, tb); !s.There || s.Ours {
				t.Fatalf("%+v", s)
			}
			if err := tb.Write(both(t)); !errors.Is(err, ErrForeign) {
				t.Errorf("write: %v", err)
			}
			if err := tb.Delete(); !errors.Is(err, ErrForeign) {
				t.Errorf("delete: %v", err)
			}
			if diff := cmp.Diff(before, nft(t, "list", "ruleset")); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
	t.Run("of another family", func(t *testing.T) {
		tb := newNS(t)
		nft(t, "table ip tsoagent { chain c { accept; }; }")
		w, err := Watch()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		nft(t, "add chain ip tsoagent d")
		msgs, err := w.c.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range msgs {
			if concerns(m) {
				t.Errorf("concerns us: %v", m)
			}
		}
		if s := mustRead(t, tb); s.There {
			t.Errorf("%+v", s)
		}
		mustWrite(t, tb, both(t))
		if err := tb.Delete(); err != nil {
			t.Fatal(err)
		}
		if got := nft(t, "list", "tables"); got != "table ip tsoagent\n" {
			t.Errorf("left: %s", got)
		}
	})
}

func TestManyEntries(t *testing.T) {
	tb := newNS(t)
	var list []Point
	for i := range 8000 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 12), byte(i >> 4), byte(i << 4)})
		list = append(list, Point{netip.PrefixFrom(a, 29), uint16(1300 + i%3)})
		b := netip.MustParseAddr(fmt.Sprintf("fd00:%x:%x::", i>>8, i&0xff))
		list = append(list, Point{netip.PrefixFrom(b, 64), uint16(1300 + i%3)})
	}
	entries := Flatten(list)
	mustWrite(t, tb, entries)
	mustWrite(t, tb, entries[1:])
	s := mustRead(t, tb)
	if !s.Is(entries[1:]) {
		t.Fatalf("%d entries, not %d; %+v", len(s.Entries), len(entries)-1, s.Whole)
	}
}

func TestIntervalsAndElementsAreInverse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var list []Point
		for range rapid.IntRange(0, 8).Draw(t, "points") {
			a := netip.AddrFrom4([4]byte{rapid.SampledFrom([]byte{0, 10, 255}).Draw(t, "a"), 0, 0, rapid.Byte().Draw(t, "d")})
			pfx, _ := a.Prefix(rapid.SampledFrom([]int{0, 8, 24, 28, 31, 32}).Draw(t, "bits"))
			list = append(list, Point{pfx, rapid.SampledFrom([]uint16{0, 1406}).Draw(t, "mss")})
		}
		want := Flatten(list)
		got, whole := intervals(sized{entries: want}.elements(), 4, 1406)
		if diff := cmp.Diff(want, got, addrs, cmpopts.EquateEmpty()); diff != "" || !whole {
			t.Fatalf("whole %v (-want +got)\n%s", whole, diff)
		}
	})
}
