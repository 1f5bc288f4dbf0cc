package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// coverage is a coverage (xfrmwatch.Coverage) with what the plan works out for it. There are as many as policies.
type coverage struct {
	entry
	split   *split // nil for one that takes all that the policy's selector does
	steps   []xfrmwatch.Step
	units   []*unit // that say something of it
	members *member // the first of them, in the order of its parts
	aside   *aside  // nil for nothing
}

// split is what a coverage has that takes a part of its policy's selector.
type split struct {
	peer netip.Addr
	sel  xfrmwatch.Selector
}

// aside is what few coverages have.
type aside struct {
	held  *Verdict     // what the holds on shared NICs say of it, nil for nothing
	mine  []*unit      // those that speak of it alone
	fills []routes.Key // the routes that it can fill as a whole
	// again is set while it is worked out what its packets that are IPsec already have left, circles
	// once they were found to come to it once more.
	again, circles bool
}

// sel is what the coverage takes.
func (c *coverage) sel() *xfrmwatch.Selector {
	if c.split != nil {
		return &c.split.sel
	}
	return &c.pol.Selector
}

// id identifies the coverage.
func (c *coverage) id() xfrmwatch.CoverageID {
	id := xfrmwatch.CoverageID{Policy: c.pol.Index}
	if c.split != nil {
		id.Peer = c.split.peer
	}
	return id
}

// whole is the coverage as xfrmwatch has it.
func (c *coverage) whole() xfrmwatch.Coverage {
	return xfrmwatch.Coverage{ID: c.id(), Policy: c.pol, Selector: *c.sel(), Maybe: c.maybe, Steps: c.steps, Larval: c.larval}
}

// tunnels reports whether the outer packets have a destination of their own.
func (c *coverage) tunnels() bool {
	return slices.ContainsFunc(c.pol.Templates, func(t xfrmwatch.Template) bool { return !t.TakesFlow() })
}

// besides is where a coverage has what few have.
func (c *coverage) besides() *aside {
	if c.aside == nil {
		c.aside = &aside{}
	}
	return c.aside
}

// fills are the routes that the coverage can fill as a whole.
func (c *coverage) fills() []routes.Key {
	if c.aside == nil {
		return nil
	}
	return c.aside.fills
}

// held is what the holds on shared NICs say of the coverage, nil for nothing.
func (c *coverage) held() *Verdict {
	if c.aside == nil {
		return nil
	}
	return c.aside.held
}

// planner holds one run of Make.
type planner struct {
	Input
	plan   *Plan
	at     *unit // at work
	spare  *unit // for the next that speaks of one coverage alone
	covers []*coverage
	covs   []xfrmwatch.Coverage // of the policy that is looked at
	// partsAt and placings are those of the coverage whose shapes are looked for, and ownRule is Config.OwnRule.
	partsAt  []routes.Part
	placings []placing
	ownRule  func(*routes.Rule) bool
	// seedsAt are those of the member that is looked at.
	seedsAt []netip.Prefix
	trials  map[routes.Key]*trial
	wide    int            // how many coverages without an if_id take every flow to their destinations
	counts  map[uint32]int // of coverages, by if_id
	// What is there to follow changes.
	*follower
	trialsAt   bart.Table[[]routes.Key]
	waysAt     map[netip.Prefix][]*ways
	tunnelDsts bart.Lite // the destinations of tunnels' outer packets
	shapes     []*shaped
	byShape    map[ShapeID]*shaped
	base       unit                                   // what the tunnels say
	held       unit                                   // what the holds say that is no hold's own
	peers      map[xfrmwatch.PolicyIndex][]netip.Addr // of splits, as remembered
	byIfID     map[uint32]*bart.Table[*entry]
	outer      bart.Table[*peerUse] // the destinations of outer packets
	ways       map[uint32][]*ways   // by if_id
	reached    map[Peer]*wayTo      // the ways to those that no template has, without us
	sharedWays map[Path][]*wayTo    // those that there are, or were
	locked     map[routes.Key]bool  // routes that are locked in place
	lockCount  int                  // how many trials have a lock
	tunnels    map[routes.Ifindex]*tunnel
	vtis       []*routes.Link
	based      map[routes.Ifindex]*dedicated // the dedicated carriers, but for those in stacks above others
	carry      map[*coverage][]*dedicated    // by which of them a coverage's flows leave
	wholes     []wholeDevice
	devices    map[routes.Ifindex]*dedicated     // all dedicated carriers
	holds      []Hold                            // of the plan, those of dedicated carriers without their causes
	uppers     []*dedicated                      // those by which others of them send
	senders    map[routes.Ifindex][]*routes.Link // the ports by which a bond, team or bridge sends now
	taken      map[HoldKey]*held
	signed     []*signed
	ports      map[routes.Ifindex][]*routes.Link // those that have a master, by the master
	// What is said of coverages without a valid MTU now, by why that is: that the last one stays, or one is presumed.
	stays, presumed map[xfrmwatch.MTUStatus]*[]string
}

func newPlanner(in Input) *planner {
	if in.Peers == nil {
		in.Peers = PathsTo(nil)
	}
	in.Config = in.Config.WithDefaults()
	p := &planner{
		Input:   in,
		reached: map[Peer]*wayTo{}, sharedWays: map[Path][]*wayTo{},
		plan:    &Plan{},
		byIfID:  map[uint32]*bart.Table[*entry]{},
		trials:  map[routes.Key]*trial{},
		counts:  map[uint32]int{},
		byShape: map[ShapeID]*shaped{},
		base:    unit{phase: phaseTunnels},
		held:    unit{phase: phaseHolds},
		locked:  map[routes.Key]bool{},
		stays:   map[xfrmwatch.MTUStatus]*[]string{}, presumed: map[xfrmwatch.MTUStatus]*[]string{},
	}
	for s := xfrmwatch.MTUKnown; s <= xfrmwatch.MTUUnknownPath; s++ {
		p.stays[s] = &[]string{fmt.Sprintf("%s; the last valid MTU stays", s)}
		p.presumed[s] = &[]string{fmt.Sprintf("%s; presume_mtu %d", s, in.Config.PresumeMTU)}
	}
	return p
}

// Make works out the plan. It is from scratch: what it costs grows with all that is covered.
func Make(in Input) *Plan {
	p := newPlanner(in)
	p.make()
	return p.plan.Complete()
}

func (p *planner) make() {
	p.plan.complete, p.plan.counts = p.complete, p
	p.collect()
	p.readPaths()
	p.findTunnels()
	if p.Config.MTU != MTUOff {
		p.setDevices()
		p.lockInPlace()
		switch p.Config.Partial {
		case PartialTable:
			p.shape()
		case PartialClamp:
			p.clamp()
		default:
			p.notePartial()
		}
	}
	p.findCarriers()
	p.concludeHolds()
}

// way is what applies to what leaves by a route besides the policies without an if_id. The zero
// value is nothing else.
type way struct {
	ifID   uint32       // of its xfrm interface
	vti    *routes.Link // its vti, whose policies are those with its okey as mark
	tunnel *tunnel      // its dedicated tunnel, or the first of several, all of whose packets are covered
}

// drops says that what no policy takes is dropped (xfrmi_xmit2, net/xfrm/xfrm_interface_core.c;
// vti_xmit, net/ipv4/ip_vti.c).
func (w way) drops() bool { return w.ifID != 0 || w.vti != nil }

// domain is the way of a route. It is false where the nexthops differ in that, or where what
// applies isn't known.
func (p *planner) domain(b *routes.Body) (way, bool) {
	var w way
	for i, nh := range b.Nexthops {
		var one way
		l := p.FIB.Link(nh.Oif)
		switch {
		case l == nil:
			return way{}, false
		case nh.Encap:
			if l.Kind != "xfrm" || !l.External || nh.IfID == 0 || l.ParentElsewhere {
				return way{}, false
			}
			one.ifID = nh.IfID
		case l.Kind == "xfrm" && (l.External || l.ParentElsewhere), l.Encap.LinkElsewhere:
			// One that was moved here has its policies in the namespace that it was made in.
			return way{}, false
		case l.Kind == "xfrm":
			one.ifID = l.IfID
		case l.Kind == "vti", l.Kind == "vti6":
			one.vti = l
		default:
			if t := p.tunnels[l.Index]; t != nil && len(t.covs) > 0 {
				one.tunnel = t
			}
		}
		switch {
		case i == 0:
			w = one
		case one.tunnel != nil && w.tunnel != nil: // wrapsAt looks at each of them
		case one != w:
			return way{}, false
		}
	}
	return w, len(b.Nexthops) > 0
}

// owner is the MTU metric that the route's owner set: what it was before our lock, if the lock
// is ours.
func (p *planner) owner(r routes.Route) MTUMetric {
	have := routes.MTUMetricOf(r.Body)
	if c, ok := p.Locks[r.Key()]; ok && c.Wrote(have) {
		return c.Was
	}
	return have
}

// pathMTU is linkMTU, and what a dedicated tunnel leaves to what it wraps: a route has one lock for
// both. It is 0 if one of them isn't known.
func (p *planner) pathMTU(r routes.Route) int {
	mtu := p.linkMTU(r)
	for _, nh := range r.Body.Nexthops {
		if t := p.tunnels[nh.Oif]; t != nil && len(t.covs) > 0 {
			left, _ := p.wraps(t)
			mtu = min(mtu, left)
		}
	}
	return mtu
}

// linkMTU is the MTU of a route without our lock, in bytes: the smallest of its devices' and
// its owner's metric. It is 0 if a device is not known.
func (p *planner) linkMTU(r routes.Route) int {
	mtu := 0
	for _, nh := range r.Body.Nexthops {
		l := p.FIB.Link(nh.Oif)
		if l == nil {
			return 0
		}
		if m := p.ownMTU(l, r.Body.Family); mtu == 0 || m < mtu {
			mtu = m
		}
	}
	if own := int(p.owner(r).MTU); own != 0 {
		mtu = min(mtu, own)
	}
	return mtu
}

// anyRoute is an MTU that no route's is larger than, in bytes.
const anyRoute = 1 << 16

// mtuAt is the MTU to lock for a coverage on a route, 0 for none, with the reason. path is what the
// route has in bytes: its linkMTU for flows of the coverage alone, as those that a policy takes in
// tunnel mode leave by the way to its peer, past the device of their own route (KERNEL.md 64); the
// pathMTU where others have to share the lock.
func (p *planner) mtuAt(c *coverage, path int, f routes.Family) (int, string) {
	if path == 0 {
		return 0, "a device of the route, or what a tunnel leaves to it, is not known yet"
	}
	mtu, status := c.whole().MTU(p.peerMTU, path)
	if status != xfrmwatch.MTUKnown {
		switch {
		case p.Last[c.id()] != 0:
			mtu = min(p.Last[c.id()], path)
			p.noteShared(c, p.stays[status])
		case p.Config.PresumeMTU != 0 && !c.maybe:
			mtu = min(p.Config.PresumeMTU, path)
			p.noteShared(c, p.presumed[status])
		default:
			return 0, cmp.Or(p.lost(c), status.String())
		}
	} else if c.tunnels() {
		// A smaller MTU of the route itself is not the coverage's: other routes can have a larger one.
		p.sayValid(c)
	}
	p.left(c, mtu)
	switch {
	case !c.tunnels():
		// The bundle's path would be the locked route, and its cost be taken twice: 1430 in place
		// of 1466 for AES-GCM on a link of 1500.
		return 0, "transport mode: the ESP packets use the route themselves, and the kernel gives each socket what is left"
	case mtu >= path:
		return 0, fmt.Sprintf("the route's own MTU %d leaves room already", path)
	case mtu < lowestMTU(f):
		return 0, fmt.Sprintf("the inner MTU %d is below what %s allows", mtu, f)
	}
	return mtu, ""
}

// peerMTU is the MTU of an SA's outer packets, in bytes, and whether it is known: that of the way to
// the peer, and what a dedicated tunnel there leaves.
func (p *planner) peerMTU(sa *xfrmwatch.SA) (int, bool) {
	left, _ := p.toPeer(sa)
	return left, left != 0
}

// toPeer is the same, or why it isn't known though there is a way.
func (p *planner) toPeer(sa *xfrmwatch.SA) (int, string) {
	peer := PeerOf(sa)
	w := p.wayTo(peer)
	return p.through(w.ways, w.path.MTU, func() []espPackets { return []espPackets{espOf(sa)} })
}

// lost says why the MTU on the way to a coverage's peers isn't known though there is a way, or is
// empty.
func (p *planner) lost(c *coverage) string {
	for _, st := range c.steps {
		for _, sa := range st.SAs {
			if st.Template.Mode == xfrmwatch.Transport {
				continue
			}
			if _, why := p.toPeer(sa); why != "" {
				return fmt.Sprintf("the way to %s: %s", sa.Dst, why)
			}
		}
	}
	return ""
}

func (p *planner) metric(mtu int) MTUMetric {
	return MTUMetric{MTU: uint32(mtu), Locked: p.Config.MTU == MTULock}
}
