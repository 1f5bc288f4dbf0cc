// Package xfrmwatch knows the kernel's IPsec configuration: XFRM policies, security
// associations (SAs) and the default action. It mirrors them from netlink, says which flows a
// policy covers, which SA the kernel would use for it, and what that SA leaves of an MTU.
//
// The values and decisions are pure. Kernel I/O lives in watch_linux.go. No attribute that
// carries key material is ever decoded: of an algorithm only its name and its lengths are read.
package xfrmwatch

import "net/netip"

// Family is an address family, AF_INET or AF_INET6.
type Family uint16

// The address families that XFRM selectors and SAs use here.
const (
	IPv4 Family = 2  // AF_INET
	IPv6 Family = 10 // AF_INET6
)

// Reqid links a policy's template with its SAs (struct xfrm_user_tmpl, linux/xfrm.h).
type Reqid uint32

// SPI is a security parameter index in host byte order.
type SPI uint32

// Proto is an IP protocol number, 0 for any (IPPROTO_*).
type Proto uint8

// The protocols that a template can ask for.
const (
	ESP  Proto = 50
	AH   Proto = 51
	Comp Proto = 108
)

// Mode is the encapsulation mode of a template or SA (XFRM_MODE_*, linux/xfrm.h).
type Mode uint8

// The modes that linux/xfrm.h numbers.
const (
	Transport  Mode = 0
	Tunnel     Mode = 1
	RouteOpt   Mode = 2
	InTrigger  Mode = 3
	BEET       Mode = 4
	IPTFS      Mode = 5
	ModeAbsent Mode = 255
)

// Mark is an fwmark with its mask, as XFRMA_MARK carries it. The zero value matches all.
type Mark struct {
	Value uint32 `json:"value"`
	Mask  uint32 `json:"mask"`
}

// PortMatch is a port with a bit mask in host byte order; mask 0 matches all ports.
type PortMatch struct {
	Port uint16 `json:"port"`
	Mask uint16 `json:"mask"`
}

// Selector says which flows a policy or an SA applies to (struct xfrm_selector). Src and Dst
// are always valid prefixes of Family. Ifindex is 0 for any.
type Selector struct {
	Src     netip.Prefix `json:"src"`
	Dst     netip.Prefix `json:"dst"`
	Family  Family       `json:"family"`
	Proto   Proto        `json:"proto"`
	Sport   PortMatch    `json:"sport"`
	Dport   PortMatch    `json:"dport"`
	Ifindex int32        `json:"ifindex"`
}

// Template is one transformation that a policy asks for (struct xfrm_user_tmpl). Dst and Src
// are the unspecified address of Family where the flow's own address is taken.
type Template struct {
	Dst      netip.Addr `json:"dst"`
	Src      netip.Addr `json:"src"`
	SPI      SPI        `json:"spi"`
	Reqid    Reqid      `json:"reqid"`
	Family   Family     `json:"family"` // of Dst and Src (encap_family)
	Proto    Proto      `json:"proto"`
	Mode     Mode       `json:"mode"`
	Optional bool       `json:"optional"`
}

// Dir is a policy's direction. Socket policies have the per-socket directions 3 and up.
type Dir uint8

// Directions (XFRM_POLICY_*). The kernel dumps per-socket policies as Dir+3.
const (
	In      Dir = 0
	Out     Dir = 1
	Forward Dir = 2
)

// PolicyIndex is the kernel's own number of a policy. It is unique in a network namespace, and
// an update keeps it. Its low three bits encode the direction.
type PolicyIndex uint32

// Action of a policy, or of the default.
type Action uint8

// Actions (XFRM_POLICY_ALLOW and XFRM_POLICY_BLOCK).
const (
	Allow Action = 0
	Block Action = 1
)

// Policy is an XFRM policy. Templates are in the kernel's order, innermost first. A Policy is
// immutable once it was handed out.
type Policy struct {
	Index       PolicyIndex `json:"index"`
	Dir         Dir         `json:"dir"`
	Sub         bool        `json:"sub,omitempty"` // type sub instead of main
	Action      Action      `json:"action"`
	Priority    uint32      `json:"priority"`
	Selector    Selector    `json:"selector"`
	Templates   []Template  `json:"templates,omitempty"`
	Mark        Mark        `json:"mark"`
	IfID        uint32      `json:"if_id"`
	OffloadDev  int32       `json:"offload_dev,omitempty"` // ifindex of packet offload, 0 for none
	OffloadFlag uint8       `json:"offload_flag,omitempty"`
	Flags       uint8       `json:"flags,omitempty"` // XFRM_POLICY_LOCALOK, _ICMP, _CPU_ACQUIRE
}

// SAKey identifies an SA in the kernel (destination, SPI, protocol, mark).
type SAKey struct {
	Dst   netip.Addr
	SPI   SPI
	Proto Proto
	Mark  Mark
}

// Encap is the UDP or TCP encapsulation of an SA (XFRMA_ENCAP). Type is UDP_ENCAP_*.
type Encap struct {
	Type  uint16 `json:"type"`
	Sport uint16 `json:"sport"`
	Dport uint16 `json:"dport"`
}

// Algorithm is an algorithm's name and its lengths in bits; its key is never read.
type Algorithm struct {
	Name string `json:"name"`
	// ICVBits is the length of the ICV in bits where the attribute carries it
	// (XFRMA_ALG_AEAD, XFRMA_ALG_AUTH_TRUNC), else 0.
	ICVBits int `json:"icv_bits,omitempty"`
}

// SA is a security association. An SA is immutable once it was handed out.
type SA struct {
	Key         SAKey      `json:"-"`
	Src         netip.Addr `json:"src"`
	Dst         netip.Addr `json:"dst"`
	SPI         SPI        `json:"spi"`
	Proto       Proto      `json:"proto"`
	Family      Family     `json:"family"` // of Src and Dst
	Mode        Mode       `json:"mode"`
	Reqid       Reqid      `json:"reqid"`
	Selector    Selector   `json:"selector"`
	HasSelector bool       `json:"has_selector"` // the selector's family is set
	Mark        Mark       `json:"mark"`
	OutputMark  Mark       `json:"output_mark"`
	IfID        uint32     `json:"if_id"`
	Flags       uint8      `json:"flags"` // XFRM_STATE_*
	ExtraFlags  uint32     `json:"extra_flags"`
	Enc         Algorithm  `json:"enc"`
	Auth        Algorithm  `json:"auth"`
	AEAD        Algorithm  `json:"aead"`
	Comp        Algorithm  `json:"comp"`
	Encap       Encap      `json:"encap"`
	// Larval is an SA that the kernel holds for a negotiation (ACQ): it has no algorithm.
	Larval bool `json:"larval"`
	// Dying is set by a soft expire: still usable, a younger one is preferred.
	Dying        bool   `json:"dying"`
	OffloadDev   int32  `json:"offload_dev,omitempty"` // XFRMA_OFFLOAD_DEV, 0 for none
	OffloadFlags uint8  `json:"offload_flags,omitempty"`
	AddTime      uint64 `json:"add_time"` // seconds since the epoch (curlft.add_time)
	// Dir is XFRM_SA_DIR_IN or _OUT, 0 where the kernel does not say (before 6.10).
	SADir uint8 `json:"sa_dir,omitempty"`
	// CPU is one more than the number of the CPU whose flows alone use the SA (XFRMA_SA_PCPU), 0 for
	// all. The SAs of all CPUs count as valid at once, as any flow can be on any CPU.
	CPU uint32 `json:"cpu,omitempty"`
}

// Default is the namespace's action for flows that no policy matches (XFRM_MSG_GETDEFAULT).
type Default struct {
	In, Forward, Out Action
}

// Event is what the kernel told or what a dump found. The events of a dump stand between
// ResyncBegin and ResyncEnd; an item that does not appear between the two is gone.
type Event interface{ xfrmEvent() }

type (
	// Lost says that events were lost (ENOBUFS, a closed socket, an undecodable message): what
	// is known is stale until the next ResyncEnd.
	Lost struct{ Err error }
	// ResyncBegin opens a full dump.
	ResyncBegin struct{}
	// ResyncEnd closes a full dump; what was not in it is gone.
	ResyncEnd struct{}
	// PolicySet is a policy that is new, changed or found by a dump. Of policies with equal
	// priority the kernel prefers the one that was set first; it dumps the newest first
	// (xfrm_policy_walk over policy_all, net/xfrm/xfrm_policy.c), so a DB has to know which of
	// the two orders an event belongs to: Dumped is true for an item of a dump.
	PolicySet struct {
		Policy *Policy
		Dumped bool
	}
	// PolicyGone is a policy that was deleted or has expired.
	PolicyGone struct{ Index PolicyIndex }
	// SASet is an SA that is new, changed or found by a dump. Update is true for
	// XFRM_MSG_UPDSA: the kernel then tells what was asked for, not what the SA has become
	// (xfrm_state_update takes over the encapsulation, the lifetimes, the output mark and the
	// if_id, nothing else), so a DB merges it into the SA that it knows.
	SASet struct {
		SA     *SA
		Dumped bool
		Update bool
	}
	// SAGone is an SA that was deleted or has hard-expired.
	SAGone struct{ Key SAKey }
	// SADying is a soft expire.
	SADying struct{ Key SAKey }
	// DefaultSet is the default action.
	DefaultSet struct{ Default Default }
)

func (Lost) xfrmEvent()        {}
func (ResyncBegin) xfrmEvent() {}
func (ResyncEnd) xfrmEvent()   {}
func (PolicySet) xfrmEvent()   {}
func (PolicyGone) xfrmEvent()  {}
func (SASet) xfrmEvent()       {}
func (SAGone) xfrmEvent()      {}
func (SADying) xfrmEvent()     {}
func (DefaultSet) xfrmEvent()  {}
