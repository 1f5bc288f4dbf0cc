package routes

import "slices"

// losses watches the events for those after which the kernel has changed or removed routes and
// nexthop objects without telling (KERNEL.md 24), and says what is to be dumped again:
//
//   - A link that goes down or away takes its IPv4 routes (fib_disable_ip) and its nexthop
//     objects (nexthop_flush_dev) along; IPv6 routes too under
//     net.ipv6.route.skip_notify_on_dev_down. A link that comes or goes, or whose carrier does,
//     changes the dead and linkdown flags of multipath members (fib_sync_up, fib_sync_down_dev).
//   - A link that gets into a VRF or out of it loses all its IPv4 routes, also those to its own
//     addresses, which stay when it only goes down (fib_netdev_event, NETDEV_CHANGEUPPER).
//   - A link whose MTU changes has it written into the MTU metrics of its IPv6 routes
//     (rt6_mtu_change_route).
//   - An IPv4 address that goes takes the routes that prefer it as source along, on whatever
//     device (fib_sync_down_addr), and the last address all routes of its device. An IPv6
//     address is only struck from the routes that prefer it (rt6_remove_prefsrc).
//   - An IPv4 address that comes, on a device that had none, revives the ways of multipath routes
//     that its last one had taken along (fib_sync_up).
//   - A nexthop object that goes or changes takes its routes along or changes them.
type losses struct {
	links    map[Ifindex]linkState
	nexthops map[uint32]*NexthopObject
	bodies   interface{ All(func(*Body) bool) }
	due      scopeSet
	// objects says that nexthop objects may be gone without an event.
	objects bool
	// addrs and ids are those that went or changed since again was called, alive the devices that got an IPv4 address.
	addrs []Addr
	ids   []uint32
	alive []Ifindex
}

type linkState struct {
	up, running bool
	mtu         int
	master      Ifindex
}

func newLosses(in interface{ All(func(*Body) bool) }) losses {
	return losses{
		links:    make(map[Ifindex]linkState),
		nexthops: make(map[uint32]*NexthopObject),
		bodies:   in,
	}
}

// found takes an item of a dump: it is newer than all events before it, and the routes that are
// dumped after it are newer still.
func (l *losses) found(ev Event) {
	switch ev := ev.(type) {
	case LinkSet:
		l.links[ev.Link.Index] = stateOf(ev.Link)
	case NexthopSet:
		l.nexthops[ev.Nexthop.ID] = ev.Nexthop
	}
}

func stateOf(l *Link) linkState {
	return linkState{up: l.Up, running: l.Running, mtu: l.MTU, master: l.Master}
}

// told takes an event.
func (l *losses) told(ev Event) {
	switch ev := ev.(type) {
	case LinkSet:
		i := ev.Link.Index
		old, known := l.links[i]
		now := stateOf(ev.Link)
		l.links[i] = now
		if !known {
			return
		}
		if old.up != now.up || old.running != now.running || old.master != now.master {
			l.linkChanged(i)
		}
		if old.mtu != now.mtu {
			l.due.add(Scope{RoutesOnly: true, Family: IPv6, Oif: i})
		}
	case LinkGone:
		delete(l.links, ev.Index)
		l.linkChanged(ev.Index)
	case AddrSet:
		if ev.Addr.Prefix.Addr().Is4() {
			l.alive = append(l.alive, ev.Addr.Ifindex)
			l.revived(ev.Addr.Ifindex)
		}
	case AddrGone:
		l.addrs = append(l.addrs, ev.Addr)
		l.addrGone(ev.Addr)
	case NexthopSet:
		old := l.nexthops[ev.Nexthop.ID]
		l.nexthops[ev.Nexthop.ID] = ev.Nexthop
		if old != nil {
			l.nexthopChanged(ev.Nexthop.ID)
		}
	case NexthopGone:
		l.nexthopChanged(ev.ID)
		delete(l.nexthops, ev.ID)
		l.objects = l.objects || len(l.nexthops) > 0 // groups that are empty now
	}
}

func (l *losses) linkChanged(i Ifindex) {
	l.objects = l.objects || len(l.nexthops) > 0
	l.due.add(Scope{RoutesOnly: true, Oif: i})
	// An IPv6 multipath route can lose one way and keep the others: a dump by this device does
	// not show it then, although it is still there.
	l.bodies.All(func(b *Body) bool {
		many := b.Family == IPv6 && len(b.Nexthops) > 1 && leavesBy(b, i)
		if many {
			l.due.add(Scope{RoutesOnly: true, Family: IPv6})
		}
		return !many
	})
}

// again asks once more what the events since the last call have taken along. A dump that ran
// when they came may have shown routes only after them that it had read before.
func (l *losses) again() {
	for _, a := range l.addrs {
		l.addrGone(a)
	}
	for _, id := range l.ids {
		l.routesOf(id)
	}
	for _, i := range l.alive {
		l.revived(i)
	}
	l.forget()
}

func (l *losses) forget() { l.addrs, l.ids, l.alive = nil, nil, nil }

// revived asks for the routes of a device that got an address if one of them has a dead way there.
func (l *losses) revived(i Ifindex) {
	l.bodies.All(func(b *Body) bool {
		dead := b.Family == IPv4 && slices.ContainsFunc(b.Nexthops, func(n Nexthop) bool { return n.Oif == i && n.Flags&NexthopDead != 0 })
		if dead {
			l.due.add(Scope{RoutesOnly: true, Family: IPv4, Oif: i})
		}
		return !dead
	})
}

func (l *losses) addrGone(a Addr) {
	f := FamilyOf(a.Prefix.Addr())
	if f == IPv4 {
		l.due.add(Scope{RoutesOnly: true, Family: f, Oif: a.Ifindex})
	}
	l.bodies.All(func(b *Body) bool {
		if b.PrefSrc != a.Prefix.Addr() {
			return true
		}
		if !leavesBy(b, a.Ifindex) {
			l.due.add(Scope{RoutesOnly: true, Family: f})
			return false
		}
		l.due.add(Scope{RoutesOnly: true, Family: f, Oif: a.Ifindex})
		return true
	})
}

// leavesBy reports whether the body has a nexthop on the device, so that a dump by that device
// shows whether its routes are still there.
func leavesBy(b *Body, i Ifindex) bool {
	for _, n := range b.Nexthops {
		if n.Oif == i {
			return true
		}
	}
	return false
}

// nexthopChanged asks for the routes that use the object, or a group with it.
func (l *losses) nexthopChanged(id uint32) {
	l.ids = append(l.ids, id)
	l.routesOf(id)
}

func (l *losses) routesOf(id uint32) {
	l.bodies.All(func(b *Body) bool {
		if b.NHID != 0 && (b.NHID == id || l.member(b.NHID, id)) {
			l.due.add(Scope{RoutesOnly: true, Family: b.Family})
		}
		return true
	})
}

func (l *losses) member(group, id uint32) bool {
	n := l.nexthops[group]
	if n == nil {
		return true // not known: assume it
	}
	for _, m := range n.Group {
		if m.ID == id {
			return true
		}
	}
	return false
}

func sameObject(a, b *NexthopObject) bool {
	return a.Oif == b.Oif && a.Gateway == b.Gateway && a.Flags == b.Flags && a.Protocol == b.Protocol &&
		a.Blackhole == b.Blackhole && a.FDB == b.FDB && a.Encap == b.Encap && a.Resilient == b.Resilient && slices.Equal(a.Group, b.Group)
}
