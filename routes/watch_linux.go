package routes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// WatchOptions tunes a Watcher; the zero value is right.
type WatchOptions struct {
	// ReceiveBuffer is the size of the kernel's queue of events in bytes, by default 32 MiB,
	// past net.core.rmem_max where we may (KERNEL.md 25).
	ReceiveBuffer int
	// Chunk is the number of events after which a dump is handed on, by default 512.
	Chunk int
	// Singly has the first dump tell of each route by an event of its own, as the others do, which leaves it to the sink how many it takes at
	// a time.
	Singly bool
}

const (
	defaultReceiveBuffer = 32 << 20
	defaultChunk         = 512
)

// Stats are counters of a Watcher since it was dialled.
type Stats struct {
	Messages    uint64 // messages received, those of dumps included
	Undecodable uint64 // messages that made no sense
	Overruns    uint64 // times that the kernel dropped events (ENOBUFS)
	Dumps       uint64 // resyncs that were done, full and partial ones
	Interrupted uint64 // dumps that were repeated because the tables changed
}

// A Watcher follows the routing of one network namespace. It subscribes first and dumps then,
// so nothing falls between; an event that the dump already shows is told again. Resync and
// Stats may be called from anywhere, Run only once.
//
//	events ──> told ────────────────────────────┐
//	             │ link down, address gone, …   ├──> sink
//	             v                              │
//	scopes due ──> barrier ──> dump ──> found ──┘     (events wait while a dump runs)
type Watcher struct {
	events *conn
	dumps  *conn
	dumps6 *conn // of IPv6 routes, while dumps has the others
	opts   WatchOptions
	dec    decoders
	losses losses
	fdbs   fdbs

	mu     sync.Mutex
	wanted scopeSet // by Resync
	done   bool     // the context of Run is over

	messages, undecodable, overruns, resyncs, interrupted atomic.Uint64

	// held are the events that came while a dump ran, in the batches in which they are handed on, and doubts counts the dumps in a row after
	// which they left something open. later is to be dumped again because of it, from laterAt on.
	held    [][]Event
	known   bool // a full dump has ended
	doubts  int
	later   scopeSet
	laterAt time.Time
	// lost is why events were lost, nil for none, since the last Lost.
	lost error
	// adds and removals count IPv6 route events and told the route events of each family, for
	// doubts about dumps that ran meanwhile.
	adds, removals uint64
	told           map[Family]uint64
	retry          backoff
}

// groups are what a Watcher subscribes to.
var groups = []uint32{
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_NEXTHOP,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_NEIGH, // for forwarding databases; a filter keeps the neighbours out
}

// Dial opens a Watcher in the network namespace of the calling thread and subscribes; what
// happens from now on is not missed.
func Dial(opts WatchOptions) (*Watcher, error) {
	if opts.ReceiveBuffer == 0 {
		opts.ReceiveBuffer = defaultReceiveBuffer
	}
	if opts.Chunk == 0 {
		opts.Chunk = defaultChunk
	}
	events, err := dialRoute(opts.ReceiveBuffer)
	if err != nil {
		return nil, err
	}
	events.many = newTrain(trainCars, carLen)
	if err := events.filterNeighbours(); err != nil {
		_ = events.Close()
		return nil, err
	}
	for _, g := range groups {
		if err := events.JoinGroup(g); err != nil {
			_ = events.Close()
			return nil, fmt.Errorf("routes: join group %d: %w", g, err)
		}
	}
	w := &Watcher{events: events, opts: opts, known: opts.Singly, told: make(map[Family]uint64), fdbs: newFDBs()}
	if w.dumps, err = dialRoute(0); err == nil {
		w.dumps6, err = dialRoute(0)
	}
	if err != nil {
		_ = w.Close()
		return nil, err
	}
	w.losses = newLosses(&w.dec)
	return w, nil
}

// Close closes the connections of a Watcher that was never run; Run does it by itself.
func (w *Watcher) Close() error {
	var errs []error
	for _, c := range []*conn{w.events, w.dumps, w.dumps6} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// Stats returns the counters.
func (w *Watcher) Stats() Stats {
	return Stats{
		Messages: w.messages.Load(), Undecodable: w.undecodable.Load(), Overruns: w.overruns.Load(),
		Dumps: w.resyncs.Load(), Interrupted: w.interrupted.Load(),
	}
}

// Resync asks for a dump of the scope, between the events that come. It never blocks; requests
// that wait are joined.
func (w *Watcher) Resync(scope Scope) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wanted.add(scope)
	w.wakeLocked()
}

// wakeLocked ends a wait for events. The deadline stays until the loop has taken note.
func (w *Watcher) wakeLocked() { _ = w.events.SetReadDeadline(time.Unix(1, 0)) }

// take adds what was asked for, and what is due later and late enough, to due and sets the deadline
// of the next wait: notBefore, if there is something due by then, or laterAt, else none.
func (w *Watcher) take(due *scopeSet, notBefore time.Time) (done bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	due.merge(w.wanted)
	w.wanted = scopeSet{}
	if w.done {
		return true
	}
	now := time.Now()
	if !w.later.empty() && !w.laterAt.After(now) {
		due.merge(w.later)
		w.later = scopeSet{}
	}
	var deadline time.Time
	if !due.empty() && notBefore.After(now) {
		deadline = notBefore
	}
	if !w.later.empty() && (deadline.IsZero() || w.laterAt.Before(deadline)) {
		deadline = w.laterAt
	}
	_ = w.events.SetReadDeadline(deadline)
	return false
}

// Run dumps everything, then hands on what happens, until the context is over (its error is
// returned) or the connection breaks. sink is called from this goroutine, with events in the
// kernel's order: each call has what was there to be read. The slice is the sink's to keep.
func (w *Watcher) Run(ctx context.Context, sink func([]Event)) error {
	defer w.Close()
	stop := context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.done = true
		w.wakeLocked()
	})
	defer stop()

	var due scopeSet
	due.add(Scope{})
	var notBefore time.Time // of the dumps that are due
	drained := true
	for {
		if w.take(&due, notBefore) {
			return ctx.Err()
		}
		// A dump waits until the queue of events is empty, so that many causes share it, but
		// not for ever.
		now := time.Now()
		if !due.empty() && !now.Before(notBefore) && (drained || now.Sub(notBefore) > maxDelay) {
			scopes := due.list()
			due, drained = scopeSet{}, false
			if err := w.resync(ctx, scopes, sink); err != nil {
				return err
			}
			notBefore = w.after(&due, sink)
			continue
		}
		batch, empty, err := w.read(!drained)
		drained = empty
		if err == nil && len(w.fdbs.due) > 0 {
			err = w.readFDBs(func(l *Link) { batch = append(batch, LinkSet{Link: l}) })
		}
		if err != nil {
			return err
		}
		if len(batch) > 0 {
			sink(batch)
		}
		waiting := !due.empty()
		if t := w.after(&due, sink); !waiting || t.After(notBefore) {
			notBefore = t
		}
	}
}

// maxDelay bounds how long a dump waits for a queue of events that does not get empty.
const maxDelay = 50 * time.Millisecond

// after moves what the last events or dump made necessary into due, and says from when on. A
// loss is told at once.
func (w *Watcher) after(due *scopeSet, sink func([]Event)) (notBefore time.Time) {
	notBefore = time.Now()
	if w.lost != nil {
		sink([]Event{Lost{Err: w.lost}})
		w.lost = nil
		due.add(Scope{})
		notBefore = notBefore.Add(w.retry.next(notBefore))
	}
	due.merge(w.losses.due)
	w.losses.due = scopeSet{}
	w.losses.forget()
	return notBefore
}

// batchMax bounds the events of one call of sink.
const batchMax = 4096

// read returns the events that are there, and whether it has emptied the queue. If there are
// none it waits, unless more is set, until the deadline.
func (w *Watcher) read(more bool) (batch []Event, drained bool, err error) {
	for wait := !more; len(batch) < batchMax; wait = false {
		var got bool
		batch, got, err = w.readOne(wait, batch)
		if err != nil {
			return batch, true, err
		}
		if !got {
			return batch, true, nil
		}
	}
	return batch, false, nil
}

// readOne reads one datagram of events and appends what it says. Losses are remembered; an
// error is for the connection.
func (w *Watcher) readOne(wait bool, to []Event) (_ []Event, got bool, err error) {
	b, got, err := w.events.receive(wait)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return to, false, nil
	case errors.Is(err, unix.ENOBUFS):
		w.overruns.Add(1)
		w.lose(fmt.Errorf("routes: events were dropped: %w", err))
		return to, true, nil
	case errors.Is(err, errTruncated):
		w.undecodable.Add(1)
		w.lose(fmt.Errorf("routes: read events: %w", err))
		return to, true, nil
	case err != nil:
		return to, false, fmt.Errorf("routes: read events: %w", err)
	}
	for len(b) > 0 {
		h, data, rest, err := nextMessage(b)
		b = rest
		var ev Event
		if err == nil {
			w.messages.Add(1)
			ev, err = w.decode(h, data)
		}
		if err != nil {
			w.undecodable.Add(1)
			w.lose(err)
			continue
		}
		if ev != nil {
			w.count(ev)
			w.losses.told(ev)
			to = append(to, ev)
		}
	}
	return to, got, nil
}

// decode decodes one message. Links say what is known of their forwarding database.
func (w *Watcher) decode(h Header, data []byte) (Event, error) {
	if h.Type == rtmNewNeigh || h.Type == rtmDelNeigh {
		e, ok, err := decodeFDB(h, data)
		if !ok {
			return nil, err
		}
		if l := w.fdbs.told(e); l != nil {
			return LinkSet{Link: l}, nil
		}
		return nil, nil
	}
	ev, err := w.dec.Decode(h, data)
	switch e := ev.(type) {
	case LinkSet:
		e.Link = w.fdbs.set(e.Link)
		return e, err
	case LinkGone:
		w.fdbs.gone(e.Index)
	}
	return ev, err
}

func (w *Watcher) lose(err error) {
	if w.lost == nil {
		w.lost = err
	}
}

func (w *Watcher) count(ev Event) {
	switch ev := ev.(type) {
	case RouteSet:
		w.told[ev.Route.Body.Family]++
		if ev.Route.Body.Family == IPv6 {
			w.adds++
		}
	case RouteGone:
		w.told[ev.Route.Body.Family]++
		if ev.Route.Body.Family == IPv6 {
			w.removals++
		}
	case LinkSet, LinkGone, AddrGone, NexthopGone:
		w.removals++ // may be silent ones
	}
}

// backoff spaces full dumps out where one loss follows the other: the first comes at once.
type backoff struct {
	n    int
	last time.Time
}

const (
	backoffMin   = 20 * time.Millisecond
	backoffMax   = 5 * time.Second
	backoffReset = 30 * time.Second
)

func (b *backoff) next(now time.Time) time.Duration {
	if now.Sub(b.last) > backoffReset {
		b.n = 0
	}
	b.last = now
	b.n++
	if b.n == 1 {
		return 0
	}
	return min(backoffMax, backoffMin<<min(b.n-2, 16))
}
