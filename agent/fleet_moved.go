package agent

import (
	"cmp"
	"net"

	"tsoagent/agent/netns"
	"tsoagent/routes"
)

var _ others = (*Fleet)(nil)

// carry brings the claims on a device that left one namespace to the loop of the one where it is
// now. The old namespace's own number for the new one is asked of the kernel; nothing is entered for it.
func (f *Fleet) carry(from *Agent, x arrival) carried {
	if x.lost {
		return f.carryNIC(from, x)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		to := m.agent
		switch {
		case to == from:
		case to == nil: // it asks for the device when it is there
			if m.leads(from, x.dev.To.Netnsid) {
				return carried{why: cmp.Or(m.why, "its state is being read")}
			}
		case to.ns == nil || from.ids == nil:
		default:
			if id, err := from.ids.Of(to.ns); err == nil && id == x.dev.To.Netnsid {
				return offered(to, x)
			}
		}
	}
	return carried{}
}

func offered(to *Agent, x arrival) carried {
	if to.inbox.post(batch{arrivals: []arrival{x}}) {
		return carried{offered: true}
	}
	return carried{why: "its loop has ended"}
}

// leads reports whether a member that has no agent is the namespace with a number that another one has for it. The caller
// holds the Fleet's lock.
func (m *member) leads(from *Agent, number int32) bool {
	if from.ids == nil {
		return false
	}
	ns, err := netns.Open(netns.Path(m.names[0]))
	if err != nil {
		return false
	}
	defer ns.Close()
	id, err := from.ids.Of(ns)
	return err == nil && id == number && ns.ID() == m.id
}

// carryNIC brings the claims on a NIC that is not where it went to the loop of the namespace where it is, in which it is known
// by its address alone. Where the host's is not followed it looks there, too.
func (f *Fleet) carryNIC(from *Agent, x arrival) carried {
	key := x.dev.nicKey()
	f.mu.Lock()
	var to *Agent
	for _, m := range f.members {
		if m.agent == nil || m.agent == from || m.agent.nics.Load() == nil {
			continue
		}
		if i, there := (*m.agent.nics.Load())[key]; there && (to != nil || i == 0) {
			f.mu.Unlock()
			return carried{} // nothing tells which one it is
		} else if there {
			to, x.dev.To = m.agent, routes.Place{Index: i}
		}
	}
	_, followed := f.members[f.host.ID()]
	f.mu.Unlock()
	if to != nil {
		return offered(to, x)
	}
	if !followed {
		if l, err := findNIC(f.host, key); err != nil {
			f.log.Warn("the NICs of the host's network namespace can't be read", "err", err)
		} else if l != nil {
			return carried{where: netns.Host, name: l.Name}
		}
	}
	return carried{}
}

// findNIC is a NIC in a namespace that no loop follows, nil for none, and for several.
func findNIC(ns *netns.Namespace, key string) (found *routes.Link, err error) {
	err = ns.Do(func() error {
		list, err := net.Interfaces()
		if err != nil {
			return err
		}
		t, err := routes.OpenTable()
		if err != nil {
			return err
		}
		n := 0
		for _, i := range list {
			if l, err := t.ReadLink(routes.Ifindex(i.Index)); err == nil && nicKey(l) == key { // others are gone again
				found, n = l, n+1
			}
		}
		if n > 1 {
			found = nil
		}
		return t.Close()
	})
	return found, err
}

// announce lets the loops offer again what nobody has taken, as another namespace is followed now, or a NIC came to one. Those
// that miss nothing have no round for it.
func (f *Fleet) announce() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		if m.agent != nil && m.agent.away.Load() > 0 {
			m.agent.inbox.post(batch{offer: true})
		}
	}
	if len(f.strays)+len(f.ghosts) > 0 {
		f.recallDue = true
		f.poke()
	}
}
