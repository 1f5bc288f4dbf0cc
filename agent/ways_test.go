package agent

import (
	stdcmp "cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// sameWays asks for all ways of outer packets from scratch, and compares the answers with what the agent has kept.
func (w *world) sameWays() {
	w.t.Helper()
	st := w.a.st
	peers, outers := map[plan.Peer]plan.Path{}, map[routes.Ifindex]plan.Path{}
	for _, p := range plan.PeersOf(append(slices.Collect(st.db.Coverages()), st.lingeringCoverages()...)...) {
		if path, _ := pathOf(w, st.fib, &way{peer: p}); path.MTU > 0 {
			peers[p] = path
		}
	}
	for _, o := range plan.OutersOf(st.fib, st.l2tp.encaps(st.fib)) {
		if path, _ := pathOf(w, st.fib, &way{outer: &o}); path.MTU > 0 {
			outers[o.Index] = path
		}
	}
	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if d := cmp.Diff(peers, maps.Collect(st.ways.All()), same); d != "" {
		w.t.Errorf("the ways to peers (-asked now +kept):\n%s", d)
	}
	if d := cmp.Diff(outers, st.ways.pathOut, same); d != "" {
		w.t.Errorf("the ways of tunnels (-asked now +kept):\n%s", d)
	}
}

// pathOf asks for one way.
func pathOf(rt asker, fib *routes.FIB, w *way) (path plan.Path, failed bool) {
	askAll(rt, []*way{w}, func(_ *way, a answered) { path, failed = a.path, a.failed })
	if l := fib.Link(path.Oif); l != nil {
		if mtu := l.MTUFor(w.query().Family); path.MTU == 0 || mtu < path.MTU {
			path.MTU = mtu
		}
	}
	return path, failed
}

// The ways of waysWorld: three peers, of which 192.0.2.2 and 203.0.113.9 are reached by nic1 and 2001:db8:9::2 by nic3,
// and two tunnels.
const (
	near, far, six = "192.0.2.2", "203.0.113.9", "2001:db8:9::2"
	gre4, gre6     = "198.51.100.4", "2001:db8:4::6"
	nic3           = 3
)

// waysWorld counts the questions for ways of outer packets.
type waysWorld struct {
	*world
	questions []string
	pmtu      map[string]uint32 // that was learnt, of which nothing is told
}

func newWaysWorld(t *testing.T) *waysWorld {
	w := &waysWorld{tunnelWorld(t, dedicatedOff()), nil, map[string]uint32{}}
	w.addLink(&routes.Link{Index: nic3, Name: "nic3", Type: 1, MTU: 1500, Up: true}, "2001:db8::1/64")
	for _, i := range []int{9, 17, 25, 33, 41} { // locked in place: a rule would have all asked again
		w.addRoute(fmt.Sprintf("10.2.%d.0/24", i), hop{oif: ipsec1})
	}
	w.addRoute("203.0.113.0/24", hop{oif: 2, gw: "192.0.2.254"})
	w.addRoute("198.51.100.0/24", hop{oif: 2, gw: "192.0.2.254"})
	w.addRoute("2001:db8:9::/48", hop{oif: nic3, gw: "2001:db8::fe"})
	w.addRoute("2001:db8:4::/48", hop{oif: nic3, gw: "2001:db8::fe"})
	for i, remote := range []string{gre4, gre6} {
		r := netip.MustParseAddr(remote)
		w.addLink(&routes.Link{
			Index: routes.Ifindex(21 + i), Name: fmt.Sprintf("gre%d", i), Kind: "gre", Type: 778, MTU: 1400, Up: true,
			Encap: routes.Encap{Family: routes.FamilyOf(r), Proto: 47, Remote: r, Header: 24},
		})
	}
	w.queue = nil
	w.lookup = func(q routes.Query) *routes.Answer {
		dst := q.Dst.String()
		if slices.Contains([]string{near, far, six, gre4, gre6}, dst) {
			w.questions = append(w.questions, dst)
		}
		if mtu, learnt := w.pmtu[dst]; learnt {
			return &routes.Answer{Type: routes.Unicast, Table: routes.TableMain, Oif: 2, PMTU: mtu}
		}
		return nil
	}
	w.start(w.towards(9, near), w.keyed(0x100, near), w.towards(17, far), w.keyed(0x200, far), w.towards(25, six), w.keyed(0x300, six))
	w.wantAsked("at the start", near, far, six, gre4, gre6)
	w.settle()
	w.wantAsked("with nothing new")
	return w
}

// towards is a policy by ipsec1 with an SA to a peer, and keyed that SA.
func (w *waysWorld) towards(index int, peer string) xfrmwatch.PolicySet {
	p := policy(index, "0.0.0.0/0", fmt.Sprintf("10.2.%d.0/24", index), 1)
	addr := netip.MustParseAddr(peer)
	t := &p.Policy.Templates[0]
	t.Dst, t.Src, t.Family, t.Reqid = addr, netip.Addr{}, xfrmwatch.Family(routes.FamilyOf(addr)), xfrmwatch.Reqid(index)
	return p
}

func (w *waysWorld) keyed(spi int, peer string) xfrmwatch.SASet {
	s := sa(spi, 1)
	s.SA.Dst = netip.MustParseAddr(peer)
	s.SA.Src = netip.IPv6Unspecified()
	if s.SA.Dst.Is4() {
		s.SA.Src = netip.IPv4Unspecified()
	}
	s.SA.Key.Dst, s.SA.Family = s.SA.Dst, xfrmwatch.Family(routes.FamilyOf(s.SA.Dst))
	s.SA.Reqid = stdcmp.Or(map[string]xfrmwatch.Reqid{near: 9, far: 17, six: 25}[peer], 77)
	return s
}

// wantAsked says for whom the kernel was asked since the last call, as often as it was.
func (w *waysWorld) wantAsked(what string, want ...string) {
	w.t.Helper()
	slices.Sort(w.questions)
	slices.Sort(want)
	if got := strings.Join(w.questions, " "); got != strings.Join(want, " ") {
		w.t.Errorf("%s the kernel was asked for %q, want %q", what, got, want)
	}
	w.questions = nil
}

func (w *waysWorld) mtuTo(peer string) int {
	for p, path := range w.a.st.ways.All() {
		if p.Addr == netip.MustParseAddr(peer) {
			return path.MTU
		}
	}
	return 0
}

func TestKernelIsAskedForWaysOnlyWhenTheyMayBeOthers(t *testing.T) {
	lookupFailed := errors.New("no buffer space")
	for name, c := range map[string]struct {
		do   func(w *waysWorld)
		want []string
	}{
		"a route elsewhere":             {func(w *waysWorld) { w.addRoute("10.9.0.0/16", hop{oif: 2}) }, nil},
		"a route beside":                {func(w *waysWorld) { w.addRoute("203.0.113.128/25", hop{oif: 2}) }, nil},
		"a route of the other family":   {func(w *waysWorld) { w.addRoute("2001:db8:8::/48", hop{oif: nic3}) }, nil},
		"a narrower route":              {func(w *waysWorld) { w.addRoute("203.0.113.8/31", hop{oif: 2}) }, []string{far}},
		"a route replaced":              {func(w *waysWorld) { w.replaceRoute("203.0.113.0/24", hop{oif: 2}) }, []string{far}},
		"a route gone":                  {func(w *waysWorld) { w.deleteRoute("203.0.113.0/24") }, []string{far}},
		"an IPv6 route replaced":        {func(w *waysWorld) { w.replaceRoute("2001:db8:9::/48", hop{oif: 2}) }, []string{six}},
		"a tunnel's route":              {func(w *waysWorld) { w.replaceRoute("198.51.100.0/24", hop{oif: 2}) }, []string{gre4}},
		"an IPv6 tunnel's route":        {func(w *waysWorld) { w.replaceRoute("2001:db8:4::/48", hop{oif: 2}) }, []string{gre6}},
		"the default route":             {func(w *waysWorld) { w.replaceRoute("0.0.0.0/0", hop{oif: nic3}) }, []string{near, far, gre4}},
		"one route, again and again":    {func(w *waysWorld) { w.churn("203.0.113.0/24", 100) }, []string{far}},
		"many routes elsewhere":         {func(w *waysWorld) { w.churn("10.9.0.0/16", 10000) }, nil},
		"a link's mtu":                  {func(w *waysWorld) { w.relink(nic3, func(l *routes.Link) { l.MTU = 1400 }) }, []string{six, gre6}},
		"a link down":                   {func(w *waysWorld) { w.relink(nic3, func(l *routes.Link) { l.Up = false }) }, []string{six, gre6}},
		"a new link":                    {func(w *waysWorld) { w.addLink(&routes.Link{Index: 30, Name: "new", Type: 1, MTU: 1500}) }, nil},
		"a link into a VRF":             {func(w *waysWorld) { w.relink(nic3, func(l *routes.Link) { l.Master = 30 }) }, []string{near, far, six, gre4, gre6}},
		"a tunnel's other end":          {func(w *waysWorld) { w.relink(21, func(l *routes.Link) { l.Encap.Remote = netip.MustParseAddr(far) }) }, []string{near, far, far, six, gre6}},
		"a link by the same names":      {func(w *waysWorld) { w.relink(nic3, func(*routes.Link) {}) }, nil},
		"an address, without a source":  {func(w *waysWorld) { w.address(nic3, "2001:db8::2/64") }, []string{near, far, six, gre4, gre6}},
		"a rule":                        {func(w *waysWorld) { w.rule(100) }, []string{near, far, six, gre4, gre6}},
		"a nexthop object":              {func(w *waysWorld) { w.routing(routes.NexthopSet{Nexthop: &routes.NexthopObject{ID: 1, Oif: 2}}) }, []string{near, far, six, gre4, gre6}},
		"a dump of routes":              {func(w *waysWorld) { w.send(batch{routes: w.dumpRoutes()}) }, []string{near, far, six, gre4, gre6}},
		"an SA changed":                 {func(w *waysWorld) { s := w.keyed(0x100, near); s.Update, s.SA.AddTime = true, 77; w.xfrm(s) }, []string{near}},
		"a rekey":                       {func(w *waysWorld) { w.xfrm(w.keyed(0x301, six)) }, []string{six}},
		"an SA about to expire":         {func(w *waysWorld) { w.xfrm(xfrmwatch.SADying{Key: w.keyed(0x200, far).SA.Key}) }, []string{far}},
		"an SA gone":                    {func(w *waysWorld) { w.xfrm(saGone(w.keyed(0x200, far))) }, []string{far}},
		"a policy changed":              {func(w *waysWorld) { p := w.towards(17, far); p.Policy.Priority = 7; w.xfrm(p) }, []string{far}},
		"a policy without an SA":        {func(w *waysWorld) { w.xfrm(w.towards(33, far)) }, []string{far, far}}, // one has its source from the template
		"a policy gone":                 {func(w *waysWorld) { w.xfrm(gone(w.towards(17, far))) }, nil},
		"a full resync":                 {func(w *waysWorld) { w.a.inbox.post(batch{resync: true}) }, []string{near, far, six, gre4, gre6}},
		"the end of a dump of policies": {func(w *waysWorld) { w.dumpXFRM(w.towards(17, far), w.keyed(0x200, far)) }, []string{near, far, six, gre4, gre6}},
		"a failure, each time": {func(w *waysWorld) {
			w.lookupErr = lookupFailed
			w.replaceRoute("203.0.113.0/24", hop{oif: 2})
			w.settle()
			w.wantAsked("when it fails", far)
			w.lookupErr = nil
			w.addRoute("10.9.0.0/16", hop{oif: 2})
			w.settle()
		}, []string{far}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWaysWorld(t)
			c.do(w)
			w.settle()
			w.wantAsked("after "+name, c.want...)
			w.addRoute("10.10.0.0/16", hop{oif: 2})
			w.settle()
			w.wantAsked("with nothing new after " + name)
			w.lookup = nil
			w.agree()
		})
	}
}

// churn replaces a route, or many in it, at once.
func (w *waysWorld) churn(dst string, n int) {
	p := netip.MustParsePrefix(dst)
	var ev []routes.Event
	for i := range n {
		if n > 100 {
			p = netip.PrefixFrom(numbered(0x0a_09_00_00, i), 32)
		}
		ev = append(ev, routes.RouteSet{Route: newRoute(w.t, p.String(), hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 1+i%250)}), Replace: true})
	}
	w.routing(ev...)
}

func (w *waysWorld) relink(i routes.Ifindex, change func(*routes.Link)) {
	l := *w.kernel.Link(i)
	change(&l)
	w.routing(routes.LinkSet{Link: &l})
}

func (w *waysWorld) address(i routes.Ifindex, p string) {
	w.routing(routes.AddrSet{Addr: routes.Addr{Ifindex: i, Prefix: netip.MustParsePrefix(p)}})
}

func (w *waysWorld) rule(priority uint32) {
	w.routing(routes.RuleSet{Rule: &routes.Rule{
		Family: routes.IPv4, Priority: priority, Action: routes.RuleToTable, Table: routes.TableMain, Src: netip.MustParsePrefix("10.77.0.0/16"),
		SuppressPrefixLen: -1, SuppressIfgroup: -1,
	}})
}

// What PMTU discovery has learnt has no event: it is seen when the policy or the SA changes, and at a resync.
func TestLearntMTUIsSeenWithThePolicyTheSAAndTheResync(t *testing.T) {
	w := newWaysWorld(t)
	w.pmtu[far] = 1300
	w.addRoute("10.9.0.0/16", hop{oif: 2})
	w.settle()
	if got := w.mtuTo(far); got != 1500 {
		t.Errorf("asked without a reason: %d", got)
	}
	for i, touch := range []func(){
		func() { w.xfrm(w.keyed(0x201, far)) },
		func() { p := w.towards(17, far); p.Policy.Priority = 7; w.xfrm(p) },
		func() { w.a.inbox.post(batch{resync: true}) },
	} {
		w.pmtu[far] = uint32(1300 - i)
		touch()
		w.settle()
		if got := w.mtuTo(far); got != 1300-i {
			t.Errorf("touch %d: the mtu to the peer is %d, want %d", i, got, 1300-i)
		}
	}
}

// TestPeersAreThoseOfAllPolicies has policies and SAs come and go in all orders, alone and in batches.
func TestPeersAreThoseOfAllPolicies(t *testing.T) {
	w := newWaysWorld(t)
	w.lookup = nil
	peers := []string{near, far, six}
	wide := func(i, reqid int) xfrmwatch.PolicySet { // in transport mode: a coverage for each SA
		p := policy(i, "0.0.0.0/0", "192.0.0.0/8", 0)
		p.Policy.Templates[0].Mode, p.Policy.Templates[0].Reqid = xfrmwatch.Transport, xfrmwatch.Reqid(reqid)
		p.Policy.Templates[0].Dst, p.Policy.Templates[0].Src = netip.Addr{}, netip.Addr{}
		return p
	}
	var list []xfrmwatch.Event
	for i := range 12 {
		peer := peers[i%len(peers)]
		p := w.towards(100+8*i, peer)
		p.Policy.Templates[0].Reqid = xfrmwatch.Reqid([]int{0, 9, 17, 25}[i%4])
		if i%4 == 0 { // whose SAs no other policy finds
			peer = fmt.Sprintf("192.0.2.%d", 70+i%8)
			p.Policy.Templates[0].Dst = netip.MustParseAddr(peer)
		}
		if i%5 == 4 {
			p = wide(100+8*i, []int{0, 9}[i%2])
		}
		s := w.keyed(0x1000+i, peer)
		s.SA.Mark = xfrmwatch.Mark{}
		s.SA.OutputMark = xfrmwatch.Mark{Value: uint32(i % 2), Mask: 0xff}
		larval := w.keyed(0, peer)
		list = append(list, p, s, xfrmwatch.SADying{Key: s.SA.Key}, larval, w.keyed(0x2000+i, peer), gone(p), saGone(s), p)
	}
	for step := range 400 {
		for range 1 + step%7 {
			w.xfrm(list[(step*31+len(w.queue)*17)%len(list)])
		}
		if step%50 == 49 {
			all := slices.Collect(maps.Values(map[int]xfrmwatch.Event{0: list[step%len(list)], 1: w.towards(9, near)}))
			w.dumpXFRM(all...)
		}
		w.settle()
		if step%10 == 0 {
			w.advance(1200e6)
		}
		if t.Failed() {
			t.Fatalf("at step %d", step)
		}
	}
}
