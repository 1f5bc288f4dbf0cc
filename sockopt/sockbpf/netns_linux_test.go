package sockbpf

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// secret is the key of every signed socket. It may be seen nowhere.
const secret = "tell-nobody-5450"

// enterNS gives the test's thread a network namespace of its own, with the addresses on lo. The thread is never unlocked, so it ends
// with the goroutine, and with both the namespace and all that is in it, also when the test fails.
func enterNS(t testing.TB, addrs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN for a network namespace, CAP_NET_ADMIN in it)")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	lo, err := vnl.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := vnl.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		addr, err := vnl.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := vnl.AddrAdd(lo, addr); err != nil {
			t.Fatal(err)
		}
	}
}

func openIter(t testing.TB) *Iter {
	t.Helper()
	it, err := Open()
	if errors.Is(err, ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		t.Skipf("needs a kernel with BPF iterators, and CAP_BPF and CAP_PERFMON: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = it.Close() })
	return it
}

// run runs a command in the thread's namespace, which it inherits.
func run(t testing.TB, line string) {
	t.Helper()
	args := strings.Fields(line)
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Skipf("needs %s", args[0])
	}
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// A socket is a file descriptor that is closed with the test.
type socket int

func newSocket(t testing.TB, local netip.AddrPort) socket {
	t.Helper()
	domain := unix.AF_INET
	if local.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, sockaddr(local)); err != nil {
		t.Fatalf("bind %s: %v", local, err)
	}
	return socket(fd)
}

// sockaddr keeps an IPv4-mapped address what it is: the family of the socket.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func (s socket) local(t testing.TB) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(int(s))
	if err != nil {
		t.Fatal(err)
	}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	t.Fatalf("a socket's name is %T", sa)
	return netip.AddrPort{}
}

func (s socket) listen(t testing.TB) socket {
	t.Helper()
	if err := unix.Listen(int(s), 64); err != nil {
		t.Fatal(err)
	}
	return s
}

// connect returns the accepted end.
func (s socket) connect(t testing.TB, listener socket, to netip.AddrPort) socket {
	t.Helper()
	if err := unix.Connect(int(s), sockaddr(to)); err != nil {
		t.Fatalf("connect to %s: %v", to, err)
	}
	fd, _, err := unix.Accept4(int(listener), unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return socket(fd)
}

func (s socket) inode(t testing.TB) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(s), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func (s socket) get(t testing.TB, level, option int) int {
	t.Helper()
	n, err := unix.GetsockoptInt(int(s), level, option)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (s socket) set(t testing.TB, option, value int) {
	t.Helper()
	if err := unix.SetsockoptInt(int(s), unix.SOL_SOCKET, option, value); err != nil {
		t.Fatal(err)
	}
}

// tcpMD5SigExt is TCP_MD5SIG_EXT: the flags and the prefix length count (linux/tcp.h).
const tcpMD5SigExt = 32

// sign sets the key for a peer, or deletes it if it is empty.
func (s socket) sign(t testing.TB, peer netip.Prefix, key string) {
	t.Helper()
	if err := s.trySign(peer, key); errors.Is(err, unix.ENOPROTOOPT) {
		t.Skip("needs a kernel with CONFIG_TCP_MD5SIG")
	} else if err != nil {
		t.Fatalf("key for %s: %v", peer, err)
	}
}

func (s socket) trySign(peer netip.Prefix, key string) error {
	sig := md5sig(peer, key)
	return unix.SetsockoptTCPMD5Sig(int(s), unix.IPPROTO_TCP, tcpMD5SigExt, &sig)
}

func md5sig(peer netip.Prefix, key string) unix.TCPMD5Sig {
	sig := unix.TCPMD5Sig{Keylen: uint16(len(key)), Flags: 1, Prefixlen: uint8(peer.Bits())} // TCP_MD5SIG_FLAG_PREFIX
	copy(sig.Key[:], key)
	if peer.Addr().Is4() {
		sig.Addr.Family = unix.AF_INET
		(*unix.RawSockaddrInet4)(unsafe.Pointer(&sig.Addr)).Addr = peer.Addr().As4()
	} else {
		sig.Addr.Family = unix.AF_INET6
		(*unix.RawSockaddrInet6)(unsafe.Pointer(&sig.Addr)).Addr = peer.Addr().As16()
	}
	return sig
}
