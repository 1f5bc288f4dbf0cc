package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/client"
	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// These tests run on any kernel with XFRM policies, in a process with names of its own.

// named makes a namespace with a veth pair that is up and a default route of either family.
func named(t *testing.T, names ...string) {
	t.Helper()
	for _, ns := range names {
		netnstest.IP(t, strings.ReplaceAll(`netns add NS
-n NS link set lo up
-n NS link add n0 type veth peer name n1
-n NS link set n0 up
-n NS link set n1 up
-n NS addr add 192.0.2.1/24 dev n0
-n NS addr add 10.1.0.1/16 dev n0
-n NS route add default via 192.0.2.254
-n NS addr add fd00::1/64 dev n0 nodad
-n NS addr add fd01::1/32 dev n0 nodad
-n NS route add default via fd00::254`, "NS", ns))
	}
}

// cover adds a policy of either family to a namespace, "" for the host's.
func cover(t *testing.T, ns string) {
	t.Helper()
	netnstest.IP(t, inside(ns)+"xfrm policy add src 10.1.0.0/16 dst 10.3.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
	netnstest.IP(t, inside(ns)+"xfrm policy add src fd01::/32 dst fd03::/32 dir out tmpl src fd00::1 dst fd00::2 proto esp reqid 2 mode tunnel")
}

func inside(ns string) string {
	if ns == "" {
		return ""
	}
	return "-n " + ns + " "
}

// ours is what is in a namespace of ours, as a person sees it.
func ours(t *testing.T, ns string) string {
	t.Helper()
	all := ""
	for _, family := range []string{"-4 ", "-6 "} {
		rules := netnstest.Show(t, family+inside(ns)+"rule show")
		out, err := exec.Command("ip", strings.Fields(family+inside(ns)+"route show table 5450")...).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "does not exist") {
			t.Fatalf("ip route: %v\n%s", err, out)
		}
		all += rules + "\n" + string(out)
	}
	if !strings.Contains(all, "proto 84") {
		return ""
	}
	return all
}

func locked(t *testing.T, namespaces ...string) {
	t.Helper()
	lockedAt(t, "1400", namespaces...)
}

func bare(t *testing.T, namespaces ...string) {
	t.Helper()
	for _, ns := range namespaces {
		if s := ours(t, ns); s != "" {
			t.Errorf("left in %q:\n%s", ns, s)
		}
	}
}

// sailing is a fleet that runs.
type sailing struct {
	*Fleet
	t      *testing.T
	cancel context.CancelFunc
	done   chan error
	log    *lockedBuffer
	end    sync.Once
}

func sail(t *testing.T, cfg Config) *sailing {
	t.Helper()
	return sailBy(t, cfg, func(*Fleet) {})
}

// sailBy is sail with something changed ahead.
func sailBy(t *testing.T, cfg Config, change func(*Fleet)) *sailing {
	t.Helper()
	s := &sailing{t: t, done: make(chan error, 1), log: new(lockedBuffer)}
	var err error
	if s.Fleet, err = newFleet(t.Context(), cfg, slog.New(slog.NewTextHandler(s.log, nil)), "test", stopWithin); err != nil {
		t.Fatal(err)
	}
	change(s.Fleet)
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	go func() { s.done <- s.Run(ctx) }()
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("the fleet's log:\n%s", s.log)
		}
	})
	return s
}

// stop is SIGTERM, and waits for the end.
func (s *sailing) stop() {
	s.t.Helper()
	s.end.Do(func() {
		s.cancel()
		if err := errors.Join(<-s.done, s.Close()); err != nil {
			s.t.Errorf("Run: %v", err)
		}
	})
}

// crash ends the fleet as kill -9 does: nothing is given back, and the journals stay.
func (s *sailing) crash() {
	s.t.Helper()
	s.end.Do(func() {
		var agents []*Agent
		netnstest.Within(s.t, "no agent is about to start", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			agents = nil
			for _, m := range s.members {
				if m.agent != nil {
					agents = append(agents, m.agent)
				} else if m.why == "" {
					return false
				}
			}
			return true
		})
		for _, a := range agents {
			// One that only looks gives nothing back, whatever events come before it ends.
			if err := a.call(s.t.Context(), func() { a.cfg.Mode = Observe }); err != nil {
				s.t.Fatal(err)
			}
		}
		s.cancel()
		if err := <-s.done; err != nil {
			s.t.Errorf("Run: %v", err)
		}
		if err := s.Close(); err != nil {
			s.t.Errorf("Close: %v", err)
		}
	})
}

// state waits until a namespace is in a state, "" for not being there.
func (s *sailing) state(name, want string) NamespaceReport {
	s.t.Helper()
	var got NamespaceReport
	netnstest.Within(s.t, fmt.Sprintf("%s is %q", name, want), func() bool {
		list := s.namespaces()
		i := slices.IndexFunc(list, func(n NamespaceReport) bool { return slices.Contains(n.Names, name) })
		if i < 0 {
			return want == ""
		}
		got = list[i]
		return got.State == want
	})
	return got
}

// dirs are the journals of other namespaces.
func (s *sailing) dirs() []uint64 {
	s.t.Helper()
	list, err := knownNamespaces(s.cfg.RunDir)
	if err != nil {
		s.t.Fatal(err)
	}
	return list
}

func fleetConfig(t *testing.T, namespaces ...string) Config {
	t.Helper()
	cfg := hostConfig(t)
	cfg.Namespaces = namespaces
	return cfg
}

// bind gives a namespace another name, as mount --bind does.
func bind(t *testing.T, from, to string) {
	t.Helper()
	err := os.WriteFile(netns.Path(to), nil, 0o600)
	if err == nil {
		err = unix.Mount(netns.Path(from), netns.Path(to), "", unix.MS_BIND, "")
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestFleetFollowsNamespacesAsTheyComeAndGo(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	s := sail(t, fleetConfig(t, "all"))
	s.state("host", NetnsFollowed)
	named(t, "a", "b") // there is no /run/netns before
	s.state("a", NetnsFollowed)
	s.state("b", NetnsFollowed)
	cover(t, "a")
	locked(t, "a")
	bare(t, "b", "")
	cover(t, "b")
	locked(t, "b")
	if n := len(s.dirs()); n != 2 {
		t.Errorf("%d journals, want 2", n)
	}
	// Deleted, and made anew under the same name.
	netnstest.IP(t, "link add tob type veth peer name x0 netns b\nnetns del b")
	named(t, "b")
	netnstest.Within(t, "the deleted namespace dies", func() bool { return !strings.Contains(netnstest.Show(t, "-o link"), "tob") })
	netnstest.Within(t, "its journal goes", func() bool { return len(s.dirs()) == 2 && s.state("b", NetnsFollowed).Policies == 0 })
	cover(t, "b")
	locked(t, "a", "b")
	// Renamed: nothing changes in it.
	before, err := s.reportOf(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	bind(t, "a", "c")
	netnstest.IP(t, "netns del a")
	s.state("a", "")
	s.state("c", NetnsFollowed)
	after, err := s.reportOf(t.Context(), "c")
	if err != nil || after.Netns != "c" || after.Since != before.Since || after.Counters.Actions != before.Counters.Actions {
		t.Errorf("after the new name %+v, %v", after, err)
	}
	locked(t, "c")
	s.stop()
	bare(t, "b", "c", "")
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
	for _, want := range []string{`netns=a`, `netns=b`, `a namespace was let go" netns=b`, `called differently now" netns=c was=a`} {
		if !strings.Contains(s.log.String(), want) {
			t.Errorf("not in the log: %s", want)
		}
	}
	netnstest.IP(t, "netns del b\nnetns del c")
}

// Processes may live in a namespace that has no name any more: it is left as it was found.
func TestFleetGivesBackBeforeItLetsGo(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	for _, onStop := range []OnStop{RestoreOnStop, KeepOnStop} {
		named(t, "a")
		pid, end := netnstest.Live(t, "a")
		spec := fmt.Sprintf("pid:%d", pid)
		cfg := fleetConfig(t, "all")
		cfg.OnStop = onStop
		s := sail(t, cfg)
		cover(t, "a")
		locked(t, "a")
		netnstest.IP(t, "netns del a")
		s.state("a", "")
		if n := len(s.dirs()); n != 0 {
			t.Errorf("%s: %d journals are left", onStop, n)
		}
		ns, err := netns.Open(netns.Path(spec))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(ns.Do(func() error { bare(t, ""); return nil }), ns.Close()); err != nil {
			t.Error(err)
		}
		bind(t, spec, "again") // under a new name it is followed again
		s.state("again", NetnsFollowed)
		locked(t, "again")
		s.stop()
		end()
		netnstest.IP(t, "netns del again")
	}
}

func TestFleetRestartAdoptsWhatIsStillThere(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "stays", "renamed", "dies", "dropped", "hidden")
	all := []string{"stays", "renamed", "dies", "dropped", "hidden"}
	for _, ns := range all {
		cover(t, ns)
	}
	hidden, _ := netnstest.Live(t, "hidden")
	cfg := fleetConfig(t, "all")
	s := sail(t, cfg)
	locked(t, all...)
	s.crash()
	locked(t, all...)
	if n := len(s.dirs()); n != 5 {
		t.Fatalf("%d journals, want 5", n)
	}
	netnstest.IP(t, "netns del dies\nnetns del hidden")
	bind(t, "renamed", "other")
	netnstest.IP(t, "netns del renamed")
	cfg.Namespaces = Namespaces{"stays", "other", fmt.Sprintf("/proc/%d/ns/net", os.Getpid())}
	s = sail(t, cfg)
	s.state("stays", NetnsFollowed)
	s.state("other", NetnsFollowed)
	for _, ns := range []string{"stays", "other"} {
		r, err := s.reportOf(t.Context(), ns)
		if err != nil || r.Counters.Actions != 0 {
			t.Errorf("%s was not adopted untouched: %+v, %v", ns, r, err)
		}
	}
	locked(t, "stays", "other")
	// What is not followed any more is given back: by its name, and by the process in it.
	netnstest.Within(t, "dropped is given back", func() bool { return ours(t, "dropped") == "" })
	netnstest.Within(t, "only two journals are left", func() bool { return len(s.dirs()) == 2 })
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", hidden))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error { bare(t, ""); return nil }); err != nil {
		t.Error(err)
	}
	if got := strings.Count(s.log.String(), "journals of namespaces that are gone were removed"); got != 1 {
		t.Errorf("told %d times of journals that were removed", got)
	}
	s.stop()
	bare(t, "stays", "other")
}

func TestRestoreAllWithoutAnAgent(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b", "c")
	cfg := fleetConfig(t, "all")
	for _, ns := range []string{"a", "b", "c"} {
		cover(t, ns)
	}
	s := sail(t, cfg)
	locked(t, "a", "b", "c")
	if _, err := RestoreAll(t.Context(), cfg, discard(), "test", false); !errors.Is(err, ErrRunning) {
		t.Errorf("while an agent runs: %v", err)
	}
	if _, err := RestoreIn(t.Context(), "a", cfg, discard(), "test", false); !errors.Is(err, ErrRunning) {
		t.Errorf("in one namespace, while an agent runs: %v", err)
	}
	s.crash()
	if !LeftOver(cfg.RunDir).Tables {
		t.Error("nothing is known to be left")
	}
	netnstest.IP(t, "netns del c")
	one, err := RestoreIn(t.Context(), "a", cfg, discard(), "test", false)
	if err != nil || one.Netns != "a" || one.Rules != 2 || one.Clones != 2 {
		t.Errorf("one: %+v, %v", one, err)
	}
	bare(t, "a")
	locked(t, "b")
	// Without names in the configuration, too.
	cfg.Namespaces = nil
	done, err := RestoreAll(t.Context(), cfg, discard(), "test", false)
	if err != nil || len(done.Namespaces) != 1 || done.Namespaces[0].Netns != "b" || done.Namespaces[0].Rules != 2 || len(done.Findings) != 1 {
		t.Errorf("all: %+v, %v", done, err)
	}
	bare(t, "a", "b", "")
	if _, err := os.Stat(NamespaceDir(cfg.RunDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of journals is left: %v", err)
	}
	if done, err = RestoreAll(t.Context(), cfg, discard(), "test", false); err != nil || done.Actions != 0 || len(done.Namespaces) != 0 {
		t.Errorf("again: %+v, %v", done, err)
	}
}

// `ip netns exec a tsoctl restore`: the agent was started elsewhere, and has a's journal under its cookie.
func TestRestoreInsideOfANamespace(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a")
	cover(t, "a")
	cfg := fleetConfig(t, "all")
	s := sail(t, cfg)
	locked(t, "a")
	s.crash()
	ns, err := netns.Open(netns.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		for range 2 { // twice does no harm
			if done, err := RestoreAll(t.Context(), cfg, discard(), "test", false); err != nil || len(done.Namespaces) != 0 || done.Failed != 0 {
				t.Errorf("restore: %+v, %v", done, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	bare(t, "a")
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
	if left := LeftOver(cfg.RunDir).String(); left != "" {
		t.Errorf("left: %s", left)
	}
}

func TestFleetWithoutTheHost(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a")
	own(t)
	cover(t, "")
	cover(t, "a")
	cfg := fleetConfig(t, "host")
	s := sail(t, cfg)
	locked(t, "")
	s.state("host", NetnsFollowed) // its first round writes the lock before it ends
	if r := s.Report(); len(r.Namespaces) != 0 || r.Netns != "" {
		t.Errorf("a report of the host alone: %+v", r)
	}
	s.crash()
	cfg.Namespaces = Namespaces{"a"}
	s = sail(t, cfg) // what an earlier run left in the host's namespace is given back first
	bare(t, "")
	locked(t, "a")
	if r := s.Report(); !r.NotFollowed || len(r.Namespaces) != 1 || r.Degraded() {
		t.Errorf("report %+v", r)
	}
	if _, err := s.agentOf("host"); err == nil || !strings.Contains(err.Error(), "it follows a") {
		t.Errorf("asked for the host: %v", err)
	}
	for _, namespaces := range []Namespaces{{"a"}, {"host"}} {
		second := cfg
		second.Namespaces = namespaces
		if f, err := NewFleet(t.Context(), second, discard(), "test"); !errors.Is(err, ErrRunning) {
			t.Errorf("a second agent: %v, %v", f, err)
		}
	}
	s.stop()
	bare(t, "a", "")
	// A path to its own namespace is the host.
	cfg.Namespaces = Namespaces{"/proc/self/ns/net", "a"}
	s = sail(t, cfg)
	locked(t, "", "a")
	s.stop()
	bare(t, "", "a")
}

func TestFleetReportsWhatItWaitsFor(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	if err := os.MkdirAll(netns.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/run/netns/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := fleetConfig(t, "host", "later", "file", "/run/deep/er", "pid:4194303")
	s := sail(t, cfg)
	s.state("later", NetnsWaiting)
	netnstest.Within(t, "the first plan", func() bool { return s.Report() != nil })
	if r := s.Report(); !r.Degraded() || len(r.Findings) != 4 {
		t.Errorf("findings %q", r.Findings)
	}
	for name, want := range map[string]string{"later": "waiting", "file": "not a network namespace", "/run/deep/er": "waiting", "pid:4194303": "ended"} {
		if n := s.state(name, NetnsWaiting); !strings.Contains(n.Why, want) {
			t.Errorf("%s: %s", name, n.Why)
		}
		if _, err := s.agentOf(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("asked for %s: %v", name, err)
		} else if absent := new(AbsentError); !errors.As(err, &absent) || absent.Of != "netns" {
			t.Errorf("asked for %s: %v, want an AbsentError", name, err)
		}
	}
	named(t, "later")
	cover(t, "later")
	locked(t, "later")
	// The same by a path, and by another name of the configuration: it runs once.
	if err := os.MkdirAll("/run/deep", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/run/netns/later", "/run/deep/er"); err != nil {
		t.Fatal(err)
	}
	netnstest.Within(t, "the second name is known", func() bool { return len(s.state("/run/deep/er", NetnsFollowed).Names) == 2 })
	if n := s.state("later", NetnsFollowed); n.Name != "later" || len(s.dirs()) != 1 {
		t.Errorf("two names: %+v, %d journals", n, len(s.dirs()))
	}
	s.stop()
	bare(t, "later")
}

func TestFleetFollowsAProcess(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a")
	cover(t, "a")
	pid, end := netnstest.Live(t, "a")
	spec := fmt.Sprintf("pid:%d", pid)
	s := sail(t, fleetConfig(t, "host", spec))
	s.state(spec, NetnsFollowed)
	locked(t, "a")
	end()
	s.state(spec, NetnsWaiting)
	netnstest.Within(t, "it is let go", func() bool { return len(s.dirs()) == 0 })
	bare(t, "a") // which still has its name
	s.stop()
}

// What can't be given back in a namespace that is not followed any more doesn't hold up a stop.
func TestStopWhileADroppedNamespaceIsGivenBack(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b")
	netnstest.IP(t, "link add n0 type veth peer name n1")
	const grace = 200 * time.Millisecond
	// No veth has an MTU of 10: it is refused for ever.
	refused := func(spec string, cfg Config) {
		t.Helper()
		a, err := newAgentIn(spec, cfg, discard(), "test", (*Agent).open)
		if err != nil {
			t.Fatal(err)
		}
		err = a.in(func() error {
			ifi, err := net.InterfaceByName("n0")
			if err != nil {
				return err
			}
			return a.journal.Put(entry(mtuDeviceID(routes.Ifindex(ifi.Index)), kindDeviceMTU,
				deviceMTU{Index: routes.Ifindex(ifi.Index), Name: "n0", Kind: "veth", Claim: plan.MTUClaim{Was: 10, Ours: 1500}}))
		})
		if err := errors.Join(err, a.Close()); err != nil {
			t.Fatal(err)
		}
	}
	late := func(what string, began time.Time, err error) {
		t.Helper()
		if took := time.Since(began); took > 20*time.Second || err == nil || !strings.Contains(err.Error(), "1 device mtu") || !strings.Contains(err.Error(), "tsoctl restore") {
			t.Errorf("%s: after %s: %v", what, took, err)
		}
	}

	cfg := fleetConfig(t, "a")
	refused(netns.Host, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	began := time.Now()
	_, err := newFleet(ctx, cfg, discard(), "test", grace)
	late("the host's, at the start", began, err)

	cfg = fleetConfig(t, "host", "a")
	refused("b", cfg)
	log := new(lockedBuffer)
	f, err := newFleet(t.Context(), cfg, slog.New(slog.NewTextHandler(log, nil)), "test", grace)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	netnstest.Within(t, "it is tried", func() bool { return strings.Contains(log.String(), "can't be given back") })
	began = time.Now()
	cancel()
	late("another's, at the stop", began, errors.Join(<-done, f.Close()))
	if left := LeftOver(cfg.RunDir).DeviceMTUs; left != 1 {
		t.Errorf("the journal knows of %d", left)
	}
}

// A watcher whose socket ends is dialled again where it was, and not in the process's namespace.
func TestFleetDialsAgainInTheNamespace(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a")
	s := sail(t, fleetConfig(t, "host", "a"))
	s.state("a", NetnsFollowed)
	a, err := s.agentOf("a")
	if err != nil {
		t.Fatal(err)
	}
	a.sources.mu.Lock()
	err = errors.Join(a.sources.xfrm.Close(), a.sources.routes.Close(), a.sources.eth.Close())
	a.sources.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	netnstest.Within(t, "all watchers end", func() bool { return strings.Count(s.log.String(), `watcher ended`) == 3 })
	cover(t, "a")
	locked(t, "a")
	netnstest.IP(t, "-n a route replace default via 192.0.2.253")
	netnstest.Within(t, "the clone follows", func() bool { return strings.Contains(ours(t, "a"), "10.3.0.0/16 via 192.0.2.253") })
	bare(t, "")
	s.stop()
	bare(t, "a")
}

func TestFleetTellsOfAMissingCapability(t *testing.T) {
	const step = "TSOAGENT_FLEET_NOCAP"
	if os.Getenv(step) == "" {
		if !netnstest.Private(t) {
			return
		}
		setpriv, err := exec.LookPath("setpriv")
		if err != nil {
			t.Skip("needs setpriv (util-linux)")
		}
		named(t, "a")
		cmd := exec.Command(setpriv, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), step+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	s := sail(t, fleetConfig(t, "host", "a"))
	n := s.state("a", NetnsFailed)
	if !strings.Contains(n.Why, "CAP_SYS_ADMIN") {
		t.Errorf("why: %s", n.Why)
	}
	netnstest.Within(t, "the host is followed", func() bool { return s.Report() != nil })
	if r := s.Report(); !r.Degraded() || len(r.Namespaces) != 2 {
		t.Errorf("report %+v", r)
	}
	s.stop()
}

// A namespace that can't be entered is not gone: its journal stays.
func TestSweepKeepsJournalsOfWhatItCantLookAt(t *testing.T) {
	const step = "TSOAGENT_FLEET_SWEEP_NOCAP"
	if dir := os.Getenv(step); dir != "" {
		cfg := fleetConfig(t, "host")
		cfg.RunDir = dir
		s := sail(t, cfg)
		netnstest.Within(t, "a finding", func() bool {
			r := s.Report()
			return r != nil && strings.Contains(strings.Join(r.Findings, "\n"), "tsoctl restore")
		})
		s.stop()
		if _, err := RestoreAll(t.Context(), cfg, discard(), "test", false); err == nil {
			t.Error("a restore that could not look said nothing")
		}
		return
	}
	if !netnstest.Private(t) {
		return
	}
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip("needs setpriv (util-linux)")
	}
	named(t, "a")
	cover(t, "a")
	cfg := fleetConfig(t, "host", "a")
	s := sail(t, cfg)
	locked(t, "a")
	s.crash()
	cmd := exec.Command(setpriv, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), step+"="+cfg.RunDir)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
	locked(t, "a")
	if !LeftOver(cfg.RunDir).Tables {
		t.Error("the journal is gone, and what it knew is in place")
	}
	if _, err := RestoreAll(t.Context(), cfg, discard(), "test", false); err != nil {
		t.Error(err)
	}
	bare(t, "a")
}

func TestControlInNamespaces(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a")
	cover(t, "a")
	cfg := fleetConfig(t, "all")
	look := func() {
		t.Helper()
		r, err := LookIn(t.Context(), "a", cfg, discard(), "test", func(explain func(Question) (*Explanation, error)) error {
			e, err := explain(Question{Dst: netip.MustParseAddr("10.3.0.1"), From: netip.MustParseAddr("10.1.0.1")})
			if err == nil && (e.Action != "ipsec" || e.Device != "n0") {
				err = fmt.Errorf("explanation %+v", e)
			}
			return err
		})
		if err != nil || len(r.Coverages) != 2 || r.Netns != "a" || r.Live {
			t.Errorf("look: %+v, %v", r, err)
		}
	}
	look()
	if _, err := os.Stat(NamespaceDir(cfg.RunDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a look left something: %v", err)
	}
	s := sail(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	locked(t, "a")
	look()
	c := client.New(cfg.RunDir)
	netnstest.Within(t, "the socket", func() bool { _, err := c.Report(ctx); return err == nil })
	host, err := c.Report(ctx)
	if err != nil || host.Netns != "" || len(host.Namespaces) != 2 || host.Namespaces[1].Clones != 2 || len(host.Coverages) != 0 {
		t.Errorf("host: %+v, %v", host, err)
	}
	for _, name := range []string{"a"} {
		r, err := c.ReportIn(ctx, name)
		if err != nil || r.Netns != "a" || len(r.Coverages) != 2 || len(r.Namespaces) != 0 {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	q := Question{Dst: netip.MustParseAddr("10.3.0.1"), From: netip.MustParseAddr("10.1.0.1")}
	if e, err := c.ExplainIn(ctx, "a", q); err != nil || e.Device != "n0" || e.Action != "ipsec" {
		t.Errorf("explain in a: %+v, %v", e, err)
	}
	if e, err := c.Explain(ctx, q); err == nil {
		t.Errorf("the host has no route, and yet: %+v", e)
	}
	if list, err := c.Namespaces(ctx); err != nil || len(list) != 2 || list[0].Name != "host" || list[1].Name != "a" {
		t.Errorf("list: %+v, %v", list, err)
	}
	flowsIn(t, c, cfg)
	if list := s.Observations(); len(list) != 2 || list[0].Netns != "" || list[1].Netns != "a" || len(list[1].Coverages) != 2 {
		t.Errorf("reports: %+v", list)
	}
	_, err = c.ReportIn(ctx, "b")
	_, err2 := c.ExplainIn(ctx, "b", q)
	for _, err := range []error{err, err2} {
		if err == nil || !strings.Contains(err.Error(), `"b"; it follows a, host`) {
			t.Errorf("a namespace that is not followed: %v", err)
		}
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	s.stop()
	bare(t, "a")
	if _, err := LookIn(t.Context(), "b", cfg, discard(), "test", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a look at what is not there: %v", err)
	}
	if dirs, _ := filepath.Glob(filepath.Join(NamespaceDir(cfg.RunDir), "*")); len(dirs) != 0 {
		t.Errorf("left: %v", dirs)
	}
}

// TestNamesThatMeanOthers follows namespaces that are called like what the configuration has other meanings for, by their paths.
func TestNamesThatMeanOthers(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	names := []string{"all", "host", "pid:1"}
	named(t, names...)
	s := sail(t, fleetConfig(t, netns.All))
	for _, name := range names {
		s.state(filepath.Join(netns.Dir, name), NetnsFollowed)
	}
}
