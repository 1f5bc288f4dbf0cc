package agent

import (
	"context"
	"log/slog"
	"time"

	"tsoagent/agent/api"
)

// telling is what was done and is not told yet. Covered flows wait for the writes, and for what the kernel answers
// after them; for the words nobody waits. Whatever else is said comes behind them.
type telling struct {
	later bool // a round writes
	done  []done
}

// done is one write.
type done struct {
	what string
	args []any
	at   time.Time
}

// maxUntold bounds how many writes are kept untold: where there are more, no flow waits for one of them alone.
const maxUntold = 32

// did counts a write. It is logged with its cause when the round has written all: of very many of a sort the first ones, and then how many more
// there were (settleCauses).
func (a *Agent) did(what string, args ...any) {
	a.count(what, Done)
	t := &a.telling
	t.done = append(t.done, done{what, args, a.clock()})
	if !t.later || len(t.done) == maxUntold {
		a.tellDone()
	}
}

// tellDone tells what was done.
func (a *Agent) tellDone() {
	t := &a.telling
	for _, d := range t.done {
		a.log.Log(context.Background(), a.levelOf(api.EventDone, d.what, slog.LevelInfo), d.what, d.args...)
		a.eventAt(d.at, api.EventDone, d.what, d.args...)
	}
	clear(t.done)
	t.done = t.done[:0]
}
