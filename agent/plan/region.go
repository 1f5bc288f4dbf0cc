package plan

import (
	"net/netip"

	"github.com/gaissmai/bart"

	"tsoagent/routes"
)

// region is a set of destinations at which something changed: whatever overlaps it is to be worked out
// anew. The zero value is empty.
type region struct {
	set  bart.Lite
	list []netip.Prefix // none inside another one that came before it
	// routes are the destinations at which the routes themselves, or whether they are tried, changed.
	routes []netip.Prefix
	// tries are those that a coverage can fill now, or can fill no more.
	tries []routes.Key
	// covers are the coverages found so far, and how many of the list they were looked for at.
	covers []*coverage
	seen   map[*coverage]bool
	looked int
}

// add adds a destination, and says whether it was not in it as a whole.
func (r *region) add(dst netip.Prefix) bool {
	if r.set.LookupPrefix(dst) {
		return false
	}
	r.set.Insert(dst)
	r.list = append(r.list, dst)
	return true
}

// addRoutes adds a destination whose routes changed.
func (r *region) addRoutes(dst netip.Prefix) {
	r.add(dst)
	r.routes = append(r.routes, dst)
}

// overlaps reports whether something changed at, inside or around a destination.
func (r *region) overlaps(dst netip.Prefix) bool { return r.set.OverlapsPrefix(dst) }

// overlapping calls fn for all of a table that overlaps a destination.
func overlapping[V any](t *bart.Table[V], dst netip.Prefix, fn func(netip.Prefix, V)) {
	for x, v := range t.Supernets(dst) {
		fn(x, v)
	}
	for x, v := range t.Subnets(dst) {
		if x != dst {
			fn(x, v)
		}
	}
}
