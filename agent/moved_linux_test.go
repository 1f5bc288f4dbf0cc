package agent

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
)

// featuresIn calls fn with what reads and sets features in a namespace.
func featuresIn(t *testing.T, ns string, fn func(*ethtool.Client) error) {
	t.Helper()
	open, err := netns.Open(netns.Path(ns))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	err = open.Do(func() error {
		c, err := ethtool.Dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return fn(c)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// movedTSO reads whether a device in a namespace has TSO on, and its MTU.
func movedTSO(t *testing.T, ns, dev string) (on bool, mtu int) {
	t.Helper()
	featuresIn(t, ns, func(c *ethtool.Client) error {
		f, err := c.Features(ethtool.Device{Name: dev})
		if err != nil {
			return err
		}
		s, _ := f.Get(ethtool.TCPSegmentation)
		on = s.Wanted
		return nil
	})
	mtuText := netnstest.Show(t, "-n "+ns+" -o link show "+dev)
	_, after, _ := strings.Cut(mtuText, " mtu ")
	mtu, _ = strconv.Atoi(strings.Fields(after)[0])
	return on, mtu
}

// carrierIn gives a namespace a device c0 all of whose routes are covered: TSO is held off on it.
func carrierIn(t *testing.T, ns string) {
	t.Helper()
	netnstest.IP(t, strings.ReplaceAll(`link add c1 type veth peer name c0 netns NS
-n NS link set c0 addrgenmode none
link set c1 addrgenmode none
link set c1 up`, "NS", ns))
	coverCarrier(t, ns)
}

func coverCarrier(t *testing.T, ns string) {
	t.Helper()
	netnstest.IP(t, strings.ReplaceAll(`-n NS link set c0 up
-n NS route add 10.7.0.0/16 dev c0
-n NS xfrm policy add src 0.0.0.0/0 dst 10.7.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel`, "NS", ns))
}

// A voyage is a fleet that follows a namespace a, in which a device c0 is held, and others to which that is moved.
type voyage struct {
	*sailing
	t   *testing.T
	cfg Config
}

// embark makes the namespaces a and others, and a fleet that follows some of them. It is nil in the test's first process
// (netnstest.Private), which has nothing to do.
func embark(t *testing.T, others []string, follow ...string) *voyage {
	t.Helper()
	if !netnstest.Private(t) {
		return nil
	}
	checkLeaks(t)
	named(t, append([]string{"a"}, others...)...)
	carrierIn(t, "a")
	v := &voyage{t: t, cfg: movedConfig(t, follow...)}
	v.cfg.ResyncEvery = Duration(300 * time.Millisecond)
	v.again()
	v.held("a", 3)
	return v
}

// again sets sail, perhaps after a stop or a crash, with the configuration that it has now.
func (v *voyage) again() {
	v.t.Helper()
	v.sailing = sail(v.t, v.cfg)
}

// move moves a device to another namespace, perhaps with a change in the same request.
func (v *voyage) move(dev, from, to string, change ...string) {
	v.t.Helper()
	netnstest.IP(v.t, strings.Join(append([]string{"-n", from, "link set", dev, "netns", to}, change...), " "))
}

// back moves a device to where it was held, and gives it what asks for that.
func (v *voyage) back(dev, from, to string) {
	v.t.Helper()
	v.move(dev, from, to, "name c0")
	netnstest.IP(v.t, strings.ReplaceAll("-n NS link set c0 addrgenmode none\n-n NS link set c0 up\n-n NS route add 10.7.0.0/16 dev c0", "NS", to))
}

// restored waits until nothing of ours is on a device.
func (v *voyage) restored(ns, dev string) {
	v.t.Helper()
	netnstest.Within(v.t, dev+" is given back in "+ns, func() bool { on, mtu := movedTSO(v.t, ns, dev); return on && mtu == 1500 })
}

// land stops, and nothing may be left.
func (v *voyage) land() {
	v.t.Helper()
	v.stop()
	if n := len(v.dirs()); n != 0 {
		v.t.Errorf("%d journals are left", n)
	}
}

func movedConfig(t *testing.T, namespaces ...string) Config {
	t.Helper()
	cfg := fleetConfig(t, namespaces...)
	cfg.Plan.Dedicated = "off"
	cfg.Plan.CarrierMTU = plan.CarrierDevice
	return cfg
}

func (s *sailing) held(ns string, want int) {
	s.t.Helper()
	netnstest.Within(s.t, "features held in "+ns, func() bool {
		r, err := s.reportOf(s.t.Context(), ns)
		if err != nil {
			return false
		}
		n := 0
		for _, h := range r.Holds {
			if h.Device == "c0" && h.State == StateInPlace {
				n++
			}
		}
		return n == want
	})
}

func (s *sailing) finding(ns string, want ...string) {
	s.t.Helper()
	var last []string
	defer func() {
		if s.t.Failed() {
			s.t.Logf("the findings in %s: %q", ns, last)
		}
	}()
	netnstest.Within(s.t, "a finding in "+ns, func() bool {
		r, err := s.reportOf(s.t.Context(), ns)
		if err != nil {
			return false
		}
		last = r.Findings
		return slices.ContainsFunc(r.Findings, func(f string) bool {
			return !slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(f, w) })
		})
	})
}

func (s *sailing) noFinding(ns string) {
	s.t.Helper()
	s.noFindingOf(ns, "was moved to")
}

func (s *sailing) noFindingOf(ns, text string) {
	s.t.Helper()
	netnstest.Within(s.t, "no finding "+text+" in "+ns, func() bool {
		r, err := s.reportOf(s.t.Context(), ns) // in which a lock can rest, as the route went in the middle of its change
		return err == nil && !foundIn(r.Findings, text)
	})
}

// A device that is moved to a namespace that is followed as well is given back there, or stays held where it
// is covered there, too.
func TestMovedDeviceIsTakenOverWhereItIs(t *testing.T) {
	v := embark(t, []string{"b"}, "all")
	if v == nil {
		return
	}
	v.move("c0", "a", "b")
	v.restored("b", "c0")
	v.noFinding("a")

	// Covered there, too: it stays off all the time, and is ours to give back.
	v.back("c0", "b", "a")
	v.held("a", 3)
	netnstest.IP(t, "-n b xfrm policy add src 0.0.0.0/0 dst 10.7.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
	b, err := v.agentOf("b")
	if err != nil {
		t.Fatal(err)
	}
	// The features are given back after the test, as the route comes later than the device.
	if err := b.call(t.Context(), func() { b.cfg.RestoreAfter = Duration(time.Hour) }); err != nil {
		t.Fatal(err)
	}
	v.back("c0", "a", "b")
	v.held("b", 3)
	v.noFinding("a")
	v.land()
	if on, mtu := movedTSO(t, "b", "c0"); !on || mtu != 1500 {
		t.Errorf("stopped: %v, %d", on, mtu)
	}
}

// Through several namespaces at once, faster than the loops look, and with another index.
func TestMovedDeviceThatIsMovedOn(t *testing.T) {
	v := embark(t, []string{"b", "c"}, "all")
	if v == nil {
		return
	}
	netnstest.IP(t, "-n b link add x1 type veth peer name x2\n-n b link add x3 type veth peer name x4") // the index is taken there
	v.state("b", NetnsFollowed)                                                                         // else nobody sees it leave
	v.state("c", NetnsFollowed)
	for range 5 {
		v.held("a", 3)
		netnstest.IP(t, "-n a link set c0 netns b\n-n b link set c0 netns c name c9")
		v.restored("c", "c9")
		v.noFinding("a")
		v.noFinding("b")
		v.back("c9", "c", "a")
	}
	v.held("a", 3)
	v.land()
}

// Where nobody follows, the report says what to do, also after a restart, until the device is back, is gone, or
// somebody follows.
func TestMovedDeviceWhereNobodyFollows(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a")
	if v == nil {
		return
	}
	v.move("c0", "a", "b")
	says := []string{"c0 was moved to network namespace b, which is not followed", "`ip netns exec b ethtool -K c0 ", " tx-tcp-segmentation on", " tx-tcp6-segmentation on"}
	v.finding("a", says...)
	if on, mtu := movedTSO(t, "b", "c0"); on || mtu != 1500 {
		t.Errorf("touched where nobody follows: %v, %d", on, mtu)
	}
	v.stop()

	v.again()
	v.finding("a", says...)
	v.move("c0", "b", "a")
	v.restored("a", "c0")
	v.noFinding("a")

	// Back while no agent runs, where it is covered.
	netnstest.IP(t, "-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	v.held("a", 3)
	v.move("c0", "a", "b")
	v.finding("a", says[0])
	v.crash()
	done, err := RestoreAll(t.Context(), v.cfg, discard(), "test", false)
	if err != nil || len(done.Namespaces) != 1 || done.Namespaces[0].Moved != 1 ||
		!slices.ContainsFunc(done.Namespaces[0].Findings, func(f string) bool { return strings.Contains(f, says[1]) }) {
		t.Errorf("restore: %+v, %v", done, err)
	}
	v.back("c0", "b", "a")
	v.again()
	v.held("a", 3)
	v.noFinding("a")

	// b is followed from now on.
	v.move("c0", "a", "b")
	v.finding("a", says[0])
	v.crash()
	v.cfg.Namespaces = Namespaces{"host", "a", "b"}
	v.again()
	v.restored("b", "c0")
	v.noFinding("a")
	v.land()
}

// A namespace without a name is called by a process; a device that is gone is no finding.
func TestMovedDeviceWithoutAName(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a")
	if v == nil {
		return
	}
	pid, end := netnstest.Live(t, "b")
	netnstest.IP(t, "netns del b")
	v.move("c0", "a", strconv.Itoa(pid))
	v.finding("a", "`nsenter -t "+strconv.Itoa(pid)+" -n ethtool -K c0 ")
	end()
	v.noFinding("a")
	v.land()
}

// TestKernelMovedDevice pins KERNEL.md 76 with devices that the machine's own kernel can lack.
func TestKernelMovedDevice(t *testing.T) {
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for xfrm interfaces")
	}
	if !netnstest.Private(t) {
		return
	}
	named(t, "a", "b")
	netnstest.IP(t, `-n a link add c0 type xfrm dev n0 if_id 1
-n a link set c0 up
-n a route add 10.7.0.0/16 dev c0
-n a xfrm policy add src 0.0.0.0/0 dst 10.7.0.0/16 dir out if_id 1 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel`)
	v := &voyage{t: t, cfg: movedConfig(t, "all")}
	v.again()
	mustHold := func() {
		t.Helper()
		v.held("a", 3)
		netnstest.Within(t, "its mtu is set", func() bool { _, mtu := movedTSO(t, "a", "c0"); return mtu == 1400 })
	}
	mustHold()
	v.move("c0", "a", "b")
	v.restored("b", "c0")
	v.noFinding("a")
	v.back("c0", "b", "a")
	mustHold()
	v.stop()
	if on, mtu := movedTSO(t, "a", "c0"); !on || mtu != 1500 {
		t.Errorf("stopped: %v, %d", on, mtu)
	}

	v.cfg.Namespaces = Namespaces{"host", "a"}
	v.again()
	mustHold()
	v.move("c0", "a", "b")
	v.finding("a", "`ip netns exec b ethtool -K c0 ", "`ip netns exec b ip link set c0 mtu 1500`")
	if on, mtu := movedTSO(t, "b", "c0"); on || mtu != 1400 {
		t.Errorf("touched where nobody follows: %v, %d", on, mtu)
	}
	v.move("c0", "b", "a")
	v.restored("a", "c0")
	v.noFinding("a")
	v.land()
}

// The claims on a device that left a namespace go after it, also where that namespace is not followed any more after a
// restart; where nobody follows the device, the host's report tells of it.
func TestMovedDeviceFromADroppedNamespace(t *testing.T) {
	v := embark(t, []string{"b"}, "host", "a")
	if v == nil {
		return
	}
	v.move("c0", "a", "b")
	v.finding("a", "c0 was moved to network namespace b")
	v.crash()

	v.cfg.Namespaces = Namespaces{"host"}
	v.again()
	v.finding("", "namespace a", "c0 was moved to network namespace b", "`ip netns exec b ethtool -K c0 ")
	v.crash()

	v.back("c0", "b", "a")
	v.cfg.Namespaces = Namespaces{"a"}
	v.again()
	v.held("a", 3)
	v.move("c0", "a", strconv.Itoa(os.Getpid())) // the host's of this test
	v.finding("a", "c0 was moved to")
	v.crash()
	v.cfg.Namespaces = Namespaces{"host"}
	v.again()
	et, err := ethtool.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer et.Close()
	netnstest.Within(t, "given back in the host's", func() bool {
		f, err := et.Features(ethtool.Device{Name: "c0"})
		if err != nil {
			return false
		}
		tso, _ := f.Get(ethtool.TCPSegmentation)
		return tso.Wanted
	})
	netnstest.Within(t, "no journal is left", func() bool { return len(v.dirs()) == 0 })
	v.land()
}

// A device that was moved while no agent ran is not given back by a restore, which says so and doesn't count it.
func TestRestoreTellsOfDevicesThatAreGone(t *testing.T) {
	v := embark(t, []string{"b"}, "a", "b")
	if v == nil {
		return
	}
	v.crash()
	v.move("c0", "a", "b")
	stale, err := RestoreIn(t.Context(), "a", v.cfg, discard(), "test", true)
	if err != nil || len(stale.Findings) != 0 {
		t.Errorf("restore --stale: %+v, %v", stale, err)
	}
	done, err := RestoreIn(t.Context(), "a", v.cfg, discard(), "test", false)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"c0 is gone, with tx-tcp-ecn-segmentation, tx-tcp-segmentation, tx-tcp6-segmentation held off: if it was moved to another " +
		"network namespace, give it back there with `ethtool -K c0 tx-tcp-ecn-segmentation on tx-tcp-segmentation on tx-tcp6-segmentation on`"}
	if diff := cmp.Diff(want, done.Findings); diff != "" || done.Holds != 0 {
		t.Errorf("%d holds, findings (-want +got):\n%s", done.Holds, diff)
	}
}

// One request can move a device and give it another name and address (rtnl_setlink), as container runtimes do.
func TestMovedDeviceThatIsChangedOnTheWay(t *testing.T) {
	v := embark(t, []string{"b", "c"}, "host", "a", "b")
	if v == nil {
		return
	}
	v.state("b", NetnsFollowed)
	v.move("c0", "a", "b", "name e0 address 02:00:00:00:00:01")
	v.restored("b", "e0")
	v.noFinding("a")
	v.back("e0", "b", "a")
	v.held("a", 3)

	// Where nobody follows, it is told of by its name there, and known by its address.
	a, err := v.agentOf("a")
	if err != nil {
		t.Fatal(err)
	}
	v.move("c0", "a", "c", "name e1 address 02:00:00:00:00:02")
	v.finding("a", "e1 was moved to network namespace c", "`ip netns exec c ethtool -K e1 ")
	for range 3 { // looks whether it is still there
		if err := a.call(t.Context(), func() { a.offerAgain(true) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.call(t.Context(), func() {
		if len(a.st.moved) != 1 {
			t.Errorf("moved: %v", a.st.moved)
		}
	}); err != nil {
		t.Fatal(err)
	}
	v.move("e1", "c", "a", "name c0")
	v.restored("a", "c0")
	v.noFinding("a")
	v.land()
}
