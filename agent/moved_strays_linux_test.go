package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
	"tsoagent/ethtool"
)

// call gives a namespace another name.
func (v *voyage) call(ns, name string) {
	v.t.Helper()
	path := netns.Path(name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		v.t.Fatal(err)
	}
	if err := unix.Mount(netns.Path(ns), path, "", unix.MS_BIND, ""); err != nil {
		v.t.Fatal(err)
	}
}

// switchOff switches a device's TSO off.
func switchOff(t *testing.T, ns, dev string) {
	t.Helper()
	featuresIn(t, ns, func(c *ethtool.Client) error {
		f, err := c.Features(ethtool.Device{Name: dev})
		if err != nil {
			return err
		}
		_, err = c.Set(ethtool.Device{Index: f.Index, Name: dev}, map[ethtool.Feature]bool{
			ethtool.TCPSegmentation: false, ethtool.TCP6Segmentation: false, ethtool.TCPECNSegmentation: false,
		})
		return err
	})
}

// foundIn reports whether there is a finding with all the texts.
func foundIn(findings []string, want ...string) bool {
	return slices.ContainsFunc(findings, func(f string) bool {
		return !slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(f, w) })
	})
}

// A restore without an agent gives back what was moved to a namespace of the configuration, also by way of another one.
func TestRestoreGivesBackWhereDevicesWereMoved(t *testing.T) {
	v := embark(t, []string{"b", "c"}, "host", "a")
	if v == nil {
		return
	}
	v.move("c0", "a", "b", "name e0")
	v.finding("a", "e0 was moved to network namespace b")
	v.crash()
	// The lock went with its route, of which it may not have heard yet.
	if left := LeftOver(v.cfg.RunDir); left.Moved != 1 || !strings.Contains(left.String(), "1 device that was moved to another network namespace") {
		t.Errorf("left: %+v, %q", left, left)
	}

	stale, err := RestoreAll(t.Context(), v.cfg, discard(), "test", true)
	if on, _ := movedTSO(t, "b", "e0"); err != nil || on || len(v.dirs()) != 1 {
		t.Errorf("restore --stale gave it back: %v, %+v, %v", on, stale, err)
	}
	v.cfg.Namespaces = Namespaces{"host", "b"} // a is found by its name
	done, err := RestoreAll(t.Context(), v.cfg, discard(), "test", false)
	if err != nil {
		t.Fatal(err)
	}
	v.restored("b", "e0")
	b := slices.IndexFunc(done.Namespaces, func(r Restored) bool { return r.Netns == "b" })
	if b < 0 || done.Namespaces[b].Holds != 3 || done.Namespaces[b].Failed != 0 {
		t.Errorf("restored %+v", done)
	}
	for _, r := range append(done.Namespaces, *done) {
		if r.Moved != 0 || len(r.Findings) != 0 {
			t.Errorf("%q: %d are missed, findings %q", r.Netns, r.Moved, r.Findings)
		}
	}
	if n := len(v.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}

	// To the host's.
	v.back("e0", "b", "a")
	v.cfg.Namespaces = Namespaces{"a"}
	v.again()
	v.held("a", 3)
	v.move("c0", "a", strconv.Itoa(os.Getpid()))
	v.finding("a", "c0 was moved to")
	v.crash()
	if done, err = RestoreAll(t.Context(), v.cfg, discard(), "test", false); err != nil || !foundIn(done.Namespaces[0].Findings, "c0 was moved to") {
		t.Errorf("the host's is not in the configuration: %+v, %v", done, err)
	}
	v.cfg.Namespaces = Namespaces{"host", "a"}
	if done, err = RestoreAll(t.Context(), v.cfg, discard(), "test", false); err != nil || done.Holds != 3 || len(done.Findings) != 0 {
		t.Errorf("the host's: %+v, %v", done, err)
	}
	if n := len(v.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
}

// What was moved from a namespace that is not followed any more goes to one that comes to be followed later.
func TestClaimsFromADroppedNamespaceWaitForWhoComes(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a")
	if v == nil {
		return
	}
	v.move("c0", "a", "b")
	v.finding("a", "c0 was moved to network namespace b")
	v.crash()
	v.cfg.Namespaces = Namespaces{"host", "late"}
	v.again()
	v.finding("", "namespace a, which is not followed any more", "c0 was moved to network namespace b")
	v.call("b", "late")
	v.restored("b", "c0")
	v.noFinding("")
	netnstest.Within(t, "one journal is left, that of late", func() bool { return len(v.dirs()) == 1 })
	v.land()
}

// The same from the host's, whose journal the fleet has open.
func TestClaimsFromTheDroppedHostWaitForWhoComes(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "b", "c")
	netnstest.IP(t, `link add n0 type veth peer name n1
link set n0 up
link set n1 up
addr add 192.0.2.1/24 dev n0
link add c0 type veth peer name c1 netns c
link set c0 addrgenmode none
-n c link set c1 up
link set c0 up
route add 10.7.0.0/16 dev c0
xfrm policy add src 0.0.0.0/0 dst 10.7.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel`)
	v := &voyage{t: t, cfg: movedConfig(t, "host")}
	v.again()
	v.held("", 3)
	netnstest.IP(t, "link set c0 netns b")
	v.finding("", "c0 was moved to network namespace b")
	v.crash()
	v.cfg.Namespaces = Namespaces{"late"}
	v.again()
	v.finding("", "namespace host, which is not followed any more", "c0 was moved to network namespace b")
	v.call("b", "late")
	v.restored("b", "c0")
	v.noFinding("")
	v.land()
	if left := LeftOver(v.cfg.RunDir).String(); left != "" {
		t.Errorf("left: %s", left)
	}
}

// A namespace that is let go keeps the journal of what went from it, while a process lives in it.
func TestLettingGoKeepsWhatIsMissed(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a", "late")
	if v == nil {
		return
	}
	_, end := netnstest.Live(t, "a")
	v.move("c0", "a", "b")
	v.finding("a", "c0 was moved to network namespace b")
	netnstest.IP(t, "netns del a")
	v.finding("", "namespace a, which is not followed any more", "c0 was moved to network namespace b")
	if left := LeftOver(v.cfg.RunDir).Moved; left != 1 {
		t.Errorf("the journal has %d devices", left)
	}
	v.call("b", "late")
	v.restored("b", "c0")
	v.noFinding("")
	netnstest.Within(t, "one journal is left, that of late", func() bool { return len(v.dirs()) == 1 })
	end()
	v.land()
}

// When the namespace is gone nobody can tell any more where its number leads: a virtual device is no longer looked for.
func TestWhatIsMissedGoesWithItsNamespace(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a")
	if v == nil {
		return
	}
	_, end := netnstest.Live(t, "a")
	v.move("c0", "a", "b")
	v.finding("a", "c0 was moved to network namespace b")
	netnstest.IP(t, "netns del a")
	v.finding("", "c0 was moved to network namespace b")
	end()
	v.noFinding("")
	netnstest.Within(t, "no journal is left", func() bool { return len(v.dirs()) == 0 })
	v.land()
}

// Another device where one was moved to is not taken for it, when that namespace comes to be followed: what an admin has
// switched off there stays off.
func TestAnotherDeviceWhereOneWasMovedTo(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a", "late")
	if v == nil {
		return
	}
	v.move("c0", "a", "b")
	v.finding("a", "c0 was moved to network namespace b")
	index, _, _ := strings.Cut(netnstest.Show(t, "-n b -o link show c0"), ":")
	netnstest.IP(t, "-n b link del c0\n-n b link add c0 index "+index+" type veth peer name c9 index 99")
	switchOff(t, "b", "c0")
	v.call("b", "late")
	v.state("late", NetnsFollowed)
	v.noFinding("a")
	if on, _ := movedTSO(t, "b", "c0"); on {
		t.Error("another device's features were switched on")
	}
	v.land()
	if on, _ := movedTSO(t, "b", "c0"); on {
		t.Error("another device's features were switched on at the end")
	}
}

// Where a namespace is to be followed and can't be, that is what is told.
func TestMovedToWhereTheAgentCannotStart(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a", "late")
	if v == nil {
		return
	}
	ns, err := netns.Open(netns.Path("b"))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var scope journal.Scope
	if err := ns.Do(func() (err error) { scope, err = journal.ReadScope(); return err }); err != nil {
		t.Fatal(err)
	}
	dir := cookieDir(v.cfg.RunDir, scope.NetnsCookie)
	if err := os.Symlink(t.TempDir(), dir); err != nil {
		t.Fatal(err)
	}
	v.call("b", "late")
	v.state("late", NetnsFailed)
	v.move("c0", "a", "b")
	v.finding("a", "c0 was moved to network namespace ", "not taken over there yet", filepath.Base(dir)+" is a symbolic link", " ethtool -K c0 ")
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	v.restored("b", "c0") // tried again
	v.noFinding("a")
	v.land()
}
