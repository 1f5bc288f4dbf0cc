package routes

import (
	"encoding/binary"
	"net/netip"
)

// Decoding of IFLA_INFO_DATA of devices that wrap what they send. What takes part in the outer
// lookup differs by driver (KERNEL.md 45 and after):
//
//   - GRE, IPIP and SIT over IPv4 look up with the device's own mark, never the packet's; over
//     IPv6 with the packet's where the device inherits it; VXLAN and Geneve always with the packet's.
//   - FOU and GUE rewrite the protocol after the lookup, so that remains one of 4, 41 and 47.
//   - a vti looks up the policy of the inner packet, with its okey as the mark.

// Attributes and flags of tunnels (linux/if_tunnel.h, linux/if_link.h, linux/ip6_tunnel.h).
const (
	iflaGRELink       = 1
	iflaGREOFlags     = 3
	iflaGREOKey       = 5
	iflaGRELocal      = 6
	iflaGRERemote     = 7
	iflaGREFlags      = 13
	iflaGREEncapType  = 14
	iflaGREEncapFlags = 15
	iflaGRECollectMD  = 18
	iflaGREFwmark     = 20

	iflaIPTunLink       = 1
	iflaIPTunLocal      = 2
	iflaIPTunRemote     = 3
	iflaIPTunFlags      = 8
	iflaIPTunProto      = 9
	iflaIPTunEncapType  = 15
	iflaIPTunEncapFlags = 16
	iflaIPTunCollectMD  = 19
	iflaIPTunFwmark     = 20

	iflaVTILink   = 1
	iflaVTIOKey   = 3
	iflaVTILocal  = 4
	iflaVTIRemote = 5

	iflaVXLANGroup     = 2
	iflaVXLANLink      = 3
	iflaVXLANLocal     = 4
	iflaVXLANPortRange = 10
	iflaVXLANPort      = 15
	iflaVXLANGroup6    = 16
	iflaVXLANLocal6    = 17
	iflaVXLANCollectMD = 25
	iflaVXLANGPE       = 27

	iflaGeneveRemote    = 2
	iflaGenevePort      = 5
	iflaGeneveCollectMD = 6
	iflaGeneveRemote6   = 7

	greCsum = 0x8000
	greKey  = 0x2000
	greSeq  = 0x1000

	ip6TnlIgnoreEncapLimit = 0x1  // IP6_TNL_F_IGN_ENCAP_LIMIT
	ip6TnlUseOrigFwmark    = 0x20 // IP6_TNL_F_USE_ORIG_FWMARK

	tunnelEncapFOU     = 1
	tunnelEncapGUE     = 2
	tunnelEncapMPLS    = 3
	tunnelEncapRemcsum = 4 // TUNNEL_ENCAP_FLAG_REMCSUM

	protoIPIP = 4
	protoUDP  = 17
	protoGRE  = 47

	etherHdrLen = 14
	udpHdrLen   = 8
	vxlanHdrLen = 8 // and Geneve's without options
)

// ipHdrLen is the length of an outer IP header.
func ipHdrLen(f Family) int {
	if f == IPv6 {
		return 40
	}
	return 20
}

// decodeEncap decodes the IFLA_INFO_DATA of a device that wraps what it sends; another kind's
// Encap stays zero, ERSPAN's too.
func (l *Link) decodeEncap(data []byte) error {
	var err error
	switch l.Kind {
	case "gre":
		err = l.Encap.decodeGRE(IPv4, false, data)
	case "gretap":
		err = l.Encap.decodeGRE(IPv4, true, data)
	case "ip6gre":
		err = l.Encap.decodeGRE(IPv6, false, data)
	case "ip6gretap":
		err = l.Encap.decodeGRE(IPv6, true, data)
	case "ipip":
		err = l.Encap.decodeIPTun(IPv4, data)
		if l.Encap.Proto == 0 { // `mode any`, the default of `ip link`: IPv4, and MPLS, which is no IP
			l.Encap.Proto = protoIPIP
		}
	case "sit":
		err = l.Encap.decodeIPTun(IPv4, data)
	case "ip6tnl":
		err = l.Encap.decodeIPTun(IPv6, data)
	case "vti":
		err = l.Encap.decodeVTI(IPv4, data)
	case "vti6":
		err = l.Encap.decodeVTI(IPv6, data)
	case "vxlan":
		err = l.Encap.decodeVXLAN(data)
	case "geneve":
		err = l.Encap.decodeGeneve(data)
	}
	return err
}

// anywhere is for a tunnel whose packets bring their own addresses: it takes what it has itself.
// Their lookups have the packet's mark (ip_md_tunnel_xmit, net/ipv4/ip_tunnel.c).
func (e *Encap) anywhere() {
	e.Local, e.Remote = netip.Addr{}, netip.Addr{}
	e.Mark, e.AnyMark = 0, true
}

// decodeGRE decodes IFLA_GRE_*. With eth the inner packets are Ethernet frames.
func (e *Encap) decodeGRE(f Family, eth bool, data []byte) error {
	*e = Encap{Family: f, Proto: protoGRE}
	gre := 4
	var encap encapType
	var flags uint32
	a := attrs{b: data}
	for a.next() {
		switch a.typ {
		case iflaGRELink:
			e.Link = Ifindex(a.u32())
		case iflaGREOFlags:
			o := a.be16()
			e.HasKey = o&greKey != 0
			for _, bit := range []uint16{greCsum, greKey, greSeq} {
				if o&bit != 0 {
					gre += 4
				}
			}
		case iflaGREOKey:
			e.Key = a.be32()
		case iflaGRELocal:
			e.Local = a.tunnelAddr(f)
		case iflaGRERemote:
			e.Remote = a.tunnelAddr(f)
		case iflaGREFlags:
			flags = a.u32()
		case iflaGREEncapType:
			encap.typ = a.u16()
		case iflaGREEncapFlags:
			encap.flags = a.u16()
		case iflaGRECollectMD: // a flag
			e.External = true
		case iflaGREFwmark:
			e.Mark = a.u32()
		}
	}
	if !eth && e.Remote.IsMulticast() {
		// The destination is the neighbour's (ipgre_header, net/ipv4/ip_gre.c).
		e.Remote = netip.Addr{}
	}
	e.Header = ipHdrLen(f) + gre + encap.len()
	if eth {
		e.Header += etherHdrLen
	}
	e.finish(flags)
	return a.err
}

// decodeIPTun decodes IFLA_IPTUN_* of ipip, sit and ip6tnl.
func (e *Encap) decodeIPTun(f Family, data []byte) error {
	*e = Encap{Family: f}
	var encap encapType
	var flags uint32
	isatap := false
	a := attrs{b: data}
	for a.next() {
		switch a.typ {
		case iflaIPTunLink:
			e.Link = Ifindex(a.u32())
		case iflaIPTunLocal:
			e.Local = a.tunnelAddr(f)
		case iflaIPTunRemote:
			e.Remote = a.tunnelAddr(f)
		case iflaIPTunFlags:
			if f == IPv6 {
				flags = a.u32()
			} else { // SIT_ISATAP is the only one
				isatap = a.u16() != 0
			}
		case iflaIPTunProto:
			e.Proto = a.u8()
		case iflaIPTunEncapType:
			encap.typ = a.u16()
		case iflaIPTunEncapFlags:
			encap.flags = a.u16()
		case iflaIPTunCollectMD: // a flag
			e.External = true
		case iflaIPTunFwmark:
			e.Mark = a.u32()
		}
	}
	if isatap {
		// The destination is in the neighbour's address (ipip6_tunnel_xmit, net/ipv6/sit.c).
		e.Remote = netip.Addr{}
	}
	e.Header = ipHdrLen(f) + encap.len()
	e.finish(flags)
	return a.err
}

// finish applies what tunnels over IPv6 have in their flags, and what `external` means.
func (e *Encap) finish(flags uint32) {
	if e.Family == IPv6 {
		if flags&ip6TnlIgnoreEncapLimit == 0 {
			e.Header += 8 // the destination option with the encapsulation limit
		}
		if flags&ip6TnlUseOrigFwmark != 0 {
			e.Mark, e.AnyMark = 0, true
		}
	}
	if e.External {
		e.anywhere()
	}
}

// encapType is what IFLA_*_ENCAP_* say.
type encapType struct{ typ, flags uint16 }

// len is the length in bytes of what stands between the outer IP header and the tunnel's own
// (fou_encap_hlen, gue_encap_hlen, net/ipv4/fou_core.c; ipgre_mpls_encap_hlen).
func (t encapType) len() int {
	switch t.typ {
	case tunnelEncapFOU:
		return udpHdrLen
	case tunnelEncapGUE:
		if t.flags&tunnelEncapRemcsum != 0 {
			return udpHdrLen + 12
		}
		return udpHdrLen + 4
	case tunnelEncapMPLS:
		return 4
	}
	return 0
}

// decodeVTI decodes IFLA_VTI_*.
func (e *Encap) decodeVTI(f Family, data []byte) error {
	*e = Encap{Family: f, HasKey: true}
	a := attrs{b: data}
	for a.next() {
		switch a.typ {
		case iflaVTILink:
			e.Link = Ifindex(a.u32())
		case iflaVTIOKey:
			e.Key = a.be32()
			e.Mark = e.Key
		case iflaVTILocal:
			e.Local = a.tunnelAddr(f)
		case iflaVTIRemote:
			e.Remote = a.tunnelAddr(f)
		}
	}
	return a.err
}

// decodeVXLAN decodes IFLA_VXLAN_*. The remote is only the default destination: other entries
// of the forwarding database can lead elsewhere, which Encap.Others says.
func (e *Encap) decodeVXLAN(data []byte) error {
	*e = Encap{Family: IPv4, Proto: protoUDP, AnyMark: true}
	inner := etherHdrLen
	a := attrs{b: data}
	for a.next() {
		switch a.typ {
		case iflaVXLANGroup:
			e.Remote = a.tunnelAddr(IPv4)
		case iflaVXLANGroup6:
			e.Family, e.Remote = IPv6, a.tunnelAddr(IPv6)
		case iflaVXLANLink:
			e.Link = Ifindex(a.u32())
		case iflaVXLANLocal:
			e.Local = a.tunnelAddr(IPv4)
		case iflaVXLANLocal6:
			e.Family, e.Local = IPv6, a.tunnelAddr(IPv6)
		case iflaVXLANPort:
			e.Dport = onePort(a.be16())
		case iflaVXLANPortRange:
			e.Sport = a.vxlanPorts()
		case iflaVXLANCollectMD:
			e.External = a.u8() != 0
		case iflaVXLANGPE: // a flag; IP in VXLAN, no Ethernet header
			inner = 0
		}
	}
	e.Header = ipHdrLen(e.Family) + udpHdrLen + vxlanHdrLen + inner
	if e.External { // it has a socket of each family (vxlan_open, drivers/net/vxlan)
		e.Family = 0
		e.anywhere()
	}
	return a.err
}

// decodeGeneve decodes IFLA_GENEVE_*. A Geneve device has neither a local address nor a lower
// device of its own.
func (e *Encap) decodeGeneve(data []byte) error {
	*e = Encap{Family: IPv4, Proto: protoUDP, AnyMark: true}
	a := attrs{b: data}
	for a.next() {
		switch a.typ {
		case iflaGeneveRemote:
			e.Remote = a.tunnelAddr(IPv4)
		case iflaGeneveRemote6:
			e.Family, e.Remote = IPv6, a.tunnelAddr(IPv6)
		case iflaGenevePort:
			e.Dport = onePort(a.be16())
		case iflaGeneveCollectMD: // a flag
			e.External = true
		}
	}
	// With inner_proto_inherit there is no inner Ethernet header, yet the driver counts it
	// (geneve_xmit_skb, drivers/net/geneve.c).
	e.Header = ipHdrLen(e.Family) + udpHdrLen + vxlanHdrLen + etherHdrLen
	if e.External { // it has a socket of each family (geneve_open, drivers/net/geneve.c)
		e.Family = 0
		e.anywhere()
	}
	return a.err
}

// tunnelAddr is an address of a tunnel, invalid where it is the unspecified one.
func (a *attrs) tunnelAddr(f Family) netip.Addr {
	ip := a.addr(f)
	if ip.IsUnspecified() {
		return netip.Addr{}
	}
	return ip
}

// vxlanPorts is a struct ifla_vxlan_port_range. The kernel takes from low to below high, and the
// machine's own range where that is empty (udp_flow_src_port, include/net/udp.h).
func (a *attrs) vxlanPorts() PortRange {
	if len(a.val) < 4 {
		a.err = errAttribute
		return PortRange{}
	}
	lo, hi := binary.BigEndian.Uint16(a.val), binary.BigEndian.Uint16(a.val[2:])
	if lo >= hi {
		return PortRange{}
	}
	return PortRange{Lo: lo, Hi: hi - 1}
}

func onePort(p uint16) PortRange { return PortRange{Lo: p, Hi: p} }

func (a *attrs) be16() uint16 {
	if len(a.val) < 2 {
		a.err = errAttribute
		return 0
	}
	return binary.BigEndian.Uint16(a.val)
}

func (a *attrs) be32() uint32 {
	if len(a.val) < 4 {
		a.err = errAttribute
		return 0
	}
	return binary.BigEndian.Uint32(a.val)
}
