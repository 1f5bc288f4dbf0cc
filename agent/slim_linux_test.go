package agent

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
)

// manyRoutes makes so many that it is worth something when they go.
func manyRoutes(t *testing.T, ns string) {
	t.Helper()
	var lines strings.Builder
	for i := range slimFrom {
		fmt.Fprintf(&lines, "route add 11.%d.%d.0/24 via 192.0.2.254\n", i>>8, i&255)
	}
	cmd := exec.CommandContext(t.Context(), "ip", append(strings.Fields(inside(ns)), "-batch", "-")...)
	cmd.Stdin = strings.NewReader(lines.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestShrunkTablesAreReadAnew: where most of a large table has gone, and it is quiet, another agent takes over. What is locked stays so all the time,
// and the service is not ready once more. An agent that is paused, or whose table is as large as ever, goes on.
func TestShrunkTablesAreReadAnew(t *testing.T) {
	s := depart(t, "a", "b", "c")
	if s == nil {
		return
	}
	c := s.control()
	netnstest.Within(t, "it is ready", func() bool { return len(s.Ready()) == 1 })
	<-s.Ready()
	shrink := []string{"", "a", "b"}
	all := append(slices.Clone(shrink), "c")
	before, rules := map[string]*Agent{}, map[string]func() string{}
	agentIn := func(ns string) *Agent { // nil between two
		if ns == "" {
			ns = netns.Host
		}
		a, _ := s.agentOf(ns)
		return a
	}
	anew := func(ns string) bool { a := agentIn(ns); return a != nil && a != before[ns] }
	has := func(n int, namespaces []string) {
		t.Helper()
		for _, ns := range namespaces {
			netnstest.Within(t, fmt.Sprintf("%q has %d × %d routes", ns, n, slimFrom), func() bool {
				r, err := c.ReportIn(t.Context(), ns)
				return err == nil && r.Routes/slimFrom == n
			})
		}
	}
	for _, ns := range all {
		manyRoutes(t, ns)
	}
	has(1, all)
	for _, ns := range all {
		before[ns], rules[ns] = agentIn(ns), monitor(t, ns)
	}
	if _, err := c.Pause(t.Context(), "b", api.PauseRequest{}); err != nil {
		t.Fatal(err)
	}
	for _, ns := range shrink {
		netnstest.IP(t, inside(ns)+"route flush root 11.0.0.0/8")
	}
	has(0, shrink)
	for _, ns := range []string{"", "a"} {
		netnstest.Within(t, "an event tells why another one takes over", func() bool {
			l, err := c.EventsIn(t.Context(), ns, 0)
			return err == nil && slices.ContainsFunc(l.Events, func(e api.Event) bool { return e.Text == slimmed }) && anew(ns)
		})
	}
	locked(t, all...)
	for _, ns := range []string{"b", "c"} {
		if anew(ns) {
			t.Errorf("%s has another agent", ns)
		}
	}
	for ns, stop := range rules {
		if got := stop(); got != "" {
			t.Errorf("rules came or went in %q:\n%s", ns, got)
		}
	}
	// The new ones follow.
	netnstest.IP(t, "xfrm policy flush\n-n a xfrm policy flush")
	netnstest.Within(t, "all is given back", func() bool { return ours(t, "")+ours(t, "a") == "" })
	if len(s.Ready()) > 0 {
		t.Error("ready once more")
	}
	s.stop()
	bare(t, all...)
}
