package plan

import (
	"fmt"

	"tsoagent/routes"
)

// splits says what the first IPv4 rule of a namespace would change, empty for nothing. Until there is one the kernel
// looks tables local and main up as one, in which the longest prefix wins; from then on, for good, it looks at local
// first (fib_trie_unmerge, net/ipv4/fib_trie.c; KERNEL.md 67): a wide route there takes what a longer one in main led
// elsewhere.
func (p *planner) splits() string {
	for _, r := range p.FIB.Rules(routes.IPv4) {
		if r.Protocol != routes.ProtoKernel || r.L3mdev {
			return "" // somebody's rule has done it
		}
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
