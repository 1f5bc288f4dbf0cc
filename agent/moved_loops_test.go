package agent

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/netns"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// Claims that were offered to a loop which ends ahead of taking them go back to who offered them: else nobody would
// own them, and nobody would tell of them.
func TestLoopThatEndsGivesArrivalsBack(t *testing.T) {
	from, to := newAgent(Config{}, discard(), "test"), newAgent(Config{}, discard(), "test")
	device := func(i routes.Ifindex) arrival {
		d := movedDevice{Name: "c0", To: routes.Place{Netnsid: 1, Index: i}}
		id := from.movedID(d.To)
		from.st.moved[id] = &movedDevice{Name: d.Name, To: d.To, offered: true}
		return arrival{id: id, dev: d, from: from.inbox}
	}
	to.st.arrivals = []arrival{device(7)}                // its link is waited for
	to.inbox.post(batch{arrivals: []arrival{device(8)}}) // not even read
	to.end()
	if to.inbox.post(batch{arrivals: []arrival{device(9)}}) {
		t.Error("a loop that has ended takes claims")
	}
	for _, b := range from.inbox.take() {
		from.apply(b)
	}
	for id, d := range from.st.moved {
		if d.offered != (d.To.Index == 9) {
			t.Errorf("%s is offered: %v", id, d.offered)
		}
	}
}

// A namespace that comes to be followed costs loops a round only if they miss a device.
func TestOnlyLoopsThatMissADeviceHearOfNamespaces(t *testing.T) {
	w := newWorld(t, Config{})
	f := &Fleet{members: map[netns.ID]*member{{Ino: 1}: {agent: w.a}, {Ino: 2}: {}}}
	offers := func() (n int) {
		f.announce()
		for _, b := range w.a.inbox.take() {
			if b.offer {
				n++
			}
		}
		return n
	}
	if n := offers(); n != 0 {
		t.Errorf("nothing is missed: %d", n)
	}
	d := movedDevice{Name: "c0", To: routes.Place{Netnsid: 1, Index: 7}}
	w.a.follow(d)
	if n := offers(); n != 1 {
		t.Errorf("one is missed: %d", n)
	}
	e := w.a.journal.Entries()
	w.a.doneMoved(e[0].ID)
	if n := offers(); n != 0 {
		t.Errorf("nothing is missed any more: %d", n)
	}
	if len(e) != 1 {
		t.Fatalf("the journal has %v", e)
	}
	if err := w.a.adoptMoved(e[0]); err != nil {
		t.Fatal(err)
	}
	if n := offers(); n != 1 {
		t.Errorf("an earlier run missed one: %d", n)
	}
}

// A look whether a device is still where it was moved to can come ahead of the event that it is back.
func TestDeviceThatIsLookedForOnItsWayBack(t *testing.T) {
	w := newWorld(t, Config{})
	d := movedDevice{Name: "c0", Kind: "veth", To: routes.Place{Netnsid: 1, Index: 7}, Index: 7, Features: []ethtool.Feature{ethtool.TCPSegmentation}}
	w.a.follow(d)
	w.a.links = nowhere{w.a.links}
	w.a.offerAgain(false)
	if got := w.a.movedFindings(); len(got) != 0 {
		t.Errorf("it is gone, and told: %q", got)
	}
	w.a.returned(&routes.Link{Name: "c0", Kind: "veth", Index: 7})
	if n := len(w.a.st.arrivals); n != 1 {
		t.Fatalf("back, and taken over %d times", n)
	}
	w.a.answer(w.a.st.arrivals[0], "")
	if len(w.a.st.moved) != 0 {
		t.Error("not forgotten")
	}
	// One that doesn't come back is forgotten by the second resync, or by a stop. Other looks can come at any time.
	resync := func() { w.a.offerAgain(true) }
	for _, forget := range []func(){resync, w.a.forgetGone} {
		w.a.follow(d)
		for range 5 {
			w.a.offerAgain(false)
		}
		resync()
		if len(w.a.st.moved) != 1 {
			t.Fatal("forgotten by the first resync")
		}
		forget()
		if len(w.a.st.moved)+len(w.a.journal.Entries()) != 0 {
			t.Errorf("moved %v, journal %v", w.a.st.moved, w.a.journal.Entries())
		}
	}
}

// nowhere is where no link is.
type nowhere struct{ linkTable }

func (nowhere) ReadLinkAt(routes.Place) (*routes.Link, error) { return nil, unix.ENODEV }

// What root pastes into a shell must not be a container's to choose.
func TestCommandsForMovedDevicesAreSafeToPaste(t *testing.T) {
	for name, want := range map[string]string{"eth0.5@x": "eth0.5@x", "`reboot`;$(x)": `$'\x60reboot\x60\x3b\x24\x28x\x29'`, "a'b\x1b[": `$'a\x27b\x1b\x5b'`, "é": `$'\xc3\xa9'`} {
		if got := shellWord(name); got != want {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
		out, err := exec.Command("bash", "-c", "printf %s "+shellWord(name)).Output()
		if err != nil || string(out) != name {
			t.Errorf("%q: the shell reads %q, %v", name, out, err)
		}
	}
	d := movedDevice{Name: "c0", There: "`reboot`", where: "b", Features: []ethtool.Feature{ethtool.TCPSegmentation}, MTU: &plan.MTUClaim{Was: 1500, Ours: 1400}}
	for _, got := range []string{d.says(), d.lost()} {
		if strings.Contains(got, "-K `") || strings.Contains(got, "set `") || strings.Count(got, `$'\x60reboot\x60'`) != 2 {
			t.Error(got)
		}
	}
}

// A later offer is for the device that it is about, not for whatever has its index by then. The first one can be for a device that was
// given another address by whoever moved it.
func TestArrivalIsNotAnotherDevice(t *testing.T) {
	for _, fresh := range []bool{false, true} {
		w := newWorld(t, Config{})
		w.addLink(&routes.Link{Index: 7, Name: "c0", Kind: "veth", Type: 1, MTU: 1500, HardwareAddr: "02:00:00:00:00:77"})
		w.turn(7, ethtool.TCPSegmentation, false) // by an admin
		from := newAgent(Config{}, discard(), "test")
		w.a.st.arrivals = []arrival{{id: "moved/1/7/1", from: from.inbox, fresh: fresh, dev: movedDevice{
			Name: "c0", Kind: "veth", Addr: "02:00:00:00:00:01", To: routes.Place{Index: 7}, Features: []ethtool.Feature{ethtool.TCPSegmentation},
		}}}
		w.start()
		w.advance(arrivalWithin + time.Minute)
		if s, _ := w.feats[7].Get(ethtool.TCPSegmentation); s.Wanted != fresh {
			t.Errorf("fresh %v: switched on: %v", fresh, s.Wanted)
		}
		var answers []handed
		for _, b := range from.inbox.take() {
			answers = append(answers, b.handed...)
		}
		if len(answers) != 1 || (answers[0].why == "") != fresh {
			t.Errorf("fresh %v: answered %+v", fresh, answers)
		}
	}
}

// TestAnotherDeviceThatLeavesTakesNothingAlong: where the end of a device was lost, another one that had its index is told to leave. What was held on the
// first went with it: the other one's features are its owner's. A device that was renamed, or has another address, ahead of its move is itself.
func TestAnotherDeviceThatLeavesTakesNothingAlong(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*routes.Link)
		moved  bool
	}{
		{"itself", func(*routes.Link) {}, true},
		{"itself, renamed", func(l *routes.Link) { l.Name = "vpn0" }, true},
		{"itself, with another address", func(l *routes.Link) { l.HardwareAddr = "02:00:00:00:00:66" }, true},
		{"another one", func(l *routes.Link) { l.Name, l.HardwareAddr = "vpn0", "02:00:00:00:00:66" }, false},
		{"of another kind", func(l *routes.Link) { l.Kind = "veth" }, false},
		{"another NIC", func(l *routes.Link) { l.PermAddr = "02:00:00:00:00:67" }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := coveredWorld(t)
			known := *w.kernel.Link(ipsec1)
			known.HardwareAddr = "02:00:00:00:00:65"
			w.addLink(&known)
			w.settle()
			w.mustProtect()
			then := known
			tt.change(&then)
			w.routing(routes.LinkGone{Index: ipsec1, Link: &then, To: routes.Place{Netnsid: 1, Index: 9}})
			delete(w.feats, ipsec1)
			w.features(ethtool.Gone{Index: ipsec1})
			w.settle()
			if got := len(w.a.st.moved) == 1; got != tt.moved {
				t.Errorf("its claims went along: %v", got)
			}
			for _, id := range w.ids() {
				if strings.HasPrefix(id, "feature/") {
					t.Errorf("%s is still claimed here", id)
				}
			}
		})
	}
}
