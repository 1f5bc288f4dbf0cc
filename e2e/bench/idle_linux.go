package bench

import (
	"time"

	"golang.org/x/sys/unix"
)

// Idle is what the agent does while nothing happens, and what a change costs that concerns nothing.
type Idle struct {
	Seconds float64 `json:"seconds"`
	Rounds  float64 `json:"rounds"`
	CPU     float64 `json:"cpu_seconds"`
	Wakeups int64   `json:"wakeups"` // of all threads, the Go runtime's own among them
	// Looks are at the keys of TCP sockets, of which the kernel sends no event; the resync is the other thing that a timer asks for.
	Looks float64 `json:"tcp_key_looks"`
	// Changes that concern nothing were made, of one route; they led to EmptyRounds, and AllocsAChange are the objects that each took.
	Changes       float64 `json:"empty_changes"`
	AllocsAChange float64 `json:"allocs_a_change"`
	EmptyRounds   float64 `json:"empty_rounds"`
}

func (r *run) idle() error {
	a, err := startAgent(r.Bin, enforce, nil)
	if err != nil {
		return err
	}
	if _, err := a.quiet(settled); err != nil {
		return stopped(a, err)
	}
	if err := r.watchIdle(a); err != nil {
		return stopped(a, err)
	}
	if err := r.emptyChanges(a); err != nil {
		return stopped(a, err)
	}
	return r.writes(a)
}

const (
	roundsTotal = `tsoagent_rounds_total{netns="host"}`
	keyLooks    = `tsoagent_tcp_key_looks_total{netns="host"}`
)

// watchIdle counts what happens by itself. The two scrapes at its ends are not in it: the first comes before, and the second after.
func (r *run) watchIdle(a *Agent) error {
	before, err := a.metrics()
	if err != nil {
		return err
	}
	if _, err := a.quiet(settled); err != nil {
		return err
	}
	wakeups, err := a.wakeups()
	if err != nil {
		return err
	}
	cpu, err := a.cpu()
	if err != nil {
		return err
	}
	began := time.Now()
	wait(r.Idle)
	i := &r.out.Idle
	i.Seconds = time.Since(began).Seconds()
	if i.Wakeups, err = a.wakeups(); err != nil {
		return err
	}
	i.Wakeups -= wakeups
	used, err := a.cpu()
	if err != nil {
		return err
	}
	i.CPU = (used - cpu).Seconds()
	after, err := a.metrics()
	if err != nil {
		return err
	}
	i.Rounds, i.Looks = after[roundsTotal]-before[roundsTotal], after[keyLooks]-before[keyLooks]
	return nil
}

// emptyChanges is how many changes that concern nothing are made.
const emptyChanges = 5

// emptyChanges changes a route that nothing covered uses, again and again, and counts what the agent allocates for it. What counting alone
// allocates is taken off.
func (r *run) emptyChanges(a *Agent) error {
	change := func(k int) error {
		return r.lab.write(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, []Route{{Dst: unused, Gateway: k % gateways}})
	}
	if _, _, err := a.allocations(change); err != nil { // the first ones cost more
		return err
	}
	counting, _, err := a.allocations(func(int) error { return nil })
	if err != nil {
		return err
	}
	all, rounds, err := a.allocations(change)
	if err != nil {
		return err
	}
	i := &r.out.Idle
	i.Changes, i.EmptyRounds, i.AllocsAChange = emptyChanges, rounds, max(0, all-counting)/emptyChanges
	return nil
}

// allocations counts the agent's allocations and rounds while something is done a few times, each time until it is quiet.
func (a *Agent) allocations(do func(int) error) (mallocs, rounds float64, err error) {
	ran := func() (float64, error) {
		m, err := a.metrics()
		return m[roundsTotal], err
	}
	// What the metrics are made of is worked out when they are asked for: that is not to be among what is counted.
	before, err := ran()
	if err != nil {
		return 0, 0, err
	}
	had, err := a.mallocs()
	if err != nil {
		return 0, 0, err
	}
	for k := range emptyChanges {
		if err := do(k); err != nil {
			return 0, 0, err
		}
		if _, err := a.quiet(pause); err != nil {
			return 0, 0, err
		}
	}
	has, err := a.mallocs()
	if err != nil {
		return 0, 0, err
	}
	after, err := ran()
	return has - had, after - before, err
}
