package lane

import (
	"context"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A Watcher tells of changes of qdiscs and filters in the network namespace in which it was
// made. It is not safe for concurrent use, but for Close.
type Watcher struct{ conn *netlink.Conn }

// Watch subscribes in the network namespace of the calling thread.
func Watch() (*Watcher, error) {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: 1 << (unix.RTNLGRP_TC - 1)})
	if err != nil {
		return nil, fmt.Errorf("lane: watch traffic control: %w", err)
	}
	return &Watcher{conn}, nil
}

// Close ends Run.
func (w *Watcher) Close() error { return w.conn.Close() }

// Run calls f with the ifindex of each device whose qdiscs or filters somebody changed, with 0
// where events were lost, until the context ends or the socket fails. It closes the watcher when
// the context ends.
func (w *Watcher) Run(ctx context.Context, f func(nic int32)) error {
	stop := context.AfterFunc(ctx, func() { _ = w.conn.Close() })
	defer stop()
	for {
		msgs, err := w.conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			f(0)
			continue
		case err != nil:
			return fmt.Errorf("lane: watch traffic control: %w", err)
		}
		for _, m := range msgs {
			if t, _, err := decodeTcmsg(m.Data); err == nil && t.index != 0 {
				f(t.index)
			}
		}
	}
}
