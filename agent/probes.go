package agent

import (
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// probe is one question to the kernel about a clone.
type probe struct {
	query routes.Query
	clone *plan.Clone // nil for a question from inside a VRF
}

type answer struct {
	ans routes.Answer
	err error
}

func (a answer) same(o answer) bool {
	if (a.err != nil) != (o.err != nil) {
		return false
	}
	return a.err != nil || a.ans.Type == o.ans.Type && a.ans.Oif == o.ans.Oif && a.ans.Gateway == o.ans.Gateway
}

// maxProbes bounds the questions for one shape.
const maxProbes = 32

// probes are the questions for a shape: for each clone, or for those at the destinations given,
// one packet of its flows that no more specific entry takes and that is not for this host; for
// the first ones also from within each VRF.
func (a *Agent) probes(sh *plan.Shape, only map[netip.Prefix]bool) []probe {
	f := sh.ID.Flows
	src, iif, ok := a.source(sh)
	if !ok {
		return nil
	}
	var out []probe
	for clone := range clonesAt(sh, only) {
		c := &clone
		dst, ok := a.sample(sh, c.Dst)
		if !ok {
			continue
		}
		q := routes.Query{
			Family: f.Family, Dst: dst, Src: src, Iif: iif, Mark: f.Mark,
			IPProto: f.Proto, Sport: f.Sport.Lo, Dport: f.Dport.Lo,
		}
		out = append(out, probe{q, c})
		if len(out) == 1 {
			for _, l := range a.st.fib.Links() {
				if l.VRFTable != 0 {
					q.Iif, q.Oif = 0, l.Index
					out = append(out, probe{query: q})
				}
			}
		}
		if len(out) >= maxProbes {
			break
		}
	}
	return out
}

// clonesAt are the clones of a shape at some destinations, all of them where only is nil.
func clonesAt(sh *plan.Shape, only map[netip.Prefix]bool) iter.Seq[plan.Clone] {
	if only == nil {
		return sh.Clones()
	}
	return func(yield func(plan.Clone) bool) {
		for _, dst := range slices.SortedFunc(maps.Keys(only), routes.ComparePrefix) {
			if c, ok := sh.Clone(dst); ok && !yield(c) {
				return
			}
		}
	}
}

// source is an address that the flows can come from and that no rule ahead of ours takes. A
// source of another host needs the device it comes in by, as IPv4 refuses it otherwise; a host
// that does not forward has no such flows.
func (a *Agent) source(sh *plan.Shape) (src netip.Addr, iif routes.Ifindex, ok bool) {
	f := sh.ID.Flows
	if f.Src.Bits() == 0 {
		return netip.Addr{}, 0, true
	}
	known, ok := a.st.sources[sh.ID]
	if !ok || known.iif != 0 && !a.st.forwarding[f.Family] {
		if known.src, known.iif, ok = a.findSource(sh); !ok {
			return netip.Addr{}, 0, false
		}
		a.st.sources[sh.ID] = known
	}
	return known.src, known.iif, true
}

// shapeSource is a source of a shape's flows, and the device that they come in by, 0 for none. It is as good as it was while
// nothing changed on which it depends (state.changed).
type shapeSource struct {
	src netip.Addr
	iif routes.Ifindex
}

// findSource is source where it is not known.
func (a *Agent) findSource(sh *plan.Shape) (src netip.Addr, iif routes.Ifindex, ok bool) {
	f := sh.ID.Flows
	for _, l := range a.st.fib.Links() {
		for p := range a.st.fib.Addrs(l.Index) {
			if f.Src.Contains(p.Addr()) && a.free(sh, p.Addr()) {
				return p.Addr(), 0, true
			}
		}
	}
	if f.Family == routes.IPv4 && !a.st.forwarding[f.Family] {
		return netip.Addr{}, 0, false
	}
	src = f.Src.Addr()
	if !f.Src.IsSingleIP() {
		src = src.Next()
	}
	for range 8 { // a few tries: rules for single sources are rare
		if f.Src.Contains(src) && a.free(sh, src) {
			ok = true
			break
		}
		src = src.Next()
	}
	if !ok || f.Family == routes.IPv6 {
		return src, 0, ok
	}
	back, err := a.rt.Lookup(routes.Query{Family: f.Family, Dst: src})
	if err != nil || back.Type == routes.Local {
		return netip.Addr{}, 0, false
	}
	return src, back.Oif, true
}

// free reports whether no rule ahead of the shape's base selects by that source.
func (a *Agent) free(sh *plan.Shape, src netip.Addr) bool {
	for _, r := range a.st.fib.Rules(sh.ID.Flows.Family) {
		if r.Priority >= sh.ID.Base {
			break
		}
		if r.Src.IsValid() && r.Src.Contains(src) && r.Table != sh.Table {
			return false
		}
	}
	return true
}

// sample is an address inside the prefix that no other entry of the shape takes and that is not
// for this host.
func (a *Agent) sample(sh *plan.Shape, p netip.Prefix) (netip.Addr, bool) {
	inside := func(x netip.Addr) (netip.Prefix, bool) {
		if in, ok := sh.Inside(p, x); ok {
			return in, true
		}
		local := netip.PrefixFrom(x, x.BitLen())
		if m, _ := a.st.fib.Cover(sh.ID.Flows.Family, routes.TableLocal, local); m.Paths != nil {
			return m.Dst, true
		}
		return netip.Prefix{}, false
	}
	x := p.Addr()
	if !p.IsSingleIP() {
		x = x.Next()
	}
	// Behind each entry inside there is either free room or the next entry.
	for range sh.Len() + 16 {
		if !x.IsValid() || !p.Contains(x) {
			break
		}
		in, taken := inside(x)
		if !taken {
			return x, true
		}
		x = lastAddr(in).Next()
	}
	return netip.Addr{}, false
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (a *Agent) ask(probes []probe) []answer {
	out := make([]answer, len(probes))
	for i, p := range probes {
		out[i].ans, out[i].err = a.rt.Lookup(p.query)
	}
	return out
}

// compare says what in the answers with the rules makes the shape unfit, and the clone that it was
// asked for; empty if nothing does.
// With answers from before the rule was there, a packet that goes another way now is one. A
// clone that takes its packet where its route does not lead is one in any case. A packet that
// goes where it went without finding the clone is neither: another rule takes it.
func (a *Agent) compare(probes []probe, before, with []answer, sh *plan.Shape) (why string, at *plan.Clone) {
	for i, now := range with {
		p := probes[i]
		if i < len(before) && !now.same(before[i]) {
			return fmt.Sprintf("with it %s would go another way", p.query.Dst), p.clone
		}
		if now.err != nil || p.clone == nil || p.clone.Throw || now.ans.Table != sh.Table {
			continue
		}
		if !leavesBy(p.clone.Of.Body, now.ans) {
			return fmt.Sprintf("the kernel does not send %s where the plan foresaw", p.query.Dst), p.clone
		}
	}
	return "", nil
}

func leavesBy(b *routes.Body, ans routes.Answer) bool {
	return slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool {
		return n.Oif == ans.Oif && n.Gateway == ans.Gateway
	})
}
