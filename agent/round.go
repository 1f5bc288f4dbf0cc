package agent

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/l2tp"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// apply brings one batch of events into the state.
func (a *Agent) apply(b batch) {
	a.stats.Events += uint64(b.len())
	for _, ev := range b.xfrm {
		a.noteXFRM(ev, b.at)
		if l, ok := ev.(xfrmwatch.Lost); ok {
			a.notice(eventsLost, "source", "xfrm", "err", l.Err)
		}
		a.st.ways.noteXFRM(a.st.db, ev)
		a.st.db.Apply(ev)
		a.lookAhead(ev)
	}
	for _, ev := range b.routes {
		a.takeRoute(ev, b.at)
		if found, ok := ev.(routes.RoutesFound); ok {
			found.Done()
		}
	}
	for _, ev := range b.features {
		a.noteFeatures(ev, b.at)
		if l, ok := ev.(ethtool.Lost); ok {
			a.notice(eventsLost, "source", "ethtool", "err", l.Err)
		}
		set, ok := ev.(ethtool.FeaturesSet)
		if ok && a.differs(set.Features) {
			a.look(routes.Ifindex(set.Features.Index))
		}
		a.st.applyFeatures(ev)
		if ok {
			a.recheck(set.Features)
		}
	}
	for _, ev := range b.l2tp {
		switch ev := ev.(type) {
		case l2tp.Lost:
			a.log.Warn("the sessions can't be read, trying again", "source", "l2tp", "err", ev.Err)
		case l2tp.SessionsSet:
			a.st.l2tp.set(ev.Sessions)
			a.st.ways.relink = true
		}
	}
	a.st.arrivals = append(a.st.arrivals, b.arrivals...)
	a.st.orders = append(a.st.orders, b.orders...)
	for _, h := range b.handed {
		a.settleMoved(h)
	}
	if b.resync {
		a.st.ways.all = true
	}
	if b.offer && a.lastP != nil {
		a.offerAgain(b.resync)
	}
	for _, ev := range b.keys {
		switch ev := ev.(type) {
		case sockopt.Lost:
			a.log.Warn("the TCP keys can't be read, trying again", "source", "sockopt", "err", ev.Err)
			a.st.keysStale, a.st.changes.Devices = true, true
		case sockopt.KeysSet:
			if a.lastP != nil {
				a.st.causes.add(ev, "changed", b.at, false)
			}
			a.st.keys, a.st.keysTrusted, a.st.keysStale, a.st.changes.Devices = ev, a.trust.users(), false, true
		}
	}
}

// takeRoute applies an event, and notes it as a cause. Of routes, those that nothing is near are none: a full table has a million of
// them.
func (a *Agent) takeRoute(ev routes.Event, at time.Time) {
	if _, _, ok := routeOf(ev); !ok {
		a.st.touched = true
		a.noteRoute(ev, at)
		a.applyRoute(ev)
		return
	}
	before := a.st.touched
	a.st.touched = len(a.st.inflight)+len(a.st.writing)+len(a.st.withheld) > 0
	a.applyRoute(ev)
	if a.st.touched {
		a.noteRoute(ev, at)
	}
	a.st.touched = a.st.touched || before
}

func (a *Agent) applyRoute(ev routes.Event) {
	var next *routes.Link // there already in the place of one that is gone
	switch ev := ev.(type) {
	case routes.Lost:
		a.notice(eventsLost, "source", "routes", "err", ev.Err)
		// What was written may have been seen in what was lost.
		clear(a.st.inflight)
		clear(a.st.writing)
		a.st.own.forget()
	case routes.RouteSet, routes.RouteGone:
		if a.behind(ev) {
			return
		}
	case routes.LinkSet:
		a.st.ways.link(a.st.fib, ev.Link)
		a.doubtMTU6(ev.Link)
		a.laneLink(ev.Link.Index, ev.Link.Name)
		if a.lastP != nil {
			a.returned(ev.Link)
		}
		// A new or renamed device has no features event of its own. What is known of an index that has just come can be of the device that
		// had it before: that one's last event comes by another socket, and may have come behind its end.
		if a.st.fib.Link(ev.Link.Index) == nil && a.lastP != nil {
			delete(a.st.features, ev.Link.Index)
		}
		if f := a.st.features[ev.Link.Index]; f == nil || f.Name != ev.Link.Name {
			a.look(ev.Link.Index)
		}
		a.renamed(ev.Link)
		a.nicSet(ev.Link)
		if ev.Features {
			delete(a.st.unheard, ethtool.Ifindex(ev.Link.Index))
		}
	case routes.LinkGone:
		delete(a.st.features, ev.Index)
		a.st.l2tp.gone(ev.Index)
		a.departed(ev)
		if l := a.st.fib.Link(ev.Index); l != nil && nicKey(l) != "" {
			a.st.nics = true
		}
		if next = a.strayed(ev.Index); next == nil {
			a.forgetDevice(ev.Index)
		}
		a.laneLink(ev.Index, "")
	case routes.AddrSet:
		a.st.ways.addr(ev.Addr.Prefix.Addr())
	case routes.AddrGone:
		a.st.ways.addr(ev.Addr.Prefix.Addr())
	case routes.RuleSet:
		// A dump repeats the rules that are known.
		if !slices.ContainsFunc(a.st.fib.Rules(ev.Rule.Family), func(r *routes.Rule) bool { return *r == *ev.Rule }) {
			a.foreignRule(ev.Rule)
		}
	case routes.RuleGone:
		if a.cfg.Plan.OwnRule(ev.Rule) && slices.ContainsFunc(a.st.fib.Rules(ev.Rule.Family), func(r *routes.Rule) bool { return *r == *ev.Rule }) {
			a.st.deleted[*ev.Rule] = a.clock() // what we delete is not there any more
		}
		a.foreignRule(ev.Rule)
	case routes.ResyncBegin:
		a.st.dumping = true
	case routes.ResyncEnd:
		a.st.dumping, a.st.nics = false, true
	}
	if e := a.st.fib.Apply(ev); e.Resync != nil && a.sources != nil {
		a.sources.resyncRoutes(*e.Resync)
	}
	if _, begin := ev.(routes.ResyncBegin); begin {
		a.keepAhead()
	}
	if next != nil { // its own event can be late, and claims on what isn't there are dropped
		a.st.fib.Own(routes.LinkSet{Link: next})
	}
	a.moved(ev)
	a.echo(ev)
	a.lookAhead(ev)
}

func (a *Agent) look(i routes.Ifindex) {
	if a.sources != nil {
		a.sources.look(ethtool.Ifindex(i))
	}
}

// foreignRule lets shapes that were refuted be tried again: the rules around them changed.
func (a *Agent) foreignRule(r *routes.Rule) {
	if !a.cfg.Plan.OwnRule(r) {
		clear(a.st.withheld)
	}
}

// differs reports whether an event tells of features that are not what is known. It can be older than what was read, and of the device
// that had the index before: nothing tells of the newer state again, so it is read once more. What that finds ends it.
func (a *Agent) differs(f *ethtool.Features) bool {
	known := a.st.features[routes.Ifindex(f.Index)]
	return a.st.fresh == nil && known != nil && !known.Equal(f)
}

// recheck reads the features of a device again when an event says that one we hold is on. The
// event may be older than our own write: only what the kernel says now is somebody's change.
func (a *Agent) recheck(f *ethtool.Features) {
	for _, k := range a.st.holdsOn(routes.Ifindex(f.Index)) {
		if s, ok := f.Get(k.Feature); ok && s.Wanted {
			if now, err := a.et.Features(ethtool.Device{Index: f.Index, Name: f.Name}); err == nil {
				a.st.know(now)
			}
			return
		}
	}
}

// echo follows the notifications of our own route writes, and sees what others did in between.
func (a *Agent) echo(ev routes.Event) {
	var r routes.Route
	var from routes.Origin
	gone := false
	switch ev := ev.(type) {
	case routes.RouteSet:
		r, from = ev.Route, ev.Origin
	case routes.RouteGone:
		r, from, gone = ev.Route, ev.Origin, true
	default:
		return
	}
	if a.rt == nil {
		return
	}
	ours := from.Port != 0 && from.Port == a.rt.Port()
	if ours {
		delete(a.st.inflight, from.Seq)
	}
	if len(a.st.writing) == 0 || r.Body == nil || a.st.dumping {
		return // an item of a dump may be older than our write, and is nobody's change
	}
	w := a.st.writing[r.Key()]
	switch {
	case w == nil:
	case ours && from.Seq == w.seq:
		delete(a.st.writing, r.Key())
		if w.owner != nil {
			a.repair(w, r)
		}
	case !ours && gone:
		w.owner = nil
	case !ours:
		// Of several with the key our write replaces the first; one that was appended is safe.
		if first, n := a.st.fib.Get(r.Key()); n < 2 || first.Body == r.Body {
			owner := r // r itself stays on the stack: each route event comes by here
			w.owner = &owner
		}
	}
}

// input is what the next plan follows from.
func (a *Agent) input(now time.Time) plan.Input {
	in := plan.Input{
		Config: a.cfg.Plan, XFRM: a.st.db, FIB: a.st.fib, Features: a.st.features, Keys: a.st.keys.Keys, Trusted: a.st.keysTrusted, KeysStale: a.st.keysStale,
		Lingering: a.st.lingeringCoverages(), Last: a.st.last, Locks: a.st.locks, MTUs: a.st.mtus, Holds: a.st.holds,
		Forwarding: a.st.forwarding,
	}
	if len(a.st.withheld) > 0 {
		in.Withheld = map[plan.ShapeID]string{}
	}
	for id, w := range a.st.withheld {
		if now.Before(w.until) {
			in.Withheld[id] = w.why
		} else {
			delete(a.st.withheld, id)
		}
	}
	a.st.ways.pressed = a.backlog.pressing()
	a.st.ways.settle(a.rt, a.st)
	if !a.st.changes.All {
		a.st.changes.Peers = append(a.st.changes.Peers, a.st.ways.others...)
	}
	a.st.ways.others = nil
	in.Peers, in.Outers, in.L2TP = a.st.ways, a.st.ways.pathOut, a.st.ways.l2tp
	in.Probed = a.probed
	return in
}

// round plans and acts once.
func (a *Agent) round(now time.Time) (next time.Duration, reached bool) {
	if a.lastP == nil && !a.once {
		a.st.causes.order = cmp.Or(a.heir, "the agent started")
	}
	a.st.touched = false
	a.st.linger(now, time.Duration(a.cfg.RestoreAfter))
	a.st.forwarding = a.forwards.read(a.st.forwarding)
	a.freshenMTUs()
	a.settleUnsure()
	in := a.input(now)
	pl, unfinished := &plan.Plan{}, a.st.ways.late()
	if a.goal == protect || a.st.paused != nil {
		a.backlog.grow(a.st)
		a.st.planner.Part = a.backlog.part()
		pl = a.st.planner.Plan(in, a.st.changes)
		a.backlog.replanned(&a.st.planner)
		unfinished = unfinished || a.st.planner.Unfinished()
		a.st.changes = plan.Changes{}
		a.remember()
	}
	act, held := pl, plan.Held{Holds: a.st.holds, Locks: a.st.locks} // what is worked towards
	var steps plan.Steps
	switch {
	case a.onlyLooks(): // what would have to be done is worked out for a report, not in each round
	case a.goal == protect:
		steps = a.st.planner.Steps(in, held)
	default:
		act = &plan.Plan{}
		steps = plan.Diff(in, act, held)
		a.st.planner.Relook()
	}
	if a.once || a.goal != protect {
		steps.Unlocks = slices.DeleteFunc(steps.Unlocks, func(u plan.Unlock) bool { return a.st.stuck[u.Route.Key()] >= stuckAfter })
	}
	if a.goal == restoreStale {
		steps = plan.Steps{DropRules: steps.DropRules, DropClones: steps.DropClones}
	}
	more := a.moreSteps(in, act)
	wrote, failures, actions := false, a.stats.Failed, a.stats.Actions
	if a.writes() {
		a.telling.later = true
		if !a.setMore(act, &more, now) {
			steps.Unlocks = nil
		}
		a.enforce(act, &steps, now)
		if !a.halt.Load() {
			a.dropMore(act, &more, now)
		}
		a.reacted(a.stats.Actions != actions)
		a.telling.later = false
		a.tellDone()
		a.settleFights(now)
		wrote = a.stats.Actions != actions || a.again && !a.once
	} else {
		a.lookAtMore(now)
	}
	first := a.lastP == nil
	a.since = time.Time{}
	a.lastP, a.lastIn = pl, in
	a.countPause(&steps)
	a.came = outcome{now: now, unlocked: a.unlocked(pl, act, &steps)}
	if a.came.writes = a.writes(); !a.came.writes { // else they are in place
		a.came.rules, a.came.clones = steps.AddRules, steps.Clones
	}
	g := a.glimpse(now)
	if first && !a.once && (a.goal == protect || a.st.paused != nil) {
		a.ready(g)
		if a.onReady != nil {
			a.onReady()
		}
	}
	if a.goal != protect && steps.Empty() && a.cfg.Mode == Enforce {
		a.closeBooks()
	}
	next = a.nextTimer(now)
	if a.stats.Actions == actions && a.stats.Failed == failures {
		a.seen()
	}
	wrote = wrote || unfinished // which goes on at once, too
	a.settleCauses(wrote)
	a.answerOrders()
	if wrote {
		// Look again at once: what was written is to be found in place.
		return time.Nanosecond, false
	}
	reached = a.st.ready() && (a.cfg.Mode == Observe || steps.Empty() && len(a.st.writing) == 0 && a.moreDone(&more) && a.lanesDone() && a.movesDone())
	if reached && a.st.paused != nil && a.goal != protect {
		a.goal = protect
		a.log.Info("everything is given back; the pause goes on")
		a.event(api.EventState, "everything is given back; the pause goes on")
		return time.Nanosecond, false // for the report
	}
	if (a.once || a.goal != protect) && !reached { // nobody else brings the next round
		if a.stats.Failed != failures {
			return onceFailed, false
		}
		return onceAgain, false
	}
	return next, reached
}

// onceAgain is how soon a restore looks again whether all is done, onceFailed how soon it tries
// again what has failed.
const (
	onceAgain  = 5 * time.Millisecond
	onceFailed = time.Second
)

// closeBooks takes what is no claim out of the journal once everything is given back.
func (a *Agent) closeBooks() {
	ids := []string{"tables"}
	a.st.tablesBooked = false
	if a.goal == restoreAll && a.st.paused == nil {
		for id := range a.st.last {
			ids = append(ids, mtuID(id))
		}
	}
	a.unbook(ids...)
	a.forgetGone()
}

// ready tells once what the agent sees, and what to look at next.
func (a *Agent) ready(g *glance) {
	look := "tsoctl status"
	if a.cfg.RunDir != DefaultRunDir {
		look += " --run-dir " + a.cfg.RunDir
	}
	if a.name != "" {
		look += " --netns " + a.name
	}
	says := "nothing is covered: nothing to do, nothing written"
	switch {
	case g.coverages+g.holds > 0 && a.cfg.Mode == Observe:
		says = "only looking: nothing is written"
	case g.coverages > 0:
		says = "covered flows get what they need, and nobody else pays for it"
	case g.holds > 0:
		says = "nothing is covered yet; ESP offloads that no port can keep are held off"
	}
	a.event(api.EventState, "ready", "mode", g.mode, "coverages", g.coverages)
	a.log.Info("ready", "mode", g.mode, "links", a.st.fib.LinkCount(), "routes", a.st.fib.Len(), "policies", g.policies, "sas", a.st.db.SACount(),
		"coverages", g.coverages, "says", says, "look_next", look)
}

// remember keeps the last valid MTU of each coverage while its policy stays, in the journal too:
// a restart in the middle of a rekey must not cost its flows the lock.
func (a *Agent) remember() {
	var entries []journal.Entry
	for c, valid := range a.st.planner.Told() {
		if valid != 0 {
			a.st.lasts(c.ID, valid)
		}
		mtu, ok := a.st.last[c.ID] // also one that was inherited
		if !ok || a.st.booked[c.ID] == mtu {
			continue
		}
		a.st.booked[c.ID] = mtu
		entries = append(entries, entry(mtuID(c.ID), kindMTU, rememberedMTU{
			Policy: c.ID.Policy, Peer: c.ID.Peer, Selector: c.Policy.Selector, Mark: c.Policy.Mark, IfID: c.Policy.IfID, MTU: mtu,
		}))
	}
	var gone []string
	if !a.st.db.Stale() {
		ended := a.st.outlived()
		if !a.st.planner.Followed() {
			ended = maps.Keys(a.st.last)
		}
		for id := range ended {
			_, lingers := a.st.lingering[id]
			_, remembered := a.st.last[id]
			if _, there := a.st.db.Policy(id.Policy); remembered && !there && !lingers {
				a.st.lastsNoMore(id)
				gone = append(gone, mtuID(id))
			}
		}
		a.st.ended = nil
	}
	if a.cfg.Mode != Enforce {
		return
	}
	if len(entries) > 0 {
		if err := a.journal.Put(entries...); err != nil {
			a.failed("journal can't be written", err)
		}
	}
	if len(gone) > 0 {
		a.unbook(gone...)
	}
}

// nextTimer is how long until something is due without an event, 0 for nothing.
func (a *Agent) nextTimer(now time.Time) time.Duration {
	var due time.Time
	add := func(t time.Time) {
		if !t.IsZero() && (due.IsZero() || t.Before(due)) {
			due = t
		}
	}
	for _, l := range a.st.lingering {
		add(l.until)
	}
	if p := a.st.paused; p != nil {
		add(p.Until)
	}
	if !a.writes() {
		return untilDue(due, now) // the rest is about writing
	}
	for _, t := range a.st.release {
		add(t)
	}
	for k := range a.st.resting {
		if a.st.rests(k, now) {
			add(a.st.fights[k].until)
		}
	}
	for _, w := range a.st.withheld {
		add(w.until)
	}
	if len(a.st.inflight) > 0 {
		add(now.Add(echoPatience))
	}
	add(a.clampsDue(now))
	add(a.lanesDue(now))
	for _, x := range a.st.arrivals {
		add(x.until)
	}
	for k := range a.st.stuck {
		if _, held := a.st.locks[k]; held {
			add(now.Add(stuckRetry))
			break
		}
	}
	return untilDue(due, now)
}

func untilDue(due, now time.Time) time.Duration {
	if due.IsZero() {
		return 0
	}
	return max(due.Sub(now), time.Millisecond)
}
