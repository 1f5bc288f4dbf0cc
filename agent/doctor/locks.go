package doctor

import (
	"fmt"
	"strings"

	"tsoagent/agent"
	"tsoagent/agent/plan"
	"tsoagent/routes"
)

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
				if clone.Body.Type == routes.Throw || plan.IsCopy(clone.Body) || first == nil || told[first] {
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
