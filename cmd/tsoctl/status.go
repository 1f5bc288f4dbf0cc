package main

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/netns"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name: "status", Usage: "what is covered, held off and locked; exit 3 if a person should look",
		OnUsageError: usage, Action: status,
	}
}

func status(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	r, err := client.New(cfg.RunDir).ReportIn(c.Context, ns)
	if err != nil {
		return withoutAgent(err, cfg.RunDir)
	}
	if err := show(c, r, func(p page) { statusTable(p, r) }); err != nil {
		return err
	}
	if degraded(r) {
		return cli.Exit("", exitDegraded)
	}
	return nil
}

// nextWithout says what to do where no agent runs.
func nextWithout(runDir string) string {
	text := agent.LeftOver(runDir).String()
	if text == "" {
		return "`tsoctl plan` shows what one would do, `tsoagent run` starts one"
	}
	return fmt.Sprintf("one that was killed or told to keep has left %s: `tsoagent run` takes over what it still wants, `tsoctl restore` gives all of it back", text)
}

// degraded reports whether a person should look.
func degraded(r *agent.Report) bool { return r.Degraded() }

func statusTable(p page, r *agent.Report) {
	p.text(0, "mode %s, since %s, pid %d", r.Mode, timeText(r.Since), r.PID)
	if r.Paused != nil {
		p.text(0, "! %s", pausedText(r.Paused))
	}
	if r.NotFollowed {
		namespaceTable(p, r)
		findings(p, r)
		return
	}
	if r.Netns != "" {
		p.text(0, "network namespace %s", r.Netns)
	}
	p.text(0, "%s, %s, %s, %s", count(r.Links, "link", "links"), count(r.Routes, "route", "routes"),
		count(r.Policies, "policy", "policies"), count(r.SAs, "SA", "SAs"))
	if len(r.Coverages) == 0 {
		p.text(0, "%s", nothingText(r))
	} else {
		p.text(0, "%s, see `tsoctl plan`", count(len(r.Coverages), "coverage", "coverages"))
	}
	observing(p, r)
	heldTable(p, r)
	laneTable(p, r)
	shown := shorten(r)
	lockTable(p, shown)
	mtuTable(p, r)
	clampTable(p, shown)
	leftOut(p, r, shown)
	namespaceTable(p, r)
	findings(p, r)
}

const nothingCovered = "nothing is covered: no output policy asks for ESP or AH."

// nothingText says that nothing is covered, and whether there is something to do all the same.
func nothingText(r *agent.Report) string {
	if len(r.Holds) == 0 {
		return nothingCovered + " There is nothing to do."
	}
	return nothingCovered
}

// observing says that what follows is only what an agent would do.
func observing(p page, r *agent.Report) {
	if r.Live && r.Mode == agent.Observe && len(r.Coverages) > 0 {
		p.text(0, "the agent only observes: nothing of this is written")
	}
}

// namespaceTable has a line for each namespace but the one that the report is about. Where they
// don't fit one screen, those in which there is nothing to see are only counted.
func namespaceTable(p page, r *agent.Report) {
	quiet, many := 0, len(r.Namespaces) > screen
	rows := [][]string{{"NAMESPACE", "STATE", "COVERED", "HELD OFF", "LOCKED"}}
	for _, n := range r.Namespaces {
		switch {
		case n.Name == netns.Host:
		case many && n.State == agent.NetnsFollowed && n.Coverages+n.Holds+n.Locks+n.Clones == 0 && !n.Degraded:
			quiet++
		case n.State == agent.NetnsFollowed || n.State == agent.NetnsLeaving:
			state := n.State
			if n.Degraded {
				state += ", look"
			}
			rows = append(rows, []string{n.Name, state, fmt.Sprint(n.Coverages), fmt.Sprint(n.Holds), fmt.Sprint(n.Locks + n.Clones)})
		default:
			rows = append(rows, []string{n.Name, n.State, "-", "-", "-"})
		}
	}
	if r.NotFollowed {
		p.text(0, "the namespace that it was started in is not followed")
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	if quiet > 0 {
		p.text(0, "followed, with nothing covered: %s", count(quiet, "namespace", "namespaces"))
	}
	if len(rows) > 1 {
		p.text(0, "more with `tsoctl status --netns NAMESPACE`")
	}
}

// screen is how many locks and clones, and how many rules, fit a status of one screen.
const screen = 12

// shorten leaves of the locks, clones and rules what fits one screen.
func shorten(r *agent.Report) *agent.Report {
	s := *r
	s.Locks = s.Locks[:min(len(s.Locks), screen)]
	s.Clones = s.Clones[:min(len(s.Clones), screen-len(s.Locks))]
	s.Rules = s.Rules[:min(len(s.Rules), screen)]
	s.Clamps = s.Clamps[:min(len(s.Clamps), screen)]
	return &s
}

// leftOut says how much more there is than was shown.
func leftOut(p page, r, shown *agent.Report) {
	if n := len(r.Locks) + len(r.Clones) - len(shown.Locks) - len(shown.Clones); n > 0 {
		p.text(0, "and %s, see `tsoctl plan`", count(n, "more route", "more routes"))
	}
	if n := len(r.Clamps) - len(shown.Clamps); n > 0 {
		p.text(0, "and %s, see `tsoctl plan`", count(n, "more clamp", "more clamps"))
	}
	if n := len(r.Rules) - len(shown.Rules); n > 0 {
		p.text(0, "and %s, see `tsoctl plan`", count(n, "more rule", "more rules"))
	}
}

// findings are what a person should look at.
func findings(p page, r *agent.Report) {
	for _, s := range r.Stale {
		p.text(0, "! %s lost events and is being read again: nothing is given back meanwhile", s)
	}
	for _, f := range r.Findings {
		p.text(0, "! %s", f)
	}
}

// heldTable has a line for the features of a device that are alike, and no more than fit a screen.
func heldTable(p page, r *agent.Report) {
	type group struct{ device, state, because string }
	var order []group
	features := map[group][]string{}
	for _, h := range r.Holds {
		g := group{h.Device, h.State, cmp.Or(short(h.Because), h.Why)}
		if features[g] == nil {
			order = append(order, g)
		}
		features[g] = append(features[g], h.Feature)
	}
	rows := [][]string{{"DEVICE", "HELD OFF", "STATE", "BECAUSE"}}
	for i, g := range order {
		if i < screen || g.state == agent.StateContested || g.state == agent.StateRefused {
			rows = append(rows, []string{g.device, few(features[g]), g.state, g.because})
		}
	}
	if len(order) == 0 {
		return
	}
	p.table(rows)
	if n := len(order) - len(rows) + 1; n > 0 {
		p.text(0, "and %s, see `tsoctl devices`", count(n, "more line", "more lines"))
	}
	why(p, r)
}

// few are features in as few words as fit a column.
func few(features []string) string {
	if len(features) == 1 {
		return features[0]
	}
	return fmt.Sprintf("%d: %s …", len(features), slices.MinFunc(features, func(a, b string) int { return cmp.Compare(len(a), len(b)) }))
}

// why says why features that are wanted off are on.
func why(p page, r *agent.Report) {
	told := false
	for _, h := range r.Holds {
		if h.State == agent.StateContested || h.State == agent.StateRefused {
			p.text(0, "! %s %s: %s", h.Device, h.Feature, h.Why)
			told = true
		}
	}
	if told {
		p.text(0, "`tsoctl events` says when that was, `tsoctl devices` what else the device does")
	}
}
