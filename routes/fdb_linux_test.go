package routes

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// vxlanNS is a namespace with a VXLAN device vx that has a remote, and a bridge of its own.
func vxlanNS(t *testing.T) *testNS {
	t.Helper()
	ns := vethNS(t)
	if out, err := tryIP("link add vx type vxlan id 1 local 10.0.0.1 remote 10.0.0.2 dstport 4789 dev a0"); err != nil {
		t.Skipf("needs VXLAN devices: %v %s", err, out)
	}
	if _, err := exec.LookPath("bridge"); err != nil {
		t.Skip("needs iproute2's bridge")
	}
	ip(t, "link set vx addrgenmode none\nlink set vx up")
	return ns
}

func bridgeFDB(t testing.TB, lines string) {
	t.Helper()
	if inHostNS() {
		panic("a test would change the host's namespace")
	}
	cmd := exec.Command("bridge", "-batch", "-")
	cmd.Stdin = strings.NewReader(lines)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("bridge: %v\n%s\n%s", err, lines, out)
	}
}

// others waits until the mirror says whether vx sends elsewhere too.
func (f *follower) others(want bool) {
	f.t.Helper()
	says := func(l *Link) bool { return l.Name == "vx" && l.Encap.Remote.IsValid() && l.Encap.Others == want }
	f.settle()
	if !slices.ContainsFunc(f.fib.Links(), says) {
		f.until(func(ev Event) bool {
			set, ok := ev.(LinkSet)
			return ok && says(set.Link)
		})
	}
}

// TestVXLANThatSendsElsewhereIsTold follows the forwarding database of a VXLAN device with a
// remote: what leads to another machine, or by another port or device, makes the difference.
func TestVXLANThatSendsElsewhereIsTold(t *testing.T) {
	vxlanNS(t)
	f := follow(t, WatchOptions{})
	f.others(false)
	for _, entry := range []string{
		"02:00:00:00:00:01 dev vx dst 10.0.0.3",
		"02:00:00:00:00:01 dev vx dst 10.0.0.2 port 4790",
		"02:00:00:00:00:01 dev vx dst 10.0.0.2 via b0",
		"00:00:00:00:00:00 dev vx dst 10.0.0.3",
	} {
		bridgeFDB(t, "fdb append "+entry)
		f.others(true)
		bridgeFDB(t, "fdb del "+entry)
		f.others(false)
	}
	for _, entry := range []string{"02:00:00:00:00:01 dev vx dst 10.0.0.2", "02:00:00:00:00:02 dev vx dst 10.0.0.2 vni 5"} {
		bridgeFDB(t, "fdb append "+entry)
		f.settle()
		f.others(false)
	}

	// What was there before is dumped, also when everything is read again.
	bridgeFDB(t, "fdb append 02:00:00:00:00:05 dev vx dst 10.0.0.3")
	f.others(true)
	ip(t, "link set vx mtu 1400") // an ordinary link event
	f.settle()
	f.others(true)
	f.w.Resync(Scope{})
	f.settle()
	f.others(true)
	g := follow(t, WatchOptions{})
	g.others(true)

	// A device whose remote changes is judged anew.
	ip(t, "link set vx type vxlan id 1 remote 10.0.0.3")
	bridgeFDB(t, "fdb del 02:00:00:00:00:01 dev vx dst 10.0.0.2\nfdb del 02:00:00:00:00:02 dev vx dst 10.0.0.2 vni 5")
	f.others(false)
	ip(t, "link del vx")
	f.settle()
}

// TestManyForwardingEntriesAreNotKept says Others for a fabric's device without remembering it
// all.
func TestManyForwardingEntriesAreNotKept(t *testing.T) {
	vxlanNS(t)
	f := follow(t, WatchOptions{})
	var b strings.Builder
	for i := range 2 * maxOthers {
		fmt.Fprintf(&b, "fdb append 02:00:00:00:%02x:%02x dev vx dst 10.0.0.3\n", i>>8, i&255)
	}
	bridgeFDB(t, b.String())
	f.others(true)
	bridgeFDB(t, strings.ReplaceAll(b.String(), "append", "del"))
	f.settle()
	f.w.Resync(Scope{})
	f.others(false)
}

// TestNeighboursDoNotWakeTheWatcher counts what comes through the filter: not a host's
// neighbours, nor what a bridge learns.
func TestNeighboursDoNotWakeTheWatcher(t *testing.T) {
	vxlanNS(t)
	ip(t, "link add name br0 type bridge\nlink set br0 addrgenmode none\nlink set a1 master br0\nlink set br0 up")
	f := follow(t, WatchOptions{})
	f.settle()
	before, seen := f.w.Stats().Messages, len(f.seen)
	var b strings.Builder
	for i := range 50 {
		fmt.Fprintf(&b, "neigh replace 10.0.1.%d nud stale lladdr 02:00:00:00:00:%02x dev b0\n", 10+i, i)
	}
	ip(t, b.String())
	bridgeFDB(t, "fdb add 02:00:00:00:00:aa dev a1 master static")
	ip(t, "neigh flush all")
	f.settle()
	// A device tells that it runs up to a second after it was set up (linkwatch), and its addresses follow.
	others := 0
	for _, ev := range f.seen[seen:] {
		switch ev.(type) {
		case LinkSet, AddrSet, RouteSet:
			others++
		}
	}
	if n := int(f.w.Stats().Messages - before); n > others {
		t.Errorf("%d messages were received, %d of them of links, addresses and routes", n, others)
	}
	bridgeFDB(t, "fdb append 02:00:00:00:00:01 dev vx dst 10.0.0.3")
	f.others(true)
}

func TestForwardingEntriesOfOthersAreNone(t *testing.T) {
	neigh := func(family, flags byte, attributes ...[]byte) []byte {
		h := make([]byte, ndmsgLen)
		h[0], h[4], h[ndmFlagsByte] = family, 7, flags
		return raw(h, attributes...)
	}
	for name, m := range map[string][]byte{
		"an IPv4 neighbour": neigh(byte(IPv4), 0, attr(ndaDst, 10, 0, 0, 1)),
		"a bridge's own":    neigh(afBridge, 0, attr(ndaLLAddr, 2, 0, 0, 0, 0, 1)),
	} {
		if _, ok, err := decodeFDB(Header{Type: rtmNewNeigh}, m); ok || err != nil {
			t.Errorf("%s: %t, %v", name, ok, err)
		}
	}
	e, ok, err := decodeFDB(Header{Type: rtmDelNeigh}, neigh(afBridge, ntfSelf, attr(ndaLLAddr, 2, 0, 0, 0, 0, 1), attr32(ndaNHID, 9)))
	if want := (fdbEntry{index: 7, gone: true, key: fdbKey{addr: "\x02\x00\x00\x00\x00\x01", nhid: 9}}); !ok || err != nil || e != want {
		t.Errorf("%+v, %t, %v; want %+v", e, ok, err, want)
	}
	for _, bad := range [][]byte{nil, neigh(afBridge, ntfSelf, attr(ndaDst, 1, 2, 3))} {
		if _, ok, err := decodeFDB(Header{Type: rtmNewNeigh}, bad); ok || err == nil {
			t.Errorf("%x: %t, %v", bad, ok, err)
		}
	}
}
