package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tsoagent/ethtool"
	"tsoagent/routes"
)

func TestHoldThatSomebodyTurnsOnIsOverruledOnceThenContested(t *testing.T) {
	w := coveredWorld(t)
	w.turn(ipsec1, tso, true)
	w.settle()
	want := []string{"journal put feature/7/tx-tcp-segmentation", "set ipsec1 tx-tcp-segmentation false"}
	if d := cmp.Diff(want, w.took()); d != "" {
		t.Errorf("overruled (-want +got):\n%s", d)
	}
	w.mustProtect()

	w.turn(ipsec1, tso, true)
	w.settle()
	if d := cmp.Diff([]string{"journal remove feature/7/tx-tcp-segmentation"}, w.took()); d != "" {
		t.Errorf("contested (-want +got):\n%s", d)
	}
	if h := w.hold(tso); h.State != StateContested || h.Why == "" {
		t.Errorf("the report says %+v", h)
	}
	if h := w.hold(ethtool.TCP6Segmentation); h.State != StateInPlace {
		t.Errorf("the other features are no less held: %+v", h)
	}
	w.turn(ipsec1, tso, false)
	w.settle()
	w.turn(ipsec1, tso, true)
	w.advance(time.Hour)
	w.quiet("we stay out")

	// The contest ends with its cause, and with it the memory of the first time.
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Minute)
	w.mustBeBare()
	w.xfrm(tunnelPolicy)
	w.settle()
	w.mustProtect()
	w.took()
	w.turn(ipsec1, tso, true)
	w.settle()
	w.mustProtect()
	w.turn(ipsec1, tso, true)
	w.settle()
	if h := w.hold(tso); h.State != StateContested {
		t.Errorf("the second time it is %+v", h)
	}
}

func TestChangeWhileAHoldIsGivenBackDoesNotCountAgainstTheNextHold(t *testing.T) {
	w := coveredWorld(t)
	w.turn(ipsec1, tso, true) // overruled
	w.settle()
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Second - 1)
	w.xfrm(saGone(tunnelSA))
	w.replaceRoute("10.2.0.0/16", hop{oif: 2})
	w.settle() // no more carrier: the hold waits to be given back
	w.turn(ipsec1, tso, true)
	w.settle()
	w.advance(time.Minute)
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1})
	w.xfrm(tunnelPolicy, tunnelSA)
	w.settle()
	w.mustProtect()
	w.turn(ipsec1, tso, true)
	w.settle()
	w.mustProtect()
}

// A claim is dropped only when it is known that the feature is on.
func TestHoldThatCantBeReadBackStaysOurs(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start()
	w.lateErr = unix.ENOBUFS
	w.xfrm(tunnelPolicy, tunnelSA)
	w.step()
	if len(w.a.st.holds) != 3 || w.book["feature/7/tx-tcp-segmentation"].ID == "" {
		t.Fatalf("holds %v, journal %v", w.a.st.holds, w.ids())
	}
	w.lateErr = nil
	w.settle()
	if h := w.hold(tso); h.State != StateInPlace || len(w.a.st.unsure)+len(w.a.st.retakes)+len(w.a.st.refused) > 0 {
		t.Errorf("the report says %+v", h)
	}
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Minute)
	w.mustBeBare()

	// The request came to nothing, which nobody overruled: it is asked for again.
	w.xfrm(tunnelPolicy)
	w.beforeSet = func() { w.setErr, w.lateErr = unix.ENOBUFS, unix.ENOBUFS }
	w.step()
	w.lateErr = nil
	w.features(ethtool.FeaturesSet{Features: w.feats[ipsec1]})
	w.settle()
	w.mustProtect()
	if len(w.a.st.retakes)+len(w.a.st.unsure) > 0 {
		t.Errorf("counted: %v, %v", w.a.st.retakes, w.a.st.unsure)
	}
}

// An event from before our own write is nobody's change.
func TestOldEventIsNotTakenForAChange(t *testing.T) {
	on := func(w *world) *ethtool.Features { return w.feats[ipsec1] }
	for name, play := range map[string]func(w *world, old *ethtool.Features){
		"a notification that was queued": func(w *world, old *ethtool.Features) {
			w.features(ethtool.FeaturesSet{Features: old})
		},
		"a dump that was read before": func(w *world, old *ethtool.Features) {
			w.features(ethtool.ResyncBegin{}, ethtool.FeaturesSet{Features: w.feats[1]}, ethtool.FeaturesSet{Features: w.feats[2]},
				ethtool.FeaturesSet{Features: old}, ethtool.FeaturesSet{Features: w.feats[ipsec2]}, ethtool.ResyncEnd{})
		},
		"a dump whose end comes later": func(w *world, old *ethtool.Features) {
			w.features(ethtool.ResyncBegin{}, ethtool.FeaturesSet{Features: w.feats[1]}, ethtool.FeaturesSet{Features: w.feats[2]},
				ethtool.FeaturesSet{Features: old}, ethtool.FeaturesSet{Features: w.feats[ipsec2]})
			w.settle()
			w.features(ethtool.ResyncEnd{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := tunnelWorld(t, dedicatedOff())
			old := on(w)
			w.start(tunnelPolicy, tunnelSA)
			w.took()
			play(w, old)
			w.settle()
			w.quiet("nobody changed anything")
			if len(w.a.st.retakes) > 0 {
				t.Errorf("counted: %v", w.a.st.retakes)
			}
			if h := w.hold(tso); h.State != StateInPlace {
				t.Errorf("the report says %+v", h)
			}
		})
	}
	t.Run("a dump that began before the hold", func(t *testing.T) {
		w := tunnelWorld(t, dedicatedOff())
		w.start()
		w.features(w.dumpFeatures()[:5]...)
		w.xfrm(tunnelPolicy, tunnelSA)
		w.settle()
		w.mustProtect()
		w.took()
		w.features(ethtool.ResyncEnd{})
		w.settle()
		w.quiet("nobody changed anything")
		if len(w.a.st.retakes) > 0 {
			t.Errorf("counted: %v", w.a.st.retakes)
		}
	})
}

func TestFeatureThatADeviceRefusesStopsNothingElse(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.refuse = map[ethtool.Feature]bool{ethtool.TCP6Segmentation: true}
	w.start(tunnelPolicy, tunnelSA)
	if got := w.route("10.2.0.0/16"); got != "dev 7 mtu lock 1446" {
		t.Errorf("the route is %q", got)
	}
	if got, want := w.held(ipsec1), "tx-tcp-ecn-segmentation tx-tcp-segmentation"; got != want {
		t.Errorf("off: %q, want %q", got, want)
	}
	h := w.hold(ethtool.TCP6Segmentation)
	if h.State != StateRefused || !strings.Contains(h.Why, "refuses") {
		t.Errorf("the report says %+v", h)
	}
	if strings.Contains(strings.Join(w.ids(), " "), "tx-tcp6") {
		t.Errorf("a claim on what was refused: %v", w.ids())
	}
	w.took()
	w.advance(time.Hour)
	w.addRoute("10.9.0.0/16", hop{oif: 2}) // any event
	w.settle()
	w.quiet("it was refused")
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Minute)
	w.mustBeBare()
}

func TestDeviceThatCannotBeSetIsRefusedWithTheReason(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.setErr = errors.New("out of order")
	w.start(tunnelPolicy, tunnelSA)
	if h := w.hold(tso); h.State != StateRefused || h.Why != "out of order" {
		t.Errorf("the report says %+v", h)
	}
	if got := w.held(ipsec1); got != "" || w.route("10.2.0.0/16") != "dev 7 mtu lock 1446" {
		t.Errorf("off %q, route %q", got, w.route("10.2.0.0/16"))
	}
}

// The kernel did it, but could not say so (ethtool.Client.Set, "read back").
func TestHoldWhoseAnswerIsLostIsStillGivenBack(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.beforeSet = func() {
		for _, f := range []ethtool.Feature{tso, ethtool.TCP6Segmentation, ethtool.TCPECNSegmentation} {
			w.turn(ipsec1, f, false)
		}
	}
	w.setErr = errors.New("read back: no buffer space available")
	w.start(tunnelPolicy, tunnelSA)
	w.mustProtect()
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Minute)
	w.mustBeBare()
}

func TestDeviceThatIsRenamedBeforeTheHold(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	renamed := &routes.Link{Index: ipsec1, Name: "vpn0", Kind: "xfrm", Type: 65534, MTU: 1500, Up: true, IfID: 1}
	w.beforeSet = func() { w.rename(renamed) }
	w.start(tunnelPolicy, tunnelSA)
	if got := w.held(ipsec1); got != "" {
		t.Errorf("off under a name that was not known: %q", got)
	}
	w.announce(renamed)
	w.settle()
	w.mustProtect()
	for _, op := range w.took() {
		if strings.HasPrefix(op, "set vpn0 ") {
			return
		}
	}
	t.Error("nothing was set under the new name")
}

// rename renames a device in the kernel; announce lets the events come.
func (w *world) rename(l *routes.Link) {
	f := w.feats[ethtool.Ifindex(l.Index)]
	state := map[ethtool.Feature]ethtool.State{}
	for name, s := range f.All() {
		state[name] = s
	}
	w.feats[f.Index] = ethtool.NewFeatures(f.Index, l.Name, state)
}

func (w *world) announce(l *routes.Link) {
	w.routing(routes.LinkSet{Link: l})
	w.features(ethtool.FeaturesSet{Features: w.feats[ethtool.Ifindex(l.Index)]})
}

// A hold is ours also under another name: it is not forgotten because the kernel does not know
// the old one any more.
func TestDeviceThatIsRenamedBeforeItIsGivenBack(t *testing.T) {
	w := coveredWorld(t)
	renamed := &routes.Link{Index: ipsec1, Name: "vpn0", Kind: "xfrm", Type: 65534, MTU: 1500, Up: true, IfID: 1}
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.rename(renamed)
	w.advance(time.Second)
	if w.held(ipsec1) != allTSO {
		t.Error("something was given back under the old name")
	}
	w.announce(renamed)
	w.settle()
	w.advance(time.Minute)
	w.mustBeBare()
}

func TestDeviceThatIsMadeAnewIsAnotherOne(t *testing.T) {
	w := coveredWorld(t)
	w.routing(routes.LinkGone{Index: ipsec1}, routes.RouteGone{Route: newRoute(t, "10.2.0.0/16", hop{oif: ipsec1, mtu: routes.MTUMetric{MTU: 1446, Locked: true}})})
	delete(w.feats, ipsec1)
	w.features(ethtool.Gone{Index: ipsec1})
	w.settle()
	if ids := w.ids(); len(ids) != 1 || !strings.HasPrefix(ids[0], "mtu/") {
		t.Errorf("claims on a device that is gone: %v", ids)
	}
	w.took()
	w.addLink(&routes.Link{Index: 70, Name: "ipsec1", Kind: "xfrm", Type: 65534, MTU: 1500, Up: true, IfID: 1})
	w.addRoute("10.2.0.0/16", hop{oif: 70})
	w.settle()
	if w.held(70) != allTSO || w.route("10.2.0.0/16") != "dev 70 mtu lock 1446" {
		t.Errorf("off %q, route %q", w.held(70), w.route("10.2.0.0/16"))
	}
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Minute)
	if w.held(70) != "" || len(w.ids()) > 0 {
		t.Errorf("off %q, journal %v", w.held(70), w.ids())
	}
}

func TestDeviceThatComesBackUnderTheSameIndexStartsAnew(t *testing.T) {
	w := coveredWorld(t)
	link := w.kernel.Link(ipsec1)
	for range 2 { // overruled, contested
		w.turn(ipsec1, tso, true)
		w.settle()
	}
	w.routing(routes.LinkGone{Index: ipsec1})
	w.settle()
	w.addLink(link)
	w.settle()
	w.mustProtect()
	w.turn(ipsec1, tso, true)
	w.settle()
	if h := w.hold(tso); h.State != StateInPlace {
		t.Errorf("the first change on a new device: %+v", h)
	}
}

func TestFeatureThatWasOffBeforeIsNotOurs(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.turn(ipsec1, tso, false)
	w.queue = nil
	w.start(tunnelPolicy, tunnelSA)
	if h := w.hold(tso); h.State != StateNotOurs {
		t.Errorf("the report says %+v", h)
	}
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(time.Minute)
	if got := w.held(ipsec1); got != string(tso) {
		t.Errorf("off after all is given back: %q, want what was off before", got)
	}
}

// What somebody turned on since is not turned off, and not turned on again.
func TestRestoreKeepsForeignChange(t *testing.T) {
	w := coveredWorld(t)
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.advance(500 * time.Millisecond)
	w.replaceRoute("10.2.0.0/16", hop{oif: 2, mtu: routes.MTUMetric{MTU: 1200}})
	w.settle()
	w.took()
	w.turn(ipsec1, tso, true)
	w.settle()
	w.advance(time.Minute)
	for _, op := range w.took() {
		if op == "set ipsec1 tx-tcp-segmentation true" || strings.HasPrefix(op, "replace") {
			t.Errorf("written: %s", op)
		}
	}
	if w.held(ipsec1) != "" || w.route("10.2.0.0/16") != "dev 2 mtu 1200" || len(w.ids()) > 0 {
		t.Errorf("off %q, route %q, journal %v", w.held(ipsec1), w.route("10.2.0.0/16"), w.ids())
	}
}

func TestGivingBackIsTriedAgain(t *testing.T) {
	w := coveredWorld(t)
	w.xfrm(gone(tunnelPolicy))
	w.settle()
	w.setErr = unix.EBUSY
	w.advance(2 * time.Second)
	if w.held(ipsec1) == "" {
		t.Fatal("the error was not met")
	}
	w.advance(2 * time.Minute)
	w.mustBeBare()
}
