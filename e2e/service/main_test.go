// Package service runs this project's binaries as a machine does: under a real systemd, scraped by a real Prometheus, and with a real browser
// on the status page. Like the rest of e2e it knows the binaries only.
package service

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tsoagent/e2e/harness"
)

// patience is how long anything may take on a machine that is busy.
const patience = 60 * time.Second

// host runs the tests with a network namespace of their own, too: addresses on the loopback device are nobody else's.
var host = harness.Network("service", harness.Loopback)

func TestMain(m *testing.M) { host.Main(m) }

// stage is the tree as `make install` installs it, made once.
var stage = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(host.WorkDir(), "stage")
	cmd := exec.Command("make", "-C", "../..", "install", "VCS=false", "DESTDIR="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make install: %w: %s", err, out)
	}
	return dir, nil
})

func mustStage(t *testing.T) string {
	t.Helper()
	dir, err := stage()
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
