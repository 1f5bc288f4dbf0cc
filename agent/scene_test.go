package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// The scenes that the loop's tests play in.

const (
	ipsec1 = 7 // the xfrm interface with if_id 1
	ipsec2 = 8 // the one with if_id 2
)

// policy is an output policy with an ESP tunnel to 192.0.2.2.
func policy(index int, src, dst string, ifID uint32) xfrmwatch.PolicySet {
	p := netip.MustParsePrefix(dst)
	sel := xfrmwatch.Selector{Family: xfrmwatch.Family(routes.FamilyOf(p.Addr())), Src: netip.MustParsePrefix(src), Dst: p}
	return xfrmwatch.PolicySet{Policy: &xfrmwatch.Policy{
		Index: xfrmwatch.PolicyIndex(index), Dir: xfrmwatch.Out, Priority: 100, Selector: sel, IfID: ifID,
		Templates: []xfrmwatch.Template{{
			Dst: netip.MustParseAddr("192.0.2.2"), Src: netip.MustParseAddr("192.0.2.1"), Family: xfrmwatch.IPv4,
			Proto: xfrmwatch.ESP, Mode: xfrmwatch.Tunnel, Reqid: xfrmwatch.Reqid(ifID + 1),
		}},
	}}
}

// sa is an SA with GCM-16 for that policy: 1446 of 1500.
func sa(spi int, ifID uint32) xfrmwatch.SASet {
	s := &xfrmwatch.SA{
		Src: netip.MustParseAddr("192.0.2.1"), Dst: netip.MustParseAddr("192.0.2.2"), SPI: xfrmwatch.SPI(spi),
		Proto: xfrmwatch.ESP, Family: xfrmwatch.IPv4, Mode: xfrmwatch.Tunnel, Reqid: xfrmwatch.Reqid(ifID + 1), IfID: ifID,
		AEAD: xfrmwatch.Algorithm{Name: "rfc4106(gcm(aes))", ICVBits: 128}, AddTime: uint64(1000 + spi),
	}
	s.Key = xfrmwatch.SAKey{Dst: s.Dst, SPI: s.SPI, Proto: s.Proto}
	return xfrmwatch.SASet{SA: s}
}

// cbc is an SA with CBC and SHA256: 1438 of 1500.
func cbc(spi int, ifID uint32) xfrmwatch.SASet {
	s := *sa(spi, ifID).SA
	s.AEAD = xfrmwatch.Algorithm{}
	s.Enc, s.Auth = xfrmwatch.Algorithm{Name: "cbc(aes)"}, xfrmwatch.Algorithm{Name: "hmac(sha256)", ICVBits: 128}
	return xfrmwatch.SASet{SA: &s}
}

func gone(p xfrmwatch.PolicySet) xfrmwatch.PolicyGone {
	return xfrmwatch.PolicyGone{Index: p.Policy.Index}
}

func saGone(s xfrmwatch.SASet) xfrmwatch.SAGone { return xfrmwatch.SAGone{Key: s.SA.Key} }

// hereDedicated is a carrier that the configuration holds whatever the default is.
func dedicatedOff() Config {
	var c Config
	c.Plan.Dedicated = "off"
	return c
}

// tunnelWorld has two xfrm interfaces, and a route to 10.2.0.0/16 by the first. Nothing is
// covered yet.
func tunnelWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := newWorld(t, cfg)
	w.addLink(&routes.Link{Index: ipsec1, Name: "ipsec1", Kind: "xfrm", Type: 65534, MTU: 1500, Up: true, IfID: 1})
	w.addLink(&routes.Link{Index: ipsec2, Name: "ipsec2", Kind: "xfrm", Type: 65534, MTU: 1500, Up: true, IfID: 2})
	w.addRoute("10.2.0.0/16", hop{oif: ipsec1})
	w.queue = nil
	return w
}

var (
	tunnelPolicy = policy(9, "0.0.0.0/0", "10.2.0.0/16", 1)
	tunnelSA     = sa(0x100, 1)
)

// coveredWorld is a tunnelWorld in which the route is locked and the interface held.
func coveredWorld(t *testing.T) *world {
	t.Helper()
	w := tunnelWorld(t, dedicatedOff())
	w.start(tunnelPolicy, tunnelSA)
	w.mustProtect()
	w.took()
	return w
}

func (w *world) mustProtect() {
	w.t.Helper()
	if got := w.route("10.2.0.0/16"); got != "dev 7 mtu lock 1446" {
		w.t.Errorf("the route is %q and not locked to 1446", got)
	}
	if got := w.held(ipsec1); got != allTSO {
		w.t.Errorf("off on ipsec1: %q", got)
	}
}

func (w *world) mustBeBare() {
	w.t.Helper()
	if got := w.route("10.2.0.0/16"); got != "dev 7" {
		w.t.Errorf("the route is %q and not as it was", got)
	}
	if got := w.held(ipsec1); got != "" {
		w.t.Errorf("still off on ipsec1: %q", got)
	}
	if len(w.book) > 0 {
		w.t.Errorf("entries stay in the journal: %v", w.ids())
	}
}

func (w *world) ids() []string {
	var out []string
	for _, e := range (*fakeBook)(w).Entries() {
		out = append(out, e.ID)
	}
	return out
}

var (
	partPolicy = policy(17, "10.1.0.0/16", "10.3.0.0/16", 0)
	partSA     = sa(0x200, 0)
)

// partWorld has a policy from 10.1.0.0/16 to 10.3.0.0/16 under the default route, so that a rule
// and a clone serve it.
func partWorld(t *testing.T, cfg Config) *world {
	t.Helper()
	w := newWorld(t, cfg)
	w.start(partPolicy, partSA)
	return w
}

func (w *world) mustLead() {
	w.t.Helper()
	if got := w.table(5450); got != "10.3.0.0/16 via 192.0.2.254 dev 2 mtu lock 1446" {
		w.t.Errorf("table 5450 has %q", got)
	}
	if got := w.ownRules(); got != "32765: from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450" {
		w.t.Errorf("our rules are %q", got)
	}
}

func (w *world) table(id routes.TableID) string { return tableText(w.kernel, id) }

func tableText(f *routes.FIB, id routes.TableID) string {
	var out []string
	for r := range f.Table(routes.IPv4, id) {
		out = append(out, r.Dst.String()+" "+show(r))
	}
	return sortedLines(out)
}

const tso = ethtool.TCPSegmentation

func (w *world) ownRules() string {
	var out []string
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, r := range w.kernel.Rules(f) {
			if w.a.cfg.Plan.OwnRule(r) {
				out = append(out, fmt.Sprintf("%d: %s", r.Priority, ruleText(*r)))
			}
		}
	}
	return sortedLines(out)
}

func sortedLines(l []string) string {
	slices.Sort(l)
	return strings.Join(l, "\n")
}

func xfrmSA(s xfrmwatch.SA) xfrmwatch.SASet { return xfrmwatch.SASet{SA: &s} }
