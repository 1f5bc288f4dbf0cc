package netns_test

import (
	"errors"
	"strings"
	"testing"

	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
)

func TestIDsAreThoseOfIPNetns(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "netns add a\nnetns add b\n-n a netns set b 17")
	a, b := open(t, netns.Path("a")), open(t, netns.Path("b"))
	var ids *netns.IDs
	err := a.Do(func() (err error) {
		ids, err = netns.DialIDs()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ids.Close()
	if id, err := ids.Of(b); err != nil || id != 17 {
		t.Errorf("b is %d, %v; `ip netns list-id` says %s", id, err, strings.TrimSpace(netnstest.Show(t, "-n a netns list-id")))
	}
	if _, err := ids.Of(a); !errors.Is(err, netns.ErrNoID) {
		t.Errorf("a has no number for itself: %v", err)
	}
	netnstest.IP(t, "-n a link add x type veth peer name y\n-n a link set x netns b") // which asks for none: there is one
	if id, err := ids.Of(b); err != nil || id != 17 {
		t.Errorf("after a move b is %d, %v", id, err)
	}
}
