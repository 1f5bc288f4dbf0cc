package agent

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/routes"
)

// These tests run on any kernel with XFRM policies: presume_mtu makes locks without SAs.

func hostConfig(t *testing.T) Config {
	t.Helper()
	cfg := Config{RunDir: runDir(t), RestoreAfter: Duration(50 * time.Millisecond)}
	cfg.Plan.PresumeMTU = 1400
	return cfg
}

// shows waits until the output of `ip args` contains all of want, or nothing if there is none.
func (ns *testNS) shows(args string, want ...string) {
	ns.t.Helper()
	var got string
	ok := func() bool {
		got = ns.show(args)
		for _, w := range want {
			if !strings.Contains(got, w) {
				return false
			}
		}
		return len(want) > 0 || got == ""
	}
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			ns.t.Fatalf("ip %s: got\n%s\nwant %q", args, got, want)
		}
	}
}

const (
	rules4, rules6   = "-4 rule show table 5450", "-6 rule show table 5450"
	clones4, clones6 = "-4 route show table 5450", "-6 route show table 5450"
)

func TestHostPoliciesComeAndGo(t *testing.T) {
	checkLeaks(t)
	ns := newNS(t)
	before := ns.snapshot()
	a := ns.start(hostConfig(t))
	if d := cmp.Diff(before, ns.snapshot()); d != "" {
		t.Errorf("nothing is covered, and yet (-before +after):\n%s", d)
	}
	add := func() {
		t.Helper()
		ns.policy("add", "10.1.0.0/16", "10.3.0.0/16", "")
		ns.policy("add", "2001:db8::/64", "2001:db8:3::/48", "")
		ns.shows(rules4, "from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450 proto 84")
		ns.shows(clones4, "10.3.0.0/16 via 192.0.2.254 dev n0 proto 84", "mtu lock 1400")
		ns.shows(rules6, "from 2001:db8::/64 to 2001:db8:3::/48 lookup 5450 proto 84")
		ns.shows(clones6, "2001:db8:3::/48 via 2001:db8::fe dev n0 proto 84", "mtu lock 1400")
	}
	bare := func(what string) {
		t.Helper()
		for _, args := range []string{rules4, clones4, rules6, clones6} {
			ns.shows(args)
		}
		if d := cmp.Diff(before, ns.snapshot()); d != "" {
			t.Errorf("%s (-before +after):\n%s", what, d)
		}
	}
	add()
	ns.policy("delete", "10.1.0.0/16", "10.3.0.0/16", "")
	ns.policy("delete", "2001:db8::/64", "2001:db8:3::/48", "")
	bare("deleted")
	add()
	ns.ip("xfrm policy flush")
	bare("flushed")
	add()
	a.stop()
	bare("stopped")
}

// TestHostPoliciesShareARule: with a second destination the rule of the first one becomes one for all, and with that one's end the first one's
// again. The kernel takes the one for the other (fib4_rule_compare, fib6_rule_compare).
func TestHostPoliciesShareARule(t *testing.T) {
	checkLeaks(t)
	ns := newNS(t)
	before := ns.snapshot()
	a := ns.start(hostConfig(t))
	const one, other = 3, 4
	policies := func(verb string, i int) {
		ns.policy(verb, "10.1.0.0/16", fmt.Sprintf("10.%d.0.0/16", i), "")
		ns.policy(verb, "2001:db8::/64", fmt.Sprintf("2001:db8:%d::/48", i), "")
	}
	lead := func(to4, to6 string) {
		t.Helper()
		for args, want := range map[string]string{
			rules4: "from 10.1.0.0/16" + to4 + " lookup 5450 proto 84", rules6: "from 2001:db8::/64" + to6 + " lookup 5450 proto 84",
		} {
			within(t, 10*time.Second, want, func() bool {
				_, have, _ := strings.Cut(ns.show(args), "\t")
				return strings.TrimSpace(have) == want
			})
		}
	}
	policies("add", one)
	lead(" to 10.3.0.0/16", " to 2001:db8:3::/48")
	for range 3 {
		policies("add", other)
		ns.shows(clones4, "10.4.0.0/16")
		ns.shows(clones6, "2001:db8:4::/48")
		lead("", "")
		policies("delete", one)
		lead(" to 10.4.0.0/16", " to 2001:db8:4::/48")
		policies("add", one)
		lead("", "")
		policies("delete", other)
		lead(" to 10.3.0.0/16", " to 2001:db8:3::/48")
	}
	policies("add", other)
	lead("", "")
	policies("delete", one)
	policies("delete", other)
	a.stop()
	if d := cmp.Diff(before, ns.snapshot()); d != "" {
		t.Errorf("(-before +after):\n%s", d)
	}
}

func TestHostClonesFollowTheirRoutes(t *testing.T) {
	checkLeaks(t)
	ns := newNS(t)
	ns.policy("add", "10.1.0.0/16", "10.3.0.0/16", "")
	ns.policy("add", "2001:db8::/64", "2001:db8:3::/48", "")
	before := ns.snapshot()
	a := ns.start(hostConfig(t))
	ns.shows(clones4, "via 192.0.2.254 dev n0")
	ns.shows(clones6, "via 2001:db8::fe dev n0")

	ns.ip("route replace default via 192.0.2.253")
	ns.shows(clones4, "10.3.0.0/16 via 192.0.2.253 dev n0")
	ns.ip("-6 route replace default via 2001:db8::fd")
	ns.shows(clones6, "2001:db8:3::/48 via 2001:db8::fd dev n0")

	// A more specific route that leaves room already goes its own way, and comes and goes.
	ns.ip("link set n1 mtu 1400\nlink add m0 type veth peer name m1\nlink set m0 mtu 1400 up\nlink set m1 up\nlink set m0 addrgenmode none")
	ns.ip("route add 10.3.7.0/24 dev m0")
	ns.shows(clones4, "throw 10.3.7.0/24")
	ns.ip("route del 10.3.7.0/24")
	within(t, 10*time.Second, "the throw goes", func() bool { return !strings.Contains(ns.show(clones4), "throw") })
	// So does a bypass.
	ns.policy("add", "10.1.0.0/16", "10.3.8.0/24", "priority 0 bypass")
	ns.policy("delete", "10.1.0.0/16", "10.3.8.0/24", "")
	ns.policy("add", "10.1.0.0/16", "10.3.9.0/24", "bypass")
	ns.ip("xfrm policy update src 10.1.0.0/16 dst 10.3.0.0/16 dir out priority 10 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
	ns.shows(clones4, "throw 10.3.9.0/24")
	ns.policy("delete", "10.1.0.0/16", "10.3.9.0/24", "")

	ns.ip("route replace default via 192.0.2.254\nlink del m0\nlink set n1 mtu 1500")
	ns.ip("-6 route replace default via 2001:db8::fe")
	ns.shows(clones4, "10.3.0.0/16 via 192.0.2.254 dev n0")
	a.stop()
	if d := cmp.Diff(before, ns.snapshot()); d != "" {
		t.Errorf("(-before +after):\n%s", d)
	}
}

// wholeRoute makes a route all of whose flows a policy takes, so that it is locked in place.
func (ns *testNS) wholeRoute() {
	ns.t.Helper()
	ns.ip("route add 10.2.0.0/16 via 192.0.2.10")
	ns.policy("add", "0.0.0.0/0", "10.2.0.0/16", "")
}

func TestHostCrashAndRestore(t *testing.T) {
	checkLeaks(t)
	ns := newNS(t)
	ns.wholeRoute()
	ns.policy("add", "10.1.0.0/16", "10.3.0.0/16", "")
	before := ns.snapshot()
	cfg := hostConfig(t)
	log := discard()
	protected := func() {
		t.Helper()
		ns.shows("route show 10.2.0.0/16", "via 192.0.2.10 dev n0", "mtu lock 1400")
		ns.shows(clones4, "10.3.0.0/16 via 192.0.2.254 dev n0", "mtu lock 1400")
		ns.shows(rules4, "from 10.1.0.0/16 to 10.3.0.0/16")
	}
	a := ns.start(cfg)
	protected()
	if _, err := Restore(t.Context(), cfg, log, "test", false); err == nil {
		t.Error("restored under a running agent")
	}
	a.crash()
	protected()
	locked := ns.snapshot()

	stale, err := Restore(t.Context(), cfg, log, "test", true)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&Restored{Rules: 1, Clones: 1, Actions: 2, Findings: []string{}}, stale); d != "" {
		t.Errorf("stale (-want +got):\n%s", d)
	}
	ns.shows("route show 10.2.0.0/16", "mtu lock 1400")
	ns.shows(rules4)
	ns.shows(clones4)

	// A restart adopts what is there.
	a = ns.start(cfg)
	protected()
	if d := cmp.Diff(locked, ns.snapshot()); d != "" {
		t.Errorf("after the restart (-before +after):\n%s", d)
	}
	a.crash()
	a = ns.start(cfg)
	within(t, 5*time.Second, "a restart", func() bool { return len(a.Report().Locks) == 1 })
	if n := a.Report().Counters.Actions; n != 0 {
		t.Errorf("the second restart made %d writes", n)
	}
	a.crash()

	all, err := Restore(t.Context(), cfg, log, "test", false)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&Restored{Locks: 1, Rules: 1, Clones: 1, Actions: 3, Findings: []string{}}, all); d != "" {
		t.Errorf("all (-want +got):\n%s", d)
	}
	if d := cmp.Diff(before, ns.snapshot()); d != "" {
		t.Errorf("restored (-before +after):\n%s", d)
	}
	again, err := Restore(t.Context(), cfg, log, "test", false)
	if err != nil || again.Actions != 0 {
		t.Errorf("a second restore: %+v, %v", again, err)
	}
}

func TestHostLookChangesNothing(t *testing.T) {
	checkLeaks(t)
	ns := newNS(t)
	ns.wholeRoute()
	ns.policy("add", "10.1.0.0/16", "10.3.0.0/16", "")
	before := ns.snapshot()
	cfg := hostConfig(t)
	var said *Explanation
	r, err := Look(t.Context(), cfg, discard(), "test", func(explain func(Question) (*Explanation, error)) error {
		var err error
		said, err = explain(Question{Dst: netip.MustParseAddr("10.3.0.1"), From: netip.MustParseAddr("10.1.0.1")})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.Live || r.PID != 0 || r.Mode != Observe || len(r.Coverages) != 2 || len(r.Locks) != 1 || len(r.Rules) != 1 || len(r.Clones) != 1 {
		t.Errorf("report %+v", r)
	}
	if said.Action != "ipsec" || said.Device != "n0" {
		t.Errorf("explanation %+v", said)
	}
	if d := cmp.Diff(before, ns.snapshot()); d != "" {
		t.Errorf("(-before +after):\n%s", d)
	}
}

// An owner that replaces its route in a tight loop meets our lock at every point of its life:
// at the end the route has the owner's last nexthop and our lock.
func TestHostRaceAgainstARealOwner(t *testing.T) {
	checkLeaks(t)
	ns := newNS(t)
	const dst = "10.2.0.0/16"
	var versions [][]byte
	for _, gw := range []string{"192.0.2.10", "192.0.2.11"} {
		ns.ip("route replace " + dst + " via " + gw)
		versions = append(versions, ns.encoded(dst))
	}
	ns.policy("add", "0.0.0.0/0", dst, "")
	a := ns.start(hostConfig(t))
	ns.shows("route show "+dst, "via 192.0.2.11 dev n0", "mtu lock 1400")

	owner, err := routes.OpenTable()
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close()
	last := 0
	for i := range 600 {
		last = i % 2
		if _, err := owner.Replace(versions[last]); err != nil {
			t.Fatal(err)
		}
		if i%7 == 0 {
			a.forgive() // the bound on fights is not what is tried here
			// Sometimes the agent comes to rest in between.
			if i%21 == 0 {
				ns.shows("route show "+dst, fmt.Sprintf("via 192.0.2.1%d dev n0", last), "mtu lock 1400")
			}
		}
	}
	a.forgive()
	if _, err := owner.Replace(versions[last]); err != nil { // an event, so that the loop looks
		t.Fatal(err)
	}
	want := fmt.Sprintf("via 192.0.2.1%d dev n0", last)
	ns.shows("route show "+dst, want, "mtu lock 1400")
	within(t, 5*time.Second, "the agent is at rest", a.rests)
	if got := ns.show("route show " + dst); !strings.Contains(got, want) || !strings.Contains(got, "mtu lock 1400") || strings.Contains(got, "\n") {
		t.Errorf("at rest: %s", got)
	}
	t.Logf("%d repairs", a.Report().Counters.Repairs)
	a.stop()
	if got := ns.show("route show " + dst); !strings.Contains(got, want) || strings.Contains(got, "mtu") {
		t.Errorf("given back: %s", got)
	}
}

// forgive has the agent forget how often it locked a route.
func (r *running) forgive() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 10*time.Second)
	defer cancel()
	if err := r.call(ctx, func() { clear(r.st.fights) }); err != nil {
		r.t.Fatal(err)
	}
}

// rests reports whether all our writes have been seen.
func (r *running) rests() (ok bool) {
	err := r.call(r.t.Context(), func() { ok = len(r.st.writing)+len(r.st.inflight) == 0 })
	return err == nil && ok
}

// encoded is the route as its owner writes it.
func (ns *testNS) encoded(dst string) []byte {
	ns.t.Helper()
	tb, err := routes.OpenTable()
	if err != nil {
		ns.t.Fatal(err)
	}
	defer tb.Close()
	var msg []byte
	err = tb.Routes(routes.Filter{Family: routes.IPv4}, func(r routes.Route) (err error) {
		if r.Dst.String() == dst {
			msg, err = routes.EncodeRoute(r)
		}
		return err
	})
	if err != nil || msg == nil {
		ns.t.Fatalf("no route to %s: %v", dst, err)
	}
	return msg
}

// TestHostCountersOfASourceNeverFall dials each watcher again, as after its socket ended.
func TestHostCountersOfASourceNeverFall(t *testing.T) {
	ns := newNS(t)
	a := ns.start(hostConfig(t))
	s := a.sources
	counts := func() map[string]SourceReport {
		out := map[string]SourceReport{}
		for _, r := range s.stats() {
			out[r.Source] = SourceReport{Source: r.Source, Events: r.Events, Dumps: r.Dumps, Overruns: r.Overruns, Undecodable: r.Undecodable}
		}
		return out
	}
	before := counts()
	if len(before) < 4 || before["routes"].Dumps == 0 || before["ethtool"].Dumps == 0 {
		t.Fatalf("sources: %+v", before)
	}
	a.stop()
	before = counts()
	for _, dial := range []func() error{s.dialXFRM, s.dialRoutes, s.dialFeatures, s.dialL2TP, s.dialKeys} {
		if err := dial(); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	if d := cmp.Diff(before, counts()); d != "" {
		t.Errorf("after they were dialled again (-before +after):\n%s", d)
	}
}
