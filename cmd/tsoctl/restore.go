package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/api"
)

func restoreCommand() *cli.Command {
	return &cli.Command{
		Name: "restore", Usage: "undo what an agent that is gone has left", OnUsageError: usage, Action: restore,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "stale", Usage: "only what can go stale: the agent's rules and clones; holds and in-place locks stay"},
			&cli.UintFlag{Name: "table", Usage: "the agent's first routing table is `NUMBER`, if not 5450"},
			&cli.UintFlag{Name: "protocol", Usage: "the agent's route protocol is `NUMBER`, if not 84"},
		},
	}
}

func restore(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	cfg, err := configOf(c)
	if err != nil {
		return err
	}
	if c.Uint("table") > 1<<32-1 || c.Uint("protocol") > 255 {
		return cli.Exit("--table takes up to 4294967295, --protocol up to 255", exitUsage)
	}
	cfg.SetNumbers(c.Uint("table"), c.Uint("protocol"))
	if wrong := cfg.Validate(); len(wrong) > 0 {
		return cli.Exit(fmt.Sprintf("--%s: %s", strings.ReplaceAll(wrong[0].Key, "_", "-"), wrong[0].Text), exitUsage)
	}
	ns, err := netnsOf(c)
	if err != nil {
		return err
	}
	var r *agent.Restored
	var failed error
	stop := progressOn(os.Stderr).waiting("giving back")
	if ns != "" {
		r, failed = agent.RestoreIn(c.Context, ns, cfg, logAbove(slog.LevelWarn), version(), c.Bool("stale"))
	} else {
		r, failed = agent.RestoreAll(c.Context, cfg, logAbove(slog.LevelWarn), version(), c.Bool("stale"))
	}
	stop()
	if errors.Is(failed, agent.ErrRunning) {
		return fmt.Errorf("an agent is running: stop it first, it restores by itself (%w)", failed)
	}
	if r == nil {
		return failed
	}
	if err := show(c, restoredDocument{api.Version, r}, func(p page) { restoreTable(p, r, c.Bool("stale"), failed != nil) }); err != nil {
		return err
	}
	failures := r.Failed
	for _, n := range r.Namespaces {
		failures += n.Failed
	}
	if failures > 0 {
		return errors.Join(failed, cli.Exit(fmt.Sprintf("%d writes failed, see above", failures), exitFailed))
	}
	return failed
}

// restoredDocument is what -o json and -o yaml print.
type restoredDocument struct {
	Version int `json:"version"`
	*agent.Restored
}

func restoreTable(p page, r *agent.Restored, stale, failed bool) {
	restoredIn(p, r, stale, failed)
	for i := range r.Namespaces {
		restoredIn(p, &r.Namespaces[i], stale, false)
	}
}

// restoredIn is what was done in one namespace. Where it has failed, which is told behind it, nothing is said of what was there: it may be there
// still.
func restoredIn(p page, r *agent.Restored, stale, failed bool) {
	in := ""
	if r.Netns != "" {
		in = "namespace " + r.Netns + ": "
	}
	back := some(count(r.Holds, "feature", "features"), count(r.Locks, "route mtu", "route mtus"), count(r.DeviceMTUs, "device mtu", "device mtus"))
	away := some(count(r.Rules, "rule", "rules"), count(r.Clones, "clone", "clones"), count(r.Lanes, "lane", "lanes"), count(r.Clamps, "clamp", "clamps"))
	switch {
	case r.Actions > 0 && back != "" && away != "":
		p.text(0, "%sgiven back: %s; taken away: %s", in, back, away)
	case r.Actions > 0 && back != "":
		p.text(0, "%sgiven back: %s", in, back)
	case r.Actions > 0 && away != "":
		p.text(0, "%staken away: %s", in, away)
	case r.Actions > 0:
		p.text(0, "%s%s undone", in, count(r.Actions, "change", "changes"))
	case failed:
	case stale:
		p.text(0, "%sno rule or clone of tsoagent's was in place", in)
	default:
		p.text(0, "%snothing of tsoagent's was in place", in)
	}
	for _, f := range r.Findings {
		p.text(0, "! %s", f)
	}
}
