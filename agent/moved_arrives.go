package agent

import (
	"errors"
	"time"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// arrivalWithin bounds how long the new namespace's loop waits for the device's own events.
const arrivalWithin = 10 * time.Second

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
		dev.To.Index, d.offered, d.gone, d.why = l.Index, true, false, ""
		a.st.arrivals = append(a.st.arrivals, arrival{id: id, dev: dev, from: a.inbox})
	}
}

// isWhatArrives reports whether a link where a device was said to have come is it.
func (x *arrival) isWhatArrives(l *routes.Link) bool {
	return l != nil && (x.dev.same(l) || x.fresh && x.dev.like(l))
}

// takeIn takes over the claims on devices that were moved here, once their links are in the mirror.
func (a *Agent) takeIn(now time.Time) {
	waiting := a.st.arrivals[:0]
	for _, x := range a.st.arrivals {
		if x.until.IsZero() {
			x.until = now.Add(arrivalWithin)
		}
		l := a.st.fib.Link(x.dev.To.Index)
		left, gone := a.st.left[x.dev.To.Index]
		switch {
		case a.cfg.Mode != Enforce:
			a.answer(x, "it changes nothing")
		case x.isWhatArrives(l):
			switch err := a.takeOver(l, &x.dev); {
			case err == nil:
				a.answer(x, "")
			case now.Before(x.until): // renamed or moved on, as a rule, which its events tell
				a.log.Debug("a device that was moved here can't be taken over yet", "device", l.Name, "err", err)
				waiting = append(waiting, x)
			default:
				a.failed("a device that was moved here can't be taken over", err, "device", l.Name)
				a.answer(x, err.Error())
			}
		case gone && x.isWhatArrives(left.link):
			if left.to != (routes.Place{}) { // it was moved on before its claims came
				d := movedFrom(left.link, left.to)
				d.Features, d.MTU = x.dev.Features, x.dev.MTU
				a.follow(d)
			}
			a.answer(x, "")
		case now.Before(x.until):
			waiting = append(waiting, x)
		default:
			a.answer(x, "the device has not come there")
		}
	}
	a.st.arrivals = waiting
}

// answer tells the loop of the old namespace, which can be this one, what became of the claims: why they were not
// taken over, empty for taken.
func (a *Agent) answer(x arrival, why string) {
	h := handed{x.id, why}
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
	a.st.ways.giveUpAhead()
	a.inbox.close()
	for _, b := range a.inbox.take() {
		a.st.arrivals = append(a.st.arrivals, b.arrivals...)
	}
	for _, x := range a.st.arrivals {
		a.answer(x, "its loop has ended")
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
			claims[k] = plan.HoldClaim{Device: dev, PermAddr: l.PermAddr, NIC: l.PermAddr != "" && nicKey(l) != "", Was: true}
			entries = append(entries, entry(holdID(k), kindHold, heldFeature{claims[k], name}))
		}
	}
	if len(entries) > 0 {
		if err := a.journal.Put(entries...); err != nil {
			return err
		}
	}
	for k, c := range claims {
		a.st.hold(k, c)
	}
	a.st.taken += len(claims)
	if _, ours := a.st.mtus[l.Index]; !ours && d.MTU != nil && l.MTU == d.MTU.Ours && !a.bookMTU(l, *d.MTU) {
		return errNotBooked
	}
	a.log.Info("a device was moved here with changes of ours: they are kept or given back here", "device", l.Name, "features", d.Features)
	return nil
}

var errNotBooked = errors.New("the journal can't be written")
