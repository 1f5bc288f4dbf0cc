package sockopt

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkKernelLook looks at as many connections as TSOAGENT_CONNECTIONS says, 10,000 by default.
// 1 in 100 is signed.
func BenchmarkKernelLook(b *testing.B) {
	newNetns(b)
	needKeys(b)
	conns := 10000
	if n, err := strconv.Atoi(os.Getenv("TSOAGENT_CONNECTIONS")); err == nil {
		conns = n
	}
	connectMany(b, conns)
	w := dial(b, Options{})
	defer w.Close()
	cpu := cpuTime()
	for b.Loop() {
		if _, err := w.look(nil, false); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(w.Stats().Sockets), "sockets")
	cpu = cpuTime()
	if _, err := w.look(nil, true); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(cpuTime()-cpu), "thorough-cpu-ns/op")
}

// connectMany makes connections that wait to be accepted, which takes no open files. Their other ends
// go without a word (TCP_REPAIR).
func connectMany(b *testing.B, conns int) {
	b.Helper()
	sysctl(b, "/proc/sys/net/core/somaxconn", "65535")
	const signedPort, each = 179, 20000 // connections for each port
	for n := range conns {
		port := 1000 + n/each
		if n%each == 0 {
			listen(b, fmt.Sprintf("127.0.2.1:%d", port), "")
		}
		if n == 0 {
			listen(b, "127.0.2.1:179", "", "127.0.0.0/8")
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		if n%100 == 0 {
			setKey(b, fd, "127.0.2.1", secret)
			port = signedPort
		}
		// No port of another end that is gone, or the kernel meets the old connection.
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 1, byte(n / each)}), uint16(10000+n%each))
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			b.Fatal(err)
		}
		if err := unix.Bind(fd, sockaddr(from)); err != nil {
			b.Fatal(err)
		}
		to := netip.AddrPortFrom(netip.MustParseAddr("127.0.2.1"), uint16(port))
		if err := unix.Connect(fd, sockaddr(to)); err != nil {
			b.Fatal(err)
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
			b.Fatal(err)
		}
		_ = unix.Close(fd)
	}
}
