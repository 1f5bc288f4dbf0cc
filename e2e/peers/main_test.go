// Package peers runs this project's binaries beside real BGP daemons with TCP-MD5: FRR, BIRD and GoBGP, in network namespaces on the
// host's kernel. Like the rest of e2e it knows the binaries only.
package peers

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

// host runs the tests. Network namespaces have their names where nobody else sees them.
var host = harness.Harness{Name: "peers", Wants: "mount and PID namespaces", Settle: hideMounts}

func TestMain(m *testing.M) { host.Main(m) }

// hideMounts leaves nothing in the directories that ip netns and FRR keep their files in.
func hideMounts() error {
	for _, dir := range []string{"/run/netns", "/var/tmp"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// need skips the test where the machine lacks what all of them need, or one of the Debian packages, each named with a program of its own.
func need(t *testing.T, programs map[string]string) {
	t.Helper()
	host.Need(t, nil)
	if err := signs(); err != nil {
		t.Skipf("needs TCP-MD5 in the kernel, CONFIG_TCP_MD5SIG: %v", err)
	}
	harness.NeedPrograms(t, programs)
}

// signs sets a key on a socket that goes nowhere. The error says that the kernel can't.
func signs() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	key := unix.TCPMD5Sig{Keylen: 1}
	key.Addr.Family = unix.AF_INET
	return unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &key)
}

// needTruth skips the test where the kernel doesn't let its sockets be read.
func needTruth(t *testing.T) {
	t.Helper()
	const btf = "/sys/kernel/btf/vmlinux"
	if _, err := os.Stat(btf); err != nil {
		t.Skipf("needs the kernel's BTF, CONFIG_DEBUG_INFO_BTF: %v", err)
	}
}

// commands builds tsoagent and tsoctl once and returns their directory.
var commands = sync.OnceValues(func() (string, error) {
	return host.Build("tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl")
})
