package agent

import (
	"context"
	"errors"
	"log/slog"

	"tsoagent/agent/flows"
	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// Examination is one look at a namespace, for whoever judges it (agent/doctor). It is good until the function that got it returns.
type Examination struct {
	// Input is what an agent's plan would follow from, and Plan that plan. What the journal says to be ours is so there.
	Input plan.Input
	Plan  *plan.Plan
	a     *Agent
}

// ExamineIn reads the kernel once, beside an agent or without one and without changing anything, and calls fn with what was found in a
// namespace. The error matches ErrPermission where a capability is missing.
func ExamineIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, fn func(context.Context, *Examination) error) error {
	_, err := lookIn(ctx, spec, cfg, log, version, func(ctx context.Context, a *Agent) error {
		if a.lastP == nil {
			return errNotReady
		}
		return fn(ctx, &Examination{Input: a.lastIn, Plan: a.lastP.Complete(), a: a})
	})
	return err
}

// Lookup asks the kernel for a route.
func (e *Examination) Lookup(q routes.Query) (routes.Answer, error) { return e.a.rt.Lookup(q) }

// InNamespace runs a function in the namespace.
func (e *Examination) InNamespace(fn func() error) error { return e.a.in(fn) }

// Diagnose makes a diagnosis of the connections.
func (e *Examination) Diagnose(ctx context.Context) (*Diagnosis, error) {
	return e.a.diagnose(ctx, atOnce)
}

// LostBy counts, for each device, the connections that leave by it and have lost offload without being covered. It is nil where the kernel
// does not let its sockets be read.
func (e *Examination) LostBy(ctx context.Context) (map[string]int, error) {
	out := map[string]int{}
	_, err := e.a.eachFlow(ctx, atOnce, flows.Filter{Lost: true}, func(f *flows.Flow) error {
		out[f.Device]++
		return nil
	})
	if errors.Is(err, ErrUnreadable) {
		return nil, nil
	}
	return out, err
}

// ShellWord is a name as a word of a shell's command.
func ShellWord(name string) string { return shellWord(name) }
