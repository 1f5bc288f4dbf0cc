package bench

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestSmallRun runs the program on a small part of the full size, and looks at whether everything was measured and the agent was right; how
// fast it was is `make bench-check`'s affair.
func TestSmallRun(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", dir+"/", "tsoagent/cmd/tsoagent", "tsoagent/cmd/tsoctl", "tsoagent/e2e/cmd/bench")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	file := filepath.Join(dir, "out.json")
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "bench"), "-scale", "0.0003", "-rounds", "1", "-budget", "1s", "-idle", "1s",
		"-bin", dir, "-o", file, "-profiles", dir, "-profile-seconds", "1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var r Results
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for what, ratio := range map[string]Ratio{
		"cold start, observe": r.Cold[observe].Start, "cold start, enforce": r.Cold[enforce].Start, "storm": r.Storm.Time, "plain start": r.Plain.Start,
		"event, empty tables": r.EmptyEvent.Done, "event, full tables": r.FullEvent.Done,
		"locks installed": r.Writes.Install, "locks taken away": r.Writes.Remove,
		"clone, empty tables": r.EmptyEvent.Written, "clone, full tables": r.FullEvent.Written,
	} {
		if ratio.Median() <= 0 || ratio.P99() <= 0 {
			t.Errorf("%s: %+v", what, ratio)
		}
	}
	for _, row := range r.memoryRows() {
		if row.m.RSS == 0 || row.m.Peak < row.m.RSS || row.m.PSS == 0 {
			t.Errorf("memory %s: %+v", row.what, row.m)
		}
	}
	if len(r.Storm.Exact) != 1 || !r.Storm.Exact[0] {
		t.Errorf("the state after the storm: %q", r.Storm.Differences)
	}
	if len(r.Storm.Moved) == 0 || r.Storm.Late > 0 {
		t.Errorf("%d clones followed their routes, %d did not", len(r.Storm.Moved), r.Storm.Late)
	}
	if r.Idle.Seconds < 1 || r.Idle.Changes == 0 || r.Idle.EmptyRounds > 0 {
		t.Errorf("idle %+v", r.Idle)
	}
	for _, name := range []string{"observe-start.cpu", "enforce-start.cpu", "enforce-ready.heap", "shrunk.heap", "storm.cpu", "event-full.cpu"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("profile %s: %v", name, err)
		}
	}
}
