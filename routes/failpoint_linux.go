package routes

import (
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// Send sends a request.
func (c *conn) Send(m netlink.Message) (netlink.Message, error) {
	if !failpoint.Armed() {
		return c.Conn.Send(m)
	}
	before, after := pointsOf(m.Header)
	if before == "" {
		return c.Conn.Send(m)
	}
	failpoint.Hit(before)
	sent, err := c.Conn.Send(m)
	failpoint.Hit(after) // the kernel does what it is asked for while it is sent
	return sent, err
}

// SendMessages sends requests in one system call, where no test wants to get in between. In one, the kernel does them
// all: it does not look for signals (netlink_rcv_skb, net/netlink/af_netlink.c).
func (c *conn) SendMessages(msgs []netlink.Message) ([]netlink.Message, error) {
	if !failpoint.Armed() {
		return c.Conn.SendMessages(msgs)
	}
	out := make([]netlink.Message, 0, len(msgs))
	for _, m := range msgs {
		sent, err := c.Send(m)
		if err != nil {
			return out, err
		}
		out = append(out, sent)
	}
	return out, nil
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
