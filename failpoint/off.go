//go:build !failpoint

package failpoint

// Armed is false: what else is done only for the points is left out.
func Armed() bool { return false }

// Hit does nothing.
func Hit(string) {}

// Here is false: nothing happens in the middle of a write.
func Here(string) bool { return false }

// Die does nothing.
func Die() {}
