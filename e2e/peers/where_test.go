package peers

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// hubAS and the peers' numbers are private ones (RFC 6996).
const hubAS = 65000

// network is a hub with all kinds of neighbours, and what the hub is told of them:
//
//	bird   BIRD with a password for IPv4 and another one for IPv6
//	gobgp  GoBGP with a password, IPv4
//	range  BIRD with a password that the hub has for the whole prefix, both families
//	plain  BIRD without a password, both families; it connects to the hub
//	called GoBGP without a password, IPv4; the hub connects to it
type network struct {
	*lab
	hub       speaker
	signed    []netip.Addr // neighbours with a password
	plain     []netip.Addr
	called    netip.Addr
	neighbour map[string]speaker
}

// newNetwork makes the namespaces. Nothing runs yet.
func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{lab: newLab(t, "bird", "gobgp", "range", "plain", "called"), neighbour: map[string]speaker{}}
	n.hub = speaker{as: hubAS, id: netip.MustParseAddr("10.99.0.1")}
	for i, name := range n.peers {
		other := speaker{as: hubAS + 1 + uint32(i), id: n.remote(name, 4)}
		for _, family := range []int{4, 6} {
			if family == 6 && (name == "gobgp" || name == "called") {
				continue
			}
			here, there := n.local(name, family), n.remote(name, family)
			s := session{local: here, remote: there, as: other.as}
			switch name {
			case "range":
				s.password = n.password()
				n.hub.ranges = append(n.hub.ranges, listenRange{prefix: n.prefix(name, family), local: here, as: other.as, password: s.password})
			case "plain":
				s.passive = true
			case "called":
			default:
				s.password = n.password()
			}
			if name != "range" {
				n.hub.sessions = append(n.hub.sessions, s)
			}
			switch {
			case s.password != "":
				n.signed = append(n.signed, there)
			case name == "plain":
				n.plain = append(n.plain, there)
			default:
				n.called = there
			}
			other.sessions = append(other.sessions, session{local: there, remote: here, as: hubAS, password: s.password, passive: name == "called"})
		}
		n.neighbour[name] = other
	}
	return n
}

// run starts the neighbours and waits until the hub has all its sessions, those with a password signed.
func (n *network) run(hub daemon) {
	n.t.Helper()
	for name, s := range n.neighbour {
		if name == "gobgp" || name == "called" {
			n.startGoBGP(name, s)
		} else {
			n.startBIRD(name, s)
		}
	}
	n.await(hub, append(append([]netip.Addr{n.called}, n.signed...), n.plain...)...)
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// hubs are the daemons as the one that listens.
var hubs = []struct {
	name, program string
	start         func(*testing.T, *network) daemon
	// learnt says that the listener also has a key for each neighbour that came from a range.
	learnt bool
}{
	{"FRR", "bgpd", func(t *testing.T, n *network) daemon { need(t, frrPackage); return n.startFRR("hub", n.hub) }, true},
	{"BIRD", "bird", func(_ *testing.T, n *network) daemon { return n.startBIRD("hub", n.hub) }, false},
	{"GoBGP", "gobgpd", func(_ *testing.T, n *network) daemon { return n.startGoBGP("hub", n.hub) }, false},
}

// keys are those that the hub's listeners have, by family.
func (n *network) keys(learnt bool) map[int][]netip.Prefix {
	keys := map[int][]netip.Prefix{
		4: {single(n.remote("bird", 4)), single(n.remote("gobgp", 4)), n.prefix("range", 4)},
		6: {single(n.remote("bird", 6)), n.prefix("range", 6)},
	}
	if learnt {
		for family := range keys {
			keys[family] = append(keys[family], single(n.remote("range", family)))
		}
	}
	return keys
}

// TestDaemonsKeyTheirListeners shows of each daemon what docs/md5.md says of it: one listener for each family, never both in one, with the
// keys of all neighbours, those of ranges as prefixes; and a key on each signed connection.
func TestDaemonsKeyTheirListeners(t *testing.T) {
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	need(t, birdPackage)
	needGoBGP(t)
	for _, test := range hubs {
		t.Run(test.name, func(t *testing.T) {
			n := newNetwork(t)
			n.run(test.start(t, n))
			keys := n.keys(test.learnt)
			n.checkListeners(test.program, map[string][]netip.Prefix{"0.0.0.0": keys[4], "[::]": keys[6]})
			n.checkConnections(test.program)
		})
	}
}

// checkListeners fails unless a program's listeners for BGP in the hub are these, by address, with these keys.
func (l *lab) checkListeners(program string, want map[string][]netip.Prefix) {
	l.t.Helper()
	got, err := l.listenerKeys("hub", program)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, keys := range want {
		slices.SortFunc(keys, netip.Prefix.Compare)
	}
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		l.t.Errorf("the keys of the listeners (-want +got):\n%s", diff)
	}
}

// byValue lets cmp compare addresses, whose fields it can't see.
var byValue = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// checkConnections fails unless each signed session of the hub has its own neighbour's key and nobody else's, and the others none.
func (n *network) checkConnections(program string) {
	n.t.Helper()
	want := map[netip.Addr][]netip.Prefix{n.called: nil}
	for _, a := range n.signed {
		want[a] = []netip.Prefix{single(a)}
	}
	for _, a := range n.plain {
		want[a] = nil
	}
	sockets, err := n.sockets("hub", program)
	if err != nil {
		n.t.Fatal(err)
	}
	got := map[netip.Addr][]netip.Prefix{}
	for _, s := range sockets {
		if s.state != "ESTAB" {
			continue
		}
		remote, err := netip.ParseAddrPort(s.remote)
		if err != nil {
			n.t.Fatal(err)
		}
		got[remote.Addr()] = s.keys
	}
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		n.t.Errorf("the keys of the connections, by neighbour (-want +got):\n%s", diff)
	}
}
