package ethtool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// receiveBuffer is the size of the socket buffer for notifications. The default of 208 KiB
	// overflows at a few hundred messages (KERNEL.md 25).
	receiveBuffer = 4 << 20
	// messageBuffer is larger than any notification of the family.
	messageBuffer = 64 << 10
	// maxBatch bounds how many notifications one call of the sink gets.
	maxBatch = 256
)

// A Watcher follows the features of all devices of one network namespace: the one of the thread
// that called NewWatcher. Resync, Look and Close are safe for concurrent use; Run is called
// once.
//
//	monitor group ──> reader ──┐
//	Resync, Look ──────────────┼──> Run ──> sink
//	request socket <── dumps ──┘
//
// The kernel notifies of a change of the active features only. A request that sticks while a
// dependency is down changes the wanted bits in silence, and a new device has no notification:
// that is what Resync and Look are for.
type Watcher struct {
	group  *genetlink.Conn
	client *Client

	resync  chan struct{}
	looking chan struct{}
	mu      sync.Mutex
	look    map[Ifindex]struct{}

	stats struct{ notifications, dumps, overruns, undecodable atomic.Uint64 }
}

// Stats counts what a Watcher saw.
type Stats struct {
	Notifications uint64 // of features
	Dumps         uint64 // complete ones
	Overruns      uint64 // receive buffer overflows (ENOBUFS)
	Undecodable   uint64 // notifications that made no sense
}

// Stats returns the counters. It is safe for concurrent use.
func (w *Watcher) Stats() Stats {
	return Stats{
		Notifications: w.stats.notifications.Load(), Dumps: w.stats.dumps.Load(),
		Overruns: w.stats.overruns.Load(), Undecodable: w.stats.undecodable.Load(),
	}
}

// NewWatcher subscribes to the notifications in the network namespace of the calling thread;
// what happens from now on is not missed. Close it also if Run is never called.
func NewWatcher() (*Watcher, error) {
	client, err := Dial()
	if err != nil {
		return nil, err
	}
	group, err := genetlink.Dial(&netlink.Config{MessageBufferSize: messageBuffer})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ethtool: dial generic netlink: %w", err), client.Close())
	}
	w := newWatcher(group, client)
	if err := w.subscribe(); err != nil {
		return nil, errors.Join(fmt.Errorf("ethtool: subscribe to notifications: %w", err), w.Close())
	}
	return w, nil
}

func newWatcher(group *genetlink.Conn, client *Client) *Watcher {
	return &Watcher{
		group: group, client: client,
		resync:  make(chan struct{}, 1),
		looking: make(chan struct{}, 1),
		look:    map[Ifindex]struct{}{},
	}
}

// subscribe enlarges the receive buffer and joins the group "monitor".
func (w *Watcher) subscribe() error {
	// Without CAP_NET_ADMIN the limit of net.core.rmem_max stays; then there are resyncs more.
	if err := w.forceReadBuffer(); err != nil {
		_ = w.group.SetReadBuffer(receiveBuffer)
	}
	for _, group := range w.client.family.Groups {
		if group.Name == unix.ETHTOOL_MCGRP_MONITOR_NAME {
			return w.group.JoinGroup(group.ID)
		}
	}
	return fmt.Errorf("the family has no group %q: %w", unix.ETHTOOL_MCGRP_MONITOR_NAME, os.ErrNotExist)
}

func (w *Watcher) forceReadBuffer() error {
	raw, err := w.group.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	})
	return errors.Join(err, serr)
}

// Close closes the sockets. Cancel the context of Run first.
func (w *Watcher) Close() error { return errors.Join(w.group.Close(), w.client.Close()) }

// Resync asks for a full dump. It never blocks; requests that come before the dump are one.
func (w *Watcher) Resync() { poke(w.resync) }

// Look asks for one device to be read again, for instance because its link has just appeared.
// It never blocks; requests for the same device that come before it is read are one. The
// answer is a FeaturesSet, or Gone if there is no such device.
func (w *Watcher) Look(index Ifindex) {
	if index <= 0 {
		return
	}
	w.mu.Lock()
	w.look[index] = struct{}{}
	w.mu.Unlock()
	poke(w.looking)
}

// poke sets a flag that is a channel of size one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// A delivery is what one receive on the group's socket brought.
type delivery struct {
	msgs []genetlink.Message
	err  error
}

// Run dumps the features of all devices and then follows them, until ctx is cancelled, which is
// the error that it returns then, or until the notification socket can't be read any more.
//
// Run closes the Watcher. sink is called from this goroutine only; the slice is the sink's to keep. Changes are told in
// the order in which the kernel made them. A notification that was queued when a dump or a
// request ran may be older than what that found; the newer notification that makes up for it
// follows right behind.
func (w *Watcher) Run(ctx context.Context, sink func([]Event)) error {
	defer w.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	deliveries := make(chan delivery, 64)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer cancel(nil)
	// A deadline in the past ends the receives that are under way, on both sockets.
	stop := context.AfterFunc(ctx, func() {
		past := time.Unix(1, 0)
		_ = w.group.SetReadDeadline(past)
		_ = w.client.conn.SetReadDeadline(past)
	})
	defer stop()
	reader.Go(func() { w.read(ctx, cancel, deliveries) })

	run := &watchRun{Watcher: w, sink: sink, retry: time.NewTimer(0)}
	defer run.retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case d := <-deliveries:
			run.deliver(d, deliveries)
		case <-w.resync:
			run.dump(ctx)
		case <-run.retry.C:
			// The first time round this is the dump that everything begins with.
			run.dump(ctx)
		case <-w.looking:
			run.lookup(ctx)
		}
	}
}

// maxFailures is how many receives in a row may fail before the socket is given up.
const maxFailures = 16

// read hands over what the group's socket receives, until ctx is cancelled. It cancels ctx if
// the socket is of no more use.
func (w *Watcher) read(ctx context.Context, fail context.CancelCauseFunc, out chan<- delivery) {
	failures := 0
	for {
		msgs, _, err := w.group.Receive()
		errno := unix.Errno(0)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, unix.ENOBUFS):
			// The kernel reports the overflow before it hands out what is still queued. That is
			// older than what was lost, and older than the dump that follows: away with it.
			w.stats.overruns.Add(1)
			w.drain()
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrClosed):
			fail(fmt.Errorf("ethtool: receive notifications: %w", err))
			return
		case errors.As(err, &errno):
			if failures++; failures > maxFailures {
				fail(fmt.Errorf("ethtool: receive notifications: %w", err))
				return
			}
		default:
			failures = 0
		}
		select {
		case out <- delivery{msgs, err}:
		case <-ctx.Done():
			return
		}
	}
}

// drain throws away what the group's socket has queued. An overflow that happens meanwhile is
// reported by the next receive or is part of this one.
func (w *Watcher) drain() {
	raw, err := w.group.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		var b [1]byte
		// The bound is for a socket that is filled faster than it can be emptied.
		for range 1 << 16 {
			_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			if err != nil && err != unix.ENOBUFS && err != unix.EINTR {
				return
			}
		}
	})
}

// A watchRun is the state of one Run; only its goroutine touches it.
type watchRun struct {
	*Watcher
	sink func([]Event)
	// stale is set from Lost to the next ResyncEnd.
	stale   bool
	retry   *time.Timer
	backoff backoff
}

// deliver passes on the first delivery and what is ready behind it.
func (r *watchRun) deliver(d delivery, more <-chan delivery) {
	var events []Event
	for {
		if d.err != nil {
			events = r.lost(events, d.err)
		}
		for _, m := range d.msgs {
			// The group has the notifications of rings, coalescing, pause … as well.
			if m.Header.Command != unix.ETHTOOL_MSG_FEATURES_NTF {
				continue
			}
			r.stats.notifications.Add(1)
			f, _, err := decodeFeatures(m.Data, r.client.names)
			if err != nil {
				r.stats.undecodable.Add(1)
				events = r.lost(events, fmt.Errorf("ethtool: decode a notification: %w", err))
				continue
			}
			events = append(events, FeaturesSet{f})
		}
		if len(events) >= maxBatch {
			break
		}
		select {
		case d = <-more:
			continue
		default:
		}
		break
	}
	r.send(events)
}

// lost appends Lost, once until the next complete dump, and has that dump made.
func (r *watchRun) lost(events []Event, err error) []Event {
	if r.stale {
		return events
	}
	r.stale = true
	r.retry.Reset(r.backoff.next(time.Now()))
	return append(events, Lost{err})
}

// dump sends a full dump. If it fails, nothing of it is sent, and it is tried again later.
func (r *watchRun) dump(ctx context.Context) {
	events := []Event{ResyncBegin{}}
	err := r.client.All(func(f *Features) error {
		events = append(events, FeaturesSet{f})
		return nil
	})
	switch {
	case ctx.Err() != nil:
	case err != nil && r.stale:
		r.retry.Reset(r.backoff.next(time.Now()))
	case err != nil:
		r.send(r.lost(nil, err))
	default:
		r.stats.dumps.Add(1)
		r.stale = false
		r.retry.Stop()
		r.send(append(events, ResyncEnd{}))
	}
}

// lookup reads the devices that Look asked for, in the order of their indices.
func (r *watchRun) lookup(ctx context.Context) {
	r.mu.Lock()
	look := r.look
	r.look = map[Ifindex]struct{}{}
	r.mu.Unlock()

	var events []Event
	for _, index := range slices.Sorted(maps.Keys(look)) {
		f, err := r.client.Features(Device{Index: index})
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, os.ErrNotExist) {
			events = append(events, Gone{index})
			continue
		}
		if err != nil {
			// The dump that follows covers the rest.
			events = r.lost(events, err)
			break
		}
		events = append(events, FeaturesSet{f})
	}
	r.send(events)
}

func (r *watchRun) send(events []Event) {
	if len(events) > 0 {
		r.sink(events)
	}
}

const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 5 * time.Second
	// backoffQuiet without a loss makes the next loss the first again.
	backoffQuiet = 30 * time.Second
)

// A backoff says how long to wait before the next dump: not at all after the first loss, twice
// as long each time if they follow close.
type backoff struct {
	delay time.Duration
	last  time.Time
}

func (b *backoff) next(now time.Time) time.Duration {
	if b.last.IsZero() || now.Sub(b.last) > backoffQuiet {
		b.delay = 0
	} else {
		b.delay = min(max(2*b.delay, minBackoff), maxBackoff)
	}
	b.last = now
	return b.delay
}
