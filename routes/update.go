package routes

import (
	"cmp"
	"net/netip"
	"slices"
)

// Compare orders keys by family, table, destination, source, TOS and metric.
func (k Key) Compare(o Key) int {
	return cmp.Or(
		cmp.Compare(k.Family, o.Family),
		cmp.Compare(k.Table, o.Table),
		ComparePrefix(k.Dst, o.Dst),
		ComparePrefix(k.Src, o.Src),
		cmp.Compare(k.TOS, o.TOS),
		cmp.Compare(k.Priority, o.Priority),
	)
}

// ComparePrefix orders prefixes by address, then by length. Invalid ones come first.
func ComparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func (b *Body) sameKey(o *Body) bool {
	return b.TOS == o.TOS && b.Priority == o.Priority && b.Src == o.Src
}

// same reports whether two bodies are the same route to the last attribute.
func (b *Body) same(o *Body) bool {
	if b == o {
		return true
	}
	return b.Raw == o.Raw && b.Expires == o.Expires && b.Raw != ""
}

// multipathable says whether IPv6 joins routes with this body and the same key into one
// (rt6_qualify_for_ecmp, include/net/ip6_route.h: those with a gateway). Those that the kernel
// itself made of a router advertisement can't be told from others, and are not joined.
func (b *Body) multipathable() bool {
	return b.NHID == 0 && len(b.Nexthops) > 0 && b.Nexthops[0].Gateway.IsValid()
}

func (b *Body) sameWays(o *Body) bool {
	return b.Type == o.Type && b.NHID == o.NHID && slices.EqualFunc(b.Nexthops, o.Nexthops, sameNexthop)
}

func sameNexthop(a, b Nexthop) bool { return a.Oif == b.Oif && a.Gateway == b.Gateway }

// sharesWays reports whether one of the nexthops is among the other's, hasWays whether all of the other's are here.
func (b *Body) sharesWays(o *Body) bool { return slices.ContainsFunc(b.Nexthops, o.hasWay) }

func (b *Body) hasWays(o *Body) bool {
	return !slices.ContainsFunc(o.Nexthops, func(n Nexthop) bool { return !b.hasWay(n) })
}

func (b *Body) hasWay(n Nexthop) bool {
	return slices.ContainsFunc(b.Nexthops, func(have Nexthop) bool { return sameNexthop(have, n) })
}

// destinationRoutes are routes by destination, as setRoute and removeRoute change them.
type destinationRoutes interface {
	get(tableKey, netip.Prefix) []*Body
	replace(k tableKey, dst netip.Prefix, old, bodies []*Body)
}

var (
	_ destinationRoutes = (*FIB)(nil)
	_ destinationRoutes = (*findings)(nil)
)

func (r Route) tableKey() tableKey { return tableKey{r.Body.Family, r.Body.Table} }

// setRoute applies RTM_NEWROUTE, and returns the routes that were at the destination. The kernel's order within a destination is kept: IPv4 by TOS
// (falling) and metric, IPv6 by metric; among equals the flags decide.
func setRoute(s destinationRoutes, ev RouteSet) (e Effect, old []*Body) {
	r := ev.Route
	old = s.get(r.tableKey(), r.Dst)
	var few [4]int // a destination seldom has more, and a storm not even two
	equals := few[:0]
	known := false
	for i, b := range old {
		known = known || b.same(r.Body)
		if b.sameKey(r.Body) {
			equals = append(equals, i)
		}
	}
	if known {
		if ev.Replace && len(equals) > 1 { // which of them it replaced is not said
			return Effect{Resync: resyncOf(r.Body)}, old
		}
		return Effect{}, old
	}
	bodies := slices.Clone(old)
	switch {
	case len(equals) == 0:
		bodies = insertBody(bodies, r.Body, false)
	case ev.Replace:
		at := equals[0]
		if r.Body.Family == IPv6 { // the first that can be joined with others as the new one can
			for _, i := range equals {
				if old[i].multipathable() == r.Body.multipathable() {
					at = i
					break
				}
			}
		}
		bodies[at] = r.Body
		// With several routes of one key the kernel may have removed a sibling as well
		// (fib6_add_rt2node), which the event does not tell.
		if len(equals) > 1 {
			e.Resync = resyncOf(r.Body)
		}
	case r.Body.Family == IPv6 && r.Body.multipathable():
		// What was joined comes with the whole set of nexthops. One without those of before was not
		// joined: a router's that advertised itself (RTF_ADDRCONF), which netlink does not show.
		i := slices.IndexFunc(equals, func(i int) bool { return old[i].multipathable() && old[i].sharesWays(r.Body) })
		if i < 0 {
			bodies = insertBody(bodies, r.Body, false)
			if len(equals) > 0 && len(r.Body.Nexthops) > 1 {
				e.Resync = resyncOf(r.Body)
			}
			break
		}
		if was := old[equals[i]]; !r.Body.hasWays(was) || canonical(was, true) != canonical(r.Body, true) {
			// Each nexthop keeps its own metrics, and a dump shows those of the first.
			e.Resync = resyncOf(r.Body)
		}
		bodies[equals[i]] = r.Body
	default:
		// Without NLM_F_APPEND an IPv4 route with an equal key goes first (`ip route prepend`).
		bodies = insertBody(bodies, r.Body, r.Body.Family == IPv4 && !ev.Append)
	}
	s.replace(r.tableKey(), r.Dst, old, bodies)
	e.Changed = true
	return e, old
}

// resyncOf is the dump that shows what a replace did. On IPv6 it may have hit a route of another
// device than the new one's, which a dump by that device does not show.
func resyncOf(b *Body) *Scope {
	sc := &Scope{RoutesOnly: true, Family: b.Family}
	if b.Family == IPv4 && b.NHID == 0 && len(b.Nexthops) == 1 {
		sc.Oif = b.Nexthops[0].Oif
	}
	return sc
}

func before(a, b *Body) int {
	return cmp.Or(-cmp.Compare(a.TOS, b.TOS), cmp.Compare(a.Priority, b.Priority))
}

func insertBody(bodies []*Body, b *Body, first bool) []*Body {
	i := 0
	for i < len(bodies) {
		c := before(bodies[i], b)
		if c > 0 || (c == 0 && first) {
			break
		}
		i++
	}
	return slices.Insert(bodies, i, b)
}

// removeRoute applies RTM_DELROUTE, and returns the routes that were at the destination.
func removeRoute(s destinationRoutes, r Route) (e Effect, old []*Body) {
	old = s.get(r.tableKey(), r.Dst)
	i := slices.IndexFunc(old, func(b *Body) bool { return b.same(r.Body) })
	if i < 0 {
		i = slices.IndexFunc(old, func(b *Body) bool { return b.sameKey(r.Body) && b.sameWays(r.Body) })
		if i >= 0 && !Equal(old[i], r.Body) {
			// Told again of one that went before the last dump, it may be another one's end.
			e.Resync = &Scope{RoutesOnly: true, Family: r.Body.Family}
		}
	}
	if i < 0 {
		if slices.ContainsFunc(old, r.Body.sameKey) {
			// One nexthop of an IPv6 multipath route: the event does not say what is left.
			return Effect{Resync: &Scope{RoutesOnly: true, Family: r.Body.Family}}, old
		}
		return Effect{}, old
	}
	s.replace(r.tableKey(), r.Dst, old, slices.Delete(slices.Clone(old), i, i+1))
	e.Changed = true
	return e, old
}

// maxHeld bounds the keys that inDoubt looks at.
const maxHeld = 1 << 16

// inDoubt are the families of which a dump may have to be taken again, because events came while
// it ran. It may show what they did, so they are told on top of it once more. For a key with a
// single route that ends with what the last of them says. Where several have one key, a replace
// that is told twice hits another route than it did, which a removal then takes along. So keys
// with several such events are in doubt, but not those that were only replaced.
func inDoubt(held [][]Event) map[Family]bool {
	doubt := map[Family]bool{}
	seen := map[Key]int{}
	each := func(f func(k Key, only bool)) {
		for _, batch := range held {
			for _, ev := range batch {
				switch ev := ev.(type) {
				case RouteSet:
					f(ev.Route.Key(), ev.Replace)
				case RouteGone:
					f(ev.Route.Key(), false)
				}
			}
		}
	}
	each(func(k Key, replaced bool) {
		if !replaced && !doubt[k.Family] {
			seen[k] = 0
		}
		if len(seen) > maxHeld {
			doubt[k.Family] = true
			clear(seen)
		}
	})
	if len(seen) == 0 {
		return doubt
	}
	each(func(k Key, _ bool) {
		if n, ok := seen[k]; ok {
			seen[k] = n + 1
			doubt[k.Family] = doubt[k.Family] || n > 0
		}
	})
	return doubt
}
