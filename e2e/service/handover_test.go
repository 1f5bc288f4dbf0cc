package service

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/e2e/harness"
)

// A monitor is what the kernel has told of routes, rules and features since it was started.
type monitor struct {
	t       *testing.T
	command func(args ...string) *exec.Cmd
	routes  *harness.Log // ip monitor
	feats   *harness.Log // ethtool --monitor
	marks   int
	told    struct{ routes, feats int } // how much of it
}

// watch starts a monitor where command runs things, which ends with the test.
func watch(t *testing.T, command func(args ...string) *exec.Cmd) *monitor {
	t.Helper()
	m := &monitor{t: t, command: command, routes: new(harness.Log), feats: new(harness.Log)}
	for out, args := range map[*harness.Log][]string{m.routes: {"ip", "monitor", "route", "rule"}, m.feats: {"stdbuf", "-oL", "ethtool", "--monitor", "-K"}} {
		cmd := command(args...)
		cmd.Stdout, cmd.Stderr = out, out
		cmd.WaitDelay = time.Millisecond // in a machine its child lives as long as that
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	}
	within(t, "the monitors hear", func() bool { m.poke(); return m.heard() })
	m.news()
	return m
}

// poke changes something that nobody cares about, and each time something else.
func (m *monitor) poke() {
	m.t.Helper()
	m.marks = int(marks.Add(1))
	onOff := []string{"on", "off"}[m.marks%2]
	for _, args := range [][]string{
		{"ip", "route", "add", "blackhole", m.mark()},
		{"ethtool", "-K", "n1", "gro", onOff},
	} {
		if out, err := m.command(args...).CombinedOutput(); err != nil {
			m.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
}

// marks counts what was changed by all monitors, as they can be in one namespace.
var marks atomic.Int32

func (m *monitor) mark() string { return fmt.Sprintf("198.19.%d.%d", m.marks/250, 1+m.marks%250) }

// heard says whether the monitors have told of the last poke.
func (m *monitor) heard() bool {
	onOff := []string{"on", "off"}[m.marks%2]
	feats := m.feats.String()
	last := strings.LastIndex(feats, "generic-receive-offload: ")
	return strings.Contains(m.routes.String(), "blackhole "+m.mark()+" ") && last >= 0 && strings.HasPrefix(feats[last:], "generic-receive-offload: "+onOff)
}

// news is what was told since it was asked last.
func (m *monitor) news() (routes, features string) {
	m.t.Helper()
	m.poke()
	within(m.t, "the monitors have told of all", m.heard)
	routes, features = m.routes.String()[m.told.routes:], m.feats.String()[m.told.feats:]
	m.told.routes += len(routes)
	m.told.feats += len(features)
	return routes, features
}

// TestHandover replaces the program under a running agent, and has it hand over: not even for a moment is anything taken away.
func TestHandover(t *testing.T) {
	host.Need(t, map[string]string{"ip": "iproute2", "ethtool": "ethtool", "stdbuf": "coreutils"})
	network(t)
	cover(t, "10.3.0.0/16")
	cover(t, "2001:db8:3::/48")
	program := filepath.Join(t.TempDir(), "tsoagent")
	install(t, program)
	a := runAt(t, program, "--shared-nics", "off") // so that something is held off
	inPlace := func() string {
		t.Helper()
		return output(t, "ip", "rule") + output(t, "ip", "-6", "rule") + output(t, "ip", "route", "show", "table", "5450") +
			output(t, "ip", "-6", "route", "show", "table", "5450") + output(t, "ethtool", "-k", "n0")
	}
	before := inPlace()
	for _, want := range []string{"10.3.0.0/16 via 192.0.2.254", "2001:db8:3::/48 via 2001:db8::fe", "mtu lock 1400", "tx-tcp-segmentation: off", "lookup 5450"} {
		if !strings.Contains(before, want) {
			t.Fatalf("%q is not in place:\n%s", want, before)
		}
	}
	tsoctl := func(args ...string) (string, error) {
		out, err := exec.Command(mustStage(t)+"/usr/bin/tsoctl", append(args, "--run-dir", a.dir)...).CombinedOutput()
		return string(out), err
	}
	running := func() string {
		t.Helper()
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", a.process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return exe
	}

	m := watch(t, func(args ...string) *exec.Cmd { return exec.Command(args[0], args[1:]...) })
	t.Run("has nothing taken away", func(t *testing.T) {
		install(t, program)
		if got := running(); !strings.HasSuffix(got, " (deleted)") {
			t.Fatalf("the program is replaced, and %s runs", got)
		}
		out, err := tsoctl("handover")
		if err != nil || !strings.Contains(out, "handed over from ") {
			t.Fatalf("tsoctl handover: %v: %s", err, out)
		}
		if got := running(); got != program {
			t.Errorf("%s runs, want %s", got, program)
		}
		routes, features := m.news()
		if strings.Contains(routes, "Deleted") || strings.Contains(routes, "5450") || strings.Contains(routes, "proto 84") {
			t.Errorf("something was written:\n%s", routes)
		}
		if strings.Contains(features, "n0") {
			t.Errorf("features were switched:\n%s", features)
		}
		if diff := cmp.Diff(before, inPlace()); diff != "" {
			t.Errorf("in place (-before +now)\n%s", diff)
		}
		// It follows, and is the same to the world around it: its page answers.
		cover(t, "10.4.0.0/16")
		within(t, "the next policy is locked", func() bool {
			return strings.Contains(output(t, "ip", "route", "show", "table", "5450"), "10.4.0.0/16")
		})
		if _, page := a.get("/metrics"); !strings.Contains(page, `tsoagent_coverages{cut="nic",kind="policy",netns="host"} 3`) {
			t.Errorf("the page:\n%s", page)
		}
	})

	t.Run("is refused while it is paused", func(t *testing.T) {
		if out, err := tsoctl("pause"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		out, err := tsoctl("handover")
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(out, "tsoctl resume") {
			t.Errorf("tsoctl handover: %v: %s", err, out)
		}
		if err := a.process.Signal(syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		within(t, "the log refuses, too", func() bool {
			return strings.Contains(a.log.String(), `msg="not handed over: this program goes on" err="the agent is paused: resume it first"`)
		})
		if out, err := tsoctl("status"); !strings.Contains(out, "paused") {
			t.Errorf("tsoctl status: %v: %s", err, out)
		}
		if out, err := tsoctl("resume"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	})

	t.Run("is survived where there is no program", func(t *testing.T) {
		if err := os.Remove(program); err != nil {
			t.Fatal(err)
		}
		out, err := tsoctl("handover", "--within", "300ms")
		if err == nil || !strings.Contains(out, "no new program follows the kernel within 300ms: the old one goes on") {
			t.Errorf("tsoctl handover: %v: %s", err, out)
		}
		if log := a.log.String(); !strings.Contains(log, "no such file or directory") {
			t.Errorf("the log:\n%s", log)
		}
		ip(t, "xfrm policy flush")
		within(t, "it follows", func() bool { return !strings.Contains(output(t, "ip", "rule"), "5450") })
		// What is taken away is heard.
		within(t, "the features are back", func() bool { return strings.Contains(output(t, "ethtool", "-k", "n0"), "tx-tcp-segmentation: on") })
		if routes, features := m.news(); !strings.Contains(routes, "Deleted") || !strings.Contains(routes, "5450") || !strings.Contains(features, "n0") {
			t.Errorf("nothing is heard of it:\n%s\n%s", routes, features)
		}
	})
}

// install puts the program in its place as a package manager does: a new file takes the name.
func install(t *testing.T, program string) {
	t.Helper()
	b, err := os.ReadFile(mustStage(t) + "/usr/sbin/tsoagent")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(program+".new", b, 0o755), os.Rename(program+".new", program)); err != nil {
		t.Fatal(err)
	}
}

func output(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}
