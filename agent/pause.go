package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
	"tsoagent/agent/plan"
)

// A pause takes the loop's hands off. It goes on to follow the kernel and to plan, so that reports and events say
// what it would do.
//
//	POST /v1/pause ── halt ──> between two writes, or parts of very many, the loop stops writing
//	       └── order ── inbox ──> obey: paused; with restore everything is given back first
//	                                └── the round's end ──> answer: from here on nothing is written
//
// What a write that was under way overwrites of an owner's is still mended, before the answer.
//
// A pause is the process's: a restart protects again, as nobody would look for what an earlier process was told.
// A stop ends it, too: on_stop says what becomes of holds and locks, and rules and clones go in any case, which
// nobody would follow.

// An order is a pause, or nil to go on. The answer comes when it is in force; from a loop that stops there is none, as the
// next one has to say it.
type order struct {
	paused *api.Paused
	ask    bool               // it is none: the answer is what those before it have led to
	answer chan<- *api.Paused // has room for it
}

// restoreWithin bounds how long the answer to a pause waits until everything is given back.
const restoreWithin = 20 * time.Second

// errOverdue is why the answer to an order waits no longer.
var errOverdue = fmt.Errorf("it is not done within %s: see `tsoctl status`", restoreWithin)

// give has the loop pause, or go on with nil. It doesn't wait for the answer, which wait does.
func (a *Agent) give(p *api.Paused) <-chan *api.Paused {
	if p != nil {
		a.halt.Store(true)
	}
	return a.post(order{paused: p})
}

// inquire is how it is after all that the loop was told before.
func (a *Agent) inquire() <-chan *api.Paused { return a.post(order{ask: true}) }

// post is heard by a loop that runs; one that does no longer is found out by wait.
func (a *Agent) post(o order) <-chan *api.Paused {
	answer := make(chan *api.Paused, 1)
	o.answer = answer
	a.inbox.post(batch{orders: []order{o}})
	return answer
}

// wait is the answer to an order, or errEndedAgent.
func (a *Agent) wait(ctx context.Context, p *api.Paused, answer <-chan *api.Paused) (*api.Paused, error) {
	select {
	case now := <-answer:
		return now, nil
	case <-ctx.Done():
		why := context.Cause(ctx)
		if g := a.glance.Load(); errors.Is(why, errOverdue) && g != nil && g.paused != nil && p != nil && p.Restore {
			return g.paused, nil // it says how much is left
		}
		return nil, why
	case <-a.ended:
	}
	select {
	case now := <-answer:
		return now, nil
	default:
		return nil, errEndedAgent
	}
}

// order gives an order, and waits until it is in force. What it returns says so.
func (a *Agent) order(ctx context.Context, p *api.Paused) (*api.Paused, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, restoreWithin, errOverdue)
	defer cancel()
	return a.wait(ctx, p, a.give(p))
}

// writes reports whether the loop may write to the kernel.
func (a *Agent) writes() bool {
	return a.cfg.Mode == Enforce && (a.st.paused == nil || a.goal != protect)
}

// obey does what was ordered since the last round, and ends a pause that is over.
func (a *Agent) obey(now time.Time) {
	for _, o := range a.st.orders {
		if a.once {
			a.halt.Store(false) // it stops already, and writes only to give back
			continue
		}
		a.st.obeyed = append(a.st.obeyed, o)
		switch {
		case o.ask:
			continue // nor does it take back a halt
		case o.paused != nil:
			a.pauseNow(*o.paused, now)
		case a.st.paused != nil:
			a.resumeNow("resumed")
		}
		a.halt.Store(false)
	}
	clear(a.st.orders)
	a.st.orders = a.st.orders[:0]
	if p := a.st.paused; p != nil && !p.Until.IsZero() && !now.Before(p.Until) {
		a.resumeNow("the pause is over")
	}
}

func (a *Agent) pauseNow(p api.Paused, now time.Time) {
	if p.Since.IsZero() {
		p.Since = now
	}
	if old := a.st.paused; old != nil {
		p.Since = old.Since
	}
	a.st.paused = &p
	a.goal = protect
	if p.Restore && a.cfg.Mode == Enforce {
		a.goal = restoreAll
	}
	// What waits to be given back waits anew afterwards.
	clear(a.st.release)
	clear(a.st.lanes.release)
	args := []any{"by", p.By.String(), "restore", p.Restore}
	if !p.Until.IsZero() {
		args = append(args, "until", p.Until.Format(time.DateTime))
	}
	a.log.Warn("paused: nothing is written until it is resumed", args...)
	a.event(api.EventState, "paused", args...)
	a.st.causes.order = "paused by " + p.By.String()
}

func (a *Agent) resumeNow(what string) {
	if a.st.paused.Restore {
		for id := range a.st.lingering { // what they held is given back: they would be protected anew, for a moment
			a.st.lingerNoMore(id)
		}
	}
	a.st.paused = nil
	a.goal = protect
	for k := range a.st.holds {
		// Who turned it on did so while nobody was to overrule him.
		a.st.unsure[k] = true
	}
	a.st.lanes.check = true
	a.st.clamps.changed.Store(true)
	a.says(what)
	a.st.causes.order = what
}

// answerOrders tells those whose order is in force: not yet those who wait for everything to be given back.
func (a *Agent) answerOrders() {
	a.st.obeyed = slices.DeleteFunc(a.st.obeyed, func(o order) bool {
		if a.st.paused != nil && a.goal == restoreAll && (o.ask || o.paused != nil && o.paused.Restore) {
			return false
		}
		o.answer <- a.st.paused
		return true
	})
}

// countPause counts what is left to give back in a pause, or waits for its end.
func (a *Agent) countPause(s *plan.Steps) {
	if a.st.paused == nil {
		return
	}
	p := *a.st.paused
	p.Left, p.Waiting = 0, 0
	if a.goal == restoreAll {
		p.Left = a.claims() + len(s.DropRules) + len(s.DropClones)
	} else if a.cfg.Mode == Enforce {
		p.Waiting = len(s.Clones) + len(s.AddRules) + len(s.Locks) + len(s.Holds) + len(s.Retaken) +
			len(s.DropRules) + len(s.DropClones) + len(s.Unlocks) + len(s.Unholds)
	}
	a.st.paused = &p
}

// ordered pauses one agent alone, for served.
func (a *Agent) ordered(ctx context.Context, name string, p *api.Paused) ([]api.PausedNamespace, error) {
	if _, err := a.agentOf(name); err != nil {
		return nil, err
	}
	now, err := a.order(ctx, p)
	return []api.PausedNamespace{pausedNamespace(netns.Host, now, err)}, nil
}

func pausedNamespace(name string, now *api.Paused, err error) api.PausedNamespace {
	n := api.PausedNamespace{Name: name, Paused: now}
	if err != nil {
		n.Why = err.Error()
	}
	return n
}
