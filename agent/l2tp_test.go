package agent

import (
	"net/netip"
	"slices"
	"testing"

	"tsoagent/l2tp"
	"tsoagent/routes"
)

func TestL2TPDevicesAreFoundThroughARename(t *testing.T) {
	fib := routes.NewFIB()
	link := func(i routes.Ifindex, name, kind string) {
		fib.Apply(routes.LinkSet{Link: &routes.Link{Index: i, Name: name, Kind: kind, Type: arphrdEther, MTU: 1446}})
	}
	session := func(id uint32, name string) l2tp.Session {
		return l2tp.Session{Tunnel: 1, ID: id, Ifname: name, UDP: true, Remote: netip.MustParseAddr("10.0.0.2"), Sport: 5000, Dport: 6000, Header: 54}
	}
	var d l2tpDevices
	want := func(step string, indexes ...routes.Ifindex) {
		t.Helper()
		var got []routes.Ifindex
		for i, e := range d.encaps(fib) {
			got = append(got, i)
			if want := (routes.Encap{
				Family: routes.IPv4, Proto: 17, Remote: netip.MustParseAddr("10.0.0.2"), AnyMark: true, Header: 54,
				Sport: routes.PortRange{Lo: 5000, Hi: 5000}, Dport: routes.PortRange{Lo: 6000, Hi: 6000},
			}); e != want {
				t.Errorf("%s: %+v, want\n%+v", step, e, want)
			}
		}
		if slices.Sort(got); !slices.Equal(got, indexes) {
			t.Errorf("%s: devices %v, want %v", step, got, indexes)
		}
	}
	want("nothing")
	d.set([]l2tp.Session{session(1, "l2tpeth0")})
	want("a session before its link")
	link(7, "l2tpeth0", "")
	want("the link", 7)
	link(7, "wan", "")
	want("renamed", 7)
	link(8, "l2tpeth0", "dummy")
	d.set([]l2tp.Session{session(1, "l2tpeth0"), session(2, "l2tpeth0")})
	want("a device of another kind has the name", 7)
	link(8, "dummy0", "dummy")
	link(9, "l2tpeth0", "")
	want("a second session has the name", 7, 9)
	d.gone(7)
	fib.Apply(routes.LinkGone{Index: 7})
	want("the first one's device left", 9)
	d.set([]l2tp.Session{session(2, "l2tpeth0")})
	want("its session too", 9)

	// An agent that starts after a rename can't tell them apart.
	d = l2tpDevices{}
	d.set([]l2tp.Session{session(1, "l2tpeth0"), session(2, "l2tpeth0")})
	want("two sessions claim the name")
	d.set([]l2tp.Session{session(2, "l2tpeth0")})
	want("one", 9)
	over := l2tp.Session{Tunnel: 2, ID: 1, Ifname: "x", Remote: netip.MustParseAddr("fd00::2"), Header: 62}
	if e := encapOf(over); e.Family != routes.IPv6 || e.Proto != 115 || e.Dport != (routes.PortRange{}) {
		t.Errorf("over IP: %+v", e)
	}
}
