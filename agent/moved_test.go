package agent

import (
	"testing"

	"tsoagent/routes"
)

// A route that is moved just before our rule is added makes its clone wrong for a moment. Once the
// event of the move is read, the shape is tried again and does not rest for a minute.
func TestRouteMovedUnderANewRuleIsTriedAgain(t *testing.T) {
	w := newWorld(t, Config{})
	w.otherWay("10.3.0.0/16")
	w.start(partPolicy, partSA)
	if w.ownRules() != "" || len(w.a.st.withheld) != 1 {
		t.Fatalf("not withdrawn: %s", w.ownRules())
	}
	w.lookup = nil
	w.took()
	var of routes.Route
	for _, s := range w.a.st.withheld {
		of = s.of
	}
	if of.Body == nil {
		t.Fatal("the route whose clone went wrong is not remembered")
	}
	w.routing(routes.RouteGone{Route: of})
	w.settle()
	if len(w.a.st.withheld) != 0 {
		t.Error("still withheld after its route has changed")
	}
}

// A lock that could not be given back because its device was gone does not count against a later one.
func TestLockThatIsLostIsNoLongerStuck(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start(tunnelPolicy, tunnelSA)
	if len(w.a.st.locks) != 1 {
		t.Fatalf("locks %v", w.a.st.locks)
	}
	for k := range w.a.st.locks {
		w.a.st.stuck[k] = stuckAfter - 1
	}
	w.deleteRoute("10.2.0.0/16")
	w.settle()
	if len(w.a.st.locks)+len(w.a.st.stuck) != 0 {
		t.Errorf("locks %v, stuck %v", w.a.st.locks, w.a.st.stuck)
	}
}
