package l2tp

import (
	"slices"
	"testing"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// fakeFamily is the id of the family "l2tp" of a fake kernel.
const fakeFamily = 0x42

// TestFamilyThatAppearsLater has no sessions while the module is not there, never asks for the
// family by its name, which would load it, and finds it when it has come, gone and come again.
func TestFamilyThatAppearsLater(t *testing.T) {
	there := false
	requests := genltest.Dial(func(m genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		if n.Header.Type == unix.GENL_ID_CTRL {
			if n.Header.Flags&netlink.Dump == 0 {
				t.Error("the family was asked for by its name")
			}
			out := []genetlink.Message{{Data: familyAttrs(t, unix.GENL_ID_CTRL, "nlctrl")}}
			if there {
				out = append(out, genetlink.Message{Data: familyAttrs(t, fakeFamily, familyName)})
			}
			return out, nil
		}
		if !there {
			return nil, unix.ENOENT
		}
		switch m.Header.Command {
		case cmdTunnels:
			return []genetlink.Message{{Data: unhex(t, capturedTunnel)}}, nil
		case cmdSessions:
			return []genetlink.Message{{Data: unhex(t, capturedSession)}}, nil
		}
		t.Errorf("command %d", m.Header.Command)
		return nil, genltest.Error(int(unix.EOPNOTSUPP))
	})
	defer requests.Close()
	w := &Watcher{requests: requests, again: make(chan struct{}, 1)}
	for _, there = range []bool{false, true, true, false, false, true} {
		sessions, err := w.look()
		if names := slices.Collect(func(yield func(string) bool) {
			for _, s := range sessions {
				if !yield(s.Ifname) {
					return
				}
			}
		}); err != nil || there != slices.Equal(names, []string{"s1"}) {
			t.Errorf("family there: %t: %v, %v", there, names, err)
		}
	}
}

// TestBrokenAnswerIsALoss tells of what can't be decoded instead of leaving it out.
func TestBrokenAnswerIsALoss(t *testing.T) {
	requests := genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return []genetlink.Message{{Data: []byte{3, 0, 0, 0}}}, nil
	})
	defer requests.Close()
	w := &Watcher{requests: requests, family: genetlink.Family{ID: fakeFamily}}
	if s, err := w.look(); err == nil {
		t.Errorf("sessions %v from nonsense", s)
	}
	if w.Stats().Undecodable != 1 {
		t.Errorf("%+v", w.Stats())
	}
}

func familyAttrs(t *testing.T, id uint16, name string) []byte {
	t.Helper()
	ae := netlink.NewAttributeEncoder()
	ae.Uint16(unix.CTRL_ATTR_FAMILY_ID, id)
	ae.String(unix.CTRL_ATTR_FAMILY_NAME, name)
	ae.Uint32(unix.CTRL_ATTR_VERSION, version)
	b, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
