package xfrmwatch

import (
	"encoding/binary"
	"net/netip"
)

// The builders below write XFRM messages as user space and kernel do, for the decoders' tests
// and as requests to a real kernel.

func put16(b []byte, v uint16) { binary.NativeEndian.PutUint16(b, v) }
func put32(b []byte, v uint32) { binary.NativeEndian.PutUint32(b, v) }
func put64(b []byte, v uint64) { binary.NativeEndian.PutUint64(b, v) }

func wireAttr(typ uint16, value []byte) []byte {
	b := make([]byte, 4, 4+(len(value)+3)&^3)
	put16(b, uint16(4+len(value)))
	put16(b[2:], typ)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func wireU32(typ uint16, v uint32) []byte {
	b := make([]byte, 4)
	put32(b, v)
	return wireAttr(typ, b)
}

func wireMark(m Mark) []byte {
	b := make([]byte, 8)
	put32(b, m.Value)
	put32(b[4:], m.Mask)
	return wireAttr(attrMark, b)
}

func wireOffload(dev int32, flags uint8) []byte {
	b := make([]byte, 8)
	put32(b, uint32(dev))
	b[4] = flags
	return wireAttr(attrOffloadDev, b)
}

func wireSelector(b []byte, s Selector) {
	if s.Family != 0 {
		copy(b, s.Dst.Addr().AsSlice())
		copy(b[16:], s.Src.Addr().AsSlice())
		b[42], b[43] = byte(s.Dst.Bits()), byte(s.Src.Bits())
	}
	binary.BigEndian.PutUint16(b[32:], s.Dport.Port)
	binary.BigEndian.PutUint16(b[34:], s.Dport.Mask)
	binary.BigEndian.PutUint16(b[36:], s.Sport.Port)
	binary.BigEndian.PutUint16(b[38:], s.Sport.Mask)
	put16(b[40:], uint16(s.Family))
	b[44] = byte(s.Proto)
	put32(b[48:], uint32(s.Ifindex))
}

// unlimited fills a struct xfrm_lifetime_cfg.
func unlimited(b []byte) {
	for i := range 4 {
		put64(b[8*i:], ^uint64(0))
	}
}

func wirePolicyInfo(p *Policy) []byte {
	b := make([]byte, sizePolicyInfo)
	wireSelector(b, p.Selector)
	unlimited(b[56:])
	put32(b[152:], p.Priority)
	put32(b[156:], uint32(p.Index))
	b[160], b[161], b[162] = byte(p.Dir), byte(p.Action), p.Flags
	return b
}

func wirePolicyAttrs(p *Policy) []byte {
	var b []byte
	var tmpls []byte
	for _, t := range p.Templates {
		w := make([]byte, sizeTemplate)
		copy(w, t.Dst.AsSlice())
		binary.BigEndian.PutUint32(w[16:], uint32(t.SPI))
		w[20] = byte(t.Proto)
		put16(w[24:], uint16(t.Family))
		copy(w[28:], t.Src.AsSlice())
		put32(w[44:], uint32(t.Reqid))
		w[48] = byte(t.Mode)
		if t.Optional {
			w[50] = 1
		}
		for i := range 3 {
			put32(w[52+4*i:], ^uint32(0))
		}
		tmpls = append(tmpls, w...)
	}
	if len(tmpls) > 0 {
		b = append(b, wireAttr(attrTmpl, tmpls)...)
	}
	if p.Sub {
		b = append(b, wireAttr(attrPolicyType, []byte{1, 0, 0, 0, 0, 0})...)
	}
	if p.Mark != (Mark{}) {
		b = append(b, wireMark(p.Mark)...)
	}
	if p.IfID != 0 {
		b = append(b, wireU32(attrIfID, p.IfID)...)
	}
	if p.OffloadDev != 0 {
		b = append(b, wireOffload(p.OffloadDev, p.OffloadFlag)...)
	}
	return b
}

func wirePolicy(p *Policy) []byte { return append(wirePolicyInfo(p), wirePolicyAttrs(p)...) }

func wirePolicyID(p *Policy, byIndex bool) []byte {
	b := make([]byte, sizePolicyID)
	if byIndex {
		put32(b[56:], uint32(p.Index))
	} else {
		wireSelector(b, p.Selector)
	}
	b[60] = byte(p.Dir)
	return b
}

// wireDelPolicy is the kernel's notification.
func wireDelPolicy(p *Policy, byIndex bool) []byte {
	b := append(wirePolicyID(p, byIndex), wireAttr(attrPolicy, wirePolicyInfo(p))...)
	return append(b, wirePolicyAttrs(p)...)
}

func wirePolExpire(p *Policy, hard bool) []byte {
	b := append(wirePolicyInfo(p), make([]byte, 8)...)
	if hard {
		b[sizePolicyInfo] = 1
	}
	return append(b, wirePolicyAttrs(p)...)
}

func wireSAInfo(s *SA) []byte {
	b := make([]byte, sizeSAInfo)
	if s.HasSelector {
		wireSelector(b, s.Selector)
	}
	copy(b[56:], s.Dst.AsSlice())
	binary.BigEndian.PutUint32(b[72:], uint32(s.SPI))
	b[76] = byte(s.Proto)
	copy(b[80:], s.Src.AsSlice())
	unlimited(b[96:])
	put64(b[176:], s.AddTime)
	put32(b[208:], uint32(s.Reqid))
	put16(b[212:], uint16(s.Family))
	b[214], b[216] = byte(s.Mode), s.Flags
	return b
}

// wireAlgorithm writes a struct xfrm_algo, or with icv one of its longer kin.
func wireAlgorithm(typ uint16, a Algorithm, key []byte, icv bool) []byte {
	b := make([]byte, 68, 72+len(key))
	copy(b, a.Name)
	put32(b[64:], uint32(8*len(key)))
	if icv {
		b = b[:72]
		put32(b[68:], uint32(a.ICVBits))
	}
	return wireAttr(typ, append(b, key...))
}

// saKeys are the key bytes for a request; nil leaves all empty.
type saKeys struct{ enc, auth, aead []byte }

func wireSAAttrs(s *SA, keys saKeys) []byte {
	var b []byte
	if s.AEAD.Name != "" {
		b = append(b, wireAlgorithm(attrAlgAEAD, s.AEAD, keys.aead, true)...)
	}
	if s.Auth.Name != "" {
		b = append(b, wireAlgorithm(attrAlgAuth, s.Auth, keys.auth, false)...)
		if s.Auth.ICVBits != 0 {
			b = append(b, wireAlgorithm(attrAlgAuthTrunc, s.Auth, keys.auth, true)...)
		}
	}
	if s.Enc.Name != "" {
		b = append(b, wireAlgorithm(attrAlgCrypt, s.Enc, keys.enc, false)...)
	}
	if s.Comp.Name != "" {
		b = append(b, wireAlgorithm(attrAlgComp, s.Comp, nil, false)...)
	}
	if s.Encap != (Encap{}) {
		e := make([]byte, 24)
		put16(e, s.Encap.Type)
		binary.BigEndian.PutUint16(e[2:], s.Encap.Sport)
		binary.BigEndian.PutUint16(e[4:], s.Encap.Dport)
		b = append(b, wireAttr(attrEncap, e)...)
	}
	if s.Mark != (Mark{}) {
		b = append(b, wireMark(s.Mark)...)
	}
	if s.OutputMark != (Mark{}) {
		b = append(b, wireU32(attrSetMark, s.OutputMark.Value)...)
		b = append(b, wireU32(attrSetMarkMask, s.OutputMark.Mask)...)
	}
	if s.IfID != 0 {
		b = append(b, wireU32(attrIfID, s.IfID)...)
	}
	if s.ExtraFlags != 0 {
		b = append(b, wireU32(attrExtraFlags, s.ExtraFlags)...)
	}
	if s.OffloadDev != 0 {
		b = append(b, wireOffload(s.OffloadDev, s.OffloadFlags)...)
	}
	if s.SADir != 0 {
		b = append(b, wireAttr(attrSADir, []byte{s.SADir})...)
	}
	if s.CPU != 0 {
		b = append(b, wireU32(attrSAPCPU, s.CPU-1)...)
	}
	return b
}

func wireSA(s *SA, keys saKeys) []byte { return append(wireSAInfo(s), wireSAAttrs(s, keys)...) }

func wireSAID(k SAKey) []byte {
	b := make([]byte, sizeSAID)
	copy(b, k.Dst.AsSlice())
	binary.BigEndian.PutUint32(b[16:], uint32(k.SPI))
	put16(b[20:], uint16(familyOf(k.Dst)))
	b[22] = byte(k.Proto)
	if k.Mark != (Mark{}) {
		b = append(b, wireMark(k.Mark)...)
	}
	return b
}

// wireDelSA is the kernel's notification.
func wireDelSA(s *SA) []byte {
	b := wireSAID(SAKey{Dst: s.Dst, SPI: s.SPI, Proto: s.Proto})
	b = append(b, wireAttr(6 /* XFRMA_SA */, wireSAInfo(s))...)
	return append(b, wireSAAttrs(s, saKeys{})...)
}

func wireExpire(s *SA, hard bool) []byte {
	b := append(wireSAInfo(s), make([]byte, 8)...)
	if hard {
		b[sizeSAInfo] = 1
	}
	if s.Mark != (Mark{}) {
		b = append(b, wireMark(s.Mark)...)
	}
	return b
}

func familyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// keyed fills in what is derived from the other fields.
func (s *SA) keyed() *SA {
	s.Key = SAKey{Dst: s.Dst, SPI: s.SPI, Proto: s.Proto, Mark: s.Mark}
	return s
}

// anySelector is the selector that matches all flows of a family.
func anySelector(f Family) Selector {
	a := netip.IPv4Unspecified()
	if f == IPv6 {
		a = netip.IPv6Unspecified()
	}
	p := netip.PrefixFrom(a, 0)
	return Selector{Family: f, Src: p, Dst: p}
}

// selector parses two prefixes.
func selector(src, dst string) Selector {
	s, d := netip.MustParsePrefix(src), netip.MustParsePrefix(dst)
	return Selector{Family: familyOf(d.Addr()), Src: s, Dst: d}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addr4(a, b, c, d byte) netip.Addr { return netip.AddrFrom4([4]byte{a, b, c, d}) }

func addr6(net, host byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 7: net, 15: host})
}
