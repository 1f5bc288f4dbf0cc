package kill

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"tsoagent/failpoint"
)

// unreachable are points that can't be reached here, and why.
var unreachable = map[string]string{
	"mtu-journal-before": noCarrier, "mtu-journal-after": noCarrier, "mtu-written": noCarrier, "mtu-given": noCarrier,
	"link-mtu-before": noCarrier, "link-mtu-after": noCarrier,
}

const noCarrier = "carrier_mtu: device is for xfrm interfaces and tunnels with SAs, and so takes ESP: the scenario 66-carrier-mtu"

// TestKilledAnywhere ends agents, and those who clean up after them, at each point and at random ones. The kernel is then as it would be without
// an agent. TSOAGENT_KILLS is how many are killed, in schedules that are others each time; TSOAGENT_KILL_SEED=SEED:N begins with the Nth schedule of a
// seed.
func TestKilledAnywhere(t *testing.T) {
	l := newLab(need(t))
	kills, seed, n := 200, uint64(1), 0
	if text := os.Getenv("TSOAGENT_KILLS"); text != "" {
		var err error
		if kills, err = strconv.Atoi(text); err != nil {
			t.Fatal("TSOAGENT_KILLS: ", err)
		}
		seed = rand.Uint64()
	}
	again := os.Getenv("TSOAGENT_KILL_SEED")
	if again != "" {
		if _, err := fmt.Sscanf(again, "%d:%d", &seed, &n); err != nil {
			t.Fatal("TSOAGENT_KILL_SEED: ", err)
		}
	}
	// Each point comes with each way to clean up, a third as many schedules besides are random, and then there are more for the pairs at which nothing
	// was killed yet: one need not reach the point that it is for.
	var pairs []pair
	for _, p := range failpoint.Points {
		for way := 0; way < ways && unreachable[p] == ""; way++ {
			pairs = append(pairs, pair{p, way})
		}
	}
	missing := func() []pair {
		return slices.DeleteFunc(slices.Clone(pairs), func(p pair) bool { return l.pairs[p] > 0 })
	}
	began := time.Now()
	for most := n + 10*kills + 2*len(pairs); n < most; n++ {
		d := draw{rand.New(rand.NewPCG(seed, uint64(n)))}
		at := pair{"", d.IntN(ways)}
		switch more := missing(); {
		case n%4 < 3 && n/4*3+n%4 < len(pairs):
			at = pairs[n/4*3+n%4]
		case l.kills < kills || n/4*3 < len(pairs):
		case again == "" && len(more) > 0:
			at = more[n%len(more)]
		default:
			most = n
			continue
		}
		s := d.schedule(at.point, at.way)
		if l.try(t, s); l.tried%50 == 0 {
			t.Logf("%d schedules, %d killed, %d pairs of a point and a way to clean up are missing", l.tried, l.kills, len(missing()))
		}
		if t.Failed() {
			t.Log(s)
			t.Fatalf("again, as far as time lets it: TSOAGENT_KILL_SEED=%d:%d TSOAGENT_KILLS=1 go test ./e2e/kill -run %s", seed, n, t.Name())
		}
	}
	l.report(t, time.Since(began))
	if again != "" {
		return
	}
	for _, p := range missing() {
		t.Errorf("nothing was killed at %s and cleaned up after by %s (seed %d)", p.point, wayNames[p.way], seed)
	}
	for p, why := range unreachable {
		t.Logf("not reachable here: %s: %s", p, why)
		if l.reached[p] > 0 {
			t.Errorf("%s is said not to be reachable, and was reached", p)
		}
	}
}

func (l *lab) report(t *testing.T, took time.Duration) {
	t.Logf("%d schedules in %v: %d processes killed (agents %d, tsoctl %d), %d of them at random moments, the others at %d points; %d first agents lived to be stopped",
		l.tried, took.Round(time.Second), l.kills, l.agents, l.kills-l.agents, l.moments, len(l.at), l.lived)
	for i, n := range l.byWay {
		t.Logf("%4d schedules cleaned up by %s", n, wayNames[i])
	}
	t.Logf("%d routes were left in the version before the owner's last one, as the agent died within its stale write", l.lost)
	for _, p := range slices.Sorted(maps.Keys(l.reached)) {
		t.Logf("%-26s reached %5d times, killed there %4d times", p, l.reached[p], l.at[p])
	}
}

// TestKilledBetweenStaleWriteAndRepair has the owner of a route change it between the agent's look and its write, and kills the agent when it has
// read of that and not mended it yet.
func TestKilledBetweenStaleWriteAndRepair(t *testing.T) {
	l, began := newLab(need(t)), time.Now()
	for n := 0; l.at["lock-stale"] < 2*ways; n++ {
		if n == 20*ways {
			t.Fatalf("killed there only %d times in %d tries", l.at["lock-stale"], n)
		}
		s := &schedule{
			config: "presume_mtu: 1400\nmetrics: off\nrestore_after: 20ms\n", way: n % ways, orders: []string{""},
			events: [5][]event{{"xfrm policy add src 0.0.0.0/0 dst 10.0.0.0/13 dir out priority 5 tmpl src 192.0.2.1 dst 192.0.2.77 proto esp mode tunnel reqid 9"}},
		}
		s.provoke()
		if l.try(t, s); t.Failed() {
			t.Fatal(s)
		}
	}
	if l.lost > 0 {
		t.Errorf("%d versions of the owner were lost, which the journal had", l.lost)
	}
	l.report(t, time.Since(began))
}

// TestReleaseHasNoFailpoints looks for them in a program that is built without them.
func TestReleaseHasNoFailpoints(t *testing.T) {
	need(t)
	for _, name := range []string{"tsoagent", "tsoctl"} {
		out := host.WorkDir() + "/release-" + name
		if err := build(out, "tsoagent/cmd/"+name); err != nil {
			t.Fatal(err)
		}
		text, err := exec.Command("go", "tool", "nm", out).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		for _, line := range failpointSymbols(string(text)) {
			t.Errorf("%s: %s", name, line)
		}
	}
}
