package plan

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"tsoagent/routes"
)

// place gives each shape its table and its rules their priorities, directly ahead of the rule
// whose table decides. It is false where there was no room for some: they are marked.
func (p *planner) place(shapes []*shaped) bool {
	all := true
	used := map[routes.Family]int{}
	taken := p.tablesTaken()
	byBase := map[*routes.Rule][]*shaped{}
	var bases []*routes.Rule
	for _, s := range shapes {
		s.table = p.tableFor(s, taken)
		if s.table == 0 {
			s.why, all = "no lock: no free routing table of our own", false
			continue
		}
		if byBase[s.base] == nil {
			bases = append(bases, s.base)
		}
		byBase[s.base] = append(byBase[s.base], s)
	}
	var placed [][]ruled
	for _, base := range bases {
		group := byBase[base]
		room := min(p.room(base), MaxRules-used[base.Family])
		if j := p.jumpTo(base.Family, base.Priority); j != nil {
			for _, s := range group {
				s.toAll = append(s.toAll, fmt.Sprintf("rule %d jumps to rule %d: no lock for the flows that it sends there", j.Priority, base.Priority))
			}
		}
		var first, second []ruled
		for _, s := range group {
			if len(first) >= room {
				s.why, all = fmt.Sprintf("%s%d, or more than %d rules", noPriority, base.Priority, MaxRules), false
				continue
			}
			first = append(first, ruled{s, p.rulesOf(s)})
		}
		for i, r := range first {
			if len(r.rules) == 1 {
				continue
			}
			first[i].rules = r.rules[:1]
			if len(first)+len(second) >= room {
				r.s.toServed = append(r.s.toServed, fmt.Sprintf("lookups without a source are not served: no second free rule priority directly ahead of rule %d, or more than %d rules", base.Priority, MaxRules))
				continue
			}
			r.s.toServed = append(r.s.toServed, sourceLessServed(base.Family))
			second = append(second, ruled{r.s, r.rules[1:]})
		}
		used[base.Family] += len(first) + len(second)
		// Lookups without a source match several shapes: the smallest MTU goes first.
		slices.SortStableFunc(second, func(a, b ruled) int { return a.s.minMTU() - b.s.minMTU() })
		placed = append(placed, append(first, second...))
	}
	if !all {
		return false
	}
	for i, list := range placed {
		p.emit(bases[i], list)
	}
	return true
}

type ruled struct {
	s     *shaped
	rules []routes.Rule
}

func (p *planner) emit(base *routes.Rule, list []ruled) {
	out := map[*shaped]*Shape{}
	var order []*shaped
	for i, r := range list {
		sh := out[r.s]
		if sh == nil {
			sh = &Shape{ID: r.s.id, Base: base, Table: r.s.table, live: r.s}
			out[r.s] = sh
			order = append(order, r.s)
		}
		for _, rule := range r.rules {
			rule.Priority = base.Priority - uint32(len(list)-i)
			sh.Rules = append(sh.Rules, rule)
		}
	}
	for _, s := range order {
		p.plan.Shapes = append(p.plan.Shapes, *out[s])
	}
}

// rulesOf are the shape's rules without priorities: the one for its selectors, and where the
// host forwards a second one for lookups without a source address, which MSS clamps and
// unbound sockets do.
func (p *planner) rulesOf(s *shaped) []routes.Rule {
	f := s.id.Flows
	r := routes.Rule{
		Family: f.Family, Action: routes.RuleToTable, Table: s.table, Protocol: p.Config.Protocol,
		Mark: f.Mark, Mask: f.Mask, IPProto: f.Proto, Sport: f.Sport, Dport: f.Dport,
		SuppressPrefixLen: -1, SuppressIfgroup: -1,
	}
	if f.Src.Bits() > 0 {
		r.Src = f.Src
	}
	if d := s.onlyDst(); d.IsValid() && d.Bits() > 0 {
		r.Dst = d
	}
	rules := []routes.Rule{r}
	if p.Config.SourceLess != Serve || !p.Forwarding[f.Family] || f.Src.Bits() == 0 ||
		s.base.Src.IsValid() || f.Proto != 0 || !f.Sport.Any() || !f.Dport.Any() {
		return rules
	}
	if f.Family == routes.IPv4 {
		r.Src = netip.PrefixFrom(netip.IPv4Unspecified(), 32)
	} else {
		r.Src, r.Iif = netip.Prefix{}, "lo"
	}
	return append(rules, r)
}

// sourceLessServed says that a second rule serves lookups without a source, and whom else.
func sourceLessServed(f routes.Family) string {
	if f == routes.IPv4 {
		return "lookups without a source are served: the host's own unbound sockets to these destinations have the lock too"
	}
	return "lookups without a source are served: the host's own traffic to these destinations has the lock too"
}

// onlyDst is the destination that all members with a clone share, invalid if they differ. A
// rule then says exactly what it is for; with several destinations the table itself tells them
// apart.
func (s *shaped) onlyDst() netip.Prefix {
	var only netip.Prefix
	for _, m := range s.members {
		if m.clones == 0 {
			continue
		}
		if only.IsValid() && m.dst() != only {
			return netip.Prefix{}
		}
		only = m.dst()
	}
	return only
}

// jumpTo is a rule that goes to that priority, nil if there is none.
func (p *planner) jumpTo(f routes.Family, priority uint32) *routes.Rule {
	for _, r := range p.FIB.Rules(f) {
		if r.Action == routes.RuleGoto && r.Goto == priority {
			return r
		}
	}
	return nil
}

// room is how many rules fit between the rule and the one ahead of it that is not ours. None
// fit where another rule has the same priority and stands ahead. A priority that a rule wants to
// jump to in vain is not free: a rule there would be its target (fib_nl_newrule).
func (p *planner) room(base *routes.Rule) int {
	room := int(min(base.Priority, MaxRules*4))
	for _, r := range p.FIB.Rules(base.Family) {
		if *r == *base {
			break
		}
		if !p.Config.OwnRule(r) {
			room = min(int(base.Priority)-int(r.Priority)-1, MaxRules*4)
		}
	}
	if !slices.ContainsFunc(p.FIB.Rules(base.Family), func(r *routes.Rule) bool { return r.Action == routes.RuleGoto }) {
		return room // which is nearly always so
	}
	for i := range room {
		if p.jumpTo(base.Family, base.Priority-uint32(i)-1) != nil {
			return i
		}
	}
	return room
}

// tablesTaken are those of takenTables, which looks at all that is in ours, if nothing there can have changed.
func (p *planner) tablesTaken() map[routes.Family]map[routes.TableID]bool {
	if p.follower == nil {
		return p.takenTables()
	}
	if p.foreign == nil {
		p.foreign = p.takenTables()
	}
	return map[routes.Family]map[routes.TableID]bool{
		routes.IPv4: maps.Clone(p.foreign[routes.IPv4]), routes.IPv6: maps.Clone(p.foreign[routes.IPv6]),
	}
}

// takenTables are the table numbers that hold or lead to something that is not ours.
func (p *planner) takenTables() map[routes.Family]map[routes.TableID]bool {
	taken := map[routes.Family]map[routes.TableID]bool{}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		taken[f] = map[routes.TableID]bool{}
		for _, r := range p.FIB.Rules(f) {
			if p.Config.OwnTable(r.Table) && !p.Config.OwnRule(r) {
				taken[f][r.Table] = true
			}
		}
		for _, id := range p.FIB.Tables(f) {
			if !p.Config.OwnTable(id) {
				continue
			}
			for r := range p.FIB.Table(f, id) {
				if !p.Config.OwnRoute(r) {
					taken[f][id] = true
					break
				}
			}
		}
	}
	for _, l := range p.FIB.Links() {
		if p.Config.OwnTable(l.VRFTable) {
			taken[routes.IPv4][l.VRFTable], taken[routes.IPv6][l.VRFTable] = true, true
		}
	}
	return taken
}

// tableFor is the table that the shape's rule already leads to, else the first free one, so
// that a new shape moves no other.
func (p *planner) tableFor(s *shaped, taken map[routes.Family]map[routes.TableID]bool) routes.TableID {
	mine := taken[s.id.Flows.Family]
	owned := map[routes.TableID]bool{}
	for _, r := range p.FIB.Rules(s.id.Flows.Family) {
		if !p.Config.OwnRule(r) {
			continue
		}
		owned[r.Table] = true
		if !mine[r.Table] && p.selects(r, s) {
			mine[r.Table] = true
			return r.Table
		}
	}
	for id := p.Config.Table; id < p.Config.Table+MaxRules; id++ {
		if !mine[id] && !owned[id] {
			mine[id] = true
			return id
		}
	}
	return 0
}

// selects reports whether a rule of ours is the one for the shape's selectors, whatever its
// destination and priority.
func (p *planner) selects(r *routes.Rule, s *shaped) bool {
	f := s.id.Flows
	src := r.Src
	if !src.IsValid() {
		src = f.Family.Any()
	}
	return src == f.Src && r.IPProto == f.Proto && r.Sport == f.Sport && r.Dport == f.Dport &&
		r.Mark == f.Mark && r.Mask == f.Mask && r.Iif == "" && p.basedOn(r) == s.base
}

// basedOn is the first rule behind one of ours that is not ours.
func (p *planner) basedOn(r *routes.Rule) *routes.Rule {
	rules := p.FIB.Rules(r.Family)
	i := slices.Index(rules, r)
	for _, o := range rules[i+1:] {
		if !p.Config.OwnRule(o) {
			return o
		}
	}
	return nil
}

// notePartial says for coverages some of whose flows have no lock that the configuration wants none
// in a table.
func (p *planner) notePartial() {
	for _, c := range p.covers {
		p.beginOwn(c, phasePartial)
		if !p.lockedWhole(c) {
			p.note(c, "only a part of a route's flows are covered: no lock (partial: off)")
		}
	}
}

// lockedWhole reports whether all routes that a coverage's flows use are locked in place.
func (p *planner) lockedWhole(c *coverage) bool {
	if c.pol.IfID == 0 && p.vtiOf(c) == nil {
		return !slices.ContainsFunc(p.parts(c), func(part routes.Part) bool { return !p.allLocked(part) })
	}
	if !c.anyLocked() {
		return false
	}
	for _, w := range p.waysOf(c.pol.IfID) {
		for k := range w.all() {
			if _, overlap := routes.Intersect(k.Dst, c.sel().Dst); overlap && !p.locked[k] {
				return false
			}
		}
	}
	return true
}

// String renders the shape's identity as the selectors of `ip rule`.
func (id ShapeID) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "from %s", id.Flows.Src)
	if id.Flows.Proto != 0 {
		fmt.Fprintf(&b, " ipproto %d", id.Flows.Proto)
	}
	if !id.Flows.Sport.Any() {
		fmt.Fprintf(&b, " sport %d-%d", id.Flows.Sport.Lo, id.Flows.Sport.Hi)
	}
	if !id.Flows.Dport.Any() {
		fmt.Fprintf(&b, " dport %d-%d", id.Flows.Dport.Lo, id.Flows.Dport.Hi)
	}
	if id.Flows.Mask != 0 {
		fmt.Fprintf(&b, " fwmark %#x/%#x", id.Flows.Mark, id.Flows.Mask)
	}
	fmt.Fprintf(&b, " ahead of rule %d", id.Base)
	return b.String()
}
