// Package wire looks at packets as a device's driver gets them: behind the segmentation that the kernel does
// itself, ahead of the device's (validate_xmit_skb and xmit_one, net/core/dev.c). It says of each what its
// headers tell, and whether it is a super-packet.
//
// Decoding is pure. The kernel I/O is a packet socket with a ring of bounded size (Tap), which loses packets
// rather than hold the sender up, and counts them.
package wire

import "net/netip"

// GSO is what a packet is to be cut as (gso_type of struct virtio_net_hdr, linux/virtio_net.h).
type GSO uint8

// The kinds that the kernel can tell. UDP fragments of old (3) are never sent any more.
const (
	NoGSO  GSO = 0 // not to be cut
	TCPv4  GSO = 1
	UFO    GSO = 3
	TCPv6  GSO = 4
	UDPGSO GSO = 5 // UDP_SEGMENT, since Linux 6.2
)

// TCP says that the packet is to be cut into segments of TCP.
func (g GSO) TCP() bool { return g == TCPv4 || g == TCPv6 }

// Frame is one packet as a tap saw it.
type Frame struct {
	// Data is the front of the packet, from its link header on, good until the next frame.
	Data []byte
	// Network is where the network header begins in Data, as the kernel has it.
	Network int
	// Length is that of the whole packet with its link header, in bytes.
	Length int
	// Hatype is the device's link layer (ARPHRD_*, linux/if_arp.h).
	Hatype uint16
	// Protocol is the EtherType that the kernel has for it, in host byte order.
	Protocol uint16
	GSO      GSO
	// Segment is the size of the segments that it is to be cut into, in bytes of payload; 0 without GSO.
	Segment int
}

// The protocols that are told apart (IPPROTO_*).
const (
	protoHopByHop = 0
	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoGRE      = 47
	protoESP      = 50
	protoAH       = 51
	protoICMPv6   = 58
	protoDstOpts  = 60
	protoSCTP     = 132
	protoMobility = 135
	protoUDPLite  = 136
)

// Signature is the TCP option by which a segment is signed, 0 for none.
type Signature uint8

// The signatures (TCPOPT_MD5SIG and TCPOPT_AO, include/net/tcp.h).
const (
	Unsigned Signature = 0
	MD5      Signature = 19
	AO       Signature = 29
)

// Packet is what the headers of an IP packet tell.
type Packet struct {
	Src, Dst netip.Addr
	// Proto is the transport's, behind the extension headers of IPv6 but for ESP's and AH's own.
	Proto uint8
	// Sport and Dport are ports, or what an XFRM selector takes for them: type and code of ICMP, the type of a
	// mobility header, the halves of a GRE key (__xfrm_decode_session, net/xfrm/xfrm_policy.c).
	Sport, Dport uint16
	// Fragment says that it is one behind the first: there is no transport header.
	Fragment bool
	// SPI is that of ESP or AH, or the first word of what UDP carries, where the SPI of ESP in UDP is
	// (RFC 3948) and IKE on port 4500 has 0.
	SPI uint32
	// Signature is how a segment of TCP is signed.
	Signature Signature
	// Push says that a segment of TCP is the last one of what was written (PSH).
	Push bool
	// Length is that of the whole packet from its IP header on, Payload that behind its transport header (behind
	// the IP header where the transport is not known), in bytes.
	Length, Payload int
}
