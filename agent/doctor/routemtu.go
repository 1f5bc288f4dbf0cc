package doctor

import (
	"fmt"
	"iter"

	"github.com/gaissmai/bart"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// strongSwanTable is where strongSwan keeps its routes unless it is told otherwise (charon.routing_table).
const strongSwanTable routes.TableID = 220

// setRoute is a route for which somebody has set an MTU or an MSS, with the least that IPsec leaves to its flows.
type setRoute struct {
	routes.Route
	mtu, left int // in bytes; mtu is its owner's, 0 for none
}

// routeMTUs finds routes of covered flows whose owner, a key exchange daemon as a rule, sets another MTU or MSS than IPsec leaves.
func (c *Checkup) routeMTUs(p *Patient) {
	set := p.settings()
	if set.Size() == 0 {
		return
	}
	var found []*setRoute
	at := map[routes.Key]*setRoute{}
	var paths func(*xfrmwatch.SA) (int, bool)
	for i := range p.Plan.Verdicts {
		v := &p.Plan.Verdicts[i]
		if v.Key != nil || v.Gone || v.MTU == 0 || !set.OverlapsPrefix(v.Selector.Dst) {
			continue
		}
		left := 0
		for r := range p.routesOf(v) {
			mtu := p.ownersMTU(r)
			if mtu == 0 && r.Body.Metrics.AdvMSS == 0 {
				continue
			}
			if paths == nil {
				paths = plan.PathsOf(p.Input)
			}
			if left == 0 {
				if left = p.leaves(v, paths); left == 0 {
					break
				}
			}
			s := at[r.Key()]
			if s == nil {
				s = &setRoute{r, mtu, left}
				at[r.Key()] = s
				found = append(found, s)
			}
			s.left = min(s.left, left)
		}
	}
	const most = 16
	more := 0
	for _, s := range found {
		for _, text := range s.disagreements() {
			if more++; more <= most {
				c.found(RouteMTU, text)
			}
		}
	}
	if more > most {
		c.found(RouteMTU, fmt.Sprintf("so it is %d more times", more-most))
	}
}

// settings are the destinations of routes that have an MTU or an MSS of their owner's: few, or none, also where there are a million routes. What none
// of them is near need not be looked at.
func (p *Patient) settings() *bart.Lite {
	set := new(bart.Lite)
	cfg := p.Input.Config.WithDefaults()
	for _, fam := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, table := range p.Input.FIB.Tables(fam) {
			for r := range p.Input.FIB.Table(fam, table) {
				m := &r.Body.Metrics
				if (m.AdvMSS != 0 || m.MTU != 0 && p.ownersMTU(r) != 0) && !cfg.OwnRoute(r) {
					set.Insert(r.Dst)
				}
			}
		}
	}
	return set
}

// routesOf yields the routes that are for the flows of a coverage alone, by their destination, and not ours.
func (p *Patient) routesOf(v *plan.Verdict) iter.Seq[routes.Route] {
	cfg := p.Input.Config.WithDefaults()
	return func(yield func(routes.Route) bool) {
		give := func(r routes.Route) bool {
			return r.Body.Type != routes.Unicast || cfg.OwnRoute(r) || !routes.Contains(v.Selector.Dst, r.Dst) || yield(r)
		}
		if v.IfID != 0 {
			for _, l := range p.Input.FIB.Links() {
				if l.Kind != "xfrm" || l.IfID != v.IfID {
					continue
				}
				keys, _ := p.Input.FIB.DeviceRoutes(l.Index)
				for _, k := range keys {
					if r, n := p.Input.FIB.Get(k); n > 0 && !give(r) {
						return
					}
				}
			}
			return
		}
		flows := routes.Flows{
			Family: routes.Family(v.Selector.Family), Src: v.Selector.Src, Dst: v.Selector.Dst, Proto: uint8(v.Selector.Proto),
			Mark: v.Mark.Value & v.Mark.Mask, Mask: v.Mark.Mask,
		}
		for _, part := range p.Input.FIB.Resolve(flows, cfg.OwnRule) {
			if part.Rule.Action == routes.RuleToTable && part.Rule.Table == routes.TableLocal {
				continue
			}
			all := func(m routes.Match) bool {
				for _, b := range m.Paths.Bodies() {
					if !give(routes.Route{Dst: m.Dst, Body: b}) {
						return false
					}
				}
				return true
			}
			if part.Containing.Paths != nil && !all(part.Containing) {
				return
			}
			for m := range part.Inside {
				if !all(m) {
					return
				}
			}
		}
	}
}

// ownersMTU is the MTU that a route's owner set, in bytes, 0 for none: what it was before our lock, if it has one.
func (p *Patient) ownersMTU(r routes.Route) int {
	have := routes.MTUMetricOf(r.Body)
	if c, ok := p.Input.Locks[r.Key()]; ok && c.Wrote(have) {
		have = c.Was
	}
	return int(have.MTU)
}

// leaves is what IPsec leaves to a coverage whatever its routes say, in bytes, 0 where that isn't known, or where the kernel takes its cost off the
// route's MTU itself (transport mode).
func (p *Patient) leaves(v *plan.Verdict, paths func(*xfrmwatch.SA) (int, bool)) int {
	pol, ok := p.Input.XFRM.Policy(v.ID.Policy)
	if !ok || len(pol.Templates) == 0 || pol.Templates[0].TakesFlow() {
		return 0
	}
	const anyRoute = 1 << 16
	for _, cov := range p.Input.XFRM.Coverage(pol) {
		if cov.ID == v.ID {
			if mtu, status := cov.MTU(paths, anyRoute); status == xfrmwatch.MTUKnown {
				return mtu
			}
		}
	}
	return 0
}

// disagreements say what of the route's settings is other than what is left.
func (s *setRoute) disagreements() []string {
	header := 40 // IP and TCP, without options
	if s.Body.Family == routes.IPv6 {
		header = 60
	}
	var out []string
	say := func(text, setting string) {
		if s.Body.Table == strongSwanTable {
			text += fmt.Sprintf(" (table %d is strongSwan's: charon.plugins.kernel-netlink.%s)", strongSwanTable, setting)
		}
		out = append(out, text)
	}
	switch {
	case s.mtu > s.left:
		say(fmt.Sprintf("route %s has an MTU of %d, and IPsec leaves %d: without a lock larger packets are lost, or sent in pieces", s.Key(), s.mtu, s.left), "mtu")
	case s.mtu != 0 && s.mtu < s.left:
		say(fmt.Sprintf("route %s has an MTU of %d, and IPsec leaves %d: packets are smaller than they need be, and no lock changes that", s.Key(), s.mtu, s.left), "mtu")
	}
	switch mss, fits := int(s.Body.Metrics.AdvMSS), s.left-header; {
	case mss > fits:
		say(fmt.Sprintf("route %s asks peers for an MSS of %d, and IPsec leaves %d", s.Key(), mss, fits), "mss")
	case mss != 0 && mss < fits:
		say(fmt.Sprintf("route %s asks peers for an MSS of %d, and IPsec leaves %d: segments are smaller than they need be", s.Key(), mss, fits), "mss")
	}
	return out
}
