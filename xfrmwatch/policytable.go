package xfrmwatch

import (
	"iter"
	"slices"

	"tsoagent/index"
)

// policyTable holds policies by index, and in the kernel's precedence: one list for each
// priority, oldest first. Sets and deletes cost the same however many there are.
type policyTable struct {
	byIndex index.Shrinking[PolicyIndex, *policyNode]
	lists   map[uint32]*policyList
	// priorities are the keys of lists in order; nil after one came or went.
	priorities []uint32
	// clock counts up with each live event and dumpClock down with each dumped policy.
	clock, dumpClock int64
}

type policyNode struct {
	policy     *Policy
	age        int64 // smaller is older
	prev, next *policyNode
}

type policyList struct{ first, last *policyNode }

// list returns the list of a priority, which it makes if need be.
func (t *policyTable) list(priority uint32) *policyList {
	if t.lists == nil {
		t.lists = make(map[uint32]*policyList)
	}
	l := t.lists[priority]
	if l == nil {
		l = new(policyList)
		t.lists[priority] = l
		t.priorities = nil
	}
	return l
}

// pushNewest makes p the youngest of its priority; it is not in the table.
func (t *policyTable) pushNewest(p *Policy) {
	l := t.list(p.Priority)
	t.clock++
	n := &policyNode{policy: p, age: t.clock, prev: l.last}
	if l.last == nil {
		l.first = n
	} else {
		l.last.next = n
	}
	l.last = n
	t.byIndex.Set(p.Index, n)
}

// pushOldest makes p the oldest of its priority; it is not in the table.
func (t *policyTable) pushOldest(p *Policy) {
	l := t.list(p.Priority)
	t.dumpClock--
	n := &policyNode{policy: p, age: t.dumpClock, next: l.first}
	if l.first == nil {
		l.last = n
	} else {
		l.first.prev = n
	}
	l.first = n
	t.byIndex.Set(p.Index, n)
}

func (t *policyTable) remove(index PolicyIndex) bool {
	n := t.byIndex.Map[index]
	if n == nil {
		return false
	}
	t.byIndex.Delete(index)
	l := t.lists[n.policy.Priority]
	if n.prev == nil {
		l.first = n.next
	} else {
		n.prev.next = n.next
	}
	if n.next == nil {
		l.last = n.prev
	} else {
		n.next.prev = n.prev
	}
	if l.first == nil {
		delete(t.lists, n.policy.Priority)
		t.priorities = nil
	}
	return true
}

// all yields the policies in precedence order.
func (t *policyTable) all() iter.Seq[*Policy] {
	return func(yield func(*Policy) bool) {
		if t.priorities == nil {
			t.priorities = make([]uint32, 0, len(t.lists))
			for priority := range t.lists {
				t.priorities = append(t.priorities, priority)
			}
			slices.Sort(t.priorities)
		}
		for _, priority := range t.priorities {
			for n := t.lists[priority].first; n != nil; n = n.next {
				if !yield(n.policy) {
					return
				}
			}
		}
	}
}

// same says whether both hold the same pointers in the same order.
func (t *policyTable) same(o *policyTable) bool {
	if len(t.byIndex.Map) != len(o.byIndex.Map) || len(t.lists) != len(o.lists) {
		return false
	}
	for priority, l := range t.lists {
		other := o.lists[priority]
		if other == nil {
			return false
		}
		n, m := l.first, other.first
		for ; n != nil && m != nil; n, m = n.next, m.next {
			if n.policy != m.policy {
				return false
			}
		}
		if n != m {
			return false
		}
	}
	return true
}

// setPolicy stores a policy with its age. visible is the table that readers see: what is equal
// there is taken over, so that a resync leaves the pointers of unchanged policies as they are.
func (t *policyTable) setPolicy(ev PolicySet, visible *policyTable) bool {
	p := ev.Policy
	if p == nil {
		return false
	}
	old := t.byIndex.Map[p.Index]
	equal := old != nil && old.policy.Equal(p)
	switch {
	case ev.Dumped && old != nil:
		return false // a live event overtook the dump
	case equal && old.next == nil:
		return false // the youngest of its priority already: nothing moves
	case equal:
		p = old.policy
	default:
		if seen := visible.byIndex.Map[p.Index]; seen != nil && seen.policy.Equal(p) {
			p = seen.policy
		}
	}
	if ev.Dumped {
		t.pushOldest(p)
		return true
	}
	if old != nil {
		t.remove(p.Index)
	}
	t.pushNewest(p)
	return true
}
