package scenario

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A filter is what `wire` looks for. The zero value matches everything.
type filter struct {
	src, dst     netip.Prefix
	proto        int // 0 for any
	sport, dport uint16
}

const filterUsage = "filter: [src CIDR] [dst CIDR] [sport N] [dport N] [proto tcp|udp|esp|any]"

// parseFilter parses words such as `dst 10.2.0.0/16 proto tcp`. All of them must hold.
func parseFilter(words []string) (filter, error) {
	var f filter
	if len(words)%2 != 0 {
		return f, usage(filterUsage)
	}
	for ; len(words) > 0; words = words[2:] {
		value := words[1]
		var err error
		switch words[0] {
		case "src":
			f.src, err = parsePrefix(value)
		case "dst":
			f.dst, err = parsePrefix(value)
		case "sport":
			f.sport, err = parsePort(value)
		case "dport":
			f.dport, err = parsePort(value)
		case "proto":
			protos := map[string]int{"any": 0, "tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "esp": unix.IPPROTO_ESP}
			var ok bool
			if f.proto, ok = protos[value]; !ok {
				err = fmt.Errorf("unknown protocol %q", value)
			}
		default:
			err = fmt.Errorf("unknown word %q", words[0])
		}
		if err != nil {
			return f, usage(fmt.Sprintf("%v (%s)", err, filterUsage))
		}
	}
	return f, nil
}

// parsePrefix parses a prefix or a single address.
func parsePrefix(text string) (netip.Prefix, error) {
	if !strings.Contains(text, "/") {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return netip.Prefix{}, err
		}
		return addr.Prefix(addr.BitLen())
	}
	return netip.ParsePrefix(text)
}

func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	return uint16(port), err
}

// matches reports whether the packet is one that the filter looks for.
func (f filter) matches(p packet) bool {
	return (!f.src.IsValid() || f.src.Contains(p.src)) &&
		(!f.dst.IsValid() || f.dst.Contains(p.dst)) &&
		(f.proto == 0 || f.proto == p.proto) &&
		(f.sport == 0 || f.sport == p.sport) &&
		(f.dport == 0 || f.dport == p.dport)
}

// A packet is what can be told from the front of an IP packet.
type packet struct {
	src, dst     netip.Addr
	proto        int
	sport, dport uint16 // of TCP and UDP
	payload      int    // bytes behind the transport header; behind the ESP header with its 8 bytes
}

var errShort = errors.New("packet too short")

// parsePacket parses the front of an IP packet, of which data may be only a part; length is that of the whole. The length in
// the header itself is not looked at: in a super-packet it may be 0.
func parsePacket(data []byte, length int) (packet, error) {
	var p packet
	if len(data) < 20 {
		return p, errShort
	}
	var header int
	switch data[0] >> 4 {
	case 4:
		header = int(data[0]&15) * 4
		p.src, _ = netip.AddrFromSlice(data[12:16])
		p.dst, _ = netip.AddrFromSlice(data[16:20])
		p.proto = int(data[9])
		if binary.BigEndian.Uint16(data[6:])&0x1fff != 0 {
			// Not the first fragment: no transport header.
			p.payload = length - header
			return p, nil
		}
	case 6:
		if len(data) < 40 {
			return p, errShort
		}
		header = 40
		p.src, _ = netip.AddrFromSlice(data[8:24])
		p.dst, _ = netip.AddrFromSlice(data[24:40])
		p.proto = int(data[6])
		for {
			switch p.proto {
			case unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS, unix.IPPROTO_ROUTING:
				if len(data) < header+8 {
					return p, errShort
				}
				p.proto = int(data[header])
				header += int(data[header+1])*8 + 8
				continue
			case unix.IPPROTO_FRAGMENT:
				if len(data) < header+8 {
					return p, errShort
				}
				p.proto = int(data[header])
				if binary.BigEndian.Uint16(data[header+2:])&^7 != 0 {
					p.payload = length - header - 8
					return p, nil
				}
				header += 8
				continue
			}
			break
		}
	default:
		return p, fmt.Errorf("no IP version %d", data[0]>>4)
	}
	if header < 20 || len(data) < header {
		return p, errShort
	}

	transport := data[header:]
	switch p.proto {
	case unix.IPPROTO_TCP:
		if len(transport) < 20 {
			return p, errShort
		}
		header += int(transport[12]>>4) * 4
	case unix.IPPROTO_UDP, unix.IPPROTO_ESP:
		if len(transport) < 8 {
			return p, errShort
		}
		header += 8
	}
	if p.proto == unix.IPPROTO_TCP || p.proto == unix.IPPROTO_UDP {
		p.sport, p.dport = binary.BigEndian.Uint16(transport), binary.BigEndian.Uint16(transport[2:])
	}
	p.payload = length - header
	return p, nil
}

// espACK is the largest ESP payload that is taken for a bare acknowledgement and not for data, whose size can't be told from
// outside. A TCP ACK over IPv6 with timestamps and SACK blocks is 96 bytes, plus IV, padding and ICV.
const espACK = 160

// isData reports whether the packet carries data, and not only an acknowledgement.
func (p packet) isData() bool {
	if p.proto == unix.IPPROTO_ESP {
		return p.payload > espACK
	}
	return p.payload > 0
}
