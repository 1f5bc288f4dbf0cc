package routes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Decoding of rtnetlink messages. It is pure: bytes in, values out, and a message that is cut
// short or makes no sense is an error, never a panic. The layouts are those of
// linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/fib_rules.h and linux/nexthop.h;
// numbers are in the machine's byte order unless the header says otherwise.

// Message types (RTM_*, linux/rtnetlink.h).
const (
	rtmNewLink    = 16
	rtmDelLink    = 17
	rtmGetLink    = 18
	rtmNewAddr    = 20
	rtmDelAddr    = 21
	rtmGetAddr    = 22
	rtmNewRoute   = 24
	rtmDelRoute   = 25
	rtmGetRoute   = 26
	rtmNewRule    = 32
	rtmDelRule    = 33
	rtmGetRule    = 34
	rtmNewNexthop = 104
	rtmDelNexthop = 105
	rtmGetNexthop = 106
)

// Flags of a notification that say how a route came (linux/netlink.h).
const (
	nlmReplace = 0x100
	nlmAppend  = 0x800
)

var (
	errShort     = errors.New("message is cut short")
	errAttribute = errors.New("attribute is malformed")
	errAddress   = errors.New("address has the wrong length")
	errPrefixLen = errors.New("prefix length is out of range")
)

// Header is what a netlink message header says about the message after it (struct nlmsghdr).
type Header struct {
	Type  uint16 // RTM_*
	Flags uint16 // NLM_F_*
	Seq   uint32
	Port  uint32 // the netlink port of the process whose request caused a notification
}

// A Decoder turns rtnetlink messages into events. It shares route bodies through its
// Interner. The zero value is ready; it is not safe for concurrent use.
type Decoder struct {
	Interner Interner
}

// Decode decodes the payload of one message. The event is nil, with a nil error, for a message
// that says nothing about routing: another family's, a bridge port's link message, a wireless
// event, a cached route. Nothing of data is kept.
func (d *Decoder) Decode(h Header, data []byte) (Event, error) {
	ev, err := d.decode(h, data)
	if err != nil {
		return nil, fmt.Errorf("routes: decode message type %d: %w", h.Type, err)
	}
	return ev, nil
}

func (d *Decoder) decode(h Header, data []byte) (Event, error) {
	switch h.Type {
	case rtmNewRoute, rtmDelRoute:
		r, ok, err := d.Interner.route(data)
		if err != nil || !ok {
			return nil, err
		}
		origin := Origin{Port: h.Port, Seq: h.Seq}
		if h.Type == rtmDelRoute {
			return RouteGone{Route: r, Origin: origin}, nil
		}
		return RouteSet{Route: r, Replace: h.Flags&nlmReplace != 0, Append: h.Flags&nlmAppend != 0, Origin: origin}, nil
	case rtmNewLink, rtmDelLink:
		l, event, err := decodeLinkEvent(data)
		if err != nil || l == nil {
			return nil, err
		}
		if h.Type == rtmDelLink {
			to, err := decodePlace(data)
			return LinkGone{Index: l.Index, Link: l, To: to}, err
		}
		return LinkSet{Link: l, Features: event == eventFeatures}, nil
	case rtmNewAddr, rtmDelAddr:
		a, ok, err := decodeAddr(data)
		if err != nil || !ok {
			return nil, err
		}
		if h.Type == rtmDelAddr {
			return AddrGone{Addr: a}, nil
		}
		return AddrSet{Addr: a}, nil
	case rtmNewRule, rtmDelRule:
		r, err := decodeRule(data)
		if err != nil || r == nil {
			return nil, err
		}
		if h.Type == rtmDelRule {
			return RuleGone{Rule: r}, nil
		}
		return RuleSet{Rule: r}, nil
	case rtmNewNexthop, rtmDelNexthop:
		n, err := decodeNexthop(data)
		if err != nil {
			return nil, err
		}
		if h.Type == rtmDelNexthop {
			return NexthopGone{ID: n.ID}, nil
		}
		return NexthopSet{Nexthop: n}, nil
	}
	return nil, nil
}

// attrs walks the netlink attributes in b (struct nlattr: length and type of 16 bits each, then
// the value, padded to four bytes).
type attrs struct {
	b   []byte
	typ uint16 // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
	val []byte
	raw []byte // the whole attribute without the padding after it
	err error
}

// attrTypeMask leaves out NLA_F_NESTED and NLA_F_NET_BYTEORDER (linux/netlink.h).
const attrTypeMask = 0x3fff

func (a *attrs) next() bool {
	if len(a.b) == 0 || a.err != nil {
		return false
	}
	if len(a.b) < 4 {
		a.err = errAttribute
		return false
	}
	n := int(binary.NativeEndian.Uint16(a.b))
	if n < 4 || n > len(a.b) {
		a.err = errAttribute
		return false
	}
	a.typ = binary.NativeEndian.Uint16(a.b[2:]) & attrTypeMask
	a.val, a.raw = a.b[4:n:n], a.b[:n:n]
	a.b = a.b[min(align4(n), len(a.b)):]
	return true
}

func (a *attrs) u8() uint8 {
	if len(a.val) < 1 {
		a.err = errAttribute
		return 0
	}
	return a.val[0]
}

func (a *attrs) u16() uint16 {
	if len(a.val) < 2 {
		a.err = errAttribute
		return 0
	}
	return binary.NativeEndian.Uint16(a.val)
}

func (a *attrs) u32() uint32 {
	if len(a.val) < 4 {
		a.err = errAttribute
		return 0
	}
	return binary.NativeEndian.Uint32(a.val)
}

func (a *attrs) be64() uint64 {
	if len(a.val) < 8 {
		a.err = errAttribute
		return 0
	}
	return binary.BigEndian.Uint64(a.val)
}

// str is a string attribute; the kernel ends most of them with a NUL byte.
func (a *attrs) str() string {
	for i, c := range a.val {
		if c == 0 {
			return string(a.val[:i])
		}
	}
	return string(a.val)
}

func (a *attrs) addr(f Family) netip.Addr {
	ip, err := addrOf(f, a.val)
	if err != nil {
		a.err = err
	}
	return ip
}

func align4(n int) int { return (n + 3) &^ 3 }

func addrOf(f Family, b []byte) (netip.Addr, error) {
	switch {
	case f == IPv4 && len(b) == 4:
		return netip.AddrFrom4([4]byte(b)), nil
	case f == IPv6 && len(b) == 16:
		return netip.AddrFrom16([16]byte(b)), nil
	}
	return netip.Addr{}, errAddress
}

// prefixOf is a masked prefix; without an address it is the family's default prefix, which the
// kernel sends without an attribute.
func prefixOf(f Family, b []byte, bits uint8) (netip.Prefix, error) {
	if int(bits) > f.Bits() {
		return netip.Prefix{}, errPrefixLen
	}
	if len(b) == 0 && bits == 0 {
		return f.Any(), nil
	}
	ip, err := addrOf(f, b)
	if err != nil {
		return netip.Prefix{}, err
	}
	return ip.Prefix(int(bits))
}

func knownFamily(b byte) bool { return Family(b) == IPv4 || Family(b) == IPv6 }
