package ethtool

import (
	"errors"
	"maps"
	"os"
	"slices"
	"testing"

	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inTestKernel skips unless the test runs in the project's test kernel, which has the devices
// that this machine's own may lack.
func inTestKernel(t *testing.T) {
	t.Helper()
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for xfrm, gre, vti, netdevsim and bond devices")
	}
	enterNS(t)
}

// checkHold switches TSO off and on again on a device that lets one, as the agent does.
func checkHold(t *testing.T, dev Device, hold map[Feature]bool) {
	t.Helper()
	c := dial(t)
	before, err := c.Features(dev)
	if err != nil {
		t.Fatal(err)
	}
	held := mustSet(t, c, dev, hold)
	back := map[Feature]bool{}
	for name := range hold {
		was, _ := before.Get(name)
		checkState(t, held, name, off)
		back[name] = was.Wanted
	}
	if after := mustSet(t, c, dev, back); !after.Equal(before) {
		t.Errorf("not as before:\n%s", text(after))
	}
}

// KERNEL.md 10: which devices let one switch TSO off.
func TestKernelTSOCanBeHeld(t *testing.T) {
	inTestKernel(t)
	loop, err := vnl.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range []vnl.Link{
		&vnl.Xfrmi{LinkAttrs: vnl.LinkAttrs{Name: "x0", ParentIndex: loop.Attrs().Index}, Ifid: 7},
		&vnl.Dummy{LinkAttrs: vnl.LinkAttrs{Name: "d0"}},
		&vnl.Gretun{LinkAttrs: vnl.LinkAttrs{Name: "g0"}, Local: []byte{10, 0, 0, 1}, Remote: []byte{10, 0, 0, 2}},
		&vnl.Iptun{LinkAttrs: vnl.LinkAttrs{Name: "i0"}, Local: []byte{10, 0, 0, 1}, Remote: []byte{10, 0, 0, 2}},
		&vnl.Vxlan{LinkAttrs: vnl.LinkAttrs{Name: "n0"}, VxlanId: 7, Port: 4789},
	} {
		if err := vnl.LinkAdd(link); err != nil {
			t.Errorf("add %s: %v", link.Type(), err)
			continue
		}
		dev := device(t, link.Attrs().Name)
		t.Logf("%s", link.Type())
		checkHold(t, dev, noTSO)
		// A tunnel's "permanent address" is its local IP address.
		if info, err := ReadInfo(dev.Name); err != nil || info != (Info{Driver: link.Type()}) {
			t.Errorf("%s: %+v, %v; want the driver and nothing else", link.Type(), info, err)
		}
	}
}

// KERNEL.md 5: every offload of a vti is off [fixed].
func TestKernelVTIRefuses(t *testing.T) {
	inTestKernel(t)
	dev := addLink(t, &vnl.Vti{LinkAttrs: vnl.LinkAttrs{Name: "vti7"}, Local: []byte{10, 0, 0, 1}, Remote: []byte{10, 0, 0, 2}, IKey: 7, OKey: 7})
	c := dial(t)
	f, err := c.Set(dev, noTSO)
	if err != nil {
		t.Errorf("switching off what is off: %v", err)
	}
	checkState(t, f, TCPSegmentation, State{})
	refused := (*RefusedError)(nil)
	if _, err := c.Set(dev, allTSO); !errors.As(err, &refused) || len(refused.Refused) != len(allTSO) {
		t.Errorf("got %v, want all of %v refused", err, slices.Collect(maps.Keys(allTSO)))
	}
}

// KERNEL.md 14: a bond advertises ESP offload, changeably; it can be held.
func TestKernelBondESPOffload(t *testing.T) {
	inTestKernel(t)
	bond := vnl.NewLinkBond(vnl.LinkAttrs{Name: "bond7"})
	bond.Mode = vnl.BOND_MODE_ACTIVE_BACKUP
	dev := addLink(t, bond)
	c := dial(t)
	f, err := c.Features(dev)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []Feature{ESPHWOffload, ESPSegmentation, ESPTxCsum, TCPSegmentation} {
		s, ok := f.Get(name)
		t.Logf("%s: %v (known: %v)", name, s, ok)
	}
	if s, _ := f.Get(ESPHWOffload); s.Changeable {
		checkHold(t, dev, map[Feature]bool{ESPHWOffload: false, ESPTxCsum: false, ESPSegmentation: false})
	} else {
		t.Error("esp-hw-offload of an active-backup bond can't be changed: rewrite KERNEL.md 14")
	}
}

// KERNEL.md 10: netdevsim has ESP offload, fixed on.
func TestKernelNetdevsim(t *testing.T) {
	inTestKernel(t)
	err := os.WriteFile("/sys/bus/netdevsim/new_device", []byte("4711 1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("needs a kernel with netdevsim, and sysfs mounted")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile("/sys/bus/netdevsim/del_device", []byte("4711"), 0); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	})
	c := dial(t)
	found := false
	err = c.All(func(f *Features) error {
		s, _ := f.Get(ESPHWOffload)
		if !s.Active {
			return nil
		}
		found = true
		t.Logf("%s: esp-hw-offload %v", f.Name, s)
		info, err := ReadInfo(f.Name)
		if info.Driver != "netdevsim" || info.Firmware != "10.20.30" {
			t.Errorf("driver information %+v, want netdevsim and its firmware version", info)
		}
		refused := (*RefusedError)(nil)
		if _, err := c.Set(f.Device(), map[Feature]bool{ESPHWOffload: false}); s.Changeable != (err == nil) || err != nil && !errors.As(err, &refused) {
			t.Errorf("esp-hw-offload is %v, switching it off says %v", s, err)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if !found {
		t.Error("no device has esp-hw-offload: netdevsim was not made in this namespace, or lost the feature")
	}
}
