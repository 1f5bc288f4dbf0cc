package scenario

import (
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var comparePacket = cmp.Options{cmp.AllowUnexported(packet{}, filter{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}

func TestParseFilter(t *testing.T) {
	for _, test := range []struct {
		words string
		want  filter
		err   bool
	}{
		{"", filter{}, false},
		{"dst 10.2.0.0/16 proto tcp", filter{dst: netip.MustParsePrefix("10.2.0.0/16"), proto: 6}, false},
		{"src fd00::1 proto esp", filter{src: netip.MustParsePrefix("fd00::1/128"), proto: 50}, false},
		{"sport 5001 dport 80 proto any", filter{sport: 5001, dport: 80}, false},
		{"dst", filter{}, true},
		{"dst 10.2.0.0/33", filter{}, true},
		{"proto sctp", filter{}, true},
		{"port 80", filter{}, true},
		{"dport 70000", filter{}, true},
	} {
		t.Run(test.words, func(t *testing.T) {
			got, err := parseFilter(strings.Fields(test.words))
			if (err != nil) != test.err {
				t.Fatalf("error %v", err)
			}
			if err != nil {
				if !errors.Is(err, errUsage) {
					t.Errorf("%v is no usage error", err)
				}
				return
			}
			if diff := cmp.Diff(test.want, got, comparePacket); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

const (
	tcp4 = "450000000000400040060000" + "0a0000010a020001" + "1389c000000000010000000280100200abcd0000" + "0101080a0000000000000000"
	tcp6 = "6000000000000640" + "fd000000000000000000000000000001" + "fd020000000000000000000000000001" + "1389c000000000010000000250100200abcd0000"
	esp4 = "450000000000400040320000" + "c0000201c0000202" + "0000100100000001"
)

func TestParsePacket(t *testing.T) {
	for _, test := range []struct {
		name, data string
		length     int
		want       packet
		isData     bool
	}{
		{"TCP over IPv4, super-packet", tcp4, 65000, packet{
			src: netip.MustParseAddr("10.0.0.1"), dst: netip.MustParseAddr("10.2.0.1"), proto: 6, sport: 5001, dport: 49152, payload: 65000 - 52,
		}, true},
		{"acknowledgement", tcp4, 52, packet{
			src: netip.MustParseAddr("10.0.0.1"), dst: netip.MustParseAddr("10.2.0.1"), proto: 6, sport: 5001, dport: 49152,
		}, false},
		{"TCP over IPv6", tcp6, 1500, packet{
			src: netip.MustParseAddr("fd00::1"), dst: netip.MustParseAddr("fd02::1"), proto: 6, sport: 5001, dport: 49152, payload: 1440,
		}, true},
		{"ESP", esp4, 1496, packet{
			src: netip.MustParseAddr("192.0.2.1"), dst: netip.MustParseAddr("192.0.2.2"), proto: 50, payload: 1468,
		}, true},
		{"ESP with an acknowledgement in it", esp4, 108, packet{
			src: netip.MustParseAddr("192.0.2.1"), dst: netip.MustParseAddr("192.0.2.2"), proto: 50, payload: 80,
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			data, err := hex.DecodeString(test.data)
			if err != nil {
				t.Fatal(err)
			}
			got, err := parsePacket(data, test.length)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, comparePacket); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if got.isData() != test.isData {
				t.Errorf("isData %v", got.isData())
			}
		})
	}
}

func FuzzParsePacket(f *testing.F) {
	for _, text := range []string{tcp4, tcp6, esp4} {
		data, err := hex.DecodeString(text)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parsePacket(data, len(data))
		if err == nil && (!p.src.IsValid() || !p.dst.IsValid()) {
			t.Errorf("no addresses in %+v", p)
		}
	})
}

func TestParseEventually(t *testing.T) {
	for _, test := range []struct {
		line    string
		err     bool
		negated bool
		args    string
	}{
		{"1s in left true", false, false, "in left true"},
		{"1s ! in left true", false, true, "in left true"},
		{"1s in left ip route -- stdout mtu", false, false, "in left ip route"},
		{"1s in left ip route -- ! stdout mtu", false, false, "in left ip route"},
		{"1s in left ip route -- stderr mtu", true, false, ""},
		{"soon in left true", true, false, ""},
		{"1s -- stdout x", true, false, ""},
		{"1s", true, false, ""},
	} {
		t.Run(test.line, func(t *testing.T) {
			c, err := parseEventually(strings.Fields(test.line))
			if (err != nil) != test.err {
				t.Fatalf("error %v", err)
			}
			if err == nil && (c.negated != test.negated || strings.Join(c.args, " ") != test.args) {
				t.Errorf("got %+v", c)
			}
		})
	}
}
