package agent

import (
	"sync"
	"time"

	"tsoagent/ethtool"
	"tsoagent/l2tp"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// batch is what one source delivered at once; one of the slices is set.
type batch struct {
	xfrm     []xfrmwatch.Event
	routes   []routes.Event
	features []ethtool.Event
	keys     []sockopt.Event
	l2tp     []l2tp.Event
	// Messages of other namespaces' loops, which the Fleet carries.
	arrivals []arrival
	handed   []handed
	offer    bool // a namespace is followed that was not, or a NIC came
	resync   bool // with offer: it is time to look again
	orders   []order

	own int // of the events of routes, those of the loop's own writes: the loop counts them as it takes the batch

	// at is when the source delivered it, for how long it takes until the effect; zero for messages.
	at time.Time
}

func (b batch) len() int {
	n := len(b.xfrm) + len(b.routes) + len(b.features) + len(b.keys) + len(b.l2tp)
	if len(b.routes) == 1 {
		if found, ok := b.routes[0].(routes.RoutesFound); ok {
			n = len(found.Routes)
		}
	}
	return n
}

// onlyRoutes reports whether there is nothing in it but events of routing.
func (b *batch) onlyRoutes() bool {
	return len(b.routes) > 0 && len(b.routes) == b.len() && len(b.arrivals)+len(b.handed)+len(b.orders) == 0 && !b.offer && !b.resync
}

// inbox carries events from the watchers to the loop. It is bounded: a watcher that finds it
// full waits, and further events wait in the kernel's own buffer. It is safe for concurrent use.
type inbox struct {
	signal chan struct{} // holds one token while there is something pending
	clock  func() time.Time

	mu      sync.Mutex
	room    sync.Cond
	pending []batch
	size    int
	closed  bool
}

// maxPending bounds how many events wait for the loop.
const maxPending = 1 << 16

func newInbox() *inbox {
	b := &inbox{signal: make(chan struct{}, 1), clock: time.Now}
	b.room.L = &b.mu
	return b
}

func (b *inbox) put(x batch) {
	if x.len() == 0 {
		return
	}
	x.at = b.clock() // the time for which it waits counts, too
	b.mu.Lock()
	for b.size >= maxPending && !b.closed {
		b.room.Wait()
	}
	b.pending = append(b.pending, x)
	b.size += x.len()
	b.mu.Unlock()
	select {
	case b.signal <- struct{}{}:
	default:
	}
}

// post is put for messages between loops: it never waits, as two loops could wait for each other. It
// is false if nobody reads the inbox any more.
func (b *inbox) post(x batch) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.pending = append(b.pending, x)
	select {
	case b.signal <- struct{}{}:
	default:
	}
	return true
}

// take returns all that is pending.
func (b *inbox) take() []batch {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.pending
	b.pending, b.size = nil, 0
	b.room.Broadcast()
	return out
}

// close lets all waiting watchers go on; what they still bring is kept but not read.
func (b *inbox) close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.room.Broadcast()
}
