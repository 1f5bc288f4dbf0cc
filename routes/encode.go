package routes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Encoding of routes. A write starts from the raw attributes of a Body, so that what this
// package does not know survives it: reading a route into fields and writing the fields back
// loses other locked metrics, nexthop ids, IPv6 preferences and more.
//
// Each function returns the payload of an RTM_NEWROUTE message. The same payload under
// RTM_DELROUTE names exactly that route.

// errRaw is the error for a Body that did not come from a decoder.
var errRaw = errors.New("the route has no raw attributes")

// MTUMetric is what a write does with the MTU metric: MTU in bytes, 0 to have none. Locked
// sets its bit in RTAX_LOCK (`mtu lock N`); without an MTU there is no bit either.
type MTUMetric struct {
	MTU    uint32
	Locked bool
}

// String is the metric in iproute2's words: "mtu lock 1400", "mtu 1400" or "no mtu".
func (m MTUMetric) String() string {
	switch {
	case m.MTU == 0:
		return "no mtu"
	case m.Locked:
		return fmt.Sprintf("mtu lock %d", m.MTU)
	}
	return fmt.Sprintf("mtu %d", m.MTU)
}

// MTUMetricOf is the MTU metric that the route has.
func MTUMetricOf(b *Body) MTUMetric {
	return MTUMetric{MTU: b.Metrics.MTU, Locked: b.Metrics.MTU != 0 && b.Metrics.MTULocked()}
}

// EncodeLock is the route itself with another MTU metric, to be written with Table.Replace. All
// other attributes are as they came, other metrics and their locks included. Of a route with a
// nexthop object the nexthops are left out: the kernel sends both, but takes only one. What the
// kernel sets by itself (dead, linkdown, offload, trap, the cache information) is left out too.
//
// Whether a replace is safe for this route is the caller's to decide: it hits the first route
// with the key. A route that expires would lose that, so it is refused.
//
// An IPv4 lock on a route with a nexthop object spreads: the kernel (seen on 6.12 and 6.18)
// gives it to every route that is added later without metrics, with the same object, protocol,
// table, scope, preferred source and metric. They show the lock in their events, and EncodeLock
// with no MTU takes it from each.
func EncodeLock(r Route, m MTUMetric) ([]byte, error) {
	if r.Body != nil && r.Body.Expires {
		return nil, fmt.Errorf("routes: lock mtu on %s: the route expires", r.Dst)
	}
	b, err := encode(r, change{metrics: true, mtu: m})
	if err != nil {
		return nil, fmt.Errorf("routes: lock mtu on %s: %w", r.Dst, err)
	}
	return b, nil
}

// EncodeRoute is the route as it is, as for putting one back.
func EncodeRoute(r Route) ([]byte, error) {
	b, err := encode(r, change{})
	if err != nil {
		return nil, fmt.Errorf("routes: encode %s: %w", r.Dst, err)
	}
	return b, nil
}

// EncodeDelete names the route for Table.Delete as precisely as the kernel can tell routes
// apart: by key, type, protocol, scope, preferred source, nexthops and, for IPv4, metrics, so
// that neither an IPv6 sibling nor an IPv4 route with the same key is hit. Two things the
// kernel does not look at (fib_table_delete, ip6_route_del): an IPv4 metric of 0 matches any,
// and on IPv6 a route with a nexthop object is found by key and protocol alone.
func EncodeDelete(r Route) ([]byte, error) {
	b, err := encode(r, change{})
	if err != nil {
		return nil, fmt.Errorf("routes: delete %s: %w", r.Dst, err)
	}
	return b, nil
}

// EncodeClone is a copy of the route for another destination in another table, with the same
// nexthops, preferred source, scope, TOS and encapsulation, its own MTU metric and protocol and
// no expiry. An advmss of 0 leaves that metric as it is, a metric of 0 has none (which IPv6
// turns into 1024).
//
// The nexthops of a nexthop object are written out. The kernel keeps what it has looked up, with
// the metrics of the route that it was looked up by, at the object (nhc_pcpu_rth_output in
// net/ipv4/route.c, rt6i_pcpu in net/ipv6/route.c): with the same object the lock of the clone
// would reach the flows of the route, or be missing for its own, whoever came first.
func EncodeClone(r Route, dst netip.Prefix, table TableID, proto Protocol, m MTUMetric, advmss, metric uint32) ([]byte, error) {
	if r.Body != nil && FamilyOf(dst.Addr()) != r.Body.Family {
		return nil, fmt.Errorf("routes: clone %s for %s: another address family", r.Dst, dst)
	}
	b, err := encode(Route{Dst: dst, Body: r.Body}, change{
		metrics: true, mtu: m, advmss: advmss,
		move: true, table: table, protocol: proto, priority: metric,
	})
	if err != nil {
		return nil, fmt.Errorf("routes: clone %s for %s: %w", r.Dst, dst, err)
	}
	return b, nil
}

// OnLink is the route of an Encode function with the nexthops marked as on their links (`onlink`),
// so that the kernel does not look their gateways up. IPv6 looks them up in the route's own table,
// then by the rules, and takes a throw for an answer there (fib6_rule_action_alt,
// net/ipv6/fib6_rules.c): a table of ours ahead of one that throws its gateway's net to main could
// not have a clone by that gateway.
func OnLink(msg []byte) []byte {
	out := slices.Clone(msg)
	if len(out) < rtmsgLen {
		return out
	}
	single := true
	a := attrs{b: out[rtmsgLen:]}
	for a.next() {
		if a.typ == rtaMultipath {
			single = false
			_ = eachHop(a.val, func(hop []byte) error {
				hop[2] |= NexthopOnlink
				return nil
			})
		}
	}
	if single {
		flags := binary.NativeEndian.Uint32(out[8:])
		binary.NativeEndian.PutUint32(out[8:], flags|uint32(NexthopOnlink))
	}
	return out
}

// EncodeThrow is a route of type throw: who finds it in the table goes on with the next rule.
func EncodeThrow(f Family, dst netip.Prefix, table TableID, proto Protocol, metric uint32) ([]byte, error) {
	if !dst.IsValid() || FamilyOf(dst.Addr()) != f {
		return nil, fmt.Errorf("routes: throw %s: not an %s prefix", dst, f)
	}
	b := make([]byte, rtmsgLen, 48)
	b[0], b[5], b[7] = byte(f), byte(proto), byte(Throw)
	b = appendTable(b, table)
	b = appendDst(b, dst)
	return appendPriority(b, metric), nil
}

// change is what encode does with a route besides leaving out what the kernel sets by itself.
type change struct {
	metrics bool // set the MTU metric, and advmss where it is not 0
	mtu     MTUMetric
	advmss  uint32

	move     bool // set the next three
	table    TableID
	protocol Protocol
	priority uint32
}

func encode(r Route, c change) ([]byte, error) {
	b := r.Body
	if b == nil || len(b.Raw) < rtmsgLen {
		return nil, errRaw
	}
	if !r.Dst.IsValid() || FamilyOf(r.Dst.Addr()) != b.Family {
		return nil, errAddress
	}
	raw := []byte(b.Raw)
	out := make([]byte, 0, len(raw)+48)
	out = append(out, raw[:rtmsgLen]...)
	flags := binary.NativeEndian.Uint32(raw[8:]) &^ routeKernelFlags
	object := b.NHID != 0 && !c.move
	if object {
		flags &^= 0xff // those of the nexthop, which the object has itself
	}
	binary.NativeEndian.PutUint32(out[8:], flags)
	if c.move {
		out[5] = byte(c.protocol)
		out = appendTable(out, c.table)
	}
	out = appendDst(out, r.Dst)
	metrics, empty := false, true
	a := attrs{b: raw[rtmsgLen:]}
	for a.next() {
		switch a.typ {
		case rtaDst, rtaCacheinfo, rtaExpires:
		case rtaTable:
			if !c.move {
				out = appendRaw(out, a.raw)
			}
		case rtaPriority:
			if !c.move {
				out = appendRaw(out, a.raw)
			}
		case rtaMetrics:
			n := len(out)
			if c.metrics {
				metrics = true
				out = appendMetrics(out, a.val, c)
			} else {
				out = appendRaw(out, a.raw)
			}
			empty = len(out) == n
		case rtaNHID:
			if object {
				out = appendRaw(out, a.raw)
			}
		case rtaEncap:
			if !object {
				n := len(out)
				out = appendRaw(out, a.raw)
				markNested(out[n:])
			}
		case rtaOif, rtaGateway, rtaVia, rtaEncapType, rtaFlow:
			if !object {
				out = appendRaw(out, a.raw)
			}
		case rtaMultipath:
			if !object {
				out = appendRaw(out, a.raw)
				maskHops(out[len(out)-align4(len(a.raw))+4:][:len(a.val)])
			}
		default:
			out = appendRaw(out, a.raw)
		}
	}
	if a.err != nil {
		return nil, a.err
	}
	if c.move {
		out = appendPriority(out, c.priority)
	}
	if c.metrics && !metrics {
		n := len(out)
		out = appendMetrics(out, nil, c)
		empty = len(out) == n
	}
	// IPv4 gives a route without RTA_METRICS the metrics of any other with its nexthop object,
	// protocol, table, scope, source and metric (fib_find_info_nh compares none): a lock would
	// not go away. An empty RTA_METRICS makes it look for a route without metrics.
	if empty && object && b.Family == IPv4 {
		out = appendAttr(out, rtaMetrics, nil)
	}
	return out, nil
}

// appendMetrics appends RTA_METRICS with the change made to the metrics in old. The kernel
// wants none where it would be empty.
func appendMetrics(out, old []byte, c change) []byte {
	var lock uint32
	var rest []byte
	a := attrs{b: old}
	for a.next() {
		switch {
		case a.typ == rtaxLock:
			lock = a.u32()
		case a.typ == rtaxMTU, a.typ == rtaxAdvMSS && c.advmss != 0:
		default:
			rest = appendRaw(rest, a.raw)
		}
	}
	lock &^= 1 << rtaxMTU
	if c.mtu.MTU != 0 && c.mtu.Locked {
		lock |= 1 << rtaxMTU
	}
	var m []byte
	if lock != 0 {
		m = appendU32(m, rtaxLock, lock)
	}
	if c.mtu.MTU != 0 {
		m = appendU32(m, rtaxMTU, c.mtu.MTU)
	}
	if c.advmss != 0 {
		m = appendU32(m, rtaxAdvMSS, c.advmss)
	}
	m = append(m, rest...)
	if len(m) == 0 {
		return out
	}
	return appendAttr(out, rtaMetrics, m)
}

// markNested sets NLA_F_NESTED on RTA_ENCAP. The kernel leaves it out when it shows a route
// (lwtunnel_fill_encap, net/core/lwtunnel.c), but wants it for a tunnel of type xfrm
// (xfrmi_build_state, net/xfrm).
func markNested(attribute []byte) {
	const nested = 1 << 15 // linux/netlink.h
	binary.NativeEndian.PutUint16(attribute[2:], binary.NativeEndian.Uint16(attribute[2:])|nested)
}

// maskHops clears the flags that the kernel sets by itself in the members of RTA_MULTIPATH; it
// refuses a route that comes with them (fib_create_info). Their tunnels are marked as nested.
func maskHops(b []byte) {
	_ = eachHop(b, func(hop []byte) error {
		hop[2] &^= nexthopKernelFlags
		a := attrs{b: hop[rtnexthopLen:]}
		for a.next() {
			if a.typ == rtaEncap {
				markNested(a.raw)
			}
		}
		return a.err
	})
}

func appendAttr(b []byte, typ uint16, val []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(val)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	return appendRaw(b, val)
}

func appendU32(b []byte, typ uint16, v uint32) []byte {
	return appendAttr(b, typ, binary.NativeEndian.AppendUint32(nil, v))
}

// appendDst writes the destination and its length. The kernel sends no address for a default
// route, and needs none.
func appendDst(b []byte, dst netip.Prefix) []byte {
	b[1] = byte(dst.Bits())
	if dst.Bits() == 0 {
		return b
	}
	return appendAttr(b, rtaDst, dst.Masked().Addr().AsSlice())
}

// appendTable writes the table into the header and, for numbers that don't fit there, into
// RTA_TABLE, which counts wherever it stands.
func appendTable(b []byte, t TableID) []byte {
	b[4] = rtTableCompat
	if t < 256 {
		b[4] = byte(t)
	}
	return appendU32(b, rtaTable, uint32(t))
}

func appendPriority(b []byte, p uint32) []byte {
	if p == 0 {
		return b
	}
	return appendU32(b, rtaPriority, p)
}
