package plan

import (
	"maps"

	"tsoagent/routes"
)

// stack finds the devices that send by dedicated carriers alone and so are dedicated themselves: a
// VLAN, macvlan or ipvlan above one, a bond or team all of whose ports are. A bridge is not among
// them: it also sends to its other ports, and its ports take what it forwards.
func (p *planner) stack() {
	p.devices = maps.Clone(p.based)
	for _, d := range p.devices {
		d.over = nil
	}
	// Stacks have a few levels; each pass finds one more.
	for again := true; again; {
		again = false
		for _, l := range p.FIB.Links() {
			if p.devices[l.Index] != nil {
				continue
			}
			lower := below(l, p.ports[l.Index], func(l *routes.Link) *dedicated { return p.devices[l.Index] }, p.FIB)
			if len(lower) == 0 {
				continue
			}
			d := &dedicated{link: l, kind: lower[0].kind, lower: lower}
			for _, low := range lower {
				low.over = append(low.over, d)
			}
			p.devices[l.Index] = d
			again = true
		}
	}
}

// portsOf are the devices that have a master, by the master.
func (p *planner) portsOf() map[routes.Ifindex][]*routes.Link {
	ports := map[routes.Ifindex][]*routes.Link{}
	for _, l := range p.FIB.Links() {
		if l.Master != 0 {
			ports[l.Master] = append(ports[l.Master], l)
		}
	}
	return ports
}

// below is what is known of the devices by which a device of a stack sends, none if something
// else is among them.
func below[T any](l *routes.Link, ports []*routes.Link, known func(*routes.Link) *T, fib *routes.FIB) []*T {
	switch l.Kind {
	case "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap":
		if parent := fib.Link(l.Parent); parent != nil && !l.ParentElsewhere {
			if t := known(parent); t != nil {
				return []*T{t}
			}
		}
	case "bond", "team":
		var out []*T
		for _, port := range ports {
			t := known(port)
			if t == nil {
				return nil
			}
			out = append(out, t)
		}
		return out
	}
	return nil
}

// enters reports whether flows enter a stack at this device: it has routes of its own, or no
// dedicated device above it.
func (p *planner) enters(d *dedicated) bool {
	if len(d.over) == 0 {
		// A bond above nothing but dedicated ports, without routes, still sends what is bound to it.
		return true
	}
	if m := p.FIB.Link(d.link.Master); m != nil && m.Kind != "vrf" && p.devices[m.Index] == nil {
		return true // a port of what is no carrier itself, as a bridge
	}
	keys, indexed := p.FIB.LeavingBy(d.link.Index)
	if !indexed {
		return true // more than are known by their keys
	}
	for k := range keys {
		if r, n := p.FIB.Get(k); n > 0 && r.Body.Type == routes.Unicast && !p.Config.OwnRoute(r) && !linkLocal(k.Dst) {
			return true
		}
	}
	return false
}
