package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// IDs asks one namespace how it numbers others (`ip netns list-id`). Notifications name namespaces so.
// Nothing is entered for it. It is safe for concurrent use.
type IDs struct{ c *netlink.Conn }

// ErrNoID is matched (errors.Is) where a namespace has no number for another one.
var ErrNoID = errors.New("no number for that namespace")

// DialIDs opens IDs of the calling thread's namespace.
func DialIDs() (*IDs, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("netns: open rtnetlink: %w", err)
	}
	return &IDs{c}, nil
}

// Close closes the socket.
func (i *IDs) Close() error { return i.c.Close() }

// Of is the number of an open namespace, or ErrNoID.
func (i *IDs) Of(n *Namespace) (int32, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(netnsaFD, uint32(n.file.Fd()))
	attrs, err := ae.Encode()
	if err != nil {
		return 0, fmt.Errorf("netns: %w", err)
	}
	rtgenmsg := make([]byte, rtgenmsgLen) // AF_UNSPEC
	replies, err := i.c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETNSID, Flags: netlink.Request},
		Data:   append(rtgenmsg, attrs...),
	})
	if err != nil {
		return 0, fmt.Errorf("netns: ask for the number of %s: %w", n.file.Name(), err)
	}
	for _, m := range replies {
		if m.Header.Type != unix.RTM_NEWNSID {
			continue
		}
		if id, err := decodeID(m.Data); !errors.Is(err, ErrNoID) {
			return id, err
		}
	}
	return 0, fmt.Errorf("netns: %s: %w", n.file.Name(), ErrNoID)
}

// Attributes of namespaces, and what stands ahead of them: a struct rtgenmsg of one byte, aligned (linux/net_namespace.h, linux/rtnetlink.h).
const (
	netnsaNSID  = 1
	netnsaFD    = 3
	rtgenmsgLen = 4
)

// decodeID decodes an RTM_NEWNSID. One without a number says -1 (NETNSA_NSID_NOT_ASSIGNED), which is ErrNoID.
func decodeID(data []byte) (int32, error) {
	if len(data) < rtgenmsgLen {
		return 0, ErrNoID
	}
	ad, err := netlink.NewAttributeDecoder(data[rtgenmsgLen:])
	if err != nil {
		return 0, fmt.Errorf("netns: %w", err)
	}
	for ad.Next() {
		if ad.Type() == netnsaNSID && len(ad.Bytes()) == 4 {
			if id := binary.NativeEndian.Uint32(ad.Bytes()); id <= math.MaxInt32 {
				return int32(id), nil
			}
		}
	}
	return 0, ErrNoID
}
