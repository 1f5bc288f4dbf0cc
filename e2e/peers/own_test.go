package peers

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// pair is a hub with a signed neighbour and one without a password, both BIRD with both families. Both connect to the hub.
type pair struct {
	*lab
	signed, plain speaker // of the hub
}

func newPair(t *testing.T) *pair {
	t.Helper()
	need(t, birdPackage)
	p := &pair{lab: newLab(t, "signed", "plain")}
	p.signed = speaker{as: hubAS, id: netip.MustParseAddr("10.99.0.1")}
	p.plain = speaker{as: hubAS, id: netip.MustParseAddr("10.99.0.2")}
	for i, name := range p.peers {
		other := speaker{as: hubAS + 1 + uint32(i), id: p.remote(name, 4)}
		here := []*speaker{&p.signed, &p.plain}[i]
		for _, family := range []int{4, 6} {
			s := session{local: p.local(name, family), remote: p.remote(name, family), as: other.as, passive: true}
			if name == "signed" {
				s.password = p.password()
			}
			here.sessions = append(here.sessions, s)
			other.sessions = append(other.sessions, session{local: s.remote, remote: s.local, as: hubAS, password: s.password})
		}
		p.startBIRD(name, other)
	}
	return p
}

// both is a hub with all neighbours.
func (p *pair) both() speaker {
	s := p.signed
	s.sessions = append(s.sessions[:len(s.sessions):len(s.sessions)], p.plain.sessions...)
	return s
}

// bracketed is an address as ss shows it.
func bracketed(a netip.Addr) string {
	if a.Is4() {
		return a.String()
	}
	return fmt.Sprintf("[%s]", a)
}

// wantOwn are the listeners at the pair's addresses, keys only at those for the signed neighbour.
func (p *pair) wantOwn() map[string][]netip.Prefix {
	want := map[string][]netip.Prefix{}
	for _, family := range []int{4, 6} {
		want[bracketed(p.local("signed", family))] = []netip.Prefix{single(p.remote("signed", family))}
		want[bracketed(p.local("plain", family))] = nil
	}
	return want
}

// TestBIRDStrictBindGivesListenersOfTheirOwn is the advice for BIRD: `strict bind` in every protocol that uses the port.
func TestBIRDStrictBindGivesListenersOfTheirOwn(t *testing.T) {
	needTruth(t)
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	p := newPair(t)
	hub := p.both()
	for i := range hub.sessions {
		hub.sessions[i].bird = "strict bind;"
	}
	d := p.startBIRD("hub", hub)
	p.await(d, append(p.remotes("signed"), p.remotes("plain")...)...)
	p.checkListeners("bird", p.wantOwn())
	p.checkNothingLost()
}

// TestSecondDaemonHasListenersOfItsOwn is the advice for FRR and GoBGP: another one for one kind of neighbours, each bound to addresses of
// its own.
func TestSecondDaemonHasListenersOfItsOwn(t *testing.T) {
	needTruth(t)
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	for _, test := range []struct {
		name, program string
		start         func(*testing.T, *pair, speaker) daemon
	}{
		{"FRR", "bgpd", func(t *testing.T, p *pair, s speaker) daemon { need(t, frrPackage); return p.startFRR("hub", s) }},
		{"GoBGP", "gobgpd", func(t *testing.T, p *pair, s speaker) daemon { needGoBGP(t); return p.startGoBGP("hub", s) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPair(t)
			p.signed.listen = p.locals("signed")
			p.plain.listen = p.locals("plain")
			signed, plain := test.start(t, p, p.signed), test.start(t, p, p.plain)
			p.await(signed, p.remotes("signed")...)
			p.await(plain, p.remotes("plain")...)
			p.checkListeners(test.program, p.wantOwn())
			p.checkNothingLost()
		})
	}
}

// TestNeighbourThatWeCallKeepsOffload is the advice for one listener: a rule drops what the neighbour without a password opens, so that we
// open the session, whose socket is none of the listener's.
func TestNeighbourThatWeCallKeepsOffload(t *testing.T) {
	needTruth(t)
	need(t, map[string]string{"ip": "iproute2", "nft": "nftables"})
	need(t, frrPackage)
	p := newPair(t)
	hub := p.both()
	for i := range hub.sessions {
		hub.sessions[i].passive = hub.sessions[i].password != ""
	}
	rules := "table inet bgp {\nchain input {\ntype filter hook input priority filter;\n"
	for i, a := range p.remotes("plain") {
		rules += fmt.Sprintf("%s saddr %s tcp dport 179 tcp flags syn / syn,ack drop\n", []string{"ip", "ip6"}[i], a)
	}
	nft := p.in("hub", "nft", "-f", "-")
	nft.Stdin = strings.NewReader(rules + "}\n}\n")
	if _, err := output(nft); err != nil {
		t.Fatal(err)
	}
	d := p.startFRR("hub", hub)
	p.await(d, append(p.remotes("signed"), p.remotes("plain")...)...)
	p.checkNothingLost()
}

// TestFRRKeysOneListenerOfAFamily is why one bgpd with several addresses is no advice: of the listeners of a family only that has keys whose
// address is the first by its text, whichever the neighbours come to (8.4.4).
func TestFRRKeysOneListenerOfAFamily(t *testing.T) {
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	need(t, frrPackage)
	p := newPair(t)
	hub := p.both()
	// The neighbour with a password is now the one at the later address.
	for i := range 2 {
		hub.sessions[i].password, hub.sessions[i+2].password = "", hub.sessions[i].password
	}
	hub.listen = append(p.locals("plain"), p.locals("signed")...)
	d := p.startFRR("hub", hub)
	want := map[string][]netip.Prefix{}
	for i := range 2 {
		want[bracketed(hub.sessions[i].local)] = []netip.Prefix{single(hub.sessions[i+2].remote)}
		want[bracketed(hub.sessions[i+2].local)] = nil
	}
	p.eventually("bgpd answers", func() error { _, err := d.established(); return err })
	p.checkListeners("bgpd", want)
}

// TestGoBGPKeysAllListenersOfAFamily is why several addresses are no advice for GoBGP: it sets each key on all listeners of the family.
func TestGoBGPKeysAllListenersOfAFamily(t *testing.T) {
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	needGoBGP(t)
	p := newPair(t)
	hub := p.both()
	hub.listen = append(p.locals("plain"), p.locals("signed")...)
	d := p.startGoBGP("hub", hub)
	p.await(d, append(p.remotes("signed"), p.remotes("plain")...)...)
	want := p.wantOwn()
	for _, family := range []int{4, 6} {
		want[bracketed(p.local("plain", family))] = want[bracketed(p.local("signed", family))]
	}
	p.checkListeners("gobgpd", want)
}

// locals are the hub's addresses towards a peer, remotes the peer's.
func (l *lab) locals(peer string) []netip.Addr {
	return []netip.Addr{l.local(peer, 4), l.local(peer, 6)}
}
func (l *lab) remotes(peer string) []netip.Addr {
	return []netip.Addr{l.remote(peer, 4), l.remote(peer, 6)}
}

// checkNothingLost asks an agent in the hub: the signed sessions have no offload, the others have theirs.
func (p *pair) checkNothingLost() {
	p.t.Helper()
	want := map[string]truth{}
	for i, a := range append(p.remotes("signed"), p.remotes("plain")...) {
		want[a.String()] = []truth{isSigned, isSigned, isPlain, isPlain}[i]
	}
	got, err := p.startAgent("hub").truths()
	if err != nil {
		p.t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		p.t.Errorf("connections by neighbour (-want +got):\n%s", diff)
	}
}
