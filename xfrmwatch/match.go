package xfrmwatch

import "net/netip"

// Flow is one flow as an XFRM lookup sees it (struct flowi, net/flow.h). For ICMP, Sport is the
// type and Dport the code, as in xfrm_flowi_sport (net/xfrm.h). Oif is 0 where it is not known.
type Flow struct {
	Src, Dst     netip.Addr
	Proto        Proto
	Sport, Dport uint16
	Mark         uint32
	IfID         uint32 // the if_id of the xfrm interface that the flow leaves by, else 0
	Oif          int32
}

// hasPorts says which ports the kernel compares with a selector's for a protocol; where it has
// none it compares with 0 (xfrm_flowi_sport and xfrm_flowi_dport, include/net/xfrm.h).
func (p Proto) hasPorts() (sport, dport bool) {
	switch p {
	case 6, 17, 136, 132, 1, 58, 47: // TCP, UDP, UDP-Lite, SCTP, ICMP, ICMPv6, GRE (its key)
		return true, true
	case 135: // mobility header: its type
		return true, false
	}
	return false, false
}

func (m PortMatch) match(port uint16) bool { return (port^m.Port)&m.Mask == 0 }

// overlaps says whether some port matches both.
func (m PortMatch) overlaps(o PortMatch) bool { return (m.Port^o.Port)&m.Mask&o.Mask == 0 }

// contains says whether each port that o matches is matched by m.
func (m PortMatch) contains(o PortMatch) bool {
	return m.Mask&^o.Mask == 0 && (m.Port^o.Port)&m.Mask == 0
}

// match is the kernel's test of a flow's mark: (flow & mask) == value. A value with a bit that
// its mask lacks matches nothing.
func (m Mark) match(mark uint32) bool { return mark&m.Mask == m.Value }

func (m Mark) empty() bool { return m.Value&^m.Mask != 0 }

func (m Mark) overlaps(o Mark) bool {
	return !m.empty() && !o.empty() && (m.Value^o.Value)&m.Mask&o.Mask == 0
}

func (m Mark) contains(o Mark) bool {
	return o.empty() || !m.empty() && m.Mask&^o.Mask == 0 && (m.Value^o.Value)&m.Mask == 0
}

// Match says whether the selector matches a flow (xfrm_selector_match, net/xfrm/xfrm_policy.c).
// A selector without a family matches no flow here; see SA.HasSelector.
func (s Selector) Match(f Flow) bool {
	if !s.Src.IsValid() || !s.Dst.IsValid() {
		return false
	}
	sport, dport := f.Sport, f.Dport
	hasS, hasD := f.Proto.hasPorts()
	if !hasS {
		sport = 0
	}
	if !hasD {
		dport = 0
	}
	return s.Dst.Contains(f.Dst) && s.Src.Contains(f.Src) &&
		s.Sport.match(sport) && s.Dport.match(dport) &&
		(s.Proto == 0 || s.Proto == f.Proto) &&
		(s.Ifindex == 0 || s.Ifindex == f.Oif)
}

// empty says that no flow can match: ports are asked for where the protocol has none.
func (s Selector) empty() bool {
	if !s.Src.IsValid() || !s.Dst.IsValid() {
		return true
	}
	hasS, hasD := s.Proto.hasPorts()
	return s.Proto != 0 && (!hasS && !s.Sport.match(0) || !hasD && !s.Dport.match(0))
}

// Overlaps says whether some flow matches both selectors.
func (s Selector) Overlaps(o Selector) bool {
	if s.empty() || o.empty() || s.Family != o.Family ||
		!s.Src.Overlaps(o.Src) || !s.Dst.Overlaps(o.Dst) {
		return false
	}
	if s.Proto != 0 && o.Proto != 0 && s.Proto != o.Proto {
		return false
	}
	if s.Ifindex != 0 && o.Ifindex != 0 && s.Ifindex != o.Ifindex {
		return false
	}
	proto := s.Proto | o.Proto // equal, or one of them is 0
	hasS, hasD := true, true
	if proto != 0 {
		hasS, hasD = proto.hasPorts()
	}
	ports := func(has bool, a, b PortMatch) bool {
		if has {
			return a.overlaps(b)
		}
		return a.match(0) && b.match(0)
	}
	return ports(hasS, s.Sport, o.Sport) && ports(hasD, s.Dport, o.Dport)
}

// Contains says whether each flow that o matches is matched by s.
func (s Selector) Contains(o Selector) bool {
	if o.empty() {
		return true
	}
	if s.empty() || s.Family != o.Family {
		return false
	}
	inside := func(outer, inner netip.Prefix) bool {
		return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
	}
	if !inside(s.Src, o.Src) || !inside(s.Dst, o.Dst) ||
		s.Proto != 0 && s.Proto != o.Proto ||
		s.Ifindex != 0 && s.Ifindex != o.Ifindex {
		return false
	}
	hasS, hasD := true, true
	if o.Proto != 0 {
		hasS, hasD = o.Proto.hasPorts()
	}
	ports := func(has bool, outer, inner PortMatch) bool {
		if has {
			return outer.contains(inner)
		}
		return outer.match(0)
	}
	return ports(hasS, s.Sport, o.Sport) && ports(hasD, s.Dport, o.Dport)
}

// Match says whether the policy applies to a flow, whatever its direction is
// (xfrm_policy_match, net/xfrm/xfrm_policy.c). The if_id must be equal: a policy without one
// does not apply to flows of an xfrm interface.
func (p *Policy) Match(f Flow) bool {
	return p.IfID == f.IfID && p.Mark.match(f.Mark) && p.Selector.Match(f)
}

// PoliciesOverlap says whether some flow matches both policies in the same lookup. Policies of
// different direction or type never meet.
func PoliciesOverlap(a, b *Policy) bool {
	return a.Dir == b.Dir && a.Sub == b.Sub && a.IfID == b.IfID &&
		a.Mark.overlaps(b.Mark) && a.Selector.Overlaps(b.Selector)
}

// Shadows says whether p, where it has precedence, takes the whole selector of q, so that q
// never decides.
func (p *Policy) Shadows(q *Policy) bool {
	return p.Dir == q.Dir && p.Sub == q.Sub && p.IfID == q.IfID &&
		p.Mark.contains(q.Mark) && p.Selector.Contains(q.Selector)
}

// Lookup finds the main policy that the kernel would take for a flow, and those that match too
// but come later. It looks at each policy, so it is the oracle and not the fast path. Policies
// of type sub and per-socket policies are left out: a sub policy is applied besides the main
// one, and a socket policy is known to its socket alone.
func (db *DB) Lookup(f Flow, dir Dir) (winner *Policy, losers []*Policy) {
	for p := range db.Policies() {
		if p.Dir != dir || p.Sub || !p.Match(f) {
			continue
		}
		if winner == nil {
			winner = p
		} else {
			losers = append(losers, p)
		}
	}
	return winner, losers
}
