// Package ethtool knows the offload features of network devices: which are active, which are
// wanted, which can't be changed, and how to switch single ones.
//
// The values are pure; kernel I/O (the generic netlink family "ethtool", and the ioctl for
// driver information) lives in client_linux.go, watch_linux.go and info_linux.go.
package ethtool

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
)

// Ifindex is the kernel's number of a network device in its namespace.
type Ifindex int32

// Feature is the name of one device feature as `ethtool -k` and the kernel spell it
// (netdev_features_strings, net/ethtool/common.c).
type Feature string

// The features that the agent holds. "tso" itself is no feature: the legacy group also turns on
// tx-tcp-mangleid-segmentation, so only single features are ever set.
const (
	TCPSegmentation    Feature = "tx-tcp-segmentation"
	TCP6Segmentation   Feature = "tx-tcp6-segmentation"
	TCPECNSegmentation Feature = "tx-tcp-ecn-segmentation"
	UDPSegmentation    Feature = "tx-udp-segmentation"
	GenericSegm        Feature = "tx-generic-segmentation"
	ESPHWOffload       Feature = "esp-hw-offload"
	ESPSegmentation    Feature = "tx-esp-segmentation"
	ESPTxCsum          Feature = "esp-tx-csum-hw-offload"
)

// State is one feature's state on one device.
type State struct {
	// Active is what the device does now.
	Active bool `json:"active"`
	// Wanted is what was asked for. It stays while a dependency (sg, checksumming) keeps the
	// feature down, so it is the bit to remember and to restore.
	Wanted bool `json:"wanted"`
	// Changeable is false for `[fixed]` features.
	Changeable bool `json:"changeable"`
}

// String renders the state as `ethtool -k` does.
func (s State) String() string {
	text := "off"
	if s.Active {
		text = "on"
	}
	switch {
	case !s.Changeable:
		return text + " [fixed]"
	case s.Active != s.Wanted && s.Wanted:
		return text + " [requested on]"
	case s.Active != s.Wanted:
		return text + " [requested off]"
	}
	return text
}

// Features are the features of one device. A Features value is immutable once it was handed
// out, so it is safe for concurrent use. The zero value knows no feature.
//
// A namespace with ten thousand devices has as many Features values: each holds three bitmaps,
// the names are shared.
type Features struct {
	Index Ifindex
	Name  string
	names *nameTable
	// active, wanted and changeable are bitmaps over names, of equal length.
	active, wanted, changeable bitmap
}

// NewFeatures returns the features of the device, for decoders and tests. It copies state.
func NewFeatures(index Ifindex, name string, state map[Feature]State) *Features {
	names := newNameTable(slices.Sorted(maps.Keys(state)))
	f := newFeatures(index, name, names, names.bits())
	for feature, s := range state {
		bit := names.index[feature]
		f.active.put(bit, s.Active)
		f.wanted.put(bit, s.Wanted)
		f.changeable.put(bit, s.Changeable)
	}
	return f
}

// newFeatures returns features with all bits clear, in one allocation for the three bitmaps.
func newFeatures(index Ifindex, name string, names *nameTable, bits int) *Features {
	words := (bits + 63) / 64
	all := make(bitmap, 3*words)
	return &Features{
		Index: index, Name: name, names: names,
		active:     all[:words:words],
		wanted:     all[words : 2*words : 2*words],
		changeable: all[2*words:],
	}
}

// Device names the device that the features belong to, for a request about it.
func (f *Features) Device() Device { return Device{Index: f.Index, Name: f.Name} }

// Get returns the state of a feature, and false if the kernel does not know it.
func (f *Features) Get(name Feature) (State, bool) {
	if f == nil || f.names == nil {
		return State{}, false
	}
	bit, ok := f.names.index[name]
	if !ok {
		return State{}, false
	}
	return f.at(bit), true
}

func (f *Features) at(bit int) State {
	return State{Active: f.active.get(bit), Wanted: f.wanted.get(bit), Changeable: f.changeable.get(bit)}
}

// Len is the number of known features.
func (f *Features) Len() int {
	if f == nil || f.names == nil {
		return 0
	}
	return len(f.names.index)
}

// All yields every feature that the kernel has a name for, in the kernel's order.
func (f *Features) All() iter.Seq2[Feature, State] {
	return func(yield func(Feature, State) bool) {
		if f == nil || f.names == nil {
			return
		}
		for bit, name := range f.names.names {
			if name != "" && !yield(name, f.at(bit)) {
				return
			}
		}
	}
}

// Equal says whether both are the same device with the same features in the same states. It
// lets an unchanged device be recognised, and makes cmp.Diff work.
func (f *Features) Equal(other *Features) bool {
	if f == nil || other == nil {
		return f == other
	}
	if f.Index != other.Index || f.Name != other.Name || f.Len() != other.Len() {
		return false
	}
	if f.names == other.names && len(f.active) == len(other.active) {
		return slices.Equal(f.active, other.active) && slices.Equal(f.wanted, other.wanted) &&
			slices.Equal(f.changeable, other.changeable)
	}
	for name, s := range f.All() {
		if o, ok := other.Get(name); !ok || o != s {
			return false
		}
	}
	return true
}

// A nameTable is the kernel's string set ETH_SS_FEATURES: the name of each feature bit, "" for
// a bit without one. It is immutable.
type nameTable struct {
	names []Feature
	index map[Feature]int
}

func newNameTable(names []Feature) *nameTable {
	t := &nameTable{names: names, index: make(map[Feature]int, len(names))}
	for bit, name := range names {
		if name != "" {
			t.index[name] = bit
		}
	}
	return t
}

// bits is the number of bits, named or not.
func (t *nameTable) bits() int { return len(t.names) }

// A bitmap is a set of small numbers. What lies beyond its end is not in it.
type bitmap []uint64

func (b bitmap) get(bit int) bool {
	return bit>>6 < len(b) && b[bit>>6]&(1<<(bit&63)) != 0
}

func (b bitmap) put(bit int, on bool) {
	switch {
	case bit>>6 >= len(b):
	case on:
		b[bit>>6] |= 1 << (bit & 63)
	default:
		b[bit>>6] &^= 1 << (bit & 63)
	}
}

// Event is what the kernel told or what a dump found. The events of a dump stand between
// ResyncBegin and ResyncEnd; a device that does not appear between the two is gone.
type Event interface{ ethtoolEvent() }

type (
	// Lost says that events were lost: what is known is stale until the next ResyncEnd.
	Lost struct{ Err error }
	// ResyncBegin opens a full dump.
	ResyncBegin struct{}
	// ResyncEnd closes a full dump.
	ResyncEnd struct{}
	// FeaturesSet are the features of a device, found by a dump, a request or a notification.
	FeaturesSet struct{ Features *Features }
	// Gone is a device whose features can't be read any more because it is not there.
	Gone struct{ Index Ifindex }
)

func (Lost) ethtoolEvent()        {}
func (ResyncBegin) ethtoolEvent() {}
func (ResyncEnd) ethtoolEvent()   {}
func (FeaturesSet) ethtoolEvent() {}
func (Gone) ethtoolEvent()        {}

// Device names a device for a request. Both the index and the name are sent, so that the
// kernel itself refuses (ENODEV) when the index was reused or the device was renamed.
type Device struct {
	Index Ifindex
	Name  string
}

// String renders the device as "eth0 (index 2)".
func (d Device) String() string {
	switch {
	case d.Name == "":
		return fmt.Sprintf("index %d", d.Index)
	case d.Index == 0:
		return d.Name
	}
	return fmt.Sprintf("%s (index %d)", d.Name, d.Index)
}

// RefusedError says which features the kernel did not set as asked, and what they are now.
type RefusedError struct {
	Device  Device
	Refused map[Feature]State
	// Unknown are those of the refused features that this kernel has no name for.
	Unknown []Feature
}

func (e *RefusedError) Error() string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(e.Refused)) {
		state := e.Refused[name].String()
		if slices.Contains(e.Unknown, name) {
			state = "not known to this kernel"
		}
		parts = append(parts, fmt.Sprintf("%s is %s", name, state))
	}
	return fmt.Sprintf("ethtool: %s refuses %d of the features asked for: %s", e.Device, len(parts), strings.Join(parts, ", "))
}

// Info is what identifies a device and its driver. Empty fields are not known.
type Info struct {
	Driver   string `json:"driver,omitempty"`
	Bus      string `json:"bus,omitempty"`
	Firmware string `json:"firmware,omitempty"`
	// PermAddr is the permanent hardware address, empty where a device has none.
	PermAddr string `json:"perm_addr,omitempty"`
}
