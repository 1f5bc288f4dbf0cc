package main

import (
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
)

func pauseCommand() *cli.Command {
	return &cli.Command{
		Name: "pause", Usage: "have the agent take its hands off, for a while or until it is resumed",
		Description: "From the answer on the agent writes nothing to the kernel. What is in place stays, or is given back first; it goes on to\n" +
			"follow the kernel, and its status says what it would do. A pause ends with `tsoctl resume`, when its time is over, and\n" +
			"with the agent's process. Only root may pause it.",
		OnUsageError: usage, Action: pause,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "for", Usage: "go on by itself after `TIME`, as 90s, 10m or 2h"},
			&cli.BoolFlag{Name: "restore", Usage: "give everything back first"},
		},
	}
}

func resumeCommand() *cli.Command {
	return &cli.Command{
		Name: "resume", Usage: "end a pause: what is missing is put in place at once",
		OnUsageError: usage, Action: resume,
	}
}

func pause(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	ask := api.PauseRequest{Restore: c.Bool("restore")}
	if c.IsSet("for") {
		if c.Duration("for") <= 0 {
			return cli.Exit(fmt.Sprintf("--for: %s is no time above 0", c.Duration("for")), exitUsage)
		}
		ask.For = c.Duration("for").String()
	}
	stop := progressOn(os.Stderr).waiting("waiting for the agent to take its hands off")
	a, err := client.New(cfg.RunDir).Pause(c.Context, ns, ask)
	stop()
	return paused(c, a, withoutAgent(err, cfg.RunDir))
}

func resume(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	stop := progressOn(os.Stderr).waiting("waiting for the agent to go on")
	a, err := client.New(cfg.RunDir).Resume(c.Context, ns)
	stop()
	return paused(c, a, withoutAgent(err, cfg.RunDir))
}

// paused shows what became of an order. It has failed if one namespace could not be told, or has not given
// everything back.
func paused(c *cli.Context, a *api.PauseAnswer, err error) error {
	if err != nil {
		return err
	}
	if err := show(c, a, func(p page) { pauseTable(p, a) }); err != nil {
		return err
	}
	for _, n := range a.Namespaces {
		if n.Why != "" || n.Paused != nil && n.Paused.Left > 0 {
			return cli.Exit("", exitFailed)
		}
	}
	return nil
}

func pauseTable(p page, a *api.PauseAnswer) {
	for _, n := range a.Namespaces {
		in := ""
		if len(a.Namespaces) > 1 || n.Name != "host" {
			in = "namespace " + n.Name + ": "
		}
		switch {
		case n.Why != "":
			p.text(0, "! %s%s", in, n.Why)
		case n.Paused == nil:
			p.text(0, "%snot paused: what waited is done now", in)
		default:
			p.text(0, "%s%s", in, pausedText(n.Paused))
		}
	}
	if len(a.Namespaces) == 0 {
		p.text(0, "no namespace is followed; those that come are told the same")
	}
}

// pausedText says since when, by whom and until when nothing is written, and what to do.
func pausedText(p *api.Paused) string {
	text := fmt.Sprintf("paused since %s by %s", timeText(p.Since), p.By)
	switch {
	case p.Left > 0:
		text += fmt.Sprintf(": %s still to be given back, see `tsoctl events`", count(p.Left, "change is", "changes are"))
	case p.Restore:
		text += ": everything is given back"
	default:
		text += ": what is in place stays, and nothing is written"
	}
	if p.Waiting > 0 {
		text += fmt.Sprintf(" (%s)", count(p.Waiting, "change waits", "changes wait"))
	}
	if !p.Until.IsZero() {
		return text + fmt.Sprintf(" until %s; `tsoctl resume` goes on now", timeText(p.Until))
	}
	return text + "; `tsoctl resume` goes on"
}
