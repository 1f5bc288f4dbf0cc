package agent

import (
	"net/netip"
	"testing"

	"tsoagent/agent/plan"
	"tsoagent/routes"
)

// TestSourceIsKnownUntilItsWayCanChange holds what the kernel is asked with to what it depends on.
func TestSourceIsKnownUntilItsWayCanChange(t *testing.T) {
	link := &routes.Link{Index: 2, Name: "eth0", Type: 1, MTU: 1500, Up: true}
	own := routes.Addr{Ifindex: 2, Prefix: netip.MustParsePrefix("192.0.2.1/24")}
	route := func(dst string) routes.Event {
		return routes.RouteSet{Route: newRoute(t, dst, hop{oif: 2, gw: "192.0.2.254"})}
	}
	for _, c := range []struct {
		what  string
		ev    routes.Event
		known bool
	}{
		{"a clone", routes.RouteSet{Route: newRoute(t, "10.3.0.0/16", hop{oif: 2}, func(s *routeSpec) { s.table = 5450 })}, true},
		{"a route elsewhere", route("10.2.0.0/16"), true},
		{"an IPv6 default route", routes.RouteSet{Route: newRoute(t, "::/0", hop{oif: 2})}, true},
		{"a route to it", route("10.1.0.0/24"), false},
		{"a default route", route("0.0.0.0/0"), false},
		{"a route to it is gone", routes.RouteGone{Route: newRoute(t, "10.1.0.0/16", hop{oif: 2})}, false},
		{"a link", routes.LinkSet{Link: &routes.Link{Index: 3, Name: "eth1", Type: 1, MTU: 1500, Up: true}}, false},
		{"a link is gone", routes.LinkGone{Index: 2}, false},
		{"an address", routes.AddrSet{Addr: routes.Addr{Ifindex: 2, Prefix: netip.MustParsePrefix("10.1.0.1/24")}}, false},
		{"an address is gone", routes.AddrGone{Addr: own}, false},
		{"a rule", routes.RuleSet{Rule: &routes.Rule{Family: routes.IPv4, Priority: 100, Table: 100}}, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := newState(&plan.Config{})
			for _, ev := range []routes.Event{
				routes.ResyncBegin{}, routes.LinkSet{Link: link}, routes.AddrSet{Addr: own},
				routes.RouteSet{Route: newRoute(t, "10.1.0.0/16", hop{oif: 2})}, routes.ResyncEnd{},
			} {
				s.fib.Apply(ev)
			}
			s.sources[plan.ShapeID{}] = shapeSource{netip.MustParseAddr("10.1.0.1"), 2}
			s.fib.Apply(c.ev)
			if _, known := s.sources[plan.ShapeID{}]; known != c.known {
				t.Errorf("known %v, want %v", known, c.known)
			}
		})
	}
}
