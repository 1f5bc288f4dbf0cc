package plan

import (
	"fmt"
	"strings"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// This file answers what a doctor asks of the same input besides the plan.

// InTheWay is a rule of somebody else's that keeps flows from a lock in a table of ours.
type InTheWay struct {
	Rule    *routes.Rule
	Why     string
	Because []xfrmwatch.CoverageID // whose flows
}

// RulesInTheWay lists the rules that keep covered flows from a lock, each once, in the order of the policies.
func RulesInTheWay(in Input) []InTheWay {
	p := newPlanner(in)
	p.collect()
	p.readPaths()
	p.findTunnels()
	if p.Config.MTU == MTUOff || p.Config.Partial != PartialTable {
		return nil
	}
	p.setDevices()
	p.lockInPlace()
	var out []InTheWay
	add := func(r *routes.Rule, id xfrmwatch.CoverageID, format string, args ...any) {
		for i := range out {
			if out[i].Rule == r {
				out[i].Because = append(out[i].Because, id)
				return
			}
		}
		out = append(out, InTheWay{r, fmt.Sprintf(format, args...), []xfrmwatch.CoverageID{id}})
	}
	p.shape()
	for _, c := range p.covers {
		if _, inexact := c.flows(); p.vtiOf(c) != nil || inexact != "" {
			continue
		}
		for _, part := range p.parts(c) {
			r := part.Rule
			switch {
			case part.Blocked != "" && !p.allLocked(part):
				add(r, c.id(), "it decides for a part of them, and what it selects by (%s) can't be repeated in a rule of ours", part.Blocked)
			case part.Blocked == "" && r.Action == routes.RuleToTable && p.Config.OwnTable(r.Table):
				add(r, c.id(), "it leads to table %d, which is ours, and is not our rule", r.Table)
			case part.Blocked == "" && c.crowded(r.Priority):
				add(r, c.id(), "there is no free priority directly ahead of it, or not for so many rules")
			}
		}
	}
	return out
}

// noPriority begins the note of a coverage whose rule has no place.
const noPriority = "no lock: no free rule priority directly ahead of rule "

func (c *coverage) crowded(priority uint32) bool {
	for m := range c.members.each {
		if strings.HasPrefix(m.shape.why, fmt.Sprintf("%s%d,", noPriority, priority)) {
			return true
		}
	}
	return false
}

// UnboundSA is an SA that is bound to an offload that is not done.
type UnboundSA struct {
	SA  *xfrmwatch.SA
	Why string
}

// UnboundSAs lists the SAs in use that are bound to an offload that is not done, in the order of the policies.
func UnboundSAs(in Input) []UnboundSA {
	p := newPlanner(in)
	p.collect()
	p.readPaths()
	var out []UnboundSA
	seen := map[xfrmwatch.SAKey]bool{}
	for _, c := range p.covers {
		for _, st := range c.steps {
			for _, sa := range st.SAs {
				if why := p.unbound(sa); why != "" && !seen[sa.Key] {
					seen[sa.Key] = true
					out = append(out, UnboundSA{sa, why})
				}
			}
		}
	}
	return out
}
