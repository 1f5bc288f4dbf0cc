package routes

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var (
	worldSeed  = flag.Uint64("world.seed", 1, "the seed of the random worlds")
	worldSteps = flag.Int("world.steps", 80, "the number of steps in each random world")
	worlds     = flag.Int("world.count", 1, "the number of random worlds")
)

// TestMirrorInRandomWorlds makes random changes to a namespace of its own. After each step
// the mirror has to be what a fresh dump shows, in all that it knows, and to route random packets
// as the kernel says that it would. A failure names the seed, which makes the same steps again:
//
//	go test ./routes -run TestMirrorInRandomWorlds -world.seed 7 -world.count 1 -world.steps 5000
func TestMirrorInRandomWorlds(t *testing.T) { mirrorWorlds(t) }

// TestKernelMirrorInRandomWorlds is the same in the test kernel, which has VRFs.
func TestKernelMirrorInRandomWorlds(t *testing.T) {
	needsVRF(t)
	mirrorWorlds(t)
}

func needsVRF(t *testing.T) {
	t.Helper()
	newNS(t)
	if out, err := tryIP("link add v1 type vrf table 1001"); err != nil {
		t.Skipf("needs VRF devices: %s", strings.TrimSpace(out))
	}
}

// TestKernelEnslavedWhileDown: a link that is down keeps the routes to its own addresses, and loses them
// without a word, and without going up or down, when it gets into a VRF or out of it.
func TestKernelEnslavedWhileDown(t *testing.T) {
	needsVRF(t)
	ip(t, "link set v1 up\nlink add a0 type veth peer name a1\naddr add 10.0.0.1/24 dev a0\nlink set a0 up\nlink set a0 down")
	f := follow(t, WatchOptions{})
	f.exact()
	for _, line := range []string{"link set a0 master v1", "link set a0 up\nlink set a0 down", "link set a0 nomaster"} {
		before := f.fib.Len()
		ip(t, line)
		f.exact()
		t.Logf("%q: %d routes, then %d", line, before, f.fib.Len())
	}
}

func mirrorWorlds(t *testing.T) {
	for i := range *worlds {
		seed := *worldSeed + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			r := &run{t: t, w: newWorld(t, seed), unclaimed: map[string]int{}}
			r.f = follow(t, WatchOptions{})
			for r.steps < *worldSteps && !t.Failed() {
				r.step()
			}
			r.report()
		})
	}
}

// run is one random world and what came of it.
type run struct {
	t         *testing.T
	w         *world
	f         *follower
	log       [][]string
	steps     int
	claimed   int
	errnos    int
	inVRF     int
	again     int // looks after which the mirror was still behind
	unclaimed map[string]int
}

const (
	packetsPerStep = 60
	patience       = 10 * time.Second
)

func (r *run) step() {
	r.steps++
	lines := r.w.step()
	r.log = append(r.log, lines)
	r.w.run(r.t, lines)
	if d := r.state(); d != "" {
		r.fail("the mirror differs (-kernel +mirror), stale %t, stats %+v:\n%s", r.f.fib.Stale(), r.f.w.Stats(), d)
		return
	}
	r.f.seen = nil
	for range packetsPerStep {
		q, vrf := r.w.query(r.f.fib)
		if d := r.packet(q, vrf); d != "" {
			r.fail("packet %+v: %s\nrules and routes that concern it:\n%s", q, d, strings.Join(concerning(r.f.fib, q.Dst), "\n"))
			return
		}
	}
}

// state waits until the mirror is what a fresh dump shows, and says how they differ if it never
// is. Nothing but what the watcher finds due by itself is dumped into the mirror meanwhile.
func (r *run) state() (d string) {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); r.again++ {
		r.f.settle()
		if d = cmp.Diff(knowledge(freshFIB(r.t)), knowledge(r.f.fib)); d == "" && !r.f.fib.Stale() {
			return ""
		}
	}
	return d
}

func (r *run) fail(format string, args ...any) {
	r.t.Helper()
	r.t.Errorf("step %d: "+format, append([]any{r.steps}, args...)...)
	if r.t.Failed() && len(r.log) > 0 {
		from := max(0, len(r.log)-12)
		for i, lines := range r.log[from:] {
			r.t.Logf("step %d:\n\t%s", from+i+1, strings.Join(lines, "\n\t"))
		}
		r.log = nil
	}
}

// packet compares one lookup, and says what is wrong with the mirror's. As the kernel may have changed something
// by itself (carrier news come late), a difference counts when it lasts.
func (r *run) packet(q Query, vrf *Link) (d string) {
	for try := range 3 {
		if try > 0 {
			if d := r.state(); d != "" {
				return d
			}
		}
		if vrf != nil {
			vrf = r.f.fib.Link(vrf.Index)
		}
		o := walk(r.f.fib, q, vrf)
		if o.unclaimed != "" {
			r.unclaimed[o.unclaimed]++
			return ""
		}
		ans, err := r.f.tb.Lookup(q)
		m := q
		m.FibMatch = true
		var match Answer
		if err == nil {
			match, err = r.f.tb.Lookup(m)
		}
		if d = o.differs(ans, match, err); d == "" {
			r.claimed++
			if err != nil {
				r.errnos++
			}
			if vrf != nil {
				r.inVRF++
			}
			return ""
		}
		d = fmt.Sprintf("the mirror says %s, but %s", o, d)
	}
	return d
}

func (r *run) report() {
	r.t.Logf("%d steps, %d routes at the end; %d packets agree, %d of them with errors, %d in VRFs; looked again %d times; %+v",
		r.steps, r.f.fib.Len(), r.claimed, r.errnos, r.inVRF, r.again, r.f.w.Stats())
	for _, why := range slices.Sorted(maps.Keys(r.unclaimed)) {
		r.t.Logf("%6d %s", r.unclaimed[why], why)
	}
	if r.claimed == 0 {
		r.t.Error("the mirror claimed nothing: the test tests nothing")
	}
	if n := r.f.w.Stats().Undecodable; n > 0 {
		r.t.Errorf("%d messages were undecodable", n)
	}
}

// concerning are the rules of the address's family and the routes to it.
func concerning(f *FIB, dst netip.Addr) []string {
	var out []string
	for _, r := range f.Rules(FamilyOf(dst)) {
		out = append(out, fmt.Sprintf("rule %+v", *r))
	}
	for _, id := range f.Tables(FamilyOf(dst)) {
		for r := range f.Table(FamilyOf(dst), id) {
			if r.Dst.Contains(dst) {
				out = append(out, show(r))
			}
		}
	}
	return out
}

// freshFIB is the mirror of a Watcher that begins now.
func freshFIB(t testing.TB) *FIB {
	t.Helper()
	w, err := Dial(WatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	f := NewFIB()
	err = w.Run(ctx, func(evs []Event) {
		for _, ev := range evs {
			if f.Stale() {
				f.Apply(ev)
			}
			if ev == (ResyncEnd{}) {
				cancel()
			}
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	return f
}

// knowledge is all that a mirror knows, in lines: devices, addresses, rules in their order,
// nexthop objects, the routes to each destination in their order, and the index by device.
func knowledge(f *FIB) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, l := range f.Links() {
		add("link %+v", *l)
		for _, p := range slices.SortedFunc(f.Addrs(l.Index), ComparePrefix) {
			add("addr %s dev %d", p, l.Index)
		}
		keys, n := f.DeviceRoutes(l.Index)
		add("%d routes by %d: %v", n, l.Index, keys)
	}
	for _, nh := range f.Nexthops() {
		add("nexthop %+v", *nh)
	}
	for _, fam := range []Family{IPv4, IPv6} {
		for _, r := range f.Rules(fam) {
			add("rule %+v", *r)
		}
		for _, id := range f.Tables(fam) {
			byDst := map[netip.Prefix][]*Body{}
			for r := range f.Table(fam, id) {
				byDst[r.Dst] = append(byDst[r.Dst], r.Body)
			}
			for _, dst := range slices.SortedFunc(maps.Keys(byDst), ComparePrefix) {
				bodies := byDst[dst]
				// Those for some sources stand in trees of their own: only the order within each counts.
				slices.SortStableFunc(bodies, func(a, b *Body) int { return ComparePrefix(a.Src, b.Src) })
				for i, b := range bodies {
					add("%d. %s flags %#x", i, show(Route{dst, b}), b.Flags)
				}
			}
		}
	}
	add("%d routes", f.Len())
	return out
}
