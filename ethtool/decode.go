package ethtool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// errAlien marks a message that is not what linux/ethtool_netlink.h describes.
var errAlien = errors.New("malformed ethtool message")

// maxBits bounds the size of a bitset that is believed (ETHNL_MAX_BITSET_SIZE is S16_MAX,
// net/ethtool/bitset.c).
const maxBits = 1<<15 - 1

// attrTypeMask takes NLA_F_NESTED and NLA_F_NET_BYTEORDER off an attribute's type.
const attrTypeMask = 0x3fff

// eachAttr calls fn with the type (without flags) and the payload of each attribute in b, and
// stops at the first error.
func eachAttr(b []byte, fn func(typ uint16, v []byte) error) error {
	for len(b) > 0 {
		if len(b) < 4 {
			return fmt.Errorf("%w: %d bytes where an attribute should be", errAlien, len(b))
		}
		n := int(binary.NativeEndian.Uint16(b))
		typ := binary.NativeEndian.Uint16(b[2:]) & attrTypeMask
		if n < 4 || n > len(b) {
			return fmt.Errorf("%w: attribute %d says it has %d of %d bytes", errAlien, typ, n, len(b))
		}
		if err := fn(typ, b[4:n:n]); err != nil {
			return err
		}
		// The last attribute may come without its padding.
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

func attrUint32(v []byte) (uint32, error) {
	if len(v) != 4 {
		return 0, fmt.Errorf("%w: %d bytes where a u32 should be", errAlien, len(v))
	}
	return binary.NativeEndian.Uint32(v), nil
}

// attrString returns the text up to the first NUL.
func attrString(v []byte) string {
	text, _, _ := strings.Cut(string(v), "\x00")
	return text
}

// decodeHeader decodes the nest ETHTOOL_A_*_HEADER of a reply or notification.
func decodeHeader(b []byte) (Device, error) {
	var dev Device
	err := eachAttr(b, func(typ uint16, v []byte) error {
		switch typ {
		case unix.ETHTOOL_A_HEADER_DEV_INDEX:
			index, err := attrUint32(v)
			if err != nil {
				return err
			}
			dev.Index = Ifindex(index)
		case unix.ETHTOOL_A_HEADER_DEV_NAME:
			dev.Name = attrString(v)
		}
		return nil
	})
	if err == nil && (dev.Index <= 0 || dev.Name == "") {
		err = fmt.Errorf("%w: no device in the header", errAlien)
	}
	return dev, err
}

// A bitset is one decoded ETHTOOL_A_BITSET nest.
type bitset struct {
	present bool
	size    int
	value   bitmap
	// mask are the bits that the set speaks about; nil for all of them (a list, NOMASK).
	mask bitmap
	// names are the names that came with the bits, nil for the compact form.
	names map[int]Feature
}

// decodeBitset decodes the compact form (words) and the verbose one (a nest for each bit).
func decodeBitset(b []byte) (bitset, error) {
	set := bitset{present: true}
	var noMask bool
	var bits, value, mask []byte
	err := eachAttr(b, func(typ uint16, v []byte) error {
		switch typ {
		case unix.ETHTOOL_A_BITSET_NOMASK:
			noMask = true
		case unix.ETHTOOL_A_BITSET_SIZE:
			size, err := attrUint32(v)
			if err != nil {
				return err
			}
			if size > maxBits {
				return fmt.Errorf("%w: a bitset of %d bits", errAlien, size)
			}
			set.size = int(size)
		case unix.ETHTOOL_A_BITSET_BITS:
			bits = v[:len(v):len(v)]
			if bits == nil {
				bits = []byte{}
			}
		case unix.ETHTOOL_A_BITSET_VALUE:
			value = v
		case unix.ETHTOOL_A_BITSET_MASK:
			mask = v
		}
		return nil
	})
	if err != nil {
		return bitset{}, err
	}
	if set.size == 0 {
		return bitset{}, fmt.Errorf("%w: a bitset without a size", errAlien)
	}
	if bits != nil {
		return decodeVerbose(set, bits, noMask)
	}
	if set.value, err = compactBitmap(value, set.size); err != nil {
		return bitset{}, err
	}
	if noMask != (mask == nil) {
		return bitset{}, fmt.Errorf("%w: a bitset's mask and its list flag contradict each other", errAlien)
	}
	if mask != nil {
		set.mask, err = compactBitmap(mask, set.size)
	}
	return set, err
}

// decodeVerbose decodes the nest ETHTOOL_A_BITSET_BITS. In a list a bit that is named is set;
// in a value and mask pair it is set if it carries ETHTOOL_A_BITSET_BIT_VALUE.
func decodeVerbose(set bitset, bits []byte, noMask bool) (bitset, error) {
	words := (set.size + 63) / 64
	set.value = make(bitmap, words)
	set.names = map[int]Feature{}
	if !noMask {
		set.mask = make(bitmap, words)
	}
	err := eachAttr(bits, func(typ uint16, v []byte) error {
		if typ != unix.ETHTOOL_A_BITSET_BITS_BIT {
			return nil
		}
		bit, on, name := -1, noMask, Feature("")
		err := eachAttr(v, func(typ uint16, v []byte) error {
			switch typ {
			case unix.ETHTOOL_A_BITSET_BIT_INDEX:
				index, err := attrUint32(v)
				if err != nil {
					return err
				}
				if index >= uint32(set.size) {
					return fmt.Errorf("%w: bit %d of %d", errAlien, index, set.size)
				}
				bit = int(index)
			case unix.ETHTOOL_A_BITSET_BIT_NAME:
				name = Feature(attrString(v))
			case unix.ETHTOOL_A_BITSET_BIT_VALUE:
				on = true
			}
			return nil
		})
		if err != nil {
			return err
		}
		if bit < 0 {
			return fmt.Errorf("%w: a bit without its number", errAlien)
		}
		set.value.put(bit, on)
		if set.mask != nil {
			set.mask.put(bit, true)
		}
		if name != "" {
			set.names[bit] = name
		}
		return nil
	})
	return set, err
}

// compactBitmap reads the u32 words of a compact bitset (least significant first, each in the
// host's byte order).
func compactBitmap(v []byte, bits int) (bitmap, error) {
	if want := (bits + 31) / 32 * 4; len(v) != want {
		return nil, fmt.Errorf("%w: %d bytes for %d bits", errAlien, len(v), bits)
	}
	out := make(bitmap, (bits+63)/64)
	for i := 0; i < len(v); i += 4 {
		out[i/8] |= uint64(binary.NativeEndian.Uint32(v[i:])) << (i % 8 * 8)
	}
	return out, nil
}

// A featuresMessage is what the FEATURES messages have in common.
type featuresMessage struct {
	device                       Device
	hw, wanted, active, nochange bitset
}

func decodeMessage(b []byte) (featuresMessage, error) {
	var m featuresMessage
	err := eachAttr(b, func(typ uint16, v []byte) (err error) {
		switch typ {
		case unix.ETHTOOL_A_FEATURES_HEADER:
			m.device, err = decodeHeader(v)
		case unix.ETHTOOL_A_FEATURES_HW:
			m.hw, err = decodeBitset(v)
		case unix.ETHTOOL_A_FEATURES_WANTED:
			m.wanted, err = decodeBitset(v)
		case unix.ETHTOOL_A_FEATURES_ACTIVE:
			m.active, err = decodeBitset(v)
		case unix.ETHTOOL_A_FEATURES_NOCHANGE:
			m.nochange, err = decodeBitset(v)
		}
		return err
	})
	if err == nil && m.device.Index == 0 {
		err = fmt.Errorf("%w: no header", errAlien)
	}
	return m, err
}

// decodeFeatures decodes the payload of ETHTOOL_MSG_FEATURES_GET_REPLY and FEATURES_NTF, which
// is the same (net/ethtool/features.c). The kernel sends notifications in the compact form
// (ethnl_default_notify) and replies in the form that the request asked for. names is the
// string set that a compact message refers to; a verbose message brings its own.
//
// The second value are the features that no device lets anybody change (NETIF_F_NEVER_CHANGE):
// a request to set one of them is refused as a whole.
func decodeFeatures(b []byte, names *nameTable) (*Features, bitmap, error) {
	m, err := decodeMessage(b)
	if err != nil {
		return nil, nil, err
	}
	if !m.hw.present || !m.wanted.present || !m.active.present || !m.nochange.present {
		return nil, nil, fmt.Errorf("%w: features of %s without all of their bitsets", errAlien, m.device)
	}
	if names, err = tableFor(names, m.hw, m.wanted, m.active, m.nochange); err != nil {
		return nil, nil, err
	}
	bits := max(m.hw.size, m.wanted.size, m.active.size, m.nochange.size)
	f := newFeatures(m.device.Index, m.device.Name, names, bits)
	copy(f.active, m.active.value)
	copy(f.wanted, m.wanted.value)
	copy(f.changeable, m.hw.value)
	for i := range f.changeable {
		if i < len(m.nochange.value) {
			f.changeable[i] &^= m.nochange.value[i]
		}
	}
	return f, m.nochange.value, nil
}

// tableFor returns the names that the bitsets are to be read with: those that they brought
// (verbose form), and known for the compact form.
func tableFor(known *nameTable, sets ...bitset) (*nameTable, error) {
	verbose, bits := false, 0
	for _, set := range sets {
		if set.names == nil && known == nil {
			return nil, fmt.Errorf("%w: a compact bitset, and the names of its bits are not known", errAlien)
		}
		verbose = verbose || set.names != nil
		bits = max(bits, set.size)
	}
	if !verbose {
		return known, nil
	}
	// A verbose message that fits the table needs no other one.
	agrees := known != nil && known.bits() >= bits
	list := make([]Feature, bits)
	for _, set := range sets {
		for bit, name := range set.names {
			if list[bit] != "" && list[bit] != name {
				return nil, fmt.Errorf("%w: bit %d is %q and %q", errAlien, bit, list[bit], name)
			}
			list[bit] = name
			agrees = agrees && known.names[bit] == name
		}
	}
	if agrees {
		return known, nil
	}
	return newNameTable(list), nil
}

// A difference is the reply to FEATURES_SET.
type difference struct {
	device Device
	// refused are the features whose active state is not what the request asked for, with what
	// it asked for.
	refused map[Feature]bool
	// changed are the features whose active state the request changed, with their new state.
	// Others can be among them: what depends on a feature goes down with it.
	changed map[Feature]bool
}

// decodeSetReply decodes ETHTOOL_MSG_FEATURES_SET_REPLY: the bitset WANTED is the difference
// between what was asked for and what is active now, ACTIVE the one between before and after.
// Both are empty when the request changed nothing.
func decodeSetReply(b []byte, names *nameTable) (difference, error) {
	m, err := decodeMessage(b)
	if err != nil {
		return difference{}, err
	}
	if !m.wanted.present || !m.active.present || m.wanted.mask == nil || m.active.mask == nil {
		return difference{}, fmt.Errorf("%w: reply about %s without its two differences", errAlien, m.device)
	}
	if names, err = tableFor(names, m.wanted, m.active); err != nil {
		return difference{}, err
	}
	pick := func(set bitset) map[Feature]bool {
		out := map[Feature]bool{}
		for bit, name := range names.names {
			if name != "" && set.mask.get(bit) {
				out[name] = set.value.get(bit)
			}
		}
		return out
	}
	return difference{device: m.device, refused: pick(m.wanted), changed: pick(m.active)}, nil
}

// decodeNames decodes ETHTOOL_MSG_STRSET_GET_REPLY and returns the string set with the given id
// (ETH_SS_*, linux/ethtool.h).
func decodeNames(b []byte, id uint32) (*nameTable, error) {
	var table *nameTable
	err := eachAttr(b, func(typ uint16, v []byte) error {
		if typ != unix.ETHTOOL_A_STRSET_STRINGSETS {
			return nil
		}
		return eachAttr(v, func(typ uint16, v []byte) error {
			if typ != unix.ETHTOOL_A_STRINGSETS_STRINGSET {
				return nil
			}
			got, names, err := decodeStringSet(v)
			if err == nil && got == id {
				table = newNameTable(names)
			}
			return err
		})
	})
	if err == nil && (table == nil || len(table.index) == 0) {
		err = fmt.Errorf("%w: no string set %d", errAlien, id)
	}
	if err != nil {
		return nil, err
	}
	return table, nil
}

// decodeStringSet decodes one ETHTOOL_A_STRINGSETS_STRINGSET.
func decodeStringSet(b []byte) (id uint32, names []Feature, err error) {
	err = eachAttr(b, func(typ uint16, v []byte) (err error) {
		switch typ {
		case unix.ETHTOOL_A_STRINGSET_ID:
			id, err = attrUint32(v)
		case unix.ETHTOOL_A_STRINGSET_STRINGS:
			err = eachAttr(v, func(_ uint16, v []byte) error {
				bit, name := uint32(maxBits), Feature("")
				err := eachAttr(v, func(typ uint16, v []byte) (err error) {
					switch typ {
					case unix.ETHTOOL_A_STRING_INDEX:
						bit, err = attrUint32(v)
					case unix.ETHTOOL_A_STRING_VALUE:
						name = Feature(attrString(v))
					}
					return err
				})
				if err != nil {
					return err
				}
				if bit >= maxBits {
					return fmt.Errorf("%w: string number %d", errAlien, bit)
				}
				for uint32(len(names)) <= bit {
					names = append(names, "")
				}
				names[bit] = name
				return nil
			})
		}
		return err
	})
	return id, names, err
}
