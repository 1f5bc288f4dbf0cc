package bench

import (
	"time"

	"golang.org/x/sys/unix"
)

// MemoryFigures are what the agent holds, in bytes.
type MemoryFigures struct {
	Ready map[string][]Memory `json:"ready"` // at READY=1, by mode
	Quiet map[string][]Memory `json:"quiet"` // when its processor time no longer grows
	// Shrunk is when a hundredth of the tables is left, after a while; Fresh is of an agent that is started on those.
	Shrunk Memory `json:"shrunk"`
	Fresh  Memory `json:"fresh"`
}

// settled is how long an agent must have been quiet to count as quiet.
const settled = time.Second

func (r *run) memoryReady(a *Agent, mode string) error {
	f := &r.out.Memory
	if f.Ready == nil {
		f.Ready, f.Quiet = map[string][]Memory{}, map[string][]Memory{}
	}
	m, err := a.Memory()
	if err != nil {
		return err
	}
	f.Ready[mode] = append(f.Ready[mode], m)
	if err := r.heapProfile(a, mode+"-ready"); err != nil {
		return err
	}
	if _, err = a.quiet(settled); err != nil {
		return err
	}
	if m, err = a.Memory(); err != nil {
		return err
	}
	f.Quiet[mode] = append(f.Quiet[mode], m)
	return nil
}

// shrink takes all but a hundredth of the tables away under an agent.
func (r *run) shrink() error {
	w := r.lab.world
	a, err := startAgent(r.Bin, observe, nil)
	if err != nil {
		return err
	}
	left := func(i int) bool { return i%100 == 0 }
	var routes []Route
	for i, x := range w.Routes {
		if !left(i) {
			routes = append(routes, x)
		}
	}
	var policies []Policy
	for i, p := range w.Policies {
		if !left(i) {
			policies = append(policies, p)
		}
	}
	if err := r.lab.remove(routes, policies); err != nil {
		return stopped(a, err)
	}
	if _, err := a.quiet(settled); err != nil {
		return stopped(a, err)
	}
	wait(r.Idle) // the Go runtime gives memory back to the kernel bit by bit
	if r.out.Memory.Shrunk, err = a.Memory(); err != nil {
		return stopped(a, err)
	}
	if err := r.heapProfile(a, "shrunk"); err != nil {
		return stopped(a, err)
	}
	if err := a.Stop(); err != nil {
		return err
	}
	if a, err = startAgent(r.Bin, observe, nil); err != nil {
		return err
	}
	if r.out.Memory.Fresh, err = a.Memory(); err != nil {
		return stopped(a, err)
	}
	return a.Stop()
}

// remove deletes routes and policies. The routes go first: each IPv6 policy that goes has the kernel walk all IPv6 routes (rt_genid_bump_ipv6).
func (l *Lab) remove(routes []Route, policies []Policy) error {
	err := l.routes.batch(len(routes), unix.RTM_DELROUTE, 0, func(i int, b []byte) []byte { return routes[i].key(b) })
	if err != nil {
		return err
	}
	return l.writePolicies(xfrmDelPolicy, policies)
}

// wait lets time pass that is part of what is measured.
func wait(d time.Duration) { <-time.After(d) }
