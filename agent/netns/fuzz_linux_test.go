package netns

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/mdlayher/netlink"
)

// FuzzID: a number that the kernel gives stands in its message, and written alone reads as the same.
func FuzzID(f *testing.F) {
	for _, id := range []uint32{0, 7, 1<<31 - 1, 1<<32 - 1} {
		f.Add(idMessage(f, id))
	}
	f.Add([]byte{0, 0, 0})
	f.Add([]byte{0, 0, 0, 0, 3, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := decodeID(b)
		if err != nil {
			if id != 0 {
				t.Errorf("%d and %v", id, err)
			}
			return
		}
		if again, err := decodeID(idMessage(t, uint32(id))); err != nil || again != id || id < 0 {
			t.Errorf("%d reads as %d, %v", id, again, err)
		}
	})
}

// TestNoNumberIsNone: a namespace that has no number has -1, and a message may lack it.
func TestNoNumberIsNone(t *testing.T) {
	for _, b := range [][]byte{nil, idMessage(t, 1<<32-1), make([]byte, rtgenmsgLen)} {
		if id, err := decodeID(b); !errors.Is(err, ErrNoID) {
			t.Errorf("%x: %d, %v", b, id, err)
		}
	}
}

func idMessage(t testing.TB, id uint32) []byte {
	t.Helper()
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: netnsaNSID, Data: binary.NativeEndian.AppendUint32(nil, id)}})
	if err != nil {
		t.Fatal(err)
	}
	return append(make([]byte, rtgenmsgLen), attrs...)
}
