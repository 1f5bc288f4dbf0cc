package agent

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/ethtool"
)

// inTestKernel skips unless the test runs in the project's test kernel, which has ESP and xfrm
// interfaces.
func inTestKernel(t *testing.T) *testNS {
	t.Helper()
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for ESP SAs and xfrm interfaces")
	}
	return newNS(t)
}

const tunnelTemplate = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel"

// tunnel makes an xfrm interface with a route, a policy and an SA.
func (ns *testNS) tunnel() {
	ns.t.Helper()
	ns.xfrmi()
	ns.ip("xfrm policy add src 0.0.0.0/0 dst 10.2.0.0/16 dir out if_id 1 " + tunnelTemplate)
	ns.gcm("0x100")
}

func (ns *testNS) xfrmi() {
	ns.t.Helper()
	ns.ip("link add ipsec1 type xfrm dev n0 if_id 1\nlink set ipsec1 up\nroute add 10.2.0.0/16 dev ipsec1")
}

func (ns *testNS) gcm(spi string) {
	ns.t.Helper()
	key := "0x" + strings.Repeat("11", 20)
	ns.ip("xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi " + spi + " reqid 1 mode tunnel if_id 1 aead rfc4106(gcm(aes)) " + key + " 128")
}

// feature waits until a feature of a device is wanted or not.
func (ns *testNS) feature(dev string, name ethtool.Feature, wanted bool) {
	ns.t.Helper()
	c, err := ethtool.Dial()
	if err != nil {
		ns.t.Fatal(err)
	}
	defer c.Close()
	var last ethtool.State
	within(ns.t, 30*time.Second, dev+" "+string(name), func() bool {
		f, err := c.Features(ethtool.Device{Name: dev})
		last, _ = f.Get(name)
		return err == nil && last.Wanted == wanted
	})
}

// set is `ethtool -K`.
func (ns *testNS) set(dev string, want map[ethtool.Feature]bool) {
	ns.t.Helper()
	if inHostNS() {
		panic("a test would change the host's namespace")
	}
	c, err := ethtool.Dial()
	if err != nil {
		ns.t.Fatal(err)
	}
	defer c.Close()
	f, err := c.Features(ethtool.Device{Name: dev})
	if err == nil {
		_, err = c.Set(f.Device(), want)
	}
	if err != nil {
		ns.t.Logf("set %s: %v", dev, err)
	}
}

func kernelConfig(t *testing.T) Config {
	t.Helper()
	cfg := Config{RunDir: runDir(t), RestoreAfter: Duration(200 * time.Millisecond)}
	cfg.Plan.Dedicated = "off"
	return cfg
}

func TestKernelHoldOnAnXfrmInterface(t *testing.T) {
	checkLeaks(t)
	ns := inTestKernel(t)
	ns.xfrmi()
	before := ns.snapshot()
	a := ns.start(kernelConfig(t))
	ns.ip("xfrm policy add src 0.0.0.0/0 dst 10.2.0.0/16 dir out if_id 1 " + tunnelTemplate)
	ns.feature("ipsec1", tso, false) // the policy is enough for a hold
	if got := ns.show("route show 10.2.0.0/16"); strings.Contains(got, "mtu") {
		t.Errorf("locked before there is an SA: %s", got)
	}
	ns.gcm("0x100")
	ns.shows("route show 10.2.0.0/16", "dev ipsec1", "mtu lock 1446")
	ns.feature("ipsec1", ethtool.TCP6Segmentation, false)
	ns.feature("n0", tso, true)

	var e *Explanation
	if err := a.call(t.Context(), func() { e, _ = a.explain(Question{Dst: netip.MustParseAddr("10.2.0.1")}) }); err != nil || e == nil || e.MTU != 1446 || e.Device != "ipsec1" {
		t.Errorf("explanation %+v, %v", e, err)
	}
	ns.ip("xfrm state flush")
	within(t, 30*time.Second, "the SA is gone", func() bool { return a.Report().SAs == 0 })
	ns.shows("route show 10.2.0.0/16", "mtu lock 1446")
	ns.ip("xfrm policy flush")
	ns.feature("ipsec1", tso, true)
	within(t, 30*time.Second, "nothing is held or locked", func() bool {
		r := a.Report()
		return len(r.Holds)+len(r.Locks) == 0
	})
	if d := cmp.Diff(before, ns.snapshot()); d != "" {
		t.Errorf("(-before +after):\n%s", d)
	}
	a.stop()
}

// While scatter-gather or checksumming is off, TSO is wanted and not active: what is given back
// is what was wanted.
func TestKernelWantedBitsAreRestoredWhileADependencyIsDown(t *testing.T) {
	for name, dependency := range map[string]ethtool.Feature{"scatter-gather": "tx-scatter-gather", "checksum": "tx-checksum-ip-generic"} {
		t.Run(name, func(t *testing.T) {
			ns := inTestKernel(t)
			ns.tunnel()
			whole := ns.snapshot()
			ns.set("ipsec1", map[ethtool.Feature]bool{dependency: false})
			before := ns.snapshot()
			if before == whole {
				t.Skipf("an xfrm interface of this kernel can't switch %s", dependency)
			}
			a := ns.start(kernelConfig(t))
			ns.feature("ipsec1", tso, false)
			a.stop()
			if d := cmp.Diff(before, ns.snapshot()); d != "" {
				t.Errorf("while it is down (-before +after):\n%s", d)
			}
			a = ns.start(kernelConfig(t))
			ns.feature("ipsec1", tso, false)
			ns.set("ipsec1", map[ethtool.Feature]bool{dependency: true})
			a.stop()
			if d := cmp.Diff(whole, ns.snapshot()); d != "" {
				t.Errorf("when it came back under the hold (-before +after):\n%s", d)
			}
		})
	}
}

func TestKernelInterfaceThatIsMadeAnew(t *testing.T) {
	checkLeaks(t)
	ns := inTestKernel(t)
	ns.tunnel()
	a := ns.start(kernelConfig(t))
	for range 3 {
		ns.feature("ipsec1", tso, false)
		ns.shows("route show 10.2.0.0/16", "mtu lock 1446")
		ns.ip("link del ipsec1")
		ns.xfrmi()
	}
	ns.feature("ipsec1", tso, false)
	ns.shows("route show 10.2.0.0/16", "mtu lock 1446")
	// Renamed, it is the same device.
	ns.ip("link set ipsec1 down\nlink set ipsec1 name vpn0\nlink set vpn0 up\nroute add 10.2.0.0/16 dev vpn0")
	ns.shows("route show 10.2.0.0/16", "dev vpn0", "mtu lock 1446")
	ns.ip("xfrm policy flush")
	ns.feature("vpn0", tso, true)
	a.stop()
	if got := ns.show("route show 10.2.0.0/16"); strings.Contains(got, "mtu") {
		t.Errorf("given back: %s", got)
	}
	ns.feature("vpn0", ethtool.TCP6Segmentation, true)
}

func TestKernelChangeByAnAdminIsOverruledOnceThenContested(t *testing.T) {
	ns := inTestKernel(t)
	ns.tunnel()
	a := ns.start(kernelConfig(t))
	ns.feature("ipsec1", tso, false)
	ns.set("ipsec1", map[ethtool.Feature]bool{tso: true})
	ns.feature("ipsec1", tso, false)
	ns.set("ipsec1", map[ethtool.Feature]bool{tso: true})
	within(t, 30*time.Second, "the contest", func() bool {
		for _, h := range a.Report().Holds {
			if h.Feature == string(tso) {
				return h.State == StateContested
			}
		}
		return false
	})
	ns.feature("ipsec1", tso, true)
	ns.feature("ipsec1", ethtool.TCP6Segmentation, false)
	a.stop()
	ns.feature("ipsec1", ethtool.TCP6Segmentation, true)
}

func TestKernelCrashOfAHoldIsRestored(t *testing.T) {
	checkLeaks(t)
	ns := inTestKernel(t)
	ns.tunnel()
	before := ns.snapshot()
	cfg := kernelConfig(t)
	a := ns.start(cfg)
	ns.feature("ipsec1", tso, false)
	ns.shows("route show 10.2.0.0/16", "mtu lock 1446")
	a.crash()
	ns.feature("ipsec1", tso, false)
	ns.ip("xfrm state flush")
	a = ns.start(cfg) // adopts, and remembers the MTU although the SA is gone
	ns.shows("route show 10.2.0.0/16", "mtu lock 1446")
	if n := a.Report().Counters.Actions; n != 0 {
		t.Errorf("the restart made %d writes", n)
	}
	a.crash()
	done, err := Restore(t.Context(), cfg, discard(), "test", false)
	if err != nil || done.Holds == 0 || done.Locks != 1 {
		t.Errorf("restored %+v, %v", done, err)
	}
	if d := cmp.Diff(before, ns.snapshot()); d != "" {
		t.Errorf("(-before +after):\n%s", d)
	}
}
