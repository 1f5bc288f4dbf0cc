package routes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// errRule is the error for a rule that can't be written.
var errRule = errors.New("the rule can't be expressed")

// EncodeRule is the payload of an RTM_NEWRULE or RTM_DELRULE message (struct fib_rule_hdr and
// FRA_* attributes). A rule with Unknown set is refused. vishvananda/netlink v1.3.1 knows
// neither l3mdev nor DSCP rules, so rules are encoded here.
func EncodeRule(r Rule) ([]byte, error) {
	if r.Unknown || (r.Family != IPv4 && r.Family != IPv6) {
		return nil, fmt.Errorf("routes: encode rule %d: %w", r.Priority, errRule)
	}
	for _, p := range []netip.Prefix{r.Src, r.Dst} {
		if p.IsValid() && FamilyOf(p.Addr()) != r.Family {
			return nil, fmt.Errorf("routes: encode rule %d: %s: %w", r.Priority, p, errAddress)
		}
	}
	b := make([]byte, fibRuleHdrLen, 128)
	b[0], b[3], b[7] = byte(r.Family), r.TOS, r.Action
	if r.Invert {
		binary.NativeEndian.PutUint32(b[8:], fibRuleInvert)
	}
	b = appendU32(b, fraPriority, r.Priority)
	if r.Dst.IsValid() {
		b[1] = byte(r.Dst.Bits())
		b = appendAttr(b, fraDst, r.Dst.Masked().Addr().AsSlice())
	}
	if r.Src.IsValid() {
		b[2] = byte(r.Src.Bits())
		b = appendAttr(b, fraSrc, r.Src.Masked().Addr().AsSlice())
	}
	if r.Table != 0 {
		b = appendU32(b, fraTable, uint32(r.Table))
		if r.Table < 256 {
			b[4] = byte(r.Table)
		}
	}
	if r.Action == RuleGoto {
		b = appendU32(b, fraGoto, r.Goto)
	}
	if r.Iif != "" {
		b = appendAttr(b, fraIifname, append([]byte(r.Iif), 0))
	}
	if r.Oif != "" {
		b = appendAttr(b, fraOifname, append([]byte(r.Oif), 0))
	}
	if r.Mark != 0 || r.Mask != 0 {
		b = appendU32(b, fraFwmark, r.Mark)
		b = appendU32(b, fraFwmask, r.Mask)
	}
	if r.IPProto != 0 {
		b = appendAttr(b, fraIPProto, []byte{r.IPProto})
	}
	if !r.Sport.Any() {
		b = r.Sport.append(b, fraSportRange)
	}
	if !r.Dport.Any() {
		b = r.Dport.append(b, fraDportRange)
	}
	if r.HasUID {
		v := binary.NativeEndian.AppendUint32(nil, r.UIDLo)
		b = appendAttr(b, fraUIDRange, binary.NativeEndian.AppendUint32(v, r.UIDHi))
	}
	if r.L3mdev {
		b = appendAttr(b, fraL3mdev, []byte{1})
	}
	if r.DSCP != 0 {
		b = appendAttr(b, fraDSCP, []byte{r.DSCP - 1})
	}
	if r.TunID != 0 {
		b = appendAttr(b, fraTunID, binary.BigEndian.AppendUint64(nil, r.TunID))
	}
	if r.Action == RuleToTable {
		if r.SuppressPrefixLen >= 0 {
			b = appendU32(b, fraSuppressPrefixlen, uint32(r.SuppressPrefixLen))
		}
		if r.SuppressIfgroup >= 0 {
			b = appendU32(b, fraSuppressIfgroup, uint32(r.SuppressIfgroup))
		}
	}
	if r.Protocol != 0 {
		b = appendAttr(b, fraProtocol, []byte{byte(r.Protocol)})
	}
	return b, nil
}

// append writes a struct fib_rule_port_range.
func (p PortRange) append(b []byte, typ uint16) []byte {
	v := binary.NativeEndian.AppendUint16(nil, p.Lo)
	return appendAttr(b, typ, binary.NativeEndian.AppendUint16(v, p.Hi))
}
