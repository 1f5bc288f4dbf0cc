package owners

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A witness counts what is written in the namespace with the agent, from what the kernel tells of it.
type witness struct {
	conn *netlink.Conn
	mu   sync.Mutex
	n    writes
	done chan struct{}
}

// writes are numbers of notifications.
type writes struct {
	rules, rulesGone   int // of protocol 84
	clones, clonesGone int // of protocol 84
	locks              int // of anybody else's protocol, with a locked MTU of 1400
	theirs             int // of anybody else's protocol, without one
}

const (
	fraProtocol = 21 // FRA_PROTOCOL, linux/fib_rules.h
	ourProtocol = 84
)

func (l *lab) watch() *witness {
	l.Helper()
	w := &witness{done: make(chan struct{})}
	l.must(l.ours.In(func() (err error) {
		groups := uint32(0)
		for _, g := range []int{unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE} {
			groups |= 1 << (g - 1)
		}
		w.conn, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
		return err
	}))
	l.must(w.conn.SetReadBuffer(4 << 20))
	go func() {
		defer close(w.done)
		for {
			msgs, err := w.conn.Receive()
			if err != nil {
				return // it was closed
			}
			w.mu.Lock()
			for _, m := range msgs {
				w.n.count(m)
			}
			w.mu.Unlock()
		}
	}()
	l.Cleanup(func() {
		_ = w.conn.Close()
		<-w.done
	})
	return w
}

func (n *writes) count(m netlink.Message) {
	if len(m.Data) < rtmHeader {
		return
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[rtmHeader:])
	if err != nil {
		return
	}
	rule := m.Header.Type == unix.RTM_NEWRULE || m.Header.Type == unix.RTM_DELRULE
	ours := !rule && m.Data[5] == ourProtocol
	a := answer{}
	for ad.Next() {
		switch {
		case rule && ad.Type() == fraProtocol:
			ours = ad.Uint8() == ourProtocol
		case !rule && ad.Type() == unix.RTA_METRICS:
			ad.Nested(a.metrics)
		}
	}
	switch {
	case m.Header.Type == unix.RTM_NEWRULE && ours:
		n.rules++
	case m.Header.Type == unix.RTM_DELRULE && ours:
		n.rulesGone++
	case rule:
	case m.Header.Type == unix.RTM_NEWROUTE && ours:
		n.clones++
	case ours:
		n.clonesGone++
	case m.Header.Type == unix.RTM_NEWROUTE && a.locked && a.mtu == 1400:
		n.locks++
	case m.Header.Type == unix.RTM_NEWROUTE:
		n.theirs++
	}
}

func (w *witness) sofar() *writes {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.n
	return &n
}

// actions are the agent's own counts of what it did, by their names (tsoagent_actions_total).
func (l *lab) actions() map[string]int {
	l.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = l.ours.In(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}}}
	resp, err := client.Get("http://127.0.0.1:15450/metrics")
	l.must(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	l.must(err)
	out := map[string]int{}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, `tsoagent_actions_total{action="`); ok && strings.Contains(rest, `result="done"`) {
			name, _, _ := strings.Cut(rest, `"`)
			n, err := strconv.Atoi(strings.TrimSpace(line[strings.LastIndex(line, " "):]))
			l.must(err)
			out[name] += n
		}
	}
	if len(out) == 0 {
		l.Fatal("no metrics of actions")
	}
	return out
}

func (n *writes) String() string {
	return fmt.Sprintf("%d rules added and %d gone, %d clones put and %d gone, %d locks in place, %d routes of others", n.rules, n.rulesGone, n.clones, n.clonesGone, n.locks, n.theirs)
}
