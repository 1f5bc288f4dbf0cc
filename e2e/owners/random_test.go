package owners

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRandomOwners builds worlds at random. TSOAGENT_OWNERS is how many, which are others each time then; TSOAGENT_OWNERS_SEED=SEED:N is the Nth of a seed.
func TestRandomOwners(t *testing.T) {
	bin := need(t)
	worlds, seed, n := 24, uint64(1), 0
	if text := os.Getenv("TSOAGENT_OWNERS"); text != "" {
		var err error
		if worlds, err = strconv.Atoi(text); err != nil {
			t.Fatal("TSOAGENT_OWNERS: ", err)
		}
		seed = rand.Uint64()
	}
	if again := os.Getenv("TSOAGENT_OWNERS_SEED"); again != "" {
		if _, err := fmt.Sscanf(again, "%d:%d", &seed, &n); err != nil {
			t.Fatal("TSOAGENT_OWNERS_SEED: ", err)
		}
		worlds = 1
	}
	asked, locked, cloned := 0, 0, 0
	for i := n; i < n+worlds && !t.Failed(); i++ {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			l := random(t, bin, rand.New(rand.NewPCG(seed, uint64(i))))
			asked, locked, cloned = asked+l.asked, locked+l.locked, cloned+l.cloned
			if t.Failed() {
				t.Logf("again: TSOAGENT_OWNERS_SEED=%d:%d go test ./e2e/owners -run TestRandomOwners", seed, i)
			}
		})
	}
	t.Logf("%d questions, %d answers with a lock, %d by a table of the agent's", asked, locked, cloned)
	if locked == 0 || cloned == 0 {
		t.Error("nothing was locked: nothing was compared")
	}
}

// random lets a world change at random under an agent, which is stopped or killed in the end.
func random(t *testing.T, bin string, r *rand.Rand) *lab {
	d := draw{r}
	config := d.some(3, "source_less_lookups: off\n") + d.some(6, "mtu: advise\n")
	lines := append([]string{}, objects...)
	for range 3 + d.IntN(6) {
		lines = append(lines, d.policy())
	}
	for range 2 + d.IntN(14) {
		lines = append(lines, d.route())
	}
	for range d.IntN(8) {
		lines = append(lines, d.rule())
	}
	switch d.IntN(12) {
	case 0: // as Cilium does it
		for _, family := range []string{"-4 ", "-6 "} {
			lines = append(lines, family+"rule add pref 100 lookup local", family+"rule del pref 0 lookup local")
		}
	case 1:
		lines = append(lines, d.of("-4", "-6")+" rule del pref 0 lookup local")
	}
	var stages [][]string
	for range 1 + d.IntN(4) {
		var stage []string
		for range []int{1, 1, 2, 3, 8, 20}[d.IntN(6)] {
			stage = append(stage, d.change())
		}
		stages = append(stages, stage)
	}
	l := newLab(t, bin, r, config, lines...)
	l.Cleanup(func() {
		if t.Failed() {
			t.Logf("config:\n%s\nbefore:\n%s", config, strings.Join(lines, "\n"))
			for _, stage := range stages {
				t.Logf("then:\n%s", strings.Join(stage, "\n"))
			}
		}
	})
	for _, stage := range stages {
		for _, line := range stage {
			l.talk.read(line)
		}
	}
	l.draw(questions / 2)
	l.compare("before the agent", nil)
	if t.Failed() {
		t.Fatal("the kernel does not answer alike without an agent")
	}
	l.start()
	report := l.settle()
	l.compare("with the agent", &report)
	for i, stage := range stages {
		l.change(stage...)
		report = l.settle()
		l.compare(fmt.Sprintf("after change %d", i+1), &report)
	}
	if d.in(3) {
		_ = l.stop(unix.SIGKILL) // which is no good end
		l.tsoctl("restore", "--stale")
		if err := l.restore(); err != nil {
			if !strings.Contains(err.Error(), refusal) {
				t.Error(err)
			}
			l.up()
		}
	} else if err := l.stop(unix.SIGTERM); err != nil {
		if text, _ := os.ReadFile(l.log.Name()); !strings.Contains(string(text), refusal) {
			t.Errorf("the agent: %v", err)
		}
		l.up()
	}
	l.compare("after the agent", nil)
	l.same("after the agent")
	return l
}

// refusal is what is said where the kernel refuses a route of several ways one of which is down, or one whose gateway is no neighbour any more
// (docs/limits.md): the journal keeps it.
const refusal = "the kernel refuses to give the MTU"

// up brings the ways back, and then gives back what the kernel has refused.
func (l *lab) up() {
	l.Helper()
	l.change("link set nic0 up", "link set nic1 up", "link set nic2 up", "addr add 198.51.100.1/24 dev nic1",
		"-6 addr add fd00:2::1/64 dev nic0 nodad", "-6 addr add fd00:3::1/64 dev nic1 nodad", "-6 addr add fd00:4::1/64 dev nic2 nodad")
	l.must(l.restore())
}

// restore gives back what an agent has left.
func (l *lab) restore() error {
	_, err := l.ours.Run("", filepath.Join(l.bin, "tsoctl"), "restore", "-c", l.config())
	return err
}
