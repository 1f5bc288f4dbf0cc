package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// raceWorld is a tunnelWorld in which the route to 10.2.0.0/16 leads over a gateway, and is
// about to be locked.
func raceWorld(t *testing.T) *world {
	t.Helper()
	cfg := Config{}
	cfg.Plan.Dedicated = "keep"
	w := tunnelWorld(t, cfg)
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1, gw: "192.0.2.10"})
	w.queue = nil
	w.start()
	return w
}

// What the owner does to its route after our decision and ahead of our write: there is no
// compare-and-swap in rtnetlink, so the order of the events tells, and the owner's version is
// written again, at once.
func TestOwnerRacesOurLock(t *testing.T) {
	const dst = "10.2.0.0/16"
	via := func(gw string) hop { return hop{oif: ipsec1, gw: gw} }
	for name, c := range map[string]struct {
		race    func(*world)
		want    string
		repairs uint64
		writes  int
	}{
		"nobody":          {func(*world) {}, "via 192.0.2.10 dev 7 mtu lock 1446", 0, 1},
		"another gateway": {func(w *world) { w.replaceRoute(dst, via("192.0.2.11")) }, "via 192.0.2.11 dev 7 mtu lock 1446", 1, 2},
		"changes twice":   {func(w *world) { w.replaceRoute(dst, via("192.0.2.11")); w.replaceRoute(dst, via("192.0.2.12")) }, "via 192.0.2.12 dev 7 mtu lock 1446", 1, 2},
		"there and back":  {func(w *world) { w.replaceRoute(dst, via("192.0.2.11")); w.replaceRoute(dst, via("192.0.2.10")) }, "via 192.0.2.10 dev 7 mtu lock 1446", 0, 1},
		"another device":  {func(w *world) { w.replaceRoute(dst, hop{oif: ipsec2, gw: "192.0.2.20"}) }, "via 192.0.2.20 dev 8", 1, 3},
		"its own smaller mtu": {func(w *world) {
			w.replaceRoute(dst, hop{oif: ipsec1, gw: "192.0.2.11", mtu: routes.MTUMetric{MTU: 1300}})
		}, "via 192.0.2.11 dev 7 mtu 1300", 1, 3},
		"our own mtu with another gateway": {func(w *world) {
			w.replaceRoute(dst, hop{oif: ipsec1, gw: "192.0.2.11", mtu: routes.MTUMetric{MTU: 1446, Locked: true}})
		}, "via 192.0.2.11 dev 7 mtu lock 1446", 1, 2},
		"deletes it": {func(w *world) { w.deleteRoute(dst) }, "none", 0, 1},
		"deletes and adds": {func(w *world) { w.deleteRoute(dst); w.addRoute(dst, via("192.0.2.13")) },
			"via 192.0.2.13 dev 7 mtu lock 1446", 1, 2},
		"replaces and deletes": {func(w *world) { w.replaceRoute(dst, via("192.0.2.11")); w.deleteRoute(dst) }, "none", 0, 1},
		"adds one of another metric": {func(w *world) { w.addRoute(dst, via("192.0.2.14"), metric(50)) },
			"via 192.0.2.10 dev 7 mtu lock 1446; via 192.0.2.14 dev 7 mtu lock 1446", 0, 2},
		"changes another route": {func(w *world) { w.addRoute("10.9.0.0/16", hop{oif: 2}) }, "via 192.0.2.10 dev 7 mtu lock 1446", 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := raceWorld(t)
			w.t = t
			w.xfrm(tunnelPolicy, tunnelSA)
			w.beforeEcho = func() { c.race(w) }
			w.settle()
			if got := w.route(dst); got != c.want {
				t.Errorf("the route is %q, want %q", got, c.want)
			}
			if got := w.a.stats.Repairs; got != c.repairs {
				t.Errorf("%d repairs, want %d", got, c.repairs)
			}
			if n := w.count("replace "); n != c.writes {
				t.Errorf("%d writes, want %d:\n%s", n, c.writes, strings.Join(w.ops, "\n"))
			}
			if w.next != 0 {
				t.Errorf("the loop waits %s for something that never comes", w.next)
			}
			// Whatever came of it: what is given back is the owner's last version.
			w.xfrm(gone(tunnelPolicy))
			w.settle()
			w.advance(5 * time.Second)
			bare := strings.ReplaceAll(c.want, " mtu lock 1446", "")
			if got := w.route(dst); got != bare {
				t.Errorf("given back, the route is %q, want %q", got, bare)
			}
			if ids := w.ids(); len(ids) > 0 {
				t.Errorf("entries stay in the journal: %v", ids)
			}
		})
	}
}

func (w *world) count(prefix string) int {
	n := 0
	for _, op := range w.ops {
		if strings.HasPrefix(op, prefix) {
			n++
		}
	}
	return n
}

// A second route with the key, behind the first or ahead of it: our replace hits the first.
func TestOwnerAddsASecondRouteWithTheKeyWhileWeLock(t *testing.T) {
	const dst = "10.2.0.0/16"
	for name, app := range map[string]bool{"append": true, "prepend": false} {
		t.Run(name, func(t *testing.T) {
			w := raceWorld(t)
			w.xfrm(tunnelPolicy, tunnelSA)
			w.beforeEcho = func() {
				r := newRoute(t, dst, hop{oif: ipsec1, gw: "192.0.2.30"})
				w.routing(routes.RouteSet{Route: r, Append: app, Origin: routes.Origin{Port: ownerPort, Seq: 99}})
			}
			w.settle()
			w.advance(time.Minute)
			got := w.route(dst)
			for _, gw := range []string{"192.0.2.10", "192.0.2.30"} {
				if strings.Count(got, "via "+gw+" ") != 1 {
					t.Errorf("not one route via %s: %s\n%s", gw, got, strings.Join(w.ops, "\n"))
				}
			}
		})
	}
}

func TestEachRepairThatIsRacedIsRepaired(t *testing.T) {
	w := raceWorld(t)
	w.xfrm(tunnelPolicy, tunnelSA)
	gws := []string{"192.0.2.11", "192.0.2.12", "192.0.2.13", "192.0.2.14"}
	i := 0
	var race func()
	race = func() {
		w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1, gw: gws[i]})
		if i++; i < len(gws) {
			w.beforeEcho = race
		}
	}
	w.beforeEcho = race
	w.settle()
	if got := w.route("10.2.0.0/16"); got != "via 192.0.2.14 dev 7 mtu lock 1446" {
		t.Errorf("the route is %q", got)
	}
	if w.a.stats.Repairs != 4 {
		t.Errorf("%d repairs", w.a.stats.Repairs)
	}
}

func TestOwnerRacesWhatWeGiveBack(t *testing.T) {
	const dst = "10.2.0.0/16"
	for name, c := range map[string]struct {
		race func(*world)
		want string
	}{
		"another gateway": {func(w *world) { w.replaceRoute(dst, hop{oif: ipsec1, gw: "192.0.2.11"}) }, "via 192.0.2.11 dev 7"},
		"its own mtu": {func(w *world) {
			w.replaceRoute(dst, hop{oif: ipsec1, gw: "192.0.2.11", mtu: routes.MTUMetric{MTU: 1300, Locked: true}})
		}, "via 192.0.2.11 dev 7 mtu lock 1300"},
		"deletes it": {func(w *world) { w.deleteRoute(dst) }, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			w := raceWorld(t)
			w.t = t
			w.xfrm(tunnelPolicy, tunnelSA)
			w.settle()
			w.took()
			w.xfrm(gone(tunnelPolicy))
			w.settle()
			w.beforeEcho = func() { c.race(w) }
			w.advance(time.Second)
			if got := w.route(dst); got != c.want {
				t.Errorf("the route is %q, want %q", got, c.want)
			}
			for _, op := range w.ops {
				if strings.Contains(op, "mtu lock 1446") {
					t.Errorf("while giving back: %s", op)
				}
			}
			if len(w.ids()) > 0 || len(w.a.st.locks) > 0 {
				t.Errorf("claims stay: %v %v", w.ids(), w.a.st.locks)
			}
			if w.next != 0 {
				t.Errorf("the loop waits %s for something that never comes", w.next)
			}
		})
	}
}

func TestRouteThatIsGoneIsNotLocked(t *testing.T) {
	w := raceWorld(t)
	w.xfrm(tunnelPolicy, tunnelSA)
	w.beforeEcho = func() { w.deleteRoute("10.2.0.0/16") }
	w.settle()
	want := []string{
		"journal put mtu/9/invalid IP", "journal put route/2/254/10.2.0.0/16/invalid Prefix/0/0",
		"replace 10.2.0.0/16 via 192.0.2.10 dev 7 mtu lock 1446", "journal remove route/2/254/10.2.0.0/16/invalid Prefix/0/0",
	}
	if d := cmp.Diff(want, w.took()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if strings.Contains(w.logs.String(), "level=WARN") {
		t.Errorf("a route that is gone is worth no warning:\n%s", w.logs.String())
	}
}

func TestOwnerThatWipesTheLockIsOverruledAtOnceButNotForEver(t *testing.T) {
	const dst = "10.2.0.0/16"
	w := raceWorld(t)
	w.xfrm(tunnelPolicy, tunnelSA)
	w.settle()
	w.took()
	gws := []string{"192.0.2.11", "192.0.2.12"}
	for i := range 30 {
		w.replaceRoute(dst, hop{oif: ipsec1, gw: gws[i%2]})
		w.settle()
		w.advance(100 * time.Millisecond)
	}
	if n := w.count("replace "); n != 9 { // the tenth write in 10 s was the first lock
		t.Errorf("locked again %d times within 10 s, want 9", n)
	}
	if got := w.route(dst); got != "via 192.0.2.12 dev 7" {
		t.Errorf("the route is %q, want the owner's", got)
	}
	if f := w.a.Report().Findings; !slices.Contains(f, "route 10.2.0.0/16 did not keep its lock, which was written again and again (its owner replaces it, or the kernel refuses): the lock rests") {
		t.Errorf("findings: %q", f)
	}
	w.took()
	w.advance(2 * time.Minute)
	if got := w.route(dst); got != "via 192.0.2.12 dev 7 mtu lock 1446" {
		t.Errorf("after the rest the route is %q", got)
	}
	if n := w.count("replace "); n != 1 {
		t.Errorf("%d writes after the rest, want 1", n)
	}
	if f := w.a.Report().Findings; len(f) > 0 {
		t.Errorf("findings stay: %q", f)
	}
}

func TestRouteThatTheKernelRefusesToLockIsWarnedOf(t *testing.T) {
	w := raceWorld(t)
	w.replaceErr = unix.EINVAL
	w.xfrm(tunnelPolicy, tunnelSA)
	w.settle()
	if !strings.Contains(w.logs.String(), "mtu can't be locked") || w.a.stats.Failed != 1 {
		t.Errorf("failed %d; log:\n%s", w.a.stats.Failed, w.logs.String())
	}
	if len(w.a.st.locks) > 0 || slices.ContainsFunc(w.ids(), func(id string) bool { return strings.HasPrefix(id, "route/") }) {
		t.Errorf("a claim on what was not written: %v", w.ids())
	}
	w.replaceErr = nil
	w.advance(time.Minute)
	w.addRoute("10.9.0.0/16", hop{oif: 2}) // any event
	w.settle()
	if got := w.route("10.2.0.0/16"); got != "via 192.0.2.10 dev 7 mtu lock 1446" {
		t.Errorf("the route is %q", got)
	}
}

// Between the write that overwrites the owner's version and the one that writes it again, the journal has that version.
func TestKilledBeforeARepair(t *testing.T) {
	const dst = "10.2.0.0/16"
	via := func(gw string) hop { return hop{oif: ipsec1, gw: gw} }
	killed := func(t *testing.T) *world {
		w := raceWorld(t)
		w.xfrm(tunnelPolicy, tunnelSA)
		w.beforeEcho = func() {
			w.replaceRoute(dst, via("192.0.2.11"))
			w.beforeEcho = func() { panic("killed") }
		}
		func() {
			defer func() { _ = recover() }()
			w.settle()
			t.Fatal("not killed")
		}()
		if got := w.route(dst); got != "via 192.0.2.10 dev 7 mtu lock 1446" {
			t.Fatalf("nothing was overwritten: %s", got)
		}
		cfg := Config{}
		cfg.Plan.Dedicated = "keep"
		w.crash(cfg)
		return w
	}
	for name, c := range map[string]struct {
		meanwhile func(*world)
		events    []xfrmwatch.Event
		want      string
	}{
		"the cause is there":    {func(*world) {}, []xfrmwatch.Event{tunnelPolicy, tunnelSA}, "via 192.0.2.11 dev 7 mtu lock 1446"},
		"the cause is gone":     {func(*world) {}, nil, "via 192.0.2.11 dev 7"},
		"the owner was quicker": {func(w *world) { w.replaceRoute(dst, via("192.0.2.12")) }, nil, "via 192.0.2.12 dev 7"},
		"the owner went back":   {func(w *world) { w.replaceRoute(dst, via("192.0.2.10")) }, nil, "via 192.0.2.10 dev 7"},
	} {
		t.Run(name, func(t *testing.T) {
			w := killed(t)
			w.t = t
			c.meanwhile(w)
			w.start(c.events...)
			w.advance(time.Minute)
			if got := w.route(dst); got != c.want {
				t.Errorf("the route is %q, want %q\n%s", got, c.want, strings.Join(w.ops, "\n"))
			}
			w.xfrm(gone(tunnelPolicy))
			w.settle()
			w.advance(time.Minute)
			if ids := w.ids(); len(ids) > 0 {
				t.Errorf("entries stay in the journal: %v", ids)
			}
		})
	}
}

func TestKilledBeforeARepairOfWhatWasGivenBack(t *testing.T) {
	const dst = "10.2.0.0/16"
	w := raceWorld(t)
	w.xfrm(tunnelPolicy, tunnelSA)
	w.settle()
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.beforeEcho = func() {
		w.replaceRoute(dst, hop{oif: ipsec1, gw: "192.0.2.11"})
		w.beforeEcho = func() { panic("killed") }
	}
	func() {
		defer func() { _ = recover() }()
		w.advance(time.Second)
		t.Fatal("not killed")
	}()
	cfg := Config{}
	cfg.Plan.Dedicated = "keep"
	w.crash(cfg)
	w.start()
	w.advance(time.Minute)
	if got := w.route(dst); got != "via 192.0.2.11 dev 7" {
		t.Errorf("the route is %q", got)
	}
	if ids := w.ids(); len(ids) > 0 {
		t.Errorf("entries stay in the journal: %v", ids)
	}
}
