package xfrmwatch

import (
	"cmp"
	"iter"
	"slices"
)

// DB mirrors the kernel's policies, SAs and default action from events. The zero value is
// ready. Applying an event costs the same with ten policies as with 100,000; the first ordered
// walk after a change costs one pass over all. A DB is not safe for concurrent use.
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
	cur      tables
	next     *tables // what a dump builds, nil outside of one
	loaded   bool    // a first dump was complete
	lost     bool
	version  uint64
	policies orderedPolicies
	sas      []*SA // in the order of SAs, nil when it must be sorted again
}

// NewDB returns an empty DB. It is stale until its first ResyncEnd.
func NewDB() *DB { return &DB{} }

// tables is one complete set of what the kernel holds.
type tables struct {
	policies map[PolicyIndex]policyEntry
	sas      saTable
	def      Default
	// ages counts up with each live event, dumpAges down with each item of a dump, since a
	// dump lists the newest first.
	ages, dumpAges int64
	newest         map[uint32]int64 // by priority, the highest age that was given out
}

type policyEntry struct {
	policy *Policy
	age    int64
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
		return db.counted(db.apply(&db.cur, ev))
	}
	if !dumped {
		changed = db.apply(&db.cur, ev)
	}
	db.apply(db.next, ev)
	return db.counted(changed)
}

// apply puts an event into one of the two sets.
func (db *DB) apply(t *tables, ev Event) (changed bool) {
	switch ev := ev.(type) {
	case PolicySet:
		return db.setPolicy(t, ev)
	case PolicyGone:
		if _, ok := t.policies[ev.Index]; !ok {
			return false
		}
		delete(t.policies, ev.Index)
		if t == &db.cur {
			db.policies.remove()
		}
		return true
	case DefaultSet:
		changed = t.def != ev.Default
		t.def = ev.Default
		return changed
	case SASet:
		changed = t.setSA(ev, &db.cur.sas)
	case SAGone:
		changed = t.sas.remove(ev.Key)
	case SADying:
		if sa := t.sas.byKey[ev.Key]; sa != nil && !sa.Dying {
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

// setPolicy stores a policy with its age. In a dump it takes over the old value where that is
// equal, so that a resync leaves the pointers of unchanged policies as they are.
func (db *DB) setPolicy(t *tables, ev PolicySet) bool {
	p := ev.Policy
	if p == nil {
		return false
	}
	if t.policies == nil {
		t.policies = make(map[PolicyIndex]policyEntry)
		t.newest = make(map[uint32]int64)
	}
	old, had := t.policies[p.Index]
	if ev.Dumped {
		if had { // a live event overtook the dump
			return false
		}
		t.dumpAges--
		t.policies[p.Index] = policyEntry{db.reuse(p), t.dumpAges}
		if n, ok := t.newest[p.Priority]; !ok || n < t.dumpAges {
			t.newest[p.Priority] = t.dumpAges
		}
		if t == &db.cur {
			db.policies.add(t.policies[p.Index])
		}
		return true
	}
	equal := had && old.policy.Equal(p)
	if equal && t.newest[p.Priority] == old.age {
		return false // already the youngest of its priority: nothing moves
	}
	if equal {
		p = old.policy
	} else {
		p = db.reuse(p)
	}
	t.ages++
	t.policies[p.Index] = policyEntry{p, t.ages}
	t.newest[p.Priority] = t.ages
	if t == &db.cur {
		if had {
			db.policies.remove()
		}
		db.policies.add(t.policies[p.Index])
	}
	return true
}

// reuse returns the policy that is visible now where it equals p, else p.
func (db *DB) reuse(p *Policy) *Policy {
	if old, ok := db.cur.policies[p.Index]; ok && old.policy.Equal(p) {
		return old.policy
	}
	return p
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

// swap makes the fresh set the visible one and says whether that changed anything.
func (db *DB) swap() bool {
	if db.next == nil {
		return false
	}
	old, fresh := db.cur, *db.next
	oldOrder := db.policies.get(&old)
	db.cur, db.next = fresh, nil
	db.loaded, db.lost = true, false
	db.policies = orderedPolicies{}
	db.sas = nil
	samePolicies := slices.EqualFunc(oldOrder, db.policies.get(&db.cur), func(a, b policyEntry) bool {
		return a.policy == b.policy // equal values share a pointer, see reuse
	})
	return !samePolicies || old.def != fresh.def || !old.sas.equal(&fresh.sas)
}

// Policy returns the policy with that index.
func (db *DB) Policy(index PolicyIndex) (*Policy, bool) {
	e, ok := db.cur.policies[index]
	return e.policy, ok
}

// PolicyCount is the number of policies.
func (db *DB) PolicyCount() int { return len(db.cur.policies) }

// SACount is the number of SAs, larval ones included.
func (db *DB) SACount() int { return len(db.cur.sas.byKey) }

// Policies yields all policies of all directions, in the kernel's precedence: lower priority
// number first, of equal ones the one that was set first. The DB must not change meanwhile.
func (db *DB) Policies() iter.Seq[*Policy] {
	return func(yield func(*Policy) bool) {
		for _, e := range db.policies.get(&db.cur) {
			if !yield(e.policy) {
				return
			}
		}
	}
}

// Precedes says whether the kernel looks at a before it looks at b, for two policies that the
// DB holds: lower priority number first, of equal ones the one that was set first.
func (db *DB) Precedes(a, b *Policy) bool {
	if a.Priority != b.Priority {
		return a.Priority < b.Priority
	}
	return db.cur.policies[a.Index].age < db.cur.policies[b.Index].age
}

// SA returns the SA with that key.
func (db *DB) SA(key SAKey) (*SA, bool) {
	sa, ok := db.cur.sas.byKey[key]
	return sa, ok
}

// SAs yields all SAs, sorted by destination, protocol, SPI and mark.
func (db *DB) SAs() iter.Seq[*SA] {
	return func(yield func(*SA) bool) {
		if db.sas == nil {
			db.sas = make([]*SA, 0, len(db.cur.sas.byKey))
			for _, sa := range db.cur.sas.byKey {
				db.sas = append(db.sas, sa)
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

// orderedPolicies keeps policies in precedence order, lazily: changes are collected and merged
// by the next reader, in one pass.
type orderedPolicies struct {
	sorted  []policyEntry
	added   []policyEntry
	removed bool
}

func (o *orderedPolicies) add(e policyEntry) { o.added = append(o.added, e) }

func (o *orderedPolicies) remove() { o.removed = true }

func comparePolicies(a, b policyEntry) int {
	return cmp.Or(cmp.Compare(a.policy.Priority, b.policy.Priority), cmp.Compare(a.age, b.age))
}

func (o *orderedPolicies) get(t *tables) []policyEntry {
	if o.sorted == nil && len(t.policies) > 0 {
		o.sorted = make([]policyEntry, 0, len(t.policies))
		for _, e := range t.policies {
			o.sorted = append(o.sorted, e)
		}
		slices.SortFunc(o.sorted, comparePolicies)
		o.added, o.removed = nil, false
		return o.sorted
	}
	live := func(e policyEntry) bool { return t.policies[e.policy.Index] == e }
	if o.removed {
		o.sorted = slices.DeleteFunc(o.sorted, func(e policyEntry) bool { return !live(e) })
		o.added = slices.DeleteFunc(o.added, func(e policyEntry) bool { return !live(e) })
		o.removed = false
	}
	if len(o.added) > 0 {
		slices.SortFunc(o.added, comparePolicies)
		merged := make([]policyEntry, 0, len(o.sorted)+len(o.added))
		i := 0
		for _, e := range o.added {
			n, _ := slices.BinarySearchFunc(o.sorted[i:], e, comparePolicies)
			merged = append(append(merged, o.sorted[i:i+n]...), e)
			i += n
		}
		o.sorted = append(merged, o.sorted[i:]...)
		o.added = nil
	}
	return o.sorted
}

// Equal says whether two SAs are the same in all that the kernel told.
func (s *SA) Equal(o *SA) bool { return s == o || *s == *o }
