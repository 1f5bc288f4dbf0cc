package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

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
	lanes := map[routes.Ifindex]*Lane{}
	for _, c := range p.covers {
		if c.Maybe || c.verdict.Cut == CutDevice && c.Policy.IfID != 0 {
			continue
		}
		for _, l := range p.nics(c) {
			switch p.Config.shared(l.Name) {
			case SharedOff:
				p.holdShared(c, l)
			case SharedLane:
				p.lane(lanes, c, l)
			}
		}
	}
	p.shareSigned(lanes)
	for _, l := range lanes {
		slices.SortFunc(l.Matches, lane.Match.Compare)
		l.Matches = slices.Compact(l.Matches)
		p.plan.Lanes = append(p.plan.Lanes, *l)
	}
	slices.SortFunc(p.plan.Lanes, func(a, b Lane) int { return cmp.Compare(a.Index, b.Index) })
}

// holdShared takes TSO from a NIC, for everybody.
func (p *planner) holdShared(c *coverage, l *routes.Link) {
	if p.offloaded([]*coverage{c}) != nil {
		c.verdict.note(fmt.Sprintf("%s keeps its features: the SA is offloaded to hardware that segments ESP", l.Name))
		return
	}
	c.verdict.sharedOff(l)
	for _, f := range p.Config.features(l.Name) {
		st, ok := p.Features[l.Index].Get(f)
		switch {
		case ok && st.Changeable:
			p.addHold(l, f, []*coverage{c}, CutNIC)
		case ok && st.Active:
			c.verdict.note(fmt.Sprintf("%s has %s on [fixed]: it can't be switched off", l.Name, f))
		}
	}
}

// lane adds a coverage's packets, as they leave by the NIC, to its lane.
func (p *planner) lane(lanes map[routes.Ifindex]*Lane, c *coverage, l *routes.Link) {
	if p.offloaded([]*coverage{c}) != nil {
		c.verdict.note(fmt.Sprintf("no lane on %s: the SA is offloaded to hardware that segments ESP", l.Name))
		return
	}
	matches := laneMatches(c)
	if len(matches) == 0 {
		c.verdict.note(fmt.Sprintf("no lane on %s yet: without an SA it is not known what leaves", l.Name))
		return
	}
	have := laneOn(lanes, l, matches)
	have.Because = append(have.Because, c.ID)
	c.verdict.lane(l)
}

// laneOn is the lane of a NIC, which takes these packets, too.
func laneOn(lanes map[routes.Ifindex]*Lane, l *routes.Link, matches []lane.Match) *Lane {
	have := lanes[l.Index]
	if have == nil {
		have = &Lane{Lane: lane.Lane{Index: int32(l.Index), Name: l.Name}}
		lanes[l.Index] = have
	}
	have.Matches = append(have.Matches, matches...)
	return have
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
	if len(c.Steps) == 0 {
		return nil
	}
	var out []lane.Match
	for _, sa := range c.Steps[len(c.Steps)-1].SAs {
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
			oifs[p.Peers[peer].Oif] = true
		}
	} else {
		p.devicesOf(p.parts(c), c.Selector.Dst, c.verdict, oifs)
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
	t := c.Policy.Templates[len(c.Policy.Templates)-1]
	if t.TakesFlow() {
		return nil
	}
	return peersOf(c.Coverage, t)
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
