package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	vnl "github.com/vishvananda/netlink"

	"tsoagent/ethtool"
)

// What the scratch namespaces are made of. The addresses are for documentation (RFC 5737,
// 3849); nothing of them is ever seen outside. All of it is fixed, since a kernel that takes one
// header for another can behave by what an address happens to be: 6.12.117 drops what it sends
// through a gretap above ESP transport if the third byte of its MAC address is below 0x50
// (qdisc_pkt_len_init takes it for a TCP header's length), and passes all else. These have small
// bytes there.
var (
	innerMACs = [2]net.HardwareAddr{{0x02, 0, 0, 0, 0, 1}, {0x02, 0, 0, 0, 0, 2}}

	outerAddrs = map[Family][2]netip.Prefix{
		IPv4: {netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("198.51.100.2/24")},
		IPv6: {netip.MustParsePrefix("2001:db8:1::1/64"), netip.MustParsePrefix("2001:db8:1::2/64")},
	}
	innerAddrs = map[Family][2]netip.Prefix{
		IPv4: {netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/24")},
		IPv6: {netip.MustParsePrefix("2001:db8:2::1/64"), netip.MustParsePrefix("2001:db8:2::2/64")},
	}
)

const (
	nicName    = "nic"
	tunnelName = "tun"
	// tunnelMTU leaves room for every header below 1500 bytes, so that segmentation is
	// compared, and not path MTU discovery.
	tunnelMTU = 1300
	// patience bounds the waits for what takes milliseconds on an idle machine.
	patience = 5 * time.Second
)

// A lab is a sender and a receiver, with a tunnel above ESP between them.
type lab struct {
	ends     [2]*end
	shape    shape
	mode     string
	suite    suite
	kernel   Identity
	keys     [2]keys
	nic      [2]int
	tunnel   [2]int
	features *ethtool.Client // of the sender
}

const (
	sender   = 0
	receiver = 1
)

// An impossibleError says what the kernel lacks.
type impossibleError struct {
	what string
	err  error
}

func (e *impossibleError) Error() string { return e.what }
func (e *impossibleError) Unwrap() error { return e.err }

// newLab sets everything up. The error is an *impossibleError where the kernel lacks something;
// what it lacks is named, all of it.
func newLab(ctx context.Context, k Identity, s shape, mode string, u suite) (_ *lab, err error) {
	l := &lab{kernel: k, shape: s, mode: mode, suite: u}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for i, name := range []string{"sender", "receiver"} {
		if l.ends[i], err = newEnd(name); err != nil {
			return nil, err
		}
	}
	if err := l.underlay(ctx); err != nil {
		return nil, err
	}
	for i := range l.keys {
		l.keys[i] = newKeys(u)
	}
	for i, e := range l.ends {
		// Both are tried, so that all that is missing is named.
		err := e.do(func() error { return errors.Join(l.addESP(i), l.addTunnel(i)) })
		if err != nil {
			return nil, err
		}
	}
	for i, e := range l.ends {
		if err := e.do(func() error { return l.inside(i) }); err != nil {
			return nil, fmt.Errorf("%s: %w", e.name, err)
		}
	}
	err = l.ends[sender].do(func() (err error) {
		l.features, err = ethtool.Dial()
		return err
	})
	return l, err
}

// close lets go of both namespaces. It may be called again.
func (l *lab) close() {
	if l.features != nil {
		_ = l.features.Close() // only read
		l.features = nil
	}
	for i, e := range l.ends {
		if e != nil {
			e.close()
			l.ends[i] = nil
		}
	}
}

// outer returns the outer addresses as end i sees them: its own and the peer's.
func (l *lab) outer(i int) (local, remote net.IP) {
	a := outerAddrs[l.shape.outer]
	return a[i].Addr().AsSlice(), a[1-i].Addr().AsSlice()
}

// underlay joins the two namespaces with a veth pair, with outer addresses.
func (l *lab) underlay(ctx context.Context) error {
	err := l.ends[sender].do(func() error {
		veth := &vnl.Veth{LinkAttrs: vnl.LinkAttrs{Name: nicName, MTU: 1500}, PeerName: nicName, PeerNamespace: vnl.NsFd(l.ends[receiver].ns.Fd())}
		return missing(vnl.LinkAdd(veth), "veth devices (CONFIG_VETH, module veth)")
	})
	if err != nil {
		return err
	}
	for i, e := range l.ends {
		err := e.do(func() error {
			if err := sysctls(); err != nil {
				return err
			}
			link, err := vnl.LinkByName(nicName)
			if err != nil {
				return err
			}
			l.nic[i] = link.Attrs().Index
			return errors.Join(addAddr(link, outerAddrs[l.shape.outer][i]), vnl.LinkSetUp(link))
		})
		if err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	return l.carrier(ctx)
}

// carrier waits until both ends of the veth pair work: the kernel may take its time
// (net/core/link_watch.c), and IPv6 has no route until then.
func (l *lab) carrier(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for i, e := range l.ends {
		for up := false; !up; {
			err := e.do(func() error {
				link, err := vnl.LinkByIndex(l.nic[i])
				up = err == nil && link.Attrs().OperState == vnl.OperUp
				return err
			})
			if err != nil {
				return err
			}
			if !up && !pause(ctx, 2*time.Millisecond) {
				return fmt.Errorf("the veth pair doesn't come up: %w", ctx.Err())
			}
		}
	}
	return nil
}

// pause returns false when the context is over.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// sysctls makes the namespace independent of the machine's settings.
func sysctls() error {
	// Else a connection begins with the window that an earlier one ended with.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_no_metrics_save", []byte("1"), 0o644); err != nil {
		return err
	}
	for _, name := range []string{"all", "default"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("0"), 0o644)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return err
		}
	}
	return nil
}

// addAddr adds an address that is usable at once.
func addAddr(link vnl.Link, p netip.Prefix) error {
	a := &vnl.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = ifaNoDAD
	}
	if err := vnl.AddrAdd(link, a); err != nil {
		return missing(fmt.Errorf("address %s: %w", p, err), "IPv6 (CONFIG_IPV6)")
	}
	return nil
}

// ifaNoDAD is IFA_F_NODAD (linux/if_addr.h).
const ifaNoDAD = 0x02

// inside gives the tunnel its MTU and addresses.
func (l *lab) inside(i int) error {
	link, err := vnl.LinkByName(tunnelName)
	if err != nil {
		return err
	}
	l.tunnel[i] = link.Attrs().Index
	if link.Attrs().EncapType == "ether" {
		if err := vnl.LinkSetHardwareAddr(link, innerMACs[i]); err != nil {
			return fmt.Errorf("device %s: %w", l.shape.kind, err)
		}
	}
	if err := errors.Join(vnl.LinkSetMTU(link, tunnelMTU), vnl.LinkSetUp(link)); err != nil {
		return fmt.Errorf("device %s: %w", l.shape.kind, err)
	}
	for _, f := range l.shape.inner {
		local, remote := innerAddrs[f][i], innerAddrs[f][1-i]
		if l.shape.variant != external {
			if err := addAddr(link, local); err != nil {
				return err
			}
			continue
		}
		// Only a route tells such a device which SA to use.
		if err := addAddr(link, netip.PrefixFrom(local.Addr(), local.Addr().BitLen())); err != nil {
			return err
		}
		if err := externalRoute(link, remote.Addr()); err != nil {
			return err
		}
	}
	return nil
}
