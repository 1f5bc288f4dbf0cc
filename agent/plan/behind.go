package plan

import (
	"net/netip"
	"slices"

	"tsoagent/routes"
)

// A lookup that is bound to a device passes over what leaves by others, and IPv6 has throws by lo: in our table it would pass over one,
// too, and end at the clone of a wider destination, if that leaves by its device. So behind such a throw, or a clone, stand copies of the
// routes that it is to find there. Other lookups never get that far.
//
//	socket ──────────────> throw fd03:7::/48 metric 1 ──> next rule
//	bound to eth0 ─ over ┘ fd03:7::/48 via B dev eth0 metric 131072, as the owner's
//	                       fd03::/16   via A dev eth0 mtu lock 1400

// copyMetric is the metric (RTA_PRIORITY) of the first copy at a destination, larger than any clone's, which is an MTU.
const copyMetric = 1 << 17

// Copy is a route of ours for IPv6 lookups that are bound to a device: the owner's, as far as the table of ours would hide it from them.
type Copy struct {
	Of  routes.Route
	MTU MTUMetric // the owner's
}

// CopyMetric is the metric of the nth copy at a destination.
func CopyMetric(n int) uint32 { return copyMetric + uint32(n) }

// IsCopy reports whether a route in a table of ours is a copy.
func IsCopy(b *routes.Body) bool { return b.Priority >= copyMetric }

// matches reports whether a route of ours is the nth copy.
func (c Copy) matches(n int, b *routes.Body, same sameWays) bool {
	of := c.Of.Body
	return c.replaces(n, b) && b.Type == routes.Unicast && b.NHID == 0 && same.are(b, of) && b.PrefSrc == of.PrefSrc &&
		routes.MTUMetricOf(b) == c.MTU && b.Metrics.AdvMSS == of.Metrics.AdvMSS
}

// replaces reports whether the nth copy, when it is written, takes the place of a route of ours.
func (c Copy) replaces(n int, b *routes.Body) bool {
	return b.Priority == CopyMetric(n) && b.Src == c.Of.Body.Src && b.TOS == c.Of.Body.TOS
}

// hiddenBy are the copies at a destination: of its routes that leave by a device by which a wider one in our table leaves as well, but the
// cloned one itself.
func (p *planner) hiddenBy(s *shaped, x netip.Prefix, clone Clone) (out []Copy) {
	if s.id.Flows.Family != routes.IPv6 || s.clones == 0 {
		return nil
	}
	if !s.beneath(x) { // which is nearly always so
		return nil
	}
	m, _ := p.FIB.Cover(s.id.Flows.Family, s.id.Table, x)
	found := map[routes.Ifindex]bool{} // by a route ahead
	if !clone.Throw {
		for _, n := range clone.Of.Body.Nexthops {
			found[n.Oif] = true
		}
	}
	for _, b := range m.Paths.Bodies() {
		if b.Type != routes.Unicast || b == clone.Of.Body {
			continue
		}
		hidden := slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool {
			return n.Flags&routes.NexthopDead == 0 && !found[n.Oif] && s.hides(x, n.Oif, m.Dst.Bits())
		})
		if !hidden {
			continue
		}
		r := routes.Route{Dst: m.Dst, Body: b}
		out = append(out, Copy{Of: r, MTU: p.owner(r)})
		for _, n := range b.Nexthops {
			found[n.Oif] = found[n.Oif] || !b.Src.IsValid() && b.TOS == 0 && n.Flags&routes.NexthopDead == 0
		}
	}
	return out
}

// beneath reports whether the shape's table has something for a wider destination.
func (s *shaped) beneath(x netip.Prefix) bool {
	for wider, at := range s.points.Supernets(x) {
		if wider != x && at.has {
			return true
		}
	}
	return false
}

// hides reports whether a lookup that is bound to a device would find, for a wider destination in the shape's table, what is there instead
// of a longer route.
func (s *shaped) hides(x netip.Prefix, by routes.Ifindex, bits int) bool {
	for wider, at := range s.points.Supernets(x) {
		if wider == x || !at.has {
			continue
		}
		if at.because != nil && leads(at.body, by) {
			return int(at.bits) < bits
		}
		for _, c := range at.copies() {
			if leads(c.Of.Body, by) && !c.Of.Body.Src.IsValid() && c.Of.Body.TOS == 0 {
				return c.Of.Dst.Bits() < bits
			}
		}
	}
	return false
}

// leads reports whether one of a route's ways is by a device.
func leads(b *routes.Body, by routes.Ifindex) bool {
	return slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool { return n.Oif == by })
}

// copies are those behind what the table holds.
func (at *point) copies() []Copy {
	if at.behind == nil {
		return nil
	}
	return *at.behind
}
