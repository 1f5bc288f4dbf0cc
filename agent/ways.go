package agent

import (
	"errors"
	"maps"
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
//	a policy or an SA                   its peers: what PMTU discovery has learnt has no event
//	a full resync                       all, for the same reason
//
// What else changes costs a look into a table. It belongs to the loop.
type ways struct {
	peers  map[plan.Peer]*way
	outers map[routes.Ifindex]*way
	byAddr bart.Table[[]*way]

	// What the kernel has answered, without those to whom there is no way.
	pathTo  map[plan.Peer]plan.Path
	pathOut map[routes.Ifindex]plan.Path

	all   bool // every answer may be another one now
	due   map[*way]bool
	links map[routes.Ifindex]bool // those that leave by one of these are due
	addrs map[netip.Addr]bool     // those from one of these, and from none
	again map[*way]bool           // the question itself failed
	// others are the peers to which the way is another one since the last time, or of which nobody asks any more.
	others []plan.Peer

	needs peerNeeds
	// relink says that links came, went or changed since it was worked out which tunnels there are.
	relink bool
	l2tp   map[routes.Ifindex]routes.Encap
}

// A way is one question.
type way struct {
	peer  plan.Peer   // of an SA
	outer *plan.Outer // else of a tunnel
	oif   routes.Ifindex
}

func newWays() *ways {
	return &ways{
		peers: map[plan.Peer]*way{}, outers: map[routes.Ifindex]*way{},
		pathTo: map[plan.Peer]plan.Path{}, pathOut: map[routes.Ifindex]plan.Path{},
		due: map[*way]bool{}, links: map[routes.Ifindex]bool{}, addrs: map[netip.Addr]bool{}, again: map[*way]bool{},
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
	have, _ := s.byAddr.Get(at)
	s.byAddr.Insert(at, append(have, w))
	s.due[w] = true
}

func (s *ways) remove(w *way) {
	at := w.dst()
	have, _ := s.byAddr.Get(at)
	if have = slices.DeleteFunc(have, func(o *way) bool { return o == w }); len(have) > 0 {
		s.byAddr.Insert(at, have)
	} else {
		s.byAddr.Delete(at)
	}
	delete(s.due, w)
	delete(s.again, w)
}

// changed hears of each change of the routing mirror.
func (s *ways) changed(c routes.Change) {
	switch {
	case c.All:
		s.all, s.relink = true, true
	case c.Link != 0:
		s.links[c.Link], s.relink = true, true
	default:
		s.route(c.Dst)
	}
}

// route makes the ways due to whose address a route leads.
func (s *ways) route(dst netip.Prefix) {
	if s.all || !s.byAddr.OverlapsPrefix(dst) {
		return
	}
	for _, list := range s.byAddr.Subnets(dst) {
		for _, w := range list {
			s.due[w] = true
		}
	}
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
		s.route(k.Dst)
	}
}

// addr hears of an address that came or went: the kernel takes no other source, and chooses one.
func (s *ways) addr(a netip.Addr) { s.addrs[a] = true }

// touch makes the ways to an address due.
func (s *ways) touch(addr netip.Addr) {
	if addr.IsValid() {
		s.route(netip.PrefixFrom(addr, addr.BitLen()))
	}
}

// settle brings the questions up to what is needed now, and asks those that are due.
func (s *ways) settle(rt routeTable, st *state) {
	s.others = nil
	came, gone := s.needs.settle(st)
	s.others = append(s.others, gone...)
	for _, p := range gone {
		s.remove(s.peers[p])
		delete(s.peers, p)
		delete(s.pathTo, p)
	}
	for _, p := range came {
		s.peers[p] = &way{peer: p}
		s.add(s.peers[p])
	}
	if s.relink {
		s.tunnels(st)
	}
	s.gather()
	for w := range s.due {
		s.ask(rt, st.fib, w)
	}
	s.due, s.links, s.addrs = emptied(s.due), emptied(s.links), emptied(s.addrs)
	s.all, s.relink = false, false
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
func (s *ways) gather() {
	maps.Copy(s.due, s.again)
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
			s.due[w] = true
		}
	}
	for _, w := range s.peers {
		each(w)
	}
	for _, w := range s.outers {
		each(w)
	}
}

// ask asks the kernel for one way.
func (s *ways) ask(rt routeTable, fib *routes.FIB, w *way) {
	path, failed := pathOf(rt, fib, w.query())
	w.oif = path.Oif
	if failed {
		s.again[w] = true
	} else {
		delete(s.again, w)
	}
	switch {
	case w.outer == nil && path.MTU > 0:
		if had, ok := s.pathTo[w.peer]; !ok || had != path {
			s.others = append(s.others, w.peer)
		}
		s.pathTo[w.peer] = path
	case w.outer == nil:
		if _, had := s.pathTo[w.peer]; had {
			s.others = append(s.others, w.peer)
		}
		delete(s.pathTo, w.peer)
	case path.MTU > 0:
		s.pathOut[w.outer.Index] = path
	default:
		delete(s.pathOut, w.outer.Index)
	}
}

// pathOf is the route that the kernel answers, the zero value if there is none. A source that is
// no address of this host has no answer. failed says that the kernel has not answered.
func pathOf(rt routeTable, fib *routes.FIB, q routes.Query) (path plan.Path, failed bool) {
	ans, err := rt.Lookup(q)
	if err != nil && q.Src.IsValid() {
		failed = !errors.Is(err, routes.ErrUnreachable)
		q.Src = netip.Addr{}
		ans, err = rt.Lookup(q)
	}
	if err != nil {
		return plan.Path{}, failed || !errors.Is(err, routes.ErrUnreachable)
	}
	path = plan.Path{Oif: ans.Oif, Table: ans.Table, Src: ans.PrefSrc}
	if l := fib.Link(ans.Oif); l != nil {
		path.MTU = l.MTUFor(q.Family)
	}
	for _, m := range []uint32{ans.MTU, ans.PMTU} {
		if m != 0 && (path.MTU == 0 || int(m) < path.MTU) {
			path.MTU = int(m)
		}
	}
	return path, failed
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
