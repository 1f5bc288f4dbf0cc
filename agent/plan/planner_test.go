package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// TestPlannerFollows lets random worlds change step by step, and compares after each the plan that was
// followed with the one from scratch.
func TestPlannerFollows(t *testing.T) {
	var anew, followed uint64
	rapid.Check(t, func(t *rapid.T) {
		text := genWorld(t)
		f, err := newFollowed(text)
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		defer func() { anew, followed = anew+f.Anew, followed+f.Follows }()
		history := []string{text}
		for i := range 1 + rapid.IntRange(0, 5).Draw(t, "steps") {
			if i > 0 {
				what, err := f.change(t)
				if err != nil {
					t.Fatalf("%v: %s", err, what)
				}
				history = append(history, what)
			}
			if diff := f.differs(); diff != "" {
				t.Fatalf("the plan that was followed is another one (-from scratch +followed):\n%s\nafter\n%s", diff, strings.Join(history, "\n"))
			}
		}
	})
	t.Logf("%d plans followed, %d worked out from scratch", followed, anew)
	if followed < anew/10 {
		t.Errorf("only %d plans were followed, %d worked out from scratch", followed, anew)
	}
}

// followed is a world whose plan is kept up to date.
type followed struct {
	*world
	Planner
	changes Changes
	before  Input
}

func newFollowed(text string) (*followed, error) {
	w, err := newWorld(text)
	if err != nil {
		return nil, err
	}
	f := &followed{world: w, changes: Changes{All: true}}
	w.fib.OnChange(func(c routes.Change) {
		if c.Dst.IsValid() {
			f.changes.Dsts = append(f.changes.Dsts, c.Dst)
		} else {
			f.changes.All = true
		}
	})
	w.db.OnChange(func(c xfrmwatch.Change) {
		switch {
		case c.All:
			f.changes.All = true
		case c.Policy != 0:
			f.changes.Policies = append(f.changes.Policies, c.Policy)
		default:
			f.changes.SAs = append(f.changes.SAs, c.SA)
		}
	})
	return f, nil
}

// differs plans, and compares with the plan from scratch. It is empty if they are equal. What the plan says
// of MTUs is remembered.
func (f *followed) differs() string {
	in := f.input()
	for p, path := range in.Peers {
		if old, ok := f.before.Peers[p]; !ok || old != path {
			f.changes.Peers = append(f.changes.Peers, p)
		}
	}
	for p := range f.before.Peers {
		if _, ok := in.Peers[p]; !ok {
			f.changes.Peers = append(f.changes.Peers, p)
		}
	}
	if !maps.Equal(in.Outers, f.before.Outers) {
		f.changes.All = true
	}
	f.changes.Devices = f.changes.Devices || !maps.Equal(in.Holds, f.before.Holds)
	got := f.Plan(in, f.changes)
	in.Holds = maps.Clone(in.Holds)
	f.changes, f.before = Changes{}, in
	want := Make(in)
	if text, other := f.render(want, Steps{}), f.render(got.Complete(), Steps{}); text != other {
		return cmp.Diff(strings.Split(text, "\n"), strings.Split(other, "\n"))
	}
	got.Complete()
	steps, all := f.Steps(in, f.held), Diff(in, want, f.held)
	if diff := cmp.Diff(all, steps, comparePlans...); diff != "" {
		return diff
	}
	if a, b := fmt.Sprint(want.MTU, want.Tunnels, len(want.Current)), fmt.Sprint(got.MTU, got.Tunnels, len(got.Current)); a != b {
		return a + "\n" + b
	}
	for id, mtu := range got.MTU {
		f.last[id] = mtu
	}
	return ""
}

// change changes something, and says what.
func (f *followed) change(t *rapid.T) (string, error) {
	m := &maker{t: t, v6: slices.ContainsFunc(f.fib.Links(), func(*routes.Link) bool { return len(f.fib.Tables(routes.IPv6)) > 0 }), devices: []string{"eth0", "eth1", "xfrm0"}}
	switch m.num("change", 0, 9) {
	case 0, 1, 2:
		m.route()
	case 3, 4:
		return f.removeRoute(t)
	case 5:
		m.policy(m.num("policy", 1, 6))
	case 6:
		p, ok := f.db.Policy(xfrmwatch.PolicyIndex(m.num("policy", 1, 6)))
		if !ok {
			return "nothing", nil
		}
		if m.some("at once", 2) {
			f.gone = nil
		}
		f.gone = slices.DeleteFunc(slices.Clone(f.gone), func(c xfrmwatch.Coverage) bool { return c.ID.Policy == p.Index })
		f.gone = append(f.gone, f.db.Coverage(p)...)
		f.db.Apply(xfrmwatch.PolicyGone{Index: p.Index})
		return fmt.Sprintf("policy %d goes", p.Index), nil
	case 7:
		m.sa(m.num("SA", 1, 6))
	case 8:
		sas := slices.Collect(f.db.SAs())
		if len(sas) == 0 {
			return "nothing", nil
		}
		sa := rapid.SampledFrom(sas).Draw(t, "SA")
		if m.some("dying", 2) {
			f.db.Apply(xfrmwatch.SADying{Key: sa.Key})
		} else {
			f.db.Apply(xfrmwatch.SAGone{Key: sa.Key})
		}
		return fmt.Sprintf("SA %d dies", sa.SPI), nil
	case 9: // the agent does what the plan says
		in := f.input()
		locks := maps.Clone(f.held.Locks)
		if err := f.apply(Diff(in, Make(in), f.held)); err != nil {
			return "applied", err
		}
		for k, c := range f.held.Locks {
			if locks[k] != c {
				f.changes.Dsts = append(f.changes.Dsts, k.Dst)
			}
		}
		for k := range locks {
			if _, ok := f.held.Locks[k]; !ok {
				f.changes.Dsts = append(f.changes.Dsts, k.Dst)
			}
		}
		return "applied", nil
	}
	line := strings.Fields(m.lines[0])
	return m.lines[0], f.line(line[0], &words{w: line[1:]})
}

func (f *followed) removeRoute(t *rapid.T) (string, error) {
	var list []routes.Route
	for _, fam := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, id := range f.fib.Tables(fam) {
			list = append(list, slices.Collect(f.fib.Table(fam, id))...)
		}
	}
	if len(list) == 0 {
		return "nothing", nil
	}
	slices.SortStableFunc(list, func(a, b routes.Route) int { return a.Key().Compare(b.Key()) })
	r := rapid.SampledFrom(list).Draw(t, "route")
	f.fib.Apply(routes.RouteGone{Route: r})
	return fmt.Sprintf("route %s goes", r.Key()), nil
}
