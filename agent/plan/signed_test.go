package plan

import (
	"net/netip"
	"slices"
	"strconv"
	"testing"

	"tsoagent/ethtool"
	"tsoagent/lane"
	"tsoagent/routes"
	"tsoagent/sockopt"
)

// key stale | PEER [listener PORT] [port PORT] [to PORT] [local ADDR] [dev NAME] [user UID|unknown]: a TCP-MD5 key of a
// listener, of a connection that was accepted on a port, or of a client to a port; of root's unless told.
func (w *world) key(f *words) error {
	if f.is("stale") {
		w.keysStale = true
		return f.end()
	}
	k := sockopt.Key{Kind: sockopt.MD5, Peer: f.prefix(), Owner: sockopt.Root}
	for f.more() {
		switch s := f.next(); s {
		case "listener":
			k.Listener, k.Port = true, uint16(f.num())
		case "port":
			k.Port = uint16(f.num())
		case "to":
			k.PeerPort = uint16(f.num())
		case "local":
			k.Local = f.addr()
		case "user":
			k.Owner = sockopt.Owner{}
			if n, err := strconv.ParseUint(f.next(), 10, 32); err == nil {
				k.Owner = sockopt.Owner{UID: uint32(n), Known: true}
			}
		case "dev":
			k.Ifindex = int32(w.dev(f))
		default:
			f.fail("unknown setting %q", s)
		}
	}
	w.keys = append(w.keys, k)
	return f.end()
}

const signedWorld = `
link 1 lo mtu 65536
link 2 eth0
link 3 eth1
route 192.0.2.0/24 dev eth0 proto kernel
route 198.51.100.0/24 dev eth1 proto kernel
route 0.0.0.0/0 via 192.0.2.254 dev eth0
config shared_nics off
held eth0 tx-tcp-segmentation
features eth0 tx-tcp-segmentation off
`

// TestStaleKeysGiveNothingBack keeps what may be held because of keys that can't be read, and only
// that.
func TestStaleKeysGiveNothingBack(t *testing.T) {
	for _, c := range []struct {
		name, more string
		back       bool
	}{
		{"fresh", "", true},
		{"stale", "key stale", false},
		{"stale, on a NIC that is kept", "key stale\nconfig shared_device eth0 keep", true},
		{"stale, and nothing is shared", "key stale\nconfig shared_nics keep", true},
	} {
		w, err := newWorld(signedWorld + c.more)
		if err != nil {
			t.Fatal(err)
		}
		in := w.input()
		s := Diff(in, Make(in), w.held)
		if back := slices.Contains(s.Unholds, HoldKey{2, ethtool.TCPSegmentation}); back != c.back {
			t.Errorf("%s: given back: %t, want %t", c.name, back, c.back)
		}
	}
}

// TestSignedMatches compares the packets that a lane takes for a key with those that the key's
// sockets send.
func TestSignedMatches(t *testing.T) {
	prefix := netip.MustParsePrefix
	for _, c := range []struct {
		key  sockopt.Key
		want lane.Match
	}{
		{
			sockopt.Key{Peer: prefix("192.0.2.0/24"), Port: 179, Listener: true},
			lane.Match{Src: prefix("0.0.0.0/0"), Dst: prefix("192.0.2.0/24"), Proto: 6, Sport: 179},
		},
		{
			sockopt.Key{Peer: prefix("192.0.2.9/32"), PeerPort: 179, Local: netip.MustParseAddr("192.0.2.1")},
			lane.Match{Src: prefix("192.0.2.1/32"), Dst: prefix("192.0.2.9/32"), Proto: 6, Dport: 179},
		},
		{
			sockopt.Key{Peer: prefix("2001:db8::/32"), Port: 179, Listener: true},
			lane.Match{Src: prefix("::/0"), Dst: prefix("2001:db8::/32"), Proto: 6, Sport: 179},
		},
	} {
		if got := signedMatch(c.key); got != c.want {
			t.Errorf("%s: %s, want %s", c.key, got, c.want)
		}
	}
}

// TestRulesThatChooseByPort lets a key's packets leave where a rule for their ports leads them.
func TestRulesThatChooseByPort(t *testing.T) {
	w, err := newWorld(signedWorld + `
rule 100 ipproto 6 dport 179 lookup 100
route 0.0.0.0/0 via 198.51.100.254 dev eth1 table 100
key 203.0.113.9 to 179`)
	if err != nil {
		t.Fatal(err)
	}
	pl := Make(w.input())
	on := map[routes.Ifindex]bool{}
	for _, h := range pl.Holds {
		on[routes.Ifindex(h.Device.Index)] = true
	}
	if !on[3] || on[2] {
		t.Errorf("holds on %v, want eth1 alone: %+v", on, pl.Holds)
	}
}
