package clamp

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// newNS moves the test into a network namespace of its own until it ends.
func newNS(t testing.TB) *Table {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		home.Close()
		t.Skipf("needs network namespaces: %v", err)
	}
	t.Cleanup(func() {
		defer home.Close()
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Errorf("leave the namespace: %v", err) // the thread stays locked and ends with the test
			return
		}
		runtime.UnlockOSThread()
	})
	tb, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tb.Close() })
	if _, err := tb.Read(); err != nil {
		t.Skipf("needs nftables: %v", err)
	}
	return tb
}

// hostNS is the namespace that the tests were started in, which they must leave alone. A subtest
// runs on a thread of its own.
var hostNS, _ = os.Readlink("/proc/self/ns/net")

func nft(t testing.TB, args ...string) string {
	t.Helper()
	if now, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || now == hostNS {
		t.Fatalf("nft %v is not to run in %s: %v", args, now, err)
	}
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}
