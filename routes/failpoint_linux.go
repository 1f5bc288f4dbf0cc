package routes

import (
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// around is at the failpoint before a request, and returns what is at the one after it. The kernel does what it is asked for while it is sent.
func around(h netlink.Header) (after func()) {
	before, behind := pointsOf(h)
	if before == "" {
		return func() {}
	}
	failpoint.Hit(before)
	return func() { failpoint.Hit(behind) }
}

// oneByOne sends requests in system calls of their own, for the tests to get in between. In one, the kernel does them all: it does not look for
// signals (netlink_rcv_skb, net/netlink/af_netlink.c).
func (t *talk) oneByOne(ms []netlink.Message) ([]netlink.Message, error) {
	for i := range ms {
		var err error
		if ms[i], err = t.Send(ms[i]); err != nil {
			return ms, err
		}
	}
	return ms, nil
}

// pointsOf are the points before and after a request, empty where it changes nothing.
func pointsOf(h netlink.Header) (before, after string) {
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
