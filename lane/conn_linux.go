package lane

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// A Client makes, reads and removes lanes in the network namespace in which it was dialed. It is
// not safe for concurrent use.
type Client struct {
	rt      *netlink.Conn
	et      *genetlink.Conn
	ethtool genetlink.Family
}

// Dial returns a client for the network namespace of the calling thread; once dialed it can be
// used on any thread.
func Dial() (*Client, error) {
	rt, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Strict: true})
	if err != nil {
		return nil, fmt.Errorf("lane: open rtnetlink: %w", err)
	}
	c := &Client{rt: rt}
	if c.et, err = genetlink.Dial(nil); err != nil {
		return nil, errors.Join(fmt.Errorf("lane: open generic netlink: %w", err), c.Close())
	}
	_ = c.et.SetOption(netlink.ExtendedAcknowledge, true) // only makes errors clearer
	if c.ethtool, err = c.et.GetFamily(unix.ETHTOOL_GENL_NAME); err != nil {
		return nil, errors.Join(fmt.Errorf("lane: resolve the ethtool family: %w", err), c.Close())
	}
	return c, nil
}

// Close closes the client's sockets. What is in place stays.
func (c *Client) Close() error {
	var err error
	if c.et != nil {
		err = c.et.Close()
	}
	return errors.Join(err, c.rt.Close())
}

// write sends one rtnetlink request and waits for its acknowledgement.
func (c *Client) write(typ uint16, flags netlink.HeaderFlags, head []byte, attrs func(*netlink.AttributeEncoder)) error {
	body, err := payload(head, attrs)
	if err != nil {
		return err
	}
	before, after := pointsOf(typ)
	failpoint.Hit(before)
	_, err = c.rt.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | netlink.Acknowledge | flags},
		Data:   body,
	})
	failpoint.Hit(after)
	return err
}

// pointsOf are the failpoints before and after a write.
func pointsOf(typ uint16) (before, after string) {
	switch typ {
	case rtmNewLink:
		return "lane-link-before", "lane-link-after"
	case rtmDelLink:
		return "lane-unlink-before", "lane-unlink-after"
	case rtmNewQdisc, rtmDelQdisc:
		return "lane-qdisc-before", "lane-qdisc-after"
	}
	return "lane-filter-before", "lane-filter-after"
}

// dumpTries bounds how often a dump is repeated that the kernel says it could not do in one go.
const dumpTries = 5

// dump calls f with the payload of each message of a dump, once it is known to be whole.
func (c *Client) dump(typ uint16, head []byte, f func([]byte) error) error {
	var msgs []netlink.Message
	for try := 0; ; try++ {
		var err error
		msgs, err = c.rt.Execute(netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | netlink.Dump},
			Data:   head,
		})
		if err != nil {
			return err
		}
		if !interrupted(msgs) {
			break
		}
		if try == dumpTries {
			return fmt.Errorf("dump interrupted %d times: %w", try, unix.EINTR)
		}
	}
	for _, m := range msgs {
		if err := f(m.Data); err != nil {
			return err
		}
	}
	return nil
}

func interrupted(msgs []netlink.Message) bool {
	for _, m := range msgs {
		if m.Header.Flags&netlink.DumpInterrupted != 0 {
			return true
		}
	}
	return false
}

// payload is a fixed header with attributes behind it.
func payload(head []byte, attrs func(*netlink.AttributeEncoder)) ([]byte, error) {
	if attrs == nil {
		return head, nil
	}
	ae := netlink.NewAttributeEncoder()
	attrs(ae)
	b, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	return append(head, b...), nil
}

// errShort is the error for a message of the kernel that ends too early.
var errShort = errors.New("message is too short")

// ifinfomsg is struct ifinfomsg (linux/rtnetlink.h) for one device.
func ifinfomsg(index int32, flags, change uint32) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	binary.NativeEndian.PutUint32(b[8:], flags)
	binary.NativeEndian.PutUint32(b[12:], change)
	return b
}

// tcmsgLen is the size of struct tcmsg (linux/rtnetlink.h).
const tcmsgLen = 20

// tcmsg is struct tcmsg.
type tcmsg struct {
	index          int32
	handle, parent uint32
	info           uint32 // of a filter: its preference, and the protocol as on the wire
}

func (t tcmsg) encode() []byte {
	b := make([]byte, tcmsgLen)
	binary.NativeEndian.PutUint32(b[4:], uint32(t.index))
	binary.NativeEndian.PutUint32(b[8:], t.handle)
	binary.NativeEndian.PutUint32(b[12:], t.parent)
	binary.NativeEndian.PutUint32(b[16:], t.info)
	return b
}

func decodeTcmsg(b []byte) (tcmsg, *netlink.AttributeDecoder, error) {
	if len(b) < tcmsgLen {
		return tcmsg{}, nil, errShort
	}
	t := tcmsg{
		index:  int32(binary.NativeEndian.Uint32(b[4:])),
		handle: binary.NativeEndian.Uint32(b[8:]),
		parent: binary.NativeEndian.Uint32(b[12:]),
		info:   binary.NativeEndian.Uint32(b[16:]),
	}
	ad, err := netlink.NewAttributeDecoder(b[tcmsgLen:])
	return t, ad, err
}

// RTM_* (linux/rtnetlink.h).
const (
	rtmNewLink    = unix.RTM_NEWLINK
	rtmDelLink    = unix.RTM_DELLINK
	rtmGetLink    = unix.RTM_GETLINK
	rtmNewQdisc   = unix.RTM_NEWQDISC
	rtmDelQdisc   = unix.RTM_DELQDISC
	rtmGetQdisc   = unix.RTM_GETQDISC
	rtmNewTFilter = unix.RTM_NEWTFILTER
	rtmDelTFilter = unix.RTM_DELTFILTER
	rtmGetTFilter = unix.RTM_GETTFILTER
)
