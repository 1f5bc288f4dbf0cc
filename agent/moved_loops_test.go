package agent

import (
	"testing"

	"tsoagent/agent/netns"
	"tsoagent/routes"
)

// Claims that were offered to a loop which ends ahead of taking them go back to who offered them: else nobody would
// own them, and nobody would tell of them.
func TestLoopThatEndsGivesArrivalsBack(t *testing.T) {
	from, to := newAgent(Config{}, discard(), "test"), newAgent(Config{}, discard(), "test")
	device := func(i routes.Ifindex) arrival {
		d := movedDevice{Name: "c0", To: routes.Place{Netnsid: 1, Index: i}}
		from.st.moved[movedID(d.To)] = &movedDevice{Name: d.Name, To: d.To, offered: true}
		return arrival{id: movedID(d.To), dev: d, from: from.inbox}
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
	w.a.doneMoved(movedID(d.To))
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
