package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tsoagent/agent"
	"tsoagent/agent/api"
)

func TestStatusLine(t *testing.T) {
	const more = "; `tsoctl status` has more"
	ns := func(paused ...bool) (out []agent.NamespaceReport) {
		for _, p := range paused {
			out = append(out, agent.NamespaceReport{Paused: p, Degraded: p})
		}
		return out
	}
	for want, r := range map[string]*agent.Report{
		"STATUS=reading the kernel's state": nil,
		"STATUS=enforce: 1 coverage, 1 feature, 1 route, 1 clone" + more: {
			Mode: agent.Enforce, Coverages: make([]agent.CoverageReport, 1), Holds: make([]agent.HoldReport, 1), Locks: make([]agent.LockReport, 1),
			Clones: make([]agent.CloneReport, 1),
		},
		"STATUS=observe: 0 coverages, 0 features, 0 routes, 0 clones (and 1 other namespace); needs a look" + more:        {Mode: agent.Observe, Namespaces: ns(false, false), Findings: []string{"x"}},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones; paused" + more:                                      {Mode: agent.Enforce, Paused: &api.Paused{}},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones; paused; needs a look" + more:                        {Mode: agent.Enforce, Paused: &api.Paused{}, Findings: []string{"x"}},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones (and 2 other namespaces); paused" + more:             {Mode: agent.Enforce, Paused: &api.Paused{}, Namespaces: ns(true, true, true)},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones (and 2 other namespaces); 1 namespace paused" + more: {Mode: agent.Enforce, Namespaces: ns(false, true, false)},
		"STATUS=enforce: 0 coverages, 0 features, 0 routes, 0 clones (and 1 other namespace); 1 namespace paused; needs a look" + more: {
			Mode: agent.Enforce, Namespaces: []agent.NamespaceReport{{Paused: true, Degraded: true}, {Degraded: true}},
		},
	} {
		if got := statusLine(r); got != want {
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
