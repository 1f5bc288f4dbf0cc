package routes

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestDumpTakesEffectAtItsEnd: a kernel changes without a word, and a dump is taken, which may be lost half-way. Up to its end
// nothing in the mirror changes; then it is the kernel's, and just what differs is told.
func TestDumpTakesEffectAtItsEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := &fakeKernel{family: rapid.SampledFrom([]Family{IPv4, IPv6}).Draw(t, "family"), lists: map[netip.Prefix][]*fakeRoute{}}
		f := NewFIB()
		k.dump(f, Scope{})
		var told []Change
		f.OnChange(func(c Change) { told = append(told, c) })
		for range rapid.IntRange(1, 6).Draw(t, "dumps") {
			before := mirrorText(f, k.family)
			for range rapid.IntRange(0, 8).Draw(t, "silent") {
				k.request(t, rapid.IntRange(0, 6).Draw(t, "request"))
			}
			scope := rapid.SampledFrom([]Scope{{}, {RoutesOnly: true}, {RoutesOnly: true, Family: k.family}}).Draw(t, "scope")
			items := inPieces(t, k.items(scope))
			if rapid.IntRange(0, 2).Draw(t, "lost") == 0 {
				f.Apply(ResyncBegin{Scope: scope})
				for _, ev := range items[:rapid.IntRange(0, len(items)).Draw(t, "until")] {
					f.Apply(ev)
				}
				if rapid.Bool().Draw(t, "told") {
					f.Apply(Lost{})
					scope = Scope{}
				}
			}
			stale := f.Stale()
			told = nil
			f.Apply(ResyncBegin{Scope: scope})
			for range rapid.IntRange(1, 2).Draw(t, "times") { // a dump may be repeated
				for _, ev := range items {
					f.Apply(ev)
				}
			}
			if diff := gocmp.Diff(before, mirrorText(f, k.family)); diff != "" || len(told) > 0 {
				t.Fatalf("in the middle of a dump %v is told, and (-before +now):\n%s", told, diff)
			}
			if e := f.Apply(ResyncEnd{Scope: scope}); e.Resync != nil {
				t.Fatalf("asks for %+v after %+v", e.Resync, scope)
			}
			if diff := gocmp.Diff(k.text(), mirrorText(f, k.family)); diff != "" {
				t.Fatalf("after a dump (-kernel +mirror):\n%s", diff)
			}
			want := changedDsts(k.family, before, mirrorText(f, k.family))
			if stale {
				want = []Change{{All: true}}
			}
			if diff := gocmp.Diff(want, sortedChanges(told), gocmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
				t.Fatalf("what is told (-want +got):\n%s", diff)
			}
			checkIndexes(t, f)
			checkSets(t, f)
		}
	})
}

// items are what a dump shows.
func (k *fakeKernel) items(scope Scope) []Event {
	var out []Event
	for _, dst := range slices.SortedFunc(maps.Keys(k.lists), ComparePrefix) {
		for _, r := range k.lists[dst] {
			if ev := (RouteSet{Route: k.route(dst, r)}); scope.covers(ev.Route.Body) {
				out = append(out, ev)
			}
		}
	}
	return out
}

// inPieces puts what a dump shows into RoutesFound, or leaves it as it is. The kernel has an order of destinations of its own.
func inPieces(t *rapid.T, items []Event) (out []Event) {
	if !rapid.Bool().Draw(t, "pieces") {
		return items
	}
	slices.SortStableFunc(items, func(a, b Event) int { return -ComparePrefix(a.(RouteSet).Route.Dst, b.(RouteSet).Route.Dst) })
	for piece := range slices.Chunk(items, rapid.IntRange(1, 4).Draw(t, "piece")) {
		var found RoutesFound
		for _, ev := range piece {
			found.Routes = append(found.Routes, ev.(RouteSet).Route)
		}
		out = append(out, found)
	}
	return out
}

// changedDsts are the destinations of lines that are not in both texts.
func changedDsts(f Family, a, b []string) (out []Change) {
	seen := map[string]bool{}
	for _, pair := range [][2][]string{{a, b}, {b, a}} {
		for _, line := range pair[0] {
			dst, _, _ := strings.Cut(line, " ")
			if !slices.Contains(pair[1], line) && !seen[dst] {
				seen[dst] = true
				out = append(out, Change{Family: f, Dst: netip.MustParsePrefix(dst), Table: TableMain})
			}
		}
	}
	return sortedChanges(out)
}

func sortedChanges(list []Change) []Change {
	slices.SortFunc(list, func(a, b Change) int { return ComparePrefix(a.Dst, b.Dst) })
	return list
}

// checkSets counts anew how many destinations have each set, and looks for marks that were left.
func checkSets(t *rapid.T, f *FIB) {
	t.Helper()
	uses := map[setNumber]int32{}
	n := 0
	for k, table := range f.tables {
		table.all(func(dst netip.Prefix, number setNumber) bool {
			uses[number]++
			n += len(f.sets.paths(number).bodies)
			if _, marked, _ := table.get(dst); marked {
				t.Fatalf("%s of %v is still marked", dst, k)
			}
			return true
		})
	}
	if n != f.Len() {
		t.Fatalf("Len is %d, there are %d", f.Len(), n)
	}
	shared := 0
	for number, set := range f.sets.list {
		if set.uses != uses[setNumber(number)] {
			t.Fatalf("set %d counts %d uses, there are %d", number, set.uses, uses[setNumber(number)])
		}
		if set.uses == 0 {
			continue
		}
		if key, ok := keyOf(set.paths.bodies); ok {
			shared++
			if at, ok := f.sets.numbers[key]; !ok || at != setNumber(number) {
				t.Fatalf("set %d is found as %d", number, at)
			}
		}
	}
	if shared != len(f.sets.numbers) {
		t.Fatalf("%d sets are shared, %d are found", shared, len(f.sets.numbers))
	}
}

// TestOwnInTheMiddleOfADump: what we wrote holds at once and after the dump, whether that has passed by it already or not.
func TestOwnInTheMiddleOfADump(t *testing.T) {
	var in Interner
	a, b, was := parsed(t, &in, "10.1.0.0/16", 2), parsed(t, &in, "10.2.0.0/16", 2), parsed(t, &in, "10.1.0.0/16", 3)
	for name, scope := range map[string]Scope{"full": {}, "of routes": {RoutesOnly: true}} {
		for _, finds := range []string{"was, then", "now", "was"} { // what the dump finds: ahead of what is ours, or behind it
			f := NewFIB()
			f.Apply(ResyncBegin{})
			f.Apply(RouteSet{Route: was})
			f.Apply(RouteSet{Route: b})
			f.Apply(ResyncEnd{})

			f.Apply(ResyncBegin{Scope: scope})
			if finds == "was, then" {
				f.Apply(RouteSet{Route: was})
				f.Apply(RouteSet{Route: b})
			}
			f.Own(RouteSet{Route: a, Replace: true})
			f.Own(RouteGone{Route: b})
			holds := func(when string) {
				t.Helper()
				if got, n := f.Get(a.Key()); n != 1 || got.Body != a.Body || f.Len() != 1 {
					t.Errorf("%s, finds %q: %d routes %s, of which the first is by %v", name, finds, f.Len(), when, got.Body.Nexthops)
				}
			}
			holds("at once")
			switch finds {
			case "now":
				f.Apply(RouteSet{Route: a})
			case "was":
				f.Apply(RouteSet{Route: was})
				f.Apply(RouteSet{Route: b})
			}
			f.Apply(ResyncEnd{Scope: scope})
			holds("after the dump")
		}
	}
}
