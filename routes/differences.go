package routes

import (
	"maps"
	"net/netip"
	"slices"
)

// manyDifferences is from how many destinations on a full dump is told of as a whole.
const manyDifferences = 1 << 15

// same reports whether a full dump has found the same links, addresses, rules and nexthop objects.
func (s *facts) same(fresh *facts) bool {
	sameLink := func(a, b *Link) bool { return *a == *b }
	sameRules := func(a, b []*Rule) bool { return slices.EqualFunc(a, b, func(a, b *Rule) bool { return *a == *b }) }
	return maps.EqualFunc(s.links, fresh.links, sameLink) && maps.EqualFunc(s.rules, fresh.rules, sameRules) &&
		maps.EqualFunc(s.nexthops, fresh.nexthops, (*NexthopObject).equal) && maps.EqualFunc(s.addrs, fresh.addrs, sameAddrs)
}

// differences are the changes that a dump has led to. They are one, All, if anything but routes differs, or very many routes.
// A dump that is taken now and then to be sure finds none, as a rule.
type differences struct {
	list []Change
	all  bool
}

func (d *differences) add(k tableKey, dst netip.Prefix) {
	if d.all {
		return
	}
	if d.list = append(d.list, Change{Family: k.family, Dst: dst, Table: k.id}); len(d.list) >= manyDifferences {
		d.list, d.all = nil, true
	}
}

func (d *differences) each(fn func(Change)) {
	if d.all {
		fn(Change{All: true})
	}
	for _, c := range d.list {
		fn(c)
	}
}

func (o *NexthopObject) equal(p *NexthopObject) bool {
	return o == p || o.ID == p.ID && o.Family == p.Family && o.Protocol == p.Protocol && o.Oif == p.Oif && o.Gateway == p.Gateway && o.Flags == p.Flags &&
		o.Blackhole == p.Blackhole && o.FDB == p.FDB && o.Encap == p.Encap && o.Resilient == p.Resilient && slices.Equal(o.Group, p.Group)
}

func sameAddrs(a, b map[netip.Prefix]struct{}) bool { return maps.Equal(a, b) }
