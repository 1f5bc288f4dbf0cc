package scenario

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

const (
	udpUsage   = "udp-df namespace from|- to:port size"
	ipMTUUsage = "ipmtu namespace from|- to[:port]"
)

// udpDF sends one datagram that must not be fragmented, and prints what the kernel makes of it.
func (s *session) udpDF(_ context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 4 {
		return "", usage(udpUsage)
	}
	to, err := netip.ParseAddrPort(args[2])
	if err != nil {
		return "", usage(err.Error())
	}
	size, err := strconv.Atoi(args[3])
	if err != nil || size < 0 {
		return "", usage(udpUsage)
	}

	mtu, err := sendUnfragmented(args[0], args[1], to, size)
	switch {
	case err != nil:
		return "", err
	case mtu > 0:
		return fmt.Sprintf("emsgsize mtu=%d\n", mtu), nil
	}
	return "sent\n", nil
}

// ipMTU prints the MTU that a connected UDP socket sees. That is the MTU of the XFRM bundle, where there is one;
// `ip route get` doesn't know it.
func (s *session) ipMTU(_ context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 3 {
		return "", usage(ipMTUUsage)
	}
	to, err := netip.ParseAddrPort(args[2])
	if err != nil {
		addr, err := netip.ParseAddr(args[2])
		if err != nil {
			return "", usage(err.Error())
		}
		to = netip.AddrPortFrom(addr, 9) // discard
	}
	var mtu int
	err = inNamespace(args[0], func() error {
		fd, err := connectUDP(args[1], to)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		mtu, err = socketMTU(fd, to.Addr())
		return err
	})
	return fmt.Sprintln(mtu), err
}

// connectUDP opens a connected UDP socket in the thread's namespace, bound to from unless that is "-".
func connectUDP(from string, to netip.AddrPort) (fd int, err error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if from != "-" {
		addr, err := netip.ParseAddr(from)
		if err != nil {
			return -1, usage(err.Error())
		}
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(addr, 0))); err != nil {
			return -1, fmt.Errorf("bind %s: %w", from, err)
		}
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		return -1, fmt.Errorf("connect %s: %w", to, err)
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// socketMTU returns the path MTU that a connected socket sees.
func socketMTU(fd int, to netip.Addr) (int, error) {
	level, option := unix.IPPROTO_IP, unix.IP_MTU
	if to.Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	mtu, err := unix.GetsockoptInt(fd, level, option)
	if err != nil {
		return 0, fmt.Errorf("mtu of socket: %w", err)
	}
	return mtu, nil
}
