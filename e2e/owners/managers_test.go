package owners

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

// daemon starts a program in the namespace with the agent, in a mount namespace whose /sys is read-only: there, as in a container, nobody waits for
// udev. It is stopped with the function that is returned, or with the test.
func (l *lab) daemon(script string) (stop func()) {
	l.Helper()
	// The shell becomes the daemon.
	cmd := exec.Command("unshare", "--mount", "sh", "-ec", "mount -t sysfs -o ro sysfs /sys\n"+script)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.bus(), "SYSTEMD_LOG_TARGET=console", "HOME="+l.dir)
	log, err := os.Create(filepath.Join(l.dir, fmt.Sprintf("daemon-%d", time.Now().UnixNano())))
	l.must(err)
	cmd.Stdout, cmd.Stderr = log, log
	l.must(l.ours.Start(cmd))
	gone := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how a daemon ends when it is stopped is up to it
		close(gone)
	}()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		_ = cmd.Process.Signal(unix.SIGTERM) // it may have ended
		select {
		case <-gone:
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			<-gone
			l.Errorf("%q does not end", script)
		}
		if l.Failed() {
			text, _ := os.ReadFile(log.Name())
			l.Logf("%s said:\n%s", script, text)
		}
		log.Close()
	}
	l.Cleanup(stop)
	return stop
}

func (l *lab) bus() string { return "unix:path=" + filepath.Join(l.dir, "bus") }

// dbus starts a bus of its own.
func (l *lab) dbus() {
	l.Helper()
	l.must(os.Chmod(l.dir, 0o755)) // daemons that have another user connect to it
	l.daemon("exec dbus-daemon --config-file=/usr/share/dbus-1/system.conf --nofork --nopidfile --syslog-only --address=" + l.bus())
	l.within("the bus answers", func() error {
		_, err := os.Stat(filepath.Join(l.dir, "bus"))
		return err
	})
}

// tell runs a program that talks to a daemon.
func (l *lab) tell(args ...string) (string, error) {
	return l.ours.Run("", append([]string{"env", "DBUS_SYSTEM_BUS_ADDRESS=" + l.bus()}, args...)...)
}

// shows waits until a program prints something.
func (l *lab) shows(text string, args ...string) {
	l.Helper()
	l.within(strings.Join(args, " ")+" shows "+text, func() error {
		out, err := l.tell(args...)
		if err == nil && !strings.Contains(out, text) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
}

// networkdProgram is where Debian has it.
const networkdProgram = "/usr/lib/systemd/systemd-networkd"

// TestNetworkd has systemd-networkd configure a device beside an agent. By default it deletes rules and routes that it does not know, at each start
// and each time that it configures the device: the agent writes them again, and doctor says what helps. Told not to, it leaves them.
func TestNetworkd(t *testing.T) {
	for _, manages := range []string{"yes", "no"} {
		t.Run("ManageForeign="+manages, func(t *testing.T) {
			bin := need(t)
			harness.NeedPrograms(t, map[string]string{networkdProgram: "systemd", "dbus-daemon": "dbus"})
			l := newLab(t, bin, rand.New(rand.NewPCG(1, 1)), withMetrics, linesOf(paragraphs(policies))...)
			l.change("-6 route replace default via fd00:3::9 dev nic1", "addr flush dev nic0") // which is networkd's
			files := "/run/systemd/network"
			l.must(os.MkdirAll(files, 0o755))
			t.Cleanup(func() { _ = os.RemoveAll("/run/systemd") })
			l.must(os.WriteFile(files+"/10-nic0.network", []byte(`[Match]
Name=nic0
[Network]
Address=192.0.2.1/24
LinkLocalAddressing=no
IPv6AcceptRA=no
[Route]
Gateway=192.0.2.9
`), 0o644))
			l.must(os.MkdirAll("/run/systemd/networkd.conf.d", 0o755))
			l.must(os.WriteFile("/run/systemd/networkd.conf.d/test.conf", fmt.Appendf(nil, "[Network]\nManageForeignRoutes=%s\nManageForeignRoutingPolicyRules=%[1]s\n", manages), 0o644))
			l.dbus()
			stop := l.daemon("exec " + networkdProgram)
			l.shows("configured", "networkctl", "list", "nic0")
			w := l.watch()
			l.start()
			r := l.settle()
			first := w.sofar()
			if first.rules == 0 || first.clones == 0 {
				t.Fatalf("nothing to delete: %s", first)
			}
			const times = 4
			for range times {
				_, err := l.tell("networkctl", "reconfigure", "nic0")
				l.must(err)
				l.shows("configured", "networkctl", "list", "nic0")
				stop()
				stop = l.daemon("exec " + networkdProgram)
				l.shows("configured", "networkctl", "list", "nic0")
				r = l.settle()
			}
			after := w.sofar()
			t.Log(after)
			l.inPlace(r)
			// The agent deletes some itself, while a route of networkd's is away.
			gone := after.rulesGone - l.actions()["delete_rule"]
			switch {
			case manages == "no" && gone != 0:
				t.Errorf("with ManageForeign…=no %d rules were deleted that are not networkd's", gone)
			case manages == "yes" && gone <= 0:
				t.Error("it deleted nothing: nothing was tested")
			case after.rules-first.rules > 2*answers*shapes || after.clones-first.clones > answers*first.clones:
				t.Errorf("it is a fight: %s for %d starts", after, 2*times)
			}
			text, _ := l.ours.Run("", filepath.Join(bin, "tsoctl"), "doctor", "-c", l.config()) // which exits with 3 where it finds something
			if found := strings.Contains(text, "networkd-foreign"); found != (manages == "yes") {
				t.Errorf("doctor says networkd-foreign: %v\n%s", found, text)
			}
			l.must(l.stop(unix.SIGTERM))
			l.nothingLeft()
		})
	}
}

// inPlace looks whether all is in place that the agent wants.
func (l *lab) inPlace(r report) {
	l.Helper()
	text, err := l.ours.Run("", "sh", "-c", "ip rule; ip -6 rule")
	l.must(err)
	if n := strings.Count(text, "proto 84"); n == 0 || n != len(r.Rules) {
		l.Errorf("%d rules are in place, the plan has %d:\n%s", n, len(r.Rules), text)
	}
	text, err = l.ours.Run("", "sh", "-c", "ip route show table all proto 84") // of both families
	l.must(err)
	if n := strings.Count(text, " table 54"); n == 0 || n != len(r.Clones) {
		l.Errorf("%d clones are in place, the plan has %d:\n%s", n, len(r.Clones), text)
	}
}

// nothingLeft looks for what an agent that has ended has left.
func (l *lab) nothingLeft() {
	l.Helper()
	text, err := l.ours.Run("", "sh", "-c", "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")
	l.must(err)
	if strings.Contains(text, "proto 84") || strings.Contains(text, "mtu lock") {
		l.Errorf("something is left:\n%s", text)
	}
}

// TestNetworkManager has NetworkManager activate and reapply a connection beside an agent. It writes its own routes anew, which wipes a lock in
// place, and turns a feature on that is held off; what it does not know it leaves alone.
func TestNetworkManager(t *testing.T) {
	bin := need(t)
	harness.NeedPrograms(t, map[string]string{"NetworkManager": "network-manager", "nmcli": "network-manager", "dbus-daemon": "dbus"})
	l := newLab(t, bin, rand.New(rand.NewPCG(1, 1)), withMetrics+"shared_nics: off\n", linesOf(paragraphs(policies))...)
	for name, text := range map[string]string{
		"NetworkManager.conf": fmt.Sprintf("[main]\nplugins=keyfile\ndns=none\nrc-manager=unmanaged\nno-auto-default=*\n[keyfile]\npath=%s/connections\nunmanaged-devices=except:interface-name:nic0\n[connectivity]\nenabled=false\n", l.dir),
		"connections/nic0.nmconnection": `[connection]
id=nic0
uuid=11111111-2222-3333-4444-555555555555
type=ethernet
interface-name=nic0
[ethtool]
feature-tx-tcp-segmentation=true
[ipv4]
method=manual
address1=192.0.2.1/24,192.0.2.9
route1=10.5.0.0/16,192.0.2.9,1
[ipv6]
method=disabled
`,
	} {
		l.must(os.MkdirAll(filepath.Dir(filepath.Join(l.dir, name)), 0o755))
		l.must(os.WriteFile(filepath.Join(l.dir, name), []byte(text), 0o600))
	}
	l.must(os.Mkdir(filepath.Join(l.dir, "conf.d"), 0o755))
	l.dbus()
	l.daemon(strings.ReplaceAll("exec NetworkManager --no-daemon --config DIR/NetworkManager.conf --config-dir DIR/conf.d --system-config-dir DIR/conf.d --state-file DIR/state --intern-config DIR/intern -p DIR/pid", "DIR", l.dir))
	// It takes over a device that has addresses as it is, until it is told.
	l.within("the connection is up", func() error { _, err := l.tell("nmcli", "--wait", "20", "connection", "up", "nic0"); return err })
	l.shows("100 (connected)", "nmcli", "-g", "GENERAL.STATE", "device", "show", "nic0")
	w := l.watch()
	l.start()
	r := l.settle()
	first, held := w.sofar(), l.actions()["hold"]
	const times = 5
	for range times {
		for _, verb := range [][]string{{"device", "reapply", "nic0"}, {"connection", "up", "nic0"}} {
			_, err := l.tell(append([]string{"nmcli"}, verb...)...)
			l.must(err)
			l.shows("100 (connected)", "nmcli", "-g", "GENERAL.STATE", "device", "show", "nic0")
			r = l.settle()
		}
	}
	after := w.sofar()
	t.Log(after)
	l.inPlace(r)
	if after.rules-first.rules > 2*answers*shapes || after.clones-first.clones > answers*first.clones || after.locks-first.locks > 2*answers {
		t.Errorf("it is a fight: %s, after %s at first", after, first)
	}
	// While it activates the connection the routes are away, and with them the cause of the hold and the contest: each time begins anew.
	const features, once = 3, 2
	if n := l.actions()["hold"] - held; n > 2*times*features*once {
		t.Errorf("features were held off %d times more, for %d times that they were turned on", n, 2*times)
	}
	l.must(l.stop(unix.SIGTERM))
	l.nothingLeft()
	if got := l.feature("nic0", "tx-tcp-segmentation"); got != "on" {
		t.Errorf("tx-tcp-segmentation is %s in the end", got)
	}
}

// TestTuned has TuneD turn a feature on that is held off, by a profile's script, each time that it starts.
func TestTuned(t *testing.T) {
	bin := need(t)
	harness.NeedPrograms(t, map[string]string{"tuned": "tuned"})
	l := newLab(t, bin, rand.New(rand.NewPCG(1, 1)), withMetrics+"shared_nics: off\n", linesOf(paragraphs(policies))...)
	profile := filepath.Join(l.dir, "tuned", "net")
	l.must(os.MkdirAll(profile, 0o755))
	l.must(os.WriteFile(profile+"/tuned.conf", []byte("[main]\nsummary=net\n[script]\nscript=${i:PROFILE_DIR}/script.sh\n"), 0o644))
	l.must(os.WriteFile(profile+"/script.sh", fmt.Appendf(nil, "#!/bin/sh\n[ \"$1\" != start ] || { ethtool -K nic0 tx-tcp-segmentation on && echo once >>%s/started; }\n", l.dir), 0o755))
	l.must(os.WriteFile(filepath.Join(l.dir, "tuned", "tuned-main.conf"), []byte("daemon=1\ndynamic_tuning=0\n"), 0o644))
	l.start()
	l.settle()
	held := l.actions()["hold"]
	const times = 3
	for i := range times {
		stop := l.daemon(fmt.Sprintf("mount --bind %s/tuned /etc/tuned\nexec tuned --no-dbus -p net -l %[1]s/tuned.log -P %[1]s/tuned.pid", l.dir))
		l.within("the profile is applied", func() error {
			text, err := os.ReadFile(filepath.Join(l.dir, "started"))
			if err == nil && strings.Count(string(text), "once") <= i {
				err = fmt.Errorf("%d times so far", strings.Count(string(text), "once"))
			}
			return err
		})
		l.settle()
		stop()
	}
	if n := l.actions()["hold"] - held; n != 1 {
		t.Errorf("it was held off %d times more, want once", n)
	}
	if got := l.feature("nic0", "tx-tcp-segmentation"); got != "on" {
		t.Errorf("tx-tcp-segmentation is %s, want what the profile says", got)
	}
	l.must(l.stop(unix.SIGTERM))
	l.nothingLeft()
}

// TestIfupdown2 has ifreload write routes and turn a feature on that is held off, again and again.
func TestIfupdown2(t *testing.T) {
	bin := need(t)
	harness.NeedPrograms(t, map[string]string{"ifreload": "ifupdown2"})
	l := newLab(t, bin, rand.New(rand.NewPCG(1, 1)), withMetrics+"shared_nics: off\n", linesOf(paragraphs(policies))...)
	file := filepath.Join(l.dir, "interfaces")
	interfaces := func(metric int) {
		l.must(os.WriteFile(file, fmt.Appendf(nil, `auto nic0
iface nic0
	address 192.0.2.1/24
	address fd00:2::1/64
	up ip route replace 10.5.0.0/16 via 192.0.2.9
	up ip route replace 10.3.64.0/24 via 192.0.2.%d
	up ethtool -K nic0 tx-tcp-segmentation on
`, metric), 0o644))
	}
	interfaces(7)
	w := l.watch()
	l.start()
	l.settle()
	first, held := w.sofar(), l.actions()["hold"]
	const times = 4
	var r report
	for i := range times {
		interfaces(10 + i) // what has not changed is not done again
		l.daemonOnce("mkdir -p /run/network\nmount --bind " + file + " /etc/network/interfaces\nexec ifreload -a")
		r = l.settle()
	}
	after := w.sofar()
	t.Log(after)
	l.inPlace(r)
	if after.locks-first.locks > 2*answers || after.clones-first.clones > answers*first.clones || after.rules-first.rules > 2*answers*shapes {
		t.Errorf("it is a fight: %s, after %s at first", after, first)
	}
	if n := l.actions()["hold"] - held; n != 1 {
		t.Errorf("it was held off %d times more, want once", n)
	}
	l.must(l.stop(unix.SIGTERM))
	l.nothingLeft()
}

// daemonOnce runs what ends by itself as a daemon is run.
func (l *lab) daemonOnce(script string) {
	l.Helper()
	out, err := l.ours.Run("", "unshare", "--mount", "sh", "-ec", "mount -t sysfs -o ro sysfs /sys\n"+script)
	l.must(err)
	l.Log(out)
}
