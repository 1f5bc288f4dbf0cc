package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/doctor"
	"tsoagent/agent/netns"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name: "doctor", Usage: "what is wrong, and what helps; exit 3 if there is a finding; works without an agent",
		OnUsageError: usage, Action: runDoctor,
	}
}

func runDoctor(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	d, err := diagnose(c.Context, cfg, ns)
	if err != nil {
		return err
	}
	checkup := doctor.Check(d)
	checkup.Netns = ns
	if err := show(c, checkup, func(p page) { doctorTable(p, checkup) }); err != nil {
		return err
	}
	if len(checkup.Findings) > 0 {
		return cli.Exit("", exitDegraded)
	}
	return nil
}

// diagnose asks the agent, or reads the kernel where none runs.
func diagnose(ctx context.Context, cfg agent.Config, ns string) (*agent.Diagnosis, error) {
	d, err := client.New(cfg.RunDir).DiagnosisIn(ctx, ns)
	if errors.Is(err, client.ErrNoAgent) {
		return agent.DiagnoseIn(ctx, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version())
	}
	return d, err
}

// doctorTable has what was found under its title, and what helps once for all of a kind.
func doctorTable(p page, c *doctor.Checkup) {
	if c.Netns != "" {
		p.text(0, "network namespace %s", c.Netns)
	}
	if len(c.Findings) == 0 {
		p.text(0, "no finding")
		return
	}
	p.text(0, "%s", count(len(c.Findings), "finding", "findings"))
	for i, f := range c.Findings {
		if i == 0 || c.Findings[i-1].Code != f.Code {
			p.text(0, "! %s: %s", f.Code, f.Title)
		}
		p.text(2, "- %s", f.Text)
		if i+1 == len(c.Findings) || c.Findings[i+1].Code != f.Code {
			p.text(2, "%s", f.Do)
			p.text(2, "more in %s", f.Page)
		}
	}
}
