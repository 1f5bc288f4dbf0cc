package xfrmwatch

import (
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// namedSA builds the SA that a row of testdata/esp-mtu.csv names.
func namedSA(t *testing.T, alg, mode, outer, inner, encap, proto string) *SA {
	t.Helper()
	s := &SA{Proto: ESP, Family: IPv4, Mode: Tunnel, HasSelector: true}
	if outer == "v6" {
		s.Family = IPv6
	}
	s.Selector.Family = IPv4
	if inner == "v6" {
		s.Selector.Family = IPv6
	}
	if mode == "transport" {
		s.Mode = Transport
	}
	if encap != "" {
		s.Encap = Encap{Type: encapESPInUDP, Sport: 4500, Dport: 4500}
	}
	enc, auth, _ := strings.Cut(alg, "-")
	aead := map[string]Algorithm{
		"gcm16": {"rfc4106(gcm(aes))", 128}, "gcm8": {"rfc4106(gcm(aes))", 64},
		"ccm16": {"rfc4309(ccm(aes))", 128}, "gmac16": {"rfc4543(gcm(aes))", 128},
		"chacha": {"rfc7539esp(chacha20,poly1305)", 128},
	}
	ciphers := map[string]string{
		"cbc": "cbc(aes)", "3des": "cbc(des3_ede)", "null": "ecb(cipher_null)", "ctr": "rfc3686(ctr(aes))",
	}
	auths := map[string]Algorithm{
		"sha1": {"hmac(sha1)", 96}, "sha256": {"hmac(sha256)", 128}, "sha384": {"hmac(sha384)", 192},
		"sha512": {"hmac(sha512)", 256}, "xcbc": {"xcbc(aes)", 96}, "noauth": {}, "md5": {"hmac(md5)", 96},
	}
	var ok bool
	switch {
	case proto == "ah":
		s.Proto = AH
		s.Auth, ok = auths[auth]
	case auth == "":
		s.AEAD, ok = aead[enc]
	default:
		s.Enc.Name, ok = ciphers[enc]
		s.Auth = auths[auth]
	}
	if !ok {
		t.Fatalf("unknown algorithm %q", alg)
	}
	return s
}

func TestInnerMTUMeasured(t *testing.T) {
	f, err := os.Open("testdata/esp-mtu.csv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 91 {
		t.Errorf("%d rows, want a heading and 90", len(rows))
	}
	for _, row := range rows[1:] {
		t.Run(strings.Join(row[:8], ","), func(t *testing.T) {
			link, _ := strconv.Atoi(row[7])
			want, _ := strconv.Atoi(row[8])
			s := namedSA(t, row[0], row[1], row[2], row[3], row[4], row[6])
			if got, ok := s.InnerMTU(link); !ok || got != want {
				t.Errorf("inner mtu %d, %v, want %d", got, ok, want)
			}
			costs, inner, err := s.Costs(link)
			if err != nil {
				t.Fatal(err)
			}
			sum := inner
			for _, c := range costs {
				sum += c.Bytes
			}
			if sum != link {
				t.Errorf("costs %v and inner mtu %d give %d, want %d", costs, inner, sum, link)
			}
		})
	}
}

// The names of KERNEL.md 23, and what xfrm_algo.c takes where only XFRMA_ALG_AUTH came.
func TestInnerMTU(t *testing.T) {
	cbc := func(auth Algorithm) SA {
		return SA{Proto: ESP, Family: IPv6, Mode: Tunnel, Enc: Algorithm{Name: "cbc(aes)"}, Auth: auth}
	}
	beet := SA{Proto: ESP, Family: IPv4, Mode: BEET, AEAD: Algorithm{"rfc4106(gcm(aes))", 128},
		HasSelector: true, Selector: Selector{Family: IPv4}}
	beet46, beet64 := beet, beet
	beet46.Selector.Family = IPv6
	beet64.Family = IPv6
	ah := SA{Proto: AH, Family: IPv4, Mode: Transport, Auth: Algorithm{"hmac(sha256)", 128}, Flags: 64}
	ah6 := ah
	ah6.Family = IPv6
	tcp := namedSA(t, "gcm16", "tunnel", "v4", "v4", "", "esp")
	tcp.Encap.Type = encapESPInTCP
	for _, tt := range []struct {
		name      string
		sa        SA
		mtu, want int
	}{
		{"sha256 by its old length", cbc(Algorithm{Name: "hmac(sha256)"}), 1500, 1422},
		{"sha256 by its compat name", cbc(Algorithm{Name: "sha256"}), 1500, 1422},
		{"sha256 with 128 bits", cbc(Algorithm{"hmac(sha256)", 128}), 1500, 1406},
		{"digest_null", cbc(Algorithm{Name: "digest_null"}), 1500, 1422},
		{"beet 4 in 4", beet, 1500, (1500-8-8-8-16-20)/4*4 + 20 - 2},
		{"beet 6 in 4", beet46, 1500, (1500-8-8-16-20)/4*4 + 20 - 2},
		{"beet 4 in 6", beet64, 1500, (1500-8-8-28-16-40)/4*4 + 40 - 2},
		{"ah align4", ah, 1500, 1472},
		{"ah align4 counts on IPv4 only", ah6, 1500, 1468},
		{"esp in tcp", *tcp, 1500, (1500-20-8-8-2-16)/4*4 - 2},
		{"ipcomp tunnel", SA{Proto: Comp, Family: IPv4, Mode: Tunnel, Comp: Algorithm{Name: "deflate"}}, 1500, 1480},
		{"ipcomp transport", SA{Proto: Comp, Family: IPv4, Comp: Algorithm{Name: "deflate"}}, 1500, 1500},
		{"nothing left", *tcp, 50, 1},
		{"next to nothing left", *tcp, 57, 1},
		{"ah, nothing left", ah, 28, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got, ok := tt.sa.InnerMTU(tt.mtu); !ok || got != tt.want {
				t.Errorf("got %d, %v, want %d", got, ok, tt.want)
			}
		})
	}
}

func TestUnknownMTUSaysWhy(t *testing.T) {
	good := *namedSA(t, "cbc-sha1", "tunnel", "v4", "v4", "", "esp")
	change := func(f func(*SA)) SA { s := good; f(&s); return s }
	for _, tt := range []struct {
		name, reason string
		sa           SA
		is           error
	}{
		{"cipher", `cipher "cbc(rot13)"`, change(func(s *SA) { s.Enc.Name = "cbc(rot13)" }), ErrUnknownMTU},
		{"auth", `authentication "crc"`, change(func(s *SA) { s.Auth = Algorithm{Name: "crc"} }), ErrUnknownMTU},
		{"aead", `aead "x"`, change(func(s *SA) { s.AEAD.Name = "x" }), ErrUnknownMTU},
		{"iptfs", "iptfs", change(func(s *SA) { s.Mode = IPTFS }), ErrUnknownMTU},
		{"mode", "mode 2", change(func(s *SA) { s.Mode = RouteOpt }), ErrUnknownMTU},
		{"encap", "encapsulation type 9", change(func(s *SA) { s.Encap.Type = 9 }), ErrUnknownMTU},
		{"family", "family 0", change(func(s *SA) { s.Family = 0 }), ErrUnknownMTU},
		{"larval", "larval", change(func(s *SA) { s.Larval = true }), ErrLarval},
		{"ah without auth", "larval", change(func(s *SA) { s.Proto, s.Auth = AH, Algorithm{} }), ErrLarval},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, ok := tt.sa.InnerMTU(1500); ok {
				t.Error("ok")
			}
			_, _, err := tt.sa.Costs(1500)
			if !errors.Is(err, tt.is) || !strings.Contains(fmt.Sprint(err), tt.reason) {
				t.Errorf("got %v, want %q", err, tt.reason)
			}
		})
	}
}

func TestInnerMTUNeverGrows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSA().Draw(t, "sa")
		mtu := rapid.IntRange(0, 70000).Draw(t, "mtu")
		inner, ok := s.InnerMTU(mtu)
		next, _ := s.InnerMTU(mtu + 1)
		if ok && (inner < 1 || inner > max(mtu, 1) || next < inner) {
			t.Errorf("%d gives %d, %d gives %d", mtu, inner, mtu+1, next)
		}
	})
}
