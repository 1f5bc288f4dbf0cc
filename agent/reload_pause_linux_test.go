package agent

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
	"tsoagent/routes"
)

// TestReloadKeepsPausesAndEvents has a pause and those who follow events outlast other configurations, in the agent's own namespace and in
// others.
func TestReloadKeepsPausesAndEvents(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	cfg := s.cfg
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := s.control()
	followed := make(chan error, 2)
	told := make(chan string, 2*maxEvents)
	for _, name := range []string{"", "a"} {
		go func() {
			followed <- c.Follow(ctx, name, 0, func(e api.EventLine) error { told <- name + ":" + e.Text; return nil })
		}()
	}
	hear := func(want ...string) {
		t.Helper()
		late := time.After(20 * time.Second)
		for len(want) > 0 {
			select {
			case text := <-told:
				want = slices.DeleteFunc(want, func(w string) bool { return w == text })
			case <-late:
				t.Fatalf("not told: %q", want)
			}
		}
	}
	hear(":ready: mode enforce, coverages 2", "a:ready: mode enforce, coverages 2") // they follow
	pause := func(name string, p api.PauseRequest) {
		t.Helper()
		said, err := c.Pause(ctx, name, p)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range said.Namespaces {
			if n.Paused == nil || n.Why != "" || n.Paused.Left != 0 {
				t.Errorf("%+v", n)
			}
		}
	}
	paused := func(name string) *api.Paused {
		t.Helper()
		var p *api.Paused
		netnstest.Within(t, "a report", func() bool {
			r, err := c.ReportIn(ctx, name)
			if err == nil {
				p = r.Paused
			}
			return err == nil
		})
		return p
	}
	first, err := c.EventsIn(ctx, "a", 0)
	if err != nil {
		t.Fatal(err)
	}
	pause("", api.PauseRequest{For: "1h"})
	was := paused("a")
	cfg.Plan.PresumeMTU = 1380
	s.reload(cfg)
	hear(":"+takenOver, "a:"+takenOver)
	netnstest.Within(t, "the other one has read all", func() bool { r, err := c.ReportIn(ctx, "a"); return err == nil && r.Since.After(was.Since) })
	for _, name := range []string{"", "a"} {
		now := paused(name)
		if now == nil || !now.Until.Equal(was.Until) || !now.Since.Equal(was.Since) {
			t.Errorf("%q: %+v, was %+v", name, now, was)
		}
	}
	lockedAt(t, "1400", "", "a")
	if l, err := c.EventsIn(ctx, "a", 0); err != nil || !l.Since.Equal(first.Since) || l.Last <= first.Last || len(l.Events) != int(l.Last) {
		t.Errorf("events %+v, %v", l, err)
	}
	// What would have everything given back is refused meanwhile.
	next := cfg
	next.Plan.Table = 6000
	if err := s.Reload(ctx, next); err == nil || !strings.Contains(err.Error(), "is paused") || s.Config().Plan.Table != 5450 {
		t.Errorf("with a pause and another table: %v", err)
	}
	if _, err := c.Resume(ctx, ""); err != nil {
		t.Fatal(err)
	}
	lockedAt(t, "1380", "", "a")

	// Where all is given back already there is nothing in its way; a pause that is over is none for the next agent.
	pause("", api.PauseRequest{Restore: true})
	bare(t, "", "a")
	s.mu.Lock()
	for _, m := range s.members {
		if m.names[0] == "a" {
			m.paused.Until = was.Since // long ago; its agent was told of none
		}
	}
	s.mu.Unlock()
	s.reload(next)
	bare(t, "")
	if p := paused(""); p == nil || !p.Restore {
		t.Errorf("after the reload: %+v", p)
	}
	netnstest.Within(t, "a is locked again", func() bool { return strings.Contains(netnstest.Show(t, "-n a rule show"), "lookup 6000") })
	if p := paused("a"); p != nil {
		t.Errorf("a pause that was over goes on: %+v", p)
	}
	s.stop()
	for range 2 {
		if err := <-followed; err != nil {
			t.Errorf("followed: %v", err)
		}
	}
	hear(":stopping: on stop restore, holds 0, locks 0", "a:stopping: on stop restore, holds 0, locks 0")
}

// TestOrdersInTheMomentOfAReload come to loops that are to end: the ones in their places take them. Loops that hang make the
// moment last.
func TestOrdersInTheMomentOfAReload(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	type answer struct {
		list []api.PausedNamespace
		err  error
	}
	for i := range 12 {
		reloadFirst, restore := i%2 == 0, i%4 < 2
		release := []func(){s.agent(netns.Host).hang(t), s.agent("a").hang(t)}
		answers, reloaded := make(chan answer, 1), make(chan error, 1)
		order := func() {
			go func() {
				list, err := s.ordered(t.Context(), "", &api.Paused{By: byRoot, Restore: restore})
				answers <- answer{list, err}
			}()
			netnstest.Within(t, "the pause is noted", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.paused != nil })
		}
		reload := func() {
			s.cfg.Plan.PresumeMTU = 1300 + i
			go func(cfg Config) { reloaded <- s.Reload(t.Context(), cfg) }(s.cfg)
			if err := <-reloaded; err != nil {
				t.Fatal(err)
			}
		}
		if reloadFirst {
			reload()
			order()
		} else {
			order()
			reload()
		}
		for _, free := range release {
			free()
		}
		got := <-answers
		if got.err != nil || len(got.list) != 2 {
			t.Fatalf("%d: %+v, %v", i, got.list, got.err)
		}
		for _, n := range got.list {
			if n.Why != "" || n.Paused == nil || n.Paused.Restore != restore || n.Paused.Left != 0 {
				t.Errorf("%d: reload first %v, restore %v: %s: %q, %+v", i, reloadFirst, restore, n.Name, n.Why, n.Paused)
			}
		}
		if restore {
			bare(t, "", "a")
		}
		if got, err := s.ordered(t.Context(), "", nil); err != nil || got[0].Why != "" || got[1].Why != "" {
			t.Fatalf("%d: resumed %+v, %v", i, got, err)
		}
		lockedAt(t, strconv.Itoa(s.cfg.Plan.PresumeMTU), "", "a")
	}
}

// TestPauseDuringAReloadThatGivesBack is noted after the reload has begun to: the answer is that of the agent with the other table.
// With the one before it, it would be luck which of the two its loop hears first.
func TestPauseDuringAReloadThatGivesBack(t *testing.T) {
	s := depart(t)
	if s == nil {
		return
	}
	for i := range 8 {
		was := strconv.Itoa(int(s.Config().Plan.Table))
		netnstest.Within(t, "table "+was, func() bool { return strings.Contains(netnstest.Show(t, "rule show"), "lookup "+was) })
		release := s.agent(netns.Host).hang(t)
		s.cfg.Plan.Table = routes.TableID(6000 + 100*i)
		if err := s.Reload(t.Context(), s.cfg); err != nil {
			t.Fatal(err)
		}
		said := make(chan []api.PausedNamespace, 1)
		go func() {
			list, err := s.ordered(t.Context(), "host", &api.Paused{By: byRoot})
			if err != nil {
				t.Error(err)
			}
			said <- list
		}()
		netnstest.Within(t, "the pause is noted", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.members[s.host.ID()].paused != nil
		})
		release()
		if list := <-said; len(list) != 1 || list[0].Why != "" || list[0].Paused == nil {
			t.Fatalf("%+v", list)
		}
		if got := netnstest.Show(t, "rule show"); strings.Contains(got, "lookup "+was) {
			t.Errorf("paused, and yet table %s is still to be given back:\n%s", was, got)
		}
		if _, err := s.ordered(t.Context(), "host", nil); err != nil {
			t.Error(err)
		}
	}
}

// TestReloadThatLetsAPausedNamespaceGo is refused: everything would be given back in it.
func TestReloadThatLetsAPausedNamespaceGo(t *testing.T) {
	s := depart(t, "a", "b")
	if s == nil {
		return
	}
	if list, err := s.ordered(t.Context(), "a", &api.Paused{By: byRoot}); err != nil || list[0].Why != "" {
		t.Fatalf("%+v, %v", list, err)
	}
	next := s.cfg
	next.Namespaces = Namespaces{netns.Host, "b"}
	if err := s.Reload(t.Context(), next); err == nil || !strings.Contains(err.Error(), "namespace a is paused") {
		t.Errorf("it lets go: %v", err)
	}
	locked(t, "a")
	// One that is not paused may go, and a name more or another one is no matter.
	bind(t, "a", "alias")
	next.Namespaces = Namespaces{netns.Host, "alias"}
	s.reload(next)
	netnstest.Within(t, "b is let go", func() bool { return ours(t, "b") == "" })
	locked(t, "a")
	if list, err := s.ordered(t.Context(), "alias", &api.Paused{By: byRoot, Restore: true}); err != nil || list[0].Why != "" {
		t.Fatalf("%+v, %v", list, err)
	}
	next.Namespaces = Namespaces{netns.Host}
	s.reload(next)
	s.state("a", "")
	bare(t, "a", "b")
}
