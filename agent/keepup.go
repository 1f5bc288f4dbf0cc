package agent

import (
	"time"

	"tsoagent/routes"
)

// writesAtOnce is how many writes are done before the loop looks up: for a halt, and whether the watcher keeps up.
const writesAtOnce = 2048

// maxUnseen is how many of its own writes the loop is ahead of the watcher. The kernel keeps each notification for the watcher until
// it is read, in up to a KiB of a queue that is bounded (routes.WatchOptions), and drops what does not fit: then everything would
// have to be read again.
const maxUnseen = 4 * writesAtOnce

// early is what the watchers have brought while the loop wrote. It belongs to the loop.
type early struct {
	batches []batch
	own     int // how many of it are notifications of own writes
	missed  int // how many of those were waited for in vain
}

// keepUp takes what the watchers have brought while the loop writes, so that none of them waits for room and the kernel drops
// nothing. It is applied in the next step, in its order: what is being done follows from what was known before. Where very many
// notifications of own writes are still to come, it waits for them; not for ever, as a write that changes nothing has none.
func (a *Agent) keepUp() {
	patience := time.NewTimer(echoPatience)
	defer patience.Stop()
	for {
		for _, b := range a.inbox.take() {
			a.early.batches = append(a.early.batches, b)
			a.early.own += a.countOwn(b.routes)
		}
		unseen := len(a.st.inflight) + a.st.own.n - a.early.own
		if unseen-a.early.missed <= maxUnseen {
			return
		}
		select {
		case <-a.inbox.signal:
		case <-patience.C:
			a.early.missed = unseen
			return
		}
	}
}

// countOwn counts the notifications of own writes of routes.
func (a *Agent) countOwn(events []routes.Event) (n int) {
	for _, ev := range events {
		var from routes.Origin
		switch ev := ev.(type) {
		case routes.RouteSet:
			from = ev.Origin
		case routes.RouteGone:
			from = ev.Origin
		}
		if a.ours(from) {
			n++
		}
	}
	return n
}

// take is all that the watchers have brought.
func (a *Agent) take() []batch {
	brought := a.early.batches
	a.early = early{}
	return append(brought, a.inbox.take()...)
}
