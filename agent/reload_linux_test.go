package agent

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tsoagent/agent/client"
	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
)

// own makes in the process's own namespace what named makes in others.
func own(t *testing.T) {
	t.Helper()
	netnstest.IP(t, `link set lo up
link add n0 type veth peer name n1
link set n0 up
link set n1 up
addr add 192.0.2.1/24 dev n0
addr add 10.1.0.1/16 dev n0
route add default via 192.0.2.254
addr add fd00::1/64 dev n0 nodad
addr add fd01::1/32 dev n0 nodad
route add default via fd00::254`)
}

// lockedAt waits until what is covered in some namespaces is locked at an MTU.
func lockedAt(t *testing.T, mtu string, namespaces ...string) {
	t.Helper()
	for _, ns := range namespaces {
		netnstest.Within(t, "locks at "+mtu+" in "+ns, func() bool {
			s := ours(t, ns)
			return strings.Count(s, "mtu lock "+mtu) == 2 && strings.Contains(s, "to 10.3.0.0/16 lookup 5450") && strings.Contains(s, "to fd03::/32 lookup 5450")
		})
	}
}

// monitor collects what changes in a namespace's rules until it is called.
func monitor(t *testing.T, ns string) (stop func() string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "ip", append(strings.Fields(inside(ns)), "monitor", "rule")...)
	out := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// It listens once it tells of this.
	netnstest.Within(t, "ip monitor listens", func() bool {
		netnstest.IP(t, inside(ns)+"rule add to 203.0.113.9 lookup 99\n"+inside(ns)+"rule del to 203.0.113.9 lookup 99")
		return strings.Contains(out.String(), "203.0.113.9")
	})
	return func() string {
		// All that came before this has been told when this is.
		netnstest.IP(t, inside(ns)+"rule add to 203.0.113.10 lookup 99\n"+inside(ns)+"rule del to 203.0.113.10 lookup 99")
		netnstest.Within(t, "ip monitor has told all", func() bool { return strings.Count(out.String(), "203.0.113.10") == 2 })
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		var b bytes.Buffer
		for line := range strings.Lines(out.String()) {
			if !strings.Contains(line, "203.0.113.") {
				b.WriteString(line)
			}
		}
		return b.String()
	}
}

// A passage is a fleet that gets other configurations under way. What is covered in its namespaces is locked.
type passage struct {
	*sailing
	cfg Config
}

// depart makes namespaces besides the host's, and a fleet that follows all of them. It is nil in the test's first process.
func depart(t *testing.T, names ...string) *passage {
	t.Helper()
	return departBy(t, func(*Fleet) {}, names...)
}

// departBy is depart with something changed ahead.
func departBy(t *testing.T, change func(*Fleet), names ...string) *passage {
	t.Helper()
	if !netnstest.Private(t) {
		return nil
	}
	checkLeaks(t)
	own(t)
	named(t, names...)
	all := append([]string{""}, names...)
	for _, ns := range all {
		cover(t, ns)
	}
	cfg := fleetConfig(t, append([]string{netns.Host}, names...)...)
	s := sailBy(t, cfg, change)
	locked(t, all...)
	return &passage{s, cfg}
}

// agent is the one that a member has, by a name.
func (s *sailing) agent(name string) *Agent {
	s.t.Helper()
	a, err := s.agentOf(name)
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

// control is the fleet's control socket, once it answers.
func (s *sailing) control() *client.Client {
	s.t.Helper()
	c := serveIn(s.t, s.cfg.RunDir, s.Serve)
	netnstest.Within(s.t, "the socket answers", func() bool { _, err := c.Namespaces(s.t.Context()); return err == nil })
	return c
}

// hang has an agent's loop do nothing until it is called.
func (a *Agent) hang(t *testing.T) (release func()) {
	t.Helper()
	held, free := make(chan struct{}), make(chan struct{})
	go func() { _ = a.call(context.Background(), func() { close(held); <-free }) }()
	<-held
	return sync.OnceFunc(func() { close(free) })
}

func (s *sailing) reload(cfg Config) {
	s.t.Helper()
	select { // of the start, or of an earlier one
	case <-s.Ready():
	default:
	}
	if err := s.Reload(s.t.Context(), cfg); err != nil {
		s.t.Fatal(err)
	}
	select {
	case <-s.Ready():
	case <-time.After(20 * time.Second):
		s.t.Fatal("not ready after the reload")
	}
}

// TestReloadTakesEffectAndNothingIsBareInBetween changes an MTU in two namespaces.
func TestReloadTakesEffectAndNothingIsBareInBetween(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	cfg := s.cfg
	host, a := monitor(t, ""), monitor(t, "a")
	cfg.Plan.PresumeMTU = 1380
	s.reload(cfg)
	lockedAt(t, "1380", "", "a")
	if got := host() + a(); got != "" {
		t.Errorf("rules came or went:\n%s", got)
	}
	if st := s.Status(); st.ReloadError != "" || st.Configured.Before(st.Since) {
		t.Errorf("status %+v", st)
	}
	// The same once more is no reload.
	before, err := s.reportOf(s.t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	s.reload(cfg)
	if after, err := s.reportOf(s.t.Context(), ""); err != nil || after.Since != before.Since {
		t.Errorf("another agent for the same configuration: %v, %v", after, err)
	}
	// What the new ones hold is given back as ever.
	netnstest.IP(t, "xfrm policy flush\n-n a xfrm policy flush")
	netnstest.Within(t, "all is given back", func() bool { return ours(t, "")+ours(t, "a") == "" })
	cover(t, "a")
	lockedAt(t, "1380", "a")
	s.stop()
	bare(t, "", "a")
}

// TestReloadToObserveAndToOtherNumbers gives back what nobody would follow.
func TestReloadToObserveAndToOtherNumbers(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	cfg := s.cfg
	observe := cfg
	observe.Mode = Observe
	s.reload(observe)
	bare(t, "") // ahead of Ready
	netnstest.Within(t, "a is bare", func() bool { return ours(t, "a") == "" })
	if r, err := s.reportOf(s.t.Context(), ""); err != nil || r.Mode != Observe || len(r.Coverages) != 2 {
		t.Errorf("report %+v, %v", r, err)
	}
	s.reload(cfg)
	locked(t, "", "a")
	moved := cfg
	moved.Plan.Table = 6000
	s.reload(moved)
	if got := netnstest.Show(t, "rule show"); strings.Contains(got, "5450") {
		t.Errorf("the rules of the old table are left:\n%s", got)
	}
	netnstest.Within(t, "the other table", func() bool {
		return strings.Contains(netnstest.Show(t, "rule show"), "lookup 6000") && strings.Contains(netnstest.Show(t, "-n a rule show"), "lookup 6000")
	})
	s.stop()
	if got := netnstest.Show(t, "rule show") + netnstest.Show(t, "-n a rule show"); strings.Contains(got, "proto 84") {
		t.Errorf("left:\n%s", got)
	}
}

// TestReloadFollowsOtherNamespaces lets one go and takes another one on.
func TestReloadFollowsOtherNamespaces(t *testing.T) {
	s := depart(t) // nothing watches names yet
	if s == nil {
		return
	}
	cfg := s.cfg
	named(t, "a", "b")
	cover(t, "a")
	cover(t, "b")
	cfg.Namespaces = Namespaces{netns.Host, "a"}
	s.reload(cfg)
	locked(t, "", "a")
	bare(t, "b")
	cfg.Namespaces = Namespaces{netns.Host, "b"}
	s.reload(cfg)
	locked(t, "", "b")
	netnstest.Within(t, "a is let go", func() bool { return ours(t, "a") == "" })
	cfg.Namespaces = Namespaces{netns.Host, "b", "later"}
	s.reload(cfg)
	s.state("later", NetnsWaiting)
	named(t, "later")
	cover(t, "later")
	locked(t, "later")
	s.stop()
	bare(t, "", "a", "b", "later")
}

// TestReloadRefusesWhatTakesARestart changes nothing then.
func TestReloadRefusesWhatTakesARestart(t *testing.T) {
	s := depart(t)
	if s == nil {
		return
	}
	cfg := s.cfg
	for what, change := range map[string]func(*Config){
		"run_dir":             func(c *Config) { c.RunDir = filepath.Join(c.RunDir, "other") },
		"namespaces has host": func(c *Config) { c.Namespaces = Namespaces{"a"} },
	} {
		next := cfg
		next.Plan.PresumeMTU = 1300
		change(&next)
		err := s.Reload(t.Context(), next)
		if !errors.Is(err, ErrNeedsRestart) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
		if got := s.Status().ReloadError; err == nil || got != err.Error() {
			t.Errorf("%s: the status says %q", what, got)
		}
	}
	s.RefuseReload(errors.New("no YAML"))
	if got := s.Status().ReloadError; got != "no YAML" {
		t.Errorf("the status says %q", got)
	}
	lockedAt(t, "1400", "")
	s.reload(cfg)
	if got := s.Status().ReloadError; got != "" {
		t.Errorf("after a good one the status says %q", got)
	}
}

// TestStopWhileAReloadReads comes before the next agents have read anything: what the ones before it left is
// given back all the same.
func TestStopWhileAReloadReads(t *testing.T) {
	s := departBy(t, func(f *Fleet) { // nothing holds the stop up
		f.openHook = func() (keyHook, error) { return nil, errors.New("not here") }
	}, "a")
	if s == nil {
		return
	}
	cfg := s.cfg
	cfg.Plan.PresumeMTU = 1380
	if err := s.Reload(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	s.stop()
	bare(t, "", "a")
	if err := s.Reload(t.Context(), cfg); !errors.Is(err, errEndedAgent) {
		t.Errorf("a reload after the end: %v", err)
	}
}

// TestAnHeirGivesBackAlsoUnread is what TestStopWhileAReloadReads may have no time for: the agent that is to take over
// is told to stop ahead of everything that it could read. Any other one leaves what it has found, and says so.
func TestAnHeirGivesBackAlsoUnread(t *testing.T) {
	ns := newNS(t)
	ns.wholeRoute()
	cfg := hostConfig(t)
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	for _, heir := range []string{"", takenOver} {
		a := ns.start(cfg)
		ns.shows("route show 10.2.0.0/16", "mtu lock 1400")
		a.crash()
		next, err := New(cfg, discard(), "test")
		if err != nil {
			t.Fatal(err)
		}
		next.heir = heir
		err = errors.Join(next.Run(stopped), next.Close())
		if (err == nil) != (heir != "") {
			t.Errorf("heir %q: %v", heir, err)
		}
		if locked := strings.Contains(ns.show("route show 10.2.0.0/16"), "mtu lock 1400"); locked == (heir != "") {
			t.Errorf("heir %q: locked %v", heir, locked)
		}
	}
}

// TestReloadThatCannotBeTakenOver keeps the configuration before it.
func TestReloadThatCannotBeTakenOver(t *testing.T) {
	s := depart(t, "a")
	if s == nil {
		return
	}
	cfg := s.cfg
	// Somebody's claim on other numbers in the journal, which a start refuses.
	host := s.agent(netns.Host)
	odd := ownTables{Table: 7000, Protocol: 84}
	if err := host.call(t.Context(), func() {
		if err := host.journal.Put(entry("tables", kindTables, odd)); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	next := cfg
	next.Plan.PresumeMTU = 1380
	if err := s.Reload(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	// With either configuration it can't be opened: the agent ends, and says what helps.
	err := <-s.done
	s.end.Do(func() {})
	if err == nil || !strings.Contains(err.Error(), "tsoctl restore --table 7000") {
		t.Errorf("Run: %v", err)
	}
	if got := s.Status().ReloadError; !strings.Contains(got, "7000") || s.Config().Plan.PresumeMTU != 1400 {
		t.Errorf("the status says %q, presume_mtu is %d", got, s.Config().Plan.PresumeMTU)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestAliveFailsWhereALoopHangs has a loop hang for a while.
func TestAliveFailsWhereALoopHangs(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a")
	s := sail(t, fleetConfig(t, netns.Host, "a"))
	s.state("a", NetnsFollowed)
	if err := s.Alive(t.Context()); err != nil {
		t.Error(err)
	}
	release := s.agent("a").hang(t)
	defer release()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := s.Alive(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "namespace a ") {
		t.Errorf("a loop hangs, and yet: %v", err)
	}
	release()
	if err := s.Alive(t.Context()); err != nil {
		t.Errorf("it goes on, and yet: %v", err)
	}
}

// TestReloadOverTheControlSocket says what came of it.
func TestReloadOverTheControlSocket(t *testing.T) {
	s := depart(t)
	if s == nil {
		return
	}
	cfg := s.cfg
	c := s.control()
	status := func(err error) int {
		var e *client.Error
		if !errors.As(err, &e) {
			return 0
		}
		return e.Status
	}
	if _, err := c.Reload(t.Context()); status(err) != http.StatusNotImplemented {
		t.Errorf("nothing to read: %v", err)
	}
	next := cfg
	var wrong error
	s.OnReload(func(ctx context.Context) error {
		if wrong != nil {
			s.RefuseReload(wrong)
			return wrong
		}
		return s.Reload(ctx, next)
	})
	if a, err := c.Reload(t.Context()); err != nil || a.Changed {
		t.Errorf("the same: %+v, %v", a, err)
	}
	next.Plan.PresumeMTU = 1380
	a, err := c.Reload(t.Context())
	if err != nil || !a.Changed || !a.Configured.Equal(s.Status().Configured) {
		t.Errorf("another one: %+v, %v", a, err)
	}
	if got := ours(t, ""); !strings.Contains(got, "mtu lock 1380") {
		t.Errorf("it was in use, and yet:\n%s", got)
	}
	wrong = errors.New("x.yaml:7: mtu: no")
	if _, err := c.Reload(t.Context()); status(err) != http.StatusConflict || !strings.Contains(err.Error(), "stays in use:\nx.yaml:7: mtu: no") {
		t.Errorf("a wrong one: %v", err)
	}
	wrong = ErrStopping
	if _, err := c.Reload(t.Context()); status(err) != http.StatusServiceUnavailable || strings.Contains(err.Error(), "refused") {
		t.Errorf("one that came too late: %v", err)
	}
	wrong = nil
	next.RunDir += "x"
	if _, err := c.Reload(t.Context()); status(err) != http.StatusConflict || !strings.Contains(err.Error(), "run_dir") {
		t.Errorf("one that takes a restart: %v", err)
	}
}
