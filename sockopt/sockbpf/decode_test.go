package sockbpf

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tsoagent/sockopt"
)

// connRecord is a record as bpf/conns.c writes it: a connection through an SA that is bound to a device, with every field set.
func connRecord() []byte {
	b := make([]byte, connSize)
	hostOrder.PutUint64(b[0:], 4711)         // inode
	hostOrder.PutUint64(b[8:], 815)          // cookie
	hostOrder.PutUint64(b[16:], 0x1f<<16)    // route_caps
	hostOrder.PutUint64(b[24:], 1<<31|1<<16) // dev_features: tx-esp-segmentation, tx-tcp-segmentation
	copy(b[32:], []byte{10, 0, 0, 1})
	copy(b[48:], []byte{10, 0, 0, 2})
	hostOrder.PutUint16(b[64:], connSize)
	b[66], b[67] = afInet, 1
	hostOrder.PutUint32(b[68:], connKnown)
	hostOrder.PutUint32(b[72:], 1000)   // uid
	hostOrder.PutUint32(b[76:], 0x5450) // mark
	hostOrder.PutUint32(b[80:], 3)      // bound_dev
	hostOrder.PutUint32(b[84:], 1)      // gso_type: SKB_GSO_TCPV4
	hostOrder.PutUint32(b[88:], 65215)  // gso_max_size
	hostOrder.PutUint32(b[92:], 64)     // dev_gso_max_segs
	hostOrder.PutUint32(b[96:], 5)      // dev
	hostOrder.PutUint32(b[100:], 1448)  // mss
	hostOrder.PutUint16(b[104:], 179)
	hostOrder.PutUint16(b[106:], 41000)
	hostOrder.PutUint16(b[108:], 2)     // md5_keys
	hostOrder.PutUint16(b[110:], 1)     // ao_keys
	hostOrder.PutUint16(b[112:], 65535) // gso_max_segs
	hostOrder.PutUint16(b[114:], 36)    // header_len
	return b
}

func conn() sockopt.Conn {
	return sockopt.Conn{
		Local: netip.MustParseAddrPort("10.0.0.1:179"), Remote: netip.MustParseAddrPort("10.0.0.2:41000"), State: sockopt.Established,
		UID: 1000, Inode: 4711, Cookie: 815, Mark: 0x5450, BoundDev: 3, V6Only: true, MD5Keys: 2, AOKeys: 1,
		GSO: true, GSODisabled: true, GSOMaxSegs: 65535, GSOMaxSize: 65215, MSS: 1448,
		Route: sockopt.ConnRoute{Dev: 5, TSO: true, GSOMaxSegs: 64, HeaderLen: 36, XFRM: true, Offload: true, DeviceESP: true},
	}
}

func TestDecodeConn(t *testing.T) {
	set := func(change func(b []byte)) []byte {
		b := connRecord()
		change(b)
		return b
	}
	want := func(change func(c *sockopt.Conn)) sockopt.Conn {
		c := conn()
		change(&c)
		return c
	}
	v6 := netip.MustParseAddr("fd00::1").As16()
	mapped := netip.MustParseAddr("::ffff:10.0.0.1").As16()
	for _, tt := range []struct {
		name   string
		record []byte
		want   sockopt.Conn
	}{
		{"all", connRecord(), conn()},
		{"IPv6", set(func(b []byte) {
			b[66] = afInet6
			copy(b[32:], v6[:])
			copy(b[48:], v6[:])
			hostOrder.PutUint32(b[84:], 1<<4)
		}),
			want(func(c *sockopt.Conn) {
				c.Local, c.Remote = netip.MustParseAddrPort("[fd00::1]:179"), netip.MustParseAddrPort("[fd00::1]:41000")
				c.Route.TSO = false // of the other family
			})},
		{"IPv4-mapped", set(func(b []byte) { b[66] = afInet6; copy(b[32:], mapped[:]); copy(b[48:], mapped[:]) }),
			want(func(c *sockopt.Conn) { c.Remote = netip.MustParseAddrPort("10.0.0.1:41000") })},
		{"listener", set(func(b []byte) { b[67] = 10 }), want(func(c *sockopt.Conn) { c.State, c.Remote = sockopt.Listen, netip.AddrPort{} })},
		{"GSO taken", set(func(b []byte) { hostOrder.PutUint64(b[16:], 0xffff) }), want(func(c *sockopt.Conn) { c.GSO = false })},
		{"no sk_gso_type yet", set(func(b []byte) { hostOrder.PutUint32(b[84:], 0) }),
			want(func(c *sockopt.Conn) { c.GSO, c.Route.TSO = false, false })},
		{"no route", set(func(b []byte) { hostOrder.PutUint32(b[68:], connGSODisabled) }), want(func(c *sockopt.Conn) { c.Route, c.V6Only = sockopt.ConnRoute{}, false })},
		{"IPv4 as well", set(func(b []byte) { hostOrder.PutUint32(b[68:], connKnown&^connV6Only) }), want(func(c *sockopt.Conn) { c.V6Only = false })},
		{"the device doesn't cut ESP", set(func(b []byte) { hostOrder.PutUint64(b[24:], 1<<16) }), want(func(c *sockopt.Conn) { c.Route.DeviceESP = false })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeConn(tt.record)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeConnsRefusesAlienRecords(t *testing.T) {
	for name, change := range map[string]func(b []byte){
		"another size": func(b []byte) { hostOrder.PutUint16(b[64:], 128) },
		"family 1":     func(b []byte) { b[66] = 1 },
		"state 0":      func(b []byte) { b[67] = 0 },
		"state 14":     func(b []byte) { b[67] = maxState + 1 },
		"the flags":    func(b []byte) { hostOrder.PutUint32(b[68:], connKnown+1) },
		"sk_gso_type":  func(b []byte) { hostOrder.PutUint32(b[84:], 1<<31) },
		"0 bytes":      func(b []byte) { clear(b) },
	} {
		t.Run(name, func(t *testing.T) {
			alien := connRecord()
			change(alien)
			var seen int
			rest, more, err := decodeConns(join(connRecord(), alien, connRecord()), func(sockopt.Conn) bool { seen++; return true })
			if err == nil || more || seen != 1 || len(rest) != 2*connSize {
				t.Errorf("%d rows, more %t, %d bytes left, error %v; want the first row and an error", seen, more, len(rest), err)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %v", err)
			}
		})
	}
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// TestDecodeConnsInPieces cuts the stream at every place.
func TestDecodeConnsInPieces(t *testing.T) {
	stream := join(connRecord(), connRecord(), connRecord())
	for cut := range len(stream) {
		var seen int
		count := func(c sockopt.Conn) bool {
			if c != conn() {
				t.Fatalf("cut at %d: %+v", cut, c)
			}
			seen++
			return true
		}
		rest, _, err := decodeConns(stream[:cut], count)
		if err != nil || len(rest) != cut%connSize {
			t.Fatalf("cut at %d: %d bytes left, %v", cut, len(rest), err)
		}
		rest, _, err = decodeConns(join(rest, stream[cut:]), count)
		if err != nil || len(rest) != 0 || seen != 3 {
			t.Fatalf("cut at %d: %d rows, %d bytes left, %v", cut, seen, len(rest), err)
		}
	}
}

// FuzzDecodeConns holds that a record is a row that says what the record does, or an error.
func FuzzDecodeConns(f *testing.F) {
	f.Add(connRecord())
	f.Add(join(connRecord(), connRecord()[:70]))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var rows int
		rest, more, err := decodeConns(b, func(c sockopt.Conn) bool {
			record := b[rows*connSize:]
			rows++
			if !c.Local.Addr().IsValid() || c.Local.Addr().Is4In6() || c.Local.Port() != hostOrder.Uint16(record[104:]) {
				t.Errorf("local %s", c.Local)
			}
			if c.Remote.IsValid() == (c.State == sockopt.Listen) || uint8(c.State) != record[67] || c.State == 0 {
				t.Errorf("remote %s in state %d", c.Remote, c.State)
			}
			if hostOrder.Uint16(record[64:]) != connSize {
				t.Errorf("a row from %x", record[:connSize])
			}
			_ = c.Segmentation()
			return true
		})
		if len(rest) != len(b)-rows*connSize {
			t.Errorf("%d rows of %d bytes, %d left", rows, len(b), len(rest))
		}
		if err == nil && (!more || len(rest) >= connSize) || err != nil && (more || len(rest) < connSize) {
			t.Errorf("more %t, %d left, error %v", more, len(rest), err)
		}
	})
}

func keyRecord() []byte {
	b := make([]byte, keySize)
	copy(b, []byte{192, 0, 2, 0})
	hostOrder.PutUint64(b[16:], 815)
	hostOrder.PutUint32(b[24:], 4026531840)
	hostOrder.PutUint32(b[28:], 7)
	hostOrder.PutUint16(b[32:], 179)
	b[34], b[35], b[36], b[37] = uint8(Added), uint8(sockopt.MD5), afInet, 24
	return b
}

func TestDecodeKey(t *testing.T) {
	mapped := netip.MustParseAddr("::ffff:192.0.2.0").As16()
	v6 := netip.MustParseAddr("2001:db8::").As16()
	all := KeyEvent{
		Op: Added, Kind: sockopt.MD5, Netns: 4026531840, Cookie: 815, Peer: netip.MustParsePrefix("192.0.2.0/24"), Ifindex: 7, Port: 179,
	}
	for _, tt := range []struct {
		name   string
		change func(b []byte)
		want   func(e *KeyEvent) // nil for an error
	}{
		{"all", func([]byte) {}, func(*KeyEvent) {}},
		{"IPv6", func(b []byte) { copy(b, v6[:]); b[36], b[37] = afInet6, 48 }, func(e *KeyEvent) { e.Peer = netip.MustParsePrefix("2001:db8::/48") }},
		{"IPv4-mapped", func(b []byte) { copy(b, mapped[:]); b[36] = afInet6 }, func(*KeyEvent) {}},
		{"AO, cleared", func(b []byte) { b[34], b[35], b[36] = uint8(Cleared), uint8(sockopt.AO), 0 },
			func(e *KeyEvent) { e.Op, e.Kind, e.Peer = Cleared, sockopt.AO, netip.Prefix{} }},
		{"IPv4-mapped with an IPv6 length", func(b []byte) { copy(b, mapped[:]); b[36], b[37] = afInet6, 128 }, nil},
		{"too long a prefix", func(b []byte) { b[37] = 33 }, nil},
		{"a socket that starts", func(b []byte) { b[34], b[36] = uint8(Started), 0 },
			func(e *KeyEvent) { e.Op, e.Peer = Started, netip.Prefix{} }},
		{"one that is connected", func(b []byte) { b[34], b[36] = uint8(Connected), 0 },
			func(e *KeyEvent) { e.Op, e.Peer = Connected, netip.Prefix{} }},
		{"an operation that isn't", func(b []byte) { b[34] = uint8(Lost) }, nil},
		{"one that isn't yet", func(b []byte) { b[34] = uint8(Connected) + 1 }, nil},
		{"a kind that isn't", func(b []byte) { b[35] = 3 }, nil},
		{"a family that isn't", func(b []byte) { b[36] = 1 }, nil},
		{"zeros", func(b []byte) { clear(b) }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := keyRecord()
			tt.change(b)
			got, err := decodeKey(b)
			if tt.want == nil {
				if err == nil {
					t.Errorf("%+v, want an error", got)
				}
				return
			}
			want := all
			tt.want(&want)
			if err != nil || got != want {
				t.Errorf("%+v, %v, want %+v", got, err, want)
			}
		})
	}
}

// FuzzDecodeKey holds that a record is an event with a peer that can be, or an error.
func FuzzDecodeKey(f *testing.F) {
	f.Add(keyRecord())
	f.Add(keyRecord()[:keySize-8])
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeKey(b)
		switch {
		case err != nil && e != KeyEvent{}:
			t.Errorf("%+v with %v", e, err)
		case err == nil && (len(b) != keySize || e.Op < Added || e.Op > Connected || e.Op == Lost || e.Missing != 0 || e.Op.String() == "unknown"):
			t.Errorf("%+v of %x", e, b)
		case err == nil && e.Peer != netip.Prefix{} && (!e.Peer.IsValid() || e.Peer.Addr().Is4In6()):
			t.Errorf("peer %v", e.Peer)
		}
	})
}
