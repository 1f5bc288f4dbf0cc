package ethtool

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// stringSetFeatures is ETH_SS_FEATURES (linux/ethtool.h).
const stringSetFeatures = 4

// errNoFamily says that the kernel has no ethtool over netlink.
var errNoFamily = errors.New("the kernel has no generic netlink family \"ethtool\"; Linux 5.6 or newer with CONFIG_ETHTOOL_NETLINK is needed")

// A noDeviceError is ENODEV, which package syscall does not take for os.ErrNotExist.
type noDeviceError struct{ err error }

func (e *noDeviceError) Error() string   { return e.err.Error() }
func (e *noDeviceError) Unwrap() []error { return []error{e.err, os.ErrNotExist} }

// A Client reads and sets device features over generic netlink, in the network namespace in
// which it was dialed. It is not safe for concurrent use; one for each namespace is enough.
//
// The errors of its methods can be told apart by errors.Is: os.ErrNotExist (also unix.ENODEV)
// where there is no such device, or where its index and name don't belong together;
// os.ErrPermission (unix.EPERM) where CAP_NET_ADMIN is missing; errors.ErrUnsupported
// (unix.EOPNOTSUPP) where the kernel does not know the request.
type Client struct {
	conn   *genetlink.Conn
	family genetlink.Family
	// names is the string set ETH_SS_FEATURES; it is the same for all devices of a kernel.
	names *nameTable
	// never are the features that nobody can change on any device, nil until they are known.
	never bitmap
}

// Dial returns a client for the network namespace of the calling thread; call
// runtime.LockOSThread first if that is not the namespace of the process. Once dialed, the
// client can be used on any thread.
//
// The error is os.ErrNotExist where the kernel has no generic netlink family "ethtool".
func Dial() (*Client, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("ethtool: dial generic netlink: %w", err)
	}
	// Extended acknowledgements turn "invalid argument" into a sentence. They are optional.
	_ = conn.SetOption(netlink.ExtendedAcknowledge, true)
	c, err := newClient(conn)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

// newClient takes over conn, resolves the family and reads the names of the features.
func newClient(conn *genetlink.Conn) (*Client, error) {
	family, err := conn.GetFamily(unix.ETHTOOL_GENL_NAME)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("ethtool: %w: %w", errNoFamily, err)
	}
	if err != nil {
		return nil, fmt.Errorf("ethtool: resolve the netlink family: %w", err)
	}
	c := &Client{conn: conn, family: family}
	if c.names, err = c.readNames(); err != nil {
		return nil, fmt.Errorf("ethtool: read the names of the features: %w", err)
	}
	return c, nil
}

// Close closes the client's socket.
func (c *Client) Close() error { return c.conn.Close() }

// Names returns the names of all features that the kernel knows, in its order.
func (c *Client) Names() []Feature {
	return slices.DeleteFunc(slices.Clone(c.names.names), func(f Feature) bool { return f == "" })
}

// Features reads the features of a device. A zero index or an empty name is left out of the
// request; if both are given, they must belong together.
func (c *Client) Features(dev Device) (*Features, error) {
	f, err := c.features(dev)
	if err != nil {
		return nil, fmt.Errorf("ethtool: get features of %s: %w", dev, err)
	}
	return f, nil
}

func (c *Client) features(dev Device) (*Features, error) {
	req, err := encode(unix.ETHTOOL_A_FEATURES_HEADER, dev, nil)
	if err != nil {
		return nil, err
	}
	msgs, err := c.execute(unix.ETHTOOL_MSG_FEATURES_GET, 0, req)
	if err != nil {
		return nil, err
	}
	b, err := single(msgs, unix.ETHTOOL_MSG_FEATURES_GET_REPLY)
	if err != nil {
		return nil, err
	}
	f, never, err := decodeFeatures(b, c.names)
	if err != nil {
		return nil, err
	}
	c.never = never
	return f, nil
}

// All calls fn with the features of each device of the namespace, in the order of their
// indices, and stops at the first error, which it returns. The dump uses compact bitsets: about
// 170 bytes a device instead of five kilobytes.
func (c *Client) All(fn func(*Features) error) error {
	req, err := encode(unix.ETHTOOL_A_FEATURES_HEADER, Device{}, nil)
	if err != nil {
		return fmt.Errorf("ethtool: dump features: %w", err)
	}
	msgs, err := c.execute(unix.ETHTOOL_MSG_FEATURES_GET, netlink.Dump, req)
	if err != nil {
		return fmt.Errorf("ethtool: dump features: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Command != unix.ETHTOOL_MSG_FEATURES_GET_REPLY {
			return fmt.Errorf("ethtool: dump features: %w: command %d", errAlien, m.Header.Command)
		}
		f, never, err := decodeFeatures(m.Data, c.names)
		if err != nil {
			return fmt.Errorf("ethtool: dump features: %w", err)
		}
		c.never = never
		if err := fn(f); err != nil {
			return err
		}
	}
	return nil
}

// Set switches single features of a device on and off and returns the features as they are
// afterwards, also together with a *RefusedError. dev needs both index and name: the kernel
// refuses the request with ENODEV (os.ErrNotExist) if they don't belong together, that is if
// the index was reused or the device was renamed (ethnl_parse_header_dev_get,
// net/ethtool/netlink.c).
//
// What counts is the wanted bit. A feature that is wanted as asked but whose dependency (sg,
// checksumming) is down is no error: the request sticks and takes effect when the dependency
// comes back (KERNEL.md 11); the result shows it, Active differs from Wanted. A fixed feature
// that already is what was asked for is no error either.
//
// Features that did not take, among them those that this kernel does not know, are returned as
// a *RefusedError (errors.As). The others are set all the same. If the features could be set
// but not read back, the error says so and the features are nil.
func (c *Client) Set(dev Device, want map[Feature]bool) (*Features, error) {
	f, err := c.set(dev, want)
	if refused := (*RefusedError)(nil); errors.As(err, &refused) {
		return f, err
	}
	if err != nil {
		return nil, fmt.Errorf("ethtool: set features of %s: %w", dev, err)
	}
	return f, nil
}

func (c *Client) set(dev Device, want map[Feature]bool) (*Features, error) {
	if dev.Index <= 0 || dev.Name == "" {
		return nil, fmt.Errorf("both the index and the name are needed: %w", unix.EINVAL)
	}
	if c.never == nil {
		// One feature of NETIF_F_NEVER_CHANGE makes the kernel refuse the whole request, so we
		// have to know them.
		if _, err := c.features(dev); err != nil {
			return nil, err
		}
	}

	// One unknown name, too, makes it refuse everything (ethnl_parse_bit).
	var ask []Feature
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if bit, ok := c.names.index[name]; ok && !c.never.get(bit) {
			ask = append(ask, name)
		}
	}
	var diff difference
	if len(ask) > 0 {
		var err error
		if diff, err = c.sendSet(dev, ask, want); err != nil {
			return nil, err
		}
	}
	f, err := c.features(dev)
	if err != nil {
		return nil, fmt.Errorf("read back: %w", err)
	}
	return f, judge(dev, want, diff, f)
}

// sendSet asks for the features in ask.
func (c *Client) sendSet(dev Device, ask []Feature, want map[Feature]bool) (difference, error) {
	req, err := encode(unix.ETHTOOL_A_FEATURES_HEADER, dev, func(ae *netlink.AttributeEncoder) {
		// A value and mask pair in the verbose form: the bits that are named are the mask.
		ae.Nested(unix.ETHTOOL_A_FEATURES_WANTED, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(unix.ETHTOOL_A_BITSET_BITS, func(ae *netlink.AttributeEncoder) error {
				for _, name := range ask {
					ae.Nested(unix.ETHTOOL_A_BITSET_BITS_BIT, func(ae *netlink.AttributeEncoder) error {
						ae.String(unix.ETHTOOL_A_BITSET_BIT_NAME, string(name))
						ae.Flag(unix.ETHTOOL_A_BITSET_BIT_VALUE, want[name])
						return nil
					})
				}
				return nil
			})
			return nil
		})
	})
	if err != nil {
		return difference{}, err
	}
	failpoint.Hit("features-before")
	msgs, err := c.execute(unix.ETHTOOL_MSG_FEATURES_SET, 0, req)
	failpoint.Hit("features-after")
	if err != nil {
		return difference{}, err
	}
	b, err := single(msgs, unix.ETHTOOL_MSG_FEATURES_SET_REPLY)
	if err != nil {
		return difference{}, err
	}
	return decodeSetReply(b, c.names)
}

// judge says which of the features asked for did not take. The reply to SET alone does not
// tell, because it compares what was asked for with what is active, and a request that sticks
// is not active. The features read back alone don't tell either, because somebody else may have
// changed them since.
func judge(dev Device, want map[Feature]bool, diff difference, now *Features) error {
	refused := &RefusedError{Device: dev, Refused: map[Feature]State{}}
	for name, on := range want {
		state, known := now.Get(name)
		_, differs := diff.refused[name]
		switch {
		case !known:
			refused.Unknown = append(refused.Unknown, name)
		case !state.Changeable && state.Active == on:
			continue
		case !state.Changeable:
		case !differs, state.Wanted == on:
			continue
		}
		refused.Refused[name] = state
	}
	if len(refused.Refused) == 0 {
		return nil
	}
	slices.Sort(refused.Unknown)
	return refused
}

// readNames reads the string set ETH_SS_FEATURES.
func (c *Client) readNames() (*nameTable, error) {
	req, err := encode(unix.ETHTOOL_A_STRSET_HEADER, Device{}, func(ae *netlink.AttributeEncoder) {
		ae.Nested(unix.ETHTOOL_A_STRSET_STRINGSETS, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(unix.ETHTOOL_A_STRINGSETS_STRINGSET, func(ae *netlink.AttributeEncoder) error {
				ae.Uint32(unix.ETHTOOL_A_STRINGSET_ID, stringSetFeatures)
				return nil
			})
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	msgs, err := c.execute(unix.ETHTOOL_MSG_STRSET_GET, 0, req)
	if err != nil {
		return nil, err
	}
	b, err := single(msgs, unix.ETHTOOL_MSG_STRSET_GET_REPLY)
	if err != nil {
		return nil, err
	}
	return decodeNames(b, stringSetFeatures)
}

// execute sends one request and returns its replies. Replies to an earlier request, left behind
// when that one ended early, are skipped.
func (c *Client) execute(command uint8, flags netlink.HeaderFlags, data []byte) ([]genetlink.Message, error) {
	sent, err := c.conn.Send(genetlink.Message{
		Header: genetlink.Header{Command: command, Version: unix.ETHTOOL_GENL_VERSION},
		Data:   data,
	}, c.family.ID, netlink.Request|flags)
	if err != nil {
		return nil, err
	}
	for {
		msgs, raw, err := c.conn.Receive()
		if err != nil {
			op := (*netlink.OpError)(nil)
			if errors.As(err, &op) && op.Sequence != 0 && op.Sequence != sent.Header.Sequence {
				continue
			}
			if errors.Is(err, unix.ENODEV) {
				err = &noDeviceError{err}
			}
			return nil, err
		}
		if len(raw) > 0 && raw[0].Header.Sequence != sent.Header.Sequence {
			continue
		}
		for _, m := range raw {
			// The list of devices changed under the dump (NLM_F_DUMP_INTR).
			if m.Header.Flags&netlink.DumpInterrupted != 0 {
				return nil, fmt.Errorf("dump interrupted: %w", unix.EINTR)
			}
		}
		return msgs, nil
	}
}

// encode encodes the common header, with the flag for compact bitsets in the reply, and what
// more adds to it.
func encode(headerType uint16, dev Device, more func(*netlink.AttributeEncoder)) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Nested(headerType, func(ae *netlink.AttributeEncoder) error {
		if dev.Index != 0 {
			ae.Uint32(unix.ETHTOOL_A_HEADER_DEV_INDEX, uint32(dev.Index))
		}
		if dev.Name != "" {
			ae.String(unix.ETHTOOL_A_HEADER_DEV_NAME, dev.Name)
		}
		ae.Uint32(unix.ETHTOOL_A_HEADER_FLAGS, unix.ETHTOOL_FLAG_COMPACT_BITSETS)
		return nil
	})
	if more != nil {
		more(ae)
	}
	return ae.Encode()
}

// single returns the payload of the one message that msgs must be.
func single(msgs []genetlink.Message, command uint8) ([]byte, error) {
	if len(msgs) != 1 {
		return nil, fmt.Errorf("%w: %d replies to one request", errAlien, len(msgs))
	}
	if got := msgs[0].Header.Command; got != command {
		return nil, fmt.Errorf("%w: command %d in the reply, not %d", errAlien, got, command)
	}
	return msgs[0].Data, nil
}
