package agent

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
)

// copiesWorld has an IPv6 policy under the default route, and inside of it a route by two devices that can have no clone.
func copiesWorld(t *testing.T) *world {
	w := newWorld(t, Config{})
	w.addLink(&routes.Link{Index: 3, Name: "nic2", Type: 1, MTU: 1500, Up: true}, "fd00:3::1/64")
	w.addRoute("::/0", hop{oif: 2, gw: "fd00:2::9"})
	w.addRoute("fd03:7::/48", hop{oif: 2, gw: "fd00:2::8"}, metric(5))
	w.addRoute("fd03:7::/48", hop{oif: 3, gw: "fd00:3::8"}, metric(9))
	return w
}

func (w *world) table6() string {
	var out []string
	for r := range w.kernel.Table(routes.IPv6, 5450) {
		out = append(out, fmt.Sprintf("%s %s metric %d", r.Dst, show(r), r.Body.Priority))
	}
	return sortedLines(out)
}

func TestCopiesFollowTheirRoutes(t *testing.T) {
	w := copiesWorld(t)
	w.start(policy(17, "fd09::/64", "fd03::/16", 0), partSA)
	want := "fd03:7::/48 throw metric 1\nfd03:7::/48 via fd00:2::8 dev 2 metric 131072\nfd03::/16 via fd00:2::9 dev 2 mtu lock 1446 metric 1446"
	if got := w.table6(); got != want {
		t.Errorf("table 5450 has\n%s\nwant\n%s", got, want)
	}
	copies := 0
	for _, c := range w.a.Report().Clones {
		if c.Copy {
			copies++
			if c.Dst != "fd03:7::/48" || c.Throw || c.MTU != 0 || c.State != StateInPlace || len(c.Because) > 0 {
				t.Errorf("the report has the copy as %+v", c)
			}
		}
	}
	if copies != 1 {
		t.Errorf("the report has %d copies", copies)
	}
	w.took()
	w.settle()
	if ops := w.took(); len(ops) > 0 {
		t.Errorf("nothing has changed, and it wrote %q", ops)
	}
	for i := range 2 * fightWrites { // however often its owner changes it
		gw := fmt.Sprintf("fd00:2::%d", 20+i)
		w.replaceRoute("fd03:7::/48", hop{oif: 2, gw: gw}, metric(5))
		w.settle()
		want = "fd03:7::/48 throw metric 1\nfd03:7::/48 via " + gw + " dev 2 metric 131072\nfd03::/16 via fd00:2::9 dev 2 mtu lock 1446 metric 1446"
		if got := w.table6(); got != want {
			t.Fatalf("after a change table 5450 has\n%s\nwant\n%s", got, want)
		}
	}
	w.deleteRoute("fd03:7::/48")
	w.settle()
	// The one that is left has another device, and a clone for those that are not bound.
	want = "fd03:7::/48 via fd00:3::8 dev 3 mtu lock 1446 metric 1446\nfd03::/16 via fd00:2::9 dev 2 mtu lock 1446 metric 1446"
	if got := w.table6(); got != want {
		t.Errorf("once its route is gone, table 5450 has\n%s\nwant\n%s", got, want)
	}
}

// Without a copy a packet could go another way.
func TestNoLockWhereACopyIsRefused(t *testing.T) {
	w := copiesWorld(t)
	w.copyErr = fmt.Errorf("fake: %w", unix.ENETDOWN)
	w.start(policy(17, "fd09::/64", "fd03::/16", 0), partSA)
	if got := w.ownRules(); got != "" {
		t.Errorf("our rules are %q", got)
	}
	if r := w.a.Report(); len(r.Findings) == 0 {
		t.Error("the report does not say that the lock was withdrawn")
	}
}
