package agent

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// state is what the loop knows. It belongs to the loop alone.
type state struct {
	cfg      *plan.Config // tells what is ours
	db       *xfrmwatch.DB
	fib      *routes.FIB
	features map[routes.Ifindex]*ethtool.Features
	// fresh collects the features of a dump, nil outside of one.
	fresh         map[routes.Ifindex]*ethtool.Features
	featuresStale bool
	keys          sockopt.KeysSet
	keysTrusted   []uint32 // the users whose keys count, when these were told
	keysStale     bool     // they could not be read
	l2tp          l2tpDevices
	forwarding    map[routes.Family]bool
	ways          *ways

	planner   plan.Planner
	changes   plan.Changes // since the last plan
	lingering map[xfrmwatch.CoverageID]lingerer
	lingers   uint64 // counts what came to lingering, and went
	lingerers lingerList
	inherited [2]uint64              // for which version of the policies, and of what lingers, MTUs were handed on
	ended     []xfrmwatch.CoverageID // that linger no more, since the last plan
	last      map[xfrmwatch.CoverageID]int
	lastPeers map[xfrmwatch.PolicyIndex]map[netip.Addr]struct{} // the peers of splits that are among last
	booked    map[xfrmwatch.CoverageID]int                      // those of last that are in the journal
	// adopted are the MTUs that the journal remembers, until the first plan.
	adopted []rememberedMTU
	// unrepaired are the routes that an earlier run has overwritten and not written again, until the first plan.
	unrepaired []lockedRoute
	// tables are the numbers that an earlier run used, nil for none.
	tables *ownTables
	// tablesBooked says that this run has put those of its own into the journal.
	tablesBooked bool

	holds     map[plan.HoldKey]plan.HoldClaim
	heldOn    map[ethtool.Ifindex][]ethtool.Feature // those of holds, by device
	heldCount heldCount
	locks     map[routes.Key]plan.LockClaim
	mtus      map[routes.Ifindex]plan.MTUClaim
	retakes   map[plan.HoldKey]int
	unsure    map[plan.HoldKey]bool // holds that may be in place: it could not be read back
	// unheard is when features of devices were written of which no event has told yet.
	unheard   map[ethtool.Ifindex]time.Time
	contested map[plan.HoldKey]string
	refused   map[plan.HoldKey]string
	release   map[plan.HoldKey]time.Time     // when a hold that is wanted no more is given back
	flaps     map[ethtool.Ifindex]flap       // how long that waits
	fights    map[routes.Key]fight           // how often a lock was written
	resting   map[routes.Key]bool            // those of fights that came to their bound, and maybe rest no more
	settleAt  time.Time                      // when fights are looked through again
	placed    map[plan.ShapeID]fight         // how often rules were added
	deleted   map[routes.Rule]time.Time      // when somebody else deleted a rule of ours, until it is added again or that is long ago
	stuck     map[routes.Key]int             // how often a lock could not be given back
	cloned    map[clonePlace]clonedAt        // what was written last into our tables, and how often
	withheld  map[plan.ShapeID]withheldShape // shapes that the kernel's lookup refuted
	sources   map[plan.ShapeID]shapeSource   // of the flows that the kernel is asked about

	// writing are the in-place writes whose notification has not come back yet.
	writing map[routes.Key]*write
	// inflight are the sequence numbers of our route writes that the watcher has not seen yet, but for those that the mirror has already,
	// which are ahead.
	inflight map[uint32]struct{}
	own      ownWrites
	patience time.Time // until when they are waited for
	wrote    time.Time // when the first step came after the writes, zero for not yet
	dumping  bool      // between a ResyncBegin and its end

	causes  triggers
	touched bool // something that is no matter of course happened to routes since the last round

	paused *api.Paused // nil for none. What it points to never changes: reports have it
	orders []order     // that came since the last round
	obeyed []order     // that are in force at its end

	clamps      clampState
	lanes       laneState
	mtusAdopted []deviceMTU             // until the first plan
	doubtful    map[routes.Ifindex]bool // links that are to be read anew
	mtusGiven   int                     // how many devices got their MTU back

	moved    map[string]*movedDevice       // devices that left with changes of ours, by the journal's ID
	left     map[routes.Ifindex]leftDevice // devices that left of late
	arrivals []arrival                     // claims on devices that were moved here
	taken    int                           // features that were taken over with such devices
	nics     bool                          // a NIC came, went or changed
	names    map[routes.Ifindex]string     // of all links, nil if one has changed; is not changed once it is made
	// missed are the devices that went while no agent ran, in words, missedHolds their features.
	missed      []string
	missedHolds int
}

type lingerer struct {
	cov   xfrmwatch.Coverage
	until time.Time
}

type flap struct {
	delay time.Duration
	last  time.Time
}

type fight struct {
	since time.Time
	n     int
	until time.Time // no more writes before this
}

// clonePlace is a destination in a table of ours.
type clonePlace struct {
	table routes.TableID
	dst   netip.Prefix
}

type clonedAt struct {
	fight
	body   *routes.Body // of the route that was cloned, nil for a throw
	mtu    plan.MTUMetric
	throw  bool
	behind []plan.Copy
}

type withheldShape struct {
	why   string
	until time.Time
	// of is the route whose clone took a packet another way, the zero value for none.
	of routes.Route
}

// write is an in-place lock under way. There is no compare-and-swap in rtnetlink: what the
// owner did between the version that we started from and our write is seen only in the order
// of the events, the owner's first, then the echo of ours.
type write struct {
	seq   uint32
	want  plan.MTUMetric
	back  bool          // it gives the route back: no claim is left
	owner *routes.Route // the owner's version that our write has overwritten, nil for none
}

func newState(cfg *plan.Config) *state {
	s := &state{
		cfg:           cfg,
		db:            xfrmwatch.NewDB(),
		fib:           routes.NewFIB(),
		features:      map[routes.Ifindex]*ethtool.Features{},
		featuresStale: true,
		forwarding:    map[routes.Family]bool{},
		ways:          newWays(),
		lingering:     map[xfrmwatch.CoverageID]lingerer{},
		last:          map[xfrmwatch.CoverageID]int{},
		lastPeers:     map[xfrmwatch.PolicyIndex]map[netip.Addr]struct{}{},
		booked:        map[xfrmwatch.CoverageID]int{},
		holds:         map[plan.HoldKey]plan.HoldClaim{},
		heldOn:        map[ethtool.Ifindex][]ethtool.Feature{},
		locks:         map[routes.Key]plan.LockClaim{},
		mtus:          map[routes.Ifindex]plan.MTUClaim{},
		doubtful:      map[routes.Ifindex]bool{},
		lanes:         newLaneState(),
		moved:         map[string]*movedDevice{},
		left:          map[routes.Ifindex]leftDevice{},
		retakes:       map[plan.HoldKey]int{},
		unsure:        map[plan.HoldKey]bool{}, unheard: map[ethtool.Ifindex]time.Time{},
		contested: map[plan.HoldKey]string{},
		refused:   map[plan.HoldKey]string{},
		release:   map[plan.HoldKey]time.Time{},
		flaps:     map[ethtool.Ifindex]flap{},
		fights:    map[routes.Key]fight{},
		resting:   map[routes.Key]bool{},
		placed:    map[plan.ShapeID]fight{},
		stuck:     map[routes.Key]int{},
		deleted:   map[routes.Rule]time.Time{},
		cloned:    map[clonePlace]clonedAt{},
		withheld:  map[plan.ShapeID]withheldShape{},
		sources:   map[plan.ShapeID]shapeSource{},
		writing:   map[routes.Key]*write{},
		inflight:  map[uint32]struct{}{},
	}
	s.fib.OnChange(s.changed)
	s.db.OnChange(s.changedXFRM)
	return s
}

// changed hears of each change of the routing mirror.
func (s *state) changed(c routes.Change) {
	if c.Link != 0 || c.All {
		s.names = nil
	}
	if c.Rule != nil && s.cfg.OwnRule(c.Rule) {
		s.ways.through(c.Rule)
	} else if s.ways.changed(c) {
		s.touched = true
	}
	s.changedSources(c)
	if !s.planner.Far(c) {
		s.touched = true
		s.changes.Route(s.cfg, c)
	}
}

// changedSources forgets the sources that a change can concern: those whose way back may be another one, and where more than routes
// changed all.
func (s *state) changedSources(c routes.Change) {
	if !c.Dst.IsValid() {
		clear(s.sources)
		return
	}
	for id, x := range s.sources {
		if c.Dst.Contains(x.src) {
			delete(s.sources, id)
		}
	}
}

// changedXFRM hears of each change of the mirror of policies and SAs.
func (s *state) changedXFRM(c xfrmwatch.Change) {
	switch {
	case s.changes.All:
	case c.All:
		s.changes = plan.Changes{All: true}
	case c.Policy != 0:
		s.changes.Policies = append(s.changes.Policies, c.Policy)
	default:
		s.changes.SAs = append(s.changes.SAs, c.SA)
	}
}

// claim notes that a route's lock is ours, with what it was, or with nil that it is no more.
func (s *state) claim(k routes.Key, c *plan.LockClaim) {
	if c == nil {
		delete(s.locks, k)
	} else {
		s.locks[k] = *c
	}
	s.changes.Dsts = append(s.changes.Dsts, k.Dst)
}

// wereDeleted reports whether somebody has deleted one of the rules, and forgets it. Those of a shape also come and go with the plan, which is nobody's
// doing.
func (s *state) wereDeleted(rules []routes.Rule) (some bool) {
	for _, r := range rules {
		if _, was := s.deleted[r]; was {
			delete(s.deleted, r)
			some = true
		}
	}
	return some
}

// hold notes a hold that is ours.
func (s *state) hold(k plan.HoldKey, c plan.HoldClaim) {
	if _, had := s.holds[k]; !had {
		s.heldOn[k.Index] = append(s.heldOn[k.Index], k.Feature)
		s.heldCount.known = false
	}
	s.holds[k] = c
	s.changes.Devices = true
}

// unhold notes that a hold is not ours any more.
func (s *state) unhold(k plan.HoldKey) {
	delete(s.holds, k)
	s.heldCount.known = false
	s.changes.Devices = true
	list := slices.DeleteFunc(s.heldOn[k.Index], func(f ethtool.Feature) bool { return f == k.Feature })
	if s.heldOn[k.Index] = list; len(list) == 0 {
		delete(s.heldOn, k.Index)
	}
}

// holdsOn are the holds on one device. They can be dropped meanwhile.
func (s *state) holdsOn(i routes.Ifindex) []plan.HoldKey {
	list := s.heldOn[ethtool.Ifindex(i)]
	if len(list) == 0 {
		return nil
	}
	out := make([]plan.HoldKey, 0, len(list))
	for _, f := range list {
		out = append(out, plan.HoldKey{Index: ethtool.Ifindex(i), Feature: f})
	}
	return out
}

// ready reports whether all sources have been read once.
func (s *state) ready() bool { return !s.db.Stale() && !s.fib.Stale() && !s.featuresStale }

// applyFeatures takes an event of the ethtool watcher.
func (s *state) applyFeatures(ev ethtool.Event) {
	s.changes.Devices = true
	switch ev := ev.(type) {
	case ethtool.Lost:
		s.featuresStale, s.fresh = true, nil
	case ethtool.ResyncBegin:
		s.fresh = map[routes.Ifindex]*ethtool.Features{}
	case ethtool.ResyncEnd:
		if s.fresh != nil {
			s.features, s.fresh, s.featuresStale = s.fresh, nil, false
		}
	case ethtool.FeaturesSet:
		if s.fresh != nil {
			s.fresh[routes.Ifindex(ev.Features.Index)] = ev.Features
			return
		}
		s.features[routes.Ifindex(ev.Features.Index)] = ev.Features
	case ethtool.Gone:
		delete(s.features, routes.Ifindex(ev.Index))
	}
}

// know takes features that were read from the kernel just now. A dump that is under way may
// have read them earlier.
func (s *state) know(f *ethtool.Features) {
	s.changes.Devices = true
	s.features[routes.Ifindex(f.Index)] = f
	if s.fresh != nil {
		s.fresh[routes.Ifindex(f.Index)] = f
	}
}

// linger keeps the coverages whose policy went away since the last plan, and lets those go
// whose policy is back or whose time is over.
func (s *state) linger(now time.Time, quiet time.Duration) {
	some := len(s.lingering) > 0
	for id, l := range s.lingering {
		_, back := s.db.Policy(id.Policy)
		switch {
		case back:
			s.lingerNoMore(id)
		case s.db.Stale():
			// What a stale mirror lacks proves nothing: the time begins when it is fresh.
			s.lingering[id] = lingerer{l.cov, now.Add(quiet)}
		case !now.Before(l.until):
			s.lingerNoMore(id)
		}
	}
	if some && len(s.lingering) == 0 {
		s.lingering = map[xfrmwatch.CoverageID]lingerer{} // as emptied does
	}
	var came []xfrmwatch.Coverage
	leave := func(index xfrmwatch.PolicyIndex) {
		for c := range s.planner.Coverages(index) {
			if _, there := s.db.Policy(c.ID.Policy); there {
				continue
			}
			if _, known := s.lingering[c.ID]; !known {
				s.lingering[c.ID] = lingerer{c, now.Add(quiet)}
				s.lingers++
				came = append(came, c)
			}
		}
	}
	if s.changes.All {
		leave(0)
	} else {
		for _, index := range s.changes.Policies {
			if _, there := s.db.Policy(index); !there {
				leave(index)
			}
		}
	}
	s.inherit(came)
}

func (s *state) lingerNoMore(id xfrmwatch.CoverageID) {
	delete(s.lingering, id)
	s.lingers++
	if len(s.lingering) == 0 {
		s.lingering, s.lingerers = map[xfrmwatch.CoverageID]lingerer{}, lingerList{of: s.lingers} // a map does not shrink
	}
	s.ended = append(s.ended, id)
}

// lasts keeps the last valid MTU of a coverage.
func (s *state) lasts(id xfrmwatch.CoverageID, mtu int) {
	s.last[id] = mtu
	if !id.Peer.IsValid() {
		return
	}
	if s.lastPeers[id.Policy] == nil {
		s.lastPeers[id.Policy] = map[netip.Addr]struct{}{}
	}
	s.lastPeers[id.Policy][id.Peer] = struct{}{}
}

// lastsNoMore forgets it.
func (s *state) lastsNoMore(id xfrmwatch.CoverageID) {
	delete(s.last, id)
	delete(s.booked, id)
	if delete(s.lastPeers[id.Policy], id.Peer); len(s.lastPeers[id.Policy]) == 0 {
		delete(s.lastPeers, id.Policy)
	}
}

// outlived yields the coverages that linger no more since the last plan, with the peers that their policies had earlier.
func (s *state) outlived() iter.Seq[xfrmwatch.CoverageID] {
	return func(yield func(xfrmwatch.CoverageID) bool) {
		for _, id := range s.ended {
			if !yield(id) {
				return
			}
			if id.Peer.IsValid() {
				continue // the rest of the split ends, too
			}
			for peer := range s.lastPeers[id.Policy] {
				if !yield(xfrmwatch.CoverageID{Policy: id.Policy, Peer: peer}) {
					return
				}
			}
		}
	}
}

// lives reports whether a coverage's policy is there and doesn't only linger.
func (s *state) lives(id xfrmwatch.CoverageID) bool {
	_, gone := s.lingering[id]
	return !gone
}

// inherit hands the last valid MTU of a policy that went away to the one that took its place
// under another index, as a daemon leaves it that deletes and adds. A lock that comes back late
// leaves new flows with a wrong MSS for life. came are those that linger since just now.
func (s *state) inherit(came []xfrmwatch.Coverage) {
	now := [2]uint64{s.db.Version(), s.lingers}
	if len(s.lingering) == 0 || s.inherited == now {
		return
	}
	s.inherited = now
	type same struct {
		sel  xfrmwatch.Selector
		mark xfrmwatch.Mark
		ifID uint32
	}
	gone := map[same]int{}
	for id, l := range s.lingering {
		if mtu := s.last[id]; mtu != 0 {
			gone[same{l.cov.Selector, l.cov.Policy.Mark, l.cov.Policy.IfID}] = mtu
		}
	}
	if len(gone) == 0 {
		return
	}
	take := func(c xfrmwatch.Coverage) {
		if _, has := s.last[c.ID]; has {
			return
		}
		if mtu := gone[same{c.Selector, c.Policy.Mark, c.Policy.IfID}]; mtu != 0 {
			s.lasts(c.ID, mtu)
			s.changes.Policies = append(s.changes.Policies, c.ID.Policy)
		}
	}
	if s.changes.All {
		for c := range s.db.Coverages() {
			take(c)
		}
		return
	}
	for _, l := range came {
		for c := range s.planner.Alike(l) {
			take(c)
		}
	}
	for _, index := range s.changes.Policies {
		if pol, there := s.db.Policy(index); there {
			for _, c := range s.db.Coverage(pol) {
				take(c)
			}
		}
	}
}

// lingerList is what lingers in order, as of a version of it. It is not changed once it is made.
type lingerList struct {
	list []xfrmwatch.Coverage
	of   uint64
}

// lingeringCoverages are those kept, in a stable order.
func (s *state) lingeringCoverages() []xfrmwatch.Coverage {
	if s.lingerers.of == s.lingers && len(s.lingerers.list) == len(s.lingering) {
		return s.lingerers.list
	}
	out := make([]xfrmwatch.Coverage, 0, len(s.lingering))
	for _, l := range s.lingering {
		out = append(out, l.cov)
	}
	slices.SortFunc(out, func(a, b xfrmwatch.Coverage) int {
		return cmp.Or(cmp.Compare(a.Policy.Priority, b.Policy.Priority), cmp.Compare(a.ID.Policy, b.ID.Policy), a.ID.Peer.Compare(b.ID.Peer))
	})
	s.lingerers = lingerList{out, s.lingers}
	return out
}
