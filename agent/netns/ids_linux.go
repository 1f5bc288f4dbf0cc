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
	const (
		netnsaNSID = 1 // linux/net_namespace.h
		netnsaFD   = 3
	)
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(netnsaFD, uint32(n.file.Fd()))
	attrs, err := ae.Encode()
	if err != nil {
		return 0, fmt.Errorf("netns: %w", err)
	}
	rtgenmsg := make([]byte, 4) // one byte, aligned: AF_UNSPEC
	replies, err := i.c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETNSID, Flags: netlink.Request},
		Data:   append(rtgenmsg, attrs...),
	})
	if err != nil {
		return 0, fmt.Errorf("netns: ask for the number of %s: %w", n.file.Name(), err)
	}
	for _, m := range replies {
		if m.Header.Type != unix.RTM_NEWNSID || len(m.Data) < len(rtgenmsg) {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[len(rtgenmsg):])
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
	}
	return 0, fmt.Errorf("netns: %s: %w", n.file.Name(), ErrNoID)
}
