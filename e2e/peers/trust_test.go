package peers

import (
	"fmt"
	"net/netip"
	"os/user"
	"strconv"
	"strings"
	"testing"
)

// TestPackagedDaemonsAreTrusted runs FRR and BIRD as the users that Debian's packages give them. Their sockets show as those users', whose keys
// take TSO from a NIC by default where `shared_nics: off` asks for that. With `tcp_keys_trust: [root]` they don't, and the verdict says what to
// configure.
func TestPackagedDaemonsAreTrusted(t *testing.T) {
	need(t, map[string]string{"ip": "iproute2"})
	need(t, birdPackage)
	need(t, frrPackage)
	l := newLab(t, "trusted", "strict")
	frr := speaker{as: hubAS, id: netip.MustParseAddr("10.99.0.1"), packaged: true}
	for i, peer := range l.peers {
		as := hubAS + 1 + uint32(i)
		other := speaker{as: as, id: l.remote(peer, 4), packaged: true}
		for _, family := range []int{4, 6} {
			here, there, password := l.local(peer, family), l.remote(peer, family), l.password()
			frr.sessions = append(frr.sessions, session{local: here, remote: there, as: as, password: password})
			other.sessions = append(other.sessions, session{local: there, remote: here, as: hubAS, password: password})
		}
		l.startBIRD(peer, other)
	}
	hub := l.startFRR("hub", frr)
	for _, peer := range l.peers {
		l.await(hub, l.remote(peer, 4), l.remote(peer, 6))
	}
	for _, test := range []struct {
		ns, user, trust string
		peers           []netip.Addr
		cut             string
	}{
		{"hub", "frr", "", []netip.Addr{l.remote("trusted", 4), l.remote("trusted", 6), l.remote("strict", 4), l.remote("strict", 6)}, "nic"},
		{"trusted", "bird", "", []netip.Addr{l.local("trusted", 4), l.local("trusted", 6)}, "nic"},
		{"strict", "bird", "tcp_keys_trust: [root]", []netip.Addr{l.local("strict", 4), l.local("strict", 6)}, "socket"},
	} {
		u, err := user.Lookup(test.user)
		if err != nil {
			t.Fatal(err)
		}
		uid, err := strconv.Atoi(u.Uid)
		if err != nil {
			t.Fatal(err)
		}
		a := l.startAgent(test.ns, "shared_nics: off", test.trust)
		l.eventually(fmt.Sprintf("verdicts on the keys of %s in %s", test.user, test.ns), func() error {
			var got struct {
				Coverages []verdict `json:"coverages"`
			}
			if err := a.ask(&got, "plan"); err != nil {
				return err
			}
			missing := map[string]bool{}
			for _, p := range test.peers {
				missing[single(p).String()] = true
			}
			for _, v := range got.Coverages {
				notes := strings.Join(v.Notes, "\n")
				switch {
				case v.UID == nil || *v.UID != uid:
					return fmt.Errorf("the key for %s isn't %s's: %+v", v.Dst, test.user, v)
				case v.Cut != test.cut:
					return fmt.Errorf("the key for %s: cut at the %s, not at the %s: %s", v.Dst, v.Cut, test.cut, notes)
				case test.cut == "socket" && !strings.Contains(notes, fmt.Sprintf("add %d, or its name, to tcp_keys_trust", uid)):
					return fmt.Errorf("the key for %s: nothing says what to configure: %s", v.Dst, notes)
				}
				delete(missing, v.Dst)
			}
			if len(missing) > 0 {
				return fmt.Errorf("no verdict on keys for %v", missing)
			}
			return nil
		})
	}
}
