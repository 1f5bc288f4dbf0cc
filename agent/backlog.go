package agent

import (
	"net/netip"
	"time"

	"github.com/gaissmai/bart"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// backlog is what has been told of routes and is not in the mirror yet, when that is too much for one round. Events that touch what is covered
// overtake the others, so that a clone moves soon after its route although a whole table changes:
//
//	events ──> segments ──┬─ urgent: the routes that decide where what is covered goes, and those of our own tables ──> first
//	                      └─ rest:   all other routes                                                              ──> then
//
// What happened to one route stays in its order: no urgent event overtakes an earlier one of its route. Nothing overtakes the event of a link, an address, a
// rule or a nexthop object, nor a dump: those are segments of their own. The zero value is empty. It belongs to the loop.
type backlog struct {
	segments []segment
	size     int // events
	rest     int // those that are not urgent
	dumping  bool

	ours int // events of our own tables in it, and dumps

	// What became covered while the rest holds something: earlier events of the same routes may be among that. They don't overtake it.
	grown bart.Lite
	grew  bool // there is something in grown
	all   bool // anything may have become covered
	// passed are destinations of routes of which the rest has events, as they did not decide although they are near: what becomes of the longer
	// routes can change that.
	passed map[netip.Prefix]struct{}
}

// segment is a part of the backlog that nothing overtakes, and that overtakes nothing.
type segment struct {
	ordered      bool // all of it is in order, and in rest
	urgent, rest []piece
}

// piece is some events that were delivered at one time.
type piece struct {
	events []routes.Event
	at     time.Time
}

const (
	// roundEvents is how many events of routes a round takes at most: a millisecond's work, for which what is covered waits.
	roundEvents = 256
	// roundUrgent is how many of them may be urgent, as each of those can make some work for the planner and a write; and besideUrgent how many
	// others are taken behind the last urgent one: some, so that they go on where single urgent ones keep coming.
	roundUrgent  = 32
	besideUrgent = 64
	// maxBacklog bounds the events that wait in it, each of which takes some 80 bytes. Beyond that further ones wait in the inbox, and then in
	// the kernel's buffer, where nothing overtakes anything, and which loses what it has no room for: a full table that is replaced at once,
	// faster than it can be followed, has to fit.
	maxBacklog = 1 << 21
)

func (b *backlog) empty() bool { return b.size == 0 }

// full reports whether nothing more is to be put in now.
func (b *backlog) full() bool { return b.size >= maxBacklog }

// sorter is what the backlog asks about events.
type sorter interface {
	// urgency says of a route whether its events overtake others.
	urgency(table routes.TableID, dst netip.Prefix) urgency
	ownTable(table routes.TableID) bool
	// behind takes an event of one of our own tables if the mirror has gone past it.
	behind(ev routes.Event) bool
}

// urgency is that of a route's events.
type urgency uint8

const (
	apart  urgency = iota // nothing covered is near
	nearby                // something is, but another route decides, as things are
	urgent                // they overtake others
)

// put adds what was delivered. The slice is the backlog's to change.
func (b *backlog) put(events []routes.Event, at time.Time, of sorter) {
	size := b.size
	defer func() { b.size = size }()
	keep := events[:0]
	flush := func() {
		if len(keep) > 0 {
			s := &b.segments[len(b.segments)-1]
			s.rest = append(s.rest, piece{keep, at})
			b.rest += len(keep)
			keep = keep[len(keep):]
		}
	}
	var first []routes.Event
	for _, ev := range events {
		table, dst, isRoute := routeOf(ev)
		switch _, dump := ev.(routes.ResyncBegin); {
		case dump: // which can have found what is older than what was written
			b.ours++
		case isRoute && of.ownTable(table):
			if b.ours == 0 && !b.dumping && of.behind(ev) {
				continue // most of them: nothing follows from it
			}
			b.ours++
		}
		size++
		if ordered := !isRoute || b.dumping; len(b.segments) == 0 || b.segments[len(b.segments)-1].ordered != ordered {
			flush()
			b.first(&first, at)
			b.segments = append(b.segments, segment{ordered: ordered})
		}
		switch ev.(type) {
		case routes.ResyncBegin:
			b.dumping = true
		case routes.ResyncEnd, routes.Lost:
			b.dumping = false
		}
		if isRoute && !b.dumping && !b.waits(dst) {
			switch of.urgency(table, dst) {
			case urgent:
				first = append(first, ev)
				continue
			case nearby:
				if b.passed == nil {
					b.passed = map[netip.Prefix]struct{}{}
				}
				b.passed[dst] = struct{}{}
			}
		}
		keep = append(keep, ev)
	}
	flush()
	b.first(&first, at)
}

// first adds urgent events to the last segment.
func (b *backlog) first(events *[]routes.Event, at time.Time) {
	if len(*events) > 0 {
		s := &b.segments[len(b.segments)-1]
		s.urgent = append(s.urgent, piece{*events, at})
		*events = nil
	}
}

// waits reports whether earlier events of a route may be in the rest although it is covered now, or decides.
func (b *backlog) waits(dst netip.Prefix) bool {
	if _, passed := b.passed[dst]; passed {
		return true
	}
	return b.rest > 0 && (b.all || b.grew && b.grown.OverlapsPrefix(dst))
}

func routeOf(ev routes.Event) (table routes.TableID, dst netip.Prefix, ok bool) {
	switch ev := ev.(type) {
	case routes.RouteSet:
		return ev.Route.Body.Table, ev.Route.Dst, true
	case routes.RouteGone:
		return ev.Route.Body.Table, ev.Route.Dst, true
	}
	return 0, netip.Prefix{}, false
}

// next calls apply with what the next round takes.
func (b *backlog) next(apply func(piece)) {
	room, urgent := roundEvents, roundUrgent
	for len(b.segments) > 0 && room > 0 {
		s := &b.segments[0]
		n := take(&s.urgent, min(room, urgent), apply)
		room, urgent, b.size = room-n, urgent-n, b.size-n
		if len(s.urgent) > 0 {
			break // nothing overtakes these
		}
		if n > 0 {
			room = min(room, besideUrgent)
		}
		n = take(&s.rest, room, apply)
		room, b.size, b.rest = room-n, b.size-n, b.rest-n
		if len(s.rest) == 0 {
			b.segments[0] = segment{}
			b.segments = b.segments[1:]
		}
	}
	if b.rest == 0 {
		b.grown, b.grew, b.all, b.passed = bart.Lite{}, false, false, nil
	}
	if b.size == 0 {
		b.segments, b.ours = nil, 0
	}
}

// pressing reports whether urgent events are left for the next round.
func (b *backlog) pressing() bool { return len(b.segments) > 0 && len(b.segments[0].urgent) > 0 }

// take hands on up to n events of the first pieces, and returns how many it were.
func take(pieces *[]piece, n int, apply func(piece)) (took int) {
	for len(*pieces) > 0 && took < n {
		p := &(*pieces)[0]
		k := min(len(p.events), n-took)
		apply(piece{p.events[:k], p.at})
		took += k
		if p.events = p.events[k:]; len(p.events) > 0 {
			break
		}
		*p = piece{}
		*pieces = (*pieces)[1:]
	}
	return took
}

// grow hears, ahead of each plan, of what that can make covered.
func (b *backlog) grow(st *state) {
	if b.rest == 0 || b.all {
		return
	}
	if st.changes.All {
		b.all = true
		return
	}
	add := func(dst netip.Prefix) { b.grown.Insert(dst); b.grew = true }
	for _, index := range st.changes.Policies {
		if p, ok := st.db.Policy(index); ok {
			add(p.Selector.Dst)
		}
	}
	for _, at := range st.changes.SAs {
		if !at.Dst.IsValid() {
			b.all = true
			return
		}
		add(netip.PrefixFrom(at.Dst, at.Dst.BitLen()))
	}
}

// replanned hears after each plan whether it was worked out from scratch, for whatever reason.
func (b *backlog) replanned(pl *plan.Planner) {
	if !pl.Followed() {
		b.all = b.rest > 0
	}
}

// stormPart is how many policies of a wide route's a round works out anew while a backlog waits, as what is covered waits for that, too, and
// pressingPart while what is covered waits.
const (
	stormPart    = 16
	pressingPart = 8
)

// part is how many it is now, 0 for the planner's own number.
func (b *backlog) part() int {
	switch {
	case b.empty():
		return 0
	case b.pressing():
		return pressingPart
	}
	return stormPart
}

// urgency is that of what happens to a route.
func (a *Agent) urgency(table routes.TableID, dst netip.Prefix) urgency {
	if a.cfg.Plan.OwnTable(table) {
		return urgent
	}
	switch is, decides := a.st.planner.Near(table, dst); {
	case decides:
		return urgent
	case is:
		return nearby
	}
	return apart
}

func (a *Agent) ownTable(table routes.TableID) bool { return a.cfg.Plan.OwnTable(table) }

// takeEvents brings what is pending into the state, as much of it as one round is to take. It reports whether something is left.
func (a *Agent) takeEvents() (left bool) {
	a.brought, a.news = false, false
	if !a.backlog.full() {
		pending := a.take()
		a.news = len(pending) == 0 && a.backlog.empty()
		n := 0
		for i := range pending {
			n += len(pending[i].routes) - pending[i].own
		}
		// Before the first plan nothing is covered, nor does any round wait. What we wrote ourselves makes no work.
		calm := a.backlog.empty() && (n <= roundEvents || a.lastP == nil)
		for _, b := range pending {
			if !calm && len(b.routes) > 0 {
				a.backlog.put(b.routes, b.at, a)
			} else {
				a.takeBatch(b)
			}
		}
	}
	a.backlog.next(func(p piece) { a.takeBatch(batch{routes: p.events, at: p.at}) })
	return !a.backlog.empty()
}

// takeBatch applies a batch, and notes since when it waits for its effect.
func (a *Agent) takeBatch(b batch) {
	if a.since.IsZero() || !b.at.IsZero() && b.at.Before(a.since) {
		a.since = b.at
	}
	a.brought = a.brought || len(b.routes) > 0
	a.news = a.news || !b.onlyRoutes()
	a.apply(b)
}
