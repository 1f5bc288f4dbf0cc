package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Writes is how long the agent takes to give all its locks back and to install them anew, at `tsoctl pause --restore` and `tsoctl resume`. The
// floor is `ip -batch` with the same routes, in a table that nothing leads to.
type Writes struct {
	Routes  int   `json:"routes"`
	Install Ratio `json:"install"`
	Remove  Ratio `json:"remove"`
}

// writes measures an agent that has everything in place, and stops it.
func (r *run) writes(a *Agent) error {
	routes, err := clones()
	if err != nil {
		return stopped(a, err)
	}
	r.out.Writes.Routes = len(routes)
	for range r.Rounds {
		for _, step := range []struct {
			args []string
			into *Samples
		}{
			{[]string{"pause", "--restore"}, &r.out.Writes.Remove.Ours},
			{[]string{"resume"}, &r.out.Writes.Install.Ours},
		} {
			began := time.Now()
			cmd := exec.Command(filepath.Join(r.Bin, "tsoctl"), append(step.args, "--run-dir", a.dir)...)
			if out, err := cmd.CombinedOutput(); err != nil {
				return stopped(a, fmt.Errorf("tsoctl %s: %w: %s", step.args[0], err, lastLine(out)))
			}
			end, err := a.quiet(settled)
			if err != nil {
				return stopped(a, err)
			}
			step.into.add(end.Sub(began))
		}
	}
	again, err := clones()
	if err == nil && len(again) != len(routes) {
		err = fmt.Errorf("%d of %d clones are back", len(again), len(routes))
	}
	if err != nil {
		return stopped(a, err)
	}
	if err := a.Stop(); err != nil {
		return err
	}
	return r.writesFloor(routes)
}

// writesFloor writes the same routes with ip, while no agent looks.
func (r *run) writesFloor(routes []string) error {
	for range r.Rounds {
		for _, step := range []struct {
			verb string
			into *Samples
		}{{"add", &r.out.Writes.Install.Floor}, {"del", &r.out.Writes.Remove.Floor}} {
			var text strings.Builder
			for _, route := range routes {
				fmt.Fprintf(&text, "route %s %s\n", step.verb, route)
			}
			const file = "/run/batch" // this namespace's own
			if err := os.WriteFile(file, []byte(text.String()), 0o644); err != nil {
				return err
			}
			began := time.Now()
			if out, err := exec.Command("ip", "-batch", file).CombinedOutput(); err != nil {
				return fmt.Errorf("ip -batch: %w: %s", err, bytes.TrimSpace(out))
			}
			step.into.add(time.Since(began))
		}
	}
	return nil
}

// shown is what `ip route show table all` adds to a route's words, and `ip route add` does not take there.
var shown = regexp.MustCompile(` (pref medium|linkdown|dead)\b`)

// tables are the agent's. What one route is in each of them is as many in the tables of the floor.
var tables = regexp.MustCompile(`\btable 54(\d\d)\b`)

// clones are the agent's routes in iproute2's words, but for the table.
func clones() (list []string, err error) {
	for _, family := range []string{"-4", "-6"} {
		out, err := exec.Command("ip", family, "route", "show", "table", "all", "proto", fmt.Sprint(ourProtocol)).Output()
		if err != nil {
			return nil, fmt.Errorf("ip route show: %w", err)
		}
		for line := range bytes.Lines(out) {
			words := shown.ReplaceAllString(string(bytes.TrimSpace(line)), "")
			list = append(list, tables.ReplaceAllString(words, fmt.Sprintf("table %d$1", straightTable/100)))
		}
	}
	return list, nil
}
