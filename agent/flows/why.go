package flows

import (
	"fmt"

	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// cover says whether a connection is covered, where that leaves its segments, and why.
func (j *Join) cover(f *Flow, c *sockopt.Conn) {
	p, outer := j.policyOf(c)
	signed := c.MD5Keys+c.AOKeys > 0
	tainted := signed || c.GSODisabled
	var from *listener
	if tainted {
		from = j.from(c, (*listener).taints)
	}
	if signed && from != nil {
		from.signed++
	}
	switch {
	case c.Route.XFRM || p != nil:
		f.Coverage = CoveredByPolicy
		if p != nil {
			f.Policy = uint32(p.Index)
		}
		j.whyPolicy(f, c, p, outer)
		if signed {
			f.Why += "; " + keyWords(c)
		}
	case signed:
		f.Coverage = CoveredByKey
		f.Why = keyWords(c)
		if c.GSO {
			f.Contradiction = "it has a key and builds super-packets: the kernel should have taken GSO from it"
		}
	default:
		j.whyUncovered(f, c, from)
	}
}

// policyOf is the policy that covers a connection, nil for none. outer says that it is looked up
// behind the route: at an xfrm interface or a vti, or for a tunnel's outer packets.
func (j *Join) policyOf(c *sockopt.Conn) (p *xfrmwatch.Policy, outer bool) {
	w := j.world
	flow := flowOf(c)
	if p := certain(w.Policies.Lookup(flow)); p != nil {
		return p, false
	}
	d, ok := w.Devices[c.Route.Dev]
	if !ok {
		return nil, false
	}
	switch {
	case d.Wrapped != 0:
		return &xfrmwatch.Policy{Index: d.Wrapped}, true
	case d.IfID != 0:
		flow.IfID = d.IfID
	case d.VTI:
		flow.Mark = d.Mark
	default:
		return nil, false
	}
	flow.Oif = c.Route.Dev
	return certain(w.Policies.Lookup(flow)), true
}

// certain is a policy that covers for sure; optional templates may cover, or not.
func certain(p *xfrmwatch.Policy) *xfrmwatch.Policy {
	if p == nil {
		return nil
	}
	if covers, maybe := p.Covers(); !covers || maybe {
		return nil
	}
	return p
}

// whyPolicy says what a policy's coverage does to a connection. p is nil where only the socket knows
// of one.
func (j *Join) whyPolicy(f *Flow, c *sockopt.Conn, p *xfrmwatch.Policy, outer bool) {
	name := "an SA"
	if p != nil {
		name = fmt.Sprintf("policy %d", p.Index)
	}
	switch {
	case p != nil && outer && f.Segmentation == sockopt.SegOffload:
		f.Why = fmt.Sprintf("%s covers what leaves by %s, which takes super-packets", name, f.Device)
	case p != nil && outer && f.Segmentation == sockopt.SegSoftware:
		f.Why = fmt.Sprintf("%s covers what leaves by %s: TSO is off there, the kernel cuts ahead of it", name, f.Device)
	case p != nil && outer:
		f.Why = fmt.Sprintf("%s covers what leaves by %s", name, f.Device)
	case f.Segmentation == sockopt.SegNone && c.Route.XFRM && c.Route.Offload:
		// ESP would take super-packets: it is something else that has taken GSO from the socket.
		f.Why = name + " covers it, and would take super-packets"
		if c.GSODisabled && c.MD5Keys+c.AOKeys == 0 {
			f.Why += ": a key that it had, or its listener, has taken GSO from the socket"
		}
	case c.Route.XFRM && c.Route.DeviceESP && f.Segmentation == sockopt.SegOffload:
		f.Why = name + " covers it: the device cuts ESP"
	case c.Route.XFRM && c.Route.Offload:
		f.Why = name + " covers it: ESP is cut just ahead of the device"
	case f.Segmentation == sockopt.SegNone:
		f.Why = name + " covers it: the kernel takes GSO from the socket"
	default:
		f.Why = name + " covers it"
	}
	switch {
	case outer || c.State == sockopt.TimeWait:
	case p == nil && !j.world.Stale && !j.world.Policies.selectDevices():
		f.Contradiction = "an SA applies, but no policy that is known: a policy of the socket's own, or one that is gone since it sent last"
	case p != nil && c.Route.Dev != 0 && !c.Route.XFRM && !j.world.Stale:
		f.Contradiction = "no SA applies: it has sent nothing since the policy came, or the SA is missing"
	case c.Route.XFRM && !c.Route.Offload && c.GSO:
		f.Contradiction = "it builds super-packets: the kernel should have taken GSO from it"
	}
}

// whyUncovered says why a connection that nothing covers has lost offload, if it has. from is the
// listener whose loss it can have inherited.
func (j *Join) whyUncovered(f *Flow, c *sockopt.Conn, from *listener) {
	if f.Segmentation == sockopt.SegUnknown || f.Segmentation == sockopt.SegOffload {
		return
	}
	if 2*c.MSS > largest {
		f.Why = fmt.Sprintf("its segments have %d bytes: there is nothing to lose", c.MSS)
		return
	}
	f.Lost = connected(c.State)
	switch {
	case c.GSODisabled && from != nil:
		f.Listener = from.at.String()
		f.Why = fmt.Sprintf("no key, but inherited from listener %s, which %s", f.Listener, from.words())
		if f.Lost {
			from.lost++
		}
	case c.GSODisabled:
		f.Why = "no key now, but it had one, or its listener did: the loss stays"
		if f.Lost {
			j.orphans.lost++
		}
	case !c.GSO:
		f.Why = "the socket may not build super-packets"
		f.Contradiction = "no policy, SA or key tells why"
	case c.GSOMaxSegs == 1:
		f.Why = fmt.Sprintf("the socket has gso_max_segs 1, from %s", f.Device)
	case c.GSOMaxSize < 2*c.MSS:
		f.Why = fmt.Sprintf("gso_max_size of %s has no room for two segments", f.Device)
	default:
		j.whyDevice(f, c)
	}
}

// largest is the most that a super-packet has unless a device takes more (GSO_LEGACY_MAX_SIZE,
// linux/netdevice.h). Over lo, as a rule, no two segments fit one.
const largest = 65536

// whyDevice says why a device does not cut segments.
func (j *Join) whyDevice(f *Flow, c *sockopt.Conn) {
	d := j.world.Devices[c.Route.Dev]
	tso := d.TSO4
	if c.Remote.Addr().Is6() {
		tso = d.TSO6
	}
	switch {
	case c.Route.GSOMaxSegs == 1:
		f.Why = fmt.Sprintf("%s has gso_max_segs 1: the kernel cuts", f.Device)
	case tso.Held:
		f.Why = "we hold TSO off on " + f.Device
	case tso.Fixed && !tso.Active:
		// It never had any to lose.
		f.Lost, f.Why = false, f.Device+" can't do TSO: the kernel cuts"
	default:
		f.Why = "TSO is off on " + f.Device
	}
}

// words are what makes a listener taint what it accepts.
func (l *listener) words() string {
	if l.md5+l.ao > 0 {
		return "holds " + keyCount(l.md5, l.ao)
	}
	return "held a key once"
}

func keyCount(md5, ao int) string {
	text := ""
	for _, k := range []struct {
		n    int
		kind string
	}{{md5, "TCP-MD5"}, {ao, "TCP-AO"}} {
		if k.n == 0 {
			continue
		}
		if text != "" {
			text += " and "
		}
		text += fmt.Sprintf("%d %s key", k.n, k.kind)
		if k.n > 1 {
			text += "s"
		}
	}
	return text
}

func keyWords(c *sockopt.Conn) string {
	kind := "TCP-MD5"
	if c.MD5Keys == 0 {
		kind = "TCP-AO"
	}
	return kind + " key on this socket: the kernel takes GSO from it"
}

func whyListener(f *Flow, c *sockopt.Conn) {
	switch {
	case c.MD5Keys+c.AOKeys > 0:
		f.Coverage = CoveredByKey
		f.Why = "holds " + keyCount(int(c.MD5Keys), int(c.AOKeys)) + ": all that it accepts has no offload, signed or not"
	case c.GSODisabled:
		f.Why = "held a key once: all that it accepts has no offload"
	}
}
