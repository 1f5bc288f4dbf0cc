package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tsoagent/agent/plan"
	"tsoagent/sockopt"
)

var (
	bgpKey = sockopt.Key{Kind: sockopt.MD5, Peer: netip.MustParsePrefix("192.0.2.2/32"), Port: 179, Listener: true, Owner: sockopt.Root}
	// bgpClient is on the other end's side of a session that this host opened.
	bgpClient = sockopt.Key{Kind: sockopt.MD5, Peer: netip.MustParsePrefix("192.0.2.2/32"), PeerPort: 179, Local: netip.MustParseAddr("192.0.2.1"), Owner: sockopt.Root}
)

const bgpMatch = "[src 0.0.0.0/0 dst 192.0.2.2/32 proto 6 sport 179]"

func (w *world) keys(ev ...sockopt.Event) {
	w.send(batch{keys: ev})
	w.settle()
}

func keysSet(keys ...sockopt.Key) sockopt.Event { return sockopt.KeysSet{Keys: keys} }

var errUnreadable = errors.New("no answer")

// TestKeyTakesALane makes a lane for what a key signs, and takes it away a second after the key.
func TestKeyTakesALane(t *testing.T) {
	w, _ := laneWorld(t, laneConfig())
	w.start()
	w.keys(keysSet(bgpKey))
	mustLaneOps(t, w, "journal put lane/2", "ensure lane nic1 "+bgpMatch)
	if l := mustLane(t, w, StateInPlace); !slices.Equal(l.Because, []string{bgpKey.String()}) {
		t.Errorf("%+v", l)
	}
	c := w.a.Report().Coverages[0]
	if c.Key != "tcp-md5" || c.Cut != "lane" || !slices.Contains(c.Held, "nic1 lane") || !c.Listener || c.Sport != 179 {
		t.Errorf("verdict: %+v", c)
	}
	w.advance(time.Hour)
	w.keys(keysSet(bgpKey))
	mustLaneOps(t, w)

	w.keys(keysSet())
	mustLaneOps(t, w)
	w.advance(time.Second)
	mustLaneOps(t, w, "remove lane 2", "journal remove lane/2")
}

// TestStaleKeysKeepTheLane gives nothing back because of keys that can't be read, neither of those
// that were known nor of those that an agent before has seen.
func TestStaleKeysKeepTheLane(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	w.start()
	w.keys(keysSet(bgpKey))
	w.took()
	w.keys(sockopt.Lost{Err: errUnreadable})
	w.advance(time.Hour)
	mustLaneOps(t, w)
	if r := w.a.Report(); !slices.Equal(r.Stale, []string{"sockopt"}) || !r.Degraded() {
		t.Errorf("stale: %q", r.Stale)
	}

	w.crash(laneConfig())
	w.a.lanes = f
	w.a.inbox.put(batch{keys: []sockopt.Event{sockopt.Lost{Err: errUnreadable}}})
	w.start()
	w.advance(time.Hour)
	mustLaneOps(t, w)
	w.keys(keysSet())
	w.advance(time.Second)
	mustLaneOps(t, w, "remove lane 2", "journal remove lane/2")
	if r := w.a.Report(); len(r.Stale) > 0 {
		t.Errorf("stale: %q", r.Stale)
	}
}

// TestStaleKeysKeepTheHold is the same of a hold.
func TestStaleKeysKeepTheHold(t *testing.T) {
	var cfg Config
	cfg.Plan.SharedNICs = plan.SharedOff
	w := newWorld(t, cfg)
	w.start()
	w.keys(keysSet(bgpKey))
	const held = "tx-tcp-segmentation"
	if h := w.hold(held); h.State != StateInPlace || h.Device != "nic1" || !slices.Equal(h.Because, []string{bgpKey.String()}) {
		t.Fatalf("%+v", h)
	}
	w.crash(cfg)
	w.a.inbox.put(batch{keys: []sockopt.Event{sockopt.Lost{Err: errUnreadable}}})
	w.start()
	w.took()
	w.advance(time.Hour)
	if got := w.took(); len(got) > 0 {
		t.Errorf("written: %q", got)
	}
	w.keys(keysSet())
	w.advance(time.Second)
	if r := w.a.Report(); len(r.Holds) > 0 {
		t.Errorf("holds: %+v", r.Holds)
	}
}

// TestKeyKeepsWhatAPolicyLetsGo takes no lane away whose policy is gone while a key needs it.
func TestKeyKeepsWhatAPolicyLetsGo(t *testing.T) {
	w, _ := laneWorld(t, laneConfig())
	w.start(partPolicy, partSA)
	w.keys(keysSet(bgpKey))
	w.took()
	w.xfrm(gone(partPolicy), saGone(partSA))
	w.settle()
	w.advance(time.Hour)
	mustLaneOps(t, w, "journal put lane/2", "ensure lane nic1 "+bgpMatch)
}

// TestRefusedLaneIsToldOfItsKey says in the verdict of a key why there is no lane for it.
func TestRefusedLaneIsToldOfItsKey(t *testing.T) {
	w, f := laneWorld(t, laneConfig())
	f.ensureErr = errors.New("it has an ingress qdisc")
	w.start()
	w.keys(keysSet(bgpKey, bgpClient))
	for _, c := range w.a.Report().Coverages {
		if c.Cut != "socket" || len(c.Held) > 0 || !strings.Contains(strings.Join(c.Notes, "\n"), "ingress qdisc") {
			t.Errorf("verdict: %+v", c)
		}
	}
}

// TestHiddenKeysAreTold names sockets whose keys the kernel can't show.
func TestHiddenKeysAreTold(t *testing.T) {
	w := newWorld(t, Config{})
	w.start()
	w.keys(sockopt.KeysSet{Hidden: 2})
	if r := w.a.Report(); len(r.Findings) != 1 || !strings.Contains(r.Findings[0], "2 of the sockets hold more TCP-MD5 keys than the kernel can show") {
		t.Errorf("findings: %q", r.Findings)
	}
}

// TestKeysThatAreLeftOutAreTold names what is not known of keys because there are too many of them.
func TestKeysThatAreLeftOutAreTold(t *testing.T) {
	for _, c := range []struct {
		set  sockopt.KeysSet
		want string
	}{
		{sockopt.KeysSet{Cut: 3}, "3 of the sockets hold more TCP-AO keys than are listed of one (300)"},
		{sockopt.KeysSet{Over: true}, "more than 65536 TCP keys of root and of users in tcp_keys_trust"},
		{sockopt.KeysSet{OverOthers: true}, "more than 8192 TCP keys of users who are not trusted"},
	} {
		w := newWorld(t, Config{})
		w.start()
		w.keys(c.set)
		if r := w.a.Report(); len(r.Findings) != 1 || !strings.Contains(r.Findings[0], c.want) || !r.Degraded() {
			t.Errorf("findings: %q, want %q; degraded: %t", r.Findings, c.want, r.Degraded())
		}
		w.keys(keysSet())
		if r := w.a.Report(); len(r.Findings) > 0 {
			t.Errorf("findings are left: %q", r.Findings)
		}
	}
}

// TestExplainSaysWhatIsSigned asks for flows to a peer with a key.
func TestExplainSaysWhatIsSigned(t *testing.T) {
	w := newWorld(t, Config{})
	w.start()
	w.keys(keysSet(bgpKey, bgpClient))
	peer := netip.MustParseAddr("192.0.2.2")
	const in, out = "TCP from port 179 is signed", "TCP to port 179 there is signed"
	for _, c := range []struct {
		q    Question
		want []string
	}{
		{Question{Dst: peer}, []string{out, in}},
		{Question{Dst: peer, Proto: 6, Port: 179}, []string{out, in}},
		{Question{Dst: peer, Proto: 6, Port: 443}, []string{in}},
		{Question{Dst: peer, Proto: 17, Port: 179}, nil},
		{Question{Dst: peer, From: netip.MustParseAddr("10.1.0.1")}, []string{in}},
		{Question{Dst: netip.MustParseAddr("192.0.2.3")}, nil},
	} {
		e, err := w.a.explain(c.q)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, n := range e.Notes {
			if said, _, ok := strings.Cut(n, " ("); ok && strings.Contains(n, "is signed") {
				got = append(got, said)
			}
		}
		if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(c.want))) {
			t.Errorf("%+v: %q, want %q", c.q, got, c.want)
		}
	}
}
