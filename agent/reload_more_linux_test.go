package agent

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
)

// TestReloadToEnforceGivesBackWhatAnEarlierRunHasLeft in namespaces that nobody follows, as a start with that configuration does.
func TestReloadToEnforceGivesBackWhatAnEarlierRunHasLeft(t *testing.T) {
	s := depart(t, "a", "b")
	if s == nil {
		return
	}
	s.crash()
	looking := s.cfg
	looking.Mode, looking.Namespaces = Observe, Namespaces{netns.Host, "b"}
	o := &passage{sail(t, looking), looking}
	o.state("b", NetnsFollowed)
	locked(t, "", "a", "b") // who only looks leaves it
	if list, err := o.ordered(t.Context(), "", &api.Paused{By: byRoot}); err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	// b is let go in the same reload, of an agent that only looks, which has its journal open until it has left.
	o.cfg.Mode, o.cfg.Namespaces = Enforce, Namespaces{netns.Host}
	if err := o.Reload(t.Context(), o.cfg); err == nil {
		t.Error("b is paused, and is let go")
	}
	if _, err := o.ordered(t.Context(), "b", nil); err != nil {
		t.Fatal(err)
	}
	release := o.agent("b").hang(t)
	defer release()
	o.reload(o.cfg)
	o.state("b", NetnsLeaving)
	o.looked()
	locked(t, "a", "b") // as long as all are paused
	resumed := make(chan error, 1)
	go func() { _, err := o.ordered(t.Context(), "", nil); resumed <- err }()
	netnstest.Within(t, "nobody is paused", func() bool { o.mu.Lock(); defer o.mu.Unlock(); return o.paused == nil })
	o.looked()
	release()
	if err := <-resumed; err != nil {
		t.Fatal(err)
	}
	netnstest.Within(t, "a and b are bare", func() bool { return ours(t, "a")+ours(t, "b") == "" })
	netnstest.Within(t, "their journals are gone", func() bool { return len(o.dirs()) == 0 })
	locked(t, "")
	if r := o.Report(); r == nil || len(r.Findings) > 0 {
		t.Errorf("report %+v", r)
	}
}

// looked has a fleet look for what came, went or is due, and waits until it has.
func (s *sailing) looked() {
	s.t.Helper()
	s.poke()
	netnstest.Within(s.t, "it looks", func() bool { return len(s.look) == 0 })
	answer := make(chan struct{})
	s.pings <- answer
	<-answer
	netnstest.Within(s.t, "it has looked", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return !s.recalling })
}

// TestReloadToEnforceGivesBackInTheHostsNamespace where that is not followed.
func TestReloadToEnforceGivesBackInTheHostsNamespace(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	s.crash()
	looking := s.cfg
	looking.Mode, looking.Namespaces = Observe, Namespaces{"a"}
	o := sail(t, looking)
	o.state("a", NetnsFollowed)
	locked(t, "", "a")
	looking.Mode = Enforce
	if err := o.Reload(t.Context(), looking); err != nil {
		t.Fatal(err)
	}
	netnstest.Within(t, "the host's is bare", func() bool { return ours(t, "") == "" })
	locked(t, "a")
}

// TestCountersGoOnWithAReload, as the process is the same.
func TestCountersGoOnWithAReload(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	type sums struct{ rounds, events, actions, rules, dumps uint64 }
	read := func() map[string]sums {
		out := map[string]sums{}
		for _, o := range s.Observations() {
			n := sums{rounds: o.Counters.Rounds, events: o.Counters.Events, actions: o.Counters.Actions, rules: o.Figures.Actions[ActRule][Done]}
			for _, src := range o.Sources {
				n.dumps += src.Dumps
			}
			out[o.Netns] = n
		}
		return out
	}
	var last map[string]sums
	netnstest.Within(t, "both have a rule", func() bool { last = read(); return last[""].rules > 0 && last["a"].rules > 0 })
	for i := range 2 {
		old := map[string]*Agent{"": s.agent(netns.Host), "a": s.agent("a")}
		s.cfg.Plan.PresumeMTU = 1300 + i
		s.reload(s.cfg)
		lockedAt(t, strconv.Itoa(s.cfg.Plan.PresumeMTU), "", "a")
		netnstest.Within(t, "other agents", func() bool { return s.agent(netns.Host) != old[""] && s.agent("a") != old["a"] && len(read()) == 2 })
		now := read()
		for _, ns := range []string{"", "a"} {
			was, is := last[ns], now[ns]
			if was.rules == 0 || is.rules < was.rules || is.rounds <= was.rounds || is.events <= was.events || is.actions <= was.actions || is.dumps <= was.dumps {
				t.Errorf("%q: %+v, was %+v", ns, is, was)
			}
		}
		last = now
	}
}

// clings has the host's agent hang until it is released, and no other table taken over in its place: there is a claim on the numbers that are left, which
// nothing but that agent knows, and nothing takes away.
func (s *passage) clings(t *testing.T) (release func()) {
	t.Helper()
	host := s.agent(netns.Host)
	if err := host.call(t.Context(), func() {
		if err := host.journal.Put(entry("tables-too", kindTables, ownTables{Table: 5450, Protocol: 84})); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	return host.hang(t)
}

// TestReloadThatOneNamespaceCannotTakeOver goes back in all of them: also the one that has its rules in the other table already.
func TestReloadThatOneNamespaceCannotTakeOver(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	release := s.clings(t)
	next := s.cfg
	next.Plan.Table = 6000
	if err := s.Reload(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	netnstest.Within(t, "a has the other table", func() bool { return strings.Contains(netnstest.Show(t, "-n a rule show"), "lookup 6000") })
	release()
	locked(t, "", "a")
	if got := netnstest.Show(t, "-n a rule show"); strings.Contains(got, "6000") {
		t.Errorf("the rules of the table that was refused are left:\n%s", got)
	}
	if st := s.Status(); st.ReloadError == "" || s.Config().Plan.Table != 5450 {
		t.Errorf("status %+v, table %d", st, s.Config().Plan.Table)
	}
}

// TestNamespacesOfARefusedReloadAreLetGo: who comes with a configuration that the host's agent can't take over is let go again, and who was to go is
// followed on.
func TestNamespacesOfARefusedReloadAreLetGo(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	named(t, "b")
	cover(t, "b")
	release := s.clings(t)
	next := s.cfg
	next.Plan.Table = 6000
	next.Namespaces = Namespaces{netns.Host, "b"}
	if err := s.Reload(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	netnstest.Within(t, "b is followed", func() bool { return strings.Contains(netnstest.Show(t, "-n b rule show"), "lookup 6000") })
	netnstest.Within(t, "a is let go", func() bool { return ours(t, "a") == "" })
	release()
	locked(t, "", "a")
	netnstest.Within(t, "b is let go", func() bool { return ours(t, "b") == "" })
}

// slowLog calls a function for each line, which may not return for a while.
type slowLog struct {
	slog.Handler
	line func(string)
}

// Handle calls the function.
func (l slowLog) Handle(_ context.Context, r slog.Record) error { l.line(r.Message); return nil }

// TestSlowLogHoldsNobodyUp: what is said of namespaces that come, go and are missed is said without the lock that all who ask need.
func TestSlowLogHoldsNobodyUp(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a")
	var said [3]atomic.Bool
	lines := []string{"a namespace is not followed", "a namespace is called differently now", "a namespace's last name is gone: giving everything back and letting it go"}
	s := sailBy(t, fleetConfig(t, netns.Host, "a", "alias", "b"), func(f *Fleet) {
		f.log = slog.New(slowLog{f.log.Handler(), func(line string) {
			for i := range lines {
				if lines[i] != line {
					continue
				}
				said[i].Store(true)
				asked := make(chan struct{})
				go func() { f.Status(); close(asked) }()
				select {
				case <-asked:
				case <-time.After(2 * time.Second):
					t.Errorf("nobody gets an answer while the log has %q", line)
				}
			}
		}})
	})
	s.state("a", NetnsFollowed)
	bind(t, "a", "alias")
	netnstest.Within(t, "both names", func() bool { return len(s.state("a", NetnsFollowed).Names) == 2 })
	netnstest.IP(t, "netns del a")
	netnstest.Within(t, "another name", func() bool { return s.state("alias", NetnsFollowed).Name == "alias" })
	netnstest.IP(t, "netns del alias")
	s.state("alias", NetnsWaiting)
	for i := range lines {
		if !said[i].Load() {
			t.Errorf("it was never said: %s", lines[i])
		}
	}
}
