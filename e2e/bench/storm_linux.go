package bench

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Storm is every route replaced once as fast as the kernel takes it: from the first write until the agent, in mode enforce, has nothing left
// to do. Its floor is how long a reader takes that only counts the notifications, with no agent there.
type Storm struct {
	Time Ratio `json:"time"`
	// Exact says, of each storm, that the agent's plan and what it counts were those of a fresh look at the kernel afterwards.
	Exact []bool `json:"exact"`
	// Differences is what was not, in words.
	Differences []string `json:"differences,omitempty"`
	// Moved is how long a clone took to follow its route, from when the route went to the kernel, among some seventy in one system call. Late
	// is how many clones did not follow.
	Moved Samples `json:"moved"`
	Late  int     `json:"late"`

	Overruns float64 `json:"overruns"` // of the agent's receive buffers, in all storms
	Rounds   Samples `json:"rounds"`   // of the agent's loop in each storm
	CPU      Samples `json:"cpu"`      // seconds of the processors that the agent used in each storm
	Peak     int64   `json:"peak"`     // bytes, the most that was resident until the last one was over
}

// gatewayOf is the step that storm i moves each route by, so that no two storms in a row write the same.
func gatewayOf(storm int) int { return storm%(gateways-1) + 1 }

func (r *run) blow(i int) error {
	return r.lab.write(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, replaced(r.lab.world.Routes, gatewayOf(i)))
}

// stormFloor lets a counting reader see a storm.
func (r *run) stormFloor(i int) error {
	cmd := exec.Command(r.Self, "-count", strconv.Itoa(len(r.lab.world.Routes)))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	lines.Scan() // it is ready
	began := time.Now()
	if err := r.blow(i); err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	counted := lines.Scan()
	took := time.Since(began)
	if err := cmd.Wait(); err != nil || !counted {
		return fmt.Errorf("counting reader: %w: %s", err, stderr.Bytes())
	}
	r.out.Storm.Time.Floor.add(took)
	return nil
}

// Count reads notifications of routes and does nothing with them, until there were n.
func Count(n int, out io.Writer) error {
	s, err := dial(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	for got := 0; got < n; {
		if err := s.receive(func(header, []byte) bool { got++; return true }); err != nil {
			return fmt.Errorf("after %d of %d: %w", got, n, err)
		}
	}
	_, err = fmt.Fprintln(out, "counted")
	return err
}

func (r *run) storm(a *Agent, i int) error {
	before, err := a.metrics()
	if err != nil {
		return err
	}
	clones, err := r.lab.watchClones()
	if err != nil {
		return err
	}
	cpu, err := a.cpu()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := r.blow(i); err != nil {
		return err
	}
	end, err := a.quiet(settled)
	if err != nil {
		r.out.Storm.Differences = append(r.out.Storm.Differences, err.Error())
	}
	moved, late, err := clones.lags(r.lab)
	if err != nil {
		return err
	}
	if n := len(clones.seen); n > 0 && clones.seen[n-1].at.After(end) {
		end = clones.seen[n-1].at // between two looks
	}
	r.out.Storm.Time.Ours.add(end.Sub(began))
	used, err := a.cpu()
	if err != nil {
		return err
	}
	r.out.Storm.CPU.add(used - cpu)
	m, err := a.Memory()
	if err != nil {
		return err
	}
	r.out.Storm.Peak = max(r.out.Storm.Peak, m.Peak)
	r.out.Storm.Moved = append(r.out.Storm.Moved, moved...)
	r.out.Storm.Late += late
	after, err := a.metrics()
	if err != nil {
		return err
	}
	const rounds, overruns = `tsoagent_rounds_total{netns="host"}`, `tsoagent_source_overruns_total{netns="host",source="routes"}`
	r.out.Storm.Rounds = append(r.out.Storm.Rounds, after[rounds]-before[rounds])
	r.out.Storm.Overruns += after[overruns] - before[overruns]
	differs, err := r.compare(a)
	if err != nil {
		return err
	}
	r.out.Storm.Exact = append(r.out.Storm.Exact, len(differs) == 0)
	r.out.Storm.Differences = append(r.out.Storm.Differences, differs...)
	return nil
}

// compared is what an agent's plan and one that is made from the kernel alone must have in common: not who made it, when and from how many
// events.
var compared = []string{
	"links", "routes", "policies", "sas", "stale", "coverages", "holds", "locks", "rules", "clones", "findings", "lanes", "clamps", "device_mtus",
}

// compare plans from a fresh look at the kernel, without the agent, and says where the agent's plan differs.
func (r *run) compare(a *Agent) (differs []string, err error) {
	live, err := r.plan(a, a.dir)
	if err != nil {
		return nil, err
	}
	fresh, err := r.plan(a, filepath.Join(a.dir, "nobody"))
	if err != nil {
		return nil, err
	}
	for _, key := range compared {
		if !bytes.Equal(live[key], fresh[key]) {
			differs = append(differs, fmt.Sprintf("%s: %s", key, firstDifference(live[key], fresh[key])))
		}
	}
	return differs, nil
}

// plan is `tsoctl plan` in pieces, as the one who runs in a directory has it, or without an agent.
func (r *run) plan(a *Agent, runDir string) (map[string]json.RawMessage, error) {
	out, err := exec.Command(filepath.Join(r.Bin, "tsoctl"), "plan", "-o", "json", "--run-dir", runDir, "--config", filepath.Join(a.dir, "tsoagent.yaml")).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() != 3 { // degraded
		return nil, fmt.Errorf("tsoctl plan: %w: %s", err, exit.Stderr)
	}
	pieces := map[string]json.RawMessage{}
	if err := json.Unmarshal(out, &pieces); err != nil {
		return nil, fmt.Errorf("tsoctl plan: %w", err)
	}
	return pieces, nil
}

// firstDifference shows where two texts part.
func firstDifference(a, b []byte) string {
	at := 0
	for at < len(a) && at < len(b) && a[at] == b[at] {
		at++
	}
	show := func(t []byte) []byte { return t[max(0, min(at-60, len(t))):min(at+60, len(t))] }
	return fmt.Sprintf("agent %q, kernel %q", show(a), show(b))
}
