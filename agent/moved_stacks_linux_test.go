package agent

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"tsoagent/agent/netns/netnstest"
)

// stack makes devices in a namespace whose uppermost, top, has a route that is covered.
func stack(t *testing.T, ns, top, lines string) {
	t.Helper()
	netnstest.IP(t, strings.ReplaceAll(lines+`
-n NS link set `+top+` addrgenmode none
-n NS link set `+top+` up
-n NS route add 10.7.0.0/16 dev `+top, "NS", ns))
}

// heldOn waits until a device is held, or not any more.
func (v *voyage) heldOn(ns, dev string, want bool) {
	v.t.Helper()
	netnstest.Within(v.t, fmt.Sprintf("%s is held in %s: %v", dev, ns, want), func() bool {
		r, err := v.reportOf(v.t.Context(), ns)
		if err != nil {
			return false
		}
		held := false
		for _, h := range r.Holds {
			held = held || h.Device == dev && h.State == StateInPlace
		}
		on, _ := movedTSO(v.t, ns, dev)
		return held == want && on != want
	})
}

// immovable fails if the kernel moves a device.
func immovable(t *testing.T, ns, dev, to string) {
	t.Helper()
	if out, err := exec.Command("ip", "-n", ns, "link", "set", dev, "netns", to).CombinedOutput(); err == nil {
		t.Errorf("%s was moved: %s", dev, out)
	}
}

// TestKernelMovedStacks pins KERNEL.md 84: bonds, bridges, teams and VRFs stay where they are, and what is moved of a stack, or
// from under it, keeps what it has. Whatever is told of it must be so.
func TestKernelMovedStacks(t *testing.T) {
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for bonds and VLANs")
	}
	if !netnstest.Private(t) {
		return
	}
	checkLeaks(t)
	named(t, "a", "b")
	netnstest.IP(t, "-n a xfrm policy add src 0.0.0.0/0 dst 10.7.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
	v := &voyage{t: t, cfg: movedConfig(t, "host", "a")}
	v.again()
	v.state("a", NetnsFollowed)

	// The port of a bond, or of a bridge, is free when it is moved, and nothing of ours is on it. The bond stays, held.
	for top, lines := range map[string]string{
		"bond0": `-n NS link add bond0 type bond mode active-backup
-n NS link add p0 type veth peer name p1
-n NS link set p0 master bond0
-n NS link set p1 up`,
		"br0": `-n NS link add br0 type bridge
-n NS link add p0 type veth peer name p1
-n NS link set p0 master br0
-n NS link set p0 up
-n NS link set p1 up`,
	} {
		stack(t, "a", top, lines)
		v.heldOn("a", top, true)
		immovable(t, "a", top, "b")
		v.move("p0", "a", "b")
		if on, _ := movedTSO(t, "b", "p0"); !on {
			t.Errorf("%s: its port took something along", top)
		}
		v.heldOn("a", top, true)
		v.noFinding("a")
		netnstest.IP(t, "-n b link del p0\n-n a route del 10.7.0.0/16")
		v.heldOn("a", top, false)
		netnstest.IP(t, "-n a link del "+top)
	}
	for _, kind := range []string{"team", "vrf table 10"} {
		netnstest.IP(t, "-n a link add x0 type "+kind)
		immovable(t, "a", "x0", "b")
		netnstest.IP(t, "-n a link del x0")
	}

	// A VLAN stays when its card is moved, and loses its routes by that: it is given back here. Moved at once it is told of, by itself.
	vlan := `-n NS link add c0 type veth peer name c1
-n NS link set c0 addrgenmode none
-n NS link set c0 up
-n NS link set c1 up
-n NS link add link c0 name c0.5 type vlan id 5`
	stack(t, "a", "c0.5", vlan)
	v.heldOn("a", "c0.5", true)
	v.move("c0", "a", "b")
	v.heldOn("a", "c0.5", false)
	v.noFinding("a")
	v.move("c0", "b", "a")
	netnstest.IP(t, "-n a link set c0 up\n-n a link set c0.5 up\n-n a route replace 10.7.0.0/16 dev c0.5")
	v.heldOn("a", "c0.5", true)
	netnstest.IP(t, "-n a link set c0 netns b\n-n a link set c0.5 netns b")
	netnstest.Within(t, "told, if it is off there", func() bool {
		r, err := v.reportOf(v.t.Context(), "a")
		on, _ := movedTSO(t, "b", "c0.5")
		return err == nil && on != foundIn(r.Findings, "c0.5 was moved to network namespace b", "`ip netns exec b ethtool -K c0.5 ")
	})
	v.noFindingOf("a", "c0 was moved")

	// The whole stack comes back in the other order.
	netnstest.IP(t, "-n b link set c0.5 netns a\n-n b link set c0 netns a")
	v.heldOn("a", "c0.5", false)
	v.noFinding("a")
	v.land()
}
