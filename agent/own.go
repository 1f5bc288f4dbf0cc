package agent

import (
	"errors"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
)

// ownWrites is what was written in tables of our own and is in the mirror already. The watcher tells of it as well, behind all that the kernel has
// told of before, which in a storm takes long. What it tells of such a route until then is older, and would undo what is known.
//
//	Batch ── what the kernel has told of the writes ──> mirror
//	                          └──> ahead ──┐
//	watcher ── of a route that is ahead ──>┴ dropped, until its newest write has come by
//	        ── of any other ──────────────────────────> mirror
//
// The zero value is empty. It belongs to the loop.
type ownWrites struct {
	of map[routes.Key]newest
	n  int // notifications that are still to come
}

// newest is the newest write of a route.
type newest struct {
	seq    uint32
	events []routes.Event
	left   int // of the events, that are still to come
}

// put notes what the watcher will tell of a write.
func (h *ownWrites) put(res *routes.Result) {
	k, _, ok := routeEvent(res.Events[0])
	if !ok {
		return
	}
	if h.of == nil {
		h.of = map[routes.Key]newest{}
	}
	h.of[k] = newest{res.Seq, res.Events, len(res.Events)}
	h.n += len(res.Events)
}

// passed takes note of what the watcher tells, and reports whether the mirror is ahead of it. intruder says that it is somebody else's
// route in a place of ours: only a dump tells what became of that.
func (h *ownWrites) passed(ev routes.Event, ours bool) (old, intruder bool) {
	if h.n == 0 {
		return false, false
	}
	k, from, ok := routeEvent(ev)
	if !ok {
		return false, false
	}
	w, is := h.of[k]
	if !is {
		return false, false
	}
	if !ours {
		_, set := ev.(routes.RouteSet)
		return true, set
	}
	h.n = max(h.n-1, 0)
	if from.Seq == w.seq {
		if w.left--; w.left > 0 {
			h.of[k] = w
		} else if delete(h.of, k); len(h.of) == 0 {
			*h = ownWrites{} // a map does not shrink
		}
	}
	return true, false
}

// forget is for when events were lost: what is to come is not known.
func (h *ownWrites) forget() { *h = ownWrites{} }

// routeEvent is the key of a route's event, and who caused it.
func routeEvent(ev routes.Event) (k routes.Key, from routes.Origin, ok bool) {
	switch ev := ev.(type) {
	case routes.RouteSet:
		return ev.Route.Key(), ev.Origin, true
	case routes.RouteGone:
		return ev.Route.Key(), ev.Origin, true
	}
	return routes.Key{}, routes.Origin{}, false
}

// own takes what the kernel has told of writes in our tables into the mirror. Of a write of which it has told nothing, the loop waits for what
// the watcher says.
func (a *Agent) own(results []routes.Result) {
	for i := range results {
		switch res := &results[i]; {
		case len(res.Events) > 0: // also where it failed halfway
			a.unseen += len(res.Events)
			a.st.own.put(res)
			for _, ev := range res.Events {
				if e := a.st.fib.Own(ev); e.Resync != nil && a.sources != nil {
					a.sources.resyncRoutes(*e.Resync)
				}
			}
		case res.Err == nil:
			a.unseen++
			a.st.inflight[res.Seq] = struct{}{}
		}
	}
}

// isGone reports whether the kernel had no such route to delete.
func isGone(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) }

// ownGone takes a clone out of the mirror that the kernel does not have as it is there. Nothing may tell of that: the kernel takes routes away
// without a word where a device or a nexthop object goes. What it has instead, a dump tells.
func (a *Agent) ownGone(r routes.Route) {
	a.st.fib.Own(routes.RouteGone{Route: r})
	if a.sources != nil {
		a.sources.resyncRoutes(routes.Scope{RoutesOnly: true, Family: r.Body.Family})
	}
}

// behind reports whether the mirror has gone past what the watcher tells of a route.
func (a *Agent) behind(ev routes.Event) bool {
	table, _, _ := routeOf(ev)
	if a.st.dumping || !a.cfg.Plan.OwnTable(table) { // a dump's items count at its end
		return false
	}
	_, from, _ := routeEvent(ev)
	old, intruder := a.st.own.passed(ev, a.ours(from))
	if intruder && a.sources != nil {
		a.sources.resyncRoutes(routes.Scope{RoutesOnly: true})
	}
	return old
}

// keepAhead is for the begin of a dump, which may have been taken before what was written since.
func (a *Agent) keepAhead() {
	for _, w := range a.st.own.of {
		for _, ev := range w.events {
			a.st.fib.Own(ev)
		}
	}
}
