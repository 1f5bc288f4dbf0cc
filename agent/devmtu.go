package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// linkTable is what the loop needs to set the MTU of devices (routes.Table).
type linkTable interface {
	SetLinkMTU(routes.Ifindex, int) error
	ReadLink(routes.Ifindex) (*routes.Link, error)
	ReadLinkAt(routes.Place) (*routes.Link, error)
}

var _ linkTable = (*routes.Table)(nil)

// The kinds of journal entries of what locks and holds are not.
const (
	kindClamp     journal.Kind = "clamp"
	kindDeviceMTU journal.Kind = "device-mtu"
)

// deviceMTU is the journal's entry for a device whose MTU we set.
type deviceMTU struct {
	Index    routes.Ifindex `json:"ifindex"`
	Name     string         `json:"name"`
	Kind     string         `json:"kind,omitempty"`
	IfID     uint32         `json:"if_id,omitempty"`
	PermAddr string         `json:"perm_addr,omitempty"`
	Claim    plan.MTUClaim  `json:"claim"`
}

func (d deviceMTU) is(l *routes.Link) bool {
	return sameName(l.Name, d.Name) || l.Kind == d.Kind && l.IfID == d.IfID && l.PermAddr == d.PermAddr
}

func mtuDeviceID(i routes.Ifindex) string { return fmt.Sprintf("device-mtu/%d", i) }

// adoptMTU takes over the claim on a device's MTU that an earlier run has left.
func (a *Agent) adoptMTU(e journal.Entry) error {
	var d deviceMTU
	if err := json.Unmarshal(e.Data, &d); err != nil {
		return err
	}
	a.st.mtus[d.Index] = d.Claim
	a.st.mtusAdopted = append(a.st.mtusAdopted, d)
	return nil
}

// checkMTUs drops adopted claims on devices that are not those that were set, once, before the
// first plan. Where the earlier run died is known from here on.
func (a *Agent) checkMTUs() {
	for _, d := range a.st.mtusAdopted {
		l := a.st.fib.Link(d.Index)
		switch {
		case l == nil: // the first plan drops it
		case !d.is(l):
			a.findings = append(a.findings, fmt.Sprintf("device %d is %s now and not %s: its MTU stays as it is", d.Index, l.Name, d.Name))
			a.dropMTU(d.Index)
		case l.MTU == d.Claim.Ours && d.Claim.Prev != 0 && d.Claim.Theirs == 0:
			a.bookMTU(l, plan.MTUClaim{Was: d.Claim.Was, Ours: d.Claim.Ours})
		}
	}
	a.st.mtusAdopted = nil
}

// freshenMTUs reads the devices anew whose MTU in the mirror is not the one that we set: an event
// can be older than our own write, which has none of its own. Only what the kernel says now is
// somebody's change.
func (a *Agent) freshenMTUs() {
	if a.links == nil {
		return
	}
	if a.lastP == nil {
		a.checkMTUs()
	}
	for i, c := range a.st.mtus {
		if l := a.st.fib.Link(i); l != nil && c.Theirs == 0 && l.MTU != c.Ours {
			a.st.doubtful[i] = true
		}
	}
	for i := range a.st.doubtful {
		l := a.st.fib.Link(i)
		now, err := a.links.ReadLink(i)
		if err == nil && l != nil && (now.MTU != l.MTU || now.MTU6 != l.MTU6) {
			a.st.fib.Own(routes.LinkSet{Link: now})
		}
	}
	clear(a.st.doubtful)
}

// doubtMTU6 has a link read anew whose event says that IPv6 has a smaller MTU of its own: the event
// of a new MTU is sent before IPv6 hears of it, and there is none after (rtnetlink_event,
// net/core/rtnetlink.c, comes ahead of addrconf_notify, net/ipv6/addrconf.c).
func (a *Agent) doubtMTU6(l *routes.Link) {
	if l.MTU6 != 0 && a.links != nil {
		a.st.doubtful[l.Index] = true
	}
}

// bookMTU notes a claim, in the journal too.
func (a *Agent) bookMTU(l *routes.Link, c plan.MTUClaim) bool {
	rec := deviceMTU{Index: l.Index, Name: l.Name, Kind: l.Kind, IfID: l.IfID, PermAddr: l.PermAddr, Claim: c}
	if a.cfg.Mode == Enforce {
		if err := a.journal.Put(entry(mtuDeviceID(l.Index), kindDeviceMTU, rec)); err != nil {
			a.failed("journal can't be written", err, "device", l.Name)
			return false
		}
	}
	a.st.mtus[l.Index] = c
	return true
}

func (a *Agent) dropMTU(i routes.Ifindex) {
	delete(a.st.mtus, i)
	a.unbook(mtuDeviceID(i))
}

// setMTUs sets the MTU of devices: journal first, then the kernel. It is false if one could not be
// set, so that the locks of its routes stay for now.
func (a *Agent) setMTUs(list []plan.DeviceMTU) bool {
	ok := true
	for _, d := range list {
		ok = a.setMTU(d) && ok
	}
	return ok
}

func (a *Agent) setMTU(d plan.DeviceMTU) bool {
	l, err := a.links.ReadLink(d.Device.Index)
	if err != nil || !sameDevice(l, d.Device) {
		return false // its event is on the way
	}
	if l.MTU != d.Device.MTU { // changed since: the next plan decides
		a.st.fib.Own(routes.LinkSet{Link: l})
		a.again = true
		return false
	}
	failpoint("mtu-journal-before")
	before, had := a.st.mtus[l.Index]
	if !a.bookMTU(l, plan.MTUClaim{Was: d.Was, Ours: d.Want, Prev: l.MTU}) {
		return false
	}
	failpoint("mtu-journal-after")
	if l.MTU != d.Want {
		err = a.links.SetLinkMTU(l.Index, d.Want)
		failpoint("mtu-written")
	}
	now, readErr := a.links.ReadLink(l.Index)
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(readErr, unix.ENODEV):
		return false // its event is on the way, and tells whether it was moved
	case readErr != nil:
		// Written or not: the claim says both, and the event of the write brings the next look.
		a.failed("the device's mtu can't be read back", errors.Join(err, readErr), "device", d.Device.Name, "mtu", d.Want)
		return false
	case now.MTU != d.Want && now.MTU != l.MTU: // somebody's, which the next plan sees
		a.st.fib.Own(routes.LinkSet{Link: now})
		a.again = true
		return false
	case err != nil && now.MTU == l.MTU:
		a.failed("the device's mtu can't be set, its routes are locked", err, "device", d.Device.Name, "mtu", d.Want)
		a.refuseMTU(d, before, had, err)
		return false
	}
	a.st.fib.Own(routes.LinkSet{Link: now})
	a.bookMTU(now, plan.MTUClaim{Was: d.Was, Ours: d.Want})
	a.did("device mtu set", "device", now.Name, "mtu", d.Want, "was", d.Was, "because", ids(d.Because))
	return true
}

// sameDevice reports whether what has a device's index now is that device, as far as the kernel lets it be told. An MTU is set by the index alone.
func sameDevice(now, then *routes.Link) bool {
	return now.Name == then.Name && now.Kind == then.Kind && now.IfID == then.IfID && now.PermAddr == then.PermAddr
}

// refuseMTU leaves a device alone that the kernel does not let us set: it has been read since, and
// has the MTU that it had. What we set earlier stays ours to give back.
func (a *Agent) refuseMTU(d plan.DeviceMTU, before plan.MTUClaim, had bool, err error) {
	if !had {
		a.unbook(mtuDeviceID(d.Device.Index))
		before = plan.MTUClaim{Was: d.Device.MTU, Theirs: d.Device.MTU}
	}
	before.Why = fmt.Sprintf("the kernel refuses: %v", err)
	a.st.mtus[d.Device.Index] = before
	a.again = true
}

// giveMTUs gives devices their owner's MTU back, and forgets what is no longer ours.
func (a *Agent) giveMTUs(s *plan.MTUSteps) {
	for _, y := range s.Yield {
		c := y.Claim
		c.Theirs = y.Device.MTU
		a.bookMTU(y.Device, c)
		a.notice("somebody set the mtu of a device that we had set: it stays", "device", y.Device.Name, "mtu", c.Theirs, "ours", c.Ours)
	}
	for _, i := range s.Drop {
		if l, c := a.st.fib.Link(i), a.st.mtus[i]; l != nil && c.Theirs == 0 && !c.Wrote(l.MTU) {
			a.log.Info("the mtu of a device was changed by somebody else: it stays as it is", "device", l.Name, "mtu", l.MTU)
		}
		a.dropMTU(i)
	}
	for _, b := range s.Back {
		a.giveMTU(b)
	}
}

func (a *Agent) giveMTU(b plan.MTUBack) {
	l, err := a.links.ReadLink(b.Device.Index)
	if err == nil && !sameDevice(l, b.Device) {
		return // its event is on the way
	}
	if err == nil && !b.Claim.Wrote(l.MTU) {
		a.st.fib.Own(routes.LinkSet{Link: l})
		a.again = true // the next plan drops the claim
		return
	}
	if err == nil {
		err = a.links.SetLinkMTU(l.Index, b.Claim.Was)
	}
	switch {
	case errors.Is(err, unix.ENODEV):
		return // its event is on the way, and tells whether it was moved
	case err != nil:
		a.failed("the device's mtu can't be given back", err, "device", b.Device.Name, "mtu", b.Claim.Was)
		return
	}
	failpoint("mtu-given")
	if l, err = a.links.ReadLink(l.Index); err == nil {
		a.st.fib.Own(routes.LinkSet{Link: l})
	}
	a.dropMTU(b.Device.Index)
	a.st.mtusGiven++
	a.did("device mtu given back", "device", b.Device.Name, "mtu", b.Claim.Was)
}

// more are the steps besides those of plan.Steps: device MTUs, and our nftables table.
type more struct {
	mtus  plan.MTUSteps
	stale bool
}

func (a *Agent) moreSteps(in plan.Input, pl *plan.Plan) more {
	a.again = false
	m := more{stale: in.XFRM.Stale() || in.FIB.Stale()}
	if a.goal != restoreStale && a.links != nil {
		m.mtus = plan.DiffMTUs(in, pl)
	}
	return m
}

// setMore does what protects. It is false if something that takes the place of locks is not in
// place.
func (a *Agent) setMore(pl *plan.Plan, m *more, now time.Time) bool {
	ok := a.setMTUs(m.mtus.Set)
	if len(pl.Clamp) > 0 {
		a.setClamps(pl, m.stale, now)
	}
	return ok
}

// dropMore does what gives back.
func (a *Agent) dropMore(pl *plan.Plan, m *more, now time.Time) {
	a.giveMTUs(&m.mtus)
	if len(pl.Clamp) == 0 {
		a.setClamps(pl, m.stale, now)
	}
}

// moreDone reports whether nothing of it is left to do.
func (a *Agent) moreDone(m *more) bool { return m.mtus.Empty() && !a.again && a.clampsDone() }

// mtusNow are the devices whose MTU is set, those of the plan first and in its order; who asks for it is not in them.
func (a *Agent) mtusNow(pl *plan.Plan) []DeviceMTUReport {
	var out []DeviceMTUReport
	for _, d := range pl.DeviceMTUs {
		r := DeviceMTUReport{Device: d.Device.Name, Index: int32(d.Device.Index), MTU: d.Want, Was: d.Was, State: StateWanted, Because: []string{}}
		l := a.st.fib.Link(d.Device.Index)
		if c, ours := a.st.mtus[d.Device.Index]; ours && l != nil && l.MTU == d.Want && c.Ours == d.Want {
			r.State = StateInPlace
		}
		out = append(out, r)
	}
	for i, c := range a.st.mtus {
		if l := a.st.fib.Link(i); c.Theirs != 0 && l != nil {
			why := cmp.Or(c.Why, fmt.Sprintf("somebody set it to %d: it stays", c.Theirs))
			out = append(out, DeviceMTUReport{Device: l.Name, Index: int32(i), MTU: cmp.Or(c.Ours, c.Theirs), Was: c.Was, State: StateContested, Why: why, Because: []string{}})
		}
	}
	return out
}

func (s *snapshot) mtuReports() []DeviceMTUReport {
	for i, d := range s.plan.DeviceMTUs {
		for _, id := range d.Because {
			s.mtus[i].Because = append(s.mtus[i].Because, ids1(id))
		}
	}
	slices.SortFunc(s.mtus, func(a, b DeviceMTUReport) int { return cmp.Compare(a.Device, b.Device) })
	return s.mtus
}
