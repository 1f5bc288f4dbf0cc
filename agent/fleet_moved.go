package agent

// carry brings the claims on a device that left one namespace to the loop of the one where it is
// now. It is false if that one is not followed. The old namespace's own number for the new one is asked
// of the kernel; nothing is entered for it.
func (f *Fleet) carry(from *Agent, x arrival) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		to := m.agent
		if to == nil || to == from || to.ns == nil || from.ids == nil {
			continue // one that starts asks for it when it is there
		}
		if id, err := from.ids.Of(to.ns); err == nil && id == x.dev.To.Netnsid {
			return to.inbox.post(batch{arrivals: []arrival{x}})
		}
	}
	return false
}

// announce lets the loops offer again what nobody has taken, as another namespace is followed now. Those that
// miss nothing have no round for it.
func (f *Fleet) announce() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		if m.agent != nil && m.agent.away.Load() > 0 {
			m.agent.inbox.post(batch{offer: true})
		}
	}
}
