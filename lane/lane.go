// Package lane sends chosen packets that leave by a NIC through an ifb that segments them: a
// clsact egress filter redirects exactly those packets, and the ifb, which has no TSO, gives them
// back to the NIC in single segments. All other packets keep the NIC's offloads.
//
//	          clsact egress                           qdisc
//	packets ──> filters of others ──> ours ──────────> of the NIC ──> driver
//	                                   │ match             ^
//	                                   v                   │
//	                                  ifb, cuts ───────────┘  (its actions are skipped here)
//
// The values are pure. Kernel I/O lives in the _linux.go files.
package lane

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Match is one set of packets as they pass a NIC's egress. Src and Dst are valid prefixes of one
// family; a zero port matches all.
type Match struct {
	Src, Dst     netip.Prefix
	Proto        uint8 // IPPROTO_*: 50 ESP, 51 AH, 17 for ESP in UDP, 6 TCP; 0 for all
	Sport, Dport uint16
}

// Lane is a NIC with the packets that take the detour, sorted and without repetition.
type Lane struct {
	Index   int32 // ifindex of the NIC
	Name    string
	Matches []Match
}

// Compare orders matches.
func (m Match) Compare(o Match) int {
	return cmp.Or(
		m.Src.Addr().Compare(o.Src.Addr()), cmp.Compare(m.Src.Bits(), o.Src.Bits()),
		m.Dst.Addr().Compare(o.Dst.Addr()), cmp.Compare(m.Dst.Bits(), o.Dst.Bits()),
		cmp.Compare(m.Proto, o.Proto), cmp.Compare(m.Sport, o.Sport), cmp.Compare(m.Dport, o.Dport),
	)
}

// String writes a match as tc-flower's words.
func (m Match) String() string {
	s := fmt.Sprintf("src %s dst %s", m.Src, m.Dst)
	if m.Proto != 0 {
		s += fmt.Sprintf(" proto %d", m.Proto)
	}
	if m.Sport != 0 {
		s += fmt.Sprintf(" sport %d", m.Sport)
	}
	if m.Dport != 0 {
		s += fmt.Sprintf(" dport %d", m.Dport)
	}
	return s
}

// Protocols that have ports which flower can match (linux/in.h).
const (
	protoTCP  = 6
	protoUDP  = 17
	protoSCTP = 132
)

// check says what is wrong with a match.
func (m Match) check() error {
	switch {
	case !m.Src.IsValid() || !m.Dst.IsValid():
		return errors.New("source and destination must be prefixes")
	case m.Src.Addr().Is4() != m.Dst.Addr().Is4():
		return errors.New("source and destination must be of one family")
	case m.Src != m.Src.Masked() || m.Dst != m.Dst.Masked() || m.Src.Addr().Is4In6() || m.Dst.Addr().Is4In6():
		return errors.New("prefixes must be masked and not IPv4 in IPv6")
	case (m.Sport != 0 || m.Dport != 0) && m.Proto != protoTCP && m.Proto != protoUDP && m.Proto != protoSCTP:
		return fmt.Errorf("protocol %d has no ports", m.Proto)
	}
	return nil
}

// check says what is wrong with a lane.
func (l Lane) check() error {
	if l.Index <= 0 || l.Name == "" {
		return errors.New("both the index and the name of the NIC are needed")
	}
	if len(l.Matches) == 0 {
		return errors.New("no matches")
	}
	for i, m := range l.Matches {
		if err := m.check(); err != nil {
			return fmt.Errorf("match %s: %w", m, err)
		}
		if i > 0 && l.Matches[i-1].Compare(m) >= 0 {
			return errors.New("matches must be sorted and not repeated")
		}
	}
	return nil
}

// ifbPrefix begins the name of each of our ifbs. The NIC's ifindex follows.
const ifbPrefix = "tsolane"

// IFBName is the name of the ifb that serves the NIC with this ifindex. A NIC's name can be as
// long as a name may be, so the index is what tells them apart. One above 99,999,999 has no room
// (IFNAMSIZ); then the kernel refuses the name.
func IFBName(index int32) string { return ifbPrefix + strconv.Itoa(int(index)) }

// nicOf is the ifindex that an ifb's name tells, 0 if the name is not one of ours.
func nicOf(name string) int32 {
	digits, ok := strings.CutPrefix(name, ifbPrefix)
	n, err := strconv.ParseInt(digits, 10, 32)
	if !ok || err != nil || n <= 0 || IFBName(int32(n)) != name {
		return 0
	}
	return int32(n)
}

// The ifb's alias tells a person what it is and us that it is ours, and remembers whether clsact
// was made by us: nothing else in the kernel can.
const (
	aliasPrefix = "tsoagent: cuts covered flows of "
	aliasClsact = ", with its clsact"
)

func aliasOf(nic string, clsact bool) string {
	if clsact {
		return aliasPrefix + nic + aliasClsact
	}
	return aliasPrefix + nic
}

// State is what is in place of one lane.
type State struct {
	Index int32  // ifindex of the NIC, also after that is gone
	Name  string // of the NIC, empty if it is gone
	IFB   string // name of the ifb, empty if there is none
	// IFBIndex is the ifindex of the ifb.
	IFBIndex int32
	// Matches are the filters' that lead to the ifb, sorted.
	Matches []Match
	// Clsact reports whether the qdisc is one that we made.
	Clsact bool
	// Problems are what isn't as Ensure makes it, in words.
	Problems []string
	// Packets and Bytes have passed the ifb since it was made; Dropped were lost in it.
	Packets, Bytes, Dropped uint64
}

// Is reports whether the lane is in place exactly.
func (s State) Is(l Lane) bool {
	return s.Index == l.Index && s.Name == l.Name && s.IFB != "" && len(s.Problems) == 0 && slices.Equal(s.Matches, l.Matches)
}
