package bench

import (
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// movedClones watches the agent's clones follow the routes of a storm: a lock that comes after its route has moved may come too late for
// new connections. A reader of its own sees the agent's writes and no others (the kernel filters them), so that it costs next to nothing.
type movedClones struct {
	sock    *sock
	end     atomic.Bool
	done    chan error
	written []batchTime
	seen    []sighting
}

// batchTime is when the routes up to a number went to the kernel, all in one system call.
type batchTime struct {
	next int
	at   time.Time
}

// sighting is a clone that was written.
type sighting struct {
	dst netip.Prefix
	at  time.Time
}

// watchClones begins to watch. The lab's own writes are noted as they are made.
func (l *Lab) watchClones() (*movedClones, error) {
	s, err := dial(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.onlyProtocol(ourProtocol), s.patience(pause)); err != nil {
		s.close()
		return nil, err
	}
	m := &movedClones{sock: s, done: make(chan error, 1)}
	l.routes.sent = func(next int) { m.written = append(m.written, batchTime{next, time.Now()}) }
	go func() { m.done <- m.watch() }()
	return m, nil
}

func (m *movedClones) watch() error {
	for !m.end.Load() {
		err := m.sock.receive(func(h header, b []byte) bool {
			if dst, ok := destination(b); ok && h.typ == unix.RTM_NEWROUTE {
				m.seen = append(m.seen, sighting{dst, time.Now()})
			}
			return true
		})
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
	return nil
}

// lags ends the watching, and returns for each route that has a clone how long the clone took to follow; late is for how many it did not.
func (m *movedClones) lags(l *Lab) (lags Samples, late int, err error) {
	l.routes.sent = nil
	m.end.Store(true)
	err = <-m.done
	m.sock.close()
	first := map[netip.Prefix]time.Time{}
	for _, s := range m.seen {
		if _, again := first[s.dst]; !again {
			first[s.dst] = s.at
		}
	}
	batch, cloned := 0, l.world.coveredNets()
	for i, r := range l.world.Routes {
		for batch < len(m.written) && m.written[batch].next <= i {
			batch++
		}
		if !cloned[r.Dst] {
			continue
		}
		at, ok := first[r.Dst]
		if !ok || batch == len(m.written) {
			late++
			continue
		}
		lags.add(max(at.Sub(m.written[batch].at), 0))
	}
	return lags, late, err
}

// destination is that of a route message, if it has one.
func destination(b []byte) (netip.Prefix, bool) {
	if len(b) < unix.SizeofRtMsg {
		return netip.Prefix{}, false
	}
	for a := b[unix.SizeofRtMsg:]; len(a) >= unix.SizeofRtAttr; {
		n := int(ne.Uint16(a))
		if n < unix.SizeofRtAttr || n > len(a) {
			break
		}
		if ne.Uint16(a[2:]) == unix.RTA_DST {
			addr, ok := netip.AddrFromSlice(a[unix.SizeofRtAttr:n])
			return netip.PrefixFrom(addr, int(b[1])), ok
		}
		a = a[min((n+3)&^3, len(a)):]
	}
	return netip.Prefix{}, false
}

// coveredNets are the nets that policies are for. Where one is a route of the table, that has a clone.
func (w *World) coveredNets() map[netip.Prefix]bool {
	out := map[netip.Prefix]bool{}
	for _, p := range w.Policies {
		out[p.Dst] = true
	}
	return out
}
