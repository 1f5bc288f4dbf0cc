package routes

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

const rtmSetLink = 19 // RTM_SETLINK, linux/rtnetlink.h

// SetLinkMTU sets a device's MTU, in bytes, and nothing else of it. The kernel sets the device's
// IPv6 MTU (conf/DEV/mtu) to it, too, and changes IPv6 routes by the device that have an MTU
// metric without a lock (rt6_mtu_change_route, net/ipv6/route.c). An MTU that the driver can't do
// is EINVAL, a device that is gone ENODEV.
func (t *Table) SetLinkMTU(i Ifindex, mtu int) error {
	b := appendU32(linkHeader(i), iflaMTU, uint32(mtu))
	if _, err := t.c.request(rtmSetLink, unix.NLM_F_ACK, b, nil); err != nil {
		return fmt.Errorf("routes: set the mtu of device %d: %w", i, err)
	}
	return nil
}

// ReadLink reads one device. One that is gone is ENODEV.
func (t *Table) ReadLink(i Ifindex) (*Link, error) { return t.readLink(linkHeader(i), i) }

// ReadLinkAt reads a device in another namespace, without entering that. It takes CAP_NET_ADMIN in the
// user namespace that owns it (rtnl_get_net_ns_capable, net/core/rtnetlink.c). A device that is gone
// is ENODEV, a namespace that is gone EINVAL.
func (t *Table) ReadLinkAt(p Place) (*Link, error) {
	const iflaTargetNetnsid = 46
	return t.readLink(appendU32(linkHeader(p.Index), iflaTargetNetnsid, uint32(p.Netnsid)), p.Index)
}

func (t *Table) readLink(b []byte, i Ifindex) (*Link, error) {
	const rtextFilterSkipStats = 1 << 3 // linux/rtnetlink.h
	var l *Link
	b = appendU32(b, iflaExtMask, rtextFilterSkipStats)
	_, err := t.c.request(rtmGetLink, unix.NLM_F_ACK, b, func(h Header, data []byte) (err error) {
		if h.Type == rtmNewLink {
			l, err = decodeLink(data)
		}
		return err
	})
	if err == nil && l == nil {
		err = errShort
	}
	if err != nil {
		return nil, fmt.Errorf("routes: read device %d: %w", i, err)
	}
	return l, nil
}

// linkHeader is a struct ifinfomsg for one device.
func linkHeader(i Ifindex) []byte {
	b := make([]byte, ifinfomsgLen, 64)
	binary.NativeEndian.PutUint32(b[4:], uint32(i))
	return b
}
