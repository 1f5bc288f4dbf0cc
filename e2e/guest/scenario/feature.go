package scenario

import (
	"context"

	"fmt"
	"net"

	"os"
	"path/filepath"
	"slices"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// features are a device's, each by name (linux/ethtool_netlink.h, ETHTOOL_MSG_FEATURES_GET). `ethtool -k` doesn't show the
// wanted bits as such, and they are what must come back.
type features struct {
	hw, wanted, active, noChange []string
}

// fixed reports whether nobody can change the feature.
func (f features) fixed(name string) bool {
	return !slices.Contains(f.hw, name) || slices.Contains(f.noChange, name)
}

// describe returns the state of one feature.
func (f features) describe(name string) string {
	onOff := func(set []string) string {
		if slices.Contains(set, name) {
			return "on"
		}
		return "off"
	}
	fixed := "no"
	if f.fixed(name) {
		fixed = "yes"
	}
	return fmt.Sprintf("active=%s wanted=%s fixed=%s", onOff(f.active), onOff(f.wanted), fixed)
}

// feature prints the state of one feature of a device.
func (s *session) feature(_ context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 3 {
		return "", usage("feature namespace device name")
	}
	f, err := readFeatures(args[0], args[1])
	if err != nil {
		return "", err
	}
	return f.describe(args[2]) + "\n", nil
}

// readFeatures asks for the features of one device.
func readFeatures(namespace, device string) (features, error) {
	config := &netlink.Config{}
	if namespace != "-" {
		ns, err := os.Open(filepath.Join(namespaceDir, namespace))
		if err != nil {
			return features{}, fmt.Errorf("namespace %s: %w", namespace, err)
		}
		defer ns.Close()
		config.NetNS = int(ns.Fd())
	}
	conn, err := genetlink.Dial(config)
	if err != nil {
		return features{}, fmt.Errorf("generic netlink: %w", err)
	}
	defer conn.Close()
	family, err := conn.GetFamily("ethtool")
	if err != nil {
		return features{}, fmt.Errorf("generic netlink family ethtool: %w", err)
	}

	encoder := netlink.NewAttributeEncoder()
	encoder.Nested(unix.ETHTOOL_A_FEATURES_HEADER, func(header *netlink.AttributeEncoder) error {
		header.String(unix.ETHTOOL_A_HEADER_DEV_NAME, device)
		return nil
	})
	request, err := encoder.Encode()
	if err != nil {
		return features{}, fmt.Errorf("features request: %w", err)
	}
	replies, err := conn.Execute(genetlink.Message{
		Header: genetlink.Header{Command: unix.ETHTOOL_MSG_FEATURES_GET, Version: unix.ETHTOOL_GENL_VERSION},
		Data:   request,
	}, family.ID, netlink.Request)
	if err != nil {
		return features{}, fmt.Errorf("features of %s: %w", device, err)
	}
	if len(replies) != 1 {
		return features{}, fmt.Errorf("features of %s: %d replies", device, len(replies))
	}
	return parseFeatures(replies[0].Data)
}

// parseFeatures parses one ETHTOOL_MSG_FEATURES_GET_REPLY with verbose bit sets.
func parseFeatures(data []byte) (f features, err error) {
	decoder, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return f, fmt.Errorf("features: %w", err)
	}
	for decoder.Next() {
		switch decoder.Type() {
		case unix.ETHTOOL_A_FEATURES_HW:
			decoder.Nested(bitNames(&f.hw))
		case unix.ETHTOOL_A_FEATURES_WANTED:
			decoder.Nested(bitNames(&f.wanted))
		case unix.ETHTOOL_A_FEATURES_ACTIVE:
			decoder.Nested(bitNames(&f.active))
		case unix.ETHTOOL_A_FEATURES_NOCHANGE:
			decoder.Nested(bitNames(&f.noChange))
		}
	}
	if err := decoder.Err(); err != nil {
		return f, fmt.Errorf("features: %w", err)
	}
	return f, nil
}

// bitNames collects the names in a verbose bit set: without a mask all that are listed are set, with one those with a value.
func bitNames(names *[]string) func(*netlink.AttributeDecoder) error {
	return func(set *netlink.AttributeDecoder) error {
		noMask := false
		for set.Next() {
			switch set.Type() {
			case unix.ETHTOOL_A_BITSET_NOMASK:
				noMask = true
			case unix.ETHTOOL_A_BITSET_BITS:
				set.Nested(func(bits *netlink.AttributeDecoder) error {
					for bits.Next() {
						bits.Nested(func(bit *netlink.AttributeDecoder) error {
							name, value := "", noMask
							for bit.Next() {
								switch bit.Type() {
								case unix.ETHTOOL_A_BITSET_BIT_NAME:
									name = bit.String()
								case unix.ETHTOOL_A_BITSET_BIT_VALUE:
									value = true
								}
							}
							if value {
								*names = append(*names, name)
							}
							return bit.Err()
						})
					}
					return bits.Err()
				})
			}
		}
		return set.Err()
	}
}

// featureLines returns every changeable or active feature of every device in a namespace, a line each, in order.
func featureLines(namespace string) ([]string, error) {
	var devices []net.Interface
	if err := inNamespace(namespace, func() (err error) {
		devices, err = net.Interfaces()
		return err
	}); err != nil {
		return nil, fmt.Errorf("devices of %s: %w", namespace, err)
	}
	var lines []string
	for _, device := range devices {
		// One by one: a dump of verbose bit sets ended in EMSGSIZE.
		f, err := readFeatures(namespace, device.Name)
		if err != nil {
			return nil, err
		}
		names := slices.Concat(f.hw, f.wanted, f.active, f.noChange)
		slices.Sort(names)
		for _, name := range slices.Compact(names) {
			lines = append(lines, fmt.Sprintf("%s %s %s", device.Name, name, f.describe(name)))
		}
	}
	slices.Sort(lines)
	return lines, nil
}
