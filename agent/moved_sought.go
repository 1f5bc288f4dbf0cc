package agent

import (
	"errors"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
)

// forgottenAfter is how many resyncs in turn must find a device gone. One alone can come while it is on its way: a NIC
// is nowhere while its namespace is taken down.
const forgottenAfter = 2

// offerAgain offers what nobody has taken: namespaces come to be followed, and NICs come back from some that are gone. It
// forgets devices that resyncs find gone.
func (a *Agent) offerAgain(resync bool) {
	for _, id := range slices.Sorted(maps.Keys(a.st.moved)) {
		d := a.st.moved[id]
		if d.offered {
			continue
		}
		seen := a.sight(d)
		if seen != seenAnother { // a loop that follows the place may know where the device went from there
			a.handOn(id, d, arrival{})
		}
		var found carried
		if !d.offered && (seen == seenAnother || seen == seenNone) && d.nicKey() != "" {
			found = a.handOn(id, d, arrival{lost: true})
		}
		switch {
		case d.offered:
			d.gone, d.looks = false, 0
		case found.where != "":
			d.gone, d.looks, d.where, d.There = false, 0, found.where, found.name
		case seen == seenHere && !d.ours():
			a.log.Info("nothing of ours is left on a device that was moved to another network namespace", "device", d.Name)
			a.doneMoved(id)
		case seen == seenHere || seen == unseen:
			d.gone, d.looks = false, 0
			a.locate(d)
		default:
			a.missMoved(id, d, resync)
		}
	}
}

// missMoved notes that a device is not where it went, and forgets it after some time.
func (a *Agent) missMoved(id string, d *movedDevice, resync bool) {
	if resync {
		d.looks++
	}
	switch {
	case d.looks >= forgottenAfter:
		a.log.Warn("a device that was moved is no longer looked for", "device", d.Name, "look", d.lost())
		a.doneMoved(id)
	case !d.gone:
		a.log.Info("a device is not where it was moved to any more: it was deleted, or moved on", "device", d.Name)
	}
	d.gone = true
}

// forgetGone forgets the devices that were looked for and are gone. No event is waited for any more.
func (a *Agent) forgetGone() {
	for id, d := range a.st.moved {
		if d.gone && !d.offered {
			if d.nicKey() != "" {
				a.log.Warn("a device that was moved is no longer looked for", "device", d.Name, "look", d.lost())
				a.st.missed = append(a.st.missed, d.lost())
			}
			a.doneMoved(id)
		}
	}
}

// A sight is what was seen where a device went.
type sight uint8

const (
	unseen      sight = iota // it can't be looked at
	seenHere                 // the device
	seenAnother              // another device has its index
	seenNone                 // none has, or there is no such namespace any more
)

// sight looks at a device without entering its namespace, and takes over how it is called there, and whether its MTU is ours.
func (a *Agent) sight(d *movedDevice) sight {
	if a.links == nil {
		return unseen
	}
	l, err := a.links.ReadLinkAt(d.To)
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL):
		return seenNone
	case err != nil:
		return unseen
	case !d.same(l):
		return seenAnother
	}
	d.There = l.Name
	if d.MTU != nil && l.MTU != d.MTU.Ours {
		d.MTU = nil
	}
	return seenHere
}

// nicSet has NICs told anew that came or changed what they are known by. Carriers that come and go change nothing.
func (a *Agent) nicSet(l *routes.Link) {
	key := nicKey(l)
	if have := a.nics.Load(); key != "" && (have == nil || (*have)[key] != l.Index) {
		a.st.nics = true
	}
}

// tellNICs lets other namespaces' loops find the NICs that are here, and has them look where one came.
func (a *Agent) tellNICs() {
	if !a.st.nics || a.st.fib.Stale() || a.others == nil {
		return
	}
	a.st.nics = false
	now := map[string]routes.Ifindex{}
	old := a.nics.Load()
	came := old == nil // they all did
	for _, l := range a.st.fib.Links() {
		k := nicKey(l)
		if k == "" {
			continue
		}
		if _, twice := now[k]; twice {
			now[k] = 0
			continue
		}
		now[k] = l.Index
		if old != nil {
			_, known := (*old)[k]
			came = came || !known
		}
	}
	if a.nics.Store(&now); came {
		a.others.announce()
	}
}
