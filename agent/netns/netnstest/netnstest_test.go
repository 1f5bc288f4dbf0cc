package netnstest

import "testing"

// TestReasonsAreHandedOn: the suite counts skips by their reasons, those in other processes, too.
func TestReasonsAreHandedOn(t *testing.T) {
	const verbose = "=== RUN   TestX\n    x_test.go:12: needs the test kernel: for bonds\n--- SKIP: TestX (0.00s)\nPASS\n"
	const plain = "--- SKIP: TestX (0.00s)\n    x_linux_test.go:3: needs iproute2\nPASS\n"
	for out, want := range map[string]string{
		verbose: "needs the test kernel: for bonds", plain: "needs iproute2",
		"--- SKIP: TestX\nPASS\n": "skipped in its own process:\n--- SKIP: TestX\nPASS\n",
	} {
		if got := skippedFor(out); got != want {
			t.Errorf("%q: got %q, want %q", out, got, want)
		}
	}
}
