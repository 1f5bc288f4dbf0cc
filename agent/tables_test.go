package agent

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
)

// The kernel refuses to write a multipath route one of whose devices is down. A throw then keeps
// its flows from the wider clone, for as long as that is so.
func TestCloneThatCannotBeWrittenIsAThrowThatStays(t *testing.T) {
	w := partWorld(t, Config{})
	w.mustLead()
	w.cloneErr = fmt.Errorf("fake: %w", unix.EHOSTUNREACH)
	w.took()
	w.addRoute("10.3.7.0/24", hop{oif: 2, gw: "192.0.2.10"})
	w.settle()
	for range 3 { // whatever else happens
		w.addRoute("198.51.100.0/24", hop{oif: 2, gw: "192.0.2.10"})
		w.settle()
		w.deleteRoute("198.51.100.0/24")
		w.settle()
	}
	want := "10.3.0.0/16 via 192.0.2.254 dev 2 mtu lock 1446\n10.3.7.0/24 throw"
	if got := w.table(5450); got != want {
		t.Errorf("table 5450 has\n%s\nwant\n%s", got, want)
	}
	for _, op := range w.took() {
		if strings.HasPrefix(op, "delete 10.3.7.0/24") {
			t.Errorf("the throw was taken away: %s", op)
		}
	}
	w.cloneErr = nil
	w.advance(time.Minute)
	w.addRoute("198.51.100.0/24", hop{oif: 2, gw: "192.0.2.10"})
	w.settle()
	if got := w.table(5450); !strings.Contains(got, "10.3.7.0/24 via 192.0.2.10 dev 2 mtu lock 1446") || strings.Contains(got, "throw") {
		t.Errorf("once it can be written, table 5450 has\n%s", got)
	}
}

func TestDeletedCloneComesBackButNotForEver(t *testing.T) {
	w := partWorld(t, Config{})
	w.took()
	dst := netip.MustParsePrefix("10.3.0.0/16")
	back := 0
	for range 30 {
		for r := range w.kernel.Table(routes.IPv4, 5450) {
			if r.Dst == dst {
				back++
				w.routing(routes.RouteGone{Route: r, Origin: routes.Origin{Port: ownerPort, Seq: 1}})
				break
			}
		}
		w.settle()
	}
	if back < 2 || back > fightWrites+1 {
		t.Errorf("it came back %d times within one moment", back-1)
	}
	if got := w.ownRules(); got != "" {
		t.Errorf("the rule that leads to an empty table stays: %s", got)
	}
	w.advance(2 * time.Minute)
	w.settle()
	w.mustLead()
}

func TestRuleThatRestsComesBackWhateverElseChanges(t *testing.T) {
	w := partWorld(t, Config{})
	for range 30 {
		for _, r := range w.kernel.Rules(routes.IPv4) {
			if w.a.cfg.Plan.OwnRule(r) {
				w.routing(routes.RuleGone{Rule: r})
				break
			}
		}
		w.settle()
	}
	if got := w.ownRules(); got != "" {
		t.Fatalf("it does not rest: %s", got)
	}
	foreign := &routes.Rule{Family: routes.IPv4, Priority: 7, Action: routes.RuleToTable, Table: 77, SuppressPrefixLen: -1, SuppressIfgroup: -1}
	w.routing(routes.RuleSet{Rule: foreign})
	w.settle()
	if r := w.a.Report(); len(r.Rules) > 0 || len(r.Findings) == 0 {
		t.Errorf("while it rests the report has rules %v, findings %v", r.Rules, r.Findings)
	}
	w.advance(2 * time.Minute)
	w.settle()
	w.mustLead()
}

// The rules of a policy that comes and goes are added as often: that we deleted them ourselves is nobody's doing.
func TestRulesThatComeAndGoWithAPolicyAreNobodysDoing(t *testing.T) {
	w := partWorld(t, Config{RestoreAfter: Duration(time.Millisecond)})
	for range 3 * fightWrites {
		w.xfrm(gone(partPolicy))
		w.settle()
		w.advance(10 * time.Millisecond)
		if got := w.ownRules(); got != "" {
			t.Fatalf("the rule of a policy that is gone stays: %s", got)
		}
		w.xfrm(partPolicy)
		w.settle()
		w.mustLead()
	}
}

// A rule that somebody deletes just when its policy goes is remembered for as long as it can be a fight, and no longer.
func TestDeletedRuleIsForgotten(t *testing.T) {
	w := partWorld(t, Config{RestoreAfter: Duration(time.Millisecond)})
	w.xfrm(gone(partPolicy))
	w.settle() // it lingers
	for _, r := range w.kernel.Rules(routes.IPv4) {
		if w.a.cfg.Plan.OwnRule(r) {
			w.routing(routes.RuleGone{Rule: r})
			break
		}
	}
	w.advance(10 * time.Millisecond)
	w.settle()
	if n := len(w.a.st.deleted); n != 1 {
		t.Fatalf("%d deleted rules are remembered, want the one", n)
	}
	w.advance(2 * fightWindow)
	w.settle()
	if n := len(w.a.st.deleted); n != 0 {
		t.Errorf("%d deleted rules are remembered for good", n)
	}
}
