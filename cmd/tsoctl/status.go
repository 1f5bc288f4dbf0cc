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
		findings(p, shorten(r))
		more(p, len(r.Findings)-screen, "finding", "findings", "plan")
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
	shown := shorten(r)
	laneTable(p, shown)
	lockTable(p, shown)
	mtuTable(p, shown)
	clampTable(p, shown)
	leftOut(p, r, shown)
	namespaceTable(p, r)
	findings(p, shown)
	more(p, len(r.Findings)-len(shown.Findings), "finding", "findings", "plan")
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
// don't fit one screen, those in which there is nothing to see are only counted, and so are the last of the others: who is to be looked at
// goes first.
func namespaceTable(p page, r *agent.Report) {
	quiet, many := 0, len(r.Namespaces) > screen
	var list []agent.NamespaceReport
	for _, n := range r.Namespaces {
		switch {
		case n.Name == netns.Host:
		case many && n.State == agent.NetnsFollowed && n.Coverages+n.Holds+n.Locks+n.Clones == 0 && !n.Degraded:
			quiet++
		default:
			list = append(list, n)
		}
	}
	rows := [][]string{{"NAMESPACE", "STATE", "COVERED", "HELD OFF", "LOCKED"}}
	for i, shown := range fitting(list, func(n agent.NamespaceReport) bool { return n.Degraded }) {
		if shown {
			rows = append(rows, namespaceRow(&list[i]))
		}
	}
	if r.NotFollowed {
		p.text(0, "the namespace that it was started in is not followed")
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	more(p, len(list)-len(rows)+1, "namespace", "namespaces", "status -o json")
	if quiet > 0 {
		p.text(0, "followed, with nothing covered: %s", count(quiet, "namespace", "namespaces"))
	}
	if len(rows) > 1 {
		p.text(0, "more with `tsoctl status --netns NAMESPACE`")
	}
}

func namespaceRow(n *agent.NamespaceReport) []string {
	if n.State != agent.NetnsFollowed && n.State != agent.NetnsLeaving {
		return []string{n.Name, n.State, "-", "-", "-"}
	}
	state := n.State
	if n.Degraded {
		state += ", look"
	}
	return []string{n.Name, state, fmt.Sprint(n.Coverages), fmt.Sprint(n.Holds), fmt.Sprint(n.Locks + n.Clones)}
}

// screen is how many there may be of each kind of line in a status of one screen.
const screen = 12

// fitting says which of a list are shown where no more than fit a screen are: those that matter go ahead of the others.
func fitting[T any](list []T, matters func(T) bool) []bool {
	shown, left := make([]bool, len(list)), screen
	for _, first := range []bool{true, false} {
		for i, v := range list {
			if left > 0 && matters(v) == first {
				shown[i] = true
				left--
			}
		}
	}
	return shown
}

// more says how many are not shown, and which command has them.
func more(p page, n int, one, many, command string) {
	if n > 0 {
		p.text(0, "and %s, see `tsoctl %s`", count(n, "more "+one, "more "+many), command)
	}
}

// shorten leaves of the lists what fits one screen.
func shorten(r *agent.Report) *agent.Report {
	s := *r
	s.Locks = s.Locks[:min(len(s.Locks), screen)]
	s.Clones = s.Clones[:min(len(s.Clones), screen-len(s.Locks))]
	s.Rules = s.Rules[:min(len(s.Rules), screen)]
	s.Clamps = s.Clamps[:min(len(s.Clamps), screen)]
	s.Lanes = s.Lanes[:min(len(s.Lanes), screen)]
	s.DeviceMTUs = s.DeviceMTUs[:min(len(s.DeviceMTUs), screen)]
	s.Findings = s.Findings[:min(len(s.Findings), screen)]
	return &s
}

// leftOut says how much more there is than was shown.
func leftOut(p page, r, shown *agent.Report) {
	more(p, len(r.Lanes)-len(shown.Lanes), "lane", "lanes", "plan")
	more(p, len(r.Locks)+len(r.Clones)-len(shown.Locks)-len(shown.Clones), "route", "routes", "locks")
	more(p, len(r.DeviceMTUs)-len(shown.DeviceMTUs), "device mtu", "device mtus", "locks")
	more(p, len(r.Clamps)-len(shown.Clamps), "clamp", "clamps", "locks")
	more(p, len(r.Rules)-len(shown.Rules), "rule", "rules", "locks")
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
	shown := fitting(order, func(g group) bool { return trouble(g.state) })
	for i, g := range order {
		if shown[i] {
			rows = append(rows, []string{g.device, few(features[g]), g.state, g.because})
		}
	}
	if len(order) == 0 {
		return
	}
	p.table(rows)
	more(p, len(order)-len(rows)+1, "line", "lines", "devices")
	why(p, r, screen)
}

// trouble says that a feature that is wanted off is on, and stays it.
func trouble(state string) bool { return state == agent.StateContested || state == agent.StateRefused }

// few are features in as few words as fit a column.
func few(features []string) string {
	if len(features) == 1 {
		return features[0]
	}
	return fmt.Sprintf("%d: %s …", len(features), slices.MinFunc(features, func(a, b string) int { return cmp.Compare(len(a), len(b)) }))
}

// why says why features that are wanted off are on, of so many at most.
func why(p page, r *agent.Report, most int) {
	told := 0
	for _, h := range r.Holds {
		if !trouble(h.State) {
			continue
		}
		if told++; told <= most {
			p.text(0, "! %s %s: %s", h.Device, h.Feature, h.Why)
		}
	}
	if told > most {
		p.text(0, "! and %s", count(told-most, "more feature", "more features"))
	}
	if told > 0 {
		p.text(0, "`tsoctl events` says when that was, `tsoctl devices` what else the device does")
	}
}
