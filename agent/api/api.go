// Package api is the control API in values: what goes over the agent's unix socket, as JSON. It does no I/O.
// docs/openapi.yaml describes it for other languages and is made of this package: of Operations, of the types
// and of their comments.
//
// All documents have a version. Within one, fields may be added; a field that changes its meaning or goes away
// raises it.
package api

import "path/filepath"

// Version is the version of all documents, and of the API's paths.
const Version = 1

// DefaultRunDir holds the journal and the control socket. It dies with the boot, as the
// kernel's own state does.
const DefaultRunDir = "/run/tsoagent"

// SocketPath is where the control socket of an agent with this run directory is.
func SocketPath(runDir string) string { return filepath.Join(runDir, "tsoagent.sock") }

// Error is the answer of every request that is not served. Its status says the kind: 400 for a wrong request,
// 403 where only root may ask, 404 for a namespace that is not followed, a device and a path that there is not, 405 for
// another method, 409 for a configuration that is refused, 413 and 415 for a wrong body, 500 where the kernel failed, 501 for what this kernel can't tell, 503 for try again.
type Error struct {
	Text string `json:"error"`
	// Absent is the parameter, dev or netns, whose value names what isn't there; missing where it is something else.
	Absent string `json:"absent,omitempty"`
}
