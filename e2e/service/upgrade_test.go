package service

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// network is all that an agent changes in a machine.
func (m *machine) network() string {
	return m.run("ip", "rule") + "\n" + m.run("ip", "-6", "rule") + "\n" + m.run("ip", "route", "show", "table", "all", "proto", "84") + "\n" +
		m.run("ip", "-6", "route", "show", "table", "all", "proto", "84") + "\n" + m.run("ethtool", "-k", "n0")
}

// TestPackagesInAMachine installs, upgrades and removes the packages under a real systemd, beside an agent that has work.
func TestPackagesInAMachine(t *testing.T) {
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			old, next := mustPackages(t, packages), mustPackages(t, nextPackages)
			stage := t.TempDir()
			for v, dir := range map[string]string{version: old, nextVersion: next} {
				b, err := os.ReadFile(filepath.Join(dir, f.file(v, runtime.GOARCH)))
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(stage, v), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			p := &packaged{machine: bootWith(t, stage), format: f}
			before := p.network()
			p.installs(t, before)
			p.upgrades(t)
			p.staysWhereRefused(t)
			p.removes(t, before)
		})
	}
}

// packaged is a machine with a package.
type packaged struct {
	*machine
	format format
}

// put installs a version, or upgrades to it.
func (p *packaged) put(version string) string {
	p.t.Helper()
	return p.run("sh", "-c", `exec "$@" 2>&1`, "sh", p.format.install[0], p.format.install[1], p.format.install[2], "/"+version)
}

func (p *packaged) installs(t *testing.T, before string) {
	p.put(version)
	if diff := cmp.Diff(before, p.network()); diff != "" {
		t.Errorf("installing it changes the network (-before +after)\n%s", diff)
	}
	if got := p.property("ActiveState"); got != "inactive" {
		t.Errorf("installing it starts it: %s", got)
	}
	if got := p.run("getent", "group", "tsoagent"); got == "" {
		t.Error("there is no group")
	}
	if got := p.run("stat", "-c", "%a %U:%G", "/run/tsoagent"); got != "750 root:tsoagent" {
		t.Errorf("/run/tsoagent is %s", got)
	}
	p.run("tsoagent", "check", "/etc/tsoagent/tsoagent.yaml")

	// Work for it, and more than a stop gives back.
	p.run("sh", "-c", `printf 'presume_mtu: 1400\nrestore_after: 100ms\nshared_nics: off\non_stop: keep\n' >>/etc/tsoagent/tsoagent.yaml`)
	p.run("ip", "addr", "add", "2001:db8::1/64", "dev", "n0", "nodad")
	p.run("ip", "-6", "route", "add", "default", "via", "2001:db8::fe")
	p.cover("2001:db8::/64", "2001:db8:3::/48", "2001:db8::1", "2001:db8::2")
	p.run("systemctl", "enable", "--now", "tsoagent.service")
	for _, want := range []string{"10.3.0.0/16 via 192.0.2.254", "2001:db8:3::/48 via 2001:db8::fe", "mtu lock 1400", "lookup 5450", "tx-tcp-segmentation: off", "tx-tcp6-segmentation: off"} {
		if got := p.network(); !strings.Contains(got, want) {
			t.Fatalf("%q is not in place:\n%s", want, got)
		}
	}
}

func (p *packaged) cover(src, dst, from, to string) {
	p.t.Helper()
	p.run("ip", "xfrm", "policy", "add", "src", src, "dst", dst, "dir", "out", "tmpl", "src", from, "dst", to, "proto", "esp", "reqid", "1", "mode", "tunnel")
}

// upgrades has the agent become the next version, and the kernel tell what is written meanwhile: nothing.
func (p *packaged) upgrades(t *testing.T) {
	inPlace, pid := p.network(), p.property("MainPID")
	m := watch(t, p.command)
	p.put(nextVersion)
	routes, features := m.news()
	if strings.Contains(routes, "Deleted") || strings.Contains(routes, "5450") || strings.Contains(routes, "proto 84") {
		t.Errorf("the upgrade writes:\n%s", routes)
	}
	if strings.Contains(features, "n0") {
		t.Errorf("the upgrade switches features:\n%s", features)
	}
	if diff := cmp.Diff(inPlace, p.network()); diff != "" {
		t.Errorf("in place (-before +after)\n%s", diff)
	}
	if got := p.property("ActiveState") + " " + p.property("SubState") + " " + p.property("NRestarts"); got != "active running 0" {
		t.Errorf("after the upgrade it is %s", got)
	}
	if got := p.property("MainPID"); got != pid {
		t.Errorf("process %s, was %s", got, pid)
	}
	if got := p.run("readlink", "/proc/"+pid+"/exe"); got != "/usr/sbin/tsoagent" {
		t.Errorf("%s runs", got)
	}
	if log := p.log(); strings.Count(log, "msg=ready") != 2 || !strings.Contains(log, "handing over") {
		t.Errorf("the log:\n%s", log)
	}
	p.cover("10.1.0.0/16", "10.4.0.0/16", "192.0.2.1", "192.0.2.2")
	within(t, "the next policy is locked", func() bool { return strings.Contains(p.clones(), "10.4.0.0/16") })
	within(t, "the watchdog is fed", func() bool { return p.property("WatchdogTimestampMonotonic") != "0" })
	if routes, _ := m.news(); !strings.Contains(routes, "10.4.0.0/16 via 192.0.2.254 dev n0 table 5450") {
		t.Errorf("the monitor doesn't hear what is written:\n%s", routes)
	}
}

// staysWhereRefused upgrades where the next version does not take the configuration, and where it is paused: the old one goes on.
func (p *packaged) staysWhereRefused(t *testing.T) {
	again := func() string {
		t.Helper()
		if p.format.name == "rpm" {
			return p.run("sh", "-c", "rpm -U --nodeps --replacepkgs /"+nextVersion+" 2>&1")
		}
		return p.put(nextVersion)
	}
	pid, ready := p.property("MainPID"), strings.Count(p.log(), "msg=ready")
	goesOn := func(why string) {
		t.Helper()
		if got := p.property("MainPID") + " " + p.property("ActiveState"); got != pid+" active" || strings.Count(p.log(), "msg=ready") != ready {
			t.Errorf("%s, and it is %s", why, got)
		}
		p.locked("1400")
	}
	p.run("sh", "-c", "echo nonsense: 1 >>/etc/tsoagent/tsoagent.yaml")
	if out := again(); !strings.Contains(out, "the new version does not take the configuration") || !strings.Contains(out, "tsoagent.yaml:") {
		t.Errorf("it says\n%s", out)
	}
	goesOn("the configuration is wrong")
	p.run("sed", "-i", "/nonsense/d", "/etc/tsoagent/tsoagent.yaml")
	p.run("tsoctl", "pause")
	if out := again(); !strings.Contains(out, "it was not handed over to the new version") || !strings.Contains(out, "tsoctl resume") {
		t.Errorf("it says\n%s", out)
	}
	goesOn("it is paused")
	p.run("tsoctl", "resume")
}

func (p *packaged) removes(t *testing.T, before string) {
	p.run("sh", "-c", "echo x >/var/lib/tsoagent/probe.json")
	p.run(append(p.format.remove, "tsoagent")...)
	if diff := cmp.Diff(before, p.network()); diff != "" {
		t.Errorf("removing it leaves (-before +after)\n%s", diff)
	}
	gone := func(path string) {
		t.Helper()
		if out, err := p.try("stat", path); err == nil {
			t.Errorf("still there: %s", out)
		}
	}
	gone("/usr/sbin/tsoagent")
	gone("/usr/lib/systemd/system/tsoagent.service")
	if got := p.run("find", "/etc/systemd/system", "-name", "tsoagent*"); got != "" {
		t.Errorf("it is still enabled: %s", got)
	}
	if p.format.name == "rpm" {
		p.run("grep", "on_stop: keep", "/etc/tsoagent/tsoagent.yaml.rpmsave")
		return
	}
	p.run("grep", "on_stop: keep", "/etc/tsoagent/tsoagent.yaml")
	p.run("dpkg", "--no-triggers", "-P", "tsoagent")
	for _, path := range []string{"/etc/tsoagent", "/var/lib/tsoagent", "/run/tsoagent"} {
		gone(path)
	}
}

// TestPackagesInAnImage installs and removes the deb in a root without a service manager, as who makes an image does, while an agent of the
// machine itself has work: it is none of the image's business.
func TestPackagesInAnImage(t *testing.T) {
	dir := mustPackages(t, packages)
	network(t)
	cover(t, "10.3.0.0/16")
	run(t)
	if got := output(t, "ip", "route", "show", "table", "5450"); !strings.Contains(got, "mtu lock 1400") {
		t.Fatalf("in place: %s", got)
	}
	m := watch(t, func(args ...string) *exec.Cmd { return exec.Command(args[0], args[1:]...) })
	const image = `set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/up" "$1/wk" "$1/root"
cp "$2" "$1/p.deb"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/wk" "$1/root"
mount -t proc proc "$1/root/proc"
mount -t tmpfs tmpfs "$1/root/run"
mount -t tmpfs -o mode=755 tmpfs "$1/root/dev"
touch "$1/root/dev/null"
mount --bind /dev/null "$1/root/dev/null"
cp "$1/p.deb" "$1/root/run"
cd "$1/root"
for args in "-i /run/p.deb" "-i /run/p.deb" "-r tsoagent" "-P tsoagent"; do
	chroot . dpkg --no-triggers $args
done`
	out := output(t, "unshare", "--mount", "sh", "-c", image, "sh", t.TempDir(), filepath.Join(dir, formats[0].file(version, runtime.GOARCH)))
	// What is taken away the agent puts back, so only the kernel knows.
	if routes, _ := m.news(); strings.Contains(routes, "Deleted") || strings.Contains(routes, "5450") {
		t.Errorf("the image writes in the machine's network:\n%s\n%s", routes, out)
	}
}
