package agent

import points "tsoagent/failpoint"

// failpoint is a place where the tests kill the agent; a release has none.
func failpoint(point string) { points.Hit(point) }
