package sockopt

import (
	"cmp"
	"encoding/binary"
	"errors"
	"iter"
	"math"
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
	msgUID    = 64
	msgInode  = 68

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
	owner         Owner
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
	s.owner = OwnerOf(binary.NativeEndian.Uint32(b[msgUID:]), binary.NativeEndian.Uint32(b[msgInode:]) != 0)
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

// class is how much an owner is trusted.
type class uint8

const (
	trusted class = iota
	other         // one who isn't
	unknown
)

// A collector makes the set of keys from the sockets of one look.
type collector struct {
	trust func(uid uint32) bool // besides root
	known []Key                 // what was known before, in order
	most  [2]int                // keys of trusted owners, and of others

	listening map[uint16]bool
	keys      map[Key]Owner // without their owners, and the most trusted
	// lengths are those that listeners' keys have, for IPv4 and IPv6: by them the keys for an address are found.
	lengths [2][129]bool
	taken   [2]int // keys that were let in
	kept    [2]int // room for those of known that were not seen yet
	over    [2]bool
	sockets int
}

// newCollector makes one that lets no more in than a KeysSet has, and of what is new only what there is room for besides what was known.
// trust is nil for root alone.
func newCollector(trust func(uid uint32) bool, known []Key) *collector {
	c := &collector{
		trust: trust, known: known, most: [2]int{MaxTrusted, MaxOthers},
		listening: map[uint16]bool{}, keys: map[Key]Owner{},
	}
	for _, k := range known {
		c.kept[c.budget(k.Owner)]++
	}
	return c
}

func (c *collector) class(o Owner) class {
	switch {
	case !o.Known:
		return unknown
	case o.UID == 0, c.trust != nil && o.UID != OverflowUID && c.trust(o.UID):
		return trusted
	}
	return other
}

// budget is where an owner's keys are counted.
func (c *collector) budget(o Owner) int { return int(min(c.class(o), other)) }

// better reports whether o is the owner to tell, not p.
func (c *collector) better(o, p Owner) bool {
	return cmp.Or(cmp.Compare(c.class(o), c.class(p)), cmp.Compare(o.UID, p.UID)) < 0
}

// put takes a key, if there is room.
func (c *collector) put(k Key) {
	o := k.Owner
	k.Owner = Owner{}
	if have, ok := c.keys[k]; ok {
		if c.better(o, have) {
			c.keys[k] = o
		}
		return
	}
	b := c.budget(o)
	if i, ok := slices.BinarySearchFunc(c.known, k, Key.compareFlows); ok {
		c.kept[c.budget(c.known[i].Owner)]--
	} else if c.taken[b]+c.kept[b] >= c.most[b] {
		c.over[b] = true
		return
	}
	c.taken[b]++
	c.keys[k] = o
	if k.Listener {
		c.lengths[familyIndex(k.Peer.Addr())][k.Peer.Bits()] = true
	}
}

func familyIndex(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// add takes a socket; it may come twice. Listeners come first: a connection whose local port is listened on was accepted there. One that says
// no more than a listener of no less trust does is left out.
func (c *collector) add(s *sock) {
	c.sockets++
	k := Key{Kind: cmp.Or(s.kind, MD5), Ifindex: s.ifindex, Local: s.local.Addr(), Owner: s.owner}
	port, remote := s.local.Port(), s.remote.Addr()
	switch {
	case s.state == Listen:
		c.listening[port] = true
		k.Port, k.Listener = port, true
		for _, k.Peer = range s.peers {
			c.put(k)
		}
		return
	case !slices.ContainsFunc(s.peers, func(p netip.Prefix) bool { return p.Contains(remote) }):
		return // it signs only if a key is for its other end
	}
	k.Peer = netip.PrefixFrom(remote, remote.BitLen())
	if !c.listening[port] {
		k.PeerPort = s.remote.Port()
		c.put(k)
		return
	}
	k.Port = port
	if !c.covered(k) {
		c.put(k)
	}
}

// covered reports whether a listener says what a connection's key says, and is trusted no less.
func (c *collector) covered(k Key) bool {
	l := k
	l.Owner, l.Listener = Owner{}, true
	for bits, used := range c.lengths[familyIndex(k.Peer.Addr())] {
		if !used {
			continue
		}
		l.Peer, _ = k.Peer.Addr().Prefix(bits)
		for _, l.Local = range [...]netip.Addr{{}, k.Local} {
			if o, ok := c.keys[l]; ok && c.class(o) <= c.class(k.Owner) {
				return true
			}
		}
	}
	return false
}

// set is the set of keys, in order.
func (c *collector) set() []Key {
	out := make([]Key, 0, len(c.keys))
	for k, o := range c.keys {
		k.Owner = o
		out = append(out, k)
	}
	slices.SortFunc(out, Key.Compare)
	return out
}

// Held is one key that a socket holds, or a listener without one. It is a comparable value and holds no secret.
type Held struct {
	State         State
	Local, Remote netip.AddrPort // unmapped; Remote is the zero value for a listener
	Ifindex       int32          // that the socket is bound to, 0 for none
	Kind          Kind           // 0 for a listener without keys
	Peer          netip.Prefix   // whom the key is for
	Owner         Owner          // whose the socket is
}

// KeysOf are the keys that sockets hold, in the order of Key.Compare; those that differ in their owner alone are all there. The listeners among
// them tell which connections were accepted. It goes through the sequence twice, and has an end to the keys only where that has one.
func KeysOf(held iter.Seq[Held]) []Key {
	listening := map[uint16]bool{}
	of := map[Owner]*collector{}
	for _, listeners := range []bool{true, false} {
		for h := range held {
			if (h.State == Listen) != listeners {
				continue
			}
			c := of[h.Owner]
			if c == nil {
				c = newCollector(nil, nil)
				c.listening, c.most = listening, [2]int{math.MaxInt, math.MaxInt}
				of[h.Owner] = c
			}
			c.add(h.sock())
		}
	}
	var out []Key
	for _, c := range of {
		out = append(out, c.set()...)
	}
	slices.SortFunc(out, Key.Compare)
	return out
}

// take takes what KeysOf returns, as add does the sockets.
func (c *collector) take(keys []Key) {
	for _, listeners := range []bool{true, false} {
		for _, k := range keys {
			if k.Listener == listeners && (listeners || k.Port == 0 || !c.covered(k)) {
				c.put(k)
			}
		}
	}
}

func (h Held) sock() *sock {
	s := sock{state: h.State, local: h.Local, remote: h.Remote, ifindex: h.Ifindex, kind: h.Kind, owner: h.Owner}
	if s.local.Addr().IsUnspecified() {
		s.local = netip.AddrPortFrom(netip.Addr{}, h.Local.Port())
	}
	if h.Kind != 0 {
		s.peers = []netip.Prefix{h.Peer}
	}
	return &s
}

// union is all of several lists; of keys that differ in their owner alone, that of the most trusted.
func (c *collector) union(lists ...[]Key) []Key {
	out := slices.Concat(lists...)
	slices.SortFunc(out, func(a, b Key) int {
		return cmp.Or(a.compareFlows(b), cmp.Compare(c.class(a.Owner), c.class(b.Owner)), cmp.Compare(a.Owner.UID, b.Owner.UID))
	})
	return slices.CompactFunc(out, sameFlows)
}

func sameFlows(a, b Key) bool { return a.compareFlows(b) == 0 }

// keep is what is there now, and what was known before, of which the first stay if they would be more than a KeysSet has. Both are in order.
// Anybody can have a socket that shows no keys, and then set others as fast as the system call goes.
func (c *collector) keep(now, known []Key) []Key {
	var room [2]int
	copy(room[:], c.most[:])
	for _, k := range now {
		room[c.budget(k.Owner)]--
	}
	var more []Key
	for _, k := range known {
		_, ok := slices.BinarySearchFunc(now, k, Key.compareFlows)
		switch b := c.budget(k.Owner); {
		case ok:
			more = append(more, k) // the hidden one can be of an owner who is trusted more
		case room[b] > 0:
			room[b]--
			more = append(more, k)
		}
	}
	return c.union(now, more)
}

// lacks reports whether something of old is not in new; both are in order.
func lacks(new, old []Key) bool {
	for _, k := range old {
		if _, ok := slices.BinarySearchFunc(new, k, Key.Compare); !ok {
			return true
		}
	}
	return false
}
