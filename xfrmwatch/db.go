package xfrmwatch

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
)

// DB mirrors the kernel's policies, SAs and default action from events. The zero value is
// ready. Applying an event costs the same with ten policies as with 100,000, and a walk in
// precedence order needs no sorting but that of the priorities. A DB is not safe for concurrent
// use.
//
// Precedence. The kernel takes the matching policy with the lowest priority number, and of
// equal ones the one with the lowest pos (__xfrm_policy_eval_candidates,
// net/xfrm/xfrm_policy.c). pos is given when a policy is linked, so it is the age of its last
// set: an update (UPDPOLICY) keeps the index yet makes the policy the youngest. The index says
// nothing about the order. pos is not told, but a dump lists the newest first and events come in
// order, and from these two the DB numbers the ages. One case stays invisible: inside one hash
// chain (equal priority, overlapping selectors that are both exact, both wildcards, or wildcard
// on the same side) an update keeps the place in the chain that the old version had, until the
// kernel rebuilds the chain by pos (xfrm_policy_insert_list, xfrm_policy_inexact_list_reinsert).
type DB struct {
	cur     tables
	next    *tables // what a dump builds, nil outside of one
	loaded  bool    // a first dump was complete
	lost    bool
	version uint64
	sas     []*SA // in the order of SAs, nil when it must be sorted again
	tell    func(Change)
}

// Change says what an event changed, for those who keep something derived from a DB. Only the fields of what
// changed are set.
type Change struct {
	All    bool        // anything may differ
	Policy PolicyIndex // it came, went, changed or changed places
	SA     SAPlace     // where one came, went or changed; the zero value for none
}

// SAPlace is where templates find SAs. Those that take the flow's own addresses find them by the reqid alone.
type SAPlace struct {
	Dst   netip.Addr
	Reqid Reqid
}

// OnChange has fn called for each change of what the DB holds, from within Apply.
func (db *DB) OnChange(fn func(Change)) { db.tell = fn }

// NewDB returns an empty DB. It is stale until its first ResyncEnd.
func NewDB() *DB { return &DB{} }

// tables is one complete set of what the kernel holds.
type tables struct {
	policies policyTable
	sas      saTable
	def      Default
}

// Stale says that what the DB holds may not be what the kernel has: before the first complete
// dump, and from Lost to the next ResyncEnd.
func (db *DB) Stale() bool { return db.lost || !db.loaded }

// Version counts the changes. Two equal values mean that nothing changed in between.
func (db *DB) Version() uint64 { return db.version }

// Default is the namespace's default action.
func (db *DB) Default() Default { return db.cur.def }

// Apply takes one event and says whether what the DB holds changed. Between ResyncBegin and
// ResyncEnd a fresh set is built from all events beside the old one, which readers see until
// ResyncEnd; what did not come from the dump itself takes effect in the old one too, at once. A
// second ResyncBegin starts the fresh set again. An event that sets an equal value is no change,
// unless it makes the policy younger than another one of its priority.
func (db *DB) Apply(ev Event) (changed bool) {
	dumped := false
	switch ev := ev.(type) {
	case Lost:
		db.lost = true
		return false
	case ResyncBegin:
		db.next = &tables{}
		return false
	case ResyncEnd:
		return db.counted(db.swap())
	case PolicySet:
		dumped = ev.Dumped
	case SASet:
		dumped = ev.Dumped
	}
	if db.next == nil {
		return db.counted(db.applied(ev))
	}
	if !dumped {
		changed = db.applied(ev)
	}
	db.apply(db.next, ev)
	return db.counted(changed)
}

// applied puts an event into what readers see, and tells of it.
func (db *DB) applied(ev Event) (changed bool) {
	places := db.touched(ev)
	changed = db.apply(&db.cur, ev)
	if !changed || db.tell == nil {
		return changed
	}
	for _, at := range append(places, db.touched(ev)...) {
		db.tell(Change{SA: at})
	}
	switch ev := ev.(type) {
	case PolicySet:
		db.tell(Change{Policy: ev.Policy.Index})
	case PolicyGone:
		db.tell(Change{Policy: ev.Index})
	case DefaultSet:
		db.tell(Change{All: true})
	}
	return changed
}

// touched are where the SAs are that an event is about, as they are now.
func (db *DB) touched(ev Event) []SAPlace {
	var keys []SAKey
	switch ev := ev.(type) {
	case SASet:
		if ev.SA != nil { // it can take the place of a larval one
			larval := ev.SA.Key
			larval.SPI = 0
			keys = []SAKey{ev.SA.Key, larval}
		}
	case SAGone:
		keys = []SAKey{ev.Key}
	case SADying:
		keys = []SAKey{ev.Key}
	}
	var out []SAPlace
	for _, k := range keys {
		if sa := db.cur.sas.byKey.Map[k].SA; sa != nil {
			out = append(out, SAPlace{sa.Dst, sa.Reqid})
		}
	}
	return out
}

// apply puts an event into one of the two sets.
func (db *DB) apply(t *tables, ev Event) (changed bool) {
	switch ev := ev.(type) {
	case PolicySet:
		return t.policies.setPolicy(ev, &db.cur.policies)
	case PolicyGone:
		return t.policies.remove(ev.Index)
	case DefaultSet:
		changed = t.def != ev.Default
		t.def = ev.Default
		return changed
	case SASet:
		changed = t.setSA(ev, &db.cur.sas)
	case SAGone:
		changed = t.sas.remove(ev.Key)
	case SADying:
		if sa := t.sas.byKey.Map[ev.Key].SA; sa != nil && !sa.Dying {
			dying := *sa
			dying.Dying = true
			t.sas.put(&dying)
			changed = true
		}
	}
	if changed && t == &db.cur {
		db.sas = nil
	}
	return changed
}

func (db *DB) counted(changed bool) bool {
	if changed {
		db.version++
	}
	return changed
}

// Equal says whether two policies are the same in all that the kernel told.
func (p *Policy) Equal(q *Policy) bool {
	if p == q {
		return true
	}
	return p.Index == q.Index && p.Dir == q.Dir && p.Sub == q.Sub && p.Action == q.Action &&
		p.Priority == q.Priority && p.Selector == q.Selector && p.Mark == q.Mark &&
		p.IfID == q.IfID && p.OffloadDev == q.OffloadDev && p.OffloadFlag == q.OffloadFlag &&
		p.Flags == q.Flags && slices.Equal(p.Templates, q.Templates)
}

// swap makes the fresh set the visible one and says whether that changed anything. Equal policies
// share their pointers in both (see policyTable.setPolicy).
func (db *DB) swap() bool {
	if db.next == nil {
		return false
	}
	old, fresh := db.cur, *db.next
	first := !db.loaded
	db.cur, db.next = fresh, nil
	db.loaded, db.lost = true, false
	db.sas = nil
	changed := true
	if old.policies.same(&fresh.policies) {
		db.cur.policies = old.policies // with the ages that are known
		changed = old.def != fresh.def || !old.sas.equal(&fresh.sas)
	}
	if db.tell != nil && (changed || first) {
		db.tell(Change{All: true})
	}
	return changed
}

// Policy returns the policy with that index.
func (db *DB) Policy(index PolicyIndex) (*Policy, bool) {
	if n := db.cur.policies.byIndex.Map[index]; n != nil {
		return n.policy, true
	}
	return nil, false
}

// Age orders the policies of one priority: the kernel looks at the one with the smaller age first. It is 0
// for a policy that is not there, and another one after a dump.
func (db *DB) Age(index PolicyIndex) int64 {
	if n := db.cur.policies.byIndex.Map[index]; n != nil {
		return n.age
	}
	return 0
}

// PolicyCount is the number of policies.
func (db *DB) PolicyCount() int { return len(db.cur.policies.byIndex.Map) }

// SACount is the number of SAs, larval ones included.
func (db *DB) SACount() int { return len(db.cur.sas.byKey.Map) }

// Policies yields all policies of all directions, in the kernel's precedence: lower priority
// number first, of equal ones the one that was set first. The DB must not change meanwhile.
func (db *DB) Policies() iter.Seq[*Policy] { return db.cur.policies.all() }

// Precedes says whether the kernel looks at a before it looks at b, for two policies that the
// DB holds: lower priority number first, of equal ones the one that was set first.
func (db *DB) Precedes(a, b *Policy) bool {
	if a.Priority != b.Priority {
		return a.Priority < b.Priority
	}
	na, nb := db.cur.policies.byIndex.Map[a.Index], db.cur.policies.byIndex.Map[b.Index]
	return na != nil && nb != nil && na.age < nb.age
}

// SA returns the SA with that key.
func (db *DB) SA(key SAKey) (*SA, bool) {
	held, ok := db.cur.sas.byKey.Map[key]
	return held.SA, ok
}

// SAs yields all SAs, sorted by destination, protocol, SPI and mark.
func (db *DB) SAs() iter.Seq[*SA] {
	return func(yield func(*SA) bool) {
		if db.sas == nil {
			db.sas = make([]*SA, 0, len(db.cur.sas.byKey.Map))
			for _, sa := range db.cur.sas.byKey.Map {
				db.sas = append(db.sas, sa.SA)
			}
			slices.SortFunc(db.sas, func(a, b *SA) int { return a.Key.compare(b.Key) })
		}
		for _, sa := range db.sas {
			if !yield(sa) {
				return
			}
		}
	}
}

func (k SAKey) compare(o SAKey) int {
	return cmp.Or(k.Dst.Compare(o.Dst), cmp.Compare(k.Proto, o.Proto), cmp.Compare(k.SPI, o.SPI),
		cmp.Compare(k.Mark.Value, o.Mark.Value), cmp.Compare(k.Mark.Mask, o.Mark.Mask))
}

// Equal says whether two SAs are the same in all that the kernel told.
func (s *SA) Equal(o *SA) bool { return s == o || *s == *o }
