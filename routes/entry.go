package routes

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// entry is a destination with the number of the set of its routes (routeSets), without a pointer: a full table costs a few bytes
// a route, and the garbage collector does not look at it. They are in the order of ComparePrefix: what contains a prefix stands
// before it, and what is inside it directly behind it.
type entry[E any] interface {
	// from is the entry of a destination, with set 0; it is false for one of the other family.
	from(netip.Prefix) (E, bool)
	prefix() netip.Prefix
	// search is the index of the first of a sorted list that is not ahead of this destination.
	search(list []E) int
	// is reports whether both have the same destination.
	is(E) bool
	contains(E) bool
	length() int
	// shared is how many leading bits both addresses have in common.
	shared(E) int
	// cut is the destination with this many of its bits.
	cut(bits int) E
	set() setNumber
	with(setNumber) E
	// marked is for dumps: see findings.
	marked() bool
	mark(bool) E
}

// setNumber is the number of a set of routes in routeSets. 25 bits are enough: memory ends long before, at some hundred bytes a set.
type setNumber uint32

// entry4 is an IPv4 entry: 32 bits of the address, 6 of the length, 25 of the set's number and the mark.
type entry4 uint64

const (
	lengthShift4 = 26
	lengthMask4  = 1<<6 - 1
	setMask4     = 1<<25 - 1
	keyMask4     = ^entry4(1<<lengthShift4 - 1) // address and length
)

func (entry4) from(p netip.Prefix) (entry4, bool) {
	if !p.IsValid() || !p.Addr().Is4() {
		return 0, false
	}
	a := p.Addr().As4()
	return entry4(binary.BigEndian.Uint32(a[:]))<<32 | entry4(p.Bits())<<lengthShift4, true
}

func (e entry4) addr() uint32 { return uint32(e >> 32) }
func (e entry4) length() int  { return int(e >> lengthShift4 & lengthMask4) }

func (e entry4) prefix() netip.Prefix {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], e.addr())
	return netip.PrefixFrom(netip.AddrFrom4(a), e.length())
}

func (e entry4) search(list []entry4) int {
	k, lo, hi := e&keyMask4, 0, len(list)
	for lo < hi {
		if m := int(uint(lo+hi) >> 1); list[m] < k {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

func (e entry4) is(o entry4) bool       { return (e^o)&keyMask4 == 0 }
func (e entry4) contains(o entry4) bool { return e.length() <= o.length() && e.shared(o) >= e.length() }
func (e entry4) shared(o entry4) int    { return bits.LeadingZeros32(e.addr() ^ o.addr()) }

func (e entry4) cut(n int) entry4 {
	return entry4(e.addr()&^(1<<(32-n)-1))<<32 | entry4(n)<<lengthShift4
}

func (e entry4) set() setNumber          { return setNumber(e >> 1 & setMask4) }
func (e entry4) with(n setNumber) entry4 { return e&^(setMask4<<1) | entry4(n&setMask4)<<1 }
func (e entry4) marked() bool            { return e&1 != 0 }
func (e entry4) mark(on bool) entry4 {
	if on {
		return e | 1
	}
	return e &^ 1
}

// entry6 is an IPv6 entry, of 24 bytes.
type entry6 struct {
	hi, lo uint64 // the address
	number setNumber
	bits   uint8
	found  bool // the mark
}

func (entry6) from(p netip.Prefix) (entry6, bool) {
	if !p.IsValid() || p.Addr().Is4() {
		return entry6{}, false
	}
	a := p.Addr().As16()
	return entry6{hi: binary.BigEndian.Uint64(a[:8]), lo: binary.BigEndian.Uint64(a[8:]), bits: uint8(p.Bits())}, true
}

func (e entry6) length() int { return int(e.bits) }

func (e entry6) prefix() netip.Prefix {
	var a [16]byte
	binary.BigEndian.PutUint64(a[:8], e.hi)
	binary.BigEndian.PutUint64(a[8:], e.lo)
	return netip.PrefixFrom(netip.AddrFrom16(a), e.length())
}

func (e entry6) search(list []entry6) int {
	lo, hi := 0, len(list)
	for lo < hi {
		if m := int(uint(lo+hi) >> 1); list[m].compare(&e) < 0 {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

func (e *entry6) compare(o *entry6) int {
	switch {
	case e.hi != o.hi:
		return cmp.Compare(e.hi, o.hi)
	case e.lo != o.lo:
		return cmp.Compare(e.lo, o.lo)
	}
	return int(e.bits) - int(o.bits)
}

func (e entry6) is(o entry6) bool       { return e.compare(&o) == 0 }
func (e entry6) contains(o entry6) bool { return e.bits <= o.bits && e.shared(o) >= e.length() }

func (e entry6) shared(o entry6) int {
	if e.hi != o.hi {
		return bits.LeadingZeros64(e.hi ^ o.hi)
	}
	return 64 + bits.LeadingZeros64(e.lo^o.lo)
}

func (e entry6) cut(n int) entry6 {
	// A shift by 64 leaves nothing.
	out := entry6{hi: e.hi &^ (^uint64(0) >> min(n, 64)), bits: uint8(n)}
	out.lo = e.lo &^ (^uint64(0) >> max(n-64, 0))
	return out
}

func (e entry6) set() setNumber { return e.number }

func (e entry6) with(n setNumber) entry6 {
	e.number = n
	return e
}

func (e entry6) marked() bool { return e.found }

func (e entry6) mark(on bool) entry6 {
	e.found = on
	return e
}
