// Package verify says of what leaves by a device whether it is as it should be: covered flows are cut, and others
// are not. It sorts packets by what is known of policies, SAs and devices, counts each class, and judges it in words.
//
// It is pure: packets come in as wire saw them, what they are sorted by as a World.
package verify

import (
	"net/netip"

	"tsoagent/xfrmwatch"
)

// Version is the version of the JSON form of World and Result. Fields may be added under it; a field that changes
// its meaning or goes away raises it.
const Version = 1

// World is what packets are sorted by. It is safe for concurrent use while nobody changes it.
type World struct {
	Version int    `json:"version"`
	Netns   string `json:"netns,omitempty"`
	// Cookie tells namespaces apart (SO_NETNS_COOKIE), 0 where that isn't known.
	Cookie uint64 `json:"cookie,omitempty"`
	// Live is false where no agent was asked.
	Live bool `json:"live"`
	// Stale says that something in it may not be what the kernel has.
	Stale   bool     `json:"stale,omitempty"`
	Devices []Device `json:"devices"`
	// Carriers are the devices that covered flows leave by, as themselves or as ESP, in the order of their indexes.
	Carriers []string `json:"carriers"`
	// Keys is how many TCP signatures are known.
	Keys int `json:"keys"`

	// Policies are for output, in the kernel's precedence. They and the SAs can be many, so they travel by themselves.
	Policies []Policy `json:"-"`
	SAs      []SA     `json:"-"`
}

// Device is a device with what decides about the packets that leave by it.
type Device struct {
	Index int32  `json:"index"`
	Name  string `json:"name"`
	Kind  string `json:"kind,omitempty"` // IFLA_INFO_KIND, empty for physical devices
	// IfID is an xfrm interface's: policies with it are looked up for what leaves there. One that is External has one
	// for each packet, or its route.
	IfID     uint32 `json:"if_id,omitempty"`
	External bool   `json:"external,omitempty"`
	// VTI says that Mark is the mark of the policies that are looked up for what leaves there.
	VTI  bool   `json:"vti,omitempty"`
	Mark uint32 `json:"mark,omitempty"`
	// Covered says that all that leaves there is covered, whatever it is: a tunnel whose outer packets policies take.
	// Policy is the first of them, 0 where those packets leave by a device that is such a one.
	Covered bool   `json:"covered,omitempty"`
	Policy  uint32 `json:"policy,omitempty"`
	// Elsewhere says that its policies are in another namespace.
	Elsewhere bool `json:"elsewhere,omitempty"`
	// Passing says that packets can leave there which this namespace's policies never saw: a bridge's port, the device
	// below a macvlan, a VRF.
	Passing bool `json:"passing,omitempty"`
	// TSO4, TSO6 and UDP are its segmentation offloads for TCP in both families, and for UDP.
	TSO4 Offload `json:"tso4"`
	TSO6 Offload `json:"tso6"`
	UDP  Offload `json:"udp"`
	// SharedOff says that the configuration has TSO taken from everybody while covered flows leave there (`shared_nics: off`).
	SharedOff bool `json:"shared_off,omitempty"`
	// CutsESP says that it cuts ESP itself (tx-esp-segmentation), and does not only say so for others.
	CutsESP bool `json:"cuts_esp,omitempty"`
}

// Offload is one segmentation offload of a device.
type Offload struct {
	Active bool `json:"active"`
	Fixed  bool `json:"fixed,omitempty"` // it can't be switched
	// Planned says that it is to be off, Held that we hold it off.
	Planned bool `json:"planned,omitempty"`
	Held    bool `json:"held,omitempty"`
}

// The actions of policies.
const (
	ActCover  = "cover"  // IPsec is required
	ActMaybe  = "maybe"  // all templates are optional
	ActBypass = "bypass" // no template of ESP or AH
	ActBlock  = "block"
)

// Policy is what a policy selects, and what becomes of it.
type Policy struct {
	Index  uint32              `json:"index"`
	Src    netip.Prefix        `json:"src"`
	Dst    netip.Prefix        `json:"dst"`
	Proto  uint8               `json:"proto,omitempty"`
	Sport  xfrmwatch.PortMatch `json:"sport,omitzero"`
	Dport  xfrmwatch.PortMatch `json:"dport,omitzero"`
	Mark   xfrmwatch.Mark      `json:"mark,omitzero"`
	IfID   uint32              `json:"if_id,omitempty"`
	Device int32               `json:"device,omitempty"` // the selector's
	Action string              `json:"action"`
}

// PolicyOf is a policy for output.
func PolicyOf(p *xfrmwatch.Policy) Policy {
	s := p.Selector
	out := Policy{
		Index: uint32(p.Index), Src: s.Src, Dst: s.Dst, Proto: uint8(s.Proto), Sport: s.Sport, Dport: s.Dport,
		Mark: p.Mark, IfID: p.IfID, Device: s.Ifindex, Action: ActBypass,
	}
	switch covers, maybe := p.Covers(); {
	case p.Action == xfrmwatch.Block:
		out.Action = ActBlock
	case maybe:
		out.Action = ActMaybe
	case covers:
		out.Action = ActCover
	}
	return out
}

// policy is the policy with what a lookup needs.
func (p *Policy) policy() *xfrmwatch.Policy {
	out := &xfrmwatch.Policy{
		Index: xfrmwatch.PolicyIndex(p.Index), Dir: xfrmwatch.Out, Mark: p.Mark, IfID: p.IfID,
		Selector: xfrmwatch.Selector{
			Family: xfrmwatch.IPv6, Src: p.Src, Dst: p.Dst, Proto: xfrmwatch.Proto(p.Proto), Sport: p.Sport, Dport: p.Dport, Ifindex: p.Device,
		},
	}
	if p.Dst.Addr().Is4() {
		out.Selector.Family = xfrmwatch.IPv4
	}
	switch p.Action {
	case ActCover, ActMaybe:
		out.Templates = []xfrmwatch.Template{{Proto: xfrmwatch.ESP, Optional: p.Action == ActMaybe}}
	case ActBlock:
		out.Action = xfrmwatch.Block
	}
	return out
}

// SA is an SA that some coverage uses, with its policy.
type SA struct {
	Src    netip.Addr `json:"src"`
	Dst    netip.Addr `json:"dst"`
	SPI    uint32     `json:"spi"`
	Proto  uint8      `json:"proto"`
	Encap  bool       `json:"encap,omitempty"` // ESP in UDP
	Policy uint32     `json:"policy"`
	More   int        `json:"more,omitempty"` // so many other coverages use it, too
}

// SAsOf are the SAs that coverages use, in the order of those.
func SAsOf(list []xfrmwatch.Coverage) []SA {
	at := map[xfrmwatch.SAKey]int{}
	var out []SA
	for _, c := range list {
		for _, step := range c.Steps {
			for _, sa := range step.SAs {
				if i, have := at[sa.Key]; have {
					if out[i].Policy != uint32(c.ID.Policy) {
						out[i].More++
					}
					continue
				}
				at[sa.Key] = len(out)
				out = append(out, SA{
					Src: sa.Src, Dst: sa.Dst, SPI: uint32(sa.SPI), Proto: uint8(sa.Proto),
					Encap: sa.Encap.Type != 0, Policy: uint32(c.ID.Policy),
				})
			}
		}
	}
	return out
}
