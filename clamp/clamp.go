// Package clamp lowers the maximum segment size (MSS) of the TCP connections that a host forwards
// to and from chosen destinations, by one nftables table of ours:
//
//	table inet tsoagent {
//		set v4_1406 {
//			type ipv4_addr
//			flags interval
//			elements = { 10.3.0.0/16 }
//		}
//		chain mss {
//			ip daddr @v4_1406 tcp option maxseg size set 1406 comment "tsoagent"
//			ip saddr @v4_1406 tcp option maxseg size set 1406 comment "tsoagent"
//		}
//		chain forward {
//			type filter hook forward priority mangle + 10; policy accept;
//			tcp flags syn jump mss comment "tsoagent"
//		}
//	}
//
// with a set for each family and MSS. An MSS option limits what its *receiver* sends. So a SYN or
// SYN/ACK to a destination (daddr) limits what comes back from there, and one from a destination
// (saddr) limits what is sent to it. The kernel only ever lowers an MSS that it is told to set
// (nft_exthdr_tcp_set_eval, net/netfilter/nft_exthdr.c), so where the host has a clamp of its own
// the smaller one holds, whichever comes first. The table moves no packet, and takes none away.
//
// One map of destinations to MSS values would do with fewer rules, but nft (1.0.6) prints
// `size set ip daddr map @m` as `size set @nh,128,32 map @m`, which it then refuses to read: a
// ruleset that somebody has saved with such a table in it would not load at the next boot.
package clamp

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Name is the name of our table, of family inet. It is also the comment of our rules.
const Name = "tsoagent"

// Entry is one interval of addresses, both ends included, with the MSS in bytes that TCP
// connections to and from them are lowered to. It is comparable.
type Entry struct {
	Lo, Hi netip.Addr
	MSS    uint16
}

// String is the entry's prefix, or its two ends where it is no prefix, and its MSS.
func (e Entry) String() string {
	return fmt.Sprintf("%s mss %d", e.Range(), e.MSS)
}

// Range is the entry's prefix, or its two ends where it is no prefix.
func (e Entry) Range() string {
	if p, err := e.Lo.Prefix(commonBits(e.Lo, e.Hi)); err == nil && p.Addr() == e.Lo && last(p) == e.Hi {
		return p.String()
	}
	return e.Lo.String() + "-" + e.Hi.String()
}

// Compare orders entries by family and address.
func Compare(a, b Entry) int {
	return cmp.Or(a.Lo.Compare(b.Lo), a.Hi.Compare(b.Hi), cmp.Compare(a.MSS, b.MSS))
}

// Point gives all addresses of a prefix an MSS, but those of a longer prefix that has a point of
// its own. An MSS of 0 is a hole: those addresses are not clamped.
type Point struct {
	Prefix netip.Prefix
	MSS    uint16
}

// Flatten turns points, in any order, into disjoint entries in the order of their addresses:
// each address has the MSS of the longest prefix that contains it. Of two points with the same
// prefix the smaller MSS holds, and a hole only where all are holes. Neighbours with the same MSS
// are one entry.
func Flatten(points []Point) []Entry {
	points = slices.Clone(points)
	slices.SortFunc(points, func(a, b Point) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()),
			cmp.Compare(a.MSS-1, b.MSS-1)) // a hole, which wraps, comes last
	})
	points = slices.CompactFunc(points, func(a, b Point) bool { return a.Prefix == b.Prefix })
	f := flattener{}
	for _, p := range points {
		f.leave(p.Prefix.Addr())
		f.fill(p.Prefix.Addr())
		f.open = append(f.open, p)
		f.next = p.Prefix.Addr()
	}
	f.leave(netip.Addr{})
	return f.out
}

// flattener sweeps over the addresses. The open points contain each other, the last one is the
// longest; what is below next is done.
type flattener struct {
	out  []Entry
	open []Point
	next netip.Addr // invalid once the last address of its family is done
}

// leave closes the open points that don't contain the address; all of them if it is invalid.
func (f *flattener) leave(a netip.Addr) {
	for n := len(f.open); n > 0; n = len(f.open) {
		p := f.open[n-1]
		if a.IsValid() && p.Prefix.Contains(a) {
			return
		}
		f.emit(last(p.Prefix), p.MSS)
		f.open = f.open[:n-1]
	}
}

// fill emits what the innermost open point has ahead of the address.
func (f *flattener) fill(a netip.Addr) {
	if n := len(f.open); n > 0 {
		f.emit(a.Prev(), f.open[n-1].MSS)
	}
}

// emit emits an entry from next to hi, if that is any address at all.
func (f *flattener) emit(hi netip.Addr, mss uint16) {
	lo := f.next
	if !lo.IsValid() || !hi.IsValid() || lo.BitLen() != hi.BitLen() || hi.Less(lo) {
		return
	}
	f.next = hi.Next()
	if mss == 0 {
		return
	}
	if n := len(f.out); n > 0 && f.out[n-1].MSS == mss && f.out[n-1].Hi.Next() == lo {
		f.out[n-1].Hi = hi
		return
	}
	f.out = append(f.out, Entry{lo, hi, mss})
}

// last is the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func commonBits(a, b netip.Addr) int {
	x, y := a.AsSlice(), b.AsSlice()
	n := 0
	for n < len(x)*8 && n < len(y)*8 && (x[n/8]^y[n/8])&(0x80>>(n%8)) == 0 {
		n++
	}
	return n
}

// State is what the kernel has under the name of our table.
type State struct {
	// There says that there is a table of that name and family.
	There bool
	// Ours says that it is of our making: a rule of it has our comment, or somebody flushed the
	// rules, and our chains are left.
	Ours bool
	// Whole says that its chains, sets and rules are just those that we write for the entries.
	Whole bool
	// Entries are those of the sets, in order.
	Entries []Entry
}

// Is reports whether the table is ours, whole, and has just these entries (in order).
func (s State) Is(entries []Entry) bool {
	return s.Ours && s.Whole && slices.Equal(s.Entries, entries)
}
