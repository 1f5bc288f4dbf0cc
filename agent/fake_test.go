package agent

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// world is a fake kernel with an agent on it. Nothing happens by itself: the test emits events,
// sets the time and has the loop's step called by settle. Every write to the kernel and to the
// journal is one line of ops, in the order in which it was made.
type world struct {
	t    testing.TB
	a    *Agent
	now  time.Time
	next time.Duration // what the last step asked for
	logs bytes.Buffer

	kernel *routes.FIB // what the kernel really has
	feats  map[ethtool.Ifindex]*ethtool.Features
	book   map[string]journal.Entry
	queue  []batch    // events on their way to the agent
	live   bool       // events don't wait for the test: the agent's own loop runs
	loops  sync.Mutex // a loop does one thing at a time: it makes rounds, or answers those who ask it
	seq    uint32
	ops    []string

	refuse     map[ethtool.Feature]bool
	setErr     error // of the next Set
	lateErr    error // of the next Set, which was done, and of all reads of features until it is nil
	putErr     error // of the journal's Put
	replaceErr error
	ruleErr    error
	cloneErr   error                             // of putting a route that is no throw
	copyErr    error                             // of every copy for what is bound to a device
	beforeSet  func()                            // runs once, ahead of the next Set
	beforeEcho func()                            // runs once, when the next Replace reaches the kernel, ahead of it
	lookup     func(routes.Query) *routes.Answer // overrides the fake's own answer
	lookupErr  error                             // of all lookups
}

const ourPort, ownerPort = 4242, 4711

// newWorld is a world with nothing but lo and nic1 (192.0.2.1/24, 10.1.0.1/16, a default route by 192.0.2.254).
// The agent has not read it yet.
func newWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := &world{
		t: t, now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), kernel: routes.NewFIB(),
		feats: map[ethtool.Ifindex]*ethtool.Features{}, book: map[string]journal.Entry{},
	}
	w.kernel.Apply(routes.ResyncBegin{})
	w.kernel.Apply(routes.ResyncEnd{})
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for p, table := range map[uint32]routes.TableID{0: routes.TableLocal, 32766: routes.TableMain} {
			w.kernel.Apply(routes.RuleSet{Rule: &routes.Rule{
				Family: f, Priority: p, Action: routes.RuleToTable, Table: table, Protocol: routes.ProtoKernel,
				SuppressPrefixLen: -1, SuppressIfgroup: -1,
			}})
		}
	}
	w.addLink(&routes.Link{Index: 1, Name: "lo", Type: 772, MTU: 65536, Up: true}, "192.0.2.1/32")
	w.addLink(&routes.Link{Index: 2, Name: "nic1", Type: 1, MTU: 1500, Up: true, PermAddr: "02:00:00:00:00:02"}, "192.0.2.1/24", "10.1.0.1/16")
	w.addRoute("192.0.2.0/24", hop{oif: 2}, proto(routes.ProtoKernel))
	w.addRoute("10.1.0.0/16", hop{oif: 2}, proto(routes.ProtoKernel))
	w.addRoute("0.0.0.0/0", hop{oif: 2, gw: "192.0.2.254"})
	w.queue = nil
	w.restart(cfg)
	return w
}

// restart gives the world a new agent, as after a crash of the old one: it finds the journal and
// reads everything anew.
func (w *world) restart(cfg Config) {
	w.a = newAgent(cfg, slog.New(slog.NewTextHandler(&w.logs, &slog.HandlerOptions{Level: slog.LevelDebug})), "test")
	if cfg.Plan.SourceLess == "" {
		// Whether this host forwards is not to matter.
		w.a.cfg.Plan.SourceLess = "off"
	}
	w.a.started, w.a.ring.since = w.now, w.now
	w.a.clock = func() time.Time { return w.now }
	w.a.inbox.clock = w.a.clock
	w.a.rt, w.a.et, w.a.journal = w, w, (*fakeBook)(w)
	w.queue, w.ops = nil, nil
}

// resync queues a dump of everything but the policies and SAs, which the test sends.
func (w *world) resync() {
	w.send(batch{routes: w.dumpRoutes()})
	w.send(batch{features: w.dumpFeatures()})
}

func (w *world) dumpRoutes() []routes.Event {
	out := []routes.Event{routes.ResyncBegin{}}
	for _, l := range w.kernel.Links() {
		out = append(out, routes.LinkSet{Link: l})
		for p := range w.kernel.Addrs(l.Index) {
			out = append(out, routes.AddrSet{Addr: routes.Addr{Ifindex: l.Index, Prefix: p}})
		}
	}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, r := range w.kernel.Rules(f) {
			out = append(out, routes.RuleSet{Rule: r})
		}
		for _, id := range w.kernel.Tables(f) {
			for r := range w.kernel.Table(f, id) {
				out = append(out, routes.RouteSet{Route: r})
			}
		}
	}
	return append(out, routes.ResyncEnd{})
}

func (w *world) dumpFeatures() []ethtool.Event {
	out := []ethtool.Event{ethtool.ResyncBegin{}}
	for _, i := range slices.Sorted(maps.Keys(w.feats)) {
		out = append(out, ethtool.FeaturesSet{Features: w.feats[i]})
	}
	return append(out, ethtool.ResyncEnd{})
}

// dumpXFRM queues a dump of these policies and SAs.
func (w *world) dumpXFRM(items ...xfrmwatch.Event) {
	ev := []xfrmwatch.Event{xfrmwatch.ResyncBegin{}}
	for _, it := range slices.Backward(items) {
		switch it := it.(type) {
		case xfrmwatch.PolicySet:
			it.Dumped = true
			ev = append(ev, it)
		case xfrmwatch.SASet:
			it.Dumped = true
			ev = append(ev, it)
		}
	}
	w.send(batch{xfrm: append(ev, xfrmwatch.ResyncEnd{})})
}

// start lets the agent read everything, and settles.
func (w *world) start(items ...xfrmwatch.Event) {
	w.t.Helper()
	w.resync()
	w.dumpXFRM(items...)
	w.settle()
}

// xfrm and routing queue events; settle delivers them.
func (w *world) xfrm(ev ...xfrmwatch.Event) { w.send(batch{xfrm: ev}) }

func (w *world) send(b batch) {
	if w.live {
		w.a.inbox.put(b)
		return
	}
	w.queue = append(w.queue, b)
}

// routing changes the fake kernel's routing and queues the events.
func (w *world) routing(ev ...routes.Event) {
	for _, e := range ev {
		w.kernel.Apply(e)
	}
	w.send(batch{routes: ev})
}

func (w *world) features(ev ...ethtool.Event) { w.send(batch{features: ev}) }

// step delivers what is queued and calls the loop's step once.
func (w *world) step() (reached bool) {
	queue := w.queue
	w.queue = nil
	for _, b := range queue {
		if b.len() > 0 {
			b.at = w.now
			w.a.inbox.post(b) // which never waits: nobody else reads
		}
	}
	w.loops.Lock()
	defer w.loops.Unlock()
	w.next, reached = w.a.step(w.now)
	return reached
}

// settle steps until the agent wants nothing more at this moment.
func (w *world) settle() (reached bool) {
	w.t.Helper()
	for range 100 {
		reached = w.step()
		if len(w.queue) == 0 && w.next != time.Nanosecond {
			if _, measured := w.t.(*testing.B); !measured {
				w.agree()
			}
			return reached
		}
	}
	w.t.Fatalf("the loop does not come to rest; last:\n%s", strings.Join(w.ops[max(0, len(w.ops)-20):], "\n"))
	return false
}

// advance lets time pass, as far as the loop's timers want, and settles at each of them.
func (w *world) advance(d time.Duration) {
	w.t.Helper()
	end := w.now.Add(d)
	for range 10000 {
		if w.next <= 0 || w.now.Add(w.next).After(end) {
			w.now = end
			w.settle()
			return
		}
		w.now = w.now.Add(w.next)
		w.settle()
	}
	w.t.Fatalf("the loop spins: its timer is %s", w.next)
}

// took returns the writes since the last call.
func (w *world) took() []string {
	ops := w.ops
	w.ops = nil
	return ops
}

func (w *world) wrote(format string, args ...any) {
	w.ops = append(w.ops, fmt.Sprintf(format, args...))
}

// quiet fails if anything but the journal's notes of MTUs was written since the last call of
// took.
func (w *world) quiet(what string) {
	w.t.Helper()
	if ops := w.tookButMTUs(); len(ops) > 0 {
		w.t.Errorf("%s: written:\n%s", what, strings.Join(ops, "\n"))
	}
}

func (w *world) tookButMTUs() []string {
	return slices.DeleteFunc(w.took(), func(op string) bool {
		return strings.HasPrefix(op, "journal put mtu/") || strings.HasPrefix(op, "journal remove mtu/")
	})
}

// route is the fake kernel's route to a destination in table main, as text; "none" without one.
func (w *world) route(dst string) string {
	p := netip.MustParsePrefix(dst)
	var out []string
	for r := range w.kernel.Table(routes.FamilyOf(p.Addr()), routes.TableMain) {
		if r.Dst == p {
			out = append(out, show(r))
		}
	}
	slices.Sort(out)
	return cmp.Or(strings.Join(out, "; "), "none")
}

func show(r routes.Route) string {
	var via []string
	for _, n := range r.Body.Nexthops {
		s := fmt.Sprintf("dev %d", n.Oif)
		if n.Gateway.IsValid() {
			s = "via " + n.Gateway.String() + " " + s
		}
		via = append(via, s)
	}
	if r.Body.Type == routes.Throw {
		via = []string{"throw"}
	}
	if m := routes.MTUMetricOf(r.Body); m.MTU != 0 {
		via = append(via, m.String())
	}
	return strings.Join(via, " ")
}

// held is what is off on a device, as a list of features.
func (w *world) held(i ethtool.Ifindex) string {
	var off []string
	for f, s := range w.feats[i].All() {
		if !s.Wanted && s.Changeable {
			off = append(off, string(f))
		}
	}
	return strings.Join(off, " ")
}

const allTSO = "tx-tcp-ecn-segmentation tx-tcp-segmentation tx-tcp6-segmentation"

func (w *world) hold(feature ethtool.Feature) HoldReport {
	w.t.Helper()
	for _, h := range w.a.Report().Holds {
		if h.Feature == string(feature) {
			return h
		}
	}
	w.t.Fatalf("the report has no hold of %s: %+v", feature, w.a.Report().Holds)
	return HoldReport{}
}

// Devices and routes of the world.

// addLink adds a device with TSO on.
func (w *world) addLink(l *routes.Link, addrs ...string) {
	ev := []routes.Event{routes.LinkSet{Link: l}}
	for _, s := range addrs {
		ev = append(ev, routes.AddrSet{Addr: routes.Addr{Ifindex: l.Index, Prefix: netip.MustParsePrefix(s)}})
	}
	w.routing(ev...)
	on := ethtool.State{Active: true, Wanted: true, Changeable: true}
	f := ethtool.NewFeatures(ethtool.Ifindex(l.Index), l.Name, map[ethtool.Feature]ethtool.State{
		ethtool.TCPSegmentation: on, ethtool.TCP6Segmentation: on, ethtool.TCPECNSegmentation: on,
		ethtool.GenericSegm: on,
	})
	w.feats[f.Index] = f
	w.features(ethtool.FeaturesSet{Features: f})
}

type hop struct {
	oif routes.Ifindex
	gw  string
	mtu routes.MTUMetric
}

type routeOption func(*routeSpec)

type routeSpec struct {
	proto  routes.Protocol
	table  routes.TableID
	metric uint32
}

func proto(p routes.Protocol) routeOption { return func(s *routeSpec) { s.proto = p } }

func metric(m uint32) routeOption { return func(s *routeSpec) { s.metric = m } }

// newRoute builds a route as a daemon would write it.
func newRoute(t testing.TB, dst string, h hop, opts ...routeOption) routes.Route {
	t.Helper()
	p := netip.MustParsePrefix(dst)
	s := routeSpec{proto: routes.ProtoStatic, table: routes.TableMain}
	for _, o := range opts {
		o(&s)
	}
	b := make([]byte, 12)
	b[0], b[1], b[4], b[5], b[7] = byte(routes.FamilyOf(p.Addr())), byte(p.Bits()), byte(s.table), byte(s.proto), byte(routes.Unicast)
	attr := func(typ uint16, v []byte) {
		b = binary.NativeEndian.AppendUint16(b, uint16(4+len(v)))
		b = binary.NativeEndian.AppendUint16(b, typ)
		b = append(b, v...)
	}
	u32 := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	attr(unix.RTA_TABLE, u32(uint32(s.table)))
	attr(unix.RTA_DST, p.Addr().AsSlice())
	if s.metric != 0 {
		attr(unix.RTA_PRIORITY, u32(s.metric))
	}
	attr(unix.RTA_OIF, u32(uint32(h.oif)))
	if h.gw != "" {
		attr(unix.RTA_GATEWAY, netip.MustParseAddr(h.gw).AsSlice())
	}
	var in routes.Interner
	r, err := in.ParseRoute(b)
	if err == nil && h.mtu.MTU != 0 {
		if b, err = routes.EncodeLock(r, h.mtu); err == nil {
			r, err = in.ParseRoute(b)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// addRoute is what `ip route add` does.
func (w *world) addRoute(dst string, h hop, opts ...routeOption) {
	w.t.Helper()
	w.seq++
	w.routing(routes.RouteSet{Route: newRoute(w.t, dst, h, opts...), Origin: routes.Origin{Port: ownerPort, Seq: w.seq}})
}

// replaceRoute is what `ip route replace` does.
func (w *world) replaceRoute(dst string, h hop, opts ...routeOption) {
	w.t.Helper()
	w.seq++
	w.routing(routes.RouteSet{Route: newRoute(w.t, dst, h, opts...), Replace: true, Origin: routes.Origin{Port: ownerPort, Seq: w.seq}})
}

// deleteRoute is what `ip route del` does.
func (w *world) deleteRoute(dst string) {
	w.t.Helper()
	p := netip.MustParsePrefix(dst)
	for r := range w.kernel.Table(routes.FamilyOf(p.Addr()), routes.TableMain) {
		if r.Dst == p {
			w.seq++
			w.routing(routes.RouteGone{Route: r, Origin: routes.Origin{Port: ownerPort, Seq: w.seq}})
			return
		}
	}
	w.t.Fatalf("no route to %s", dst)
}
