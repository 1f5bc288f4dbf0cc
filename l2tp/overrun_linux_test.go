package l2tp

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// How a session is made (linux/l2tp.h).
const (
	cmdSessionCreate  = 5
	attrPeerSessionID = 12
	pwEth             = 5
)

// TestKernelOverrunEndsExact loses notifications for certain: the kernel works off all requests of one message, and tells of each, before
// the reader's socket, which holds a few, can be read. What is told in the end is what is there.
func TestKernelOverrunEndsExact(t *testing.T) {
	inNS(t)
	sh(t, `ip l2tp add tunnel tunnel_id 1 peer_tunnel_id 101 encap ip local 10.0.0.1 remote 10.0.0.2
ip l2tp add tunnel tunnel_id 2 peer_tunnel_id 102 encap ip local fd00:a::1 remote fd00:a::2`)
	conn, err := netlink.Dial(unix.NETLINK_GENERIC, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	family, err := genetlink.NewConn(conn).GetFamily(familyName)
	if err != nil {
		t.Fatal(err)
	}
	w, next := watch(t)
	if got := next(); fmt.Sprint(got) != fmt.Sprint(SessionsSet{}) {
		t.Fatalf("%+v, want no sessions", got)
	}
	if err := w.group.SetReadBuffer(1); err != nil { // the kernel makes it the least that there is (SOCK_MIN_RCVBUF)
		t.Fatal(err)
	}
	const each = 60
	for round := range 3 {
		var msgs []netlink.Message
		for tunnel := range uint32(2) {
			for i := range uint32(each) {
				id := tunnel*1000 + uint32(round)*100 + i
				msgs = append(msgs, create(t, family, tunnel+1, id, fmt.Sprintf("s%d", id)))
			}
		}
		before := w.Stats().Overruns
		if _, err := conn.SendMessages(msgs); err != nil {
			t.Fatal(err)
		}
		want := (round + 1) * 2 * each
		for len(next().(SessionsSet).Sessions) != want { // fails when no more comes
		}
		if out, err := exec.Command("ip", "l2tp", "show", "session").Output(); err != nil || strings.Count(string(out), "Session ") != want {
			t.Fatalf("the kernel has %d sessions, want %d: %v", strings.Count(string(out), "Session "), want, err)
		}
		if w.Stats().Overruns == before {
			t.Errorf("nothing was lost: %+v", w.Stats())
		}
	}
}

func create(t *testing.T, f genetlink.Family, tunnel, id uint32, name string) netlink.Message {
	t.Helper()
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrConnID, tunnel)
	ae.Uint32(attrSessionID, id)
	ae.Uint32(attrPeerSessionID, id)
	ae.Uint16(attrPWType, pwEth)
	ae.String(attrIfname, name)
	data, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	m := genetlink.Message{Header: genetlink.Header{Command: cmdSessionCreate, Version: version}, Data: data}
	b, err := m.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(f.ID), Flags: netlink.Request}, Data: b}
}
