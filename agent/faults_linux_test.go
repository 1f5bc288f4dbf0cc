package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// storm draws lines of ip that change all that the agent reads, in both families. Some fail, as what they are about is not there.
func storm(rng *rand.Rand, n int) []string {
	of := func(s ...string) string { return s[rng.IntN(len(s))] }
	var out []string
	for range n {
		a, b := rng.IntN(4), rng.IntN(8)
		v6 := rng.IntN(2) == 0
		family, dst, via, src, ends := "", of("10.3.0.0/16", fmt.Sprintf("10.3.%d.0/24", b), fmt.Sprintf("10.%d.0.0/16", 4+a)), of("192.0.2.254", "192.0.2.253"), of("10.1.0.0/16", "0.0.0.0/0"), "src 192.0.2.1 dst 192.0.2.2"
		if v6 {
			family, dst, via, src, ends = "-6 ", of("2001:db8:3::/48", fmt.Sprintf("2001:db8:3:%d::/64", b), fmt.Sprintf("2001:db8:%d::/48", 4+a)), of("2001:db8::fe", "2001:db8::fd"), of("2001:db8::/64", "::/0"), "src 2001:db8::1 dst 2001:db8::2"
		}
		switch rng.IntN(12) {
		case 0, 1, 2:
			out = append(out, family+"route replace "+dst+" via "+via+" dev n0")
		case 3:
			out = append(out, family+"route replace default via "+via+" dev n0")
		case 4, 5:
			out = append(out, family+"route del "+dst)
		case 6:
			out = append(out, family+fmt.Sprintf("rule %s from %s pref %d lookup %s", of("add", "del"), of("10.9.0.0/16", "10.8.0.0/16"), 100+a, of("main", "77")))
			if v6 {
				out[len(out)-1] = family + fmt.Sprintf("rule %s from fd00:9::/32 pref %d lookup %s", of("add", "del"), 100+a, of("main", "77"))
			}
		case 7:
			out = append(out, fmt.Sprintf("addr %s 10.44.%d.1/32 dev n0", of("add", "del"), b), fmt.Sprintf("-6 addr %s fd44::%x/128 dev n0 nodad", of("add", "del"), b+1))
		case 8:
			out = append(out, fmt.Sprintf("nexthop %s id %d via 192.0.2.254 dev n0", of("replace", "del"), 1+a))
		case 9:
			out = append(out, fmt.Sprintf("link set n1 mtu %d", 1480+20*rng.IntN(2)))
		case 10:
			out = append(out, fmt.Sprintf("xfrm policy %s src %s dst %s dir out priority %d tmpl %s proto esp reqid 1 mode tunnel", of("add", "update"), src, dst, a, ends))
		case 11:
			out = append(out, "xfrm policy delete src "+src+" dst "+dst+" dir out")
		}
	}
	return out
}

// force runs lines of ip as fast as it can, whatever comes of each. Where one of another object follows, it is another ip.
func (ns *testNS) force(lines []string) {
	ns.t.Helper()
	if inHostNS() {
		panic("a test would change the host's namespace")
	}
	for len(lines) > 0 {
		// A batch has neither policies, on the first of which that fails it ends, nor options ahead of a line.
		n := slices.IndexFunc(lines, func(l string) bool {
			return strings.HasPrefix(l, "xfrm") != strings.HasPrefix(lines[0], "xfrm") || strings.HasPrefix(l, "-6") != strings.HasPrefix(lines[0], "-6")
		})
		if n < 0 {
			n = len(lines)
		}
		args := []string{"-force", "-batch", "-"}
		if strings.HasPrefix(lines[0], "-6") {
			args = append([]string{"-6"}, args...)
		}
		cmd := exec.Command("ip", args...)
		cmd.Stdin = strings.NewReader(strings.ReplaceAll(strings.Join(lines[:n], "\n"), "-6 ", "") + "\n")
		_ = cmd.Run()
		lines = lines[n:]
	}
}

// wants is what a report says that is to be in place, whatever the tables' numbers.
func wants(r *Report) []string {
	var out []string
	for _, l := range r.Locks {
		out = append(out, fmt.Sprintf("lock %s mtu %d", l.Route, l.MTU))
	}
	for _, c := range r.Clones {
		out = append(out, fmt.Sprintf("clone %s mtu %d throw %t by %q", c.Dst, c.MTU, c.Throw, c.Devices))
	}
	for _, x := range r.Rules {
		text, _, _ := strings.Cut(x.Text, " lookup")
		out = append(out, fmt.Sprintf("rule %s %d %s", x.Family, x.Priority, text))
	}
	slices.Sort(out)
	return out
}

// exact waits until the agent has come to what one wants that reads the kernel now.
func (ns *testNS) exact(a *running, cfg Config) {
	ns.t.Helper()
	var d string
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); {
		fresh, err := Look(ns.t.Context(), cfg, discard(), "test", nil)
		if err != nil {
			ns.t.Fatal(err)
		}
		r := a.Report()
		if d = cmp.Diff(wants(fresh), wants(r)); d == "" && len(r.Stale) == 0 && a.rests() {
			return
		}
		// What rests for a minute, as it was fought over or moved while it was looked at, is tried again at the next event.
		if err := a.call(ns.t.Context(), func() { clear(a.st.fights); clear(a.st.withheld); clear(a.st.placed); clear(a.st.cloned) }); err != nil {
			ns.t.Fatal(err)
		}
		ns.ip("route replace 203.0.113.0/24 via 192.0.2.254\nroute del 203.0.113.0/24")
	}
	ns.t.Fatalf("the agent's plan is another one than from scratch (-from scratch +the agent's), stale %q:\n%s", a.Report().Stale, d)
}

// A scribe notes what the agent writes that is not its to write, by the port of its socket.
type scribe struct {
	cancel context.CancelFunc
	done   chan error
	mu     sync.Mutex
	wrong  []string
	seen   int
	lost   bool
}

// witness has all writes of an agent looked at, until wrong is called.
func (ns *testNS) witness(port uint32, own plan.Config) *scribe {
	ns.t.Helper()
	w, err := routes.Dial(routes.WatchOptions{})
	if err != nil {
		ns.t.Fatal(err)
	}
	s := &scribe{done: make(chan error, 1)}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	ready := make(chan struct{})
	go func() {
		s.done <- w.Run(ctx, func(evs []routes.Event) {
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, ev := range evs {
				if ev == (routes.ResyncEnd{}) {
					close(ready)
				}
				s.look(ev, port, own)
			}
		})
	}()
	<-ready
	return s
}

func (s *scribe) look(ev routes.Event, port uint32, own plan.Config) {
	wrote := func(o routes.Origin, mine bool, what any) {
		if o.Port != port {
			return
		}
		if s.seen++; !mine {
			s.wrong = append(s.wrong, fmt.Sprint(what))
		}
	}
	switch ev := ev.(type) {
	case routes.Lost:
		s.lost = true
	case routes.RouteSet:
		// In place it may lock what is covered: everything here but the routes of the kernel.
		locked := own.PresumeMTU > 0 && ev.Replace && ev.Route.Body.Protocol != routes.ProtoKernel && ev.Route.Body.Table == routes.TableMain
		wrote(ev.Origin, own.OwnRoute(ev.Route) || locked, ev.Route.Key())
	case routes.RouteGone:
		wrote(ev.Origin, own.OwnRoute(ev.Route), ev.Route.Key())
	}
}

func (s *scribe) check(t *testing.T) {
	t.Helper()
	s.cancel()
	if err := <-s.done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if s.lost {
		t.Error("the witness itself has lost something")
	}
	if len(s.wrong) > 0 || s.seen == 0 {
		t.Errorf("of %d writes of the agent these are of what is not its own: %q", s.seen, s.wrong)
	}
}

// settled are the lines of a snapshot when the kernel has done with its own routes, which stand in the order in which it came to them: those of IPv6
// addresses come and go a moment later.
func (ns *testNS) settled() []string {
	ns.t.Helper()
	within(ns.t, 30*time.Second, "each address has its route", func() bool {
		return strings.Count(ns.show("-6 -o addr show dev n0"), "fd44:") == strings.Count(ns.show("-6 route show table local"), "local fd44:")
	})
	lines := strings.Split(ns.snapshot(), "\n")
	slices.Sort(lines)
	return lines
}

// TestHostLosesEventsAndEndsExact runs an agent whose sockets hold next to nothing through storms of everything, while its loop stands still now and
// then, or its sockets are closed. When all is quiet it has come to what a fresh look wants, and has written to nothing but its own; when it has gone,
// the kernel is what the same changes leave without an agent.
func TestHostLosesEventsAndEndsExact(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 7))
	var storms [][]string
	for range 6 {
		burst := make([]string, 0, 1000) // of policies, at once: what they bypass has no lock
		for _, verb := range []string{"add", "delete"} {
			for i := range 500 {
				burst = append(burst, fmt.Sprintf("xfrm policy %s src 10.1.0.0/16 dst 10.200.%d.%d/32 dir out", verb, i/250, i%250))
			}
		}
		storms = append(storms, slices.Concat(storm(rng, 200), burst, storm(rng, 200)))
	}
	reference := func() []string {
		ns := newNS(t)
		for _, lines := range storms {
			ns.force(lines)
		}
		return ns.settled()
	}()
	checkLeaks(t)
	ns := newNS(t)
	cfg := hostConfig(t)
	small := func(a *Agent) {
		s := a.sources
		s.mu.Lock()
		defer s.mu.Unlock()
		err := errors.Join(s.routes.Close(), s.xfrm.Close())
		var rerr, xerr error
		s.routes, rerr = routes.Dial(routes.WatchOptions{ReceiveBuffer: 4096})
		s.xfrm, xerr = xfrmwatch.Dial(xfrmwatch.Options{ReadBuffer: 4096})
		if err = errors.Join(err, rerr, xerr); err != nil {
			t.Fatal(err)
		}
	}
	a := ns.startWith(cfg, small)
	s := ns.witness(a.rt.Port(), a.cfg.Plan)
	for i, lines := range storms {
		resume := func() {}
		switch i % 3 {
		case 1: // the loop stands still
			stopped, goOn := make(chan struct{}), make(chan struct{})
			called := make(chan error, 1)
			go func() { called <- a.call(t.Context(), func() { close(stopped); <-goOn }) }()
			<-stopped
			resume = func() {
				close(goOn)
				if err := <-called; err != nil {
					t.Error(err)
				}
			}
		case 2: // the sockets end in the middle
			half := len(lines) / 2
			ns.force(lines[:half])
			lines = lines[half:]
			a.sources.mu.Lock()
			err := errors.Join(a.sources.xfrm.Close(), a.sources.routes.Close(), a.sources.eth.Close(), a.sources.l2tp.Close())
			a.sources.mu.Unlock()
			if err != nil {
				t.Error(err)
			}
		}
		ns.force(lines)
		resume()
		ns.exact(a, cfg)
		if i == 1 { // those that are dialled again hold as much as ever
			for _, r := range a.sources.stats() {
				if (r.Source == "routes" || r.Source == "xfrm") && r.Overruns == 0 {
					t.Errorf("%s: nothing was dropped: the test tests nothing", r.Source)
				}
			}
		}
	}
	a.stop()
	s.check(t)
	if d := cmp.Diff(reference, ns.settled()); d != "" {
		t.Errorf("not what it would be without an agent (-without +with):\n%s", d)
	}
}
