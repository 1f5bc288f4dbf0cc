package doctor

import (
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

const protoTCP = 6

// clamps finds rules that set an MSS that is too large for what IPsec leaves.
func (c *Checkup) clamps(p *Patient) {
	for _, cl := range p.Clamps {
		if slices.Contains([]string{"input", "output", "ingress", "egress"}, cl.Hook) {
			continue
		}
		var worst []*plan.Verdict
		for i := range p.Plan.Verdicts {
			if v := &p.Plan.Verdicts[i]; p.forwarded(v) && cl.tooLarge(v, p.SourceLess) && !p.clamped(v) {
				worst = append(worst, v)
			}
		}
		if len(worst) == 0 {
			continue
		}
		v := worst[0]
		at := fmt.Sprintf("table %s %s chain %s, rule with handle %d", cl.Family, cl.Table, cl.Chain, cl.Handle)
		what := "to the path MTU"
		if cl.MSS > 0 {
			what = fmt.Sprintf("to %d", cl.MSS)
		}
		text := fmt.Sprintf("%s clamps %s: what goes to %s has an MTU of %d, an MSS of %d", at, what, v.Selector.Dst, v.MTU, mssOf(v))
		if cl.MSS == 0 {
			text += fmt.Sprintf(", and the route without a source says %d", p.SourceLess[v.ID])
		}
		if n := len(worst) - 1; n > 0 {
			text += fmt.Sprintf("; so it is for %s", count(n, "other policy", "other policies"))
		}
		c.found(ClampInVain, text, cl.instead(v)...)
	}
}

// mssOf is what TCP has of a coverage's MTU without options, in bytes.
func mssOf(v *plan.Verdict) int {
	if v.Selector.Family == xfrmwatch.IPv6 {
		return v.MTU - 60
	}
	return v.MTU - 40
}

// forwarded reports whether a coverage is of flows that the host forwards, whose MTU is known.
func (p *Patient) forwarded(v *plan.Verdict) bool {
	if v.Key != nil || v.Gone || v.MTU == 0 || !p.Input.Forwarding[routes.Family(v.Selector.Family)] || v.Selector.Proto != 0 && v.Selector.Proto != protoTCP {
		return false
	}
	src := v.Selector.Src
	return !src.IsSingleIP() || !p.local(src.Addr())
}

// local reports whether an address is the host's.
func (p *Patient) local(a netip.Addr) bool {
	for _, l := range p.Input.FIB.Links() {
		for pfx := range p.Input.FIB.Addrs(l.Index) {
			if pfx.Addr() == a {
				return true
			}
		}
	}
	return false
}

// serves reports whether a rule of the clamp's family sees packets of a coverage's.
func (cl Clamp) serves(v *plan.Verdict) bool {
	switch cl.Family {
	case "ip":
		return v.Selector.Family == xfrmwatch.IPv4
	case "ip6":
		return v.Selector.Family == xfrmwatch.IPv6
	}
	return true
}

// tooLarge reports whether the MSS that the rule sets is too large for a coverage.
func (cl Clamp) tooLarge(v *plan.Verdict, sourceLess map[xfrmwatch.CoverageID]int) bool {
	switch {
	case !cl.serves(v):
		return false
	case cl.MSS != 0:
		return cl.MSS > mssOf(v)
	}
	mtu, known := sourceLess[v.ID]
	return known && mtu > v.MTU
}

// clamped reports whether some rule sets an MSS that is small enough. Which packets it takes is not looked at.
func (p *Patient) clamped(v *plan.Verdict) bool {
	return slices.ContainsFunc(p.Clamps, func(cl Clamp) bool {
		return cl.serves(v) && (cl.MSS == UnknownMSS || cl.MSS > 0 && cl.MSS <= mssOf(v))
	})
}

// instead are commands for a clamp to a number, in both directions.
func (cl Clamp) instead(v *plan.Verdict) []string {
	var out []string
	for _, dir := range []struct{ nft, iptables string }{{"daddr", "-d"}, {"saddr", "-s"}} {
		family, tables := "ip", "iptables"
		if v.Selector.Family == xfrmwatch.IPv6 {
			family, tables = "ip6", "ip6tables"
		}
		if cl.Iptables {
			out = append(out, fmt.Sprintf("%s -t mangle -A FORWARD %s %s -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss %d", tables, dir.iptables, v.Selector.Dst, mssOf(v)))
			continue
		}
		out = append(out, fmt.Sprintf("nft add rule %s %s %s %s %s %s tcp flags syn tcp option maxseg size set %d",
			cl.Family, word(cl.Table), word(cl.Chain), family, dir.nft, v.Selector.Dst, mssOf(v)))
	}
	return out
}
