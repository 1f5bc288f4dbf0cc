package api

import "time"

// The kinds of events.
const (
	EventDone   = "done"   // something was changed
	EventFailed = "failed" // something could not be changed; it is tried again
	EventNotice = "notice" // a person may want to look
	EventSeen   = "seen"   // the kernel told something, and there was nothing to do
	EventState  = "state"  // the agent itself: ready, paused, stopping
)

// Event is one thing that happened, with its cause.
type Event struct {
	// Seq counts from 1, without gaps.
	Seq  uint64    `json:"seq"`
	At   time.Time `json:"at"`
	Kind string    `json:"kind"` // done, failed, notice, seen or state
	// Cause is what the kernel told right before, in words; empty for what has another cause, as a timer.
	Cause string `json:"cause,omitempty"`
	// Text is what was done, or why not, in words.
	Text string `json:"text"`
	// What is the same as a log has it: it does not depend on the object. Attrs are the object and more.
	What  string            `json:"what"`
	Attrs map[string]string `json:"attrs,omitempty"`
	// Seconds is how long it took from when the agent was told of the cause, 0 without one.
	Seconds float64 `json:"seconds,omitempty"`
}

// EventList are the newest events of a namespace.
type EventList struct {
	Version int    `json:"version"`
	Netns   string `json:"netns,omitempty"`
	// Since is when the agent started to count.
	Since time.Time `json:"since"`
	// Lost is how many events after the one that was asked for are gone already.
	Lost   uint64  `json:"lost"`
	Last   uint64  `json:"last"` // the newest event's number, 0 for none
	Events []Event `json:"events"`
}

// EventLine is one line of the answer to who follows: an event, or a hole.
type EventLine struct {
	*Event
	// Lost is how many events are missing here, as they were read too slowly.
	Lost uint64 `json:"lost,omitempty"`
}
