// Package churn changes the routes and policies of a namespace of its own at random under a running agent, and compares what the agent came to,
// step by step, with what one that starts anew makes of the same kernel. Like the rest of e2e it knows the binaries only.
package churn

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

var host = harness.Harness{
	Name: "churn", More: unix.CLONE_NEWNET, Wants: "mount, PID and network namespaces",
	Settle: func() error { return unix.Mount("tmpfs", "/run", "tmpfs", 0, "") },
}

func TestMain(m *testing.M) { host.Main(m) }

// build builds the binaries, and returns their directory.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(host.WorkDir(), "bin")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", bin+"/", "tsoagent/cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
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
