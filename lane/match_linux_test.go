package lane

import (
	"net/netip"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// datagrams sends ten datagrams of a size to an address, with these IPv6 hop-by-hop options.
func datagrams(t *testing.T, to string, size int, hopopts string) {
	t.Helper()
	ap := netip.MustParseAddrPort(to)
	domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(ap.Port())})
	if ap.Addr().Is6() {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
	} else {
		sa.(*unix.SockaddrInet4).Addr = ap.Addr().As4()
	}
	s, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if hopopts != "" {
		if err := unix.SetsockoptString(s, unix.IPPROTO_IPV6, unix.IPV6_HOPOPTS, hopopts); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		if err := unix.Sendto(s, make([]byte, size), 0, sa); err != nil {
			t.Fatal(err)
		}
	}
}

// What a match means for packets that are not the plain case.
func TestKernelMatches(t *testing.T) {
	inTestKernel(t)
	client := dial(t)
	batch(t, "link add link nic name nic.5 type vlan id 5", "addr add 198.51.100.1/24 dev nic.5", "link set nic.5 up",
		"neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev nic.5")
	// The first packet is not to wait for an answer of the neighbour.
	run(t, "ping -c1 -W5 192.0.2.2")
	run(t, "ping -c1 -W5 fd00::2")
	l := Lane{Index: indexOf(t, "nic"), Name: "nic"}
	udp4 := match("192.0.2.1/32", "192.0.2.2/32", 17)
	udp4port := match("192.0.2.1/32", "192.0.2.2/32", 17, 0, 9)
	udp6port := match("fd00::1/128", "fd00::2/128", 17, 0, 9)
	for _, c := range []struct {
		name    string
		match   Match
		to      string
		size    int
		hopopts string
		want    uint64
	}{
		{"IPv4", udp4port, "192.0.2.2:9", 100, "", 10},
		{"another port", udp4port, "192.0.2.2:10", 100, "", 0},
		{"IPv6", udp6port, "[fd00::2]:9", 100, "", 10},
		// Hop-by-hop with one PadN of six bytes.
		{"IPv6 extension header", udp6port, "[fd00::2]:9", 100, "\x00\x00\x01\x04\x00\x00\x00\x00", 10},
		{"fragments by protocol", udp4, "192.0.2.2:9", 4000, "", 30},
		{"fragments have no port", udp4port, "192.0.2.2:9", 4000, "", 0},
		{"VLAN", match("0.0.0.0/0", "0.0.0.0/0", 17), "198.51.100.2:9", 100, "", 0},
	} {
		l.Matches = []Match{c.match}
		if err := client.Ensure(l); err != nil {
			t.Fatal(err)
		}
		datagrams(t, c.to, c.size, c.hopopts)
		states, err := client.List()
		if err != nil || len(states) != 1 || states[0].Packets != c.want {
			t.Errorf("%s: %+v, %v: want %d packets through the ifb", c.name, states, err, c.want)
		}
		remove(t, client, l)
	}
}

// The kernel drops what a filter redirects to a device that is down (tcf_mirred_act,
// net/sched/act_mirred.c), so a lane must be all there or not at all.
func TestKernelDownIFBDropsWhatMatches(t *testing.T) {
	inTestKernel(t)
	c := dial(t)
	l := Lane{Index: indexOf(t, "nic"), Name: "nic", Matches: []Match{match("0.0.0.0/0", "192.0.2.2/32", unix.IPPROTO_ICMP)}}
	ensure(t, c, l)
	run(t, "ping -c1 -W5 192.0.2.2")
	for _, broken := range []string{"ip link set tsolane2 down", "ip link del tsolane2"} {
		run(t, broken)
		if out, err := exec.Command("ping", "-c1", "-W1", "192.0.2.2").CombinedOutput(); err == nil {
			t.Errorf("after %s a packet passes:\n%s", broken, out)
		}
		ensure(t, c, l)
		run(t, "ping -c1 -W5 192.0.2.2")
	}
	remove(t, c, l)
	run(t, "ping -c1 -W5 192.0.2.2")
}
