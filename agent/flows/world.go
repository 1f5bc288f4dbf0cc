package flows

import (
	"github.com/gaissmai/bart"

	"tsoagent/xfrmwatch"
)

// World is what connections are joined with. It is safe for concurrent use while nobody changes it.
type World struct {
	Policies *Policies // nil for none
	// Devices are the namespace's, by ifindex.
	Devices map[int32]Device
	// Stale says that something in it may not be what the kernel has.
	Stale bool
}

// Device is a device with what decides about the flows that leave by it.
type Device struct {
	Name string
	// IfID is an xfrm interface's: policies with it are looked up for what leaves there.
	IfID uint32
	// VTI says that Mark is the mark of the policies that are looked up for what leaves there.
	VTI  bool
	Mark uint32
	// TSO4 and TSO6 are the segmentation offloads of both families.
	TSO4, TSO6 Offload
	// Wrapped is the policy that takes all outer packets of a tunnel, 0 for none.
	Wrapped xfrmwatch.PolicyIndex
}

// Offload is one segmentation offload of a device.
type Offload struct {
	Active bool
	Fixed  bool // it can't be switched
	Held   bool // we hold it off
}

// Policies finds the output policy that the kernel would take for a flow. It gives the same winner
// as xfrmwatch.DB.Lookup, without looking at each policy.
type Policies struct {
	byIfID map[uint32]*bart.Table[*bucket]
	size   int
	bound  bool // some selector has a device
}

// bucket has the policies with one destination prefix.
type bucket struct {
	list  []ranked
	bySrc *bart.Table[[]ranked] // instead of list once there are many
}

// ranked is a policy with its place in the kernel's order.
type ranked struct {
	order  int
	policy *xfrmwatch.Policy
}

// crowd is how many policies of one destination are compared one by one: a hub has 100,000 for
// 0.0.0.0/0 that differ in their sources.
const crowd = 8

// NewPolicies indexes output policies, which come in the kernel's precedence (DB.Policies). Others
// are left out.
func NewPolicies(list []*xfrmwatch.Policy) *Policies {
	x := &Policies{byIfID: map[uint32]*bart.Table[*bucket]{}}
	for _, p := range list {
		if p.Dir != xfrmwatch.Out || p.Sub || !p.Selector.Src.IsValid() || !p.Selector.Dst.IsValid() {
			continue
		}
		t := x.byIfID[p.IfID]
		if t == nil {
			t = new(bart.Table[*bucket])
			x.byIfID[p.IfID] = t
		}
		b, ok := t.Get(p.Selector.Dst)
		if !ok {
			b = new(bucket)
			t.Insert(p.Selector.Dst, b)
		}
		b.add(ranked{x.size, p})
		x.size++
		x.bound = x.bound || p.Selector.Ifindex != 0
	}
	return x
}

func (b *bucket) add(r ranked) {
	if b.bySrc == nil && len(b.list) < crowd {
		b.list = append(b.list, r)
		return
	}
	if b.bySrc == nil {
		b.bySrc = new(bart.Table[[]ranked])
		for _, have := range b.list {
			b.addBySrc(have)
		}
		b.list = nil
	}
	b.addBySrc(r)
}

func (b *bucket) addBySrc(r ranked) {
	src := r.policy.Selector.Src
	have, _ := b.bySrc.Get(src)
	b.bySrc.Insert(src, append(have, r))
}

// Lookup is the policy that the kernel takes for a flow, nil for none.
func (x *Policies) Lookup(f xfrmwatch.Flow) *xfrmwatch.Policy {
	if x == nil || x.size == 0 || x.byIfID[f.IfID] == nil {
		return nil
	}
	best := ranked{order: x.size}
	try := func(list []ranked) {
		for _, r := range list {
			if r.order >= best.order {
				return // they are in order
			}
			if r.policy.Match(f) {
				best = r
				return
			}
		}
	}
	for _, b := range x.byIfID[f.IfID].Supernets(hostPrefix(f.Dst)) {
		try(b.list)
		if b.bySrc == nil {
			continue
		}
		for _, list := range b.bySrc.Supernets(hostPrefix(f.Src)) {
			try(list)
		}
	}
	return best.policy
}

// selectDevices says that some policy selects by the device of the flow's own route. Once an SA applies,
// a socket's cached route shows that of its outer packets only.
func (x *Policies) selectDevices() bool { return x != nil && x.bound }
