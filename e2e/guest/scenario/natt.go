package scenario

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// natt opens what an IKE daemon has for NAT traversal: a UDP socket whose ESP packets the kernel takes for itself (UDP_ENCAP,
// udp(7) and RFC 3948). It stays open until the machine ends.
func (s *session) natt(_ context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 2 {
		return "", usage("natt namespace address:port")
	}
	at, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return "", usage(err.Error())
	}
	const udpEncap, espInUDP = 100, 2 // UDP_ENCAP, UDP_ENCAP_ESPINUDP (linux/udp.h)
	return "", inNamespace(args[0], func() error {
		family := unix.AF_INET
		var sa unix.Sockaddr
		if at.Addr().Is6() {
			family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
		} else {
			sa = &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("nat-t socket: %w", err)
		}
		if err := unix.Bind(fd, sa); err != nil {
			return fmt.Errorf("nat-t socket: bind %s: %w", at, err)
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_UDP, udpEncap, espInUDP); err != nil {
			return fmt.Errorf("nat-t socket: UDP_ENCAP: %w", err)
		}
		return nil
	})
}
