package doctor

import (
	"net/netip"
	"slices"

	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// world is what the doctor judges in the tests: one NIC, and what a test adds.
type world struct {
	fib      *routes.FIB
	db       *xfrmwatch.DB
	features map[routes.Ifindex]*ethtool.Features
	forwards bool
	p        Patient
}

const (
	nic    routes.Ifindex = 2
	bond   routes.Ifindex = 3
	port   routes.Ifindex = 4
	tunnel routes.Ifindex = 5
	xfrmi  routes.Ifindex = 6
)

var (
	on    = ethtool.State{Active: true, Wanted: true, Changeable: true}
	off   = ethtool.State{Changeable: true}
	fixed = ethtool.State{}
)

func newWorld() *world {
	w := &world{fib: routes.NewFIB(), db: xfrmwatch.NewDB(), features: map[routes.Ifindex]*ethtool.Features{}}
	w.fib.Apply(routes.ResyncBegin{})
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		w.rule(routes.Rule{Family: f, Priority: 0, Table: routes.TableLocal, Protocol: routes.ProtoKernel})
		w.rule(routes.Rule{Family: f, Priority: 32766, Table: routes.TableMain, Protocol: routes.ProtoKernel})
	}
	w.link(&routes.Link{Index: 1, Name: "lo", Type: 772, MTU: 65536, Up: true}, nil)
	w.link(&routes.Link{Index: nic, Name: "nic1", Type: 1, MTU: 1500, Up: true, Running: true}, nil)
	w.route(routes.TableMain, "0.0.0.0/0", nic, 0, routes.ProtoStatic)
	w.route(routes.TableMain, "::/0", nic, 0, routes.ProtoStatic)
	w.fib.Apply(routes.ResyncEnd{})
	w.db.Apply(xfrmwatch.ResyncBegin{})
	w.db.Apply(xfrmwatch.ResyncEnd{})
	return w
}

func (w *world) link(l *routes.Link, features map[ethtool.Feature]ethtool.State) {
	w.fib.Apply(routes.LinkSet{Link: l})
	all := map[ethtool.Feature]ethtool.State{ethtool.TCPSegmentation: on, ethtool.TCP6Segmentation: on, "tx-scatter-gather": on}
	for f, s := range features {
		all[f] = s
	}
	w.features[l.Index] = ethtool.NewFeatures(ethtool.Ifindex(l.Index), l.Name, all)
}

func (w *world) rule(r routes.Rule) {
	r.Action, r.SuppressPrefixLen, r.SuppressIfgroup = routes.RuleToTable, -1, -1
	w.fib.Apply(routes.RuleSet{Rule: &r})
}

func (w *world) route(table routes.TableID, dst string, oif routes.Ifindex, mtu uint32, proto routes.Protocol) {
	w.routeWith(table, dst, oif, routes.Metrics{MTU: mtu}, proto)
}

// setRoute is a route of somebody's who sets metrics.
func (w *world) setRoute(table routes.TableID, dst string, oif routes.Ifindex, m routes.Metrics) {
	w.routeWith(table, dst, oif, m, routes.ProtoStatic)
}

func (w *world) routeWith(table routes.TableID, dst string, oif routes.Ifindex, m routes.Metrics, proto routes.Protocol) {
	p := netip.MustParsePrefix(dst)
	b := routes.Body{
		Family: routes.FamilyOf(p.Addr()), Table: table, Type: routes.Unicast, Protocol: proto,
		Nexthops: []routes.Nexthop{{Oif: oif}}, Metrics: m,
	}
	w.fib.Apply(routes.RouteSet{Route: routes.Route{Dst: p, Body: routes.NewBody(b)}, Append: true})
}

// policy is one with an ESP tunnel between documentation addresses, and sa an SA with GCM for it: 1446 of 1500, or 1426 with IPv6 outside.
func (w *world) policy(index int, src, dst string, ifID uint32) {
	s, d := netip.MustParsePrefix(src), netip.MustParsePrefix(dst)
	outer := ends(d.Addr().Is6())
	w.db.Apply(xfrmwatch.PolicySet{Policy: &xfrmwatch.Policy{
		Index: xfrmwatch.PolicyIndex(index), Dir: xfrmwatch.Out, Priority: 100, IfID: ifID,
		Selector: xfrmwatch.Selector{Family: family(d.Addr()), Src: s, Dst: d},
		Templates: []xfrmwatch.Template{{
			Src: outer[0], Dst: outer[1], Family: family(outer[0]), Proto: xfrmwatch.ESP, Mode: xfrmwatch.Tunnel,
		}},
	}})
}

func (w *world) sa(spi int, v6 bool, change func(*xfrmwatch.SA)) {
	outer := ends(v6)
	s := &xfrmwatch.SA{
		Src: outer[0], Dst: outer[1], SPI: xfrmwatch.SPI(spi), Proto: xfrmwatch.ESP, Family: family(outer[0]), Mode: xfrmwatch.Tunnel,
		AEAD: xfrmwatch.Algorithm{Name: "rfc4106(gcm(aes))", ICVBits: 128}, AddTime: uint64(1000 + spi),
	}
	if change != nil {
		change(s)
	}
	s.Key = xfrmwatch.SAKey{Dst: s.Dst, SPI: s.SPI, Proto: s.Proto}
	w.db.Apply(xfrmwatch.SASet{SA: s})
}

func ends(v6 bool) [2]netip.Addr {
	if v6 {
		return [2]netip.Addr{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")}
	}
	return [2]netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}
}

func family(a netip.Addr) xfrmwatch.Family { return xfrmwatch.Family(routes.FamilyOf(a)) }

// patient is what is known of the world, with a plan.
func (w *world) patient() *Patient {
	p := w.p
	peers := plan.PathsTo{}
	in := plan.Input{
		Config: plan.Config{}.WithDefaults(), XFRM: w.db, FIB: w.fib, Features: w.features, Holds: map[plan.HoldKey]plan.HoldClaim{},
		Peers: peers, Outers: map[routes.Ifindex]plan.Path{}, Forwarding: map[routes.Family]bool{routes.IPv4: w.forwards, routes.IPv6: w.forwards},
	}
	if p.Input.Holds != nil {
		in.Holds = p.Input.Holds
	}
	for _, peer := range plan.PeersOf(slices.Collect(w.db.Coverages())...) {
		peers[peer] = plan.Path{MTU: 1500, Oif: nic, Table: routes.TableMain}
	}
	for _, o := range plan.OutersOf(w.fib, nil) {
		in.Outers[o.Index] = plan.Path{MTU: 1500, Oif: nic, Table: routes.TableMain, Src: o.Src}
	}
	p.Looked, p.Input, p.Plan, p.Now = true, in, plan.Make(in), 2000
	if p.SourceLess == nil {
		p.SourceLess = map[xfrmwatch.CoverageID]int{}
		for _, v := range p.Plan.Verdicts {
			p.SourceLess[v.ID] = 1500
		}
	}
	return &p
}
