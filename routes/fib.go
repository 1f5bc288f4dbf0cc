package routes

import (
	"iter"
	"maps"
	"net/netip"
	"slices"
)

// FIB mirrors the routing state of one network namespace from the events of a Watcher. The
// zero value is not usable; call NewFIB. A FIB is not safe for concurrent use.
type FIB struct {
	facts
	store
	devices map[Ifindex]*deviceRoutes
	dump    *findings      // that is being taken, or nil
	marks   bool           // a dump that was not ended has left marks
	stale   bool           // events were lost, or no full dump has ended yet
	vers    uint64         // counts changes
	dirty   []func(Change) // told of each change
}

// Change says what an event changed, for those who keep something derived from the FIB. Only
// the fields of what changed are set.
type Change struct {
	Family Family
	Dst    netip.Prefix // of a route
	Table  TableID      // which that route is in
	// Protocol is that of all routes at Dst in the table, before and after, 0 if they differ or that was not looked at.
	Protocol Protocol
	// New is the route that came, changed or went, nil where it may be any; Old are those that were at Dst in the table.
	New  *Body
	Old  []*Body
	Link Ifindex
	Addr bool  // only an address of the link
	Rule *Rule // only this rule came or went, of All
	All  bool  // rules, nexthop objects, a resync: anything may differ
}

// Effect is what an event did to the mirror.
type Effect struct {
	Changed bool
	// Resync is a dump that has to be taken because the event did not say enough, or nil.
	Resync *Scope
}

type tableKey struct {
	family Family
	id     TableID
}

// facts are all but routes that a full dump replaces.
type facts struct {
	links    map[Ifindex]*Link
	sorted   []*Link // links in order, nil when that is to be made anew
	addrs    map[Ifindex]map[netip.Prefix]struct{}
	rules    map[Family][]*Rule
	twice    map[Rule]struct{} // rules that were told while they were known
	nexthops map[uint32]*NexthopObject
}

func newFacts() facts {
	return facts{
		links:    map[Ifindex]*Link{},
		addrs:    map[Ifindex]map[netip.Prefix]struct{}{},
		rules:    map[Family][]*Rule{},
		twice:    map[Rule]struct{}{},
		nexthops: map[uint32]*NexthopObject{},
	}
}

// NewFIB returns an empty, stale mirror.
func NewFIB() *FIB {
	return &FIB{facts: newFacts(), store: newStore(new(routeSets)), devices: map[Ifindex]*deviceRoutes{}, stale: true}
}

// OnChange has fn called for each change of the mirror, from within Apply and Own, after those that asked for it before.
func (f *FIB) OnChange(fn func(Change)) { f.dirty = append(f.dirty, fn) }

// Stale reports whether events were lost and no full dump has ended since. What a stale mirror
// lacks proves nothing.
func (f *FIB) Stale() bool { return f.stale }

// Version counts the changes of the mirror.
func (f *FIB) Version() uint64 { return f.vers }

// Len is the number of routes of all tables.
func (f *FIB) Len() int { return f.store.n }

// Apply takes one event.
func (f *FIB) Apply(ev Event) Effect {
	var e Effect
	switch ev := ev.(type) {
	case Lost:
		e.Changed = !f.stale
		f.stale = true
		f.giveUp()
	case ResyncBegin:
		f.begin(ev.Scope)
	case ResyncEnd:
		e = f.end(ev.Scope)
	case RoutesFound:
		for _, r := range ev.Routes {
			one := f.found(r)
			e.Changed = e.Changed || one.Changed
			e.join(one.Resync)
		}
	default:
		if f.dump != nil && f.dump.takes(ev) {
			e = f.dump.apply(ev)
			break
		}
		var c Change
		if e, c = f.apply(ev); e.Changed {
			f.note(c)
		}
	}
	if e.Changed {
		f.vers++
	}
	return e
}

// Own takes what the program itself has just written and the kernel confirmed: it holds at once,
// also in the middle of a dump, which may have passed by it already.
func (f *FIB) Own(ev Event) Effect {
	e, c := f.apply(ev)
	if f.dump != nil {
		f.dump.own(ev)
	}
	if e.Changed {
		f.vers++
		f.note(c)
	}
	return e
}

func (f *FIB) note(c Change) {
	for _, fn := range f.dirty {
		fn(c)
	}
}

// apply changes the mirror.
func (f *FIB) apply(ev Event) (Effect, Change) {
	switch ev := ev.(type) {
	case RouteSet:
		e, old := setRoute(f, ev)
		return e, changeOf(ev.Route, old)
	case RouteGone:
		e, old := removeRoute(f, ev.Route)
		return e, changeOf(ev.Route, old)
	}
	return f.facts.apply(ev)
}

// apply takes an event of anything but routes.
func (s *facts) apply(ev Event) (Effect, Change) {
	switch ev := ev.(type) {
	case LinkSet:
		old, l := s.links[ev.Link.Index], ev.Link
		if old != nil && old.MTU != l.MTU && l.MTU6 != 0 {
			// IPv6's own MTU becomes the device's when that changes, but only after the event was
			// sent (addrconf_notify, NETDEV_CHANGEMTU, net/ipv6/addrconf.c).
			same := *l
			same.MTU6 = 0
			l = &same
		}
		s.links[l.Index], s.sorted = l, nil
		return Effect{Changed: old == nil || *old != *l}, Change{Link: l.Index}
	case LinkGone:
		_, had := s.links[ev.Index]
		delete(s.links, ev.Index)
		s.sorted = nil
		delete(s.addrs, ev.Index)
		return Effect{Changed: had}, Change{Link: ev.Index}
	case AddrSet:
		m := s.addrs[ev.Addr.Ifindex]
		if m == nil {
			m = map[netip.Prefix]struct{}{}
			s.addrs[ev.Addr.Ifindex] = m
		}
		_, had := m[ev.Addr.Prefix]
		m[ev.Addr.Prefix] = struct{}{}
		return Effect{Changed: !had}, Change{Link: ev.Addr.Ifindex, Addr: true}
	case AddrGone:
		_, had := s.addrs[ev.Addr.Ifindex][ev.Addr.Prefix]
		if delete(s.addrs[ev.Addr.Ifindex], ev.Addr.Prefix); len(s.addrs[ev.Addr.Ifindex]) == 0 {
			delete(s.addrs, ev.Addr.Ifindex)
		}
		return Effect{Changed: had}, Change{Link: ev.Addr.Ifindex, Addr: true}
	case RuleSet:
		return Effect{Changed: s.addRule(ev.Rule)}, Change{Rule: ev.Rule, All: true}
	case RuleGone:
		return s.removeRule(ev.Rule), Change{Rule: ev.Rule, All: true}
	case NexthopSet:
		s.nexthops[ev.Nexthop.ID] = ev.Nexthop
		return Effect{Changed: true}, Change{All: true}
	case NexthopGone:
		_, had := s.nexthops[ev.ID]
		delete(s.nexthops, ev.ID)
		return Effect{Changed: had}, Change{All: true}
	}
	return Effect{}, Change{}
}

// changeOf is the change of a route. old are those that were at its destination.
func changeOf(r Route, old []*Body) Change {
	c := Change{Family: r.Body.Family, Dst: r.Dst, Table: r.Body.Table, Protocol: r.Body.Protocol, New: r.Body, Old: old}
	for _, b := range old {
		if b.Protocol != c.Protocol {
			c.Protocol = 0
		}
	}
	return c
}

// addRule inserts a rule after all rules of the same priority, as the kernel does
// (fib_nl_newrule, net/core/fib_rules.c).
func (s *facts) addRule(r *Rule) bool {
	rules := s.rules[r.Family]
	for _, have := range rules {
		if *have == *r {
			s.twice[*r] = struct{}{}
			return false
		}
	}
	i := len(rules)
	for i > 0 && rules[i-1].Priority > r.Priority {
		i--
	}
	s.rules[r.Family] = slices.Insert(slices.Clone(rules), i, r)
	return true
}

// removeRule takes out a rule. One that was told twice may be there twice, as the kernel adds a rule again
// without NLM_F_EXCL: only a dump tells whether one is left.
func (s *facts) removeRule(r *Rule) (e Effect) {
	if _, ok := s.twice[*r]; ok {
		delete(s.twice, *r)
		e.Resync = &Scope{}
	}
	rules := s.rules[r.Family]
	if i := slices.IndexFunc(rules, func(have *Rule) bool { return *have == *r }); i >= 0 {
		s.rules[r.Family] = slices.Delete(slices.Clone(rules), i, i+1)
		e.Changed = true
	}
	return e
}

// replace puts the routes to one destination in place and keeps the index.
func (f *FIB) replace(k tableKey, dst netip.Prefix, old, bodies []*Body) {
	if f.dump != nil {
		f.dump.keep(k, dst)
	}
	f.put(k, dst, bodies)
	f.reindexed(dst, old, bodies)
}

// Links returns all devices in the order of their indexes. The slice is not to be changed.
func (f *FIB) Links() []*Link {
	if f.sorted == nil {
		f.sorted = make([]*Link, 0, len(f.links))
		for _, i := range slices.Sorted(maps.Keys(f.links)) {
			f.sorted = append(f.sorted, f.links[i])
		}
	}
	return f.sorted
}

// LinkCount is the number of devices.
func (f *FIB) LinkCount() int { return len(f.links) }

// Link returns a device, or nil.
func (f *FIB) Link(i Ifindex) *Link { return f.links[i] }

// LinkByName returns a device by its name, or nil.
func (f *FIB) LinkByName(name string) *Link {
	for _, l := range f.links {
		if l.Name == name {
			return l
		}
	}
	return nil
}

// Nexthops returns all nexthop objects in the order of their ids.
func (f *FIB) Nexthops() []*NexthopObject {
	out := make([]*NexthopObject, 0, len(f.nexthops))
	for _, id := range slices.Sorted(maps.Keys(f.nexthops)) {
		out = append(out, f.nexthops[id])
	}
	return out
}

// Nexthop returns a nexthop object, or nil.
func (f *FIB) Nexthop(id uint32) *NexthopObject { return f.nexthops[id] }

// ObjectWays are the ways of a nexthop object, in the order of its members. It is false where the
// object, or a member of the group, is not known.
func (f *FIB) ObjectWays(id uint32) ([]Nexthop, bool) {
	o := f.nexthops[id]
	if o == nil {
		return nil, false
	}
	if len(o.Group) == 0 {
		return []Nexthop{{Oif: o.Oif, Gateway: o.Gateway}}, true
	}
	var out []Nexthop
	for _, m := range o.Group {
		one := f.nexthops[m.ID]
		if one == nil || m.Weight > 0xff { // wider than rtnh_hops
			return nil, false
		}
		out = append(out, Nexthop{Oif: one.Oif, Gateway: one.Gateway, Weight: uint8(m.Weight)})
	}
	return out, true
}

// Addrs returns the addresses of a device in no particular order.
func (f *FIB) Addrs(i Ifindex) iter.Seq[netip.Prefix] { return maps.Keys(f.addrs[i]) }

// Rules returns the rules of a family in the order in which the kernel looks at them. The
// slice is not to be changed.
func (f *FIB) Rules(fam Family) []*Rule { return f.rules[fam] }

// Get returns the route with the key that a replace would hit, and how many there are.
func (f *FIB) Get(k Key) (first Route, n int) {
	for _, b := range f.get(tableKey{k.Family, k.Table}, k.Dst) {
		if r := (Route{k.Dst, b}); r.Key() == k {
			if n == 0 {
				first = r
			}
			n++
		}
	}
	return first, n
}

// At returns the routes to exactly one destination, of all tables in no particular order.
func (f *FIB) At(dst netip.Prefix) iter.Seq[Route] {
	fam := FamilyOf(dst.Addr())
	return func(yield func(Route) bool) {
		for k := range f.tables {
			if k.family != fam {
				continue
			}
			for _, b := range f.get(k, dst) {
				if !yield(Route{dst, b}) {
					return
				}
			}
		}
	}
}

// Table returns all routes of one table, in no particular order.
func (f *FIB) Table(fam Family, id TableID) iter.Seq[Route] {
	return func(yield func(Route) bool) { f.routes(tableKey{fam, id}, yield) }
}

// Tables returns the tables that hold routes of the family, in order.
func (f *FIB) Tables(fam Family) []TableID {
	var ids []TableID
	for k := range f.tables {
		if k.family == fam {
			ids = append(ids, k.id)
		}
	}
	slices.Sort(ids)
	return ids
}
