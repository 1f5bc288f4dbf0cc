package plan

import (
	"iter"
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// Keep is a copy of the plan that stays as it is when its planner makes the next one.
func (pl *Plan) Keep() *Plan {
	kept := *pl // whose verdicts go with it
	kept.Complete().counts = nil
	kept.Shapes = slices.Clone(pl.Shapes)
	for i := range kept.Shapes {
		sh := &kept.Shapes[i]
		sh.kept, sh.live = slices.AppendSeq(make([]Clone, 0, sh.Len()), sh.Clones()), nil
	}
	return &kept
}

// Clones are what the table is to hold, in the order of destinations.
func (sh *Shape) Clones() iter.Seq[Clone] {
	if sh.live == nil {
		return slices.Values(sh.kept)
	}
	return func(yield func(Clone) bool) {
		for _, at := range sh.live.points.AllSorted() {
			if at.has && !yield(at.clone()) {
				return
			}
		}
	}
}

// Len is how many clones there are to be.
func (sh *Shape) Len() int {
	if sh.live == nil {
		return len(sh.kept)
	}
	return sh.live.clones
}

// Clone is what the table is to hold at a destination.
func (sh *Shape) Clone(dst netip.Prefix) (Clone, bool) {
	if sh.live == nil {
		i, ok := slices.BinarySearchFunc(sh.kept, dst, func(c Clone, dst netip.Prefix) int { return routes.ComparePrefix(c.Dst, dst) })
		if !ok {
			return Clone{}, false
		}
		return sh.kept[i], true
	}
	if at, ok := sh.live.points.Get(dst); ok && at.has {
		return at.clone(), true
	}
	return Clone{}, false
}

// Inside is a destination inside another one, with an address in it, at which the table is to hold something.
func (sh *Shape) Inside(dst netip.Prefix, a netip.Addr) (netip.Prefix, bool) {
	if sh.live == nil {
		i := slices.IndexFunc(sh.kept, func(c Clone) bool { return c.Dst.Bits() > dst.Bits() && c.Dst.Contains(a) })
		if i < 0 {
			return netip.Prefix{}, false
		}
		return sh.kept[i].Dst, true
	}
	for in, at := range sh.live.points.Supernets(netip.PrefixFrom(a, a.BitLen())) {
		if at.has {
			return in, in.Bits() > dst.Bits()
		}
	}
	return netip.Prefix{}, false
}

// Causes are the coverages that ask for a hold of the plan, in the kernel's order.
func (pl *Plan) Causes(h *Hold) iter.Seq[xfrmwatch.CoverageID] {
	if pl.counts == nil {
		return slices.Values(h.Because)
	}
	return pl.counts.causes(h)
}

// CoverageCount is how many coverages and TCP keys there are, LockCount how many locks in place.
func (pl *Plan) CoverageCount() int {
	if pl.counts == nil {
		return len(pl.Verdicts)
	}
	return len(pl.counts.covers) + len(pl.counts.signed)
}

// LockCount is how many locks in place there are to be.
func (pl *Plan) LockCount() int {
	if pl.counts == nil {
		return len(pl.Locks)
	}
	return pl.counts.lockCount
}
