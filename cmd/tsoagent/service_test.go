package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tsoagent/agent"
)

func TestStatusLine(t *testing.T) {
	const more = "; `tsoctl status` has more"
	for want, g := range map[string]*agent.Glance{
		"STATUS=reading the kernel's state": nil,
		"STATUS=enforce: 1 coverage, 1 feature, 1 route, 1 clone" + more: {
			Mode: agent.Enforce, Coverages: 1, Holds: 1, Locks: 1, Clones: 1,
		},
		"STATUS=observe: 0 coverages, 0 features, 0 routes, 0 clones (and 1 other namespace); needs a look" + more:        {Mode: agent.Observe, Namespaces: 2, Degraded: true},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones; paused" + more:                                      {Mode: agent.Enforce, Paused: 1},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones; paused; needs a look" + more:                        {Mode: agent.Enforce, Paused: 1, Degraded: true},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones (and 2 other namespaces); paused" + more:             {Mode: agent.Enforce, Paused: 3, Namespaces: 3},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones (and 2 other namespaces); 1 namespace paused" + more: {Mode: agent.Enforce, Paused: 1, Namespaces: 3},
	} {
		if got := statusLine(g); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestReloadReadsRegularFilesOnly: a pipe is empty the second time, as a configuration is that asks for the defaults.
func TestReloadReadsRegularFilesOnly(t *testing.T) {
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "tsoagent.yaml"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, good := range []string{file, filepath.Join(dir, "none"), ""} {
		if err := rereadable(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{fifo, dir, "/dev/null"} {
		if err := rereadable(bad); err == nil || !strings.Contains(err.Error(), bad+" is no regular file") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
