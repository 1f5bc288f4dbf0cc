// Package fleets holds what packaging/ has for many machines to what it says: the manifests to the API's types, the container to what the
// agent needs, and the rules to what they cost. Like the rest of e2e it knows the binaries only.
package fleets

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

// patience is how long anything may take on a machine that is busy.
const patience = 60 * time.Second

// host runs the tests with a network namespace of their own, too: addresses on the loopback device are nobody else's.
var host = harness.Harness{Name: "fleets", More: unix.CLONE_NEWNET, Wants: "mount, PID and network namespaces", Settle: loopback}

func TestMain(m *testing.M) { host.Main(m) }

// loopback sets the loopback device up.
func loopback() error {
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}

// programs are built once.
var programs = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(host.WorkDir(), "bin")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "tsoagent/cmd/...")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return dir, nil
})

func mustPrograms(t *testing.T) string {
	t.Helper()
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// within waits until ok, and fails the test if that doesn't come.
func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	var errs bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s%s", strings.Join(args, " "), err, out, errs.String())
	}
	return string(out)
}
