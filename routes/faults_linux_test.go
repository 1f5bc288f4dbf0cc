package routes

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// many are n lines of ip, each with its number.
func many(n int, format string) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(strings.NewReplacer("%d", fmt.Sprint(i), "%x", fmt.Sprintf("%x", i+1), "%a", fmt.Sprintf("%d.%d", i/250, i%250)).Replace(format) + "\n")
	}
	return b.String()
}

// kinds are all that a Watcher tells of: how many there are of each, and one more.
var kinds = map[string]struct {
	n            int
	add, more    string
	change, gone string // of those that are there
	is           func(Event) bool
}{
	// The first event of a veth's peer does not say yet whose peer it is (rtnl_newlink_create, net/core/rtnetlink.c): both go up, which is told.
	"links": {120, "link add x%d type veth peer name y%d", "link add zz0 type veth peer name zz1\nlink set zz0 up\nlink set zz1 up", "link set x%d mtu 1400", "link del x%d",
		func(ev Event) bool { _, ok := ev.(LinkSet); return ok }},
	"addresses": {2500, "addr add 10.77.%a/32 dev a0", "addr add 10.200.0.1/32 dev a0", "addr add fd77::%x/128 dev b0 nodad", "addr del 10.77.%a/32 dev a0",
		func(ev Event) bool { _, ok := ev.(AddrSet); return ok }},
	"rules": {2000, "rule add pref 1%d from 10.%a.0/24 lookup 77", "rule add pref 5 lookup 78", "rule add pref 2%d to 10.%a.0/24 lookup 77", "rule del pref 1%d",
		func(ev Event) bool { _, ok := ev.(RuleSet); return ok }},
	"nexthops": {3000, "nexthop add id 1%d via 10.0.0.2 dev a0", "nexthop add id 999999 via 10.0.0.2 dev a0", "nexthop replace id 1%d via 10.0.0.3 dev a0", "nexthop del id 1%d",
		func(ev Event) bool { _, ok := ev.(NexthopSet); return ok }},
	"IPv4 routes": {3000, "route add 11.%a.0/24 via 10.0.0.2", "route add 203.0.113.0/24 via 10.0.0.2", "route replace 11.%a.0/24 via 10.0.0.3", "route del 11.%a.0/24",
		func(ev Event) bool { return isRouteOf(ev, IPv4) }},
	"IPv6 routes": {3000, "route add 2001:db8:%x::/48 via fd00:a::2", "route add 2001:db9::/48 via fd00:a::2", "route replace 2001:db8:%x::/48 via fd00:a::3", "route del 2001:db8:%x::/48",
		func(ev Event) bool { return isRouteOf(ev, IPv6) }},
}

// isRouteOf reports whether an event tells of routes of a family, in a dump or besides.
func isRouteOf(ev Event, f Family) bool {
	switch ev := ev.(type) {
	case RouteSet:
		return ev.Route.Body.Family == f
	case RoutesFound:
		return len(ev.Routes) > 0 && ev.Routes[0].Body.Family == f
	}
	return false
}

// whole settles until all that the mirror knows is what one says that begins now.
func (f *follower) whole() {
	f.t.Helper()
	var d string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		f.settle()
		if d = cmp.Diff(knowledge(freshFIB(f.t)), knowledge(f.fib)); d == "" && !f.fib.Stale() {
			return
		}
	}
	f.t.Errorf("the mirror differs (-kernel +mirror), stale %t, stats %+v:\n%s", f.fib.Stale(), f.w.Stats(), d)
}

// TestOverrunOfEachKindEndsExact has the kernel drop events of each kind while nobody reads, which a receive buffer of one page sees to.
func TestOverrunOfEachKindEndsExact(t *testing.T) {
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) {
			vethNS(t)
			f := follow(t, WatchOptions{ReceiveBuffer: 4096})
			for _, lines := range []string{many(k.n, k.add), many(k.n/2, k.change) + many(k.n/3, k.gone)} {
				before := f.w.Stats().Overruns
				force(t, lines)
				f.whole()
				if f.w.Stats().Overruns == before {
					t.Error("nothing was dropped: the test tests nothing")
				}
			}
			if !slices.ContainsFunc(f.seen, func(ev Event) bool { l, ok := ev.(Lost); return ok && errors.Is(l.Err, unix.ENOBUFS) }) {
				t.Error("the loss was not told")
			}
		})
	}
}

// interrupting are the kinds whose dumps the kernel calls interrupted when something of them changes meanwhile (nl_dump_check_consistent). Whether it
// does so for others, too, depends on its version; what is told of them is exact by the events.
var interrupting = []string{"links", "addresses", "nexthops"}

// TestInterruptedDumpsEndExact changes something of each kind in the middle of its first dump, whose reader waits meanwhile.
func TestInterruptedDumpsEndExact(t *testing.T) {
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) {
			vethNS(t)
			force(t, many(k.n, k.add))
			f := followSlowly(t, func(ev Event) bool {
				if !k.is(ev) {
					return false
				}
				ip(t, k.more)
				return true
			})
			f.whole()
			n := f.w.Stats().Interrupted
			t.Logf("%d dumps were interrupted", n)
			if n == 0 && slices.Contains(interrupting, name) {
				t.Error("no dump was interrupted: the test tests nothing")
			}
		})
	}
}

// followSlowly is follow with a dump that is handed on one by one. once is called with each event until it is true, and the dump waits for it.
func followSlowly(t *testing.T, once func(Event) bool) *follower {
	t.Helper()
	w, err := Dial(WatchOptions{Chunk: 1})
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, w: w, tb: openTable(t), fib: NewFIB(), ch: make(chan []Event), fence: 1 << 30}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(evs []Event) {
			select {
			case f.ch <- evs:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	happened := false
	f.until(func(ev Event) bool {
		happened = happened || once(ev)
		return ev == ResyncEnd{}
	})
	if !happened {
		t.Error("nothing happened in the dump")
	}
	return f
}

// TestClosedSocketsEndTheWatcher: one whose sockets are closed underneath ends with an error, and at once, whatever it is about.
func TestClosedSocketsEndTheWatcher(t *testing.T) {
	for name, closes := range map[string]func(*Watcher) error{
		"events": func(w *Watcher) error { return w.events.Close() },
		"dumps":  func(w *Watcher) error { return w.dumps.Close() },
		"dumps6": func(w *Watcher) error { return w.dumps6.Close() },
	} {
		for _, idle := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, idle %t", name, idle), func(t *testing.T) {
				vethNS(t)
				force(t, many(1000, kinds["IPv4 routes"].add))
				w, err := Dial(WatchOptions{Chunk: 1})
				if err != nil {
					t.Fatal(err)
				}
				closed := false
				due := make(chan struct{})
				done := make(chan error, 1)
				go func() {
					done <- w.Run(context.Background(), func(evs []Event) {
						for _, ev := range evs {
							if !idle && !closed && isRouteOf(ev, IPv4) {
								closed = true
								if err := closes(w); err != nil {
									t.Error(err)
								}
							}
							if idle && ev == (ResyncEnd{}) {
								close(due)
							}
						}
					})
				}()
				if idle {
					<-due
					if err := closes(w); err != nil {
						t.Error(err)
					}
					w.Resync(Scope{}) // wakes it
				}
				select {
				case err := <-done:
					if err == nil || errors.Is(err, context.Canceled) {
						t.Errorf("Run: %v", err)
					}
				case <-time.After(patience):
					t.Error("Run does not end")
				}
			})
		}
	}
}
