package routes

import (
	"encoding/binary"
	"net/netip"
	"weak"
)

// Attributes and flags of routes (linux/rtnetlink.h).
const (
	rtaDst       = 1
	rtaSrc       = 2
	rtaIif       = 3
	rtaOif       = 4
	rtaGateway   = 5
	rtaPriority  = 6
	rtaPrefsrc   = 7
	rtaMetrics   = 8
	rtaMultipath = 9
	rtaFlow      = 11
	rtaCacheinfo = 12
	rtaTable     = 15
	rtaMark      = 16
	rtaVia       = 18
	rtaEncapType = 21
	rtaEncap     = 22
	rtaExpires   = 23
	rtaUID       = 25
	rtaIPProto   = 27
	rtaSport     = 28
	rtaDport     = 29
	rtaNHID      = 30

	rtmFCloned        = 0x200
	rtmFLookupTable   = 0x1000
	rtmFFibMatch      = 0x2000
	rtmFOffload       = 0x4000
	rtmFTrap          = 0x8000
	rtmFOffloadFailed = 0x20000000

	rtmsgLen       = 12
	rtnexthopLen   = 8
	lwtEncapXfrm   = 10 // LWTUNNEL_ENCAP_XFRM, linux/lwtunnel.h
	lwtXfrmIfID    = 1  // LWT_XFRM_IF_ID
	rtaxCCAlgo     = 16
	rtTableCompat  = 252
	scopeUniverse  = 0
	cacheExpiresAt = 8 // the offset of rta_expires in struct rta_cacheinfo

	// nexthopKernelFlags are the nexthop flags that the kernel sets by itself and refuses, or
	// takes at face value, in a request (RTNH_COMPARE_MASK).
	nexthopKernelFlags = NexthopDead | NexthopLinkdown | NexthopOffload | NexthopTrap
	// routeKernelFlags are those of rtm_flags, which also holds the nexthop flags of a route
	// with one nexthop.
	routeKernelFlags = uint32(nexthopKernelFlags) | rtmFOffload | rtmFTrap | rtmFOffloadFailed | rtmFCloned
)

// An Interner shares Bodies: routes that differ only in their destination get the same one. A
// Body that no route uses any more is forgotten (it is held by a weak pointer only), so a
// long-lived Interner grows with the routes that exist, not with those that existed.
//
// The zero value is ready. It is not safe for concurrent use.
type Interner struct {
	bodies  map[string]weak.Pointer[Body]
	peak    int // the most bodies since the map was made
	decoded int // routes since the last sweep
	scratch []byte

	// A dump has long runs of routes with one Body; the last one is found without the map.
	last *Body
}

// sweepMin is after how many routes at least dead Bodies are looked for.
const sweepMin = 1024

// ParseRoute decodes the payload of an RTM_NEWROUTE or RTM_DELROUTE message, such as the
// Encode functions build.
func (in *Interner) ParseRoute(payload []byte) (Route, error) {
	r, ok, err := in.route(payload)
	if err == nil && !ok {
		err = errAttribute
	}
	return r, err
}

// Len is the number of Bodies that are known, dead ones not yet swept included.
func (in *Interner) Len() int { return len(in.bodies) }

// All calls f for each Body that is still in use.
func (in *Interner) All(f func(*Body) bool) {
	for _, w := range in.bodies {
		if b := w.Value(); b != nil && !f(b) {
			return
		}
	}
}

// route decodes a struct rtmsg and its attributes; ok is false for another family's and for
// cached routes. The canonical bytes (the header with destination length zero and all
// attributes as they came, but destination, cache info and expiry) are the key of the Body. A
// route whose Body is known costs no allocation.
func (in *Interner) route(data []byte) (r Route, ok bool, err error) {
	if len(data) < rtmsgLen {
		return Route{}, false, errShort
	}
	if !knownFamily(data[0]) || binary.NativeEndian.Uint32(data[8:])&rtmFCloned != 0 {
		return Route{}, false, nil
	}
	if in.decoded++; in.decoded >= max(sweepMin, len(in.bodies)/2) {
		in.sweep()
	}
	key := in.scratch[:0]
	key = append(key, data[:rtmsgLen]...)
	key[1] = 0
	var dst []byte
	var expires byte
	a := attrs{b: data[rtmsgLen:]}
	for a.next() {
		switch a.typ {
		case rtaDst:
			dst = a.val
		case rtaCacheinfo:
			if len(a.val) < cacheExpiresAt+4 {
				a.err = errAttribute
			} else if binary.NativeEndian.Uint32(a.val[cacheExpiresAt:]) != 0 {
				expires = 1
			}
		case rtaNHID:
			if a.u32() != 0 { // 0 is none, and is not written either
				key = appendRaw(key, a.raw)
			}
		case rtaExpires:
			expires = 1
		default:
			key = appendRaw(key, a.raw)
		}
	}
	key = append(key, expires)
	in.scratch = key
	if a.err != nil {
		return Route{}, false, a.err
	}
	p, err := prefixOf(Family(data[0]), dst, data[1])
	if err != nil {
		return Route{}, false, err
	}
	if l := in.last; l != nil && l.Expires == (expires != 0) && string(key[:len(key)-1]) == l.Raw {
		return Route{Dst: p, Body: l}, true, nil
	}
	b := in.bodies[string(key)].Value()
	if b == nil {
		k := string(key) // Raw is the key without its last byte, in the same memory
		if b, err = decodeBody(k[:len(k)-1], expires != 0); err != nil {
			return Route{}, false, err
		}
		in.keep(k, b)
	}
	in.last = b
	return Route{Dst: p, Body: b}, true, nil
}

func (in *Interner) keep(key string, b *Body) {
	if in.bodies == nil {
		in.bodies = make(map[string]weak.Pointer[Body])
	}
	in.bodies[key] = weak.Make(b)
	in.peak = max(in.peak, len(in.bodies))
}

// sweep forgets the dead Bodies. Also those that tell of routes that go lead to it, so that few are left of very many.
func (in *Interner) sweep() {
	in.decoded = 0
	for k, w := range in.bodies {
		if w.Value() == nil {
			delete(in.bodies, k)
		}
	}
	if in.peak > sweepMin && len(in.bodies) < in.peak/4 { // a map keeps the size that it once had
		in.bodies, in.peak = cloned(in.bodies), len(in.bodies)
	}
}

// appendRaw appends an attribute with its padding.
func appendRaw(b, raw []byte) []byte {
	b = append(b, raw...)
	for range align4(len(raw)) - len(raw) {
		b = append(b, 0)
	}
	return b
}

// decodeBody decodes canonical bytes.
func decodeBody(raw string, expires bool) (*Body, error) {
	data := []byte(raw)
	flags := binary.NativeEndian.Uint32(data[8:])
	b := Body{
		Family:   Family(data[0]),
		TOS:      data[3],
		Table:    TableID(data[4]),
		Protocol: Protocol(data[5]),
		Scope:    data[6],
		Type:     Type(data[7]),
		Flags:    flags &^ routeKernelFlags,
		Expires:  expires,
		Raw:      raw,
	}
	one := hop{Nexthop: Nexthop{Flags: uint8(flags)}}
	single := false
	a := attrs{b: data[rtmsgLen:]}
	for a.next() {
		switch a.typ {
		case rtaTable:
			b.Table = TableID(a.u32())
		case rtaSrc:
			var err error
			if b.Src, err = prefixOf(b.Family, a.val, data[2]); err != nil {
				return nil, err
			}
		case rtaPriority:
			b.Priority = a.u32()
		case rtaPrefsrc:
			b.PrefSrc = a.addr(b.Family)
		case rtaNHID:
			b.NHID = a.u32()
		case rtaMetrics:
			a.err = b.Metrics.decode(a.val)
		case rtaMultipath:
			b.Nexthops, a.err = decodeMultipath(a.val)
		case rtaOif, rtaGateway, rtaVia, rtaEncap:
			a.nexthop(&one)
			single = true
		case rtaEncapType:
			a.nexthop(&one)
		}
	}
	if a.err == nil {
		a.err = one.tunnel()
	}
	if a.err != nil {
		return nil, a.err
	}
	if single && b.Nexthops == nil {
		b.Nexthops = []Nexthop{one.Nexthop}
	}
	return NewBody(b), nil
}

func (m *Metrics) decode(b []byte) error {
	a := attrs{b: b}
	for a.next() {
		switch a.typ {
		case rtaxLock:
			m.Lock = a.u32()
		case rtaxMTU:
			m.MTU = a.u32()
		case rtaxAdvMSS:
			m.AdvMSS = a.u32()
		}
	}
	return a.err
}

// hop is a nexthop under construction: RTA_ENCAP stands before RTA_ENCAP_TYPE, which says how
// to read it.
type hop struct {
	Nexthop
	encapType uint16
	encap     []byte
}

// tunnel decodes RTA_ENCAP.
func (n *hop) tunnel() error {
	if !n.Encap || n.encapType != lwtEncapXfrm {
		return nil
	}
	a := attrs{b: n.encap}
	for a.next() {
		if a.typ == lwtXfrmIfID {
			n.IfID = a.u32()
		}
	}
	return a.err
}

// nexthop takes the attributes of one way out, which stand in the route itself or in a member
// of RTA_MULTIPATH.
func (a *attrs) nexthop(n *hop) {
	switch a.typ {
	case rtaOif:
		n.Oif = Ifindex(a.u32())
	case rtaGateway:
		n.Gateway = a.anyAddr()
	case rtaVia: // struct rtvia: the family, then the address
		f := Family(a.u16())
		if a.err == nil {
			a.val = a.val[2:]
			n.Gateway = a.addr(f)
		}
	case rtaEncap:
		n.Encap, n.encap = true, a.val
	case rtaEncapType:
		n.encapType = a.u16()
	}
}

// anyAddr is an address whose family follows from its length.
func (a *attrs) anyAddr() netip.Addr {
	if len(a.val) == 4 {
		return a.addr(IPv4)
	}
	return a.addr(IPv6)
}

// decodeMultipath decodes RTA_MULTIPATH: each member is a struct rtnexthop and attributes.
func decodeMultipath(b []byte) ([]Nexthop, error) {
	var out []Nexthop
	err := eachHop(b, func(member []byte) error {
		n := hop{Nexthop: Nexthop{
			Flags:  member[2],
			Weight: member[3],
			Oif:    Ifindex(binary.NativeEndian.Uint32(member[4:])),
		}}
		a := attrs{b: member[rtnexthopLen:]}
		for a.next() {
			a.nexthop(&n)
		}
		if a.err == nil {
			a.err = n.tunnel()
		}
		out = append(out, n.Nexthop)
		return a.err
	})
	return out, err
}

// eachHop calls f for each member of RTA_MULTIPATH, with at least its struct rtnexthop.
func eachHop(b []byte, f func(hop []byte) error) error {
	for len(b) > 0 {
		if len(b) < rtnexthopLen {
			return errAttribute
		}
		n := int(binary.NativeEndian.Uint16(b))
		if n < rtnexthopLen || n > len(b) {
			return errAttribute
		}
		if err := f(b[:n:n]); err != nil {
			return err
		}
		b = b[min(align4(n), len(b)):]
	}
	return nil
}
