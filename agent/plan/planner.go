package plan

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"tsoagent/index"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// Planner keeps a plan up to date: what a change can't concern is not looked at again. Its plans equal those
// that Make works out from scratch. The zero value is ready. It is not safe for concurrent use.
type Planner struct {
	p *planner // nil for none yet
	// Anew counts the plans that were worked out from scratch, Followed the others.
	Anew, Follows uint64
	// Part is how many policies and peers are worked out anew at a time for a route that has more inside its destination, 0 for DefaultPart.
	Part     int
	followed bool
}

// Changes are what differs between an input and the one before it. Whatever is not among them is the same.
type Changes struct {
	// All says that anything may differ.
	All bool
	// Dsts are the destinations of routes that came, went or changed, in whatever table, and of those whose
	// lock is or is not ours now.
	Dsts []netip.Prefix
	// Ours are the destinations of routes of ours that came, went or changed in our own tables.
	Ours []netip.Prefix
	// OurRules says that rules of ours came or went.
	OurRules bool
	// Policies came, went, changed or changed places, or their coverages linger or do no more.
	Policies []xfrmwatch.PolicyIndex
	// SAs are where SAs came, went or changed.
	SAs []xfrmwatch.SAPlace
	// Devices says that features, TCP keys, or the holds and who is trusted that count for them, changed.
	Devices bool
	// Peers are those for which the kernel answers something else, or that came or went.
	Peers []Peer
}

// None reports whether nothing differs.
func (ch *Changes) None() bool {
	return !ch.All && !ch.OurRules && !ch.Devices && len(ch.Dsts)+len(ch.Ours)+len(ch.Policies)+len(ch.SAs)+len(ch.Peers) == 0
}

// Route adds a change of the routing mirror.
func (ch *Changes) Route(cfg *Config, c routes.Change) {
	switch {
	case ch.All: // whatever else there is
	case c.Rule != nil && cfg.OwnRule(c.Rule):
		ch.OurRules = true
	case c.Dst.IsValid() && c.Protocol == cfg.Protocol && cfg.OwnTable(c.Table):
		ch.Ours = append(ch.Ours, c.Dst)
	case c.Dst.IsValid():
		ch.Dsts = append(ch.Dsts, c.Dst)
	case !c.Addr: // no plan depends on addresses
		*ch = Changes{All: true}
	}
}

// Plan is the plan for an input that differs in nothing but the changes from the one before it.
func (pl *Planner) Plan(in Input, ch Changes) *Plan {
	in.Config = in.Config.WithDefaults()
	if pl.p != nil && pl.p.follower != nil {
		pl.p.part = pl.part()
	}
	if pl.p != nil && !ch.All && pl.p.follow(in, ch) {
		pl.followed = true
		pl.Follows++
		return pl.p.plan
	}
	pl.p = newPlanner(in)
	pl.p.make()
	pl.p.learn(in)
	pl.followed = false
	pl.Anew++
	return pl.p.plan
}

// follower is what a planner knows besides to follow changes.
type follower struct {
	policies  index.Index[xfrmwatch.PolicyIndex, *entry]
	gone      map[xfrmwatch.CoverageID]*entry
	users     index.Index[Peer, *coverage]
	bySA      index.Index[xfrmwatch.SAPlace, xfrmwatch.PolicyIndex]
	firstRule firstRule
	pending   pending
	common    common
	foreign   map[routes.Family]map[routes.TableID]bool
	touched   map[*coverage]struct{}
	rerouted  []rerouted
	routed    bool // routes changed, near what is covered or not
	// later are regions of routes that changed, which are not followed yet, and part is Planner.Part.
	later []netip.Prefix
	part  int
	// regrouped says that shapes got or lost members since they were put into order.
	regrouped bool
	// indexed says of the dedicated devices above tunnels, and their like, whether their routes are known by their keys:
	// those of a device that has very many are not (routes.FIB), and then none of them is tried.
	indexed map[routes.Ifindex]bool
}

// rerouted is a destination whose ways through xfrm interfaces with an if_id changed.
type rerouted struct {
	ifID uint32
	dst  netip.Prefix
}

// Told yields the coverages of which the newest plan may say something else than the one before it, with their
// inner MTU by valid SAs in bytes, 0 for none. Those that linger are not among them.
func (pl *Planner) Told() iter.Seq2[xfrmwatch.Coverage, int] {
	return func(yield func(xfrmwatch.Coverage, int) bool) {
		p := pl.p
		each := slices.Values(p.covers)
		if pl.followed {
			each = maps.Keys(p.touched)
		}
		for c := range each {
			if !c.gone && !c.dropped && !yield(c.whole(), c.validMTU()) {
				return
			}
		}
	}
}

// Followed reports whether the newest plan was made by what changed.
func (pl *Planner) Followed() bool { return pl.followed }

// Coverages are those of a policy in the newest plan, without what lingers; of all policies for index 0.
func (pl *Planner) Coverages(index xfrmwatch.PolicyIndex) iter.Seq[xfrmwatch.Coverage] {
	return func(yield func(xfrmwatch.Coverage) bool) {
		if pl.p == nil {
			return
		}
		if index != 0 && pl.p.follower != nil {
			for _, e := range pl.p.entriesAt(index) {
				if e.cov != nil && !yield(e.cov.whole()) {
					return
				}
			}
			return
		}
		for _, c := range pl.p.covers {
			if !c.gone && (index == 0 || c.pol.Index == index) && !yield(c.whole()) {
				return
			}
		}
	}
}

// Near reports whether a policy of the newest plan is for a destination that is a route's destination, or in or around it, and whether the route
// decides there: whether none of the policies inside it has a longer route in the table. What happens to one that does not decide is seldom of
// consequence. Those with an if_id that are for all destinations don't count: of the routes they concern but those by their own devices.
func (pl *Planner) Near(table routes.TableID, dst netip.Prefix) (near, decides bool) {
	if pl.p == nil {
		return false, false
	}
	f := routes.FamilyOf(dst.Addr())
	for id, t := range pl.p.byIfID {
		if id != 0 {
			if _, wide := t.Get(f.Any()); wide {
				continue
			}
		}
		if !t.OverlapsPrefix(dst) {
			continue
		}
		near = true
		if _, around := t.LookupPrefix(dst); around {
			return true, true
		}
		n := 0
		for inside := range t.Subnets(dst) {
			if n++; n > fewInside {
				return true, true // which it takes too long to look through
			}
			if m, _ := pl.p.FIB.Cover(f, table, inside); !m.Dst.IsValid() || m.Dst.Bits() <= dst.Bits() {
				return true, true
			}
		}
	}
	return near, false
}

// fewInside is how many policies inside a route's destination are looked at one by one.
const fewInside = 16

// Far reports whether no plan can follow from a change of a route, nor from any other one at its destination as long as the plan stays and that
// leaves as plainly: nothing that is covered is near, no peer, no tunnel's other end and no route that is tried. In a full table nearly all
// are so. A change that is far need not be among those that Plan is told of.
func (pl *Planner) Far(c routes.Change) bool {
	p, dst := pl.p, c.Dst
	if p == nil || p.follower == nil || c.New == nil || p.Config.OwnTable(c.Table) || p.wide+len(p.wholes) > 0 {
		return false
	}
	if p.near(dst) || p.tunnelDsts.OverlapsPrefix(dst) || len(p.foreign[c.Family]) > 0 || len(p.waysAt[dst]) > 0 {
		return false
	}
	return !p.tunnelled(c.New) && !slices.ContainsFunc(c.Old, p.tunnelled)
}

// Alike yields the coverages that have a coverage's selector, mark and if_id, without what lingers.
func (pl *Planner) Alike(o xfrmwatch.Coverage) iter.Seq[xfrmwatch.Coverage] {
	return func(yield func(xfrmwatch.Coverage) bool) {
		if pl.p == nil || pl.p.byIfID[o.Policy.IfID] == nil {
			return
		}
		at, _ := pl.p.byIfID[o.Policy.IfID].Get(o.Selector.Dst)
		for e := range at.each {
			if c := e.cov; c != nil && !c.gone && *c.sel() == o.Selector && c.pol.Mark == o.Policy.Mark && !yield(c.whole()) {
				return
			}
		}
	}
}

// Relook has the next Steps look at everything: what is in place is what another plan wanted.
func (pl *Planner) Relook() {
	if pl.p != nil && pl.p.follower != nil {
		pl.p.pending = pending{all: true}
	}
}

// common is what concerns everything.
type common struct {
	outers     map[routes.Ifindex]Path // as the kernel answered
	l2tp       map[routes.Ifindex]routes.Encap
	withheld   map[ShapeID]string
	forwarding map[routes.Family]bool
	mtus       map[routes.Ifindex]MTUClaim
}

// commonOf copies it, as the caller may change it.
func commonOf(in Input) common {
	return common{maps.Clone(in.Outers), maps.Clone(in.L2TP), maps.Clone(in.Withheld), maps.Clone(in.Forwarding), maps.Clone(in.MTUs)}
}

func (w *common) is(in Input) bool {
	return maps.Equal(in.Outers, w.outers) && maps.Equal(in.L2TP, w.l2tp) && maps.Equal(in.Withheld, w.withheld) &&
		maps.Equal(in.Forwarding, w.forwarding) && maps.Equal(in.MTUs, w.mtus)
}

// learn makes a planner that has a plan ready to follow changes, if that is possible in its world.
func (p *planner) learn(in Input) {
	if !p.regional() {
		return
	}
	f := &follower{
		gone: map[xfrmwatch.CoverageID]*entry{}, firstRule: p.firstRule(),
		pending: pending{all: true}, common: commonOf(in), touched: map[*coverage]struct{}{}, indexed: map[routes.Ifindex]bool{},
	}
	for i, t := range p.tunnels {
		if len(t.covs) > 0 && !t.link.Tunnel() {
			_, f.indexed[i] = p.FIB.LeavingBy(i)
		}
	}
	f.foreign = p.takenTables()
	p.follower = f
	for _, t := range p.byIfID {
		for _, at := range t.All() {
			for e := range at.each {
				f.learn(e)
			}
		}
	}
	for k, t := range p.trials {
		p.indexTrial(k, t)
	}
	if p.ways == nil {
		p.waysOf(0)
	}
	for _, list := range p.ways {
		for _, w := range list {
			for dst := range w.byDst.All() {
				p.indexWay(dst, w)
			}
		}
	}
}

// regional reports whether what a change does stays where destinations overlap: no tunnel's or peer's way
// leads into what is covered again, and nothing is shared by all.
func (p *planner) regional() bool {
	c := &p.Config
	if c.MTU == MTUOff || c.Partial != PartialTable || c.CarrierMTU == CarrierDevice || c.shares() {
		return false
	}
	for peer := range p.Peers.All() {
		if p.nested(peer) {
			return false
		}
	}
	for _, t := range p.tunnels {
		if len(t.over) > 0 {
			continue
		}
		if t.encap.Proto == 0 {
			return false // it depends on the routes by it
		}
		for _, o := range p.outerFlows(t) {
			p.tunnelDsts.Insert(o.dst)
		}
	}
	return true
}

// nested reports whether the way to a peer leads, or may lead, into what policies decide about once more.
func (p *planner) nested(peer Peer) bool {
	return slices.ContainsFunc(p.wayTo(peer).ways, func(nh routes.Nexthop) bool {
		l := p.FIB.Link(nh.Oif)
		return nh.Encap || p.tunnels[nh.Oif] != nil || p.partly(nh.Oif) || l != nil && slices.Contains([]string{"xfrm", "vti", "vti6"}, l.Kind)
	})
}

func (f *follower) learn(e *entry) {
	c := e.cov
	switch {
	case e.gone:
		f.gone[c.id()] = e
	default:
		f.policies.Add(e.pol.Index, e)
	}
	if c == nil {
		return
	}
	for _, peer := range peersIn(c) {
		f.users.Add(peer, c)
	}
	if e.gone {
		return
	}
	for _, at := range saPlaces(c.pol) {
		f.bySA.Add(at, c.pol.Index)
	}
}

func (f *follower) unlearn(e *entry) {
	c := e.cov
	if e.gone {
		delete(f.gone, c.id())
	} else {
		f.policies.Remove(e.pol.Index, e)
	}
	if c == nil {
		return
	}
	for _, peer := range peersIn(c) {
		f.users.Remove(peer, c)
	}
	if e.gone {
		return
	}
	for _, at := range saPlaces(c.pol) {
		f.bySA.Remove(at, c.pol.Index)
	}
}

// entriesAt are the entries of a policy, without those that linger, in order.
func (f *follower) entriesAt(index xfrmwatch.PolicyIndex) []*entry {
	var out []*entry
	for e := range f.policies.Of(index) {
		if e.pol.Index == index {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, (*entry).compare)
	return out
}

func remove[T comparable](list []T, x T) []T {
	if i := slices.Index(list, x); i >= 0 {
		return slices.Delete(list, i, i+1)
	}
	return list
}

// saPlaces are where the SAs are that a policy's templates can use.
func saPlaces(pol *xfrmwatch.Policy) []xfrmwatch.SAPlace {
	var out []xfrmwatch.SAPlace
	for _, t := range pol.Templates {
		at := xfrmwatch.SAPlace{Reqid: t.Reqid}
		if !t.TakesFlow() {
			at.Dst = t.Dst
		}
		if !slices.Contains(out, at) {
			out = append(out, at)
		}
	}
	return out
}

// peersIn are the peers whose paths an answer about a coverage can depend on.
func peersIn(c *coverage) []Peer {
	var out []Peer
	add := func(peer Peer) {
		if !slices.Contains(out, peer) {
			out = append(out, peer)
		}
	}
	for _, st := range c.steps {
		if st.Template.TakesFlow() {
			continue
		}
		for _, sa := range st.SAs {
			add(PeerOf(sa))
		}
	}
	if peer, ok := policyPeer(c.pol); ok && len(c.steps) == 0 {
		add(peer)
	}
	return out
}
