package ethtool

import (
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// enterNS locks the test's goroutine to its thread and gives the thread a network namespace of
// its own. The thread is never unlocked, so it ends with the goroutine, and with the thread and
// the sockets the namespace and all that is in it, also when the test fails.
func enterNS(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN for a network namespace, CAP_NET_ADMIN in it)")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
}

// addLink adds a link and returns it as a Device. It skips if the kernel lacks the type.
func addLink(t *testing.T, link vnl.Link) Device {
	t.Helper()
	err := vnl.LinkAdd(link)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("needs a kernel with %s devices", link.Type())
	}
	if err != nil {
		t.Fatalf("add %s %s: %v", link.Type(), link.Attrs().Name, err)
	}
	return device(t, link.Attrs().Name)
}

func device(t *testing.T, name string) Device {
	t.Helper()
	link, err := vnl.LinkByName(name)
	if err != nil {
		t.Fatalf("find %s: %v", name, err)
	}
	return Device{Index: Ifindex(link.Attrs().Index), Name: name}
}

func veth(name string) *vnl.Veth {
	return &vnl.Veth{LinkAttrs: vnl.LinkAttrs{Name: name}, PeerName: name + "p"}
}

func dial(t *testing.T) *Client {
	t.Helper()
	c, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func mustSet(t *testing.T, c *Client, dev Device, want map[Feature]bool) *Features {
	t.Helper()
	f, err := c.Set(dev, want)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func checkState(t *testing.T, f *Features, name Feature, want State) {
	t.Helper()
	if got, ok := f.Get(name); !ok || got != want {
		t.Errorf("%s of %s: got %v (known: %v), want %v", name, f.Name, got, ok, want)
	}
}

var (
	on           = State{Active: true, Wanted: true, Changeable: true}
	off          = State{Changeable: true}
	requestedOn  = State{Wanted: true, Changeable: true}
	onlyTSO      = map[Feature]bool{TCPSegmentation: false}
	noTSO        = map[Feature]bool{TCPSegmentation: false, TCP6Segmentation: false, TCPECNSegmentation: false}
	allTSO       = map[Feature]bool{TCPSegmentation: true, TCP6Segmentation: true, TCPECNSegmentation: true}
	scatterOn    = map[Feature]bool{"tx-scatter-gather": true}
	scatterOff   = map[Feature]bool{"tx-scatter-gather": false}
	checksumOff  = map[Feature]bool{"tx-checksum-ip-generic": false}
	checksumOn   = map[Feature]bool{"tx-checksum-ip-generic": true}
	fixedFeature = Feature("loopback")
)

func TestSetSwitchesSingleFeatures(t *testing.T) {
	enterNS(t)
	for _, link := range []vnl.Link{veth("v0"), &vnl.Ifb{LinkAttrs: vnl.LinkAttrs{Name: "ifb7"}}, &vnl.Dummy{LinkAttrs: vnl.LinkAttrs{Name: "dummy7"}}} {
		name := link.Attrs().Name
		if err := vnl.LinkAdd(link); errors.Is(err, unix.EOPNOTSUPP) {
			t.Logf("this kernel has no %s devices", link.Type())
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		c, dev := dial(t), device(t, name)
		before, err := c.Features(dev)
		if err != nil {
			t.Fatal(err)
		}
		checkState(t, before, TCPSegmentation, on)
		mangle, _ := before.Get("tx-tcp-mangleid-segmentation")

		f := mustSet(t, c, dev, noTSO)
		for name := range noTSO {
			checkState(t, f, name, off)
		}
		// It is not ours and keeps its wanted bit, but it is never active without
		// tx-tcp-segmentation (netdev_fix_features, net/core/dev.c).
		checkState(t, f, "tx-tcp-mangleid-segmentation", State{Wanted: mangle.Wanted, Changeable: mangle.Changeable})
		if again := mustSet(t, c, dev, noTSO); !again.Equal(f) {
			t.Errorf("%s: setting again changed something:\n%s", name, cmp.Diff(text(f), text(again)))
		}
		if back := mustSet(t, c, dev, allTSO); !back.Equal(before) {
			t.Errorf("%s: not as before (-want +got):\n%s", name, cmp.Diff(text(before), text(back)))
		}
	}
}

func TestAllFindsEveryDevice(t *testing.T) {
	enterNS(t)
	addLink(t, veth("v0"))
	c := dial(t)
	var names []string
	err := c.All(func(f *Features) error {
		names = append(names, f.Name)
		one, err := c.Features(Device{Index: f.Index})
		if err == nil && !one.Equal(f) {
			t.Errorf("%s: dump and request differ (-dump +request):\n%s", f.Name, cmp.Diff(text(f), text(one)))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	// Some kernels have fallback tunnel devices in every namespace.
	for _, want := range []string{"lo", "v0", "v0p"} {
		if !slices.Contains(names, want) {
			t.Errorf("%s is not among %v", want, names)
		}
	}
	stop := errors.New("stop")
	if err := c.All(func(*Features) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got %v, want the error of the callback", err)
	}
}

// KERNEL.md 11: what depends on a feature goes down with it and comes back with it, and a
// request that comes in between sticks.
func TestWantedOutlivesADependency(t *testing.T) {
	for _, tt := range []struct {
		name     string
		down, up map[Feature]bool
	}{
		{"scatter-gather", scatterOff, scatterOn},
		{"checksumming", checksumOff, checksumOn},
	} {
		t.Run(tt.name, func(t *testing.T) {
			enterNS(t)
			dev, c := addLink(t, veth("v0")), dial(t)

			f := mustSet(t, c, dev, tt.down)
			checkState(t, f, TCPSegmentation, requestedOn)
			f = mustSet(t, c, dev, onlyTSO)
			checkState(t, f, TCPSegmentation, off)
			// Asked on while the dependency is down: no error, and visible.
			f = mustSet(t, c, dev, map[Feature]bool{TCPSegmentation: true})
			checkState(t, f, TCPSegmentation, requestedOn)
			f = mustSet(t, c, dev, tt.up)
			checkState(t, f, TCPSegmentation, on)
			// Off before the dependency comes back: nothing restores it.
			mustSet(t, c, dev, tt.down)
			mustSet(t, c, dev, onlyTSO)
			f = mustSet(t, c, dev, tt.up)
			checkState(t, f, TCPSegmentation, off)
			checkState(t, f, TCP6Segmentation, on)
		})
	}
}

func TestRefusedFeaturesDontStopTheOthers(t *testing.T) {
	enterNS(t)
	dev, c := addLink(t, veth("v0")), dial(t)
	f, err := c.Set(dev, map[Feature]bool{
		TCPSegmentation:   false,
		ESPHWOffload:      true,  // off [fixed] on a veth
		fixedFeature:      false, // off [fixed], and off is what is asked for
		"netns-local":     true,  // never changeable (up to 6.11 or so)
		"vlan-challenged": true,  // never changeable
		"tx-teleport":     true,  // no such feature
	})
	refused := (*RefusedError)(nil)
	if !errors.As(err, &refused) {
		t.Fatalf("got error %v, want a RefusedError", err)
	}
	checkState(t, f, TCPSegmentation, off)
	if refused.Device != dev {
		t.Errorf("refused by %v, want %v", refused.Device, dev)
	}
	for _, name := range []Feature{ESPHWOffload, "vlan-challenged", "tx-teleport"} {
		if _, ok := refused.Refused[name]; !ok {
			t.Errorf("%s is not among the refused: %v", name, err)
		}
	}
	for _, name := range []Feature{TCPSegmentation, fixedFeature} {
		if _, ok := refused.Refused[name]; ok {
			t.Errorf("%s is among the refused: %v", name, err)
		}
	}
	if !slices.Contains(refused.Unknown, "tx-teleport") {
		t.Errorf("unknown: %v, want tx-teleport in it", refused.Unknown)
	}
	for _, part := range []string{"v0", "esp-hw-offload is off [fixed]", "tx-teleport is not known to this kernel"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
}

// The kernel itself refuses a request whose index and name are not of one device, so a device
// that was replaced between our look and our write is not touched.
func TestSetRefusesAnotherDevice(t *testing.T) {
	enterNS(t)
	dev, c := addLink(t, veth("v0")), dial(t)
	check := func(what string, dev Device, untouched string) {
		t.Helper()
		if _, err := c.Set(dev, onlyTSO); !errors.Is(err, os.ErrNotExist) || !errors.Is(err, unix.ENODEV) {
			t.Errorf("%s: got %v, want ENODEV that is os.ErrNotExist", what, err)
		}
		if _, err := c.Features(dev); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: get: got %v, want os.ErrNotExist", what, err)
		}
		f, err := c.Features(Device{Name: untouched})
		if err != nil {
			t.Fatal(err)
		}
		checkState(t, f, TCPSegmentation, on)
	}
	check("mismatch", Device{Index: dev.Index, Name: "v0p"}, "v0")
	check("no such index", Device{Index: 4711, Name: "v0"}, "v0")

	link, err := vnl.LinkByName("v0")
	if err != nil {
		t.Fatal(err)
	}
	if err := vnl.LinkSetName(link, "renamed"); err != nil {
		t.Fatal(err)
	}
	check("renamed", dev, "renamed")

	if err := vnl.LinkDel(link); err != nil {
		t.Fatal(err)
	}
	if again := addLink(t, veth("v0")); again.Index == dev.Index {
		t.Fatalf("the new device has the old index %d", dev.Index)
	}
	check("created anew", dev, "v0")

	for _, dev := range []Device{{Name: "v0"}, {Index: dev.Index}, {}} {
		if _, err := c.Set(dev, onlyTSO); !errors.Is(err, unix.EINVAL) {
			t.Errorf("set on %+v: got %v, want EINVAL", dev, err)
		}
	}
}

func TestSetWithoutCapabilityIsErrPermission(t *testing.T) {
	enterNS(t)
	dev := addLink(t, veth("v0"))
	c := dial(t)
	// Generic netlink asks for the capability of the sender and of the opener of the socket, so
	// dropping it on this thread (which ends with the test) is enough.
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Features(dev); err != nil {
		t.Errorf("reading needs no capability, got %v", err)
	}
	if _, err := c.Set(dev, onlyTSO); !errors.Is(err, os.ErrPermission) {
		t.Errorf("got %v, want os.ErrPermission", err)
	}
}

func TestReadInfo(t *testing.T) {
	enterNS(t)
	addLink(t, veth("v0"))
	// At every depth of the stack: the library passes stack addresses as numbers.
	var descend func(n int) error
	descend = func(n int) error {
		var pad [64]byte
		pad[n%len(pad)] = byte(n)
		if n > 0 {
			err := descend(n - 1)
			runtime.KeepAlive(pad[n%len(pad)])
			return err
		}
		info, err := ReadInfo("v0")
		if err == nil && info != (Info{Driver: "veth"}) {
			t.Errorf("got %+v, want the driver veth and nothing else", info)
		}
		return err
	}
	for depth := range 400 {
		if err := descend(depth); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ReadInfo("nosuch"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want os.ErrNotExist", err)
	}
	if info, err := ReadInfo("lo"); err != nil || info != (Info{}) {
		t.Errorf("lo: got %+v, %v, want nothing and no error", info, err)
	}
}

func TestTimeOfASet(t *testing.T) {
	enterNS(t)
	dev, c := addLink(t, veth("v0")), dial(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var sets, noops, gets []time.Duration
	for i := range 200 {
		if ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
		want := map[Feature]bool{TCPSegmentation: i%2 != 0}
		start := time.Now()
		mustSet(t, c, dev, want)
		sets = append(sets, time.Since(start))
		start = time.Now()
		mustSet(t, c, dev, want)
		noops = append(noops, time.Since(start))
		start = time.Now()
		if _, err := c.Features(dev); err != nil {
			t.Fatal(err)
		}
		gets = append(gets, time.Since(start))
	}
	median := func(d []time.Duration) time.Duration { slices.Sort(d); return d[len(d)/2] }
	t.Logf("medians: set and read back %v, no-op set and read back %v, get %v", median(sets), median(noops), median(gets))
}
