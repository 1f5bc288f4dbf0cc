package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tsoagent/agent"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

var tsoFeatures = []ethtool.Feature{ethtool.TCPSegmentation, ethtool.TCP6Segmentation}

// dependencies are the features without which the kernel has no TSO (netdev_fix_features, net/core/dev.c).
var dependencies = []ethtool.Feature{"tx-scatter-gather", "tx-checksum-ip-generic", "tx-checksum-ipv4", "tx-checksum-ipv6"}

// tso finds devices whose segmentation offload somebody has switched off for nothing. A device that carries covered flows alone may need it
// off, and so may what is held: those are left out.
func (c *Checkup) tso(p *Patient) {
	dedicated := map[string]bool{}
	for _, v := range p.Plan.Verdicts {
		for _, name := range v.Carriers {
			dedicated[name] = true
		}
	}
	for _, l := range p.Input.FIB.Links() {
		tunnel := slices.ContainsFunc(p.Plan.Tunnels, func(t plan.Tunnel) bool { return t.Index == l.Index })
		if !l.Up || l.Type == arphrdLoopback || l.Kind == "ifb" || l.Tunnel() || tunnel || dedicated[l.Name] {
			continue
		}
		var off []string
		needs := map[string]bool{}
		for _, f := range tsoFeatures {
			st, known := p.Input.Features[l.Index].Get(f)
			if !known || st.Active || !st.Changeable || p.held(l.Index, f) {
				continue
			}
			off = append(off, string(f))
			if st.Wanted {
				needs[""] = true
				continue
			}
			needs[string(f)] = true
		}
		if len(off) == 0 {
			continue
		}
		c.tsoOff(p, l, off, needs)
	}
}

const protoTCP = 6

const arphrdLoopback = 772 // ARPHRD_LOOPBACK, linux/if_arp.h

// held reports whether a feature is ours to hold, or is wanted off by the plan.
func (p *Patient) held(i routes.Ifindex, f ethtool.Feature) bool {
	k := plan.HoldKey{Index: ethtool.Ifindex(i), Feature: f}
	_, ours := p.Input.Holds[k]
	return ours || slices.ContainsFunc(p.Plan.Holds, func(h plan.Hold) bool { return h.Device.Index == k.Index && h.Feature == f })
}

func (c *Checkup) tsoOff(p *Patient, l *routes.Link, off []string, needs map[string]bool) {
	text := fmt.Sprintf("%s has %s off", l.Name, strings.Join(off, " and "))
	var on []string
	for _, f := range off {
		if needs[f] {
			on = append(on, f+" on")
		}
	}
	if needs[""] {
		// It is wanted, and what it depends on is off.
		for _, f := range dependencies {
			if st, known := p.Input.Features[l.Index].Get(f); known && !st.Wanted && st.Changeable && !st.Active {
				on = append(on, string(f)+" on")
			}
		}
		if len(on) == 0 {
			return // the driver's own reasons
		}
		text += ", though it is wanted: what it depends on is off"
	}
	text += ": flows that are not covered leave it in single segments (1.5 to 2 times the throughput with it on, KERNEL.md 3)"
	if n := p.LostBy[l.Name]; n > 0 {
		text += fmt.Sprintf("; %s by it now", count(n, "connection suffers", "connections suffer"))
	}
	c.found(TSOOff, text, "ethtool -K "+word(l.Name)+" "+strings.Join(on, " "))
}

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

// defeated finds rules of others that keep covered flows from a lock: those that stand ahead of ours and answer, those for which there can be no
// lock, and what a running agent has withdrawn.
func (c *Checkup) defeated(p *Patient) {
	cfg := p.Input.Config.WithDefaults()
	var stale []string
	if p.Report == nil {
		stale = []string{"tsoctl restore --stale"} // an agent would have placed its rules anew
	}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		told := map[*routes.Rule]bool{}
		for _, ours := range p.Input.FIB.Rules(f) {
			if !cfg.OwnRule(ours) || ours.Iif != "" {
				continue
			}
			for clone := range p.Input.FIB.Table(f, ours.Table) {
				first := p.ahead(ours, clone)
				if clone.Body.Type == routes.Throw || first == nil || told[first] {
					continue
				}
				told[first] = true
				c.found(LockDefeated, fmt.Sprintf("rule %s leads flows to %s elsewhere before our rule %d has locked them at %d",
					ruleText(first), clone.Dst, ours.Priority, clone.Body.Metrics.MTU), stale...)
			}
		}
	}
	for _, w := range plan.RulesInTheWay(p.Input) {
		c.found(LockDefeated, fmt.Sprintf("rule %s: %s: no lock for policy %d%s", ruleText(w.Rule), w.Why, w.Because[0].Policy, andMore(len(w.Because)-1)))
	}
	if p.Report != nil {
		for _, f := range p.Report.Findings {
			if strings.Contains(f, agent.Withdrawn) {
				c.found(LockDefeated, f)
			}
		}
	}
}

func andMore(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" and %d more", n)
}

// ahead is the first rule of somebody else's that answers for some of the flows of a clone before our rule does, nil for none. The host's own
// addresses are no answer for what is sent.
func (p *Patient) ahead(ours *routes.Rule, clone routes.Route) *routes.Rule {
	cfg := p.Input.Config.WithDefaults()
	flows := routes.Flows{
		Family: ours.Family, Src: ours.Src, Dst: clone.Dst, Proto: ours.IPProto, Sport: ours.Sport, Dport: ours.Dport,
		Mark: ours.Mark & ours.Mask, Mask: ours.Mask,
	}
	if !flows.Src.IsValid() {
		flows.Src = ours.Family.Any()
	}
	if ours.Dst.IsValid() {
		dst, both := routes.Intersect(ours.Dst, clone.Dst)
		if !both {
			return nil
		}
		flows.Dst = dst
	}
	for _, part := range p.Input.FIB.Resolve(flows, func(r *routes.Rule) bool { return cfg.OwnRule(r) && r != ours }) {
		switch {
		case part.Rule == ours:
			return nil
		case part.Rule.Action == routes.RuleToTable && part.Rule.Table == routes.TableLocal:
			continue
		}
		return part.Rule
	}
	return nil
}

func selectors(r *routes.Rule) string {
	s := "from all"
	if r.Src.IsValid() {
		s = "from " + r.Src.String()
	}
	if r.Dst.IsValid() {
		s += " to " + r.Dst.String()
	}
	return fmt.Sprintf("%s lookup %d", s, r.Table)
}

// ruleText is a rule in the words of `ip rule`, with what this package looks at.
func ruleText(r *routes.Rule) string {
	s := fmt.Sprintf("%d (%s", r.Priority, r.Family)
	if r.Invert {
		s += " not"
	}
	if r.Mask != 0 {
		s += fmt.Sprintf(" fwmark %#x/%#x", r.Mark, r.Mask)
	}
	if r.Iif != "" {
		s += " iif " + r.Iif
	}
	if r.HasUID {
		s += fmt.Sprintf(" uidrange %d-%d", r.UIDLo, r.UIDHi)
	}
	if r.Action != routes.RuleToTable {
		return s + ")"
	}
	return s + " " + selectors(r) + ")"
}

// networkd finds a systemd-networkd that deletes what we write. Where nothing is in tables of ours it has nothing to delete.
func (c *Checkup) networkd(p *Patient) {
	n := p.Networkd
	if n == nil || !n.Routes && !n.Rules || len(p.Plan.Shapes) == 0 {
		return
	}
	var does, set []string
	if n.Routes {
		does, set = append(does, "ManageForeignRoutes"), append(set, `ManageForeignRoutes=no\n`)
	}
	if n.Rules {
		does, set = append(does, "ManageForeignRoutingPolicyRules"), append(set, `ManageForeignRoutingPolicyRules=no\n`)
	}
	rules, clones := 0, 0
	for i := range p.Plan.Shapes {
		rules, clones = rules+len(p.Plan.Shapes[i].Rules), clones+p.Plan.Shapes[i].Len()
	}
	c.found(NetworkdForeign, fmt.Sprintf("it runs (pid %d) with %s=yes (%s): %s and %s are at risk", n.PID, strings.Join(does, "=yes and "), n.Source,
		count(rules, "rule", "rules"), count(clones, "route", "routes")),
		"mkdir -p /etc/systemd/networkd.conf.d",
		"printf '[Network]\\n"+strings.Join(set, "")+"' >/etc/systemd/networkd.conf.d/90-tsoagent.conf",
		"systemctl restart systemd-networkd")
}

// lateOffload finds SAs that were added before the module that would offload them was loaded.
func (c *Checkup) lateOffload(p *Patient) {
	for _, m := range []struct {
		name   string
		family xfrmwatch.Family
	}{{"esp4_offload", xfrmwatch.IPv4}, {"esp6_offload", xfrmwatch.IPv6}} {
		mod, loaded := p.Modules[m.name]
		if !loaded || mod.Refs < 0 {
			continue
		}
		var sas []*xfrmwatch.SA
		for sa := range p.Input.XFRM.SAs() {
			if sa.Proto == xfrmwatch.ESP && sa.Family == m.family && !sa.Larval {
				sas = append(sas, sa)
			}
		}
		late := len(sas) - mod.Refs
		if late <= 0 {
			continue
		}
		slices.SortStableFunc(sas, func(a, b *xfrmwatch.SA) int { return int(int64(a.AddTime) - int64(b.AddTime)) })
		c.found(ESPOffloadLate, fmt.Sprintf("%s is loaded, and at least %s of %d older: the oldest is %s. Their flows are cut at the socket, those of later "+
			"SAs inside of ESP", m.name, count(late, "SA is", "SAs are"), len(sas), saText(sas[0])),
			"echo "+m.name+" >>/etc/modules-load.d/tsoagent.conf")
	}
}

func saText(sa *xfrmwatch.SA) string {
	return fmt.Sprintf("%#x to %s", uint32(sa.SPI), sa.Dst)
}

// offers finds bonds and their kin that offer an offload of ESP that they can't do, where no agent holds it off.
func (c *Checkup) offers(p *Patient) {
	for _, l := range p.Input.FIB.Links() {
		var on []string
		why := ""
		for _, h := range p.Plan.Holds {
			st, _ := p.Input.Features[l.Index].Get(h.Feature)
			if routes.Ifindex(h.Device.Index) == l.Index && strings.Contains(string(h.Feature), "esp") && st.Wanted {
				on = append(on, string(h.Feature))
				why = h.Why
			}
		}
		if len(on) == 0 {
			continue
		}
		c.found(BondOffers, fmt.Sprintf("%s offers %s, but %s", l.Name, strings.Join(on, ", "), why),
			"ethtool -K "+word(l.Name)+" "+strings.Join(on, " off ")+" off")
	}
}

// unbound finds SAs that are bound to an offload that is not done.
func (c *Checkup) unbound(p *Patient) {
	for _, u := range plan.UnboundSAs(p.Input) {
		c.found(OffloadNotDone, fmt.Sprintf("SA %s %s", saText(u.SA), u.Why))
	}
}

// larval finds SAs that the kernel has asked for, and that nobody has delivered.
func (c *Checkup) larval(p *Patient) {
	const most = 16
	more := 0
	for sa := range p.Input.XFRM.SAs() {
		if !sa.Larval {
			continue
		}
		if more++; more > most {
			continue
		}
		text := fmt.Sprintf("an SA to %s", sa.Dst)
		if sa.Src.IsValid() && !sa.Src.IsUnspecified() {
			text += fmt.Sprintf(" from %s", sa.Src)
		}
		if sa.Reqid != 0 {
			text += fmt.Sprintf(" (reqid %d)", sa.Reqid)
		}
		if p.Now >= sa.AddTime && sa.AddTime > 0 {
			text += fmt.Sprintf(" is asked for since %d s", p.Now-sa.AddTime)
		} else {
			text += " is asked for"
		}
		c.found(LarvalSA, text)
	}
	if more > most {
		c.found(LarvalSA, fmt.Sprintf("%d more SAs are asked for", more-most))
	}
}

// tunnels finds tunnels, and xfrm interfaces, by which packets are sent that are larger than what IPsec leaves.
func (c *Checkup) tunnels(p *Patient) {
	left := map[routes.Ifindex]int{}
	for _, t := range p.Plan.Tunnels {
		left[t.Index] = t.MTU
	}
	for _, v := range p.Plan.Verdicts {
		if v.IfID == 0 || v.MTU == 0 || v.Gone {
			continue
		}
		for _, l := range p.Input.FIB.Links() {
			if have := left[l.Index]; l.Kind == "xfrm" && l.IfID == v.IfID && (have == 0 || v.MTU < have) {
				left[l.Index] = v.MTU
			}
		}
	}
	for _, l := range p.Input.FIB.Links() {
		mtu := left[l.Index]
		if mtu == 0 || !l.Up || l.MTU <= mtu {
			continue
		}
		dst, ok := p.unlocked(l, mtu)
		if !ok {
			continue
		}
		text := fmt.Sprintf("%s has an MTU of %d, and IPsec leaves %d of it: larger packets to %s are lost, or sent in pieces", l.Name, l.MTU, mtu, dst)
		if mtu < 1280 { // IPV6_MIN_MTU: below it the device has no IPv6
			c.found(TunnelMTU, text+"; below 1280 the device would lose IPv6, so lock its routes instead")
			continue
		}
		c.found(TunnelMTU, text, fmt.Sprintf("ip link set dev %s mtu %d", word(l.Name), mtu))
	}
}

// unlocked is a destination that a device leads to with more than the MTU. The kernel's own routes to the net that the device is in count where
// there are no others: nobody can lock them in place.
func (p *Patient) unlocked(l *routes.Link, mtu int) (netip.Prefix, bool) {
	keys, n := p.Input.FIB.DeviceRoutes(l.Index)
	if n > 0 && len(keys) == 0 {
		return netip.Prefix{}, false // too many to look at
	}
	var own netip.Prefix
	others := false
	for _, k := range keys {
		r, ok := p.Input.FIB.Get(k)
		if ok == 0 || r.Body.Type != routes.Unicast || r.Dst.Addr().IsLinkLocalUnicast() || r.Dst.Addr().IsMulticast() {
			continue
		}
		small := r.Body.Metrics.MTU != 0 && int(r.Body.Metrics.MTU) <= mtu
		if r.Body.Protocol == routes.ProtoKernel {
			if !small && !own.IsValid() {
				own = r.Dst
			}
			continue
		}
		others = true
		if !small {
			return r.Dst, true
		}
	}
	return own, own.IsValid() && !others
}

// needs are capabilities with what does not work without them.
var needs = []struct {
	name          string
	bit           uint // linux/capability.h
	what          string
	agent, always bool // of the agent alone; without it nothing works
	elsewhere     bool // only to follow other namespaces
}{
	{"CAP_NET_ADMIN", 12, "nothing can be read or written", false, true, false},
	{"CAP_BPF", 39, "sockets can't be looked at, nor can new TCP keys be seen at once", true, false, false},
	{"CAP_PERFMON", 38, "sockets can't be looked at, nor can new TCP keys be seen at once", true, false, false},
	{"CAP_SYS_ADMIN", 21, "other network namespaces can't be entered", true, false, true},
}

// capabilities finds what the agent, or who asks, may not do.
func (c *Checkup) capabilities(p *Patient) {
	for _, proc := range p.Processes {
		for _, n := range needs {
			if proc.Caps&(1<<n.bit) != 0 || n.agent && !proc.Agent || n.elsewhere && !proc.Elsewhere {
				continue
			}
			text := fmt.Sprintf("%s (pid %d) lacks %s: %s", proc.Name, proc.PID, n.name, n.what)
			if !proc.Agent {
				c.found(MissingCapability, text+"; run it as root")
				continue
			}
			file := "/etc/systemd/system/tsoagent.service.d/90-" + strings.ToLower(n.name) + ".conf"
			c.found(MissingCapability, text, "mkdir -p /etc/systemd/system/tsoagent.service.d",
				"printf '[Service]\\nCapabilityBoundingSet="+n.name+"\\n' >"+file, "systemctl daemon-reload", "systemctl restart tsoagent")
		}
	}
}

// word is a name as a word of a shell's command.
func word(name string) string { return agent.ShellWord(name) }
