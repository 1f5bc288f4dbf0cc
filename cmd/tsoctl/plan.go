package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/netns"
)

func planCommand() *cli.Command {
	return &cli.Command{
		Name: "plan", Usage: "every coverage with its verdict; without an agent, read from the kernel",
		OnUsageError: usage, Action: showPlan,
	}
}

func showPlan(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	stop := progressOn(os.Stderr).waiting("reading")
	r, err := client.New(cfg.RunDir).ReportIn(c.Context, ns)
	if errors.Is(err, client.ErrNoAgent) {
		r, err = agent.LookIn(c.Context, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), nil)
	}
	stop()
	if err != nil {
		return err
	}
	return show(c, r, func(p page) { planTable(p, r) })
}

func planTable(p page, r *agent.Report) {
	if !r.Live {
		p.text(0, "no agent runs; read from the kernel, this is what one would do")
	}
	if r.NotFollowed {
		namespaceTable(p, r)
		findings(p, r)
		return
	}
	if r.Netns != "" {
		p.text(0, "network namespace %s", r.Netns)
	}
	observing(p, r)
	if len(r.Coverages) == 0 {
		p.text(0, "%s", nothingText(r))
	}
	for _, c := range r.Coverages {
		p.text(0, "%s", coverageLine(c))
		p.text(2, "%s", cutLine(c))
		if len(c.Carriers) > 0 {
			p.text(2, "carriers: %s", strings.Join(c.Carriers, ", "))
		}
		coverageActs(p, c)
		for _, n := range c.Notes {
			p.text(2, "- %s", n)
		}
	}
	holdTable(p, r)
	laneTable(p, r)
	lockTable(p, r)
	mtuTable(p, r)
	clampTable(p, r)
	namespaceTable(p, r)
	findings(p, r)
}

func holdTable(p page, r *agent.Report) {
	if len(r.Holds) == 0 {
		return
	}
	rows := [][]string{{"DEVICE", "FEATURE HELD OFF", "STATE", "BECAUSE"}}
	for _, h := range r.Holds {
		because := short(h.Because)
		if because == "" {
			because = h.Why
		}
		rows = append(rows, []string{h.Device, h.Feature, h.State, because})
	}
	p.table(rows)
	why(p, r, len(r.Holds))
}

func laneTable(p page, r *agent.Report) {
	if len(r.Lanes) == 0 {
		return
	}
	rows := [][]string{{"DEVICE", "LANE", "STATE", "TAKES", "BECAUSE"}}
	for _, l := range r.Lanes {
		because := short(l.Because)
		if because == "" {
			because = l.Why
		}
		rows = append(rows, []string{l.Device, l.IFB, l.State, count(len(l.Matches), "match", "matches"), because})
	}
	p.table(rows)
	for _, l := range r.Lanes {
		if l.State == agent.StateRefused {
			p.text(0, "! no lane on %s: %s", l.Device, l.Why)
		}
	}
}

// coverageActs are what was done for a coverage.
func coverageActs(p page, c agent.CoverageReport) {
	for _, h := range byDevice(c.Held) {
		p.text(2, "held off: %s", h)
	}
	for _, l := range c.Locked {
		p.text(2, "locked: %s", l)
	}
}

// byDevice joins what is held on one device: "dev a", "dev b" become "dev a, b".
func byDevice(held []string) []string {
	var out []string
	var last string
	for _, h := range held {
		device, feature, _ := strings.Cut(h, " ")
		if len(out) > 0 && device == last {
			out[len(out)-1] += ", " + feature
			continue
		}
		out, last = append(out, h), device
	}
	return out
}

func coverageLine(c agent.CoverageReport) string {
	if c.Key != "" {
		return keyLine(c)
	}
	s := fmt.Sprintf("policy %d priority %d: src %s dst %s", c.Policy, c.Priority, c.Src, c.Dst)
	if c.Proto != 0 {
		s += fmt.Sprintf(" proto %d", c.Proto)
	}
	if c.Sport != 0 {
		s += fmt.Sprintf(" sport %d", c.Sport)
	}
	if c.Dport != 0 {
		s += fmt.Sprintf(" dport %d", c.Dport)
	}
	if c.IfID != 0 {
		s += fmt.Sprintf(" if_id %#x", c.IfID)
	}
	if c.Mark != "" {
		s += " mark " + c.Mark
	}
	return s
}

// keyLine says whose packets a key signs: those from a listener's port, or a client's to the peer's.
func keyLine(c agent.CoverageReport) string {
	peer := c.Dst
	if p, err := netip.ParsePrefix(peer); err == nil && p.IsSingleIP() {
		peer = p.Addr().String()
	}
	s := fmt.Sprintf("%s key: peer %s", c.Key, peer)
	if c.PeerPort != 0 {
		s += fmt.Sprintf(" port %d", c.PeerPort)
	} else {
		s += fmt.Sprintf(", local port %d", c.Sport)
	}
	if c.Src != "" {
		s += " of " + c.Src
	}
	if c.Dev != "" {
		s += " dev " + c.Dev
	}
	return s
}

// cutLine says what is left to an inner packet, and where segments are cut. A signature is an option
// of TCP: it leaves the MTU as it is.
func cutLine(c agent.CoverageReport) string {
	switch {
	case c.Key != "" && c.Cut == "socket":
		return "segments are cut at the socket"
	case c.Key != "":
		return "segments are cut at the " + cutText(c.Cut)
	case c.MTU > 0:
		return fmt.Sprintf("inner mtu %d, segments are cut at the %s", c.MTU, cutText(c.Cut))
	}
	return "inner mtu not known yet, segments are cut at the " + cutText(c.Cut)
}

func cutText(cut string) string {
	switch cut {
	case "device":
		return "device"
	case "lane":
		return "lane, an ifb of our own"
	case "nic":
		return "NIC, and so are everybody else's who leave by it"
	}
	return "socket, or inside the kernel's ESP"
}
