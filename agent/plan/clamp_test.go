package plan

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"tsoagent/clamp"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// clampWorld has a default route and a tunnel's way to its peer.
const clampWorld = `config partial clamp
link 1 lo mtu 65536
link 2 eth0
link 3 eth1
link 4 xfrm0 if_id 7
route 192.0.2.0/24 dev eth0 proto kernel
route 0.0.0.0/0 via 192.0.2.254 dev eth0
sa esp 192.0.2.1 192.0.2.2 spi 1 gcm
sa esp 192.0.2.1 192.0.2.2 spi 2 cbc-sha256 reqid 2
`

func TestClamps(t *testing.T) {
	const tmpl = " tmpl esp tunnel 192.0.2.1 192.0.2.2"
	for _, c := range []struct{ name, world, want string }{
		{"a policy under the default route",
			"policy 17 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl,
			"10.2.0.0/16 mss 1406 because policy 17"},
		{"a bypass inside makes a hole",
			"policy 1 src 0.0.0.0/0 dst 10.2.5.0/24 priority 1\npolicy 17 src 10.1.0.0/16 dst 10.2.0.0/16 priority 2" + tmpl,
			"10.2.0.0-10.2.4.255 mss 1406 because policy 17; 10.2.6.0-10.2.255.255 mss 1406 because policy 17"},
		{"a bypass for some sources makes none",
			"policy 1 src 10.1.1.0/24 dst 10.2.5.0/24 priority 1\npolicy 17 src 10.1.0.0/16 dst 10.2.0.0/16 priority 2" + tmpl,
			"10.2.0.0/16 mss 1406 because policy 17"},
		{"a bypass that comes later makes none",
			"policy 1 src 0.0.0.0/0 dst 10.2.5.0/24 priority 3\npolicy 17 src 0.0.0.0/0 dst 10.2.0.0/16 priority 2" + tmpl,
			"10.2.0.0/16 mss 1406 because policy 17"},
		{"the smallest of two sources holds",
			"policy 1 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl + " reqid 2\npolicy 2 src 10.3.0.0/16 dst 10.2.0.0/16" + tmpl,
			"10.2.0.0/16 mss 1398 because policy 1, policy 2"},
		{"the one ahead takes all, also where it leaves more",
			"policy 1 src 0.0.0.0/0 dst 10.2.0.0/24 priority 1" + tmpl + "\npolicy 2 src 10.3.0.0/16 dst 10.2.0.0/16 priority 2" + tmpl + " reqid 2",
			"10.2.0.0/24 mss 1406 because policy 1; 10.2.1.0-10.2.255.255 mss 1398 because policy 2"},
		{"only UDP is covered", "policy 17 src 10.1.0.0/16 dst 10.2.0.0/16 proto udp" + tmpl, ""},
		{"a port", "policy 17 src 10.1.0.0/16 dst 10.2.0.0/16 proto tcp dport 65535" + tmpl, "10.2.0.0/16 mss 1406 because policy 17"},
		{"transport mode", "policy 17 src 192.0.2.1 dst 192.0.2.2 tmpl esp transport", ""},
		{"a rule that can't be repeated decides",
			"rule 100 uidrange 1000 1000 lookup main\npolicy 17 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl,
			"10.2.0.0/16 mss 1406 because policy 17"},
		{"a route inside with a smaller MTU has room",
			"route 10.2.9.0/24 via 192.0.2.9 dev eth0 mtu 1400\npolicy 17 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl,
			"10.2.0.0-10.2.8.255 mss 1406 because policy 17; 10.2.10.0-10.2.255.255 mss 1406 because policy 17"},
		{"what is locked in place is not clamped",
			"route 10.2.0.0/16 dev xfrm0\npolicy 17 src 0.0.0.0/0 dst 10.2.0.0/16 if_id 7" + tmpl + "\nsa esp 192.0.2.1 192.0.2.2 spi 3 gcm if_id 7", ""},
		{"what can't be locked in place is",
			"route 10.2.0.0/15 dev xfrm0\npolicy 1 src 0.0.0.0/0 dst 10.2.0.0/16 if_id 7" + tmpl + " reqid 1\npolicy 2 src 0.0.0.0/0 dst 10.3.0.0/16 if_id 7" + tmpl + " reqid 2\n" +
				"sa esp 192.0.2.1 192.0.2.2 spi 3 gcm if_id 7 reqid 1\nsa esp 192.0.2.1 192.0.2.2 spi 4 cbc-sha256 if_id 7 reqid 2",
			"10.2.0.0/16 mss 1406 because policy 1; 10.3.0.0/16 mss 1398 because policy 2"},
		{"a bypass ahead of a policy leaves some flows to an xfrm interface's own",
			"route 10.2.0.0/16 dev xfrm0\npolicy 1 src 10.1.0.0/16 dst 10.2.0.0/16 priority 1\npolicy 2 src 0.0.0.0/0 dst 10.2.0.0/16 priority 2" + tmpl +
				"\npolicy 3 src 0.0.0.0/0 dst 10.2.0.0/16 if_id 7" + tmpl + " reqid 3\nsa esp 192.0.2.1 192.0.2.2 spi 3 cbc-sha256 if_id 7 reqid 3",
			"10.2.0.0/16 mss 1398 because policy 2, policy 3"},
		{"before the first SA", "policy 17 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl + " reqid 9", ""},
		{"mtu off", "config mtu off\npolicy 17 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl, ""},
		{"too many destinations of one", "config max_clones_per_coverage 1\nroute 10.2.9.0/24 via 192.0.2.9 dev eth0\npolicy 17 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl, ""},
		{"too many in all", "config max_clones 1\npolicy 1 src 10.1.0.0/16 dst 10.2.0.0/16" + tmpl + "\npolicy 2 src 10.1.0.0/16 dst 10.3.0.0/16" + tmpl,
			"10.2.0.0/16 mss 1406 because policy 1"},
		{"IPv6", "route fd00::/8 dev eth0\npolicy 17 src fd01::/16 dst fd02::/16" + tmpl, "fd02::/16 mss 1386 because policy 17"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, err := newWorld(clampWorld + c.world)
			if err != nil {
				t.Fatal(err)
			}
			pl := Make(w.input())
			var got []string
			for _, e := range pl.Clamp {
				got = append(got, e.String()+" because "+renderIDs(e.Because))
			}
			if diff := cmp.Diff(c.want, strings.Join(got, "; ")); diff != "" {
				t.Errorf("(-want +got)\n%s\n%s", diff, w.render(pl, Steps{}))
			}
			for _, v := range pl.Verdicts {
				if len(v.Notes) == 0 && len(v.Locked) == 0 {
					t.Errorf("policy %d: neither locked nor a word why", v.ID.Policy)
				}
				clamped := slices.ContainsFunc(pl.Clamp, func(e ClampEntry) bool { return slices.Contains(e.Because, v.ID) })
				if said := slices.ContainsFunc(v.Locked, func(s string) bool { return strings.Contains(s, " clamp mss ") }); said != clamped {
					t.Errorf("policy %d: clamped is %v, and it says %q", v.ID.Policy, clamped, v.Locked)
				}
			}
			if len(pl.Shapes) > 0 {
				t.Errorf("shapes besides: %v", pl.Shapes)
			}
		})
	}
}

// TestClampsKeepTheirPromises asks the simulated kernel about forwarded TCP in random worlds: what
// is covered and not locked gets an MSS that fits, or the verdict says why not; what is not covered
// whatever the source gets none.
func TestClampsKeepTheirPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := genWorld(t) + "config partial clamp\n"
		w, err := newWorld(text)
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		if err := clampLaws(w, rng); err != nil {
			t.Fatalf("%v\n\nin the world\n%s", err, text)
		}
	})
}

func clampLaws(w *world, rng *rand.Rand) error {
	in := w.input()
	pl := Make(in)
	entries := make([]clamp.Entry, 0, len(pl.Clamp))
	for i, e := range pl.Clamp {
		if len(e.Because) == 0 {
			return fmt.Errorf("%s for nobody", e)
		}
		if i > 0 && !entries[i-1].Hi.Less(e.Lo) {
			return fmt.Errorf("%s is not behind %s", e, entries[i-1])
		}
		entries = append(entries, e.Entry)
	}
	if diff := cmp.Diff(pl, Make(in), comparePlans...); diff != "" {
		return fmt.Errorf("the same input gives another plan (-first +second):\n%s", diff)
	}
	for _, p := range w.packets(rng, 250) {
		if p.proto != protoTCP || !p.src.IsValid() || p.oif != "" || w.vrfOf(p) != 0 || w.cfg.MTU == MTUOff {
			continue
		}
		if err := judgeClamp(w, pl, entries, p); err != nil {
			return fmt.Errorf("%s\n\t%w", p, err)
		}
	}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, a := range w.addresses(f) {
			if got := clampAt(entries, a); got != 0 && uncoveredForSure(w, a) {
				return fmt.Errorf("%s is clamped to %d, and nothing to it is covered", a, got)
			}
		}
	}
	return nil
}

// judgeClamp judges the MSS of a connection whose packets to one side are like p.
func judgeClamp(w *world, pl *Plan, entries []clamp.Entry, p packet) error {
	at := w.lookup(p)
	if at.route.Body == nil || linkLocal(netip.PrefixFrom(p.dst, p.dst.BitLen())) {
		return nil
	}
	if slices.ContainsFunc(pl.Locks, func(l Lock) bool { return l.Route.Key() == at.route.Key() }) || at.rule != nil && w.cfg.WithDefaults().OwnTable(at.rule.Table) {
		return nil
	}
	have := clampAt(entries, p.dst)
	for _, f := range w.fates(p, at.route) {
		want := 0
		if f.kind == covered && !f.wrapped {
			want = w.expected(f, at.route, true)
		}
		if want == 0 || have != 0 && int(have) <= want-headers(p.family) {
			continue
		}
		if v := verdictOf(pl, f.cov.ID); v != nil && (have == 0 && len(v.Notes) > 0 && !allClamp(v) || leftOut(v)) {
			continue // it says why
		}
		return fmt.Errorf("has mss %d, and policy %d leaves %d on %s", have, f.cov.ID.Policy, want, at)
	}
	return nil
}

// leftOut reports whether a verdict says that a coverage has no clamp for want of room: others may have one
// there.
func leftOut(v *Verdict) bool {
	return slices.ContainsFunc(v.Notes, func(n string) bool { return strings.HasPrefix(n, "no clamp: more than") })
}

// allClamp reports whether a verdict says nothing but that it is clamped.
func allClamp(v *Verdict) bool {
	return len(v.Notes) == 1 && strings.HasPrefix(v.Notes[0], "forwarded TCP")
}

func clampAt(entries []clamp.Entry, a netip.Addr) uint16 {
	for _, e := range entries {
		if !a.Less(e.Lo) && !e.Hi.Less(a) {
			return e.MSS
		}
	}
	return 0
}

// uncoveredForSure says that no flow to an address is covered: no policy for it asks for ESP or AH,
// or one that takes every flow out of them comes first.
func uncoveredForSure(w *world, a netip.Addr) bool {
	for p := range w.db.Policies() {
		if p.Dir != xfrmwatch.Out || !p.Selector.Dst.Contains(a) {
			continue
		}
		if len(w.coverages(p)) > 0 {
			return false
		}
		e := entry{pol: p}
		if p.IfID == 0 && e.all() && !slices.ContainsFunc(w.fib.Links(), func(l *routes.Link) bool { return l.Kind == "xfrm" }) {
			return true
		}
	}
	return !slices.ContainsFunc(w.gone, func(c xfrmwatch.Coverage) bool { return c.Selector.Dst.Contains(a) })
}

func TestFewClampValues(t *testing.T) {
	for _, n := range []int{0, 1, MaxClampValues, MaxClampValues + 1, 1000} {
		list := []clamped{{mss: 0}}
		for i := range n {
			list = append(list, clamped{mss: 1000 + (i*7)%n})
		}
		values := map[int]bool{}
		for from, to := range fewValues(list) {
			if to > from || to == 0 && from != 0 {
				t.Fatalf("%d: %d becomes %d", n, from, to)
			}
			if to != 0 {
				values[to] = true
			}
		}
		if len(values) > MaxClampValues || n <= MaxClampValues && len(values) != n {
			t.Errorf("%d values become %d", n, len(values))
		}
	}
}
