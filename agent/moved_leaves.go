package agent

import (
	"slices"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// maxLeft bounds how many devices that left are remembered for claims that come behind them.
const maxLeft = 256

// A leftDevice is one that left the namespace of late, to the zero place if it was deleted.
type leftDevice struct {
	link *routes.Link
	to   routes.Place
}

// movedFrom is a device that left, with no claims yet.
func movedFrom(l *routes.Link, to routes.Place) movedDevice {
	return movedDevice{To: to, Index: l.Index, Name: l.Name, Kind: l.Kind, IfID: l.IfID, Addr: l.HardwareAddr, PermAddr: l.PermAddr}
}

// still reports whether a link can be the one that was known by its index. Its name or its hardware address can be others by then, of which
// the event is on its way.
func still(was, now *routes.Link) bool {
	return was.Kind == now.Kind && was.IfID == now.IfID && was.PermAddr == now.PermAddr && (was.HardwareAddr == now.HardwareAddr || sameName(was.Name, now.Name))
}

// departed takes the claims on a device that leaves, before they are dropped. The link is still in
// the mirror.
func (a *Agent) departed(ev routes.LinkGone) {
	l := a.st.fib.Link(ev.Index)
	if l == nil || a.cfg.Mode != Enforce {
		return
	}
	if len(a.st.left) >= maxLeft {
		clear(a.st.left)
	}
	if ev.Link != nil && !still(l, ev.Link) {
		// The end of the one that is known here was not told: another one had its index, and left.
		a.st.left[l.Index] = leftDevice{ev.Link, ev.To}
		return
	}
	a.st.left[l.Index] = leftDevice{l, ev.To}
	if ev.To == (routes.Place{}) {
		return
	}
	d := movedFrom(l, ev.To)
	for _, k := range a.st.holdsOn(l.Index) {
		if c := a.st.holds[k]; a.lastP != nil || sameName(l.Name, c.Device.Name) && c.PermAddr == l.PermAddr {
			d.Features = append(d.Features, k.Feature)
		}
	}
	slices.Sort(d.Features)
	if c, ours := a.st.mtus[l.Index]; ours && c.Theirs == 0 && c.Wrote(l.MTU) && l.MTU != c.Was {
		d.MTU = &plan.MTUClaim{Was: c.Was, Ours: l.MTU}
	}
	if d.ours() {
		a.log.Info("a device with changes of ours was moved to another network namespace", "device", d.Name, "features", d.Features)
		a.follow(d)
		a.dropMTU(l.Index)
	}
}

// follow books a device that left, and offers its claims to the loop of the namespace where it is. Where that is not followed
// it finds out how it is called.
func (a *Agent) follow(d movedDevice) {
	a.recognise(&d)
	id := a.movedID(d.To)
	if err := a.journal.Put(entry(id, kindMoved, d)); err != nil {
		a.failed("journal can't be written: a device that was moved is not remembered", err, "device", d.Name)
	}
	a.st.moved[id] = &d
	a.away.Store(int32(len(a.st.moved))) // ahead of the offer: who comes to be followed after it asks for it
	if a.handOn(id, &d, arrival{fresh: true}); !d.offered {
		a.locate(&d)
		a.log.Warn("a device was moved to a network namespace where nobody takes it over", "device", d.Name, "look", d.says())
	}
}

// handOn offers the claims on a device to the loop of the namespace where it is.
func (a *Agent) handOn(id string, d *movedDevice, x arrival) (c carried) {
	d.offered, d.why = false, ""
	if a.others == nil {
		return carried{}
	}
	x.id, x.dev, x.from = id, *d, a.inbox
	c = a.others.carry(a, x)
	d.offered, d.why = c.offered, c.why
	return c
}

// recognise looks at a device right after it was moved, when nothing else can be where the kernel said that it
// went: by the name and address that it has now it is known later.
func (a *Agent) recognise(d *movedDevice) {
	if a.links == nil {
		return
	}
	l, err := a.links.ReadLinkAt(d.To)
	if err != nil || !d.like(l) {
		return
	}
	d.Addr = l.HardwareAddr
	if l.Name != d.Name {
		d.There = l.Name
	}
}

// settleMoved hears what became of claims that were handed on.
func (a *Agent) settleMoved(h handed) {
	d := a.st.moved[h.id]
	switch {
	case d == nil:
	case h.why == "":
		a.doneMoved(h.id)
	default:
		d.offered, d.why = false, h.why
		a.locate(d)
	}
}
