package kill

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A lab runs schedules, and counts.
type lab struct {
	bin                         string
	tried, kills, agents, lived int
	moments                     int            // killed at no point
	at                          map[string]int // killed at a point
	pairs                       map[pair]int   // the same, with how it was cleaned up
	reached                     map[string]int
	byWay                       [ways]int
	lost                        int // versions that routes' owners wrote, and nobody has any more
}

func newLab(bin string) *lab {
	return &lab{bin: bin, at: map[string]int{}, pairs: map[pair]int{}, reached: map[string]int{}}
}

// A pair is where something was killed, and how it was cleaned up.
type pair struct {
	point string
	way   int
}

// A try is one schedule that is being run.
type try struct {
	testing.TB
	*lab
	s         *schedule
	w         *world
	dir       string
	orders    []string // for the processes to come
	processes []*process
}

// try runs one schedule. It fails the test where the kernel, or the journal, is not as it should be.
func (l *lab) try(t testing.TB, s *schedule) {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "kill-") // which is this process's own
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	x := &try{TB: t, lab: l, s: s, dir: dir, orders: s.orders}
	l.tried++
	l.byWay[s.way]++
	reference := x.world()
	defer reference.close()
	x.w = x.world()
	defer x.w.close()
	defer x.tell()
	witness := x.w.watch(t)
	defer witness.Close()
	x.must(os.WriteFile(filepath.Join(dir, "tsoagent.yaml"), fmt.Appendf(nil, "%srun_dir: %s\nstate_dir: %s\n", s.config, dir, dir), 0o644))
	if s.damaged {
		x.must(os.WriteFile(filepath.Join(dir, "journal"), []byte("nothing that an agent writes\n"), 0o640))
	}

	kills := l.kills
	x.happen(s.events[0], nil)
	x.first()
	if x.s.mute {
		x.w.mute()
	}
	x.happen(s.events[2], nil)
	x.cleanUp()
	x.happen(s.events[4], nil)
	for _, e := range slices.Concat(s.events[:]...) {
		x.must(reference.do(e))
	}

	want, werr := reference.snapshot()
	got, gerr := x.w.snapshot()
	x.must(werr)
	x.must(gerr)
	if diff := differences(want, got); len(diff) > 0 {
		// Who overwrote what an owner wrote must have died of it.
		var stale []string
		if l.kills > kills {
			stale = witness.overwritten(t, x.w.Owner())
		}
		if diff = slices.DeleteFunc(diff, func(line string) bool { f := strings.Fields(line); return len(f) > 2 && slices.Contains(stale, f[2]) }); len(diff) > 0 {
			t.Errorf("not what it would be without an agent (- without, + with; overwritten: %q):\n%s", stale, strings.Join(diff, "\n"))
		} else {
			l.lost += len(stale)
		}
	}
	if left := x.journal(); len(left) > 0 {
		t.Errorf("the journal still has %q", left)
	}
}

func (x *try) must(err error) {
	x.Helper()
	if err != nil {
		x.Fatal(err)
	}
}

// world makes one of the two worlds.
func (x *try) world() *world {
	w := newWorld(x)
	if x.s.tc {
		_, err := w.Run("", "tc", "qdisc", "add", "dev", "nic1", "clsact")
		x.must(err)
	}
	if x.s.keys {
		x.must(w.listen())
	}
	return w
}

// first runs the first agent, and sees to its end.
func (x *try) first() {
	p := x.start()
	switch {
	case x.s.race:
		select {
		case <-p.stopped:
		case <-p.ready: // other events have left nothing to write in place
			p.quiet(10 * time.Millisecond)
		}
	case x.s.pause > 0:
		p.begun(x)
	}
	x.happen(x.s.events[1], p)
	p.begun(x)
	p.quiet(time.Duration(x.s.after) * time.Millisecond)
	if x.s.killed && p.alive() {
		p.shot = true
		_ = p.cmd.Process.Kill() // it may have died
	}
	if !x.stop(p) {
		x.lived++
	}
}

// cleanUp does so in the schedule's way, again and again until it is done without a kill.
func (x *try) cleanUp() {
	if x.s.way == staleRestart || x.s.way == staleRestore {
		x.tsoctl("restore", "--stale")
		out, err := x.w.Run("", "sh", "-c", "ip -d rule; ip -d -6 rule; ip route show table all proto 84; ip -6 route show table all proto 84")
		if err != nil || strings.Contains(out, "proto 84") || strings.Contains(out, "5450") {
			x.Errorf("after restore --stale, %v:\n%s", err, out)
		}
	}
	if x.s.way == restore || x.s.way == staleRestore {
		x.tsoctl("restore")
		x.happen(x.s.events[3], nil)
		return
	}
	for events := x.s.events[3]; ; events = nil {
		p := x.start()
		p.begun(x)
		x.happen(events, p)
		p.quiet(time.Duration(x.s.after) * time.Millisecond)
		if !x.stop(p) {
			return
		}
	}
}

// happen has events happen, at some pace under an agent, which goes on where it was stopped.
func (x *try) happen(events []event, p *process) {
	x.Helper()
	for _, e := range events {
		if p != nil && !x.s.race {
			p.quiet(time.Duration(x.s.pause) * time.Millisecond)
		}
		x.must(x.w.do(e))
		if p != nil {
			select {
			case p.goOn <- struct{}{}:
			default:
			}
		}
	}
}

// tsoctl runs one until it gets through.
func (x *try) tsoctl(verb ...string) {
	x.Helper()
	for x.finish(x.start(verb...)) {
	}
}

// start starts an agent or, with a verb, tsoctl, with the next orders.
func (x *try) start(verb ...string) *process {
	x.Helper()
	orders := ""
	if len(x.orders) > 0 {
		orders, x.orders = x.orders[0], x.orders[1:]
	}
	args := []string{filepath.Join(x.bin, "tsoagent"), "run"}
	if len(verb) > 0 {
		args = append([]string{filepath.Join(x.bin, "tsoctl")}, verb...)
	}
	p, err := spawn(x.w, orders, append(args, "-c", filepath.Join(x.dir, "tsoagent.yaml"))...)
	x.must(err)
	x.processes = append(x.processes, p)
	return p
}

// stop ends an agent gracefully.
func (x *try) stop(p *process) (killed bool) {
	x.Helper()
	_ = p.cmd.Process.Signal(unix.SIGTERM) // it may be dead
	return x.finish(p)
}

// finish waits for the end of a process, and counts it.
func (x *try) finish(p *process) (killed bool) {
	x.Helper()
	killed = p.ended(x)
	for _, point := range p.points() {
		x.reached[point]++
	}
	if !killed {
		return false
	}
	x.kills++
	if filepath.Base(p.cmd.Path) == "tsoagent" {
		x.agents++
	}
	if p.shot {
		x.moments++
	} else {
		x.at[p.last()]++
		x.pairs[pair{p.last(), x.s.way}]++
	}
	return true
}

// tell tells what the processes said, if the test has failed, and ends those that live.
func (x *try) tell() {
	for _, p := range x.processes {
		if p.alive() {
			_ = p.cmd.Process.Kill()
			<-p.gone
		}
		if x.Failed() {
			x.Log(p)
		}
	}
}

// journal are the entries that nobody has taken out of it.
func (x *try) journal() []string {
	text, err := os.ReadFile(filepath.Join(x.dir, "journal"))
	x.must(err)
	var left []string
	for line := range strings.Lines(string(text)) {
		var r struct{ Put, Remove struct{ ID string } }
		f := strings.SplitN(line, " ", 3) // checksum, length, JSON
		if len(f) < 3 || json.Unmarshal([]byte(f[2]), &r) != nil {
			return append(left, line)
		}
		left = slices.DeleteFunc(left, func(id string) bool { return id == r.Remove.ID || id == r.Put.ID })
		if r.Put.ID != "" {
			left = append(left, r.Put.ID)
		}
	}
	return left
}

// differences are the lines that two snapshots do not share.
func differences(want, got string) (out []string) {
	if want == got {
		return nil
	}
	wants, gots := strings.Split(want, "\n"), strings.Split(got, "\n")
	for _, line := range wants {
		if !slices.Contains(gots, line) {
			out = append(out, "- "+line)
		}
	}
	for _, line := range gots {
		if !slices.Contains(wants, line) {
			out = append(out, "+ "+line)
		}
	}
	if len(out) == 0 {
		out = append(out, cmp.Or(got, "nothing"), "has the same lines in another order, or another number of times")
	}
	return out
}

// failpointSymbols are the lines of `go tool nm` with something of package failpoint.
func failpointSymbols(nm string) []string {
	return slices.DeleteFunc(strings.Split(nm, "\n"), func(line string) bool { return !strings.Contains(line, "tsoagent/failpoint.") })
}
