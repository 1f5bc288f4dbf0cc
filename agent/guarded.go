package agent

import (
	"errors"
	"fmt"
	"os"

	"tsoagent/agent/guard"
	"tsoagent/routes"
)

// A Guard is who takes the rules of an agent away when it is killed (guard.Guard).
type Guard interface {
	Watch(w guard.Watch, table, lock *os.File) (drop func() error)
}

var _ Guard = (*guard.Guard)(nil)

// GuardedBy has a guard watch in all namespaces, from the start of Run on. It is for ahead of that.
func (f *Fleet) GuardedBy(g Guard) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.guard = g
	for _, m := range f.members {
		m.agent.guard = g
	}
}

// lockable is a journal whose lock another process can keep.
type lockable interface{ LockFile() (*os.File, error) }

// watchOver tells the guard, if there is one, of the agent's namespace, until it is closed. What it needs can be had as a rule; without it the agent
// goes on.
func (a *Agent) watchOver() {
	j, ok := a.journal.(lockable)
	if a.guard == nil || !ok || a.once || a.cfg.Mode != Enforce {
		return
	}
	var table, lock *os.File
	err := a.in(func() error {
		t, err := routes.OpenTable()
		if err != nil {
			return err
		}
		table, err = t.File()
		return errors.Join(err, t.Close())
	})
	if err == nil {
		lock, err = j.LockFile()
	}
	if err != nil {
		a.log.Warn("the agent's guard can't watch: if the agent is killed, its rules stay until somebody takes them away", "err", err)
		return
	}
	drop := a.guard.Watch(guard.Watch{Table: a.cfg.Plan.Table, Protocol: a.cfg.Plan.Protocol, Name: a.name}, table, lock)
	// Ahead of the journal, whose lock another agent can have then.
	a.closers = append(a.closers, func() error {
		if err := drop(); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		return nil
	})
}
