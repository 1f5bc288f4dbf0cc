// Package kill ends agents as `kill -9` does, before and after each write to the journal and to the kernel, while routes, rules, policies and
// features change at random, has another agent or tsoctl clean up, and compares what is left with a namespace that never saw an agent. Like the
// rest of e2e it knows the binaries only, and the names of the places where they can be ended.
package kill

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"tsoagent/e2e/harness"
)

var host = harness.Network("kill", harness.EmptyRun)

func TestMain(m *testing.M) { host.Main(m) }

// patience is how long anything may take on a machine that is busy.
const patience = 60 * time.Second

// binaries builds the commands with their failpoints, once, and returns their directory.
var binaries = sync.OnceValues(func() (string, error) {
	return host.Build("-tags", "failpoint", "tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl")
})

// build builds what args say, as the Makefile does.
func build(out string, args ...string) error {
	cmd := exec.Command("go", append([]string{"build", "-buildvcs=false", "-o", out}, args...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, text)
	}
	return nil
}

func need(t *testing.T) string {
	t.Helper()
	host.Need(t, map[string]string{"ip": "iproute2", "tc": "iproute2", "ethtool": "ethtool", "nft": "nftables"})
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}
