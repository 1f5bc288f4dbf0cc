package flows

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// Join takes sockets one by one, and says of each what is true of it. Listeners come before the
// connections that they accepted: the kernel lists its table of listeners first (tcp_seek_last_pos,
// net/ipv4/tcp_ipv4.c). It keeps listeners only, so it costs the same memory however many
// connections there are. It is not safe for concurrent use.
type Join struct {
	world  *World
	filter Filter
	// Processes says who has a socket open, nil where nobody asks.
	Processes func(inode uint64) []Process

	sum       Summary
	listeners map[uint16][]*listener
	orphans   listener // connections whose listener is gone
	flow      Flow
}

// listener is one address that is listened on, by one socket or by several (SO_REUSEPORT).
type listener struct {
	at           netip.AddrPort
	dev          int32
	v6only       bool
	md5, ao      int
	disabled     bool
	inodes       []uint64
	lost, signed int
}

// taints says that what it accepts has no offload.
func (l *listener) taints() bool { return l.disabled || l.md5+l.ao > 0 }

// takes says that a connection can have come to the listener.
func (l *listener) takes(c *sockopt.Conn) bool {
	return covers(l.at.Addr(), c.Local.Addr()) && (!l.v6only || c.Local.Addr().Is6()) && (l.dev == 0 || l.dev == c.BoundDev)
}

// NewJoin starts a join.
func NewJoin(w *World, f Filter) *Join {
	return &Join{world: w, filter: f, listeners: map[uint16][]*listener{}}
}

// Add takes one socket. It returns nil for one that is not asked for, else a Flow that is good until
// the next Add.
func (j *Join) Add(c *sockopt.Conn) *Flow {
	if c.State == sockopt.Listen {
		j.listen(c)
	}
	if connected(c.State) {
		j.sum.Connections++
	}
	wanted := j.filter.States.match(c.State)
	if !wanted && !connected(c.State) {
		return nil
	}
	j.flow = Flow{
		State: StateName(c.State), Local: c.Local.String(), Coverage: NotCovered,
		Segmentation: c.Segmentation(), UID: c.UID, Inode: c.Inode,
	}
	f := &j.flow
	if c.Route.Dev != 0 {
		f.Device = j.device(c.Route.Dev)
	}
	if c.State == sockopt.Listen {
		whyListener(f, c)
	} else {
		f.Remote = c.Remote.String()
		j.cover(f, c)
	}
	if !wanted || !j.asked(f, c) {
		return nil
	}
	j.count(f)
	if j.Processes != nil && c.Inode != 0 {
		f.Processes = j.Processes(c.Inode)
	}
	return f
}

// asked is the filter, but for the state.
func (j *Join) asked(f *Flow, c *sockopt.Conn) bool {
	if j.filter.Lost && !f.Lost || j.filter.Device != "" && f.Device != j.filter.Device {
		return false
	}
	want := j.filter.Listener
	if want.Port == 0 {
		return true
	}
	if c.Local.Port() != want.Port {
		return false
	}
	if !want.Addr.IsValid() || c.Local.Addr() == want.Addr {
		return true
	}
	l := j.from(c, func(*listener) bool { return true })
	return c.State != sockopt.Listen && l != nil && l.at.Addr() == want.Addr
}

func (j *Join) count(f *Flow) {
	s := &j.sum
	s.Shown++
	switch f.Coverage {
	case CoveredByPolicy:
		s.Policy++
	case CoveredByKey:
		s.Key++
	default:
		s.Uncovered++
	}
	switch f.Segmentation {
	case sockopt.SegOffload:
		s.Offload++
	case sockopt.SegSoftware:
		s.Software++
	case sockopt.SegNone:
		s.None++
	default:
		s.Unknown++
	}
	if f.Lost {
		s.Lost++
	}
	if f.Contradiction != "" {
		s.Contradictions++
	}
}

// listen notes a listener.
func (j *Join) listen(c *sockopt.Conn) {
	port := c.Local.Port()
	i := slices.IndexFunc(j.listeners[port], func(l *listener) bool { return l.at == c.Local && l.dev == c.BoundDev && l.v6only == c.V6Only })
	var l *listener
	if i >= 0 {
		l = j.listeners[port][i]
	} else {
		l = &listener{at: c.Local, dev: c.BoundDev, v6only: c.V6Only}
		j.listeners[port] = append(j.listeners[port], l)
	}
	l.md5, l.ao = max(l.md5, int(c.MD5Keys)), max(l.ao, int(c.AOKeys))
	l.disabled = l.disabled || c.GSODisabled
	if c.Inode != 0 && len(l.inodes) < maxInodes {
		l.inodes = append(l.inodes, c.Inode)
	}
}

// maxInodes bounds the sockets of one listener whose processes are looked for.
const maxInodes = 16

// from is the listener that a connection came from, of those that are meant: the most specific one
// that takes its local address, as in __inet_lookup_listener (net/ipv4/inet_hashtables.c). nil means
// that there is none.
func (j *Join) from(c *sockopt.Conn, meant func(*listener) bool) *listener {
	var best *listener
	most := -1
	for _, l := range j.listeners[c.Local.Port()] {
		if !meant(l) || !l.takes(c) {
			continue
		}
		score := 0
		if !l.at.Addr().IsUnspecified() {
			score += 4
		}
		if l.dev != 0 {
			score += 2
		}
		if l.at.Addr().Is4() == c.Local.Addr().Is4() {
			score++
		}
		if score > most {
			best, most = l, score
		}
	}
	return best
}

// device is the name of a device.
func (j *Join) device(i int32) string {
	if d, ok := j.world.Devices[i]; ok {
		return d.Name
	}
	return fmt.Sprintf("if%d", i)
}

// Result is what was found in all.
func (j *Join) Result() *Result {
	r := &Result{Version: Version, Stale: j.world.Stale, Summary: j.sum, Collateral: []Collateral{}}
	all := []*listener{&j.orphans}
	for _, list := range j.listeners {
		all = append(all, list...)
	}
	all = slices.DeleteFunc(all, func(l *listener) bool { return l.lost == 0 })
	slices.SortFunc(all, func(a, b *listener) int {
		return cmp.Or(cmp.Compare(b.lost, a.lost), a.at.Compare(b.at), cmp.Compare(a.dev, b.dev))
	})
	for i, l := range all {
		if i >= maxCollateral {
			r.MoreCollateral += l.lost
			continue
		}
		c := Collateral{MD5Keys: l.md5, AOKeys: l.ao, Lost: l.lost, Signed: l.signed, Processes: []Process{}, Inodes: l.inodes}
		if l.at.IsValid() {
			c.Listener, c.Port = l.at.String(), l.at.Port()
		}
		if l.dev != 0 {
			c.Device = j.device(l.dev)
		}
		r.Collateral = append(r.Collateral, c)
	}
	return r
}

// maxCollateral bounds the listeners that are listed.
const maxCollateral = 64

// flowOf is a connection as the policy lookup sees it. For IPv4 the output device is the route's, for
// IPv6 only the one that the socket is bound to (KERNEL.md 48).
func flowOf(c *sockopt.Conn) xfrmwatch.Flow {
	f := xfrmwatch.Flow{
		Src: c.Local.Addr(), Dst: c.Remote.Addr(), Proto: protoTCP,
		Sport: c.Local.Port(), Dport: c.Remote.Port(), Mark: c.Mark, Oif: c.BoundDev,
	}
	if c.Remote.Addr().Is4() {
		f.Oif = c.Route.Dev
	}
	return f
}

const protoTCP xfrmwatch.Proto = 6

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a.WithZone(""), a.BitLen()) }
