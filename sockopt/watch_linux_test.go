package sockopt

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// look reads the keys of the thread's namespace once, thoroughly.
func look(t testing.TB) KeysSet {
	t.Helper()
	w := dial(t, Options{})
	defer w.Close()
	set, err := w.look(nil, true)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func wantKeys(t testing.TB, keys ...string) {
	t.Helper()
	if got := names(look(t).Keys); !slices.Equal(got, keys) {
		t.Errorf("keys\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(keys, "\n\t"))
	}
}

// TestKernelListeners has keys of listeners: of an address, of a prefix whose host bits are not 0,
// IPv4 in IPv6, and none.
func TestKernelListeners(t *testing.T) {
	newNetns(t)
	needKeys(t)
	wantKeys(t)
	listen(t, "0.0.0.0:179", "", "192.0.2.9", "198.51.100.7/24", "0.0.0.0/0")
	listen(t, "127.0.0.1:180", "", "192.0.2.9")
	listen(t, "[::]:181", "", "2001:db8::9", "2001:db8:1::7/48", "::ffff:192.0.2.10", "::ffff:203.0.113.9/24")
	listen(t, "[::1]:182", "")
	wantKeys(
		t,
		"listener: tcp-md5 key for 0.0.0.0/0 on port 179",
		"listener: tcp-md5 key for 192.0.2.9 on port 179",
		"listener: tcp-md5 key for 192.0.2.9 on port 180 of 127.0.0.1",
		"listener: tcp-md5 key for 192.0.2.10 on port 181",
		"listener: tcp-md5 key for 198.51.100.0/24 on port 179",
		"listener: tcp-md5 key for 203.0.113.0/24 on port 181",
		"listener: tcp-md5 key for 2001:db8::9 on port 181",
		"listener: tcp-md5 key for 2001:db8:1::/48 on port 181",
	)
}

// TestKernelConnections has connections of both ends. The accepted one is told by its listener's
// key while there is one, and alone when that is gone; a client's by the peer's port.
func TestKernelConnections(t *testing.T) {
	for _, c := range []struct{ name, local, peer, any, mapped string }{
		{"v4", "127.0.0.1", "127.0.0.2", "0.0.0.0", "127.0.0.1"},
		{"v6", "[fd00::1]", "[fd00::2]", "[::]", "fd00::1"},
		{"v4-mapped", "127.0.0.1", "127.0.0.2", "[::]", "::ffff:127.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			newNetns(t)
			needKeys(t)
			addIPv6(t, "fd00::1", "fd00::2")
			bare := func(s string) string { return strings.Trim(s, "[]") }
			l := listen(t, c.any+":179", "", c.mapped)
			client := connect(t, c.local+":0", c.peer+":179", bare(c.peer))
			conn, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(conn)
			atClient := fmt.Sprintf("tcp-md5 key for %s port 179 of %s", bare(c.peer), bare(c.local))
			wantKeys(t, fmt.Sprintf("listener: tcp-md5 key for %s on port 179", bare(c.local)), atClient)
			setKey(t, l, c.mapped, "")
			wantKeys(t, fmt.Sprintf("tcp-md5 key for %s on port 179 of %s", bare(c.local), bare(c.peer)), atClient)
			setKey(t, client, bare(c.peer), "")
			wantKeys(t, fmt.Sprintf("tcp-md5 key for %s on port 179 of %s", bare(c.local), bare(c.peer)))
		})
	}
}

// TestKernelClientOfManyPeers says nothing of keys for others than the peer of a connection.
func TestKernelClientOfManyPeers(t *testing.T) {
	newNetns(t)
	needKeys(t)
	listen(t, "127.0.0.2:179", "")
	connect(t, "127.0.0.1:0", "127.0.0.2:179", "192.0.2.1", "198.51.100.0/24")
	wantKeys(t)
	l := listen(t, "127.0.0.3:179", "", "127.0.0.0/8")
	connect(t, "127.0.0.1:0", "127.0.0.3:179", "192.0.2.1", "127.0.0.0/16")
	setKey(t, l, "127.0.0.0/8", "")
	wantKeys(t, "tcp-md5 key for 127.0.0.1 on port 179 of 127.0.0.3", "tcp-md5 key for 127.0.0.3 port 179 of 127.0.0.1")
}

// TestKernelVRF tells the VRF of sockets that are bound to it, and of connections that were accepted
// there on a listener that is bound to none, whose key names it.
func TestKernelVRF(t *testing.T) {
	newNetns(t)
	needKeys(t)
	if err := tryIP("link add red type vrf table 10"); err != nil {
		t.Skipf("needs VRFs in the kernel: %v", err)
	}
	red, err := unixIndex("red")
	if err != nil {
		t.Fatal(err)
	}
	ip(t, "link set red up")
	ip(t, "addr add 198.18.0.1/24 dev red")
	ip(t, "addr add 198.18.0.2/24 dev red")
	listen(t, "0.0.0.0:179", "red", "192.0.2.9", "198.51.100.0/24@red")
	wantKeys(
		t,
		fmt.Sprintf("listener: tcp-md5 key for 192.0.2.9 on port 179 if%d", red),
		fmt.Sprintf("listener: tcp-md5 key for 198.51.100.0/24 on port 179 if%d", red),
	)
	sysctl(t, "/proc/sys/net/ipv4/tcp_l3mdev_accept", "1")
	l := listen(t, "0.0.0.0:180", "", "198.18.0.1@red")
	client := open(t, netip.MustParseAddr("198.18.0.1"))
	if err := unix.BindToDevice(client, "red"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(client, sockaddr(netip.MustParseAddrPort("198.18.0.1:0"))); err != nil {
		t.Fatal(err)
	}
	setKey(t, client, "198.18.0.2", secret)
	if err := unix.Connect(client, sockaddr(netip.MustParseAddrPort("198.18.0.2:180"))); err != nil {
		t.Fatal(err)
	}
	conn, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(conn)
	wantKeys(
		t,
		fmt.Sprintf("listener: tcp-md5 key for 192.0.2.9 on port 179 if%d", red),
		// The listener's key names its VRF, which the kernel doesn't show.
		"listener: tcp-md5 key for 198.18.0.1 on port 180",
		fmt.Sprintf("tcp-md5 key for 198.18.0.1 on port 180 of 198.18.0.2 if%d", red),
		fmt.Sprintf("tcp-md5 key for 198.18.0.2 port 180 of 198.18.0.1 if%d", red),
		fmt.Sprintf("listener: tcp-md5 key for 198.51.100.0/24 on port 179 if%d", red),
	)
}

// TestKernelManyKeys shows the keys of a listener that has more of them than a dump has room for,
// those of all other sockets too, and says where there are more than the kernel can show.
func TestKernelManyKeys(t *testing.T) {
	newNetns(t)
	needKeys(t)
	plain := listen(t, "127.0.0.1:1", "", "127.0.0.9")
	_ = plain
	l := listen(t, "127.0.0.1:179", "")
	for n := 0; n < 700; n++ {
		peer := fmt.Sprintf("10.0.%d.%d", n/250, n%250)
		if err := trySetKey(l, peer, secret); errors.Is(err, unix.ENOMEM) {
			t.Skipf("needs room for %d keys on a socket (net.core.optmem_max): %v", n, err)
		} else if err != nil {
			t.Fatal(err)
		}
		switch n + 1 {
		case 20, 50, 321, 400, 655:
			if set := look(t); len(set.Keys) != n+2 || set.Hidden != 0 {
				t.Errorf("%d keys: %d are seen, %d sockets hidden", n+2, len(set.Keys), set.Hidden)
			}
		case 656, 700:
			if set := look(t); len(set.Keys) != 1 || set.Hidden != 1 {
				t.Errorf("%d keys: %d are seen, want the other listener's; %d sockets hidden, want 1", n+2, len(set.Keys), set.Hidden)
			}
		}
	}
}

// TestKernelBlindedDump has a connection with so many keys that the dump ends there: the signed
// connections behind it are seen all the same.
func TestKernelBlindedDump(t *testing.T) {
	newNetns(t)
	needKeys(t)
	l := listen(t, "127.0.0.2:179", "", "127.0.0.1")
	many := open(t, netip.MustParseAddr("127.0.0.1"))
	for n := range 400 {
		if err := trySetKey(many, fmt.Sprintf("10.0.%d.%d", n/250, n%250), secret); errors.Is(err, unix.ENOMEM) {
			t.Skipf("needs room for 400 keys on a socket (net.core.optmem_max): %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	listen(t, "127.0.0.2:180", "")
	if err := unix.Connect(many, sockaddr(netip.MustParseAddrPort("127.0.0.2:180"))); err != nil {
		t.Fatal(err)
	}
	const conns = 40
	for range conns {
		connect(t, "127.0.0.1:0", "127.0.0.2:179", "127.0.0.2")
	}
	setKey(t, l, "127.0.0.1", "")
	w := dial(t, Options{})
	defer w.Close()
	c := newCollector(nil, nil)
	if err := w.dump(afInet, connected, c, nil); err != nil {
		t.Fatal(err)
	}
	all := 2*conns + 2
	t.Logf("a dump sees %d of %d connections", c.sockets, all)
	if c.sockets >= all {
		t.Errorf("a dump sees all %d connections: the kernel shows more keys in one than it did, and this test nothing", c.sockets)
	}
	c = newCollector(nil, nil)
	if hidden, err := w.readAll(afInet, connected, c, true); err != nil || hidden != 0 || c.sockets != all {
		t.Errorf("saw %d of %d connections, %d hidden: %v", c.sockets, all, hidden, err)
	}
}

// TestKernelFollow tells keys that are set, deleted, and closed with their sockets.
func TestKernelFollow(t *testing.T) {
	newNetns(t)
	f := follow(t, Options{Period: time.Hour})
	f.want("at the start")
	l := listen(t, "0.0.0.0:179", "", "192.0.2.9")
	f.w.Look()
	f.want("a listener with a key", "listener: tcp-md5 key for 192.0.2.9 on port 179")
	setKey(t, l, "192.0.2.10", secret)
	f.w.Look()
	f.want("another key", "listener: tcp-md5 key for 192.0.2.9 on port 179", "listener: tcp-md5 key for 192.0.2.10 on port 179")
	setKey(t, l, "192.0.2.9", "another secret")
	setKey(t, l, "192.0.2.9", "")
	f.w.Look()
	f.want("a key deleted", "listener: tcp-md5 key for 192.0.2.10 on port 179")
	if err := unix.Shutdown(l, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	f.w.Resync()
	f.want("no listener any more")
	if s := f.w.Stats(); s.Dumps < 5 || s.Told != 5 || s.Undecodable != 0 {
		t.Errorf("%+v", s)
	}
	// A kernel that counts CPU time by its ticks, as user-mode Linux does, sees nothing of most looks.
	for deadline := time.Now().Add(20 * time.Second); f.w.Stats().Total == 0; f.w.Resync() {
		if time.Now().After(deadline) {
			t.Fatalf("looks take no time: %+v", f.w.Stats())
		}
		runtime.Gosched()
	}
}

// TestKernelSecondLook sees a key that was set, and told by a hook, ahead of listen(2): the kernel doesn't show the socket
// until then.
func TestKernelSecondLook(t *testing.T) {
	newNetns(t)
	f := follow(t, Options{Period: time.Hour})
	f.want("at the start")
	at := netip.MustParseAddrPort("127.0.0.1:179")
	fd := open(t, at.Addr())
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		t.Fatal(err)
	}
	setKey(t, fd, "192.0.2.9", secret)
	before := f.w.Stats().Dumps
	f.w.Look()
	for deadline := time.Now().Add(20 * time.Second); f.w.Stats().Dumps == before; {
		if time.Now().After(deadline) {
			t.Fatal("no look")
		}
		runtime.Gosched()
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	f.want("by the second look", "listener: tcp-md5 key for 192.0.2.9 on port 179 of 127.0.0.1")
}

// TestKernelPoll tells without being asked.
func TestKernelPoll(t *testing.T) {
	newNetns(t)
	f := follow(t, Options{Period: time.Millisecond})
	f.want("at the start")
	l := listen(t, "[::]:179", "", "2001:db8::9")
	f.want("a listener with a key", "listener: tcp-md5 key for 2001:db8::9 on port 179")
	setKey(t, l, "2001:db8::9", "")
	f.want("a key deleted")
}

// TestKernelChurn makes and closes thousands of sockets during dumps. What is there all the time is
// in each set that is told.
func TestKernelChurn(t *testing.T) {
	newNetns(t)
	needKeys(t)
	ip(t, "addr add 10.9.9.1/32 dev lo")
	l := listen(t, "10.9.9.1:179", "", "10.9.9.1", "192.0.2.0/24")
	for range 50 {
		connect(t, "10.9.9.1:0", "10.9.9.1:179", "10.9.9.1")
	}
	setKey(t, l, "10.9.9.1", "")
	f := follow(t, Options{Period: time.Millisecond})
	first := f.next()
	if len(first.Keys) != 3 { // the prefix, both ends
		t.Fatalf("keys %q", names(first.Keys))
	}
	listen(t, "127.0.0.1:7", "")
	var made atomic.Int64
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		var fds []int
		for range 200 {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
			if made.Add(1)%4 == 0 { // a key that comes and goes with its socket
				setKey(t, fd, "127.0.0.1", secret)
			}
			// A reset on close, so that no TIME_WAIT keeps the port.
			_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			if made.Load()%3 == 0 {
				_ = unix.Listen(fd, 1)
			} else {
				_ = unix.Connect(fd, sockaddr(netip.MustParseAddrPort("127.0.0.1:7")))
			}
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	s := f.w.Stats()
	t.Logf("%d sockets made, %+v", made.Load(), s)
	if s.Dumps < 4 || s.Undecodable != 0 {
		t.Errorf("%+v", s)
	}
	for {
		select {
		case ev := <-f.told:
			set, ok := ev[0].(KeysSet)
			if !ok {
				t.Fatalf("told %v", ev)
			}
			if lacks(set.Keys, first.Keys) {
				t.Fatalf("keys that are there all the time are missing: %q", names(set.Keys))
			}
			continue
		default:
		}
		return
	}
}

// TestKernelUnprivileged names the capability that is missing: without it the kernel would show
// sockets without their keys, as if there were none.
func TestKernelUnprivileged(t *testing.T) {
	newNetns(t)
	needKeys(t)
	listen(t, "127.0.0.1:179", "", "192.0.2.9")
	// Of this thread alone, which is the test's.
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var full, none [2]unix.CapUserData
	if err := unix.Capget(&head, &full[0]); err != nil {
		t.Fatal(err)
	}
	none = full
	none[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	if err := unix.Capset(&head, &none[0]); err != nil {
		t.Fatal(err)
	}
	w, err := Dial(Options{})
	if rerr := unix.Capset(&head, &full[0]); rerr != nil {
		t.Fatal(rerr)
	}
	if err == nil {
		_ = w.Close()
	}
	if !errors.Is(err, unix.EPERM) || !strings.Contains(fmt.Sprint(err), "CAP_NET_ADMIN is missing") {
		t.Errorf("Dial: %v, want EPERM and the name of the capability", err)
	}
}

// TestTriggerNeverBlocks asks for more looks than there are.
func TestTriggerNeverBlocks(t *testing.T) {
	w := &Watcher{again: make(chan urgency, 1)}
	for _, step := range []struct {
		ask  func()
		want urgency
	}{{w.LookSoon, soon}, {w.Look, now}, {w.LookSoon, now}, {w.Resync, thorough}, {w.Look, thorough}, {w.LookSoon, thorough}} {
		step.ask()
		u := <-w.again
		if u != step.want || len(w.again) != 0 {
			t.Errorf("urgency %d, want %d; %d more", u, step.want, len(w.again))
		}
		w.again <- u
	}
}
