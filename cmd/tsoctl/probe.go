package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"tsoagent/agent/probe"
)

// probeCommand measures what this kernel makes of tunnels above ESP.
func probeCommand() *cli.Command {
	return &cli.Command{
		Name: "probe", Usage: "measure which tunnels above ESP this kernel breaks, in scratch namespaces",
		OnUsageError: usage, Action: runProbe,
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "kind", Usage: "only tunnels of `KIND`: " + strings.Join(probe.Kinds(), ", ")},
			&cli.StringSliceFlag{Name: "sa", Usage: "above `SA` instead of aes-gcm: " + strings.Join(probe.SANames(), ", ")},
			&cli.BoolFlag{Name: "thorough", Usage: "longer runs, and more of them: minutes instead of seconds"},
			&cli.BoolFlag{Name: "loaded-only", Usage: "leave out the kinds whose module would have to be loaded"},
			&cli.StringFlag{Name: "state-dir", Value: probe.DefaultStateDir, Usage: "the result is written to probe.json in `DIR`"},
		},
	}
}

func runProbe(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	cfg := probe.Config{
		Kinds: c.StringSlice("kind"), SAs: c.StringSlice("sa"),
		Thorough: c.Bool("thorough"), LoadedOnly: c.Bool("loaded-only"),
	}
	if err := cfg.Validate(); err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	dir := c.String("state-dir")
	r, err := probed(c, cfg, dir)
	if err != nil {
		return err
	}
	measured := r.Measured()
	path := probe.FileIn(dir)
	if old, err := probe.Load(path); err == nil {
		r.Merge(old) // with --kind or --sa, the others keep what they had
	}
	if err := errors.Join(r.Save(path), show(c, r, func(p page) { probeTable(p, r, path) })); err != nil {
		return err
	}
	if measured == 0 {
		return cli.Exit("nothing could be measured on this kernel: see the reasons", exitFailed)
	}
	return nil
}

// probed measures. Errors that a person can help are in words.
func probed(c *cli.Context, cfg probe.Config, dir string) (*probe.Result, error) {
	bar := progressOn(os.Stderr)
	cfg.Progress = bar.tell
	var r *probe.Result
	err := probe.Writable(dir) // not after a minute's work
	if err == nil {
		r, err = probe.Run(c.Context, cfg)
		bar.end()
	}
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("run it as root (it needs CAP_SYS_ADMIN and CAP_NET_ADMIN for network namespaces of its own, and writes to %s): %w", dir, err)
	case c.Context.Err() != nil:
		return nil, errors.New("interrupted: nothing is left behind, and no result was written")
	}
	return r, err
}

func probeTable(p page, r *probe.Result, path string) {
	p.text(0, "Linux %s %s, %s", r.Kernel.Release, r.Kernel.Machine, r.Kernel.KernelVersion)
	p.text(0, "ESP GSO: esp4_offload %s, esp6_offload %s", r.Kernel.Modules["esp4_offload"], r.Kernel.Modules["esp6_offload"])
	if len(r.Loaded) > 0 {
		p.text(0, "modules that were loaded for this: %s", strings.Join(r.Loaded, ", "))
	}
	rows := [][]string{{"KIND", "OUTER", "MODE", "TSO ON", "OFF", "RETRANS", "VERDICT", "UDP_SEGMENT"}}
	for _, c := range r.Cases {
		rows = append(rows, probeRow(c))
	}
	if sas := sasOf(r); len(sas) > 1 {
		rows = withSA(rows, r)
	} else {
		p.text(0, "above ESP with %s", strings.Join(sas, ""))
	}
	p.table(rows)
	p.text(0, "TSO ON and OFF are in Mbit/s, RETRANS in segments with TSO on and off.")
	for _, why := range reasons(r) {
		p.text(0, "! %s", why)
	}
	p.text(0, "written to %s, took %.0f s", path, r.Seconds)
}

// probeRow shows the path that decides the case.
func probeRow(c probe.Case) []string {
	row := []string{c.Kind, c.Outer.String(), c.Mode}
	if c.Verdict == probe.Impossible {
		return append(row, "-", "-", "-", string(c.Verdict), "-")
	}
	d := c.Deciding()
	return append(row, fmt.Sprintf("%.1f", d.TSOOn.Mbps), fmt.Sprintf("%.1f", d.TSOOff.Mbps),
		fmt.Sprintf("%d/%d", d.TSOOn.Retransmits, d.TSOOff.Retransmits), string(c.Verdict), string(c.UDPVerdict()))
}

// sasOf lists the SAs of a result.
func sasOf(r *probe.Result) []string {
	var names []string
	for _, c := range r.Cases {
		names = append(names, c.SA)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// withSA puts a column for the SA ahead of the verdicts.
func withSA(rows [][]string, r *probe.Result) [][]string {
	for i := range rows {
		sa := "SA"
		if i > 0 {
			sa = r.Cases[i-1].SA
		}
		rows[i] = slices.Insert(rows[i], 3, sa)
	}
	return rows
}

// reasons say why a case is not healthy, the same reason once.
func reasons(r *probe.Result) []string {
	var order []string
	cases := map[string][]string{}
	several := len(sasOf(r)) > 1
	tell := func(c probe.Case, why string) {
		if !slices.Contains(order, why) {
			order = append(order, why)
		}
		name := fmt.Sprintf("%s %s %s", c.Kind, c.Outer, c.Mode)
		if several {
			name += " " + c.SA
		}
		cases[why] = append(cases[why], name)
	}
	for _, c := range r.Cases {
		if c.Verdict != probe.Healthy {
			tell(c, fmt.Sprintf("%s: %s", c.Verdict, c.Why))
		}
		for _, p := range c.Paths {
			if p.UDP != nil && p.UDP.Verdict == probe.Broken {
				tell(c, "UDP_SEGMENT broken: "+p.UDP.Why)
				break
			}
		}
	}
	var lines []string
	for _, why := range order {
		lines = append(lines, short(cases[why])+": "+why)
	}
	return lines
}
