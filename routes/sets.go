package routes

import (
	"net/netip"
	"slices"
)

// routeSets numbers the sets of routes that destinations have: a full table has a few of them only, as routes that differ only
// in their destination share a Body. The zero value is empty.
type routeSets struct {
	list    []routeSet
	free    []setNumber // of list
	numbers map[setKey]setNumber
	peak    int // the most sets since numbers was made
}

// routeSet is the routes of so many destinations.
type routeSet struct {
	paths *Paths
	uses  int32
}

// setKey is the routes of a set in their order. Sets of more routes than it can hold are not shared.
type setKey [4]*Body

func keyOf(bodies []*Body) (k setKey, ok bool) {
	return k, copy(k[:], bodies) == len(bodies)
}

// use returns the number of the set for one more destination.
func (s *routeSets) use(bodies []*Body) setNumber {
	k, shared := keyOf(bodies)
	if shared {
		if n, ok := s.numbers[k]; ok {
			s.list[n].uses++
			return n
		}
	}
	n := setNumber(len(s.list))
	if last := len(s.free) - 1; last >= 0 {
		n, s.free = s.free[last], s.free[:last]
	} else {
		s.list = append(s.list, routeSet{})
	}
	s.list[n] = routeSet{pathsOf(bodies), 1}
	if shared {
		if s.numbers == nil {
			s.numbers = map[setKey]setNumber{}
		}
		s.numbers[k] = n
		s.peak = max(s.peak, len(s.numbers))
	}
	return n
}

// number is the number of a set, if it has one that others can share.
func (s *routeSets) number(bodies ...*Body) (setNumber, bool) {
	k, _ := keyOf(bodies)
	n, ok := s.numbers[k]
	return n, ok
}

// drop is the end of one use.
func (s *routeSets) drop(n setNumber) {
	set := &s.list[n]
	if set.uses--; set.uses > 0 {
		return
	}
	if k, shared := keyOf(set.paths.bodies); shared {
		delete(s.numbers, k)
	}
	*set = routeSet{}
	s.free = append(s.free, n)
	if s.peak > 1024 && len(s.numbers) < s.peak/4 { // a map keeps the size that it once had
		s.numbers, s.peak = cloned(s.numbers), len(s.numbers)
	}
}

// cloned is the map in the size that it needs. maps.Clone keeps the size that it once had.
func cloned[K comparable, V any](m map[K]V) map[K]V {
	out := make(map[K]V, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// packed renumbers the sets if there were very many more once, and returns the new number of each old one, else nil.
func (s *routeSets) packed() (now []setNumber) {
	if len(s.list) < 1024 || len(s.free) < len(s.list)*3/4 {
		return nil
	}
	now = make([]setNumber, len(s.list))
	left := make([]routeSet, 0, len(s.list)-len(s.free))
	numbers := make(map[setKey]setNumber, len(s.numbers))
	for old, set := range s.list {
		if set.uses == 0 {
			continue
		}
		n := setNumber(len(left))
		now[old], left = n, append(left, set)
		if k, shared := keyOf(set.paths.bodies); shared {
			numbers[k] = n
		}
	}
	*s = routeSets{list: left, numbers: numbers, peak: len(numbers)}
	return now
}

// at is a set, which is none where there is no such number.
func (s *routeSets) at(n setNumber) routeSet {
	if int(n) >= len(s.list) {
		return routeSet{}
	}
	return s.list[n]
}

func (s *routeSets) paths(n setNumber) *Paths { return s.list[n].paths }

// store holds the routes of all tables.
type store struct {
	sets   *routeSets
	tables map[tableKey]prefixes
	n      int // routes
}

func newStore(sets *routeSets) store { return store{sets: sets, tables: map[tableKey]prefixes{}} }

func (s *store) get(k tableKey, dst netip.Prefix) []*Body {
	t := s.tables[k]
	if t == nil {
		return nil
	}
	n, _, ok := t.get(dst)
	if !ok {
		return nil
	}
	return s.sets.paths(n).bodies
}

// put gives a destination its routes; without any it goes.
func (s *store) put(k tableKey, dst netip.Prefix, bodies []*Body) {
	t := s.tables[k]
	var old setNumber
	var had bool
	switch {
	case len(bodies) > 0:
		if t == nil {
			t = newPrefixes(FamilyOf(dst.Addr()))
			s.tables[k] = t
		}
		old, had = t.put(dst, s.sets.use(bodies))
	case t == nil:
		return
	default:
		old, had = t.remove(dst)
		if t.size() == 0 {
			delete(s.tables, k)
		}
	}
	s.n += len(bodies)
	if had {
		s.n -= len(s.sets.paths(old).bodies)
		s.sets.drop(old)
	}
}

// pack gives memory back that sets took which are gone.
func (s *store) pack() {
	if now := s.sets.packed(); now != nil {
		for _, t := range s.tables {
			t.rewrite(func(_ netip.Prefix, n setNumber, _ bool) (setNumber, bool) { return now[n], true })
		}
	}
}

// routes yields all routes of a table, destination by destination.
func (s *store) routes(k tableKey, yield func(Route) bool) {
	t := s.tables[k]
	if t == nil {
		return
	}
	t.all(func(dst netip.Prefix, n setNumber) bool {
		return !slices.ContainsFunc(s.sets.paths(n).bodies, func(b *Body) bool { return !yield(Route{dst, b}) })
	})
}

// release is the end of a store whose sets are another one's, too.
func (s *store) release() {
	for _, t := range s.tables {
		t.all(func(_ netip.Prefix, n setNumber) bool {
			s.sets.drop(n)
			return true
		})
	}
	*s = newStore(s.sets)
}
