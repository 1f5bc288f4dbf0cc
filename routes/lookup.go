package routes

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"
)

// Flows is a set of flows: everything that a FIB rule can select by. Src and Dst are valid
// prefixes of Family; a zero Proto, port range or Mask selects all.
type Flows struct {
	Family       Family
	Src, Dst     netip.Prefix
	Proto        uint8
	Sport, Dport PortRange
	Mark, Mask   uint32
}

// Part is what one rule does with some of the flows asked for.
type Part struct {
	Rule *Rule
	// Flows are those asked for that the rule's own selectors match.
	Flows Flows
	// Whole says that the rule takes all flows asked for, so that later rules see only what its
	// table does not answer.
	Whole bool
	// Blocked says why the rule's selectors can't be repeated in a rule of ours, or is empty.
	Blocked string
	// Containing is the longest route that contains Flows.Dst, with its destination; Paths is
	// nil where there is none.
	Containing Match
	// Inside are the routes to destinations inside Flows.Dst. It is never nil; a rule that leads
	// to no table has none.
	Inside iter.Seq[Match]
}

// Match is a destination with its routes.
type Match struct {
	Dst   netip.Prefix
	Paths *Paths
}

// First is the route that the kernel takes for a packet without TOS: the first whose nexthops are not all dead.
func (m Match) First() (Route, bool) {
	for _, b := range m.Paths.Bodies() {
		if b.Src.IsValid() || b.TOS != 0 {
			continue
		}
		alive := len(b.Nexthops) == 0
		for _, n := range b.Nexthops {
			alive = alive || n.Flags&NexthopDead == 0
		}
		if alive {
			return Route{m.Dst, b}, true
		}
	}
	return Route{}, false
}

// Tied reports whether IPv6 has another route of the same metric as the first, not joined with it. Among
// those the kernel chooses by their preference (RTA_PREF), the device that a forwarded packet came in by and
// the routers that answer (find_rr_leaf, net/ipv6/route.c; KERNEL.md 40, 68).
func (m Match) Tied() bool {
	first, ok := m.First()
	return ok && first.Body.Family == IPv6 && slices.ContainsFunc(m.Paths.Bodies(), first.Body.tied)
}

func (b *Body) tied(o *Body) bool {
	return o != b && o.Priority == b.Priority && o.Src == b.Src
}

// SourceSpecific reports whether one of the routes is for some sources only (IPv6 subtrees).
func (m Match) SourceSpecific() bool {
	return slices.ContainsFunc(m.Paths.Bodies(), func(b *Body) bool { return b.Src.IsValid() })
}

// TOSSpecific reports whether one of the routes is for one TOS only.
func (m Match) TOSSpecific() bool {
	return slices.ContainsFunc(m.Paths.Bodies(), func(b *Body) bool { return b.TOS != 0 })
}

// Resolve follows the rules of the flows' family in the kernel's order and returns what each
// rule that can decide finds for the whole destination prefix, up to the rule that leaves
// nothing over. Rules for which skip returns true (our own) are passed over. Rules for VRF
// traffic (l3mdev) and for sockets bound to a device (oif) don't concern flows that are in no
// VRF and are passed over as well, but not where they are inverted. Where a goto rule takes a part of the flows is not followed:
// that part is blocked. (fib_rules_lookup, net/core/fib_rules.c)
func (f *FIB) Resolve(flows Flows, skip func(*Rule) bool) []Part {
	return f.AppendResolved(nil, flows, skip)
}

// AppendResolved appends what Resolve returns to a list.
func (f *FIB) AppendResolved(parts []Part, flows Flows, skip func(*Rule) bool) []Part {
	rules := f.rules[flows.Family]
	for i := 0; i < len(rules); i++ {
		r := rules[i]
		if skip(r) || !r.Invert && (r.L3mdev || r.Oif != "") {
			continue
		}
		sub, whole, blocked := r.intersect(flows)
		if !sub.Dst.IsValid() {
			continue
		}
		if r.Action == RuleGoto && blocked == "" {
			// A goto leads to the first rule with just that priority, nowhere without one.
			next := slices.IndexFunc(rules, func(o *Rule) bool { return o.Priority == r.Goto && !skip(o) })
			switch {
			case next <= i:
				continue
			case !whole:
				blocked = "a goto rule takes a part of them"
			default:
				i = next - 1
				continue
			}
		}
		if r.Action == RuleNop {
			continue
		}
		p := Part{Rule: r, Flows: sub, Whole: whole, Blocked: blocked, Inside: nothing}
		if r.Action == RuleToTable {
			p.Containing, p.Inside = f.Cover(flows.Family, r.table(), sub.Dst)
			if suppressed(r, p.Containing) {
				p.Containing = Match{}
			}
		}
		ends := r.Action != RuleToTable || p.answers()
		if r.Action == RuleToTable && p.Containing.Paths == nil && p.empty() {
			continue
		}
		parts = append(parts, p)
		if whole && blocked == "" && ends {
			break
		}
	}
	return parts
}

// table is where a rule to a table leads packets that are in no VRF. Those that `not … l3mdev` takes are
// looked up in table 0, by which the kernel means main (fib_get_table, fib6_get_table).
func (r *Rule) table() TableID {
	if r.L3mdev {
		return TableMain
	}
	return r.Table
}

// suppressed reports whether a rule passes on what its table has found. It does not for a route that
// is an error (fib_rules_lookup asks for what was found without one, net/core/fib_rules.c).
func suppressed(r *Rule, m Match) bool {
	if m.Paths == nil || r.SuppressPrefixLen < 0 || int32(m.Dst.Bits()) > r.SuppressPrefixLen {
		return false
	}
	first, ok := m.First()
	if !ok || first.Body.Type.fails() { // without a first one the kernel goes on to shorter prefixes
		return false
	}
	tied := m.Tied()
	return !slices.ContainsFunc(m.Paths.Bodies(), func(b *Body) bool {
		return b.Type.fails() && (b.Src.IsValid() || tied && first.Body.tied(b))
	})
}

// answers reports whether the rule's table answers for the whole destination: nothing is thrown
// or suppressed to later rules. Of very many routes inside only the first are looked at.
func (p Part) answers() bool {
	if first, ok := p.Containing.First(); !ok || p.Containing.throws(first) || p.Containing.SourceSpecific() {
		return false
	}
	n, rule := 0, p.Rule // p itself stays on the stack
	for m := range p.Inside {
		if first, ok := m.First(); ok && m.throws(first) || suppressed(rule, m) {
			return false
		}
		if n++; n == maxIndexedRoutes {
			break
		}
	}
	return true
}

// throws reports whether the first route, or one that is tied with it, leaves packets to later rules.
func (m Match) throws(first Route) bool {
	return first.Body.Type == Throw || m.Tied() &&
		slices.ContainsFunc(m.Paths.Bodies(), func(b *Body) bool { return b.Type == Throw && first.Body.tied(b) })
}

func (p Part) empty() bool {
	for range p.Inside {
		return false
	}
	return true
}

// Cover returns what one table has for a whole destination prefix: the longest route that
// contains it, and all routes strictly inside it.
func (f *FIB) Cover(fam Family, id TableID, dst netip.Prefix) (Match, iter.Seq[Match]) {
	t := f.tables[tableKey{fam, id}]
	if t == nil {
		return Match{}, nothing
	}
	var m Match
	if at, n, ok := t.longest(dst); ok {
		m = Match{at, f.sets.paths(n)}
	}
	return m, func(yield func(Match) bool) {
		t.inside(dst, func(at netip.Prefix, n setNumber) bool { return yield(Match{at, f.sets.paths(n)}) })
	}
}

func nothing(func(Match) bool) {}

// intersect returns the flows that the rule's selectors leave of those asked for (an invalid
// Dst: none), whether the rule takes all of them, and why the rest can't be expressed.
func (r *Rule) intersect(f Flows) (sub Flows, whole bool, blocked string) {
	sub, whole = f, true
	narrow := func(have netip.Prefix, want netip.Prefix) (netip.Prefix, bool) {
		switch {
		case !want.IsValid() || Contains(want, have):
			return have, true
		case Contains(have, want):
			whole = false
			return want, true
		}
		return netip.Prefix{}, false
	}
	none := Flows{Family: f.Family}
	var ok bool
	if sub.Src, ok = narrow(f.Src, r.Src); !ok && !r.Invert {
		return none, false, ""
	}
	if sub.Dst, ok = narrow(f.Dst, r.Dst); !ok && !r.Invert {
		return none, false, ""
	}
	if r.IPProto != 0 && f.Proto != r.IPProto {
		if f.Proto != 0 && !r.Invert {
			return none, false, ""
		}
		sub.Proto, whole = r.IPProto, false
	}
	if sub.Sport, ok = narrowPorts(f.Sport, r.Sport, &whole); !ok && !r.Invert {
		return none, false, ""
	}
	if sub.Dport, ok = narrowPorts(f.Dport, r.Dport, &whole); !ok && !r.Invert {
		return none, false, ""
	}
	if (f.Mark^r.Mark)&f.Mask&r.Mask != 0 && !r.Invert {
		return none, false, ""
	}
	if r.Mask&^f.Mask != 0 {
		whole = false
		// Bits of the rule's mark outside its mask count for nothing (fib_rule_match).
		sub.Mark, sub.Mask = f.Mark&f.Mask|r.Mark&r.Mask, f.Mask|r.Mask
	}
	if blocked = r.inexpressible(); blocked != "" {
		return f, false, blocked
	}
	return sub, whole, ""
}

// inexpressible names the first selector of the rule that a rule of ours does not repeat.
func (r *Rule) inexpressible() string {
	switch {
	case r.Invert:
		return "not"
	case r.Iif != "":
		return "iif " + r.Iif
	case r.TOS != 0:
		return fmt.Sprintf("tos %#x", r.TOS)
	case r.DSCP != 0:
		return fmt.Sprintf("dscp %d", r.DSCP-1)
	case r.HasUID:
		return fmt.Sprintf("uidrange %d-%d", r.UIDLo, r.UIDHi)
	case r.TunID != 0:
		return fmt.Sprintf("tun_id %d", r.TunID)
	case r.SuppressIfgroup >= 0:
		return fmt.Sprintf("suppress_ifgroup %d", r.SuppressIfgroup)
	case r.Unknown:
		return "an attribute that this version does not know"
	}
	return ""
}

func narrowPorts(have, want PortRange, whole *bool) (PortRange, bool) {
	if want.Any() {
		return have, true
	}
	if have.Any() {
		*whole = false
		return want, true
	}
	lo, hi := max(have.Lo, want.Lo), min(have.Hi, want.Hi)
	if lo > hi {
		return PortRange{}, false
	}
	if lo != have.Lo || hi != have.Hi {
		*whole = false
	}
	return PortRange{lo, hi}, true
}

// Contains reports whether prefix a contains all of prefix b.
func Contains(a, b netip.Prefix) bool {
	return a.Bits() <= b.Bits() && a.Contains(b.Addr())
}

// Intersect returns the narrower of two prefixes that overlap, else false.
func Intersect(a, b netip.Prefix) (netip.Prefix, bool) {
	switch {
	case Contains(a, b):
		return b, true
	case Contains(b, a):
		return a, true
	}
	return netip.Prefix{}, false
}

// Compare orders sets of flows, for a stable order of plans.
func (f Flows) Compare(o Flows) int {
	return cmp.Or(
		cmp.Compare(f.Family, o.Family),
		ComparePrefix(f.Src, o.Src),
		ComparePrefix(f.Dst, o.Dst),
		cmp.Compare(f.Proto, o.Proto),
		cmp.Compare(f.Sport.Lo, o.Sport.Lo), cmp.Compare(f.Sport.Hi, o.Sport.Hi),
		cmp.Compare(f.Dport.Lo, o.Dport.Lo), cmp.Compare(f.Dport.Hi, o.Dport.Hi),
		cmp.Compare(f.Mark, o.Mark), cmp.Compare(f.Mask, o.Mask),
	)
}
