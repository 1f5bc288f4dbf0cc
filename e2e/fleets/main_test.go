// Package fleets holds what packaging/ has for many machines to what it says: the manifests to the API's types, the container to what the
// agent needs, and the rules to what they cost. Like the rest of e2e it knows the binaries only.
package fleets

import (
	"bytes"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"tsoagent/e2e/harness"
)

// patience is how long anything may take on a machine that is busy.
const patience = 60 * time.Second

// host runs the tests with a network namespace of their own, too: addresses on the loopback device are nobody else's.
var host = harness.Network("fleets", harness.Loopback)

func TestMain(m *testing.M) { host.Main(m) }

// programs are built once.
var programs = sync.OnceValues(func() (string, error) { return host.Build("tsoagent/cmd/...") })

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
	harness.Within(t, patience, what, ok)
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
