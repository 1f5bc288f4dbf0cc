package l2tp

import (
	"context"
	"errors"
	"fmt"
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

// The generic netlink family, its group and its commands (linux/l2tp.h), and the group in which
// the kernel tells of families that come and go (CTRL_CMD_NEWFAMILY).
const (
	familyName  = "l2tp"
	version     = 1
	cmdTunnels  = 4 // L2TP_CMD_TUNNEL_GET
	cmdSessions = 8 // L2TP_CMD_SESSION_GET

	ctrlGroup = unix.GENL_ID_CTRL
)

// A Watcher follows the L2TP sessions of one network namespace: the one of the thread that
// called NewWatcher. Resync and Close are safe for concurrent use; Run is called once.
//
//	groups "l2tp", ctrl ──> reader ──┐
//	Resync ──────────────────────────┼──> Run: dump ──> sink
//
// A notification is only a reason to look: the kernel sends those of all namespaces to each
// (genlmsg_multicast_allns), and says nothing of the sessions that go with a tunnel or a socket.
//
// A kernel without L2TP has no sessions. Its module is never asked for: a request by the name of
// the family would load it.
type Watcher struct {
	group    *genetlink.Conn
	requests *genetlink.Conn
	family   genetlink.Family // with ID 0 if there is none

	again chan struct{}
	stats struct{ notifications, dumps, overruns, undecodable atomic.Uint64 }
}

// Stats counts what a Watcher saw.
type Stats struct {
	Notifications uint64
	Dumps         uint64 // complete ones
	Overruns      uint64 // receive buffer overflows (ENOBUFS)
	Undecodable   uint64 // dumps in which something made no sense
}

// Stats returns the counters. It is safe for concurrent use.
func (w *Watcher) Stats() Stats {
	return Stats{
		Notifications: w.stats.notifications.Load(), Dumps: w.stats.dumps.Load(),
		Overruns: w.stats.overruns.Load(), Undecodable: w.stats.undecodable.Load(),
	}
}

// NewWatcher subscribes in the network namespace of the calling thread; what happens from now on
// is not missed. Close it also if Run is never called.
func NewWatcher() (*Watcher, error) {
	group, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("l2tp: dial generic netlink: %w", err)
	}
	requests, err := genetlink.Dial(nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("l2tp: dial generic netlink: %w", err), group.Close())
	}
	w := &Watcher{group: group, requests: requests, again: make(chan struct{}, 1)}
	if err := group.JoinGroup(ctrlGroup); err != nil {
		return nil, errors.Join(fmt.Errorf("l2tp: follow the families: %w", err), w.Close())
	}
	return w, nil
}

// Close closes the sockets. Cancel the context of Run first.
func (w *Watcher) Close() error { return errors.Join(w.group.Close(), w.requests.Close()) }

// Resync asks for another look. It never blocks; requests that come before it are one.
func (w *Watcher) Resync() {
	select {
	case w.again <- struct{}{}:
	default:
	}
}

const (
	minRetry = 100 * time.Millisecond
	maxRetry = 30 * time.Second
)

// Run reads the sessions and then follows them, until ctx is cancelled, which is the error that
// it returns then, or until the socket can't be read any more. It closes the Watcher. sink is
// called from this goroutine only, and only if the sessions differ from those told last, or after
// a loss; the first look is always told.
func (w *Watcher) Run(ctx context.Context, sink func([]Event)) error {
	defer w.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer cancel(nil)
	// A deadline in the past ends the receives that are under way, on both sockets.
	stop := context.AfterFunc(ctx, func() {
		past := time.Unix(1, 0)
		_ = w.group.SetReadDeadline(past)
		_ = w.requests.SetReadDeadline(past)
	})
	defer stop()
	reader.Go(func() { w.read(ctx, cancel) })

	var told []Session
	first, lost := true, false
	wait := minRetry
	retry := time.NewTimer(0) // the first look
	defer retry.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-w.again:
			asked = true
		case <-retry.C:
		}
		sessions, err := w.look()
		switch {
		case ctx.Err() != nil:
		case err != nil:
			if !lost {
				lost = true
				sink([]Event{Lost{err}})
			}
			retry.Reset(wait)
			wait = min(2*wait, maxRetry)
		default:
			w.stats.dumps.Add(1)
			if first || lost || !slices.Equal(told, sessions) {
				sink([]Event{SessionsSet{slices.Clone(sessions)}})
			}
			told, first, lost, wait = sessions, false, false, minRetry
			retry.Stop()
			if asked {
				// The kernel tells that a session or tunnel goes before it goes, and a worker takes it away
				// later (l2tp_nl_cmd_session_delete, l2tp_session_delete): one more look finds it gone.
				retry.Reset(lookAgain)
			}
		}
	}
}

// lookAgain is how long after a notification there is a second look.
const lookAgain = 200 * time.Millisecond

// maxFailures is how many receives in a row may fail before the socket is given up.
const maxFailures = 16

// read has another look made for each notification, until ctx is cancelled. What it lost is
// found by that look.
func (w *Watcher) read(ctx context.Context, fail context.CancelCauseFunc) {
	failures := 0
	for {
		msgs, _, err := w.group.Receive()
		errno := unix.Errno(0)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			failures = 0
			w.stats.notifications.Add(uint64(len(msgs)))
		case errors.Is(err, unix.ENOBUFS):
			w.stats.overruns.Add(1)
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrClosed), !errors.As(err, &errno), failures == maxFailures:
			fail(fmt.Errorf("l2tp: receive notifications: %w", err))
			return
		default:
			failures++
		}
		w.Resync()
	}
}

// look reads all sessions; none if the kernel has no L2TP.
func (w *Watcher) look() ([]Session, error) {
	if w.family.ID == 0 {
		if err := w.find(); err != nil || w.family.ID == 0 {
			return nil, err
		}
	}
	sessions, err := w.dump()
	if errors.Is(err, unix.ENOENT) { // the module was removed; when it comes back, ctrl says so
		w.family = genetlink.Family{}
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("l2tp: read the sessions: %w", err)
	}
	return sessions, nil
}

// find looks for the family among those that the kernel has, and joins its group.
func (w *Watcher) find() error {
	families, err := w.requests.ListFamilies()
	if err != nil {
		return fmt.Errorf("l2tp: list the netlink families: %w", err)
	}
	for _, f := range families {
		if f.Name != familyName {
			continue
		}
		for _, g := range f.Groups {
			if err := w.group.JoinGroup(g.ID); err != nil {
				return fmt.Errorf("l2tp: join group %s: %w", g.Name, err)
			}
		}
		w.family = f
	}
	return nil
}

func (w *Watcher) dump() ([]Session, error) {
	tunnels := map[uint32]tunnel{}
	err := w.each(cmdTunnels, func(b []byte) error {
		t, err := decodeTunnel(b)
		tunnels[t.id] = t
		return err
	})
	if err != nil {
		return nil, err
	}
	var out []Session
	err = w.each(cmdSessions, func(b []byte) error {
		s, err := decodeSession(b)
		if err != nil {
			return err
		}
		if t, there := tunnels[s.tunnel]; there { // one that isn't came meanwhile: its notification is on the way
			if full, ok := join(t, s); ok {
				out = append(out, full)
			}
		}
		return nil
	})
	slices.SortFunc(out, Session.Compare)
	return out, err
}

func (w *Watcher) each(command uint8, f func([]byte) error) error {
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: version}}
	msgs, err := w.requests.Execute(m, w.family.ID, netlink.Request|netlink.Dump)
	if err != nil {
		return err
	}
	for _, m := range msgs {
		if err := f(m.Data); err != nil {
			w.stats.undecodable.Add(1)
			return fmt.Errorf("decode: %w", err)
		}
	}
	return nil
}
