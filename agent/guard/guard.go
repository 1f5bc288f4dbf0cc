// Package guard takes the rules of an agent away the moment that it is killed.
//
// Rules and clones in tables of the agent's own go stale where nobody follows the routes below them. A guard is a child of the agent: a process that
// waits for the agent's end, on the other side of a socket that nobody else has, and deletes the agent's rules then, in each namespace in which it
// was told to watch. Packets go by their owners' routes from then on. The clones, to which no rule leads any more, are left to the next start, or to
// `tsoctl restore --stale`.
//
//	agent ── watch (a routing socket, the journal's lock) ──> guard
//	      ── drop, bye ─────────────────────────────────────>
//	      ── killed ──> end of file ──> rules deleted
//
// It opens nothing and listens to nobody else: the sockets are those of the agent, opened in their namespaces. With the journal's lock, which a copy
// of its file keeps (flock(2)), it keeps a next agent waiting until it is done, and does nothing where another one has the lock.
package guard

import (
	"encoding/json"
	"errors"
	"fmt"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// A Watch is a namespace in which rules are to go with the agent.
type Watch struct {
	// Table and Protocol are the numbers of the agent's tables and rules there (plan.Config).
	Table    routes.TableID  `json:"table"`
	Protocol routes.Protocol `json:"protocol"`
	// Name is how the namespace is called in the log, "" for the host's.
	Name string `json:"name,omitempty"`
}

// own reports whether a rule is the agent's.
func (w Watch) own(r *routes.Rule) bool {
	return plan.Config{Table: w.Table, Protocol: w.Protocol}.OwnRule(r)
}

// A message is what the agent tells the guard. One of the fields but ID is set.
type message struct {
	ID    uint64 `json:"id,omitempty"`
	Watch *Watch `json:"watch,omitempty"` // comes with two files: a routing socket, and the journal's lock
	Drop  bool   `json:"drop,omitempty"`
	Bye   bool   `json:"bye,omitempty"`
}

// maxMessage bounds a message in bytes. The name of a namespace is a file's, or a path.
const maxMessage = 8 << 10

var errMessage = errors.New("guard: a message that makes no sense")

func parse(b []byte) (message, error) {
	var m message
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("%w: %w", errMessage, err)
	}
	n := 0
	for _, set := range []bool{m.Watch != nil, m.Drop, m.Bye} {
		if set {
			n++
		}
	}
	if n != 1 || m.Watch != nil && (m.Watch.Table == 0 || m.Watch.Protocol == 0) {
		return m, errMessage
	}
	return m, nil
}
