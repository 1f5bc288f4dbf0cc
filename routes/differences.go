package routes

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
)

// manyDifferences is from how many destinations on a full dump is told of as a whole.
const manyDifferences = 1 << 15

// differences are the changes that lead from one state to another one. They are one, All, if anything but routes
// differs, or very many routes. A dump that is taken now and then to be sure finds none, as a rule. What is equal keeps
// its pointers, by which others know it; routes that are equal have one body anyway (Interner).
func (s *state) differences(fresh *state) []Change {
	all := []Change{{All: true}}
	sameLink := func(a, b *Link) bool { return *a == *b }
	sameRules := func(a, b []*Rule) bool { return slices.EqualFunc(a, b, func(a, b *Rule) bool { return *a == *b }) }
	if !maps.EqualFunc(s.links, fresh.links, sameLink) || !maps.EqualFunc(s.rules, fresh.rules, sameRules) ||
		!maps.EqualFunc(s.nexthops, fresh.nexthops, (*NexthopObject).equal) || !maps.EqualFunc(s.addrs, fresh.addrs, sameAddrs) {
		return all
	}
	fresh.links, fresh.sorted, fresh.rules, fresh.nexthops = s.links, s.sorted, s.rules, s.nexthops
	var out []Change
	tell := func(k tableKey, dst netip.Prefix) bool {
		out = append(out, Change{Family: k.family, Dst: dst, Table: k.id})
		return len(out) < manyDifferences
	}
	for k, t := range fresh.tables {
		if !eachDifference(t, s.tables[k], func(dst netip.Prefix) bool { return tell(k, dst) }) {
			return all
		}
	}
	for k, t := range s.tables {
		now := fresh.tables[k]
		for dst := range t.All() {
			if _, there := get(now, dst); !there && !tell(k, dst) {
				return all
			}
		}
	}
	return out
}

// eachDifference calls fn for each destination of a table that was not there before, or had other routes, until it is
// false.
func eachDifference(t, before *bart.Table[*Paths], fn func(netip.Prefix) bool) bool {
	for dst, paths := range t.All() {
		old, _ := get(before, dst)
		if paths != old && !slices.Equal(paths.Bodies(), old.Bodies()) && !fn(dst) {
			return false
		}
	}
	return true
}

func get(t *bart.Table[*Paths], dst netip.Prefix) (*Paths, bool) {
	if t == nil {
		return nil, false
	}
	return t.Get(dst)
}

func (o *NexthopObject) equal(p *NexthopObject) bool {
	return o == p || o.ID == p.ID && o.Family == p.Family && o.Protocol == p.Protocol && o.Oif == p.Oif && o.Gateway == p.Gateway && o.Flags == p.Flags &&
		o.Blackhole == p.Blackhole && o.FDB == p.FDB && o.Encap == p.Encap && o.Resilient == p.Resilient && slices.Equal(o.Group, p.Group)
}

func sameAddrs(a, b map[netip.Prefix]struct{}) bool { return maps.Equal(a, b) }
