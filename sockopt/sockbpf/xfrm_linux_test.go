package sockbpf

import (
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// TestCoveredConnection is KERNEL.md 3, as the kernel's own sockets say it. The connections stay in SYN_SENT, since nobody answers, but
// have their route. Whether ESP takes super-packets is computed twice: by the kernel for the socket (sk_setup_caps), and by us.
func TestCoveredConnection(t *testing.T) {
	for _, w := range []struct{ name, near, far, bits string }{
		{"v4", "192.0.2.1", "192.0.2.2", "/24"},
		{"v6", "fd00:3::1", "fd00:3::2", "/64"},
	} {
		t.Run(w.name, func(t *testing.T) {
			enterNS(t)
			it := openIter(t)
			run(t, "ip link add near type veth peer name far")
			run(t, "ip link set near up")
			run(t, "ip link set far up")
			run(t, "ip addr add "+w.near+w.bits+" dev near nodad")
			connect := func() sockopt.Conn {
				t.Helper()
				s := newSocket(t, netip.AddrPortFrom(netip.MustParseAddr(w.near), 0))
				if err := unix.SetNonblock(int(s), true); err != nil {
					t.Fatal(err)
				}
				to := sockaddr(netip.AddrPortFrom(netip.MustParseAddr(w.far), 179))
				if err := unix.Connect(int(s), to); !errors.Is(err, unix.EINPROGRESS) {
					t.Fatalf("connect: %v", err)
				}
				return list(t, it)[s.inode(t)]
			}
			plain := connect()
			if plain.Route.XFRM || plain.Route.Offload || plain.Route.HeaderLen != 0 || plain.Segmentation() != sockopt.SegOffload {
				t.Errorf("without a policy: %s: %+v", plain.Segmentation(), plain)
			}

			run(t, "ip xfrm policy add dir out src "+w.near+" dst "+w.far+" tmpl proto esp mode transport reqid 5450")
			// Asking for offload loads esp4_offload or esp6_offload; the device can't do it, and the SA is there without.
			for _, offload := range []string{"", " offload dev near dir out"} {
				sa := "src " + w.near + " dst " + w.far + " proto esp spi 5450"
				add := "ip xfrm state add " + sa + " mode transport reqid 5450 aead rfc4106(gcm(aes)) 0x" + strings.Repeat("5a", 20) + " 128" + offload
				if out, err := exec.Command("ip", strings.Fields(add)[1:]...).CombinedOutput(); err != nil {
					t.Skipf("needs ESP (%s: %s)", add, strings.TrimSpace(string(out)))
				}
				c := connect()
				want := sockopt.SegNone
				if c.Route.Offload {
					want = sockopt.SegSoftware
				}
				if !c.Route.XFRM || c.Route.HeaderLen == 0 || c.Route.DeviceESP || c.GSO != c.Route.Offload || c.GSODisabled || c.Segmentation() != want {
					t.Errorf("covered: %s, want %s: %+v", c.Segmentation(), want, c)
				}
				t.Logf("SA%s: ESP takes super-packets: %t, %s", offload, c.Route.Offload, c.Segmentation())
				run(t, "ip xfrm state delete "+sa)
			}
		})
	}
}
