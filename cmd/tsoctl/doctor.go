package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/doctor"
	"tsoagent/agent/doctor/host"
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
	stop := progressOn(os.Stderr).waiting("looking")
	p, err := patient(c.Context, cfg, ns)
	stop()
	if err != nil {
		return err
	}
	checkup := doctor.Check(p)
	checkup.Netns = ns
	if err := show(c, checkup, func(p page) { doctorTable(p, checkup) }); err != nil {
		return err
	}
	if len(checkup.Findings) > 0 {
		return cli.Exit("", exitDegraded)
	}
	return nil
}

// patient asks the agent, if one runs, for what it knows best, and looks at the kernel and the rest of the host itself. Who may only ask the
// agent gets what that says.
func patient(ctx context.Context, cfg agent.Config, ns string) (*doctor.Patient, error) {
	p := &doctor.Patient{Now: uint64(time.Now().Unix())}
	cl := client.New(cfg.RunDir)
	d, err := cl.DiagnosisIn(ctx, ns)
	alone := errors.Is(err, client.ErrNoAgent)
	if err != nil && !alone {
		return nil, err
	}
	if !alone {
		p.Diagnosis = d
		if p.Report, err = cl.ReportIn(ctx, ns); err != nil {
			return nil, err
		}
		if proc, err := host.ReadProcess("tsoagent", p.Report.PID); err == nil {
			proc.Agent, proc.Elsewhere = true, len(p.Report.Namespaces) > 1
			p.Processes = append(p.Processes, proc)
		} else {
			p.NotSeen = append(p.NotSeen, fmt.Sprintf("the agent's capabilities: %v", err))
		}
	}
	err = agent.ExamineIn(ctx, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), func(ctx context.Context, e *agent.Examination) (err error) {
		if alone {
			if p.Diagnosis, err = e.Diagnose(ctx); err != nil {
				return err
			}
		}
		return host.Look(ctx, e, p)
	})
	if errors.Is(err, agent.ErrPermission) && !alone {
		p.NotSeen = append(p.NotSeen, fmt.Sprintf("all but the agent's connections and capabilities: %v", err))
		return p, nil
	}
	return p, err
}

// doctorTable has what was found under its title, and what helps once for all of a kind.
func doctorTable(p page, c *doctor.Checkup) {
	if c.Netns != "" {
		p.text(0, "network namespace %s", c.Netns)
	}
	if len(c.Findings) == 0 {
		p.text(0, "no finding")
	} else {
		p.text(0, "%s", count(len(c.Findings), "finding", "findings"))
	}
	for i, f := range c.Findings {
		if i == 0 || c.Findings[i-1].Code != f.Code {
			p.text(0, "! %s: %s", f.Code, f.Title)
		}
		p.text(2, "- %s", f.Text)
		for _, line := range f.Commands {
			fmt.Fprintf(p, "      %s\n", line) // in one piece, to be pasted
		}
		if i+1 == len(c.Findings) || c.Findings[i+1].Code != f.Code {
			p.text(2, "%s", f.Do)
			p.text(2, "more in %s", f.Page)
		}
	}
	for _, n := range c.NotSeen {
		p.text(0, "not looked at: %s", n)
	}
}
