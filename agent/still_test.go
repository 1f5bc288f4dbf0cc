package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tsoagent/routes"
)

// No round is made for routes that nothing is near, whatever happens to them, and one for each that something is near.
func TestNoRoundForRoutesThatNothingIsNear(t *testing.T) {
	w := partWorld(t, Config{})
	w.addRoute("198.51.100.0/24", hop{oif: 2, gw: "192.0.2.10"})
	w.settle()
	before, events := w.a.stats.Rounds, w.a.stats.Events
	for i := range 20 {
		w.replaceRoute("198.51.100.0/24", hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 10+i%2)})
		w.settle()
	}
	w.deleteRoute("198.51.100.0/24")
	w.settle()
	if n := w.a.stats.Rounds - before; n > 0 {
		t.Errorf("%d rounds", n)
	}
	if n := w.a.stats.Events - events; n != 21 {
		t.Errorf("%d events are counted", n)
	}
	if n := w.a.Report().Counters.Events; n != w.a.stats.Events {
		t.Errorf("a report counts %d events of %d", n, w.a.stats.Events)
	}
	w.addRoute("10.3.9.0/24", hop{oif: 2, gw: "192.0.2.10"})
	w.settle()
	if n := w.count("put 10.3.9.0/24"); n != 1 {
		t.Errorf("a route below what is covered is cloned %d times", n)
	}
}

// What is due is done in time although nothing but routes that nothing is near comes.
func TestTimersGoOnWithoutRounds(t *testing.T) {
	w := partWorld(t, Config{})
	w.xfrm(gone(partPolicy))
	w.settle()
	for i := 0; w.ownRules() != ""; i++ {
		if i > 600 {
			t.Fatal("the rule of a policy that is gone stays")
		}
		w.now = w.now.Add(time.Second)
		w.replaceRoute("198.51.100.0/24", hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 10+i%2)})
		w.settle()
	}
}

// That the host forwards now is seen within a second of such a route.
func TestForwardingIsSeenWithoutRounds(t *testing.T) {
	w := partWorld(t, Config{})
	name := filepath.Join(t.TempDir(), "ip_forward")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("0\n")
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	w.a.forwards = &forwarding{files: map[routes.Family]*os.File{routes.IPv4: file}}
	for i, text := range []string{"1\n", "0\n"} {
		write(text)
		w.now = w.now.Add(forwardsAgain)
		w.replaceRoute("198.51.100.0/24", hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 10+i%2)})
		w.settle()
		if got := w.a.st.forwarding[routes.IPv4]; got != (i == 0) {
			t.Errorf("ip_forward is %q, and it is thought to forward: %t", text, got)
		}
	}
}
