package routes

import (
	"net/netip"
	"slices"
	"sync"
)

// findings are those of a dump that is being taken. They take effect at its end, all at once, so that no reader sees half of it. Of
// the routes only those are held that the mirror does not have already; a destination with just the routes that the mirror has for it is
// marked there. So a dump that finds nothing new needs no memory.
//
//	found before the end   in the mirror        after the end
//	nothing                not marked           gone
//	the same               marked               as it is
//	something else         (not marked), other  other
type findings struct {
	scope  Scope
	facts  *facts // of a full dump, else nil
	mirror *store
	other  store
	// owned are the routes that the program itself has written or taken away meanwhile: what the dump finds of them may be older.
	owned map[Key]struct{}
	// alone are the sets of other that are one route, by it, as they were once.
	alone map[*Body]setNumber
}

// begin begins a dump. One that was not ended is given up.
func (f *FIB) begin(scope Scope) {
	f.giveUp()
	if f.marks {
		for _, t := range f.tables {
			t.rewrite(func(_ netip.Prefix, n setNumber, _ bool) (setNumber, bool) { return n, true })
		}
		f.marks = false
	}
	f.dump = &findings{scope: scope, mirror: &f.store, other: newStore(f.sets), alone: map[*Body]setNumber{}}
	if !scope.RoutesOnly {
		fresh := newFacts()
		f.dump.facts = &fresh
	}
}

func (f *FIB) giveUp() {
	if f.dump != nil {
		f.dump.other.release()
		f.dump, f.marks = nil, true
	}
}

// takes reports whether the event is an item of the dump. A partial one is of routes alone.
func (d *findings) takes(ev Event) bool {
	_, found := ev.(RouteSet)
	return found || d.facts != nil
}

// foundRoom is what RoutesFound were in, for others.
var foundRoom sync.Pool

// Done gives their memory back: nobody is to look at them any more.
func (f RoutesFound) Done() {
	clear(f.Routes)
	room := f.Routes[:0]
	foundRoom.Put(&room)
}

// roomFor is an empty list for as many routes.
func roomFor(n int) []Route {
	if room, ok := foundRoom.Get().(*[]Route); ok && cap(*room) >= n {
		return *room
	}
	return make([]Route, 0, n)
}

// found takes one of RoutesFound.
func (f *FIB) found(r Route) Effect {
	if f.dump != nil && f.dump.first(r) {
		return Effect{Changed: true}
	}
	ev := RouteSet{Route: r, Append: true}
	if f.dump != nil {
		return f.dump.apply(ev)
	}
	e, c := f.apply(ev)
	if e.Changed {
		f.note(c)
	}
	return e
}

// first takes a route of the first full dump, with nothing in the mirror, if it is the first to its destination: nearly all are. It does what
// apply does.
func (d *findings) first(r Route) bool {
	if d.facts == nil || d.mirror.n > 0 {
		return false
	}
	t := d.other.tables[r.tableKey()]
	if t == nil {
		return false
	}
	n, ok := d.alone[r.Body]
	if set := d.mirror.sets.at(n); !ok || set.uses == 0 || len(set.paths.bodies) != 1 || set.paths.bodies[0] != r.Body {
		if n, ok = d.mirror.sets.number(r.Body); !ok {
			return false
		}
		d.alone[r.Body] = n
	}
	if !t.add(r.Dst, n) {
		return false
	}
	d.mirror.sets.list[n].uses++
	d.other.n++
	return true
}

// apply takes an item.
func (d *findings) apply(ev Event) (e Effect) {
	switch ev := ev.(type) {
	case RouteSet:
		if !d.scope.shows(ev.Route.Body.Family) {
			return Effect{}
		}
		if len(d.owned) > 0 {
			if _, own := d.owned[ev.Route.Key()]; own {
				return Effect{}
			}
		}
		if d.confirm(ev.Route) {
			return Effect{Changed: d.facts != nil}
		}
		if d.facts == nil {
			d.collect(ev.Route)
			return Effect{}
		}
		ev.Append = true // a dump lists routes with one key in their order
		e, _ = setRoute(d, ev)
		return e
	case RouteGone:
		e, _ = removeRoute(d, ev.Route)
		return e
	}
	e, _ = d.facts.apply(ev)
	return e
}

// own takes what the program itself wrote, which is all that there is of its key. In a dump by device it counts where that shows it, or has
// shown what it replaces.
func (d *findings) own(ev Event) {
	switch ev := ev.(type) {
	case RouteSet:
		b := ev.Route.Body
		if d.scope.shows(b.Family) && (d.scope.covers(b) || d.get(ev.Route.tableKey(), ev.Route.Dst) != nil) {
			d.ownRoute(ev.Route, insertBody(d.others(ev.Route), b, false))
		}
	case RouteGone:
		if d.scope.shows(ev.Route.Body.Family) {
			d.ownRoute(ev.Route, d.others(ev.Route))
		}
	default:
		if d.facts != nil {
			d.facts.apply(ev)
		}
	}
}

func (d *findings) ownRoute(r Route, bodies []*Body) {
	if d.owned == nil {
		d.owned = map[Key]struct{}{}
	}
	d.owned[r.Key()] = struct{}{}
	d.replace(r.tableKey(), r.Dst, nil, bodies)
}

// others are the routes at a route's destination that were found and have another key.
func (d *findings) others(r Route) []*Body {
	return slices.DeleteFunc(slices.Clone(d.get(r.tableKey(), r.Dst)), r.Body.sameKey)
}

// confirm marks a destination that has this route alone, which the dump finds the first time.
func (d *findings) confirm(r Route) bool {
	k := r.tableKey()
	t := d.mirror.tables[k]
	if t == nil {
		return false
	}
	if o := d.other.tables[k]; o != nil {
		if _, _, found := o.get(r.Dst); found {
			return false
		}
	}
	n, ok := d.mirror.sets.number(r.Body)
	return ok && t.confirm(r.Dst, n)
}

// collect takes an item of a partial dump. One that is repeated brings what it has brought before again.
func (d *findings) collect(r Route) {
	k := r.tableKey()
	if old := d.get(k, r.Dst); !slices.ContainsFunc(old, r.Body.same) {
		d.replace(k, r.Dst, old, append(slices.Clone(old), r.Body))
	}
}

// get returns what the dump has found so far to a destination.
func (d *findings) get(k tableKey, dst netip.Prefix) []*Body {
	if bodies := d.other.get(k, dst); bodies != nil {
		return bodies
	}
	if t := d.mirror.tables[k]; t != nil {
		if n, marked, _ := t.get(dst); marked {
			return d.mirror.sets.paths(n).bodies
		}
	}
	return nil
}

func (d *findings) replace(k tableKey, dst netip.Prefix, _, bodies []*Body) {
	same := len(bodies) > 0 && slices.EqualFunc(d.mirror.get(k, dst), bodies, (*Body).same)
	if t := d.mirror.tables[k]; t != nil {
		t.mark(dst, same)
	}
	if same {
		bodies = nil
	}
	d.other.put(k, dst, bodies)
}

// keep holds what was found to a destination, before the mirror has something else there.
func (d *findings) keep(k tableKey, dst netip.Prefix) {
	if bodies := d.get(k, dst); bodies != nil {
		d.other.put(k, dst, bodies)
		if t := d.mirror.tables[k]; t != nil {
			t.mark(dst, false)
		}
	}
}

// shows reports whether a dump of the scope has routes of the family.
func (s Scope) shows(f Family) bool { return s.Family == 0 || s.Family == f }

// covers reports whether a dump of the scope has the route, if its family is shown.
func (s Scope) covers(b *Body) bool { return s.Oif == 0 || leavesBy(b, s.Oif) }

func (s Scope) coversAll(bodies []*Body) bool {
	return s.Oif == 0 || !slices.ContainsFunc(bodies, func(b *Body) bool { return !s.covers(b) })
}

// end lets a dump take effect.
func (f *FIB) end(scope Scope) (e Effect) {
	d := f.dump
	if d == nil || scope.RoutesOnly != (d.facts == nil) {
		return Effect{}
	}
	f.dump = nil
	var changed differences
	if d.facts != nil {
		e.Changed = true
		changed.all = f.stale || !f.facts.same(d.facts)
		if !changed.all { // what is equal keeps its pointers, by which others know it
			d.facts.links, d.facts.sorted, d.facts.rules, d.facts.nexthops = f.links, f.sorted, f.rules, f.nexthops
		}
		f.facts, f.stale = *d.facts, false
		f.devices = nil // made anew below
	}
	tell := func(k tableKey, dst netip.Prefix) {
		e.Changed = true
		changed.add(k, dst)
	}
	f.sweep(d, &e, tell)
	f.takeOther(d, &e, tell)
	if d.facts != nil {
		f.pack()
		f.indexAll()
	}
	changed.each(f.note)
	return e
}

// sweep takes out what a dump has not found, and takes all marks away.
func (f *FIB) sweep(d *findings, e *Effect, tell func(tableKey, netip.Prefix)) {
	for k, t := range f.tables {
		if !d.scope.shows(k.family) {
			continue
		}
		other := d.other.tables[k]
		t.rewrite(func(dst netip.Prefix, n setNumber, marked bool) (setNumber, bool) {
			bodies := f.sets.paths(n).bodies
			if marked {
				if !d.scope.coversAll(bodies) {
					e.doubt(k.family) // see next
				}
				return n, true
			}
			if !slices.ContainsFunc(bodies, d.scope.covers) {
				return n, true
			}
			if other != nil {
				if _, _, found := other.get(dst); found {
					return n, true
				}
			}
			left := slices.DeleteFunc(slices.Clone(bodies), d.scope.covers)
			f.n += len(left) - len(bodies)
			f.reindexed(dst, bodies, left)
			tell(k, dst)
			if len(left) == 0 {
				f.sets.drop(n)
				return 0, false
			}
			now := f.sets.use(left)
			f.sets.drop(n)
			return now, true
		})
		if t.size() == 0 {
			delete(f.tables, k)
		}
	}
}

// takeOther puts in place what a dump has found that the mirror did not have.
func (f *FIB) takeOther(d *findings, e *Effect, tell func(tableKey, netip.Prefix)) {
	anew := d.facts != nil && f.n == 0
	for k, t := range d.other.tables {
		if anew {
			t.all(func(dst netip.Prefix, _ setNumber) bool {
				tell(k, dst)
				return true
			})
			continue
		}
		t.all(func(dst netip.Prefix, n setNumber) bool {
			old := f.get(k, dst)
			next := d.next(k, old, f.sets.paths(n).bodies, e)
			if !slices.EqualFunc(old, next, (*Body).same) {
				f.replace(k, dst, old, next)
				tell(k, dst)
			}
			return true
		})
	}
	if anew {
		f.store = d.other
		return
	}
	d.other.release()
}

// next are the routes to a destination of which some were found.
func (d *findings) next(k tableKey, old, found []*Body, e *Effect) []*Body {
	next := slices.Clone(found)
	slices.SortStableFunc(next, before)
	for _, b := range old {
		switch {
		case d.scope.covers(b):
		case slices.ContainsFunc(found, b.sameKey):
			// Replaced by what was found, or an alias of it: only a dump of both tells.
			e.doubt(k.family)
		default:
			next = insertBody(next, b, false)
		}
	}
	return next
}

// join asks for another dump, too.
func (e *Effect) join(s *Scope) {
	switch {
	case s == nil:
	case e.Resync == nil:
		e.Resync = s
	case *e.Resync != *s:
		e.Resync = &Scope{RoutesOnly: true}
		if s.Family == e.Resync.Family {
			e.Resync.Family = s.Family
		}
	}
}

// doubt asks for a dump of the family.
func (e *Effect) doubt(family Family) {
	switch {
	case e.Resync == nil:
		e.Resync = &Scope{RoutesOnly: true, Family: family}
	case e.Resync.Family != family:
		e.Resync.Family = 0 // both families have such routes
	}
}
