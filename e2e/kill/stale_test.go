package kill

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A witness hears of all routes that are written in a world, and by whom. rtnetlink has no compare-and-swap: a lock in place overwrites what the
// route's owner has written since the agent read it, and is mended as soon as the agent reads that. If it is killed before, the owner's version is
// lost (docs/limits.md), which is nothing that a snapshot could tell from a fault.
type witness struct{ *netlink.Conn }

func (w *world) watch(t testing.TB) *witness {
	t.Helper()
	var c *netlink.Conn
	if err := w.In(func() (err error) {
		c, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1)})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadBuffer(4 << 20); err != nil {
		t.Fatal(err)
	}
	return &witness{c}
}

// A written route is what a notification tells: its key, and all else but the MTU.
type written struct{ key, rest, dst string }

// overwritten are the destinations in main whose routes are older than their owner's newest version, as a write of somebody else came behind that.
// It is asked once, when nothing is written any more.
func (w *witness) overwritten(t testing.TB, owner int) (dsts []string) {
	t.Helper()
	newest, stale := map[string]string{}, map[string]string{}
	if err := w.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil { // all of it is there already
		t.Fatal(err)
	}
	for {
		msgs, err := w.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range msgs {
			r, err := decode(m)
			if err != nil {
				t.Fatal(err)
			}
			last, known := newest[r.key]
			switch mine := int(m.Header.PID) == owner; {
			case mine || m.Header.Type == unix.RTM_DELROUTE || !known || r.rest == last:
				delete(stale, r.key)
				if newest[r.key] = r.rest; m.Header.Type == unix.RTM_DELROUTE {
					delete(newest, r.key)
				}
			default:
				stale[r.key] = r.dst
			}
		}
	}
	for _, dst := range stale {
		dsts = append(dsts, dst)
	}
	return dsts
}

// decode decodes a notification.
func decode(m netlink.Message) (written, error) {
	const header = 12 // struct rtmsg, linux/rtnetlink.h
	if len(m.Data) < header {
		return written{}, errors.New("short message")
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return written{}, err
	}
	dst, prio, table := netip.IPv4Unspecified(), uint32(0), uint32(m.Data[4])
	if m.Data[0] == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	rest := []string{fmt.Sprintf("%x", m.Data[5:8])} // protocol, scope, type
	for ad.Next() {
		switch ad.Type() {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.RTA_PRIORITY:
			prio = ad.Uint32()
		case unix.RTA_TABLE:
			table = ad.Uint32()
		case unix.RTA_OIF, unix.RTA_GATEWAY, unix.RTA_MULTIPATH:
			rest = append(rest, fmt.Sprintf("%d %x", ad.Type(), hops(ad.Type(), ad.Bytes())))
		}
	}
	p := netip.PrefixFrom(dst, int(m.Data[1]))
	text := strings.TrimSuffix(p.String(), fmt.Sprintf("/%d", dst.BitLen()))
	if p.Bits() == 0 {
		text = "default"
	}
	slices.Sort(rest)
	return written{key: fmt.Sprint(table, p, prio, m.Data[3]), rest: strings.Join(rest, " "), dst: text}, ad.Err()
}

// hops are the bytes of an attribute, where the flags of nexthops don't count: the kernel sets them.
func hops(typ uint16, b []byte) []byte {
	b = slices.Clone(b)
	if typ != unix.RTA_MULTIPATH {
		return b
	}
	for rest := b; len(rest) >= unix.SizeofRtNexthop; {
		rest[2] = 0
		n := int(binary.NativeEndian.Uint16(rest))
		if n < unix.SizeofRtNexthop || n > len(rest) {
			break
		}
		rest = rest[min((n+3)&^3, len(rest)):]
	}
	return b
}
