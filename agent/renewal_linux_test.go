package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
)

// makesWay has the agents of namespaces make way for others with their state anew. They hear of it when they are released.
func (s *passage) makesWay(names ...string) (release func()) {
	s.t.Helper()
	var all []func()
	for _, ns := range names {
		a := s.agent(ns)
		all = append(all, a.hang(s.t))
		a.stout.Store(true)
	}
	if !s.slim() {
		s.t.Fatal("none makes way")
	}
	return func() {
		for _, release := range all {
			release()
		}
	}
}

// TestReloadGivesBackBehindARenewalThatLeavesAll: an agent that was told to leave what it holds to the next one has not heard of it when the
// configuration becomes one with which nobody would follow that.
func TestReloadGivesBackBehindARenewalThatLeavesAll(t *testing.T) {
	for name, leave := range map[string]func(s *passage) (release func()){
		"its state is made anew": func(s *passage) func() { return s.makesWay(netns.Host, "a") },
		"another reload": func(s *passage) func() {
			host, a := s.agent(netns.Host).hang(s.t), s.agent("a").hang(s.t)
			next := s.cfg
			next.Plan.PresumeMTU = 1380
			if err := s.Reload(s.t.Context(), next); err != nil {
				s.t.Fatal(err)
			}
			return func() { host(); a() }
		},
	} {
		for to, change := range map[string]func(*Config){
			"observe":       func(c *Config) { c.Mode = Observe },
			"another table": func(c *Config) { c.Plan.Table = 6000 },
		} {
			t.Run(name+", "+to, func(t *testing.T) {
				s := depart(t, "a")
				if s == nil {
					return
				}
				release := leave(s)
				defer release()
				next := s.cfg
				change(&next)
				if err := s.Reload(t.Context(), next); err != nil {
					t.Fatal(err)
				}
				release()
				for _, ns := range []string{"", "a"} {
					netnstest.Within(t, fmt.Sprintf("nothing of what was in place is in %q", ns), func() bool {
						return netnstest.Show(t, inside(ns)+"rule show table 5450") == ""
					})
					netnstest.Within(t, "it is followed with the newest one", func() bool {
						r, err := s.reportOf(t.Context(), ns)
						return err == nil && r.Mode == next.WithDefaults().Mode
					})
				}
				if got := s.Status().ReloadError; got != "" {
					t.Errorf("the configuration was refused: %s", got)
				}
			})
		}
	}
}

// TestNamespaceThatGoesWhileAnotherAgentTakesOver is given back, as a process still lives in it: no name leads there any more when the next agent
// is opened.
func TestNamespaceThatGoesWhileAnotherAgentTakesOver(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	pid, end := netnstest.Live(t, "a")
	defer end()
	release := s.makesWay("a")
	defer release()
	netnstest.IP(t, "netns del a")
	s.state("a", NetnsLeaving)
	release()
	s.state("a", NetnsWaiting)
	netnstest.IP(t, fmt.Sprintf("netns attach again %d", pid))
	bare(t, "again")
	if dirs := s.dirs(); len(dirs) > 0 {
		t.Errorf("journals are left: %v", dirs)
	}
}

// TestStateThatCannotBeMadeAnewAtOnce is no matter of the configuration: none was refused, and no other namespace's agent ends for it.
func TestStateThatCannotBeMadeAnewAtOnce(t *testing.T) {
	var path string
	back := sync.OnceFunc(func() {
		if err := errors.Join(os.Remove(path), os.Rename(path+".away", path)); err != nil {
			t.Error(err)
		}
	})
	s := departBy(t, func(f *Fleet) {
		path = filepath.Join(f.cfg.RunDir, "journal")
		f.log = slog.New(slowLog{f.log.Handler(), func(line string) {
			if strings.Contains(line, "can't be") {
				back()
			}
		}})
	}, "a")
	if s == nil {
		return
	}
	host, a := s.agent(netns.Host), s.agent("a")
	release := s.makesWay(netns.Host)
	defer release()
	if err := errors.Join(os.Rename(path, path+".away"), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	release()
	netnstest.Within(t, "another one", func() bool { now, err := s.agentOf(netns.Host); return err == nil && now != host })
	if got := s.Status().ReloadError; got != "" {
		t.Errorf("a configuration was refused: %s", got)
	}
	s.mu.Lock()
	if s.generation != 0 {
		t.Error("there is another configuration")
	}
	s.mu.Unlock()
	if s.agent("a") != a {
		t.Error("another agent in a")
	}
	locked(t, "", "a")
}

// TestReloadWhileTheStateIsMadeAnew comes to a host whose agent can't be opened just then, with whatever configuration: the one before stays in use.
func TestReloadWhileTheStateIsMadeAnew(t *testing.T) {
	var path string
	var s *passage
	s = departBy(t, func(f *Fleet) {
		path = filepath.Join(f.cfg.RunDir, "journal")
		f.log = slog.New(slowLog{f.log.Handler(), func(line string) {
			switch {
			case strings.Contains(line, "trying once more"):
				next := s.cfg
				next.Plan.PresumeMTU = 1300
				if err := s.Reload(t.Context(), next); err != nil {
					t.Error(err)
				}
			case strings.Contains(line, "the one before it stays in use"):
				if err := errors.Join(os.Remove(path), os.Rename(path+".away", path)); err != nil {
					t.Error(err)
				}
			}
		}})
	}, "a")
	if s == nil {
		return
	}
	host := s.agent(netns.Host)
	release := s.makesWay(netns.Host)
	defer release()
	if err := errors.Join(os.Rename(path, path+".away"), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	release()
	netnstest.Within(t, "another one", func() bool { now, err := s.agentOf(netns.Host); return err == nil && now != host })
	if s.Status().ReloadError == "" {
		t.Error("no configuration was refused")
	}
	locked(t, "", "a")
}
