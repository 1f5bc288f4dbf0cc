package plan

import (
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/lane"
	"tsoagent/routes"
	"tsoagent/sockopt"
)

// signed is a TCP key with the verdict on it.
type signed struct {
	key     sockopt.Key
	trusted bool // it may ask for more
	verdict *Verdict
}

// sign lists the keys in order. The kernel takes GSO from their sockets, so that the keys ask for
// nothing, unless the configuration has them count like policies on NICs that they share (share), and
// then those of users who are trusted: anybody can set a key, for all addresses, too.
func (p *planner) sign() {
	for _, k := range slices.SortedFunc(slices.Values(p.Keys), sockopt.Key.Compare) {
		trusted := k.Owner.Known && (k.Owner.UID == 0 || slices.Contains(p.Trusted, k.Owner.UID))
		p.signed = append(p.signed, &signed{k, trusted, &Verdict{Key: &k, Cut: CutSocket}})
	}
}

// shareSigned is share for the keys: it holds what is to be off, and returns what lanes are wanted.
func (p *planner) shareSigned() []laneWanted {
	var wanted []laneWanted
	for _, s := range p.signed {
		if !s.trusted {
			continue // nor is it looked where its packets go, as there can be many of them
		}
		for _, l := range p.signedNICs(s) {
			switch p.Config.SharedMode(l.Name) {
			case SharedOff:
				p.holdSigned(s, l)
			case SharedLane:
				wanted = append(wanted, laneWanted{key: s, nic: l, matches: []lane.Match{signedMatch(s.key)}})
			}
		}
	}
	return wanted
}

// signedMatch are the packets that leave signed: those of a listener's connections come from its
// port, a client's go to the peer's.
func signedMatch(k sockopt.Key) lane.Match {
	return lane.Match{Src: signedFlows(k).Src, Dst: k.Peer, Proto: protoTCP, Sport: k.Port, Dport: k.PeerPort}
}

func signedFlows(k sockopt.Key) routes.Flows {
	f := routes.Flows{
		Family: routes.FamilyOf(k.Peer.Addr()), Dst: k.Peer, Proto: protoTCP,
		Sport: portRange(k.Port), Dport: portRange(k.PeerPort),
	}
	f.Src = f.Family.Any()
	if k.Local.IsValid() {
		f.Src = netip.PrefixFrom(k.Local, k.Local.BitLen())
	}
	return f
}

func portRange(port uint16) routes.PortRange {
	if port == 0 {
		return routes.PortRange{}
	}
	return routes.PortRange{Lo: port, Hi: port}
}

// holdSigned takes TSO from a NIC, for everybody, because of a key.
func (p *planner) holdSigned(s *signed, l *routes.Link) {
	s.verdict.sharedOff(l)
	for _, f := range p.Config.features(l.Name) {
		st, ok := p.Features[l.Index].Get(f)
		switch {
		case ok && st.Changeable:
			h, _ := p.holdAt(l, f)
			h.Keys = append(h.Keys, s.key)
			s.verdict.Cut = CutNIC
			s.verdict.Held = append(s.verdict.Held, l.Name+" "+string(f))
		case ok && st.Active:
			s.verdict.note(fmt.Sprintf("%s has %s on [fixed]: it can't be switched off", l.Name, f))
		}
	}
}

// signedNICs are the shared devices by which a key's packets leave, in order: the device that its
// socket is bound to, else those of the routes to the peer, in the socket's VRF.
func (p *planner) signedNICs(s *signed) []*routes.Link {
	oifs := map[routes.Ifindex]bool{}
	bound := p.FIB.Link(routes.Ifindex(s.key.Ifindex))
	switch {
	case s.key.Ifindex == 0:
		parts := slices.DeleteFunc(p.FIB.Resolve(signedFlows(s.key), p.Config.OwnRule), func(part routes.Part) bool {
			return part.Rule.Action == routes.RuleToTable && part.Rule.Table == routes.TableLocal
		})
		p.devicesOf(parts, s.key.Peer, s.verdict, oifs)
	case bound == nil:
		s.verdict.note(fmt.Sprintf("its socket is bound to a device that is not there (index %d)", s.key.Ifindex))
	case bound.Kind == "vrf":
		part := routes.Part{}
		part.Containing, part.Inside = p.FIB.Cover(routes.FamilyOf(s.key.Peer.Addr()), bound.VRFTable, s.key.Peer)
		p.devicesOf([]routes.Part{part}, s.key.Peer, s.verdict, oifs)
	default:
		oifs[bound.Index] = true
	}
	return p.shareable(oifs)
}

// judgeSigned completes the verdicts on keys.
func (p *planner) judgeSigned() {
	shares := p.Config.shares()
	for _, s := range p.signed {
		if shares && !s.trusted {
			s.verdict.note(distrust(s.key.Owner))
		}
		switch {
		case len(s.verdict.Held) > 0 || len(s.verdict.Carriers) > 0:
			s.verdict.note("the kernel takes GSO from sockets with a key by itself")
		default:
			s.verdict.note("the kernel takes GSO from sockets with a key; nothing to do")
		}
	}
}

// distrust says why a key asks for nothing on shared NICs.
func distrust(o sockopt.Owner) string {
	switch {
	case !o.Known:
		return "shared_nics is not followed for it: the kernel doesn't tell whose its socket is"
	case o.UID == sockopt.OverflowUID:
		return fmt.Sprintf("shared_nics is not followed for it: its socket belongs to user %d, who stands for all that are in other user namespaces only", o.UID)
	}
	return fmt.Sprintf("shared_nics is not followed for it: its socket belongs to user %d, who is not trusted; if that is your BGP daemon's, "+
		"add %[1]d, or its name, to tcp_keys_trust", o.UID)
}
