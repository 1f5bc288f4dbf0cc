package clamp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// groupNFTables is NFNLGRP_NFTABLES (linux/netfilter/nfnetlink.h).
const groupNFTables = 7

// Watcher hears of changes of our table, whoever made them. Close may be called at any time.
type Watcher struct {
	c *netlink.Conn
}

// Watch subscribes in the network namespace of the calling thread.
func Watch() (*Watcher, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("clamp: watch nfnetlink: %w", err)
	}
	if err := errors.Join(c.SetReadBuffer(4<<20), c.JoinGroup(groupNFTables)); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("clamp: watch nfnetlink: %w", err)
	}
	return &Watcher{c}, nil
}

// Close ends the subscription, and Run with it.
func (w *Watcher) Close() error { return w.c.Close() }

// Run calls changed after each change of our table, and after events were lost, until the context
// or the subscription ends. What has changed is not told: read the table. The error is nil if the
// context is over.
func (w *Watcher) Run(ctx context.Context, changed func()) error {
	// A deadline in the past unblocks the Receive; Close would take the socket from its owner.
	stop := context.AfterFunc(ctx, func() { _ = w.c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		msgs, err := w.c.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed()
			continue
		case err != nil:
			return fmt.Errorf("clamp: watch: %w", err)
		}
		for _, m := range msgs {
			if concerns(m) {
				changed()
				break
			}
		}
	}
}

// concerns reports whether a notification is about our table. All objects of nftables name their
// table in their first attribute (NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE,
// NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE are all 1). The message at the end of a transaction,
// NFT_MSG_NEWGEN, has a number there, and is of no family.
func concerns(m netlink.Message) bool {
	const nfgenmsgLen = 4
	if uint16(m.Header.Type)>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfgenmsgLen || m.Data[0] != unix.NFPROTO_INET {
		return false
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[nfgenmsgLen:])
	if err != nil {
		return false
	}
	for ad.Next() {
		if ad.Type() == 1 {
			return bytes.Equal(bytes.TrimRight(ad.Bytes(), "\x00"), []byte(Name))
		}
	}
	return false
}
