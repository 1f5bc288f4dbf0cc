package plan

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// TestPlannerFollows lets random worlds change step by step, and compares after each the plan that was
// followed, and the steps to it, with those from scratch. What it finds is kept in testdata/follow. Look for more with
//
//	go test ./agent/plan -run PlannerFollows -rapid.seed=0 -rapid.checks=20000
func TestPlannerFollows(t *testing.T) {
	var anew, followed uint64
	parts := 0
	rapid.Check(t, func(t *rapid.T) {
		f, err := newFollowed(genFollowed(t))
		if err != nil {
			t.Fatal(err)
		}
		f.Part = rapid.SampledFrom([]int{0, 0, 1, 2, 3}).Draw(t, "part")
		defer func() { anew, followed, parts = anew+f.Anew, followed+f.Follows, parts+f.Parts }()
		for i := range 1 + rapid.IntRange(0, 5).Draw(t, "steps") {
			var lines []string
			if i > 0 {
				lines = f.genStep(t)
			}
			if err := f.step(lines); err != nil {
				t.Fatalf("%v\nafter\n%s", err, strings.Join(f.history, "\n"))
			}
		}
	})
	t.Logf("%d plans followed, %d of them parts of a change, %d worked out from scratch", followed, parts, anew)
	if followed < anew/10 {
		t.Errorf("only %d plans were followed, %d worked out from scratch", followed, anew)
	}
}

// TestPlannerFollowed repeats what TestPlannerFollows has found: a world, then its changes, with a line `--`
// ahead of each step.
func TestPlannerFollowed(t *testing.T) {
	files, err := filepath.Glob("testdata/follow/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for i := range 4 * len(files) {
		file, part := files[i/4], i%4 // 0 for as many as there are
		t.Run(fmt.Sprintf("%s/%d", strings.TrimSuffix(filepath.Base(file), ".txt"), part), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			steps := strings.Split(string(text), "--\n")
			f, err := newFollowed(steps[0])
			if err != nil {
				t.Fatal(err)
			}
			steps[0], f.Part = "", part
			for i, s := range steps {
				if err := f.step(strings.Split(strings.TrimSpace(s), "\n")); err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
			}
		})
	}
}

// TestPlannerFollowsManyRoutes has a VLAN above a tunnel get more routes than are known by their keys.
func TestPlannerFollowsManyRoutes(t *testing.T) {
	var world strings.Builder
	world.WriteString("link 1 lo mtu 65536\nlink 2 eth0\nlink 10 tun0 gre local 192.168.1.1 remote 192.0.2.1 mtu 1476\n" +
		"link 11 tun0v kind vlan parent tun0 mtu 1476\nroute 192.0.2.0/24 dev eth0 proto kernel\n" +
		"policy 1 src 192.168.1.1/32 dst 192.0.2.1/32 proto gre tmpl esp transport reqid 1\n" +
		"sa esp 192.168.1.1 192.0.2.1 spi 1 reqid 1 gcm transport\n")
	for i := range 4095 {
		fmt.Fprintf(&world, "route 10.%d.%d.0/24 dev tun0v\n", i/256, i%256)
	}
	f, err := newFollowed(world.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"", "route 10.100.0.0/24 dev tun0v", "route 10.101.0.0/24 dev tun0v", "route 10.102.0.0/24 dev tun0v", "unroute 100"} {
		if err := f.step([]string{line}); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
	if f.Follows < 3 {
		t.Errorf("only %d plans were followed", f.Follows)
	}
}

// genFollowed is a world to follow. Half of them have little but policies that share shapes, and some so many shapes
// that one more can be too many.
func genFollowed(t *rapid.T) string {
	m := &maker{t: t}
	if !m.some("shapes", 2) {
		return genWorld(t)
	}
	if m.some("config", 6) {
		m.line("config %s", m.of("setting", "source_less_lookups off", "presume_mtu 1350", "max_clones 3", "max_clones 6", "max_clones_per_coverage 2"))
	}
	if m.some("forwarding", 2) {
		m.line("forwarding")
	}
	for i, l := range []string{"lo mtu 65536", "eth0", "eth1 mtu 9000", "xfrm0 if_id 7", "xfrm1 if_id 8 mtu 1400", "red vrf 100", "eth2 master red", "xfrmx external", "eth3 down"} {
		m.line("link %d %s", i+1, l)
	}
	m.v6 = m.some("ipv6", 3)
	m.outside()
	for range m.num("rules", 0, 4) / 3 {
		m.rule()
	}
	for range m.num("routes", 0, 7) {
		m.route()
	}
	for i := range m.num("policies", 2, 8) {
		m.plain(i + 1)
	}
	if m.some("crowd", 20) {
		m.crowd()
	}
	m.line("sa esp %s %s spi 1 reqid 1 gcm", m.self0(), m.peer0())
	m.line("sa esp %s %s spi 2 reqid 2 cbc-sha256 if_id 7", m.self0(), m.peer0())
	m.sa(3)
	return strings.Join(m.lines, "\n") + "\n"
}

// plain is a policy with an SA, whose shape others have too.
func (m *maker) plain(index int) {
	src, ifID := m.src("src"), ""
	if m.some("if_id", 4) {
		ifID = "if_id 7"
	}
	reqid := 1
	if ifID != "" {
		reqid = 2
	}
	tmpl := fmt.Sprintf("tmpl esp tunnel %s %s reqid %d", m.self0(), m.peer0(), reqid)
	switch m.num("template", 0, 9) {
	case 0:
		tmpl = ""
	case 1:
		tmpl = "tmpl esp transport reqid 1 " + tmpl
	}
	m.line("policy %d src %s dst %s %s priority %d %s %s", index, src, m.dst("dst"), m.of("narrow", "", "", "", "proto tcp"), m.num("priority", 0, 6), ifID, tmpl)
}

// crowd are about as many shapes as have rules.
func (m *maker) crowd() {
	for i := range MaxRules - 3 {
		src, dst := fmt.Sprintf("172.16.%d.0/24", i), "10.0.0.0/16"
		if m.v6 {
			src, dst = fmt.Sprintf("fd00:8:%x::/48", i), "fd00:1::/32"
		}
		m.line("policy %d src %s dst %s priority 2 tmpl esp tunnel %s %s reqid 1", 100+i, src, dst, m.self0(), m.peer0())
	}
}

func (m *maker) self0() string {
	if m.v6 {
		return "fd00:9::1"
	}
	return "192.168.1.1"
}

func (m *maker) peer0() string {
	if m.v6 {
		return "fd00:2::1"
	}
	return "192.0.2.1"
}

func isV6(text string) bool { return strings.Contains(text, "fd00:2::/64") }

// followed is a world whose plan is kept up to date.
type followed struct {
	*world
	Planner
	text    string
	changes Changes
	before  Input
	told    map[xfrmwatch.CoverageID]int
	shapes  []ShapeID // of the newest plan
	steps   Steps     // to it
	history []string
	Distant int // how many changes of routes no plan was told of
	Parts   int // how many plans followed a part of what the one before left
}

func newFollowed(text string) (*followed, error) {
	w, err := newWorld(text)
	if err != nil {
		return nil, fmt.Errorf("%w in\n%s", err, text)
	}
	f := &followed{world: w, text: text, changes: Changes{All: true}, told: map[xfrmwatch.CoverageID]int{}, history: []string{text}}
	cfg := w.cfg.WithDefaults()
	w.fib.OnChange(func(c routes.Change) {
		if f.Far(c) {
			f.Distant++
			return
		}
		f.changes.Route(&cfg, c)
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

// step makes changes, plans, and compares.
func (f *followed) step(lines []string) error {
	f.history = append(f.history, "--")
	for _, line := range lines {
		if line, _, _ = strings.Cut(line, "#"); strings.TrimSpace(line) == "" {
			continue
		}
		f.history = append(f.history, line)
		words := &words{w: strings.Fields(line)}
		if err := f.do(words.next(), words); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
	}
	return f.differs()
}

// differs plans, and compares with the plan from scratch. What the plan says of MTUs is remembered.
func (f *followed) differs() error {
	f.lingering()
	in := f.input()
	before := f.before.Peers
	if before == nil {
		before = PathsTo(nil)
	}
	for p, path := range in.Peers.All() {
		if old, ok := before.Path(p); !ok || old != path {
			f.changes.Peers = append(f.changes.Peers, p)
		}
	}
	for p := range before.All() {
		if _, ok := in.Peers.Path(p); !ok {
			f.changes.Peers = append(f.changes.Peers, p)
		}
	}
	f.changes.Devices = f.changes.Devices || !maps.Equal(in.Holds, f.before.Holds)
	got := f.Plan(in, f.changes)
	for f.Unfinished() {
		f.remember()
		f.Parts++
		got = f.Plan(in, Changes{})
	}
	in.Holds = maps.Clone(in.Holds)
	f.changes, f.before = Changes{}, in
	f.shapes = nil
	for _, s := range got.Shapes {
		f.shapes = append(f.shapes, s.ID)
	}
	want := Make(in)
	if text, other := f.render(want, Steps{}), f.render(got.Complete(), Steps{}); text != other {
		return fmt.Errorf("the plan that was followed is another one (-from scratch +followed):\n%s", cmp.Diff(strings.Split(text, "\n"), strings.Split(other, "\n")))
	}
	got.Complete()
	steps, all := f.Steps(in, f.held), Diff(in, want, f.held)
	if diff := cmp.Diff(all, steps, comparePlans...); diff != "" {
		return fmt.Errorf("the steps to the plan that was followed are others (-from scratch +followed):\n%s", diff)
	}
	f.steps = steps
	if a, b := fmt.Sprint(want.MTU, want.Tunnels, len(want.Current)), fmt.Sprint(got.MTU, got.Tunnels, len(got.Current)); a != b {
		return fmt.Errorf("the plan that was followed is another one:\n%s\n%s", a, b)
	}
	if got.LockCount() != len(want.Locks) || got.CoverageCount() != len(want.Verdicts) {
		return fmt.Errorf("it counts %d locks and %d coverages; there are %d and %d", got.LockCount(), got.CoverageCount(), len(want.Locks), len(want.Verdicts))
	}
	return f.tells(want)
}

// remember takes what the planner tells of MTUs.
func (f *followed) remember() {
	for c, mtu := range f.Told() {
		f.told[c.ID] = mtu
	}
}

// tells checks what the planner says of its plan besides.
func (f *followed) tells(want *Plan) error {
	f.remember()
	byPolicy := map[xfrmwatch.PolicyIndex]int{}
	for _, c := range want.Current {
		byPolicy[c.ID.Policy]++
		if mtu := want.MTU[c.ID]; f.told[c.ID] != mtu {
			return fmt.Errorf("coverage %v has MTU %d, and it was told that it has %d", c.ID, mtu, f.told[c.ID])
		}
	}
	for index, n := range byPolicy {
		if have := len(slices.Collect(f.Coverages(index))); have != n {
			return fmt.Errorf("policy %d has %d coverages, and %d are known", index, n, have)
		}
	}
	if n := len(slices.Collect(f.Coverages(0))); n != len(want.Current) {
		return fmt.Errorf("there are %d coverages, and %d are known", len(want.Current), n)
	}
	for id, mtu := range want.MTU {
		f.last[id] = mtu
	}
	for id := range f.last {
		_, there := f.db.Policy(id.Policy)
		if !there && !f.db.Stale() && !slices.ContainsFunc(f.gone, func(c xfrmwatch.Coverage) bool { return c.ID == id }) {
			delete(f.last, id)
		}
	}
	return nil
}

// lingering drops what lingers of policies that are back, as the agent does ahead of a plan.
func (f *followed) lingering() {
	f.gone = slices.DeleteFunc(slices.Clone(f.gone), func(c xfrmwatch.Coverage) bool {
		_, back := f.db.Policy(c.ID.Policy)
		return back
	})
}

// locksChange notes the locks that were not the same before.
func (f *followed) locksChange(before map[routes.Key]LockClaim) {
	for k, c := range f.held.Locks {
		if before[k] != c {
			f.changes.Dsts = append(f.changes.Dsts, k.Dst)
		}
	}
	for k := range before {
		if _, ok := f.held.Locks[k]; !ok {
			f.changes.Dsts = append(f.changes.Dsts, k.Dst)
		}
	}
}

// Policies that go one by one, oldest first, change the order of their shapes each time: that is followed where the shapes have no flows in common.
func TestPlannerFollowsShapesThatChangeTheirOrder(t *testing.T) {
	for name, c := range map[string]struct {
		sources [2]string
		anew    uint64
	}{
		"apart":   {[2]string{"172.16.0.0/16", "172.17.0.0/16"}, 1},
		"crossed": {[2]string{"172.16.0.0/16", "172.16.0.0/15"}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			const policies = 8
			var text strings.Builder
			text.WriteString("link 1 lo\nlink 2 eth0\nroute 192.0.2.0/24 dev eth0 proto kernel\nroute 0.0.0.0/0 via 192.0.2.9 dev eth0\nsa esp 192.0.2.1 192.0.2.2 spi 1 gcm\n")
			for i := range policies {
				fmt.Fprintf(&text, "policy %d src %s dst 10.0.%d.0/24 tmpl esp tunnel 192.0.2.1 192.0.2.2\n", i+1, c.sources[i%2], i)
			}
			f, err := newFollowed(text.String())
			if err != nil {
				t.Fatal(err)
			}
			if err := f.differs(); err != nil {
				t.Fatal(err)
			}
			for i := range policies - 2 {
				index := xfrmwatch.PolicyIndex(i + 1)
				f.db.Apply(xfrmwatch.PolicyGone{Index: index})
				f.changes = Changes{Policies: []xfrmwatch.PolicyIndex{index}}
				if err := f.differs(); err != nil {
					t.Fatalf("without policy %d: %v", index, err)
				}
			}
			if (f.Anew > 1) != (c.anew > 1) {
				t.Errorf("worked out from scratch %d times", f.Anew)
			}
		})
	}
}
