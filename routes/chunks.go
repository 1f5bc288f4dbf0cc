package routes

import (
	"net/netip"
	"slices"
)

// prefixes are the destinations of one table, each with the number of the set of its routes. Prefixes are masked, and those of
// the other family are not there.
type prefixes interface {
	size() int
	get(dst netip.Prefix) (n setNumber, marked, ok bool)
	// put is unmarked, and returns what was there.
	put(dst netip.Prefix, n setNumber) (old setNumber, had bool)
	// add puts a destination that is not there. It is false for one that is.
	add(dst netip.Prefix, n setNumber) bool
	remove(dst netip.Prefix) (old setNumber, had bool)
	// mark marks a destination that is there, or takes its mark away.
	mark(dst netip.Prefix, on bool)
	// confirm marks a destination if it is there with the set n, and not yet marked.
	confirm(dst netip.Prefix, n setNumber) bool
	// longest is the longest destination that contains the prefix.
	longest(dst netip.Prefix) (netip.Prefix, setNumber, bool)
	// inside yields the destinations inside the prefix, itself not among them, in order.
	inside(dst netip.Prefix, yield func(netip.Prefix, setNumber) bool)
	// all yields all destinations in order.
	all(yield func(netip.Prefix, setNumber) bool)
	// rewrite replaces the set of each destination by what fn says, and drops those for which it is false. No mark is left.
	rewrite(fn func(dst netip.Prefix, n setNumber, marked bool) (setNumber, bool))
}

// chunks is a sorted list of entries in pieces of at most chunkLen. The zero value is empty.
//
//	first   [ a ········ k ········ t ]      what a piece begins with, or began with: all before it are in earlier ones
//	lists   [ a b d … ] [ k l … ] [ t u … ]  none is empty
type chunks[E entry[E]] struct {
	first []E
	lists [][]E
	n     int
	// lengths counts the entries by the length of their prefixes.
	lengths [129]uint32
}

var (
	_ prefixes = (*chunks[entry4])(nil)
	_ prefixes = (*chunks[entry6])(nil)
)

// chunkLen is 2 KiB of IPv4 entries: an insertion moves half of that.
const chunkLen = 256

func newPrefixes(f Family) prefixes {
	if f == IPv4 {
		return new(chunks[entry4])
	}
	return new(chunks[entry6])
}

// key is the entry of a destination.
func (c *chunks[E]) key(dst netip.Prefix) (E, bool) {
	var e E
	return e.from(dst.Masked())
}

// find returns where the destination of k is, or would be.
func (c *chunks[E]) find(k E) (l, i int, ok bool) {
	if len(c.lists) == 0 {
		return 0, 0, false
	}
	l = k.search(c.first)
	if l == len(c.first) || !c.first[l].is(k) {
		l = max(l-1, 0)
	}
	i = k.search(c.lists[l])
	return l, i, i < len(c.lists[l]) && c.lists[l][i].is(k)
}

// at is the entry of a destination, nil if it is not there. It is good until the next insertion or removal.
func (c *chunks[E]) at(dst netip.Prefix) *E {
	if k, ok := c.key(dst); ok {
		if l, i, ok := c.find(k); ok {
			return &c.lists[l][i]
		}
	}
	return nil
}

func (c *chunks[E]) size() int { return c.n }

func (c *chunks[E]) get(dst netip.Prefix) (n setNumber, marked, ok bool) {
	e := c.at(dst)
	if e == nil {
		return 0, false, false
	}
	return (*e).set(), (*e).marked(), true
}

func (c *chunks[E]) mark(dst netip.Prefix, on bool) {
	if e := c.at(dst); e != nil {
		*e = (*e).mark(on)
	}
}

func (c *chunks[E]) confirm(dst netip.Prefix, n setNumber) bool {
	e := c.at(dst)
	if e == nil || (*e).set() != n || (*e).marked() {
		return false
	}
	*e = (*e).mark(true)
	return true
}

func (c *chunks[E]) put(dst netip.Prefix, n setNumber) (old setNumber, had bool) {
	k, ok := c.key(dst)
	if !ok {
		return 0, false
	}
	l, i, ok := c.find(k)
	if ok {
		e := &c.lists[l][i]
		old = (*e).set()
		*e = k.with(n)
		return old, true
	}
	c.insert(l, i, k.with(n))
	return 0, false
}

func (c *chunks[E]) add(dst netip.Prefix, n setNumber) bool {
	k, ok := c.key(dst)
	if !ok {
		return false
	}
	// A dump comes nearly in order: then it is behind the last one.
	if l := len(c.lists) - 1; l >= 0 {
		list := c.lists[l]
		if i := len(list); k.search(list[i-1:]) > 0 {
			c.insert(l, i, k.with(n))
			return true
		}
	}
	l, i, ok := c.find(k)
	if ok {
		return false
	}
	c.insert(l, i, k.with(n))
	return true
}

func (c *chunks[E]) insert(l, i int, e E) {
	c.n++
	c.lengths[e.length()]++
	if len(c.lists) == 0 {
		c.first, c.lists = append(c.first, e), append(c.lists, []E{e})
		return
	}
	if l == 0 && i == 0 {
		c.first[0] = e
	}
	list := c.lists[l]
	if len(list) < chunkLen {
		if l > 0 && i == len(list) && l == len(c.lists)-1 && len(list) == cap(list) { // a dump, which goes on
			list = append(make([]E, 0, chunkLen), list...)
		}
		c.lists[l] = slices.Insert(roomy(list), i, e)
		return
	}
	// A dump comes nearly in order: then pieces get full, where others are halved.
	cut := chunkLen / 2
	if i > chunkLen*7/8 {
		cut = i
	}
	left, right := list[:cut], slices.Clone(list[cut:])
	if cut < i || cut == chunkLen {
		right = slices.Insert(roomy(right), i-cut, e)
	} else {
		left = slices.Insert(left, i, e)
	}
	if cut == chunkLen/2 {
		left = slices.Clone(left)
	}
	c.lists[l] = left
	c.first = slices.Insert(c.first, l+1, right[0])
	c.lists = slices.Insert(c.lists, l+1, right)
}

// roomy is a list with room for one more, and some.
func roomy[T any](list []T) []T {
	if len(list) < cap(list) {
		return list
	}
	return append(make([]T, 0, min(chunkLen, len(list)+max(4, len(list)/2))), list...)
}

func (c *chunks[E]) remove(dst netip.Prefix) (old setNumber, had bool) {
	k, ok := c.key(dst)
	if !ok {
		return 0, false
	}
	l, i, ok := c.find(k)
	if !ok {
		return 0, false
	}
	old = c.lists[l][i].set()
	c.n--
	c.lengths[k.length()]--
	c.lists[l] = slices.Delete(c.lists[l], i, i+1)
	c.shrink(l)
	return old, true
}

// shrink joins a piece that has become small with a neighbour.
func (c *chunks[E]) shrink(l int) {
	switch list := c.lists[l]; {
	case len(list) == 0:
		c.cut(l)
	case l+1 < len(c.lists) && joins(list, c.lists[l+1]):
		c.lists[l] = slices.Concat(list, c.lists[l+1])
		c.cut(l + 1)
	case l > 0 && joins(c.lists[l-1], list):
		c.lists[l-1] = slices.Concat(c.lists[l-1], list)
		c.cut(l)
	default:
		c.lists[l] = fitted(list)
	}
}

// joins reports whether two neighbours are one piece from now on: one is small, and there is room left for more.
func joins[T any](a, b []T) bool {
	return min(len(a), len(b)) < chunkLen/4 && len(a)+len(b) <= chunkLen*3/4
}

// cut takes a piece out of the lists.
func (c *chunks[E]) cut(l int) {
	c.first = fitted(slices.Delete(c.first, l, l+1))
	c.lists = fitted(slices.Delete(c.lists, l, l+1))
}

// fitted is a list without the memory that it does not need any more.
func fitted[T any](list []T) []T {
	if cap(list) > 8 && len(list) < cap(list)/4 {
		return slices.Clone(list)
	}
	return list
}

// longest looks for what stands directly ahead: if that does not contain the prefix, what does contains both.
func (c *chunks[E]) longest(dst netip.Prefix) (netip.Prefix, setNumber, bool) {
	k, ok := c.key(dst)
	for ok {
		l, i, exact := c.find(k)
		var e E
		switch {
		case exact:
			e = c.lists[l][i]
		case i > 0:
			e = c.lists[l][i-1]
		case l > 0:
			e = c.lists[l-1][len(c.lists[l-1])-1]
		default:
			return netip.Prefix{}, 0, false
		}
		if e.contains(k) {
			return e.prefix(), e.set(), true
		}
		n := e.shared(k)
		for n >= 0 && c.lengths[n] == 0 {
			n--
		}
		if ok = n >= 0; ok {
			k = k.cut(n)
		}
	}
	return netip.Prefix{}, 0, false
}

func (c *chunks[E]) inside(dst netip.Prefix, yield func(netip.Prefix, setNumber) bool) {
	k, ok := c.key(dst)
	if !ok {
		return
	}
	l, i, exact := c.find(k)
	if exact {
		i++
	}
	for ; l < len(c.lists); l, i = l+1, 0 {
		for ; i < len(c.lists[l]); i++ {
			if e := c.lists[l][i]; !k.contains(e) || !yield(e.prefix(), e.set()) {
				return
			}
		}
	}
}

func (c *chunks[E]) all(yield func(netip.Prefix, setNumber) bool) {
	for _, list := range c.lists {
		for _, e := range list {
			if !yield(e.prefix(), e.set()) {
				return
			}
		}
	}
}

func (c *chunks[E]) rewrite(fn func(netip.Prefix, setNumber, bool) (setNumber, bool)) {
	lists := c.lists
	c.first, c.lists = c.first[:0], c.lists[:0]
	for _, list := range lists {
		kept := list[:0]
		for _, e := range list {
			n, ok := fn(e.prefix(), e.set(), e.marked())
			if ok {
				kept = append(kept, e.with(n).mark(false))
				continue
			}
			c.n--
			c.lengths[e.length()]--
		}
		last := len(c.lists) - 1
		switch {
		case len(kept) == 0:
		case last >= 0 && joins(c.lists[last], kept):
			c.lists[last] = slices.Concat(c.lists[last], kept)
		default:
			c.first, c.lists = append(c.first, kept[0]), append(c.lists, fitted(kept))
		}
	}
	clear(lists[len(c.lists):])
	c.first, c.lists = fitted(c.first), fitted(c.lists)
}
