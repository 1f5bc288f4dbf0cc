package plan

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// route [TYPE] DST [table T] [proto P] [metric N] [tos N] [src A] [from P] [mtu [lock] N]
// [advmss N] [expires] [nhid N] { [via A] [dev D] | nexthop [via A] dev D … }, in the words of
// `ip route`.
func (w *world) route(f *words) error {
	var b routeBytes
	b.kind, b.proto, b.table = routes.Unicast, routes.ProtoStatic, routes.TableMain
	kinds := map[string]routes.Type{
		"blackhole": routes.Blackhole, "unreachable": routes.Unreachable, "prohibit": routes.Prohibit,
		"throw": routes.Throw, "local": routes.Local, "multicast": routes.Multicast,
	}
	if len(f.w) > 0 {
		if k, ok := kinds[f.w[0]]; ok {
			b.kind = k
			f.next()
		}
	}
	b.dst = f.prefix()
	for f.more() {
		switch k := f.next(); k {
		case "table":
			b.table = tableOf(f)
		case "proto":
			b.proto = protocolOf(f)
		case "metric":
			b.metric = uint32(f.num())
		case "tos":
			b.tos = uint8(f.num())
		case "src":
			b.prefsrc = f.addr()
		case "from":
			b.src = f.prefix()
		case "mtu":
			b.locked = f.is("lock")
			b.mtu = uint32(f.num())
		case "advmss":
			b.advmss = uint32(f.num())
		case "expires":
			b.expires = true
		case "nhid":
			b.nhid = uint32(f.num())
		case "resilient":
			b.resilient = true
		case "via", "dev":
			if len(b.hops) == 0 {
				b.hops = append(b.hops, hop{})
			}
			b.hops[len(b.hops)-1].word(w, k, f)
		case "nexthop":
			b.multi = true
			b.hops = append(b.hops, hop{})
		case "encap": // a lightweight tunnel
			b.hops[len(b.hops)-1].encap = true
			if f.is("if_id") { // of type xfrm
				b.hops[len(b.hops)-1].ifID = uint32(f.num())
			}
		case "weight":
			b.hops[len(b.hops)-1].weight = uint8(f.num())
		default:
			f.fail("unknown word %q", k)
		}
	}
	if err := f.end(); err != nil {
		return err
	}
	if b.nhid != 0 {
		w.objects[b.nhid] = b.ways()
		w.object(b)
	}
	r, err := w.in.ParseRoute(w.markDead(b.bytes()))
	if err != nil {
		return err
	}
	w.fib.Apply(routes.RouteSet{Route: r, Append: !w.replacing, Replace: w.replacing})
	return nil
}

// object is the nexthop object of a route, with its members if it is a group.
func (w *world) object(b routeBytes) {
	set := func(o *routes.NexthopObject) { w.fib.Apply(routes.NexthopSet{Nexthop: o}) }
	one := func(id uint32, h hop) {
		set(&routes.NexthopObject{ID: id, Family: routes.FamilyOf(b.dst.Addr()), Oif: h.oif, Gateway: h.via, Encap: h.encap})
	}
	if !b.multi {
		if len(b.hops) > 0 {
			one(b.nhid, b.hops[0])
		}
		return
	}
	group := &routes.NexthopObject{ID: b.nhid, Resilient: b.resilient}
	for i, h := range b.hops {
		id := b.nhid*100 + uint32(i)
		one(id, h)
		group.Group = append(group.Group, routes.GroupMember{ID: id, Weight: uint16(h.weight)})
	}
	set(group)
}

func protocolOf(f *words) routes.Protocol {
	names := map[string]routes.Protocol{"static": routes.ProtoStatic, "kernel": routes.ProtoKernel, "ra": routes.ProtoRA, "boot": routes.ProtoBoot}
	if len(f.w) > 0 {
		if p, ok := names[f.w[0]]; ok {
			f.next()
			return p
		}
	}
	return routes.Protocol(f.num())
}

type hop struct {
	oif    routes.Ifindex
	via    netip.Addr
	weight uint8
	encap  bool
	ifID   uint32
}

func (h *hop) word(w *world, k string, f *words) {
	if k == "via" {
		h.via = f.addr()
	} else {
		h.oif = w.dev(f)
	}
}

// routeBytes builds the payload of an RTM_NEWROUTE message as the kernel sends it.
type routeBytes struct {
	dst, src        netip.Prefix
	kind            routes.Type
	proto           routes.Protocol
	table           routes.TableID
	tos             uint8
	metric          uint32
	prefsrc         netip.Addr
	mtu, advmss     uint32
	locked, expires bool
	nhid            uint32
	resilient       bool // the nexthop group
	hops            []hop
	multi           bool
}

func attribute(typ uint16, val []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(val)))
	b = append(binary.NativeEndian.AppendUint16(b, typ), val...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func attribute32(typ uint16, v uint32) []byte {
	return attribute(typ, binary.NativeEndian.AppendUint32(nil, v))
}

// RTA_* and RTAX_* numbers (linux/rtnetlink.h).
const (
	rtaDst, rtaSrc, rtaOif, rtaGateway, rtaPriority, rtaPrefsrc        = 1, 2, 4, 5, 6, 7
	rtaMetrics, rtaMultipath, rtaTable, rtaEncapType, rtaEncap, rtaExp = 8, 9, 15, 21, 22, 23
	rtaNHID, rtaxLock, rtaxMTU, rtaxAdvMSS                             = 30, 1, 2, 8
)

func (b *routeBytes) bytes() []byte {
	out := make([]byte, 12)
	out[0], out[1], out[3], out[4] = byte(routes.FamilyOf(b.dst.Addr())), byte(b.dst.Bits()), b.tos, 252
	out[5], out[7] = byte(b.proto), byte(b.kind)
	if b.table < 256 {
		out[4] = byte(b.table)
	}
	out = append(out, attribute32(rtaTable, uint32(b.table))...)
	if b.dst.Bits() > 0 {
		out = append(out, attribute(rtaDst, b.dst.Addr().AsSlice())...)
	}
	if b.src.IsValid() {
		out[2] = byte(b.src.Bits())
		out = append(out, attribute(rtaSrc, b.src.Addr().AsSlice())...)
	}
	if b.metric != 0 {
		out = append(out, attribute32(rtaPriority, b.metric)...)
	}
	if b.prefsrc.IsValid() {
		out = append(out, attribute(rtaPrefsrc, b.prefsrc.AsSlice())...)
	}
	var m []byte
	if b.locked {
		m = append(m, attribute32(rtaxLock, 1<<rtaxMTU)...)
	}
	if b.mtu != 0 {
		m = append(m, attribute32(rtaxMTU, b.mtu)...)
	}
	if b.advmss != 0 {
		m = append(m, attribute32(rtaxAdvMSS, b.advmss)...)
	}
	if m != nil {
		out = append(out, attribute(rtaMetrics, m)...)
	}
	if b.nhid != 0 {
		out = append(out, attribute32(rtaNHID, b.nhid)...)
	}
	out = append(out, b.ways()...)
	if b.expires {
		out = append(out, attribute32(rtaExp, 100)...)
	}
	return out
}

func (b *routeBytes) ways() []byte {
	one := func(h hop) []byte {
		var out []byte
		if h.via.IsValid() {
			out = append(out, attribute(rtaGateway, h.via.AsSlice())...)
		}
		switch {
		case h.ifID != 0: // LWTUNNEL_ENCAP_XFRM, LWT_XFRM_IF_ID
			out = append(out, attribute(rtaEncapType, []byte{10, 0})...)
			out = append(out, attribute(rtaEncap|0x8000, attribute32(1, h.ifID))...)
		case h.encap:
			out = append(out, attribute(rtaEncapType, []byte{1, 0})...)
			out = append(out, attribute(rtaEncap, nil)...)
		}
		return out
	}
	if !b.multi {
		if len(b.hops) == 0 {
			return nil
		}
		return append(one(b.hops[0]), attribute32(rtaOif, uint32(b.hops[0].oif))...)
	}
	var out []byte
	for _, h := range b.hops {
		rest := one(h)
		nh := binary.NativeEndian.AppendUint16(nil, uint16(8+len(rest)))
		nh = append(nh, 0, h.weight)
		nh = append(binary.NativeEndian.AppendUint32(nh, uint32(h.oif)), rest...)
		out = append(out, nh...)
	}
	return attribute(rtaMultipath, out)
}

// policy INDEX src P dst P [proto P] [sport N[/MASK]] [dport N[/MASK]] [dev NAME]
// [priority N] [mark V/M] [if_id N] [action block] [dir in] { tmpl … }, in the words of
// `ip xfrm policy`. A template is `tmpl PROTO tunnel SRC DST | transport [reqid N] [level use]`.
func (w *world) policy(f *words) error {
	p := &xfrmwatch.Policy{Index: xfrmwatch.PolicyIndex(f.num()), Dir: xfrmwatch.Out}
	for f.more() {
		switch k := f.next(); k {
		case "src":
			p.Selector.Src = f.prefix()
		case "dst":
			p.Selector.Dst = f.prefix()
			p.Selector.Family = xfrmwatch.Family(routes.FamilyOf(p.Selector.Dst.Addr()))
		case "proto":
			p.Selector.Proto = xfrmwatch.Proto(f.proto())
		case "sport":
			p.Selector.Sport = f.portMatch()
		case "dport":
			p.Selector.Dport = f.portMatch()
		case "dev":
			p.Selector.Ifindex = int32(w.dev(f))
		case "priority":
			p.Priority = uint32(f.num())
		case "mark":
			p.Mark.Value, p.Mark.Mask = f.mark()
		case "if_id":
			p.IfID = uint32(f.num())
		case "action":
			if f.next() == "block" {
				p.Action = xfrmwatch.Block
			}
		case "dir":
			if f.next() == "in" {
				p.Dir = xfrmwatch.In
			}
		case "tmpl":
			p.Templates = append(p.Templates, template(f, p.Selector.Family))
		default:
			f.fail("unknown word %q", k)
		}
	}
	if err := f.end(); err != nil {
		return err
	}
	w.db.Apply(xfrmwatch.PolicySet{Policy: p})
	return nil
}

func template(f *words, family xfrmwatch.Family) xfrmwatch.Template {
	t := xfrmwatch.Template{Proto: xfrmwatch.Proto(f.proto()), Reqid: 1, Family: family}
	unspecified := netip.IPv4Unspecified()
	if family == xfrmwatch.IPv6 {
		unspecified = netip.IPv6Unspecified()
	}
	t.Src, t.Dst = unspecified, unspecified
	switch m := f.next(); m {
	case "tunnel":
		t.Mode, t.Src, t.Dst = xfrmwatch.Tunnel, f.addr(), f.addr()
		t.Family = xfrmwatch.Family(routes.FamilyOf(t.Dst))
	case "transport":
	default:
		f.fail("unknown mode %q", m)
	}
	if f.is("reqid") {
		t.Reqid = xfrmwatch.Reqid(f.num())
	}
	if f.is("level") {
		t.Optional = f.next() == "use"
	}
	return t
}

func (f *words) portMatch() xfrmwatch.PortMatch {
	port, mask, masked := strings.Cut(f.next(), "/")
	a, err := strconv.ParseUint(port, 0, 16)
	b := uint64(0xffff)
	if err == nil && masked {
		b, err = strconv.ParseUint(mask, 0, 16)
	}
	if err != nil {
		f.fail("no port")
	}
	return xfrmwatch.PortMatch{Port: uint16(a), Mask: uint16(b)}
}

// sa PROTO SRC DST spi N [transport] [reqid N] [if_id N] [mark V/M] [output-mark V/M]
// ALGORITHM [encap] [larval] [dying] [offload DEV] [age N]; the algorithms are gcm,
// cbc-sha256, sha256 (for AH) and alien.
func (w *world) sa(f *words) error {
	s := &xfrmwatch.SA{Proto: xfrmwatch.Proto(f.proto()), Src: f.addr(), Dst: f.addr(), Mode: xfrmwatch.Tunnel, Reqid: 1}
	s.Family = xfrmwatch.Family(routes.FamilyOf(s.Dst))
	for f.more() {
		switch k := f.next(); k {
		case "spi":
			s.SPI = xfrmwatch.SPI(f.num())
		case "transport":
			s.Mode = xfrmwatch.Transport
		case "reqid":
			s.Reqid = xfrmwatch.Reqid(f.num())
		case "if_id":
			s.IfID = uint32(f.num())
		case "mark":
			s.Mark.Value, s.Mark.Mask = f.mark()
		case "output-mark":
			s.OutputMark.Value, s.OutputMark.Mask = f.mark()
		case "gcm":
			s.AEAD = xfrmwatch.Algorithm{Name: "rfc4106(gcm(aes))", ICVBits: 128}
		case "cbc-sha256":
			s.Enc, s.Auth = xfrmwatch.Algorithm{Name: "cbc(aes)"}, xfrmwatch.Algorithm{Name: "hmac(sha256)", ICVBits: 128}
		case "sha256":
			s.Auth = xfrmwatch.Algorithm{Name: "hmac(sha256)", ICVBits: 128}
		case "alien":
			s.AEAD = xfrmwatch.Algorithm{Name: "alien", ICVBits: 128}
		case "encap":
			s.Encap = xfrmwatch.Encap{Type: 2, Sport: 4500, Dport: 4500}
		case "larval":
			s.Larval = true
		case "dying":
			s.Dying = true
		case "offload":
			s.OffloadDev = int32(w.dev(f))
		case "age":
			s.AddTime = uint64(1000 - f.num())
		default:
			f.fail("unknown word %q", k)
		}
	}
	if err := f.end(); err != nil {
		return err
	}
	s.Key = xfrmwatch.SAKey{Dst: s.Dst, SPI: s.SPI, Proto: s.Proto, Mark: s.Mark}
	w.db.Apply(xfrmwatch.SASet{SA: s})
	return nil
}
