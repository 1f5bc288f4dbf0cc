package bench

import (
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// Cold is a start on full tables: from the spawn to READY=1, by which the first plan is complete (and written, in mode enforce). Its floor is
// how long iproute2 takes to show the same tables, to nobody.
type Cold struct {
	Start Ratio   `json:"start"`
	Stop  Samples `json:"stop"` // from SIGTERM to the end, by which all is given back
}

// coldFloor is what the agent reads, too.
var coldFloor = []string{"-4 route show table all", "-6 route show table all", "xfrm policy show"}

// showAll adds how long iproute2 takes.
func showAll(floor *Samples) error {
	began := time.Now()
	for _, args := range coldFloor {
		if err := exec.Command("ip", strings.Fields(args)...).Run(); err != nil { // stdout is /dev/null
			return fmt.Errorf("ip %s: %w", args, err)
		}
	}
	floor.add(time.Since(began))
	return nil
}

// plain starts agents on tables that are empty, as on a host without IPsec.
func (r *run) plain() error {
	for range max(r.Rounds, plainStarts) {
		if err := showAll(&r.out.Plain.Start.Floor); err != nil {
			return err
		}
		a, err := startAgent(r.Bin, enforce, nil)
		if err != nil {
			return err
		}
		r.out.Plain.Start.Ours.add(a.Ready)
		began := time.Now()
		if err := a.Stop(); err != nil {
			return err
		}
		r.out.Plain.Stop.add(time.Since(began))
	}
	return nil
}

// plainStarts is how many of them there are: they are quick.
const plainStarts = 10

func (r *run) coldStart(mode string) (*Agent, error) {
	if err := showAll(&r.out.Cold[mode].Start.Floor); err != nil {
		return nil, err
	}
	a, err := r.start(mode)
	if err != nil {
		return nil, err
	}
	r.out.Cold[mode].Start.Ours.add(a.Ready)
	if err := r.memoryReady(a, mode); err != nil {
		return nil, stopped(a, err)
	}
	return a, nil
}

// stopped ends an agent on the way out with an error.
func stopped(a *Agent, err error) error {
	if stop := a.Stop(); stop != nil {
		return fmt.Errorf("%w; %w", err, stop)
	}
	return err
}
