package routes

import (
	"errors"

	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// oneByOne sends requests in system calls of their own, for the tests to get in between. In one, the kernel does them all: it does not look for
// signals (netlink_rcv_skb, net/netlink/af_netlink.c).
func (t *talk) oneByOne(msgs []byte) error {
	for len(msgs) > 0 {
		h, _, rest, err := nextMessage(msgs)
		before, after := pointsOf(h)
		if before != "" {
			failpoint.Hit(before)
		}
		if err = errors.Join(err, t.transmit(msgs[:len(msgs)-len(rest)])); err != nil {
			return err
		}
		if after != "" {
			failpoint.Hit(after) // the kernel does what it is asked for while it is sent
		}
		msgs = rest
	}
	return nil
}

// pointsOf are the points before and after a request, empty where it changes nothing.
func pointsOf(h Header) (before, after string) {
	switch {
	case h.Type == rtmNewRoute && h.Flags&unix.NLM_F_CREATE == 0:
		return "route-replace-before", "route-replace-after"
	case h.Type == rtmNewRoute:
		return "route-put-before", "route-put-after"
	case h.Type == rtmDelRoute:
		return "route-delete-before", "route-delete-after"
	case h.Type == rtmNewRule:
		return "rule-add-before", "rule-add-after"
	case h.Type == rtmDelRule:
		return "rule-delete-before", "rule-delete-after"
	case h.Type == rtmSetLink:
		return "link-mtu-before", "link-mtu-after"
	}
	return "", ""
}
