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

// movedTSO reads whether a device in a namespace has TSO on, and its MTU.
func movedTSO(t *testing.T, ns, dev string) (on bool, mtu int) {
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
		f, err := c.Features(ethtool.Device{Name: dev})
		if err != nil {
			return err
		}
		s, _ := f.Get(ethtool.TCPSegmentation)
		on = s.Wanted
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
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
		r, err := s.reportOf(ns)
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
		r, err := s.reportOf(ns)
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
	netnstest.Within(s.t, "no device is missed in "+ns, func() bool {
		r, err := s.reportOf(ns) // in which a lock can rest, as the route went in the middle of its change
		return err == nil && !slices.ContainsFunc(r.Findings, func(f string) bool { return strings.Contains(f, "was moved to") })
	})
}

// A device that is moved to a namespace that is followed as well is given back there, or stays held where it
// is covered there, too.
func TestMovedDeviceIsTakenOverWhereItIs(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b")
	carrierIn(t, "a")
	if on, mtu := movedTSO(t, "a", "c0"); !on || mtu != 1500 {
		t.Fatalf("at first %v, %d", on, mtu)
	}
	s := sail(t, movedConfig(t, "all"))
	s.held("a", 3)
	netnstest.IP(t, "-n a link set c0 netns b")
	netnstest.Within(t, "given back in b", func() bool { on, mtu := movedTSO(t, "b", "c0"); return on && mtu == 1500 })
	s.noFinding("a")

	// Covered there, too: it stays off all the time, and is ours to give back.
	netnstest.IP(t, "-n b link set c0 netns a")
	netnstest.IP(t, "-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	s.held("a", 3)
	netnstest.IP(t, "-n b xfrm policy add src 0.0.0.0/0 dst 10.7.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
	b, err := s.agentOf("b")
	if err != nil {
		t.Fatal(err)
	}
	// The features are given back after the test, as the route comes later than the device.
	if err := b.call(t.Context(), func() { b.cfg.RestoreAfter = Duration(time.Hour) }); err != nil {
		t.Fatal(err)
	}
	netnstest.IP(t, "-n a link set c0 netns b\n-n b link set c0 addrgenmode none\n-n b link set c0 up\n-n b route add 10.7.0.0/16 dev c0")
	s.held("b", 3)
	s.noFinding("a")
	s.stop()
	if on, mtu := movedTSO(t, "b", "c0"); !on || mtu != 1500 {
		t.Errorf("stopped: %v, %d", on, mtu)
	}
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
}

// Through several namespaces at once, faster than the loops look, and with another index.
func TestMovedDeviceThatIsMovedOn(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b", "c")
	carrierIn(t, "a")
	netnstest.IP(t, "-n b link add x1 type veth peer name x2\n-n b link add x3 type veth peer name x4") // the index is taken there
	s := sail(t, movedConfig(t, "all"))
	s.state("b", NetnsFollowed) // else nobody sees it leave
	s.state("c", NetnsFollowed)
	for range 5 {
		s.held("a", 3)
		netnstest.IP(t, "-n a link set c0 netns b\n-n b link set c0 netns c name c9")
		netnstest.Within(t, "given back in c", func() bool { on, mtu := movedTSO(t, "c", "c9"); return on && mtu == 1500 })
		s.noFinding("a")
		s.noFinding("b")
		netnstest.IP(t, "-n c link set c9 netns a name c0\n-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	}
	s.held("a", 3)
	s.stop()
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
}

// Where nobody follows, the report says what to do, also after a restart, until the device is back, is gone, or
// somebody follows.
func TestMovedDeviceWhereNobodyFollows(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b")
	carrierIn(t, "a")
	cfg := movedConfig(t, "host", "a")
	s := sail(t, cfg)
	s.held("a", 3)
	netnstest.IP(t, "-n a link set c0 netns b")
	says := []string{"c0 was moved to network namespace b", "`ip netns exec b ethtool -K c0 ", " tx-tcp-segmentation on", " tx-tcp6-segmentation on"}
	s.finding("a", says...)
	if on, mtu := movedTSO(t, "b", "c0"); on || mtu != 1500 {
		t.Errorf("touched where nobody follows: %v, %d", on, mtu)
	}
	s.stop()

	s = sail(t, cfg)
	s.finding("a", says...)
	netnstest.IP(t, "-n b link set c0 netns a")
	netnstest.Within(t, "back: given back", func() bool { on, mtu := movedTSO(t, "a", "c0"); return on && mtu == 1500 })
	s.noFinding("a")

	// Back while no agent runs, where it is covered.
	netnstest.IP(t, "-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	s.held("a", 3)
	netnstest.IP(t, "-n a link set c0 netns b")
	s.finding("a", says[0])
	s.crash()
	done, err := RestoreAll(t.Context(), cfg, discard(), "test", false)
	if err != nil || len(done.Namespaces) != 1 || !slices.ContainsFunc(done.Namespaces[0].Findings, func(f string) bool { return strings.Contains(f, says[1]) }) {
		t.Errorf("restore: %+v, %v", done, err)
	}
	netnstest.IP(t, "-n b link set c0 netns a\n-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	s = sail(t, cfg)
	s.held("a", 3)
	s.noFinding("a")

	// b is followed from now on.
	netnstest.IP(t, "-n a link set c0 netns b")
	s.finding("a", says[0])
	s.crash()
	cfg.Namespaces = Namespaces{"host", "a", "b"}
	s = sail(t, cfg)
	netnstest.Within(t, "followed: given back", func() bool { on, mtu := movedTSO(t, "b", "c0"); return on && mtu == 1500 })
	s.noFinding("a")
	s.stop()
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
}

// A namespace without a name is called by a process; a device that is gone is no finding.
func TestMovedDeviceWithoutAName(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b")
	carrierIn(t, "a")
	pid, end := netnstest.Live(t, "b")
	netnstest.IP(t, "netns del b")
	cfg := movedConfig(t, "host", "a")
	cfg.ResyncEvery = Duration(200 * time.Millisecond)
	s := sail(t, cfg)
	s.held("a", 3)
	netnstest.IP(t, "-n a link set c0 netns "+strconv.Itoa(pid))
	s.finding("a", "`nsenter -t "+strconv.Itoa(pid)+" -n ethtool -K c0 ")
	end()
	s.noFinding("a")
	s.stop()
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
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
	s := sail(t, movedConfig(t, "all"))
	s.held("a", 3)
	setMTU := func() bool { _, mtu := movedTSO(t, "a", "c0"); return mtu == 1400 }
	netnstest.Within(t, "its mtu is set", setMTU)
	netnstest.IP(t, "-n a link set c0 netns b")
	netnstest.Within(t, "given back in b", func() bool { on, mtu := movedTSO(t, "b", "c0"); return on && mtu == 1500 })
	s.noFinding("a")
	netnstest.IP(t, "-n b link set c0 netns a\n-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	s.held("a", 3)
	netnstest.Within(t, "its mtu is set again", setMTU)
	s.stop()
	if on, mtu := movedTSO(t, "a", "c0"); !on || mtu != 1500 {
		t.Errorf("stopped: %v, %d", on, mtu)
	}

	cfg := movedConfig(t, "host", "a")
	s = sail(t, cfg)
	s.held("a", 3)
	netnstest.Within(t, "its mtu is set", setMTU)
	netnstest.IP(t, "-n a link set c0 netns b")
	s.finding("a", "`ip netns exec b ethtool -K c0 ", "`ip netns exec b ip link set c0 mtu 1500`")
	if on, mtu := movedTSO(t, "b", "c0"); on || mtu != 1400 {
		t.Errorf("touched where nobody follows: %v, %d", on, mtu)
	}
	netnstest.IP(t, "-n b link set c0 netns a")
	netnstest.Within(t, "back: given back", func() bool { on, mtu := movedTSO(t, "a", "c0"); return on && mtu == 1500 })
	s.noFinding("a")
	s.stop()
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
}

// The claims on a device that left a namespace go after it, also where that namespace is not followed any more after a
// restart; where nobody follows the device, the host's report tells of it.
func TestMovedDeviceFromADroppedNamespace(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b")
	carrierIn(t, "a")
	cfg := movedConfig(t, "host", "a")
	s := sail(t, cfg)
	s.held("a", 3)
	netnstest.IP(t, "-n a link set c0 netns b")
	s.finding("a", "c0 was moved to network namespace b")
	s.crash()

	cfg.Namespaces = Namespaces{"host"}
	s = sail(t, cfg)
	s.finding("", "namespace a", "c0 was moved to network namespace b", "`ip netns exec b ethtool -K c0 ")
	s.crash()

	netnstest.IP(t, "-n b link set c0 netns a\n-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	cfg.Namespaces = Namespaces{"a"}
	s = sail(t, cfg)
	s.held("a", 3)
	netnstest.IP(t, "-n a link set c0 netns "+strconv.Itoa(os.Getpid())) // the host's of this test
	s.finding("a", "c0 was moved to")
	s.crash()
	cfg.Namespaces = Namespaces{"host"}
	s = sail(t, cfg)
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
	netnstest.Within(t, "no journal is left", func() bool { return len(s.dirs()) == 0 })
	s.stop()
}

// A device that was moved while no agent ran is not given back by a restore, which says so and doesn't count it.
func TestRestoreTellsOfDevicesThatAreGone(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b")
	carrierIn(t, "a")
	cfg := movedConfig(t, "a", "b")
	s := sail(t, cfg)
	s.held("a", 3)
	s.crash()
	netnstest.IP(t, "-n a link set c0 netns b")
	stale, err := RestoreIn(t.Context(), "a", cfg, discard(), "test", true)
	if err != nil || len(stale.Findings) != 0 {
		t.Errorf("restore --stale: %+v, %v", stale, err)
	}
	done, err := RestoreIn(t.Context(), "a", cfg, discard(), "test", false)
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
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b", "c")
	carrierIn(t, "a")
	cfg := movedConfig(t, "host", "a", "b")
	cfg.ResyncEvery = Duration(300 * time.Millisecond)
	s := sail(t, cfg)
	s.state("b", NetnsFollowed)
	s.held("a", 3)
	netnstest.IP(t, "-n a link set c0 netns b name e0 address 02:00:00:00:00:01")
	netnstest.Within(t, "given back in b", func() bool { on, _ := movedTSO(t, "b", "e0"); return on })
	s.noFinding("a")
	netnstest.IP(t, "-n b link set e0 netns a name c0\n-n a link set c0 addrgenmode none\n-n a link set c0 up\n-n a route add 10.7.0.0/16 dev c0")
	s.held("a", 3)

	// Where nobody follows, it is told of by its name there, and known by its address.
	a, err := s.agentOf("a")
	if err != nil {
		t.Fatal(err)
	}
	netnstest.IP(t, "-n a link set c0 netns c name e1 address 02:00:00:00:00:02")
	says := []string{"e1 was moved to network namespace c", "`ip netns exec c ethtool -K e1 "}
	s.finding("a", says...)
	for range 3 { // looks whether it is still there
		if err := a.call(t.Context(), a.offerAgain); err != nil {
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
	netnstest.IP(t, "-n c link set e1 netns a name c0")
	netnstest.Within(t, "back: given back", func() bool { on, _ := movedTSO(t, "a", "c0"); return on })
	s.noFinding("a")
	s.stop()
	if n := len(s.dirs()); n != 0 {
		t.Errorf("%d journals are left", n)
	}
}
