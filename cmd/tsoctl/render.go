package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"tsoagent/agent"
)

// Tables are plain text that fits 80 columns wherever the values allow it.

func columns(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 8, 2, ' ', 0) }

func statusTable(w io.Writer, r *agent.Report) {
	head := fmt.Sprintf("mode %s, since %s", r.Mode, r.Since.Format(time.DateTime))
	if r.Live {
		head += fmt.Sprintf(", pid %d", r.PID)
	} else {
		head = "no agent runs; this is what one would want"
	}
	fmt.Fprintln(w, head)
	fmt.Fprintf(w, "%s, %s, %s, %s\n", count(r.Links, "link"), count(r.Routes, "route"),
		count(r.Policies, "policy"), count(r.SAs, "SA"))
	if len(r.Coverages) == 0 {
		fmt.Fprintln(w, "nothing is covered: no output policy asks for ESP or AH. There is nothing to do.")
	} else {
		fmt.Fprintf(w, "%s, see `tsoctl plan`\n", count(len(r.Coverages), "coverage"))
	}
	holdTable(w, r)
	lockTable(w, r)
	for _, s := range r.Stale {
		fmt.Fprintf(w, "! %s lost events and is being read again: nothing is given back meanwhile\n", s)
	}
	for _, f := range r.Findings {
		fmt.Fprintln(w, "!", f)
	}
}

func count(n int, what string) string {
	if n != 1 {
		what = strings.TrimSuffix(what+"s", "ys")
		if strings.HasSuffix(what, "polic") {
			what += "ies"
		}
	}
	return fmt.Sprintf("%d %s", n, what)
}

func holdTable(w io.Writer, r *agent.Report) {
	if len(r.Holds) == 0 {
		return
	}
	fmt.Fprintln(w)
	t := columns(w)
	fmt.Fprintln(t, "DEVICE\tFEATURE HELD OFF\tSTATE\tBECAUSE")
	for _, h := range r.Holds {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", h.Device, h.Feature, h.State, short(h.Because))
	}
	t.Flush()
	for _, h := range r.Holds {
		if h.State == agent.StateContested || h.State == agent.StateRefused {
			fmt.Fprintf(w, "! %s %s: %s\n", h.Device, h.Feature, h.Why)
		}
	}
}

func lockTable(w io.Writer, r *agent.Report) {
	if len(r.Locks)+len(r.Clones) == 0 {
		return
	}
	fmt.Fprintln(w)
	t := columns(w)
	fmt.Fprintln(t, "ROUTE\tMTU\tDEVICE\tSTATE")
	for _, l := range r.Locks {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", l.Route, mtuText(l.MTU, l.Locked), strings.Join(l.Devices, ","), l.State)
	}
	for _, c := range r.Clones {
		if c.Throw {
			fmt.Fprintf(t, "%s\t-\t-\ttable %d, throw\n", c.Dst, c.Table)
			continue
		}
		fmt.Fprintf(t, "%s\tlock %d\t%s\ttable %d\n", c.Dst, c.MTU, strings.Join(c.Devices, ","), c.Table)
	}
	t.Flush()
	if len(r.Rules) > 0 {
		fmt.Fprintln(w)
		for _, rule := range r.Rules {
			fmt.Fprintf(w, "rule %d: %s (%s)\n", rule.Priority, rule.Text, rule.Family)
		}
	}
}

func mtuText(mtu uint32, locked bool) string {
	if locked {
		return fmt.Sprintf("lock %d", mtu)
	}
	return fmt.Sprint(mtu)
}

func short(list []string) string {
	const most = 2
	if len(list) > most {
		return strings.Join(list[:most], ", ") + fmt.Sprintf(" and %d more", len(list)-most)
	}
	return strings.Join(list, ", ")
}

func planTable(w io.Writer, r *agent.Report) {
	if !r.Live {
		fmt.Fprintln(w, "no agent runs; read from the kernel")
	}
	if len(r.Coverages) == 0 {
		fmt.Fprintln(w, "nothing is covered: no output policy asks for ESP or AH. There is nothing to do.")
		return
	}
	for _, c := range r.Coverages {
		fmt.Fprintln(w, coverageLine(c))
		mtu := "not known yet"
		if c.MTU > 0 {
			mtu = fmt.Sprint(c.MTU)
		}
		fmt.Fprintf(w, "  inner mtu %s, segments are cut at the %s\n", mtu, cutText(c.Cut))
		for _, x := range []struct {
			name string
			list []string
		}{{"carriers", c.Carriers}, {"held off", c.Held}, {"locked", c.Locked}} {
			if len(x.list) > 0 {
				fmt.Fprintf(w, "  %s: %s\n", x.name, strings.Join(x.list, "; "))
			}
		}
		for _, n := range c.Notes {
			fmt.Fprintf(w, "  - %s\n", n)
		}
	}
	holdTable(w, r)
	lockTable(w, r)
	for _, f := range r.Findings {
		fmt.Fprintln(w, "!", f)
	}
}

func coverageLine(c agent.CoverageReport) string {
	if c.Key != "" {
		return fmt.Sprintf("%s key: peer %s, local port %d", c.Key, c.Dst, c.Sport)
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

func cutText(cut string) string {
	if cut == "device" {
		return "device"
	}
	return "socket, or inside the kernel's ESP"
}

func explainTable(w io.Writer, e *agent.Explanation) {
	line := "packets to " + e.Dst
	if e.From != "" {
		line += " from " + e.From
	}
	fmt.Fprintln(w, line)
	via := e.Device
	if e.Gateway != "" {
		via += " via " + e.Gateway
	}
	fmt.Fprintf(w, "  route: %s, table %d, device mtu %d", via, e.Table, e.DeviceMTU)
	if e.RouteMTU != 0 {
		fmt.Fprintf(w, ", route mtu %s", mtuText(e.RouteMTU, e.RouteMTULocked))
	}
	fmt.Fprintln(w)
	switch e.Action {
	case "none":
		fmt.Fprintln(w, "  policy: none matches, they leave in the clear")
	case "bypass":
		fmt.Fprintf(w, "  policy: %d bypasses IPsec (%s)\n", e.Policy, e.Selector)
	case "block":
		fmt.Fprintf(w, "  policy: %d blocks them (%s)\n", e.Policy, e.Selector)
	default:
		fmt.Fprintf(w, "  policy: %d (%s)\n", e.Policy, e.Selector)
	}
	for _, l := range e.Losers {
		fmt.Fprintf(w, "  also matches, but comes later: %s\n", l)
	}
	for i := len(e.Costs) - 1; i >= 0; i-- {
		s := e.Costs[i]
		fmt.Fprintf(w, "  %s to %s, of %d bytes:\n", s.Template, s.SA, s.MTU)
		t := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
		for _, it := range s.Items {
			fmt.Fprintf(t, "    %s\t%d\t\n", it.Name, it.Bytes)
		}
		fmt.Fprintf(t, "    leaves\t%d\t\n", s.Inner)
		t.Flush()
	}
	if e.MTU > 0 {
		fmt.Fprintf(w, "  inner mtu %d, TCP MSS %d without options\n", e.MTU, e.MSS)
	}
	if c := e.Coverage; c != nil {
		fmt.Fprintf(w, "  segments are cut at the %s\n", cutText(c.Cut))
		for _, l := range c.Locked {
			fmt.Fprintf(w, "  locked: %s\n", l)
		}
		for _, h := range c.Held {
			fmt.Fprintf(w, "  held off: %s\n", h)
		}
	}
	for _, n := range e.Notes {
		fmt.Fprintf(w, "  - %s\n", n)
	}
}

func restoreTable(w io.Writer, r *agent.Restored) {
	if r.Actions == 0 {
		fmt.Fprintln(w, "nothing of tsoagent's was in place")
	} else {
		fmt.Fprintf(w, "given back: %s, %s; taken away: %s, %s\n", count(r.Holds, "feature"),
			count(r.Locks, "route mtu"), count(r.Rules, "rule"), count(r.Clones, "clone"))
	}
	for _, f := range r.Findings {
		fmt.Fprintln(w, "!", f)
	}
}
