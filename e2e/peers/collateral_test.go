package peers

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// servicePort is that of the plain service in the hub.
const servicePort = 5001

// serve opens the plain service in the hub, one listener for both families as most programs have it, and a connection to it from a
// neighbour for each family. It returns their addresses at the neighbour.
func (l *lab) serve(from string) []netip.AddrPort {
	l.t.Helper()
	must := func(err error) {
		l.t.Helper()
		if err != nil {
			l.t.Fatal(err)
		}
	}
	keep := func(c io.Closer) { l.t.Cleanup(func() { c.Close() }) }
	var listener net.Listener
	must(l.do("hub", func() (err error) {
		listener, err = net.Listen("tcp", ":"+strconv.Itoa(servicePort))
		return err
	}))
	keep(listener)
	var clients []netip.AddrPort
	for _, family := range []int{4, 6} {
		must(l.do(from, func() error {
			dialer := net.Dialer{Timeout: 10 * time.Second}
			c, err := dialer.Dial("tcp", netip.AddrPortFrom(l.local(from, family), servicePort).String())
			if err != nil {
				return err
			}
			keep(c)
			clients = append(clients, c.LocalAddr().(*net.TCPAddr).AddrPort())
			return nil
		}))
		c, err := listener.Accept()
		must(err)
		keep(c)
	}
	return clients
}

// truth is what is expected of a connection.
type truth struct {
	Coverage, Segmentation string
	Lost                   bool
	Listener               string
}

// truths are the connections of the agent's namespace, by the other end.
func (a *agent) truths() (map[string]truth, error) {
	var got flows
	if err := a.ask(&got, "flows"); err != nil {
		return nil, err
	}
	all := map[string]truth{}
	for _, f := range got.Flows {
		remote, err := netip.ParseAddrPort(f.Remote)
		if err != nil {
			return nil, err
		}
		all[remote.Addr().Unmap().String()] = truth{f.Coverage, f.Segmentation, f.Lost, f.Listener}
	}
	return all, nil
}

var (
	isSigned = truth{Coverage: "key", Segmentation: "none"}
	isPlain  = truth{Coverage: "none", Segmentation: "offload"}
)

// isLost is the truth of an unsigned connection that a listener with keys accepted.
func isLost(listener string) truth {
	return truth{Coverage: "none", Segmentation: "none", Lost: true, Listener: listener}
}

// TestUnsignedNeighbourIsCollateral is the half that Linux gets wrong, with each daemon as the one that listens: the neighbour without a
// password loses offload if it connects to the listener with keys, and only then; a service on another port doesn't.
func TestUnsignedNeighbourIsCollateral(t *testing.T) {
	needTruth(t)
	need(t, map[string]string{"ip": "iproute2"})
	need(t, birdPackage)
	needGoBGP(t)
	for _, test := range hubs {
		t.Run(test.name, func(t *testing.T) {
			n := newNetwork(t)
			// Who opens a session is left to chance where both may; here the signed neighbours do.
			for i := range n.hub.sessions {
				n.hub.sessions[i].passive = n.hub.sessions[i].remote != n.called
			}
			d := test.start(t, n)
			n.run(d)
			clients := n.serve("plain")
			a := n.startAgent("hub")

			keys := n.keys(test.learnt)
			a.awaitListenerKeys("the keys of "+test.name, append(append([]netip.Prefix{}, keys[4]...), keys[6]...)...)
			var got flows
			if err := a.ask(&got, "flows", "--processes"); err != nil {
				t.Fatal(err)
			}
			if !got.Live || len(got.Notes) > 0 {
				t.Errorf("live %v, notes %q; want the agent's own answer, without any", got.Live, got.Notes)
			}
			n.checkTruth(got.Flows, clients)
			n.checkCollateral(got.Collateral, owner{d.pid(), test.program}, len(keys[4]), len(keys[6]))
			n.checkLost(a)
			n.checkDoctor(a, test.program)
		})
	}
}

// checkTruth compares the hub's connections, by the other end.
func (n *network) checkTruth(all []flow, clients []netip.AddrPort) {
	n.t.Helper()
	want := map[string]truth{n.called.String(): isPlain, "the service": isPlain}
	for _, a := range n.signed {
		want[a.String()] = isSigned
	}
	for _, a := range n.plain {
		want[a.String()] = isLost(anyAddress(a))
	}
	got := map[string]truth{}
	served := 0
	for _, f := range all {
		remote, err := netip.ParseAddrPort(f.Remote)
		if err != nil {
			n.t.Fatalf("remote %q: %v", f.Remote, err)
		}
		name := remote.Addr().Unmap().String()
		if slices.Contains(clients, netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())) {
			name = "the service"
			served++
		}
		got[name] = truth{f.Coverage, f.Segmentation, f.Lost, f.Listener}
		if f.Contradiction != "" {
			n.t.Errorf("%s: a contradiction: %s", name, f.Contradiction)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		n.t.Errorf("connections by neighbour (-want +got):\n%s", diff)
	}
	if served != len(clients) {
		n.t.Errorf("%d connections of the service, want %d", served, len(clients))
	}
}

// anyAddress is the listener for all addresses of a's family, on BGP's port.
func anyAddress(a netip.Addr) string {
	if a.Is4() {
		return "0.0.0.0:179"
	}
	return "[::]:179"
}

// checkCollateral compares the groups of connections that lost offload: one neighbour for each family.
func (n *network) checkCollateral(got []collateral, listens owner, keys4, keys6 int) {
	n.t.Helper()
	want := []collateral{
		{Listener: "0.0.0.0:179", Keys: keys4, Lost: 1, Signed: 3, Processes: []owner{listens}},
		{Listener: "[::]:179", Keys: keys6, Lost: 1, Signed: 2, Processes: []owner{listens}},
	}
	slices.SortFunc(got, func(a, b collateral) int { return strings.Compare(a.Listener, b.Listener) })
	if diff := cmp.Diff(want, got); diff != "" {
		n.t.Errorf("collateral (-want +got):\n%s", diff)
	}
}

// checkLost looks at what --lost leaves: the neighbours without a password that connected.
func (n *network) checkLost(a *agent) {
	n.t.Helper()
	var lost flows
	if err := a.ask(&lost, "flows", "--lost"); err != nil {
		n.t.Fatal(err)
	}
	var got []netip.Addr
	for _, f := range lost.Flows {
		got = append(got, netip.MustParseAddrPort(f.Remote).Addr())
	}
	slices.SortFunc(got, netip.Addr.Compare)
	if diff := cmp.Diff(n.plain, got, byValue); diff != "" {
		n.t.Errorf("flows --lost (-want +got):\n%s", diff)
	}
	if lost.Summary.Lost != len(n.plain) {
		n.t.Errorf("%d lost in the summary, want %d", lost.Summary.Lost, len(n.plain))
	}
}

// checkDoctor wants a finding for each listener that names it and the program.
func (n *network) checkDoctor(a *agent, program string) {
	n.t.Helper()
	var c checkup
	if err := a.ask(&c, "doctor"); err != nil {
		n.t.Fatal(err)
	}
	for _, neighbour := range n.plain {
		listener := anyAddress(neighbour)
		found := slices.ContainsFunc(c.Findings, func(f struct {
			Code string `json:"code"`
			Text string `json:"text"`
			Do   string `json:"do"`
		}) bool {
			return strings.Contains(f.Text, listener) && strings.Contains(f.Text, program) && strings.Contains(f.Do, "listener of their own")
		})
		if !found {
			n.t.Errorf("doctor has no finding for %s of %s: %+v", listener, program, c.Findings)
		}
	}
}

// TestKeysComeAndGo sets a password and takes it away while FRR runs: the session follows, and what the listener lost stays lost.
func TestKeysComeAndGo(t *testing.T) {
	needTruth(t)
	need(t, map[string]string{"ip": "iproute2"})
	need(t, frrPackage)
	p := newPair(t)
	// At first nobody has a password.
	hub := p.both()
	hub.sessions = hub.sessions[2:]
	d := p.startFRR("hub", hub)
	plain := []netip.Addr{p.remote("plain", 4), p.remote("plain", 6)}
	p.await(d, plain...)
	a := p.startAgent("hub")
	expect := func(what string, want map[string]truth) {
		t.Helper()
		p.eventually(what, func() error {
			have, err := a.truths()
			if err != nil {
				return err
			}
			if diff := cmp.Diff(want, have); diff != "" {
				return errors.New("connections by neighbour (-want +got):\n" + diff)
			}
			return nil
		})
	}
	want := map[string]truth{}
	for _, n := range plain {
		want[n.String()] = isPlain
	}
	expect("no key", want)
	a.awaitListenerKeys("no key")

	// The signed neighbour comes: its key takes offload from the listener, not from sessions that are up.
	for _, s := range p.signed.sessions {
		d.configure(fmt.Sprintf("neighbor %s remote-as %d", s.remote, s.as), fmt.Sprintf("neighbor %s passive", s.remote),
			fmt.Sprintf("neighbor %s password %s", s.remote, s.password))
		family := "ipv4"
		if s.remote.Is6() {
			family = "ipv6"
		}
		d.configure("address-family "+family+" unicast", " neighbor "+s.remote.String()+" activate")
		want[s.remote.String()] = isSigned
	}
	p.await(d, p.remote("signed", 4), p.remote("signed", 6))
	expect("a key is added", want)
	a.awaitListenerKeys("a key is added", single(p.remote("signed", 4)), single(p.remote("signed", 6)))

	// A new session of the other neighbour inherits the loss.
	for _, n := range plain {
		if _, err := d.vtysh("-c", "clear bgp "+n.String()); err != nil {
			t.Fatal(err)
		}
		want[n.String()] = isLost(anyAddress(n))
	}
	expect("a new session", want)

	// The keys go, and with them their sessions, which the other side goes on to sign: the listener, and who connects to it, have lost
	// offload for ever.
	for _, s := range p.signed.sessions {
		d.configure(fmt.Sprintf("no neighbor %s password", s.remote))
		delete(want, s.remote.String())
	}
	a.awaitListenerKeys("the keys are taken away")
	for _, n := range plain {
		if _, err := d.vtysh("-c", "clear bgp "+n.String()); err != nil {
			t.Fatal(err)
		}
	}
	expect("no key again", want)
	p.await(d, plain...)
}
