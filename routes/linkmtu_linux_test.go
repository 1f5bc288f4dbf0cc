package routes

import (
	"errors"
	"net"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSetLinkMTU(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	i := Ifindex(mustInterface(t, "a0"))
	show := func() string {
		t.Helper()
		out, err := exec.Command("ip", "-d", "-o", "link", "show", "dev", "a0").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	before := show()
	if err := tb.SetLinkMTU(i, 1446); err != nil {
		t.Fatal(err)
	}
	l, err := tb.ReadLink(i)
	if err != nil {
		t.Fatal(err)
	}
	if l.Name != "a0" || l.MTU != 1446 || l.MTU6 != 0 || l.Kind != "veth" {
		t.Errorf("read back %+v", l)
	}
	if got := show(); got != strings.Replace(before, "mtu 1500", "mtu 1446", 1) {
		t.Errorf("more than the MTU has changed:\n%s%s", before, got)
	}
	if err := tb.SetLinkMTU(i, 1500); err != nil {
		t.Fatal(err)
	}
	if got := show(); got != before {
		t.Errorf("not as before:\n%s%s", before, got)
	}
	if err := tb.SetLinkMTU(i, 10); !errors.Is(err, unix.EINVAL) {
		t.Errorf("an MTU that veth can't do: %v", err)
	}
	if err := tb.SetLinkMTU(9999, 1446); !errors.Is(err, unix.ENODEV) {
		t.Errorf("no such device: %v", err)
	}
	if _, err := tb.ReadLink(9999); !errors.Is(err, unix.ENODEV) {
		t.Errorf("no such device: %v", err)
	}
}

// TestLinkMTUChangesIPv6Metrics pins why a device whose IPv6 routes have an MTU of their own is
// left alone: with the lock bit it stays, without it is lowered, and raised past what it was.
func TestLinkMTUChangesIPv6Metrics(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	ip(t, `-6 route add 2001:db8:1::/48 via fd00:a::2 mtu 1480
-6 route add 2001:db8:2::/48 via fd00:a::2 mtu lock 1480`)
	i := Ifindex(mustInterface(t, "a0"))
	mtus := func() [2]uint32 {
		t.Helper()
		return [2]uint32{findOne(t, tb, "2001:db8:1::/48").Body.Metrics.MTU, findOne(t, tb, "2001:db8:2::/48").Body.Metrics.MTU}
	}
	for _, step := range []struct {
		set  int
		want [2]uint32
	}{{1446, [2]uint32{1446, 1480}}, {1500, [2]uint32{1500, 1480}}} {
		if err := tb.SetLinkMTU(i, step.set); err != nil {
			t.Fatal(err)
		}
		if got := mtus(); got != step.want {
			t.Errorf("at %d: %v, not %v", step.set, got, step.want)
		}
	}
	ip(t, `-6 route replace 2001:db8:1::/48 via fd00:a::2`)
	if got := mtus()[0]; got != 0 {
		t.Fatal(got)
	}
	for _, mtu := range []int{1446, 1500} {
		if err := tb.SetLinkMTU(i, mtu); err != nil {
			t.Fatal(err)
		}
		if got := mtus()[0]; got != 0 {
			t.Errorf("at %d: a route without an MTU has %d", mtu, got)
		}
	}
}

func mustInterface(t *testing.T, name string) int {
	t.Helper()
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return ifi.Index
}
