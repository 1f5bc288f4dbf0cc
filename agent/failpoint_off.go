//go:build !failpoint

package agent

// failpoint marks a place where the tests kill the agent; a release has none.
func failpoint(string) {}
