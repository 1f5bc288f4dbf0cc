package service

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// machine is a systemd that is the first process of namespaces of its own, on this host's kernel (testdata/boot.sh).
type machine struct {
	t   *testing.T
	pid int // of systemd, here
	// units is where its systemd looks for them.
	units string
}

// boot starts a machine with the tree as it would be installed. It ends with the test.
func boot(t *testing.T) *machine {
	t.Helper()
	m := bootWith(t, mustStage(t))
	m.units = "/run/units"
	return m
}

// bootWith starts a machine with the files of a directory over this host's.
func bootWith(t *testing.T, staged string) *machine {
	t.Helper()
	host.Need(t, map[string]string{
		"/lib/systemd/systemd": "systemd", "systemctl": "systemd", "journalctl": "systemd", "unshare": "util-linux", "nsenter": "util-linux",
		"ip": "iproute2", "make": "make",
	})
	work, script := t.TempDir(), filepath.Join(t.TempDir(), "boot.sh")
	text, err := os.ReadFile("testdata/boot.sh")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(script, text, 0o600); err != nil {
		t.Fatal(err)
	}
	group := ownGroup(t)
	var out bytes.Buffer
	cmd := exec.Command("sh", "-c", `echo $$ >"$1/cgroup.procs" && shift && exec unshare --mount --pid --net --uts --ipc --cgroup --fork --kill-child=KILL "$@"`,
		"sh", group, "sh", script, staged, work)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var gone error
	ended := make(chan struct{})
	go func() { defer close(ended); gone = cmd.Wait() }()
	m := &machine{t: t, units: "/etc/systemd/system:/usr/lib/systemd/system"}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the machine's console:\n%s%s", out.String(), m.said())
		}
		_ = cmd.Process.Kill() // and with it, by --kill-child, all of the machine
		<-ended
	})
	within(t, "the machine is up", func() bool {
		select {
		case <-ended:
			if unable := unableTo(out.String()); unable != "" {
				t.Skip(unable)
			}
			t.Fatalf("the machine has ended: %v\n%s", gone, out.String())
		default:
		}
		if m.pid == 0 {
			m.pid = child(cmd.Process.Pid)
		}
		if m.pid == 0 || !strings.Contains(name(m.pid), "systemd") {
			return false
		}
		state, _ := m.try("systemctl", "is-system-running")
		state = strings.TrimSpace(state)
		return state == "running" || state == "degraded"
	})
	return m
}

// unableTo says which capability a machine lacks that could not be made.
func unableTo(out string) string {
	for text, what := range map[string]string{
		"overlay":      "needs overlayfs in the kernel, CONFIG_OVERLAY_FS",
		"cgroup2":      "needs the unified control group hierarchy",
		"unshare fail": "needs namespaces of all kinds",
	} {
		if strings.Contains(out, text) {
			return what + ": " + strings.TrimSpace(out)
		}
	}
	return ""
}

// ownGroup makes a control group for a machine, which ends with the test. It is of the second hierarchy wherever that is mounted.
func ownGroup(t *testing.T) string {
	t.Helper()
	at := t.TempDir()
	if err := unix.Mount("cgroup2", at, "cgroup2", 0, ""); err != nil {
		t.Skipf("needs the unified control group hierarchy: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount %s: %v", at, err)
		}
	})
	// In a PID namespace all are called alike: a name that is nobody else's.
	dir, err := os.MkdirTemp(at, "tsoagent-test-")
	if err != nil {
		t.Skipf("needs a control group of its own: %v", err)
	}
	t.Cleanup(func() {
		within(t, "the control groups of the machine are empty", func() bool { return removeGroups(dir) })
	})
	return dir
}

// removeGroups removes a control group with all in it, and reports whether it is gone.
func removeGroups(dir string) bool {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return true
	}
	for _, e := range entries {
		if e.IsDir() {
			removeGroups(filepath.Join(dir, e.Name()))
		}
	}
	return unix.Rmdir(dir) == nil
}

// child is the first child of a process, 0 for none.
func child(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	n, _ := strconv.Atoi(strings.Fields(string(b) + " 0")[0])
	return n
}

func name(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return string(b)
}

// command is a command in the machine.
func (m *machine) command(args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(m.pid), "-m", "-p", "-n", "-u", "-i", "-C", "-r", "-w"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_UNIT_PATH=" + m.units, "TERM=dumb", "LC_ALL=C.UTF-8"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (m *machine) try(args ...string) (string, error) {
	var errs bytes.Buffer
	cmd := m.command(args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s%s", strings.Join(args, " "), err, out, errs.String())
	}
	return string(out), err
}

// run is what a command in the machine prints.
func (m *machine) run(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (m *machine) said() string {
	status, _ := m.try("systemctl", "status", "--no-pager", "-l", "tsoagent.service")
	log, _ := m.try("journalctl", "--no-pager")
	return status + "\nthe journal:\n" + log
}

// property is one of the service's.
func (m *machine) property(name string) string {
	m.t.Helper()
	return m.run("systemctl", "show", "--value", "-p", name, "tsoagent.service")
}

// log is what the service has logged.
func (m *machine) log(args ...string) string {
	m.t.Helper()
	m.run("journalctl", "--sync")
	return m.run(append([]string{"journalctl", "--no-pager", "-u", "tsoagent.service"}, args...)...)
}

// dropIn changes the unit, from its next start on.
func (m *machine) dropIn(name, text string) {
	m.t.Helper()
	m.run("sh", "-c", `mkdir -p /run/units/tsoagent.service.d && printf %s "$2" >"/run/units/tsoagent.service.d/$1" && systemctl daemon-reload`, "sh", name, text)
}

// locked waits until the policy's flows have an MTU.
func (m *machine) locked(mtu string) {
	m.t.Helper()
	within(m.t, "mtu lock "+mtu, func() bool { return strings.Contains(m.clones(), "mtu lock "+mtu) })
}

func (m *machine) clones() string {
	out, _ := m.try("ip", "route", "show", "table", "5450")
	return out
}
