package routes

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// advertise sends a router advertisement into a namespace by one end of a veth pair, from a router with
// this link-local address.
func advertise(t *testing.T, dev string, router netip.Addr) {
	t.Helper()
	ifi, err := net.InterfaceByName(dev)
	if err != nil {
		t.Fatal(err)
	}
	all := netip.MustParseAddr("ff02::1")
	// Type 134, code 0, checksum, hop limit, flags, router lifetime in seconds, two timers.
	ra := make([]byte, 16)
	ra[0], ra[4] = 134, 64
	binary.BigEndian.PutUint16(ra[6:], 1800)
	sum := uint32(len(ra)) + unix.IPPROTO_ICMPV6
	for _, b := range [][]byte{router.AsSlice(), all.AsSlice(), ra} {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(ra[2:], ^uint16(sum))
	p := []byte{0x60, 0, 0, 0, 0, byte(len(ra)), unix.IPPROTO_ICMPV6, 255}
	p = append(append(append(p, router.AsSlice()...), all.AsSlice()...), ra...)
	proto := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_IPV6))
	s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	to := &unix.SockaddrLinklayer{Protocol: proto, Ifindex: ifi.Index, Halen: 6, Addr: [8]byte{0x33, 0x33, 0, 0, 0, 1}}
	if err := unix.Sendto(s, p, 0, to); err != nil {
		t.Fatal(err)
	}
}

// TestAdvertisedRoutersStayApart: the kernel does not join the default routes of two routers that advertise
// themselves, so the event of the second says nothing of the first.
func TestAdvertisedRoutersStayApart(t *testing.T) {
	vethNS(t)
	for _, name := range []string{"accept_ra", "accept_ra_defrtr"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/a0/"+name, []byte("2"), 0); err != nil {
			t.Fatal(err)
		}
	}
	ip(t, "-6 addr add fe80::a/64 dev a0 nodad")
	f := follow(t, WatchOptions{})
	f.exact()
	for _, router := range []string{"fe80::1", "fe80::2"} {
		gw := netip.MustParseAddr(router)
		advertise(t, "a1", gw)
		f.until(func(ev Event) bool {
			set, ok := ev.(RouteSet)
			return ok && set.Route.Dst == IPv6.Any() && set.Route.Body.Nexthops[0].Gateway == gw
		})
	}
	if _, n := f.fib.Get(Key{Family: IPv6, Table: TableMain, Dst: IPv6.Any(), Priority: 1024}); n != 2 {
		t.Errorf("%d default routes, want one for each router", n)
	}
	f.exact()
}
