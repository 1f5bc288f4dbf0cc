package index

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestIndexIsAMapOfLists compares it with one after each of random changes. Two keys with one hash are not to be expected.
func TestIndexIsAMapOfLists(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var x Index[int, int]
		lists := map[int][]int{}
		for range rapid.IntRange(0, 60).Draw(t, "changes") {
			k, v := rapid.IntRange(0, 4).Draw(t, "key"), rapid.IntRange(0, 4).Draw(t, "value")
			i := slices.Index(lists[k], v)
			if rapid.Bool().Draw(t, "add") {
				x.Add(k, v)
				lists[k] = append(lists[k], v)
			} else if x.Remove(k, v); i >= 0 {
				if lists[k] = slices.Delete(lists[k], i, i+1); len(lists[k]) == 0 {
					delete(lists, k)
				}
			}
			for k := range 5 {
				got := slices.Sorted(x.Of(k))
				want := slices.Sorted(slices.Values(lists[k]))
				if !slices.Equal(got, want) {
					t.Fatalf("key %d has %v, want %v", k, got, want)
				}
			}
			if x.Len() != len(lists) {
				t.Fatalf("%d keys, want %d", x.Len(), len(lists))
			}
		}
	})
}
