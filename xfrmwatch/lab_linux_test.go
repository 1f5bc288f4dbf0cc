package xfrmwatch

import (
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lab is a fresh namespace with one device, whose MTU is the link's, and a Watcher.
type lab struct {
	*testing.T
	*requester
	*mirror
	dev netlink.Link
	mtu int
	spi SPI
}

func (l *lab) must(err error) {
	l.T.Helper()
	if err != nil {
		l.T.Fatal(err)
	}
}

// newLab needs ESP unless policies alone will do.
func newLab(t *testing.T, esp bool) *lab {
	t.Helper()
	if esp && os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs ESP in the kernel: runs in the test kernel")
	}
	newNetns(t)
	l := &lab{T: t, requester: newRequester(t), spi: 0x1000, mtu: 1500}
	lo, err := netlink.LinkByName("lo")
	l.must(err)
	l.must(netlink.LinkSetUp(lo))
	la := netlink.NewLinkAttrs()
	la.Name = "link0"
	l.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "link1"}))
	for _, name := range []string{"link0", "link1"} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0)
		if l.dev, err = netlink.LinkByName(name); err != nil {
			t.Fatal(err)
		}
		l.must(netlink.LinkSetUp(l.dev))
	}
	l.dev, err = netlink.LinkByName("link0")
	l.must(err)
	l.address()
	l.mirror = newMirror(t, Options{})
	l.fresh()
	return l
}

// address gives the device 10.0.0.1 and fd00::1; all of 10.0.0.0/8 and fd00::/8 is on the link.
func (l *lab) address() {
	l.T.Helper()
	for _, s := range []string{"10.0.0.1/8", "fd00::1/8"} {
		a, err := netlink.ParseAddr(s)
		l.must(err)
		a.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrReplace(l.dev, a); err != nil {
			l.T.Fatalf("%s: %v", s, err)
		}
	}
}

func (l *lab) setMTU(mtu int) {
	l.T.Helper()
	l.must(netlink.LinkSetMTU(l.dev, mtu))
	l.mtu = mtu
	if mtu >= 1280 {
		l.address() // IPv6 loses its addresses below 1280
	}
}

func (l *lab) path(*SA) (int, bool) { return l.mtu, true }

// The key lengths, in bytes, that the kernel wants.
var keyLengths = map[string]int{
	"rfc4106(gcm(aes))": 20, "rfc4309(ccm(aes))": 19, "rfc4543(gcm(aes))": 20, "rfc7539esp(chacha20,poly1305)": 36,
	"ecb(cipher_null)": 0, "cbc(des)": 8, "cbc(des3_ede)": 24, "cbc(cast5)": 16, "cbc(blowfish)": 16, "cbc(aes)": 16,
	"cbc(serpent)": 16, "cbc(camellia)": 16, "cbc(twofish)": 16, "cbc(sm4)": 16, "rfc3686(ctr(aes))": 20,
	"digest_null": 0, "hmac(md5)": 16, "hmac(sha1)": 20, "hmac(sha256)": 32, "hmac(sha384)": 48, "hmac(sha512)": 64,
	"hmac(rmd160)": 20, "xcbc(aes)": 16, "cmac(aes)": 16, "hmac(sm3)": 32,
}

func testKey(name string) []byte {
	key := make([]byte, keyLengths[name])
	for i := range key {
		key[i] = byte(7*i + 1)
	}
	return key
}

func (l *lab) trySA(s *SA) error {
	return l.try(msgNewSA, wireSA(s, saKeys{testKey(s.Enc.Name), testKey(s.Auth.Name), testKey(s.AEAD.Name)}))
}

func (l *lab) deleteSA(s *SA) { l.T.Helper(); l.do(msgDelSA, wireSAID(s.Key)) }

// flowMTU is what the kernel says to a UDP socket that is connected to dst.
func (l *lab) flowMTU(dst netip.Addr) int {
	l.T.Helper()
	fd, err := connected(dst)
	if err != nil {
		l.T.Fatalf("connect to %s: %v", dst, err)
	}
	defer unix.Close(fd)
	level, opt := unix.SOL_IP, unix.IP_MTU
	if dst.Is6() {
		level, opt = unix.SOL_IPV6, unix.IPV6_MTU
	}
	mtu, err := unix.GetsockoptInt(fd, level, opt)
	l.must(err)
	return mtu
}

func connected(dst netip.Addr) (int, error) {
	family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: 9, Addr: [4]byte(dst.AsSlice())})
	if dst.Is6() {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: 9, Addr: dst.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, to); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// The addresses of the lab: our own, the tunnels' peers, and the inner destination.
var (
	own   = map[Family]netip.Addr{IPv4: netip.MustParseAddr("10.0.0.1"), IPv6: netip.MustParseAddr("fd00::1")}
	peers = map[Family]netip.Addr{IPv4: netip.MustParseAddr("10.9.0.9"), IPv6: netip.MustParseAddr("fd09::9")}
	inner = map[Family]netip.Addr{IPv4: netip.MustParseAddr("10.2.0.1"), IPv6: netip.MustParseAddr("fd02::1")}
)

// covered waits until the DB has the policy, with so many SAs, and returns its coverage.
func (l *lab) covered(p *Policy, sas int) (c Coverage) {
	l.T.Helper()
	l.wait("policy and SAs", func(db *DB) bool {
		if db.SACount() != sas {
			return false
		}
		for q := range db.Policies() {
			if q.Dir == Out && q.Selector == p.Selector && slices.Equal(q.Templates, p.Templates) {
				c = db.Coverage(q)[0]
				return true
			}
		}
		return false
	})
	return c
}

func (l *lab) compare(what string, p *Policy, sas int) {
	l.T.Helper()
	c := l.covered(p, sas)
	want := l.flowMTU(p.Selector.Dst.Addr())
	got, why := c.MTU(l.path, l.mtu)
	if why != MTUKnown || got != want {
		l.T.Errorf("%s, link %d: computed %d (%v), the kernel says %d", what, l.mtu, got, why, want)
	}
}
