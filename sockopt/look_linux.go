package sockopt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The states that are dumped (masks of TCP_* in net/tcp_states.h): those in which a socket holds
// keys. A socket in TIME_WAIT or NEW_SYN_RECV is no full one, and one in CLOSE is in no table.
const (
	listening = 1 << Listen
	connected = 1<<1 | 1<<2 | 1<<4 | 1<<5 | 1<<8 | 1<<9 | 1<<11 // ESTABLISHED, SYN_SENT, FIN_WAIT*, CLOSE_WAIT, LAST_ACK, CLOSING
)

// errBlind says that the kernel leaves out what it shows to CAP_NET_ADMIN alone.
var errBlind = fmt.Errorf("%w (CAP_NET_ADMIN is missing)", unix.EPERM)

// look reads the keys. A dump goes through the kernel's tables in steps, and where sockets come and
// go between two steps it can miss one that was there all the time. So a key that was known and is
// not seen is looked for once more, thoroughly, before it is believed to be gone.
func (w *Watcher) look(known []Key, thorough bool) (KeysSet, error) {
	c := newCollector(w.trust(), known)
	now, err := w.read(c, thorough)
	if err == nil && lacks(now.Keys, known) {
		var more KeysSet
		more, err = w.read(newCollector(c.trust, known), true)
		more.Keys = c.union(now.Keys, more.Keys)
		more.Over, more.OverOthers = more.Over || now.Over, more.OverOthers || now.OverOthers
		now = more
	}
	if err == nil && now.Hidden > 0 {
		now.Keys = c.keep(now.Keys, known)
	}
	return now, err
}

// read dumps all sockets of both families once, the listeners first.
func (w *Watcher) read(c *collector, thorough bool) (KeysSet, error) {
	hidden := 0
	for _, states := range []uint32{listening, connected} {
		for _, family := range []byte{afInet, afInet6} {
			n, err := w.readAll(family, states, c, thorough || states == listening)
			if err != nil {
				if family == afInet6 && errors.Is(err, unix.ENOENT) {
					continue // a kernel without IPv6
				}
				return KeysSet{}, err
			}
			hidden += n
		}
	}
	w.stats.sockets.Store(int64(c.sockets))
	w.stats.hidden.Store(int64(hidden))
	return KeysSet{Keys: c.set(), Hidden: hidden, Over: c.over[trusted], OverOthers: c.over[other]}, nil
}

// readAll dumps the sockets in some states. Thoroughly, it doesn't trust the dump: one ends in
// silence, as if that were all, at a socket whose keys don't fit into 32 KiB (about 320 of them;
// inet_diag_dump_icsk, net/ipv4/inet_diag.c, and netlink_dump), which anybody can make. So all
// sockets are listed without their keys, and those that were not seen are asked for one by one. It
// returns how many of those the kernel can't show.
func (w *Watcher) readAll(family byte, states uint32, c *collector, thorough bool) (hidden int, err error) {
	if !thorough {
		return 0, w.dump(family, states, c, nil)
	}
	var seen []uint64
	if err := w.dump(family, states, c, &seen); err != nil {
		return 0, err
	}
	slices.Sort(seen)
	var unseen [][idLen]byte
	_, err = w.dumpIDs(family, states, func(id [idLen]byte) {
		if _, ok := slices.BinarySearch(seen, binary.NativeEndian.Uint64(id[idCookie:])); !ok {
			unseen = append(unseen, id)
		}
	})
	if err != nil {
		return 0, err
	}
	for _, id := range unseen {
		ok, err := w.one(family, states, id, c)
		if err != nil {
			return 0, err
		}
		if !ok {
			hidden++
		}
	}
	return hidden, nil
}

// dump adds the sockets in some states to the collector, and the cookies of those that made sense
// to seen, if it is not nil.
func (w *Watcher) dump(family byte, states uint32, c *collector, seen *[]uint64) error {
	var s sock
	blind := false
	err := w.askAll(request(family, states, true, nil), func(b []byte) {
		if err := s.decode(b); err != nil {
			w.stats.undecodable.Add(1)
			return
		}
		blind = blind || !s.trusted
		if states&(1<<s.state) == 0 {
			return // it has moved on since the kernel chose it
		}
		c.add(&s)
		if seen != nil {
			*seen = append(*seen, s.cookie)
		}
	})
	if err == nil && blind {
		err = errBlind
	}
	return err
}

// askAll dumps.
func (w *Watcher) askAll(req []byte, f func([]byte)) error {
	intr, err := w.diag.ask(req, netlink.Dump, f)
	if intr {
		w.stats.interrupted.Add(1)
	}
	return err
}

// dumpIDs lists the sockets in some states, without what they hold.
func (w *Watcher) dumpIDs(family byte, states uint32, f func(id [idLen]byte)) (n int, err error) {
	err = w.askAll(request(family, states, false, nil), func(b []byte) {
		if len(b) >= msgLen {
			n++
			f([idLen]byte(b[msgID:]))
		}
	})
	return n, err
}

// one adds one socket to the collector. It is false if the kernel has it and can't show it.
func (w *Watcher) one(family byte, states uint32, id [idLen]byte, c *collector) (bool, error) {
	var s sock
	ok := true
	_, err := w.diag.ask(request(family, states, true, &id), 0, func(b []byte) {
		if err := s.decode(b); err != nil {
			w.stats.undecodable.Add(1)
			ok = false
			return
		}
		if states&(1<<s.state) != 0 {
			c.add(&s)
		}
	})
	switch {
	case errors.Is(err, unix.ESTALE):
		// Another has its addresses. One of several listeners on a port (SO_REUSEPORT) can't be asked for.
		return states != listening, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL):
		return true, nil // it is gone
	case errors.Is(err, unix.EMSGSIZE): // it got a key between the kernel's two looks at it
		return false, nil
	}
	return ok, err
}

// request is a struct inet_diag_req_v2: a dump, or the question for the socket id.
func request(family byte, states uint32, keys bool, id *[idLen]byte) []byte {
	b := make([]byte, reqLen)
	b[reqFamily], b[reqProtocol] = family, unix.IPPROTO_TCP
	if keys {
		b[reqExt] = 1 << (attrInfo - 1)
	}
	binary.NativeEndian.PutUint32(b[reqStates:], states)
	if id != nil {
		copy(b[reqID:], id[:])
	}
	return b
}
