package bench

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// start starts an agent on full tables, with a profile of the CPU if profiles are wanted.
func (r *run) start(mode string) (*Agent, error) {
	if r.Profiles == "" {
		return startAgent(r.Bin, mode, nil)
	}
	taken := make(chan error, 1)
	a, err := startAgent(r.Bin, mode, func(a *Agent) {
		for !a.answers() {
			wait(time.Millisecond)
		}
		taken <- r.cpuProfile(a, mode+"-start")
	})
	if err != nil {
		return nil, err
	}
	if err := <-taken; err != nil {
		return nil, stopped(a, err)
	}
	return a, nil
}

// answers reports whether there is somebody at the control socket, or there never will be.
func (a *Agent) answers() bool {
	select {
	case <-a.gone:
		return true
	default:
		c, err := net.Dial("unix", a.socket())
		if err == nil {
			_ = c.Close() // it was only to see
		}
		return err == nil
	}
}

// during does something, and takes a profile of the CPU meanwhile if profiles are wanted.
func (r *run) during(a *Agent, name string, do func() error) error {
	if r.Profiles == "" {
		return do()
	}
	taken := make(chan error, 1)
	go func() { taken <- r.cpuProfile(a, name) }()
	err := do()
	return errors.Join(err, <-taken)
}

func (r *run) cpuProfile(a *Agent, name string) error {
	return r.profile(a, "profile?seconds="+strconv.Itoa(r.ProfileSeconds), name+".cpu")
}

// heapProfile takes a profile of the heap, if profiles are wanted: what is in use, and what was allocated since the start.
func (r *run) heapProfile(a *Agent, name string) error {
	if r.Profiles == "" {
		return nil
	}
	return r.profile(a, "heap", name+".heap")
}

func (r *run) profile(a *Agent, which, file string) error {
	body, err := a.control("/debug/pprof/" + which)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.Profiles, file), body, 0o644)
}
