package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// fakeLinks sets the MTU of a fake kernel's devices. Events wait until the test sends them.
type fakeLinks struct {
	*world
	err      error
	lateErr  error // of a set that was done
	readErr  error // of the reads after a set
	readsBad bool
	ahead    func() // of the next read
}

func (f *fakeLinks) ReadLink(i routes.Ifindex) (*routes.Link, error) {
	if ahead := f.ahead; ahead != nil {
		f.ahead = nil
		ahead()
	}
	if f.readsBad {
		return nil, f.readErr
	}
	if l := f.kernel.Link(i); l != nil {
		return l, nil
	}
	return nil, unix.ENODEV
}

// ReadLinkAt reads a device of another namespace, which a fake kernel has not.
func (f *fakeLinks) ReadLinkAt(routes.Place) (*routes.Link, error) { return nil, unix.EINVAL }

func (f *fakeLinks) SetLinkMTU(i routes.Ifindex, mtu int) error {
	if f.err != nil {
		return f.err
	}
	f.wrote("mtu %s %d", f.kernel.Link(i).Name, mtu)
	f.mtu(i, mtu)
	f.readsBad = f.readErr != nil
	return f.lateErr
}

// mtu sets a device's MTU in the kernel, which tells of it.
func (w *world) mtu(i routes.Ifindex, mtu int) {
	l := *w.kernel.Link(i)
	l.MTU = mtu
	w.routing(routes.LinkSet{Link: &l})
}

func mtuConfig() Config {
	cfg := dedicatedOff()
	cfg.Plan.CarrierMTU = plan.CarrierDevice
	return cfg
}

func mtuWorld(t *testing.T) (*world, *fakeLinks) {
	t.Helper()
	w := tunnelWorld(t, mtuConfig())
	f := &fakeLinks{world: w}
	w.a.links = f
	return w, f
}

func (w *world) mtuOps() []string {
	return slices.DeleteFunc(w.took(), func(op string) bool {
		return !strings.HasPrefix(op, "mtu ") && !strings.Contains(op, "device-mtu/") && !strings.HasPrefix(op, "replace")
	})
}

func TestDeviceMTUIsSetAndGivenBack(t *testing.T) {
	w, f := mtuWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	wantOps(t, "at first", w.mtuOps(), "journal put device-mtu/7", "mtu ipsec1 1446", "journal put device-mtu/7")
	if m := w.a.Report().DeviceMTUs; len(m) != 1 || m[0].State != StateInPlace || m[0].MTU != 1446 || m[0].Was != 1500 || m[0].Device != "ipsec1" {
		t.Errorf("the report says %+v", m)
	}
	// An event that is older than our write is nobody's change.
	old := *w.kernel.Link(ipsec1)
	old.MTU = 1500
	w.send(batch{routes: []routes.Event{routes.LinkSet{Link: &old}}})
	w.settle()
	wantOps(t, "an old event", w.mtuOps())
	if got := w.a.st.fib.Link(ipsec1).MTU; got != 1446 {
		t.Errorf("the mirror has %d", got)
	}

	w.crash(mtuConfig())
	w.a.links = f
	w.start(tunnelPolicy, tunnelSA)
	wantOps(t, "adopted", w.mtuOps())
	w.a.goal, w.a.once = restoreStale, true
	w.settle()
	wantOps(t, "restore --stale", w.mtuOps())
	w.a.goal = restoreAll
	if !w.settle() {
		t.Error("not done")
	}
	wantOps(t, "restore", w.mtuOps(), "mtu ipsec1 1500", "journal remove device-mtu/7")
}

func TestDeviceMTUOfSomebodyElseStays(t *testing.T) {
	w, f := mtuWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	w.took()
	w.mtu(ipsec1, 1480)
	w.settle()
	if ops := w.mtuOps(); len(ops) == 0 || ops[0] != "journal put device-mtu/7" && ops[len(ops)-1] != "journal put device-mtu/7" || slices.Contains(ops, "mtu ipsec1 1446") {
		t.Errorf("somebody sets it: %q", ops)
	}
	if got := w.route("10.2.0.0/16"); !strings.Contains(got, "1446") {
		t.Errorf("the route is not locked instead: %s", got)
	}
	if m := w.a.Report().DeviceMTUs; len(m) != 1 || m[0].State != StateContested || !w.a.Report().Degraded() {
		t.Errorf("the report says %+v", m)
	}
	w.crash(mtuConfig())
	w.a.links = f
	w.start(tunnelPolicy, tunnelSA)
	w.advance(time.Hour)
	wantOps(t, "also after a restart", w.mtuOps())
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Minute)
	if got := w.kernel.Link(ipsec1).MTU; got != 1480 || w.book["device-mtu/7"].ID != "" {
		t.Errorf("the cause is gone: mtu %d, journal %v", got, w.book["device-mtu/7"])
	}
	w.xfrm(tunnelPolicy)
	w.settle()
	if got := w.kernel.Link(ipsec1).MTU; got != 1446 {
		t.Errorf("another cause: mtu %d", got)
	}
}

func TestDeviceMTUThatIsRefusedLocksTheRoutes(t *testing.T) {
	w, f := mtuWorld(t)
	f.err = unix.EINVAL
	w.start(tunnelPolicy, tunnelSA)
	if got := w.route("10.2.0.0/16"); !strings.Contains(got, "1446") || w.book["device-mtu/7"].ID != "" {
		t.Errorf("%s, journal %v", got, w.book["device-mtu/7"])
	}
	if m := w.a.Report().DeviceMTUs; len(m) != 1 || !strings.Contains(m[0].Why, "refuses") {
		t.Errorf("the report says %+v", m)
	}
}

// An MTU is set by a device's index alone, which another one can have by then.
func TestDeviceMTUOfAnotherDeviceWithTheIndexStays(t *testing.T) {
	another := func(w *world) func() {
		return func() {
			l := *w.kernel.Link(ipsec1)
			l.Name, l.Kind, l.IfID = "other0", "dummy", 0
			w.kernel.Apply(routes.LinkSet{Link: &l}) // its event is on the way
		}
	}
	t.Run("set", func(t *testing.T) {
		w, f := mtuWorld(t)
		w.start(tunnelPolicy)
		f.ahead = another(w)
		w.xfrm(tunnelSA)
		w.settle()
		wantOps(t, "set", w.mtuOps())
	})
	t.Run("given back", func(t *testing.T) {
		w, f := mtuWorld(t)
		w.start(tunnelPolicy, tunnelSA)
		w.took()
		w.xfrm(gone(tunnelPolicy))
		w.settle()
		f.ahead = another(w)
		w.advance(5 * time.Second)
		if ops := w.mtuOps(); slices.ContainsFunc(ops, func(op string) bool { return strings.HasPrefix(op, "mtu ") }) {
			t.Errorf("given back: %q", ops)
		}
	})
}

// A claim is dropped only when it is known that nothing was written.
func TestDeviceMTUThatCantBeReadBackStaysOurs(t *testing.T) {
	for name, fail := range map[string]func(*fakeLinks){
		"the read fails":         func(f *fakeLinks) { f.readErr = unix.ENOBUFS },
		"the answer is lost":     func(f *fakeLinks) { f.lateErr = unix.ENOBUFS },
		"both fail":              func(f *fakeLinks) { f.lateErr, f.readErr = unix.ENOBUFS, unix.ENOBUFS },
		"both, and then a crash": func(f *fakeLinks) { f.lateErr, f.readErr = unix.ENOBUFS, unix.ENOBUFS },
	} {
		t.Run(name, func(t *testing.T) {
			w, f := mtuWorld(t)
			fail(f)
			w.resync()
			w.dumpXFRM(tunnelPolicy, tunnelSA)
			w.step()
			if f.kernel.Link(ipsec1).MTU != 1446 || w.book["device-mtu/7"].ID == "" {
				t.Fatalf("set to %d, journal %v", f.kernel.Link(ipsec1).MTU, w.book["device-mtu/7"])
			}
			f.lateErr, f.readErr, f.readsBad = nil, nil, false
			if strings.Contains(name, "crash") {
				w.crash(mtuConfig())
				w.a.links = f
				w.start(tunnelPolicy, tunnelSA)
			}
			w.settle()
			if m := w.a.Report().DeviceMTUs; len(m) != 1 || m[0].State != StateInPlace || m[0].Was != 1500 {
				t.Errorf("the report says %+v", m)
			}
			w.xfrm(gone(tunnelPolicy))
			w.settle()
			w.advance(time.Minute)
			if got := f.kernel.Link(ipsec1).MTU; got != 1500 || w.book["device-mtu/7"].ID != "" {
				t.Errorf("given back: mtu %d, journal %v", got, w.book["device-mtu/7"])
			}
		})
	}
}

func TestDeviceMTUAfterACrashAheadOfItsWrite(t *testing.T) {
	w, f := mtuWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	w.mtu(ipsec1, 1500) // never written
	w.book["device-mtu/7"] = entry("device-mtu/7", kindDeviceMTU, deviceMTU{Index: ipsec1, Name: "ipsec1", Claim: plan.MTUClaim{Was: 1500, Ours: 1446, Prev: 1500}})
	w.crash(mtuConfig())
	w.a.links = f
	w.start(tunnelPolicy, tunnelSA)
	wantOps(t, "written now", w.mtuOps(), "journal put device-mtu/7", "mtu ipsec1 1446", "journal put device-mtu/7")

	w.book["device-mtu/7"] = entry("device-mtu/7", kindDeviceMTU, deviceMTU{Index: ipsec1, Name: "other0", Kind: "gre", Claim: plan.MTUClaim{Was: 1400, Ours: 1300}})
	w.crash(mtuConfig())
	w.a.links = f
	w.start()
	w.advance(time.Minute)
	if got := w.kernel.Link(ipsec1).MTU; got != 1446 {
		t.Errorf("another device has the index, and has mtu %d", got)
	}
}
