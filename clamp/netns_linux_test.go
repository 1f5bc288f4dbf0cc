package clamp

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"tsoagent/agent/netns/netnstest"
)

// newNS moves the test into a network namespace of its own until it ends.
func newNS(t testing.TB) *Table {
	t.Helper()
	netnstest.Enter(t, "nft")
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
