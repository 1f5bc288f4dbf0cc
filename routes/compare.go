package routes

import (
	"encoding/binary"
	"slices"
	"strings"
)

// Equal reports whether two routes are the same but for what the kernel sets by itself: dead,
// linkdown, offload and trap flags and, with a nexthop object, the nexthops that it has.
func Equal(a, b *Body) bool { return equal(a, b, true) }

// EqualButMTU is Equal without regard to the MTU metric and its lock bit: is this the owner's
// route, with or without our lock?
func EqualButMTU(a, b *Body) bool { return equal(a, b, false) }

func equal(a, b *Body, mtu bool) bool {
	if a == b {
		return true
	}
	return a != nil && b != nil && a.Expires == b.Expires &&
		canonical(a, mtu) == canonical(b, mtu) && SameNexthops(a, b)
}

// SameNexthops reports whether packets leave by the same ways: the same nexthop object, or else
// the same devices, gateways, weights and encapsulations, in any order.
func SameNexthops(a, b *Body) bool {
	if a == b {
		return true
	}
	if a == nil || b == nil || a.NHID != b.NHID {
		return false
	}
	return a.NHID != 0 || slices.Equal(hopsOf(a), hopsOf(b))
}

// SameWays reports whether each packet leaves by the same way, whether a nexthop object or the
// route itself says which: several ways have the same order, by which the kernel spreads flows
// over them (fib_rebalance, net/ipv4/fib_semantics.c). The weight of an only one counts for
// nothing.
func SameWays(a, b *Body) bool {
	if a == b {
		return true
	}
	if a == nil || b == nil {
		return false
	}
	x, y := bareHops(a), bareHops(b)
	if len(x) == 1 && len(y) == 1 {
		return unweighted(x[0]) == unweighted(y[0])
	}
	return slices.Equal(x, y)
}

// bareHops is orderedHops without the flag onlink, which says how a gateway was checked when it was
// written and nothing else.
func bareHops(b *Body) []string {
	out := orderedHops(b)
	for i, h := range out {
		out[i] = h[:2] + string([]byte{h[2] &^ NexthopOnlink}) + h[3:]
	}
	return out
}

// unweighted is an item of orderedHops without its weight (rtnh_hops).
func unweighted(hop string) string { return hop[:3] + "\x00" + hop[4:] }

// canonical is the header and all attributes but the nexthops, sorted, without what the kernel
// sets by itself.
func canonical(b *Body, mtu bool) string {
	raw := []byte(b.Raw)
	if len(raw) < rtmsgLen {
		return ""
	}
	head := slices.Clone(raw[:rtmsgLen])
	// The low byte holds the flags of a single nexthop.
	binary.NativeEndian.PutUint32(head[8:], binary.NativeEndian.Uint32(head[8:])&^(routeKernelFlags|0xff))
	var parts []string
	a := attrs{b: raw[rtmsgLen:]}
	for a.next() {
		switch a.typ {
		case rtaDst, rtaCacheinfo, rtaExpires:
		case rtaOif, rtaGateway, rtaVia, rtaEncap, rtaEncapType, rtaFlow, rtaMultipath:
		case rtaMetrics:
			c := change{}
			if mtu {
				c.mtu = MTUMetricOf(b)
			}
			parts = append(parts, string(appendMetrics(nil, a.val, c)))
		default:
			parts = append(parts, string(appendRaw(nil, a.raw)))
		}
	}
	slices.Sort(parts)
	return string(head) + strings.Join(parts, "")
}

// hopsOf is orderedHops, sorted.
func hopsOf(b *Body) []string {
	out := orderedHops(b)
	slices.Sort(out)
	return out
}

// orderedHops is one string for each nexthop: flags, weight and device, then the attributes.
func orderedHops(b *Body) []string {
	raw := []byte(b.Raw)
	if len(raw) < rtmsgLen {
		return nil
	}
	var out []string
	var single []string
	head := make([]byte, rtnexthopLen)
	head[2] = uint8(binary.NativeEndian.Uint32(raw[8:])) &^ nexthopKernelFlags
	one := false
	a := attrs{b: raw[rtmsgLen:]}
	for a.next() {
		switch a.typ {
		case rtaMultipath:
			_ = eachHop(a.val, func(hop []byte) error {
				h := slices.Clone(hop[:rtnexthopLen])
				h[0], h[1] = 0, 0
				h[2] &^= nexthopKernelFlags
				var parts []string
				n := attrs{b: hop[rtnexthopLen:]}
				for n.next() {
					parts = append(parts, n.hopAttr())
				}
				slices.Sort(parts)
				out = append(out, string(h)+strings.Join(parts, ""))
				return n.err
			})
		case rtaOif:
			one = true
			copy(head[4:], a.val)
		case rtaGateway, rtaVia, rtaEncap, rtaEncapType, rtaFlow:
			one = true
			single = append(single, a.hopAttr())
		}
	}
	if one && len(out) == 0 {
		slices.Sort(single)
		out = []string{string(head) + strings.Join(single, "")}
	}
	return out
}

// hopAttr is an attribute of a nexthop. Whether RTA_ENCAP is marked as nested makes no
// difference: the kernel shows it without, and takes it with.
func (a *attrs) hopAttr() string {
	b := appendRaw(nil, a.raw)
	if a.typ == rtaEncap {
		markNested(b)
	}
	return string(b)
}
