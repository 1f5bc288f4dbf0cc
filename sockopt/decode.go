package sockopt

import (
	"cmp"
	"encoding/binary"
	"errors"
	"iter"
	"net/netip"
	"slices"
)

// Layouts of linux/inet_diag.h. Ports and addresses are in network byte order, the rest in the
// machine's.
const (
	reqLen = 56 // struct inet_diag_req_v2
	msgLen = 72 // struct inet_diag_msg
	idLen  = 48 // struct inet_diag_sockid

	reqFamily   = 0
	reqProtocol = 1
	reqExt      = 2
	reqStates   = 4
	reqID       = 8

	msgFamily = 0
	msgState  = 1
	msgID     = 4

	idSport  = 0
	idDport  = 2
	idSrc    = 4
	idDst    = 20
	idIf     = 36
	idCookie = 40

	attrInfo   = 2  // INET_DIAG_INFO
	attrMark   = 15 // INET_DIAG_MARK
	attrMD5Sig = 18 // INET_DIAG_MD5SIG

	attrTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// struct tcp_diag_md5sig: family, prefix length, length of the key, address, and 80 bytes of key
// (TCP_MD5SIG_MAXKEYLEN), which nothing here looks at.
const (
	md5Len       = 100
	md5Family    = 0
	md5PrefixLen = 1
	md5KeyLen    = 2
	md5Addr      = 4
	md5Key       = 20
	maxKeyLen    = md5Len - md5Key
)

const (
	afInet  = 2
	afInet6 = 10
)

var (
	errShort     = errors.New("message is too short")
	errFamily    = errors.New("address family is unknown")
	errAttribute = errors.New("attribute is malformed")
	errKey       = errors.New("key record is malformed")
)

// sock is one socket of an answer. It holds no secret.
type sock struct {
	state         State
	local, remote netip.AddrPort // unmapped; the address of local is the zero value for any
	ifindex       int32
	cookie        uint64
	// trusted says that the kernel shows what it shows to CAP_NET_ADMIN alone: the mark, and with it
	// the keys.
	trusted bool
	kind    Kind           // of its keys, 0 for MD5
	peers   []netip.Prefix // of its keys
}

// decode reads one SOCK_DIAG_BY_FAMILY message into s, whose slice it uses again. Of a key it reads
// whom it is for: its bytes are stepped over. After an error s says nothing.
func (s *sock) decode(b []byte) error {
	*s = sock{peers: s.peers[:0]}
	if len(b) < msgLen {
		return errShort
	}
	id := b[msgID : msgID+idLen]
	family := b[msgFamily]
	src, ok := addr(family, id[idSrc:])
	if !ok {
		return errFamily
	}
	dst, _ := addr(family, id[idDst:])
	if src.IsUnspecified() {
		src = netip.Addr{}
	}
	s.state = State(b[msgState])
	s.local = netip.AddrPortFrom(src, binary.BigEndian.Uint16(id[idSport:]))
	s.remote = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(id[idDport:]))
	s.ifindex = int32(binary.NativeEndian.Uint32(id[idIf:]))
	s.cookie = binary.NativeEndian.Uint64(id[idCookie:])
	for b = b[msgLen:]; len(b) > 0; {
		if len(b) < 4 {
			return errAttribute
		}
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return errAttribute
		}
		switch binary.NativeEndian.Uint16(b[2:]) & attrTypeMask {
		case attrMark:
			s.trusted = true
		case attrMD5Sig:
			if err := s.decodeKeys(b[4:n]); err != nil {
				return err
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

// decodeKeys reads whom the keys of a socket are for. A length that is no whole number of records
// is that of more keys than the length of an attribute can count (16 bits: 655 keys).
func (s *sock) decodeKeys(b []byte) error {
	if len(b)%md5Len != 0 {
		return errKey
	}
	for ; len(b) > 0; b = b[md5Len:] {
		family, bits := b[md5Family], int(b[md5PrefixLen])
		if binary.NativeEndian.Uint16(b[md5KeyLen:]) > maxKeyLen {
			return errKey
		}
		a, ok := rawAddr(family, b[md5Addr:])
		if !ok {
			return errKey
		}
		if a.Is4In6() && bits >= 96 {
			a, bits = a.Unmap(), bits-96
		}
		p, err := a.Prefix(bits)
		if err != nil {
			return errKey
		}
		s.peers = append(s.peers, p)
	}
	return nil
}

// addr is an address of a socket, unmapped.
func addr(family byte, b []byte) (netip.Addr, bool) {
	a, ok := rawAddr(family, b)
	return a.Unmap(), ok
}

func rawAddr(family byte, b []byte) (netip.Addr, bool) {
	switch family {
	case afInet:
		return netip.AddrFrom4([4]byte(b)), true
	case afInet6:
		return netip.AddrFrom16([16]byte(b)), true
	}
	return netip.Addr{}, false
}

// collector makes the set of keys from the sockets of one look.
type collector struct {
	listening map[uint16]bool
	keys      map[Key]bool
	conns     []sock // those with keys
	sockets   int
}

func newCollector() *collector {
	return &collector{listening: map[uint16]bool{}, keys: map[Key]bool{}}
}

// add takes a socket; it may come twice.
func (c *collector) add(s *sock) {
	c.sockets++
	if s.state == Listen {
		c.listening[s.local.Port()] = true
		for _, p := range s.peers {
			c.keys[Key{Kind: cmp.Or(s.kind, MD5), Peer: p, Ifindex: s.ifindex, Local: s.local.Addr(), Port: s.local.Port(), Listener: true}] = true
		}
		return
	}
	// It signs only if a key is for its other end.
	if slices.ContainsFunc(s.peers, func(p netip.Prefix) bool { return p.Contains(s.remote.Addr()) }) {
		kept := *s
		kept.peers = nil
		c.conns = append(c.conns, kept)
	}
}

// set is the set of keys, in order. A connection whose local port is listened on was accepted
// there. One that says no more than a listener does is left out.
func (c *collector) set() []Key {
	listeners := map[uint16][]Key{}
	for k := range c.keys {
		listeners[k.Port] = append(listeners[k.Port], k)
	}
	for _, s := range c.conns {
		remote := s.remote.Addr()
		k := Key{Kind: cmp.Or(s.kind, MD5), Peer: netip.PrefixFrom(remote, remote.BitLen()), Ifindex: s.ifindex, Local: s.local.Addr()}
		if port := s.local.Port(); c.listening[port] {
			k.Port = port
		} else {
			k.PeerPort = s.remote.Port()
		}
		if !slices.ContainsFunc(listeners[k.Port], func(l Key) bool { return l.covers(k) }) {
			c.keys[k] = true
		}
	}
	return sorted(c.keys)
}

// Held is one key that a socket holds, or a listener without one. It is a comparable value and holds no secret.
type Held struct {
	State         State
	Local, Remote netip.AddrPort // unmapped; Remote is the zero value for a listener
	Ifindex       int32          // that the socket is bound to, 0 for none
	Kind          Kind           // 0 for a listener without keys
	Peer          netip.Prefix   // whom the key is for
}

// KeysOf are the keys that sockets hold, in the order of Key.Compare. The listeners among them tell which
// connections were accepted.
func KeysOf(held iter.Seq[Held]) []Key {
	c := newCollector()
	for h := range held {
		s := sock{state: h.State, local: h.Local, remote: h.Remote, ifindex: h.Ifindex, kind: h.Kind}
		if s.local.Addr().IsUnspecified() {
			s.local = netip.AddrPortFrom(netip.Addr{}, h.Local.Port())
		}
		if h.Kind != 0 {
			s.peers = []netip.Prefix{h.Peer}
		}
		c.add(&s)
	}
	return c.set()
}

func sorted(set map[Key]bool) []Key {
	out := make([]Key, 0, len(set))
	for k := range set {
		out = append(out, k)
	}
	slices.SortFunc(out, Key.Compare)
	return out
}

// union is all of both, which are in order.
func union(a, b []Key) []Key {
	out := slices.Concat(a, b)
	slices.SortFunc(out, Key.Compare)
	return slices.Compact(out)
}

// maxKept is how many keys there can be with those that are kept though nobody saw them.
const maxKept = 1 << 16

// keep is what is there now, and what was known before, of which the first stay if they would be more than maxKept. Both
// are in order. Anybody can have a socket that shows no keys, and then set others as fast as the system call goes.
func keep(now, known []Key) []Key {
	out := slices.Clone(now)
	for _, k := range known {
		if len(out) >= maxKept {
			break
		}
		if !has(now, k) {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, Key.Compare)
	return out
}

// lacks reports whether something of old is not in new; both are in order.
func lacks(new, old []Key) bool {
	for _, k := range old {
		if !has(new, k) {
			return true
		}
	}
	return false
}

// has reports whether a key is among those of a list, which is in order.
func has(list []Key, k Key) bool {
	_, ok := slices.BinarySearchFunc(list, k, Key.Compare)
	return ok
}
