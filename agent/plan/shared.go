package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tsoagent/lane"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// share does what the configuration asks for on NICs by which covered and other flows leave: a
// lane for exactly the covered ones, or TSO off for everybody. Coverages that are cut on a
// dedicated carrier need neither. TCP keys count like policies.
func (p *planner) share() {
	p.sign()
	if p.Config.SharedNICs == SharedKeep && !slices.ContainsFunc(p.Config.Devices, func(d DeviceConfig) bool { return d.SharedNICs != "" }) {
		return
	}
	var wanted []laneWanted
	for _, c := range p.covers {
		if c.maybe || c.pol.IfID != 0 && p.cutOnCarrier(c) {
			continue
		}
		for _, l := range p.nics(c) {
			switch p.Config.SharedMode(l.Name) {
			case SharedOff:
				p.holdShared(c, l)
			case SharedLane:
				if w, ok := p.wantLane(c, l); ok {
					wanted = append(wanted, w)
				}
			}
		}
	}
	lanes := map[routes.Ifindex]*Lane{}
	for _, w := range p.oncePassed(append(wanted, p.shareSigned()...)) {
		p.addLane(w, lanes)
	}
	for _, l := range lanes {
		slices.SortFunc(l.Matches, lane.Match.Compare)
		l.Matches = slices.Compact(l.Matches)
		p.plan.Lanes = append(p.plan.Lanes, *l)
	}
	slices.SortFunc(p.plan.Lanes, func(a, b Lane) int { return cmp.Compare(a.Index, b.Index) })
}

// holdShared takes TSO from a NIC, for everybody.
func (p *planner) holdShared(c *coverage, l *routes.Link) {
	if p.offloaded(c) {
		p.holding(c).note(fmt.Sprintf("%s keeps its features: the SA is offloaded to hardware that segments ESP", l.Name))
		return
	}
	p.holding(c).sharedOff(l)
	for _, f := range p.Config.features(l.Name) {
		st, ok := p.Features[l.Index].Get(f)
		switch {
		case ok && st.Changeable:
			p.addHold(l, f, c)
		case ok && st.Active:
			p.holding(c).note(fmt.Sprintf("%s has %s on [fixed]: it can't be switched off", l.Name, f))
		}
	}
}

// laneWanted is what a coverage or a TCP key asks of the lane of a NIC.
type laneWanted struct {
	cov     *coverage // nil for a key
	key     *signed   // nil for a coverage
	nic     *routes.Link
	matches []lane.Match
}

func (p *planner) verdictOf(w laneWanted) *Verdict {
	if w.cov != nil {
		return p.holding(w.cov)
	}
	return w.key.verdict
}

// wantLane is a coverage's packets as they leave by the NIC. It is false, with a note, if there is
// to be no lane for them.
func (p *planner) wantLane(c *coverage, l *routes.Link) (laneWanted, bool) {
	if p.offloaded(c) {
		p.holding(c).note(fmt.Sprintf("no lane on %s: the SA is offloaded to hardware that segments ESP", l.Name))
		return laneWanted{}, false
	}
	matches := laneMatches(c)
	if len(matches) == 0 {
		p.holding(c).note(fmt.Sprintf("no lane on %s yet: without an SA it is not known what leaves", l.Name))
		return laneWanted{}, false
	}
	return laneWanted{cov: c, nic: l, matches: matches}, true
}

// oncePassed leaves packets that pass the lanes of two devices, one upon the other, the lower one
// alone: all of them pass that, and those that are sent by the lower device itself pass only that. What
// is wanted at the upper one is wanted there, on behalf of the same coverage.
func (p *planner) oncePassed(wanted []laneWanted) []laneWanted {
	at := map[routes.Ifindex][]lane.Match{}
	for _, w := range wanted {
		at[w.nic.Index] = append(at[w.nic.Index], w.matches...)
	}
	takes := func(l *routes.Link, m lane.Match) bool {
		return slices.ContainsFunc(at[l.Index], func(have lane.Match) bool { return laneMeets(have, m) })
	}
	var out []laneWanted
	for _, w := range wanted {
		own := laneWanted{cov: w.cov, key: w.key, nic: w.nic}
		for _, m := range w.matches {
			lower, without := p.laneBelow(w.nic, func(l *routes.Link) bool { return takes(l, m) })
			if len(lower) == 0 {
				own.matches = append(own.matches, m)
			}
			for _, l := range without {
				p.verdictOf(w).note(fmt.Sprintf("what leaves by %s through %s has no lane: shared_nics allows none on %s, and one on %s would be a second for what leaves through others", w.nic.Name, l.Name, l.Name, w.nic.Name))
			}
			var names []string
			for _, l := range lower {
				out = append(out, laneWanted{w.cov, w.key, l, []lane.Match{m}})
				names = append(names, l.Name)
			}
			if len(names) > 0 {
				p.verdictOf(w).note(fmt.Sprintf("what leaves by %s takes the lane of %s, which it passes as well", w.nic.Name, strings.Join(names, " or ")))
			}
		}
		if len(own.matches) > 0 {
			out = append(out, own)
		}
	}
	return out
}

// laneBelow are the lowest devices with a lane that takes something, through which all of it passes
// that an upper device sends, and those that are not to have one, through which some of it passes; none
// of either if there are none of the first. A VLAN's packets have its tag below, where no lane of ours
// takes them, and a bridge sends elsewhere, too.
func (p *planner) laneBelow(l *routes.Link, takes func(*routes.Link) bool) (lanes, without []*routes.Link) {
	var lower []*routes.Link
	switch l.Kind {
	case "macvlan", "macvtap", "ipvlan", "ipvtap":
		if parent := p.FIB.Link(l.Parent); parent != nil && !l.ParentElsewhere {
			lower = append(lower, parent)
		}
	case "bond", "team":
		lower = p.ports[l.Index]
	}
	var can []*routes.Link
	for _, low := range lower {
		deeper, left := p.laneBelow(low, takes)
		without = append(without, left...)
		switch {
		case len(deeper) > 0:
			lanes = append(lanes, deeper...)
		case takes(low):
			lanes = append(lanes, low)
		case p.Config.SharedMode(low.Name) != SharedLane:
			without = append(without, low)
		default:
			can = append(can, low)
		}
	}
	if len(lanes) == 0 {
		return nil, nil
	}
	return append(lanes, can...), without // a bond's other ports are to have one as well then
}

// laneMeets reports whether there are packets that both matches take.
func laneMeets(m, other lane.Match) bool {
	port := func(a, b uint16) bool { return a == b || a == 0 || b == 0 }
	return m.Proto == other.Proto && port(m.Sport, other.Sport) && port(m.Dport, other.Dport) &&
		m.Src.Overlaps(other.Src) && m.Dst.Overlaps(other.Dst)
}

// in adds the packets to the lane of the NIC.
func (p *planner) addLane(w laneWanted, lanes map[routes.Ifindex]*Lane) {
	have := lanes[w.nic.Index]
	if have == nil {
		have = &Lane{Lane: lane.Lane{Index: int32(w.nic.Index), Name: w.nic.Name}}
		lanes[w.nic.Index] = have
	}
	have.Matches = append(have.Matches, w.matches...)
	switch { // on behalf of a device above, too
	case w.cov != nil && !slices.Contains(have.Because, w.cov.id()):
		have.Because = append(have.Because, w.cov.id())
	case w.key != nil && !slices.Contains(have.Keys, w.key.key):
		have.Keys = append(have.Keys, w.key.key)
	default:
		return
	}
	p.verdictOf(w).lane(w.nic)
}

// sharedOff says that a NIC has its TSO off for everybody because of a verdict's flows.
func (v *Verdict) sharedOff(l *routes.Link) {
	v.Carriers = append(v.Carriers, l.Name)
	v.note(fmt.Sprintf("TSO is off for everybody who leaves by %s (shared_nics: off)", l.Name))
}

// lane says that a verdict's flows take the lane of a NIC.
func (v *Verdict) lane(l *routes.Link) {
	v.Carriers = append(v.Carriers, l.Name)
	if v.Cut != CutDevice { // a tunnel is one of its flows; there may be others
		v.Cut = CutLane
	}
	v.Held = append(v.Held, fmt.Sprintf("%s lane", l.Name))
}

// laneMatches are the packets of the coverage's outermost SAs as a NIC sees them.
func laneMatches(c *coverage) []lane.Match {
	if len(c.steps) == 0 {
		return nil
	}
	var out []lane.Match
	for _, sa := range c.steps[len(c.steps)-1].SAs {
		m := lane.Match{Src: hostOrAny(sa.Src, sa.Family), Dst: hostOrAny(sa.Dst, sa.Family), Proto: uint8(sa.Proto)}
		switch sa.Encap.Type {
		case 0:
		case udpEncapESPInUDP, udpEncapNonIKE:
			m.Proto, m.Sport, m.Dport = 17, sa.Encap.Sport, sa.Encap.Dport
		case tcpEncapESPInTCP:
			m.Proto, m.Sport, m.Dport = 6, sa.Encap.Sport, sa.Encap.Dport
		default:
			continue
		}
		out = append(out, m)
	}
	return out
}

// The encapsulations of an SA (UDP_ENCAP_*, linux/udp.h; TCP_ENCAP_ESPINTCP).
const (
	udpEncapNonIKE   = 1
	udpEncapESPInUDP = 2
	tcpEncapESPInTCP = 7
)

func hostOrAny(a netip.Addr, f xfrmwatch.Family) netip.Prefix {
	if !a.IsValid() || a.IsUnspecified() {
		return routes.Family(f).Any()
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// nics are the shared devices by which a coverage's packets leave, in order: those of the routes
// to the outer peers in tunnel mode, else those of the flows' own routes.
func (p *planner) nics(c *coverage) []*routes.Link {
	oifs := map[routes.Ifindex]bool{}
	if peers := outermost(c); len(peers) > 0 {
		for _, peer := range peers {
			oifs[p.wayTo(peer).path.Oif] = true
		}
	} else {
		p.devicesOf(p.parts(c), c.sel().Dst, p.holding(c), oifs)
	}
	return p.shareable(oifs)
}

// shareable are those of the devices that others may use, too, in order.
func (p *planner) shareable(oifs map[routes.Ifindex]bool) []*routes.Link {
	var out []*routes.Link
	for _, l := range p.FIB.Links() {
		if oifs[l.Index] && l.Type != arphrdLoopback && !l.Tunnel() && p.devices[l.Index] == nil && l.Kind != "vrf" {
			out = append(out, l)
		}
	}
	return out
}

// outermost are the peers of the outermost template, none if it takes the flow's own addresses.
func outermost(c *coverage) []Peer {
	t := c.pol.Templates[len(c.pol.Templates)-1]
	if t.TakesFlow() {
		return nil
	}
	return peersOf(c, t)
}

// devicesOf adds the devices of the routes that flows to dst use.
func (p *planner) devicesOf(parts []routes.Part, dst netip.Prefix, v *Verdict, oifs map[routes.Ifindex]bool) {
	n := 0
	add := func(m routes.Match) {
		for _, b := range m.Paths.Bodies() {
			if w, ok := p.domain(b); ok && w == (way{}) {
				for _, nh := range b.Nexthops {
					oifs[nh.Oif] = true
				}
			}
		}
	}
	for _, part := range parts {
		add(part.Containing)
		for m := range part.Inside {
			add(m)
			if n++; n > p.Config.MaxClonesPerCoverage {
				v.note(fmt.Sprintf("more than %d routes inside %s: the NICs of the others are left alone (max_clones_per_coverage)", p.Config.MaxClonesPerCoverage, dst))
				return
			}
		}
	}
}
