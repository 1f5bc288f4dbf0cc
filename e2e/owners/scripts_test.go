package owners

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hits is how often a script does what it does: several times as often as anybody is answered (docs/limits.md).
const hits = 40

// answers is how often something is written again within ten seconds, before it rests for a minute.
const answers = 10

const withMetrics = "metrics: 127.0.0.1:15450\n"

// contested makes the world of the tests in which somebody takes away, or turns on, what the agent wants, with an agent that has done its work.
func contested(t *testing.T, config string) (*lab, *witness) {
	l := newLab(t, need(t), rand.New(rand.NewPCG(1, 1)), withMetrics+config, linesOf(paragraphs(policies))...)
	l.draw(200)
	w := l.watch()
	l.start()
	r := l.settle()
	l.compare("at first", &r)
	if l.cloned == 0 || l.locked == l.cloned {
		t.Fatalf("%d locks, %d of them by clones: there is nothing to contest", l.locked, l.cloned)
	}
	return l, w
}

// ends stops the agent. Nothing of it is left then, and nothing that is not its own has been touched.
func (l *lab) ends() {
	l.Helper()
	l.must(l.stop(unix.SIGTERM))
	l.compare("after the agent", nil)
	l.same("after the agent")
}

// rests says that the agent has given up on something for a while, in its own words.
func (l *lab) rests(r report, words string) {
	l.Helper()
	for _, c := range r.Coverages {
		r.Findings = append(r.Findings, c.Notes...)
	}
	if !strings.Contains(strings.Join(r.Findings, "\n"), words) {
		l.Errorf("nothing says %q: %q", words, r.Findings)
	}
}

// TestScriptDeletesRules has a script delete all rules of the agent, again and again.
func TestScriptDeletesRules(t *testing.T) {
	l, w := contested(t, "")
	before := w.sofar()
	var r report
	for range hits {
		// The agent may have moved one meanwhile.
		for _, family := range []string{"-4", "-6"} {
			_, err := l.ours.Run("", "sh", "-c", fmt.Sprintf("ip %s rule | sed -n 's/:.*proto 84.*//p' | while read p; do ip %s rule del pref $p || true; done", family, family))
			l.must(err)
		}
		r = l.settle()
		l.compare("between two deletions", &r)
	}
	l.rests(r, "somebody keeps deleting its rules")
	after := w.sofar()
	// Each shape has one rule or two.
	if most, n := 2*answers*shapes, after.rules-before.rules; n > most || n < answers {
		t.Errorf("%d rules were added for %d deletions, want %d to %d", n, hits, answers, most)
	}
	// One that is there already when it is added counts, too.
	if n := l.actions()["add_rule"]; n < after.rules || n > after.rules+hits/4 {
		t.Errorf("the agent counts %d rules, the kernel told of %d", n, after.rules)
	}
	t.Log(after)
	l.ends()
}

// shapes are how many sorts of flows have a table in the world of the policies, the marker's included.
const shapes = 5

// TestScriptDeletesClones has a script flush the agent's tables, again and again.
func TestScriptDeletesClones(t *testing.T) {
	l, w := contested(t, "")
	before := w.sofar()
	var r report
	for range hits {
		_, err := l.ours.Run("", "sh", "-c", "ip route flush table all proto 84; ip -6 route flush table all proto 84")
		l.must(err)
		r = l.settle()
		l.compare("between two deletions", &r)
	}
	l.rests(r, "does not stay in its table")
	after := w.sofar()
	if most, n := answers*before.clones, after.clones-before.clones; n > most || n < answers {
		t.Errorf("%d clones were put for %d deletions, want %d to %d", n, hits, answers, most)
	}
	if n := l.actions()["clone"]; n != after.clones {
		t.Errorf("the agent counts %d clones, the kernel told of %d", n, after.clones)
	}
	t.Log(after)
	l.ends()
}

// TestOwnerRewritesRoutes has the owners of routes that are locked in place write them again, again and again.
func TestOwnerRewritesRoutes(t *testing.T) {
	l, w := contested(t, "")
	before := w.sofar()
	var r report
	for i := range hits {
		l.change(fmt.Sprintf("route replace 10.5.0.0/16 via 198.51.100.%d", 8+i%2), fmt.Sprintf("-6 route replace fd05::/16 via fd00:3::%d dev nic1", 8+i%2))
		r = l.settle()
		l.compare("between two writes", &r)
	}
	after := w.sofar()
	if n := after.locks - before.locks; n > 2*answers || n < answers {
		t.Errorf("%d locks were written for %d times two writes of the owners, want %d to %d", n, hits, answers, 2*answers)
	}
	if n := l.actions()["lock"]; n != after.locks {
		t.Errorf("the agent counts %d locks, the kernel told of %d", n, after.locks)
	}
	if n := w.sofar().theirs - before.theirs; n != 2*hits {
		t.Errorf("%d writes of routes without a lock, of which %d are the owners'", n, 2*hits)
	}
	t.Log(after)
	l.ends()
}

// TestScriptTurnsFeaturesOn has a script turn on what the agent holds off, again and again: it is overruled once, and not restored in the end.
func TestScriptTurnsFeaturesOn(t *testing.T) {
	l, _ := contested(t, "shared_nics: off\n")
	held := l.actions()["hold"]
	if held == 0 {
		t.Fatal("nothing is held off")
	}
	for range hits {
		_, err := l.ours.Run("", "ethtool", "-K", "nic0", "tx-tcp-segmentation", "on")
		l.must(err)
		l.settle()
	}
	if n := l.actions()["hold"] - held; n != 1 {
		t.Errorf("it was held off %d times more, want once", n)
	}
	if got := l.feature("nic0", "tx-tcp-segmentation"); got != "on" {
		t.Errorf("tx-tcp-segmentation is %s, want what the script says", got)
	}
	if got := l.feature("nic0", "tx-tcp6-segmentation"); got != "off" {
		t.Errorf("tx-tcp6-segmentation is %s: nobody has contested that", got)
	}
	l.ends()
}

// TestScriptTurnsFeatureOffAndOn turns a feature off that the agent does not hold, and on: that is the script's alone.
func TestScriptTurnsFeatureOffAndOn(t *testing.T) {
	l, _ := contested(t, "")
	before := l.actions()
	for range hits / 2 {
		l.change("ethtool -K nic0 tso off", "ethtool -K nic0 tso on", "ethtool -K nic1 gro off", "ethtool -K nic1 gro on")
	}
	l.settle()
	after := l.actions()
	for _, a := range []string{"hold", "give_back_feature", "lock", "delete_rule", "delete_clone"} {
		if after[a] != before[a] {
			t.Errorf("%s: %d times, want none", a, after[a]-before[a])
		}
	}
	l.ends()
}

// feature is on or off, as ethtool says.
func (l *lab) feature(dev, name string) string {
	l.Helper()
	text, err := l.ours.Run("", "ethtool", "-k", dev)
	l.must(err)
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name+":" {
			return f[1]
		}
	}
	l.Fatalf("no feature %s", name)
	return ""
}
