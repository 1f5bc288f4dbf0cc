package plan

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// dedicated is a carrier by which nothing but covered flows can leave.
type dedicated struct {
	link *routes.Link
	kind string // of the device that makes it one, for the probe
	// covs are those whose flows leave by it, in the order of planner.covers. Those of a device in a stack are its lower devices'.
	covs []*coverage
	// What is known of them all.
	trials, unproved, losing int         // SAs that a probe has to have tried; those that it has not shown to be carried well; those with which UDP is lost
	bound                    []*coverage // those with an SA that is offloaded to a device that segments ESP, in order
	// lower are the dedicated devices that it sends by, in a stack, over those that send by it.
	lower, over []*dedicated
	// entered says that flows entered at it when the holds were worked out.
	entered bool
	// nested is a tunnel in another one or in an xfrm interface, which no probe tries.
	nested  bool
	says    []saying // of coverages whose flows enter at it
	decided facts    // what that follows from
}

// saying is what is said of the coverages of a device: the device itself, or one below it.
type saying struct {
	of   *dedicated
	note string
	held string // what is held off, else none
}

func (d *dedicated) note(of *dedicated, format string, args ...any) {
	d.says = append(d.says, saying{of: of, note: fmt.Sprintf(format, args...)})
}

// facts are what a decision about a device follows from besides devices, features and the configuration.
type facts struct {
	probed, losing bool
	bound          *coverage
}

func (d *dedicated) facts() facts { return facts{d.probed(), d.breaksUDP(), d.offloaded()} }

// probed reports whether a probe has shown, for every SA of the carrier, that super-packets are
// carried correctly and at least as fast.
func (d *dedicated) probed() bool {
	switch {
	case d.nested:
		return false
	case len(d.lower) > 0:
		return !slices.ContainsFunc(d.lower, func(low *dedicated) bool { return !low.probed() })
	}
	return d.trials > 0 && d.unproved == 0
}

// breaksUDP reports whether a probe has shown that UDP super-packets are lost with one of the
// carrier's SAs.
func (d *dedicated) breaksUDP() bool {
	return d.losing > 0 || slices.ContainsFunc(d.lower, (*dedicated).breaksUDP)
}

// offloaded is the first coverage with an SA that is offloaded to a device that segments ESP itself, nil for none.
func (d *dedicated) offloaded() *coverage {
	if len(d.bound) > 0 {
		return d.bound[0]
	}
	var first *coverage
	for _, low := range d.lower {
		if c := low.offloaded(); c != nil && (first == nil || compareCovers(c, first) < 0) {
			first = c
		}
	}
	return first
}

// carries reports whether a coverage's flows leave by the device.
func (d *dedicated) carries(c *coverage) bool {
	if len(d.lower) > 0 {
		return slices.ContainsFunc(d.lower, func(low *dedicated) bool { return low.carries(c) })
	}
	_, found := slices.BinarySearchFunc(d.covs, c, compareCovers)
	return found
}

// all are the coverages whose flows leave by the device, in order.
func (d *dedicated) all() []*coverage {
	if len(d.lower) == 1 {
		return d.lower[0].all()
	}
	if len(d.lower) == 0 {
		return d.covs
	}
	var out []*coverage
	for _, low := range d.lower {
		out = append(out, low.all()...)
	}
	slices.SortFunc(out, compareCovers)
	return slices.Compact(out)
}

// findCarriers finds the dedicated carriers, without those in stacks above them, and whose flows leave by them.
func (p *planner) findCarriers() {
	p.based, p.carry = map[routes.Ifindex]*dedicated{}, map[*coverage][]*dedicated{}
	if p.counts[0] < len(p.covers) { // some have an if_id
		for _, c := range p.covers {
			p.followCarriersOf(c)
		}
	}
	for _, t := range p.dedicatedTunnels() {
		if t.link.Up && len(t.over) == 0 && !t.maybe { // nothing leaves by one that is down: tunl0 and its kin stay as they are
			kind := t.link.Kind
			if _, ok := p.L2TP[t.link.Index]; ok {
				kind = "l2tp" // its device has no kind
			}
			under := p.FIB.Link(t.path.Oif)
			nested := p.tunnels[t.path.Oif] != nil || under != nil && slices.Contains([]string{"xfrm", "vti", "vti6"}, under.Kind)
			for _, c := range t.covs {
				p.addCarrier(t.link, kind, c).nested = nested
			}
		}
	}
	p.wholes = p.findWholes()
	for _, w := range p.wholes {
		for _, c := range w.covs {
			p.addCarrier(w.link, w.link.Kind, c)
		}
	}
}

// wholeDevice is a device all of whose unicast routes are covered.
type wholeDevice struct {
	link *routes.Link
	covs []*coverage
}

func (p *planner) findWholes() []wholeDevice {
	var out []wholeDevice
	for _, l := range p.wholeDevices() {
		if covs := p.wholly(l); len(covs) > 0 {
			out = append(out, wholeDevice{l, covs})
		}
	}
	return out
}

func (w wholeDevice) equal(o wholeDevice) bool {
	return w.link == o.link && slices.Equal(w.covs, o.covs)
}

// addCarrier has a coverage's flows leave by a dedicated carrier.
func (p *planner) addCarrier(l *routes.Link, kind string, c *coverage) *dedicated {
	d := p.based[l.Index]
	if d == nil {
		d = &dedicated{link: l, kind: kind}
		p.based[l.Index] = d
	}
	at, there := slices.BinarySearchFunc(d.covs, c, compareCovers)
	if there {
		return d
	}
	d.covs = slices.Insert(d.covs, at, c)
	p.carry[c] = append(p.carry[c], d)
	p.count(d, c, 1)
	return d
}

// dropCarrier ends that.
func (p *planner) dropCarrier(d *dedicated, c *coverage) {
	if at, there := slices.BinarySearchFunc(d.covs, c, compareCovers); there {
		d.covs = slices.Delete(d.covs, at, at+1)
		p.count(d, c, -1)
	}
	if rest := remove(p.carry[c], d); len(rest) > 0 {
		p.carry[c] = rest
	} else {
		delete(p.carry, c)
	}
	if len(d.covs) == 0 {
		delete(p.based, d.link.Index)
	}
}

// count adds what is known of a coverage's SAs to what is known of the carrier's, or takes it away again.
func (p *planner) count(d *dedicated, c *coverage, by int) {
	for k := range probeKeys(d.kind, c) {
		d.trials += by
		if !p.Probed[k].KeepTSO {
			d.unproved += by
		}
		if p.Probed[k].BreaksUDP {
			d.losing += by
		}
	}
	at, there := slices.BinarySearchFunc(d.bound, c, compareCovers)
	switch {
	case there && by < 0:
		d.bound = slices.Delete(d.bound, at, at+1)
	case !there && by > 0 && p.offloaded(c):
		d.bound = slices.Insert(d.bound, at, c)
	}
}

// rebind looks at the offloads of SAs again, as features have changed.
func (p *planner) rebind() {
	for _, d := range p.based {
		d.bound = nil
		for _, c := range d.covs {
			if p.offloaded(c) {
				d.bound = append(d.bound, c)
			}
		}
	}
}

// followCarriers brings the carriers up to date, and reports whether the holds can be others than before, or what is said with them of
// coverages that did not change. What can't be followed is found anew.
func (p *planner) followCarriers(r *region, ch Changes) bool {
	if p.wide+len(p.wholes) > 0 && (len(r.list)+len(ch.Ours) > 0 || p.routed) && !slices.EqualFunc(p.findWholes(), p.wholes, wholeDevice.equal) {
		p.findCarriers()
		return true
	}
	changed := ch.Devices
	if ch.Devices {
		p.rebind()
	}
	// By the routes that it has besides.
	changed = changed || slices.ContainsFunc(p.uppers, func(d *dedicated) bool { return p.enters(d) != d.entered })
	for _, dropped := range []bool{true, false} { // who comes in a policy's place has its rank, too
		for c := range p.touched {
			if c.dropped == dropped {
				changed = p.followCarriersOf(c) || changed
			}
		}
	}
	for _, way := range p.rerouted {
		if t := p.byIfID[way.ifID]; t != nil {
			overlapping(t, way.dst, func(_ netip.Prefix, at *entry) {
				for e := range at.each {
					if e.cov != nil {
						changed = p.followCarriersOf(e.cov) || changed
					}
				}
			})
		}
	}
	return changed
}

// followCarriersOf brings the xfrm interfaces by which a coverage's flows leave up to date. It reports whether that leads to
// other decisions about a device.
func (p *planner) followCarriersOf(c *coverage) (changed bool) {
	if c.maybe || c.pol.IfID == 0 {
		return false
	}
	var links []*routes.Link
	if !c.dropped {
		links = p.carriers(c)
	}
	for _, d := range slices.Clone(p.carry[c]) {
		if d.link.Kind == "xfrm" && !slices.Contains(links, d.link) {
			p.dropCarrier(d, c)
			changed = changed || len(d.covs) == 0 || d.facts() != d.decided
		}
	}
	for _, l := range links {
		known := p.based[l.Index] != nil
		d := p.addCarrier(l, l.Kind, c)
		changed = changed || !known || d.facts() != d.decided
	}
	return changed
}

// carrying are the carriers at which a coverage's flows enter, in order.
func (p *planner) carrying(c *coverage) []*dedicated {
	var out []*dedicated
	var climb func(ds []*dedicated)
	climb = func(ds []*dedicated) {
		for _, d := range ds {
			if !slices.Contains(out, d) {
				out = append(out, d)
				climb(d.over)
			}
		}
	}
	climb(p.carry[c])
	out = slices.DeleteFunc(out, func(d *dedicated) bool { return !d.entered })
	slices.SortFunc(out, func(a, b *dedicated) int { return cmp.Compare(a.link.Index, b.link.Index) })
	return out
}

// holdVerdict is what the holds and lanes say of a coverage, nil for nothing.
func (p *planner) holdVerdict(c *coverage) *Verdict {
	carriers, vti := p.carrying(c), p.vtiOf(c)
	if len(carriers) == 0 && vti == nil {
		return c.held()
	}
	v := &Verdict{Cut: CutSocket}
	for _, d := range carriers {
		v.Carriers = append(v.Carriers, d.link.Name)
		for _, s := range d.says {
			if s.of != d && !s.of.carries(c) {
				continue
			}
			if s.note != "" {
				v.note(s.note)
			}
			if s.held != "" && !slices.Contains(v.Held, s.held) {
				v.Held, v.Cut = append(v.Held, s.held), CutDevice
			}
		}
	}
	if vti != nil { // all of its offloads are off [fixed] (KERNEL.md 5)
		v.Carriers = append(v.Carriers, vti.Name)
		v.note(fmt.Sprintf("%s has all segmentation offloads off [fixed]: nothing to switch", vti.Name))
	}
	if s := c.held(); s != nil {
		v.Carriers, v.Held = append(v.Carriers, s.Carriers...), append(v.Held, s.Held...)
		if v.Cut != CutDevice {
			v.Cut = s.Cut
		}
		for _, n := range s.Notes {
			v.note(n)
		}
	}
	return v
}

// cutOnCarrier reports whether a coverage with an if_id is cut at a dedicated carrier.
func (p *planner) cutOnCarrier(c *coverage) bool {
	return slices.ContainsFunc(p.carrying(c), func(d *dedicated) bool {
		return slices.ContainsFunc(d.says, func(s saying) bool { return s.held != "" && s.of.carries(c) })
	})
}

// causes are the coverages that ask for a hold.
func (p *planner) causes(h *Hold) iter.Seq[xfrmwatch.CoverageID] {
	d := p.devices[routes.Ifindex(h.Device.Index)]
	if d == nil || h.Why != "" || len(h.Because)+len(h.Keys) > 0 {
		return slices.Values(h.Because)
	}
	return func(yield func(xfrmwatch.CoverageID) bool) {
		for _, c := range d.all() {
			if !yield(c.id()) {
				return
			}
		}
	}
}
