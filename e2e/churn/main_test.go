// Package churn changes the routes and policies of a namespace of its own at random under a running agent, and compares what the agent came to,
// step by step, with what one that starts anew makes of the same kernel. Like the rest of e2e it knows the binaries only.
package churn

import (
	"fmt"
	"os/exec"
	"testing"

	"tsoagent/e2e/harness"
)

var host = harness.Network("churn", harness.EmptyRun)

func TestMain(m *testing.M) { host.Main(m) }

// build builds the binaries, and returns their directory.
func build(t *testing.T) string {
	t.Helper()
	bin, err := host.Build("tsoagent/cmd/...")
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// ip runs a line of ip. Whether it succeeds is up to it where the line is drawn at random.
func ip(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	if out, err := exec.Command("sh", "-c", "ip "+line).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", line, err, out)
	}
	return nil
}
