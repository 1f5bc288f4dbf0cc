package api

import (
	"fmt"
	"time"
)

// PauseRequest asks the agent to take its hands off.
type PauseRequest struct {
	// For is after how long it goes on by itself, as 90s, 10m or 2h; empty for not before it is told to.
	For string `json:"for,omitempty"`
	// Restore asks for everything to be given back first.
	Restore bool `json:"restore,omitempty"`
}

// ResumeRequest asks the agent to go on.
type ResumeRequest struct{}

// Paused is a pause that lasts. It ends with the agent's process.
type Paused struct {
	Since time.Time `json:"since"`
	// Until is when it ends by itself, missing if it does not.
	Until time.Time `json:"until,omitzero"`
	By    Peer      `json:"by"`
	// Restore says that everything was to be given back first, and Left how much of that is still in place.
	Restore bool `json:"restore,omitempty"`
	Left    int  `json:"left,omitempty"`
	// Waiting is how many changes are due and wait for the pause's end, as far as they are known before.
	Waiting int `json:"waiting,omitempty"`
}

// Peer is who asked, as the kernel knows the other end of the socket (SO_PEERCRED, unix(7)).
type Peer struct {
	UID     uint32 `json:"uid"`
	PID     int32  `json:"pid"`
	Process string `json:"process,omitempty"` // /proc/PID/comm
	// Login is who logged in, where that is another one than the user: with sudo it is the person
	// (/proc/PID/loginuid).
	Login string `json:"login,omitempty"`
}

// PauseAnswer says where the agent is paused now.
type PauseAnswer struct {
	Version    int               `json:"version"`
	Namespaces []PausedNamespace `json:"namespaces"` // those that were asked for
}

// PausedNamespace is one namespace after it was asked to pause or to go on.
type PausedNamespace struct {
	Name   string  `json:"name"`
	Paused *Paused `json:"paused,omitempty"` // missing if it is not paused
	// Why is why it could not be asked, empty if it was.
	Why string `json:"why,omitempty"`
}

// String is who asked, in a line.
func (p Peer) String() string {
	who := fmt.Sprintf("uid %d", p.UID)
	if p.UID == 0 {
		who = "root"
	}
	if p.Login != "" {
		who = p.Login + " as " + who
	}
	if p.PID != 0 {
		who += fmt.Sprintf(" (%s, pid %d)", p.Process, p.PID)
	}
	return who
}
