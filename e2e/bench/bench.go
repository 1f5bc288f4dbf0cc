package bench

import (
	"fmt"
	"io"
	"time"
)

// Options are what a run is told.
type Options struct {
	Bin    string // the directory of tsoagent and tsoctl
	Self   string // this program, for the straight line
	Scale  float64
	Rounds int           // how often each figure is taken
	Budget time.Duration // how long the policy events of one size of tables may take
	Idle   time.Duration // how long the agent is watched while nothing happens, and how long it has to give memory back
	// Profiles is a directory for the agent's own profiles, empty for none: they cost what they measure.
	Profiles string
	// ProfileSeconds is how much of a start, of policy events and of a storm is in a profile of the CPU.
	ProfileSeconds int
	StormsOnly     bool // measure storms, and nothing else
	Progress       io.Writer
}

// Results are all figures of one run.
type Results struct {
	Machine Machine `json:"machine"`
	Scale   float64 `json:"scale"`
	Size    Size    `json:"size"`

	Cold       map[string]*Cold `json:"cold"` // by mode
	Plain      Cold             `json:"cold_empty_tables"`
	Memory     MemoryFigures    `json:"memory"`
	EmptyEvent Event            `json:"event_empty_tables"`
	FullEvent  Event            `json:"event_full_tables"`
	Storm      Storm            `json:"storm"`
	Writes     Writes           `json:"writes"`
	Idle       Idle             `json:"idle"`
	Took       float64          `json:"took_seconds"`
}

// run is a run under way.
type run struct {
	Options
	lab *Lab
	out *Results
}

// The modes of the agent.
const (
	observe = "observe"
	enforce = "enforce"
)

// step is a part of a run.
type step struct {
	what string
	do   func() error
}

// Run measures everything, in the namespace that the process is in. It is the caller's to make one. With an error there is what was measured
// until then.
func Run(o Options) (*Results, error) {
	began := time.Now()
	w := NewWorld(FullSize.Scaled(o.Scale))
	r := &run{Options: o, out: &Results{Machine: ThisMachine(), Scale: o.Scale, Size: w.Size, Cold: map[string]*Cold{observe: {}, enforce: {}}}}
	var err error
	if r.lab, err = newLab(w); err != nil {
		return nil, fmt.Errorf("namespace: %w", err)
	}
	steps := []step{
		{"cold starts, empty tables", r.plain},
		{"policy events, empty tables", func() error { return r.event(&r.out.EmptyEvent) }},
		{"tables", r.lab.fill},
		{"cold start, memory and storms", r.rounds},
		{"policy events, full tables", func() error { return r.event(&r.out.FullEvent) }},
		{"idle, and all locks taken away and installed", r.idle},
		{"memory after the tables shrink", r.shrink},
	}
	if o.StormsOnly {
		steps = []step{{"tables", r.lab.fill}, {"storms", r.storms}}
	}
	for _, step := range steps {
		r.say(step.what)
		if err := step.do(); err != nil {
			return r.out, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	r.out.Took = time.Since(began).Seconds()
	return r.out, nil
}

// rounds interleaves what is measured and its floors: what the machine does meanwhile meets both.
func (r *run) rounds() error {
	for i := range r.Rounds {
		for _, mode := range []string{observe, enforce} {
			r.say(fmt.Sprintf("round %d, %s", i+1, mode))
			if err := r.round(i, mode); err != nil {
				return fmt.Errorf("%s: %w", mode, err)
			}
		}
	}
	return nil
}

// storms is each storm and its floor.
func (r *run) storms() error {
	for i := range r.Rounds {
		if err := r.round(i, enforce); err != nil {
			return err
		}
	}
	return nil
}

// round is a cold start, and in enforce mode a storm.
func (r *run) round(i int, mode string) error {
	if mode == enforce {
		if err := r.stormFloor(2 * i); err != nil {
			return err
		}
	}
	a, err := r.coldStart(mode)
	if err != nil {
		return err
	}
	if mode == enforce {
		err = r.during(a, "storm", func() error { return r.storm(a, 2*i+1) })
	}
	began := time.Now()
	if stopped := a.Stop(); err == nil {
		err = stopped
	}
	r.out.Cold[mode].Stop.add(time.Since(began))
	return err
}

func (r *run) say(what string) {
	fmt.Fprintf(r.Progress, "%s %s\n", time.Now().Format(time.TimeOnly), what)
}
