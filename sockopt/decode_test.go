package sockopt

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
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
	c := newCollector()
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
	c := newCollector()
	conn := func(ifindex int32, local, remote string, p ...string) {
		c.add(&sock{state: Established, ifindex: ifindex, local: at(local), remote: at(remote), peers: peers(p...)})
	}
	conn(0, "192.0.2.1:179", "10.0.0.9:4000", "10.0.0.9/32")   // accepted: the listener's prefix has it
	conn(0, "192.0.2.1:179", "10.1.0.9:4000", "10.1.0.9/32")   // its key at the listener is gone
	conn(7, "192.0.2.1:179", "10.0.0.9:4000", "10.0.0.9/32")   // in a VRF
	conn(0, "192.0.2.1:180", "10.0.0.9:4000", "10.0.0.9/32")   // the listener has another address
	conn(0, "192.0.2.1:40000", "10.0.0.9:179", "10.0.0.9/32")  // a client's
	conn(0, "192.0.2.1:40001", "10.0.0.9:179", "10.0.0.8/31")  // the same again
	conn(0, "192.0.2.1:40001", "10.0.0.10:179", "10.0.0.8/31") // for another than its peer
	for _, local := range []string{"0.0.0.0:179", "192.0.2.2:180"} {
		a := at(local)
		if a.Addr().IsUnspecified() {
			a = netip.AddrPortFrom(netip.Addr{}, a.Port())
		}
		c.add(&sock{state: Listen, local: a, peers: peers("10.0.0.0/24")})
	}
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
		c := newCollector()
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
	const each = maxKept/4 + 1
	var known []Key
	for round := range 6 {
		now := make([]Key, 0, each)
		for i := range each {
			a := netip.AddrFrom4([4]byte{10, byte(round), byte(i >> 8), byte(i)})
			now = append(now, Key{Kind: MD5, Peer: netip.PrefixFrom(a, 32), Port: 179, Listener: true})
		}
		got := keep(now, known)
		if lacks(got, now) {
			t.Fatalf("round %d: a key that is there is missing", round)
		}
		if !slices.IsSortedFunc(got, Key.Compare) || len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Fatalf("round %d: out of order, or twice", round)
		}
		if want := min((round+1)*each, maxKept); len(got) != want {
			t.Fatalf("round %d: %d keys, want %d", round, len(got), want)
		}
		known = got
	}
	over := slices.Concat(known, []Key{{Kind: MD5, Peer: netip.MustParsePrefix("11.0.0.0/8")}})
	if got := keep(over, known); len(got) != len(over) {
		t.Errorf("%d of %d keys that are there", len(got), len(over))
	}
}
