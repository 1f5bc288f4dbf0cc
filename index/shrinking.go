package index

import "maps"

// Shrinking is a map that takes less memory again when little is left of it; the runtime's own never do. Map is to be
// read and walked, and changed by the methods alone. The zero value is ready. It is not safe for concurrent use.
type Shrinking[K comparable, V any] struct {
	Map  map[K]V
	most int // entries that it had since it was made
}

// A map is made anew when less than a part of its entries is left, if it had that many.
const (
	shrinkPart = 8
	shrinkFrom = 1024
)

// Grow makes room for so many entries, if there are none yet.
func (s *Shrinking[K, V]) Grow(n int) {
	if s.Map == nil && n >= shrinkFrom {
		s.Map, s.most = make(map[K]V, n), n
	}
}

// Set sets a value.
func (s *Shrinking[K, V]) Set(k K, v V) {
	if s.Map == nil {
		s.Map = map[K]V{}
	}
	s.Map[k] = v
	s.most = max(s.most, len(s.Map))
}

// Delete deletes a value, if there is one. It must not be called while the map is walked.
func (s *Shrinking[K, V]) Delete(k K) {
	delete(s.Map, k)
	if n := len(s.Map); s.most >= shrinkFrom && n < s.most/shrinkPart {
		fresh := make(map[K]V, n)
		maps.Copy(fresh, s.Map)
		s.Map, s.most = fresh, n
	}
}
