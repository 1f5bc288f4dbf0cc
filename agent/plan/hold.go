package plan

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// hold takes TSO from the dedicated carriers: xfrm interfaces by which covered flows leave,
// tunnels whose outer packets are covered, and devices all of whose unicast routes are covered.
// In a stack of them it does so where flows enter it, and nowhere below.
//
// Nothing here takes as long as there are coverages: what a carrier says of those is put together for each when somebody asks
// (holdVerdict).
func (p *planner) hold() {
	p.uppers, p.taken = nil, nil
	for _, t := range p.dedicatedTunnels() {
		p.plan.Tunnels = append(p.plan.Tunnels, p.wrapped(t))
	}
	p.stack()
	for _, l := range p.FIB.Links() {
		d := p.devices[l.Index]
		if d == nil {
			continue
		}
		d.says, d.decided = nil, d.facts()
		if d.entered = p.enters(d); len(d.over) > 0 {
			p.uppers = append(p.uppers, d)
		}
		if d.entered {
			p.holdOn(d, d)
		}
	}
}

// concludeHolds works out what is held, and what is said of keys, with the carriers that were found.
func (p *planner) concludeHolds() {
	p.signed = nil
	p.begin(&p.held)
	p.hold()
	p.holdESP()
	p.share()
	p.sortHolds()
	p.judgeSigned()
	p.holds = p.plan.Holds
}

// wrapped is what becomes of what a dedicated tunnel wraps, or of what a device above one sends:
// that is as its first tunnel does, with the tag.
func (p *planner) wrapped(t *tunnel) Tunnel {
	first, tag := t, 0
	for ; len(first.over) > 0; first = first.over[0] {
		tag += first.tag
	}
	out := Tunnel{Index: t.link.Index, Encap: first.encap, Path: first.path.MTU}
	out.Encap.Header += tag
	out.MTU, _ = p.wraps(t)
	for _, c := range first.own {
		out.Own = append(out.Own, c.id())
	}
	return out
}

// sortHolds puts the holds into a stable order.
func (p *planner) sortHolds() {
	slices.SortFunc(p.plan.Holds, func(a, b Hold) int {
		return cmp.Or(cmp.Compare(a.Device.Index, b.Device.Index), cmp.Compare(a.Feature, b.Feature))
	})
}

// holdOn decides about the features of a device at which flows enter, and says so.
func (p *planner) holdOn(d, at *dedicated) {
	name := d.link.Name
	switch choice := p.Config.dedicated(name); {
	case choice == Keep:
		at.note(d, "%s keeps its features (dedicated: keep)", name)
		return
	case choice == Auto && d.probed():
		at.note(d, "%s keeps its features: a probe has shown that this kernel carries super-packets through %s correctly and at least as fast (dedicated: auto)", name, d.kind)
		return
	}
	if c := d.offloaded(); c != nil {
		at.note(d, "%s keeps its features: an SA of policy %d is offloaded to a device with %s active", name, c.pol.Index, ethtool.ESPSegmentation)
		return
	}
	features := p.Config.features(name)
	if !slices.Contains(features, ethtool.UDPSegmentation) && d.breaksUDP() {
		at.note(d, "%s: a probe has shown that this kernel loses UDP super-packets through %s", name, d.kind)
		features = append(slices.Clip(features), ethtool.UDPSegmentation)
	}
	for _, f := range features {
		p.holdFeature(d, f, at)
	}
}

// holdFeature takes one feature from a carrier, or, where that is fixed, from the dedicated
// devices below. It is said at the device where the flows enter.
func (p *planner) holdFeature(d *dedicated, f ethtool.Feature, at *dedicated) {
	st, ok := p.Features[d.link.Index].Get(f)
	switch {
	case !ok:
	case st.Changeable:
		p.holdAt(d.link, f)
		at.says = append(at.says, saying{of: d, held: d.link.Name + " " + string(f)})
	case !st.Active:
	case len(d.lower) > 0:
		at.note(d, "%s has %s on [fixed]: it is switched off below it", d.link.Name, f)
		for _, lower := range d.lower {
			p.holdFeature(lower, f, at)
		}
	default:
		at.note(d, "%s has %s on [fixed]: it can't be switched off", d.link.Name, f)
	}
}

// held is a hold of the plan: where it stands, until they are sorted, and the coverages that ask
// for it on a NIC that others share. There can be thousands of both.
type held struct {
	at int
	by map[*coverage]bool
}

// holdAt is the hold of a feature, which is new if there is none.
func (p *planner) holdAt(l *routes.Link, f ethtool.Feature) (*Hold, *held) {
	dev := ethtool.Device{Index: ethtool.Ifindex(l.Index), Name: l.Name}
	if p.taken == nil {
		p.taken = map[HoldKey]*held{}
	}
	have := p.taken[HoldKey{dev.Index, f}]
	if have == nil {
		have = &held{at: len(p.plan.Holds), by: map[*coverage]bool{}}
		p.taken[HoldKey{dev.Index, f}] = have
		p.plan.Holds = append(p.plan.Holds, Hold{Device: dev, Feature: f})
	}
	return &p.plan.Holds[have.at], have
}

// addHold adds a hold on a NIC that others share, or gives one that is there more causes.
func (p *planner) addHold(l *routes.Link, f ethtool.Feature, c *coverage) {
	h, have := p.holdAt(l, f)
	if have.by[c] {
		return
	}
	have.by[c] = true
	h.Because = append(h.Because, c.id())
	v := p.holding(c)
	v.Cut = CutNIC
	v.Held = append(v.Held, l.Name+" "+string(f))
}

// probeKeys name what a probe has to have tried for a coverage's SAs.
func probeKeys(kind string, c *coverage) iter.Seq[ProbeKey] {
	return func(yield func(ProbeKey) bool) {
		for _, st := range c.steps {
			for _, sa := range st.SAs {
				k := ProbeKey{Kind: kind, Family: routes.Family(sa.Family), Mode: st.Template.Mode, SA: sa.Suite()}
				if sa.Encap.Type != 0 || len(c.steps) > 1 {
					k.SA += ", encapsulated" // which no probe tries
				}
				if !yield(k) {
					return
				}
			}
		}
	}
}

// vtiOf is the vti whose key is the mark of a coverage's policy, nil if there is none.
func (p *planner) vtiOf(c *coverage) *routes.Link {
	m := c.pol.Mark
	if c.pol.IfID != 0 || m.Mask == 0 {
		return nil
	}
	for _, l := range p.vtis {
		if l.Encap.Key&m.Mask == m.Value {
			return l
		}
	}
	return nil
}

// offloaded reports whether a coverage has an SA that is offloaded to a device that segments ESP itself.
func (p *planner) offloaded(c *coverage) bool {
	for _, st := range c.steps {
		for _, sa := range st.SAs {
			if sa.OffloadDev != 0 && p.does(routes.Ifindex(sa.OffloadDev), ethtool.ESPSegmentation) {
				return true
			}
		}
	}
	return false
}

// wholeDevices are the devices that can be wholly covered without being tunnels: those with
// unicast routes where some coverage takes every source and protocol.
func (p *planner) wholeDevices() []*routes.Link {
	if p.wide == 0 {
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
		m, _ := p.FIB.Cover(r.Body.Family, r.Body.Table, r.Dst)
		for _, b := range m.Paths.Bodies() { // several can have one key
			if w, known := p.domain(b); (!known || w.drops()) && !p.Config.OwnRoute(routes.Route{Dst: r.Dst, Body: b}) {
				return nil
			}
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
		case e.cov == nil && e.blocks():
			continue
		case e.cov == nil || e.cov.maybe:
			return nil
		}
		covs = append(covs, e.cov)
		if e.all() && routes.Contains(e.sel().Dst, dst) {
			return covs
		}
	}
	if p.XFRM.Default().Out == xfrmwatch.Block {
		return covs
	}
	return nil
}

// bareMTU is the inner MTU of a coverage no route of which was looked at, for the verdict.
func (p *planner) bareMTU(c *coverage) int {
	// Only a tunnel's path is known without the flow's own route.
	if n := len(c.steps); n > 0 && c.steps[n-1].Template.Mode == xfrmwatch.Tunnel {
		if mtu, status := c.whole().MTU(p.peerMTU, anyRoute); status == xfrmwatch.MTUKnown {
			return mtu
		}
	}
	return p.Last[c.id()]
}
