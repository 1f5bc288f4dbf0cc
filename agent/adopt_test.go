package agent

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/journal"
	"tsoagent/routes"
)

// bothWorld has the tunnel and the partial policy in place.
func bothWorld(t *testing.T) *world {
	t.Helper()
	w := tunnelWorld(t, dedicatedOff())
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
	w.mustProtect()
	w.mustLead()
	w.took()
	return w
}

// crash restarts the agent, as after kill -9, with what its journal says.
func (w *world) crash(cfg Config) {
	w.restart(cfg)
	w.putErr, w.replaceErr, w.setErr, w.beforeSet, w.beforeEcho = nil, nil, nil, nil, nil
	w.a.adopt(w.found())
}

func TestRestartTouchesNothingThatIsInPlace(t *testing.T) {
	w := bothWorld(t)
	w.crash(dedicatedOff())
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
	if ops := w.took(); len(ops) > 0 {
		t.Errorf("written:\n%s", strings.Join(ops, "\n"))
	}
	if w.a.stats.Rounds != 1 || w.a.stats.Actions != 0 {
		t.Errorf("%d rounds, %d actions; want one round and nothing done", w.a.stats.Rounds, w.a.stats.Actions)
	}
	w.mustProtect()
	w.mustLead()
	for _, h := range w.a.Report().Holds {
		if h.State != StateInPlace {
			t.Errorf("hold %+v", h)
		}
	}
	for _, l := range w.a.Report().Locks {
		if l.State != StateInPlace || l.Was != 0 {
			t.Errorf("lock %+v", l)
		}
	}
	w.dumpXFRM()
	w.settle()
	w.advance(time.Minute)
	w.mustBeBareOfTables()
}

// mustBeBareOfTables is mustBeBare where there were rules: the entry of our tables stays while
// the agent runs.
func (w *world) mustBeBareOfTables() {
	w.t.Helper()
	delete(w.book, "tables")
	w.mustBeBare()
	if got := w.ownRules() + w.table(5450); got != "" {
		w.t.Errorf("still there: %s", got)
	}
}

func TestRestartGivesBackWhatHasNoCauseAnyMore(t *testing.T) {
	w := bothWorld(t)
	w.crash(dedicatedOff())
	w.start()
	w.advance(time.Minute)
	w.mustBeBareOfTables()
}

func TestRestartWhileAnSAIsMissingKeepsTheLock(t *testing.T) {
	again := policy(33, "0.0.0.0/0", "10.2.0.0/16", 1)
	w := coveredWorld(t)
	w.xfrm(gone(tunnelPolicy), again)
	w.settle()
	w.advance(time.Minute)
	w.took()
	w.crash(dedicatedOff())
	w.start(again) // larval
	w.advance(time.Hour)
	w.quiet("the MTU was inherited from the policy's last index, and remembered")
	w.mustProtect()
}

// The journal is written first, so an entry says "may have been changed".
func TestCrashBetweenTheJournalAndTheKernel(t *testing.T) {
	crash := func(w *world) { panic("crash") }
	for name, arm := range map[string]func(*world){
		"ahead of the hold": func(w *world) { w.beforeSet = func() { crash(w) } },
		"ahead of the lock": func(w *world) { w.beforeEcho = func() { crash(w) } },
	} {
		t.Run(name, func(t *testing.T) {
			w := tunnelWorld(t, dedicatedOff())
			arm(w)
			func() {
				defer func() { _ = recover() }()
				w.start(tunnelPolicy, tunnelSA)
				t.Fatal("no crash")
			}()
			w.crash(dedicatedOff())
			w.start(tunnelPolicy, tunnelSA)
			w.mustProtect()
			if len(w.a.st.retakes) > 0 || strings.Contains(w.logs.String(), "overruled") {
				t.Errorf("the crash is taken for somebody's change: %v", w.a.st.retakes)
			}
			w.xfrm(gone(tunnelPolicy))
			w.settle()
			w.advance(time.Minute)
			w.mustBeBare()
		})
		t.Run(name+", and the cause is gone", func(t *testing.T) {
			w := tunnelWorld(t, dedicatedOff())
			arm(w)
			func() {
				defer func() { _ = recover() }()
				w.start(tunnelPolicy, tunnelSA)
			}()
			w.crash(dedicatedOff())
			w.start()
			w.advance(time.Minute)
			w.mustBeBare()
		})
	}
}

// A lock that changes its value has two values in the journal: either can be in the kernel.
func TestCrashWhileALockChangesItsValue(t *testing.T) {
	small := cbc(0x101, 1)
	crashed := func(t *testing.T) *world {
		w := coveredWorld(t)
		w.beforeEcho = func() { panic("crash") }
		func() {
			defer func() { _ = recover() }()
			w.xfrm(small)
			w.settle()
			t.Fatal("no crash")
		}()
		w.crash(dedicatedOff())
		return w
	}
	t.Run("goes on", func(t *testing.T) {
		w := crashed(t)
		w.start(tunnelPolicy, tunnelSA, small)
		if got := w.route("10.2.0.0/16"); got != "dev 7 mtu lock 1438" {
			t.Errorf("the route is %q", got)
		}
		w.dumpXFRM()
		w.settle()
		w.advance(time.Minute)
		w.mustBeBare()
	})
	t.Run("back to the value before", func(t *testing.T) {
		w := crashed(t)
		w.start(tunnelPolicy, tunnelSA)
		if n := w.count("replace"); n > 0 {
			t.Errorf("what is in place already was written %d times", n)
		}
		if w.next != 0 {
			t.Errorf("the loop waits %s for something that never comes", w.next)
		}
		w.mustProtect()
		w.dumpXFRM()
		w.settle()
		w.advance(time.Minute)
		w.mustBeBare()
	})
	t.Run("the cause is gone", func(t *testing.T) {
		w := crashed(t)
		w.start()
		w.advance(time.Minute)
		w.mustBeBare()
	})
	t.Run("crashes again", func(t *testing.T) {
		w := crashed(t)
		natt := *small.SA
		natt.Encap.Type = 2
		w.beforeEcho = func() { panic("crash") }
		func() {
			defer func() { _ = recover() }()
			w.start(tunnelPolicy, xfrmSA(natt))
			t.Fatal("no crash")
		}()
		w.crash(dedicatedOff())
		w.start()
		w.advance(time.Minute)
		w.mustBeBare()
	})
}

func TestEntriesOfAnotherBootAreReportedAndLeftAlone(t *testing.T) {
	w := bothWorld(t)
	found := w.found()
	w.restart(dedicatedOff())
	w.a.adopt(&journal.Recovery{Foreign: found.Entries, Torn: 1, Problems: []string{"line 3: nonsense"}})
	before := maps.Clone(w.feats)
	w.start()
	w.advance(time.Minute)
	want := []string{
		"writes to the journal that were cut short: 1; the kernel was not touched for them",
		"7 journal entries belong to another boot or network namespace and are left alone",
		"line 3: nonsense",
	}
	if d := cmp.Diff(want, w.a.Report().Findings); d != "" {
		t.Errorf("findings (-want +got):\n%s", d)
	}
	for i, f := range before {
		if !f.Equal(w.feats[i]) {
			t.Errorf("%s was touched", f.Name)
		}
	}
	if got := w.route("10.2.0.0/16"); got != "dev 7 mtu lock 1446" {
		t.Errorf("a route that we don't know to be ours: %q", got)
	}
}

// Nobody would follow the tables of an earlier run that had other numbers.
func TestOtherTablesThanAnEarlierRunHasLeftAreRefused(t *testing.T) {
	w := partWorld(t, Config{})
	cfg := Config{}
	cfg.Plan.Table = 7000
	w.crash(cfg)
	if err := w.a.checkTables(); err == nil || !strings.Contains(err.Error(), "run `tsoctl restore --table 5450 --protocol 84` first") {
		t.Errorf("got %v", err)
	}
	for _, stale := range []bool{true, false} {
		if w.a.aim(stale); w.a.checkTables() == nil {
			t.Errorf("somebody asked for other ones, stale %v, and gets these", stale)
		}
	}
	w.crash(Config{})
	if err := w.a.checkTables(); err != nil {
		t.Error(err)
	}
}

// Who only gives back, and was not told of other numbers, takes those of the run that has left them.
func TestRestoreTakesTheNumbersOfAnEarlierRun(t *testing.T) {
	cfg := Config{}
	cfg.Plan.Table, cfg.Plan.Protocol = 7000, 99
	w := partWorld(t, cfg)
	w.crash(Config{})
	w.a.aim(true)
	if err := w.a.checkTables(); err != nil || w.a.cfg.Plan.Table != 7000 || w.a.cfg.Plan.Protocol != 99 {
		t.Errorf("table %d, protocol %d: %v", w.a.cfg.Plan.Table, w.a.cfg.Plan.Protocol, err)
	}
}

func TestEntriesThatCannotBeUsedAreReported(t *testing.T) {
	w := tunnelWorld(t, Config{})
	w.a.adopt(&journal.Recovery{Entries: []journal.Entry{
		{ID: "feature/7/x", Kind: kindHold, Data: []byte(`{"device":7}`)},
		{ID: "route/1", Kind: kindLock, Data: []byte(`[]`)},
		{ID: "mtu/1", Kind: kindMTU, Data: []byte(`"x"`)},
		{ID: "lane/7", Kind: "charm", Data: []byte(`{}`)},
	}})
	w.start()
	w.quiet("nothing can be trusted")
	f := w.a.Report().Findings
	if len(f) != 4 {
		t.Errorf("findings:\n%s", strings.Join(f, "\n"))
	}
}

// The index of a device that is gone can be given to another one.
// TestHoldGoesWithARenamedDevice: without a permanent address its name tells it from another one.
func TestHoldGoesWithARenamedDevice(t *testing.T) { holdGoesWith(t, "vpn0") }

// The journal is JSON, which can't have a byte that is no UTF-8.
func TestHoldGoesWithANameThatIsNoText(t *testing.T) { holdGoesWith(t, "v\x9bpn\xff\xfe") }

func holdGoesWith(t *testing.T, name string) {
	w := coveredWorld(t)
	l := *w.kernel.Link(ipsec1)
	l.Name = name
	w.rename(&l)
	w.routing(routes.LinkSet{Link: &l})
	w.settle()
	w.took()
	w.crash(dedicatedOff())
	w.start(tunnelPolicy, tunnelSA)
	if ops := w.took(); len(ops) > 0 {
		t.Errorf("written:\n%s", strings.Join(ops, "\n"))
	}
	if h := w.hold(tso); h.State != StateInPlace || h.Device != name {
		t.Errorf("the report says %+v", h)
	}
	w.dumpXFRM()
	w.settle()
	w.advance(time.Minute)
	if off := w.held(ipsec1); off != "" {
		t.Errorf("not given back under its new name: %q", off)
	}
}

func TestHoldOfAnotherDeviceIsDropped(t *testing.T) {
	var cfg Config
	cfg.Plan.Dedicated = "off"
	for name, c := range map[string]struct {
		link    *routes.Link
		dropped bool
	}{
		"another name":                 {&routes.Link{Index: ipsec1, Name: "eth9", Type: 1, MTU: 1500, Up: true}, true},
		"same name, another address":   {&routes.Link{Index: ipsec1, Name: "ipsec1", Type: 1, MTU: 1500, Up: true, PermAddr: "02:00:00:00:00:99"}, true},
		"other name, the same address": {&routes.Link{Index: 2, Name: "wan0", Type: 1, MTU: 1500, Up: true, PermAddr: "02:00:00:00:00:02"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := coveredWorld(t)
			if !c.dropped { // hold a device with a permanent address instead
				w.xfrm(gone(tunnelPolicy))
				w.settle()
				w.advance(time.Minute)
				w.xfrm(policy(73, "0.0.0.0/0", "0.0.0.0/0", 0), sa(0x400, 0))
				w.settle()
				if w.held(2) != allTSO {
					t.Fatalf("off on nic1: %q", w.held(2))
				}
			}
			w.crash(cfg)
			w.rename(c.link)
			w.routing(routes.LinkSet{Link: c.link})
			w.start()
			w.advance(time.Minute)
			if c.dropped {
				if n := w.count("set "); n > 0 {
					t.Errorf("another device was touched:\n%s", strings.Join(w.ops, "\n"))
				}
				if f := w.a.Report().Findings; len(f) == 0 || !strings.Contains(f[0], "its features stay as they are") {
					t.Errorf("findings %q", f)
				}
			} else if w.held(2) != "" {
				t.Errorf("not given back under its new name: %q", w.held(2))
			}
			if i := slices.IndexFunc(w.ids(), func(id string) bool { return strings.HasPrefix(id, "feature/") }); i >= 0 {
				t.Errorf("the journal still has %s", w.ids()[i])
			}
		})
	}
}

func TestRouteThatItsOwnerChangedWhileWeWereAwayStays(t *testing.T) {
	w := coveredWorld(t)
	w.routing(routes.RouteSet{Route: newRoute(t, "10.2.0.0/16", hop{oif: ipsec1, mtu: routes.MTUMetric{MTU: 1300}}), Replace: true})
	w.crash(dedicatedOff())
	w.start()
	w.advance(time.Minute)
	if got := w.route("10.2.0.0/16"); got != "dev 7 mtu 1300" {
		t.Errorf("the route is %q", got)
	}
}
