package plan

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// dedicated is a carrier by which nothing but covered flows can leave.
type dedicated struct {
	link *routes.Link
	kind string // of the device that makes it one, for the probe
	covs []*coverage
	// lower are the dedicated devices that it sends by, in a stack.
	lower []*dedicated
	upper bool // another dedicated device sends by it
	// entered says that flows entered at it when the holds were worked out.
	entered bool
	// nested is a tunnel in another one or in an xfrm interface, which no probe tries.
	nested bool
}

// hold takes TSO from the dedicated carriers: xfrm interfaces by which covered flows leave,
// tunnels whose outer packets are covered, and devices all of whose unicast routes are covered.
// In a stack of them it does so where flows enter it, and nowhere below.
func (p *planner) hold() {
	p.devices, p.uppers = map[routes.Ifindex]*dedicated{}, nil
	add := func(l *routes.Link, covs ...*coverage) {
		d := p.devices[l.Index]
		if d == nil {
			d = &dedicated{link: l, kind: l.Kind}
			p.devices[l.Index] = d
		}
		d.covs = append(d.covs, covs...)
	}
	if p.counts[0] < len(p.covers) { // some have an if_id
		for _, c := range p.covers {
			if c.maybe || c.pol.IfID == 0 {
				continue
			}
			for _, l := range p.carriers(c) {
				add(l, c)
			}
		}
	}
	for _, t := range p.dedicatedTunnels() {
		if t.link.Up && len(t.over) == 0 && !t.maybe { // nothing leaves by one that is down: tunl0 and its kin stay as they are
			add(t.link, t.covs...)
			d := p.devices[t.link.Index]
			if _, ok := p.L2TP[t.link.Index]; ok {
				d.kind = "l2tp" // its device has no kind
			}
			under := p.FIB.Link(t.path.Oif)
			d.nested = p.tunnels[t.path.Oif] != nil || under != nil && slices.Contains([]string{"xfrm", "vti", "vti6"}, under.Kind)
		}
		p.plan.Tunnels = append(p.plan.Tunnels, p.wrapped(t))
	}
	for _, l := range p.wholeDevices() {
		if covs := p.wholly(l); len(covs) > 0 {
			add(l, covs...)
		}
	}
	p.stack()
	for _, l := range p.FIB.Links() {
		d := p.devices[l.Index]
		if d == nil {
			continue
		}
		if d.entered = p.enters(d); d.upper {
			p.uppers = append(p.uppers, d)
		}
		if d.entered {
			for _, c := range d.covs {
				v := p.holding(c)
				v.Carriers = append(v.Carriers, l.Name)
			}
			p.holdOn(d)
		}
	}
	p.noteVTIs()
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

func (p *planner) noteOn(d *dedicated, format string, args ...any) {
	for _, c := range d.covs {
		p.holding(c).note(fmt.Sprintf(format, args...))
	}
}

func (p *planner) holdOn(d *dedicated) {
	name := d.link.Name
	switch choice := p.Config.dedicated(name); {
	case choice == Keep:
		p.noteOn(d, "%s keeps its features (dedicated: keep)", name)
		return
	case choice == Auto && p.probed(d):
		p.noteOn(d, "%s keeps its features: a probe has shown that this kernel carries super-packets through %s correctly and at least as fast (dedicated: auto)", name, d.kind)
		return
	}
	if c := p.offloaded(d.covs); c != nil {
		p.noteOn(d, "%s keeps its features: an SA of policy %d is offloaded to a device with %s active", name, c.pol.Index, ethtool.ESPSegmentation)
		return
	}
	features := p.Config.features(name)
	if !slices.Contains(features, ethtool.UDPSegmentation) && p.breaksUDP(d) {
		p.noteOn(d, "%s: a probe has shown that this kernel loses UDP super-packets through %s", name, d.kind)
		features = append(slices.Clip(features), ethtool.UDPSegmentation)
	}
	for _, f := range features {
		p.holdFeature(d, f)
	}
}

// holdFeature takes one feature from a carrier, or, where that is fixed, from the dedicated
// devices below.
func (p *planner) holdFeature(d *dedicated, f ethtool.Feature) {
	st, ok := p.Features[d.link.Index].Get(f)
	switch {
	case !ok:
	case st.Changeable:
		p.addHold(d.link, f, d.covs, CutDevice)
	case !st.Active:
	case len(d.lower) > 0:
		p.noteOn(d, "%s has %s on [fixed]: it is switched off below it", d.link.Name, f)
		for _, lower := range d.lower {
			p.holdFeature(lower, f)
		}
	default:
		p.noteOn(d, "%s has %s on [fixed]: it can't be switched off", d.link.Name, f)
	}
}

// held is a hold of the plan: where it stands, until they are sorted, and the coverages that ask
// for it. There can be thousands of both.
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

// addHold adds a hold, or gives one that is there more causes.
func (p *planner) addHold(l *routes.Link, f ethtool.Feature, covs []*coverage, cut Cut) {
	h, have := p.holdAt(l, f)
	for _, c := range covs {
		if have.by[c] {
			continue
		}
		have.by[c] = true
		h.Because = append(h.Because, c.id())
		if v := p.holding(c); v.Cut != CutDevice {
			v.Cut = cut
		}
		v := p.holding(c)
		v.Held = append(v.Held, l.Name+" "+string(f))
	}
}

// probed reports whether a probe has shown, for every SA of the carrier, that super-packets are
// carried correctly and at least as fast.
func (p *planner) probed(d *dedicated) bool {
	switch {
	case d.nested:
		return false
	case len(d.lower) > 0:
		return !slices.ContainsFunc(d.lower, func(low *dedicated) bool { return !p.probed(low) })
	}
	n := 0
	for _, c := range d.covs {
		for k := range probeKeys(d.kind, c) {
			if n++; !p.Probed[k].KeepTSO {
				return false
			}
		}
	}
	return n > 0
}

// breaksUDP reports whether a probe has shown that UDP super-packets are lost with one of the
// carrier's SAs.
func (p *planner) breaksUDP(d *dedicated) bool {
	if len(d.lower) > 0 {
		return slices.ContainsFunc(d.lower, p.breaksUDP)
	}
	for _, c := range d.covs {
		for k := range probeKeys(d.kind, c) {
			if p.Probed[k].BreaksUDP {
				return true
			}
		}
	}
	return false
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

// noteVTIs says for coverages through a vti that there is nothing to switch: all of its offloads
// are off [fixed] (KERNEL.md 5).
func (p *planner) noteVTIs() {
	if len(p.vtis) == 0 {
		return
	}
	for _, c := range p.covers {
		if l := p.vtiOf(c); l != nil {
			v := p.holding(c)
			v.Carriers = append(v.Carriers, l.Name)
			p.holding(c).note(fmt.Sprintf("%s has all segmentation offloads off [fixed]: nothing to switch", l.Name))
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

// offloaded returns a coverage whose SA is offloaded to a device that segments ESP itself.
func (p *planner) offloaded(covs []*coverage) *coverage {
	for _, c := range covs {
		for _, st := range c.steps {
			for _, sa := range st.SAs {
				if sa.OffloadDev == 0 {
					continue
				}
				if p.does(routes.Ifindex(sa.OffloadDev), ethtool.ESPSegmentation) {
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
