package routes

import (
	"encoding/binary"
	"os"
	"testing"
)

// TestDecodeBondPort reads by which of a bond's ports it doesn't send now.
func TestDecodeBondPort(t *testing.T) {
	link := func(kind string, data []byte) []byte {
		msg := make([]byte, ifinfomsgLen)
		binary.NativeEndian.PutUint32(msg[4:], 7)
		msg = appendAttr(msg, iflaIfname, []byte("eth0\x00"))
		info := appendAttr(nil, iflaInfoSlaveData, data) // ahead of its kind, which nothing forbids
		info = appendAttr(info, iflaInfoSlaveKind, append([]byte(kind), 0))
		return appendAttr(msg, iflaLinkInfo, info)
	}
	// IFLA_BOND_SLAVE_MII_STATUS stands behind the state.
	port := func(state byte) []byte {
		return appendAttr(appendAttr(nil, iflaBondSlaveState, []byte{state}), 2, []byte{0})
	}
	for _, tc := range []struct {
		name string
		msg  []byte
		want bool
	}{
		{"active", link("bond", port(0)), false},
		{"backup", link("bond", port(bondStateBackup)), true},
		{"a bridge's port, whose first attribute is another one", link("bridge", port(1)), false},
		{"without a state", link("bond", nil), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, err := decodeLink(tc.msg)
			if err != nil {
				t.Fatal(err)
			}
			if l.Backup != tc.want {
				t.Errorf("Backup = %t, want %t", l.Backup, tc.want)
			}
		})
	}
	if _, err := decodeLink(link("bond", []byte{8, 0, 1})); err == nil {
		t.Error("a torn IFLA_INFO_SLAVE_DATA is no error")
	}
}

// TestKernelBondTellsOfFailover: each port's event says whether the bond sends by it, so that
// nobody has to ask.
func TestKernelBondTellsOfFailover(t *testing.T) {
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for bonds")
	}
	newNS(t)
	ip(t, `link add bond1 type bond mode active-backup miimon 100
link add d0 type dummy
link add d1 type dummy
link set d0 master bond1
link set d1 master bond1
link set bond1 up`)
	f := follow(t, WatchOptions{})
	backup := func(name string) bool {
		for _, l := range f.fib.Links() {
			if l.Name == name {
				return l.Backup
			}
		}
		t.Fatalf("no device %s", name)
		return false
	}
	is := func(name string, want bool) func(Event) bool {
		return func(ev Event) bool {
			set, ok := ev.(LinkSet)
			return ok && set.Link.Name == name && set.Link.Backup == want
		}
	}
	if backup("d0") || !backup("d1") {
		t.Fatalf("at first: d0 backup %t, d1 backup %t", backup("d0"), backup("d1"))
	}
	ip(t, `link set bond1 type bond active_slave d1`)
	f.until(is("d0", true))
	if backup("d1") {
		f.until(is("d1", false))
	}
	// The carrier of the active port goes: the bond changes over by itself.
	ip(t, `link set d1 down`)
	f.until(is("d0", false))
	if !backup("d1") {
		f.until(is("d1", true))
	}
	ip(t, `link set d1 nomaster`)
	f.until(is("d1", false))
}
