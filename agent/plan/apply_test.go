package plan

import (
	"encoding/binary"
	"fmt"

	"tsoagent/ethtool"
	"tsoagent/routes"
)

// apply does the steps as the agent does, in their order, with the messages that it writes.
func (w *world) apply(s Steps) error {
	cfg := w.cfg.WithDefaults()
	for _, c := range s.Clones {
		f := routes.FamilyOf(c.Clone.Dst.Addr())
		msg, err := routes.EncodeThrow(f, c.Clone.Dst, c.Table, cfg.Protocol, c.Clone.Metric())
		if !c.Clone.Throw {
			msg, err = routes.EncodeClone(c.Clone.Of, c.Clone.Dst, c.Table, cfg.Protocol, c.Clone.MTU, c.Clone.AdvMSS, c.Clone.Metric())
		}
		if err := w.put(msg, err); err != nil {
			return err
		}
		for i, b := range c.Clone.Behind {
			msg, err := routes.EncodeClone(b.Of, c.Clone.Dst, c.Table, cfg.Protocol, b.MTU, 0, CopyMetric(i))
			if err := w.put(msg, err); err != nil {
				return err
			}
		}
		for _, old := range c.Old {
			if !w.fib.Apply(routes.RouteGone{Route: old}).Changed {
				return fmt.Errorf("no old clone %s to drop", old.Key())
			}
		}
	}
	for _, r := range s.AddRules {
		if !w.fib.Apply(routes.RuleSet{Rule: &r}).Changed {
			return fmt.Errorf("rule %+v is there already", r)
		}
	}
	for _, l := range s.Locks {
		msg, err := routes.EncodeLock(l.Route, l.Want)
		if err := w.put(msg, err); err != nil {
			return err
		}
		w.held.Locks[l.Route.Key()] = LockClaim{Was: l.Owner, Ours: l.Want}
	}
	for _, h := range append(s.Holds, s.Retaken...) {
		w.held.Holds[HoldKey{h.Device.Index, h.Feature}] = HoldClaim{Device: h.Device, Was: true}
		w.set(h.Device.Index, h.Feature, false)
	}
	for _, r := range s.DropRules {
		if !w.fib.Apply(routes.RuleGone{Rule: &r}).Changed {
			return fmt.Errorf("no rule %+v to drop", r)
		}
	}
	for _, r := range s.DropClones {
		if !w.fib.Apply(routes.RouteGone{Route: r}).Changed {
			return fmt.Errorf("no clone %s to drop", r.Key())
		}
	}
	for _, u := range s.Unlocks {
		msg, err := routes.EncodeLock(u.Route, u.Was)
		if err := w.put(msg, err); err != nil {
			return err
		}
		delete(w.held.Locks, u.Route.Key())
	}
	for _, k := range s.Unholds {
		w.set(k.Index, k.Feature, w.held.Holds[k].Was)
		delete(w.held.Holds, k)
	}
	for _, k := range s.LostLocks {
		delete(w.held.Locks, k.Key)
	}
	for _, k := range s.LostHolds {
		delete(w.held.Holds, k.Key)
	}
	return nil
}

// put writes a route as RTM_NEWROUTE with NLM_F_REPLACE. Of a route with a nexthop object the
// kernel tells the nexthops as well.
func (w *world) put(msg []byte, err error) error {
	if err != nil {
		return err
	}
	r, err := w.in.ParseRoute(msg)
	if err != nil {
		return err
	}
	if r.Body.NHID != 0 {
		msg = append(dropEmptyMetrics(msg), w.objects[r.Body.NHID]...)
		if r, err = w.in.ParseRoute(msg); err != nil {
			return err
		}
	}
	if r, err = w.in.ParseRoute(w.markDead(msg)); err != nil {
		return err
	}
	w.fib.Apply(routes.RouteSet{Route: r, Replace: true})
	return nil
}

// markDead sets the flag that the kernel gives a nexthop by a device that is down.
func (w *world) markDead(msg []byte) []byte {
	down := func(oif []byte) bool {
		l := w.fib.Link(routes.Ifindex(binary.NativeEndian.Uint32(oif)))
		return l != nil && !l.Up
	}
	for b := msg[12:]; len(b) >= 4; {
		n := int(binary.NativeEndian.Uint16(b))
		switch binary.NativeEndian.Uint16(b[2:]) {
		case rtaOif:
			if down(b[4:]) {
				msg[8] |= routes.NexthopDead
			}
		case rtaMultipath:
			for h := b[4:n]; len(h) >= 8; h = h[binary.NativeEndian.Uint16(h):] {
				if down(h[4:]) {
					h[2] |= routes.NexthopDead
				}
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return msg
}

// dropEmptyMetrics leaves out an RTA_METRICS without any, which the kernel does not tell.
func dropEmptyMetrics(msg []byte) []byte {
	out := append([]byte(nil), msg[:12]...)
	for b := msg[12:]; len(b) >= 4; {
		n := int(binary.NativeEndian.Uint16(b))
		padded := min((n+3)&^3, len(b))
		if binary.NativeEndian.Uint16(b[2:]) != rtaMetrics || n > 4 {
			out = append(out, b[:padded]...)
		}
		b = b[padded:]
	}
	return out
}

func (w *world) set(i ethtool.Ifindex, name ethtool.Feature, on bool) {
	state := map[ethtool.Feature]ethtool.State{}
	old := w.features[routes.Ifindex(i)]
	for f, s := range old.All() {
		if f == name {
			s.Active, s.Wanted = on, on
		}
		state[f] = s
	}
	w.features[routes.Ifindex(i)] = ethtool.NewFeatures(i, old.Name, state)
}
