// Package window measures for how long packets still go the old way when a route moves below a clone of the agent's: while the agent lives, and
// after it was killed, by who cleans up after it. Real packets cross real (virtual) devices; the figures are in docs/stale-window.md. Like the rest
// of e2e it knows the binaries only.
package window

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

var host = harness.Harness{
	Name: "window", More: unix.CLONE_NEWNET, Wants: "mount, PID and network namespaces",
	Settle: func() error { return unix.Mount("tmpfs", "/run", "tmpfs", 0, "") },
}

func TestMain(m *testing.M) { host.Main(m) }

// patience is how long anything may take on a machine that is busy. No time that is measured is held to anything.
const patience = 30 * time.Second

// binaries builds the commands, once, and returns their directory.
var binaries = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(host.WorkDir(), "bin")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", bin+"/", "tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, text)
	}
	return bin, nil
})

// within waits until something is so.
func within(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
