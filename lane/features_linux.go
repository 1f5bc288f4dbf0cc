package lane

import (
	"fmt"
	"strings"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// cuts reports whether a device without this feature cuts packets that one with it leaves whole:
// the features of NETIF_F_GSO_MASK (linux/netdev_features.h). tx-generic-segmentation is none of
// them; it says that the stack may cut.
func cuts(feature string) bool {
	switch feature {
	case "tx-generic-segmentation":
		return false
	case "tx-gso-robust", "tx-gso-partial", "tx-gso-list":
		return true
	}
	return strings.HasPrefix(feature, "tx-") && strings.HasSuffix(feature, "-segmentation")
}

// segmenting are the features by which an ifb would leave packets whole, those that are on or
// wanted.
func (c *Client) segmenting(index int32) ([]string, error) {
	body, err := payload(nil, func(ae *netlink.AttributeEncoder) { deviceHeader(ae, index) })
	if err != nil {
		return nil, err
	}
	msgs, err := c.et.Execute(genetlink.Message{
		Header: genetlink.Header{Command: unix.ETHTOOL_MSG_FEATURES_GET, Version: unix.ETHTOOL_GENL_VERSION},
		Data:   body,
	}, c.ethtool.ID, netlink.Request)
	if err != nil {
		return nil, err
	}
	on := map[string]bool{}
	var names []string
	for _, m := range msgs {
		ad, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return nil, err
		}
		for ad.Next() {
			if ad.Type() == unix.ETHTOOL_A_FEATURES_ACTIVE || ad.Type() == unix.ETHTOOL_A_FEATURES_WANTED {
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					eachName(ad, func(name string) {
						if cuts(name) && !on[name] {
							on[name] = true
							names = append(names, name)
						}
					})
					return nil
				})
			}
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
	}
	return names, nil
}

func deviceHeader(ae *netlink.AttributeEncoder, index int32) {
	ae.Nested(unix.ETHTOOL_A_FEATURES_HEADER, func(ae *netlink.AttributeEncoder) error {
		ae.Uint32(unix.ETHTOOL_A_HEADER_DEV_INDEX, uint32(index))
		return nil
	})
}

// eachName calls f with the names in a verbose bit set that lists what is set (no mask).
func eachName(ad *netlink.AttributeDecoder, f func(string)) {
	for ad.Next() {
		if ad.Type() != unix.ETHTOOL_A_BITSET_BITS {
			continue
		}
		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					for ad.Next() {
						if ad.Type() == unix.ETHTOOL_A_BITSET_BIT_NAME {
							f(ad.String())
						}
					}
					return nil
				})
			}
			return nil
		})
	}
}

// stopTSO takes from an ifb all features that leave packets whole, and reads them back.
func (c *Client) stopTSO(ifb link) error {
	on, err := c.segmenting(ifb.index)
	if err != nil {
		return fmt.Errorf("read the features of %s: %w", ifb.name, err)
	}
	if len(on) == 0 {
		return nil
	}
	body, err := payload(nil, func(ae *netlink.AttributeEncoder) {
		deviceHeader(ae, ifb.index)
		ae.Nested(unix.ETHTOOL_A_FEATURES_WANTED, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(unix.ETHTOOL_A_BITSET_BITS, func(ae *netlink.AttributeEncoder) error {
				for _, name := range on {
					// A bit without a value is to be cleared.
					ae.Nested(unix.ETHTOOL_A_BITSET_BITS_BIT, func(ae *netlink.AttributeEncoder) error {
						ae.String(unix.ETHTOOL_A_BITSET_BIT_NAME, name)
						return nil
					})
				}
				return nil
			})
			return nil
		})
	})
	if err != nil {
		return err
	}
	failpoint.Hit("lane-features-before")
	_, err = c.et.Execute(genetlink.Message{
		Header: genetlink.Header{Command: unix.ETHTOOL_MSG_FEATURES_SET, Version: unix.ETHTOOL_GENL_VERSION},
		Data:   body,
	}, c.ethtool.ID, netlink.Request) // the reply is the acknowledgement
	failpoint.Hit("lane-features-after")
	if err != nil {
		return fmt.Errorf("take TSO from %s: %w", ifb.name, err)
	}
	if on, err = c.segmenting(ifb.index); err != nil {
		return fmt.Errorf("read the features of %s: %w", ifb.name, err)
	}
	if len(on) > 0 {
		return fmt.Errorf("%s keeps %s", ifb.name, strings.Join(on, ", "))
	}
	return nil
}
