package sockbpf

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"tsoagent/sockopt"
)

// heldRecord is a record as bpf/held.c writes it: the key of a connection.
func heldRecord() []byte {
	b := make([]byte, heldSize)
	copy(b, []byte{10, 0, 0, 1})
	copy(b[16:], []byte{10, 0, 0, 2})
	copy(b[32:], []byte{10, 0, 0, 0})
	hostOrder.PutUint64(b[48:], 815)
	hostOrder.PutUint32(b[56:], 3)
	hostOrder.PutUint16(b[60:], heldSize)
	hostOrder.PutUint16(b[62:], 179)
	hostOrder.PutUint16(b[64:], 41000)
	b[66], b[67], b[68], b[69], b[70] = afInet, 1, uint8(sockopt.AO), afInet, 24
	hostOrder.PutUint32(b[72:], 103)
	b[76] = 1
	return b
}

func TestDecodeHeld(t *testing.T) {
	mapped := netip.MustParseAddr("::ffff:10.0.0.0").As16()
	v6 := netip.MustParseAddr("2001:db8::").As16()
	all := sockopt.Held{
		State: sockopt.Established, Local: netip.MustParseAddrPort("10.0.0.1:179"), Remote: netip.MustParseAddrPort("10.0.0.2:41000"), Ifindex: 3,
		Kind: sockopt.AO, Peer: netip.MustParsePrefix("10.0.0.0/24"),
		Owner: sockopt.Owner{UID: 103, Known: true},
	}
	for _, tt := range []struct {
		name   string
		change func(b []byte)
		want   func(h *sockopt.Held) // nil for an error
		more   bool
	}{
		{"all", func([]byte) {}, func(*sockopt.Held) {}, false},
		{"more than are told", func(b []byte) { b[71] = 1 }, func(*sockopt.Held) {}, true},
		{"root's", func(b []byte) { clear(b[72:76]) }, func(h *sockopt.Held) { h.Owner = sockopt.Root }, false},
		{"of a socket without a file", func(b []byte) { clear(b[72:]) }, func(h *sockopt.Held) { h.Owner = sockopt.Owner{} }, false},
		{"a file that is none", func(b []byte) { b[76] = 2 }, nil, false},
		{"another end", func(b []byte) { b[79] = 1 }, nil, false},
		{"TCP-MD5", func(b []byte) { b[68] = uint8(sockopt.MD5) }, func(h *sockopt.Held) { h.Kind = sockopt.MD5 }, false},
		{"for an IPv6 peer", func(b []byte) { copy(b[32:], v6[:]); b[69], b[70] = afInet6, 32 },
			func(h *sockopt.Held) { h.Peer = netip.MustParsePrefix("2001:db8::/32") }, false},
		{"for an IPv4-mapped peer", func(b []byte) { copy(b[32:], mapped[:]); b[69], b[70] = afInet6, 120 }, func(*sockopt.Held) {}, false},
		{"a listener's", func(b []byte) { b[67] = 10 }, func(h *sockopt.Held) { h.State, h.Remote = sockopt.Listen, netip.AddrPort{} }, false},
		{"a listener without", func(b []byte) { b[67], b[68], b[69], b[70] = 10, 0, 0, 0 }, func(h *sockopt.Held) {
			h.State, h.Remote, h.Kind, h.Peer = sockopt.Listen, netip.AddrPort{}, 0, netip.Prefix{}
		}, false},
		{"a connection without", func(b []byte) { b[68], b[69], b[70] = 0, 0, 0 }, nil, false},
		{"another size", func(b []byte) { hostOrder.PutUint16(b[60:], 72) }, nil, false},
		{"too long a prefix", func(b []byte) { b[70] = 33 }, nil, false},
		{"too short a prefix", func(b []byte) { copy(b[32:], mapped[:]); b[69], b[70] = afInet6, 24 }, nil, false},
		{"a kind that isn't", func(b []byte) { b[68] = 3 }, nil, false},
		{"a family that isn't", func(b []byte) { b[66] = 1 }, nil, false},
		{"a peer's that isn't", func(b []byte) { b[69] = 1 }, nil, false},
		{"zeros", func(b []byte) { clear(b) }, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := heldRecord()
			tt.change(b)
			var got []sockopt.Held
			rest, err := decodeHeld(join(b, heldRecord()[:10]), func(h sockopt.Held, more bool) {
				got = append(got, h)
				if more != tt.more {
					t.Errorf("more: %t", more)
				}
			})
			if tt.want == nil {
				if err == nil || len(got) != 0 {
					t.Errorf("%+v, want an error", got)
				}
				return
			}
			want := all
			tt.want(&want)
			if diff := cmp.Diff([]sockopt.Held{want}, got, cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{})); diff != "" || err != nil || len(rest) != 10 {
				t.Errorf("%d bytes left, %v (-want +got):\n%s", len(rest), err, diff)
			}
		})
	}
}

// FuzzDecodeHeld holds that a record is a key for a peer that can be, or an error.
func FuzzDecodeHeld(f *testing.F) {
	f.Add(heldRecord())
	f.Add(join(heldRecord(), heldRecord()[:70]))
	f.Fuzz(func(t *testing.T, b []byte) {
		var rows int
		rest, err := decodeHeld(b, func(h sockopt.Held, _ bool) {
			rows++
			if h.Kind == 0 != !h.Peer.IsValid() || h.Peer.IsValid() && (h.Peer != h.Peer.Masked() || h.Peer.Addr().Is4In6()) || h.Local.Addr().Is4In6() {
				t.Errorf("%+v", h)
			}
		})
		if len(rest) != len(b)-rows*heldSize || err == nil && len(rest) >= heldSize {
			t.Errorf("%d rows of %d bytes, %d left, %v", rows, len(b), len(rest), err)
		}
	})
}
