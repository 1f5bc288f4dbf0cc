package routes

import (
	"iter"
	"net/netip"
	"slices"
)

// deviceRoutes indexes the unicast routes of one device. A device with more than
// maxIndexedRoutes routes that is no tunnel counts them only: such a device is always shared.
type deviceRoutes struct {
	n       int // routes
	indexed bool
	// few are the keys of those that are indexed, each as often as it has routes; from fewKeys on they are counted in many. A host
	// can have very many devices of one or two routes, and the smallest map takes as much as eight keys.
	few  []Key
	many map[Key]int
}

const fewKeys = 8

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
			d = &deviceRoutes{indexed: true}
			f.devices[i] = d
		}
		d.n += by
		switch {
		case d.n <= 0:
			delete(f.devices, i)
		case !d.indexed || !f.indexes(i, d.n):
			*d = deviceRoutes{n: d.n}
		default:
			d.count(r.Key(), by)
		}
	}
}

// indexes reports whether the keys of so many routes of a device are kept.
func (f *FIB) indexes(i Ifindex, n int) bool { return n <= maxIndexedRoutes || f.links[i].Tunnel() }

func (d *deviceRoutes) count(k Key, by int) {
	switch {
	case d.many != nil:
	case by < 0:
		if i := slices.Index(d.few, k); i >= 0 {
			d.few = slices.Delete(d.few, i, i+1)
		}
		return
	case len(d.few) < fewKeys:
		d.few = append(d.few, k)
		return
	default:
		d.many = make(map[Key]int, 2*fewKeys)
		for _, k := range d.few {
			d.many[k]++
		}
		d.few = nil
	}
	if d.many[k] += by; d.many[k] <= 0 {
		delete(d.many, k)
	}
}

// keys yields each key once, in no particular order.
func (d *deviceRoutes) keys(yield func(Key) bool) {
	for i, k := range d.few {
		if !slices.Contains(d.few[:i], k) && !yield(k) {
			return
		}
	}
	for k := range d.many {
		if !yield(k) {
			return
		}
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
		if d.indexed = f.indexes(i, d.n); d.indexed && d.n > fewKeys {
			d.many = make(map[Key]int, d.n)
		}
	}
	indexed := make([]bool, len(f.sets.list)) // the sets with a route of an indexed device
	for n, set := range f.sets.list {
		for _, b := range set.paths.Bodies() {
			for i := range b.leaving() {
				indexed[n] = indexed[n] || f.devices[i].indexed
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
			if d := f.devices[i]; d.indexed {
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
	if !d.indexed {
		return nil, d.n
	}
	return slices.SortedFunc(d.keys, Key.Compare), d.n
}

// LeavingBy yields the keys of DeviceRoutes in no particular order, without looking at more than are taken. It is false
// where there are too many to be indexed.
func (f *FIB) LeavingBy(i Ifindex) (keys iter.Seq[Key], indexed bool) {
	d := f.devices[i]
	if d == nil {
		return func(func(Key) bool) {}, true
	}
	return d.keys, d.indexed
}
