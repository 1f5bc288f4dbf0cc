package agent

import (
	"iter"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// ways keeps what the kernel has answered for the way of outer packets: to the peers of SAs, and to the other ends of
// tunnels. It is asked again where the answer can have changed:
//
//	a route came, went or changed       those to whose address it leads
//	a link, or an address of it         those that leave by it, or can: the other ways of its routes
//	a rule, a nexthop object, a dump    all
//	a rule of ours                      those to whose address a route of the table leads that it leads to
//	a policy or an SA                   its peers: what PMTU discovery has learnt has no event
//	a full resync                       all, for the same reason
//
// What else changes costs a look into a table. It belongs to the loop.
//
// Of peers there can be as many as policies, most of which share their paths.
type ways struct {
	outers map[routes.Ifindex]*way
	byAddr bart.Table[*way]

	paths   map[plan.Path]*plan.Path     // those that peers have, or had
	pathOut map[routes.Ifindex]plan.Path // what the kernel has answered, without those to which there is no way

	all  bool // every answer may be another one now
	due  []*way
	slow []*way // likewise, of a route that changed: a part of them in each round
	// pressed says that the part is to be small.
	pressed bool
	links   map[routes.Ifindex]bool // those that leave by one of these are due
	addrs   map[netip.Addr]bool     // those from one of these, and from none
	ours    map[ourTable]bool       // those in one of these
	again   map[*way]bool           // the question itself failed
	ahead   *ahead                  // what is asked before the first plan, nil for nothing
	// others are the peers to which the way is another one since the last time, or of which nobody asks any more; none where the next plan is
	// from scratch anyway.
	others  []plan.Peer
	scratch bool

	needs peerNeeds
	// relink says that links came, went or changed since it was worked out which tunnels there are.
	relink bool
	l2tp   map[routes.Ifindex]routes.Encap
}

// ourTable is a table of ours to which a rule came or went.
type ourTable struct {
	family routes.Family
	table  routes.TableID
}

// A way is one question.
type way struct {
	peer  plan.Peer   // of an SA
	outer *plan.Outer // else of a tunnel
	path  *plan.Path  // to a peer, as the kernel has answered: nil where there is none
	next  *way        // to the same address
	oif   routes.Ifindex
	uses  int32 // how many policies, and what lingers of them, need it to a peer
	due   bool  // it is among those that are due
	slow  bool  // likewise, for a part of them in each round
	gone  bool
}

func newWays() *ways {
	return &ways{
		outers: map[routes.Ifindex]*way{}, paths: map[plan.Path]*plan.Path{}, pathOut: map[routes.Ifindex]plan.Path{},
		links: map[routes.Ifindex]bool{}, addrs: map[netip.Addr]bool{}, ours: map[ourTable]bool{}, again: map[*way]bool{},
		needs: newPeerNeeds(), relink: true,
	}
}

// query is how the kernel is asked. It looks up the way to a peer with the SA's own source (xfrm_dst_lookup,
// net/xfrm/xfrm_policy.c), which can lead another way than no source.
func (w *way) query() routes.Query {
	if o := w.outer; o != nil {
		q := routes.Query{Family: o.Family, Dst: o.Dst, Src: o.Src, Mark: o.Mark, Oif: o.Oif}
		if o.Proto == protoUDP {
			// Other protocols than TCP and UDP can't be asked for (rtm_getroute_parse_ip_proto,
			// net/ipv4/netlink.c).
			q.IPProto, q.Sport, q.Dport = o.Proto, o.Sport, o.Dport
		}
		return q
	}
	p := &w.peer
	q := routes.Query{Family: routes.FamilyOf(p.Addr), Dst: p.Addr, Mark: p.Mark.Value & p.Mark.Mask}
	if p.Src.IsValid() && !p.Src.IsUnspecified() {
		q.Src = p.Src
	}
	return q
}

func (w *way) dst() netip.Prefix {
	addr := w.peer.Addr
	if w.outer != nil {
		addr = w.outer.Dst
	}
	return netip.PrefixFrom(addr, addr.BitLen())
}

func (s *ways) add(w *way) {
	at := w.dst()
	w.next, _ = s.byAddr.Get(at)
	s.byAddr.Insert(at, w)
	s.isDue(w)
}

func (s *ways) remove(w *way) {
	at := w.dst()
	first, _ := s.byAddr.Get(at)
	for link := &first; *link != nil; link = &(*link).next {
		if *link == w {
			*link = w.next
			break
		}
	}
	if first != nil {
		s.byAddr.Insert(at, first)
	} else {
		s.byAddr.Delete(at)
	}
	w.gone = true
	delete(s.again, w)
}

func (s *ways) isDue(w *way) {
	if !w.due {
		w.due = true
		s.due = append(s.due, w)
	}
}

// each yields a way and the others to its address.
func (w *way) each(yield func(*way) bool) {
	for ; w != nil; w = w.next {
		if !yield(w) {
			return
		}
	}
}

// toPeers yields the ways to peers.
func (s *ways) toPeers(yield func(*way) bool) {
	for _, at := range s.byAddr.All() {
		for w := range at.each {
			if w.outer == nil && !yield(w) {
				return
			}
		}
	}
}

// toPeer is the way to a peer, nil if nobody needs it.
func (s *ways) toPeer(peer plan.Peer) *way {
	if !peer.Addr.IsValid() {
		return nil
	}
	at, _ := s.byAddr.Get(netip.PrefixFrom(peer.Addr, peer.Addr.BitLen()))
	for w := range at.each {
		if w.outer == nil && w.peer == peer {
			return w
		}
	}
	return nil
}

var _ plan.Paths = (*ways)(nil)

// Path is the path to a peer.
func (s *ways) Path(peer plan.Peer) (plan.Path, bool) {
	if w := s.toPeer(peer); w != nil && w.path != nil {
		return *w.path, true
	}
	return plan.Path{}, false
}

// All yields the paths to all peers.
func (s *ways) All() iter.Seq2[plan.Peer, plan.Path] {
	return func(yield func(plan.Peer, plan.Path) bool) {
		for w := range s.toPeers {
			if w.path != nil && !yield(w.peer, *w.path) {
				return
			}
		}
	}
}

// changed hears of each change of the routing mirror, and reports whether the kernel is to be asked for one of the ways.
func (s *ways) changed(c routes.Change) bool {
	switch {
	case c.All:
		s.all, s.relink = true, true
	case c.Link != 0:
		s.links[c.Link], s.relink = true, true
	default:
		return s.route(c.Dst, s.isSlow)
	}
	return true
}

// through hears of a rule of ours that came or went. What leaves the table meanwhile, or comes to it, has events of its own.
func (s *ways) through(r *routes.Rule) { s.ours[ourTable{r.Family, r.Table}] = true }

// maxAsks is how many ways are asked for in one round because a route changed: of a default route very many can have. pressingAsks is how
// many while events wait of routes that what is covered takes.
const (
	maxAsks      = 128
	pressingAsks = 16
)

// askSlow asks for a part of those that are due because of a route that changed.
func (s *ways) askSlow(rt routeTable, fib *routes.FIB) {
	most := maxAsks
	if s.pressed {
		most = pressingAsks
	}
	var list []*way
	for len(list) < most && len(s.slow) > 0 {
		last := len(s.slow) - 1
		w := s.slow[last]
		s.slow = s.slow[:last]
		if w.slow && !w.gone {
			list = append(list, w)
		}
		w.slow = false
	}
	askAll(rt, list, func(w *way, a answered) { s.answered(fib, w, a) })
	if len(s.slow) == 0 {
		s.slow = nil
	}
}

// late reports whether some are left that are due.
func (s *ways) late() bool { return len(s.slow) > 0 }

func (s *ways) isSlow(w *way) {
	if !w.slow {
		w.slow = true
		s.slow = append(s.slow, w)
	}
}

// route makes the ways due to whose address a route leads, and reports whether there are some.
func (s *ways) route(dst netip.Prefix, due func(*way)) (some bool) {
	if s.all {
		return true
	}
	if !s.byAddr.OverlapsPrefix(dst) {
		return false
	}
	for _, at := range s.byAddr.Subnets(dst) {
		for w := range at.each {
			due(w)
			some = true
		}
	}
	return some
}

// link hears of a link's event ahead of the mirror. Those that leave by it are due anyway, once it is another one there.
func (s *ways) link(fib *routes.FIB, l *routes.Link) {
	old := fib.Link(l.Index)
	if old == nil || *old == *l {
		return // a new one has no routes yet
	}
	same := *old
	same.MTU, same.MTU6, same.Up, same.Running, same.Backup = l.MTU, l.MTU6, l.Up, l.Running, l.Backup
	same.HardwareAddr, same.PermAddr = l.HardwareAddr, l.PermAddr
	if same != *l {
		s.all = true // such as its VRF or its name, by which rules select
		return
	}
	if old.Up == l.Up && old.Running == l.Running {
		return
	}
	// Of several ways of a route those by links that are down are left out, and nothing is told of the route.
	keys, n := fib.DeviceRoutes(l.Index)
	if len(keys) < n {
		s.all = true
	}
	for _, k := range keys {
		s.route(k.Dst, s.isDue)
	}
}

// addr hears of an address that came or went: the kernel takes no other source, and chooses one.
func (s *ways) addr(a netip.Addr) { s.addrs[a] = true }

// touch makes the ways to an address due.
func (s *ways) touch(addr netip.Addr) {
	if addr.IsValid() {
		s.route(netip.PrefixFrom(addr, addr.BitLen()), s.isDue)
	}
}

// settle brings the questions up to what is needed now, and asks those that are due.
func (s *ways) settle(rt routeTable, st *state) {
	s.others, s.scratch = nil, st.changes.All
	s.need(st)
	if s.relink {
		s.tunnels(st)
	}
	s.gather(st.fib)
	if s.all { // each is asked again
		clear(s.paths)
	}
	s.arrived(st.fib)
	list := slices.DeleteFunc(s.due, func(w *way) bool { return !w.due || w.gone })
	for _, w := range list {
		w.due, w.slow = false, false
	}
	askAll(rt, list, func(w *way, a answered) { s.answered(st.fib, w, a) })
	s.askSlow(rt, st.fib)
	s.due, s.links, s.addrs = nil, emptied(s.links), emptied(s.addrs)
	clear(s.ours)
	s.all, s.relink = false, false
}

// need brings the ways to peers up to who needs them now.
func (s *ways) need(st *state) {
	if s.needs.anew && s.byAddr.Size() == 0 { // as in the end, without counting first
		s.needs.first(st.db, s)
	}
	for peer, by := range s.needs.settle(st, s) {
		s.use(peer, by)
	}
}

// use counts who needs the way to a peer, and asks for one or forgets it.
func (s *ways) use(peer plan.Peer, by int32) {
	w := s.toPeer(peer)
	if w == nil {
		if by > 0 {
			s.add(&way{peer: peer, uses: by})
		}
		return
	}
	if w.uses += by; w.uses <= 0 {
		s.remove(w)
		s.other(peer)
	}
}

func (s *ways) other(peer plan.Peer) {
	if !s.scratch {
		s.others = append(s.others, peer)
	}
}

// tunnels works out which tunnels there are.
func (s *ways) tunnels(st *state) {
	s.l2tp = st.l2tp.encaps(st.fib)
	there := map[routes.Ifindex]bool{}
	for _, o := range plan.OutersOf(st.fib, s.l2tp) {
		there[o.Index] = true
		if have := s.outers[o.Index]; have != nil {
			if *have.outer == o {
				continue
			}
			s.remove(have)
		}
		s.outers[o.Index] = &way{outer: &o}
		s.add(s.outers[o.Index])
	}
	for i, w := range s.outers {
		if !there[i] {
			s.remove(w)
			delete(s.outers, i)
			delete(s.pathOut, i)
		}
	}
}

// gather makes due what hangs on links and addresses, what failed, or all.
func (s *ways) gather(fib *routes.FIB) {
	for w := range s.again {
		s.isDue(w)
	}
	for t := range s.ours {
		for r := range fib.Table(t.family, t.table) {
			s.route(r.Dst, s.isDue)
		}
	}
	if !s.all && len(s.links)+len(s.addrs) == 0 {
		return
	}
	each := func(w *way) {
		due := s.all || s.links[w.oif]
		if !due && len(s.addrs) > 0 {
			src := w.query().Src
			due = !src.IsValid() || s.addrs[src]
		}
		if due {
			s.isDue(w)
		}
	}
	for w := range s.toPeers {
		each(w)
	}
	for _, w := range s.outers {
		each(w)
	}
}

// answered takes what the kernel has answered.
func (s *ways) answered(fib *routes.FIB, w *way, a answered) {
	path, failed := a.path, a.failed
	if l := fib.Link(path.Oif); l != nil {
		if mtu := l.MTUFor(routes.FamilyOf(w.dst().Addr())); path.MTU == 0 || mtu < path.MTU {
			path.MTU = mtu
		}
	}
	w.oif = path.Oif
	if failed {
		s.again[w] = true
	} else {
		delete(s.again, w)
	}
	switch {
	case w.outer == nil && path.MTU > 0:
		if w.path == nil || *w.path != path {
			s.other(w.peer)
		}
		shared := s.paths[path]
		if shared == nil {
			one := path // path itself stays on the stack
			shared = &one
			s.paths[path] = shared
		}
		w.path = shared
	case w.outer == nil:
		if w.path != nil {
			s.other(w.peer)
		}
		w.path = nil
	case path.MTU > 0:
		s.pathOut[w.outer.Index] = path
	default:
		delete(s.pathOut, w.outer.Index)
	}
}

// noteXFRM hears of an event of a policy or an SA ahead of the mirror.
func (s *ways) noteXFRM(db *xfrmwatch.DB, ev xfrmwatch.Event) {
	sa := func(k xfrmwatch.SAKey) {
		if sa, ok := db.SA(k); ok {
			s.touch(sa.Dst)
			s.needs.noteSA(db, sa)
		}
	}
	switch ev := ev.(type) {
	case xfrmwatch.SASet:
		if ev.Dumped { // it counts when the dump ends
			return
		}
		sa(ev.SA.Key)
		larval := ev.SA.Key // whose place it can take
		larval.SPI = 0
		sa(larval)
		s.touch(ev.SA.Dst)
		s.needs.noteSA(db, ev.SA)
	case xfrmwatch.SAGone:
		sa(ev.Key)
	case xfrmwatch.SADying:
		sa(ev.Key)
	case xfrmwatch.PolicySet:
		if ev.Dumped {
			return
		}
		s.needs.notePolicy(db, ev.Policy.Index)
		for _, t := range ev.Policy.Templates {
			s.touch(t.Dst)
		}
	case xfrmwatch.PolicyGone:
		s.needs.notePolicy(db, ev.Index)
	case xfrmwatch.ResyncEnd:
		s.needs.anew, s.all = true, true
	}
}
