package doctor

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"tsoagent/agent"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

var update = flag.Bool("update", false, "write the golden findings anew")

func gre(mtu int, v6 bool) *routes.Link {
	e := ends(v6)
	return &routes.Link{
		Index: tunnel, Name: "gre1", Kind: "gre", Type: 778, MTU: mtu, Up: true,
		Encap: routes.Encap{Family: routes.FamilyOf(e[0]), Proto: 47, Local: e[0], Remote: e[1], Header: 24},
	}
}

// transport is a policy for what a GRE tunnel sends, with its SA.
func (w *world) transport(v6 bool) {
	e := ends(v6)
	host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	w.db.Apply(xfrmwatch.PolicySet{Policy: &xfrmwatch.Policy{
		Index: 33, Dir: xfrmwatch.Out, Priority: 100,
		Selector:  xfrmwatch.Selector{Family: family(e[0]), Src: host(e[0]), Dst: host(e[1]), Proto: 47},
		Templates: []xfrmwatch.Template{{Family: family(e[0]), Src: unspecified(v6), Dst: unspecified(v6), Proto: xfrmwatch.ESP, Mode: xfrmwatch.Transport}},
	}})
	w.sa(0x300, v6, func(s *xfrmwatch.SA) { s.Mode = xfrmwatch.Transport })
}

func unspecified(v6 bool) netip.Addr {
	if v6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// sick are worlds in which each something is wrong, and healthy ones that look alike.
var sick = []struct {
	name string
	make func(w *world)
	want []Code
}{
	{"nothing", func(*world) {}, nil},

	{"tso off by hand", func(w *world) {
		w.link(&routes.Link{Index: nic, Name: "nic1", Type: 1, MTU: 1500, Up: true}, map[ethtool.Feature]ethtool.State{ethtool.TCPSegmentation: off, ethtool.TCP6Segmentation: off})
		w.p.LostBy = map[string]int{"nic1": 2}
	}, []Code{TSOOff}},
	{"tso off for ipv6 alone", func(w *world) {
		w.link(&routes.Link{Index: nic, Name: "ni'c", Type: 1, MTU: 1500, Up: true}, map[ethtool.Feature]ethtool.State{ethtool.TCP6Segmentation: off})
	}, []Code{TSOOff}},
	{"tso off for want of scatter-gather", func(w *world) {
		lost := ethtool.State{Wanted: true, Changeable: true}
		w.link(&routes.Link{Index: nic, Name: "nic1", Type: 1, MTU: 1500, Up: true}, map[ethtool.Feature]ethtool.State{
			ethtool.TCPSegmentation: lost, ethtool.TCP6Segmentation: lost, "tx-scatter-gather": off,
		})
	}, []Code{TSOOff}},
	{"tso off, and fixed", func(w *world) {
		w.link(&routes.Link{Index: nic, Name: "nic1", Type: 1, MTU: 1500, Up: true}, map[ethtool.Feature]ethtool.State{ethtool.TCPSegmentation: fixed})
	}, nil},
	{"tso off on a device that is down", func(w *world) {
		w.link(&routes.Link{Index: nic, Name: "nic1", Type: 1, MTU: 1500}, map[ethtool.Feature]ethtool.State{ethtool.TCPSegmentation: off})
	}, nil},
	{"tso that is held off", func(w *world) {
		w.link(&routes.Link{Index: nic, Name: "nic1", Type: 1, MTU: 1500, Up: true}, map[ethtool.Feature]ethtool.State{ethtool.TCPSegmentation: off})
		w.p.Input.Holds = map[plan.HoldKey]plan.HoldClaim{{Index: ethtool.Ifindex(nic), Feature: ethtool.TCPSegmentation}: {Was: true}}
	}, nil},
	{"tso off on a carrier of covered flows alone", func(w *world) {
		w.link(&routes.Link{Index: xfrmi, Name: "ipsec1", Kind: "xfrm", Type: 65534, MTU: 1446, Up: true, IfID: 1}, map[ethtool.Feature]ethtool.State{ethtool.TCPSegmentation: off})
		w.route(routes.TableMain, "10.2.0.0/16", xfrmi, 0, routes.ProtoStatic)
		w.policy(17, "0.0.0.0/0", "10.2.0.0/16", 1)
		w.sa(0x100, false, func(s *xfrmwatch.SA) { s.IfID = 1 })
	}, nil},

	{"a clamp to the path mtu", func(w *world) {
		w.forwards = true
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.policy(25, "fd09::/64", "fd03::/32", 0)
		w.sa(0x100, false, nil)
		w.sa(0x200, true, nil)
		w.p.Clamps = []Clamp{
			{Family: "inet", Table: "fw", Chain: "forward", Handle: 4, Hook: "forward"},
			{Family: "ip6", Table: "mangle", Chain: "FORWARD", Handle: 7, Iptables: true, Hook: "forward"},
			{Family: "ip", Table: "fw4", Chain: "out", Handle: 9, MSS: 1460, Hook: "output"},
		}
	}, []Code{ClampInVain, ClampInVain}},
	{"a clamp to a number that is too large", func(w *world) {
		w.forwards = true
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.p.Clamps = []Clamp{{Family: "ip", Table: "fw", Chain: "forward", Handle: 4, MSS: 1460}, {Family: "ip6", Table: "fw", Chain: "forward", MSS: 1460}}
	}, []Code{ClampInVain}},
	{"a clamp to a number that fits", func(w *world) {
		w.forwards = true
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.p.Clamps = []Clamp{{Family: "ip", Table: "fw", Chain: "forward", Handle: 4}, {Family: "ip", Table: "fw", Chain: "forward", MSS: 1406}}
	}, nil},
	{"a clamp to the path mtu, which a lock serves", func(w *world) {
		w.forwards = true
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.p.Clamps = []Clamp{{Family: "ip", Table: "fw", Chain: "forward", Handle: 4}}
		w.p.SourceLess = map[xfrmwatch.CoverageID]int{{Policy: 17}: 1446}
	}, nil},
	{"a clamp where nothing is forwarded", func(w *world) {
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.p.Clamps = []Clamp{{Family: "ip", Table: "fw", Chain: "forward", Handle: 4}}
	}, nil},

	{"an mtu and an mss of strongSwan's that are too large", func(w *world) {
		w.forwards = true
		for _, f := range []struct{ src, dst string }{{"10.9.0.0/24", "10.3.0.0/16"}, {"fd09::/64", "fd03::/32"}} {
			dst := netip.MustParsePrefix(f.dst)
			w.rule(routes.Rule{Family: routes.FamilyOf(dst.Addr()), Priority: 220, Table: 220})
			w.setRoute(220, f.dst, nic, routes.Metrics{MTU: 1480, AdvMSS: 1440})
		}
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.policy(25, "fd09::/64", "fd03::/32", 0)
		w.sa(0x100, false, nil)
		w.sa(0x200, true, nil)
	}, []Code{RouteMTU, RouteMTU, RouteMTU, RouteMTU}},
	{"an mtu of libreswan's that is too small, and one on an interface", func(w *world) {
		w.link(&routes.Link{Index: xfrmi, Name: "ipsec1", Kind: "xfrm", Type: 65534, MTU: 1446, Up: true, IfID: 1}, nil)
		w.setRoute(routes.TableMain, "10.3.0.0/16", nic, routes.Metrics{MTU: 1400})
		w.setRoute(routes.TableMain, "10.2.0.0/16", xfrmi, routes.Metrics{MTU: 1400, AdvMSS: 1300})
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.policy(25, "10.9.0.0/24", "10.2.0.0/16", 1)
		w.sa(0x100, false, nil)
		w.sa(0x200, false, func(s *xfrmwatch.SA) { s.IfID = 1 })
	}, []Code{RouteMTU, RouteMTU, RouteMTU}},
	{"an owner's mtu that is what is left, one behind our lock, one of a wider route, and none of an SA", func(w *world) {
		w.setRoute(routes.TableMain, "10.3.0.0/17", nic, routes.Metrics{MTU: 1446, AdvMSS: 1406})
		w.setRoute(routes.TableMain, "10.3.128.0/17", nic, routes.Metrics{MTU: 1446, Lock: 1 << 2})
		w.setRoute(routes.TableMain, "10.0.0.0/8", nic, routes.Metrics{MTU: 1300})
		w.setRoute(routes.TableMain, "10.4.0.0/16", nic, routes.Metrics{MTU: 1300})
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
	}, nil},

	{"a wide rule ahead of ours", func(w *world) {
		for _, f := range []struct{ src, dst, all string }{{"10.9.0.0/24", "10.3.0.0/16", "0.0.0.0/0"}, {"fd09::/64", "fd03::/32", "::/0"}} {
			src := netip.MustParsePrefix(f.src)
			w.rule(routes.Rule{Family: routes.FamilyOf(src.Addr()), Priority: 32765, Src: src, Dst: netip.MustParsePrefix(f.dst), Table: 5450, Protocol: routes.ProtoTSOAgent})
			w.route(5450, f.dst, nic, 1446, routes.ProtoTSOAgent)
			w.rule(routes.Rule{Family: routes.FamilyOf(src.Addr()), Priority: 100, Table: 77})
			w.route(77, f.all, nic, 0, routes.ProtoStatic)
		}
	}, []Code{LockDefeated, LockDefeated}},
	{"a rule ahead of ours that answers nothing", func(w *world) {
		w.rule(routes.Rule{Family: routes.IPv4, Priority: 32765, Src: netip.MustParsePrefix("10.9.0.0/24"), Table: 5450, Protocol: routes.ProtoTSOAgent})
		w.route(5450, "10.3.0.0/16", nic, 1446, routes.ProtoTSOAgent)
		w.rule(routes.Rule{Family: routes.IPv4, Priority: 100, Table: 77})
		w.route(77, "10.4.0.0/16", nic, 0, routes.ProtoStatic)
		w.route(routes.TableLocal, "10.3.0.9/32", nic, 0, routes.ProtoKernel)
		w.rule(routes.Rule{Family: routes.IPv4, Priority: 101, Src: netip.MustParsePrefix("10.8.0.0/24"), Table: 78})
		w.route(78, "0.0.0.0/0", nic, 0, routes.ProtoStatic)
	}, nil},
	{"a rule that can't be repeated", func(w *world) {
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.policy(25, "10.9.0.0/24", "10.4.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.rule(routes.Rule{Family: routes.IPv4, Priority: 100, Table: 77, HasUID: true, UIDLo: 1000, UIDHi: 1000})
		w.route(77, "0.0.0.0/0", nic, 0, routes.ProtoStatic)
	}, []Code{LockDefeated}},
	{"a rule at the first priority", func(w *world) {
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.rule(routes.Rule{Family: routes.IPv4, Priority: 1, Table: 77})
		w.route(77, "0.0.0.0/0", nic, 0, routes.ProtoStatic)
	}, []Code{LockDefeated}},
	{"a lock that the agent withdrew", func(w *world) {
		w.p.Report = &agent.Report{Findings: []string{"lock for from 10.9.0.0/24 " + agent.Withdrawn + " the kernel answers otherwise", "something else"}}
	}, []Code{LockDefeated}},

	{"networkd by its default", func(w *world) {
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.p.Networkd = &Networkd{PID: 7, Routes: true, Rules: true, Source: "the default"}
	}, []Code{NetworkdForeign}},
	{"networkd for rules alone", func(w *world) {
		w.policy(25, "fd09::/64", "fd03::/32", 0)
		w.sa(0x200, true, nil)
		w.p.Networkd = &Networkd{PID: 7, Rules: true, Source: "/etc/systemd/networkd.conf"}
	}, []Code{NetworkdForeign}},
	{"networkd that was told", func(w *world) {
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, nil)
		w.p.Networkd = &Networkd{PID: 7}
	}, nil},
	{"networkd where nothing is to be locked", func(w *world) { w.p.Networkd = &Networkd{PID: 7, Routes: true, Rules: true} }, nil},

	{"SAs from before the modules", func(w *world) {
		w.sa(0x100, false, nil)
		w.sa(0x101, false, nil)
		w.sa(0x102, false, func(s *xfrmwatch.SA) { s.Larval = true })
		w.sa(0x200, true, nil)
		w.p.Modules = map[string]Module{"esp4_offload": {Refs: 1}, "esp6_offload": {Refs: 0}}
	}, []Code{ESPOffloadLate, ESPOffloadLate, LarvalSA}},
	{"SAs from after the modules, here and elsewhere", func(w *world) {
		w.sa(0x100, false, nil)
		w.sa(0x200, true, nil)
		w.p.Modules = map[string]Module{"esp4_offload": {Refs: 5}, "esp6_offload": {Refs: -1}}
	}, nil},

	{"a bond that offers what its port lacks", func(w *world) {
		w.link(&routes.Link{Index: bond, Name: "bond0", Kind: "bond", Type: 1, MTU: 1500, Up: true}, map[ethtool.Feature]ethtool.State{ethtool.ESPHWOffload: on, ethtool.ESPSegmentation: on})
		w.link(&routes.Link{Index: port, Name: "eth0", Type: 1, MTU: 1500, Up: true, Running: true, Master: bond}, map[ethtool.Feature]ethtool.State{ethtool.ESPHWOffload: fixed})
		w.policy(17, "10.9.0.0/24", "10.3.0.0/16", 0)
		w.sa(0x100, false, func(s *xfrmwatch.SA) { s.OffloadDev = int32(bond) })
	}, []Code{BondOffers, OffloadNotDone}},
	{"a bond whose offer is held off", func(w *world) {
		w.link(&routes.Link{Index: bond, Name: "bond0", Kind: "bond", Type: 1, MTU: 1500, Up: true}, map[ethtool.Feature]ethtool.State{ethtool.ESPHWOffload: off})
		w.link(&routes.Link{Index: port, Name: "eth0", Type: 1, MTU: 1500, Up: true, Running: true, Master: bond}, map[ethtool.Feature]ethtool.State{ethtool.ESPHWOffload: fixed})
		w.p.Input.Holds = map[plan.HoldKey]plan.HoldClaim{{Index: ethtool.Ifindex(bond), Feature: ethtool.ESPHWOffload}: {Was: true}}
	}, nil},

	{"larval SAs", func(w *world) {
		w.sa(0, false, func(s *xfrmwatch.SA) { s.Larval, s.AddTime, s.Reqid = true, 1988, 7 })
		w.sa(0, true, func(s *xfrmwatch.SA) { s.Larval, s.Src = true, netip.IPv6Unspecified() })
	}, []Code{LarvalSA, LarvalSA}},
	{"very many larval SAs", func(w *world) {
		for i := range 20 {
			w.sa(i, false, func(s *xfrmwatch.SA) { s.Larval = true })
		}
	}, slices.Repeat([]Code{LarvalSA}, 17)},

	{"a tunnel above ESP", func(w *world) {
		w.link(gre(1476, false), nil)
		w.transport(false)
		w.route(routes.TableMain, "10.2.0.0/16", tunnel, 0, routes.ProtoStatic)
		w.route(routes.TableMain, "fd02::/32", tunnel, 1300, routes.ProtoStatic)
	}, []Code{TunnelMTU}},
	{"a tunnel above ESP in IPv6, and the kernel's own routes alone", func(w *world) {
		l := gre(1456, true)
		l.Kind, l.Encap.Header = "ip6gre", 44
		w.link(l, nil)
		w.transport(true)
		w.route(routes.TableMain, "10.2.0.0/30", tunnel, 0, routes.ProtoKernel)
		w.route(routes.TableMain, "fe80::/64", tunnel, 0, routes.ProtoKernel)
	}, []Code{TunnelMTU}},
	{"a tunnel above ESP whose routes are locked", func(w *world) {
		w.link(gre(1476, false), nil)
		w.transport(false)
		w.route(routes.TableMain, "10.2.0.0/16", tunnel, 1442, routes.ProtoStatic)
		w.route(routes.TableMain, "10.2.0.0/30", tunnel, 0, routes.ProtoKernel)
	}, nil},
	{"a tunnel above ESP that leads to its own net alone, with an MTU that fits", func(w *world) {
		w.link(gre(1476, false), nil)
		w.transport(false)
		w.route(routes.TableMain, "10.2.0.0/30", tunnel, 1442, routes.ProtoKernel)
	}, nil},
	{"a tunnel above ESP whose MTU fits", func(w *world) {
		w.link(gre(1440, false), nil)
		w.transport(false)
		w.route(routes.TableMain, "10.2.0.0/16", tunnel, 0, routes.ProtoStatic)
	}, nil},
	{"an xfrm interface", func(w *world) {
		w.link(&routes.Link{Index: xfrmi, Name: "ipsec1", Kind: "xfrm", Type: 65534, MTU: 1500, Up: true, IfID: 1}, nil)
		w.route(routes.TableMain, "10.2.0.0/16", xfrmi, 0, routes.ProtoStatic)
		w.policy(17, "0.0.0.0/0", "10.2.0.0/16", 1)
		w.sa(0x100, false, func(s *xfrmwatch.SA) { s.IfID = 1 })
	}, []Code{TunnelMTU}},

	{"an agent without BPF", func(w *world) {
		w.p.Processes = []Process{{Name: "tsoagent", PID: 9, Caps: 1<<12 | 1<<38, Agent: true}}
	}, []Code{MissingCapability}},
	{"an agent that can't enter namespaces", func(w *world) {
		w.p.Processes = []Process{{Name: "tsoagent", PID: 9, Caps: 1<<12 | 1<<38 | 1<<39, Agent: true, Elsewhere: true}}
	}, []Code{MissingCapability}},
	{"an agent that has what it needs", func(w *world) {
		w.p.Processes = []Process{{Name: "tsoagent", PID: 9, Caps: 1<<12 | 1<<38 | 1<<39, Agent: true}}
	}, nil},
}

// TestFindings compares what is found with text that a person can review: JSON, as programs get it.
func TestFindings(t *testing.T) {
	const file = "testdata/findings.txtar"
	golden, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out txtar.Archive
	for _, s := range sick {
		w := newWorld()
		s.make(w)
		c := Check(w.patient())
		got := make([]Code, 0, len(c.Findings))
		for _, f := range c.Findings {
			got = append(got, f.Code)
		}
		if !slices.Equal(got, s.want) {
			t.Errorf("%s: %v, want %v", s.name, got, s.want)
		}
		if len(s.want) == 0 || len(s.want) > 5 {
			continue
		}
		b, err := json.MarshalIndent(c, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		out.Files = append(out.Files, txtar.File{Name: s.name, Data: append(b, '\n')})
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(&out), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	lines := func(a *txtar.Archive) []string {
		return strings.Split(string(txtar.Format(&txtar.Archive{Files: a.Files})), "\n")
	}
	if d := cmp.Diff(lines(golden), lines(&out)); d != "" {
		t.Errorf("other findings (-want +got), -update writes them:\n%s", d)
	}
}

// TestEveryKindIsFound: no code is listed that nothing can find.
func TestEveryKindIsFound(t *testing.T) {
	found := map[Code]bool{KeyCollateral: true, Unreadable: true} // TestCheck
	for _, s := range sick {
		for _, c := range s.want {
			found[c] = true
		}
	}
	for _, k := range Kinds {
		if !found[k.Code] {
			t.Errorf("no test finds %s", k.Code)
		}
	}
}

// TestNotLookedAtIsNotJudged: without a look at the kernel there are no findings about it, and it is said.
func TestNotLookedAtIsNotJudged(t *testing.T) {
	c := Check(&Patient{NotSeen: []string{"all"}})
	if len(c.Findings) != 0 || fmt.Sprint(c.NotSeen) != "[all]" {
		t.Errorf("%+v", c)
	}
}
