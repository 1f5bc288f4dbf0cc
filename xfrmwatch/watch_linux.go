package xfrmwatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Options says where and how a Watcher listens. The zero value is the calling thread's network
// namespace with the default buffer.
type Options struct {
	// NetNS is the file descriptor of a network namespace, 0 for that of the calling thread.
	// It is used by Dial only and stays the caller's.
	NetNS int
	// ReadBuffer is the size of the kernel's buffer for events in bytes, 0 for 32 MiB. 3000
	// policies added at once overflow the system's default.
	ReadBuffer int
}

// Stats counts what a Watcher saw since Dial.
type Stats struct {
	Events      uint64 // delivered to the sink, those of dumps included
	Dumps       uint64 // full dumps that were begun
	Overruns    uint64 // receive buffer overflows (ENOBUFS)
	Undecodable uint64 // messages that Decode refused
}

// Watcher follows the XFRM configuration of one network namespace. Run may be called once;
// Resync, Stats and Close are safe for concurrent use.
type Watcher struct {
	events, requests *sock
	wanted           atomic.Bool // a resync is asked for
	stats            struct{ events, dumps, overruns, undecodable atomic.Uint64 }
	batch            []Event
	lost             error     // the last loss since the last dump began
	again            bool      // a dump is needed: at the start, after a loss, after a flush
	rest             time.Time // no dump before this
	backoff          time.Duration
}

const (
	defaultReadBuffer = 32 << 20
	chunk             = 1024 // events that are delivered at once at most, about
	minBackoff        = 10 * time.Millisecond
	maxBackoff        = 5 * time.Second
)

// The multicast groups (XFRMNLGRP_*, linux/xfrm.h). Acquires, replay counters and reports change
// nothing here.
var groups = map[string]uint32{"expire": 2, "sa": 3, "policy": 4, "migrate": 7, "mapping": 8}

// Dial subscribes to the XFRM events of a network namespace. The caller must keep its goroutine
// on its thread (runtime.LockOSThread) if that thread's namespace is meant and not the process's.
// The error wraps EPERM where CAP_NET_ADMIN is missing, EPROTONOSUPPORT where the kernel has no
// XFRM.
func Dial(opts Options) (w *Watcher, err error) {
	w = &Watcher{again: true}
	defer func() {
		if err != nil {
			_ = w.Close()
			w = nil
		}
	}()
	if w.events, err = dialSock(opts.NetNS); err != nil {
		return w, fmt.Errorf("xfrmwatch: dial: %w", err)
	}
	if w.requests, err = dialSock(opts.NetNS); err != nil {
		return w, fmt.Errorf("xfrmwatch: dial: %w", err)
	}
	size := opts.ReadBuffer
	if size == 0 {
		size = defaultReadBuffer
	}
	// SO_RCVBUFFORCE, and SO_RCVBUF where that is not allowed.
	if err = w.events.conn.SetReadBuffer(size); err != nil {
		return w, fmt.Errorf("xfrmwatch: set receive buffer: %w", err)
	}
	for name, group := range groups {
		if err = w.events.conn.JoinGroup(group); err != nil {
			return w, permission(fmt.Errorf("xfrmwatch: join group %s: %w", name, err))
		}
	}
	return w, nil
}

// permission names the capability that is missing.
func permission(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w (CAP_NET_ADMIN is missing)", err)
	}
	return err
}

// Close releases the sockets and makes Run return. Run closes them itself.
func (w *Watcher) Close() error {
	var errs []error
	for _, s := range []*sock{w.events, w.requests} {
		if s != nil {
			if err := s.close(); err != nil && !errors.Is(err, os.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Resync asks for a full dump. It does not wait, and several calls before the dump ask once.
func (w *Watcher) Resync() {
	w.wanted.Store(true)
	w.events.setReadDeadline(past)
}

// past is a deadline that interrupts a read at once. Whoever sets it has set a flag (wanted, the
// context) before; Run clears it before it looks at the flags, so no wake-up is lost.
var past = time.Unix(1, 0)

// Stats returns the counters.
func (w *Watcher) Stats() Stats {
	return Stats{
		Events:      w.stats.events.Load(),
		Dumps:       w.stats.dumps.Load(),
		Overruns:    w.stats.overruns.Load(),
		Undecodable: w.stats.undecodable.Load(),
	}
}

// Run dumps all, then follows the events, and calls sink with each batch, in order, from one
// goroutine. The sink owns the slice. While it works, events wait in the kernel's buffer. Run
// returns the context's error when that ends, or the first error of a closed socket; it never
// gives up otherwise. It closes the Watcher.
//
// Whatever makes the picture incomplete leads to a full dump: an overflow, an undecodable message
// or a failed dump after Lost; a flush or a migration, which do not say enough, without it. Dumps
// rest in between for as long as they take, and longer while they fail.
func (w *Watcher) Run(ctx context.Context, sink func([]Event)) error {
	defer w.Close()
	stop := context.AfterFunc(ctx, func() {
		w.events.setReadDeadline(past)
		w.requests.setReadDeadline(past)
	})
	defer stop()
	for {
		if w.again && !time.Now().Before(w.rest) {
			if err := w.resync(ctx, sink); err != nil {
				return err
			}
		}
		var deadline time.Time
		if w.again {
			deadline = w.rest
		}
		w.events.setReadDeadline(deadline)
		if err := ctx.Err(); err != nil {
			return err
		}
		if w.wanted.Swap(false) {
			w.again = true
			continue
		}
		if w.again && !time.Now().Before(w.rest) {
			continue
		}
		// What is there already comes in the same batch.
		for err := w.follow(true, sink); !errors.Is(err, errEmpty); err = w.follow(false, sink) {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break // the flags say why
			}
			if err != nil {
				return w.ended(ctx, err)
			}
		}
		w.deliver(sink)
	}
}

func (w *Watcher) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("xfrmwatch: %w", err)
}

// follow takes one datagram from the event socket into the batch. Losses become events; the
// errors that remain are errEmpty, os.ErrDeadlineExceeded and those that end Run, as that of a
// closed socket.
func (w *Watcher) follow(wait bool, sink func([]Event)) error {
	b, err := w.events.receive(wait)
	switch {
	case err == nil:
	case errors.Is(err, unix.ENOBUFS):
		w.stats.overruns.Add(1)
		w.lose(err)
		return nil
	case errors.Is(err, errTruncated), errors.Is(err, unix.ENOMEM):
		w.lose(err)
		return nil
	default:
		return err
	}
	w.take(b)
	if len(w.batch) >= chunk {
		w.deliver(sink)
	}
	return nil
}

// take decodes the messages of one datagram into the batch.
func (w *Watcher) take(datagram []byte) {
	err := messages(datagram, func(m message) bool {
		if m.typ < unix.NLMSG_MIN_TYPE { // no answers are expected here
			return true
		}
		ev, resync, err := Decode(m.typ, m.data)
		if err != nil {
			w.stats.undecodable.Add(1)
			w.lose(err)
		}
		w.again = w.again || resync
		if ev != nil {
			w.batch = append(w.batch, ev)
		}
		return true
	})
	if err != nil {
		w.stats.undecodable.Add(1)
		w.lose(err)
	}
}

// lose says that events were lost, once in a row.
func (w *Watcher) lose(err error) {
	w.again, w.lost = true, err
	if n := len(w.batch); n > 0 {
		if _, ok := w.batch[n-1].(Lost); ok {
			return
		}
	}
	w.batch = append(w.batch, Lost{fmt.Errorf("xfrmwatch: events lost: %w", err)})
}

func (w *Watcher) deliver(sink func([]Event)) {
	if len(w.batch) == 0 {
		return
	}
	w.stats.events.Add(uint64(len(w.batch)))
	batch := w.batch
	w.batch = nil
	sink(batch)
}

// drain takes all that is in the event socket. It must reach the end of the queue: after an
// overflow the kernel drops events in silence until the queue was empty once
// (NETLINK_S_CONGESTED, net/netlink/af_netlink.c).
func (w *Watcher) drain(ctx context.Context, sink func([]Event)) error {
	for {
		switch err := w.follow(false, sink); {
		case err == nil:
		case errors.Is(err, errEmpty):
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			w.events.setReadDeadline(time.Time{})
			if ctx.Err() != nil {
				return ctx.Err()
			}
		default:
			return w.ended(ctx, err)
		}
	}
}

// resync dumps all, between ResyncBegin and ResyncEnd. The events that came meanwhile are
// delivered before the end, so that a reader of the fresh state never sees less than there is:
// what was added or changed after the dump had passed its place in the kernel's list is in the
// queue by then. Where the result may be incomplete, Lost follows the end and another dump that.
func (w *Watcher) resync(ctx context.Context, sink func([]Event)) error {
	// What is in the queue is older than the dump: its flushes and losses are covered by it.
	if err := w.drain(ctx, sink); err != nil {
		return err
	}
	w.again, w.lost = false, nil
	w.wanted.Store(false)
	began := time.Now()
	w.stats.dumps.Add(1)
	w.batch = append(w.batch, ResyncBegin{})
	suspect, err := w.dump(sink)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrClosed):
		return w.ended(ctx, err)
	case err != nil:
		w.lose(permission(err))
	default:
		if err := w.drain(ctx, sink); err != nil {
			return err
		}
		w.batch = append(w.batch, ResyncEnd{})
		// A Lost that came during the dump stands before the end, which would cancel it.
		if lost := cmp.Or(suspect, w.lost); lost != nil {
			w.lose(lost)
		}
	}
	w.deliver(sink)
	w.pause(began, w.lost != nil)
	return nil
}

// pause sets the earliest time of the next dump: after a rest as long as this one took, and with
// a growing backoff while dumps fail.
func (w *Watcher) pause(began time.Time, failed bool) {
	now := time.Now()
	if failed {
		w.backoff = min(max(2*w.backoff, minBackoff), maxBackoff)
	} else {
		w.backoff = 0
	}
	w.rest = now.Add(max(now.Sub(began), w.backoff))
}

// dump asks for policies, SAs and the default action. suspect is an error that leaves the dump
// usable but perhaps incomplete.
func (w *Watcher) dump(sink func([]Event)) (suspect, err error) {
	take := func(m message) {
		ev, _, err := Decode(m.typ, m.data)
		if err != nil {
			w.stats.undecodable.Add(1)
			suspect = err
		}
		switch ev := ev.(type) {
		case PolicySet:
			ev.Dumped = true
			w.batch = append(w.batch, ev)
		case SASet:
			ev.Dumped = true
			w.batch = append(w.batch, ev)
		case DefaultSet:
			w.batch = append(w.batch, ev)
		}
		if len(w.batch) >= chunk {
			w.deliver(sink)
		}
	}
	// One dump gives policies of all types and directions (XFRM_POLICY_TYPE_ANY in
	// xfrm_dump_policy_start); the other gives the SAs of all protocols.
	for _, typ := range []uint16{msgGetPolicy, msgGetSA} {
		intr, err := w.requests.request(typ, netlink.Dump, nil, take)
		if err != nil {
			return nil, fmt.Errorf("dump %#x: %w", typ, err)
		}
		if intr {
			suspect = errors.New("dump was interrupted")
		}
	}
	// Since 5.15; an older kernel has no default but allow.
	_, err = w.requests.request(msgGetDefault, 0, make([]byte, 4), take)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP),
		errors.Is(err, unix.ENOPROTOOPT):
		w.batch = append(w.batch, DefaultSet{})
	case err != nil:
		return nil, fmt.Errorf("get default: %w", err)
	}
	return suspect, nil
}
