package lane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Our filters stand last: a filter that stood behind ours would see none of our packets on their
// second way, where our action is skipped and ends the classification (tcf_action_exec,
// net/sched/act_api.c). The kernel gives a filter without a preference one below the others of
// this range (tcf_auto_prio, net/sched/cls_api.c), so only somebody who asks for these very
// numbers can collide with them. Each family has its own, since all filters of a preference have
// one protocol.
const (
	prefIPv4 = 65534
	prefIPv6 = 65535
)

// handles and classes (linux/pkt_sched.h).
const (
	clsactParent = 0xfffffff1 // TC_H_CLSACT
	clsactHandle = 0xffff0000
	ingressClass = 0xfffffff2 // TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
	egressClass  = 0xfffffff3 // TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)
)

// TCA_* of flower and of actions (linux/pkt_cls.h, linux/tc_act/tc_mirred.h).
const (
	flowerAct         = 3
	flowerEthType     = 8
	flowerIPProto     = 9
	flowerIPv4Src     = 10
	flowerIPv4SrcMask = 11
	flowerIPv4Dst     = 12
	flowerIPv4DstMask = 13
	flowerIPv6Src     = 14
	flowerIPv6SrcMask = 15
	flowerIPv6Dst     = 16
	flowerIPv6DstMask = 17
	flowerTCPSrc      = 18
	flowerTCPDst      = 19
	flowerUDPSrc      = 20
	flowerUDPDst      = 21
	flowerFlags       = 22
	flowerSCTPSrc     = 41
	flowerSCTPDst     = 42

	// skipHW keeps the filter in software: no hardware redirects to an ifb.
	skipHW = 1 // TCA_CLS_FLAGS_SKIP_HW

	actKind    = 1
	actOptions = 2
	actCookie  = 6

	mirredParms   = 2
	mirredLen     = 28 // sizeof(struct tc_mirred)
	egressRedir   = 1  // TCA_EGRESS_REDIR
	actionStolen  = 4  // TC_ACT_STOLEN
	mirredAction  = 8  // offset of tc_mirred.action
	mirredEaction = 20
	mirredIfindex = 24
)

// cookie marks our actions. The kernel keeps it and shows it in dumps (TCA_ACT_COOKIE).
const cookie = "tsoagent-lane"

// filter is one of our filters as it stands in the kernel.
type filter struct {
	handle uint32
	match  Match
	// to is the ifindex of the device that the action redirects to, 0 if that is gone: then the
	// kernel drops what matches.
	to int32
	// odd reports whether there is something that we don't write.
	odd bool
}

// info is tcm_info of the filters of a family.
func info(is4 bool) uint32 {
	pref, proto := uint32(prefIPv6), uint16(unix.ETH_P_IPV6)
	if is4 {
		pref, proto = prefIPv4, unix.ETH_P_IP
	}
	return pref<<16 | uint32(networkOrder(proto))
}

// networkOrder is htons.
func networkOrder(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

// put adds a filter (netlink.Excl), or replaces the one of that handle, whose match is the same,
// in one go.
func (c *Client) put(nic int32, f filter, flags netlink.HeaderFlags) error {
	return c.write(rtmNewTFilter, netlink.Create|flags, f.head(nic).encode(), f.encode)
}

// head is the tcmsg of a filter.
func (f filter) head(nic int32) tcmsg {
	return tcmsg{index: nic, handle: f.handle, parent: egressClass, info: info(f.match.Dst.Addr().Is4())}
}

// encode adds the filter's attributes.
func (f filter) encode(ae *netlink.AttributeEncoder) {
	ae.String(unix.TCA_KIND, "flower")
	ae.Nested(unix.TCA_OPTIONS, func(ae *netlink.AttributeEncoder) error {
		encodeMatch(ae, f.match)
		ae.Uint32(flowerFlags, skipHW)
		ae.Nested(flowerAct, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(1, func(ae *netlink.AttributeEncoder) error {
				encodeAction(ae, f.to)
				return nil
			})
			return nil
		})
		return nil
	})
}

// take deletes one filter. It is no error if it is gone.
func (c *Client) take(nic int32, f filter) error {
	err := c.write(rtmDelTFilter, 0, f.head(nic).encode(), func(ae *netlink.AttributeEncoder) { ae.String(unix.TCA_KIND, "flower") })
	if gone(err) {
		return nil
	}
	return err
}

// gone reports whether an error of a delete says that there is nothing to delete: the device
// (ENODEV), the filter (ENOENT) or clsact (EINVAL, __tcf_qdisc_find and tc_get_qdisc).
func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

// encodeMatch adds the key of a match. Flower reads ip_proto behind IPv6 extension headers. Of a
// fragment it reads no ports, so fragments of ESP in UDP don't take the detour; they are no
// super-packets.
func encodeMatch(ae *netlink.AttributeEncoder, m Match) {
	be := func(typ, n uint16) { ae.Bytes(typ, binary.BigEndian.AppendUint16(nil, n)) }
	prefix := func(p netip.Prefix, key, mask uint16) {
		if p.Bits() == 0 {
			return
		}
		ae.Bytes(key, p.Addr().AsSlice())
		ae.Bytes(mask, maskOf(p))
	}
	if m.Dst.Addr().Is4() {
		be(flowerEthType, unix.ETH_P_IP)
		prefix(m.Src, flowerIPv4Src, flowerIPv4SrcMask)
		prefix(m.Dst, flowerIPv4Dst, flowerIPv4DstMask)
	} else {
		be(flowerEthType, unix.ETH_P_IPV6)
		prefix(m.Src, flowerIPv6Src, flowerIPv6SrcMask)
		prefix(m.Dst, flowerIPv6Dst, flowerIPv6DstMask)
	}
	if m.Proto != 0 {
		ae.Uint8(flowerIPProto, m.Proto)
	}
	sport, dport := portKeys(m.Proto)
	if m.Sport != 0 {
		be(sport, m.Sport)
	}
	if m.Dport != 0 {
		be(dport, m.Dport)
	}
}

func portKeys(proto uint8) (src, dst uint16) {
	switch proto {
	case protoTCP:
		return flowerTCPSrc, flowerTCPDst
	case protoUDP:
		return flowerUDPSrc, flowerUDPDst
	default:
		return flowerSCTPSrc, flowerSCTPDst
	}
}

func maskOf(p netip.Prefix) []byte {
	mask := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return mask
}

// encodeAction adds a redirect to the egress of a device.
func encodeAction(ae *netlink.AttributeEncoder, to int32) {
	parms := make([]byte, mirredLen)
	binary.NativeEndian.PutUint32(parms[mirredAction:], actionStolen)
	binary.NativeEndian.PutUint32(parms[mirredEaction:], egressRedir)
	binary.NativeEndian.PutUint32(parms[mirredIfindex:], uint32(to))
	ae.String(actKind, "mirred")
	ae.Nested(actOptions, func(ae *netlink.AttributeEncoder) error {
		ae.Bytes(mirredParms, parms)
		return nil
	})
	ae.Bytes(actCookie, []byte(cookie))
}

// egress is what stands at a NIC's clsact egress.
type egress struct {
	ours    []filter
	foreign int             // filters of others, and empty classifiers
	handles map[uint32]bool // those in use at our preferences, by whomever
	// taken reports whether others use a preference of ours for another kind or protocol.
	taken bool
}

// filters reads the egress filters of a NIC.
func (c *Client) filters(nic int32) (egress, error) {
	var e egress
	err := c.dump(rtmGetTFilter, tcmsg{index: nic, parent: egressClass}.encode(), e.add)
	if gone(err) {
		return egress{}, nil
	}
	return e, err
}

// anyIngress reports whether there are ingress filters on a NIC.
func (c *Client) anyIngress(nic int32) (bool, error) {
	n := 0
	err := c.dump(rtmGetTFilter, tcmsg{index: nic, parent: ingressClass}.encode(), func([]byte) error { n++; return nil })
	if gone(err) {
		return false, nil
	}
	return n > 0, err
}

// add takes one message of a dump of filters.
func (e *egress) add(b []byte) error {
	t, ad, err := decodeTcmsg(b)
	if err != nil {
		return err
	}
	var kind string
	var chain uint32
	var f filter
	marked := false
	for ad.Next() {
		switch ad.Type() {
		case unix.TCA_KIND:
			kind = ad.String()
		case unix.TCA_CHAIN:
			chain = ad.Uint32()
		case unix.TCA_OPTIONS:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				if kind != "flower" {
					return nil
				}
				var err error
				f, marked, err = decodeFlower(ad)
				return err
			})
		}
	}
	if err := ad.Err(); err != nil {
		return fmt.Errorf("filter: %w", err)
	}
	f.handle = t.handle
	if e.handles == nil {
		e.handles = map[uint32]bool{}
	}
	expected := chain == 0 && kind == "flower" && (t.info == info(true) || t.info == info(false))
	e.handles[t.handle] = e.handles[t.handle] || expected
	switch {
	case marked && expected:
		f.odd = f.odd || t.info != info(f.match.Dst.Addr().Is4())
		e.ours = append(e.ours, f)
	case t.handle == 0 && expected:
		// The head of a preference, which the kernel shows ahead of its filters.
	default:
		e.foreign++
		if pref := t.info >> 16; chain == 0 && !expected && (pref == prefIPv4 || pref == prefIPv6) {
			e.taken = true
		}
	}
	return nil
}

// decodeFlower decodes what we write of a flower filter; marked reports whether it has our
// cookie.
func decodeFlower(ad *netlink.AttributeDecoder) (f filter, marked bool, err error) {
	var src, dst, srcMask, dstMask []byte
	size := 0
	for ad.Next() {
		v := ad.Bytes()
		port := func() uint16 {
			if len(v) != 2 {
				return 0
			}
			return binary.BigEndian.Uint16(v)
		}
		switch ad.Type() {
		case flowerEthType:
			switch port() {
			case unix.ETH_P_IP:
				size = 4
			case unix.ETH_P_IPV6:
				size = 16
			}
		case flowerIPProto:
			f.match.Proto = ad.Uint8()
		case flowerIPv4Src, flowerIPv6Src:
			src = v
		case flowerIPv4SrcMask, flowerIPv6SrcMask:
			srcMask = v
		case flowerIPv4Dst, flowerIPv6Dst:
			dst = v
		case flowerIPv4DstMask, flowerIPv6DstMask:
			dstMask = v
		case flowerTCPSrc, flowerUDPSrc, flowerSCTPSrc:
			f.match.Sport = port()
		case flowerTCPDst, flowerUDPDst, flowerSCTPDst:
			f.match.Dport = port()
		case flowerAct:
			ad.Nested(func(ad *netlink.AttributeDecoder) (err error) {
				f.to, marked, f.odd, err = decodeActions(ad)
				return err
			})
		}
	}
	if err := ad.Err(); err != nil || !marked {
		return f, marked, err
	}
	var ok1, ok2 bool
	f.match.Src, ok1 = prefixOf(src, srcMask, size)
	f.match.Dst, ok2 = prefixOf(dst, dstMask, size)
	if !ok1 || !ok2 {
		return f, marked, errors.New("filter of ours with addresses that we don't write")
	}
	return f, marked, nil
}

// decodeActions decodes the list of a filter's actions. One of ours has a single redirect.
func decodeActions(ad *netlink.AttributeDecoder) (to int32, marked, odd bool, err error) {
	n := 0
	for ad.Next() {
		n++
		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			var parms []byte
			for ad.Next() {
				switch ad.Type() {
				case actOptions:
					ad.Nested(func(ad *netlink.AttributeDecoder) error {
						for ad.Next() {
							if ad.Type() == mirredParms {
								parms = ad.Bytes()
							}
						}
						return nil
					})
				case actCookie:
					marked = marked || string(ad.Bytes()) == cookie
				}
			}
			if len(parms) < mirredLen {
				odd = true
				return nil
			}
			to = int32(binary.NativeEndian.Uint32(parms[mirredIfindex:]))
			odd = odd || binary.NativeEndian.Uint32(parms[mirredAction:]) != actionStolen || binary.NativeEndian.Uint32(parms[mirredEaction:]) != egressRedir
			return nil
		})
	}
	return to, marked, odd || n != 1, ad.Err()
}

// prefixOf makes a prefix of a key and its mask; without them it is the whole space.
func prefixOf(key, mask []byte, size int) (netip.Prefix, bool) {
	if size == 0 {
		return netip.Prefix{}, false
	}
	if key == nil {
		key = make([]byte, size)
	}
	addr, ok := netip.AddrFromSlice(key)
	if !ok || len(key) != size || (mask != nil && len(mask) != size) {
		return netip.Prefix{}, false
	}
	n := 0
	for _, b := range mask {
		n += bits.OnesCount8(b)
	}
	return netip.PrefixFrom(addr, n).Masked(), true
}
