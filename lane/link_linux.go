package lane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// minQueueLen is the least length of an ifb's queue in packets. The default of 32 loses packets
// (ifb_xmit stops the queue at tx_queue_len, drivers/net/ifb.c).
const minQueueLen = 1000

// maxQueues bounds the queues of an ifb. Some NICs allocate hundreds, whatever they use.
const maxQueues = 64

// link is what we need to know of a device.
type link struct {
	index    int32
	name     string
	kind     string
	alias    string
	up       bool
	mtu      uint32
	queueLen uint32
	queues   uint32
	// noLinkLocal reports whether the device makes itself no IPv6 link-local address; it is also
	// true where there is no IPv6 on it.
	noLinkLocal             bool
	packets, bytes, dropped uint64
}

// links reads all devices of the namespace.
func (c *Client) links() (map[int32]link, error) {
	all := map[int32]link{}
	err := c.dump(rtmGetLink, ifinfomsg(0, 0, 0), func(b []byte) error {
		l, err := decodeLink(b)
		if err == nil {
			all[l.index] = l
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the devices: %w", err)
	}
	return all, nil
}

func decodeLink(b []byte) (link, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return link{}, errShort
	}
	l := link{
		index:       int32(binary.NativeEndian.Uint32(b[4:])),
		up:          binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0,
		noLinkLocal: true,
	}
	ad, err := netlink.NewAttributeDecoder(b[unix.SizeofIfInfomsg:])
	if err != nil {
		return link{}, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.IFLA_IFNAME:
			l.name = ad.String()
		case unix.IFLA_IFALIAS:
			l.alias = ad.String()
		case unix.IFLA_MTU:
			l.mtu = ad.Uint32()
		case unix.IFLA_TXQLEN:
			l.queueLen = ad.Uint32()
		case unix.IFLA_NUM_TX_QUEUES:
			l.queues = ad.Uint32()
		case unix.IFLA_STATS64:
			// struct rtnl_link_stats64: rx_packets, tx_packets, rx_bytes, tx_bytes, errors, dropped.
			if v := ad.Bytes(); len(v) >= 64 {
				at := func(i int) uint64 { return binary.NativeEndian.Uint64(v[8*i:]) }
				l.packets, l.bytes, l.dropped = at(1), at(3), at(6)+at(7)
			}
		case unix.IFLA_LINKINFO:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == unix.IFLA_INFO_KIND {
						l.kind = ad.String()
					}
				}
				return nil
			})
		case unix.IFLA_AF_SPEC:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() != unix.AF_INET6 {
						continue
					}
					ad.Nested(func(ad *netlink.AttributeDecoder) error {
						for ad.Next() {
							if ad.Type() == unix.IFLA_INET6_ADDR_GEN_MODE {
								l.noLinkLocal = ad.Uint8() == addrGenNone
							}
						}
						return nil
					})
				}
				return nil
			})
		}
	}
	return l, ad.Err()
}

// addrGenNone is IN6_ADDR_GEN_MODE_NONE (linux/if_link.h).
const addrGenNone = 1

// ours reports whether the device is an ifb of ours: by name, kind and alias. One without an
// alias is ours, too, made by somebody who died right then.
func (l link) ours() bool {
	return l.kind == "ifb" && nicOf(l.name) != 0 && (l.alias == "" || strings.HasPrefix(l.alias, aliasPrefix))
}

func (l link) clsactOurs() bool { return strings.HasSuffix(l.alias, aliasClsact) }

// queueLenFor is how long the queue of the ifb of a NIC is to be, in packets.
func queueLenFor(nic link) uint32 { return max(minQueueLen, nic.queueLen) }

// addIFB makes the ifb of a NIC, down. It has as many queues as the NIC, since each has a
// tasklet of its own that would else keep one processor busy for all.
func (c *Client) addIFB(nic link) error {
	return c.write(rtmNewLink, netlink.Create|netlink.Excl, ifinfomsg(0, 0, 0), func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, IFBName(nic.index))
		ae.Uint32(unix.IFLA_MTU, nic.mtu)
		ae.Uint32(unix.IFLA_TXQLEN, queueLenFor(nic))
		ae.Uint32(unix.IFLA_NUM_TX_QUEUES, min(max(nic.queues, 1), maxQueues))
		ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
			ae.String(unix.IFLA_INFO_KIND, "ifb")
			return nil
		})
	})
}

// setLink changes a device.
func (c *Client) setLink(index int32, flags, change uint32, attrs func(*netlink.AttributeEncoder)) error {
	return c.write(rtmNewLink, 0, ifinfomsg(index, flags, change), attrs)
}

// setAlias writes what the ifb is for, and whether clsact is ours.
func (c *Client) setAlias(ifb *link, nic string, clsact bool) error {
	want := aliasOf(nic, clsact)
	if ifb.alias == want {
		return nil
	}
	err := c.setLink(ifb.index, 0, 0, func(ae *netlink.AttributeEncoder) { ae.Bytes(unix.IFLA_IFALIAS, []byte(want)) })
	if err != nil {
		return fmt.Errorf("mark %s: %w", ifb.name, err)
	}
	ifb.alias = want
	return nil
}

// setIFB makes an ifb what it should be: no TSO, the NIC's MTU, a long queue, no address of its
// own, and up, in this order.
func (c *Client) setIFB(ifb, nic link) error {
	if err := c.stopTSO(ifb); err != nil {
		return err
	}
	sized := ifb.mtu == nic.mtu && ifb.queueLen >= queueLenFor(nic)
	if !sized {
		err := c.setLink(ifb.index, 0, 0, func(ae *netlink.AttributeEncoder) {
			ae.Uint32(unix.IFLA_MTU, nic.mtu)
			ae.Uint32(unix.IFLA_TXQLEN, max(ifb.queueLen, queueLenFor(nic)))
		})
		if err != nil {
			return fmt.Errorf("size %s: %w", ifb.name, err)
		}
	}
	if !ifb.noLinkLocal {
		err := c.setLink(ifb.index, 0, 0, func(ae *netlink.AttributeEncoder) {
			ae.Nested(unix.IFLA_AF_SPEC, func(ae *netlink.AttributeEncoder) error {
				ae.Nested(unix.AF_INET6, func(ae *netlink.AttributeEncoder) error {
					ae.Uint8(unix.IFLA_INET6_ADDR_GEN_MODE, addrGenNone)
					return nil
				})
				return nil
			})
		})
		if err != nil {
			return fmt.Errorf("keep IPv6 addresses off %s: %w", ifb.name, err)
		}
	}
	if !ifb.up {
		if err := c.setLink(ifb.index, unix.IFF_UP, unix.IFF_UP, nil); err != nil {
			return fmt.Errorf("set %s up: %w", ifb.name, err)
		}
	}
	return nil
}

// delLink deletes a device. It is no error if it is gone.
func (c *Client) delLink(index int32) error {
	err := c.write(rtmDelLink, 0, ifinfomsg(index, 0, 0), nil)
	if gone(err) {
		return nil
	}
	return err
}

// clsact is the qdisc of a NIC's ingress hook.
type clsact struct {
	kind   string // "clsact", "ingress", or empty for none
	shared bool   // its egress filters are a block that other devices share
}

// clsacts reads the ingress hooks of all devices.
func (c *Client) clsacts() (map[int32]clsact, error) {
	all := map[int32]clsact{}
	err := c.dump(rtmGetQdisc, tcmsg{}.encode(), func(b []byte) error {
		t, ad, err := decodeTcmsg(b)
		if err != nil {
			return err
		}
		if t.parent != clsactParent {
			return nil
		}
		q := clsact{}
		for ad.Next() {
			switch ad.Type() {
			case unix.TCA_KIND:
				q.kind = ad.String()
			case unix.TCA_EGRESS_BLOCK:
				q.shared = true
			}
		}
		all[t.index] = q
		return ad.Err()
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return all, nil // no traffic control in this kernel (CONFIG_NET_SCHED)
	}
	if err != nil {
		return nil, fmt.Errorf("read the qdiscs: %w", err)
	}
	return all, nil
}

// addClsact makes the qdisc; it fails with EEXIST if there is one.
func (c *Client) addClsact(nic int32) error {
	t := tcmsg{index: nic, handle: clsactHandle, parent: clsactParent}
	return c.write(rtmNewQdisc, netlink.Create|netlink.Excl, t.encode(), func(ae *netlink.AttributeEncoder) {
		ae.String(unix.TCA_KIND, "clsact")
	})
}

func (c *Client) delClsact(nic int32) error {
	t := tcmsg{index: nic, handle: clsactHandle, parent: clsactParent}
	err := c.write(rtmDelQdisc, 0, t.encode(), func(ae *netlink.AttributeEncoder) { ae.String(unix.TCA_KIND, "clsact") })
	if gone(err) {
		return nil
	}
	return err
}
