package plan

import (
	"math/rand/v2"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tsoagent/routes"
)

// TestPlansFollowChanges applies a plan, changes the world under it, and checks the laws for
// what comes next: leftovers of the first plan must lead to no other end than a fresh start.
func TestPlansFollowChanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		was, now := genChange(t)
		if err := followsChange(was, now, rapid.Uint64().Draw(t, "seed")); err != nil {
			t.Fatalf("%v\n\nin the world\n%s\nwhich was\n%s", err, now, was)
		}
	})
}

// genChange draws a world and what it changes to.
func genChange(t *rapid.T) (was, now string) {
	was = genWorld(t)
	m := &maker{t: t, v6: strings.Contains(was, "fd00:2::/64")}
	for _, l := range strings.Split(was, "\n") {
		word, _, _ := strings.Cut(l, " ")
		if (word == "route" || word == "policy" || word == "sa" || word == "rule") && m.some("change", 4) {
			continue
		}
		if word != "gone" {
			m.line("%s", l)
		}
	}
	for range m.num("new routes", 0, 2) {
		m.route()
	}
	m.policy(m.num("new policy", 1, 9))
	m.sa(m.num("new SA", 1, 9))
	return was, strings.Join(m.lines, "\n")
}

// followsChange checks the laws for a world that has the plan of another one in place.
func followsChange(was, now string, seed uint64) error {
	before, err := newWorld(was)
	if err != nil {
		return err
	}
	after, err := newWorld(now)
	if err != nil {
		return err
	}
	in := before.input()
	with := before.clone()
	pl := Make(in)
	if err := with.apply(Diff(in, pl, with.held)); err != nil {
		return err
	}
	for id, mtu := range pl.MTU {
		if p, ok := after.db.Policy(id.Policy); ok && p.Dir == 1 {
			after.last[id] = mtu
		}
	}
	after.inherit(before, with)
	return laws(after, rand.New(rand.NewPCG(seed, 0)), 150)
}

// inherit takes over what the plan of another world has put in place, where it can still be.
func (w *world) inherit(before, with *world) {
	cfg := w.cfg.WithDefaults()
	for id, b := range with.objects {
		w.objects[id] = b
	}
	for _, o := range with.fib.Nexthops() {
		if w.fib.Nexthop(o.ID) == nil {
			w.fib.Apply(routes.NexthopSet{Nexthop: o})
		}
	}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, r := range with.fib.Rules(f) {
			if cfg.OwnRule(r) {
				w.fib.Apply(routes.RuleSet{Rule: r})
			}
		}
		for _, id := range with.fib.Tables(f) {
			for r := range with.fib.Table(f, id) {
				if cfg.OwnRoute(r) {
					w.fib.Apply(routes.RouteSet{Route: r, Append: true})
				}
			}
		}
	}
	for k, claim := range with.held.Locks {
		w.held.Locks[k] = claim
		old, n := before.fib.Get(k)
		locked, _ := with.fib.Get(k)
		if now, m := w.fib.Get(k); n == 1 && m == 1 && routes.Equal(now.Body, old.Body) {
			w.fib.Apply(routes.RouteSet{Route: locked, Replace: true})
		}
	}
	for k, claim := range with.held.Holds {
		w.held.Holds[k] = claim
		w.set(k.Index, k.Feature, false)
	}
}
