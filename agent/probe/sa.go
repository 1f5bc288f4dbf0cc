package probe

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// SAName names the algorithms of an SA as the kernel names them: that of the combined
// algorithm, else "encryption+authentication". Empty names are left out.
func SAName(enc, auth, aead string) string {
	switch {
	case aead != "":
		return aead
	case enc == "" || auth == "":
		return enc + auth
	}
	return enc + "+" + auth
}

// DefaultSA is the SA that is probed unless told.
const DefaultSA = "rfc4106(gcm(aes))"

// An algorithm is a name and its parameters: key length in bytes, and the length of the
// integrity check value in bits.
type algorithm struct {
	name string
	key  int
	icv  int
}

// A suite is what an SA of the probe is made of: aead, or enc and auth.
type suite struct {
	enc, auth, aead algorithm
}

func (s suite) name() string { return SAName(s.enc.name, s.auth.name, s.aead.name) }

// The suites by the names that IKE daemons and people use. Key lengths include the salt
// (RFC 4106, 4309, 4543, 7634).
var suites = map[string]suite{
	"aes-gcm":        {aead: algorithm{"rfc4106(gcm(aes))", 16 + 4, 128}},
	"aes256-gcm":     {aead: algorithm{"rfc4106(gcm(aes))", 32 + 4, 128}},
	"aes-ccm":        {aead: algorithm{"rfc4309(ccm(aes))", 16 + 3, 128}},
	"aes-gmac":       {aead: algorithm{"rfc4543(gcm(aes))", 16 + 4, 128}},
	"chacha20":       {aead: algorithm{"rfc7539esp(chacha20,poly1305)", 32 + 4, 128}},
	"aes-cbc-sha1":   {enc: algorithm{"cbc(aes)", 16, 0}, auth: algorithm{"hmac(sha1)", 20, 96}},
	"aes-cbc-sha256": {enc: algorithm{"cbc(aes)", 16, 0}, auth: algorithm{"hmac(sha256)", 32, 128}},
	"aes-cbc-sha512": {enc: algorithm{"cbc(aes)", 32, 0}, auth: algorithm{"hmac(sha512)", 64, 256}},
	"null-sha256":    {enc: algorithm{"ecb(cipher_null)", 0, 0}, auth: algorithm{"hmac(sha256)", 32, 128}},
}

// SANames returns the short names of the SAs that can be probed, in order.
func SANames() []string { return slices.Sorted(maps.Keys(suites)) }

// suiteOf finds a suite by its short name or by SAName.
func suiteOf(name string) (suite, error) {
	if s, ok := suites[name]; ok {
		return s, nil
	}
	// aes-gcm precedes aes256-gcm, which has the same name.
	for _, short := range SANames() {
		if s := suites[short]; s.name() == name && short != "aes256-gcm" {
			return s, nil
		}
	}
	return suite{}, fmt.Errorf("there is no SA %q; known are %s", name, strings.Join(SANames(), ", "))
}
