package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"tsoagent/agent/api"
)

// An errand is an order on its way to a member.
type errand struct {
	m      *member
	name   string
	paused *api.Paused        // what it was told
	agent  *Agent             // who was told, or had this to do last; nil for none
	answer <-chan *api.Paused // nil if nobody was told yet
}

// ordered gives the order to one member, or to all, and keeps it for those that start, or start again. What one of them says
// that ends meanwhile is nothing: the next one in its place does.
func (f *Fleet) ordered(ctx context.Context, name string, p *api.Paused) ([]api.PausedNamespace, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, restoreWithin, errOverdue)
	defer cancel()
	errands, err := f.give(name, p)
	if err != nil {
		return nil, err
	}
	type said struct {
		errand
		now *api.Paused
		err error
	}
	answers := make(chan said, len(errands))
	for _, e := range errands {
		go func() {
			now, err := f.done(ctx, e)
			answers <- said{e, now, err}
		}()
	}
	out := []api.PausedNamespace{}
	for range errands {
		s := <-answers
		if errors.Is(s.err, errEndedAgent) && name == "" && f.lets(s.m) {
			continue // it was to be let go already
		}
		out = append(out, pausedNamespace(s.name, s.now, s.err))
	}
	slices.SortFunc(out, func(a, b api.PausedNamespace) int {
		return cmp.Or(cmp.Compare(rank(a.Name), rank(b.Name)), strings.Compare(a.Name, b.Name))
	})
	f.pokeAfter(p)
	return out, nil
}

// pokeAfter has what waits for a pause's end looked at then.
func (f *Fleet) pokeAfter(p *api.Paused) {
	switch {
	case p == nil:
		f.poke()
	case !p.Until.IsZero():
		time.AfterFunc(time.Until(p.Until), f.poke)
	}
}

func (f *Fleet) lets(m *member) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return m.leaving
}

// give notes an order and posts it, in one: two that come at the same time come to all loops in the order in which they are noted.
func (f *Fleet) give(name string, p *api.Paused) ([]errand, error) {
	if p != nil {
		now := *p
		now.Since = time.Now()
		p = &now
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var to []*member
	if name == "" {
		f.paused = p
		for _, m := range f.members {
			to = append(to, m)
		}
	} else {
		m := f.find(name)
		if m == nil {
			return nil, f.notFollowed(name)
		}
		to = append(to, m)
	}
	var out []errand
	for _, m := range to {
		m.pause(p)
		e := errand{m: m, name: m.names[0], paused: m.paused, agent: m.agent}
		if m.agent != nil && m.generation == f.generation { // another one is about to end, and may give everything back first
			e.answer = m.agent.give(m.paused)
		}
		out = append(out, e)
	}
	return out, nil
}

// pause notes what the agents of a member are told. The caller holds the Fleet's lock.
func (m *member) pause(p *api.Paused) {
	old := lasting(m.paused)
	if m.paused = nil; p == nil {
		return
	}
	mine := *p
	if old != nil {
		mine.Since = old.Since // as its loop has it
	}
	m.paused = &mine
}

// done waits until an errand is.
func (f *Fleet) done(ctx context.Context, e errand) (*api.Paused, error) {
	if e.agent == nil && (e.paused == nil || !e.paused.Restore) {
		return e.paused, nil // nobody writes, and who starts knows it
	}
	for {
		if e.answer != nil {
			now, err := e.agent.wait(ctx, e.paused, e.answer)
			if !errors.Is(err, errEndedAgent) {
				return now, err
			}
		}
		if err := f.passOn(ctx, &e); err != nil {
			return nil, err
		}
	}
}

// passOn waits for the agent that takes the place of the one of an errand, which was handed the order on.
func (f *Fleet) passOn(ctx context.Context, e *errand) error {
	for {
		f.mu.Lock()
		turn, a, why := e.m.turn, e.m.agent, e.m.why
		switch {
		case e.m.over:
			f.mu.Unlock()
			return errEndedAgent
		case a != nil && a != e.agent:
			e.agent, e.answer = a, a.inquire()
			f.mu.Unlock()
			return nil
		}
		f.mu.Unlock()
		if a == nil && why != "" {
			return fmt.Errorf("it can't be followed: %s", why)
		}
		select {
		case <-turn:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// turns tells those who wait that there is another agent, or why there is none. The caller holds the Fleet's lock.
func (m *member) turns() {
	close(m.turn)
	m.turn = make(chan struct{})
}
