package routes

import (
	"iter"
	"maps"
	"net/netip"
	"slices"
)

// deviceRoutes indexes the unicast routes of one device. A device with more than
// maxIndexedRoutes routes that is no tunnel counts them only: such a device is always shared.
type deviceRoutes struct {
	keys map[Key]int
	n    int
}

const maxIndexedRoutes = 4096

// leaving yields the devices that a unicast route leaves by.
func (b *Body) leaving() iter.Seq[Ifindex] {
	return func(yield func(Ifindex) bool) {
		if b.Type != Unicast {
			return
		}
		for i, nh := range b.Nexthops {
			if !slices.ContainsFunc(b.Nexthops[:i], func(o Nexthop) bool { return o.Oif == nh.Oif }) && !yield(nh.Oif) {
				return
			}
		}
	}
}

// reindexed brings the index up to other routes to a destination. It does nothing while a full dump ends, after which the
// index is made anew.
func (f *FIB) reindexed(dst netip.Prefix, old, bodies []*Body) {
	if f.devices == nil {
		return
	}
	for _, b := range old {
		if !slices.Contains(bodies, b) {
			f.index(Route{dst, b}, -1)
		}
	}
	for _, b := range bodies {
		if !slices.Contains(old, b) {
			f.index(Route{dst, b}, 1)
		}
	}
}

func (f *FIB) index(r Route, by int) {
	for i := range r.Body.leaving() {
		d := f.devices[i]
		if d == nil {
			d = &deviceRoutes{keys: map[Key]int{}}
			f.devices[i] = d
		}
		d.n += by
		switch {
		case d.n <= 0:
			delete(f.devices, i)
		case d.keys == nil || !f.indexes(i, d.n):
			d.keys = nil
		default:
			d.count(r.Key(), by)
		}
	}
}

// indexes reports whether the keys of so many routes of a device are kept.
func (f *FIB) indexes(i Ifindex, n int) bool { return n <= maxIndexedRoutes || f.links[i].Tunnel() }

func (d *deviceRoutes) count(k Key, by int) {
	if d.keys[k] += by; d.keys[k] <= 0 {
		delete(d.keys, k)
	}
}

// indexAll makes the index anew. Of the very many routes of a device that is not indexed only their few sets are looked at.
func (f *FIB) indexAll() {
	f.devices = map[Ifindex]*deviceRoutes{}
	for _, set := range f.sets.list {
		for _, b := range set.paths.Bodies() {
			for i := range b.leaving() {
				if f.devices[i] == nil {
					f.devices[i] = &deviceRoutes{}
				}
				f.devices[i].n += int(set.uses)
			}
		}
	}
	for i, d := range f.devices {
		if f.indexes(i, d.n) {
			d.keys = make(map[Key]int, d.n)
		}
	}
	indexed := make([]bool, len(f.sets.list)) // the sets with a route of an indexed device
	for n, set := range f.sets.list {
		for _, b := range set.paths.Bodies() {
			for i := range b.leaving() {
				indexed[n] = indexed[n] || f.devices[i].keys != nil
			}
		}
	}
	for _, t := range f.tables {
		t.all(func(dst netip.Prefix, n setNumber) bool {
			if indexed[n] {
				f.indexSet(dst, f.sets.paths(n).bodies)
			}
			return true
		})
	}
}

func (f *FIB) indexSet(dst netip.Prefix, bodies []*Body) {
	for _, b := range bodies {
		for i := range b.leaving() {
			if d := f.devices[i]; d.keys != nil {
				d.count(Route{dst, b}.Key(), 1)
			}
		}
	}
}

// DeviceRoutes returns the keys of the unicast routes that leave by the device, in order, and
// how many there are. The keys are nil where there are too many to be indexed.
func (f *FIB) DeviceRoutes(i Ifindex) (keys []Key, n int) {
	d := f.devices[i]
	if d == nil {
		return nil, 0
	}
	if d.keys == nil {
		return nil, d.n
	}
	return slices.SortedFunc(maps.Keys(d.keys), Key.Compare), d.n
}

// LeavingBy yields the keys of DeviceRoutes in no particular order, without looking at more than are taken. It is false
// where there are too many to be indexed.
func (f *FIB) LeavingBy(i Ifindex) (keys iter.Seq[Key], indexed bool) {
	d := f.devices[i]
	if d == nil {
		return maps.Keys[map[Key]int](nil), true
	}
	return maps.Keys(d.keys), d.keys != nil
}
