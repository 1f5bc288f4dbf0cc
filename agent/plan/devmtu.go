package plan

import (
	"cmp"
	"fmt"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// DeviceMTU is the MTU that a dedicated carrier is to have, in place of locks on its routes. All
// MTUs are in bytes.
type DeviceMTU struct {
	Device  *routes.Link // as the mirror has it
	Was     int          // what its owner set
	Want    int
	Because []xfrmwatch.CoverageID
}

// MTUClaim says that we set a device's MTU: what it was before, and what we set.
type MTUClaim struct {
	Was  int `json:"was"`
	Ours int `json:"ours"`
	// Prev is what was in place before Ours, while it isn't known whether Ours was written: the
	// journal is written before the kernel.
	Prev int `json:"prev,omitempty"`
	// Theirs is what somebody else has set since, 0 for nothing. It stays, and the device is left
	// alone until our cause is gone.
	Theirs int `json:"theirs,omitempty"`
	// Why says why the device is left alone where nobody else set its MTU.
	Why string `json:"why,omitempty"`
}

// Wrote reports whether a device's MTU is one that we wrote.
func (c MTUClaim) Wrote(mtu int) bool {
	return c.Theirs == 0 && (mtu == c.Ours || c.Prev != 0 && mtu == c.Prev)
}

// ownMTU is a device's MTU for a family without what we set.
func (p *planner) ownMTU(l *routes.Link, f routes.Family) int {
	c, ours := p.MTUs[l.Index]
	if !ours || !c.Wrote(l.MTU) {
		return l.MTUFor(f)
	}
	if f == routes.IPv6 && l.MTU6 != 0 {
		return min(c.Was, l.MTU6)
	}
	return c.Was
}

// setDevices finds the dedicated carriers whose own MTU can be set. Their routes then need no lock.
func (p *planner) setDevices() {
	if p.Config.CarrierMTU != CarrierDevice {
		return
	}
	p.begin(&unit{phase: phaseDevices})
	set := map[routes.Ifindex]bool{}
	for _, l := range p.FIB.Links() {
		if t := p.tunnels[l.Index]; (l.Kind != "xfrm" || l.External || l.IfID == 0) && (t == nil || len(t.covs) == 0) {
			continue
		}
		want, covs, why := p.carrierMTU(l)
		if c, ours := p.MTUs[l.Index]; ours && !c.Wrote(l.MTU) && len(covs) > 0 {
			p.plan.Yielded = append(p.plan.Yielded, l.Index)
		}
		if why == "" && want == 0 || len(covs) == 0 {
			continue
		}
		if why == "" {
			why = p.leaveDevice(l, want)
		}
		if why != "" {
			for _, c := range covs {
				p.note(c, fmt.Sprintf("%s keeps its MTU, and its routes are locked: %s (carrier_mtu: device)", l.Name, why))
			}
			continue
		}
		set[l.Index] = true
		d := DeviceMTU{Device: l, Was: p.ownMTU(l, routes.IPv4), Want: want}
		for _, c := range covs {
			d.Because = append(d.Because, c.id())
			p.locks(c, fmt.Sprintf("dev %s mtu %d", l.Name, want))
		}
		p.plan.DeviceMTUs = append(p.plan.DeviceMTUs, d)
	}
	for _, d := range p.plan.DeviceMTUs {
		for _, r := range p.routesBy(d.Device) {
			if !slices.ContainsFunc(r.Body.Nexthops, func(n routes.Nexthop) bool { return !set[n.Oif] }) {
				p.locked[r.Key()] = true
			}
		}
	}
	slices.SortFunc(p.plan.DeviceMTUs, func(a, b DeviceMTU) int { return cmp.Compare(a.Device.Index, b.Device.Index) })
}

// carrierMTU is the MTU that all flows through a carrier agree on, 0 if they have room already,
// with their coverages; or why they don't agree.
func (p *planner) carrierMTU(l *routes.Link) (want int, covs []*coverage, why string) {
	list := p.routesBy(l)
	if _, n := p.FIB.DeviceRoutes(l.Index); n > 0 && len(list) == 0 {
		return 0, nil, ""
	}
	room := 0
	for _, r := range list {
		if r.Body.Type != routes.Unicast {
			continue
		}
		need, has, by, no := p.needs(r)
		room = max(room, has)
		if _, n := p.FIB.Get(r.Key()); n > 1 {
			no = "another route has the same key" // r is the first, which may be by another device
		}
		for _, c := range by {
			if !slices.Contains(covs, c) {
				covs = append(covs, c)
			}
		}
		switch {
		case no != "":
			why = cmp.Or(why, fmt.Sprintf("%s: %s", r.Key(), no))
		case need != 0 && want != 0 && need != want:
			why = cmp.Or(why, fmt.Sprintf("its flows have different MTUs left, %d and %d", want, need))
		case need != 0:
			want = need
		}
	}
	if want != 0 && want < room {
		why = cmp.Or(why, fmt.Sprintf("its flows have different MTUs left, %d, and room for %d", want, room))
	}
	slices.SortFunc(covs, func(a, b *coverage) int { return a.entry.compare(&b.entry) })
	return want, covs, why
}

// needs is the MTU that all flows on a route agree on, 0 if they have room already, with their
// coverages; or why they don't agree. What has room has it for the route's MTU, which a device is not to
// take from it: room is that MTU, 0 if there is no such coverage.
func (p *planner) needs(r routes.Route) (need, room int, by []*coverage, why string) {
	w, ok := p.domain(r.Body)
	if !ok {
		return 0, 0, nil, "it leads by ways with different policies"
	}
	agree := func(n int) {
		if need != 0 && n != need {
			why = cmp.Or(why, fmt.Sprintf("its flows have different MTUs left, %d and %d", need, n))
		}
		need = n
	}
	entered := false // by what a policy takes in transport mode
	for _, e := range p.applying(w, r.Dst, true) {
		if e.cov == nil {
			continue // dropped, or, above a tunnel, covered all the same
		}
		by = append(by, e.cov)
		n, no := p.mtuAt(e.cov, p.pathMTU(r), r.Body.Family)
		switch {
		case n != 0:
			agree(n)
		case w.tunnel != nil && p.leavesToTunnel(e, r):
			entered = entered || !e.cov.tunnels()
			if p.hasRoom(e.cov, r) { // what it takes goes past the tunnel
				room = p.pathMTU(r)
			}
			continue
		case e.cov.larval && p.Last[e.cov.id()] == 0 && p.Config.PresumeMTU == 0:
		case p.hasRoom(e.cov, r):
			room = p.pathMTU(r)
		default:
			why = cmp.Or(why, no)
		}
		if e.all() && routes.Contains(e.sel().Dst, r.Dst) && !p.bypassed(w, e, r.Dst) {
			if entered {
				break // some of what the tunnel wraps, ahead of it
			}
			return need, room, by, why
		}
	}
	if w.tunnel == nil {
		return need, room, by, why
	}
	n, covs, no := p.wrapsAt(r)
	switch left, _ := p.wraps(w.tunnel); {
	case n != 0:
		agree(n)
	case left == 0 || left < p.linkMTU(r):
		why = cmp.Or(why, no)
	}
	return need, room, append(by, covs...), why
}

// hasRoom reports whether a route's own MTU is small enough for a coverage.
func (p *planner) hasRoom(c *coverage, r routes.Route) bool {
	path := p.pathMTU(r)
	mtu, status := c.whole().MTU(p.peerMTU, path)
	if status != xfrmwatch.MTUKnown {
		mtu = cmp.Or(p.Last[c.id()], p.Config.PresumeMTU)
	}
	return c.tunnels() && path != 0 && mtu >= path
}

// leaveDevice says why a carrier's own MTU is not to be set, or is empty.
func (p *planner) leaveDevice(l *routes.Link, want int) string {
	c, ours := p.MTUs[l.Index]
	switch {
	case ours && c.Why != "":
		return c.Why
	case ours && !c.Wrote(l.MTU):
		return fmt.Sprintf("somebody has set it to %d", l.MTU)
	case want < lowestMTU(routes.IPv6):
		// addrconf_notify, net/ipv6/addrconf.c: IPv6 ends on the device.
		return fmt.Sprintf("%d is below %d, which would take IPv6 from the device", want, lowestMTU(routes.IPv6))
	case !ours && l.MTU6 != 0:
		// A change of the device's MTU sets IPv6's own one, too.
		return fmt.Sprintf("its IPv6 MTU is set to %d", l.MTU6)
	}
	for _, o := range p.FIB.Links() {
		if t := p.tunnels[o.Index]; t != nil && t.path.Oif == l.Index {
			return fmt.Sprintf("the outer packets of %s leave by it", t.link.Name)
		}
	}
	for _, r := range p.routesBy(l) {
		if why := p.meetsOuter(r); why != "" {
			return why
		}
		// The kernel lowers such metrics with the device's MTU, and then raises them to the
		// device's (rt6_mtu_change_route, net/ipv6/route.c): the owner's would be lost.
		if own := p.owner(r); r.Body.Family == routes.IPv6 && own.MTU != 0 && !own.Locked {
			return fmt.Sprintf("%s has an MTU of its own, which the kernel changes with the device's", r.Key())
		}
	}
	return ""
}

// MTUSteps are the writes that lead to a plan's device MTUs.
type MTUSteps struct {
	Set []DeviceMTU
	// Back gives devices their owner's MTU back.
	Back []MTUBack
	// Yield are devices whose MTU somebody else changed while we want it set: it stays.
	Yield []MTUBack
	// Drop are claims on what is gone, was never written, or was changed by somebody else.
	Drop []routes.Ifindex
}

// MTUBack is a device with its claim.
type MTUBack struct {
	Device *routes.Link
	Claim  MTUClaim
}

// Empty reports whether there is nothing to do.
func (s *MTUSteps) Empty() bool { return len(s.Set)+len(s.Back)+len(s.Yield)+len(s.Drop) == 0 }

// DiffMTUs works out the steps from the claims in the input. While a mirror is stale, nothing is
// given back because of what it lacks.
func DiffMTUs(in Input, pl *Plan) MTUSteps {
	var s MTUSteps
	wanted := map[routes.Ifindex]bool{}
	for _, d := range pl.DeviceMTUs {
		wanted[d.Device.Index] = true
		if c, ours := in.MTUs[d.Device.Index]; !ours || d.Device.MTU != d.Want || c.Ours != d.Want {
			s.Set = append(s.Set, d)
		}
	}
	for _, i := range pl.Yielded {
		wanted[i] = true
		if c := in.MTUs[i]; c.Theirs == 0 {
			s.Yield = append(s.Yield, MTUBack{in.FIB.Link(i), c})
		}
	}
	stale := in.XFRM.Stale() || in.FIB.Stale()
	for i, c := range in.MTUs {
		l := in.FIB.Link(i)
		switch {
		case wanted[i] || stale:
		case l == nil || !c.Wrote(l.MTU) || l.MTU == c.Was:
			s.Drop = append(s.Drop, i)
		default:
			s.Back = append(s.Back, MTUBack{l, c})
		}
	}
	slices.Sort(s.Drop)
	slices.SortFunc(s.Back, func(a, b MTUBack) int { return cmp.Compare(a.Device.Index, b.Device.Index) })
	return s
}
