package plan

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"tsoagent/ethtool"
	"tsoagent/routes"
)

// HoldKey names a hold.
type HoldKey struct {
	Index   ethtool.Ifindex
	Feature ethtool.Feature
}

// HoldClaim says that we switched a feature off: on which device, and what was wanted before.
type HoldClaim struct {
	Device ethtool.Device `json:"device"`
	// PermAddr and Address tell the device from another one that got its index and name.
	PermAddr string `json:"perm_addr,omitempty"`
	// NIC says that the device outlives its namespace, and is known by PermAddr in another one.
	NIC bool `json:"nic,omitempty"`
	Was bool `json:"was"`
}

// Held is what we have in place besides our tables, which the mirror itself shows.
type Held struct {
	Holds map[HoldKey]HoldClaim
	Locks map[routes.Key]LockClaim
}

// Steps are the writes that lead from what is in place to a plan, in the order in which they
// are to be done: clones whose route moved, protection, then what is given back.
type Steps struct {
	// Clones are put into our tables: first those that are there and differ, then throws, then
	// new ones.
	Clones []CloneStep
	// AddRules lead to the tables, after the clones are in them.
	AddRules []routes.Rule
	// DropRules are ours and wanted no more; they go before the clones they lead to.
	DropRules []routes.Rule
	// DropClones are ours and wanted no more.
	DropClones []routes.Route
	// Locks are written in place.
	Locks []Lock
	// Holds are set.
	Holds []Hold
	// Retaken are holds on features that somebody else turned on since.
	Retaken []Hold
	// Unlocks give a route its owner's MTU metric back.
	Unlocks []Unlock
	// Unholds give a feature back.
	Unholds []HoldKey
	// LostLocks and LostHolds are claims on what is no longer ours: it is gone, or somebody
	// else changed it since. Changed says which.
	LostLocks []Lost[routes.Key]
	LostHolds []Lost[HoldKey]
}

// CloneStep puts a clone into the table.
type CloneStep struct {
	Table routes.TableID
	Shape ShapeID
	Clone Clone
	Moved bool // something else of ours is at that destination
	// Old are the routes of ours at the destination that the clone takes the place of without
	// replacing them, as their metric differs. They go right behind it.
	Old []routes.Route
}

// Unlock gives a route its owner's MTU metric back.
type Unlock struct {
	Route routes.Route
	Was   MTUMetric
}

// Lost is a claim on something that is no longer ours.
type Lost[K any] struct {
	Key     K
	Changed bool // somebody else changed it; else it is gone
}

// Empty reports whether there is nothing to do.
func (s *Steps) Empty() bool {
	return len(s.Clones)+len(s.AddRules)+len(s.DropRules)+len(s.DropClones)+len(s.Locks)+
		len(s.Holds)+len(s.Retaken)+len(s.Unlocks)+len(s.Unholds)+len(s.LostLocks)+len(s.LostHolds) == 0
}

// Diff works out the steps. While a mirror is stale, nothing is given back because of what it
// lacks: absence of evidence is no deletion.
func Diff(in Input, pl *Plan, held Held) Steps {
	in.Config = in.Config.WithDefaults()
	stale := in.XFRM.Stale() || in.FIB.Stale()
	var s Steps
	diffTables(&s, in, pl, stale)
	diffLocks(&s, in, pl, held, stale)
	diffHolds(&s, in, pl, held, stale)
	return s
}

type place struct {
	table routes.TableID
	dst   netip.Prefix
}

// ownRoutes yields what is in place in our tables.
func ownRoutes(in Input) iter.Seq[routes.Route] {
	return func(yield func(routes.Route) bool) {
		for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
			for _, id := range in.FIB.Tables(f) {
				if !in.Config.OwnTable(id) {
					continue
				}
				for r := range in.FIB.Table(f, id) {
					if in.Config.OwnRoute(r) && !yield(r) {
						return
					}
				}
			}
		}
	}
}

func diffTables(s *Steps, in Input, pl *Plan, stale bool) {
	rules := ownRules(in.FIB, in.Config)
	if len(pl.Shapes) == 0 { // as where everything is given back
		if stale {
			return
		}
		for _, r := range rules {
			s.DropRules = append(s.DropRules, *r)
		}
		s.DropClones = slices.Collect(ownRoutes(in))
		sortDropped(s.DropClones)
		return
	}
	have := map[place][]routes.Route{}
	for r := range ownRoutes(in) {
		at := place{r.Body.Table, r.Dst}
		have[at] = append(have[at], r)
	}
	want := map[place]bool{}
	same := sameWays{}
	for i := range pl.Shapes {
		sh := &pl.Shapes[i]
		for c := range sh.Clones() {
			at := place{sh.Table, c.Dst}
			want[at] = true
			if step, ok := cloneStep(c, have[at], same); ok {
				step.Table, step.Shape = sh.Table, sh.ID
				s.Clones = append(s.Clones, step)
			}
		}
		rules = addRules(s, rules, sh.Rules)
	}
	slices.SortStableFunc(s.Clones, func(a, b CloneStep) int { return cmp.Compare(a.rank(), b.rank()) })
	if stale {
		return
	}
	for _, r := range rules {
		s.DropRules = append(s.DropRules, *r)
	}
	for at, rs := range have {
		if !want[at] {
			s.DropClones = append(s.DropClones, rs...)
		}
	}
	sortDropped(s.DropClones)
}

// ownRules are the rules of ours that are in place.
func ownRules(fib *routes.FIB, c Config) (rules []*routes.Rule) {
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, r := range fib.Rules(f) {
			if c.OwnRule(r) {
				rules = append(rules, r)
			}
		}
	}
	return rules
}

// addRules adds those that are wanted and not in place, and returns what is left of those in place.
func addRules(s *Steps, have []*routes.Rule, want []routes.Rule) []*routes.Rule {
	for _, r := range want {
		if i := slices.IndexFunc(have, func(o *routes.Rule) bool { return *o == r }); i >= 0 {
			have = slices.Delete(have, i, i+1)
		} else {
			s.AddRules = append(s.AddRules, r)
		}
	}
	return have
}

// sortDropped puts clones before throws: a throw that goes first would uncover what lies above it.
func sortDropped(list []routes.Route) {
	slices.SortFunc(list, func(a, b routes.Route) int {
		x, y := a.Body, b.Body
		if x.Type != y.Type || x.Family != y.Family || x.Table != y.Table {
			return cmp.Or(cmp.Compare(x.Type, y.Type), cmp.Compare(x.Family, y.Family), cmp.Compare(x.Table, y.Table))
		}
		if c := routes.ComparePrefix(a.Dst, b.Dst); c != 0 {
			return c
		}
		return a.Key().Compare(b.Key())
	})
}

// cloneStep is what brings the routes of ours at one destination to what the clone says, false
// if they are that already.
func cloneStep(c Clone, have []routes.Route, same sameWays) (CloneStep, bool) {
	step := CloneStep{Clone: c, Moved: len(have) > 0}
	there := 0
	for _, r := range have {
		switch {
		case c.matches(r.Body, same), c.copied(r.Body, same):
			there++
		case !c.replaces(r.Body):
			step.Old = append(step.Old, r)
		}
	}
	return step, there < 1+len(c.Behind) || len(step.Old) > 0
}

// copied reports whether a route of ours is one of the copies behind the clone.
func (c Clone) copied(b *routes.Body, same sameWays) bool {
	n := int(b.Priority) - copyMetric
	return n >= 0 && n < len(c.Behind) && c.Behind[n].matches(n, b, same)
}

// replaces reports whether the clone, or a copy behind it, when it is written, takes the place of a route of ours.
func (c Clone) replaces(b *routes.Body) bool {
	n := int(b.Priority) - copyMetric
	return b.Priority == c.Metric() || n >= 0 && n < len(c.Behind) && c.Behind[n].replaces(n, b)
}

// Metric is the metric (RTA_PRIORITY) that the clone has in our table: its MTU, and 1 for a
// throw. IPv4 shares one object between all routes with the same nexthop object that agree in
// table, protocol, scope, source and metric, whatever their MTU metrics are (fib_find_info_nh,
// net/ipv4/fib_semantics.c), so clones with different MTUs must differ in it; and a delete
// with metric 0 would match any route (fib_table_delete, net/ipv4/fib_trie.c).
func (c Clone) Metric() uint32 {
	if c.Throw {
		return 1
	}
	return c.MTU.MTU
}

// ranks is how many there are of rank.
const ranks = 3

// rank says which steps go first: what moves, then throws.
func (c CloneStep) rank() int {
	switch {
	case c.Moved:
		return 0
	case c.Clone.Throw:
		return 1
	}
	return 2
}

// sameWays remembers what routes.SameWays said of the bodies that very many routes share.
type sameWays map[[2]*routes.Body]bool

func (s sameWays) are(a, b *routes.Body) bool {
	same, known := s[[2]*routes.Body{a, b}]
	if !known {
		same = routes.SameWays(a, b)
		s[[2]*routes.Body{a, b}] = same
	}
	return same
}

// matches reports whether a route of ours is what the clone is to be.
func (c Clone) matches(b *routes.Body, same sameWays) bool {
	if b.Priority != c.Metric() {
		return false
	}
	if c.Throw {
		return b.Type == routes.Throw
	}
	return b.Type == routes.Unicast && b.NHID == 0 && same.are(b, c.Of.Body) && b.PrefSrc == c.Of.Body.PrefSrc &&
		routes.MTUMetricOf(b) == c.MTU && b.Metrics.AdvMSS == c.AdvMSS
}

func diffLocks(s *Steps, in Input, pl *Plan, held Held, stale bool) {
	wanted := map[routes.Key]bool{}
	for _, l := range pl.Locks {
		k := l.Route.Key()
		wanted[k] = true
		claim, ours := held.Locks[k]
		if !ours || claim.Ours != l.Want || routes.MTUMetricOf(l.Route.Body) != l.Want {
			s.Locks = append(s.Locks, l)
		}
	}
	for k, claim := range held.Locks {
		if !wanted[k] && !stale {
			s.release(in.FIB, k, claim)
		}
	}
	slices.SortFunc(s.LostLocks, func(a, b Lost[routes.Key]) int { return a.Key.Compare(b.Key) })
	slices.SortFunc(s.Unlocks, func(a, b Unlock) int { return a.Route.Key().Compare(b.Route.Key()) })
}

// release ends the claim on a lock that is wanted no more.
func (s *Steps) release(fib *routes.FIB, k routes.Key, claim LockClaim) {
	r, n := fib.Get(k)
	wrote := n > 0 && claim.Wrote(routes.MTUMetricOf(r.Body))
	switch {
	case n == 0:
		s.LostLocks = append(s.LostLocks, Lost[routes.Key]{Key: k})
	case n > 1 && (k.Family == routes.IPv6 || !wrote):
		// The owner has put others beside it. IPv4 replaces the first, but on IPv6 a replace
		// would take a sibling along: the claim is kept until there is one again.
	case !wrote:
		s.LostLocks = append(s.LostLocks, Lost[routes.Key]{Key: k, Changed: true})
	default:
		s.Unlocks = append(s.Unlocks, Unlock{Route: r, Was: claim.Was})
	}
}

func diffHolds(s *Steps, in Input, pl *Plan, held Held, stale bool) {
	wanted := map[HoldKey]bool{}
	for _, h := range pl.Holds {
		k := HoldKey{h.Device.Index, h.Feature}
		wanted[k] = true
		st, ok := in.Features[routes.Ifindex(h.Device.Index)].Get(h.Feature)
		if !ok || !st.Wanted {
			continue // already off: by us, or by somebody else and then not ours to give back
		}
		h.Because = slices.Collect(pl.Causes(&h))
		if _, ours := held.Holds[k]; ours {
			s.Retaken = append(s.Retaken, h)
		} else {
			s.Holds = append(s.Holds, h)
		}
	}
	for k := range held.Holds {
		l := in.FIB.Link(routes.Ifindex(k.Index))
		if wanted[k] || stale || l != nil && in.KeysStale && in.Config.SharedMode(l.Name) != SharedKeep {
			continue
		}
		st, ok := in.Features[routes.Ifindex(k.Index)].Get(k.Feature)
		switch {
		case l == nil:
			s.LostHolds = append(s.LostHolds, Lost[HoldKey]{Key: k})
		case !ok: // not read yet
		case st.Wanted:
			s.LostHolds = append(s.LostHolds, Lost[HoldKey]{Key: k, Changed: true})
		default:
			s.Unholds = append(s.Unholds, k)
		}
	}
	slices.SortFunc(s.LostHolds, func(a, b Lost[HoldKey]) int { return compareHolds(a.Key, b.Key) })
	slices.SortFunc(s.Unholds, compareHolds)
}

func compareHolds(a, b HoldKey) int {
	return cmp.Or(cmp.Compare(a.Index, b.Index), cmp.Compare(a.Feature, b.Feature))
}
