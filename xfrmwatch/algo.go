package xfrmwatch

import "strings"

// cipher is what the MTU depends on: the IV that each packet carries and the block that the
// payload is padded to, in bytes. Blocks below 4 count as 4 (ESP's own alignment).
type cipher struct{ iv, block int }

// ciphers are the encryption algorithms by the kernel's name (ealg_list and its compat names,
// net/xfrm/xfrm_algo.c); IV and block are those of the crypto API's algorithm.
var ciphers = map[string]cipher{
	"ecb(cipher_null)":  {0, 1},
	"cipher_null":       {0, 1},
	"cbc(des)":          {8, 8},
	"des":               {8, 8},
	"cbc(des3_ede)":     {8, 8},
	"des3_ede":          {8, 8},
	"cbc(cast5)":        {8, 8},
	"cast5":             {8, 8},
	"cbc(blowfish)":     {8, 8},
	"blowfish":          {8, 8},
	"cbc(aes)":          {16, 16},
	"aes":               {16, 16},
	"cbc(serpent)":      {16, 16},
	"serpent":           {16, 16},
	"cbc(camellia)":     {16, 16},
	"camellia":          {16, 16},
	"cbc(twofish)":      {16, 16},
	"twofish":           {16, 16},
	"cbc(sm4)":          {16, 16},
	"sm4":               {16, 16},
	"rfc3686(ctr(aes))": {8, 1},
}

// aeads are the combined algorithms (aead_list). Their ICV length always comes with the SA.
var aeads = map[string]cipher{
	"rfc4106(gcm(aes))":             {8, 1},
	"rfc4309(ccm(aes))":             {8, 1},
	"rfc4543(gcm(aes))":             {8, 1},
	"rfc7539esp(chacha20,poly1305)": {8, 1},
}

// authICVBits are the ICV lengths in bits that the kernel takes where only XFRMA_ALG_AUTH came,
// or XFRMA_ALG_AUTH_TRUNC with length 0 (icv_truncbits of aalg_list). They are the kernel's, not
// the RFCs': HMAC-SHA-256 has 96 bits here, RFC 4868 has 128.
var authICVBits = map[string]int{
	"digest_null":  0,
	"hmac(md5)":    96,
	"md5":          96,
	"hmac(sha1)":   96,
	"sha1":         96,
	"hmac(sha256)": 96,
	"sha256":       96,
	"hmac(sha384)": 192,
	"hmac(sha512)": 256,
	"hmac(rmd160)": 96,
	"rmd160":       96,
	"xcbc(aes)":    96,
	"cmac(aes)":    96,
	"hmac(sm3)":    256,
	"sm3":          256,
}

// Suite names the SA's algorithms as the kernel does: "rfc4106(gcm(aes))", or
// "cbc(aes)+hmac(sha256)" where encryption and authentication are two.
func (s *SA) Suite() string {
	var names []string
	for _, a := range []Algorithm{s.AEAD, s.Enc, s.Auth, s.Comp} {
		if a.Name != "" {
			names = append(names, a.Name)
		}
	}
	return strings.Join(names, "+")
}
