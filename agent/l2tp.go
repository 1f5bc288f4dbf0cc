package agent

import (
	"tsoagent/l2tp"
	"tsoagent/routes"
)

// l2tpDevices knows which devices are L2TP sessions. The kernel tells a session's device by the
// name that it was made with, so a device that is known is remembered through a rename. It
// belongs to the loop.
type l2tpDevices struct {
	sessions []l2tp.Session
	devices  map[sessionID]routes.Ifindex
}

type sessionID struct{ tunnel, session uint32 }

func idOf(s l2tp.Session) sessionID { return sessionID{s.Tunnel, s.ID} }

// set takes all sessions that there are.
func (d *l2tpDevices) set(sessions []l2tp.Session) {
	known := d.devices
	d.sessions, d.devices = sessions, map[sessionID]routes.Ifindex{}
	for _, s := range sessions {
		if i, ok := known[idOf(s)]; ok {
			d.devices[idOf(s)] = i
		}
	}
}

// gone forgets a device.
func (d *l2tpDevices) gone(i routes.Ifindex) {
	for id, j := range d.devices {
		if i == j {
			delete(d.devices, id)
		}
	}
}

// encaps are the sessions' devices with how they wrap what they send. Where two unknown sessions
// claim one name, a rename came between, and neither is believed.
func (d *l2tpDevices) encaps(fib *routes.FIB) map[routes.Ifindex]routes.Encap {
	if len(d.sessions) == 0 {
		return nil
	}
	taken := map[routes.Ifindex]bool{}
	for _, i := range d.devices {
		taken[i] = true
	}
	free := map[string]routes.Ifindex{}
	for _, l := range fib.Links() {
		// An l2tpeth device is an Ethernet device without a kind of its own.
		if l.Kind == "" && l.Type == arphrdEther && !taken[l.Index] {
			free[l.Name] = l.Index
		}
	}
	claims := map[string]int{}
	for _, s := range d.sessions {
		if _, known := d.devices[idOf(s)]; !known {
			claims[s.Ifname]++
		}
	}
	out := map[routes.Ifindex]routes.Encap{}
	for _, s := range d.sessions {
		i, known := d.devices[idOf(s)]
		if !known && claims[s.Ifname] == 1 {
			if i, known = free[s.Ifname]; known {
				d.devices[idOf(s)] = i
			}
		}
		if known {
			out[i] = encapOf(s)
		}
	}
	return out
}

const (
	arphrdEther = 1 // ARPHRD_ETHER, linux/if_arp.h

	protoUDP  = 17
	protoL2TP = 115 // L2TP straight over IP
)

// encapOf is how a session's packets leave. Its socket can have a mark that nobody shows.
func encapOf(s l2tp.Session) routes.Encap {
	e := routes.Encap{
		Family: routes.FamilyOf(s.Remote), Proto: protoL2TP, Local: s.Local, Remote: s.Remote,
		AnyMark: true, Header: s.Header,
	}
	if s.UDP {
		e.Proto = protoUDP
		e.Sport, e.Dport = routes.PortRange{Lo: s.Sport, Hi: s.Sport}, routes.PortRange{Lo: s.Dport, Hi: s.Dport}
	}
	return e
}
