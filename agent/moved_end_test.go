package agent

import (
	"testing"

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
