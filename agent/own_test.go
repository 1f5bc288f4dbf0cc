package agent

import (
	"net/netip"
	"testing"
	"time"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// cloneOf is the fake kernel's route to a destination in our table.
func (w *world) cloneOf(dst string) (out []routes.Route) {
	for r := range w.kernel.Table(routes.IPv4, 5450) {
		if r.Dst == netip.MustParsePrefix(dst) {
			out = append(out, r)
		}
	}
	return out
}

// What the watcher tells of a clone from before the newest write of it changes nothing, and what it tells from afterwards does.
func TestWhatIsOlderThanOurWriteIsPassedBy(t *testing.T) {
	w := partWorld(t, Config{})
	w.addRoute("10.3.7.0/24", hop{oif: 2, gw: "192.0.2.10"})
	w.settle()
	first := w.cloneOf("10.3.7.0/24")[0]
	w.replaceRoute("10.3.7.0/24", hop{oif: 2, gw: "192.0.2.11"})
	w.step()
	late := w.queue // with the notification of the write
	second := w.cloneOf("10.3.7.0/24")[0]
	if first.Body.Raw == second.Body.Raw {
		t.Fatal("the clone has not moved")
	}
	w.took()
	foreign := routes.Origin{Port: ownerPort, Seq: 9}
	w.queue = []batch{{routes: []routes.Event{
		routes.RouteSet{Route: first, Replace: true, Origin: routes.Origin{Port: ourPort, Seq: 1}}, // an earlier write of ours
		routes.RouteGone{Route: first, Origin: foreign},
	}}}
	w.settle()
	w.quiet("what was older than our write")
	w.queue = late
	w.settle()
	w.quiet("our write itself")
	if got, n := w.a.st.fib.Get(second.Key()); n != 1 || got.Body.Raw != second.Body.Raw {
		t.Errorf("the mirror has %d clones", n)
	}

	w.routing(routes.RouteGone{Route: second, Origin: foreign})
	w.settle()
	if n := w.count("put 10.3.7.0/24 table 5450"); n != 1 {
		t.Errorf("a clone that somebody has deleted since is written %d times, want once", n)
	}
}

// A dump that was taken before a write, and comes behind it, does not undo it: neither a clone that is there nor one that is not.
func TestDumpFromBeforeOurWrite(t *testing.T) {
	for _, moves := range []bool{true, false} {
		w := partWorld(t, Config{})
		w.addRoute("10.3.7.0/24", hop{oif: 2, gw: "192.0.2.10"})
		w.addRoute("198.51.100.0/24", hop{oif: 2, gw: "192.0.2.10"})
		w.settle()
		before := w.dumpRoutes()
		if moves {
			w.replaceRoute("10.3.7.0/24", hop{oif: 2, gw: "192.0.2.11"})
		} else {
			w.deleteRoute("10.3.7.0/24")
		}
		moved := w.queue
		w.step() // which writes
		for w.next == time.Nanosecond {
			late := w.queue
			w.queue = nil
			w.step()
			w.queue = append(late, w.queue...)
		}
		late := w.queue
		w.took()
		// The watcher dumped ahead of all that, and held what came meanwhile.
		w.queue = append([]batch{{routes: before}}, append(moved, late...)...)
		w.settle()
		w.quiet("an older dump")
		want := len(w.cloneOf("10.3.7.0/24"))
		if _, n := w.a.st.fib.Get(routes.Key{Family: routes.IPv4, Table: 5450, Dst: netip.MustParsePrefix("10.3.7.0/24"), Priority: 1446}); n != want {
			t.Errorf("moves %t: the mirror has %d clones, the kernel %d", moves, n, want)
		}
	}
}

// The kernel takes clones away without a word where a device or a nexthop object goes. One that is to be replaced, and is not there any more, does
// not have its successor written again and again until the lock is withdrawn.
func TestCloneThatIsGoneWithoutAWord(t *testing.T) {
	w := partWorld(t, Config{})
	w.addRoute("10.3.8.0/24", hop{oif: 2, gw: "192.0.2.10"})
	w.settle()
	w.kernel.Apply(routes.RouteGone{Route: w.cloneOf("10.3.8.0/24")[0]})
	bypass := policy(57, "10.1.0.0/16", "10.3.8.0/24", 0)
	p := *bypass.Policy
	p.Templates, p.Priority = nil, 50
	w.took()
	w.xfrm(xfrmwatch.PolicySet{Policy: &p})
	w.settle()
	if n := w.count("put 10.3.8.0/24 table 5450"); n != 1 {
		t.Errorf("the throw is written %d times, want once", n)
	}
	if got := w.ownRules(); got == "" {
		t.Error("the lock was withdrawn")
	}
	w.deleteRoute("10.3.8.0/24")
	w.kernel.Apply(routes.RouteGone{Route: w.cloneOf("10.3.8.0/24")[0]})
	w.xfrm(xfrmwatch.PolicyGone{Index: 57})
	w.settle()
	w.took()
	w.addRoute("10.4.0.0/16", hop{oif: 2})
	w.settle()
	w.quiet("once it is known to be gone")
}
