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

func (r *run) coldStart(mode string) (*Agent, error) {
	began := time.Now()
	for _, args := range coldFloor {
		if err := exec.Command("ip", strings.Fields(args)...).Run(); err != nil { // stdout is /dev/null
			return nil, fmt.Errorf("ip %s: %w", args, err)
		}
	}
	r.out.Cold[mode].Start.Floor.add(time.Since(began))
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
