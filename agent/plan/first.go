package plan

import (
	"cmp"
	"fmt"
	"slices"

	"tsoagent/routes"
)

// firstRule says what the first rule of a namespace would change in each family, empty for nothing.
type firstRule struct{ v4, v6 string }

func (f firstRule) of(family routes.Family) string {
	if family == routes.IPv4 {
		return f.v4
	}
	return f.v6
}

func (p *planner) firstRule() firstRule {
	return firstRule{cmp.Or(p.missing(routes.IPv4), p.splits()), p.missing(routes.IPv6)}
}

// onlyKernels reports whether a family has only the rules that the kernel itself has made.
func (p *planner) onlyKernels(f routes.Family) bool {
	return !slices.ContainsFunc(p.FIB.Rules(f), func(r *routes.Rule) bool { return r.Protocol != routes.ProtoKernel || r.L3mdev })
}

// missing says which of the kernel's own rules is gone. Until there is another one the kernel looks at tables local and main whether rules lead
// there or not (fib_lookup, include/net/ip_fib.h; fib6_rule_lookup, net/ipv6/fib6_rules.c), and from then on where rules lead.
func (p *planner) missing(f routes.Family) string {
	if !p.onlyKernels(f) {
		return "" // somebody's rule has done it
	}
	for _, t := range []struct {
		id   routes.TableID
		name string
	}{{routes.TableLocal, "local"}, {routes.TableMain, "main"}} {
		if !slices.ContainsFunc(p.FIB.Rules(f), func(r *routes.Rule) bool { return r.Action == routes.RuleToTable && r.Table == t.id }) {
			return fmt.Sprintf("no rule leads to table %s, which the first %s rule of this namespace would have the kernel obey", t.name, f)
		}
	}
	return ""
}

// splits says what the first IPv4 rule of a namespace would change, empty for nothing. Until there is one the kernel
// looks tables local and main up as one, in which the longest prefix wins; from then on, for good, it looks at local
// first (fib_trie_unmerge, net/ipv4/fib_trie.c; KERNEL.md 67): a wide route there takes what a longer one in main led
// elsewhere.
func (p *planner) splits() string {
	if !p.onlyKernels(routes.IPv4) {
		return "" // somebody's rule has done it
	}
	for r := range p.FIB.Table(routes.IPv4, routes.TableLocal) {
		if r.Dst.IsSingleIP() {
			continue
		}
		_, inside := p.FIB.Cover(routes.IPv4, routes.TableMain, r.Dst)
		for m := range inside {
			if m.Dst.Bits() > r.Dst.Bits() {
				return fmt.Sprintf("the first IPv4 rule of this namespace would lead %s into %s of table local, past its route in main: add any rule of your own first, if that is to be", m.Dst, r.Dst)
			}
		}
	}
	return ""
}
