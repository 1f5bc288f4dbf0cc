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

// keepUp takes what the watchers have brought while the loop writes, so that none of them waits for room and the kernel drops
// nothing. It is applied in the next step, in its order: what is being done follows from what was known before. Where very many
// notifications of own writes are still to come, it waits for them; not for ever, as a write that changes nothing has none.
func (a *Agent) keepUp() {
	patience := time.NewTimer(echoPatience)
	defer patience.Stop()
	for {
		a.early = append(a.early, a.hear()...)
		if a.unseen <= maxUnseen {
			return
		}
		select {
		case <-a.inbox.signal:
		case <-patience.C:
			a.unseen = 0
			return
		}
	}
}

// hear is what the watchers have brought, with what is in it of our own doing. What of that is applied when makes no difference here: the
// kernel has its room again.
func (a *Agent) hear() []batch {
	brought := a.inbox.take()
	for i := range brought {
		brought[i].own = a.heard(brought[i].routes)
	}
	return brought
}

// heard counts the notifications of own writes of routes. Where events were lost, those that are still to come may have been among them.
func (a *Agent) heard(events []routes.Event) (own int) {
	for _, ev := range events {
		var from routes.Origin
		switch ev := ev.(type) {
		case routes.RouteSet:
			from = ev.Origin
		case routes.RouteGone:
			from = ev.Origin
		case routes.Lost:
			a.unseen = 0
		}
		if a.ours(from) {
			own++
			a.unseen = max(a.unseen-1, 0)
		}
	}
	return own
}

// take is all that the watchers have brought.
func (a *Agent) take() []batch {
	brought := a.early
	a.early = nil
	return append(brought, a.hear()...)
}
