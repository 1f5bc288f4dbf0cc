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

// around is at the failpoint before a write, and returns what is at the one after it.
func (o Op) around() (after func()) {
	typ, flags := o.header()
	return around(netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.HeaderFlags(flags)})
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
