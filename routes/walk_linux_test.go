package routes

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// outcome is what the mirror says of one packet: the route, or the errno of the lookup. Where it
// makes no claim, unclaimed says why.
type outcome struct {
	unclaimed string
	errno     syscall.Errno
	route     Route
}

func (o outcome) String() string {
	switch {
	case o.unclaimed != "":
		return "no claim: " + o.unclaimed
	case o.errno != 0:
		return o.errno.Error()
	}
	return fmt.Sprintf("%s type %d by %v", o.route.Key(), o.route.Body.Type, o.route.Body.Nexthops)
}

// walk follows one packet through the mirror with what the planner uses: Resolve, and for the
// packets of a VRF Cover of its table, where the first l3mdev rule stands.
func walk(f *FIB, q Query, vrf *Link) outcome {
	fam := FamilyOf(q.Dst)
	src := q.Src
	if !src.IsValid() {
		src = fam.Any().Addr() // what the kernel's own lookup has
	}
	flows := Flows{
		Family: fam, Src: netip.PrefixFrom(src, fam.Bits()), Dst: netip.PrefixFrom(q.Dst, fam.Bits()), Proto: q.IPProto,
		Sport: PortRange{q.Sport, q.Sport}, Dport: PortRange{q.Dport, q.Dport}, Mark: q.Mark, Mask: 1<<32 - 1,
	}
	rules := f.Rules(fam)
	if fam == IPv4 && len(rules) <= 3 {
		local, _ := f.Cover(fam, TableLocal, flows.Dst)
		if main, _ := f.Cover(fam, TableMain, flows.Dst); local.Paths != nil && main.Dst.Bits() > local.Dst.Bits() {
			return outcome{unclaimed: "tables local and main may be one"} // KERNEL.md 67
		}
	}
	at := slices.IndexFunc(rules, func(r *Rule) bool { return r.L3mdev })
	if vrf == nil || at < 0 {
		return decide(f.Resolve(flows, func(*Rule) bool { return false }), nothingSaid)
	}
	l3 := rules[at]
	switch {
	case plainL3mdev(*l3) != *l3:
		return outcome{unclaimed: "a rule for some VRF traffic"}
	case slices.ContainsFunc(rules, func(r *Rule) bool { return r.Action == RuleGoto }):
		return outcome{unclaimed: "goto and VRFs"} // it may lead past the l3mdev rule
	case slices.ContainsFunc(rules, func(r *Rule) bool { return r.L3mdev && r != l3 }):
		return outcome{unclaimed: "several rules for VRFs"}
	}
	ahead := func(r *Rule) bool { return slices.Index(rules, r) < at }
	return decide(f.Resolve(flows, func(r *Rule) bool { return !ahead(r) }), func() outcome {
		m, _ := f.Cover(fam, vrf.VRFTable, flows.Dst)
		return found(m, func() outcome {
			return decide(f.Resolve(flows, ahead), nothingSaid)
		})
	})
}

// plainL3mdev is what the kernel itself adds with the first VRF.
func plainL3mdev(r Rule) Rule {
	return Rule{
		Family: r.Family, Priority: r.Priority, Protocol: r.Protocol, Action: RuleToTable, L3mdev: true,
		SuppressPrefixLen: -1, SuppressIfgroup: -1,
	}
}

func nothingSaid() outcome { return outcome{errno: unix.ENETUNREACH} }

// decide is what the first part says that leaves nothing to the next.
func decide(parts []Part, next func() outcome) outcome {
	if len(parts) == 0 {
		return next()
	}
	p := parts[0]
	switch {
	case p.Blocked != "":
		return outcome{unclaimed: "rule: " + p.Blocked}
	case !p.Whole:
		return outcome{unclaimed: "a part of a single packet"}
	case p.Rule.Action == RuleBlackhole:
		return outcome{errno: unix.EINVAL}
	case p.Rule.Action == RuleUnreachable:
		return outcome{errno: unix.ENETUNREACH}
	case p.Rule.Action == RuleProhibit:
		return outcome{errno: unix.EACCES}
	}
	return found(p.Containing, func() outcome { return decide(parts[1:], next) })
}

// found is what the routes of a table say.
func found(m Match, next func() outcome) outcome {
	if m.Paths == nil {
		return next()
	}
	if m.SourceSpecific() {
		return outcome{unclaimed: "routes for some sources"}
	}
	if m.TOSSpecific() {
		return outcome{unclaimed: "routes for some TOS"}
	}
	if m.Tied() {
		return outcome{unclaimed: "tied IPv6 routes"}
	}
	r, ok := m.First()
	if !ok {
		return outcome{unclaimed: "all nexthops are dead"}
	}
	switch r.Body.Type {
	case Throw:
		return next()
	case Blackhole:
		return outcome{errno: unix.EINVAL}
	case Unreachable:
		return outcome{errno: unix.EHOSTUNREACH}
	case Prohibit:
		return outcome{errno: unix.EACCES}
	}
	return outcome{route: r}
}

// differs compares the mirror's outcome with the kernel's answers, of the packet and (match) of
// the route, and says in what they differ.
func (o outcome) differs(ans, match Answer, err error) string {
	var errno syscall.Errno
	if err != nil && !errors.As(err, &errno) {
		return err.Error()
	}
	switch b := o.route.Body; {
	case errno != o.errno:
		return fmt.Sprintf("the kernel says errno %d, not %d (%v)", errno, o.errno, err)
	case errno != 0:
		return ""
	// The kernel calls table local main until the first rule is added (KERNEL.md 67).
	case ans.Table != b.Table && (b.Family != IPv4 || b.Table != TableLocal || ans.Table != TableMain):
		return fmt.Sprintf("table %d", ans.Table)
	case ans.Type != b.Type:
		return fmt.Sprintf("type %d", ans.Type)
	case match.Route.Dst != o.route.Dst || match.Route.Body.Priority != b.Priority || match.Route.Body.NHID != b.NHID:
		return fmt.Sprintf("route %s with object %d", match.Route.Key(), match.Route.Body.NHID)
	// Each way of an IPv6 route has metrics of its own, of which only the first's are shown (KERNEL.md 70), and
	// routes by one nexthop object share what was looked up (58).
	case ans.MTU != b.Metrics.MTU && ans.PMTU == 0 && b.NHID == 0 && (b.Family == IPv4 || len(b.Nexthops) < 2):
		return fmt.Sprintf("mtu %d", ans.MTU)
	case b.Type != Unicast: // by the loopback device or the VRF
		return ""
	case !slices.ContainsFunc(b.Nexthops, func(n Nexthop) bool {
		// A gateway behind a local route is no gateway: the packet goes to its device (KERNEL.md 69).
		direct := b.Family == IPv4 && !ans.Gateway.IsValid()
		return n.Oif == ans.Oif && (n.Gateway == ans.Gateway || direct) && n.Flags&NexthopDead == 0
	}):
		return fmt.Sprintf("by %s dev %d", ans.Gateway, ans.Oif)
	}
	return ""
}
