package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"pgregory.net/rapid"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// genStep draws what changes in one step, and how often.
func (f *followed) genStep(t *rapid.T) []string {
	m := &maker{t: t, v6: isV6(f.text), devices: []string{"eth0", "eth1", "xfrm0"}}
	if strings.Contains(f.text, " tun0 ") {
		m.devices = []string{"tun0", "tun0v", "tun1", "vti0", "eth0"}
	}
	if m.some("apply", 2) {
		m.line("apply %s", m.of("what", "", "", "", "clones", "locks", "rules"))
	}
	for range []int{1, 1, 1, 2, 4}[m.num("changes", 0, 4)] {
		m.change()
	}
	return m.lines
}

// change draws a change.
func (m *maker) change() {
	switch m.num("change", 0, 20) {
	case 0:
		m.route()
	case 1:
		m.wayThrough()
	case 2, 3:
		m.line("unroute %d", m.num("which", 0, 11))
	case 4:
		n := len(m.lines)
		m.route()
		m.lines[n] = "replace " + m.lines[n]
	case 5:
		m.policy(m.num("policy", 1, 8))
	case 6:
		m.plain(m.num("policy", 1, 8))
	case 7, 8:
		m.line("unpolicy %d %s", m.num("policy", 1, 8), m.of("lingers", "", "", "at-once"))
	case 9:
		m.line("quiet %d", m.num("policy", 0, 8)) // 0: all
	case 10, 11:
		m.sa(m.num("SA", 1, 8))
	case 12:
		m.line("%s %d", m.of("death", "dying", "unsa"), m.num("SA", 1, 8))
	case 13, 14, 15, 16, 17, 18:
		m.rare()
	case 19:
		m.line("peer %s %s", m.peer("peer"), m.of("mtu", "1300", "1400", "1480"))
	case 20:
		m.line("last %d %s", m.num("policy", 1, 8), m.of("mtu", "1446", "1300"))
	}
}

// wayThrough is a route that leaves by xfrm interfaces, or by one and something else.
func (m *maker) wayThrough() {
	one := func() string {
		return m.of("way", "dev xfrmx encap if_id 7", "dev xfrmx encap if_id 8", "dev xfrm0", "dev xfrm1", "dev eth0")
	}
	l := fmt.Sprintf("route %s table %s ", m.dst("dst"), m.table())
	if m.some("several", 3) {
		m.line("%snexthop %s nexthop %s", l, one(), one())
		return
	}
	m.line("%s%s", l, one())
}

// rare draws what seldom happens, much of which concerns everything.
func (m *maker) rare() {
	switch m.num("rare", 0, 13) {
	case 0:
		m.rule()
	case 1:
		m.line("unrule %d", m.num("which", 0, 5))
	case 2:
		m.line("resync %s", m.of("source", "routes", "xfrm"))
	case 3:
		m.line("lost %s", m.of("source", "routes", "xfrm"))
	case 4:
		m.line("%s", m.of("forwarding", "forwarding", "noforwarding"))
	case 5:
		m.line("withhold %d", m.num("which", 0, 3))
	case 6:
		m.line("unwithhold")
	case 7:
		m.line("nexthop %s", m.of("way", "eth0", "eth1"))
	case 8:
		m.line("features %s tx-tcp-segmentation %s", m.of("dev", "xfrm0", "eth1"), m.of("state", "on", "off", "fixed", "on-fixed"))
	case 9:
		m.line("link 3 eth1 mtu %s %s", m.of("mtu", "1500", "1400", "9000"), m.of("state", "", "down"))
	case 10:
		m.line("pause")
	case 11:
		m.line("forget %d", m.num("which", 0, 3))
	case 12:
		m.line("default %s", m.of("default", "block", "accept"))
	case 13:
		m.line("unnexthop")
	}
}

// do makes one change: a line of a world, or one of those that take something away.
func (f *followed) do(what string, w *words) error {
	if what != "apply" {
		f.steps = Steps{} // those were for what was there
	}
	switch what {
	case "apply":
		return f.applySome(w)
	case "replace":
		f.replacing = true
		defer func() { f.replacing = false }()
		return f.line(w.next(), w)
	case "unroute":
		return f.unroute(w.num())
	case "unrule":
		return f.unrule(w.num())
	case "unpolicy":
		f.unpolicy(xfrmwatch.PolicyIndex(w.num()), w.is("at-once"))
	case "quiet":
		index := xfrmwatch.PolicyIndex(w.num())
		f.gone = slices.DeleteFunc(slices.Clone(f.gone), func(c xfrmwatch.Coverage) bool { return index == 0 || c.ID.Policy == index })
	case "dying", "unsa":
		f.unsa(what, xfrmwatch.SPI(w.num()))
	case "pause":
		return f.pause()
	case "resync", "lost":
		return f.reread(what, w.next())
	case "noforwarding":
		f.forwarding = map[routes.Family]bool{}
	case "withhold":
		if n := w.num(); n < len(f.shapes) {
			f.withheld[f.shapes[n]] = "the kernel's lookup says something else"
		}
	case "unwithhold":
		clear(f.withheld)
	case "nexthop":
		f.fib.Apply(routes.NexthopSet{Nexthop: &routes.NexthopObject{ID: 5, Family: routes.IPv4, Oif: f.dev(w)}})
	case "unnexthop":
		f.fib.Apply(routes.NexthopGone{ID: 5})
	case "forget":
		f.forget(w.num())
	case "default":
		def := xfrmwatch.Default{}
		if w.next() == "block" {
			def.Out = xfrmwatch.Block
		}
		f.db.Apply(xfrmwatch.DefaultSet{Default: def})
	case "features", "link":
		f.changes.Devices = true
		return f.line(what, w)
	case "last": // as one that is handed on
		index := xfrmwatch.PolicyIndex(w.num())
		if _, there := f.db.Policy(index); there && f.last[xfrmwatch.CoverageID{Policy: index}] == 0 {
			f.last[xfrmwatch.CoverageID{Policy: index}] = w.num()
			f.changes.Policies = append(f.changes.Policies, index)
		}
		return nil
	default:
		return f.line(what, w)
	}
	return w.end()
}

// unroute takes one of the routes away.
func (f *followed) unroute(n int) error {
	var list []routes.Route
	for _, fam := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, id := range f.fib.Tables(fam) {
			list = append(list, slices.Collect(f.fib.Table(fam, id))...)
		}
	}
	slices.SortStableFunc(list, func(a, b routes.Route) int { return a.Key().Compare(b.Key()) })
	if len(list) > 0 {
		r := list[n%len(list)]
		f.history = append(f.history, "# "+r.Key().String())
		f.fib.Apply(routes.RouteGone{Route: r})
	}
	return nil
}

func (f *followed) unrule(n int) error {
	rules := slices.Concat(f.fib.Rules(routes.IPv4), f.fib.Rules(routes.IPv6))
	if len(rules) > 0 {
		f.fib.Apply(routes.RuleGone{Rule: rules[n%len(rules)]})
	}
	return nil
}

// unpolicy takes a policy away, whose coverages linger if not at once.
func (f *followed) unpolicy(index xfrmwatch.PolicyIndex, atOnce bool) {
	p, ok := f.db.Policy(index)
	if !ok {
		return
	}
	if !atOnce {
		// What lingers is what the last plan knew.
		f.gone = slices.AppendSeq(slices.Clone(f.gone), f.Coverages(index))
	}
	f.db.Apply(xfrmwatch.PolicyGone{Index: p.Index})
}

func (f *followed) unsa(what string, spi xfrmwatch.SPI) {
	for sa := range f.db.SAs() {
		if sa.SPI != spi {
			continue
		}
		if what == "dying" {
			f.db.Apply(xfrmwatch.SADying{Key: sa.Key})
		} else {
			f.db.Apply(xfrmwatch.SAGone{Key: sa.Key})
		}
		return
	}
}

// applySome does what the newest plan says, or a part of it, as the agent does ahead of other changes.
func (f *followed) applySome(w *words) error {
	s := f.steps
	f.steps = Steps{}
	switch {
	case w.is("clones"):
		s = Steps{Clones: s.Clones}
	case w.is("locks"):
		s = Steps{Locks: s.Locks}
	case w.is("rules"):
		s = Steps{AddRules: s.AddRules, DropRules: s.DropRules}
	}
	before := maps.Clone(f.held.Locks)
	defer f.locksChange(before)
	return f.apply(s)
}

// pause gives everything back.
func (f *followed) pause() error {
	before := maps.Clone(f.held.Locks)
	defer f.locksChange(before)
	f.Relook()
	return f.apply(Diff(f.input(), &Plan{}, f.held))
}

// forget drops the claim on a lock, which stays.
func (f *followed) forget(n int) {
	keys := slices.SortedFunc(maps.Keys(f.held.Locks), routes.Key.Compare)
	if n < len(keys) {
		before := maps.Clone(f.held.Locks)
		delete(f.held.Locks, keys[n])
		f.locksChange(before)
	}
}

// reread loses the events of a source, or reads all of it again.
func (f *followed) reread(what, source string) error {
	if source == "xfrm" {
		if what == "lost" {
			f.db.Apply(xfrmwatch.Lost{})
			return nil
		}
		policies, sas := slices.Collect(f.db.Policies()), slices.Collect(f.db.SAs())
		def := f.db.Default()
		f.db.Apply(xfrmwatch.ResyncBegin{})
		f.db.Apply(xfrmwatch.DefaultSet{Default: def})
		for _, p := range slices.Backward(policies) {
			f.db.Apply(xfrmwatch.PolicySet{Policy: p, Dumped: true})
		}
		for _, sa := range sas {
			f.db.Apply(xfrmwatch.SASet{SA: sa, Dumped: true})
		}
		f.db.Apply(xfrmwatch.ResyncEnd{})
		return nil
	}
	if what == "lost" {
		f.fib.Apply(routes.Lost{})
		return nil
	}
	var events []routes.Event
	for _, l := range f.fib.Links() {
		events = append(events, routes.LinkSet{Link: l})
	}
	for _, o := range f.fib.Nexthops() {
		events = append(events, routes.NexthopSet{Nexthop: o})
	}
	for _, fam := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, r := range f.fib.Rules(fam) {
			events = append(events, routes.RuleSet{Rule: r})
		}
		for _, id := range f.fib.Tables(fam) {
			for r := range f.fib.Table(fam, id) {
				events = append(events, routes.RouteSet{Route: r, Append: true})
			}
		}
	}
	f.fib.Apply(routes.ResyncBegin{})
	for _, ev := range events {
		f.fib.Apply(ev)
	}
	f.fib.Apply(routes.ResyncEnd{})
	return nil
}
