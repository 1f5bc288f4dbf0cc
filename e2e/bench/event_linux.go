package bench

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Event is what one added policy costs, in mode enforce.
type Event struct {
	// Done is from the event in hand until all is written and read back, each by its own clock: the agent's metric of its reactions, and the
	// straight line's own time.
	Done Ratio `json:"done"`
	// Written is from the write of the policy to the kernel's notification of the clone, as a third one sees it.
	Written Ratio `json:"written"`
}

// Samples of one series: no more than these, and no fewer.
const (
	mostSamples    = 200
	fewSamples     = 3
	samplesAtATime = 10
)

// aClone bounds the wait for the clone of one policy.
const aClone = time.Minute

// event adds policies one by one under an agent, and under the straight line while the agent is frozen.
func (r *run) event(into *Event) error {
	a, err := startAgent(r.Bin, enforce, nil)
	if err != nil {
		return err
	}
	e := &eventRun{run: r, agent: a, into: into}
	name := "event-empty"
	if into == &r.out.FullEvent {
		name = "event-full"
	}
	if err := r.during(a, name, e.measure); err != nil {
		return stopped(a, err)
	}
	return a.Stop()
}

type eventRun struct {
	*run
	agent *Agent
	into  *Event
	next  int // of the customers behind those of the world
	added []Policy
}

func (e *eventRun) measure() error {
	if _, err := e.agent.quiet(settled); err != nil {
		return err
	}
	// The shape of these policies has its rules from the second one on: one destination alone stands in the rules, of several they say
	// nothing. These two stay.
	if err := e.byAgent(2, nil, nil); err != nil {
		return err
	}
	first := e.added
	e.added = nil
	for end := time.Now().Add(e.Budget); len(e.into.Done.Ours) < fewSamples || time.Now().Before(end) && len(e.into.Done.Ours) < mostSamples; {
		if err := e.byAgent(samplesAtATime, &e.into.Done.Ours, &e.into.Written.Ours); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		if err := e.undo(); err != nil {
			return err
		}
		if _, err := e.agent.quiet(settled); err != nil { // it gives back what it did for them
			return err
		}
		if err := e.byStraightLine(samplesAtATime); err != nil {
			return fmt.Errorf("straight line: %w", err)
		}
	}
	return e.lab.writePolicies(xfrmDelPolicy, first)
}

// undo takes the policies that were added away again: tables that are empty are to stay so.
func (e *eventRun) undo() error {
	err := e.lab.writePolicies(xfrmDelPolicy, e.added)
	e.added = nil
	return err
}

// byAgent adds policies, each when the agent is done with the one before it.
func (e *eventRun) byAgent(n int, done, written *Samples) error {
	for range n {
		before, err := e.agent.metrics()
		if err != nil {
			return err
		}
		took, err := e.add(ourProtocol)
		if err != nil {
			return err
		}
		after, err := e.reacted(before[reactions])
		if err != nil {
			return err
		}
		if written == nil {
			continue
		}
		*done = append(*done, after[reactionSum]-before[reactionSum])
		written.add(took)
		if took > time.Second && len(*done) >= fewSamples {
			return nil // the budget decides about more
		}
	}
	return nil
}

// reacted waits until the agent is quiet and has counted a reaction, and returns its metrics.
func (e *eventRun) reacted(before float64) (map[string]float64, error) {
	for end := time.Now().Add(aClone); ; {
		if _, err := e.agent.quiet(pause); err != nil {
			return nil, err
		}
		m, err := e.agent.metrics()
		switch {
		case err != nil || m[reactions] > before:
			return m, err
		case time.Now().After(end):
			return nil, errors.New("the agent counts no reaction to a policy")
		}
	}
}

// pause is between two events.
const pause = 100 * time.Millisecond

// The metrics of reactions.
const (
	reactions   = `tsoagent_reaction_seconds_count{netns="host"}`
	reactionSum = `tsoagent_reaction_seconds_sum{netns="host"}`
)

// ourProtocol is of the agent's routes.
const ourProtocol = 84

// add adds one policy and returns how long it took until the kernel told of a route for it with that protocol.
func (e *eventRun) add(protocol byte) (time.Duration, error) {
	p := Policy{Src: sources4[0], Dst: customerNet4(e.lab.world.Size.Policies + e.next), Peer: e.lab.world.Policies[e.next%e.lab.world.Size.Policies].Peer, Reqid: 1}
	e.next++
	routes, err := dial(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_ROUTE)
	if err != nil {
		return 0, err
	}
	defer routes.close()
	if err := routes.patience(aClone); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := e.lab.writePolicies(xfrmNewPolicy, []Policy{p}); err != nil {
		return 0, err
	}
	e.added = append(e.added, p)
	for found := false; !found; {
		err := routes.receive(func(h header, b []byte) bool {
			found = found || h.typ == unix.RTM_NEWROUTE && isRoute(b, p, protocol)
			return true
		})
		if err != nil {
			return 0, fmt.Errorf("no route for %s: %w", p.Dst, err)
		}
	}
	return time.Since(began), nil
}

// isRoute reports whether a route message is the policy's net with that protocol.
func isRoute(b []byte, p Policy, protocol byte) bool {
	const at = unix.SizeofRtMsg + unix.SizeofRtAttr // an IPv4 route begins with its table and its destination
	dst := p.Dst.Addr().AsSlice()
	return len(b) >= at && int(b[1]) == p.Dst.Bits() && b[5] == protocol && strings.Contains(string(b[at:]), string(dst))
}

// byStraightLine has the straight line answer, with the agent frozen: it would answer, too.
func (e *eventRun) byStraightLine(n int) error {
	if err := e.agent.freeze(); err != nil {
		return err
	}
	err := e.straightLine(n)
	if thawed := e.agent.thaw(); err == nil {
		err = thawed
	}
	if err != nil {
		return err
	}
	_, err = e.agent.quiet(settled) // it hears of what came and went
	return err
}

// straightLine runs the straight line in a process of its own.
func (e *eventRun) straightLine(n int) error {
	cmd := exec.Command(e.Self, "-straight-line")
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	log, err := os.Create("/run/straight.log") // this namespace's own
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { _ = in.Close(); _ = cmd.Wait() }()
	lines := bufio.NewScanner(out)
	lines.Scan() // it is ready
	for range n {
		wait(pause) // as the agent has it
		took, err := e.add(straightProto)
		if err != nil {
			return err
		}
		if !lines.Scan() {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("it has ended: %s", lastLine(text))
		}
		ns, err := strconv.ParseInt(lines.Text(), 10, 64)
		if err != nil {
			return err
		}
		e.into.Written.Floor.add(took)
		e.into.Done.Floor.add(time.Duration(ns))
	}
	if err := e.undo(); err != nil {
		return err
	}
	return ip(fmt.Sprintf("route flush table %d", straightTable))
}
