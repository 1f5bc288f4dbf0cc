package peers

import (
	"fmt"
	"net/netip"
	"testing"
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
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	p := newPair(t)
	hub := p.both()
	for i := range hub.sessions {
		hub.sessions[i].bird = "strict bind;"
	}
	d := p.startBIRD("hub", hub)
	p.await(d, p.remote("signed", 4), p.remote("signed", 6), p.remote("plain", 4), p.remote("plain", 6))
	p.checkListeners("bird", p.wantOwn())
}

// TestSecondFRRHasListenersOfItsOwn is the advice for FRR: another bgpd for one kind of neighbours, each bound to addresses of its own.
func TestSecondFRRHasListenersOfItsOwn(t *testing.T) {
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	need(t, frrPackage)
	p := newPair(t)
	listen := func(name string) []string {
		return []string{"--listenon", p.local(name, 4).String(), "--listenon", p.local(name, 6).String()}
	}
	signed := p.startFRR("hub", p.signed, listen("signed")...)
	plain := p.startFRR("hub", p.plain, listen("plain")...)
	p.await(signed, p.remote("signed", 4), p.remote("signed", 6))
	p.await(plain, p.remote("plain", 4), p.remote("plain", 6))
	p.checkListeners("bgpd", p.wantOwn())
}

// TestFRRKeysOneListenerOfAFamily is why one bgpd with several addresses is no advice: of the listeners of a family only that has keys whose
// address is the first by its text, whichever the neighbours come to. (8.4.4; it would be the signed ones' here.)
func TestFRRKeysOneListenerOfAFamily(t *testing.T) {
	need(t, map[string]string{"ip": "iproute2", "ss": "iproute2"})
	need(t, frrPackage)
	p := newPair(t)
	hub := p.both()
	var listen []string
	// The neighbour with a password is now the one at the later address.
	for i := range 2 {
		hub.sessions[i].password, hub.sessions[i+2].password = "", hub.sessions[i].password
		listen = append(listen, "--listenon", hub.sessions[i+2].local.String(), "--listenon", hub.sessions[i].local.String())
	}
	d := p.startFRR("hub", hub, listen...)
	want := map[string][]netip.Prefix{}
	for i := range 2 {
		want[bracketed(hub.sessions[i].local)] = []netip.Prefix{single(hub.sessions[i+2].remote)}
		want[bracketed(hub.sessions[i+2].local)] = nil
	}
	p.eventually("bgpd answers", func() error { _, err := d.established(); return err })
	p.checkListeners("bgpd", want)
}
