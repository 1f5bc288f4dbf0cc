package bench

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Idle is what the agent does while nothing happens, and what a round costs that finds nothing to do.
type Idle struct {
	Seconds float64 `json:"seconds"`
	Rounds  float64 `json:"rounds"`
	Events  float64 `json:"events"`
	CPU     float64 `json:"cpu_seconds"`
	Wakeups int64   `json:"wakeups"` // of all threads, the Go runtime's own among them
	// Looks are at the keys of TCP sockets, of which the kernel sends no event; the resync is the other thing that a timer asks for.
	Looks float64 `json:"tcp_key_looks"`
	// AllocsARound is objects a round after a change that concerns nothing.
	AllocsARound float64 `json:"allocs_a_round"`
	EmptyRounds  float64 `json:"empty_rounds"`
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
	if err := r.emptyRounds(a); err != nil {
		return stopped(a, err)
	}
	return r.writes(a)
}

const (
	roundsTotal = `tsoagent_rounds_total{netns="host"}`
	keyLooks    = `tsoagent_tcp_key_looks_total{netns="host"}`
	routeEvents = `tsoagent_source_events_total{netns="host",source="routes"}`
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
	i.Rounds, i.Events, i.Looks = after[roundsTotal]-before[roundsTotal], after[routeEvents]-before[routeEvents], after[keyLooks]-before[keyLooks]
	return nil
}

// emptyRoundEvents is how many changes that concern nothing are made.
const emptyRoundEvents = 5

// emptyRounds changes a route that nothing covered uses, and back, and counts what the agent allocates for it. What the two looks at its
// counter allocate is taken off.
func (r *run) emptyRounds(a *Agent) error {
	_, err := a.mallocs() // the first costs more
	if err != nil {
		return err
	}
	var at [3]float64
	var rounds [2]float64
	for i := range at {
		if at[i], err = a.mallocs(); err != nil {
			return err
		}
		if i == len(at)-1 {
			break
		}
		m, err := a.metrics()
		if err != nil {
			return err
		}
		rounds[i] = m[roundsTotal]
		if i == 0 {
			continue
		}
		for k := range emptyRoundEvents {
			if err := r.lab.write(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, []Route{{Dst: unused, Gateway: k % gateways}}); err != nil {
				return err
			}
			if _, err := a.quiet(pause); err != nil {
				return err
			}
		}
	}
	m, err := a.metrics()
	if err != nil {
		return err
	}
	i := &r.out.Idle
	if i.EmptyRounds = m[roundsTotal] - rounds[1]; i.EmptyRounds > 0 {
		i.AllocsARound = max(0, (at[2]-at[1])-(at[1]-at[0])) / i.EmptyRounds
	}
	if i.EmptyRounds > 10*emptyRoundEvents {
		return fmt.Errorf("%v rounds for %d events", i.EmptyRounds, emptyRoundEvents)
	}
	return nil
}
