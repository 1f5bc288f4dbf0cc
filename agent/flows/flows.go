// Package flows joins what the kernel's own sockets say (sockopt.Conn) with what is known of
// policies and devices: for each TCP connection whether a policy or a key covers it, where its
// segments are cut, and why, in words.
//
// It is pure. A World is a snapshot that nobody changes, so that a join can go on while the agent
// goes on too.
package flows

import (
	"net/netip"

	"tsoagent/sockopt"
)

// Version is the version of the JSON form of Flow and Result. Fields may be added under it; a field
// that changes its meaning or goes away raises it.
const Version = 1

// The kinds of coverage.
const (
	CoveredByPolicy = "policy"
	CoveredByKey    = "key"
	NotCovered      = "none"
)

// The places where segments are cut, for those who know flows only.
const (
	CutOffload  = sockopt.SegOffload
	CutSoftware = sockopt.SegSoftware
	CutNone     = sockopt.SegNone
	CutUnknown  = sockopt.SegUnknown
)

// Flow is one TCP socket with its truth.
type Flow struct {
	State  string `json:"state"` // in the words of ss(8)
	Local  string `json:"local"`
	Remote string `json:"remote,omitempty"` // none for a listener
	// Coverage is policy, key or none.
	Coverage string `json:"coverage"`
	// Policy is the index of the output policy that covers the flow, 0 for none, or for one that only
	// the socket knows.
	Policy uint32 `json:"policy,omitempty"`
	// Segmentation is where the kernel cuts what the socket sends: offload, software, none or unknown.
	Segmentation sockopt.Segmentation `json:"segmentation"`
	// Device is what the socket's cached route leaves by, empty if it has none.
	Device string `json:"device,omitempty"`
	// Lost says that the flow is not covered and has lost offload all the same.
	Lost bool `json:"lost,omitempty"`
	// Contradiction is what does not fit together, empty if all does.
	Contradiction string `json:"contradiction,omitempty"`
	Why           string `json:"why,omitempty"`
	// Listener is whom the loss of a flow that has lost offload was inherited from, if it is there.
	Listener string `json:"listener,omitempty"`
	UID      uint32 `json:"uid"`
	Inode    uint64 `json:"inode,omitempty"`
	// Processes have the socket open, where they were asked for.
	Processes []Process `json:"processes,omitempty"`
}

// Process is one that has a socket open.
type Process struct {
	PID  int    `json:"pid"`
	Name string `json:"name"` // /proc/PID/comm
}

// Summary counts. Listeners are no connections.
type Summary struct {
	// Connections are all in the namespace that have a state of theirs to send in, whatever was
	// asked for.
	Connections int `json:"connections"`
	Shown       int `json:"shown"` // what was asked for, listeners included

	// Of those that are shown.
	Policy         int `json:"policy"`
	Key            int `json:"key"`
	Uncovered      int `json:"uncovered"`
	Offload        int `json:"offload"`
	Software       int `json:"software"`
	None           int `json:"none"`
	Unknown        int `json:"unknown"`
	Lost           int `json:"lost"`
	Contradictions int `json:"contradictions"`
}

// Collateral is the connections that inherited a loss from one listener: neither signed nor covered,
// they have no offload, for as long as they live (KERNEL.md 7).
type Collateral struct {
	// Listener is its address and port, empty for connections whose listener is gone, or that had a
	// key of their own once.
	Listener string `json:"listener,omitempty"`
	Port     uint16 `json:"port,omitempty"`
	Device   string `json:"device,omitempty"` // that the listener is bound to
	MD5Keys  int    `json:"md5_keys"`         // that the listener holds now
	AOKeys   int    `json:"ao_keys"`
	Lost     int    `json:"lost"`
	Signed   int    `json:"signed"` // connections of the listener that have a key
	// Processes listen there.
	Processes []Process `json:"processes"`
	// ProcessesUnknown is why they are not known, empty if they are.
	ProcessesUnknown string `json:"processes_unknown,omitempty"`

	// Inodes are the listener's sockets.
	Inodes []uint64 `json:"-"`
}

// Result is what a join found in all.
type Result struct {
	Version int    `json:"version"`
	Netns   string `json:"netns,omitempty"`
	// Live is false where no agent was asked.
	Live bool `json:"live"`
	// Stale says that policies or devices were being read again: coverage may be wrong.
	Stale      bool         `json:"stale,omitempty"`
	Summary    Summary      `json:"summary"`
	Collateral []Collateral `json:"collateral"`
	// MoreCollateral are the connections of listeners beyond those that are listed.
	MoreCollateral int `json:"more_collateral,omitempty"`
	// Notes are what could not be found out.
	Notes []string `json:"notes,omitempty"`
}

// The names of TCP states, as ss(8) filters by them, in the order of include/net/tcp_states.h.
var states = [...]string{
	1: "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait",
	"closed", "close-wait", "last-ack", "listening", "closing", "syn-recv",
}

// StateName is how ss(8) calls a state.
func StateName(s sockopt.State) string {
	if int(s) < len(states) && states[s] != "" {
		return states[s]
	}
	return "unknown"
}

// connected says that a socket is a connection that may send: not one that listens, is not open yet,
// or only waits for its number to be free. They are what `ss -t` shows.
func connected(s sockopt.State) bool {
	switch StateName(s) {
	case "listening", "time-wait", "closed", "syn-recv", "unknown":
		return false
	}
	return true
}

// covers says whether an address that a socket is bound to takes connections to a local address. The
// unspecified IPv6 address takes those of IPv4 too, unless the socket says otherwise.
func covers(bound, local netip.Addr) bool {
	return bound == local || bound.IsUnspecified() && (bound.Is6() || local.Is4())
}
