package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
	"tsoagent/cmd/internal/inert"
)

func eventsCommand() *cli.Command {
	return &cli.Command{
		Name: "events", Usage: "what happened, and what of it led to what; -f follows",
		Description: "Each line has the time, what the kernel told, what the agent did because of it, and how long that took from when the\n" +
			"agent was told. The agent keeps the newest 2048 events of each namespace.",
		OnUsageError: usage, Action: showEvents,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with what happens, until it is stopped"},
			&cli.Uint64Flag{Name: "since", Usage: "only events with a higher number than `NUMBER`, as -o json shows them"},
		},
	}
}

func showEvents(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	cl := client.New(cfg.RunDir)
	if !c.Bool("follow") {
		l, err := cl.EventsIn(c.Context, ns, c.Uint64("since"))
		if err != nil {
			return withoutAgent(err, cfg.RunDir)
		}
		return show(c, l, func(p page) { eventsTable(p, l) })
	}
	p := diary{page: pageOf(c.App.Writer)}
	err = cl.Follow(c.Context, ns, c.Uint64("since"), func(e api.EventLine) error {
		switch option(c, "output") {
		case "json":
			b, err := json.Marshal(e)
			if err != nil {
				return err
			}
			_, err = c.App.Writer.Write(append(inert.JSON(b), '\n'))
			return err
		case "yaml":
			if _, err := fmt.Fprintln(c.App.Writer, "---"); err != nil {
				return err
			}
			return showYAML(c.App.Writer, e)
		}
		p.line(e)
		return nil
	})
	switch {
	case c.Context.Err() != nil:
		return nil // told to stop
	case err == nil:
		return cli.Exit("the agent has stopped", exitNoAgent)
	}
	return withoutAgent(err, cfg.RunDir)
}

// withoutAgent says what to do where no agent runs.
func withoutAgent(err error, runDir string) error {
	if errors.Is(err, client.ErrNoAgent) {
		return cli.Exit(fmt.Sprintf("%v; %s", err, nextWithout(runDir)), exitNoAgent)
	}
	return err
}

func eventsTable(p page, l *api.EventList) {
	if l.Netns != "" {
		p.text(0, "network namespace %s", l.Netns)
	}
	if l.Lost > 0 {
		p.text(0, "! %s more, which the agent keeps no longer", count(l.Lost, "event", "events"))
	}
	d := diary{page: p}
	for i := range l.Events {
		d.line(api.EventLine{Event: &l.Events[i]})
	}
	if len(l.Events) == 0 {
		p.text(0, "no event since %s", timeText(l.Since))
	}
}

// diary has events in lines of their own: on a terminal below the day on which they happened, elsewhere each with its day, so that it can
// be searched for.
type diary struct {
	page
	day string // of the line before
}

// line is one event as a person reads it: the cause, the effect, and how long it took.
func (d *diary) line(e api.EventLine) {
	if e.Event == nil {
		d.text(0, "! %s are missing here: they came faster than they were read", count(e.Lost, "event", "events"))
		return
	}
	text := e.Text
	if e.Kind == api.EventFailed || e.Kind == api.EventNotice {
		text = "! " + text
	}
	if e.Cause != "" {
		text = e.Cause + " → " + text
	}
	if e.Seconds > 0 {
		text += ", " + spanText(time.Duration(e.Seconds*float64(time.Second)))
	}
	at := e.At.Local()
	if d.width == 0 {
		d.text(0, "%s  %s", at.Format(time.DateTime+".000"), text)
		return
	}
	if day := at.Format(time.DateOnly); day != d.day {
		d.day = day
		d.text(0, "%s", day)
	}
	d.text(0, "%s  %s", at.Format("15:04:05.000"), text)
}

// spanText is a time in as many digits as matter: 0.05 ms, 3 ms, 250 ms, 1.2 s.
func spanText(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms < 1:
		return strings.TrimSuffix(fmt.Sprintf("%.2f", ms), "0") + " ms"
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f s", ms/1000)
}
