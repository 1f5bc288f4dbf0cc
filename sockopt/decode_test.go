package sockopt

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// captured are real answers of a kernel.
func captured(t testing.TB) [][]byte {
	t.Helper()
	text, err := os.ReadFile("testdata/answers.hex")
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		b, err := hex.DecodeString(strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

// TestCaptured decodes real answers: four listeners, one of them without a key, and both ends of two
// connections.
func TestCaptured(t *testing.T) {
	c := newCollector(nil, nil)
	var s sock
	for _, b := range captured(t) {
		if err := s.decode(b); err != nil {
			t.Fatal(err)
		}
		if !s.trusted || s.cookie == 0 {
			t.Errorf("%+v", s)
		}
		c.add(&s)
	}
	want := []string{
		"listener: tcp-md5 key for 127.0.0.1 on port 179",
		"tcp-md5 key for 127.0.0.2 port 179 of 127.0.0.1",
		"listener: tcp-md5 key for 192.0.2.10 on port 181",
		"listener: tcp-md5 key for 198.51.100.0/24 on port 179",
		"listener: tcp-md5 key for 2001:db8::9 on port 181",
		"listener: tcp-md5 key for 2001:db8:1::/48 on port 181",
		"listener: tcp-md5 key for fd00::1 on port 182",
		"tcp-md5 key for fd00::2 port 182 of fd00::1",
	}
	var got []string
	for _, k := range c.set() {
		s, _, _ := strings.Cut(k.String(), " of ")
		if k.Listener {
			s = "listener: " + s
		} else {
			s = k.String()
		}
		got = append(got, s)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// record is a struct tcp_diag_md5sig whose key is all ones.
func record(family, bits byte, keyLen uint16, address string) []byte {
	b := bytes.Repeat([]byte{0xff}, md5Len)
	clear(b[:md5Key])
	b[md5Family], b[md5PrefixLen] = family, bits
	binary.NativeEndian.PutUint16(b[md5KeyLen:], keyLen)
	copy(b[md5Addr:md5Key], netip.MustParseAddr(address).AsSlice())
	return b
}

// answer is a listener on port 179 with an attribute.
func answer(family byte, typ uint16, value []byte) []byte {
	b := make([]byte, msgLen)
	b[msgFamily], b[msgState] = family, byte(Listen)
	binary.BigEndian.PutUint16(b[msgID+idSport:], 179)
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	return append(b, value...)
}

func TestDecodeKeys(t *testing.T) {
	join := slices.Concat[[]byte]
	many := bytes.Repeat(record(afInet, 32, 5, "10.0.0.1"), 656) // as long as 16 bits can't count
	for _, c := range []struct {
		name  string
		value []byte
		peers string
		err   error
	}{
		{"none", nil, "", nil},
		{"two", join(record(afInet, 32, 80, "10.0.0.1"), record(afInet6, 128, 1, "2001:db8::1")), "10.0.0.1/32 2001:db8::1/128", nil},
		{"prefixes are masked", join(record(afInet, 8, 5, "10.1.2.3"), record(afInet6, 48, 5, "2001:db8:1::1")), "10.0.0.0/8 2001:db8:1::/48", nil},
		{"IPv4 in IPv6", record(afInet6, 120, 5, "::ffff:10.0.0.1"), "10.0.0.0/24", nil},
		{"all of IPv4", record(afInet, 0, 5, "10.1.2.3"), "0.0.0.0/0", nil},
		{"an alien family", record(7, 32, 5, "10.0.0.1"), "", errKey},
		{"too long a prefix", record(afInet, 33, 5, "10.0.0.1"), "", errKey},
		{"too long a key", record(afInet, 32, 81, "10.0.0.1"), "", errKey},
		{"half a record", record(afInet, 32, 5, "10.0.0.1")[:50], "", errKey},
		{"more than the length can count", many, "", errKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := sock{peers: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}} // of another socket
			err := s.decode(answer(afInet, attrMD5Sig, c.value))
			if !errors.Is(err, c.err) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if err != nil {
				return
			}
			var got []string
			for _, p := range s.peers {
				got = append(got, p.String())
			}
			if strings.Join(got, " ") != c.peers {
				t.Errorf("peers %v, want %s", got, c.peers)
			}
		})
	}
}

func TestDecodeBroken(t *testing.T) {
	var s sock
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"empty":              {nil, errShort},
		"short":              {make([]byte, msgLen-1), errShort},
		"an alien family":    {make([]byte, msgLen), errFamily},
		"half an attribute":  {append(answer(afInet, attrInfo, nil), 1, 2), errAttribute},
		"a length too large": {append(answer(afInet, attrInfo, nil), 9, 0, 0, 0, 1), errAttribute},
		"a length too small": {append(answer(afInet, attrInfo, nil), 3, 0, 0, 0), errAttribute},
	} {
		if err := s.decode(c.b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if err := s.decode(answer(afInet, 300, []byte{1})); err != nil {
		t.Errorf("an unknown attribute: %v", err)
	}
}

// TestSetLeavesOut has no row for a connection that says no more than a listener, in the same VRF
// and at the same address.
func TestSetLeavesOut(t *testing.T) {
	at := netip.MustParseAddrPort
	peers := func(p ...string) (out []netip.Prefix) {
		for _, s := range p {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	c := newCollector(nil, nil)
	conn := func(ifindex int32, local, remote string, p ...string) {
		c.add(&sock{state: Established, ifindex: ifindex, local: at(local), remote: at(remote), peers: peers(p...)})
	}
	for _, local := range []string{"0.0.0.0:179", "192.0.2.2:180"} {
		a := at(local)
		if a.Addr().IsUnspecified() {
			a = netip.AddrPortFrom(netip.Addr{}, a.Port())
		}
		c.add(&sock{state: Listen, local: a, peers: peers("10.0.0.0/24")})
	}
	conn(0, "192.0.2.1:179", "10.0.0.9:4000", "10.0.0.9/32")   // accepted: the listener's prefix has it
	conn(0, "192.0.2.1:179", "10.1.0.9:4000", "10.1.0.9/32")   // its key at the listener is gone
	conn(7, "192.0.2.1:179", "10.0.0.9:4000", "10.0.0.9/32")   // in a VRF
	conn(0, "192.0.2.1:180", "10.0.0.9:4000", "10.0.0.9/32")   // the listener has another address
	conn(0, "192.0.2.1:40000", "10.0.0.9:179", "10.0.0.9/32")  // a client's
	conn(0, "192.0.2.1:40001", "10.0.0.9:179", "10.0.0.8/31")  // the same again
	conn(0, "192.0.2.1:40001", "10.0.0.10:179", "10.0.0.8/31") // for another than its peer
	want := []string{
		"tcp-md5 key for 10.0.0.0/24 on port 179",
		"tcp-md5 key for 10.0.0.0/24 on port 180 of 192.0.2.2",
		"tcp-md5 key for 10.0.0.9 port 179 of 192.0.2.1",
		"tcp-md5 key for 10.0.0.9 on port 179 of 192.0.2.1",
		"tcp-md5 key for 10.0.0.9 on port 180 of 192.0.2.1",
		"tcp-md5 key for 10.1.0.9 on port 179 of 192.0.2.1",
	}
	var got []string
	for _, k := range c.set() {
		got = append(got, k.String())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// FuzzDecode never panics, and each row that it gives is one that a kernel can mean; the bytes of
// keys make no difference.
func FuzzDecode(f *testing.F) {
	for _, b := range captured(f) {
		f.Add(b)
	}
	f.Add(answer(afInet, attrMD5Sig, record(afInet, 33, 5, "10.0.0.1")))
	f.Add(answer(afInet6, attrMD5Sig, record(afInet6, 120, 5, "::ffff:10.0.0.1")))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s, other sock
		err := s.decode(slices.Clone(b))
		if err != nil {
			return
		}
		for _, p := range s.peers {
			if !p.IsValid() || p != p.Masked() {
				t.Errorf("peer %v", p)
			}
		}
		if a := s.local.Addr(); a.Is4In6() || a.IsUnspecified() || s.remote.Addr().Is4In6() {
			t.Errorf("%+v", s)
		}
		c := newCollector(nil, nil)
		c.add(&s)
		for _, k := range c.set() {
			if (k.Port == 0) == (k.PeerPort == 0) && s.local.Port() != 0 && s.remote.Port() != 0 || k.Peer != k.Peer.Masked() || k.Peer.Addr().Is4In6() {
				t.Errorf("%+v from %+v", k, s)
			}
		}
		for a := b[msgLen:]; len(a) >= 4; { // which decode has found to be well formed
			n := int(binary.NativeEndian.Uint16(a))
			if binary.NativeEndian.Uint16(a[2:])&attrTypeMask == attrMD5Sig {
				for k := a[4:n]; len(k) > 0; k = k[md5Len:] {
					for i := md5Key; i < md5Len; i++ {
						k[i] ^= 0x5a
					}
				}
			}
			a = a[min((n+3)&^3, len(a)):]
		}
		if err := other.decode(b); err != nil || !slices.Equal(s.peers, other.peers) || s.local != other.local || s.remote != other.remote {
			t.Errorf("the bytes of a key make a difference: %+v and %+v: %v", s, other, err)
		}
	})
}

// TestKeptKeysAreBounded has a socket that hides its keys for ever, which takes no privilege, and others that come with
// new keys and go again: what is kept because of the hidden ones must not grow with them.
func TestKeptKeysAreBounded(t *testing.T) {
	const each = MaxTrusted/4 + 1
	c := newCollector(nil, nil)
	var known []Key
	for round := range 6 {
		now := make([]Key, 0, each)
		for i := range each {
			now = append(now, Key{Kind: MD5, Peer: host(10, round, i), Port: 179, Listener: true, Owner: Root})
		}
		got := c.keep(now, known)
		if lacks(got, now) {
			t.Fatalf("round %d: a key that is there is missing", round)
		}
		if !slices.IsSortedFunc(got, Key.Compare) || len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Fatalf("round %d: out of order, or twice", round)
		}
		if want := min((round+1)*each, MaxTrusted); len(got) != want {
			t.Fatalf("round %d: %d keys, want %d", round, len(got), want)
		}
		known = got
	}
	over := slices.Concat(known, []Key{{Kind: MD5, Peer: netip.MustParsePrefix("11.0.0.0/8"), Owner: Root}})
	if got := c.keep(over, known); len(got) != len(over) {
		t.Errorf("%d of %d keys that are there", len(got), len(over))
	}
}

// host is one of 2^16 addresses in one of 2^8 nets.
func host(first, net, i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(first), byte(net), byte(i >> 8), byte(i)}), 32)
}

// user is an owner.
func user(uid uint32) Owner { return Owner{UID: uid, Known: true} }

// TestOwnerOfASocket believes that a socket is root's only where it has a file.
func TestOwnerOfASocket(t *testing.T) {
	for _, c := range []struct {
		uid, inode uint32
		want       Owner
	}{
		{0, 7, Root},
		{0, 0, Owner{}}, // before 6.17, anybody's
		{1000, 7, user(1000)},
		{1000, 0, user(1000)},
	} {
		b := answer(afInet, attrInfo, nil)
		binary.NativeEndian.PutUint32(b[msgUID:], c.uid)
		binary.NativeEndian.PutUint32(b[msgInode:], c.inode)
		var s sock
		if err := s.decode(b); err != nil || s.owner != c.want {
			t.Errorf("uid %d, inode %d: %+v, want %+v; %v", c.uid, c.inode, s.owner, c.want, err)
		}
	}
}

// TestMostTrustedOwnerCounts tells the owner of a key that several sockets hold, in whichever order they come.
func TestMostTrustedOwnerCounts(t *testing.T) {
	trust := func(uid uint32) bool { return uid == 103 || uid == OverflowUID }
	nobody := user(OverflowUID) // stands for many, and is never trusted
	for _, c := range []struct {
		owners []Owner
		want   Owner
	}{
		{[]Owner{user(1000), Root}, Root},
		{[]Owner{user(103), Root, user(1000)}, Root},
		{[]Owner{user(50), user(103)}, user(103)},
		{[]Owner{nobody, user(65535)}, nobody},
		{[]Owner{nobody, user(103)}, user(103)},
		{[]Owner{{}, user(1000)}, user(1000)},
		{[]Owner{{}}, Owner{}},
	} {
		for range len(c.owners) {
			c.owners = append(c.owners[1:], c.owners[0])
			col := newCollector(trust, nil)
			var lists [][]Key
			for _, o := range c.owners {
				s := sock{state: Listen, local: netip.MustParseAddrPort("192.0.2.1:179"), peers: []netip.Prefix{host(10, 0, 1)}, owner: o}
				col.add(&s)
				one := newCollector(trust, nil)
				one.add(&s)
				lists = append(lists, one.set())
			}
			for what, got := range map[string][]Key{"of sockets": col.set(), "of looks": col.union(lists...), "kept": col.keep(lists[0], col.union(lists...))} {
				if len(got) != 1 || got[0].Owner != c.want {
					t.Errorf("%+v, %s: %+v, want one of %+v", c.owners, what, got, c.want)
				}
			}
		}
	}
}

// TestConnectionOfATrustedUser is told where its listener is somebody's who isn't.
func TestConnectionOfATrustedUser(t *testing.T) {
	const owner = " (its owner)"
	for _, c := range []struct {
		listener, conn Owner
		told           bool
	}{
		{Root, user(103), false},
		{user(103), Root, false},
		{user(103), user(1000), false},
		{user(1000), user(103), true},
		{user(1000), Root, true},
		{user(1000), user(1001), false},
		{user(1000), Owner{}, false},
		{Owner{}, user(1000), true},
	} {
		col := newCollector(func(uid uint32) bool { return uid == 103 }, nil)
		col.add(&sock{state: Listen, local: netip.AddrPortFrom(netip.Addr{}, 179), owner: c.listener, peers: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
		col.add(&sock{
			state: Established, local: netip.MustParseAddrPort("192.0.2.1:179"), remote: netip.MustParseAddrPort("10.0.0.1:4000"),
			owner: c.conn, peers: []netip.Prefix{host(10, 0, 1)},
		})
		told := slices.ContainsFunc(col.set(), func(k Key) bool { return !k.Listener && k.Owner == c.conn })
		if told != c.told {
			t.Errorf("%+v and %+v%s: told %t, want %t", c.listener, c.conn, owner, told, c.told)
		}
	}
}

// TestKeysAreBounded has somebody who sets more keys than anybody needs: they take neither memory without end nor the place of those that
// are trusted, and what was known stays.
func TestKeysAreBounded(t *testing.T) {
	listener := func(c *collector, o Owner, first, port, from, n int) {
		s := sock{state: Listen, local: netip.AddrPortFrom(netip.Addr{}, uint16(port)), owner: o}
		for i := range n {
			s.peers = append(s.peers, host(first, 0, from+i))
		}
		c.add(&s)
	}
	conns := func(c *collector, o Owner, first, n int) {
		for i := range n {
			at := host(first, 1, i)
			c.add(&sock{
				state: Established, owner: o, peers: []netip.Prefix{at},
				local: netip.MustParseAddrPort("192.0.2.1:40000"), remote: netip.AddrPortFrom(at.Addr(), 179),
			})
		}
	}
	count := func(keys []Key, o Owner) (n int) {
		for _, k := range keys {
			if k.Owner == o {
				n++
			}
		}
		return n
	}

	c := newCollector(nil, nil)
	for port := range 40 {
		listener(c, user(1000), 10, 2000+port, 0, 655)
	}
	listener(c, Root, 11, 179, 0, 655)
	conns(c, user(1000), 12, MaxOthers)
	conns(c, Root, 13, 1000)
	first := c.set()
	if n := count(first, user(1000)); n != MaxOthers {
		t.Errorf("%d keys of somebody, want %d", n, MaxOthers)
	}
	if n := count(first, Root); n != 1655 || c.over != [2]bool{false, true} {
		t.Errorf("%d keys of root's, want 1655; over %v", n, c.over)
	}

	// The next look sees others first, and still tells what was known.
	c = newCollector(nil, first)
	conns(c, user(1001), 14, MaxOthers)
	if len(c.set()) != 0 || !c.over[other] {
		t.Errorf("%d new keys although all are known that there is room for", len(c.set()))
	}
	for port := range 40 {
		listener(c, user(1000), 10, 2000+port, 0, 655)
	}
	if lacks(c.set(), slices.DeleteFunc(slices.Clone(first), func(k Key) bool { return k.Owner == Root || !k.Listener })) {
		t.Error("a key that was known is gone, though its socket is there")
	}

	// When those are gone there is room.
	c = newCollector(nil, nil)
	conns(c, user(1001), 14, 5)
	listener(c, Root, 15, 179, 0, 1)
	for i := range MaxTrusted {
		listener(c, Root, 16, 1+i/60000, i, 1)
	}
	if n := count(c.set(), Root); n != MaxTrusted || c.over != [2]bool{true, false} {
		t.Errorf("%d keys of root's, want %d; over %v", n, MaxTrusted, c.over)
	}
}

// TestSetFindsListenersByPeer compares the keys that are found with a plain search, and with as many listeners' keys as there are
// connections that a plain search would take minutes for.
func TestSetFindsListenersByPeer(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	address := func() netip.Addr {
		if r.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(2)), byte(r.IntN(8))})
		}
		return netip.AddrFrom16([16]byte{0xfd, 15: byte(r.IntN(8))})
	}
	owners := []Owner{{}, Root, user(103), user(1000)}
	for range 2000 {
		var held []Held
		for range r.IntN(12) {
			h := Held{State: []State{Listen, Established}[r.IntN(2)], Ifindex: int32(r.IntN(2)), Kind: Kind(1 + r.IntN(2)), Owner: owners[r.IntN(4)]}
			a := address()
			h.Peer, _ = a.Prefix(a.BitLen() - r.IntN(4))
			h.Local = netip.AddrPortFrom(netip.Addr{}, uint16(179+r.IntN(2)))
			if r.IntN(2) == 0 {
				h.Local = netip.AddrPortFrom(address(), h.Local.Port())
			}
			if h.State != Listen {
				h.Remote = netip.AddrPortFrom(a, uint16(179+r.IntN(2)))
			}
			held = append(held, h)
		}
		same := cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty()}
		if diff := cmp.Diff(plainKeys(held), collected(held), same); diff != "" {
			t.Fatalf("%+v (-plain +found)\n%s", held, diff)
		}
	}

	var held []Held
	for i := range 60000 {
		peer := host(10, 0, i)
		held = append(held,
			Held{State: Listen, Local: netip.AddrPortFrom(netip.Addr{}, 179), Kind: MD5, Peer: peer},
			Held{State: Established, Local: netip.MustParseAddrPort("192.0.2.1:179"), Remote: netip.AddrPortFrom(host(11, 0, i).Addr(), 4000), Kind: MD5, Peer: host(11, 0, i)})
	}
	if n := len(KeysOf(slices.Values(held))); n != 120000 {
		t.Errorf("%d keys, want 120000", n)
	}
}

// collected is what one look makes of the sockets, and what it makes of a list of their keys.
func collected(held []Held) []Key {
	c, list := newCollector(nil, nil), newCollector(nil, nil)
	for _, listeners := range []bool{true, false} {
		for _, h := range held {
			if (h.State == Listen) == listeners {
				c.add(h.sock())
			}
		}
	}
	list.take(KeysOf(slices.Values(held)))
	if !slices.Equal(c.set(), list.set()) {
		return slices.Concat(c.set(), []Key{{}}, list.set()) // which nothing equals
	}
	return c.set()
}

// plainKeys is collected without an index.
func plainKeys(held []Held) []Key {
	c := newCollector(nil, nil)
	var all, out []Key
	listening := map[uint16]bool{}
	for _, h := range held {
		if h.State == Listen {
			listening[h.Local.Port()] = true
			all = append(all, Key{Kind: h.Kind, Peer: h.Peer, Ifindex: h.Ifindex, Local: h.Local.Addr(), Port: h.Local.Port(), Listener: true, Owner: h.Owner})
		}
	}
	best := c.union(all)
	for _, h := range held {
		if h.State == Listen {
			continue
		}
		k := Key{Kind: h.Kind, Peer: netip.PrefixFrom(h.Remote.Addr(), h.Remote.Addr().BitLen()), Ifindex: h.Ifindex, Local: h.Local.Addr(), Owner: h.Owner}
		if listening[h.Local.Port()] {
			k.Port = h.Local.Port()
		} else {
			k.PeerPort = h.Remote.Port()
		}
		if !slices.ContainsFunc(best, func(l Key) bool {
			return l.Kind == k.Kind && l.Ifindex == k.Ifindex && l.Port == k.Port && (!l.Local.IsValid() || l.Local == k.Local) &&
				l.Peer.Contains(k.Peer.Addr()) && c.class(l.Owner) <= c.class(k.Owner)
		}) {
			out = append(out, k)
		}
	}
	return c.union(best, out)
}
