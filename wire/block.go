package wire

import "encoding/binary"

// The layout of a block of a ring of TPACKET_V3 (struct tpacket_block_desc, tpacket3_hdr and sockaddr_ll,
// linux/if_packet.h). Numbers are in the machine's byte order.
const (
	blockStatus = 8
	blockCount  = 12
	blockFirst  = 16
	blockHeader = 48

	frameNext    = 0
	frameSnaplen = 12
	frameLength  = 16
	frameStatus  = 20
	frameMAC     = 24
	frameNet     = 26
	frameLink    = 48 // struct sockaddr_ll
	frameHeader  = frameLink + 20

	linkProtocol = 2
	linkHatype   = 8

	statusUser = 1 // TP_STATUS_USER

	vnetHeader = 10 // struct virtio_net_hdr
)

// eachFrame calls fn for each packet of a block. It returns how many there were that the kernel had no words for:
// it takes the place of a packet in the block first, and gives the packet up where struct virtio_net_hdr can't say
// what kind of super-packet it is, as UDP's before 6.2, and SCTP's. What is left of it is a header whose status
// is not the reader's (tpacket_rcv, net/packet/af_packet.c).
//
// Nothing in the block is trusted: what doesn't fit ends it.
func eachFrame(block []byte, fn func(*Frame)) (untold int) {
	if len(block) < blockHeader {
		return 0
	}
	at := uint64(binary.NativeEndian.Uint32(block[blockFirst:]))
	for range binary.NativeEndian.Uint32(block[blockCount:]) {
		if at < blockHeader || at+frameHeader > uint64(len(block)) {
			break
		}
		rest := block[at:]
		next := uint64(binary.NativeEndian.Uint32(rest[frameNext:]))
		if binary.NativeEndian.Uint32(rest[frameStatus:])&statusUser == 0 {
			untold++
		} else if f, ok := parseFrame(rest); ok {
			fn(&f)
		}
		if next < frameHeader { // 0 for the last one
			break
		}
		at += next
	}
	return untold
}

// parseFrame reads the frame at the start of a part of a block.
func parseFrame(b []byte) (Frame, bool) {
	mac, network := int(binary.NativeEndian.Uint16(b[frameMAC:])), int(binary.NativeEndian.Uint16(b[frameNet:]))
	kept := uint64(binary.NativeEndian.Uint32(b[frameSnaplen:]))
	if mac < frameHeader+vnetHeader || uint64(mac)+kept > uint64(len(b)) {
		return Frame{}, false
	}
	vnet, link := b[mac-vnetHeader:], b[frameLink:]
	const ecn = 0x80 // a flag on top of the kind
	return Frame{
		Data:     b[mac : mac+int(kept)],
		Network:  network - mac,
		Length:   int(binary.NativeEndian.Uint32(b[frameLength:])),
		Hatype:   binary.NativeEndian.Uint16(link[linkHatype:]),
		Protocol: binary.BigEndian.Uint16(link[linkProtocol:]),
		GSO:      GSO(vnet[1] &^ ecn),
		Segment:  int(binary.NativeEndian.Uint16(vnet[4:])),
	}, true
}
