package api

import "time"

// ReloadRequest asks the agent to read its configuration again.
type ReloadRequest struct{}

// ReloadAnswer says that the configuration is in use, in the namespace that the agent was started in and soon in the others. One that
// is not taken over is an Error, and the one before it stays in use.
type ReloadAnswer struct {
	Version int `json:"version"`
	// Changed says that it is another one than before.
	Changed bool `json:"changed"`
	// Configured is since when it is in use.
	Configured time.Time `json:"configured"`
}
