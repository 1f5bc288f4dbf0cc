package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// The fake kernel's routes and rules.

func (w *world) Port() uint32 { return ourPort }

func (w *world) parse(msg []byte) routes.Route {
	w.t.Helper()
	var in routes.Interner
	r, err := in.ParseRoute(msg)
	if err != nil {
		w.t.Fatalf("the agent wrote a route that does not parse: %v", err)
	}
	return r
}

func (w *world) Replace(msg []byte) (uint32, error) {
	r := w.parse(msg)
	w.seq++
	seq := w.seq
	if fn := w.beforeEcho; fn != nil {
		w.beforeEcho = nil
		fn()
	}
	w.wrote("replace %s %s", r.Key(), show(r))
	if w.replaceErr != nil {
		return seq, w.replaceErr
	}
	have, n := w.kernel.Get(r.Key())
	if n == 0 {
		return seq, fmt.Errorf("fake: %w", unix.ENOENT)
	}
	if r.Body.Family == routes.IPv4 && have.Body.Raw == r.Body.Raw {
		return seq, nil // IPv4 tells nothing of a replace that changes nothing
	}
	w.routing(routes.RouteSet{Route: r, Replace: true, Origin: routes.Origin{Port: ourPort, Seq: seq}})
	return seq, nil
}

func (w *world) Batch(writes []routes.Write) ([]routes.Result, error) {
	out := make([]routes.Result, 0, len(writes))
	for _, x := range writes {
		if x.Op == routes.OpReplace {
			seq, err := w.Replace(x.Msg)
			out = append(out, routes.Result{Seq: seq, Err: err})
			continue
		}
		r := w.parse(x.Msg)
		w.seq++
		res := routes.Result{Seq: w.seq}
		from := routes.Origin{Port: ourPort, Seq: w.seq}
		switch x.Op {
		case routes.OpPut:
			w.wrote("put %s %s", r.Key(), show(r))
			if w.cloneErr != nil && r.Body.Type != routes.Throw {
				res.Err = w.cloneErr
				break
			}
			if w.copyErr != nil && plan.IsCopy(r.Body) {
				res.Err = w.copyErr
				break
			}
			if have, n := w.kernel.Get(r.Key()); n > 0 && r.Body.Family == routes.IPv4 && have.Body.Raw == r.Body.Raw {
				break
			}
			res.Events = []routes.Event{routes.RouteSet{Route: r, Replace: true, Origin: from}}
		case routes.OpDelete:
			w.wrote("delete %s", r.Key())
			if _, n := w.kernel.Get(r.Key()); n == 0 {
				res.Err = fmt.Errorf("fake: %w", unix.ESRCH)
			} else {
				res.Events = []routes.Event{routes.RouteGone{Route: r, Origin: from}}
			}
		default:
			w.t.Fatalf("op %d in a batch", x.Op)
		}
		if len(res.Events) > 0 {
			w.routing(res.Events...)
		}
		out = append(out, res)
	}
	return out, nil
}

func (w *world) AddRule(r routes.Rule) error {
	w.wrote("add rule %d %s", r.Priority, ruleText(r))
	if w.ruleErr != nil {
		return w.ruleErr
	}
	w.routing(routes.RuleSet{Rule: &r})
	return nil
}

func (w *world) DeleteRule(r routes.Rule) error {
	w.wrote("delete rule %d %s", r.Priority, ruleText(r))
	if !slices.ContainsFunc(w.kernel.Rules(r.Family), func(o *routes.Rule) bool { return *o == r }) {
		return fmt.Errorf("fake: %w", unix.ENOENT)
	}
	w.routing(routes.RuleGone{Rule: &r})
	return nil
}

// Lookup walks the rules and tables as the kernel does, as far as the tests need it.
func (w *world) Lookup(q routes.Query) (routes.Answer, error) {
	if w.lookup != nil {
		if ans := w.lookup(q); ans != nil {
			return *ans, nil
		}
	}
	if w.lookupErr != nil {
		return routes.Answer{}, w.lookupErr
	}
	fam := routes.FamilyOf(q.Dst)
	for _, r := range w.kernel.Rules(fam) {
		if r.Src.IsValid() && (!q.Src.IsValid() || !r.Src.Contains(q.Src)) || r.Dst.IsValid() && !r.Dst.Contains(q.Dst) {
			continue
		}
		m, _ := w.kernel.Cover(fam, r.Table, netip.PrefixFrom(q.Dst, q.Dst.BitLen()))
		first, ok := m.First()
		if !ok || first.Body.Type == routes.Throw {
			continue
		}
		mm := routes.MTUMetricOf(first.Body)
		n := first.Body.Nexthops[0]
		return routes.Answer{
			Type: first.Body.Type, Table: r.Table, Oif: n.Oif, Gateway: n.Gateway,
			PrefSrc: netip.MustParseAddr("10.1.0.1"), MTU: mm.MTU, MTULocked: mm.Locked, Route: first,
		}, nil
	}
	return routes.Answer{}, fmt.Errorf("%w: %w", routes.ErrUnreachable, unix.ENETUNREACH)
}

// The fake kernel's features.

func (w *world) Features(dev ethtool.Device) (*ethtool.Features, error) {
	if w.lateErr != nil {
		return nil, w.lateErr
	}
	f := w.feats[dev.Index]
	if f == nil || dev.Name != "" && f.Name != dev.Name {
		return nil, fmt.Errorf("fake: %w", errNoDevice)
	}
	return f, nil
}

// errNoDevice is ENODEV as package ethtool tells it.
var errNoDevice = errors.Join(unix.ENODEV, errNotExist)

var errNotExist = unix.ENOENT // matches os.ErrNotExist

func (w *world) Set(dev ethtool.Device, want map[ethtool.Feature]bool) (*ethtool.Features, error) {
	if fn := w.beforeSet; fn != nil {
		w.beforeSet = nil
		fn()
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		w.wrote("set %s %s %v", dev.Name, name, want[name])
	}
	if err := w.setErr; err != nil {
		w.setErr = nil
		return nil, err
	}
	late := w.lateErr
	w.lateErr = nil
	f, err := w.Features(dev)
	w.lateErr = late
	if err != nil {
		return nil, err
	}
	refused := &ethtool.RefusedError{Device: dev, Refused: map[ethtool.Feature]ethtool.State{}}
	for name, on := range want {
		if w.refuse[name] {
			s, _ := f.Get(name)
			refused.Refused[name] = s
			continue
		}
		f = w.turn(dev.Index, name, on)
	}
	if len(refused.Refused) > 0 {
		return f, refused
	}
	if late != nil {
		return nil, late
	}
	return f, nil
}

// turn switches a feature, as anybody could, and queues the event; a no-op is no event.
func (w *world) turn(i ethtool.Ifindex, name ethtool.Feature, on bool) *ethtool.Features {
	old := w.feats[i]
	state := maps.Collect(old.All())
	state[name] = ethtool.State{Active: on, Wanted: on, Changeable: true}
	f := ethtool.NewFeatures(i, old.Name, state)
	if !f.Equal(old) {
		w.feats[i] = f
		w.features(ethtool.FeaturesSet{Features: f})
	}
	return f
}

// fakeBook is the world's journal.
type fakeBook world

func (b *fakeBook) Put(entries ...journal.Entry) error {
	if b.putErr != nil {
		return b.putErr
	}
	for _, e := range entries {
		(*world)(b).wrote("journal put %s", e.ID)
		b.book[e.ID] = e
	}
	return nil
}

func (b *fakeBook) Remove(ids ...string) error {
	for _, id := range ids {
		if _, ok := b.book[id]; ok {
			(*world)(b).wrote("journal remove %s", id)
		}
		delete(b.book, id)
	}
	return nil
}

func (b *fakeBook) Entries() []journal.Entry {
	return slices.SortedFunc(maps.Values(b.book), func(x, y journal.Entry) int { return cmp.Compare(x.ID, y.ID) })
}

func (b *fakeBook) Len() int { return len(b.book) }

// found is what a restarted agent finds in the journal.
func (w *world) found() *journal.Recovery {
	return &journal.Recovery{Entries: (*fakeBook)(w).Entries()}
}
