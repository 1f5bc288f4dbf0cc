package bench

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// Lab is the namespace that this process is in, with the world's tables.
type Lab struct {
	world   *World
	uplinks [Uplinks]uint32 // their ifindexes
	routes  *sock
	xfrm    *sock
}

// newLab makes the links and, as a host without a way out has nothing to lock, the default routes. There is nothing else in the tables.
func newLab(w *World) (*Lab, error) {
	l := &Lab{world: w}
	var err error
	if l.routes, err = dial(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	if l.xfrm, err = dial(unix.NETLINK_XFRM); err != nil {
		return nil, err
	}
	for _, setting := range [][2]string{
		{"ipv4/ip_forward", "1"}, {"ipv6/conf/all/forwarding", "1"},
		{"ipv6/conf/default/accept_dad", "0"}, // no address comes later, by itself
	} {
		if err := os.WriteFile("/proc/sys/net/"+setting[0], []byte(setting[1]), 0o644); err != nil {
			return nil, err
		}
	}
	// The kernel keeps no more IPv6 routes than this (net.ipv6.route.max_size), on kernels before 6.3.
	_ = os.WriteFile("/proc/sys/net/ipv6/route/max_size", []byte("2147483647"), 0o644)
	if err := ip("link set lo up", "addr add "+localEnd.String()+"/32 dev lo"); err != nil {
		return nil, err
	}
	for i := range Uplinks {
		dev := fmt.Sprintf("up%d", i)
		if err := ip("link add "+dev+" type veth peer name "+dev+"-peer", "link set "+dev+"-peer up", "link set "+dev+" up",
			fmt.Sprintf("addr add 192.168.%d.1/24 dev %s", i, dev), fmt.Sprintf("addr add fd99:%x::1/64 dev %s nodad", i, dev)); err != nil {
			return nil, err
		}
		found, err := net.InterfaceByName(dev)
		if err != nil {
			return nil, err
		}
		l.uplinks[i] = uint32(found.Index)
	}
	return l, l.write(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, w.routes(Route.isDefault))
}

// ip runs commands of iproute2.
func ip(commands ...string) error {
	for _, c := range commands {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", c, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// fill fills the tables with the world. The policies come first: for each IPv6 policy the kernel walks all IPv6 routes (rt_genid_bump_ipv6
// in xfrm_policy_insert), which with 200,000 takes it 54 ms.
func (l *Lab) fill() error {
	if err := l.writePolicies(xfrmNewPolicy, l.world.Policies); err != nil {
		return err
	}
	return l.write(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, l.world.routes(func(r Route) bool { return !r.isDefault() }))
}

// write writes routes of either family.
func (l *Lab) write(typ, flags uint16, list []Route) error {
	err := l.routes.batch(len(list), typ, flags, func(i int, b []byte) []byte { return list[i].body(b, &l.uplinks) })
	if err != nil {
		return fmt.Errorf("routes: %w", err)
	}
	return nil
}

func (l *Lab) writePolicies(typ uint16, list []Policy) error {
	err := l.xfrm.batch(len(list), typ, 0, func(i int, b []byte) []byte {
		if typ == xfrmDelPolicy {
			return list[i].id(b)
		}
		return list[i].body(b)
	})
	if err != nil {
		return fmt.Errorf("policies: %w", err)
	}
	return nil
}

// replaced is the routes with another gateway each.
func replaced(list []Route, by int) []Route {
	out := make([]Route, len(list))
	for i, r := range list {
		out[i] = Route{Dst: r.Dst, Gateway: (r.Gateway + by) % gateways}
	}
	return out
}
