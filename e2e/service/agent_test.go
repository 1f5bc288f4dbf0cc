package service

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tsoagent/e2e/harness"
)

// capabilities are those of the unit, for setpriv.
const capabilities = "--bounding-set=-all,+net_admin,+bpf,+perfmon"

// agent is one that runs in the test's own network namespace, with the capabilities of the unit.
type agent struct {
	t       *testing.T
	dir     string // of the run
	address string // of its metrics
	process *os.Process
	log     *harness.Log
}

func ip(t *testing.T, lines string) {
	t.Helper()
	for line := range strings.Lines(lines) {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", strings.TrimSpace(line), err, out)
		}
	}
}

// network is a device with a default route, until the test ends.
func network(t *testing.T) {
	t.Helper()
	ip(t, `link add n0 type veth peer name n1
link set n0 up
link set n1 up
addr add 192.0.2.1/24 dev n0
addr add 10.1.0.1/16 dev n0
addr add 2001:db8::1/64 dev n0 nodad
route add default via 192.0.2.254
-6 route add default via 2001:db8::fe`)
	t.Cleanup(func() { ip(t, "link del n0\nxfrm policy flush") })
}

// cover adds a policy to a destination, whose flows are under a default route.
func cover(t *testing.T, dst string) {
	t.Helper()
	src, tmpl := "10.1.0.0/16", "src 192.0.2.1 dst 192.0.2.2"
	if strings.Contains(dst, ":") {
		src, tmpl = "2001:db8::/64", "src 2001:db8::1 dst 2001:db8::2"
	}
	ip(t, fmt.Sprintf("xfrm policy add src %s dst %s dir out tmpl %s proto esp reqid 1 mode tunnel", src, dst, tmpl))
}

// run starts an agent, which ends with the test, and waits until it is ready.
func run(t *testing.T, args ...string) *agent {
	t.Helper()
	return runAt(t, mustStage(t)+"/usr/sbin/tsoagent", args...)
}

// runAt is run with a program that need not be the installed one.
func runAt(t *testing.T, program string, args ...string) *agent {
	t.Helper()
	harness.NeedPrograms(t, map[string]string{"setpriv": "util-linux"})
	a := &agent{t: t, dir: filepath.Join(t.TempDir(), "run"), address: "127.0.0.1:15450", log: new(harness.Log)}
	cmd := exec.Command("setpriv", append([]string{
		capabilities, "--no-new-privs", program, "run",
		"--run-dir", a.dir, "--presume-mtu", "1400", "--restore-after", "100ms",
	}, args...)...)
	cmd.Stdout, cmd.Stderr = a.log, a.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a.process = cmd.Process
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the agent: %v", err)
		}
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.log)
		}
	})
	within(t, "the agent is ready", func() bool { return strings.Contains(a.log.String(), "msg=ready") })
	within(t, "its page is there", func() bool {
		res, err := http.Get("http://" + a.address + "/metrics")
		return err == nil && res.Body.Close() == nil
	})
	return a
}

// get is a page, and its status.
func (a *agent) get(path string) (*http.Response, string) {
	a.t.Helper()
	res, err := http.Get("http://" + a.address + path)
	if err != nil {
		a.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return res, string(b)
}

// TestCapabilitiesOfTheUnitAreNeeded takes one after the other away.
func TestCapabilitiesOfTheUnitAreNeeded(t *testing.T) {
	host.Need(t, map[string]string{"setpriv": "util-linux", "ip": "iproute2"})
	unitText, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(unitText), "\nCapabilityBoundingSet=CAP_NET_ADMIN CAP_BPF CAP_PERFMON\n") {
		t.Fatal("the unit has other capabilities than these tests")
	}
	staged := mustStage(t)
	without := func(left string, args ...string) (string, error) {
		out, err := exec.Command("setpriv", append([]string{"--bounding-set=-all," + left, "--no-new-privs"}, args...)...).CombinedOutput()
		return string(out), err
	}
	out, err := without("+bpf,+perfmon", staged+"/usr/sbin/tsoagent", "run", "--run-dir", filepath.Join(t.TempDir(), "run"))
	if err == nil || !strings.Contains(out, "CAP_NET_ADMIN is missing") {
		t.Errorf("without CAP_NET_ADMIN: %v %s", err, out)
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		t.Skipf("needs the kernel's BTF, CONFIG_DEBUG_INFO_BTF: %v", err)
	}
	tsoctl := staged + "/usr/bin/tsoctl"
	flows := []string{tsoctl, "--run-dir", filepath.Join(t.TempDir(), "none"), "flows"}
	if out, err := without("+net_admin,+bpf,+perfmon", flows...); err != nil {
		t.Errorf("with all of them: %v %s", err, out)
	}
	for _, left := range []string{"+net_admin,+bpf", "+net_admin,+perfmon"} {
		if out, err := without(left, flows...); err == nil || !strings.Contains(out, "CAP_") {
			t.Errorf("with %s only: %v %s", left, err, out)
		}
	}
}
