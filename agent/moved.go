package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// A device that is moved to another namespace keeps its features and its MTU (KERNEL.md 76): what we
// changed goes with it. The claims go after it:
//
//	loop of the old namespace            Fleet                  loop of the new namespace
//	RTM_DELLINK, with where it went
//	journal: moved  ───────────── arrival ──────────────> the link is there, as it was
//	                                                      journal: the claims; held on, or given back
//	journal: done   <───────────── handed ───────────────
//
// Where nobody follows the new namespace, the entry stays and is told in reports until the device
// comes back or is gone. Nothing is entered for it: that is the admin's to do.

const kindMoved journal.Kind = "moved"

// movedDevice is the journal's entry for a device that left the namespace with what we changed.
type movedDevice struct {
	To       routes.Place      `json:"to"`
	Index    routes.Ifindex    `json:"ifindex"`         // that it had here
	Name     string            `json:"name"`            // that it had here
	There    string            `json:"there,omitempty"` // its name there, if it is another one
	Kind     string            `json:"kind,omitempty"`
	IfID     uint32            `json:"if_id,omitempty"`
	Addr     string            `json:"addr,omitempty"`
	PermAddr string            `json:"perm_addr,omitempty"`
	Features []ethtool.Feature `json:"features,omitempty"` // held off; each was wanted before
	MTU      *plan.MTUClaim    `json:"mtu,omitempty"`

	offered bool   // the loop of another namespace has it
	gone    bool   // it was not there when it was looked at: it can be back, and its event on the way
	where   string // how the other namespace can be named, empty for unknown
}

// An arrival is a device that was moved here, with the loop to tell what became of its claims.
type arrival struct {
	id    string // of the entry in the old namespace's journal
	dev   movedDevice
	from  *inbox
	until time.Time // when it is no longer waited for, zero before it was looked at
}

// handed tells the old namespace's loop that the new one has taken over the claims, or has not.
type handed struct {
	id    string
	taken bool
}

// arrivalWithin bounds how long the new namespace's loop waits for the device's own events.
const arrivalWithin = 10 * time.Second

// maxLeft bounds how many devices that left are remembered for claims that come behind them.
const maxLeft = 256

func movedID(p routes.Place) string { return fmt.Sprintf("moved/%d/%d", p.Netnsid, p.Index) }

// like reports whether a link where the kernel said that the device went can be it. Whoever moves a device
// can change its name and hardware address in the same request.
func (d *movedDevice) like(l *routes.Link) bool {
	return l.Kind == d.Kind && l.IfID == d.IfID && l.PermAddr == d.PermAddr
}

// same reports whether a link can be the device, whatever its name and index are now. The hardware
// address of a NIC is anybody's to change, its permanent one is not.
func (d *movedDevice) same(l *routes.Link) bool {
	return d.like(l) && (l.HardwareAddr == d.Addr || d.Kind == "" && d.PermAddr != "")
}

// back reports whether a link that appeared in the old namespace is the device, of whose way back
// the kernel tells nothing.
func (d *movedDevice) back(l *routes.Link) bool {
	return d.same(l) && (l.Name == d.Name || l.Name == d.There || l.Index == d.Index || d.Kind == "" && d.PermAddr != "")
}

// departed takes the claims on a device that leaves, before they are dropped. The link is still in
// the mirror.
func (a *Agent) departed(ev routes.LinkGone) {
	l := a.st.fib.Link(ev.Index)
	if l == nil || a.cfg.Mode != Enforce {
		return
	}
	d := movedDevice{
		To: ev.To, Index: l.Index, Name: l.Name, Kind: l.Kind, IfID: l.IfID, Addr: l.HardwareAddr, PermAddr: l.PermAddr,
	}
	if len(a.st.left) >= maxLeft {
		clear(a.st.left)
	}
	a.st.left[l.Index] = d
	if ev.To == (routes.Place{}) {
		return
	}
	for k, c := range a.st.holds {
		if routes.Ifindex(k.Index) == l.Index && (a.lastP != nil || c.Device.Name == l.Name && c.PermAddr == l.PermAddr) {
			d.Features = append(d.Features, k.Feature)
		}
	}
	slices.Sort(d.Features)
	if c, ours := a.st.mtus[l.Index]; ours && c.Theirs == 0 && c.Wrote(l.MTU) && l.MTU != c.Was {
		d.MTU = &plan.MTUClaim{Was: c.Was, Ours: l.MTU}
	}
	if len(d.Features) > 0 || d.MTU != nil {
		a.log.Info("a device with changes of ours was moved to another network namespace", "device", d.Name, "features", d.Features)
		a.follow(d)
		a.dropMTU(l.Index)
	}
}

// follow books a device that left, and offers its claims to the loop of the namespace where it is.
func (a *Agent) follow(d movedDevice) {
	id := movedID(d.To)
	if err := a.journal.Put(entry(id, kindMoved, d)); err != nil {
		a.failed("journal can't be written: a device that was moved is not remembered", err, "device", d.Name)
	}
	a.st.moved[id] = &d
	a.away.Store(int32(len(a.st.moved))) // ahead of the offer: who comes to be followed after it asks for it
	a.offer(id)
}

// offer hands the claims on. Where the namespace is not followed it finds out how it is called.
func (a *Agent) offer(id string) {
	d := a.st.moved[id]
	d.offered = a.carry != nil && a.carry(a, arrival{id: id, dev: *d, from: a.inbox})
	if !d.offered {
		a.recognise(id, d)
		a.locate(d)
		a.log.Warn("a device was moved to a network namespace that is not followed", "device", d.Name, "look", d.says())
	}
}

// recognise looks at a device right after it was moved, when nothing else can be where the kernel said that it
// went: by the name and address that it has now it is known later.
func (a *Agent) recognise(id string, d *movedDevice) {
	if a.links == nil {
		return
	}
	l, err := a.links.ReadLinkAt(d.To)
	if err != nil || !d.like(l) || l.Name == d.Name && l.HardwareAddr == d.Addr {
		return
	}
	d.There, d.Addr = l.Name, l.HardwareAddr
	if err := a.journal.Put(entry(id, kindMoved, d)); err != nil {
		a.failed("journal can't be written: a device that was moved is not remembered", err, "device", d.Name)
	}
}

// offerAgain offers what nobody has taken: namespaces come to be followed. It forgets devices
// that are gone.
func (a *Agent) offerAgain() {
	for _, id := range slices.Sorted(maps.Keys(a.st.moved)) {
		d := a.st.moved[id]
		if d.offered {
			continue
		}
		if d.offered = a.carry != nil && a.carry(a, arrival{id: id, dev: *d, from: a.inbox}); !d.offered && a.stillThere(d) {
			d.gone = false
			a.locate(d)
		} else if !d.offered && d.gone {
			a.doneMoved(id)
		} else if !d.offered {
			a.log.Warn("a device that was moved to a network namespace that is not followed has nothing of ours any more, is gone from there, or was moved on", "device", d.Name)
			d.gone = true
		}
	}
}

// forgetGone forgets the devices that were looked for and are gone. No event is waited for any more.
func (a *Agent) forgetGone() {
	for id, d := range a.st.moved {
		if d.gone && !d.offered {
			a.doneMoved(id)
		}
	}
}

// stillThere looks at a device without entering its namespace, and reports whether anything of ours
// can be left on it. A NIC outlives its namespace: it goes to the host's.
func (a *Agent) stillThere(d *movedDevice) bool {
	if a.links == nil {
		return true
	}
	l, err := a.links.ReadLinkAt(d.To)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || err == nil && !d.same(l) {
		return d.Kind == ""
	}
	if err != nil {
		return true
	}
	d.There = l.Name
	if d.MTU != nil && l.MTU != d.MTU.Ours {
		d.MTU = nil
	}
	return len(d.Features) > 0 || d.MTU != nil
}

// returned looks whether a link that appears is a device that was moved away.
func (a *Agent) returned(l *routes.Link) {
	if a.st.fib.Link(l.Index) == nil {
		delete(a.st.left, l.Index) // another device has the index now
	}
	for id, d := range a.st.moved {
		if d.offered || !d.back(l) {
			continue
		}
		if a.links != nil {
			if there, err := a.links.ReadLinkAt(d.To); err == nil && d.same(there) {
				continue // this one is only like it
			}
		}
		dev := *d
		dev.To.Index, d.offered, d.gone = l.Index, true, false
		a.st.arrivals = append(a.st.arrivals, arrival{id: id, dev: dev, from: a.inbox})
	}
}

// takeIn takes over the claims on devices that were moved here, once their links are in the mirror.
func (a *Agent) takeIn(now time.Time) {
	if a.cfg.Mode != Enforce {
		a.st.arrivals = nil
	}
	waiting := a.st.arrivals[:0]
	for _, x := range a.st.arrivals {
		if x.until.IsZero() {
			x.until = now.Add(arrivalWithin)
		}
		l := a.st.fib.Link(x.dev.To.Index)
		left, gone := a.st.left[x.dev.To.Index]
		switch {
		case l != nil && x.dev.like(l):
			switch err := a.takeOver(l, &x.dev); {
			case err == nil:
				a.answer(x, true)
			case now.Before(x.until): // renamed or moved on, as a rule, which its events tell
				a.log.Debug("a device that was moved here can't be taken over yet", "device", l.Name, "err", err)
				waiting = append(waiting, x)
			default:
				a.failed("a device that was moved here can't be taken over", err, "device", l.Name)
				a.answer(x, false)
			}
		case gone && left.Kind == x.dev.Kind && left.PermAddr == x.dev.PermAddr && left.IfID == x.dev.IfID:
			if left.To != (routes.Place{}) { // it was moved on before its claims came
				left.Features, left.MTU = x.dev.Features, x.dev.MTU
				a.follow(left)
			}
			a.answer(x, true)
		case now.Before(x.until):
			waiting = append(waiting, x)
		default:
			a.answer(x, false)
		}
	}
	a.st.arrivals = waiting
}

// answer tells the loop of the old namespace, which can be this one, what became of the claims.
func (a *Agent) answer(x arrival, taken bool) {
	h := handed{x.id, taken}
	if x.from == a.inbox {
		a.settleMoved(h)
	} else {
		x.from.post(batch{handed: []handed{h}}) // one that ended keeps its journal's entry
	}
}

// movesDone reports whether nothing is on its way between this loop and others. One that ends sooner would leave
// an entry for what is given back elsewhere.
func (a *Agent) movesDone() bool {
	for _, d := range a.st.moved {
		if d.offered {
			return false
		}
	}
	return len(a.st.arrivals) == 0
}

// end closes the inbox when the loop ends. What was to be taken over is offered again by who offered it,
// or told: nobody takes it here any more.
func (a *Agent) end() {
	a.inbox.close()
	for _, b := range a.inbox.take() {
		a.st.arrivals = append(a.st.arrivals, b.arrivals...)
	}
	for _, x := range a.st.arrivals {
		a.answer(x, false)
	}
	a.st.arrivals = nil
}

// takeOver makes the claims on a device ours as far as they hold: a feature that is on is nobody's, nor is
// an MTU that is not the one that was set. The next plan keeps them or gives them back.
func (a *Agent) takeOver(l *routes.Link, d *movedDevice) error {
	dev := ethtool.Device{Index: ethtool.Ifindex(l.Index), Name: l.Name}
	f, err := a.et.Features(dev)
	if err != nil {
		return err
	}
	a.st.know(f)
	var entries []journal.Entry
	claims := map[plan.HoldKey]plan.HoldClaim{}
	for _, name := range d.Features {
		k := plan.HoldKey{Index: dev.Index, Feature: name}
		if s, ok := f.Get(name); !ok || s.Wanted {
			continue
		}
		if _, ours := a.st.holds[k]; !ours {
			claims[k] = plan.HoldClaim{Device: dev, PermAddr: l.PermAddr, Was: true}
			entries = append(entries, entry(holdID(k), kindHold, heldFeature{claims[k], name}))
		}
	}
	if len(entries) > 0 {
		if err := a.journal.Put(entries...); err != nil {
			return err
		}
	}
	maps.Copy(a.st.holds, claims)
	if _, ours := a.st.mtus[l.Index]; !ours && d.MTU != nil && l.MTU == d.MTU.Ours && !a.bookMTU(l, *d.MTU) {
		return errNotBooked
	}
	a.log.Info("a device was moved here with changes of ours: they are kept or given back here", "device", l.Name, "features", d.Features)
	return nil
}

var errNotBooked = errors.New("the journal can't be written")

// settleMoved hears what became of claims that were handed on.
func (a *Agent) settleMoved(h handed) {
	d := a.st.moved[h.id]
	switch {
	case d == nil:
	case h.taken:
		a.doneMoved(h.id)
	default:
		d.offered = false
		a.locate(d)
	}
}

func (a *Agent) doneMoved(id string) {
	delete(a.st.moved, id)
	a.away.Store(int32(len(a.st.moved)))
	a.unbook(id)
}

// adoptMoved takes over what an earlier run remembers of a device that left.
func (a *Agent) adoptMoved(e journal.Entry) error {
	d := new(movedDevice)
	if err := json.Unmarshal(e.Data, d); err != nil {
		return err
	}
	a.st.moved[e.ID] = d
	a.away.Store(int32(len(a.st.moved)))
	return nil
}

// recallMoved looks once, before the first plan, where such devices are now.
func (a *Agent) recallMoved() {
	for _, l := range a.st.fib.Links() {
		a.returned(l)
	}
	a.offerAgain()
}
