// Package index finds what belongs to a key where there are very many keys, nearly all with one value: it keeps no
// keys, a sixth of what a map of lists takes.
package index

import (
	"hash/maphash"
	"iter"
	"slices"
)

// Index finds values by a key. It may find values of other keys, too: ask what is found. The zero value is ready. It
// is not safe for concurrent use.
type Index[K, V comparable] struct {
	seed maphash.Seed
	one  Shrinking[uint64, V] // by the key's hash
	more map[uint64][]V       // where there are several
}

func (x *Index[K, V]) hash(k K) uint64 {
	if x.more == nil {
		x.seed, x.more = maphash.MakeSeed(), map[uint64][]V{}
	}
	return maphash.Comparable(x.seed, k)
}

// Grow makes room for so many keys, if there are none yet.
func (x *Index[K, V]) Grow(n int) { x.one.Grow(n) }

// Add adds a value to those of a key. One that is there already is there twice then.
func (x *Index[K, V]) Add(k K, v V) {
	h := x.hash(k)
	if list := x.more[h]; len(list) > 0 {
		x.more[h] = append(list, v)
		return
	}
	if have, ok := x.one.Map[h]; ok {
		x.more[h] = []V{have, v}
		x.one.Delete(h)
		return
	}
	x.one.Set(h, v)
}

// Remove takes a value from those of a key, if it is there: once, where it is there several times.
func (x *Index[K, V]) Remove(k K, v V) {
	h := x.hash(k)
	if have, ok := x.one.Map[h]; ok && have == v {
		x.one.Delete(h)
		return
	}
	list := x.more[h]
	i := slices.Index(list, v)
	if i < 0 {
		return
	}
	if list = slices.Delete(list, i, i+1); len(list) > 1 {
		x.more[h] = list
		return
	}
	x.one.Set(h, list[0])
	delete(x.more, h)
}

// Of yields the values of a key. They must not change meanwhile.
func (x *Index[K, V]) Of(k K) iter.Seq[V] {
	return func(yield func(V) bool) {
		if x.more == nil {
			return
		}
		h := x.hash(k)
		if v, ok := x.one.Map[h]; ok {
			yield(v)
			return
		}
		for _, v := range x.more[h] {
			if !yield(v) {
				return
			}
		}
	}
}

// Len is how many keys have values, those with the same hash counted as one.
func (x *Index[K, V]) Len() int { return len(x.one.Map) + len(x.more) }
