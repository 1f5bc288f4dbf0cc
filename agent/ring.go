package agent

import (
	"sync"
	"time"

	"tsoagent/agent/api"
)

// maxEvents is how many events a ring keeps: some hundred bytes each.
const maxEvents = 2048

// ring keeps the newest events of a namespace, also those of the agents before this one, whose places it took. Who reads it has a number, and no place of his own in memory: one
// who reads too slowly finds that some are gone, and nobody waits for him. It is safe for concurrent use.
type ring struct {
	since time.Time
	ended chan struct{} // closed when nobody adds to it any more

	mu     sync.Mutex
	events []api.Event   // in the order of their numbers, but for where it wraps: number n is at n-1 modulo maxEvents
	last   uint64        // the newest one's number, 0 for none
	wake   chan struct{} // closed by the next event, nil while nobody waits for it
}

func newRing(since time.Time) *ring { return &ring{since: since, ended: make(chan struct{})} }

// end says that no event will come any more.
func (r *ring) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.ended:
	default:
		close(r.ended)
	}
}

// add numbers an event and keeps it.
func (r *ring) add(e api.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	e.Seq = r.last
	if len(r.events) < maxEvents {
		r.events = append(r.events, e)
	} else {
		r.events[(r.last-1)%maxEvents] = e
	}
	if r.wake != nil {
		close(r.wake)
		r.wake = nil
	}
}

// after appends to buf up to most of the events with a higher number than seq, the oldest first. lost are those that
// are gone already, and last is the newest number that there is. A number that was never given, as by an agent
// that was restarted since, is none.
func (r *ring) after(seq uint64, most int, buf []api.Event) (events []api.Event, lost, last uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if seq > r.last {
		seq = 0
	}
	if oldest := r.last - uint64(len(r.events)); seq < oldest {
		lost, seq = oldest-seq, oldest
	}
	for n := seq + 1; n <= r.last && len(buf) < most; n++ {
		buf = append(buf, r.events[(n-1)%maxEvents])
	}
	return buf, lost, r.last
}

// more is closed when there is an event with a higher number than seq.
func (r *ring) more(seq uint64) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wake == nil {
		r.wake = make(chan struct{})
	}
	wake := r.wake
	if r.last > seq {
		close(r.wake)
		r.wake = nil
	}
	return wake
}
