// Package l2tp knows the kernel's L2TP sessions that carry Ethernet: which device is which
// session, and how its packets leave. The devices themselves (l2tpeth0 …) say nothing of it in
// their link messages.
//
// Decoding is pure; kernel I/O lives in watch_linux.go.
package l2tp

import (
	"cmp"
	"encoding/binary"
	"errors"
	"net/netip"
)

// Session is one Ethernet session of a tunnel. It is comparable.
type Session struct {
	// Ifname is the name of the device when it was made: the kernel does not follow a rename.
	Ifname string
	// Tunnel and ID are the local tunnel and session ids.
	Tunnel, ID uint32
	// UDP says that the tunnel goes over UDP, else directly over IP (protocol 115).
	UDP bool
	// Local and Remote are the outer addresses. Local is invalid where the route chooses it.
	Local, Remote netip.Addr
	// Sport and Dport are the UDP ports, 0 over IP.
	Sport, Dport uint16
	// Header is what the session adds to an inner packet in bytes, the outer IP header and the
	// inner Ethernet header included. The kernel does not show whether there is an L2-specific
	// sublayer (l2spec_type); it is counted, as it is there by default.
	Header int
}

// Compare orders sessions by tunnel and session id.
func (s Session) Compare(o Session) int {
	return cmp.Or(cmp.Compare(s.Tunnel, o.Tunnel), cmp.Compare(s.ID, o.ID))
}

// Event is what a Watcher found.
type Event interface{ l2tpEvent() }

type (
	// Lost says that the sessions could not be read: what is known is stale until the next SessionsSet.
	Lost struct{ Err error }
	// SessionsSet is the complete list of Ethernet sessions, in order.
	SessionsSet struct{ Sessions []Session }
)

func (Lost) l2tpEvent()        {}
func (SessionsSet) l2tpEvent() {}

// Attributes and values of the generic netlink family "l2tp" (linux/l2tp.h). Numbers are in the
// machine's byte order, addresses in the network's.
const (
	attrPWType       = 1
	attrEncapType    = 2
	attrProtoVersion = 7
	attrIfname       = 8
	attrConnID       = 9
	attrSessionID    = 11
	attrCookie       = 15
	attrSendSeq      = 19
	attrIPSaddr      = 24
	attrIPDaddr      = 25
	attrUDPSport     = 26
	attrUDPDport     = 27
	attrIP6Saddr     = 31
	attrIP6Daddr     = 32

	pwEther  = 5 // L2TP_PWTYPE_ETH
	encapUDP = 0 // L2TP_ENCAPTYPE_UDP

	attrTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// Lengths of headers in bytes.
const (
	ipv4HdrLen  = 20
	ipv6HdrLen  = 40
	udpHdrLen   = 8
	etherHdrLen = 14
)

var (
	errAttribute = errors.New("attribute is malformed")
	errMissing   = errors.New("attribute is missing")
)

// tunnel is what L2TP_CMD_TUNNEL_GET says.
type tunnel struct {
	id            uint32
	version       uint8
	udp           bool
	local, remote netip.Addr
	sport, dport  uint16
}

// decodeTunnel decodes the attributes of a tunnel. Without a socket it has no addresses.
func decodeTunnel(b []byte) (tunnel, error) {
	var t tunnel
	has := false
	err := each(b, func(typ uint16, v []byte) error {
		var err error
		switch typ {
		case attrConnID:
			t.id, err = u32(v)
			has = true
		case attrProtoVersion:
			t.version, err = u8(v)
		case attrEncapType:
			var e uint16
			e, err = u16(v)
			t.udp = e == encapUDP
		case attrUDPSport:
			t.sport, err = u16(v)
		case attrUDPDport:
			t.dport, err = u16(v)
		case attrIPSaddr, attrIP6Saddr:
			t.local, err = addr(v)
		case attrIPDaddr, attrIP6Daddr:
			t.remote, err = addr(v)
		}
		return err
	})
	if err == nil && !has {
		err = errMissing
	}
	if err != nil {
		return tunnel{}, err
	}
	return t, nil
}

// session is what L2TP_CMD_SESSION_GET says.
type session struct {
	tunnel, id uint32
	pwType     uint16
	ifname     string
	cookie     int // bytes
	sendSeq    bool
}

func decodeSession(b []byte) (session, error) {
	var s session
	has := 0
	err := each(b, func(typ uint16, v []byte) error {
		var err error
		switch typ {
		case attrConnID:
			s.tunnel, err = u32(v)
			has |= 1
		case attrSessionID:
			s.id, err = u32(v)
			has |= 2
		case attrPWType:
			s.pwType, err = u16(v)
		case attrIfname:
			s.ifname = text(v)
		case attrCookie:
			s.cookie = len(v)
		case attrSendSeq:
			var n uint8
			n, err = u8(v)
			s.sendSeq = n != 0
		}
		return err
	})
	if err == nil && has != 3 {
		err = errMissing
	}
	if err != nil {
		return session{}, err
	}
	return s, nil
}

// join makes the Session of an Ethernet session; ok is false for other pseudowires, which have no
// device that is known by name, and for a tunnel without addresses.
func join(t tunnel, s session) (Session, bool) {
	if s.pwType != pwEther || s.ifname == "" || !t.remote.IsValid() || t.remote.IsUnspecified() {
		return Session{}, false
	}
	out := Session{
		Ifname: s.ifname, Tunnel: t.id, ID: s.id, UDP: t.udp, Remote: t.remote,
		Header: headerLen(t, s) + etherHdrLen + ipv4HdrLen,
	}
	if t.remote.Is6() {
		out.Header += ipv6HdrLen - ipv4HdrLen
	}
	if !t.local.IsUnspecified() {
		out.Local = t.local
	}
	if t.udp {
		out.Header += udpHdrLen
		out.Sport, out.Dport = t.sport, t.dport
	}
	return out, true
}

// headerLen is the length of L2TP's own header (l2tp_session_set_header_len,
// net/l2tp/l2tp_core.c), with the L2-specific sublayer of version 3.
func headerLen(t tunnel, s session) int {
	if t.version == 2 {
		n := 6
		if s.sendSeq {
			n += 4
		}
		return n
	}
	n := 4 + s.cookie + 4
	if t.udp {
		n += 4
	}
	return n
}

// each calls f for each attribute.
func each(b []byte, f func(typ uint16, v []byte) error) error {
	for len(b) > 0 {
		if len(b) < 4 {
			return errAttribute
		}
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return errAttribute
		}
		if err := f(binary.NativeEndian.Uint16(b[2:])&attrTypeMask, b[4:n:n]); err != nil {
			return err
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

func u8(v []byte) (uint8, error) {
	if len(v) < 1 {
		return 0, errAttribute
	}
	return v[0], nil
}

func u16(v []byte) (uint16, error) {
	if len(v) < 2 {
		return 0, errAttribute
	}
	return binary.NativeEndian.Uint16(v), nil
}

func u32(v []byte) (uint32, error) {
	if len(v) < 4 {
		return 0, errAttribute
	}
	return binary.NativeEndian.Uint32(v), nil
}

func addr(v []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(v)
	if !ok {
		return netip.Addr{}, errAttribute
	}
	return a, nil
}

func text(v []byte) string {
	for i, c := range v {
		if c == 0 {
			return string(v[:i])
		}
	}
	return string(v)
}
