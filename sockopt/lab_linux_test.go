package sockopt

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newNetns moves the test's thread into a fresh network namespace with lo up. The namespace ends
// with the test; if the way back fails, the thread ends with its goroutine instead.
func newNetns(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN) to make a network namespace")
	}
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs network namespaces in the kernel: %v", err)
	}
	t.Cleanup(func() {
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		_ = unix.Close(home)
	})
	ip(t, "link set lo up")
}

// ip runs ip(8) in the thread's namespace.
func ip(t testing.TB, args string) {
	t.Helper()
	if err := tryIP(args); err != nil {
		t.Fatal(err)
	}
}

func tryIP(args string) error {
	out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, out)
	}
	return nil
}

// addIPv6 gives lo addresses, and waits for their local routes: the kernel makes them from a work queue (addrconf_dad_work,
// net/ipv6/addrconf.c), and until then a connection finds the network unreachable.
func addIPv6(t testing.TB, addresses ...string) {
	t.Helper()
	for _, a := range addresses {
		ip(t, "addr add "+a+"/128 dev lo nodad")
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		out, err := exec.Command("ip", "-6", "route", "show", "table", "local").Output()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(addresses, func(a string) bool { return !strings.Contains(string(out), "local "+a+" ") }) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no local routes for %v:\n%s", addresses, out)
		}
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// open makes a TCP socket that is closed with the test.
func open(t testing.TB, a netip.Addr) int {
	t.Helper()
	family := unix.AF_INET6
	if a.Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	return fd
}

// listen makes a listener, with keys for its peers.
func listen(t testing.TB, at string, device string, peers ...string) int {
	t.Helper()
	a := netip.MustParseAddrPort(at)
	fd := open(t, a.Addr())
	if device != "" {
		if err := unix.BindToDevice(fd, device); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Bind(fd, sockaddr(a)); err != nil {
		t.Fatal(err)
	}
	for _, p := range peers {
		setKey(t, fd, p, secret)
	}
	if err := unix.Listen(fd, 65535); err != nil {
		t.Fatal(err)
	}
	return fd
}

// connect makes a connection from a local port, 0 for any, with keys for its peers.
func connect(t testing.TB, from, to string, peers ...string) int {
	t.Helper()
	a, b := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	fd := open(t, a.Addr())
	if err := unix.Bind(fd, sockaddr(a)); err != nil {
		t.Fatal(err)
	}
	for _, p := range peers {
		setKey(t, fd, p, secret)
	}
	if err := unix.Connect(fd, sockaddr(b)); err != nil {
		t.Fatal(err)
	}
	return fd
}

// secret is the key of the tests.
const secret = "a secret of the tests"

// setKey gives a socket a key for a peer: an address, or a prefix (TCP_MD5SIG_EXT), and perhaps the
// VRF that it is bound to, as "10.0.0.0/8@vrf". An empty key deletes.
func setKey(t testing.TB, fd int, peer, key string) {
	t.Helper()
	if err := trySetKey(fd, peer, key); err != nil {
		t.Fatalf("key for %s: %v", peer, err)
	}
}

func trySetKey(fd int, peer, key string) error {
	var s unix.TCPMD5Sig
	opt := unix.TCP_MD5SIG
	if p, vrf, ok := strings.Cut(peer, "@"); ok {
		l, err := unixIndex(vrf)
		if err != nil {
			return err
		}
		peer, s.Ifindex = p, l
		s.Flags |= unix.TCP_MD5SIG_FLAG_IFINDEX
		opt = unix.TCP_MD5SIG_EXT
	}
	if a, err := netip.ParsePrefix(peer); err == nil {
		s.Flags |= unix.TCP_MD5SIG_FLAG_PREFIX
		s.Prefixlen = uint8(a.Bits())
		opt = unix.TCP_MD5SIG_EXT
		peer = a.Addr().String()
	}
	a := netip.MustParseAddr(peer)
	if a.Is4() {
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.Addr))
		sa.Family, sa.Addr = unix.AF_INET, a.As4()
	} else {
		sa := (*unix.RawSockaddrInet6)(unsafe.Pointer(&s.Addr))
		sa.Family, sa.Addr = unix.AF_INET6, a.As16()
	}
	s.Keylen = uint16(copy(s.Key[:], key))
	err := unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, opt, &s)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return fmt.Errorf("needs TCP-MD5 in the kernel: %w", err)
	}
	return err
}

func unixIndex(name string) (int32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req)
	return int32(req.Uint32()), err
}

// needKeys skips where the kernel has no keys or doesn't show them.
func needKeys(t testing.TB) {
	t.Helper()
	w, err := Dial(Options{})
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func dial(t testing.TB, opts Options) *Watcher {
	t.Helper()
	w, err := Dial(opts)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// follower runs a Watcher and keeps what it told.
type follower struct {
	t    testing.TB
	w    *Watcher
	told chan []Event
}

func follow(t testing.TB, opts Options) *follower {
	t.Helper()
	f := &follower{t: t, w: dial(t, opts), told: make(chan []Event, 1<<16)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.w.Run(ctx, func(ev []Event) { f.told <- ev }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v, want %v", err, context.Canceled)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run did not return")
		}
	})
	return f
}

// next is the next set that is told.
func (f *follower) next() KeysSet {
	f.t.Helper()
	select {
	case ev := <-f.told:
		set, ok := ev[0].(KeysSet)
		if !ok || len(ev) != 1 {
			f.t.Fatalf("told %v, want a set", ev)
		}
		return set
	case <-time.After(10 * time.Second):
		f.t.Fatal("nothing is told")
	}
	return KeysSet{}
}

// want waits until exactly these keys are told.
func (f *follower) want(step string, keys ...string) {
	f.t.Helper()
	if got := names(f.next().Keys); !slices.Equal(got, keys) {
		f.t.Fatalf("%s: told %q, want %q", step, got, keys)
	}
}

// names are keys as text, with the parts that String leaves out.
func names(keys []Key) []string {
	out := []string{}
	for _, k := range keys {
		s := k.String()
		if k.Listener {
			s = "listener: " + s
		}
		if k.Ifindex != 0 {
			s += fmt.Sprintf(" if%d", k.Ifindex)
		}
		out = append(out, s)
	}
	return out
}

func sysctl(t testing.TB, path, value string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		t.Fatal(err)
	}
}
