package xfrmwatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Message types (XFRM_MSG_*, linux/xfrm.h).
const (
	msgNewSA       = 0x10
	msgDelSA       = 0x11
	msgGetSA       = 0x12
	msgNewPolicy   = 0x13
	msgDelPolicy   = 0x14
	msgGetPolicy   = 0x15
	msgAllocSPI    = 0x16
	msgAcquire     = 0x17
	msgExpire      = 0x18
	msgUpdPolicy   = 0x19
	msgUpdSA       = 0x1a
	msgPolExpire   = 0x1b
	msgFlushSA     = 0x1c
	msgFlushPolicy = 0x1d
	msgNewAE       = 0x1e
	msgGetAE       = 0x1f
	msgReport      = 0x20
	msgMigrate     = 0x21
	msgNewSADInfo  = 0x22
	msgNewSPDInfo  = 0x24
	msgMapping     = 0x26
	msgGetDefault  = 0x28
)

// Attribute types (XFRMA_*, linux/xfrm.h).
const (
	attrAlgAuth      = 1
	attrAlgCrypt     = 2
	attrAlgComp      = 3
	attrEncap        = 4
	attrTmpl         = 5
	attrPolicy       = 7
	attrPolicyType   = 16
	attrAlgAEAD      = 18
	attrAlgAuthTrunc = 20
	attrMark         = 21
	attrExtraFlags   = 24
	attrOffloadDev   = 28
	attrSetMark      = 29
	attrSetMarkMask  = 30
	attrIfID         = 31
	attrSADir        = 33
	attrSAPCPU       = 35 // Linux 6.13

	attrTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// Sizes of the fixed structures, which are the same on all 64-bit architectures.
const (
	sizeSelector   = 56  // struct xfrm_selector
	sizeSAInfo     = 224 // struct xfrm_usersa_info
	sizeSAID       = 24  // struct xfrm_usersa_id
	sizePolicyInfo = 168 // struct xfrm_userpolicy_info
	sizePolicyID   = 64  // struct xfrm_userpolicy_id
	sizeTemplate   = 64  // struct xfrm_user_tmpl
	maxTemplates   = 6   // XFRM_MAX_DEPTH
)

var (
	errShort   = errors.New("message is too short")
	errAlien   = errors.New("unknown message type")
	errInvalid = errors.New("invalid value")
)

// Decode turns one netlink message of the XFRM family into an event. typ is the type in its
// header, data what follows the header. ev is nil for messages that change nothing here
// (acquires, replay counters, soft expiry of a policy). resync is true where the message does
// not say enough, so that all must be dumped again: a flush names nothing that it removed, and a
// migration moves SAs without telling the new ones.
//
// A short or alien message is an error. Of an algorithm only its name and lengths are read;
// nothing that Decode returns shares memory with data.
func Decode(typ uint16, data []byte) (ev Event, resync bool, err error) {
	name := "message"
	switch typ {
	case msgNewPolicy, msgUpdPolicy:
		name = "policy"
		var p *Policy
		if p, err = decodePolicy(data, sizePolicyInfo); err == nil {
			ev = PolicySet{Policy: p}
		}
	case msgDelPolicy:
		name = "delpolicy"
		ev, resync, err = decodeDelPolicy(data)
	case msgPolExpire:
		name = "polexpire"
		ev, err = decodePolExpire(data)
	case msgNewSA, msgUpdSA:
		name = "sa"
		var sa *SA
		if sa, err = decodeSA(data, sizeSAInfo); err == nil {
			ev = SASet{SA: sa, Update: typ == msgUpdSA}
		}
	case msgDelSA:
		name = "delsa"
		ev, err = decodeDelSA(data)
	case msgExpire:
		name = "expire"
		ev, err = decodeExpire(data)
	case msgGetDefault:
		name = "default"
		ev, err = decodeDefault(data)
	case msgFlushSA, msgFlushPolicy, msgMigrate, msgMapping:
		// The kernel does not change the SA at a MAPPING, it tells the key manager, who does.
		// A dump right after is cheap and finds either.
		resync = true
	case msgAcquire, msgAllocSPI, msgNewAE, msgGetAE, msgReport, msgNewSADInfo, msgNewSPDInfo:
	default:
		err = fmt.Errorf("%w %#x", errAlien, typ)
	}
	if err != nil {
		return nil, false, fmt.Errorf("xfrmwatch: decode %s: %w", name, err)
	}
	return ev, resync, nil
}

// attributes calls f for each attribute in data, with the flag bits of the type masked.
func attributes(data []byte, f func(typ uint16, value []byte) error) error {
	for len(data) > 0 {
		if len(data) < 4 {
			return errShort
		}
		n := int(binary.NativeEndian.Uint16(data))
		if n < 4 || n > len(data) {
			return errShort
		}
		typ := binary.NativeEndian.Uint16(data[2:]) & attrTypeMask
		if err := f(typ, data[4:n]); err != nil {
			return fmt.Errorf("attribute %d: %w", typ, err)
		}
		data = data[min((n+3)&^3, len(data)):]
	}
	return nil
}

func u32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }

// address reads an xfrm_address_t.
func address(b []byte, f Family) (netip.Addr, error) {
	switch f {
	case IPv4:
		return netip.AddrFrom4([4]byte(b[:4])), nil
	case IPv6:
		return netip.AddrFrom16([16]byte(b[:16])), nil
	}
	return netip.Addr{}, fmt.Errorf("%w: address family %d", errInvalid, f)
}

// decodeSelector reads a struct xfrm_selector; b has its size. Ports are big endian.
func decodeSelector(b []byte) (Selector, error) {
	s := Selector{
		Family:  Family(binary.NativeEndian.Uint16(b[40:])),
		Proto:   Proto(b[44]),
		Dport:   PortMatch{binary.BigEndian.Uint16(b[32:]), binary.BigEndian.Uint16(b[34:])},
		Sport:   PortMatch{binary.BigEndian.Uint16(b[36:]), binary.BigEndian.Uint16(b[38:])},
		Ifindex: int32(u32(b[48:])),
	}
	dst, err := address(b, s.Family)
	if err != nil {
		return s, err
	}
	src, err := address(b[16:], s.Family)
	if err != nil {
		return s, err
	}
	if s.Dst, err = dst.Prefix(int(b[42])); err == nil {
		s.Src, err = src.Prefix(int(b[43]))
	}
	if err != nil {
		return s, fmt.Errorf("%w: prefix lengths %d and %d", errInvalid, b[42], b[43])
	}
	return s, nil
}

// decodePolicy reads a struct xfrm_userpolicy_info at the start of data; the attributes begin at
// offset attrs.
func decodePolicy(data []byte, attrs int) (*Policy, error) {
	if len(data) < attrs {
		return nil, errShort
	}
	p := new(Policy)
	if err := p.readInfo(data[:sizePolicyInfo]); err != nil {
		return nil, err
	}
	if err := attributes(data[attrs:], p.readAttribute); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Policy) readInfo(b []byte) (err error) {
	if p.Selector, err = decodeSelector(b[:sizeSelector]); err != nil {
		return err
	}
	p.Priority = u32(b[152:])
	p.Index = PolicyIndex(u32(b[156:]))
	p.Dir, p.Action, p.Flags = Dir(b[160]), Action(b[161]), b[162]
	return nil
}

func (p *Policy) readAttribute(typ uint16, v []byte) (err error) {
	switch typ {
	case attrTmpl:
		p.Templates, err = decodeTemplates(v, p.Selector.Family)
	case attrPolicyType:
		if len(v) < 1 {
			return errShort
		}
		p.Sub = v[0] == 1 // XFRM_POLICY_TYPE_SUB
	case attrMark:
		p.Mark, err = decodeMark(v)
	case attrIfID:
		p.IfID, err = decodeU32(v)
	case attrOffloadDev:
		p.OffloadDev, p.OffloadFlag, err = decodeOffload(v)
	}
	return err
}

func decodeTemplates(b []byte, family Family) ([]Template, error) {
	if len(b)%sizeTemplate != 0 || len(b) > maxTemplates*sizeTemplate {
		return nil, errShort
	}
	var templates []Template
	if len(b) > 0 {
		templates = make([]Template, 0, len(b)/sizeTemplate)
	}
	for ; len(b) > 0; b = b[sizeTemplate:] {
		t := Template{
			SPI:      SPI(binary.BigEndian.Uint32(b[16:])),
			Proto:    Proto(b[20]),
			Family:   Family(binary.NativeEndian.Uint16(b[24:])),
			Reqid:    Reqid(u32(b[44:])),
			Mode:     Mode(b[48]),
			Optional: b[50] != 0,
		}
		if t.Family == 0 { // as validate_tmpl reads it (net/xfrm/xfrm_user.c)
			t.Family = family
		}
		var err error
		if t.Dst, err = address(b, t.Family); err == nil {
			t.Src, err = address(b[28:], t.Family)
		}
		if err != nil {
			return nil, err
		}
		templates = append(templates, t)
	}
	return templates, nil
}

// decodeDelPolicy reads a struct xfrm_userpolicy_id. The policy as it was follows in an
// attribute; its index is there even where the policy was named by its selector.
func decodeDelPolicy(data []byte) (ev Event, resync bool, err error) {
	if len(data) < sizePolicyID {
		return nil, false, errShort
	}
	index := PolicyIndex(u32(data[56:]))
	err = attributes(data[sizePolicyID:], func(typ uint16, v []byte) error {
		if typ != attrPolicy {
			return nil
		}
		if len(v) < sizePolicyInfo {
			return errShort
		}
		index = PolicyIndex(u32(v[156:]))
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	if index == 0 {
		return nil, true, nil
	}
	return PolicyGone{index}, false, nil
}

// decodePolExpire reads a struct xfrm_user_polexpire. A soft expiry changes nothing.
func decodePolExpire(data []byte) (Event, error) {
	const size = sizePolicyInfo + 8
	p, err := decodePolicy(data, size)
	if err != nil {
		return nil, err
	}
	if hard := data[sizePolicyInfo] != 0; !hard {
		return nil, nil
	}
	return PolicyGone{p.Index}, nil
}

// decodeDefault reads a struct xfrm_userpolicy_default: in, forward, out.
func decodeDefault(data []byte) (Event, error) {
	if len(data) < 3 {
		return nil, errShort
	}
	action := func(v byte) Action {
		if v == 1 { // XFRM_USERPOLICY_BLOCK
			return Block
		}
		return Allow
	}
	return DefaultSet{Default{In: action(data[0]), Forward: action(data[1]), Out: action(data[2])}}, nil
}

func decodeMark(b []byte) (Mark, error) {
	if len(b) < 8 {
		return Mark{}, errShort
	}
	return Mark{Value: u32(b), Mask: u32(b[4:])}, nil
}

func decodeU32(b []byte) (uint32, error) {
	if len(b) < 4 {
		return 0, errShort
	}
	return u32(b), nil
}

// decodeOffload reads a struct xfrm_user_offload.
func decodeOffload(b []byte) (dev int32, flags uint8, err error) {
	if len(b) < 5 {
		return 0, 0, errShort
	}
	return int32(u32(b)), b[4], nil
}
