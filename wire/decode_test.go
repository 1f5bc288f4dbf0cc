package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// octets reads hexadecimal digits with blanks between them.
func octets(text string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(strings.ReplaceAll(text, " ", ""), "\n", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// v4 is an IPv4 header from 10.1.1.1 to 10.1.1.2 in front of what it carries; v6 one from fd01::1 to fd01::2.
func v4(proto byte, payload string) []byte {
	return append(octets(fmt.Sprintf("4500 0000 0001 4000 40%02x 0000 0a010101 0a010102", proto)), octets(payload)...)
}

func v6(next byte, payload string) []byte {
	return append(octets(fmt.Sprintf("6000 0000 0000 %02x 40 fd01000000000000 0000000000000001 fd01000000000000 0000000000000002", next)), octets(payload)...)
}

var (
	a4, b4 = netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("10.1.1.2")
	a6, b6 = netip.MustParseAddr("fd01::1"), netip.MustParseAddr("fd01::2")
)

const (
	// From port 40000 to 179 without options, and with: a timestamp ahead of a signature by MD5, one by AO behind
	// nothing, and an option that claims to be longer than there is room for.
	tcp      = "9c40 00b3 00000001 00000002 5010 0100 0000 0000"
	tcpMD5   = "9c40 00b3 00000001 00000002 d018 0100 0000 0000 0101 080a 00000001 00000002 1312 00112233445566778899aabbccddeeff 0101"
	tcpAO    = "9c40 00b3 00000001 00000002 a018 0100 0000 0000 1d10 0101 00112233445566778899aabb 0000 0000"
	tcpBogus = "9c40 00b3 00000001 00000002 6018 0100 0000 0000 13ff 0101"
	tcpPush  = "9c40 00b3 00000001 00000002 5018 0100 0000 0000"
	udp      = "11940000 00000000"
)

func TestDecode(t *testing.T) {
	fragment4 := v4(protoTCP, tcp)
	binary.BigEndian.PutUint16(fragment4[6:], 185)
	options4 := append(octets("4700 0000 0001 4000 4006 0000 0a010101 0a010102 9404 0000 0101 0101"), octets(tcp)...)
	for name, tt := range map[string]struct {
		data   []byte
		length int // beyond the data
		want   Packet
		err    error
	}{
		"nothing":           {nil, 0, Packet{}, ErrShort},
		"no version of IP":  {octets("75"), 0, Packet{}, ErrNotIP},
		"IPv4, cut":         {v4(protoTCP, "")[:19], 0, Packet{}, ErrShort},
		"IPv4, header of 4": {append([]byte{0x41}, v4(protoTCP, tcp)[1:]...), 0, Packet{}, ErrShort},
		"IPv6, cut":         {v6(protoTCP, "")[:39], 0, Packet{}, ErrShort},
		"TCP":               {v4(protoTCP, tcp), 65000, Packet{Src: a4, Dst: b4, Proto: 6, Sport: 40000, Dport: 179, Payload: 65000}, nil},
		"TCP, pushed":       {v6(protoTCP, tcpPush), 1000, Packet{Src: a6, Dst: b6, Proto: 6, Sport: 40000, Dport: 179, Push: true, Payload: 1000}, nil},
		"TCP, cut":          {v4(protoTCP, tcp)[:38], 0, Packet{}, ErrShort},
		"TCP, header of 16": {v4(protoTCP, strings.Replace(tcp, "5010", "4010", 1)), 0, Packet{}, ErrShort},
		"TCP-MD5":           {v4(protoTCP, tcpMD5), 10, Packet{Src: a4, Dst: b4, Proto: 6, Sport: 40000, Dport: 179, Signature: MD5, Push: true, Payload: 10}, nil},
		"TCP-AO":            {v6(protoTCP, tcpAO), 10, Packet{Src: a6, Dst: b6, Proto: 6, Sport: 40000, Dport: 179, Signature: AO, Push: true, Payload: 10}, nil},
		"bogus option":      {v6(protoTCP, tcpBogus), 0, Packet{Src: a6, Dst: b6, Proto: 6, Sport: 40000, Dport: 179, Push: true}, nil},
		"options kept half": {v6(protoTCP, tcpMD5)[:40+38], 14, Packet{Src: a6, Dst: b6, Proto: 6, Sport: 40000, Dport: 179, Push: true}, nil},
		"options of IPv4":   {options4, 7, Packet{Src: a4, Dst: b4, Proto: 6, Sport: 40000, Dport: 179, Payload: 7}, nil},
		"fragment of IPv4":  {fragment4, 100, Packet{Src: a4, Dst: b4, Proto: 6, Fragment: true, Payload: 120}, nil},
		"ESP":               {v4(protoESP, "00000901 00000001"), 1000, Packet{Src: a4, Dst: b4, Proto: 50, SPI: 0x901, Payload: 1000}, nil},
		"ESP, cut":          {v6(protoESP, "00000901"), 1000, Packet{}, ErrShort},
		"AH":                {v4(protoAH, "06 04 0000 00000902 00000001 001122334455667788990011"), 20, Packet{Src: a4, Dst: b4, Proto: 51, SPI: 0x902, Payload: 20}, nil},
		"ESP in UDP":        {v4(protoUDP, "1194 1194 0028 0000 00000903 00000001"), 24, Packet{Src: a4, Dst: b4, Proto: 17, Sport: 4500, Dport: 4500, SPI: 0x903, Payload: 32}, nil},
		"IKE behind a NAT":  {v6(protoUDP, "1194 1194 0028 0000 00000000 00000001"), 0, Packet{Src: a6, Dst: b6, Proto: 17, Sport: 4500, Dport: 4500, Payload: 8}, nil},
		"keepalive":         {v4(protoUDP, "1194 1194 0009 0000 ff"), 0, Packet{Src: a4, Dst: b4, Proto: 17, Sport: 4500, Dport: 4500, Payload: 1}, nil},
		"UDP, cut":          {v4(protoUDP, udp)[:24], 0, Packet{}, ErrShort},
		"ICMP":              {v4(protoICMP, "0800 0000 00010001"), 56, Packet{Src: a4, Dst: b4, Proto: 1, Sport: 8, Payload: 56}, nil},
		"neighbour":         {v6(protoICMPv6, "8700 0000 00000000"), 16, Packet{Src: a6, Dst: b6, Proto: 58, Sport: 135, Payload: 16}, nil},
		"GRE with a key":    {v4(protoGRE, "b000 0800 0000 0000 00010002 00000003"), 100, Packet{Src: a4, Dst: b4, Proto: 47, Sport: 1, Dport: 2, Payload: 100}, nil},
		"SCTP":              {v4(protoSCTP, "0001 0002 00000000 00000000"), 4, Packet{Src: a4, Dst: b4, Proto: 132, Sport: 1, Dport: 2, Payload: 4}, nil},
		"mobility":          {v6(protoMobility, "3b 00 05 00 0000 0000"), 0, Packet{Src: a6, Dst: b6, Proto: 135, Sport: 5, Payload: 4}, nil},
		"no transport":      {v6(59, ""), 3, Packet{Src: a6, Dst: b6, Proto: 59, Payload: 3}, nil},
		"extension headers": {
			v6(protoHopByHop, "2b00 c20400010000"+"3c00 0000 00000000"+"2c01 010c 000000000000000000000000"+"0600 0001 00000001"+tcp), 5,
			Packet{Src: a6, Dst: b6, Proto: 6, Sport: 40000, Dport: 179, Payload: 5}, nil,
		},
		"fragment of IPv6":    {v6(protoFragment, "3200 0599 00000001"), 100, Packet{Src: a6, Dst: b6, Proto: 50, Fragment: true, Payload: 100}, nil},
		"extension, cut":      {v6(protoDstOpts, "0600 0000"), 0, Packet{}, ErrShort},
		"extension, too long": {v6(protoDstOpts, "06ff 0000 00000000"), 0, Packet{}, ErrShort},
		"fragment, cut":       {v6(protoFragment, "0600 0000"), 0, Packet{}, ErrShort},
	} {
		t.Run(name, func(t *testing.T) {
			length := len(tt.data) + tt.length
			p, err := decode(tt.data, length)
			if !errors.Is(err, tt.err) || err == nil != (tt.err == nil) {
				t.Fatalf("got %v, want %v", err, tt.err)
			}
			if tt.err == nil {
				tt.want.Length = length
			}
			if d := cmp.Diff(tt.want, p, cmpopts.EquateComparable(netip.Addr{})); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestFrameFindsTheNetworkHeader(t *testing.T) {
	const macs = "020000000001 020000000002"
	ip := hex.EncodeToString(v4(protoTCP, tcp))
	grehead := hex.EncodeToString(v4(protoGRE, "0000 0800"))
	for name, tt := range map[string]struct {
		frame Frame
		err   error
	}{
		"Ethernet":                   {Frame{Data: octets(macs + "0800" + ip), Network: 14, Hatype: 1, Protocol: 0x800}, nil},
		"loopback":                   {Frame{Data: octets(macs + "0800" + ip), Network: 14, Hatype: 772, Protocol: 0x800}, nil},
		"tag put in by the kernel":   {Frame{Data: octets(macs + "8100 0005 0800" + ip), Network: 18, Hatype: 1, Protocol: 0x8100}, nil},
		"two tags, one not seen":     {Frame{Data: octets(macs + "88a8 0006 8100 0005 0800" + ip), Network: 14, Hatype: 1, Protocol: 0x8100}, nil},
		"tags to the end":            {Frame{Data: octets(macs + "88a8 0006 8100"), Network: 14, Hatype: 1, Protocol: 0x8100}, ErrShort},
		"ARP":                        {Frame{Data: octets(macs + "0806" + ip), Network: 14, Hatype: 1, Protocol: 0x806}, ErrNotIP},
		"LLC":                        {Frame{Data: octets(macs + "0026" + ip), Network: 14, Hatype: 1, Protocol: 4}, ErrNotIP},
		"Ethernet, cut":              {Frame{Data: octets(macs), Hatype: 1, Protocol: 0x800}, ErrShort},
		"no link layer":              {Frame{Data: octets(ip), Hatype: 0xfffe, Protocol: 0x800}, nil},
		"GRE that counts its header": {Frame{Data: octets(grehead + ip), Network: 24, Hatype: 778, Protocol: 0x800}, nil},
		"MPLS over GRE":              {Frame{Data: octets(grehead + ip), Network: 24, Hatype: 778, Protocol: 0x8847}, ErrNotIP},
		"behind what was kept":       {Frame{Data: octets(ip), Network: 300, Hatype: 0xfffe, Protocol: 0x800}, ErrShort},
		"ahead of what was kept":     {Frame{Data: octets(ip), Network: -2, Hatype: 0xfffe, Protocol: 0x800}, ErrShort},
	} {
		t.Run(name, func(t *testing.T) {
			f := tt.frame
			f.Length = len(f.Data) + 1000
			p, err := f.Packet()
			if !errors.Is(err, tt.err) || err == nil != (tt.err == nil) {
				t.Fatalf("got %v, want %v", err, tt.err)
			}
			if err == nil && (p.Src != a4 || p.Dst != b4 || p.Sport != 40000 || p.Payload != 1000 || p.Length != 1040) {
				t.Errorf("got %+v", p)
			}
		})
	}
}

// captured is a block as Linux 6.18 handed it over, with TCP and UDP_SEGMENT in both families.
const captured = "testdata/block.bin"

func TestBlockAsTheKernelWritesIt(t *testing.T) {
	block, err := os.ReadFile(captured)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	untold := eachFrame(block, func(f *Frame) {
		p, err := f.Packet()
		got = append(got, fmt.Sprintf("proto %d from %s gso %d segment %d length %d, %v", p.Proto, p.Src, f.GSO, f.Segment, p.Length, err))
	})
	want := []string{
		"proto 0 from invalid IP gso 0 segment 0 length 0, wire: not IP",
		"proto 6 from 10.1.1.1 gso 0 segment 0 length 60, <nil>",
		"proto 6 from 10.1.1.1 gso 0 segment 0 length 52, <nil>",
		"proto 6 from 10.1.1.1 gso 1 segment 1448 length 5844, <nil>",
		"proto 17 from 10.1.1.1 gso 5 segment 1000 length 8028, <nil>",
		"proto 58 from fd01::1 gso 0 segment 0 length 72, <nil>",
		"proto 58 from :: gso 0 segment 0 length 96, <nil>",
		"proto 58 from :: gso 0 segment 0 length 72, <nil>",
		"proto 58 from fd01::1 gso 0 segment 0 length 72, <nil>",
		"proto 6 from fd01::1 gso 0 segment 0 length 80, <nil>",
		"proto 6 from fd01::1 gso 0 segment 0 length 72, <nil>",
		"proto 6 from fd01::1 gso 0 segment 0 length 1500, <nil>",
		"proto 6 from fd01::1 gso 0 segment 0 length 1500, <nil>",
		"proto 6 from fd01::1 gso 0 segment 0 length 1500, <nil>",
		"proto 6 from fd01::1 gso 0 segment 0 length 1500, <nil>",
		"proto 6 from fd01::1 gso 0 segment 0 length 152, <nil>",
		"proto 17 from fd01::1 gso 5 segment 1000 length 8048, <nil>",
		"proto 58 from fe80::878:57ff:fe92:47d6 gso 0 segment 0 length 96, <nil>",
		"proto 58 from fe80::878:57ff:fe92:47d6 gso 0 segment 0 length 56, <nil>",
	}
	if d := cmp.Diff(want, got); d != "" || untold != 0 {
		t.Errorf("%d untold (-want +got)\n%s", untold, d)
	}

	// What the kernel had no words for is a place that it has not filled.
	at := binary.NativeEndian.Uint32(block[blockFirst:])
	hole := bytes.Clone(block)
	binary.NativeEndian.PutUint32(hole[at+frameStatus:], 0)
	n := 0
	if untold := eachFrame(hole, func(*Frame) { n++ }); untold != 1 || n != len(want)-1 {
		t.Errorf("%d untold and %d frames", untold, n)
	}
}

func FuzzPacket(f *testing.F) {
	for _, data := range [][]byte{v4(protoTCP, tcpMD5), v6(protoTCP, tcpAO), v6(protoHopByHop, "2b00 c20400010000"+"0600 0000 00000000"+tcp), v4(protoUDP, "1194 1194 0028 0000 00000903 00000001")} {
		f.Add(data, 0, 65000, uint16(0xfffe), uint16(0x800))
		f.Add(append(octets("020000000001 020000000002 8100 0005 0800"), data...), 14, 65000, uint16(1), uint16(0x8100))
	}
	f.Fuzz(func(t *testing.T, data []byte, network, length int, hatype, protocol uint16) {
		frame := Frame{Data: data, Network: network, Length: length, Hatype: hatype, Protocol: protocol}
		p, err := frame.Packet()
		switch {
		case err != nil && !errors.Is(err, ErrShort) && !errors.Is(err, ErrNotIP):
			t.Errorf("got %v", err)
		case err != nil:
			if p != (Packet{}) {
				t.Errorf("%v, and %+v", err, p)
			}
		case !p.Src.IsValid() || p.Src.Is4() != p.Dst.Is4():
			t.Errorf("from %s to %s", p.Src, p.Dst)
		case p.Payload < 0 || p.Payload > max(length, 0):
			t.Errorf("a payload of %d in %d", p.Payload, length)
		case p.Fragment && (p.Sport|p.Dport != 0 || p.SPI != 0 || p.Signature != 0):
			t.Errorf("a transport's header in a fragment: %+v", p)
		case p.Signature != 0 && p.Proto != protoTCP:
			t.Errorf("protocol %d is signed", p.Proto)
		}
	})
}

func FuzzBlock(f *testing.F) {
	block, err := os.ReadFile(captured)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(block)
	f.Fuzz(func(t *testing.T, block []byte) {
		n := 0
		untold := eachFrame(block, func(f *Frame) {
			n++
			if len(f.Data) > len(block) {
				t.Errorf("%d bytes of a block of %d", len(f.Data), len(block))
			}
			_, _ = f.Packet()
		})
		if n+untold > len(block)/frameHeader {
			t.Errorf("%d frames and %d untold in %d bytes", n, untold, len(block))
		}
	})
}
