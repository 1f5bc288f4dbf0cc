package l2tp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inNS moves the test into a network namespace of its own in the test kernel.
func inNS(t *testing.T) {
	t.Helper()
	if os.Getenv("TSOAGENT_TEST_KERNEL") != "1" {
		t.Skip("needs the test kernel (TSOAGENT_TEST_KERNEL=1) for L2TP")
	}
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	sh(t, `ip link set lo up
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
ip link add a0 type veth peer name a1
ip link set a0 up
ip link set a1 up
ip addr add 10.0.0.1/24 dev a0
ip addr add fd00:a::1/64 dev a0 nodad
ip addr add 10.0.0.9/24 dev a0`)
}

func sh(t testing.TB, script string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// watch runs a Watcher; next waits for the next event.
func watch(t *testing.T) (w *Watcher, next func() Event) {
	t.Helper()
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan Event, 64)
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(evs []Event) {
			for _, ev := range evs {
				events <- ev
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	return w, func() Event {
		t.Helper()
		select {
		case ev := <-events:
			return ev
		case <-time.After(20 * time.Second):
			t.Fatal("no event")
			return nil
		}
	}
}

// TestKernelSessions makes sessions of all sorts. The header is what the kernel takes off the
// device's MTU.
func TestKernelSessions(t *testing.T) {
	inNS(t)
	w, next := watch(t)
	if got := next(); fmt.Sprint(got) != fmt.Sprint(SessionsSet{}) {
		t.Fatalf("%+v, want no sessions", got)
	}
	v4, v6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00:a::1")
	r4, r6 := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00:a::2")
	var want []Session
	for i, tc := range []struct {
		tunnel, session string
		want            Session
	}{
		{"encap udp local 10.0.0.1 remote 10.0.0.2 udp_sport 5000 udp_dport 6000", "", Session{UDP: true, Local: v4, Remote: r4, Sport: 5000, Dport: 6000, Header: 54}},
		{"encap ip local 10.0.0.1 remote 10.0.0.2", "cookie 01020304", Session{Local: v4, Remote: r4, Header: 46}},
		{"encap udp local fd00:a::1 remote fd00:a::2 udp_sport 5001 udp_dport 6001", "cookie 0102030405060708", Session{UDP: true, Local: v6, Remote: r6, Sport: 5001, Dport: 6001, Header: 82}},
		{"encap ip local fd00:a::1 remote fd00:a::2", "", Session{Local: v6, Remote: r6, Header: 62}},
	} {
		id := uint32(i + 1)
		sh(t, fmt.Sprintf("ip l2tp add tunnel tunnel_id %d peer_tunnel_id %d %s\nip l2tp add session name s%d tunnel_id %d session_id %d peer_session_id %d %s",
			id, id+100, tc.tunnel, id, id, id+10, id+110, tc.session))
		tc.want.Ifname, tc.want.Tunnel, tc.want.ID = fmt.Sprintf("s%d", id), id, id+10
		want = append(want, tc.want)
		got, ok := next().(SessionsSet)
		if !ok || !slices.Equal(got.Sessions, want) {
			t.Errorf("%s: %+v, want\n%+v", tc.tunnel, got.Sessions, want)
		}
		dev, err := net.InterfaceByName(tc.want.Ifname)
		if err != nil {
			t.Fatal(err)
		}
		if dev.MTU != 1500-tc.want.Header {
			t.Errorf("%s: the kernel made its MTU %d; the header has %d", tc.tunnel, dev.MTU, tc.want.Header)
		}
	}

	// A rename is not followed by the kernel; the sessions of a tunnel go without a word of theirs.
	sh(t, "ip link set s1 down\nip link set s1 name wan\nip l2tp del tunnel tunnel_id 2")
	// Its session can outlive the notification (l2tp_tunnel_delete works later), and a look that finds
	// nothing new is no event.
	gone := make(chan struct{})
	var again sync.WaitGroup
	again.Go(func() {
		for {
			select {
			case <-gone:
				return
			case <-time.After(20 * time.Millisecond):
				w.Resync()
			}
		}
	})
	for !slices.Equal(next().(SessionsSet).Sessions, []Session{want[0], want[2], want[3]}) {
	}
	close(gone)
	again.Wait()
	// What another namespace does is no news here.
	dumps := w.Stats().Dumps
	sh(t, `ip netns add l2tp-other
trap 'ip netns del l2tp-other' EXIT
ip -n l2tp-other link set lo up
ip -n l2tp-other l2tp add tunnel tunnel_id 7 peer_tunnel_id 8 encap udp local 127.0.0.1 remote 127.0.0.2 udp_sport 5000 udp_dport 6000
ip -n l2tp-other l2tp add session tunnel_id 7 session_id 1 peer_session_id 2`)
	sh(t, "ip l2tp del session tunnel_id 3 session_id 13")
	got := next().(SessionsSet).Sessions
	if !slices.Equal(got, []Session{want[0], want[3]}) {
		t.Errorf("%+v, want the first and the last", got)
	}
	if w.Stats().Dumps == dumps {
		t.Error("it was not read again")
	}
}
