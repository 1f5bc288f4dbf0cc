package service

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"tsoagent/e2e/harness"
)

const unit = "../../packaging/systemd/tsoagent.service"

// TestUnitNamesDocumentsThatAreInstalled looks for each of them.
func TestUnitNamesDocumentsThatAreInstalled(t *testing.T) {
	host.Need(t, map[string]string{"make": "make"})
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(text), "\nDocumentation=")
	line, _, _ = strings.Cut(line, "\n")
	places := strings.Fields(line)
	if len(places) != 3 {
		t.Errorf("it names %q", places)
	}
	for _, place := range places {
		path, isFile := strings.CutPrefix(place, "file://")
		if page := regexp.MustCompile(`^man:([a-z-]+)\((\d)\)$`).FindStringSubmatch(place); page != nil {
			path = fmt.Sprintf("/usr/share/man/man%s/%s.%s", page[2], page[1], page[2])
		} else if !isFile {
			t.Fatalf("%s is neither a manual page nor a file", place)
		}
		if s, err := os.Stat(mustStage(t) + path); err != nil || s.Size() == 0 {
			t.Errorf("%s: %v", place, err)
		}
	}
}

// TestUnitUnderSystemd runs the unit as it is, from the first start to the end.
func TestUnitUnderSystemd(t *testing.T) {
	m := boot(t)
	m.run("systemctl", "start", "tsoagent.service")
	// Type=notify: when the start has ended, what is needed is in place.
	if got := m.clones(); !strings.Contains(got, "10.3.0.0/16 via 192.0.2.254 dev n0 proto 84") || !strings.Contains(got, "mtu lock 1400") {
		t.Errorf("ready, and yet only %q is in place", got)
	}
	pid := m.property("MainPID")

	t.Run("has the capabilities that the unit names and no others", func(t *testing.T) {
		// CAP_NET_ADMIN is 12, CAP_PERFMON 38, CAP_BPF 39 (linux/capability.h).
		want := fmt.Sprintf("%016x", 1<<12|1<<38|1<<39)
		status := m.run("cat", "/proc/"+pid+"/status")
		for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
			if !strings.Contains(status, set+":\t"+want) {
				t.Errorf("%s is not %s:\n%s", set, want, status)
			}
		}
		if !strings.Contains(status, "NoNewPrivs:\t1") || !strings.Contains(status, "Seccomp:\t2") {
			t.Errorf("status:\n%s", status)
		}
		// They are enough for BPF, too.
		out, err := m.try("tsoctl", "flows")
		if err != nil || !strings.Contains(out, "connections") {
			t.Errorf("tsoctl flows: %v %s", err, out)
		}
	})

	t.Run("has the processor as soon as FRR has", func(t *testing.T) {
		if got := strings.TrimSpace(m.run("ps", "-o", "ni=", "-p", pid)); got != "-5" {
			t.Errorf("its nice value is %s", got)
		}
	})

	t.Run("is told to systemd", func(t *testing.T) {
		if got := m.property("StatusText"); !strings.Contains(got, "enforce: 1 coverage, 0 features, 0 routes, 1 clone; `tsoctl status` has more") {
			t.Errorf("status %q", got)
		}
		within(t, "the watchdog is fed", func() bool { return m.property("WatchdogTimestampMonotonic") != "0" })
	})

	t.Run("logs to the journal with its priorities, and the time once", func(t *testing.T) {
		log := m.log("-o", "json")
		seen := false
		for line := range strings.Lines(log) {
			var e struct {
				Message  string `json:"MESSAGE"`
				Priority string `json:"PRIORITY"`
				Program  string `json:"SYSLOG_IDENTIFIER"`
			}
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatal(err)
			}
			if e.Program != "tsoagent" {
				continue // systemd's own
			}
			if strings.Contains(e.Message, "time=") || !strings.HasPrefix(e.Message, "level=") {
				t.Errorf("line %q", e.Message)
			}
			if strings.HasPrefix(e.Message, "level=INFO msg=ready ") {
				seen = e.Priority == "6"
			}
		}
		if !seen {
			t.Errorf("no line says ready with priority 6:\n%s", log)
		}
	})

	t.Run("lets the group read", func(t *testing.T) {
		if out, err := m.try("setpriv", "--reuid=65534", "--regid=tsoagent", "--clear-groups", "tsoctl", "status"); err != nil || !strings.Contains(out, "mode enforce") {
			t.Errorf("one of the group: %v %s", err, out)
		}
		if out, err := m.try("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "tsoctl", "status"); err == nil {
			t.Errorf("one who is not in the group reads %s", out)
		}
	})

	t.Run("reloads", func(t *testing.T) {
		m.run("sed", "-i", "s/^presume_mtu.*/presume_mtu: 1380/", "/etc/tsoagent/tsoagent.yaml")
		m.run("systemctl", "reload", "tsoagent.service")
		if got := m.clones(); !strings.Contains(got, "mtu lock 1380") {
			t.Errorf("the reload has ended, and %q is in place", got)
		}
		m.run("sed", "-i", "s/^presume_mtu.*/presume_mtu: 12/", "/etc/tsoagent/tsoagent.yaml")
		const mistake = `tsoagent.yaml:8: presume_mtu: 12 is less than 576`
		if out, err := m.try("systemctl", "reload", "tsoagent.service"); err == nil {
			t.Errorf("it reloads what is wrong: %s", out)
		}
		within(t, "the mistake is logged", func() bool { return strings.Contains(m.log("-p", "3"), mistake) })
		if log := m.log("-t", "tsoctl"); !strings.Contains(log, mistake) {
			t.Errorf("the reload itself doesn't say what is wrong:\n%s", log)
		}
		if got := m.property("ExecReload"); !strings.Contains(got, "status=2") {
			t.Errorf("the reload has ended otherwise: %s", got)
		}
		if got := m.property("ActiveState") + " " + m.property("SubState"); got != "active running" {
			t.Errorf("after a reload that failed it is %s", got)
		}
		if _, err := m.try("tsoctl", "reload"); err == nil || !strings.Contains(err.Error(), mistake) {
			t.Errorf("tsoctl reload: %v", err)
		}
		if _, err := m.try("setpriv", "--reuid=65534", "--regid=tsoagent", "--clear-groups", "tsoctl", "reload"); err == nil || !strings.Contains(err.Error(), "only root may do this") {
			t.Errorf("one of the group reloads: %v", err)
		}
		m.run("sed", "-i", "s/^presume_mtu.*/presume_mtu: 1380/", "/etc/tsoagent/tsoagent.yaml")
		if out := m.run("tsoctl", "reload"); !strings.Contains(out, "the configuration is as it was") {
			t.Errorf("tsoctl reload: %s", out)
		}
		if got := m.property("MainPID"); got != pid {
			t.Errorf("another process: %s, was %s", got, pid)
		}
		within(t, "it runs", func() bool { return m.property("ActiveState") == "active" })
		if got := m.clones(); !strings.Contains(got, "mtu lock 1380") {
			t.Errorf("after a wrong configuration %q is in place", got)
		}
	})

	t.Run("is started again when it is killed, and strands nobody in between", func(t *testing.T) {
		m.run("kill", "-KILL", pid)
		within(t, "another process", func() bool {
			now := m.property("MainPID")
			return now != pid && now != "0" && m.property("ActiveState") == "active"
		})
		m.locked("1380")
		if got := m.property("NRestarts"); got != "1" {
			t.Errorf("%s restarts, want 1", got)
		}
		log := m.log()
		for _, want := range []string{`its rules are taken away, as nobody follows the routes below its clones" rules=1`, "taken away: 1 clone"} {
			if !strings.Contains(log, want) { // by the guard, and by ExecStopPost
				t.Errorf("nobody said %q:\n%s", want, log)
			}
		}
	})

	t.Run("is killed and started again when a loop hangs", func(t *testing.T) {
		m.dropIn("quick.conf", "[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\n")
		m.run("systemctl", "restart", "tsoagent.service")
		fed := m.property("WatchdogTimestampMonotonic")
		within(t, "the watchdog is fed more than once", func() bool { return m.property("WatchdogTimestampMonotonic") != fed })
		m.run("tsoctl", "pause")
		within(t, "the status says that it is paused", func() bool { return strings.Contains(m.property("StatusText"), "1 clone; paused; `tsoctl status`") })
		m.run("tsoctl", "resume")
		before := m.property("MainPID")
		m.run("kill", "-STOP", before)
		within(t, "another process", func() bool {
			now := m.property("MainPID")
			return now != before && now != "0" && m.property("ActiveState") == "active"
		})
		if log := m.log(); !strings.Contains(log, "Watchdog timeout") {
			t.Errorf("the watchdog wasn't why:\n%s", log)
		}
		m.locked("1380")
	})

	t.Run("follows other namespaces with the drop-in of the documentation", func(t *testing.T) {
		m.dropIn("netns.conf", dropIn(t, "CAP_SYS_ADMIN"))
		m.run("sh", "-c", "mkdir -p /etc/default && echo TSOAGENT_NETNS=all >/etc/default/tsoagent")
		m.run("systemctl", "restart", "tsoagent.service")
		m.run("ip", "netns", "add", "blue")
		for _, line := range []string{
			"link set lo up", "link add n0 type veth peer name n1", "link set n0 up", "link set n1 up", "addr add 192.0.2.1/24 dev n0", "route add default via 192.0.2.254",
			"xfrm policy add src 192.0.2.1/32 dst 10.3.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel",
		} {
			m.run(append([]string{"ip", "-n", "blue"}, strings.Fields(line)...)...)
		}
		within(t, "the lock in blue", func() bool {
			out, _ := m.try("ip", "-n", "blue", "route", "show", "table", "5450")
			return strings.Contains(out, "mtu lock 1380")
		})
		m.locked("1380")
		// The new program is where the old one was, whatever namespaces its threads were in, and finds both again.
		pid := m.property("MainPID")
		heard := new(harness.Log)
		monitor := m.command("ip", "-n", "blue", "monitor", "route", "rule")
		monitor.Stdout, monitor.WaitDelay = heard, time.Millisecond
		if err := monitor.Start(); err != nil {
			t.Fatal(err)
		}
		mark := 0
		tells := func() bool {
			mark++
			m.run("ip", "-n", "blue", "route", "add", "blackhole", fmt.Sprintf("203.0.113.%d", mark))
			return strings.Contains(heard.String(), "blackhole")
		}
		within(t, "the monitor hears", tells)
		m.run("tsoctl", "handover")
		if got := m.property("MainPID") + " " + m.run("readlink", "/proc/"+pid+"/ns/net"); got != pid+" "+m.run("readlink", "/proc/1/ns/net") {
			t.Errorf("after the handover it is %s", got)
		}
		within(t, "blue is followed", func() bool {
			out, _ := m.try("tsoctl", "status", "--netns", "blue")
			return strings.Contains(out, "1 coverage")
		})
		last := mark + 1
		within(t, "the monitor has heard all", func() bool { tells(); return strings.Contains(heard.String(), fmt.Sprintf("203.0.113.%d ", last)) })
		_ = monitor.Process.Kill()
		_ = monitor.Wait()
		if strings.Contains(heard.String(), "Deleted") || strings.Contains(heard.String(), "5450") {
			t.Errorf("the handover writes in blue:\n%s", heard)
		}
		m.run("rm", "/etc/default/tsoagent")
	})

	t.Run("names processes of other users with the drop-in of the documentation", func(t *testing.T) {
		client := m.command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/5301; read -r -u 3")
		server := m.command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-MIO::Socket::INET", "-e",
			`my $s = IO::Socket::INET->new(LocalAddr => "127.0.0.1:5301", Listen => 1, ReuseAddr => 1) or die; my $c = $s->accept; <STDIN>`)
		in, err := server.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = in.Close(); _ = server.Wait() }()
		within(t, "somebody listens", func() bool { out, _ := m.try("ss", "-Hltn"); return strings.Contains(out, ":5301") })
		if err := client.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Process.Kill(); _ = client.Wait() }()
		named := func() string { out, _ := m.try("tsoctl", "flows", "--processes"); return out }
		within(t, "the connection", func() bool { return strings.Contains(named(), ":5301") })
		if out := named(); strings.Contains(out, "perl") {
			t.Errorf("the drop-in is not needed:\n%s", out)
		}
		m.dropIn("processes.conf", dropIn(t, "CAP_SYS_PTRACE"))
		m.run("systemctl", "restart", "tsoagent.service")
		within(t, "the process's name", func() bool { return strings.Contains(named(), "perl") })
	})

	t.Run("gives everything back when it is stopped, and keeps its directory", func(t *testing.T) {
		m.run("systemctl", "stop", "tsoagent.service")
		if got := m.clones() + m.run("ip", "rule"); strings.Contains(got, "5450") || strings.Contains(got, "proto 84") {
			t.Errorf("left: %s", got)
		}
		if got := m.property("Result"); got != "success" {
			t.Errorf("result %s", got)
		}
		if got := m.run("stat", "-c", "%a %U %G", "/run/tsoagent"); got != "750 root tsoagent" {
			t.Errorf("/run/tsoagent is %s", got)
		}
	})

	t.Run("ends at once with a wrong configuration, and says why", func(t *testing.T) {
		m.run("sed", "-i", "s/^presume_mtu.*/presume_mtu: 12/", "/etc/tsoagent/tsoagent.yaml")
		if out, err := m.try("systemctl", "start", "tsoagent.service"); err == nil {
			t.Errorf("it starts: %s", out)
		}
		within(t, "systemd gives up", func() bool { return m.property("ActiveState") == "failed" })
		if log := m.log(); !strings.Contains(log, "presume_mtu: 12 is less than 576") {
			t.Errorf("log:\n%s", log)
		}
	})
}

// dropIn is the one of docs/service.md that has a word.
func dropIn(t *testing.T, word string) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/service.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?s)```\n(.*?)```").FindAllStringSubmatch(string(b), -1) {
		if strings.Contains(m[1], "[Service]") && strings.Contains(m[1], word) {
			return m[1]
		}
	}
	t.Fatalf("docs/service.md has no drop-in with %s", word)
	return ""
}

// TestUnitIsRight has systemd look at the files without running them.
func TestUnitIsRight(t *testing.T) {
	harness.NeedPrograms(t, map[string]string{"systemd-analyze": "systemd", "systemd-sysusers": "systemd", "systemd-tmpfiles": "systemd", "make": "make"})
	host.Need(t, nil)
	staged := mustStage(t)
	// What the unit names has to be where it says.
	root := t.TempDir()
	for _, dir := range []string{"usr/sbin", "usr/bin", "etc", "usr/lib/systemd/system"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", "-a", staged+"/.", root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, target := range []string{"sysinit", "basic", "shutdown", "multi-user", "network-pre"} {
		if out, err := exec.Command("cp", "/lib/systemd/system/"+target+".target", root+"/usr/lib/systemd/system").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	out, err := exec.Command("systemd-analyze", "verify", "--root="+root, "--man=no", "tsoagent.service").CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "tsoagent") {
			t.Errorf("systemd-analyze verify: %s", line)
		}
	}
	if err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, args := range [][]string{
		{"systemd-sysusers", "--root=" + root, "tsoagent.conf"},
		{"systemd-tmpfiles", "--root=" + root, "--create", "tsoagent.conf"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", args[0], err, out)
		}
	}
	if b, err := os.ReadFile(root + "/etc/group"); err != nil || !strings.Contains(string(b), "tsoagent:") {
		t.Errorf("the group: %v %s", err, b)
	}
	if info, err := os.Stat(root + "/run/tsoagent"); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("the directory: %v %v", info, err)
	}
}

// TestExposureInTheReadme holds what the documents say to what systemd says.
func TestExposureInTheReadme(t *testing.T) {
	harness.NeedPrograms(t, map[string]string{"systemd-analyze": "systemd"})
	out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--no-pager", unit).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	found := regexp.MustCompile(`Overall exposure level for tsoagent.service: ([0-9.]+)`).FindStringSubmatch(string(out))
	if found == nil {
		t.Fatalf("no figure in:\n%s", out)
	}
	now, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"../../README.md", "../../docs/service.md"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		said := regexp.MustCompile("`systemd-analyze security`[^.]*? ([0-9]\\.[0-9])").FindStringSubmatch(string(b))
		if said == nil {
			t.Errorf("%s has no figure of `systemd-analyze security`", file)
			continue
		}
		// Another version of systemd weighs a little differently. The figure is of 252.
		if want, err := strconv.ParseFloat(said[1], 64); err != nil || now > want {
			t.Errorf("%s says %s, systemd-analyze says %s", file, said[1], found[1])
		}
	}
}
