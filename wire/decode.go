package wire

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// ErrNotIP is what Packet returns for a frame that carries something else, as ARP does.
var ErrNotIP = errors.New("wire: not IP")

// ErrShort is what Packet returns for a frame whose headers end too early, or behind what was kept of it.
var ErrShort = errors.New("wire: the packet is too short")

// The EtherTypes that are told apart (linux/if_ether.h), and the link layers whose header is Ethernet's
// (linux/if_arp.h).
const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	ether8021 = 0x8100
	etherQinQ = 0x88a8

	hatypeEther    = 1
	hatypeLoopback = 772
)

// Packet decodes the frame's headers. The errors are ErrNotIP and ErrShort.
func (f *Frame) Packet() (Packet, error) {
	at, err := f.network()
	if err != nil {
		return Packet{}, err
	}
	return decode(f.Data[at:], f.Length-at)
}

// network is where the IP header begins. In an Ethernet frame that is behind the tags of VLANs: of a frame whose
// tag the kernel put in itself the network header is the IP header, of one that came with two tags it is the inner
// tag, and the protocol is the tag's in both cases (vlan_insert_inner_tag, skb_vlan_untag). Elsewhere the kernel
// knows: some tunnels count their outer headers as the link's (ipgre_header).
func (f *Frame) network() (int, error) {
	if f.Hatype != hatypeEther && f.Hatype != hatypeLoopback {
		switch {
		case f.Network < 0 || f.Network >= len(f.Data):
			return 0, ErrShort
		case f.Protocol != etherIPv4 && f.Protocol != etherIPv6:
			return 0, ErrNotIP
		}
		return f.Network, nil
	}
	const addresses = 12
	for at := addresses; at+2 <= len(f.Data); at += 4 {
		switch binary.BigEndian.Uint16(f.Data[at:]) {
		case ether8021, etherQinQ:
		case etherIPv4, etherIPv6:
			return at + 2, nil
		default:
			return 0, ErrNotIP
		}
	}
	return 0, ErrShort
}

// decode takes the front of an IP packet apart, of which data may be only a part; length is that of the whole. The
// length in the header is not looked at: that of a super-packet may be 0 (BIG TCP).
func decode(data []byte, length int) (Packet, error) {
	if len(data) == 0 {
		return Packet{}, ErrShort
	}
	p := Packet{Length: length}
	var header int
	var err error
	switch data[0] >> 4 {
	case 4:
		header, err = p.ipv4(data)
	case 6:
		header, err = p.ipv6(data)
	default:
		return Packet{}, ErrNotIP
	}
	if err != nil {
		return Packet{}, err
	}
	if !p.Fragment {
		rest := data[header:]
		size, err := p.transport(rest)
		if err != nil {
			return Packet{}, err
		}
		header += size
	}
	p.Payload = max(length-header, 0)
	return p, nil
}

// ipv4 reads an IPv4 header and returns its size.
func (p *Packet) ipv4(data []byte) (int, error) {
	const least = 20
	if len(data) < least {
		return 0, ErrShort
	}
	header := int(data[0]&15) * 4
	if header < least || len(data) < header {
		return 0, ErrShort
	}
	p.Src = netip.AddrFrom4([4]byte(data[12:16]))
	p.Dst = netip.AddrFrom4([4]byte(data[16:20]))
	p.Proto = data[9]
	p.Fragment = binary.BigEndian.Uint16(data[6:])&0x1fff != 0
	return header, nil
}

// ipv6 reads an IPv6 header with its extension headers and returns their size.
func (p *Packet) ipv6(data []byte) (int, error) {
	header := 40
	if len(data) < header {
		return 0, ErrShort
	}
	p.Src = netip.AddrFrom16([16]byte(data[8:24]))
	p.Dst = netip.AddrFrom16([16]byte(data[24:40]))
	p.Proto = data[6]
	for {
		switch p.Proto {
		case protoHopByHop, protoRouting, protoDstOpts:
			if len(data) < header+8 {
				return 0, ErrShort
			}
			p.Proto = data[header]
			header += int(data[header+1])*8 + 8
		case protoFragment:
			if len(data) < header+8 {
				return 0, ErrShort
			}
			p.Proto = data[header]
			p.Fragment = binary.BigEndian.Uint16(data[header+2:])&^7 != 0
			header += 8
			if p.Fragment {
				return header, nil
			}
		default:
			if len(data) < header {
				return 0, ErrShort
			}
			return header, nil
		}
	}
}

// transport reads a transport's header and returns its size, 0 if the protocol isn't known.
func (p *Packet) transport(data []byte) (int, error) {
	size := 0
	switch p.Proto {
	case protoTCP:
		size = 20
	case protoUDP, protoUDPLite, protoESP, protoICMP, protoICMPv6:
		size = 8
	case protoAH, protoSCTP:
		size = 12
	case protoGRE, protoMobility:
		size = 4
	}
	if len(data) < size {
		return 0, ErrShort
	}
	switch p.Proto {
	case protoTCP:
		p.ports(data)
		return p.tcp(data)
	case protoUDP:
		p.ports(data)
		if len(data) >= 12 {
			p.SPI = binary.BigEndian.Uint32(data[8:])
		}
	case protoUDPLite, protoSCTP:
		p.ports(data)
	case protoESP:
		p.SPI = binary.BigEndian.Uint32(data)
	case protoAH:
		p.SPI = binary.BigEndian.Uint32(data[4:])
		size = (int(data[1]) + 2) * 4 // RFC 4302: in words, minus 2
	case protoICMP, protoICMPv6:
		p.Sport, p.Dport = uint16(data[0]), uint16(data[1])
	case protoMobility:
		p.Sport = uint16(data[2])
	case protoGRE:
		size = p.gre(data)
	}
	return size, nil
}

func (p *Packet) ports(data []byte) {
	p.Sport, p.Dport = binary.BigEndian.Uint16(data), binary.BigEndian.Uint16(data[2:])
}

// tcp reads PSH and the options of TCP, and returns the header's size. A signature that can't be read is none.
func (p *Packet) tcp(data []byte) (int, error) {
	const fixed, psh = 20, 0x08
	size := int(data[12]>>4) * 4
	if size < fixed {
		return 0, ErrShort
	}
	p.Push = data[13]&psh != 0
	for options := data[fixed:min(size, len(data))]; len(options) > 0; {
		const end, nop = 0, 1
		switch options[0] {
		case end:
			return size, nil
		case nop:
			options = options[1:]
			continue
		}
		if len(options) < 2 || options[1] < 2 || int(options[1]) > len(options) {
			return size, nil
		}
		switch s := Signature(options[0]); s {
		case MD5, AO:
			p.Signature = s
			return size, nil
		}
		options = options[options[1]:]
	}
	return size, nil
}

// gre reads the key of GRE and returns the header's size.
func (p *Packet) gre(data []byte) int {
	const checksum, key, sequence = 0x80, 0x20, 0x10
	size := 4
	if data[0]&checksum != 0 {
		size += 4
	}
	if data[0]&key != 0 {
		if len(data) >= size+4 {
			p.ports(data[size:])
		}
		size += 4
	}
	if data[0]&sequence != 0 {
		size += 4
	}
	return size
}
