package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
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
//
// The kernel numbers namespaces anew when they are gone, and indexes of devices too. So only the first offer, made when
// nothing else can be there, goes by the place alone. Later ones take a device that is known by its address. A NIC outlives
// its namespace and comes to the initial one (default_device_exit_net, net/core/dev.c), of which the loop that it once left hears
// nothing: it is looked for by its permanent address in all namespaces that are followed.

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
	looks   int    // how many resyncs have found it gone
	where   string // how the other namespace can be named, empty for unknown
	why     string // why the loop that follows the other namespace has not taken it, empty where none does
}

// An arrival is a device that was moved here, with the loop to tell what became of its claims.
type arrival struct {
	id    string // of the entry in the old namespace's journal
	dev   movedDevice
	from  *inbox
	until time.Time // when it is no longer waited for, zero before it was looked at
	fresh bool      // it has just left: no other device can be where it went
	lost  bool      // a NIC that is not where it went: it is known by its address, and its place is not
}

// handed tells the old namespace's loop that the new one has taken over the claims, or why it has not.
type handed struct {
	id  string
	why string // empty for taken
}

// carried is what became of claims that were to be brought to the loop of another namespace.
type carried struct {
	offered bool   // a loop has them, and will answer
	why     string // why not, although the device's namespace is one of those that are followed
	where   string // where a NIC was found, in a namespace that is not followed
	name    string // how it is called there
}

// others are the loops of other namespaces.
type others interface {
	// carry brings the claims on a device that left one namespace to the loop of the one where it is now.
	carry(from *Agent, x arrival) carried
	// announce lets the loops that miss devices offer them again.
	announce()
}

// arrivalWithin bounds how long the new namespace's loop waits for the device's own events.
const arrivalWithin = 10 * time.Second

// maxLeft bounds how many devices that left are remembered for claims that come behind them.
const maxLeft = 256

// movedID is the ID of the journal's entry for a device that went to a place. One can have gone on from there, and
// another one come, while the first is still told of or handed on.
func (a *Agent) movedID(p routes.Place) string {
	for n := 1; ; n++ {
		id := fmt.Sprintf("moved/%d/%d/%d", p.Netnsid, p.Index, n)
		if a.st.moved[id] == nil {
			return id
		}
	}
}

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
	return d.same(l) && (sameName(l.Name, d.Name) || sameName(l.Name, d.There) || l.Index == d.Index || d.Kind == "" && d.PermAddr != "")
}

// nicKey is by what a NIC is known in whatever namespace, empty for other devices and the loopback.
func nicKey(l *routes.Link) string {
	addr := cmp.Or(l.PermAddr, l.HardwareAddr)
	if l.Kind != "" || l.Type == unix.ARPHRD_LOOPBACK || strings.Trim(addr, "0:") == "" {
		return ""
	}
	return addr
}

func (d *movedDevice) nicKey() string {
	return nicKey(&routes.Link{Kind: d.Kind, PermAddr: d.PermAddr, HardwareAddr: d.Addr})
}

// A leftDevice is one that left the namespace of late, to the zero place if it was deleted.
type leftDevice struct {
	link *routes.Link
	to   routes.Place
}

// movedFrom is a device that left, with no claims yet.
func movedFrom(l *routes.Link, to routes.Place) movedDevice {
	return movedDevice{To: to, Index: l.Index, Name: l.Name, Kind: l.Kind, IfID: l.IfID, Addr: l.HardwareAddr, PermAddr: l.PermAddr}
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

// ours reports whether anything of ours can be left on the device.
func (d *movedDevice) ours() bool { return len(d.Features) > 0 || d.MTU != nil }

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
	a.offerAgain(false)
}
