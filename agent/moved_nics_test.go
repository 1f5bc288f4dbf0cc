package agent

import (
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// nic1Addr is the permanent address of a world's NIC.
const nic1Addr = "02:00:00:00:00:02"

// twoWorlds are two namespaces of a fleet: from the first a NIC went that is not where it went, and which is in the second as nic1,
// as one is whose namespace is gone, if that has one.
func twoWorlds(t *testing.T) (f *Fleet, from, to *world, nic movedDevice) {
	t.Helper()
	host, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	from, to = newWorld(t, Config{RunDir: t.TempDir()}), newWorld(t, Config{})
	f = &Fleet{
		cfg: from.a.cfg, live: from.a.cfg, log: discard(), host: host, look: make(chan struct{}, 1), strays: map[uint64]stray{},
		members: map[netns.ID]*member{host.ID(): {id: host.ID(), agent: from.a}, {Ino: 2}: {agent: to.a}},
	}
	from.a.others, to.a.others = f, f
	from.a.links = noPlace{}
	other := *from.kernel.Link(2)
	other.PermAddr = "02:00:00:00:00:12"
	from.kernel.Apply(routes.LinkSet{Link: &other})
	from.start()
	nic = movedDevice{
		Name: "eth3", PermAddr: nic1Addr, Addr: "02:00:00:00:00:99", To: routes.Place{Netnsid: 1, Index: 7},
		Features: []ethtool.Feature{ethtool.TCPSegmentation, ethtool.TCP6Segmentation},
	}
	to.turn(2, ethtool.TCPSegmentation, false) // tx-tcp6-segmentation was switched on by somebody since
	return f, from, to, nic
}

// A NIC comes back to the initial namespace when its own is gone, whoever uses the number of that now: it is found by its permanent
// address, and given back there.
func TestNICIsFoundWhereItIsNow(t *testing.T) {
	for name, links := range map[string]linkTable{"its namespace is gone": noPlace{}, "another device is there": impostor{}} {
		t.Run(name, func(t *testing.T) {
			_, from, to, nic := twoWorlds(t)
			from.a.links = links
			from.a.follow(nic)
			from.a.offerAgain(false)
			if len(from.a.st.moved) != 1 || from.a.st.moved["moved/1/7/1"].offered {
				t.Fatalf("nobody has it: %+v", from.a.st.moved)
			}
			to.start() // which tells that it has a NIC
			from.settle()
			to.settle()
			if got := to.hold(ethtool.TCPSegmentation); got.Device != "nic1" {
				t.Errorf("the hold is on %s", got.Device)
			}
			from.settle()
			if len(from.a.st.moved)+len(from.a.journal.Entries()) != 0 {
				t.Errorf("moved %v, journal %v", from.a.st.moved, from.a.journal.Entries())
			}
			to.advance(time.Minute)
			if s, _ := to.feats[2].Get(ethtool.TCPSegmentation); !s.Wanted {
				t.Error("not given back")
			}
		})
	}
}

// It is told of when a resync doesn't find it anywhere, and forgotten after another one: it can have been unplugged.
func TestNICThatIsNowhereIsToldAndForgotten(t *testing.T) {
	for name, links := range map[string]linkTable{"its namespace is gone": noPlace{}, "another device is there": impostor{}} {
		t.Run(name, func(t *testing.T) {
			_, from, _, nic := twoWorlds(t)
			from.a.links = links
			from.a.follow(nic)
			for range 5 { // as other namespaces come to be followed
				from.a.offerAgain(false)
			}
			if got := from.a.movedFindings(); len(got) != 0 || len(from.a.st.moved) != 1 {
				t.Errorf("it may be on its way: %q, %v", got, from.a.st.moved)
			}
			from.a.offerAgain(true)
			if got := from.a.movedFindings(); len(got) != 1 || !strings.HasPrefix(got[0], "eth3 ("+nic1Addr+") is not where") || !strings.Contains(got[0], "`ethtool -K eth3 tx-tcp-segmentation on") {
				t.Errorf("findings %q", got)
			}
			from.a.offerAgain(true)
			if len(from.a.st.moved)+len(from.a.journal.Entries())+len(from.a.movedFindings()) != 0 {
				t.Errorf("moved %v, journal %v", from.a.st.moved, from.a.journal.Entries())
			}
		})
	}
}

// Of two with one address nobody knows which it is.
func TestNICsWithOneAddressAreNotTakenForEachOther(t *testing.T) {
	f, from, to, nic := twoWorlds(t)
	third := newWorld(t, Config{})
	third.a.others = f
	f.members[netns.ID{Ino: 3}] = &member{agent: third.a}
	from.a.follow(nic)
	to.start()
	third.start()
	from.a.offerAgain(false)
	to.addLink(&routes.Link{Index: 5, Name: "twin", Type: 1, MTU: 1500, PermAddr: nic1Addr})
	to.settle()
	delete(f.members, netns.ID{Ino: 3})
	from.a.offerAgain(false)
	if d := from.a.st.moved["moved/1/7/1"]; d == nil || d.offered {
		t.Errorf("one of them was chosen: %+v", d)
	}
}

// What devices are known by.
func TestOnlyNICsAreFoundByTheirAddress(t *testing.T) {
	for want, l := range map[string]*routes.Link{
		"02:00:00:00:00:01": {PermAddr: "02:00:00:00:00:01", HardwareAddr: "02:00:00:00:00:09", Type: 1},
		"02:00:00:00:00:02": {HardwareAddr: "02:00:00:00:00:02", Type: 1}, // a card whose address was made up
		"":                  {HardwareAddr: "00:00:00:00:00:00", Type: unix.ARPHRD_LOOPBACK},
	} {
		if got := nicKey(l); got != want {
			t.Errorf("%+v: %q", l, got)
		}
		l.Kind = "ipvlan" // has its NIC's
		if got := nicKey(l); got != "" {
			t.Errorf("%+v: %q", l, got)
		}
	}
}

// What an agent that was killed has held off on a NIC comes back with it when the namespace dies before anybody restores.
func TestNICsOfANamespaceThatIsGoneAreGivenBack(t *testing.T) {
	const cookie = 12345
	f, from, to, nic := twoWorlds(t)
	claim := plan.HoldClaim{Device: ethtool.Device{Index: 9, Name: "eth3"}, PermAddr: nic1Addr, NIC: true, Was: true}
	above := plan.HoldClaim{Device: ethtool.Device{Index: 10, Name: "ipvl0"}, PermAddr: nic1Addr, Was: true}
	virtual := movedDevice{Name: "c0", Kind: "veth", To: nic.To, Features: nic.Features}
	writeGone := func() {
		scope, err := journal.ReadScope()
		if err != nil {
			t.Fatal(err)
		}
		scope.NetnsCookie = cookie
		j, _, err := journal.Open(cookieDir(f.cfg.RunDir, cookie), scope)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		if err := j.Put(
			entry("feature/9/x", kindHold, heldFeature{claim, ethtool.TCPSegmentation}),
			entry("feature/10/x", kindHold, heldFeature{above, ethtool.TCPECNSegmentation}),
			entry("moved/1/7/1", kindMoved, virtual), entry("tables", kindTables, ownTables{}),
			entry("device-mtu/10", kindDeviceMTU, deviceMTU{Index: 10, Name: "ipvl0", Kind: "ipvlan", PermAddr: nic1Addr, Claim: plan.MTUClaim{Was: 1500, Ours: 1400}}),
		); err != nil {
			t.Fatal(err)
		}
	}
	gone := func() bool {
		_, err := os.Stat(cookieDir(f.cfg.RunDir, cookie))
		return os.IsNotExist(err)
	}
	writeGone()
	if more, err := f.raise(cookie); !more || err != nil {
		t.Fatalf("raise: %v, %v", more, err)
	}
	f.recallGhosts(false)
	if gone() || len(f.strayFindings()) != 0 {
		t.Errorf("ahead of the NIC: the journal is gone: %v, findings %q", gone(), f.strayFindings())
	}
	f.recallGhosts(true)
	if got := f.strayFindings(); len(got) != 1 || !strings.Contains(got[0], "ethtool -K eth3 tx-tcp-segmentation on`") {
		t.Errorf("findings %q", got)
	}
	// The agent is killed, and the next one finds the same.
	f.endGhosts()
	if more, err := f.raise(cookie); !more || err != nil {
		t.Fatalf("raise again: %v, %v", more, err)
	}
	to.start()
	if !f.recallDue {
		t.Error("a NIC came, and nobody looks")
	}
	f.recallGhosts(false)
	to.settle()
	if got := slices.Collect(maps.Keys(to.a.st.holds)); len(got) != 1 || got[0] != (plan.HoldKey{Index: 2, Feature: ethtool.TCPSegmentation}) {
		t.Errorf("taken over: %v", got)
	}
	f.endGhosts()
	if !gone() || errors.Join(f.errs...) != nil || len(f.notes) != 0 {
		t.Errorf("the journal is gone: %v; %v, %q", gone(), f.errs, f.notes)
	}
	from.quiet("where the NIC is not")

	// Without one nothing is missed.
	claim.NIC = false
	writeGone()
	if more, err := f.raise(cookie); more || err != nil || !gone() {
		t.Errorf("nothing outlives it: %v, %v, %v", more, err, gone())
	}
}

// The place of a device that is still told of can be another one's by now.
func TestTwoDevicesThatWereMovedToOnePlace(t *testing.T) {
	w := newWorld(t, Config{})
	w.start()
	d := movedDevice{Name: "c0", Kind: "veth", To: routes.Place{Netnsid: 1, Index: 7}, Features: []ethtool.Feature{ethtool.TCPSegmentation}}
	w.a.follow(d)
	d.Name = "c1"
	w.a.follow(d)
	if n, m := len(w.a.st.moved), len(w.a.journal.Entries()); n != 2 || m != 2 {
		t.Fatalf("%d are missed, the journal has %d", n, m)
	}
	w.a.settleMoved(handed{id: "moved/1/7/1"})
	if got := w.a.movedFindings(); len(got) != 1 || !strings.HasPrefix(got[0], "c1 was moved") {
		t.Errorf("findings %q", got)
	}
	w.a.settleMoved(handed{id: "moved/1/7/2", why: "no room"})
	if got := w.a.movedFindings(); len(got) != 1 || strings.Contains(got[0], "not followed") || !strings.Contains(got[0], "not taken over there yet (no room)") {
		t.Errorf("findings %q", got)
	}
}

// impostor is where another device is.
type impostor struct{ noPlace }

func (impostor) ReadLinkAt(p routes.Place) (*routes.Link, error) {
	return &routes.Link{Index: p.Index, Name: "eth3", Type: 1, PermAddr: "02:00:00:00:00:77", HardwareAddr: "02:00:00:00:00:99"}, nil
}
