package ethtool

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

var testFamily = genetlink.Family{
	ID: 20, Version: 1, Name: unix.ETHTOOL_GENL_NAME,
	Groups: []genetlink.MulticastGroup{{ID: 3, Name: unix.ETHTOOL_MCGRP_MONITOR_NAME}},
}

// fake returns a client that talks to answer, which gets every request but those for the family
// and for the names.
func fake(t *testing.T, answer genltest.Func) *Client {
	t.Helper()
	strset := captured(t, "strset")
	c, err := newClient(genltest.Dial(genltest.ServeFamily(testFamily, func(g genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		if g.Header.Command == unix.ETHTOOL_MSG_STRSET_GET && len(n.Data) > 0 {
			return []genetlink.Message{{Header: genetlink.Header{Command: unix.ETHTOOL_MSG_STRSET_GET_REPLY}, Data: strset}}, nil
		}
		return answer(g, n)
	})))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func message(command uint8, data []byte) []genetlink.Message {
	return []genetlink.Message{{Header: genetlink.Header{Command: command}, Data: data}}
}

var methods = []struct {
	name string
	call func(*Client) error
}{
	{"Features", func(c *Client) error { _, err := c.Features(Device{Index: 2, Name: "v0"}); return err }},
	{"All", func(c *Client) error { return c.All(func(*Features) error { return nil }) }},
	{"Set", func(c *Client) error { _, err := c.Set(Device{Index: 2, Name: "v0"}, onlyTSO); return err }},
}

func TestMethodsPassOnErrnos(t *testing.T) {
	for _, tt := range []struct {
		errno unix.Errno
		is    []error
	}{
		{unix.ENODEV, []error{unix.ENODEV, os.ErrNotExist}},
		{unix.EPERM, []error{unix.EPERM, os.ErrPermission}},
		{unix.EOPNOTSUPP, []error{unix.EOPNOTSUPP, errors.ErrUnsupported}},
		{unix.EINVAL, []error{unix.EINVAL}},
		{unix.ENOBUFS, []error{unix.ENOBUFS}},
	} {
		for _, m := range methods {
			t.Run(fmt.Sprintf("%s/%s", m.name, unix.ErrnoName(tt.errno)), func(t *testing.T) {
				c := fake(t, func(_ genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
					if n.Header.Flags&netlink.Dump != 0 {
						// nltest copies the flags of the request to the error, and there
						// NLM_F_DUMP reads as NLM_F_ACK_TLVS.
						return nil, tt.errno
					}
					return nil, genltest.Error(int(tt.errno))
				})
				err := m.call(c)
				for _, want := range tt.is {
					if !errors.Is(err, want) {
						t.Errorf("got %v, want %v", err, want)
					}
				}
				if err != nil && !strings.HasPrefix(err.Error(), "ethtool: ") {
					t.Errorf("%q does not say whose error it is", err)
				}
			})
		}
	}
}

func TestMethodsRefuseAlienReplies(t *testing.T) {
	get := captured(t, "get-compact")
	for name, reply := range map[string][]genetlink.Message{
		"another command": message(unix.ETHTOOL_MSG_RINGS_GET_REPLY, get),
		"truncated":       message(unix.ETHTOOL_MSG_FEATURES_GET_REPLY, get[:len(get)-7]),
		"empty":           message(unix.ETHTOOL_MSG_FEATURES_GET_REPLY, nil),
	} {
		for _, m := range methods {
			t.Run(m.name+"/"+name, func(t *testing.T) {
				c := fake(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) { return reply, nil })
				if err := m.call(c); !errors.Is(err, errAlien) {
					t.Errorf("got %v, want errAlien", err)
				}
			})
		}
	}
}

func TestRequestsOnTheWire(t *testing.T) {
	get, reply := captured(t, "get-compact"), captured(t, "set-noop")
	var commands []string
	c := fake(t, func(g genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		var index, flags uint32
		var name string
		bits := map[string]bool{}
		err := eachAttr(g.Data, func(typ uint16, v []byte) error {
			if typ == unix.ETHTOOL_A_FEATURES_HEADER {
				return eachAttr(v, func(typ uint16, v []byte) error {
					switch typ {
					case unix.ETHTOOL_A_HEADER_DEV_INDEX:
						index, _ = attrUint32(v)
					case unix.ETHTOOL_A_HEADER_DEV_NAME:
						name = attrString(v)
					case unix.ETHTOOL_A_HEADER_FLAGS:
						flags, _ = attrUint32(v)
					}
					return nil
				})
			}
			return eachAttr(v, func(typ uint16, v []byte) error {
				if typ == unix.ETHTOOL_A_BITSET_NOMASK {
					t.Error("a list would clear all other features")
				}
				return eachAttr(v, func(_ uint16, v []byte) error {
					name, on := "", false
					err := eachAttr(v, func(typ uint16, v []byte) error {
						switch typ {
						case unix.ETHTOOL_A_BITSET_BIT_NAME:
							name = attrString(v)
						case unix.ETHTOOL_A_BITSET_BIT_VALUE:
							on = true
						}
						return nil
					})
					bits[name] = on
					return err
				})
			})
		})
		if err != nil {
			t.Error(err)
		}
		commands = append(commands, fmt.Sprintf("%d dev %d %q compact %v bits %v", g.Header.Command, index, name, flags&1 != 0, bits))
		if g.Header.Command == unix.ETHTOOL_MSG_FEATURES_SET {
			return message(unix.ETHTOOL_MSG_FEATURES_SET_REPLY, reply), nil
		}
		return message(unix.ETHTOOL_MSG_FEATURES_GET_REPLY, get), nil
	})
	dev := Device{Index: 2, Name: "v0"}
	// vlan-challenged can't be changed on any device; asking would make the kernel refuse all.
	_, err := c.Set(dev, map[Feature]bool{TCPSegmentation: false, GenericSegm: true, "vlan-challenged": true, "nosuch": true})
	if refused := (*RefusedError)(nil); !errors.As(err, &refused) || len(refused.Refused) != 2 {
		t.Errorf("got %v, want two features refused", err)
	}
	want := []string{
		`11 dev 2 "v0" compact true bits map[]`,
		`12 dev 2 "v0" compact true bits map[tx-generic-segmentation:true tx-tcp-segmentation:false]`,
		`11 dev 2 "v0" compact true bits map[]`,
	}
	if got := strings.Join(commands, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}

func TestJudge(t *testing.T) {
	dev := Device{Index: 7, Name: "eth0"}
	ask := map[Feature]bool{TCPSegmentation: true}
	differs := difference{refused: ask}
	for _, tt := range []struct {
		name    string
		diff    difference
		now     State
		refused bool
	}{
		{"took", difference{}, on, false},
		{"sticks", differs, requestedOn, false},
		{"refused", differs, off, true},
		{"fixed, other", differs, State{}, true},
		{"fixed, as asked", difference{}, State{Active: true}, false},
		{"took, and somebody else changed it since", difference{}, off, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			now := NewFeatures(7, "eth0", map[Feature]State{TCPSegmentation: tt.now})
			if err := judge(dev, ask, tt.diff, now); (err != nil) != tt.refused {
				t.Errorf("got %v, want refused: %v", err, tt.refused)
			}
		})
	}
}

func TestDialWithoutFamily(t *testing.T) {
	_, err := newClient(genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.ENOENT))
	}))
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "5.6") {
		t.Errorf("got %v, want os.ErrNotExist and what kernel is needed", err)
	}
}
