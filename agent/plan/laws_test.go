package plan

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"tsoagent/lane"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// laws checks all that docs/how-it-decides.md promises of a plan for one world, with packets drawn from rng.
// The error says which promise is broken.
func laws(w *world, rng *rand.Rand, packets int) error {
	in := w.input()
	pl := Make(in)
	if diff := cmp.Diff(pl, Make(in), comparePlans...); diff != "" {
		return fmt.Errorf("the same input gives another plan (-first +second):\n%s", diff)
	}
	steps := Diff(in, pl, w.held)
	with := w.clone()
	if err := with.apply(steps); err != nil {
		return err
	}
	if err := structure(with, pl); err != nil {
		return err
	}
	without := w.clone()
	if err := without.apply(Diff(in, &Plan{}, w.held)); err != nil {
		return err
	}
	for _, p := range w.packets(rng, packets) {
		if err := judgePacket(without, with, pl, p); err != nil {
			return fmt.Errorf("%s\n\t%w", p, err)
		}
	}
	if err := holdsOnlyWhatIsCovered(without, pl); err != nil {
		return err
	}
	return settles(without, with, pl)
}

var comparePlans = []cmp.Option{
	cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}),
	cmp.Comparer(func(a, b *routes.Rule) bool { return a == nil && b == nil || a != nil && b != nil && *a == *b }),
	cmp.Comparer(func(a, b *routes.Body) bool { return a == b || a != nil && b != nil && routes.EqualButMTU(a, b) }),
	cmp.Comparer(func(a, b *xfrmwatch.Policy) bool { return a.Equal(b) }),
	cmpopts.EquateEmpty(),
	cmpopts.IgnoreUnexported(Plan{}),
	cmp.Transformer("Shape", func(sh Shape) plainShape {
		return plainShape{sh.ID, sh.Base, sh.Table, sh.Rules, slices.Collect(sh.Clones())}
	}),
}

// plainShape is a shape with its clones.
type plainShape struct {
	ID     ShapeID
	Base   *routes.Rule
	Table  routes.TableID
	Rules  []routes.Rule
	Clones []Clone
}

// structure checks the rules: few, directly ahead of their bases, the others in their order.
func structure(w *world, pl *Plan) error {
	cfg := w.cfg.WithDefaults()
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		n := 0
		rules := w.fib.Rules(f)
		seen := map[uint32]bool{}
		for i, r := range rules {
			if !cfg.OwnRule(r) {
				continue
			}
			n++
			if seen[r.Priority] {
				return fmt.Errorf("two rules of ours with priority %d", r.Priority)
			}
			seen[r.Priority] = true
			if i > 0 && rules[i-1].Priority == r.Priority {
				return fmt.Errorf("rule %d of ours has the priority of another one", r.Priority)
			}
			for _, sh := range pl.Shapes {
				if !slices.Contains(sh.Rules, *r) {
					continue
				}
				next := rules[i+1:]
				at := slices.IndexFunc(next, func(o *routes.Rule) bool { return !cfg.OwnRule(o) })
				if at < 0 || *next[at] != *sh.Base {
					return fmt.Errorf("rule %d is not directly ahead of its base %d", r.Priority, sh.Base.Priority)
				}
			}
		}
		if n > MaxRules {
			return fmt.Errorf("%d rules of ours for %s", n, f)
		}
	}
	return onePass(w, pl)
}

// onePass: no packet passes two lanes, one below the other.
func onePass(w *world, pl *Plan) error {
	for _, upper := range pl.Lanes {
		for _, lower := range pl.Lanes {
			if !w.passes(w.fib.Link(routes.Ifindex(upper.Index)), routes.Ifindex(lower.Index)) {
				continue
			}
			for _, m := range upper.Matches {
				if slices.ContainsFunc(lower.Matches, func(o lane.Match) bool { return laneMeets(m, o) }) {
					return fmt.Errorf("%s passes the lanes of %s and %s", m, upper.Name, lower.Name)
				}
			}
		}
	}
	return nil
}

// passes reports whether some of what leaves by a device passes another one below it as it is.
func (w *world) passes(l *routes.Link, lower routes.Ifindex) bool {
	return slices.ContainsFunc(w.fib.Links(), func(b *routes.Link) bool {
		directly := (l.Kind == "bond" || l.Kind == "team") && b.Master == l.Index || (l.Kind == "macvlan" || l.Kind == "ipvlan") && b.Index == l.Parent
		return directly && (b.Index == lower || w.passes(b, lower))
	})
}

// judgePacket compares where a packet goes, and with which MTU, with and without the plan.
func judgePacket(w, with *world, pl *Plan, p packet) error {
	before, after := w.lookup(p), with.lookup(p)
	if !before.sameWay(after) {
		return fmt.Errorf("goes another way: %s\n\tinstead of: %s", after, before)
	}
	if before.route.Body == nil {
		return nil
	}
	have, own := routes.MTUMetricOf(after.route.Body), routes.MTUMetricOf(before.route.Body)
	cloned := with.cfg.WithDefaults().OwnRoute(after.route)
	locked := slices.ContainsFunc(pl.Locks, func(l Lock) bool { return l.Route.Key() == after.route.Key() })
	fates := w.fates(p, before.route)
	if !cloned && !locked {
		if have != own {
			return fmt.Errorf("has %s and no lock of ours, the owner set %s", have, own)
		}
		return noSilence(w, pl, p, before, fates)
	}
	if cloned && IsCopy(after.route.Body) {
		if p.oif == "" && !before.route.Body.Src.IsValid() || have != own {
			return fmt.Errorf("%s by a copy for what is bound to a device, the owner set %s", have, own)
		}
		return noSilence(w, pl, p, before, fates)
	}
	if path := w.pathMTU(before.route); int(have.MTU) >= path {
		return fmt.Errorf("%s on a route with %d: %s", have, path, after)
	}
	if p.family == routes.IPv6 && have.MTU < 1280 {
		return fmt.Errorf("%s on IPv6", have)
	}
	if have.Locked != (with.cfg.MTU != MTUAdvise) {
		return fmt.Errorf("%s in mode %q", have, with.cfg.MTU)
	}
	if cloned {
		if err := advmss(before.route, after.route); err != nil {
			return err
		}
		if sourceLess(after.rule) {
			if with.cfg.SourceLess == ServeOff || !with.forwarding[p.family] {
				return fmt.Errorf("lookups without a source are served: %s", after)
			}
			return nil
		}
	}
	if outer(w, p) {
		return fmt.Errorf("%s for the outer packets of a tunnel: %s", have, after)
	}
	for _, f := range fates {
		switch f.kind {
		case dropped:
			continue
		case uncovered:
			if cloned && p.oif != "" && p.family == routes.IPv6 {
				continue // a socket bound to a device passes over throws, to a wider clone of its own route (docs/limits.md)
			}
			return fmt.Errorf("%s for a packet that no policy covers: %s", have, after)
		case unknown:
			return fmt.Errorf("%s by a device that is not understood: %s", have, after)
		}
		want := w.expected(f, before.route, cloned)
		if want == 0 && f.cov.Larval && w.last[f.cov.ID] == 0 {
			continue // no such packet passes before there is an SA
		}
		if cloned && p.oif != "" {
			continue // a socket bound to a device passes over narrower clones by others (docs/limits.md)
		}
		// What flows that never enter a tunnel have left by themselves is right for them, whatever others have.
		if want != int(have.MTU) && w.expected(f, before.route, true) != int(have.MTU) {
			return fmt.Errorf("%s for policy %d, not %d: %s", have, f.cov.ID.Policy, want, after)
		}
	}
	return nil
}

// sourceLess says that a rule of ours serves lookups without a source; it takes more than
// covered traffic, as documented.
func sourceLess(r *routes.Rule) bool {
	return r.Iif == "lo" || r.Src == netip.PrefixFrom(netip.IPv4Unspecified(), 32)
}

func advmss(before, after routes.Route) error {
	header := uint32(40)
	if after.Body.Family == routes.IPv6 {
		header = 60
	}
	want := after.Body.Metrics.MTU - header
	if own := before.Body.Metrics.AdvMSS; own != 0 {
		want = min(want, own)
	}
	if after.Body.Metrics.AdvMSS != want {
		return fmt.Errorf("advmss %d, not %d: %s", after.Body.Metrics.AdvMSS, want, after.Key())
	}
	return nil
}

// outer says that the packet is to be taken for an outer packet of a tunnel, which no policy
// sees: protocol ESP, from the tunnel's own end (or looked up without a source, as for the
// peer's MTU) to its peer, through a device of the outside.
func outer(w *world, p packet) bool {
	if p.iif != "lo" || p.oif != "" || p.proto != 50 && p.src.IsValid() {
		return false
	}
	o := w.lookup(p)
	if o.route.Body == nil || slices.ContainsFunc(o.route.Body.Nexthops, func(n routes.Nexthop) bool { return w.fib.Link(n.Oif).Kind == "xfrm" }) {
		return false
	}
	for c := range w.db.Coverages() {
		for _, st := range c.Steps {
			for _, sa := range st.SAs {
				if st.Template.Mode == xfrmwatch.Tunnel && sa.Dst == p.dst && p.mark == sa.OutputMark.Value&sa.OutputMark.Mask &&
					(!p.src.IsValid() || p.src == sa.Src) {
					return true
				}
			}
		}
	}
	return false
}

// noSilence: a packet that is covered, and whose route would need a lock, has one, or the
// verdict says why not.
func noSilence(w *world, pl *Plan, p packet, before outcome, fates []fate) error {
	if p.oif != "" || w.vrfOf(p) != 0 || !p.src.IsValid() || w.cfg.MTU == MTUOff {
		return nil
	}
	for _, f := range fates {
		if f.kind != covered || w.expected(f, before.route, false) == 0 && w.expected(f, before.route, true) == 0 {
			continue
		}
		v := verdictOf(pl, f.cov.ID)
		if v == nil {
			return fmt.Errorf("no verdict for policy %d", f.cov.ID.Policy)
		}
		if len(v.Notes) == 0 {
			return fmt.Errorf("covered by policy %d without a lock, and the verdict does not say why: %s", f.cov.ID.Policy, before)
		}
	}
	return nil
}

func verdictOf(pl *Plan, id xfrmwatch.CoverageID) *Verdict {
	for i := range pl.Verdicts {
		if pl.Verdicts[i].Key == nil && pl.Verdicts[i].ID == id {
			return &pl.Verdicts[i]
		}
	}
	return nil
}

// holdsOnlyWhatIsCovered tries every packet that can leave by a device with a hold.
func holdsOnlyWhatIsCovered(w *world, pl *Plan) error {
	held := map[routes.Ifindex]bool{}
	for _, h := range pl.Holds {
		i := routes.Ifindex(h.Device.Index)
		if strings.Contains(string(h.Feature), "esp") {
			if err := holdsOnlyWhatAPortLacks(w, h); err != nil {
				return err
			}
			continue // it is nobody's but ESP's
		}
		// A shared NIC may be held where the configuration says so.
		held[i] = w.cfg.WithDefaults().SharedMode(h.Device.Name) != SharedOff
		st, ok := w.features[i].Get(h.Feature)
		if !ok || !st.Changeable {
			return fmt.Errorf("hold on %s %s, which is %s", h.Device.Name, h.Feature, st)
		}
		if w.cfg.WithDefaults().dedicated(h.Device.Name) == Keep {
			return fmt.Errorf("hold on %s, which is to be kept", h.Device.Name)
		}
		if len(h.Because)+len(h.Keys) == 0 {
			return fmt.Errorf("hold on %s without a cause", h.Device.Name)
		}
		for _, id := range h.Because {
			if v := verdictOf(pl, id); v == nil || v.Maybe {
				return fmt.Errorf("hold on %s because of policy %d, whose templates are optional", h.Device.Name, id.Policy)
			}
		}
	}
	if len(held) == 0 {
		return nil
	}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, p := range w.everyPacket(f) {
			o := w.lookup(p)
			if o.route.Body == nil {
				continue
			}
			for i, ft := range w.fates(p, o.route) {
				if ft.kind == dropped || ft.kind == covered && !ft.cov.Maybe || ft.under || !held[o.route.Body.Nexthops[i].Oif] {
					continue
				}
				if ft.kind == unknown && w.wrapped(p, w.fib.Link(o.route.Body.Nexthops[i].Oif)).kind != uncovered {
					continue // what a lightweight tunnel adds, the device still wraps
				}
				// An xfrm interface drops what no policy for its if_id takes, and one in external mode what
				// comes without an if_id (xfrmi_xmit2, net/xfrm/xfrm_interface_core.c).
				if l := w.fib.Link(o.route.Body.Nexthops[i].Oif); l.Kind != "xfrm" {
					return fmt.Errorf("%s\n\tleaves uncovered by %s, which is held: %s", p, l.Name, o)
				}
			}
		}
	}
	return nil
}

// settles: once applied, there is nothing more to do, the plan stays, a stale mirror gives
// nothing back, and an empty plan gives everything back.
func settles(w, with *world, pl *Plan) error {
	for id, mtu := range pl.MTU {
		with.last[id] = mtu
	}
	in := with.input()
	again := Make(in)
	if diff := cmp.Diff(pl, again, comparePlans...); diff != "" {
		return fmt.Errorf("the plan changes once it is applied (-first +second):\n%s", diff)
	}
	if s := Diff(in, again, with.held); !s.Empty() {
		return fmt.Errorf("there are still steps to take: %+v", s)
	}
	with.db.Apply(xfrmwatch.Lost{})
	if s := Diff(in, &Plan{}, with.held); !s.Empty() {
		return fmt.Errorf("given back although the policies may be stale: %+v", s)
	}
	with.db.Apply(xfrmwatch.ResyncBegin{})
	unlose(w.db)
	with.fib.Apply(routes.Lost{})
	if s := Diff(in, &Plan{}, with.held); !s.Empty() {
		return fmt.Errorf("given back although the routes may be stale: %+v", s)
	}
	with = with.clone()
	if err := with.apply(Diff(with.input(), &Plan{}, with.held)); err != nil {
		return err
	}
	if diff := cmp.Diff(strings.Split(w.state(), "\n"), strings.Split(with.state(), "\n")); diff != "" {
		return fmt.Errorf("not as before (-before +after):\n%s", diff)
	}
	for i, f := range w.features {
		if !f.Equal(with.features[i]) {
			return fmt.Errorf("features of %s not as before", f.Name)
		}
	}
	return nil
}

// unlose ends a dump that found all that was there.
func unlose(db *xfrmwatch.DB) {
	var events []xfrmwatch.Event
	for p := range db.Policies() {
		events = append(events, xfrmwatch.PolicySet{Policy: p})
	}
	for sa := range db.SAs() {
		events = append(events, xfrmwatch.SASet{SA: sa})
	}
	events = append(events, xfrmwatch.DefaultSet{Default: db.Default()})
	db.Apply(xfrmwatch.ResyncBegin{})
	for _, ev := range events {
		db.Apply(ev)
	}
	db.Apply(xfrmwatch.ResyncEnd{})
}
