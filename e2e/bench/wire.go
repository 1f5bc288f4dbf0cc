package bench

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Messages are built by hand: set-up writes a million of them, and a library for one at a time would take longer than what is measured.

// xfrm messages, attributes and values (linux/xfrm.h).
const (
	xfrmNewPolicy = 0x13
	xfrmDelPolicy = 0x14
	xfrmTmpl      = 5
	xfrmOut       = 1
	xfrmForever   = 1<<64 - 1

	xfrmPolicyGroup = 4 // XFRMNLGRP_POLICY
)

const (
	routeMetric = 20
	protoBGP    = 186 // RTPROT_BGP
)

var ne = binary.NativeEndian

// message appends a netlink message; its body is what fill appends.
func message(b []byte, typ, flags uint16, seq uint32, fill func([]byte) []byte) []byte {
	at := len(b)
	b = ne.AppendUint32(b, 0)
	b = ne.AppendUint16(b, typ)
	b = ne.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = ne.AppendUint32(b, seq)
	b = ne.AppendUint32(b, 0)
	b = fill(b)
	ne.PutUint32(b[at:], uint32(len(b)-at))
	return b
}

func attr(b []byte, typ uint16, v []byte) []byte {
	b = ne.AppendUint16(b, uint16(unix.SizeofNlAttr+len(v)))
	b = ne.AppendUint16(b, typ)
	b = append(b, v...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func attr32(b []byte, typ uint16, v uint32) []byte {
	var a [4]byte
	ne.PutUint32(a[:], v)
	return attr(b, typ, a[:])
}

// body appends the route's rtmsg and attributes; ifindex is of each uplink.
func (r Route) body(b []byte, ifindex *[Uplinks]uint32) []byte {
	v6 := r.Dst.Addr().Is6()
	family := byte(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	gw, link := gateway(r.Gateway, v6)
	b = append(b, family, byte(r.Dst.Bits()), 0, 0, unix.RT_TABLE_MAIN, protoBGP, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0)
	if r.Dst.Bits() > 0 {
		b = attr(b, unix.RTA_DST, r.Dst.Addr().AsSlice())
	}
	b = attr(b, unix.RTA_GATEWAY, gw.AsSlice())
	b = attr32(b, unix.RTA_OIF, ifindex[link])
	return attr32(b, unix.RTA_PRIORITY, routeMetric)
}

// key appends what names the route for a deletion.
func (r Route) key(b []byte) []byte {
	family := byte(unix.AF_INET)
	if r.Dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	b = append(b, family, byte(r.Dst.Bits()), 0, 0, unix.RT_TABLE_MAIN, protoBGP, unix.RT_SCOPE_NOWHERE, 0, 0, 0, 0, 0)
	if r.Dst.Bits() > 0 {
		b = attr(b, unix.RTA_DST, r.Dst.Addr().AsSlice())
	}
	return attr32(b, unix.RTA_PRIORITY, routeMetric)
}

// body appends the policy's xfrm_userpolicy_info and its template (linux/xfrm.h).
func (p Policy) body(b []byte) []byte {
	b = p.selector(b)
	for range 4 { // soft and hard limits of bytes and packets
		b = ne.AppendUint64(b, xfrmForever)
	}
	b = append(b, make([]byte, 4*8+4*8)...) // limits of time, and what is used
	b = ne.AppendUint32(b, 1000)            // priority
	b = ne.AppendUint32(b, 0)               // index: the kernel's choice
	b = append(b, xfrmOut, 0, 0, 0, 0, 0, 0, 0)
	return attr(b, xfrmTmpl, p.template())
}

// id appends the policy's xfrm_userpolicy_id, by its selector.
func (p Policy) id(b []byte) []byte {
	b = p.selector(b)
	b = ne.AppendUint32(b, 0)
	return append(b, xfrmOut, 0, 0, 0)
}

func (p Policy) selector(b []byte) []byte {
	family := uint16(unix.AF_INET)
	if p.Dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	b = xfrmAddr(b, p.Dst.Addr())
	b = xfrmAddr(b, p.Src.Addr())
	b = append(b, make([]byte, 8)...) // ports
	b = ne.AppendUint16(b, family)
	b = append(b, byte(p.Dst.Bits()), byte(p.Src.Bits()))
	return append(b, make([]byte, 12)...) // protocol, ifindex, user
}

func (p Policy) template() []byte {
	b := xfrmAddr(make([]byte, 0, 64), p.Peer)
	b = append(b, 0, 0, 0, 0, unix.IPPROTO_ESP, 0, 0, 0)
	b = ne.AppendUint16(b, unix.AF_INET)
	b = append(b, 0, 0)
	b = xfrmAddr(b, localEnd)
	b = ne.AppendUint32(b, p.Reqid)
	b = append(b, 1, 0, 0, 0) // tunnel
	for range 3 {
		b = ne.AppendUint32(b, 1<<32-1) // any algorithm
	}
	return b
}

// xfrmAddr appends an xfrm_address_t.
func xfrmAddr(b []byte, a netip.Addr) []byte {
	at := len(b)
	b = append(b, a.AsSlice()...)
	return append(b, make([]byte, 16-(len(b)-at))...)
}
