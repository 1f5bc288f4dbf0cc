package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/api"
	"tsoagent/agent/client"
	"tsoagent/agent/netns"
)

func locksCommand() *cli.Command {
	return &cli.Command{
		Name: "locks", Usage: "every route that gives covered flows an MTU, with its place and reason; works without an agent",
		Description: "Shows the routes whose MTU is locked: in place, or as clones in a table of the agent's own, with the rules that lead\n" +
			"there, and what takes the place of locks: clamps and the MTU of devices.",
		OnUsageError: usage, Action: showLocks,
	}
}

func showLocks(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	l, err := client.New(cfg.RunDir).LocksIn(c.Context, ns)
	if errors.Is(err, client.ErrNoAgent) {
		var r *agent.Report
		if r, err = agent.LookIn(c.Context, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), nil); err == nil {
			l = api.LocksOf(r)
		}
	}
	if err != nil {
		return err
	}
	return show(c, l, func(p page) { locksTable(p, l) })
}

func locksTable(p page, l *api.LockList) {
	head(p, l.Live, l.Netns)
	n := len(l.Locks) + len(l.Clones)
	if n+len(l.Clamps)+len(l.DeviceMTUs) == 0 {
		p.text(0, "nothing is locked: `tsoctl plan` says why for each coverage")
		return
	}
	p.text(0, "%s in place, %s in tables of the agent's own", count(len(l.Locks), "lock", "locks"), count(len(l.Clones), "route", "routes"))
	rows := [][]string{{"ROUTE", "MTU", "DEVICE", "PLACE", "BECAUSE"}}
	for _, r := range l.Locks {
		place := "itself"
		if r.State == api.StateWanted {
			place += ", wanted"
		}
		rows = append(rows, []string{r.Route, mtuText(r.MTU, r.Locked), strings.Join(r.Devices, ","), place, short(r.Because)})
	}
	for _, c := range l.Clones {
		if c.Throw {
			rows = append(rows, []string{c.Dst, "throw", "-", placeText(c), ""})
			continue
		}
		if c.Copy {
			rows = append(rows, []string{c.Dst, "copy", strings.Join(c.Devices, ","), placeText(c), ""})
			continue
		}
		rows = append(rows, []string{c.Dst, mtuText(c.MTU, c.Locked), strings.Join(c.Devices, ","), placeText(c), short(c.Because)})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	r := &agent.Report{Rules: l.Rules, Clamps: l.Clamps, DeviceMTUs: l.DeviceMTUs}
	lockTable(p, r)
	mtuTable(p, r)
	clampTable(p, r)
}

func lockTable(p page, r *agent.Report) {
	rows := [][]string{{"ROUTE", "MTU", "DEVICE", "STATE"}}
	for _, l := range r.Locks {
		rows = append(rows, []string{l.Route, mtuText(l.MTU, l.Locked), strings.Join(l.Devices, ","), l.State})
	}
	for _, c := range r.Clones {
		if c.Throw {
			rows = append(rows, []string{c.Dst, "-", "-", placeText(c) + ", throw"})
			continue
		}
		if c.Copy {
			rows = append(rows, []string{c.Dst, "-", strings.Join(c.Devices, ","), placeText(c) + ", copy"})
			continue
		}
		rows = append(rows, []string{c.Dst, mtuText(c.MTU, c.Locked), strings.Join(c.Devices, ","), placeText(c)})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	rows = [][]string{{"PRIORITY", "FAMILY", "STATE", "RULE"}}
	for _, rule := range r.Rules {
		rows = append(rows, []string{fmt.Sprint(rule.Priority), rule.Family, rule.State, rule.Text})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
}

// placeText is where a clone is, or would be.
func placeText(c agent.CloneReport) string {
	text := fmt.Sprintf("table %d", c.Table)
	if c.State == agent.StateWanted {
		text += ", " + c.State
	}
	return text
}

func mtuText(mtu uint32, locked bool) string {
	if locked {
		return fmt.Sprintf("lock %d", mtu)
	}
	return fmt.Sprint(mtu)
}

// mtuTable has a line for each carrier whose own MTU is set.
func mtuTable(p page, r *agent.Report) {
	rows := [][]string{{"CARRIER", "MTU", "WAS", "STATE", "BECAUSE"}}
	for _, m := range r.DeviceMTUs {
		rows = append(rows, []string{m.Device, fmt.Sprint(m.MTU), fmt.Sprint(m.Was), m.State, short(m.Because)})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	for _, m := range r.DeviceMTUs {
		if m.Why != "" {
			p.text(0, "! %s: %s", m.Device, m.Why)
		}
	}
}

// clampTable has a line for each interval of destinations that is clamped.
func clampTable(p page, r *agent.Report) {
	rows := [][]string{{"FORWARDED TO AND FROM", "MSS", "STATE", "BECAUSE"}}
	for _, c := range r.Clamps {
		rows = append(rows, []string{c.Dst, fmt.Sprint(c.MSS), c.State, short(c.Because)})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
}
