package owners

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

// A packet is what the kernel is asked about: everything by which a rule or a route can select.
type packet struct {
	src, dst     netip.Addr // src is invalid for none
	mark, uid    uint32
	tos, proto   uint8
	sport, dport uint16
	iif, oif     uint32
}

func (p packet) String() string {
	s := p.dst.String()
	if p.src.IsValid() {
		s += " from " + p.src.String()
	}
	for _, x := range []struct {
		name string
		n    uint32
	}{{"iif", p.iif}, {"oif", p.oif}, {"mark", p.mark}, {"uid", p.uid}, {"tos", uint32(p.tos)}, {"ipproto", uint32(p.proto)}, {"sport", uint32(p.sport)}, {"dport", uint32(p.dport)}} {
		if x.n != 0 {
			s += fmt.Sprintf(" %s %d", x.name, x.n)
		}
	}
	return s
}

// An answer is what the kernel says of a packet.
type answer struct {
	errno  unix.Errno // 0 if there is a route
	typ    uint8      // RTN_…
	table  uint32
	dst    netip.Prefix // of the route that matched, where it was asked for
	metric uint32
	hops   string // devices, gateways and what else a way has, in the kernel's order
	src    string // RTA_PREFSRC
	mtu    uint32 // RTAX_MTU, 0 for none
	locked bool
	others string // the rest of the metrics
	nhid   uint32 // of a nexthop object
}

// by reports whether one of the ways leaves by a device.
func (a answer) by(index uint32) bool {
	return regexp.MustCompile(fmt.Sprintf(`\bdev %d\b`, index)).MatchString(a.hops)
}

func (a answer) String() string {
	if a.errno != 0 {
		return a.errno.Error()
	}
	s := fmt.Sprintf("type %d table %d", a.typ, a.table)
	if a.dst.IsValid() {
		s += fmt.Sprintf(" match %s metric %d", a.dst, a.metric)
	}
	return fmt.Sprintf("%s %s src %s mtu %d locked %v %s", s, a.hops, a.src, a.mtu, a.locked, a.others)
}

// An asker asks in one namespace.
type asker struct{ *netlink.Conn }

func newAsker(n *harness.Netns) (a asker, err error) {
	err = n.In(func() (err error) {
		a.Conn, err = netlink.Dial(unix.NETLINK_ROUTE, nil)
		return err
	})
	return a, err
}

const (
	rtmHeader    = 12     // struct rtmsg, linux/rtnetlink.h
	flagFIBMatch = 0x2000 // RTM_F_FIB_MATCH
	flagTable    = 0x1000 // RTM_F_LOOKUP_TABLE
	rtaUID       = 25     // RTA_UID
	rtaNexthopID = 30     // RTA_NH_ID
	rtaIPProto   = 27     // RTA_IP_PROTO
	rtaSport     = 28     // RTA_SPORT
	rtaDport     = 29     // RTA_DPORT
	rtaxLock     = 1      // RTAX_LOCK
	rtaxMTU      = 2      // RTAX_MTU
	rtaxAdvMSS   = 8      // RTAX_ADVMSS
	// RTNH_F_DEAD and RTNH_F_LINKDOWN are the kernel's, and RTNH_F_ONLINK is about how the gateway was looked for.
	nexthopQuiet = 0x1 | 0x10 | 0x4
)

// ask asks for the way of a packet, or with match for the route that decides.
func (a asker) ask(p packet, match bool) (answer, error) {
	head := make([]byte, rtmHeader)
	head[0], head[1], head[3] = unix.AF_INET, uint8(p.dst.BitLen()), p.tos
	if p.dst.Is6() {
		head[0] = unix.AF_INET6
	}
	flags := uint32(flagTable)
	if match {
		flags |= flagFIBMatch
	}
	binary.NativeEndian.PutUint32(head[8:], flags)
	ae := netlink.NewAttributeEncoder()
	ae.Bytes(unix.RTA_DST, p.dst.AsSlice())
	if p.src.IsValid() {
		head[2] = uint8(p.src.BitLen())
		ae.Bytes(unix.RTA_SRC, p.src.AsSlice())
	}
	for _, x := range []struct {
		attr uint16
		n    uint32
	}{{unix.RTA_IIF, p.iif}, {unix.RTA_OIF, p.oif}, {unix.RTA_MARK, p.mark}, {rtaUID, p.uid}} {
		if x.n != 0 {
			ae.Uint32(x.attr, x.n)
		}
	}
	if p.proto != 0 {
		ae.Uint8(rtaIPProto, p.proto)
	}
	for _, x := range []struct {
		attr uint16
		n    uint16
	}{{rtaSport, p.sport}, {rtaDport, p.dport}} {
		if x.n != 0 {
			ae.Bytes(x.attr, binary.BigEndian.AppendUint16(nil, x.n))
		}
	}
	attrs, err := ae.Encode()
	if err != nil {
		return answer{}, err
	}
	msgs, err := a.Execute(netlink.Message{Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request}, Data: append(head, attrs...)})
	var errno unix.Errno
	switch {
	case errors.As(err, &errno):
		return answer{errno: errno}, nil
	case err != nil:
		return answer{}, err
	case len(msgs) != 1:
		return answer{}, fmt.Errorf("%d answers for %s", len(msgs), p)
	}
	return decode(msgs[0].Data, match)
}

// decode takes an answer apart.
func decode(b []byte, match bool) (answer, error) {
	if len(b) < rtmHeader {
		return answer{}, errors.New("short answer")
	}
	ad, err := netlink.NewAttributeDecoder(b[rtmHeader:])
	if err != nil {
		return answer{}, err
	}
	out := answer{typ: b[7], table: uint32(b[4])}
	dst := netip.IPv4Unspecified()
	if b[0] == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	var hops []string
	for ad.Next() {
		switch ad.Type() {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.RTA_TABLE:
			out.table = ad.Uint32()
		case unix.RTA_PRIORITY:
			out.metric = ad.Uint32()
		case unix.RTA_PREFSRC:
			src, _ := netip.AddrFromSlice(ad.Bytes())
			out.src = src.String()
		case unix.RTA_OIF:
			hops = append(hops, fmt.Sprintf("dev %d", ad.Uint32()))
		case unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE, unix.RTA_FLOW:
			hops = append(hops, fmt.Sprintf("%d:%x", ad.Type(), ad.Bytes()))
		case unix.RTA_MULTIPATH:
			hops = append(hops, fmt.Sprintf("multipath %x", quiet(ad.Bytes())))
		case rtaNexthopID:
			out.nhid = ad.Uint32()
		case unix.RTA_METRICS:
			ad.Nested(out.metrics)
		}
	}
	if match {
		out.dst = netip.PrefixFrom(dst, int(b[1]))
	}
	out.hops = strings.Join(hops, " ")
	return out, ad.Err()
}

func (a *answer) metrics(ad *netlink.AttributeDecoder) error {
	for ad.Next() {
		switch ad.Type() {
		case rtaxMTU:
			a.mtu = ad.Uint32()
		case rtaxLock:
			a.locked = ad.Uint32()&(1<<rtaxMTU) != 0
		case rtaxAdvMSS: // goes with the MTU
		default:
			a.others += fmt.Sprintf(" %d:%x", ad.Type(), ad.Bytes())
		}
	}
	return nil
}

// quiet is a multipath attribute without the flags that change no way.
func quiet(b []byte) []byte {
	b = slices.Clone(b)
	for rest := b; len(rest) >= unix.SizeofRtNexthop; {
		rest[2] &^= nexthopQuiet
		n := int(binary.NativeEndian.Uint16(rest))
		if n < unix.SizeofRtNexthop || n > len(rest) {
			break
		}
		rest = rest[min((n+3)&^3, len(rest)):]
	}
	return b
}

// words are what rules, routes and policies select by, as far as the lines of a world name it.
type words struct {
	prefixes           [2][]netip.Prefix // IPv4 and IPv6
	marks, uids, ports []uint32
	toses              []uint32
}

// read takes from a line what it names.
func (w *words) read(line string) {
	f := strings.Fields(line)
	for i, word := range f {
		if p, err := parsePrefix(word); err == nil {
			n := 0
			if p.Addr().Is6() {
				n = 1
			}
			w.prefixes[n] = append(w.prefixes[n], p)
			continue
		}
		if i == 0 {
			continue
		}
		first, _, _ := strings.Cut(strings.ReplaceAll(word, "/", "-"), "-")
		n, err := strconv.ParseUint(first, 0, 32)
		if err != nil {
			continue
		}
		switch f[i-1] {
		case "fwmark":
			w.marks = append(w.marks, uint32(n))
		case "uidrange":
			w.uids = append(w.uids, uint32(n), uint32(n)+1)
		case "tos":
			w.toses = append(w.toses, uint32(n))
		case "sport", "dport":
			w.ports = append(w.ports, uint32(n))
		}
	}
}

func parsePrefix(word string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(word); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	return netip.ParsePrefix(word)
}

// An interview draws packets.
type interview struct {
	*rand.Rand
	words
	own     [2][]netip.Addr // the host's addresses
	devices []uint32
}

func (v *interview) packet() packet {
	family := v.IntN(2)
	p := packet{dst: v.in(family)}
	switch v.IntN(6) {
	case 0:
	case 1, 2:
		p.src = v.own[family][v.IntN(len(v.own[family]))]
	default:
		p.src = v.in(family)
	}
	if v.IntN(5) < 2 {
		p.iif = v.devices[v.IntN(len(v.devices))]
		if !p.src.IsValid() {
			p.src = v.in(family)
		}
	} else if v.IntN(6) == 0 {
		p.oif = v.devices[v.IntN(len(v.devices))]
		if family == 1 && v.IntN(2) == 0 {
			p.src = netip.Addr{} // only without one a question passes over other devices, as a bound socket does (ip6_route_output_flags_noref)
		}
	}
	if v.IntN(2) == 0 {
		p.mark = v.of(v.marks, 1, 0x10, 0x80000)
		if v.IntN(8) == 0 {
			p.mark |= 1 << v.IntN(32)
		}
	}
	if v.IntN(3) == 0 {
		p.uid = v.of(v.uids, 1000)
	}
	if v.IntN(5) == 0 {
		p.tos = uint8(v.of(v.toses, 4, 8, 16)) & 0x1c // IPTOS_RT_MASK
	}
	if v.IntN(2) == 0 {
		p.proto = []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP}[v.IntN(2)]
		p.sport, p.dport = uint16(v.of(v.ports, 1, 40000)), uint16(v.of(v.ports, 80, 40000))
	}
	return p
}

func (v *interview) of(list []uint32, more ...uint32) uint32 {
	list = append(more, list...)
	return list[v.IntN(len(list))]
}

// in is an address in one of the prefixes, at one of their ends or in between. Not the whole of a family counts as one, as a rule.
func (v *interview) in(family int) netip.Addr {
	list := v.prefixes[family]
	p := list[v.IntN(len(list))]
	if p.Bits() == 0 && v.IntN(4) > 0 {
		p = list[v.IntN(len(list))]
	}
	b := p.Masked().Addr().AsSlice()
	way := v.IntN(4)
	for i := p.Bits(); i < 8*len(b); i++ {
		bit := byte(0x80) >> (i % 8)
		if way == 0 && i == 8*len(b)-1 || way == 1 || way > 1 && v.IntN(2) == 0 {
			b[i/8] |= bit
		}
	}
	a, _ := netip.AddrFromSlice(b)
	if a.IsMulticast() { // locks are for unicast
		return v.own[family][0]
	}
	return a
}
