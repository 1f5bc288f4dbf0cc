package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"weak"

	"tsoagent/agent/api"
	"tsoagent/agent/flows"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/sockopt/sockbpf"
	"tsoagent/xfrmwatch"
)

// connIter lists the TCP sockets in the namespace of the calling thread (sockbpf.Iter).
type connIter interface {
	// Each calls fn for each socket until it returns false, listeners first.
	Each(fn func(sockopt.Conn) bool) error
	Close() error
}

var _ connIter = (*sockbpf.Iter)(nil)

func openConns() (connIter, error) { return sockbpf.Open() }

// ErrUnreadable is matched (errors.Is) where the kernel does not let its sockets be read.
var ErrUnreadable = errors.New("the kernel's sockets can't be read")

// unreadable says what is missing, and what to do.
type unreadable struct {
	err  error
	once bool // there is no agent
}

func (u *unreadable) Error() string {
	do := "all but flows and this part of the doctor works without"
	switch {
	case !errors.Is(u.err, os.ErrPermission):
	case u.once:
		do = "run it as root, or with CAP_BPF and CAP_PERFMON"
	default:
		do = "give CAP_BPF and CAP_PERFMON to the agent's service"
	}
	return fmt.Sprintf("%v: %s", u.err, do)
}

func (u *unreadable) Unwrap() error { return u.err }

// Is matches ErrUnreadable.
func (u *unreadable) Is(target error) bool { return target == ErrUnreadable }

// errBusy is for one who asks for a list while others read theirs, and errCrowd where as many wait as may.
var (
	errBusy  = fmt.Errorf("%d lists of connections are read already: try again in %v", maxLists, retryAfter)
	errCrowd = fmt.Errorf("%d lists of connections are read already, and %d clients wait for theirs: try again in %v", maxLists, maxWaiting, retryAfter)
)

// errLate is for one who reads on and on.
type errLate struct{ within time.Duration }

func (e errLate) Error() string {
	return fmt.Sprintf("the list was given up, as it was not read within %v: write it to a file first, or ask for fewer connections "+
		"(--lost, --listener, --dev, --state)", e.within)
}

// connections looks at all TCP sockets of the namespace, and at what the loop knows.
type connections struct {
	open func() (connIter, error)
	// slots bounds how many lists are made at a time for those who ask for one, who read as slowly as they
	// like. A diagnosis takes none.
	slots   chan struct{}
	wait    time.Duration // for a slot
	waiting chan struct{} // bounds how many wait for one
	// step is how long a client may take to read the next piece of an answer, whole for all of it.
	step, whole time.Duration
	now         func() time.Time

	mu sync.Mutex // of what follows
	// policies is kept by those who join with it: it has all policies of its version, some dozen MiB of a large table, and the next diagnosis
	// may be long in coming.
	policies weak.Pointer[flows.Policies]
	version  uint64 // of the mirror that policies were indexed from

	// diagnosing holds the token of whoever makes a diagnosis. It can be waited for until a context ends.
	diagnosing chan struct{}
	last       *Diagnosis    // belongs to diagnosing
	soon       chan struct{} // has a token when a diagnosis is due
}

// maxLists is how many lists of connections are made at a time in one namespace, and slotPatience how long
// one more waits: less than a client has for the head of its answer (WriteTimeout of serve).
const (
	maxLists     = 2
	slotPatience = 20 * time.Second
	maxWaiting   = 8
	retryAfter   = 5 * time.Second // when it is worth to ask again
)

// A client has flowsStep to read the next piece of a list, and flowsWhole for all of it: a million connections are some 300 MB, and take
// seconds. Who reads a bit now and then would hold a slot for hours.
const (
	flowsStep  = 30 * time.Second
	flowsWhole = 5 * time.Minute
)

func newConnections() *connections {
	return &connections{
		open: openConns, slots: make(chan struct{}, maxLists), wait: slotPatience,
		waiting: make(chan struct{}, maxWaiting), step: flowsStep, whole: flowsWhole, now: time.Now,
		diagnosing: make(chan struct{}, 1), soon: make(chan struct{}, 1),
	}
}

// caller runs a function where it may read the state.
type caller func(ctx context.Context, fn func()) error

// atOnce is the caller of one who owns the state.
func atOnce(_ context.Context, fn func()) error {
	fn()
	return nil
}

// world is a snapshot of what connections are joined with. The loop only copies it: policies are
// indexed outside of it, unless somebody still uses those of the same version.
func (a *Agent) world(ctx context.Context, call caller) (*flows.World, error) {
	c := a.conns
	c.mu.Lock()
	defer c.mu.Unlock()
	var w *flows.World
	var list []*xfrmwatch.Policy
	fresh := false
	policies := c.policies.Value()
	err := call(ctx, func() {
		if a.lastP == nil {
			return
		}
		if v := a.st.db.Version(); policies == nil || c.version != v {
			fresh, c.version = true, v
			list = make([]*xfrmwatch.Policy, 0, a.st.db.PolicyCount())
			list = slices.AppendSeq(list, a.st.db.Policies())
		}
		w = &flows.World{Devices: a.flowDevices(), Stale: len(a.staleSources()) > 0}
	})
	if err == nil && w == nil {
		err = errNotReady
	}
	if fresh {
		policies = flows.NewPolicies(list)
		c.policies = weak.Make(policies)
	}
	if err != nil {
		return nil, err
	}
	w.Policies = policies
	return w, nil
}

// flowDevices are the namespace's devices with what decides about their flows.
func (a *Agent) flowDevices() map[int32]flows.Device {
	links := a.st.fib.Links()
	out := make(map[int32]flows.Device, len(links))
	for _, l := range links {
		d := flows.Device{Name: l.Name, IfID: l.IfID}
		if l.Kind == "vti" || l.Kind == "vti6" {
			d.VTI, d.Mark = true, l.Encap.Key
		}
		d.TSO4 = a.offload(l.Index, ethtool.TCPSegmentation)
		d.TSO6 = a.offload(l.Index, ethtool.TCP6Segmentation)
		out[int32(l.Index)] = d
	}
	for _, t := range a.lastP.Tunnels {
		if d, ok := out[int32(t.Index)]; ok && len(t.Own) > 0 {
			d.Wrapped = t.Own[0].Policy
			out[int32(t.Index)] = d
		}
	}
	return out
}

func (a *Agent) offload(i routes.Ifindex, feature ethtool.Feature) flows.Offload {
	s, known := a.st.features[i].Get(feature)
	_, held := a.st.holds[plan.HoldKey{Index: ethtool.Ifindex(i), Feature: feature}]
	return flows.Offload{Active: s.Active, Fixed: known && !s.Changeable, Held: held && !s.Active}
}

// listFlows is eachFlow for a client, which waits for its turn. The error is errBusy if that does not come, errCrowd if too many wait, and
// errLate if fn took too long in all.
func (a *Agent) listFlows(ctx context.Context, f flows.Filter, fn func(*flows.Flow) error) (*flows.Result, error) {
	if err := a.conns.turn(ctx); err != nil {
		return nil, err
	}
	defer func() { <-a.conns.slots }()
	began := a.conns.now()
	return a.eachFlow(ctx, a.call, f, func(f *flows.Flow) error {
		if a.conns.now().Sub(began) > a.conns.whole {
			return errLate{a.conns.whole}
		}
		return fn(f)
	})
}

// turn waits for a slot, and takes it.
func (c *connections) turn(ctx context.Context) error {
	select {
	case c.slots <- struct{}{}:
		return nil
	default:
	}
	select {
	case c.waiting <- struct{}{}:
		defer func() { <-c.waiting }()
	default:
		return errCrowd
	}
	late := time.NewTimer(c.wait)
	defer late.Stop()
	select {
	case c.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-late.C:
		return errBusy
	}
}

// eachFlow joins the namespace's TCP sockets with what is known of policies and devices, and calls fn
// for each flow that is asked for, until the context ends or fn fails. The error is ErrUnreadable if the
// kernel does not let its sockets be read.
func (a *Agent) eachFlow(ctx context.Context, call caller, f flows.Filter, fn func(*flows.Flow) error) (*flows.Result, error) {
	w, err := a.world(ctx, call)
	if err != nil {
		return nil, err
	}
	if f.Device != "" && !hasDevice(w, f.Device) {
		return nil, &AbsentError{Of: api.AbsentDevice, Text: fmt.Sprintf("there is no device %q", f.Device)}
	}
	j := flows.NewJoin(w, f)
	var notes []string
	if f.Processes {
		o := findOwners("/proc", func(uint64) bool { return true }, maxOpenFiles)
		j.Processes = func(inode uint64) []flows.Process { return o.of[inode] }
		if o.hidden > 0 || o.cut {
			notes = append(notes, "processes: "+o.unknown(true))
		}
	}
	if err := a.eachConn(ctx, j, fn); err != nil {
		return nil, err
	}
	r := j.Result()
	r.Netns, r.Live, r.Notes = a.name, !a.alone, notes
	nameListeners(r.Collateral)
	return r, nil
}

func hasDevice(w *flows.World, name string) bool {
	for _, d := range w.Devices {
		if d.Name == name {
			return true
		}
	}
	return false
}

// eachConn reads the sockets in the agent's namespace.
func (a *Agent) eachConn(ctx context.Context, j *flows.Join, fn func(*flows.Flow) error) error {
	return a.in(func() error {
		it, err := a.conns.open()
		if err != nil {
			return &unreadable{err, a.alone}
		}
		var stopped error
		err = it.Each(func(c sockopt.Conn) bool {
			if stopped = ctx.Err(); stopped != nil {
				return false
			}
			if f := j.Add(&c); f != nil {
				stopped = fn(f)
			}
			return stopped == nil
		})
		if err != nil {
			err = &unreadable{err, a.alone}
		}
		return errors.Join(err, stopped, it.Close())
	})
}

// nameListeners finds the processes of listeners, if there are any to find.
func nameListeners(list []flows.Collateral) {
	inodes := map[uint64]bool{}
	for _, c := range list {
		for _, inode := range c.Inodes {
			inodes[inode] = true
		}
	}
	if len(inodes) == 0 {
		return
	}
	findOwners("/proc", func(inode uint64) bool { return inodes[inode] }, maxOpenFiles).name(list)
}

// A diagnosis looks at each TCP socket. It is made firstDiagnosis after the start, with each resync,
// and when somebody asks for one and the last is older than diagnosisFresh.
const (
	firstDiagnosis = time.Minute
	diagnosisFresh = 10 * time.Second
)

// diagnose is the newest diagnosis, made anew if it is not fresh.
func (a *Agent) diagnose(ctx context.Context, call caller) (*Diagnosis, error) {
	c := a.conns
	select {
	case c.diagnosing <- struct{}{}:
		defer func() { <-c.diagnosing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c.last != nil && time.Since(c.last.At) < diagnosisFresh {
		return c.last, nil
	}
	d := &Diagnosis{At: time.Now(), Collateral: []flows.Collateral{}}
	r, err := a.eachFlow(ctx, call, flows.Filter{Lost: true}, func(*flows.Flow) error { return nil })
	switch {
	case errors.Is(err, ErrUnreadable):
		d.Unreadable = oneLine(err)
	case err != nil:
		return nil, err
	default:
		d.Connections, d.Lost, d.Collateral, d.MoreCollateral = r.Summary.Connections, r.Summary.Lost, r.Collateral, r.MoreCollateral
	}
	c.last = d
	return d, call(ctx, func() { a.setDiagnosis(d) })
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// setDiagnosis puts a diagnosis into reports from now on, without a round.
func (a *Agent) setDiagnosis(d *Diagnosis) {
	a.diagnosis = d
	a.reports.changed(a)
}

// diagnoseSoon has a diagnosis made outside of the loop.
func (a *Agent) diagnoseSoon() {
	select {
	case a.conns.soon <- struct{}{}:
	default:
	}
}

// watchConnections makes a diagnosis whenever one is due, until the context ends.
func (a *Agent) watchConnections(ctx context.Context) {
	first := time.NewTimer(firstDiagnosis)
	defer first.Stop()
	said := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-first.C:
		case <-a.conns.soon:
		}
		d, err := a.diagnose(ctx, a.call)
		if err != nil || d.Unreadable == "" || said {
			continue // one that could not be made is made with the next resync
		}
		said = true
		a.log.Info("connections are not diagnosed", "why", d.Unreadable)
	}
}
