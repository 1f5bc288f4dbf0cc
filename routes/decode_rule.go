package routes

import "encoding/binary"

// Attributes and flags of rules (linux/fib_rules.h; those from fraDSCP on are newer than the
// headers of Debian 12).
const (
	fraDst               = 1
	fraSrc               = 2
	fraIifname           = 3
	fraGoto              = 4
	fraPriority          = 6
	fraFwmark            = 10
	fraFlow              = 11
	fraTunID             = 12
	fraSuppressIfgroup   = 13
	fraSuppressPrefixlen = 14
	fraTable             = 15
	fraFwmask            = 16
	fraOifname           = 17
	fraPad               = 18
	fraL3mdev            = 19
	fraUIDRange          = 20
	fraProtocol          = 21
	fraIPProto           = 22
	fraSportRange        = 23
	fraDportRange        = 24
	fraDSCP              = 25
	fraFlowlabel         = 26
	fraFlowlabelMask     = 27
	fraSportMask         = 28
	fraDportMask         = 29
	fraDSCPMask          = 30

	fibRuleInvert    = 0x2
	fibRuleFindSaddr = 0x10000

	fibRuleHdrLen = 12
)

// decodeRule decodes a struct fib_rule_hdr and its attributes, nil for another family's rule
// (multicast routing has its own). An attribute that is not known, and a mask or flag that a
// Rule can't express, set Unknown. FRA_FLOW (realms) marks packets and decides nothing.
func decodeRule(data []byte) (*Rule, error) {
	if len(data) < fibRuleHdrLen {
		return nil, errShort
	}
	if !knownFamily(data[0]) {
		return nil, nil
	}
	flags := binary.NativeEndian.Uint32(data[8:])
	r := &Rule{
		Family:            Family(data[0]),
		TOS:               data[3],
		Table:             TableID(data[4]),
		Action:            data[7],
		Invert:            flags&fibRuleInvert != 0,
		SuppressPrefixLen: -1,
		SuppressIfgroup:   -1,
		// Only IPv6 looks for a source address of its own (net/ipv6/fib6_rules.c).
		Unknown: flags&fibRuleFindSaddr != 0 && Family(data[0]) == IPv6,
	}
	var dst, src []byte
	mark, mask := false, false
	a := attrs{b: data[fibRuleHdrLen:]}
	for a.next() {
		switch a.typ {
		case fraDst:
			dst = a.val
		case fraSrc:
			src = a.val
		case fraIifname:
			r.Iif = a.str()
		case fraOifname:
			r.Oif = a.str()
		case fraGoto:
			r.Goto = a.u32()
		case fraPriority:
			r.Priority = a.u32()
		case fraFwmark:
			r.Mark, mark = a.u32(), true
		case fraFwmask:
			r.Mask, mask = a.u32(), true
		case fraTunID:
			r.TunID = a.be64()
		case fraSuppressIfgroup:
			r.SuppressIfgroup = int32(a.u32())
		case fraSuppressPrefixlen:
			r.SuppressPrefixLen = int32(a.u32())
		case fraTable:
			r.Table = TableID(a.u32())
		case fraL3mdev:
			r.L3mdev = a.u8() != 0
		case fraUIDRange:
			if len(a.val) < 8 {
				a.err = errAttribute
				break
			}
			r.HasUID = true
			r.UIDLo, r.UIDHi = binary.NativeEndian.Uint32(a.val), binary.NativeEndian.Uint32(a.val[4:])
		case fraProtocol:
			r.Protocol = Protocol(a.u8())
		case fraIPProto:
			r.IPProto = a.u8()
		case fraSportRange:
			r.Sport = a.portRange()
		case fraDportRange:
			r.Dport = a.portRange()
		case fraDSCP:
			r.DSCP = a.u8() + 1
		case fraDSCPMask:
			r.Unknown = r.Unknown || a.u8() != 0x3f
		case fraSportMask, fraDportMask:
			r.Unknown = r.Unknown || a.u16() != 0xffff
		case fraFlow, fraPad:
		default:
			r.Unknown = true
		}
	}
	if mark && !mask {
		r.Mask = 0xffffffff
	}
	var err error
	if a.err == nil && (len(dst) > 0 || data[1] > 0) {
		r.Dst, err = prefixOf(r.Family, dst, data[1])
	}
	if a.err == nil && err == nil && (len(src) > 0 || data[2] > 0) {
		r.Src, err = prefixOf(r.Family, src, data[2])
	}
	if a.err != nil {
		err = a.err
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// portRange is a struct fib_rule_port_range.
func (a *attrs) portRange() PortRange {
	if len(a.val) < 4 {
		a.err = errAttribute
		return PortRange{}
	}
	return PortRange{Lo: binary.NativeEndian.Uint16(a.val), Hi: binary.NativeEndian.Uint16(a.val[2:])}
}

// Attributes of nexthop objects (linux/nexthop.h).
const (
	nhaID        = 1
	nhaGroup     = 2
	nhaGroupType = 3
	nhaBlackhole = 4
	nhaOif       = 5
	nhaGateway   = 6
	nhaEncap     = 8
	nhaFDB       = 11

	nhmsgLen = 8

	nexthopGroupRes = 1 // NEXTHOP_GRP_TYPE_RES
)

// decodeNexthop decodes a struct nhmsg and its attributes. The family of a group or a blackhole
// may be AF_UNSPEC; that of a gateway follows from its length.
func decodeNexthop(data []byte) (*NexthopObject, error) {
	if len(data) < nhmsgLen {
		return nil, errShort
	}
	n := &NexthopObject{
		Family:   Family(data[0]),
		Protocol: Protocol(data[2]),
		Flags:    binary.NativeEndian.Uint32(data[4:]),
	}
	a := attrs{b: data[nhmsgLen:]}
	for a.next() {
		switch a.typ {
		case nhaID:
			n.ID = a.u32()
		case nhaGroup:
			// Members are struct nexthop_grp: id, weight, the upper byte of a wider weight (Linux
			// 6.12; 0 before) and padding.
			if len(a.val)%8 != 0 {
				a.err = errAttribute
				break
			}
			for b := a.val; len(b) > 0; b = b[8:] {
				n.Group = append(n.Group, GroupMember{ID: binary.NativeEndian.Uint32(b), Weight: uint16(b[4]) | uint16(b[5])<<8})
			}
		case nhaGroupType:
			n.Resilient = a.u16() == nexthopGroupRes
		case nhaBlackhole:
			n.Blackhole = true
		case nhaFDB:
			n.FDB = true
		case nhaOif:
			n.Oif = Ifindex(a.u32())
		case nhaGateway:
			n.Gateway = a.anyAddr()
		case nhaEncap:
			n.Encap = true
		}
	}
	if a.err == nil && n.ID == 0 {
		a.err = errAttribute
	}
	if a.err != nil {
		return nil, a.err
	}
	return n, nil
}
