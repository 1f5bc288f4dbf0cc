package agent

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// The kinds of journal entries.
const (
	kindHold   journal.Kind = "feature"
	kindLock   journal.Kind = "route"
	kindTables journal.Kind = "tables"
	kindMTU    journal.Kind = "mtu"
)

// rememberedMTU is the journal's entry for the last valid inner MTU of a coverage, so that it
// survives a restart while an SA is missing. The rest tells the policy from another one that
// got its index.
type rememberedMTU struct {
	Policy   xfrmwatch.PolicyIndex `json:"policy"`
	Peer     netip.Addr            `json:"peer,omitzero"`
	Selector xfrmwatch.Selector    `json:"selector"`
	Mark     xfrmwatch.Mark        `json:"mark"`
	IfID     uint32                `json:"if_id"`
	MTU      int                   `json:"mtu"`
}

func (m rememberedMTU) id() xfrmwatch.CoverageID {
	return xfrmwatch.CoverageID{Policy: m.Policy, Peer: m.Peer}
}

func mtuID(id xfrmwatch.CoverageID) string { return fmt.Sprintf("mtu/%d/%s", id.Policy, id.Peer) }

// heldFeature is the journal's entry for a hold.
type heldFeature struct {
	plan.HoldClaim
	Feature ethtool.Feature `json:"feature"`
}

// lockedRoute is the journal's entry for an in-place lock, with both versions of the route.
type lockedRoute struct {
	Family   routes.Family  `json:"family"`
	Table    routes.TableID `json:"table"`
	Dst      netip.Prefix   `json:"dst"`
	Src      netip.Prefix   `json:"src,omitzero"`
	TOS      uint8          `json:"tos,omitempty"`
	Priority uint32         `json:"metric,omitempty"`
	Claim    plan.LockClaim `json:"claim"`
	Owner    []byte         `json:"owner,omitempty"`   // the RTM_NEWROUTE payload as the owner had it
	Written  []byte         `json:"written,omitempty"` // the one that we wrote
	// Stale is what an earlier write of ours made of the route when Owner stood there. While the kernel has that, Owner is not back yet.
	Stale []byte `json:"stale,omitempty"`
}

func (l lockedRoute) key() routes.Key {
	return routes.Key{Family: l.Family, Table: l.Table, Dst: l.Dst, Src: l.Src, TOS: l.TOS, Priority: l.Priority}
}

// ownTables is the journal's entry for our tables and rules: the numbers by which they are
// found, should the configuration have changed since.
type ownTables struct {
	Table    routes.TableID  `json:"table"`
	Protocol routes.Protocol `json:"protocol"`
}

func holdID(k plan.HoldKey) string { return fmt.Sprintf("feature/%d/%s", k.Index, k.Feature) }

func lockID(k routes.Key) string {
	return fmt.Sprintf("route/%d/%d/%s/%s/%d/%d", k.Family, k.Table, k.Dst, k.Src, k.TOS, k.Priority)
}

func entry(id string, kind journal.Kind, data any) journal.Entry {
	b, err := json.Marshal(data)
	if err != nil { // only values of our own types come here
		b = nil
	}
	return journal.Entry{ID: id, Kind: kind, Data: b}
}

func (a *Agent) tablesEntry() journal.Entry {
	return entry("tables", kindTables, ownTables{a.cfg.Plan.Table, a.cfg.Plan.Protocol})
}

// bookTables has the journal hold the entry of our tables. It is made once, and not again for each clone.
func (a *Agent) bookTables() error {
	if a.st.tablesBooked {
		return nil
	}
	err := a.journal.Put(a.tablesEntry())
	a.st.tablesBooked = err == nil
	return err
}

func (a *Agent) claimOf(h plan.Hold) plan.HoldClaim {
	c := plan.HoldClaim{Device: h.Device, Was: true}
	if l := a.st.fib.Link(routes.Ifindex(h.Device.Index)); l != nil {
		c.PermAddr, c.NIC = l.PermAddr, l.PermAddr != "" && nicKey(l) != ""
	}
	return c
}

func (a *Agent) holdEntries(holds []plan.Hold) []journal.Entry {
	out := make([]journal.Entry, 0, len(holds))
	for _, h := range holds {
		k := plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}
		out = append(out, entry(holdID(k), kindHold, heldFeature{a.claimOf(h), h.Feature}))
	}
	return out
}

func (a *Agent) lockEntries(locks []plan.Lock) []journal.Entry {
	out := make([]journal.Entry, 0, len(locks))
	for _, l := range locks {
		out = append(out, entry(lockID(l.Route.Key()), kindLock, a.lockRecord(l)))
	}
	return out
}

func (a *Agent) lockRecord(l plan.Lock) lockedRoute {
	k := l.Route.Key()
	// Prev is what is in place if we die ahead of the write: after a crash that can be the
	// claim's own Prev.
	prev := a.st.locks[k].Ours
	if have := routes.MTUMetricOf(l.Route.Body); a.st.locks[k].Wrote(have) {
		prev = have
	}
	rec := lockedRoute{
		Family: k.Family, Table: k.Table, Dst: k.Dst, Src: k.Src, TOS: k.TOS, Priority: k.Priority,
		Claim: plan.LockClaim{Was: l.Owner, Ours: l.Want, Prev: prev},
	}
	rec.Owner, _ = routes.EncodeLock(l.Route, l.Owner)
	rec.Written, _ = routes.EncodeLock(l.Route, l.Want)
	return rec
}

// unbook takes entries out of the journal after they were undone.
func (a *Agent) unbook(ids ...string) {
	if a.cfg.Mode == Observe {
		return // it undoes nothing
	}
	if err := a.journal.Remove(ids...); err != nil {
		a.failed("journal entry can't be removed", err, "entry", strings.Join(ids, " "))
	}
}

// claims counts what is ours to give back, but for rules and clones.
func (a *Agent) claims() int {
	n := len(a.st.holds) + len(a.st.locks) + len(a.st.lanes.booked)
	for _, c := range a.st.mtus {
		if c.Theirs == 0 {
			n++
		}
	}
	if a.st.clamps.booked {
		n++
	}
	return n
}

// adopt takes over what an earlier run left in the journal. Nothing is touched: the first plan
// decides what stays.
func (a *Agent) adopt(found *journal.Recovery) {
	if found == nil {
		return
	}
	for _, e := range found.Entries {
		if err := a.adoptEntry(e); err != nil {
			a.findings = append(a.findings, fmt.Sprintf("journal entry %s can't be used: %v", e.ID, err))
		}
	}
	if found.Torn > 0 {
		a.findings = append(a.findings, fmt.Sprintf("writes to the journal that were cut short: %d; the kernel was not touched for them", found.Torn))
	}
	if n := len(found.Foreign); n > 0 {
		a.findings = append(a.findings, plural(n, "journal entry belongs to another boot or network namespace and is left alone", "journal entries belong to another boot or network namespace and are left alone"))
	}
	a.findings = append(a.findings, found.Problems...)
	for _, f := range a.findings {
		a.log.Warn("journal", "finding", f)
	}
	if n := len(a.st.holds) + len(a.st.locks); n > 0 {
		a.log.Info("adopted from an earlier run", "holds", len(a.st.holds), "locks", len(a.st.locks))
	}
}

func (a *Agent) adoptEntry(e journal.Entry) error {
	switch e.Kind {
	case kindHold:
		var h heldFeature
		if err := json.Unmarshal(e.Data, &h); err != nil {
			return err
		}
		a.st.hold(plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}, h.HoldClaim)
	case kindLock:
		var l lockedRoute
		if err := json.Unmarshal(e.Data, &l); err != nil {
			return err
		}
		a.st.locks[l.key()] = l.Claim
		if len(l.Stale) > 0 {
			a.st.unrepaired = append(a.st.unrepaired, l)
		}
	case kindTables:
		var t ownTables
		if err := json.Unmarshal(e.Data, &t); err != nil {
			return err
		}
		a.st.tables = &t
	case kindMTU:
		var m rememberedMTU
		if err := json.Unmarshal(e.Data, &m); err != nil {
			return err
		}
		a.st.adopted = append(a.st.adopted, m)
	case kindClamp:
		a.st.clamps.booked = true
	case kindLane:
		var l laneRecord
		if err := json.Unmarshal(e.Data, &l); err != nil {
			return err
		}
		a.st.lanes.booked[l.Index] = true
	case kindMoved:
		return a.adoptMoved(e)
	case kindDeviceMTU:
		return a.adoptMTU(e)
	default:
		return fmt.Errorf("unknown kind %q", e.Kind)
	}
	return nil
}

// recallMTUs takes over the last valid MTUs of policies that are still there.
func (a *Agent) recallMTUs() {
	for _, m := range a.st.adopted {
		p, ok := a.st.db.Policy(m.Policy)
		if ok && p.Selector == m.Selector && p.Mark == m.Mark && p.IfID == m.IfID {
			a.st.lasts(m.id(), m.MTU)
			a.st.booked[m.id()] = m.MTU
		} else {
			a.unbook(mtuID(m.id()))
		}
	}
	a.st.adopted = nil
}

// checkAdopted drops claims that don't hold: on features that are on (the earlier run died
// before it switched them off, or somebody turned them on since), and on devices that are not
// the ones that were held: another one can have got the index. It runs once, before the first
// plan.
func (a *Agent) checkAdopted() {
	a.recallMTUs()
	a.recallMoved()
	a.missHeld()
	if a.writes() {
		a.mendStale()
	}
	for k, c := range a.st.holds {
		if s, ok := a.st.features[routes.Ifindex(k.Index)].Get(k.Feature); ok && s.Wanted {
			a.dropHold(k)
			continue
		}
		l := a.st.fib.Link(routes.Ifindex(k.Index))
		if l == nil || (sameName(l.Name, c.Device.Name) && l.PermAddr == c.PermAddr) || (l.PermAddr != "" && l.PermAddr == c.PermAddr) {
			continue // gone ones are dropped by the first plan
		}
		a.findings = append(a.findings, fmt.Sprintf("device %d is %s now and not %s: its features stay as they are", k.Index, l.Name, c.Device.Name))
		a.dropHold(k)
	}
}

func ids(list []xfrmwatch.CoverageID) string { return causes(list, nil) }

// causes are those who ask for something, in a line of a log.
func causes(list []xfrmwatch.CoverageID, keys []sockopt.Key) string {
	out := causeList(list, keys)
	slices.Sort(out)
	const most = 4
	if len(out) > most {
		out = append(out[:most], fmt.Sprintf("and %d more", len(out)-most))
	}
	return strings.Join(out, ", ")
}

// causeList is never nil.
func causeList(list []xfrmwatch.CoverageID, keys []sockopt.Key) []string {
	out := make([]string, 0, len(list)+len(keys))
	for _, id := range list {
		out = append(out, ids1(id))
	}
	for _, k := range keys {
		out = append(out, k.String())
	}
	return out
}

func ids1(id xfrmwatch.CoverageID) string {
	s := fmt.Sprintf("policy %d", id.Policy)
	if id.Peer.IsValid() {
		s += " to " + id.Peer.String()
	}
	return s
}
