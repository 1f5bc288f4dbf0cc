// Package window measures for how long packets still go the old way when a route moves below a clone of the agent's: while the agent lives, and
// after it was killed, by who cleans up after it. Real packets cross real (virtual) devices; the figures are in docs/stale-window.md. Like the rest
// of e2e it knows the binaries only.
package window

import (
	"sync"
	"testing"
	"time"

	"tsoagent/e2e/harness"
)

var host = harness.Network("window", harness.EmptyRun)

func TestMain(m *testing.M) { host.Main(m) }

// patience is how long anything may take on a machine that is busy. No time that is measured is held to anything.
const patience = 30 * time.Second

// binaries builds the commands, once, and returns their directory.
var binaries = sync.OnceValues(func() (string, error) { return host.Build("tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl") })

// within waits until something is so.
func within(t testing.TB, what string, ok func() bool) {
	t.Helper()
	harness.Within(t, patience, what, ok)
}
