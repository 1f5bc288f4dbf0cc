package ethtool

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the captured messages in testdata anew, from this kernel")

// raw sends a request with a header whose flags are given, for captures.
func (c *Client) raw(t *testing.T, command uint8, headerType uint16, dev Device, flags uint32, more func(*netlink.AttributeEncoder)) []byte {
	t.Helper()
	ae := netlink.NewAttributeEncoder()
	ae.Nested(headerType, func(ae *netlink.AttributeEncoder) error {
		if dev.Index != 0 {
			ae.Uint32(unix.ETHTOOL_A_HEADER_DEV_INDEX, uint32(dev.Index))
		}
		ae.Uint32(unix.ETHTOOL_A_HEADER_FLAGS, flags)
		return nil
	})
	if more != nil {
		more(ae)
	}
	b, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := c.execute(command, 0, b)
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%d messages, %v", len(msgs), err)
	}
	return msgs[0].Data
}

// TestBothFormsSayTheSame asks this kernel for the verbose and the compact form. With -update
// it writes what it got to testdata, where the decoder's tests and fuzz seeds come from.
func TestBothFormsSayTheSame(t *testing.T) {
	enterNS(t)
	dev, c := addLink(t, veth("v0")), dial(t)
	mustSet(t, c, dev, scatterOff)
	group, err := genetlink.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	w := newWatcher(group, c)
	if err := w.subscribe(); err != nil {
		t.Fatal(err)
	}
	bits := func(name string, value bool) func(*netlink.AttributeEncoder) {
		return func(ae *netlink.AttributeEncoder) {
			ae.Nested(unix.ETHTOOL_A_FEATURES_WANTED, func(ae *netlink.AttributeEncoder) error {
				ae.Nested(unix.ETHTOOL_A_BITSET_BITS, func(ae *netlink.AttributeEncoder) error {
					for _, name := range strings.Split(name, ",") {
						ae.Nested(unix.ETHTOOL_A_BITSET_BITS_BIT, func(ae *netlink.AttributeEncoder) error {
							ae.String(unix.ETHTOOL_A_BITSET_BIT_NAME, name)
							ae.Flag(unix.ETHTOOL_A_BITSET_BIT_VALUE, value)
							return nil
						})
					}
					return nil
				})
				return nil
			})
		}
	}
	const get, set, compact = unix.ETHTOOL_MSG_FEATURES_GET, unix.ETHTOOL_MSG_FEATURES_SET, unix.ETHTOOL_FLAG_COMPACT_BITSETS
	captured := map[string][]byte{
		"get-verbose": c.raw(t, get, unix.ETHTOOL_A_FEATURES_HEADER, dev, 0, nil),
		"get-compact": c.raw(t, get, unix.ETHTOOL_A_FEATURES_HEADER, dev, compact, nil),
		"strset": c.raw(t, unix.ETHTOOL_MSG_STRSET_GET, unix.ETHTOOL_A_STRSET_HEADER, Device{}, 0, func(ae *netlink.AttributeEncoder) {
			ae.Nested(unix.ETHTOOL_A_STRSET_STRINGSETS, func(ae *netlink.AttributeEncoder) error {
				ae.Nested(unix.ETHTOOL_A_STRINGSETS_STRINGSET, func(ae *netlink.AttributeEncoder) error {
					ae.Uint32(unix.ETHTOOL_A_STRINGSET_ID, stringSetFeatures)
					return nil
				})
				return nil
			})
		}),
	}
	// A notification comes with the next change; the reply has differences of both kinds.
	captured["set-verbose"] = c.raw(t, set, unix.ETHTOOL_A_FEATURES_HEADER, dev, 0, bits("esp-hw-offload,rx-gro-list", true))
	captured["set-compact"] = c.raw(t, set, unix.ETHTOOL_A_FEATURES_HEADER, dev, compact, bits("esp-hw-offload,rx-udp-gro-forwarding", true))
	captured["set-noop"] = c.raw(t, set, unix.ETHTOOL_A_FEATURES_HEADER, dev, compact, bits("rx-gro-list", true))
	if err := group.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	msgs, _, err := group.Receive()
	if err != nil || len(msgs) != 1 || msgs[0].Header.Command != unix.ETHTOOL_MSG_FEATURES_NTF {
		t.Fatalf("notification: %v, %v", msgs, err)
	}
	captured["ntf"] = msgs[0].Data

	verbose, never, err := decodeFeatures(captured["get-verbose"], nil)
	if err != nil {
		t.Fatal(err)
	}
	short, shortNever, err := decodeFeatures(captured["get-compact"], c.names)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(text(verbose), text(short)); diff != "" || !slices.Equal(never, shortNever) {
		t.Errorf("(-verbose +compact):\n%s", diff)
	}
	t.Logf("%d bytes verbose, %d compact", len(captured["get-verbose"]), len(captured["get-compact"]))
	for _, name := range []string{"set-verbose", "set-compact"} {
		d, err := decodeSetReply(captured[name], c.names)
		if err != nil || !d.refused[ESPHWOffload] || len(d.refused) != 1 || len(d.changed) != 1 {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	if d, err := decodeSetReply(captured["set-noop"], c.names); err != nil || len(d.refused)+len(d.changed) != 0 {
		t.Errorf("no-op: %+v, %v", d, err)
	}
	if *update {
		for name, b := range captured {
			if err := os.WriteFile(filepath.Join("testdata", name+".bin"), b, 0o644); err != nil {
				t.Error(err)
			}
		}
	}
}
