package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// hold takes TSO from the dedicated carriers: xfrm interfaces by which covered flows leave, and
// devices all of whose unicast routes are covered.
func (p *planner) hold() {
	because := map[routes.Ifindex][]*coverage{}
	for _, c := range p.covers {
		if c.Maybe || c.Policy.IfID == 0 {
			continue
		}
		for _, l := range p.carriers(c) {
			c.verdict.Carriers = append(c.verdict.Carriers, l.Name)
			because[l.Index] = append(because[l.Index], c)
		}
	}
	for _, l := range p.wholeDevices() {
		if covs := p.wholly(l); len(covs) > 0 {
			for _, c := range covs {
				c.verdict.Carriers = append(c.verdict.Carriers, l.Name)
			}
			because[l.Index] = covs
		}
	}
	for _, l := range p.FIB.Links() {
		if covs := because[l.Index]; len(covs) > 0 {
			p.holdOn(l, covs)
		}
	}
	slices.SortFunc(p.plan.Holds, func(a, b Hold) int {
		return cmp.Or(cmp.Compare(a.Device.Index, b.Device.Index), cmp.Compare(a.Feature, b.Feature))
	})
}

func (p *planner) holdOn(l *routes.Link, covs []*coverage) {
	note := func(text string) {
		for _, c := range covs {
			c.verdict.note(text)
		}
	}
	if p.Config.dedicated(l.Name) == Keep {
		note(fmt.Sprintf("%s keeps its features (dedicated: keep)", l.Name))
		return
	}
	if c := p.offloaded(covs); c != nil {
		note(fmt.Sprintf("%s keeps its features: an SA of policy %d is offloaded to a device with %s active", l.Name, c.ID.Policy, ethtool.ESPSegmentation))
		return
	}
	have := p.Features[l.Index]
	for _, name := range p.Config.features(l.Name) {
		st, ok := have.Get(name)
		if ok && !st.Changeable {
			if st.Active {
				note(fmt.Sprintf("%s has %s on [fixed]: it can't be switched off", l.Name, name))
			}
			continue
		}
		if !ok {
			continue
		}
		h := Hold{Device: ethtool.Device{Index: ethtool.Ifindex(l.Index), Name: l.Name}, Feature: name}
		for _, c := range covs {
			h.Because = append(h.Because, c.ID)
			c.verdict.Cut = CutDevice
			c.verdict.Held = append(c.verdict.Held, l.Name+" "+string(name))
		}
		p.plan.Holds = append(p.plan.Holds, h)
	}
}

// offloaded returns a coverage whose SA is offloaded to a device that segments ESP itself.
func (p *planner) offloaded(covs []*coverage) *coverage {
	for _, c := range covs {
		for _, st := range c.Steps {
			for _, sa := range st.SAs {
				if sa.OffloadDev == 0 {
					continue
				}
				if f, ok := p.Features[routes.Ifindex(sa.OffloadDev)].Get(ethtool.ESPSegmentation); ok && f.Active {
					return c
				}
			}
		}
	}
	return nil
}

// wholeDevices are the devices that can be wholly covered without being tunnels: those with
// unicast routes where some coverage takes every source and protocol.
func (p *planner) wholeDevices() []*routes.Link {
	if !slices.ContainsFunc(p.covers, func(c *coverage) bool { return c.Policy.IfID == 0 && c.entry.all() }) {
		return nil
	}
	// What goes through an upper device (a VLAN, a macvlan), or by a nexthop object whose routes
	// don't name their devices (net.ipv4.nexthop_compat_mode 0), is not in a device's own routes.
	shared := map[routes.Ifindex]bool{}
	for _, l := range p.FIB.Links() {
		if !l.ParentElsewhere {
			shared[l.Parent] = true
		}
		if m := p.FIB.Link(l.Master); m != nil && m.Kind != "vrf" {
			shared[l.Index] = true // a port carries what its bond or bridge sends
		}
	}
	for _, nh := range p.FIB.Nexthops() {
		shared[nh.Oif] = true
	}
	var out []*routes.Link
	for _, l := range p.FIB.Links() {
		_, n := p.FIB.DeviceRoutes(l.Index)
		if n > 0 && !l.Tunnel() && l.Type != arphrdLoopback && !shared[l.Index] {
			out = append(out, l)
		}
	}
	return out
}

const arphrdLoopback = 772 // ARPHRD_LOOPBACK, linux/if_arp.h

// wholly returns the coverages of a device all of whose unicast routes, link-local ones
// included, are covered whatever the source and protocol; nil if one is not.
func (p *planner) wholly(l *routes.Link) []*coverage {
	keys, _ := p.FIB.DeviceRoutes(l.Index) // nil if there are too many: shared
	var out []*coverage
	seen := map[*coverage]bool{}
	for _, k := range keys {
		r, n := p.FIB.Get(k)
		if n == 0 || p.Config.OwnRoute(r) {
			continue
		}
		if _, known := p.domain(r.Body); !known {
			return nil
		}
		covs := p.whole(k.Dst)
		if covs == nil {
			return nil
		}
		for _, c := range covs {
			if !seen[c] {
				seen[c] = true
				out = append(out, c)
			}
		}
	}
	return out
}

// whole returns the coverages that together take all flows to a destination, nil if some flow
// is left.
func (p *planner) whole(dst netip.Prefix) []*coverage {
	var covs []*coverage
	for _, e := range p.overlapping(0, dst, true) {
		switch {
		case e.cov == nil && e.block:
			continue
		case e.cov == nil || e.cov.Maybe:
			return nil
		}
		covs = append(covs, e.cov)
		if e.all() && routes.Contains(e.sel.Dst, dst) {
			return covs
		}
	}
	if p.XFRM.Default().Out == xfrmwatch.Block {
		return covs
	}
	return nil
}

// judge completes the verdicts: the policies' in the kernel's order, then the TCP keys'.
func (p *planner) judge() {
	for _, c := range p.covers {
		v := c.verdict
		if v.MTU == 0 {
			v.MTU = p.bareMTU(c)
		}
		switch {
		case v.MTU == 0 && c.Larval && c.last == 0:
			v.note("no valid SA yet: no lock before the first one (presume_mtu sets one)")
		case len(v.Locked) == 0 && len(v.Notes) == 0 && p.Config.MTU == MTUOff:
			v.note("no lock (mtu: off)")
		case len(v.Locked) == 0 && len(v.Notes) == 0:
			v.note("no route leads to these flows, or another policy takes them first: nothing to lock")
		}
		if v.Gone {
			v.note("the policy went away: kept until it has been quiet for restore_after")
		}
		if v.Maybe {
			v.note("all templates are optional: locked, but never a reason for a hold")
		}
		p.plan.Verdicts = append(p.plan.Verdicts, *v)
	}
	keys := slices.SortedFunc(slices.Values(p.Keys), sockopt.Key.Compare)
	for _, k := range keys {
		p.plan.Verdicts = append(p.plan.Verdicts, Verdict{
			Key: &k, Cut: CutSocket,
			Notes: []string{"the kernel takes GSO from sockets with a key; nothing to do"},
		})
	}
}

// bareMTU is the inner MTU of a coverage no route of which was looked at, for the verdict.
func (p *planner) bareMTU(c *coverage) int {
	// Only a tunnel's path is known without the flow's own route.
	const noRoute = 1 << 16
	if n := len(c.Steps); n > 0 && c.Steps[n-1].Template.Mode == xfrmwatch.Tunnel {
		if mtu, status := c.MTU(p.peerMTU, noRoute); status == xfrmwatch.MTUKnown {
			return mtu
		}
	}
	return c.last
}
