// Package owners runs an agent beside those who own rules and routes, as they write them (testdata/worlds), at random, and as FRR and BIRD do
// themselves, and asks the kernel for the way of thousands of packets: it is the one of a namespace that never saw an agent, but for the MTU
// where the plan says so. Like the rest of e2e it knows the binaries only, and the control API.
package owners

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"tsoagent/e2e/harness"
)

var host = harness.Network("owners", harness.EmptyRun)

func TestMain(m *testing.M) { host.Main(m) }

// inTestKernel says that the test runs in the test kernel, which has SAs, VRFs and xfrm interfaces, and the commands on its PATH.
var inTestKernel = os.Getenv("TSOAGENT_TEST_KERNEL") == "1"

// commands returns the directory of tsoagent and tsoctl, which are built once.
var commands = sync.OnceValues(func() (string, error) {
	if inTestKernel {
		path, err := exec.LookPath("tsoagent")
		return filepath.Dir(path), err
	}
	return host.Build("tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl")
})

// need skips the test where something is missing.
func need(t *testing.T) string {
	t.Helper()
	host.Need(t, map[string]string{"ip": "iproute2", "tc": "iproute2", "ethtool": "ethtool", "nft": "nftables"})
	bin, err := commands()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}
